"""VisualBERT's pretraining on captions: masked words with an image, and do both captions describe it (spec §2)."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import BertConfig

from xdscale.data.feature_source import keep_feature_source, kept_feature_source
from xdscale.data.opening import open_data
from xdscale.data.visualbert import VisualBERTCollator, compose, no_regions
from xdscale.errors import XdscaleError
from xdscale.models.heads import masked_lm_head, match_loss
from xdscale.models.operations import initialise
from xdscale.models.visualbert import VisualBERT
from xdscale.pretrained.language import language_config, load_language_encoder, sentence_head_state
from xdscale.pretrained.language_files import copy_tokenizer, save_language_files
from xdscale.pretrained.visualbert import config_from_bert, from_bert, load_visualbert, save_visualbert
from xdscale.recipes.visualbert.schema import VisualBERTObjectives, VisualBERTRecipe
from xdscale.shards.manifest import Manifest
from xdscale.shards.regions import REGIONS, RegionBuild, Regions, RegionTable
from xdscale.shards.sources.caption_build import CAPTIONS, CaptionBuild
from xdscale.systems.contract import Data, MicroBatch, PartCount, Place, Slots, System, Term, parameter_count
from xdscale.systems.invented import invented_tokenizer
from xdscale.systems.mlm import check_tokenizer, load_published_head
from xdscale.training.stored import MODEL_PREFIX, language_folder

CAPTION_WORDS = 12
"""Word pieces of COCO's captions, on average."""
ADAPTIVE_REGIONS, MOST_REGIONS = 36, 100
"""Of an image, on average and at most, where a detector takes what it is sure of."""


class VisualBERTPretraining(nn.Module):
    """VisualBERT with the heads of the objectives that are on.

    Attributes:
        model: the encoder, with its pooler.
        mlm: masked-LM head, tied to the word embedding; None when off.
        match: classifier of the pooled first token; None when off.
    """

    def __init__(self, model: VisualBERT, objectives: VisualBERTObjectives) -> None:
        super().__init__()
        self.model = model
        self.mlm = masked_lm_head(model) if objectives.mlm is not None else None
        self.match = None
        if objectives.match is not None:
            self.match = nn.Linear(model.config.hidden_size, 2)
            initialise([self.match], model.config.initializer_range)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Term]:
        """Computes the summed loss of each objective; the last layer runs at the places that a loss reads alone.

        Args:
            batch: the arrays of `xdscale.data.visualbert.VisualBERTCollator` as tensors.

        Returns:
            For each of "mlm", "match" that is on its `Term`.
        """
        none = batch["text_ids"][:0]
        states, pooled, _ = self.model(batch, none if self.mlm is None else batch["masked_lm_rows"])
        terms: dict[str, Term] = {}
        if self.mlm is not None:
            terms["mlm"] = Term.scored(*self.mlm(states, batch["masked_lm_labels"]))
        if self.match is not None:
            terms["match"] = Term.scored(*match_loss(self.match(pooled), batch["match_labels"]))
        return terms


class VisualBERTSystem(System):
    """Trains a BERT on with captions and the regions of their images."""

    recipe: VisualBERTRecipe
    _regions: RegionTable | None = None  # of an open run that reads features

    def open(self, place: Place) -> Data:
        """Opens the captions, and the regions that they are linked to."""
        recipe = self.recipe
        data = open_data(
            recipe,
            place,
            CAPTIONS,
            lambda manifest: check_captions(recipe, manifest),
            lambda table: VisualBERTCollator(table, recipe),
        )
        self._regions = data.collate.regions
        return data

    def build(self) -> VisualBERTPretraining:
        """Builds encoder and heads of a BERT, whose own heads come along where it was published with them."""
        recipe, spec = self.recipe, self.recipe.model
        language = load_language_encoder(spec.language, dropout=spec.dropout)
        model = from_bert(
            language, region_size=recipe.region_width, early_fusion=spec.early_fusion, alignment=spec.alignment
        )
        module = VisualBERTPretraining(model, recipe.objectives)
        if module.mlm is not None:
            load_published_head(module.mlm, spec.language)
        if module.match is not None and (head := sentence_head_state(spec.language)) is not None:
            module.match.load_state_dict(head)  # its classes are not turned round: spec VisualBERT §9
        _freeze(module, recipe)
        return module

    def published_state(self, folder: Path) -> dict[str, torch.Tensor] | None:
        """Returns the weights of an export, of anybody's VisualBERT, or of a checkpoint of the release."""
        if (folder / "recipe.yaml").is_file():
            return None
        model, heads = load_visualbert(folder)
        return {MODEL_PREFIX + name: value for name, value in model.state_dict().items()} | heads

    def example(
        self, module: VisualBERTPretraining, samples: int, length: int | None = None, *, longest: bool = False
    ) -> MicroBatch:
        """Invents captions and regions: as many as COCO's on average, or as many as there may be."""
        return invented(self.recipe, samples, length, longest=longest)

    def parts(self, module: VisualBERTPretraining) -> dict[str, nn.Module]:
        """Returns the encoder and the heads that are on."""
        heads = {"mlm": module.mlm, "match": module.match}
        return {"encoder": module.model} | {name: head for name, head in heads.items() if head is not None}

    def count(self, module: VisualBERTPretraining) -> list[PartCount]:
        """Returns encoder and heads (spec VisualBERT §1)."""
        own = set(module.model.parameters())
        rows = [
            PartCount(f"VisualBERT of {self.recipe.model.language.name}", parameter_count(module.model), total=True)
        ]
        heads = {"masked-LM head": module.mlm, "same-picture head": module.match}
        rows += [PartCount(name, parameter_count(head, shared=own)) for name, head in heads.items() if head is not None]
        return [*rows, PartCount("model during training", parameter_count(module), total=True)]

    def keep(self, folder: Path) -> None:
        """Keeps the BERT's configuration and tokenizer, and what computed the features."""
        save_language_files(self.recipe.model.language, folder / "language")
        keep_feature_source(self._regions, folder)

    def export(self, state: dict[str, torch.Tensor], run: Path, out: Path) -> str:
        """Writes a folder that transformers' `VisualBertModel` and `VisualBertForPreTraining` load."""
        source, spec = language_folder(run), self.recipe.model
        copy_tokenizer(source, out)
        config = config_from_bert(
            BertConfig.from_pretrained(source), region_size=self.recipe.region_width, early_fusion=spec.early_fusion
        )
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = spec.dropout
        config.features_of = kept_feature_source(run)
        save_visualbert(config, state, out, alignment=spec.alignment)
        count = sum(value.numel() for name, value in state.items() if name.startswith(MODEL_PREFIX))
        return f"VisualBERT ({count:,} parameters), with the heads of {', '.join(self.objectives())}"


