"""`xdscale bench step` of VisualBERT: whole training steps, against transformers' own models as a user runs them.

The same weights, samples and targets, in turns: packed here, padded to the longest text and the most regions there.
transformers has one attention for VisualBERT, in plain operations.
"""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from transformers import (
    PreTrainedModel,
    VisualBertConfig,
    VisualBertForPreTraining,
    VisualBertForQuestionAnswering,
)

from xdscale.bench.step import check_counts, matmul_rate
from xdscale.bench.turns import Case, case_table, contest, drawn_regions, drawn_words, take_weights
from xdscale.data.visual_text import pack
from xdscale.data.visualbert import compose
from xdscale.devices import rank_device
from xdscale.errors import XdscaleError
from xdscale.pretrained.visualbert import published_weights
from xdscale.recipe import with_random_weights
from xdscale.recipes.visualbert.schema import VisualBERTRecipe
from xdscale.shards.sources.text_build import LanguageTokenizer
from xdscale.systems.contract import MicroBatch, Slots, open_system
from xdscale.tasks.visualbert import VisualBERTClassifier
from xdscale.training.engine import to_device
from xdscale.training.stored import build_module

ANSWERS = 3129
CAPTION_WORDS, QUESTION_WORDS = (8, 20), (5, 14)
CLS, SEP, MASK = 101, 102, 103

AGAINST = "transformers"


def bench_visualbert(recipe: VisualBERTRecipe, against: str, pairs: int, sequences: int | None) -> None:
    """Measures pretraining and VQA and prints tables.

    Args:
        recipe: of its model, with random weights; its data is not read, lengths are drawn.
        against: is transformers alone.
        pairs: how many times each contestant steps, in turns.
        sequences: samples per step; None for 8.

    Raises:
        XdscaleError: an argument is out of range, the BERT's configuration cannot be read, or the recipe leaves out
            what transformers always computes.
    """
    console = Console()
    device = rank_device(0)
    console.print(
        f"{recipe.model.language.name}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; "
        "median (range) of the steps"
    )
    for case in measure_visualbert(recipe, device, pairs, 8 if sequences is None else sequences):
        console.print(case_table(case))


def measure_visualbert(recipe: VisualBERTRecipe, device: torch.device, pairs: int, sequences: int) -> Iterator[Case]:
    """Yields the measured cases; arguments and errors as `bench_visualbert`."""
    check_counts(pairs, sequences)
    spec, objectives = recipe.model, recipe.objectives
    if not (spec.images and spec.early_fusion and objectives.mlm and objectives.match):
        raise XdscaleError(
            "what transformers computes is the whole VisualBERT: choose a recipe with images, early fusion and both "
            "objectives"
        )
    narrow = matmul_rate(device, torch.bfloat16) >= matmul_rate(device, torch.float32)
    recipe = with_random_weights(recipe)
    for make in (_pretraining, partial(_answers, fewest=10), partial(_answers, fewest=100)):
        torch.manual_seed(recipe.training.seed)
        case = make(recipe, device, sequences, narrow)
        case.measure(pairs)
        yield case


