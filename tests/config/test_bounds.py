"""The bounds of all numbers that a recipe or `dataset.json` states: one at a bound is taken, one beyond it is not."""

import math
from typing import Annotated, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from xdscale.finetune.recipe import FinetuneSettings
from xdscale.recipes.mlm.schema import MaskedLMRecipe
from xdscale.recipes.visualbert.schema import VisualBERTRecipe, VisualBERTSettings
from xdscale.recipes.visualbert.task_schema import VisualBERTTaskRecipe
from xdscale.recipes.vlbert.schema import VLBERTRecipe, VLBERTSettings
from xdscale.recipes.xdbert.schema import XDBERTRecipe
from xdscale.shards.manifest import Column, InputFile, ShardRecord, Split
from xdscale.shards.regions import RegionBuild
from xdscale.shards.sources.caption_build import CaptionOptions
from xdscale.shards.sources.text_build import ClipTokenizer, LanguageTokenizer, PackingOptions
from xdscale.shards.workplace import PartManifest

COUNT, INT32, BYTES_16 = "[1, inf)", f"[1, {2**31})", f"[1, {2**16})"

OPTIM = {
    "optim.learning_rate": "(0, inf)",
    "optim.rate_factors": "(0, inf)",
    "optim.betas": "[0, 1)",
    "optim.eps": "(0, inf)",
    "optim.momentum": "[0, 1)",
    "optim.weight_decay": "[0, inf)",
    "optim.warmup_ratio": "[0, 1]",
    "optim.drop_at": "(0, 1)",
    "optim.drop_factor": "(0, 1)",
    "optim.gradient_clipping": "(0, inf)",
    "optim.ema_decay": "(0, 1)",
}
EVERY = OPTIM | {
    "training.steps": INT32,
    "training.global_batch": INT32,
    "training.batch_tokens": INT32,
    "training.seed": f"[0, {2**32})",
    "training.patience": COUNT,
    "run.eval_every": COUNT,
    "run.eval_samples": COUNT,
    "run.checkpoint_every": COUNT,
    "run.keep_checkpoints": COUNT,
    "run.keep_every": COUNT,
    "run.stop_at_step": COUNT,
    "run.max_skipped_in_row": COUNT,
    "run.hang_seconds": COUNT,
    "run.cache_bytes": COUNT,
    "run.max_damaged_shards": "[0, inf)",
    "model.dropout": "[0, 1)",
}


def masked_words(name):
    return {
        f"objectives.{name}.weight": "(0, inf)",
        f"objectives.{name}.select": "(0, 1)",
        f"objectives.{name}.mask": "[0, 1]",
        f"objectives.{name}.random": "[0, 1]",
    }


