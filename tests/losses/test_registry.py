import pytest

from hf_distill import DistillError
from hf_distill.losses import LOSSES, get_loss, loss


@pytest.fixture(autouse=True)
def _table_as_it_was():
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


def test_a_functions_keyword_parameters_are_its_options():
    @loss("mine", needs=("logits",), paper="0000.00000")
    def mine(student, teacher, targets, *, sharpness: float = 3.0):
        return student

    assert get_loss("mine").options == {"sharpness": 3.0}
    with pytest.raises(DistillError, match="no option 'sharpnes'; did you mean 'sharpness'"):
        get_loss("mine").check({"sharpnes": 1})


def test_an_unknown_name_is_answered_with_a_near_one():
    with pytest.raises(DistillError, match="Unknown loss 'foward_kl'; did you mean 'forward_kl'"):
        get_loss("foward_kl")


def test_a_loss_cannot_swallow_typos():
    with pytest.raises(DistillError, match="so that typos are found"):

        @loss("greedy")
        def greedy(student, teacher, targets, **kwargs):
            return student


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(DistillError, match="registered already"):

        @loss("forward_kl")
        def other(student, teacher, targets):
            return student


@pytest.mark.parametrize("name", ["my.loss", "my loss", ""])
def test_a_name_that_no_module_could_carry_is_refused(name):
    with pytest.raises(DistillError, match="letters, digits and _ only"):
        loss(name)


@pytest.mark.parametrize("needs", [("hiden",), ("logits", "hidden")])
def test_needs_that_nothing_can_give_are_refused(needs):
    with pytest.raises(DistillError, match="needs nothing, or one of: logits, hidden, attention, values"):
        loss("mine", needs=needs)


def test_a_loss_of_ones_own_on_hidden_states_is_trained(make_trainer):
    @loss("hidden_l1", needs=("hidden",), project=True)
    def hidden_l1(student, teacher, targets):
        return (student - teacher).abs().mean(-1)

    trainer = make_trainer(losses=[{"name": "hidden_l1", "layers": "last:1"}], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["hidden_l1_loss"] > 0
