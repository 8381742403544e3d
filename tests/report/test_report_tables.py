"""The tables of `xdscale report`: rows, columns of tasks, credits, marks, published values."""

import csv
import json
import re
import shutil
from statistics import median

import numpy as np
import pytest

from xdscale.errors import XdscaleError
from xdscale.report.assemble import assemble
from xdscale.report.published import layouts
from xdscale.report.sweep import read_sweep
from xdscale.report.text import terminal_table


def scores_of(sweep, task, metric):
    """A metric of each seed, as the runs themselves state it."""
    results = (json.loads(path.read_text()) for path in sorted((sweep / task).glob("seed-*/result.json")))
    return [result["metrics"][metric] for result in results]


def test_each_run_belongs_to_the_baseline_before_it(report, write_sweep, tmp_path):
    names = ["BERT-b", "XDBERT-b", "ELECTRA-b", "XDELECTRA-b"]
    runs = [write_sweep(n, {"rte": 0.7}, settings={"lr": 1}, seeds=2) for n in names[:2]]
    runs += [write_sweep(name, {"rte": 0.75}, settings={"lr": 2}, seeds=2) for name in names[2:]]
    lines = report(runs, tmp_path / "out", baselines=["BERT-b", "ELECTRA-b"])
    assert [lines[name, "rte"]["baseline"] for name in names] == ["", "BERT-b", "", "ELECTRA-b"]
    with pytest.raises(XdscaleError, match="lr is 2, there 1"):
        report(runs, tmp_path / "other")
    with pytest.raises(XdscaleError, match="--baseline BERT: no run has this label; they are BERT-b, XDBERT-b"):
        report(runs, tmp_path / "other", baselines=["BERT"])


def test_a_single_difference_is_named_alone(report, write_sweep, tmp_path):
    lengths = {"BERT-b": 128, "XDBERT-b": 64}
    runs = [write_sweep(name, {"rte": 0.7}, seeds=1, settings={"max_length": n}) for name, n in lengths.items()]
    with pytest.raises(XdscaleError) as caught:
        report(runs, tmp_path / "out")
    theirs, ours = (sweep / "rte" / "seed-0" for sweep in runs)
    assert str(caught.value) == (
        f"{ours}: cannot be compared with {theirs}:\n  max_length is 64, there 128\n"
        "finetune both with the same files and settings, name another --baseline, or have a report of each by itself: "
        f"'xdscale report {runs[1]}'"
    )


def test_two_runs_of_one_label_are_refused(report, write_sweep, tmp_path):
    runs = [write_sweep("BERT-b", {"rte": 0.7}, seeds=1, folder=name) for name in ("a", "b")]
    with pytest.raises(XdscaleError, match="both labelled 'BERT-b'"):
        report(runs, tmp_path / "out")


def test_tables_3_and_8(report, write_sweep, tmp_path, capsys):
    runs = [
        write_sweep(name, {"rte": 0.7, "sst2": 0.9}, seeds=2) for name in ("xdbert-base-wikitext103", "xdbert-base-mlm")
    ]
    lines = report(runs, tmp_path / "three", layout="table-3")
    assert {key: line["published"] for key, line in lines.items()} == {
        ("xdbert-base-wikitext103", "rte"): "69.31",
        ("xdbert-base-mlm", "rte"): "68.23",
    }
    assert "xdbert-base-mlm: sst2 left out, which Table 3 does not have" in capsys.readouterr().err
    full = [write_sweep("XBERT-b", {"cola": 0.8}, seeds=2), write_sweep("XELECTRA-b", {"cola": 0.8}, seeds=2)]
    lines = report(full, tmp_path / "eight", layout="table-8")
    assert {line["published"] for line in lines.values()} == {"59.05", "66.8"}
    assert {line["baseline"] for line in lines.values()} == {""}


