"""The multi-view teacher: the student on one view of a batch teaches the student on another view."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ...core.signals import FeatureKey, Signals
from ...core.targets import FeatureTokens, Targets
from ...errors import DistillError
from ...losses.objective import Term
from ...models.model_types import model_type_of, transformers_model_in
from ...models.type_catalog import SEQUENCE
from ..self_teacher import SelfTeacher
from .augmentation import BatchView, replacement_token_id


class MultiViewTeacher(SelfTeacher):
    """The student, in eval mode and without gradients, on another view of the batch.

    In training one of the two reads the view and the other the original batch. In evaluation the student reads the
    original batch and the teacher the view: eval_kl and eval_agreement measure how much a view changes the predictions.

    Args:
        view: a `BatchView`, or a dict of its fields.
        view_for: which of the two reads the view in training, "student" or "teacher".
        processing_class: the tokenizer, whose mask, unknown, padding or end token replaces dropped tokens; None: the
            trainer's.

    Raises:
        DistillError: a field is unknown, or a value is out of range.
    """

    kind = "multi_view"
    any_output_type = False
    reads_teacher_inputs = reads_teacher_labels = False
    reads_text_only = True

    def __init__(self, view: BatchView | dict, *, view_for: str = "student", processing_class: Any = None):
        self.view = BatchView.parse(view)
        if view_for not in ("student", "teacher"):
            raise DistillError(f"view_for is {view_for!r}; it must be 'student' or 'teacher'")
        self._view_for, self._tokenizer, self._step = view_for, processing_class, 0

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Find the token that replaces dropped tokens, and the number of positions of the model.

        Raises:
            DistillError: the view drops tokens, and no tokenizer is known.
        """
        self.model, tokenizer = student, self._tokenizer or processing_class
        config = getattr(transformers_model_in(student), "config", None)
        self._encoder, self._fill = bool(getattr(config, "is_encoder_decoder", False)), 0
        if self.view.token_dropout:
            if tokenizer is None:
                raise DistillError(
                    "token_dropout needs a tokenizer, whose special token replaces the dropped tokens: pass "
                    "processing_class to the trainer or to MultiViewTeacher."
                )
            self._fill = replacement_token_id(tokenizer)
        window = None if config is None else config.get_text_config()
        self._positions = getattr(window, "max_position_embeddings", None)

    def teacher_mode(self) -> AbstractContextManager[None]:
        """The student unchanged."""
        return nullcontext()

    def transform_student_batch(self, inputs: dict, targets: Targets, training: bool) -> tuple[dict, Targets]:
        """Return the view in training if it is the student's, and else the batch unchanged."""
        return self._view_of(inputs, targets) if training and self._view_for == "student" else (inputs, targets)

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Run the student on the view, or on the original batch where the student is trained on the view."""
        if self._view_for == "teacher" or not self.model.training:
            inputs, targets = self._view_of(inputs, targets)
            feature_requests = {
                key: targets.feature_tokens(inputs, tokens.causal, key.stack)
                for key, tokens in feature_requests.items()
            }
        return super().forward(inputs, targets, feature_requests)

    def incompatible_terms(self, terms: Sequence[Term], name: str | None) -> list[str]:
        """Return the losses on features that would compare different tokens; a student's view concerns all of them."""
        changes = [
            name for name in ("span_deletion", "prepend_context_tokens", "paraphrase") if getattr(self.view, name)
        ]
        return [
            f"{term.name} compares every token of a row, or every pair of its tokens, and a view with "
            f"{' and '.join(changes)} has other tokens: use token_dropout alone, or a loss on hidden states of target "
            "tokens"
            for term in terms
            if changes
            and (self._view_for == "student" or term.teacher == name)
            and term.loss.feature
            and not (term.loss.feature == "hidden" and self._keeps_tokens(term))
        ]

    def _keeps_tokens(self, term: Term) -> bool:
        """Whether a term compares the hidden states of target tokens alone, which are the same in both views."""
        return model_type_of(self.model).name != SEQUENCE.name and term.stack != "encoder"

    def on_step_end(self, step: int, updated: bool) -> None:
        """Draw new random numbers in the next step."""
        self._step = step

    def on_train_begin(self, step: int) -> None:
        """Continue the random numbers of a resumed run."""
        self._step = step

    def _view_of(self, inputs: dict, targets: Targets) -> tuple[dict, Targets]:
        step = self._step if self.model.training else 0
        view, targets = self.view(inputs, targets, step, self._fill, self._encoder)
        width = view["input_ids"].shape[1]
        if self.view.prepend_context_tokens and self._positions is not None and width > self._positions:
            raise DistillError(
                f"With prepend_context_tokens a row has {width} tokens, and the model has {self._positions} positions: "
                "lower prepend_context_tokens, or max_length of the data."
            )
        return view, targets
