"""Starts ranks by forking a process that has imported everything already.

Importing torch, DeepSpeed and transformers takes ten seconds of a core, twice that for two ranks, and the deepspeed
launcher imports them twice more: longer than most tests train. Run by conftest: each line that it reads is a JSON
object, a launch; it answers with the process that leads it and, when all ranks are gone, their exit code. Tests whose
subject is the launcher or a start use the launcher.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import traceback


def main():
    from xdscale.training.environment import calm_environment

    calm_environment()
    for name in ("deepspeed", "tensorboard", "xdscale.export", "xdscale.systems.xdbert", "xdscale.training.session"):
        importlib.import_module(name)
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


def lead(program, arguments, ranks, port, outputs):
    """Forks the ranks, in the environment that the launcher would give them, and ends all when one fails."""
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
    """Does what `python PROGRAM ARGUMENTS` or `python -m xdscale.train ARGUMENTS` would."""
    code = 1
    try:
        sys.argv = [program, *arguments]
        if program == "xdscale.train":
            code = importlib.import_module(program).main()
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


if __name__ == "__main__":
    main()
