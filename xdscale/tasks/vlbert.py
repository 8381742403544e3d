"""VL-BERT as tasks read it: what its input, its heads and its losses are (spec VL-BERT §5)."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from xdscale.data.feature_source import notes_on_features, of_same_network
from xdscale.data.task_files import Example
from xdscale.data.task_pictures import Look
from xdscale.data.vlbert_tasks import OBJECT_CLASS, VLBERTTaskCollator
from xdscale.errors import XdscaleError
from xdscale.models.fast_rcnn import FEATURES, FastRCNN, load_fast_rcnn, with_features
from xdscale.models.heads import RegionClassHead
from xdscale.models.vlbert import VLBERT, VLBertConfig
from xdscale.pretrained.language import read_config
from xdscale.pretrained.language_files import save_tokenizer
from xdscale.pretrained.vlbert import POOLER, TRUNK, load_vlbert, read_pooler, save_vlbert
from xdscale.recipes.vlbert.schema import VLBERTSettings
from xdscale.systems.contract import Objective, Term
from xdscale.tasks.contract import SubjectFacts, Task
from xdscale.tasks.subjects import name_outputs
from xdscale.tasks.visual_subject import VisualSubject
from xdscale.weights import check_sha256, some, weight_files, weights_sha256

_OF_HEAD = {"answer": "mlm.", "region": "masked_region."}
"""Whose first layer a task's head begins with, by what the task reads."""


