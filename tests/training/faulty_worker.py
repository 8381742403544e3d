"""Runs `xdscale.adapt` with one rank that gets no data from some step on; run by test_watchdog."""

import os
import sys
import time

from xdscale import adapt


def main():
    local_rank, fault, *arguments = sys.argv[1:]  # the launcher puts its argument first
    kind, rank, step = fault.split(",")
    from xdscale.data.collate import XDBERTCollator

    collate = XDBERTCollator.__call__
    calls = []

    def starve(self, slots):
        calls.append(self.split.split == "train")
        if os.environ["RANK"] == rank and sum(calls) > int(step):
            if kind == "blocked":
                time.sleep(1000)
            raise OSError(5, "Input/output error", "train-000000.tar")
        return collate(self, slots)

    XDBERTCollator.__call__ = starve
    return adapt.main([*arguments, local_rank])


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
