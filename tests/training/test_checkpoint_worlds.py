"""Real DeepSpeed engines: what a checkpoint records of them, and that it comes back at another number of ranks."""

import copy
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.training.checkpoint import _load
from xdscale.training.consolidate import consolidated_state
from xdscale.training.engine_state import unordered_sum, weighted_sum
from xdscale.training.integrity import damage, file_names
from xdscale.training.resharding import reshard_ahead

WORKER = Path(__file__).with_name("checkpoint_worker.py")
BUFFERS = {"2.statistics"}
FIXED = {"1.frozen", "1.few"} | BUFFERS


@pytest.fixture(scope="module")
def train(launch_ranks):
    """Runs the worker, and returns what it says of each engine and the tensors it held."""

    def train(folder, out, *options, ranks):
        done = launch_ranks(WORKER, "--folder", folder, "--out", out, *options, ranks=ranks)
        assert done.code == 0, done.stderr[-3000:]
        return json.loads(out.read_text()), torch.load(f"{out}.pt", weights_only=True)

    return train


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, train):
    """Eight engines trained for three steps by two ranks, saved, and trained for one more."""
    folder = tmp_path_factory.mktemp("worlds")
    return folder, train(folder, folder / "two.json", ranks=2)


def record(folder, case):
    return json.loads((folder / case / "step-00000003" / "position.json").read_text())["engine"]


def sum_in_plain_integers(name, values):
    """The definition of `weighted_sum` for tensors below 2^20 elements, element by element in Python's integers."""
    table = [int(raw) | 1 for raw in np.random.PCG64(0).random_raw(values.numel())]
    odd = int.from_bytes(hashlib.sha256(f"{name}/0".encode()).digest()[:8], "big") | 1
    signed = values.reshape(-1).view({2: torch.int16, 4: torch.int32}[values.element_size()]).tolist()
    return sum(bits * weight for bits, weight in zip(signed, table)) * odd


def require_continued(case, expected, tensors, ranks):
    """Loading was exact in every case; the next step is comparable where the mean over the ranks is too."""
    for name, value in expected[f"{case} after"].items():
        found, saved = tensors[f"{case} after"][name], expected[f"{case} saved"][name]
        if name in FIXED:  # although the engine was built with others
            assert torch.equal(found, saved)
        else:
            assert not torch.equal(value, saved)
            if ranks == 1 or "fp32" in case:
                torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", ["0-fp32", "0-bf16", "1-fp32", "1-bf16", "2-fp32", "2-bf16", "3-fp32", "3-bf16"])
def test_the_record_is_that_of_the_whole_parameters_under_every_stage(two_ranks, case):
    folder, (_, tensors) = two_ranks
    found = record(folder, case)
    sums = {name: sum_in_plain_integers(name, values) for name, values in tensors[f"{case} saved"].items()}
    assert sums.keys() > FIXED
    buffers = sum(sums[name] for name in BUFFERS)
    assert found["parameters"] == f"{(sum(sums.values()) - buffers) % 2**64:016x}"
    assert found["buffers"] == f"{buffers % 2**64:016x}"
    assert (found["optimizer_step"], found["learning_rate"]) == (3, 0.03)


@pytest.mark.parametrize("case", ["0-fp32", "0-bf16", "1-fp32", "1-bf16", "2-fp32", "2-bf16", "3-fp32", "3-bf16"])
def test_weights_of_all_ranks_are_put_together_under_every_stage(two_ranks, case):
    """As an export does, in fp32 where such masters are kept; sizes are odd, and some parameters are frozen."""
    folder, (_, tensors) = two_ranks
    found = consolidated_state(folder / case / "step-00000003")
    for name, value in tensors[f"{case} saved"].items():
        assert torch.equal(found[name].to(value.dtype), value)
        assert found[name].dtype == torch.float32, name
    assert torch.equal(found["0.weight"].bfloat16().float(), found["0.weight"]) == (case == "0-bf16")


