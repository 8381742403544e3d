"""The texts of JSON files: JSON Lines, objects one after another on any lines, arrays of objects or strings.

One value after another is taken off a buffer, so that memory stays constant whatever the layout.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.shards.sources.decoding import BadBytes

LARGEST_VALUE_CHARACTERS = 64 << 20

# Numbers are never text. As floats they may have any number of digits, where int() refuses thousands.
_DECODER = json.JSONDecoder(parse_int=float)
_BLANK = re.compile("[ \t\r\n\ufeff]*")  # joined files bring their byte order marks along
_NAMES = {
    dict: "an object",
    list: "a list",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    str: "a string",
}
_CUT = 16
"""An error so near the end of what was read may be due to its being cut there."""


def json_texts(path: Path, pieces: Iterator[str], text_field: str, bad: BadBytes) -> Iterator[str]:
    """Yields the text field of each object, or each string, in order.

    Args:
        path: the file, for messages.
        pieces: its characters.
        text_field: the field that holds the text.
        bad: what happens to halves of surrogate pairs.

    Raises:
        XdscaleError: not JSON, a value of another kind or without this field, or one that is too long; with its line.
    """
    for line, value in _values(path, pieces):
        text = value if isinstance(value, str) else _field(f"{path}:{line}", path, value, text_field)
        yield bad.without_surrogates(text, f"{path}:{line}: {text_field!r}")


def _field(where: str, path: Path, value: Any, text_field: str) -> str:
    if not isinstance(value, dict):
        raise XdscaleError(f"{where}: expected an object with a field {text_field!r}, found {_NAMES[type(value)]}")
    if text_field not in value:
        message = f"{where}: no field {text_field!r} (found: {', '.join(value)}); name the right one with --text-field"
        if lists := [key for key, item in value.items() if isinstance(item, list)]:
            message += (
                f"; if the documents are in a list, take it out first: jq -c '.{lists[0]}[]' {path.name} > a.jsonl"
            )
        raise XdscaleError(message)
    text = value[text_field]
    if not isinstance(text, str):
        message = f"{where}: {text_field!r} is {_NAMES[type(text)]}, expected a string"
        if isinstance(text, list):
            message += f"; join it first: jq -c '.{text_field} |= join(\"\\n\")' {path.name} > a.jsonl"
        elif text is None:
            message += f"; leave such objects out first: jq -c 'select(.{text_field} != null)' {path.name} > a.jsonl"
        raise XdscaleError(message)
    return text


def _values(path: Path, pieces: Iterator[str]) -> Iterator[tuple[int, Any]]:
    """Yields (line, value) for each value at the top, or for each element if the file begins with an array."""
    reader = _Reader(path, pieces)
    arrays = reader.peek() == "["
    while mark := reader.peek():
        if not arrays:
            yield reader.line, reader.value()
            continue
        if mark != "[":
            raise reader.refusal(f"expected the end of the file or another array after ']', found {mark!r}")
        reader.step()
        mark = "]" if reader.peek() == "]" else ","
        while mark == ",":
            yield reader.line, reader.value()
            mark = reader.peek()
            if mark not in (",", "]"):
                raise reader.refusal(
                    f"expected ',' or ']' after an element, found {mark!r}" if mark else "it breaks off"
                )
            if mark == ",":
                reader.step()
                reader.peek()
        reader.step()


class _Reader:
    """Takes JSON values off a file's characters; `line` is where the next one begins."""

    def __init__(self, path: Path, pieces: Iterator[str]) -> None:
        self.line = 1
        self._path = path
        self._pieces = pieces
        self._text = ""
        self._at = 0

    def refusal(self, reason: str) -> XdscaleError:
        return XdscaleError(f"{self._path}:{self.line}: not valid JSON: {reason}")

    def peek(self) -> str:
        """Passes blanks and returns the next character; at the end of the file, nothing."""
        while True:
            self._move(_BLANK.match(self._text, self._at).end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def step(self) -> None:
        """Passes one character."""
        self._move(self._at + 1)

    def value(self) -> Any:
        """Passes the value that begins here, and returns it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self.refusal(str(error)) from None
            except json.JSONDecodeError as error:
                certain = not error.msg.startswith("Unterminated") and error.pos < len(self._text) - _CUT
                if certain or not self._read():
                    self._move(max(self._at, len(self._text[: error.pos].rstrip())))
                    found = self._text[error.pos : error.pos + 20]
                    raise self.refusal(f"{error.msg}: {found!r}" if found else "it breaks off") from None
                continue
            # A number that ends where the read text does may go on.
            if end < len(self._text) or not isinstance(value, float) or not self._read():
                self._move(end)
                return value

    def _move(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _read(self) -> bool:
        """Reads at least as much as is there, so that a long value is not tried again and again."""
        parts = [self._text[self._at :]]
        size = len(parts[0])
        if size > LARGEST_VALUE_CHARACTERS:
            raise XdscaleError(
                f"{self._path}:{self.line}: a value of over {LARGEST_VALUE_CHARACTERS} characters; if the documents "
                "are in a list inside one object, take it out first, for example: "
                f"jq -c '.data[]' {self._path.name} > a.jsonl"
            )
        wanted = 2 * size
        while size <= wanted and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            size += len(piece)
        if len(parts) == 1:
            return False
        self._text, self._at = "".join(parts), 0
        return True
