"""Builds the teacher and the students of a recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from ..cache.fingerprints import tokenizer_fingerprint
from ..core.devices import default_device
from ..core.json_types import JSONObject
from ..core.results import ModelFacts
from ..data import Examples, OtherTokenizer
from ..errors import DistillError, raise_if_any, require_package
from ..models.finite_weights import check_finite
from ..models.model_types import unwrap_model
from ..models.quantized_training import prepare_quantized_student
from ..recipe.models import FIELDS, REMOTE_OPTIONS
from ..recipe.schema import Recipe, Student, TeacherSpec
from ..teachers import (
    AdapterBaseTeacher,
    CachedTeacher,
    CrossTokenizerTeacher,
    EMATeacher,
    FrozenTeacher,
    MTPTeacher,
    MultiTeacher,
    MultiViewTeacher,
    PeerTeacher,
    RemoteTeacher,
    RoutedTeacher,
    SnapshotTeacher,
    Teacher,
    TrimmedVocabularyTeacher,
)
from ..teachers.loading import (
    direct_loading,
    dtype_of,
    env_world_size,
    keep_layout,
    quantization_config,
    zero3_init_context,
)
from ..trainer.config import DistillConfig
from .adapters import check_target_modules
from .model_loading import check_and_pin, load_pretrained, resolve_model, trust_options
from .pruning import Pruner, check_widths
from .quantized_student import launch_problems
from .tasks import Task
from .trimmed_rows import Trimming

logger = logging.get_logger(__name__)
_WITH_OWN_IDS = ("frozen", "cached", "remote")  # kinds of teachers that do not have the student's vocabulary


class ModelFactory:
    """Builds the teacher once, and any number of students with the same initial weights.

    Args:
        recipe: The recipe.
        task: The task of the recipe, which has prepared its data.
        args: The training arguments.
        path: Path or id of the tokenizer model.
        tokenizer: The student's tokenizer or processor.
        other_tokenizers: The teachers that have another tokenizer.

    Attributes:
        teacher: The teacher for the trainers.
        pruner: Prunes the students; None if the student is not pruned from a model.
        cut_facts: What a pruned student consists of, and the block influence of the teacher's layers if it selected
            them; empty for other students.
        caches: Path of each teacher cache -> facts of its manifest.
        remote_teachers: Name of each teacher on a server -> the teacher.

    Raises:
        DistillError: A model cannot be loaded; see `FrozenTeacher`.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        args: DistillConfig,
        path: str,
        tokenizer: Any,
        other_tokenizers: Sequence[OtherTokenizer] = (),
    ):
        self._student, self._spec, self._args, self._path = recipe.student, recipe.primary_teacher, args, path
        self._task = task
        if self._spec.loaded_model:
            self._path = resolve_model(self._spec.loaded_model)
        self._shard = bool(recipe.train.fsdp) and not args.fsdp  # FSDP on CPUs; see `train_arguments`
        cut, trimming = recipe.student.from_teacher, task.trimming
        self.pruner = Pruner(cut, trimming.kept_ids if trimming else None) if cut else None
        self.cut_facts: ModelFacts = {}
        self.caches: dict[str, JSONObject] = {}
        self.remote_teachers: dict[str, RemoteTeacher] = {}
        self._pruning_source: Student | TeacherSpec = self._spec if self._spec.loaded_model else self._student
        if cut and cut.prunes_width:
            config = load_pretrained(AutoConfig, self._path, revision=self._pruning_source.revision)
            check_widths(cut, task.auto_class, config)
        self._full_model: PreTrainedModel | None = None
        self._tokenizer, self._other_tokenizers = tokenizer, {each.name: each.tokenizer for each in other_tokenizers}
        self._tokenizer_model = recipe.tokenizer_model
        specs = recipe.all_teachers
        if recipe.teacher:
            self.teacher = self._build_teacher(specs[0], None)
        else:
            weights = {spec.name: spec.weight for spec in recipe.teachers if spec.weight is not None}
            names = [spec.name for spec in recipe.teachers]
            teachers = {name: self._build_teacher(spec, name) for name, spec in zip(names, specs, strict=True)}
            sources = {spec.name: spec.sources for spec in recipe.teachers if spec.sources}
            self.teacher = RoutedTeacher(teachers, sources) if sources else MultiTeacher(teachers, weights)

    def _build_teacher(self, spec: TeacherSpec, name: str | None) -> Teacher:
        """Build one teacher of the recipe, which may have a name."""
        tokenizer = self._other_tokenizers.get(name)
        if tokenizer is None and self._task.trimming is not None:
            if spec.kind in _WITH_OWN_IDS:
                return self._build_full_teacher(spec, self._task.trimming)
            if spec.model is not None and spec.model != self._student.model:
                raise DistillError(
                    f"The student's vocabulary is a trimmed one, and a teacher of kind {spec.kind} reads the student's "
                    f"tokens, of which {spec.model} has others: use a frozen, cached or remote teacher."
                )
        if tokenizer is None:
            is_shared = self._task.shares_processor or spec.loaded_model == self._tokenizer_model
            return self._build_one(spec, self._tokenizer if is_shared else None)
        return CrossTokenizerTeacher(self._build_one(spec, tokenizer), processing_class=tokenizer, name=name)

    def _build_full_teacher(self, spec: TeacherSpec, trimming: Trimming) -> Teacher:
        """Build a teacher that has all tokens of a vocabulary of which the student has some."""
        full, teacher = trimming.full_tokenizer, self._build_one(spec, trimming.full_tokenizer)
        if not isinstance(teacher, CachedTeacher) or teacher.manifest.tokenizer != tokenizer_fingerprint(
            self._tokenizer
        ):
            return TrimmedVocabularyTeacher(teacher, processing_class=full)
        if teacher.source is not None:  # the cache was written for this student
            teacher.source = TrimmedVocabularyTeacher(teacher.source, processing_class=full)
        return teacher

    def _build_one(self, spec: TeacherSpec, tokenizer: Any) -> Teacher:
        """Build one teacher of the recipe, which reads the tokens of a tokenizer; None: that in the model's folder."""
        if spec.kind == "cached":
            source = None
            if spec.on_miss == "query_teacher":
                source = self._build_frozen_teacher(spec.source_teacher, tokenizer)
            cached = CachedTeacher(str(spec.path), source=source, on_miss=spec.on_miss or "error")
            source_model, cached_model = spec.source_teacher.model, cached.manifest.teacher["model"]
            if spec.source and source_model != cached_model:
                raise DistillError(
                    f"The cache {cached.path} was written by the teacher {cached_model}, but its source is "
                    f"{source_model}. "
                    "Set teacher.path or teacher.source.model so that both are the same."
                )
            self.caches[cached.path] = cached.manifest.summary()
            return cached
        if spec.kind == "remote":
            options = {name: value for name in REMOTE_OPTIONS if (value := getattr(spec, name)) is not None}
            if spec.dtype != "auto":
                options["dtype"] = spec.dtype
            remote = RemoteTeacher(spec.url or (), model=spec.model, api=spec.api or "vllm", **options)
            self.remote_teachers[getattr(spec, "name", "teacher")] = remote
            return remote
        if spec.kind == "frozen":
            return self._build_frozen_teacher(spec, tokenizer)
        return _build_non_frozen_teacher(spec, lambda: self._load_peer(spec, self._path_of(spec)))

    def _path_of(self, spec: TeacherSpec) -> str:
        return self._path if spec is self._spec else resolve_model(str(spec.model))

    def _build_frozen_teacher(self, spec: TeacherSpec, tokenizer: Any) -> FrozenTeacher:
        """Build a frozen teacher. The primary teacher is loaded now, unless it has a placement option."""
        if spec is self._spec and not _placement(spec):
            self._full_model = self._load_full_model(**direct_loading(self._args.device))
            if not hasattr(self._full_model, "hf_device_map"):
                cast(nn.Module, self._full_model).to(self._args.device)
            return FrozenTeacher(self._full_model, processing_class=tokenizer)
        return build_frozen_teacher(spec, self._path_of(spec), tokenizer)[0]

    def _load_full_model(self, **placement: object) -> PreTrainedModel:
        with zero3_init_context(None):
            return load_pretrained(
                self._task.auto_class,
                self._path,
                dtype=self._pruning_source.dtype,
                **_pretrained_kwargs(self._pruning_source),
                **placement,
            )

    def _load_peer(self, spec: TeacherSpec, path: str) -> PreTrainedModel:
        with zero3_init_context(None):
            return load_pretrained(
                self._task.auto_class,
                path,
                dtype=torch.float32,
                **_pretrained_kwargs(spec),
                **self._task.model_options(),
            )

    def student(self, rows: Examples, quantize: bool = True) -> nn.Module:
        """Build a student that is ready to train.

        Args:
            rows: Training rows, which measure what a pruned student keeps of its teacher.
            quantize: Whether a student with `quantize` computes with quantized weights.
        """
        spec = self._student
        model = self._task.adapt_student(self._base_student(rows, spec.quantization))
        if spec.quantize and quantize:
            return prepare_quantized_student(model, spec.quantize.resolved)
        if spec.lora is None:
            return model
        require_package("peft", "peft", "A student with lora")
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        check_target_modules(model, spec.lora.target_modules)
        torch.manual_seed(self._args.seed)  # for the initialization of the adapters
        if spec.quantization:
            checkpointing = self._args.activation_checkpointing
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **spec.lora.model_dump()))

    def merge(self, folder: Path, rows: Examples) -> None:
        """Merge the adapters in a folder into the full model, in the dtype of the student, and save it there.

        The adapters are merged into the unquantized weights, even if they were trained on quantized ones.

        Args:
            folder: Folder with the saved adapters.
            rows: Training rows; see `student`.

        Raises:
            RunError: The merged weights are not finite. The adapters are kept.
        """
        from peft import PeftModel

        with zero3_init_context(None):
            base = self._base_student(rows, quantization=None, unsharded=True)
            merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
        dtype = str(merged.dtype).removeprefix("torch.")
        advice = (
            f"The folder keeps the adapters. Merged in {dtype}, the weights overflow or are not finite. Merge "
            "them in another "
            f"dtype (AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}, "
            "dtype=torch.float32).merge_and_unload()), or "
            "set export to adapter."
        )
        buffers = dict(merged.named_buffers()).keys()
        check_finite(merged.state_dict(), folder, owner="the merged student", advice=advice, buffers=buffers)
        merged.save_pretrained(folder)
        for file in (*folder.glob("adapter_*"), folder / "README.md"):  # the files of peft
            file.unlink(missing_ok=True)

    def _base_student(self, rows: Examples, quantization: str | None, unsharded: bool = False) -> nn.Module:
        """Load the student without adapters; with `unsharded` it is on the CPU and not sharded over the processes."""
        spec, kwargs = self._student, _pretrained_kwargs(self._student)
        if spec.from_teacher:
            return self._pruned_student(rows)
        path = resolve_model(str(spec.model))
        if quantization:
            dtype = dtype_of(load_pretrained(AutoConfig, path, revision=spec.revision), {"dtype": spec.dtype})
            kwargs["quantization_config"] = quantization_config(quantization, dtype)
            if self._args.device.type != "cpu":
                kwargs["device_map"] = {"": self._args.device}
        elif not (unsharded or self._shard or self._args.deepspeed or self._args.fsdp):
            kwargs |= direct_loading(self._args.device)  # DeepSpeed and FSDP cast and shard it on the CPU first
        if self._shard and not unsharded:
            kwargs["distributed_config"] = DistributedConfig(fsdp_size=self._args.world_size)
        model = load_pretrained(self._task.auto_class, path, dtype=spec.dtype, **kwargs, **self._task.model_options())
        _check_trainable(model, spec)
        return keep_layout(model) if quantization else model

    def _pruned_student(self, rows: Examples) -> nn.Module:
        spec, pruner = self._student, self.pruner
        assert pruner is not None
        full_model = self._full_model or self._load_full_model()
        student, self.cut_facts = self._task.cut(full_model, rows, pruner)
        cast(nn.Module, student).to(dtype_of(unwrap_model(full_model).config, {"dtype": spec.dtype}))
        if spec.attn_implementation:
            cast(PreTrainedModel, student).set_attn_implementation(spec.attn_implementation)
        return student