def test_the_optimizers_checksum_does_not_depend_on_who_holds_what(two_ranks):
    """Stages 1 and 2 compute the same update in fp32, bit for bit, each rank holding a part of its state."""
    folder, (_, tensors) = two_ranks
    for name, value in tensors["1-fp32 saved"].items():
        assert torch.equal(tensors["2-fp32 saved"][name], value)
    assert record(folder, "1-fp32")["optimizer"] == record(folder, "2-fp32")["optimizer"]


@pytest.mark.proof
@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_ranks_continues_as_two_would_have(two_ranks, train, tmp_path, ranks):
    """Loading compares parameters, Adam's state, step and learning rate; the next step shows that they are in use."""
    folder, (_, expected) = two_ranks
    results, tensors = train(folder, tmp_path / "out.json", "--load", ranks=ranks)
    assert set(results) == {"1-bf16", "2-fp32", "3-fp32", "3-bf16"}
    for case, result in results.items():
        assert result == {"converted": "universal", "left": ["latest", "step-00000003"]}
        require_continued(case, expected, tensors, ranks)


@pytest.fixture(scope="module")
def not_updated(tmp_path_factory, train):
    """The same engines saved before their first step; which loading leaves as they are."""
    folder = tmp_path_factory.mktemp("unstarted")
    return folder, train(folder, folder / "two.json", "--steps", "0", ranks=2)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_before_the_first_update_loads_at_another_number_of_ranks(not_updated, train, tmp_path, ranks):
    """Under stage 3 AdamW has no state then; the first update after loading must be that of a run never stopped."""
    folder, (_, expected) = not_updated
    results, tensors = train(folder, tmp_path / "out.json", "--steps", "0", "--load", ranks=ranks)
    for case, result in results.items():
        assert result == {"converted": "universal", "left": ["latest", "step-00000000"]}
        require_continued(case, expected, tensors, ranks)


GROUPS = {"rate_factors": {"first": 3.0}, "decayed": "weights", "weight_decay": 0.1, "ema_decay": 0.7}
OPTIMIZERS = [GROUPS | {"optimizer": "sgd", "momentum": 0.8}, GROUPS | {"bias_correction": False}]


