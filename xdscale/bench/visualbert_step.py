"""`xdscale bench step` of VisualBERT: whole training steps, against transformers' own models as a user runs them.

The same weights, samples and targets, in turns: packed here, padded to the longest text and the most regions there.
transformers has one attention for VisualBERT, in plain operations. The learning rate is 0, so that every step starts
from the same weights while the update costs what it always costs.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    PreTrainedModel,
    VisualBertConfig,
    VisualBertForPreTraining,
    VisualBertForQuestionAnswering,
)

from xdscale.bench.step import activation_bytes, check_counts, matmul_rate, update_masters
from xdscale.bench.step_report import spread
from xdscale.data.visual_text import pack
from xdscale.data.visualbert import compose
from xdscale.devices import rank_device
from xdscale.errors import XdscaleError
from xdscale.pretrained.visualbert import published_weights
from xdscale.recipes.visualbert.schema import VisualBERTRecipe
from xdscale.shards.regions import Regions
from xdscale.shards.sources.text_build import LanguageTokenizer
from xdscale.systems.contract import MicroBatch, Slots, open_system
from xdscale.tasks.visualbert import VisualBERTClassifier
from xdscale.training.engine import to_device
from xdscale.training.stored import build_module

ANSWERS = 3129
CAPTION_WORDS, QUESTION_WORDS = (8, 20), (5, 14)
CLS, SEP, MASK = 101, 102, 103

THEIRS, THEIRS_AUTOCAST = "transformers, fp32", "transformers, autocast"
OURS, OURS_AUTOCAST, OURS_MASTERS = "xdscale, fp32", "xdscale, autocast", "xdscale, bf16 with fp32 masters"


@dataclass
class Contestant:
    """One way to compute a step.

    Attributes:
        module: with the fp32 weights.
        loss: computes it with a module, which is this one or its copy in bf16.
        fused: whether AdamW is PyTorch's fused one, or its default, as a user takes it.
        seconds: of each step that was measured.
        peak: memory of forward and backward above weights and gradients, in bytes.
    """

    module: nn.Module
    loss: Callable[[nn.Module], torch.Tensor]
    fused: bool
    autocast: bool = False
    masters: bool = False
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.device = trained[0].device
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=self.fused or None)
        self.computing = copy.deepcopy(self.module).to(torch.bfloat16) if self.masters else self.module
        self._gradients = [torch.empty_like(p, requires_grad=False) for p in self.module.parameters()] * self.masters

    def step(self) -> None:
        """Makes a step and keeps its time."""
        self._wait()
        began = time.perf_counter()
        self._forward_backward()
        if self.masters:
            update_masters(self.optimizer, self.module, self.computing, self._gradients)
        else:
            self.optimizer.step()
        self._wait()
        self.seconds.append(time.perf_counter() - began)

    def measure_memory(self) -> None:
        """Finds the peak of a step, and warms caches."""
        for module in (self.module, self.computing):  # freeing what others left would count as memory gained
            module.zero_grad(set_to_none=True)
        if self.device.type == "cpu":
            self.peak = activation_bytes(self._forward_backward, self.computing.parameters())
            return
        self._forward_backward()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._forward_backward()
        self.peak = torch.cuda.max_memory_allocated(self.device) - before

    def _forward_backward(self) -> None:
        torch.manual_seed(0)
        for module in (self.module, self.computing):
            module.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.computing)
        loss.backward()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Case:
    """A step that both compute.

    Attributes:
        name: in words, with its shape.
        disagreement: relative difference of the two losses in fp32, without dropout.
        contestants: by name.
    """

    name: str
    disagreement: float
    contestants: dict[str, Contestant]

    def ratio(self, faster: str, slower: str) -> list[float]:
        """Returns how many times as fast one was as the other, turn by turn."""
        pairs = zip(self.contestants[slower].seconds, self.contestants[faster].seconds)
        return [one / other for one, other in pairs]


def bench_visualbert(recipe: VisualBERTRecipe, pairs: int, sequences: int) -> None:
    """Measures pretraining and VQA and prints tables.

    Args:
        recipe: of its model, with random weights; its data is not read, lengths are drawn.
        pairs: how many times each contestant steps, in turns.
        sequences: samples per step.

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
    for case in measure_visualbert(recipe, device, pairs, sequences):
        console.print(_table(case))


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
    random = spec.language.model_copy(update={"weights": "random", "sha256": None})
    recipe = recipe.model_copy(update={"model": spec.model_copy(update={"language": random})})
    for make in (_pretraining, _adaptive_answers, _fixed_answers):
        torch.manual_seed(recipe.training.seed)
        case = make(recipe, device, sequences, narrow)
        for contestant in case.contestants.values():
            contestant.measure_memory()
        for _ in range(pairs):
            for contestant in case.contestants.values():
                contestant.step()
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
    texts = [[_words(chance, CAPTION_WORDS) for _ in range(2)] for _ in range(samples)]
    regions = _regions(chance, samples, 36, 100, recipe.model.region_size)
    slots = Slots(np.zeros(samples, np.int64), np.arange(samples), np.ones(samples, bool))
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
    return _case(name, ours, our_loss, theirs.to(device), lambda module: module(**inputs).loss, narrow)


