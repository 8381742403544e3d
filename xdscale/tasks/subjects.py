"""The three subjects of finetuning: language encoder alone, full cross-modal model, CLIP-T alone (spec xdbert §5.2)."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from xdscale.models.clip_text import CLIPTextEncoder
from xdscale.models.encoders import recompute_layers, valid_tokens
from xdscale.models.operations import initialise
from xdscale.models.xdbert import XDBERT
from xdscale.tasks.contract import Task

INITIAL_STD = 0.02
"""Of new heads, as in BERT."""


def name_outputs(config: PretrainedConfig, task: Task) -> None:
    """Says in a kept model's config.json what each output of its head stands for: the task's labels, if it has some."""
    labels = getattr(task, "labels", ())
    names = labels if len(labels) == task.outputs else [f"LABEL_{number}" for number in range(task.outputs)]
    config.id2label, config.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}


class LanguageClassifier(nn.Module):
    """The language encoder alone (XDBERT), with the published head: transformers' own classes.

    BERT: its pooler, dropout, Linear. ELECTRA: Linear, GELU, dropout, Linear on the first token. Multiple choice
    scores each text by itself.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def encoder(self) -> PreTrainedModel:
        """The encoder; BERT's pooler belongs to it."""
        return self.model.base_model

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass."""
        recompute_layers(self.model.base_model)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Reads language_ids, segments, language_mask and language_valid; returns logits [texts, outputs]."""
        mask = batch["language_mask"]
        outputs = self.model(
            input_ids=batch["language_ids"],
            attention_mask=mask,
            token_type_ids=_segments(batch["segments"], self.model.config),
            valid=valid_tokens(_texts(mask, 1), batch["language_valid"]),
        )
        return outputs.logits


class CrossModalClassifier(nn.Module):
    """The full cross-modal model (X-BERT): BERT's pooler and a Linear on the cross-modal output at [CLS]."""

    def __init__(self, encoder: XDBERT, outputs: int, *, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        size = encoder.language.config.hidden_size
        self.pooler = new_linear(size, size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = new_linear(size, outputs)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Reads the arrays of both encoders; returns logits [texts, outputs].

        The segments, which were all 0 in adaptation, mark the second sentence here.
        """
        language_ids, language_mask = _texts(batch["language_ids"], 1), _texts(batch["language_mask"], 1)
        clip_ids, clip_lengths = _texts(batch["clip_ids"], 2), _texts(batch["clip_lengths"], 1)
        first = torch.arange(len(language_ids), device=language_ids.device) * language_ids.shape[1]
        language, _ = self.encoder(
            language_ids,
            clip_ids,
            clip_lengths,
            language_mask,
            _segments(_texts(batch["segments"], 1), self.encoder.language.config),
            layout=batch,
            selected=(first, first[:0]),
        )  # [texts, size]
        pooled = torch.tanh(self.pooler(language))
        return self.classifier(self.dropout(pooled))


class ClipClassifier(nn.Module):
    """CLIP-T alone (Table 1, first row), read where CLIP reads it: at the end token, projected (paper §2.2).

    A sentence is the mean over its blocks, a pair the two sentences side by side; the paper does not say. A Linear on
    two vectors side by side cannot compare them, which is in keeping with its 51.62 on RTE and 22.07 on STS-B.
    """

    def __init__(self, encoder: CLIPTextEncoder, sentences: int, outputs: int, *, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.sentences = sentences
        self.dropout = nn.Dropout(dropout)
        self.classifier = new_linear(sentences * encoder.output_size, outputs)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Reads clip_ids, clip_lengths and clip_blocks; returns logits [texts, outputs]."""
        clip_ids, lengths = _texts(batch["clip_ids"], 2), _texts(batch["clip_lengths"], 1)
        texts, blocks, positions = clip_ids.shape
        filled = batch["clip_blocks"]
        states = self.encoder(clip_ids.flatten(0, 1).index_select(0, filled).unsqueeze(0)).squeeze(0)
        first = torch.arange(len(filled), device=filled.device) * positions
        ends = first + lengths.flatten().index_select(0, filled) - 1
        features = states.new_zeros(texts * blocks, states.shape[-1]).index_copy(
            0, filled, states.index_select(0, ends)
        )
        features = features.view(texts, self.sentences, -1, states.shape[-1])  # [texts, sentences, 2, size]
        used = (lengths > 0).view(texts, self.sentences, -1).sum(2, keepdim=True)
        return self.classifier(self.dropout((features.sum(2) / used).flatten(1)))


def _segments(segments: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Puts both sentences into segment 0 where an encoder has no other one."""
    return segments if config.type_vocab_size > 1 else torch.zeros_like(segments)


def new_linear(size: int, outputs: int) -> nn.Linear:
    """Returns a head's layer as BERT begins it; its values come from torch's global generator."""
    linear = nn.Linear(size, outputs)
    initialise([linear], INITIAL_STD)
    return linear


def _texts(array, dimensions: int):  # noqa: ANN001, ANN202 - tensors and numpy arrays alike
    """Returns [b, c, …] or [b, …] as [texts, …], where … has so many dimensions."""
    return array.reshape(-1, *array.shape[array.ndim - dimensions :])
