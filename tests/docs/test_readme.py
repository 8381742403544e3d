"""Every command of the README is executed, in its order, at small scale.

The README's commands run unchanged except for the substitutions below, which only make them smaller and keep them off
the network: the real WikiText file becomes a small one of the same format, hub names become local folders or random
weights, a run becomes two steps. `xdscale` and the launcher that it starts are forked ready-made.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from xdscale.recipe import shipped_recipes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BASH = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
INSTALLATION = BASH[2:5]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

SMALLER = [
    "training.steps=2", "training.global_batch=4", "run.eval_samples=4", "model.clip.name=clip-tiny.json",
    "model.clip.weights=random", "model.language.name=./small-bert",
]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, cassette_model, wiki_text):
    """A folder like the repository's root, with a small WikiText file and a small BERT."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(cassette_model, folder / "small-bert")
    articles = wiki_text.read_text(encoding="utf-8").split("\n\n")
    with (folder / "wiki.train.raw").open("w", encoding="utf-8") as file:
        for number, article in enumerate(filter(None, articles)):
            file.write(f" \n = Article {number} = \n \n")
            file.writelines(f" {paragraph} \n" for paragraph in article.splitlines())
    return folder


def smaller(command):
    if "shards build" in command:
        return command.replace("bert-base-uncased", "./small-bert") + " --validation-fraction 0.1"
    if "xdscale train" in command:
        return " ".join([command, "--ranks", "2", *SMALLER])
    return command


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_first_two_commands_are_the_scripts():
    assert BASH[:2] == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    # The second is what runs this test; the first has a test of its own.


def test_the_installation_ends_with_the_command(tmp_path):
    """In a copy of the checkout and a clean shell; only what is fetched is left out: dependencies are this Python's."""
    commands = list(INSTALLATION)
    assert commands == ["python3 -m venv .venv", "source .venv/bin/activate", "pip install -e ."]
    commands[0] = commands[0].replace("python3", sys.executable)
    commands[2] += " --quiet --no-deps --no-build-isolation"
    packages = "\n".join(path for path in sys.path if "site-packages" in path)
    commands.insert(2, f"echo '{packages}' > $(echo .venv/lib/python3*/site-packages)/dependencies.pth")
    commands.insert(3, "rm -rf .venv/lib/python3*/site-packages/setuptools*")  # Python 3.11 brings one that is too old
    for name in ("xdscale", "kernels", "shards", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    script = "\n".join(["set -e", *commands, "cd /", "xdscale --version", "python -m xdscale recipes quickstart"])
    clean = {"HOME": os.environ["HOME"], "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(r"xdscale \d\S+\n", done.stdout)
    assert "data.shards=data/quickstart" in done.stdout


@pytest.mark.slow
def test_commands_of_the_recipe(workplace, launch_ranks):
    ran = []
    for command in BASH[5:]:
        program, *words = shlex.split(smaller(command))
        if program == "tensorboard":
            serve(command, workplace)
        else:
            done = launch_ranks(program, *words, folder=workplace)
            assert done.code == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        ran.append(program)
    assert ran.count("xdscale") >= 9
    for code in PYTHON:
        (workplace / "block.py").write_text(code + "\nassert states.shape[-1] == 128\n")
        done = launch_ranks(workplace / "block.py", folder=workplace)
        assert done.code == 0, done.stderr[-3000:]


def serve(command, folder):
    """Starts TensorBoard, asks it for the run's scalars and ends it."""
    port = free_port()
    program = str(Path(sys.executable).with_name("tensorboard"))
    arguments = [program, *command.split()[1:], "--port", str(port)]
    process = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/data/plugin/scalars/tags"
        deadline = time.monotonic() + 120
        answer = ""
        while "loss/total" not in answer and time.monotonic() < deadline:
            time.sleep(0.2)
            try:
                answer = urllib.request.urlopen(url, timeout=5).read().decode()
            except OSError:
                continue
        for name in ("loss/mlm", "accuracy/match", "optim/lr", "throughput/mfu", "data/wait_fraction"):
            assert name in answer
    finally:
        process.terminate()
        process.wait()


def test_the_table_names_every_shipped_recipe():
    shipped = {path.stem for path in shipped_recipes()}
    table = README.split("| recipe |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", table)) == shipped


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    named = re.findall(r"`((?:scripts|docs|ds_configs|xdscale)/[\w./-]+)`", README)
    assert len(links) >= 3
    assert [link for link in links + named if not (ROOT / link).exists()] == []


def test_published_recipes_use_published_names():
    """What the substitutions replace is what a reader with a network gets."""
    values = yaml.safe_load((ROOT / "xdscale/recipes/xdbert/xdbert-base-wikitext103.yaml").read_text())
    assert values["model"]["language"]["name"] == "bert-base-uncased"
    assert values["model"]["clip"] == {"name": "ViT-B-32", "weights": "openai"}
