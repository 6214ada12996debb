"""A teacher whose signals are read from a teacher cache (offline distillation)."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..cache import batch_examples, open_cache
from ..cache.api import count_blocks
from ..cache.example_keys import Example, batch_checksum, other_inputs
from ..cache.fingerprints import template_fingerprint, tokenizer_fingerprint, weights_fingerprint
from ..cache.manifest import HEAD, Manifest
from ..cache.reader import CachedExample
from ..cache.serialization import decode_signals, encode_signals
from ..core.files import check_files
from ..core.logits import LogitScaling
from ..core.loss_kinds import CHUNK_LOG_PROBS
from ..core.signals import FeatureKey, Signals
from ..core.targets import FeatureTokens, Targets
from ..core.teacher_inputs import teacher_inputs
from ..errors import DistillError, raise_if_any
from ..layers import LEARNED, map_layers
from ..losses.objective import Term
from ..models.blocks import LayerStack
from ..models.model_types import model_type_of, unwrap_model
from ..models.pruned_origin import origin_of
from .base import OtherTokens, Teacher
from .compatibility import tokens_remedy

Lookup: TypeAlias = tuple[list[Example], list[CachedExample | None]]
_CHECKSUM = "cached_batch"


class CachedTeacher(Teacher):
    """Reads the teacher's signals from a teacher cache instead of running the teacher.

    What a cache supports depends on its kind:

    hidden:  hidden states and the output head: every loss on logits, at every temperature, up to the rounding of the
             stored hidden states
    sampled: sampled ids: an unbiased estimate of forward KL, at the temperature of the cache
    top_k:   the k most probable ids and the probability of all others: losses on logits, at the temperature of the
             cache

    Args:
        path: folder of a cache, or hf://datasets/org/name[@revision].
        source: the teacher that wrote the cache; it is used with `on_miss="query_teacher"`.
        on_miss: what happens when the cache lacks an example: "error" raises an error, "query_teacher" runs the source,
            whose signals are rounded, sampled or truncated as those of the cache are.

    Raises:
        DistillError: there is no complete cache at `path`, or `on_miss` needs a source and there is none.
    """

    kind = "cached"
    any_output_type = False
    reads_text_only = True
    prefetch = 1

    def __init__(self, path: str, *, source: Teacher | None = None, on_miss: str = "error"):
        if on_miss not in ("error", "query_teacher"):
            raise DistillError(f"on_miss is {on_miss!r}; it must be 'error' or 'query_teacher'")
        if on_miss == "query_teacher" and source is None:
            raise DistillError(
                "on_miss='query_teacher' runs the teacher that wrote the cache: pass that teacher as `source`"
            )
        self.path, self.store = path, open_cache(path)
        self.has_full_logits = self.manifest.kind == "hidden"
        self.context_length = self.manifest.data.get("context_length")
        self.source = source if on_miss == "query_teacher" else None
        self._missing = 0
        self._threads: ThreadPoolExecutor | None = None  # one thread, created for the first batch that is announced
        self._started: dict[tuple[int, ...], Future[Lookup]] = {}  # checksum of a batch -> its look-up

    @property
    def manifest(self) -> Manifest:
        """The manifest of the cache."""
        return self.store.manifest

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Check that the cache was written with the student's tokenizer, and by the source.

        Raises:
            DistillError: a tokenizer, chat template or teacher differs; the message lists all of them.
        """
        manifest, problems = self.manifest, list[str]()
        self._student_origin = origin_of(student)
        self._vocab_size, self._student_depth = (
            model_type_of(student).vocabulary_size(unwrap_model(student), "A teacher cache"),
            count_blocks(student),
        )
        for name, of_cache, of_student in (
            ("tokenizer", manifest.tokenizer, tokenizer_fingerprint(processing_class)),
            ("chat template", manifest.chat_template, template_fingerprint(processing_class)),
        ):
            if manifest.tokenizer is None or processing_class is None or of_cache == of_student:
                continue
            if model_type_of(student).vocabulary:
                problems.append(
                    f"the cache {self.path} was written with another {name} than the student's: "
                    "write the cache again with the student's tokenizer"
                )
            else:
                reason = f"The cache {self.path} was written with another tokenizer than the student's."
                self.other_tokens = OtherTokens(f"{reason} {tokens_remedy(model_type_of(student))}", of_cache)
        if self.source is not None:
            self.source.prepare(student, device, processing_class)
            self.model = self.source.model
            problems += self._source_problems(unwrap_model(self.model))
        raise_if_any(problems)
        self._head: Any = {}  # OutputHeadTensors, if the cache has an output head
        if manifest.head is not None:
            check_files(self.store.folder, manifest.head)
            tensors = load_file(self.store.folder / HEAD)
            self._head = {name: tensors[name].to(device) for name in tensors} | {
                "scaling": LogitScaling(**manifest.scaling)
            }

    def _source_problems(self, source: nn.Module) -> list[str]:
        """Return the reason why the source may not be the teacher that wrote the cache, if there is one."""
        writer, source_class = self.manifest.teacher, type(source).__name__
        if "imported" in writer or "served" in writer:
            origin = "imported" if "imported" in writer else "written from a server"
            return [
                f"{self.path} was {origin}, so it is not known whether its source is the teacher that wrote it: "
                "remove on_miss"
            ]
        if source_class != writer["class"]:
            return [
                f"{self.path} was written by a {writer['class']}, and its source is a {source_class}: pass the teacher "
                "that wrote the cache as source"
            ]
        if weights_fingerprint(source) != writer["weights"]:
            return [
                f"{self.path} was written by a {source_class} with other weights (or dtype) than its source's: pass "
                "the teacher that wrote the cache as source"
            ]
        return []

    def keep_all_ids(self) -> None:
        """Also return the log-probabilities of ids that the student does not have: its tokenizer is another one."""
        self._vocab_size = self.manifest.vocab_size

    def keep_ids(self, ids: Tensor) -> None:
        """Return the logits of some ids only, which a cache of kind hidden can do.

        Args:
            ids: [V'] the ids.
        """
        tensors = {
            name: self._head[name][ids.to(self._head[name].device)] for name in ("weight", "bias") if name in self._head
        }
        self._head = {**self._head, **tensors}

    def incompatible_terms(self, terms: Sequence[Term], name: str | None) -> list[str]:
        """Return the temperatures, divergences and features of terms of this teacher that the cache does not hold."""
        manifest, problems = self.manifest, []
        for term in terms:
            if not term.loss.compares or term.teacher != name:
                continue
            if term.loss.feature:
                problems += self._missing_layers(term)
            elif manifest.temperature is not None:
                if term.loss.compares_chunks:
                    problems += self._missing_labels(term)
                elif manifest.kind == "sampled" and term.loss.name != "forward_kl":
                    problems.append(
                        f"{term.name} is {term.loss.name}, and a sampled cache supports forward_kl only: use "
                        "forward_kl, or write a cache of kind hidden"
                    )
                temperature = term.options.get("temperature", 1.0)
                if temperature != manifest.temperature:
                    problems.append(
                        f"{term.name} has temperature {temperature:g}, and the cache was written at "
                        f"{manifest.temperature:g}: set that temperature, or write a cache of kind hidden, which "
                        "supports every temperature"
                    )
        return [f"{self.path}: {problem}" for problem in problems]

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Read the teacher's signals for a batch.

        Raises:
            DistillError: the cache lacks examples or layers, or a shard is damaged.
        """
        started = self._started.pop(tuple(targets.numbers.get(_CHECKSUM, ())), None)
        examples, entries = self._look_up(inputs, targets) if started is None else started.result()
        cached = self._complete(inputs, targets, examples, entries)
        signals = decode_signals(cached, self.manifest, self._head, targets.labels.device, self._vocab_size)
        return Signals(
            signals.logits, {key: signals.features[FeatureKey("hidden", key.layer)] for key in feature_requests}
        )

    def numbers_to_read(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return a checksum of the batch, by which `forward` recognizes a batch whose look-up was started."""
        return self.numbers_of_any_rows(inputs, shift)

    def numbers_of_any_rows(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return the checksum of the whole batch."""
        return {_CHECKSUM: batch_checksum(inputs)}

    def start_batch(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> None:
        """Look up the examples of a batch in a thread, unless the cached teacher read further inputs."""
        if self.manifest.data.get("inputs"):
            return
        self._threads = self._threads or ThreadPoolExecutor(1, thread_name_prefix="teacher-cache")
        checksum = tuple(targets.numbers[_CHECKSUM])
        self._started[checksum] = self._threads.submit(self._look_up, inputs, targets)

    def on_train_begin(self, step: int) -> None:
        """Forget the batches of an earlier training."""
        self._started.clear()

    def close(self) -> None:
        """Forget the batches that were announced."""
        self._started.clear()

    def _look_up(self, inputs: dict, targets: Targets) -> Lookup:
        """Return the examples of a batch and what the cache has of them, read into memory."""
        examples = batch_examples(self._read(inputs), targets)
        entries = self.store.get([example.key for example in examples])
        return examples, [None if entry is None else entry.in_memory() for entry in entries]

    def input_names(self) -> frozenset[str]:
        """Names of the inputs, besides token ids, that the cached teacher read, and of those that the source reads."""
        return super().input_names() | frozenset(self.manifest.data.get("inputs", ()))

    def readable_inputs(self) -> frozenset[str] | None:
        """Names of the inputs that the cached teacher read, and of those that the source reads."""
        names = frozenset(("input_ids", "attention_mask", "position_ids")) | self.input_names()
        return names if self.source is None or self.source.readable_inputs() is not None else None

    def _read(self, inputs: dict) -> dict:
        """Return the inputs that the teacher that wrote the cache read.

        Raises:
            DistillError: the batch lacks one of them.
        """
        cached_inputs = self.manifest.data.get("inputs", ())
        if missing := [name for name in cached_inputs if name not in inputs]:
            raise DistillError(
                f"The teacher that wrote {self.path} read {', '.join(missing)}, and the batch has only "
                f"{', '.join(sorted(inputs))}: keep these columns in the data."
            )
        foreign = {*other_inputs(inputs)} - {*cached_inputs}
        return {name: value for name, value in inputs.items() if name not in foreign}

    def _missing_labels(self, term: Term) -> list[str]:
        """Return the reason why the cache cannot serve a loss for a teacher with another tokenizer, if there is one."""
        if self.manifest.kind == "sampled":
            return [
                f"{term.name} is {term.loss.name}, which a sampled cache does not support: write a cache of kind "
                "hidden or top_k"
            ]
        if CHUNK_LOG_PROBS in term.loss.compares and not self.manifest.options.get("labels"):
            return [
                f"{term.name} is {term.loss.name}, which needs the log-probabilities of the text, and the cache has "
                "those of the most probable ids only: write it again with `hf-distill cache write` and this recipe"
            ]
        return []

    def _missing_layers(self, term: Term) -> list[str]:
        """Return the reason why the cache cannot serve a loss on features, if there is one."""
        layers, depth = self.manifest.options.get("layers", []), self.manifest.depth
        if term.loss.feature != "hidden":
            return [
                f"{term.name} compares features of the kind {term.loss.feature}, which no cache holds: use a "
                "FrozenTeacher"
            ]
        origin, student_depth = self._student_origin, self._student_depth
        kept_layers = None if origin is None else origin.layers_of(None, student_depth, depth)
        needed = {t for _, t in map_layers(term.layers, student_depth, depth, kept_layers)}
        needed = {*range(depth)} if term.layers == LEARNED else needed
        if missing := sorted(needed - {*layers}):
            return [
                f"{term.name} needs hidden states of the layers {missing}, and the cache has "
                f"{layers or 'none but those before the output head'}: write the cache again with this recipe, or map "
                "other layers"
            ]
        return []

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """Placeholders for the teacher's layers: there are as many as the teacher has, and they hold no weights."""
        blocks = nn.ModuleList(nn.Identity() for _ in range(self.manifest.depth))
        return LayerStack(which, blocks, int(self.manifest.width or 0), causal=True, attention="none")

    def contains(self, inputs: dict, shift: bool) -> bool:
        """Whether the cache has all examples of a batch; `shift` is that of `target_labels`."""
        inputs = teacher_inputs(inputs, self.readable_inputs())
        examples = batch_examples(self._read(inputs), Targets.from_batch(inputs, shift))
        return None not in self.store.get([example.key for example in examples])

    def _complete(
        self, inputs: dict, targets: Targets, examples: list[Example], cached: list[CachedExample | None]
    ) -> list[CachedExample]:
        """Return what the cache has of the examples of a batch; the source is run for those that the cache lacks."""
        if None not in cached:
            return [entry for entry in cached if entry is not None]
        missing = [i for i, entry in enumerate(cached) if entry is None]
        self._missing += len(missing)
        if self.source is None:
            example = examples[missing[0]]
            text = targets.labels[example.target_slice][:12].tolist()
            raise DistillError(
                f"{len(missing)} of {len(examples)} examples of a batch are not in {self.path}, which has "
                f"{self.manifest.data['examples']} examples (the first missing one has the labels {text}). The cache "
                "was written for other text, max_length, chat template or labels: write it again with this recipe, or "
                "set on_miss: query_teacher with a source."
            )
        feature_keys = {FeatureKey("hidden", layer): targets for layer in self.manifest.options.get("layers", ())}
        queried = encode_signals(self.source(inputs, targets, feature_keys), examples, self.manifest, targets.labels)
        return [queried[i] if entry is None else entry for i, entry in enumerate(cached)]

    def metrics(self) -> dict[str, float]:
        """Return `cache_missing`, the number of examples for which the source was run; without a source, nothing."""
        return {} if self.source is None else {"cache_missing": float(self._missing)}
