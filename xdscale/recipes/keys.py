"""Every key of a recipe with its value, its meaning and its default, as `xdscale recipes NAME` prints them."""

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from xdscale.recipe_yaml import write_yaml

_WIDTH = 48


def key_lines(values: BaseModel) -> Iterator[str]:
    """Returns a line for each key of a recipe, and one for each of its sections.

    A key's line begins with what replaces its value on the command line, `section.key=value`. A section that is off is
    `null`; its keys are listed too, without values.

    Args:
        values: the recipe, or any model of sections.
    """
    yield from _lines(type(values), values, "")


def _lines(section: type[BaseModel], values: BaseModel | None, prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        key, inner = prefix + name, _section(field)
        value = getattr(values, name, None)
        if not prefix:
            yield ""
        if inner is None:
            shown = f"{key}={_text(value)}" if values is not None else f"{key} (off)"
            yield f"{shown:{_WIDTH}}  {_meaning(field)} ({_default(field, value, values is None)})"
            continue
        about = (inner.__doc__ or "").split("\n")[0].rstrip(".")
        shown = f"{key}=null" if value is None and values is not None else key
        yield f"{shown:{_WIDTH}}  {about}" + (f" ({field.description})" if field.description else "")
        yield from _lines(inner if value is None else type(value), value, f"{key}.")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """Returns the class of a field that is a section, also of one that may be null."""
    classes = get_args(field.annotation) if get_origin(field.annotation) in (Union, types.UnionType) else ()
    found = [kind for kind in (field.annotation, *classes) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if found else None


def _meaning(field: FieldInfo) -> str:
    choices = " or ".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else ""
    return "; ".join(filter(None, (choices, field.description)))


def _default(field: FieldInfo, value: Any, off: bool) -> str:
    if field.is_required():
        return "no default"
    default = field.get_default()
    return "the default" if value == default and not off else f"default {_text(default)}"


def _text(value: Any) -> str:
    """Returns a value as YAML reads it, on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return write_yaml(plain, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
