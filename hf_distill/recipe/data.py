"""The `data` and `on_policy` sections of a recipe. Imports no torch."""

from typing import Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from ..core.defaults import EVALUATION_SPLIT, OVERFLOW, SPLIT, STOPPING_STRATEGY
from ..core.references import CHAT_TEMPLATES, TEMPLATE_SUFFIX
from ..core.schedule import parse_schedule
from ..core.strict_model import Name, StrictModel
from ..errors import did_you_mean


class LossWeight(StrictModel):
    """How the losses of a row are weighted by one of its columns. A name is short for {column: ...}."""

    column: str = Field(min_length=1, description="Column with a number in each row, such as score or logprob.")
    temperature: float | None = Field(
        None,
        gt=0,
        description="The weight is exp(number / temperature), divided by the mean over all rows of the source. Default "
        "(null): the weight is the number itself, which must be at least 0.",
    )


class Source(StrictModel):
    """A data source: a dataset id, a local file or save_to_disk folder, or a packaged text.

    The columns determine the format. The formats are tried in this order: input_ids; messages; prompt and completion;
    text.
    """

    path: Name = Field(
        description="Dataset id on the Hub; path to a .txt, .jsonl, .json, .csv, .parquet or .arrow file; "
        "save_to_disk folder; or packaged text, such as package:pydoc_data.topics or package:stdlib."
    )
    split: str = Field(SPLIT, description=f"Split of the dataset. Default: {SPLIT}.")
    name: str | None = Field(None, description="Configuration (subset) of the dataset. Default: the dataset's default.")
    column: str | None = Field(
        None, description="Column that holds the text. Default (null): the format is inferred from the columns."
    )
    weight: float | list[tuple[float, float]] = Field(
        1.0,
        description="Sampling weight relative to the other sources: a number above 0, or points [[progress, weight], "
        "...] with weights of at least 0 that are interpolated linearly over training progress from 0 to 1. "
        "Default: 1.",
    )
    loss_weight: LossWeight | None = Field(
        None,
        description="Column by which the losses of each row are weighted: its name, or {column: ..., temperature: "
        "...}. Not for text. Default (null): the column weight of the data, if it has one.",
    )
    generate: bool = Field(
        False,
        description="Whether the teacher completes the prompts of this source before the training (section generate). "
        "The student trains on these completions instead of those of the data. Default: false.",
    )
    origin: Literal["teacher", "student", "data"] | None = Field(
        None,
        description="Who wrote the target tokens of this source, which distill.by_origin reads. Default (null): the "
        "teacher if generate is true, else the column origin of the data, if it has one.",
    )
    assistant_only: bool | None = Field(
        None,
        description="For conversations: whether only the assistant's turns are target tokens (true), or all tokens "
        "(false). Default (null): true.",
    )
    overflow: Literal["truncate", "drop"] = Field(
        OVERFLOW, description="Whether examples longer than max_length are truncated or dropped. Default: truncate."
    )
    streaming: bool = Field(
        False, description="Read the dataset as a stream, in its stored order. Needs train.max_steps. Default: false."
    )

    @field_validator("loss_weight", mode="before", json_schema_input_type=str | LossWeight | None)
    @classmethod
    def _expand_column(cls, value: object) -> object:
        return {"column": value} if isinstance(value, str) else value

    @field_validator("weight")
    @classmethod
    def _check_weight(cls, value: float | list[tuple[float, float]]) -> float | list[tuple[float, float]]:
        if isinstance(value, float) and value <= 0:
            raise ValueError("must be above 0; to exclude a source, remove it from data")
        parse_schedule(value, "weight", low=0)
        return value

    @model_validator(mode="after")
    def _check_loss_weight(self) -> Self:
        if self.streaming and self.loss_weight is not None and self.loss_weight.temperature is not None:
            raise ValueError(
                "loss_weight.temperature needs the mean over all rows, which a stream does not give: set streaming to "
                "false"
            )
        return self

    @property
    def author(self) -> str | None:
        """Who wrote the target tokens, if the recipe determines it."""
        return self.origin or ("teacher" if self.generate else None)


class Eval(StrictModel):
    """Held-out examples: a separate dataset, read with the options of `task`, or a share of each source."""

    path: Name | None = Field(
        None, description="Dataset to evaluate on, as in data.task.path. Give either path or holdout."
    )
    split: str = Field(EVALUATION_SPLIT, description=f"Split of the dataset at path. Default: {EVALUATION_SPLIT}.")
    name: str | None = Field(None, description="Configuration (subset) of the dataset at path.")
    column: str | None = Field(None, description="Column that holds the text of the dataset at path.")
    holdout: float | None = Field(
        None, gt=0, lt=1, description="Share of each source's examples that is held out, between 0 and 1."
    )
    max_rows: int | None = Field(
        None, gt=0, description="Maximum number of rows of each source that are evaluated. Default (null): all rows."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.path is None) == (self.holdout is None):
            raise ValueError("give either path or holdout")
        return self


