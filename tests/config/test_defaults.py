"""What a recipe or a build leaves out: published results and the bytes of shards hang on these values."""

from dataclasses import asdict
from inspect import signature

from xdscale.extraction.contract import Choice
from xdscale.extraction.extract import ExtractOptions, region_source
from xdscale.finetune.recipe import RunSettings, TrainingSettings
from xdscale.recipes.mlm.schema import MaskedLMRecipe
from xdscale.recipes.visualbert.schema import VisualBERTRecipe
from xdscale.recipes.visualbert.task_schema import VisualBERTTaskRecipe
from xdscale.recipes.vlbert.schema import GroundedModel, VLBERTRecipe
from xdscale.recipes.xdbert.schema import XDBERTRecipe
from xdscale.shards.sources.caption_build import CaptionOptions
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
