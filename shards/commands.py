"""`xdscale shards build | merge | verify | info`. Heavy imports stand inside the commands: `--help` must be quick."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xdscale.names import UserPath

if TYPE_CHECKING:
    from xdscale.shards.manifest import Manifest, Split

shards_app = typer.Typer(help="Build, check and describe tar shards of packed text.", no_args_is_help=True)

Folder = Annotated[UserPath, typer.Argument(help="Folder written by 'xdscale shards build'.")]


@shards_app.command()
def build(
    inputs: Annotated[
        list[str], typer.Argument(help="Corpus files, folders, quoted patterns, or package:NAME/inner/path.")
    ],
    out: Annotated[UserPath, typer.Option(help="Folder for the shards.")],
    language_tokenizer: Annotated[
        str, typer.Option(help="tokenizer.json or vocab.txt, folder, package:NAME/folder or hub name.")
    ],
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sequence, less [CLS] and [SEP].")] = 510,
    clip_blocks: Annotated[int, typer.Option(min=1, help="CLIP blocks of 75 tokens per sequence, at most.")] = 9,
    validation_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share of documents held out.")] = 0.01,
    min_words: Annotated[int, typer.Option(min=0, help="Leave out paragraphs with fewer words.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    format: Annotated[
        str, typer.Option(help="auto, text, wikitext, wikiextractor, jsonl, mediawiki, mediawiki-prefix or parquet.")
    ] = "auto",
    text_field: Annotated[str, typer.Option(help="JSON field or parquet column of the text.")] = "text",
    encoding: Annotated[str, typer.Option(help="Of text and JSON; a byte order mark decides before it.")] = "utf-8",
    bad_bytes: Annotated[
        str, typer.Option(help="refuse bytes that are no text, or replace them by U+FFFD and count them.")
    ] = "refuse",
    line_breaks: Annotated[
        str, typer.Option(help="join or keep the lines of a paragraph; auto: join in hard-wrapped text.")
    ] = "auto",
    part: Annotated[str, typer.Option(help="i/n: build part i (from 0) of n, then 'xdscale shards merge'.")] = "0/1",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
) -> None:
    """Turns text into shards; a build that was stopped goes on when started again."""
    from xdscale.shards.build import Progress, build_shards
    from xdscale.shards.part import Part
    from xdscale.shards.progress import shown_progress

    started = time.monotonic()
    last: list[Progress] = []
    with shown_progress("building") as advance:

        def on_progress(progress: Progress) -> None:
            last[:] = [progress]
            advance(progress.bytes_read, progress.bytes_total, progress.documents)

        manifest = build_shards(
            inputs,
            out,
            language_tokenizer=language_tokenizer,
            sequence_length=sequence_length,
            clip_blocks=clip_blocks,
            validation_fraction=validation_fraction,
            min_words=min_words,
            workers=workers,
            format=format,
            text_field=text_field,
            encoding=encoding,
            bad_bytes=bad_bytes,
            line_breaks=line_breaks,
            part=Part.parse(part),
            overwrite=overwrite,
            on_progress=on_progress,
        )
    kept = last[-1].kept_shards if last else 0
    typer.echo(_summary(out, manifest, time.monotonic() - started, kept))
    if Part.parse(part).of == 1:
        _warn_of_empty_splits(manifest)
    else:
        typer.echo(f"part {part} is finished; when all are: xdscale shards merge {out}")


@shards_app.command()
def merge(folder: Annotated[UserPath, typer.Argument(help="Folder that holds all parts.")]) -> None:
    """Joins the parts that 'build --part i/n' made to one dataset, after verifying their shards."""
    from xdscale.shards.merge import merge_parts
    from xdscale.shards.progress import shown_progress

    with shown_progress("verifying") as advance:
        manifest = merge_parts(folder, on_progress=advance)
    shards = sum(len(split.shards) for split in manifest.splits.values())
    typer.echo("\n".join([f"{folder}: one dataset of {shards} shards", *_left_out(manifest)]))
    _warn_of_empty_splits(manifest)


@shards_app.command()
def verify(folder: Folder) -> None:
    """Compares every shard's size and SHA-256 with the manifest."""
    from xdscale.shards.manifest import Manifest
    from xdscale.shards.progress import shown_progress
    from xdscale.shards.verify import verify_shards

    with shown_progress("verifying") as advance:
        verify_shards(folder, on_progress=advance)
    shards = [shard for split in Manifest.load(folder).splits.values() for shard in split.shards]
    typer.echo(f"{folder}: {len(shards)} shards, {sum(shard.bytes for shard in shards):,} bytes, all as built")


@shards_app.command()
def info(folder: Folder) -> None:
    """Shows what a dataset holds, and how long its texts are for CLIP."""
    from rich.console import Console

    from xdscale.shards.manifest import Manifest

    manifest = Manifest.load(folder)
    # Not wider than its content and without colour when piped, so that scripts can read it.
    console = Console(markup=False, highlight=False, width=None if Console().is_terminal else 200)
    built = manifest.build
    console.print(
        f"{folder}: sequences of {built.sequence_length} language tokens ({built.language_tokenizer.name}), "
        f"up to {built.clip_blocks} CLIP blocks; {manifest.corpus.documents:,} documents, "
        f"{manifest.corpus.paragraphs:,} paragraphs, {manifest.corpus.text_bytes:,} bytes of text"
    )
    console.print(_splits_table(manifest))
    console.print(_lengths_table(manifest))
    console.print(_documents_table(manifest))


