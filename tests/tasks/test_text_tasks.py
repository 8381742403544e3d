"""Tasks whose label is a number: what is read, and what counts as right."""

import numpy as np
import pytest
import torch

from xdscale.data.task_files import Example
from xdscale.errors import XdscaleError
from xdscale.tasks.contract import find_task

SIMILARITY = find_task("stsb")


def write(folder, *scores):
    (folder / "STS-B").mkdir(exist_ok=True)
    rows = [f"{n}\ta\tb\t{score}\n" for n, score in enumerate(scores)]
    for name in ("train", "dev"):
        (folder / "STS-B" / f"{name}.tsv").write_text("".join(["index\tsentence1\tsentence2\tscore\n", *rows]))


def test_scores_reach_from_0_to_5(tmp_path):
    write(tmp_path, "0", "5", "2.5")
    assert [example.label for example in SIMILARITY.read(tmp_path).train] == [0.0, 5.0, 2.5]
    for wrong in ("-0.001", "5.001", "nan", "much"):
        write(tmp_path, "0", wrong)
        with pytest.raises(XdscaleError, match=rf"line 3: score = '{wrong}': expected a number from 0 to 5"):
            SIMILARITY.read(tmp_path)


def test_a_number_is_right_within_a_half():
    logits = torch.tensor([[1.5], [2.5], [2.75], [1.25], [2.0]])
    real = torch.tensor([True, True, True, True, False])
    loss, right = SIMILARITY.loss(logits, torch.full((5,), 2.0), real)
    assert (loss.item(), right.item()) == (0.25 * 2 + 0.5625 * 2, 2)


@pytest.mark.parametrize(
    ("task", "name", "values", "text"),
    [
        ("rte", "RTE.tsv", [1.0, 0.0], "index\tprediction\n0\tnot_entailment\n1\tentailment\n"),
        ("stsb", "STS-B.tsv", [1.0, 2.34567891], "index\tprediction\n0\t1.000000\n1\t2.345679\n"),
        ("read", "READ.csv", [-0.5, 2.0], "id,target\na,-0.500000\nb,2.000000\n"),
    ],
)
def test_predictions_as_the_servers_take_them(task, name, values, text):
    examples = [Example(name, (("x", "y"),), None, 2) for name in "ab"]
    assert find_task(task).submission(name, examples, np.array(values)) == text
