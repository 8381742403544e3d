"""What is asked of `xdscale regions import` and `extract` arrives where regions are made."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from xdscale.commands.regions import regions_app
from xdscale.errors import XdscaleError
from xdscale.extraction.extract import ExtractOptions


@pytest.fixture
def asked(monkeypatch):
    """Returns a function of a command and its options: what is asked of the source, and of the build."""
    of_source, of_build = [], []

    def source(*arguments, **options):
        of_source.append((arguments, options))
        return "source"

    monkeypatch.setattr("xdscale.shards.sources.regions.importing.region_files", source)
    monkeypatch.setattr("xdscale.extraction.extract.region_source", source)
    for file in ("regions", "regions_extract"):
        build = f"xdscale.commands.{file}.build_and_report"
        monkeypatch.setattr(build, lambda *arguments: of_build.append(arguments))

    def call(command, values, *flags):
        words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        words += ["--out", "/o", "--workers", "3", "--part", "1/2", "--overwrite", *flags]
        done = CliRunner().invoke(regions_app, [command, "a", "b", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        [(made, out, _, workers, part, overwrite)] = of_build
        assert (made.args, out, workers, (part.index, part.of), overwrite) == (("source",), Path("/o"), 3, (1, 2), True)
        return of_source[0]

    return call


def test_every_option_of_an_import_is_passed_on(asked):
    same = {"classes": Path("/c"), "attributes": Path("/t"), "background": "3", "encoding": "u8"}
    same |= {"largest_error": 0.05, "class_probs": "all", "shard_images": 7, "whole_image": "first"}
    renamed = {"boxes": ("box_form", "xywh"), "units": ("box_units", "shares"), "order": ("region_order", "confidence")}
    reading = {"columns": "id,-,boxes", "sizes": "640x480", "ids": "number", "jpegs": "/j", "bad_images": "skip"}
    values = {"format": "coco", "detector": "d"} | same | {name: value for name, (_, value) in renamed.items()}
    arguments, options = asked("import", values | reading)
    assert arguments == (["a", "b"], "coco", "d")
    how = options.pop("reading")
    assert options == same | dict(renamed.values())
    assert (how.columns, how.ids, how.jpegs, how.bad_images) == (("id", "-", "boxes"), "number", Path("/j"), "skip")
    assert how.sizes.of("any", "here") == (640, 480)


@pytest.mark.parametrize("option", ["--sizes", "--columns"])
def test_an_empty_value_is_not_the_default(tmp_path, option):
    """As of a variable that is not set."""
    (tmp_path / "a.tsv").write_text("1\t9\t9\t0\t\t\n")
    words = ["import", str(tmp_path / "a.tsv"), "--format", "butd", "--detector", "butd", "--out", str(tmp_path / "o")]
    with pytest.raises(XdscaleError, match="an empty name is given|--columns: no column ''"):
        CliRunner().invoke(regions_app, [*words, option, ""], catch_exceptions=False)


def test_every_option_of_an_extraction_is_passed_on(asked):
    values = {"network": "n", "weights": "w", "boxes": "grid:2x2", "stage": "s", "short_side": 99, "threshold": 0.5}
    values |= {"fewest": 2, "most": 5, "batch": 4, "ids": "path", "bad_images": "skip", "device": "cuda:1"}
    kept = {"encoding": "u8", "class_probs": "none", "shard_images": 6}
    flags = ("--whole-image", "--standardize", "--store-images")
    arguments, options = asked("extract", values | kept, *flags)
    on = {"whole_image": True, "standardize": True, "store_images": True}
    assert arguments == (["a", "b"], ExtractOptions(**values | on))
    assert options == kept
