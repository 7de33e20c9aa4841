"""The one way the tests compare arrays, and the error bounds they compare within."""

import numpy as np

from helpers import oracle

# Unit roundoff of float32: the largest relative error of one correctly rounded operation.
UNIT_ROUNDOFF = 2.0**-24


def gamma(n):
    """Relative bound on n float32 roundings in a row (Higham 2002, lemma 3.1)."""
    return n * UNIT_ROUNDOFF / (1.0 - n * UNIT_ROUNDOFF)


def dot_bound(absolute_products_sum, n):
    """Absolute bound on a float32 dot product of n terms, whatever the order of summation.

    Parameters
    ----------
    absolute_products_sum : float or array
        ``sum |a_i b_i|``, computed more precisely than float32.
    n : int
        Roundings a product can go through: the number of terms, and one for each further
        operation on the sum, such as a scale.
    """
    return gamma(n) * np.asarray(absolute_products_sum, dtype=np.float64)


def _check_shape(actual, expected, what):
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}shape {actual.shape}, expected {expected.shape}")


def _check_dtype(actual, dtype, what):
    if actual.dtype != dtype:
        raise AssertionError(f"{what}dtype {actual.dtype}, expected {np.dtype(dtype)}")


def assert_close(actual, expected, *, rtol, atol, what="", dtype=None):
    """Fail unless ``|actual - expected| <= atol + rtol * |expected|`` everywhere.

    Parameters
    ----------
    actual, expected : array_like
        Of the same shape. NaN and infinities must stand at the same places in both.
    rtol, atol : float or array
        Arrays give every element a tolerance of its own.
    what : str
        Opens the message.
    dtype : dtype, optional
        The dtype that ``actual`` must have.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    prefix = f"{what}: " if what else ""
    _check_shape(actual, expected, prefix)
    if dtype is not None:
        _check_dtype(actual, dtype, prefix)
    if actual.size == 0:
        return
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(e)
    same = (a == e) | (np.isnan(a) & np.isnan(e))
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(same, 0.0, np.where(finite, np.abs(a - e), np.inf))
        tolerance = np.broadcast_to(atol + rtol * np.where(np.isfinite(e), np.abs(e), 0.0), e.shape)
        units = np.where(error == 0.0, 0.0, error / tolerance)
    # Written so that a tolerance of NaN fails.
    bad = ~(error <= tolerance)
    if bad.any():
        index = np.unravel_index(np.argmax(np.where(bad, units, -1.0)), units.shape)
        raise AssertionError(
            f"{prefix}{int(bad.sum())} of {bad.size} elements differ; worst at "
            f"{tuple(int(i) for i in index)}: {float(a[index])!r}, expected {float(e[index])!r}, "
            f"error {error[index]:.3g} = {units[index]:.4g} x the tolerance of "
            f"{tolerance[index]:.3g}"
        )


def assert_same_bits(actual, expected, what=""):
    """Fail unless both have the same dtype, shape and bits: NaN equals NaN, 0.0 is not -0.0."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    prefix = f"{what}: " if what else ""
    _check_shape(actual, expected, prefix)
    _check_dtype(actual, expected.dtype, prefix)
    size = actual.dtype.itemsize
    a, e = (
        np.frombuffer(array.tobytes(), dtype=np.uint8).reshape(-1, size)
        for array in (actual, expected)
    )
    different = (a != e).any(axis=1)
    if different.any():
        first = int(np.argmax(different))
        index = tuple(int(i) for i in np.unravel_index(first, actual.shape))
        raise AssertionError(
            f"{prefix}{int(different.sum())} of {different.size} elements differ in their bits; "
            f"first at {index}: {actual[index]!r} (0x{a[first, ::-1].tobytes().hex()}), "
            f"expected {expected[index]!r} (0x{e[first, ::-1].tobytes().hex()})"
        )


# The vectorised exponential: two units in the last place, above and below the smallest normal.
EXP_RTOL, EXP_ATOL = 4 * UNIT_ROUNDOFF, 2.0**-148


def softmax_rtol(x):
    """Relative error bound of a float32 softmax of the rows of x [..., N].

    With d = x - max, rounding d gives an error of |d| u in exp(d), to which exp adds its own. The
    sum's error is the mean of those, weighted by the probabilities, and n roundings; the division
    adds two at most.
    """
    difference = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        exponential = np.where(
            np.isfinite(difference), np.abs(difference) * UNIT_ROUNDOFF + EXP_RTOL, 0.0
        )
    total = (oracle.softmax(x) * exponential).sum(axis=-1, keepdims=True)
    # One part in a hundred for the products of these errors.
    return 1.01 * (exponential + total + gamma(x.shape[-1] + 2))
