"""Completions from a server with an OpenAI-compatible API: requests, concurrency, faults and refusals."""

import pytest
import torch
from servers.teacher_servers import CompletionServer, Fault
from tiny import build

from hf_distill.errors import DistillError, RunError
from hf_distill.generation.backends.server import CHAT_PATH, TEXT_PATH, ServerBackend
from hf_distill.generation.completion import Prompt, SamplingSettings, make_parts
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.teachers.remote.pool import ServerPool

TOKENIZER = byte_tokenizer()
TAGS = ("<think>", "</think>")


@pytest.fixture
def server():
    with CompletionServer(build("llama", vocab=len(TOKENIZER)), tokenizer=TOKENIZER) as server:
        yield server


def backend_of(server, concurrency=4, retry_seconds=5.0, **settings):
    pool = ServerPool(server.url, retry_seconds=retry_seconds, concurrency=concurrency)
    return ServerBackend(pool, None, SamplingSettings(**{"max_new_tokens": 6, **settings}), TAGS)


def prompts_of(count=4, chat=False):
    texts = [f"text {i}" for i in range(count)]
    contents = [[{"role": "user", "content": text}] if chat else text for text in texts]
    return [Prompt(i, "task", i, content) for i, content in enumerate(contents)]


def run(backend, prompts, samples=1, prompts_per_part=2):
    parts = make_parts(prompts, samples, 7, prompts_per_part)
    try:
        done = [*backend.complete(parts, lambda count: None)]
    finally:
        backend.close()
    assert [part for part, _ in done] == parts
    return {(each.index, each.sample): each for _, completions in done for each in completions}


@torch.no_grad()
def test_greedy_completions_are_those_of_the_model(server):
    completions = run(backend_of(server, temperature=0.0), prompts_of())
    for prompt in prompts_of():
        ids, values = TOKENIZER(prompt.content)["input_ids"], []
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != TOKENIZER.eos_token_id:
            log_probs = torch.log_softmax(server.model(torch.tensor([ids])).logits[0, -1], -1)
            ids.append(int(log_probs.argmax()))
            values.append(float(log_probs.max()))
        completion = completions[prompt.index, 0]
        assert completion.text == TOKENIZER.decode(ids[start:], skip_special_tokens=True)
        assert (completion.tokens, completion.finish_reason) == (len(values), "length")
        assert completion.log_prob == pytest.approx(sum(values) / len(values), abs=1e-5)


def test_conversations_go_to_the_chat_endpoint_with_a_seed_for_each_sample(server):
    prompts = prompts_of(chat=True)
    backend = backend_of(server, temperature=0.8, top_p=0.9, stop=("zz",))
    completions = run(backend, prompts, samples=2)
    bodies = server.bodies(CHAT_PATH)
    assert not server.bodies(TEXT_PATH)
    assert len({body["seed"] for body in bodies}) == len(bodies) == len(completions) == 8
    sent = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 6, "stop": ["zz"], "logprobs": True, "model": "teacher"}
    assert all({name: body[name] for name in sent} == sent for body in bodies)
    assert completions == run(backend_of(server, temperature=0.8, top_p=0.9, stop=("zz",)), prompts, samples=2)


def test_requests_are_concurrent_up_to_the_limit_and_across_parts(server):
    server.faults.append(Fault(TEXT_PATH, slow=0.3, times=100))
    run(backend_of(server, concurrency=3), prompts_of(8), prompts_per_part=1)
    assert server.max_in_flight == 3


def test_separated_reasoning_becomes_part_of_the_text(server):
    server.separates_reasoning = True
    completions = run(backend_of(server), prompts_of(1, chat=True))
    assert completions[0, 0].text.startswith("<think>\nthoughts\n</think>\n\n")


def test_faults_and_malformed_answers_are_repeated(server):
    expected = run(backend_of(server), prompts_of())
    server.faults += [
        Fault(TEXT_PATH, status=503),
        Fault(TEXT_PATH, cut=True),
        Fault(TEXT_PATH, change=lambda answer: {}),
        Fault(TEXT_PATH, change=lambda answer: answer | {"usage": {}}),
        Fault(TEXT_PATH, change=lambda answer: {**answer, "choices": [{**answer["choices"][0], "finish_reason": 1}]}),
    ]
    assert run(backend_of(server, retry_seconds=60.0), prompts_of()) == expected


def test_a_server_that_fails_for_good_ends_the_generation_after_the_complete_parts(server):
    backend = backend_of(server, concurrency=1, retry_seconds=0.0)
    parts = make_parts(prompts_of(), 1, 7, 1)
    iterator = backend.complete(parts, lambda count: None)
    assert next(iterator)[0] == parts[0]
    server.faults.append(Fault(TEXT_PATH, status=500, times=100))
    with pytest.raises(RunError, match="HTTP 500"):
        list(iterator)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 100}, r"data.task, row 0, was refused: .*maximum context length.*Lower generate.max_new"),
        ({}, "Set generate.log_probs to false"),
    ],
)
def test_a_refused_request_names_the_row_and_what_to_do(change, message, server):
    if not change:
        server.faults.append(Fault(TEXT_PATH, status=400, body='{"error": {"message": "logprobs are not supported"}}'))
    with pytest.raises(DistillError, match=message):
        run(backend_of(server, **change), prompts_of(1))


def test_a_call_of_a_tool_is_an_error_and_not_repeated(server):
    """A server with a parser of tool calls returns them apart from the text, with a finish_reason of their own."""

    def call(answer):
        message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
        return {**answer, "choices": [{**answer["choices"][0], "message": message, "finish_reason": "tool_calls"}]}

    server.faults.append(Fault(CHAT_PATH, change=call))
    with pytest.raises(DistillError, match=r"data.task, row 0 \(counted from 0\), is a call of a tool.*backend transf"):
        run(backend_of(server, concurrency=1), prompts_of(1, chat=True))
    assert len(server.bodies(CHAT_PATH)) == 1


@pytest.mark.parametrize("chat", [False, True])
def test_a_server_without_log_probabilities_leaves_them_empty(chat, server):
    server.has_log_probs = False
    assert {each.log_prob for each in run(backend_of(server), prompts_of(chat=chat)).values()} == {None}


def test_log_probabilities_are_not_requested_without_need(server):
    assert {each.log_prob for each in run(backend_of(server, log_probs=False), prompts_of()).values()} == {None}
    assert all("logprobs" not in body for body in server.bodies(TEXT_PATH))


def test_a_server_that_does_not_answer_is_reported_before_the_first_request():
    pool = ServerPool("http://127.0.0.1:9", retry_seconds=0.0)
    with pytest.raises(DistillError, match=r"Check generate.url"):
        ServerBackend(pool, None, SamplingSettings(), TAGS)
