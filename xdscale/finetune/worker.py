"""A process of a sweep: works through finetuning runs on its device, one after the other.

It gets one JSON object per line on the channel that its argument numbers, and answers there with `begun`, any number of
`note`s and the run's `code`; importing torch and DeepSpeed takes longer than finetuning a small encoder, so it is done
once. What a run prints, on whatever way, goes to the log file that its job names.
"""

import gc
import json
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from xdscale.ds_config import resolve_ds_config
from xdscale.errors import EXIT_FAULT, EXIT_STOPPED, XdscaleError
from xdscale.training.environment import calm_environment, check_precision
from xdscale.training.signals import StopRequest


def main() -> None:
    """Answers until the channel ends or a signal comes."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)  # what a run starts is not to talk here, or to keep it open
    jobs, answers = channel.makefile("r", encoding="utf-8"), channel.makefile("w", encoding="utf-8")

    def answer(**values: Any) -> None:
        with suppress(BrokenPipeError):  # of a sweep that was killed
            print(json.dumps(values), file=answers, flush=True)

    with StopRequest() as stop:
        stop.follow(os.getppid())  # a sweep that was killed tells nobody; its run is not to stand in the next one's way
        calm_environment()
        from xdscale.training.distributed import start_distributed

        ranks = start_distributed()
        from xdscale.finetune import run  # noqa: F401 - imported while the sweep still checks the model

        for line in iter(jobs.readline, ""):
            if stop.requested:
                answer(code=EXIT_STOPPED)
                break
            answer(begun=True)
            code = _work(json.loads(line), ranks, stop, lambda note: answer(note=note))
            answer(code=code)
            if code == EXIT_STOPPED:
                break
    # DeepSpeed's and gloo's threads have nothing left to say.
    os._exit(0)


def _work(job: dict[str, Any], ranks: Any, stop: StopRequest, say: Callable[[str], None]) -> int:
    from xdscale.finetune.recipe import FinetuneRecipe
    from xdscale.finetune.run import FinetuneSystem
    from xdscale.training.session import train_run

    recipe = FinetuneRecipe.model_validate(job["recipe"])
    try:
        with Path(job["log"]).open("ab", buffering=0) as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        ds_config = resolve_ds_config(job["ds_config_name"], job["ds_config"], recipe, ranks.world_size)
        check_precision(job["ds_config_name"], ds_config)
        return train_run(FinetuneSystem(recipe), ds_config, ranks, stop, say)
    except (XdscaleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_FAULT
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()


if __name__ == "__main__":
    main()
