"""Tasks whose label is a number: what is read, and what counts as right."""

import pytest
import torch

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