def test_another_metric(report, write_sweep, tmp_path):
    sweep = write_sweep("BERT-b", {"mrpc": 0.8, "mnli": 0.8}, seeds=2)
    chosen = ["mrpc=accuracy", "mnli=accuracy_mismatched"]
    lines = report([sweep], tmp_path / "out", metrics=chosen)
    expected = median(scores_of(sweep, "mrpc", "accuracy"))
    assert float(lines["BERT-b", "mrpc"]["median"]) == pytest.approx(expected)
    assert lines["BERT-b", "mrpc"]["published"] == ""
    assert float(lines["BERT-b", "mnli"]["median"]) == 1
    with pytest.raises(XdscaleError, match="--metric mrpc=f2: .* has f1, accuracy"):
        report([sweep], tmp_path / "other", metrics=["mrpc=f2"])
    with pytest.raises(XdscaleError, match="--metric mprc=f1: expected TASK=METRIC"):
        report([sweep], tmp_path / "other", metrics=["mprc=f1"])


def test_a_further_split_is_told_from_the_longest_name_of_a_metric(report, write_sweep, tmp_path):
    """pearson_spearman_half is pearson_spearman of half, not pearson of spearman_half."""
    sweep = write_sweep("BERT-b", {"stsb": 0.8}, seeds=1)
    (result,) = sweep.glob("stsb/seed-0/result.json")
    stored = json.loads(result.read_text())
    stored["metrics"]["pearson_spearman_half"] = stored["metrics"]["pearson_spearman"]
    result.write_text(json.dumps(stored))
    shutil.copy(result.with_name("predictions-dev.jsonl"), result.with_name("predictions-half.jsonl"))
    lines = report([sweep], tmp_path / "out", metrics=["stsb=pearson_spearman_half"])
    assert lines["BERT-b", "stsb"]["metric"] == "pearson_spearman"
    assert float(lines["BERT-b", "stsb"]["median"]) == stored["score"]["value"]
    stored["score"]["name"] = "no_metric"
    result.write_text(json.dumps(stored))
    with pytest.raises(XdscaleError, match=r"result\.json: unknown metric 'no_metric'; known: accuracy"):
        report([sweep], tmp_path / "other")


def columns(folder):
    """The heads of the table of a written report."""
    table = (folder / "report.md").read_text(encoding="utf-8").split("\n\n")[2]
    return [cell.strip() for cell in table.splitlines()[0].split("|")[2:-1]]


def test_a_task_that_the_paper_does_not_have_gets_a_column_of_its_own(report, write_sweep, tmp_path, capsys):
    runs = [write_sweep("BERT-b", {"rte": 0.7, "reviews": 0.6}), write_sweep("XDBERT-b", {"rte": 0.7, "reviews": 0.95})]
    lines = report(runs, tmp_path / "out")
    assert columns(tmp_path / "out") == [
        "RTE", "MRPC", "STSB", "CoLA", "SST2", "QNLI", "QQP", "MNLI", "SWAG", "READ↓", "REVIEWS",
    ]  # fmt: skip
    line = lines["XDBERT-b", "reviews"]
    scores = scores_of(runs[1], "reviews", "macro_f1")
    assert (line["metric"], line["published"], line["verdict"]) == ("macro_f1", "", "better")
    assert float(line["median"]) == pytest.approx(median(scores))
    assert (tmp_path / "out" / "comparisons" / "reviews-XDBERT-b.csv").is_file()
    printed = capsys.readouterr()
    assert re.search(r"REVIEWS: \+\d+\.\d macro F1 \(95 % CI .*\): better than BERT-b, beyond", printed.out)
    assert "Mean of RTE, REVIEWS: " in printed.out
    assert "REVIEWS" not in printed.err
    lines = report(runs, tmp_path / "three", layout="table-3", metrics=["reviews=accuracy"])
    assert columns(tmp_path / "three") == ["RTE", "MRPC", "STSB", "CoLA", "REVIEWS"]
    assert lines["BERT-b", "reviews"]["metric"] == "accuracy"


