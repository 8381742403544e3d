"""CLIP's byte-pair encoding, run by the Rust library `tokenizers`.

The ids are those of open_clip's `SimpleTokenizer.encode`, with two differences. Text that spells
`<start_of_text>` or `<end_of_text>` is encoded letter by letter, so no text can forge a block's borders. And
which characters are letters follows this library's Unicode tables: the scripts added last may be cut elsewhere.
"""

import gzip
import hashlib
import html
import re
import zlib
from pathlib import Path

import ftfy
import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from xdscale.errors import XdscaleError
from xdscale.names import resolve_path
from xdscale.shards.sources.text_build import ClipTokenizer

MERGES_FILE = "package:open_clip/bpe_simple_vocab_16e6.txt.gz"
START, END = "<start_of_text>", "<end_of_text>"
WORD_END = "</w>"
"""What an entry ends in that closes a word."""
VOCAB_SIZE = 49_408
# The file lists more merges than CLIP uses: those that fit beside 2 * 256 bytes and 2 markers.
MERGES = VOCAB_SIZE - 2 * 256 - 2
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# Printable ASCII, "&" only before a space: ftfy and HTML unescaping leave it as it is.
_ASCII = r"(?:[ -%'-~\n]|& )"
# Curly quotes, some signs and most accented letters, alone among ASCII, and hard spaces with dashes: none of them is
# a sign of mojibake (ftfy looks for telling pairs; it takes Â, Ã, Œ and œ by themselves), and of all that ftfy does
# to text, it only straightens the quotes.
_CALM = r"(?:[…‘’“”°±·×−′″→£À-ÁÄ-ÖØ-öø-ıĴ-ňŊ-őŔ-ž]|[\xa0–—]++)"
_KNOWN = re.compile(rf"{_ASCII}*+(?:{_CALM}{_ASCII}++)*+{_CALM}?")
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


class ClipBPE:
    """Text to CLIP ids, without start and end.

    `tokenizer` is the library's, for text that is already clean.
    """

    def __init__(self) -> None:
        merges = _read_merges(resolve_path(MERGES_FILE))
        self.tokenizer = Tokenizer(models.BPE(_vocabulary(merges), merges, end_of_word_suffix=WORD_END))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns the ids of each text, uint16 [tokens], as many as the text has."""
        encodings = self.tokenizer.encode_batch_fast([clean(text) for text in texts])
        return [np.array(encoding.ids, np.uint16) for encoding in encodings]

    def vocabulary(self) -> dict[str, int]:
        """Returns every entry and its id; entries spell bytes as printable characters."""
        return self.tokenizer.get_vocab()


def describe_clip_tokenizer() -> ClipTokenizer:
    """Returns the identity of CLIP's BPE: its merges file, and the ids of its markers, which are the last two."""
    digest = hashlib.sha256(resolve_path(MERGES_FILE).read_bytes()).hexdigest()
    return ClipTokenizer(
        name=MERGES_FILE,
        sha256=digest,
        vocab_size=VOCAB_SIZE,
        start_id=VOCAB_SIZE - 2,
        end_id=VOCAB_SIZE - 1,
    )


def clean(text: str) -> str:
    """Returns the text as open_clip's BPE sees it: mended, unescaped, single spaces, lower case.

    ftfy is most of the cost, and looks at one line at a time, so it is given only the lines of which it is not
    known what it does. Entities are the exception (a "<" switches their unescaping off for all later lines):
    such a text goes whole.
    """
    if _KNOWN.fullmatch(text):
        text = _straighten(text)
    elif "&" in text:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    else:
        lines = _LINE.findall(text)
        text = "".join(_straighten(line) if _KNOWN.fullmatch(line) else ftfy.fix_text(line) for line in lines)
    return " ".join(text.split()).lower()


def _straighten(text: str) -> str:
    if text.isascii():
        return text
    return text.replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise XdscaleError(f"{path}: not CLIP's merges ({error}); install open_clip_torch again") from None
    pairs = [tuple(line.split(" ")) for line in lines[1 : 1 + MERGES]]
    if len(pairs) != MERGES or any(len(pair) != 2 for pair in pairs):
        raise XdscaleError(f"{path}: expected {MERGES} merges of two parts; install open_clip_torch again")
    return pairs


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Numbers the tokens: the 256 bytes inside a word, the same at its end, the merges, the two markers."""
    # Bytes stand as printable characters: themselves where they are printable, else from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols), *map("".join, merges), START, END]
    return {token: number for number, token in enumerate(tokens)}
