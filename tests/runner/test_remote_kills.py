"""A sample of `benchmarks/remote_kills.py`: a killed server or a killed run changes no weight, metric or loss."""

import sys

import pytest
from killing_servers import APIS, count_retries, kill_client, kill_server, run_undisturbed, running_server, was_killed

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is of POSIX")


@pytest.mark.parametrize("api", APIS)
def test_killing_the_server_or_the_run_changes_no_result(tmp_path, api):
    with running_server(api, tmp_path / "server") as server:
        expected, seconds = run_undisturbed(server, tmp_path / "undisturbed")
        assert len(expected["logs"]) > 12
        assert kill_server(server, tmp_path / "server-killed", 0.6 * seconds, expected) is None
        assert kill_client(server, tmp_path / "client-killed", 0.6 * seconds, expected) is None
    assert was_killed(tmp_path / "client-killed")
    assert count_retries(tmp_path / "undisturbed") == 0
