"""Titles of the models of a run with a quantized student, in tables. Imports no torch."""

from collections.abc import Mapping

from .held_out_metrics import CONTROL_TITLES

_QUANTIZED = ("before", "student", "control")
_COMPARED = {
    "full_precision": CONTROL_TITLES["full_precision"],
    "quantized_after": "same student, quantized after training",
}


def with_quantization(titles: Mapping[str, str], quantized: bool) -> dict[str, str]:
    """Return name -> title of models, with the words that a quantized student needs.

    Args:
        titles: the titles of a run without quantization.
        quantized: whether the student of the run is quantized.
    """
    if not quantized:
        return dict(titles)
    titles = {name: f"{title}, quantized" if name in _QUANTIZED else title for name, title in titles.items()}
    first = {name: title for name, title in titles.items() if name in ("before", "student")}
    return first | _COMPARED | {name: title for name, title in titles.items() if name not in first}
