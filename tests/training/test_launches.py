"""Real launches: ZeRO stages, precision, resuming, resharding, signals, damage."""

import json
import os
import shutil
import signal
import time

import pytest
import torch

from xdscale.errors import EXIT_BAD_INPUT, EXIT_STOPPED, XdscaleError
from xdscale.training.integrity import read_pickle
from xdscale.training.monitor import read_log


@pytest.fixture
def ds_config(tmp_path):
    """Writes a DeepSpeed configuration with small buckets and returns its path."""

    def write(stage, micro_batch=2, **extra):
        zero = {"stage": stage, "reduce_bucket_size": 1_000_000}
        if stage == 3:
            zero |= {"stage3_prefetch_bucket_size": 100_000, "stage3_param_persistence_threshold": 1000}
        path = tmp_path / f"zero{stage}-{len(list(tmp_path.glob('*.json')))}.json"
        path.write_text(json.dumps({"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": zero} | extra))
        return str(path)

    return write


def overrides(shards, run, steps, **values):
    """A small run of the quickstart recipe; dropout off unless asked for."""
    settings = {
        "data.shards": shards,
        "output.folder": run,
        "training.steps": steps,
        "training.global_batch": 4,
        "training.eval_every": 1000,
        "training.eval_samples": 8,
        "training.checkpoint_every": 1000,
        "model.dropout": 0,
    } | {key.replace("__", "."): value for key, value in values.items()}
    return ["quickstart", *(f"{key}={value}" for key, value in settings.items())]


def steps_of(run, key="loss/total"):
    return [entry[key] for entry in read_log(run / "log.jsonl") if entry["kind"] == "step"]


def train(adapt, config, *arguments, ranks=2):
    launch = adapt(*arguments, "--deepspeed_config", config, ranks=ranks)
    assert launch.code == 0, launch.stderr[-3000:]
    return launch


@pytest.fixture(scope="module")
def one_process_curve(wiki_shards, tmp_path_factory, adapt_in_module):
    """Losses of 20 steps in one process without ZeRO."""
    folder = tmp_path_factory.mktemp("one")
    config = folder / "zero0.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4}))
    train(adapt_in_module, str(config), *overrides(wiki_shards, folder / "run", 20), ranks=1)
    return steps_of(folder / "run")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_under_every_zero_stage_train_as_one_process(
    adapt, one_process_curve, wiki_shards, tmp_path, ds_config, stage
):
    """Loss curves equal within 1e-5 relative over 20 steps in fp32."""
    train(adapt, ds_config(stage), *overrides(wiki_shards, tmp_path / "run", 20))
    curve = steps_of(tmp_path / "run")
    assert len(curve) == 20
    assert curve == pytest.approx(one_process_curve, rel=1e-5)
    # The reference did train, so equality means something.
    assert curve[-1] < curve[0] - 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_with_fp32_accumulation_follows_fp32(adapt, one_process_curve, wiki_shards, tmp_path, ds_config, stage):
    precise = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    config = ds_config(stage, micro_batch=1, **precise)
    train(adapt, config, *overrides(wiki_shards, tmp_path / "run", 20, training__stop_at_step=8))
    assert steps_of(tmp_path / "run") == pytest.approx(one_process_curve[:8], rel=0.02)


def test_kernels_train_as_their_definitions(adapt, one_process_curve, wiki_shards, tmp_path, ds_config):
    """20 steps in fp32 without dropout."""
    settings = overrides(wiki_shards, tmp_path / "run", 20, model__kernels="plain")
    train(adapt, ds_config(0, micro_batch=4), *settings, ranks=1)
    assert steps_of(tmp_path / "run") == pytest.approx(one_process_curve, rel=1e-4)


