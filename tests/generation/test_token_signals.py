"""Distributions that are recorded during the generation, against a forward of the model on the same tokens."""

import sys
from types import SimpleNamespace

import pytest
import torch
from servers.teacher_servers import VLLMCompletionServer
from tiny import build

from hf_distill.errors import DistillError
from hf_distill.generation.backends.local import TransformersBackend
from hf_distill.generation.backends.server import TEXT_PATH, ServerBackend
from hf_distill.generation.backends.server_capture import ServerCapture
from hf_distill.generation.backends.vllm import VLLMBackend
from hf_distill.generation.completion import Prompt, SamplingSettings, make_parts
from hf_distill.generation.token_signals import (
    Capture,
    SignalFile,
    SignalIndex,
    TokenSignals,
    top_k_values,
    write_signals,
)
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.teachers.remote.api import TokenRow
from hf_distill.teachers.remote.pool import ServerPool

TOKENIZER = byte_tokenizer()
TEXTS = ["a", "some words", "b c d", "numbers 123"]
IDS = {index: TOKENIZER(text)["input_ids"] for index, text in enumerate(TEXTS)}
K = 5


@pytest.fixture(scope="module")
def model():
    return build("llama", vocab=len(TOKENIZER)).eval()


def encode(request):
    return IDS[request.prompt.index]


def complete(backend, samples=2):
    parts = make_parts([Prompt(i, "task", i, text) for i, text in enumerate(TEXTS)], samples, 7, 3)
    return [each for _, completions in backend.complete(parts, lambda count: None) for each in completions]


@torch.no_grad()
def forward(model, signals, capture):
    """What one forward gives at the positions of a completion and after it."""
    ids = torch.tensor([[*signals.prompt, *signals.tokens]])
    hidden = model.model(ids).last_hidden_state[0, len(signals.prompt) - 1 :]
    if capture.values == "hidden":
        return {"hidden": hidden}
    log_probs, ids = torch.log_softmax(model.lm_head(hidden) / capture.temperature, -1).topk(capture.k)
    ids, order = ids.sort(-1)
    return {"ids": ids, "log_probs": log_probs.gather(-1, order)}


def check(signals, expected, count):
    for name, values in expected.items():
        assert len(signals.values[name]) == count
        torch.testing.assert_close(
            signals.values[name], values[:count].to(signals.values[name].dtype), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("capture", [Capture("top_k", K, 2.0), Capture("hidden", 0)], ids=["top_k", "hidden"])
@pytest.mark.parametrize("batching", ["continuous", "padded"])
@pytest.mark.parametrize("stop", [(), ("s", "o")], ids=["", "stop"])
def test_recorded_distributions_are_those_of_one_forward_and_include_that_after_the_end(
    capture, batching, stop, model, monkeypatch
):
    end = [TOKENIZER.eos_token_id, *range(0, len(TOKENIZER), 10)]
    monkeypatch.setattr(model, "generation_config", SimpleNamespace(eos_token_id=end))
    settings = SamplingSettings(temperature=0.7, top_p=0.9, max_new_tokens=8, stop=stop)
    backend = TransformersBackend(model, TOKENIZER, encode, settings, batching, 3, {"model": "tiny"}, capture)
    completions = complete(backend)
    for each in completions:
        signals = each.signals
        assert list(signals.prompt) == IDS[each.index]
        count, is_cut = len(next(iter(signals.values.values()))), each.finish_reason == "length"
        if is_cut:  # the end-of-text token follows, which the training adds
            assert each.tokens == 8
            assert signals.tokens[8:] == [TOKENIZER.eos_token_id]
        if not stop or is_cut:
            assert len(signals.tokens) == each.tokens + is_cut
            assert count == len(signals.tokens) + 1
        assert each.tokens <= 8
        assert len(signals.tokens) >= each.tokens
        assert count in (len(signals.tokens), len(signals.tokens) + 1)
        assert not {*signals.tokens[:-1]} & {*end}
        check(signals, forward(model, signals, capture), count)
    assert len({each.tokens for each in completions}) > 1
    assert {each.finish_reason for each in completions} == {"stop", "length"}
    assert stop or complete(backend) == completions


@pytest.fixture
def server(model):
    with VLLMCompletionServer(model, tokenizer=TOKENIZER) as server:
        yield server


def server_backend(server, k=K):
    pool = ServerPool(server.url, retry_seconds=0.0)
    backend = ServerBackend(pool, None, SamplingSettings(temperature=0.7, max_new_tokens=6), ("<think>", "</think>"))
    backend.capture = ServerCapture(pool, backend.model, Capture("top_k", k), len(TOKENIZER), encode)
    return backend


def test_a_server_returns_the_distributions_of_the_tokens_that_it_generates(server, model):
    backend = server_backend(server)
    backend.capture.check(TOKENIZER)
    for each in complete(backend):
        check(each.signals, forward(model, each.signals, Capture("top_k", K)), each.tokens)
    bodies = [body for body in server.bodies(TEXT_PATH) if body["max_tokens"] == 6]
    assert len(bodies) == 8
    assert all(body["prompt"] in [*IDS.values()] for body in bodies)


def test_a_server_computes_the_distributions_of_other_tokens(server, model):
    backend = server_backend(server)
    ids = tuple(TOKENIZER("other text")["input_ids"])
    rows = [TokenRow(ids, (7,)), TokenRow(ids, (2, 3, 4)), TokenRow(ids, (7, 8))]
    for row, values in zip(rows, backend.capture.score(rows), strict=True):
        expected = forward(model, TokenSignals(ids[:1], ids[1:], {}), Capture("top_k", K))
        signals = TokenSignals([], [], values)
        check(signals, {name: each[list(row.positions)] for name, each in expected.items()}, len(row.positions))
    assert ["prompt_logprobs" in body for body in server.bodies(TEXT_PATH)].count(True) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_top_k": 4}, "does not return generate.k = 5 .*--max-logprobs 5, or lower generate.k"),
        ({"has_log_probs": False}, r"generate.cache: .*no log-probabilities with the ids of tokens.*vLLM"),
        ({"tokenizer": byte_tokenizer([("e", "x"), ("h", "e")])}, "tokenizer .* is not the student's"),
    ],
)
def test_a_server_that_cannot_serve_a_cache_is_an_error_before_the_generation(change, message, server):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(DistillError, match=message):
        server_backend(server).capture.check(TOKENIZER)


