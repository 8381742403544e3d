"""Runs a VisualBERT on captions with their images' regions, and counts what its attention heads ground (spec §7)."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import VisualBertModel

from xdscale.analysis.conllu import arcs, read_parses
from xdscale.analysis.grounding import ArcCounts, HeadAccuracy, HeadCounts
from xdscale.data.task_files import Example, Span
from xdscale.data.visual_tasks import VisualTaskCollator
from xdscale.errors import XdscaleError
from xdscale.pretrained.visualbert import load_visualbert, published_name
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.regions import RegionTable
from xdscale.systems.contract import Slots
from xdscale.tasks.flickr30k_entities import FLICKR30K_ENTITIES, read_captions


class HeadGrounding(NamedTuple):
    """What the heads of a model ground.

    Attributes:
        entities: of phrases with boxes.
        relations: of dependents of such phrases' words, by relation; None without parses.
    """

    entities: HeadAccuracy
    relations: dict[str, HeadAccuracy] | None


class Asked(NamedTuple):
    """A word from which heads are asked: the marked one of the example; its relation, or None for an entity."""

    example: Example
    relation: str | None


def captions_of(data: Path, split: str) -> list[str]:
    """Returns the captions of a split in the order in which their parses are expected.

    Raises:
        XdscaleError: files are missing or broken.
    """
    return [caption.text for caption in read_captions(_list_of(data, split))]


def ground_heads(model: Path, data: Path, regions: RegionTable, *, split: str, parses: Path | None) -> HeadGrounding:
    """Counts over a split of Flickr30K Entities.

    Args:
        model: an export, or another folder that `load_visualbert` reads, with its tokenizer.
        data: folder of the task's files.
        regions: of the images, with confidences for the baseline.
        split: "train", "dev" or "test".
        parses: the captions' dependencies in CoNLL-U, in the order of `captions_of`.

    Raises:
        XdscaleError: any of these is missing, broken, or does not fit the others.
    """
    asked = _asked(_list_of(data, split), parses)
    encoder = _eager(model)
    collate = VisualTaskCollator(
        FLICKR30K_ENTITIES,
        [one.example for one in asked],
        load_language_tokenizer(str(model)),
        regions,
        width=encoder.config.visual_embedding_dim,
        max_length=encoder.config.max_position_embeddings,
    )
    entities, relations = HeadCounts(), ArcCounts()
    captions = groupby(range(len(asked)), key=lambda place: (asked[place].example.images, asked[place].example.line))
    for places in (list(places) for _, places in captions):
        ids = np.array(places)
        batch = collate(Slots(np.zeros_like(ids), ids, np.ones(len(ids), bool)))
        found = batch.regions
        image = slice(*found.offsets[:2])
        for place, attention in zip(places, _attention(encoder, batch.arrays)):
            gold, relation = np.array(asked[place].example.truth.boxes), asked[place].relation
            counted = (attention, found.boxes[image], found.confidences[image], gold)
            if relation is None:
                entities.add(*counted)
            else:
                relations.add(relation, *counted)
    return HeadGrounding(entities.result(), None if parses is None else relations.result())


def _list_of(data: Path, split: str) -> Path:
    files = {"train": FLICKR30K_ENTITIES.train, **FLICKR30K_ENTITIES.dev}
    if split not in files:
        raise XdscaleError(f"--split {split}: expected {', '.join(files)}")
    return FLICKR30K_ENTITIES.locate(data) / files[split]


def _asked(path: Path, parses: Path | None) -> list[Asked]:
    """Returns entities and, behind those of the same caption, the dependents of their words."""
    examples = FLICKR30K_ENTITIES.read_examples(path, labelled=True)
    if parses is None:
        return [Asked(example, None) for example in examples]
    captions = list(read_captions(path))
    found = read_parses(parses, [caption.text for caption in captions])
    of_caption = {(caption.image, caption.line): parse for caption, parse in zip(captions, found)}
    asked = []
    for (image, line), group in groupby(examples, key=lambda example: (example.images[0], example.line)):
        phrases = list(group)
        asked += [Asked(example, None) for example in phrases]
        asked += [
            Asked(replace(arc.example, spans=(((Span(*arc.dependent, -1),),),)), arc.relation)
            for arc in arcs(of_caption[image, line], phrases)
        ]
    return asked


def _eager(folder: Path) -> VisualBertModel:
    """Returns the model as transformers computes it, which gives attention away."""
    model, _ = load_visualbert(folder, dropout=0.0)
    if model.fusion is not None:
        raise XdscaleError(f"{folder}: was trained without early fusion, so that no head of its layers reads regions")
    model.config._attn_implementation = "eager"
    encoder = VisualBertModel(model.config)
    encoder.load_state_dict({published_name(name): value for name, value in model.state_dict().items()})
    return encoder.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _attention(encoder: VisualBertModel, arrays: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Yields what regions get from each marked word of one caption, which all samples of a micro-batch hold.

    Yields:
        float32 [layers, heads, regions].
    """
    length, whole = int(arrays["text_lengths"][0]), int(arrays["cu_seqlens"][1])

    def rows(name: str, count: int) -> torch.Tensor:
        return torch.from_numpy(arrays[name][:count]).to(encoder.device).unsqueeze(0)

    with torch.no_grad():
        found = encoder(
            input_ids=rows("text_ids", length),
            token_type_ids=rows("text_segments", length),
            visual_embeds=rows("features", whole - length).float(),
            visual_token_type_ids=rows("region_segments", whole - length),
            output_attentions=True,
        ).attentions
    stacked = torch.stack(found)[:, 0].cpu().numpy()  # [layers, heads, positions, positions]
    for position in arrays["query_rows"] - arrays["cu_seqlens"][:-1]:
        yield stacked[:, :, position, length:]
