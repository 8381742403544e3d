"""What a checkpoint may be continued with, what is cleared away and by whom it is read again; without an engine."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from xdscale.errors import XdscaleError
from xdscale.training import checkpoint as ckpt
from xdscale.training import checkpoint_folder, engine_state
from xdscale.training.engine_state import unordered_sum, weighted_sum

POSITION = ckpt.CheckpointPosition(
    step=7,
    epoch=0,
    index=3,
    world_size=2,
    zero_stage=1,
    precision="bf16",
    data_fingerprints={"regions": "a" * 64, "text": "d" * 64},
    draws_hash="b" * 64,
    quarantined=[],
)
NOW = {"zero_stage": 1, "precision": "bf16", "data_fingerprints": POSITION.data_fingerprints, "draws_hash": "b" * 64}


@pytest.mark.parametrize(("before", "now"), [(1, 1), (1, 2), (2, 1), (3, 3), (0, 0)])
def test_the_same_run_continues_also_between_stages_1_and_2(tmp_path, before, now):
    ckpt.check_compatible(tmp_path, replace(POSITION, zero_stage=before), **NOW | {"zero_stage": now})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data_fingerprints": {"regions": "c" * 64, "text": "d" * 64}},
            r"was trained on other data: regions \(it was SHA-256 aaaaaaaaaaaa…, now SHA-256 cccccccccccc…\); name the",
        ),
        (
            {"data_fingerprints": {"captions": "a" * 64, "regions": "a" * 64}},
            r"data: captions \(it was not there, now SHA-256 aaaa.*\), text \(it was SHA-256 dddd.*, now not there\);",
        ),
        ({"draws_hash": "c" * 64}, "the next batch, number 7, is not the one that would have followed"),
        ({"zero_stage": 3}, "written under ZeRO stage 1 in bf16, the DeepSpeed config asks for stage 3 in bf16"),
        ({"zero_stage": 0}, "asks for stage 0 in bf16"),
        ({"precision": "fp16"}, "asks for stage 1 in fp16"),
        ({"precision": "fp32"}, "asks for stage 1 in fp32"),
    ],
)
def test_every_difference_that_matters_is_refused(tmp_path, change, message):
    with pytest.raises(XdscaleError, match=message):
        ckpt.check_compatible(tmp_path, POSITION, **NOW | change)


class Ranks:
    """One rank of several that all say the same; `arrive` happens while this one waits for them."""

    def __init__(self, rank=0, world_size=1, arrive=lambda: None):
        self.rank, self.world_size, self.is_first, self.barrier = rank, world_size, rank == 0, arrive

    def gather(self, value):
        return [value] * self.world_size


def test_leftovers_go_when_the_last_rank_has_read_them(tmp_path):
    """A late rank still loads from the conversion when the first one is done."""
    left = [tmp_path / name for name in (".partial-step-00000002", ".universal-step-00000002", ".removed-x")]
    for path in left:
        path.mkdir()
    seen = []
    checkpoint_folder.remove_leftovers(tmp_path, Ranks(0, 2, lambda: seen.extend(path.exists() for path in left)))
    assert seen == [True] * 3
    assert not any(path.exists() for path in left)
    left[0].mkdir()
    checkpoint_folder.remove_leftovers(tmp_path, Ranks(1, 2))
    assert left[0].exists()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_file_is_read_again_by_another_rank_than_hashed_it(tmp_path, monkeypatch, rank):
    for step in (1, 2):
        (tmp_path / checkpoint_folder.checkpoint_name(step)).mkdir()
    parts = []
    monkeypatch.setattr(checkpoint_folder, "damage", lambda folder, part: parts.append(part) or ["altered"])
    checkpoint_folder.prune(
        tmp_path / checkpoint_folder.checkpoint_name(2), checkpoint_folder.Retention(newest=1), Ranks(rank, 3)
    )
    assert parts == [((rank + 1) % 3, 3)]
    assert len(checkpoint_folder.list_checkpoints(tmp_path)) == 2  # nothing goes while the new one is damaged


def test_checksums_in_checkpoints_are_those_of_earlier_versions():
    """Written down on 2026-11-26: a checkpoint saved before must still be accepted."""
    values = torch.arange(-500, 500, dtype=torch.float32) / 7
    assert int(weighted_sum(values, "encoder.weight", 2**20 - 300)) == WEIGHTED
    assert int(weighted_sum(values.bfloat16(), "encoder.weight", 0)) == WEIGHTED_BF16
    assert int(unordered_sum(values)) == UNORDERED
    weights = torch.nn.ParameterList([torch.nn.Parameter(values)])
    state = {"exp_avg": values + 1, "exp_avg_sq": values**2}
    engine = SimpleNamespace(device=values.device, module=weights, optimizer=None)
    optimizer = SimpleNamespace(state={weights[0]: state})
    parts = [int(unordered_sum(part)) for part in (values, *state.values())]
    expected = f"{(parts[0] + 3 * parts[1] + 5 * parts[2]) % 2**64:016x}"
    assert engine_state._moments(engine, optimizer, SimpleNamespace(gather=lambda mine: [mine])) == expected


WEIGHTED = 1618271123851750662
WEIGHTED_BF16 = -321722969367566123
UNORDERED = -4214797532281576536


def test_a_failed_save_says_how_much_room_it_needed(tmp_path):
    """Weights in their own dtype, and 12 bytes more for each that is trained: fp32 weight and both moments."""
    module = torch.nn.Module()
    module.trained = torch.nn.Parameter(torch.empty(2**20, dtype=torch.bfloat16, device="meta"))
    module.frozen = torch.nn.Parameter(torch.empty(3 * 2**20, dtype=torch.bfloat16, device="meta"), requires_grad=False)
    module.elsewhere = torch.nn.Parameter(torch.empty(0))
    module.elsewhere.ds_numel = 2**21  # ZeRO-3 has emptied it
    said = ckpt._cannot_write(SimpleNamespace(module=module), tmp_path / "step-00000001")
    assert f"(about {14 + 6 + 32} MiB are needed, " in said
    assert said.endswith("the run has no older checkpoint)")


def test_retention_keeps_the_newest_and_every_nth_and_ignores_an_abandoned_future(tmp_path):
    steps = [Path(checkpoint_folder.checkpoint_name(step)) for step in (10, 20, 30, 40, 50, 70)]

    def gone(step, **retention):
        return [
            checkpoint_folder.step_of(path) for path in checkpoint_folder.Retention(**retention).outdated(steps, step)
        ]

    assert gone(70, newest=2) == [10, 20, 30, 40]
    assert gone(70, newest=2, every=20) == [10, 30]
    # A run that fell back to 40 and saved 50: what lies ahead of it is damaged and must not push 50 out.
    assert gone(50, newest=1) == [10, 20, 30, 40]
    assert gone(50, newest=5) == []
