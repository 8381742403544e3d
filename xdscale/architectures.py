"""Language encoders known by name, without a network and without torch (spec xdbert §2.1)."""

from typing import Any

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

KNOWN: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {"model_type": "bert", **_BASE},
    "bert-large-uncased": {"model_type": "bert", **_LARGE},
    "google/electra-base-discriminator": {"model_type": "electra", "embedding_size": 768, **_BASE},
    "google/electra-large-discriminator": {"model_type": "electra", "embedding_size": 1024, **_LARGE},
}
"""Architectures under their hub names.

What is not stated is equal in all four and transformers' default: 30,522 word pieces, 512 positions,
2 segments, LayerNorm eps 1e-12, GELU.
"""
