"""What a recipe may say. Validation imports no torch: what the code knows is read from the packaged `schema.json`."""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from ..core.schedule import parse_schedule
from ..core.teacher_kinds import incompatible_teachers
from ..errors import did_you_mean
from .data import Data, OnPolicy
from .losses import Distill, LossSpec, ProjectorSpec, packaged_schema
from .models import NamedTeacher, Student, TeacherSpec
from .problems import Problems
from .ranges import RANGES, SHARES_OR_STEPS
from .stages import Stage, stage_problems
from .strict_model import Name, StrictModel

_JSON_TYPES: dict[str, Any] = {
    "integer": int,
    "number": int | float,
    "string": str,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": None,
}


class TrainBase(StrictModel):
    """Any field of transformers.TrainingArguments; output_dir is the run's folder."""

    @model_validator(mode="before")
    @classmethod
    def _yaml_no(cls, values: Any) -> Any:
        """YAML reads a bare `no` as False; `eval_strategy: no` means the word."""
        if not isinstance(values, dict):
            return values
        specs = packaged_schema()["properties"]["train"]["properties"]
        return {k: "no" if v is False and "no" in specs.get(k, {}).get("enum", ()) else v for k, v in values.items()}

    @model_validator(mode="after")
    def _stops_early(self):
        given: Any = self
        patience, strategy = given.early_stopping_patience, given.eval_strategy
        if patience is None:
            return self
        problems = []
        if strategy in (None, "no"):
            problems.append("nothing is evaluated in training: set eval_strategy to steps, and eval_steps, or to epoch")
        elif given.save_strategy not in (None, "best", strategy):
            problems.append(
                f"save_strategy {given.save_strategy} is not eval_strategy {strategy}: leave save_strategy out"
            )
        elif strategy == "steps" and given.save_steps and given.eval_steps and given.save_steps % given.eval_steps:
            problems.append(f"save_steps {given.save_steps} is no multiple of eval_steps {given.eval_steps}")
        if given.load_best_model_at_end is False:
            problems.append("the best checkpoint is exported: leave load_best_model_at_end out")
        if problems:
            raise ValueError("early_stopping_patience: " + "; ".join(problems))
        return self

    @model_validator(mode="after")
    def _whole_steps(self):
        """Steps above 1 are counted; below 1 they are a share of all."""
        steps = {name: getattr(self, name) for name in SHARES_OR_STEPS}
        broken = [f"{name} is {steps[name]}" for name in steps if (steps[name] or 0) > 1 and steps[name] % 1]
        if broken:
            raise ValueError(f"{'; '.join(broken)}: from 1 on it is a whole number of steps, below a share of all")
        return self

    @model_validator(mode="after")
    def _pushed_at_the_end(self):
        given: Any = self
        if given.hub_token:
            raise ValueError("hub_token: a recipe holds no secrets: run `hf auth login`, or set HF_TOKEN")
        if given.push_to_hub and not given.hub_model_id:
            raise ValueError("push_to_hub: where to? Give hub_model_id, org/name")
        if given.push_to_hub and given.hub_strategy not in (None, "end"):
            raise ValueError(
                f"hub_strategy is {given.hub_strategy}: a recipe's student is published once, with its evidence, when "
                "the run is over (end); a script with DistillTrainer pushes checkpoints too"
            )
        return self


def _train_fields() -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, spec in packaged_schema()["properties"]["train"]["properties"].items():
        kinds = [Literal[tuple(spec["enum"])]] if "enum" in spec else [_JSON_TYPES[t] for t in spec["type"]]
        fields[name] = (reduce(or_, kinds) | None, Field(None, **RANGES.get(name, {})))
    fields["output_dir"] = (Name, Field(min_length=1))
    return fields


if TYPE_CHECKING:
    Train = Any
else:
    Train = create_model("Train", __base__=TrainBase, __doc__=TrainBase.__doc__, **_train_fields())


