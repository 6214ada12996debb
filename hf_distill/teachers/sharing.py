"""Checks that a student shares no trained weights and no dropout modules with a teacher that is another model."""

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..models.sharding import local_shard
from ..models.sidecar import strip_sidecar
from .base import Teacher
from .frozen import FrozenTeacher
from .group import TeacherGroup
from .peer import PeerTeacher


def shared_with_teacher(student: nn.Module, trained: Collection[str], teacher: Teacher) -> list[str]:
    """Return the parameters and modules that student and teacher share although training changes them, as messages.

    Args:
        student: the student.
        trained: names of the student's trained parameters.
        teacher: a prepared teacher; a teacher that is the student in another state shares all weights by design.
    """
    if isinstance(teacher, TeacherGroup):
        return [
            f"{name}: {why}"
            for name, each in teacher.teachers.items()
            for why in shared_with_teacher(student, trained, each)
        ]
    model = teacher.model
    if not isinstance(teacher, FrozenTeacher | PeerTeacher) or not isinstance(model, nn.Module):
        return []
    pointers = {local_shard(tensor).data_ptr() for tensor in (*model.parameters(), *model.buffers())} - {0}
    parameters = strip_sidecar(dict(student.named_parameters()))  # a trained peer is in the student's sidecar
    if shared := [name for name, p in parameters.items() if name in trained and local_shard(p).data_ptr() in pointers]:
        return [
            f"the student and its teacher share {len(shared)} parameters that are trained ({', '.join(shared[:3])}): "
            "build the student from copies (copy.deepcopy of the teacher's modules), or freeze them in the student. To "
            "distil a model from itself use AdapterBaseTeacher, EMATeacher, SnapshotTeacher or MultiViewTeacher"
        ]
    modules = {id(module) for module in model.modules()}
    if shared := [
        name
        for name, module in strip_sidecar(dict(student.named_modules())).items()
        if id(module) in modules and _depends_on_mode(module)
    ]:
        return [
            f"the student and its teacher share modules ({', '.join(shared[:3])}), so dropout in the student's "
            "training is applied in the teacher too: build the student from copies (copy.deepcopy)"
        ]
    return []


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a module may compute something else in training; a single linear layer, embedding or norm does not."""
    return isinstance(module, _DropoutNd | _BatchNorm) or any(True for _ in module.children())
