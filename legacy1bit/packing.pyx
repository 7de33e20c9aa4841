"""Codes of quantized matrices on their way from a file to the kernels' tiles, or to int8.

A row is decoded to one byte for each code, its place among the levels, and written from there. The
threads share the rows, and none has a temporary array larger than a row. Nothing holds the GIL.

Blocks of GGUF: ``ggml/src/ggml-common.h`` and ``ggml-quants.c`` of llama.cpp; PQ2_0 and PTQ1_0 are
PrismML's, I2_S is that of bitnet.cpp. Packed matrices of safetensors: ``integrations/bitnet.py`` of
transformers. Codes of our own files: ``Scheme.pack``.
"""

import numpy as np

from libc.string cimport memcpy, memset

from legacy1bit.kernels cimport STRIP_ROWS, TILE_BYTES, TILE_CODES, TILE_ROW_BYTES, TILE_TRITS
from legacy1bit.threads cimport parallel_for, scratch


# ---------------------------------------------------------------------------------------------
# Layouts

ctypedef void (*block_decoder)(const unsigned char *block, unsigned char *out) noexcept nogil

cdef struct Layout:
    # Blocks of so many weights and bytes, and the byte where a scale in float16 begins, or -1. They
    # go on over the ends of rows. Without a decoder each row is in bytes of its own.
    block_decoder decode
    Py_ssize_t weights
    Py_ssize_t bytes
    Py_ssize_t scale

cdef enum:
    TQ1_0, TQ2_0, Q2_0, Q2_0_OF_128, PTQ1_0, I2_S, ONE_BIT, TWO_BITS, QUARTERS, INT8, NUM_LAYOUTS

# By their names in Python.
LAYOUTS = {
    "TQ1_0": TQ1_0, "TQ2_0": TQ2_0, "Q2_0": Q2_0, "Q2_0 of 128": Q2_0_OF_128, "PTQ1_0": PTQ1_0,
    "I2_S": I2_S, "1 bit": ONE_BIT, "2 bits": TWO_BITS, "quarters": QUARTERS, "int8": INT8,
}

cdef Layout[NUM_LAYOUTS] layouts

layouts[TQ1_0] = Layout(decode_tq1_0, 256, 54, 52)
layouts[TQ2_0] = Layout(decode_tq2_0, 256, 66, 64)
layouts[Q2_0] = Layout(decode_q2_0, 64, 18, 0)
layouts[Q2_0_OF_128] = Layout(decode_q2_0_of_128, 128, 34, 0)
layouts[PTQ1_0] = Layout(decode_ptq1_0, 128, 28, 26)
layouts[I2_S] = Layout(decode_i2_s, 128, 32, -1)

# The most weights of a block.
cdef enum:
    MOST_WEIGHTS = 256


# The four codes of two bits in a byte, and the eight of one, the first in the lowest bits.
cdef unsigned char[256][4] fours
cdef unsigned char[256][8] eights

cdef void fill_tables() noexcept nogil:
    cdef int byte, i
    for byte in range(256):
        for i in range(4):
            fours[byte][i] = byte >> 2 * i & 3
        for i in range(8):
            eights[byte][i] = byte >> i & 1

fill_tables()


cdef inline void decode_layers(const unsigned char *data, bint reverse,
                               unsigned char *out) noexcept nogil:
    # Weight 32 l + m is in bits 2 l of byte m, or, in reverse, in bits 6 - 2 l.
    cdef unsigned char[32] own
    cdef Py_ssize_t layer, m
    memcpy(own, data, sizeof(own))      # in registers
    for layer in range(4):
        for m in range(32):
            out[32 * layer + m] = own[m] >> (6 - 2 * layer if reverse else 2 * layer) & 3


cdef inline void decode_trits(const unsigned char *data, Py_ssize_t width, Py_ssize_t digits,
                              unsigned char *out) noexcept nogil:
    # Weight width * d + m is ternary digit d of byte m, the first one the most significant: three
    # times the byte is the digit and, as a byte, the fraction of those that are left.
    cdef unsigned char[32] own
    cdef Py_ssize_t digit, m
    memcpy(own, data, width)
    for digit in range(digits):
        for m in range(width):
            out[width * digit + m] = 3 * own[m] >> 8
            own[m] = 3 * own[m] & 255


cdef inline void decode_in_order(const unsigned char *data, Py_ssize_t size,
                                 unsigned char *out) noexcept nogil:
    # Four weights in each byte.
    cdef Py_ssize_t m
    for m in range(size):
        memcpy(out + 4 * m, fours[data[m]], 4)


