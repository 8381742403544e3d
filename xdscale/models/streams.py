"""Token streams without padding: which rows belong to which sample."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Stream:
    """Tokens of several samples in one row.

    Attributes:
        offsets: int32 [samples + 1], sample b owns rows `offsets[b]` to `offsets[b + 1] - 1`.
        longest: at least the largest number of tokens of a sample.
    """

    offsets: torch.Tensor
    longest: int

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.offsets) - 1


def stream_of(mask: torch.Tensor) -> tuple[Stream, torch.Tensor]:
    """Returns the stream of the valid positions, and where they stand.

    Args:
        mask: bool [batch, positions].

    Returns:
        The stream, and int64 [tokens], indices into batch * positions in order.
    """
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Stream(offsets, mask.shape[1]), mask.flatten().nonzero().squeeze(1)


def full_stream(batch: int, length: int, device: torch.device) -> Stream:
    """Returns the stream of samples of equal length, which needs no packing."""
    return Stream(torch.arange(batch + 1, dtype=torch.int32, device=device) * length, length)


def rows_of_samples(rows: torch.Tensor, stream: Stream) -> Stream:
    """Returns the stream of some rows of another stream.

    Args:
        rows: int64 [n], ascending rows of `stream`.
        stream: whose rows they are.
    """
    bounds = stream.offsets.to(torch.int64)
    return Stream(torch.searchsorted(rows, bounds).to(torch.int32), stream.longest)


def unpack(tokens: torch.Tensor, positions: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Returns tokens [n, size] at their positions in [batch, positions, size], zeros elsewhere."""
    padded = tokens.new_zeros(shape[0] * shape[1], tokens.shape[-1])
    return padded.index_copy(0, positions, tokens).view(*shape, -1)
