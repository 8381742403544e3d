"""Token streams without padding: which rows belong to which sample."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Stream:
    """Tokens of several samples in one row.

    Attributes:
        offsets: int32 [samples + 1], sample b owns rows `offsets[b]` to `offsets[b + 1] - 1`.
        longest: at least the largest number of tokens of a sample; kernels launch programs for so many.
    """

    offsets: torch.Tensor
    longest: int

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.offsets) - 1


def stream_of(lengths: torch.Tensor, longest: int) -> Stream:
    """Returns the stream of samples of some lengths.

    Args:
        lengths: int64 [samples].
        longest: at least the largest of them. It is asked for because a GPU's lengths are not to be read.
    """
    return Stream(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), longest)


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
    return Stream(torch.searchsorted(rows, bounds).to(torch.int32), min(stream.longest, len(rows)))


def unpack(tokens: torch.Tensor, positions: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Returns tokens [n, size] at their positions in [batch, positions, size], zeros elsewhere."""
    padded = tokens.new_zeros(shape[0] * shape[1], tokens.shape[-1])
    return padded.index_copy(0, positions, tokens).view(*shape, -1)
