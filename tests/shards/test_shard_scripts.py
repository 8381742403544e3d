"""The ready scripts that build shards: on one machine, and as a Slurm array with a stand-in for Slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xdscale.shards.manifest import Manifest
from xdscale.shards.sources.text import TextOptions, build_shards

ROOT = Path(__file__).parents[2]

# Runs a copy of the script at once, as Slurm would later; after a failed array the merge never starts.
SBATCH = """#!/bin/bash
set -u
echo "$*" >> "$FAKE/calls"
while [[ ${1:-} == --* ]]; do
    case $1 in
    --array=0-*) last=${1#--array=0-} ;;
    --dependency=afterok:*) [ -e "$FAKE/failed-${1##*:}" ] && { echo 99; exit 0; } ;;
    esac
    shift
done
cp "$1" "$FAKE/slurm_script"
shift
number=$(wc -l < "$FAKE/calls")
export SLURM_JOB_ID=$number SLURM_CPUS_PER_TASK=1
if [ -n "${last:-}" ]; then
    for task in $(seq 0 "$last"); do
        [ "$task" = "${FAKE_DEAD_TASK:-}" ] && { touch "$FAKE/failed-$number"; continue; }
        SLURM_ARRAY_TASK_ID=$task bash "$FAKE/slurm_script" "$@" >> "$FAKE/log" 2>&1 || touch "$FAKE/failed-$number"
    done
else
    bash "$FAKE/slurm_script" "$@" >> "$FAKE/log" 2>&1
fi
echo "$number;cluster"
"""


@pytest.fixture
def environment(tmp_path):
    """Programs with the stand-in before them, and its notes in a folder of their own."""
    fake = tmp_path / "slurm"
    fake.mkdir()
    (fake / "sbatch").write_text(SBATCH)
    (fake / "sbatch").chmod(0o755)
    paths = [str(fake), str(Path(sys.executable).parent), os.environ["PATH"]]
    return os.environ | {"FAKE": str(fake), "PATH": ":".join(paths)}


def run(script, *arguments, folder, env):
    command = ["bash", str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def options(cassette_model):
    return ("--language-tokenizer", cassette_model, "--sequence-length", "30", "--validation-fraction", "0.2")


def test_one_machine_a_folder_of_text(small_corpus, options, environment, tmp_path):
    """A folder and an output with spaces in their names; the second time nothing is left to do."""
    texts = tmp_path / "my texts"
    texts.mkdir()
    (texts / "a b.txt").write_bytes(small_corpus.read_bytes())
    for kept in ("0 kept", "2 kept"):
        result = run("build_shards.sh", "out folder", "my texts", *options, folder=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        assert kept in result.stdout
        assert result.stdout.splitlines()[-1].endswith("all as built")
    assert Manifest.load(tmp_path / "out folder").tables["text"].counts["documents"] == 60


def test_slurm_array_of_a_dump_goes_on_after_a_task_died(options, environment, cassette_model, tmp_path):
    """The bytes are those of one machine; the merge does not start before all parts are there."""
    # A shard is 16 MiB of wikitext; a long comment is read in no time.
    hidden = f"&lt;!-- {'x' * (6 << 20)} --&gt;"
    said = "the [[river]] runs past old walls while birds sing\n" * 20
    page = "<page><title>T</title><ns>0</ns><revision><text>{}{} {}</text></revision></page>"
    pages = "".join(page.format(hidden, number, said) for number in range(9))
    (tmp_path / "a dump.xml").write_text(f"<mediawiki>{pages}</mediawiki>")
    command = ("build_shards_slurm.sh", 2, "out", "a dump.xml", *options)
    died = run(*command, folder=tmp_path, env=environment | {"FAKE_DEAD_TASK": "1"})
    assert died.returncode == 0, died.stderr
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == ["part-00000-of-00002.json"]
    again = run(*command, folder=tmp_path, env=environment)
    assert again.returncode == 0, again.stderr
    assert again.stdout == "parts 0 to 1: job 3; merge: job 4; then out is one dataset\n"
    built = build_shards(
        [tmp_path / "a dump.xml"],
        tmp_path / "one",
        TextOptions(language_tokenizer=str(cassette_model), sequence_length=30, validation_fraction=0.2),
    )
    shards = [shard.file for split in built.splits.values() for shard in split.shards]
    assert len(shards) > 3
    for name in (*shards, "dataset.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    calls = (tmp_path / "slurm" / "calls").read_text().splitlines()
    assert calls[2].startswith("--parsable --array=0-1 ")
    assert calls[3].startswith("--parsable --dependency=afterok:3 --kill-on-invalid-dep=yes")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("build_shards.sh", ["out"]),
        ("build_shards_slurm.sh", ["1", "out", "in"]),
        ("build_shards_slurm.sh", ["out", "in", "--workers=2"]),
        ("build_shards_slurm.sh", []),
    ],
)
def test_wrong_arguments_show_how_it_is_meant(script, arguments, environment, tmp_path):
    result = run(script, *arguments, folder=tmp_path, env=environment)
    assert result.returncode == 2
    assert f"  bash scripts/{script} " in result.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "slurm"]
    assert not (tmp_path / "slurm" / "calls").exists()
