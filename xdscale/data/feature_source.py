"""Which network computed the features of regions that a model was trained on: those of another mean something else."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.files import count_of, read_json
from xdscale.names import resolve_path
from xdscale.shards.regions import RegionTable

_KEPT = "regions.json"


def feature_source(regions: RegionTable) -> dict[str, str | None]:
    """Returns what tells the network that computed a table's features: its name, and the SHA-256 of its weights."""
    detector = regions.build.detector
    return {"model": detector.model, "sha256": detector.sha256}


def keep_feature_source(regions: RegionTable | None, run: Path) -> None:
    """Writes into a run's folder what computed the features that it reads; nothing where it reads none."""
    if regions is not None:
        (run / _KEPT).write_text(json.dumps(feature_source(regions), indent=2) + "\n", encoding="utf-8")


def kept_feature_source(run: Path) -> dict[str, Any] | None:
    """Returns what `keep_feature_source` wrote; None where it wrote nothing."""
    return read_json(run / _KEPT) if (run / _KEPT).is_file() else None


def state_feature_source(source: dict[str, Any] | None, export: Path) -> None:
    """Writes into the config.json of an export what computed the features that it was last trained on, if any."""
    path = export / "config.json"
    values = read_json(path) | {"features_of": source}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def started_features(start: str | None) -> object:
    """Returns what the run or the export that `model.start` names says of the features that it was trained on."""
    if start is None:
        return None
    folder = resolve_path(start)
    config = folder / "config.json"
    return read_json(config).get("features_of") if config.is_file() else kept_feature_source(folder)


def require_width(regions: RegionTable, widths: Sequence[int], model: str, remedy: Callable[[], str]) -> None:
    """Checks that a table's features are as wide as a model reads them.

    Args:
        regions: the table.
        widths: numbers of a region that will do, first those that it reads.
        model: its name, for the message.
        remedy: says what to do; it may look into weights, and is asked for nothing else.

    Raises:
        XdscaleError: they are of another width; or there are none, perhaps the images themselves.
    """
    if regions.width in widths:
        return
    held, numbers = f"features of {count_of(regions.width, 'number')}", ""
    if not regions.width:
        held, numbers = "images and no features" if regions.build.jpeg else "no features", " numbers"
    told = f"{regions.table.folder}: {held}; {model} reads {widths[0]}{numbers} of each region"
    raise XdscaleError(f"{told}: {remedy()}")


def of_same_network(trained: object) -> str:
    """Says which table a model needs, as far as its config.json says what it was trained on, as `feature_source`."""
    named = f", {_words(trained)}" if isinstance(trained, dict) else ""
    return f"take a table of the network that it was trained on{named}"


def notes_on_features(trained: object, regions: RegionTable, model: str) -> list[str]:
    """Returns a line where a table has features of another network than those that a model was trained on.

    The hashes of the weights decide where both are known, else the names.

    Args:
        trained: as `feature_source`, what its config.json says of these; anything else than an object says nothing.
        regions: the table.
        model: its name, for the line.
    """
    found = feature_source(regions)
    if not isinstance(trained, dict):
        return []
    key = "sha256" if found["sha256"] and trained.get("sha256") else "model"
    if found[key] == trained.get(key):
        return []
    told = f"{regions.table.folder}: features of {_words(found)}, but {model} was trained on those of {_words(trained)}"
    return [f"{told}, which mean something else; take a table of the same network"]


def _words(source: dict[str, Any]) -> str:
    weights = source.get("sha256")
    return f"{source.get('model')}{f' (weights {str(weights)[:12]})' if weights else ''}"
