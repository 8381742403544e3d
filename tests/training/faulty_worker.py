"""Runs `xdscale.train` with one rank that has a fault from some step on; run by test_watchdog and test_continuing.

It gets no data (`blocked`, `failing`); or it is asked to stop (`stopped`), and then cannot write files of more than
1,000 bytes (`full`).
"""

import os
import resource
import signal
import sys
import time

from xdscale import train


def main():
    # The launcher puts an argument of its own first.
    local_rank = [sys.argv.pop(1)] if sys.argv[1].startswith("--local_rank") else []
    fault, *arguments = sys.argv[1:]
    kind, rank, step = fault.split(",")
    from xdscale.data.collate import XDBERTCollator
    from xdscale.training.loop import Trainer

    collate, make_step = XDBERTCollator.__call__, Trainer._step
    calls = []

    def starve(self, slots):
        calls.append(self.split.split == "train")
        if os.environ["RANK"] == rank and sum(calls) > int(step):
            if kind == "blocked":
                time.sleep(1000)
            raise OSError(5, "Input/output error", "train-000000.tar")
        return collate(self, slots)

    def stop(self, number):
        if os.environ["RANK"] == rank and number == int(step):
            if kind == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            os.kill(os.getpid(), signal.SIGTERM)
        return make_step(self, number)

    if kind in ("stopped", "full"):
        Trainer._step = stop
    else:
        XDBERTCollator.__call__ = starve
    return train.main([*arguments, *local_rank])


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
