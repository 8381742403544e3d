"""What language tokens read in CLIP's: the maps of the cross-modal layers for one example (paper §5, Table 9)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xdscale.data.collate import CLIP_CONTENT, CLIP_LENGTH, pack_clip_blocks
from xdscale.encoder import Encoder, load_cross_modal
from xdscale.errors import XdscaleError
from xdscale.shards.clip_bpe import END, START, WORD_END, ClipBPE, describe_clip_tokenizer
from xdscale.training.stored import stored_recipe

LANGUAGE_TOKENS = 128
BLOCKS_PER_SENTENCE = 2
"""Lengths of finetuning (paper Appendix B): 128 word pieces, and two CLIP blocks for each sentence, never shared."""

MOST_ATTENDED = 5


@dataclass(frozen=True)
class AttentionFigures:
    """How diverse one map is.

    Attributes:
        entropy: of a language token's attention in nats, mean over the tokens; at most ln(CLIP tokens).
        top_share: of all attention, on the five CLIP tokens that get most of it.
        distinct: CLIP tokens that are some language token's most attended one.
    """

    entropy: float
    top_share: float
    distinct: int


@dataclass(frozen=True)
class CrossAttention:
    """The maps of one model for one example.

    Attributes:
        objectives: those it was adapted with.
        language_tokens: [CLS] sentence1 [SEP], or with sentence2 [SEP] after it.
        clip_tokens: start sentence1 end, start sentence2 end; a long sentence has two such blocks.
        maps: for each cross-modal layer [language tokens, CLIP tokens], mean over the heads; rows of sum 1.
    """

    objectives: tuple[str, ...]
    language_tokens: list[str]
    clip_tokens: list[str]
    maps: list[np.ndarray]


def cross_attention(folder: Path, sentences: list[str]) -> CrossAttention:
    """Runs one example through an adapted model, without dropout and unmasked.

    Segment ids are 0 throughout, as in adaptation.

    Args:
        folder: a run folder or an export.
        sentences: one, or the two of a pair.

    Raises:
        XdscaleError: as `load_cross_modal`; no tokenizer in `folder`, or a sentence that is empty or too long.
    """
    recipe = stored_recipe(folder)
    clip_ids, clip_lengths, clip_tokens = clip_input(sentences)
    encoder = load_cross_modal(folder)
    model = encoder.model
    language_ids, language_tokens = _language_input(encoder, sentences)
    if clip_ids.max() >= model.clip.tower.vocab_size:
        raise XdscaleError(f"{folder}: its CLIP text tower does not have CLIP's vocabulary")
    positions = model.language.config.max_position_embeddings
    if len(language_ids) > positions:
        raise XdscaleError(f"the example has {len(language_ids)} word pieces, but the encoder in {folder} {positions}")
    with torch.no_grad(), model.recorded_attention() as maps:
        model(*(torch.as_tensor(array)[None] for array in (language_ids, clip_ids, clip_lengths)))
    weights = [layer.double().numpy() for layer in maps]  # each [language tokens, CLIP tokens]
    return CrossAttention(tuple(recipe.objectives.weights()), language_tokens, clip_tokens, weights)


def figures(weights: np.ndarray) -> AttentionFigures:
    """Measures one map [language tokens, CLIP tokens] whose rows sum to 1."""
    logarithms = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    received = np.sort(weights.mean(0))
    return AttentionFigures(
        entropy=float(-(weights * logarithms).sum(1).mean()),
        top_share=float(received[-MOST_ATTENDED:].sum()),
        distinct=len(set(weights.argmax(1).tolist())),
    )


def clip_input(sentences: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Lays sentences out for CLIP as finetuning does: each in its own two blocks.

    Returns:
        int64 ids [2 per sentence, 77], int64 lengths [2 per sentence] (0: empty block), and the tokens in order.

    Raises:
        XdscaleError: a sentence without tokens, or with more than fit two blocks.
    """
    bpe, marks = ClipBPE(), describe_clip_tokenizer()
    encoded = bpe.encode(sentences)
    for sentence, ids in zip(sentences, encoded):
        if not 0 < len(ids) <= BLOCKS_PER_SENTENCE * CLIP_CONTENT:
            raise XdscaleError(
                f"{sentence[:40]!r}: {len(ids)} CLIP tokens; a sentence has at least 1 and at most "
                f"{BLOCKS_PER_SENTENCE * CLIP_CONTENT}"
            )
    offsets = np.cumsum([0, *map(len, encoded)])
    ends = {"start_id": marks.start_id, "end_id": marks.end_id}
    ids, lengths = pack_clip_blocks(np.concatenate(encoded), offsets, **ends, blocks=BLOCKS_PER_SENTENCE)
    ids, lengths = ids.reshape(-1, CLIP_LENGTH), lengths.reshape(-1)
    entries = {number: entry for entry, number in bpe.vocabulary().items()}
    tokens = [entries[number] for block, length in zip(ids, lengths) for number in block[:length].tolist()]
    return ids, lengths, [token if token in (START, END) else token.removesuffix(WORD_END) for token in tokens]


def _language_input(encoder: Encoder, sentences: list[str]) -> tuple[list[int], list[str]]:
    ids = [encoder.special.cls_id]
    for sentence in sentences:
        ids += [*encoder.tokenizer.encode(sentence, add_special_tokens=False).ids, encoder.special.sep_id]
    if len(ids) > LANGUAGE_TOKENS:
        raise XdscaleError(
            f"the example has {len(ids)} word pieces with [CLS] and [SEP]; finetuning takes at most {LANGUAGE_TOKENS}"
        )
    return ids, [encoder.tokenizer.id_to_token(number) for number in ids]
