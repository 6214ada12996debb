"""Placement strategies: how teacher and student are distributed over a number of GPUs."""

from dataclasses import dataclass

from ..core.deepspeed_config import zero_options
from ..core.json_types import JSONObject
from ..errors import DistillError
from ..recipe.schema import Recipe

SHARDED = ("zero3", "fsdp2")
# In order of preference: least communication first.
TEACHERS = ("self", "remote", "cache", "full", "int8", "nf4", "device_map", "zero3", "fsdp2")
STUDENTS = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Strategy:
    """The placement of a teacher and a student.

    teacher:           self: the student's base model; remote: a server; cache: a teacher cache on disk; full, int8 or
                       nf4: each process has a copy, unquantized or quantized; zero3, fsdp2: sharded over the processes;
                       device_map: spread over the GPUs of one process
    student:           single: one process; ddp: each process has a copy; zero1: optimizer states are sharded; zero2:
                       gradients too; zero3, fsdp2: weights too
    offload_teacher:   a ZeRO-3 teacher's shards are in host memory
    offload_student:   a ZeRO-3 student's shards are in host memory
    offload_optimizer: optimizer states and gradients are in host memory
    """

    teacher: str
    student: str
    offload_teacher: bool = False
    offload_student: bool = False
    offload_optimizer: bool = False

    @property
    def name(self) -> str:
        """Name for tables, "teacher + student"; ^ marks a model that is offloaded to host memory."""
        student = self.offload_student or self.offload_optimizer
        return f"{self.teacher}{'^' * self.offload_teacher} + {self.student}{'^' * student}"

    @property
    def has_offload(self) -> bool:
        """Whether anything is offloaded to host memory."""
        return self.offload_teacher or self.offload_student or self.offload_optimizer

    @property
    def is_sharded(self) -> bool:
        """Whether the weights of a model are sharded over processes."""
        return self.teacher in SHARDED or self.student in SHARDED

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the student is trained by DeepSpeed."""
        return self.student.startswith("zero")

    @property
    def shards_with_gpus(self) -> bool:
        """Whether it needs less memory per GPU on more GPUs."""
        return self.is_sharded or self.student in ("zero1", "zero2") or self.teacher == "device_map"

    @property
    def overrides(self) -> list[str]:
        """Overrides `KEY=VALUE` that make a recipe use this strategy."""
        offload = "-offload" if self.offload_teacher else ""
        teacher = {
            "quantization": self.teacher if self.teacher in ("nf4", "int8") else "null",
            "deepspeed": f"zero3-teacher{offload}.json" if self.teacher == "zero3" else "null",
            "fsdp": str(self.teacher == "fsdp2").lower(),
            "device_map": "auto" if self.teacher == "device_map" else "null",
        }
        offload = "-offload" if self.offload_student or self.offload_optimizer else ""
        train = {
            "deepspeed": f"{self.student}-student{offload}.json" if self.uses_deepspeed else "null",
            "fsdp": str(self.student == "fsdp2").lower(),
        }
        return [f"teacher.{k}={v}" for k, v in teacher.items()] + [f"train.{k}={v}" for k, v in train.items()]

    def processes(self, gpus: int) -> int:
        """Return the number of training processes."""
        return 1 if self.teacher == "device_map" else gpus

    def for_gpus(self, gpus: int) -> "Strategy":
        """Return the strategy for a number of GPUs: `single` becomes `ddp` where there are several processes."""
        if self.student not in ("single", "ddp"):
            return self
        kind = "single" if self.processes(gpus) == 1 else "ddp"
        return Strategy(self.teacher, kind, self.offload_teacher)

    @property
    def preference(self) -> tuple[int, int, int, int]:
        """Sort key, smaller is better: a more precise teacher, then no offloading, then less communication."""
        precision = ("int8", "nf4").index(self.teacher) + 1 if self.teacher in ("int8", "nf4") else 0
        return precision, self.has_offload, TEACHERS.index(self.teacher), STUDENTS.index(self.student)

    @classmethod
    def of_recipe(cls, recipe: Recipe, gpus: int) -> "Strategy":
        """Return the strategy of a recipe.

        Raises:
            DistillError: the strategy shards a model without offloading, and there is one GPU.
        """
        spec, train = recipe.primary_teacher, recipe.train
        teacher: str = spec.quantization or ("zero3" if spec.deepspeed else "fsdp2" if spec.fsdp else "full")
        if spec.device_map and not spec.quantization:
            teacher = "device_map"
        teacher = teacher_absence(recipe) or teacher
        teacher_zero, zero = zero_options(spec.deepspeed), zero_options(train.deepspeed)
        stage = zero.get("stage", 0)
        student = f"zero{stage}" if stage else "fsdp2" if train.fsdp else "ddp"
        strategy = cls(
            teacher,
            student,
            _has_offload(teacher_zero, "param"),
            _has_offload(zero, "param"),
            _has_offload(zero, "optimizer"),
        ).for_gpus(gpus)
        if strategy.is_sharded and not strategy.has_offload and gpus == 1:
            changes = [change for change in cls("nf4", "single").overrides if change not in strategy.overrides]
            raise DistillError(
                f"The recipe's strategy, teacher {teacher} and student {student}, needs at least 2 processes: on one "
                "GPU there is nothing to shard over. Pass --gpus 2 or more; or use full copies of the models: "
                f"{' '.join(changes)}, with student.lora to train adapters; or offload with "
                "zero3-teacher-offload.json and zero3-student-offload.json."
            )
        return strategy


def alternatives(method: str, gpus: int, absent: str = "") -> list[Strategy]:
    """Return the strategies that can be combined.

    A teacher or student with quantized weights is not sharded, nor by ZeRO-3 a student that is trained with rounded
    weights; DeepSpeed and FSDP2 are not mixed; adapters are too small to be
    sharded without the model.

    Args:
        method: "full", "quantized", "lora" or "qlora".
        gpus: number of GPUs; on one there is nothing to shard.
        absent: why no teacher model is loaded, see `Workload.teacher_absent_because`.
    """
    teachers = (absent,) if absent else ("full", "int8", "nf4")
    if gpus == 1:
        return [Strategy(teacher, "single") for teacher in teachers]
    without_zero3 = tuple(student for student in STUDENTS[1:] if student != "zero3")
    students = {"full": STUDENTS[1:], "quantized": without_zero3, "lora": ("ddp", *SHARDED), "qlora": ("ddp",)}[method]
    strategies = [Strategy(teacher, student) for teacher in teachers for student in students]
    if absent:
        return strategies
    strategies += [Strategy("zero3", student) for student in students if student != "fsdp2"]
    return strategies + [Strategy("fsdp2", student) for student in students if student == "fsdp2"]


def teacher_absence(recipe: Recipe) -> str:
    """Return why no teacher model is loaded, see `Workload`; a cache counts only if it serves every example."""
    if all(spec.kind == "cached" and not spec.on_miss for spec in recipe.all_teachers):
        return "cache"
    if recipe.kinds == {"remote"}:
        return "remote"
    return "self" if recipe.primary_teacher.loaded_model is None else ""


def _has_offload(zero: JSONObject, part: str) -> bool:
    target = zero.get(f"offload_{part}")
    return isinstance(target, dict) and target.get("device", "none") != "none"
