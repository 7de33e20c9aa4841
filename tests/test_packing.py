"""Codes of files in tiles and as int8, in each layout, and scales of blocks."""

import functools
import math
import mmap
from pathlib import Path

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import assert_same_bits
from helpers.cases import together
from helpers.fabricated import BLOCKS, blocks_of, runs_of, write_gguf_model
from helpers.fabricated import shapes_of as shapes_of_model
from helpers.models import run_child
from legacy1bit.packing import (
    LAYOUTS,
    Tiles,
    Values,
    block_scales,
    merge_scales,
    read_floats,
    stored_size,
)
from legacy1bit.schemes import SCHEMES
from legacy1bit.system.files import release

TERNARY = (-1, 0, 1)
FORMS = {"2bit": 16, "trits": 20}
# What the columns of each layout are a multiple of, and the rows.
MULTIPLES = {
    **{name: (BLOCKS[name][1], 1) for name in LAYOUTS if name in BLOCKS},
    **{"I2_S": (1, 1), "1 bit": (1, 1), "2 bits": (1, 1), "quarters": (1, 4), "int8": (1, 1)},
}
# Rows and columns: a single one, ends of strips, and widths around tiles, bytes and blocks.
ROWS = (1, 4, 31, 32, 33, 64, 76)
COLS = (1, 2, 3, 7, 16, 20, 33, 64, 127, 128, 300, 512)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def shapes_of(layout):
    """Shapes that a layout can have."""
    col, row = MULTIPLES[layout]
    shapes = [(r, c) for r in ROWS for c in COLS if r % row == 0 and c % col == 0]
    if layout == "I2_S":
        # Whole runs, which go on over the ends of rows.
        shapes = [(r, c) for r, c in shapes if r * c % 128 == 0]
    assert len(shapes) > 6
    return shapes


def levels_of(layout):
    return (-1, 1) if layout == "1 bit" else TERNARY


def random_codes(layout, shape):
    return np.random.default_rng(shape).choice(levels_of(layout), shape).astype(np.int8)