class Recipe(StrictModel):
    """A whole distillation."""

    student: Student
    stages: list[Stage] = Field(
        default_factory=list,
        description="A chain: each stage's student is the next one's teacher. `student` is then the last stage's.",
    )
    teacher: TeacherSpec | None = None
    teachers: list[NamedTeacher] = Field(
        default_factory=list,
        description="Several in the place of one; losses say which they follow, by default the first.",
    )
    data: Data
    distill: Distill = Field(default_factory=lambda: Distill.model_validate({}))
    losses: list[LossSpec] = Field(default_factory=list)
    projectors: ProjectorSpec | None = Field(None, description="Between hidden states; a bare word is its kind.")
    on_policy: OnPolicy | None = Field(None, description="The student learns on completions that it writes itself.")
    train: Train
    control: Literal["sft", "direct"] | None = Field(
        None,
        description="sft: train the same student on the hard labels alone too; direct, of a chain: distil its last "
        "student from the first teacher too, in as many steps as all stages have.",
    )

    export: Literal["adapter", "merged", "ema", "mtp"] = Field(
        "adapter",
        description="adapter, merged: of a student with lora, its adapters alone, or a model with them merged in; "
        "ema: the average too, as RUN/ema; mtp: the heads too, as RUN/student/mtp.safetensors.",
    )
    extends: str | None = Field(None, description="A packaged recipe, whose values hold where none are given here.")
    requires: str | None = Field(None, description="Versions of hf-distill that it is for, such as '>=0.2'.")
    origin: str | None = Field(None, description="Where on the Hub it came from; said by what loads it.")

    @property
    def tokenizer_model(self) -> str:
        """The model whose tokenizer is used: the teacher, or the student that is its own."""
        return str(self.primary_teacher.model or self.student.model)

    @property
    def tokenizer_revision(self) -> str | None:
        """Of `base`."""
        return self.primary_teacher.revision if self.primary_teacher.model else self.student.revision

    @property
    def all_teachers(self) -> list[TeacherSpec]:
        """The teacher, or all of several; the source in the place of a cache that is to be left out."""
        return [spec.effective for spec in ([self.teacher] if self.teacher else self.teachers)]

    @property
    def primary_teacher(self) -> TeacherSpec:
        """The teacher; of several the first that is a model of its own, from which a student may be cut.

        In the place of a cache the teacher that wrote it, where the recipe says which.
        """
        speakers = [spec.source_teacher for spec in self.all_teachers]
        return next((spec for spec in speakers if spec.model), speakers[0])

    @property
    def kinds(self) -> set[str]:
        """Of the teachers."""
        return {spec.kind for spec in self.all_teachers}

    @model_validator(mode="before")
    @classmethod
    def _last_student(cls, values: Any) -> Any:
        """The student of a chain is that of its last stage, unless it is given as well."""
        stages = values.get("stages") if isinstance(values, dict) else None
        if stages and isinstance(stages, list) and isinstance(stages[-1], dict) and "student" in stages[-1]:
            return {"student": stages[-1]["student"], **values}
        return values

    @model_validator(mode="after")
    def _fits_together(self):
        """All contradictions between the parts at once; without a teacher nothing else can be told."""
        self._one_or_several()
        checks = (
            self._chain,
            self._adapters,
            self._check_student_source,
            self._check_mtp,
            self._check_on_policy,
            self._check_streaming,
        )
        problems = []
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

    def _chain(self) -> None:
        if problems := stage_problems(self):
            raise Problems(problems)

    def _one_or_several(self) -> None:
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("give either teacher, or teachers: a list of two or more")
        names = [spec.name for spec in self.teachers]
        if len(names) == 1 or len({*names}) < len(names):
            raise ValueError(f"teachers: two or more, of different names; got {', '.join(names)}")
        if problems := incompatible_teachers({spec.name: spec.kind for spec in self.teachers}):
            raise ValueError(f"teachers: {'; '.join(problems)}")
        for loss in self.losses:
            if loss.teacher is not None and loss.teacher not in names:
                raise ValueError(
                    f"losses: {loss.name} follows the teacher {loss.teacher!r}"
                    + (did_you_mean(loss.teacher, names) if names else ", and there is one teacher, without a name")
                )

    def _adapters(self) -> None:
        student, kinds = self.student, self.kinds
        if student.lora is None and "adapter_base" in kinds:
            raise ValueError("teacher.kind adapter_base switches the student's adapters off: give student.lora")
        if student.lora is None and self.export == "merged":
            raise ValueError("export merged merges adapters: give student.lora, or leave export out")
        if self.export in ("ema", "mtp") and self.export not in kinds:
            raise ValueError(f"export {self.export} needs teacher.kind {self.export}; it is {', '.join(sorted(kinds))}")
        if student.from_teacher and kinds == {"adapter_base"}:
            raise ValueError("student.from_teacher needs a teacher of its own, and adapter_base is none")

    def _check_student_source(self) -> None:
        given, cut = self.student.model, self.student.from_teacher
        if "cached" in self.kinds and not self.primary_teacher.model and (given is None or cut):
            raise ValueError(
                "student: a cache has no blocks: give the student's model, or teacher.source to cut it from"
            )
        if self.primary_teacher.model and (given is None) == (cut is None):
            raise ValueError("student: give either model or from_teacher")
        if not self.primary_teacher.model and given is None:
            raise ValueError(f"student: give its model, for a teacher of kind {self.primary_teacher.kind} has none")

    def _check_mtp(self) -> None:
        if "mtp" not in self.kinds:
            return
        if self.student.lora or self.on_policy:
            raise ValueError(
                "teacher.kind mtp trains heads of a whole student on the data's text: leave student.lora and on_policy "
                "out"
            )
        if self.teachers:
            return
        if "alpha" not in self.distill.model_fields_set:
            self.distill.alpha = 0.0
        if self.distill.alpha or self.losses:
            raise ValueError("teacher.kind mtp teaches its heads alone: set distill.alpha to 0, and leave losses out")

    def _check_on_policy(self) -> None:
        if self.on_policy is None:
            return
        problems = []
        if "cached" in self.kinds:
            problems.append(
                "no cache knows what the student will write: set teacher.use_source, or use a frozen teacher"
            )
        if self.on_policy.max_completion_length >= self.data.max_length:
            problems.append("max_completion_length leaves no room for a prompt: raise data.max_length")
        if self.data.packing:
            problems.append("completions have no length before they are written: leave data.packing out")
        if self.train.deepspeed or self.train.fsdp:
            problems.append("run it from a script with OnPolicyDistillTrainer, or leave train.deepspeed and fsdp out")
        lowest = min(share for _, share in parse_schedule(self.on_policy.fraction, "it", 0, 1))
        if self.distill.alpha < 1 and lowest == 1:
            problems.append("no row has hard labels: set distill.alpha to 1, or fraction below 1")
        if problems:
            raise ValueError(f"on_policy: {'; '.join(problems)}")

    def _check_streaming(self) -> None:
        streams = [name for name, source in self.data.sources.items() if source.streaming]
        if streams and (self.train.max_steps or 0) <= 0:
            raise ValueError(f"data.{streams[0]}.streaming: a stream has no length: set train.max_steps")

    def _check_schedules(self) -> None:
        if self.data.scheduled and (self.train.max_steps or 0) <= 0:
            raise ValueError("data: a weight over progress needs to know the end: set train.max_steps")
        if self.data.scheduled and self.train.train_sampling_strategy not in (None, "sequential"):
            raise ValueError("data: a weight over progress fixes the order: leave train.train_sampling_strategy out")

    @field_validator("projectors", mode="before")
    @classmethod
    def _kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value
