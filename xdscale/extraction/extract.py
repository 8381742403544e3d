"""From image files to the table `regions`: units of images, run through one network, restartable like every build.

One thread computes in each process on a CPU, and images of a batch have one size and do not depend on each other's:
so the bytes are the same for any number of workers, and after a restart.
"""

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.extraction.given_boxes import VCR, GivenBoxes
from xdscale.extraction.pictures import Ids, Picture, find_pictures, read_pixels
from xdscale.files import count_of, read_bytes
from xdscale.names import nearest
from xdscale.shards.manifest import InputFile
from xdscale.shards.progress import counted
from xdscale.shards.regions import Detector, RegionBuild
from xdscale.shards.sources.regions.checks import JPEG_BEGINS
from xdscale.shards.sources.regions.source import RegionImage, RegionSource, layout_of

CHOOSING = ("threshold", "fewest", "most")
"""Options that say which of the regions that a network finds are kept."""
LIBRARIES = ("timm", "torchvision", "transformers", "vlbert")
SAMPLE = 64
"""Images whose regions say what is usual."""
WINDOW_BATCHES = 4
"""So many batches of images are decoded at a time, to be put together by size."""


@dataclass(frozen=True)
class ExtractOptions:
    """How regions are made of images.

    Attributes:
        network: LIBRARY:NAME; of transformers a folder too.
        weights: file, "hub" or "random".
        boxes: as `GivenBoxes`; None for those that the network finds.
        whole_image: the whole image is region 0, before given boxes.
        stage: as `Backbone`.
        short_side: as `Backbone`.
        standardize: give each feature mean 0 and variance 1 over the regions of some images.
        threshold: as `Choice`.
        fewest: as `Choice`.
        most: as `Choice`.
        batch: images at a time.
        ids: what image ids are made of.
        bad_images: "refuse" them, or "skip" them with a warning.
        store_images: keep the image files too.
        device: "cpu", "cuda" or "cuda:N".
    """

    network: str
    weights: str
    boxes: str | None = None
    whole_image: bool = False
    stage: str | None = None
    short_side: int | None = None
    standardize: bool = False
    threshold: float = 0.2
    fewest: int = 10
    most: int = 100
    batch: int = 8
    ids: Ids = "stem"
    bad_images: Literal["refuse", "skip"] = "refuse"
    store_images: bool = False
    device: str = "cpu"


def region_source(
    names: Sequence[str],
    options: ExtractOptions,
    *,
    encoding: str = "fp16",
    class_probs: str | None = None,
    shard_images: int = 512,
) -> RegionSource:
    """Returns the source of the table of regions; runs the network on the first image.

    Args:
        names: image files and folders.
        options: how.
        encoding: of features.
        class_probs: as `layout_of`.
        shard_images: images per shard.

    Raises:
        XdscaleError: no images, an unknown network, weights that are not its own, or options that do not go together.
    """
    pictures = find_pictures(names, options.ids)
    given = None if options.boxes is None else GivenBoxes(options.boxes, whole_image=options.whole_image)
    if given is not None:
        given.check_distinct(pictures)
    if given is None and options.whole_image:
        raise XdscaleError("--whole-image: the whole image can be a region before given boxes alone (--boxes)")
    if given is not None and any(getattr(options, name) != getattr(ExtractOptions, name) for name in CHOOSING):
        told = ", ".join(f"--{name}" for name in CHOOSING)
        raise XdscaleError(f"{told} choose among what a network finds; of --boxes all are taken: leave them out")
    images = ExtractedImages(pictures, options, given, shard_images)
    if options.standardize:
        images.standardize()
    first = next((image for picture in pictures for image in images.images([picture])), None)
    if first is None:
        raise XdscaleError(f"{', '.join(names)}: none of {count_of(len(pictures), 'image')} can be read")
    detector = images.detector
    layout = layout_of(first, encoding, class_probs)
    how = {"given_boxes": options.boxes is not None, "standardized": images.standardized, "batch": options.batch}
    settings = detector.settings | how
    build = RegionBuild(
        format="extracted",
        inputs=[_described(pictures, with_metadata=options.boxes == VCR), *(given.inputs if given else [])],
        options={"ids": options.ids, "bad_images": options.bad_images},
        detector=detector.model_copy(update={"settings": settings}),
        region_order="source" if given else "confidence",
        whole_image="first" if options.whole_image else "none",
        shard_images=shard_images,
        **layout.model_dump(),
    )
    return RegionSource(images, build)


