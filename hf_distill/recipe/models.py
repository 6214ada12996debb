"""What a recipe may say about the student and the teacher. Imports no torch, as `schema` does not."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..core.deepspeed_config import check_placement
from ..core.schedule import parse_schedule
from .strict_model import Name, StrictModel


class FromTeacher(StrictModel):
    """A student made of some of the teacher's blocks."""

    keep_layers: int | None = Field(None, gt=0, description="How many blocks to keep, chosen by `by`.")
    by: Literal["block_influence"] = Field("block_influence", description="How they are chosen (2403.03853).")
    layers: list[int] | None = Field(None, min_length=1, description="The blocks to keep, explicitly.")

    @model_validator(mode="after")
    def _exactly_one(self):
        if (self.keep_layers is None) == (self.layers is None):
            raise ValueError("give either keep_layers or layers")
        return self


_ATTENTION = "Implementation of attention; eager where a loss needs attention maps."
_QUANTIZATION = "nf4 (4 bits, double quantisation) or int8, by bitsandbytes; a quantised checkpoint needs none."
_Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_Quantization = Literal["nf4", "int8"]


class Lora(StrictModel):
    """Adapters that are trained instead of the model; names are those of peft.LoraConfig."""

    r: int = Field(16, gt=0, description="Rank.")
    lora_alpha: float = Field(32, gt=0, description="The adapter counts lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field("all-linear", description="Which layers get one.")
    use_dora: bool = Field(False, description="Weights' norms are trained apart (DoRA, 2402.09353).")


class Student(StrictModel):
    """The model to be trained."""

    model: Name | None = Field(None, description="Id, path or package: reference.")
    revision: str | None = Field(None, description="Commit, tag or branch of an id.")
    dtype: _Dtype = Field("float32", description="In which to load it; float32 but for adapters and DeepSpeed's bf16.")
    quantization: _Quantization | None = Field(None, description=f"{_QUANTIZATION} With lora: QLoRA (2305.14314).")
    lora: Lora | None = Field(None, description="Train adapters (2106.09685) instead of the whole model.")
    attn_implementation: str | None = Field(None, description=f"{_ATTENTION} None: as the teacher, or the default.")
    from_teacher: FromTeacher | None = Field(
        None, description="Cut it from the teacher; from `model`, where that is a past or a view of the student."
    )

    @model_validator(mode="after")
    def _exactly_one(self):
        if self.quantization and self.lora is None:
            raise ValueError("a quantised student cannot be trained: add lora (QLoRA), or leave quantization out")
        if self.quantization and self.from_teacher:
            raise ValueError("a student cut from its teacher is made in full precision: leave quantization out")
        return self


class ViewSpec(StrictModel):
    """How one of the two sees a batch otherwise; see docs/data.md."""

    token_dropout: float = Field(0.0, ge=0, lt=1, description="Share of tokens that a filler replaces.")
    span_deletion: float = Field(0.0, ge=0, lt=1, description="Share of the context's tokens that are hidden.")
    span_length: int = Field(3, gt=0, description="Tokens that are hidden together.")
    prepend_context_tokens: int = Field(0, ge=0, description="Tokens of another row in front of each row.")
    paraphrase: bool = Field(False, description="The data's column `paraphrase` in the place of `prompt`.")

    @model_validator(mode="after")
    def _differs(self):
        if not (self.token_dropout or self.span_deletion or self.prepend_context_tokens or self.paraphrase):
            raise ValueError(
                "it changes nothing: give token_dropout, span_deletion, prepend_context_tokens or paraphrase"
            )
        return self


_WAYS = ("quantization", "deepspeed", "fsdp", "device_map")
_PEER = (
    "model",
    "revision",
    "attn_implementation",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "freeze_at_progress",
)
# What each kind may say; those without a model are the student itself, in another state.
FIELDS: dict[str, tuple[str, ...]] = {
    "frozen": ("model", "revision", "dtype", "attn_implementation", *_WAYS),
    "adapter_base": (),
    "online": _PEER,
    "mutual": _PEER,
    "ema": ("decay", "warmup"),
    "snapshot": ("interval_steps", "path"),
    "multi_view": ("view", "view_for"),
    "mtp": ("num_future_tokens", "hard_weight", "soft_weight", "learning_rate"),
    "cached": ("path", "source", "on_miss", "use_source"),
}


class TeacherSpec(StrictModel):
    """What to learn from."""

    kind: Literal["frozen", "adapter_base", "online", "mutual", "ema", "snapshot", "multi_view", "mtp", "cached"] = (
        Field(
            "frozen",
            description="frozen: it does not change; adapter_base: the student without its adapters; online, mutual: "
            "it is trained together with the student; ema, snapshot: earlier weights of the student; multi_view: the "
            "student on another view of the batch; mtp: the student's output head teaches heads that predict tokens "
            "further ahead; cached: the teacher's stored outputs.",
        )
    )
    model: Name | None = Field(None, description="Id, path or package: reference.")
    revision: str | None = Field(None, description="Commit, tag or branch of an id.")
    dtype: _Dtype = Field("auto", description="In which to load it; in which a quantised one computes.")
    attn_implementation: str | None = Field(None, description=_ATTENTION)
    quantization: _Quantization | None = Field(None, description=_QUANTIZATION)
    deepspeed: str | dict[str, Any] | None = Field(
        None,
        description="Shard it by ZeRO-3: a JSON file beside the recipe, a packaged one, or its content.",
    )
    fsdp: bool = Field(False, description="Shard it by FSDP2 over all processes.")
    device_map: str | dict[str, str | int] | None = Field(
        None, description="Spread it over the GPUs, CPU memory and disk of one process: auto, or module: device."
    )
    learning_rate: float | None = Field(None, ge=0, description="Of what is trained beside the student; None: train's.")
    weight_decay: float | None = Field(None, ge=0, description="Of a peer; None: train's.")
    max_grad_norm: float | None = Field(None, gt=0, description="A peer is clipped apart; None: to train's.")
    freeze_at_progress: float | None = Field(None, gt=0, le=1, description="Progress from which a peer learns no more.")
    decay: float | list[tuple[float, float]] | None = Field(
        None, description="Of ema, in [0, 1), by default 0.999; or [[progress, decay], ...]."
    )
    warmup: int | None = Field(None, ge=0, description="Steps over which ema's decay rises from 0; by default none.")
    interval_steps: int | None = Field(None, gt=0, description="Steps between two snapshots.")
    path: Name | None = Field(
        None, description="Weights that a snapshot begins with; a cache: folder or hf://datasets/org/name[@revision]."
    )
    source: "TeacherSpec | None" = Field(None, description="Of cached: the teacher that writes it, of kind frozen.")
    on_miss: Literal["error", "query_teacher"] | None = Field(
        None, description="Of cached, for examples that it lacks: refuse (the default), or ask the source."
    )
    use_source: bool = Field(False, description="Of cached: the source teaches in the place of the cache, to compare.")
    view: ViewSpec | None = Field(None, description="Of multi_view.")
    view_for: Literal["student", "teacher"] | None = Field(
        None, description="Which of the two sees the view in training; by default the student."
    )
    num_future_tokens: int | None = Field(
        None, gt=0, description="Of mtp: tokens beyond the next one that are said; by default 3."
    )
    hard_weight: float | None = Field(None, ge=0, description="Of mtp: of each head's cross entropy; by default 0.3.")
    soft_weight: float | None = Field(
        None, ge=0, description="Of mtp: of what each head learns from the main head; by default 0.1."
    )

    @property
    def wants_paraphrase(self) -> bool:
        """Whether rows need a paraphrase of their prompt."""
        return self.view is not None and self.view.paraphrase

    @field_validator("decay")
    @classmethod
    def _below_one(cls, value: Any) -> Any:
        if value is not None and any(d == 1 for _, d in parse_schedule(value, "it", 0, 1)):
            raise ValueError("it must lie in [0, 1): with 1 the average never moves")
        return value

    @model_validator(mode="after")
    def _of_its_kind(self):
        own = ("kind", "name", "weight", *FIELDS[self.kind])
        foreign = [name for name in sorted(self.model_fields_set) if name not in own]
        foreign = [name for name in foreign if getattr(self, name) != type(self).model_fields[name].default]
        if foreign:
            takes = ", ".join(FIELDS[self.kind]) or "nothing more"
            raise ValueError(f"kind {self.kind} has no {', '.join(foreign)}; it takes {takes}")
        if "model" in FIELDS[self.kind] and self.model is None:
            raise ValueError("give its model")
        if self.kind == "cached":
            self._check_cached()
        if self.kind == "multi_view" and self.view is None:
            raise ValueError("give its view, such as {token_dropout: 0.1}")
        if self.kind == "snapshot" and self.interval_steps is None and self.path is None:
            raise ValueError("a snapshot needs interval_steps, the steps between two of them, or the path of one")
        check_placement(self.quantization, self.deepspeed, self.fsdp, self.device_map)
        return self

    def _check_cached(self) -> None:
        if self.path is None:
            raise ValueError("give the path of the cache: a folder, or hf://datasets/org/name")
        if self.source is not None and self.source.kind != "frozen":
            raise ValueError(f"a cache holds what a teacher that does not move says; its source is {self.source.kind}")
        if self.source is None and (self.use_source or self.on_miss == "query_teacher"):
            raise ValueError("use_source asks the teacher that writes the cache: give it as source")
        if self.use_source and self.on_miss:
            raise ValueError("use_source leaves the cache out, and on_miss reads it: give one of them")

    @property
    def source_teacher(self) -> "TeacherSpec":
        """The model that a cache speaks for, where it is known; else the teacher itself."""
        return self.source or self

    @property
    def effective(self) -> "TeacherSpec":
        """The teacher that a run asks: the source of a cache that is to be left out."""
        return self.source_teacher if self.use_source else self


class NamedTeacher(TeacherSpec):
    """One of several teachers."""

    name: str = Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$", description="By which losses and logs call it.")
    weight: float | None = Field(None, gt=0, description="Of the soft term it has a share by its weight; None: 1.")

    @model_validator(mode="after")
    def _weighs(self):
        if self.weight is not None and self.kind == "mtp":
            raise ValueError("mtp has no soft labels for the student, so it has no weight: leave it out")
        return self
