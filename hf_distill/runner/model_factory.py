"""A recipe's models: the teacher as it is to be held, students as they are to be trained."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from ..errors import DistillError, raise_if_any, require_package
from ..models.finite_weights import check_finite
from ..models.pruning import block_influence, cut_student, top_layers
from ..recipe.models import FIELDS
from ..recipe.schema import Recipe, Student, TeacherSpec
from ..teachers import (
    AdapterBaseTeacher,
    CachedTeacher,
    EMATeacher,
    FrozenTeacher,
    MTPTeacher,
    MultiTeacher,
    MultiViewTeacher,
    PeerTeacher,
    SnapshotTeacher,
    Teacher,
)
from ..teachers.loading import dtype_of, env_world_size, keep_layout, quantization_config, zero3_init_context
from ..trainer.config import DistillConfig
from .model_loading import checked, load_pretrained, resolve_model, trust_options

logger = logging.get_logger(__name__)
_CALIBRATION_ROWS = 8


class ModelFactory:
    """The teacher, and students: as many as are asked for, each with the same weights.

    teacher:   of the trainers
    layers:    blocks of the teacher that the student is made of; None where it is a model of its own
    influence: of each of the teacher's blocks, where they were chosen by it
    caches:    path of each cache -> what its manifest says of it

    Raises:
        DistillError: see `FrozenTeacher`.
    """

    def __init__(self, recipe: Recipe, args: DistillConfig, path: str, tokenizer: Any):
        self._student, self._spec, self._args, self._path = recipe.student, recipe.primary_teacher, args, path
        self._shard = bool(recipe.train.fsdp) and not args.fsdp  # see `train_arguments`
        self.layers: list[int] | None = None
        self.influence: list[float] | None = None
        self.caches: dict[str, dict[str, Any]] = {}
        self._donor: Student | TeacherSpec = self._spec if self._spec.model else self._student
        self._whole: nn.Module | None = None
        self._tokenizer = tokenizer
        specs = recipe.all_teachers
        if recipe.teacher:
            self.teacher = self._teacher(specs[0])
        else:
            weights = {spec.name: spec.weight for spec in recipe.teachers if spec.weight is not None}
            names = [spec.name for spec in recipe.teachers]
            self.teacher = MultiTeacher({n: self._teacher(spec) for n, spec in zip(names, specs, strict=True)}, weights)

    def _teacher(self, spec: TeacherSpec) -> Teacher:
        """A teacher of a recipe."""
        if spec.kind == "cached":
            source = self._frozen(spec.source_teacher) if spec.on_miss == "query_teacher" else None
            cached = CachedTeacher(str(spec.path), source=source, on_miss=spec.on_miss or "error")
            own, wrote = spec.source_teacher.model, cached.manifest.teacher["model"]
            if spec.source and own != wrote:
                raise DistillError(
                    f"{cached.path} was written by {wrote}, and its source is {own}: give the one or other."
                )
            self.caches[cached.path] = cached.manifest.facts()
            return cached
        if spec.kind == "frozen":
            return self._frozen(spec)
        return _moving(spec, lambda: self._load_peer(spec, self._path_of(spec)))

    def _path_of(self, spec: TeacherSpec) -> str:
        return self._path if spec is self._spec else resolve_model(str(spec.model))

    def _frozen(self, spec: TeacherSpec) -> FrozenTeacher:
        """The one of which students may be cut is loaded now, whole, if nothing else is said."""
        held = {name: getattr(spec, name) for name in ("quantization", "deepspeed", "fsdp", "device_map")}
        held = {name: value for name, value in held.items() if value}
        if spec is self._spec and not held:
            self._whole = self._load_whole().to(self._args.device)
            return FrozenTeacher(self._whole, processing_class=self._tokenizer)
        path = self._path_of(spec)
        options = {"dtype": spec.dtype, **_named(spec), **held, **trust_options(), **checked(path, spec.revision)}
        return FrozenTeacher(path, processing_class=self._tokenizer, **options)

    def _load_whole(self) -> Any:
        with zero3_init_context(None):
            return load_pretrained(AutoModelForCausalLM, self._path, dtype=self._donor.dtype, **_named(self._donor))

    def _load_peer(self, spec: TeacherSpec, path: str) -> Any:
        with zero3_init_context(None):
            return load_pretrained(AutoModelForCausalLM, path, dtype=torch.float32, **_named(spec))

    def student(self, rows: Any) -> nn.Module:
        """A student, ready to be trained.

        Args:
            rows: of the training data, for choosing the blocks of a student that is cut from its teacher.
        """
        spec = self._student
        model = self._base(rows, spec.quantization)
        if spec.lora is None:
            return model
        require_package("peft", "peft", "A student with lora")
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        torch.manual_seed(self._args.seed)  # of the adapters
        if spec.quantization:
            checkpointing = self._args.activation_checkpointing
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **spec.lora.model_dump()))

    def merge(self, folder: Path, rows: Any) -> None:
        """Turn a folder of adapters into one of the whole model with them merged in, in the student's dtype.

        Merged into the weights as they were loaded, also where the student was trained on quantised ones.

        Raises:
            RunError: the merged weights are not finite; the adapters stay as they are.
        """
        from peft import PeftModel

        with zero3_init_context(None):
            base = self._base(rows, quantization=None, whole=True)
            merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
        dtype = str(merged.dtype).removeprefix("torch.")
        advice = (
            f"The adapters stay there. Merged in {dtype}, they overflow or are not finite: merge them in another dtype "
            f"(AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float32).merge_and_unload()), or "
            "set export to adapter."
        )
        buffers = dict(merged.named_buffers()).keys()
        check_finite(merged.state_dict(), folder, owner="the merged student", advice=advice, buffers=buffers)
        for file in folder.glob("adapter_*"):
            file.unlink()
        merged.save_pretrained(folder)

    def _base(self, rows: Any, quantization: str | None, whole: bool = False) -> Any:
        """The student without adapters; `whole`: on this process alone."""
        spec, kwargs = self._student, _named(self._student)
        if spec.from_teacher:
            return self._cut(rows)
        path = resolve_model(str(spec.model))
        if quantization:
            dtype = dtype_of(load_pretrained(AutoConfig, path, revision=spec.revision), {"dtype": spec.dtype})
            kwargs["quantization_config"] = quantization_config(quantization, dtype)
            if self._args.device.type != "cpu":
                kwargs["device_map"] = {"": self._args.device}
        if self._shard and not whole:
            kwargs["distributed_config"] = DistributedConfig(fsdp_size=self._args.world_size)
        model = load_pretrained(AutoModelForCausalLM, path, dtype=spec.dtype, **kwargs)
        return keep_layout(model) if quantization else model

    def _cut(self, rows: Any) -> nn.Module:
        spec, cut = self._student, self._student.from_teacher
        assert cut is not None
        whole = self._whole or self._load_whole()
        if self.layers is None:
            self.layers = cut.layers
        if self.layers is None:
            ids = ({"input_ids": torch.tensor([row["input_ids"]])} for row in islice(rows, _CALIBRATION_ROWS))
            self.influence = block_influence(whole, ids)
            self.layers = top_layers(self.influence, int(cut.keep_layers or 0))
        student = cut_student(whole, self.layers)
        student.to(dtype_of(whole.config, {"dtype": spec.dtype}))
        if spec.attn_implementation:
            student.set_attn_implementation(spec.attn_implementation)
        return student


def _moving(spec: TeacherSpec, load_peer: Callable[[], nn.Module]) -> Teacher:
    """A teacher that moves, of its kind's fields."""
    given = {name: value for name in FIELDS[spec.kind] if (value := getattr(spec, name)) is not None}
    if spec.kind in ("online", "mutual"):
        given = {
            name: value for name, value in given.items() if name not in ("model", "revision", "attn_implementation")
        }
        return PeerTeacher(load_peer(), mutual=spec.kind == "mutual", **given)
    if spec.view is not None:
        given["view"] = spec.view.model_dump()
    kinds: dict[str, Any] = {
        "adapter_base": AdapterBaseTeacher,
        "ema": EMATeacher,
        "snapshot": SnapshotTeacher,
        "multi_view": MultiViewTeacher,
        "mtp": MTPTeacher,
    }
    return kinds[spec.kind](**given)


