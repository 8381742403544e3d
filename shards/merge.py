"""Joining unit records to a manifest: of a build on one machine, or of the parts of several."""

from collections.abc import Callable
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.shards.manifest import MANIFEST_NAME, Build, Corpus, Manifest, Split, add_counts
from xdscale.shards.pack import text_columns
from xdscale.shards.part import PartManifest, read_part_files, require_all_parts
from xdscale.shards.unit import SPLITS, WORK_FOLDER, UnitRecord, UnitSplit
from xdscale.shards.verify import shard_problem, verify_shards
from xdscale.shards.workplace import LOCK_NAME, locked, publish, tidy


def merge_parts(out: Path, *, on_progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Makes a dataset of the parts in `out`: the same bytes as if one machine had built it.

    Shards are verified first. Killed at any point, it can be called again.

    Args:
        out: the folder in which all parts were built, or into which they were copied.
        on_progress: called after each shard with (bytes verified, bytes of all).

    Raises:
        XdscaleError: parts are missing, of different builds or being built, shards are damaged (named with their
            part), there is no sequence in all parts, or the folder cannot be written.
    """
    out = Path(out)
    try:
        if (out / MANIFEST_NAME).exists():
            verify_shards(out, on_progress=on_progress)
            tidy(out)
            return Manifest.load(out)
        parts = read_part_files(out)
        require_all_parts(out, parts)
        (out / WORK_FOLDER).mkdir(exist_ok=True)  # copied parts may come without it
        with locked(out / WORK_FOLDER / LOCK_NAME):
            _verify(out, parts, on_progress or (lambda done, total: None))
            units = sorted((numbered for part in parts for numbered in part.numbered()), key=lambda unit: unit[0])
            records = [record for _, record in units]
            require_sequences(parts[0].build, records)
            manifest = assemble(parts[0].build, records)
            publish(out, manifest)
    except OSError as error:
        raise XdscaleError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from None
    return manifest


def _verify(out: Path, parts: list[PartManifest], report: Callable[[int, int], None]) -> None:
    shards = [(part, split.shard) for part in parts for record in part.records for split in record.splits.values()]
    done, total = 0, sum(shard.bytes for _, shard in shards)
    names = {shard.sha256: shard.file for _, shard in shards}
    problems: list[str] = []
    damaged: list[str] = []
    for part, shard in shards:
        problem = shard_problem(out / shard.file, shard, names)
        if problem is not None:
            problems.append(problem)
            damaged.append(f"{part.index}/{part.of}")
        done += shard.bytes
        report(done, total)
    if problems:
        again = ", ".join(dict.fromkeys(damaged))
        raise XdscaleError("\n".join([f"{out}: damaged shards; build or copy again the parts {again}", *problems]))


def require_sequences(build: Build, records: list[UnitRecord]) -> None:
    """Checks that a dataset holds anything.

    Raises:
        XdscaleError: no documents, or too little text for one sequence.
    """
    names = ", ".join(item.name for item in build.inputs[:3])
    if more := len(build.inputs[3:]):
        names += f" and {more:,} more"
    corpus = Corpus.total(record.corpus for record in records)
    if not corpus.documents:
        advice = "there is no text" if build.format == "auto" else f"is the format {build.format!r} right?"
        raise XdscaleError(f"{names}: no documents; {advice}")
    if not any(record.splits for record in records):
        short = f"; {corpus.short_paragraphs} paragraphs have fewer than {build.min_words} words: lower --min-words"
        raise XdscaleError(
            f"{names}: {corpus.documents} documents give {corpus.dropped_tokens} tokens and no sequence of "
            f"{build.sequence_length}{short if corpus.short_paragraphs else ''}; use more text or a shorter "
            "--sequence-length"
        )


def assemble(build: Build, records: list[UnitRecord]) -> Manifest:
    """Returns the manifest of a dataset made of these units, in their order."""
    return Manifest(
        columns=text_columns(build.sequence_length, build.clip_blocks),
        build=build,
        corpus=Corpus.total(record.corpus for record in records),
        splits={name: _join([record.splits[name] for record in records if name in record.splits]) for name in SPLITS},
    )


def _join(parts: list[UnitSplit]) -> Split:
    return Split(
        samples=sum(part.shard.samples for part in parts),
        language_tokens=sum(part.language_tokens for part in parts),
        clip_tokens=sum(part.clip_tokens for part in parts),
        blocks_needed=add_counts(part.blocks_needed for part in parts),
        shards=[part.shard for part in parts],
    )
