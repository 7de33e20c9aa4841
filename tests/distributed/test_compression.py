"""Codes of eight bits and one, against float64."""

import numpy as np
import pytest

from helpers.arrays import assert_close, assert_same_bits
from legacy1bit.distributed.compression import add_decoded, coded_bytes, encode

BLOCK = 256

SIZES = (1, 7, 255, 256, 257, 1000, 32768, 32769, 70000)


def decoded(code, size, bits):
    values = np.zeros(size, np.float32)
    add_decoded(code, bits, values)
    return values


def exact(values, bits):
    """What is left of numbers in eight bits or one, in float64, and the scale of each."""
    left, scales = np.zeros(values.size), np.zeros(values.size)
    for start in range(0, values.size, BLOCK):
        own = slice(start, start + BLOCK)
        block = values[own].astype(float)
        if bits == 8:
            scale = np.abs(block).max() / 127
            left[own] = scale * np.rint(block / scale) if scale else 0.0
        else:
            scale = np.abs(block).mean()
            left[own] = np.where(block >= 0, scale, -scale)
        scales[own] = scale
    return left, scales


@pytest.mark.parametrize("bits", [8, 1])
@pytest.mark.parametrize("size", SIZES)
def test_codes_are_the_nearest_steps_or_signs(bits, size):
    rng = np.random.default_rng(size)
    values = (rng.normal(size=size) * 10.0 ** rng.integers(-8, 3, size)).astype(np.float32)
    values[::5] = 0.0
    rest, code = np.zeros(size, np.float32), np.zeros(coded_bytes(size, bits), np.uint8)
    encode(values, rest, bits, code, threads=2)
    left, scales = exact(values, bits)
    actual = decoded(code, size, bits)
    if bits == 8:
        # In the middle between two steps either is right.
        assert (np.abs(actual - values) <= scales * (0.5 + 1e-4)).all()
        assert (np.abs(actual - left) <= scales * 1.001).all()
        assert np.mean(np.abs(actual - left) > 1e-4 * scales) < 0.001
    else:
        assert_close(actual, left, rtol=1e-5, atol=0)
    assert_same_bits(rest, (values - actual).astype(np.float32))


def test_sizes_that_do_not_fit_are_refused():
    values, code = np.zeros(300, np.float32), np.zeros(coded_bytes(300, 8), np.uint8)
    with pytest.raises(ValueError, match="bits is 4, expected 8 or 1"):
        encode(values, values.copy(), 4, code)
    with pytest.raises(ValueError, match="code has 519 bytes, expected 520"):
        add_decoded(code[1:], 8, values)
    with pytest.raises(ValueError, match="rest has 299 numbers, expected 300"):
        encode(values, values[1:].copy(), 8, code)


@pytest.mark.parametrize("bits", [8, 1])
def test_what_a_code_leaves_out_comes_with_the_next_ones(bits):
    rng = np.random.default_rng(0)
    rest, sent, meant = np.zeros(300, np.float32), np.zeros(300), np.zeros(300)
    code = np.zeros(coded_bytes(300, bits), np.uint8)
    for _ in range(50):
        values = rng.normal(0.1, 1.0, 300).astype(np.float32)
        encode(values, rest, bits, code)
        sent += decoded(code, 300, bits)
        meant += values
    assert_close(sent + rest, meant, rtol=0, atol=1e-4)
    # Without the feedback, signs alone would be far off.
    assert np.abs(rest).max() < (0.03 if bits == 8 else 30.0)


@pytest.mark.parametrize("bits", [8, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_stays_noticed(bits, bad):
    values = np.ones(600, np.float32)
    values[300] = bad
    rest, code = np.zeros(600, np.float32), np.zeros(coded_bytes(600, bits), np.uint8)
    encode(values, rest, bits, code)
    assert not np.isfinite(decoded(code, 600, bits)).all()
