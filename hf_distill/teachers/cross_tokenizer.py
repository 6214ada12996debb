"""`CrossTokenizerTeacher`: a teacher whose tokenizer is not the student's."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.aligned_inputs import aligned_keys, has_aligned_inputs
from ..core.aligned_logits import CrossTokenizerLogits
from ..core.logits import DenseLogits, LazyLogits, SparseLogProbs, upload
from ..core.signals import FeatureKey, Signals
from ..core.targets import IGNORE_INDEX, FeatureTokens, Targets, target_labels
from ..core.token_classes import TokenClasses
from ..data.alignment.collator import AlignedCollator
from ..data.alignment.teacher_rows import TeacherRowMaker
from ..data.alignment.token_classes import token_classes
from ..errors import DistillError
from ..losses.cross_tokenizer import projected_kl
from ..losses.objective import Term
from ..models.model_types import model_type_of, unwrap_model
from .base import Teacher
from .cached import CachedTeacher
from .compatibility import tokenizer_in
from .frozen import FrozenTeacher
from .remote import RemoteTeacher

_WRAPPED = (FrozenTeacher, CachedTeacher, RemoteTeacher)


class CrossTokenizerTeacher(Teacher):
    """A teacher that reads the text of the student's tokens in its own tokens.

    The teacher's rows are made in the data loader's workers. Losses compare chunks, the smallest spans of text that
    both tokenizers delimit; see `AlignedLogits`.

    Args:
        teacher: a frozen, cached or remote teacher, a model, or the path or id of a model.
        processing_class: the teacher's tokenizer or processor; None: the one that the teacher has, or that is stored
            with its model.
        name: name of the teacher if there are several.
        max_length: largest number of tokens of the teacher's rows; None: what the teacher can read.

    Raises:
        DistillError: the teacher is of a kind that reads the student's tokens.
    """

    reads_text_only = True

    def __init__(
        self,
        teacher: Teacher | nn.Module | str,
        *,
        processing_class: Any = None,
        name: str | None = None,
        max_length: int | None = None,
    ):
        self.teacher = teacher if isinstance(teacher, Teacher) else FrozenTeacher(teacher)
        if not isinstance(self.teacher, _WRAPPED):
            raise DistillError(
                f"cross_tokenizer is set, and a {type(self.teacher).__name__} reads the student's tokens: use a "
                "frozen, cached or remote teacher, or remove cross_tokenizer."
            )
        self.processing_class, self.name, self.max_length = processing_class, name, max_length
        self.keys = aligned_keys(name)
        self.kind, self.can_fail, self.prefetch = self.teacher.kind, self.teacher.can_fail, self.teacher.prefetch
        self.max_wait_seconds, self.has_full_logits = self.teacher.max_wait_seconds, self.teacher.has_full_logits
        self.row_maker: TeacherRowMaker
        self._token_classes: TokenClasses | None = None
        self._num_chunks, self._num_tokens, self._num_tokens_in_chunks = 0, 0, 0

    @property
    def unwrapped(self) -> Teacher:
        """The teacher that reads its own tokens."""
        return self.teacher

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Prepare the teacher, and the alignment of both tokenizers.

        Raises:
            DistillError: the student is no causal language model, a tokenizer is missing, or its tokens cannot be
                mapped to bytes; or the teacher cannot be prepared.
        """
        model_type = model_type_of(student)
        if not model_type.is_decoder or not model_type.shifts_labels:
            raise DistillError(
                f"cross_tokenizer compares the next tokens of causal language models, and the student is a "
                f"{model_type.name} or predicts the token itself: remove cross_tokenizer, and use a teacher with the "
                "student's tokenizer."
            )
        student_tokenizer = tokenizer_in(processing_class)
        if student_tokenizer is None:
            raise DistillError(
                "cross_tokenizer aligns the student's tokens with the teacher's, and the student's tokenizer is not "
                "known: pass processing_class=tokenizer to the trainer."
            )
        self.tokenizer = self._find_tokenizer()
        if isinstance(self.teacher, FrozenTeacher):
            self.teacher.reads_own_tokens = True
        self.teacher.prepare(student, device, self.tokenizer)
        if isinstance(self.teacher, CachedTeacher | RemoteTeacher):
            self.teacher.keep_all_ids()
        self.model = self.teacher.model
        self._student_vocab_size = model_type.vocabulary_size(unwrap_model(student), "cross_tokenizer")
        self._student_tokenizer, self._token_classes = student_tokenizer, None
        self.row_maker = TeacherRowMaker(
            student_tokenizer, self.tokenizer, max_length=self.max_length or self.teacher.context_length, name=self.name
        )

    def _find_tokenizer(self) -> Any:
        """Return the teacher's tokenizer.

        Raises:
            DistillError: it is not known.
        """
        given_tokenizer = getattr(self.teacher, "processing_class", None)
        tokenizer = tokenizer_in(self.processing_class) or tokenizer_in(given_tokenizer)
        if tokenizer is None and isinstance(self.teacher, FrozenTeacher):
            tokenizer = self.teacher.load_tokenizer()
        if tokenizer is None:
            raise DistillError(
                "cross_tokenizer needs the teacher's tokenizer, and it is not known: pass "
                "CrossTokenizerTeacher(teacher, processing_class=tokenizer) as the teacher, or its folder or id as "
                "`tokenizer` of the teacher in a recipe."
            )
        return tokenizer

    def input_names(self) -> frozenset[str]:
        """Names of the keys of a batch that only this teacher reads, and of the columns that they may be made from."""
        return frozenset((*self.keys, "teacher_labels" if self.name is None else f"teacher_labels_{self.name}"))

    def add_inputs(self, inputs: dict) -> dict:
        """Return a batch with the teacher's rows; they are made here if the collator did not make them."""
        if has_aligned_inputs(inputs, self.name):
            return inputs
        device = inputs["input_ids"].device
        on_host = {name: value.cpu() for name, value in inputs.items() if isinstance(value, Tensor)}
        kept = {name: value for name, value in inputs.items() if name not in self.row_maker.replaced_keys}
        return kept | {name: upload(value, device) for name, value in self.row_maker(on_host).items()}

    def numbers_to_read(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return the chunks of the tokens of both models, and the numbers that the teacher needs."""
        batch = self._teacher_batch(inputs)
        numbers = {self._number(name): value for name, value in self.teacher.numbers_to_read(batch, shift).items()}
        return numbers | self._chunk_numbers(inputs)

    def _chunk_numbers(self, inputs: dict) -> dict[str, Tensor]:
        """Return the chunk of the label of each position, 0 for none; of the student -1 where there is no target."""
        labels, chunk_ids = target_labels(inputs, shift=True), _shifted(inputs[self.keys.chunk_ids])
        return {
            self._number("student chunks"): chunk_ids.masked_fill(labels == IGNORE_INDEX, -1),
            self._number("teacher chunks"): _shifted(inputs[self.keys.teacher_chunk_ids]),
        }

    def _number(self, name: str) -> str:
        """The name in `Targets.numbers` of a number of this teacher."""
        return f"{self.name or self.keys.chunk_ids} {name}"

    def own_batches(self, collator: Callable[[list], dict]) -> Callable[[list], dict]:
        """Return a collator of the batches that the teacher reads, in its own tokens, for `write_cache`.

        Args:
            collator: collator of the student's batches.
        """
        aligned = AlignedCollator(collator, [self.row_maker])
        return lambda rows: self._teacher_batch(aligned(rows))

    def _teacher_batch(self, inputs: dict) -> dict[str, Tensor]:
        """Return the teacher's rows as a batch."""
        keys = self.keys
        batch = {"input_ids": inputs[keys.teacher_input_ids]}
        batch["labels"] = batch["input_ids"].masked_fill(inputs[keys.teacher_chunk_ids] == 0, IGNORE_INDEX)
        for name, key in (("attention_mask", keys.teacher_attention_mask), ("position_ids", keys.teacher_position_ids)):
            if key in inputs:
                batch[name] = inputs[key]
        return batch

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Run the teacher on its rows, and return its logits with the chunks of both models."""
        batch, teacher_targets, alignment = self._align(inputs, targets)
        logits: Any = self.teacher(batch, teacher_targets, {}).logits
        assert isinstance(logits, DenseLogits | LazyLogits | SparseLogProbs)
        classes = self._classes(logits.vocab_size or len(self.tokenizer), targets.labels.device)
        teacher_chunks, teacher_first_tokens, chunks, first_tokens, on_host = alignment
        num_bytes = self._token_bytes[targets.labels]
        slots = chunks.where(chunks >= 0, len(first_tokens))
        chunk_bytes = num_bytes.new_zeros(len(first_tokens) + 1).index_add(0, slots, num_bytes)[:-1]
        return Signals(
            CrossTokenizerLogits(
                logits,
                teacher_targets.labels,
                teacher_chunks,
                teacher_first_tokens,
                chunks,
                first_tokens,
                classes,
                on_host,
                chunk_bytes,
            )
        )

    def start_batch(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> None:
        """Announce the teacher's rows of a batch to the teacher."""
        batch, teacher_targets, _ = self._align(inputs, targets)
        self.teacher.start_batch(batch, teacher_targets, {})

    def _align(
        self, inputs: dict, targets: Targets
    ) -> tuple[dict[str, Tensor], Targets, tuple[Tensor, Tensor, Tensor, Tensor, np.ndarray]]:
        """Return the teacher's batch, its target tokens, and the chunks of both models.

        Returns:
            (batch, target tokens of the teacher, (teacher_chunks, teacher_first_tokens, chunks, first_tokens,
            chunks_on_host); see `CrossTokenizerLogits`).
        """
        batch, numbers, device = self._teacher_batch(inputs), targets.numbers, targets.labels.device
        if self._number("student chunks") not in numbers:  # only some rows of the batch: their numbers are not known
            numbers = {name: value.flatten().tolist() for name, value in self._chunk_numbers(inputs).items()}
        student_chunk_ids = np.asarray(numbers[self._number("student chunks")], dtype=np.int64)
        teacher_chunk_ids = np.asarray(numbers[self._number("teacher chunks")], dtype=np.int64)
        student_chunk_ids = student_chunk_ids[student_chunk_ids >= 0]
        chunk_ids = np.intersect1d(student_chunk_ids, teacher_chunk_ids)
        chunk_ids = chunk_ids[chunk_ids > 0]
        chunks, teacher_chunks = _index(student_chunk_ids, chunk_ids), _index(teacher_chunk_ids, chunk_ids)
        positions = np.flatnonzero(teacher_chunks >= 0)
        teacher_chunks = teacher_chunks[positions]
        shape = batch["input_ids"].shape
        row_counts = np.bincount(positions // shape[1], minlength=shape[0]).tolist()
        arrays = (teacher_chunks, _first(teacher_chunks), chunks, _first(chunks), positions)
        *tensors, position_tensor = (upload(torch.from_numpy(array), device) for array in arrays)
        prefix = self._number("")
        teacher_targets = Targets(
            batch["input_ids"].flatten()[position_tensor + 1],
            position_tensor,
            position_tensor // shape[1],
            shape,
            row_counts=row_counts,
            numbers={name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)},
        )
        self._num_tokens += len(student_chunk_ids)
        self._num_tokens_in_chunks += int((chunks >= 0).sum())
        self._num_chunks += len(chunk_ids)
        return batch, teacher_targets, (*tensors, chunks)  # type: ignore[return-value]

    def _classes(self, teacher_vocab_size: int, device: torch.device) -> TokenClasses:
        """Return the classes of the ids of both vocabularies, which are computed once, as the bytes of ids are."""
        if self._token_classes is None:
            table = self.row_maker.student.table
            lengths = torch.from_numpy(np.where(table.is_special, 0, table.lengths)[: self._student_vocab_size])
            padding = self._student_vocab_size - len(lengths)
            self._token_bytes = torch.nn.functional.pad(lengths.long(), (0, padding)).to(device)
            self._token_classes = token_classes(
                self._student_tokenizer, self.tokenizer, self._student_vocab_size, teacher_vocab_size
            ).to(device)
        return self._token_classes

    def incompatible_terms(self, terms: Sequence[Term], name: str | None) -> list[str]:
        """Return which terms compare tokens of one tokenizer, and why the others do not work with the teacher."""
        teacher_terms = [term for term in terms if term.loss.compares and term.teacher == name]
        problems = [
            f"{term.name} compares features of tokens ({term.loss.name}), and the tokens of the teacher are others: "
            "remove it from `losses`"
            for term in teacher_terms
            if term.loss.feature
        ]
        problems += [
            f"{term.name} is {term.loss.name}, which compares distributions over the ids of one tokenizer, and the "
            "teacher has another one: set cross_tokenizer to alm, projected_kl or uld"
            for term in teacher_terms
            if not term.loss.feature and not term.loss.compares_chunks
        ]
        problems += [
            f"{term.name} is projected_kl at temperature {term.options['temperature']:g}, and a teacher that returns "
            "the probabilities of some ids is compared at temperature 1: set temperature to 1, or use a teacher that "
            "returns all logits"
            for term in teacher_terms
            if term.loss.function is projected_kl and not self.has_full_logits and term.options["temperature"] != 1.0
        ]
        chunk_terms = [term for term in terms if term.loss.compares_chunks]
        return problems + self.teacher.incompatible_terms(chunk_terms, name)

    def on_train_begin(self, step: int) -> None:
        """Call the teacher's hook."""
        self.teacher.on_train_begin(step)

    def close(self) -> None:
        """Cancel what the teacher runs in the background."""
        self.teacher.close()

    def metrics(self) -> dict[str, float]:
        """Return the teacher's metrics, and since the last log the share of target tokens of this process in chunks,
        and their number in a chunk.
        """
        tokens, in_chunks, chunks = self._num_tokens, self._num_tokens_in_chunks, self._num_chunks
        self._num_tokens = self._num_tokens_in_chunks = self._num_chunks = 0
        shares = {"aligned_tokens": in_chunks / max(tokens, 1), "tokens_per_chunk": in_chunks / max(chunks, 1)}
        return self.teacher.metrics() | (shares if tokens else {})


def _shifted(chunk_ids: Tensor) -> Tensor:
    """Return the chunk of the token that each position predicts, [B, S]."""
    return torch.nn.functional.pad(chunk_ids[..., 1:], (0, 1))


def _index(ids: np.ndarray, chunk_ids: np.ndarray) -> np.ndarray:
    """Return the index of each id among sorted chunk ids; -1 if it is none of them."""
    if not len(chunk_ids):
        return np.full(len(ids), -1)
    index = np.searchsorted(chunk_ids, ids).clip(max=len(chunk_ids) - 1)
    return np.where(chunk_ids[index] == ids, index, -1)


def _first(chunks: np.ndarray) -> np.ndarray:
    """Return the index of the first token of each chunk, of which every one has a token."""
    values, first = np.unique(chunks, return_index=True)
    return first[values >= 0]
