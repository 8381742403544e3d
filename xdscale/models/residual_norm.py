"""The end of every sublayer, LayerNorm(residual + dropout(states)), as a module: for our layers and for encoders."""

import torch
from torch import nn
from transformers import PreTrainedModel

from xdscale.kernels.residual_norm import plain_residual_norm, residual_norm


class ResidualNorm(nn.LayerNorm):
    """A LayerNorm under its own parameter names that also drops states and adds the residual.

    The kernel is called in here because ZeRO-3 gathers a parameter for the module that owns it.
    """

    def __init__(
        self, size: int, *, eps: float, dropout: float, plain: bool, device: torch.device | str | None = None
    ) -> None:
        """Builds it with weight 1 and bias 0.

        Args:
            size: of a state.
            eps: is added to the variance.
            dropout: rate on the states that are not the residual.
            plain: by the definition instead of the kernels; both draw the same mask.
            device: of weight and bias.
        """
        super().__init__(size, eps=eps, device=device)
        self.dropout = dropout
        self.plain = plain

    def forward(self, states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Maps states and residual, [..., size] both, to one tensor like `states`."""
        rate = self.dropout if self.training else 0.0
        # Drawn per call: recomputed activations restore the generator and so draw the same mask again.
        seed = torch.randint(2**62, (1,), device=states.device) if rate else None
        function = plain_residual_norm if self.plain else residual_norm
        rows = (tokens.flatten(0, -2) for tokens in (states, residual))  # [tokens, size]
        return function(*rows, self.weight, self.bias, eps=self.eps, dropout=rate, seed=seed).view(states.shape)


class _Output(nn.Module):
    """The end of a sublayer of BERT or ELECTRA: dense, dropout, LayerNorm(residual), under the same names."""

    def __init__(self, original: nn.Module, *, plain: bool) -> None:
        """Takes over the parameters of the module that it replaces."""
        super().__init__()
        norm, rate = original.LayerNorm, original.dropout.p
        self.dense = original.dense
        self.LayerNorm = ResidualNorm(norm.weight.numel(), eps=norm.eps, dropout=rate, plain=plain, device="meta")
        self.LayerNorm.weight, self.LayerNorm.bias = norm.weight, norm.bias
        self.train(original.training)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        """Maps [batch, length, any size] and the residual [batch, length, size] to the latter's shape."""
        return self.LayerNorm(self.dense(hidden_states), input_tensor)


def use_residual_norm(encoder: PreTrainedModel, *, plain: bool) -> None:
    """Lets the sublayers of BERT or ELECTRA end in `residual_norm`; names of parameters stay as they are.

    Args:
        encoder: as transformers builds it; a second call would find no dropout to take over.
        plain: by the definition instead of the kernels.
    """
    for layer in encoder.encoder.layer:
        for owner in (layer.attention, layer):
            owner.output = _Output(owner.output, plain=plain)
