"""`xdscale report` as its user meets it: tables, refusals, warnings, files."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from xdscale.errors import XdscaleError

PROGRAM = Path(sys.executable).with_name("xdscale")
SKILLS = {"rte": 0.66, "mrpc": 0.84, "stsb": 0.78, "cola": 0.79, "read": 0.5}
COMMON = {"epochs": 3, "batch": 32}
BETTER = {"rte": 0.69, "mrpc": 0.84, "stsb": 0.9, "cola": 0.79, "read": 0.8}


@pytest.fixture
def pair(write_sweep):
    """A baseline and a model that is much better at STS-B and READ."""
    return [write_sweep("BERT-b", SKILLS), write_sweep("XDBERT-b", BETTER)]


def results(sweep, task):
    return [json.loads(path.read_text()) for path in sorted((sweep / task).glob("seed-*/result.json"))]


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_medians_spreads_and_published_values(report, pair, tmp_path, capsys):
    lines = report(pair, tmp_path / "out")
    for sweep in pair:
        for task in SKILLS:
            scores = [result["score"]["value"] for result in results(sweep, task)]
            line = lines[sweep.name, task]
            found = [float(line[name]) for name in ("median", "min", "max")]
            assert found == pytest.approx([median(scores), min(scores), max(scores)])
    printed = {key: line["published"] for key, line in lines.items()}
    assert (printed["BERT-b", "rte"], printed["XDBERT-b", "cola"], printed["BERT-b", "read"]) == ("66.43", "57.55", "")
    table = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").split("\n## ")[0]
    scores = [100 * result["score"]["value"] for result in results(pair[1], "mrpc")]
    assert f"{median(scores):.2f} ({min(scores):.2f}–{max(scores):.2f})" in table
    assert "| *XDBERT-b (paper)* | *69.31* | *88.02* | *89.32* | *57.55* | *92.78* |" in table
    assert [cell.strip() for cell in table.splitlines()[4].split("|")[2:-1]] == [
        "RTE", "MRPC", "STSB", "CoLA", "SST2", "QNLI", "QQP", "MNLI", "SWAG", "READ↓",
    ]  # fmt: skip
    printed = capsys.readouterr()
    assert re.search(r"READ: −0\.\d\d RMSE \(95 % CI −0\.\d\d … −0\.\d\d\): better than BERT-b, beyond", printed.out)
    assert re.search(r"MRPC: .* not distinguishable from BERT-b with these 408 examples\.", printed.out)
    assert "BERT-b, RTE: 5 seeds, the paper's median is of 9" in printed.err


def test_differences_and_examples(report, pair, tmp_path):
    lines = report(pair, tmp_path / "out")
    for task in ("rte", "cola"):
        counts = []
        for sweep in pair:
            files = sorted((sweep / task).glob("seed-*/predictions-dev.jsonl"))
            counts.append(sum(np.array([json.loads(x)["correct"] for x in f.read_text().splitlines()]) for f in files))
        line = lines["XDBERT-b", task]
        assert int(line["improved"]) == sum(counts[1] > counts[0])
        assert int(line["worsened"]) == sum(counts[1] < counts[0])
        means = [np.mean([result["score"]["value"] for result in results(sweep, task)]) for sweep in pair]
        assert float(line["difference"]) == pytest.approx(means[1] - means[0])
        assert float(line["ci_low"]) < float(line["difference"]) < float(line["ci_high"])
        with (tmp_path / "out" / "comparisons" / f"{task}-XDBERT-b.csv").open(newline="", encoding="utf-8") as file:
            examples = list(csv.DictReader(file))
        assert list(examples[0]) == ["id", "sentence1", "sentence2", "correct_baseline", "correct_ours"]
        assert [int(example["correct_baseline"]) for example in examples] == counts[0].tolist()
        assert [int(example["correct_ours"]) for example in examples] == counts[1].tolist()
        second = "Hypothesis, “1”." if task == "rte" else ""
        assert (examples[1]["id"], examples[1]["sentence1"]) == ("1001", "Premise 1, said\nA.")
        assert examples[1]["sentence2"] == second


def test_regression_counts_the_nearer_answers(report, pair, tmp_path):
    lines = report(pair, tmp_path / "out")
    errors = []
    for sweep in pair:
        files = sorted((sweep / "read").glob("seed-*/predictions-dev.jsonl"))
        errors.append(np.array([[json.loads(x)["squared_error"] for x in f.read_text().splitlines()] for f in files]))
    wins = (errors[1] < errors[0]).sum(0)
    assert int(lines["XDBERT-b", "read"]["improved"]) == sum(wins > 5 - wins)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"settings": COMMON | {"learning_rate": 2e-5, "max_length": 128}}, "learning_rate is 2e-05, there 0.0001"),
        ({"settings": COMMON | {"learning_rate": 1e-4}}, "max_length is not set, there 128"),
        ({"data": {"dev.tsv": {"sha256": "0" * 64, "rows": 277}}}, "train.tsv was read only there"),
    ],
)  # fmt: skip
def test_refuses_other_settings_and_data(report, pair, tmp_path, values, message):
    for path in (pair[1] / "rte").glob("*/result.json"):
        change(path, **values)
    with pytest.raises(XdscaleError, match=re.escape(message)) as caught:
        report(pair, tmp_path / "out")
    assert "XDBERT-b/rte/seed-0: cannot be compared with" in str(caught.value)
    assert str(caught.value).endswith(f"report of each by itself: 'xdscale report {pair[1]}'")
    assert not (tmp_path / "out").exists()
    report(pair[1:], tmp_path / "alone")  # which can be done


def test_names_rows_before_hashes_and_at_most_five_differences(report, pair, tmp_path):
    other = {f"file-{number}": {"sha256": "0", "rows": number} for number in range(6)}
    for path in (pair[1] / "rte").glob("*/result.json"):
        change(path, data=other | {"dev.tsv": {"sha256": "1", "rows": 3}, "train.tsv": {"sha256": "1", "rows": 2490}})
    with pytest.raises(XdscaleError) as caught:
        report(pair, tmp_path / "out")
    assert "dev.tsv has 3 rows, there 277" in str(caught.value)
    assert "and 3 more" in str(caught.value)


def test_refuses_a_sweep_whose_own_seeds_differ(report, write_sweep, tmp_path):
    sweep = write_sweep("BERT-b", {"rte": 0.7})
    path = sweep / "rte" / "seed-3" / "result.json"
    change(path, settings=json.loads(path.read_text())["settings"] | {"epochs": 4})
    told = "seed-3: cannot be compared .*\n *epochs is 4, there 3\nseeds of one sweep must be alike: finetune this task"
    with pytest.raises(XdscaleError, match=told):
        report([sweep], tmp_path / "out")


def test_unfinished_seeds_are_shown_and_warned_of_but_not_compared(report, write_sweep, tmp_path, capsys):
    runs = [write_sweep("BERT-b", {"rte": 0.7}), write_sweep("XDBERT-b", {"rte": 0.7}, unfinished=(1, 4))]
    lines = report(runs, tmp_path / "out")
    assert (lines["XDBERT-b", "rte"]["seeds"], lines["XDBERT-b", "rte"]["seeds_planned"]) == ("3", "5")
    assert lines["XDBERT-b", "rte"]["difference"] == ""
    printed = capsys.readouterr()
    assert "warning: XDBERT-b, RTE: 3 of 5 seeds are finished" in printed.err
    assert "no paired statistics, because the finished seeds differ: 0, 2, 3 of XDBERT-b, 0, 1, 2, 3, 4" in printed.err
    assert "3 of 5 seeds" in printed.out


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sweep.json", None, "has no sweep.json; expected a folder written by 'xdscale finetune"),
        ("sweep.json", "{", r"sweep\.json: not JSON: "),
        ("rte/seed-1/result.json", '{"format": 2}', r"result\.json: format = 2: expected 1"),
        ("rte/seed-1/predictions-dev.jsonl", None, r"predictions-dev.jsonl: is missing"),
        ("rte/seed-1/predictions-dev.jsonl", "", r"predictions-dev.jsonl: holds no examples"),
        (
            "rte/seed-1/predictions-dev.jsonl",
            '{"index": 0}\n',
            r"predictions-dev\.jsonl, line 1: id is missing; found 'index'",
        ),
        ("rte/seed-1/predictions-dev.jsonl", b"\xff", r"predictions-dev\.jsonl, line 1: not JSON"),
    ],
)
def test_a_broken_file_is_named(report, write_sweep, tmp_path, file, content, message):
    sweep = write_sweep("BERT-b", {"rte": 0.7}, seeds=2)
    if content is None:
        (sweep / file).unlink()
    else:
        (sweep / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(XdscaleError, match=message):
        report([sweep], tmp_path / "out")


@pytest.mark.parametrize("task", ["../BERT-b/rte", "link/../rte", "/rte", ".", "..", ""])
def test_a_task_that_would_write_elsewhere_is_refused(report, write_sweep, tmp_path, task):
    """A sweep may come from anywhere, and the report writes a file by each task's name."""
    sweep = write_sweep("BERT-b", {"rte": 0.7}, seeds=2)
    change(sweep / "sweep.json", tasks={task: {"seeds": [0, 1]}})
    with pytest.raises(XdscaleError, match=r"sweep\.json: tasks\..*: String should match pattern"):
        report([sweep], tmp_path / "out")


