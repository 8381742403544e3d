"""`xdscale bench shards`: building shards against the bare `tokenizers` library on the same text, in one run.

The opponent gets everything for nothing but the two tokenisations: paragraphs in memory, text already cleaned for
CLIP, no positions of characters, no packing, nothing written. Both are measured in CPU-seconds, in turns, so that a
busy machine meets both alike. The gain by more processes can only be measured in seconds of the clock.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from xdscale.shards.build import Progress
from xdscale.shards.clip_bpe import ClipBPE, clean
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.sources.corpus import read_documents
from xdscale.shards.sources.inputs import find_inputs
from xdscale.shards.sources.text import TextOptions, build_shards
from xdscale.shards.units import one_thread_per_process

WIKIPEDIA_BYTES = 14e9
"""Text of the paper's larger corpus (spec xdbert, Table 3's last row)."""
BATCH_PARAGRAPHS = 1000
UNITS = 24
"""Shards per build: the time from the first to the last of them is free of start-up."""


@dataclass(frozen=True)
class BuildSpeeds:
    """What was measured.

    Attributes:
        bare_seconds: CPU-seconds of the bare library, per round.
        build_seconds: CPU-seconds of a build by one process, all of it, per round.
        rates: text bytes per second of the clock from the first to the last shard, by processes, per round.
        text_bytes: of the text.
    """

    bare_seconds: list[float]
    build_seconds: list[float]
    rates: dict[int, list[float]]
    text_bytes: int

    @property
    def speed_per_process(self) -> float:
        """Of the bare library's speed, median over the rounds."""
        return statistics.median(map(float.__truediv__, self.bare_seconds, self.build_seconds))

    def gain(self, workers: int) -> float:
        """Speed of several processes over that of one, median over the rounds."""
        return statistics.median(map(float.__truediv__, self.rates[workers], self.rates[1]))


def bench_shards(inputs: list[str], language_tokenizer: str, *, text_mb: float, rounds: int, workers: int) -> None:
    """Measures and prints a table, and the hours that 14 GB would take.

    Args:
        inputs: corpus files, folders or patterns; repeated until there is enough text.
        language_tokenizer: as for `build_shards`.
        text_mb: millions of bytes of text.
        rounds: alternations.
        workers: processes of the parallel build; 1 leaves it out.

    Raises:
        XdscaleError: a bad input or tokenizer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.txt"
        paragraphs = _write_corpus(inputs, path, round(text_mb * 1e6))
        result = _measure(path, paragraphs, language_tokenizer, rounds, sorted({1, workers}))
    console = Console()
    # Not wrapped when piped, so that scripts can read it.
    (console if console.is_terminal else Console(width=200)).print(_table(result, workers))


def _write_corpus(inputs: list[str], path: Path, size: int) -> list[str]:
    """Writes documents as plain text until there are `size` bytes; returns their paragraphs."""
    documents = [document for file in find_inputs(inputs) for document in read_documents(file) if document]
    paragraphs: list[str] = []
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        while documents and written < size:
            for document in documents:
                written += len("\n".join(document).encode("utf-8")) + 2
                stream.write("\n".join(document) + "\n\n")
                paragraphs += document
                if written >= size:
                    break
    return paragraphs


def _measure(
    path: Path, paragraphs: list[str], language_tokenizer: str, rounds: int, processes: list[int]
) -> BuildSpeeds:
    language, _ = load_language_tokenizer(language_tokenizer)
    clip = ClipBPE().tokenizer
    cleaned = [clean(text) for text in paragraphs]
    bare: list[float] = []
    build: list[float] = []
    rates: dict[int, list[float]] = {number: [] for number in processes}
    with one_thread_per_process():
        for _ in range(rounds):
            started = time.process_time()
            for first in range(0, len(paragraphs), BATCH_PARAGRAPHS):
                for tokenizer, texts in ((language, paragraphs), (clip, cleaned)):
                    batch = texts[first : first + BATCH_PARAGRAPHS]
                    for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                        encoding.ids  # noqa: B018 - the ids are copied out here
            bare.append(time.process_time() - started)
            for workers in processes:
                started = time.process_time()
                rates[workers].append(_build_rate(path, language_tokenizer, workers))
                if workers == 1:
                    build.append(time.process_time() - started)
    return BuildSpeeds(bare, build, rates, path.stat().st_size)


def _build_rate(path: Path, language_tokenizer: str, workers: int) -> float:
    """Builds shards and returns the bytes per second of the clock between the first and the last."""
    seen: list[tuple[float, int]] = []

    def on_progress(progress: Progress) -> None:
        seen.append((time.perf_counter(), progress.bytes_read))

    with tempfile.TemporaryDirectory() as folder:
        options = TextOptions(language_tokenizer=language_tokenizer, shard_text_bytes=path.stat().st_size // UNITS)
        build_shards([path], Path(folder) / "shards", options, workers=workers, on_progress=on_progress)
    (first_time, first_bytes), (last_time, last_bytes) = seen[0], seen[-1]
    return (last_bytes - first_bytes) / (last_time - first_time)


def _table(result: BuildSpeeds, workers: int) -> Table:
    size = result.text_bytes
    table = Table(
        title=f"{size / 1e6:.1f} MB of text, median of {len(result.bare_seconds)} rounds, {os.cpu_count()} cores"
    )
    for column in ("", "MB per CPU-second", "range", "hours for 14 GB"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in (("tokenizers alone", result.bare_seconds), ("shards build", result.build_seconds)):
        rates = [size / second / 1e6 for second in seconds]
        middle = statistics.median(rates)
        hours = f"{WIKIPEDIA_BYTES / 1e6 / middle / 3600:.1f}"
        table.add_row(name, f"{middle:.2f}", f"{min(rates):.2f}-{max(rates):.2f}", hours)
    table.add_row("build : tokenizers", f"{result.speed_per_process:.2f}")
    if workers > 1:
        rate = statistics.median(result.rates[workers])
        hours = f"{WIKIPEDIA_BYTES / rate / 3600:.1f}"
        table.add_row(f"{workers} processes : 1, by the clock", f"{result.gain(workers):.2f}", "", hours)
    return table