def test_activation_checkpointing_changes_nothing_but_memory(
    adapt, one_process_curve, wiki_shards, tmp_path, ds_config
):
    config = ds_config(2, activation_checkpointing={"enabled": True})
    train(adapt, config, *overrides(wiki_shards, tmp_path / "run", 20, training__stop_at_step=5))
    assert steps_of(tmp_path / "run") == pytest.approx(one_process_curve[:5], rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(adapt, wiki_shards, tmp_path, ds_config, stage):
    """With dropout, across an accumulation of two micro-batches, fp32 on CPU."""
    config = ds_config(stage, micro_batch=1)
    settings = {"model__dropout": 0.1, "training__checkpoint_every": 2, "training__keep_checkpoints": 9}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(adapt, config, *overrides(wiki_shards, whole, 6, **settings))
    # As if the run had been killed during step 4: the newest checkpoint is that of step 2, the log is ahead of it.
    shutil.copytree(whole, parts)
    for later in ("step-00000004", "step-00000006"):
        shutil.rmtree(parts / "checkpoints" / later)
    train(adapt, config, *overrides(wiki_shards, parts, 6, **settings))
    for key in ("loss/total", "loss/mlm", "loss/match", "loss/clip_tokens", "optim/grad_norm", "samples"):
        assert steps_of(parts, key) == steps_of(whole, key)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        path = ("checkpoints", "step-00000006", f"zero_pp_rank_0_{name}" if stage == 3 and "model" in name else name)
        left, right = (read_pickle(run.joinpath(*path)) for run in (whole, parts))
        assert tensors(left).keys() == tensors(right).keys() != set()
        assert all(torch.equal(value, tensors(right)[key]) for key, value in tensors(left).items())


def tensors(value, prefix=""):
    """Returns all tensors inside nested containers by their path."""
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {path: found for key, item in items for path, found in tensors(item, f"{prefix}/{key}").items()}


@pytest.mark.parametrize(("stage", "before", "after"), [(0, 2, 1), (1, 2, 1), (2, 1, 2), (3, 2, 3)])
def test_resuming_at_another_world_size(
    adapt, one_process_curve, wiki_shards, tmp_path, ds_config, stage, before, after
):
    """The curve goes on as if nothing had happened, also with ranks that do not divide the global batch."""
    run, config = tmp_path / "run", ds_config(stage, micro_batch=1)
    train(adapt, config, *overrides(wiki_shards, run, 20, training__stop_at_step=3), ranks=before)
    train(adapt, config, *overrides(wiki_shards, run, 20, training__stop_at_step=6), ranks=after)
    assert steps_of(run) == pytest.approx(one_process_curve[:6], rel=1e-5)
    assert not list((run / "checkpoints").glob(".*"))


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(adapt, wiki_shards, tmp_path, ds_config):
    run, config = tmp_path / "run", ds_config(1, micro_batch=4)
    settings = {"training__checkpoint_every": 2, "training__stop_at_step": 4}
    train(adapt, config, *overrides(wiki_shards, run, 5, **settings), ranks=1)
    damaged = run / "checkpoints" / "step-00000004" / "mp_rank_00_model_states.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    launch = train(adapt, config, *overrides(wiki_shards, run, 5), ranks=1)
    assert "skipping damaged checkpoint step-00000004" in launch.stderr
    assert "mp_rank_00_model_states.pt is altered" in launch.stderr
    assert "continuing after step 2 of 5" in launch.stderr
    assert len(steps_of(run)) == 5


def test_keeps_the_newest_checkpoints_and_points_at_the_last(adapt, wiki_shards, tmp_path, ds_config):
    run = tmp_path / "run"
    settings = {"training__checkpoint_every": 1, "training__keep_checkpoints": 2}
    train(adapt, ds_config(0, micro_batch=4), *overrides(wiki_shards, run, 4, **settings), ranks=1)
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == ["step-00000003", "step-00000004"]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000004"


def test_sigterm_saves_and_ends_with_the_documented_code(adapt, wiki_shards, tmp_path, ds_config):
    run, config = tmp_path / "run", ds_config(0, micro_batch=4)
    arguments = overrides(wiki_shards, run, 500)
    process = adapt.start(*arguments, "--deepspeed_config", config)
    wait_for(lambda: (run / "log.jsonl").exists() and len(steps_of(run)) >= 2, process)
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, stderr[-2000:]
    done = len(steps_of(run))
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{done:08d}"
    assert f"stopped by a signal after step {done} of 500; the same command continues" in stderr


def test_run_folder_in_use_is_refused(adapt, wiki_shards, tmp_path, ds_config):
    run, config = tmp_path / "run", ds_config(0, micro_batch=4)
    first = adapt.start(*overrides(wiki_shards, run, 500), "--deepspeed_config", config)
    wait_for(lambda: (run / "recipe.yaml").exists(), first)
    second = adapt(*overrides(wiki_shards, run, 500), "--deepspeed_config", config)
    assert second.code == EXIT_BAD_INPUT
    assert f"{run}: in use by process {first.pid}" in second.stderr
    assert "Traceback" not in second.stderr


def wait_for(condition, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_tensorboard_tells_what_design_lists_without_overlapping_curves(adapt, wiki_shards, tmp_path, ds_config):
    """Read back with TensorBoard's own reader, after a resume that repeats two steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, config = tmp_path / "run", ds_config(1, micro_batch=4)
    settings = {"training__checkpoint_every": 2, "training__eval_every": 2}
    train(adapt, config, *overrides(wiki_shards, run, 6, training__stop_at_step=4, **settings), ranks=1)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    train(adapt, config, *overrides(wiki_shards, run, 6, **settings), ranks=1)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    names = {"loss/total", "optim/lr", "optim/grad_norm", "throughput/tokens_per_second", "throughput/mfu"}
    names |= {"data/wait_fraction", "memory/peak_gib", "health/skipped_steps"}
    names |= {f"{kind}/{task}" for kind in ("loss", "accuracy") for task in ("mlm", "match", "clip_tokens")}
    tags = board.Tags()
    assert names <= set(tags["scalars"])
    for name in names:
        assert [event.step for event in board.Scalars(name)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in board.Scalars("validation/loss/mlm")] == [0, 2, 4, 6]
    assert [event.value for event in board.Scalars("loss/total")] == pytest.approx(steps_of(run), rel=1e-6)
    assert {"cross_attention/layer_0", "cross_attention/layer_1"} <= set(tags["images"])
    assert {"recipe/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    assert "final/loss/mlm" in tags["scalars"]


def test_a_shard_damaged_between_two_starts_is_named_and_then_done_without(
    adapt, wiki_text, cassette_model, tmp_path, ds_config
):
    """First the run stops with the shard's name; under a budget it goes on in the same stream, and records it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from xdscale.shards.build import build_shards
    from xdscale.training.checkpoint import check_compatible, read_position

    run, shards, config = tmp_path / "run", tmp_path / "shards", ds_config(0, micro_batch=4)
    how = {"sequence_length": 126, "validation_fraction": 0.1, "shard_text_bytes": 200_000}
    manifest = build_shards([wiki_text], shards, language_tokenizer=str(cassette_model), **how)
    assert len(manifest.splits["train"].shards) > 3
    settings = {"training__checkpoint_every": 2, "training__stop_at_step": 2}
    train(adapt, config, *overrides(shards, run, 5, **settings), ranks=1)
    checkpoint = run / "checkpoints" / "step-00000002"
    position = read_position(checkpoint)
    assert (len(position.stream_hash), position.quarantined) == (64, [])
    with pytest.raises(XdscaleError, match="the next batch, number 2, is not the one that would have followed"):
        check_compatible(
            checkpoint,
            position,
            zero_stage=0,
            precision="fp32",
            data_fingerprint=position.data_fingerprint,
            stream_hash="0" * 64,
        )
    damaged = shards / "train-000001.tar"
    damaged.write_bytes(damaged.read_bytes()[:-512])
    launch = adapt(*overrides(shards, run, 5), "--deepspeed_config", config, ranks=1)
    assert launch.code == EXIT_BAD_INPUT
    assert "train-000001.tar: truncated" in launch.stderr
    assert "data.max_damaged_shards=1 or more, now 0" in launch.stderr
    train(adapt, config, *overrides(shards, run, 5, data__max_damaged_shards=1), ranks=2)
    (entry,) = [entry for entry in read_log(run / "log.jsonl") if entry["kind"] == "quarantine"]
    assert (entry["step"], entry["data/quarantined_shards"], list(entry["shards"])) == (2, 1, [damaged.name])
    assert len(steps_of(run)) == 5
    assert read_position(run / "checkpoints" / "step-00000005").quarantined == [damaged.name]
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("data/quarantined_shards")] == [(2, 1.0)]
    assert "quarantined shards/text_summary" in board.Tags()["tensors"]
