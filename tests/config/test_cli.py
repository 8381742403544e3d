"""The `xdscale` command: quick to start, one message per mistake."""

import contextlib
import io
import re
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from rich.text import Text
from typer.core import TyperOption

from xdscale.cli import app, main
from xdscale.registry import SUBJECTS
from xdscale.report.published import layouts

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).with_name("xdscale")


def run(*arguments):
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False)


def test_help_is_grouped_as_a_person_works_and_leaves_no_command_out():
    text = run("--help").stdout
    panels = re.findall(r"^╭─ (.*?) ─+╮$", text, re.MULTILINE)
    wanted = ["Get data", "Train", "Finetune and report", "Look inside", "Clusters", "Measure"]
    assert panels == ["Options", *wanted]
    # Typer puts a command that names no panel into one called "Commands".
    place = {name: text.index(f"│ {name} ") for name in ("shards", "recipes", "finetune", "pwcca", "plan", "bench")}
    assert sorted(place, key=place.get) == list(place)


@pytest.mark.parametrize(("command", "names"), [("finetune", SUBJECTS), ("report", layouts())])
def test_help_names_all_that_can_be_chosen(command, names):
    words = re.findall(r"[\w-]+", run(command, "--help").stdout)
    assert set(names) <= set(words)


def test_no_part_of_a_help_text_is_taken_for_markup():
    """Rich swallows what stands in brackets, unless a backslash is before it."""
    waiting, texts = [typer.main.get_command(app)], []
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        texts += [command.help, *(option.help for option in command.params if isinstance(option, TyperOption))]
    shown = [Text.from_markup(text).plain for text in texts if text]
    assert shown == [text.replace("\\[", "[") for text in texts if text]
    assert any("[width, height]" in text for text in shown)


def test_version_names_the_commit_of_a_checkout():
    found = re.fullmatch(r"xdscale (\S+)(?: \((\w+)(-dirty)?\))?\n", run("--version").stdout)
    assert found[1] == version("xdscale")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert head.stdout.startswith(found[2] or "")
    assert (found[2] is None) == (head.returncode != 0)


def test_the_module_is_the_command(tmp_path):
    module = subprocess.run(
        [sys.executable, "-m", "xdscale", "recipes"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (module.returncode, module.stdout) == (0, run("recipes").stdout)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["recipes"], ["recipes", "quickstart"], ["shards", "--help"], ["shards", "build", "--help"]],
)
def test_starts_within_a_second_where_it_needs_no_torch(arguments):
    """Of a core: on a machine that is busy with other tests the clock says nothing."""
    assert run(*arguments).returncode == 0  # compiles what a first run compiles
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["params", "xdbert-bse-wikitext103"], "did you mean 'xdbert-base-wikitext103'"),
        (["shards", "verify", "nowhere"], "nowhere"),
        (["shards", "build", "nowhere.txt", "--out", "o", "--language-tokenizer", "t"], "nowhere.txt"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert_one_message(result.returncode, result.stderr, message, tmp_path)


def test_so_is_one_of_a_command_that_needs_torch(launch_ranks, tmp_path):
    result = launch_ranks("xdscale", "export", "nowhere", "out", folder=tmp_path)
    assert_one_message(result.code, result.stderr, "nowhere: not a run folder", tmp_path)


def assert_one_message(code, stderr, message, folder):
    assert code == 2
    assert stderr.startswith("error: ")
    assert message in stderr
    assert "Traceback" not in stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "counts"),
    [
        ("xdbert-base-wikitext103", {"109,482,240", "63,165,952", "14,574,336", "202,059,009"}),
        ("xdelectra-large-wikitext103", {"334,092,288", "63,165,952", "22,575,616", "442,671,617"}),
    ],
)
def test_params_prints_the_papers_table_6(launch_ranks, recipe, counts):
    """Spec xdbert §10 fact 1, for the shipped recipes."""
    assert counts <= set(re.findall(r"[\d,]{6,}", launch_ranks("xdscale", "params", recipe).stdout))


def test_a_terminal_that_knows_only_ascii_stops_no_command(monkeypatch):
    """In this process: a start would take ten seconds of imports."""
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "plan", "quickstart-mlm", "--gpu", "L4"])
    with contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert b"8 \\xd7 L4-24G" in stdout.buffer.getvalue()


@pytest.mark.parametrize("words", [["checkpoints", "list"], ["shards", "verify"], ["report"]])
def test_a_name_that_the_system_does_not_take_is_one_message(monkeypatch, capfd, tmp_path, words):
    name = "a" * 5000
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *words, name])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert re.fullmatch(r"error: \S*aaa\S*: .*File name too long.*\n", said)
    assert list(tmp_path.iterdir()) == []
