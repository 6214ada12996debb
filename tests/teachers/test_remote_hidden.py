"""A teacher behind `hf-distill serve` teaches as the local teacher, and no wrong answer is trained on."""

import pickle

import pytest
import torch
from servers.hidden_server import HiddenServer
from tiny import VOCAB, build, collate, one_step, rows
from torch.testing import assert_close

from hf_distill import DistillError
from hf_distill.core.logits import LazyLogits
from hf_distill.core.targets import Targets
from hf_distill.errors import RunError
from hf_distill.teachers import CachedTeacher, FrozenTeacher, MultiTeacher, RemoteTeacher
from hf_distill.teachers.remote import wire
from hf_distill.teachers.remote.api import TokenRow


def big(seed=1, kind="llama", **options):
    return build(kind, seed, **{"layers": 3, "width": 48} | options)


@pytest.fixture
def start(tmp_path):
    """`start(model)`: a running server; it is stopped after the test."""
    running = []

    def start(model=None, **options):
        folder = tmp_path / f"server-{len(running)}"
        running.append(HiddenServer(big() if model is None else model, folder, **options).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


def remote(*servers, **options):
    return RemoteTeacher([server.url for server in servers], api="hidden", **{"retry_seconds": 0.3} | options)


def losses(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


# Equality with the local teacher


@pytest.mark.parametrize(
    ("kind", "pad", "options"),
    [
        ("llama", "right", {"temperature": 2.0}),
        ("llama", "left", {"divergence": "reverse_kl", "temperature": 0.5}),
        ("gpt2", "right", {"divergence": "js", "alpha": 0.7}),
    ],
)
def test_loss_and_gradients_are_those_of_the_local_teacher(make_trainer, start, kind, pad, options):
    options = options | {"train_dataset": rows(kind, 32, pad=pad)}
    local = one_step(make_trainer, kind, 4, 2, teacher=big(kind=kind), **options)
    served = one_step(make_trainer, kind, 4, 2, teacher=remote(start(big(kind=kind))), **options)
    assert local[0]["loss"] == pytest.approx(served[0]["loss"], rel=1e-6)
    assert local[0]["kl"] == pytest.approx(served[0]["kl"], rel=1e-5)
    for name, gradient in local[1].items():
        assert_close(served[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_logit_scaling_and_bias_are_those_of_the_local_teacher(start):
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=64, final_logit_softcapping=3.0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    batch = collate(rows("llama", 4))
    targets = Targets.from_batch(batch, True)
    teacher = remote(start(model))
    teacher.prepare(build("llama", 0), torch.device("cpu"))
    logits = teacher(batch, targets, {}).logits
    assert logits.scaling.softcap == 3.0
    reference = targets.gather_logits(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    assert_close(logits.project(), reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_losses_are_those_of_a_hidden_cache(make_trainer, start, tmp_path, dtype):
    from hf_distill.cache import write_cache

    data = rows("llama", 32), rows("llama", 7, seed=5)
    write_cache(tmp_path / "cache", big(), *data, collator=collate, kind="hidden", dtype=dtype)
    options = dict(max_steps=3, learning_rate=1e-2, temperature=2.0)
    cached = make_trainer(teacher=CachedTeacher(str(tmp_path / "cache")), folder="cached", **options)
    served = make_trainer(teacher=remote(start(), dtype=dtype), folder="served", **options)
    assert losses(cached) == pytest.approx(losses(served), rel=1e-3 if dtype == "bfloat16" else 1e-6)
    assert cached.evaluate()["eval_loss"] == pytest.approx(served.evaluate()["eval_loss"], rel=1e-3)


def test_the_dtype_of_the_served_model_is_sent_without_rounding(start):
    teacher = remote(start(big().bfloat16()))
    teacher.prepare(build("llama", 0), torch.device("cpu"))
    batch = collate(rows("llama", 4))
    targets = Targets.from_batch(batch, True)
    local = FrozenTeacher(big().bfloat16())
    local.prepare(build("llama", 0), torch.device("cpu"))
    served, reference = (each(batch, targets, {}).logits for each in (teacher, local))
    assert isinstance(served, LazyLogits)
    assert served.hidden.dtype == served.weight.dtype == torch.bfloat16
    assert served.weight.equal(reference.weight)
    assert_close(served.hidden, reference.hidden, atol=2e-2, rtol=2e-2)
    assert teacher.summary() | {"hosts": [], "weights": ""} == {
        **{"model": "org/teacher", "hosts": [], "api": "hidden", "dtype": "bfloat16", "weights": ""}
    }


# Requests


def test_the_rows_of_a_batch_are_few_requests_that_all_servers_share(start):
    servers = [start(), start()]
    teacher = remote(*servers)
    teacher.prepare(build("llama", 0), torch.device("cpu"))
    batch = collate(rows("llama", 12))
    targets = Targets.from_batch(batch, True)
    signals = teacher(batch, targets, {}).logits
    assert len(signals.hidden) == len(targets)
    counts = [server.metrics.total("requests_total", path=wire.HIDDEN_STATES) for server in servers]
    assert sum(counts) <= 3
    batch["labels"][:] = -100
    assert len(teacher(batch, Targets.from_batch(batch, True), {}).logits.hidden) == 0


def test_a_request_has_no_more_tokens_than_the_server_accepts(start):
    server = start(max_batch_tokens=16)
    protocol = remote(server).protocol
    protocol.check()
    requested = [TokenRow(tuple(range(3, 3 + size)), (size - 1,)) for size in (7, 7, 7, 16, 1)]
    answered = protocol.request_rows(requested)
    assert [tuple(row["hidden_states"].shape) for row in answered] == [(1, 48)] * 5
    assert server.metrics.total("requests_total", path=wire.HIDDEN_STATES, status="200") == 4
    assert server.metrics.total("tokens_total") == sum(len(row.ids) for row in requested)


def test_a_pickled_protocol_requests_rows_without_the_output_head(start):
    protocol = remote(start()).protocol
    protocol.check()
    copy = pickle.loads(pickle.dumps(protocol))
    assert len(pickle.dumps(protocol)) < 4000
    row = TokenRow((3, 4, 5), (1, 2))
    assert_close(copy.request_rows([row]), protocol.request_rows([row]))


def test_a_full_queue_is_waited_for(start):
    server = start(max_batch_tokens=16, max_queued_tokens=16)
    server.delay = 0.2
    protocol = remote(server, retry_seconds=30).protocol
    protocol.check()
    row = TokenRow(tuple(range(16)), (15,))
    assert len(protocol.request_rows([row] * 4)) == 4
    assert server.metrics.total("requests_total", path=wire.HIDDEN_STATES, status="503") > 0


def test_the_key_is_sent_as_the_token(start, monkeypatch):
    server = start(key="a-long-random-text")
    with pytest.raises(DistillError, match="HF_DISTILL_TEACHER_API_KEY"):
        remote(server).protocol.check()
    monkeypatch.setenv("HF_DISTILL_TEACHER_API_KEY", "a-long-random-text")
    assert remote(server).protocol.check()[0].model == "org/teacher"


# Answers that are not trained on


def corrupt(body):
    """One bit of the last number."""
    return body[:-2] + bytes([body[-2] ^ 1]) + body[-1:]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda body: body[:-1], "truncated"),
        (lambda body: body[: len(body) // 2], "truncated"),
        (lambda body: body[:5], "truncated"),
        (lambda body: b"", "truncated"),
        (lambda body: b"\xff" * 8 + body[8:], "truncated"),
        (lambda body: body + b"\0", "truncated"),
        (corrupt, "checksum"),
        (lambda body: wire._pack({"hidden_states": torch.zeros(1, 48)}, {}), "another teacher"),
        (lambda body: b'{"error": 1}', "truncated"),
    ],
)
def test_a_changed_answer_is_requested_again_and_then_refused(start, monkeypatch, change, text):
    server = start()
    protocol = remote(server, retry_seconds=30).protocol
    protocol.check()
    encode, left = wire.encode_hidden_states, [1]

    def changed(*arguments):
        body = encode(*arguments)
        return change(body) if left and (left[0] < 0 or left.pop()) else body

    monkeypatch.setattr(wire, "encode_hidden_states", changed)
    row = TokenRow((3, 4, 5), (1, 2))
    (answer,) = protocol.request_rows([row])
    assert_close(answer, server.teacher.compute_rows([row])[0])
    left.append(-1)
    protocol.pool.retry_seconds = 0
    with pytest.raises(RunError, match=text):
        protocol.request_rows([row])


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"hidden_states": torch.zeros(1, 48)}, "shape"),
        ({"hidden_states": torch.zeros(2, 47)}, "shape"),
        ({"hidden_states": torch.zeros(2, 48, dtype=torch.bfloat16)}, "requested"),
        ({"hidden_states": torch.full((2, 48), torch.inf)}, "not finite"),
        ({"states": torch.zeros(2, 48)}, "requested were"),
        ({"hidden_states": torch.zeros(2, 48), "more": torch.zeros(1)}, "more"),
    ],
)
def test_an_answer_to_another_request_is_refused(start, tensors, text):
    info = start().teacher.info
    body = wire._pack(tensors, {"weights": info.weights, "head": info.head})
    with pytest.raises(wire.WireError, match=text):
        wire.decode_hidden_states(body, [TokenRow((3, 4, 5), (1, 2))], "float32", info)


def test_a_server_that_restarts_with_another_model_ends_the_run(start):
    server = start()
    teacher = remote(server)
    teacher.prepare(build("llama", 0), torch.device("cpu"))
    server.__exit__()
    start(big(seed=2), port=server.port)
    batch = collate(rows("llama", 4))
    with pytest.raises(RunError, match="another teacher"):
        teacher(batch, Targets.from_batch(batch, True), {})


def test_another_output_head_than_the_announced_one_is_refused(start, monkeypatch):
    monkeypatch.setattr("hf_distill.teachers.remote.hidden.START_RETRY_SECONDS", 0.1)
    server = start()
    head = server.app.routes[3].endpoint.__self__._head_file
    changed = wire.HeadTensors(server.teacher.head.weight * 2)
    head.write_bytes(head.read_bytes()[:-1])
    with pytest.raises(DistillError, match="truncated"):
        remote(server).protocol.check()
    wire.write_head(changed, head)
    with pytest.raises(DistillError, match="digest"):
        remote(server).protocol.check()


# Checks before training


def test_servers_of_different_weights_are_refused(start):
    with pytest.raises(DistillError, match="the same weights"):
        remote(start(), start(big(seed=2))).protocol.check()


@pytest.mark.parametrize(("served", "model"), [("org/teacher", "org/teacher"), ("/srv/teacher", "/srv/teacher")])
def test_the_model_is_the_named_one(start, served, model):
    server = start(name=served)
    remote(server, model=model).protocol.check()
    with pytest.raises(DistillError, match="and not 'org/other'"):
        remote(server, model="org/other").protocol.check()


def test_another_tokenizer_is_refused(start, smollm2_tokenizer):
    from transformers import AutoTokenizer

    from hf_distill.runner.model_loading import resolve_model

    other = AutoTokenizer.from_pretrained(resolve_model("smoke:llama/teacher"))
    teacher = remote(start(big(vocab=len(smollm2_tokenizer)), tokenizer=smollm2_tokenizer))
    teacher.prepare(build("llama", 0), torch.device("cpu"), smollm2_tokenizer)
    with pytest.raises(DistillError, match="tokenizer"):
        teacher.prepare(build("llama", 0), torch.device("cpu"), other)


def test_rows_that_the_server_cannot_read_are_refused_before_they_are_sent(start, make_trainer):
    server = start(big(vocab=50), max_batch_tokens=11)
    teacher = remote(server)
    with pytest.raises(DistillError, match="--max-batch-tokens 12"):
        make_trainer(teacher=teacher)
    with pytest.raises(DistillError, match="at most 11"):
        teacher.protocol.request_rows([TokenRow(tuple(range(12)), (11,))])
    with pytest.raises(DistillError, match="token id 60"):
        teacher.protocol.request_rows([TokenRow((60,), (0,))])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top_k": 8}, "top_k and vocab_size are for servers"),
        ({"vocab_size": 8}, "top_k and vocab_size are for servers"),
        ({"dtype": "float8"}, "dtype of a remote teacher is 'float8'"),
        ({"api": "vllm", "dtype": "float32"}, "dtype is for api='hidden'"),
        ({"api": "hiden"}, "did you mean 'hidden'"),
    ],
)
def test_wrong_arguments_are_refused(options, text):
    with pytest.raises(DistillError, match=text):
        RemoteTeacher("http://127.0.0.1:1", **{"api": "hidden"} | options)


def test_another_server_is_refused_with_the_command_that_starts_one(start):
    from servers.teacher_servers import VLLMServer

    with VLLMServer(big()) as server, pytest.raises(DistillError, match="hf-distill serve MODEL"):
        remote(server).protocol.check()


def test_it_is_one_of_several_teachers(start, make_trainer):
    teachers = {"served": remote(start()), "local": FrozenTeacher(big(seed=3))}
    both = {"served": FrozenTeacher(big()), "local": FrozenTeacher(big(seed=3))}
    options = dict(max_steps=2, temperature=2.0)
    served = losses(make_trainer(teacher=MultiTeacher(teachers), folder="a", **options))
    assert served == pytest.approx(losses(make_trainer(teacher=MultiTeacher(both), folder="b", **options)), rel=1e-6)
