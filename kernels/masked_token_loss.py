"""Cross-entropy over a vocabulary for the labelled positions: the plain PyTorch definition."""

import torch
import torch.nn.functional as F


def masked_token_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Projects labelled hidden states onto the vocabulary and sums their cross-entropy.

    Only labelled rows are passed in, so logits exist for those alone and never for all tokens. The softmax
    runs in fp32 whatever the dtype of the inputs (fp64 stays fp64).

    Args:
        hidden: [n, h] hidden states at the labelled positions; n = 0 is allowed.
        weight: [V, h] decoder weight, usually the tied embedding.
        bias: [V].
        labels: int64 [n] in 0..V-1.

    Returns:
        The summed loss, a scalar (for n = 0 exactly 0, with zero gradients for all three inputs), and the
        number of rows whose highest logit is the label, an int64 scalar.
    """
    logits = F.linear(hidden, weight, bias)  # [n, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.detach().argmax(-1) == labels).sum()
    return loss, correct
