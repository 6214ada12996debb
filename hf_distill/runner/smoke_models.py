"""Tiny random models for smoke runs of other tasks than text-generation, with their tokenizers or processors."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    set_seed,
)

_TEACHER_DEPTH, _STUDENT_DEPTH = 4, 2
_NUM_CLASSES = 3  # of the generated data
_IMAGE_PIXELS, _PATCH_PIXELS = 16, 8
_MEL_BINS, _CHUNK_SECONDS, _FRAMES_PER_SECOND = 8, 1, 100


def _size(role: str) -> tuple[int, int]:
    """Return the width and the depth of a model: "teacher" or "student"."""
    return (32, _STUDENT_DEPTH) if role == "student" else (64, _TEACHER_DEPTH)


def _build_bert(role: str, folder: Path) -> None:
    width, depth = _size(role)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = {token: i for i, token in enumerate([*special, *letters, *(f"##{letter}" for letter in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))  # noqa: S106  # a token of a vocabulary
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names).save_pretrained(folder)
    set_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    config.num_labels = _NUM_CLASSES
    BertForSequenceClassification(config).save_pretrained(folder)


def _build_vit(role: str, folder: Path) -> None:
    width, depth = _size(role)
    set_seed(0)
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        image_size=_IMAGE_PIXELS,
        patch_size=_PATCH_PIXELS,
    )
    config.num_labels = _NUM_CLASSES
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": _IMAGE_PIXELS, "width": _IMAGE_PIXELS}).save_pretrained(folder)


def _build_whisper(role: str, folder: Path) -> None:
    width, depth = _size(role)
    special = ("endoftext", "startoftranscript", "en", "transcribe", "translate", "notimestamps")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *(f"<|{name}|>" for name in special)])}
    start, end = vocab["<|startoftranscript|>"], vocab["<|endoftext|>"]
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[])
    extractor = WhisperFeatureExtractor(feature_size=_MEL_BINS, chunk_length=_CHUNK_SECONDS)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    set_seed(0)
    config = WhisperConfig(
        vocab_size=len(vocab),
        d_model=width,
        encoder_layers=depth,
        decoder_layers=depth,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        num_mel_bins=_MEL_BINS,
        max_source_positions=_CHUNK_SECONDS * _FRAMES_PER_SECOND // 2,
        max_target_positions=64,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start, eos_token_id=end, pad_token_id=end, max_length=48
    )
    model.save_pretrained(folder)


# model_type -> function that writes the tiny model of a role into a folder.
FAMILIES: dict[str, Callable[[str, Path], None]] = {"bert": _build_bert, "vit": _build_vit, "whisper": _build_whisper}
