"""Building a dataset: plan, units, manifest. Restartable at any point, the same bytes for any number of workers."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tokenizers import Tokenizer

from xdscale.errors import XdscaleError
from xdscale.shards.clip_bpe import describe_clip_tokenizer
from xdscale.shards.corpus import FORMATS, Document, stream_documents
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.manifest import Build, Corpus, InputFile, Manifest, Split
from xdscale.shards.unit import SPLITS, UnitRecord, UnitSplit, group_units
from xdscale.shards.verify import file_sha256
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
    inputs: list[Path],
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
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Builds the shards of a corpus in `out` and returns their manifest.

    A build that was stopped at any point goes on when it is called again with the same inputs and options. If
    `out` already holds the finished dataset, it is verified and returned.

    Args:
        inputs: corpus files, read in this order.
        out: folder for the shards; made if it does not exist.
        language_tokenizer: `tokenizer.json`, folder, `package:NAME/folder` or hub name.
        sequence_length: language tokens per sequence, without [CLS] and [SEP].
        clip_blocks: CLIP blocks of 75 tokens at most per sequence; the rest of its text is cut on CLIP's side.
        validation_fraction: share of documents held out, chosen by a hash of their text.
        min_words: paragraphs with fewer words are left out.
        workers: processes; a script that asks for more than 1 needs the `if __name__ == "__main__":` guard.
        shard_text_bytes: corpus text per shard, at least.
        format: one of `corpus.FORMATS`, or "auto".
        text_field: field of the text in JSON Lines.
        overwrite: replace what another build left in `out`.
        on_progress: called after each unit.

    Raises:
        XdscaleError: a bad input, option or tokenizer, another dataset in `out`, nothing to build from, or the
            disk is full. Finished shards are kept.
    """
    inputs, out = [Path(path) for path in inputs], Path(out)
    tokenizer, language = load_language_tokenizer(language_tokenizer)
    build = _checked(
        inputs=_describe_inputs(inputs),
        format=format,
        text_field=text_field,
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
    report = on_progress or (lambda progress: None)
    found = None if overwrite else existing_dataset(out, build)
    if found is not None:
        report(_finished(found))
        return found
    try:
        with workplace(out, build, overwrite=overwrite):
            manifest = _run(inputs, out, build, tokenizer, workers, report)
            publish(out, manifest)
    except OSError as error:
        reason = error.strerror or error
        raise XdscaleError(f"{error.filename or out}: cannot be written: {reason}") from None
    return manifest


def _checked(**values: Any) -> Build:
    """Returns the plan, or names the option that cannot be."""
    try:
        build = Build(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise XdscaleError(f"{first['loc'][0]} = {first['input']!r}: {first['msg']}") from None
    if build.format not in ("auto", *FORMATS):
        raise XdscaleError(f"format = {build.format!r}: expected auto, {', '.join(FORMATS)}")
    return build


def _describe_inputs(inputs: list[Path]) -> list[InputFile]:
    if not inputs:
        raise XdscaleError("no input: name at least one corpus file")
    described = []
    for path in inputs:
        if path.is_dir():
            raise XdscaleError(f"{path}: is a folder; name the corpus files in it")
        try:
            size, digest = path.stat().st_size, file_sha256(path)
        except OSError as error:
            raise XdscaleError(f"{path}: cannot be read: {error.strerror or error}") from None
        described.append(InputFile(name=path.name, bytes=size, sha256=digest))
    return described


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


def _documents(inputs: list[Path], build: Build) -> Iterator[tuple[Document, int]]:
    """Yields the documents of all inputs with the bytes read so far."""
    before = 0
    for path, described in zip(inputs, build.inputs, strict=True):
        for document in stream_documents(path, format=build.format, text_field=build.text_field):
            yield document, before + document.bytes_read
        before += described.bytes


def _run(
    inputs: list[Path],
    out: Path,
    build: Build,
    tokenizer: Tokenizer,
    workers: int,
    report: Callable[[Progress], None],
) -> Manifest:
    total = sum(item.bytes for item in build.inputs)
    records: list[UnitRecord] = []
    documents, sequences, kept_shards = 0, 0, 0
    units = group_units(_documents(inputs, build), build.shard_text_bytes)
    with closing(run_units(units, out, build, tokenizer, workers)) as results:
        for unit, record, kept in results:
            records.append(record)
            documents += record.documents
            sequences += sum(split.shard.samples for split in record.splits.values())
            kept_shards += len(record.splits) if kept else 0
            report(Progress(documents, unit.bytes_read, total, sequences, kept_shards))
    names = ", ".join(path.name for path in inputs)
    if not documents:
        raise XdscaleError(f"{names}: no documents; is the format {build.format!r} right?")
    if not sequences:
        tokens = sum(record.dropped_tokens for record in records)
        raise XdscaleError(
            f"{names}: {documents} documents give {tokens} tokens and no sequence of {build.sequence_length}; "
            "use more text or a shorter --sequence-length"
        )
    return _assemble(build, records)


def _assemble(build: Build, records: list[UnitRecord]) -> Manifest:
    return Manifest(
        build=build,
        corpus=Corpus(
            documents=sum(record.documents for record in records),
            paragraphs=sum(record.paragraphs for record in records),
            text_bytes=sum(record.text_bytes for record in records),
            dropped_tokens=sum(record.dropped_tokens for record in records),
        ),
        splits={name: _join([record.splits[name] for record in records if name in record.splits]) for name in SPLITS},
    )


def _join(parts: list[UnitSplit]) -> Split:
    histograms = [part.blocks_needed for part in parts]
    return Split(
        samples=sum(part.shard.samples for part in parts),
        language_tokens=sum(part.language_tokens for part in parts),
        clip_tokens=sum(part.clip_tokens for part in parts),
        blocks_needed=[sum(counts) for counts in zip_longest(*histograms, fillvalue=0)],
        shards=[part.shard for part in parts],
    )
