"""An encoder that knows one segment only reads pairs too: both sentences are in it."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel

from xdscale.padding import language_layout
from xdscale.recipes.mlm.schema import Language
from xdscale.tasks.contract import find_task
from xdscale.tasks.finetuning import build_language_classifier

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(("config", "model"), [(BertConfig, BertModel), (ElectraConfig, ElectraModel)])
def test_both_sentences_of_a_pair_are_in_the_only_segment(tmp_path, config, model):
    model(config(vocab_size=64, max_position_embeddings=16, type_vocab_size=1, **SIZES)).save_pretrained(tmp_path)
    torch.manual_seed(0)
    spec = Language(name=str(tmp_path))
    classifier = build_language_classifier(spec, find_task("rte"), dropout=0.0).eval()
    ids, mask = torch.arange(10).view(1, 10), np.ones((1, 10), bool)
    batch = {"language_ids": ids, "language_mask": torch.from_numpy(mask)}
    batch |= {name: torch.from_numpy(array) for name, array in language_layout(mask).items()}
    found = [classifier(batch | {"segments": segments}) for segments in (torch.zeros_like(ids), (ids > 5).long())]
    assert torch.equal(*found)
