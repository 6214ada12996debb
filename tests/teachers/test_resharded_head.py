"""Output heads that FSDP2 frees after the forward, while the loss still needs them, are refused."""

import pytest
import torch
from tiny import build, collate, rows
from torch.distributed.fsdp import fully_shard

from hf_distill import DistillError
from hf_distill.losses.objective import objective
from hf_distill.models.output_head import check_head_stays_gathered
from hf_distill.teachers import EMATeacher, FrozenTeacher
from hf_distill.trainer.distiller import Distiller


def sharded(mesh, kind="llama", head=False, **options):
    """A model whose layers are sharded, and itself with the given options; with `head` the output head separately."""
    model = build(kind, 1)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    if head:
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh, **options)


RESHARDED = [dict(reshard_after_forward=True), dict(head=True)]
GATHERED = [{}, dict(reshard_after_forward=False)]


@pytest.mark.parametrize("options", RESHARDED)
@pytest.mark.parametrize("teacher_class", [FrozenTeacher, EMATeacher])
def test_a_head_that_is_freed_after_the_forward_is_refused_when_the_teacher_is_prepared(mesh, options, teacher_class):
    model = sharded(mesh, **options)
    teacher, student = (
        (FrozenTeacher(model), build("llama", 0)) if teacher_class is FrozenTeacher else (EMATeacher(), model)
    )
    with pytest.raises(DistillError, match="reshard_after_forward=False"):
        teacher.prepare(student, torch.device("cpu"))


@pytest.mark.parametrize("options", GATHERED)
def test_a_head_that_stays_gathered_is_a_teacher(mesh, options):
    student, batch = build("llama", 0), collate(rows("llama", 4))
    teacher, plain = FrozenTeacher(sharded(mesh, **options)), FrozenTeacher(build("llama", 1))
    losses = []
    for each in (teacher, plain):
        each.prepare(student, torch.device("cpu"))
        losses.append(Distiller(objective(0.5, 2.0))(student, each, batch).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("options", RESHARDED)
def test_logits_whose_head_was_freed_are_refused_before_anything_is_computed(mesh, options, monkeypatch):
    student, batch = build("llama", 0), collate(rows("llama", 4))
    teacher = FrozenTeacher(build("llama", 1))
    teacher.prepare(student, torch.device("cpu"))
    teacher.model = sharded(mesh, **options).requires_grad_(False).eval()  # as if it was wrapped afterwards
    monkeypatch.setattr("hf_distill.losses.fused.ChunkedLoss._run_chunk", lambda *a: pytest.fail("computed"))
    with pytest.raises(DistillError, match="reshard_after_forward=False"):
        Distiller(objective(0.5, 2.0))(student, teacher, batch)


def test_models_without_fsdp_or_a_head_are_not_refused():
    check_head_stays_gathered(build("llama", 0))
    check_head_stays_gathered(torch.nn.Linear(2, 2))
