"""Task files in their public formats: real sentences in, the right examples out, and what is refused."""

import csv
import dataclasses
import hashlib
import json

import pytest

from xdscale.errors import XdscaleError
from xdscale.tasks.contract import find_task
from xdscale.tasks.hub import fetch_task

# First lines of the public files, as they are published.
STSB = (
    "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    "0\tmain-captions\tMSRvid\t2012test\t0000\tnone\tnone\tA man with a hard hat is dancing.\t"
    "A man wearing a hard hat is dancing.\t5.000\n"
    "1\tmain-captions\tMSRvid\t2012test\t0002\tnone\tnone\tA young child is riding a horse.\t"
    "A child is riding a horse.\t4.750\n"
)
MRPC = (
    "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    "1\t1355540\t1355592\tHe said the pie business doesn 't fit the company 's long-term growth strategy .\t"
    '" The foodservice business does not fit our long-term growth strategy .\n'
    '0\t2029631\t2029565\tMagnarelli said Racicot hated the Iraqi regime .\tShe said he was " 100 percent behind .\n'
)
COLA = "gj04\t1\t\tThe sailors rode the breeze clear of the rocks.\ngj04\t0\t*\tThe sailors rode clear of the breeze.\n"
COLA_TEST = "index\tsentence\n0\tBill whistled past the house.\n"
MNLI_HEAD = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
)
MNLI = (
    MNLI_HEAD + "0\t31193\t31193n\tgovernment\tb\tb\tp\tp\tConceptually cream skimming.\tProduct.\tneutral\tneutral\n"
)
SWAG_HEAD = ",video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3"
SWAG = (
    SWAG_HEAD + ",label\n0,lsmdc1052-94857,18313,Students lower their eyes nervously. She,"
    'Students lower their eyes nervously.,She,gold,"pats her shoulder, then saunters toward someone.",turns.,is,is,2\n'
)
READ_HEAD = "id,url_legal,license,excerpt,target,standard_error\n"


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_quotes_are_text_in_tsv_and_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    write(tmp_path / "MRPC", train__tsv=MRPC, dev__tsv=MRPC)
    data = find_task("mrpc").read(tmp_path)
    assert [example.label for example in data.train] == [1, 0]
    assert data.train[0].texts[0][1].startswith('" The foodservice')
    assert data.train[1].texts[0][1] == 'She said he was " 100 percent behind .'
    assert data.files["train.tsv"]["rows"] == 2
    assert data.files["train.tsv"]["sha256"] == hashlib.sha256(MRPC.encode()).hexdigest()


def test_regression_targets_are_numbers_and_out_of_range_ones_are_refused(tmp_path):
    path = write(tmp_path, dev__tsv=STSB) / "dev.tsv"
    assert [example.label for example in find_task("stsb").read_examples(path, labelled=True)] == [5.0, 4.75]
    for wrong in ("5.100", "nan", "high"):
        path.write_text(STSB.replace("4.750", wrong))
        with pytest.raises(XdscaleError, match=rf"dev\.tsv, line 3: score = '{wrong}': expected a number from 0 to 5"):
            find_task("stsb").read_examples(path, labelled=True)


def test_cola_has_no_header_but_its_test_split_has(tmp_path):
    folder = write(tmp_path / "CoLA", train__tsv=COLA, dev__tsv=COLA, test__tsv=COLA_TEST)
    data = find_task("cola").read(tmp_path)
    assert data.train[1].texts == (("The sailors rode clear of the breeze.",),)
    assert [example.label for example in data.train] == [1, 0]
    assert data.test["CoLA.tsv"][0].texts == (("Bill whistled past the house.",),)
    assert data.test["CoLA.tsv"][0].label is None
    assert find_task("cola").read(folder).files == data.files  # the task's own folder does as well


def test_mnli_has_two_development_splits_and_three_labels(tmp_path):
    contradicted = MNLI.replace("neutral\n", "contradiction\n")
    write(tmp_path / "MNLI", train__tsv=MNLI, dev_matched__tsv=MNLI, dev_mismatched__tsv=contradicted)
    data = find_task("mnli").read(tmp_path)
    assert {split: examples[0].label for split, examples in data.dev.items()} == {"dev-m": 1, "mismatched": 2}
    assert find_task("mnli").outputs == 3


