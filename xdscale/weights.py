"""Reading other people's weights, never code."""

import errno
import hashlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from xdscale.errors import XdscaleError
from xdscale.files import one_line, read_json, require_real_file

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""In order of preference; each also in parts, with an index."""


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Reads tensors only: safetensors, or a torch file with `weights_only=True`.

    Raises:
        XdscaleError: it cannot be read so, or is a Git LFS pointer.
    """
    require_real_file(path)
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
    found = {str(key): value for key, value in values.items() if isinstance(value, torch.Tensor)}
    odd = [name for name, value in found.items() if value.layout is not torch.strided or value.is_meta
           or value.is_quantized or value.is_nested or value.is_complex()]  # fmt: skip
    if odd:
        raise XdscaleError(
            f"{path}: holds {some(odd)} sparse, quantized, nested, complex or without values; expected plain tensors"
        )
    return found


def part_of(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Returns the weights whose names begin with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def require_fitting(
    wanted: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], where: Path | str, whose: str
) -> None:
    """Refuses weights that are not those of a module.

    Raises:
        XdscaleError: names some that are missing, of another shape, or whole numbers in the place of others: quantised
            weights without their scales.
    """

    def fits(name: str, value: torch.Tensor) -> bool:
        found = state.get(name)
        return (
            found is not None and found.shape == value.shape and found.is_floating_point() == value.is_floating_point()
        )

    if wrong := [name for name, value in wanted.items() if not fits(name, value)]:
        raise XdscaleError(f"{where}: holds no fitting weights for {some(wrong)} of {whose}")


def require_floats(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuses whole numbers in the place of weights: quantised ones, which say nothing without their scales.

    Raises:
        XdscaleError: names some that are.
    """
    if whole := [name for name, value in state.items() if not value.is_floating_point()]:
        kind = str(state[whole[0]].dtype).removeprefix("torch.")
        raise XdscaleError(
            f"{path}: {some(whole)}: {kind}, expected floating point; quantised weights say nothing without their "
            "scales: take the checkpoint that they were made of"
        )


def require_numbers(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuses weights that are not finite, with which no step of a run would be.

    Raises:
        XdscaleError: names some that are not.
    """
    if lost := [name for name, value in state.items() if not value.isfinite().all()]:
        raise XdscaleError(
            f"{path}: {some(lost)}: not all values are finite (NaN or infinite); take another checkpoint"
        )


def matrix_shapes(
    state: Mapping[str, torch.Tensor], names: Sequence[str], path: Path, what: str
) -> list[tuple[int, int]]:
    """Returns the shapes of matrices, from which the configuration of a checkpoint follows.

    Args:
        state: what the checkpoint holds.
        names: of the matrices.
        path: of the checkpoint.
        what: it is a checkpoint of.

    Raises:
        XdscaleError: one is not there, or is no matrix with numbers in it.
    """
    for name in names:
        if name not in state:
            raise XdscaleError(f"{path}: no checkpoint of {what}: it holds no {name}")
        if state[name].ndim != 2 or not state[name].numel():
            shape = list(state[name].shape)
            raise XdscaleError(f"{path}: no checkpoint of {what}: {name} has the shape {shape}, expected a matrix")
    return [tuple(state[name].shape) for name in names]


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold the weights in a folder: one, or the parts that an index names, sorted.

    Raises:
        XdscaleError: there are none; an index is damaged, or names a file that is missing or lies elsewhere; or a file
            is a Git LFS pointer.
    """
    for name in WEIGHT_FILES:
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.is_file():
                files = _parts(path, Path(name).suffix) if path.suffix == ".json" else [path]
                for file in files:
                    require_real_file(file)
                return files
    raise XdscaleError(
        f"{folder}: holds neither {' nor '.join(WEIGHT_FILES)}, nor the index of one in parts; or use weights: random"
    )


def _parts(index: Path, suffix: str) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise XdscaleError(f"{index}: not an index of weights: expected 'weight_map', from tensors to files")
    for name in {*names.values()}:
        if name != Path(name).name or Path(name).suffix != suffix:
            raise XdscaleError(f"{index}: names {name!r}; expected {suffix} files beside it")
        if not index.with_name(name).is_file():
            raise XdscaleError(f"{index}: names {name!r}, which is missing; copy all parts of the weights there")
    return sorted(index.with_name(name) for name in {*names.values()})


def weights_sha256(files: list[Path]) -> str:
    """Returns the SHA-256 of weights; of several parts, that of one after the other, as `cat` gives them."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_sha256(files: list[Path], expected: str) -> None:
    """Refuses weights that are not those a recipe was written for.

    Raises:
        XdscaleError: names both hashes.
    """
    found = weights_sha256(files)
    if found != expected.lower():
        raise XdscaleError(
            f"{', '.join(map(str, files))}: SHA-256 is {found}, but the recipe says {expected}; the weights "
            "are damaged or not those that it was written for"
        )


def reason(error: Exception) -> str:
    """Returns why a weights file could not be loaded, in words that suggest nothing unsafe."""
    # PyTorch's own text advises to load it unsafely; that of the others is a byte, a seek in a torn file, or nothing.
    torn = isinstance(error, OSError) and error.errno == errno.EINVAL
    if torn or isinstance(error, pickle.UnpicklingError | KeyError | EOFError):
        return "it is damaged or holds other things than tensors; give a .safetensors file"
    return one_line(error)


def some(names: list[str]) -> str:
    """Returns the first names of a list, and how many more there are."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return shown or "nothing"
