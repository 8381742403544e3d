"""Every command of docs/from-features-to-vqa.md is executed, in its order, at small scale.

They run unchanged except for the substitutions of `smaller`: a few pictures, a small encoder, fp32, two CPU ranks, few
steps.
"""

import base64
import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from-features-to-vqa.md").read_text(encoding="utf-8").replace(" \\\n    ", " ")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line.strip()
]
WIDTH = 2048
COLOURS = ("red", "green", "blue")
TRAIN, HELD_OUT = 60, 15


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, cassette_model, fp32_configs):
    """A folder with the downloads in their public forms: pictures of one colour each."""
    folder, rng = tmp_path_factory.mktemp("vqa"), np.random.default_rng(0)
    (folder / "ds_configs").symlink_to(fp32_configs)
    shutil.copytree(cassette_model, folder / "small-bert")
    names = rng.standard_normal((3, WIDTH)).astype("<f4")
    with (folder / "trainval_36.tsv").open("w") as trainval, (folder / "test2015_36.tsv").open("w") as test:
        for number in range(TRAIN + 2 * HELD_OUT):
            corners = np.sort(rng.uniform(0, 99, (3, 2, 2)), axis=1).reshape(3, 4).astype("<f4")
            features = np.abs(names[number % 3] + 0.1 * rng.standard_normal((3, WIDTH)).astype("<f4"))
            cells = (base64.b64encode(array.tobytes()).decode() for array in (corners, features))
            file = trainval if number < TRAIN + HELD_OUT else test
            file.write("\t".join([str(number + 1), "100", "100", "3", *cells]) + "\n")
    (folder / "data" / "VQA").mkdir(parents=True)
    for split, numbers in (("train", range(TRAIN)), ("val", range(TRAIN, TRAIN + HELD_OUT))):
        _write_captions(folder / f"captions_{split}2014.json", split, numbers)
        _write_questions(folder / "data" / "VQA", split, numbers)
    _write_questions(folder / "data" / "VQA", "test", range(TRAIN + HELD_OUT, TRAIN + 2 * HELD_OUT))
    return folder


def _write_captions(path, split, numbers):
    images = [{"id": number + 1, "file_name": f"COCO_{split}2014_{number + 1:012}.jpg"} for number in numbers]
    texts = ("A {} wall.", "Everything here is {}.")
    annotations = [
        {"image_id": number + 1, "id": 10 * number + place, "caption": text.format(COLOURS[number % 3])}
        for number in numbers
        for place, text in enumerate(texts)
    ]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))


def _write_questions(folder, split, numbers):
    questions, annotations = [], []
    for number in numbers:
        about, colour = {"question_id": number, "image_id": number + 1}, COLOURS[number % 3]
        questions.append(about | {"question": "What colour is it?"})
        answers = [{"answer": colour, "answer_confidence": "yes", "answer_id": place + 1} for place in range(10)]
        annotations.append(about | {"multiple_choice_answer": colour, "answers": answers})
    year = "2015" if split == "test" else "2014"
    name = f"v2_OpenEnded_mscoco_{split}{year}_questions.json"
    (folder / name).write_text(json.dumps({"questions": questions}))
    if split != "test":
        (folder / f"v2_mscoco_{split}{year}_annotations.json").write_text(json.dumps({"annotations": annotations}))


def smaller(command):
    command = command.replace("bert-base-uncased", "./small-bert").replace("--workers 8", "--workers 2")
    if "shards captions" in command:
        return f"{command} --validation-fraction 0.1"
    if "xdscale train" in command:
        values = "training.steps=2 training.global_batch=4 run.eval_samples=4 run.eval_every=1 model.max_text=32"
        command = command.replace("bert-base-zero1", "ds_configs/bert-base-zero1.json")
        command = command.replace("xdscale train", "xdscale train --ranks 2")
        return f"{command} {values} model.language.name=./small-bert model.freeze_pooler=false"
    if "xdscale finetune" in command:
        return f"{command} optim.learning_rate=1e-3 training.epochs=6 training.global_batch=8 model.freeze_pooler=false"
    return command


@pytest.fixture(scope="module")
def printed(workplace, run_page):
    """What each command of the page printed."""
    return run_page({command: smaller(command) for command in COMMANDS}, workplace)


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_the_pages_commands_end_in_a_number_beside_the_published_one(printed, workplace):
    assert len(printed) == len(COMMANDS) >= 8
    result = json.loads((workplace / "finetuned" / "visualbert" / "vqa" / "seed-0" / "result.json").read_text())
    assert result["metrics"]["vqa_accuracy"] > 0.6  # the question says nothing: text alone is right in a third
    answers = workplace / re.search(r"`(finetuned/\S+_results\.json)`", PAGE)[1]
    assert {answer["answer"] for answer in json.loads(answers.read_text())} <= set(COLOURS)
    with (workplace / "report" / "report.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["task"] in ("vqa", "VQA v2")


def test_the_page_links_what_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    recipes = {path.stem for path in (ROOT / "xdscale" / "recipes" / "visualbert").glob("*.yaml")}
    assert set(re.findall(r"`(visualbert-vqa-coco[\w-]*)`", PAGE)) <= recipes
