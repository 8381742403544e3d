"""Runs `xdscale.train` several times in one launch: importing torch and DeepSpeed takes longer than a short run.

On one rank or several. The argument is JSON: {name of run: its arguments}. A line with the name begins what it prints.
"""

import json
import os
import sys

from xdscale import train


def main():
    for name, arguments in json.loads(sys.argv[-1]).items():
        if os.environ.get("RANK", "0") == "0":
            for stream in (sys.stdout, sys.stderr):
                print(f"== {name}", file=stream, flush=True)
        code = train.main(arguments)
        if code:
            return code
    if os.environ.get("RANK", "0") == "0":
        print(
            "== the compiler",
            "loaded" if "torch._inductor.compile_fx" in sys.modules else "left out",
            sep="\n",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
