"""Runs a VisualBERT on captions with their images' regions, and counts what its attention heads ground (spec §7)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table
from transformers import VisualBertModel

from xdscale.analysis import pictures
from xdscale.analysis.conllu import arcs, read_parses
from xdscale.analysis.grounding import (
    PUBLISHED_ARCS,
    PUBLISHED_ENTITIES,
    ArcCounts,
    HeadAccuracy,
    HeadCounts,
    arcs_csv,
    head_name,
    heads_csv,
)
from xdscale.analysis.shown import AttentionMap, map_csv, new_table, print_table
from xdscale.data.feature_source import of_same_network, require_width
from xdscale.data.json_shapes import read_whole
from xdscale.data.task_files import Example, Span
from xdscale.data.visual_tasks import VisualTaskCollator, table_widths
from xdscale.errors import XdscaleError
from xdscale.files import check_output_folder, write_outputs
from xdscale.pretrained.visualbert import load_visualbert, published_name
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.regions import RegionTable
from xdscale.systems.contract import MicroBatch, Slots
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


class HeadReader:
    """A VisualBERT on a split of Flickr30K Entities."""

    def __init__(self, model: Path, data: Path, regions: RegionTable, *, split: str, parses: Path | None) -> None:
        """Reads everything.

        Args:
            model: an export, or another folder that `load_visualbert` reads, with its tokenizer.
            data: folder of the task's files.
            regions: of the images; without confidences there is no baseline.
            split: "train", "dev" or "test".
            parses: the captions' dependencies in CoNLL-U, in the order of `captions_of`.

        Raises:
            XdscaleError: any of these is missing, broken, or does not fit the others.
        """
        self._asked = _asked(_list_of(data, split), parses)
        self._with_parses, self._build = parses is not None, regions.build
        self._encoder = _eager(model)
        config = self._encoder.config
        trained = getattr(config, "features_of", None)
        require_width(regions, table_widths(config.visual_embedding_dim), str(model), lambda: of_same_network(trained))
        self._tokenizer = load_language_tokenizer(str(model))
        self._collate = VisualTaskCollator(
            FLICKR30K_ENTITIES,
            [one.example for one in self._asked],
            self._tokenizer,
            regions,
            width=config.visual_embedding_dim,
            max_length=config.max_position_embeddings,
        )

    def count(self) -> HeadGrounding:
        """Counts over all captions that have a phrase with boxes."""
        entities, relations = HeadCounts(), ArcCounts()
        captions = groupby(range(len(self._asked)), key=lambda place: _caption_of(self._asked[place].example))
        for places in (list(places) for _, places in captions):
            batch = self._batch(places)
            found, image = batch.regions, slice(*batch.regions.offsets[:2])
            attention, length = self._attention(batch.arrays)
            positions = batch.arrays["query_rows"] - batch.arrays["cu_seqlens"][:-1]
            for place, position in zip(places, positions):
                gold, relation = np.array(self._asked[place].example.truth.boxes), self._asked[place].relation
                counts = entities if relation is None else relations.relations[relation]
                row = attention[:, :, position, length:]
                counts.add(row, found.boxes[image], self._confidences(found.confidences[image]), gold)
        return HeadGrounding(entities.result(), relations.result() if self._with_parses else None)

    def map(self, caption: str, categories: Mapping[str, Sequence[int]] | None = None) -> AttentionMap:
        """Returns the map of one caption.

        Args:
            caption: as "1000092795#0": its image and its number, counted from 0.
            categories: numbers of regions by a name that somebody gave them; None for each region by itself.

        Raises:
            XdscaleError: no phrase of such a caption has boxes, or a category holds a region that is not there.
        """
        places = [n for n, one in enumerate(self._asked) if _caption_of(one.example) == caption]
        if not places:
            raise XdscaleError(
                f"--map {caption}: no phrase with boxes in such a caption; expected one, as 1000092795#0"
            )
        arrays = self._batch(places[:1]).arrays
        attention, length = self._attention(arrays)
        weights = attention[:, :, :length, length:]
        pieces = [self._tokenizer[0].id_to_token(piece) for piece in arrays["text_ids"][:length].tolist()]
        count = weights.shape[-1]
        if categories is None:
            return AttentionMap(pieces, [str(number) for number in range(count)], weights)
        for name, members in categories.items():
            wrong = [number for number in members if not 0 <= number < count]
            if wrong:
                raise XdscaleError(f"--categories: {name!r} has region {wrong[0]}; the image has 0 to {count - 1}")
        sums = [weights[..., list(members)].sum(-1) for members in categories.values()]
        return AttentionMap(pieces, list(categories), np.stack(sums, -1))

    def _confidences(self, stated: np.ndarray) -> np.ndarray:
        """Returns how sure the detector is of an image's regions: of the whole image, which it did not find, least."""
        found = stated.copy() if "confidences" in self._build.labels else np.full_like(stated, np.nan)
        if self._build.whole_image_first:
            found[0] = -1
        return found

    def _batch(self, places: list[int]) -> MicroBatch:
        return self._collate(Slots.of(np.array(places)))

    def _attention(self, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, int]:
        """Returns the first input's attention, [layers, heads, positions, positions], and the length of its text."""
        length, whole = int(arrays["text_lengths"][0]), int(arrays["cu_seqlens"][1])

        def rows(name: str, count: int) -> torch.Tensor:
            return torch.from_numpy(arrays[name][:count]).to(self._encoder.device).unsqueeze(0)

        with torch.no_grad():
            found = self._encoder(
                input_ids=rows("text_ids", length),
                token_type_ids=rows("text_segments", length),
                visual_embeds=rows("features", whole - length).float(),
                visual_token_type_ids=rows("region_segments", whole - length),
                output_attentions=True,
            ).attentions
        return torch.stack(found)[:, 0].cpu().numpy(), length


