"""Packed tokens: those of several samples in one row, without padding; which of them belong to which sample."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedTokens:
    """How the tokens of several samples lie one after the other.

    Attributes:
        cu_seqlens: int32 [samples + 1]; sample b owns the tokens `cu_seqlens[b]` to `cu_seqlens[b + 1] - 1`.
        max_seqlen: at least the largest number of tokens of a sample; kernels launch programs for so many.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.cu_seqlens) - 1


def packed_by_lengths(lengths: torch.Tensor, max_seqlen: int) -> PackedTokens:
    """Returns how samples of some lengths are packed.

    Args:
        lengths: int64 [samples].
        max_seqlen: at least the largest of them. It is asked for because a GPU's lengths are not to be read.
    """
    return PackedTokens(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), max_seqlen)


def packed_evenly(batch: int, length: int, device: torch.device) -> PackedTokens:
    """Returns how samples of equal length are packed: as they are, [batch, length] seen as one row."""
    return PackedTokens(torch.arange(batch + 1, dtype=torch.int32, device=device) * length, length)


def chosen_tokens(chosen: torch.Tensor, packed: PackedTokens) -> PackedTokens:
    """Returns how some of the packed tokens are packed when the others are left out.

    Args:
        chosen: int64 [n], ascending places in the row.
        packed: all tokens.
    """
    bounds = packed.cu_seqlens.to(torch.int64)
    return PackedTokens(torch.searchsorted(chosen, bounds).to(torch.int32), min(packed.max_seqlen, len(chosen)))


def unpack(tokens: torch.Tensor, positions: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Returns tokens [n, size] at their positions in [batch, positions, size], zeros elsewhere."""
    padded = tokens.new_zeros(shape[0] * shape[1], tokens.shape[-1])
    return padded.index_copy(0, positions, tokens).view(*shape, -1)
