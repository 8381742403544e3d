"""A process of a sweep: works through finetuning runs on its device, one after the other.

It reads one JSON object per line from stdin and answers each with one on stdout; importing torch and DeepSpeed takes
longer than finetuning a small encoder, so it is done once. What a run says goes to the log file that its job names.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xdscale import adapt
from xdscale.ds_config import check_sections, resolve_ds_config
from xdscale.errors import EXIT_FAULT, EXIT_STOPPED, XdscaleError
from xdscale.training.signals import StopRequest


def main() -> None:
    """Answers until stdin ends or a signal comes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with StopRequest() as stop:
        adapt.calm_environment()
        from xdscale.training.distributed import start_distributed

        ranks = start_distributed()
        from xdscale.finetune import run  # noqa: F401 - imported while the sweep still checks the model

        print("{}", file=answers, flush=True)
        for line in iter(sys.stdin.readline, ""):

            def say(note: str) -> None:
                print(json.dumps({"note": note}), file=answers, flush=True)

            code = EXIT_STOPPED if stop.requested else _work(json.loads(line), ranks, stop, say)
            print(json.dumps({"code": code}), file=answers, flush=True)
            if code == EXIT_STOPPED:
                break
        answers.flush()
    # DeepSpeed's and gloo's threads have nothing left to say.
    os._exit(0)


def _work(job: dict[str, Any], ranks: Any, stop: StopRequest, say: Callable[[str], None]) -> int:
    from xdscale.finetune.recipe import FinetuneRecipe
    from xdscale.finetune.run import finetune

    recipe = FinetuneRecipe.model_validate(job["recipe"])
    with Path(job["log"]).open("ab", buffering=0) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        check_sections(job["ds_config_name"], job["ds_config"])
        ds_config = resolve_ds_config(job["ds_config_name"], job["ds_config"], recipe, ranks.world_size)
        return finetune(recipe, ds_config, job["label"], ranks, stop, say)
    except XdscaleError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_FAULT
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()


if __name__ == "__main__":
    main()
