"""`SharedEncoder`: the frozen encoder of a student and the equal one of its teacher run once for each batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DistillError
from .model_types import unwrap_model
from .output_head import replaced_forward

_OTHERWISE = "or set share_encoder=False, so that both encoders run"


class SharedEncoder:
    """Runs the encoder of teacher and student once for each batch.

    The teacher's encoder runs. When the student's is called with the same inputs, it returns the teacher's output.

    Args:
        student: a sequence-to-sequence model whose encoder is frozen.
        teacher: a model in eval mode whose encoder has the same weights.

    Raises:
        DistillError: a model has no encoder, the student's is trained, or their weights differ.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None):
        self._student, self._teacher = (
            _encoder(model, which) for model, which in ((student, "student"), (teacher, "teacher"))
        )
        trained = [name for name, p in self._student.named_parameters() if p.requires_grad]
        if trained:
            raise DistillError(
                f"share_encoder=True needs a frozen encoder, and {len(trained)} parameters of the student's are "
                f"trained, such as {trained[0]}: call model.freeze_encoder(), or set requires_grad to False for them, "
                f"{_OTHERWISE}."
            )
        if difference := _difference(self._student, self._teacher):
            raise DistillError(
                f"share_encoder=True needs equal encoders, and {difference}. Make the student of the teacher with "
                f"cut_student(teacher, decoder_layers=...), load both in one dtype, {_OTHERWISE}."
            )
        self._is_verified = False

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Share the output of the encoder while teacher and student run on one batch.

        Raises:
            DistillError: the teacher's encoder ran in the first step, and the student's got other inputs.
        """
        outputs: list[tuple[tuple, Mapping[str, Any], Any]] = []
        num_reused = 0

        def keep(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            outputs[:] = [(args, kwargs, output)]

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_reused
            if outputs and _is_same_call(outputs[0], args, kwargs):
                num_reused += 1
                return outputs[0][2]
            return original(*args, **kwargs)

        hook = self._teacher.register_forward_hook(keep, with_kwargs=True)
        try:
            with replaced_forward(self._student, forward) as original:
                yield
        finally:
            hook.remove()
        if not self._is_verified and not num_reused:
            raise DistillError(
                "share_encoder=True, and the encoders of teacher and student got different inputs. The batch must have "
                f"no inputs for the teacher alone, and the student must not mask its inputs at random; {_OTHERWISE}."
            )
        self._is_verified = True


def _encoder(model: nn.Module | None, which: str) -> nn.Module:
    inner = None if model is None else unwrap_model(model)
    if not isinstance(inner, PreTrainedModel) or not getattr(inner.config, "is_encoder_decoder", False):
        raise DistillError(
            f"share_encoder=True needs a sequence-to-sequence {which} on this machine, and the {which} is "
            f"{'none' if inner is None else f'a {type(inner).__name__}'}: use such a model, {_OTHERWISE}."
        )
    return inner.get_encoder()


def _difference(student: nn.Module, teacher: nn.Module) -> str:
    """Describe the first difference of two encoders; "" if they are equal."""
    of_student, of_teacher = student.state_dict(), teacher.state_dict()
    if type(student) is not type(teacher) or of_student.keys() != of_teacher.keys():
        return f"the student's is a {type(student).__name__} with {len(of_student)} weights, the teacher's a " + (
            f"{type(teacher).__name__} with {len(of_teacher)}"
        )
    for name, weight in of_student.items():
        other = of_teacher[name]
        if weight.shape != other.shape or weight.dtype != other.dtype:
            return (
                f"{name} is {weight.dtype} {tuple(weight.shape)} and the teacher's {other.dtype} {tuple(other.shape)}"
            )
        if not torch.equal(weight, other.to(weight.device)):
            return f"the values of {name} differ"
    return ""


def _is_same_call(call: tuple[tuple, Mapping[str, Any], Any], args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether an encoder is called with the same tensors and the same other arguments; None is the default."""
    before = dict(enumerate(call[0])) | {k: v for k, v in call[1].items() if v is not None}
    now = dict(enumerate(args)) | {k: v for k, v in kwargs.items() if v is not None}
    return before.keys() == now.keys() and all(
        value is now[name] if isinstance(value, Tensor) else value == now[name] for name, value in before.items()
    )
