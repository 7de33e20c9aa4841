"""The quantization schemes: the values that the weights of a matrix may have, and their rule.

Every scheme is the same rule with other numbers. With ``m`` the mean or the median of |w| over the
weights that share a scale,

    scale = factor * m, rounded to float16
    code  = sign(w) * (outer where |w| > threshold * scale, else inner)

and the quantized weight is ``scale * code``. A code is one of ``-outer``, ``-inner``, ``inner`` and
``outer``; with ``inner`` 0 it may be 0.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Scheme:
    """The numbers of one quantization scheme.

    Attributes
    ----------
    median : bool
        Whether the scale follows the median of |w| rather than its mean.
    factor : float
        The scale over that mean or median.
    threshold : float
        A weight above this many scales gets the outer code.
    inner, outer : int
        The codes' magnitudes.
    bits : int
        Bits of a stored code.
    learns : bool
        Whether the codes follow latent float weights, or are the only weights.
    """

    median: bool
    factor: float
    threshold: float
    inner: int
    outer: int
    bits: int
    learns: bool = True

    @property
    def levels(self) -> tuple[int, ...]:
        """All codes, in rising order."""
        return tuple(sorted({-self.outer, -self.inner, self.inner, self.outer}))

    def pack(self, codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
        """Pack the codes of a matrix, int8[R, C], into uint8[R, ceil(C bits / 8)].

        The index of each code among the levels is stored, the first of a row in the lowest bits of
        its first byte; unused bits of a row's last byte are zeros.

        Raises
        ------
        ValueError
            If a code is not one of the scheme's.
        """
        if not np.isin(codes, self.levels).all():
            raise ValueError(f"codes holds a number that is not one of {self.levels}")
        rows, cols = codes.shape
        each = 8 // self.bits
        places = np.zeros((rows, -(-cols // each) * each), np.uint8)
        places[:, :cols] = np.searchsorted(self.levels, codes)
        shifts = np.arange(each, dtype=np.uint8) * np.uint8(self.bits)
        packed = places.reshape(rows, -1, each) << shifts
        joined: npt.NDArray[np.uint8] = np.bitwise_or.reduce(packed, axis=2)
        return joined

    def unpack(self, packed: npt.NDArray[np.uint8], cols: int) -> npt.NDArray[np.int8]:
        """Undo ``pack``: int8[R, cols].

        Raises
        ------
        ValueError
            If a stored code is not one of the scheme's, or the shape does not fit ``cols``.
        """
        self.check(packed, cols)
        shifts = np.arange(8 // self.bits, dtype=np.uint8) * np.uint8(self.bits)
        places = (packed[:, :, None] >> shifts) & np.uint8((1 << self.bits) - 1)
        places = places.reshape(packed.shape[0], -1)[:, :cols]
        codes: npt.NDArray[np.int8] = np.array(self.levels, np.int8)[places]
        return codes

    def check(self, packed: npt.NDArray[np.uint8], cols: int) -> None:
        """Raise ``ValueError`` unless ``pack`` can have packed a matrix of ``cols`` columns."""
        each = 8 // self.bits
        if packed.dtype != np.uint8 or cols < 1 or packed.shape[1:] != (-(-cols // each),):
            raise ValueError(
                f"packed is {packed.dtype}{list(packed.shape)}, which does not hold {cols} codes "
                "per row"
            )
        if cols % each and (packed[:, -1] >> np.uint8(cols % each * self.bits)).any():
            raise ValueError("the unused bits of a row are not 0")
        if len(self.levels) == 1 << self.bits:
            return
        step = max((1 << 18) // packed.shape[1], 1)
        for first in range(0, len(packed), step):
            # Some rows at a time, to keep temporary arrays in the cache.
            here = packed[first : first + step]
            if (here & here >> np.uint8(1) & 0x55).any():
                raise ValueError(
                    f"a packed weight has the code 3, expected 0 to {len(self.levels) - 1}"
                )


# ternary: BitNet b1.58 (arXiv 2402.17764, equations 1 to 3), round(clip(w / scale, -1, 1)).
# ternary-median: BitNet b1.58 Reloaded (arXiv 2407.09527, section 3.1).
# binary: XNOR-Net (arXiv 1603.05279, section 3.1), the sign times the mean magnitude.
# 2bit: the four levels -3, -1, 1, 3, half a step of the best uniform quantizer for a normal
#   distribution (Max 1960, table II: a step of 0.996 standard deviations, 1.248 mean magnitudes).
# sign: the C program's, codes without latent weights; see ``LegacyLLM.quantize`` for their scale.
SCHEMES = {
    "ternary": Scheme(False, 1.0, 0.5, 0, 1, 2),
    "ternary-median": Scheme(True, 1.0, 0.5, 0, 1, 2),
    "binary": Scheme(False, 1.0, 0.0, 1, 1, 1),
    "2bit": Scheme(False, 0.625, 2.0, 1, 3, 2),
    "sign": Scheme(False, 1.0, 0.0, 0, 1, 2, learns=False),
}

# No quantization: the baseline of the others.
FLOAT = "float"
