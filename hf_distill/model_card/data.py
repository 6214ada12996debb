"""What is known of a distilled model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..core.local_paths import reduced, typed_paths
from ..hub.licenses import LicenseDecision

FILE = "distillation.json"


@dataclass(frozen=True)
class CardData:
    """A distillation's evidence; `distillation.json` is this as JSON. Paths of this machine are reduced as it is made.

    repo:         org/name of the student
    task:         of the pipeline, such as text-generation
    student:      model it began with or blocks it was cut to, parameters, adapters (whether it is adapters alone)
    teachers:     by name: kind, model, revision, licence, parameters
    objective:    temperature, alpha, divergence, losses
    data:         sources, rows, fingerprints
    training:     steps, tokens, seconds, arguments, FLOP: what is known of them
    held_out:     model -> metrics over the held-out rows
    environment:  versions and machine
    licence:      see `hub.licences.Judged`
    not_measured: see `unmeasured`
    retention:    tasks, as of `hf-distill retention`
    diagnosis:    verdicts of `hf-distill diagnose`, name -> text; None: nobody looked
    recipe:       as resolved; None: a script
    origin:       address of the recipe on the Hub
    prompt:       that the card begins with
    """

    repo: str
    task: str
    student: dict[str, Any]
    teachers: dict[str, dict[str, Any]]
    objective: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    held_out: dict[str, dict[str, float]]
    environment: dict[str, Any]
    licence: LicenseDecision
    not_measured: Sequence[str] = ()
    retention: Sequence[Mapping[str, Any]] = ()
    diagnosis: Mapping[str, str] | None = None
    recipe: dict[str, Any] | None = None
    origin: str | None = None
    prompt: str | Sequence[Mapping[str, str]] | None = None
    format: int = 1

    def __post_init__(self):
        known = [*typed_paths(self.recipe or {})]
        for field in fields(self):
            object.__setattr__(self, field.name, reduced(getattr(self, field.name), known))

    def as_json(self) -> dict[str, Any]:
        """For distillation.json."""
        return asdict(self)


def unmeasured(
    held_out: Mapping[str, Mapping[str, float]], retention: Sequence[Mapping[str, Any]], diagnosis: Mapping | None
) -> list[str]:
    """What a distillation's evidence does not say, each with what would tell."""
    lines = []
    if "student" not in held_out:
        lines.append("Quality: nothing was evaluated on held-out rows.")
    if "control" not in held_out:
        lines.append("Whether the teacher helped: no control was trained on the hard labels alone (`control: sft`).")
    if not retention:
        lines.append("What was kept on tasks (`hf-distill retention RUN`).")
    if diagnosis is None:
        lines.append("Whether training went wrong in a known way (`hf-distill diagnose RUN`).")
    lines.append("Other seeds: all numbers are of one run.")
    lines.append("Other domains and languages than those of the data; safety; bias.")
    return lines
