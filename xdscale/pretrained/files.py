"""Reading other people's files: JSON and weights, never code."""

import hashlib
import json
import pickle
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from xdscale.errors import XdscaleError


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Reads tensors only: safetensors, or a torch file with `weights_only=True`."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                torchscript = any(name.endswith("/constants.pkl") for name in archive.namelist())
            if torchscript:
                raise XdscaleError(
                    f"{path}: a TorchScript archive, which holds code and is not opened; give its state dict "
                    "as a .safetensors or .pt file, or use the open_clip tag (weights: openai)"
                )
        values = torch.load(path, map_location="cpu", weights_only=True)
    except XdscaleError:
        raise
    except Exception as error:  # unpickling, zip and safetensors raise unrelated kinds
        raise XdscaleError(f"{path}: not a readable weights file: {reason(error)}") from None
    if isinstance(values, Mapping) and isinstance(values.get("state_dict"), Mapping):
        values = values["state_dict"]
    if not isinstance(values, Mapping):
        raise XdscaleError(f"{path}: expected a state dict, found {type(values).__name__}")
    return {str(key): value for key, value in values.items() if isinstance(value, torch.Tensor)}


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        XdscaleError: unreadable, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise XdscaleError(f"{path}: not a readable JSON file: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise XdscaleError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def check_sha256(path: Path, expected: str) -> None:
    """Refuses a weights file that is not the one a recipe was written for.

    Raises:
        XdscaleError: names both hashes.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise XdscaleError(
            f"{path}: SHA-256 is {found}, but model.language.sha256 says {expected}; the file is damaged or "
            "not the one the recipe was written for"
        )


def reason(error: Exception) -> str:
    """Returns why a weights file could not be loaded, in words that suggest nothing unsafe."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to load it unsafely
        return "it is damaged or holds other things than tensors; give a .safetensors file"
    return one_line(error)


def one_line(error: Exception) -> str:
    """Returns an error's text on one line of bearable length."""
    return textwrap.shorten(str(error), 300, placeholder=" ...")


def some(names: list[str]) -> str:
    """Returns the first names of a list, and how many more there are."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return shown or "nothing"