def by_torch(optim, steps):
    """The worker's module in fp64, with groups and moving average written out, without DeepSpeed."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Linear(11, 13), torch.nn.Linear(13, 3)).double()
    groups = [
        {"params": [getattr(layer, name)], "factor": factor, "decay": decay}
        for layer, factor in zip(module, (3, 1, 1))
        for name, decay in (("weight", 0.1), ("bias", 0.0))
    ]
    moments = {parameter: [0.0, 0.0] for parameter in module.parameters()}
    average = copy.deepcopy(module.state_dict())
    for step in range(steps):
        torch.manual_seed(step)
        module.zero_grad()
        module(torch.randn(4, 7).double()).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in groups:
            parameter, rate = group["params"][0], 1e-2 * (step + 1) * group["factor"]
            gradient, (m, v) = parameter.grad, moments[parameter]
            if "momentum" in optim:
                m = 0.8 * m + gradient + group["decay"] * parameter.data
                parameter.data -= rate * m
            else:
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
                parameter.data -= rate * (m / (v.sqrt() + 1e-6) + group["decay"] * parameter.data)
            moments[parameter] = [m, v]
        average = {name: 0.7 * average[name] + 0.3 * value for name, value in module.state_dict().items()}
    return {"after": module.state_dict(), "average": average}


@pytest.mark.parametrize(("optim", "stages"), zip(OPTIMIZERS, ("1-bf16", "2-fp32")), ids=["sgd", "adamw"])
def test_optimizers_with_groups_go_on_at_another_number_of_ranks(train, tmp_path, optim, stages):
    """Rates by part and decay of weights alone: before and after loading, as the reference in fp64.

    One conversion was made ahead of time: it is taken, and stays.
    """
    cases = [stages, "3-fp32"]
    options = ("--optim", json.dumps(optim), "--cases", *cases, "0-fp32")
    _, two = train(tmp_path, tmp_path / "two.json", *options, ranks=2)
    ahead = reshard_ahead(tmp_path / stages / "step-00000003")
    results, one = train(tmp_path, tmp_path / "one.json", "--load", *options, ranks=1)
    left = ["latest", "step-00000003"]
    assert results == {
        stages: {"converted": ahead.name, "left": [*left, ahead.name]},
        "3-fp32": {"converted": "universal", "left": left},
    }
    assert damage(ahead) == []
    expected = by_torch(optim, 4)
    for case, tensors in (("0-fp32", two), *((case, found) for case in cases for found in (two, one))):
        exact = {"rtol": 1e-4, "atol": 1e-6} if "fp32" in case else {"rtol": 0.02, "atol": 0.005}
        for kind, name in itertools.product(expected, expected["after"]):
            found = tensors[f"{case} {kind}"][name].double()
            torch.testing.assert_close(found, expected[kind][name], **exact)


def test_all_of_a_loaded_optimizers_state_lies_on_its_parameters_device():
    """The meta device stands for a GPU: DeepSpeed's universal load leaves steps, shared ones, on the CPU."""
    parameters = [torch.nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)]

    class Engine:
        optimizer = torch.optim.AdamW(parameters)

        def load_checkpoint(self, folder, tag):
            step = torch.tensor(5.0)
            for parameter in parameters:
                moments = {name: torch.zeros(3) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": step, **moments}
            return folder, {}

    engine = Engine()
    _load(engine, Path("folder/tag"))
    states = list(engine.optimizer.state.values())
    assert [state.keys() for state in states] == [{"step", "exp_avg", "exp_avg_sq"}] * 2
    assert {value.device.type for state in states for value in state.values()} == {"meta"}
    assert states[0]["step"] is not states[1]["step"]


def test_nothing_but_four_classes_needs_more_than_the_restricted_unpickler(two_ranks):
    """What a checkpoint may name beyond tensors and containers, over all stages and precisions."""
    folder, _ = two_ranks
    allowed = {
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
    }
    files = [folder / name for name in file_names(folder) if name.endswith("_states.pt")]
    assert len(files) > 16
    found = {name for path in files for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)}
    assert found - {"builtins.getattr"} == allowed  # it stands in what Python 3.11.0 to 3.11.3 write of enumerations


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=200),
    cut=st.integers(0, 200),
    dtype=st.sampled_from([0, 1]),
)
def test_checksums_of_parts_add_up_and_one_changed_bit_shows(values, cut, dtype):
    whole = torch.tensor(values, dtype=[torch.float32, torch.bfloat16][dtype])
    parts = [weighted_sum(whole[:cut], "w", 0), weighted_sum(whole[cut:], "w", min(cut, len(whole)))]
    assert int(weighted_sum(whole, "w", 0)) == int(parts[0] + parts[1])
    assert int(unordered_sum(whole)) == int(unordered_sum(whole[:cut]) + unordered_sum(whole[cut:]))
    bits = whole.view([torch.int32, torch.int16][dtype]).clone()
    bits[cut % len(bits)] ^= 1
    assert int(weighted_sum(bits.view(whole.dtype), "w", 0)) != int(weighted_sum(whole, "w", 0))
    assert int(unordered_sum(bits.view(whole.dtype))) != int(unordered_sum(whole))
    padded = torch.cat([whole, torch.zeros(7, dtype=whole.dtype)])
    assert int(weighted_sum(padded, "w", 0)) == int(weighted_sum(whole, "w", 0))


def test_exchanged_shifted_and_long_tensors_have_other_checksums():
    values = torch.randn(2**20 + 5)
    true = int(weighted_sum(values, "a", 0))
    assert int(weighted_sum(values, "b", 0)) != true
    assert int(weighted_sum(values.roll(1), "a", 0)) != true
    assert int(weighted_sum(values[[1, 0, *range(2, len(values))]], "a", 0)) != true
    cut = 2**20 - 3
    assert int(weighted_sum(values[:cut], "a", 0) + weighted_sum(values[cut:], "a", cut)) == true
    # Position 0 and position 2^20 share an entry of the table, not a weight.
    assert int(weighted_sum(values[[2**20, *range(1, 2**20), 0, *range(2**20 + 1, 2**20 + 5)]], "a", 0)) != true
