"""Building a dataset: plan, units, manifest. Restartable at any point, the same bytes for any number of workers."""

import codecs
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tokenizers import Tokenizer

from xdscale.errors import XdscaleError
from xdscale.shards.clip_bpe import describe_clip_tokenizer
from xdscale.shards.corpus import FORMATS, LINE_BREAKS, Document, stream_documents
from xdscale.shards.inputs import describe_inputs, find_inputs
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.manifest import Build, Manifest
from xdscale.shards.merge import assemble, require_sequences
from xdscale.shards.part import WHOLE, Part, PartManifest
from xdscale.shards.recognise import recognise
from xdscale.shards.unit import Unit, UnitRecord, group_units
from xdscale.shards.workers import run_units
from xdscale.shards.workplace import existing_dataset, publish, workplace


@dataclass(frozen=True)
class Progress:
    """How far a build is; `kept_shards` were found whole from an earlier run."""

    documents: int
    bytes_read: int
    bytes_total: int
    sequences: int
    kept_shards: int


def build_shards(
    inputs: list[Path | str],
    out: Path,
    *,
    language_tokenizer: str,
    sequence_length: int = 510,
    clip_blocks: int = 9,
    validation_fraction: float = 0.01,
    min_words: int = 5,
    workers: int = 1,
    shard_text_bytes: int = 16 << 20,
    format: str = "auto",
    text_field: str = "text",
    encoding: str = "utf-8",
    bad_bytes: str = "refuse",
    line_breaks: str = "auto",
    part: Part = WHOLE,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Builds the shards of a corpus, or of one part of it, in `out` and returns their manifest.

    A build that was stopped at any point goes on when it is called again with the same inputs and options. If
    `out` already holds the finished dataset, it is verified and returned. Parts become a dataset by `merge_parts`.

    Args:
        inputs: corpus files, folders and patterns (see `find_inputs`), read in this order.
        out: folder for the shards; made if it does not exist.
        language_tokenizer: `tokenizer.json` or `vocab.txt`, folder, `package:NAME/folder` or hub name.
        sequence_length: language tokens per sequence, without [CLS] and [SEP].
        clip_blocks: CLIP blocks of 75 tokens at most per sequence; the rest of its text is cut on CLIP's side.
        validation_fraction: share of documents held out, chosen by a hash of their text.
        min_words: paragraphs with fewer words are left out.
        workers: processes; a script that asks for more than 1 needs the `if __name__ == "__main__":` guard.
        shard_text_bytes: corpus text per shard, at least.
        format: one of `corpus.FORMATS`, or "auto".
        text_field: field of the text in JSON Lines, column in parquet.
        encoding: of text and JSON; a byte order mark in a file decides before it.
        bad_bytes: "refuse" bytes that are no text, or "replace" them by U+FFFD and count them. Shards finished before
            a refusal are kept.
        line_breaks: "join" or "keep" the lines of a paragraph, or "auto" (see `stream_documents`).
        part: the part to build; all parts may build in one folder at once, on different machines too.
        overwrite: replace what another build left in `out`; not for parts, which would remove each other's shards.
        on_progress: called after each unit.

    Raises:
        XdscaleError: a bad input, option or tokenizer, another dataset in `out`, nothing to build from, or the
            disk is full. Finished shards are kept.
    """
    out = Path(out)
    paths = find_inputs(inputs)
    encoding = _checked_options(format, encoding, bad_bytes, line_breaks)
    if format == "auto":
        for path in paths:
            recognise(path, encoding)  # hours before it is that file's turn
    tokenizer, language = load_language_tokenizer(language_tokenizer)
    build = _checked(
        inputs=describe_inputs(paths),
        format=format,
        text_field=text_field,
        encoding=encoding,
        line_breaks=line_breaks,
        min_words=min_words,
        sequence_length=sequence_length,
        clip_blocks=clip_blocks,
        validation_fraction=validation_fraction,
        shard_text_bytes=shard_text_bytes,
        language_tokenizer=language,
        clip_tokenizer=describe_clip_tokenizer(),
    )
    if workers < 1:
        raise XdscaleError(f"workers = {workers}: at least 1 process is needed")
    if overwrite and part.of > 1:
        raise XdscaleError(f"{out}: --overwrite with --part would remove the other parts; remove the folder first")
    report = on_progress or (lambda progress: None)
    try:
        found = None if overwrite else existing_dataset(out, build, part)
        if found is not None:
            report(_finished(found))
            return found
        with workplace(out, build, part, overwrite=overwrite):
            return _build(_documents(paths, build, workers, bad_bytes), out, build, part, tokenizer, workers, report)
    except OSError as error:
        raise XdscaleError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from None


def _build(
    documents: Iterator[tuple[Document, int]],
    out: Path,
    build: Build,
    part: Part,
    tokenizer: Tokenizer,
    workers: int,
    report: Callable[[Progress], None],
) -> Manifest:
    units, records = _run(documents, out, build, part, tokenizer, workers, report)
    manifest = assemble(build, records)
    if part.of == 1:
        require_sequences(build, records)
        publish(out, manifest)
    else:
        PartManifest(index=part.index, of=part.of, units=units, build=build, records=records).write(out)
    return manifest


def _checked(**values: Any) -> Build:
    """Returns the plan, or names the option that cannot be."""
    try:
        build = Build(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise XdscaleError(f"{first['loc'][0]} = {first['input']!r}: {first['msg']}") from None
    return build


def _checked_options(format: str, encoding: str, bad_bytes: str, line_breaks: str) -> str:
    """Returns the encoding's usual name, or names the option that cannot be."""
    for name, value, known in (
        ("format", format, ("auto", *FORMATS)),
        ("bad_bytes", bad_bytes, ("refuse", "replace")),
        ("line_breaks", line_breaks, LINE_BREAKS),
    ):
        if value not in known:
            raise XdscaleError(f"{name} = {value!r}: expected {', '.join(known)}")
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


def _finished(manifest: Manifest) -> Progress:
    total = sum(item.bytes for item in manifest.build.inputs)
    splits = manifest.splits.values()
    return Progress(
        documents=manifest.corpus.documents,
        bytes_read=total,
        bytes_total=total,
        sequences=sum(split.samples for split in splits),
        kept_shards=sum(len(split.shards) for split in splits),
    )


def _documents(paths: list[Path], build: Build, threads: int, bad_bytes: str) -> Iterator[tuple[Document, int]]:
    """Yields the documents of all inputs with the bytes read so far."""
    before = 0
    for path, described in zip(paths, build.inputs, strict=True):
        for document in stream_documents(
            path,
            format=build.format,
            text_field=build.text_field,
            encoding=build.encoding,
            replace_bad_bytes=bad_bytes == "replace",
            line_breaks=build.line_breaks,
            threads=threads,
        ):
            yield document, before + document.bytes_read
        before += described.bytes


def _run(
    documents: Iterator[tuple[Document, int]],
    out: Path,
    build: Build,
    part: Part,
    tokenizer: Tokenizer,
    workers: int,
    report: Callable[[Progress], None],
) -> tuple[int, list[UnitRecord]]:
    """Builds the part's units; returns how many all parts have, and the records of this one's in order."""
    total = sum(item.bytes for item in build.inputs)
    records: list[UnitRecord] = []
    units, count, sequences, kept_shards = 0, 0, 0, 0

    def of_this_part() -> Iterator[Unit]:
        nonlocal units
        for unit in group_units(documents, build.shard_text_bytes):
            units += 1
            if part.has(unit.number):
                yield unit

    with closing(run_units(of_this_part(), out, build, tokenizer, workers)) as results:
        for unit, record, kept in results:
            records.append(record)
            count += record.corpus.documents
            sequences += sum(split.shard.samples for split in record.splits.values())
            kept_shards += len(record.splits) if kept else 0
            report(Progress(count, unit.bytes_read, total, sequences, kept_shards))
    return units, records
