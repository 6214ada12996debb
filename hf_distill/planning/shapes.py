"""Configs of public models that are packaged, so that planning needs no download."""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TypedDict

from transformers import AutoConfig, PretrainedConfig

from ..core.json_types import JSONObject
from ..core.references import reference_kind
from ..errors import DistillError, did_you_mean
from ..hub import reading
from ..runner.model_loading import resolve_model


class KnownShape(TypedDict):
    """Ids of models of one shape, their published number of parameters, and the fields that determine their shapes."""

    ids: list[str]
    parameters: int
    config: JSONObject


@cache
def known_shapes() -> dict[str, KnownShape]:
    """Return the packaged shapes by the id of the model."""
    entries = json.loads(files(__package__).joinpath("shapes.json").read_text())
    return {name: entry for entry in entries for name in entry["ids"]}


def model_config(reference: str, revision: str | None = None) -> PretrainedConfig:
    """Return the config of a recipe's model without reading weights.

    The sources are, in this order: a package or smoke model, a folder with a config.json, the packaged table, the Hub.

    Args:
        reference: the value of a recipe's `model:`.
        revision: commit, tag or branch of an id; the packaged table ignores it.

    Raises:
        DistillError: no source has the config.
    """
    if reference_kind(reference) in ("package", "smoke"):
        reference = resolve_model(reference)
    table = known_shapes()
    if reference in table and not Path(reference).is_dir():
        values = dict(table[reference]["config"])
        return AutoConfig.for_model(str(values.pop("model_type")), **values)
    try:
        with reading(reference):
            return AutoConfig.from_pretrained(reference, revision=revision, trust_remote_code=False)
    except DistillError as error:
        raise DistillError(
            f"The config of model {reference!r} was not found: it is no folder with a config.json, it is not among the "
            f"{len(table)} ids of the packaged table{did_you_mean(reference, table)}, and it could not be read from "
            f"the Hub ({error}). Correct the id, or pass the path to a folder with the model's config.json; weights "
            "are not needed."
        ) from None
