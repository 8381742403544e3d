"""Operations of the models, one file each: by name from here, with their plain definitions.

`from xdscale.kernels import packed_attention` gives the function; a file of the same name as its function is reached as
a module through `importlib` or by importing from it.
"""

if __name__ == "xdscale.kernels":  # transformers looks for a top-level `kernels` too, and may find this folder
    from xdscale.kernels.activated_linear import activated_linear, plain_activated_linear
    from xdscale.kernels.attention import packed_attention, plain_packed_attention
    from xdscale.kernels.causal_attention import causal_attention, plain_causal_attention
    from xdscale.kernels.linear import linear, plain_linear
    from xdscale.kernels.masked_token_loss import masked_token_loss, plain_masked_token_loss
    from xdscale.kernels.pre_norm import plain_pre_norm, pre_norm
    from xdscale.kernels.quick_gelu import plain_quick_gelu, quick_gelu
    from xdscale.kernels.residual_norm import plain_residual_norm, residual_norm

    DEFINITIONS = {
        activated_linear: plain_activated_linear,
        causal_attention: plain_causal_attention,
        linear: plain_linear,
        masked_token_loss: plain_masked_token_loss,
        packed_attention: plain_packed_attention,
        pre_norm: plain_pre_norm,
        quick_gelu: plain_quick_gelu,
        residual_norm: plain_residual_norm,
    }
    """Of each operation, the readable function with the same arguments that it is measured by."""

    __all__ = [operation.__name__ for pair in DEFINITIONS.items() for operation in pair]
