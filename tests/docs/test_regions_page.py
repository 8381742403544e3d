"""Every command of docs/regions.md is executed, in its order, on small files that independent writers made."""

import re
import shlex
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from xdscale.cli import app
from xdscale.commands.regions import regions_app
from xdscale.shards.regions import RegionTable
from xdscale.shards.sources.regions.importing import FORMATS

from ..shards.regions import region_files as writers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "regions.md").read_text(encoding="utf-8").replace(" \\\n    ", " ")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if not line.startswith("#")
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the files that the page names, of three images of the published detectors' width and classes."""
    monkeypatch.setattr(writers, "WIDTH", 2048)
    monkeypatch.setattr(writers, "CLASSES", 1601)
    monkeypatch.chdir(tmp_path)
    features = tmp_path / "features"
    features.mkdir()
    (tmp_path / "annotations").mkdir()
    those = [writers.image(number, 2 + number) for number in range(4)]
    writers.coco_annotations(tmp_path / "annotations", those)
    for write in (writers.butd, writers.uniter, writers.vilbert, writers.vlbert_zip, writers.ban, writers.pythia):
        write(features, those)
    writers.milvlg(features, those)
    (features / "butd.tsv").rename(features / "trainval_36.tsv")
    coco_named = [writers.image(number, 2, f"COCO_val2014_{number + 1000:012}") for number in range(4)]
    writers.lxmert(features, coco_named)[0].rename(features / "val2014_obj36.tsv")
    for i in those:
        i.objects %= 1594
    writers.vinvl(features, those)
    for i in those:
        i.objects %= 91
    writers.coco(features, those)
    with h5py.File(tmp_path / "my-features.h5", "w") as file:
        file["ids"], file["sizes"] = ["a", "b", "c"], [[9, 8]] * 3
        file["boxes"], file["features"] = np.full((3, 2, 4), [1, 2, 3, 4], np.float32), np.ones((3, 2, 5), np.float32)
    (tmp_path / "objects_vocab.txt").write_text("".join(f"object {number}\n" for number in range(1600)))
    (tmp_path / "vinvl_labels.txt").write_text("".join(f"class {number}\n" for number in range(1594)))
    (tmp_path / "detector.json").write_text(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    return tmp_path


def run(command):
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception}"
    return result.output


def test_the_commands_and_the_code_run_in_order(workplace):
    said = {command: run(command) for command in COMMANDS}
    imported = [command for command in COMMANDS if "regions import" in command]
    assert {re.search(r"--format (\w+)", command)[1] for command in imported} == set(FORMATS)
    for command in imported:
        assert len(RegionTable.open(workplace / re.search(r"--out (\S+)", command)[1])) == 4
    assert RegionTable.open(workplace / "data/lxmert").rows(["1002"]).tolist() == [2]
    compared = next(text for command, text in said.items() if "compare" in command)
    assert "4 images in both" in compared
    assert "cosine 1.000000 in the mean" in compared
    assert len((workplace / "comparison.csv").read_text().splitlines()) == 5
    info = next(text for command, text in said.items() if "shards info" in command)
    assert "Faster R-CNN of our own (sha256 0000" in info
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/regions.md", "exec"), names)
    assert names["second"].shape == (5, 2048)
    assert np.array_equal(names["second"], writers.image(3, 5).features.astype(np.float16))
    assert len(RegionTable.open(workplace / "data/mine")) == 1
    assert RegionTable.open(workplace / "data/my-features").rows(["b", "c"]).tolist() == [1, 2]
    shutil.rmtree(workplace / "data")


def test_every_option_that_the_page_names_is_there():
    commands = typer.main.get_command(regions_app).commands.values()
    known = {name for command in commands for parameter in command.params for name in parameter.opts}
    named = set(re.findall(r"(?<!-)--[a-z][a-z-]*", PAGE))
    assert named <= known
    assert len(named) > 12
