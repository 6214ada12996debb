"""`TrimmedVocabularyTeacher`: a teacher that has all ids of a vocabulary of which the student has some."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.logits import DenseLogits, LazyLogits
from ..core.signals import FeatureKey, Signals
from ..core.targets import FeatureTokens, Targets
from ..errors import DistillError
from ..losses.objective import Term
from ..models.blocks import LayerStack
from ..models.model_types import model_type_of, unwrap_model
from ..models.vocabulary import kept_ids_of
from .base import Teacher
from .cached import CachedTeacher
from .compatibility import tokenizer_in
from .frozen import FrozenTeacher
from .remote import RemoteTeacher

_IDS = ("input_ids", "labels", "shift_labels")


class TrimmedVocabularyTeacher(Teacher):
    """A teacher with the full vocabulary of a student that `trim_vocabulary` made.

    The teacher reads the student's tokens under its own ids, and its logits are those of the ids that the student has:

        teacher(i) = softmax over the kept ids of the teacher's logits / T

    which is the teacher's distribution under the condition that the next token is a kept one.

    Args:
        teacher: a frozen teacher, a model or the path or id of a model; or a cached or remote teacher that returns
            hidden states. The probabilities of the most probable ids are not enough, because the share of the removed
            ids among the others is not known.
        processing_class: the teacher's tokenizer; None: the one that the teacher has, or that is stored with its model.

    Raises:
        DistillError: the teacher reads the student's ids, or does not return the logits of all ids.
    """

    def __init__(self, teacher: Teacher | nn.Module | str, *, processing_class: Any = None):
        teacher = teacher if isinstance(teacher, Teacher) else FrozenTeacher(teacher)
        if not isinstance(teacher, FrozenTeacher | CachedTeacher | RemoteTeacher):
            raise DistillError(
                f"A {type(teacher).__name__} has the student's vocabulary, which is trimmed, or learns it: use a "
                "frozen, cached or remote teacher for TrimmedVocabularyTeacher, or this teacher without it."
            )
        self.teacher, self.processing_class = teacher, processing_class
        if not self.teacher.has_full_logits:
            raise DistillError(
                "The teacher returns the probabilities of some ids of its full vocabulary, and those of a trimmed "
                "vocabulary are not known exactly, because the share of the removed ids is not: use a cache of kind "
                "hidden, a server with api hidden, or a cache that was written for the trimmed student "
                "(`hf-distill cache write` with the recipe of the student)."
            )
        self.kind, self.can_fail, self.prefetch = self.teacher.kind, self.teacher.can_fail, self.teacher.prefetch
        self.max_wait_seconds, self.any_output_type = self.teacher.max_wait_seconds, False
        self.reads_text_only = self.teacher.reads_text_only
        self.kept_ids: Tensor

    @property
    def unwrapped(self) -> Teacher:
        """The teacher that has all ids."""
        return self.teacher

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Find the ids of the student's tokens in the teacher's vocabulary, and prepare the teacher.

        Raises:
            DistillError: a tokenizer is missing, the student's is not a trimmed one of the teacher's, or the teacher
                cannot be prepared.
        """
        self.tokenizer = tokenizer = self._find_tokenizer()
        of_student = tokenizer_in(processing_class)
        if of_student is None or tokenizer is None:
            raise DistillError(
                "TrimmedVocabularyTeacher finds the student's tokens in the teacher's vocabulary, and the tokenizer of "
                f"the {'student' if of_student is None else 'teacher'} is not known: pass processing_class to the "
                f"{'trainer' if of_student is None else 'teacher'}."
            )
        self.kept_ids = torch.tensor(kept_ids_of(of_student, tokenizer), device=device)
        size = model_type_of(student).vocabulary_size(unwrap_model(student), "TrimmedVocabularyTeacher")
        if size < len(self.kept_ids):
            raise DistillError(
                f"The student's tokenizer has {len(self.kept_ids)} tokens and its output head {size} rows: give the "
                "model and the tokenizer that trim_vocabulary returned."
            )
        if isinstance(self.teacher, FrozenTeacher):
            self.teacher.reads_own_tokens = True
        self.teacher.prepare(student, device, tokenizer)
        self.teacher.keep_ids(self.kept_ids)
        self.model, self.context_length = self.teacher.model, self.teacher.context_length

    def _find_tokenizer(self) -> Any:
        """Return the teacher's tokenizer; None if it is not known."""
        tokenizer = tokenizer_in(self.processing_class) or tokenizer_in(getattr(self.teacher, "processing_class", None))
        if tokenizer is None and isinstance(self.teacher, FrozenTeacher):
            return self.teacher.load_tokenizer()
        return tokenizer

    def own_batches(self, collator: Callable[[list], dict]) -> Callable[[list], dict]:
        """Return a collator of the batches that the teacher reads, in its own ids.

        Args:
            collator: collator of the student's batches.
        """
        return lambda rows: self._teacher_batch(collator(rows))

    def _teacher_batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch whose tokens have the teacher's ids."""
        mapped = {name: self._teacher_ids(inputs[name]) for name in _IDS if isinstance(inputs.get(name), Tensor)}
        return {**inputs, **mapped}

    def _teacher_ids(self, ids: Tensor) -> Tensor:
        """Return the teacher's ids of tokens; -100 stays, and so do ids beyond the student's, in masked positions."""
        ids = ids.long()
        is_token = (ids >= 0) & (ids < len(self.kept_ids))
        return torch.where(is_token, self.kept_ids.to(ids.device)[ids.where(is_token, 0)], ids.clamp(max=0))

    def _name(self, name: str) -> str:
        """The name in `Targets.numbers` of a number of this teacher, whose batch has other ids than the student's."""
        return f"{id(self)} {name}"

    def numbers_to_read(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return the numbers that the teacher needs, of the batch in its own ids."""
        numbers = self.teacher.numbers_to_read(self._teacher_batch(inputs), shift)
        return {self._name(name): value for name, value in numbers.items()}

    def numbers_of_any_rows(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return those of `numbers_to_read` that are also right if `forward` gets only some rows of the batch."""
        numbers = self.teacher.numbers_of_any_rows(self._teacher_batch(inputs), shift)
        return {self._name(name): value for name, value in numbers.items()}

    def _teacher_targets(self, targets: Targets) -> Targets:
        prefix, labels = self._name(""), self._teacher_ids(targets.labels)
        numbers = {n.removeprefix(prefix): value for n, value in targets.numbers.items() if n.startswith(prefix)}
        return replace(targets, labels=labels, label_range=None, numbers=numbers)

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Run the teacher on the tokens in its own ids, and return its logits of the kept ids and its features."""
        signals = self.teacher(self._teacher_batch(inputs), self._teacher_targets(targets), feature_requests)
        logits = signals.logits
        if isinstance(logits, DenseLogits):
            logits = DenseLogits(logits.values[:, self.kept_ids.to(logits.values.device)])
        assert isinstance(logits, DenseLogits | LazyLogits)
        assert logits.vocab_size == len(self.kept_ids)
        return replace(signals, logits=logits)

    def logits(self, inputs: dict, targets: Targets) -> LazyLogits | DenseLogits:
        """Return the logits of the kept ids for the target tokens of a batch of the student."""
        logits = self(inputs, targets, {}).logits
        assert isinstance(logits, DenseLogits | LazyLogits)
        return logits

    def start_batch(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> None:
        """Announce a batch to the teacher, in its own ids."""
        self.teacher.start_batch(self._teacher_batch(inputs), self._teacher_targets(targets), feature_requests)

    def check_data(self, rows: Any, name: str) -> None:
        """Check a data set with the teacher."""
        self.teacher.check_data(rows, name)

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """The layers of the teacher."""
        return self.teacher.layer_stack(which)

    def input_names(self) -> frozenset[str]:
        """Names of the inputs that the teacher accepts."""
        return self.teacher.input_names()

    def readable_inputs(self) -> frozenset[str] | None:
        """Names of the inputs that the teacher reads."""
        return self.teacher.readable_inputs()

    def incompatible_terms(self, terms: Sequence[Term], name: str | None) -> list[str]:
        """Return the reasons why terms do not work with the teacher."""
        return self.teacher.incompatible_terms(terms, name)

    def on_train_begin(self, step: int) -> None:
        """Call the teacher's hook."""
        self.teacher.on_train_begin(step)

    def close(self) -> None:
        """Cancel what the teacher runs in the background."""
        self.teacher.close()

    def metrics(self) -> dict[str, float]:
        """Return the teacher's metrics."""
        return self.teacher.metrics()
