"""Damaged and malicious inputs: one message that names file and row, exit code 2, nothing written, nothing executed."""

import pickle
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale import cli
from xdscale.errors import XdscaleError
from xdscale.shards.regions import RegionTable
from xdscale.shards.sources.regions.plain_pickle import load_plain

from . import attacks, bad_images
from . import region_files as writers

WRITE = {
    "uniter_msgpack": lambda folder, those: writers.uniter(folder, those, packed="msgpack"),
    "milvlg_later": lambda folder, those: writers.milvlg(folder, those, turned=False),
}
FORMAT = {"uniter_msgpack": "uniter", "tensorpack": "vilbert", "vlbert_zip": "vlbert", "milvlg_later": "milvlg",
          "vinvl_features": "vinvl"}  # fmt: skip
WITHOUT_BACKGROUND = ("lxmert", "vinvl", "vinvl_features", "coco")
NEEDS_SIZES = ("uniter", "uniter_msgpack", "vinvl_features", "coco")
IMAGES = 4


def command(name, folder, inputs, those):
    detector = writers.detector(folder, None if name in WITHOUT_BACKGROUND else 0)
    words = ["import", *inputs, "--format", FORMAT.get(name, name), "--detector", detector, "--out", folder / "out"]
    if name in NEEDS_SIZES:
        words += ["--sizes", writers.coco_annotations(folder, those)]
    return ["xdscale", "regions", *map(str, words)]


def run(words, monkeypatch, capsys):
    """Returns the exit code and what stood on stderr."""
    monkeypatch.setattr(sys, "argv", words)
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    return code, capsys.readouterr().err


def row_of(name, those, k, paths):
    """What names the row in a message: of image k, or of the file where the image cannot be known."""
    i = those[k]
    if name in ("butd", "lxmert", "vinvl", "vinvl_features"):
        return [f"{paths[0].name}, line {k + 1}"]
    before = sum(len(other.boxes) for other in those[:k])
    records = [f"record {before + number}" for number in range(len(i.boxes))]
    return [i.id, f"image {k}", f"key '{k:08}'", *records]


def attacked(seed, folder, monkeypatch, capsys):
    """Writes valid files, damages them as the seed says, imports them, and checks what the command says."""
    chance = np.random.default_rng(seed)
    those = writers.images(IMAGES)
    k = int(chance.integers(1, IMAGES))
    canary = folder / "canary"
    attack_images = chance.random() < 0.5
    choices = bad_images.IMAGES if attack_images else attacks.FILES
    name, what, change = choices[chance.integers(len(choices))]
    with np.errstate(all="ignore"):
        if attack_images:
            change(those[k], chance)
        paths = WRITE.get(name, getattr(writers, name, None))(folder, those)
        if not attack_images:
            change(paths, k, chance, canary)
    code, said = run(command(name, folder, paths, those), monkeypatch, capsys)
    told = f"seed {seed}: {name}: {what}: {said}"
    assert code == 2, told
    assert said.startswith("error: "), told
    assert len(said.strip().splitlines()) == 1, told
    assert len(said) < 1500, told
    assert not (folder / "out").exists(), told
    assert not canary.exists(), told
    if attack_images or what in ("numbers", "base64", "columns", "fields"):
        assert any(row in said for row in row_of(name, those, k, paths)), told
    names = [
        part.name
        for path in paths
        for part in (path, *path.parent.glob(f"{path.name}/*"), *path.parent.glob("*.pkl"), *path.parent.glob("nbb*"))
    ]
    assert any(part in said for part in names), told


@pytest.mark.parametrize("first", range(0, 80, 40))
def test_hostile_files_are_refused(first, tmp_path, monkeypatch, capsys):
    for seed in range(first, first + 40):
        folder = tmp_path / str(seed)
        folder.mkdir()
        attacked(seed, folder, monkeypatch, capsys)
        shutil.rmtree(folder)


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_two_thousand_hostile_files_are_refused(tmp_path, monkeypatch, capsys):
    for seed in range(1000, 3000):
        folder = tmp_path / str(seed)
        folder.mkdir()
        attacked(seed, folder, monkeypatch, capsys)
        shutil.rmtree(folder)


