"""What stands on the disk: files forced out, hashed, compared, and read without running code from them.

A checkpoint's `checksums.json` names every file with its SHA-256 and protects itself with one over its own entries.
DeepSpeed reads its files as unrestricted pickles, so before it does, every file passes PyTorch's restricted unpickler
with three harmless classes of DeepSpeed's allowed: a checkpoint from elsewhere cannot run code.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xdscale.errors import XdscaleError
from xdscale.files import file_sha256, one_line, require_real_file, sync

CHECKSUMS = "checksums.json"
_OWN = "sha256 of the lines above"
_PICKLES = ".pt"


def file_names(folder: Path) -> list[str]:
    """Returns the files in a folder and below, as sorted relative names."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def check_room(folder: Path) -> None:
    """Asks a disk whether it takes another MiB, since PyTorch says "unexpected pos …" of one that does not.

    Raises:
        OSError: it does not.
    """
    probe = folder / ".probe"
    try:
        probe.write_bytes(bytes(2**20))
        sync(probe)
    finally:
        probe.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Forces the names in a folder and in all folders below it to the disk."""
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)


def checksum_text(checksums: dict[str, str]) -> str:
    """Returns the text of `checksums.json` for file names and their SHA-256."""
    entries = dict(sorted(checksums.items()))
    own = hashlib.sha256(json.dumps(entries, indent=2).encode()).hexdigest()
    return json.dumps(entries | {_OWN: own}, indent=2) + "\n"


def read_checksums(folder: Path) -> dict[str, str]:
    """Returns the file names and SHA-256 that a folder's `checksums.json` records.

    Raises:
        XdscaleError: the file is missing or not byte for byte what was written.
    """
    path = folder / CHECKSUMS
    require_real_file(path)
    try:
        text = path.read_bytes().decode()
        checksums = json.loads(text)
        checksums.pop(_OWN)
        intact = checksum_text(checksums) == text
    except FileNotFoundError:
        raise XdscaleError(f"{path} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise XdscaleError(f"{path} is altered: {one_line(error)}") from None
    if not intact:
        raise XdscaleError(f"{path} is altered: it does not match its own SHA-256")
    return checksums


def damage(folder: Path, part: tuple[int, int] = (0, 1)) -> list[str]:
    """Returns what is wrong with a folder's files, one line each: missing, altered, unreadable or not listed.

    Args:
        folder: a folder with `checksums.json`.
        part: (rank, ranks) to hash only this rank's share of the files.
    """
    try:
        expected = read_checksums(folder)
    except XdscaleError as error:
        return [str(error)]
    problems = []
    for name in sorted(expected)[part[0] :: part[1]]:
        path = folder / name
        try:
            found = file_sha256(path)
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
        else:
            if found != expected[name]:
                problems.append(f"{path} is altered: expected SHA-256 {expected[name][:12]}…, found {found[:12]}…")
    if part[0] == 0:
        # DeepSpeed's converter reads whatever has the right name.
        strays = [name for name in file_names(folder) if name.endswith(_PICKLES) and name not in expected]
        problems += [f"{folder / name} does not belong to the checkpoint" for name in strays]
    return problems


def check_pickles(folder: Path, names: Iterable[str] | None = None) -> None:
    """Refuses files that could run code when DeepSpeed reads them.

    Nothing but the pickled structure is read, so this takes milliseconds whatever the size.

    Args:
        folder: a checkpoint.
        names: files below it; None for all.

    Raises:
        XdscaleError: names the file and what it would call.
    """
    for name in file_names(folder) if names is None else names:
        if name.endswith(_PICKLES):
            read_pickle(folder / name)


def read_pickle(path: Path) -> Any:
    """Returns what `torch.save` wrote to a file, without running code from it; tensors stay on the disk until used.

    Raises:
        XdscaleError: names the file and what it would call.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(owner: Any, name: str) -> ZeroStageEnum:
        """Python 3.11.0 to 3.11.3 pickle a member of an enumeration as a call of getattr; nothing else may."""
        if owner is not ZeroStageEnum:
            raise ValueError(f"getattr of {owner}")
        return ZeroStageEnum[name]

    allowed = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum, (member, "builtins.getattr")]
    with torch.serialization.safe_globals(allowed):
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            # The restricted unpickler fails in many ways on what it does not know; every one of them is a refusal.
            problem = one_line(error)
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:
            foreign = []
    what = f"it would call {', '.join(sorted(foreign))}" if foreign else problem
    raise XdscaleError(
        f"{path}: not a checkpoint file that can be read without running code from it ({what}); "
        "it was not written by xdscale: do not load it"
    )
