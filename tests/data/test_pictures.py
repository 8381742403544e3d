"""A table's pictures come from anywhere: they are JPEGs of the size that the table says, and nothing else is opened."""

import io
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from xdscale.data import pictures
from xdscale.data.pictures import read_picture, read_pictures
from xdscale.errors import XdscaleError
from xdscale.extraction.pictures import read_pixels

IMAGE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (12, 20, 3), np.uint8))


def saved(image, kind="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(content, size=IMAGE.size):
    return read_picture(content, size, (10, 6), "regions: row 3")


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """Puts a program `gs` in the path that leaves a file behind, and returns that file."""
    mark, program = tmp_path / "was_run", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return mark


def test_nothing_that_a_picture_holds_is_run(tmp_path, ghostscript):
    content = saved(IMAGE, "EPS")
    with pytest.raises(XdscaleError, match="row 3: not a readable image: .* no JPEG"):
        read(content)
    with pytest.raises(XdscaleError, match="one.jpg: not a readable image .none of JPEG, "):
        read_pixels(tmp_path / "one.jpg", content)
    assert not ghostscript.exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", saved(IMAGE, "PNG"), saved(IMAGE, "WEBP"), saved(IMAGE)[:-90]])
def test_what_is_no_whole_jpeg_is_refused_by_its_row(content):
    with pytest.raises(XdscaleError, match="^regions: row 3: not a readable image: ") as error:
        read(content)
    assert "0x" not in str(error.value)  # where something lies in memory


def test_a_picture_of_another_size_is_not_decoded(monkeypatch):
    content = saved(IMAGE)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(XdscaleError, match="row 3: the image has 20 × 12 pixels, the table says 20 × 13"):
        read(content, (20, 13))


@pytest.mark.parametrize("turned", [False, True])
def test_a_camera_held_otherwise(turned):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(IMAGE, exif=exif)
    if turned:
        assert read(content, (12, 20)).shape == (3, 6, 10)
    else:
        with pytest.raises(XdscaleError, match="the image has 12 × 20 pixels, the table says 20 × 12"):
            read(content)


def test_a_picture_is_blue_green_and_red_less_their_means():
    content = saved(IMAGE)
    pixels = np.asarray(Image.open(io.BytesIO(content)).resize((10, 6), Image.Resampling.BILINEAR), np.float64)
    wanted = pixels.transpose(2, 0, 1)[::-1] - np.array([102.9801, 115.9465, 122.7717])[:, None, None]
    found = read(content)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def stored(contents):
    """A table with these images."""
    files, bounds = np.frombuffer(b"".join(contents), np.uint8), np.cumsum([0, *map(len, contents)])
    return SimpleNamespace(table=SimpleNamespace(folder="data", name="regions", read_ragged=lambda *_: (files, bounds)))


PIXELS = SimpleNamespace(short_side=6, long_side=10)


@pytest.mark.parametrize("threads", ["3", "1", "", "0", "2,4"])
def test_pictures_stand_in_their_order_whoever_decodes_them(monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    several, decode, ids = threads == "3", pictures.read_picture, set()
    together = threading.Barrier(3 if several else 1)

    def counted(*arguments):
        together.wait(20)  # three are at work at the same time, or this breaks
        ids.add(threading.get_ident())
        return decode(*arguments)

    monkeypatch.setattr(pictures, "read_picture", counted)
    contents = [saved(IMAGE.rotate(180 * (number % 2)), quality=60 + number) for number in range(6)]
    found = read_pictures(stored(contents), np.arange(6), np.tile(IMAGE.size, (6, 1)), PIXELS)
    assert len(ids) == (3 if several else 1)
    for picture, content in zip(found, contents, strict=True):
        np.testing.assert_array_equal(picture, read(content))


def test_of_several_damaged_pictures_the_first_is_named(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    contents = [saved(IMAGE), b"", saved(IMAGE), b"", saved(IMAGE)]
    with pytest.raises(XdscaleError, match="data: row 11 of regions: not a readable image"):
        read_pictures(stored(contents), np.arange(10, 15), np.tile(IMAGE.size, (5, 1)), PIXELS)
