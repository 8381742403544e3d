"""Image files of every kind give their pixels the right way up, or are refused by name."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from xdscale.errors import XdscaleError
from xdscale.extraction import pictures
from xdscale.extraction.pictures import find_pictures, read_pixels

PIXELS = np.random.default_rng(1).integers(0, 256, (12, 20, 3), np.uint8)


def saved(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def test_pixels_of_every_kind(tmp_path):
    image = Image.fromarray(PIXELS)
    assert (read_pixels(tmp_path, saved(image)) == PIXELS).all()
    grey = read_pixels(tmp_path, saved(Image.fromarray(PIXELS[..., 0])))
    assert (grey == PIXELS[..., :1].repeat(3, 2)).all()
    assert read_pixels(tmp_path, saved(image.convert("CMYK"), "TIFF")).shape == PIXELS.shape
    assert read_pixels(tmp_path, saved(image.quantize(16), "GIF")).shape == PIXELS.shape
    transparent = Image.fromarray(np.concatenate([PIXELS, PIXELS[..., :1]], 2))
    assert (read_pixels(tmp_path, saved(transparent)) == PIXELS).all()
    assert read_pixels(tmp_path, saved(image.crop((3, 4, 4, 5)))).tolist() == [[PIXELS[4, 3].tolist()]]


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(3, PIXELS[::-1, ::-1]), (6, PIXELS.transpose(1, 0, 2)[:, ::-1]), (8, PIXELS.transpose(1, 0, 2)[::-1])],
)
def test_a_camera_held_otherwise(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (read_pixels(tmp_path, saved(Image.fromarray(PIXELS), exif=exif)) == turned).all()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a readable image"),
        (b"no image at all", "not a readable image"),
        (saved(Image.fromarray(PIXELS))[:-40], "not a readable image"),
        (saved(Image.fromarray(PIXELS), "JPEG")[:-90], "not a readable image"),
        (saved(Image.fromarray(PIXELS[..., 0].astype(np.uint16))), "8 bits a channel"),
        (saved(Image.new("1", (70_000, 2))), "65,535 a side"),
        (saved(Image.new("1", (20_000, 10_000))), "pixels"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "odd.jpg"
    path.write_bytes(content)
    with pytest.raises(XdscaleError, match=words) as error:
        read_pixels(path, content)
    assert str(error.value).startswith(str(path))


def test_what_is_no_file_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    for name in (tmp_path, "/dev/zero"):
        with pytest.raises(XdscaleError, match=f"^{name}.*: is a pipe or a device"):
            find_pictures([str(name)], "stem")


def test_images_are_found_in_order_with_ids(tmp_path):
    for name in ("b/COCO_val2014_000000000042.jpg", "a.PNG", "notes.txt", ".hidden.jpg", "b/7.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [picture.image_id for picture in find_pictures([str(tmp_path)], "stem")] == [
        "a",
        "7",
        "COCO_val2014_000000000042",
    ]
    folder = str(tmp_path / "b")
    assert [picture.image_id for picture in find_pictures([folder], "number")] == ["7", "42"]
    assert [picture.image_id for picture in find_pictures([folder], "name")][0] == "7.jpeg"
    paths = [picture.image_id for picture in find_pictures([str(tmp_path)], "path")]
    assert paths == ["a.PNG", "b/7.jpeg", "b/COCO_val2014_000000000042.jpg"]
    with pytest.raises(XdscaleError, match="does not end with a number"):
        find_pictures([str(tmp_path)], "number")
    (tmp_path / "7.png").write_bytes(b"x")
    with pytest.raises(XdscaleError, match="image id '7' is that of .*7.png too"):
        find_pictures([str(tmp_path)], "stem")
    (tmp_path / "empty").mkdir()
    with pytest.raises(XdscaleError, match="holds no images"):
        find_pictures([str(tmp_path / "empty")], "stem")


def test_links_and_names_that_cannot_be_are_refused_by_name(tmp_path):
    (tmp_path / "inner").mkdir()
    good = tmp_path / "inner" / "a.png"
    good.write_bytes(saved(Image.fromarray(PIXELS)))
    lost = tmp_path / "b.png"
    lost.symlink_to("nowhere.png")
    with pytest.raises(XdscaleError, match=r"b\.png: cannot be read: No such file"):
        find_pictures([str(tmp_path)], "stem")
    lost.unlink()
    loop = tmp_path / "inner" / "loop"
    loop.symlink_to("..")
    with pytest.raises(XdscaleError, match="loop: is a link to a folder that it lies in"):
        find_pictures([str(tmp_path)], "path")
    loop.unlink()
    (tmp_path / "linked").symlink_to("inner")
    assert [found.image_id for found in find_pictures([str(tmp_path)], "path")] == ["inner/a.png", "linked/a.png"]
    good.rename(os.fsdecode(os.fsencode(tmp_path / "inner") + b"/\xff.png"))
    with pytest.raises(XdscaleError, match="is not UTF-8 text"):
        find_pictures([str(tmp_path)], "stem")


def test_an_image_has_at_most_65535_pixels_a_side_and_so_many_in_all(tmp_path, monkeypatch):
    for size, most, is_read in (
        ((65_535, 1), 65_535, True),
        ((1, 65_535), 65_535, True),
        ((65_536, 1), 10**9, False),
        ((20, 12), 240, True),
        ((20, 12), 239, False),
    ):
        monkeypatch.setattr(pictures, "MOST_PIXELS", most)
        content = saved(Image.new("1", size))
        if is_read:
            assert read_pixels(tmp_path, content).shape == (*size[::-1], 3)
        else:
            with pytest.raises(XdscaleError, match=rf"has {size[0]:,} × {size[1]:,} pixels; at most 65,535 a side"):
                read_pixels(tmp_path, content)
