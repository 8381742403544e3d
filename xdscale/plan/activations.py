"""Bytes of activations per sequence: what autograd keeps for the backward pass, by the structure of the modules.

Assumed is what runs on a GPU: packed attention (queries, keys, values, output and one fp32 number per row and head are
kept, never a matrix of scores), sublayers that draw the mask of their dropout again, feed-forwards that keep what they
activate and not the result, and logits that never exist as a whole. One mask is kept, that of the embeddings.
A tensor that several operations keep is counted once. A test compares with the bytes that autograd really keeps.
"""

from dataclasses import dataclass

from xdscale.plan.load import Load
from xdscale.plan.settings import Settings
from xdscale.plan.shapes import CLIP_CONTEXT, ModelShape

LOGIT_SCRATCH_BYTES = 24 << 20
"""What the masked-token loss takes for one chunk of logits (`kernels.masked_token_loss_triton.SCRATCH_BYTES`)."""

_NORM_STATISTICS = 8
"""Mean and reciprocal deviation of a row, fp32."""


@dataclass(frozen=True)
class Activations:
    """Bytes per rank.

    Attributes:
        kept: by autograd, at the end of the forward pass.
        working: of the layer that is running: its recomputed activations, or its gradients.
        logits: of the masked-token losses: one chunk, and gradients of hidden states in fp32.
    """

    kept: float
    working: float
    logits: float

    @property
    def total(self) -> float:
        """Bytes at the fullest moment."""
        return self.kept + self.working + self.logits


@dataclass(frozen=True)
class _Units:
    """Bytes of one element and of one element of a dropout mask."""

    width: int
    mask: int

    def rows(self, elements: float, *, norms: int = 0, heads: int = 0) -> float:
        """Returns the bytes of one token that keeps `elements`."""
        return self.width * elements + _NORM_STATISTICS * norms + 4 * heads


def activations(
    shape: ModelShape, load: Load, settings: Settings, dropout: float, *, frozen: tuple[str, ...] = (), mask: int = 1
) -> Activations:
    """Returns the bytes of a micro-batch.

    Args:
        shape: of the model.
        load: tokens and targets of each of its sequences.
        settings: of DeepSpeed.
        dropout: rate; with 0 no mask is kept.
        frozen: parts that are not trained, of "language" and "clip": they keep nothing.
        mask: bytes of an element of PyTorch's dropout mask: 1 on a GPU, those of the element itself on a CPU.
    """
    units = _Units(settings.parameter_bytes, mask if dropout else 0)
    language, clip = _language_layer(shape, load, units), _clip_layer(shape, load, units)
    cross = [_cross_layer(shape, load, units, last=False)] * (shape.cross_layers - 1)
    cross += [_cross_layer(shape, load, units, last=True)]
    between = load.length * shape.language.hidden_size, load.clip_tokens * shape.clip.output_size
    layers = {
        "language": ([language] * shape.language.num_hidden_layers, units.width * between[0]),
        "clip": ([clip] * shape.clip.layers, units.width * load.blocks * CLIP_CONTEXT * shape.clip.width),
        "cross": (cross, units.width * sum(between)),
    }
    kept, working = _ends(shape, load, units, frozen), _gradients(shape, load, units)
    for part, (full, entrance) in layers.items():
        if part in frozen:
            continue
        kept += len(full) * entrance if settings.checkpointing else sum(full)
        if settings.checkpointing:
            working = max(working, _gradients(shape, load, units) + max(full))
    batch = settings.micro_batch
    return Activations(batch * kept, batch * working, _logits(shape, load, batch, units.width))


def _language_layer(shape: ModelShape, load: Load, units: _Units) -> float:
    """Input, queries, keys, values, attended, sum, norm, sum; wide before GELU."""
    size, wide = shape.language.hidden_size, shape.language.intermediate_size
    heads = shape.language.num_attention_heads
    return load.length * units.rows(8 * size + wide, norms=2, heads=heads)


def _clip_layer(shape: ModelShape, load: Load, units: _Units) -> float:
    """Input, norm, queries, keys, values, attended twice (heads first and last), sum, norm; wide before GELU."""
    width, heads = shape.clip.width, shape.clip.heads
    return load.blocks * CLIP_CONTEXT * units.rows(9 * width + 4 * width, norms=2, heads=heads)


def _cross_layer(shape: ModelShape, load: Load, units: _Units, *, last: bool) -> float:
    """Both sides: cross-attention, self-attention and feed-forward; the last layer asks at wanted positions only."""
    wide, total = shape.language.intermediate_size, 0.0
    sides = (
        (shape.language.hidden_size, load.length, load.masked + load.matched, shape.language.num_attention_heads),
        (shape.clip.output_size, load.clip_tokens, load.clip_targets, shape.clip.heads),
    )
    for (size, tokens, targets, heads), (_, others, _, _) in (sides, sides[::-1]):
        wanted = targets if last else tokens
        # Cross-attention: input, queries, attended, sum, norm; keys and values of the other side's tokens.
        total += tokens * units.rows(5 * size, norms=1, heads=heads) + others * units.rows(2 * size)
        # Self-attention: keys and values of all tokens; queries, attended, sum, norm of the wanted ones.
        total += tokens * units.rows(2 * size)
        total += wanted * units.rows((5 if last else 4) * size, norms=1, heads=heads)
        # Feed-forward: wide before GELU, sum.
        total += wanted * units.rows(wide + size, norms=1)
    return total


def _ends(shape: ModelShape, load: Load, units: _Units, frozen: tuple[str, ...]) -> float:
    """Embeddings before the layers; output, norms and heads after them."""
    language, clip = shape.language, shape.clip
    total = 0.0
    if "language" not in frozen:
        project = language.embedding_size if language.embedding_size != language.hidden_size else 0
        embedded = units.rows(language.embedding_size + project, norms=1) + units.mask * language.embedding_size
        total += load.length * (embedded + 3 * 8)
    if "clip" not in frozen:
        total += load.blocks * CLIP_CONTEXT * (units.rows(2 * clip.width, norms=1) + 8)
    heads = (
        (load.masked, language.hidden_size, language.embedding_size),
        (load.clip_targets, clip.output_size, clip.width),
    )
    for targets, size, embedding_size in heads:
        total += targets * (units.rows(2 * size + 3 * embedding_size, norms=1) + 2 * 8)
    return total + load.matched * units.rows(3 * language.hidden_size)


def _gradients(shape: ModelShape, load: Load, units: _Units) -> float:
    """Gradients that exist at once inside one layer: before and after GELU, and of the states around them."""
    language = load.length * (2 * shape.language.intermediate_size + 2 * shape.language.hidden_size)
    clip = load.blocks * CLIP_CONTEXT * (2 * 4 + 2) * shape.clip.width
    return units.width * max(language, clip)


def _logits(shape: ModelShape, load: Load, batch: int, width: int) -> float:
    """The larger of the two losses: they run one after the other."""
    heads = ((load.masked, shape.language.embedding_size), (load.clip_targets, shape.clip.width))
    most = 0.0
    for targets, size in heads:
        rows = batch * targets
        # 128 columns are the fewest of a chunk.
        most = max(most, max(LOGIT_SCRATCH_BYTES, 128 * rows * width) * (rows > 0) + rows * 4 * size)
    return most
