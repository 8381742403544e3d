"""Damaged and malicious `.npy` and `.npz`."""

import io
import zipfile

import numpy as np

from . import region_files as writers
from .malicious import malicious


def truncated(value, chance, canary):
    return value[: chance.integers(1, len(value) * 9 // 10)]


def arrays_damage(fields, chance, canary):
    name = list(fields)[chance.integers(len(fields))]
    array = fields[name]
    kinds = [
        lambda: object_array(malicious(chance, canary)),
        lambda: array[:-1] if array.ndim else np.array("x"),
        lambda: array[None, None],
        lambda: np.array(["text"] * max(len(np.atleast_1d(array)), 1)),
    ]
    changed = kinds[chance.integers(len(kinds))]()
    return {**fields, name: changed}


class Raw(bytes):
    """A `.npy` file's bytes."""


def object_array(content):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    return Raw(header.getvalue() + content)


def npy_lies(path, chance, canary):
    """A header that states a huge or another shape, objects with code, or no header."""
    header = io.BytesIO()
    shapes = [(10**9, 2048), (2**62, 2), (3, 7), (0,), (10**18,)]
    shape = shapes[chance.integers(len(shapes))]
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    kinds = [
        header.getvalue() + b"abc",
        bytes(object_array(malicious(chance, canary))),
        b"\x93NUMPY\x01\x00\x10\x00{'descr': open}\n",
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY\x01\x00\x08\x00{'descr'",
        b"",
        path.read_bytes()[:-4],
        path.read_bytes()[:60],
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
    ]
    path.write_bytes(kinds[chance.integers(len(kinds))])


def zipped(fields):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in fields.items():
            content = io.BytesIO()
            if not isinstance(array, Raw):
                np.save(content, array)
            archive.writestr(f"{name}.npy", array if isinstance(array, Raw) else content.getvalue())
    return stream.getvalue()


writers.npz = lambda **arrays: zipped(arrays)  # the same, and takes raw members
