"""Numbers in eight bits or one, for exchanges over a slow network.

Blocks of 256 consecutive numbers share a scale. In eight bits that is their largest magnitude over
127, and a number becomes the nearest whole multiple of it; in one bit it is the mean of their
magnitudes, and a number keeps its sign (Bernstein et al., arXiv 1802.04434, section 2). What a code
leaves out is added before the next one is made (error feedback; Seide et al., "1-Bit Stochastic
Gradient Descent", 2014, equation 3).
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

BLOCK = 256

# Numbers that are coded at a time, few enough for a cache.
_PIECE = 1 << 15

_Floats = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]


def coded_bytes(size: int, bits: int) -> int:
    """Return how many bytes the code of so many numbers has."""
    blocks = -(-size // BLOCK)
    return blocks * (4 + BLOCK * bits // 8)


def encode(values: _Floats, rest: _Floats, bits: int, code: _Bytes) -> None:
    """Write the code of some numbers, and keep what it leaves out.

    Parameters
    ----------
    values : float32[N]
    rest : float32[N]
        What the last code has left out, which is added; then what this one does.
    bits : {8, 1}
    code : uint8[coded_bytes(N, bits)]
        Written to.
    """

    def work(start: int, scales: _Floats, codes: _Bytes) -> None:
        own = slice(start, start + _PIECE)
        size = min(values.size - start, _PIECE)
        blocks = np.zeros((scales.size, BLOCK), np.float32)
        flat = blocks.reshape(-1)[:size]
        np.add(values[own], rest[own], out=flat)
        magnitudes = np.abs(blocks)
        if bits == 8:
            np.divide(magnitudes.max(axis=1), np.float32(127.0), out=scales)
            divisor = np.where(scales > 0.0, scales, np.float32(1.0))
            steps = np.rint(blocks / divisor[:, None])
            codes.view(np.int8)[:] = steps.astype(np.int8)
            steps *= scales[:, None]
        else:
            np.mean(magnitudes, axis=1, out=scales)
            # Zeros behind a last block are no numbers.
            scales[-1] *= np.float32(BLOCK / (size - BLOCK * (scales.size - 1)))
            codes[:] = np.packbits(blocks >= 0.0, axis=1)
            steps = np.where(blocks >= 0.0, scales[:, None], -scales[:, None])
        np.subtract(flat, steps.reshape(-1)[:size], out=rest[own])

    # What is not finite is found by the norm of what is decoded.
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        _in_pieces(values.size, bits, code, work)


def add_decoded(code: _Bytes, bits: int, values: _Floats) -> None:
    """Add the numbers of a code to others.

    Parameters
    ----------
    code : uint8[coded_bytes(N, bits)]
    bits : {8, 1}
    values : float32[N]
        Added to.
    """

    def work(start: int, scales: _Floats, codes: _Bytes) -> None:
        if bits == 8:
            steps = codes.view(np.int8) * scales[:, None]
        else:
            signs = np.unpackbits(codes, axis=1)
            steps = np.where(signs, scales[:, None], -scales[:, None])
        part = values[start : start + _PIECE]
        part += steps.reshape(-1)[: part.size]

    with np.errstate(invalid="ignore", over="ignore"):
        _in_pieces(values.size, bits, code, work)


def _in_pieces(
    size: int, bits: int, code: _Bytes, work: Callable[[int, _Floats, _Bytes], None]
) -> None:
    """Call a function for some blocks at a time: with their start, scales and codes."""
    blocks = -(-size // BLOCK)
    scales = code[: 4 * blocks].view(np.float32)
    codes = code[4 * blocks :].reshape(blocks, BLOCK * bits // 8)
    for start in range(0, size, _PIECE):
        own = slice(start // BLOCK, start // BLOCK + _PIECE // BLOCK)
        work(start, scales[own], codes[own])
