"""Prepares the data of a recipe: loads, splits, tokenizes, mixes and packs the sources."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from ..core.results import DataFacts
from ..core.row_values import ORIGIN, ORIGINS, WEIGHT
from ..core.schedule import parse_schedule
from ..core.targets import IGNORE_INDEX
from ..data import (
    Collator,
    Examples,
    OtherTokenizer,
    add_source_column,
    load_examples,
    mix,
    mix_scheduled,
    pack,
    prompt_rows,
    split_held_out,
    tokenize_dataset,
    with_teacher_prompts,
)
from ..data.formats import PARAPHRASE, TEACHER_PROMPT, TEXT, SecondPrompt
from ..data.json_files import map_exactly
from ..data.loss_weights import with_loss_weights
from ..data.teacher_column import check_no_teacher_column
from ..data.training_templates import renders_same, training_template
from ..errors import DistillError
from ..recipe.data import Data
from ..recipe.schema import Recipe
from .generated_sources import generated_examples, generation_rows
from .row_fingerprints import fingerprint_of
from .trimmed_rows import Trimming, check_no_removed_ids, with_new_ids

logger = logging.get_logger(__name__)
Key = TypeVar("Key")
ExamplesT = TypeVar("ExamplesT", bound=Examples)


@dataclass(frozen=True)
class PreparedData:
    """The tokenized rows of a recipe.

    Attributes:
        train: Training rows of the mixture, packed if the recipe sets `packing`; a stream if a source is streamed.
        held_out: Evaluation rows, which are never packed. They have a column `source` if they come from several
            sources.
        collator: Collator for both, with the names of the sources as `sources`.
        labels: Names of the classes; empty for models without classes.
    """

    train: Examples
    held_out: Dataset
    collator: Any
    labels: Sequence[str] = ()

    def facts(self) -> DataFacts:
        """Return the numbers of rows and the fingerprints that results.json records."""
        facts: DataFacts = {"eval_rows": len(self.held_out), "eval_fingerprint": fingerprint_of(self.held_out)}
        if self.labels:
            facts["labels"] = list(self.labels)
        if len(self.collator.sources) > 1:
            facts["sources"] = list(self.collator.sources)
        if isinstance(self.train, Dataset):
            facts["train_rows"] = len(self.train)
            if "input_ids" in self.train.column_names:
                facts["tokens_per_row"] = _mean_length(self.train)
            facts["train_fingerprint"] = fingerprint_of(self.train)
        return facts


def prepare_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    count: int,
    other_tokenizers: Sequence[OtherTokenizer] = (),
    of_data: bool = False,
    trimming: Trimming | None = None,
    logs_targets: bool = True,
) -> PreparedData:
    """Load, split, tokenize, mix and pack the sources of a recipe.

    In an on-policy recipe only the tokens of completions are target tokens.

    Args:
        recipe: The recipe.
        tokenizer: The student's tokenizer. It gets the chat template of the recipe if its own renders differently.
        seed: Seed of the split and of the mixture.
        count: Number of rows that the training uses. It matters only if source weights have a schedule.
        other_tokenizers: The teachers that have another tokenizer.
        of_data: Whether sources with generate: true have the completions of the data, for the same prompts.
        trimming: The full vocabulary, whose ids sources have that are tokens already; None: these have the ids of the
            tokenizer.
        logs_targets: Whether the share of target tokens of each source is logged.

    Raises:
        DistillError: An input is invalid; see `load_examples`, `split_held_out`, `tokenize_dataset`, `mix` and
            `mix_scheduled`.
    """
    data, train, held_out = recipe.data, dict[str, Examples](), list[Examples]()
    others = () if data.packing else other_tokenizers
    tokenizers = _Tokenizers(tokenizer, chat_template_of(data, tokenizer), others, trimming)
    for index, name in enumerate(data.sources):
        documents, held_out_documents = load_split(recipe, name, seed, of_data)
        if held_out_documents is not None:
            rows = limit_rows(_rows(held_out_documents, recipe, name, tokenizers, of_data=True), data.eval.max_rows)
            held_out.append(add_source_column(rows, index) if len(data.sources) > 1 else rows)
        train[name] = _rows(documents, recipe, name, tokenizers, of_data)
        is_other = not of_data or data.sources[name].generate  # than those that were logged for the student
        if logs_targets and is_other and TEXT not in (documents.column_names or ()):
            _log_targets(train[name], f"data.{name}{', completions of the data' if of_data else ''}")
    if data.eval.path:
        examples = load_examples(**data.eval.model_dump(exclude={"holdout", "max_rows"}))
        examples = _with_prompts(examples, recipe, "data.eval")
        held_out = [limit_rows(_rows(examples, recipe, "eval", tokenizers), data.eval.max_rows)]
    evaluated = {"data.eval": held_out[0]} if data.eval.path else {}
    _check_teacher_prompts({f"data.{name}": rows for name, rows in train.items()} | evaluated, other_tokenizers)
    mixed = mix_and_pack(data, _with_equal_columns(train), seed, count)
    held_out = [*_with_equal_columns(dict(enumerate(held_out))).values()]
    evaluated_rows = concatenate_datasets(cast(list[Dataset], held_out))
    if trimming is not None:
        check_no_removed_ids(mixed, "the training data")
        check_no_removed_ids(evaluated_rows, "the evaluation data")
    return PreparedData(mixed, evaluated_rows, collator_of(data, tokenizer))


@dataclass(frozen=True)
class _Tokenizers:
    """The tokenizers of a recipe.

    Attributes:
        student: That of the student.
        chat_template: The template that it renders conversations with.
        others: Those of teachers with another tokenizer.
        trimming: The full vocabulary if the student has a trimmed one.
    """

    student: PreTrainedTokenizerBase
    chat_template: str | None
    others: Sequence[OtherTokenizer]
    trimming: Trimming | None = None


def _with_equal_columns(rows: dict[Key, Examples]) -> dict[Key, Examples]:
    """Add the columns of the teachers' rows to sources without them, as empty rows, which are made from the text.

    If some sources have the column `weight`, rows of the others have the weight 1.
    """
    if any(WEIGHT in _columns_of(part) for part in rows.values()):
        rows = {key: part if WEIGHT in _columns_of(part) else _with_weight_1(part) for key, part in rows.items()}
    missing = {
        key: [name for other in rows.values() for name in _row_columns(other) if name not in _row_columns(part)]
        for key, part in rows.items()
    }
    return {key: _with_empty(part, dict.fromkeys(missing[key])) for key, part in rows.items()}


def _check_teacher_prompts(rows: Mapping[str, Examples], other_tokenizers: Sequence[OtherTokenizer]) -> None:
    """Check that all tokenized data has another prompt for the teacher, or none; rows of other tokens may be missing.

    Raises:
        DistillError: some has none.
    """
    lacking = [name for name, part in rows.items() if not _row_columns(part)]
    if not other_tokenizers and 0 < len(lacking) < len(rows):
        raise DistillError(
            f"{', '.join(lacking)} has no column `{TEACHER_PROMPT.column}`, and "
            f"{', '.join(name for name in rows if name not in lacking)} has: the teacher reads another prompt in all "
            "data or in none. Add the column, or remove it everywhere."
        )


def _columns_of(rows: Examples) -> list[str]:
    return rows.column_names or list(next(iter(rows)))


def _with_weight_1(rows: Examples) -> Examples:
    features = Features({**cast(Features, rows.features), WEIGHT: Value("float32")})
    return rows.map(lambda row: {WEIGHT: 1.0}, features=features)


def _row_columns(rows: Examples) -> list[str]:
    return [name for name in _columns_of(rows) if name.startswith("teacher_")]


def _with_empty(rows: Examples, columns: Iterable[str]) -> Examples:
    """Return rows with further columns of empty lists."""
    if not (names := [*columns]):
        return rows
    features = Features({**cast(Features, rows.features), **{name: List(Value("int64")) for name in names}})
    return rows.map(lambda row: {name: [] for name in names}, features=features)


def num_training_rows(args: TrainingArguments) -> int:
    """Return the number of rows that `max_steps` optimizer steps use."""
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def mix_sources(data: Data, rows: dict[str, Examples], seed: int, count: int) -> Examples:
    """Mix the rows of all sources by the weights of the recipe."""
    weights = {name: source.weight for name, source in data.sources.items()}
    if data.scheduled:
        points = {name: parse_schedule(weight, f"data.{name}.weight", low=0) for name, weight in weights.items()}
        return mix_scheduled(cast(dict[str, Dataset], rows), points, seed, count)
    return mix(rows, cast(dict[str, float], weights), seed, data.stopping_strategy)


def mix_and_pack(data: Data, rows: dict[str, Examples], seed: int, count: int) -> Examples:
    """Mix the rows of all sources, and pack them if the recipe sets `packing`."""
    mixed = mix_sources(data, rows, seed, count)
    return pack(mixed, data.max_length, seed) if data.packing else mixed


def collator_of(data: Data, tokenizer: PreTrainedTokenizerBase) -> Collator:
    """Return the collator for the rows of a recipe. Padding is masked, so any token id can be used for it."""
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return Collator(pad, tuple(data.sources))


def first_rows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    examples: int,
    other_tokenizers: Sequence[OtherTokenizer] = (),
) -> Examples:
    """Return training rows made of the first examples of each source, without a held-out split."""
    data = recipe.data
    tokenizers = _Tokenizers(tokenizer, chat_template_of(data, tokenizer), () if data.packing else other_tokenizers)
    rows = {
        name: _rows(limit_rows(load_source(recipe, name), examples), recipe, name, tokenizers) for name in data.sources
    }
    _check_teacher_prompts({f"data.{name}": part for name, part in rows.items()}, other_tokenizers)
    return mix_and_pack(data, _with_equal_columns(rows), seed, examples)


def load_split(recipe: Recipe, name: str, seed: int, of_data: bool = False) -> tuple[Examples, Dataset | None]:
    """Load the training examples of one source, and its held-out examples if the recipe holds some out.

    Held-out examples have the completions of the data, also where the teacher completes the prompts.

    Args:
        recipe: The recipe.
        name: Name of the source.
        seed: Seed of the split.
        of_data: Whether training examples of a source with generate: true have the completions of the data, for the
            same prompts.
    """
    source, share = recipe.data.sources[name], recipe.data.eval.holdout
    if not source.generate:
        documents = load_source(recipe, name)
        if not share:
            return documents, None
        assert isinstance(documents, Dataset)  # a recipe cannot hold out examples of a stream
        return split_held_out(documents, share, seed)
    generated = None if of_data else load_source(recipe, name)
    if generated is not None and not share:
        return generated, None
    documents = load_source(recipe, name, of_data=True)
    assert isinstance(documents, Dataset)  # prompts of a stream cannot be completed
    held_out = split_held_out(documents, share, seed)[1] if share else None
    return generated or documents.select(generation_rows(recipe, len(documents), seed)), held_out


def load_source(recipe: Recipe, name: str, of_data: bool = False) -> Examples:
    """Load the examples of one source; in an on-policy recipe as prompts and completions.

    Args:
        recipe: The recipe.
        name: Name of the source.
        of_data: Whether a source with generate: true has the completions of the data, and not those of the teacher.
    """
    source = recipe.data.sources[name]
    if source.generate and not of_data:
        documents = generated_examples(recipe, name)
    else:
        documents = load_examples(source.path, source.split, source.name, source.column, source.streaming)
    if (by := source.loss_weight) is not None and not of_data:  # the column is that of the completions
        path = recipe.generated_folder(name) if source.generate else source.path
        documents = with_loss_weights(documents, by.column, by.temperature, f"data.{name} ({path})")
    names = [spec.name for spec in recipe.teachers if not spec.sources]
    check_no_teacher_column(
        documents, names, f"data.{name}", "give the teachers `sources`, by which recipes route rows"
    )
    return _with_prompts(documents, recipe, f"data.{name}")


def with_origin(rows: Examples, recipe: Recipe, name: str, of_data: bool = False) -> Examples:
    """Return the rows of a source with its origin as a column, if it has one.

    Args:
        rows: The rows.
        recipe: The recipe.
        name: Name of the source.
        of_data: Whether rows of a source with generate: true have the completions of the data.
    """
    sources = recipe.data.sources
    is_read = recipe.distill.by_origin or any(source.origin for source in sources.values())
    author = sources[name].author if name in sources else None
    if of_data and name in sources and sources[name].generate:
        author = "data"
    if author is None or not is_read:
        return rows
    index = ORIGINS.index(author)
    features = None if rows.features is None else Features({**rows.features, ORIGIN: Value("int64")})
    return map_exactly(rows, lambda row, number: {ORIGIN: index}, features)


def _without_unread_origin(documents: Examples, recipe: Recipe) -> Examples:
    """Return the examples without a column `origin` that the recipe does not read, which may be of another meaning."""
    is_read = recipe.distill.by_origin and all(source.author is None for source in recipe.data.sources.values())
    return documents if is_read or ORIGIN not in _columns_of(documents) else documents.remove_columns(ORIGIN)


def _with_prompts(documents: Examples, recipe: Recipe, where: str) -> Examples:
    """Return the examples as prompts and completions in an on-policy recipe, and with the prompts of the teacher."""
    documents = _without_unread_origin(documents, recipe)
    template = next((spec.prompt for spec in recipe.all_teachers if spec.prompt), None)
    has_prompts = TEACHER_PROMPT.column in (documents.column_names or list(next(iter(documents))))
    documents = prompt_rows(documents, where) if recipe.on_policy or template or has_prompts else documents
    return documents if template is None else with_teacher_prompts(documents, template, where)


def chat_template_of(data: Data, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template that renders the conversations of a recipe; None for that of the tokenizer.

    The tokenizer is saved with the student. It keeps its own template if that renders the same text, because not every
    inference engine supports `{% generation %}`. Otherwise it gets the template of the recipe.
    """
    if data.chat_template is None:
        return None
    template = training_template(data.chat_template)
    if tokenizer.chat_template is None or not renders_same(tokenizer, template):
        tokenizer.chat_template = template
    return template


