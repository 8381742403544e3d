"""The fair baseline: the language encoder alone, trained on with masked-LM on the same shards (paper §3)."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from xdscale import recipe
from xdscale.models.encoders import recompute_layers, use_kernels
from xdscale.pretrained.language import load_language_encoder
from xdscale.tasks import flops
from xdscale.tasks.heads import masked_lm_head


class MaskedLMAdaptation(nn.Module):
    """A language encoder with its masked-LM head.

    Attributes:
        model: holds the encoder as "language", so that its weights have the names they have in XDBERT.
        mlm: masked-LM head, tied to the encoder's word embedding.
    """

    def __init__(self, language: PreTrainedModel) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"language": language})
        self.mlm = masked_lm_head(language)
        if getattr(language, "pooler", None) is not None:
            language.pooler.requires_grad_(False)  # no loss reaches it

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass; the result stays the same."""
        recompute_layers(self.model["language"])

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Computes the summed masked-LM loss.

        Args:
            batch: language_ids [b, S], masked_lm_positions and masked_lm_labels [m]; CLIP's arrays are left aside.

        Returns:
            "mlm": the loss summed over targets (fp32 scalar) and the number of right predictions (int64 scalar).
        """
        states = self.model["language"](input_ids=batch["language_ids"], use_cache=False).last_hidden_state
        masked = states.flatten(0, 1).index_select(0, batch["masked_lm_positions"])  # [m, H]
        return {"mlm": self.mlm(masked, batch["masked_lm_labels"])}

    def flops(self, arrays: Mapping[str, np.ndarray]) -> int:
        """Returns the matrix-multiplication FLOPs of forward and backward for one micro-batch."""
        config, labelled = self.model["language"].config, len(arrays["masked_lm_positions"])
        total = flops.language_flops(config, *arrays["language_ids"].shape)
        embedding_size = self.mlm.transform.out_features
        total += flops.masked_token_flops(config.hidden_size, embedding_size, config.vocab_size, labelled)
        return 3 * total


def build_masked_lm(spec: recipe.Model) -> MaskedLMAdaptation:
    """Builds encoder and head of a recipe's `model` section without CLIP.

    Raises:
        XdscaleError: the encoder cannot be built or its weights cannot be loaded.
    """
    language = load_language_encoder(spec.language, dropout=spec.dropout)
    use_kernels(language)
    return MaskedLMAdaptation(language)
