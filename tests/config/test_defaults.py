"""What a recipe or a build leaves out: published results and the bytes of shards hang on these values."""

from dataclasses import asdict
from inspect import signature

import typer

from xdscale.cli import app
from xdscale.extraction.contract import Choice
from xdscale.extraction.extract import ExtractOptions, region_source
from xdscale.finetune.recipe import RunSettings, TrainingSettings
from xdscale.recipes.mlm.schema import MaskedLMRecipe
from xdscale.recipes.visualbert.schema import VisualBERTRecipe
from xdscale.recipes.visualbert.task_schema import VisualBERTTaskRecipe
from xdscale.recipes.vlbert.schema import GroundedModel, VLBERTRecipe
from xdscale.recipes.xdbert.schema import XDBERTRecipe
from xdscale.shards.build import WHOLE, build_table
from xdscale.shards.region_comparison import compare_images
from xdscale.shards.regions import RegionBuild
from xdscale.shards.sources.caption_build import CaptionOptions
from xdscale.shards.sources.regions.files import Reading
from xdscale.shards.sources.regions.importing import AS_THE_FORMAT, region_files
from xdscale.shards.sources.text import TextOptions
from xdscale.shards.sources.text_build import PackingOptions

LANGUAGE = {"name": "bert-base-uncased", "weights": "pretrained", "sha256": None}
REST = {"data": {"shards": "shards"}, "training": {"steps": 10, "global_batch": 4}, "output": {"folder": "run"}}
MLM = {"weight": 1.0, "select": 0.15, "mask": 0.8, "random": 0.1}
MODEL = {"language": LANGUAGE, "dropout": 0.1, "start": None}
VISUALBERT = MODEL | {
    "region_size": 2048,
    "spatial": False,
    "max_regions": None,
    "max_text": 128,
    "images": True,
    "early_fusion": True,
    "alignment": "sum",
    "freeze_pooler": True,
}


def recipe_of(schema, system, **stated):
    model = {"language": {"name": "bert-base-uncased"}} | stated.pop("model", {})
    return schema.model_validate(REST | {"system": system, "model": model} | stated)


def test_what_a_recipe_leaves_out():
    left_out = recipe_of(XDBERTRecipe, "xdbert", model={"clip": {"name": "ViT-B-32"}})
    assert left_out.training.model_dump() == {
        "steps": 10,
        "global_batch": 4,
        "batch_tokens": None,
        "seed": 0,
        "best": None,
        "patience": None,
    }
    assert left_out.run.model_dump() == {
        "kernels": "fused",
        "eval_every": 100,
        "eval_samples": 512,
        "checkpoint_every": 100,
        "keep_checkpoints": 3,
        "keep_every": None,
        "stop_at_step": None,
        "max_skipped_in_row": 5,
        "hang_seconds": 45,
        "cache": None,
        "cache_bytes": None,
        "verify": True,
        "max_damaged_shards": 0,
    }
    assert left_out.optim.model_dump() == {
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "rate_factors": {},
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "bias_correction": True,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "decayed": "all",
        "schedule": "linear",
        "warmup_ratio": 0.05,
        "drop_at": (),
        "drop_factor": 0.1,
        "gradient_clipping": 1.0,
        "ema_decay": None,
    }
    assert left_out.model.model_dump() == MODEL | {
        "clip": {"name": "ViT-B-32", "weights": "openai"},
        "cross_layers": 2,
    }
    assert left_out.objectives.model_dump() == {
        "mlm": MLM,
        "match": {"weight": 1.0, "mismatch": 0.5},
        "clip_tokens": {"weight": 1.0, "select": 0.15},
    }


def test_what_a_recipe_of_mlm_leaves_out():
    left_out = recipe_of(MaskedLMRecipe, "mlm")
    assert left_out.model.model_dump() == MODEL
    assert left_out.objectives.model_dump() == {"mlm": MLM}


def test_what_a_recipe_of_visualbert_leaves_out():
    left_out = recipe_of(VisualBERTRecipe, "visualbert", model={"region_size": 2048})
    assert left_out.model.model_dump() == VISUALBERT
    assert left_out.objectives.model_dump() == {"mlm": MLM, "match": {"weight": 1.0, "mismatch": 0.5}}
    data = {"folder": "data", "regions": "regions"}
    second = recipe_of(VisualBERTTaskRecipe, "visualbert_task", model={"region_size": 2048}, data=data, task="vqa")
    assert second.model.model_dump() == VISUALBERT | {"objects": "all", "truncation": "longest_first"}
    assert second.objectives.model_dump() == {"mlm": MLM, "match": None}
    matched = recipe_of(
        VisualBERTTaskRecipe,
        "visualbert_task",
        model={"region_size": 2048},
        data=data,
        task="vqa",
        objectives={"match": {}},
    )
    assert matched.objectives.match.weight == 1.0


