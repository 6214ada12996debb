"""`hf-distill serve`: rows of several requests in one forward, limits, authentication, and what it answers."""

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace

import httpx2
import pytest
import torch
from servers.hidden_server import HiddenServer
from starlette.testclient import TestClient
from tiny import VOCAB, build
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hf_distill import DistillError
from hf_distill.serving.app import create_app
from hf_distill.serving.batching import Batcher, QueueFull
from hf_distill.serving.metrics import Metrics
from hf_distill.serving.server import bind, read_token
from hf_distill.serving.teacher import ServedTeacher
from hf_distill.teachers.remote import wire
from hf_distill.teachers.remote.api import TokenRow

TOKEN = "a-long-random-text"


def random_rows(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for size in torch.randint(2, 20, (count,), generator=generator).tolist():
        ids = torch.randint(0, VOCAB, (size,), generator=generator).tolist()
        rows.append(TokenRow(tuple(ids), tuple(range(size % 2, size))))
    return rows


@pytest.fixture(scope="module")
def teacher():
    return ServedTeacher(build("llama", 1).eval(), "org/teacher", max_batch_tokens=64)


@pytest.fixture
def client(teacher, tmp_path):
    """`client(token=...)`: a client of the app without a network."""
    clients = []

    def client(**options):
        options = {"token": None, "max_queued_tokens": 1000, "metrics": Metrics()} | options
        app = create_app(teacher, head_file=tmp_path / "head", **options)
        clients.append(TestClient(app, raise_server_exceptions=False).__enter__())
        return clients[-1]

    yield client
    for each in clients:
        each.__exit__()


def body_of(rows, dtype="float32"):
    return wire.request_body(rows, dtype)


# What is computed


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_row_has_the_states_of_the_model_alone_and_beside_rows_of_other_layers(kind):
    model, last_block = build(kind, 1, layers=3).eval(), []  # transformers returns the last layer after the norm only
    last = next(each for each in model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == 3)[-1]
    last.register_forward_hook(lambda _module, _args, out: last_block.append(out[0] if type(out) is tuple else out))
    teacher, rows = ServedTeacher(model, "org/teacher", max_batch_tokens=256), random_rows()
    rows = [replace(row, layers=layers) for row, layers in zip(rows, cycle([(), (1,), (0, 2)]), strict=False)]
    together = teacher.compute_rows(rows)
    for row, tensors in zip(rows, together, strict=True):
        (alone,) = teacher.compute_rows([row])
        assert_close(alone, tensors, atol=1e-5, rtol=1e-5)
        outputs = model(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
        states = dict(enumerate(outputs.hidden_states[1:-1])) | {2: last_block[-1]}
        references = {"hidden_states": outputs.hidden_states[-1]} | {f"layer_{i}": states[i] for i in row.layers}
        for name, reference in references.items():
            assert_close(alone.pop(name), reference[0, list(row.positions)], atol=1e-5, rtol=1e-5)
        assert not alone
        logits = tensors["hidden_states"] @ teacher.head.weight.T
        assert_close(logits, outputs.logits[0, list(row.positions)], atol=1e-4, rtol=1e-4)


def test_waiting_rows_of_several_requests_run_in_one_forward(tmp_path):
    rows = [replace(row, layers=layers) for row, layers in zip(random_rows(9), cycle([(), (1,), (0, 1)]), strict=False)]
    with HiddenServer(build("llama", 1), tmp_path) as server, ThreadPoolExecutor(9) as threads:
        expected = [server.teacher.compute_rows([row])[0] for row in rows]
        server.batches.clear()
        server.delay = 0.3

        def request(row):
            answer = httpx2.post(server.url + wire.HIDDEN_STATES, json=body_of([row]), trust_env=False)
            return wire.decode_hidden_states(answer.content, [row], "float32", server.teacher.info)[0]

        answers = list(threads.map(request, rows))
    for answer, reference in zip(answers, expected, strict=True):
        assert_close(answer, reference, atol=1e-5, rtol=1e-5)
    assert sum(server.batches) == 9
    assert len(server.batches) <= 3


def test_a_forward_has_no_more_tokens_than_allowed_padding_included():
    batches, metrics = [], Metrics()

    def compute(rows):
        batches.append([len(row.ids) for row in rows])
        return [torch.zeros(len(row.positions), 2) for row in rows]

    batcher = Batcher(compute, max_batch_tokens=20, max_queued_tokens=100, metrics=metrics)
    rows = [TokenRow(tuple(range(size)), (0,)) for size in (4, 4, 10, 2, 2, 20, 1)]
    results = [batcher.submit(rows[:3]), batcher.submit(rows[3:])]
    batcher.start()
    assert [len(result.result(10)) for result in results] == [3, 4]
    batcher.close()
    assert batches == [[4, 4], [10, 2], [2], [20], [1]]
    assert metrics.total("tokens_total") == 43


def test_a_cancelled_request_is_not_computed_and_a_failed_one_does_not_stop_the_server():
    computed = []

    def compute(rows):
        computed.extend(row.ids for row in rows)
        if rows[0].ids == (7,):
            raise ValueError("broken")
        return [torch.zeros(1, 2) for _ in rows]

    batcher = Batcher(compute, max_batch_tokens=1, max_queued_tokens=100, metrics=Metrics())
    cancelled, failed, answered = (batcher.submit([TokenRow((i,), (0,))] * 2) for i in (5, 7, 9))
    cancelled.cancel()
    batcher.start()
    assert len(answered.result(10)) == 2
    with pytest.raises(ValueError, match="broken"):
        failed.result(10)
    batcher.close()
    assert computed == [(7,), (9,), (9,)]
    with pytest.raises(QueueFull):
        batcher.submit([TokenRow((1,), (0,))])


def test_a_forward_that_needs_too_much_memory_is_split():
    sizes = []

    def compute(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("too much")
        return [torch.tensor([[float(row.ids[0])]]) for row in rows]

    batcher = Batcher(compute, max_batch_tokens=9, max_queued_tokens=100, metrics=Metrics())
    result = batcher.submit([TokenRow((i,), (0,)) for i in range(5)])
    batcher.start()
    assert torch.cat(result.result(10)).flatten().tolist() == [0, 1, 2, 3, 4]
    batcher.close()
    assert sizes == [5, 2, 3, 1, 2]


# What is answered


def test_the_head_and_the_facts_are_those_of_the_model(teacher, client):
    app = client()
    info = wire.parse(wire.TeacherInfo, app.get(wire.INFO).json())
    assert info == teacher.info
    assert (info.vocab_size, info.width, info.embeddings, info.context_length) == (VOCAB, 32, VOCAB, 64)
    assert (info.depth, info.layer_width) == (2, 32)
    head = wire.decode_head(app.get(wire.HEAD).content, info)
    assert head.weight.equal(teacher.model.lm_head.weight)
    assert app.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_are_rounded_to_the_requested_dtype(teacher, client, dtype):
    rows = [replace(row, layers=(0, 1)) for row in random_rows(3)]
    answer = client().post(wire.HIDDEN_STATES, json=body_of(rows, dtype))
    returned = wire.decode_hidden_states(answer.content, rows, dtype, teacher.info)
    for tensors, expected in zip(returned, teacher.compute_rows(rows), strict=True):
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        assert {name: tensor.dtype for name, tensor in tensors.items()} == dict.fromkeys(expected, wire.DTYPES[dtype])
        floats = {name: tensor.float() for name, tensor in tensors.items()}
        assert_close(floats, expected, atol=tolerance, rtol=tolerance)


def test_metrics_count_requests_tokens_and_batches(client):
    app, rows = client(), random_rows(3)
    app.post(wire.HIDDEN_STATES, json=body_of(rows))
    app.post(wire.HIDDEN_STATES, json={"rows": []})
    app.get("/favicon.ico")
    lines = app.get("/metrics").text.splitlines()
    tokens = sum(len(row.ids) for row in rows)
    for line in (
        'hf_distill_serve_requests_total{path="/hidden_states",status="200"} 1',
        'hf_distill_serve_requests_total{path="/hidden_states",status="400"} 1',
        'hf_distill_serve_requests_total{path="other",status="404"} 1',
        f"hf_distill_serve_tokens_total {tokens}",
        f"hf_distill_serve_target_tokens_total {sum(len(row.positions) for row in rows)}",
        "hf_distill_serve_batch_rows_sum 3",
        'hf_distill_serve_batch_seconds_bucket{le="+Inf"} 1',
        "hf_distill_serve_queued_tokens 0",
        "hf_distill_serve_computing_rows 0",
    ):
        assert line in lines


def test_ids_and_texts_of_the_tokenizer_are_answered(client, smollm2_tokenizer, monkeypatch, teacher):
    assert client().post(wire.TOKENIZE, json={"text": "x"}).status_code == 404
    monkeypatch.setattr(teacher, "tokenizer", smollm2_tokenizer)
    app, text = client(), "The quick brown fox"
    ids = smollm2_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert app.post(wire.TOKENIZE, json={"text": text}).json() == {"ids": ids}
    assert app.post(wire.TOKEN_TEXTS, json={"ids": [9]}).json() == {"texts": [smollm2_tokenizer.decode([9])]}
    assert app.post(wire.TOKEN_TEXTS, json={"ids": [VOCAB]}).status_code == 400


# What is refused


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"{", "Invalid JSON"),
        ({"rows": [], "dtype": "float32"}, "rows"),
        ({"rows": [{"ids": [1], "positions": [0]}], "dtype": "float8"}, "dtype"),
        ({"rows": [{"ids": [1], "positions": [0]}], "dtype": "float32", "more": 1}, "more"),
        ({"rows": [{"ids": [True], "positions": [0]}], "dtype": "float32"}, "rows.0.ids.0"),
        ({"rows": [{"ids": ["1"], "positions": [0]}], "dtype": "float32"}, "rows.0.ids.0"),
        ({"rows": [{"ids": [-1], "positions": [0]}], "dtype": "float32"}, "rows.0.ids.0"),
        ({"rows": [{"ids": [VOCAB], "positions": [0]}], "dtype": "float32"}, f"the id {VOCAB}"),
        ({"rows": [{"ids": [1, 2], "positions": []}], "dtype": "float32"}, "rows.0.positions"),
        ({"rows": [{"ids": [1, 2], "positions": [2]}], "dtype": "float32"}, "the position 2"),
        ({"rows": [{"ids": [1, 2], "positions": [1, 1]}], "dtype": "float32"}, "do not ascend"),
        ({"rows": [{"ids": [1] * 65, "positions": [0]}], "dtype": "float32"}, "reads at most 64"),
        ({"rows": [{"ids": [1] * 40, "positions": [0]}] * 2, "dtype": "float32"}, "a request may have 64"),
        ({"rows": [{"ids": [1], "positions": [0]}], "dtype": "float32", "layers": [0, 2]}, "has layers 0 to 1"),
        ({"rows": [{"ids": [1], "positions": [0]}], "dtype": "float32", "layers": [-1]}, "layers.0"),
        ({"rows": [{"ids": [1], "positions": [0]}], "dtype": "float32", "layers": [1, 0]}, "layers do not ascend"),
        ({"rows": [{"ids": [1], "positions": [0]}], "dtype": "float32", "layers": [1, 1]}, "layers do not ascend"),
    ],
)
def test_requests_that_are_not_valid_are_refused(client, body, text):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client().post(wire.HIDDEN_STATES, content=data)
    assert answer.status_code == 400
    assert text in answer.json()["error"]["message"]


