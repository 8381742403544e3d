"""Text corpora as a source: documents, cut into units, whose paragraphs are packed into rows of equal length."""

import codecs
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tokenizers import Tokenizer

from xdscale.errors import XdscaleError
from xdscale.files import count_of
from xdscale.shards.build import WHOLE, Part, Progress, Write, build_table
from xdscale.shards.clip_bpe import ClipBPE, describe_clip_tokenizer
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.manifest import Counts, TableManifest, add_counts
from xdscale.shards.sources.corpus import FORMATS, LINE_BREAKS, Document, sort_out, stream_documents
from xdscale.shards.sources.inputs import describe_inputs, find_inputs
from xdscale.shards.sources.pack import Packer, is_validation
from xdscale.shards.sources.recognise import recognise
from xdscale.shards.sources.text_build import TEXT, PackingOptions, TextBuild, named_problem
from xdscale.shards.sources.wrapping import count_words


class TextOptions(PackingOptions):
    """How a corpus is read and packed.

    Attributes:
        language_tokenizer: `tokenizer.json` or `vocab.txt`, folder, `package:NAME/folder` or hub name.
        bad_bytes: "refuse" bytes that are no text, or "replace" them by U+FFFD and count them. Shards finished before
            a refusal are kept.

    Raises:
        XdscaleError: a value is out of its range.
    """

    language_tokenizer: str
    bad_bytes: str = "refuse"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise XdscaleError(named_problem(error)) from None