def _rows(documents: Examples, recipe: Recipe, name: str, tokenizers: _Tokenizers, of_data: bool = False) -> Examples:
    """Tokenize the examples of a source; `eval` uses the options of `task`.

    With `of_data`, those of a source with generate: true have the completions of the data.
    """
    data = recipe.data
    source = data.sources.get(name, data.task)
    where = f"data.{name} ({data.eval.path if name == 'eval' else source.path})"
    columns = documents.column_names or list(next(iter(documents)))
    trimming = tokenizers.trimming if "input_ids" in columns else None  # these rows are tokens already
    rows = tokenize_dataset(
        documents,
        tokenizers.student if trimming is None else trimming.full_tokenizer,
        data.max_length,
        source.assistant_only,
        source.overflow,
        _second_prompt(recipe, columns),
        where,
        tokenizers.chat_template,
        tokenizers.others,
    )
    if trimming is not None:
        rows = with_new_ids(rows, trimming.kept_ids)
    return with_origin(rows, recipe, name, of_data)


def _second_prompt(recipe: Recipe, columns: Sequence[str]) -> SecondPrompt | None:
    """Return the second prompt that the teachers of a recipe read, or that the student's view needs."""
    if any(spec.wants_paraphrase for spec in recipe.all_teachers):
        return PARAPHRASE
    return TEACHER_PROMPT if TEACHER_PROMPT.column in columns else None