def test_vllm_in_this_process_returns_distributions(model, monkeypatch):
    class Engine:
        def __init__(self, **options):
            assert options["max_logprobs"] == K

        def generate(self, prompts, parameters, use_tqdm):
            return [self._answer(*pair) for pair in zip(prompts, parameters, strict=True)]

        @torch.no_grad()
        def _answer(self, prompt, options):
            ids = prompt["prompt_token_ids"]
            new, entries = [], []
            for _ in range(options["max_tokens"]):
                row = torch.log_softmax(model(torch.tensor([ids + new])).logits[0, -1], -1)
                new.append(int(torch.multinomial(row.exp(), 1)))
                entries.append(self._entries(row, new[-1]))
            log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            of_prompt = [None] + [self._entries(*pair) for pair in zip(log_probs, ids[1:], strict=False)]
            choice = SimpleNamespace(
                text="x", token_ids=new, finish_reason="length", cumulative_logprob=-1.0, logprobs=entries
            )
            return SimpleNamespace(outputs=[choice], prompt_logprobs=of_prompt)

        def _entries(self, row, token):
            kept = dict.fromkeys([token, *row.topk(K).indices.tolist()])
            return {i: SimpleNamespace(logprob=float(row[i])) for i in kept}

    module = SimpleNamespace(LLM=Engine, SamplingParams=lambda **options: options, __spec__=object())
    monkeypatch.setitem(sys.modules, "vllm", module)
    settings, capture = SamplingSettings(max_new_tokens=4), Capture("top_k", K)
    backend = VLLMBackend("org/t", {}, encode, settings, {"model": "org/t"}, capture, len(TOKENIZER))
    for each in complete(backend, samples=1):
        check(each.signals, forward(model, each.signals, capture), 4)
    ids = tuple(IDS[3])
    rows = [TokenRow(ids, (1, 2, 3)), TokenRow(ids, (5,))]
    expected = forward(model, TokenSignals(ids[:1], ids[1:], {}), capture)
    for row, values in zip(rows, backend.score(rows), strict=True):
        signals = TokenSignals([], [], values)
        check(signals, {name: each[list(row.positions)] for name, each in expected.items()}, len(row.positions))


def test_the_index_finds_the_completion_with_the_most_tokens_of_a_row(tmp_path):
    def signals(prompt, tokens, count):
        return TokenSignals(prompt, tokens, {"hidden": torch.arange(count).float()[:, None] + 100 * tokens[0]})

    write_signals(tmp_path / "0", [signals([1, 2], [3, 4, 5], 4), signals([1, 2], [3, 4, 6, 7], 4)])
    write_signals(tmp_path / "1", [signals([9], [8], 1)])
    index = SignalIndex([SignalFile(tmp_path / "0"), SignalFile(tmp_path / "1")])
    for ids, positions, expected in [
        ((1, 2, 3, 4, 5, 0), (1, 2, 3, 4), [300, 301, 302, 303]),  # the last one is after the completion
        ((1, 2, 3, 4, 5, 0, 0), (1, 2, 3, 4, 5), [300, 301, 302, 303]),
        ((1, 2, 3, 4, 6, 7, 0), (1, 2, 3, 4, 5), [300, 301, 302, 303]),
        ((1, 2, 3, 9, 6), (1, 2, 3), [300, 301]),  # another token from the second one on
        ((1, 2, 3, 4, 5), (1, 3), [300, 302]),
        ((1, 2, 9), (1,), [300]),
        ((9, 8, 8), (0, 1), [800]),
        ((1, 2, 3), (0, 1), None),  # another prompt
    ]:
        row = TokenRow(ids, positions)
        values = index.values(row)
        assert index.count(row) == len(expected or ())
        assert (None if values is None else values["hidden"].flatten().tolist()) == expected


def test_a_damaged_file_is_reported(tmp_path):
    (tmp_path / "part.safetensors").write_bytes(b"half")
    with pytest.raises(DistillError, match=r"part.safetensors is damaged"):
        SignalFile(tmp_path / "part.safetensors")


def test_top_k_is_limited_by_the_vocabulary():
    values = top_k_values(torch.randn(2, 4), 9)
    assert values["ids"].tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(values["log_probs"].exp().sum(-1), torch.ones(2))
