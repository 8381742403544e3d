"""Steps counted in tokens, by the recipe: the same samples and losses on any number of ranks, also when continued."""

import json

import numpy as np
import pytest

from xdscale.data.order import sample_hash
from xdscale.data.token_order import TokenOrder
from xdscale.errors import XdscaleError
from xdscale.plan.report import machine_from, run_scaling
from xdscale.recipe import load_recipe
from xdscale.shards.table import Table
from xdscale.training.run_folder import read_log

STEPS, TOKENS = 4, 600


@pytest.fixture(scope="module")
def longest(short_shards):
    table = Table(short_shards, "train")
    return table.read("language", np.arange(1)).shape[1] + 2


@pytest.fixture(scope="module")
def runs(adapt, short_shards, narrow_model, longest, tmp_path_factory):
    """A whole run on one rank, and one on two ranks that goes on alone; the log's entries of each."""
    folder = tmp_path_factory.mktemp("tokens")
    model = [value for value in narrow_model if not value.startswith("model.clip")]
    fixed = [*model, "model.dropout=0", f"data.shards={short_shards}", f"training.steps={STEPS}"]
    fixed += ["training.global_batch=null", f"training.batch_tokens={TOKENS}", "run.eval_samples=4"]
    fixed += ["run.eval_every=2", "run.checkpoint_every=2"]

    def train(run, stage, micro_tokens, ranks, *more):
        config = folder / f"{run}-{ranks}.json"
        zero = {"stage": stage, "reduce_bucket_size": 1_000_000}
        config.write_text(json.dumps({"train_micro_batch_size_per_gpu": micro_tokens, "zero_optimization": zero}))
        output = f"output.folder={folder / run}"
        done = adapt("quickstart-mlm", *fixed, *more, output, "--deepspeed_config", config, ranks=ranks)
        assert done.code == 0, done.stderr[-3000:]
        return read_log(folder / run / "log.jsonl")

    whole = train("whole", 1, TOKENS, 1)
    train("split", 3, 2 * longest, 2, "run.stop_at_step=2")
    return whole, train("split", 3, 3 * longest, 1)


def test_samples_are_those_of_the_order_and_losses_hang_on_no_split(runs, short_shards, longest):
    size = len(Table(short_shards, "train"))
    lengths = np.full(size, longest)
    order = TokenOrder(lengths, seed=0, batch_tokens=TOKENS, world_size=1, rank=0, micro_tokens=TOKENS)
    expected = [sample_hash(*order.global_batch_ids(step)) for step in range(STEPS)]
    whole, split = ([entry for entry in log if entry["kind"] == "step"] for log in runs)
    assert [entry["samples"] for entry in whole] == [entry["samples"] for entry in split] == expected
    losses = [[entry["loss/mlm"] for entry in log] for log in (whole, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_log_says_how_a_step_is_split(runs, longest):
    starts = [entry for entry in runs[1] if entry["kind"] == "start"]
    assert [entry["ranks"] for entry in starts] == [2, 1]
    assert {entry["batch_tokens"] for entry in starts} == {TOKENS}
    stretch = TOKENS - longest + 1
    assert [entry["accumulation"] for entry in starts] == [
        -(-stretch // (2 * (longest + 1))), -(-stretch // (2 * longest + 1))
    ]  # fmt: skip


@pytest.mark.parametrize("values", [["training.batch_tokens=9"], ["training.global_batch=null"]])
def test_a_step_is_counted_in_one_way(values):
    with pytest.raises(XdscaleError, match="either in samples, training.global_batch, or in tokens; state one"):
        load_recipe("quickstart", values)


def test_who_counts_samples_refuses_tokens():
    values = ["training.global_batch=null", "training.batch_tokens=900"]
    machine = machine_from("A100-40G", 1, None, None, 0.4, None)
    unset = dict.fromkeys(("sequence_length", "precision", "checkpointing", "chart"))
    with pytest.raises(XdscaleError, match=r"training.batch_tokens = 900: a plan counts samples; give .*_batch=N"):
        run_scaling("quickstart", values, machine, as_json=False, **unset)
