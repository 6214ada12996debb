"""Supervised fine-tuning with a teacher: TRL's data formats, chat templates and packing with distillation losses."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import trl.trainer.sft_trainer
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig, SFTTrainer

from ..core.row_values import ORIGIN, WEIGHT
from ..data.formats import TEACHER_PROMPT
from ..errors import DistillError
from ..models.model_types import unwrap_model
from ..teachers import Teacher
from ..trainer.config import DistillArguments
from ..trainer.packed_batches import PackedAttentionCheck
from ..trainer.teacher_argument import TeacherArgument
from ..trainer.trainer import LossOutput
from .common import TRLMixin, adapted_heads
from .teacher_arguments import TeacherArguments, resolve_teacher


@dataclass
class DistillSFTConfig(DistillArguments, TeacherArguments, SFTConfig):
    """`trl.SFTConfig`, with TRL's defaults, and the fields of `DistillArguments`.

    Every field can be set from a command line through `HfArgumentParser` or `TrlParser`.
    """

    _VALID_DICT_FIELDS: ClassVar = [  # type: ignore[misc]  # the base class does not annotate it
        *SFTConfig._VALID_DICT_FIELDS,
        *DistillArguments._DICT_FIELDS,
        "teacher_model_init_kwargs",
    ]

    def __post_init__(self) -> None:
        DistillArguments.__post_init__(self)
        SFTConfig.__post_init__(self)


class _SFTTrainer(SFTTrainer):
    """`SFTTrainer` that accepts an adapter on the output head if there is a teacher."""

    is_distilling = False

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: SFTConfig | TrainingArguments | None = None,
        *positional: Any,
        **kwargs: Any,
    ):
        with adapted_heads(trl.trainer.sft_trainer, self.is_distilling):
            super().__init__(model, args, *positional, **kwargs)


class DistillSFTTrainer(TRLMixin, _SFTTrainer):
    """`trl.SFTTrainer` with a teacher.

    Without a teacher, or with alpha = 0 and no further losses, it trains exactly as `SFTTrainer` does. With a teacher,
    the rows that `SFTTrainer` prepares are trained with the loss of `DistillTrainer`. It overrides the methods that
    `DistillMixin` overrides, and `compute_loss` and `log`, which count `num_tokens`.

    Args:
        model: the student: a model, or its id or path (loaded by TRL with `args.model_init_kwargs`).
        args: a `DistillSFTConfig`, or plain `SFTConfig` (then the defaults: temperature 2, alpha 0.5).
        teacher: a model, the id or path of one, or a `Teacher`; None: that of `args.teacher_model_name_or_path`, or no
            teacher, so that only the hard labels are used.
        *positional: further arguments of `SFTTrainer`.
        **kwargs: further arguments of `SFTTrainer`, by name.

    Raises:
        DistillError: teacher and student do not fit, or an argument does not work with distillation; the message lists
            the reasons.
    """

    args: SFTConfig
    model: nn.Module
    _packed_attention_check: PackedAttentionCheck | None = None

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: SFTConfig | TrainingArguments | None = None,
        *positional: Any,
        teacher: TeacherArgument | None = None,
        **kwargs: Any,
    ):
        if isinstance(args, DistillArguments) and not isinstance(args, SFTConfig):
            raise DistillError(
                f"args is a {type(args).__name__}, which lacks the fields of SFTConfig: use DistillSFTConfig."
            )
        columns = getattr(kwargs.get("train_dataset"), "column_names", None) or ()
        if unread := sorted({TEACHER_PROMPT.column, *TEACHER_PROMPT.columns} & {*columns}):
            raise DistillError(
                f"train_dataset has {', '.join(unread)}, which SFTTrainer's tokenization and collator leave out: use "
                "DistillTrainer with rows of `tokenize_dataset` and the `Collator`, or OnPolicyDistillTrainer; or "
                "remove the columns."
            )
        read = {WEIGHT, ORIGIN} if isinstance(args, DistillArguments) and args.by_origin else {WEIGHT}
        if getattr(args, "packing", False) and (lost := sorted(read & {*columns})):
            raise DistillError(
                f"train_dataset has {', '.join(lost)}, which SFTTrainer's packing leaves out: set packing=False "
                "(padding_free=True with max_length=None also trains without padding), use DistillTrainer with rows of "
                "`tokenize_dataset` and `pack`, or remove the column."
            )
        self._num_tokens: Tensor | int = 0
        teacher = resolve_teacher(args, teacher, kwargs.get("teachers"))
        super().__init__(model, args, *positional, teacher=teacher, **kwargs)

    def setup_distillation(self, teacher: Teacher, fields: DistillArguments) -> None:
        """Also set TRL's coefficient of the router loss, and check packed documents when the models are prepared."""
        model: Any = unwrap_model(self.model)
        if hasattr(model, "router_aux_loss_coef"):  # the factor in the forward of the model
            model.router_aux_loss_coef = self.router_aux_loss_coef
        super().setup_distillation(teacher, fields)
        if self.padding_free:
            self.pop_callback(PackedAttentionCheck)
            self._packed_attention_check = PackedAttentionCheck(self)
            self.add_callback(self._packed_attention_check)

    def _inner_training_loop(self, *args: object, **kwargs: object) -> TrainOutput:
        """Also reset the token count, so that tokens of a batch that did not fit into memory are not counted."""
        self._num_tokens = 0
        return super()._inner_training_loop(*args, **kwargs)

    def incompatible_arguments(self) -> list[str]:
        """Also return problems with arguments of SFTTrainer that change the loss or the rows of the teacher."""
        problems, args = super().incompatible_arguments(), self.args
        if args.loss_type != "nll":
            problems.append(
                f"loss_type={args.loss_type!r} rewrites the cross entropy, and distillation uses the plain cross "
                "entropy for hard labels: use loss_type='nll', or register a loss with @hf_distill.loss and name it in "
                "`losses`"
            )
        if args.eval_packing and not self.padding_free and args.packing_strategy != "wrapped":
            problems.append(
                "eval_packing=True without padding-free training: TRL's collator then returns no position_ids, so "
                "that packed documents would see each other: set eval_packing=False, or packing=True with "
                "packing_strategy='bfd'"
            )
        return problems

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> LossOutput:
        """Compute the objective, see `DistillMixin.compute_loss`, and count the tokens that the student reads."""
        if self.is_distilling and self._packed_attention_check is not None:
            self._packed_attention_check.check(model)  # an evaluation without training has no `on_train_begin`
        if self.is_distilling and model.training:
            mask = inputs.get("attention_mask")
            self._num_tokens = self._num_tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        except ValueError as error:
            if not self.is_distilling or "tokens do not match" not in str(error) or self.args.max_length is None:
                raise
            raise DistillError(
                f"max_length is {self.args.max_length}, which cuts off tokens of images, and the models still get the "
                f"whole images ({error}): raise max_length, or set it to None."
            ) from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as SFTTrainer does; `num_tokens` is summed over ranks here, not in every micro-batch."""
        if self.is_distilling and "loss" in logs:
            num_tokens = torch.as_tensor(self._num_tokens, device=self.args.device)
            self._total_train_tokens += int(self.accelerator.reduce(num_tokens, "sum")) // self._tp_size
            self._num_tokens = 0
            logs["num_tokens"] = self._total_train_tokens
        super().log(logs, start_time)
