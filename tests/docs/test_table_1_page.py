"""Every command of docs/from-text-to-table-1.md is executed, in its order, at small scale.

They run unchanged except for the substitutions of `smaller` and of the workplace: a small text, encoder and task, fp32,
two CPU ranks, two steps, two seeds.
"""

import csv
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from-text-to-table-1.md").read_text(encoding="utf-8").replace(" \\\n    ", " ")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line.strip()
]
TRAINING = "training.steps=2 training.global_batch=4 run.eval_samples=4 model.language.name=./small-bert"
CLIP = "model.clip.name=clip-tiny.json model.clip.weights=random"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, cassette_model, wiki_text, fp32_configs):
    """A folder like the repository's root, with a small WikiText file, a small BERT and a small task."""
    folder = tmp_path_factory.mktemp("table-1")
    (folder / "ds_configs").symlink_to(fp32_configs)
    shutil.copytree(cassette_model, folder / "small-bert")
    articles = [article.splitlines() for article in wiki_text.read_text(encoding="utf-8").split("\n\n") if article]
    with (folder / "wiki.train.raw").open("w", encoding="utf-8") as file:
        for number, article in enumerate(articles):
            file.write(f" \n = Article {number} = \n \n")
            file.writelines(f" {paragraph} \n" for paragraph in article)
    (folder / "glue_data" / "CoLA").mkdir(parents=True)
    words = [" ".join(paragraph.split()[:12]) for article in articles for paragraph in article]
    for split, texts in {"train": words[:48], "dev": words[48:88]}.items():
        lines = [
            f"wiki\t{row % 2}\t\t{text if row % 2 else ' '.join(text.split()[::-1])}\n"
            for row, text in enumerate(texts)
        ]
        (folder / "glue_data" / "CoLA" / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def smaller(command):
    if "shards build" in command:
        command = command.replace("bert-base-uncased", "./small-bert").replace("--workers 8", "--workers 2")
        return f"{command} --validation-fraction 0.1"
    if "xdscale train" in command or "xdscale launch" in command:
        values = f"{TRAINING} {CLIP}" if "xdbert" in command else TRAINING
        command = command.replace("xdscale train", "xdscale train --ranks 2").replace(":8", ":1")
        if "launch" in command:
            command += " --deepspeed-config ds_configs/bert-base-zero2.json"
        return f"{command} {values}"
    if "xdscale finetune" in command:
        return re.sub(r"( --task \w+)+", " --task cola", command) + " --recipe quickstart --seeds 2"
    return command


@pytest.fixture(scope="module")
def printed(workplace, run_page):
    """What each command of the page printed."""
    return run_page({command: smaller(command) for command in COMMANDS}, workplace)


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_the_pages_commands_end_in_table_1(printed, workplace):
    assert [command.split()[0] for command in printed].count("xdscale") >= 10
    report = next(text for command, text in printed.items() if command.endswith("--out report"))
    assert re.search(r"CoLA: (\+|−)?\d+\.\d Matthews correlation \(95 % CI .* … .*\): .*BERT-b", report)
    with (workplace / "report" / "report.csv").open(newline="") as file:
        lines = {line["model"]: line for line in csv.DictReader(file)}
    assert {name: line["published"] for name, line in lines.items()} == {"BERT-b": "56.52", "XDBERT-b": "57.55"}
    assert (lines["XDBERT-b"]["baseline"], lines["XDBERT-b"]["seeds"]) == ("BERT-b", "2")
    with (workplace / "report" / "comparisons" / "cola-XDBERT-b.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 40
    with (workplace / "report-table-8" / "report.csv").open(newline="") as file:
        assert [line["published"] for line in csv.DictReader(file)] == ["59.05"]


def test_the_page_links_what_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    named = re.findall(r"`(xdbert-base-[\w-]+)`", PAGE)
    assert len(named) == 6
    assert [name for name in named if not (ROOT / "xdscale" / "recipes" / "xdbert" / f"{name}.yaml").exists()] == []
