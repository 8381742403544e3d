"""Encoding from Python: what transformers and the cross-modal module give, text by text."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import xdscale
from xdscale.errors import XdscaleError
from xdscale.shards.clip_bpe import ClipBPE
from xdscale.systems.xdbert import build_adapted

TEXTS = ["A red apple on a wooden table.", "", "Dogs run, and " * 20, "A dog."]


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_states_are_those_of_transformers(small_export, kind):
    encoder = xdscale.load_encoder(kind(small_export))
    found = encoder.encode(TEXTS, batch_size=2, device="cpu")
    theirs, tokenizer = AutoModel.from_pretrained(small_export).eval(), AutoTokenizer.from_pretrained(small_export)
    for text, states, pooled in zip(TEXTS, found.states, found.pooled):
        with torch.no_grad():
            wanted = theirs(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(states, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(pooled, wanted.mean(0), atol=1e-5, rtol=1e-4)
    assert not found.pooled.requires_grad


def test_a_run_gives_what_its_export_gives(small_run, small_export):
    one, other = (xdscale.load_encoder(folder).encode(TEXTS) for folder in (str(small_run), small_export))
    assert torch.equal(one.pooled, other.pooled)
    one, other = (xdscale.load_cross_modal(folder).encode(TEXTS[:1]) for folder in (str(small_run), small_export))
    assert torch.equal(one.pooled, other.pooled)


def test_cross_modal_states_are_those_of_each_text_alone(small_export):
    found = xdscale.load_cross_modal(small_export).encode(TEXTS)
    model, tokenizer = build_adapted(small_export), AutoTokenizer.from_pretrained(small_export)
    for text, states in zip(TEXTS, found.states):
        ids = ClipBPE().encode([text])[0]
        blocks = [ids[first : first + 75] for first in range(0, max(1, len(ids)), 75)]
        clip_ids = np.zeros((1, len(blocks), 77), np.int64)
        for row, block in enumerate(blocks):
            clip_ids[0, row, : len(block) + 2] = [49_406, *block, 49_407]
        lengths = torch.tensor([[len(block) + 2 for block in blocks]])
        with torch.no_grad():
            wanted, _ = model(tokenizer(text, return_tensors="pt")["input_ids"], torch.from_numpy(clip_ids), lengths)
        torch.testing.assert_close(states, wanted[0], atol=1e-5, rtol=1e-4)


def test_one_text_and_none(small_export):
    encoder = xdscale.load_encoder(small_export)
    assert torch.equal(encoder.encode(TEXTS[0]).pooled, encoder.encode(TEXTS[:1]).pooled)
    assert encoder.encode([]).pooled.shape == (0, 128)


def test_long_texts_are_an_error_or_cut(small_export):
    long = "word " * 600
    for encoder in (xdscale.load_encoder(small_export), xdscale.load_cross_modal(small_export)):
        with pytest.raises(XdscaleError, match=r"text 1 \('word word.*has 600 tokens, but .* takes 510.*truncate=True"):
            encoder.encode(["short", long])
        cut, short = encoder.encode([long, "word " * 510], truncate=True).states
        torch.testing.assert_close(cut, short, atol=1e-5, rtol=1e-4)


def test_what_is_no_text_is_told(small_export):
    encoder = xdscale.load_encoder(small_export)
    with pytest.raises(XdscaleError, match="text 1 is None; expected a str"):
        encoder.encode(["A dog.", None])
    with pytest.raises(XdscaleError, match="batch_size = 0; expected 1 or more"):
        encoder.encode(TEXTS, batch_size=0)
    with pytest.raises(XdscaleError, match="device = nosuch: Expected one of cpu, cuda"):
        encoder.encode(TEXTS, device="nosuch")


def test_a_run_of_another_system_is_told(small_run, monkeypatch):
    monkeypatch.setattr("xdscale.encoder.stored_state", lambda _: {"model.encoder.pooler.bias": torch.zeros(1)})
    with pytest.raises(XdscaleError, match="was trained as 'xdbert': there is no encoder of texts alone in it; 'xdsc"):
        xdscale.load_encoder(small_run)


@pytest.mark.parametrize(
    ("family", "loader"), [("visual_bert", "transformers' VisualBertModel"), ("vl_bert", r".*\.load_vlbert")]
)
def test_of_an_export_that_reads_regions_is_told_what_loads_it(tmp_path, family, loader):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(XdscaleError, match=rf"model_type is '{family}'; .* is loaded by {loader} \(docs/python\.md\)"):
        xdscale.load_encoder(tmp_path)


def test_what_is_no_model_is_told(small_export, tmp_path, wiki_shards):
    with pytest.raises(XdscaleError, match="neither a run folder"):
        xdscale.load_cross_modal(wiki_shards)
    with pytest.raises(XdscaleError, match=r"config\.json: not a readable JSON file"):
        xdscale.load_encoder(str(wiki_shards))
    shutil.copytree(small_export, tmp_path / "alone", ignore=shutil.ignore_patterns("cross_modal"))
    with pytest.raises(XdscaleError, match="nor an export of a cross-modal model"):
        xdscale.load_cross_modal(tmp_path / "alone")
    xdscale.load_encoder(tmp_path / "alone")


def test_a_table_has_rows_and_columns(wiki_shards):
    table = xdscale.open_table(str(wiki_shards), "validation")
    rows = np.array([0, len(table) - 1, 0])
    language, (values, offsets) = table.read("language", rows), table.read_ragged("clip", rows)
    last = table[-1]
    assert np.array_equal(last["language"], language[1])
    assert np.array_equal(last["clip"], values[offsets[1] : offsets[2]])
    assert language.shape == (3, 126)
    assert [row["language"].tolist() for row in table][-1] == language[1].tolist()
    with pytest.raises(IndexError, match=f"no row {len(table)}"):
        table[len(table)]
    with pytest.raises(XdscaleError, match=r"\[slice\(0, 2, None\)\]: expected the number of one row; `read` and"):
        table[0:2]
    with pytest.raises(XdscaleError, match="no column 'langauge'"):
        table.read("langauge", rows)
    with pytest.raises(XdscaleError, match="no split 'test'"):
        xdscale.open_table(wiki_shards, "test")
