import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import VOCAB, build
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_distill import DistillError
from hf_distill.models.blocks import find_blocks
from hf_distill.models.sidecar import Sidecar, attach
from hf_distill.teachers.mtp.generation import generate_with_mtp
from hf_distill.teachers.mtp.heads import MTPHeads, load_heads, record_last_block_kwargs, save_heads

KINDS = ("llama", "gpt2", "qwen3", "gemma2")
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    initializer_range=0.3,
    pad_token_id=0,
)


def student_of(kind: str) -> nn.Module:
    """A tiny model in float64; the last block of gemma2 sees a window of 4."""
    if kind in ("llama", "gpt2"):
        return build(kind, layers=2).eval().double()
    torch.manual_seed(0)
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SMALL)).eval().double()
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=4)).eval().double()


def heads_of(student: nn.Module, k: int) -> MTPHeads:
    """Heads of which no two are alike."""
    heads = MTPHeads(student, k).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return heads


def states(model: nn.Module, ids: torch.Tensor, **inputs):
    """What the output head gets, and the call of the last block."""
    got = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _module, args: got.append(args[0]))
    with record_last_block_kwargs(model) as call:
        model(input_ids=ids, **inputs)
    hook.remove()
    return got[0], call


def predict(model: nn.Module, heads: MTPHeads, ids: torch.Tensor, **inputs) -> list[torch.Tensor]:
    hidden, call = states(model, ids, **inputs)
    return heads(hidden, ids, model.get_input_embeddings(), call)


