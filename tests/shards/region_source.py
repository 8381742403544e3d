"""Two small sources: image regions as a detector gives them, and captions that refer to images by row.

The input is JSON Lines, an image a line: its id, size, number of regions, and captions with their split. Features and
boxes are drawn from the id, so that a test can draw them again.
"""

import hashlib
import json
import zlib

import numpy as np

from xdscale.shards.manifest import ALL, Column
from xdscale.shards.sources.inputs import describe_inputs

SIZE = 16  # of a feature


def features_of(image_id, regions):
    chance = np.random.default_rng(zlib.crc32(image_id.encode()))
    return chance.standard_normal((regions, SIZE)).astype("<f2"), chance.random((regions, 4), np.float32)


class _Lines:
    """What both sources have in common: units of some lines of one file."""

    def __init__(self, path, per_unit=4, at_once=3):
        self._path, self._per_unit, self._at_once = path, per_unit, at_once
        self.inputs = describe_inputs([path])
        self.total_bytes = self.inputs[0].bytes
        self.build = {"source": self.table, "inputs": [self.inputs[0].model_dump()], "per_unit": per_unit}

    def units(self, threads):
        lines, read = [], 0
        with self._path.open() as file:
            for line in file:
                lines.append(line)
                read += len(line)
                if len(lines) == self._per_unit:
                    yield lines, read
                    lines = []
        if lines:
            yield lines, read

    def digest(self, lines):
        return hashlib.sha256("".join(lines).encode()).digest()

    def if_empty(self, counts):
        return f"{self._path}: no {self.table}"


class RegionSource(_Lines):
    """Rows of images, some at once: `at_once` must not matter."""

    table = "regions"
    splits = (ALL,)
    columns = (
        Column(name="image_ids", dtype="|u1", offsets="id_offsets", fewest=1),
        Column(name="sizes", dtype="<u2", shape=(2,)),
        Column(name="features", dtype="<f2", shape=(SIZE,), offsets="region_offsets", fewest=1, most=20),
        Column(name="boxes", dtype="<f4", shape=(4,), offsets="region_offsets"),
    )

    def rows(self, lines, write):
        images = [json.loads(line) for line in lines]
        for first in range(0, len(images), self._at_once):
            part = images[first : first + self._at_once]
            ids = [image["id"].encode() for image in part]
            drawn = [features_of(image["id"], image["regions"]) for image in part]
            arrays = {
                "image_ids": np.frombuffer(b"".join(ids), np.uint8),
                "id_offsets": np.cumsum([0, *map(len, ids)]),
                "sizes": np.array([image["size"] for image in part], "<u2"),
                "features": np.concatenate([features for features, _ in drawn]),
                "boxes": np.concatenate([boxes for _, boxes in drawn]),
                "region_offsets": np.cumsum([0, *(image["regions"] for image in part)]),
            }
            write(ALL, arrays, regions=int(arrays["region_offsets"][-1]))
        return {"images": len(images)}


class CaptionSource(_Lines):
    """Rows of captions; `image` is the row of the table of regions, which has them in the file's order."""

    table = "captions"
    splits = ("train", "validation")
    columns = (
        Column(name="image", dtype="<u4", rows_of="regions"),
        Column(name="words", dtype="<u2", offsets="word_offsets", fewest=1),
    )

    def units(self, threads):
        row = 0
        for lines, read in super().units(threads):
            yield [json.dumps(json.loads(line) | {"row": row + place}) for place, line in enumerate(lines)], read
            row += len(lines)

    def rows(self, lines, write):
        images = [json.loads(line) for line in lines]
        for split in self.splits:
            found = [(image["row"], words) for image in images for words in image[split]]
            if found:
                flat = np.array([word for _, words in found for word in words], "<u2")
                offsets = np.cumsum([0, *(len(words) for _, words in found)])
                rows = np.array([row for row, _ in found], "<u4")
                write(split, {"image": rows, "words": flat, "word_offsets": offsets})
        return {"images": len(images)}
