"""What found the regions: detectors of published features by name, others by a file that describes them."""

import json
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from xdscale.errors import XdscaleError
from xdscale.files import one_line, read_json, require_real_file
from xdscale.names import expand_home, nearest
from xdscale.shards.regions import Detector
from xdscale.shards.sources.text_build import named_problem

BACKGROUND = "__background__"


class KnownDetector(NamedTuple):
    """A detector of published features.

    Attributes:
        model: what it is.
        classes: how many it has, background aside.
        attributes: the same of attributes.
        width: of its features; 0 where files hold none.
    """

    model: str
    classes: int
    attributes: int
    width: int


KNOWN = {
    "butd": KnownDetector("bottom-up attention: Faster R-CNN, ResNet-101, Visual Genome", 1600, 400, 2048),
    "pythia": KnownDetector("Pythia: Faster R-CNN, ResNeXt-152, Visual Genome", 1600, 400, 2048),
    "vinvl": KnownDetector("VinVL: X152-C4, Visual Genome and others", 1594, 524, 2048),
    "mattnet": KnownDetector("MAttNet: Mask R-CNN, ResNet-101, COCO's category ids", 91, 0, 0),
}


def load_detector(
    name: str, *, classes: Path | None = None, attributes: Path | None = None, background: int | None = None
) -> tuple[Detector, int]:
    """Returns a detector, and the width of its features; 0 where any will do.

    Args:
        name: one of `KNOWN`, or a JSON file with the attributes of `Detector`.
        classes: file of the names of its classes, one a line, or COCO's annotations.
        attributes: file of the names of its attributes, one a line.
        background: which class of the files' is no object; None if they do not count it.

    Raises:
        XdscaleError: the detector is not known, or a file does not fit it.
    """
    if name in KNOWN:
        known, more = KNOWN[name], int(background is not None)
        width = known.width
        detector = Detector(
            model=known.model,
            class_count=known.classes + more,
            attribute_count=known.attributes + (more if known.attributes else 0),
            background=background,
        )
    elif (path := Path(expand_home(name))).is_file():
        width, detector = 0, _described(path)
    else:
        hint = nearest(name, sorted(KNOWN), f"known are {', '.join(sorted(KNOWN))}.")
        raise XdscaleError(
            f"--detector {name}: no such detector; {hint} Describe another one in a JSON file: "
            '{"model": "what it is called", "sha256": "of its weights", "class_count": 81, "background": 0}'
        )
    change = {}
    if classes is not None:
        change = _named(classes, detector.class_count, detector.background, "class")
    if attributes is not None:
        change |= _named(attributes, detector.attribute_count, detector.background, "attribute")
    return detector.model_copy(update=change), width


def _described(path: Path) -> Detector:
    try:
        found = Detector.model_validate(read_json(path))
    except ValidationError as error:
        raise XdscaleError(f"{path}: {named_problem(error)}; expected the description of a detector") from None
    counts = {"class_count": found.class_count or len(found.classes)}
    counts["attribute_count"] = found.attribute_count or len(found.attributes)
    for name, names in (("class_count", found.classes), ("attribute_count", found.attributes)):
        if names and len(names) != counts[name]:
            raise XdscaleError(f"{path}: {name} = {counts[name]}, but {len(names)} names")
    if found.background is not None and found.background >= max(counts["class_count"], 1):
        raise XdscaleError(f"{path}: background = {found.background}, expected a class below {counts['class_count']}")
    return found.model_copy(update=counts)


def _named(path: Path, count: int, background: int | None, what: str) -> dict[str, list[str] | int]:
    """Returns the names of classes or attributes and how many there are."""
    require_real_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = _category_names(json.loads(text), path) if text.startswith("{") else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise XdscaleError(f"{path}: no readable list of names: {error}") from None
    if background is not None and len(names) == count - 1:
        names = [*names[:background], BACKGROUND, *names[background:]]
    if count and len(names) != count:
        raise XdscaleError(f"{path}: {len(names)} names, but the detector has {count} of this {what} list")
    return {f"{what}_count": len(names), "attributes" if what == "attribute" else "classes": names}


def _category_names(values: dict, path: Path) -> list[str]:
    """Returns names by COCO's category ids, of which some are not used."""
    try:
        named = {int(one["id"]): str(one["name"]) for one in values["categories"]}
        if not 0 <= min(named) <= max(named) < 2**16:
            raise ValueError(f"ids {min(named)} to {max(named)}")
    except (KeyError, TypeError, ValueError) as error:
        raise XdscaleError(f"{path}: expected COCO's 'categories' with id and name: {one_line(error)}") from None
    return [named.get(place, "") for place in range(max(named) + 1)]
