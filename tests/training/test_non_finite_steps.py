"""Steps without a finite loss and gradient: left out on all ranks, recorded, replayed, and stopped when in a row."""

import json
from pathlib import Path

import pytest
import torch

from xdscale.commands.replay import replay
from xdscale.data.order import Order
from xdscale.errors import EXIT_BAD_INPUT
from xdscale.shards.table import Table
from xdscale.training.integrity import read_pickle
from xdscale.training.run_folder import read_log
from xdscale.training.skipping import skipped_so_far

from . import poison_worker

pytestmark = pytest.mark.slow  # fixtures make many runs
WORKER = Path(__file__).with_name("poison_worker.py")
LOSS_STEP, GRADIENT_STEP, STEPS = 2, 4, 5
LAYOUTS = {
    "fp32-0": (0, {}),
    "fp32-2": (2, {}),
    "fp32-3": (3, {}),
    "bf16-0": (0, {"bf16": {"enabled": True}}),
    "bf16-1": (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
}
CONTINUED = "fp32-2"
# A CPU without instructions for them is a hundred times slower in bf16 and fp16.
LIGHT = {"model__cross_layers": 1, "objectives__clip_tokens": "null"}


@pytest.fixture(scope="module")
def poisoned(short_shards):
    """The samples that break step 2's loss (on rank 1, in its second micro-batch) and step 4's gradient."""
    size = len(Table(short_shards, "train"))
    order = Order(size, seed=0, global_batch=4, world_size=1, rank=0, micro_batch=4)
    _, losses = order.global_batch_ids(LOSS_STEP - 1)
    _, gradients = order.global_batch_ids(GRADIENT_STEP - 1)
    assert size > 4 * STEPS
    return {"loss": int(losses[3]), "gradient": int(gradients[0])}


def arguments(shards, model, run, config, **settings):
    values = {"data.shards": shards, "output.folder": run, "training.steps": STEPS, "training.global_batch": 4}
    values |= {"run.eval_samples": 2, "run.eval_every": 1000, "run.checkpoint_every": 1000}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    return [
        "quickstart",
        *model,
        *(f"{key}={value}" for key, value in values.items()),
        "--deepspeed_config",
        str(config),
    ]


def ds_config(folder, name, stage, extra):
    path = folder / f"{name}.json"
    zero = {"stage": stage, "reduce_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 1000}
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero} | extra))
    return path


@pytest.fixture(scope="module")
def folder(short_shards, narrow_model, tmp_path_factory, launch_ranks, poisoned):
    """One launch of two ranks with two micro-batches each, for all layouts: poisoned, and without those steps.

    One of the poisoned runs is stopped after the first skipped step and continued.
    """
    folder = tmp_path_factory.mktemp("poison")
    runs = []
    for name, (stage, extra) in LAYOUTS.items():
        config, less = ds_config(folder, name, stage, extra), LIGHT if extra else {}
        for stop in (3, STEPS) if name == CONTINUED else (STEPS,):
            given = arguments(short_shards, narrow_model, folder / name, config, run__stop_at_step=stop, **less)
            runs.append({"arguments": given} | poisoned)
        given = arguments(short_shards, narrow_model, folder / f"{name}-absent", config, **less)
        runs.append({"arguments": given, "absent": [LOSS_STEP, GRADIENT_STEP]})
    done = launch_ranks(WORKER, json.dumps(runs), ranks=2, timeout_seconds=400)
    assert done.code == 0, done.stderr[-3000:]
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def tensors(value, prefix=""):
    """Returns all tensors inside nested containers by their path."""
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {path: found for key, item in items for path, found in tensors(item, f"{prefix}/{key}").items()}


