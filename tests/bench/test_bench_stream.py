"""The promises of the stream, measured: every row of the bench reaches its goal."""

from xdscale.bench.stream import bench_stream


def test_every_promise_is_kept(wiki_shards, capsys):
    rows = bench_stream(wiki_shards, samples=6000, rounds=3)
    goals = [row for row in rows if row.goal]
    assert len(goals) == 4
    assert [row for row in goals if not row.reached] == []
    printed = capsys.readouterr().out
    assert all(row.goal in printed and row.figure in printed for row in rows)
