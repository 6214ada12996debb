"""Draws the tokens of a sentence by two tokenizers and the chunks that align them, and prints the same as text.

    python benchmarks/alignment_picture.py --student MODEL --teacher MODEL [--text TEXT] [-o FILE]

MODEL is the folder or id of a model, or package:module/file.gguf.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from transformers import AutoTokenizer

from hf_distill.core.aligned_inputs import DEFAULT_KEYS
from hf_distill.data.alignment.teacher_rows import TeacherRowMaker
from hf_distill.runner.model_loading import resolve_model

TEXT = "Naïve distillation: Schrödinger's (tokenizer) reads 1234 in Zürich."
COLORS = ("#cfe3f5", "#f7ddc3")


def tokens_of(tokenizer, ids: list[int], chunks: list[int]) -> list[tuple[str, int]]:
    """Return the text of each token, with `·` for a space, and its chunk."""
    texts = [tokenizer.decode([token]).replace(" ", "·").replace("\n", "⏎") for token in ids]
    return list(zip(texts, chunks, strict=True))


def align(student, teacher, text: str) -> list[list[tuple[str, int]]]:
    """Return the tokens and chunks of the student and of the teacher."""
    ids = student(text, add_special_tokens=False)["input_ids"]
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}
    aligned = TeacherRowMaker(student, teacher)(batch)
    sides = ((student, batch["input_ids"], aligned[DEFAULT_KEYS.chunk_ids]),)
    sides += ((teacher, aligned[DEFAULT_KEYS.teacher_input_ids], aligned[DEFAULT_KEYS.teacher_chunk_ids]),)
    return [tokens_of(tokenizer, rows[0].tolist(), chunks[0].tolist()) for tokenizer, rows, chunks in sides]


def as_text(sides: list[list[tuple[str, int]]]) -> str:
    """Return both tokenizations as text, with a space between tokens and a bar between chunks."""
    lines = []
    for name, tokens in zip(("student", "teacher"), sides, strict=True):
        line, last = "", None
        for text, chunk in tokens:
            line += text if last is None else f" | {text}" if chunk != last or chunk == 0 else f" {text}"
            last = chunk
        lines.append(f"{name}: {line}")
    return "\n".join(lines)


def draw(sides: list[list[tuple[str, int]]], file: str) -> None:
    """Draw a box for each token, whose width is that of its characters; boxes of a chunk have one color."""
    width = sum(len(text) for text, _ in sides[0])
    figure, axis = plt.subplots(figsize=(0.19 * width, 1.5))
    for y, tokens in enumerate(sides):
        x = 0
        for text, chunk in tokens:
            color = "#e4e4e4" if chunk == 0 else COLORS[chunk % 2]
            axis.add_patch(plt.Rectangle((x, -y), len(text), 0.8, facecolor=color, edgecolor="black", linewidth=0.8))
            axis.text(x + len(text) / 2, 0.4 - y, text, ha="center", va="center", family="monospace", fontsize=9)
            x += len(text)
    axis.set_xlim(-0.2, width + 0.2)
    axis.set_ylim(-1.1, 0.9)
    axis.set_yticks([0.4, -0.6], ["student", "teacher"])
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    figure.savefig(file, dpi=130, bbox_inches="tight")


def main() -> None:
    """Read the arguments, print the alignment and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("-o", "--output", default="docs/pictures/alignment.png")
    args = parser.parse_args()
    student, teacher = (AutoTokenizer.from_pretrained(resolve_model(each)) for each in (args.student, args.teacher))
    sides = align(student, teacher, args.text)
    print(as_text(sides))
    draw(sides, args.output)


if __name__ == "__main__":
    main()
