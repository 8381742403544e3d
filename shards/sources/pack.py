"""Packing paragraphs into sequences of equal length, with the same characters as CLIP ids beside them."""

import hashlib
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding, Tokenizer

from xdscale.shards.clip_bpe import ClipBPE
from xdscale.shards.sources.text_build import BLOCK_TOKENS

ENCODE_CHARACTERS = 1 << 18
"""Text per call of a tokenizer: enough to keep it busy, little enough that its records (about 100 bytes per
token) stay small beside the text."""


@dataclass(frozen=True)
class Packed:
    """The sequences of one shard.

    `language` is uint16 [n, sequence_length]; sequence i owns clip[clip_offsets[i]:clip_offsets[i + 1]] (uint16
    [total], int64 [n + 1]). `blocks_needed[k]` sequences fill k + 1 CLIP blocks before the cut.
    `dropped_tokens` language tokens were left over at the end. `document_tokens[k]` documents have 2^(k-1) to
    2^k - 1 language tokens; the first count is of those that have none.
    """

    language: np.ndarray
    clip: np.ndarray
    clip_offsets: np.ndarray
    blocks_needed: list[int]
    dropped_tokens: int
    document_tokens: list[int]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The rows, as `xdscale.shards.shard.Arrays`."""
        return {"language": self.language, "clip": self.clip, "clip_offsets": self.clip_offsets}


class Packer:
    """Takes paragraphs in order, gives sequences (spec xdbert §4).

    Language ids are concatenated over paragraphs and cut every `sequence_length`; the last partial sequence
    is dropped. A sequence's CLIP ids are the BPE of exactly the characters its language ids cover, pieces of
    different paragraphs joined by a line end, cut to `clip_blocks` blocks of 75. Each character goes through
    each tokenizer once.
    """

    def __init__(self, tokenizer: Tokenizer, clip: ClipBPE, *, sequence_length: int, clip_blocks: int) -> None:
        self._tokenizer = tokenizer
        self._clip = clip
        self._sequence_length = sequence_length
        self._clip_limit = clip_blocks * BLOCK_TOKENS
        self._waiting: list[str] = []  # paragraphs not yet encoded
        self._waiting_characters = 0
        self._document_of_waiting: list[int] = []
        self._document_lengths: list[int] = []  # in tokens
        self._ids: list[np.ndarray] = []
        self._pieces: list[str] = []  # text of the sequence being filled
        self._filled = 0  # its tokens so far
        self._texts: list[str] = []  # whole sequences not yet encoded for CLIP
        self._clip_ids: list[np.ndarray] = []
        self._clip_lengths: list[int] = []  # before the cut

    def add(self, paragraphs: list[str]) -> None:
        """Appends a document's paragraphs to the stream."""
        self._document_lengths.append(0)
        for paragraph in paragraphs:
            self._waiting.append(paragraph)
            self._document_of_waiting.append(len(self._document_lengths) - 1)
            self._waiting_characters += len(paragraph)
            if self._waiting_characters >= ENCODE_CHARACTERS:
                self._encode()

    def finish(self) -> Packed:
        """Returns all sequences; the packer is spent."""
        self._encode()
        length = self._sequence_length
        ids = np.concatenate([np.empty(0, np.uint16), *self._ids])
        language = ids[: len(ids) // length * length].reshape(-1, length)
        lengths = np.array(self._clip_lengths, np.int64)
        # Text that CLIP's cleaning empties (a run of "&nbsp;") has no CLIP side: such a sequence is left out.
        kept = lengths > 0
        language, lengths = language[kept], lengths[kept]
        needed = np.bincount((lengths - 1) // BLOCK_TOKENS) if len(lengths) else np.empty(0, np.int64)
        return Packed(
            language=language,
            clip=np.concatenate([np.empty(0, np.uint16), *self._clip_ids]),
            clip_offsets=np.concatenate([[0], np.cumsum(np.minimum(lengths, self._clip_limit))]),
            blocks_needed=needed.tolist(),
            dropped_tokens=len(ids) - language.size,
            document_tokens=np.bincount(np.array([n.bit_length() for n in self._document_lengths], np.int64)).tolist(),
        )

    def _encode(self) -> None:
        encodings = self._tokenizer.encode_batch(self._waiting, add_special_tokens=False)
        for paragraph, document, encoding in zip(self._waiting, self._document_of_waiting, encodings, strict=True):
            self._document_lengths[document] += len(encoding)
            self._place(paragraph, encoding)
        self._waiting, self._document_of_waiting, self._waiting_characters = [], [], 0
        for ids in self._clip.encode(self._texts):
            self._clip_lengths.append(len(ids))
            self._clip_ids.append(ids[: self._clip_limit])
        self._texts = []

    def _place(self, paragraph: str, encoding: Encoding) -> None:
        """Deals a paragraph's tokens out to sequences, asking for character positions at the cuts only."""
        tokens = len(encoding)
        self._ids.append(np.array(encoding.ids, np.uint16))
        first = 0
        while first < tokens:
            end = min(tokens, first + self._sequence_length - self._filled)
            begin_character, _ = encoding.token_to_chars(first)
            _, end_character = encoding.token_to_chars(end - 1)
            self._pieces.append(paragraph[begin_character:end_character])
            self._filled += end - first
            if self._filled == self._sequence_length:
                self._texts.append("\n".join(self._pieces))
                self._pieces, self._filled = [], 0
            first = end


def is_validation(paragraphs: list[str], fraction: float) -> bool:
    """Tells whether a document belongs to the validation split: by its text alone, wherever it stands."""
    digest = hashlib.blake2b("\n".join(paragraphs).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
