"""Loading refuses what is not what was saved or could run code; folders that ranks do not share; the commands."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from xdscale.commands.checkpoints import _checkpoints
from xdscale.errors import XdscaleError
from xdscale.files import file_sha256
from xdscale.training import checkpoint as ckpt
from xdscale.training.checkpoint_folder import no_checkpoint
from xdscale.training.consolidate import consolidated_state
from xdscale.training.distributed import Ranks
from xdscale.training.integrity import CHECKSUMS, check_pickles, checksum_text, file_names, read_pickle
from xdscale.training.resharding import reshard_ahead
from xdscale.training.run_folder import RunFolder

from . import faulty_files
from . import test_checkpoint_faults as faults

PROGRAM = Path(sys.executable).with_name("xdscale")
MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints of steps 2 and 3."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("{}")
    faults.make_run(tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def tamper(checkpoint, name, change):
    """Changes a file and records its new checksum, so that only the contents can give it away."""
    data = torch.load(checkpoint / name, weights_only=True)
    torch.save(change(data), checkpoint / name)
    rehash(checkpoint)


def rehash(checkpoint):
    names = [name for name in file_names(checkpoint) if name != CHECKSUMS]
    (checkpoint / CHECKSUMS).write_text(checksum_text({name: file_sha256(checkpoint / name) for name in names}))


def load(checkpoint, engine=None):
    def action(ranks):
        ckpt.load_checkpoint(engine or faults.Engine(0), checkpoint, checkpoint, ranks)

    (error,) = faulty_files.run_ranks(action, 1)
    if error is not None:
        raise error


def swap_rows(state):
    return state | {"weight": state["weight"][[1, 0, 2]]}


def forget_moments(state):
    zeroed = {key: value | {"exp_avg": torch.zeros_like(value["exp_avg"])} for key, value in state["state"].items()}
    return state | {"state": zeroed}


def other_rate(state):
    return state | {"param_groups": [state["param_groups"][0] | {"lr": 0.5}]}


@pytest.mark.parametrize(
    ("name", "change", "figure"),
    [
        (MODEL, swap_rows, "parameters expected"),
        (OPTIMIZER, forget_moments, "optimizer expected"),
        (OPTIMIZER, other_rate, "learning_rate expected 0.00025, found 0.5"),
        (OPTIMIZER, lambda state: state | {"state": {}}, "optimizer_step expected 3, found 0"),
    ],
)
def test_what_is_loaded_must_be_what_was_saved(run, name, change, figure):
    """The files' checksums are right here: their contents are not."""
    checkpoint = run / "checkpoints" / "step-00000003"
    load(checkpoint)
    tamper(checkpoint, name, change)
    with pytest.raises(XdscaleError, match="loaded it without an error, but not what was saved") as error:
        load(checkpoint)
    assert figure in str(error.value)


def test_an_engine_that_loads_nothing_is_noticed(run):
    """DeepSpeed answers (None, …) with a warning and would train from scratch."""
    engine = faults.Engine(0)
    engine.load_checkpoint = lambda folder, tag: (None, {})
    with pytest.raises(XdscaleError, match="found nothing to load"):
        load(run / "checkpoints" / "step-00000003", engine)
    engine.load_checkpoint = lambda folder, tag: (folder, {})
    with pytest.raises(XdscaleError, match="parameters expected .* optimizer_step expected 3, found 0"):
        load(run / "checkpoints" / "step-00000003", engine)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("written", ["torch", "torch, beside tensors", "legacy format"])
def test_files_that_would_run_code_are_refused_unread(run, tmp_path, written):
    checkpoint, proof = run / "checkpoints" / "step-00000003", tmp_path / "code-has-run"
    payload = {"module": {"weight": torch.ones(3)}, "extra": Payload(proof)} if "," in written else Payload(proof)
    torch.save(payload, checkpoint / MODEL, _use_new_zipfile_serialization=written != "legacy format")
    rehash(checkpoint)
    for read in (load, consolidated_state, reshard_ahead):
        with pytest.raises(XdscaleError) as error:
            read(checkpoint)
        assert f"{checkpoint / MODEL}: not a checkpoint file that can be read without running code" in str(error.value)
        if written.startswith("torch"):
            assert "it would call posix.mkdir" in str(error.value)
        assert not proof.exists()
    assert b"mkdir" in (checkpoint / MODEL).read_bytes()  # the call does stand in what was refused


def test_what_fp16_writes_is_allowed(tmp_path):
    torch.save({"loss_scaler": DynamicLossScaler(65536, 2.0, 1000, 1, 1, False, torch.float16)}, tmp_path / "a.pt")
    assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "a.pt") != []
    check_pickles(tmp_path)


