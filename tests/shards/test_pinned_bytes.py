"""Shards have the bytes that earlier versions wrote, and a dataset is one whatever its files were called."""

import hashlib
import json

import pytest

from xdscale.errors import XdscaleError
from xdscale.shards.manifest import Manifest
from xdscale.shards.sources.text import TextOptions, build_shards
from xdscale.shards.table import Table
from xdscale.shards.units import identity
from xdscale.shards.verify import verify_shards

pytestmark = pytest.mark.usefixtures("loaded_once")

# Written down on 2026-11-26 from commit 7714c2b.
SHARDS = "745dab79e3bd98b1f513ab4233dcdf23b2f80aa30a4144e4495667ff37819a50"


def test_shards_have_the_bytes_of_earlier_versions(small_dataset):
    """Else a build that was stopped could be finished with shards of another kind."""
    manifest = Manifest.load(small_dataset)
    digests = [shard.sha256 for shard in manifest.shards]
    assert len(digests) == 12
    assert hashlib.sha256("".join(digests).encode()).hexdigest() == SHARDS


def test_a_renamed_corpus_is_the_same_corpus(small_dataset):
    build = Manifest.load(small_dataset).tables["text"].build

    def with_inputs(**change):
        return build | {"inputs": [item | change for item in build["inputs"]]}

    assert identity(with_inputs(name="elsewhere/other.txt")) == identity(build)
    assert "small.txt" not in json.dumps(identity(build))
    assert identity(with_inputs(sha256="0" * 64)) != identity(build)
    assert identity(with_inputs(bytes=1)) != identity(build)


def test_the_last_unit_may_be_too_short_for_a_sequence(cassette_model, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(["a river runs past old walls " * 40, "only these five words here"]) + "\n")
    how = {"language_tokenizer": str(cassette_model), "sequence_length": 30, "validation_fraction": 0}
    manifest = build_shards([corpus], tmp_path / "out", TextOptions(shard_text_bytes=500, **how))
    assert manifest.counts["documents"] == 2
    assert len(manifest.splits["train"].shards) == 1
    assert len(Table(tmp_path / "out", "train")) == manifest.splits["train"].rows == 8


def test_all_that_is_wrong_with_a_dataset_is_counted(small_build, tmp_path):
    """One problem and two; a tar file too many is one."""
    small_build(tmp_path)
    extra = tmp_path / "train-999999.tar"
    extra.touch()
    with pytest.raises(XdscaleError, match="1 problem found.*\n.*train-999999.tar: extra"):
        verify_shards(tmp_path)
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(XdscaleError, match="2 problems found"):
        verify_shards(tmp_path)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_manifest_whose_counts_contradict_each_other_is_refused(small_build, tmp_path, change):
    small_build(tmp_path)
    path = tmp_path / "dataset.json"
    values = json.loads(path.read_text())
    values["tables"]["text"]["splits"]["train"]["rows"] += change
    path.write_text(json.dumps(values))
    with pytest.raises(XdscaleError, match="but the shards hold"):
        Manifest.load(tmp_path)
