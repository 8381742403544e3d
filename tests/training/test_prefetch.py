"""The prefetcher keeps order, passes errors on, bounds its lead, measures waiting and ends cleanly."""

import threading
import time

import pytest

from xdscale.training.prefetch import HINTS_AHEAD, Prefetcher


def prefetch_threads() -> int:
    return sum(thread.name == "xdscale-prefetch" for thread in threading.enumerate())


def test_items_come_in_order_and_the_thread_ends():
    with Prefetcher(lambda step: step * step, range(3, 50)) as items:
        assert list(items) == [(step, step * step) for step in range(3, 50)]
        assert list(items) == []
    assert prefetch_threads() == 0


def test_an_error_reaches_the_consumer_after_the_items_before_it():
    def prepare(step: int) -> int:
        if step == 3:
            raise ValueError("sample 42 is broken")
        return step

    with Prefetcher(prepare, range(9)) as items:
        assert [next(items) for _ in range(3)] == [(0, 0), (1, 1), (2, 2)]
        with pytest.raises(ValueError, match="sample 42 is broken"):
            next(items)


def test_it_runs_ahead_by_no_more_than_its_depth():
    prepared = []
    with Prefetcher(prepared.append, range(100), depth=2) as items:
        assert settled(prepared, 3) == 3  # two wait ready, one is in the thread's hands
        next(items)
        assert settled(prepared, 4) == 4


def settled(prepared: list, expected: int) -> int:
    """Returns the length once the expected one is reached and there was time to go beyond it."""
    deadline = time.monotonic() + 10
    while len(prepared) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    return len(prepared)


def test_waiting_is_measured():
    with Prefetcher(lambda step: time.sleep(0.05), range(6)) as items:
        list(items)
    assert 0.2 < items.wait_seconds < 3
    with Prefetcher(lambda step: step, range(6)) as items:
        time.sleep(0.1)
        for _ in items:
            time.sleep(0.03)
    assert items.wait_seconds < 0.15


def test_close_ends_a_thread_that_has_no_room_left_and_may_be_repeated():
    items = Prefetcher(lambda step: step, range(10**9))
    next(items)
    items.close()
    items.close()
    assert prefetch_threads() == 0
    assert list(items) == []


def test_hints_come_ahead_of_the_items_and_for_every_step():
    """So that what takes long is on its way; an error in one reaches the consumer."""
    seen = []
    with Prefetcher(
        lambda step: seen.append(("item", step)), range(5, 40), hint=lambda step: seen.append(("hint", step))
    ) as items:
        assert [step for step, _ in items] == list(range(5, 40))
    assert [step for kind, step in seen if kind == "hint"] == list(range(5, 40))
    for step in range(5, 40):
        before = seen[: seen.index(("item", step))]
        assert ("hint", min(39, step + HINTS_AHEAD)) in before

    def fail(step):
        raise ValueError(f"no room for step {step}")

    with (
        Prefetcher(lambda step: step, range(3), hint=fail) as items,
        pytest.raises(ValueError, match="no room for step 0"),
    ):
        next(items)
