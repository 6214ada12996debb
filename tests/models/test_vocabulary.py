"""Vocabulary trimming: what is kept, how text is encoded afterwards, and that the model is the same on what is kept."""

import json
import random
from collections import Counter

import pytest
import torch
from datasets.fingerprint import Hasher
from tiny import build
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from trained_tokenizers import CORPUS, KINDS, trained, unigram, wordpiece
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, PhiConfig, PreTrainedTokenizerFast

from hf_distill import DistillError, trim_vocabulary
from hf_distill.models.vocabulary import TokenizerContent, close_over, most_frequent_ids, trim_tokenizer
from hf_distill.student import count_ids, frequent_ids

OTHERS = {"unigram": False, "unigram-bytes": True}


def tokenizer_of(kind, smollm2_tokenizer=None):
    if kind in OTHERS:
        return unigram(OTHERS[kind])
    return {"wordpiece": wordpiece, "smollm2": lambda: smollm2_tokenizer}.get(kind, lambda: trained(kind))()


def random_texts(seed=0, count=150):
    """Words of the corpus in another order, and random characters of many scripts."""
    generator, words = random.Random(seed), " ".join(CORPUS).split(" ")
    for number in range(count):
        if number % 3:
            yield " ".join(generator.choices(words, k=5))
        else:
            alphabet = "aé你🤦ßथ \n\t0x" + "".join(chr(generator.randrange(0x20, 0xD7FF)) for _ in range(4))
            yield "".join(generator.choices(alphabet, k=8))


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS, "wordpiece", "smollm2"])
def test_text_of_kept_tokens_has_the_same_tokens_and_all_text_round_trips(kind, smollm2_tokenizer):
    full = tokenizer_of(kind, smollm2_tokenizer)
    counts = Counter(index for text in CORPUS for index in full(text)["input_ids"])
    trimmed, kept_ids = trim_tokenizer(full, [index for index, _ in counts.most_common(len(counts) // 3)])
    assert len(kept_ids) < len(full)
    assert trimmed.get_vocab() == {full.convert_ids_to_tokens(old): new for new, old in enumerate(kept_ids)}
    num_same = 0
    for text in random_texts():
        before, after = full(text)["input_ids"], trimmed(text)["input_ids"]
        if {*before} <= {*kept_ids}:
            num_same += 1
            assert [kept_ids[index] for index in after] == before
        assert trimmed.decode(after) == full.decode(before)
        if full.unk_token_id not in before:
            assert trimmed.unk_token_id not in after
    assert num_same > 10


def test_rows_of_a_trimmed_vocabulary_are_found_in_the_cache_of_datasets():
    """The processes of a launch trim the same tokenizer, and all but the first read the rows that it tokenized."""
    full = tokenizer_of("llama")
    one, other, smaller = (trim_tokenizer(full, range(count))[0] for count in (300, 300, 280))
    assert len(full) > len(one) > len(smaller)
    assert Hasher.hash(one) == Hasher.hash(other)
    assert len({Hasher.hash(each) for each in (full, one, smaller)}) == 3


@pytest.mark.parametrize("kind", ["digits", "llama", "unigram-bytes", "wordpiece"])
def test_every_text_of_the_used_ids_has_the_same_tokens(kind, tmp_path):
    full = tokenizer_of(kind)
    ids = [full(text)["input_ids"] for text in CORPUS]
    trimmed, kept_ids = trim_tokenizer(full, {index for row in ids for index in row})
    trimmed.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (trimmed, reloaded):
        assert [[kept_ids[index] for index in tokenizer(text)["input_ids"]] for text in CORPUS] == ids
    for name in ("eos", "bos", "pad", "unk", "cls"):
        assert getattr(reloaded, f"{name}_token") == getattr(full, f"{name}_token")


def bpe(merges, characters="abcd", **options):
    vocabulary = [*characters, *dict.fromkeys("".join(pair) for pair in merges)]
    model = models.BPE({token: index for index, token in enumerate(vocabulary)}, merges, **options)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


def test_tokens_that_a_kept_token_is_merged_from_are_kept():
    full = bpe([("a", "b"), ("c", "d"), ("ab", "c"), ("ab", "cd"), ("abc", "d")])
    content = TokenizerContent(full)
    ids = content.ids
    # "abcd" is merged from "ab" and "cd", because the pair (c, d) comes before (ab, c); "abc" is not on the way.
    assert content.needed_by(ids["abcd"]) == {ids[token] for token in ("a", "b", "c", "d", "ab", "cd")}
    trimmed, kept_ids = trim_tokenizer(full, [ids["abcd"]])
    assert [content.tokens[index] for index in kept_ids] == ["a", "b", "c", "d", "ab", "cd", "abcd"]
    assert trimmed.tokenize("abcdabc") == ["abcd", "ab", "c"]


def test_a_token_that_no_merges_make_needs_no_others():
    full = bpe([("a", "b"), ("b", "c"), ("a", "bc")], ignore_merges=True)
    content = TokenizerContent(full)
    assert content.needed_by(content.ids["abc"]) == frozenset()
    trimmed, _ = trim_tokenizer(full, [content.ids["abc"]])
    assert trimmed.tokenize("abc") == full.tokenize("abc") == ["abc"]


def test_the_most_frequent_ids_are_exactly_as_many_as_requested():
    content = TokenizerContent(trained("groups"))
    counts = Counter(index for text in CORPUS for index in trained("groups")(text)["input_ids"])
    least = len(content.mandatory)
    for size in (least, least + 1, least + 200, len(counts) + 300, len(content.tokens)):
        kept = most_frequent_ids(content, counts, size)
        assert kept == close_over(content, kept)
        assert len(kept) == size


def test_an_id_is_left_out_if_there_is_no_room_for_what_it_needs():
    content = TokenizerContent(bpe([("a", "b"), ("c", "d"), ("ab", "cd"), ("a", "c")]))
    counts = {content.ids[token]: count for token, count in {"abcd": 9, "ac": 5, "cd": 2}.items()}
    for size, tokens in ((5, {"ac"}), (6, {"ac", "cd"}), (7, {"ab", "cd", "abcd"}), (8, {"ab", "cd", "abcd", "ac"})):
        kept = {content.tokens[index] for index in most_frequent_ids(content, counts, size)}
        assert kept == {*"abcd", *tokens}


@pytest.mark.parametrize(("size", "message"), [(20, "are always kept"), (99_999, "has 1500 tokens")])
def test_a_size_that_is_not_possible_is_refused(size, message):
    with pytest.raises(DistillError, match=message):
        most_frequent_ids(TokenizerContent(trained("groups")), {}, size)


def phi(vocab):
    return AutoModelForCausalLM.from_config(
        PhiConfig(vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )


def gemma2(vocab):
    config = Gemma2Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=5.0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "make",
    [lambda v: build("llama", vocab=v), lambda v: build("gpt2", vocab=v), phi, gemma2],
    ids=["untied", "tied", "bias", "tied-softcap"],
)
def test_the_logits_of_kept_ids_are_unchanged_after_reloading(make, tmp_path):
    full = trained("digits")
    model = make(len(full) + 64).eval()  # a vocabulary that is padded beyond the tokenizer
    model.config.pad_token_id, model.config.eos_token_id = full.pad_token_id, [full.eos_token_id, full.pad_token_id]
    model.generation_config.eos_token_id, model.generation_config.suppress_tokens = full.eos_token_id, [650, 300]
    model.generation_config.bos_token_id = None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = CORPUS[4][:40]
    result = trim_vocabulary(model, full, full(text)["input_ids"])
    kept_ids = torch.tensor(result.kept_ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result.model.save_pretrained(tmp_path)
    result.tokenizer.save_pretrained(tmp_path)
    student, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert_close(student(ids).logits, model(kept_ids[ids]).logits[..., kept_ids], rtol=1e-6, atol=1e-6)
    head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
    assert head.weight.shape == embedding.weight.shape == (len(kept_ids), 32)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (head.weight is embedding.weight) == is_tied
    assert student.config.vocab_size == len(tokenizer) == len(kept_ids)
    assert student.config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert student.generation_config.eos_token_id == tokenizer.eos_token_id
    expected = [result.kept_ids.index(index) for index in (650, 300) if index in result.kept_ids]
    assert student.generation_config.suppress_tokens == (expected or None)


def test_trimming_nothing_gives_the_same_logits_bit_for_bit():
    full = trained("digits")
    model = build("llama", vocab=len(full)).eval()
    result = trim_vocabulary(model, full, range(len(full)))
    ids = full(CORPUS[4], return_tensors="pt")["input_ids"]
    assert torch.equal(result.model(ids).logits, model(ids).logits)
    assert json.loads(result.tokenizer.backend_tokenizer.to_str()) == json.loads(full.backend_tokenizer.to_str())


def test_ids_are_counted_in_rows_and_data_sets():
    from datasets import Dataset

    rows = [{"input_ids": [1, 2, 2]}, {"input_ids": [2, 5]}]
    assert count_ids(rows) == count_ids(Dataset.from_list(rows)) == {1: 1, 2: 3, 5: 1}
    full = trained("digits")
    assert {1, 2, 5} <= {*frequent_ids(full, rows, 300)}
    with pytest.raises(DistillError, match="no `input_ids`"):
        count_ids([{"text": "a"}])


class Dependent(torch.nn.Module):
    """An embedding to which the sine of each id is added."""

    def __init__(self, embedding):
        super().__init__()
        self.weight, self.embedding_dim = embedding.weight, embedding.embedding_dim

    def forward(self, ids):
        return torch.nn.functional.embedding(ids, self.weight) + ids[..., None].float().sin()


def test_what_cannot_be_trimmed_is_refused():
    full = trained("digits")
    word_level = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    model = build("llama", vocab=len(full))
    dependent = build("llama", vocab=len(full))
    dependent.set_input_embeddings(Dependent(dependent.get_input_embeddings()))
    forced = build("llama", vocab=len(full))
    forced.generation_config.forced_decoder_ids = [[1, 3]]
    for one, tokenizer, keep, message in (
        (model, PreTrainedTokenizerFast(tokenizer_object=word_level), [0], "WordLevel"),
        (model, object(), [0], "not a fast tokenizer"),
        (model, full, [100_000], "no token for 1 of the ids"),
        (build("llama", vocab=600), full, [650], "resize_token_embeddings"),
        (build("bert", vocab=len(full)), full, [3], "not a causal language model"),
        (build("t5", vocab=len(full)), full, [3], "not a causal language model"),
        (dependent, full, [650], "depend on the ids"),
        (forced, full, [3], "forced_decoder_ids"),
    ):
        with pytest.raises(DistillError, match=message):
            trim_vocabulary(one, tokenizer, keep)
