"""Visually grounded ratio: the paper's own marked examples, counted words, and files with mistakes."""

import csv
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from xdscale.analysis.comparison import read_comparison
from xdscale.analysis.grounded_ratio import (
    GroundedWords,
    Grounding,
    default_stop_words,
    is_punctuation,
    read_captions,
    read_stop_words,
)
from xdscale.cli import app
from xdscale.errors import XdscaleError
from xdscale.shards.language import load_language_tokenizer

# Paper Appendix D, as printed: **grounded**, (stop word or punctuation), the rest not grounded.
EXAMPLES = {
    "improved 1": """**hands across** (the) divide (was) formed (in) march 2001 (,) (and) **one** (of) (its) immediate
        aims (was) (to) press (for) (more) freedom (of) contact (and) communication **right away** (between) (the) **two
        parts** (of) cyprus (,) (and) (for) early **progress towards** (a) solution (to) (') (the) cyprus problem (')
        (.) cyprus (was) divided (into) **two parts** (in) march 2001 (.)""",
    "improved 2": """(it) (is) hoped (that) **women** (,) (who) constitute (more) (than) **half** (of) (the) population
        (,) (will) vote (for) (other) **women** (and) ensure (that) (their) issues (are) represented (in) parliament (.)
        **women** (are) poorly represented (in) parliament (.)""",
    "improved 3": """**ho** ##dler claimed (there) (were) **also** irregularities (in) (the) campaigns **organized**
        (by) atlanta (for) (the) 1996 summer **games** (,) sydney (for) (the) summer olympics (in) 2000 (and) salt
        **lake city** (for) (the) 2002 **winter games** (.) (before) salt **lake city** (,) **winter** olympic **games**
        took **place** (in) naga ##no (.)""",
    "on par 2": """security forces (were) (on) **high** alert (after) (an) election campaign (in) (which) (more) (than)
        1 (,) 000 **people** (,) **including seven** election candidates (,) (have) (been) killed (.) security forces
        (were) (on) **high** alert (after) (a) campaign marred (by) violence (.)""",
    "on par 3": """(in) 1979 (,) (the) leaders signed (the) egypt (-) israel peace treaty (on) (the) **white house
        lawn** (,) (both) president begin (and) **sad** ##at received (the) nobel peace prize (for) (their) **work** (.)
        (the) **two** nations (have) enjoyed peaceful relations (to) (this) **day** (.) (the) israel (-) egypt peace
        agreement (was) signed (in) 1979 (.)""",
}  # fmt: skip
# The fraction that the paper prints above each example, and what its marks add up to. Only one pair is equal: the
# others differ in the words that are not grounded (and once in a grounded one), so the paper's sums are off by hand.
PRINTED = {
    "improved 1": (11, 16), "improved 2": (4, 10), "improved 3": (13, 17), "on par 2": (5, 16), "on par 3": (8, 16),
}  # fmt: skip
MARKED = {
    "improved 1": (11, 19), "improved 2": (4, 11), "improved 3": (13, 18), "on par 2": (5, 16), "on par 3": (7, 24),
}  # fmt: skip


def marked_tokens(text):
    """Returns (word piece, mark) for each piece of a marked text."""
    pieces = []
    for number, part in enumerate(text.split("**")):
        for word in part.split():
            mark = "grounded" if number % 2 else "dropped" if re.fullmatch(r"\(.+\)", word) else "other"
            pieces.append((word[1:-1] if mark == "dropped" else word, mark))
    return pieces