class VLBERTSubject(VisualSubject):
    """A VL-BERT in a folder: an export, with its BERT's tokenizer."""

    settings: VLBERTSettings
    own_positions = 2
    """Of regions, which share one, and of [END]."""
    own_trunk, trunk_like, trunk_words = TRUNK, FastRCNN.like, "Fast R-CNN"

    def require_readable(self, task: Task) -> None:
        """Checks that a task has one image at most, and that features and words are the model's."""
        if task.images > 1:
            raise XdscaleError(f"--task {task.name}: VL-BERT reads one image, not {task.images}")
        for name in ("flip", "object_loss", "object_masks", "pixels"):
            if getattr(self.settings, name) and not task.images:
                raise XdscaleError(f"--task {task.name} reads no images: leave model.{name} out")
        for name, methods in (
            ("object_loss", ("object_classes", "object_count")),
            ("object_masks", ("object_masks", "outline_notes", "outlines_sha256")),
        ):
            if getattr(self.settings, name) and not all(hasattr(task, method) for method in methods):
                raise XdscaleError(f"--task {task.name} knows no objects, VCR does: leave model.{name} out")
        if self.settings.object_masks and self.settings.pixels is None:
            raise XdscaleError("model.object_masks are for C5, which reads pixels: state model.pixels, or leave it out")
        if self.settings.pixels is not None and self.settings.pixels.freeze:
            raise XdscaleError(
                f"model.pixels.freeze = true: {self.model} has no such choice, VisualBERT has; leave it out"
            )
        self.require_width(task)
        if self.settings.draws:
            self._sides()

    def objectives(self) -> dict[str, Objective]:
        """Returns the loss on classes of objects, if it is on."""
        return {OBJECT_CLASS: Objective(self.settings.object_loss)} if self.settings.object_loss else {}

    def reads_outlines(self) -> bool:
        """Returns whether masks of objects are multiplied with states."""
        return self.settings.object_masks is not None

    def notes(self) -> list[str]:
        """Returns a line as others do; a model that was trained from pixels reads features of its own branch alone."""
        branch = self._folder / TRUNK
        if self.regions is None or self.settings.pixels is not None or not branch.is_file():
            return super().notes()
        own = {"model": "vlbert:resnet101", "sha256": weights_sha256([branch])}
        return notes_on_features(own, self.regions, self.model)

    def describe(self) -> SubjectFacts:
        """Checks configuration, tokenizer and weights, those of the branch of Fast R-CNN among them."""
        width = self._config().appearance_size
        if self.settings.pixels is not None and width != FEATURES:
            raise XdscaleError(
                f"model.pixels: {self.model} reads {width} numbers of each region, but ResNet-101 makes {FEATURES}"
            )
        return super().describe()

    def collator(self, task: Task, examples: Sequence[Example]) -> VLBERTTaskCollator:
        """Tokenises a split; regions are read when they are needed."""
        return self.training_collator(task, examples, None)

    def training_collator(self, task: Task, examples: Sequence[Example], seed: int | None) -> VLBERTTaskCollator:
        """Tokenises the split that is trained on, of which a share `model.flip` of the images is mirrored.

        Raises:
            XdscaleError: its features are of another width, or a part of a text speaks of a region.
        """
        if task.reads == "region" and any(map(_marks_a_part, examples)):
            raise XdscaleError(
                f"--task {task.name}: VL-BERT points at what a whole text speaks of, but here a part of it does"
            )
        config = self._config()
        width, pixels, flips = config.appearance_size, self.settings.pixels, {}
        tokenizer = self._tokenizer()
        if seed is not None:
            flips = {"flip": self.settings.flip, "sides": self._sides(), "seed": seed}
        if pixels is not None:
            width = self.regions.width
        self.require_width(task)
        return VLBERTTaskCollator(
            task,
            examples,
            tokenizer,
            self.regions,
            width=width,
            max_length=self.settings.max_length,
            means=config.masks_features,
            look=None if pixels is None else Look(pixels, outlines=self.reads_outlines()),
            classes=task.object_count if self.settings.object_loss else 0,
            **flips,
        )

    def build(self, task: Task, *, sha256: str | None = None) -> "VLBERTClassifier":
        """Builds the encoder with a new head, whose first layer is that of a head of pretraining where it comes along.

        For pairs of texts, the second one's segment begins as the first one's where nothing has trained it yet:
        pretraining has one alone.
        """
        trunk, config, heads = self._build_trunk(), self._config(), {}
        config.with_pooler = task.reads == "input"
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = self.settings.dropout
        encoder = VLBERT(config)
        if self.settings.weights == "pretrained":
            if sha256 is not None:
                check_sha256([*weight_files(self._folder), *self._trunk_file()], sha256)
            found, heads = load_vlbert(self._folder)
            state, own = read_pooler(self._folder) | found.state_dict(), encoder.state_dict()
            wrong = [name for name in own.keys() & state.keys() if state[name].shape != own[name].shape]
            if wrong:
                raise XdscaleError(f"{self._folder / POOLER}: holds no fitting weights for {some(sorted(wrong))}")
            encoder.load_state_dict({name: state.get(name, value) for name, value in own.items()})
            if task.sentences > 1 and not config.second_segment:
                segments = encoder.embeddings.token_type_embeddings.weight.data
                segments[1] = segments[0]
        module = VLBERTClassifier(
            encoder.train(),
            task,
            dropout=self.settings.dropout,
            loss=self.settings.loss,
            trunk=trunk,
            object_count=task.object_count if self.settings.object_loss else 0,
        )
        module.begin_with(heads)
        return module

    def export(self, task: Task, state: dict[str, torch.Tensor], out: Path) -> str:
        """Writes encoder, head and, where it was tuned along, the branch of Fast R-CNN, as `load_vlbert` reads them.

        What the task's own last layer is called begins with `classifier`.
        """
        config = self._config()
        save_tokenizer(self._folder, out, positions=config.max_position_embeddings)
        config.with_pooler = "encoder.pooler.weight" in state
        config.second_segment |= task.sentences > 1 or task.reads == "answer"  # which stands in it
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = self.settings.dropout
        name_outputs(config, task)
        head = _OF_HEAD.get(task.reads, "")
        new = {"encoder.": "model.", "transform.": f"{head}transform.", "norm.": f"{head}norm."}
        named = {}
        for name, value in state.items():
            begin = next((begin for begin in new if name.startswith(begin)), "")
            named[new.get(begin, "") + name.removeprefix(begin)] = value
        save_vlbert(config, named, out)
        if not config.with_pooler and (self._folder / POOLER).is_file():
            shutil.copyfile(self._folder / POOLER, out / POOLER)  # for tasks that judge a whole input
        trunk = "" if self.settings.pixels is None else ", its branch of Fast R-CNN"
        return f"finetuned VL-BERT{trunk} and the task's head"

    def _build_trunk(self) -> FastRCNN | None:
        if self.settings.pixels is None:
            return None
        trunk = load_fast_rcnn(next(iter(self._trunk_file()), None))
        trunk.masks_at = self.settings.object_masks or trunk.masks_at
        return trunk

    def _sides(self) -> tuple[int, int] | None:
        """Returns the word pieces that change places where an image is mirrored; None for none."""
        if not self.settings.swap_words:
            return None
        left, right = map(self.tokenizer().token_to_id, ("left", "right"))
        if left is None or right is None:
            raise XdscaleError(
                f"model.swap_words = true: the tokenizer of {self.model} has no word pieces 'left' and 'right'; "
                "model.swap_words=false leaves words as they are where an image is mirrored"
            )
        return left, right

    def _widths(self) -> Sequence[int]:
        return (self._config().appearance_size,)

    def _needed(self) -> str:
        return needed_features(self._folder, self._config())

    def _config(self) -> VLBertConfig:
        return read_config(self._folder / "config.json", VLBertConfig)


def needed_features(folder: Path, config: VLBertConfig) -> str:
    """Says where the features come from that a VL-BERT in a folder reads: of its own branch, or of another network."""
    branch = folder / TRUNK
    if not branch.is_file():
        return of_same_network(getattr(config, "features_of", None))
    network = f"--network vlbert:{load_fast_rcnn(branch).name} --weights {branch}"
    command = f"xdscale regions extract IMAGES {network} --boxes BOXES --whole-image --out DATASET"
    return f"its own branch makes them from pixels: '{command}'"


