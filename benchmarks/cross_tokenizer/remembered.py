"""A teacher whose hidden states are computed once for each row, so that many runs on the same rows share their cost.

The runs that measure quality use it; the runs that measure time and memory do not.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast


class RememberedStates:
    """Replaces the forward of a model's backbone: rows that were read before are looked up, without padding.

    Args:
        model: a causal language model whose backbone is `model.model`, which returns the last hidden states.
        file: of the states that earlier runs left; it need not exist.
    """

    def __init__(self, model: nn.Module, file: Path):
        backbone: Any = model.model
        self._compute, self._file = backbone.forward, file
        self._states: dict[tuple[int, ...], Tensor] = torch.load(file) if file.is_file() else {}
        self._known = len(self._states)
        backbone.forward = self._forward

    def save(self) -> None:
        """Write the states, if there are new ones."""
        if len(self._states) > self._known:
            unfinished = self._file.with_suffix(".unfinished")
            torch.save(self._states, unfinished)
            unfinished.replace(self._file)

    @torch.no_grad()
    def _forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutputWithPast:
        rows = []
        for number, ids in enumerate(input_ids):
            ids_of_row = ids if attention_mask is None else ids[attention_mask[number].bool()]
            key = tuple(ids_of_row.tolist())
            if key not in self._states:
                self._states[key] = self._compute(input_ids=ids_of_row[None], use_cache=False).last_hidden_state[0]
            rows.append(nn.functional.pad(self._states[key], (0, 0, 0, len(ids) - len(ids_of_row))))
        return BaseModelOutputWithPast(last_hidden_state=torch.stack(rows))
