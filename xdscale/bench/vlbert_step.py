"""`xdscale bench step` of VL-BERT: whole steps of pretraining, against what its release computes (`padded_vlbert`).

On features the same weights, captions and texts, in turns: packed here, padded there. From pixels what Fast R-CNN takes
of a step, and how many images the thread decodes that prepares batches.
"""

import io
import os
import time
from statistics import median

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from xdscale.bench.padded_vlbert import PaddedVLBERT, padded_targets
from xdscale.bench.promises import Promise, print_promises
from xdscale.bench.step import check_counts, matmul_rate
from xdscale.bench.turns import Case, case_table, contest, drawn_regions, drawn_words, take_weights
from xdscale.data.pictures import read_picture, scaled_size
from xdscale.data.vlbert_pretraining import Tokens, compose
from xdscale.devices import rank_device
from xdscale.errors import XdscaleError
from xdscale.pretrained.vlbert import release_weights
from xdscale.recipe import with_random_weights
from xdscale.recipes.pixels import Pixels
from xdscale.recipes.vlbert.schema import READING, GroundedModel, VLBERTRecipe
from xdscale.systems.contract import MicroBatch, Slots, open_system
from xdscale.systems.invented import invented_tokenizer
from xdscale.systems.vlbert import VLBERTPretraining
from xdscale.training.engine import to_device
from xdscale.training.stored import build_module
from xdscale.training.throughput import wait

AGAINST = "the release's computation"
CAPTION_WORDS, REGIONS = (8, 20), (10, 100)
"""Word pieces of a caption and regions of an image: Conceptual Captions' have 10 to 100 (spec VL-BERT §3)."""
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob"),
)
"""What the other one's configuration takes of ours."""
FILE_SIZE = 640, 480
"""Width and height of the image whose file is decoded."""


def bench_vlbert(recipe: VLBERTRecipe, against: str, pairs: int, sequences: int | None) -> None:
    """Measures pretraining and prints a table.

    Args:
        recipe: of its model, with random weights; its data is not read, lengths are drawn.
        against: is the release's computation alone.
        pairs: how many times each contestant steps, in turns.
        sequences: samples per step, half of them captions; None for 8, from pixels 2.

    Raises:
        XdscaleError: an argument is out of range, the BERT's configuration cannot be read, or the recipe is not what
            the release computes.
    """
    console, device = Console(), rank_device(0)
    console.print(
        f"{recipe.model.language.name}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; "
        "median (range) of the steps"
    )
    if recipe.model.pixels is None:
        case = measure_vlbert(recipe, device, pairs, 8 if sequences is None else sequences)
        return console.print(case_table(case))
    rows = measure_pixels(recipe, device, pairs, 2 if sequences is None else sequences)
    return print_promises(rows, "A step from pixels")


def measure_vlbert(recipe: VLBERTRecipe, device: torch.device, pairs: int, sequences: int) -> Case:
    """Returns the measured case; arguments and errors as `bench_vlbert`."""
    check_counts(pairs, sequences)
    own, objectives = recipe.model, recipe.objectives.weights()
    if len(objectives) < 3 or any(getattr(own, name) != GroundedModel.model_fields[name].default for name in READING):
        raise XdscaleError(
            "what the release computes has all three objectives, and reads its input as it does: choose a recipe with "
            f"these, and leave out {', '.join(f'model.{name}' for name in READING)}"
        )
    narrow = matmul_rate(device, torch.bfloat16) >= matmul_rate(device, torch.float32)
    ours = _built(recipe).to(device)
    batch = drawn_batch(recipe, sequences, ours.model.config.vocab_size)
    sizes = {name: getattr(ours.model.config, name) for name in SIZES}
    theirs = PaddedVLBERT(sizes, own.region_classes, appearance=own.region_size)
    take_weights(theirs, release_weights(ours.state_dict()), {"vlbert.mlm_head.predictions.decoder.bias"})
    arrays = to_device(batch.arrays, device)
    inputs = {name: value.to(device) for name, value in padded_targets(batch.arrays).items()}

    def our_loss(module: nn.Module) -> torch.Tensor:
        terms = module(arrays)
        return sum(terms[name].loss_sum * (weight / batch.targets[name]) for name, weight in objectives.items())

    def their_loss(module: nn.Module) -> torch.Tensor:
        return sum(loss * weight for loss, weight in zip(module.losses(inputs), objectives.values(), strict=True))

    lengths = np.diff(batch.arrays["cu_seqlens"])
    shape = f"{sequences} samples, {batch.tokens:,} elements, {len(lengths) * lengths.max():,} with padding"
    case = contest(f"Pretraining: {shape}", (ours, theirs.to(device)), (our_loss, their_loss), AGAINST, narrow)
    case.measure(pairs)
    return case


