"""Pickles of others, read without running anything: plain containers, numbers, strings and numpy arrays alone.

A pickle is a program that calls what it names. Here it can name a few things, all of this file's own making or
harmless; anything else is refused by name before any of it is called.
"""

import io
import pickle
import re
import struct
from collections import OrderedDict
from typing import Any

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import one_line, shown

_MOST_COPIES = 64
"""A pickle may name what it holds again and again: written out, it is so many values for each of its bytes at most."""
_PLAIN_TYPE = re.compile(r"[<>|=]?([fiu][1248]|b1|[SU]\d{0,4})")


def load_plain(data: bytes, where: str) -> Any:
    """Returns what a pickle holds.

    Args:
        data: the pickle.
        where: file and row, for messages.

    Raises:
        XdscaleError: it names something else (said by name), or is damaged.
    """
    try:
        return _without_stand_ins(_PlainUnpickler(data, where).load(), [_MOST_COPIES * len(data)])
    except XdscaleError:
        raise
    except Exception as error:  # a broken pickle fails in as many ways as there are bytes
        raise XdscaleError(f"{where}: not a readable pickle: {type(error).__name__}: {one_line(error)}") from None


# The standard library's unpickler in Python, not the one in C, which reserves memory for whatever number of remembered
# objects a pickle states: tens of gigabytes in five bytes.
class _PlainUnpickler(pickle._Unpickler):
    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")  # so Python 2 wrote numpy's arrays
        self._where, self._bytes = where, len(data)

    def _bytearray(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        if size > self._bytes:  # the library would take memory for it first
            raise ValueError(f"it states {size} bytes and has {self._bytes}")
        self.append(self.read(size))

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: _bytearray}

    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN.get((module.replace("numpy.core", "numpy._core"), name))
        if found is None:
            raise XdscaleError(
                f"{self._where}: the pickle asks for {shown(f'{module}.{name}')}; only plain containers, numbers, text "
                "and numpy arrays are read, since a pickle can run any program. Nothing of it was run"
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("it refers to objects outside of itself")

    def get_extension(self, code: int) -> Any:
        raise ValueError("it uses extension codes")


class _Unchangeable(type):
    """Pickles may set attributes of what they name; not of these classes."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError(f"{cls.__name__}.{name} cannot be changed")


class _Type(metaclass=_Unchangeable):
    """Stands for `numpy.dtype`, whose own state can make it misread memory."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any) -> None:
        if code != "O8" and code != "O" and not _PLAIN_TYPE.fullmatch(code):
            raise ValueError(f"arrays of type {code!r} are not read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _, order, *structure = state[:5]
        if any(part is not None for part in structure):
            raise ValueError("arrays of structures are not read")
        if order in ("<", ">") and self.dtype.kind != "O":
            self.dtype = self.dtype.newbyteorder(order)


class _Array(metaclass=_Unchangeable):
    """Stands for an array until it is known what it holds."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, content = state
        self.array = _filled(content, kind, shape, "F" if fortran else "C")


class _FromBuffer(metaclass=_Unchangeable):
    """Stands for numpy's function that pickles of protocol 5 call."""

    def __new__(cls, buffer: bytes, kind: _Type, shape: tuple, order: str) -> np.ndarray:
        return _filled(bytes(buffer), kind, shape, order)


class _Scalar(metaclass=_Unchangeable):
    """Stands for numpy's function that makes a number."""

    def __new__(cls, kind: _Type, content: bytes) -> Any:
        return _filled(content, kind, (1,), "C")[0]


class _Encode(metaclass=_Unchangeable):
    """Stands for `_codecs.encode`, which old protocols call for bytes."""

    def __new__(cls, text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise ValueError(f"bytes in encoding {encoding!r}")
        return text.encode("latin1")


class _NoBytes(metaclass=_Unchangeable):
    """Stands for `bytes`, which old protocols call for none at all."""

    def __new__(cls) -> bytes:
        return b""


class _NamedArray(metaclass=_Unchangeable):
    """Stands for `numpy.ndarray`, which is only ever handed on."""


_MULTIARRAY, _NUMERIC = "numpy._core.multiarray", "numpy._core.numeric"
_KNOWN: dict[tuple[str, str], Any] = {
    (_MULTIARRAY, "_reconstruct"): _Array,
    (_MULTIARRAY, "scalar"): _Scalar,
    (_NUMERIC, "_frombuffer"): _FromBuffer,
    ("numpy", "ndarray"): _NamedArray,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Encode,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "bytes"): _NoBytes,
    ("__builtin__", "bytes"): _NoBytes,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "frozenset"): frozenset,
}


def _filled(content: Any, kind: _Type, shape: tuple, order: str) -> np.ndarray:
    """Returns an array of what a pickle holds; it is never larger than that."""
    shape = tuple(int(side) for side in shape)
    if kind.dtype.kind == "O":
        if not isinstance(content, list):
            raise ValueError("an array of objects without a list of them")
        array = np.empty(len(content), object)
        for place, value in enumerate(content):  # one by one: lists would be taken for rows
            array[place] = value
    else:
        if isinstance(content, str):  # numpy's own pickles of Python 2
            content = content.encode("latin1")
        array = np.frombuffer(content, kind.dtype)
    return array.reshape(shape, order=order if order in ("C", "F") else "C")


def _without_stand_ins(value: Any, left: list[int]) -> Any:
    """Returns the same with arrays in place of what stood for them; in too deep a nest it is a RecursionError.

    Args:
        value: what a pickle holds.
        left: how many values may still come, counted down.
    """
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("it names the same things again and again, and would take all memory")
    if isinstance(value, _Array):
        value = value.array
    if isinstance(value, _Type | type):
        raise ValueError("it holds a type and not a value")
    if isinstance(value, dict):
        return {key: _without_stand_ins(item, left) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_stand_ins(item, left) for item in value)
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        whole = np.empty(value.size, object)
        for place, item in enumerate(value.ravel().tolist()):
            whole[place] = _without_stand_ins(item, left)
        return whole.reshape(value.shape)
    return value
