"""The transformers backend against plain generation, and vLLM in this process against a module of its interface."""

import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import build

from hf_distill.errors import DistillError
from hf_distill.generation.backends.local import TransformersBackend
from hf_distill.generation.backends.vllm import VLLMBackend
from hf_distill.generation.completion import Prompt, SamplingSettings, cut_at_stop, make_parts
from hf_distill.recipe.smoke import byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = ["a", "some words", "b c d", "numbers 123"]
IDS = {index: TOKENIZER(text)["input_ids"] for index, text in enumerate(TEXTS)}


@pytest.fixture(scope="module")
def model():
    model = build("llama", vocab=len(TOKENIZER)).eval()
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, 11]  # an id that greedy completions reach
    return model


def backend_of(model, batching, **settings):
    eos = model.generation_config.eos_token_id
    backend = TransformersBackend(
        model,
        TOKENIZER,
        lambda request: IDS[request.prompt.index],
        SamplingSettings(**{"max_new_tokens": 10, **settings}),
        batching,
        2,
        {"model": "tiny"},
    )
    model.generation_config.eos_token_id = eos  # the next test needs it
    return backend


def run(backend, samples=1, prompts_per_part=4):
    parts = make_parts([Prompt(i, "task", i, text) for i, text in enumerate(TEXTS)], samples, 7, prompts_per_part)
    counts = []
    completions = {
        (each.index, each.sample): each for _, part in backend.complete(parts, counts.append) for each in part
    }
    assert len(completions) == samples * len(TEXTS)
    assert sum(counts) == sum(each.tokens for each in completions.values())
    return completions


@torch.no_grad()
def reference(model, ids, count, eos):
    """Greedy ids and the mean of their log-probabilities, one token at a time."""
    new, values = [], []
    while len(new) < count and not (new and new[-1] in eos):
        log_probs = torch.log_softmax(model(torch.tensor([ids + new])).logits[0, -1], -1)
        new.append(int(log_probs.argmax()))
        values.append(float(log_probs[new[-1]]))
    return new, sum(values) / len(values)


@pytest.mark.parametrize("batching", ["continuous", "padded"])
def test_greedy_completions_equal_those_of_single_rows(batching, model):
    backend = backend_of(model, batching, temperature=0.0)
    reasons = set()
    for (index, _), completion in run(backend).items():
        ids, log_prob = reference(model, IDS[index], 10, backend.eos_ids)
        assert completion.text == TOKENIZER.decode(ids, skip_special_tokens=True)
        assert completion.tokens == len(ids)
        assert completion.log_prob == pytest.approx(log_prob, abs=1e-4)
        assert completion.finish_reason == ("stop" if ids[-1] in backend.eos_ids else "length")
        reasons.add(completion.finish_reason)
    assert backend.log_prob_distribution == "model"
    assert "length" in reasons


@pytest.mark.parametrize("batching", ["continuous", "padded"])
def test_a_part_is_generated_again_with_the_same_completions_and_samples_differ(batching, model):
    first, again = (run(backend_of(model, batching, temperature=0.9), 2, 2) for _ in range(2))
    assert first == again
    assert all(first[index, 0].text != first[index, 1].text for index in IDS)


@pytest.mark.parametrize("batching", ["continuous", "padded"])
def test_a_completion_ends_at_a_stop_text(batching, model):
    whole = run(backend_of(model, batching, temperature=0.0))
    stop = whole[1, 0].text[3:5]
    stopped = run(backend_of(model, batching, temperature=0.0, stop=(stop, "never")))
    for key, completion in stopped.items():
        cut = cut_at_stop(whole[key].text, [stop])
        assert completion.text == (whole[key].text if cut is None else cut)
        if cut is not None:
            assert completion.finish_reason == "stop"
            assert completion.tokens <= whole[key].tokens
    assert stopped[1, 0].text != whole[1, 0].text


def test_log_probabilities_of_padded_batches_do_not_depend_on_the_temperature(model):
    backend = backend_of(model, "padded", temperature=0.5, top_p=0.8)
    assert backend.log_prob_distribution == "model"
    for (index, _), completion in run(backend).items():
        new = TOKENIZER(completion.text)["input_ids"]
        if len(new) != completion.tokens:
            continue  # it has an end-of-text token, or bytes that are no text
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([IDS[index] + new])).logits[0], -1)
        values = [float(log_probs[len(IDS[index]) + i - 1, token]) for i, token in enumerate(new)]
        assert completion.log_prob == pytest.approx(sum(values) / len(values), abs=1e-4)
    assert backend_of(model, "continuous", temperature=0.5).log_prob_distribution == "sampling"


def test_a_model_that_continuous_batching_does_not_support_is_an_error_with_the_remedy(model, monkeypatch):
    def refuse(*_):
        raise ValueError("not supported")

    monkeypatch.setattr(type(model), "init_continuous_batching", refuse)
    with pytest.raises(DistillError, match=r"not supported. .*set generate.batching to padded"):
        run(backend_of(model, "continuous"))


def test_vllm_in_this_process_gets_ids_and_seeds(monkeypatch):
    calls = []

    class Engine:
        def __init__(self, **options):
            calls.append(options)

        def generate(self, prompts, parameters, use_tqdm):
            calls.append((prompts, parameters))
            return [
                SimpleNamespace(
                    outputs=[
                        SimpleNamespace(text="yes", token_ids=[1, 2], finish_reason=reason, cumulative_logprob=-1.0)
                    ]
                )
                for reason, _ in zip(["stop", "length"] * 4, prompts, strict=False)
            ]

    module = SimpleNamespace(LLM=Engine, SamplingParams=lambda **options: options, __spec__=object())
    monkeypatch.setitem(sys.modules, "vllm", module)
    settings = SamplingSettings(temperature=0.5, stop=("\n",), max_new_tokens=4)
    backend = VLLMBackend("org/t", {"revision": "r"}, lambda r: IDS[r.prompt.index], settings, {"model": "org/t"})
    completions = run(backend)
    assert calls[0] == {"model": "org/t", "revision": "r"}
    prompts, parameters = calls[1]
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [*IDS.values()]
    assert len({each.pop("seed") for each in parameters}) == 4
    assert parameters[0] == {"temperature": 0.5, "top_p": 1.0, "max_tokens": 4, "stop": ["\n"], "logprobs": 0}
    assert (completions[0, 0].log_prob, completions[1, 0].finish_reason) == (-0.5, "length")
