"""`xdscale shards build | merge | verify | info`. Heavy imports stand inside the commands: `--help` must be quick."""

import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xdscale.names import UserPath

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from xdscale.shards.manifest import TableManifest
    from xdscale.shards.workplace import Part

shards_app = typer.Typer(help="Build, check and describe tables in tar shards.", no_args_is_help=True)

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
    validation_fraction: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of documents held out; in plain text blank lines part documents."),
    ] = 0.01,
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the text alone in the folder.")] = False,
) -> None:
    """Turns text into shards; a build that was stopped goes on when started again."""
    from xdscale.shards.sources.text import TextOptions, build_shards
    from xdscale.shards.workplace import Part

    options = TextOptions(
        language_tokenizer=language_tokenizer,
        sequence_length=sequence_length,
        clip_blocks=clip_blocks,
        validation_fraction=validation_fraction,
        min_words=min_words,
        format=format,
        text_field=text_field,
        encoding=encoding,
        bad_bytes=bad_bytes,
        line_breaks=line_breaks,
    )
    build = partial(build_shards, inputs, options=options)
    build_and_report(build, out, "building", workers, Part.parse(part), overwrite, language_tokenizer)


def build_and_report(
    build: "Callable[..., TableManifest]",
    out: "Path",
    what: str,
    workers: int,
    part: "Part",
    overwrite: bool,
    language_tokenizer: str | None = None,
) -> None:
    """Builds a table with progress on stderr, and prints what came of it.

    Args:
        build: `build_table` with its source, which takes the rest.
        out: folder of the dataset.
        what: is being done, for the progress.
        workers: processes.
        part: of the build.
        overwrite: replace the table that is there.
        language_tokenizer: that gave the table's word pieces; None where it has none.

    Raises:
        XdscaleError: as `build_table`.
    """
    from xdscale.files import count_of
    from xdscale.shards.build import Progress
    from xdscale.shards.progress import shown_progress
    from xdscale.shards.sources.text_report import summary, warnings

    started = time.monotonic()
    last: list[Progress] = []
    with shown_progress(what) as advance:

        def on_progress(progress: Progress) -> None:
            last[:] = [progress]
            advance(progress.bytes_read, progress.bytes_total, progress.counts.get("documents"))

        table = build(out=out, workers=workers, part=part, overwrite=overwrite, on_progress=on_progress)
    kept = last[-1].kept_shards if last else 0
    lines = [f"{out}: {count_of(len(table.shards), 'shard')} ({kept} kept from an earlier run)", *summary(table)]
    typer.echo("\n".join([*lines, f"seconds: {time.monotonic() - started:.1f}"]))
    if part.of == 1:
        unknown = [] if language_tokenizer is None else _unknown_words(out, table, language_tokenizer)
        _warn([*warnings(table), *unknown])
    else:
        typer.echo(f"part {part.index}/{part.of} is finished; when all are: xdscale shards merge {out}")


@shards_app.command()
def captions(
    inputs: Annotated[list[UserPath], typer.Argument(help="COCO's captions_*.json, or files of that form.")],
    out: Annotated[UserPath, typer.Option(help="Folder of the dataset, which holds the table of image regions.")],
    language_tokenizer: Annotated[
        str, typer.Option(help="tokenizer.json or vocab.txt, folder, package:NAME/folder or hub name.")
    ],
    karpathy: Annotated[UserPath | None, typer.Option(help="dataset_coco.json: its splits, without test.")] = None,
    held_out: Annotated[UserPath | None, typer.Option(help="File of image ids to hold out, one a line.")] = None,
    validation: Annotated[list[UserPath] | None, typer.Option(help="More files of captions, all held out.")] = None,
    validation_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Without the three: share of images held out.")
    ] = 0.01,
    missing: Annotated[str, typer.Option(help="refuse images without regions, or leave-out.")] = "refuse",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the captions in the folder.")] = False,
) -> None:
    """Turns captions into a table whose rows are linked to the regions of their images."""
    from xdscale.errors import XdscaleError
    from xdscale.shards.build import build_table
    from xdscale.shards.progress import shown_progress
    from xdscale.shards.sources.caption_build import CaptionOptions
    from xdscale.shards.sources.captions import CaptionSource
    from xdscale.shards.sources.text_report import description

    ways = {
        "karpathy": [karpathy] if karpathy else [],
        "list": [held_out] if held_out else [],
        "files": validation or [],
    }
    given = [way for way, files in ways.items() if files]
    if len(given) > 1:
        raise XdscaleError("--karpathy, --held-out and --validation each say what is held out: give one of them")
    if missing not in ("refuse", "leave-out"):
        raise XdscaleError(f"--missing {missing!r}: expected refuse or leave-out")
    split, fraction = (given[0], {}) if given else ("hash", {"validation_fraction": validation_fraction})
    options = CaptionOptions(split=split, missing=missing, **fraction)
    source = CaptionSource(inputs, out, language_tokenizer, options, ways.get(split, []))
    with shown_progress("building") as advance:
        table = build_table(
            source,
            out,
            workers=workers,
            overwrite=overwrite,
            on_progress=lambda progress: advance(progress.bytes_read, progress.bytes_total),
        )
    rows = {name: found.rows for name, found in table.splits.items()}
    told = ", ".join(f"{name} {count:,}" for name, count in rows.items())
    typer.echo("\n".join([f"{out}: captions: {told}", *description(table)]))
    ways = "--validation-fraction, --validation, --held-out or --karpathy"
    notes = [f"the split {name} is empty; say with {ways} what is held out" for name, kept in rows.items() if not kept]
    _warn([*notes, *_unknown_words(out, table, language_tokenizer)])


