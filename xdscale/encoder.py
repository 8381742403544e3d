"""Adapted models for use from Python: loaded from a run or an export, texts in, states out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from xdscale.data.collate import pack_clip_blocks
from xdscale.errors import XdscaleError
from xdscale.files import one_line, shown
from xdscale.models.operations import use_definitions
from xdscale.models.xdbert import XDBERT
from xdscale.names import expand_home
from xdscale.pretrained.language import load_language_encoder, own_tokenizer
from xdscale.recipes.mlm.schema import Language
from xdscale.shards.clip_bpe import ClipBPE, describe_clip_tokenizer
from xdscale.shards.sources.text_build import LanguageTokenizer
from xdscale.systems.xdbert import build_adapted
from xdscale.training.stored import LANGUAGE_PREFIX, language_folder, load_part, part_of, stored_recipe, stored_state


class Encoded(NamedTuple):
    """Texts as hidden states, fp32 on the CPU.

    Attributes:
        states: of each text [tokens, size], from the last layer; the first token is [CLS], the last [SEP].
        pooled: [texts, size], the mean over each text's tokens.
    """

    states: list[torch.Tensor]
    pooled: torch.Tensor


class Encoder:
    """A model with its tokenizers, for evaluation.

    Attributes:
        model: a language encoder of transformers, or the cross-modal `XDBERT`; in fp32.
        tokenizer: of the language encoder, set to give the plain ids of a text.
        special: the ids of its [CLS], [SEP] and so on.
    """

    def __init__(
        self, model: PreTrainedModel | XDBERT, tokenizer: Tokenizer, special: LanguageTokenizer, *, name: str
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.special = special
        self._name = name
        self._clip = ClipBPE() if isinstance(model, XDBERT) else None
        language = model.language if isinstance(model, XDBERT) else model
        self._room = language.config.max_position_embeddings - 2
        self._size = language.config.hidden_size

    @torch.inference_mode()
    def encode(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        truncate: bool = False,
    ) -> Encoded:
        """Encodes texts; the result does not depend on `batch_size` or on the other texts.

        Args:
            texts: one or many; segment ids are 0, as in adaptation. The cross-modal model reads each through CLIP too.
            batch_size: texts computed at a time.
            device: where to compute, such as "cuda"; the model stays there. None: where it is.
            truncate: cut a text that has more tokens than the encoder has positions.

        Raises:
            XdscaleError: a text is too long and `truncate` is not given; something is no text, `batch_size` below 1, or
                no such device.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise XdscaleError(f"text {number} is {shown(text)}; expected a str")
        if batch_size < 1:
            raise XdscaleError(f"batch_size = {batch_size}; expected 1 or more")
        if device is not None:
            try:
                self.model.to(device)
            except (RuntimeError, AssertionError) as error:  # the second without CUDA in torch
                raise XdscaleError(f"device = {device}: {one_line(error)}") from None
        ids, texts = self._language_ids(texts, truncate=truncate)
        found: list[torch.Tensor] = [torch.empty(0)] * len(ids)
        # Texts of about the same length together: least padding.
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            for number, states in zip(chosen, self._encode([ids[n] for n in chosen], [texts[n] for n in chosen])):
                found[number] = states
        pooled = torch.stack([states.mean(0) for states in found]) if found else torch.empty(0, self._size)
        return Encoded(found, pooled)

    def _language_ids(self, texts: list[str], *, truncate: bool) -> tuple[list[list[int]], list[str]]:
        """Returns each text's ids with [CLS] and [SEP], and the text that they cover."""
        ids, covered = [], []
        for number, found in enumerate(self.tokenizer.encode_batch(texts, add_special_tokens=False)):
            if len(found) > self._room and not truncate:
                raise XdscaleError(
                    f"text {number} ({texts[number][:40]!r} …) has {len(found)} tokens, but {self._name} takes "
                    f"{self._room} with [CLS] and [SEP] around them; cut the text, or pass truncate=True"
                )
            cut = len(found) > self._room
            ids.append([self.special.cls_id, *found.ids[: self._room], self.special.sep_id])
            covered.append(texts[number][: found.offsets[self._room - 1][1]] if cut else texts[number])
        return ids, covered

    def _encode(self, ids: list[list[int]], texts: list[str]) -> Iterator[torch.Tensor]:
        lengths, device = torch.tensor([len(row) for row in ids]), next(self.model.parameters()).device
        language = torch.full((len(ids), int(lengths.max())), self.special.pad_id)  # [texts, s]
        for row, values in enumerate(ids):
            language[row, : len(values)] = torch.tensor(values)
        mask = torch.arange(language.shape[1]) < lengths[:, None]
        if self._clip is None:
            found = self.model(language.to(device), attention_mask=mask.to(device)).last_hidden_state
        else:
            clip_ids, clip_lengths = (torch.from_numpy(array).to(device) for array in _clip_blocks(self._clip, texts))
            found, _ = self.model(language.to(device), clip_ids, clip_lengths, mask.to(device))
        for states, length in zip(found.float().cpu(), lengths.tolist()):
            yield states[:length].clone()


def load_encoder(folder: str | Path) -> Encoder:
    """Loads a language encoder.

    Args:
        folder: an export, a run folder (the checkpoint is read that an export would take), or any BERT or ELECTRA as a
            local folder, `package:NAME/folder` or hub name.

    Raises:
        XdscaleError: nothing of the kind, such as a run of VisualBERT, damaged, or without a tokenizer.
    """
    name = expand_home(str(folder))
    path = Path(name)
    if not (path / "recipe.yaml").is_file():
        spec = Language(name=name)
        return Encoder(load_language_encoder(spec, dropout=0.0), *own_tokenizer(name), name=name)
    source = str(language_folder(path).resolve())
    model = load_language_encoder(Language(name=source, weights="random"), dropout=0.0)
    state = stored_state(path)
    if not part_of(state, LANGUAGE_PREFIX):
        raise XdscaleError(
            f"{path}: was trained as {stored_recipe(path).system!r}: there is no encoder of texts alone in it; "
            "'xdscale export' makes a folder of it, which docs/python.md says how to load"
        )
    load_part(model, state, LANGUAGE_PREFIX, path)
    return Encoder(model, *own_tokenizer(source), name=name)


def load_cross_modal(folder: str | Path) -> Encoder:
    """Loads an adapted cross-modal model.

    Neither the original encoders nor a network are needed: all weights come from `folder`.

    Args:
        folder: a run folder (the checkpoint is read that an export would take, checksums verified), or an export.

    Raises:
        XdscaleError: neither of the two, of another system than XDBERT, no checkpoint yet, without a tokenizer, or the
            weights are damaged or not those of the recipe.
    """
    path = Path(expand_home(str(folder)))
    model = build_adapted(path)
    if stored_recipe(path).run.kernels == "plain":
        use_definitions(model)
    return Encoder(model, *own_tokenizer(str(language_folder(path).resolve())), name=str(folder))


def _clip_blocks(bpe: ClipBPE, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns CLIP's ids int64 [texts, blocks, 77] and their numbers int64 [texts, blocks]."""
    marks, encoded = describe_clip_tokenizer(), bpe.encode(texts)
    offsets = np.cumsum([0, *map(len, encoded)])
    return pack_clip_blocks(np.concatenate(encoded), offsets, start_id=marks.start_id, end_id=marks.end_id)
