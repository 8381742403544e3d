"""Word embeddings that PWCCA compares, paired by word."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xdscale.errors import XdscaleError

RANDOM = "random"
CLIP_PREFIX = "clip:"
# clip:NAME or clip:NAME/WEIGHTS; a name that is a JSON file may hold slashes itself.
_CLIP = re.compile(r"clip:(?P<name>.+\.json|[^/]+)(?:/(?P<weights>.+))?")
_RANDOM = re.compile(r"random(?::(?P<width>[1-9]\d*))?")
_PUBLISHED_NAMES = {"bert-base-uncased": "BERT", "electra-base-discriminator": "ELECTRA"}


@dataclass(frozen=True)
class WordEmbeddings:
    """Word embeddings under their words.

    Attributes:
        name: as the user gave it.
        label: the model's name in Table 2, if it is one of those.
        rows: word → row; None for random ones, which have every word.
        table: fp32 [rows, width]; empty rows for random ones.
        width: dimensions; 0 for random ones that take the other's.
    """

    name: str
    label: str | None
    rows: dict[str, int] | None
    table: np.ndarray
    width: int


def load_embeddings(name: str) -> WordEmbeddings:
    """Loads the embeddings that a name stands for.

    Args:
        name: a language model (hub name, folder, exported run, `package:NAME/folder`), a run folder, a CLIP text tower
            as `clip:NAME` or `clip:NAME/WEIGHTS` (the recipe's `model.clip`; weights default to openai), or `random`
            or `random:WIDTH`.

    Raises:
        XdscaleError: nothing of the kind, or it has no tokenizer.
    """
    random = _RANDOM.fullmatch(name)
    if random:
        width = int(random["width"] or 0)
        return WordEmbeddings(name, "RANDOM", None, np.empty((0, width), np.float32), width)
    return _of_clip(name) if name.startswith(CLIP_PREFIX) else _of_language_model(name)


def paired_embeddings(
    first: WordEmbeddings, second: WordEmbeddings, *, words: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns two models' embeddings of the words they share.

    A word is an alphabetic lower-case entry that stands for a whole word in both vocabularies.

    Args:
        first: of one model.
        second: of another.
        words: so many, drawn from the shared ones; None for all.
        seed: of the draw, and of random embeddings.

    Returns:
        [N, width], [N, other width], and the N words in alphabetical order.

    Raises:
        XdscaleError: fewer shared words than asked for, or sizes that nothing decides.
    """
    known = [each for each in (first, second) if each.rows is not None]
    if known:
        shared = sorted(set.intersection(*(set(each.rows) for each in known)))
    elif words is None:
        raise XdscaleError("random embeddings have any number of words; say how many with --words")
    else:
        shared = [str(number) for number in range(words)]
    if words is not None and words > len(shared):
        raise XdscaleError(f"--words {words}: {first.name} and {second.name} share only {len(shared)} words")
    generator = np.random.default_rng(seed)
    if words is not None and words < len(shared):
        shared = [shared[place] for place in np.sort(generator.choice(len(shared), words, replace=False))]
    pair = []
    for each, other in ((first, second), (second, first)):
        pair.append(_embeddings(each, shared, each.width or other.width, generator))
    return pair[0], pair[1], shared


def _embeddings(found: WordEmbeddings, words: list[str], width: int, generator: np.random.Generator) -> np.ndarray:
    from xdscale.analysis.pwcca import random_embeddings

    if found.rows is not None:
        return found.table[[found.rows[word] for word in words]]
    if not width:
        raise XdscaleError("random against random: give both their widths, as random:768 random:512")
    return random_embeddings(len(words), width, generator)


def _of_clip(name: str) -> WordEmbeddings:
    from tokenizers.decoders import ByteLevel

    from xdscale.pretrained.clip import load_clip_text_tower
    from xdscale.recipes.xdbert.schema import Clip
    from xdscale.shards.clip_bpe import WORD_END, ClipBPE

    parts = _CLIP.fullmatch(name)
    if parts is None:
        raise XdscaleError(
            f"{name}: a CLIP text tower is named clip:NAME or clip:NAME/WEIGHTS, as clip:ViT-B-32/openai"
        )
    spec = Clip(name=parts["name"], weights=parts["weights"] or "openai")
    tower = load_clip_text_tower(spec).tower
    letters = ByteLevel()
    # The vocabulary spells bytes as printable characters.
    entries = {
        letters.decode([entry.removesuffix(WORD_END)]): number
        for entry, number in ClipBPE().vocabulary().items()
        if entry.endswith(WORD_END)
    }
    label = "CLIP" if (spec.name.replace("/", "-"), spec.weights) == ("ViT-B-32", "openai") else None
    return _embeddings_of_words(name, label, entries, tower.token_embedding.weight.detach().numpy())


def _of_language_model(name: str) -> WordEmbeddings:
    from xdscale.encoder import load_encoder

    encoder = load_encoder(name)
    weights = encoder.model.get_input_embeddings().weight.detach().numpy()
    return _embeddings_of_words(name, _PUBLISHED_NAMES.get(Path(name).name), encoder.tokenizer.get_vocab(), weights)


def _embeddings_of_words(name: str, label: str | None, entries: dict[str, int], table: np.ndarray) -> WordEmbeddings:
    rows = {word: row for word, row in entries.items() if word.isalpha() and word == word.lower()}
    return WordEmbeddings(name, label, rows, table, table.shape[1])
