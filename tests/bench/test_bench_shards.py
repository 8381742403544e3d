"""The bench of shard building: it runs, and its figures are the quotients that they are called."""

import pytest
from typer.testing import CliRunner

from xdscale.bench.shards import BuildSpeeds
from xdscale.cli import app


def test_figures_are_quotients_of_what_was_measured():
    result = BuildSpeeds([2.0, 3.0, 10.0], [4.0, 4.0, 10.0], {1: [1e6, 2e6, 4e6], 2: [2e6, 3e6, 8e6]}, 12_000_000)
    assert result.speed_per_process == pytest.approx(0.75)
    assert result.gain(2) == pytest.approx(2.0)


def test_bench_shards_prints_both_and_the_hours(wiki_text, cassette_model):
    arguments = ["bench", "shards", str(wiki_text), "--language-tokenizer", str(cassette_model)]
    options = ["--text-mb", "0.4", "--rounds", "1", "--workers", "2"]
    result = CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0
    rows = {row[0]: row[1:] for line in result.stdout.splitlines() if "│" in line for row in [cells(line)]}
    for name in ("tokenizers alone", "shards build"):
        rate, _, hours = rows[name]
        # 14,000 MB at this rate; both are rounded.
        assert float(hours) == pytest.approx(14_000 / 3600 / float(rate), rel=0.05)
    assert 0 < float(rows["build : tokenizers"][0]) < 2
    assert float(rows["2 processes : 1, by the clock"][0]) > 0


def cells(line):
    return [cell.strip() for cell in line.strip("│ ").split("│")]
