"""A small corpus, its tokenizer, and datasets built from it."""

import functools
import http.server
import random
import threading
from pathlib import Path

import pytest

from xdscale.shards import remote
from xdscale.shards.clip_bpe import ClipBPE
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.manifest import Manifest
from xdscale.shards.sources import text
from xdscale.shards.sources.text import TextOptions, build_shards

WORDS = "the river runs slowly past old café walls while seven birds sing; don't stop, it’s 1984 AT&T naïve".split()


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of 1 to 6 paragraphs of 5 to 60 words, blank lines between the documents."""
    chance = random.Random(7)
    documents = [
        "\n".join(" ".join(chance.choices(WORDS, k=chance.randint(5, 60))) for _ in range(chance.randint(1, 6)))
        for _ in range(60)
    ]
    path = tmp_path_factory.mktemp("corpus") / "small.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_build(small_corpus: Path, cassette_model: Path):
    """Builds the small corpus in sequences of 30 ids, some shards of each split."""

    def build(out: Path, **options):
        defaults = {
            "language_tokenizer": str(cassette_model),
            "sequence_length": 30,
            "clip_blocks": 1,
            "validation_fraction": 0.2,
            "shard_text_bytes": 6000,
        }
        how = {name: options.pop(name) for name in ("workers", "part", "overwrite", "on_progress") if name in options}
        return build_shards([small_corpus], out, TextOptions(**defaults | options), **how)

    return build


@pytest.fixture(scope="session")
def small_dataset(small_build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That dataset, not to be changed."""
    out = tmp_path_factory.mktemp("small") / "dataset"
    small_build(out)
    return out


@pytest.fixture(scope="session")
def open_clip_tokenizer():
    """open_clip's own tokenizer, the reference for CLIP ids."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def loaded_once():
    """Tokenizers are loaded once for all builds of a module, which are small and many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "ClipBPE", functools.cache(ClipBPE))
        patch.setattr(text, "load_language_tokenizer", functools.cache(load_language_tokenizer))
        yield


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; spoils the first `spoil[name]` answers for a file by one flipped byte."""

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        self.server.asked.append(name)
        if self.server.spoil.get(name, 0) <= 0:
            return super().do_GET()
        self.server.spoil[name] -= 1
        content = bytearray(open(self.translate_path(self.path), "rb").read())
        content[len(content) // 2] ^= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(small_dataset, monkeypatch):
    """A server on the small dataset; attempts follow each other at once."""
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.0, 0.0))
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=small_dataset)
    ) as server:
        server.asked, server.spoil = [], {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # or each end takes half a second
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def records(small_dataset):
    return Manifest.load(small_dataset).shards
