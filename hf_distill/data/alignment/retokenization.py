"""Tokenizes the text of a batch, given in the student's tokens, with the teacher's tokenizer.

Letters: N_s tokens of the student · N_t of the teacher · P pieces of text that the teacher's tokenizer reads at once
"""

from dataclasses import dataclass, replace

import numpy as np

from .chunks import TokenSpans
from .flat_tokens import FlatTokens
from .special_tokens import ENDS, START_OF_TEXT, TURN_MARKS, SpecialTokens
from .text_encoder import TextEncoder
from .text_pieces import decode, decode_with_spans
from .token_bytes import ALWAYS, FIRST
from .tokenizer_text import TokenizerText

_NO_TOKEN = -1
_BOS, _SPECIAL = -2, -1  # sources of the teacher's tokens that are no piece of text


@dataclass(frozen=True)
class Retokenized:
    """The teacher's tokens for a batch of the student, and the text of both sides.

    ids:              [N_t]
    documents:        [N_t] document of each token, as in the student's batch
    student_indices:  [n_s] indices of the student's tokens in `student`
    teacher_indices:  [n_t] indices of the teacher's tokens in `teacher`
    student:          the student's tokens whose text the teacher reads
    teacher:          the teacher's tokens of this text
    is_same_text:     whether the bytes of both sides are known to be the same
    student_skip:     [n_s] number of bytes that the student's tokenizer put before a token, and `student` leaves out
    teacher_skip:     [n_t] likewise
    """

    ids: np.ndarray
    documents: np.ndarray
    student_indices: np.ndarray
    teacher_indices: np.ndarray
    student: TokenSpans
    teacher: TokenSpans
    is_same_text: bool
    student_skip: np.ndarray
    teacher_skip: np.ndarray


@dataclass(frozen=True)
class _Layout:
    """The student's N_s tokens as the teacher reads them.

    rows:         [N_s] rows of the student's table
    is_text:      [N_s] whether a token is text
    teacher_ids:  [N_s] the teacher's special token for a special token; -1 if there is none
    has_bos:      [N_s] whether the teacher's BOS stands before a token
    has_prefix:   [N_s] whether the teacher's tokenizer puts a space before the text that starts with a token
    skip:         [N_s] number of bytes that the student's tokenizer put before the text that starts with a token
    is_start:     [N_s] whether a piece of text starts with a token
    is_inside:    [N_s] whether it continues the text of the piece before it
    """

    rows: np.ndarray
    is_text: np.ndarray
    teacher_ids: np.ndarray
    has_bos: np.ndarray
    has_prefix: np.ndarray
    skip: np.ndarray
    is_start: np.ndarray
    is_inside: np.ndarray


@dataclass(frozen=True)
class _Pieces:
    """The pieces of text that the teacher's tokenizer reads.

    tokens:    [P] index of the student's first token of each piece
    starts:    [P] byte of the student's text at which it starts
    ends:      [P] byte at which it ends
    texts:     the pieces, with the space that the teacher's tokenizer puts before them
    prefixes:  [P] number of these spaces
    """

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    texts: list[str]
    prefixes: np.ndarray


@dataclass(frozen=True)
class _Parts:
    """The parts of the teacher's tokens, in order: its BOS, special tokens and pieces of text.

    tokens:   [n] index of the student's token at which each part stands
    counts:   [n] number of tokens of the teacher
    sources:  [n] index of its piece of text, or `_BOS` or `_SPECIAL`
    """

    tokens: np.ndarray
    counts: np.ndarray
    sources: np.ndarray


