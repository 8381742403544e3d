"""The language model's tokenizer, from a file, a folder, an installed package or a hub name."""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.models import WordPiece

from xdscale.errors import XdscaleError
from xdscale.files import one_line, read_json, require_real_file
from xdscale.names import PACKAGE_PREFIX, expand_home, resolve_path
from xdscale.shards.manifest import canonical_json
from xdscale.shards.sources.text_build import LanguageTokenizer

SPECIAL_TOKENS = {"cls_id": "[CLS]", "sep_id": "[SEP]", "mask_id": "[MASK]", "pad_id": "[PAD]"}
LARGEST_VOCABULARY = 2**16
FILE_NAME, VOCABULARY, SETTINGS, ADDED = "tokenizer.json", "vocab.txt", "tokenizer_config.json", "added_tokens.json"
TOKENIZER_FILES = (FILE_NAME, VOCABULARY, SETTINGS, ADDED, "special_tokens_map.json")
"""What belongs to a tokenizer in a Hugging Face folder."""

UNKNOWN = 0.05
"""Share of word pieces that may be unknown unsaid: smileys and names are."""

_WORD_PIECE_CLASSES = ("BertTokenizer", "ElectraTokenizer", "DistilBertTokenizer")
_HOW_TO_CONVERT = "write a tokenizer.json there with transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…)"


def load_language_tokenizer(name: str) -> tuple[Tokenizer, LanguageTokenizer]:
    """Returns the tokenizer, set to give the plain ids of a text, and its identity.

    Truncation and padding are off, and text that spells `[SEP]` is text, not a separator.

    Args:
        name: a `tokenizer.json`, or BERT's `vocab.txt`; a folder that holds one of them, `package:NAME/folder`,
            or a hub name.

    Raises:
        XdscaleError: not found, not a tokenizer, no [CLS]/[SEP]/[MASK]/[PAD], or more than 65,536 ids.
    """
    tokenizer = read_tokenizer(name)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    ids = {key: tokenizer.token_to_id(token) for key, token in SPECIAL_TOKENS.items()}
    missing = [SPECIAL_TOKENS[key] for key, number in ids.items() if number is None]
    if missing:
        raise XdscaleError(
            f"{name}: the tokenizer has no {', '.join(missing)}; "
            "a BERT or ELECTRA tokenizer with [CLS], [SEP], [MASK] and [PAD] is needed"
        )
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None and tokenizer.token_to_id(unknown) is None:
        raise XdscaleError(f"{name}: the tokenizer's vocabulary lacks its own token for unknown words, {unknown}")
    sha256, size = _identity(tokenizer.to_str())
    if size > LARGEST_VOCABULARY:
        raise XdscaleError(f"{name}: {size} ids do not fit the shards' 16 bits ({LARGEST_VOCABULARY} ids)")
    return tokenizer, LanguageTokenizer(name=name, sha256=sha256, vocab_size=size, **ids)


def fingerprint(tokenizer: Tokenizer) -> str:
    """Returns the SHA-256 (hex) of what decides a text's ids: the vocabulary and the stages before it.

    Equal tokenizers match wherever they are stored and whatever padding or template their files ask for.
    """
    return _identity(tokenizer.to_str())[0]


@functools.lru_cache(maxsize=4)  # a run asks for the same one several times, and this takes far longer than reading it
def _identity(serialised: str) -> tuple[str, int]:
    """Returns a tokenizer's fingerprint, and its number of ids."""
    stages, vocabulary = json.loads(serialised), Tokenizer.from_str(serialised).get_vocab()
    normalizer = stages["normalizer"]
    if (normalizer or {}).get("type") == "BertNormalizer" and normalizer["strip_accents"] == normalizer["lowercase"]:
        normalizer = normalizer | {"strip_accents": None}  # which means: as lowercase
    parts = {
        "vocab": vocabulary,
        "model": {key: value for key, value in stages["model"].items() if key != "vocab"},
        "normalizer": normalizer,
        "pre_tokenizer": stages["pre_tokenizer"],
    }
    matched_in_text = [token for token in stages["added_tokens"] if not token["special"]]
    parts |= {"added": matched_in_text} if matched_in_text else {}
    return hashlib.sha256(canonical_json(parts)).hexdigest(), 1 + max(vocabulary.values())


