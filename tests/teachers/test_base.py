import re
import textwrap

import pytest
import torch
from tiny import VOCAB, build

from hf_distill import DistillError, FrozenTeacher, Teacher
from hf_distill.core.logits import DenseLogits, SparseLogProbs
from hf_distill.core.signals import Signals


def test_the_custom_teacher_of_the_docstring_gives_the_losses_of_a_frozen_teacher(make_trainer):
    example = re.search(r"^ +import torch$.*?(?=^ +trainer = )", Teacher.__doc__, re.MULTILINE | re.DOTALL).group()
    namespace = {}
    exec(textwrap.dedent(example), namespace)
    logs = []
    for name, teacher_class in (("custom", namespace["MyTeacher"]), ("frozen", FrozenTeacher)):
        trainer = make_trainer(teacher=teacher_class(build("llama", 1, layers=3, width=48)), folder=name, max_steps=2)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(logs[0]) == 2
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


WRONG_SIGNALS = {
    "a tensor": (lambda t: torch.zeros(t, VOCAB), "returned a Tensor"),
    "nothing": (lambda t: None, "returned a NoneType"),
    "a tensor as logits": (lambda t: Signals(torch.zeros(t, VOCAB)), "returned logits of the type Tensor"),
    "too few rows": (lambda t: Signals(DenseLogits(torch.zeros(t - 1, VOCAB))), r"shape \(\d+, 97\)"),
    "all positions": (lambda t: Signals(DenseLogits(torch.zeros(4, 12, VOCAB))), r"shape \(4, 12, 97\)"),
    "sparse rows": (
        lambda t: Signals(SparseLogProbs(torch.zeros(t + 1, 2).long(), torch.zeros(t + 1, 2), None)),
        r"SparseLogProbs with a tensor of shape \(\d+, 2\)",
    ),
}


@pytest.mark.parametrize("kind", WRONG_SIGNALS)
def test_a_custom_teacher_that_returns_something_else_gets_the_contract_in_the_error(make_trainer, kind):
    make, message = WRONG_SIGNALS[kind]

    class Wrong(Teacher):
        def forward(self, inputs, targets, feature_requests):
            return make(len(targets))

    with pytest.raises(
        DistillError, match=rf"Wrong.forward {'' if message[0] == 'r' else '.*'}{message}.*gather_logits"
    ):
        make_trainer(teacher=Wrong(), max_steps=1, self_check=False).train()
