"""What long work says about itself, by a clock that the test moves."""

import io
import sys

import pytest

from xdscale.shards import progress
from xdscale.shards.progress import Pace, shown_progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_rate_and_time_left():
    clock = Clock()
    pace = Pace(clock)
    clock.now += 100
    # 250 MB in 100 s are 2.5 MB/s; the other 13,750 MB take 5,500 s.
    assert pace.describe(250_000_000, 14_000_000_000, 1204) == (
        "1,204 documents, 0.25 of 14.00 GB (1.8%), 2.50 MB/s, 1:31:40 left"
    )


def test_shards_kept_from_an_earlier_run_do_not_promise_too_much():
    """5 GB are skipped in 10 s; then 2 MB/s. After the window the rate is that of the work alone."""
    clock = Clock()
    pace = Pace(clock)
    clock.now += 10
    pace.describe(5_000_000_000, 14_000_000_000)
    for step in range(1, 101):
        clock.now += 7
        text = pace.describe(5_000_000_000 + step * 14_000_000, 14_000_000_000)
    assert ", 2.00 MB/s, 1:03:20 left" in text  # (14,000 - 6,400) MB at 2 MB/s are 3,800 s


@pytest.mark.parametrize(("seconds", "rate"), [(300, "2.00"), (301, "1.00")])
def test_the_rate_is_that_of_the_last_five_minutes(seconds, rate):
    """Of 100 MB at once and 1 MB a second from then on what is older than that is forgotten."""
    clock = Clock()
    pace = Pace(clock)
    pace.describe(0, 10**9)
    clock.now += 1
    pace.describe(301_000_000, 10**9)
    clock.now += seconds
    text = pace.describe(301_000_000 + seconds * 1_000_000 + (seconds == 300) * 1_000_000, 10**9)
    assert f", {rate} MB/s, " in text


def test_counted_work_says_how_far_it_is(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    seen = []
    for number, item in progress.counted("predicting val, batches", "abcdef"):
        seen.append((number, item))
        clock.now += 15
    assert seen == list(enumerate("abcdef"))
    assert capsys.readouterr().err == (
        "predicting val, batches: 2/6, 0:01:00 left\npredicting val, batches: 4/6, 0:00:30 left\n"
    )


def test_ends_and_beginnings():
    assert Pace(lambda: 0.0).describe(0, 0) == "0.00 of 0.00 MB (100.0%)"
    assert Pace(lambda: 0.0).describe(1_000_000, 4_000_000) == "1.00 of 4.00 MB (25.0%)"
    assert Pace(lambda: 0.0).describe(0, 10**9, 0) == "0 documents, 0.00 of 1.00 GB (0.0%)"
    assert Pace(lambda: 0.0).describe(0, 10**9 - 10**7) == "0.00 of 990.00 MB (0.0%)"
    clock = Clock()
    pace = Pace(clock)
    clock.now += 4
    assert pace.describe(0, 20) == "0.00 of 0.00 MB (0.0%)"  # nothing tells how long
    clock.now += 6
    assert pace.describe(10, 20) == "0.00 of 0.00 MB (50.0%), 0.00 MB/s, 0:00:10 left"


def test_plain_lines_now_and_then_where_there_is_no_terminal(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with shown_progress("building") as advance:
        for step in range(1, 101):
            clock.now += 1
            advance(step * 1_000_000, 1_000_000_000, step)
    lines = sys.stderr.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("building: 30 documents, 0.03 of 1.00 GB (3.0%)")


def test_a_terminal_gets_a_bar_with_the_same_words(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with shown_progress("building") as advance:
        advance(500_000, 1_000_000, 7)
    assert "7 documents, 0.50 of 1.00 MB (50.0%)" in sys.stderr.getvalue()
