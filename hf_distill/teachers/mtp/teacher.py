"""The teacher for multi-token prediction: the student's next-token predictions teach the additional heads."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ...core.logits import DenseLogits, LazyLogits
from ...core.signals import FeatureKey, Signals
from ...core.targets import IGNORE_INDEX, FeatureTokens, Targets, target_labels, token_documents, true_indices
from ...errors import DistillError, raise_if_any
from ...losses.fused import ChunkedLoss
from ...losses.objective import Term
from ...models.model_types import unwrap_model
from ...models.output_head import known_output_head
from ..base import JointStep
from ..trainable import TrainableTeacher
from .heads import MTPHeads, record_last_block_kwargs, save_heads


class MTPTeacher(TrainableTeacher):
    """Multi-token prediction (arXiv 2412.19437, section 2.2) with the main head as the teacher of the other heads.

    L = cross entropy of the student
        + sum over d of (hard_weight * cross entropy_d + soft_weight * T^2 * divergence(main head || head d))

    Head d at position i predicts token i + d + 1; its soft labels are the main head's prediction of that token at
    position i + d, without gradients. All sums are over target tokens, divided by the number of target tokens of the
    global batch. The student itself has no soft labels, so alpha must be 0.

    Args:
        num_future_tokens: how many tokens after the next one are predicted, one by each head.
        hard_weight: weight of each head's cross entropy.
        soft_weight: weight of each head's divergence.
        learning_rate: learning rate of the heads; None: that of the run.

    Raises:
        DistillError: a value is out of range; the message lists all such values.
    """

    kind = "mtp"
    any_output_type = False
    trainable_module: MTPHeads
    provides_soft_labels = False

    def __init__(
        self,
        num_future_tokens: int = 3,
        *,
        hard_weight: float = 0.3,
        soft_weight: float = 0.1,
        learning_rate: float | None = None,
    ):
        problems = []
        if isinstance(num_future_tokens, bool) or not isinstance(num_future_tokens, int) or num_future_tokens < 1:
            problems.append(f"num_future_tokens is {num_future_tokens!r}; it must be a whole number, 1 or more")
        for name, value in (("hard_weight", hard_weight), ("soft_weight", soft_weight)):
            if not value >= 0:
                problems.append(f"{name} of the heads is {value}; it must be 0 or more")
        raise_if_any(problems)
        super().__init__()
        self._count, self._weights = num_future_tokens, {"hard": hard_weight, "soft": soft_weight}
        self.optimizer_overrides = {"lr": learning_rate}

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Make the heads from the student's last layer, if there are none yet.

        Raises:
            DistillError: heads cannot be made from this student.
        """
        self.model = student
        if not hasattr(self, "trainable_module"):
            self.trainable_module = MTPHeads(student, self._count)

    def check_arguments(self, args: TrainingArguments) -> list[str]:
        """Return the reason why FSDP is not supported: it shards what the heads share with the student."""
        return ["MTP heads cannot be trained under FSDP: use DDP or DeepSpeed"] if args.fsdp else []

    def derive_terms(self, soft: Term, hard: Term) -> list[Term]:
        """Return `mtp_soft_d` and `mtp_hard_d` for each head d."""
        return [
            replace(term, name=f"mtp_{term.name}_{d}", weight=self._weights[term.name])
            for d in range(1, self._count + 1)
            for term in (soft, hard)
        ]

    def numbers_to_read(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return the number of target tokens of each head."""
        labels, documents = target_labels(inputs, shift), token_documents(inputs)
        if labels.shape != documents.shape:
            return {}  # the student's forward raises an error
        is_target, counts = labels != IGNORE_INDEX, []
        for d in range(1, self._count + 1):  # slices beyond the row are empty
            counts.append((is_target[:, d:] & (documents[:, d:] == documents[:, :-d])).sum())
        return {"mtp": torch.stack(counts)}

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Return no logits: the student itself learns from the labels only."""
        return Signals(None)

    def joint_step(
        self,
        inputs: dict,
        targets: Targets,
        feature_requests: Mapping[FeatureKey, FeatureTokens],
        num_items: Tensor | int | None,
        terms: Sequence[Term],
    ) -> JointStep:
        """Return a step that runs the heads and computes their losses."""
        self._step = _MTPStep(self.model, self.trainable_module, terms, inputs, targets, targets.divisor(num_items))
        return self._step

    def metrics(self) -> dict[str, float]:
        """Return `teacher_weight_drift`, and `mtp_heads_skipped`: how many heads had no token in the last batch."""
        return super().metrics() | {"mtp_heads_skipped": float(self._step.skipped)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `mtp.safetensors` and `mtp.json`, for `generate_with_mtp`.

        Raises:
            RunError: some weights of the heads are not finite; nothing is written.
        """
        save_heads(self.trainable_module, folder)


class _MTPStep(JointStep):
    """One forward of the heads inside the student's forward."""

    teacher_signals = Signals(None)

    def __init__(
        self,
        student: nn.Module,
        heads: MTPHeads,
        terms: Sequence[Term],
        inputs: dict,
        targets: Targets,
        divisor: Tensor,
    ) -> None:
        self.student, self.heads = unwrap_model(student), heads
        self.terms = [terms[i : i + 2] for i in range(0, len(terms), 2)]  # soft and hard of each head
        self.inputs, self.targets, self.divisor = inputs, targets, divisor
        self.per_token, self.skipped = {}, 0

    @contextmanager
    def context(self, student: nn.Module) -> Iterator[None]:
        """Record the arguments of the last layer and the hidden states that the output head gets."""
        head = self.student.get_output_embeddings()

        def record(_module: nn.Module, args: tuple) -> None:
            self.hidden = args[0]

        with ExitStack() as stack:
            stack.callback(head.register_forward_pre_hook(record).remove)
            self.block_kwargs = stack.enter_context(record_last_block_kwargs(student))
            yield

    def __call__(self, student_logits: LazyLogits | DenseLogits) -> Tensor:
        hidden = self.hidden
        rows = self.heads(hidden, self.inputs["input_ids"], self.student.get_input_embeddings(), self.block_kwargs)
        main_logits, total = student_logits.detach(), torch.zeros((), device=hidden.device)
        documents = token_documents(self.inputs)
        for d, (terms, row) in enumerate(zip(self.terms, rows, strict=True), 1):
            token_indices, targets = self._targets_of_head(d, documents.flatten())
            self.skipped += len(targets) == 0
            teacher_logits = _select(main_logits, token_indices)
            chunked_loss = ChunkedLoss(teacher_logits, targets, terms, num_items=self.divisor)
            total = total + chunked_loss.from_hidden(self._logits(student_logits, row.flatten(0, 1)[targets.positions]))
            for name, values in chunked_loss.per_token.items():
                zeros = values.new_zeros(len(self.targets))
                self.per_token[name] = zeros.index_copy(0, token_indices, values)
        return total

    def _targets_of_head(self, d: int, documents: Tensor) -> tuple[Tensor, Targets]:
        """Select the target tokens that head d predicts, from d positions earlier within the same document.

        Args:
            d: number of the head, counted from 1.
            documents: [B * S] document of each position.

        Returns:
            the indices of these tokens among the T target tokens, and their targets for head d.
        """
        targets, width = self.targets, self.targets.shape[1]
        earlier = (targets.positions - d).clamp(min=0)
        is_inside = (targets.positions % width >= d) & (documents[earlier] == documents[targets.positions])
        indices = true_indices(is_inside, targets.numbers["mtp"][d - 1])
        mask, weights = (None if of is None else of[indices] for of in (targets.label_mask, targets.weights))
        rows = targets.batch_rows[indices]
        return indices, Targets(targets.labels[indices], earlier[indices], rows, targets.shape, mask, weights=weights)

    def _logits(self, student_logits: LazyLogits | DenseLogits, hidden: Tensor) -> LazyLogits:
        """Return the logits of hidden states of a head, [t, H], by the student's output head."""
        if isinstance(student_logits, LazyLogits):
            return replace(student_logits, hidden=hidden.to(student_logits.weight.dtype))
        head = known_output_head(self.student)
        if head is None or head.scaling is None:
            raise DistillError(
                f"MTPTeacher uses the output head of {type(self.student).__name__}, whose logits cannot be computed "
                f"from hidden states: {head.reason if head else 'it has no output head'}. Use a student with a plain "
                "linear output head, or another teacher."
            )
        assert isinstance(head.module, nn.Linear)
        return LazyLogits.of_head(hidden, head.module.weight, head.module.bias, head.scaling)


def _select(logits: LazyLogits | DenseLogits, indices: Tensor) -> LazyLogits | DenseLogits:
    """Return the logits of some target tokens."""
    if isinstance(logits, DenseLogits):
        return DenseLogits(logits.values[indices])
    return replace(logits, hidden=logits.hidden[indices])
