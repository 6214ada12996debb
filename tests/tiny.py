"""Tiny models of all kinds, built from a config, and batches for them."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    WhisperConfig,
    WhisperForConditionalGeneration,
    set_seed,
)

VOCAB = 97
SPEECH_VOCAB, SPEECH_MELS, SPEECH_FRAMES, SPEECH_LENGTH = 50, 8, 20, 7  # of `whisper` and `speech_rows`
KINDS = ("llama", "gpt2", "bert", "t5", "sequence", "token")


def build(kind: str, seed: int = 0, layers: int = 2, width: int = 32, vocab: int = VOCAB, dropout: float = 0.0):
    """A tiny random model of a kind."""
    set_seed(seed)
    bert = dict(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=5,
    )
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=2 * width,
            max_position_embeddings=64,
            attention_dropout=dropout,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.3,
        )
        return AutoModelForCausalLM.from_config(config)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocab,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            n_positions=64,
            initializer_range=0.3,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        return AutoModelForCausalLM.from_config(config)
    if kind == "bert":
        return AutoModelForMaskedLM.from_config(BertConfig(**bert, initializer_range=0.3))
    if kind == "t5":
        config = T5Config(
            vocab_size=vocab,
            d_model=width,
            d_kv=width // 2,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=2,
            dropout_rate=dropout,
            decoder_start_token_id=0,
            pad_token_id=0,
            initializer_factor=1.5,
        )
        return AutoModelForSeq2SeqLM.from_config(config)
    if kind == "sequence":
        return AutoModelForSequenceClassification.from_config(BertConfig(**bert, initializer_range=0.3))
    return AutoModelForTokenClassification.from_config(BertConfig(**bert, initializer_range=0.3))


def rows(kind: str, n: int = 16, length: int = 12, seed: int = 1, pad: str = "right") -> list[dict]:
    """Rows of different lengths, padded to one length, with some labels -100."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        size = int(torch.randint(5, length + 1, (1,), generator=g))
        ids = torch.randint(3, VOCAB, (size,), generator=g)
        if kind in ("llama", "gpt2"):
            labels = ids.clone()
            labels[: i % 3] = -100
        elif kind == "sequence":
            labels = None
        else:
            high = 5 if kind == "token" else VOCAB
            labels = torch.randint(3 if high > 5 else 0, high, (size,), generator=g)
            labels[torch.rand(size, generator=g) < 0.4] = -100
        fill = length - size
        side = (fill, 0) if pad == "left" else (0, fill)
        row = {
            "input_ids": torch.nn.functional.pad(ids, side, value=0),
            "attention_mask": torch.nn.functional.pad(torch.ones(size, dtype=torch.long), side, value=0),
            "labels": torch.tensor(int(torch.randint(0, 5, (1,), generator=g)))
            if labels is None
            else torch.nn.functional.pad(labels, (0, fill) if kind == "t5" else side, value=-100),
        }
        out.append(row)
    return out


def whisper(seed=0, width=16, encoder_layers=2, decoder_layers=2):
    """A tiny random Whisper."""
    set_seed(seed)
    config = WhisperConfig(
        vocab_size=SPEECH_VOCAB,
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=SPEECH_MELS,
        max_source_positions=SPEECH_FRAMES // 2,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        dropout=0.0,
        init_std=0.3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=3, eos_token_id=2, pad_token_id=0, max_length=SPEECH_LENGTH + 2
    )
    return model


def speech_rows(n=12, seed=0):
    """Rows for `whisper`: spectrograms, and labels of different lengths, padded with -100."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        labels = torch.randint(4, SPEECH_VOCAB, (SPEECH_LENGTH,), generator=g)
        labels[3 + i % 5 :] = -100
        out.append({"input_features": torch.randn(SPEECH_MELS, SPEECH_FRAMES, generator=g), "labels": labels})
    return out


def collate(batch: list[dict]) -> dict:
    """Stack rows of equal length."""
    return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}


def conversation(i: int) -> list[dict]:
    """A question and its answer, of a length that differs from row to row."""
    answer = "It is " + "very " * (i % 5) + f"close to {i}."
    return [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": answer}]


def one_step(make_trainer, kind, micro, pieces, **options):
    """Return the log and the gradient of one SGD step, over `pieces` micro-batches of `micro` rows."""
    trainer = make_trainer(
        kind,
        folder=f"{micro}x{pieces}",
        max_steps=1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=pieces,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        **options,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    gradient = {n: before[n] - p.detach() for n, p in trainer.model.named_parameters()}
    return trainer.state.log_history[0], gradient
