"""Data of a distilled model's card, and the list of what was not measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict

from ..core.held_out_metrics import DEFAULT_TARGET
from ..core.json_types import JSON, JSONObject
from ..core.local_paths import reduced, typed_paths
from ..core.results import Metrics, ModelFacts
from ..hub.licenses import LicenseDecision

FILE = "distillation.json"


class StudentFacts(ModelFacts, total=False):
    """The model that the student began as or was cut from, its base model, and whether it is only adapters.

    class_name: of a module that is no transformers model, whose weights are a state dict
    """

    model: str | None
    base_model: str
    revision: str | None
    adapters: bool
    class_name: str


class TeacherFacts(ModelFacts, total=False):
    """A teacher: its kind and model, and the license of the model."""

    kind: str
    model: str | None
    revision: str | None
    version: str
    quantization: str
    api: str
    hosts: list[str]
    served: bool  # whether the cache of a teacher was written from a server
    top_k: int
    dtype: str
    weights: str
    license: str | None
    link: str | None
    forbids: str | None


def is_server_name(teacher: TeacherFacts) -> bool:
    """Whether the name of a teacher's model was chosen by its server: any name that is no id org/name of the Hub."""
    is_served = teacher.get("kind") == "remote" or teacher.get("served", False)
    return is_served and "/" not in (teacher.get("model") or "")


class ObjectiveFacts(TypedDict, total=False):
    """The objective; an option is None where the loss has no option of this name."""

    temperature: float
    alpha: float
    divergence: str | Mapping[str, object]
    hard_loss: str | None
    losses: Sequence[Mapping[str, JSON]] | None
    by_origin: Mapping[str, Mapping[str, Any]] | None


class GenerationFacts(TypedDict):
    """The model that wrote the completions of a dataset, their number, and the number that the filters kept."""

    model: str
    completions: int
    kept: int


class SourceFacts(TypedDict, total=False):
    """A dataset, with its commit on the Hub or the version of its package.

    `generated` is set if a teacher wrote the completions: the model, and the numbers of completions that it wrote and
    of those in the data.
    """

    dataset: str | None
    revision: str
    version: str
    generated: GenerationFacts


class DatasetFacts(TypedDict, total=False):
    """The sources by name, numbers of rows (None for a stream), and SHA-256 of the rows."""

    sources: dict[str, SourceFacts]
    train_rows: int | None
    eval_rows: int | None
    tokens_per_row: float
    train_fingerprint: str
    eval_fingerprint: str


class TrainingFacts(TypedDict, total=False):
    """Length, cost and arguments of the training; `stages` describes those of a progressive run."""

    steps: int
    stages: str
    rows_per_step: int
    tokens: int | None
    epochs: float | None
    learning_rate: float | None
    seconds: float | None
    flop_student: float
    flop_teacher: float
    arguments: Mapping[str, JSON]


class ScoreFacts(TypedDict):
    """The score of a model on a task, and its standard error."""

    value: float
    stderr: float


class RelativeScoreFacts(TypedDict):
    """Percent of the teacher's score, with a 95 % interval."""

    percent: float
    low: float
    high: float


class TaskFacts(TypedDict):
    """The scores of all models on an evaluation task; see `hf-distill retention`."""

    task: str
    metric: str
    examples: int
    scores: dict[str, ScoreFacts]
    relative_scores: dict[str, RelativeScoreFacts | None]


@dataclass(frozen=True)
class CardData:
    """Data of a distillation; `distillation.json` contains it as JSON. Local paths are reduced to their last component.

    repo:         org/name of the student
    task:         of the pipeline, such as text-generation; None if no pipeline reads the student
    teachers:     name -> facts
    held_out:     model -> metrics on the held-out rows
    environment:  versions and machine
    license:      the license of the student, see `hub.licenses.LicenseDecision`
    not_measured: see `unmeasured`
    retention:    tasks, from `hf-distill retention`
    diagnosis:    verdicts from `hf-distill diagnose`, name -> text; None: no diagnosis was made
    recipe:       as resolved; None for a script
    origin:       URI of the recipe on the Hub
    prompt:       of the code example and the widget
    target:       noun for a target, in units such as nats/token
    """

    repo: str
    task: str | None
    student: StudentFacts
    teachers: dict[str, TeacherFacts]
    objective: ObjectiveFacts
    data: DatasetFacts
    training: TrainingFacts
    held_out: dict[str, Metrics]
    environment: Mapping[str, str | int | None]
    license: LicenseDecision
    not_measured: Sequence[str] = ()
    retention: Sequence[TaskFacts] = ()
    diagnosis: Mapping[str, str] | None = None
    recipe: JSONObject | None = None
    origin: str | None = None
    prompt: str | Sequence[Mapping[str, str]] | None = None
    target: str = DEFAULT_TARGET
    format: int = 1

    def __post_init__(self) -> None:
        known = [*typed_paths(self.recipe or {})]
        for field in fields(self):
            object.__setattr__(self, field.name, reduced(getattr(self, field.name), known))

    @property
    def control(self) -> str:
        """Value of `control` in the recipe; "sft" without one."""
        return str((self.recipe or {}).get("control") or "sft")

    def as_json(self) -> JSONObject:
        """Return the content of distillation.json."""
        return asdict(self)


def unmeasured(
    held_out: Mapping[str, Metrics],
    retention: Sequence[TaskFacts],
    diagnosis: Mapping[str, str] | None,
    quantized: bool = False,
) -> list[str]:
    """Return what was not measured, each with the command or option that measures it.

    Args:
        held_out: model -> metrics on the held-out rows.
        retention: tasks, from `hf-distill retention`.
        diagnosis: verdicts from `hf-distill diagnose`; None: no diagnosis was made.
        quantized: whether the student is quantized.
    """
    lines = []
    if "student" not in held_out:
        lines.append("Quality: the student was not evaluated on held-out rows.")
    if "control" not in held_out:
        lines.append(
            "Benefit of the teacher: no control was trained on the hard labels only (`control: sft` trains one)."
        )
    if quantized and "full_precision" not in held_out:
        lines.append(
            "Effect of the quantization: no student was trained in full precision (`control: full_precision` does)."
        )
    if not retention:
        lines.append("Scores on evaluation tasks (`hf-distill retention RUN` measures them).")
    if diagnosis is None:
        lines.append("Known failure modes of the training (`hf-distill diagnose RUN` checks for them).")
    lines.append("Variation between seeds: all numbers are from one run.")
    lines.append("Domains and languages other than those of the data, safety, and bias.")
    return lines
