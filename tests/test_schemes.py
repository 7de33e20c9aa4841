"""The quantization schemes: their numbers, and how their codes are packed."""

import dataclasses
import math

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import assert_same_bits
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.schemes import FLOAT, SCHEMES, Scheme

schemes = pytest.mark.parametrize("name", SCHEMES)

LEVELS = {
    "ternary": (-1, 0, 1),
    "ternary-median": (-1, 0, 1),
    "binary": (-1, 1),
    "2bit": (-3, -1, 1, 3),
    "sign": (-1, 0, 1),
}


def random_codes(name, rows, columns, seed=1):
    rng = np.random.default_rng(seed)
    return rng.choice(np.array(LEVELS[name], np.int8), (rows, columns))


# --- The numbers ----------------------------------------------------------------------------------


def test_schemes_are_those_of_the_oracle_and_the_settings():
    assert set(SCHEMES) == set(oracle.CODES) == set(LEVELS)
    assert FLOAT not in SCHEMES
    for name in (*SCHEMES, FLOAT):
        assert ModelConfig(scheme=name).scheme == name
    assert [name for name, scheme in SCHEMES.items() if not scheme.learns] == ["sign"]


@schemes
def test_levels_rise_and_fit_into_their_bits(name):
    assert SCHEMES[name].levels == LEVELS[name]
    assert SCHEMES[name].bits == oracle.BITS[name] == math.ceil(math.log2(len(LEVELS[name])))


def test_scheme_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCHEMES["binary"].factor = 2.0


def squared_error(name, factor):
    """The mean square of w - scale * code for normal w of deviation 1, scale = factor * mean |w|.

    By the midpoint rule over [0, 12] in steps of 1/10,000: sound to 1e-6 for a step function
    times a density.
    """
    w = (np.arange(120_000) + 0.5) / 10_000
    density = np.exp(-(w**2) / 2) * math.sqrt(2 / math.pi) / 10_000
    scale = factor * math.sqrt(2 / math.pi)
    codes = oracle.codes_of(w[None], [[scale]], name, "tensor")[0]
    return float(((w - scale * codes) ** 2 * density).sum())


@pytest.mark.parametrize("name", ["binary", "2bit"])
def test_scale_is_the_best_for_normal_weights(name):
    factor = SCHEMES[name].factor
    errors = {by: squared_error(name, factor * by) for by in (0.95, 0.98, 1.0, 1.02, 1.05)}
    assert min(errors, key=errors.get) == 1.0
    # 1 - 2 / pi of one bit, and 0.1188 of two (Max 1960, table II).
    expected = {"binary": 1 - 2 / math.pi, "2bit": 0.1188}[name]
    assert errors[1.0] == pytest.approx(expected, abs=1e-4)


# --- Packing --------------------------------------------------------------------------------------


@schemes
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 97, 129, 257])
def test_pack_is_the_oracles(rows, columns, name):
    codes = random_codes(name, rows, columns)
    packed = SCHEMES[name].pack(codes)
    assert_same_bits(packed, oracle.pack(codes, name))
    assert_same_bits(SCHEMES[name].unpack(packed, columns), codes)
    assert_same_bits(oracle.unpack(packed, name, columns), codes)


@schemes
@pytest.mark.parametrize("columns", [1, 3, 8, 13])
def test_pack_holds_every_level_at_every_place(name, columns):
    for level in LEVELS[name]:
        for column in range(columns):
            codes = random_codes(name, 2, columns)
            codes[1, column] = level
            assert_same_bits(SCHEMES[name].unpack(SCHEMES[name].pack(codes), columns), codes)
        assert_same_bits(
            SCHEMES[name].pack(np.full((2, columns), level, np.int8)),
            oracle.pack(np.full((2, columns), level, np.int8), name),
        )


@schemes
def test_unpack_reads_what_it_may_not_write(name):
    codes = random_codes(name, 3, 11)
    packed = SCHEMES[name].pack(codes)
    packed.flags.writeable = False
    assert_same_bits(SCHEMES[name].unpack(packed, 11), codes)


@pytest.mark.parametrize("name", ["ternary", "ternary-median", "sign"])
@pytest.mark.parametrize("column", range(6))
def test_unpack_rejects_the_code_three(name, column):
    packed = SCHEMES[name].pack(random_codes(name, 2, 6))
    packed[1, column // 4] |= 3 << 2 * (column % 4)
    with pytest.raises(ValueError, match="has the code 3, expected 0 to 2"):
        SCHEMES[name].unpack(packed, 6)


@pytest.mark.parametrize("name", ["binary", "2bit"])
def test_unpack_takes_every_byte_of_a_scheme_that_uses_all_codes(name):
    packed = np.arange(256, dtype=np.uint8)[:, None]
    columns = 8 // SCHEMES[name].bits
    codes = SCHEMES[name].unpack(packed, columns)
    assert_same_bits(codes, oracle.unpack(packed, name, columns))
    assert_same_bits(SCHEMES[name].pack(codes), packed)


def test_pack_knows_no_scheme_by_name():
    # Three levels in four bits, as none in the table has them.
    scheme = Scheme(False, 1.0, 1.0, 0, 1, 4)
    codes = np.array([[-1, 0, 1]], np.int8)
    assert scheme.pack(codes).tolist() == [[0x10, 0x02]]
    assert_same_bits(scheme.unpack(scheme.pack(codes), 3), codes)


@pytest.mark.parametrize(
    ("name", "code"), [("ternary", 2), ("binary", 0), ("2bit", 0), ("2bit", 5), ("2bit", -4)]
)
def test_pack_rejects_codes_of_other_schemes(name, code):
    with pytest.raises(ValueError, match=r"not one of \("):
        SCHEMES[name].pack(np.array([[1, code, -1]], np.int8))


@pytest.mark.parametrize(
    ("shape", "dtype", "cols"),
    [((2, 1), "u1", 5), ((2, 2), "u1", 4), ((2, 1), "u1", -2), ((2, 1), "i8", 4), ((2,), "u1", 4)],
)
def test_unpack_rejects_other_shapes(shape, dtype, cols):
    with pytest.raises(ValueError, match=r"does not hold"):
        SCHEMES["ternary"].unpack(np.zeros(shape, dtype), cols)


def test_unpack_rejects_unused_bits_that_are_set():
    with pytest.raises(ValueError, match="unused bits"):
        SCHEMES["ternary"].unpack(np.array([[0b01000000]], np.uint8), 3)
