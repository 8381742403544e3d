"""`xdscale bench stream`: the global shuffle against webdataset's per-sample tars, and what it promises of itself.

Both sides give the same numpy arrays of the same samples, all columns of the table. Ours come in a global random order,
webdataset's through its shuffle buffer. Rounds alternate in one process and CPU time is compared, so that other work on
the machine troubles both alike.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from xdscale.bench.promises import Promise, print_promises
from xdscale.data.collate import XDBERTCollator
from xdscale.data.order import Order
from xdscale.recipes.xdbert.schema import XDBERTObjectives
from xdscale.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord, Split
from xdscale.shards.shard import write_shard
from xdscale.shards.table import Table

SAMPLES_PER_SHARD = 2000
BATCH = 288
"""Global batch of the shipped recipes."""

BUFFER = 1000
"""Samples of webdataset's own shuffle, what its documentation shows in place of a global one."""
FIRST_BATCH = 32
SEEKS = 200
MANY_SHARDS, FEW_SHARDS = 10_000, 500


def bench_stream(shards: Path, *, samples: int = 20_000, rounds: int = 3) -> list[Promise]:
    """Measures and prints.

    Args:
        shards: a dataset written by `xdscale shards build`; its training split is repeated up to `samples`.
        samples: samples of the comparison with webdataset.
        rounds: alternations, at least 3; the table shows medians.

    Returns:
        The rows of the printed table.
    """
    source = Table(shards, "train")
    with tempfile.TemporaryDirectory(prefix="xdscale-bench-") as folder:
        work = Path(folder)
        rows = _against_webdataset(source, work, samples, rounds)
        many, few = (_many_shards(source, work / str(count), count) for count in (MANY_SHARDS, FEW_SHARDS))
        rows += [*_fresh_process(many, few), _seek(many)]
    clip_tokens = source.manifest.tables[source.name].splits["train"].elements["clip_offsets"] / len(source)
    length = source.columns["language"].shape[0]
    print_promises(rows, f"sequences of {length} language ids and {clip_tokens:.0f} CLIP ids")
    return rows


def build_wikipedia_slice(folder: Path) -> Path:
    """Builds shards of 510 ids from the Wikipedia slice inside gensim, as the quickstart has it."""
    from xdscale.names import resolve_path
    from xdscale.shards.sources.text import TextOptions, build_shards

    dump = "package:gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    build_shards([resolve_path(dump)], folder, TextOptions(language_tokenizer="package:cognition/model"))
    return folder


def _against_webdataset(source: Table, work: Path, samples: int, rounds: int) -> list[Promise]:
    chosen = np.arange(samples) % len(source)
    ours, theirs = _write_ours(source, chosen, work / "ours"), _write_theirs(source, chosen, work / "theirs")
    rates = [(_read_ours(ours, samples), _read_theirs(theirs, samples)) for _ in range(rounds)]
    ratio = statistics.median(mine / other for mine, other in rates)
    mine, other = (statistics.median(side) for side in zip(*rates))
    return [
        Promise(f"samples per CPU-second, webdataset, buffer of {BUFFER:,}", f"{other:,.0f}", "", True),
        Promise("samples per CPU-second, globally shuffled", f"{mine:,.0f}", "", True),
        Promise(f"ratio, median of {rounds} rounds", f"{ratio:.0f}×", "≥ 60×", ratio >= 60),
    ]


def _write_ours(source: Table, chosen: np.ndarray, folder: Path) -> Path:
    records = []
    folder.mkdir()
    for first in range(0, len(chosen), SAMPLES_PER_SHARD):
        ids = chosen[first : first + SAMPLES_PER_SHARD]
        path = folder / f"train-{len(records):06d}.tar"
        records.append(write_shard(path, list(source.columns.values()), _arrays(source, ids)))
    return _write_manifest(source, folder, records)


def _arrays(source: Table, ids: np.ndarray) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, column in source.columns.items():
        if column.offsets is None:
            arrays[name] = source.read(name, ids)
        else:
            arrays[name], arrays[column.offsets] = source.read_ragged(name, ids)
    return arrays


def _write_theirs(source: Table, chosen: np.ndarray, folder: Path) -> list[str]:
    from webdataset import ShardWriter

    folder.mkdir()
    with ShardWriter(str(folder / "%06d.tar"), verbose=0) as writer:
        for number, sample in enumerate(chosen):
            arrays = {f"{name}.npy": array for name, array in source[int(sample)].items()}
            writer.write({"__key__": f"{number:08d}"} | arrays)
    return sorted(str(path) for path in folder.glob("*.tar"))


