"""The moving average: its definition, and that runs continue, validate and export it."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from xdscale.errors import XdscaleError
from xdscale.export import export_run
from xdscale.training.consolidate import consolidated_state
from xdscale.training.distributed import Ranks
from xdscale.training.run_folder import read_log
from xdscale.training.weight_average import WeightAverage


def engine_of(values):
    module = torch.nn.ParameterDict({"trained": torch.nn.Parameter(torch.tensor(values))})
    module["frozen"] = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    return SimpleNamespace(module=module, optimizer=None, zero_optimization=lambda: False)


def test_of_a_constant_it_is_the_constant_and_one_step_takes_in_one_ten_thousandth():
    """Acceptance fact 10 of InterBERT."""
    engine = engine_of([1.0, -2.0])
    average = WeightAverage(engine, 0.9999, Ranks(0, 1, 0))
    average.update()
    with average.in_use():
        assert engine.module["trained"].tolist() == [1.0, -2.0]
    engine.module["trained"].data += 1.0
    average.update()
    with average.in_use():
        assert engine.module["trained"].tolist() == pytest.approx([1.0001, -1.9999], rel=1e-6)
        assert engine.module["frozen"].tolist() == [1.0, 1.0]
    assert engine.module["trained"].tolist() == [2.0, -1.0]


def test_weights_are_the_runs_own_again_after_an_error():
    engine = engine_of([1.0])
    average = WeightAverage(engine, 0.5, Ranks(0, 1, 0))
    engine.module["trained"].data += 1.0
    with pytest.raises(KeyError), average.in_use():
        raise KeyError
    assert engine.module["trained"].item() == 2.0


def test_whoever_may_read_a_checkpoint_may_read_its_average(tmp_path):
    WeightAverage(engine_of([1.0]), 0.5, Ranks(0, 1, 0)).save(tmp_path)
    (tmp_path / "other").write_text("")
    assert (tmp_path / "average-00000.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_checkpoint_without_all_of_it_is_refused(tmp_path):
    WeightAverage(engine_of([1.0, 2.0]), 0.5, Ranks(0, 1, 0)).save(tmp_path)
    WeightAverage(engine_of([1.0, 2.0]), 0.5, Ranks(0, 1, 0)).load(tmp_path)
    with pytest.raises(XdscaleError, match="holds no whole average of trained; expected average-"):
        WeightAverage(engine_of([1.0, 2.0, 3.0]), 0.5, Ranks(0, 1, 0)).load(tmp_path)


@pytest.fixture(scope="module")
def averaged_run(adapt, short_shards, narrow_model, tmp_path_factory):
    """Three steps under ZeRO-2 with an average: two on two ranks, then one on one rank."""
    folder = tmp_path_factory.mktemp("averaged")
    config = folder / "zero2.json"
    zero = {"stage": 2, "reduce_bucket_size": 1_000_000}
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}))
    values = {"training.steps": 3, "training.global_batch": 4, "run.eval_every": 1, "run.eval_samples": 4}
    values |= {"run.checkpoint_every": 1, "optim.ema_decay": 0.5, "data.shards": short_shards}
    values |= {"output.folder": folder / "run"}
    command = ["quickstart", *narrow_model, *(f"{key}={value}" for key, value in values.items())]
    for ranks, more in ((2, ["run.stop_at_step=2"]), (1, [])):
        done = adapt(*command, *more, "--deepspeed_config", config, ranks=ranks)
        assert done.code == 0, done.stderr
    return folder / "run"


def test_exports_hold_the_average_also_after_another_number_of_ranks(averaged_run, tmp_path):
    exported = {}
    for step in (1, 2, 3):
        export_run(averaged_run, tmp_path / str(step), step=step)
        exported[step] = load_file(tmp_path / str(step) / "cross_modal" / "model.safetensors")
    for step in (2, 3):
        weights = consolidated_state(averaged_run / "checkpoints" / f"step-{step:08d}")
        moved = 0
        for name, value in exported[step].items():
            expected = (exported[step - 1][name].double() + weights[name].double()) / 2
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
            moved += not torch.equal(value, weights[name])
        assert moved > 20


def test_validation_measures_the_average(averaged_run, adapt, short_shards, narrow_model, tmp_path):
    """A run that begins with the exported average has the same held-out losses before its first step."""
    out = tmp_path / "exported"
    export_run(averaged_run, out)
    config = averaged_run.parent / "zero2.json"
    values = {"training.steps": 1, "training.global_batch": 4, "run.eval_samples": 4, "model.start": out}
    values |= {"data.shards": short_shards, "output.folder": tmp_path / "run"}
    command = ["quickstart", *narrow_model, *(f"{key}={value}" for key, value in values.items())]
    done = adapt(*command, "--deepspeed_config", config)
    assert done.code == 0, done.stderr
    logs = [read_log(folder / "log.jsonl") for folder in (averaged_run, tmp_path / "run")]
    last, first = ([entry for entry in log if entry["kind"] == "validation"] for log in logs)
    losses = [{k: v for k, v in entry.items() if "loss" in k} for entry in (last[-1], first[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert last[-1]["step"] == 3
