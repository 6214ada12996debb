"""What a recipe may say about the student and the teacher. Imports no torch, as `schema` does not."""

from typing import Any, Literal

from pydantic import Field, model_validator

from ..zero import check_ways
from .data import Part


class FromTeacher(Part):
    """A student made of some of the teacher's blocks."""

    keep_layers: int | None = Field(None, gt=0, description="How many blocks to keep, chosen by `by`.")
    by: Literal["block_influence"] = Field("block_influence", description="How they are chosen (2403.03853).")
    layers: list[int] | None = Field(None, min_length=1, description="The blocks to keep, explicitly.")

    @model_validator(mode="after")
    def _one_way(self):
        if (self.keep_layers is None) == (self.layers is None):
            raise ValueError("give either keep_layers or layers")
        return self


_ATTENTION = "Implementation of attention; eager where a loss needs attention maps."
_QUANTIZATION = "nf4 (4 bits, double quantisation) or int8, by bitsandbytes; a quantised checkpoint needs none."
_Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_Quantization = Literal["nf4", "int8"]


class Lora(Part):
    """Adapters that are trained instead of the model; names are those of peft.LoraConfig."""

    r: int = Field(16, gt=0, description="Rank.")
    lora_alpha: float = Field(32, gt=0, description="The adapter counts lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field("all-linear", description="Which layers get one.")
    use_dora: bool = Field(False, description="Weights' norms are trained apart (DoRA, 2402.09353).")


class Student(Part):
    """The model to be trained."""

    model: str | None = Field(None, description="Id, path or package: reference.")
    revision: str | None = Field(None, description="Commit, tag or branch of an id.")
    dtype: _Dtype = Field("float32", description="In which to load it; float32 but for adapters and DeepSpeed's bf16.")
    quantization: _Quantization | None = Field(None, description=f"{_QUANTIZATION} With lora: QLoRA (2305.14314).")
    lora: Lora | None = Field(None, description="Train adapters (2106.09685) instead of the whole model.")
    attn_implementation: str | None = Field(None, description=f"{_ATTENTION} None: as the teacher, or the default.")
    from_teacher: FromTeacher | None = Field(None, description="Cut it from the teacher instead.")

    @model_validator(mode="after")
    def _one_way(self):
        if (self.model is None) == (self.from_teacher is None):
            raise ValueError("give either model or from_teacher")
        if self.quantization and self.lora is None:
            raise ValueError("a quantised student cannot be trained: add lora (QLoRA), or leave quantization out")
        if self.quantization and self.from_teacher:
            raise ValueError("a student cut from its teacher is made in full precision: leave quantization out")
        return self


class TeacherSpec(Part):
    """The model to learn from."""

    kind: Literal["frozen", "own_base"] = Field(
        "frozen", description="frozen: it does not move; own_base: the student without its adapters, at no memory."
    )
    model: str | None = Field(None, description="Id, path or package: reference.")
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

    @model_validator(mode="after")
    def _one_way(self):
        if (self.kind == "frozen") == (self.model is None):
            raise ValueError(
                "give its model" if self.model is None else "own_base is the student itself: leave model out"
            )
        if self.kind == "own_base" and (self.quantization or self.deepspeed or self.fsdp or self.device_map):
            raise ValueError("own_base is held as the student is: leave quantization, deepspeed, fsdp, device_map out")
        check_ways(self.quantization, self.deepspeed, self.fsdp, self.device_map)
        return self
