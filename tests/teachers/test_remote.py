"""A teacher on a server teaches as the same teacher with a top-k cache, whatever the server does in between."""

import math
import pickle
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from servers.teacher_servers import TOP_K, Fault, LocalTopK, SGLangServer, VLLMServer
from tiny import VOCAB, build, collate, rows
from torch.testing import assert_close
from transformers import TrainerCallback

from hf_distill import DistillError
from hf_distill.core.targets import Targets
from hf_distill.data import Collator
from hf_distill.errors import RunError
from hf_distill.teachers import MultiTeacher, RemoteTeacher, RoutedTeacher, Teacher
from hf_distill.teachers.remote import pool
from hf_distill.teachers.remote.api import TokenRow
from hf_distill.teachers.remote.pool import ServerPool
from hf_distill.teachers.remote.rows import token_rows
from hf_distill.trainer.teacher_argument import incompatible_teacher

SERVERS = {"vllm": VLLMServer, "sglang": SGLangServer}
T1 = {"temperature": 1.0}


def big(seed=1, **options):
    return build("llama", seed, **{"layers": 3, "width": 48} | options)


@pytest.fixture
def start():
    """`start("vllm")`: a running server of the large model; it is stopped after the test."""
    running = []

    def start(api="vllm", model=None, **options):
        running.append(SERVERS[api](big() if model is None else model, **options).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


def remote(*servers, **options):
    api = next(name for name, cls in SERVERS.items() if isinstance(servers[0], cls))
    urls = [server.url for server in servers]
    return RemoteTeacher(urls[0] if len(urls) == 1 else urls, **{"api": api, "top_k": TOP_K} | options)


def losses(trainer, *names):
    trainer.train()
    return [
        [log[name] for name in names or ("loss", "soft_loss")] for log in trainer.state.log_history if "loss" in log
    ]


# Equality with the local teacher


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("api", SERVERS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_the_losses_are_those_of_the_local_top_k(make_trainer, start, api, pad, divergence):
    data = {"train_dataset": rows("llama", 32, pad=pad), "eval_dataset": rows("llama", 7, seed=5, pad=pad)}
    options = T1 | dict(max_steps=3, learning_rate=1e-2, divergence=divergence, gradient_accumulation_steps=2) | data
    local = make_trainer(teacher=LocalTopK(big()), folder="local", **options)
    server = start(api)
    served = make_trainer(teacher=remote(server), folder="served", **options)
    for a, b in zip(losses(local), losses(served), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert local.evaluate()["eval_loss"] == pytest.approx(served.evaluate()["eval_loss"], rel=1e-6)
    assert "teacher_wait_seconds" in next(log for log in served.state.log_history if "loss" in log)
    if api == "sglang":  # log-probabilities of prompts are not requested
        assert {body["logprob_start_len"] for body in server.bodies("/generate")} == {0, 1}


def test_the_losses_are_those_of_a_top_k_cache(make_trainer, start, tmp_path):
    from hf_distill.cache import write_cache
    from hf_distill.teachers import CachedTeacher

    data = rows("llama", 32), rows("llama", 7, seed=5)
    write_cache(tmp_path / "cache", big(), *data, collator=collate, kind="top_k", k=TOP_K, temperature=1.0)
    options = T1 | dict(max_steps=3, learning_rate=1e-2)
    cached = make_trainer(teacher=CachedTeacher(str(tmp_path / "cache")), folder="cached", **options)
    served = make_trainer(teacher=remote(start()), folder="served", **options)
    for a, b in zip(losses(cached), losses(served), strict=True):
        assert a == pytest.approx(b, abs=0.01)  # half a step of the grid of stored log-probabilities


def documents(count=12):
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(4, 12, (count,), generator=generator).tolist()
    ids = [torch.randint(3, VOCAB, (size,), generator=generator).tolist() for size in sizes]
    return [{"input_ids": x, "labels": [-100] * (i % 3) + x[i % 3 :]} for i, x in enumerate(ids)]


def packed(alone, count=3):
    parts = [alone[i : i + count] for i in range(0, len(alone), count)]
    return [
        {name: [t for d in part for t in d[name]] for name in ("input_ids", "labels")}
        | {"seq_lengths": [len(d["input_ids"]) for d in part]}
        for part in parts
    ]


@pytest.mark.parametrize("api", SERVERS)
def test_packed_documents_are_requested_one_by_one(start, api):
    alone, server = documents(), start(api)
    batch = Collator(0)(packed(alone))
    targets = Targets.from_batch(batch, True)
    teacher, local = remote(server), LocalTopK(big())
    for each in (teacher, local):
        each.prepare(build("llama", 0), torch.device("cpu"))
    served, reference = (each(batch, targets, {}).logits for each in (teacher, local))
    order = reference.ids.argsort()
    assert served.ids.equal(reference.ids.gather(1, order))
    assert_close(served.log_probs, reference.log_probs.gather(1, order), atol=1e-4, rtol=0)
    assert_close(served.log_tail, reference.log_tail, atol=1e-4, rtol=0)
    sent = [
        body.get("prompt", body.get("input_ids"))
        for path in ("/generate", "/v1/completions")
        for body in server.bodies(path)
    ]
    assert sorted(sent[1:]) == sorted(row["input_ids"] for row in alone)


def test_rows_are_cut_after_the_last_target_token_and_rows_without_target_tokens_are_not_requested(start):
    server, none = start(), [-100] * 6
    ids = torch.arange(12).reshape(2, 6) + 3
    batch = {"input_ids": ids, "labels": torch.tensor([[-100, 4, 5, -100, -100, -100], none])}
    teacher = remote(server)
    teacher.prepare(build("llama", 0), torch.device("cpu"))
    server.requests.clear()
    teacher(batch, Targets.from_batch(batch, True), {})
    assert [body["prompt"] for body in server.bodies("/v1/completions")] == [[3, 4, 5]]
    batch["labels"][:] = -100
    assert len(teacher(batch, Targets.from_batch(batch, True), {}).logits.ids) == 0


def test_a_target_token_after_the_last_token_of_a_row_is_requested_with_an_added_token(start):
    teacher, local = remote(start()), big()
    teacher.protocol.check()
    (row,) = teacher.protocol.request_rows([TokenRow((5, 6, 7), (2,))])
    best = torch.log_softmax(local(input_ids=torch.tensor([[5, 6, 7]])).logits[0, 2], -1).topk(TOP_K)
    assert row["ids"][0].tolist() == sorted(best.indices.tolist())


def test_masked_tokens_inside_a_row_are_left_out():
    batch = {
        "input_ids": torch.tensor([[0, 5, 6, 7, 8, 0]]),
        "attention_mask": torch.tensor([[0, 1, 0, 1, 1, 0]]),
        "labels": torch.tensor([[-100, 5, 6, 7, 8, -100]]),
    }
    assert token_rows(batch, Targets.from_batch(batch, True)) == [TokenRow((5, 7, 8), (0, 1))]


def test_ids_of_the_teachers_padded_vocabulary_are_removed(start):
    """The student has 60 ids and the teacher 97; the remaining probabilities are normalized again."""
    teacher = remote(start(), vocab_size=VOCAB)
    teacher.prepare(build("llama", 0, vocab=60), torch.device("cpu"))
    batch = {"input_ids": torch.arange(3, 15)[None], "labels": torch.arange(3, 15)[None]}
    targets = Targets.from_batch(batch, True)
    sparse = teacher(batch, targets, {}).logits
    full = torch.log_softmax(big()(input_ids=batch["input_ids"]).logits[0, :-1], -1)
    best = full.topk(TOP_K)
    kept = torch.where(best.indices < 60, best.values.exp(), 0.0)
    tail = 1 - best.values.exp().sum(-1)
    assert (best.indices >= 60).any()
    assert_close(sparse.log_probs.exp().sum(-1), kept.sum(-1) / (kept.sum(-1) + tail), atol=1e-5, rtol=0)
    assert_close(sparse.log_tail.exp(), tail / (kept.sum(-1) + tail), atol=1e-5, rtol=0)
    assert sparse.ids.max() < 60


def test_several_urls_are_one_pool_and_concurrency_is_bounded(make_trainer, start):
    servers = [start(), start()]
    for server in servers:
        server.faults.append(Fault("completions", slow=0.02, times=10**6))
    local = make_trainer(teacher=LocalTopK(big()), folder="local", **T1)
    served = make_trainer(teacher=remote(*servers, concurrency=2), folder="served", **T1)
    assert losses(local) == [pytest.approx(each, rel=1e-6) for each in losses(served)]
    assert all(len(server.bodies("/v1/completions")) > 4 for server in servers)
    assert sum(server.max_in_flight for server in servers) <= 2


def test_a_remote_teacher_is_one_of_several(make_trainer, start):
    teachers = {"near": LocalTopK(big(2)), "far": remote(start())}
    both = make_trainer(teacher=MultiTeacher(teachers), folder="both", **T1)
    local = make_trainer(
        teacher=MultiTeacher({"near": LocalTopK(big(2)), "far": LocalTopK(big())}), folder="local", **T1
    )
    names = ("loss", "soft_near_loss", "soft_far_loss")
    assert losses(local, *names) == [pytest.approx(each, rel=1e-6) for each in losses(both, *names)]


def test_a_pickled_teacher_answers_in_data_loader_workers(start):
    teacher = remote(start())
    teacher.protocol.check()
    copy = pickle.loads(pickle.dumps(teacher.protocol))
    (a,), (b,) = (each.request_rows([TokenRow((5, 6, 7), (0, 1))]) for each in (teacher.protocol, copy))
    assert all(a[name].equal(b[name]) for name in a)


# Faults


def drop_last(answer):
    answer["choices"][0]["prompt_logprobs"].pop()
    return answer


def entries(answer):
    return answer["choices"][0]["prompt_logprobs"][1]


def changed(function):
    def change(answer):
        function(entries(answer))
        return answer

    return change


def first(of_token):
    return of_token[next(iter(of_token))]


FAULTS = {
    "timeout": Fault(slow=1.0),
    "429": Fault(status=429, headers={"Retry-After": "0.05"}),
    "503": Fault(status=503, body="no healthy upstream"),
    "500 with a date": Fault(status=500, headers={"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}),
    "closed connection": Fault(cut=True),
    "no JSON": Fault(change=lambda answer: "<html>"),
    "truncated JSON": Fault(change=lambda answer: str(answer)[:50]),
    "another object": Fault(change=lambda answer: {"object": "error"}),
    "a token less": Fault(change=drop_last),
    "an id too large": Fault(change=changed(lambda e: e.update({str(2**40): {"logprob": -1e3}}))),
    "a negative id": Fault(change=changed(lambda e: e.update({"-1": {"logprob": -1e3}}))),
    "not a number": Fault(change=changed(lambda e: first(e).update(logprob=math.nan))),
    "infinite": Fault(change=changed(lambda e: first(e).update(logprob=-math.inf))),
    "positive": Fault(change=changed(lambda e: first(e).update(logprob=0.5))),
    "a sum above 1": Fault(change=changed(lambda e: [v.update(logprob=-0.5) for v in e.values()])),
    "no number": Fault(change=changed(lambda e: first(e).update(logprob=None))),
    "fewer ids": Fault(change=changed(lambda e: [e.pop(key) for key in list(e)[3:]])),
    "no entry": Fault(change=lambda answer: answer["choices"][0]["prompt_logprobs"].__setitem__(1, None) or answer),
    "other ids": Fault(change=lambda answer: answer["choices"][0].update(prompt_token_ids=[1]) or answer),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_request_is_repeated_and_the_losses_stay_the_same(make_trainer, start, fault):
    server = start()
    served = make_trainer(teacher=remote(server, timeout=0.5, retry_seconds=20.0), folder="served", **T1, max_steps=2)
    local = make_trainer(teacher=LocalTopK(big()), folder="local", **T1, max_steps=2)
    server.faults.append(Fault(**{**FAULTS[fault].__dict__, "match": "completions", "times": 1}))
    assert losses(local) == [pytest.approx(each, rel=1e-6) for each in losses(served)]
    assert server.faults[0].times == 0


SGLANG_FAULTS = {
    "a token less": lambda meta: meta["input_top_logprobs"].pop(),
    "another id": lambda meta: meta["input_token_logprobs"][1].__setitem__(1, 96),
    "no list": lambda meta: meta.update(input_top_logprobs=None),
    "no pair": lambda meta: meta["input_top_logprobs"][1].__setitem__(0, [0.5]),
    "no token": lambda meta: meta["input_top_logprobs"].__setitem__(-1, None),
}


@pytest.mark.parametrize("fault", SGLANG_FAULTS)
def test_a_malformed_answer_of_sglang_is_requested_again(start, fault):
    server = start("sglang")
    teacher = remote(server)
    teacher.protocol.check()
    row = TokenRow((5, 6, 7, 8), (1, 2))
    (before,) = teacher.protocol.request_rows([row])
    server.faults.append(Fault("generate", change=lambda answer: SGLANG_FAULTS[fault](answer["meta_info"]) or answer))
    (after,) = teacher.protocol.request_rows([row])
    assert server.faults[0].times == 0
    assert all(before[name].equal(after[name]) for name in before)


def test_one_of_two_servers_dies_and_the_other_one_answers(make_trainer, start):
    servers = [start(), start()]
    served = make_trainer(teacher=remote(*servers), folder="served", **T1)
    local = make_trainer(teacher=LocalTopK(big()), folder="local", **T1)
    servers[0].faults.append(Fault("completions", cut=True, times=10**6))
    assert losses(local) == [pytest.approx(each, rel=1e-6) for each in losses(served)]
    assert len(servers[1].bodies("/v1/completions")) > 16 > len(servers[0].bodies("/v1/completions")) - 1


def test_a_server_that_restarts_is_waited_for(start):
    server = start()
    teacher = remote(server, retry_seconds=30.0)
    teacher.protocol.check()
    (before,) = teacher.protocol.request_rows([TokenRow((5, 6), (0,))])
    server.__exit__()

    def restart():
        time.sleep(0.5)
        start(port=server.port)

    thread = threading.Thread(target=restart)
    thread.start()
    (after,) = teacher.protocol.request_rows([TokenRow((5, 6), (0,))])
    thread.join()
    assert before["log_probs"].equal(after["log_probs"])


def test_training_ends_with_a_checkpoint_and_resumes_exactly(make_trainer, start):
    """The server fails in the second micro-batch of the fourth step; the student has dropout."""
    server = start()
    options = T1 | dict(
        max_steps=6, gradient_accumulation_steps=2, save_strategy="steps", save_steps=10, eval_strategy="steps",
        eval_steps=2, learning_rate=1e-2,
    )  # fmt: skip

    def make(folder, **more):
        return make_trainer(
            model=build("llama", 0, dropout=0.1), teacher=remote(server, retry_seconds=0.3, prefetch=0), folder=folder,
            **options | more,
        )  # fmt: skip

    whole = make("whole")
    whole.train()
    failing = make("cut")
    rows_before = 3 * 8 + 7 + 4
    seen = []
    answer = server.answer

    def count(path, body):
        if path == "/v1/completions":
            seen.append(body)
            if len(seen) > rows_before:
                raise ConnectionResetError
        return answer(path, body)

    server.answer = count
    with pytest.raises(RunError) as error:
        failing.train()
    assert server.url in str(error.value)
    assert "after step 3 of 6" in str(error.value)
    assert "checkpoint-3 is complete" in str(error.value)
    server.answer = answer
    resumed = make("cut")
    resumed.train(resume_from_checkpoint=True)
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert a.equal(b), name


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"save_strategy": "steps"}, "No step was complete, so there is no checkpoint"),
        ({"save_strategy": "no"}, 'save_strategy is "no"'),
    ],
)
def test_without_a_checkpoint_the_error_says_so(make_trainer, start, options, text):
    server = start()
    trainer = make_trainer(teacher=remote(server, retry_seconds=0), **T1 | options)
    server.faults.append(Fault("completions", status=502, body="bad gateway", times=10**6))
    with pytest.raises(RunError, match=text) as error:
        trainer.train()
    assert "HTTP 502: bad gateway" in str(error.value)


def test_other_ranks_must_wait_longer_than_the_teacher():
    teacher = RemoteTeacher("http://teacher", retry_seconds=1800, timeout=10)
    for world_size, count in ((1, 0), (2, 1)):
        args = SimpleNamespace(world_size=world_size, ddp_timeout=1800)
        assert len(incompatible_teacher(teacher, args, makes_students=False)) == count


def test_requests_that_are_cancelled_are_not_logged_as_failures_of_the_server(start, monkeypatch):
    server, warnings, errors = start(), [], []
    monkeypatch.setattr(pool.logger, "warning", warnings.append)
    server.faults = [Fault(match="/v1/models", slow=0.5)]
    requests = ServerPool(server.url)

    def request():
        try:
            requests.request("/v1/models", None, lambda answer: answer)
        except RunError as error:
            errors.append(str(error))

    thread = threading.Thread(target=request)
    thread.start()
    while not server.in_flight:
        time.sleep(0.01)
    requests.close()
    thread.join()
    of_server = [warning for warning in warnings if server.url in warning]  # threads of earlier tests may log others
    assert (of_server, errors) == ([], ["The requests to the teacher server were cancelled"])


# The key and the URL


def test_the_key_comes_from_the_environment_and_is_in_no_message(make_trainer, start, monkeypatch, caplog, tmp_path):
    server = start(key="sk-secret")
    with pytest.raises(DistillError, match="set the environment variable HF_DISTILL_TEACHER_API_KEY to the key"):
        make_trainer(teacher=remote(server), **T1)
    monkeypatch.setenv("TEACHER_KEY", "sk-wrong-one")
    with pytest.raises(DistillError, match="HTTP 401") as error:
        make_trainer(teacher=remote(server, api_key_env="TEACHER_KEY"), **T1)
    assert "does not accept the API key of the environment variable TEACHER_KEY: set it to" in str(error.value)
    assert "Check that the URL" not in str(error.value)
    assert "sk-wrong-one" not in str(error.value)
    assert "***" in str(error.value)
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    teacher = remote(server, api_key_env="TEACHER_KEY")
    trainer = make_trainer(teacher=teacher, save_strategy="steps", save_steps=2, **T1)
    trainer.train()
    trainer.create_model_card()
    assert b"sk-secret" not in pickle.dumps(teacher.protocol)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert written
    assert not [file for file in written if b"sk-secret" in file.read_bytes()]


@pytest.mark.parametrize("key", ["sk-a\nsecret", "sk-a secret", "sk-asecrét"])
@pytest.mark.parametrize("variable", [None, "TEACHER_KEY"])
def test_a_key_that_no_header_can_hold_is_refused_and_in_no_message(monkeypatch, key, variable):
    name = variable or "HF_DISTILL_TEACHER_API_KEY"
    monkeypatch.setenv(name, key)
    with pytest.raises(DistillError, match=f"variable {name} must consist of printable ASCII") as error:
        RemoteTeacher("http://teacher", api_key_env=variable)
    assert "secr" not in str(error.value)


def test_line_breaks_around_a_key_are_not_sent(start, monkeypatch):
    server = start(key="sk-secret")
    monkeypatch.setenv("TEACHER_KEY", "sk-secret\n")
    assert remote(server, api_key_env="TEACHER_KEY").protocol.check()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"url": "teacher:8000"}, "http://"),
        ({"url": "ftp://teacher"}, "http://"),
        ({"url": "http://"}, "http://"),
        ({"url": "http://teacher:99999"}, "not valid"),
        ({"url": []}, "needs a URL"),
        ({"url": ["http://a/v1", "http://a"]}, "must differ"),
        ({"url": "http://me:sk-secret@teacher"}, "credentials"),
        ({"url": "http://teacher?key=sk-secret"}, "credentials"),
        ({"api": "tgi"}, "known: hidden, sglang, vllm"),
        ({"api": "vlm"}, "did you mean 'vllm'"),
        ({"top_k": 0}, "at least 1"),
        ({"top_k": 2.5}, "integer"),
        ({"top_k": 8, "vocab_size": 4}, "lower top_k"),
        ({"timeout": 0}, "above 0"),
        ({"concurrency": 0}, "above 0"),
        ({"retry_seconds": -1}, "at least 0"),
        ({"url": None}, "give a text"),
        ({"timeout": "5"}, "a number of seconds"),
        ({"timeout": float("nan")}, "a number of seconds"),
        ({"concurrency": 1.5}, "an integer above 0"),
        ({"retry_seconds": float("nan")}, "a number of seconds"),
        ({"model": 3}, "model of a remote teacher is a int"),
        ({"api_key_env": "UNSET_VARIABLE"}, "UNSET_VARIABLE"),
        ({"api_key_env": "sk-secret"}, "name of an environment variable"),
    ],
)
def test_wrong_arguments_are_refused(options, text):
    with pytest.raises(DistillError) as error:
        RemoteTeacher(**{"url": "http://teacher"} | options)
    assert text in str(error.value)
    assert "sk-secret" not in str(error.value)


