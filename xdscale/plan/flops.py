"""FLOPs of forward and backward per sequence, by the definitions of `xdscale.models.flops`."""

import numpy as np

from xdscale.models import flops
from xdscale.plan.load import Load
from xdscale.plan.shapes import CLIP_CONTEXT, ModelShape


def training_flops(shape: ModelShape, load: Load, frozen: tuple[str, ...] = ()) -> float:
    """Returns the FLOPs of one sequence: forward, and twice that backward through what is trained.

    What activation checkpointing computes again does not count, as usual for model FLOPs utilisation.

    Args:
        shape: of the model.
        load: tokens and targets of the sequence.
        frozen: parts that are not trained, of "language" and "clip".
    """
    language, clip = shape.language, shape.clip
    sizes = clip.width, 4 * clip.width, clip.output_size, clip.layers
    parts = {
        "language": flops.language_flops(language, 1, load.length),
        "clip": flops.clip_tower_flops(*sizes, load.blocks, CLIP_CONTEXT),
    }
    total = sum(value * (1 if part in frozen else 3) for part, value in parts.items())
    everything = np.array([float(load.length)]), np.array([load.clip_tokens])
    wanted = np.array([load.masked + load.matched]), np.array([load.clip_targets])
    rest = 0.0
    for layer in range(1, shape.cross_layers + 1):
        last = wanted if layer == shape.cross_layers else everything
        rest += flops.cross_layer_flops(
            language.hidden_size, clip.output_size, language.intermediate_size, *everything, *last
        )
    rest += flops.masked_token_flops(language.hidden_size, language.embedding_size, language.vocab_size, load.masked)
    rest += flops.match_flops(language.hidden_size, load.matched)
    rest += flops.masked_token_flops(clip.output_size, clip.width, clip.vocab_size, load.clip_targets)
    return total + 3 * rest