@pytest.fixture(scope="module")
def tokenizer(cassette_model):
    """Its vocabulary is BERT-base-uncased's, the paper's."""
    return load_language_tokenizer(str(cassette_model))[0]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_papers_examples_mark_by_mark(name, tokenizer, tmp_path):
    """Fact 11. Grounded pieces stand 101 times in the captions, all others 100 times: only the threshold tells."""
    pieces = marked_tokens(EXAMPLES[name])
    text = " ".join(piece for piece, _ in pieces).replace(" ##", "")
    assert tokenizer.encode(text, add_special_tokens=False).tokens == [piece for piece, _ in pieces]
    vocabulary = {piece: mark for piece, mark in pieces if not piece.startswith("##")}
    captions = tmp_path / "captions.txt"
    captions.write_text(
        "".join(f"{piece}\n" * (101 if mark == "grounded" else 100) for piece, mark in vocabulary.items()), "utf-8"
    )
    words = GroundedWords(tokenizer, read_captions([str(captions)]), default_stop_words())
    for piece, mark in vocabulary.items():
        found = words.of(piece)
        assert (found.grounded, found.other) == {"grounded": (1, 0), "other": (0, 1), "dropped": (0, 0)}[mark], piece
    found = words.of(text)
    assert (found.grounded, found.other) == MARKED[name]
    assert found.ratio == MARKED[name][0] / sum(MARKED[name])


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("improved 1", 0.4074),
        ("improved 2", 0.2857),
        ("improved 3", 0.4333),
        ("on par 2", 0.2381),
        ("on par 3", 0.3333),
    ],
)
def test_the_papers_fractions_give_its_ratios(name, ratio):
    assert round(Grounding(*PRINTED[name]).ratio, 4) == ratio


def test_the_stop_words_are_the_papers():
    """Words that other lists hold (scikit-learn's: these five) count in the paper; its bracketed ones never do."""
    pieces = [item for text in EXAMPLES.values() for item in marked_tokens(text)]
    counted = {piece for piece, mark in pieces if mark != "dropped"}
    dropped = {piece for piece, mark in pieces if mark == "dropped" and not is_punctuation(piece)}
    assert {"one", "two", "across", "also", "towards"} <= counted
    assert not counted & default_stop_words()
    assert len(dropped) > 30
    assert dropped <= default_stop_words()


def test_counts_equal_a_plain_counter(tokenizer, wiki_text):
    def pieces_of(text):
        return tokenizer.encode(text, add_special_tokens=False).tokens

    lines = wiki_text.read_text(encoding="utf-8").splitlines()[:300]
    counter = Counter(piece for line in lines for piece in pieces_of(line))
    words = GroundedWords(tokenizer, iter(lines), frozenset({"the"}), threshold=7)
    frequent = {piece for piece, count in counter.items() if count > 7 and piece != "the" and not is_punctuation(piece)}
    assert words.grounded_pieces == len(frequent) > 100
    text = lines[20] + " the the ."
    kept = [
        piece
        for piece in tokenizer.encode(text, add_special_tokens=False).tokens
        if piece != "the" and not is_punctuation(piece)
    ]
    found = words.of(text)
    assert found.grounded == sum(piece in frequent for piece in kept)
    assert found.grounded + found.other == len(kept)


def test_a_text_of_stop_words_alone_has_no_ratio(tokenizer):
    assert GroundedWords(tokenizer, iter(()), default_stop_words()).of("It is, and was not.").ratio is None


@pytest.mark.parametrize(("piece", "answer"), [("...", True), ("##,", True), ("。", True), ("$", True), ("#", True), ("##s", False), ("1", False)])  # fmt: skip  # noqa: E501
def test_punctuation(piece, answer):
    assert is_punctuation(piece) is answer


def test_captions_come_from_coco_text_patterns_and_gzip(tmp_path):
    captions = ["A cat on a mat.", "Two dogs."]
    coco = {"images": [], "annotations": [{"id": n, "caption": text} for n, text in enumerate(captions)]}
    (tmp_path / "captions_train.json").write_text(json.dumps(coco))
    with gzip.open(tmp_path / "captions_val.json.gz", "wt") as file:
        json.dump(coco, file)
    (tmp_path / "more.txt").write_text("A horse.\n")
    read = [text.strip() for text in read_captions([str(tmp_path / "captions_*"), str(tmp_path / "more.txt")])]
    assert read == [*captions, *captions, "A horse."]


