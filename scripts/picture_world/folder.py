"""Writing files of a benchmark: one object a file, one a line, pictures."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from .drawing import encoded
from .scenes import Scene, generator, propose

INFO = {"description": "picture world: drawn by scripts/picture_world", "version": "1.0", "year": 2026}
BOXES = "boxes.json"


class Folder:
    """One benchmark's folder.

    Args:
        path: made if it does not exist.
        seed: decides the proposed boxes.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self._seed = seed
        self._boxes: dict[str, dict[str, list]] = {}

    def json(self, name: str, value: Any) -> None:
        """Writes one value."""
        self.write(name, json.dumps(value).encode())

    def lines(self, name: str, rows: Iterable[Any]) -> None:
        """Writes JSON Lines."""
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, its folder too."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def picture(self, name: str, scene: Scene) -> None:
        """Draws a scene, and proposes boxes under the name's last part without its ending."""
        path = Path(name)
        self.write(name, encoded(scene, "PNG" if path.suffix == ".png" else "JPEG"))
        boxes, scores = propose(generator(self._seed, "boxes", name), scene)
        self._boxes[path.stem] = {"boxes": boxes, "scores": scores}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Adds the proposed boxes of all pictures to those of other benchmarks."""
        path = self.path.parent / BOXES
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(found | self._boxes, sort_keys=True), encoding="utf-8")
