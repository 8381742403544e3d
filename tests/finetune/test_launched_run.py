"""One finetuning run, started as any other training, on two ranks under ZeRO-3."""

import json

import numpy as np
import pytest

from xdscale.finetune.recipe import FinetuneRecipe
from xdscale.replay import replay
from xdscale.training.run_folder import read_log


@pytest.fixture(scope="module")
def launched(adapt, cassette_model, tmp_path_factory):
    """Eight steps at a rate that spoils what the first ones learn; the best weights are not the last."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "data" / "SST-2").mkdir(parents=True)
    for split, count in (("train", 16), ("dev", 9)):
        rows = [f"It was {('bad', 'good')[n % 2]} number {n}.\t{n % 2}\n" for n in range(count)]
        (folder / "data" / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    recipe = FinetuneRecipe(
        model={"name": str(cassette_model), "subject": "language", "size": "base", "weights_sha256": None},
        task={"name": "sst2", "epochs": 4},
        data={"folder": str(folder / "data")},
        optim={"learning_rate": 0.02, "warmup_ratio": 0.5},
        training={"steps": 8, "global_batch": 8, "best": "loss/task"},
        run={"label": "m", "eval_every": 1},
        output={"folder": str(folder / "run")},
    )
    (folder / "one.yaml").write_text(recipe.to_yaml())
    zero = {"stage": 3, "stage3_param_persistence_threshold": 200}
    (folder / "zero3.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}))
    done = adapt(folder / "one.yaml", "--deepspeed_config", folder / "zero3.json", ranks=2)
    assert done.code == 0, done.stderr[-3000:]
    return folder / "run"


def test_predictions_are_those_of_the_best_weights(launched):
    losses = {
        e["step"]: e["validation/loss/task"] for e in read_log(launched / "log.jsonl") if e["kind"] == "validation"
    }
    del losses[0]
    best = min(losses, key=losses.get)
    assert losses[8] > 1.1 * losses[best]
    lines = [json.loads(line) for line in (launched / "predictions-dev.jsonl").read_text().splitlines()]
    scores = np.array([line["scores"] for line in lines])
    of_label = scores[np.arange(len(lines)), [line["label"] for line in lines]]
    assert np.mean(np.log(np.exp(scores).sum(1)) - of_label) == pytest.approx(losses[best], rel=1e-4)


def test_a_step_of_it_is_replayed(launched, capsys):
    found = replay(launched, 1)
    assert len(found) == 8
    first = next(entry for entry in read_log(launched / "log.jsonl") if entry["kind"] == "step")
    assert np.mean([sample.losses["task"] for sample in found]) == pytest.approx(first["loss/task"], rel=0.3)
    assert "weights of the start" in capsys.readouterr().out