class ExtractedImages:
    """Images with the regions that a network gives them.

    Attributes:
        total_bytes: of all files.
        standardized: SHA-256 of means and deviations of features; None where they are as the network gives them.

    Args:
        pictures: the files.
        options: how.
        given: where boxes come from; None for those that the network finds.
        shard_images: images per unit.
    """

    def __init__(
        self, pictures: list[Picture], options: ExtractOptions, given: GivenBoxes | None, shard_images: int
    ) -> None:
        self._pictures, self._options, self._given, self._shard_images = pictures, options, given, shard_images
        self._network: Any = None
        self._mean: np.ndarray | float = 0.0
        self._deviation: np.ndarray | float = 1.0
        self.standardized: str | None = None
        self.total_bytes = sum(picture.bytes for picture in pictures)

    def __getstate__(self) -> dict[str, Any]:  # worker processes get their units, and build the network themselves
        return self.__dict__ | {"_network": None, "_pictures": []}

    @property
    def detector(self) -> Detector:
        """What `dataset.json` says of the network."""
        return self._opened().detector

    def standardize(self) -> None:
        """Takes means and deviations from regions of images that lie evenly among all, and applies them from now on.

        Raises:
            XdscaleError: as `images`.
        """
        count = len(self._pictures)
        some = [self._pictures[place * count // min(count, SAMPLE)] for place in range(min(count, SAMPLE))]
        features = np.concatenate([image.features for image in self.images(some)]).astype(np.float64)
        mean, deviation = features.mean(0), features.std(0)
        self._mean, self._deviation = mean, np.where(deviation > 0, deviation, 1)
        self.standardized = hashlib.sha256(np.stack([mean, deviation]).tobytes()).hexdigest()

    def units(self, threads: int) -> Iterator[tuple[list[Picture], int]]:
        """Yields as many images as a shard has."""
        done = 0
        for first in range(0, len(self._pictures), self._shard_images):
            some = self._pictures[first : first + self._shard_images]
            done += sum(picture.bytes for picture in some)
            yield some, done

    def digest(self, work: list[Picture]) -> bytes:
        """Returns the hash of ids and files."""
        return _hashed(work, with_metadata=self._given is not None and self._given.vcr).digest()

    def images(self, work: Sequence[Picture]) -> Iterator[RegionImage]:
        """Yields the images of a unit with their regions, in its order."""
        window = WINDOW_BATCHES * self._options.batch
        windows = range(0, len(work), window)
        for _, first in counted(f"images of a shard, {window} at a time", windows):
            read = [found for picture in work[first : first + window] if (found := self._read(picture))]
            done: dict[int, RegionImage] = {}
            by_size = sorted(range(len(read)), key=lambda place: read[place][1].shape)  # stable
            for _, places in groupby(by_size, key=lambda place: read[place][1].shape):
                same = list(places)
                for begin in range(0, len(same), self._options.batch):
                    batch = same[begin : begin + self._options.batch]
                    done.update(zip(batch, self._run([read[place] for place in batch])))
            yield from (done[place] for place in range(len(read)))

    def _read(self, picture: Picture) -> tuple[Picture, np.ndarray, bytes] | None:
        try:
            content = read_bytes(picture.path)
            pixels = read_pixels(picture.path, content)
            if self._options.store_images and not content.startswith(JPEG_BEGINS):
                raise XdscaleError(
                    f"{picture.path}: is no JPEG, as training from pixels reads them (--store-images); save it as one, "
                    "take it away, or use --bad-images skip"
                )
            return picture, pixels, content
        except XdscaleError as error:
            if self._options.bad_images == "refuse":
                raise
            print(f"warning: left out: {error}", file=sys.stderr, flush=True)
            return None

    def _run(self, read: list[tuple[Picture, np.ndarray, bytes]]) -> list[RegionImage]:
        import torch

        network = self._opened()
        height, width, _ = read[0][1].shape
        device = torch.device(self._options.device)
        pixels = torch.from_numpy(np.stack([pixels for _, pixels, _ in read])).permute(0, 3, 1, 2).to(device)
        given = boxes = None
        if self._given is not None:
            given = [self._given.of(picture, (width, height)) for picture, _, _ in read]
            boxes = [torch.from_numpy(each.boxes.astype(np.float32)).to(device) for each in given]
        images = []
        for place, found in enumerate(network(pixels, boxes)):
            picture, _, content = read[place]
            confidences = found.confidences if given is None else given[place].confidences
            labels = {"confidences": confidences, "object_ids": found.object_ids}
            images.append(
                RegionImage(
                    image_id=picture.image_id,
                    size=(width, height),
                    boxes=found.boxes if given is None else given[place].boxes,
                    features=((found.features - self._mean) / self._deviation).astype(np.float32),
                    labels={name: values for name, values in labels.items() if values is not None},
                    class_probs=found.class_probs,
                    jpeg=content if self._options.store_images else None,
                    where=str(picture.path),
                )
            )
        return images

    def _opened(self) -> Any:
        if self._network is None:
            self._network = open_network(self._options)
        return self._network


def open_network(options: ExtractOptions) -> Any:
    """Returns the network that the options name; a CPU computes with one thread from then on.

    Raises:
        XdscaleError: there is none of this name, its weights cannot be had, or options do not go together.
    """
    import torch

    from xdscale.extraction.backbone import Backbone
    from xdscale.extraction.contract import Choice
    from xdscale.extraction.fast_rcnn_backbone import FastRCNNBackbone
    from xdscale.extraction.faster_rcnn import FasterRcnn
    from xdscale.extraction.query_detector import QueryDetector

    library, _, name = options.network.partition(":")
    if library not in LIBRARIES or not name:
        hint = nearest(library, LIBRARIES, "for example torchvision:fasterrcnn_resnet50_fpn_v2")
        raise XdscaleError(f"--network {options.network}: expected {', '.join(LIBRARIES)}, a colon and a name; {hint}")
    if options.device == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise XdscaleError(f"--device {options.device}: torch sees no GPU")
    device = torch.device(options.device)
    choice = Choice(options.threshold, options.fewest, options.most)
    _check_name(library, name)
    finds = library == "transformers" or (library == "torchvision" and name.startswith("fasterrcnn_"))
    if finds and (options.stage or options.short_side):
        raise XdscaleError(f"--stage and --short-side are for backbones; {options.network} is a detector")
    if library == "transformers":
        if options.boxes is not None:
            raise XdscaleError(f"--boxes: {options.network} finds its own and cannot take others")
        return QueryDetector(name, options.weights, choice, device)
    if finds:
        return FasterRcnn(name, options.weights, choice, device)
    if options.boxes is None:
        raise XdscaleError(f"{options.network} finds no regions; say with --boxes where they are, or --boxes grid:6x6")
    if library == "vlbert":
        if options.stage is not None:
            raise XdscaleError(f"--stage {options.stage}: {options.network} has one feature map")
        return FastRCNNBackbone(name, options.weights, device, short_side=options.short_side)
    return Backbone(library, name, options.weights, device, stage=options.stage, short_side=options.short_side)


def _check_name(library: str, name: str) -> None:
    if library == "transformers":
        return
    if library == "timm":
        import timm

        known = timm.list_models()
    elif library == "vlbert":
        known = ["resnet101", name] if re.fullmatch(r"resnet\d{1,3}", name) else ["resnet101"]
    else:
        import torchvision

        models = torchvision.models
        known = [*models.list_models(models), *models.list_models(models.detection, include="fasterrcnn_*")]
    if name.split(".")[0] not in known:
        raise XdscaleError(f"--network {library}:{name}: {nearest(name, known, f'{library} has no such network')}")


def _described(pictures: Sequence[Picture], *, with_metadata: bool) -> InputFile:
    """Returns one entry for all images: extraction takes far longer than reading them once more."""
    digest = _hashed(pictures, with_metadata=with_metadata)
    name = f"{len(pictures)} images"
    return InputFile(name=name, bytes=sum(picture.bytes for picture in pictures), sha256=digest.hexdigest())


def _hashed(pictures: Sequence[Picture], *, with_metadata: bool) -> Any:
    digest = hashlib.sha256()
    for picture in pictures:
        files = [picture.path, picture.path.with_suffix(".json")][: 1 + with_metadata]
        for path in files:
            digest.update(f"{picture.image_id}\0".encode() + hashlib.sha256(read_bytes(Path(path))).digest())
    return digest
