"""Whole runs of a system, under every ZeRO stage."""

import json
from pathlib import Path

import pytest

SEVERAL = Path(__file__).parents[1] / "training" / "several_runs.py"


@pytest.fixture(scope="module")
def run_by_stage(launch_ranks, tmp_path_factory):
    """Returns a function (recipe, settings, ranks of each start, micro-batch) -> run folders, all by ZeRO stage.

    A run with another start to come stops after 2 steps. Starts of different runs on as many ranks share a launch.
    """

    def of(recipe, settings, starts, micro_batches):
        folder = tmp_path_factory.mktemp("runs")
        left = {stage: list(worlds) for stage, worlds in starts.items()}
        while left:
            ranks = next(iter(left.values()))[0]
            named = {}
            for stage in [stage for stage, worlds in left.items() if worlds[0] == ranks]:
                config = folder / f"zero{stage}.json"
                values = {"train_micro_batch_size_per_gpu": micro_batches[stage], "zero_optimization": {"stage": stage}}
                config.write_text(json.dumps(values))
                left[stage].pop(0)
                stop = ["run.stop_at_step=2"] if left[stage] else []
                out = [f"output.folder={folder / str(stage)}", "--deepspeed_config", str(config)]
                named[str(stage)] = [recipe, *settings, *stop, *out]
            left = {stage: worlds for stage, worlds in left.items() if worlds}
            done = launch_ranks(SEVERAL, json.dumps(named), ranks=ranks)
            assert done.code == 0, done.stderr[-3000:]
        return {stage: folder / str(stage) for stage in starts}

    return of