class Attribute:
    """Pickled as a call of getattr, as Python 3.11.0 to 3.11.3 pickle the members of an enumeration."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_members_of_deepspeeds_enumeration_are_all_that_getattr_may_name(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"zero_stage": Attribute(ZeroStageEnum, "gradients")}, path)
    assert read_pickle(path) == {"zero_stage": ZeroStageEnum.gradients}
    for owner, name in ((ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro"), (LossScaler, "__init__")):
        torch.save({"zero_stage": Attribute(owner, name)}, path)
        with pytest.raises(XdscaleError, match="without running code"):
            read_pickle(path)


def test_a_folder_that_not_all_ranks_see_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("xdscale.training.run_folder._SECONDS_TO_SEE_A_FILE", 0.2)
    (tmp_path / "shared").mkdir()

    def check(folders):
        return faulty_files.run_ranks(lambda ranks: RunFolder(folders[ranks.rank]).check_shared(ranks), len(folders))

    assert check([tmp_path / "shared"] * 3) == [None] * 3
    errors = check([tmp_path / "shared", tmp_path / "shared", tmp_path / "elsewhere"])
    assert all(isinstance(error, XdscaleError) for error in errors)
    assert "rank 2 on " in str(errors[0])
    assert "does not see what rank 0 writes there" in str(errors[0])
    assert list((tmp_path / "shared").iterdir()) == []


def command(*arguments):
    return subprocess.run([PROGRAM, "checkpoints", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_list_and_verify_tell_what_is_there_and_what_is_damaged(run):
    listed = command("list", run)
    assert listed.returncode == 0, listed.stderr
    rows = [line.split() for line in listed.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [(row[0], row[2], row[3], row[4]) for row in rows] == [("2", "1", "1", "fp32"), ("3", "1", "1", "fp32")]
    verified = command("verify", run)
    assert (verified.returncode, verified.stderr) == (0, "step-00000002: verified\nstep-00000003: verified\n")
    position = (run / "checkpoints" / "step-00000003" / "position.json").read_text()
    assert position == json.dumps(json.loads(position), indent=2) + "\n"
    assert (run / "checkpoints" / "latest").read_text() == "step-00000003\n"
    faults.flip_bit(run / "checkpoints" / "step-00000002" / OPTIMIZER, 3)
    (run / "checkpoints" / "step-00000003" / MODEL).unlink()
    verified = command("verify", run)
    assert verified.returncode == 2
    assert f"error: {run}/checkpoints/step-00000002/{OPTIMIZER} is altered" in verified.stderr
    assert f"{run}/checkpoints/step-00000003/{MODEL} is missing" in verified.stderr
    assert MODEL[:8] in command("list", run).stdout


@pytest.mark.parametrize("name", ["list", "verify", "reshard"])
def test_commands_on_what_is_no_run_or_has_no_checkpoint(tmp_path, name):
    (tmp_path / "recipe.yaml").write_text("{}")
    for folder, message in ((tmp_path / "nowhere", "not a run folder"), (tmp_path, "has no checkpoint yet")):
        result = command(name, folder)
        assert (result.returncode, message in result.stderr, "Traceback" in result.stderr) == (2, True, False)


def test_a_finished_run_says_where_its_model_is(tmp_path):
    """What somebody exports who has finetuned for the first time."""
    (tmp_path / "model").mkdir()
    assert str(no_checkpoint(tmp_path)).endswith("has no checkpoint yet")
    (tmp_path / "result.json").touch()  # as of all seeds but the best one
    assert "any more, since it is finished, and its model was not kept (run.keep_model)" in str(no_checkpoint(tmp_path))
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "recipe.yaml").touch()
    told = f"any more, since it is finished; its model is the folder {tmp_path}/model$"
    for ask in (lambda: ckpt.choose_checkpoint(tmp_path, None, Ranks(0, 1, 0)), lambda: _checkpoints(tmp_path)):
        with pytest.raises(XdscaleError, match=told):
            ask()


def test_listing_needs_no_torch(run):
    command("list", run)
    began = time.perf_counter()
    command("list", run)
    assert time.perf_counter() - began < 2


def test_a_broken_conversion_leaves_nothing(run, launch_ranks):
    """These stand-in files are sound but not DeepSpeed's."""
    before = sorted((run / "checkpoints").iterdir())
    result = launch_ranks("xdscale", "checkpoints", "reshard", run)
    assert result.code == 2
    assert "cannot convert" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted((run / "checkpoints").iterdir()) == before


def test_retention_takes_a_checkpoints_conversion_with_it(run):
    folder = run / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / "universal-step-00000002")
    assert faults.save(folder, 4, newest=2) == [None]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    assert json.loads((folder / "step-00000004" / "position.json").read_text())["position"]["step"] == 4
