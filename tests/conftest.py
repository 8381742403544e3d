"""Small real data that ships in registry packages, and what is made of it."""

import gc
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from xdscale.names import resolve_path

from .launching import adapt, fork, free_port, launch_ranks, small_export, small_run, start  # noqa: F401 - fixtures

ROOT = Path(__file__).parent.parent
WIKI_DUMP = "package:gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first: begun last, they would keep one worker long after the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Files outlive a process that is killed without it; what a sync achieves is simulated where calls are seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def pytest_collection_finish() -> None:
    """Leaves what was imported to itself: else each search for garbage looks through millions of lasting objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def made_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Callable[[Path], object]], Path]:
    """Returns a function (name, what fills a folder) -> folder: made for all workers by the first one that needs it.

    To be read alone: a test that changes something does so in a copy.
    """
    own = tmp_path_factory.getbasetemp()
    # Not by a variable: a pytest that a worker starts has that too, and a folder of its own beside those of other days.
    place = own.parent if hasattr(request.config, "workerinput") else own

    def made(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = place / name, place / f".{name}.done"
        with FileLock(place / f".{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def wiki_dump() -> Path:
    """106 articles of the English Wikipedia, a genuine pages-articles dump."""
    return resolve_path(WIKI_DUMP)


@pytest.fixture(scope="session")
def cassette_model() -> Path:
    """A pretrained BERT with 2 layers of 128 and BERT-base-uncased's vocabulary."""
    return resolve_path("package:cognition/model")


@pytest.fixture(scope="session")
def clip_tiny() -> Path:
    """open_clip model configuration of a small text tower."""
    return ROOT / "xdscale" / "recipes" / "clip-tiny.json"


@pytest.fixture(scope="session")
def wiki_text(wiki_dump: Path, made_once: Callable[..., Path]) -> Path:
    """The first 40 articles of the dump as plain text."""
    from xdscale.shards.sources.corpus import read_documents

    def write(folder: Path) -> None:
        with (folder / "articles.txt").open("w", encoding="utf-8") as file:
            for document in itertools.islice(read_documents(wiki_dump), 40):
                file.write("\n".join(document) + "\n\n")

    return made_once("text", write) / "articles.txt"


@pytest.fixture(scope="session")
def wiki_shards(wiki_text: Path, cassette_model: Path, made_once: Callable[..., Path]) -> Path:
    """Shards of those articles in sequences of 126 ids."""
    return made_once("shards", lambda folder: _in_sequences(126, wiki_text, cassette_model, folder / "wiki")) / "wiki"


@pytest.fixture(scope="session")
def short_shards(wiki_text: Path, cassette_model: Path, made_once: Callable[..., Path]) -> Path:
    """Shards of those articles in sequences of 30 ids, for runs whose subject is not the text."""
    return made_once("short", lambda folder: _in_sequences(30, wiki_text, cassette_model, folder / "wiki")) / "wiki"


def _in_sequences(length: int, text: Path, model: Path, out: Path) -> None:
    from xdscale.shards.sources.text import TextOptions, build_shards

    build_shards(
        [text], out, TextOptions(language_tokenizer=str(model), sequence_length=length, validation_fraction=0.1)
    )


@pytest.fixture(scope="session")
def captioned_pictures(cassette_model: Path, made_once: Callable[..., Path]) -> Path:
    """A dataset of 80 images of 1 to 8 regions of 12 numbers, with 3 captions each that say what is in them."""
    return made_once("pictures", lambda folder: _draw_captioned(folder, cassette_model)) / "dataset"


