"""Pictures of the analyses, with matplotlib and without a display."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xdscale.errors import XdscaleError
from xdscale.files import check_output_file, write_outputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from xdscale.analysis.grounding import HeadAccuracy

PICTURE_TYPES = (".png", ".svg")


def check_picture_path(path: Path | None) -> None:
    """Refuses a picture that could not be written, before any work is done.

    Raises:
        XdscaleError: the name ends neither in .png nor in .svg, or such a file cannot be written there.
    """
    if path is None:
        return
    if path.suffix not in PICTURE_TYPES:
        raise XdscaleError(f"{path}: the picture's name must end in {' or '.join(PICTURE_TYPES)}")
    check_output_file(path)


def correlation_curves(curves: dict[str, np.ndarray], title: str) -> "Figure":
    """Draws canonical correlations, largest first, one curve per name."""
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    for name, correlations in curves.items():
        axes.plot(np.arange(1, len(correlations) + 1), correlations, label=name)
    axes.set(xlabel="canonical direction", ylabel="correlation", ylim=(0, 1.02), title=title)
    axes.legend()
    return figure


def ratio_boxes(groups: dict[str, dict[str, Sequence[float]]]) -> "Figure":
    """Draws Figure 4: boxes of the visually grounded ratio per data set and category, a green plus at the mean.

    Args:
        groups: data set → category → ratios.
    """
    figure = _figure(1.6 + 2.2 * len(groups), 4.0)
    axes = figure.add_subplot()
    boxes = [(f"{data}\n{name}", values) for data, parts in groups.items() for name, values in parts.items()]
    axes.boxplot(
        [values for _, values in boxes],
        tick_labels=[f"{name}\nn = {len(values)}" for name, values in boxes],
        showmeans=True,
        meanprops={"marker": "+", "markeredgecolor": "green", "markersize": 11, "markeredgewidth": 2},
    )
    axes.set(ylabel="visually grounded ratio")
    return figure


def attention_maps(columns: dict[str, list[np.ndarray]], rows: list[list[str]], keys: list[list[str]]) -> "Figure":
    """Draws Table 9: one column per run, one row per cross-modal layer, language tokens over CLIP tokens.

    Args:
        columns: run → for each layer the weights [language tokens, CLIP tokens].
        rows: each run's language tokens.
        keys: each run's CLIP tokens.
    """
    layers = max(len(maps) for maps in columns.values())
    height = 1.2 + 0.16 * max(map(len, rows))
    figure = _figure((1.6 + 0.16 * max(map(len, keys))) * len(columns), height * layers)
    grid = figure.subplots(layers, len(columns), squeeze=False)
    for column, (name, maps) in enumerate(columns.items()):
        for layer, axes in enumerate(grid[:, column]):
            if layer >= len(maps):
                axes.axis("off")
                continue
            axes.set_title(f"{name}, layer {layer + 1}", fontsize=8)
            _draw_map(axes, maps[layer], rows[column], keys[column], most=maps[layer].max())
    return figure


HEADS_IN_A_ROW = 4


def head_maps(weights: np.ndarray, rows: list[str], keys: list[str], title: str) -> "Figure":
    """Draws the maps of all heads of one layer, on one scale from 0 to 1.

    Args:
        weights: [heads, word pieces, regions], between 0 and 1.
        rows: the word pieces.
        keys: the regions.
        title: of the picture; each map has the number of its head, from 0.
    """
    high, wide = -(-len(weights) // HEADS_IN_A_ROW), min(HEADS_IN_A_ROW, len(weights))
    figure = _figure((1.2 + 0.13 * len(keys)) * wide, (0.8 + 0.13 * len(rows)) * high)
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(high, wide, squeeze=False).flat
    for head, axes in enumerate(grid):
        if head >= len(weights):
            axes.axis("off")
            continue
        axes.set_title(f"head {head}", fontsize=8)
        _draw_map(axes, weights[head], rows, keys, most=1.0)
    return figure


def _draw_map(axes: "Axes", weights: np.ndarray, rows: list[str], keys: list[str], *, most: float) -> None:
    axes.imshow(weights, vmin=0, vmax=most, cmap="viridis", aspect="auto")
    # "$" would start a formula.
    for side, tokens in ((axes.yaxis, rows), (axes.xaxis, keys)):
        side.set_ticks(range(len(tokens)), [token.replace("$", r"\$") for token in tokens], fontsize=6)
    axes.tick_params(axis="x", rotation=90)


def head_dots(found: "HeadAccuracy") -> "Figure":
    """Draws the accuracy of every head over its layer; inactive heads small and light, the baseline as a line."""
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    layers = np.broadcast_to(np.arange(1, len(found.accuracy) + 1)[:, None], found.accuracy.shape)
    for active, size, opacity, name in ((True, 36, 1.0, "active"), (False, 12, 0.4, "inactive")):
        chosen = found.active == active
        axes.scatter(layers[chosen], 100 * found.accuracy[chosen], s=size, alpha=opacity, color="tab:blue", label=name)
    axes.axhline(100 * found.baseline, color="tab:gray", linestyle="--", label="surest region")
    axes.set(xlabel="layer", ylabel="accuracy", title=f"Entity grounding, {found.words:,} entities")
    axes.legend()
    return figure


def save_picture(figure: "Figure", path: Path) -> None:
    """Writes a picture, whole or not at all.

    Raises:
        XdscaleError: it cannot be written.
    """
    write_outputs({path: picture_bytes(figure, path.suffix)})


def picture_bytes(figure: "Figure", suffix: str) -> bytes:
    """Returns a picture as a file of that suffix; the same figure gives the same bytes."""
    import matplotlib

    file = io.BytesIO()
    stamp = {"Date": None} if suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "xdscale"}):
        figure.savefig(file, format=suffix[1:], metadata=stamp)
    return file.getvalue()


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")
