"""VL-BERT's pretraining: masked words with an image and without, and masked regions (spec VL-BERT §2)."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import BertConfig
from transformers.activations import ACT2FN

from xdscale.data.feature_source import keep_feature_source, kept_feature_source
from xdscale.data.held_out import held_out_batches
from xdscale.data.opening import open_shards
from xdscale.data.order import Order, check_size, validation_slots
from xdscale.data.pictures import require_pictures
from xdscale.data.vlbert_pretraining import Tokens, VLBERTCollator, compose
from xdscale.errors import XdscaleError
from xdscale.models.fast_rcnn import FastRCNN, features_of, load_fast_rcnn
from xdscale.models.heads import RegionClassHead, masked_lm_head
from xdscale.models.vlbert import VLBERT
from xdscale.names import resolve_path
from xdscale.pretrained.language import language_config, load_language_encoder, own_tokenizer, tokenizer_folder
from xdscale.pretrained.language_files import copy_tokenizer, save_language_files
from xdscale.pretrained.vlbert import config_from_bert, from_bert, load_vlbert, save_pooler, save_vlbert
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.pixels import RANDOM
from xdscale.recipes.vlbert.schema import READING, GroundedObjectives, VLBERTRecipe
from xdscale.shards.manifest import Manifest
from xdscale.shards.regions import REGIONS, RegionBuild, Regions, RegionTable
from xdscale.shards.sources.caption_build import CAPTIONS, CaptionBuild
from xdscale.shards.sources.text_build import TEXT, TextBuild
from xdscale.systems.contract import Data, MicroBatch, PartCount, Place, Slots, System, Term, parameter_count
from xdscale.systems.invented import invented_tokenizer
from xdscale.systems.mlm import check_tokenizer, load_published_head
from xdscale.training.stored import MODEL_PREFIX, language_folder, stored_recipe

CAPTION_WORDS = 12
"""Word pieces of Conceptual Captions, on average."""
CONTINUATION = "##"


class VLBERTPretraining(nn.Module):
    """VL-BERT with the heads of the objectives that are on.

    Attributes:
        model: the encoder, without pooler.
        mlm: masked-LM head of words with and without an image, tied to the word embedding; None when both are off.
        masked_region: head of regions; None when off.
        trunk: from pixels to features; None where these are read.
    """

    def __init__(
        self, model: VLBERT, objectives: GroundedObjectives, classes: int, trunk: FastRCNN | None = None
    ) -> None:
        super().__init__()
        self.trunk = trunk
        config = model.config
        self.model = model
        self.words = [name for name in ("mlm", "text_mlm") if getattr(objectives, name) is not None]
        self.mlm = masked_lm_head(model) if self.words else None
        self.masked_region = None
        if objectives.masked_region is not None:
            activation, std = ACT2FN[config.hidden_act], config.initializer_range
            self.masked_region = RegionClassHead(config.hidden_size, classes, activation=activation, std=std)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Term]:
        """Computes the summed loss of each objective; the last layer runs at the places that a loss reads alone.

        Args:
            batch: the arrays of `xdscale.data.vlbert_pretraining.VLBERTCollator` as tensors.

        Returns:
            For each of "mlm", "text_mlm", "masked_region" that is on its `Term`.
        """
        if self.trunk is not None:
            batch = {**batch, "features": features_of(self.trunk, batch)}
        names = [*self.words, *(["masked_region"] if self.masked_region is not None else [])]
        states = self.model(batch, torch.cat([batch[f"{name}_rows"] for name in names])).states
        labels = [batch[f"{name}_labels"] for name in self.words]
        counts = [len(part) for part in labels]
        words, regions = states.tensor_split([sum(counts)])
        terms: dict[str, Term] = {}
        if self.words:  # both kinds of text together: the vocabulary is read, and its gradient written, once
            losses, correct = self.mlm(words, torch.cat(labels))
            scores = zip(losses.split(counts), correct.split(counts))
            terms = {name: Term.scored(*score) for name, score in zip(self.words, scores)}
        if self.masked_region is not None:
            terms["masked_region"] = Term.scored(*self.masked_region(regions, batch["masked_region_labels"]))
        return terms


class VLBERTSystem(System):
    """Trains a BERT on with captions and regions, and with texts, half and half."""

    recipe: VLBERTRecipe
    _regions: RegionTable | None = None  # of an open run that reads features

    def open(self, place: Place) -> Data:
        """Opens captions, the regions that they are linked to, and texts, which lie in one dataset."""
        recipe, ranks = self.recipe, place.ranks
        tables = [CAPTIONS] if recipe.objectives.text_mlm is None else [CAPTIONS, TEXT]
        shards = open_shards(
            recipe.data.shards,
            recipe.run,
            ranks,
            tables,
            check=lambda folder: check_tables(recipe, Manifest.load(folder)),
            on_shard=place.tick,
        )
        continues = continuations(recipe.model.language)
        train, held_out = (
            VLBERTCollator(
                *(shards.table(split, name) for name in tables),
                recipe=recipe,
                continues=continues,
                flips=split == "train",
            )
            for split in ("train", "validation")
        )
        for name, size in zip(tables, held_out.sizes):
            check_size(size, f"validation of {name}")
        most = len(tables) * min(held_out.sizes)
        slots = validation_slots(most, recipe.run.eval_samples, ranks.world_size, ranks.rank, place.micro_batch)
        validation = held_out_batches(held_out, map(held_out.alternating, slots))
        order = Order.of(recipe, place, *train.sizes, shares=[1] * len(tables))
        fingerprints = train.captions.manifest.only(tables).fingerprints
        self._regions = train.regions if recipe.model.pixels is None else None
        return Data(order, train, validation, fingerprints, shards.damaged, shards.cache is not None)

    def build(self) -> VLBERTPretraining:
        """Builds encoder and heads of a BERT, whose masked-LM head comes along where it was published with it."""
        spec, objectives = self.recipe.model, self.recipe.objectives
        language = load_language_encoder(spec.language, dropout=spec.dropout)
        model = from_bert(language, **spec.encoder_values())
        trunk = None
        if spec.pixels is not None:
            weights = spec.pixels.weights
            trunk = load_fast_rcnn(None if weights == RANDOM else resolve_path(weights))
        module = VLBERTPretraining(model, objectives, spec.region_classes, trunk)
        if module.mlm is not None:
            load_published_head(module.mlm, spec.language)
        return module

    def published_state(self, folder: Path) -> dict[str, torch.Tensor] | None:
        """Returns the weights of an export, or of a checkpoint of the release.

        Raises:
            XdscaleError: nothing of the kind, or it was trained to read its input in another way.
        """
        if (folder / "recipe.yaml").is_file():
            self._check_reading(folder, stored_recipe(folder).model)
            return None
        model, heads = load_vlbert(folder)
        self._check_reading(folder, model.config)
        return {MODEL_PREFIX + name: value for name, value in model.state_dict().items()} | heads

    def _check_reading(self, folder: Path, trained: object) -> None:
        own = self.recipe.model
        for name in READING:
            found = getattr(trained, name, getattr(own, name))  # a run of another system is refused for its weights
            if found != getattr(own, name):
                raise XdscaleError(
                    f"model.start = {folder}: trained with model.{name}={str(found).lower()}, which this recipe has "
                    "not; its weights read their input in that way, so give it behind the recipe's name"
                )

    def example(
        self, module: VLBERTPretraining, samples: int, length: int | None = None, *, longest: bool = False
    ) -> MicroBatch:
        """Invents captions with regions, and as many texts: as many elements as are kept."""
        return invented(self.recipe, samples, length, longest=longest)

    def parts(self, module: VLBERTPretraining) -> dict[str, nn.Module]:
        """Returns the encoder, the heads that are on, and the branch of Fast R-CNN if it is trained along."""
        heads = {"mlm": module.mlm, "masked_region": module.masked_region, "trunk": module.trunk}
        return {"encoder": module.model} | {name: head for name, head in heads.items() if head is not None}

    def count(self, module: VLBERTPretraining) -> list[PartCount]:
        """Returns what spec VL-BERT §1.7 counts."""
        model = module.model
        inner = parameter_count(model.embeddings) + parameter_count(model.layers)
        rows = [
            PartCount(f"embeddings and layers of {self.recipe.model.language.name}", inner),
            PartCount("what is seen of regions", parameter_count(model) - inner),
        ]
        heads, own = {"masked-LM head": module.mlm, "region head": module.masked_region}, set(model.parameters())
        rows += [PartCount(name, parameter_count(head, shared=own)) for name, head in heads.items() if head is not None]
        if module.trunk is not None:
            rows.append(PartCount("model without Fast R-CNN", sum(row.parameters for row in rows), total=True))
            rows.append(PartCount("Fast R-CNN", parameter_count(module.trunk)))
        return [*rows, PartCount("model during training", parameter_count(module), total=True)]

    def keep(self, folder: Path) -> None:
        """Keeps the BERT's configuration, tokenizer and pooler, and what computed the features."""
        save_language_files(self.recipe.model.language, folder / "language")
        save_pooler(self.recipe.model.language, folder / "language")
        keep_feature_source(self._regions, folder)

    def export(self, state: dict[str, torch.Tensor], run: Path, out: Path) -> str:
        """Writes a folder that `xdscale.pretrained.vlbert.load_vlbert` reads, with the heads."""
        source, spec = language_folder(run), self.recipe.model
        copy_tokenizer(source, out)
        config = config_from_bert(BertConfig.from_pretrained(source), **spec.encoder_values())
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = spec.dropout
        config.features_of = kept_feature_source(run)
        save_vlbert(config, state, out)
        count = sum(value.numel() for name, value in state.items() if name.startswith(MODEL_PREFIX))
        return f"VL-BERT ({count:,} parameters), with the heads of {', '.join(self.objectives())}"


