"""The table that `gpu.py` prints, and the limits that its results are compared with."""

import math

from gpu_losses import PEERS

MAX_RELATIVE = {"KL + CE": 1.35, "JS + CE": 1.5}  # largest time of an objective, relative to the four matrix products
MAX_EXTRA_PEAK_GIB = 2.5  # largest peak above that of the gradient of the head
MAX_KERNELS_PER_CHUNK = 12


def verdicts(results: dict) -> list[tuple[str, bool]]:
    """Return each limit in words, and whether the results keep it; stages that did not run give none."""
    lines: list[tuple[str, bool]] = []
    if "rows" in (stage := results.get("correctness", {})):
        lines.append(
            (
                f"gradients against float64: {stage['cases']} cases, {len(stage['failed'])} above the limit",
                not stage["failed"],
            )
        )
    for name, shape in _cases(results, "losses"):
        calls = shape["calls"]
        for objective, limit in MAX_RELATIVE.items():
            if "relative" in (row := calls[f"ours, {objective}"]):
                text = f"{name}, {objective}: {row['relative']:.2f} times the matrix products (limit {limit})"
                lines.append((text, row["relative"] <= limit))
        for objective in ("KL", "JS"):
            row = calls[f"ours, {objective}"]
            if "seconds" not in row:
                continue
            peers = {
                k: v for k, v in calls.items() if k.split(", ")[0] in PEERS and k.endswith(objective) and "seconds" in v
            }
            for peer, other in peers.items():
                ratio = other["seconds"] / row["seconds"]
                text = f"{name}, {objective}: {ratio:.2f} times as fast as {peer.split(', ')[0]}"
                lines.append((text, row["seconds"] < other["seconds"]))
            limit = MAX_EXTRA_PEAK_GIB
            extra = row["peak_gib"] - shape["head_gradient_gib"]
            if not math.isnan(extra):
                text = f"{name}, {objective}: peak {extra:.2f} GiB above the head's gradient (limit {limit})"
                lines.append((text, extra <= MAX_EXTRA_PEAK_GIB))
    if "bitwise_equal" in (stage := results.get("fragmented", {})):
        ratio = stage["seconds_after"] / stage["seconds_before"]
        lines.append(
            (
                f"fragmented memory: {ratio:.2f} times the time, gradients bitwise equal: {stage['bitwise_equal']}",
                stage["bitwise_equal"],
            )
        )
    if "waits_for_the_device" in (stage := results.get("waits", {})):
        lines.append(("the loss does not wait for the device", not stage["waits_for_the_device"]))
    for name, row in _cases(results, "profile"):
        lines.append(
            (
                f"{name}: {row['kernels'] / row['chunks']:.0f} kernels a chunk (limit 12)",
                row["kernels"] <= 12 * row["chunks"],
            )
        )
        lines.append((f"{name}: no matrix product in float32", not row["fp32_products"]))
    for variant, row in results.get("trainer", {}).items():
        lines.append((f"trainer, {variant}", "failed" not in row))
    return lines


def print_table(results: dict) -> None:
    """Print times and memory of all losses, and the limits."""
    for name, shape in _cases(results, "losses"):
        print(f"\n{name}: four matrix products {shape['products_seconds'] * 1e3:.1f} ms")
        print(f"  {'':34}{'ms':>9}{'relative':>10}{'peak GiB':>10}")
        for label, row in shape["calls"].items():
            if "failed" in row:
                print(f"  {label:34}{row['failed'][:60]}")
            else:
                print(f"  {label:34}{row['seconds'] * 1e3:9.2f}{row['relative']:10.2f}{row['peak_gib']:10.2f}")
    print()
    for text, passed in verdicts(results):
        print("pass" if passed else "MISS", text)


def _cases(results: dict, stage: str) -> list[tuple[str, dict]]:
    """Return the results of a stage by case; none if it failed, was not run, or needs a GPU that there was not."""
    cases = results.get(stage, {})
    return [] if "failed" in cases else [(name, case) for name, case in cases.items() if isinstance(case, dict)]
