"""Token ids in the config and generation config of a model."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ...errors import DistillError

logger = logging.get_logger(__name__)
_ID_NAME = re.compile(r"(^|_)token_(id|ids|index)$")  # an id, or a list of ids
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_REFUSED = ("forced_decoder_ids", "force_words_ids", "sequence_bias", "constraints")
Ids = int | list[int] | None


def ids_in_configs(*configs: PretrainedConfig | GenerationConfig | None) -> list[int]:
    """Return the token ids that configs name: of special tokens, of images, ..."""
    ids = list[int]()
    for config in _with_parts(configs):
        for name, value in vars(config).items():
            if _ID_NAME.search(name):
                ids += [value] if isinstance(value, int) else value if isinstance(value, list) else []
    return sorted({index for index in ids if isinstance(index, int) and index >= 0})


def renumber_configs(model: PreTrainedModel, new_ids: Mapping[int, int]) -> None:
    """Replace the token ids in the configs of a model; an id without a token becomes None, or leaves its list.

    Args:
        model: the model, whose configs are changed in place.
        new_ids: id -> new id.

    Raises:
        DistillError: the generation config has settings with ids that cannot be replaced.
    """
    configs = [*_with_parts(configs_of(model))]
    if refused := [name for config in configs for name in _REFUSED if vars(config).get(name)]:
        raise DistillError(
            f"The generation config sets {', '.join(refused)}, whose token ids cannot be renumbered: set it to None "
            "before the vocabulary is trimmed."
        )
    for config in configs:
        for name, value in list(vars(config).items()):
            if value is not None and (_ID_NAME.search(name) or name in _ID_LISTS):
                setattr(config, name, _renumbered(name, value, new_ids))
        if isinstance(words := vars(config).get("bad_words_ids"), list):
            kept_words = [
                [new_ids[index] for index in word] for word in words if all(index in new_ids for index in word)
            ]
            setattr(config, "bad_words_ids", kept_words or None)  # noqa: B010  # no attribute of every config


def _renumbered(name: str, value: Any, new_ids: Mapping[int, int]) -> Ids:
    if isinstance(value, int):
        if value >= 0 and value not in new_ids:
            logger.warning(f"{name} is {value}, an id without a token: it is None in the config of the trimmed model.")
        return new_ids.get(value) if value >= 0 else value
    kept_ids = [new_ids[index] for index in value if index in new_ids]
    if len(kept_ids) < len(value) and name not in _ID_LISTS:
        logger.warning(f"{name} has ids without a token, which the config of the trimmed model does not have.")
    return kept_ids or None


def configs_of(model: PreTrainedModel) -> tuple[PretrainedConfig, GenerationConfig | None]:
    """Return the config of a model and its generation config."""
    return model.config, getattr(model, "generation_config", None)


def _with_parts(
    configs: Iterable[PretrainedConfig | GenerationConfig | None],
) -> Iterator[PretrainedConfig | GenerationConfig]:
    """Yield configs and those in them."""
    pending = [config for config in configs if config is not None]
    while pending:
        config = pending.pop()
        yield config
        pending += [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
