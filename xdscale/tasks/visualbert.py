"""VisualBERT as tasks read it: what its input and its heads are (spec VisualBERT §5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import VisualBertConfig

from xdscale.data.task_files import Example
from xdscale.data.visual_tasks import VisualTaskCollator
from xdscale.errors import XdscaleError
from xdscale.models.visualbert import VisualBERT
from xdscale.names import resolve_path
from xdscale.pretrained.language import read_config
from xdscale.pretrained.visualbert import load_visualbert
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.sources.text_build import LanguageTokenizer
from xdscale.tasks.contract import OWN_SETTINGS, Subject, SubjectFacts, Task
from xdscale.tasks.subjects import new_linear
from xdscale.weights import check_sha256, weight_files

POINTING_SIZE = 64
"""Width of query and keys with which a word asks for a region."""


class VisualBERTSubject(Subject):
    """A VisualBERT in a Hugging Face folder: an export, or anybody's with its BERT's tokenizer beside the weights."""

    own_settings = OWN_SETTINGS
    own_positions = 0
    """Positions of the text's table that it needs behind those of a text."""

    def require_readable(self, task: Task) -> None:
        """Any task will do: one without images is read as text alone."""

    def describe(self) -> SubjectFacts:
        """Checks configuration, tokenizer and weights."""
        folder, config = self._folder, self._config()
        room = config.max_position_embeddings - self.own_positions
        if self.settings.max_length > room:
            raise XdscaleError(
                f"model.max_length = {self.settings.max_length}: {self.model} has {room} positions for a text"
            )
        self._tokenizer()
        encoder = f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}"
        pretrained = self.settings.weights == "pretrained"
        return SubjectFacts(config.hidden_size, encoder, weight_files(folder) if pretrained else None)

    def collator(self, task: Task, examples: Sequence[Example]) -> VisualTaskCollator:
        """Tokenises a split; regions are read when they are needed."""
        return VisualTaskCollator(
            task,
            examples,
            self._tokenizer(),
            self.regions,
            width=self._config().visual_embedding_dim,
            max_length=self.settings.max_length,
            objects=self.settings.objects,
            truncation=self.settings.truncation,
        )

    def build(self, task: Task, *, sha256: str | None = None) -> "VisualBERTClassifier":
        """Builds the encoder with a new head."""
        dropout = self.settings.dropout
        if self.settings.weights == "pretrained":
            if sha256 is not None:
                check_sha256(weight_files(self._folder), sha256)
            encoder, _ = load_visualbert(self._folder, dropout=dropout)
        else:
            config = self._config()
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
            encoder = VisualBERT(config)
        return VisualBERTClassifier(encoder.train(), task, dropout=dropout)

    def _config(self) -> VisualBertConfig:
        return read_config(self._folder / "config.json", VisualBertConfig)

    def _tokenizer(self) -> tuple[Tokenizer, LanguageTokenizer]:
        tokenizer, info = load_language_tokenizer(str(self._folder))
        embeddings = self._config().vocab_size
        if info.vocab_size > embeddings:
            raise XdscaleError(
                f"{self.model}: its tokenizer has {info.vocab_size} ids, but the encoder has embeddings for "
                f"{embeddings}; put the tokenizer there that the weights were trained with"
            )
        return tokenizer, info

    @property
    def _folder(self) -> Path:
        return resolve_path(self.model)


class VisualBERTClassifier(nn.Module):
    """VisualBERT with a task's head.

    A whole input is judged by a Linear on the pooled first token; an open question is answered by one on the state of
    the [MASK] behind it; and where a region is asked for, the word's state attends to those of the regions, with the
    scores before the softmax as logits.
    """

    def __init__(self, encoder: VisualBERT, task: Task, *, dropout: float) -> None:
        super().__init__()
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

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass."""
        self.encoder.enable_activation_checkpointing()

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Computes logits; the last layer is computed only where they come from.

        Args:
            batch: the arrays of `xdscale.data.visual_tasks.VisualTaskCollator` as tensors.

        Returns:
            [inputs, outputs]; where a region is asked for [inputs, most regions], -inf where there is none.
        """
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