class Retokenizer:
    """Tokenizes batches of the student for the teacher.

    Text is cut where the target tokens start or end, and at special tokens, which are replaced by those of the teacher
    that mean the same. Those without an equivalent are left out. An EOS token between concatenated texts becomes the
    teacher's EOS, followed by its BOS if its tokenizer uses one.

    Args:
        student: text of the student's tokens.
        teacher: text of the teacher's tokens.
        encoder: tokenizes text for the teacher.
    """

    def __init__(self, student: TokenizerText, teacher: TokenizerText, encoder: TextEncoder):
        self.student, self.teacher, self.encoder = student, teacher, encoder
        size, meanings = student.table.size + 1, student.special.meanings
        self._in_text, self._in_turns = (
            _teacher_ids(student.special, teacher.special, has_turns, size) for has_turns in (False, True)
        )
        self._is_end, self._is_start_of_text, self._is_turn_mark = np.zeros((3, size), dtype=bool)
        for i, meaning in meanings.items():
            self._is_end[i] = meaning in ENDS
            self._is_start_of_text[i] = meaning == START_OF_TEXT
            self._is_turn_mark[i] = meaning in TURN_MARKS
        self._bos_ids = np.array(teacher.special.bos_ids, dtype=np.int64)

    def __call__(self, tokens: FlatTokens) -> Retokenized:
        """Return the teacher's tokens for the tokens of a batch."""
        layout = self._lay_out(tokens)
        student_indices = np.flatnonzero(layout.is_text | (layout.teacher_ids != _NO_TOKEN))
        table = self.student.table
        student_skip = layout.skip[student_indices]
        data, ends = table.concatenate(layout.rows[student_indices], student_skip)
        student = TokenSpans.of_text(data, ends)
        starts = np.zeros(len(tokens.ids), np.int64)
        starts[student_indices] = student.starts
        pieces = self._cut(layout, starts, student, student_indices)
        ids, parts = self._assemble(layout, pieces)
        documents = np.repeat(tokens.documents[parts.tokens], parts.counts)
        teacher_indices = np.flatnonzero(np.repeat(parts.sources != _BOS, parts.counts))
        teacher, teacher_skip, is_same_text = self._teacher_spans(ids[teacher_indices], parts, starts, pieces, data)
        return Retokenized(
            ids,
            documents,
            student_indices,
            teacher_indices,
            _separate(student, tokens.documents[student_indices]),
            _separate(teacher, documents[teacher_indices]),
            is_same_text,
            student_skip,
            teacher_skip,
        )

    def _assemble(self, layout: _Layout, pieces: _Pieces) -> tuple[np.ndarray, _Parts]:
        """Return the teacher's tokens [N_t], and the parts that they come from."""
        bos = np.flatnonzero(layout.has_bos) if len(self._bos_ids) else np.zeros(0, np.int64)
        special = np.flatnonzero(layout.teacher_ids != _NO_TOKEN)
        arrays = [self._bos_ids] * len(bos) + [layout.teacher_ids[i : i + 1] for i in special]
        arrays += self.encoder.encode(pieces.texts)
        order = np.argsort(np.concatenate([2 * bos, 2 * special + 1, 2 * pieces.tokens + 1]), kind="stable")
        arrays = [arrays[i] for i in order]
        sources = np.repeat([_BOS, _SPECIAL], [len(bos), len(special)])
        parts = _Parts(
            tokens=np.concatenate([bos, special, pieces.tokens])[order],
            counts=np.array([len(each) for each in arrays], dtype=np.int64),
            sources=np.concatenate([sources, np.arange(len(pieces.tokens))])[order],
        )
        return np.concatenate([*arrays, np.zeros(0, np.int64)]), parts

    def _lay_out(self, tokens: FlatTokens) -> _Layout:
        table = self.student.table
        rows, is_first, documents = table.rows(tokens.ids), tokens.is_first, tokens.documents
        is_text = ~table.is_special[rows]
        has_turns = np.bincount(documents, weights=self._is_turn_mark[rows]) > 0
        in_turns = has_turns[documents]
        teacher_ids = np.where(in_turns, self._in_turns[rows], self._in_text[rows])
        is_end, is_start_of_text = self._is_end[rows], self._is_start_of_text[rows]
        after_end = _shift(is_end) & ~is_first & ~in_turns
        has_bos = (is_first | after_end | is_start_of_text) & ~is_end
        after_special = is_first | ~_shift(is_text)
        starts_text = is_first | after_end | _shift(is_start_of_text)

        is_target = tokens.is_target.copy()  # the first token of a document has the status of the next one
        is_target[:-1] = np.where(is_first[:-1] & ~is_first[1:], is_target[1:], is_target[:-1])
        is_start = is_text & (after_special | (is_target != _shift(is_target)))
        places = {ALWAYS: starts_text | after_special, FIRST: starts_text}
        nowhere = np.zeros_like(is_text)
        skip = self._find_prefixes(rows, is_text & places.get(self.student.rules.prefix_space, nowhere), after_special)
        return _Layout(
            rows,
            is_text,
            teacher_ids,
            has_bos,
            has_prefix=places.get(self.teacher.rules.prefix_space, nowhere),
            skip=skip,
            is_start=is_start,
            is_inside=is_start & ~after_special,
        )

    def _find_prefixes(self, rows: np.ndarray, can_start: np.ndarray, after_special: np.ndarray) -> np.ndarray:
        """Return the number of spaces that the student's tokenizer put before tokens, [N_s].

        A tokenizer that puts no space before a text that begins with one has put a space only where another character
        follows it.

        Args:
            rows: [N_s] rows of the student's table.
            can_start: [N_s] whether a text starts with a token, before which the tokenizer puts a space.
            after_special: [N_s] whether a token is the first of its document, or the token before it is special.
        """
        table, skip = self.student.table, np.zeros(len(rows), np.int64)
        spaces = np.flatnonzero(can_start & table.begins_with_space(rows))
        if len(spaces) and not self.student.rules.prefix_is_forced:
            next_rows, continues = np.append(rows[1:], table.size), np.append(~after_special[1:], False)
            next_starts_word = continues & ~table.is_special[next_rows] & ~table.begins_with_space(next_rows)
            is_alone = table.lengths[rows[spaces]] == 1
            second = table.data[table.starts[rows[spaces]] + np.where(is_alone, 0, 1)]
            spaces = spaces[np.where(is_alone, next_starts_word[spaces], second != ord(" "))]
        skip[spaces] = 1
        return skip

    def _cut(self, layout: _Layout, starts: np.ndarray, student: TokenSpans, indices: np.ndarray) -> _Pieces:
        """Cut the student's text into pieces, at the ends of characters where it can be."""
        tokens = np.flatnonzero(layout.is_start)
        piece_starts = starts[tokens]
        is_text = layout.is_text[indices]
        piece_of_token = np.cumsum(layout.is_start)[indices[is_text]] - 1
        piece_ends = np.zeros(len(tokens), np.int64)
        piece_ends[piece_of_token] = student.ends[is_text]  # the last token of a piece is written last
        is_inside = layout.is_inside[tokens]
        for _ in range(3):  # a character has at most three continuation bytes
            moved = np.flatnonzero(is_inside & (piece_starts < piece_ends))
            moved = moved[student.data[piece_starts[moved]] & 0xC0 == 0x80]
            piece_starts[moved] += 1
            piece_ends[moved - 1] += 1
        texts = [decode(student.data[a:b].tobytes()) for a, b in zip(piece_starts, piece_ends, strict=True)]
        prefixes = np.zeros(len(tokens), np.int64)
        for i in np.flatnonzero(layout.has_prefix[tokens]):
            if self.teacher.rules.prefix_is_forced or not texts[i].startswith(" "):
                texts[i], prefixes[i] = " " + texts[i], 1
        return _Pieces(tokens, piece_starts, piece_ends, texts, prefixes)

    def _teacher_spans(
        self, ids: np.ndarray, parts: _Parts, token_starts: np.ndarray, pieces: _Pieces, student_data: np.ndarray
    ) -> tuple[TokenSpans, np.ndarray, bool]:
        """Return the teacher's tokens in the coordinates of the student's text, and whether both texts are the same.

        Between them: the number of bytes that the teacher's tokenizer put before each token.

        Args:
            ids: [n_t] the teacher's tokens of all parts but BOS.
            parts: the parts.
            token_starts: [N_s] byte of the student's text at which each token of the student starts.
            pieces: the pieces.
            student_data: the student's text.
        """
        is_text = parts.sources != _BOS
        counts, piece_of_part = parts.counts[is_text], parts.sources[is_text]
        is_piece = piece_of_part >= 0
        table = self.teacher.table
        rows, skip = table.rows(ids), np.zeros(len(ids), np.int64)
        first = np.cumsum(counts) - counts
        has_prefix = is_piece & (counts > 0)
        has_prefix[has_prefix] = pieces.prefixes[piece_of_part[has_prefix]] > 0
        skip[first[has_prefix]] = table.begins_with_space(rows[first[has_prefix]])
        teacher = TokenSpans.of_text(*table.concatenate(rows, skip))
        if np.array_equal(teacher.data, student_data):
            return teacher, skip, True

        starts = token_starts[parts.tokens[is_text]]
        starts[is_piece] = pieces.starts[piece_of_part[is_piece]]
        bounds = np.append(0, teacher.ends)
        part_starts = bounds[first]
        shift = np.repeat(starts - part_starts, counts)
        coordinates = np.stack([teacher.starts, teacher.ends]) + shift
        for part in np.flatnonzero(is_piece):
            i, tokens = piece_of_part[part], slice(first[part], first[part] + counts[part])
            raw = student_data[pieces.starts[i] : pieces.ends[i]]
            text = teacher.data[part_starts[part] : bounds[tokens.stop]]
            if not np.array_equal(raw, text):
                spans = self._spans_by_offsets(pieces.texts[i], int(pieces.prefixes[i]), raw.tobytes())
                spans = _refine(*spans, raw, text, teacher.lengths[tokens])
                coordinates[:, tokens] = pieces.starts[i] + np.stack(spans)
        return replace(teacher, starts=coordinates[0], ends=coordinates[1]), skip, False

    def _spans_by_offsets(self, text: str, prefix: int, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Return the start and end of each token of a piece, in bytes of the student's text of the piece."""
        first, last = self.encoder.character_spans(text)
        _, starts, ends = decode_with_spans(raw)
        starts = np.concatenate([np.zeros(prefix, np.int64), starts, [len(raw)]])
        ends = np.concatenate([np.zeros(1 + prefix, np.int64), ends])
        return starts[first], ends[last]


def _teacher_ids(student: SpecialTokens, teacher: SpecialTokens, has_turns: bool, size: int) -> np.ndarray:
    """Return the teacher's special token for each id of the student, [size]; -1 where there is none.

    Args:
        student: special tokens of the student.
        teacher: special tokens of the teacher.
        has_turns: whether the tokens stand in a conversation; else each end is the end of a text.
        size: number of rows of the student's table.
    """
    ids = np.full(size, _NO_TOKEN, dtype=np.int64)
    for i, content in student.contents.items():
        meaning = student.meanings.get(i)
        if i in student.unmatched or meaning == START_OF_TEXT:
            continue
        if meaning in ENDS and not has_turns:
            equivalent = teacher.eos_id
        else:
            equivalent = teacher.id_of_content(content)
            if equivalent is None and meaning is not None:
                equivalent = teacher.id_of(meaning)
        ids[i] = _NO_TOKEN if equivalent is None else equivalent
    return ids


def _refine(
    starts: np.ndarray, ends: np.ndarray, raw: np.ndarray, text: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return where tokens start and end that together have the start and end of a few characters.

    If their bytes are those of the characters, each token has its own bytes; otherwise all of them have all bytes.

    Args:
        starts: [N] where each token starts in `raw`; the same for tokens that share characters.
        ends: [N] where it ends.
        raw: [n] bytes of the piece.
        text: [m] bytes of the tokens.
        lengths: [N] number of them for each token.
    """
    if not len(starts):
        return starts, ends
    token_starts = np.cumsum(lengths) - lengths
    is_first = np.append(True, starts[1:] != starts[:-1])
    group = np.cumsum(is_first) - 1
    shift = (starts - token_starts)[is_first][group]  # from bytes of the tokens to bytes of the piece
    is_exact = np.bincount(group, weights=lengths) == (ends - starts)[is_first]
    of_byte = np.repeat(np.arange(len(lengths)), lengths)
    of_byte_in_exact = of_byte[is_exact[group[of_byte]]]
    compared = np.flatnonzero(is_exact[group[of_byte]])
    is_exact[group[of_byte_in_exact[text[compared] != raw[compared + shift[of_byte_in_exact]]]]] = False
    exact = is_exact[group]
    return (
        np.where(exact, token_starts + shift, starts),
        np.where(exact, token_starts + lengths + shift, ends),
    )


def _shift(values: np.ndarray) -> np.ndarray:
    """Return the value of the token before each token [N]; false for the first."""
    return np.concatenate([np.zeros(min(1, len(values)), bool), values[:-1]])


def _separate(side: TokenSpans, documents: np.ndarray) -> TokenSpans:
    """Leave a gap between the coordinates of documents, so that no chunk has tokens of two."""
    return replace(side, starts=side.starts + documents, ends=side.ends + documents)