def check_captions(recipe: VisualBERTRecipe, manifest: Manifest) -> None:
    """Checks that captions, regions and model fit, before any weights are loaded.

    Raises:
        XdscaleError: no captions, of another tokenizer; regions of another width; texts longer than the BERT's
            positions; or pairs are asked for and images have one caption alone.
    """
    spec, match = recipe.model, recipe.objectives.match
    check_tokenizer(spec.language, CaptionBuild.of(manifest).language_tokenizer)
    check_inputs(recipe, RegionBuild.model_validate(manifest.tables[REGIONS].build).width)
    splits = manifest.tables[CAPTIONS].splits
    lone = {name: split.counts.get("lone_captions", 0) for name, split in splits.items()}
    if match is not None and any(lone.values()):
        told = ", ".join(f"{count:,} in {name}" for name, count in lone.items() if count)
        raise XdscaleError(
            f"objectives.match needs two captions of an image, but some images have one alone ({told}): "
            "leave them out of the captions, or switch it off: objectives.match=null"
        )


def check_inputs(recipe: VisualBERTRecipe, width: int) -> None:
    """Checks that features and lengths are those that the model reads.

    Raises:
        XdscaleError: features of another width, or texts longer than the BERT's positions.
    """
    spec = recipe.model
    positions = language_config(spec.language).max_position_embeddings
    if spec.max_text > positions:
        raise XdscaleError(f"model.max_text = {spec.max_text}: {spec.language.name} has {positions} positions")
    if spec.images and width != spec.region_size:
        raise XdscaleError(
            f"model.region_size = {spec.region_size}, but the regions' features are {width} wide; "
            f"write model.region_size={width}, or take the regions that the recipe is for"
            if width
            else f"model.region_size = {spec.region_size}, but the regions have no features; take some that have"
        )


def invented(recipe: VisualBERTRecipe, samples: int, length: int | None = None, *, longest: bool = False) -> MicroBatch:
    """Returns a micro-batch of random captions and regions; arguments as `System.example`.

    Args:
        recipe: objectives and lengths.
        samples: how many.
        length: tokens of each sample, of which the captions take what they have; None for what COCO's images have.
        longest: whether captions and regions are as many as there may be.

    Raises:
        XdscaleError: there are fewer than a caption takes.
    """
    model, generator = recipe.model, np.random.default_rng(0)
    captions = 1 if recipe.objectives.match is None else 2
    words = (model.max_text - 1) // captions - 1 if longest else CAPTION_WORDS
    text = min(model.max_text, 1 + captions * (words + 1))
    if length is not None and length < 1 + 2 * captions:
        raise XdscaleError(f"sequence length {length}: a sample has at least {1 + 2 * captions} tokens")
    if length is not None and text > length:
        words, text = (length - 1) // captions - 1, length
    regions = model.max_regions or (MOST_REGIONS if longest else ADAPTIVE_REGIONS)
    regions = (regions if length is None else length - text) if model.images else 0
    vocabulary = 1000  # which ids they are changes no shape
    texts = [list(generator.integers(0, vocabulary, (samples, words))) for _ in range(captions)]
    found = no_regions(samples, model.region_size)
    if regions:
        boxes = np.zeros((samples * regions, 4), np.float32)
        features = generator.standard_normal((len(boxes), model.region_size), np.float32).astype(np.float16)
        found = Regions(features, boxes, boxes[:, 0], found.sizes, np.arange(samples + 1) * regions)
    slots = Slots.of(np.arange(samples))
    labels = None if recipe.objectives.match is None else np.arange(samples) % 2
    return compose(recipe, invented_tokenizer(vocabulary), slots, list(zip(*texts)), labels, found)


def _freeze(module: VisualBERTPretraining, recipe: VisualBERTRecipe) -> None:
    """Takes from the optimizer what no loss reaches, and the pooler where the recipe says so."""
    embeddings, spec = module.model.embeddings, recipe.model
    module.model.pooler.requires_grad_(module.match is not None and not spec.freeze_pooler)
    if not spec.images:
        for part in ("visual_projection", "visual_token_type_embeddings", "visual_position_embeddings"):
            getattr(embeddings, part).requires_grad_(False)
