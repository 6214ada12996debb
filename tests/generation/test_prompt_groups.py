"""Prompts that are read in groups of similar length: completions are those of transformers for the same draws."""

import pytest
import torch
from tiny import VOCAB, build
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig, set_seed

from hf_distill.generation.backends import row_dropping
from hf_distill.generation.backends.row_dropping import generate_and_drop_rows

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


def config_of(**options):
    return GenerationConfig(**{"max_new_tokens": 8, "do_sample": True, "top_k": 0, "pad_token_id": 0} | options)


def completions(model, config, lengths, custom=generate_and_drop_rows):
    """The ids that `generate` returns for one seed."""
    ids, mask = prompts(lengths)
    torch.manual_seed(3)
    options = {} if custom is None else {"custom_generate": custom, "groups_prompts": True}
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)


def shapes_of(model, lengths):
    """The shapes of the inputs of each step."""
    shapes = []
    hook = lambda _module, _args, inputs: shapes.append(tuple(inputs["input_ids"].shape))  # noqa: E731
    model.register_forward_pre_hook(hook, with_kwargs=True)
    completions(model, config_of(max_new_tokens=2), lengths)
    return shapes


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_draws_give_the_completions_of_transformers(kind, lengths, monkeypatch):
    monkeypatch.setattr(row_dropping, "sample", lambda scores: torch.multinomial(scores.softmax(-1), 1)[:, 0])
    model, config = MODELS[kind]().eval(), config_of(temperature=0.8, top_p=0.9, repetition_penalty=1.2)
    assert torch.equal(completions(model, config, lengths), completions(model, config, lengths, custom=None))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_are_read_without_most_of_their_padding(kind):
    assert shapes_of(MODELS[kind]().eval(), LENGTHS["mixed"]) == [(2, 15), (1, 9), (2, 4), (5, 1)]


@pytest.mark.parametrize("kind", ["window", "shared", "llama"])
def test_prompts_that_cannot_be_separated_are_read_together(kind):
    model = MODELS[kind]().eval()
    if kind == "llama":
        model.config.rope_parameters = {"rope_type": "longrope"}
    assert shapes_of(model, LENGTHS["mixed"]) == [(5, 15), (5, 1)]
