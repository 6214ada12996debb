"""Estimate the time of the fused loss on an H100 without a GPU, by counting its operators on meta tensors.

The counts are exact, except that the Triton kernel declares its bytes. The times assume the speeds in `gpu_meter.H100`
and are lower bounds. `gpu.py` measures a real card.

    python benchmarks/gpu_estimates.py
"""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

from measure import save

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from gpu_meter import GIB, H100, SHAPES

OBJECTIVES = {
    "KL": {"divergence": "forward_kl", "alpha": 1.0, "temperature": 1.0},
    "KL + CE, T = 2": {"divergence": "forward_kl"},
    "JS + CE, T = 2": {"divergence": "js"},
    "adaptive KL + CE, T = 2": {"divergence": "adaptive_kl"},
    "KL + CE, T = 2, frozen head": {"divergence": "forward_kl", "is_frozen": True},
}


def estimate(shape: str, objective: str, has_triton: bool) -> dict:
    problem = replace(SHAPES[shape], **OBJECTIVES[objective])
    meter, _ = problem.measure(has_triton=has_triton)
    lower_bound = problem.floor_seconds()
    return {
        "shape": shape,
        "objective": objective,
        "kernel": bool(meter.launches["row_kernel"]),
        "lower_bound_ms": 1e3 * lower_bound,
        "products_ms": 1e3 * meter.product_seconds,
        "other_kernels_ms": 1e3 * meter.elementwise_seconds,
        "relative": meter.seconds / lower_bound,
        "passes": meter.elementwise_bytes / (4 * problem.tokens * problem.vocab),
        "launches": meter.launches.total(),
        "peak_gib": meter.peak_bytes / GIB,
        "head_gradient_gib": 0 if problem.is_frozen else 4 * problem.vocab * problem.hidden / GIB,
    }


if __name__ == "__main__":
    cases = []
    for shape in SHAPES:
        for objective, has_triton in product(OBJECTIVES, (True, False)):
            case = estimate(shape, objective, has_triton)
            if case["kernel"] != has_triton:
                continue  # the kernel does not compute this objective
            cases.append(case)
            print(
                {key: round(value, 2) if isinstance(value, float) else value for key, value in cases[-1].items()},
                flush=True,
            )
    assumed = {
        "flops": {str(dtype).removeprefix("torch."): speed for dtype, speed in H100.flops.items()},
        "bytes_per_second": H100.bandwidth,
    }
    save("gpu_estimates", {"assumed": assumed, "cases": cases})
