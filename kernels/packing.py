"""How the tokens of one packed-attention call are laid out, and what its dropout draws from."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """What the implementations of `packed_attention` share besides the tokens; checked by the caller.

    Attributes:
        cu_seqlens_q: int32 [samples + 1], where each sample's queries start; the last is their number.
        cu_seqlens_k: int32 [samples + 1].
        max_seqlen_q: at least the largest number of queries of a sample.
        max_seqlen_k: at least the largest number of keys of a sample.
        threshold: byte values out of 256 that mean "dropped"; 0 for no dropout.
        seed: int64 [1]; None only without dropout.
        causal: whether a query reads only the keys up to its own place; then both sides are the same tokens.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    threshold: int
    seed: torch.Tensor | None
    causal: bool = False

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.cu_seqlens_q) - 1

    def scores(self, query: torch.Tensor, key: torch.Tensor) -> int:
        """Returns the number of pairs of a query and a key of one sample.

        Where `cu_seqlens` has no values, every sample has the mean numbers of queries and keys.
        """
        if self.cu_seqlens_q.is_meta or self.cu_seqlens_k.is_meta:
            return len(query) * len(key) // self.samples
        return int((self.cu_seqlens_q.diff().long() * self.cu_seqlens_k.diff()).sum())
