"""The adaptation heads, each with its loss (spec xdbert §2.4 and §3)."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from xdscale.kernels.masked_token_loss import masked_token_loss
from xdscale.models.cross_modal import LAYER_NORM_EPS
from xdscale.models.operations import Linear, initialise


class MaskedTokenHead(nn.Module):
    """BERT's prediction head, Linear, activation, LayerNorm and a tied decoder, for MLM and for CLIP tokens.

    The tied embedding is registered here as well, as the same `nn.Parameter`: under ZeRO-3 a parameter is
    gathered only for the module whose forward is running, so projection and loss stand in this forward.
    """

    def __init__(
        self,
        size: int,
        embedding: nn.Parameter,
        *,
        activation: nn.Module | None = None,
        eps: float = LAYER_NORM_EPS,
    ) -> None:
        """Builds the head.

        Args:
            size: of the hidden states that come in.
            embedding: [V, embedding size], the input embedding to be tied; the transform maps to its size.
            activation: of the transform; None for GELU.
            eps: of its LayerNorm.
        """
        super().__init__()
        vocabulary, embedding_size = embedding.shape
        self.transform = Linear(nn.Linear(size, embedding_size))
        self.activation = activation or nn.GELU()
        self.norm = nn.LayerNorm(embedding_size, eps=eps)
        self.decoder_weight = embedding
        self.decoder_bias = nn.Parameter(torch.zeros(vocabulary))
        self.function = masked_token_loss

    def forward(self, states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicts tokens.

        Args:
            states: [n, size], at the labelled positions only; n may be 0.
            labels: int64 [n], the right tokens.

        Returns:
            Cross-entropy of each (fp32 [n]), and whether its likeliest token is the right one (bool [n]).
        """
        hidden = self.norm(self.activation(self.transform(states)))  # [n, embedding size]
        return self.function(hidden, self.decoder_weight, self.decoder_bias, labels)


def masked_lm_head(language: nn.Module) -> MaskedTokenHead:
    """Builds the masked-LM head of a language encoder, as transformers' `BertForMaskedLM` and `ElectraForMaskedLM` do.

    BERT's, and VisualBERT's, activates as the encoder does (`hidden_act`), ELECTRA's with GELU. Where the configuration
    says `tie_word_embeddings: false` the decoder is a parameter of its own.

    Args:
        language: the encoder, with `config` and `get_input_embeddings()` as transformers has them.
    """
    config, words = language.config, language.get_input_embeddings().weight
    if not config.tie_word_embeddings:
        words = nn.Parameter(torch.empty_like(words))
        nn.init.normal_(words, std=config.initializer_range)
    activation = ACT2FN[config.hidden_act] if config.model_type != "electra" else None
    return MaskedTokenHead(config.hidden_size, words, activation=activation, eps=config.layer_norm_eps)


class MatchHead(nn.Module):
    """BERT's pooler and a 2-way classifier: do both encoders read the same text?"""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pooler = nn.Linear(size, size)
        self.classifier = nn.Linear(size, 2)

    def forward(self, states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Classifies each pair.

        Args:
            states: [batch, size], of the first language position, from the last cross-modal layer.
            labels: int64 [batch], 1 for the same text, 0 for another, -1 for no target.

        Returns:
            Summed cross-entropy (fp32 scalar) and the number of right predictions (int64 scalar).
        """
        return match_loss(self.classifier(torch.tanh(self.pooler(states))), labels)


def match_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the summed cross-entropy of logits [b, 2], in fp32, and how many are right; -1 is ignored (scalars)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return loss, (logits.detach().argmax(-1) == labels).sum()


class RegionClassHead(nn.Module):
    """Which of the detector's classes is a region? Linear, activation, Linear, against the detector's own distribution.

    Without a LayerNorm (spec VL-BERT §1.5).
    """

    def __init__(self, size: int, classes: int, *, activation: nn.Module | None = None, std: float = 0.02) -> None:
        """Builds the head.

        Args:
            size: of the hidden states that come in.
            classes: of the detector, with the background if it has one.
            activation: None for GELU.
            std: of the normal distribution that weights begin with; biases begin with 0.
        """
        super().__init__()
        self.transform = Linear(nn.Linear(size, size))
        self.activation = activation or nn.GELU()
        self.classifier = Linear(nn.Linear(size, classes))
        initialise((self.transform, self.classifier), std)

    def forward(self, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicts distributions.

        Args:
            states: [n, size], of the regions that are to be predicted; n may be 0.
            targets: [n, classes], how probable the detector thinks each class.

        Returns:
            Summed cross-entropy -sum(p log q) (fp32 scalar), and how often the likeliest class is the detector's (int64
            scalar).
        """
        logits = self.classifier(self.activation(self.transform(states)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = -(targets.to(logits.dtype) * logits.log_softmax(-1)).sum()
        return loss, (logits.detach().argmax(-1) == targets.argmax(-1)).sum()