def test_without_a_task_of_the_paper_its_table_is_left_out(report, write_sweep, tmp_path, capsys):
    runs = [
        write_sweep("mine", {"reviews": 0.6}),
        write_sweep("yours", {"reviews": 0.9, "rte": 0.7}, unfinished=range(5)),
    ]
    lines = report(runs, tmp_path / "out")
    assert columns(tmp_path / "out") == ["REVIEWS"]
    assert set(lines) == {("mine", "reviews")}
    printed = capsys.readouterr()
    assert "(paper)" not in printed.out
    assert "published" not in (tmp_path / "out" / "report.html").read_text().split("<body>")[1]
    assert "warning: yours, REVIEWS: no seed is finished yet" in printed.err
    with pytest.raises(XdscaleError, match="--metric rte=accuracy: expected TASK=METRIC with a task of reviews"):
        report(runs[:1], tmp_path / "other", metrics=["rte=accuracy"])
    assert not (tmp_path / "other").exists()


def test_answers_that_earn_credits(report, write_sweep, tmp_path, capsys):
    runs = [write_sweep("without-coco", {"vqa": 0.5}), write_sweep("visualbert-base", {"vqa": 0.9})]
    lines = report(runs, tmp_path / "out", layout="visualbert")
    ours = lines["visualbert-base", "vqa"]
    scores = scores_of(runs[1], "vqa", "vqa_accuracy")
    assert float(ours["median"]) == pytest.approx(median(scores))
    assert (ours["metric"], ours["published"], ours["verdict"]) == ("vqa_accuracy", "70.8", "better")
    assert re.search(r"VQA v2: \+\d+\.\d VQA accuracy \(95 % CI .*\): better than", capsys.readouterr().out)
    with (tmp_path / "out" / "comparisons" / "vqa-visualbert-base.csv").open(newline="") as file:
        counts = [(int(row["correct_ours"]), int(row["correct_baseline"])) for row in csv.DictReader(file)]
    earned = [
        [
            json.loads(line)["credits"]["vqa_accuracy"]
            for line in (sweep / "vqa" / f"seed-{seed}" / "predictions-dev.jsonl").open()
        ]
        for sweep in runs
        for seed in range(5)
    ]
    theirs, mine = np.array(earned).reshape(2, 5, -1)
    assert counts == list(zip((mine > theirs).sum(0), (theirs > mine).sum(0)))
    with pytest.raises(
        XdscaleError, match="no seed of a task of Table 1 is finished; --layout visualbert or vlbert has columns for"
    ):
        report(runs, tmp_path / "other")


def test_vcrs_q2ar_needs_both_right_on_the_seeds_that_both_have(report, write_sweep, tmp_path, capsys):
    """Spec VL-BERT fact 10: so it is at most the lesser of Q→A and QA→R."""
    sweep = write_sweep("visualbert-base", {"vcr_qa": 0.7, "vcr_qar": 0.8}, seeds=3)
    shutil.rmtree(sweep / "vcr_qar" / "seed-1")
    line = report([sweep], tmp_path / "out", layout="visualbert")["visualbert-base", "vcr_q2ar"]
    scores = []
    for seed in (0, 2):
        read = [
            [json.loads(row) for row in (sweep / part / f"seed-{seed}" / "predictions-dev.jsonl").open()]
            for part in ("vcr_qa", "vcr_qar")
        ]
        right = [[row["label"] == row["prediction"] for row in rows] for rows in read]
        both = [all(pair) for pair in zip(*right, strict=True)]
        scores.append(sum(both) / len(both))
        assert scores[-1] <= min(sum(one) / len(one) for one in right)
    assert float(line["median"]) == pytest.approx(median(scores))
    assert line["published"] == "52.2"
    assert "VCR Q→AR: 2 of 3 seeds are finished" in capsys.readouterr().err
    plan = json.loads((sweep / "sweep.json").read_text())
    plan["tasks"]["vcr_qar"]["seeds"] = [0, 2, 3]
    (sweep / "sweep.json").write_text(json.dumps(plan))
    line = report([sweep], tmp_path / "out", layout="visualbert")["visualbert-base", "vcr_q2ar"]
    assert (line["seeds"], line["seeds_planned"]) == ("2", "2")  # of those that are planned on both parts
    for seed in (0, 2):
        path = sweep / "vcr_qar" / f"seed-{seed}" / "predictions-dev.jsonl"
        path.write_text(path.read_text().replace('"id": "1000"', '"id": "7"'))
    with pytest.raises(XdscaleError, match=r"vcr_qar/seed-0: holds other examples than .*vcr_qa/seed-0"):
        report([sweep], tmp_path / "out", layout="visualbert")


