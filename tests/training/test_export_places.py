"""Where an export may go: it comes whole and readable by whom the umask says, or not at all."""

import os
import resource
import shutil
import signal
import stat

import pytest

from xdscale.errors import XdscaleError
from xdscale.export import export_run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def whole(small_export):
    return names(small_export)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_every_file_follows_the_umask(small_run, tmp_path, mask):
    before = os.umask(mask)
    try:
        export_run(small_run, tmp_path / "out")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_every_file_of_a_run_follows_the_umask(small_run):
    mask = os.umask(0o022)
    os.umask(mask)
    # DeepSpeed leaves an executable program beside its checkpoints.
    found = {stat.S_IMODE(path.stat().st_mode) & 0o666 for path in small_run.rglob("*") if path.is_file()}
    assert found == {0o666 & ~mask}


def test_an_empty_folder_a_link_to_one_and_the_working_folder_are_filled(small_run, tmp_path, monkeypatch, whole):
    folder, target, here = tmp_path / "empty", tmp_path / "target", tmp_path / "here"
    for path in (folder, target, here):
        path.mkdir()
    (folder / "lost+found").mkdir()
    (tmp_path / "link").symlink_to(target)
    kept = folder.stat().st_ino  # as where a disk is mounted, the folder itself must stay
    export_run(str(small_run), str(folder))
    export_run(small_run, tmp_path / "link")
    monkeypatch.chdir(here)
    export_run(small_run, ".")
    assert names(folder) == sorted([*whole, "lost+found"])
    assert names(target) == names(here) == whole
    assert folder.stat().st_ino == kept
    assert (tmp_path / "link").is_symlink()


def test_folders_beside_the_export_are_nobodys_business(small_run, tmp_path, whole):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    export_run(small_run, tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"
    assert names(tmp_path / "out") == whole


def test_what_a_killed_export_left_is_replaced(small_run, tmp_path, whole):
    left = tmp_path / "out" / ".xdscale-export"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    export_run(small_run, tmp_path / "out")
    assert names(tmp_path / "out") == whole


@pytest.mark.parametrize("name", ["file", "dangling", "file/inside", "link"])
def test_what_is_no_free_folder_is_refused(small_run, tmp_path, name):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(small_run)
    before = names(tmp_path), names(small_run)
    with pytest.raises(XdscaleError, match=str(tmp_path / name)):
        export_run(small_run, tmp_path / name)
    assert (names(tmp_path), names(small_run)) == before
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_nothing(small_run, tmp_path, exists):
    """A limit on the size of files stands for it: writing fails after the first megabytes."""
    out = tmp_path / "new" / "out"
    if exists:
        out.mkdir(parents=True)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(XdscaleError, match=f"{out}: the export cannot be written: .*too large"):
            export_run(small_run, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == (["new"] if exists else [])
    assert not exists or names(out) == []


def test_a_place_that_cannot_be_written_is_told(small_run):
    with pytest.raises(XdscaleError, match="/proc/xdscale/out: the export cannot be written"):
        export_run(small_run, "/proc/xdscale/out")


def test_an_export_is_not_a_run(small_export, tmp_path):
    with pytest.raises(XdscaleError, match=f"{small_export}: an export, not a run folder"):
        export_run(small_export, tmp_path / "out")


def test_a_run_without_its_encoders_files_is_told(small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run", copy_function=os.link)
    shutil.rmtree(run / "language")
    with pytest.raises(XdscaleError, match=r"language: holds no config\.json"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
