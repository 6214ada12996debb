"""Supervised fine-tuning with a teacher: TRL's data formats, chat templates and packing under the objective."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import trl.trainer.sft_trainer
from torch import nn
from trl import SFTConfig, SFTTrainer

from ..data import check_packed_attention
from ..errors import DistillError
from ..models.model_types import unwrap_model
from ..teachers import Teacher
from ..trainer.config import DistillArguments
from .common import TRLMixin, adapted_heads
from .teacher_arguments import TeacherArguments, resolve_teacher


@dataclass
class DistillSFTConfig(DistillArguments, TeacherArguments, SFTConfig):
    """`trl.SFTConfig`, with TRL's defaults, and the fields of a distillation.

    Every field can be set from a command line through `HfArgumentParser` or `TrlParser`.
    """

    _VALID_DICT_FIELDS: ClassVar = [
        *SFTConfig._VALID_DICT_FIELDS,
        *DistillArguments._DICT_FIELDS,
        "teacher_model_init_kwargs",
    ]

    def __post_init__(self):
        DistillArguments.__post_init__(self)
        SFTConfig.__post_init__(self)


class _SFTTrainer(SFTTrainer):
    """`SFTTrainer`, which takes an adapter on the head where it distils."""

    is_distilling = False

    def __init__(self, model: Any, args: Any = None, *more, **kwargs):
        with adapted_heads(trl.trainer.sft_trainer, self.is_distilling):
            super().__init__(model, args, *more, **kwargs)


class DistillSFTTrainer(TRLMixin, _SFTTrainer):
    """`trl.SFTTrainer` with a teacher.

    Without one, or with alpha = 0 and no further losses, it is `SFTTrainer`, bit for bit. With one the rows that
    `SFTTrainer` prepares have the loss of `DistillTrainer`. Overridden beside what `DistillMixin` overrides:
    `compute_loss` and `log`, which count `num_tokens`.

    Args:
        model: the student: a model, or its id or path (loaded by TRL with `args.model_init_kwargs`).
        args: a `DistillSFTConfig`, or plain `SFTConfig` (then the defaults: temperature 2, alpha 0.5).
        teacher: a model, the id or path of one, or a `Teacher`; None: the one that `teacher_model_name_or_path` names;
            without either it trains on the hard labels alone.
        everything else: as in `SFTTrainer`, in its place.

    Raises:
        DistillError: teacher and student do not fit, or an argument cannot work with distillation; says why.
    """

    def __init__(self, model: Any, args: Any = None, *more, teacher: Any = None, **kwargs):
        if isinstance(args, DistillArguments) and not isinstance(args, SFTConfig):
            raise DistillError(
                f"args is a {type(args).__name__}, whose fields SFTTrainer does not know: use DistillSFTConfig."
            )
        self._tokens_seen: Any = 0
        teacher = resolve_teacher(args, teacher, kwargs.get("teachers"))
        super().__init__(model, args, *more, teacher=teacher, **kwargs)

    def setup_distillation(self, teacher: Teacher, fields: DistillArguments) -> None:
        """As the mixin's; the coefficient of a router's loss is TRL's, and packed documents must be kept apart."""
        model: Any = unwrap_model(self.model)
        if hasattr(model, "router_aux_loss_coef"):  # which the model's own forward multiplies by
            model.router_aux_loss_coef = self.router_aux_loss_coef
        super().setup_distillation(teacher, fields)
        if self.padding_free:
            with self.accelerator.autocast():
                check_packed_attention(self.model, "student")
            if teacher.model is not None:
                check_packed_attention(teacher.model, "teacher")

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the mixin's; tokens of a batch that did not fit into memory are not counted."""
        self._tokens_seen = 0
        return super()._inner_training_loop(*args, **kwargs)

    def incompatible_arguments(self) -> list[str]:
        """Arguments of SFTTrainer that would change the objective or the rows behind the teacher's back."""
        problems, args = super().incompatible_arguments(), self.args
        if args.loss_type != "nll":
            problems.append(
                f"loss_type={args.loss_type!r} rewrites the cross entropy, and the hard labels of a distillation are "
                "plain: use loss_type='nll', or register a loss with @hf_distill.loss and name it in `losses`"
            )
        if args.eval_packing and not self.padding_free and args.packing_strategy != "wrapped":
            problems.append(
                "eval_packing=True without padding-free training: TRL's collator then gives no positions, and packed "
                "documents would see each other: set eval_packing=False, or packing=True with packing_strategy='bfd'"
            )
        return problems

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective, see `DistillMixin.compute_loss`; counts the tokens that the student sees."""
        if self.is_distilling and model.training:
            mask = inputs.get("attention_mask")
            self._tokens_seen = self._tokens_seen + (inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As SFTTrainer's; `num_tokens` is summed over ranks here, not in every micro-batch."""
        if self.is_distilling and "loss" in logs:
            seen = torch.as_tensor(self._tokens_seen, device=self.args.device)
            self._total_train_tokens += int(self.accelerator.reduce(seen, "sum")) // self._tp_size
            self._tokens_seen = 0
            logs["num_tokens"] = self._total_train_tokens
        super().log(logs, start_time)
