"""XDBERT's adaptation: MLM + MATCH + CLIP token classification, cross-modally (spec xdbert §2.4, §3)."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from xdscale import recipe
from xdscale.errors import XdscaleError
from xdscale.models.clip_text import CLIPTextEncoder
from xdscale.models.cross_modal import CrossModalLayer
from xdscale.models.encoders import use_kernels
from xdscale.models.operations import use_definitions
from xdscale.models.xdbert import XDBERT
from xdscale.pretrained.clip import clip_config, load_clip_text_tower
from xdscale.pretrained.language import (
    language_config,
    load_language_encoder,
    masked_lm_head_state,
    own_tokenizer,
    tokenizer_folder,
)
from xdscale.shards.manifest import Manifest
from xdscale.shards.sources.text_build import LanguageTokenizer, TextBuild
from xdscale.tasks import flops
from xdscale.tasks.heads import MaskedTokenHead, MatchHead, masked_lm_head
from xdscale.tasks.masked_lm import MaskedLMAdaptation, build_masked_lm


class XDBERTAdaptation(nn.Module):
    """The cross-modal encoder with the heads of the objectives that are on.

    Attributes:
        model: the encoder.
        mlm: masked-LM head, tied to the language encoder's word embedding; None when off.
        match: same-text head; None when off.
        clip_tokens: CLIP token head, tied to CLIP's token embedding; None when off.
    """

    def __init__(self, model: XDBERT, tasks: recipe.Tasks) -> None:
        super().__init__()
        config, clip = model.language.config, model.clip
        self.model = model
        self.mlm = masked_lm_head(model.language) if tasks.mlm is not None else None
        self.match = MatchHead(config.hidden_size) if tasks.match is not None else None
        self.clip_tokens = None
        if tasks.clip_tokens is not None:
            self.clip_tokens = MaskedTokenHead(clip.output_size, clip.tower.token_embedding.weight)

    def enable_activation_checkpointing(self) -> None:
        """Trades a second forward pass of the encoder for its activations; the result stays the same."""
        self.model.enable_activation_checkpointing()

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Computes the summed loss of each objective.

        The last cross-modal layer is computed only at the positions that a loss reads.

        Args:
            batch: the arrays of `xdscale.data.collate.Batch` as int64 tensors: language_ids [b, S],
                clip_ids [b, N, 77], clip_lengths [b, N] with its `xdscale.padding.clip_layout` (clip_longest as a
                plain int), and for the objectives that are on masked_lm_positions and masked_lm_labels [m],
                match_labels [b] (-1: no target), clip_positions and clip_labels [c].

        Returns:
            For each of "mlm", "match", "clip_tokens" that is on: the loss summed over targets (fp32 scalar)
            and the number of right predictions (int64 scalar). Without targets the loss is 0 and still has
            (zero) gradients, so every rank runs the same collectives.
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
        terms: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if self.mlm is not None:
            terms["mlm"] = self.mlm(language.index_select(0, masked_rows), batch["masked_lm_labels"])
        if self.match is not None:
            terms["match"] = self.match(language.index_select(0, first_rows), batch["match_labels"])
        if self.clip_tokens is not None:
            terms["clip_tokens"] = self.clip_tokens(clip, batch["clip_labels"])
        return terms

    def flops(self, arrays: Mapping[str, np.ndarray]) -> int:
        """Returns the matrix-multiplication FLOPs of forward and backward for one micro-batch.

        Args:
            arrays: of `xdscale.data.collate.Batch`.
        """
        config, encoder = self.model.language.config, self.model.clip
        samples, length = arrays["language_ids"].shape
        blocks = arrays["clip_ids"].shape[1]
        none = np.empty(0, np.int64)
        masked = arrays["masked_lm_positions"] if self.mlm is not None else none
        targets = arrays["clip_positions"] if self.clip_tokens is not None else none
        language = np.full(samples, length)
        clip = arrays["clip_lengths"].sum(1)
        wanted_language = np.bincount(masked // length, minlength=samples) + (self.match is not None)
        wanted_clip = np.bincount(targets // (blocks * encoder.context_length), minlength=samples)
        total = flops.language_flops(config, samples, length)
        total += flops.clip_flops(encoder, np.count_nonzero(arrays["clip_lengths"]))
        for number in range(1, len(self.model.layers) + 1):
            last = number == len(self.model.layers)
            total += flops.cross_layer_flops(
                config.hidden_size,
                encoder.output_size,
                config.intermediate_size,
                language,
                clip,
                wanted_language if last else language,
                wanted_clip if last else clip,
            )
        if self.mlm is not None:
            embedding_size = self.mlm.transform.out_features
            total += flops.masked_token_flops(config.hidden_size, embedding_size, config.vocab_size, len(masked))
        if self.match is not None:
            total += flops.match_flops(config.hidden_size, samples)
        if self.clip_tokens is not None:
            tower = encoder.tower
            total += flops.masked_token_flops(encoder.output_size, tower.width, tower.vocab_size, len(targets))
        return 3 * total


def build_model(spec: recipe.Model) -> XDBERT:
    """Builds the cross-modal encoder of a recipe's `model` section.

    Raises:
        XdscaleError: an encoder cannot be built or its weights cannot be loaded (see `xdscale.pretrained`).
    """
    language = load_language_encoder(spec.language, dropout=spec.dropout)
    return join_encoders(spec, language, load_clip_text_tower(spec.clip))


def join_encoders(spec: recipe.Model, language: PreTrainedModel, clip: CLIPTextEncoder) -> XDBERT:
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


def build_adaptation(spec: recipe.Recipe) -> XDBERTAdaptation | MaskedLMAdaptation:
    """Builds the model and the heads of a recipe; without CLIP, the language encoder with its masked-LM head.

    New parts take their values from torch's global generator: seed it before, alike on all ranks. A BERT that was
    published with its masked-LM head brings it along.

    Raises:
        XdscaleError: as `build_model`.
    """
    if spec.model.clip is None:
        module = build_masked_lm(spec.model)
    else:
        module = XDBERTAdaptation(build_model(spec.model), spec.tasks)
    head = masked_lm_head_state(spec.model.language) if module.mlm is not None else None
    if head is not None:
        own = module.mlm.state_dict()
        reshaped = [f"{name} {list(value.shape)}" for name, value in head.items() if value.shape != own[name].shape]
        if reshaped:
            raise XdscaleError(
                f"{spec.model.language.name}: the masked-LM head among its weights is not of its config.json: "
                f"{', '.join(reshaped)}"
            )
        # A tied decoder's weight is the encoder's embedding already.
        module.mlm.load_state_dict(head, strict=False)
    return use_definitions(module) if spec.model.kernels == "plain" else module


def check_shards(spec: recipe.Model, manifest: Manifest) -> None:
    """Checks that shards and model fit, before any weights are loaded.

    Raises:
        XdscaleError: no packed text, sequences longer than the encoder's positions, shards made with another tokenizer,
            or trained weights without one, for which nobody can say what ids mean.
    """
    build, config = TextBuild.of(manifest), language_config(spec.language)
    length = build.sequence_length + 2
    if length > config.max_position_embeddings:
        raise XdscaleError(
            f"the shards hold sequences of {build.sequence_length} tokens, {length} with [CLS] and [SEP], "
            f"but {spec.language.name} has {config.max_position_embeddings} positions; build shards with "
            f"--sequence-length {config.max_position_embeddings - 2} or less"
        )
    _check_language_tokenizer(spec.language, build.language_tokenizer, config.vocab_size)
    if spec.clip is None:
        return
    clip_vocabulary = clip_config(spec.clip).text_cfg.vocab_size
    if build.clip_tokenizer.vocab_size != clip_vocabulary:
        raise XdscaleError(
            f"the shards were built with {build.clip_tokenizer.name} of {build.clip_tokenizer.vocab_size} "
            f"ids, but {spec.clip.name} has {clip_vocabulary}; a CLIP text tower with the same tokenizer is needed"
        )


def _check_language_tokenizer(spec: recipe.Language, used: LanguageTokenizer, vocabulary: int) -> None:
    if used.vocab_size > vocabulary:
        raise XdscaleError(
            f"the shards were built with the tokenizer {used.name} of {used.vocab_size} ids, but {spec.name} "
            f"has embeddings for {vocabulary}; build the shards with the model's own tokenizer"
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
