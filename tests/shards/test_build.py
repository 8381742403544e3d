"""Building: the same bytes for any number of workers and after any interruption; refusing what does not fit."""

import hashlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from xdscale.errors import XdscaleError
from xdscale.shards.build import merge_parts
from xdscale.shards.manifest import Manifest
from xdscale.shards.sources.corpus import read_documents
from xdscale.shards.sources.text import TextOptions, build_shards
from xdscale.shards.table import Table
from xdscale.shards.verify import verify_shards

from .faults import killed_at

pytestmark = pytest.mark.usefixtures("loaded_once")


def digests(folder):
    """SHA-256 of everything in the folder, by name; there are no folders left in a finished dataset."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(small_dataset):
    found = digests(small_dataset)
    assert sum(name.startswith("train") for name in found) >= 3
    assert sum(name.startswith("validation") for name in found) >= 2
    return found


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_bytes_do_not_depend_on_workers(small_build, expected, tmp_path, workers):
    small_build(tmp_path / "out", workers=workers)
    assert digests(tmp_path / "out") == expected


def test_documents_and_splits_are_those_of_the_corpus(small_dataset, small_corpus, small_build, tmp_path):
    manifest = small_build(tmp_path / "all", validation_fraction=0)
    assert manifest.counts["documents"] == 60
    kept = [paragraph for document in read_documents(small_corpus) for paragraph in document]
    assert manifest.counts["paragraphs"] == len(kept)
    assert manifest.counts["text_bytes"] == sum(len(paragraph.encode()) for paragraph in kept)
    assert manifest.splits["validation"].rows == len(Table(tmp_path / "all", "validation")) == 0
    # The same tokens, whatever is held out: sequences plus what was left over.
    totals = []
    for folder in (tmp_path / "all", small_dataset):
        built = Manifest.load(folder).tables["text"]
        tokens = 30 * sum(split.rows for split in built.splits.values())
        totals.append(tokens + built.counts["dropped_tokens"])
    assert totals[0] == totals[1]


def test_documents_by_their_tokens(small_dataset, small_corpus, cassette_model):
    """Powers of two, counted with the library on each document by itself."""
    tokenizer = Tokenizer.from_file(str(cassette_model / "tokenizer.json"))
    tokenizer.no_truncation()
    counts = [0] * 20
    for document in read_documents(small_corpus):
        tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in document)
        counts[0 if not tokens else 1 + int(math.log2(tokens))] += 1
    found = Manifest.load(small_dataset).tables["text"].counts["document_tokens"]
    assert sum(found) == 60
    assert found == counts[: len(found)]


def test_several_inputs_are_read_in_order(small_corpus, small_build, cassette_model, tmp_path):
    """Two files cut at a document's border hold the same sequences as one, for units that end there too."""
    documents = small_corpus.read_text().split("\n\n")
    parts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    parts[0].write_text("\n\n".join(documents[:20]) + "\n")
    parts[1].write_text("\n\n".join(documents[20:]))
    options = {"language_tokenizer": str(cassette_model), "sequence_length": 30, "validation_fraction": 0.2}
    manifest = build_shards(parts, tmp_path / "two", TextOptions(**options))
    assert [item["name"] for item in manifest.build["inputs"]] == ["a.txt", "b.txt"]
    build_shards([small_corpus], tmp_path / "one", TextOptions(**options))
    for split in ("train", "validation"):
        one, two = (Table(tmp_path / name, split) for name in ("one", "two"))
        every = np.arange(len(one))
        assert np.array_equal(one.read("language", every), two.read("language", every))
        assert np.array_equal(one.read_ragged("clip", every)[0], two.read_ragged("clip", every)[0])


def test_size_of_the_real_slice(wiki_dump, cassette_model, tmp_path):
    """At most 5 % over the payload, which is 2 bytes per language id and per CLIP id, offsets not counted."""
    manifest = build_shards([wiki_dump], tmp_path / "out", TextOptions(language_tokenizer=str(cassette_model)))
    assert manifest.counts["documents"] == 106
    tokens = sum(510 * split.rows + split.elements["clip_offsets"] for split in manifest.splits.values())
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert stored <= 1.05 * 2 * tokens
    # Spec xdbert §4: over 99 % of sequences of 512 need fewer than 693 CLIP positions, that is 9 blocks.
    needed = manifest.splits["train"].counts["blocks_needed"]
    assert sum(needed[:9]) > 0.99 * sum(needed)
    verify_shards(tmp_path / "out")