def notes_on_unknown(where: str, ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Returns a line where much of a text is unknown to a tokenizer: of another language, say.

    Args:
        where: the text's file or table.
        ids: word pieces of its beginning.
        tokenizer: that gave them.
    """
    token = getattr(tokenizer.model, "unk_token", None)
    share = np.mean(ids == tokenizer.token_to_id(token)) if token is not None and len(ids) else 0
    if share <= UNKNOWN:
        return []
    told = f"{where}: {share:.0%} of the word pieces at its beginning are {token}, unknown to the model's tokenizer"
    return [f"{told}; is it of this language?"]


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder holds a tokenizer that `read_tokenizer` reads."""
    return (folder / FILE_NAME).is_file() or (folder / VOCABULARY).is_file()


def read_tokenizer(name: str) -> Tokenizer:
    """Returns a tokenizer as it is stored; from a `vocab.txt` alone the one that transformers makes of it.

    Args:
        name: as for `load_language_tokenizer`.

    Raises:
        XdscaleError: not found, not a tokenizer, or a vocabulary that is not BERT's word pieces.
    """
    local = name.startswith(PACKAGE_PREFIX) or Path(expand_home(name)).exists()
    path = resolve_path(name) if local else _from_hub(name)
    if path.is_dir():
        if not has_tokenizer(path):
            others = [entry for entry in ("spiece.model", "tokenizer.model", "vocab.json") if (path / entry).is_file()]
            found = f" but {others[0]}, which is not BERT's; {_HOW_TO_CONVERT}" if others else ""
            raise XdscaleError(f"{name}: the folder has no {FILE_NAME} and no {VOCABULARY}{found}")
        path = path / (FILE_NAME if (path / FILE_NAME).is_file() else VOCABULARY)
    require_real_file(path)
    if path.suffix == ".txt":
        return _from_vocabulary(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise XdscaleError(f"{path}: not a {FILE_NAME}: {error}") from None


def _from_vocabulary(path: Path) -> Tokenizer:
    """Builds BERT's tokenizer from its word pieces, one a line, and the `tokenizer_config.json` beside them."""
    settings = read_json(path.with_name(SETTINGS)) if path.with_name(SETTINGS).is_file() else {}
    kind = settings.get("tokenizer_class") or _WORD_PIECE_CLASSES[0]
    if str(kind).removesuffix("Fast") not in _WORD_PIECE_CLASSES:
        raise XdscaleError(f"{path}: is of a {kind}, which is more than its word pieces; {_HOW_TO_CONVERT}")
    try:
        vocabulary = WordPiece.read_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise XdscaleError(f"{path}: not a vocabulary of one word piece a line: {one_line(error)}") from None
    missing = [token for token in ("[UNK]", *SPECIAL_TOKENS.values()) if token not in vocabulary]
    if missing:
        raise XdscaleError(
            f"{path}: has no {', '.join(missing)}; the word pieces of a BERT or ELECTRA, one a line, are needed"
        )
    try:
        made = BertWordPieceTokenizer(
            vocabulary,
            lowercase=_lower_case(path, settings, vocabulary),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )
    except TypeError as error:
        raise XdscaleError(
            f"{path.with_name(SETTINGS)}: do_lower_case, strip_accents and tokenize_chinese_chars are true or false: "
            f"{one_line(error)}"
        ) from None
    tokenizer = Tokenizer.from_str(made.to_str())
    for number, token in _added_tokens(path, settings):
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        if tokenizer.token_to_id(token.content) != number:
            raise XdscaleError(
                f"{path}: the added token {token.content!r} is to have id {number}, but the next free one is "
                f"{tokenizer.token_to_id(token.content)}; {_HOW_TO_CONVERT}"
            )
    return tokenizer


def _lower_case(path: Path, settings: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    stated = settings.get("do_lower_case")
    if stated is not None:
        return stated
    cased = [piece for piece in vocabulary if re.search("[A-Z]", piece) and not piece.startswith("[")]
    if cased:
        raise XdscaleError(
            f"{path}: has word pieces with capital letters, such as {min(cased)!r}, but no {SETTINGS} says whether "
            f'texts are put into lower case; write {{"do_lower_case": false}} into it for a cased model, or true'
        )
    return True


def _added_tokens(path: Path, settings: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    """Returns the tokens that were added to a vocabulary, with their ids in ascending order."""
    try:
        if settings.get("added_tokens_decoder"):
            found = [(int(number), AddedToken(**token)) for number, token in settings["added_tokens_decoder"].items()]
        elif path.with_name(ADDED).is_file():
            found = [(int(number), AddedToken(token)) for token, number in read_json(path.with_name(ADDED)).items()]
        else:
            found = []
    except (TypeError, ValueError, AttributeError) as error:
        raise XdscaleError(f"{path}: its added tokens cannot be read from {SETTINGS} or {ADDED}: {error}") from None
    return sorted(found, key=lambda item: item[0])


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except Exception as error:  # whatever the network and the hub's library can raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise XdscaleError(
            f"{name}: no such file or folder, and the model hub did not give it ({reason}); "
            f"name a local folder that holds {FILE_NAME} or {VOCABULARY}, or package:NAME/folder"
        ) from None
