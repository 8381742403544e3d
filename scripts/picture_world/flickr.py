"""Flickr30K Entities' sentences and boxes, and SNLI-VE's hypotheses about the same pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from .balance import Candidate, balanced
from .folder import Folder
from .scenes import COLORS, GROUNDS, HEIGHT, KINDS, WIDTH, Scene, draw_scene, generator
from .wording import ENTITY_TYPES, Piece, captions, entities, text

FIRST_ID = 1_000_000
SPLITS = ("train", "val", "test")
LABELS = ("entailment", "neutral", "contradiction")
_SNLI_VE = {"train": "train", "val": "dev", "test": "test"}


def write_flickr(out: Path, seed: int, counts: dict[str, int]) -> None:
    """Writes pictures with five sentences each, the boxes of their phrases, and hypotheses with a label."""
    with Folder(out / "Flickr30kEntities", seed) as folder, Folder(out / "SNLI-VE", seed) as snli_ve:
        number = FIRST_ID
        for split in SPLITS:
            ids = list(range(number, number + counts["train" if split == "train" else "val"]))
            number += len(ids)
            scenes = [draw_scene(generator(seed, "flickr", image)) for image in ids]
            said = [captions(generator(seed, "captions", image), scene) for image, scene in zip(ids, scenes)]
            for image, scene, sentences in zip(ids, scenes, said):
                folder.picture(f"flickr30k-images/{image}.jpg", scene)
                marked = "".join(_marked(sentence, _numbers(image, scene)) + "\n" for sentence in sentences)
                folder.write(f"Sentences/{image}.txt", marked.encode())
                folder.write(f"Annotations/{image}.xml", _boxes(image, scene).encode())
            folder.write(f"{split}.txt", "".join(f"{image}\n" for image in ids).encode())
            snli_ve.lines(f"snli_ve_{_SNLI_VE[split]}.jsonl", _hypotheses(ids, scenes, said))


def _numbers(image: int, scene: Scene) -> dict[str, int]:
    """Returns numbers of entities, by kind of thing and by ground; they are single in the whole corpus."""
    names = [*entities(scene), *GROUNDS]
    return {name: (image - FIRST_ID) * 10 + place for place, name in enumerate(names, 1)}


def _marked(pieces: Sequence[Piece], numbers: dict[str, int]) -> str:
    marked = []
    for piece in pieces:
        if not isinstance(piece, str):
            phrase, thing = piece
            marked.append(f"[/EN#{numbers[thing.kind]}/{ENTITY_TYPES.get(thing.kind, 'other')} {phrase}]")
        elif piece in GROUNDS:
            marked.append(f"[/EN#{numbers[piece]}/scene {piece}]")
        else:
            marked.append(piece)
    return " ".join(marked) + " ."


def _boxes(image: int, scene: Scene) -> str:
    numbers = _numbers(image, scene)
    objects = []
    for kind, thing in entities(scene).items():
        edges = "".join(f"<{edge}>{at}</{edge}>" for edge, at in zip(("xmin", "ymin", "xmax", "ymax"), thing.box))
        objects.append(f"<object><name>{numbers[kind]}</name><bndbox>{edges}</bndbox></object>")
    for ground in scene.grounds:
        objects.append(f"<object><name>{numbers[ground]}</name><scene>1</scene><nobndbox>1</nobndbox></object>")
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation><filename>{image}.jpg</filename>{size}{''.join(objects)}</annotation>\n"


def _hypotheses(ids: Sequence[int], scenes: Sequence[Scene], said: Sequence[list[list[Piece]]]) -> Iterator[dict]:
    found = (candidate for place, scene in enumerate(scenes) for candidate in _candidates(place, scene))
    for number, hypothesis in enumerate(balanced(found, {"": LABELS})):
        image = ids[hypothesis.place]
        caption = number % len(said[hypothesis.place])
        yield {
            "annotator_labels": [hypothesis.answer],
            "captionID": f"{image}.jpg#{caption}",
            "gold_label": hypothesis.answer,
            "pairID": f"{image}.jpg#{caption}r{number}",
            "sentence1": text(said[hypothesis.place][caption]) + ".",
            "sentence2": hypothesis.text,
            "Flickr30K_ID": str(image),
        }


def _candidates(place: int, scene: Scene) -> Iterator[Candidate]:
    """Of a thing that is not in the picture, its colour is neither true nor false."""
    for kind in KINDS:
        for color in COLORS:
            label = "entailment" if scene.has(kind, color) else "contradiction" if scene.has(kind) else "neutral"
            yield Candidate(f"The {kind} is {color}.", label, place)
