"""Every command of docs/extract.md runs, in its order, with small networks of the same families and random weights."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from xdscale.cli import app
from xdscale.shards.regions import RegionTable

PAGE = (Path(__file__).parents[2] / "docs" / "extract.md").read_text(encoding="utf-8").replace(" \\\n    ", " ")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if not line.startswith("#")
]
SMALL = {
    "torchvision:fasterrcnn_resnet50_fpn_v2": "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn",
    "torchvision:resnet101": "torchvision:resnet18",
    "timm:resnet50": "timm:test_resnet",
}


def write_files(photographs):
    Path("images").mkdir()
    names = sorted(path.name for path in photographs.iterdir())[:3]
    for name in names:
        Path("images", name).write_bytes((photographs / name).read_bytes())
    sizes = [Image.open(Path("images", name)).size for name in names]
    images = [
        {"id": number, "file_name": name, "width": width, "height": height}
        for number, (name, (width, height)) in enumerate(zip(names, sizes))
    ]
    Path("annotations").mkdir()
    coco = {"images": images, "annotations": [{"image_id": 1, "bbox": [3, 4, 20, 30]}], "categories": []}
    Path("annotations/instances.json").write_text(json.dumps(coco))
    folder = Path("VCR/vcr1images/movie")
    folder.mkdir(parents=True)
    (folder / "a@0.png").write_bytes(Path("images", names[0]).read_bytes())
    width, height = sizes[0]
    metadata = {"boxes": [[1, 2, 30, 40, 0.9], [5, 5, 20, 20, 0.5]], "width": width, "height": height}
    (folder / "a@0.json").write_text(json.dumps(metadata))


def test_the_commands_run_in_order(tmp_path, monkeypatch, photographs, yolos):
    monkeypatch.chdir(tmp_path)
    write_files(photographs)
    for command in COMMANDS:
        for network, small in (SMALL | {"transformers:facebook/detr-resnet-50": f"transformers:{yolos}"}).items():
            command = command.replace(f"{network} ", f"{small} --weights random ")
        result = CliRunner().invoke(app, shlex.split(command)[1:] + ["--workers", "1"] * ("extract" in command))
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception}"
    found = {name: RegionTable.open(Path("data", name)) for name in ("found", "detr", "gold", "vcr", "grid", "parts")}
    assert found["found"].rows(["3"]).tolist() == [2]
    counts = {name: np.diff(table.read(np.arange(len(table))).offsets).tolist() for name, table in found.items()}
    assert counts["gold"] == [1, 2, 1]
    assert counts["grid"] == [36] * 3
    assert counts["vcr"] == [3]
    assert counts["detr"] == [12] * 3  # the small one has no more queries
    assert all(10 <= count <= 100 for count in counts["found"])
    assert found["vcr"].image_ids(np.array([0])) == ["movie/a@0.png"]
    assert found["grid"].build.encoding == "u8"
    assert counts["parts"] == counts["found"]
