"""What the commands say of a table of packed text: what was kept, what was left out, how long texts are."""

from typing import Any

from xdscale.files import count_of
from xdscale.shards.manifest import Split, TableManifest
from xdscale.shards.regions import REGIONS
from xdscale.shards.sources.regions.report import summary as summary_of_regions
from xdscale.shards.sources.text_build import TEXT, TextBuild


def summary(table: TableManifest) -> list[str]:
    """Returns what a build of packed text or of regions made, a line for each kind of figure."""
    if table.build["source"] == REGIONS:
        return summary_of_regions(table)
    stored = sum(shard.bytes for shard in table.shards)
    payload = sum(map(table.payload_bytes, table.splits))
    counts = ", ".join(f"{name} {split.rows:,}" for name, split in table.splits.items())
    length = TextBuild(**table.build).sequence_length
    language = sum(split.rows for split in table.splits.values()) * length
    clip = sum(split.elements["clip_offsets"] for split in table.splits.values())
    return [
        f"sequences: {counts}",
        f"tokens: language {language:,}, CLIP {clip:,}, dropped {table.counts.get('dropped_tokens', 0):,}",
        *left_out(table),
        f"bytes: {stored:,}" + (f", {stored / payload:.3f} per payload byte" if payload else ""),
    ]


def left_out(table: TableManifest) -> list[str]:
    """Returns what was read and is not in the shards, a line for each reason: counts, and the share of all words."""
    if table.build["source"] != TEXT or not table.counts:
        return []
    found: dict[str, Any] = table.counts
    build = TextBuild(**table.build)
    words = found["words"] + found["heading_words"] + found["short_words"]
    kept = found["words"]
    paragraphs = count_of(found["paragraphs"], "paragraph")
    lines = [f"kept: {paragraphs} of {count_of(kept, 'word')} ({_percent(kept, words)})"]
    few = f" of fewer than {count_of(build.min_words, 'word')} (--min-words)"
    for count, of, what, more in (
        (found["short_paragraphs"], found["short_words"], "paragraph", few),
        (found["headings"], found["heading_words"], "heading", ""),
    ):
        if count:
            told = f"{count_of(count, what)}{more}: {count_of(of, 'word')}"
            lines.append(f"left out: {told} ({_percent(of, words)})")
    if dropped := found["dropped_tokens"]:
        ids = dropped + build.sequence_length * sum(split.rows for split in table.splits.values())
        share = _percent(dropped, ids)
        lines.append(f"left out: {dropped:,} language ids that fill no sequence at unit ends ({share})")
    if joined := found["joined_documents"]:
        lines.append(f"hard-wrapped: the lines of {count_of(joined, 'document')} were joined (--line-breaks keep)")
    if empty := [item.name for item in build.inputs if not item.bytes]:
        more = f" and {len(empty) - 3:,} more" if len(empty) > 3 else ""
        lines.append(f"empty: {', '.join(empty[:3])}{more}: 0 bytes; look whether a download failed")
    if found["bad_bytes"]:
        lines.append(f"bad bytes: {found['bad_bytes']:,} were replaced by U+FFFD")
    return lines


def warnings(table: TableManifest) -> list[str]:
    """Returns what the user should know of: splits that should hold something and do not."""
    if table.build["source"] != TEXT:
        return []
    build = TextBuild(**table.build)
    fraction, documents = build.validation_fraction, table.counts["documents"]
    whole = "; documents are held out whole, and in plain text blank lines part them" if documents == 1 else ""
    give = "1 document gives" if documents == 1 else f"{documents:,} documents give"
    return [
        f"the split {name} is empty: {share:.4g} of {give} no sequence of "
        f"{build.sequence_length} tokens{whole}; change --validation-fraction ({fraction:g}), or use more text or a "
        "shorter --sequence-length"
        for name, share in (("train", 1 - fraction), ("validation", fraction))
        if share and not table.splits[name].rows
    ]


def description(table: TableManifest) -> list[Any]:
    """Returns a title, and for packed text what else there is to show of a table."""
    counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in table.counts.items() if isinstance(count, int)]
    if table.build["source"] == REGIONS and "detector" in table.build:
        return [f"image regions, {table.build['format']}", *summary_of_regions(table)]
    if table.build["source"] != TEXT:
        return [", ".join([f"built from {table.build['source']}", *counts])]
    built, found = TextBuild(**table.build), table.counts
    title = (
        f"sequences of {built.sequence_length} language tokens ({built.language_tokenizer.name}), "
        f"up to {built.clip_blocks} CLIP blocks; {count_of(found['documents'], 'document')}, "
        f"{count_of(found['paragraphs'], 'paragraph')}, {found['text_bytes']:,} bytes of text"
    )
    return [title, _lengths(table, built.clip_blocks), _documents(table)]


def _lengths(table: TableManifest, limit: int) -> Any:
    """CLIP blocks that whole texts need, as shares; those above the limit were cut."""
    from rich.table import Table

    splits = list(table.splits.values())
    needed: list[Any] = [split.counts.get("blocks_needed", []) for split in splits]
    shown = Table("CLIP blocks needed", *table.splits)
    for blocks in range(1, max(map(len, needed), default=0) + 1):
        counts = [histogram[blocks - 1 : blocks] for histogram in needed]
        if any(map(any, counts)):
            shown.add_row(f"{blocks}", *map(_share, splits, counts))
    shown.add_row(f"over {limit}, cut", *(_share(split, found[limit:]) for split, found in zip(splits, needed)))
    return shown


def _documents(table: TableManifest) -> Any:
    """Documents by their number of language tokens, in powers of two."""
    from rich.table import Table

    shown = Table("tokens per document", "documents")
    shown.columns[1].justify = "right"
    histogram: Any = table.counts["document_tokens"]
    for power, count in enumerate(histogram):
        if count:
            shown.add_row(f"{1 << power - 1:,} to {(1 << power) - 1:,}" if power else "none", f"{count:,}")
    return shown


def _percent(count: int, of: int) -> str:
    return f"{count / of:.1%}" if of else "0.0%"


def _share(split: Split, counts: list[int]) -> str:
    return f"{sum(counts) / split.rows:.2%}" if split.rows else "-"
