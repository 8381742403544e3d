"""VL-BERT on padded tensors, as its release computes it, with its parameter names: slow and readable, a reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEncoder, BertLMPredictionHead, BertPooler

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1, "intermediate_size": 96}
SIZES |= {"vocab_size": 99, "max_position_embeddings": 40, "hidden_dropout_prob": 0.1, "pad_token_id": 0}


def coordinate_embeddings(boxes, sizes):
    """boxes [n, 4] in pixels, sizes [n, 2]: width, height -> [n, 2048]."""
    x1, y1, x2, y2 = boxes.unbind(1)
    width, height = sizes.unbind(1)
    places = torch.stack([(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height], 1)
    waves = 1000 ** (torch.arange(256, dtype=boxes.dtype) / 256)
    angles = 100 * places[:, :, None] / waves
    return torch.cat([angles.sin(), angles.cos()], -1).reshape(len(boxes), 2048)


class Encoder(nn.Module):
    """What the release calls VisualLinguisticBert."""

    def __init__(self, config, classes, with_pooler):
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.end_embedding = nn.Embedding(1, size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(3, size)
        self.embedding_LayerNorm = nn.LayerNorm(size, eps=1e-12)
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

    def forward(self, ids, types, text_visual, text_mask, objects, object_words, object_mask):
        """Takes out padding between text and objects; returns states of both, padded as they came, of [END], pooled."""
        samples, size = len(ids), self.word_embeddings.weight.shape[1]
        texts = self.word_embeddings(ids) + self.visual_ln_text(text_visual)
        objects = object_words + self.visual_ln_object(objects)
        text_end = text_mask.sum(1, keepdim=True)
        object_end = text_end + object_mask.sum(1, keepdim=True)
        place = torch.arange(int(object_end.max()) + 1).expand(samples, -1)
        is_text, is_end = place < text_end, place == object_end
        is_object = (place >= text_end) & (place < object_end)
        embedded = texts.new_zeros(samples, place.shape[1], size)
        embedded[is_text], embedded[is_object] = texts[text_mask], objects[object_mask]
        embedded[is_end] = self.end_embedding(torch.zeros(samples, dtype=torch.long))
        segments, positions = torch.zeros_like(place), place.clone()
        segments[is_text] = types[text_mask]
        segments[is_object | is_end] = 2
        positions[is_object] = text_end.expand_as(place)[is_object]
        positions[is_end] = text_end[:, 0] + 1
        embedded = embedded + self.position_embeddings(positions) + self.token_type_embeddings(segments)
        mask = (1.0 - (place <= object_end).to(embedded.dtype)) * -10000.0
        states = self.encoder(self.embedding_LayerNorm(embedded), mask[:, None, None]).last_hidden_state
        text_states, object_states = torch.zeros_like(texts), torch.zeros_like(objects)
        text_states[text_mask], object_states[object_mask] = states[is_text], states[is_object]
        pooled = self.pooler(states) if hasattr(self, "pooler") else None
        return text_states, object_states, states[is_end], pooled


class PaddedVLBERT(nn.Module):
    """The release's module of pretraining with precomputed features; without classes its encoder alone."""

    def __init__(self, sizes, classes=0, with_pooler=False, appearance=2048):
        super().__init__()
        config = BertConfig(**sizes, attn_implementation="eager")
        size = config.hidden_size
        self.vlbert = Encoder(config, classes, with_pooler)
        down = nn.Sequential(nn.Dropout(0.1), nn.Linear(2048 + appearance, size), nn.ReLU())
        self.image_feature_extractor = nn.ModuleDict({"obj_downsample": down})
        self.object_linguistic_embeddings = nn.Embedding(1, size)
        self.object_mask_word_embedding = nn.Embedding(1, size)
        self.object_mask_visual_embedding = nn.Embedding(1, appearance)
        self.aux_text_visual_embedding = nn.Embedding(1, size)

    def forward(self, batch):
        """ids, types, text_mask, looks_at [b, T]; boxes [b, K, 4], sizes [b, 2], features [b, K, 2048], box_mask and
        masked [b, K]; a sample without boxes is text alone."""
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

    def losses(self, batch):
        """Means: masked words with an image, masked words of texts alone, masked regions; with mlm_labels [b, T] and
        class_probs [b, K, classes], valid where they sum to 1."""
        texts, objects, _, _ = self(batch)
        alone, heads = ~batch["box_mask"].any(1), self.vlbert
        logits = heads.mlm_head["predictions"](texts)
        with_image, without = (
            F.cross_entropy(logits[which].flatten(0, 1), batch["mlm_labels"][which].flatten(), ignore_index=-1)
            for which in (~alone, alone)
        )
        valid = (batch["class_probs"].sum(-1) - 1).abs() < 0.1
        hidden = F.gelu(heads.mvrc_head["transform"]["dense"](objects[valid]))
        scores = heads.mvrc_head["region_cls_pred"](hidden)
        regions = (-scores.log_softmax(-1) * batch["class_probs"][valid]).sum(1).mean()
        return with_image, without, regions


def loaded(path, config, **options):
    """The release's module with the weights of a `.model` file, all of which it must have."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = {name: getattr(config, name) for name in names}
    model = PaddedVLBERT(sizes, appearance=config.appearance_size, with_pooler=config.with_pooler, **options)
    state = torch.load(path, weights_only=True)["state_dict"]
    found = model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()}, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"vlbert.mlm_head.predictions.decoder.bias"}  # another name of a bias
    return model.eval()


def padded(arrays):
    """A packed row taken apart into what the module reads; boxes are in hundredths of their image."""
    counts, bounds = arrays["text_lengths"], arrays["cu_seqlens"]
    regions = np.diff(bounds) - counts - 1
    samples, words, most = len(counts), counts.max(), max(1, regions.max())
    names = {"ids": "text_ids", "types": "text_segments", "looks_at": "text_visual"}
    found = {name: torch.zeros(samples, words, dtype=torch.long) for name in names}
    text_mask, box_mask, masked = (torch.zeros(samples, n, dtype=bool) for n in (words, most, most))
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


def reference(**options):
    """The release's module, whose norms and vectors are not those of the start."""
    torch.manual_seed(1)
    model = PaddedVLBERT(SIZES, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.5)
    return model.eval()


@pytest.fixture
def release(tmp_path):
    """Returns the release's module and the `.model` file that it would save."""

    def of(**options):
        theirs, path = reference(**options), tmp_path / "vl-bert.model"
        state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state, "rng": [1, 2]}, path)
        return theirs, path

    return of
