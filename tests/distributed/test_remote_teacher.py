"""A server that fails for one rank ends training on all ranks, with one checkpoint."""

import remote_ranks
import torch
from launching import run_both_ranks
from servers.teacher_servers import VLLMServer
from tiny import build


def test_no_rank_hangs_when_the_server_of_another_one_fails(tmp_path):
    """The server of rank 1 fails in the second micro-batch of the third step."""
    with VLLMServer(build("llama", 1, layers=3, width=48)) as one, VLLMServer(one.model) as two:

        def train(folder, *more):
            return run_both_ranks(remote_ranks.__file__, str(tmp_path / folder), one.url, two.url, *more)

        assert [code for code, _ in train("whole")] == [0, 0]
        answer, counted = two.answer, []

        def failing(path, body):
            if path == "/v1/completions":
                counted.append(path)
                if len(counted) > 1 + 2 * 4 + 2:  # the check of the limit, two steps, and a micro-batch
                    raise ConnectionResetError
            return answer(path, body)

        two.answer = failing
        for rank, (code, text) in enumerate(train("cut")):
            assert code == 3, text
            assert f"rank {rank}: Training stops after step 2 of 4." in text
            assert two.url in text
            assert "checkpoint-2 is complete" in text
        two.answer = answer
        assert [code for code, _ in train("cut", "resume")] == [0, 0]
    whole, resumed = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "cut"))
    assert all(whole[name].equal(resumed[name]) for name in whole)