def stored(layout, codes, scales=1.0):
    """A matrix of codes as it lies in a file; scales for each weight."""
    rows, cols = codes.shape
    if layout in BLOCKS:
        wide = np.broadcast_to(np.float32(scales), codes.shape)
        return np.frombuffer(blocks_of(layout, codes, wide), np.uint8)
    if layout == "I2_S":
        return np.frombuffer(runs_of(codes, 1.0)[:-32], np.uint8)
    if layout == "int8":
        return codes.view(np.uint8).reshape(-1)
    if layout == "quarters":
        quarters = (codes + 1).astype(np.uint8).reshape(4, rows // 4, cols)
        return sum(quarters[i] << np.uint8(2 * i) for i in range(4)).reshape(-1)
    bits = 1 if layout == "1 bit" else 2
    places = np.searchsorted(levels_of(layout), codes).astype(np.uint8)
    each = 8 // bits
    places = np.pad(places, ((0, 0), (0, -cols % each))).reshape(rows, -1, each)
    return np.sum(places << bits * np.arange(each), axis=2).astype(np.uint8).reshape(-1)


@functools.cache
def expected_tiles(levels, shape, form):
    codes = np.random.default_rng(shape).choice(levels, shape)
    return oracle.tiles(np.searchsorted(levels, codes), form)


def tiles_of(layout, data, shape, form, threads=1, places=None, levels=TERNARY):
    """The tiles, from a buffer of other bytes."""
    rows, cols = shape
    array = np.full((-(-rows // 32), -(-cols // FORMS[form]), 128), 255, np.uint8)
    target = Tiles(array, shape, levels, form == "trits", threads)
    target.write(layout, data, rows, np.arange(rows) if places is None else places)
    return array


def values_of(layout, data, shape, threads=1, places=None, levels=TERNARY):
    array = np.full(shape, 99, np.int8)
    order = np.arange(len(array)) if places is None else places
    Values(array, levels, threads).write(layout, data, len(array), order)
    return array


# --- Codes ----------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("form", FORMS)
def test_tiles_are_those_of_the_codes(layout, form):
    for shape in shapes_of(layout):
        data = stored(layout, random_codes(layout, shape))
        actual = tiles_of(layout, data, shape, form, levels=levels_of(layout))
        assert_same_bits(actual, expected_tiles(levels_of(layout), shape, form), f"{shape}")


@layouts
def test_values_are_the_codes(layout):
    for shape in shapes_of(layout):
        codes = random_codes(layout, shape)
        actual = values_of(layout, stored(layout, codes), shape, levels=levels_of(layout))
        assert_same_bits(actual, codes, f"{shape}")


@layouts
@together("threads", [1, 2, 3, 5])
def test_rows_go_where_they_belong_on_any_number_of_threads(layout, threads):
    shape = (shapes_of(layout)[-1][0] // 4 * 4, 512)
    codes = random_codes(layout, shape)
    order = np.random.default_rng(threads).permutation(shape[0])
    levels = levels_of(layout)
    ours = np.empty_like(codes)
    ours[order] = codes
    data = stored(layout, codes)
    assert_same_bits(values_of(layout, data, shape, threads, order, levels), ours)
    for form in FORMS:
        actual = tiles_of(layout, data, shape, form, threads, order, levels)
        assert_same_bits(actual, oracle.tiles(np.searchsorted(levels, ours), form))


@layouts
def test_rows_can_be_written_a_few_at_a_time(layout):
    shape = (76, 512)
    codes = random_codes(layout, shape)
    data, levels = stored(layout, codes), levels_of(layout)
    array = np.full((3, 32, 128), 255, np.uint8)
    values = np.full(shape, 99, np.int8)
    targets = Tiles(array, shape, levels), Values(values, levels)
    for first, last in ((70, 76), (0, 1), (1, 40), (40, 70)):
        for target in targets:
            target.write(layout, data, 76, np.arange(first, last), first)
    assert_same_bits(values, codes)
    assert_same_bits(array, expected_tiles(levels, shape, "2bit"))


@pytest.mark.parametrize("form", FORMS)
def test_codes_of_schemes_of_other_levels(form):
    rng = np.random.default_rng(3)
    for scheme in ("binary", "2bit", "ternary"):
        levels = SCHEMES[scheme].levels
        if form == "trits" and len(levels) > 3:
            continue
        codes = rng.choice(levels, (35, 77)).astype(np.int8)
        data = SCHEMES[scheme].pack(codes).reshape(-1)
        layout = "1 bit" if scheme == "binary" else "2 bits"
        expected = oracle.tiles(np.searchsorted(levels, codes), form)
        for name, bytes_of in ((layout, data), ("int8", codes.view(np.uint8).reshape(-1))):
            actual = tiles_of(name, bytes_of, codes.shape, form, levels=levels)
            assert_same_bits(actual, expected)
            assert_same_bits(values_of(name, bytes_of, codes.shape, levels=levels), codes)


@pytest.mark.parametrize("layout", ["TQ1_0", "PTQ1_0"])
def test_every_byte_of_trits_has_five_digits(layout):
    """Also those that no writer makes: the digit is three times the byte, as a fraction."""
    first = 32 if layout == "TQ1_0" else 16
    for start in range(0, 256, first):
        block = np.ones(BLOCKS[layout][2], np.uint8)
        block[:first] = np.arange(start, start + first)
        expected = []
        for power in (1, 3, 9, 27, 81):
            expected += [3 * (int(byte) * power % 256) // 256 - 1 for byte in block[:first]]
        actual = values_of(layout, block, (1, BLOCKS[layout][1]))
        assert actual[0, : 5 * first].tolist() == expected


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name in BLOCKS])
def test_blocks_of_scale_zero_are_zeros(layout):
    shape = (33, 2 * BLOCKS[layout][1])
    codes = random_codes(layout, shape)
    for zero in (0.0, -0.0):
        scales = np.ones(shape, np.float32)
        scales[5, : shape[1] // 2] = scales[32, shape[1] // 2 :] = zero
        expected = np.where(scales == 0, 0, codes).astype(np.int8)
        data = stored(layout, codes, scales)
        assert_same_bits(values_of(layout, data, shape), expected)
        assert_same_bits(tiles_of(layout, data, shape, "2bit"), oracle.tiles(expected + 1, "2bit"))


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if "TQ1" not in name and name != "1 bit"]
)
def test_code_3_is_refused_wherever_it_is(layout):
    shape = (36, 512)
    scales = np.ones(shape, np.float32)
    # Also where the scale makes zeros of it.
    scales[7] = 0.0
    for row, col in ((0, 0), (7, 100), (31, 511), (32, 1), (35, 254), (35, 511)):
        codes = random_codes(layout, shape)
        codes[row, col] = 2
        data = stored(layout, codes, scales)
        message = "other than -1, 0 and 1" if layout == "int8" else "has a weight of code 3, and"
        for threads in (1, 2):
            with pytest.raises(ValueError, match=message):
                values_of(layout, data, shape, threads)
            for form in FORMS:
                with pytest.raises(ValueError, match=message):
                    tiles_of(layout, data, shape, form, threads)


@layouts
def test_data_that_is_too_short_is_refused(layout):
    shape = (4, 512)
    data = stored(layout, random_codes(layout, shape))
    assert data.size == stored_size(layout, *shape)
    with pytest.raises(ValueError, match=f"has {data.size - 1} bytes, expected {data.size}"):
        values_of(layout, data[:-1], shape)
    for order, first in (([0], 4), ([0, 1], 3), ([0], -1), ([], 0)):
        with pytest.raises(ValueError, match="has 4 rows, expected"):
            Values(np.empty(shape, np.int8), levels_of(layout)).write(
                layout, data, 4, np.array(order, np.intp), first
            )
    for order in ([4], [0, -1]):
        with pytest.raises(ValueError, match="places holds a row that is not one of 4"):
            values_of(layout, data, shape, places=np.array(order))


def test_quarters_of_other_rows_are_refused():
    for rows in (1, 3, 5):
        with pytest.raises(ValueError, match=f"has {rows} rows, expected a multiple of 4"):
            values_of("quarters", np.zeros(99, np.uint8), (rows, 8))


def test_tiles_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"array has shape \(1, 2, 128\), expected \(2, 2, 128\)"):
        Tiles(np.empty((1, 2, 128), np.uint8), (33, 17), TERNARY)


# --- Scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name in BLOCKS])
def test_scales_are_every_number_of_float16(layout):
    halves = np.arange(1 << 16, dtype=np.uint16).view("<f2")
    length = BLOCKS[layout][2]
    blocks = np.zeros((len(halves), length), np.uint8)
    at = {"TQ1_0": 52, "TQ2_0": 64, "PTQ1_0": 26}.get(layout, 0)
    blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    actual = block_scales(layout, blocks.reshape(-1))
    expected = halves.astype(np.float32)
    np.testing.assert_array_equal(actual, expected)
    assert_same_bits(np.signbit(actual), np.signbit(expected))
    with pytest.raises(ValueError, match="expected blocks of"):
        block_scales(layout, blocks.reshape(-1)[:-1])


def merged(scales, each):
    """The one number other than 0 of each part of a row, looked for one by one."""
    rows = []
    for row in scales:
        rows.append([])
        for first in range(0, len(row), each):
            numbers = {number for number in row[first : first + each].tolist() if number}
            if len(numbers) > 1:
                return None
            rows[-1].append(numbers.pop() if numbers else 0.0)
    return np.array(rows, np.float32)


def test_scales_are_merged_where_they_are_the_same():
    rng, found = np.random.default_rng(4), 0
    for _ in range(500):
        rows, groups, each = rng.integers(1, 7, 3)
        scales = rng.choice(np.float32([-0.5, 2.0]), (rows, -(-groups // each)), p=[0.1, 0.9])
        scales = np.repeat(scales, each, axis=1)[:, :groups]
        scales[rng.random(scales.shape) < 0.3] = rng.choice([0.0, -0.0])
        scales[rng.random(scales.shape) < 0.05] = 3.0
        expected, actual = merged(scales, int(each)), merge_scales(scales.copy(), int(each))
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert_same_bits(actual, expected)
            found += 1
    assert 100 < found < 490


# --- Memory ---------------------------------------------------------------------------------------


def every_number(kind):
    """All numbers of two bytes, or of four those around each of them: bytes, and float64."""
    upper = np.arange(1 << 16, dtype="<u4")
    if kind == "F16":
        sign, exponent, fraction = upper >> 15, (upper >> 10 & 31).astype(int), upper & 0x3FF
        size = np.where(
            exponent == 0, fraction * 2.0**-24, (fraction + 1024.0) * 2.0 ** (exponent - 25)
        )
        size[exponent == 31] = np.inf
        return upper.astype("<u2").view(np.uint8), np.where(sign, -size, size)
    if kind == "BF16":
        bits, raw = upper << 16, upper.astype("<u2")
    else:
        bits = raw = (upper[:, None] << 16 | np.array([0, 1, 0xFFFF], "<u4")).ravel()
    sign, exponent, fraction = bits >> 31, (bits >> 23 & 255).astype(int), bits & 0x7FFFFF
    size = np.where(exponent == 0, fraction * 2.0**-149,
                    (fraction + 2.0**23) * 2.0 ** np.maximum(exponent - 150.0, -149))  # fmt: skip
    size[exponent == 255] = np.inf
    return raw.view(np.uint8), np.where(sign, -size, size)


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_floats_are_read_exactly(kind):
    data, expected = every_number(kind)
    finite = np.isfinite(expected)
    rows = data.reshape(len(expected), -1)
    expected = expected[finite].astype(np.float32)
    assert_same_bits(read_floats(kind, rows[finite].reshape(-1)), expected)
    # Places that are no multiple of a number's size, and counts that are none of a vector's lanes.
    moved = np.concatenate([np.zeros(1, np.uint8), rows[finite].reshape(-1)])
    for count in (1, 2, 3, 5, 8, 13, 100):
        first = moved[1 : 1 + count * rows.shape[1]]
        assert_same_bits(read_floats(kind, first), expected[:count])


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_floats_that_are_not_finite_are_refused(kind):
    data, expected = every_number(kind)
    rows = data.reshape(len(expected), -1)
    wrong = rows[~np.isfinite(expected)]
    assert len(wrong) == {"F16": 2048, "BF16": 256, "F32": 768}[kind]
    for row in wrong[:: max(len(wrong) // 100, 1)]:
        for place in (0, 5, 18):
            numbers = np.zeros((19, len(row)), np.uint8)
            numbers[place] = row
            with pytest.raises(ValueError, match="holds a number that is not finite"):
                read_floats(kind, numbers.reshape(-1))


@pytest.mark.parametrize(("kind", "size"), [("F16", 3), ("BF16", 0), ("F32", 6)])
def test_floats_of_another_size_are_refused(kind, size):
    with pytest.raises(ValueError, match=f"data has {size} bytes, expected numbers of [24]"):
        read_floats(kind, np.zeros(size, np.uint8))


def test_released_arrays_are_as_they_were(tmp_path):
    content = np.random.default_rng(5).integers(0, 256, 100_000).astype(np.uint8)
    path = tmp_path / "file"
    path.write_bytes(content.tobytes())
    with path.open("rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    for array in (data, data[5000:70_000], data[1:100].reshape(9, 11), data[7:7], content):
        before = array.copy()
        release(array)
        assert_same_bits(array, before)
    assert_same_bits(data, content)


MEASURE = """
from legacy1bit.packed import PackedModel

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

before = peak()
model = PackedModel.load({path!r}, {form!r})
print(peak() - before, model.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
@pytest.mark.parametrize("kind", ["TQ2_0", "I2_S"])
def test_what_was_read_of_a_file_does_not_stay_in_memory(kind, tmp_path):
    """With the file it would be twice the size."""
    dim, ffn, heads = 2048, 32768, 16
    _, block, length = {**BLOCKS, "I2_S": (36, 128, 32)}[kind]
    config = {
        **{"vocab_size": 16, "model_dim": dim, "num_blocks": 1, "num_heads": heads},
        **{"head_dim": 128, "gated": True, "norm": "rms", "qk_norm": False, "sub_norm": True},
        **{"tied_embeddings": True, "norm_epsilon": 1e-5, "rope_base": 1e4},
    }
    rng, tensors = np.random.default_rng(6), []
    for name, shape in shapes_of_model(config, heads, ffn, False).items():
        size = math.prod(shape)
        if not name.startswith("blocks.0.") or len(shape) == 1:
            tensors.append((name, shape, "F32", np.ones(shape, np.float32)))
            continue
        raw = rng.integers(0, 256, (size // block, length), np.uint8) & 0x55
        if kind == "TQ2_0":
            raw[:, 64:] = 1
        tensors.append((name, shape, kind, raw.tobytes() + bytes(32 if kind == "I2_S" else 0)))
    path = tmp_path / "model.gguf"
    write_gguf_model(path, "bitnet", config, heads, ffn, tensors, 32)
    peak, size = map(int, run_child(MEASURE.format(path=str(path), form="2bit")).split())
    assert size > 50 << 20
    assert peak < 1.15 * size + (20 << 20)
