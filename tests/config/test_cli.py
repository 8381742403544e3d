"""The `xdscale` command: quick to start, one message per mistake."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("xdscale")


def run(*arguments):
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["shards", "--help"], ["shards", "build", "--help"]])
def test_starts_within_two_seconds_where_it_needs_no_torch(arguments):
    assert run(*arguments).returncode == 0  # compiles what a first run compiles
    began = time.perf_counter()
    run(*arguments)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["params", "xdbert-bse-wikitext103"], "did you mean 'xdbert-base-wikitext103'"),
        (["export", "nowhere", "out"], "nowhere: not a run folder"),
        (["shards", "verify", "nowhere"], "nowhere"),
        (["shards", "build", "nowhere.txt", "--out", "o", "--language-tokenizer", "t"], "nowhere.txt"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "counts"),
    [
        ("xdbert-base-wikitext103", {"109,482,240", "63,165,952", "14,574,336", "202,059,009"}),
        ("xdelectra-large-wikitext103", {"334,092,288", "63,165,952", "22,575,616", "442,671,617"}),
    ],
)
def test_params_prints_the_papers_table_6(recipe, counts):
    """Spec xdbert §10 fact 1, for the shipped recipes."""
    assert counts <= set(re.findall(r"[\d,]{6,}", run("params", recipe).stdout))
