"""How the token streams of one packed-attention call are laid out, and what its dropout draws from."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """What the implementations of `packed_attention` share besides the tokens; checked by the caller.

    Attributes:
        query_offsets: int32 [samples + 1], where each sample's queries start; the last is their number.
        key_offsets: int32 [samples + 1].
        max_query: at least the largest number of queries of a sample.
        max_key: at least the largest number of keys of a sample.
        threshold: byte values out of 256 that mean "dropped"; 0 for no dropout.
        seed: int64 [1]; None only without dropout.
    """

    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    max_query: int
    max_key: int
    threshold: int
    seed: torch.Tensor | None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.query_offsets) - 1

    def scores(self, query: torch.Tensor, key: torch.Tensor) -> int:
        """Returns the pairs of a query and a key of one sample, for which offsets on the CPU are read.

        Of offsets without values it takes that each sample has as many queries as any other, or as many keys.
        """
        if self.query_offsets.is_meta or self.key_offsets.is_meta:
            return len(query) * len(key) // self.samples
        return int((self.query_offsets.diff().long() * self.key_offsets.diff()).sum())
