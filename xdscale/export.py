"""From a run to folders that others read, all or nothing."""

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.files import DISKS_OWN, follow_umask, one_line

_UNFINISHED = ".xdscale-export"


def export_run(run: str | Path, out: str | Path, *, step: int | None = None) -> str:
    """Exports a run's checkpoint as its system does; see the systems' pages for what the folder holds.

    For the systems that adapt a language encoder `OUT` is a Hugging Face folder: `AutoModel.from_pretrained(OUT)` gives
    the encoder with exactly the original's parameters. `OUT/cross_modal` holds the full model, where there is one:
    safetensors (fp32) and the recipe it was built from.

    Args:
        run: the run folder.
        out: a folder that does not exist yet, or is empty; also a link to one, or where a disk is mounted.
        step: whose checkpoint; None for the best one, where the run keeps it, else the newest undamaged one.

    Returns:
        Some lines that say what was exported.

    Raises:
        XdscaleError: no such run or checkpoint, a damaged checkpoint (the file is named), or `out` is in use or cannot
            be written; nothing is left in it then.
    """
    from xdscale.systems.contract import open_system
    from xdscale.training.best import final_step
    from xdscale.training.checkpoint import choose_checkpoint
    from xdscale.training.consolidate import final_state
    from xdscale.training.distributed import Ranks
    from xdscale.training.stored import run_recipe

    run, out = Path(run), Path(out)
    recipe = run_recipe(run)
    system = open_system(recipe)
    _refuse_used(out)
    checkpoint = choose_checkpoint(run, final_step(run, recipe) if step is None else step, Ranks(0, 1, 0))
    with _published(out) as folder:
        what = system.export(final_state(checkpoint), run, folder)
    return f"{out}: {checkpoint.name}: {what}"


def _refuse_used(out: Path) -> None:
    try:
        used = out.is_symlink() or out.exists()
        if used and (not out.is_dir() or any(path.name not in (_UNFINISHED, DISKS_OWN) for path in out.iterdir())):
            raise XdscaleError(f"{out}: exists and is not an empty folder; choose another one for the export")
    except OSError as error:
        raise XdscaleError(f"{out}: cannot be written: {error.strerror}") from None


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """Gives a folder to fill, whose content moves into `out` only if the block ends without an exception.

    It lies in `out` itself, which thereby may be a link, the working folder or the root of a disk. What is read first,
    config.json, is moved last.
    """
    from safetensors import SafetensorError

    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    aside, moved = out / _UNFINISHED, []
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
        aside.mkdir()
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                follow_umask(path)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
            moved.append(path.rename(out / path.name))
        aside.rmdir()
    except BaseException as error:
        for path in (*moved, aside):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise XdscaleError(f"{out}: the export cannot be written: {one_line(error)}") from None
        raise
