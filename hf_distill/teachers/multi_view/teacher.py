"""The student teaches itself: what it says of a clean batch, for what it says of a changed one."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ...core.signals import FeatureKey, Signals
from ...core.targets import Targets
from ...errors import DistillError
from ...losses.objective import Term
from ...models.model_types import SEQUENCE, model_type_of, unwrap_model
from ..self_teacher import SelfTeacher
from .augmentation import BatchView, replacement_token_id


class MultiViewTeacher(SelfTeacher):
    """The same model, in eval mode and without gradient, on the other view of the batch.

    In training one of the two sees the view and the other the clean batch. In evaluation the student sees the clean
    batch and the teacher the view: eval_kl and eval_agreement say how far a view moves the predictions.

    Args:
        view: a `BatchView`, or a dict of its fields.
        view_for: whose batch is changed in training, "student" or "teacher".
        processing_class: the tokenizer, whose mask, unknown, padding or end token stands for dropped ones; None: the
            trainer's.

    Raises:
        DistillError: an unknown field, or a value out of range.
    """

    kind = "multi_view"

    def __init__(self, view: BatchView | dict, *, view_for: str = "student", processing_class: Any = None):
        self.view = BatchView.parse(view)
        if view_for not in ("student", "teacher"):
            raise DistillError(f"view_for is {view_for!r}; it must be student or teacher")
        self._view_for, self._tokenizer, self._step = view_for, processing_class, 0

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Find what stands for dropped tokens.

        Raises:
            DistillError: tokens are to be dropped, and no tokenizer is known.
        """
        self.model, tokenizer = student, self._tokenizer or processing_class
        self._encoder, self._fill = bool(unwrap_model(student).config.is_encoder_decoder), 0
        if self.view.token_dropout:
            if tokenizer is None:
                raise DistillError(
                    "token_dropout needs a tokenizer, for the token that stands for a dropped one: pass "
                    "processing_class to the trainer or to MultiViewTeacher."
                )
            self._fill = replacement_token_id(tokenizer)
        window = unwrap_model(student).config.get_text_config()
        self._positions = getattr(window, "max_position_embeddings", None)

    def teacher_mode(self) -> AbstractContextManager[None]:
        """The student as it is."""
        return nullcontext()

    def transform_student_batch(self, inputs: dict, targets: Targets, training: bool) -> tuple[dict, Targets]:
        """The student's batch, and its asked tokens there."""
        return self._viewed(inputs, targets) if training and self._view_for == "student" else (inputs, targets)

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, Targets]) -> Signals:
        """One forward of the student on the batch that it does not see itself."""
        if self._view_for == "teacher" or not self.model.training:
            inputs, targets = self._viewed(inputs, targets)
            feature_requests = {
                key: targets.feature_positions(inputs, its.causal, key.stack) for key, its in feature_requests.items()
            }
        return super().forward(inputs, targets, feature_requests)

    def incompatible_terms(self, terms: Sequence[Term]) -> list[str]:
        """Losses on features that would compare the features of different tokens."""
        moving = [
            name for name in ("span_deletion", "prepend_context_tokens", "paraphrase") if getattr(self.view, name)
        ]
        return [
            f"{term.name} compares every token of a row, or every pair of its tokens, and a view with "
            f"{' and '.join(moving)} has others: use token_dropout alone, or a loss on hidden states of target tokens"
            for term in terms
            if moving and term.loss.feature and not (term.loss.feature == "hidden" and self._keeps_tokens(term))
        ]

    def _keeps_tokens(self, term: Term) -> bool:
        """Whether a term compares the hidden states of target tokens alone, which are the same in both views."""
        return model_type_of(self.model) is not SEQUENCE and term.stack != "encoder"

    def on_step_end(self, step: int, updated: bool) -> None:
        """Each step draws anew."""
        self._step = step

    def on_train_begin(self, step: int) -> None:
        """So does each step of a resumed run."""
        self._step = step

    def _viewed(self, inputs: dict, targets: Targets) -> tuple[dict, Targets]:
        step = self._step if self.model.training else 0
        seen, targets = self.view(inputs, targets, step, self._fill, self._encoder)
        width = seen["input_ids"].shape[1]
        if self.view.prepend_context_tokens and self._positions is not None and width > self._positions:
            raise DistillError(
                f"With prepend_context_tokens a row has {width} tokens, and the model {self._positions} positions: "
                "lower prepend_context_tokens, or max_length of the data."
            )
        return seen, targets