def test_urls_are_normalized():
    urls = ["http://a:8000/v1/", "https://b/teacher/v1", "http://[::1]:9/"]
    assert ServerPool(urls).urls == ("http://a:8000", "https://b/teacher", "http://[::1]:9")


# Identity


@pytest.mark.parametrize(
    ("server", "teacher", "text"),
    [
        ({}, {"model": "other"}, "serves teacher, and not 'other'"),
        ({}, {"top_k": 21}, "--max-logprobs 21"),
        ({}, {"api": "sglang"}, "For vLLM set api to vllm"),
        ({"context": 12}, {}, "--max-model-len 13"),
        ({"api": "sglang", "context": 17}, {}, "--context-length 18"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_before_training(make_trainer, start, server, teacher, text):
    with pytest.raises(DistillError, match=text):
        make_trainer(teacher=remote(start(**server), **teacher), **T1)


@pytest.mark.parametrize(("api", "context"), [("vllm", 13), ("sglang", 18)])
def test_rows_as_long_as_the_server_accepts_are_trained_on(make_trainer, start, api, context):
    assert make_trainer(teacher=remote(start(api, context=context)), **T1).train().global_step > 0


@pytest.mark.parametrize("api", SERVERS)
@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_refuses_the_key_of_a_request_is_not_taken_for_another_kind_of_server(start, api, status):
    server = start(api)
    server.faults.append(Fault("generate" if api == "sglang" else "completions", status=status))
    with pytest.raises(DistillError, match="No API key was sent: set the environment variable") as error:
        remote(server).protocol.check()
    assert "set api to" not in str(error.value)


def test_the_prompt_of_the_teacher_must_fit_into_the_context_of_the_server(start):
    teacher = remote(start(context=20))
    teacher.prepare(build("llama", 0), torch.device("cpu"))
    row = {"input_ids": [3] * 10, "labels": [3] * 10, "teacher_input_ids": [3] * 20, "teacher_labels": [3] * 20}
    for data in ([row], Dataset.from_list([row])):
        with pytest.raises(DistillError, match="has a row of 20 tokens, and the teacher's server reads at most 19"):
            teacher.check_data(data, "train_dataset")


def test_a_url_without_a_server_is_refused(make_trainer, start, monkeypatch):
    monkeypatch.setattr("hf_distill.teachers.remote.identity.START_RETRY_SECONDS", 0)
    server = start()
    server.__exit__()
    teacher = remote(server)
    with pytest.raises(DistillError, match="vllm serve MODEL") as error:
        make_trainer(teacher=teacher, **T1)
    assert server.url in str(error.value)


def test_servers_of_different_models_are_refused(start):
    with pytest.raises(DistillError, match="serve one model under one name"):
        remote(start(), start(name="other")).protocol.check()


def test_the_model_may_be_named_by_the_path_of_its_weights(start):
    teacher = remote(start(), model="org/teacher")
    assert [info.model for info in teacher.protocol.check()] == ["teacher"]


@pytest.mark.parametrize("api", SERVERS)
def test_another_tokenizer_is_refused(start, smollm2_tokenizer, api):
    small = build("llama", 0, vocab=len(smollm2_tokenizer))
    student, device = build("llama", 1, vocab=len(smollm2_tokenizer)), torch.device("cpu")
    server = start(api, small, context=512)
    server.tokenizer = smollm2_tokenizer
    remote(server).prepare(student, device, smollm2_tokenizer)
    rotated = lambda ids: [(i + 7) % len(smollm2_tokenizer) for i in ids]  # noqa: E731

    class Rotated:
        def __call__(self, *args, **options):
            return {"input_ids": rotated(smollm2_tokenizer(*args, **options)["input_ids"])}

        def decode(self, ids):
            return smollm2_tokenizer.decode(rotated(ids))

    server.tokenizer = Rotated()
    with pytest.raises(DistillError, match="a probe text has the ids"):
        remote(server).prepare(student, device, smollm2_tokenizer)
    server.tokenizer = SimpleNamespace(decode=Rotated().decode)  # no /tokenize
    server.faults.append(Fault("tokenize", status=404))
    with pytest.raises(DistillError, match="for the server and"):
        remote(server).prepare(student, device, smollm2_tokenizer)
    server.tokenizer = None
    remote(server).prepare(student, device, smollm2_tokenizer)  # nothing to compare: a warning
    smaller = start(api, build("llama", 0, vocab=1000), context=512)
    with pytest.raises(DistillError, match="does not accept them"):
        remote(smaller).prepare(student, device, smollm2_tokenizer)


# What a top-k server cannot answer


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 2.0}, "set temperature to 1, or use api: hidden"),
        ({**T1, "losses": [{"name": "hidden_mse", "weight": 1.0}]}, "returns log-probabilities only"),
        ({**T1, "losses": [{"name": "js", "weight": 1.0, "temperature": 3.0}]}, "temperature 3"),
    ],
)
def test_objectives_that_need_more_than_the_server_returns_are_refused(make_trainer, start, options, text):
    with pytest.raises(DistillError, match=text):
        make_trainer(teacher=remote(start()), **options)


