"""Starts ranks by forking a process that has imported everything already.

Importing torch, DeepSpeed and transformers takes ten seconds of a core, twice that for two ranks, and the deepspeed
launcher imports them twice more: longer than most tests train. So it is with the `xdscale` command and with the workers
of its sweeps. Run by launching.py: each line that it reads is a JSON object, a launch; it answers with the process that
leads it and, when that has ended, its exit code. Tests whose subject is a start use real ones.

The deepspeed launcher's own code runs here too: its processes, their parents, groups, signals and what others see of
their command lines are as they are when it is started as a program.

What it reads of the encoder that most runs begin with, it knows too.

Two figures of speed take a second of each start, and no run here is about them: the rate of matrix products is measured
for a moment only, and the FLOPs of a micro-batch are those of the first one, in proportion; of several runs of a model
in one process, those of the first run. Ranks that are started here trace no micro-batch; those of commands do.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import logging
import math
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

MODULES = [
    "deepspeed",
    "deepspeed.checkpoint.ds_to_universal",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.utils.tensorboard",
    "xdscale.cli",
    "xdscale.export",
    "xdscale.finetune.command",
    "xdscale.finetune.run",
    *(f"xdscale.systems.{name}" for name in ("visualbert", "vlbert", "xdbert")),
    "xdscale.training.session",
    # What a rank would import on its way, as an engine, a trace, TensorBoard or a task's metrics need it.
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "PIL.PngImagePlugin",
    "scipy.stats",
    "sklearn.metrics",
    "tensorboard.plugins.hparams.metadata",
    *(f"xdscale.kernels.{name}_triton" for name in ("activated_linear", "attention", "masked_token_loss")),
    *(f"xdscale.kernels.{name}" for name in ("attention_launch", "quick_gelu_triton", "residual_norm_triton")),
]
COMMANDS = {"xdscale": "xdscale.cli", "deepspeed": "deepspeed.launcher.runner"}
"""Programs that start their own processes, in place of ranks that are started here."""


def main():
    from xdscale.training.environment import calm_environment

    calm_environment()
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # a thread that Arrow starts when it is imported
    for name in MODULES:
        importlib.import_module(name)
    from xdscale.training import throughput, tracing

    get_ready("package:cognition/model")
    throughput._SECONDS, tracing._TOLERANCE = 0.01, math.inf
    trace, traced = tracing.trace, {}

    def trace_once(module, arrays, objectives):
        key = (len(next(iter(arrays.values()))), *(parameter.shape for parameter in module.parameters()))
        if key not in traced:
            traced[key] = trace(module, arrays, objectives)
        return traced[key]

    tracing.trace = trace_once
    warnings.filterwarnings("ignore", message=".* found in sys.modules after import", category=RuntimeWarning)
    os.fsync = lambda descriptor: None  # as in the tests' own process: see conftest.py
    gc.freeze()  # half a million objects of imported modules, which each child would look through, and copy by that
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


def get_ready(name):
    """Does what each process would do when it first reads an encoder: that of nearly all runs here."""
    from xdscale.pretrained.language import load_language_encoder, own_tokenizer
    from xdscale.recipes.mlm.schema import Language

    own_tokenizer(name)  # whose fingerprint is remembered
    load_language_encoder(Language(name=name), dropout=0.0)  # transformers compiles its table of renamed weights


def lead(program, arguments, ranks, port, outputs, folder, packages, blocked):
    """Runs a command, or forks ranks in the environment that the launcher would give them and ends all when one fails.

    Args:
        program: one of COMMANDS; or a module or script that each rank runs.
        arguments: of the program.
        ranks: how many.
        port: where they meet.
        outputs: files that take what is printed and what is told as an error.
        folder: that is worked in.
        packages: folders whose packages are found first.
        blocked: numbers of signals that the program is started with blocked.
    """
    os.chdir(folder)
    for site in packages:
        sys.path.insert(0, site)
        os.environ["PYTHONPATH"] = site
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    subprocess.Popen = ForkedPython
    if program in COMMANDS:
        show([sys.executable, str(Path(sys.executable).with_name(program)), *arguments])
        work(COMMANDS[program], arguments)
    from xdscale.training import tracing

    tracing.trace = lambda module, arrays, objectives: tracing.Trace(1, 0, 0)
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
    """Does what `python PROGRAM ARGUMENTS` or `python -m PROGRAM ARGUMENTS` would."""
    code = 1
    try:
        sys.argv = [program, *arguments]
        run = runpy.run_path if program.endswith(".py") else functools.partial(runpy.run_module, alter_sys=True)
        run(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class ForkedPython(subprocess.Popen):
    """In place of `subprocess.Popen`: forks what runs a module or script of this Python; the rest starts as ever."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
        command = [args] if isinstance(args, str) else list(map(os.fspath, args))
        program, arguments = run_by(command)
        if program is None:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)
            return
        _, _, _, *ends, _, _, _, _, _, new_session, _ = more
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if new_session:
                os.setsid()
            inherit(env, (ends[0], ends[3], ends[5]), pass_fds)  # the reading end of stdin, the writing ones
            show(command)
            work(program, arguments)
        self._child_created = True
        self._close_pipe_fds(*ends)


def run_by(command):
    """Returns the module or script that a command runs in this Python, and its arguments; None if it is another."""
    name, *words = command
    if Path(name).name == "deepspeed":
        return COMMANDS["deepspeed"], words
    if name == sys.executable:
        words = words[words[0] == "-u" :]
        words = words[words[0] == "-m" :]
        if words[0].endswith(".py") or words[0].startswith(("xdscale.", "deepspeed.")):
            return words[0], words[1:]
    return None, []


def inherit(environment, ends, pass_fds):
    """Leaves a forked process what an executed one would have: no open file, no handler, no variable but those."""
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    for number, end in enumerate(ends):
        if end != -1:
            os.dup2(end, number)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number != nothing and number not in pass_fds:
            with contextlib.suppress(OSError):  # the folder itself, which is closed again
                os.fstat(number)
                os.dup2(
                    nothing, number, inheritable=False
                )  # not closed: an object that has it would close another file in its place
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    from deepspeed.utils import logger

    for one in (logger, *logger.handlers):  # which the launcher made quiet for itself
        one.setLevel(logging.WARNING)


def show(command):
    """Makes the command line that others see this one: xdscale looks for launchers among its parents' ones."""
    fields = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    start, end = int(fields[45]), int(fields[46])
    words = b"\0".join(map(os.fsencode, command))[: end - start - 1]
    ctypes.memmove(start, words.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    main()
