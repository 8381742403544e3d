"""XDBERT's adaptation: MLM + MATCH + CLIP token classification, cross-modally (spec xdbert §2.4, §3)."""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from xdscale.data.collate import XDBERTCollator, language_lengths
from xdscale.data.opening import open_data
from xdscale.errors import XdscaleError
from xdscale.files import count_of
from xdscale.models.clip_text import CLIPTextEncoder
from xdscale.models.cross_modal import CrossModalLayer
from xdscale.models.encoders import use_kernels
from xdscale.models.heads import MaskedTokenHead, MatchHead, masked_lm_head
from xdscale.models.xdbert import XDBERT
from xdscale.pretrained.clip import build_clip_text_tower, clip_config, load_clip_text_tower
from xdscale.pretrained.language import load_language_encoder
from xdscale.pretrained.language_files import export_language, save_language_files
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.xdbert.schema import Model, XDBERTObjectives, XDBERTRecipe
from xdscale.shards.manifest import Manifest
from xdscale.shards.sources.text_build import TEXT, TextBuild
from xdscale.systems.contract import Data, MicroBatch, PartCount, Place, System, Term, parameter_count
from xdscale.systems.invented import InventedText, TextLengths, average_texts, longest_texts
from xdscale.systems.mlm import check_language, load_published_head
from xdscale.training.stored import (
    FULL_MODEL,
    LANGUAGE_PREFIX,
    MODEL_PREFIX,
    language_folder,
    load_part,
    save_full_model,
    stored_recipe,
    stored_state,
)
from xdscale.weights import part_of


class XDBERTAdaptation(nn.Module):
    """The cross-modal encoder with the heads of the objectives that are on.

    Attributes:
        model: the encoder.
        mlm: masked-LM head, tied to the language encoder's word embedding; None when off.
        match: same-text head; None when off.
        clip_tokens: CLIP token head, tied to CLIP's token embedding; None when off.
    """

    def __init__(self, model: XDBERT, objectives: XDBERTObjectives) -> None:
        super().__init__()
        config, clip = model.language.config, model.clip
        self.model = model
        self.mlm = masked_lm_head(model.language) if objectives.mlm is not None else None
        self.match = MatchHead(config.hidden_size) if objectives.match is not None else None
        self.clip_tokens = None
        if objectives.clip_tokens is not None:
            self.clip_tokens = MaskedTokenHead(clip.output_size, clip.tower.token_embedding.weight)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Term]:
        """Computes the summed loss of each objective.

        The last cross-modal layer is computed only at the positions that a loss reads.

        Args:
            batch: the arrays of `xdscale.data.collate.XDBERTCollator` as tensors: language_ids [b, S],
                clip_ids [b, N, 77], clip_lengths [b, N] with its `xdscale.padding.clip_layout` (clip_longest as a
                plain int), and for the objectives that are on masked_lm_positions and masked_lm_labels [m],
                match_labels [b] (-1: no target), clip_positions and clip_labels [c].

        Returns:
            For each of "mlm", "match", "clip_tokens" that is on its `Term`.
        """
        samples, length = batch["language_ids"].shape
        first = torch.arange(samples, device=batch["language_ids"].device) * length  # [CLS] of each sample
        none = first[:0]
        masked = batch["masked_lm_positions"] if self.mlm is not None else none
        targets = batch["clip_positions"] if self.clip_tokens is not None else none
        # [CLS] is never masked, so no position appears twice.
        positions, order = torch.cat([masked, first if self.match is not None else none]).sort()
        language, clip = self.model(
            batch["language_ids"],
            batch["clip_ids"],
            batch["clip_lengths"],
            layout=batch,
            selected=(positions, targets),
        )  # [m + b, H], [c, D]
        rows = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        masked_rows, first_rows = rows.split([len(masked), len(rows) - len(masked)])
        terms: dict[str, Term] = {}
        if self.mlm is not None:
            terms["mlm"] = Term.scored(*self.mlm(language.index_select(0, masked_rows), batch["masked_lm_labels"]))
        if self.match is not None:
            terms["match"] = Term.scored(*self.match(language.index_select(0, first_rows), batch["match_labels"]))
        if self.clip_tokens is not None:
            terms["clip_tokens"] = Term.scored(*self.clip_tokens(clip, batch["clip_labels"]))
        return terms


