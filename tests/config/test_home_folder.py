"""Paths of a user: `~` is the home folder on the command line, in a recipe, in an override; no package is imported."""

import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from typer.main import get_command

from xdscale.cli import app
from xdscale.ds_config import read_ds_config
from xdscale.errors import XdscaleError
from xdscale.names import UserPath, expand_home, resolve_path
from xdscale.recipe import load_recipe


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_names_are_expanded_once(home, tmp_path):
    assert expand_home("~") == str(home)
    assert expand_home("~/data/x") == f"{home}/data/x"
    for name in ("data/~", "package:a/~", "s3://bucket/~x", "./~x"):
        assert expand_home(name) == name
    (tmp_path / "~backup").touch()
    assert expand_home("~backup") == "~backup"
    with pytest.raises(XdscaleError, match=r"~nobody-here/x: there is no user 'nobody-here'; write \./~nobody-here/x"):
        expand_home("~nobody-here/x")


def test_an_empty_name_is_not_the_working_folder(home):
    for use in (UserPath, expand_home, lambda name: load_recipe("quickstart", [f"output.folder='{name}'"])):
        with pytest.raises(XdscaleError, match="an empty name is given where a file or folder is expected"):
            use("")
    with pytest.raises(XdscaleError, match="no file or folder has a name with a zero byte"):
        expand_home("a\0b")


def test_a_url_is_no_path_of_this_machine():
    """Else a run of days would go into a folder `s3:` of a machine that is rented by the hour."""
    with pytest.raises(XdscaleError, match=r"^s3://bucket/out: is a URL; name a file or folder on this machine"):
        UserPath("s3://bucket/out")
    for key in ("output.folder", "run.cache"):
        with pytest.raises(XdscaleError, match=rf"{key} = 'gs://b/x': .*is a URL; name a file or folder on this"):
            load_recipe("quickstart", [f"{key}=gs://b/x", "data.shards=s3://bucket/wiki"])
    recipe = load_recipe("quickstart", ["data.shards=s3://bucket/wiki", "run.cache=cache"])
    assert recipe.data.shards == "s3://bucket/wiki"


def callbacks(typer_app):
    for group in typer_app.registered_groups:
        yield from callbacks(group.typer_instance)
    yield from (command.callback for command in typer_app.registered_commands)


def test_every_path_of_every_command_is_expanded():
    """A command that takes a plain `Path` would make a folder named `~`."""
    found = [
        (callback.__name__, name, hint)
        for callback in callbacks(app)
        for name, hint in get_type_hints(callback).items()
        if "Path" in str(hint)
    ]
    assert len(found) > 20
    assert [item for item in found if "UserPath" not in str(item[2])] == []


def test_a_command_writes_below_the_home_folder(home, tmp_path):
    """As typed: no shell expands what follows an equals sign."""
    text = tmp_path / "a.txt"
    text.write_text("five words stand in this line\n" * 100)
    command = f"shards build {text} --out=~/out --language-tokenizer package:cognition/model --sequence-length 30"
    call = "from xdscale.cli import main; main()"
    subprocess.run([sys.executable, "-c", call, *command.split()], check=True, capture_output=True)
    assert (home / "out" / "dataset.json").exists()
    assert not (tmp_path / "~").exists()


def test_recipes_and_overrides(home):
    values = {
        "model": {"language": {"name": "~/bert"}, "clip": {"name": "ViT-B-32", "weights": "~/clip.pt"}},
        "data": {"shards": "~/shards"},
        "system": "xdbert",
        "training": {"steps": 10, "global_batch": 4},
        "output": {"folder": "~/run"},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe("~/recipe.yaml", ["data.shards=s3://bucket/x", "run.cache=~/cache"])
    assert (recipe.data.shards, recipe.run.cache) == ("s3://bucket/x", f"{home}/cache")
    assert recipe.output.folder == f"{home}/run"
    assert recipe.model.language.name == f"{home}/bert"
    assert recipe.model.clip.weights == f"{home}/clip.pt"
    (home / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 2}')
    assert read_ds_config("~/ds.json")["train_micro_batch_size_per_gpu"] == 2


def test_the_type_gives_plain_paths(home):
    assert type(UserPath("~/x")) is type(Path())
    assert get_command(app) is not None


def test_a_package_in_a_recipe_is_never_imported(tmp_path, monkeypatch):
    """Finding `a.b` imports `a`, which may lie in the working folder."""
    (tmp_path / "received" / "inner").mkdir(parents=True)
    for folder in ("received", "received/inner"):
        (tmp_path / folder / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(XdscaleError, match=r"'received\.inner' is not the name of a package"):
        resolve_path("package:received.inner/shards")
    assert resolve_path("package:received/inner").name == "inner"