def test_credits_that_are_missing_and_metrics_of_groups_are_named(report, write_sweep, tmp_path):
    sweep = write_sweep("visualbert", {"vqa": 0.9}, seeds=1)
    path = sweep / "vqa" / "seed-0" / "predictions-dev.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace("vqa_accuracy", "accuracy", 1))
    with pytest.raises(XdscaleError, match=r"predictions-dev\.jsonl, line 1: credits has no vqa_accuracy"):
        report([sweep], tmp_path / "out", layout="visualbert")
    path.write_text(whole)
    result = sweep / "vqa" / "seed-0" / "result.json"
    values = json.loads(result.read_text())
    result.write_text(json.dumps(values | {"metrics": values["metrics"] | {"consistency": 0.5}}))
    with pytest.raises(XdscaleError, match=r"--metric vqa=consistency: consistency is of groups of examples"):
        report([sweep], tmp_path / "out", layout="visualbert", metrics=["vqa=consistency"])


def test_published_values_are_those_in_bold_in_the_paper():
    """Table 1 prints each adapted model's figures bold where they beat its original: all but ELECTRA-l on QQP."""
    rows = {row.label: row.values for row in layouts()["table-1"].rows}
    worse = [
        (ours, task)
        for ours, original in (("XDBERT-b", "BERT-b"), ("XDELECTRA-b", "ELECTRA-b"), ("XDELECTRA-l", "ELECTRA-l"))
        for task, value in rows[ours].items()
        if (value < rows[original][task]) != (task == "read")
    ]
    assert worse == [("XDELECTRA-l", "qqp")]
    assert [len(row.values) for row in layouts()["table-1"].rows] == [4, 9, 9, 9, 9, 10, 10]
    assert [len(row.values) for row in layouts()["table-3"].rows] == [4, 4, 4, 4, 4, 2, 3]
    assert [len(row.values) for row in layouts()["table-8"].rows] == [9, 9, 10]


def test_visualberts_published_values_say_what_its_text_says():
    """Each part that is taken away costs something on each task; only VL-BERT and LXMERT are better, on one each."""
    rows = {row.label: row.values for row in layouts()["visualbert"].rows}
    whole = rows.pop("VisualBERT")
    assert len(whole) == 6
    for label in ("VisualBERT w/o Early Fusion", "VisualBERT w/o COCO Pre-training"):
        assert all(rows[label][task] < value for task, value in whole.items())
    better = {label for label, values in rows.items() if any(values[task] > whole[task] for task in values)}
    assert better == {"VL-BERT", "LXMERT"}
    ablations = {row.label: row.values["nlvr2"] for row in layouts()["visualbert-ablations"].rows}
    assert max(ablations, key=ablations.get) == "VisualBERT"
    assert min(ablations, key=ablations.get) == "w/o Early Fusion"


