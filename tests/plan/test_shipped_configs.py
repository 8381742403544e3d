"""The files in ds_configs/: what the plan writes, what fits the GPU they are for, and what DeepSpeed accepts."""

import functools
import json
from pathlib import Path

import pytest

from xdscale.ds_config import precision, read_ds_config, zero_stage
from xdscale.plan.cluster import Cluster
from xdscale.plan.configs import WAYS, config_text, ds_config
from xdscale.plan.hardware import find_gpu, usable_gib
from xdscale.plan.planner import GIB, Machine, make_plan
from xdscale.plan.profile import build_on_meta, profile_model
from xdscale.plan.report import machine_from, run_plan
from xdscale.plan.settings import read_settings
from xdscale.plan.states import count, model_states
from xdscale.plan.traffic import keeps_gathered
from xdscale.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "ds_configs"
RECIPES = {"bert-base": "xdbert-base-wikitext103", "electra-large": "xdelectra-large-wikitext103"}
FROM_PIXELS = {"bert-base-pixels": "vlbert-base-e2e", "electra-large-pixels": "vlbert-large-e2e"}
GPUS = {"bf16": "A100-40G", "fp16": "V100-32G"}
SHIPPED = {
    f"{model}-{way}{'' if kind == 'bf16' else '-fp16'}": (model, way, kind)
    for model in RECIPES
    for way in WAYS
    for kind in GPUS
} | {
    f"{model}-zero2{'' if kind == 'bf16' else '-fp16'}": (model, "zero2", kind)
    for model in FROM_PIXELS
    for kind in GPUS
}


def test_every_size_way_and_precision_ships_and_no_two_are_equal():
    files = sorted(FOLDER.glob("*.json"))
    assert {path.stem for path in files} == {*SHIPPED, "finetune-zero1", "quickstart-zero2"}
    texts = [json.dumps(json.loads(path.read_text()), sort_keys=True) for path in files]
    assert len(set(texts)) == len(files)


@pytest.mark.parametrize("kind", GPUS)
@pytest.mark.parametrize("model", RECIPES)
def test_files_are_what_the_plan_writes_for_one_gpu(model, kind, tmp_path, capsys):
    run_plan(
        RECIPES[model],
        [],
        machine_from(GPUS[kind], 1, 1, None, 0.4, None),
        sequence_length=None,
        precision=None,
        checkpointing=False,
        as_json=True,
        write_configs=tmp_path,
    )
    written = sorted(tmp_path.iterdir())
    assert len(written) == len(WAYS)
    for path in written:
        assert path.read_text() == (FOLDER / path.name).read_text()
    assert json.loads(capsys.readouterr().out)["precision"] == kind


@functools.cache
def profile(model, kind):
    if model in FROM_PIXELS and kind == "fp16":
        return profile(model, "bf16")._replace(precision=kind)  # as wide
    return profile_model(load_recipe((RECIPES | FROM_PIXELS)[model]), precision=kind)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.proof if "large-pixels" in name else ()) for name in SHIPPED]
)
def test_micro_batch_is_the_largest_that_fits_the_gpu_and_its_share_of_a_step(name):
    model, way, kind = SHIPPED[name]
    values, gpu, known = read_ds_config(str(FOLDER / f"{name}.json")), find_gpu(GPUS[kind]), profile(model, kind)
    assert (precision(values), zero_stage(values)) == (kind, int(way[4]))
    micro_batch = values["train_micro_batch_size_per_gpu"]
    states = model_states(known.modules, read_settings(values), 1)
    usable = usable_gib(gpu.memory_gib) * GIB
    assert states.device + known.peak(micro_batch) <= usable < states.device + known.peak(micro_batch + 1)
    machine = Machine(cluster=Cluster(gpu, 1, 1), memory_gib=gpu.memory_gib, price=1)
    recipe = load_recipe((RECIPES | FROM_PIXELS)[model], ["training.global_batch=20"])
    row = next(row for row in make_plan("x", recipe, machine, known).rows if row.way == way)
    assert (row.largest_micro_batch, row.micro_batch, row.accumulation) == (micro_batch, 20, 1)


