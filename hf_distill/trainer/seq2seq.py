"""`DistillSeq2SeqTrainer`: `transformers.Seq2SeqTrainer`, which generates in evaluations, with a teacher."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from ..errors import DistillError
from ..models.model_call import generation_inputs
from ..teachers import Teacher
from .config import DistillArguments
from .trainer import DistillMixin
from .upstream import SEQ2SEQ_TRAINER, check_upstream

check_upstream("transformers", Seq2SeqTrainer, SEQ2SEQ_TRAINER)


@dataclass
class DistillSeq2SeqConfig(DistillArguments, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with the arguments of a distillation.

    Every field can be set on the command line of a script that uses `HfArgumentParser`.
    """

    _VALID_DICT_FIELDS: ClassVar = [  # type: ignore[misc]  # the base class does not annotate it
        *Seq2SeqTrainingArguments._VALID_DICT_FIELDS,
        *DistillArguments._DICT_FIELDS,
    ]

    def __post_init__(self) -> None:
        DistillArguments.__post_init__(self)
        Seq2SeqTrainingArguments.__post_init__(self)


class DistillSeq2SeqTrainer(DistillMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with a teacher.

    Without a teacher, or with alpha = 0 and no further losses, it trains and evaluates exactly as `Seq2SeqTrainer`
    does. With a teacher it trains with the loss of `DistillTrainer`. With `predict_with_generate`, `evaluate` and
    `predict` pass the ids that the student generates to `compute_metrics`, and also report the loss and the metrics
    of target tokens.

    Args:
        model: the student.
        args: a `DistillSeq2SeqConfig`, or plain `Seq2SeqTrainingArguments` (the objective then has its defaults:
            temperature 2, alpha 0.5).
        teacher: the teacher: a model, the id or path of a model, or a `Teacher`. None trains without a teacher.

    All other arguments are those of `Seq2SeqTrainer`, in the same positions.

    Raises:
        DistillError: teacher and student do not fit together, or an argument does not work with distillation.
    """

    args: Seq2SeqTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Seq2SeqTrainingArguments | None = None,
        *positional: Any,
        **kwargs: Any,
    ):
        if args is None or (isinstance(args, DistillArguments) and not isinstance(args, Seq2SeqTrainingArguments)):
            given = "None" if args is None else f"a {type(args).__name__}"
            raise DistillError(
                f"args is {given}, which lacks the fields of Seq2SeqTrainingArguments: use DistillSeq2SeqConfig."
            )
        super().__init__(model, args, *positional, **kwargs)

    def setup_distillation(self, teacher: Teacher, distill_args: DistillArguments) -> None:
        """Use this teacher and objective, whose hard loss smooths the labels; `Seq2SeqTrainer` must not do it again."""
        super().setup_distillation(teacher, distill_args)
        self.label_smoother = None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> Any:  # transformers declares different types in both base classes
        """Evaluate a batch; with `predict_with_generate` return the generated ids in place of logits.

        `Seq2SeqTrainer` calls `self.model.generate`, and then `model` for the loss. As `model` it gets a function that
        returns the distillation loss of the same batch.

        Args:
            model: the student as prepared for evaluation.
            inputs: the collator's batch.
            prediction_loss_only: whether to return the loss only; nothing is generated then.
            ignore_keys: outputs of the model that are not returned.
            gen_kwargs: arguments of `generate`; by default those of `evaluate` or `predict`.
        """
        if not self.is_distilling or not self.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        batch = self._prepare_inputs(inputs)

        def loss_of_batch(**_inputs: Tensor) -> dict[str, Tensor]:
            num_items = self._get_num_items_in_batch([batch], self.args.device)
            return {"loss": cast(Tensor, self.compute_loss(model, batch, num_items_in_batch=num_items))}

        student_inputs = generation_inputs(cast(nn.Module, self.model), batch, self.teacher.input_names())
        self.keep_logits = False
        # The mixin's method asks for logits.
        return super(DistillMixin, self).prediction_step(
            cast(nn.Module, loss_of_batch), student_inputs, prediction_loss_only, ignore_keys, **gen_kwargs
        )
