"""Data of a distilled model's card, and the list of what was not measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..core.local_paths import reduced, typed_paths
from ..hub.licenses import LicenseDecision

FILE = "distillation.json"


@dataclass(frozen=True)
class CardData:
    """Data of a distillation; `distillation.json` contains it as JSON. Local paths are reduced to their last component.

    repo:         org/name of the student
    task:         of the pipeline, such as text-generation
    student:      the model it began as or the blocks it was cut to, parameters, adapters (whether it is only adapters)
    teachers:     name -> kind, model, revision, license (key `license`), parameters
    objective:    temperature, alpha, divergence, losses
    data:         sources, numbers of rows, fingerprints
    training:     steps, tokens, seconds, arguments, FLOP, as far as known
    held_out:     model -> metrics on the held-out rows
    environment:  versions and machine
    license:      the license of the student, see `hub.licenses.LicenseDecision`
    not_measured: see `unmeasured`
    retention:    tasks, from `hf-distill retention`
    diagnosis:    verdicts from `hf-distill diagnose`, name -> text; None: no diagnosis was made
    recipe:       as resolved; None for a script
    origin:       URI of the recipe on the Hub
    prompt:       of the code example and the widget
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
    license: LicenseDecision
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
        """Return the content of distillation.json."""
        return asdict(self)


def unmeasured(
    held_out: Mapping[str, Mapping[str, float]], retention: Sequence[Mapping[str, Any]], diagnosis: Mapping | None
) -> list[str]:
    """Return what was not measured, each with the command or option that measures it.

    Args:
        held_out: model -> metrics on the held-out rows.
        retention: tasks, from `hf-distill retention`.
        diagnosis: verdicts from `hf-distill diagnose`; None: no diagnosis was made.
    """
    lines = []
    if "student" not in held_out:
        lines.append("Quality: the student was not evaluated on held-out rows.")
    if "control" not in held_out:
        lines.append(
            "Benefit of the teacher: no control was trained on the hard labels only (`control: sft` trains one)."
        )
    if not retention:
        lines.append("Scores on evaluation tasks (`hf-distill retention RUN` measures them).")
    if diagnosis is None:
        lines.append("Known failure modes of the training (`hf-distill diagnose RUN` checks for them).")
    lines.append("Variation between seeds: all numbers are from one run.")
    lines.append("Domains and languages other than those of the data, safety, and bias.")
    return lines
