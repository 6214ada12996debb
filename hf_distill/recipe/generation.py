"""The `generate` section of a recipe: how the teacher completes the prompts of the data. Imports no torch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..core.defaults import MAX_NEW_TOKENS, SAMPLES_PER_TOKEN, TOP_K_IDS
from ..core.server_urls import server_urls
from ..core.strict_model import Name, StrictModel
from ..errors import DistillError
from ..filters.selections import BestOfN
from .filters import FilterSpec, SelectSpec

if TYPE_CHECKING:
    from .schema import Recipe

SERVER_OPTIONS = ("url", "model", "api_key_env", "concurrency", "timeout", "retry_seconds")
_LOCAL_OPTIONS = ("batching", "batch_size", "overflow")
# Arguments of apply_chat_template that are no variables of the template, or are set by the generation.
_TEMPLATE_ARGUMENTS = (
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *(
        "continue_final_message",
        "sanitize_control_tokens",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
    ),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)


class Generation(StrictModel):
    """Sequence-level distillation: the teacher completes the prompts of sources, in a column `messages` or `prompt`.

    `hf-distill generate RECIPE -o FOLDER` completes those of all sources. `hf-distill run` completes those of sources
    with `generate: true` first, and trains on the completions.
    """

    backend: Literal["transformers", "server", "vllm"] = Field(
        "transformers",
        description="What generates. transformers: the teacher of the recipe, in this process. server: servers with an "
        "OpenAI-compatible API, such as vLLM and SGLang. vllm: the teacher of the recipe with vLLM in this process, "
        "which needs a GPU. Default: transformers.",
    )
    samples: int = Field(1, gt=0, description="Number of completions of each prompt, at least 1. Default: 1.")
    temperature: float = Field(
        1.0, ge=0, description="Temperature at which the teacher samples, at least 0; 0 is greedy. Default: 1."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: top-p above 0 and at most 1. Default: 1.")
    max_new_tokens: int = Field(
        MAX_NEW_TOKENS, gt=0, description=f"Largest number of tokens of a completion. Default: {MAX_NEW_TOKENS}."
    )
    stop: list[str] = Field(
        default_factory=list,
        description="Texts at which a completion ends; they are not part of it. Default: none.",
    )
    system_prompt: str | None = Field(
        None,
        min_length=1,
        description="System message that the teacher reads before each conversation without one. It is not part of the "
        "data set. Default (null): none.",
    )
    chat: bool = Field(
        False,
        description="Send prompts that are texts as a user's turn; otherwise the teacher continues the text. "
        "Default: false.",
    )
    chat_template_kwargs: dict[str, object] = Field(
        default_factory=dict,
        description="Variables of the chat template that renders conversations, such as {enable_thinking: false}. "
        "vLLM and SGLang servers read them; other servers may refuse or ignore them. Default: none.",
    )
    reasoning: Literal["keep", "remove", "column"] = Field(
        "keep",
        description="The reasoning that a model writes between reasoning_tags before its answer. keep: it is part of "
        "the completion. remove: it is removed. column: it is moved to the column reasoning. Default: keep.",
    )
    reasoning_tags: tuple[str, str] = Field(
        ("<think>", "</think>"),
        description="Tags before and after the reasoning. Default: [<think>, </think>].",
    )
    log_probs: bool = Field(
        True,
        description="Record the mean log-probability of the tokens of each completion in the column logprob. "
        "Default: true.",
    )
    cache: Literal["top_k", "sampled", "hidden"] | None = Field(
        None,
        description="Also write a teacher cache of the data set into its folder cache, from what the teacher predicts "
        "while it generates: top_k (the k most probable ids), sampled (draws) or hidden (hidden states). Backends "
        "server and vllm: top_k only. Default (null): no cache.",
    )
    k: int | None = Field(
        None,
        ge=1,
        lt=1 << 16,
        description=f"cache top_k: number of ids of each token. Default (null): {TOP_K_IDS}.",
    )
    samples_per_token: int | None = Field(
        None,
        ge=1,
        lt=1 << 16,
        description=f"cache sampled: number of draws of each token. Default (null): {SAMPLES_PER_TOKEN}.",
    )
    filters: list[FilterSpec] = Field(
        default_factory=list,
        description="Filters of the completions, which are applied in order. A name is short for {name: ...}. The "
        "completions that they remove stay in the folder, so that other filters need no new generation. Default: none.",
    )
    select: SelectSpec | None = Field(
        None,
        description="Selection among the samples of each prompt, after the filters. Default (null): all samples.",
    )
    overflow: Literal["error", "drop"] = Field(
        "error",
        description="Backends transformers and vllm: whether a prompt that does not fit into the context together with "
        "max_new_tokens is an error, or is dropped. Default: error.",
    )
    max_prompts: int | None = Field(
        None, gt=0, description="Number of prompts of each source, from its beginning. Default (null): all prompts."
    )
    seed: int = Field(0, ge=0, description="Seed of the sampling. Default: 0.")
    prompts_per_part: int = Field(
        256,
        gt=0,
        description="Number of prompts whose completions are written together; an interruption loses at most the parts "
        "that are running. Default: 256.",
    )
    batching: Literal["continuous", "padded"] = Field(
        "continuous",
        description="Backend transformers: continuous batching, or padded batches of prompts of similar length, which "
        "all models support. Default: continuous.",
    )
    batch_size: int = Field(
        64,
        gt=0,
        description="Backends transformers and vllm: largest number of completions that are generated at the same "
        "time. Default: 64.",
    )
    url: str | list[str] | None = Field(
        None,
        description="Backend server: URL, such as http://127.0.0.1:8000, or several of servers of the same model. A "
        "URL must not contain a key.",
    )
    model: Name | None = Field(
        None, description="Backend server: id of the served model. Default (null): the only model that is served."
    )
    api_key_env: Name | None = Field(
        None,
        description="Backend server: name of the environment variable that holds the API key. Default (null): "
        "HF_DISTILL_TEACHER_API_KEY, if it is set.",
    )
    concurrency: int | None = Field(
        None, gt=0, description="Backend server: largest number of requests in flight. Default (null): 16."
    )
    timeout: float | None = Field(
        None,
        gt=0,
        description="Backend server: seconds without a byte of the answer until a request counts as failed. Default "
        "(null): 120.",
    )
    retry_seconds: float | None = Field(
        None, ge=0, description="Backend server: seconds for which a failed request is repeated. Default (null): 300."
    )

    output_dir: Name | None = Field(
        None,
        description="Folder for the data sets of sources with generate: true, one folder for each source. Several "
        "runs of the same completions can share it. Default (null): the folder generated in train.output_dir.",
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None:
            try:
                server_urls(value)
            except DistillError as error:
                raise ValueError(str(error)) from None
        return value

    @field_validator("stop", "reasoning_tags")
    @classmethod
    def _check_texts(cls, value: list[str] | tuple[str, str]) -> list[str] | tuple[str, str]:
        if not all(value):
            raise ValueError("the texts must not be empty")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_template_variables(cls, value: dict[str, object]) -> dict[str, object]:
        if taken := [name for name in value if name in _TEMPLATE_ARGUMENTS]:
            raise ValueError(f"{', '.join(taken)} cannot be set here: it gives variables of the chat template only")
        return value

    @property
    def added_columns(self) -> list[str]:
        """The columns that the filters and the selection may add to the rows."""
        steps = [*self.filters, *([self.select] if self.select else [])]
        return [*dict.fromkeys(name for step in steps for name in step.added_columns)]

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        problems = []
        is_server = self.backend == "server"
        other = _LOCAL_OPTIONS if is_server else SERVER_OPTIONS
        if self.backend == "vllm":
            other = (*other, "batching")
        if wrong := [name for name in other if name in self.model_fields_set and getattr(self, name) is not None]:
            problems.append(f"backend {self.backend} does not use {', '.join(wrong)}: remove it")
        if self.backend != "transformers" and self.cache not in (None, "top_k"):
            problems.append(
                f"backend {self.backend} returns the log-probabilities of the most probable ids, and a cache of kind "
                f"{self.cache} needs more: set cache to top_k, or use backend transformers"
            )
        for kind, name in (("top_k", "k"), ("sampled", "samples_per_token")):
            if getattr(self, name) is not None and self.cache != kind:
                problems.append(f"{name} is used with cache {kind} only: remove it, or set cache to {kind}")
        if self.select is not None and self.samples == 1:
            problems.append("select chooses among the samples of a prompt, and there is one: raise samples")
        elif isinstance(self.select, BestOfN) and self.select.keep >= self.samples:
            problems.append(
                f"select keeps {self.select.keep} of {self.samples} samples, so that it removes none: lower "
                "select.keep, or raise samples"
            )
        if self.samples > 1 and not self.temperature:
            problems.append("temperature 0 gives the same completion each time: set samples to 1, or raise temperature")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def generation_problems(recipe: "Recipe") -> list[str]:
    """List why the sources of a recipe with `generate: true` cannot be generated; empty if they can, or if none is."""
    generated = recipe.data.generated
    problems = [*_control_problems(recipe)]
    if not generated:
        if recipe.generate and recipe.generate.output_dir:
            problems.append(
                "generate.output_dir is the folder of sources with generate: true, and no source has it: set "
                "data.task.generate to true, or pass the folder to `hf-distill generate` with -o"
            )
        return problems
    for name in generated:
        problems += [f"data.{name}.{problem}" for problem in _source_problems(recipe, name)]
    options = recipe.generate or Generation.model_validate({})
    if options.cache:
        problems.append(
            f"generate.cache: a run that generates the completions of data.{generated[0]} trains with its teacher, not "
            "with a cache: remove cache, or remove generate: true and run `hf-distill generate RECIPE -o DIR`"
        )
    backend = options.backend
    teacher = recipe.teacher.source_teacher if recipe.teacher else None
    if backend != "server" and (teacher is None or teacher.kind != "frozen"):
        problems.append(
            f"data.{generated[0]}.generate: with generate.backend {backend} the recipe needs exactly one teacher, of "
            "kind frozen, or cached with a source: change the teacher, or use the backend server"
        )
    return problems


def _source_problems(recipe: "Recipe", name: str) -> Iterator[str]:
    source = recipe.data.sources[name]
    if source.streaming:
        yield "generate: a generation from a stream cannot be resumed: set streaming to false"
    if source.origin not in (None, "teacher"):
        yield f"origin is {source.origin}, and the teacher writes the completions: remove origin or generate"
    if source.column is not None and recipe.data.eval.holdout:
        yield (
            "generate: held-out rows have the completions of the data, and a source with `column` has prompts alone: "
            "set data.eval.path instead of holdout"
        )
    if source.column is not None and recipe.control == "sft_on_data":
        yield (
            "generate: control: sft_on_data trains on the completions of the data, and a source with `column` has "
            "prompts alone: use control: sft, or rename the column to prompt"
        )


def _control_problems(recipe: "Recipe") -> Iterator[str]:
    if recipe.control != "sft_on_data":
        return
    if not recipe.data.generated:
        yield (
            "control: sft_on_data is for recipes in which the teacher completes the prompts of a source: set "
            "data.task.generate to true, or use control: sft"
        )
    if (recipe.train.max_steps or 0) <= 0:
        yield (
            "control: sft_on_data trains on another number of rows: set train.max_steps, so that student and control "
            "take the same number of steps"
        )