def _log_targets(rows: Examples, where: str) -> None:
    """Log the share of target tokens of a source, unless it is a stream."""
    if not isinstance(rows, Dataset):
        return
    tokens = targets = 0
    for batch in rows.select_columns(["labels"]).with_format("arrow").iter(1_000):
        labels = batch["labels"].combine_chunks()
        tokens += len(labels.flatten())
        targets += _count(labels.flatten()) - _count(
            pc.list_element(labels, 0)
        )  # the first token of a row is not predicted
    logger.warning(
        f"{where}: {targets:,} of {tokens:,} tokens are target tokens ({targets / tokens:.1%}). `hf-distill recipes "
        "preview` shows them."
    )


def _count(labels: pa.Array) -> int:
    return pc.sum(pc.not_equal(labels, IGNORE_INDEX)).as_py()


def limit_rows(rows: ExamplesT, count: int | None) -> ExamplesT:
    """Return at most a number of rows, from the beginning; None: all of them."""
    if count is None or (isinstance(rows, Dataset) and len(rows) <= count):
        return rows
    return cast(ExamplesT, rows.take(count))


def _columns(rows: Dataset) -> Iterator[pa.ListArray]:
    """Yield the token ids of 1,000 rows at a time as an Arrow array of lists."""
    for batch in rows.select_columns(["input_ids"]).with_format("arrow").iter(1_000):
        yield batch["input_ids"].combine_chunks()


def _mean_length(rows: Dataset) -> float:
    return round(sum(len(ids.flatten()) for ids in _columns(rows)) / len(rows), 1)
