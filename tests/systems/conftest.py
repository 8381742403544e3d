"""Whole runs of a system, under every ZeRO stage."""

import json

import pytest


@pytest.fixture(scope="module")
def run_by_stage(adapt, tmp_path_factory):
    """Returns a function (recipe, settings, ranks of each start, micro-batch) -> run folders, all by ZeRO stage.

    A run with another start to come stops after 2 steps.
    """

    def of(recipe, settings, starts, micro_batches):
        folder = tmp_path_factory.mktemp("runs")
        for stage, worlds in starts.items():
            config = folder / f"zero{stage}.json"
            values = {"train_micro_batch_size_per_gpu": micro_batches[stage], "zero_optimization": {"stage": stage}}
            config.write_text(json.dumps(values))
            out = [f"output.folder={folder / str(stage)}", "--deepspeed_config", str(config)]
            for number, ranks in enumerate(worlds, 1):
                stop = ["run.stop_at_step=2"] if number < len(worlds) else []
                done = adapt(recipe, *settings, *stop, *out, ranks=ranks)
                assert done.code == 0, done.stderr[-3000:]
        return {stage: folder / str(stage) for stage in starts}

    return of