@pytest.mark.parametrize("kind", ["bert", "sequence", "t5"])
def test_students_of_other_types_are_refused(make_trainer, start, kind):
    with pytest.raises(DistillError, match="causal language model"):
        make_trainer(kind, teacher=remote(start()), **T1)


def test_images_are_refused():
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    batch["pixel_values"] = torch.ones(1, 3, 4, 4)
    with pytest.raises(DistillError, match="pixel_values"):
        token_rows(batch, Targets.from_batch(batch, True))


def test_a_custom_teacher_cannot_fail_unless_it_says_so():
    assert not Teacher.can_fail


# Requests ahead of training


class PendingBatches(TrainerCallback):
    """Counts the batches that are requested when a step begins, without those of the step."""

    def __init__(self, teacher, micro_batches):
        self.teacher, self.micro_batches, self.counts = teacher, micro_batches, []

    def on_step_begin(self, args, state, control, **kwargs):
        rows = sum(len(started) for started in self.teacher._started.values())
        self.counts.append(rows // args.per_device_train_batch_size - self.micro_batches)


@pytest.mark.parametrize(("prefetch", "accumulation", "workers"), [(2, 1, 0), (3, 2, 0), (0, 2, 0), (2, 1, 1)])
def test_the_next_batches_are_requested_while_the_student_trains(make_trainer, start, prefetch, accumulation, workers):
    """Two epochs of four batches of eight rows, shuffled; requests end with the epoch and with the training."""
    options = T1 | dict(
        max_steps=7 // accumulation, gradient_accumulation_steps=accumulation, per_device_train_batch_size=8,
        dataloader_num_workers=workers, learning_rate=1e-2,
    )  # fmt: skip
    server = start()
    teacher = remote(server, prefetch=prefetch)
    pending = PendingBatches(teacher, accumulation if prefetch else 0)
    served = make_trainer(teacher=teacher, folder="served", callbacks=[pending], **options)
    local = make_trainer(teacher=LocalTopK(big()), folder="local", **options)
    assert losses(local) == [pytest.approx(each, rel=1e-6) for each in losses(served)]
    expected = {(2, 1): [2, 2, 1, 0, 2, 1, 0], (3, 2): [2, 0, 0], (0, 2): [0, 0, 0]}
    assert pending.counts == expected[prefetch, accumulation]
    batches = options["max_steps"] * accumulation
    assert len(server.bodies("/v1/completions")) == 1 + 8 * batches  # no row is requested twice or in vain


def test_a_batch_that_failed_in_the_background_ends_training_when_it_is_needed(make_trainer, start):
    """The step that it fails in depends on the order of the requests; resuming gives the same weights in any case."""
    server = start()

    def make(folder):
        return make_trainer(
            model=build("llama", 0, dropout=0.1), teacher=remote(server, prefetch=2, retry_seconds=0), folder=folder,
            save_strategy="steps", save_steps=1, max_steps=6, **T1,
        )  # fmt: skip

    whole = make("whole")
    whole.train()
    trainer = make("cut")
    answer, counted = server.answer, []

    def failing(path, body):
        counted.append(path)
        if len(counted) > 4 * 4:
            raise ConnectionResetError
        return answer(path, body)

    server.answer = failing
    with pytest.raises(RunError, match=r"Training stops after step [1-4] of 6") as error:
        trainer.train()
    assert "is complete: resume from it" in str(error.value)
    server.answer = answer
    resumed = make("cut")
    resumed.train(resume_from_checkpoint=True)
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert a.equal(b), name


def test_the_rows_of_each_server_are_requested_ahead_and_none_twice(make_trainer, start):
    """Rows are routed by a column: each server gets its own ones, and rows that occur twice are answered twice."""
    data = [{**row, "teacher_index": torch.tensor(i % 3 - 1)} for i, row in enumerate(rows("llama", 12) * 2)]
    options = T1 | dict(train_dataset=data, eval_dataset=None, max_steps=6, learning_rate=1e-2)
    servers = [start(), start(model=big(2))]
    served = RoutedTeacher({"one": remote(servers[0]), "two": remote(servers[1])})
    local = RoutedTeacher({"one": LocalTopK(big()), "two": LocalTopK(big(2))})
    results = [
        losses(make_trainer(teacher=teacher, folder=name, **options))
        for name, teacher in {"served": served, "local": local}.items()
    ]
    assert results[0] == [pytest.approx(each, rel=1e-6) for each in results[1]]
    assert [len(server.bodies("/v1/completions")) for server in servers] == [1 + 8, 1 + 8]
