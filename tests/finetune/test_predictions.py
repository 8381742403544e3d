"""Predictions that cannot be written are one message, not a traceback."""

import numpy as np
import pytest

from xdscale.errors import XdscaleError
from xdscale.finetune.predictions import Predicted, write_predictions, write_submission
from xdscale.finetune.run import FinetuneSystem
from xdscale.recipe import load_recipe
from xdscale.tasks.contract import find_task

NOTHING = Predicted(np.empty(0), np.empty((0, 2)))


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "predictions").write_text("")
    with pytest.raises(XdscaleError, match=rf"cannot write predictions in {tmp_path}: .*File exists.*make room"):
        write_submission(tmp_path / "predictions" / "RTE.tsv", find_task("rte"), [], NOTHING)
    (tmp_path / "dev.jsonl").mkdir()
    with pytest.raises(XdscaleError, match=rf"cannot write dev.jsonl in {tmp_path}: .*a directory"):
        write_predictions(tmp_path / "dev.jsonl", find_task("rte"), [], NOTHING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev.jsonl", "predictions"]


def test_a_finished_run_that_is_started_again_says_so(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    recipe = load_recipe("quickstart", [f"output.folder={tmp_path}"])
    with pytest.raises(XdscaleError, match=r"result\.json: this run is finished; to run it again, delete its folder"):
        FinetuneSystem(recipe).open(None)
