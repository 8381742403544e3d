"""A run on shards that are fetched as they are needed is the run on local ones, and says what room it needs."""

import json
from pathlib import Path

import pytest

from xdscale.shards.manifest import Manifest
from xdscale.shards.sources.text import TextOptions, build_shards
from xdscale.training.run_folder import read_log

SEVERAL = Path(__file__).with_name("several_runs.py")


@pytest.fixture(scope="module")
def many_shards(wiki_text, cassette_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("many") / "shards"
    how = {"sequence_length": 30, "validation_fraction": 0.1, "shard_text_bytes": 50_000}
    build_shards([wiki_text], out, TextOptions(language_tokenizer=str(cassette_model), **how))
    return out


@pytest.fixture
def arguments(narrow_model, tmp_path):
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}))

    def make(name, **values):
        settings = {"training.steps": 6, "training.global_batch": 4, "run.eval_samples": 4, "model.dropout": 0}
        settings |= {"output.folder": tmp_path / name} | {key.replace("__", "."): item for key, item in values.items()}
        chosen = [f"{key}={value}" for key, value in settings.items()]
        return ["quickstart", *narrow_model, *chosen, "--deepspeed_config", str(config)]

    return make


def test_a_run_within_a_budget_of_bytes_is_the_local_run(many_shards, arguments, launch_ranks, tmp_path):
    records = Manifest.load(many_shards).shards
    # Two ranks on this node, each with a step's two samples and their partners at most.
    budget = 2 * 4 * max(record.bytes for record in records)
    assert len(records) > 12
    assert budget < sum(record.bytes for record in records)
    remote = {"data__shards": f"file://{many_shards}", "run__cache": tmp_path / "cache"}
    runs = {
        "local": arguments("local", data__shards=many_shards),
        "remote": arguments("remote", run__cache_bytes=budget, **remote),
    }
    done = launch_ranks(SEVERAL, json.dumps(runs), ranks=2)
    assert done.code == 0, done.stderr[-3000:]
    local, found = (
        [entry for entry in read_log(tmp_path / name / "log.jsonl") if entry["kind"] in ("step", "validation")]
        for name in ("local", "remote")
    )
    assert len(local) > 6
    names = {name for entry in local for name in entry if "loss" in name or "accuracy" in name or name == "samples"}
    assert len(names) >= 8
    for ours, theirs in zip(local, found, strict=True):
        assert [ours.get(name) for name in sorted(names)] == [theirs.get(name) for name in sorted(names)]
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= budget
    # The largest shard fits, a step's do not.
    small = arguments("small", run__cache_bytes=2 * max(record.bytes for record in records), **remote)
    refused = launch_ranks("xdscale.train", *small, ranks=2)
    assert refused.code == 2
    assert "run.cache_bytes = " in refused.stderr
    assert "set it to " in refused.stderr
    assert "Traceback" not in refused.stderr
