"""Kills a teacher server, or the run that trains with it, at random times: 15 times each, for two kinds of servers.

python remote_kills.py

After a kill the server is started again, or the run is resumed. The weights, the metrics and the losses of all steps
must equal those of an undisturbed run bit for bit, so no row is lost or trained on twice.
"""

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from killing_servers import APIS, count_retries, kill_client, kill_server, run_undisturbed, running_server, was_killed

from hf_distill.core.io import environment, write_json

RESULT = Path(__file__).parent / "results" / "remote_kills.json"
KILLS = 15


def measure(api: str, folder: Path, random_: random.Random) -> dict[str, Any]:
    """Kill the server and the client of runs of one kind; return what differed."""
    start, results = time.perf_counter(), dict[str, Any]()
    with running_server(api, folder / f"{api}-server") as server:
        expected, seconds = run_undisturbed(server, folder / api)
        for name, kill in {"server": kill_server, "client": kill_client}.items():
            lost, in_time = list[str](), 0  # in time: requests failed, or the run did not reach its end
            for i in range(KILLS):
                trial = folder / f"{api}-{name}-{i}"
                message = kill(server, trial, random_.uniform(0.1, seconds), expected)
                in_time += count_retries(trial) > 0 if name == "server" else was_killed(trial)
                lost += [message] if message else []
            results[name] = {"kills": KILLS, "in_time": in_time, "lost": lost}
            print(
                f"{api}: {KILLS} kills of the {name}, {in_time} in time, {len(lost)} lost something",
                *lost,
                sep="\n  ",
                flush=True,
            )
    return results | {"run_seconds": round(seconds, 1), "seconds": round(time.perf_counter() - start)}


def main() -> None:
    """Measure both kinds of servers and write results/remote_kills.json."""
    random_ = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        servers = {api: measure(api, Path(folder), random_) for api in APIS}
    lost = sum(len(one[name]["lost"]) for one in servers.values() for name in ("server", "client"))
    kills = 2 * KILLS * len(APIS)
    write_json(RESULT, {"environment": environment("cpu"), "kills": kills, "lost": lost, "servers": servers})


if __name__ == "__main__":
    main()
