"""Decodes the bytes of a piece of text that may begin or end inside a character, or not be UTF-8 at all."""

import numpy as np

_REPLACEMENT = "\ufffd"


def decode(raw: bytes) -> str:
    """Return the text of bytes.

    Bytes that are not UTF-8 are left out at the start and the end, where a character was cut, and become U+FFFD
    elsewhere.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return decode_with_spans(raw)[0]


def decode_with_spans(raw: bytes) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the text of bytes, see `decode`, and the bytes at which each of its n characters starts and ends.

    Returns:
        the text, [n] and [n].
    """
    escaped = raw.decode("utf-8", "surrogateescape")  # one surrogate for each byte that is not UTF-8
    codes = np.frombuffer(escaped.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    is_invalid = (codes >= 0xDC80) & (codes <= 0xDCFF)
    lengths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    lengths = np.where(is_invalid, 1, lengths).astype(np.int64)
    ends = np.cumsum(lengths)
    # A run of such bytes is one character, which starts with its first byte and ends with its last one.
    is_run_start = is_invalid & ~np.concatenate([[False], is_invalid[:-1]])[: len(codes)]
    is_run_end = is_invalid & ~np.append(is_invalid[1:], False)[: len(codes)]
    valid = np.flatnonzero(~is_invalid)
    inner = np.zeros(len(codes), bool)
    if len(valid):
        inner[valid[0] : valid[-1]] = True
    first, last = (~is_invalid | (edge & inner) for edge in (is_run_start, is_run_end))
    characters = np.where(is_invalid, ord(_REPLACEMENT), codes)[first].astype("<u4")
    return characters.tobytes().decode("utf-32-le"), (ends - lengths)[first], ends[last]
