"""`Teacher`, from which custom teachers derive, and `JointStep`, which a trained teacher runs in the student's forward.

`TrainableTeacher` in `trainable.py` is the base class of teachers that are trained with the student.

Shape letters are those of `hf_distill.core.targets`: B rows, S positions, V vocabulary, T target tokens of a batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.aligned_logits import CrossTokenizerLogits
from ..core.logits import DenseLogits, LazyLogits, SparseLogProbs
from ..core.signals import FeatureKey, Signals
from ..core.targets import FeatureTokens, Targets
from ..core.teacher_logits import RoutedLogits, logits_by_teacher
from ..errors import DistillError
from ..losses.objective import Term
from ..models.blocks import LayerStack
from ..models.model_call import input_names, readable_inputs


@dataclass(frozen=True)
class OtherTokens:
    """The tokens of a teacher that cannot read the student's.

    reason:      sentences that state how the tokens differ, and what to do
    fingerprint: checksum of the teacher's tokenizer
    """

    reason: str
    fingerprint: str | None


class Teacher(ABC):
    """Base class for teachers: returns logits, and optionally features, for the target tokens of a batch.

    A custom teacher implements `forward`, and `prepare` if it needs the student's device or tokenizer:

        import torch
        from hf_distill import Teacher
        from hf_distill.core.logits import DenseLogits
        from hf_distill.core.signals import Signals

        class MyTeacher(Teacher):
            def __init__(self, model):
                self.model = model

            def prepare(self, student, device, processing_class=None):
                self.model.to(device).eval().requires_grad_(False)

            @torch.no_grad()
            def forward(self, inputs, targets, feature_requests):
                logits = self.model(inputs["input_ids"], attention_mask=inputs.get("attention_mask")).logits
                return Signals(DenseLogits(targets.gather_logits(logits)))  # [B, S, V] -> [T, V]

        trainer = DistillTrainer(student, args, teacher=MyTeacher(model), ...)

    Target tokens are the labels that are not -100, after the shift by one position that causal language models need.
    `Targets` holds the label, the position and the batch row of each of the T target tokens of a batch.

    `Signals(logits, features)` is what `forward` returns. Its logits are one of:

        DenseLogits(values)                   unnormalized logits of all ids, [T, V]
        LazyLogits(hidden, weight, bias)      hidden states [T, H] and the output head; logits are computed in chunks
        SparseLogProbs(ids, log_probs, ...)   log-probabilities of K ids for each target token, both [T, K], and the log
                                              of the probability of all other ids, [T]; -inf marks unused slots
        None                                  no soft labels: set `provides_soft_labels` to False

    `SparseLogProbs` are probabilities at one temperature; the losses must be set to the same one. Its features map each
    `FeatureKey` of `feature_requests` to a tensor; a teacher that leaves `layer_stack` as it is gets no such requests.

    Preconditions: the ids of teacher and student mean the same tokens, tensors are on the device of `targets`, and no
    tensor requires a gradient. V may differ from the student's: losses compare the ids that both models have.
    Everything but `forward` has a default.

    kind:                 the name that recipes use; "" for a custom class
    tied_to_student:      whether the teacher works only with the student that it was prepared for
    model:                the teacher model after `prepare`; None if there is none
    provides_soft_labels: whether the teacher gives the student soft labels, whose weight is alpha
    has_full_logits:      whether `forward` returns logits of all ids; False: `SparseLogProbs`
    can_fail:             whether `forward` may raise a RunError during training, as a server can fail; the trainer then
                          ends training on all ranks, with a checkpoint
    any_output_type:      whether students may predict something else than a distribution over ids or classes
    reads_teacher_inputs: whether `forward` may get inputs that the student does not read (`teacher_<name>`)
    reads_teacher_labels: whether it may get the target tokens at other positions (`teacher_labels`)
    other_tokens:         why the teacher cannot read the student's tokens, set by `prepare`; None: it can
    reads_text_only:      whether `forward` reads the tokens of a batch alone; batches with images are refused then
    context_length:       largest number of tokens of a row that `forward` reads, set by `prepare`; None: unknown
    max_wait_seconds:     longest time for which `forward` waits for a server before it fails
    prefetch:             number of batches after the current step for which the trainer calls `start_batch`
    progress:             progress of the training, in [0, 1]; the trainer sets it
    """

    kind: str = ""
    tied_to_student: bool = False
    model: Any = None
    provides_soft_labels: bool = True
    has_full_logits: bool = True
    can_fail: bool = False
    any_output_type: bool = True
    reads_teacher_inputs: bool = True
    reads_teacher_labels: bool = True
    other_tokens: OtherTokens | None = None
    reads_text_only: bool = False
    context_length: int | None = None
    max_wait_seconds: float = 0.0
    prefetch: int = 0
    progress: float = 0.0

    def __call__(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Call `forward`, and check the shape of what it returns.

        Raises:
            DistillError: `forward` does not return `Signals` with one row of logits for each target token.
        """
        signals = self.forward(inputs, targets, feature_requests)
        _check_signals(type(self).__name__, signals, len(targets))
        return signals

    @property
    def unwrapped(self) -> "Teacher":
        """The teacher itself, or the one that a `CrossTokenizerTeacher` gives its rows to."""
        return self

    def add_inputs(self, inputs: dict) -> dict:
        """Return a batch with what only this teacher reads, if the collator did not add it.

        Args:
            inputs: the collator's batch, or one that the trainer made of generated completions.
        """
        return inputs

    @abstractmethod
    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Return the logits, and the requested features, for the target tokens of a batch, without gradients.

        Args:
            inputs: the collator's batch, [B, S] tensors on the student's device.
            targets: the T target tokens.
            feature_requests: the features to return, each with the tokens that it is needed for; empty where
                `layer_stack` raises an error.

        Returns:
            signals whose logits are [T, V], with a feature for each key of `feature_requests`.
        """

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """The layers whose features the teacher can return.

        Args:
            which: "encoder" or "decoder" of a model that has both; None: the only stack.

        Raises:
            DistillError: the teacher returns logits only, which is the default.
        """
        raise DistillError(
            f"A {type(self).__name__} returns logits and no features: remove the losses on hidden states and attention "
            "from `losses`, or use a FrozenTeacher."
        )

    def numbers_to_read(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return integers of a batch that `forward` needs on the host; it finds them in `targets.numbers`.

        The host waits for the device when it reads a number. The trainer reads these with its own, once for each batch.

        Args:
            inputs: the collator's batch, on the student's device.
            shift: whether the logits at position i predict the label at i + 1.

        Returns:
            name -> [n] integers on the device of the batch.
        """
        return {}

    def numbers_of_any_rows(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return those of `numbers_to_read` that are also right if `forward` gets only some rows of the batch."""
        return {}

    def input_names(self) -> frozenset[str]:
        """Names of the inputs that the forward of `model` accepts; the trainer keeps columns with these names."""
        return frozenset() if self.model is None else input_names(self.model)

    def readable_inputs(self) -> frozenset[str] | None:
        """Names of the inputs that `forward` reads; None: any. A batch has them as `teacher_<name>`, or shared."""
        if self.model is not None:
            return readable_inputs(self.model)
        return self.input_names() or None

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:  # noqa: B027
        """Load or move what `forward` needs; called once, before the first call.

        Args:
            student: the student with its adapters, without parallel wrappers.
            device: the student's device.
            processing_class: the student's tokenizer, if the trainer has one.

        Raises:
            DistillError: this teacher cannot teach this student.
        """

    def check_data(self, rows: Any, name: str) -> None:  # noqa: B027
        """Check before training that the teacher can read a data set.

        Args:
            rows: the data set.
            name: `train_dataset` or `eval_dataset`.

        Raises:
            DistillError: the teacher cannot read some rows.
        """

    def incompatible_terms(self, terms: Sequence[Term], name: str | None) -> list[str]:
        """Return the reasons why the student's terms do not work with this teacher; called after `prepare`.

        Args:
            terms: all terms of the student.
            name: `Term.teacher` of the terms that read this teacher; None unless there are several teachers.
        """
        return []

    def start_batch(  # noqa: B027
        self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]
    ) -> None:
        """Start to prepare the signals of a batch, without waiting for them; called some steps before `forward`.

        `forward` gets the same batch later, unless training stops before. Batches of evaluations and those that a
        trainer generates are not announced.

        Args:
            inputs: ids, mask, positions and labels of the batch, on the CPU.
            targets: its target tokens, on the CPU.
            feature_requests: the features that `forward` will be asked for, with their tokens on the CPU.
        """

    def on_train_begin(self, step: int) -> None:  # noqa: B027
        """Called before the first step, after the student was wrapped by its strategy and `load` was called.

        Args:
            step: optimizer steps that were taken before; 0 unless a run is resumed.
        """

    def on_step_end(self, step: int, updated: bool) -> None:  # noqa: B027
        """Update a teacher that changes during training; called after each optimizer step.

        Args:
            step: number of the step, counted from 1; skipped steps count.
            updated: whether the step changed the student; False if it was skipped.
        """

    def close(self) -> None:  # noqa: B027
        """Cancel what runs in the background; called when training ends, also by an error or a signal."""

    def metrics(self) -> dict[str, float]:
        """Return values for the training log."""
        return {}

    def save(self, folder: str, rank: int, write: bool) -> None:  # noqa: B027
        """Write the teacher's state into a checkpoint; called on every rank.

        Args:
            folder: the checkpoint.
            rank: rank of this process.
            write: whether this rank writes the state that all ranks share.
        """

    def load(self, folder: str, rank: int) -> None:  # noqa: B027
        """Read what `save` wrote; called before the first step of a resumed run."""


class JointStep(ABC):
    """What a trained teacher runs inside the student's forward, when the student's logits are known.

    teacher_signals: signals of the target tokens for the student's losses; set by the call
    per_token:       name -> [T], losses of the teacher's terms; set by the call
    """

    teacher_signals: Signals
    per_token: dict[str, Tensor]

    def context(self, student: nn.Module) -> AbstractContextManager:
        """Return the context in which the student's forward runs."""
        return nullcontext()

    @abstractmethod
    def __call__(self, student_logits: LazyLogits | DenseLogits) -> Tensor:
        """Return the teacher's loss, [].

        Args:
            student_logits: logits of the target tokens, with their graph.
        """


def _check_signals(name: str, signals: Any, num_targets: int) -> None:
    """Check that a teacher returns `Signals` with 2-D logits that have one row for each target token."""
    remedy = (
        f"forward must return Signals whose logits are DenseLogits, LazyLogits or SparseLogProbs with one row for each "
        f"of the {num_targets} target tokens, for example Signals(DenseLogits(targets.gather_logits(outputs.logits)))"
    )
    if not isinstance(signals, Signals):
        raise DistillError(f"{name}.forward returned a {type(signals).__name__}. {remedy}.")
    if isinstance(signals.logits, RoutedLogits | CrossTokenizerLogits):
        return  # those of each teacher were checked
    for logits in logits_by_teacher(signals.logits).values():
        match logits:
            case CrossTokenizerLogits():
                continue
            case DenseLogits(values=rows) | LazyLogits(hidden=rows) | SparseLogProbs(ids=rows):
                shape = tuple(rows.shape)
            case _:
                raise DistillError(f"{name}.forward returned logits of the type {type(logits).__name__}. {remedy}.")
        if len(shape) != 2 or shape[0] != num_targets:
            raise DistillError(
                f"{name}.forward returned {type(logits).__name__} with a tensor of shape {shape}. {remedy}."
            )