def check_tables(recipe: VLBERTRecipe, manifest: Manifest) -> None:
    """Checks that captions, regions, texts and model fit, before any weights are loaded.

    Raises:
        XdscaleError: a table is missing, of another tokenizer, or of another width or number of classes; or samples are
            longer than the BERT's positions.
    """
    spec, on = recipe.model, recipe.objectives
    check_tokenizer(spec.language, CaptionBuild.of(manifest).language_tokenizer)
    if on.text_mlm is not None:
        check_tokenizer(spec.language, TextBuild.of(manifest).language_tokenizer)
    positions = language_config(spec.language).max_position_embeddings
    if spec.max_elements + 2 > positions:
        raise XdscaleError(
            f"model.max_elements = {spec.max_elements}: {spec.language.name} has {positions} positions, of which "
            "regions and the end take two"
        )
    regions = RegionBuild.model_validate(manifest.tables[REGIONS].build)
    if spec.pixels is not None:
        require_pictures(regions)
    if spec.pixels is None and regions.width != spec.region_size:
        raise XdscaleError(
            f"model.region_size = {spec.region_size}, but the regions' features are {regions.width} wide; "
            f"write model.region_size={regions.width}, or take the regions that the recipe is for"
            if regions.width
            else f"model.region_size = {spec.region_size}, but the regions have no features; take some that have, or "
            "state model.pixels, which reads the images themselves"
        )
    if on.masked_region is not None and regions.probabilities != spec.region_classes:
        found = f"distributions over {regions.probabilities} classes" if regions.probabilities else "no distributions"
        raise XdscaleError(
            f"model.region_classes = {spec.region_classes}, but the regions have {found}; take regions with the "
            "detector's distributions, or switch it off: objectives.masked_region=null"
        )


