"""Profile a chunk of the fused loss: four matrix products, and the passes of forward KL (ms per chunk of 256 tokens).

python benchmarks/head_profile.py
"""

import time

import torch
from measure import save

VOCAB, H_S, H_T, CHUNK, ROWS = 49152, 576, 960, 256, 12


def milliseconds(call, repeats=7) -> float:
    """Return the shortest time of several repeats, in ms."""
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 1000 * best


def products() -> dict[str, float]:
    x, y = torch.randn(CHUNK, H_S), torch.randn(CHUNK, H_T)
    w, u = torch.randn(VOCAB, H_S), torch.randn(VOCAB, H_T)
    logits, by_hidden, by_weight = torch.empty(CHUNK, VOCAB), torch.empty(CHUNK, H_S), torch.zeros(VOCAB, H_S)
    return {
        "student logits": milliseconds(lambda: torch.mm(x, w.t(), out=logits)),
        "teacher logits": milliseconds(lambda: torch.mm(y, u.t(), out=logits)),
        "gradient of hidden states": milliseconds(lambda: torch.mm(logits, w, out=by_hidden)),
        "gradient of the weight": milliseconds(lambda: by_weight.addmm_(logits.t(), x)),
    }


def passes() -> dict[str, float]:
    a, b, out = torch.randn(ROWS, VOCAB), torch.randn(ROWS, VOCAB), torch.empty(ROWS, VOCAB)
    calls = {
        "softmax (twice)": (2, lambda: torch.softmax(a, -1, out=out)),
        "maximum (four times)": (4, lambda: a.amax(-1)),
        "subtract (twice)": (2, lambda: torch.sub(a, b, out=out)),
        "dot product": (1, lambda: torch.mul(a, b, out=out).sum(-1)),
        "scale and write": (1, lambda: torch.mul(a, 0.5, out=out)),
    }
    return {name: times * milliseconds(call, 50) * CHUNK / ROWS for name, (times, call) in calls.items()}


if __name__ == "__main__":
    results = {"products_ms": products(), "passes_ms": passes()}
    print(results)
    save("head_profile", results)
