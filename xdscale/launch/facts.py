"""What one machine knows about itself, as plain values that travel as JSON."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import xdscale
from xdscale.devices import asked_for_cpu
from xdscale.errors import XdscaleError
from xdscale.launch.environment import is_carried
from xdscale.names import is_url, shards_folder
from xdscale.recipe import Recipe

PACKAGES = ("torch", "deepspeed", "transformers", "triton", "open_clip_torch", "tokenizers", "numpy")
_GIB = 2**30


@dataclass(frozen=True)
class HostFacts:
    """A machine, as its first rank sees it.

    Attributes:
        rank: of that first rank.
        host: the machine's name.
        versions: of Python and the packages that training imports, and a hash of xdscale's source.
        gpus: names of the GPUs that ranks may use.
        driver: NVIDIA's, or empty.
        local_ranks: ranks on this machine.
        cores: CPU cores that ranks may use.
        environment: variables on which machines should agree.
        triton_cache: where Triton will compile to.
        triton_cache_kind: type of the file system there.
        open_files: limit of open files.
        shared_memory_gib: size of /dev/shm.
        loopback_name: whether the machine's own name stands for a loopback address, though ranks meet elsewhere.
        shards_fingerprint: of the recipe's shards, also behind a URL; None without a recipe or if they cannot be read.
        shards_problem: why they cannot be read, or empty.
        output_free_bytes: free space where the run will be written.
    """

    rank: int
    host: str
    versions: dict[str, str]
    gpus: list[str]
    driver: str
    local_ranks: int
    cores: int
    environment: dict[str, str]
    triton_cache: str
    triton_cache_kind: str
    open_files: int
    shared_memory_gib: float
    loopback_name: bool
    shards_fingerprint: str | None = None
    shards_problem: str = ""
    output_free_bytes: int | None = None

    @classmethod
    def of_this_machine(cls, rank: int, local_ranks: int, recipe: Recipe | None) -> Self:
        """Looks around; changes nothing.

        Args:
            rank: of this process.
            local_ranks: ranks on this machine.
            recipe: whose paths are looked at, or None.
        """
        import torch

        cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        visible = range(0 if asked_for_cpu() else torch.cuda.device_count())
        return cls(
            rank=rank,
            host=platform.node(),
            versions=_versions(),
            gpus=[torch.cuda.get_device_name(index) for index in visible],
            driver="" if asked_for_cpu() else _driver(),
            local_ranks=local_ranks,
            cores=len(os.sched_getaffinity(0)),
            environment={name: value for name, value in sorted(os.environ.items()) if is_carried(name)},
            triton_cache=str(cache),
            triton_cache_kind=file_system(cache, Path("/proc/mounts").read_text(encoding="utf-8")),
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            shared_memory_gib=shutil.disk_usage("/dev/shm").total / _GIB if Path("/dev/shm").is_dir() else 0.0,
            loopback_name=_name_is_loopback(),
            **(_recipe_facts(recipe) if recipe else {}),
        )


def file_system(path: Path, mounts: str) -> str:
    """Returns the type of the file system that holds a path, existing or not.

    Args:
        path: file or folder.
        mounts: text in the form of /proc/mounts.
    """
    resolved = path.expanduser().resolve()
    best, kind = -1, "unknown"
    for line in mounts.splitlines():
        _, point, found, *_ = line.split()
        point = point.replace("\\040", " ")
        if len(Path(point).parts) > best and resolved.is_relative_to(point):
            best, kind = len(Path(point).parts), found
    return kind


def existing_parent(path: Path) -> Path:
    """Returns the path itself, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def source_hash() -> str:
    """Returns 12 hex digits that are equal where xdscale's own Python files are."""
    digest = hashlib.sha256()
    for package in ("xdscale", "xdscale.kernels", "xdscale.shards"):
        # Found and not imported: the kernels bring torch with them.
        folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
        # Path.rglob does not follow links, so kernels and shards count once however they are put in place.
        for path in sorted(folder.rglob("*.py")):
            if package == "xdscale" and path.relative_to(folder).parts[0] in ("kernels", "shards"):
                continue
            digest.update(f"{package}/{path.relative_to(folder)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "xdscale": xdscale.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found | {"xdscale source": source_hash()}


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    first = path.read_text(encoding="utf-8").splitlines()[0] if path.exists() else ""
    return next((word for word in first.split() if word[0].isdigit() and "." in word), "")


def _name_is_loopback() -> bool:
    own, meeting = (_address(name) for name in (platform.node(), os.environ.get("MASTER_ADDR", "127.0.0.1")))
    return own.startswith("127.") and not meeting.startswith("127.")


def _address(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _recipe_facts(recipe: Recipe) -> dict[str, object]:
    facts: dict[str, object] = {}
    try:
        if hasattr(recipe.data, "shards"):
            facts["shards_fingerprint"] = _shards_fingerprint(recipe.data.shards)
    except (XdscaleError, OSError) as error:
        facts["shards_problem"] = str(error)
    facts["output_free_bytes"] = shutil.disk_usage(existing_parent(Path(recipe.output.folder))).free
    return facts


def _shards_fingerprint(name: str) -> str:
    """Returns what is equal for equal shards; of those behind a URL only `dataset.json` is fetched."""
    from xdscale.shards.manifest import Manifest
    from xdscale.shards.remote import fetch_manifest

    if is_url(name):
        return hashlib.sha256(fetch_manifest(name).encode()).hexdigest()
    folder = shards_folder(name)
    manifest = Manifest.load(folder)
    for shard in manifest.shards:
        path = folder / shard.file
        if not path.is_file():
            raise XdscaleError(f"{path}: missing")
        if path.stat().st_size != shard.bytes:
            raise XdscaleError(f"{path}: {path.stat().st_size} bytes, dataset.json says {shard.bytes}")
    return manifest.fingerprint
