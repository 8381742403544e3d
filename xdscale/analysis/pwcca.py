"""Projection-weighted canonical correlation of two sets of word embeddings (paper §4, Table 2; spec xdbert §7)."""

from dataclasses import dataclass

import numpy as np

from xdscale.errors import XdscaleError

PUBLISHED = {
    frozenset({"BERT", "ELECTRA"}): 0.5498,
    frozenset({"BERT", "CLIP"}): 0.4980,
    frozenset({"ELECTRA", "CLIP"}): 0.4645,
    frozenset({"BERT", "RANDOM"}): 0.3569,
}
"""Table 2. The paper states neither the words nor their number."""

BASELINE_DRAWS = 5
# A direction whose singular value is this much smaller than the largest carries rounding errors only.
_RANK_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Pwcca:
    """What was measured.

    Attributes:
        score: in [0, 1].
        correlations: [directions], largest first.
        weights: [directions], of sum 1.
    """

    score: float
    correlations: np.ndarray
    weights: np.ndarray


def pwcca(first: np.ndarray, second: np.ndarray) -> Pwcca:
    """Measures how much of the smaller space the other one explains.

    Both are centred and whitened (QR, then SVD, fp64); the canonical correlations ρ are the singular values of the
    product of the whitened bases. Direction h counts with α = Σ |⟨h, x⟩| over the neurons x of the side with fewer
    dimensions (the first one, if they are equal), and the score is Σ αρ / Σ α (Morcos et al. 2018).

    Args:
        first: [words, dimensions].
        second: [words, other dimensions], the same words.

    Raises:
        XdscaleError: so few words that some correlations are 1 whatever the embeddings.
    """
    words, forced = len(first), first.shape[1] + second.shape[1] - len(first) + 1
    if forced > 0:
        raise XdscaleError(
            f"{words} words for {first.shape[1]} + {second.shape[1]} dimensions: {forced} correlations would be 1 "
            f"whatever the embeddings; at least {words + forced} words are needed"
        )
    smaller, other = (first, second) if first.shape[1] <= second.shape[1] else (second, first)
    basis, neurons = _whiten(smaller)
    other_basis, _ = _whiten(other)
    directions, correlations, _ = np.linalg.svd(basis.T @ other_basis, full_matrices=False)
    # The canonical variables are basis @ directions, and the neurons basis @ neurons, with the same orthonormal basis.
    weights = np.abs(directions.T @ neurons).sum(1)
    weights /= weights.sum()
    correlations = np.clip(correlations, 0, 1)
    return Pwcca(float(weights @ correlations), correlations, weights)


def random_embeddings(words: int, dimensions: int, generator: np.random.Generator) -> np.ndarray:
    """Returns the paper's RANDOM system: fp64 [words, dimensions], uniform on [0, 1)."""
    return generator.random((words, dimensions))


def random_baseline(words: int, dimensions: tuple[int, int], seed: int) -> list[Pwcca]:
    """Measures pairs of random systems of given sizes, `BASELINE_DRAWS` times."""
    generator = np.random.default_rng([seed, words, *dimensions])
    return [pwcca(*(random_embeddings(words, size, generator) for size in dimensions)) for _ in range(BASELINE_DRAWS)]


def _whiten(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns an orthonormal basis [words, rank] of the centred columns, and the columns in it [rank, dimensions]."""
    centred = embeddings.astype(np.float64)
    centred -= centred.mean(0)
    basis, triangle = np.linalg.qr(centred)
    left, values, right = np.linalg.svd(triangle)
    kept = values > _RANK_TOLERANCE * values[0]
    return basis @ left[:, kept], values[kept, None] * right[kept]
