"""Arrays as foreign files hold them: base64, `.npy` and `.npz`, msgpack with numpy's arrays. Nothing of them is run.

What a file states of lengths is compared with what it holds before any memory is taken for it.
"""

import binascii
import io
import json
import math
import re
import zipfile
from typing import Any

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import one_line, shown
from xdscale.shards.sources.regions.plain_pickle import load_plain

LARGEST_IMAGE_BYTES = 1 << 30
"""One image's regions after decompression, at most: 1,000 in fp32 and their distributions are 15 MB."""
_NUMERIC = re.compile(r"[<>|=]?([fiu][1248]|b1)")
_LZ4 = b"\x04\x22\x4d\x18"


def from_base64(text: str | bytes, dtype: str, where: str, field: str) -> np.ndarray:
    """Returns the numbers that base64 holds: [n] of `dtype`.

    Raises:
        XdscaleError: it is no base64, was truncated, or holds no whole number of values.
    """
    try:
        data = text.encode("ascii") if isinstance(text, str) else bytes(text)
        if b"\n" in data:
            data = data.translate(None, b"\r\n")
        content = binascii.a2b_base64(data, strict_mode=True)
        return np.frombuffer(content, dtype)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise XdscaleError(f"{where}: {field}: damaged or truncated base64 ({error}); copy the file again") from None
    except ValueError:
        size = np.dtype(dtype).itemsize
        raise XdscaleError(
            f"{where}: {field}: {len(content)} bytes are no whole number of values of {size} bytes ({dtype})"
        ) from None


def from_npy(data: bytes, where: str) -> Any:
    """Returns what a `.npy` file holds: an array, or what was pickled into it."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as error:  # numpy takes the header for Python, which can be wrong in many ways
        raise XdscaleError(f"{where}: not a .npy file: {one_line(error)}") from None
    rest = data[stream.tell() :]
    if dtype.hasobject:
        found = load_plain(rest, where)
        return found.item() if isinstance(found, np.ndarray) and found.shape == () else found
    if math.prod(shape) * dtype.itemsize != len(rest) or dtype.names:
        raise XdscaleError(f"{where}: {len(rest)} bytes, but its header states {dtype} {list(shape)}; copy it again")
    try:
        return np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C")
    except (ValueError, TypeError):  # values of no bytes or of many numbers, negative sides
        raise XdscaleError(f"{where}: its header states {dtype} {list(shape)}, which is no array") from None


def from_npz(data: bytes, where: str) -> dict[str, Any]:
    """Returns what a `.npz` file holds, by name."""
    found, total = {}, 0
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                total += member.file_size
                if total > LARGEST_IMAGE_BYTES:
                    raise XdscaleError(f"{where}: more than {LARGEST_IMAGE_BYTES:,} bytes when unpacked")
                with archive.open(member) as stream:
                    content = stream.read(member.file_size + 1)
                name = member.filename.removesuffix(".npy")
                found[name] = from_npy(content, f"{where}, array {name!r}")
    except XdscaleError:
        raise
    except Exception as error:  # zipfile has no one error for damage
        raise XdscaleError(f"{where}: not a readable .npz file: {one_line(error)}") from None
    return found


def from_msgpack(data: bytes, where: str) -> Any:
    """Returns what msgpack holds, compressed with lz4 or not, with arrays as msgpack-numpy writes them.

    That library unpickles arrays of objects, so it is not used.
    """
    import lz4.frame
    import msgpack

    try:
        if data[:4] == _LZ4:
            data = lz4.frame.LZ4FrameDecompressor().decompress(data, max_length=LARGEST_IMAGE_BYTES)
        return msgpack.unpackb(data, raw=False, strict_map_key=False, object_hook=_array_or_map)
    except Exception as error:  # both libraries raise errors of many classes
        raise XdscaleError(f"{where}: not readable as msgpack: {type(error).__name__}: {one_line(error)}") from None


def _array_or_map(value: dict) -> Any:
    found = {key.decode() if isinstance(key, bytes) else key: item for key, item in value.items()}
    if "nd" not in found:
        return value
    if not isinstance(found["type"], str) or not _NUMERIC.fullmatch(found["type"]):
        raise ValueError(f"arrays of type {shown(found['type'])} are not read")
    values = np.frombuffer(found["data"], found["type"])
    return values.reshape(found["shape"]) if found["nd"] else values[0]


def from_json(data: str | bytes, where: str) -> Any:
    """Returns what JSON holds."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise XdscaleError(f"{where}: not readable as JSON: {one_line(error)}") from None
