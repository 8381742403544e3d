"""Real runs on captions with regions, on a mixture with texts, and on pixels: continued, damaged, moved, exchanged."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from xdscale.errors import EXIT_BAD_INPUT
from xdscale.shards.manifest import Manifest
from xdscale.shards.sources.text import TextOptions, build_shards
from xdscale.shards.table import Table
from xdscale.train import main
from xdscale.training.checkpoint import read_position
from xdscale.training.checkpoint_folder import list_checkpoints, step_of
from xdscale.training.run_folder import read_log

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # fixtures make many runs
SEVERAL = Path(__file__).with_name("several_runs.py")

MIXTURE = ["quickstart-vlbert", "model.max_elements=24"]
SYSTEMS = {
    "visualbert": ["quickstart-visualbert", "model.region_size=12"],
    "vlbert": [*MIXTURE, "model.region_size=12", "model.region_classes=7"],
    "vlbert-pixels": [
        *MIXTURE, "model.region_size=2048", "model.region_classes=5",
        "model.pixels={weights: TRUNK, short_side: 32, long_side: 48}",
    ],
}  # fmt: skip
OBJECTIVES = {"visualbert": ("mlm", "match"), "vlbert": ("mlm", "text_mlm", "masked_region")}
OBJECTIVES["vlbert-pixels"] = OBJECTIVES["vlbert"]
LONE = ("visualbert", "vlbert")


class Runs:
    """Small runs, several in a row, on copies of datasets."""

    def __init__(self, datasets, trunk, model, folder, launch_ranks):
        self.datasets, self.trunk, self.folder, self.launch_ranks = datasets, trunk, folder, launch_ranks
        self.model, self.said = model, {}

    def data(self, system, name):
        """A copy of a system's dataset that a test may change."""
        copy = self.folder / f"data-{name}"
        if not copy.exists():
            shutil.copytree(self.datasets[system], copy)
        return copy

    def arguments(self, system, name, *overrides, stage=2, shards=None):
        config = self.folder / f"zero{stage}.json"
        zero = {"stage": stage, "reduce_bucket_size": 1_000_000}
        config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}))
        settings = {"data.shards": shards or self.datasets[system], "output.folder": self.folder / name}
        settings |= {"training.steps": 6, "training.global_batch": 8, "run.checkpoint_every": 2, "run.eval_samples": 4}
        chosen = [f"{key}={value}" for key, value in settings.items()]
        own = [value.replace("TRUNK", str(self.trunk)) for value in SYSTEMS[system]]
        return [*own, *self.model, *chosen, "run.keep_checkpoints=9", *overrides, "--deepspeed_config", str(config)]

    def launch(self, runs, ranks=2):
        """Runs `{name: arguments}` in turn, on the same ranks."""
        done = self.launch_ranks(SEVERAL, json.dumps(runs), ranks=ranks, timeout_seconds=500)
        assert done.code == 0, done.stderr[-3000:]
        for part in done.stderr.split("== ")[1:]:
            name, text = part.split("\n", 1)
            self.said[name] = self.said.get(name, "") + text

    def continue_a_part(self, system):
        """As if the whole run had been killed in step 4: the newest checkpoint is that of step 2, the log is ahead."""
        shutil.copytree(self.folder / f"whole-{system}", self.folder / f"parts-{system}")
        for later in (4, 6):
            shutil.rmtree(self.checkpoint(f"parts-{system}", later))
        self.launch({f"parts-{system}": self.arguments(system, f"parts-{system}")})

    def entries(self, name, kind="step"):
        return [entry for entry in read_log(self.folder / name / "log.jsonl") if entry["kind"] == kind]

    def checkpoint(self, name, step):
        return self.folder / name / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def datasets(captioned_pictures, grounded_pictures, photographs):
    return dict(zip(SYSTEMS, (captioned_pictures, grounded_pictures, photographs)))


def cut(path):
    path.write_bytes(path.read_bytes()[:-512])


@pytest.fixture(scope="module")
def first(datasets, small_trunk, narrow_bert, tmp_path_factory, launch_ranks):
    """Fresh runs of two ranks: whole ones with dropout, ones that stop on the way, ones that fetch what they read."""
    runs = Runs(datasets, small_trunk, narrow_bert, tmp_path_factory.mktemp("regions"), launch_ranks)
    started = {}
    for system in LONE:
        # In launches of their own: which bits the same sums end in depends on what a process computed before.
        runs.launch({f"whole-{system}": runs.arguments(system, f"whole-{system}")})
        shards = runs.data(system, f"half-{system}")
        started[f"half-{system}"] = runs.arguments(system, f"half-{system}", "run.stop_at_step=2", shards=shards)
        sizes = [record.bytes for record in Manifest.load(datasets[system]).shards]
        budget = 2 * (sum(sizes) - min(sizes))  # of two ranks: each has room for all but one
        remote = [f"run.cache={runs.folder / 'cache'}", f"run.cache_bytes={budget}"]
        name = f"remote-{system}"
        started[name] = runs.arguments(system, name, *remote, shards=f"file://{datasets[system]}")
    runs.launch(started)
    return runs


