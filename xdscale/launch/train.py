"""`xdscale train`: a recipe on this machine's devices, through the `deepspeed` launcher.

The launcher loses signals and exit codes (docs/design.md, "Stopping"). So it is started with those signals blocked;
this process takes them and passes them on, and tells from the run's log whether the launcher's exit code is the truth.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from xdscale.devices import visible_gpus
from xdscale.ds_config import precision, read_ds_config
from xdscale.errors import EXIT_FAULT, XdscaleError
from xdscale.files import count_of
from xdscale.launch.job import check_job, shipped_ds_config
from xdscale.launch.start import program
from xdscale.names import is_url, shards_folder
from xdscale.recipe import Recipe, load_recipe
from xdscale.training.environment import check_precision, no_bf16
from xdscale.training.run_folder import RunFolder, read_log

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# On lines of its own: the ranks' progress bar, of up to two lines, is drawn over what stands there.
_STOPPING = b"\nstopping: this step is finished and a checkpoint saved; Ctrl-C again ends at once, without one\n\n"
_FP32_FOR_CPU = "quickstart-zero2"
_BF16_FROM = 8.0  # compute capability of the A100
_GPU_LINE = re.compile(r"(\d+), (\S+), (?:(\d+\.\d+)|.*)")  # "[N/A]", "[Not Supported]"


class _Gpu(NamedTuple):
    """As nvidia-smi lists it."""

    number: str
    uuid: str
    capability: float


def train_here(name: str, overrides: list[str], ds_config: str | None, ranks: int | None) -> int:
    """Trains a recipe on this machine's GPUs, or on CPU ranks where there is none.

    Args:
        name: recipe file or name of a shipped recipe.
        overrides: `section.key=value` items.
        ds_config: DeepSpeed JSON file or the name of a shipped one; None takes one for the recipe's size.
        ranks: number of ranks; None for one on each GPU, or one on the CPU.

    Returns:
        Exit code of the ranks: 0 done, 2 bad input, 70 a rank died, hung or failed, 75 stopped with a checkpoint saved.

    Raises:
        XdscaleError: as `check_job`, `check_precision` and `RunFolder.check`; there are no shards, or fewer GPUs than
            ranks, or the launcher cannot address one.
    """
    gpus = visible_gpus()
    if ranks and gpus and ranks > len(gpus):
        raise XdscaleError(
            f"--ranks {ranks}: {count_of(len(gpus), 'GPU')} visible, and every rank needs one of its own; "
            f"give --ranks {len(gpus)} or less, or compute on the CPU with DS_ACCELERATOR=cpu"
        )
    chosen = gpus[:ranks]
    world_size = len(chosen) or ranks or 1
    known = _known_to_the_driver() if gpus else []
    job = check_job(name, overrides, ds_config or _default(load_recipe(name, overrides), gpus, known), world_size)
    _check_precision(job.arguments[-1], gpus, known)
    shards, folder = getattr(job.recipe.data, "shards", None), Path(job.recipe.output.folder)
    RunFolder(folder).check(job.recipe)  # the launcher and its ranks take most of a minute to find out
    if shards is not None and not is_url(shards):
        shards_folder(shards)
    options, settings = _devices(chosen, world_size, known)
    # Less than -q: after bad input the launcher's own word would stand beside the one message that names it.
    command = [program("deepspeed"), "--log_level", "critical", *options]
    command += ["--master_port", str(_free_port()), "--module", "xdscale.train", *job.arguments]
    print(shlex.join([*(f"{key}={value}" for key, value in settings.items()), *command]), file=sys.stderr, flush=True)
    log = folder / "log.jsonl"
    written = _written(log)
    code = run_launcher(command, settings)
    entries = read_log(log)  # none in a log that was moved away, half of a last line on a full disk
    return truthful(code, ended=_written(log) != written and bool(entries) and entries[-1]["kind"] == "end")


def run_launcher(command: list[str], settings: dict[str, str]) -> int:
    """Runs the launcher to its end; what asks this process to stop asks the ranks to save and end.

    Launcher and ranks inherit that the signals are blocked. Ranks unblock them once they can save, and take one that
    their launcher holds as their own (`xdscale.training.signals`): none is lost, also before there is a rank.

    Returns:
        Its exit code, or minus the number of the signal that killed it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    launcher = subprocess.Popen(command, env=os.environ | settings)

    def pass_on(number: int, frame: FrameType | None) -> None:
        launcher.send_signal(signal.SIGTERM)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(
                sys.stderr.fileno(), _STOPPING
            )  # print() must not be entered twice, as by a signal while it prints

    # What is ignored, as SIGHUP under nohup, stays so.
    kept = {number: signal.getsignal(number) for number in _STOP if signal.getsignal(number) != signal.SIG_IGN}
    for number in kept:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)  # also where this process was itself started with them blocked
    try:
        return launcher.wait()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def truthful(code: int, *, ended: bool) -> int:
    """Returns what ranks ended with, from what the launcher did.

    The launcher hands a killed rank on as 256 less the signal's number, and ends with 0 when what it started on this
    machine was itself killed.

    Args:
        code: of the launcher, negative for the signal that killed it.
        ended: whether the run's log says that the ranks came to their end.
    """
    if 0 < code < 128 or (code == 0 and ended):
        return code
    what = "the launcher ended before its ranks" if code == 0 else f"a rank or its launcher was killed ({code})"
    print(f"error: {what}; the same command continues from the newest checkpoint", file=sys.stderr)
    return EXIT_FAULT


