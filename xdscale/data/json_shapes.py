"""Reads public JSON and JSON Lines files whose entries have a known shape, and says where one has another."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from xdscale.data.task_files import LONGEST_TEXT, place
from xdscale.errors import XdscaleError
from xdscale.files import read_bytes, require_real_file, shown

Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]
"""A text that a model reads."""

_Shape = TypeVar("_Shape")
_adapter = functools.cache(TypeAdapter)  # making one takes as long as reading a small file
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_whole(path: Path, shape: type[_Shape], digest: Any = None) -> _Shape:
    """Reads a JSON file.

    Args:
        path: the file.
        shape: what it must hold; a TypedDict keeps the keys that it names.
        digest: a hash of `hashlib` that takes in the file's bytes.

    Raises:
        XdscaleError: the file cannot be read, is not JSON, or holds something else; the first place is named, as
            `annotations[3].answers[0].answer`.
    """
    require_real_file(path)
    data = read_bytes(path)
    if digest is not None:
        digest.update(data)
    try:
        return _adapter(shape).validate_json(data.removeprefix(_BYTE_ORDER_MARK))
    except ValidationError as error:
        raise XdscaleError(f"{path}: {first_problem(error)}") from None


def read_lines(path: Path, shape: type[_Shape]) -> Iterator[tuple[int, _Shape]]:
    """Yields the entries of a JSON Lines file with their lines, counted from 1; empty lines are none.

    Args:
        path: the file.
        shape: of an entry.

    Raises:
        XdscaleError: the file cannot be read, or a line is not JSON or holds something else.
    """
    require_real_file(path)
    adapter = _adapter(shape)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if not line.isspace():
                    yield number, adapter.validate_json(line)
    except ValidationError as error:
        raise XdscaleError(f"{place(path, number)}: {first_problem(error)}") from None
    except OSError as error:
        raise XdscaleError(f"{path}: cannot be read: {error.strerror or error}") from None


def first_problem(error: ValidationError) -> str:
    """Returns where the first problem is, what stands there and what was expected."""
    problem = error.errors(include_url=False)[0]
    kind, message = problem["type"], problem["msg"]
    where = ""
    for part in problem["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    if kind == "json_invalid":
        return f"not JSON: {problem['ctx']['error']}"
    if kind == "missing":
        return f"{where} is missing; found {', '.join(map(shown, problem['input'])) or 'no key'}"
    expected = re.sub(r"^(Input should be|[A-Z][a-z]+ should have)", "expected", message)
    found = shown(problem["input"])
    return f"{where} = {found}: {expected}" if where else f"{expected}, found {found}"
