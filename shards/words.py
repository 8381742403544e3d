"""How many words a line has, also in scripts that put no blanks between words."""

import re

# Ideographs and kana; the letters of Thai, Lao, Tibetan, Burmese and Khmer.
UNSPACED = (
    "\u0e01-\u0eff\u0f40-\u0fbc\u1000-\u103f\u1050-\u109f\u1780-\u17d3\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_UNSPACED = re.compile(f"[{UNSPACED}]")
_NO_WORD = re.compile(
    f"[{UNSPACED}\u3000-\u3004\u3008-\u303f\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)


def count_words(line: str) -> int:
    """Returns the pieces between blanks; a character of a script without blanks between words counts as a word."""
    if line.isascii() or not (unspaced := len(_UNSPACED.findall(line))):
        return len(line.split())
    return unspaced + len(_NO_WORD.sub(" ", line).split())
