"""What a recipe may say about data. Imports no torch, as `schema` does not."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ..core.references import CHAT_TEMPLATES, TEMPLATE_SUFFIX
from ..core.schedule import parse_schedule
from ..errors import did_you_mean
from .strict_model import Name, StrictModel


class Source(StrictModel):
    """Examples: a data set id, a local file or save_to_disk folder, package:pydoc_data.topics or package:stdlib.

    The columns tell the format: input_ids, messages, prompt and completion, or text; the first that is there counts.
    """

    path: Name = Field(
        description="Id; .txt, .jsonl, .json, .csv, .parquet or .arrow file; folder; package: reference."
    )
    split: str = "train"
    name: str | None = Field(None, description="Configuration of the data set.")
    column: str | None = Field(None, description="The column that holds the text; None: the columns tell the format.")
    weight: float | list[tuple[float, float]] = Field(
        1.0,
        description="How often an example is drawn from it, beside other sources; or [[progress, weight], ...], with "
        "straight lines between.",
    )
    assistant_only: bool | None = Field(
        None,
        description="Of conversations: whether the assistant's turns alone are target tokens, or all tokens (false). "
        "None: as true.",
    )
    overflow: Literal["truncate", "drop"] = Field("truncate", description="What becomes of examples beyond max_length.")
    streaming: bool = Field(False, description="Read it while training, in its own order; needs train.max_steps.")

    @field_validator("weight")
    @classmethod
    def _weighs(cls, value: Any) -> Any:
        if isinstance(value, float) and value <= 0:
            raise ValueError("must be above 0: leave a source out to give it none")
        parse_schedule(value, "it", low=0)
        return value


class Eval(StrictModel):
    """Held-out examples: a source of its own, read as `task` is, or a share of those of each source."""

    path: Name | None = None
    split: str = "test"
    name: str | None = None
    column: str | None = None
    holdout: float | None = Field(None, gt=0, lt=1, description="Share of each source's examples that is held out.")
    max_rows: int | None = Field(None, gt=0, description="At most so many rows of each source.")

    @model_validator(mode="after")
    def _exactly_one(self):
        if (self.path is None) == (self.holdout is None):
            raise ValueError("give either path or holdout")
        return self


class Data(StrictModel):
    """A source, `task`, and any number of others under names of their own, mixed by their weights.

    Text is tokenised, joined with end-of-text tokens and cut into rows of max_length; else an example is a row.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Source]

    task: Source
    eval: Eval
    max_length: int = Field(512, gt=1, description="Tokens a row.")
    chat_template: Name | None = Field(
        None,
        description=f"What conversations are rendered by: {', '.join(CHAT_TEMPLATES)}, or a .jinja file; None: the "
        "chat template of the student's tokenizer.",
    )
    packing: bool = Field(False, description="Put several examples into a row, without padding; they stay apart.")
    stopping_strategy: Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"] = Field(
        "first_exhausted", description="When the mixture ends; as in datasets.interleave_datasets."
    )

    @field_validator("chat_template")
    @classmethod
    def _known_template(cls, value: str | None) -> str | None:
        if value is not None and value not in CHAT_TEMPLATES and not value.endswith(TEMPLATE_SUFFIX):
            raise ValueError(f"no training template {value!r}{did_you_mean(value, CHAT_TEMPLATES)}; or a .jinja file")
        return value

    @model_validator(mode="after")
    def _names_and_streams(self):
        bad = [name for name in self.sources if not name.isidentifier()]
        if bad:
            raise ValueError(f"names of sources are letters, digits and _, for they become part of metrics: {bad}")
        streams = [name for name, source in self.sources.items() if source.streaming]
        if streams and self.eval.holdout:
            raise ValueError(f"nothing can be held out of a stream ({', '.join(streams)}): give eval a path")
        return self

    @model_validator(mode="after")
    def _schedules(self):
        if not self.scheduled:
            return self
        problems = []
        if self.packing:
            problems.append("packing puts rows of different moments together: leave it out")
        if streams := [name for name, source in self.sources.items() if source.streaming]:
            problems.append(f"rows of a stream ({', '.join(streams)}) cannot be drawn in advance: leave streaming out")
        if "stopping_strategy" in self.model_fields_set:
            problems.append("sources repeat until train.max_steps: leave stopping_strategy out")
        if problems:
            raise ValueError(f"a weight over progress and {'; '.join(problems)}")
        return self

    @property
    def scheduled(self) -> bool:
        """Whether a weight changes over progress."""
        return any(isinstance(source.weight, list) for source in self.sources.values())

    @property
    def sources(self) -> dict[str, Source]:
        """All sources by name, `task` first."""
        return {"task": self.task, **(self.__pydantic_extra__ or {})}


class OnPolicy(StrictModel):
    """The student completes the data's prompts, and the teacher judges every token that it writes (GKD, 2306.13649).

    By trl.DistillationTrainer; sources are `messages`, or `prompt` and `completion`.
    """

    fraction: float | list[tuple[float, float]] = Field(
        1.0,
        description="Share of the rows that the student completes; the others keep the data's completion, which alone "
        "has hard labels. Or [[progress, share], ...], with straight lines between.",
    )
    max_completion_length: int = Field(128, gt=0, description="Tokens that the student writes at most.")
    sampling_temperature: float = Field(1.0, gt=0, description="At which it writes; distill.temperature is the loss's.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: all tokens.")
    vllm: Literal["colocate", "server"] | None = Field(None, description="Generate with vLLM, which needs a GPU.")

    @field_validator("fraction")
    @classmethod
    def _shares(cls, value: Any) -> Any:
        parse_schedule(value, "it", 0, 1)
        return value
