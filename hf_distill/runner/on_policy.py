"""The `on_policy` section of a recipe: the prompts, and the arguments of the trainer."""

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset, Features
from transformers import BatchEncoding, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from ..data import Examples
from ..data.checks import by_row, check_messages
from ..data.conversations import Conversations
from ..data.json_files import ExactJson, map_exactly
from ..data.roles import check_roles
from ..errors import DistillError, require_package
from ..recipe.schema import Recipe
from .datasets import load_split, mix_sources, with_origin

if TYPE_CHECKING:
    from ..trl import OnPolicyDistillConfig

logger = logging.get_logger(__name__)


def on_policy_arguments(recipe: Recipe, recipe_arguments: dict[str, Any]) -> "OnPolicyDistillConfig":
    """Build the arguments of an `OnPolicyDistillTrainer`.

    Args:
        recipe: A recipe with `on_policy`.
        recipe_arguments: Fields of `DistillConfig` that the recipe sets. All other fields have the defaults of
            TrainingArguments, not those of TRL.
    """
    require_package("trl", "trl", "on_policy")
    from ..trl import OnPolicyDistillConfig

    spec = recipe.on_policy
    assert spec is not None
    defaults = {f.name: f.default for f in fields(TrainingArguments) if f.init and f.default is not MISSING}
    on_policy_fields = spec.model_dump(exclude={"fraction", "vllm"})
    on_policy_fields |= {"on_policy_fraction": spec.fraction, "shuffle_dataset": not recipe.data.scheduled}
    if spec.vllm:
        on_policy_fields |= {"use_vllm": True, "vllm_mode": spec.vllm}
    return OnPolicyDistillConfig(**defaults | recipe_arguments | on_policy_fields)


def prepare_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int, count: int) -> Examples:
    """Return the mixed rows (`prompt`, `completion`) of all sources, without those that `prepare_data` holds out.

    Args:
        recipe: A recipe with `on_policy`.
        tokenizer: The student's tokenizer.
        seed: Seed of the split and of the mixture, as in `prepare_data`.
        count: Number of rows that the training uses, as in `prepare_data`.

    Raises:
        DistillError: A source has no prompts, all its prompts are too long, or the formats of prompts differ.
    """
    data, spec = recipe.data, recipe.on_policy
    assert spec is not None
    rows = {}
    for name in data.sources:
        documents, _ = load_split(recipe, name, seed)
        part = _filter_by_prompt_length(documents, name, tokenizer, data.max_length - spec.max_completion_length)
        rows[name] = with_origin(part, recipe, name)
    firsts = {name: next(iter(part)) for name, part in rows.items()}
    kinds = {name: "texts" if isinstance(row["prompt"], str) else "messages" for name, row in firsts.items()}
    if len({*kinds.values()}) > 1:
        raise DistillError(f"The prompts of all sources must have the same format, texts or messages; got {kinds}.")
    return mix_sources(data, rows, seed, count)


def _filter_by_prompt_length(rows: Examples, name: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> Examples:
    """Keep rows whose prompt has at most `limit` tokens; flatten text parts if the template does not support them."""
    if isinstance(next(iter(rows))["prompt"], list):
        conversations = Conversations(tokenizer)

        def checked(row: dict) -> dict:
            columns = [column for column in ("prompt", "completion") if row.get(column)]
            for column in columns:
                check_roles(check_messages(row, column), conversations.chat_template, column)
            return {column: conversations.normalize(row[column]) for column in columns}

        features = rows.features
        if features and any(isinstance(kind, ExactJson) for kind in features.values()):
            columns = {column: ExactJson() for column in ("prompt", "completion") if column in features}
            rows = map_exactly(rows, by_row(checked, rows, f"data.{name}"), Features({**features, **columns}))
        else:
            rows = rows.map(by_row(checked, rows, f"data.{name}"), with_indices=True)

    def fits(row: dict) -> bool:
        if isinstance(row["prompt"], str):
            return len(tokenizer(row["prompt"])["input_ids"]) <= limit
        ids = tokenizer.apply_chat_template(row["prompt"], tokenize=True, return_dict=True, add_generation_prompt=True)
        return len(cast(BatchEncoding, ids)["input_ids"]) <= limit

    short_rows = rows.filter(fits)
    if isinstance(rows, Dataset):
        if len(short_rows) == 0:
            raise DistillError(
                f"data.{name}: all {len(rows)} prompts have more than the {limit} tokens that data.max_length leaves "
                "after on_policy.max_completion_length. Raise data.max_length."
            )
        if len(short_rows) < len(rows):
            logger.warning(
                f"{len(rows) - len(short_rows)} of {len(rows)} prompts of {name} have more than {limit} tokens "
                "and are not used."
            )
    return short_rows