cdef void decode_tq1_0(const unsigned char *block, unsigned char *out) noexcept nogil:
    decode_trits(block, 32, 5, out)
    decode_trits(block + 32, 16, 5, out + 160)
    decode_trits(block + 48, 4, 4, out + 240)


cdef void decode_ptq1_0(const unsigned char *block, unsigned char *out) noexcept nogil:
    decode_trits(block, 16, 5, out)
    decode_trits(block + 16, 8, 5, out + 80)
    decode_trits(block + 24, 2, 4, out + 120)


cdef void decode_tq2_0(const unsigned char *block, unsigned char *out) noexcept nogil:
    decode_layers(block, False, out)
    decode_layers(block + 32, False, out + 128)


cdef void decode_q2_0(const unsigned char *block, unsigned char *out) noexcept nogil:
    decode_in_order(block + 2, 16, out)


cdef void decode_q2_0_of_128(const unsigned char *block, unsigned char *out) noexcept nogil:
    decode_in_order(block + 2, 32, out)


cdef void decode_i2_s(const unsigned char *block, unsigned char *out) noexcept nogil:
    decode_layers(block, True, out)


# ---------------------------------------------------------------------------------------------
# Rows

cdef struct Job:
    # Where codes come from: ``count`` rows of a matrix from ``first`` on.
    const unsigned char *data
    int layout
    Py_ssize_t rows
    Py_ssize_t cols
    Py_ssize_t first
    Py_ssize_t count
    # Where they go: the row for each of them, in tiles or, if these are NULL, in int8.
    const Py_ssize_t *places
    unsigned char *tiles
    Py_ssize_t tile_count           # of a strip
    bint trits
    signed char *values             # [R, C]
    # The codes: factor * place + offset.
    int levels
    int factor
    int offset
    unsigned char[256] place_of     # of an int8; 255 if it is no level
    unsigned char *outcomes         # of each task


cdef enum Outcome:
    DONE, OTHER_CODE, OUT_OF_MEMORY


