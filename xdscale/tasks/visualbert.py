"""VisualBERT as tasks read it: what its input and its heads are (spec VisualBERT §5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import VisualBertConfig

from xdscale.data.pictures import standardised
from xdscale.data.task_files import Example
from xdscale.data.task_pictures import Look
from xdscale.data.visual_tasks import VisualTaskCollator, table_widths
from xdscale.errors import XdscaleError
from xdscale.models.fast_rcnn import with_features
from xdscale.models.r2c import R2CDetector, load_detector
from xdscale.models.visualbert import VisualBERT
from xdscale.pretrained.language import read_config
from xdscale.pretrained.language_files import save_tokenizer
from xdscale.pretrained.visualbert import DETECTOR, load_visualbert, save_visualbert
from xdscale.recipes.visualbert.schema import VisualBERTSettings
from xdscale.tasks.contract import Task
from xdscale.tasks.subjects import name_outputs, new_linear
from xdscale.tasks.visual_subject import VisualSubject
from xdscale.weights import check_sha256, weight_files

POINTING_SIZE = 64
"""Width of query and keys with which a word asks for a region."""


class VisualBERTSubject(VisualSubject):
    """A VisualBERT in a Hugging Face folder: an export, or anybody's with its BERT's tokenizer beside the weights."""

    settings: VisualBERTSettings
    own_trunk, trunk_like, trunk_words = DETECTOR, R2CDetector.like, "r2c's ResNet"

    def require_readable(self, task: Task) -> None:
        """Checks that a task has objects where pixels are read; else any will do whose features have the model's width,
        also one of texts alone.
        """
        needed = ("object_classes", "object_masks", "outline_notes", "outlines_sha256")
        known = all(hasattr(task, method) for method in needed)
        if self.settings.pixels is not None and not known:
            raise XdscaleError(
                f"--task {task.name}: from pixels VisualBERT reads classes and outlines of objects, which VCR has: "
                "leave model.pixels out"
            )
        self.require_width(task)

    def reads_outlines(self) -> bool:
        """Returns whether masks of objects are read, as from pixels they are."""
        return self.settings.pixels is not None

    def collator(self, task: Task, examples: Sequence[Example]) -> VisualTaskCollator:
        """Tokenises a split; regions are read when they are needed."""
        self.require_width(task)
        pixels, look = self.settings.pixels, None
        if pixels is not None:
            look = Look(pixels, standardised, outlines=True, centres=True, classes=True)
        return VisualTaskCollator(
            task,
            examples,
            self._tokenizer(),
            self.regions,
            width=self._config().visual_embedding_dim if look is None else self.regions.width,
            max_length=self.settings.max_length,
            objects=self.settings.objects,
            truncation=self.settings.truncation,
            look=look,
        )

    def build(self, task: Task, *, sha256: str | None = None) -> "VisualBERTClassifier":
        """Builds the encoder with a new head."""
        dropout, trunk = self.settings.dropout, None
        if self.settings.pixels is not None:
            width = self._config().visual_embedding_dim
            trunk = load_detector(next(iter(self._trunk_file()), None), size=width, dropout=dropout)
            if self.settings.pixels.freeze:
                trunk.freeze_maps()
        if self.settings.weights == "pretrained":
            if sha256 is not None:
                check_sha256([*weight_files(self._folder), *self._trunk_file()], sha256)
            encoder, _ = load_visualbert(self._folder, dropout=dropout)
        else:
            config = self._config()
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
            encoder = VisualBERT(config)
        return VisualBERTClassifier(encoder.train(), task, dropout=dropout, trunk=trunk)

    def export(self, task: Task, state: dict[str, torch.Tensor], out: Path) -> str:
        """Writes encoder, head and, where it was tuned along, r2c's branch.

        transformers' `VisualBertModel` loads the encoder; what the head is called begins as in `VisualBERTClassifier`.
        """
        config = self._config()
        save_tokenizer(self._folder, out, positions=config.max_position_embeddings)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = self.settings.dropout
        name_outputs(config, task)
        named = {
            f"model.{name.removeprefix('encoder.')}" if name.startswith("encoder.") else name: value
            for name, value in state.items()
        }
        save_visualbert(config, named, out, alignment=getattr(config, "alignment", "mean"))
        trunk = "" if self.settings.pixels is None else ", r2c's branch of ResNet-50"
        return f"finetuned VisualBERT{trunk} and the task's head"

    def _widths(self) -> Sequence[int]:
        return table_widths(self._config().visual_embedding_dim)

    def _config(self) -> VisualBertConfig:
        return read_config(self._folder / "config.json", VisualBertConfig)


class VisualBERTClassifier(nn.Module):
    """VisualBERT with a task's head.

    A whole input is judged by a Linear on the pooled first token; an open question is answered by one on the state of
    the [MASK] behind it; and where a region is asked for, the word's state attends to those of the regions, with the
    scores before the softmax as logits.

    Attributes:
        encoder: VisualBERT.
        trunk: from pixels to features; None where these are read.
    """

    def __init__(self, encoder: VisualBERT, task: Task, *, dropout: float, trunk: R2CDetector | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.encoder = encoder
        self.reads = task.reads
        self.dropout = nn.Dropout(dropout)
        size = encoder.config.hidden_size
        if task.reads == "region":
            self.query, self.key = new_linear(size, POINTING_SIZE), new_linear(size, POINTING_SIZE)
        else:
            self.classifier = new_linear(size, task.outputs)
        if task.reads != "input":
            encoder.pooler.requires_grad_(False)  # no loss reaches it

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Computes logits; the last layer is computed only where they come from.

        Args:
            batch: the arrays of `xdscale.data.visual_tasks.VisualTaskCollator` as tensors.

        Returns:
            [inputs, outputs]; where a region is asked for [inputs, most regions], -inf where there is none.
        """
        batch = with_features(self.trunk, batch)
        if self.reads == "region":
            return self._pointed(batch)
        if self.reads == "answer":
            return self.classifier(self.dropout(self.encoder(batch, batch["answer_rows"]).states))
        first = batch["cu_seqlens"][:-1].to(torch.int64)
        return self.classifier(self.dropout(self.encoder(batch, first[:0]).pooled))

    def _pointed(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        inputs, of_input = len(batch["query_rows"]), batch["region_samples"]
        states = self.encoder(batch, torch.cat([batch["query_rows"], batch["region_rows"]])).states
        words, regions = states[:inputs], states[inputs:]
        queries = self.query(words).index_select(0, of_input)  # [r, 64]
        scores = (queries * self.key(regions)).sum(1) / POINTING_SIZE**0.5
        logits = scores.new_full((inputs * batch["most_regions"],), -torch.inf)
        return logits.index_copy(0, batch["region_slots"], scores).view(inputs, -1)