RAW = ["butd", "lxmert", "vlbert_zip", "coco", "vinvl", "uniter", "vilbert", "tensorpack", "ban", "pythia", "milvlg"]


@pytest.mark.parametrize("name", RAW)
def test_random_bytes_are_refused_or_lead_to_a_valid_table(name, tmp_path, monkeypatch, capsys):
    """A byte of a feature may change without anybody being able to tell; anything else is refused."""
    for seed in range(10):
        folder = tmp_path / str(seed)
        folder.mkdir()
        chance = np.random.default_rng(seed)
        those = writers.images(3)
        paths = WRITE.get(name, getattr(writers, name, None))(folder, those)
        inside = sorted(paths[0].iterdir()) if paths[0].is_dir() else paths
        path = inside[chance.integers(len(inside))]
        content = bytearray(path.read_bytes())
        for place in chance.integers(min(len(content), 20_000), size=3):
            content[place] = chance.integers(256)
        path.write_bytes(content)
        code, said = run(command(name, folder, paths, those), monkeypatch, capsys)
        if code == 2:
            assert said.startswith("error: "), said
            assert len(said.strip().splitlines()) == 1
            assert not (folder / "out").exists()
            continue
        assert code == 0
        table = RegionTable.open(folder / "out")
        found = table.read(np.arange(len(table)))
        assert np.isfinite(found.features).all()
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
        shutil.rmtree(folder)


@pytest.mark.parametrize("protocol", range(6))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_plain_pickles_are_read_as_they_are(protocol, data):
    numbers = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.text(), st.binary())
    values = st.recursive(
        numbers,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.tuples(inner, inner),
            st.dictionaries(st.text(max_size=5), inner, max_size=4),
        ),
        max_leaves=12,
    )
    value = data.draw(values)
    assert load_plain(pickle.dumps(value, protocol), "here") == value
    kind = data.draw(st.sampled_from(["<f4", ">f8", "<f2", "|u1", "<i8", ">i2", "|b1", "<U3", "|S4"]))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    content = np.random.default_rng(0).integers(0, 100, shape).astype(kind)
    array = np.asfortranarray(content) if data.draw(st.booleans()) else content
    if protocol == 5 and array.dtype.kind in "SU" and not array.size:
        return
    found = load_plain(pickle.dumps({"a": array, "n": np.float32(1.5), "s": {1, 2}}, protocol), "here")
    assert found["a"].dtype == array.dtype
    assert np.array_equal(found["a"], array)
    assert (found["n"], found["s"]) == (1.5, {1, 2})


def test_python_2_wrote_arrays_as_text(tmp_path):
    """BAN's and RefCOCO's files are of its time: protocols 0 and 2 with bytes as str."""
    python2 = (
        b"\x80\x02}q\x00U\x01aq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87Rq\x04"
        b"(K\x01K\x02\x85cnumpy\ndtype\nq\x05U\x02f4K\x00K\x01\x87Rq\x06(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x08\x00\x00\x80?\x00\x00\x00\xc0tbs."
    )
    assert load_plain(python2, "here")["a"].tolist() == [1, -2]


def test_what_a_pickle_asks_for_is_named(tmp_path):
    with pytest.raises(XdscaleError, match=r"refs.p: the pickle asks for 'posix.system'; .* Nothing of it was run"):
        load_plain(b"cposix\nsystem\n(S'touch x'\ntR.", "refs.p")


def test_a_pickle_that_names_the_same_again_and_again_is_refused():
    """A hundred bytes that would be a million values; and honest ones that share what they hold."""
    bomb = [1]
    for _ in range(20):
        bomb = [bomb, bomb]
    for value in (bomb, np.array([bomb, None], object)):
        with pytest.raises(XdscaleError, match="refs.p: .*again and again"):
            load_plain(pickle.dumps(value, 2), "refs.p")
    names = [f"class {number}" for number in range(100)]
    shared = {number: {"names": names} for number in range(100)}
    assert load_plain(pickle.dumps(shared, 2), "here") == shared
    mixed = np.array([names, {"a": np.arange(3)}], object)
    found = load_plain(pickle.dumps(mixed, 2), "here")
    assert found[0] == names
    assert found[1]["a"].tolist() == [0, 1, 2]
