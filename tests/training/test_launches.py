"""Real runs: ZeRO stages, precision, resuming, resharding, signals, damage."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from xdscale.errors import EXIT_BAD_INPUT, EXIT_STOPPED, XdscaleError
from xdscale.training.checkpoint import check_compatible, read_position
from xdscale.training.run_folder import read_log

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # fixtures make many runs
SEVERAL = Path(__file__).with_name("several_runs.py")


class Runs:
    """Small runs of the quickstart recipe, several in a row; dropout off unless asked for."""

    def __init__(self, shards, folder, model, launch_ranks):
        self.shards, self.folder, self.model, self.launch_ranks = shards, folder, model, launch_ranks
        self.said = {}  # what each run wrote to stderr, all its launches together

    def arguments(self, name, stage, steps, *, micro_batch=2, shards=None, ds=(), **values):
        zero = {"stage": stage, "reduce_bucket_size": 1_000_000}
        if stage == 3:
            zero |= {"stage3_prefetch_bucket_size": 100_000, "stage3_param_persistence_threshold": 1000}
        config = self.folder / f"{name}.json"
        config.write_text(
            json.dumps({"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": zero} | dict(ds))
        )
        settings = {
            "data.shards": shards or self.shards,
            "output.folder": self.folder / name,
            "training.steps": steps,
            "training.global_batch": 4,
            "run.eval_every": 1000,
            "run.eval_samples": 8,
            "run.checkpoint_every": 1000,
            "model.dropout": 0,
        } | {key.replace("__", "."): value for key, value in values.items()}
        chosen = [f"{key}={value}" for key, value in settings.items()]
        return ["quickstart", *self.model, *chosen, "--deepspeed_config", str(config)]

    def launch(self, ranks, **runs):
        """Runs `{name: (stage, steps, values)}` in turn, on the same ranks."""
        named = {name.replace("_", "-"): given for name, given in runs.items()}
        given = {name: self.arguments(name, stage, steps, **values) for name, (stage, steps, values) in named.items()}
        done = self.launch_ranks(SEVERAL, json.dumps(given), ranks=ranks, timeout_seconds=500)
        assert done.code == 0, done.stderr[-3000:]
        for part in done.stderr.split("== ")[1:]:
            name, text = part.split("\n", 1)
            self.said[name] = self.said.get(name, "") + text

    def entries(self, name, kind):
        return [entry for entry in read_log(self.folder / name / "log.jsonl") if entry["kind"] == kind]

    def steps(self, name, key="loss/total"):
        return [entry[key] for entry in self.entries(name, "step")]

    def checkpoint(self, name, step):
        return self.folder / name / "checkpoints" / f"step-{step:08d}"


FP32_SUMS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
# Few steps: a CPU without bf16 instructions is a hundred times slower in it.
BF16 = {"micro_batch": 1, "ds": FP32_SUMS, "run__stop_at_step": 4, "run__eval_samples": 2}
DROPPING = {"micro_batch": 1, "model__dropout": 0.1, "run__checkpoint_every": 2, "run__keep_checkpoints": 9}
WORLDS = {"world-0": (2, 1), "world-1": (2, 1), "world-2": (1, 2), "world-3": (2, 3)}  # ZeRO stage: ranks before, after
# Another width too: after it each pass has two samples, and on three ranks two of six places are padding.
BEFORE, AFTER = ({"micro_batch": width, "run__stop_at_step": step} for width, step in ((1, 3), (3, 6)))
OFTEN = {"micro_batch": 4, "run__checkpoint_every": 2}
BOARD = OFTEN | {"run__eval_every": 2}


@pytest.fixture(scope="module")
def damageable_shards(wiki_text, cassette_model, tmp_path_factory):
    """Several shards of the same text."""
    from xdscale.shards.sources.text import TextOptions, build_shards

    out = tmp_path_factory.mktemp("damageable") / "shards"
    how = {"sequence_length": 30, "validation_fraction": 0.1, "shard_text_bytes": 200_000}
    manifest = build_shards([wiki_text], out, TextOptions(language_tokenizer=str(cassette_model), **how))
    assert len(manifest.splits["train"].shards) > 3
    return out


@pytest.fixture(scope="module")
def first(short_shards, wiki_shards, damageable_shards, narrow_model, tmp_path_factory, launch_ranks):
    """Fresh runs, by one process and by two ranks; some of them are stopped on the way."""
    runs = Runs(short_shards, tmp_path_factory.mktemp("launches"), narrow_model, launch_ranks)
    runs.launch(
        1,
        one=(0, 20, {"micro_batch": 4}),
        plain=(0, 20, {"micro_batch": 4, "run__kernels": "plain"}),
        kept=(0, 4, {"micro_batch": 4, "run__checkpoint_every": 1, "run__keep_checkpoints": 2}),
        damaged=(1, 5, OFTEN | {"run__stop_at_step": 4}),
        board=(1, 6, BOARD | {"run__stop_at_step": 4}),
        quarantine=(0, 5, OFTEN | {"run__stop_at_step": 2, "shards": damageable_shards}),
        world_2=(2, 20, BEFORE),
    )
    runs.launch(
        2,
        **{f"zero_{stage}": (stage, 20, {}) for stage in range(4)},
        **{f"bf16_{stage}": (stage, 20, BF16) for stage in (1, 2, 3)},
        **{f"world_{stage}": (stage, 20, BEFORE) for stage in (0, 1, 3)},
        recomputing=(2, 20, {"run__stop_at_step": 5, "ds": {"activation_checkpointing": {"enabled": True}}}),
    )
    # In a launch of their own: which bits the same sums end in depends on what a process computed before.
    runs.dropping = DROPPING | {"shards": wiki_shards}
    runs.launch(2, **{f"whole_{stage}": (stage, 6, runs.dropping) for stage in (2, 3)})
    return runs


@pytest.fixture(scope="module")
def second(first, damageable_shards, adapt):
    """The same runs continued in new processes, after what may happen in between."""
    for stage in (2, 3):
        # As if the run had been killed during step 4: the newest checkpoint is that of step 2, the log is ahead of it.
        shutil.copytree(first.folder / f"whole-{stage}", first.folder / f"parts-{stage}")
        for later in (4, 6):
            shutil.rmtree(first.checkpoint(f"parts-{stage}", later))
    flip_a_bit(first.checkpoint("damaged", 4) / "mp_rank_00_model_states.pt")
    shutil.rmtree(first.checkpoint("board", 4))
    shard = damageable_shards / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    first.launch(
        1, world_0=(0, 20, AFTER), world_1=(1, 20, AFTER), damaged=(1, 5, {"micro_batch": 4}), board=(1, 6, BOARD)
    )
    refused = first.arguments("quarantine", 0, 5, micro_batch=4, shards=damageable_shards)
    first.refused = adapt(*refused)
    budget = {"micro_batch": 4, "shards": damageable_shards, "run__max_damaged_shards": 1}
    first.launch(2, **{f"parts_{stage}": (stage, 6, first.dropping) for stage in (2, 3)})
    first.launch(
        2,
        world_2=(2, 20, AFTER),
        quarantine=(0, 5, budget),
    )
    first.launch(3, world_3=(3, 20, AFTER))
    return first


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_under_every_zero_stage_train_as_one_process(first, stage):
    """Loss curves equal within 1e-5 relative over 20 steps in fp32."""
    alone, curve = first.steps("one"), first.steps(f"zero-{stage}")
    assert len(curve) == 20
    assert curve == pytest.approx(alone, rel=1e-5)
    # The reference did learn, so equality means something.
    before, after = (entry["validation/loss/mlm"] for entry in first.entries("one", "validation"))
    assert after < before - 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_with_fp32_accumulation_follows_fp32(first, stage):
    curve = first.steps(f"bf16-{stage}")
    assert curve == pytest.approx(first.steps("one")[:4], rel=0.02)
    assert curve != first.steps("one")[:4]


def test_kernels_train_as_their_definitions(first):
    """20 steps in fp32 without dropout."""
    assert first.steps("plain") == pytest.approx(first.steps("one"), rel=1e-4)


def test_activation_checkpointing_changes_nothing_but_memory(first):
    assert first.steps("recomputing") == pytest.approx(first.steps("one")[:5], rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(second, stage, require_equal_tensors):
    """With dropout, across an accumulation of two micro-batches, fp32 on CPU."""
    whole, parts = f"whole-{stage}", f"parts-{stage}"
    assert "continuing after step 2 of 6" in second.said[parts]
    for key in ("loss/total", "loss/mlm", "loss/match", "loss/clip_tokens", "optim/grad_norm", "samples"):
        assert len(second.steps(parts, key)) == 6
        assert second.steps(parts, key) == second.steps(whole, key)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        file = f"zero_pp_rank_0_{name}" if stage == 3 and "model" in name else name
        require_equal_tensors(*(second.checkpoint(run, 6) / file for run in (whole, parts)))


@pytest.mark.parametrize("run", WORLDS, ids=lambda run: f"{run} {WORLDS[run][0]} to {WORLDS[run][1]} ranks")
def test_resuming_at_another_world_size(second, run):
    """The curve goes on as if nothing had happened, also with ranks that do not divide the global batch."""
    ranks = [read_position(second.checkpoint(run, step)).world_size for step in (3, 6)]
    assert tuple(ranks) == WORLDS[run]
    assert second.steps(run) == pytest.approx(second.steps("one")[:6], rel=1e-5)
    assert not list((second.folder / run / "checkpoints").glob(".*"))


def test_no_rank_imports_pytorchs_compiler(first):
    """Which takes four seconds of a core, and which no run here uses; under stage 0 to 3."""
    assert set(first.said["the compiler"].split("\n")) == {"left out", ""}


def test_each_start_says_how_a_step_is_split(second):
    before, after = second.entries("world-3", "start")
    assert before == {
        "step": 0, "kind": "start", "global_batch": 4, "ranks": 2, "micro_batch": 1, "accumulation": 2, "padding": 0.0
    }  # fmt: skip
    assert [after[key] for key in ("step", "ranks", "micro_batch", "accumulation")] == [3, 3, 2, 1]
    assert after["padding"] == pytest.approx(1 / 3)
    first_line = "a step of 4 samples: 3 ranks × 1 micro-batch of 2, 33.3% of it padding"
    assert first_line in second.said["world-3"].splitlines()
    resolved = json.loads((second.folder / "world-3" / "ds_config.json").read_text())
    assert resolved["train_micro_batch_size_per_gpu"] == 2  # of the newest start


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(second):
    said = second.said["damaged"]
    assert "skipping damaged checkpoint step-00000004" in said
    assert "mp_rank_00_model_states.pt is altered" in said
    assert "continuing after step 2 of 5" in said
    assert len(second.steps("damaged")) == 5


def test_keeps_the_newest_checkpoints_and_points_at_the_last(first):
    checkpoints = first.folder / "kept" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000003", "step-00000004"]
    assert (checkpoints / "latest").read_text().strip() == "step-00000004"


def test_a_run_folder_in_use_is_refused_and_sigterm_saves_with_the_documented_code(
    adapt, start, short_shards, narrow_model, tmp_path
):
    runs = Runs(short_shards, tmp_path, narrow_model, launch_ranks=None)
    arguments = runs.arguments("long", 0, 500, micro_batch=4)
    process = start(*arguments)
    deadline = time.monotonic() + 180
    while not (tmp_path / "long" / "log.jsonl").exists() or len(runs.steps("long")) < 2:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    other = adapt(*arguments)
    assert other.code == EXIT_BAD_INPUT
    assert f"{tmp_path / 'long'}: in use by process {process.pid}" in other.stderr
    assert "Traceback" not in other.stderr
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, stderr[-2000:]
    done = len(runs.steps("long"))
    assert (tmp_path / "long" / "checkpoints" / "latest").read_text().strip() == f"step-{done:08d}"
    assert f"stopped by a signal after step {done} of 500; the same command continues" in stderr


def test_tensorboard_tells_what_design_lists_without_overlapping_curves(second):
    """Read back with TensorBoard's own reader, after a resume that repeats two steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(second.folder / "board" / "tensorboard" / "board"))
    board.Reload()
    names = {"loss/total", "optim/lr", "optim/grad_norm", "throughput/tokens_per_second", "throughput/mfu"}
    names |= {"data/wait_fraction", "memory/peak_gib", "health/skipped_steps"}
    names |= {f"{kind}/{task}" for kind in ("loss", "accuracy") for task in ("mlm", "match", "clip_tokens")}
    tags = board.Tags()
    assert names <= set(tags["scalars"])
    for name in names:
        assert [event.step for event in board.Scalars(name)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in board.Scalars("validation/loss/mlm")] == [0, 2, 4, 6]
    assert [event.value for event in board.Scalars("loss/total")] == pytest.approx(second.steps("board"), rel=1e-6)
    assert {"cross_attention/layer_0", "cross_attention/layer_1"} <= set(tags["images"])
    assert {"recipe/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    assert "final/loss/mlm" in tags["scalars"]


def test_a_shard_damaged_between_two_starts_is_named_and_then_done_without(second):
    """First the run stops with the shard's name; under a budget it goes on in the same order, and records it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert second.refused.code == EXIT_BAD_INPUT
    assert "train-000001.tar: truncated" in second.refused.stderr
    assert "run.max_damaged_shards=1 or more, now 0" in second.refused.stderr
    (entry,) = second.entries("quarantine", "quarantine")
    assert (entry["step"], entry["data/quarantined_shards"], list(entry["shards"])) == (2, 1, ["train-000001.tar"])
    assert len(second.steps("quarantine")) == 5
    assert read_position(second.checkpoint("quarantine", 5)).quarantined == ["train-000001.tar"]
    board = EventAccumulator(str(second.folder / "quarantine" / "tensorboard" / "quarantine"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("data/quarantined_shards")] == [(2, 1.0)]
    assert "quarantined shards/text_summary" in board.Tags()["tensors"]


def test_a_checkpoint_remembers_the_batch_that_comes_next(first):
    checkpoint = first.checkpoint("zero-0", 20)
    position = read_position(checkpoint)
    assert (len(position.draws_hash), position.quarantined) == (64, [])
    stated = {"zero_stage": 0, "precision": "fp32", "data_fingerprints": position.data_fingerprints}
    check_compatible(checkpoint, position, **stated, draws_hash=position.draws_hash)
    with pytest.raises(XdscaleError, match="the next batch, number 20, is not the one that would have followed"):
        check_compatible(checkpoint, position, **stated, draws_hash="0" * 64)
