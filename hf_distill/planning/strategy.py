"""How teacher and student may be held on a number of GPUs."""

from dataclasses import dataclass
from typing import Any

from ..errors import DistillError
from ..recipe.schema import Recipe

SHARDED = ("zero3", "fsdp2")
# The least communication first.
TEACHERS = ("own", "cache", "whole", "int8", "nf4", "device_map", "zero3", "fsdp2")
STUDENTS = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Strategy:
    """How a teacher and a student are held.

    teacher:           own: the student's base; cache: on disk; whole, int8 or nf4: a copy each process; zero3, fsdp2:
                       a share; device_map: over the GPUs of one process
    student:           single (one process), ddp: a copy each process; zero1: shares of the optimizer; zero2: of
                       gradients too; zero3, fsdp2: of everything
    offload_teacher:   a ZeRO-3 teacher's shares are in host memory
    offload_student:   a ZeRO-3 student's
    offload_optimizer: optimizer and gradients are in host memory
    """

    teacher: str
    student: str
    offload_teacher: bool = False
    offload_student: bool = False
    offload_optimizer: bool = False

    @property
    def name(self) -> str:
        """In words; ^ where something is in host memory."""
        student = self.offload_student or self.offload_optimizer
        return f"{self.teacher}{'^' * self.offload_teacher} + {self.student}{'^' * student}"

    @property
    def offloads(self) -> bool:
        """Whether something is in host memory."""
        return self.offload_teacher or self.offload_student or self.offload_optimizer

    @property
    def sharded(self) -> bool:
        """Whether a model is split over processes."""
        return self.teacher in SHARDED or self.student in SHARDED

    @property
    def deepspeed(self) -> bool:
        """Whether the student is trained by DeepSpeed."""
        return self.student.startswith("zero")

    @property
    def splits(self) -> bool:
        """Whether it takes less of each GPU, the more there are."""
        return self.sharded or self.student in ("zero1", "zero2") or self.teacher == "device_map"

    @property
    def overrides(self) -> list[str]:
        """What makes it a recipe's own."""
        offload = "-offload" if self.offload_teacher else ""
        teacher = {
            "quantization": self.teacher if self.teacher in ("nf4", "int8") else "null",
            "deepspeed": f"zero3-teacher{offload}.json" if self.teacher == "zero3" else "null",
            "fsdp": str(self.teacher == "fsdp2").lower(),
            "device_map": "auto" if self.teacher == "device_map" else "null",
        }
        offload = "-offload" if self.offload_student or self.offload_optimizer else ""
        train = {
            "deepspeed": f"{self.student}-student{offload}.json" if self.deepspeed else "null",
            "fsdp": str(self.student == "fsdp2").lower(),
        }
        return [f"teacher.{k}={v}" for k, v in teacher.items()] + [f"train.{k}={v}" for k, v in train.items()]

    def processes(self, gpus: int) -> int:
        """How many processes train."""
        return 1 if self.teacher == "device_map" else gpus

    def for_gpus(self, gpus: int) -> "Strategy":
        """The same on so many GPUs: a copy each process is `single` on one, `ddp` on more."""
        if self.student not in ("single", "ddp"):
            return self
        kind = "single" if self.processes(gpus) == 1 else "ddp"
        return Strategy(self.teacher, kind, self.offload_teacher)

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Smaller is to be preferred at an equal number of GPUs: a more precise teacher, then less communication."""
        precision = ("int8", "nf4").index(self.teacher) + 1 if self.teacher in ("int8", "nf4") else 0
        return precision, self.offloads, TEACHERS.index(self.teacher), STUDENTS.index(self.student)

    @classmethod
    def of_recipe(cls, recipe: Recipe, gpus: int) -> "Strategy":
        """The recipe's own.

        Raises:
            DistillError: it is sharded, and there is one GPU and no offload.
        """
        spec, train = recipe.primary_teacher, recipe.train
        teacher: str = spec.quantization or ("zero3" if spec.deepspeed else "fsdp2" if spec.fsdp else "whole")
        if spec.device_map and not spec.quantization:
            teacher = "device_map"
        teacher = teacher_absence(recipe) or teacher
        teacher_zero, zero = (
            config if isinstance(config, dict) else {} for config in (spec.deepspeed, train.deepspeed)
        )
        stage = zero.get("zero_optimization", {}).get("stage", 0)
        student = f"zero{stage}" if stage else "fsdp2" if train.fsdp else "ddp"
        strategy = cls(
            teacher, student, _offloads(teacher_zero, "param"), _offloads(zero, "param"), _offloads(zero, "optimizer")
        ).for_gpus(gpus)
        if strategy.sharded and not strategy.offloads and gpus == 1:
            whole = [change for change in cls("nf4", "single").overrides if change not in strategy.overrides]
            raise DistillError(
                f"The recipe's strategy, teacher {teacher} and student {student}, needs at least 2 processes: on one "
                f"GPU nothing is sharded. Give --gpus 2 or more; or hold the models whole "
                f"({' '.join(whole)}, with student.lora to train adapters); or offload with "
                "zero3-teacher-offload.json and zero3-student-offload.json."
            )
        return strategy


def alternatives(method: str, gpus: int, absent: str = "") -> list[Strategy]:
    """The strategies that make sense.

    A quantised teacher is not sharded, nor a quantised student; DeepSpeed and FSDP2 are not mixed; adapters are too
    few to shard without the model.

    Args:
        method: "full", "lora" or "qlora".
        gpus: one of them leaves nothing to shard.
        absent: see `Workload`.
    """
    teachers = (absent,) if absent else ("whole", "int8", "nf4")
    if gpus == 1:
        return [Strategy(teacher, "single") for teacher in teachers]
    students = {"full": STUDENTS[1:], "lora": ("ddp", *SHARDED), "qlora": ("ddp",)}[method]
    found = [Strategy(teacher, student) for teacher in teachers for student in students]
    if absent:
        return found
    found += [Strategy("zero3", student) for student in students if student != "fsdp2"]
    return found + [Strategy("fsdp2", student) for student in students if student == "fsdp2"]


def teacher_absence(recipe: Recipe) -> str:
    """Why no teacher of the recipe is in memory, see `Workload`; a cache counts where it is all there is."""
    if all(spec.kind == "cached" and not spec.on_miss for spec in recipe.all_teachers):
        return "cache"
    return "own" if recipe.primary_teacher.model is None else ""


def _offloads(config: dict[str, Any], what: str) -> bool:
    place = config.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return place.get("device", "none") != "none"
