"""Generated examples for smoke runs: labelled texts, labelled images, and tones with their names as transcripts."""

import math
from io import BytesIO

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from ..core.references import SMOKE_DATA

_NUM_EXAMPLES = 40
_TOPICS = {"weather": ("rain", "wind", "sun"), "music": ("drum", "song", "flute"), "food": ("bread", "soup", "salt")}
_SIZE_PIXELS = 20
_SAMPLING_RATE, _TONE_SECONDS = 16_000, 0.15
_TONES_HZ = {"low": 220.0, "middle": 440.0, "high": 880.0}


def _texts() -> Dataset:
    rows = []
    for i in range(_NUM_EXAMPLES):
        topic, words = list(_TOPICS.items())[i % len(_TOPICS)]
        rows.append({"text": f"{words[i % 2]} and {words[1 + i % 2]} " * (1 + i % 3), "label": topic})
    return Dataset.from_list(rows)


def _images() -> Dataset:
    """Return noisy images whose bright half is on the left, on the right or at the top."""
    from PIL import Image as PILImage

    rng, names = np.random.default_rng(0), ["left", "right", "top"]
    rows = []
    for i in range(_NUM_EXAMPLES):
        pixels = rng.integers(0, 80, (_SIZE_PIXELS, _SIZE_PIXELS, 3), dtype=np.uint8)
        half = slice(_SIZE_PIXELS // 2)
        area = [(slice(None), half), (slice(None), slice(_SIZE_PIXELS // 2, None)), (half, slice(None))][i % 3]
        pixels[area] += 150
        file = BytesIO()
        PILImage.fromarray(pixels).save(file, format="png")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": i % 3})
    return Dataset.from_list(rows, features=Features({"image": Image(), "label": ClassLabel(names=names)}))


def _tones() -> Dataset:
    """Return recordings of one to three tones each, with the names of the tones as text."""
    rows, names = [], list(_TONES_HZ)
    time = np.arange(int(_SAMPLING_RATE * _TONE_SECONDS)) / _SAMPLING_RATE
    for i in range(_NUM_EXAMPLES):
        words = [names[(i + j * j) % len(names)] for j in range(1 + i % 3)]
        array = np.concatenate([np.sin(2 * math.pi * _TONES_HZ[word] * time) for word in words]).astype(np.float32)
        rows.append({"audio": {"array": array, "sampling_rate": _SAMPLING_RATE}, "text": " ".join(words)})
    return Dataset.from_list(rows)


SMOKE_BUILDERS = dict(zip(SMOKE_DATA, (_texts, _images, _tones), strict=True))