def _write_manifest(source: Table, folder: Path, records: list[ShardRecord]) -> Path:
    """Describes shards of this bench as a dataset; what its source counted plays no part in reading."""
    table = source.manifest.tables[source.name].model_copy(update={"splits": {"train": Split.of(records, {})}})
    (folder / MANIFEST_NAME).write_text(Manifest(tables={source.name: table}).to_json(), encoding="utf-8")
    return folder


def _many_shards(source: Table, folder: Path, count: int) -> Path:
    """Makes a dataset of `count` small shards, all of them the same file under many names."""
    folder.mkdir()
    ids = np.arange(min(64, len(source)))
    first = write_shard(folder / "train-000000.tar", list(source.columns.values()), _arrays(source, ids))
    records = [first.model_copy(update={"file": f"train-{number:06d}.tar"}) for number in range(count)]
    for record in records[1:]:
        os.link(folder / first.file, folder / record.file)
    return _write_manifest(source, folder, records)


def _read_ours(folder: Path, samples: int) -> float:
    """Returns samples per CPU-second over one epoch, opening and shuffling included."""
    began = time.process_time()
    split = Table(folder, "train")
    order = _order(split, BATCH)
    steps = samples // BATCH
    for step in range(steps):
        for slots in order.slots(step):
            _arrays(split, slots.sample_ids)
    return steps * BATCH / (time.process_time() - began)


def _read_theirs(urls: list[str], samples: int) -> float:
    from webdataset import WebDataset

    began = time.process_time()
    count = sum(1 for _ in WebDataset(urls, shardshuffle=False).shuffle(BUFFER).decode())
    assert count == samples
    return count / (time.process_time() - began)


def _order(split: Table, batch: int) -> Order:
    # The seed is new each time: an order that was computed before would be remembered.
    seed = time.monotonic_ns() % 2**32
    return Order(len(split), seed=seed, global_batch=batch, world_size=1, rank=0, micro_batch=batch)


def _fresh_process(many: Path, few: Path) -> list[Promise]:
    """Measures the first batch and the memory of a process that does nothing else."""
    ready, large = _child(many)
    _, small = _child(few)
    growth = large - small
    return [
        Promise(f"process start to first batch, {MANY_SHARDS:,} shards", f"{ready:.2f} s", "< 2 s", ready < 2),
        Promise(
            f"peak memory, {FEW_SHARDS:,} and {MANY_SHARDS:,} shards",
            f"{small:.0f} and {large:.0f} MiB",
            "+ < 32 MiB",
            growth < 32,
        ),
    ]


def _child(folder: Path) -> tuple[float, float]:
    """Returns seconds to the first batch and peak MiB after reading on."""
    began = time.monotonic()
    command = [sys.executable, "-m", "xdscale.bench.stream", str(folder)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found["ready"] - began, found["peak_mib"]


def _in_child(folder: Path) -> None:
    split = Table(folder, "train")
    order, collate = _order(split, FIRST_BATCH), XDBERTCollator(split, seed=0, objectives=XDBERTObjectives())
    collate(order.slots(0)[0])
    ready = time.monotonic()
    for step in range(1, 400):
        collate(order.slots(step)[0])
    # Not getrusage: its peak begins with that of the process which started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    print(json.dumps({"ready": ready, "peak_mib": int(status["VmHWM"].split()[0]) / 1024}))


def _seek(folder: Path) -> Promise:
    split = Table(folder, "train")
    order, collate = _order(split, FIRST_BATCH), XDBERTCollator(split, seed=0, objectives=XDBERTObjectives())
    seconds = []
    for step in np.random.default_rng(0).integers(0, 10**6, SEEKS):
        began = time.process_time()
        collate(order.slots(int(step))[0])
        seconds.append(time.process_time() - began)
    worst, usual = 1000 * max(seconds), 1000 * statistics.median(seconds)
    name = f"any of {SEEKS} positions to its batch, CPU time, worst (median)"
    return Promise(name, f"{worst:.0f} ms ({usual:.1f} ms)", "< 50 ms", worst < 50)


if __name__ == "__main__":
    _in_child(Path(sys.argv[1]))
