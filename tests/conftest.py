"""Small real data that ships in registry packages, and real launches."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from xdscale.names import resolve_path

ROOT = Path(__file__).parent.parent
WIKI_DUMP = "package:gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
ADAPT = ("--module", "xdscale.adapt")

os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
def wiki_text(wiki_dump: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 40 articles of the dump as plain text."""
    from xdscale.shards.corpus import read_documents

    path = tmp_path_factory.mktemp("text") / "articles.txt"
    with path.open("w", encoding="utf-8") as file:
        for number, document in enumerate(read_documents(wiki_dump)):
            if number == 40:
                break
            file.write("\n".join(document) + "\n\n")
    return path


@pytest.fixture(scope="session")
def wiki_shards(wiki_text: Path, cassette_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of those articles in sequences of 126 ids."""
    from xdscale.shards.build import build_shards

    out = tmp_path_factory.mktemp("shards") / "wiki"
    build_shards([wiki_text], out, language_tokenizer=str(cassette_model), sequence_length=126, validation_fraction=0.1)
    return out


@pytest.fixture(scope="session")
def short_shards(wiki_text: Path, cassette_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of those articles in sequences of 30 ids, for runs whose subject is not the text."""
    from xdscale.shards.build import build_shards

    out = tmp_path_factory.mktemp("short") / "wiki"
    build_shards([wiki_text], out, language_tokenizer=str(cassette_model), sequence_length=30, validation_fraction=0.1)
    return out


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


@dataclass
class Launch:
    """What a finished launch left."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def adapt():
    """Runs `xdscale.adapt`, under the real deepspeed launcher when there is more than one rank."""
    yield from _launcher()


@pytest.fixture(scope="module")
def adapt_in_module():
    """As `adapt`, for fixtures that tests of a module share."""
    yield from _launcher()


def _launcher():
    started: list[subprocess.Popen] = []

    def start(*arguments: str, ranks: int = 1, program: tuple[str, ...] = ADAPT) -> subprocess.Popen:
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        if ranks == 1:
            command = [sys.executable, *("-m" if word == "--module" else word for word in program)]
        else:
            launcher = Path(sys.executable).with_name("deepspeed")
            command = [
                str(launcher),
                "-q",
                "--num_accelerators",
                str(ranks),
                "--master_port",
                str(_free_port()),
                *program,
            ]
        # A session of its own, so that the whole group can be ended: the launcher orphans its ranks on SIGTERM.
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        started.append(process)
        return process

    def run(*arguments: str, ranks: int = 1, timeout_seconds: float = 300, program: tuple[str, ...] = ADAPT) -> Launch:
        process = start(*arguments, ranks=ranks, program=program)
        stdout, stderr = process.communicate(timeout=timeout_seconds)
        return Launch(process.returncode, stdout, stderr)

    run.start = start
    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def free_port():
    """Returns a function that names a port nobody listens on."""
    return _free_port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
