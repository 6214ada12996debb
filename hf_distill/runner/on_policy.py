"""A recipe's `on_policy`: prompts in the place of rows, and the trainer's arguments."""

from dataclasses import MISSING, fields
from typing import Any

from datasets import Dataset, Features
from transformers import TrainingArguments
from transformers.utils import logging

from ..data import Examples, split_held_out
from ..data.checks import by_row, check_messages
from ..data.conversations import Conversations
from ..data.json_files import ExactJson, map_exactly
from ..data.roles import check_roles
from ..errors import DistillError, require_package
from ..recipe.schema import Recipe
from .datasets import load_source, mix_sources

logger = logging.get_logger(__name__)


def on_policy_arguments(recipe: Recipe, given: dict[str, Any]) -> Any:
    """The arguments of an `OnPolicyDistillTrainer`.

    Args:
        recipe: with `on_policy`.
        given: fields of `DistillConfig` that the recipe sets; others have the defaults of TrainingArguments, not TRL's.
    """
    require_package("trl", "trl", "on_policy")
    from ..trl import OnPolicyDistillConfig

    spec = recipe.on_policy
    assert spec is not None
    plain: dict[str, Any] = {field.name: field.default for field in fields(TrainingArguments) if field.init}
    plain = {name: default for name, default in plain.items() if default is not MISSING}
    written = spec.model_dump(exclude={"fraction", "vllm"})
    written |= {"on_policy_fraction": spec.fraction, "shuffle_dataset": not recipe.data.scheduled}
    if spec.vllm:
        written |= {"use_vllm": True, "vllm_mode": spec.vllm}
    return OnPolicyDistillConfig(**plain | given | written)


def prepare_prompts(recipe: Recipe, tokenizer: Any, seed: int, count: int) -> Examples:
    """Rows of `prompt` and `completion` of a recipe's sources, mixed; what `prepare_data` holds out is left out.

    Args:
        recipe: with `on_policy`.
        tokenizer: the student's.
        seed: as of `prepare_data`.
        count: as of `prepare_data`.

    Raises:
        DistillError: a source without prompts, or whose prompts are all too long.
    """
    data, spec = recipe.data, recipe.on_policy
    assert spec is not None
    rows = {}
    for name in data.sources:
        documents: Any = load_source(recipe, name)
        if data.eval.holdout:
            documents, _ = split_held_out(documents, data.eval.holdout, seed)
        rows[name] = _that_fit(documents, name, tokenizer, data.max_length - spec.max_completion_length)
    firsts = {name: next(iter(part)) for name, part in rows.items()}
    kinds = {name: "texts" if isinstance(row["prompt"], str) else "messages" for name, row in firsts.items()}
    if len({*kinds.values()}) > 1:
        raise DistillError(f"Prompts of one mixture must be all texts or all messages: {kinds}.")
    return mix_sources(data, rows, seed, count)


def _that_fit(rows: Any, name: str, tokenizer: Any, limit: int) -> Any:
    """Rows whose prompt has at most so many tokens; messages as their text, where the template reads no parts."""
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
        return len(ids["input_ids"]) <= limit

    kept = rows.filter(fits)
    if isinstance(rows, Dataset):
        if len(kept) == 0:
            raise DistillError(
                f"data.{name}: all {len(rows)} prompts are longer than the {limit} tokens that max_length leaves them."
            )
        if len(kept) < len(rows):
            logger.warning(f"{len(rows) - len(kept)} of {len(rows)} prompts of {name} have more than {limit} tokens.")
    return kept
