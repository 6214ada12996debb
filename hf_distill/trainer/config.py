"""The arguments of a distillation, beside those of any training."""

import copy
import json
import os
from dataclasses import dataclass, field, fields
from math import isnan
from typing import Any, ClassVar

from transformers import TrainingArguments

from ..errors import DistillError, collect_errors, raise_if_any
from ..losses.objective import Term, objective
from ..losses.token_metrics import greater_is_better
from ..models.projectors import ProjectorConfig

RUNTIME_FIELDS = ("self_check", "max_consecutive_nonfinite_steps")  # of how training is watched, not of what is learnt


@dataclass
class DistillArguments:
    """What distilling adds to a trainer's arguments, with its defaults.

    Raises:
        DistillError: a value out of range, an unknown loss or option; all of them at once.
    """

    _DICT_FIELDS: ClassVar = ["divergence", "projectors", "teacher_init_kwargs", "teacher_deepspeed"]

    temperature: float = field(
        default=2.0,
        metadata={"help": "Divides the logits of teacher and student; the divergence is multiplied by its square."},
    )
    alpha: float = field(
        default=0.5,
        metadata={"help": "Weight of the teacher's soft labels, in [0, 1]; the hard labels get 1 - alpha."},
    )
    divergence: dict | str | None = field(
        default="forward_kl",
        metadata={"help": "Loss between the two distributions: a name, or {name, **options} (or its JSON)."},
    )
    losses: list | str | None = field(
        default=None,
        metadata={"help": "More terms, a list (or its JSON) of {name, weight, **options}."},
    )
    chunk_tokens: int | None = field(
        default=None,
        metadata={"help": "Asked tokens a chunk of the fused head: memory, not accuracy. None: 150 MiB on a CPU."},
    )
    projectors: dict | str | None = field(
        default=None,
        metadata={
            "help": "Between hidden states: linear, mlp or none, or {kind, init, learning_rate, weight_decay} (or its "
            "JSON). None: linear where widths differ."
        },
    )
    teacher_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "How to load a teacher given as id or path: a dict (or its JSON) for from_pretrained, and "
            "quantization: nf4 or int8."
        },
    )
    teacher_deepspeed: dict | str | None = field(
        default=None,
        metadata={"help": "Shard the teacher by ZeRO-3: a config, its path, or a packaged one (zero3-teacher.json)."},
    )
    teacher_fsdp: bool = field(default=False, metadata={"help": "Shard the teacher by FSDP2 over all processes."})
    stop_on_signal: bool = field(
        default=False,
        metadata={"help": "On SIGTERM or Ctrl-C, save a checkpoint after the step and exit with code 143 or 130."},
    )
    self_check: bool = field(
        default=True,
        metadata={"help": "Compare the first batch's loss and gradient with a plain reference on 32 tokens."},
    )
    max_consecutive_nonfinite_steps: int = field(
        default=5,
        metadata={"help": "Steps whose loss or gradient is not finite are skipped; after so many in a row it stops."},
    )

    def __post_init__(self):
        if isinstance(self.divergence, str) and self.divergence.startswith("{"):
            self.divergence = _parsed("divergence", self.divergence, dict)
        if isinstance(self.projectors, str) and self.projectors.startswith("{"):
            self.projectors = _parsed("projectors", self.projectors, dict)
        if isinstance(self.teacher_deepspeed, str) and self.teacher_deepspeed.startswith("{"):
            self.teacher_deepspeed = _parsed("teacher_deepspeed", self.teacher_deepspeed, dict)
        self.losses = _parsed("losses", self.losses, list)
        self.teacher_init_kwargs = _parsed("teacher_init_kwargs", self.teacher_init_kwargs, dict)
        problems = self._wrong_types()
        with collect_errors(problems):
            self._choose_direction()
        if not any(problem.startswith("divergence") for problem in problems):
            with collect_errors(problems):
                self.terms()
        with collect_errors(problems):
            ProjectorConfig.of(self.projectors)
        raise_if_any(problems)

    def _wrong_types(self) -> list[str]:
        """Fields whose value is of a wrong type or out of range, those of the training arguments included."""
        problems = []
        for name, least in (
            ("chunk_tokens", "None, or a whole number of at least 1"),
            ("max_consecutive_nonfinite_steps", ""),
        ):
            value = getattr(self, name)
            if not (least and value is None) and (type(value) is not int or value < 1):
                problems.append(f"{name} is {value!r}; it must be {least or 'a whole number of at least 1'}")
        for name in ("teacher_fsdp", "stop_on_signal", "self_check"):
            if not isinstance(value := getattr(self, name), bool):
                problems.append(f"{name} is {value!r}; it must be True or False")
        if self.teacher_deepspeed is not None and not isinstance(self.teacher_deepspeed, dict | str | os.PathLike):
            problems.append(f"teacher_deepspeed is {self.teacher_deepspeed!r}; it must be a dict, its JSON, or a path")
        if not (self.divergence is None or (self.divergence and isinstance(self.divergence, dict | str))):
            problems.append(f"divergence is {self.divergence!r}; it must be a name or {{name, **options}}")
        own = {item.name for item in fields(DistillArguments)}
        for item in fields(self):
            value, default = getattr(self, item.name, None), item.default
            if item.name in own or isinstance(default, bool) or not isinstance(default, int | float):
                continue
            if isinstance(value, str | list | dict) or (isinstance(value, float) and isnan(value)):
                problems.append(f"{item.name} is {value!r}; it must be a number (by default it is {default!r})")
        return problems

    def _choose_direction(self) -> None:
        """Set `greater_is_better` of a metric of a distillation, where it is not set; else transformers chooses."""
        metric = getattr(self, "metric_for_best_model", None)
        if metric is not None and getattr(self, "greater_is_better", None) is None:
            self.greater_is_better = greater_is_better(metric)

    def terms(self, label_smoothing: float = 0.0) -> list[Term]:
        """The terms of the objective."""
        losses: Any = self.losses or ()
        return objective(self.alpha, self.temperature, self.divergence or "forward_kl", losses, label_smoothing)


@dataclass
class DistillConfig(DistillArguments, TrainingArguments):
    """`transformers.TrainingArguments` and the fields of a distillation.

    Every field can be set from a command line through `HfArgumentParser`.
    """

    _VALID_DICT_FIELDS: ClassVar = [*TrainingArguments._VALID_DICT_FIELDS, *DistillArguments._DICT_FIELDS]

    def __post_init__(self):
        DistillArguments.__post_init__(self)
        TrainingArguments.__post_init__(self)


def distill_arguments(args: Any) -> dict[str, Any]:
    """Copies of the values of the fields of a distillation in any arguments; empty if there are none."""
    names = [item.name for item in fields(DistillArguments)] if isinstance(args, DistillArguments) else []
    return {name: copy.deepcopy(getattr(args, name)) for name in names}


def _parsed(name: str, value: Any, kind: type) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            example = '[{"name": "hidden_mse", "weight": 1.0}]' if kind is list else '{"name": "value"}'
            raise DistillError(
                f"{name} is not JSON ({error.msg} at character {error.pos}): {value!r}; give a {kind.__name__}, or its "
                f"JSON, such as {example}"
            ) from None
    if value is not None and not isinstance(value, kind):
        raise DistillError(f"{name} must be a {kind.__name__} or its JSON; got {value!r}")
    return value