def _caption_of(example: Example) -> str:
    return f"{example.images[0]}#{example.line - 1}"


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
    of_caption = {f"{caption.image}#{caption.line - 1}": parse for caption, parse in zip(captions, found)}
    asked = []
    for caption, group in groupby(examples, key=_caption_of):
        phrases = list(group)
        asked += [Asked(example, None) for example in phrases]
        asked += [
            Asked(replace(arc.example, spans=(((Span(*arc.dependent, -1),),),)), arc.relation)
            for arc in arcs(of_caption[caption], phrases)
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


def print_grounding(
    model: Path,
    data: Path,
    regions: Path,
    *,
    split: str,
    parses: Path | None,
    caption: str | None,
    categories: Path | None,
    out: Path,
) -> None:
    """Counts what a VisualBERT's heads ground; writes heads.csv, heads.svg, captions.txt, relations.csv and a map."""
    check_output_folder(out, "--out")
    captions = captions_of(data, split)
    reader = HeadReader(model, data, RegionTable.open(regions), split=split, parses=parses)
    named = None if categories is None else read_whole(categories, dict[str, list[int]])
    shown_map = None if caption is None else reader.map(caption, named)
    entities, relations = reader.count()
    shown = new_table("", "accuracy", "head", "published")
    for name, active in (("best head", False), ("best active head", True)):
        best = entities.best(active=active)
        accuracy, head = ("–", "–") if best is None else (f"{100 * entities.accuracy[best]:.2f}", head_name(*best))
        shown.add_row(name, accuracy, head, "" if active else str(PUBLISHED_ENTITIES["best head"]))
    shown.add_row("surest region", f"{100 * entities.baseline:.2f}", "", str(PUBLISHED_ENTITIES["baseline"]))
    active = f"{int(entities.active.sum())} of {entities.active.size} heads active"
    print_table(f"{model}: {entities.words:,} entities, {active}", shown)
    files: dict[Path, str | bytes] = {
        out / "heads.csv": heads_csv(entities),
        out / "heads.svg": pictures.picture_bytes(pictures.head_dots(entities), ".svg"),
        out / "captions.txt": "".join(f"{one}\n" for one in captions),
    }
    if relations is not None:
        files[out / "relations.csv"] = arcs_csv(relations)
        print_table("", _relations(relations))
    if shown_map is not None:
        name = out / f"map-{caption.replace('#', '-')}"
        files[name.with_suffix(".csv")] = map_csv(shown_map)
        # Of each layer the head that grounds entities best.
        maps = [weights[head] for weights, head in zip(shown_map.weights, entities.accuracy.argmax(1))]
        picture = pictures.attention_maps({str(model): maps}, [shown_map.pieces], [shown_map.keys])
        files[name.with_suffix(".svg")] = pictures.picture_bytes(picture, ".svg")
    write_outputs(files)
    for path in files:
        print(path)


def _relations(relations: dict[str, HeadAccuracy]) -> Table:
    """Returns the table of relations: those that the paper has, then the rest."""
    table = new_table("relation", "arcs", "surest region", "best active head", "", "published")
    for relation, one in sorted(relations.items(), key=lambda item: item[0] not in PUBLISHED_ARCS):
        best, printed = one.best(active=True), PUBLISHED_ARCS.get(relation)
        accuracy, head = ("–", "–") if best is None else (f"{100 * one.accuracy[best]:.2f}", head_name(*best))
        paper = f"{printed.baseline} → {printed.accuracy} ({printed.head})" if printed else ""
        table.add_row(relation, f"{one.words:,}", f"{100 * one.baseline:.2f}", accuracy, head, paper)
    return table
