"""What subjects of texts with image regions share: the folder of the model, and the branch that is tuned along."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from tokenizers import Tokenizer
from transformers import PretrainedConfig

from xdscale.data.feature_source import notes_on_features, of_same_network, require_width
from xdscale.errors import XdscaleError
from xdscale.names import resolve_path
from xdscale.pretrained.language import tokenizer_of
from xdscale.recipes.pixels import RANDOM, PixelSettings
from xdscale.shards.sources.text_build import LanguageTokenizer
from xdscale.tasks.contract import Subject, SubjectFacts, Task
from xdscale.weights import weight_files


class VisualSubject(Subject):
    """A model of texts and image regions in a folder, with its tokenizer beside the weights.

    Attributes:
        own_positions: of the text's table, which it needs behind those of a text.
        own_trunk: file in the folder of the branch that is tuned along from pixels.
        trunk_like: who that branch is like, for messages.
        trunk_words: its name.
    """

    settings: PixelSettings
    own_positions: ClassVar[int] = 0
    own_trunk: ClassVar[str]
    trunk_like: ClassVar[str]
    trunk_words: ClassVar[str]

    def describe(self) -> SubjectFacts:
        """Checks configuration, tokenizer and weights, those of the branch that is tuned along among them."""
        folder, config = self._folder, self._config()
        room = config.max_position_embeddings - self.own_positions
        if self.settings.max_length > room:
            raise XdscaleError(
                f"model.max_length = {self.settings.max_length}: {self.model} has {room} positions for a text"
            )
        self._tokenizer()
        encoder = f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}"
        if (pixels := self.settings.pixels) is not None:
            frozen = ", frozen before RoIAlign," if pixels.freeze else ""
            size = f"{pixels.short_side:,} × {pixels.long_side:,} pixels at most"
            encoder += f", with {self.trunk_words}{frozen} on {size}"
        trunk, pretrained = self._trunk_file(), self.settings.weights == "pretrained"
        return SubjectFacts(config.hidden_size, encoder, [*weight_files(folder), *trunk] if pretrained else None)

    def tokenizer(self) -> Tokenizer:
        """Returns that in the folder."""
        return self._tokenizer()[0]

    def notes(self) -> list[str]:
        """Returns a line where features are read, and are of another network than those of the model's training."""
        if self.regions is None or self.settings.pixels is not None:
            return []
        return notes_on_features(getattr(self._config(), "features_of", None), self.regions, self.model)

    def require_width(self, task: Task) -> None:
        """Checks that features, where a task's images are read so, are as wide as the model reads them.

        Raises:
            XdscaleError: they are not, with what to do.
        """
        if task.images and self.regions is not None and self.settings.pixels is None:
            require_width(self.regions, self._widths(), self.model, self._remedy)

    def _remedy(self) -> str:
        readable = self.regions.build.jpeg and (self._folder / self.own_trunk).is_file()
        return self._needed() + "; or have the images themselves read: model.pixels={}" * readable

    def _needed(self) -> str:
        """Says where the features come from that the model reads."""
        return of_same_network(getattr(self._config(), "features_of", None))

    @abstractmethod
    def _widths(self) -> Sequence[int]:
        """Returns how wide features may be, first how wide they are read."""

    def _trunk_file(self) -> list[Path]:
        """Returns the file of the branch's weights; none where features are read, or weights are random.

        Raises:
            XdscaleError: it is not there.
        """
        pixels = self.settings.pixels
        if pixels is None or pixels.weights == RANDOM:
            return []
        if pixels.weights is not None:
            path, hint = resolve_path(pixels.weights), f"expected a {self.trunk_like} under torchvision's names"
        else:
            path = self._folder / self.own_trunk
            hint = f"this model was pretrained on features; name a {self.trunk_like}: model.pixels.weights=FILE"
        if not path.is_file():
            raise XdscaleError(f"model.pixels: {path}: no such file; {hint}")
        return [path]

    @abstractmethod
    def _config(self) -> PretrainedConfig:
        """Reads the folder's config.json."""

    def _tokenizer(self) -> tuple[Tokenizer, LanguageTokenizer]:
        return tokenizer_of(self._folder, self.model, self._config().vocab_size)

    @property
    def _folder(self) -> Path:
        return resolve_path(self.model)