def tokens(rows: int, length: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_equals_the_definition_on_its_prefix(kind):
    model, ids, k = student_of(kind), tokens(2, 9), 3
    heads = heads_of(model, k)
    rows = predict(model, heads, ids)
    embed = model.get_input_embeddings()
    for i in range(ids.shape[1]):
        hidden, call = states(model, ids[:, : i + 1])
        for d in range(1, min(k, ids.shape[1] - 1 - i) + 1):
            depth = heads.depths[d - 1]
            mixed = []
            for j in range(i + 1):
                both = torch.cat([depth.norm_hidden(hidden[:, j]), depth.norm_token(embed(ids[:, j + d]))], dim=-1)
                mixed.append(both @ depth.project.weight.T)
            hidden = depth.block(torch.stack(mixed, dim=1), **call)
            torch.testing.assert_close(rows[d - 1][:, i], depth.norm_out(hidden)[:, -1], rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_sees_the_token_d_further_on_and_none_after_it(kind):
    model, ids, length = student_of(kind), tokens(1, 10), 10
    heads = heads_of(model, 3)
    rows = predict(model, heads, ids)
    for changed in range(length):
        other = ids.clone()
        other[0, changed] = 3 + (other[0, changed] - 2) % (VOCAB - 3)
        for d, (before, after) in enumerate(zip(rows, predict(model, heads, other), strict=True), 1):
            moved = (before - after).abs().amax(-1)[0, : length - d] > 1e-9
            assert not moved[: max(0, changed - d)].any()
            assert changed < d or moved[changed - d]


@torch.no_grad()
def test_the_next_module_gets_the_output_before_the_last_norm():
    model, ids = student_of("llama"), tokens(2, 8)
    heads = heads_of(model, 3)
    rows = predict(model, heads, ids)
    heads.depths[0].norm_out.weight.mul_(3)
    other = predict(model, heads, ids)
    torch.testing.assert_close(other[0], 3 * rows[0])
    assert torch.equal(other[1], rows[1])
    heads.depths[0].block.mlp.down_proj.weight.mul_(3)
    assert not torch.allclose(predict(model, heads, ids)[2], rows[2])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_the_rows_of_target_tokens(kind, side):
    model, ids, fill = student_of(kind).float(), tokens(1, 7), 4  # eager attention knows no padded float64 row
    heads = heads_of(model, 2)
    pad = (fill, 0) if side == "left" else (0, fill)
    padded, mask = nn.functional.pad(ids, pad), nn.functional.pad(torch.ones_like(ids), pad)
    batch = torch.cat([padded, tokens(1, 7 + fill, seed=6)])
    mask = torch.cat([mask, torch.ones_like(mask)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    start = fill if side == "left" else 0
    got = predict(model, heads, batch, attention_mask=mask, position_ids=positions)
    for d, (alone, row) in enumerate(zip(predict(model, heads, ids), got, strict=True), 1):
        torch.testing.assert_close(row[:1, start : start + 7 - d], alone[:, : 7 - d], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_start_from_the_last_block_and_the_final_norm(kind):
    model = student_of(kind)
    model.requires_grad_(False)
    heads = MTPHeads(model, 2)
    last, norm = find_blocks(model)[1][-1], model.transformer.ln_f if kind == "gpt2" else model.model.norm
    for depth in heads.depths:
        for mine, initial in ((depth.block, last), (depth.norm_out, norm), (depth.norm_token, norm)):
            assert type(mine) is type(initial)
            for name, value in initial.state_dict().items():
                assert torch.equal(mine.state_dict()[name], value)
                assert mine.state_dict()[name].data_ptr() != value.data_ptr()
        assert torch.equal(depth.project.weight, torch.eye(32, 64, dtype=torch.float64))
    assert all(p.requires_grad and p.dtype == torch.float64 for p in heads.parameters())


def test_without_a_single_norm_after_the_blocks_new_norms_are_made():
    model = student_of("llama")
    model.model.second = copy.deepcopy(model.model.norm)
    depth = MTPHeads(model, 1).depths[0]
    assert type(depth.norm_out) is nn.RMSNorm
    assert depth.norm_out.weight.dtype == torch.float64


def test_making_heads_draws_no_random_number():
    model, state = student_of("llama"), torch.get_rng_state()
    MTPHeads(model, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_of_the_last_block_stay_with_it():
    model, ids, owner = student_of("llama"), tokens(1, 6), SimpleNamespace(calls=0)
    last = model.model.layers[-1]

    class Counter:
        def __deepcopy__(self, _memo):
            raise AssertionError("the owner of a hook was copied")

        def __call__(self, *_args):
            owner.calls += 1

    plain = heads_of(model, 1)
    last.register_forward_hook(Counter())
    last.self_attn.register_full_backward_hook(Counter())
    heads = heads_of(model, 1)
    rows = predict(model, heads, ids)
    assert owner.calls == 1
    torch.testing.assert_close(rows, predict(model, plain, ids))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(kind, when):
    def gradients(checkpointing: bool) -> dict:
        model, ids = student_of(kind).train(), tokens(2, 8)
        if checkpointing and when == "before":
            model.gradient_checkpointing_enable()
        heads = heads_of(model, 2).train()
        attach(model, Sidecar({"mtp": {"heads": heads}}))
        if checkpointing and when == "after":
            model.gradient_checkpointing_enable()
        assert checkpointing == heads.depths[0].block.gradient_checkpointing
        sum(row[:, :-2].sin().sum() for row in predict(model, heads, ids, use_cache=False)).backward()
        assert all(p.grad is not None for p in heads.parameters())
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    torch.testing.assert_close(gradients(True), gradients(False))


def test_heads_that_hang_on_a_student_are_not_taken_for_its_blocks():
    model = student_of("llama")
    attach(model, Sidecar({"mtp": {"heads": MTPHeads(model, 2)}}))
    assert find_blocks(model)[0] == "model.layers"


@torch.no_grad()
def test_a_cache_of_the_model_is_not_written_to_and_blocks_may_return_tuples():
    model, ids = student_of("llama"), tokens(1, 6)
    heads = heads_of(model, 1)
    rows = predict(model, heads, ids, use_cache=False)
    torch.testing.assert_close(predict(model, heads, ids, use_cache=True), rows)
    heads.depths[0].block.register_forward_hook(lambda _module, _args, output: (output, None))
    torch.testing.assert_close(predict(model, heads, ids), rows)


@torch.no_grad()
def test_heads_use_the_attention_implementation_of_the_model():
    model, ids = student_of("llama"), tokens(2, 6)
    heads = heads_of(model, 2)
    rows = predict(model, heads, ids)
    model.set_attn_implementation("eager")
    hidden, call = states(model, ids)
    assert call["attention_mask"] is not None
    assert heads.depths[1].block.self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(heads(hidden, ids, model.get_input_embeddings(), call), rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_heads_are_loaded_bit_for_bit(kind, tmp_path):
    model = student_of(kind)
    heads = heads_of(model, 2)
    model.save_pretrained(tmp_path)
    save_heads(heads, tmp_path)
    student, report = type(model).from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    loaded = load_heads(student, tmp_path).eval()
    ids = tokens(1, 8)
    assert all(map(torch.equal, predict(model, loaded, ids), predict(model, heads, ids)))


def test_heads_of_another_model_are_refused(tmp_path):
    with pytest.raises(DistillError, match=r"has no mtp.safetensors and no mtp.json: give a folder"):
        load_heads(student_of("llama"), tmp_path)
    save_heads(MTPHeads(student_of("qwen3"), 1), tmp_path)
    with pytest.raises(DistillError, match=r"'model_type': 'qwen3'.* this student have .*'model_type': 'llama'"):
        load_heads(student_of("llama"), tmp_path)
    other = Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "intermediate_size": 24}))
    with pytest.raises(DistillError, match=r"3 tensors .* \(first: depths.0.block.mlp.gate_proj.weight\)"):
        load_heads(other, tmp_path)


def _with_lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))


def _with_adapter(model):
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)


def _marked(model, holder, **marks):
    for name, value in marks.items():
        setattr(holder(model), name, value)
    return model


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (lambda: build("bert"), "is a masked language model.* use a causal"),
        (lambda: build("t5"), "is a sequence-to-sequence language model"),
        (lambda: build("sequence"), "is a sequence classifier"),
        (lambda: _with_lora(build("llama")), "has adapters.* merge the adapters first"),
        (lambda: _with_adapter(build("llama")), "has adapters"),
        (lambda: _marked(build("llama"), lambda m: m, is_quantized=True), "is quantized"),
        (lambda: _marked(build("llama"), lambda m: m.lm_head.weight, ds_id=0), "is partitioned by ZeRO-3"),
        (lambda: _marked(build("llama"), lambda m: m, lm_head=nn.Sequential()), r"the output head Sequential\(\)"),
        (
            lambda: OPTForCausalLM(
                OPTConfig(hidden_size=16, ffn_dim=16, num_attention_heads=2, num_hidden_layers=1, word_embed_proj_dim=8)
            ),
            "both must have the model's hidden size, 16",
        ),
    ],
)
def test_students_with_an_unsupported_last_block_or_head_are_refused(student, message):
    with pytest.raises(DistillError, match=message):
        MTPHeads(student(), 1)


