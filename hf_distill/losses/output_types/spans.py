"""Outputs that are distributions over the positions of a row: question answering."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core.loss_kinds import SPANS
from ...core.targets import Targets
from ..analytic_gradients import BlockLogits
from ..spans import (
    SPAN_HITS,
    SPAN_LABELS,
    SPAN_PAIR_METRICS,
    SPAN_STUDENT_METRICS,
    allowed_positions,
    span_labels,
    span_metrics,
)
from .base import OutputType


class Spans(OutputType):
    """Two distributions over the positions of a row: where an answer starts, and where it ends."""

    outputs, soft_loss, hard_loss = SPANS, "span_kl", "span_cross_entropy"
    student_metrics, pair_metrics = SPAN_STUDENT_METRICS, SPAN_PAIR_METRICS
    label_names, logit_names = SPAN_LABELS, ("start_logits", "end_logits")
    compares_positions = True
    target = "position"
    evaluation_statistics = SPAN_HITS

    def logits_of(self, outputs: Mapping[str, Any]) -> Tensor | None:
        """Stack the logits of starts and ends [B, S] to [B, 2, S]; `logits` are used if the outputs have them."""
        parts = [part for name in self.logit_names if isinstance(part := outputs.get(name), Tensor)]
        if "logits" in outputs or len(parts) < len(self.logit_names):
            return outputs.get("logits")
        return torch.stack(parts, dim=1)

    def countable_labels(self, inputs: dict, shift: bool) -> Tensor:
        """Return the positions of starts and ends, [B, 2]."""
        return span_labels(inputs)

    def find_targets(self, inputs: dict, shift: bool, numbers: Mapping[str, Tensor]) -> Targets:
        """Return the starts and ends of a batch as targets, [2 * B] without those outside of their row."""
        targets = Targets.from_batch({"labels": span_labels(inputs)}, False, numbers)
        return replace(targets, allowed=allowed_positions(inputs)[targets.batch_rows])

    def metrics(self, student: BlockLogits, block: BlockLogits | None, targets: Targets) -> dict[str, Tensor]:
        """Return the statistics of each start and end."""
        return span_metrics(student, block, targets)

    def row_values(
        self, statistics: Mapping[str, Tensor], targets: Targets, num_classes: int | None
    ) -> dict[str, Tensor]:
        """Return for each row whether both of its targets are hit, and whether it has both, [B, 1]."""
        rows, values = targets.batch_rows, {}
        for name in ("spans", *SPAN_HITS):
            hits = torch.ones_like(rows, dtype=torch.float64) if name == "spans" else statistics.get(name)
            if hits is not None:
                number = torch.zeros(targets.shape[0], dtype=torch.float64, device=rows.device)
                number.index_add_(0, rows, hits.double())
                values[name] = (number == len(SPAN_LABELS)).double()[:, None]
        return values

    def evaluation_metrics(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float | None]:
        """Return the share of rows for which a model predicts the start and the end, of those that have both."""
        names = dict(zip(SPAN_HITS, ("exact_match", "teacher_exact_match"), strict=True))
        if not float(rows["spans"]):
            return {}
        return {name: float(rows[hits] / rows["spans"]) for hits, name in names.items() if hits in rows}