def test_a_request_with_too_many_bytes_is_refused(client, teacher):
    size = teacher.info.max_request_bytes
    assert client().post(wire.HIDDEN_STATES, content=b" " * (size + 1)).status_code == 413


def test_a_full_queue_answers_503_and_when_to_try_again(tmp_path):
    row = TokenRow(tuple(range(16)), (3,))
    with HiddenServer(build("llama", 1), tmp_path, max_batch_tokens=16, max_queued_tokens=16) as server:
        server.delay = 0.4
        with ThreadPoolExecutor(4) as threads:
            post = lambda _: httpx2.post(server.url + wire.HIDDEN_STATES, json=body_of([row]), trust_env=False)  # noqa: E731
            answers = list(threads.map(post, range(4)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert 0 < len(refused) < 4
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)


def test_a_request_whose_client_is_gone_is_removed_from_the_queue(tmp_path):
    row = TokenRow(tuple(range(16)), (3,))
    with HiddenServer(build("llama", 1), tmp_path, max_batch_tokens=16) as server:
        server.delay = 0.5
        first = threading.Thread(
            target=httpx2.post, args=(server.url + wire.HIDDEN_STATES,), kwargs={"json": body_of([row])}
        )
        first.start()
        while not server.batches:
            time.sleep(0.01)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(server.url + wire.HIDDEN_STATES, json=body_of([row]), timeout=0.1, trust_env=False)
        first.join()
        assert server.metrics.total("requests_total", path=wire.HIDDEN_STATES, status="200") == 1
    assert server.batches == [1]


def test_hidden_states_that_are_not_finite_are_not_answered(client, teacher, monkeypatch):
    compute, row = teacher.compute_rows, TokenRow((1,), (0,), (0,))

    def changed(value):
        return lambda rows: [{**tensors, "layer_0": torch.full((1, 32), value)} for tensors in compute(rows)]

    for value, dtype, status in ((math.nan, "float32", 422), (1e6, "float16", 422), (1e6, "float32", 200)):
        monkeypatch.setattr(teacher, "compute_rows", changed(value))
        answer = client().post(wire.HIDDEN_STATES, json=body_of([row], dtype))
        assert (answer.status_code, "not finite" in answer.text) == (status, status == 422)


def test_a_failed_forward_is_an_error_of_the_server(client, teacher, monkeypatch):
    monkeypatch.setattr(teacher, "compute_rows", lambda rows: 1 / 0)
    metrics = Metrics()
    answer = client(metrics=metrics).post(wire.HIDDEN_STATES, json=body_of([TokenRow((1,), (0,))]))
    assert (answer.status_code, "ZeroDivisionError" in answer.text) == (500, True)
    assert metrics.total("requests_total", status="500") == 1


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {TOKEN}", "Bearer ", f"Bearer {TOKEN}é"])
def test_requests_without_the_token_are_refused_except_for_health(client, header):
    app = client(token=TOKEN)
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in (wire.INFO, wire.HEAD, "/metrics", "/favicon.ico"):
        assert app.get(path, headers=headers).status_code == 401
    assert app.post(wire.HIDDEN_STATES, headers=headers, json={}).status_code == 401
    assert app.get("/health", headers=headers).status_code == 200
    assert app.get(wire.INFO, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_address_that_other_machines_reach_needs_a_token(monkeypatch, host):
    monkeypatch.delenv("HF_DISTILL_SERVE_TOKEN", raising=False)
    with pytest.raises(DistillError, match="HF_DISTILL_SERVE_TOKEN"):
        read_token(host)
    monkeypatch.setenv("HF_DISTILL_SERVE_TOKEN", TOKEN)
    assert read_token(host) == TOKEN


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_no_token(monkeypatch, host):
    monkeypatch.delenv("HF_DISTILL_SERVE_TOKEN", raising=False)
    assert read_token(host) is None
    monkeypatch.setenv("HF_DISTILL_SERVE_TOKEN", "two words")
    with pytest.raises(DistillError, match="without spaces"):
        read_token(host)


def test_a_used_port_is_an_error_that_names_it():
    with bind("127.0.0.1", 0) as used:
        used.listen()
        port = used.getsockname()[1]
        with pytest.raises(DistillError, match=f"port {port}: Address already in use"):
            bind("127.0.0.1", port)
    with pytest.raises(DistillError, match="cannot listen on"):
        bind("no.such.host.invalid", 0)


def test_models_whose_logits_are_not_those_of_their_head_are_refused():
    model = build("llama", 1).eval()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(DistillError, match="not a plain linear layer"):
        ServedTeacher(model, "org/teacher", max_batch_tokens=64)
    encoder = AutoModelForCausalLM.from_config(build("bert").config).eval()
    with pytest.raises(DistillError, match="depend on later tokens"):
        ServedTeacher(encoder, "org/teacher", max_batch_tokens=64)
    with pytest.raises(DistillError, match="only causal language models"):
        ServedTeacher(build("bert").eval(), "org/teacher", max_batch_tokens=64)


def test_the_digest_of_a_head_depends_on_every_value_and_the_scaling(teacher):
    head, seen = teacher.head, set()
    changed = head.weight.detach().clone()
    changed[3, 4] += 1e-3
    for each in (
        head,
        wire.HeadTensors(changed),
        wire.HeadTensors(head.weight.bfloat16()),
        wire.HeadTensors(head.weight, torch.zeros(VOCAB)),
        wire.HeadTensors(head.weight, scaling=SimpleNamespace(scale=2.0, softcap=None)),
        wire.HeadTensors(head.weight, scaling=SimpleNamespace(scale=1.0, softcap=30)),
    ):
        seen.add(each.digest())
    assert len(seen) == 6
