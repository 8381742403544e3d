"""What a command was asked to write is written whole, or nothing is and one message says why."""

import bz2
import contextlib
import errno
import gzip
import lzma
import os
import socket
from pathlib import Path

import pytest

from xdscale.errors import XdscaleError
from xdscale.files import check_output_file, check_output_folder, file_sha256, open_text, read_json, write_outputs


def listing(folder):
    return sorted(path.name for path in folder.rglob("*"))


@contextlib.contextmanager
def without_rights(folder):
    """As a user who may not write there: to root everything is writable."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_files_and_their_folders_are_written(tmp_path):
    write_outputs({tmp_path / "a" / "b" / "one": "1\n", tmp_path / "two": "é\n"})
    assert (tmp_path / "a" / "b" / "one").read_text() == "1\n"
    assert (tmp_path / "two").read_bytes() == "é\n".encode()
    assert listing(tmp_path) == ["a", "b", "one", "two"]


@pytest.mark.parametrize("fails", [0, 1])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, fails):
    (tmp_path / "one").write_text("before")
    calls = iter(range(2))

    def full(descriptor):
        if next(calls) == fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    failing = [tmp_path / "one", tmp_path / "new" / "deep" / "two"]
    with pytest.raises(XdscaleError, match=f"{failing[fails]}: cannot be written: No space left on device"):
        write_outputs(dict.fromkeys(failing, "after"))
    assert (tmp_path / "one").read_text() == "before"
    assert listing(tmp_path) == ["one"]


def test_an_interruption_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_outputs({tmp_path / "new" / "one": "1"})
    assert listing(tmp_path) == []


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("elsewhere/file")
    write_outputs({tmp_path / "link": "after", tmp_path / "dangling": "new"})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "after"
    assert (tmp_path / "elsewhere" / "file").read_text() == "new"


@pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
def test_a_device_is_written_to_and_not_replaced(device):
    before = os.stat(device)
    with contextlib.nullcontext() if device == "/dev/null" else pytest.raises(XdscaleError, match="/dev/full: cannot"):
        write_outputs({Path(device): "text"})
    assert os.stat(device).st_rdev == before.st_rdev


def test_places_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "closed").mkdir()
    before = listing(tmp_path)
    for name in ("file/inside", "circle", "closed", "circle/inside", "n" * 300):
        with pytest.raises(XdscaleError, match="cannot be written"):
            write_outputs({tmp_path / "first": "1", tmp_path / name: "2"})
        assert listing(tmp_path) == before
    with without_rights(tmp_path / "closed"), pytest.raises(XdscaleError, match="cannot be written: Permission denied"):
        write_outputs({tmp_path / "closed" / "one": "1"})
    assert listing(tmp_path) == before
    monkeypatch.chdir(tmp_path)
    with pytest.raises(XdscaleError, match=r"\.: cannot be written: it is a folder"):
        write_outputs({Path("."): "1"})


@pytest.mark.parametrize("name", ["full", "folder", "loop", "full/x", "x" * 250])
def test_when_one_cannot_be_written_none_is(tmp_path, name):
    (tmp_path / "old.txt").write_text("old")
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    before = listing(tmp_path)
    with pytest.raises(XdscaleError, match=rf"{name}: cannot be written: "):
        write_outputs({tmp_path / "old.txt": b"new", tmp_path / "made" / "new.txt": b"new", tmp_path / name: b"new"})
    assert listing(tmp_path) == before
    assert (tmp_path / "old.txt").read_text() == "old"


def test_a_device_is_written_to_and_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    check_output_file(tmp_path / "pipe")
    write_outputs({tmp_path / "pipe": b"through"})
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert listing(tmp_path) == ["pipe"]


@pytest.mark.parametrize("path", ["new", "new/deep", ".", "there", "link"])
def test_a_folder_that_can_be_written_passes_and_nothing_is_left(tmp_path, path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    before = listing(tmp_path)
    check_output_folder(tmp_path / path, "--out")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", "--out .*file: exists and is not a folder"),
        ("file/inner/deep", "--out .*: .*/file is not a folder"),
        ("dangling", "--out .*: exists and is not a folder"),
        ("dangling/inner", "--out .*: .*/dangling is not a folder"),
        ("/proc/new", "/proc/new: cannot be written: "),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, path, message):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(XdscaleError, match=message):
        check_output_folder(tmp_path / path, "--out")


def test_a_read_only_file_is_refused_where_its_mode_counts(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write everything
    with pytest.raises(XdscaleError, match="file: is read-only; choose another name"):
        check_output_file(tmp_path / "file")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "config.json", tmp_path / "socket", Path("/dev/zero")):
        with pytest.raises(XdscaleError, match=f"^{path}: is a pipe or a device, .*; expected a file: put it there"):
            read_json(path)
        with pytest.raises(OSError, match="is a pipe or a device"):
            file_sha256(path)
    with pytest.raises(XdscaleError, match="not a readable JSON file: .*Is a directory"):
        read_json(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"a": ' + "1" * 5000 + "}", '{"a": ' + "[" * 100_000, "[1]"])
def test_what_is_no_json_object_is_one_message(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(XdscaleError, match=r"config\.json: (not a readable JSON file|expected a JSON object)"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("pack", "words"),
    [
        (gzip.compress, r"it is packed \(gzip\); unpack it"),
        (bz2.compress, r"it is packed \(bzip2\); unpack it"),
        (lzma.compress, r"it is packed \(xz\); unpack it"),
        (lambda data: data.decode().encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (lambda data: b"\x80" + data, "can't decode byte 0x80"),
    ],
)
def test_a_text_that_is_packed_or_in_another_encoding_is_told(tmp_path, pack, words):
    path = tmp_path / "captions.json"
    path.write_bytes(pack(b'{"images": []}'))
    with pytest.raises(XdscaleError, match=rf"captions\.json: not a readable JSON file: .*{words}"):
        read_json(path)
    with pytest.raises(XdscaleError, match=rf"captions\.json: not UTF-8 text: .*{words}"), open_text(path) as file:
        file.read()
