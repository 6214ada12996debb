import pytest

from hf_distill import DistillError
from hf_distill.losses import get_loss, loss


def test_keyword_parameters_of_a_loss_function_are_options():
    @loss("mine", compares=("logits",), paper="0000.00000")
    def mine(student, teacher, targets, *, sharpness: float = 3.0):
        return student

    assert get_loss("mine").options == {"sharpness": 3.0}
    with pytest.raises(DistillError, match="no option 'sharpnes'; did you mean 'sharpness'"):
        get_loss("mine").check({"sharpnes": 1})


def test_an_unknown_loss_gets_a_suggestion():
    with pytest.raises(DistillError, match="Unknown loss 'foward_kl'; did you mean 'forward_kl'"):
        get_loss("foward_kl")


def test_a_loss_with_kwargs_is_refused():
    with pytest.raises(DistillError, match="so that a misspelled option is an error"):

        @loss("greedy")
        def greedy(student, teacher, targets, **kwargs):
            return student


def test_a_registered_name_cannot_be_used_again():
    with pytest.raises(DistillError, match="registered already"):

        @loss("forward_kl")
        def other(student, teacher, targets):
            return student


@pytest.mark.parametrize("name", ["my.loss", "my loss", ""])
def test_a_name_that_is_no_identifier_is_refused(name):
    with pytest.raises(DistillError, match="letters, digits and _ only"):
        loss(name)


@pytest.mark.parametrize("compares", [("hiden",), ("logits", "hidden")])
def test_unknown_outputs_to_compare_are_refused(compares):
    with pytest.raises(DistillError, match="an empty tuple, or one of: logits, hidden, attention, values"):
        loss("mine", compares=compares)


def test_a_custom_loss_on_hidden_states_is_trained(make_trainer):
    @loss("hidden_l1", compares=("hidden",), project=True)
    def hidden_l1(student, teacher, targets):
        return (student - teacher).abs().mean(-1)

    trainer = make_trainer(losses=[{"name": "hidden_l1", "layers": "last:1"}], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["hidden_l1_loss"] > 0
