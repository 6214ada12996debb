"""Padded batches that go on without the rows that have ended."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from hf_distill.generation.backends.row_dropping import generate_and_drop_rows, sample

END, PAD, WIDTH, STEPS = 11, 0, 4, 12


class Watcher(LogitsProcessor):
    """Records the rows of each step, and ends row i at step `lengths[i]` by making the end-of-text id certain."""

    def __init__(self, lengths):
        self.lengths, self.rows, self.steps = lengths, torch.arange(len(lengths)), []

    def __call__(self, input_ids, scores):
        self.steps.append(self.rows.tolist())
        scores[:, END] = -torch.inf
        for number, row in enumerate(self.rows.tolist()):
            if input_ids.shape[1] - WIDTH + 1 >= self.lengths[row]:
                scores[number, END] = torch.inf
        return scores.nan_to_num(posinf=1e4)

    def keep_rows(self, rows, input_ids):
        assert input_ids.shape[0] == len(self.rows)
        self.rows = self.rows[rows]


def generate(model, lengths, custom, **config):
    ids = torch.arange(13, 13 + len(lengths) * WIDTH).view(len(lengths), WIDTH)
    mask = torch.ones_like(ids)
    for row in range(len(lengths)):  # prompts of different lengths
        ids[row, : row % WIDTH], mask[row, : row % WIDTH] = PAD, 0
    watcher = Watcher(lengths)
    output = model.generate(
        ids,
        attention_mask=mask,
        generation_config=GenerationConfig(max_new_tokens=STEPS, eos_token_id=END, pad_token_id=PAD, **config),
        logits_processor=LogitsProcessorList([watcher]),
        custom_generate=generate_and_drop_rows if custom else None,
    )
    return output, watcher.steps


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3}
ATTENTION = {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CONFIGS = {  # full attention, also with sliding windows, learned positions, and a state whose rows cannot be selected
    "llama": SIZES | ATTENTION,
    "gemma3_text": SIZES | ATTENTION | WINDOW,
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mamba": SIZES,
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **CONFIGS[request.param])).eval()
    model.generation_config = GenerationConfig()
    return model


@pytest.mark.parametrize("lengths", [[3, 12, 99, 1, 5], [2, 2, 2], [99], [1, 99, 99, 99, 99, 99, 99, 99, 99]])
def test_greedy_tokens_equal_those_of_generate(model, lengths):
    expected, _ = generate(model, lengths, custom=False)
    output, steps = generate(model, lengths, custom=True)
    assert output.tolist() == expected.tolist()
    has_rows = model.config.model_type != "mamba"
    for step, rows in enumerate(steps):
        running = [row for row, length in enumerate(lengths) if length > step]
        if not has_rows:
            assert rows == [*range(len(lengths))]
        else:  # at most an eighth of the rows has ended
            assert {*running} <= {*rows}
            assert len(rows) - len(running) < max(len(rows) / 8, 1)


def test_sampled_tokens_have_the_distribution_of_the_logits():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0, -torch.inf], [-torch.inf, 5.0, -torch.inf, 5.0, 4.0]])
    drawn = sample(logits.repeat_interleave(20_000, 0)).view(2, -1)
    shares = torch.stack([torch.bincount(row, minlength=5) / row.numel() for row in drawn])
    expected = torch.softmax(logits, -1)
    assert (shares - expected).abs().max() < 4 * 0.5 / 20_000**0.5
    assert (shares[expected == 0] == 0).all()


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_first_and_the_last_number_draw_tokens_that_are_possible(number, monkeypatch):
    logits = torch.full((50, 1000), -torch.inf)
    for row in range(50):
        logits[row, row : 900 + row] = torch.randn(900, generator=torch.Generator().manual_seed(row))
    monkeypatch.setattr(torch, "rand_like", lambda total: torch.full_like(total, number))
    assert torch.isfinite(logits.gather(1, sample(logits)[:, None])).all()


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(RuntimeError, match="logits are not finite"):
        sample(torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]))
