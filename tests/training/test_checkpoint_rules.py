"""What a checkpoint may be continued with, what is cleared away and by whom it is read again; without an engine."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from xdscale.errors import XdscaleError
from xdscale.training import checkpoint as ckpt
from xdscale.training import checkpoint_folder, consolidate, engine, engine_state, integrity, resharding
from xdscale.training.engine import buffers_of
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
def test_each_file_is_read_again_by_another_rank_than_hashed_it(tmp_path, monkeypatch, capsys, rank):
    for step in (1, 2):
        (tmp_path / checkpoint_folder.checkpoint_name(step)).mkdir()
    parts = []
    monkeypatch.setattr(checkpoint_folder, "damage", lambda folder, part: parts.append(part) or ["altered"])
    checkpoint_folder.prune(
        tmp_path / checkpoint_folder.checkpoint_name(2), checkpoint_folder.Retention(newest=1), Ranks(rank, 3)
    )
    assert parts == [((rank + 1) % 3, 3)]
    assert len(checkpoint_folder.list_checkpoints(tmp_path)) == 2  # nothing goes while the new one is damaged
    said = "warning: older checkpoints stay, step-00000002 is damaged: altered; altered; altered\n"
    assert capsys.readouterr().err == said * (rank == 0)
    monkeypatch.setattr(checkpoint_folder, "damage", lambda folder, part: [])
    monkeypatch.setattr(checkpoint_folder, "remove", lambda path: (tmp_path / "step-00000001" / "none").rmdir())
    checkpoint_folder.prune(
        tmp_path / checkpoint_folder.checkpoint_name(2), checkpoint_folder.Retention(newest=1), Ranks(rank, 3)
    )
    said = capsys.readouterr().err
    assert said.startswith("warning: cannot delete an old checkpoint: ") if rank == 0 else said == ""


def test_checksums_in_checkpoints_are_those_of_earlier_versions():
    """Written down on 2026-11-26: a checkpoint saved before must still be accepted."""
    values = torch.arange(-500, 500, dtype=torch.float32) / 7
    assert int(weighted_sum(values, "encoder.weight", 2**20 - 300)) == WEIGHTED
    assert int(weighted_sum(values.bfloat16(), "encoder.weight", 0)) == WEIGHTED_BF16
    assert int(unordered_sum(values)) == UNORDERED
    assert len({int(weighted_sum(values, f"layers.{number}", 0)) for number in range(32)}) == 32
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


def test_buffers_of_a_checkpoint_are_those_of_its_module_and_no_tied_weights():
    module = torch.nn.ModuleDict(
        {"norm": torch.nn.BatchNorm1d(2), "a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)}
    )
    module["b"].weight = module["a"].weight
    module.register_buffer("ids", torch.arange(3), persistent=False)
    found = buffers_of(module)
    assert list(found) == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    found["norm.running_mean"] += 1
    assert module["norm"].running_mean.tolist() == [1, 1]


def raise_alone(problem, what):
    if problem is not None:
        raise XdscaleError(f"{what}: rank 0: {problem}")


def test_a_save_that_cannot_even_begin_says_so(monkeypatch):
    """Below /dev/null nothing can be made, and nothing has to be cleared away."""
    monkeypatch.setattr(engine_state, "engine_state", lambda engine, ranks: engine_state.EngineState(
        parameters="", buffers="", optimizer="", optimizer_step=0, learning_rate=0.0))  # fmt: skip
    monkeypatch.setattr(engine_state, "give_moments", lambda engine: None)
    ranks = Ranks()
    ranks.raise_first = raise_alone
    engine = SimpleNamespace(module=torch.nn.Linear(1, 1))
    with pytest.raises(XdscaleError, match="^cannot write checkpoint /dev/null/checkpoints/step-00000007 .*Not a dir"):
        ckpt.save_checkpoint(
            engine, Path("/dev/null/checkpoints"), POSITION, checkpoint_folder.Retention(newest=1), ranks
        )


@pytest.mark.parametrize(
    ("said", "code", "problem"),
    [
        ("a warning\nKeyError: 'x'\n\n", 1, "KeyError: 'x'"),
        ("", 3, "the converter ended with code 3"),
        ("all is well\n", 0, None),
    ],
)
def test_the_converters_last_words_say_why_it_failed(tmp_path, monkeypatch, said, code, problem):
    """It runs on the CPU, as a process of its own and not as a rank."""
    calls = []

    def run(command, *, env, **options):
        calls.append((command, env))
        assert options == {"capture_output": True, "text": True, "check": False}
        return SimpleNamespace(returncode=code, stderr=said)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(resharding.subprocess, "run", run)
    checkpoint, target = tmp_path / "step-00000007", resharding._hidden(tmp_path / "step-00000007")
    checkpoint.mkdir()
    assert resharding._convert(checkpoint, target) == problem
    ((command, env),) = calls
    assert command[-4:] == ["--input_folder", str(checkpoint), "--output_folder", str(target)]
    assert env["DS_ACCELERATOR"] == "cpu"
    assert not env.keys() & {"RANK", "WORLD_SIZE"}
    assert target.parent.exists() == (code == 0)


@pytest.mark.parametrize(
    ("stage", "written", "now", "needs"), [(0, 2, 1, False), (1, 2, 1, True), (3, 1, 2, True), (2, 2, 2, False)]
)
def test_what_is_sharded_is_converted_for_another_number_of_ranks(stage, written, now, needs):
    position = replace(POSITION, zero_stage=stage, world_size=written)
    assert resharding.needs_resharding(position, now) == needs


@pytest.mark.parametrize("damaged", [[], ["optimizer.pt is missing"]])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_conversion_that_was_made_ahead_is_used_if_it_verifies(tmp_path, monkeypatch, capsys, damaged, rank):
    """Else the first rank converts anew, and the others wait."""
    checkpoint, ready = tmp_path / "step-00000007", tmp_path / "universal-step-00000007"
    for folder in (checkpoint, ready):
        folder.mkdir()
        (folder / "position.json").write_text("7")
    made, ranks = [], Ranks(rank, 2)
    ranks.raise_first = raise_alone
    monkeypatch.setattr(resharding, "damage", lambda folder, part: damaged if part == (rank, 2) else None)
    monkeypatch.setattr(resharding, "_convert", lambda *given: made.append(given))
    hidden = tmp_path / ".universal-step-00000007" / "universal"
    assert resharding.reshard(checkpoint, ranks) == (hidden if damaged else ready)
    assert made == [(checkpoint, hidden)] * (bool(damaged) and rank == 0)
    said = "warning: converting anew, universal-step-00000007 is damaged: optimizer.pt is missing; optimizer.pt is "
    assert capsys.readouterr().err.startswith(said if made else "")
    (ready / "position.json").write_text("8")  # of a checkpoint that had this step before
    assert resharding.reshard(checkpoint, ranks) == hidden


def test_checksums_protect_themselves_as_in_earlier_versions():
    """By the SHA-256 of the other lines, with the brace behind them."""
    names = {"b.pt": "1" * 64, "a.pt": "0" * 64}
    lines = '{\n  "a.pt": "' + "0" * 64 + '",\n  "b.pt": "' + "1" * 64 + '"'
    own = hashlib.sha256(f"{lines}\n}}".encode()).hexdigest()
    assert integrity.checksum_text(names) == f'{lines},\n  "sha256 of the lines above": "{own}"\n}}\n'


def test_what_no_optimizer_holds_is_put_together_in_the_order_of_ranks(monkeypatch, tmp_path):
    """Of twelve ranks, of which the last one's part is padded; by their names rank 10 would come before rank 2."""
    for rank in range(12):
        (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    module = torch.nn.Module()
    module.sharded = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    module.sharded.ds_id, module.sharded.ds_numel, module.sharded.ds_shape = 0, 22, (2, 11)
    module.whole = torch.nn.Parameter(torch.empty(3), requires_grad=False)
    module.trained = torch.nn.Parameter(torch.empty(3))
    module.register_buffer("ids", torch.zeros(2))
    saved = {"whole": torch.ones(3), "ids": torch.tensor([4.0, 5.0]), "sharded": None}

    def read(path):
        rank = int(path.name.split("_")[3])
        return {"module": saved, "frozen_param_fragments": {"sharded": torch.tensor([2.0 * rank, 2.0 * rank + 1])}}

    put = {}
    monkeypatch.setattr(engine, "read_pickle", read)
    monkeypatch.setattr(engine, "_put", lambda parameter, value: put.update({parameter: value.tolist()}))
    engine.put_fixed(SimpleNamespace(module=module), tmp_path)
    rows = [[float(number) for number in range(first, first + 11)] for first in (0, 11)]
    assert put == {module.sharded: rows, module.whole: [1.0] * 3}
    assert module.ids.tolist() == [4.0, 5.0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_the_optimizer_for_bf16_cut_are_put_together(tmp_path, ranks):
    """Two groups, each flat and padded, in equal parts; what is tied shares its storage."""
    shapes = [{"a": torch.Size((2, 3)), "b": torch.Size((1,))}, {"c": torch.Size((4,))}]
    groups = [torch.tensor([*range(7), 77.0]), torch.arange(10.0, 14.0)]
    saved = {"module": {}, "param_shapes": shapes, "shared_params": {"tied": "a", "elsewhere": "nothing"}}
    torch.save(saved, tmp_path / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        parts = [group.chunk(ranks)[rank].clone() for group in groups]
        state = {"optimizer_state_dict": {"single_partition_of_fp32_groups": parts}}
        torch.save(state, tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    found = consolidate._of_bf16_optimizer(tmp_path)
    values = {name: value.tolist() for name, value in found.items()}
    matrix = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert values == {"a": matrix, "b": [6.0], "c": [10.0, 11.0, 12.0, 13.0], "tied": matrix}
    assert found["tied"].data_ptr() == found["a"].data_ptr()
    for rank in range(ranks):
        state = {"optimizer_state_dict": {"zero_stage": 1}}
        torch.save(state, tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    assert consolidate._of_bf16_optimizer(tmp_path) is None  # another optimizer's, which DeepSpeed knows


def test_weights_come_in_fp32_whatever_the_engine_had_and_ties_stay():
    narrow, wide = torch.ones(3, dtype=torch.bfloat16), torch.ones(2)
    state = {"a": narrow, "tied": narrow, "b": wide, "count": torch.tensor([3], dtype=torch.int16)}
    found = consolidate._in_fp32(state)
    assert {name: value.dtype for name, value in found.items()} == {
        "a": torch.float32, "tied": torch.float32, "b": torch.float32, "count": torch.int16
    }  # fmt: skip
    assert found["tied"] is found["a"]
    assert found["b"] is wide


def test_a_damaged_checkpoint_of_the_same_step_gives_way_to_the_new_one(tmp_path):
    final, aside = tmp_path / "step-00000007", tmp_path / ".partial-step-00000007"
    final.mkdir()
    (final / "old.pt").write_text("half of it")
    aside.mkdir()
    (aside / "new.pt").write_text("whole")
    checksums = {"new.pt": hashlib.sha256(b"whole").hexdigest()}
    ckpt._publish(aside, final, {"position": {"step": 7}}, checksums)
    assert sorted(path.name for path in final.iterdir()) == ["checksums.json", "new.pt", "position.json"]
    assert integrity.damage(final) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000007"]


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"position": {}}', '{"position": {"step": 1, "size": 2}}'])
def test_a_record_that_says_something_else_is_named(tmp_path, record):
    (tmp_path / "position.json").write_text(record)
    with pytest.raises(XdscaleError, match=r"position\.json: not a readable checkpoint record: "):
        ckpt.read_position(tmp_path)


def test_a_file_that_cannot_be_read_is_damage_and_does_not_hide_the_rest(tmp_path):
    for name in ("a.pt", "b.pt", "c.txt"):
        (tmp_path / name).write_text(name)
    names = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a.pt", "b.pt", "c.txt")}
    (tmp_path / "checksums.json").write_text(integrity.checksum_text(names))
    assert integrity.damage(tmp_path) == []
    (tmp_path / "a.pt").unlink()
    (tmp_path / "a.pt").mkdir()
    (tmp_path / "b.pt").write_text("other")
    (tmp_path / "stray.pt").touch()
    (tmp_path / "stray.txt").touch()
    a, b, stray = (str(tmp_path / name) for name in ("a.pt", "b.pt", "stray.pt"))
    assert integrity.damage(tmp_path) == [
        f"{a} cannot be read: Is a directory",
        f"{b} is altered: expected SHA-256 {names['b.pt'][:12]}…, found d9298a10d1b0…",
        f"{stray} does not belong to the checkpoint",
    ]
    assert [len(integrity.damage(tmp_path, (part, 2))) for part in (0, 1)] == [2, 1]


@pytest.mark.parametrize("rank", [0, 1])
def test_why_a_conversion_failed_is_told_to_all_ranks(tmp_path, monkeypatch, rank):
    ranks, told = Ranks(rank, 2), []
    ranks.raise_first = lambda *problem: told.append(problem)
    monkeypatch.setattr(resharding, "_convert", lambda *_: "KeyError: 'x'")
    resharding.reshard(tmp_path / "step-00000007", ranks)
    assert told == [(None if rank else "KeyError: 'x'", f"cannot convert {tmp_path}/step-00000007 for 2 ranks")]
    with pytest.raises(XdscaleError, match=r"^cannot convert .*/step-00000007: KeyError: 'x'$"):
        resharding.reshard_ahead(tmp_path / "step-00000007")


def test_a_disk_is_asked_for_a_mib_and_gets_it_back(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(integrity, "sync", lambda path: written.append(path.stat().st_size))
    integrity.check_room(tmp_path)
    assert written == [2**20]
    assert not any(tmp_path.iterdir())


def test_a_torn_file_would_call_nothing(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(XdscaleError, match=r"/a\.pt: not a checkpoint file that can be read .*from it \((?!it would)"):
        integrity.read_pickle(tmp_path / "a.pt")


def test_no_conversion_begins_that_cannot_be_written_and_a_full_disk_is_said(tmp_path, monkeypatch):
    checkpoint = tmp_path / "step-00000007"
    checkpoint.mkdir()
    (tmp_path / ".universal-step-00000007").write_text("in its way")
    target = resharding._hidden(checkpoint)
    assert "File exists" in resharding._convert(checkpoint, target)
    (tmp_path / ".universal-step-00000007").unlink()
    monkeypatch.setattr(
        resharding.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="unexpected pos 64\n")
    )

    def refuse(folder):
        assert folder == target.parent
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resharding, "check_room", refuse)
    said = resharding._convert(checkpoint, target)
    assert "the disk is full" in said
    assert said.endswith("MiB are free with what was converted so far")
    assert not target.parent.exists()
