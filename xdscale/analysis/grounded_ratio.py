"""Visually grounded ratio of examples, split by who answers better (paper §4, Figure 4, Appendix D; spec xdbert §7)."""

import gzip
import json
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from xdscale.errors import XdscaleError

THRESHOLD = 100
"""A word piece is visually grounded if the captions hold it more often than this (paper Appendix D)."""

_LINES_AT_ONCE = 10_000


@dataclass(frozen=True)
class Grounding:
    """What of a text is visually grounded.

    Attributes:
        grounded: g, its frequent caption pieces.
        other: n, the rest without stop words and punctuation.
    """

    grounded: int
    other: int

    @property
    def ratio(self) -> float | None:
        """g / (g + n); None for a text of stop words and punctuation alone."""
        total = self.grounded + self.other
        return self.grounded / total if total else None


class GroundedWords:
    """Tells grounded word pieces from others, by their number in image captions.

    Args:
        tokenizer: the language model's.
        captions: lines of text, read once.
        stop_words: lower-case words that count on neither side.
        threshold: grounded is what occurs more often.
        on_lines: told the number of lines counted so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        captions: Iterator[str],
        stop_words: frozenset[str],
        *,
        threshold: int = THRESHOLD,
        on_lines: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        counts = np.zeros(1 + max(vocabulary.values()), np.int64)
        self.lines = 0
        while lines := list(islice(captions, _LINES_AT_ONCE)):
            for encoding in tokenizer.encode_batch_fast(lines, add_special_tokens=False):
                np.add.at(counts, encoding.ids, 1)
            self.lines += len(lines)
            on_lines(self.lines)
        self._grounded = counts > threshold
        self._dropped = np.zeros(len(counts), bool)
        for piece, number in vocabulary.items():
            self._dropped[number] = piece in stop_words or is_punctuation(piece)

    @property
    def grounded_pieces(self) -> int:
        """Number of vocabulary entries that are grounded."""
        return int((self._grounded & ~self._dropped).sum())

    def of(self, *texts: str) -> Grounding:
        """Counts the word pieces of an example, its texts together."""
        ids = [number for text in texts for number in self._tokenizer.encode(text, add_special_tokens=False).ids]
        kept = [number for number in ids if not self._dropped[number]]
        grounded = int(self._grounded[kept].sum())
        return Grounding(grounded, len(kept) - grounded)


def is_punctuation(piece: str) -> bool:
    """Whether a piece holds punctuation and symbols only, of any script."""
    inner = piece.removeprefix("##") or piece
    return all(unicodedata.category(character)[0] in "PS" for character in inner)


def default_stop_words() -> frozenset[str]:
    """Returns NLTK's 179 English stop words, as bm25s carries them.

    The paper names no list. This one fits the brackets of its Appendix D; scikit-learn's, for one, holds
    "one", "two", "across" and "towards", which the paper counts.
    """
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    return frozenset(STOPWORDS_EN_PLUS)


def read_stop_words(path: Path) -> frozenset[str]:
    """Reads a list with one word per line.

    Raises:
        XdscaleError: unreadable, or a line with several words (it is named).
    """
    words = set()
    for number, line in enumerate(_text_lines(path), 1):
        if len(line.split()) > 1:
            raise XdscaleError(f"{path}, line {number}: expected one stop word per line, found {line.strip()!r}")
        words.update(line.lower().split())
    return frozenset(words)


def read_captions(names: list[str]) -> Iterator[str]:
    """Yields captions from COCO's JSON files (`annotations[].caption`) and from plain text, one per line.

    Args:
        names: files, patterns such as `captions_*2017.json`, or `package:NAME/inner/path`; `.gz` is unpacked.

    Raises:
        XdscaleError: no such file, unreadable, or not COCO's form; the file, and the line or annotation, are named.
    """
    for path in [path for name in names for path in _caption_files(name)]:
        if path.name.removesuffix(".gz").endswith(".json"):
            yield from _coco_captions(path)
        else:
            yield from _text_lines(path)


def _caption_files(name: str) -> list[Path]:
    from xdscale.names import expand_home, resolve_path

    pattern = Path(expand_home(name))
    if any(sign in pattern.name for sign in "*?[") and not pattern.exists():
        found = sorted(pattern.parent.glob(pattern.name))
        if not found:
            raise XdscaleError(f"{name}: no file has such a name")
        return found
    return [resolve_path(name)]


def _coco_captions(path: Path) -> Iterator[str]:
    text = "".join(_text_lines(path))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise XdscaleError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested as deep
        raise XdscaleError(f"{path}: not JSON ({error})") from None
    annotations = values.get("annotations") if isinstance(values, dict) else None
    if not isinstance(annotations, list):
        raise XdscaleError(f"{path}: expected COCO captions, an object with a list 'annotations'")
    for number, annotation in enumerate(annotations):
        caption = annotation.get("caption") if isinstance(annotation, dict) else None
        if not isinstance(caption, str):
            raise XdscaleError(f"{path}: annotations[{number}] has no 'caption' text: {str(annotation)[:80]}")
        yield caption


def _text_lines(path: Path) -> Iterator[str]:
    line = 1
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for text in file:
                yield text.decode("utf-8")
                line += 1
    except UnicodeDecodeError as error:
        raise XdscaleError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise XdscaleError(f"{path}, line {line}: cannot be read: {error}") from None
