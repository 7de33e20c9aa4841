"""The quantization schemes: which few values the weights of a matrix may have, and how they are
found.

Every scheme is one rule with other numbers in it. With ``m`` the mean or the median of |w| over
the weights that share a scale,

    scale = factor * m, rounded to float16
    code  = sign(w) * (outer where |w| > threshold * scale, else inner)

and the weight that counts is ``scale * code``. So a code is one of ``-outer``, ``-inner``,
``inner`` and ``outer``, and a scheme without ``inner`` has the 0.
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
        The scale over that.
    threshold : float
        Above so many scales a weight gets the outer code.
    inner, outer : int
        The codes' magnitudes.
    bits : int
        What a stored code takes.
    learns : bool
        Whether the codes follow latent float weights; else they are all there is.
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
        """The codes there are, in rising order."""
        return tuple(sorted({-self.outer, -self.inner, self.inner, self.outer}))

    def pack(self, codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
        """Pack the codes of a matrix, int8[R, C], into uint8[R, ceil(C bits / 8)].

        A code's place among the levels is what is stored, the first of a row in the lowest bits of
        its first byte; what a row leaves open is zeros.

        Raises
        ------
        ValueError
            If a code is none of the scheme's.
        """
        if not np.isin(codes, self.levels).all():
            raise ValueError(f"codes holds a number that is none of {self.levels}")
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
            If a stored code is none of the scheme's, or the shape is that of other columns.
        """
        self.check(packed, cols)
        shifts = np.arange(8 // self.bits, dtype=np.uint8) * np.uint8(self.bits)
        places = (packed[:, :, None] >> shifts) & np.uint8((1 << self.bits) - 1)
        places = places.reshape(packed.shape[0], -1)[:, :cols]
        codes: npt.NDArray[np.int8] = np.array(self.levels, np.int8)[places]
        return codes

    def check(self, packed: npt.NDArray[np.uint8], cols: int) -> None:
        """Raise ``ValueError`` for what ``pack`` does not make of a matrix of so many columns."""
        each = 8 // self.bits
        if packed.dtype != np.uint8 or cols < 1 or packed.shape[1:] != (-(-cols // each),):
            raise ValueError(
                f"packed is {packed.dtype}{list(packed.shape)}, which does not hold {cols} codes "
                "a row"
            )
        if cols % each and (packed[:, -1] >> np.uint8(cols % each * self.bits)).any():
            raise ValueError("what a row leaves open is not 0")
        if len(self.levels) < 1 << self.bits and (packed & packed >> np.uint8(1) & 0x55).any():
            raise ValueError(
                f"a packed weight has the code 3, expected 0 to {len(self.levels) - 1}"
            )


# ternary: BitNet b1.58 (arXiv 2402.17764, equations 1 to 3), round(clip(w / scale, -1, 1)).
# ternary-median: BitNet b1.58 Reloaded (arXiv 2407.09527, section 3.1).
# binary: XNOR-Net (arXiv 1603.05279, section 3.1), the sign times the mean magnitude.
# 2bit: the four levels -3, -1, 1, 3, half a step of the best uniform quantizer for a normal
#   distribution (Max 1960, table II: a step of 0.996 standard deviations, 1.248 mean magnitudes).
# sign: what the C program keeps, codes alone; see ``LegacyLLM.quantize`` for their scale.
SCHEMES = {
    "ternary": Scheme(False, 1.0, 0.5, 0, 1, 2),
    "ternary-median": Scheme(True, 1.0, 0.5, 0, 1, 2),
    "binary": Scheme(False, 1.0, 0.0, 1, 1, 1),
    "2bit": Scheme(False, 0.625, 2.0, 1, 3, 2),
    "sign": Scheme(False, 1.0, 0.0, 0, 1, 2, learns=False),
}

# No quantization: the twin that the others are measured against.
FLOAT = "float"