def _adaptive_answers(recipe: VisualBERTRecipe, device: torch.device, samples: int, narrow: bool) -> Case:
    return _answers(recipe, device, samples, narrow, 10)


def _fixed_answers(recipe: VisualBERTRecipe, device: torch.device, samples: int, narrow: bool) -> Case:
    return _answers(recipe, device, samples, narrow, 100)


def _answers(recipe: VisualBERTRecipe, device: torch.device, samples: int, narrow: bool, fewest: int) -> Case:
    """A question with [MASK] behind it and so many to 100 regions, against `VisualBertForQuestionAnswering`."""
    chance = np.random.default_rng(0)
    texts = [np.concatenate([[CLS], _words(chance, QUESTION_WORDS), [MASK, SEP]]) for _ in range(samples)]
    regions = _regions(chance, samples, fewest, 100, recipe.region_width)
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
    return _case(name, ours, our_loss, theirs.to(device), their_loss, narrow)


def _case(
    name: str,
    ours: nn.Module,
    our_loss: Callable[[nn.Module], torch.Tensor],
    theirs: PreTrainedModel,
    their_loss: Callable[[nn.Module], torch.Tensor],
    narrow: bool,
) -> Case:
    with _evaluating(ours, theirs), torch.no_grad():
        disagreement = abs(our_loss(ours) / their_loss(theirs) - 1).item()
    contestants = {THEIRS: Contestant(theirs, their_loss, False), OURS: Contestant(ours, our_loss, True)}
    if narrow:
        contestants[THEIRS_AUTOCAST] = Contestant(theirs, their_loss, False, autocast=True)
        contestants[OURS_AUTOCAST] = Contestant(ours, our_loss, True, autocast=True)
        contestants[OURS_MASTERS] = Contestant(ours, our_loss, True, masters=True)
    return Case(name, disagreement, contestants)


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    for module in modules:
        module.eval()
    yield
    for module in modules:
        module.train()


def _config(config: VisualBertConfig, **more: Any) -> VisualBertConfig:
    values = config.to_dict()
    for name in ("id2label", "label2id"):  # they would be of two labels
        values.pop(name, None)
    return VisualBertConfig(**values | more)


def _take_weights(theirs: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    found = theirs.load_state_dict(state, strict=False)
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "visual_bert.embeddings.position_ids"}
    if found.unexpected_keys or {*found.missing_keys} - tied:
        raise ValueError(f"not the same parameters: {found}")
    theirs.tie_weights()
    theirs.train()


def _words(chance: np.random.Generator, lengths: tuple[int, int]) -> np.ndarray:
    return chance.integers(1000, 1200, chance.integers(lengths[0], lengths[1] + 1))


def _regions(chance: np.random.Generator, samples: int, fewest: int, most: int, width: int) -> Regions:
    counts = chance.integers(fewest, most + 1, samples)
    boxes = np.zeros((counts.sum(), 4), np.float32)
    features = chance.standard_normal((len(boxes), width), np.float32).astype(np.float16)
    sizes = np.ones((samples, 2), np.uint16)
    return Regions(features, boxes, boxes[:, 0], sizes, np.concatenate([[0], np.cumsum(counts)]))


def _shape(batch: MicroBatch) -> str:
    counts = batch.arrays["text_lengths"]
    regions = np.diff(batch.arrays["cu_seqlens"]) - counts
    whole = len(counts) * (counts.max() + regions.max())
    return f"{len(counts)} samples, {batch.tokens:,} tokens, {whole:,} with padding"


def _table(case: Case) -> Table:
    caption = f"against {THEIRS}; its loss and ours differ by {case.disagreement:.0e}, without dropout"
    table = Table(title=case.name, caption=caption)
    for heading in ("", "seconds", "times as fast", "activations, MiB", "share"):
        table.add_column(heading, justify="left" if not heading else "right")
    base = case.contestants[THEIRS]
    for name, contestant in case.contestants.items():
        share = f"{contestant.peak / base.peak:.2f}"
        faster = spread(case.ratio(name, THEIRS))
        table.add_row(name, spread(contestant.seconds), faster, f"{contestant.peak / 2**20:,.0f}", share)
    return table
