"""`DistillArguments`, the arguments of a distillation, and `DistillConfig`, which adds them to `TrainingArguments`."""

import copy
import json
import os
from dataclasses import dataclass, field, fields, replace
from inspect import get_annotations
from math import isnan
from typing import ClassVar, TypeVar, cast, get_args

from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from ..core.defaults import (
    ALPHA,
    CROSS_TOKENIZER_TEMPERATURE,
    DIVERGENCE,
    MAX_CONSECUTIVE_NONFINITE_STEPS,
    TEMPERATURE,
)
from ..core.row_values import ORIGINS
from ..errors import DistillError, collect_errors, did_you_mean, raise_if_any
from ..losses.objective import Term, objective
from ..losses.output_types import DISTRIBUTION_OUTPUTS, OUTPUT_NAMES, OutputType
from ..losses.registry import LOSSES
from ..losses.token_metrics import greater_is_better
from ..models.projectors import ProjectorConfig

Parsed = TypeVar("Parsed", dict, list)
# Fields that say how training is run and monitored; they do not change the objective. In a recipe they are in `train`.
RUNTIME_FIELDS = ("self_check", "max_consecutive_nonfinite_steps", "compile_teacher", "chunk_tokens")


@dataclass
class DistillArguments:
    """The arguments that distillation adds to those of a trainer.

    Raises:
        DistillError: a value is out of range, or a loss or an option is unknown; the message names all of them.
    """

    _DICT_FIELDS: ClassVar = [
        "divergence",
        "cross_tokenizer",
        "by_origin",
        "projectors",
        "teacher_init_kwargs",
        "teacher_deepspeed",
    ]

    temperature: float | None = field(
        default=None,
        metadata={
            "help": "The logits of teacher and student are divided by this temperature, and the divergence is "
            f"multiplied by its square. It must be above 0. The default is None: {TEMPERATURE}, or "
            f"{CROSS_TOKENIZER_TEMPERATURE} with cross_tokenizer."
        },
    )
    alpha: float = field(
        default=ALPHA,
        metadata={
            "help": "Weight of the divergence from the teacher, between 0 and 1. The cross entropy on the labels gets "
            f"the weight 1 - alpha. The default is {ALPHA}. Encoders without a head have no labels: the weight is 1."
        },
    )
    divergence: dict | str | None = field(
        default=None,
        metadata={
            "help": "Divergence between the outputs of teacher and student: the name of a loss, or a dict "
            '{"name": ..., option: ...}, also as JSON. The default is None, the loss of the model\'s type: '
            f"{DIVERGENCE} for distributions over ids or classes, bernoulli_kl for multi-label classifiers, "
            "mse for regression, embedding_cosine for encoders without a head."
        },
    )
    cross_tokenizer: dict | str | None = field(
        default=None,
        metadata={
            "help": "For a teacher with another tokenizer: the loss that takes the place of the divergence, alm, "
            'projected_kl or uld, or a dict {"name": ..., option: ...}, also as JSON. The default is None: teacher and '
            "student have one tokenizer."
        },
    )
    by_origin: dict | str | None = field(
        default=None,
        metadata={
            "help": "Losses that depend on who wrote the target tokens, teacher, student or data: a dict such as "
            '{"teacher": {"divergence": ..., "alpha": ...}}, also as JSON. Tokens of an author that it does not have, '
            "and values that it leaves out, are those of `divergence` and `alpha`. The default is None: all tokens "
            "have the same losses."
        },
    )
    losses: list | str | None = field(
        default=None,
        metadata={
            "help": "Additional losses, such as losses on hidden states or attention: a list of dicts "
            '{"name": ..., "weight": ..., option: ...}, also as JSON. The default is None, which adds no loss.'
        },
    )
    chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Number of target tokens for which the fused loss materializes logits at a time, at least 1. It "
            "changes the memory that is needed, not the result. The default is None: as many as fit into 150 MiB on a "
            "CPU, or into about 1 GiB on a GPU, where it is a multiple of 128 and at least 1024."
        },
    )
    projectors: dict | str | None = field(
        default=None,
        metadata={
            "help": "Projectors between the hidden states of student and teacher: linear, mlp or none, or a dict with "
            "the keys kind, init, learning_rate and weight_decay, also as JSON. The default is None: a linear "
            "projector wherever the widths differ."
        },
    )
    teacher_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for from_pretrained when the teacher is an id or a path: a dict, also as JSON. "
            "The key quantization (nf4 or int8) quantizes the teacher. The default is None."
        },
    )
    teacher_deepspeed: dict | str | None = field(
        default=None,
        metadata={
            "help": "Shards the teacher with ZeRO-3: a DeepSpeed config as a dict or JSON, the path of one, or the "
            "name of a packaged one (zero3-teacher.json). The default is None, which does not shard it."
        },
    )
    teacher_fsdp: bool = field(
        default=False,
        metadata={"help": "Whether to shard the teacher over all processes with FSDP2. The default is False."},
    )
    compile_teacher: bool = field(
        default=False,
        metadata={
            "help": "Whether torch_compile also compiles the transformer layers of frozen teachers. The default is "
            "False: it compiles those of the student."
        },
    )
    stop_on_signal: bool = field(
        default=False,
        metadata={
            "help": "Whether SIGTERM or Ctrl-C ends training after the current step with a checkpoint. The process "
            "then exits with code 143 or 130. The default is False."
        },
    )
    self_check: bool = field(
        default=True,
        metadata={
            "help": "Whether to compare the loss and the gradient of the first batch with an unfused reference, on 32 "
            "target tokens. The default is True."
        },
    )
    max_consecutive_nonfinite_steps: int = field(
        default=MAX_CONSECUTIVE_NONFINITE_STEPS,
        metadata={
            "help": "Training stops after this number of consecutive steps whose loss or gradient is not finite, at "
            f"least 1; each of these steps is skipped. The default is {MAX_CONSECUTIVE_NONFINITE_STEPS}."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.divergence, str) and self.divergence.startswith("{"):
            self.divergence = _parse_json("divergence", self.divergence, dict)
        if isinstance(self.cross_tokenizer, str) and self.cross_tokenizer.startswith("{"):
            self.cross_tokenizer = _parse_json("cross_tokenizer", self.cross_tokenizer, dict)
        if isinstance(self.projectors, str) and self.projectors.startswith("{"):
            self.projectors = _parse_json("projectors", self.projectors, dict)
        if isinstance(self.teacher_deepspeed, str) and self.teacher_deepspeed.startswith("{"):
            self.teacher_deepspeed = _parse_json("teacher_deepspeed", self.teacher_deepspeed, dict)
        self.losses = _parse_json("losses", self.losses, list)
        self.by_origin = _parse_json("by_origin", self.by_origin, dict)
        self.teacher_init_kwargs = _parse_json("teacher_init_kwargs", self.teacher_init_kwargs, dict)
        problems = self._wrong_types()
        with collect_errors(problems):
            self._set_greater_is_better()
        if not any(problem.startswith(("divergence", "by_origin")) for problem in problems):
            with collect_errors(problems):
                self.terms()
        with collect_errors(problems):
            ProjectorConfig.of(self.projectors)
        raise_if_any(problems)

    def _wrong_types(self) -> list[str]:
        """Describe the values of a wrong type or out of range, those of the training arguments included."""
        problems = []
        for name, may_be_none in (("chunk_tokens", True), ("max_consecutive_nonfinite_steps", False)):
            value = getattr(self, name)
            if not (may_be_none and value is None) and (type(value) is not int or value < 1):
                expected = "None, or a whole number of at least 1" if may_be_none else "a whole number of at least 1"
                problems.append(f"{name} is {value!r}; it must be {expected}")
        for name in ("teacher_fsdp", "compile_teacher", "stop_on_signal", "self_check"):
            if not isinstance(value := getattr(self, name), bool):
                problems.append(f"{name} is {value!r}; it must be True or False")
        smoothing = getattr(self, "label_smoothing_factor", 0.0)
        if isinstance(smoothing, int | float) and not 0 <= smoothing <= 1:
            problems.append(f"label_smoothing_factor is {smoothing!r}; it must be a number in [0, 1]")
        problems += _backend_problems(getattr(self, "torch_compile_backend", None))
        if self.teacher_deepspeed is not None and not isinstance(self.teacher_deepspeed, dict | str | os.PathLike):
            problems.append(f"teacher_deepspeed is {self.teacher_deepspeed!r}; it must be a dict, JSON, or a path")
        if not (self.divergence is None or (self.divergence and isinstance(self.divergence, dict | str))):
            problems.append(f"divergence is {self.divergence!r}; it must be a name or {{name, **options}}")
        if self.cross_tokenizer is not None:
            problems += self._cross_tokenizer_problems()
        problems += self._by_origin_problems()
        distill_names = {item.name for item in fields(DistillArguments)}
        annotations = {k: v for base in reversed(type(self).__mro__) for k, v in get_annotations(base).items()}
        for item in fields(self):
            value, default = getattr(self, item.name, None), item.default
            if item.name in distill_names or isinstance(default, bool) or not isinstance(default, int | float):
                continue
            # A schedule, which the config of the field checks. HfArgumentParser overwrites `item.type`.
            if list in get_args(annotations[item.name]):
                continue
            if isinstance(value, str | list | dict) or (isinstance(value, float) and isnan(value)):
                problems.append(f"{item.name} is {value!r}; it must be a number (the default is {default!r})")
        return problems

    def _cross_tokenizer_problems(self) -> list[str]:
        """Describe what is wrong with `cross_tokenizer`, apart from the options of its loss."""
        if self.divergence not in (None, DIVERGENCE, type(self).__dataclass_fields__["divergence"].default):
            return [
                f"divergence is {self.divergence!r} and cross_tokenizer is {self.cross_tokenizer!r}, which takes the "
                "place of the divergence: remove divergence"
            ]
        return []

    def _by_origin_problems(self) -> list[str]:
        """Describe what is wrong with `by_origin`, apart from the values of divergences and alphas."""
        by_origin = cast("dict[str, object]", self.by_origin or {})
        problems = [
            f"by_origin has {origin!r}, which is no origin{did_you_mean(str(origin), ORIGINS)}"
            for origin in by_origin
            if origin not in ORIGINS
        ]
        for origin, values in by_origin.items():
            if not (isinstance(values, dict) and values and {*values} <= {"alpha", "divergence"}):
                problems.append(
                    f"by_origin[{origin!r}] is {values!r}; it must be a dict with the keys divergence, alpha, or both"
                )
        if by_origin and self.cross_tokenizer is not None:
            problems.append(
                "by_origin chooses divergences on ids of one tokenizer, and cross_tokenizer is set: remove one of them"
            )
        return problems

    @property
    def uses_soft_labels(self) -> bool:
        """Whether the divergence has a weight above 0 for any target tokens."""
        by_origin = cast("dict[str, dict]", self.by_origin or {})
        return max(self.alpha, *(values.get("alpha", 0) for values in by_origin.values()), 0) > 0

    @property
    def soft_loss(self) -> dict | str | None:
        """The loss of the soft term: `cross_tokenizer` if it is set, else `divergence`; None: that of the type."""
        return self.cross_tokenizer or self.divergence

    @property
    def loss_temperature(self) -> float:
        """The temperature of the losses that do not set their own: `temperature`, or the default of the soft loss."""
        if self.temperature is not None:
            return self.temperature
        return TEMPERATURE if self.cross_tokenizer is None else CROSS_TOKENIZER_TEMPERATURE

    def _set_greater_is_better(self) -> None:
        """Set `greater_is_better` for a metric of this package if it is not set; transformers chooses for others."""
        metric = getattr(self, "metric_for_best_model", None)
        if metric is not None and getattr(self, "greater_is_better", None) is None:
            self.greater_is_better = greater_is_better(metric)

    def terms(self, label_smoothing: float = 0.0, output_type: OutputType | None = None) -> list[Term]:
        """Return the terms of the objective.

        Args:
            label_smoothing: smoothing of the cross entropy on the labels, between 0 and 1.
            output_type: what the outputs of the student are; None if it is not known yet: losses of every type are
                accepted, and defaults are those of a distribution.

        Raises:
            DistillError: a value is out of range, a loss or an option is unknown, or a loss does not fit the outputs.
        """
        losses, defaults = cast("list[dict]", self.losses or []), output_type or DISTRIBUTION_OUTPUTS
        soft_loss = self.soft_loss or defaults.soft_loss
        if self.cross_tokenizer is not None:
            _check_compares_chunks(self.cross_tokenizer)
        alpha = 1.0 if defaults.hard_loss is None and self.alpha == ALPHA else self.alpha
        terms = objective(alpha, self.loss_temperature, soft_loss, losses, label_smoothing, defaults.hard_loss)
        terms = self._with_origins(terms, soft_loss, label_smoothing, defaults.hard_loss)
        losses_of_all = [variant.loss for term in terms for variant in (term, *term.by_origin.values())]
        if output_type is not None:
            problems = output_type.unfitting_losses(losses_of_all)
            problems += output_type.objective_problems(terms[0].loss, self.alpha)
            if not output_type.has_temperature and self.temperature is not None:
                problems.append(
                    f"temperature is {self.temperature}, and the outputs of the student are "
                    f"{OUTPUT_NAMES[output_type.outputs]}, which no temperature divides: leave temperature out"
                )
            raise_if_any(problems)
        if self.cross_tokenizer is None and (
            of_chunks := [loss.name for loss in losses_of_all if loss.compares_chunks]
        ):
            raise DistillError(
                f"{', '.join(of_chunks)} compares spans of text with a teacher of another tokenizer, and "
                f"cross_tokenizer is not set: set cross_tokenizer={of_chunks[0]!r}, or remove the loss"
            )
        return terms

    def _with_origins(
        self, terms: list[Term], soft_loss: dict | str, label_smoothing: float, hard_loss: str | None
    ) -> list[Term]:
        """Return the terms with those of the origins in the soft and the hard term."""
        by_origin: dict[str, list[Term]] = {}
        problems: list[str] = []
        for origin, values in cast("dict[str, dict]", self.by_origin or {}).items():
            alpha, divergence = values.get("alpha", self.alpha), values.get("divergence", soft_loss)
            with collect_errors(problems):
                try:
                    pair = objective(alpha, self.loss_temperature, divergence, (), label_smoothing, hard_loss)
                except DistillError as error:
                    raise DistillError(f"by_origin[{origin!r}]: {error}") from None
                by_origin[origin] = [replace(term, origin=origin) for term in pair]
        raise_if_any(problems)
        if not by_origin:
            return terms
        return [
            replace(term, by_origin={origin: pair[index] for origin, pair in by_origin.items()})
            if index < (1 if hard_loss is None else 2)
            else term
            for index, term in enumerate(terms)
        ]


@dataclass
class DistillConfig(DistillArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the arguments of a distillation.

    The fields of `DistillArguments` by purpose; the help text of each field states its values and its default.

    Objective: `temperature`, `alpha`, `divergence`, `losses`, `projectors`, `by_origin`, `cross_tokenizer`
    Teacher:   `teacher_init_kwargs`, `teacher_deepspeed`, `teacher_fsdp`
    Run:       `chunk_tokens`, `compile_teacher`, `self_check`, `max_consecutive_nonfinite_steps`, `stop_on_signal`

    Every field can be set on the command line of a script that uses `HfArgumentParser`. Dicts and lists can be given
    as JSON.

    Raises:
        DistillError: a value is out of range, or a loss or an option is unknown; the message names all of them.

    Example:
        args = DistillConfig("out", temperature=2.0, alpha=0.5, losses=[{"name": "hidden_mse", "weight": 1.0}])
    """

    # The base class does not annotate it, so that it counts as an attribute of instances.
    _VALID_DICT_FIELDS: ClassVar = [  # type: ignore[misc]
        *TrainingArguments._VALID_DICT_FIELDS,
        *DistillArguments._DICT_FIELDS,
    ]

    def __post_init__(self) -> None:
        DistillArguments.__post_init__(self)
        TrainingArguments.__post_init__(self)


def distill_arguments(args: object) -> dict[str, object]:
    """Return copies of the `DistillArguments` fields of any training arguments; empty for plain `TrainingArguments`."""
    names = [item.name for item in fields(DistillArguments)] if isinstance(args, DistillArguments) else []
    return {name: copy.deepcopy(getattr(args, name)) for name in names}


def _check_compares_chunks(loss: object) -> None:
    """Check that `cross_tokenizer` names a loss on chunks.

    Raises:
        DistillError: it does not; the message has the names of those losses.
    """
    name = loss.get("name") if isinstance(loss, dict) else loss
    known = [each for each, of_name in LOSSES.items() if of_name.compares_chunks]
    if not isinstance(name, str) or name not in LOSSES:
        raise DistillError(
            f"cross_tokenizer is {loss!r}, which names no known loss: use one of {', '.join(known)}, or "
            "{name, **options}"
        )
    if name not in known:
        of_ids = LOSSES[name].compares and not LOSSES[name].feature
        reason = "compares ids of one tokenizer" if of_ids else "does not compare text"
        raise DistillError(f"cross_tokenizer is {name!r}, which {reason}: use one of {', '.join(known)}")


def _backend_problems(backend: object) -> list[str]:
    names = [item.value.lower() for item in DynamoBackend if item is not DynamoBackend.NO]
    if backend is None or (isinstance(backend, str) and backend.lower() in [*names, "no"]):
        return []
    suggestion = did_you_mean(backend.lower(), names) if isinstance(backend, str) else f"; known: {', '.join(names)}"
    return [f"torch_compile_backend is {backend!r}, which is no backend of accelerate{suggestion}"]


def _parse_json(name: str, value: object, kind: type[Parsed]) -> Parsed | None:
    """Return the value of a field, parsed if it is JSON.

    Raises:
        DistillError: it is not valid JSON, or not of the type `kind`.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            example = '[{"name": "hidden_mse", "weight": 1.0}]' if kind is list else '{"name": "value"}'
            raise DistillError(
                f"{name} is not JSON ({error.msg} at character {error.pos}): {value!r}. Pass a {kind.__name__}, "
                f"or JSON such as {example}"
            ) from None
    if value is not None and not isinstance(value, kind):
        raise DistillError(f"{name} is {value!r}; it must be a {kind.__name__}, or JSON of one")
    return value