def test_a_changed_prediction_a_lost_line_and_other_examples_are_found(report, write_sweep, tmp_path):
    sweep = write_sweep("BERT-b", {"rte": 0.7}, seeds=2)
    path = sweep / "rte" / "seed-1" / "predictions-dev.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    path.write_text("".join([json.dumps(first | {"prediction": 1 - first["prediction"]}) + "\n", *lines[1:]]))
    with pytest.raises(XdscaleError, match="its accuracy is .* says .*; one of them was changed"):
        report([sweep], tmp_path / "out")
    path.write_text("".join(lines[:5] + lines[6:]))
    with pytest.raises(XdscaleError, match="line 6: index 6, expected 5"):
        report([sweep], tmp_path / "out")
    path.write_text("".join([json.dumps(first | {"id": "other"}) + "\n", *lines[1:]]))
    with pytest.raises(XdscaleError, match="seed-1: holds other examples than .*seed-0"):
        report([sweep], tmp_path / "out")


class Page(HTMLParser):
    """Notes tags, whatever would be fetched, ids, and that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched, self.ids, self.open = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "br"):
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(report, pair, write_sweep, tmp_path, capsys):
    sly = "<script>alert(1)</script> & $x$ [b]"
    runs = [*pair, write_sweep(sly, {"rte": 0.7}, folder="sly")]
    report(runs, tmp_path / "out")
    assert f"{sly} against BERT-b" in capsys.readouterr().out
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 2 * len(SKILLS)
    assert all(target.startswith("#") for target in page.fetched)
    assert {target[1:] for target in page.fetched} <= set(page.ids)
    assert re.findall(r"(?:url\(|@import)(?!#)", text) == []
    assert "prefers-color-scheme: dark" in text
    used, defined = set(re.findall(r"var\((--[\w-]+)\)", text)), re.findall(r"(--[\w-]+):", text)
    assert {"--model-0", "--model-1", "--model-2", "--paper", "--text"} <= used
    assert all(defined.count(name) == 2 for name in used)  # once for light, once for dark
    assert re.findall(r"#(?:0[123]0[123]0[123]|1000\d\d)", text) == []


def test_the_command(pair, tmp_path):
    done = subprocess.run(
        [PROGRAM, "report", *pair, "--out", tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    assert "XDBERT-b against BERT-b" in done.stdout
    wrong = subprocess.run([PROGRAM, "report", "x", "--layout", "table-2"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: --layout table-2: expected one of table-1, table-3, table-8, visualbert, "
        "visualbert-ablations, vlbert\n",
    )  # fmt: skip


def test_needs_no_torch(pair, tmp_path):
    code = (
        "import sys; from pathlib import Path; from xdscale.report.command import make_report;"
        f"run, out = Path({str(pair[0])!r}), Path({str(tmp_path / 'out')!r});"
        "make_report([run], layout='table-1', baselines=[], metrics=[], out=out);"
        "assert not {'torch', 'deepspeed', 'transformers', 'sklearn', 'scipy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def model(sweep, **values):
    stored = json.loads((sweep / "sweep.json").read_text())
    change(sweep / "sweep.json", model=stored["model"] | values)


@pytest.mark.parametrize(
    ("ours", "theirs", "warning"),
    [
        ({"subject": "cross-modal"}, {}, "unlike subjects, cross-modal and language: they differ in parameters"),
        ({"subject": "clip"}, {}, "unlike subjects, clip and language"),
        (
            {"encoder": "electra, 12 layers of 768"},
            {"encoder": "bert, 12 layers of 768"},
            "unlike encoders, electra, 12 layers of 768 and bert, 12 layers of 768",
        ),
        ({}, {}, "the same weights (SHA-256 abababababab…), a model against itself"),
        ({"weights_sha256": "cd" * 32}, {"encoder": "bert"}, None),
    ],
)
def test_unlike_models_are_compared_with_a_warning_in_every_form(
    report, write_sweep, tmp_path, capsys, ours, theirs, warning
):
    runs = [write_sweep("BERT-b", {"rte": 0.6}), write_sweep("XDBERT-b", {"rte": 0.9})]
    model(runs[0], **theirs)
    model(runs[1], **ours)
    assert report(runs, tmp_path / "out")["XDBERT-b", "rte"]["verdict"] == "better"
    texts = [(tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")]
    texts.append(capsys.readouterr().err)
    if warning is None:
        assert not any("XDBERT-b against BERT-b: " in text for text in texts)
    else:
        assert all(f"XDBERT-b against BERT-b: {warning}" in text for text in texts)


def test_a_copy_is_named_and_a_folder_counts_once(report, write_sweep, tmp_path, capsys):
    first = write_sweep("BERT-b", {"rte": 0.7, "cola": 0.8}, seeds=2)
    shutil.copytree(first, tmp_path / "copy")
    model(tmp_path / "copy", label="XDBERT-b", weights_sha256="cd" * 32)
    report([first, tmp_path / "copy"], tmp_path / "out")
    assert "all answers are the same in every seed; is one a copy of the other?" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(first)
    for again in (first, tmp_path / "link"):
        with pytest.raises(XdscaleError, match="are one folder; name each run once"):
            report([first, again], tmp_path / "other")


def test_labels_that_would_share_a_file_are_refused(report, write_sweep, tmp_path):
    runs = [write_sweep(label, {"rte": 0.7}, seeds=1) for label in ("X 1", "X-1")]
    with pytest.raises(XdscaleError, match="labelled 'X 1' and 'X-1', alike; change model.label"):
        report(runs, tmp_path / "out")


def test_a_task_that_one_of_two_lacks_is_said(report, write_sweep, tmp_path, capsys):
    runs = [write_sweep("BERT-b", {"rte": 0.7, "cola": 0.8}), write_sweep("XDBERT-b", {"rte": 0.7, "read": 0.8})]
    report(runs, tmp_path / "out")
    printed = capsys.readouterr().err
    assert "CoLA: XDBERT-b is not compared: XDBERT-b has no finished seed" in printed
    assert "READ: XDBERT-b is not compared: BERT-b has no finished seed" in printed


PIXELS = {"weights": None, "short_side": 600, "long_side": 1000}


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ({"weights_sha256": "ab", "pixels": None}, {"weights_sha256": "cd", "pixels": None}),
        ({"weights_sha256": None, "pixels": None}, {"weights_sha256": None, "pixels": PIXELS}),
        ({"weights_sha256": "ab", "pixels": PIXELS}, {"weights_sha256": "ab", "pixels": PIXELS | {"long_side": 1200}}),
    ],
)
def test_seeds_of_another_model_are_never_averaged(report, write_sweep, tmp_path, own, other):
    """Such as one from pixels among those from features, copied together by hand."""
    sweep = write_sweep("VL-BERT", {"vqa": 0.7}, seeds=3)
    for seed in range(3):
        change(sweep / "vqa" / f"seed-{seed}" / "result.json", model=own)
    report([sweep], tmp_path / "out", layout="vlbert")
    change(sweep / "vqa" / "seed-1" / "result.json", model=other)
    with pytest.raises(XdscaleError, match="vqa/seed-1: is a run of another model than .*vqa/seed-0 "):
        report([sweep], tmp_path / "other", layout="vlbert")


def test_a_seed_that_is_named_twice_counts_once(report, write_sweep, tmp_path):
    sweep = write_sweep("BERT-b", {"rte": 0.7}, seeds=1)
    change(sweep / "sweep.json", tasks={"rte": {"seeds": [0, 0, 0]}})
    line = report([sweep], tmp_path / "out")["BERT-b", "rte"]
    assert (line["seeds"], line["seeds_planned"]) == ("1", "1")


def test_every_figure_says_in_words_what_it_shows(report, pair, tmp_path):
    report(pair, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r'<svg role="img" aria-label="([^"]*)"', text)
    assert len(figures) == text.count("<svg") == 2 * len(SKILLS)
    boxes, curves = figures[::2], figures[1::2]
    scores = [100 * result["score"]["value"] for result in results(pair[0], "rte")]
    assert f"BERT-b {median(scores):.2f} ({min(scores):.2f}–{max(scores):.2f}, 5 seeds), paper 66.43" in boxes[0]
    losses = [[point["loss"] for point in result["curve"]] for result in results(pair[0], "rte")]
    ends = median(loss[0] for loss in losses), median(loss[-1] for loss in losses)
    expected = f"RTE: training loss, BERT-b from {ends[0]:.3f} at step 10 to {ends[1]:.3f} at step 240 (5 seeds)"
    assert curves[0].startswith(expected)


def full(path):
    """Makes a file's name stand for a disk without space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/full")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda out: out.write_text("thesis"), "--out .*: exists and is not a folder"),
        (lambda out: out.symlink_to("nowhere"), "--out .*: exists and is not a folder"),
        (lambda out: out.parent.joinpath("file").write_text("x") and out.symlink_to("file"), "is not a folder"),
        (lambda out: full(out / "report.md"), r"report\.md: cannot be written: No space left on device"),
        (lambda out: full(out / "report.html"), r"report\.html: cannot be written: No space left on device"),
        (lambda out: (out / "report.csv").mkdir(parents=True), r"report\.csv: cannot be written: it is a folder"),
    ],
)
def test_outputs_that_cannot_be_written_leave_everything_as_it_was(report, write_sweep, tmp_path, prepare, message):
    sweep = write_sweep("BERT-b", {"rte": 0.7}, seeds=1)
    prepare(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(XdscaleError, match=message):
        report([sweep], tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("/dev/full").is_char_device()


def test_a_report_may_be_written_where_one_stands(report, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        report(pair, Path("."))
    assert (tmp_path / "report.html").is_file()