def test_no_heads_are_refused():
    with pytest.raises(DistillError, match="heads is 0"):
        MTPHeads(build("llama"), 0)


def greedy(model, ids, new, eos=None):
    model.generation_config.eos_token_id = eos
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_heads_do_not_change_the_generated_text(kind):
    model = student_of(kind)
    heads = heads_of(model, 3)
    for seed, length in ((1, 1), (2, 5), (3, 12)):
        ids = tokens(1, length, seed)
        written = generate_with_mtp(model, heads, ids, 15)
        assert torch.equal(written.ids, greedy(model, ids, 15))
        assert sum(written.accepted) + len(written.accepted) == 15


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_heads_that_learnt_a_period_are_accepted_and_the_text_stays_greedy(kind):
    model = build(kind, layers=2)
    heads = MTPHeads(model, 3)
    period, k = torch.tensor([5, 11, 7, 23, 42, 8, 30]), 3
    optimizer = torch.optim.Adam([*model.parameters(), *heads.parameters()], lr=3e-3)
    for step in range(60):
        ids = torch.stack([period.roll(step + i).repeat(4)[:24] for i in range(7)])
        hidden, call = states(model, ids)
        rows = [hidden, *heads(hidden, ids, model.get_input_embeddings(), call)]
        logits = [model.lm_head(row[:, : -d - 1]) for d, row in enumerate(rows)]
        sum(cross_entropy(z.flatten(0, 1), ids[:, d + 1 :].flatten()) for d, z in enumerate(logits)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model, heads = model.eval().double(), heads.eval().double()
    for prompt in (period.repeat(2)[None, :9], torch.cat([tokens(1, 4), period[None]], dim=1), tokens(1, 6)):
        for new in (1, 2, 3, 18):
            written = generate_with_mtp(model, heads, prompt, new)
            assert torch.equal(written.ids, greedy(model, prompt, new))
            assert sum(written.accepted) + len(written.accepted) == new
            assert max(written.accepted) <= k
    written = generate_with_mtp(model, heads, period.repeat(2)[None, :9], 18)
    assert sum(written.accepted) >= 9
    eos = int(written.ids[0, 9 + 10])
    ended = generate_with_mtp(model, heads, period.repeat(2)[None, :9], 18, eos_token_id=eos)
    assert torch.equal(ended.ids, greedy(model, period.repeat(2)[None, :9], 18, eos))
    assert sum(ended.accepted) + len(ended.accepted) == ended.ids.shape[1] - 9


@pytest.mark.parametrize(("shape", "new"), [((2, 3), 4), ((1, 0), 4), ((1, 3), 0)])
def test_prompts_that_cannot_be_continued_are_refused(shape, new):
    model = build("llama")
    with pytest.raises(DistillError, match="give one prompt"):
        generate_with_mtp(model, MTPHeads(model, 1), torch.ones(shape, dtype=torch.long), new)
