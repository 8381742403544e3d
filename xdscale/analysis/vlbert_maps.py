"""What words read in image regions, head by head: the maps of a pretrained VL-BERT (spec VL-BERT §7).

Layers and heads are numbered from 0, as in the paper's figure.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from xdscale.analysis import pictures
from xdscale.analysis.shown import AttentionMap, map_csv, new_table, print_table
from xdscale.data.feature_source import require_width
from xdscale.data.vlbert import pack, whole_image_first
from xdscale.errors import XdscaleError
from xdscale.files import check_output_folder, write_outputs
from xdscale.models.operations import attention_by_head, recorded
from xdscale.pretrained.vlbert import load_vlbert
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.regions import RegionTable
from xdscale.shards.sources.caption_build import CAPTIONS, CaptionBuild
from xdscale.shards.table import Table
from xdscale.tasks.vlbert import needed_features
from xdscale.training.engine import to_device

WHOLE_IMAGE = "image"
"""Key of the whole image, which is a region too; the others are numbers of the table's regions."""


class CaptionMaps(NamedTuple):
    """The maps of one caption.

    Attributes:
        image: its name in the table.
        shown: the weights, as they are.
        boxes: fp32 [regions, 4], of the keys, in pixels.
    """

    image: str
    shown: AttentionMap
    boxes: np.ndarray


class MapReader:
    """A VL-BERT on a split of captioned pictures."""

    def __init__(self, model: Path, data: Path, *, split: str) -> None:
        """Reads the model and opens the tables.

        Args:
            model: an export, with its tokenizer.
            data: dataset with captions and the regions of their images.
            split: "train" or "validation".

        Raises:
            XdscaleError: any of these is missing, broken, or does not fit the others.
        """
        self._captions = Table(data, split, CAPTIONS)
        self._regions = RegionTable(self._captions.linked("image"))
        self._model, _ = load_vlbert(model, dropout=0.0)
        self._tokenizer, self._special = load_language_tokenizer(str(model))
        made = CaptionBuild.of(self._captions.manifest).language_tokenizer
        if made.sha256 != self._special.sha256:
            raise XdscaleError(f"{data}: its captions are ids of the tokenizer of {made.name}, not of that of {model}")
        config = self._model.config

        def remedy() -> str:
            return f"{needed_features(model, config)}, then captions with 'xdscale shards captions'"

        require_width(self._regions, (config.appearance_size,), str(model), remedy)
        self._data, self._split = data, split

    def maps(self, number: int) -> CaptionMaps:
        """Returns what the word pieces of a caption read in each region, without dropout.

        Args:
            number: of the caption in its split, counted from 0.

        Raises:
            XdscaleError: there is no such caption, or it is longer than the model's positions.
        """
        count = len(self._captions)
        if not 0 <= number < count:
            raise XdscaleError(
                f"--number {number}: the split {self._split} of {self._data} has captions 0 to {count - 1}"
            )
        row = np.array([number])
        words, _ = self._captions.read_ragged("words", row)
        positions = self._model.config.max_position_embeddings
        if len(words) + 4 > positions:
            raise XdscaleError(f"--number {number}: {len(words)} word pieces; the model has {positions} positions")
        image = self._captions.read("image", row).astype(np.int64)
        has_whole = self._regions.build.whole_image_first
        regions = whole_image_first(self._regions.read(image), has_whole, mean=self._model.config.masks_features)
        text = np.concatenate([[self._special.cls_id], words, [self._special.sep_id]])
        batch = to_device(pack([text], [np.zeros_like(text)], regions), torch.device("cpu"))
        attentions = [layer.attention.attention for layer in self._model.layers]
        with torch.no_grad(), recorded(attentions, attention_by_head) as layers:
            self._model(batch | {"features": batch["features"].float()})
        last = len(text) + len(regions.boxes)
        weights = torch.stack(layers)[:, :, : len(text), len(text) : last].float().numpy()
        first = int(has_whole)  # the table counts the whole image too
        keys = [WHOLE_IMAGE, *(str(place + first) for place in range(len(regions.boxes) - 1))]
        pieces = [self._tokenizer.id_to_token(piece) for piece in text.tolist()]
        return CaptionMaps(self._regions.image_ids(image)[0], AttentionMap(pieces, keys, weights), regions.boxes)


def rescaled(weights: np.ndarray) -> np.ndarray:
    """Maps each layer's weights onto [0, 1], the least one of all its heads onto 0 and the largest onto 1.

    Args:
        weights: [layers, heads, pieces, regions]. A layer whose weights are all equal becomes 0.
    """
    least, most = (reduce(weights, axis=(1, 2, 3), keepdims=True) for reduce in (np.min, np.max))
    return (weights - least) / np.where(most > least, most - least, 1)


def print_attention_maps(model: Path, data: Path, *, split: str, numbers: list[int], out: Path) -> None:
    """Writes what words read in regions: of each caption a CSV, an npz, and a picture for each layer."""
    check_output_folder(out, "--out")
    reader = MapReader(model, data, split=split)
    found = {number: reader.maps(number) for number in dict.fromkeys(numbers)}
    for number, (image, shown, boxes) in found.items():
        scaled, name = rescaled(shown.weights), out / f"caption-{number}"
        arrays = io.BytesIO()
        np.savez_compressed(
            arrays, weights=shown.weights, rescaled=scaled, pieces=shown.pieces, keys=shown.keys, boxes=boxes
        )
        files: dict[Path, str | bytes] = {
            name.with_suffix(".csv"): map_csv(shown, first=0, rescaled=scaled),
            name.with_suffix(".npz"): arrays.getvalue(),
        }
        table = new_table("layer", "head", "word piece", "region", "weight", "share of regions in the layer")
        for layer, weights in enumerate(shown.weights):
            head, piece, key = np.unravel_index(weights.argmax(), weights.shape)
            cells = f"{weights.max():.3f}", f"{weights.sum(-1).mean():.1%}"
            table.add_row(str(layer), str(head), shown.pieces[piece], shown.keys[key], *cells)
            picture = pictures.head_maps(scaled[layer], shown.pieces, shown.keys, f"layer {layer}")
            files[out / f"{name.name}-layer-{layer}.svg"] = pictures.picture_bytes(picture, ".svg")
        print_table(f"caption {number}, image {image}: the largest weight from a word to a region of each layer", table)
        write_outputs(files)
        for path in files:
            print(path)
