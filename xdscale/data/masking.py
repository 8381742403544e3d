"""Masked language modelling and CLIP token targets (spec xdbert §3, acceptance fact 7)."""

import numpy as np

from xdscale.data.hashing import Purpose, below, random_bits, random_bits_at, scale
from xdscale.recipes.mlm.schema import MaskedLM
from xdscale.recipes.xdbert.schema import ClipTokens
from xdscale.shards.sources.text_build import LanguageTokenizer
from xdscale.systems.contract import Slots


def mask_language_ids(
    language_ids: np.ndarray,
    slots: Slots,
    recipe: MaskedLM,
    tokenizer: LanguageTokenizer,
    *,
    seed: int,
    maskable: np.ndarray | None = None,
    words: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Selects positions and overwrites them **in place** by [MASK], a random id, or nothing.

    Random ids are uniform over the whole vocabulary, as in Devlin et al. One draw per position decides both whether it
    is selected and what happens to it: the interval [0, select) is divided in the recipe's proportions.

    Args:
        language_ids: int64 [n, s], C-contiguous; changed.
        slots: which samples they are; padding samples are left as they are and have no targets.
        recipe: rates; `mask` and `random` are shares of the selected positions.
        tokenizer: its id of [MASK] and the size of its vocabulary.
        seed: below 2**32.
        maskable: bool [n, s], the positions that may be selected; None for all but the first and the last one, which
            are [CLS] and [SEP].
        words: int64 [n, s], which word of its text each position belongs to: one draw decides for all of a word. None
            where each position is decided by itself.

    Returns:
        (positions int64 [m], flat index into n * s, ascending; original ids int64 [m]).
    """
    length = language_ids.shape[1]
    bits = random_bits(seed, slots.epochs, slots.sample_ids, Purpose.MASKED_POSITION, length)
    if words is not None:
        bits = np.take_along_axis(bits, words, 1)
    selected = below(bits, recipe.select)
    if maskable is None:
        selected[:, 0] = selected[:, -1] = False
    else:
        selected &= maskable
    selected[~slots.real] = False
    positions = np.flatnonzero(selected)
    flat_ids = language_ids.reshape(-1)
    labels = flat_ids[positions]
    draws = bits[selected]
    masked = below(draws, recipe.select * recipe.mask)
    replaced = ~masked & below(draws, recipe.select * (recipe.mask + recipe.random))
    flat_ids[positions[masked]] = tokenizer.mask_id
    spots = positions[replaced]
    row, column = np.divmod(spots, length)
    token_bits = random_bits_at(seed, slots.epochs[row], slots.sample_ids[row], Purpose.RANDOM_TOKEN, column)
    flat_ids[spots] = scale(token_bits, tokenizer.vocab_size)
    return positions, labels


def drawn_masks(
    length: int,
    slots: Slots,
    recipe: MaskedLM | None,
    tokenizer: LanguageTokenizer,
    *,
    seed: int,
    everywhere: bool = False,
) -> list[np.ndarray]:
    """Returns what `mask_language_ids` draws for samples, without reading them: positions, and what is put there.

    Args:
        recipe: None where the objective is off: then nothing is drawn.
        length: of each sample, in tokens.
        everywhere: draw for the first and the last token too.
    """
    if recipe is None:
        return []
    ids = np.zeros((len(slots.sample_ids), length), np.int64)
    maskable = np.ones_like(ids, bool) if everywhere else None
    positions, _ = mask_language_ids(ids, slots, recipe, tokenizer, seed=seed, maskable=maskable)
    return [positions, ids.reshape(-1)[positions]]


def select_clip_targets(
    counts: np.ndarray, slots: Slots, recipe: ClipTokens, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Selects the CLIP tokens to be named; the input stays as it is.

    Only content tokens are counted and selected: the paper's 15 % of CLIP tokens, not the released
    code's 15 % of all positions with padding, start and end (spec xdbert §8.3).

    Args:
        counts: int64 [n], content tokens of each text.
        slots: the language samples (not the partners whose texts are read); padding samples have no targets.
        recipe: share selected.
        seed: below 2**32.

    Returns:
        (row int64 [c], index of the token within the text int64 [c]), in reading order.
    """
    longest = int(counts.max(initial=0))
    bits = random_bits(seed, slots.epochs, slots.sample_ids, Purpose.CLIP_TARGET, longest)
    selected = below(bits, recipe.select)
    selected &= np.arange(longest) < np.where(slots.real, counts, 0)[:, None]
    return np.divmod(np.flatnonzero(selected), longest)
