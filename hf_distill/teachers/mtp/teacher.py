"""The student's output head teaches heads that look further ahead."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ...core.logits import DenseLogits, LazyLogits
from ...core.signals import FeatureKey, Signals
from ...core.targets import Targets
from ...errors import DistillError, raise_if_any
from ...losses.fused import ChunkedLoss
from ...losses.objective import Term
from ...models.model_types import unwrap_model
from ...models.output_head import known_output_head
from ..base import JointStep
from ..trainable import TrainableTeacher
from .heads import MTPHeads, record_last_block_kwargs, save_heads


class MTPTeacher(TrainableTeacher):
    """Multi-token prediction (2412.19437, 2.2) with the main head as the teacher of the others.

    L = cross entropy of the student
        + sum over d of (hard_weight * cross entropy_d + soft_weight * T^2 * divergence(main head || head d))

    Head d at position i says token i + d + 1; its soft labels are what the main head says of that token at position
    i + d, without gradient. All sums are over asked tokens, divided by those of the global batch. The student itself
    has no soft labels: alpha must be 0.

    Args:
        num_future_tokens: how many tokens beyond the next one are predicted, one by each head.
        hard_weight: of each head's cross entropy.
        soft_weight: of each head's divergence.
        learning_rate: of the heads; None: the run's.

    Raises:
        DistillError: a value out of range.
    """

    kind = "mtp"
    trainable_module: nn.Module | None = None
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
        """Make the heads of the student's last block, if there are none yet.

        Raises:
            DistillError: a student that they cannot be made of.
        """
        self.model = student
        if self.trainable_module is None:
            self.trainable_module = MTPHeads(student, self._count)

    def check_arguments(self, args: TrainingArguments) -> list[str]:
        """Strategies that shard what the heads share with the student."""
        return ["MTP heads are not trained under FSDP: use DDP or DeepSpeed"] if args.fsdp else []

    def adapt_objective(self, terms: Sequence[Term]) -> list[Term]:
        """Make the heads' terms of the student's: `mtp_hard_d` and `mtp_soft_d` for each of them.

        Raises:
            DistillError: the student has soft labels or features to learn from.
        """
        soft, hard = (next(term for term in terms if term.name == name) for name in ("soft", "hard"))
        if soft.weight or len(terms) > 2:
            raise DistillError(
                f"alpha is {soft.weight:g} and there are {len(terms) - 2} further losses, but an MTPTeacher teaches "
                "its heads alone and tells the student itself nothing: set alpha to 0 and leave losses out."
            )
        self._terms = [
            [replace(t, name=f"mtp_{t.name}_{d}", weight=self._weights[t.name]) for t in (soft, hard)]
            for d in range(1, self._count + 1)
        ]
        self.terms = [term for of_head in self._terms for term in of_head]
        return super().adapt_objective(terms)

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, Targets]) -> Signals:
        """Nothing that the student itself could learn from."""
        return Signals(None)

    def joint_step(
        self,
        inputs: dict,
        targets: Targets,
        feature_requests: Mapping[FeatureKey, Targets],
        num_items: Tensor | int | None,
    ) -> JointStep:
        """The heads' forward and their losses."""
        run = _MTPStep(self.model, self.trainable_module, self._terms, inputs, targets, targets.divisor(num_items))
        self._run = run
        return run

    def metrics(self) -> dict[str, float]:
        """`teacher_weight_drift` of the heads, and `mtp_heads_skipped`: how many had no token in the last batch."""
        return super().metrics() | {"mtp_heads_skipped": float(self._run.skipped)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `mtp.safetensors` and `mtp.json`, for `generate_with_mtp`.

        Raises:
            RunError: the weights of the heads are not finite; nothing is written.
        """
        assert isinstance(self.trainable_module, MTPHeads)
        save_heads(self.trainable_module, folder)


class _MTPStep(JointStep):
    """One forward of the heads inside the student's."""

    teacher_signals = Signals(None)

    def __init__(self, student, heads, terms, inputs, targets, items):
        self.student, self.heads, self.terms = unwrap_model(student), heads, terms
        self.inputs, self.targets, self.items = inputs, targets, items
        self.per_token, self.skipped = {}, 0

    @contextmanager
    def context(self, student: nn.Module):
        """Note what the last block is called with, and the hidden states that the output head gets."""
        head = self.student.get_output_embeddings()

        def note(_module: nn.Module, args: tuple) -> None:
            self.hidden = args[0]

        with ExitStack() as stack:
            stack.callback(head.register_forward_pre_hook(note).remove)
            self.block_kwargs = stack.enter_context(record_last_block_kwargs(student))
            yield

    def __call__(self, said: LazyLogits | DenseLogits) -> Tensor:
        hidden = self.hidden
        rows = self.heads(hidden, self.inputs["input_ids"], self.student.get_input_embeddings(), self.block_kwargs)
        main, total = said.detach(), torch.zeros((), device=hidden.device)
        documents = self.targets.feature_positions(self.inputs, causal=True).documents
        for d, (of_head, row) in enumerate(zip(self.terms, rows, strict=True), 1):
            kept, targets = self._ahead(d, documents.flatten())
            self.skipped += len(targets) == 0
            job = ChunkedLoss(_rows(main, kept), targets, of_head, num_items=self.items)
            total = total + job.from_hidden(self._head(said, row.flatten(0, 1)[targets.positions]))
            for name, values in job.per_token.items():
                spread = values.new_zeros(len(self.targets))
                self.per_token[name] = spread.index_copy(0, kept, values)
        return total

    def _ahead(self, d: int, documents: Tensor) -> tuple[Tensor, Targets]:
        """Which asked tokens head d can say, and from where: d places before the main head does, in their document."""
        asked, width = self.targets, self.targets.shape[1]
        before = (asked.positions - d).clamp(min=0)
        inside = (asked.positions % width >= d) & (documents[before] == documents[asked.positions])
        kept = inside.nonzero().squeeze(1)
        return kept, replace(asked, labels=asked.labels[kept], positions=before[kept], rows=asked.rows[kept])

    def _head(self, said: LazyLogits | DenseLogits, hidden: Tensor) -> LazyLogits:
        if isinstance(said, LazyLogits):
            return LazyLogits(hidden.to(said.weight.dtype), said.weight, said.bias, said.scaling)
        head = known_output_head(self.student)
        if head is None or head.scaling is None:
            raise DistillError(
                f"MTPTeacher predicts through the output head of {type(self.student).__name__}, whose logits cannot be "
                f"made from hidden states: {head.reason if head else 'it has none'}. Use a student with a plain linear "
                "output head, or another teacher."
            )
        return LazyLogits(hidden, head.module.weight, head.module.bias, head.scaling)


def _rows(source: LazyLogits | DenseLogits, kept: Tensor) -> LazyLogits | DenseLogits:
    return (
        DenseLogits(source.values[kept])
        if isinstance(source, DenseLogits)
        else replace(source, hidden=source.hidden[kept])
    )
