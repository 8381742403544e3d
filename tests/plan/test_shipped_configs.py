"""The files in ds_configs/: what the plan writes, what fits the GPU they are for, and what DeepSpeed accepts."""

import json
from pathlib import Path

import pytest

from xdscale.ds_config import precision, read_ds_config, zero_stage
from xdscale.plan.cluster import Cluster
from xdscale.plan.configs import WAYS
from xdscale.plan.hardware import find_gpu
from xdscale.plan.planner import Machine, make_plan
from xdscale.plan.report import machine_from, run_plan
from xdscale.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "ds_configs"
MODELS = {
    "bert-base": "bert-base-uncased",
    "bert-large": "bert-large-uncased",
    "electra-base": "google/electra-base-discriminator",
    "electra-large": "google/electra-large-discriminator",
}
GPUS = {"bf16": "A100-40G", "fp16": "V100-32G"}
SHIPPED = {
    f"{model}-{way}{'' if kind == 'bf16' else '-fp16'}": (model, way, kind)
    for model in MODELS
    for way in WAYS
    for kind in GPUS
}


def test_every_model_way_and_precision_ships():
    assert {path.stem for path in FOLDER.glob("*.json")} == {*SHIPPED, "finetune-zero1", "quickstart-zero2"}


@pytest.mark.parametrize("kind", GPUS)
@pytest.mark.parametrize("model", MODELS)
def test_files_are_what_the_plan_writes_for_eight_gpus(model, kind, tmp_path, capsys):
    run_plan(
        "xdbert-base-wikitext103",
        [f"model.language.name={MODELS[model]}"],
        machine_from(GPUS[kind], 8, 1, None, 0.4, None),
        sequence_length=None,
        precision=None,
        checkpointing=False,
        frozen=[],
        as_json=True,
        write_configs=tmp_path,
    )
    written = sorted(tmp_path.iterdir())
    assert len(written) == len(WAYS)
    for path in written:
        assert path.read_text() == (FOLDER / path.name).read_text()
    assert json.loads(capsys.readouterr().out)["precision"] == kind


@pytest.mark.parametrize("name", SHIPPED)
def test_micro_batch_fits_the_gpu_it_is_for(name):
    model, way, kind = SHIPPED[name]
    recipe = load_recipe("xdbert-base-wikitext103", [f"model.language.name={MODELS[model]}"])
    gpu = find_gpu(GPUS[kind])
    values = read_ds_config(str(FOLDER / f"{name}.json"))
    machine = Machine(cluster=Cluster(gpu, 8, 1), memory_gib=gpu.memory_gib, price=1)
    row = next(row for row in make_plan("x", recipe, machine).rows if row.way == way)
    assert values["train_micro_batch_size_per_gpu"] == row.micro_batch <= row.largest_micro_batch
    assert row.device_bytes <= machine.usable_bytes
    assert (precision(values), zero_stage(values)) == (kind, int(way[4]))


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