def _default(recipe: Recipe, gpus: list[str], known: list[_Gpu]) -> str:
    """Returns the shipped DeepSpeed configuration for a recipe on these GPUs, or on the CPU."""
    if not gpus:
        return _FP32_FOR_CPU
    fitting = shipped_ds_config(recipe)
    without_bf16 = any(gpu.capability < _BF16_FROM for gpu in known)
    return f"{fitting}-fp16" if without_bf16 and fitting != _FP32_FOR_CPU else fitting


def _check_precision(ds_config: str, gpus: list[str], known: list[_Gpu]) -> None:
    """Refuses what the ranks would; what a GPU computes in is asked of the driver alone.

    Raises:
        XdscaleError: bf16 where every GPU is too old for it, fp16 on a CPU that does not compute in it.
    """
    values = read_ds_config(ds_config)
    if not gpus:
        check_precision(ds_config, values)
    elif precision(values) == "bf16" and known and (newest := max(gpu.capability for gpu in known)) < _BF16_FROM:
        raise no_bf16(ds_config, f"GPU of compute capability {newest}")


def _known_to_the_driver() -> list[_Gpu]:
    """Asks NVIDIA's driver; torch would make a context on the first GPU for as long as this process lives."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    query = [program, "--query-gpu=index,uuid,compute_cap", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    rows = [_GPU_LINE.fullmatch(line.strip()) for line in lines]
    return [_Gpu(row[1], row[2], float(row[3] or "inf")) for row in rows if row]


def _devices(gpus: list[str], world_size: int, known: list[_Gpu]) -> tuple[list[str], dict[str, str]]:
    """Returns the launcher's options and environment; a mere number of GPUs would make it forget CUDA_VISIBLE_DEVICES.

    Raises:
        XdscaleError: a GPU is named by an identifier that the driver does not list, such as a part of one (MIG).
    """
    if not gpus:
        return ["--num_accelerators", str(world_size)], {"DS_ACCELERATOR": "cpu"}
    if all(gpu.isdigit() for gpu in gpus):
        return ["--include", f"localhost:{','.join(gpus)}"], {}
    # The launcher takes numbers only.
    numbers = [next((entry.number for entry in known if entry.uuid.startswith(gpu)), None) for gpu in gpus]
    if None in numbers:
        raise XdscaleError(
            f"CUDA_VISIBLE_DEVICES={','.join(gpus)}: the deepspeed launcher takes whole GPUs only, and nvidia-smi "
            f"lists no {gpus[numbers.index(None)]}; name GPUs as 'nvidia-smi -L' does, or start one rank without the "
            "launcher: python -m xdscale.train RECIPE --deepspeed_config NAME"
        )
    return ["--include", f"localhost:{','.join(numbers)}"], {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _written(log: Path) -> int:
    return log.stat().st_mtime_ns if log.exists() else 0
