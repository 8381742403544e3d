"""Fixtures that launch ranks and commands: forked ready-made, or started as a user starts them."""

import contextlib
import functools
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CPU_RANK = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@dataclass
class Launch:
    """What a finished launch left."""

    code: int
    stdout: str
    stderr: str


class Forked:
    """A launch that goes on, with what tests use of `subprocess.Popen`."""

    def __init__(self, server: subprocess.Popen) -> None:
        self._server = server
        self.pid = int(server.stdout.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns its exit code if it has ended: of the command itself, not of all that it started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end and returns its exit code."""
        if self.returncode is None:
            if not select.select([self._server.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked launch", timeout)
            self.returncode = int(self._server.stdout.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the command alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill_all(self) -> None:
        """Kills whatever is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


@pytest.fixture(scope="session")
def fork() -> Iterator[Callable[..., Forked]]:
    """Starts a script or a module on some ranks, `xdscale` or `deepspeed`, forked ready-made: see fork_server.py.

    One launch at a time: the one before must have ended.
    """
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("fork_server.py"), " " * 4000],  # room for longer command lines
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # what select waits for must not have been read yet
        cwd=ROOT,
        env=os.environ | CPU_RANK | {"OPENBLAS_NUM_THREADS": "1"},
    )

    def fork(
        program: str | Path,
        *arguments: object,
        outputs: Sequence[str | Path],
        ranks: int = 1,
        folder: Path = ROOT,
        packages: Sequence[Path] = (),
        blocked: Sequence[int] = (),
    ) -> Forked:
        request = {"program": str(program), "arguments": list(map(str, arguments)), "ranks": ranks}
        request |= {"port": _free_port(), "outputs": list(map(str, outputs)), "blocked": list(blocked)}
        request |= {"folder": str(folder), "packages": list(map(str, packages))}
        server.stdin.write(json.dumps(request).encode() + b"\n")
        return Forked(server)

    yield fork
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def launch_ranks(fork: Callable[..., Forked], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Launch]:
    """Runs a script, `xdscale.train` on some ranks, or `xdscale`, forked ready-made, to its end."""
    outputs_folder = tmp_path_factory.mktemp("fork_server")
    numbers = itertools.count()

    def launch(program: str | Path, *arguments: str | Path, timeout_seconds: float = 300, **options: object) -> Launch:
        number = next(numbers)
        outputs = [outputs_folder / f"{number}.{name}" for name in ("stdout", "stderr")]
        forked = fork(program, *arguments, outputs=outputs, **options)
        try:
            forked.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not done in {timeout_seconds} seconds:\n{outputs[1].read_text()[-3000:]}")
        finally:  # also when the test's own time is up
            forked.kill_all()
        return Launch(forked.returncode, *(path.read_text() for path in outputs))

    return launch


@pytest.fixture(scope="session")
def adapt(launch_ranks: Callable[..., Launch]) -> Callable[..., Launch]:
    """Runs `xdscale.train` on some ranks."""
    return functools.partial(launch_ranks, "xdscale.train")


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts `xdscale.train` as a user does: in processes of its own, several ranks by the deepspeed launcher."""
    started: list[subprocess.Popen] = []

    def start(*arguments: str, ranks: int = 1) -> subprocess.Popen:
        if ranks == 1:
            command = [sys.executable, "-m", "xdscale.train"]
        else:
            launcher = str(Path(sys.executable).with_name("deepspeed"))
            command = [launcher, "-q", "--num_accelerators", str(ranks), "--master_port", str(_free_port())]
            command += ["--module", "xdscale.train"]
        # A session of its own, so that the whole group can be ended: the launcher orphans its ranks on SIGTERM.
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | CPU_RANK,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def free_port():
    """Returns a function that names a port nobody listens on."""
    return _free_port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def small_run(adapt: Callable[..., Launch], short_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the quickstart's model after two steps on two ranks under ZeRO-2 in fp32."""
    folder = tmp_path_factory.mktemp("small")
    config = folder / "ds.json"
    zero = {"stage": 2, "reduce_bucket_size": 1_000_000}
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}))
    settings = ["training.steps=2", "training.global_batch=4", "run.eval_samples=4", f"data.shards={short_shards}"]
    launch = adapt(
        "quickstart", *settings, f"output.folder={folder / 'run'}", "--deepspeed_config", str(config), ranks=2
    )
    assert launch.code == 0, launch.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def small_export(small_run: Path) -> Path:
    """What `xdscale export` makes of it."""
    from xdscale.export import export_run

    out = small_run.parent / "exported"
    assert "step-00000002: language encoder (" in export_run(small_run, out)
    return out
