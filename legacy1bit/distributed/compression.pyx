"""Numbers in eight bits or one, for exchanges over a slow network.

Blocks of 256 consecutive numbers share a scale. In eight bits that is their largest magnitude over
127, and a number becomes the nearest whole multiple of it; in one bit it is the mean of their
magnitudes, and a number keeps its sign (Bernstein et al., arXiv 1802.04434, section 2). What a code
leaves out is added before the next one is made (error feedback; Seide et al., "1-Bit Stochastic
Gradient Descent", 2014, equation 3).
"""

from libc.math cimport fabsf
from libc.string cimport memcpy, memset

from legacy1bit.threads cimport parallel_for

cdef enum:
    BLOCK = 256
    # Blocks of a task.
    TOGETHER = 64

# Added and taken away, it rounds numbers up to 2^22 to the nearest whole one, of two to the even.
cdef float ROUNDER = 12582912.0


cdef struct Job:
    const float *values     # [size]; where a code is added: written to
    float *sums
    float *rest
    unsigned char *code     # a scale for each block, then the codes
    Py_ssize_t size
    int bits


cdef inline Py_ssize_t blocks_of(Py_ssize_t size) noexcept nogil:
    return (size + BLOCK - 1) // BLOCK


cdef float largest(const float *x) noexcept nogil:
    # The largest magnitude of a block; if one is no number or infinite, it is not finite either.
    # Magnitudes are in the order of their bits.
    cdef int[BLOCK] bits
    cdef int i, top = 0
    cdef float value
    memcpy(bits, x, BLOCK * sizeof(float))
    for i in range(BLOCK):
        bits[i] &= 0x7fffffff
        top = bits[i] if bits[i] > top else top
    memcpy(&value, &top, sizeof(float))
    return value


cdef void encode_task(void *context, long index) noexcept nogil:
    cdef Job *job = <Job *>context
    cdef Py_ssize_t blocks = blocks_of(job.size), bytes = BLOCK * job.bits // 8
    cdef Py_ssize_t block, start, n, i
    cdef float *scales = <float *>job.code
    cdef unsigned char *codes
    cdef float[BLOCK] x, steps
    cdef float scale, divisor
    cdef float[4] sums
    for block in range(index * TOGETHER, min((index + 1) * TOGETHER, blocks)):
        start, codes = block * BLOCK, job.code + 4 * blocks + block * bytes
        n = min(job.size - start, BLOCK)
        memset(x, 0, sizeof(x))
        for i in range(n):
            x[i] = job.values[start + i] + job.rest[start + i]
        if job.bits == 8:
            scale = largest(x) / <float>127.0
            divisor = scale if scale > 0.0 else 1.0
            for i in range(BLOCK):
                steps[i] = (x[i] / divisor + ROUNDER) - ROUNDER
                codes[i] = <unsigned char><signed char><int>steps[i]
            for i in range(n):
                job.rest[start + i] = x[i] - steps[i] * scale
        else:
            memset(sums, 0, sizeof(sums))
            for i in range(BLOCK):
                sums[i % 4] += fabsf(x[i])
            scale = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / n
            memset(codes, 0, bytes)
            for i in range(n):
                codes[i // 8] |= (x[i] >= 0.0) << (i % 8)
                job.rest[start + i] = x[i] - (scale if x[i] >= 0.0 else -scale)
        scales[block] = scale


cdef void add_task(void *context, long index) noexcept nogil:
    cdef Job *job = <Job *>context
    cdef Py_ssize_t blocks = blocks_of(job.size), bytes = BLOCK * job.bits // 8
    cdef Py_ssize_t block, start, n, i
    cdef const float *scales = <const float *>job.code
    cdef const unsigned char *codes
    cdef float scale
    for block in range(index * TOGETHER, min((index + 1) * TOGETHER, blocks)):
        start, codes = block * BLOCK, job.code + 4 * blocks + block * bytes
        n = min(job.size - start, BLOCK)
        scale = scales[block]
        if job.bits == 8:
            for i in range(n):
                job.sums[start + i] += <float><signed char>codes[i] * scale
        else:
            for i in range(n):
                job.sums[start + i] += scale if codes[i // 8] >> (i % 8) & 1 else -scale


cdef int fill(Job *job, Py_ssize_t size, int bits, unsigned char[::1] code) except -1:
    if bits not in (8, 1):
        raise ValueError(f"bits is {bits}, expected 8 or 1")
    if code.shape[0] != coded_bytes(size, bits):
        raise ValueError(f"code has {code.shape[0]} bytes, expected {coded_bytes(size, bits)}")
    job.size, job.bits = size, bits
    job.code = &code[0] if size else NULL
    return 0


def coded_bytes(Py_ssize_t size, int bits) -> int:
    """Return how many bytes the code of so many numbers has."""
    return blocks_of(size) * (4 + BLOCK * bits // 8)


def encode(const float[::1] values, float[::1] rest, int bits, unsigned char[::1] code,
           int threads=1) -> None:
    """Write the code of some numbers, and keep what it leaves out.

    Parameters
    ----------
    values : float32[N]
        If one is not finite, what is decoded of its block is not finite.
    rest : float32[N]
        What the last code has left out, which is added; then what this one does.
    bits : {8, 1}
    code : uint8[coded_bytes(N, bits)]
        Written to.
    threads : int

    Raises
    ------
    ValueError
        If a size does not fit, or the bits are others.
    """
    cdef Job job
    fill(&job, values.shape[0], bits, code)
    if rest.shape[0] != job.size:
        raise ValueError(f"rest has {rest.shape[0]} numbers, expected {job.size}")
    if job.size:
        job.values, job.rest = &values[0], &rest[0]
        with nogil:
            parallel_for(encode_task, &job, (blocks_of(job.size) + TOGETHER - 1) // TOGETHER,
                         threads)


def add_decoded(unsigned char[::1] code, int bits, float[::1] values, int threads=1) -> None:
    """Add the numbers of a code to others.

    Parameters
    ----------
    code : uint8[coded_bytes(N, bits)]
    bits : {8, 1}
    values : float32[N]
        Added to.
    threads : int

    Raises
    ------
    ValueError
        If a size does not fit, or the bits are others.
    """
    cdef Job job
    fill(&job, values.shape[0], bits, code)
    if job.size:
        job.sums = &values[0]
        with nogil:
            parallel_for(add_task, &job, (blocks_of(job.size) + TOGETHER - 1) // TOGETHER, threads)
