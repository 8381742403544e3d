"""The wheel, in an environment without the checkout: everything that ships is in it and found from any folder."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"xdscale": "xdscale", "kernels": "xdscale/kernels", "shards": "xdscale/shards"}
FOLDERS |= {"ds_configs": "xdscale/ds_configs"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools would leave its files in the checkout, and take in what an older build left."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source],
        check=True,
    )
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs a program of a new environment that holds the wheel and sees this one's packages, from an empty folder."""
    environment = tmp_path_factory.mktemp("venv")
    venv.create(environment)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, "install", "--no-deps", wheel], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # Folders named in a .pth file are searched, but their own .pth files, the checkout's among them, are not read.
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    workplace = tmp_path_factory.mktemp("workplace")
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(program, *arguments):
        done = subprocess.run(
            [environment / "bin" / program, *arguments],
            cwd=workplace,
            env=kept,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    wanted = {
        f"{target}/{path.relative_to(ROOT / folder)}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("licenses/LICENSE") for name in file.namelist())
    assert found == wanted


COMMANDS = """
import sys
from xdscale.cli import main
for words in %r:
    sys.argv = ["xdscale", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, words
    print("== end", flush=True)
"""


def test_light_commands_work_from_an_empty_folder(run, wheel, tmp_path, wiki_text, cassette_model):
    assert "site-packages/xdscale/" in run("python", "-c", "import xdscale; print(xdscale.__file__)")
    assert run("xdscale", "--version") == f"xdscale {wheel.name.split('-')[1]}\n"
    assert "Finetune and report" in run("python", "-m", "xdscale", "--help")
    assert "xdbert-base-wikitext103" in run("xdscale", "recipes")
    shards = tmp_path / "shards"
    run("xdscale", "shards", "build", wiki_text, "--out", shards, "--language-tokenizer", cassette_model)

    def run_all(*commands):
        """In one process, which imports torch once."""
        given = [list(map(str, words)) for words in commands]
        *said, end = run("python", "-c", COMMANDS % given).split("== end\n")
        assert (len(said), end) == (len(commands), "")
        return said

    planned, small, info = run_all(
        ["plan", "xdelectra-large-wikipedia"], ["plan", "quickstart"], ["shards", "info", shards]
    )
    assert "Use model-zero3.json (--write-configs FOLDER writes it for this GPU)" in small  # one that does not ship
    assert "sequences" in info
    names = ("electra-large-zero2", "electra-large-zero3-offload.json")
    asked = [["--hosts", "a:8,b:8", "--deepspeed-config", name, "--out", tmp_path / name] for name in names]
    _, *named, default = run_all(
        ["launch", "xdelectra-large-wikipedia", "--hosts", "a:8", *planned.split("Use ")[1].split()[:2]],
        *(["launch", "xdelectra-large-wikitext103", *words] for words in asked),
        ["launch", "xdelectra-large-wikitext103", "--hosts", "a:8,b:8", "--out", tmp_path / "default"],
    )
    for name, said in zip(names, named, strict=True):
        assert f"--deepspeed_config {name}" in said
    assert "--deepspeed_config electra-large-zero2" in default