@pytest.mark.parametrize("kind", GPUS)
@pytest.mark.parametrize("model", ["bert-base-pixels", pytest.param("electra-large-pixels", marks=pytest.mark.proof)])
def test_files_for_pixels_are_what_the_plan_writes(model, kind):
    """Of the way that commands take by themselves; `--write-configs` writes the others."""
    name = f"{model}-zero2{'' if kind == 'bf16' else '-fp16'}"
    micro_batch = read_ds_config(name)["train_micro_batch_size_per_gpu"]
    assert config_text(ds_config("zero2", kind, micro_batch, count(profile(model, kind).modules))) == content(name)


def test_a_file_that_is_written_asks_no_more_than_a_ranks_share(tmp_path, capsys):
    options = {"sequence_length": None, "precision": None, "checkpointing": False, "as_json": True}
    machine = machine_from("A100-40G", 8, 1, None, 0.4, None)
    run_plan(RECIPES["bert-base"], [], machine, **options, write_configs=tmp_path)
    written = [json.loads(path.read_text())["train_micro_batch_size_per_gpu"] for path in tmp_path.iterdir()]
    assert written == [288 // 8] * len(WAYS)
    json.loads(capsys.readouterr().out)  # and nothing else
    run_plan(RECIPES["bert-base"], [], machine, **options | {"as_json": False}, write_configs=tmp_path)
    told = capsys.readouterr().out.splitlines()[-len(WAYS) :]
    assert sorted(told) == sorted(f"written: {path}" for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("parameters", "bucket"), [(1_000_000, 130_000), (203_586_877, 26_000_000), (445_118_525, 56_000_000)]
)
def test_buckets_and_thresholds_grow_with_the_model(parameters, bucket):
    zero = ds_config("zero3", "bf16", 1, parameters)["zero_optimization"]
    assert zero["reduce_bucket_size"] == bucket
    assert zero["stage3_max_reuse_distance"] == zero["stage3_max_live_parameters"] >= 4 * parameters
    assert parameters / 4096 <= zero["stage3_param_persistence_threshold"] < parameters / 3000


@pytest.mark.parametrize("model", RECIPES)
def test_stage_3_keeps_vectors_whole_shards_matrices_and_gathers_once(model):
    known = profile(model, "bf16")
    settings = read_settings(read_ds_config(str(FOLDER / f"{model}-zero3.json")))
    assert keeps_gathered(known.modules, settings) is True
    module = build_on_meta(load_recipe(RECIPES[model]))
    whole = {p.ndim for p in module.parameters() if p.numel() <= settings.persistence_threshold and p.shape[0] > 77}
    sharded = {p.ndim for p in module.parameters() if p.numel() > settings.persistence_threshold}
    assert (whole, sharded) == ({1}, {2})


def content(name):
    return (FOLDER / f"{name}.json").read_text()


@pytest.fixture(scope="module")
def engines(run_engines, small_model):
    """Two ranks make one step with every file, those of equal content once: {content: what each rank measured}."""
    cases = []
    for text in sorted({content(name) for name in [*SHIPPED, "quickstart-zero2"]}):
        values = json.loads(text)
        batch = 2 * values["train_micro_batch_size_per_gpu"]
        overrides = [*small_model, f"training.global_batch={batch}"]
        cases.append({"name": text, "recipe": "quickstart", "overrides": overrides, "ds_config": values})
        cases[-1] |= {"length": 8, "blocks": 1, "steps": 1}
    return run_engines(cases)


@pytest.mark.proof
@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_trains_with_every_file(engines, name):
    _, way, kind = SHIPPED[name]
    for result in engines[content(name)]:
        assert result["stage"] == int(way[4])
        assert result["dtype"] == {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[kind]
        assert any(key.startswith("all_gather_into_tensor") for key in result["collectives"])
