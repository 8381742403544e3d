"""The shape of a recipe's model: which module holds how many parameters, in the order in which torch lists them.

The order matters: DeepSpeed lays parameters out in it, so that partitions, padding and what straddles two ranks
follow from it. A test compares the list with the real modules on the meta device, for every shipped recipe.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from xdscale import recipe
from xdscale.errors import XdscaleError
from xdscale.files import read_json
from xdscale.names import PACKAGE_PREFIX, resolve_path
from xdscale.pretrained.architectures import KNOWN, read_encoder_config
from xdscale.recipe import Recipe

CLIP_CONTEXT = 77
"""Positions of one CLIP block."""


class Module(NamedTuple):
    """A module that holds parameters itself.

    Attributes:
        name: dotted path, for messages.
        own: elements of each of its parameters, in order, without those that an earlier module holds as well.
        trained: whether the optimizer updates them.
        tied: elements of a parameter that it shares with an earlier module.
    """

    name: str
    own: tuple[int, ...]
    trained: bool = True
    tied: int = 0

    @property
    def elements(self) -> int:
        """Elements of its parameters, those that are tied left out."""
        return sum(self.own)


@dataclass(frozen=True, kw_only=True)
class LanguageShape:
    """A BERT or ELECTRA encoder; the attribute names are those of transformers' configurations."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    embedding_size: int = 768
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    tie_word_embeddings: bool = True
    pooler: bool = True


@dataclass(frozen=True, kw_only=True)
class ClipShape:
    """CLIP's text tower; its feed-forward part is four times as wide as its states."""

    width: int = 512
    heads: int = 8
    layers: int = 12
    vocab_size: int = 49408
    output_size: int = 512


NO_CLIP = ClipShape(width=0, heads=1, layers=0, vocab_size=0, output_size=0)
"""In the place of a tower where a recipe has none."""


@dataclass(frozen=True)
class ModelShape:
    """A recipe's model and heads.

    Attributes:
        language: the language encoder.
        clip: CLIP's text tower, or `NO_CLIP`.
        cross_layers: number of cross-modal layers.
        tasks: objectives that are on.
    """

    language: LanguageShape
    clip: ClipShape
    cross_layers: int
    tasks: tuple[str, ...]


def model_shape(spec: Recipe) -> ModelShape:
    """Returns the shape of a recipe's model from configuration files alone.

    Raises:
        XdscaleError: a name stands for neither a known architecture nor a local file.
    """
    return ModelShape(
        language_shape(spec.model.language.name),
        clip_shape(spec.model.clip.name) if spec.system == "xdbert" else NO_CLIP,
        spec.model.cross_layers if spec.system == "xdbert" else 0,
        tuple(spec.objectives.weights()),
    )


def language_shape(name: str) -> LanguageShape:
    """Returns the shape of a known architecture, or of the config.json in a local folder.

    Raises:
        XdscaleError: neither of both, or not a BERT or ELECTRA.
    """
    if name in KNOWN and not Path(name).is_dir():
        values = KNOWN[name]
    elif name.startswith((PACKAGE_PREFIX, "/", "./", "../", "~")) or Path(name).is_dir():
        values = read_encoder_config(resolve_path(name))
    else:
        raise XdscaleError(
            f"model.language.name = {name!r}: a plan is made without the hub; give a local folder with config.json, "
            f"or one of {', '.join(KNOWN)}"
        )
    keys = set(LanguageShape.__dataclass_fields__) - {"pooler", "embedding_size"}
    known = {key: values[key] for key in keys if key in values}
    family, hidden_size = values["model_type"], known.get("hidden_size", LanguageShape.hidden_size)
    embedding_size = values.get("embedding_size", hidden_size) if family == "electra" else hidden_size
    return LanguageShape(**known, embedding_size=embedding_size, pooler=family == "bert")


def clip_shape(name: str) -> ClipShape:
    """Returns the shape of a text tower in open_clip's model-config format, a file or an open_clip architecture.

    Raises:
        XdscaleError: neither of both.
    """
    if name.endswith(".json"):
        path = resolve_path(name, base=recipe.SHIPPED)
    else:
        path = resolve_path(f"{PACKAGE_PREFIX}open_clip/model_configs/{name.replace('/', '-')}.json")
    values = read_json(path)
    try:
        text = values["text_cfg"]
        keys = set(ClipShape.__dataclass_fields__) & text.keys()
        return ClipShape(**{key: text[key] for key in keys}, output_size=values["embed_dim"])
    except (KeyError, TypeError):
        raise XdscaleError(f"{path}: not a model configuration in open_clip's format") from None


def modules(shape: ModelShape, frozen: tuple[str, ...] = ()) -> list[Module]:
    """Returns the modules that hold parameters, in torch's order.

    Args:
        shape: of the model.
        frozen: parts that are not trained, of "language" and "clip".
    """
    found = [
        *_language(shape.language, trained="language" not in frozen),
        *(_clip(shape.clip, trained="clip" not in frozen) if shape.clip is not NO_CLIP else ()),
    ]
    for layer in range(shape.cross_layers):
        found += _cross_layer(f"model.layers.{layer}", shape.language, shape.clip)
    return found + list(_heads(shape))