def continuations(spec: Language) -> np.ndarray:
    """Returns which word pieces go on with the word of the piece before them: bool [ids of the encoder].

    Of a bare architecture, whose pieces nobody knows, none does.
    """
    found = np.zeros(language_config(spec).vocab_size, bool)
    if spec.weights == "pretrained" or tokenizer_folder(spec) is not None:
        tokenizer, _ = own_tokenizer(spec.name)
        for piece, number in tokenizer.get_vocab().items():
            found[number] = piece.startswith(CONTINUATION)
    return found


def invented(recipe: VLBERTRecipe, samples: int, length: int | None = None, *, longest: bool = False) -> MicroBatch:
    """Returns a micro-batch of random captions, regions and texts; arguments as `System.example`.

    Args:
        recipe: objectives and lengths.
        samples: how many, half of them texts where these are on.
        length: elements of each with [END]; None for as many as are kept.
        longest: whether captions are as long as regions are many; shapes are the same.

    Raises:
        XdscaleError: there are fewer than a caption with a region takes, or more than are kept.
    """
    spec, generator = recipe.model, np.random.default_rng(0)
    elements = spec.max_elements if length is None else length - 1
    if not 4 <= elements <= spec.max_elements:
        raise XdscaleError(f"sequence length {length}: a sample has 5 to {spec.max_elements + 1} elements")
    text = elements // 2 if longest else min(CAPTION_WORDS + 2, elements // 2 + 1)
    has_image = np.ones(samples, bool)
    if recipe.objectives.text_mlm is not None:
        has_image[1::2] = False
    vocabulary = 1000  # which ids they are changes no shape
    words = [generator.integers(0, vocabulary, text - 2 if image else elements) for image in has_image]
    images, regions = int(has_image.sum()), elements - text - 1  # and the whole image
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (images * regions, 1))
    width = spec.region_size if spec.pixels is None else 0
    features = generator.standard_normal((len(boxes), width), np.float32).astype(np.float16)
    sizes = np.ones((images, 2), np.uint16)
    objects = Regions(features, boxes, boxes[:, 0], sizes, np.arange(images + 1) * regions)
    probabilities = np.full((len(boxes), spec.region_classes), 1 / spec.region_classes, np.float32)
    slots = Slots.of(np.arange(samples))
    tokens = Tokens(invented_tokenizer(vocabulary), np.zeros(vocabulary, bool))
    pictures = None
    if spec.pixels is not None:
        short, long = spec.pixels.short_side, spec.pixels.long_side
        wide = long if longest else min(long, short * 4 // 3)
        pictures = [np.zeros((3, short, wide), np.float32) for _ in range(images)]
    return compose(recipe, tokens, slots, words, has_image, objects, probabilities, pictures)