def test_killed_again_and_again_it_goes_on(small_build, expected, tmp_path):
    """One folder, killed again and again: each start finishes a unit, and the end must be the same bytes."""
    out = tmp_path / "out"
    kills = 0
    # The plan takes 2 fsyncs (file, folder), a unit at most 6: two shards and its record.
    while killed_at(9, lambda: small_build(out)):
        kills += 1
        assert kills < len(expected)
        assert not (out / "dataset.json").exists()
    assert kills >= 3
    assert digests(out) == expected


@pytest.mark.parametrize("number", range(2, 44, 6))
def test_one_kill_at_any_write(small_build, expected, tmp_path, number):
    out = tmp_path / "out"
    killed_at(number, lambda: small_build(out))
    small_build(out)
    assert digests(out) == expected


def interrupted(small_build, out, after):
    class StoppedError(Exception):
        pass

    seen = []

    def stop(progress):
        seen.append(progress)
        if len(seen) == after:
            raise StoppedError

    with pytest.raises(StoppedError):
        small_build(out, on_progress=stop)
    assert not (out / "dataset.json").exists()


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip", "record", "record of another unit"])
def test_torn_shards_are_rebuilt_and_whole_ones_kept(small_build, expected, tmp_path, damage):
    out = tmp_path / "out"
    interrupted(small_build, out, after=3)
    shards = sorted(out.glob("train-*.tar"))
    assert len(shards) == 3
    before = {path.name: path.stat().st_mtime_ns for path in shards}
    if damage == "delete":
        shards[1].unlink()
    elif damage == "truncate":
        os.truncate(shards[1], 100)
    elif damage == "flip":
        content = bytearray(shards[1].read_bytes())
        content[3000] ^= 1
        shards[1].write_bytes(content)
    elif damage == "record":
        (out / ".build" / "unit-000001.json").write_text("{")
    else:
        (out / ".build" / "unit-000001.json").write_bytes((out / ".build" / "unit-000002.json").read_bytes())
    steps = []
    small_build(out, on_progress=steps.append)
    assert digests(out) == expected
    after = {path.name: path.stat().st_mtime_ns for path in shards}
    assert [after[path.name] == before[path.name] for path in shards] == [True, False, True]
    assert steps[-1].kept_shards >= 2
    assert steps[-1].bytes_read == steps[-1].bytes_total