def check_launch(recipe: Recipe) -> None:
    """Refuse a launch in which the student's strategy cannot run, before anything is loaded.

    Raises:
        DistillError: all that is wrong, with what to do.
    """
    problems, train, student = [], recipe.train, recipe.student
    stage = (train.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)
    if train.deepspeed and train.fsdp:
        problems.append("train.deepspeed and train.fsdp exclude each other: choose one")
    if train.deepspeed and env_world_size() == 0:
        problems.append("train.deepspeed needs a launcher: torchrun --nproc_per_node 2 -m hf_distill run ...")
    if train.fsdp and env_world_size() < 2:
        problems.append(
            f"train.fsdp shards the student over processes of a launcher; here "
            f"{'is 1' if env_world_size() else 'is none'}: torchrun --nproc_per_node 2 -m hf_distill run ..."
        )
    if train.fsdp and student.from_teacher and not torch.accelerator.is_available():
        problems.append(
            "FSDP on CPUs shards a student as it loads, and one cut from its teacher is not loaded: use DDP"
        )
    if student.quantization and (stage == 3 or train.fsdp):
        problems.append("a quantised student is not sharded: choose DDP, zero1-student.json or zero2-student.json")
    if stage == 3 and train.deepspeed["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save") is False:
        problems.append(
            "train.deepspeed: stage3_gather_16bit_weights_on_model_save is false, so the student's folder would hold "
            "shards that from_pretrained cannot load: set it to true"
        )
    raise_if_any(problems)


def _named(spec: Student | TeacherSpec) -> dict[str, Any]:
    """Arguments of from_pretrained; what is not given is left to it."""
    given = {"revision": spec.revision, "attn_implementation": spec.attn_implementation}
    return {key: value for key, value in given.items() if value is not None}
