"""Starts ranks by forking a process that has imported everything already.

Importing torch, DeepSpeed and transformers takes ten seconds of a core, twice that for two ranks, and the deepspeed
launcher imports them twice more: longer than most tests train. So it is with the `xdscale` command and with the workers
of its sweeps. Run by conftest: each line that it reads is a JSON object, a launch; it answers with the process that
leads it and, when all ranks are gone, their exit code. Tests whose subject is the launcher or a start use these.

Two figures of speed take a second of each start, and no run here is about them: the rate of matrix products is measured
for a moment only, and the FLOPs of a micro-batch are those of the first one, in proportion.
"""

import importlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback

MODULES = [
    "deepspeed",
    "torch.utils.tensorboard",
    "xdscale.cli",
    "xdscale.export",
    "xdscale.finetune.command",
    "xdscale.finetune.run",
    *(f"xdscale.systems.{name}" for name in ("visualbert", "vlbert", "xdbert")),
    "xdscale.training.session",
]


def main():
    from xdscale.training.environment import calm_environment

    calm_environment()
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # a thread that Arrow starts when it is imported
    for name in MODULES:
        importlib.import_module(name)
    from xdscale.training import throughput, tracing

    throughput._SECONDS, tracing._TOLERANCE = 0.01, math.inf
    # What a thread holds at the time of a fork stays locked in the child for ever.
    assert os.listdir("/proc/self/task") == [str(os.getpid())]
    for line in sys.stdin:
        leader = os.fork()
        if leader == 0:
            os.setsid()
            lead(**json.loads(line))
        print(leader, flush=True)
        _, status = os.waitpid(leader, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def lead(program, arguments, ranks, port, outputs, folder, packages):
    """Forks the ranks, in the environment that the launcher would give them, and ends all when one fails."""
    os.chdir(folder)
    for site in packages:
        sys.path.insert(0, site)
        os.environ["PYTHONPATH"] = site
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    left = set()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            work(program, arguments)
        left.add(pid)
    code = 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in left:
                os.kill(other, signal.SIGKILL)
    os._exit(code & 255)


def work(program, arguments):
    """Does what `python PROGRAM ARGUMENTS` or `python -m xdscale.… ARGUMENTS` would."""
    code = 1
    try:
        sys.argv = [program, *arguments]
        if program == "xdscale.cli":
            from xdscale.finetune import worker_process

            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                del os.environ[name]
            worker_process.subprocess = ForkedWorkers
        if program.startswith("xdscale."):
            code = importlib.import_module(program).main() or 0
        else:
            runpy.run_path(program, run_name="__main__")
            code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class ForkedWorkers:
    """What a sweep uses of `subprocess`; a worker is forked from the sweep's process."""

    DEVNULL, STDOUT, TimeoutExpired = subprocess.DEVNULL, subprocess.STDOUT, subprocess.TimeoutExpired

    class Popen:
        """A worker's process."""

        def __init__(self, command, *, stdin, stdout, stderr, pass_fds, env, start_new_session):
            self.returncode = None
            self.pid = os.fork()
            if self.pid == 0:
                os.setsid()
                os.environ |= env
                os.dup2(stdout.fileno(), 1)
                os.dup2(1, 2)
                (channel,) = pass_fds
                os.closerange(3, channel)
                os.closerange(channel + 1, 1 << 16)
                work("xdscale.finetune.worker", [str(channel)])

        def poll(self):
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

        def wait(self, timeout=math.inf):
            deadline = time.monotonic() + timeout
            while self.poll() is None:
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired("worker", timeout)
                time.sleep(0.05)
            return self.returncode

        def terminate(self):
            os.kill(self.pid, signal.SIGTERM)


if __name__ == "__main__":
    main()
