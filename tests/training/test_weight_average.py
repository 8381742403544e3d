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
from xdscale.training.weight_average import WeightAverage, saved_pieces


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


SIZES = {"a": 5, "b": 4, "c": 1}
PADDING = 77.0


def whole(shift=0.0):
    """Values of three parameters, all other than each other."""
    values = torch.arange(10.0) + shift
    return dict(zip(SIZES, values.split(list(SIZES.values()))))


def stage_3(rank, ranks, values):
    """What the average asks of an engine whose parameters are cut over ranks, each padded to equal parts."""
    gathered, parts, module = [], [], torch.nn.ParameterDict()
    for name, size in SIZES.items():
        part = -(-size // ranks)
        mine = torch.full((part,), PADDING)
        real = values[name][rank * part : (rank + 1) * part]
        mine[: len(real)] = real
        parts.append(mine)
        module[name] = torch.nn.Parameter(torch.empty(0))
        module[name].ds_numel, module[name].ds_tensor = size, mine.bfloat16()
        module[name].ds_tensor.ds_numel = part
    offload = SimpleNamespace(
        partition_all_parameters=lambda: gathered.append("dropped"),
        persistent_parameters=[SimpleNamespace(all_gather=gathered.append)],
    )
    wrapper = SimpleNamespace(
        fp32_partitioned_groups_flat=[torch.cat(parts)],
        fp16_groups=[list(module.values())],
        parameter_offload=offload,
    )
    return SimpleNamespace(module=module, optimizer=wrapper, zero_optimization=lambda: True), gathered


def test_what_stage_3_cuts_over_ranks_is_averaged_saved_and_read_by_any_number_of_them(tmp_path):
    """Weights that rose by 1 once: their average rose by a quarter. Padding is nobody's."""
    for rank in range(2):
        engine, _ = stage_3(rank, 2, whole())
        average = WeightAverage(engine, 0.75, Ranks(rank, 2, rank))
        engine.optimizer.fp32_partitioned_groups_flat[0] += 1.0
        average.update()
        average.save(tmp_path)
    found = {}
    for name, start, values in saved_pieces(tmp_path):
        found.setdefault(name, {})[start] = values[:].tolist()
    assert found == {"a": {0: [0.25, 1.25, 2.25], 3: [3.25, 4.25]}, "b": {0: [5.25, 6.25], 2: [7.25, 8.25]},
                     "c": {0: [9.25], 1: []}}  # fmt: skip
    for rank in range(3):
        engine, gathered = stage_3(rank, 3, whole(100))
        average = WeightAverage(engine, 0.75, Ranks(rank, 3, rank))
        average.load(tmp_path)
        before = {name: parameter.ds_tensor.clone() for name, parameter in engine.module.items()}
        with average.in_use():
            for name, parameter in engine.module.items():
                part = -(-SIZES[name] // 3)
                real = whole(0.25)[name][rank * part : (rank + 1) * part].tolist()
                assert parameter.ds_tensor.tolist() == real + [PADDING] * (part - len(real))
            renewed = ["dropped", engine.optimizer.parameter_offload.persistent_parameters]
            assert gathered == renewed
        assert all(torch.equal(parameter.ds_tensor, before[name]) for name, parameter in engine.module.items())
        assert gathered == 2 * renewed


def flat_parts(rank, cut, values):
    """An engine under stage 1 or 2: of all trained elements a rank has those up to `cut`, or from there on, in fp32."""
    begin, end = ((0, cut), (cut, 10))[rank]
    module, offset = torch.nn.ParameterDict(), 0
    for name, size in SIZES.items():
        module[name] = torch.nn.Parameter(values[name].bfloat16())
        first, last = max(begin, offset), min(end, offset + size)
        mapping = SimpleNamespace(
            lp_fragment_address=SimpleNamespace(start=first - offset),
            hp_fragment=values[name][first - offset : last - offset].clone(),
        )
        module[name]._hp_mapping = mapping if first < last else None
        offset += size
    return SimpleNamespace(module=module, optimizer=SimpleNamespace(), zero_optimization=lambda: True)


def test_what_stages_1_and_2_cut_anywhere_is_put_together_to_compute_with(tmp_path):
    """The first rank has 7 of 10 elements, so that one parameter lies on both."""
    engines = [flat_parts(rank, 7, whole(8)) for rank in range(2)]
    averages = [WeightAverage(engine, 0.5, Ranks(rank, 2, rank)) for rank, engine in enumerate(engines)]
    for engine, average in zip(engines, averages):
        for parameter in engine.module.values():
            if parameter._hp_mapping is not None:
                parameter._hp_mapping.hp_fragment += 2.0
        average.update()
        average.save(tmp_path)
    found = {f"{name}@{start}": values[:].tolist() for name, start, values in saved_pieces(tmp_path)}
    assert found == {"a@0": [9, 10, 11, 12, 13], "b@0": [14, 15], "b@2": [16, 17], "c@0": [18]}
    for engine in (flat_parts(0, 3, whole(50)), flat_parts(1, 3, whole(50))):
        handed = []

        class Summing(Ranks):
            def sum(self, values, handed=handed):
                handed.append(values.clone())
                return values + 100

        read = WeightAverage(engine, 0.5, Summing(0, 2, 0))
        read.load(tmp_path)
        with read.in_use():
            for parameter, mine in zip(engine.module.values(), handed, strict=True):
                torch.testing.assert_close(parameter.data, (mine + 100).bfloat16())
        given = torch.cat(handed).tolist()
        assert given == [9, 10, 11, *[0] * 7] or given == [*[0] * 3, 12, 13, 14, 15, 16, 17, 18]
        assert torch.equal(
            torch.cat([p.data for p in engine.module.values()]), torch.cat(list(whole(50).values())).bfloat16()
        )


@pytest.mark.parametrize("rank", [0, 1])
def test_of_weights_in_16_bits_that_every_rank_has_the_first_one_saves_the_average_in_32(tmp_path, rank):
    module = torch.nn.ParameterDict({name: torch.nn.Parameter(part.bfloat16()) for name, part in whole().items()})
    masters = [part.clone() for part in whole(0.001).values()]
    wrapper = SimpleNamespace(fp16_groups=[list(module.values())], fp32_groups=[masters])
    engine = SimpleNamespace(module=module, optimizer=wrapper, zero_optimization=lambda: False)
    WeightAverage(engine, 0.5, Ranks(rank, 2, rank)).save(tmp_path)
    found = {name: values[:].tolist() for name, start, values in saved_pieces(tmp_path)}
    assert found == ({name: part.tolist() for name, part in whole(0.001).items()} if rank == 0 else {})


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
