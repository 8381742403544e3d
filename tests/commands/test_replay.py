"""Replaying a run folder that came from elsewhere: nothing that its recipe names is executed or written."""

import json
import shutil

import fsspec
import pytest
import yaml

from xdscale.commands.replay import replay
from xdscale.data.opening import open_shards
from xdscale.errors import XdscaleError
from xdscale.recipe import load_recipe
from xdscale.training.distributed import Ranks


@pytest.fixture
def received(short_shards, narrow_model, tmp_path):
    """Writes a run folder that was never trained, as another person might hand it over."""

    def write(shards, **keys):
        run = tmp_path / "received"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        recipe = load_recipe("quickstart", [*narrow_model, "training.steps=3", "training.global_batch=2"])
        values = recipe.model_dump(mode="json")
        values["data"]["shards"] = shards
        values["run"] |= keys
        values["output"]["folder"] = str(tmp_path / "elsewhere")
        (run / "recipe.yaml").write_text(yaml.safe_dump(values))
        (run / "ds_config.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4}))
        return run

    return write


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_command_in_a_received_recipe_is_not_run(received, short_shards, tmp_path):
    marker = tmp_path / "marker"
    run = received(shards=f"pipe:touch {marker}; cat {short_shards}", cache=str(tmp_path / "cache"))
    before = names(tmp_path)
    with pytest.raises(XdscaleError, match=r"recipe\.yaml: data\.shards = 'pipe:touch .* followed only when typed"):
        replay(run, 1)
    assert names(tmp_path) == before
    samples = replay(run, 2, [f"data.shards={short_shards}"])
    assert len(samples) == 2
    assert names(tmp_path) == before
    # The person's own command is followed, into the person's own folder.
    typed = [f"data.shards=pipe:touch {marker}; cat {short_shards}", f"run.cache={tmp_path / 'mine'}"]
    assert replay(run, 2, typed) == samples
    assert marker.exists()
    assert not (tmp_path / "elsewhere").exists()


def test_shards_from_a_url_are_those_that_the_run_fetched(received, short_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("xdscale.shards.remote.PAUSES_SECONDS", ())
    fsspec.filesystem("memory").put(f"{short_shards}/", "/replayed/", recursive=True)
    run = received(shards="memory://replayed", cache=str(tmp_path / "cache"))
    before = names(tmp_path)
    with pytest.raises(XdscaleError, match=r"name a folder for them: run\.cache=FOLDER on the command line"):
        replay(run, 1)
    assert names(tmp_path) == before
    recipe = load_recipe(str(run / "recipe.yaml"))
    open_shards(recipe.data.shards, recipe.run, Ranks(0, 1, 0), ["text"], check=lambda folder: None)
    fetched = names(tmp_path)
    samples = replay(run, 1)
    assert names(tmp_path) == fetched
    assert replay(run, 1, [f"run.cache={tmp_path / 'mine'}"]) == samples
    # A run that kept only some of them.
    some = received(shards="memory://replayed", cache=str(tmp_path / "cache"), cache_bytes=10**8)
    with pytest.raises(XdscaleError, match=r"are not all on this machine; .* run\.cache=FOLDER on the command line"):
        replay(some, 1)
    assert replay(some, 1, [f"run.cache={tmp_path / 'new'}"]) == samples
    assert replay(some, 1, [f"data.shards={short_shards}"]) == samples


def test_a_run_that_may_do_without_shards_is_replayed(received, short_shards):
    """Which ones it did without is found out by verifying, which is otherwise left out."""
    assert len(replay(received(shards=str(short_shards), max_damaged_shards=1), 1)) == 2


def test_only_where_the_shards_are_may_differ(received, short_shards):
    with pytest.raises(XdscaleError, match="only where its data is and run.cache may differ"):
        replay(received(shards=str(short_shards)), 1, ["training.seed=1"])
