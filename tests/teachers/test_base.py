import re
import textwrap

import pytest
from tiny import build

from hf_distill import FrozenTeacher, Teacher


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
