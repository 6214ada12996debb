"""Measure the fused loss against the lower bound of four matrix products, and against other libraries.

python benchmarks/head_loss.py [rounds]
"""

import json
import sys
from functools import partial

import torch
from measure import interleaved, peak_and_seconds, save

SHAPES = {"S1": (49152, 576, 960, 2048), "S2": (151936, 896, 1536, 1024)}  # V, H_s, H_t, N


def tensors(shape, tokens=None, target_share=1.0, dtype=torch.float32, frozen=False):
    vocab, h_s, h_t, n = SHAPES[shape]
    n = tokens or n
    g = torch.Generator().manual_seed(0)
    hs = torch.randn(n, h_s, generator=g).to(dtype).requires_grad_()
    ws = (torch.randn(vocab, h_s, generator=g) * 0.05).to(dtype).requires_grad_(not frozen)
    ht = torch.randn(n, h_t, generator=g).to(dtype)
    wt = (torch.randn(vocab, h_t, generator=g) * 0.05).to(dtype)
    labels = torch.randint(0, vocab, (n,), generator=g)
    labels[int(target_share * n) :] = -100
    return hs, ws, ht, wt, labels


def lower_bound(hs, ws, ht, wt, labels, chunk):
    """Compute only the logits of both models and the gradients of hidden states and weight: the lower bound."""
    s, t = torch.empty(chunk, len(ws)), torch.empty(chunk, len(wt))
    by_hidden, by_weight = torch.zeros_like(hs), torch.zeros_like(ws)
    with torch.no_grad():
        for i in range(0, len(hs), chunk):
            rows = slice(i, i + chunk)
            n = len(hs[rows])
            torch.mm(hs[rows], ws.t(), out=s[:n])
            torch.mm(ht[rows], wt.t(), out=t[:n])
            torch.mm(s[:n], ws, out=by_hidden[rows])
            by_weight.addmm_(s[:n].t(), hs[rows])


def ours(hs, ws, ht, wt, labels, chunk, divergence="forward_kl", alpha=1.0, temperature=1.0):
    from hf_distill.head import fused_distillation_loss

    fused_distillation_loss(
        hs, ws, ht, wt, labels, divergence=divergence, alpha=alpha, temperature=temperature, chunk_tokens=chunk
    ).backward()


def trl_chunked(hs, ws, ht, wt, labels, beta):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    _chunked_divergence_loss(hs[None], ht[None], ws, wt, (labels != -100).long()[None], beta)[0].backward()


def trl_dense(hs, ws, ht, wt, labels, beta):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = hs @ ws.t(), ht @ wt.t()
    GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], labels=labels[None], beta=beta, temperature=1.0
    ).backward()


def liger(hs, ws, ht, wt, labels, beta):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=1024
    )
    loss(hs, ws, ht, wt, labels).backward()


def one(case: dict) -> dict:
    case = dict(case)
    call = globals()[case.pop("who")]
    inputs = tensors(
        case.pop("shape"), case.pop("tokens", None), case.pop("asked", 1.0), frozen=case.pop("frozen", False)
    )
    small = [
        x[:16].detach().clone().requires_grad_(x.requires_grad) if x.shape[0] == len(inputs[4]) else x for x in inputs
    ]
    call(*small, **case)  # warm up imports and threads
    for x in (*small, *inputs):
        x.grad = None
    del small
    return peak_and_seconds(lambda: call(*inputs, **case))


def accuracy() -> list[dict]:
    """Compute the relative error (norms) of the gradients against float64, for N = 512 of S1."""
    results = []
    peers = {"trl_chunked": trl_chunked, "trl_dense": trl_dense, "liger": liger}
    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": 0.5}
    for divergence in ("forward_kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl", "total_variation"):
        for dtype in (torch.bfloat16, torch.float32):
            low = tensors("S1", 512, dtype=dtype)
            exact = [x if x.dtype == torch.long else x.detach().double().requires_grad_(x.requires_grad) for x in low]
            ours(*exact, chunk=None, divergence=divergence)
            chunks = (64, 256, None)
            calls = {f"ours, chunk {c}": partial(ours, *low, chunk=c, divergence=divergence) for c in chunks}
            if dtype is torch.bfloat16 and divergence in betas:
                calls |= {name: partial(peer, *low, betas[divergence]) for name, peer in peers.items()}
            for name, call in calls.items():
                low[0].grad = low[1].grad = None
                try:
                    call()
                except Exception as error:  # a library that fails is reported
                    results.append(
                        {"who": name, "divergence": divergence, "dtype": str(dtype), "failed": repr(error)[:200]}
                    )
                    continue
                errors = [
                    ((a.grad.double() - b.grad).norm() / b.grad.norm()).item()
                    for a, b in zip(low[:2], exact[:2], strict=True)
                ]
                row = {
                    "who": name,
                    "divergence": divergence,
                    "dtype": str(dtype),
                    "hidden": errors[0],
                    "weight": errors[1],
                }
                results.append(row)
                print(row, flush=True)
    return results


CASES = [
    {"who": "lower_bound", "shape": "S1", "chunk": 256},
    {"who": "ours", "shape": "S1", "chunk": 256},
    {"who": "trl_chunked", "shape": "S1", "beta": 0.0},
    {"who": "liger", "shape": "S1", "beta": 0.0},
    {"who": "trl_dense", "shape": "S1", "beta": 0.0},
    {"who": "lower_bound", "shape": "S1", "chunk": 64},
    {"who": "ours", "shape": "S1", "chunk": 64},
    {"who": "ours", "shape": "S1", "chunk": 256, "divergence": "js"},
    {"who": "ours", "shape": "S1", "chunk": 256, "divergence": "skew_kl"},
    {"who": "trl_chunked", "shape": "S1", "beta": 0.5},
    {"who": "liger", "shape": "S1", "beta": 0.5},
    {"who": "trl_dense", "shape": "S1", "beta": 0.5},
    {"who": "ours", "shape": "S1", "chunk": 256, "alpha": 0.5},
    {"who": "ours", "shape": "S1", "chunk": 256, "alpha": 0.5, "temperature": 2.0},
    {"who": "ours", "shape": "S1", "chunk": 256, "asked": 0.25},
    {"who": "trl_chunked", "shape": "S1", "beta": 0.0, "asked": 0.25},
    {"who": "ours", "shape": "S1", "chunk": 256, "frozen": True},
    {"who": "lower_bound", "shape": "S2", "chunk": 129},
    {"who": "ours", "shape": "S2", "chunk": None},
    {"who": "ours", "shape": "S2", "chunk": 64},
    {"who": "trl_chunked", "shape": "S2", "beta": 0.0},
    {"who": "liger", "shape": "S2", "beta": 0.0},
    {"who": "trl_dense", "shape": "S2", "beta": 0.0},
    *({"who": "ours", "shape": "S1", "chunk": 256, "tokens": n} for n in (512, 1024, 4096, 8192)),
]


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(one(json.loads(sys.argv[1]))))
    else:
        rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
        save("head_loss", {"cases": interleaved(__file__, CASES, rounds), "accuracy": accuracy()})
