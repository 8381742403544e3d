"""The random bits of attention dropout: one definition, bit-identical in PyTorch, in numpy and in Triton.

The bits are counter-based, so that forward, backward, every tile shape and every device see the same mask
without storing it. Each (seed, sample, head) has a stream key of 2 x 32 bits. One call turns the counter
`query * 65,536 + key // 4` of such a stream into a 32-bit word whose four bytes, lowest first, serve the keys
4g, 4g + 1, 4g + 2 and 4g + 3. A score is dropped where its byte is below the threshold. Counters repeat after
65,536 queries or 262,144 keys.

A word is `mix(counter * WEYL + key_0, key_1)`, modulo 2**32: a Weyl sequence, then two rounds of xor-shift and
multiplication (the "lowbias32" family of C. Wellons's hash-prospector: 16, 15, 15) with the second half of the
key between them. Fewer steps fail: without the Weyl factor or the last xor-shift, bytes of queries 16 apart
are dependent, and additions in place of the xors leave the whole sequence nearly linear (chi-squared tests of
byte pairs over 3 million words).
"""

import torch
import triton
import triton.language as tl

THRESHOLDS = 256
"""A rate is a multiple of 1 / 256."""
KEYS_PER_WORD = 4

STARTS = (0x1B873593, 0x4CF5AD43)  # two arbitrary odd constants: they tell the halves of the key apart
WEYL = 0x9E3779B1  # 2**32 divided by the golden ratio, made prime
MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)

START_0, START_1 = (tl.constexpr(start) for start in STARTS)
_TL_WEYL = tl.constexpr(WEYL)
_TL_MULTIPLIER_0, _TL_MULTIPLIER_1 = (tl.constexpr(multiplier) for multiplier in MULTIPLIERS)


def drop_threshold(dropout: float) -> int:
    """Returns how many of the 256 byte values mean "dropped": `dropout` rounded to 1 / 256, at most 255."""
    return min(round(dropout * THRESHOLDS), THRESHOLDS - 1)


def keep_rate(threshold: int) -> float:
    """Returns the share of scores that a threshold keeps, by which the kept ones are divided."""
    return 1.0 - threshold / THRESHOLDS


def check_dropout(dropout: float, seed: torch.Tensor | None, device: torch.device) -> None:
    """Refuses a rate outside of [0, 1), and a seed that is not int64 [1] on the device or is missing."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    if seed is None:
        if dropout:
            raise ValueError("seed must be an int64 tensor of shape [1] where dropout is not 0, not None")
        return
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be int64, not {seed.dtype}")
    if seed.shape != (1,) or seed.device != device:
        raise ValueError(f"seed must have the shape [1] on {device}, not {list(seed.shape)} on {seed.device}")


def stream_keys(seed: torch.Tensor, samples: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both halves of the key of every stream, int32 [samples, heads] each.

    Args:
        seed: int64 [1]; all 64 bits count.
        samples: number of samples.
        heads: number of heads.
    """
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)  # narrowing keeps the low 32 bits
    sample = torch.arange(samples, dtype=torch.int32, device=seed.device)[:, None]
    head = torch.arange(heads, dtype=torch.int32, device=seed.device)

    def half(start: int) -> torch.Tensor:
        state = torch.full((samples, heads), start, dtype=torch.int32, device=seed.device)
        for part in (low, high, sample, head):
            state = mix(state ^ part, 0) + start
        return state

    return half(STARTS[0]), half(STARTS[1])


def weyl(first_query: int, queries: int, groups: int, device: torch.device) -> torch.Tensor:
    """Returns `counter * WEYL` of some queries and the first `groups` groups of four keys, int32 [queries, groups]."""
    row = torch.arange(first_query, first_query + queries, dtype=torch.int32, device=device) << 16
    group = torch.arange(groups, dtype=torch.int32, device=device)
    return (row[:, None] + group).mul_(WEYL - (1 << 32))  # int32 cannot hold the unsigned form


def keep_mask(seed: torch.Tensor, sample: int, heads: int, queries: int, keys: int, threshold: int) -> torch.Tensor:
    """Returns which scores of one sample stay: bool [heads, queries, keys]. The definition in its readable form."""
    key_0, key_1 = (half[sample, :, None, None] for half in stream_keys(seed, sample + 1, heads))
    words = mix(key_0 + weyl(0, queries, -(-keys // KEYS_PER_WORD), seed.device), key_1)  # [heads, queries, groups]
    # Viewed as bytes, position k of a row belongs to key k: every host that PyTorch supports is little-endian.
    return words.view(torch.uint8)[:, :, :keys] >= threshold


def mix(words: torch.Tensor, key: torch.Tensor | int) -> torch.Tensor:
    """Returns int32 `words` mixed with `key`, modulo 2**32."""
    words = _xor_shift(words, 16) * MULTIPLIERS[0] + key
    return _xor_shift(_xor_shift(words, 15) * MULTIPLIERS[1], 15)


def _xor_shift(words: torch.Tensor, places: int) -> torch.Tensor:
    # int32 shifts copy the sign; the "and" makes the shift logical.
    return words ^ ((words >> places) & ((1 << (32 - places)) - 1))


@triton.jit
def _mix_tile(word, key):  # noqa: ANN001, ANN202
    word = (word ^ (word >> 16)) * _TL_MULTIPLIER_0 + key
    word = (word ^ (word >> 15)) * _TL_MULTIPLIER_1
    return word ^ (word >> 15)


@triton.jit
def stream_key_tile(SEED, sample, head, START: tl.constexpr):  # noqa: ANN001, ANN201
    """Returns one half of a stream's key, a uint32 scalar; `START` is `START_0` or `START_1`."""
    return seeded_stream_key_tile(seed_key_tile(SEED, START), sample, head, START)


@triton.jit
def seed_key_tile(SEED, START: tl.constexpr):  # noqa: ANN001, ANN201
    """Returns what all streams of a seed share of one half of their keys."""
    seed = tl.load(SEED)
    zero = (seed * 0).to(tl.uint32)
    state = _mix_tile(seed.to(tl.uint32) ^ START, zero) + START
    return _mix_tile(state ^ (seed >> 32).to(tl.uint32), zero) + START


@triton.jit
def seeded_stream_key_tile(state, sample, head, START: tl.constexpr):  # noqa: ANN001, ANN201
    """Returns one half of a stream's key; `state` is from `seed_key_tile`."""
    zero = state * 0
    state = _mix_tile(state ^ sample.to(tl.uint32), zero) + START
    return _mix_tile(state ^ head.to(tl.uint32), zero) + START


@triton.jit
def keep_tile(key_0, key_1, query, group, place, THRESHOLD: tl.constexpr):  # noqa: ANN001, ANN201
    """Returns which scores stay, for integer tensors that broadcast, in either orientation.

    Keys come as `group` = key // 4 and `place` = key % 4, each from what the caller knows of it: the compiler draws a
    word once for several scores of a thread only where it sees that they are of one group.
    """
    row = (query.to(tl.uint32) << 16) * _TL_WEYL + key_0
    word = _mix_tile(row + group.to(tl.uint32) * _TL_WEYL, key_1)
    # The wanted byte moves to the top, where the lower ones cannot change the comparison.
    return (word << (24 - place.to(tl.uint32) * 8)) >= (THRESHOLD << 24)
