"""Image files: which there are, and their pixels, the right way up. What cannot be read is refused by name."""

import io
import os
import re
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from xdscale.errors import XdscaleError
from xdscale.files import is_text, one_line, require_real_file, shown
from xdscale.names import resolve_path
from xdscale.shards.sources.regions.checks import LARGEST_SIDE

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is decoded, told by content; for others that Pillow knows, such as EPS, it would run a program on the file."""
MOST_PIXELS = 150_000_000
"""Of one image; decoded it has three bytes of each."""
Ids = Literal["stem", "name", "number", "path"]
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class Picture(NamedTuple):
    """An image file: `path`, its unique `image_id`, its `bytes`."""

    path: Path
    image_id: str
    bytes: int


def find_pictures(names: Sequence[str], ids: Ids) -> list[Picture]:
    """Returns the images that names stand for, in the order of the names, those of a folder sorted by path.

    Args:
        names: files, taken whatever they are called, and folders, of which everything below with a known ending is.
        ids: "stem" (no folder, no ending), "name" (no folder), the "number" that the stem ends with, or the "path"
            below the folder that was named.

    Raises:
        XdscaleError: nothing there, no image in a folder, or two images with one id.
    """
    found: dict[str, Picture] = {}
    for name in names:
        root = resolve_path(name)
        files = _below(root) if root.is_dir() else [root]
        if not files:
            raise XdscaleError(f"{root}: holds no images (known endings: {', '.join(ENDINGS)})")
        for path in files:
            picture = Picture(path, _image_id(path, root, ids), _size(path))
            if (other := found.setdefault(picture.image_id, picture)) is not picture:
                raise XdscaleError(
                    f"{path}: image id {picture.image_id!r} is that of {other.path} too; ids must be unique: "
                    f"take one away, or choose another form (--ids {ids} now)"
                )
    if not found:
        raise XdscaleError("no images: name at least one file or folder")
    return list(found.values())


def _below(folder: Path) -> list[Path]:
    paths = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = Path(parent).resolve()
        for link in (Path(parent, name) for name in folders):
            if link.is_symlink() and link.resolve() in (place, *place.parents):
                raise XdscaleError(f"{link}: is a link to a folder that it lies in; take it away")
        paths += [Path(parent, name) for name in files if not name.startswith(".") and name.lower().endswith(ENDINGS)]
    return sorted(paths)


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:  # a link that leads nowhere
        raise XdscaleError(f"{path}: cannot be read: {error.strerror or error}; take it away") from None
    if not stat.S_ISREG(status.st_mode):
        raise XdscaleError(f"{path}: is a pipe or a device, which may never end; take it away")
    return status.st_size


def _image_id(path: Path, root: Path, ids: Ids) -> str:
    if not is_text(path.name if ids != "path" else str(path)):
        raise XdscaleError(f"{path}: its name is not UTF-8 text, as image ids are; rename it")
    if ids == "path" and path != root:
        return path.relative_to(root).as_posix()
    if ids in ("name", "path"):
        return path.name
    stem = PurePosixPath(path.name).stem
    if ids == "stem":
        return stem
    number = re.search(r"0*(\d+)$", stem)
    if number is None:
        raise XdscaleError(f"{path}: its name does not end with a number (--ids number); use --ids stem")
    return number[1]


def read_pixels(path: Path, content: bytes) -> np.ndarray:
    """Returns an image as uint8 [height, width, 3], turned as its EXIF tag says; of an animation the first frame.

    Grey, palette, CMYK and transparent images become RGB as Pillow converts them.

    Args:
        path: for messages.
        content: of the file.

    Raises:
        XdscaleError: it is no image, is damaged or cut off, has more than 8 bits a channel, or is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a large image or an odd tag; what is too large is refused below
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _check_header(path, image)
            image = ImageOps.exif_transpose(image).convert("RGB")
    except XdscaleError:
        raise
    except Image.DecompressionBombError:
        raise XdscaleError(f"{path}: has more than {MOST_PIXELS:,} pixels; scale it down") from None
    except Exception as error:  # Pillow's decoders raise what they come upon
        require_real_file(path)
        why = f"none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise XdscaleError(
            f"{path}: not a readable image ({why}); mend it, take it away, or use --bad-images skip"
        ) from None
    return np.asarray(image)


def _check_header(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if max(width, height) > LARGEST_SIDE or width * height > MOST_PIXELS:
        raise XdscaleError(
            f"{path}: has {width:,} × {height:,} pixels; at most {LARGEST_SIDE:,} a side and {MOST_PIXELS:,} in all "
            "can be read: scale it down"
        )
    if image.mode not in _EIGHT_BITS:
        raise XdscaleError(f"{path}: has pixels of the kind {shown(image.mode)}; save it with 8 bits a channel")
