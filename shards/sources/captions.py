"""Captions as a source: COCO's files, tokenised, each caption linked to the regions of its image."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from xdscale.errors import XdscaleError
from xdscale.files import is_text, open_text, read_json, shown
from xdscale.shards.build import Write
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.manifest import Counts
from xdscale.shards.regions import RegionTable
from xdscale.shards.sources.caption_build import CAPTIONS, COLUMNS, CaptionBuild, CaptionOptions
from xdscale.shards.sources.inputs import describe_inputs

TRAIN, VALIDATION = SPLITS = ("train", "validation")


class CaptionedImage(NamedTuple):
    """An image with its captions, as they stand in a file.

    Attributes:
        image_id: COCO's number.
        file_name: of the picture.
        captions: in the order of the file; those without a word are left out.
        empty: how many were.
    """

    image_id: int
    file_name: str
    captions: list[str]
    empty: int = 0


class _Placed(NamedTuple):
    """An image that goes into the table: its row among the regions, its split, and the row of its first caption."""

    image_id: int
    row: int
    split: str
    first: int
    captions: list[str]


IMAGE_NAMES: dict[str, Callable[[CaptionedImage], str]] = {
    "id": lambda image: str(image.image_id),
    "file_name": lambda image: image.file_name,
    "file_name without folder": lambda image: PurePosixPath(image.file_name).name,
    "file_name without ending": lambda image: PurePosixPath(image.file_name).stem,
    "id in 12 digits": lambda image: f"{image.image_id:012d}",
}
"""Forms in which tables of regions name the images of COCO."""


class CaptionSource:
    """Makes the table of captions.

    Args:
        inputs: COCO's `captions_*.json`, read in this order.
        out: folder of the dataset, which holds the table of regions.
        language_tokenizer: `tokenizer.json` or `vocab.txt`, folder, `package:NAME/folder` or hub name.
        options: how.
        held_out: for `options.split` "karpathy" one `dataset_coco.json`, for "list" one file of image ids, one a line,
            for "files" more files of captions; nothing for "hash".

    Raises:
        XdscaleError: a bad input or tokenizer, no table of regions, images that it has not, or two images with one id.
    """

    table = CAPTIONS
    splits = SPLITS
    columns = COLUMNS

    def __init__(
        self,
        inputs: Sequence[Path],
        out: Path,
        language_tokenizer: str,
        options: CaptionOptions,
        held_out: Sequence[Path] = (),
    ) -> None:
        regions = RegionTable.open(out)
        self._tokenizer, language = load_language_tokenizer(language_tokenizer)
        more = list(held_out) if options.split == "files" else []
        by_file = {path: read_captions(path) for path in [*inputs, *more]}
        _check_ids(by_file)
        images = [image for found in by_file.values() for image in found]
        later = {image.image_id for path in more for image in by_file[path]}
        splits = list(map(_split_rule(options, later, held_out), images))  # the rule reads its file once
        if options.split == "list" and VALIDATION not in splits:
            raise XdscaleError(f"{held_out[0]}: none of its ids is that of an image with captions: nothing is held out")
        names, rows = _rows_of(images, splits, regions, options)
        self._images, self._splits, self._rows = images, splits, rows
        described = describe_inputs([*inputs, *held_out])
        self._build = CaptionBuild(
            inputs=described[: len(inputs)],
            held_out=described[len(inputs) :],
            language_tokenizer=language,
            image_names=names,
            regions=regions.fingerprint,
            **options.model_dump(),
        )
        self.build = self._build.model_dump(mode="json")
        self.total_bytes = sum(item.bytes for item in described)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what goes to other processes: they load the tokenizer for themselves, and get images by the unit."""
        return {name: value for name, value in vars(self).items() if name in ("_build", "build", "total_bytes")}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer, found = load_language_tokenizer(self._build.language_tokenizer.name)
        if found != self._build.language_tokenizer:
            raise XdscaleError(f"{found.name}: the tokenizer changed while the shards were built")
        return tokenizer

    def units(self, threads: int) -> Iterator[tuple[tuple[list[_Placed], dict[str, int]], int]]:
        """Yields images with their places in the table, and what was left out beside them."""
        first = dict.fromkeys(SPLITS, 0)
        for start in range(0, len(self._images), self._build.shard_images):
            part = slice(start, start + self._build.shard_images)
            placed: list[_Placed] = []
            counts: Counter[str] = Counter()
            for image, split, row in zip(self._images[part], self._splits[part], self._rows[part].tolist()):
                counts["empty_captions"] += image.empty
                why = _left_out(image, split, row)
                counts[why or "images"] += 1
                if why is None:
                    placed.append(_Placed(image.image_id, row, split, first[split], image.captions))
                    first[split] += len(image.captions)
            share = min(1.0, part.stop / len(self._images))
            yield (placed, dict(counts)), int(self.total_bytes * share)

    def digest(self, work: tuple[list[_Placed], dict[str, int]]) -> bytes:
        """Returns the hash of what goes into a unit."""
        return hashlib.sha256(json.dumps(work).encode()).digest()

    def rows(self, work: tuple[list[_Placed], dict[str, int]], write: Write) -> Counts:
        """Tokenises the captions of a unit.

        Returns:
            `images` and `captions`; and what is not there: `empty_captions`, `images_without_captions`,
            `images_of_other_splits` (a Karpathy file's test images) and `images_without_regions`.
        """
        images, counts = work
        captions = 0
        for split in SPLITS:
            found = [image for image in images if image.split == split]
            texts = [caption for image in found for caption in image.captions]
            if not texts:
                continue
            encoded = [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
            numbers = [len(image.captions) for image in found]
            if [] in encoded:
                self._refuse_unread(np.repeat([image.image_id for image in found], numbers), texts, encoded)
            siblings = np.array([(image.first, len(image.captions)) for image in found], "<u4")
            arrays = {
                "words": np.concatenate([np.array(ids, "<u2") for ids in encoded]),
                "word_offsets": np.cumsum([0, *map(len, encoded)]),
                "image": np.repeat(np.array([image.row for image in found], "<u4"), numbers),
                "siblings": np.repeat(siblings, numbers, axis=0),
            }
            write(split, arrays, lone_captions=numbers.count(1))
            captions += len(texts)
        return counts | {"captions": captions}

    def _refuse_unread(self, image_ids: np.ndarray, texts: list[str], encoded: list[list[int]]) -> None:
        """Names the first caption of a unit that gives no word pieces, such as a lone U+200B, and how many more do not.

        Other units may hold more of them.
        """
        unread = [number for number, ids in enumerate(encoded) if not ids]
        more = f", and at least {len(unread) - 1:,} more like it" if unread[1:] else ""
        raise XdscaleError(
            f"{self._named_inputs()}: image {image_ids[unread[0]]}: caption {shown(texts[unread[0]])}: gives no word "
            f"pieces; take it out{more}"
        )

    def _named_inputs(self) -> str:
        files = [*self._build.inputs, *(self._build.held_out if self._build.split == "files" else [])]
        return ", ".join(item.name for item in files[:3])

    def if_empty(self, counts: Counts) -> str:
        """Returns why there are no rows."""
        told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)
        return f"{self._named_inputs()}: no captions of images that are there ({told or 'no images'})"


