"""`write_cache`: writes the teacher signals of the training data to a cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..core.defaults import CACHE_DTYPE, CACHE_KIND, CACHE_SEED, SAMPLES_PER_TOKEN, SHARD_ROWS, TEMPERATURE, TOP_K_IDS
from ..core.json_types import JSONObject
from ..core.logits import DenseLogits, LazyLogits, SparseLogProbs
from ..core.results import ServerFacts
from ..core.server_urls import without_servers
from ..core.signals import FeatureKey, Signals
from ..core.targets import FeatureTokens, Targets
from ..core.teacher_inputs import teacher_inputs
from ..errors import DistillError, raise_if_any
from ..models.blocks import get_layer_stack
from ..models.forward import extract_signals
from ..models.image_inputs import image_inputs
from ..models.model_call import accepted_inputs, readable_inputs
from ..models.model_types import model_type_of, unwrap_model
from ..models.module_state import eval_mode
from .example_keys import other_inputs
from .fingerprints import template_fingerprint, tokenizer_fingerprint, weights_fingerprint
from .manifest import DataCounts, DataRecord, Kind, KindOptions, Manifest, ScalingRecord, TeacherRecord
from .serialization import DTYPES, check_kind
from .unfinished import remove_other
from .writer import CacheProgress, Rows, ShardPlan, TeacherFn, load_batch, plan_shards, request_layers, write_shards

KINDS = ("hidden", "sampled", "top_k")
PACKAGES = ("torch", "transformers", "datasets", "pyarrow", "hf-distill")


class TeacherName(TypedDict):
    """Name of a teacher in the manifest: the id or path of the model, its revision and its quantization."""

    model: str | None
    revision: NotRequired[str | None]
    quantization: NotRequired[str | None]


@dataclass(frozen=True)
class ServedTeacher:
    """The record in a manifest of a teacher on a server, of which this process has no model.

    vocab_size: V
    facts:      what the server answered
    depth:      number of layers whose outputs the server returns; 0 if it returns none
    """

    vocab_size: int
    facts: ServerFacts
    depth: int = 0


class CacheTeacher(Protocol):
    """A prepared frozen or remote `Teacher`."""

    model: nn.Module | None

    def __call__(
        self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens], /
    ) -> Signals:
        """Return the teacher signals of a batch."""


class _TeacherOutput(TypedDict):
    vocab_size: int
    width: int | None
    scaling: ScalingRecord


@dataclass(frozen=True)
class CacheOptions:
    """Options of a teacher cache.

    kind:        hidden: the last hidden states and, once, the output head; supports every divergence and temperature
                 sampled: samples of the distribution (random sampling KD, 2503.16870); supports unbiased forward KL
                 top_k: log-probabilities of the k most likely ids, and the mass of the other ids
    temperature: T of kinds sampled and top_k; a run that reads the cache must use the same T
    samples_per_token:    kind sampled: number of samples per token, 1 to 65535
    proposal_temperature: kind sampled: T of the teacher distribution that is sampled, with importance weights
                 q / q_proposal; None: `temperature`
    k:           kind top_k: number of ids per token, 1 to 65535
    labels:      kind top_k: also store the log-probability of each label, which `alm` needs
    dtype:       kind hidden: dtype of the stored hidden states
    layers:      kind hidden: further layers of the teacher whose outputs are stored, for losses on hidden states
    seed:        kind sampled: seed of the samples, which depend on the seed and the example only

    Raises:
        DistillError: values are out of range; the message lists all of them.
    """

    kind: Kind = CACHE_KIND
    temperature: float = TEMPERATURE
    samples_per_token: int = SAMPLES_PER_TOKEN
    proposal_temperature: float | None = None
    k: int = TOP_K_IDS
    labels: bool = False
    dtype: str = CACHE_DTYPE
    layers: Sequence[int] = ()
    seed: int = CACHE_SEED

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in KINDS:
            problems.append(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        for name, value in (
            ("temperature", self.temperature),
            ("proposal_temperature", self.proposal_temperature or 1.0),
        ):
            if not 0 < value < float("inf"):
                problems.append(f"{name} is {value}; it must be a positive number")
        for name, value in (("samples_per_token", self.samples_per_token), ("k", self.k)):
            if not isinstance(value, int) or not 1 <= value < 1 << 16:
                problems.append(f"{name} is {value!r}; it must be an integer from 1 to 65535")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 63:
            problems.append(f"seed is {self.seed!r}; it must be an integer of 0 or more")
        if self.dtype not in DTYPES:
            problems.append(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.layers and self.kind != "hidden":
            problems.append(f"a cache of kind {self.kind} stores no hidden states: remove layers, or use kind hidden")
        if self.labels and self.kind != "top_k":
            problems.append(
                f"a cache of kind {self.kind} does not store the log-probabilities of labels: remove labels"
            )
        raise_if_any(problems)

    def kind_options(self) -> KindOptions:
        """Return the options of this kind, as the manifest stores them."""
        by_kind: dict[str, KindOptions] = {
            "hidden": {"dtype": self.dtype, "layers": list(self.layers)},
            "sampled": {
                "samples_per_token": self.samples_per_token,
                "proposal_temperature": self.proposal_temperature or self.temperature,
                "seed": self.seed,
            },
            "top_k": {"k": self.k, "labels": True} if self.labels else {"k": self.k},
        }
        return by_kind[self.kind]


def write_cache(
    folder: str | Path,
    teacher: nn.Module | CacheTeacher,
    *rows: Rows,
    collator: Callable[[list], dict],
    processing_class: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    shard_rows: int = SHARD_ROWS,
    device: torch.device | str | None = None,
    teacher_name: TeacherName | None = None,
    recipe: JSONObject | None = None,
    served: ServedTeacher | None = None,
    context_length: int | None = None,
    replaces_other: bool = False,
    on_progress: Callable[[CacheProgress], None] = lambda progress: None,
    **options: Any,
) -> Manifest:
    """Write the teacher signals of the target tokens of some rows; an interrupted write is resumed.

    Args:
        folder: a new or empty folder, or the folder of an interrupted write of the same cache.
        teacher: a model, or a prepared frozen or remote `Teacher`.
        rows: data sets of tokenized rows, as the trainer gets them, such as the training and the evaluation rows.
        collator: the collator of the trainer.
        processing_class: the tokenizer; a run with another tokenizer is then refused.
        batch_size: rows per batch.
        shard_rows: rows per shard; an interruption loses at most one shard per process.
        device: device of the batches; None: the device of the teacher.
        teacher_name: {"model", "revision"} of the teacher for the manifest; None: its name_or_path.
        recipe: the recipe of this cache, for the manifest, which leaves out the URLs of servers.
        served: facts of a remote teacher; None for other teachers.
        context_length: of a teacher with another tokenizer, the number of tokens at which its rows were cut.
        replaces_other: whether another cache in the folder is removed; otherwise it is an error.
        on_progress: called after each shard.
        options: see `CacheOptions`.

    Returns:
        the manifest of the complete cache.

    Raises:
        DistillError: a value is out of range, the teacher does not support this kind, the folder holds other files or
            another cache, or the disk is full.
    """
    cache_options, sizes = CacheOptions(**options), {"batch_size": batch_size, "shard_rows": shard_rows}
    raise_if_any([f"{name} is {value!r}; it must be 1 or more" for name, value in sizes.items() if value < 1])
    model = teacher if isinstance(teacher, nn.Module) else teacher.model
    assert (model is None) != (served is None), "a prepared teacher has a model, or is on a server"
    if model is not None and not (model_type := model_type_of(model)).has_fixed_classes:
        raise DistillError(
            f"The teacher is {model_type.with_article}, and a cache stores distributions over ids or classes only: "
            "pass the model itself as the teacher."
        )
    shift = model is None or model_type_of(model).shifts_labels
    device = torch.device(device or ("cpu" if model is None else next(model.parameters()).device))
    teacher_fn: TeacherFn = _make_teacher_fn(teacher) if isinstance(teacher, nn.Module) else teacher
    collate = _collate_accepted_inputs(model, collator)
    plan, counts = plan_shards(rows, collate, batch_size, shard_rows, shift)
    manifest = Manifest(
        kind=cache_options.kind,
        options=cache_options.kind_options(),
        temperature=None if cache_options.kind == "hidden" else cache_options.temperature,
        teacher=_describe_teacher(teacher_name, model, served),
        tokenizer=tokenizer_fingerprint(processing_class),
        chat_template=template_fingerprint(processing_class),
        data=_describe_data(counts, plan, batch_size, shard_rows, recipe, context_length),
        versions={name: version(name) for name in PACKAGES},
        recipe=None if recipe is None else without_servers(recipe),
        depth=served.depth if served else count_blocks(cast(nn.Module, model)),
        **_probe_teacher(teacher_fn, plan, cache_options, device, shift, served),
    )
    if replaces_other:
        remove_other(Path(folder), manifest)
    return write_shards(teacher_fn, plan, manifest, Path(folder), device, shift, on_progress)


def _collate_accepted_inputs(model: nn.Module | None, collator: Callable[[list], dict]) -> Callable[[list], dict]:
    """Return a collator whose batches have the inputs that a local model accepts; a server reads the tokens."""

    def collate(rows: list) -> dict:
        batch = collator(rows)
        if model is not None:
            batch = teacher_inputs(batch, readable_inputs(model))
        if (model is None or model_type_of(model).is_decoder) and (names := image_inputs(batch)):
            raise DistillError(
                f"The batch has images ({', '.join(names)}), and a cache of a language model finds an example by its "
                "tokens, which are the same for every image: train with the teacher itself, or cache rows without "
                "images."
            )
        return batch if model is None else accepted_inputs(model, batch)

    return collate


def _describe_teacher(
    teacher_name: TeacherName | None, model: nn.Module | None, served: ServedTeacher | None
) -> TeacherRecord:
    if model is None:
        assert served is not None
        name = {"model": served.facts["model"]} if teacher_name is None else teacher_name
        return {**name, "class": "unknown", "weights": served.facts.get("weights", "unknown"), "served": served.facts}
    inner = unwrap_model(model)
    name = {"model": inner.name_or_path} if teacher_name is None else teacher_name
    return {**name, "class": type(inner).__name__, "weights": weights_fingerprint(model)}


def _describe_data(
    counts: DataCounts,
    plan: ShardPlan,
    batch_size: int,
    shard_rows: int,
    recipe: JSONObject | None,
    context_length: int | None,
) -> DataRecord:
    section = (recipe or {}).get("data")
    max_length = cast(int | None, section.get("max_length")) if isinstance(section, dict) else None
    record: DataRecord = {**counts, "batch_size": batch_size, "shard_rows": shard_rows, "max_length": max_length}
    if inputs := other_inputs(plan.batch(0)):
        record["inputs"] = inputs
    if context_length is not None:
        record["context_length"] = context_length
    return record


def count_blocks(model: nn.Module) -> int:
    """Return the number of layers of a model, or 0 if they cannot be identified."""
    try:
        return len(get_layer_stack(model).blocks)
    except DistillError:
        return 0


def _make_teacher_fn(model: nn.Module) -> TeacherFn:
    def teacher_fn(inputs: dict, targets: Targets, features: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        with eval_mode(model):
            return extract_signals(model, inputs, targets, features)

    return teacher_fn


def _probe_teacher(
    teacher_fn: TeacherFn,
    plan: ShardPlan,
    options: CacheOptions,
    device: torch.device,
    shift: bool,
    served: ServedTeacher | None,
) -> _TeacherOutput:
    """Return vocabulary size, hidden size and logit scaling of the teacher, measured on the first batch."""
    batch, targets = load_batch(plan, 0, device, shift)
    teacher_signals = teacher_fn(batch, targets, request_layers(options.layers, batch, targets, shift))
    check_kind(options.kind, teacher_signals)
    source = teacher_signals.logits
    if isinstance(source, SparseLogProbs):
        vocab_size = source.vocab_size if served is None else served.vocab_size
        assert vocab_size is not None, "log-probabilities of a teacher that is no server know its vocabulary"
        return {"vocab_size": vocab_size, "width": None, "scaling": {"scale": 1.0, "softcap": None}}
    assert isinstance(source, LazyLogits | DenseLogits)
    head = source if isinstance(source, LazyLogits) else None
    widths = {feature.shape[-1] for feature in teacher_signals.features.values()}
    if head is not None and widths - {head.hidden.shape[-1]}:
        raise DistillError(
            f"The outputs of the teacher's layers have width {widths.pop()}, its last hidden states have width "
            f"{head.hidden.shape[-1]}, and a cache stores hidden states of one width: remove the losses on hidden "
            "states, or train with the teacher itself."
        )
    return {
        "vocab_size": source.vocab_size,
        "width": None if head is None else head.hidden.shape[-1],
        "scaling": {"scale": 1.0, "softcap": None}
        if head is None
        else {"scale": head.scaling.scale, "softcap": head.scaling.softcap},
    }
