"""`DistillSeq2SeqTrainer`: `transformers.Seq2SeqTrainer`, which generates in evaluations, with a teacher."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from ..errors import DistillError, raise_if_any
from ..models.model_call import generation_inputs
from ..models.shared_encoder import SharedEncoder
from ..teachers import FrozenTeacher, Teacher
from .config import DistillArguments
from .trainer import DistillMixin
from .upstream import SEQ2SEQ_TRAINER, check_upstream

check_upstream("transformers", Seq2SeqTrainer, SEQ2SEQ_TRAINER)


@dataclass
class DistillSeq2SeqConfig(DistillArguments, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with the arguments of a distillation.

    The further fields are those of `DistillConfig`, and `share_encoder`. Every field can be set on the
    command line of a script that uses `HfArgumentParser`.
    """

    share_encoder: bool = field(
        default=False,
        metadata={
            "help": "Whether the encoder runs once for teacher and student. The student's must be frozen and equal to "
            "the teacher's, as distil-whisper trains. The default is False: both encoders run."
        },
    )

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

    Keyword Args:
        teacher: the teacher: a model, the id or path of a model, or a `Teacher`. None trains without a teacher.
        model_type: type of `model`, if its class is of no known type; see `DistillTrainer`.

    All other arguments are those of `Seq2SeqTrainer`, in the same positions.

    Raises:
        DistillError: teacher and student do not fit together, or an argument does not work with distillation.
    """

    args: Seq2SeqTrainingArguments
    _shared_encoder: SharedEncoder | None = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Seq2SeqTrainingArguments | None = None,
        *positional: Any,
        **kwargs: Any,
    ):
        if args is None or (isinstance(args, DistillArguments) and not isinstance(args, Seq2SeqTrainingArguments)):
            description = "None" if args is None else f"a {type(args).__name__}"
            raise DistillError(
                f"args is {description}, which lacks the fields of Seq2SeqTrainingArguments: use DistillSeq2SeqConfig."
            )
        super().__init__(model, args, *positional, **kwargs)

    def setup_distillation(self, teacher: Teacher, distill_args: DistillArguments) -> None:
        """Use this teacher and objective, whose hard loss smooths the labels; `Seq2SeqTrainer` must not do it again."""
        super().setup_distillation(teacher, distill_args)
        self.label_smoother = None
        self._shared_encoder = None
        if getattr(self.args, "share_encoder", False):
            raise_if_any(self._obstacles_to_sharing())
            self._shared_encoder = SharedEncoder(cast(nn.Module, self.model), teacher.model)

    def _obstacles_to_sharing(self) -> list[str]:
        """Return why the encoder cannot run once for both models, apart from the models themselves."""
        problems = []
        if not isinstance(self.teacher, FrozenTeacher):
            problems.append(
                f"share_encoder=True needs a model as the teacher, and it is a {type(self.teacher).__name__}. Pass a "
                "model or its path, or set share_encoder=False"
            )
        if any(each.term.stack == "encoder" for each in self.distiller.features.terms):
            problems.append(
                "share_encoder=True makes the features of both encoders equal, and `losses` compares them. Remove the "
                "losses with stack: encoder, or set share_encoder=False"
            )
        if self.model_init is not None:
            problems.append("share_encoder=True needs one student, and model_init makes new ones. Pass `model`")
        return problems

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch as `DistillTrainer` does; with `share_encoder` the encoder runs once."""
        shared = self._shared_encoder
        with nullcontext() if shared is None else shared.around_step():
            return super().compute_loss(*args, **kwargs)

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
