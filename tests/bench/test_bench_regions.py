"""The promises of reading image regions, measured: every row of the bench reaches its goal."""

from xdscale.bench.regions import bench_regions


def test_every_promise_is_kept(capsys):
    rows = bench_regions(None, images=128, rounds=3)
    goals = [row for row in rows if row.goal]
    assert len(goals) == 10
    assert [row for row in goals if not row.reached] == []
    printed = capsys.readouterr().out
    assert all(row.goal in printed and row.figure in printed for row in rows)
