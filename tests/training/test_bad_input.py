"""Every mistake gives one message that names file and value, exit code 2, no traceback, nothing half-written."""

import contextlib
import json
import os
import shutil
import signal
import threading

import pytest

from xdscale import train
from xdscale.errors import EXIT_BAD_INPUT, XdscaleError
from xdscale.train import main
from xdscale.training.distributed import Ranks
from xdscale.training.environment import check_precision


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4}))
    return path


@pytest.fixture
def refuse(capsys, tmp_path, wiki_shards, config, monkeypatch):
    """Runs the entry point in this process and returns its message."""
    # What a start without a launcher sets must not reach the launches of other tests.
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)

    def run(*overrides, recipe="quickstart", ds_config=config, shards=wiki_shards):
        folder = tmp_path / "run"
        before = sorted(tmp_path.rglob("*"))
        settings = [f"data.shards={shards}", f"output.folder={folder}", "training.steps=2", "training.global_batch=4"]
        code = main([recipe, *settings, *overrides, "--deepspeed_config", str(ds_config)])
        error = capsys.readouterr().err
        assert code == EXIT_BAD_INPUT, error
        assert error.startswith("error: ")
        assert "Traceback" not in error
        written = [path for path in tmp_path.rglob("*") if path not in before and path.name not in (".lock", "run")]
        assert written == []
        return error

    return run


@pytest.mark.parametrize("typed", [True, False])
def test_what_is_asked_for_reaches_the_run_in_a_calm_environment(monkeypatch, config, typed):
    """What stands in the environment must stand there before the first import of what reads it."""
    order, ranks = [], Ranks(0, 1, 0)

    def run(system, ds_config, its_ranks, stop):
        order.append((system.recipe.training.seed, ds_config["train_micro_batch_size_per_gpu"], its_ranks is ranks))
        assert not stop.requested
        return 7

    monkeypatch.setattr(train, "calm_environment", lambda: order.append("calm"))
    monkeypatch.setattr("xdscale.training.distributed.start_distributed", lambda: order.append("start") or ranks)
    monkeypatch.setattr(train, "check_precision", lambda name, values: order.append(name))
    monkeypatch.setattr("xdscale.training.session.train_run", run)
    words = ["quickstart", "--local_rank", "3", "training.seed=5", "--deepspeed_config", str(config)]
    monkeypatch.setattr("sys.argv", ["train", *words])
    assert main(words if typed else None) == 7
    assert order == ["calm", "start", str(config), (5, 4, True)]


def test_unknown_recipe_key(refuse):
    assert "unknown key 'training.sead'; did you mean 'seed'?" in refuse("training.sead=1")


def test_unknown_ds_config_key(refuse, tmp_path):
    path = tmp_path / "typo.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimzation": {"stage": 2}}))
    assert "typo.json: unknown key 'zero_optimzation'; did you mean 'zero_optimization'?" in refuse(ds_config=path)


def test_unknown_key_inside_a_ds_config_section(refuse, tmp_path):
    path = tmp_path / "typo.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stagee": 2}}))
    assert "unknown key 'zero_optimization.stagee'; did you mean 'stage'?" in refuse(ds_config=path)


def test_recipe_and_ds_config_disagree(refuse, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 5}))
    error = refuse(ds_config=path)
    assert "other.json: gradient_clipping = 5 contradicts the recipe: optim.gradient_clipping gives 1.0" in error


def test_missing_shards_folder(refuse, tmp_path):
    assert f"{tmp_path / 'none'}: no such file or folder" in refuse(shards=tmp_path / "none")


def test_folder_without_shards(refuse, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert "dataset.json" in refuse(shards=empty)


def damaged(wiki_shards, tmp_path_factory, change):
    copy = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(wiki_shards, copy)
    change(copy / "train-000000.tar")
    return copy


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("change", "words"),
    [(flip_byte, ["altered", "expected"]), (cut, ["expected", "found"]), (lambda path: path.unlink(), ["missing"])],
    ids=["altered", "truncated", "missing"],
)
def test_damaged_shard_is_named(refuse, wiki_shards, tmp_path_factory, change, words):
    error = refuse(shards=damaged(wiki_shards, tmp_path_factory, change))
    assert "train-000000.tar" in error
    assert all(word in error for word in words)


def test_shards_of_another_tokenizer(refuse, wiki_shards, tmp_path_factory, cassette_model):
    """The same vocabulary in another order is another tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "other"
    shutil.copytree(cassette_model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = refuse(f"model.language.name={folder}")
    assert "tokenizer" in error
    assert str(folder) in error


def test_sequences_longer_than_the_models_positions(refuse, tmp_path_factory, cassette_model):
    folder = tmp_path_factory.mktemp("model") / "short"
    shutil.copytree(cassette_model, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 64}))
    error = refuse(f"model.language.name={folder}", "model.language.weights=random")
    assert "126 tokens" in error
    assert "64 positions" in error


def test_wrong_weights_hash(refuse):
    assert "SHA-256" in refuse(f"model.language.sha256={'ab' * 32}")


def test_run_folder_of_a_different_recipe(refuse, tmp_path):
    from xdscale.recipe import load_recipe

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(load_recipe("quickstart").to_yaml())
    error = refuse("training.seed=5")
    assert f"{folder}: holds a run of a different recipe" in error
    assert "training.seed was 0, now 5" in error


def test_output_folder_that_is_no_run_folder(refuse, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    assert "not a run folder (thesis.txt" in refuse()
    assert (folder / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("place", ["/dev/null/run", "/proc/run"])
def test_output_folder_that_cannot_be_made(refuse, place):
    error = refuse(f"output.folder={place}")
    assert f"cannot write a run in {place}: " in error
    assert len(error.splitlines()) == 1


def test_bf16_on_a_card_without_it(monkeypatch):
    monkeypatch.setattr("xdscale.training.environment.uses_gpus", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla V100-SXM2-32GB")
    check_precision("ds.json", {"fp16": {"enabled": True}})
    with pytest.raises(XdscaleError, match="ds.json: bf16 = enabled, but .* Tesla V100-SXM2-32GB does not .*-fp16"):
        check_precision("ds.json", {"bf16": {"enabled": True}})


def test_fp16_on_a_cpu_without_it(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr("xdscale.training.environment.uses_gpus", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for supported in (True, False):
        monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda supported=supported: supported)
        check_precision("ds.json", {"bf16": {"enabled": True}, "fp16": {"enabled": False}})
        refused = pytest.raises(XdscaleError, match=r'ds\.json: fp16 = enabled, but .* no GPU; take "fp16" out')
        with contextlib.nullcontext() if supported else refused:
            check_precision("ds.json", {"fp16": {"enabled": True}})


def test_what_the_first_rank_has_said_the_others_do_not_repeat(monkeypatch, capsys, config):
    """The launcher ends them with SIGTERM; one that is not ended has a fault of its own, and says it."""
    monkeypatch.setenv("RANK", "1")
    arguments = ["quikstart", "--deepspeed_config", str(config)]
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert main(arguments) == EXIT_BAD_INPUT
    timer.join()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("xdscale.train._SECONDS_FOR_FIRST_RANK_TO_SPEAK", 0.2)
    assert main(arguments) == EXIT_BAD_INPUT
    assert "quikstart: no such recipe" in capsys.readouterr().err
