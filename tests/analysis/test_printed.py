"""What the analyses print and write, word for word, where what they measured is given: by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from xdscale.analysis import commands, cross_attention, embeddings, pwcca, visualbert_heads, vlbert_maps
from xdscale.analysis.comparison import ComparedExample
from xdscale.analysis.cross_attention import CrossAttention
from xdscale.analysis.grounded_ratio import Grounding, read_stop_words
from xdscale.analysis.grounding import HeadAccuracy
from xdscale.analysis.shown import AttentionMap
from xdscale.analysis.visualbert_heads import HeadGrounding


def lines_of(text):
    """Returns the lines without what fills them up, and without the trailing ones of a table."""
    return [line.rstrip() for line in text.splitlines()]


def test_pwcca_stands_beside_random_ones(monkeypatch, capsys, tmp_path):
    drawn = [pwcca.Pwcca(score, np.array([score]), np.ones(1)) for score in (0.25, 0.5, 0.75)]
    given, pictures = [], []
    monkeypatch.setattr(embeddings, "load_embeddings", lambda name: SimpleNamespace(label=name.upper()))
    pair = np.zeros((1200, 3)), np.zeros((1200, 2)), ["w"] * 1200
    monkeypatch.setattr(embeddings, "paired_embeddings", lambda *both, **more: given.append((both, more)) or pair)
    monkeypatch.setattr(pwcca, "pwcca", lambda *_: pwcca.Pwcca(0.123456, np.array([0.9, 0.1]), np.ones(2)))
    monkeypatch.setattr(pwcca, "random_baseline", lambda *numbers: given.append(numbers) or drawn)
    monkeypatch.setattr(commands.pictures, "correlation_curves", lambda *shown: pictures.append(shown))
    monkeypatch.setattr(commands.pictures, "save_picture", lambda figure, path: pictures.append(path))
    commands.print_pwcca("bert", "clip", seed=7, words=1200, plot=tmp_path / "a.svg")
    assert lines_of(capsys.readouterr().out) == [
        "bert / clip",
        "words                1,200",
        "dimensions           3 and 2",
        "PWCCA                0.1235",
        "random embeddings    0.5000 ± 0.2500 (3 draws, same sizes)",
        "published (Table 2)  0.4980",
    ]
    assert given[0][1] == {"words": 1200, "seed": 7}
    assert given[1] == (1200, (3, 2), 7)
    (curves, title), path = pictures
    assert {name: curve.tolist() for name, curve in curves.items()} == {"bert / clip": [0.9, 0.1], "random": [0.25]}
    assert (title, path) == ("PWCCA 0.1235, 1,200 words", tmp_path / "a.svg")


def test_quartiles_and_means_of_ratios(capsys):
    examples = [ComparedExample(str(number), ("a",), 0, ours) for number, ours in enumerate((1, 1, 1, 1, 2, 0, 0))]
    ratios = iter([(0, 8), (1, 7), (2, 6), (8, 0), (0, 0), (1, 1), (0, 0)])
    counts = SimpleNamespace(of=lambda *texts: Grounding(*next(ratios)))
    groups, rows = commands._split("rte", examples, counts, 3)
    assert lines_of(capsys.readouterr().out) == [
        "rte: +6 correct answers, +28.57% over 3 runs; 2 of stop words and punctuation alone are left out",
        "          n  first quartile  median  third quartile  mean",
        "improved  4  0.0938          0.1875  0.4375          0.3438",
        "worsened  0",
        "equal     1  0.5000          0.5000  0.5000          0.5000",
    ]
    assert groups == {"improved": [0, 0.125, 0.25, 1], "worsened": [], "equal": [0.5]}
    assert rows[3:5] == [("rte", "3", "improved", 8, 0, 1.0), ("rte", "4", "improved", 0, 0, None)]
    ratios = iter([(1, 1)])
    commands._split("rte", examples[:1], counts, None)
    assert lines_of(capsys.readouterr().out)[0] == "rte: +1 correct answers"


def test_of_each_layer_the_most_attended_tokens_are_shown(monkeypatch, capsys, tmp_path):
    one, other = np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([[1.0, 0.0], [0.875, 0.125]])
    found = {
        "runs/a": CrossAttention(("mlm", "match"), ["[CLS]", "cat"], ["<s>", "cat"], [one, other]),
        "runs/b": CrossAttention(("mlm",), ["[CLS]", "cat"], ["<s>", "cat"], [other]),
    }
    pictures = []
    monkeypatch.setattr(cross_attention, "cross_attention", lambda folder, sentences: found[str(folder)])
    monkeypatch.setattr(commands.pictures, "attention_maps", lambda *shown: pictures.append(shown))
    monkeypatch.setattr(commands.pictures, "save_picture", lambda figure, path: pictures.append(path))
    asked = {"sentences": ["cat"], "against": Path("runs/b"), "plot": tmp_path / "a.png"}
    commands.print_cross_attention(Path("runs/a"), **asked)
    assert lines_of(capsys.readouterr().out) == [
        "2 language tokens over 2 CLIP tokens; distinct: CLIP tokens that are some language token's most attended one",
        "run                objectives  layer  entropy (nats)  share of 5 most attended  distinct",
        "runs/a             mlm match   1      0.628           100.0%                    2",
        "runs/a             mlm match   2      0.188           100.0%                    1",
        "runs/b             mlm         1      0.188           100.0%                    1",
        "uniform attention                     0.693           100.0%",
        "most attended CLIP token, runs/a",
        "language token  layer 1    layer 2",
        "[CLS]           <s> 0.500  <s> 1.000",
        "cat             cat 0.750  <s> 0.875",
        "most attended CLIP token, runs/b",
        "language token  layer 1",
        "[CLS]           <s> 1.000",
        "cat             <s> 0.875",
    ]
    ((columns, rows, keys), path) = pictures
    assert {name: len(maps) for name, maps in columns.items()} == {"a (mlm match)": 2, "b (mlm)": 1}
    assert (rows, keys, path) == ([["[CLS]", "cat"]] * 2, [["<s>", "cat"]] * 2, tmp_path / "a.png")


def accuracy(values, active, words, baseline):
    values, active = np.array(values), np.array(active)
    return HeadAccuracy(words=words, accuracy=values, mass=values / 2, active=active, baseline=baseline)


def test_the_best_heads_stand_beside_the_papers(monkeypatch, capsys, tmp_path):
    heads = accuracy([[0.75, 0.25], [0.5, 0.625]], [[False, True], [True, True]], 1234, 0.1)
    idle = accuracy([[0.5, 0.25], [0.0, 0.0]], [[False, False], [False, False]], 2, 0.5)
    relations = {"odd": idle, "det": heads}
    shown = AttentionMap(["cat"], ["0", "1"], np.arange(8.0).reshape(2, 2, 1, 2) / 8)
    pictures, made = [], []

    class Reader:
        def __init__(self, *given, **more):
            made.append((*given, more))

        def count(self):
            return HeadGrounding(heads, relations)

        def map(self, caption, categories):
            made.append((caption, categories))
            return shown

    monkeypatch.setattr(visualbert_heads, "captions_of", lambda data, split: ["A cat.", "A dog."])
    monkeypatch.setattr(visualbert_heads, "HeadReader", Reader)
    monkeypatch.setattr(visualbert_heads.RegionTable, "open", lambda name: f"table of {name}")
    monkeypatch.setattr(visualbert_heads.pictures, "attention_maps", lambda *given: pictures.append(given))
    monkeypatch.setattr(visualbert_heads.pictures, "picture_bytes", lambda figure, suffix: suffix.encode())
    (tmp_path / "c.json").write_text('{"dog": [1]}')
    out = tmp_path / "out"
    asked = {"split": "dev", "parses": Path("p"), "caption": "7#1", "categories": tmp_path / "c.json", "out": out}
    visualbert_heads.print_grounding(Path("m"), Path("d"), Path("r"), **asked)
    written = ["heads.csv", "heads.svg", "captions.txt", "relations.csv", "map-7-1.csv", "map-7-1.svg"]
    assert lines_of(capsys.readouterr().out) == [
        "m: 1,234 entities, 3 of 4 heads active",
        "                  accuracy  head  published",
        "best head         75.00     1-1   50.77",
        "best active head  62.50     2-2",
        "surest region     10.00           17.33",
        "",
        "relation  arcs   surest region  best active head       published",
        "det       1,234  10.00          62.50             2-2  19.59 → 54.01 (10-1)",
        "odd       2      50.00          –                 –",
        *(str(out / name) for name in written),
    ]
    assert (out / "captions.txt").read_text() == "A cat.\nA dog.\n"
    assert made == [(Path("m"), Path("d"), "table of r", {"split": "dev", "parses": Path("p")}), ("7#1", {"dog": [1]})]
    ((columns, rows, keys),) = pictures
    assert [weights.tolist() for weights in columns["m"]] == [[[0, 0.125]], [[0.75, 0.875]]]  # of heads 1-1 and 2-2
    assert (rows, keys) == ([["cat"]], [["0", "1"]])
    first, second, *_ = (out / "map-7-1.csv").read_text().splitlines()
    assert (first, second) == ("layer,head,position,piece,region,weight", "1,1,0,cat,0,0.000000")


def test_of_each_layer_the_largest_weight_is_shown(monkeypatch, capsys, tmp_path):
    weights = np.array([[[[0.1, 0.2]], [[0.3, 0.25]]], [[[0.5, 0.25]], [[0.125, 0.0]]]], np.float32)
    found = vlbert_maps.CaptionMaps("cat.jpg", AttentionMap(["cat"], ["image", "0"], weights), np.zeros((2, 4)))
    reader = SimpleNamespace(maps=lambda number: found)
    given, titles = [], []
    monkeypatch.setattr(vlbert_maps, "MapReader", lambda *names, **more: given.append((*names, more)) or reader)
    monkeypatch.setattr(vlbert_maps.pictures, "head_maps", lambda *shown: titles.append(shown[1:]))
    monkeypatch.setattr(vlbert_maps.pictures, "picture_bytes", lambda figure, suffix: b"")
    vlbert_maps.print_attention_maps(Path("m"), Path("d"), split="train", numbers=[3, 3], out=tmp_path / "out")
    assert lines_of(capsys.readouterr().out) == [
        "caption 3, image cat.jpg: the largest weight from a word to a region of each layer",
        "layer  head  word piece  region  weight  share of regions in the layer",
        "0      1     cat         image   0.300   42.5%",
        "1      0     cat         image   0.500   43.8%",
        *(str(tmp_path / "out" / f"caption-3{rest}") for rest in (".csv", ".npz", "-layer-0.svg", "-layer-1.svg")),
    ]
    assert given == [(Path("m"), Path("d"), {"split": "train"})]
    assert titles == [(["cat"], ["image", "0"], "layer 0"), (["cat"], ["image", "0"], "layer 1")]


def test_stop_words_are_small_and_lines_may_be_empty(tmp_path):
    (tmp_path / "words.txt").write_text("The\n\n of \n")
    assert read_stop_words(tmp_path / "words.txt") == {"the", "of"}


@pytest.mark.parametrize("keys", [4, 5, 6, 10])
def test_uniform_attention_gives_each_token_its_share(monkeypatch, capsys, keys):
    found = CrossAttention(("mlm",), ["x"], [str(n) for n in range(keys)], [np.full((1, keys), 1 / keys)])
    monkeypatch.setattr(cross_attention, "cross_attention", lambda *_: found)
    commands.print_cross_attention(Path("r"), sentences=["x"], against=None, plot=None)
    (line,) = [line for line in lines_of(capsys.readouterr().out) if line.startswith("uniform")]
    assert line.split()[-2:] == [f"{np.log(keys):.3f}", f"{min(100, 500 / keys):.1f}%"]
