import pytest
import torch
from tiny import build, collate, rows
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_distill import DistillError, block_influence, cut_student
from hf_distill.models.blocks import get_layer_stack
from hf_distill.models.pruning import find_blocks, top_layers


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "model.layers"), ("gpt2", "transformer.h"), ("bert", "bert.encoder.layer")]
)
def test_the_list_of_blocks_is_found(kind, name):
    list_name, blocks = find_blocks(build(kind, layers=3))
    assert (list_name, len(blocks)) == (name, 3)


def test_two_lists_of_blocks_are_an_error():
    with pytest.raises(DistillError, match=r"encoder.block \(2\), .*decoder.block \(2\)"):
        find_blocks(build("t5"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_block_influence_is_one_minus_the_mean_cosine_of_input_and_output(kind):
    model, batch = build(kind, layers=3).eval(), collate(rows(kind, 5))
    with torch.no_grad():
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        states = []
        _name, blocks = find_blocks(model)
        handles = [
            b.register_forward_hook(lambda m, a, o: states.append((a[0], o[0] if isinstance(o, tuple) else o)))
            for b in blocks
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
    real = batch["attention_mask"].bool()
    expected = [
        1
        - sum(float(torch.dot(x, y) / x.norm() / y.norm()) for x, y in zip(a[real], b[real], strict=True))
        / int(real.sum())
        for a, b in states
    ]
    got = block_influence(model, [collate(rows(kind, 5)[:2]), collate(rows(kind, 5)[2:])])
    assert got == pytest.approx(expected, abs=1e-5)


def test_an_identity_block_has_influence_zero():
    model = build("llama", layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    influence = block_influence(model, [collate(rows("llama", 4))])
    assert influence[1] == pytest.approx(0, abs=1e-6)
    assert top_layers(influence, 2) == [0, 2]
    assert model.training
    assert not any(block._forward_hooks for block in model.model.layers)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_cut_student_has_the_logits_of_the_teacher_without_the_other_blocks(kind):
    teacher, batch = build(kind, layers=4).eval(), collate(rows(kind, 3))
    student = cut_student(teacher, [0, 3]).eval()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = student(**inputs).logits
    assert student.config.num_hidden_layers == 2
    assert teacher.config.num_hidden_layers == 4
    _name, blocks = find_blocks(teacher)
    for i in (2, 1):
        del blocks[i]
    torch.testing.assert_close(
        logits, teacher(**inputs, use_cache=False).logits if kind != "bert" else teacher(**inputs).logits
    )


def test_keeping_all_blocks_copies_the_teacher():
    teacher = build("llama", layers=3)
    student = cut_student(teacher, [2, 0, 1])
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, student.state_dict()[name])
        assert value.data_ptr() != student.state_dict()[name].data_ptr()


def test_a_cut_student_generates_and_can_be_saved_and_loaded(tmp_path):
    student = cut_student(build("llama", layers=4), [1, 2]).eval()
    ids = collate(rows("llama", 1))["input_ids"][:, :5]
    cached = student.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    plain = student.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    student.save_pretrained(tmp_path)
    assert len(type(student).from_pretrained(tmp_path).model.layers) == 2


def test_config_lists_with_one_entry_for_each_block_are_cut():
    small = dict(vocab_size=97, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    teacher = Gemma2ForCausalLM(Gemma2Config(**small, head_dim=8, num_hidden_layers=4))
    kinds = teacher.config.layer_types
    student = cut_student(teacher, [1, 2, 3])
    assert student.config.layer_types == [kinds[1], kinds[2], kinds[3]]


def test_tied_heads_remain_tied():
    config = OPTConfig(
        vocab_size=97, hidden_size=16, ffn_dim=16, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=16
    )
    student = cut_student(OPTForCausalLM(config), [0, 2])
    assert student.lm_head.weight.data_ptr() == student.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("layers", [[], [0, 0], [4], [-1]])
def test_invalid_blocks_are_refused(layers):
    with pytest.raises(DistillError, match="from 0 to 3"):
        cut_student(build("llama", layers=4), layers)


def test_invalid_numbers_of_blocks_are_refused():
    with pytest.raises(DistillError, match="keep_layers is 9; the teacher has 3 layers: give a number from 1 to 3"):
        top_layers([0.1, 0.2, 0.3], 9)
    with pytest.raises(DistillError, match="at least one batch"):
        block_influence(build("llama"), [])


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_cut_encoder_decoder_has_the_logits_of_the_teacher_without_the_other_blocks(kind, tmp_path):
    if kind == "t5":
        teacher = build("t5", layers=3).eval()
    else:
        sizes = dict(encoder_layers=4, decoder_layers=3, encoder_ffn_dim=16, decoder_ffn_dim=16, d_model=16)
        ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None)
        config = BartConfig(vocab_size=97, encoder_attention_heads=2, decoder_attention_heads=2, **sizes, **ids)
        teacher = BartForConditionalGeneration(config).eval()
    batch = collate(rows("t5", 3))
    student = cut_student(teacher, encoder_layers=[0, 1], decoder_layers=[0, 2]).eval()
    logits = student(**batch).logits
    depths = [len(get_layer_stack(student, stack).blocks) for stack in ("encoder", "decoder")]
    assert depths == [2, 2]
    only_decoder = cut_student(teacher, decoder_layers=[0])
    assert len(get_layer_stack(only_decoder, "encoder").blocks) == len(get_layer_stack(teacher, "encoder").blocks)
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(type(student).from_pretrained(tmp_path).eval()(**batch).logits, logits)
    encoder_blocks = get_layer_stack(teacher, "encoder").blocks
    del get_layer_stack(teacher, "decoder").blocks[1], encoder_blocks[2:]
    with torch.no_grad():
        torch.testing.assert_close(logits, teacher(**batch, use_cache=False).logits)


def test_the_layers_of_an_encoder_decoder_are_not_those_of_one_stack():
    """With different depths of encoder and decoder, `layers` cut the encoder alone."""
    config = BartConfig(
        vocab_size=9, encoder_layers=3, decoder_layers=2, d_model=4, encoder_ffn_dim=4, decoder_ffn_dim=4
    )
    config.encoder_attention_heads = config.decoder_attention_heads = 1
    bart = BartForConditionalGeneration(config)
    with pytest.raises(
        DistillError, match="has an encoder and a decoder: pass encoder_layers, decoder_layers, or both"
    ):
        cut_student(bart, [0, 1])
    with pytest.raises(DistillError, match=r"decoder_layers is \[2\]: .* from 0 to 1 \(the decoder has 2\)"):
        cut_student(bart, decoder_layers=[2])
    with pytest.raises(DistillError, match="has one stack of layers: pass layers"):
        cut_student(build("llama"), decoder_layers=[0])
    with pytest.raises(DistillError, match=r"has an encoder and a decoder, .*encoder.layers \(3\)"):
        block_influence(bart, [])
    with pytest.raises(DistillError, match=r"relative_attention_bias.*Keep layer 0"):
        cut_student(build("t5"), decoder_layers=[1])


def test_the_heads_that_whisper_aligns_words_with_are_renumbered():
    small = dict(d_model=4, encoder_attention_heads=1, decoder_attention_heads=1, encoder_ffn_dim=4, decoder_ffn_dim=4)
    config = WhisperConfig(vocab_size=9, encoder_layers=1, decoder_layers=3, pad_token_id=0, bos_token_id=1, **small)
    teacher = WhisperForConditionalGeneration(config)
    teacher.generation_config.alignment_heads = [[0, 0], [1, 0], [2, 0]]
    student = cut_student(teacher, decoder_layers=[0, 2])
    assert student.generation_config.alignment_heads == [[0, 0], [1, 0]]
    assert teacher.generation_config.alignment_heads == [[0, 0], [1, 0], [2, 0]]
