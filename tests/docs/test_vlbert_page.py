"""Every command of docs/from-pixels-to-vcr-and-refcoco.md is executed, in its order, at small scale.

They run unchanged except for the substitutions of `smaller`: drawn pictures, a small encoder and a small trunk, fp32,
two CPU ranks, few steps.
"""

import base64
import csv
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from-pixels-to-vcr-and-refcoco.md").read_text(encoding="utf-8").replace(" \\\n    ", " ")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    command
    for block in BLOCKS
    for command in ([block] if "<<" in block else [line for line in block.splitlines() if line.strip()])
]
CLASSES = 1601


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, cassette_model, wiki_text, fp32_configs):
    """A folder with the downloads in their public forms, of the picture world."""
    import torch
    from torchvision.models.resnet import Bottleneck, ResNet

    folder = tmp_path_factory.mktemp("vlbert")
    world, data = folder / "world", folder / "data"
    for drawn in (["coco", "--train", "24", "--val", "1"], ["vcr", "refcoco", "--train", "12", "--val", "3"]):
        draw = [sys.executable, "-m", "picture_world", str(world), "--only", *drawn]
        subprocess.run(draw, env={"PYTHONPATH": str(ROOT / "scripts")}, check=True)
    boxes = json.loads((world / "boxes.json").read_text())
    (folder / "ds_configs").symlink_to(fp32_configs)
    shutil.copytree(cassette_model, folder / "small-bert")
    data.mkdir()
    (world / "VCR").rename(data / "VCR")
    (world / "RefCOCO" / "refcoco+").rename(data / "refcoco+")
    (world / "RefCOCO" / "images" / "train2014").rename(folder / "train2014")
    _write_captioned(folder, world / "COCO", boxes)
    lines = wiki_text.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, name in enumerate(("bc1g.txt", "wiki.txt")):
        (folder / name).write_text("".join(lines[number::2]), encoding="utf-8")
    detections = [
        {"image_id": int(path.stem[-12:]), "category_id": 1, "box": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for path in (folder / "train2014").iterdir()
        for (x1, y1, x2, y2), score in zip(*boxes[path.stem].values())
    ]
    (folder / "res101_coco_minus_refer_notime_dets.json").write_text(json.dumps(detections))
    torch.manual_seed(0)
    torch.save(
        ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=16).state_dict(), folder / "resnet101-pt-vgbua-0000.model"
    )
    return folder


def _write_captioned(folder, coco, boxes):
    """Conceptual Captions in the release's form: of COCO's pictures, the first caption of each."""
    values, rng = json.loads((coco / "annotations" / "captions_train2014.json").read_text()), np.random.default_rng(0)
    (folder / "train_image").mkdir()
    lines = []
    with zipfile.ZipFile(folder / "train_frcnn.zip", "w") as archive:
        for number, image in enumerate(values["images"]):
            mine = np.array(boxes[Path(image["file_name"]).stem]["boxes"], "<f4")
            found = {"boxes": mine, "classes": rng.dirichlet(np.ones(CLASSES), len(mine)).astype("<f4")}
            entry = {name: base64.b64encode(array.tobytes()).decode() for name, array in found.items()}
            entry |= {"image_w": image["width"], "image_h": image["height"], "num_boxes": len(mine)}
            archive.writestr(f"{number:08}.json", json.dumps(entry))
            (coco / "train2014" / image["file_name"]).rename(folder / "train_image" / f"{number:08}.jpg")
            caption = next(row["caption"] for row in values["annotations"] if row["image_id"] == image["id"])
            names = {"image": f"train_image.zip@/{number:08}.jpg", "frcnn": f"train_frcnn.zip@/{number:08}.json"}
            lines.append(json.dumps(names | {"caption": caption.lower().rstrip(".").split()}) + "\n")
    (folder / "train_frcnn.json").write_text("".join(lines))


def smaller(command):
    command = command.replace("bert-base-uncased", "./small-bert").replace("--workers 8", "--workers 2")
    if "shards captions" in command or "shards build" in command:
        return f"{command} --validation-fraction 0.1"
    if "regions extract" in command:
        return f"{command.replace('resnet101', 'resnet14')} --short-side 64"
    if "xdscale train" in command:
        values = "training.steps=2 training.global_batch=4 run.eval_samples=4 run.eval_every=1 model.max_elements=32"
        values += " model.pixels.short_side=48 model.pixels.long_side=64 model.language.name=./small-bert"
        return f"{command} --ranks 2 --deepspeed-config ds_configs/bert-base-zero1.json {values}"
    if "xdscale finetune" in command:
        return (
            f"{command} training.epochs=1 training.global_batch=8 model.pixels.short_side=48 model.pixels.long_side=64"
        )
    return command


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_the_pages_commands_end_in_numbers_beside_the_published_ones(workplace, run_page):
    printed = run_page({command: smaller(command) for command in COMMANDS}, workplace)
    assert len(printed) == len(COMMANDS) >= 18
    metrics = {}
    for place in ("vlbert", "vlbert-gold"):
        path = workplace / "finetuned" / place / "refcoco_plus" / "seed-0" / "result.json"
        metrics[place] = json.loads(path.read_text())["metrics"]
        for split in ("", "_testA", "_testB"):  # each thing has a box that overlaps with it
            assert metrics[place][f"upper_bound{split}"] == 1
            assert 0 <= metrics[place][f"recall_at_1{split}"] < 1
    with (workplace / "report" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    published = {"vcr_qa": "73.8", "vcr_qar": "74.4", "vcr_q2ar": "55.2", "refcoco_plus": "71.6"}
    assert {row["task"]: row["published"] for row in rows} == published


def test_the_page_links_what_exists_and_names_recipes_that_ship():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    recipes = {path.stem for path in (ROOT / "xdscale" / "recipes").rglob("*.yaml")}
    named = set(re.findall(r"(?:xdscale train|--recipe|`)\s?(vlbert-(?!base\b |gold)[\w-]+)", PAGE))
    assert {"vlbert-base-e2e", "vlbert-vcr-answer-e2e", "vlbert-refcoco-e2e"} <= named <= recipes


def test_the_page_has_the_papers_numbers():
    published = (ROOT / "xdscale" / "report" / "tables" / "vlbert.yaml").read_text(encoding="utf-8")
    (row,) = re.findall(r"VL-BERT-b, also: .*?values: \[(.*?)\]", published)
    for value in row.split(", ")[1:]:
        assert value in PAGE