def count(found: list[Module], *, trained: bool | None = None) -> int:
    """Returns the number of parameters of all modules, or only of those that are trained or are not."""
    return sum(module.elements for module in found if trained is None or module.trained == trained)


def _linear(name: str, size_in: int, size_out: int, trained: bool = True) -> Module:
    return Module(name, (size_in * size_out, size_out), trained)


def _norm(name: str, size: int, trained: bool = True) -> Module:
    return Module(name, (size, size), trained)


def _language(shape: LanguageShape, *, trained: bool) -> Iterator[Module]:
    size, embedding, name = shape.hidden_size, shape.embedding_size, "model.language"
    for table, rows in (
        ("word", shape.vocab_size),
        ("position", shape.max_position_embeddings),
        ("token_type", shape.type_vocab_size),
    ):
        yield Module(f"{name}.embeddings.{table}_embeddings", (rows * embedding,), trained)
    yield _norm(f"{name}.embeddings.LayerNorm", embedding, trained)
    if embedding != size:
        yield _linear(f"{name}.embeddings_project", embedding, size, trained)
    for layer in range(shape.num_hidden_layers):
        prefix = f"{name}.encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            yield _linear(f"{prefix}.attention.{part}", size, size, trained)
        yield _norm(f"{prefix}.attention.output.LayerNorm", size, trained)
        yield _linear(f"{prefix}.intermediate.dense", size, shape.intermediate_size, trained)
        yield _linear(f"{prefix}.output.dense", shape.intermediate_size, size, trained)
        yield _norm(f"{prefix}.output.LayerNorm", size, trained)
    if shape.pooler:
        # BERT's own pooler: counted as the paper counts it, but no loss reaches it.
        yield _linear(f"{name}.pooler.dense", size, size, trained=False)


def _clip(shape: ClipShape, *, trained: bool) -> Iterator[Module]:
    width, name = shape.width, "model.clip"
    yield Module(name, (1,), trained=False)  # logit_scale: counted, never used
    yield Module(f"{name}.tower", (CLIP_CONTEXT * width, width * shape.output_size), trained)
    yield Module(f"{name}.tower.token_embedding", (shape.vocab_size * width,), trained)
    for layer in range(shape.layers):
        prefix = f"{name}.tower.transformer.resblocks.{layer}"
        yield _norm(f"{prefix}.ln_1", width, trained)
        yield Module(f"{prefix}.attn", (3 * width * width, 3 * width), trained)
        yield _linear(f"{prefix}.attn.out_proj", width, width, trained)
        yield _norm(f"{prefix}.ln_2", width, trained)
        yield _linear(f"{prefix}.mlp.c_fc", width, 4 * width, trained)
        yield _linear(f"{prefix}.mlp.c_proj", 4 * width, width, trained)
    yield _norm(f"{name}.tower.ln_final", width, trained)


def _cross_layer(name: str, language: LanguageShape, clip: ClipShape) -> Iterator[Module]:
    sizes = {"language": language.hidden_size, "clip": clip.output_size}
    for kind in ("cross", "self"):
        for side, size in sizes.items():
            other = sizes["clip" if side == "language" else "language"] if kind == "cross" else size
            prefix = f"{name}.{side}_{kind}"
            yield _linear(f"{prefix}.query", size, size)
            yield _linear(f"{prefix}.key", other, size)
            yield _linear(f"{prefix}.value", other, size)
            yield _linear(f"{prefix}.output", size, size)
            yield _norm(f"{prefix}.norm", size)
    for side, size in sizes.items():
        prefix = f"{name}.{side}_feed_forward"
        yield _linear(f"{prefix}.intermediate", size, language.intermediate_size)
        yield _linear(f"{prefix}.output", language.intermediate_size, size)
        yield _norm(f"{prefix}.norm", size)


def _heads(shape: ModelShape) -> Iterator[Module]:
    language, clip = shape.language, shape.clip
    if "mlm" in shape.tasks:
        sizes = language.hidden_size, language.embedding_size, language.vocab_size
        yield from _token_head("mlm", *sizes, tied=language.tie_word_embeddings)
    if "match" in shape.tasks:
        yield _linear("match.pooler", language.hidden_size, language.hidden_size)
        yield _linear("match.classifier", language.hidden_size, 2)
    if "clip_tokens" in shape.tasks:
        yield from _token_head("clip_tokens", clip.output_size, clip.width, clip.vocab_size)


def _token_head(name: str, size: int, embedding_size: int, vocabulary: int, tied: bool = True) -> Iterator[Module]:
    weight = vocabulary * embedding_size
    # The decoder's weight is the embedding, unless the encoder says otherwise, and then its bias.
    yield Module(name, (vocabulary,), tied=weight) if tied else Module(name, (weight, vocabulary))
    yield _linear(f"{name}.transform", size, embedding_size)
    yield _norm(f"{name}.norm", embedding_size)
