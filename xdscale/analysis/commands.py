"""What the analyses print: `xdscale pwcca | grounded-ratio | cross-attention | grounding | attention-maps`."""

import csv
import io
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from xdscale.analysis import pictures
from xdscale.analysis.comparison import CATEGORIES, ComparedExample, read_comparison
from xdscale.errors import XdscaleError
from xdscale.files import check_output_file, check_output_folder, write_outputs

if TYPE_CHECKING:
    from xdscale.analysis.grounded_ratio import GroundedWords
    from xdscale.analysis.grounding import HeadAccuracy
    from xdscale.analysis.head_grounding import AttentionMap


def print_pwcca(first: str, second: str, *, seed: int, words: int | None, plot: Path | None) -> None:
    """Compares the word embeddings of two models (Table 2), beside random ones of the same sizes."""
    from xdscale.analysis.embeddings import load_embeddings, paired_embeddings
    from xdscale.analysis.pwcca import PUBLISHED, pwcca, random_baseline

    pictures.check_picture_path(plot)
    embeddings = load_embeddings(first), load_embeddings(second)
    one, other, shared = paired_embeddings(*embeddings, words=words, seed=seed)
    found = pwcca(one, other)
    widths = one.shape[1], other.shape[1]
    draws = random_baseline(len(shared), widths, seed)
    scores = [draw.score for draw in draws]
    table = _table("", "")
    table.show_header = False
    table.add_row("words", f"{len(shared):,}")
    table.add_row("dimensions", f"{widths[0]} and {widths[1]}")
    table.add_row("PWCCA", f"{found.score:.4f}")
    table.add_row(
        "random embeddings", f"{np.mean(scores):.4f} ± {np.std(scores, ddof=1):.4f} ({len(draws)} draws, same sizes)"
    )
    published = PUBLISHED.get(frozenset(each.label for each in embeddings))
    if published is not None:
        table.add_row("published (Table 2)", f"{published:.4f}")
    _print(f"{first} / {second}", table)
    if plot is not None:
        curves = {f"{first} / {second}": found.correlations, "random": draws[0].correlations}
        pictures.save_picture(
            pictures.correlation_curves(curves, f"PWCCA {found.score:.4f}, {len(shared):,} words"), plot
        )


