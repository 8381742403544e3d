"""A small real task, and models to finetune on it."""

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def quickstart_task():
    """The script that writes the quickstart's task, as a module."""
    spec = importlib.util.spec_from_file_location("quickstart_task", ROOT / "scripts" / "quickstart_task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small_tasks(quickstart_task, wiki_dump, tmp_path_factory):
    """CoLA, own/person.yaml: sentences of persons' articles and others. MNLI, STS-B, RTE: a few rows of these."""
    folder = tmp_path_factory.mktemp("tasks")
    quickstart_task.write_task(wiki_dump, folder / "own")
    (folder / "CoLA").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        rows = [line.split("\t") for line in (folder / "own" / name).read_text().splitlines()[1:]]
        lines = [f"wiki\t{int(article == 'person')}\t\t{text}\n" for article, text in rows]
        (folder / "CoLA" / name).write_text("".join(lines), encoding="utf-8")
    texts = [text for _, text in rows]
    pairs = list(zip(texts, texts[1:]))

    def write(task, name, header, rows):
        (folder / task).mkdir(exist_ok=True)
        lines = ["\t".join(header), *("\t".join(map(str, row)) for row in rows)]
        (folder / task / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    words = ("entailment", "neutral", "contradiction")
    for number, name in enumerate(("train", "dev_matched", "dev_mismatched")):
        rows = [(n, a, b, words[(n + number) % 3]) for n, (a, b) in enumerate(pairs[:12])]
        write("MNLI", f"{name}.tsv", ("index", "sentence1", "sentence2", "gold_label"), rows)
    for name in ("train", "dev"):
        rows = [(n, a, b, n % 6 * 0.9) for n, (a, b) in enumerate(pairs[:12])]
        write("STS-B", f"{name}.tsv", ("index", "sentence1", "sentence2", "score"), rows)
        rows = [(n, a, b, ("entailment", "not_entailment")[n % 2]) for n, (a, b) in enumerate(pairs[:12])]
        write("RTE", f"{name}.tsv", ("index", "sentence1", "sentence2", "label"), rows)
    triples = enumerate(zip(texts, texts[1:13], texts[2:]))
    rows = [{"before": a, "a": b, "b": c, "c": a, "right": "xyz"[n % 3]} for n, (a, b, c) in triples]
    lines = [json.dumps({"text": text, "words": len(text.split()) / 10}) + "\n" for text in texts[:12]]
    for name in ("train", "dev"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "own" / f"{name}.parquet")
        (folder / "own" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "own" / "follows.yaml").write_text(
        "{title: Follows, train: train.parquet, dev: dev.parquet, text: before, choices: [a, b, c], label: right, "
        "labels: [x, y, z]}"
    )
    (folder / "own" / "length.yaml").write_text(
        "{train: train.jsonl, dev: dev.jsonl, test: dev.jsonl, text: text, target: words}"
    )
    (folder / "own" / "person.yml").write_bytes((folder / "own" / "person.yaml").read_bytes())
    for task in ("STS-B", "RTE"):
        write(
            task, "test.tsv", ("index", "sentence1", "sentence2"), [(n, a, b) for n, (a, b) in enumerate(pairs[20:27])]
        )
    return folder


@pytest.fixture(scope="session")
def full_model(cassette_model, tmp_path_factory):
    """A cross-modal model, not adapted, as `xdscale export` lays it out."""
    import torch

    from xdscale.recipes.xdbert.schema import XDBERTRecipe
    from xdscale.systems.xdbert import build_adaptation
    from xdscale.training.stored import save_full_model

    folder = tmp_path_factory.mktemp("full")
    spec = XDBERTRecipe(
        system="xdbert",
        model={"language": {"name": str(cassette_model)}, "clip": {"name": "clip-tiny.json", "weights": "random"}},
        data={"shards": "unused"},
        training={"steps": 1, "global_batch": 4},
        output={"folder": "unused"},
    )
    torch.manual_seed(0)
    save_full_model(spec, build_adaptation(spec).state_dict(), folder / "cross_modal")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((cassette_model / name).read_bytes())
    return folder


@pytest.fixture
def idle_workers(monkeypatch):
    """Workers that do nothing, where nothing is to be trained: real ones import for seconds until they are ended."""
    from xdscale.finetune import worker_process

    monkeypatch.setattr(worker_process, "PROGRAM", ("-S", "-c", "import time; time.sleep(600)"))
