"""Bytes of a corpus to characters: encodings, byte order marks, and bytes that are no text."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from xdscale.errors import XdscaleError

PIECE_BYTES = 1 << 16
REPLACEMENT = "\ufffd"

_MARKS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class BadBytes:
    """What happens to bytes that are no text in their encoding: refused, or replaced by U+FFFD and counted.

    Args:
        replace: whether to replace them.
    """

    def __init__(self, replace: bool) -> None:
        self.replace = replace
        self._count = 0

    def take(self) -> int:
        """Returns how many were replaced since the last call."""
        count, self._count = self._count, 0
        return count

    def decoded(self, data: bytes, where: str) -> str:
        """Returns the text of UTF-8 bytes.

        Raises:
            XdscaleError: some are not UTF-8, and are not to be replaced; begins with `where`.
        """
        return self.decoded_piece(codecs.getincrementaldecoder("utf-8")(), data, True, f"{where}: ", 0)

    def decoded_piece(
        self, decoder: codecs.IncrementalDecoder, data: bytes, final: bool, where: str, offset: int
    ) -> str:
        """Returns the text of the next bytes of a stream.

        Args:
            decoder: made for strict decoding; it keeps the bytes of a character that is not complete yet.
            data: the bytes.
            final: whether the stream ends with them.
            where: how an error begins.
            offset: of `data` in the stream.

        Raises:
            XdscaleError: as `decoded`.
        """
        state = decoder.getstate()
        try:
            return decoder.decode(data, final)
        except UnicodeDecodeError as error:
            if not self.replace:
                byte = offset + len(data) - len(error.object) + error.start  # the object ends where `data` does
                raise XdscaleError(
                    f"{where}byte {byte} (0x{error.object[error.start]:02x}) is not {error.encoding.upper()}; "
                    "say which encoding it is with --encoding, for example cp1252, or go on with --bad-bytes replace, "
                    "which counts them"
                ) from None
        texts = {}
        for decoder.errors in ("ignore", "replace"):
            decoder.setstate(state)
            texts[decoder.errors] = decoder.decode(data, final)
        decoder.errors = "strict"
        self._count += texts["replace"].count(REPLACEMENT) - texts["ignore"].count(REPLACEMENT)
        return texts["replace"]

    def without_surrogates(self, text: str, where: str) -> str:
        """Returns a text without halves of surrogate pairs, which JSON can spell and no encoding has.

        Raises:
            XdscaleError: it holds some, and they are not to be replaced.
        """
        if text.isascii():
            return text
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            if not self.replace:
                raise XdscaleError(
                    f"{where} holds half of a surrogate pair; mend it, or go on with --bad-bytes replace"
                ) from None
            characters = [REPLACEMENT if "\ud800" <= character <= "\udfff" else character for character in text]
            self._count += sum(new != old for new, old in zip(characters, text))
            return "".join(characters)
        return text


def encoding_of(head: bytes, encoding: str) -> str:
    """Returns the encoding that a file's byte order mark says, or else `encoding`."""
    return next((marked for mark, marked in _MARKS.items() if head.startswith(mark)), encoding)


def decoded(
    path: Path, stream: BinaryIO, encoding: str, bad: BadBytes, *, may_end_within_character: bool = False
) -> Iterator[str]:
    """Yields the characters of a stream, piece by piece; a byte order mark is dropped.

    Args:
        path: names the file in errors.
        stream: the bytes.
        encoding: theirs, unless a byte order mark says another.
        bad: what happens to bytes that are no text.
        may_end_within_character: whether the first bytes of a character at the end are left out: for a format whose
            reader says itself that the file is cut.

    Raises:
        XdscaleError: bytes that are no text in this encoding (with their offset), unless they are replaced.
    """
    data = stream.read(PIECE_BYTES)
    decoder = codecs.getincrementaldecoder(encoding_of(data, encoding))()
    offset = 0
    while data:
        following = stream.read(PIECE_BYTES)
        final = not (following or may_end_within_character)
        yield bad.decoded_piece(decoder, data, final, f"{path}: ", offset)
        offset += len(data)
        data = following