def padded_inputs(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Returns packed samples as transformers takes them: texts and regions padded, labels -100 where there are none.

    Args:
        arrays: of `xdscale.data.visual_text.pack`, or of a pretraining micro-batch.
    """
    counts, bounds = arrays["text_lengths"], arrays["cu_seqlens"].astype(np.int64)
    regions = np.diff(bounds) - counts
    text = np.arange(counts.max()) < counts[:, None]  # [b, longest text]
    seen = np.arange(regions.max()) < regions[:, None]  # [b, most regions]
    inputs: dict[str, np.ndarray] = {"attention_mask": text.astype(np.int64)}
    for name, source in (("input_ids", "text_ids"), ("token_type_ids", "text_segments")):
        inputs[name] = np.zeros(text.shape, np.int64)
        inputs[name][text] = arrays[source]
    inputs["visual_embeds"] = np.zeros((*seen.shape, arrays["features"].shape[1]), np.float32)
    inputs["visual_embeds"][seen] = arrays["features"]
    inputs["visual_token_type_ids"] = np.zeros(seen.shape, np.int64)
    inputs["visual_token_type_ids"][seen] = arrays["region_segments"]
    inputs["visual_attention_mask"] = seen.astype(np.int64)
    if "masked_lm_rows" in arrays:
        labels = np.full((len(counts), text.shape[1] + seen.shape[1]), -100)
        sample = np.searchsorted(bounds, arrays["masked_lm_rows"], side="right") - 1
        labels[sample, arrays["masked_lm_rows"] - bounds[sample]] = arrays["masked_lm_labels"]
        inputs["labels"] = labels
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def _pretraining(recipe: VisualBERTRecipe, device: torch.device, samples: int, narrow: bool) -> Case:
    """Two captions and 36 to 100 regions, against `VisualBertForPreTraining`."""
    chance = np.random.default_rng(0)
    texts = [[drawn_words(chance, CAPTION_WORDS) for _ in range(2)] for _ in range(samples)]
    regions = drawn_regions(chance, samples, 36, 100, recipe.model.region_size)
    slots = Slots.of(np.arange(samples))
    ours = build_module(open_system(recipe), continued=True).train().to(device)
    ids = {"vocab_size": ours.model.config.vocab_size, "cls_id": CLS, "sep_id": SEP, "mask_id": MASK, "pad_id": 0}
    tokenizer = LanguageTokenizer(name="invented", sha256="0" * 64, **ids)
    batch = compose(recipe, tokenizer, slots, texts, np.arange(samples) % 2, regions)
    theirs = VisualBertForPreTraining(_config(ours.model.config))
    _take_weights(theirs, published_weights(ours.model.config, ours.state_dict()))
    scales = {name: weight / max(1, batch.targets[name]) for name, weight in recipe.objectives.weights().items()}
    arrays = to_device(batch.arrays, device)
    inputs = {name: value.to(device) for name, value in padded_inputs(batch.arrays).items()}
    inputs["sentence_image_labels"] = arrays["match_labels"]

    def our_loss(module: nn.Module) -> torch.Tensor:
        terms = module(arrays)
        return torch.stack([terms[name].loss_sum * scale for name, scale in scales.items()]).sum()

    name = f"Pretraining: {_shape(batch)}"
    losses = our_loss, lambda module: module(**inputs).loss
    return contest(name, (ours, theirs.to(device)), losses, AGAINST, narrow)


def _answers(recipe: VisualBERTRecipe, device: torch.device, samples: int, narrow: bool, fewest: int) -> Case:
    """A question with [MASK] behind it and so many to 100 regions, against `VisualBertForQuestionAnswering`."""
    chance = np.random.default_rng(0)
    texts = [np.concatenate([[CLS], drawn_words(chance, QUESTION_WORDS), [MASK, SEP]]) for _ in range(samples)]
    regions = drawn_regions(chance, samples, fewest, 100, recipe.region_width)
    packed = pack(texts, [np.zeros_like(text) for text in texts], regions)
    encoder = open_system(recipe).build().model
    task = SimpleNamespace(reads="answer", outputs=ANSWERS)
    ours = VisualBERTClassifier(encoder, task, dropout=recipe.model.dropout).train().to(device)
    theirs = VisualBertForQuestionAnswering(_config(encoder.config, num_labels=ANSWERS))
    state = {f"model.{name}": value for name, value in encoder.state_dict().items()}
    head = {f"cls.{kind}": getattr(ours.classifier, kind) for kind in ("weight", "bias")}
    _take_weights(theirs, published_weights(encoder.config, state) | head)
    arrays = to_device(packed, device)
    arrays["answer_rows"] = arrays["cu_seqlens"][:-1].to(torch.int64) + arrays["text_lengths"] - 2
    inputs = {name: value.to(device) for name, value in padded_inputs(packed).items()}
    targets = torch.from_numpy(chance.random((samples, ANSWERS), np.float32) > 0.999).float().to(device)

    def our_loss(module: nn.Module) -> torch.Tensor:
        return F.kl_div(module(arrays).float().log_softmax(-1), targets, reduction="batchmean")

    def their_loss(module: nn.Module) -> torch.Tensor:
        return module(**inputs, labels=targets).loss

    kind = "100 regions" if fewest == 100 else f"{fewest} to 100 regions"
    name = f"VQA, {kind}: {_shape(MicroBatch(packed, {}, len(packed['rows'])))}"
    return contest(name, (ours, theirs.to(device)), (our_loss, their_loss), AGAINST, narrow)


def _config(config: VisualBertConfig, **more: Any) -> VisualBertConfig:
    values = config.to_dict()
    for name in ("id2label", "label2id"):  # they would be of two labels
        values.pop(name, None)
    return VisualBertConfig(**values | more)


def _take_weights(theirs: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "visual_bert.embeddings.position_ids"}
    take_weights(theirs, state, tied)
    theirs.tie_weights()


def _shape(batch: MicroBatch) -> str:
    counts = batch.arrays["text_lengths"]
    regions = np.diff(batch.arrays["cu_seqlens"]) - counts
    whole = len(counts) * (counts.max() + regions.max())
    return f"{len(counts)} samples, {batch.tokens:,} tokens, {whole:,} with padding"