def state(run):
    """Returns every tensor of the last checkpoint: parameters, and moments of every rank.

    Without the untrained ones' fragments: that of a single number is uninitialised padding on the second rank.
    """
    files = sorted((run / "checkpoints" / f"step-{STEPS:08d}").glob("*.pt"))
    assert files
    return {
        f"{path.name}{name}": value
        for path in files
        for name, value in tensors(read_pickle(path)).items()
        if "/frozen_param_fragments/" not in name
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_run_is_bitwise_the_one_in_which_those_batches_never_existed(folder, name):
    left, right = state(folder / name), state(folder / f"{name}-absent")
    assert left.keys() == right.keys()
    assert len(left) > 50
    assert all(torch.equal(value, right[key]) for key, value in left.items())
    assert all(value.isfinite().all() for value in left.values())
    steps = [
        [entry for entry in read_log(folder / run / "log.jsonl") if entry["kind"] == "step"]
        for run in (name, f"{name}-absent")
    ]
    assert [entry["step"] for entry in steps[0]] == [1, 3, 5]
    for key in ("loss/total", "optim/grad_norm", "optim/lr", "samples"):
        assert [entry[key] for entry in steps[0]] == [entry[key] for entry in steps[1]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_log_names_the_samples_and_the_command(folder, poisoned, name):
    skips = [entry for entry in read_log(folder / name / "log.jsonl") if entry["kind"] == "skipped"]
    assert [entry["step"] for entry in skips] == [LOSS_STEP, GRADIENT_STEP]
    first, second = skips
    assert first["suspects"] == [{"rank": 1, "micro_batch": 1, "sample_ids": [poisoned["loss"]]}]
    assert first["first_rank"] == 1
    assert first["loss/total"] == "nan"
    # A gradient is known as a sum over all samples only: no suspects, but all of the batch's ids.
    assert second["suspects"] == []
    assert second["loss/total"] < 23  # of random weights: ln 30,522 + ln 2 + ln 49,408 is 21.8
    assert second["optim/grad_norm"] in ("nan", "inf", "-1.0")
    for entry, kind in zip(skips, ("loss", "gradient")):
        assert poisoned[kind] in entry["sample_ids"]
        assert len(entry["sample_ids"]) == 4
        assert entry["replay"] == f"xdscale replay {folder / name} {entry['step']}"
    assert f"warning: step {LOSS_STEP} skipped on all ranks" in (folder / "stderr.txt").read_text()


def test_tensorboard_counts_them_on_through_a_restart(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / CONTINUED / "tensorboard" / CONTINUED))
    board.Reload()
    assert [event.value for event in board.Scalars("health/skipped_steps")] == [0, 1, 1, 2, 2]
    assert [event.step for event in board.Scalars("loss/total")] == [1, 3, 5]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_replay_finds_the_sample_and_the_module(folder, poisoned, kind, monkeypatch, capsys):
    poison_worker.poison(monkeypatch.setattr, **poisoned)
    # A step's losses, put together from its samples, are what the run itself logged: without dropout, at step 1.
    step = {"loss": LOSS_STEP, "gradient": GRADIENT_STEP}[kind]
    samples = replay(folder / CONTINUED, step)
    assert samples[0].sample_id == poisoned[kind]
    assert [sample.culprit is None for sample in samples] == [False, True, True, True]
    expected = "model.layers.0" if kind == "loss" else "gradient of model."
    assert samples[0].culprit.startswith(expected)
    entry = next(e for e in read_log(folder / CONTINUED / "log.jsonl") if e["kind"] == "skipped" and e["step"] == step)
    assert sorted(sample.sample_id for sample in samples) == sorted(entry["sample_ids"])
    out = capsys.readouterr().out
    assert f"1 not finite: sample {poisoned[kind]}" in out
    assert "weights of the start, 1 step too early" in out if kind == "loss" else "weights after step 3," in out


def test_too_many_in_a_row_stop_the_run_and_fp16_overflows_do_not_count(
    short_shards, narrow_model, tmp_path, launch_ranks
):
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 30, "hysteresis": 1}}
    config = ds_config(tmp_path, "fp16", 1, fp16)
    limits = {"training__steps": 3, "run__max_skipped_in_row": 2}
    scaled = arguments(short_shards, narrow_model, tmp_path / "scaled", config, **limits, **LIGHT)
    plain = ds_config(tmp_path, "fp32", 1, {})
    broken = arguments(short_shards, narrow_model, tmp_path / "broken", plain, run__max_skipped_in_row=3)
    runs = [{"arguments": scaled}, {"arguments": broken, "loss": -1}]
    done = launch_ranks(WORKER, json.dumps(runs), ranks=2)
    entries = read_log(tmp_path / "scaled" / "log.jsonl")
    overflows = [entry["health/loss_scale_overflows"] for entry in entries if entry["kind"] == "step"]
    assert overflows == [1, 2, 3]
    assert not [entry for entry in entries if entry["kind"] == "skipped"]
    assert done.code == EXIT_BAD_INPUT
    assert done.stderr.count("3 steps in a row up to step 3 had no finite loss and gradient") == 1
    assert f"xdscale replay {tmp_path / 'broken'} 3" in done.stderr
    assert "Traceback" not in done.stderr


def test_counts_continue_from_the_log():
    entries = [{"kind": "skipped", "health/skipped_steps": 1}, {"kind": "step", "health/loss_scale_overflows": 2}]
    entries += [{"kind": "validation"}] + [{"kind": "skipped", "health/skipped_steps": count} for count in (2, 3)]
    counts = skipped_so_far(entries)
    assert (counts.steps, counts.in_row, counts.overflows) == (3, 2, 2)