def _summary(out: Path, manifest: "Manifest", seconds: float, kept: int) -> str:
    splits = manifest.splits.values()
    shards = sum(len(split.shards) for split in splits)
    stored = sum(shard.bytes for split in splits for shard in split.shards)
    payload = sum(_payload_bytes(split) for split in splits)
    counts = ", ".join(f"{name} {split.samples:,}" for name, split in manifest.splits.items())
    lines = [
        f"{out}: {shards} shards ({kept} kept from an earlier run)",
        f"sequences: {counts}",
        f"tokens: language {sum(split.language_tokens for split in splits):,}, "
        f"CLIP {sum(split.clip_tokens for split in splits):,}, dropped {manifest.corpus.dropped_tokens:,}",
        *_left_out(manifest),
        f"bytes: {stored:,}" + (f", {stored / payload:.3f} per payload byte" if payload else ""),
        f"seconds: {seconds:.1f}",
    ]
    return "\n".join(lines)


def _left_out(manifest: "Manifest") -> list[str]:
    """Returns what was read and is not in the shards, a line for each reason: counts, and the share of all words."""
    corpus, build = manifest.corpus, manifest.build
    words = corpus.words + corpus.heading_words + corpus.short_words
    ids = corpus.dropped_tokens + sum(split.language_tokens for split in manifest.splits.values())
    lines = [f"kept: {corpus.paragraphs:,} paragraphs of {corpus.words:,} words ({_percent(corpus.words, words)})"]
    for count, of, what in (
        (
            corpus.short_paragraphs,
            corpus.short_words,
            f"paragraphs of fewer than {build.min_words} words (--min-words)",
        ),
        (corpus.headings, corpus.heading_words, "headings"),
    ):
        if count:
            lines.append(f"left out: {count:,} {what}: {of:,} words ({_percent(of, words)})")
    if corpus.dropped_tokens:
        share = _percent(corpus.dropped_tokens, ids)
        lines.append(f"left out: {corpus.dropped_tokens:,} language ids that fill no sequence at unit ends ({share})")
    if corpus.joined_documents:
        lines.append(
            f"hard-wrapped: the lines of {corpus.joined_documents:,} documents were joined (--line-breaks keep)"
        )
    if empty := [item.name for item in build.inputs if not item.bytes]:
        more = f" and {len(empty) - 3:,} more" if len(empty) > 3 else ""
        lines.append(f"empty: {', '.join(empty[:3])}{more}: 0 bytes; look whether a download failed")
    if corpus.bad_bytes:
        lines.append(f"bad bytes: {corpus.bad_bytes:,} were replaced by U+FFFD")
    return lines


def _percent(count: int, of: int) -> str:
    return f"{count / of:.1%}" if of else "0.0%"


def _warn_of_empty_splits(manifest: "Manifest") -> None:
    build = manifest.build
    for name, share in (("train", 1 - build.validation_fraction), ("validation", build.validation_fraction)):
        if share and not manifest.splits[name].samples:
            typer.echo(
                f"warning: the split {name} is empty: {share:.4g} of {manifest.corpus.documents:,} documents give no "
                f"sequence of {build.sequence_length} tokens; change --validation-fraction "
                f"({build.validation_fraction:g}), or use more text or a shorter --sequence-length",
                err=True,
            )


def _payload_bytes(split: "Split") -> int:
    """Returns the bytes of the ids alone, 2 each: what a file without headers or offsets would need."""
    return 2 * (split.language_tokens + split.clip_tokens)


def _splits_table(manifest: "Manifest") -> Any:
    from rich.table import Table

    table = Table("split")
    for column in ("shards", "samples", "language tokens", "CLIP tokens", "bytes", "bytes/payload"):
        table.add_column(column, justify="right")
    for name, split in manifest.splits.items():
        stored = sum(shard.bytes for shard in split.shards)
        payload = _payload_bytes(split)
        numbers = (len(split.shards), split.samples, split.language_tokens, split.clip_tokens, stored)
        ratio = f"{stored / payload:.3f}" if payload else "-"
        table.add_row(name, *(f"{number:,}" for number in numbers), ratio)
    return table


def _lengths_table(manifest: "Manifest") -> Any:
    """CLIP blocks that whole texts need, as shares; those above `clip_blocks` were cut."""
    from rich.table import Table

    limit = manifest.build.clip_blocks
    splits = manifest.splits.values()
    table = Table("CLIP blocks needed", *manifest.splits)
    longest = max((len(split.blocks_needed) for split in splits), default=0)
    for blocks in range(1, longest + 1):
        counts = [split.blocks_needed[blocks - 1 : blocks] for split in splits]
        if any(map(any, counts)):
            table.add_row(f"{blocks}", *map(_share, splits, counts))
    table.add_row(f"over {limit}, cut", *(_share(split, split.blocks_needed[limit:]) for split in splits))
    return table


def _documents_table(manifest: "Manifest") -> Any:
    """Documents by their number of language tokens, in powers of two."""
    from rich.table import Table

    table = Table("tokens per document", "documents")
    table.columns[1].justify = "right"
    for power, count in enumerate(manifest.corpus.document_tokens):
        if count:
            table.add_row(f"{1 << power - 1:,} to {(1 << power) - 1:,}" if power else "none", f"{count:,}")
    return table


def _share(split: "Split", counts: list[int]) -> str:
    return f"{sum(counts) / split.samples:.2%}" if split.samples else "-"
