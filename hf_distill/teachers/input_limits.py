"""Checks that ids and positions lie within a model's embeddings.

An index beyond an embedding would otherwise raise an error without an explanation, on a GPU a device-side assert.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..core.targets import TEACHER_PREFIX
from ..core.teacher_inputs import TEACHER_IDS, TEACHER_MASK
from ..errors import DistillError
from ..models.model_types import unwrap_model

_IDS_AND_MASKS = (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask"))
_LARGEST_POSITION = "largest position"


@dataclass(frozen=True)
class InputLimits:
    """Largest inputs that a teacher can read.

    ids:           rows of its token embedding; None: unknown
    positions:     rows of its learned position embedding, without reserved ones; None: it has no such embedding
    fill:          the id that replaces masked tokens for which the teacher has no embedding
    is_id_checked: whether ids have to be checked, because the student has more ids than the teacher, or other ones
    has_other_tokens: whether the teacher reads other tokens than the student
    """

    ids: int | None
    positions: int | None
    fill: int
    is_id_checked: bool
    has_other_tokens: bool = False

    @classmethod
    def of(cls, teacher: nn.Module, student: nn.Module, has_other_tokens: bool = False) -> "InputLimits":
        """Read the limits from the embeddings of the models.

        Args:
            teacher: the teacher.
            student: the student.
            has_other_tokens: whether the teacher reads other tokens than the student.
        """
        teacher, student = unwrap_model(teacher), unwrap_model(student)
        ids, student_ids = _embedding_rows(teacher), _embedding_rows(student)
        fill = getattr(_text_config(teacher), "pad_token_id", None)
        is_id_checked = ids is not None and (has_other_tokens or student_ids is None or student_ids > ids)
        fill = fill if isinstance(fill, int) and 0 <= fill < (ids or 0) else 0
        return cls(ids, _positions(teacher), fill, is_id_checked, has_other_tokens)

    def numbers_to_read(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the numbers of a batch that `readable` needs on the host; empty if ids need no check."""
        numbers: dict[str, Tensor] = {}
        for name, mask_name in _IDS_AND_MASKS:
            ids, mask = inputs.get(name), inputs.get(mask_name)
            if not isinstance(ids, Tensor) or ids.dim() < 2 or not ids.numel():
                continue
            if self._needs_position_ids(inputs, ids):
                numbers[_LARGEST_POSITION] = inputs["position_ids"].max()
            if self.is_id_checked:
                if isinstance(mask, Tensor) and mask.shape == ids.shape:
                    ids = ids.masked_fill(mask == 0, 0)
                numbers[_largest(name)] = ids.max()
        return numbers

    def readable(
        self, inputs: Mapping[str, Any], numbers: Mapping[str, Sequence[int]] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Return a batch that the teacher can read: masked tokens without an embedding are replaced by `fill`.

        Args:
            inputs: the batch.
            numbers: the values of `numbers_to_read`; those that are missing are read from the device.

        Raises:
            DistillError: another token, or a position, is beyond the teacher's embedding.
        """
        inputs = dict(inputs)
        for name, mask_name in _IDS_AND_MASKS:
            ids = inputs.get(name)
            if not isinstance(ids, Tensor) or ids.dim() < 2:
                continue
            self._check_positions(inputs, ids, numbers)
            mask = inputs.get(mask_name)
            if self.is_id_checked and self.ids is not None and mask is not None and mask.shape == ids.shape:
                inputs[name] = ids = ids.masked_fill((mask == 0) & (ids >= self.ids), self.fill)
            if self.is_id_checked and ids.numel():
                self.check_ids(_number(numbers, _largest(name), ids))
        return inputs

    def check_ids(self, largest: int) -> None:
        """Check that the teacher has an embedding for the largest id.

        Raises:
            DistillError: it has none.
        """
        if self.ids is not None and largest >= self.ids:
            if self.has_other_tokens:
                raise DistillError(
                    f"The teacher's rows have the token id {largest}, and its embedding has {self.ids} rows, for the "
                    f"ids 0 to {self.ids - 1}. Make them with the tokenizer of the teacher's model, or remove the rows "
                    "with tokens that were added to it."
                )
            raise DistillError(
                f"The data has the token id {largest}, and the teacher's embedding has {self.ids} rows, for the "
                f"ids 0 to {self.ids - 1}. Use a teacher with the student's tokenizer, resize the teacher's embeddings "
                "and train them, or remove the rows with added tokens."
            )

    def _needs_position_ids(self, inputs: Mapping[str, Any], ids: Tensor) -> bool:
        """Whether only the position ids tell if a batch is too long: its rows are, but they may be packed."""
        position_ids = inputs.get("position_ids")
        is_long = self.positions is not None and ids.shape[-1] > self.positions
        return is_long and isinstance(position_ids, Tensor) and position_ids.shape == ids.shape

    def _check_positions(self, inputs: Mapping[str, Any], ids: Tensor, numbers: Mapping[str, Sequence[int]]) -> None:
        longest = ids.shape[-1]
        if self._needs_position_ids(inputs, ids):
            longest = _number(numbers, _LARGEST_POSITION, inputs["position_ids"]) + 1
        if self.positions is not None and longest > self.positions:
            raise DistillError(
                f"A row of the data has {longest} tokens, and the teacher has {self.positions} positions: shorten the "
                "rows (max_length), or use a teacher with more positions."
            )


def _largest(name: str) -> str:
    return f"largest of {name}"


def _number(numbers: Mapping[str, Sequence[int]], name: str, values: Tensor) -> int:
    """Return a number that was read from the device, or read the maximum of some values now."""
    return numbers[name][0] if name in numbers else int(values.max())


def check_data(limits: InputLimits, rows: Any, name: str) -> None:
    """Check before training that the teacher has an embedding for every id of a data set.

    Args:
        limits: the teacher's limits.
        rows: a data set; a `datasets.Dataset` and a list of rows are checked, other kinds are not.
        name: name of the data set in the error.

    Raises:
        DistillError: an id is beyond the teacher's embedding.
    """
    if not limits.is_id_checked:
        return
    for largest in _largest_ids(rows, limits.has_other_tokens):
        try:
            limits.check_ids(largest)
        except DistillError as error:
            raise DistillError(f"{name}: {error}") from None


def check_ids(model: nn.Module, inputs: Mapping[str, Any], role: str = "student") -> None:
    """Check that a model has an embedding for every id of its batch.

    A multimodal model may replace some ids before it looks them up, so its ids are not checked.

    Args:
        model: the student or a teacher.
        inputs: the batch that it reads.
        role: "student" or "teacher".

    Raises:
        DistillError: an id is negative or beyond the model's embedding.
    """
    model = unwrap_model(model)
    rows, config = _embedding_rows(model), getattr(model, "config", None)
    if rows is None or config is None or _text_config(model) is not config:
        return
    prefix = TEACHER_PREFIX if role == "teacher" else ""
    for name in ("input_ids", "decoder_input_ids"):
        ids = inputs.get(name)
        if not isinstance(ids, Tensor) or not ids.numel() or ids.is_floating_point():
            continue
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= rows:
            raise DistillError(
                f"{prefix}{name} has the token id {smallest if smallest < 0 else largest}, and the {role}'s embedding "
                f"has {rows} rows, for the ids 0 to {rows - 1}. Tokenize the data with the {role}'s tokenizer, or call "
                "`model.resize_token_embeddings` after tokens were added."
            )


def _largest_ids(rows: Any, has_other_tokens: bool) -> Iterator[int]:
    """Yield the largest unmasked id that the teacher reads of each part of a data set."""
    columns = getattr(rows, "column_names", None) or (rows[0] if isinstance(rows, list) and rows else ())
    ids_name, mask_name = ("input_ids", "attention_mask")
    if TEACHER_IDS in columns:
        ids_name, mask_name = TEACHER_IDS, TEACHER_MASK
    elif has_other_tokens:
        return  # a collator makes its tokens
    if hasattr(rows, "column_names") and hasattr(rows, "data") and ids_name in (rows.column_names or ()):
        import pyarrow.compute as pc

        for batch in rows.with_format("arrow").iter(batch_size=1000):
            ids, is_unmasked = pc.list_flatten(batch[ids_name], recursive=True), None
            if mask_name in batch.column_names:
                is_unmasked = pc.equal(pc.list_flatten(batch[mask_name], recursive=True), 1)
            ids = ids if is_unmasked is None or len(is_unmasked) != len(ids) else ids.filter(is_unmasked)
            if len(ids) and (largest := pc.max(ids).as_py()) is not None:
                yield int(largest)
    elif isinstance(rows, list):
        for row in rows:
            ids, mask = row.get(ids_name), row.get(mask_name)
            if ids is None or len(ids) == 0:
                continue
            ids = torch.as_tensor(ids)
            yield int((ids if mask is None else ids.masked_fill(torch.as_tensor(mask) == 0, 0)).max())


def _text_config(model: Any) -> PretrainedConfig | None:
    """Return the config of the text model; None for a module without a config of transformers."""
    config = getattr(model, "config", None)
    return config.get_text_config() if isinstance(config, PretrainedConfig) else None


def _embedding_rows(model: Any) -> int | None:
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    weight = getattr(embedding, "weight", None)
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None and isinstance(weight, Tensor) and weight.dim() == 2 and not hasattr(weight, "ds_id"):
        rows = len(weight)
    return rows


def _positions(model: Any) -> int | None:
    """Return the rows of the learned position embedding without those reserved for padding; None: there is none."""
    config_positions = getattr(_text_config(model), "max_position_embeddings", None)
    if not isinstance(config_positions, int):
        return None
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or not ("pos" in last or last == "wpe") or "rel" in last:
            continue
        reserved = getattr(module, "offset", None)
        if reserved is None:
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
        if module.num_embeddings in (config_positions, config_positions + reserved):
            return module.num_embeddings - reserved
    return None
