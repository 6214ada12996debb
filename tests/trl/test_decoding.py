"""Sampling on a CPU: the same completions as those of transformers for the same draws, with less work."""

import pytest
import torch
from tiny import VOCAB, build
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig, set_seed

from hf_distill.trl import decoding
from hf_distill.trl.decoding import draw_tokens, generating, sampling_on_cpu

LENGTHS = {"equal": [7, 7, 7, 7], "mixed": [4, 14, 9, 4, 15]}


def prompts(lengths, seed=0):
    """Prompts of random tokens, padded on the left, and their mask."""
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, width - length :] = 1
    return ids, mask


def mistral():
    """A model whose layers keep the keys of a window only."""
    set_seed(0)
    return AutoModelForCausalLM.from_config(
        MistralConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=64, sliding_window=4, initializer_range=0.3,
        )
    )  # fmt: skip


def shared_keys():
    """Gemma 3n's way: later layers read the keys of an earlier one."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    set_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=64, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
        laurel_rank=4, altup_num_inputs=2, layer_types=["full_attention"] * 4, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    return Gemma3nForCausalLM(config)


MODELS = {"llama": lambda: build("llama"), "gpt2": lambda: build("gpt2"), "window": mistral, "shared": shared_keys}


def completions(model, config, ids, mask, is_ours):
    """The ids that `generate` returns for one seed."""
    torch.manual_seed(3)
    if not is_ours:
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    with sampling_on_cpu(model, config):
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)


def config_of(**options):
    return GenerationConfig(**{"max_new_tokens": 8, "do_sample": True, "pad_token_id": 0} | options)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_draws_give_the_completions_of_transformers(kind, lengths, monkeypatch):
    monkeypatch.setattr(decoding, "draw_tokens", lambda scores: torch.multinomial(scores.softmax(-1), 1)[:, 0])
    model, (ids, mask) = MODELS[kind]().eval(), prompts(lengths)
    config = config_of(temperature=0.8, top_k=0, top_p=0.9, repetition_penalty=1.2)
    expected = completions(model, config, ids, mask, is_ours=False)
    assert torch.equal(completions(model, config, ids, mask, is_ours=True), expected)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_rows_that_leave_the_batch_do_not_change_the_others(lengths, monkeypatch):
    """The most probable tokens, so that no random number depends on the number of rows."""
    monkeypatch.setattr(decoding, "draw_tokens", lambda scores: scores.argmax(-1))
    model, (ids, mask) = build("llama").eval(), prompts(lengths)
    free = model.generate(input_ids=ids, attention_mask=mask, generation_config=config_of(do_sample=False))
    ends = sorted({int(free[row, ids.shape[1] + offset]) for row, offset in ((0, 2), (1, 5), (2, 0))})
    expected = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config_of(do_sample=False, eos_token_id=ends)
    )
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _m, _a, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    results = completions(model, config_of(eos_token_id=ends), ids, mask, is_ours=True)
    hook.remove()
    assert torch.equal(results, expected)
    assert sizes[-1] < len(lengths)


def test_prompts_are_read_without_most_of_their_padding():
    model, (ids, mask) = build("llama").eval(), prompts(LENGTHS["mixed"])
    shapes = []
    model.register_forward_pre_hook(lambda _m, _a, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    completions(model, config_of(max_new_tokens=2), ids, mask, is_ours=True)
    assert shapes == [(2, 15), (1, 9), (2, 4), (5, 1)]


@pytest.mark.parametrize("kind", ["window", "llama-longrope"])
def test_rows_of_models_that_depend_on_the_other_rows_are_not_separated(kind, monkeypatch):
    model = mistral() if kind == "window" else build("llama")
    if kind != "window":
        model.config.rope_parameters = {"rope_type": "longrope"}
    calls, of_transformers = [], type(model)._sample
    monkeypatch.setattr(
        type(model), "_sample", lambda self, *args, **kwargs: calls.append(1) or of_transformers(self, *args, **kwargs)
    )
    completions(model.eval(), config_of(), *prompts(LENGTHS["mixed"]), is_ours=True)
    assert calls


def test_other_decoding_methods_are_those_of_transformers():
    model, (ids, mask) = build("llama").eval(), prompts(LENGTHS["mixed"])
    for config in (config_of(num_beams=2), config_of(do_sample=False)):
        with sampling_on_cpu(model, config):
            assert "generate" not in vars(model)
        assert torch.equal(*(completions(model, config, ids, mask, is_ours=is_ours) for is_ours in (True, False)))


def test_tokens_are_drawn_with_their_probabilities():
    torch.manual_seed(0)
    probabilities, count = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0]), 40_000
    drawn = draw_tokens(probabilities.log().expand(count, -1)).bincount(minlength=7) / count
    errors = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((drawn - probabilities).abs() <= 4 * errors).all()


def test_the_largest_random_number_draws_a_possible_token(monkeypatch):
    """At both ends of the interval: never a token of probability 0, never one outside of the vocabulary."""
    scores = torch.full((3, 50_000), -torch.inf)
    scores[:, 10:40_000] = torch.randn(3, 39_990)
    for value, token in ((0.0, 10), (1 - 2**-53, 39_999)):
        monkeypatch.setattr(
            torch, "rand", lambda *size, value=value, **kwargs: torch.full(size, value, dtype=torch.float64)
        )
        assert draw_tokens(scores).tolist() == [token] * 3


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(RuntimeError, match="logits are not finite"):
        draw_tokens(torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]))


def test_modules_train_again_after_generation_even_if_it_fails():
    model = build("llama", dropout=0.5).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    inside = []

    def fail():
        with generating(model):
            inside.extend(module.training for module in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not any(inside)
    assert [module.training for module in model.modules()] == before