def _marks_a_part(example: Example) -> bool:
    """Whether a region is asked for that other words than the whole text name."""
    return any(
        span.region < 0 and (span.start, span.end) != (0, len(text))
        for texts, marked in zip(example.texts, example.spans)
        for text, spans in zip(texts, marked)
        for span in spans
    )


class VLBERTClassifier(nn.Module):
    """VL-BERT with a task's head and loss.

    A whole input is judged by a Linear on the pooled first token. An open question is answered by the masked-LM head's
    transform and a Linear on the state of the [MASK] behind it; where a region is asked for, the transform of the
    region head and a Linear score each region. Answers, choices and regions are each right or wrong by themselves, as
    the release has it: the losses are binary cross-entropies, summed over answers, and means over choices and over an
    image's regions. With `loss` "softmax" the task's own loss counts, as the paper has it.

    Attributes:
        encoder: VL-BERT.
        trunk: from pixels to features; None where these are read.
        objects: head of the second loss, on the classes of regions; None where it is off.
    """

    def __init__(
        self,
        encoder: VLBERT,
        task: Task,
        *,
        dropout: float,
        loss: str,
        trunk: FastRCNN | None = None,
        object_count: int,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.encoder = encoder
        self.task = task
        self.judges_each = loss == "sigmoid" and (task.reads != "input" or task.choices > 0)
        size, eps = encoder.config.hidden_size, encoder.config.layer_norm_eps
        self.dropout = nn.Dropout(dropout if task.reads != "region" else 0.0)  # as in the release
        self.transform = nn.Linear(size, size) if task.reads != "input" else None
        self.norm = nn.LayerNorm(size, eps=eps) if task.reads == "answer" else None
        self.classifier = nn.Linear(size, max(1, task.outputs))
        for linear in (self.transform, self.classifier):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        self.objects = None
        if object_count:
            activation, std = ACT2FN[encoder.config.hidden_act], encoder.config.initializer_range
            self.objects = RegionClassHead(size, object_count, activation=activation, std=std)

    def begin_with(self, heads: Mapping[str, torch.Tensor]) -> None:
        """Takes over what pretraining's heads have for this one, if they come along."""
        of_head = _OF_HEAD.get(self.task.reads)
        own = self.state_dict()
        found = {name: heads[f"{of_head}{name}"] for name in own if name.startswith(("transform.", "norm."))
                 and f"{of_head}{name}" in heads}  # fmt: skip
        self.load_state_dict(own | found)
        if self.objects is not None:
            own, begin = self.objects.state_dict(), "masked_region.transform."
            found = {name.removeprefix("masked_region."): heads[name] for name in heads if name.startswith(begin)}
            self.objects.load_state_dict(own | found)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, dict[str, Term]]:
        """Computes logits; the last layer is computed only where a loss comes from.

        Args:
            batch: the arrays of `xdscale.data.vlbert_tasks.VLBERTTaskCollator` as tensors.

        Returns:
            [inputs, outputs]; where a region is asked for [inputs, most regions], -inf where there is none. With the
            second loss its term beside them.
        """
        batch = with_features(self.trunk, batch)
        if self.task.reads == "input":
            rows = batch["text_ids"][:0] if self.objects is None else batch["object_rows"]
            found = self.encoder(batch, rows)
            logits = self.classifier(self.dropout(found.pooled))
            if self.objects is None:
                return logits
            return logits, {OBJECT_CLASS: Term.scored(*self.objects(found.states, batch["object_labels"]))}
        name = "answer_rows" if self.task.reads == "answer" else "region_rows"
        hidden = F.gelu(self.transform(self.encoder(batch, batch[name]).states))
        if self.task.reads == "answer":
            return self.classifier(self.dropout(self.norm(hidden)))
        scores = self.classifier(self.dropout(hidden)).squeeze(1)
        logits = scores.new_full((len(batch["text_lengths"]) * batch["most_regions"],), -torch.inf)
        return logits.index_copy(0, batch["region_slots"], scores).view(len(batch["text_lengths"]), -1)

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, real: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes a micro-batch's loss in the place of the task's, and what the task counts as right.

        Arguments and results as `xdscale.tasks.contract.Task.loss`.
        """
        loss, correct = self.task.loss(logits, targets, real)
        if not self.judges_each:
            return loss, correct
        if self.task.choices:
            targets = F.one_hot(targets.clamp(min=0), logits.shape[1]).to(logits.dtype)
        there = real[:, None] & (logits != -torch.inf)  # what is no number stays, and makes the loss none
        wanted = (targets > 0).to(logits.dtype) if self.task.reads == "region" else targets
        errors = F.binary_cross_entropy_with_logits(logits.masked_fill(~there, 0.0), wanted, reduction="none")
        errors = errors.masked_fill(~there, 0.0).sum(1)
        if self.task.reads != "answer":
            errors = errors / there.sum(1).clamp(min=1)
        return errors.sum(), correct