def _check_trainable(model: PreTrainedModel, spec: Student) -> None:
    """Check that the checkpoint of a student can be trained: a quantized one only with adapters, if at all.

    Raises:
        DistillError: It cannot.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and (spec.lora is None or not quantizer.is_trainable):
        raise DistillError(
            f"student.model: {spec.model} is a quantized checkpoint ({model.quantization_method}), whose weights "
            "cannot be trained: give the model in full precision. That of a run with student.quantize is in "
            "its folder student-unquantized; set student.quantize to train it with quantization again."
        )


def build_frozen_teacher(spec: TeacherSpec, path: str, tokenizer: Any = None) -> tuple[FrozenTeacher, dict[str, Any]]:
    """Build a frozen teacher, whose weights are loaded when it is prepared.

    Args:
        spec: Its section of the recipe.
        path: Path or id of its model; see `resolve_model`.
        tokenizer: Its tokenizer, or None.

    Returns:
        The teacher, and the arguments of from_pretrained, with the revision that was checked.
    """
    loading: dict[str, Any] = {
        "dtype": spec.dtype,
        **_pretrained_kwargs(spec),
        **trust_options(),
        **check_and_pin(path, spec.revision),
    }
    return FrozenTeacher(path, processing_class=tokenizer, **_placement(spec), **loading), loading


def _placement(spec: TeacherSpec) -> dict[str, Any]:
    """Return the placement options that a recipe sets."""
    options = {name: getattr(spec, name) for name in ("quantization", "deepspeed", "fsdp", "device_map")}
    return {name: value for name, value in options.items() if value}


def _build_non_frozen_teacher(spec: TeacherSpec, load_peer: Callable[[], nn.Module]) -> Teacher:
    """Build a teacher that changes during training, from the fields of its kind."""
    options = {name: value for name in FIELDS[spec.kind] if (value := getattr(spec, name)) is not None}
    if spec.kind in ("online", "mutual"):
        options = {
            name: value for name, value in options.items() if name not in ("model", "revision", "attn_implementation")
        }
        return PeerTeacher(load_peer(), mutual=spec.kind == "mutual", **options)
    if spec.view is not None:
        options["view"] = spec.view.model_dump()
    kinds: dict[str, Callable[..., Teacher]] = {
        "adapter_base": AdapterBaseTeacher,
        "ema": EMATeacher,
        "snapshot": SnapshotTeacher,
        "multi_view": MultiViewTeacher,
        "mtp": MTPTeacher,
    }
    return kinds[spec.kind](**options)


def check_launch(recipe: Recipe) -> None:
    """Check before anything is loaded that the sharding options of a recipe can run in this launch.

    Raises:
        DistillError: They cannot. The message lists all problems.
    """
    problems, train, student = launch_problems(recipe), recipe.train, recipe.student
    if train.deepspeed and env_world_size() == 0:
        problems.append("train.deepspeed needs a launcher: run torchrun --nproc_per_node 2 -m hf_distill run ...")
    if train.fsdp and env_world_size() < 2:
        problems.append(
            "train.fsdp shards the student over two or more processes; this run has "
            f"{'one process' if env_world_size() else 'no launcher'}: run torchrun --nproc_per_node 2 -m "
            "hf_distill run ..."
        )
    if train.fsdp and default_device().type == "cpu":
        keys = {"pruned from its teacher": student.from_teacher, "quantized": student.quantize}
        problems += [
            f"train.fsdp on CPUs shards a student while it is loaded, which is not possible for a student that is "
            f"{description}: remove train.fsdp to train with DDP"
            for description, key in keys.items()
            if key
        ]
    raise_if_any(problems)


def _pretrained_kwargs(spec: Student | TeacherSpec) -> dict[str, object]:
    """Return the arguments of from_pretrained that a recipe sets."""
    options = {"revision": spec.revision, "attn_implementation": spec.attn_implementation}
    return {key: value for key, value in options.items() if value is not None}
