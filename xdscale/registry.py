"""Things found by name: those that ship, and those that installed packages offer through entry points."""

import importlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.files import one_line
from xdscale.names import nearest

SYSTEMS = {
    "finetune": "xdscale.finetune.recipe:FinetuneRecipe",
    "mlm": "xdscale.recipes.mlm.schema:MaskedLMRecipe",
    "visualbert": "xdscale.recipes.visualbert.schema:VisualBERTRecipe",
    "visualbert_task": "xdscale.recipes.visualbert.task_schema:VisualBERTTaskRecipe",
    "vlbert": "xdscale.recipes.vlbert.schema:VLBERTRecipe",
    "xdbert": "xdscale.recipes.xdbert.schema:XDBERTRecipe",
}
"""Recipes of the systems that ship; of others `xdscale.systems` in entry points."""

SUBJECTS = {
    "language": "xdscale.recipes.xdbert.schema:LanguageSettings",
    "cross-modal": "xdscale.recipes.xdbert.schema:CrossModalSettings",
    "clip": "xdscale.recipes.xdbert.schema:ClipSettings",
    "visualbert": "xdscale.recipes.visualbert.schema:VisualBERTSettings",
    "vlbert": "xdscale.recipes.vlbert.schema:VLBERTSettings",
}
"""Settings of what can be finetuned and ships; of others `xdscale.subjects` in entry points."""

ANALYSES = {
    "grounding": "xdscale.analysis.visualbert_command:grounding",
    "attention-maps": "xdscale.analysis.vlbert_command:attention_maps",
}
"""Commands with which systems bring an analysis of their own. They are imported at every start: nothing heavy."""


@cache
def offered(group: str) -> Mapping[str, str]:
    """Returns what installed packages offer, `module:object` by name.

    Args:
        group: of the entry points, such as `xdscale.systems`.

    Raises:
        XdscaleError: two packages offer the same name.
    """
    from importlib.metadata import entry_points  # takes longer than all else that `--help` needs

    found: dict[str, Any] = {}
    for point in entry_points(group=group):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise XdscaleError(
                f"two packages offer {point.name!r} as {group}: {_package(other)} ({other.value}) and "
                f"{_package(point)} ({point.value}); uninstall one"
            )
    return {name: point.value for name, point in found.items()}


def locate(group: str, shipped: Mapping[str, str]) -> dict[str, str]:
    """Returns `module:object` by name, of those that ship and those that are offered.

    Raises:
        XdscaleError: a package offers a name that ships, or two offer the same.
    """
    others = offered(group)
    for name in shipped.keys() & others.keys():
        raise XdscaleError(f"a package offers {name!r} as {group} ({others[name]}), but xdscale has one; rename it")
    return {**shipped, **others}


def find(group: str, shipped: Mapping[str, str], name: str, where: str, kind: type) -> Any:
    """Imports what stands behind a name.

    Args:
        group: of the entry points.
        shipped: `module:object` by name, of those that come with xdscale.
        name: the name.
        where: how an error begins: the file and the key that hold the name.
        kind: what stands there is a subclass of it.

    Raises:
        XdscaleError: nobody offers the name (the nearest is given), or its module cannot be imported.
    """
    what = group.rpartition(".")[2].removesuffix("s")
    places = shipped if name in shipped else locate(group, shipped)
    known = f"there are {', '.join(sorted(places))}"
    if name not in places:
        raise XdscaleError(f"{where} = {name!r}: no such {what}; {nearest(name, sorted(places), known)}")
    return load(places[name], f"{where} = {name!r}", kind)


def load(place: str, where: str, kind: type | None = None) -> Any:
    """Imports `module:object`.

    Raises:
        XdscaleError: there is no such module or object, the module raised anything, or the object is no subclass of
            `kind`, where that is given; begins with `where`.
    """
    module, _, attribute = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise XdscaleError(f"{where}: {place} cannot be imported: {one_line(error)}") from error
    except (Exception, SystemExit) as error:  # a package may do anything when it is imported
        raise XdscaleError(
            f"{where}: {place} cannot be imported: {type(error).__name__}: {one_line(error)}; "
            f"python -c 'import {module}' shows where"
        ) from error
    if kind is not None and not (isinstance(found, type) and issubclass(found, kind)):
        raise XdscaleError(f"{where}: {place} is {found!r}; expected a subclass of {kind.__module__}.{kind.__name__}")
    return found


def implementation(schema: type, where: str, kind: type) -> Any:
    """Imports the class that a schema names as its `implementation`.

    Raises:
        XdscaleError: it names none, which cannot be imported, or which is no whole subclass of `kind`.
    """
    place = getattr(schema, "implementation", None)
    if not isinstance(place, str):
        raise XdscaleError(f"{where}: {schema.__name__}.implementation = {place!r}; expected module:class")
    found = load(place, where, kind)
    if missing := sorted(found.__abstractmethods__):
        raise XdscaleError(f"{where}: {place} does not define {', '.join(missing)}")
    return found


def folder_of(place: str) -> Path | None:
    """Returns the folder of the file of `module:object`, importing at most the packages around it; None if none is."""
    try:
        spec = importlib.util.find_spec(place.partition(":")[0])
    except (Exception, SystemExit):  # of such a package; whoever asks for what it offers is told
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _package(point: Any) -> str:
    return point.dist.name if point.dist is not None else "an unnamed one"
