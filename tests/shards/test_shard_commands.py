"""The commands, as a user runs them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from xdscale.errors import XdscaleError
from xdscale.shards.build import Progress
from xdscale.shards.commands import shards_app
from xdscale.shards.manifest import MANIFEST_NAME, Manifest
from xdscale.shards.regions import Detector
from xdscale.shards.sources.caption_build import CaptionOptions
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.shards.sources.text_report import left_out


def run(*arguments):
    return CliRunner().invoke(shards_app, [str(argument) for argument in arguments], catch_exceptions=False)


def build(corpus, out, *more):
    options = ("--language-tokenizer", "package:cognition/model", "--sequence-length", 30, "--clip-blocks", 1)
    return run("build", corpus, "--out", out, "--validation-fraction", 0.2, *options, *more)


def test_build_says_what_was_made(small_corpus, tmp_path):
    result = build(small_corpus, tmp_path / "out")
    assert result.exit_code == 0
    manifest = Manifest.load(tmp_path / "out").tables["text"]
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    assert f"sequences: train {train.rows:,}, validation {validation.rows:,}" in result.stdout
    assert f"dropped {manifest.counts['dropped_tokens']}" in result.stdout
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    payload = 2 * sum(30 * split.rows + split.elements["clip_offsets"] for split in (train, validation))
    assert f"bytes: {stored:,}, {stored / payload:.3f} per payload byte" in result.stdout
    assert "2 shards (0 kept from an earlier run)" in result.stdout
    assert "2 shards (2 kept from an earlier run)" in build(small_corpus, tmp_path / "out").stdout


def test_build_says_that_the_tokenizer_does_not_know_the_words(tmp_path):
    (tmp_path / "a.txt").write_text("แมวนั่ง cat " * 200)
    result = build(tmp_path / "a.txt", tmp_path / "out", "--validation-fraction", 0)
    assert "out: text: 50% of the word pieces at its beginning are [UNK], unknown" in result.stderr


def test_merge_says_so_too_where_the_tokenizer_is_still_there(cassette_model, tmp_path):
    (tmp_path / "a.txt").write_text("แมวนั่ง cat " * 200)
    (tmp_path / "b.txt").write_text("แมวนั่ง dog " * 200)
    shutil.copy(cassette_model / "tokenizer.json", tmp_path)
    options = ("--language-tokenizer", tmp_path / "tokenizer.json", "--validation-fraction", 0)
    for index in range(2):
        build(f"{tmp_path}/*.txt", tmp_path / "out", *options, "--part", f"{index}/2")
    assert "out: text: 50% of the word pieces at its beginning are [UNK]" in run("merge", tmp_path / "out").stderr
    (tmp_path / "tokenizer.json").unlink()
    merged = run("merge", tmp_path / "out")  # once more
    assert (merged.exit_code, merged.stderr) == (0, "")


def test_a_finished_build_is_found_with_its_tokenizer_in_another_place(small_corpus, cassette_model, tmp_path):
    """As where the dataset was made on another machine: its shards say where the tokenizer was then."""
    for place in ("there", "here"):
        (tmp_path / place).mkdir()
        shutil.copy(cassette_model / "tokenizer.json", tmp_path / place)
        result = build(small_corpus, tmp_path / "out", "--language-tokenizer", tmp_path / place)
        shutil.rmtree(tmp_path / place)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "2 shards (2 kept from an earlier run)" in result.stdout


def test_build_says_what_it_left_out_and_so_does_merge(tmp_path):
    """By hand: 3 paragraphs of 40 words kept, one of 2 and a heading of 6 not; the ids are what is left over."""
    text = "\n".join([" ".join(["river"] * 40)] * 3 + ["too short", "= a heading of some words ="])
    (tmp_path / "a.txt").write_text(text)
    result = build(tmp_path / "a.txt", tmp_path / "out", "--validation-fraction", 0)
    expected = [
        "kept: 3 paragraphs of 120 words (93.0%)",
        "left out: 1 paragraph of fewer than 5 words (--min-words): 2 words (1.6%)",
        "left out: 1 heading: 7 words (5.4%)",
    ]
    assert [line for line in result.stdout.splitlines() if line.startswith(("kept", "left"))] == expected
    corpus = Manifest.load(tmp_path / "out").tables["text"].counts
    assert [corpus[name] for name in ("words", "short_words", "heading_words", "short_paragraphs")] == [120, 2, 7, 1]
    build(tmp_path / "a.txt", tmp_path / "part", "--validation-fraction", 0, "--part", "0/2")
    build(tmp_path / "a.txt", tmp_path / "part", "--validation-fraction", 0, "--part", "1/2")
    assert run("merge", tmp_path / "part").stdout.splitlines()[1:] == expected


def test_an_empty_split_is_named_with_the_option(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(["river"] * 400))
    result = build(tmp_path / "a.txt", tmp_path / "out", "--validation-fraction", 0.0001)
    assert "warning: the split validation is empty: 0.0001 of 1 document gives no sequence of" in result.stderr
    assert "--validation-fraction (0.0001)" in result.stderr
    assert "documents are held out whole, and in plain text blank lines part them" in result.stderr
    (tmp_path / "two.txt").write_text("\n\n".join([" ".join(["river"] * 400)] * 2))
    result = build(tmp_path / "two.txt", tmp_path / "two", "--validation-fraction", 0.0001)
    assert "0.0001 of 2 documents give no sequence of 30 tokens; change --validation-fraction" in result.stderr
    result = build(tmp_path / "a.txt", tmp_path / "all", "--validation-fraction", 1)
    assert result.stderr == ""
    result = build(tmp_path / "a.txt", tmp_path / "most", "--validation-fraction", 0.9999)
    assert "warning: the split train is empty" in result.stderr
    assert build(tmp_path / "a.txt", tmp_path / "none", "--validation-fraction", 0).stderr == ""


def test_files_of_no_bytes_are_named(small_corpus, tmp_path):
    (tmp_path / "lost.jsonl").touch()
    result = build(tmp_path / "lost.jsonl", tmp_path / "out", small_corpus)
    assert "empty: lost.jsonl: 0 bytes; look whether a download failed" in result.stdout.splitlines()


@pytest.mark.parametrize(
    ("counts", "empty", "said"),
    [
        ({}, 0, []),
        ({}, 3, ["empty: a0, a1, a2: 0 bytes; look whether a download failed"]),
        ({}, 4, ["empty: a0, a1, a2 and 1 more: 0 bytes; look whether a download failed"]),
        ({"bad_bytes": 1}, 0, ["bad bytes: 1 were replaced by U+FFFD"]),
        (
            {"joined_documents": 1200},
            0,
            ["hard-wrapped: the lines of 1,200 documents were joined (--line-breaks keep)"],
        ),
        (
            {"dropped_tokens": 3, "short_paragraphs": 1, "short_words": 1, "headings": 2, "heading_words": 6},
            0,
            [
                "left out: 1 paragraph of fewer than 5 words (--min-words): 1 word (10.0%)",
                "left out: 2 headings: 6 words (60.0%)",
                "left out: 3 language ids that fill no sequence at unit ends ({ids:.1%})",
            ],
        ),
    ],
)
def test_only_what_was_left_out_is_told(small_dataset, counts, empty, said):
    table = Manifest.load(small_dataset).tables["text"]
    (item,) = table.build["inputs"]
    none = dict.fromkeys(("dropped_tokens", "short_paragraphs", "short_words", "headings", "heading_words"), 0)
    inputs = [item | {"name": f"a{number}", "bytes": 0} for number in range(empty)]
    change = {
        "counts": table.counts | none | {"words": 3, "bad_bytes": 0, "joined_documents": 0} | counts,
        "build": table.build | {"inputs": [item, *inputs]},
    }
    kept, *found = left_out(table.model_copy(update=change))
    assert kept.startswith(f"kept: {table.counts['paragraphs']:,} paragraphs of 3 words (")
    ids = 3 / (3 + 30 * sum(split.rows for split in table.splits.values()))
    assert found == [line.format(ids=ids) for line in said]


def test_finished_shards_survive_a_bad_byte(tmp_path, monkeypatch):
    """The build that goes on with `--bad-bytes replace` keeps what stood before the byte."""
    from xdscale.shards.sources.text import TextOptions, build_shards

    text = "\n\n".join(" ".join(["river"] * 400) + f" {n}" for n in range(9)).encode()
    (tmp_path / "a.txt").write_bytes(text[:-30] + b"\xff" + text[-30:])
    options = {"language_tokenizer": "package:cognition/model", "sequence_length": 30, "shard_text_bytes": 2000}
    monkeypatch.setattr("xdscale.shards.sources.decoding.PIECE_BYTES", 1000)
    monkeypatch.setattr("xdscale.shards.sources.corpus.SAMPLE_CHARACTERS", 1000)
    with pytest.raises(XdscaleError, match=r"\(0xff\) is not UTF-8"):
        build_shards([tmp_path / "a.txt"], tmp_path / "out", TextOptions(**options))
    steps = []
    manifest = build_shards(
        [tmp_path / "a.txt"], tmp_path / "out", TextOptions(bad_bytes="replace", **options), on_progress=steps.append
    )
    assert steps[-1].kept_shards == 8
    assert manifest.counts["bad_bytes"] == 1
    for name, value in (
        ("encoding", "klingon"),
        ("encoding", "hex"),
        ("encoding", "idna"),
        ("encoding", "punycode"),
        ("bad_bytes", "ignore"),
        ("line_breaks", "no"),
    ):
        with pytest.raises(XdscaleError, match=f"{name} = '{value}'"):
            build_shards([tmp_path / "a.txt"], tmp_path / "out", TextOptions(**options | {name: value}))


def test_every_option_of_a_build_is_passed_on(monkeypatch):
    values = {
        "language_tokenizer": "package:cognition/model",
        "sequence_length": 30,
        "clip_blocks": 2,
        "validation_fraction": 0.25,
        "min_words": 7,
        "format": "jsonl",
        "text_field": "body",
        "encoding": "latin-1",
        "bad_bytes": "replace",
        "line_breaks": "keep",
    }
    found = []
    monkeypatch.setattr("xdscale.shards.commands.build_and_report", lambda *arguments: found.extend(arguments))
    options = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]
    options += ["--workers", 3, "--part", "1/2", "--overwrite"]
    assert run("build", "a", "b", "--out", "/o", *options).exit_code == 0
    build, out, _, workers, part, overwrite, tokenizer = found
    asked = build.keywords["options"]
    assert (*build.args, str(out), workers, (part.index, part.of), overwrite) == (["a", "b"], "/o", 3, (1, 2), True)
    assert tokenizer == asked.language_tokenizer
    assert asked.model_dump(include=set(values)) == values


@pytest.mark.parametrize(
    ("held_out", "options", "files"),
    [
        ([], {}, []),
        (["--validation-fraction", "0.25"], {"validation_fraction": 0.25}, []),
        (["--karpathy", "k"], {"split": "karpathy"}, [Path("k")]),
        (["--held-out", "l"], {"split": "list"}, [Path("l")]),
        (["--validation", "v", "--validation", "w"], {"split": "files"}, [Path("v"), Path("w")]),
    ],
)
def test_every_option_of_captions_is_passed_on(monkeypatch, held_out, options, files):
    asked = []
    monkeypatch.setattr("xdscale.shards.sources.captions.CaptionSource", lambda *given: asked.append(given))

    def build_table(source, out, *, on_progress, **how):
        asked.append((out, how))
        raise XdscaleError("asked")

    monkeypatch.setattr("xdscale.shards.build.build_table", build_table)
    words = ["--out", "/o", "--language-tokenizer", "t", "--missing", "leave-out", "--workers", "3", "--overwrite"]
    with pytest.raises(XdscaleError, match="^asked$"):
        run("captions", "a", "b", *words, *held_out)
    wanted = CaptionOptions(missing="leave-out", **options)
    assert asked == [
        ([Path("a"), Path("b")], Path("/o"), "t", wanted, files),
        (Path("/o"), {"workers": 3, "overwrite": True}),
    ]


@pytest.mark.parametrize(
    ("words", "work", "told", "shown"),
    [
        (["build", "a"], "sources.text.build_shards", (Progress({"documents": 3}, 1, 2, 0, 0),), (1, 2, 3)),
        (["captions", "a"], "build.build_table", (Progress({}, 1, 2, 0, 0),), (1, 2)),
        (["merge", "/o"], "build.merge_parts", (1, 2), (1, 2)),
        (["verify", "/o"], "verify.verify_shards", (1, 2), (1, 2)),
    ],
)
def test_how_far_the_work_is_is_said(monkeypatch, words, work, told, shown):
    said = []

    @contextlib.contextmanager
    def progress(what):
        yield lambda *numbers: said.append(numbers)

    def worked(*_, on_progress, **__):
        on_progress(*told)
        raise XdscaleError("worked")

    monkeypatch.setattr("xdscale.shards.progress.shown_progress", progress)
    monkeypatch.setattr(f"xdscale.shards.{work}", worked)
    monkeypatch.setattr("xdscale.shards.sources.captions.CaptionSource", lambda *given: None)
    more = ["--out", "/o", "--language-tokenizer", "t"] if words[1] == "a" else []
    with pytest.raises(XdscaleError, match="^worked$"):
        run(*words, *more)
    assert said == [shown]


def test_overwrite_and_bad_values(small_corpus, tmp_path):
    build(small_corpus, tmp_path / "out")
    with pytest.raises(XdscaleError, match="min_words 5, now 9"):
        build(small_corpus, tmp_path / "out", "--min-words", 9)
    assert build(small_corpus, tmp_path / "out", "--min-words", 9, "--overwrite").exit_code == 0
    assert build(small_corpus, tmp_path / "out", "--workers", 0).exit_code == 2
    with pytest.raises(XdscaleError, match=r"none\.txt: no such file"):
        build("none.txt", tmp_path / "other")


def test_verify(small_dataset, tmp_path):
    shards = list(small_dataset.glob("*.tar"))
    assert (
        f"{len(shards)} shards, {sum(path.stat().st_size for path in shards):,} bytes, all as built"
        in run("verify", small_dataset).stdout
    )
    with pytest.raises(XdscaleError, match="no such folder"):
        run("verify", tmp_path / "none")


def test_info_shows_splits_and_the_share_that_was_cut(small_dataset):
    output = run("info", small_dataset).stdout
    manifest = Manifest.load(small_dataset).tables["text"]
    split = manifest.splits["train"]
    row = next(line for line in output.splitlines() if "│ train" in line)
    for number in (len(split.shards), split.rows, split.elements["clip_offsets"]):
        assert f" {number:,} " in row
    cut = next(line for line in output.splitlines() if "over 1, cut" in line)
    assert f" {sum(split.counts['blocks_needed'][1:]) / split.rows:.2%} " in cut


def test_info_shows_every_number_of_blocks_that_some_text_needs(small_dataset, tmp_path):
    """By hand: of 10 texts for training 3 need one block, 5 two and 2 four; one of validation needs five."""
    values = json.loads(Manifest.load(small_dataset).to_json())
    for split, needed in (("train", [3, 5, 0, 2]), ("validation", [0, 0, 0, 0, 1])):
        one = values["tables"]["text"]["splits"][split]
        (shard,) = one["shards"] = [one["shards"][0] | {"rows": sum(needed)}]
        one |= {"rows": shard["rows"], "counts": {"blocks_needed": needed}}
    values["tables"]["text"]["build"]["clip_blocks"] = 2
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(values))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in run("info", tmp_path).stdout.splitlines()]
    begin = next(number for number, cells in enumerate(lines) if cells and cells[0] == "over 2, cut")
    assert lines[begin - 4 : begin + 1] == [
        ["1", "30.00%", "0.00%"],
        ["2", "50.00%", "0.00%"],
        ["4", "20.00%", "0.00%"],
        ["5", "0.00%", "100.00%"],
        ["over 2, cut", "20.00%", "100.00%"],
    ]


def test_info_of_a_folder_with_brackets_in_its_name(small_dataset, tmp_path):
    """Which would be markup to what draws the tables."""
    folder = tmp_path / "run[/bold] [red]"
    folder.parent.mkdir()
    folder.symlink_to(small_dataset)
    assert run("info", folder).stdout.startswith(f"{folder}: sequences of")


@pytest.mark.parametrize("change", [{"build": {}}, {"build": {"source": "text"}}, {"counts": {}}])
def test_info_names_what_no_source_wrote(small_dataset, tmp_path, change):
    values = json.loads(Manifest.load(small_dataset).to_json())
    values["tables"]["text"] |= change
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(values))
    with pytest.raises(
        XdscaleError, match=r"dataset\.json: tables\.text: build or counts are not as its source writes"
    ):
        run("info", tmp_path)


def test_info_shows_documents_by_their_tokens(small_dataset):
    output = run("info", small_dataset).stdout
    counts = Manifest.load(small_dataset).tables["text"].counts["document_tokens"]
    power = counts.index(max(counts))
    assert f"│ {2 ** (power - 1)} to {2**power - 1} " in output
    shown = [line.split("│") for line in output.splitlines() if "│" in line and " to " in line]
    assert sum(int(cells[2]) for cells in shown) == sum(counts[1:])


def test_parts_and_merge(small_corpus, tmp_path):
    """As a Slurm array runs it: one folder, the index and the count in the environment of each job."""
    build(small_corpus, tmp_path / "whole")
    out = tmp_path / "out"
    for index in range(2):
        result = build(f"{small_corpus.parent}/*.txt", out, "--part", f"{index}/2")
        assert result.stdout.endswith(f"part {index}/2 is finished; when all are: xdscale shards merge {out}\n")
    assert f"{out}: one dataset of 2 shards" in run("merge", out).stdout
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    with pytest.raises(XdscaleError, match="part '2/2': expected i/n with i from 0"):
        build(small_corpus, out, "--part", "2/2")


def test_merge_counts_the_shards_of_each_table(small_corpus, tmp_path):
    boxes = np.array([[0, 0, 5, 5]], np.float32)
    build_regions([RegionImage("a", (9, 9), boxes)], tmp_path, Detector(model="m"))
    for index in range(2):
        build(f"{small_corpus.parent}/*.txt", tmp_path, "--part", f"{index}/2")
    assert run("merge", tmp_path).stdout.startswith(f"{tmp_path}: one dataset of 3 shards: regions 1, text 2\n")
    assert run("merge", tmp_path).stdout == f"{tmp_path}: one dataset of 3 shards: regions 1, text 2\n"  # once more
    assert run("verify", tmp_path).stdout.startswith(f"{tmp_path}: 3 shards, ")


def test_importing_the_commands_is_light():
    """The command line lists all commands at every start: no numpy, pydantic or tokenizers for that."""
    heavy = ("numpy", "pydantic", "tokenizers", "torch", "ftfy")
    code = f"import sys, xdscale.shards.commands; print([n for n in {heavy} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.strip() == "[]"
