"""The second half of a feed-forward, Linear(activation(states)), as a module: for our layers and for encoders."""

import torch
from torch import nn
from transformers import PreTrainedModel

from xdscale.kernels.activated_linear import Activation, activated_linear, plain_activated_linear


class ActivatedLinear(nn.Linear):
    """A Linear under its own parameter names that activates what comes in, and keeps that alone for its gradients.

    The operation is called in here because ZeRO-3 gathers a parameter for the module that owns it.
    """

    def __init__(self, original: nn.Linear, activation: Activation, *, plain: bool) -> None:
        """Takes over the parameters of the module that it replaces.

        Args:
            original: with a bias.
            activation: a function and not a module, whose hooks would run again in the backward pass.
            plain: by the definition, which keeps the activated states too.
        """
        super().__init__(original.in_features, original.out_features, device="meta")
        self.weight, self.bias = original.weight, original.bias
        self.activation = activation
        self.plain = plain

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Maps [..., in_features], not yet activated, to [..., out_features]."""
        function = plain_activated_linear if self.plain else activated_linear
        return function(states, self.weight, self.bias, self.activation)


def use_activated_linear(encoder: PreTrainedModel, *, plain: bool) -> None:
    """Lets the feed-forwards of BERT or ELECTRA keep less; names of parameters stay as they are.

    Args:
        encoder: of transformers.
        plain: by the definition.

    Raises:
        ValueError: it was called before.
    """
    for layer in encoder.encoder.layer:
        if isinstance(layer.output.dense, ActivatedLinear):
            raise ValueError("the encoder's feed-forwards were replaced before")
        activation = layer.intermediate.intermediate_act_fn.forward
        layer.intermediate.intermediate_act_fn = nn.Identity()
        layer.output.dense = ActivatedLinear(layer.output.dense, activation, plain=plain)