cdef const unsigned char *decode_row(const Job *job, Py_ssize_t row, unsigned char *buffer,
                                     unsigned char *highest) noexcept nogil:
    # Returns the places of a row's codes in the buffer, and their maximum.
    cdef const Layout *layout = &layouts[job.layout]
    cdef const unsigned char *data = job.data
    cdef Py_ssize_t cols = job.cols, start = row * cols, size = cols, skip = 0, blocks, i
    cdef unsigned char most = 0
    cdef int shift
    if layout.decode:
        data += start // layout.weights * layout.bytes
        skip = start % layout.weights
        blocks = (skip + cols + layout.weights - 1) // layout.weights
        size = blocks * layout.weights
        for i in range(blocks):
            layout.decode(data + i * layout.bytes, buffer + i * layout.weights)
    elif job.layout == QUARTERS:
        # Row r + i R / 4 is in bits 2 i of row r.
        data += row % (job.rows // 4) * cols
        shift = 2 * <int>(row // (job.rows // 4))
        for i in range(cols):
            buffer[i] = data[i] >> shift & 3
    elif job.layout == TWO_BITS:
        blocks = (cols + 3) // 4
        decode_in_order(data + row * blocks, blocks, buffer)
    elif job.layout == ONE_BIT:
        blocks = (cols + 7) // 8
        for i in range(blocks):
            memcpy(buffer + 8 * i, eights[data[row * blocks + i]], 8)
    else:
        for i in range(cols):
            buffer[i] = job.place_of[data[start + i]]
    for i in range(size):
        most = max(most, buffer[i])
    highest[0] = max(highest[0], most)
    if layout.decode and layout.scale >= 0:
        # Blocks of scale 0 are zeros under any scale.
        for i in range(blocks):
            if data[layout.scale] == 0 and data[layout.scale + 1] & 0x7F == 0:
                memset(buffer + i * layout.weights, 1, layout.weights)
            data += layout.bytes
    return buffer + skip


cdef void write_codes(const unsigned char *row, Py_ssize_t tiles,
                      unsigned char *out) noexcept nogil:
    # Writes a row of tiles: of 16 codes, byte b has those in columns b, 4 + b, 8 + b and 12 + b.
    cdef unsigned int first, second, third, fourth
    cdef Py_ssize_t _tile
    for _tile in range(tiles):
        memcpy(&first, row, 4)
        memcpy(&second, row + 4, 4)
        memcpy(&third, row + 8, 4)
        memcpy(&fourth, row + 12, 4)
        first |= second << 2 | third << 4 | fourth << 6
        memcpy(out, &first, 4)
        row += TILE_CODES
        out += TILE_BYTES


cdef void write_trits(const unsigned char *row, Py_ssize_t tiles,
                      unsigned char *out) noexcept nogil:
    # The same of 20 codes, as digits in base 3.
    cdef Py_ssize_t _tile, b
    cdef unsigned int number
    for _tile in range(tiles):
        for b in range(TILE_ROW_BYTES):
            number = 81 * row[b] + 27 * row[4 + b] + 9 * row[8 + b] + 3 * row[12 + b] + row[16 + b]
            out[b] = (256 * number + 242) // 243
        row += TILE_TRITS
        out += TILE_BYTES


cdef void write_task(void *context, long task) noexcept nogil:
    cdef const Job *job = <const Job *>context
    cdef Py_ssize_t i, row, col, width = TILE_TRITS if job.trits else TILE_CODES
    cdef Py_ssize_t room = MOST_WEIGHTS + job.cols + MOST_WEIGHTS
    cdef unsigned char *buffer = <unsigned char *>scratch((room + 3) // 4)
    cdef unsigned char *codes
    cdef unsigned char *out
    cdef signed char *values
    cdef unsigned char highest = 0
    if buffer == NULL:
        job.outcomes[task] = OUT_OF_MEMORY
        return
    for i in range(STRIP_ROWS * task, min(STRIP_ROWS * (task + 1), job.count)):
        codes = <unsigned char *>decode_row(job, job.first + i, buffer, &highest)
        row = job.places[i]
        if job.tiles == NULL:
            values = job.values + row * job.cols
            for col in range(job.cols):
                values[col] = <signed char>(job.factor * codes[col] + job.offset)
            continue
        out = job.tiles + (row // STRIP_ROWS * job.tile_count * TILE_BYTES
                           + row % STRIP_ROWS * TILE_ROW_BYTES)
        memset(codes + job.cols, 0, job.tile_count * width - job.cols)
        if job.trits:
            write_trits(codes, job.tile_count, out)
        else:
            write_codes(codes, job.tile_count, out)
    job.outcomes[task] = OTHER_CODE if highest >= job.levels else DONE


def stored_size(layout, rows, cols) -> int:
    """Return the bytes of the codes of a stored matrix."""
    cdef const Layout *blocks = &layouts[LAYOUTS[layout]]
    if blocks.decode:
        return (rows * cols + blocks.weights - 1) // blocks.weights * blocks.bytes
    if layout == "quarters":
        return rows // 4 * cols
    return rows * ((cols * {"1 bit": 1, "2 bits": 2, "int8": 8}[layout] + 7) // 8)


cdef class _Target:
    """Where the codes of a matrix are written, at the rows that belong to them."""

    cdef readonly object array
    cdef readonly tuple levels
    cdef readonly int threads
    cdef Py_ssize_t rows
    cdef Job job

    cdef int _describe(self, array, rows, cols, levels, threads) except -1:
        self.array, self.levels, self.threads = array, levels, threads
        self.rows, self.job.cols = rows, cols
        self.job.levels = len(levels)
        self.job.factor, self.job.offset = levels[1] - levels[0], levels[0]
        memset(self.job.place_of, 255, sizeof(self.job.place_of))
        for place, level in enumerate(levels):
            self.job.place_of[<unsigned char><signed char>level] = place
        return 0

    def write(self, layout, data, rows, places, first=0) -> None:
        """Write some rows of a matrix as it is stored.

        Parameters
        ----------
        layout : str
            One of ``LAYOUTS``.
        data : uint8[N]
            The whole matrix.
        rows : int
            Its rows. It has as many columns as the target.
        places : intp[P]
            The rows of the target that they become.
        first : int
            The first of its rows that are written.

        Raises
        ------
        ValueError
            If a code is not one of the levels, or sizes do not fit.
        """
        cdef const unsigned char[::1] stored = data
        cdef const Py_ssize_t[::1] order = places
        cdef unsigned char[::1] outcomes
        cdef Py_ssize_t count = order.shape[0], tasks = (count + STRIP_ROWS - 1) // STRIP_ROWS
        cdef int threads = self.threads
        if layout == "quarters" and rows % 4:
            raise ValueError(f"has {rows} rows, expected a multiple of 4")
        needed = stored_size(layout, rows, self.job.cols)
        if stored.shape[0] < needed:
            raise ValueError(f"has {stored.shape[0]} bytes, expected {needed}")
        if not 0 <= first < first + count <= rows:
            raise ValueError(f"has {rows} rows, expected {count} of them from {first} on")
        if not 0 <= places.min() <= places.max() < self.rows:
            raise ValueError(f"places holds a row that is not one of {self.rows}")
        results = np.zeros(tasks, np.uint8)
        outcomes = results
        self.job.data = &stored[0]
        self.job.layout = LAYOUTS[layout]
        self.job.rows, self.job.first, self.job.count = rows, first, count
        self.job.places = &order[0]
        self.job.outcomes = &outcomes[0]
        with nogil:
            parallel_for(write_task, &self.job, tasks, threads)
        worst = results.max()
        if worst == OUT_OF_MEMORY:
            raise MemoryError("no memory for a row of codes")
        if worst == OTHER_CODE and layout == "int8":
            raise ValueError(f"values holds a number other than "
                             f"{', '.join(map(str, self.levels[:-1]))} and {self.levels[-1]}")
        if worst == OTHER_CODE:
            raise ValueError("has a weight of code 3, and ternary codes are 0 to 2")


cdef class Tiles(_Target):
    """The tiles of a packed matrix, as ``include/layout.h`` describes them.

    Parameters
    ----------
    array : uint8[R / 32, C / 16, 128] or, of trits, uint8[R / 32, C / 20, 128]
        Both quotients rounded up.
    shape : (int, int)
        (R, C).
    levels : tuple of int
        The codes, evenly spaced and increasing; three at most for trits.
    trits : bool
    threads : int
    """

    def __init__(self, array, shape, levels, trits=False, threads=1):
        cdef unsigned char[:, :, ::1] tiles = array
        width = TILE_TRITS if trits else TILE_CODES
        expected = -(-shape[0] // STRIP_ROWS), -(-shape[1] // width), TILE_BYTES
        if array.shape != expected:
            raise ValueError(f"array has shape {array.shape}, expected {expected}")
        self._describe(array, shape[0], shape[1], levels, threads)
        self.job.tiles, self.job.trits = &tiles[0, 0, 0], trits
        self.job.tile_count = tiles.shape[1]
        # The rows beyond the last one.
        array[-1] = 0


cdef class Values(_Target):
    """Codes as they are, one to a byte.

    Parameters
    ----------
    array : int8[R, C]
    levels : tuple of int
        The codes, evenly spaced and increasing.
    threads : int
    """

    def __init__(self, array, levels, threads=1):
        cdef signed char[:, ::1] values = array
        self._describe(array, values.shape[0], values.shape[1], levels, threads)
        self.job.values = &values[0, 0]


# ---------------------------------------------------------------------------------------------
# Scales

cdef inline float from_half(const unsigned char *bytes) noexcept nogil:
    # The number of a float16, exactly.
    cdef unsigned int half = bytes[0] | <unsigned int>bytes[1] << 8, bits
    cdef unsigned int exponent = half >> 10 & 31, fraction = half & 0x3FF
    cdef float value
    if exponent == 0:
        value = <float>fraction * <float>5.9604644775390625e-8     # 2 ** -24
    else:
        bits = (255 if exponent == 31 else exponent + 112) << 23 | fraction << 13
        memcpy(&value, &bits, 4)
    return -value if half >> 15 else value


def block_scales(layout, data) -> np.ndarray:
    """Return the scales of blocks, float32[N].

    Parameters
    ----------
    layout : str
        One of ``LAYOUTS`` whose blocks have a scale.
    data : uint8[N bytes]
    """
    cdef const Layout *blocks = &layouts[LAYOUTS[layout]]
    cdef const unsigned char[::1] stored = data
    cdef float[::1] out
    cdef Py_ssize_t i
    if blocks.scale < 0 or stored.shape[0] % blocks.bytes:
        raise ValueError(f"data has {stored.shape[0]} bytes, expected blocks of {layout}")
    scales = np.empty(stored.shape[0] // blocks.bytes, np.float32)
    out = scales
    with nogil:
        for i in range(out.shape[0]):
            out[i] = from_half(&stored[blocks.bytes * i + blocks.scale])
    return scales


def merge_scales(scales, Py_ssize_t each) -> np.ndarray | None:
    """Return one scale for several columns of scales, if they have one.

    Parameters
    ----------
    scales : float32[R, G]
        Finite numbers; 0 stands for any.
    each : int

    Returns
    -------
    float32[R, ceil(G / each)] or None
        The one number other than 0 of each part of a row, 0 if there is none; None if one has two.
    """
    cdef const float[:, ::1] given = scales
    cdef float[:, ::1] out
    cdef Py_ssize_t row, part, i
    cdef float value
    cdef bint differ = False
    merged = np.empty((given.shape[0], (given.shape[1] + each - 1) // each), np.float32)
    out = merged
    with nogil:
        for row in range(given.shape[0]):
            for part in range(out.shape[1]):
                value = 0.0
                for i in range(each * part, min(each * (part + 1), given.shape[1])):
                    if given[row, i] != 0.0 and value == 0.0:
                        value = given[row, i]
                    elif given[row, i] != 0.0 and given[row, i] != value:
                        differ = True
                        break
                out[row, part] = value
                if differ:
                    break
            if differ:
                break
    return None if differ else merged


# ---------------------------------------------------------------------------------------------
# Floats

# In the loops all numbers go the same way, so that compilers make vectors of them. A nonfinite one
# sets a bit of what is returned, which is above all others.

cdef unsigned int floats_of_halves(const unsigned char *data, Py_ssize_t count,
                                   float *out) noexcept nogil:
    cdef unsigned short half
    cdef int magnitude, is_small, small, bits
    cdef unsigned int nonfinite = 0
    cdef float fraction
    cdef Py_ssize_t i
    for i in range(count):
        memcpy(&half, data + 2 * i, 2)
        magnitude = half & 0x7FFF
        nonfinite |= <unsigned int>(magnitude + 0x400) << 16
        # Of the smallest numbers the fraction is all. A choice would be a branch for gcc.
        fraction = <float>magnitude * <float>5.9604644775390625e-8      # 2 ** -24
        memcpy(&small, &fraction, 4)
        is_small = -<int>(magnitude < 0x400)
        bits = small & is_small | (magnitude << 13) + (112 << 23) & ~is_small
        bits |= <int>(<unsigned int>(half & 0x8000) << 16)
        memcpy(out + i, &bits, 4)
    return nonfinite


cdef unsigned int floats_of_bfloats(const unsigned char *data, Py_ssize_t count,
                                    float *out) noexcept nogil:
    cdef unsigned short upper
    cdef unsigned int bits, nonfinite = 0
    cdef Py_ssize_t i
    for i in range(count):
        memcpy(&upper, data + 2 * i, 2)
        bits = <unsigned int>upper << 16
        nonfinite |= (bits & 0x7FFFFFFF) + 0x800000
        memcpy(out + i, &bits, 4)
    return nonfinite


cdef unsigned int floats_of_floats(const unsigned char *data, Py_ssize_t count,
                                   float *out) noexcept nogil:
    cdef unsigned int bits, nonfinite = 0
    cdef Py_ssize_t i
    for i in range(count):
        memcpy(&bits, data + 4 * i, 4)
        nonfinite |= (bits & 0x7FFFFFFF) + 0x800000
        memcpy(out + i, &bits, 4)
    return nonfinite


def read_floats(kind, data) -> np.ndarray:
    """Return numbers of a file in float32, exactly.

    Parameters
    ----------
    kind : {"F16", "BF16", "F32"}
    data : uint8[2 N] or uint8[4 N]

    Returns
    -------
    float32[N]

    Raises
    ------
    ValueError
        If one is not finite, or the size does not fit.
    """
    cdef const unsigned char[::1] stored = data
    cdef float[::1] out
    cdef Py_ssize_t size = {"F16": 2, "BF16": 2, "F32": 4}[kind]
    cdef bint halves = kind == "F16"
    cdef unsigned int nonfinite
    if stored.shape[0] == 0 or stored.shape[0] % size:
        raise ValueError(f"data has {stored.shape[0]} bytes, expected numbers of {size}")
    values = np.empty(stored.shape[0] // size, np.float32)
    out = values
    with nogil:
        if halves:
            nonfinite = floats_of_halves(&stored[0], out.shape[0], &out[0])
        elif size == 2:
            nonfinite = floats_of_bfloats(&stored[0], out.shape[0], &out[0])
        else:
            nonfinite = floats_of_floats(&stored[0], out.shape[0], &out[0])
    if nonfinite >> 31:
        raise ValueError("holds a number that is not finite")
    return values
