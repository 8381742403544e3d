"""What `xdscale pwcca | grounded-ratio | cross-attention` print."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from xdscale.analysis import pictures
from xdscale.analysis.comparison import CATEGORIES, ComparedExample, read_comparison
from xdscale.analysis.shown import new_table, print_table
from xdscale.errors import XdscaleError
from xdscale.files import check_output_file, csv_text, write_outputs

if TYPE_CHECKING:
    from xdscale.analysis.grounded_ratio import GroundedWords


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
    table = new_table("", "")
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
    print_table(f"{first} / {second}", table)
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
        write_outputs({out: csv_text(["data", "id", "category", "grounded", "not_grounded", "ratio"], rows)})
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
    print_table(f"{name}: {gained:+,} correct answers{share}{left}", _ratios(groups))
    return groups, rows


def print_cross_attention(folder: Path, *, sentences: list[str], against: Path | None, plot: Path | None) -> None:
    """Shows what the language tokens of an example read in CLIP's, in each cross-modal layer (Table 9)."""
    from xdscale.analysis.cross_attention import MOST_ATTENDED, cross_attention, figures

    pictures.check_picture_path(plot)
    folders = [folder] if against is None else [folder, against]
    results = [cross_attention(each, sentences) for each in folders]
    share = f"share of {MOST_ATTENDED} most attended"
    table = new_table("run", "objectives", "layer", "entropy (nats)", share, "distinct")
    for each, result in zip(folders, results):
        for layer, weights in enumerate(result.maps, 1):
            found = figures(weights)
            cells = f"{found.entropy:.3f}", f"{found.top_share:.1%}", f"{found.distinct}"
            table.add_row(str(each), " ".join(result.objectives), str(layer), *cells)
    keys = len(results[0].clip_tokens)
    table.add_row("uniform attention", "", "", f"{math.log(keys):.3f}", f"{min(1, MOST_ATTENDED / keys):.1%}", "")
    print_table(
        f"{len(results[0].language_tokens)} language tokens over {keys} CLIP tokens; distinct: CLIP tokens that are "
        "some language token's most attended one",
        table,
    )
    for each, result in zip(folders, results):
        most = new_table("language token", *(f"layer {layer}" for layer in range(1, len(result.maps) + 1)))
        for place, token in enumerate(result.language_tokens):
            tops = [(weights[place].argmax(), weights[place].max()) for weights in result.maps]
            most.add_row(token, *(f"{result.clip_tokens[top]} {weight:.3f}" for top, weight in tops))
        print_table(f"most attended CLIP token, {each}", most)
    if plot is not None:
        columns = {f"{each.name or each} ({' '.join(r.objectives)})": r.maps for each, r in zip(folders, results)}
        tokens = [result.language_tokens for result in results], [result.clip_tokens for result in results]
        pictures.save_picture(pictures.attention_maps(columns, *tokens), plot)


def _ratios(groups: dict[str, list[float]]) -> Table:
    table = new_table("", "n", "first quartile", "median", "third quartile", "mean")
    for name, values in groups.items():
        figures = [*np.quantile(values, (0.25, 0.5, 0.75)), np.mean(values)] if values else []
        table.add_row(name, f"{len(values):,}", *(f"{value:.4f}" for value in figures))
    return table
