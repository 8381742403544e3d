"""Every block of docs/python.md is executed, in its order and in one namespace, on small shards and a small export."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import xdscale
from xdscale.errors import XdscaleError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_blocks_run_in_order(
    short_shards, small_export, captioned_pictures, export_of_regions, tmp_path, monkeypatch
):
    for name in ("data", "exports"):
        (tmp_path / name).mkdir()
    places = {"data/wikitext103": short_shards, "exports/xdbert-base": small_export, "data/coco": captioned_pictures}
    for name, target in places.items():
        (tmp_path / name).symlink_to(target)
    export_of_regions(tmp_path / "exports" / "visualbert-coco", 12)
    export_of_regions(tmp_path / "exports" / "vlbert-base", 12, vl_bert=True)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["language"].shape[1] == 30
    assert names["found"].pooled.shape == names["grounded"].pooled.shape == (2, 128)
    assert names["attended"].shape == (7, 2, 16)
    counts = len(names["ids"]), len(names["regions"].boxes)
    assert names["seen"].shape == (1, counts[0] + counts[1] - 1, 128)  # the table has no whole image
    assert names["packed"].states.shape == (sum(counts) + 1, 128)
    assert len(BLOCKS) >= 8


def test_every_name_is_there_and_nothing_heavy_is_imported_before_it_is_used():
    code = "import sys, xdscale; print({'torch', 'numpy', 'transformers'} & set(sys.modules)); print(dir(xdscale))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("set()")
    assert all(name in shown for name in xdscale.__all__)
    assert xdscale.XdscaleError is XdscaleError
    with pytest.raises(AttributeError, match="no attribute 'open_tabel'"):
        _ = xdscale.open_tabel
    assert (Path(xdscale.__path__[0]) / "py.typed").is_file()


def test_kernels_are_functions_also_after_their_modules_were_imported():
    code = (
        "import xdscale.kernels.residual_norm, xdscale.kernels.quick_gelu\n"
        "from xdscale import kernels\n"
        "print(all(callable(getattr(kernels, name)) for name in kernels.__all__))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"