class TextSource:
    """Makes a table of packed text of corpus files.

    Args:
        inputs: corpus files, folders and patterns (see `find_inputs`), read in this order.
        options: how.

    Raises:
        XdscaleError: a bad input, option or tokenizer.
    """

    table = TEXT
    splits = ("train", "validation")

    def __init__(self, inputs: list[Path | str], options: TextOptions) -> None:
        paths = find_inputs(inputs)
        encoding = _checked_encoding(options)
        if options.format == "auto":
            for path in paths:
                recognise(path, encoding)  # hours before it is that file's turn
        tokenizer, language = load_language_tokenizer(options.language_tokenizer)
        packing = options.model_dump(include=set(PackingOptions.model_fields)) | {"encoding": encoding}
        self._text = TextBuild(
            inputs=describe_inputs(paths),
            language_tokenizer=language,
            clip_tokenizer=describe_clip_tokenizer(),
            **packing,
        )
        self._paths, self._replace = paths, options.bad_bytes == "replace"
        self._tokenizer = tokenizer
        self.build = self._text.model_dump(mode="json")
        self.columns = self._text.columns
        self.total_bytes = sum(item.bytes for item in self._text.inputs)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what goes to other processes: they load the tokenizers for themselves."""
        return {name: value for name, value in vars(self).items() if name not in ("_tokenizer", "_clip")}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer, found = load_language_tokenizer(self._text.language_tokenizer.name)
        if found != self._text.language_tokenizer:
            raise XdscaleError(f"{found.name}: the tokenizer changed while the shards were built")
        return tokenizer

    @cached_property
    def _clip(self) -> ClipBPE:
        return ClipBPE()

    def units(self, threads: int) -> Iterator[tuple[list[Document], int]]:
        """Yields documents of at least `shard_text_bytes`, and how much of all inputs had been read after them."""
        collected: list[Document] = []
        size, bytes_read = 0, 0
        for document, bytes_read in self._documents(threads):
            collected.append(document)
            size += len(document.text.encode("utf-8"))
            if size >= self._text.shard_text_bytes:
                yield collected, bytes_read
                collected, size = [], 0
        if collected:
            yield collected, bytes_read

    def digest(self, documents: list[Document]) -> bytes:
        """Returns the hash of what goes into a unit."""
        digest = hashlib.sha256()
        for document in documents:
            text = document.text.encode("utf-8")
            digest.update(f"{document.format} {len(text)} ".encode())
            digest.update(text)
        return digest.digest()

    def rows(self, documents: list[Document], write: Write) -> Counts:
        """Packs documents.

        Returns:
            What was read, what was kept of it and what was not. `paragraphs`, `words` and `text_bytes` (UTF-8) are
            those kept. Left out are headings, and paragraphs of fewer words than `min_words`. `dropped_tokens` language
            tokens filled no sequence at the end of their unit. `joined_documents` were hard-wrapped; `bad_bytes`
            replacements stand for bytes that were no text. `document_tokens[k]` is the number of documents of 2^(k-1)
            to 2^k - 1 language tokens; the first is of those that have none.
        """
        text = self._text
        packers = {
            split: Packer(
                self._tokenizer, self._clip, sequence_length=text.sequence_length, clip_blocks=text.clip_blocks
            )
            for split in self.splits
        }
        counts: Counter[str] = Counter(documents=len(documents))
        for document in documents:
            kept, left_out = sort_out(document.text, document.format, text.min_words)
            packers["validation" if is_validation(kept, text.validation_fraction) else "train"].add(kept)
            counts.update(
                paragraphs=len(kept),
                words=sum(map(count_words, kept)),
                text_bytes=sum(len(paragraph.encode("utf-8")) for paragraph in kept),
                joined_documents=document.joined,
                bad_bytes=document.bad_bytes,
                **asdict(left_out),
            )
        tokens: list[list[int]] = []
        for split, packer in packers.items():
            packed = packer.finish()
            write(split, packed.arrays, blocks_needed=packed.blocks_needed)
            counts["dropped_tokens"] += packed.dropped_tokens
            tokens.append(packed.document_tokens)
        return counts | add_counts({"document_tokens": histogram} for histogram in tokens)

    def if_empty(self, counts: Counts) -> str:
        """Returns why there are no rows."""
        names = ", ".join(item.name for item in self._text.inputs[:3])
        if more := len(self._text.inputs[3:]):
            names += f" and {more:,} more"
        if not counts.get("documents"):
            format = self._text.format
            advice = "there is no text" if format == "auto" else f"is the format {format!r} right?"
            return f"{names}: no documents; {advice}"
        short = counts["short_paragraphs"]
        few = f"; {short} paragraphs have fewer than {self._text.min_words} words: lower --min-words" if short else ""
        documents = count_of(counts["documents"], "document")
        return (
            f"{names}: {counts['dropped_tokens']} tokens of {documents} give no sequence of "
            f"{self._text.sequence_length}{few}; use more text or a shorter --sequence-length"
        )

    def _documents(self, threads: int) -> Iterator[tuple[Document, int]]:
        """Yields the documents of all inputs with the bytes read so far."""
        text, before = self._text, 0
        for path, described in zip(self._paths, text.inputs, strict=True):
            for document in stream_documents(
                path,
                format=text.format,
                text_field=text.text_field,
                encoding=text.encoding,
                replace_bad_bytes=self._replace,
                line_breaks=text.line_breaks,
                threads=threads,
            ):
                yield document, before + document.bytes_read
            before += described.bytes


def build_shards(
    inputs: list[Path | str],
    out: Path,
    options: TextOptions,
    *,
    workers: int = 1,
    part: Part = WHOLE,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> TableManifest:
    """Builds the table of packed text of a corpus, or one part of it: `TextSource`, then `build_table`."""
    source = TextSource(inputs, options)
    return build_table(source, out, workers=workers, part=part, overwrite=overwrite, on_progress=on_progress)


def _checked_encoding(options: TextOptions) -> str:
    """Returns the encoding's usual name, or names the option that cannot be."""
    known: dict[str, Iterable[str]] = {
        "format": ("auto", *FORMATS),
        "bad_bytes": ("refuse", "replace"),
        "line_breaks": LINE_BREAKS,
    }
    for name, values in known.items():
        if getattr(options, name) not in values:
            raise XdscaleError(f"{name} = {getattr(options, name)!r}: expected {', '.join(values)}")
    encoding = options.encoding
    try:
        "a".encode(encoding).decode(encoding)  # codecs that are no encodings of text, such as hex, refuse
        codecs.getincrementaldecoder(encoding)
        name = codecs.lookup(encoding).name
        if name in ("idna", "punycode"):  # of names of hosts
            raise LookupError
        return name
    except (LookupError, UnicodeError):
        raise XdscaleError(
            f"encoding = {encoding!r}: no encoding that Python knows; for example utf-8, cp1252, utf-16, gb18030"
        ) from None
