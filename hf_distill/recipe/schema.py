"""The pydantic model of a recipe, and the checks of its sections against each other; they import no torch."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from ..core.component_options import ProjectorOptions
from ..core.run_files import GENERATED
from ..core.schedule import parse_schedule
from ..core.strict_model import StrictModel
from ..core.teacher_kinds import TRAINABLE_KINDS, incompatible_teachers
from ..errors import did_you_mean
from .cross_tokenizer import cross_tokenizer_problems
from .data import Data, OnPolicy
from .generation import Generation, generation_problems
from .losses import Distill, LossSpec
from .models import NamedTeacher, Student, TeacherSpec
from .problems import Problems
from .quantize import quantize_problems
from .sharding import sharding_problems
from .stages import Stage, stage_problems
from .tasks import TEXT_GENERATION, task_problems
from .train import Train
from .vocabulary import vocabulary_problems


class Recipe(StrictModel):
    """A recipe: the student, the teacher, the data, the objective and the training of one distillation run."""

    task: Literal["text-generation", "text-classification", "image-classification", "automatic-speech-recognition"] = (
        Field(
            "text-generation",
            description="What the models do, as in transformers.pipeline. It determines the columns of the data, the "
            "collator, the trainer and the metrics. Default: text-generation.",
        )
    )
    student: Student = Field(description="The model to train.")
    stages: list[Stage] = Field(
        default_factory=list,
        description="Progressive distillation: each stage trains one student, which is the teacher of the next stage. "
        "`student` is then the student of the last stage. Default: no stages.",
    )
    teacher: TeacherSpec | None = Field(None, description="The teacher. Give either teacher or teachers.")
    teachers: list[NamedTeacher] = Field(
        default_factory=list,
        description="Two or more named teachers, instead of one. A loss selects one with its key teacher; the "
        "default is the "
        "first.",
    )
    data: Data = Field(description="The training and evaluation data.")
    distill: Distill = Field(
        default_factory=lambda: Distill.model_validate({}), description="The distillation objective."
    )
    losses: list[LossSpec] = Field(
        default_factory=list, description="Additional loss terms, such as losses on hidden states. Default: none."
    )
    projectors: ProjectorOptions | None = Field(
        None, description="Projectors between hidden states of student and teacher. A string is short for {kind: ...}."
    )
    on_policy: OnPolicy | None = Field(
        None,
        description="On-policy distillation: the student trains on completions that it generates. Default (null): off.",
    )
    generate: Generation | None = Field(
        None,
        description="How the teacher completes the prompts of data: in `hf-distill generate`, and in `hf-distill run` "
        "for sources with generate: true. Default (null): the defaults of its keys.",
    )
    train: Train = Field(description="The training arguments.")
    control: Literal["sft", "sft_on_data", "direct", "full_precision"] | None = Field(
        None,
        description="Train a control for comparison. sft: the same student on the hard labels only. sft_on_data (needs "
        "a source with generate: true): the same student on the hard labels of the data's completions, of the same "
        "prompts and in the same number of steps. direct (needs "
        "stages): the last student distilled from the first teacher, in the total number of steps of all stages. "
        "full_precision (needs student.quantize): the same student distilled without quantization, evaluated in full "
        "precision and quantized after training. Default (null): no control.",
    )
    export: Literal["adapter", "merged", "ema", "mtp"] = Field(
        "adapter",
        description="What the run exports. adapter: for a student with lora, the adapters only, else the model. "
        "merged: a model with the adapters merged in. ema: the averaged model too, as RUN/ema. mtp: the heads too, as "
        "RUN/student/mtp.safetensors. Default: adapter.",
    )
    extends: str | None = Field(
        None, description="Name of a packaged recipe whose values are used for all keys that this recipe does not set."
    )
    requires: str | None = Field(
        None, description="Range of hf-distill versions that can read the recipe, such as '>=0.2'."
    )
    origin: str | None = Field(
        None, description="Address of the recipe on the Hub; set when the recipe is loaded, never by the recipe itself."
    )

    @property
    def is_cross_tokenizer(self) -> bool:
        """Whether the teachers have other tokenizers than the student."""
        return self.distill.cross_tokenizer is not None

    @property
    def tokenizer_model(self) -> str:
        """The model whose tokenizer the student has.

        It is the primary teacher, or the student if the teacher has no model or another tokenizer. In tasks other than
        text-generation it is the student, unless that is pruned from the teacher.
        """
        return str((self._uses_tokenizer_of_teacher and self.primary_teacher.loaded_model) or self.student.model)

    @property
    def tokenizer_revision(self) -> str | None:
        """The revision of `tokenizer_model`."""
        return self.primary_teacher.revision if self._uses_tokenizer_of_teacher else self.student.revision

    @property
    def _uses_tokenizer_of_teacher(self) -> bool:
        if self.task != TEXT_GENERATION and self.student.from_teacher is None:
            return False  # the tokenizer or processor is that of the student
        return bool(self.primary_teacher.loaded_model) and not self.is_cross_tokenizer

    @property
    def all_teachers(self) -> list[TeacherSpec]:
        """All teachers, with the source instead of a cache whose `use_source` is set."""
        return [spec.effective for spec in ([self.teacher] if self.teacher else self.teachers)]

    @property
    def primary_teacher(self) -> TeacherSpec:
        """The teacher from which a student may be pruned: of several teachers the first that has a model.

        For a cache this is its source, if the recipe gives it.
        """
        sources = [spec.source_teacher for spec in self.all_teachers]
        return next((spec for spec in sources if spec.loaded_model), sources[0])

    def generated_folder(self, source: str) -> str:
        """Return the folder of the data set that the teacher generates for a source."""
        folder = self.generate.output_dir if self.generate else None
        return f"{folder or f'{self.train.output_dir}/{GENERATED}'}/{source}"

    @property
    def kinds(self) -> set[str]:
        """The kinds of all teachers."""
        return {spec.kind for spec in self.all_teachers}

    @model_validator(mode="before")
    @classmethod
    def _default_student(cls, values: object) -> object:
        """Use the student of the last stage as `student` if the recipe does not give one."""
        if not isinstance(values, dict):
            return values
        stages = values.get("stages")
        if stages and isinstance(stages, list) and isinstance(stages[-1], dict) and "student" in stages[-1]:
            return {"student": stages[-1]["student"], **values}
        return values

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        """Check the sections against each other and raise all problems at once.

        Without a valid teacher the other checks are not possible, so its problems are raised first.
        """
        self._check_teachers()
        if self.kinds == {"mtp"} and "alpha" not in self.distill.model_fields_set:
            self.distill.alpha = 0.0  # the default of this kind, which gives no soft labels
        checks = (
            self._check_generation,
            self._check_adapters,
            self._check_student_source,
            self._check_mtp,
            self._check_on_policy,
            self._check_streaming,
            self._check_remote,
            self._check_origins,
        )
        problems = [
            line
            for problems_of in (
                stage_problems,
                cross_tokenizer_problems,
                vocabulary_problems,
                task_problems,
                quantize_problems,
                sharding_problems,
            )
            for line in problems_of(self)
        ]
        for check in (*checks, self._check_schedules):
            try:
                check()
            except Problems as error:
                problems += error.lines
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise Problems(problems)
        return self

    def _check_generation(self) -> None:
        if problems := generation_problems(self):
            raise Problems(problems)

    def _check_origins(self) -> None:
        """Check that losses may depend on the author of the target tokens, and that all sources or none have one."""
        sources = self.data.sources
        lacking = [name for name, source in sources.items() if source.author is None]
        is_read = self.distill.by_origin or any(source.origin for source in sources.values())
        if is_read and 0 < len(lacking) < len(sources):
            raise ValueError(
                f"data.{lacking[0]} has no origin, and other sources do: set origin in every source, or in none"
            )
        if not self.distill.by_origin:
            return
        authors = {source.author for source in sources.values()}
        origins = {*authors, "data", *(["student"] if self.on_policy else [])}  # held-out rows may be the data's
        if None not in authors and (unused := [name for name in self.distill.by_origin if name not in origins]):
            raise ValueError(
                f"distill.by_origin.{unused[0]}: no tokens have this origin; those of the sources are "
                f"{', '.join(sorted(map(str, authors)))}: remove it, or correct origin of the sources"
            )
        problems = []
        if trained := sorted({*self.kinds} & {"online", "mutual", "mtp"}):
            problems.append(f"teacher.kind {trained[0]} trains the teacher by the same losses")
        if any(spec.sources for spec in self.teachers):
            problems.append("different sources have different teachers")
        if problems:
            raise ValueError(f"distill.by_origin: {'; '.join(problems)}: remove by_origin")

    def _check_teachers(self) -> None:
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("give either teacher, or teachers with two or more entries")
        names = [spec.name for spec in self.teachers]
        if len(names) == 1 or len({*names}) < len(names):
            raise ValueError(f"teachers: give two or more teachers with different names; got {', '.join(names)}")
        if problems := incompatible_teachers({spec.name: spec.kind for spec in self.teachers}):
            raise ValueError(f"teachers: {'; '.join(problems)}")
        prompts = {spec.prompt for spec in (*self.teachers, *([self.teacher] if self.teacher else []))}
        if len(prompts) > 1:
            raise ValueError("teachers: all teachers read one prompt: give each of them the same prompt, or none")
        if prompts != {None} and self.data.packing:
            raise ValueError("teacher.prompt does not work with packed rows: set data.packing to false")
        self._check_routing()
        for loss in self.losses:
            if loss.teacher is not None and loss.teacher not in names:
                raise ValueError(
                    f"losses: {loss.name} names the teacher {loss.teacher!r}"
                    + (
                        did_you_mean(loss.teacher, names)
                        if names
                        else ", but the recipe has one teacher, which has no name: remove the key teacher"
                    )
                )

    def _check_routing(self) -> None:
        """Check the sources of teachers that teach some rows each."""
        routed = {spec.name: spec.sources for spec in self.teachers if spec.sources}
        if not routed:
            return
        problems = [
            f"teachers: {spec.name} has no sources and {next(iter(routed))} has: give sources to all or to none"
            for spec in self.teachers
            if not spec.sources
        ]
        owners: dict[str, str] = {}
        for name, sources in routed.items():
            for source in sources:
                if source not in self.data.sources:
                    problems.append(
                        f"teachers: {name} has the source {source!r}, which data does not have"
                        f"{did_you_mean(source, self.data.sources)}"
                    )
                if owners.setdefault(source, name) != name:
                    problems.append(f"teachers: the source {source!r} has two teachers, {owners[source]} and {name}")
        problems += [
            f"teachers: {spec.name} has a weight, which teachers with sources do not use: remove weight"
            for spec in self.teachers
            if spec.weight is not None
        ]
        problems += [
            f"losses: {loss.name} names a teacher, but each row has one: remove teacher"
            for loss in self.losses
            if loss.teacher
        ]
        problems += [
            f"teachers: {spec.name} has the kind {spec.kind}, which teaches all rows: remove sources"
            for spec in self.teachers
            if spec.sources and spec.kind in (*TRAINABLE_KINDS, "multi_view")
        ]
        if len(self.data.sources) < 2:
            problems.append("teachers: data has one source, so rows cannot be routed by source: add another source")
        if self.data.eval.path:
            problems.append(
                "teachers: the rows of data.eval.path are of no source, so they have no teacher to be compared with: "
                "set data.eval.holdout in place of data.eval.path, which needs sources that are not streamed"
            )
        if problems:
            raise Problems(problems)

    def _check_adapters(self) -> None:
        student, kinds = self.student, self.kinds
        if student.lora is None and "adapter_base" in kinds:
            raise ValueError(
                "teacher.kind adapter_base disables the student's adapters, and the student has none: add student.lora"
            )
        if student.lora is None and self.export == "merged":
            raise ValueError("export merged needs a student with adapters: add student.lora, or remove export")
        if self.export in ("ema", "mtp") and self.export not in kinds:
            raise ValueError(
                f"export {self.export} needs teacher.kind {self.export}; the kind is {', '.join(sorted(kinds))}"
            )
        if student.from_teacher and student.lora and self.export == "adapter":
            raise ValueError(
                "student.lora: adapters of a pruned student can only be loaded into the "
                "pruned model, which the run does not write: set export to merged, or write the model with "
                "`hf-distill prune` and set student.model to its folder"
            )
        if student.from_teacher and kinds == {"adapter_base"}:
            raise ValueError(
                "student.from_teacher needs a teacher with its own model, which kind adapter_base does not have"
            )

    def _check_student_source(self) -> None:
        model, pruned = self.student.model, self.student.from_teacher
        if "cached" in self.kinds and not self.primary_teacher.loaded_model and (model is None or pruned):
            raise ValueError(
                "student: a teacher cache holds no weights to prune a student from: set student.model, or "
                "teacher.source"
            )
        if self.primary_teacher.loaded_model and (model is None) == (pruned is None):
            raise ValueError("student: give either model or from_teacher")
        if not self.primary_teacher.loaded_model and model is None:
            raise ValueError(
                f"student: set student.model, because a teacher of kind {self.primary_teacher.kind} has no model"
            )

    def _check_mtp(self) -> None:
        if "mtp" not in self.kinds:
            return
        if self.student.lora or self.on_policy:
            raise ValueError(
                "teacher.kind mtp trains heads of a full student on the text of the data: remove student.lora and "
                "on_policy"
            )
        if self.teachers:
            return
        if self.distill.alpha or self.losses:
            raise ValueError("teacher.kind mtp teaches only its heads: set distill.alpha to 0, and remove losses")

    def _check_on_policy(self) -> None:
        if self.on_policy is None:
            return
        problems = []
        if "cached" in self.kinds:
            problems.append(
                "a teacher cache does not contain what the student generates: set teacher.use_source, or use "
                "kind frozen"
            )
        if self.on_policy.max_completion_length >= self.data.max_length:
            problems.append(
                "max_completion_length must be below data.max_length, to leave room for the prompt: raise "
                "data.max_length"
            )
        if self.data.packing:
            problems.append(
                "completions cannot be packed, because their length is not known: set data.packing to false"
            )
        if self.train.deepspeed or self.train.fsdp:
            problems.append(
                "a recipe cannot combine it with DeepSpeed or FSDP: remove train.deepspeed and train.fsdp, or use "
                "OnPolicyDistillTrainer in a script"
            )
        lowest = min(share for _, share in parse_schedule(self.on_policy.fraction, "fraction", 0, 1))
        if self.distill.alpha < 1 and lowest == 1:
            problems.append("no row has hard labels: set distill.alpha to 1, or on_policy.fraction below 1")
        if problems:
            raise ValueError(f"on_policy: {'; '.join(problems)}")

    def _check_streaming(self) -> None:
        streams = [name for name, source in self.data.sources.items() if source.streaming]
        if streams and (self.train.max_steps or 0) <= 0:
            raise ValueError(f"data.{streams[0]}.streaming: a stream has no known length: set train.max_steps")

    def _check_remote(self) -> None:
        """Check that the objective needs no temperature but 1 of a server that returns log-probabilities."""
        remote = {
            getattr(spec, "name", None) for spec in self.all_teachers if spec.kind == "remote" and spec.api != "hidden"
        }
        if not remote:
            return
        first = self.teachers[0].name if self.teachers else None
        temperatures: dict[str, object] = {}
        if (soft_temperature := self.distill.soft_temperature) is not None:
            temperatures["distill.temperature"] = soft_temperature
        temperatures |= {
            f"losses: {loss.name}": (loss.model_extra or {}).get("temperature", 1)
            for loss in self.losses
            if (loss.teacher or first) in remote
        }
        if wrong := [f"{name} {value}" for name, value in temperatures.items() if value != 1]:
            raise ValueError(
                "teacher.kind remote: a vLLM or SGLang server returns log-probabilities at temperature 1 only, and the "
                f"recipe has {', '.join(wrong)}: set it to 1, or use api: hidden (`hf-distill serve`) or a local "
                "teacher"
            )

    def _check_schedules(self) -> None:
        if self.data.scheduled and (self.train.max_steps or 0) <= 0:
            raise ValueError("data: a weight schedule needs a known number of steps: set train.max_steps")
        if self.data.scheduled and self.train.train_sampling_strategy not in (None, "sequential"):
            raise ValueError(
                "data: a weight schedule determines the order of rows: remove train.train_sampling_strategy"
            )

    @field_validator("projectors", mode="before")
    @classmethod
    def _expand_kind(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value
