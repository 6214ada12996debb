"""Small tokenizers of all kinds that can be aligned, trained on a few texts of several scripts."""

import json
from functools import cache
from pydoc_data.topics import topics

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    *(topics[name] for name in ("strings", "numbers", "import", "lambda")),
    "Hello world, 12345 and 678 are numbers; naïve café. The year 2024 has 366 days.\r\n\r\n  x = [1, 22, 333]\n",
    "Всё хорошо, мир! Ελληνικά. हिन्दी में लिखा. สวัสดีชาวโลก 你好，世界。日本語のテキスト 한국어 🤦🏽‍♂️🎉",
] * 2
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
LLAMA = ["<unk>", "<s>", "</s>"]


def _byte_level(size: int, special: list[str], digits: str | None = None, nfc: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(digits), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _sentencepiece(size: int, special: list[str], prefix: str = "never") -> Tokenizer:
    """BPE with byte fallback; the prefix space is put by a pre-tokenizer ("first", "always") or a normalizer."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = replace
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special + fallback, limit_alphabet=120, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = None
    if prefix == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif prefix != "never":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prefix, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


@cache
def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind: its name says what is special about it."""
    if kind == "digits":  # single digits
        return _wrap(_byte_level(700, CHATML, r"\p{N}"), eos="<|im_end|>", pad="<|endoftext|>")
    if kind == "groups":  # digits in groups of three, and a larger vocabulary
        return _wrap(_byte_level(1500, CHATML, r"\p{N}{1,3}"), eos="<|endoftext|>")
    if kind == "nfc":
        return _wrap(_byte_level(1000, CHATML, r"\p{N}", nfc=True), eos="<|im_end|>", pad="<|endoftext|>")
    if kind == "gemma":
        names = {"eos": "<eos>", "bos": "<bos>", "pad": "<pad>", "unk": "<unk>"}
        return _wrap(_with_bos(_sentencepiece(900, GEMMA), "<bos>"), **names)
    prefix = {"first": "first", "always": "always", "llama": "normalizer"}[kind]
    tokenizer = _sentencepiece(1100, LLAMA, prefix)
    tokenizer = tokenizer if kind == "always" else _with_bos(tokenizer, "<s>")
    return _wrap(tokenizer, eos="</s>", bos="<s>", unk="<unk>")


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    names = {f"{name}_token": content for name, content in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


KINDS = ("digits", "groups", "nfc", "gemma", "first", "always", "llama")


@cache
def unigram(byte_fallback: bool) -> PreTrainedTokenizerFast:
    """A SentencePiece tokenizer of scores, with or without tokens of bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if byte_fallback:
        content = json.loads(tokenizer.to_str())
        content["model"]["vocab"] += [[f"<0x{byte:02X}>", -30.0] for byte in range(256)]
        tokenizer = Tokenizer.from_str(json.dumps(content | {"model": content["model"] | {"byte_fallback": True}}))
    return _wrap(tokenizer, unk="<unk>", eos="</s>")


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer that adds special tokens, as BERT's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return _wrap(tokenizer, unk="[UNK]", pad="[PAD]", cls="[CLS]", sep="[SEP]")