VISUALBERT = {
    "model.region_size": f"[1, {2**20})",
    "model.max_regions": f"[1, {2**16})",
    "model.max_text": f"[4, {2**16})",
    "objectives.match.weight": "(0, inf)",
}
PIXELS = {"model.pixels.short_side": "[16, 10000]", "model.pixels.long_side": "[16, 10000]", "model.flip": "[0, 1)"}
TUNED = {"dropout": "[0, 1)", "max_length": "[8, inf)"}
TUNED |= {"pixels.short_side": "[16, 10000]", "pixels.long_side": "[16, 10000]"}
SUBJECT = {"model.dropout": "[0, 1)", "model.max_length": "[8, inf)"}
BOUNDS = {
    MaskedLMRecipe: EVERY | masked_words("mlm"),
    XDBERTRecipe: EVERY
    | masked_words("mlm")
    | {
        "model.cross_layers": "[1, 1000]",
        "objectives.match.weight": "(0, inf)",
        "objectives.match.mismatch": "(0, 1)",
        "objectives.clip_tokens.weight": "(0, inf)",
        "objectives.clip_tokens.select": "(0, 1)",
    },
    VisualBERTRecipe: EVERY | masked_words("mlm") | VISUALBERT | {"objectives.match.mismatch": "(0, 1)"},
    VisualBERTTaskRecipe: EVERY | masked_words("mlm") | VISUALBERT,
    VLBERTRecipe: EVERY
    | masked_words("mlm")
    | masked_words("text_mlm")
    | PIXELS
    | {
        "model.region_size": f"[1, {2**20})",
        "model.region_classes": f"[2, {2**16}]",
        "model.max_elements": f"[4, {2**16})",
        "objectives.masked_region.weight": "(0, inf)",
        "objectives.masked_region.select": "(0, 1)",
        "objectives.masked_region.mask": "(0, 1]",
    },
    FinetuneSettings: OPTIM
    | SUBJECT
    | {
        "training.epochs": "(0, 1000000]",
        "training.global_batch": INT32,
        "training.patience": COUNT,
        "run.eval_samples": COUNT,
        "run.checkpoint_every": COUNT,
        "run.keep_checkpoints": COUNT,
        "run.stop_at_step": COUNT,
        "run.max_skipped_in_row": COUNT,
        "run.hang_seconds": COUNT,
        "seeds": "[1, 10000]",
    },
    VisualBERTSettings: TUNED,
    VLBERTSettings: TUNED | {"flip": "[0, 1)", "object_loss": "[0, inf)"},
    PackingOptions: {
        "min_words": "[0, inf)",
        "sequence_length": INT32,
        "clip_blocks": INT32,
        "validation_fraction": "[0, 1]",
        "shard_text_bytes": COUNT,
    },
    CaptionOptions: {"validation_fraction": "[0, 1]", "shard_images": INT32},
    LanguageTokenizer: {
        "vocab_size": f"[1, {2**16}]",
        "cls_id": "[0, inf)",
        "sep_id": "[0, inf)",
        "mask_id": "[0, inf)",
        "pad_id": "[0, inf)",
    },
    ClipTokenizer: {"vocab_size": f"[1, {2**16}]", "start_id": "[0, inf)", "end_id": "[0, inf)"},
    RegionBuild: {
        "detector.class_count": "[0, inf)",
        "detector.attribute_count": "[0, inf)",
        "detector.background": "[0, inf)",
        "width": "[0, inf)",
        "largest_error": "[0, 1]",
        "probabilities": f"[0, {2**16}]",
        "shard_images": INT32,
    },
    Column: {"shape": COUNT, "fewest": "[0, inf)", "most": COUNT},
    InputFile: {"bytes": "[0, inf)"},
    ShardRecord: {
        "rows": f"[1, {2**40})",
        "blocks": f"[1, {2**24})",
        "bytes": COUNT,
        "elements": "[0, inf)",
        "largest": "[0, inf)",
    },
    Split: {"rows": "[0, inf)", "counts": "[0, inf)"},
    PartManifest: {"index": "[0, inf)", "of": COUNT, "units": "[0, inf)"},
}
WRAPPED = {
    "optim.rate_factors": lambda value: {"head": value},
    "optim.betas": lambda value: [0.5, value],
    "optim.drop_at": lambda value: [value],
    "seeds": lambda value: {"others": value},
    "shape": lambda value: [value],
    **dict.fromkeys(("elements", "largest", "counts"), lambda value: {"rows": value}),
}
NEEDED = {
    "optim.momentum": {"optimizer": "sgd"},
    "optim.drop_at": {"schedule": "step", "warmup_ratio": 0},
    "optim.drop_factor": {"schedule": "step", "drop_at": [0.5]},
    "training.batch_tokens": {"global_batch": None},
    "training.patience": {"best": "loss/task"},
}
"""What else stands in the section, so that the key is used at all."""


def kinds_of(annotation):
    """Names the types that a value may have, and those of what it holds."""
    inner = get_args(annotation)[: 1 if get_origin(annotation) is Annotated else None]
    return {get_origin(annotation) or annotation}.union(*map(kinds_of, inner))


def numbers(schema, prefix=""):
    """Yields the keys of numbers and what may stand there, of sections that may be off too."""
    for name, field in schema.model_fields.items():
        kinds = kinds_of(field.annotation)
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if kinds & {int, float}:
            yield prefix + name, kinds
        elif not kinds & {list, dict}:
            for section in sections:
                yield from numbers(section, f"{prefix}{name}.")


def is_taken(schema, key, value):
    """Whether a value is taken for itself; what else is missing does not matter."""
    *sections, last = key.split(".")
    values = NEEDED.get(key, {}) | {last: WRAPPED.get(key, lambda value: value)(value)}
    for section in reversed(sections):
        values = {section: values}
    try:
        schema.model_validate(values)
    except ValidationError as error:
        places = [".".join(map(str, problem["loc"])) + "." for problem in error.errors()]
        return not any(place.startswith(f"{key}.") for place in places)
    return True


def moved(number, steps, *, whole):
    """Returns a number, the next one above it or below it, among integers or among doubles."""
    return int(number) + steps if whole else math.nextafter(number, number + steps)


@pytest.mark.parametrize("schema", BOUNDS, ids=lambda schema: schema.__name__)
def test_what_lies_at_a_bound_is_taken_and_what_lies_beyond_is_not(schema):
    found = dict(numbers(schema))
    assert found.keys() == BOUNDS[schema].keys()
    for key, interval in BOUNDS[schema].items():
        least, most = map(float, interval[1:-1].split(", "))
        for bound, out, closed in ((least, -1, interval[0] == "["), (most, 1, interval[-1] == "]")):
            if math.isinf(bound):
                continue
            inside, outside = (0, 1) if closed else (-1, 0)
            inside, outside = (moved(bound, step * out, whole=float not in found[key]) for step in (inside, outside))
            assert is_taken(schema, key, inside), f"{key} = {inside}"
            assert not is_taken(schema, key, outside), f"{key} = {outside}"