def read_captions(path: Path) -> list[CaptionedImage]:
    """Returns the images of one of COCO's files of captions, in the order of the file.

    Raises:
        XdscaleError: not such a file; says which entry is bad and how.
    """
    values = read_json(path)
    images: dict[int, CaptionedImage] = {}
    for number, entry in enumerate(_entries(values, "images", path)):
        where, key = f"{path}: images[{number}]", _field(entry, "id", int, f"{path}: images[{number}]")
        if key in images:
            raise XdscaleError(f"{where}: id {key} stands twice; expected one entry for each image")
        images[key] = CaptionedImage(key, _field(entry, "file_name", str, where), [])
    empty: Counter[int] = Counter()
    for number, entry in enumerate(_entries(values, "annotations", path)):
        where = f"{path}: annotations[{number}]"
        key, caption = _field(entry, "image_id", int, where), _field(entry, "caption", str, where)
        if key not in images:
            raise XdscaleError(f"{where}: image_id {key} is not among the file's images")
        if caption.strip():
            images[key].captions.append(caption)
        else:
            empty[key] += 1
    return [image._replace(empty=empty[image.image_id]) for image in images.values()]


def _entries(values: dict[str, Any], key: str, path: Path) -> list[Any]:
    if not isinstance(values.get(key), list):
        raise XdscaleError(
            f"{path}: expected a list {key!r}, as in COCO's captions_train2014.json, found {list(values)[:5]}"
        )
    return values[key]


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        what = "a whole number" if kind is int else "a text"
        raise XdscaleError(f"{where}: {key} = {shown(value)}: expected {what}")
    if kind is str and not is_text(value):
        raise XdscaleError(f"{where}: {key} = {shown(value)}: holds half a character; expected valid Unicode")
    return value


def _check_ids(by_file: dict[Path, list[CaptionedImage]]) -> None:
    seen: dict[int, Path] = {}
    for path, images in by_file.items():
        for image in images:
            other = seen.setdefault(image.image_id, path)
            if other is not path:
                raise XdscaleError(f"{path}: image {image.image_id} is in {other} too; name each image once")


def _split_rule(
    options: CaptionOptions, later: set[int], held_out: Sequence[Path]
) -> Callable[[CaptionedImage], str | None]:
    """Returns which split an image belongs to; None: to none of ours."""
    if options.split == "files":
        return lambda image: VALIDATION if image.image_id in later else TRAIN
    if options.split == "karpathy":
        stated = _karpathy(held_out[0])
        return lambda image: stated.get(image.file_name, stated.get(str(image.image_id)))
    if options.split == "list":
        chosen = _listed(held_out[0])
        return lambda image: VALIDATION if image.image_id in chosen else TRAIN
    bound = options.validation_fraction * 2**64

    def by_hash(image: CaptionedImage) -> str:
        digest = hashlib.sha256(str(image.image_id).encode()).digest()[:8]
        return VALIDATION if int.from_bytes(digest, "big") < bound else TRAIN

    return by_hash


