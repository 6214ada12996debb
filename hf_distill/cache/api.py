"""`write_cache`: what a teacher says of the training data, written once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.logits import LazyLogits
from ..errors import DistillError, raise_if_any
from ..models.blocks import get_layer_stack
from ..models.forward import extract_signals
from ..models.model_call import accepted_inputs
from ..models.model_types import model_type_of, unwrap_model
from ..models.module_state import eval_mode
from .example_keys import other_inputs
from .fingerprints import template_fingerprint, tokenizer_fingerprint, weights_fingerprint
from .manifest import Kind, Manifest
from .serialization import DTYPES, check_kind
from .writer import CacheProgress, ShardPlan, TeacherFn, batch_of, plan_shards, taps_of, write_shards

KINDS = ("hidden", "sampled", "top_k")
_PACKAGES = ("torch", "transformers", "datasets", "pyarrow", "hf-distill")


@dataclass(frozen=True)
class CacheOptions:
    """What is stored of a teacher.

    kind:        hidden: its last hidden states and, once, its output head: every divergence, at every temperature
                 sampled: draws from its distribution (random sampling KD, 2503.16870): forward KL without bias
                 top_k: log-probabilities of its k likeliest ids, and the mass of the rest
    temperature: of sampled and top_k; a run that reads the cache must have the same
    samples_per_token:    of sampled, of each token
    proposal_temperature: of sampled: temperature of the distribution that is drawn from, with weights p / q;
                 None: `temperature`
    k:           of top_k
    dtype:       of hidden states
    layers:      of hidden: blocks of the teacher whose outputs are stored too, for losses on hidden states
    seed:        of the draws, which depend on it and on the example alone

    Raises:
        DistillError: values out of range; all of them at once.
    """

    kind: Kind = "hidden"
    temperature: float = 2.0
    samples_per_token: int = 12
    proposal_temperature: float | None = None
    k: int = 64
    dtype: str = "bfloat16"
    layers: Sequence[int] = ()
    seed: int = 0

    def __post_init__(self):
        problems = []
        if self.kind not in KINDS:
            problems.append(f"kind is {self.kind!r}; known: {', '.join(KINDS)}")
        for name, value in (
            ("temperature", self.temperature),
            ("proposal_temperature", self.proposal_temperature or 1.0),
        ):
            if not 0 < value < float("inf"):
                problems.append(f"{name} is {value}; it must be a positive number")
        for name, value in (("samples_per_token", self.samples_per_token), ("k", self.k)):
            if not isinstance(value, int) or not 1 <= value < 1 << 16:
                problems.append(f"{name} is {value!r}; it must be a whole number from 1 to 65535")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 63:
            problems.append(f"seed is {self.seed!r}; it must be a whole number, 0 or more")
        if self.dtype not in DTYPES:
            problems.append(f"dtype is {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.layers and self.kind != "hidden":
            problems.append(f"a cache of kind {self.kind} has no hidden states: leave layers out, or write kind hidden")
        raise_if_any(problems)

    def of_kind(self) -> dict[str, Any]:
        """For the manifest."""
        found: dict[str, dict[str, Any]] = {
            "hidden": {"dtype": self.dtype, "layers": list(self.layers)},
            "sampled": {
                "samples_per_token": self.samples_per_token,
                "proposal_temperature": self.proposal_temperature or self.temperature,
                "seed": self.seed,
            },
            "top_k": {"k": self.k},
        }
        return found[self.kind]


def write_cache(
    folder: str | Path,
    teacher: Any,
    *rows: Any,
    collator: Callable[[list], dict],
    processing_class: Any = None,
    batch_size: int = 8,
    shard_rows: int = 256,
    device: torch.device | str | None = None,
    teacher_name: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    on_progress: Callable[[CacheProgress], None] = lambda progress: None,
    **options,
) -> Manifest:
    """Write what a teacher says of the asked tokens of some rows; a capture that was cut off goes on.

    Args:
        folder: new or empty, or of the same capture.
        teacher: a model, or a prepared `Teacher` that does not move.
        rows: data sets of rows as the trainer gets them, such as those of training and of evaluation.
        collator: the trainer's.
        processing_class: the tokenizer, so that a run with another one is refused.
        batch_size: rows of a batch.
        shard_rows: rows of a shard: what is lost at most where a capture is cut off.
        device: of the batches; None: the teacher's.
        teacher_name: how the teacher is called: {"model", "revision"}; None: its name_or_path.
        recipe: from which this is written, to be kept in the manifest.
        on_progress: told after each shard.
        options: see `CacheOptions`.

    Returns:
        the manifest of the whole cache.

    Raises:
        DistillError: a value out of range, a teacher that cannot be captured in this kind, a folder that holds
            something else, a disk that is full.
    """
    wanted, sizes = CacheOptions(**options), {"batch_size": batch_size, "shard_rows": shard_rows}
    raise_if_any([f"{name} is {value!r}; it must be 1 or more" for name, value in sizes.items() if value < 1])
    model = teacher if isinstance(teacher, nn.Module) else teacher.model
    shift = model_type_of(model).shifts_labels
    device = torch.device(device or next(model.parameters()).device)
    teacher_fn: TeacherFn = _make_teacher_fn(teacher) if isinstance(teacher, nn.Module) else teacher
    planned, data = plan_shards(rows, _read_by(model, collator), batch_size, shard_rows, shift)
    manifest = Manifest(
        kind=wanted.kind,
        options=wanted.of_kind(),
        temperature=None if wanted.kind == "hidden" else wanted.temperature,
        teacher=_described(teacher_name, model),
        tokenizer=tokenizer_fingerprint(processing_class),
        chat_template=template_fingerprint(processing_class),
        data=data
        | sizes
        | _inputs_beside_ids(planned)
        | {"max_length": (recipe or {}).get("data", {}).get("max_length")},
        versions={name: version(name) for name in _PACKAGES},
        recipe=recipe,
        depth=depth_of(model),
        **_probe_teacher(teacher_fn, planned, wanted.kind, device, shift, wanted.layers),
    )
    return write_shards(teacher_fn, planned, manifest, Path(folder), device, shift, on_progress)


def _read_by(model: nn.Module, collator: Callable[[list], dict]) -> Callable[[list], dict]:
    return lambda rows: accepted_inputs(model, collator(rows))


def _described(teacher_name: dict[str, Any] | None, model: nn.Module) -> dict[str, Any]:
    known = teacher_name or {"model": unwrap_model(model).name_or_path}
    return known | {"class": type(unwrap_model(model)).__name__, "weights": weights_fingerprint(model)}


def _inputs_beside_ids(rows: ShardPlan) -> dict[str, Any]:
    inputs = other_inputs(rows.batch(0))
    return {"inputs": inputs} if inputs else {}


def depth_of(model: nn.Module) -> int:
    """The number of a model's blocks; 0 where they cannot be found."""
    try:
        return len(get_layer_stack(model).blocks)
    except DistillError:
        return 0


def _make_teacher_fn(model: nn.Module) -> TeacherFn:
    def teacher_fn(inputs, targets, wanted):
        with eval_mode(model):
            return extract_signals(model, inputs, targets, wanted)

    return teacher_fn


def _probe_teacher(
    teacher_fn: TeacherFn, rows: ShardPlan, kind: str, device: torch.device, shift: bool, layers: Sequence[int]
) -> dict[str, Any]:
    """What the teacher's first answer tells of it."""
    batch, targets = batch_of(rows, 0, device, shift)
    told = teacher_fn(batch, targets, taps_of(layers, batch, targets, shift))
    check_kind(kind, told)
    source: Any = told.logits
    head = source if isinstance(source, LazyLogits) else None
    return {
        "vocab_size": source.vocab_size,
        "width": None if head is None else head.hidden.shape[-1],
        "scaling": {"scale": 1.0, "softcap": None}
        if head is None
        else {"scale": head.scaling.scale, "softcap": head.scaling.softcap},
    }