COMPARISON = [
    {"id": "7", "sentence1": "A cat sat.", "sentence2": "It slept,\nran.", "correct_baseline": 1, "correct_ours": 5},
    {"id": "8", "sentence1": "Parliament voted.", "sentence2": "", "correct_baseline": 4, "correct_ours": 0},
    {"id": "9", "sentence1": "It was on.", "sentence2": "", "correct_baseline": 2, "correct_ours": 3},
    {"id": "10", "sentence1": "A cat voted.", "sentence2": "", "correct_baseline": 5, "correct_ours": 5},
]  # fmt: skip


def write_comparison(path, rows=COMPARISON):
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def test_csv_and_jsonl_say_the_same(tmp_path):
    examples = read_comparison(write_comparison(tmp_path / "a.csv"), runs=5)
    assert examples == read_comparison(write_comparison(tmp_path / "a.jsonl"), runs=5)
    assert [example.category for example in examples] == ["improved", "worsened", "improved", "equal"]
    assert examples[0].texts == ("A cat sat.", "It slept,\nran.")
    assert examples[1].texts == ("Parliament voted.",)


def run(*arguments):
    result = CliRunner().invoke(app, ["grounded-ratio", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result


def test_the_command_states_the_split_and_writes_every_example(tmp_path, cassette_model):
    (tmp_path / "captions.txt").write_text("cat sat\n" * 3 + "ran\n" * 2)
    comparison = write_comparison(tmp_path / "rte.csv")
    result = run(
        comparison, "--captions", tmp_path / "captions.txt", "--tokenizer", cassette_model, "--threshold", 2,
        "--runs", 5, "--out", tmp_path / "ratios.csv", "--plot", tmp_path / "box.png",
    )  # fmt: skip
    # cat, sat grounded; slept, ran not: 2/4. parliament, voted: 0/2. Stop words alone: no ratio. cat, voted: 1/2.
    assert (
        "rte: +1 correct answers, +5.00% over 5 runs; 1 of stop words and punctuation alone are left out"
        in result.stdout
    )
    table = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.split()[1:]}
    assert table["improved"] == ["1", "0.5000", "0.5000", "0.5000", "0.5000"]
    assert table["worsened"] == ["1", "0.0000", "0.0000", "0.0000", "0.0000"]
    assert table["equal"] == ["1", "0.5000", "0.5000", "0.5000", "0.5000"]
    with (tmp_path / "ratios.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["data", "id", "category", "grounded", "not_grounded", "ratio"],
        ["rte", "7", "improved", "2", "2", "0.5"],
        ["rte", "8", "worsened", "0", "2", "0.0"],
        ["rte", "9", "improved", "0", "0", ""],
        ["rte", "10", "equal", "1", "1", "0.5"],
    ]
    assert (tmp_path / "box.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    assert result.stderr.strip() == ""


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", r"\.: is a folder; expected the name of a file"),
        ("nowhere/r.csv", "the folder .*nowhere does not exist"),
        ("rte.csv", "--out .*: is one of the comparisons, which would be lost"),
        ("link.csv", "--out .*: is one of the comparisons, which would be lost"),
        ("/dev/full", "/dev/full: cannot be written: No space left on device"),
    ],
)
def test_an_output_that_cannot_be_written_is_named(tmp_path, cassette_model, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    Path("captions.txt").write_text("it\n")
    comparison = write_comparison(tmp_path / "rte.csv")
    Path("link.csv").symlink_to("rte.csv")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(XdscaleError, match=message):
        run(comparison, "--captions", "captions.txt", "--tokenizer", cassette_model, "--out", out)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Path("/dev/full").is_char_device()


def test_own_stop_words_replace_the_list(tmp_path, cassette_model):
    (tmp_path / "stop.txt").write_text("Cat\nparliament\n")
    (tmp_path / "captions.txt").write_text("it\n")
    comparison = write_comparison(tmp_path / "rte.csv")
    words = tmp_path / "stop.txt", tmp_path / "captions.txt", tmp_path / "r.csv"
    run(
        comparison, "--stop-words", words[0], "--captions", words[1], "--tokenizer", cassette_model, "--threshold", 0,
        "--out", words[2],
    )  # fmt: skip
    # "It was on.": only "it" stands in the captions, and nothing is dropped but the full stop.
    assert words[2].read_text().splitlines()[3] == "rte,9,improved,1,2,0.3333333333333333"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,sentence1,correct_ours\n", "a.csv, line 1: the header lacks correct_baseline; it has id"),
        ("a.csv", "", "a.csv, line 1: the header lacks id, sentence1"),
        ("a.csv", "id,sentence1,correct_baseline,correct_ours\n1,x,2\n", "a.csv, line 2: does not have the 4 columns"),
        ("a.csv", "id,sentence1,correct_baseline,correct_ours\n1,x,2,3\n1,y,2,3\n", "line 3: id '1' stands in line 2"),
        ("a.csv", "id,sentence1,correct_baseline,correct_ours\n1,x,2,1e1\n", "line 2: correct_ours = '1e1'; expected"),
        (
            "a.csv",
            "id,sentence1,correct_baseline,correct_ours\n1,x,2,6\n",
            "line 2: correct_ours = 6, but there were 5",
        ),
        ("a.csv", "id,sentence1,correct_baseline,correct_ours\n1,,2,3\n", "line 2: sentence1 missing or empty"),
        ("a.csv", "id,sentence1,correct_baseline,correct_ours\n", "a.csv: holds no examples"),
        ("a.csv", b"id,sentence1\n\xff\n", "a.csv, line 2: not UTF-8"),
        ("a.jsonl", '{"id": 1}\n', "a.jsonl, line 1: sentence1, correct_baseline, correct_ours missing"),
        ("a.jsonl", "\n{oops\n", "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"id": ' + "1" * 5000 + "}\n", "a.jsonl, line 1: not JSON (Exceeds the limit"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: expected a JSON object, found list"),
        ("a.jsonl", '{"id": 1, "sentence1": "x", "correct_baseline": true, "correct_ours": 1}', "line 1: correct_base"),
        ("a.tsv", "", "a .csv or a .jsonl file"),
    ],
)
def test_a_bad_comparison_is_named_with_its_line(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(XdscaleError, match=re.escape(message)):
        read_comparison(path, runs=5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", b'{"annotations": [{"caption": "a"}, {"id": 2}]}', r"c.json: annotations\[1\] has no 'caption'"),
        ("c.json", b'{"annotations":\n nothing}', "c.json, line 2: not JSON"),
        ("c.json", b'{"annotations": ' + b"1" * 5000 + b"}", "c.json: not JSON .Exceeds the limit"),
        ("c.json", b"[]", "c.json: expected COCO captions"),
        ("c.txt", b"one\ntwo\n\xff\n", "c.txt, line 3: not UTF-8"),
        ("c.txt.gz", b"no gzip", "c.txt.gz, line 1: cannot be read"),
    ],
)
def test_bad_captions_are_named_with_their_place(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(XdscaleError, match=message):
        list(read_captions([str(tmp_path / name)]))


def test_missing_files_are_named(tmp_path, cassette_model):
    with pytest.raises(XdscaleError, match="nowhere.txt: no such file"):
        list(read_captions(["nowhere.txt"]))
    with pytest.raises(XdscaleError, match=r"captions_\*.json: no file has such a name"):
        list(read_captions([str(tmp_path / "captions_*.json")]))
    with pytest.raises(XdscaleError, match="a.csv: cannot be read"):
        read_comparison(tmp_path / "a.csv")
    (tmp_path / "stop.txt").write_text("a\nthe and\n")
    with pytest.raises(XdscaleError, match="stop.txt, line 2: expected one stop word per line, found 'the and'"):
        read_stop_words(tmp_path / "stop.txt")
    with pytest.raises(XdscaleError, match="two comparisons are called 'a'"):
        run("x/a.csv", "y/a.csv", "--captions", "c", "--tokenizer", cassette_model)