def test_a_finished_dataset_is_reused(small_build, expected, tmp_path):
    out = tmp_path / "out"
    first = small_build(out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    steps = []
    assert small_build(out, on_progress=steps.append, workers=3) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert [step.kept_shards for step in steps] == [len(expected) - 1]


def test_a_damaged_finished_dataset_is_named_then_overwritten(small_build, expected, tmp_path):
    out = tmp_path / "out"
    small_build(out)
    os.truncate(out / "train-000001.tar", 10)
    with pytest.raises(XdscaleError, match=r"train-000001\.tar: truncated"):
        small_build(out)
    small_build(out, overwrite=True)
    assert digests(out) == expected


def test_another_dataset_is_refused_and_named(small_build, expected, tmp_path):
    out = tmp_path / "out"
    small_build(out)
    for option, value in (("sequence_length", 20), ("min_words", 7), ("validation_fraction", 0.5)):
        with pytest.raises(
            XdscaleError, match=rf"a dataset with {option} .*, now {value}; .*table alone with --overwrite"
        ):
            small_build(out, **{option: value})
    assert digests(out) == expected
    small_build(out, sequence_length=400, overwrite=True)
    small_build(tmp_path / "fresh", sequence_length=400)
    assert digests(out) == digests(tmp_path / "fresh")


def test_other_text_and_unfinished_builds_are_refused(small_build, small_corpus, cassette_model, tmp_path):
    out = tmp_path / "out"
    interrupted(small_build, out, after=2)
    other = tmp_path / "other.txt"
    other.write_text(small_corpus.read_text() + "\nfive more words stand here\n")
    with pytest.raises(XdscaleError, match="holds an unfinished build with clip_blocks 1, now 2"):
        small_build(out, clip_blocks=2)
    with pytest.raises(XdscaleError, match="holds an unfinished build of another input"):
        build_shards(
            [other],
            out,
            TextOptions(
                language_tokenizer=str(cassette_model),
                sequence_length=30,
                clip_blocks=1,
                validation_fraction=0.2,
                shard_text_bytes=6000,
            ),
        )


def test_foreign_folders_are_left_alone(small_build, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(XdscaleError, match=r"holds thesis\.tex and is not a dataset"):
        small_build(tmp_path)
    with pytest.raises(XdscaleError, match=r"thesis\.tex: is a file"):
        small_build(tmp_path / "thesis.tex")
    small_build(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_outputs_that_cannot_be_are_one_message(small_build, tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for out, message in (
        (tmp_path / "file" / "out", "cannot be written: Not a directory"),
        (tmp_path / "link", r"link: is a link to .*gone, which is not there; make that folder"),
        (tmp_path / "link" / "out", "cannot be written"),
        (Path("/proc/out"), "cannot be written"),
    ):
        with pytest.raises(XdscaleError, match=message):
            small_build(out)
        with pytest.raises(XdscaleError):
            merge_parts(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_the_root_of_a_file_system_is_a_free_folder(small_build, tmp_path, expected):
    """ext4 keeps a folder of its own there, which stays."""
    (tmp_path / "lost+found").mkdir()
    small_build(tmp_path)
    (tmp_path / "lost+found").rmdir()
    assert digests(tmp_path) == expected


def test_two_builds_in_one_folder_are_refused(small_build, tmp_path):
    def second(progress):
        with pytest.raises(XdscaleError, match="another process is building here"):
            small_build(tmp_path / "out")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_build(tmp_path / "out", on_progress=second)


def test_bad_inputs_are_named(cassette_model, tmp_path):
    def build(*inputs, workers=1, **options):
        options = TextOptions(language_tokenizer=str(cassette_model), **options)
        build_shards(list(inputs), tmp_path / "out", options, workers=workers)

    empty, short, broken = tmp_path / "empty.txt", tmp_path / "short.txt", tmp_path / "broken.jsonl"
    empty.write_text("\n\n")
    short.write_text("only some words in this text")
    broken.write_text('{"text": "a"}\n{')
    with pytest.raises(XdscaleError, match="no input"):
        build()
    with pytest.raises(XdscaleError, match=r"none\.txt: no such file or folder"):
        build(tmp_path / "none.txt")
    with pytest.raises(XdscaleError, match=r"empty\.txt: no documents"):
        build(empty)
    # Where nothing was finished, nothing is in the way of another input.
    assert not (tmp_path / "out").exists()
    with pytest.raises(XdscaleError, match=r"6 tokens of 1 document give no sequence of 510"):
        build(short)
    with pytest.raises(XdscaleError, match=r"broken\.jsonl:2: not valid JSON"):
        build(broken)
    with pytest.raises(XdscaleError, match="sequence_length = 10{33}: .*less than 2147483648"):
        build(short, sequence_length=10**33)
    with pytest.raises(XdscaleError, match="format = 'html': expected auto, text"):
        build(short, format="html")
    with pytest.raises(XdscaleError, match=r"validation_fraction = 2: .*less than or equal to 1"):
        build(short, validation_fraction=2)
    with pytest.raises(XdscaleError, match="workers = 0: at least 1"):
        build(short, workers=0)
    with pytest.raises(XdscaleError, match=r"sequence_length = 0: .*greater than 0"):
        build(short, sequence_length=0)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_full_disk_is_one_message_and_the_build_goes_on(small_build, expected, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 12:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(XdscaleError, match="out: cannot be written: No space left on device; finished shards"):
            small_build(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*.partial"))
    small_build(tmp_path / "out")
    assert digests(tmp_path / "out") == expected


def test_a_dead_worker_is_one_message_and_the_build_goes_on(small_build, expected, tmp_path):
    def kill_workers(progress):
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(XdscaleError, match="a worker process died"):
        small_build(tmp_path / "out", workers=2, shard_text_bytes=1000, on_progress=kill_workers)
    small_build(tmp_path / "out", workers=2, shard_text_bytes=1000)
    small_build(tmp_path / "fresh", shard_text_bytes=1000)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_workers_end_with_a_killed_parent(small_corpus, cassette_model, tmp_path):
    script = tmp_path / "build.py"
    script.write_text(
        "import multiprocessing, os, signal, sys\n"
        "from pathlib import Path\n"
        "from xdscale.shards.sources.text import TextOptions, build_shards\n"
        "def stop(progress):\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    options = TextOptions(language_tokenizer=sys.argv[3], sequence_length=30, shard_text_bytes=1000)\n"
        "    build_shards([Path(sys.argv[1])], Path(sys.argv[2]), options, workers=2, on_progress=stop)\n"
    )
    arguments = [str(script), str(small_corpus), str(tmp_path / "out"), str(cassette_model)]
    result = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL
    workers = [int(number) for number in result.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{number}/cmdline") and alive(number) for number in workers):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)


def alive(number):
    """Tells whether a process still runs; one that ended but was not yet collected does not."""
    try:
        with open(f"/proc/{number}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
