"""`build_objective` makes the terms of student and teacher, and its checks change nothing."""

import copy

import pytest
import torch
from tiny import build

from hf_distill import DistillConfig, DistillError, FrozenTeacher, Teacher
from hf_distill.core.signals import Signals
from hf_distill.losses import loss
from hf_distill.losses.registry import LOSSES
from hf_distill.teachers import MTPTeacher, MultiTeacher, MultiViewTeacher, PeerTeacher
from hf_distill.trainer.config import DistillArguments
from hf_distill.trainer.terms import build_objective


class NoSoftLabels(Teacher):
    provides_soft_labels = False

    def forward(self, inputs, targets, feature_requests):
        return Signals(None)


def summary(terms):
    return [(term.name, round(term.weight, 6), term.teacher) for term in terms]


SOFT_AND_HARD = [("soft", 0.6, None), ("hard", 0.4, None)]
OBJECTIVES = {  # teacher, terms of the student, terms of the teacher
    "frozen": (lambda: FrozenTeacher(build("llama", 1)), SOFT_AND_HARD, []),
    "online": (lambda: PeerTeacher(build("llama", 1)), SOFT_AND_HARD, [("peer_hard", 1.0, None)]),
    "mutual": (
        lambda: PeerTeacher(build("llama", 1), mutual=True),
        SOFT_AND_HARD,
        [("peer_soft", 0.6, None), ("peer_hard", 0.4, None)],
    ),
    "several": (
        lambda: MultiTeacher({"a": build("llama", 1), "b": PeerTeacher(build("llama", 2))}, {"a": 3.0}),
        [("soft_a", 0.45, "a"), ("soft_b", 0.15, "b"), ("hard", 0.4, None)],
        [("peer_hard", 1.0, None)],
    ),
    "heads": (
        lambda: MultiTeacher({"a": build("llama", 1), "ahead": MTPTeacher(1)}),
        [("soft_a", 0.6, "a"), ("hard", 0.4, None)],
        [("mtp_soft_1", 0.1, None), ("mtp_hard_1", 0.3, None)],
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_terms_of_student_and_teacher_have_their_weights_however_often_they_are_built(name):
    make, student, of_teacher = OBJECTIVES[name]
    teacher = make()
    for _ in range(2):
        objective = build_objective(DistillArguments(alpha=0.6), teacher)
        assert summary(objective.student) == student
        assert summary(objective.teacher) == of_teacher


def test_all_problems_of_an_objective_are_in_one_error(monkeypatch):
    @loss(name="peer_hard", compares=())
    def peer_hard(student, teacher, targets):
        return torch.zeros(len(targets))

    monkeypatch.setitem(LOSSES, "peer_hard", LOSSES.pop("peer_hard"))  # removed after the test
    view = MultiViewTeacher({"paraphrase": True})
    view.prepare(build("llama", 0), torch.device("cpu"))
    teacher = MultiTeacher({"view": view, "peer": PeerTeacher(build("llama", 1))})
    losses = [
        {"name": "js", "teacher": "viewer"},
        {"name": "attention_kl", "teacher": "peer"},
        {"name": "peer_hard", "weight": 0.1},
    ]
    with pytest.raises(DistillError, match="'viewer', which is not one of the teachers with soft labels") as error:
        build_objective(DistillArguments(losses=losses), teacher)
    assert "view: attention_kl_peer compares every token" in str(error.value)
    assert "2 losses have the name 'peer_hard'" in str(error.value)


def test_a_view_of_the_teacher_does_not_concern_the_features_of_another_teacher():
    view = MultiViewTeacher({"paraphrase": True}, view_for="teacher")
    view.prepare(build("llama", 0), torch.device("cpu"))
    teacher = MultiTeacher({"view": view, "big": build("llama", 1)})
    build_objective(DistillArguments(losses=[{"name": "attention_kl", "teacher": "big"}]), teacher)
    with pytest.raises(DistillError, match="view: attention_kl_view compares every token"):
        build_objective(DistillArguments(losses=[{"name": "attention_kl", "teacher": "view"}]), teacher)


def test_losses_that_read_a_teacher_without_soft_labels_are_refused_and_not_dropped():
    arguments = DistillArguments(alpha=0.6, losses=[{"name": "js", "weight": 0.1}])
    with pytest.raises(
        DistillError, match=r"alpha is 0\.6, but NoSoftLabels gives the student no soft labels"
    ) as error:
        build_objective(arguments, NoSoftLabels())
    assert "js compares the student with a teacher" in str(error.value)
    assert summary(build_objective(DistillArguments(alpha=0.0), NoSoftLabels()).student) == [("hard", 1.0, None)]


@pytest.mark.parametrize(
    "make", [lambda: MTPTeacher(1), lambda: PeerTeacher(build("llama", 1), freeze_at_progress=0.5)]
)
def test_checking_arguments_changes_neither_the_teacher_nor_the_arguments(make, tmp_path):
    teacher, args = make(), DistillConfig(str(tmp_path), use_cpu=True, max_grad_norm=0.5)
    teacher.prepare(build("llama", 0), torch.device("cpu"))
    before = [copy.copy(vars(each)) for each in (teacher, args)]
    first = teacher.check_arguments(args)
    other = copy.copy(args)
    other.max_grad_norm = 0.125
    teacher.check_arguments(other)
    assert teacher.check_arguments(args) == first
    assert [vars(teacher), vars(args)] == before
    if isinstance(teacher, PeerTeacher):
        assert teacher.clip_norm(args) == 0.5