@shards_app.command()
def merge(folder: Annotated[UserPath, typer.Argument(help="Folder that holds all parts.")]) -> None:
    """Joins the parts that 'build --part i/n' made to one dataset, after verifying their shards."""
    from xdscale.errors import XdscaleError
    from xdscale.files import count_of
    from xdscale.shards.build import merge_parts
    from xdscale.shards.manifest import Manifest
    from xdscale.shards.progress import shown_progress
    from xdscale.shards.sources.text_report import left_out, warnings

    with shown_progress("verifying") as advance:
        table = merge_parts(folder, on_progress=advance)
    dataset = Manifest.load(folder)
    told = f"{folder}: one dataset of {count_of(len(dataset.shards), 'shard')}"
    if len(dataset.tables) > 1:
        told += ": " + ", ".join(f"{name} {len(one.shards):,}" for name, one in dataset.tables.items())
    typer.echo("\n".join([told, *left_out(table)]))
    made_with: Any = table.build.get("language_tokenizer")
    unknown = []
    if made_with is not None:
        with suppress(XdscaleError):  # the parts may have been made where it was, and is not any more
            unknown = _unknown_words(folder, table, made_with["name"])
    _warn([*warnings(table), *unknown])


@shards_app.command()
def verify(folder: Folder) -> None:
    """Compares every shard's size and SHA-256 with the manifest."""
    from xdscale.files import count_of
    from xdscale.shards.manifest import Manifest
    from xdscale.shards.progress import shown_progress
    from xdscale.shards.verify import verify_shards

    with shown_progress("verifying") as advance:
        verify_shards(folder, on_progress=advance)
    shards = Manifest.load(folder).shards
    stored = sum(shard.bytes for shard in shards)
    typer.echo(f"{folder}: {count_of(len(shards), 'shard')}, {stored:,} bytes, all as built")


@shards_app.command()
def info(folder: Folder) -> None:
    """Shows what each table of a dataset holds; of packed text, also how long its texts are for CLIP."""
    from rich.console import Console

    from xdscale.errors import XdscaleError
    from xdscale.files import one_line
    from xdscale.shards.manifest import MANIFEST_NAME, Manifest
    from xdscale.shards.sources.text_report import description

    manifest = Manifest.load(folder)
    # Not wider than its content and without colour when piped, so that scripts can read it.
    console = Console(markup=False, highlight=False, width=None if Console().is_terminal else 200)
    for name, table in manifest.tables.items():
        try:
            title, *more = description(table)
        except (KeyError, TypeError, ValueError) as error:  # what the source wrote is not there, or of another kind
            raise XdscaleError(
                f"{folder / MANIFEST_NAME}: tables.{name}: build or counts are not as its source writes them: "
                f"{one_line(error)}; build the shards again with 'xdscale shards build'"
            ) from None
        console.print(f"{folder}: {title}" if len(manifest.tables) == 1 else f"{folder}: {name}: {title}")
        console.print(_splits(table))
        console.print(_columns(table))
        for item in more:
            console.print(item)


def _unknown_words(out: "Path", table: "TableManifest", language_tokenizer: str) -> list[str]:
    """Returns a line where much of what was packed from texts or captions is unknown to their tokenizer.

    The table names a tokenizer too, but one that was made elsewhere, or before, by a name that may lead nowhere here.
    """
    import numpy as np

    from xdscale.shards.language import load_language_tokenizer, notes_on_unknown
    from xdscale.shards.sources.text_build import TEXT
    from xdscale.shards.table import open_table

    if not table.splits["train"].rows:
        return []
    name: Any = table.build["source"]
    beginning = open_table(out, "train", name)
    rows = np.arange(min(len(beginning), 1000))
    ids = beginning.read("language", rows) if name == TEXT else beginning.read_ragged("words", rows).values
    tokenizer, _ = load_language_tokenizer(language_tokenizer)
    return notes_on_unknown(f"{out}: {name}", ids.ravel(), tokenizer)


def _warn(lines: list[str]) -> None:
    for line in lines:
        typer.echo(f"warning: {line}", err=True)


def _splits(table: "TableManifest") -> Any:
    from rich.table import Table

    groups = list(dict.fromkeys(column.offsets for column in table.columns if column.offsets))
    shown = Table("split")
    for heading in ("shards", "rows", *(f"elements, {group}" for group in groups), "bytes", "bytes/payload"):
        shown.add_column(heading, justify="right")
    for name, split in table.splits.items():
        stored, payload = sum(shard.bytes for shard in split.shards), table.payload_bytes(name)
        numbers = (len(split.shards), split.rows, *(split.elements[group] for group in groups), stored)
        shown.add_row(name, *(f"{number:,}" for number in numbers), f"{stored / payload:.3f}" if payload else "-")
    return shown


def _columns(table: "TableManifest") -> Any:
    from rich.table import Table

    shown = Table("column", "type of an element", "elements per row", "rows of")
    for column in table.columns:
        size = "×".join(map(str, column.shape))
        many = f"{column.fewest}-{column.most or 'any'}" if column.offsets else "1"
        kind = f"{column.dtype} [{size}]" if size else column.dtype
        shown.add_row(column.name, kind, many, column.rows_of or "")
    return shown