def print_grounded_ratio(
    comparisons: list[Path],
    *,
    captions: list[str],
    tokenizer: str,
    threshold: int,
    stop_words: Path | None,
    runs: int | None,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Compares the visually grounded ratio of examples that improved and of those that worsened (Figure 4)."""
    from xdscale.analysis.grounded_ratio import GroundedWords, default_stop_words, read_captions, read_stop_words
    from xdscale.shards.language import load_language_tokenizer

    pictures.check_picture_path(plot)
    if out is not None:
        check_output_file(out)
        if out.exists() and any(path.exists() and out.samefile(path) for path in comparisons):
            raise XdscaleError(f"--out {out}: is one of the comparisons, which would be lost; choose another name")
    names = Counter(path.stem for path in comparisons)
    if names.most_common(1)[0][1] > 1:
        raise XdscaleError(
            f"two comparisons are called {names.most_common(1)[0][0]!r}; the file's name is the data set's"
        )
    data = {path.stem: read_comparison(path, runs=runs) for path in comparisons}
    words = default_stop_words() if stop_words is None else read_stop_words(stop_words)
    with Console(stderr=True).status("counting captions") as status:
        counts = GroundedWords(
            load_language_tokenizer(tokenizer)[0],
            read_captions(captions),
            words,
            threshold=threshold,
            on_lines=lambda lines: status.update(f"counting captions: {lines:,}"),
        )
    print(f"{counts.lines:,} caption lines: {counts.grounded_pieces:,} word pieces occur more than {threshold} times")
    groups, rows = {}, []
    for name, examples in data.items():
        groups[name], own_rows = _split(name, examples, counts, runs)
        rows += own_rows
    if out is not None:
        _write_csv(out, ("data", "id", "category", "grounded", "not_grounded", "ratio"), rows)
    if plot is not None:
        unequal = {name: {key: parts[key] for key in CATEGORIES[:2]} for name, parts in groups.items()}
        pictures.save_picture(pictures.ratio_boxes(unequal), plot)


def _split(
    name: str, examples: list[ComparedExample], counts: "GroundedWords", runs: int | None
) -> tuple[dict[str, list[float]], list[tuple]]:
    """Prints a data set's table; returns the ratios by category, and a line of the output for each example."""
    groups: dict[str, list[float]] = {category: [] for category in CATEGORIES}
    rows = []
    for example in examples:
        found = counts.of(*example.texts)
        rows.append((name, example.id, example.category, found.grounded, found.other, found.ratio))
        if found.ratio is not None:
            groups[example.category].append(found.ratio)
    gained = sum(example.correct_ours - example.correct_baseline for example in examples)
    share = f", {gained / runs / len(examples):+.2%} over {runs} runs" if runs else ""
    empty = len(examples) - sum(map(len, groups.values()))
    left = f"; {empty} of stop words and punctuation alone are left out" if empty else ""
    _print(f"{name}: {gained:+,} correct answers{share}{left}", _ratios(groups))
    return groups, rows


def print_cross_attention(folder: Path, *, sentences: list[str], against: Path | None, plot: Path | None) -> None:
    """Shows what the language tokens of an example read in CLIP's, in each cross-modal layer (Table 9)."""
    from xdscale.analysis.cross_attention import MOST_ATTENDED, cross_attention, figures

    pictures.check_picture_path(plot)
    folders = [folder] if against is None else [folder, against]
    results = [cross_attention(each, sentences) for each in folders]
    share = f"share of {MOST_ATTENDED} most attended"
    table = _table("run", "objectives", "layer", "entropy (nats)", share, "distinct")
    for each, result in zip(folders, results):
        for layer, weights in enumerate(result.maps, 1):
            found = figures(weights)
            cells = f"{found.entropy:.3f}", f"{found.top_share:.1%}", f"{found.distinct}"
            table.add_row(str(each), " ".join(result.objectives), str(layer), *cells)
    keys = len(results[0].clip_tokens)
    table.add_row("uniform attention", "", "", f"{math.log(keys):.3f}", f"{min(1, MOST_ATTENDED / keys):.1%}", "")
    _print(
        f"{len(results[0].language_tokens)} language tokens over {keys} CLIP tokens; distinct: CLIP tokens that are "
        "some language token's most attended one",
        table,
    )
    for each, result in zip(folders, results):
        most = _table("language token", *(f"layer {layer}" for layer in range(1, len(result.maps) + 1)))
        for place, token in enumerate(result.language_tokens):
            tops = [(weights[place].argmax(), weights[place].max()) for weights in result.maps]
            most.add_row(token, *(f"{result.clip_tokens[top]} {weight:.3f}" for top, weight in tops))
        _print(f"most attended CLIP token, {each}", most)
    if plot is not None:
        columns = {f"{each.name or each} ({' '.join(r.objectives)})": r.maps for each, r in zip(folders, results)}
        tokens = [result.language_tokens for result in results], [result.clip_tokens for result in results]
        pictures.save_picture(pictures.attention_maps(columns, *tokens), plot)


def _ratios(groups: dict[str, list[float]]) -> Table:
    table = _table("", "n", "first quartile", "median", "third quartile", "mean")
    for name, values in groups.items():
        figures = [*np.quantile(values, (0.25, 0.5, 0.75)), np.mean(values)] if values else []
        table.add_row(name, f"{len(values):,}", *(f"{value:.4f}" for value in figures))
    return table


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_outputs({path: text.getvalue()})


def print_grounding(
    model: Path,
    data: Path,
    regions: Path,
    *,
    split: str,
    parses: Path | None,
    caption: str | None,
    categories: Path | None,
    out: Path,
) -> None:
    """Counts what a VisualBERT's heads ground; writes heads.csv, heads.svg, captions.txt, relations.csv and a map."""
    from xdscale.analysis.grounding import PUBLISHED_ENTITIES, arcs_csv, head_name, heads_csv
    from xdscale.analysis.head_grounding import HeadReader, captions_of
    from xdscale.data.json_shapes import read_whole
    from xdscale.shards.regions import RegionTable

    check_output_folder(out, "--out")
    captions = captions_of(data, split)
    reader = HeadReader(model, data, RegionTable.open(regions), split=split, parses=parses)
    named = None if categories is None else read_whole(categories, dict[str, list[int]])
    shown_map = None if caption is None else reader.map(caption, named)
    entities, relations = reader.count()
    shown = _table("", "accuracy", "head", "published")
    for name, active in (("best head", False), ("best active head", True)):
        best = entities.best(active=active)
        accuracy, head = ("–", "–") if best is None else (f"{100 * entities.accuracy[best]:.2f}", head_name(*best))
        shown.add_row(name, accuracy, head, "" if active else str(PUBLISHED_ENTITIES["best head"]))
    shown.add_row("surest region", f"{100 * entities.baseline:.2f}", "", str(PUBLISHED_ENTITIES["baseline"]))
    active = f"{int(entities.active.sum())} of {entities.active.size} heads active"
    _print(f"{model}: {entities.words:,} entities, {active}", shown)
    files: dict[Path, str | bytes] = {
        out / "heads.csv": heads_csv(entities),
        out / "heads.svg": pictures.picture_bytes(pictures.head_dots(entities), ".svg"),
        out / "captions.txt": "".join(f"{one}\n" for one in captions),
    }
    if relations is not None:
        files[out / "relations.csv"] = arcs_csv(relations)
        _print("", _relations(relations))
    if shown_map is not None:
        name = out / f"map-{caption.replace('#', '-')}"
        files[name.with_suffix(".csv")] = map_csv(shown_map)
        # Of each layer the head that grounds entities best.
        maps = [weights[head] for weights, head in zip(shown_map.weights, entities.accuracy.argmax(1))]
        picture = pictures.attention_maps({str(model): maps}, [shown_map.pieces], [shown_map.keys])
        files[name.with_suffix(".svg")] = pictures.picture_bytes(picture, ".svg")
    write_outputs(files)
    for path in files:
        print(path)


def map_csv(shown: "AttentionMap", *, first: int = 1, **more: np.ndarray) -> str:
    """Returns one line for each weight: layer, head, position, word piece, region or category, weight.

    Args:
        shown: the map.
        first: number of the first layer and head.
        more: columns of the shape of the weights.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["layer", "head", "position", "piece", "region", "weight", *more])
    for place in np.ndindex(shown.weights.shape):
        layer, head, piece, key = place
        values = [f"{weights[place]:.6f}" for weights in (shown.weights, *more.values())]
        writer.writerow([layer + first, head + first, piece, shown.pieces[piece], shown.keys[key], *values])
    return file.getvalue()


def print_attention_maps(model: Path, data: Path, *, split: str, numbers: list[int], out: Path) -> None:
    """Writes what words read in regions: of each caption a CSV, an npz, and a picture for each layer."""
    from xdscale.analysis.attention_maps import MapReader, rescaled

    check_output_folder(out, "--out")
    reader = MapReader(model, data, split=split)
    found = {number: reader.maps(number) for number in dict.fromkeys(numbers)}
    for number, (image, shown, boxes) in found.items():
        scaled, name = rescaled(shown.weights), out / f"caption-{number}"
        arrays = io.BytesIO()
        np.savez_compressed(
            arrays, weights=shown.weights, rescaled=scaled, pieces=shown.pieces, keys=shown.keys, boxes=boxes
        )
        files: dict[Path, str | bytes] = {
            name.with_suffix(".csv"): map_csv(shown, first=0, rescaled=scaled),
            name.with_suffix(".npz"): arrays.getvalue(),
        }
        table = _table("layer", "head", "word piece", "region", "weight", "share of regions in the layer")
        for layer, weights in enumerate(shown.weights):
            head, piece, key = np.unravel_index(weights.argmax(), weights.shape)
            cells = f"{weights.max():.3f}", f"{weights.sum(-1).mean():.1%}"
            table.add_row(str(layer), str(head), shown.pieces[piece], shown.keys[key], *cells)
            picture = pictures.head_maps(scaled[layer], shown.pieces, shown.keys, f"layer {layer}")
            files[out / f"{name.name}-layer-{layer}.svg"] = pictures.picture_bytes(picture, ".svg")
        _print(f"caption {number}, image {image}: the largest weight from a word to a region of each layer", table)
        write_outputs(files)
        for path in files:
            print(path)


def _relations(relations: "dict[str, HeadAccuracy]") -> Table:
    """Returns the table of relations: those that the paper has, then the rest."""
    from xdscale.analysis.grounding import PUBLISHED_ARCS, head_name

    table = _table("relation", "arcs", "surest region", "best active head", "", "published")
    for relation, one in sorted(relations.items(), key=lambda item: item[0] not in PUBLISHED_ARCS):
        best, printed = one.best(active=True), PUBLISHED_ARCS.get(relation)
        accuracy, head = ("–", "–") if best is None else (f"{100 * one.accuracy[best]:.2f}", head_name(*best))
        paper = f"{printed.baseline} → {printed.accuracy} ({printed.head})" if printed else ""
        table.add_row(relation, f"{one.words:,}", f"{100 * one.baseline:.2f}", accuracy, head, paper)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _print(title: str, table: Table) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 1000  # in a file or a pipe nothing is cut off to fit a window
    console.print(title, soft_wrap=True)
    console.print(table)
