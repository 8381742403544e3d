"""What the analyses' pictures show, before they become files."""

import re

import numpy as np
import pytest

from xdscale.analysis import pictures
from xdscale.analysis.grounding import HeadAccuracy
from xdscale.errors import XdscaleError


def look(axes):
    """Returns what a reader sees of a map: its title, weights, scale, and the words at both sides."""
    (image,) = axes.images
    words = [[text.get_text() for text in side.get_ticklabels()] for side in (axes.yaxis, axes.xaxis)]
    assert {text.get_rotation() for text in axes.get_xticklabels()} == {90}
    assert [len(ticks) for ticks in (axes.get_yticks(), axes.get_xticks())] == list(image.get_array().shape)
    return axes.get_title(), image.get_array().tolist(), image.get_clim(), *words


def test_maps_of_runs_stand_side_by_side_and_of_layers_below_each_other():
    """A run with fewer layers leaves its lower places empty; each map is scaled to its own largest weight."""
    one, two, three = (np.array([[0.5, 0.25]]) * scale for scale in (1, 0.5, 0.25))
    figure = pictures.attention_maps(
        {"a": [one, two], "b": [three.T]}, [["$x"], ["the", "sea"]], [["cat", "dog"], ["red"]]
    )
    first, other, second, empty = figure.axes
    assert look(first) == ("a, layer 1", one.tolist(), (0, 0.5), [r"\$x"], ["cat", "dog"])
    assert look(second) == ("a, layer 2", two.tolist(), (0, 0.25), [r"\$x"], ["cat", "dog"])
    assert look(other) == ("b, layer 1", three.T.tolist(), (0, 0.125), ["the", "sea"], ["red"])
    assert (first.axison, other.axison, second.axison, empty.axison) == (True, True, True, False)
    assert not empty.images
    assert figure.get_size_inches() == pytest.approx([2 * (1.6 + 2 * 0.16), 2 * (1.2 + 2 * 0.16)])


@pytest.mark.parametrize(("heads", "high", "wide"), [(1, 1, 1), (3, 1, 3), (4, 1, 4), (5, 2, 4), (9, 3, 4)])
def test_heads_stand_four_in_a_row_on_one_scale(heads, high, wide):
    weights = np.random.default_rng(0).random((heads, 2, 3))
    figure = pictures.head_maps(weights, ["a", "b"], ["x", "y", "z"], "layer 3")
    assert figure.get_suptitle() == "layer 3"
    assert len(figure.axes) == high * wide
    assert {axes.get_gridspec().get_geometry() for axes in figure.axes} == {(high, wide)}
    for number, axes in enumerate(figure.axes[:heads]):
        assert look(axes) == (f"head {number}", weights[number].tolist(), (0, 1), ["a", "b"], ["x", "y", "z"])
    assert [axes.axison for axes in figure.axes] == [True] * heads + [False] * (high * wide - heads)
    assert figure.get_size_inches() == pytest.approx([wide * (1.2 + 3 * 0.13), high * (0.8 + 2 * 0.13)])


def test_boxes_of_ratios_name_their_data_and_how_many():
    groups = {"rte": {"better": [0.1, 0.2, 0.6], "worse": [0.5]}, "coco": {"all": [0.25, 0.75]}}
    figure = pictures.ratio_boxes(groups)
    (axes,) = figure.axes
    assert axes.get_ylabel() == "visually grounded ratio"
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ["rte\nbetter\nn = 3", "rte\nworse\nn = 1", "coco\nall\nn = 2"]
    means = [line for line in axes.lines if line.get_marker() == "+"]
    assert [float(line.get_ydata()[0]) for line in means] == pytest.approx([0.3, 0.5, 0.5])
    assert {(line.get_markeredgecolor(), line.get_markersize(), line.get_markeredgewidth()) for line in means} == {
        ("green", 11, 2)
    }
    assert figure.get_size_inches() == pytest.approx([1.6 + 2 * 2.2, 4])


def test_curves_are_counted_from_1():
    (axes,) = pictures.correlation_curves({"a": np.array([0.9, 0.5]), "b": np.array([1.0])}, "of words").axes
    assert [(line.get_label(), *line.get_xydata().tolist()) for line in axes.lines] == [
        ("a", [1, 0.9], [2, 0.5]),
        ("b", [1, 1.0]),
    ]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == (
        "canonical direction",
        "correlation",
        "of words",
    )
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert 1 < top < 1.05  # a correlation of 1 is seen whole
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_dots_of_heads_tell_the_active_ones_and_the_baseline():
    accuracy = np.array([[0.25, 0.5], [0.75, 0.125], [0.0, 1.0]])
    active = np.array([[True, False], [True, True], [False, False]])
    fields = {"accuracy": accuracy, "mass": accuracy, "active": active, "baseline": 0.375, "words": 12345}
    (axes,) = pictures.head_dots(HeadAccuracy(**fields)).axes
    bright, pale = axes.collections
    assert (bright.get_label(), bright.get_offsets().tolist()) == ("active", [[1, 25], [2, 75], [2, 12.5]])
    assert (pale.get_label(), pale.get_offsets().tolist()) == ("inactive", [[1, 50], [3, 0], [3, 100]])
    assert (*bright.get_sizes(), bright.get_alpha(), *pale.get_sizes(), pale.get_alpha()) == (36, 1.0, 12, 0.4)
    (line,) = axes.lines
    assert (line.get_label(), set(line.get_ydata()), line.get_linestyle()) == ("surest region", {37.5}, "--")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "accuracy")
    assert axes.get_title() == "Entity grounding, 12,345 entities"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["active", "inactive", "surest region"]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_picture_is_a_file_of_its_kind_and_the_same_each_time(suffix, tmp_path):
    figure = pictures.correlation_curves({"a": np.array([0.9, 0.5])}, "of words")
    content = pictures.picture_bytes(figure, suffix)
    assert content == pictures.picture_bytes(figure, suffix)
    pictures.save_picture(figure, tmp_path / f"p{suffix}")
    assert (tmp_path / f"p{suffix}").read_bytes() == content
    if suffix == ".png":
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(content[16:20], "big") == 6.4 * 150  # dots of an inch
    else:
        assert b"<dc:date>" not in content
        assert re.search(rb'width="460.8pt"', content)


def test_only_pictures_that_can_be_written_are_begun(tmp_path):
    pictures.check_picture_path(None)
    for name in ("a.png", "a.svg"):
        pictures.check_picture_path(tmp_path / name)
    with pytest.raises(XdscaleError, match=r"a\.pdf: the picture's name must end in \.png or \.svg"):
        pictures.check_picture_path(tmp_path / "a.pdf")
