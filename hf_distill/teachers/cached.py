"""A teacher on disk."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ..cache import batch_examples, open_cache
from ..cache.api import depth_of
from ..cache.example_keys import Example, other_inputs
from ..cache.files import check_files
from ..cache.fingerprints import template_fingerprint, tokenizer_fingerprint, weights_fingerprint
from ..cache.manifest import HEAD
from ..cache.reader import CachedExample
from ..cache.serialization import decode_signals, encode_signals
from ..core.logits import LogitScaling
from ..core.signals import FeatureKey, Signals
from ..core.targets import Targets
from ..errors import DistillError, raise_if_any
from ..layers import LEARNED, map_layers
from ..losses.objective import Term
from ..models.blocks import LayerStack
from ..models.model_types import model_type_of, unwrap_model
from .base import Teacher


class CachedTeacher(Teacher):
    """What a teacher said of the data, read from a cache in the place of its forward.

    hidden:  equals the teacher up to the rounding of stored hidden states; every loss on logits, at every temperature
    sampled: forward KL without bias, at the temperature of the cache
    top_k:   losses on logits over the stored ids and the mass of the rest, at the temperature of the cache

    Args:
        path: folder of a cache, or hf://datasets/org/name[@revision].
        source: the teacher that wrote it, a `Teacher` or what `FrozenTeacher` takes;
            called with `on_miss="query_teacher"`.
        on_miss: what happens to examples that the cache lacks: "error" raises an error, "query_teacher" asks the
            source, whose answer is rounded, drawn or cut as the cache's are.

    Raises:
        DistillError: no whole cache, or a on_miss without a source.
    """

    kind = "cached"

    def __init__(self, path: str, *, source: Teacher | None = None, on_miss: str = "error"):
        if on_miss not in ("error", "query_teacher"):
            raise DistillError(f"on_miss is {on_miss!r}; it must be error or query_teacher")
        if on_miss == "query_teacher" and source is None:
            raise DistillError("on_miss: query_teacher asks the teacher that wrote the cache: give it as `source`")
        self.path, self.store = path, open_cache(path)
        self.source = source if on_miss == "query_teacher" else None
        self._missing = 0

    @property
    def manifest(self):
        """Of the cache."""
        return self.store.manifest

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Check that the cache is of the student's tokenizer, and of its source.

        Raises:
            DistillError: all that differs.
        """
        manifest, problems = self.manifest, list[str]()
        self._ids, self._depth = model_type_of(student).num_outputs(unwrap_model(student)), depth_of(student)
        for name, there, here in (
            ("tokenizer", manifest.tokenizer, tokenizer_fingerprint(processing_class)),
            ("chat template", manifest.chat_template, template_fingerprint(processing_class)),
        ):
            if manifest.tokenizer is not None and processing_class is not None and there != here:
                problems.append(f"the cache {self.path} was written with another {name} than the student's")
        if self.source is not None:
            self.source.prepare(student, device, processing_class)
            self.model = self.source.model
            own = type(unwrap_model(self.model)).__name__
            if own != manifest.teacher["class"]:
                problems.append(f"{self.path} was written by a {manifest.teacher['class']}, and its source is a {own}")
            elif weights_fingerprint(unwrap_model(self.model)) != manifest.teacher["weights"]:
                problems.append(f"{self.path} was written by a {own} with other weights (or dtype) than its source's")
        raise_if_any(problems)
        self._head: dict[str, Any] = {}
        if manifest.head is not None:
            check_files(self.store.folder, manifest.head)
            tensors = load_file(self.store.folder / HEAD)
            self._head = {name: tensors[name].to(device) for name in tensors} | {
                "scaling": LogitScaling(**manifest.scaling)
            }

    def adapt_objective(self, terms: Sequence[Term]) -> list[Term]:
        """Refuse what the cache cannot tell.

        Raises:
            DistillError: a temperature, divergence or feature that it lacks; all of it at once.
        """
        manifest, problems = self.manifest, []
        for term in terms:
            if not term.loss.needs:
                continue
            if term.loss.feature:
                problems += self._missing_layers(term)
            elif manifest.temperature is not None:
                if manifest.kind == "sampled" and term.loss.name != "forward_kl":
                    problems.append(f"{term.name} is {term.loss.name}, and a sampled cache tells forward_kl alone")
                asked = term.options.get("temperature", 1.0)
                if asked != manifest.temperature:
                    problems.append(
                        f"{term.name} has temperature {asked:g}, and the cache was written at "
                        f"{manifest.temperature:g}: set that, or write a cache of kind hidden, which has all"
                    )
        raise_if_any([f"{self.path}: {problem}" for problem in problems])
        return super().adapt_objective(terms)

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, Targets]) -> Signals:
        """Read what the teacher said of a batch.

        Raises:
            DistillError: examples or layers that the cache lacks; a shard that is damaged.
        """
        examples = batch_examples(self._read(inputs), targets)
        found = self._lookup_or_query(inputs, targets, examples)
        told = decode_signals(found, self.manifest, self._head, targets.labels.device, self._ids)
        return Signals(told.logits, {key: told.features[FeatureKey("hidden", key.layer)] for key in feature_requests})

    def input_names(self) -> frozenset[str]:
        """What the teacher that wrote the cache read besides token ids."""
        return super().input_names() | frozenset(self.manifest.data.get("inputs", ()))

    def _read(self, inputs: dict) -> dict:
        """A batch as the teacher that wrote the cache read it.

        Raises:
            DistillError: it read an input that the batch lacks.
        """
        read = self.manifest.data.get("inputs", ())
        if missing := [name for name in read if name not in inputs]:
            raise DistillError(
                f"The teacher that wrote {self.path} read {', '.join(missing)}, and the batch has only "
                f"{', '.join(sorted(inputs))}: keep these columns in the data."
            )
        foreign = {*other_inputs(inputs)} - {*read}
        return {name: value for name, value in inputs.items() if name not in foreign}

    def _missing_layers(self, term: Term) -> list[str]:
        layers, depth = self.manifest.options.get("layers", []), self.manifest.depth
        if term.loss.feature != "hidden":
            return [f"{term.name} needs {term.loss.feature} of attention, which no cache holds: use a frozen teacher"]
        wanted = {t for _, t in map_layers(term.layers, self._depth, depth)}
        wanted = {*range(depth)} if term.layers == LEARNED else wanted
        if lacking := sorted(wanted - {*layers}):
            return [
                f"{term.name} needs hidden states of the layers {lacking}, and the cache has "
                f"{layers or 'none but those before the head'}: write it again with this recipe, or name other layers"
            ]
        return []

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """The teacher's blocks, by number alone."""
        blocks = nn.ModuleList(nn.Identity() for _ in range(self.manifest.depth))
        return LayerStack(which, blocks, int(self.manifest.width or 0), causal=True, attention="none")

    def contains(self, inputs: dict, shift: bool) -> bool:
        """Whether all examples of a batch are there; `shift` as of `target_labels`."""
        found = self.store.get([e.key for e in batch_examples(self._read(inputs), Targets.from_batch(inputs, shift))])
        return None not in found

    def _lookup_or_query(self, inputs: dict, targets: Targets, examples: list[Example]) -> list[CachedExample]:
        """What there is of all examples, the missing ones asked of the source."""
        found = self.store.get([example.key for example in examples])
        if None not in found:
            return [stored for stored in found if stored is not None]
        missing = [i for i, stored in enumerate(found) if stored is None]
        self._missing += len(missing)
        if self.source is None:
            example = examples[missing[0]]
            text = targets.labels[example.asked][:12].tolist()
            raise DistillError(
                f"{len(missing)} of {len(examples)} examples of a batch are not in {self.path}, which has "
                f"{self.manifest.data['examples']} examples (the first that is missing has the labels {text}). It was "
                "written for other text, max_length, chat template or labels: write it again with this recipe, or set "
                "on_miss: query_teacher with a source."
            )
        feature_keys = {FeatureKey("hidden", layer): targets for layer in self.manifest.options.get("layers", ())}
        own = encode_signals(self.source(inputs, targets, feature_keys), examples, self.manifest)
        return [own[i] if stored is None else stored for i, stored in enumerate(found)]

    def metrics(self) -> dict[str, float]:
        """`cache_missing`: examples that were asked of the source since training began, where it may be asked."""
        return {} if self.source is None else {"cache_missing": float(self._missing)}
