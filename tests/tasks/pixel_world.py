"""A few pictures as JPEG files with boxes, expressions and questions about them, and a VL-BERT of pixels."""

import io
import json
import pickle

import numpy as np
import torch
from PIL import Image

from xdscale.data.pictures import MEANS
from xdscale.models.fast_rcnn import FastRCNN
from xdscale.pretrained.language import load_language_encoder
from xdscale.pretrained.language_files import save_tokenizer
from xdscale.pretrained.vlbert import from_bert, save_pooler, save_vlbert
from xdscale.recipes.mlm.schema import Language
from xdscale.shards.regions import Detector, RegionTable
from xdscale.shards.sources.regions.source import RegionImage, build_regions

SIZES = ((60, 40), (40, 60), (50, 50))
SCALED = ((43, 29), (29, 43), (32, 32))
"""Of the sizes: the shorter side becomes 32, or less so that the longer one has 44 at most."""
PIXELS = {"short_side": 32, "long_side": 44}
OBJECTS = (["person", "car"], ["toothbrush"], ["dog", "dog", "person"])
"""Of each question."""
WORDS = ("the left dog", "red", "a right hand on the left")


def drawn(number):
    """A picture of patches, as a JPEG file, and its boxes."""
    chance, (width, height), file = np.random.default_rng(number), SIZES[number % 3], io.BytesIO()
    patches = Image.fromarray(chance.integers(0, 256, (height // 5, width // 5, 3), np.uint8))
    patches.resize((width, height)).save(file, "JPEG", quality=95)
    corner = chance.random((2 + number % 3, 2)) * 20
    return file.getvalue(), np.concatenate([corner, corner + 6 + chance.random(corner.shape) * 12], 1).astype("<f4")


def table_of(folder, whole_image="none"):
    """Nine images with boxes and files, without features; the first region may be the whole image."""
    images = []
    for number in range(9):
        jpeg, boxes = drawn(number)
        if whole_image == "first":
            boxes = np.concatenate([[[0, 0, *SIZES[number % 3]]], boxes]).astype("<f4")
        images.append(RegionImage(str(number), SIZES[number % 3], boxes, None, {}, None, jpeg, str(number)))
    build_regions(images, folder, Detector(model="drawn"), whole_image=whole_image)
    return RegionTable.open(folder)


def model_of(bert, out, *, trunk=True):
    """A VL-BERT of pixels made of a BERT, with heads and perhaps a small branch of its own, whose images count."""
    torch.manual_seed(0)
    spec = Language(name=str(bert))
    built = from_bert(load_language_encoder(spec, dropout=0.1), masks_features=False)
    for name, parameter in built.named_parameters():
        if "visual_norm" in name or name.startswith(("region_tokens", "text_only")):
            torch.nn.init.normal_(parameter, std=0.3)
    size, state = built.config.hidden_size, {f"model.{name}": value for name, value in built.state_dict().items()}
    if trunk:
        branch = FastRCNN((1, 1, 1, 1), width=16)
        for name, parameter in branch.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.data.uniform_(0.1, 0.3)
        state |= {f"trunk.{name}": value for name, value in branch.state_dict().items()}
    state |= {"masked_region.transform.weight": torch.randn(size, size) * 0.1}
    state |= {"masked_region.transform.bias": torch.randn(size) * 0.1}
    save_vlbert(built.config, state, out)
    save_pooler(spec, out)
    save_tokenizer(bert, out, positions=built.config.max_position_embeddings)
    return out


def expressions_in(data):
    """RefCOCO+ in its public files: three expressions for the first box of each image, of which six are to train on."""
    (data / "refcoco+").mkdir()
    references, annotations = [], []
    for number, split in enumerate(["train"] * 6 + ["val", "testA", "testB"]):
        left, top, right, bottom = drawn(number)[1][0].tolist()
        sentences = [{"tokens": text.split(), "sent_id": 9 * number + n} for n, text in enumerate(WORDS)]
        about = {"ann_id": number, "image_id": number, "split": split}
        references.append({"ref_id": number, "sentences": sentences} | about)
        box = [left, top, right - left, bottom - top]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box})
    (data / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps(references))
    listed = {"annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (data / "refcoco+" / "instances.json").write_text(json.dumps(listed))
    return data


def scaled(number):
    """A picture scaled, and its boxes there with the whole image first, as the release's transforms make both."""
    jpeg, boxes = drawn(number)
    size, old = SCALED[number % 3], SIZES[number % 3]
    image = Image.open(io.BytesIO(jpeg)).convert("RGB").resize(size, Image.Resampling.BILINEAR)
    ratios = np.array([size[0] / old[0], size[1] / old[1]] * 2)
    return image, np.concatenate([[[0, 0, size[0] - 1, size[1] - 1]], boxes * ratios])


def normalised(image):
    """Its pixels in fp64: blue, green, red, less the means."""
    return torch.tensor(np.asarray(image, np.float64)[:, :, ::-1] - MEANS.astype(np.float64)).permute(2, 0, 1)


def outline(box, part):
    """A triangle in a box, with a corner outside of it."""
    left, top, right, bottom = box
    return [[left - 3, top], [right, top + 1.5], [left + (right - left) * part, bottom]]


def questions_in(folder, tags=((0, 0), (0, 0), (0, 0))):
    """Three questions of VCR to train on, with the metadata of their images.

    Args:
        folder: of the data.
        tags: the object that each question speaks of, and that its third answer speaks of.
    """
    images = folder / "VCR" / "vcr1images" / "m"
    images.mkdir(parents=True)
    lines = []
    for number, objects in enumerate(OBJECTS):
        boxes = [[*box, 0.9] for box in boxes_of(number).tolist()]
        outlines = [[outline(box[:4], 0.4), outline(box[:4], 0.8)] for box in boxes]
        outlines[-1] = outlines[-1] if number else []  # the car of the first one has none
        width, height = SIZES[number]
        stored = {"names": objects, "boxes": boxes, "segms": outlines, "width": width, "height": height}
        (images / f"{number}.json").write_text(json.dumps(stored))
        lines.append({
            "annot_id": f"x-{number}", "img_fn": f"m/{number}.jpg", "metadata_fn": f"m/{number}.json",
            "objects": objects, "question": ["Is", [tags[number][0]], "on", "the", "left", "?"],
            "answer_choices": [["No", "."], ["It", "is", "red", "."], [[tags[number][1]], "sits", "."], ["Yes"]],
            "answer_label": number,
            "rationale_choices": [["Snow"], ["Rain"], ["It", "is"], ["So"]], "rationale_label": 0,
        })  # fmt: skip
    for split in ("train", "val"):
        (folder / "VCR" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def boxes_of(number):
    """As many of a picture's boxes as it has objects."""
    _, boxes = drawn(number + 3)  # of the same size, with up to four boxes
    return np.concatenate([boxes, boxes * 0.9])[: len(OBJECTS[number])]


def pictures_of_questions(folder, whole_image="first"):
    """The whole image, then the objects; whether the table says of it that it is that, or not."""
    images = []
    for number in range(3):
        size = SIZES[number]
        boxes = np.concatenate([[[0, 0, *size]], boxes_of(number)]).astype("<f4")
        jpeg, _ = drawn(number)
        images.append(RegionImage(f"m/{number}.jpg", size, boxes, None, {}, None, jpeg, str(number)))
    build_regions(images, folder, Detector(model="drawn"), whole_image=whole_image)
    return RegionTable.open(folder)