class XDBERTSystem(System):
    """Adapts a language encoder with CLIP's text tower."""

    recipe: XDBERTRecipe

    def open(self, place: Place) -> Data:
        """Opens the shards: each row is a text for the language encoder and for CLIP."""
        recipe = self.recipe
        return open_data(
            recipe,
            place,
            TEXT,
            functools.partial(check_shards, recipe.model),
            lambda table: XDBERTCollator(table, seed=recipe.training.seed, objectives=recipe.objectives),
            language_lengths,
        )

    def build(self) -> XDBERTAdaptation:
        """Builds the cross-modal encoder and the heads."""
        return build_adaptation(self.recipe)

    def example(
        self, module: XDBERTAdaptation, samples: int, length: int | None = None, *, longest: bool = False
    ) -> MicroBatch:
        """Invents texts whose CLIP ids are as many as those of Wikipedia's, on average or at most."""
        return example_batch(self.recipe, module, samples, length, longest_texts if longest else average_texts)

    def parts(self, module: XDBERTAdaptation) -> dict[str, nn.Module]:
        """Returns the two encoders, the layers between them, and the heads that are on."""
        model = module.model
        parts = {"language": model.language, "clip": model.clip, "cross_layers": model.layers}
        heads = {"mlm": module.mlm, "match": module.match, "clip_tokens": module.clip_tokens}
        return parts | {name: head for name, head in heads.items() if head is not None}

    def count(self, module: XDBERTAdaptation) -> list[PartCount]:
        """Returns the parts that the paper's Table 6 counts, and the heads (spec xdbert §2.5)."""
        model, names, layers = module.model, self.recipe.model, len(module.model.layers)
        tower = parameter_count(model.clip.tower) - model.clip.tower.text_projection.numel()
        rows = [
            PartCount(f"language model, {names.language.name}", parameter_count(model.language)),
            PartCount(f"CLIP text transformer, {names.clip.name}", tower),
            PartCount("text_projection + logit_scale", parameter_count(model.clip) - tower),
            PartCount("one cross-modal layer", parameter_count(model.layers[0])),
            PartCount(f"model with {count_of(layers, 'cross-modal layer')}", parameter_count(model), total=True),
        ]
        heads = {"masked-LM": module.mlm, "MATCH": module.match, "CLIP token": module.clip_tokens}
        own = set(model.parameters())
        rows += [PartCount(f"{n} head", parameter_count(h, shared=own)) for n, h in heads.items() if h is not None]
        return [*rows, PartCount("model during training", parameter_count(module), total=True)]

    def keep(self, folder: Path) -> None:
        """Keeps the language encoder's configuration and tokenizer."""
        save_language_files(self.recipe.model.language, folder / "language")

    def export(self, state: dict[str, torch.Tensor], run: Path, out: Path) -> str:
        """Writes the language encoder as a Hugging Face folder, and the full model in a folder of its own."""
        said = export_language(language_folder(run), part_of(state, LANGUAGE_PREFIX), out)
        save_full_model(self.recipe, state, out / FULL_MODEL)
        return f"{said}; the full model is in {FULL_MODEL}"


def example_batch(
    recipe: XDBERTRecipe,
    module: XDBERTAdaptation,
    samples: int,
    length: int | None = None,
    texts: TextLengths = average_texts,
) -> MicroBatch:
    """Returns a micro-batch of invented text; arguments as `xdscale.systems.invented.InventedText`.

    Raises:
        XdscaleError: the encoder has fewer positions than `length`.
    """
    clip = module.model.clip.tower.vocab_size
    # One more, so that every text has another as its partner.
    table = InventedText(module.model.language.config, samples + 1, length, clip, texts)
    return XDBERTCollator(table, seed=recipe.training.seed, objectives=recipe.objectives)(table.slots(samples))


def build_model(spec: Model) -> XDBERT:
    """Builds the cross-modal encoder of a recipe's `model` section.

    Raises:
        XdscaleError: an encoder cannot be built or its weights cannot be loaded (see `xdscale.pretrained`).
    """
    language = load_language_encoder(spec.language, dropout=spec.dropout)
    return join_encoders(spec, language, load_clip_text_tower(spec.clip))


def join_encoders(spec: Model, language: PreTrainedModel, clip: CLIPTextEncoder) -> XDBERT:
    """Joins two encoders by fresh cross-modal layers.

    Args:
        spec: the number of layers and their dropout; its names of encoders are not read.
        language: BERT or ELECTRA.
        clip: CLIP-T.
    """
    use_kernels(language)
    config = language.config
    layers = [
        CrossModalLayer(
            config.hidden_size,
            clip.output_size,
            config.num_attention_heads,
            clip.tower.heads,
            config.intermediate_size,
            spec.dropout,
        )
        for _ in range(spec.cross_layers)
    ]
    return XDBERT(language, clip, layers)


def build_adapted(
    folder: Path, state: dict[str, torch.Tensor] | None = None, *, dropout: float | None = None
) -> XDBERT:
    """Builds the adapted cross-modal model of a run or an export in fp32, in evaluation mode.

    Args:
        folder: of the run or the export.
        state: its weights, if they are read already.
        dropout: in the place of its recipe's.

    Raises:
        XdscaleError: neither of the two, adapted without CLIP, no checkpoint yet, or the weights are damaged or not
            those of the recipe.
    """
    recipe = stored_recipe(folder)
    if not isinstance(recipe, XDBERTRecipe):
        raise XdscaleError(f"{folder}: was trained as {recipe.system!r}: there is no cross-modal model in it")
    spec = recipe.model if dropout is None else recipe.model.model_copy(update={"dropout": dropout})
    source = Language(name=str(language_folder(folder).resolve()), weights="random")
    language = load_language_encoder(source, dropout=spec.dropout)
    model = join_encoders(spec, language, build_clip_text_tower(spec.clip))
    load_part(model, stored_state(folder) if state is None else state, MODEL_PREFIX, folder)
    return model.eval()


def build_adaptation(recipe: XDBERTRecipe) -> XDBERTAdaptation:
    """Builds the model and the heads of a recipe.

    New parts take their values from torch's global generator: seed it before, alike on all ranks. A BERT that was
    published with its masked-LM head brings it along.

    Raises:
        XdscaleError: as `build_model`.
    """
    model = recipe.model
    module = XDBERTAdaptation(build_model(model), recipe.objectives)
    if module.mlm is not None:
        load_published_head(module.mlm, model.language)
    return module


def check_shards(spec: Model, manifest: Manifest) -> None:
    """Checks that shards and model fit, before any weights are loaded.

    Raises:
        XdscaleError: as `check_language`, or shards made with another CLIP tokenizer.
    """
    check_language(spec.language, manifest)
    used, known = TextBuild.of(manifest).clip_tokenizer, clip_config(spec.clip).text_cfg.vocab_size
    if used.vocab_size != known:
        raise XdscaleError(
            f"the shards were built with {used.name} of {used.vocab_size} ids, but {spec.clip.name} has {known}; a "
            "CLIP text tower with the same tokenizer is needed"
        )