@pytest.fixture(scope="module")
def second(first):
    """The same runs continued in new processes: killed ones, and those whose regions were damaged meanwhile."""
    started = {}
    for system in LONE:
        first.continue_a_part(system)
        shutil.copytree(first.folder / f"half-{system}", first.folder / f"torn-{system}")
        shards = first.data(system, f"torn-{system}")
        (shards / "regions-all-000001.tar").unlink()
        budget = "run.max_damaged_shards=1"
        started[f"torn-{system}"] = first.arguments(system, f"torn-{system}", budget, shards=shards)
    first.launch(started)
    return first


@pytest.fixture
def refuse(capsys, monkeypatch):
    """Runs the entry point in this process and returns its message."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)

    def run(arguments):
        assert main(arguments) == EXIT_BAD_INPUT
        error = capsys.readouterr().err
        assert "error: " in error
        assert "Traceback" not in error
        return error

    return run


@pytest.mark.parametrize("system", LONE)
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(second, system, require_equal_tensors):
    """With dropout, across an accumulation of two micro-batches, fp32 on CPU."""
    require_equal_bits(second, system, require_equal_tensors)


@pytest.mark.proof
def test_with_the_trunk_too_resumed_equals_never_stopped(
    datasets, small_trunk, narrow_bert, launch_ranks, tmp_path, require_equal_tensors
):
    runs, system = Runs(datasets, small_trunk, narrow_bert, tmp_path, launch_ranks), "vlbert-pixels"
    runs.launch({f"whole-{system}": runs.arguments(system, f"whole-{system}")})
    runs.continue_a_part(system)
    require_equal_bits(runs, system, require_equal_tensors)


def require_equal_bits(second, system, require_equal_tensors):
    whole, parts = f"whole-{system}", f"parts-{system}"
    assert "continuing after step 2 of 6" in second.said[parts]
    for key in (*(f"loss/{name}" for name in OBJECTIVES[system]), "loss/total", "optim/grad_norm", "samples"):
        found = [entry[key] for entry in second.entries(parts)]
        assert len(found) == 6
        assert found == [entry[key] for entry in second.entries(whole)]
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        require_equal_tensors(*(second.checkpoint(run, 6) / name for run in (whole, parts)))


@pytest.mark.parametrize("system", LONE)
def test_a_run_that_fetches_tables_as_it_needs_them_is_the_local_run(first, system):
    local, remote = (first.entries(f"{kind}-{system}") for kind in ("whole", "remote"))
    assert [entry["samples"] for entry in remote] == [entry["samples"] for entry in local]
    for name in OBJECTIVES[system]:
        assert [entry[f"loss/{name}"] for entry in remote] == pytest.approx(
            [entry[f"loss/{name}"] for entry in local], rel=1e-6
        )
    assert any(first.folder.glob("cache/**/regions-all-*.tar"))


@pytest.mark.parametrize("system", LONE)
def test_without_a_shard_of_regions_a_run_goes_on_and_the_others_stay_as_they_are(second, system):
    run = f"torn-{system}"
    assert "continuing after step 2 of 6" in second.said[run]
    (quarantine,) = second.entries(run, "quarantine")
    assert (quarantine["step"], list(quarantine["shards"])) == (2, ["regions-all-000001.tar"])
    assert read_position(second.checkpoint(run, 6)).quarantined == ["regions-all-000001.tar"]
    steps, whole = second.entries(run), second.entries(f"whole-{system}")
    assert [entry["samples"] for entry in steps] == [entry["samples"] for entry in whole]
    found, alike = ([entry["loss/mlm"] for entry in entries] for entries in (steps, whole))
    assert found[:2] == pytest.approx(alike[:2], rel=1e-5)
    assert found[2:] != pytest.approx(alike[2:], rel=1e-3)


@pytest.mark.parametrize("system", LONE)
@pytest.mark.parametrize(
    ("harm", "words"), [(Path.unlink, "missing"), (cut, "truncated: expected ")], ids=["missing", "truncated"]
)
def test_a_damaged_shard_of_regions_at_resume_is_named(first, refuse, tmp_path, system, harm, words):
    shards = shutil.copytree(first.datasets[system], tmp_path / "data")
    harm(shards / "regions-all-000002.tar")
    error = refuse(first.arguments(system, f"half-{system}", shards=shards))
    assert "1 of " in error
    assert f"{shards / 'regions-all-000002.tar'}: {words}" in error
    assert len(first.entries(f"half-{system}")) == 2


@pytest.mark.parametrize("system", LONE)
def test_damage_that_a_step_meets_stops_the_run_with_the_shards_name(first, adapt, tmp_path, system):
    """Not found at the start, as what happens after it: nothing is verified, and held-out images are whole."""
    shards = shutil.copytree(first.datasets[system], tmp_path / "data")
    held_out = Table(shards, "validation", "captions").read("image", np.arange(4)).astype(int) // 20
    for number in set(range(4)) - set(held_out.tolist()):
        cut(shards / f"regions-all-{number:06d}.tar")
    done = adapt(*first.arguments(system, f"met-{system}", "run.verify=false", shards=shards), ranks=2)
    assert done.code == EXIT_BAD_INPUT
    assert "a step of 8 samples" in done.stderr
    assert "regions-all-00000" in done.stderr
    assert "copy the shard again" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_table_than_the_run_began_with_is_refused_by_its_name(
    first, refuse, wiki_text, cassette_model, tmp_path
):
    """The texts of a mixture made anew; regions exchanged below their captions; and both exchanged together."""
    shards = shutil.copytree(first.datasets["visualbert"], tmp_path / "data")
    options = TextOptions(language_tokenizer=str(cassette_model), sequence_length=21, validation_fraction=0.1)
    build_shards([wiki_text], shards, options)
    error = refuse(first.arguments("vlbert", "half-vlbert", shards=shards))
    assert f"{first.checkpoint('half-vlbert', 2)}: was trained on other data: text (it was SHA-256 " in error
    assert "captions" not in error
    values = json.loads((shards / "dataset.json").read_text())
    values["tables"]["regions"]["build"]["detector"]["model"] = "another one"
    (shards / "dataset.json").write_text(json.dumps(values))
    error = refuse(first.arguments("visualbert", "half-visualbert", shards=shards))
    assert "the captions were built beside another table of regions than the one that is there now" in error
    values["tables"]["captions"]["build"]["regions"] = Manifest.model_validate(values).only(["regions"]).fingerprint
    (shards / "dataset.json").write_text(json.dumps(values))
    error = refuse(first.arguments("visualbert", "half-visualbert", shards=shards))
    assert re.search(
        r"was trained on other data: captions \(it was .*\), regions \(it was .*\); name the original", error
    )


KILLED_UNDER = {"visualbert": 1, "vlbert": 2, "vlbert-pixels": 3}
"""ZeRO stage by system."""


@pytest.mark.proof
@pytest.mark.parametrize("system", SYSTEMS)
def test_killed_at_random_moments_and_continued_by_other_ranks_it_is_the_uninterrupted_run(
    datasets, small_trunk, launch_ranks, adapt, start, tmp_path, system
):
    """SIGKILL for all ranks, once each of two, of three and of one; then two go on to the end."""
    runs, draw = Runs(datasets, small_trunk, [], tmp_path, launch_ranks), random.Random(system)
    fixed = ["model.dropout=0", "training.steps=24", "run.checkpoint_every=1", "run.eval_every=1000"]
    runs.launch({"alone": runs.arguments(system, "alone", *fixed, stage=0)}, ranks=1)
    arguments = runs.arguments(system, "killed", *fixed, stage=KILLED_UNDER[system])
    log, done = tmp_path / "killed" / "log.jsonl", 0
    for ranks in (2, 3, 1):
        process = start(*arguments, ranks=ranks)
        wanted = done + draw.randint(2, 3)  # so that a checkpoint is there
        while not log.exists() or len(runs.entries("killed")) < wanted:
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        newest = step_of(list_checkpoints(tmp_path / "killed" / "checkpoints")[-1])
        assert newest >= wanted - 1  # at most the step at hand is lost
        done = newest
    assert done < 24
    last = adapt(*arguments, ranks=2)
    assert last.code == 0, last.stderr[-3000:]
    assert f"continuing after step {done} of 24" in last.stderr
    assert "damaged" not in last.stderr
    alone, killed = runs.entries("alone"), runs.entries("killed")
    assert [entry["samples"] for entry in killed] == [entry["samples"] for entry in alone]
    seen = set()
    for mine, theirs in zip(killed, alone):  # each with the losses of those objectives that have targets in the step
        losses, expected = ({name: one[name] for name in one if name.startswith("loss/")} for one in (mine, theirs))
        assert losses == pytest.approx(expected, rel=1e-4)
        seen |= losses.keys()
    assert seen == {"loss/total"} | {f"loss/{name}" for name in OBJECTIVES[system]}