def measure_pixels(recipe: VLBERTRecipe, device: torch.device, pairs: int, sequences: int) -> list[Promise]:
    """Returns what a step from pixels takes, of it Fast R-CNN, and how fast images are decoded.

    Arguments and errors as `bench_vlbert`; the step is forward and backward in fp32, without the optimizer.
    """
    check_counts(pairs, sequences)
    module = _built(recipe).to(device)
    batch = drawn_batch(recipe, sequences, module.model.config.vocab_size)
    arrays = to_device(batch.arrays, device)
    marks: list[float] = []

    def mark(*_: object) -> None:
        wait(device)
        marks.append(time.perf_counter())

    def mark_both_ways(_module: nn.Module, _inputs: object, features: torch.Tensor) -> None:
        mark()
        features.register_hook(mark)

    module.trunk.register_forward_hook(mark_both_ways)
    steps, trunks = [], []
    for _ in range(pairs + 1):  # the first touches fresh memory
        module.zero_grad(set_to_none=True)
        marks.clear()
        mark()
        sum(term.loss_sum for term in module(arrays).values()).backward()
        mark()
        began, seen, back, ended = marks  # the trunk runs first, and last backwards
        steps.append(ended - began)
        trunks.append(seen - began + ended - back)
    seconds = median(steps[1:])
    share = median(trunk / step for trunk, step in zip(trunks[1:], steps[1:]))
    decoded, images = decode_rate(recipe.model.pixels, pairs), sequences - sequences // 2
    shape = f"{sequences} samples, {images} with images, {len(batch.arrays['places'])} regions, fp32"
    return [
        Promise(f"seconds of a step: {shape}", f"{seconds:.2f}", "", False),
        Promise("of which Fast R-CNN, forward and backward", f"{share:.1%}", "", False),
        Promise("images that one thread decodes and scales a second", f"{decoded:.1f}", "", False),
        Promise("images that such steps use up a second", f"{images / seconds:.3f}", "", False),
    ]


def decode_rate(pixels: Pixels, rounds: int) -> float:
    """Returns how many images of `FILE_SIZE` a thread decodes and scales a second, as batches are prepared."""
    file, chance = io.BytesIO(), np.random.default_rng(0)
    coarse = chance.integers(0, 256, (FILE_SIZE[1] // 8, FILE_SIZE[0] // 8, 3), np.uint8)
    Image.fromarray(coarse).resize(FILE_SIZE).save(file, "JPEG", quality=90)
    scaled = scaled_size(*FILE_SIZE, pixels.short_side, pixels.long_side)
    seconds = []
    for _ in range(4 * rounds):
        began = time.perf_counter()
        read_picture(file.getvalue(), FILE_SIZE, scaled, "the bench")
        seconds.append(time.perf_counter() - began)
    return 1 / median(seconds)


def drawn_batch(recipe: VLBERTRecipe, samples: int, vocabulary: int) -> MicroBatch:
    """Returns captions with regions and texts, in turn, as long as real ones are and cut as these."""
    chance, spec = np.random.default_rng(0), recipe.model
    has_image = np.arange(samples) % 2 == 0
    words = [drawn_words(chance, CAPTION_WORDS if image else (spec.max_elements,) * 2) for image in has_image]
    regions = drawn_regions(chance, int(has_image.sum()), *REGIONS, spec.region_size if spec.pixels is None else 0)
    scores = np.exp(3 * chance.standard_normal((len(regions.boxes), spec.region_classes), np.float32))
    pictures = None
    if spec.pixels is not None:
        width, height = scaled_size(*FILE_SIZE, spec.pixels.short_side, spec.pixels.long_side)
        pictures = [chance.standard_normal((3, height, width), np.float32) for _ in regions.sizes]
    tokens = Tokens(invented_tokenizer(vocabulary), np.zeros(vocabulary, bool))
    slots = Slots.of(np.arange(samples))
    return compose(recipe, tokens, slots, words, has_image, regions, scores / scores.sum(1, keepdims=True), pictures)


def _built(recipe: VLBERTRecipe) -> VLBERTPretraining:
    """Returns the module with random weights, in which what is seen counts."""
    torch.manual_seed(recipe.training.seed)
    module = build_module(open_system(with_random_weights(recipe)), continued=True).train()
    for norm in (module.model.embeddings.visual_norm_text, module.model.embeddings.visual_norm_region):
        nn.init.ones_(norm.weight)
    return module
