"""The `student` and `teacher` sections of a recipe. Imports no torch."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from ..core.component_options import ViewOptions
from ..core.deepspeed_config import check_placement
from ..core.prompt_template import template_columns
from ..core.schedule import parse_schedule
from ..core.server_urls import server_urls
from ..core.strict_model import Name, StrictModel
from ..errors import DistillError
from .from_teacher import FromTeacher
from .quantize import Quantize

_MODEL = "Model id on the Hub, local path, or package:module/file.gguf."
_REVISION = "Commit, tag or branch of a model id. Default (null): the main branch."
_ATTENTION = "Attention implementation, such as sdpa or eager. Losses on attention maps need eager. Default (null): "
_QUANTIZATION = (
    "Quantize the weights with bitsandbytes as they are loaded: nf4 (4 bits, double quantization) or int8. Default "
    "(null): none; a checkpoint that is already quantized needs none."
)
_Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_Quantization = Literal["nf4", "int8"]


class Lora(StrictModel):
    """LoRA adapters, which are trained instead of the full model. The keys are those of peft.LoraConfig."""

    r: int = Field(16, gt=0, description="Rank of the adapters, at least 1. Default: 16.")
    lora_alpha: float = Field(
        32, gt=0, description="Scale: the adapter output is multiplied by lora_alpha / r. Default: 32."
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout probability of the adapter input, from 0 to below 1. Default: 0."
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Modules that get an adapter: all-linear, or a list of module names. Default: all-linear.",
    )
    use_dora: bool = Field(
        False, description="Train the magnitude of the weights separately (DoRA, 2402.09353). Default: false."
    )


class Student(StrictModel):
    """The model to train."""

    model: Name | None = Field(None, description=_MODEL)
    revision: str | None = Field(None, description=_REVISION)
    dtype: _Dtype = Field(
        "float32",
        description="Data type of the weights. Keep float32 unless the student has adapters or DeepSpeed's bf16 is "
        "used. Default: float32.",
    )
    quantization: _Quantization | None = Field(
        None, description=f"{_QUANTIZATION} Needs lora, which gives QLoRA (2305.14314)."
    )
    lora: Lora | None = Field(
        None, description="Train LoRA adapters (2106.09685) instead of the full model. Default (null): the full model."
    )
    attn_implementation: str | None = Field(
        None, description=f"{_ATTENTION}that of the teacher, or the default of transformers."
    )
    from_teacher: FromTeacher | None = Field(
        None,
        description="Prune the student from the teacher; from `model` if the teacher is derived from the student "
        "(kinds ema, snapshot, multi_view and mtp).",
    )
    quantize: Quantize | None = Field(
        None,
        description="Quantization-aware distillation: train the student with the rounding that it is served with, and "
        "export it quantized. A string is short for {scheme: ...}. Default (null): off.",
    )
    freeze_encoder: bool = Field(
        False,
        description="For a model with an encoder and a decoder: train the decoder only, as distil-whisper does "
        "(2311.00430). Default: false.",
    )

    @model_validator(mode="after")
    def _check_quantization(self) -> Self:
        if self.quantization and self.lora is None:
            raise ValueError("a quantized student cannot be trained: add lora (QLoRA), or remove quantization")
        if self.quantization and self.from_teacher:
            raise ValueError("a student that is pruned from its teacher is unquantized: remove quantization")
        if self.quantize and self.lora:
            raise ValueError(
                "quantize rounds the weights that are trained, and lora adds its adapters to them unrounded: remove "
                "one of them"
            )
        return self

    @field_validator("quantize", mode="before")
    @classmethod
    def _expand_scheme(cls, value: object) -> object:
        return {"scheme": value} if isinstance(value, str) else value


_PLACEMENTS = ("quantization", "deepspeed", "fsdp", "device_map")
_PEER_FIELDS = (
    "model",
    "revision",
    "attn_implementation",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "freeze_at_progress",
)
REMOTE_OPTIONS = ("top_k", "vocab_size", "timeout", "retry_seconds", "concurrency", "prefetch", "api_key_env")
# Fields that each kind accepts. Kinds without a model are derived from the student.
FIELDS: dict[str, tuple[str, ...]] = {
    "frozen": ("model", "revision", "dtype", "attn_implementation", *_PLACEMENTS),
    "adapter_base": (),
    "online": _PEER_FIELDS,
    "mutual": _PEER_FIELDS,
    "ema": ("decay", "warmup"),
    "snapshot": ("interval_steps", "path"),
    "multi_view": ("view", "view_for"),
    "mtp": ("num_future_tokens", "hard_weight", "soft_weight", "learning_rate"),
    "cached": ("path", "source", "on_miss", "use_source"),
    "remote": ("url", "model", "api", "dtype", *REMOTE_OPTIONS),
}
# Kinds of teachers that can have another tokenizer than the student. The others are the student, or read its tokens.
CROSS_TOKENIZER_KINDS = ("frozen", "cached", "remote")
# Kinds of teachers that can read another prompt than the student. The others read the student's batch.
PROMPTED_KINDS = ("frozen", "adapter_base", "ema", "snapshot", "cached", "remote")


class TeacherSpec(StrictModel):
    """The teacher. Which fields are possible depends on `kind`."""

    kind: Literal[
        "frozen", "adapter_base", "online", "mutual", "ema", "snapshot", "multi_view", "mtp", "cached", "remote"
    ] = Field(
        "frozen",
        description="frozen: a model that does not change. adapter_base: the student with its adapters disabled. "
        "online: a second model that trains on the labels at the same time. mutual: a second model that the "
        "student also teaches. ema: the exponential moving average of the student's weights. snapshot: an earlier "
        "state of the student. multi_view: the student on another view of the batch. mtp: the student's output "
        "head, which teaches heads that predict tokens further ahead. cached: stored outputs of a frozen teacher. "
        "remote: a model on a server. "
        "Default: frozen.",
    )
    model: Name | None = Field(
        None,
        description=f"{_MODEL} Kind remote: id under which the server serves the model; default (null): the only model "
        "that it serves.",
    )
    revision: str | None = Field(None, description=_REVISION)
    dtype: _Dtype = Field(
        "auto",
        description="Data type of the weights, or the compute type of a quantized teacher. Default: auto, that of the "
        "checkpoint. Kind remote with api hidden: data type of the hidden states that are sent; default: auto, that of "
        "the served model.",
    )
    attn_implementation: str | None = Field(None, description=f"{_ATTENTION}the default of transformers.")
    quantization: _Quantization | None = Field(None, description=_QUANTIZATION)
    deepspeed: str | dict[str, object] | None = Field(
        None,
        description="Shard the teacher with ZeRO-3: a JSON file relative to the recipe, the name of a packaged config "
        "such as zero3-teacher.json, or the config itself.",
    )
    fsdp: bool = Field(False, description="Shard the teacher with FSDP2 over all processes. Default: false.")
    device_map: str | dict[str, str | int] | None = Field(
        None,
        description="Distribute the teacher over the GPUs, CPU memory and disk of one process: auto, or a mapping of "
        "modules to devices.",
    )
    learning_rate: float | None = Field(
        None,
        ge=0,
        description="Kinds online, mutual and mtp: learning rate of the peer or the heads, at least 0. Default (null): "
        "train.learning_rate.",
    )
    weight_decay: float | None = Field(
        None,
        ge=0,
        description="Kinds online and mutual: weight decay of the peer, at least 0. Default (null): "
        "train.weight_decay.",
    )
    max_grad_norm: float | None = Field(
        None,
        gt=0,
        description="Kinds online and mutual: norm to which the gradient of the peer is clipped, separately from the "
        "student. Default (null): train.max_grad_norm.",
    )
    freeze_at_progress: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Kinds online and mutual: training progress, above 0 and at most 1, from which the peer is frozen. "
        "Default (null): never.",
    )
    decay: float | list[tuple[float, float]] | None = Field(
        None,
        description="Kind ema: decay of the average, from 0 to below 1, or points [[progress, decay], ...] that are "
        "interpolated linearly. Default (null): 0.999.",
    )
    warmup: int | None = Field(
        None,
        ge=0,
        description="Kind ema: number of optimizer steps over which the decay rises from 0. Default (null): 0.",
    )
    interval_steps: int | None = Field(
        None, gt=0, description="Kind snapshot: number of optimizer steps between two snapshots, at least 1."
    )
    path: Name | None = Field(
        None,
        description="Kind snapshot: path of the weights of the first snapshot. Kind cached: folder of the teacher "
        "cache, or hf://datasets/org/name[@revision].",
    )
    source: "TeacherSpec | None" = Field(
        None, description="Kind cached: the frozen teacher whose outputs the cache holds."
    )
    on_miss: Literal["error", "query_teacher"] | None = Field(
        None,
        description="Kind cached: whether an example that is not in the cache is an error, or is passed to the source "
        "(query_teacher). Default (null): error.",
    )
    use_source: bool = Field(
        False,
        description="Kind cached: query the source instead of reading the cache, for a comparison. Default: false.",
    )
    view: ViewOptions | None = Field(None, description="Kind multi_view: how the batch is modified.")
    view_for: Literal["student", "teacher"] | None = Field(
        None,
        description="Kind multi_view: which of the two gets the modified batch in training. Default (null): student.",
    )
    num_future_tokens: int | None = Field(
        None,
        gt=0,
        description="Kind mtp: number of tokens after the next one that are predicted, one by each head. Default "
        "(null): 3.",
    )
    hard_weight: float | None = Field(
        None, ge=0, description="Kind mtp: weight of each head's cross-entropy, at least 0. Default (null): 0.3."
    )
    soft_weight: float | None = Field(
        None,
        ge=0,
        description="Kind mtp: weight of the divergence between the main head and each further head, at least 0. "
        "Default (null): 0.1.",
    )

    url: str | list[str] | None = Field(
        None,
        description="Kind remote: URL of the server, such as http://127.0.0.1:8000, or several of servers of the same "
        "model. A URL must not contain a key.",
    )
    api: Literal["vllm", "sglang", "hidden"] | None = Field(
        None,
        description="Kind remote: API of the server, vllm, sglang, or hidden (hf-distill serve, which is exact). "
        "Default (null): vllm.",
    )
    top_k: int | None = Field(
        None,
        gt=0,
        description="Kind remote: number of most probable ids whose log-probabilities are requested for each target "
        "token, at least 1. Default (null): 64.",
    )
    vocab_size: int | None = Field(
        None,
        gt=0,
        description="Kind remote: number of ids that the served model predicts, at least 1. Default (null): that of "
        "the student.",
    )
    timeout: float | None = Field(
        None,
        gt=0,
        description="Kind remote: seconds without a byte of the answer until a request counts as failed, above 0. "
        "Default (null): 120.",
    )
    retry_seconds: float | None = Field(
        None,
        ge=0,
        description="Kind remote: seconds for which a failed request is repeated before the run stops with a "
        "checkpoint, at least 0. Default (null): 300.",
    )
    concurrency: int | None = Field(
        None,
        gt=0,
        description="Kind remote: largest number of requests in flight in each process, at least 1. Default (null): "
        "16.",
    )
    prefetch: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Kind remote: number of batches after the current step that are requested while the student "
        "trains, from 0 to 64. Default (null): 2.",
    )
    api_key_env: Name | None = Field(
        None,
        description="Kind remote: name of the environment variable that holds the API key. Default (null): "
        "HF_DISTILL_TEACHER_API_KEY, if it is set.",
    )
    prompt: str | None = Field(
        None,
        min_length=1,
        description="Prompt that the teacher reads in place of the student's, before the same completion: a text with "
        "names of columns in braces, such as {prompt} and {answer}. Needs data with the columns prompt and completion. "
        "Default (null): the column teacher_prompt of data if it has one, else the student's prompt.",
    )

    tokenizer: Name | None = Field(
        None,
        description="Kinds frozen, cached and remote, with distill.cross_tokenizer: folder or id of a model whose "
        "tokenizer the teacher has. Default (null): that of `model` for a frozen teacher, that of the source for a "
        "cached one; a remote teacher needs it.",
    )

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: str | None) -> str | None:
        if value is not None:
            template_columns(value)
        return value

    @property
    def loaded_model(self) -> str | None:
        """The model that this process loads for the teacher; None if there is none, or if it is on a server."""
        return None if self.kind == "remote" else self.model

    @property
    def tokenizer_model(self) -> str | None:
        """The model whose tokenizer the teacher has: `tokenizer`, or that of the weights; None if it is not known."""
        return self.tokenizer or self.loaded_model or (self.source.tokenizer_model if self.source else None)

    @property
    def tokenizer_revision(self) -> str | None:
        """The revision of `tokenizer_model`."""
        if self.tokenizer:
            return None
        return self.revision if self.loaded_model or not self.source else self.source.tokenizer_revision

    @property
    def wants_paraphrase(self) -> bool:
        """Whether each row needs a paraphrase of its prompt."""
        return self.view is not None and self.view.paraphrase

    @field_validator("decay")
    @classmethod
    def _check_decay(cls, value: float | list[tuple[float, float]] | None) -> float | list[tuple[float, float]] | None:
        if value is not None and any(decay == 1 for _, decay in parse_schedule(value, "decay", 0, 1)):
            raise ValueError("must be at least 0 and below 1; with a decay of 1 the average never changes")
        return value

    @model_validator(mode="after")
    def _check_kind_fields(self) -> Self:
        of_kind = (
            *FIELDS[self.kind],
            *(["prompt"] if self.kind in PROMPTED_KINDS else []),
            *(["tokenizer"] if self.kind in CROSS_TOKENIZER_KINDS else []),
        )
        allowed = ("kind", "name", "weight", "sources", *of_kind)
        unexpected = [name for name in sorted(self.model_fields_set) if name not in allowed]
        unexpected = [name for name in unexpected if getattr(self, name) != type(self).model_fields[name].default]
        if unexpected:
            accepted = ", ".join(of_kind) or "no further fields"
            raise ValueError(f"kind {self.kind} does not accept {', '.join(unexpected)}; it accepts {accepted}")
        if self.kind == "remote":
            self._check_remote()
        elif "model" in FIELDS[self.kind] and self.model is None:
            raise ValueError(f"kind {self.kind} needs a model: set its key model")
        if self.kind == "cached":
            self._check_cached()
        if self.kind == "multi_view" and self.view is None:
            raise ValueError("kind multi_view needs a view, such as view: {token_dropout: 0.1}")
        if self.kind == "snapshot" and self.interval_steps is None and self.path is None:
            raise ValueError(
                "kind snapshot needs interval_steps, the number of steps between two snapshots, or the path of a "
                "snapshot"
            )
        check_placement(self.quantization, self.deepspeed, self.fsdp, self.device_map)
        return self

    def _check_remote(self) -> None:
        if self.url is None:
            raise ValueError(
                "kind remote needs the URL of a server: set url, such as http://127.0.0.1:8000; for a recipe from the "
                "Hub, pass teacher.url=... on the command line"
            )
        try:
            server_urls(self.url)
        except DistillError as error:
            raise ValueError(f"url: {error}") from None
        if self.api == "hidden" and (self.top_k or self.vocab_size):
            raise ValueError("top_k and vocab_size have no effect with api hidden, which sends hidden states")
        if self.api != "hidden" and self.dtype != "auto":
            raise ValueError("dtype is for api hidden: the other servers send log-probabilities")
        if self.top_k is not None and self.vocab_size is not None and self.top_k > self.vocab_size:
            raise ValueError(f"top_k is {self.top_k} and vocab_size {self.vocab_size}: lower top_k")

    def _check_cached(self) -> None:
        if self.path is None:
            raise ValueError("kind cached needs the path of the cache: a folder, or hf://datasets/org/name")
        if self.source is not None and self.source.kind != "frozen":
            raise ValueError(f"only a frozen teacher can be cached; the kind of source is {self.source.kind}")
        if self.source is None and (self.use_source or self.on_miss == "query_teacher"):
            raise ValueError("use_source and on_miss: query_teacher need the teacher that wrote the cache: set source")
        if self.use_source and self.on_miss:
            raise ValueError("use_source does not read the cache, so on_miss has no effect: remove one of them")
        if self.source is not None and self.tokenizer is not None:
            if self.source.tokenizer not in (None, self.tokenizer):
                raise ValueError(
                    f"tokenizer is {self.tokenizer!r} and that of source {self.source.tokenizer!r}: set it once"
                )
            self.source.tokenizer = self.tokenizer

    @property
    def source_teacher(self) -> "TeacherSpec":
        """The teacher whose outputs are used: the source of a cache if the recipe gives it, else this teacher."""
        return self.source or self

    @property
    def effective(self) -> "TeacherSpec":
        """The teacher that a run queries: the source if `use_source` is set, else this teacher."""
        return self.source_teacher if self.use_source else self


class NamedTeacher(TeacherSpec):
    """One of several teachers."""

    name: str = Field(
        pattern="^[A-Za-z_][A-Za-z0-9_]*$",
        description="Name of the teacher in losses and logs: letters, digits and _, not starting with a digit.",
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="Weight of this teacher in the soft loss, above 0; the weights are normalized to sum to 1. Default "
        "(null): 1.",
    )
    sources: list[str] | None = Field(
        None,
        min_length=1,
        description="Names of the sources of data whose rows this teacher teaches; each source has one teacher, and "
        "the rows of other sources have their hard labels only. Give it for all teachers or for none. Default (null): "
        "every teacher teaches all rows.",
    )

    @model_validator(mode="after")
    def _check_weight(self) -> Self:
        if self.weight is not None and self.kind == "mtp":
            raise ValueError("kind mtp has no soft labels for the student, so its weight has no effect: remove weight")
        return self