_KARPATHY = {"train": TRAIN, "restval": TRAIN, "val": VALIDATION, "test": None}


def _karpathy(path: Path) -> dict[str, str | None]:
    """Returns the split of each image, by its file's name and by COCO's number."""
    stated: dict[str, str | None] = {}
    for number, entry in enumerate(_entries(read_json(path), "images", path)):
        where = f"{path}: images[{number}]"
        name, split = _field(entry, "filename", str, where), _field(entry, "split", str, where)
        if split not in _KARPATHY:
            raise XdscaleError(f"{where}: split = {split!r}: expected {', '.join(_KARPATHY)}")
        names = [name, str(_field(entry, "cocoid", int, where))] if "cocoid" in entry else [name]
        for one in names:
            if stated.setdefault(one, _KARPATHY[split]) != _KARPATHY[split]:
                raise XdscaleError(f"{where}: split = {split!r}, but {one} stands above in another split")
    return stated


def _listed(path: Path) -> set[int]:
    """Returns the image ids in a file, one a line."""
    with open_text(path) as file:
        lines = file.read().splitlines()
    chosen = set()
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.isdecimal():
            raise XdscaleError(f"{path}, line {number}: {shown(line)}: expected an image's id, such as 393225")
        if line:
            chosen.add(int(line))
    return chosen


def _rows_of(
    images: list[CaptionedImage], splits: list[str | None], regions: RegionTable, options: CaptionOptions
) -> tuple[str, np.ndarray]:
    """Returns in which form the table of regions names the images, and their rows there, -1 for those it has not.

    Raises:
        XdscaleError: it has none of them, misses some that are not to be left out, or it is unclear which it means.
    """
    wanted = np.array([split is not None and bool(image.captions) for image, split in zip(images, splits)], bool)
    found = {form: regions.find([name(image) for image in images]) for form, name in IMAGE_NAMES.items()}
    form = max(found, key=lambda form: int((found[form] >= 0).sum()))  # the first of those that find most
    rows = found[form]
    missing = np.flatnonzero(wanted & (rows < 0))
    if len(missing) and len(missing) == wanted.sum():
        first = images[missing[0]]
        names = list(dict.fromkeys([first.file_name, *(name(first) for name in IMAGE_NAMES.values())]))
        shown_names = f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}, as the first one may be called"
        raise XdscaleError(
            f"{regions.table.folder}: the table of regions has no image {shown_names}; {regions.hint(names)}; it has "
            "none of the captions' images"
        )
    if len(missing) and options.missing == "refuse":
        try:  # names the first ones, and what the table's ids look like
            regions.rows([IMAGE_NAMES[form](images[place]) for place in missing])
        except XdscaleError as error:
            raise XdscaleError(f"{error}; or leave such images out: --missing leave-out") from None
    for other in found:
        _check_forms(images, regions, {form: rows, other: found[other]})
    _check_distinct([images[place] for place in np.flatnonzero(wanted)], rows[wanted], regions)
    return form, rows


def _check_forms(images: list[CaptionedImage], regions: RegionTable, found: dict[str, np.ndarray]) -> None:
    """Refuses a table that has most images under two of their names, as different ones: nobody knows which is meant.

    A few may be: file names that are numbers meet ids that only count.

    Args:
        images: of the captions.
        regions: the table.
        found: rows of the images by the form of their names, of the chosen one and of another.

    Raises:
        XdscaleError: half of the found images are other ones by their other name.
    """
    rows, others = next(iter(found.values())), list(found.values())[-1]
    apart = np.flatnonzero((rows >= 0) & (others >= 0) & (rows != others))
    if len(apart) and 2 * len(apart) >= (rows >= 0).sum():
        image = images[apart[0]]
        names = " and ".join(f"{IMAGE_NAMES[form](image)!r}, its {form}" for form in found)
        raise XdscaleError(
            f"{regions.table.folder}: of image {image.image_id} ({image.file_name}) it has {names}, as two images; "
            "change the ids in the file of captions to the numbers of the files, or the regions' ids (--ids path)"
        )


def _check_distinct(images: list[CaptionedImage], rows: np.ndarray, regions: RegionTable) -> None:
    """Refuses two files of one row: the table knows one of them by its name alone, without its folder or ending."""
    names: dict[int, str] = {}
    for image, row in zip(images, rows.tolist()):
        other = names.setdefault(row, image.file_name) if row >= 0 else image.file_name
        if other != image.file_name:
            raise XdscaleError(
                f"{regions.table.folder}: {other!r} and {image.file_name!r} would both be its image "
                f"{regions.image_ids(np.array([row]))[0]!r}; make it again with ids that tell them apart (--ids path)"
            )


def _left_out(image: CaptionedImage, split: str | None, row: int) -> str | None:
    """Returns what an image that is left out counts as."""
    if split is None:
        return "images_of_other_splits"
    if not image.captions:
        return "images_without_captions"
    return "images_without_regions" if row < 0 else None