def test_swag_continues_the_second_sentence_with_each_ending(tmp_path):
    path = write(tmp_path, val__csv=SWAG) / "val.csv"
    (example,) = find_task("swag").read_examples(path, labelled=True)
    assert {first for first, _ in example.texts} == {"Students lower their eyes nervously."}
    assert example.texts[0][1] == "She pats her shoulder, then saunters toward someone."
    assert (len(example.texts), example.label, find_task("swag").outputs) == (4, 2, 1)


def test_read_holds_out_a_tenth_by_the_hash_of_the_id_whatever_the_order(tmp_path):
    rows = [
        f'{number:09x},,,"An excerpt, number {number}\nof two lines.",{number / 1000 - 2},0.4\n'
        for number in range(1000)
    ]
    write(tmp_path / "a" / "READ", train__csv=READ_HEAD + "".join(rows))
    write(tmp_path / "b" / "READ", train__csv=READ_HEAD + "".join(reversed(rows)))
    forward, backward = (find_task("read").read(tmp_path / name) for name in "ab")
    ids = {example.id for example in forward.dev["dev"]}
    assert {example.id for example in backward.dev["dev"]} == ids
    assert 70 < len(ids) < 130
    assert ids.isdisjoint(example.id for example in forward.train)
    assert len(forward.train) + len(ids) == 1000
    assert all(int(hashlib.sha256(i.encode()).hexdigest()[:16], 16) / 2**64 < 0.1 for i in ids)
    assert "\n" in forward.train[0].texts[0][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("#1 String", "first"), r"line 1: no column '#1 String'; MRPC has #1 String"),
        (lambda text: text.replace("\n0\t", "\n2\t"), r"line 3: Quality = '2': not a label of MRPC; expected 0 or 1"),
        (lambda text: text.replace("\t2029565", ""), r"line 3: 4 columns, expected 5"),
        (lambda text: "", r"train\.tsv: is empty"),
        (lambda text: text.splitlines(keepends=True)[0], r"train\.tsv: no examples"),
        (
            lambda text: text.replace("Magnarelli", "a" * 100_001),
            r"line 3: column '#1 String' has 100,0\d\d characters",
        ),
        (lambda text: text.replace("\n", "\r") * 99, r"line 1: no column .* found .{,300} …$"),  # one line for all
        (
            lambda text: "sentence1\tsentence2\tlabel\nA.\tB.\t1\n",
            r"no column .*'Quality'; .* found sentence1, sentence2",
        ),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, change, message):
    write(tmp_path / "MRPC", train__tsv=change(MRPC), dev__tsv=MRPC)
    with pytest.raises(XdscaleError, match=rf"train\.tsv.*{message}|{message}"):
        find_task("mrpc").read(tmp_path)


def test_line_ends_of_windows_and_a_byte_order_mark_change_nothing(tmp_path):
    examples = []
    for name, text in (("plain", MRPC), ("windows", MRPC.replace("\n", "\r\n")), ("bare", MRPC.lstrip("\ufeff"))):
        write(tmp_path / name)
        (tmp_path / name / "dev.tsv").write_bytes(text.encode())
        examples.append(find_task("mrpc").read_examples(tmp_path / name / "dev.tsv", labelled=True))
    assert examples[0] == examples[1] == examples[2]


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path, monkeypatch):
    for name in ("train.tsv", "val.csv"):
        (tmp_path / name).symlink_to("/proc/self/mem")  # opens, and fails at the first byte
        with pytest.raises(XdscaleError, match=rf"{name}: cannot be read: Input/output error"):
            find_task("mrpc").read_examples(tmp_path / name, labelled=True)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [])
    with pytest.raises(XdscaleError, match=r"/RTE: cannot be written: Not a directory; give a local folder"):
        fetch_task(find_task("rte"), tmp_path / "train.tsv")


def test_missing_split_missing_folder_and_unknown_task(tmp_path):
    with pytest.raises(XdscaleError, match="has no MRPC/train.tsv; --data is the folder that holds MRPC/"):
        find_task("mrpc").read(tmp_path)
    write(tmp_path / "MRPC", train__tsv=MRPC)
    with pytest.raises(XdscaleError, match=r"MRPC/dev\.tsv: no such file; the development split of MRPC is needed"):
        find_task("mrpc").read(tmp_path)
    with pytest.raises(XdscaleError, match="--task STS-B: no such task; did you mean 'stsb'"):
        find_task("STS-B")


