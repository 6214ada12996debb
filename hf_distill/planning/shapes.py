"""Shapes of public models, known without a download."""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ..core.references import reference_kind
from ..errors import DistillError, did_you_mean
from ..hub import reading
from ..runner.model_loading import resolve_model


@cache
def known_shapes() -> dict[str, dict[str, Any]]:
    """Id -> `{"parameters": as published, "config": the fields that shape the model}`."""
    entries = json.loads(files(__package__).joinpath("shapes.json").read_text())
    return {name: entry for entry in entries for name in entry["ids"]}


def model_config(reference: str, revision: str | None = None) -> PretrainedConfig:
    """The config of a recipe's model, from the nearest place that has it; no weights are read.

    A reference to a package or a smoke model, a folder with a config.json, the packaged table, the Hub.

    Args:
        reference: as in a recipe's `model:`.
        revision: commit, tag or branch of an id; the table is for all of them.

    Raises:
        DistillError: nobody knows it.
    """
    if reference_kind(reference) in ("package", "smoke"):
        reference = resolve_model(reference)
    table = known_shapes()
    if reference in table and not Path(reference).is_dir():
        return AutoConfig.for_model(**table[reference]["config"])
    try:
        with reading(reference):
            return AutoConfig.from_pretrained(reference, revision=revision, trust_remote_code=False)
    except DistillError as error:
        raise DistillError(
            f"The shape of model {reference!r} is unknown: no such folder with a config.json, not among the "
            f"{len(table)} ids of the packaged table{did_you_mean(reference, table)}, and not to be had from the Hub "
            f"({error}). Correct the id, or give a path to a folder with the "
            "model's config.json: weights are not needed."
        ) from None
