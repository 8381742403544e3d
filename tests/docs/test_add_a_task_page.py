"""Every block of docs/add-a-task.md is written to the file that its first line names, and every command executed.

The commands run unchanged but for a small encoder, short texts, one epoch and two seeds, a package that is installed
beside the environment instead of in it, and processes that are forked ready-made.
"""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from xdscale.shards.regions import Detector
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.tasks.metrics import METRICS
from xdscale.tasks.own import OwnTask, read_own_task

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-task.md").read_text(encoding="utf-8").replace(" \\\n    ", " ")
BLOCKS = {
    re.match(r"# (\S+)\n", text)[1]: text for text in re.findall(r"```(?:yaml|python|toml)\n(.*?)```", PAGE, re.DOTALL)
}
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
GOOD, BAD = ("A fine film, from its first minute to the last.", "A dull film. I left before its end.")


def rows(count):
    """Reviews with every column that the page's tasks name."""
    for number in range(count):
        review = f"{(BAD, GOOD)[number % 2]} Seen {number} times."
        yield {
            "review": review, "verdict": ("negative", "positive")[number % 2], "stars": 1 + number % 5,
            "other": GOOD, "same_author": number % 2 == 1,
            "beginning": review, "ending_a": "I went home.", "ending_b": "Again.", "ending_c": "So be it.",
            "right": "abc"[number % 3], "photo": number % 4,
        }  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, cassette_model, export_of_regions):
    folder = tmp_path_factory.mktemp("add-a-task")
    for name, text in BLOCKS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "exports").mkdir()
    for name in ("bert-base", "xdbert-base"):
        (folder / "exports" / name).symlink_to(cassette_model)
    boxes = np.array([[0, 0, 9, 9], [1, 2, 30, 40]], np.float32)
    features = np.eye(4, dtype=np.float32)
    photos = [RegionImage(str(number), (50, 50), boxes, features[[number, number]]) for number in range(4)]
    build_regions(photos, folder / "data" / "photos", Detector(model="drawn"))
    export_of_regions(folder / "exports" / "visualbert-coco", 4)
    for name, count in {"train": 48, "dev": 20}.items():
        with (folder / "reviews" / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(next(rows(1))))
            writer.writeheader()
            writer.writerows(rows(count))
    (folder / "reviews" / "unlabelled.jsonl").write_text('{"review": "Fine."}\n{"review": "Dull."}\n')
    (folder / "reviews" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows(60))), folder / "reviews" / "endings.parquet")
    (folder / "data" / "ORDER").mkdir(parents=True)
    for name in ("train", "dev"):
        lines = [row["review"] for row in rows(32)]
        (folder / "data" / "ORDER" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_the_pages_commands_end_in_a_report_with_a_column_of_ones_own(workplace, launch_ranks, monkeypatch):
    small = ["--seeds", "2", "--jobs", "1", "training.epochs=1", "training.global_batch=16", "model.max_length=16"]
    small += ["run.keep_model=true"]
    for command in COMMANDS:
        program, verb, *words = shlex.split(command)
        if program == "pip":
            options = ["-q", "--no-deps", "--no-index", "--no-build-isolation", "--target", "site"]
            subprocess.run([sys.executable, "-m", "pip", verb, *options, *words], cwd=workplace, check=True)
            continue
        words += small if verb == "finetune" else []
        done = launch_ranks("xdscale", verb, *words, folder=workplace, packages=[workplace / "site"])
        assert (program, done.code) == ("xdscale", 0), f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    with (workplace / "report" / "report.csv").open(newline="") as file:
        lines = {line["model"]: line for line in csv.DictReader(file)}
    assert [(line["task"], line["metric"], line["seeds"]) for line in lines.values()] == [
        ("reviews", "accuracy", "2")
    ] * 2
    assert (lines["XDBERT-b"]["baseline"], lines["XDBERT-b"]["published"]) == ("BERT-b", "")
    assert lines["XDBERT-b"]["difference"] == "0.0"  # one encoder under two names
    report = (workplace / "report" / "report.md").read_text()
    assert "|  | Reviews |" in report
    assert "paper" not in report.split("##")[0].replace("that the paper does not have", "")
    run = workplace / "finetuned" / "xdbert-base" / "reviews" / "seed-1"
    predicted = [line.split("\t") for line in (run / "predictions" / "reviews.tsv").read_text().splitlines()]
    assert [row[0] for row in predicted] == ["index", "0", "1"]
    assert {row[1] for row in predicted[1:]} <= {"negative", "positive"}
    assert len((run / "predictions-dev.jsonl").read_text().splitlines()) == 20
    result = json.loads((workplace / "finetuned" / "order" / "order" / "seed-0" / "result.json").read_text())
    assert (result["title"], result["examples"], result["data"]["dev.txt"]["rows"]) == ("Order", 16, 16)
    shown = workplace / "finetuned" / "photo" / "photo" / "seed-0"
    assert json.loads((shown / "result.json").read_text())["settings"]["image"] == ["photo"]
    assert json.loads((shown / "model" / "config.json").read_text())["model_type"] == "visual_bert"
    monkeypatch.chdir(workplace)
    names, dev = {}, json.loads((shown / "predictions-dev.jsonl").read_text().splitlines()[0])
    block = BLOCKS["look.py"].replace(GOOD, dev["sentence1"]).replace('["1"]', str(dev["images"]))
    block = block.replace('return_tensors="pt"', 'return_tensors="pt", truncation=True, max_length=16')
    exec(compile(block, "docs/add-a-task.md", "exec"), names)
    assert names["scores"][0].tolist() == pytest.approx(dev["scores"], abs=1e-5)
    assert names["encoder"].config.id2label == {0: "false", 1: "true"}
    names = {}
    exec(compile(BLOCKS["classify.py"], "docs/add-a-task.md", "exec"), names)
    _, *lines = (run.with_name("seed-0") / "predictions" / "reviews.tsv").read_text().splitlines()
    found = names["classify"](["Fine.", "Dull."])  # the two unlabelled ones
    assert [one["label"] for one in found] == [line.split("\t")[1] for line in lines]


def test_every_description_of_the_page_is_a_task(workplace):
    found = {
        name: read_own_task(workplace / name).task()
        for name in BLOCKS
        if name.endswith(".yaml") and "settings" not in name
    }
    data = {Path(name).stem: task.read(workplace / "reviews") for name, task in found.items()}
    assert set(data) == {"reviews", "same", "ending", "stars", "photo"}
    shapes = {name: (one.task.sentences, one.task.choices, one.task.outputs) for name, one in data.items()}
    texts = {"reviews": (1, 0, 2), "same": (2, 0, 2), "ending": (2, 3, 1), "stars": (1, 0, 1)}
    assert shapes == texts | {"photo": (1, 0, 2)}
    assert {name: one.task.images for name, one in data.items()} == dict.fromkeys(texts, 0) | {"photo": 1}
    assert all(example.images == (str(int(example.id) % 4),) for example in data["photo"].train)
    assert data["same"].task.labels == ("false", "true")
    assert [example.label for example in data["ending"].train[:3]] == [int(e.id) % 3 for e in data["ending"].train[:3]]
    assert data["stars"].train[3].label == 4


def test_the_table_of_keys_and_metrics_is_whole():
    table = PAGE.partition("| key |")[2].partition("\n\n")[0]
    first = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert set(re.findall(r"`(\w+)`", "".join(first))) == set(OwnTask.model_fields)
    metrics = next(line for line in table.splitlines() if line.startswith("| `metrics`"))
    comparing = {name for name, metric in METRICS.items() if metric.of in ("classes", "numbers")}
    assert set(re.findall(r"`(\w+)`", metrics)) - {"metrics"} == comparing


def test_what_the_page_links_is_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_the_python_task_reads_pairs_and_smooths_its_labels(workplace):
    import torch

    names = {}
    exec(compile(BLOCKS["my-tasks/my_tasks.py"], "docs/add-a-task.md", "exec"), names)
    data = names["ORDER"].read(workplace / "data")
    assert [example.label for example in data.train[:2]] == [1, 0]
    lines = (workplace / "data" / "ORDER" / "train.txt").read_text().splitlines()
    assert data.train[0].texts == (tuple(lines[:2]),)
    assert data.train[1].texts == ((lines[3], lines[2]),)
    logits, real = torch.tensor([[100.0, -100.0], [0.0, 9.0]]), torch.tensor([True, False])
    loss, right = names["ORDER"].loss(logits, torch.tensor([0, -1]), real)
    assert loss.item() == pytest.approx(0.05 * 200)  # of the smoothed label one twentieth is the other class's
    assert right.item() == 1