class Data(StrictModel):
    """The training data: a source called `task`, and any number of further named sources, mixed by their weights.

    Plain text is tokenized, joined with end-of-text tokens and cut into rows of max_length tokens. In the other
    formats each example becomes one row.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Source]

    task: Source = Field(description="The main data source.")
    eval: Eval = Field(description="The held-out examples.")
    columns: dict[str, Name] | None = Field(
        None,
        description="For other tasks than text-generation: the names of the columns that the task reads, if they "
        "differ: {text: ..., text_pair: ..., label: ...}, {image: ..., label: ...} or {audio: ..., text: ...}. Default "
        "(null): the columns have these names.",
    )
    language: Name | None = Field(
        None,
        description="Task automatic-speech-recognition: language of the speech, such as english, for a multilingual "
        "Whisper. Default (null): that of the tokenizer.",
    )
    max_length: int = Field(
        512,
        gt=1,
        description="Maximum number of tokens in a row, at least 2; in speech recognition, of a transcript. "
        "Default: 512.",
    )
    chat_template: Name | None = Field(
        None,
        description=f"Chat template that renders conversations: {', '.join(CHAT_TEMPLATES)}, or a .jinja file. "
        "Default (null): the chat template of the student's tokenizer.",
    )
    packing: bool = Field(
        False,
        description="Pack several examples into each row without padding; they do not attend to each other. "
        "Default: false.",
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"] = Field(
        STOPPING_STRATEGY,
        description="When the mixture ends, as in datasets.interleave_datasets. Default: first_exhausted.",
    )

    @field_validator("chat_template")
    @classmethod
    def _check_chat_template(cls, value: str | None) -> str | None:
        if value is not None and value not in CHAT_TEMPLATES and not value.endswith(TEMPLATE_SUFFIX):
            raise ValueError(
                f"{value!r} is neither the path of a .jinja file nor a packaged chat template"
                f"{did_you_mean(value, CHAT_TEMPLATES)}"
            )
        return value

    @model_validator(mode="after")
    def _check_names_and_streams(self) -> Self:
        bad = [name for name in self.sources if not name.isidentifier()]
        if bad:
            raise ValueError(
                f"source names may contain letters, digits and _ only, because they become part of metric names: {bad}"
            )
        streams = [name for name, source in self.sources.items() if source.streaming]
        if streams and self.eval.holdout:
            raise ValueError(
                f"examples cannot be held out of a streamed source ({', '.join(streams)}): set data.eval.path instead "
                "of holdout"
            )
        return self

    @model_validator(mode="after")
    def _check_schedules(self) -> Self:
        if not self.scheduled:
            return self
        problems = []
        if self.packing:
            problems.append("packing would put rows of different training progress together: set packing to false")
        if streams := [name for name, source in self.sources.items() if source.streaming]:
            problems.append(
                f"rows of a streamed source ({', '.join(streams)}) cannot be drawn in advance: set streaming to false"
            )
        if "stopping_strategy" in self.model_fields_set:
            problems.append("sources repeat until train.max_steps: remove stopping_strategy")
        if problems:
            raise ValueError(f"a source has a weight schedule, and {'; '.join(problems)}")
        return self

    @property
    def scheduled(self) -> bool:
        """Whether the weight of a source changes over training progress."""
        return any(isinstance(source.weight, list) for source in self.sources.values())

    @property
    def sources(self) -> dict[str, Source]:
        """All sources by name, `task` first."""
        return {"task": self.task, **(self.__pydantic_extra__ or {})}

    @property
    def generated(self) -> list[str]:
        """Names of the sources whose prompts the teacher completes before the training."""
        return [name for name, source in self.sources.items() if source.generate]


class OnPolicy(StrictModel):
    """On-policy distillation: the student completes prompts, and the teacher scores each token (GKD, 2306.13649).

    Training uses trl.DistillationTrainer. Sources must have the columns `messages`, or `prompt` and `completion`.
    """

    fraction: float | list[tuple[float, float]] = Field(
        1.0,
        description="Share of the rows that the student completes, from 0 to 1, or points [[progress, share], ...] "
        "that are interpolated linearly. The other rows keep the completion of the data; only these rows have hard "
        "labels. Default: 1.",
    )
    max_completion_length: int = Field(
        128, gt=0, description="Maximum number of tokens that the student generates for a prompt. Default: 128."
    )
    sampling_temperature: float = Field(
        1.0,
        gt=0,
        description="Temperature at which the student samples, above 0. distill.temperature is that of the loss. "
        "Default: 1.",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: top-p above 0 and at most 1. Default: 1.")
    top_k: int = Field(
        0, ge=0, description="Top-k sampling: number of tokens to sample from. Default: 0, which means all tokens."
    )
    vllm: Literal["colocate", "server"] | None = Field(
        None,
        description="Generate with vLLM, which needs a GPU, in the training process (colocate) or on a vLLM server "
        "(server). Default (null): generate with transformers.",
    )

    @field_validator("fraction")
    @classmethod
    def _check_fraction(cls, value: float | list[tuple[float, float]]) -> float | list[tuple[float, float]]:
        parse_schedule(value, "fraction", 0, 1)
        return value
