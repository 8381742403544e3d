"""The language model's tokenizer, from a file, a folder, an installed package or a hub name."""

import hashlib
import json
from pathlib import Path

from tokenizers import Tokenizer

from xdscale.errors import XdscaleError
from xdscale.names import PACKAGE_PREFIX, expand_home, resolve_path
from xdscale.shards.manifest import LanguageTokenizer, canonical_json

SPECIAL_TOKENS = {"cls_id": "[CLS]", "sep_id": "[SEP]", "mask_id": "[MASK]", "pad_id": "[PAD]"}
LARGEST_VOCABULARY = 2**16
FILE_NAME = "tokenizer.json"


def load_language_tokenizer(name: str) -> tuple[Tokenizer, LanguageTokenizer]:
    """Returns the tokenizer, set to give the plain ids of a text, and its identity.

    Truncation and padding are off, and text that spells `[SEP]` is text, not a separator.

    Args:
        name: a `tokenizer.json`, a folder that holds one, `package:NAME/folder`, or a hub name.

    Raises:
        XdscaleError: not found, not a tokenizer, no [CLS]/[SEP]/[MASK]/[PAD], or more than 65,536 ids.
    """
    tokenizer = _load(name)
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
    size = 1 + max(tokenizer.get_vocab().values())
    if size > LARGEST_VOCABULARY:
        raise XdscaleError(f"{name}: {size} ids do not fit the shards' 16 bits ({LARGEST_VOCABULARY} ids)")
    info = LanguageTokenizer(name=name, sha256=fingerprint(tokenizer), vocab_size=size, **ids)
    return tokenizer, info


def fingerprint(tokenizer: Tokenizer) -> str:
    """Returns the SHA-256 (hex) of what decides a text's ids: the vocabulary and the stages before it.

    Equal tokenizers match wherever they are stored and whatever padding or template their files ask for.
    """
    stages = json.loads(tokenizer.to_str())
    model = {key: value for key, value in stages["model"].items() if key != "vocab"}
    parts = {
        "vocab": tokenizer.get_vocab(),
        "model": model,
        "normalizer": stages["normalizer"],
        "pre_tokenizer": stages["pre_tokenizer"],
    }
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def _load(name: str) -> Tokenizer:
    if not name.startswith(PACKAGE_PREFIX) and not Path(expand_home(name)).exists():
        return _from_hub(name)
    path = resolve_path(name)
    if path.is_dir():
        path = path / FILE_NAME
        if not path.is_file():
            raise XdscaleError(f"{name}: the folder has no {FILE_NAME}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise XdscaleError(f"{path}: not a tokenizer.json: {error}") from None


def _from_hub(name: str) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # whatever the network and the hub's library can raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise XdscaleError(
            f"{name}: no such file or folder, and the model hub did not give it ({reason}); "
            f"name a local folder that holds {FILE_NAME}, or package:NAME/folder"
        ) from None