def forms(folder):
    """What each written form says, as text."""
    return {suffix: (folder / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("md", "csv", "html")}


@pytest.mark.parametrize("seeds", [1, 5])
def test_a_single_seed_gets_no_mark_in_any_form(report, write_sweep, tmp_path, seeds, capsys):
    """READ differs by far more than examples could: marked with five seeds, never with one."""
    runs = [write_sweep("BERT-b", {"read": 0.3}, seeds=seeds), write_sweep("XDBERT-b", {"read": 0.9}, seeds=seeds)]
    line = report(runs, tmp_path / "out")["XDBERT-b", "read"]
    said, table = forms(tmp_path / "out"), forms(tmp_path / "out")["html"].split("</table>")[0]
    reserve = "better than BERT-b with this one seed, which says nothing about others"
    assert (line["verdict"], "▲" in table) == (("better", True) if seeds > 1 else ("", False))
    assert (line["ci_seeds_low"] == "") == (line["ci_seeds_high"] == "") == (seeds == 1)
    assert line["ci_low"] != ""
    for text in (said["md"], said["html"], capsys.readouterr().out):
        assert (reserve in text) == (seeds == 1)
        assert ("1 seed" in text) == (seeds == 1)


def test_one_seed_is_not_compared_with_three(report, write_sweep, tmp_path, capsys):
    runs = [write_sweep("BERT-b", {"rte": 0.6}, seeds=3), write_sweep("XDBERT-b", {"rte": 0.9}, seeds=1)]
    line = report(runs, tmp_path / "out")["XDBERT-b", "rte"]
    assert (line["difference"], line["verdict"]) == ("", "")
    assert "the finished seeds differ: 0 of XDBERT-b, 0, 1, 2 of BERT-b" in capsys.readouterr().err
    assert "▲" not in forms(tmp_path / "out")["html"]


def test_the_table_on_a_terminal(write_sweep):
    runs = [write_sweep("BERT-b", {"rte": 0.7}, unfinished=(1,)), write_sweep("mine", {"mrpc": 0.7}, seeds=1)]
    report = assemble([read_sweep(run, {}) for run in runs], layouts()["table-1"], [])
    first, *others = grid = terminal_table(report).columns
    assert [first.header.plain, *(column.header.plain for column in others[:2])] == ["", "RTE", "MRPC"]
    assert others[-1].header.plain == "READ↓"
    assert (first.justify, {column.justify for column in others}) == ("left", {"right"})
    assert all(column.no_wrap for column in grid)
    rows = list(zip(*([cell.plain for cell in column.cells] for column in grid), strict=True))
    ours = [row for row in rows if row[0] in ("BERT-b", "mine")]
    scores = [100 * score for score in scores_of(runs[0], "rte", "accuracy")]
    other = 100 * scores_of(runs[1], "mrpc", "f1")[0]
    told = f"{median(scores):.2f}\n({min(scores):.2f}–{max(scores):.2f})\n4 of 5 seeds"
    assert ours == [("BERT-b", told, *["–"] * 9), ("mine", "–", f"{other:.2f}\n1 seed", *["–"] * 8)]
    place = rows.index(ours[0])
    assert rows[place - 1][:2] == ("BERT-b (paper)", "66.43")
    styles = [row.style for row in terminal_table(report).rows]
    assert (styles[place - 1], styles[place], styles[-1]) == ("dim", "bold", "bold")


def test_runs_that_patience_ended_are_named_with_their_best_step(report, write_sweep, tmp_path, capsys):
    """The curves in these files end after step 240."""
    sweep = write_sweep("BERT-b", {"rte": 0.66}, seeds=3, settings={"steps": 1000, "patience": 3})
    for seed, best, more in ((0, 120, []), (1, 900, [{"step": 1000, "loss": 0.1}])):
        path = sweep / "rte" / f"seed-{seed}" / "result.json"
        stored = json.loads(path.read_text())
        path.write_text(json.dumps(stored | {"best_step": best, "curve": stored["curve"] + more}))
    report([sweep], tmp_path / "out")
    told = (
        "BERT-b, RTE: training.patience ended 2 of 3 seeds; seed 0 ended after step 240 of 1,000, the best after 120; "
        "seed 1 ended after step 1,000, the best after 900; seed 2 ended after step 240 of 1,000\n"
    )
    assert f"warning: {told}" in capsys.readouterr().err
    assert f"- {told}" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    report([write_sweep("BERT-c", {"rte": 0.66}, seeds=3, settings={"steps": 1000})], tmp_path / "other")
    assert "ended" not in capsys.readouterr().err  # a last step that was skipped is in no curve
