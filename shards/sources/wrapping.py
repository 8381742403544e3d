"""Lines of text: how many words they have, and whether a width broke them, as editors and Project Gutenberg do it."""

import re
from collections.abc import Iterable
from itertools import pairwise

SAMPLE_CHARACTERS = 1 << 16
"""What is looked at, from the start."""
LEAST_PAIRS = 8
"""Lines with a following one in the same paragraph that it takes to judge."""
WIDTHS = range(30, 201)

# Ideographs and kana; the letters of Thai, Lao, Tibetan, Burmese and Khmer.
_UNSPACED_SCRIPTS = (
    "\u0e01-\u0eff\u0f40-\u0fbc\u1000-\u103f\u1050-\u109f\u1780-\u17d3\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_UNSPACED_LETTER = re.compile(f"[{_UNSPACED_SCRIPTS}]")
_NO_WORD = re.compile(
    f"[{_UNSPACED_SCRIPTS}\u3000-\u3004\u3008-\u303f\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)

_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
_UNSPACED = re.compile(f"[{_UNSPACED_SCRIPTS}\u3000-\u303f\uff00-\uffef]")
_SENTENCE_END = re.compile(r"[.!?:;…。！？：；][\"'”’»)\]」』）]*$")


def count_words(line: str) -> int:
    """Returns the pieces between blanks; a character of a script without blanks between words counts as a word."""
    if line.isascii() or not (unspaced := len(_UNSPACED_LETTER.findall(line))):
        return len(line.split())
    return unspaced + len(_NO_WORD.sub(" ", line).split())


def looks_wrapped(text: str) -> bool:
    """Tells whether the lines of a text were broken at a width.

    Then most lines end within a sentence; and the next line's first word would not have fitted on the line before, or
    (where words were changed after breaking) lines go on in lower case while paragraphs begin in upper case. Where a
    line is a paragraph none of it is so: lengths differ widely, and lines begin and end as sentences do.

    Args:
        text: the start of it; blank lines separate its paragraphs.
    """
    blocks = [[line.strip() for line in block.split("\n")] for block in _BLANK_LINE.split(text[:SAMPLE_CHARACTERS])]
    pairs = [(line, after) for block in blocks for line, after in pairwise(block) if line and after]
    if len(pairs) < LEAST_PAIRS:
        return False
    width = sorted(len(line) for line, _ in pairs)[-1 - len(pairs) // 20]  # a long address or table may stick out
    ended = _share(_SENTENCE_END.search(line) is not None for line, _ in pairs)
    if width not in WIDTHS or ended > 0.5:
        return False
    full = _share(len(line) + len(_first_word(after)) >= width for line, after in pairs)
    begun = _share(block[0][0].isupper() for block in blocks if block[0])
    continued = _share(after[0].islower() for _, after in pairs)
    return full >= 0.75 or (begun >= 0.5 and continued >= 0.6)


def _share(answers: Iterable[bool]) -> float:
    given = list(answers)
    return sum(given) / max(1, len(given))


def joined(text: str) -> str:
    """Returns a text with one line for each paragraph, where it has blank lines between them."""
    return "\n".join(map(_joined, _BLANK_LINE.split(text)))


def _joined(paragraph: str) -> str:
    lines = [line.strip() for line in paragraph.split("\n")]
    lines = [line for line in lines if line]
    return "".join(line + _between(line, after) for line, after in pairwise(lines)) + "".join(lines[-1:])


def _between(line: str, after: str) -> str:
    """Returns what stood between two lines before the break: nothing after a hyphen or in scripts without blanks."""
    hyphen = line.endswith("-") and line[-2:-1].strip()
    return "" if hyphen or (_UNSPACED.match(line[-1]) and _UNSPACED.match(after[0])) else " "


def _first_word(line: str) -> str:
    return line[0] if _UNSPACED.match(line[0]) else line.split(maxsplit=1)[0]