def test_what_a_recipe_of_vlbert_leaves_out():
    left_out = recipe_of(VLBERTRecipe, "vlbert")
    assert left_out.model.model_dump() == MODEL | {
        "region_size": 2048,
        "region_classes": 1601,
        "pixels": None,
        "flip": 0.0,
        "corners": False,
        "end_sees_image": False,
        "own_masked_token": True,
        "max_elements": 64,
    }
    assert left_out.objectives.model_dump() == {
        "mlm": MLM | {"whole_words": True},
        "text_mlm": MLM | {"whole_words": True, "specials": False},
        "masked_region": {"weight": 1.0, "select": 0.15, "mask": 0.9, "target": "distribution"},
    }
    seen = GroundedModel.model_validate({"language": LANGUAGE, "pixels": {"weights": "random"}})
    assert seen.pixels.model_dump() == {"weights": "random", "short_side": 600, "long_side": 1000}


def test_what_a_recipe_of_finetuning_leaves_out():
    assert TrainingSettings().model_dump() == {"epochs": 3, "global_batch": 32, "best": None, "patience": None}
    assert RunSettings().model_dump() == {
        "kernels": "fused",
        "eval_samples": 2048,
        "checkpoint_every": 500,
        "keep_checkpoints": 1,
        "keep_model": "best",
        "stop_at_step": None,
        "max_skipped_in_row": 5,
        "hang_seconds": 45,
        "verify": True,
    }


def test_what_a_build_of_shards_leaves_out():
    assert PackingOptions().model_dump() == {
        "format": "auto",
        "text_field": "text",
        "encoding": "utf-8",
        "line_breaks": "auto",
        "min_words": 5,
        "sequence_length": 510,
        "clip_blocks": 9,
        "validation_fraction": 0.01,
        "shard_text_bytes": 16 * 2**20,
    }
    assert CaptionOptions().model_dump() == {
        "split": "hash",
        "validation_fraction": 0.01,
        "missing": "refuse",
        "shard_images": 8192,
    }


def test_what_regions_of_images_leave_out():
    options = asdict(ExtractOptions("torchvision:x", "hub"))
    assert options == {
        "network": "torchvision:x",
        "weights": "hub",
        "boxes": None,
        "whole_image": False,
        "stage": None,
        "short_side": None,
        "standardize": False,
        "threshold": 0.2,
        "fewest": 10,
        "most": 100,
        "batch": 8,
        "ids": "stem",
        "bad_images": "refuse",
        "store_images": False,
        "device": "cpu",
    }
    assert Choice() == (0.2, 10, 100)  # bottom-up attention's
    assert signature(region_source).parameters["shard_images"].default == 512


def test_commands_leave_out_what_programs_leave_out():
    """tests/config/command_line.txt has the commands' own defaults; programs call what these commands call."""

    def options_of(command):
        return {option.name: option.default for option in command.params if not option.required}

    found = typer.main.get_command(app).commands
    text = {name: field.default for name, field in TextOptions.model_fields.items() if not field.is_required()}
    captions = {name: field.default for name, field in CaptionOptions.model_fields.items()}
    built = {"workers": signature(build_table).parameters["workers"].default, "overwrite": False, "part": "0/1"}
    reading, regions = asdict(Reading()) | {"columns": None}, RegionBuild.model_fields
    declared = {"order": regions["region_order"].default, "whole_image": regions["whole_image"].default}
    for name, library in (
        ("shards build", text | built),
        ("shards captions", captions | built | dict.fromkeys(("karpathy", "held_out", "validation"))),
        (
            "regions import",
            of(region_files) | reading | declared | built | dict.fromkeys(("boxes", "units"), AS_THE_FORMAT),
        ),
        (
            "regions extract",
            of(region_source) | asdict(ExtractOptions("x", "hub")) | built | {"workers": None, "device": None},
        ),
        ("regions compare", of(compare_images) | {"images": 5, "csv": None}),
    ):
        group, command = name.split()
        typed = options_of(found[group].commands[command])
        assert typed == {option: library[option] for option in typed}, name
    assert (WHOLE.index, WHOLE.of) == (0, 1)


def of(function):
    """The defaults of a function's parameters."""
    return {name: one.default for name, one in signature(function).parameters.items() if one.default is not one.empty}
