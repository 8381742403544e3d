"""The fair baseline: the language encoder alone, trained on with masked-LM on the same shards (paper §3)."""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from xdscale.data.collate import language_lengths
from xdscale.data.masked_lm import MaskedLMCollator
from xdscale.data.opening import open_data
from xdscale.errors import XdscaleError
from xdscale.models.encoders import recompute_layers, use_kernels
from xdscale.models.heads import MaskedTokenHead, masked_lm_head
from xdscale.pretrained.language import (
    language_config,
    load_language_encoder,
    masked_lm_head_state,
    own_tokenizer,
    tokenizer_folder,
)
from xdscale.pretrained.language_files import export_language, save_language_files
from xdscale.recipes.mlm.schema import Language, MaskedLMRecipe
from xdscale.shards.manifest import Manifest
from xdscale.shards.sources.text_build import TEXT, LanguageTokenizer, TextBuild
from xdscale.systems.contract import Data, MicroBatch, PartCount, Place, System, Term, parameter_count
from xdscale.systems.invented import InventedText
from xdscale.training.stored import LANGUAGE_PREFIX, language_folder
from xdscale.weights import part_of


class MaskedLMAdaptation(nn.Module):
    """A language encoder with its masked-LM head.

    Attributes:
        model: holds the encoder as "language", so that its weights have the names they have in XDBERT.
        mlm: masked-LM head, tied to the encoder's word embedding.
    """

    def __init__(self, language: PreTrainedModel) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"language": language})
        self.mlm = masked_lm_head(language)
        if getattr(language, "pooler", None) is not None:
            language.pooler.requires_grad_(False)  # no loss reaches it

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass; the result stays the same."""
        recompute_layers(self.model["language"])

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Term]:
        """Computes the summed masked-LM loss.

        Args:
            batch: the arrays of `xdscale.data.masked_lm.MaskedLMCollator` as tensors.

        Returns:
            "mlm": its `Term`.
        """
        states = self.model["language"](input_ids=batch["language_ids"], use_cache=False).last_hidden_state
        masked = states.flatten(0, 1).index_select(0, batch["masked_lm_positions"])  # [m, H]
        return {"mlm": Term.scored(*self.mlm(masked, batch["masked_lm_labels"]))}


class MaskedLMSystem(System):
    """Trains a language encoder on with masked-LM."""

    recipe: MaskedLMRecipe

    def open(self, place: Place) -> Data:
        """Opens the shards; of their two columns the language encoder's is read."""
        recipe = self.recipe
        check = functools.partial(check_language, recipe.model.language)
        return open_data(
            recipe,
            place,
            TEXT,
            check,
            lambda table: MaskedLMCollator(table, seed=recipe.training.seed, objectives=recipe.objectives),
            language_lengths,
        )

    def build(self) -> MaskedLMAdaptation:
        """Builds encoder and head."""
        return build_masked_lm(self.recipe)

    def example(
        self, module: MaskedLMAdaptation, samples: int, length: int | None = None, *, longest: bool = False
    ) -> MicroBatch:
        """Invents text; all sequences are equally long."""
        recipe, table = self.recipe, InventedText(module.model["language"].config, samples, length)
        return MaskedLMCollator(table, seed=recipe.training.seed, objectives=recipe.objectives)(table.slots(samples))

    def parts(self, module: MaskedLMAdaptation) -> dict[str, nn.Module]:
        """Returns encoder and head."""
        return {"language": module.model["language"], "mlm": module.mlm}

    def count(self, module: MaskedLMAdaptation) -> list[PartCount]:
        """Returns encoder and head."""
        encoder = module.model["language"]
        head = parameter_count(module.mlm, shared=set(encoder.parameters()))
        return [
            PartCount(f"language model, {self.recipe.model.language.name}", parameter_count(encoder), total=True),
            PartCount("masked-LM head", head),
            PartCount("model during training", parameter_count(module), total=True),
        ]

    def keep(self, folder: Path) -> None:
        """Keeps the encoder's configuration and tokenizer."""
        save_language_files(self.recipe.model.language, folder / "language")

    def export(self, state: dict[str, torch.Tensor], run: Path, out: Path) -> str:
        """Writes the language encoder as a Hugging Face folder."""
        return export_language(language_folder(run), part_of(state, LANGUAGE_PREFIX), out)


def build_masked_lm(recipe: MaskedLMRecipe) -> MaskedLMAdaptation:
    """Builds encoder and head; a BERT that was published with its masked-LM head brings it along.

    Raises:
        XdscaleError: the encoder cannot be built or its weights cannot be loaded.
    """
    model = recipe.model
    language = load_language_encoder(model.language, dropout=model.dropout)
    use_kernels(language)
    module = MaskedLMAdaptation(language)
    load_published_head(module.mlm, model.language)
    return module


def load_published_head(head: MaskedTokenHead, spec: Language) -> None:
    """Loads the masked-LM head that an encoder was published with, if it was.

    Raises:
        XdscaleError: it is not of the encoder's config.json.
    """
    published = masked_lm_head_state(spec)
    if published is None:
        return
    own = head.state_dict()
    reshaped = [f"{name} {list(value.shape)}" for name, value in published.items() if value.shape != own[name].shape]
    if reshaped:
        raise XdscaleError(
            f"{spec.name}: the masked-LM head among its weights is not of its config.json: {', '.join(reshaped)}"
        )
    # A tied decoder's weight is the encoder's embedding already.
    head.load_state_dict(published, strict=False)


def check_language(spec: Language, manifest: Manifest) -> None:
    """Checks that shards and language encoder fit, before any weights are loaded.

    Raises:
        XdscaleError: no packed text, sequences longer than the encoder's positions, shards made with another tokenizer,
            or trained weights without one, for which nobody can say what ids mean.
    """
    build, config = TextBuild.of(manifest), language_config(spec)
    used, length = build.language_tokenizer, build.sequence_length + 2
    if length > config.max_position_embeddings:
        raise XdscaleError(
            f"the shards hold sequences of {length - 2} tokens, {length} with [CLS] and [SEP], "
            f"but {spec.name} has {config.max_position_embeddings} positions; build shards with "
            f"--sequence-length {config.max_position_embeddings - 2} or less"
        )
    check_tokenizer(spec, used)


def check_tokenizer(spec: Language, used: LanguageTokenizer) -> None:
    """Checks that text was tokenised for a language encoder.

    Raises:
        XdscaleError: it was with another tokenizer, or the encoder has trained weights and none of its own, so that
            nobody can say what ids mean.
    """
    config = language_config(spec)
    if used.vocab_size > config.vocab_size:
        raise XdscaleError(
            f"the shards were built with the tokenizer {used.name} of {used.vocab_size} ids, but {spec.name} "
            f"has embeddings for {config.vocab_size}; build the shards with the model's own tokenizer"
        )
    if spec.weights == "random" and tokenizer_folder(spec) is None:
        return
    _, own = own_tokenizer(spec.name)
    if own.sha256 != used.sha256:
        raise XdscaleError(
            f"the shards were built with the tokenizer {used.name} ({used.sha256[:12]}), but {spec.name} has "
            f"another one ({own.sha256[:12]}): its word pieces would have other ids; build the shards with "
            f"--language-tokenizer {spec.name}"
        )
