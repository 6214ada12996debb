"""All classes, in several processes: `python -m model_classes.run --out FILE.jsonl`.

Classes that FILE already has are not run again.

--workers N       processes (2)
--again a,b       statuses that are run again: wrong, crash, cannot, refused, compared
--only A,B        only these classes, also if FILE has them
--summary FILE    counts, and every class that is not compared, with its reason
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

SECONDS = 90  # for one class
ADDRESS_SPACE = 10 * 2**30  # a config that did not become tiny fails here, not on the machine


class TooLateError(BaseException):
    """A class took too long; not an `Exception`, which the comparison would catch."""


def work(names: list[str], out: Path) -> None:
    """Compare classes one by one; write a line before and after each, so that a crash of the process is visible."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    quiet()
    from .classes import candidates
    from .compare import compare_class

    classes, partners = candidates(), {}
    gc.freeze()  # garbage collection in each training would walk every module of transformers

    def late(_signal, _frame):
        raise TooLateError(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, late)
    for name in names:
        append(out, {"class": name, "status": "started"})
        signal.alarm(SECONDS)
        try:
            result = compare_class(classes[name], partners)
        except TooLateError as error:
            result = {"class": name, "status": "cannot", "reason": str(error)}
        finally:
            signal.alarm(0)
        append(out, result)


def quiet() -> None:
    """Disable warnings of other libraries."""
    import logging
    import warnings

    import torch
    from transformers.utils import logging as logs

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logs.set_verbosity_error()
    logging.disable(logging.WARNING)


def append(out: Path, line: dict) -> None:
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(out: Path) -> dict[str, dict]:
    """Return the last line of each class."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {line["class"]: line for line in lines}


def summary(results: dict[str, dict]) -> dict:
    import torch
    import transformers

    import hf_distill

    counts = Counter(r["status"] for r in results.values())
    runs = Counter(p.get("status", "compared") for r in results.values() for p in r.get("pairs", []))
    return {
        "versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
            "hf_distill": hf_distill.__version__,
        },
        "classes": len(results),
        **{status: counts.get(status, 0) for status in ("compared", "refused", "wrong", "crash", "cannot")},
        "runs": dict(runs),
        "seconds": round(sum(r.get("seconds", 0) for r in results.values())),
        **{
            f"{status}_classes": {n: r["reason"] for n, r in sorted(results.items()) if r["status"] == status}
            for status in ("refused", "wrong", "crash", "cannot")
        },
        "compared_classes": sorted(n for n, r in results.items() if r["status"] == "compared"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", default="")
    parser.add_argument("--only", default="")
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--names", help=argparse.SUPPRESS)  # of a worker
    options = parser.parse_args()
    if options.names:
        work(options.names.split(","), options.out)
        return 0
    quiet()
    from .classes import candidates

    names, done = list(candidates()), read(options.out)
    again = {"queued", "started", *options.again.split(",")}
    todo = [n for n in names if n not in done or done[n]["status"] in again]
    if options.only:
        todo = options.only.split(",")
    start = time.monotonic()
    spread(todo, options.out, options.workers)
    results = {n: r for n, r in read(options.out).items() if n in names}
    counts_by_status = summary(results)
    if options.summary:
        options.summary.write_text(json.dumps(counts_by_status, indent=2) + "\n")
    counts = ", ".join(f"{name} {value}" for name, value in counts_by_status.items() if isinstance(value, int))
    sys.stdout.write(f"{counts}; {time.monotonic() - start:.0f} s\n")
    return bool(counts_by_status["wrong"] or counts_by_status["crash"])


def spread(todo: list[str], out: Path, workers: int) -> None:
    """Run classes in several processes; a process that dies is a crash of its class, and the others continue."""
    for name in todo:
        append(out, {"class": name, "status": "queued"})
    shares = [todo[i::workers] for i in range(workers)]
    running: dict[int, subprocess.Popen] = {}
    while any(shares) or running:
        for i, share in enumerate(shares):
            if i not in running and share:
                command = [sys.executable, "-m", "model_classes.run", "--out", str(out), "--names", ",".join(share)]
                running[i] = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        time.sleep(0.5)
        for i, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[i]
            done = read(out)
            left = [n for n in shares[i] if done[n]["status"] in ("queued", "started")]
            if process.returncode and done[left[0]]["status"] == "queued":
                raise SystemExit(f"a worker ended with {process.returncode} before its first class")
            if process.returncode:
                reason = f"the process ended with {process.returncode}"
                append(out, {"class": left[0], "status": "crash", "reason": reason})
            shares[i] = left[1:] if process.returncode else []


if __name__ == "__main__":
    sys.exit(main())