def test_torn_rows_are_left_out_where_the_public_file_has_them(tmp_path, capsys):
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    rows = [f"{n}\t1\t2\tHow is {n}?\tWhat is {n}?\t{n % 2}\n" for n in range(2000)]
    path = write(tmp_path, dev__tsv=head + "".join(rows[:5]) + "7\t1\t2\tHow\n" + "".join(rows[5:])) / "dev.tsv"
    assert len(find_task("qqp").read_examples(path, labelled=True)) == 2000
    assert "1 row without all columns left out, first line 7" in capsys.readouterr().err
    path.write_text(head + rows[0] + "7\t1\n")
    with pytest.raises(XdscaleError, match="line 3: a column is missing, as in 1 of 2 rows"):
        find_task("qqp").read_examples(path, labelled=True)


def test_torn_rows_are_a_note_of_the_data_and_print_nothing(tmp_path, capfd):
    """Each process reads the files; notes are said once, by the first."""
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    rows = "".join(f"{n}\t1\t2\tHow is {n}?\tWhat is {n}?\t{n % 2}\n" for n in range(1000))
    write(tmp_path / "QQP", train__tsv=head + rows + "7\t1\t2\tHow\n", dev__tsv=head + rows)
    notes = find_task("qqp").read(tmp_path).notes
    assert notes == (f"{tmp_path}/QQP/train.tsv: 1 row without all columns left out, first line 1002",)
    assert "".join(capfd.readouterr()) == ""


def test_the_hubs_rows_become_the_public_format(tmp_path, monkeypatch):
    """Real `datasets`, on a local folder in the hub's layout: integer classes, -1 for unlabelled."""
    source = tmp_path / "hub"
    source.mkdir()
    rows = {"sentence1": ["A\tb.", "C."], "sentence2": ["D.", "E."], "idx": [0, 1]}
    for split, labels in {"train": [0, 1], "validation": [1, 0], "test": [-1, -1]}.items():
        lines = zip(rows["sentence1"], rows["sentence2"], rows["idx"], labels)
        text = "".join(json.dumps(dict(zip(("sentence1", "sentence2", "idx", "label"), line))) + "\n" for line in lines)
        (source / f"{split}.jsonl").write_text(text)
    task = find_task("rte")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    hub = type(task.hub)(path=str(source), config="default", splits=task.hub.splits, columns=task.hub.columns)
    local = dataclasses.replace(task, hub=hub)
    fetch_task(local, tmp_path / "data")
    assert (tmp_path / "data" / "RTE" / "dev.tsv").read_text() == (
        "index\tsentence1\tsentence2\tlabel\n0\tA b.\tD.\tnot_entailment\n1\tC.\tE.\tentailment\n"
    )
    assert (tmp_path / "data" / "RTE" / "test.tsv").read_text().splitlines()[0] == "index\tsentence1\tsentence2"
    assert [example.label for example in task.read(tmp_path / "data").train] == [0, 1]
    import datasets

    load = datasets.load_dataset

    def load_while_another_sweep_fetches(*arguments, **options):
        monkeypatch.setattr("datasets.load_dataset", load)
        fetch_task(local, tmp_path / "shared")
        return load(*arguments, **options)

    monkeypatch.setattr("datasets.load_dataset", load_while_another_sweep_fetches)
    fetch_task(local, tmp_path / "shared")
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["RTE"]
    with pytest.raises(XdscaleError, match="--task read: the competition's data cannot be fetched"):
        fetch_task(find_task("read"), tmp_path)


def test_a_text_has_100_000_characters_at_most(tmp_path):
    path = tmp_path / "train.tsv"
    for length in (100_000, 100_001):
        path.write_text(f"x\t1\t\t{'a' * length}\n")
        if length == 100_000:
            assert len(find_task("cola").read_examples(path, labelled=True)[0].texts[0][0]) == length
            continue
        with pytest.raises(XdscaleError, match=r"line 1: column 'sentence' has 100,001 characters, at most 100,000"):
            find_task("cola").read_examples(path, labelled=True)


def test_csv_that_is_none_is_named_with_its_line(tmp_path):
    path = write(tmp_path, val__csv=SWAG + '1,a,b,"c"d,e\n') / "val.csv"
    with pytest.raises(XdscaleError, match=r"val\.csv, line 3: not CSV"):
        find_task("swag").read_examples(path, labelled=True)
    assert next(csv.reader([SWAG_HEAD]))[4:6] == [find_task("swag").first, find_task("swag").prefix]
