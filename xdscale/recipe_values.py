"""The values of YAML files with sections: read, replaced on the command line, validated; errors name the key."""

import re
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from xdscale.errors import XdscaleError
from xdscale.files import one_line, shown
from xdscale.names import unknown_key
from xdscale.recipe_yaml import read_yaml

Values = TypeVar("Values", bound=BaseModel)

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What reading YAML raises: a number of thousands of digits is a ValueError, as bad UTF-8 is."""

_KIND = re.compile(r"(constrained-)?(float|int|str|bool)|(dict|list|tuple)\[.*|\[key\]")
"""What pydantic puts into the place of a value that may be of several kinds, and of a key itself: no keys of files."""


def read_values(path: Path, overrides: Sequence[str], known: Iterable[str]) -> dict[str, Any]:
    """Reads a YAML file of sections, known by name, and applies overrides.

    Raises:
        XdscaleError: no such file, not YAML, no sections, or an override of another form.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise XdscaleError(f"{path}: cannot be read: {error.strerror}") from None
    except NOT_YAML as error:
        raise XdscaleError(f"{path}: not a YAML recipe: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise XdscaleError(f"{path}: expected sections such as {', '.join(known)}, found {shown(values)}")
    for override in overrides:
        _apply_override(values, override)
    return values


def read_validated(path: Path, overrides: Sequence[str], model: type[Values]) -> Values:
    """Reads a YAML file of sections, applies overrides and validates it.

    Raises:
        XdscaleError: as `read_values` and `validated`.
    """
    return validated(read_values(path, overrides, model.model_fields), model, str(path), overrides)


def validated(values: dict[str, Any], model: type[Values], source: str, overrides: Sequence[str] = ()) -> Values:
    """Returns a recipe's values as what they are.

    Args:
        values: by section.
        model: the class of the sections.
        source: the file that held them.
        overrides: what was applied to them.

    Raises:
        XdscaleError: an unknown key (the nearest right one is named) or a bad value.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise XdscaleError(describe_validation_error(source, error, model, overrides)) from None


def describe_validation_error(
    source: str, error: ValidationError, model: type[BaseModel], overrides: Sequence[str] = ()
) -> str:
    """Returns one line per problem: where it stands, key, what was found, what was expected, the nearest right name.

    Args:
        source: the file that held the values.
        error: what pydantic found.
        model: the class that was validated, from which near names are taken.
        overrides: `section.key=value` items that stood in the file's place.
    """
    typed = [override.partition("=")[0] + "." for override in overrides]
    problems: dict[str, str] = {}  # what is said of a value, by what a line begins with
    for item in error.errors():
        *outer, last = map(str, item["loc"] or ("",))
        location = [part for part in outer if not _KIND.fullmatch(part)]
        if item["type"] == "extra_forbidden" or not _KIND.fullmatch(last):  # a person's key may be called as a kind is
            location.append(last)
        key = ".".join(location)
        by_person = any(name.startswith(f"{key}.") or f"{key}.".startswith(name) for name in typed)
        where = "the command line" if by_person else source
        if item["type"] == "extra_forbidden":
            place = _place_of(model, location[-1])
            hint = f"did you mean {place!r}?" if place else unknown_key(location[-1], _known_keys(model, location[:-1]))
            problems[f"{where}: unknown key {key!r}"] = f"; {hint}"
        elif item["type"] == "missing":
            problems[f"{where}: {key!r} is missing"] = ""
        else:
            quotes = "; write a number that is meant as a text in quotes" if item["type"] == "string_type" else ""
            said = item["msg"].removeprefix("Value error, ") + ", {NAME: VALUE}" * (item["type"] == "dict_type")
            place = f"{where}: {key} = {shown(item['input'])}"
            problems[place] = f"{problems[place]}, or: {said}" if place in problems else f": {said}{quotes}"
    return "\n".join(place + said for place, said in problems.items())


def is_overridden(overrides: Sequence[str], section: str, key: str) -> bool:
    """Returns whether a value comes from the command line, not from the recipe's file."""
    typed: dict[str, Any] = {}
    for override in overrides:
        _apply_override(typed, override)
    return isinstance(typed.get(section), dict) and key in typed[section]


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one value, given as `section.key=value` with the value in YAML.

    Raises:
        XdscaleError: the override has another form.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise XdscaleError(f"{override!r}: an override has the form section.key=value")
    try:
        value = read_yaml(text)
    except NOT_YAML as error:
        raise XdscaleError(f"{override!r}: the value is not valid YAML ({one_line(error)}); quote a text") from None
    *sections, last = key.split(".")
    target = values
    for section in sections:
        if not isinstance(target.get(section), dict):
            target[section] = {}
        target = target[section]
    target[last] = value


def _place_of(model: type[BaseModel], key: str) -> str | None:
    """Returns `section.key` where another section has a key of this name."""
    sections = {name: _model_class(field.annotation) for name, field in model.model_fields.items()}
    places = (f"{name}.{key}" for name, kind in sections.items() if key in getattr(kind, "model_fields", ()))
    return next(places, None)


def _known_keys(model: type[BaseModel], location: list[str]) -> list[str]:
    for part in location:
        if part not in model.model_fields:
            return []
        model = _model_class(model.model_fields[part].annotation)
    return list(model.model_fields)


def _model_class(annotation: Any) -> type[BaseModel]:
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not types.NoneType)
    return annotation