def _draw_captioned(folder: Path, model: Path) -> None:
    import numpy as np

    from xdscale.shards.build import build_table
    from xdscale.shards.regions import Detector
    from xdscale.shards.sources.caption_build import CaptionOptions
    from xdscale.shards.sources.captions import CaptionSource
    from xdscale.shards.sources.regions.source import RegionImage, build_regions

    chance = np.random.default_rng(0)
    things = ["a dog", "two red cars", "an old house", "the sea", "a child with a ball", "some apples"]
    images, annotations = [], []
    for number in range(80):
        shown = chance.integers(0, len(things), 1 + number % 8)
        corners = np.sort(chance.random((len(shown), 2, 2)) * [60 + number, 50], axis=1)
        features = np.eye(12, dtype=np.float32)[shown] + 0.1 * chance.random((len(shown), 12), np.float32)
        boxes = corners.reshape(-1, 4).astype(np.float32)
        probs = np.full((len(shown), 7), 0.02) + 0.86 * np.eye(7)[shown]
        images.append(RegionImage(str(number), (60 + number, 50), boxes, features, {}, probs, where=f"image {number}"))
        named = " and ".join(things[thing] for thing in shown[:3])
        captions = (f"{named}.", f"A picture of {named} on a day in May", f"Here I see {named}, and nothing else")
        annotations += [{"id": len(annotations) + k, "image_id": number, "caption": c} for k, c in enumerate(captions)]
    build_regions(images, folder / "dataset", Detector(model="drawn", class_count=7), shard_images=20)
    listed = {"images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(80)]}
    (folder / "captions.json").write_text(json.dumps(listed | {"annotations": annotations}))
    options = CaptionOptions(validation_fraction=0.2, shard_images=20)
    source = CaptionSource([folder / "captions.json"], folder / "dataset", str(model), options)
    build_table(source, folder / "dataset")


@pytest.fixture(scope="session")
def grounded_pictures(
    captioned_pictures: Path, wiki_text: Path, cassette_model: Path, made_once: Callable[..., Path]
) -> Path:
    """The same dataset with a table of text, in sequences of 20 ids."""

    def fill(folder: Path) -> None:
        shutil.copytree(captioned_pictures, folder / "dataset")
        _in_sequences(20, wiki_text, cassette_model, folder / "dataset")

    return made_once("grounded", fill) / "dataset"


@pytest.fixture(scope="session")
def photographs(wiki_text: Path, cassette_model: Path, made_once: Callable[..., Path]) -> Path:
    """A dataset of 24 JPEG files with boxes, distributions and captions, without features, and texts."""
    return made_once("photographs", lambda folder: _photograph(folder, wiki_text, cassette_model)) / "dataset"


def _photograph(folder: Path, text: Path, model: Path) -> None:
    import numpy as np
    from PIL import Image

    from xdscale.shards.build import build_table
    from xdscale.shards.regions import Detector
    from xdscale.shards.sources.caption_build import CaptionOptions
    from xdscale.shards.sources.captions import CaptionSource
    from xdscale.shards.sources.regions.source import RegionImage, build_regions

    chance = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(24):
        size, count = ((60, 40), (40, 60), (50, 50))[number % 3], 1 + number % 4
        file = io.BytesIO()
        noise = chance.integers(0, 256, (size[1] // 5, size[0] // 5, 3), np.uint8)
        Image.fromarray(noise).resize(size).save(file, "JPEG")
        corner = chance.random((count, 2)) * 20
        boxes = np.concatenate([corner, corner + 5 + chance.random((count, 2)) * 14], 1).astype(np.float32)
        probs = chance.dirichlet(np.ones(5), count)
        images.append(RegionImage(str(number), size, boxes, None, {}, probs, file.getvalue(), f"image {number}"))
        annotations += [{"id": 2 * number + k, "image_id": number, "caption": f"a picture of {k} dogs"} for k in (0, 1)]
    out = folder / "dataset"
    build_regions(images, out, Detector(model="drawn", class_count=5), shard_images=8)
    listed = {"images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(24)]}
    (folder / "captions.json").write_text(json.dumps(listed | {"annotations": annotations}))
    options = CaptionOptions(validation_fraction=0.3)
    build_table(CaptionSource([folder / "captions.json"], out, str(model), options), out)
    _in_sequences(20, text, model, out)


@pytest.fixture(scope="session")
def small_trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fast R-CNN's branch with a few narrow blocks, all of which count, and statistics of its own."""
    import torch
    from safetensors.torch import save_file

    from xdscale.models.fast_rcnn import FastRCNN

    torch.manual_seed(0)
    trunk = FastRCNN((1, 1, 2, 3), width=16)
    for name, value in trunk.state_dict().items():
        if name.endswith("bn3.weight"):
            value.uniform_(0.1, 0.3)
        elif name.endswith("running_var"):
            value.uniform_(0.8, 1.2)
    path = tmp_path_factory.mktemp("trunk") / "trunk.safetensors"
    save_file(trunk.state_dict(), path)
    return path


@pytest.fixture
def kept_bytes() -> Callable[..., int]:
    """Returns a function that sums the unique storages that autograd keeps in one forward pass.

    Parameters, buffers and the batch are left out.
    """
    import torch

    def sum_of(module, batch):
        own = [*module.parameters(), *module.buffers(), *filter(torch.is_tensor, batch.values())]
        excluded, kept, alive = {tensor.untyped_storage().data_ptr() for tensor in own}, {}, []

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in excluded:
                kept[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)  # or its address would be used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(batch)
        return sum(kept.values())

    return sum_of


@pytest.fixture(scope="session")
def fp32_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped DeepSpeed configurations in fp32: a CPU without bf16 instructions is a hundred times slower in bf16.

    tests/plan trains with each of the files as it is.
    """
    folder = tmp_path_factory.mktemp("fp32") / "ds_configs"
    folder.mkdir()
    for path in (ROOT / "ds_configs").glob("*.json"):
        values = json.loads(path.read_text())
        values = {key: value for key, value in values.items() if key not in ("bf16", "fp16", "data_types")}
        (folder / path.name).write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def narrow_bert(cassette_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make a quickstart's BERT a quarter as wide; nobody has trained it, but it learns at this rate.

    For runs whose subject is not what they learn: the vocabularies take nearly all of their time.
    """
    import torch
    from transformers import BertConfig, BertForPreTraining

    folder = tmp_path_factory.mktemp("narrow")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForPreTraining(BertConfig(hidden_size=32, **sizes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(cassette_model / name, folder)
    return [f"model.language.name={folder}", "model.language.sha256=null", "optim.learning_rate=1e-2"]


@pytest.fixture(scope="session")
def narrow_model(narrow_bert: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make both encoders of the quickstart so, with random weights."""
    path = tmp_path_factory.mktemp("narrow") / "clip.json"
    text = {"context_length": 77, "vocab_size": 49_408, "width": 32, "heads": 2, "layers": 2}
    path.write_text(json.dumps({"embed_dim": 32, "quick_gelu": True, "text_cfg": text}))
    return [*narrow_bert, "model.language.weights=random", f"model.clip.name={path}"]
