"""VL-BERT on padded tensors, as its release computes it, with its parameter names: what others are measured against.

Slow and readable: eager attention, whole batches padded to the longest text and the most regions, vocabulary and class
projections of all positions. Tests compare with it too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEncoder, BertLMPredictionHead, BertPooler

NO_TARGET = -1


def coordinate_embeddings(boxes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Embeds boxes [n, 4] in pixels of images of sizes [n, 2], width and height: [n, 2048]."""
    x1, y1, x2, y2 = boxes.unbind(1)
    width, height = sizes.unbind(1)
    places = torch.stack([(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height], 1)
    waves = 1000 ** (torch.arange(256, dtype=boxes.dtype, device=boxes.device) / 256)
    angles = 100 * places[:, :, None] / waves
    return torch.cat([angles.sin(), angles.cos()], -1).reshape(len(boxes), 2048)


class PaddedEncoder(nn.Module):
    """What the release calls VisualLinguisticBert, and its heads where there are classes."""

    def __init__(self, config: BertConfig, classes: int, with_pooler: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.end_embedding = nn.Embedding(1, size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(3, size)
        self.embedding_LayerNorm = nn.LayerNorm(size, eps=1e-12)
        self.embedding_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.visual_ln_text = nn.LayerNorm(size, eps=1e-12)
        self.visual_ln_object = nn.LayerNorm(size, eps=1e-12)
        self.encoder = BertEncoder(config)
        if with_pooler:
            self.pooler = BertPooler(config)
        if classes:
            self.mlm_head = nn.ModuleDict({"predictions": BertLMPredictionHead(config)})
            self.mlm_head["predictions"].decoder.weight = self.word_embeddings.weight
            self.mlm_head["predictions"].decoder.bias = self.mlm_head["predictions"].bias
            dense = nn.ModuleDict({"dense": nn.Linear(size, size)})
            self.mvrc_head = nn.ModuleDict({"transform": dense, "region_cls_pred": nn.Linear(size, classes)})

    def forward(
        self,
        ids: torch.Tensor,
        types: torch.Tensor,
        text_visual: torch.Tensor,
        text_mask: torch.Tensor,
        objects: torch.Tensor,
        object_words: torch.Tensor,
        object_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Takes out padding between text and objects; returns states of both, padded as they came, of [END], pooled."""
        samples, size = len(ids), self.word_embeddings.weight.shape[1]
        texts = self.word_embeddings(ids) + self.visual_ln_text(text_visual)
        objects = object_words + self.visual_ln_object(objects)
        text_end = text_mask.sum(1, keepdim=True)
        object_end = text_end + object_mask.sum(1, keepdim=True)
        place = torch.arange(int(object_end.max()) + 1, device=ids.device).expand(samples, -1)
        is_text, is_end = place < text_end, place == object_end
        is_object = (place >= text_end) & (place < object_end)
        embedded = texts.new_zeros(samples, place.shape[1], size)
        embedded[is_text], embedded[is_object] = texts[text_mask], objects[object_mask]
        embedded[is_end] = self.end_embedding(torch.zeros_like(ids[:, 0]))
        segments, positions = torch.zeros_like(place), place.clone()
        segments[is_text] = types[text_mask]
        segments[is_object | is_end] = 2
        positions[is_object] = text_end.expand_as(place)[is_object]
        positions[is_end] = text_end[:, 0] + 1
        embedded = embedded + self.position_embeddings(positions) + self.token_type_embeddings(segments)
        embedded = self.embedding_dropout(self.embedding_LayerNorm(embedded))
        mask = (1.0 - (place <= object_end).to(embedded.dtype)) * -10000.0
        states = self.encoder(embedded, mask[:, None, None]).last_hidden_state
        text_states, object_states = torch.zeros_like(texts), torch.zeros_like(objects)
        text_states[text_mask], object_states[object_mask] = states[is_text], states[is_object]
        pooled = self.pooler(states) if hasattr(self, "pooler") else None
        return text_states, object_states, states[is_end], pooled


class PaddedVLBERT(nn.Module):
    """The release's module of pretraining with precomputed features; without classes its encoder alone."""

    def __init__(
        self, sizes: Mapping[str, Any], classes: int = 0, with_pooler: bool = False, appearance: int = 2048
    ) -> None:
        """Builds it with the sizes of a BERT's configuration."""
        super().__init__()
        config = BertConfig(**sizes, attn_implementation="eager")
        size = config.hidden_size
        self.vlbert = PaddedEncoder(config, classes, with_pooler)
        down = nn.Sequential(nn.Dropout(0.1), nn.Linear(2048 + appearance, size), nn.ReLU())
        self.image_feature_extractor = nn.ModuleDict({"obj_downsample": down})
        self.object_linguistic_embeddings = nn.Embedding(1, size)
        self.object_mask_word_embedding = nn.Embedding(1, size)
        self.object_mask_visual_embedding = nn.Embedding(1, appearance)
        self.aux_text_visual_embedding = nn.Embedding(1, size)

    def forward(
        self, batch: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Computes what `PaddedEncoder.forward` returns.

        Args:
            batch: ids, types, text_mask, looks_at [b, T]; boxes [b, K, 4], sizes [b, 2], features [b, K, 2048],
                box_mask and masked [b, K]. A sample without boxes is text alone.
        """
        features = torch.where(batch["masked"][:, :, None], self.object_mask_visual_embedding.weight, batch["features"])
        sizes = batch["sizes"][:, None].expand(-1, features.shape[1], -1).flatten(0, 1)
        where = coordinate_embeddings(batch["boxes"].flatten(0, 1), sizes).view(*features.shape[:2], 2048)
        objects = self.image_feature_extractor["obj_downsample"](torch.cat([where, features], -1))
        text_visual = objects.gather(1, batch["looks_at"][:, :, None].expand(-1, -1, objects.shape[-1]))
        alone = ~batch["box_mask"].any(1)
        text_visual = torch.where(alone[:, None, None], self.aux_text_visual_embedding.weight, text_visual)
        words = self.object_linguistic_embeddings.weight.expand_as(objects)
        words = torch.where(batch["masked"][:, :, None], self.object_mask_word_embedding.weight, words)
        return self.vlbert(
            batch["ids"], batch["types"], text_visual, batch["text_mask"], objects, words, batch["box_mask"]
        )

    def losses(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns means: of masked words with an image, of those of texts alone, of masked regions.

        Args:
            batch: as `forward`, with mlm_labels [b, T] and class_probs [b, K, classes], valid where they sum to 1.
        """
        texts, objects, _, _ = self(batch)
        alone, heads = ~batch["box_mask"].any(1), self.vlbert
        logits = heads.mlm_head["predictions"](texts)
        with_image, without = (
            F.cross_entropy(logits[which].flatten(0, 1), batch["mlm_labels"][which].flatten(), ignore_index=NO_TARGET)
            for which in (~alone, alone)
        )
        valid = (batch["class_probs"].sum(-1) - 1).abs() < 0.1
        scores = heads.mvrc_head["region_cls_pred"](F.gelu(heads.mvrc_head["transform"]["dense"](objects)))
        regions = (-scores.log_softmax(-1) * batch["class_probs"]).sum(-1)[valid].mean()
        return with_image, without, regions


def padded(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Takes a packed row apart into what `PaddedVLBERT.forward` reads; boxes are in hundredths of their image.

    Args:
        arrays: of `xdscale.data.vlbert.pack`.
    """
    counts, bounds = arrays["text_lengths"], arrays["cu_seqlens"]
    regions = np.diff(bounds) - counts - 1
    samples, words, most = len(counts), counts.max(), max(1, regions.max())
    names = {"ids": "text_ids", "types": "text_segments", "looks_at": "text_visual"}
    found = {name: torch.zeros(samples, words, dtype=torch.long) for name in names}
    text_mask, box_mask, masked = (torch.zeros(samples, n, dtype=torch.bool) for n in (words, most, most))
    boxes, features = torch.zeros(samples, most, 4), torch.zeros(samples, most, arrays["features"].shape[1])
    first = 0
    for row, (start, text, count) in enumerate(zip(bounds.tolist(), counts.tolist(), regions.tolist())):
        tokens, part = arrays["rows"][start : start + text], slice(first, first + count)
        for name, source in names.items():
            found[name][row, :text] = torch.from_numpy(arrays[source][tokens])
        found["looks_at"][row, :text] -= first
        text_mask[row, :text], box_mask[row, :count] = True, True
        x, y, width, height = torch.from_numpy(arrays["places"][part]).unbind(1)
        boxes[row, :count] = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)
        features[row, :count] = torch.from_numpy(arrays["features"][part]).float()
        masked[row, :count] = torch.from_numpy(arrays["masked_regions"][part]) == 1
        first += count
    found["looks_at"].clamp_(0, most - 1)  # of texts alone it is not looked at
    return found | {
        "text_mask": text_mask, "box_mask": box_mask, "boxes": boxes, "features": features, "masked": masked,
        "sizes": torch.full((samples, 2), 100.0),
    }  # fmt: skip


def padded_targets(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Returns what `PaddedVLBERT.losses` reads of a micro-batch of pretraining, with what is to be predicted."""
    found, right = padded(arrays), {}
    labels = torch.full_like(found["ids"], NO_TARGET)
    probs = torch.zeros(*found["box_mask"].shape, arrays["masked_region_labels"].shape[1])
    for name in ("mlm", "text_mlm"):
        right |= dict(zip(arrays[f"{name}_rows"].tolist(), arrays[f"{name}_labels"].tolist()))
    wanted = dict(zip(arrays["masked_region_rows"].tolist(), arrays["masked_region_labels"]))
    for row, (start, text) in enumerate(zip(arrays["cu_seqlens"].tolist(), arrays["text_lengths"].tolist())):
        for place in range(text):
            labels[row, place] = right.get(start + place, NO_TARGET)
        for place in range(int(found["box_mask"][row].sum())):
            if start + text + place in wanted:
                probs[row, place] = torch.from_numpy(wanted[start + text + place])
    return found | {"mlm_labels": labels, "class_probs": probs}
