"""Linear maps as layers hold them: ``y = W x + b``, whatever W is stored in, and with an adapter
``y = W x + b + scale B A x``.

The matrix of a model that learns is of floats, or of int8 codes. That of a model for decoding, or
under an adapter, is packed: two bits a code, or int8 rows. The kernels that train take int8 codes,
so a packed matrix is unpacked for them, some rows at a time, in the forward and in the backward
pass. That costs little beside a product of many tokens, and no matrix is ever there as a whole.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from legacy1bit.kernels cimport (
    CODES_PER_BYTE, STRIP_ROWS, TILE_BYTES, TILE_ROW_BYTES, TILE_TRITS, TRITS_PER_BYTE, KernelTable,
    strided,
)
from legacy1bit.math_ops cimport kernels, packed_kernels
from legacy1bit.threads cimport scratch

cdef enum:
    UNPACKED_ROWS = 4 * STRIP_ROWS


# ---------------------------------------------------------------------------------------------
# Scratch

cdef void add_demand(Demand *demand, const Projection *projection) noexcept nogil:
    if projection.packed.tiles or projection.int8.codes:
        demand.unpacked = max(demand.unpacked, projection.cols)
    if projection.adapter.rank:
        demand.adapted = max(demand.adapted, projection.cols)
        demand.rank = max(demand.rank, projection.adapter.rank)


cdef inline Py_ssize_t code_floats(const Demand *demand) noexcept nogil:
    # The room of unpacked codes, in floats.
    if demand.unpacked == 0:
        return 0
    return (UNPACKED_ROWS * (demand.unpacked + TILE_TRITS) + 3) // 4


def scratch_bytes(rows, unpacked, adapted, rank) -> int:
    """Return the bytes that a thread needs, beside the kernels' own, for a pass over some rows.

    Parameters
    ----------
    rows : int
    unpacked : int
        The most columns of packed matrices.
    adapted : int
        The most columns of matrices with an adapter.
    rank : int
        The adapter's.
    """
    cdef Demand demand
    memset(&demand, 0, sizeof(demand))
    demand.unpacked = unpacked
    return 4 * (code_floats(&demand) + rows * (UNPACKED_ROWS + adapted + rank))


cdef bint reserve(Workspace *workspace, const Demand *demand, Py_ssize_t rows) noexcept nogil:
    # The calling thread's scratch for passes over some rows, without dropout; False if there is no
    # memory for it.
    cdef Py_ssize_t kernel_floats = max(kernels().workspace_floats,
                                        packed_kernels().workspace_floats)
    cdef Py_ssize_t codes = code_floats(demand)
    cdef Py_ssize_t products = rows * UNPACKED_ROWS if codes else 0
    cdef float *start = scratch(kernel_floats + codes + products
                                + rows * (demand.rank + demand.adapted) + demand.row)
    memset(workspace, 0, sizeof(workspace[0]))
    workspace.packing = start
    if start == NULL:
        return False
    workspace.codes = <signed char *>(start + kernel_floats)
    workspace.products = start + kernel_floats + codes
    workspace.low = workspace.products + products
    workspace.dropped = workspace.low + rows * demand.rank
    workspace.row = workspace.dropped + rows * demand.adapted
    return True


cdef int reserve_or_raise(Workspace *workspace, const Demand *demand,
                          Py_ssize_t rows) except -1:
    if not reserve(workspace, demand, rows):
        raise MemoryError("no memory for the kernels' packing buffers")
    return 0


cdef int reserve_one(Workspace *workspace, const Projection *projection,
                     Py_ssize_t rows) except -1:
    # The same for one map.
    cdef Demand demand
    memset(&demand, 0, sizeof(demand))
    add_demand(&demand, projection)
    return reserve_or_raise(workspace, &demand, rows)


# ---------------------------------------------------------------------------------------------
# Unpacking

cdef void unpack_codes(const PackedMatrix *matrix, Py_ssize_t row,
                       signed char *codes) noexcept nogil:
    # One row of the matrix without its scales; codes has room for whole tiles of columns.
    cdef Py_ssize_t fields = TRITS_PER_BYTE if matrix.trits else CODES_PER_BYTE
    cdef Py_ssize_t width = fields * TILE_ROW_BYTES
    cdef Py_ssize_t tiles = (matrix.cols + width - 1) // width, _tile, byte, field
    cdef const unsigned char *here = (matrix.tiles + row // STRIP_ROWS * tiles * TILE_BYTES
                                      + row % STRIP_ROWS * TILE_ROW_BYTES)
    cdef unsigned int rest
    if not matrix.trits and matrix.offset <= 0:
        unpack_words(here, tiles, matrix.factor, -matrix.offset, codes)
        return
    for _tile in range(tiles):
        for byte in range(TILE_ROW_BYTES):
            rest = here[byte]
            for field in range(fields):
                if matrix.trits:
                    rest = 3 * (rest & 255)
                    codes[TILE_ROW_BYTES * field + byte] = (
                        matrix.factor * <int>(rest >> 8) + matrix.offset)
                else:
                    codes[TILE_ROW_BYTES * field + byte] = (
                        matrix.factor * <int>(rest & 3) + matrix.offset)
                    rest >>= 2
        here += TILE_BYTES
        codes += width


cdef inline void unpack_words(const unsigned char *here, Py_ssize_t tiles, unsigned int factor,
                              unsigned int below, signed char *codes) noexcept nogil:
    # Codes of two bits, four bytes at a time: factor * u - below in every byte of a word. The high
    # bit, which is set meanwhile, keeps bytes from borrowing of each other.
    cdef Py_ssize_t _tile, field
    cdef uint32_t word, four
    for _tile in range(tiles):
        memcpy(&word, here, sizeof(word))
        for field in range(CODES_PER_BYTE):
            four = factor * ((word >> (2 * field)) & 0x03030303)
            four = ((four | <uint32_t>0x80808080) - below * <uint32_t>0x01010101) ^ (
                <uint32_t>0x80808080)
            memcpy(codes + TILE_ROW_BYTES * field, &four, sizeof(four))
        here += TILE_BYTES
        codes += CODES_PER_BYTE * TILE_ROW_BYTES


cdef void unpack_rows(const Projection *projection, Py_ssize_t first, Py_ssize_t count,
                      signed char *codes, Matrix *part) noexcept nogil:
    # Some rows of a packed matrix as a matrix of int8 codes; codes is int8[count, cols] of scratch
    # with room for a tile behind it.
    cdef const PackedMatrix *packed = &projection.packed
    cdef Py_ssize_t i, cols = projection.cols
    memset(part, 0, sizeof(part[0]))
    part.rows = count
    part.cols = cols
    part.codes = codes
    if packed.tiles:
        part.scale = packed.scale + first * packed.scale_row
        part.scale_row = packed.scale_row
        part.group = packed.group
        if packed.offset == -1:
            part.reach = 1
        elif packed.offset == -3 and packed.factor == 2:
            part.reach = 3
        for i in range(count):
            unpack_codes(packed, first + i, codes + i * cols)
        return
    part.scale = projection.int8.scales + first
    part.scale_row = 1
    part.group = cols
    for i in range(count):
        memcpy(codes + i * cols, projection.int8.codes + (first + i) * projection.int8.stride, cols)


cdef void read_row(const Projection *projection, Py_ssize_t row, float *out,
                   signed char *codes) noexcept nogil:
    # One row of the matrix in float, for embeddings; codes is scratch as for unpack_rows.
    cdef const Matrix *matrix = &projection.matrix
    cdef Matrix part
    cdef Py_ssize_t col
    if matrix.dense:
        memcpy(out, matrix.dense + row * matrix.cols, matrix.cols * sizeof(float))
        return
    if matrix.codes:
        part = matrix[0]
        part.codes += row * matrix.cols
        part.scale += row * matrix.scale_row
    else:
        unpack_rows(projection, row, 1, codes, &part)
    for col in range(part.cols):
        out[col] = part.scale[col // part.group] * part.codes[col]


# ---------------------------------------------------------------------------------------------
# Adapters

cdef inline uint64_t mix(uint64_t x) noexcept nogil:
    # A hash of 64 bits: MurmurHash3's finalizer (Appleby).
    x = (x ^ (x >> 33)) * <uint64_t>0xFF51AFD7ED558CCD
    x = (x ^ (x >> 33)) * <uint64_t>0xC4CEB9FE1A85EC53
    return x ^ (x >> 33)


cdef void drop(const Projection *projection, float *x, Py_ssize_t rows,
               const Workspace *workspace) noexcept nogil:
    # Dropout, in place: the same elements whenever a step comes by here, for any number of threads.
    cdef uint64_t seed = mix(workspace.seed ^ mix(projection.adapter.stream))
    cdef uint64_t bound = <uint64_t>(workspace.dropout * 4294967296.0)
    cdef float kept = 1.0 / (1.0 - workspace.dropout)
    cdef Py_ssize_t i, start = workspace.first_row * projection.cols
    for i in range(rows * projection.cols):
        x[i] = 0.0 if mix(seed + <uint64_t>(start + i)) >> 32 < bound else x[i] * kept


cdef const float *after_dropout(const Projection *projection, const float *x, Py_ssize_t rows,
                                const Workspace *workspace) noexcept nogil:
    if workspace.dropout == 0.0:
        return x
    memcpy(workspace.dropped, x, rows * projection.cols * sizeof(float))
    drop(projection, workspace.dropped, rows, workspace)
    return workspace.dropped


cdef void adapt(const Projection *projection, const float *x, Py_ssize_t rows, Py_ssize_t low,
                Py_ssize_t count, float *out, const Workspace *workspace) noexcept nogil:
    # out[rows, projection.rows] += scale x A^T B^T, for `count` columns of it from `low` on.
    cdef const Adapter *adapter = &projection.adapter
    cdef Py_ssize_t rank = adapter.rank
    project_down(projection, x, rows, workspace)
    kernels().matmul(rows, count, rank, strided(workspace.low, rank, 1),
                     strided(adapter.b + low * rank, 1, rank), NULL, True, out + low,
                     projection.rows, workspace.packing)


cdef void project_down(const Projection *projection, const float *x, Py_ssize_t rows,
                       const Workspace *workspace) noexcept nogil:
    # workspace.low = scale x A^T.
    cdef const Adapter *adapter = &projection.adapter
    kernels().matmul(rows, adapter.rank, projection.cols, strided(x, projection.cols, 1),
                     strided(adapter.a, 1, projection.cols), NULL, False, workspace.low,
                     adapter.rank, workspace.packing)
    kernels().scale(workspace.low, adapter.scale, rows * adapter.rank)


cdef void project_up_backward(const Projection *projection, const float *d_out, Py_ssize_t rows,
                              const Workspace *workspace) noexcept nogil:
    # workspace.low = scale d_out B, the gradient of x A^T.
    cdef const Adapter *adapter = &projection.adapter
    kernels().matmul(rows, adapter.rank, projection.rows, strided(d_out, projection.rows, 1),
                     strided(adapter.b, adapter.rank, 1), NULL, False, workspace.low, adapter.rank,
                     workspace.packing)
    kernels().scale(workspace.low, adapter.scale, rows * adapter.rank)


cdef void adapter_backward(const Projection *projection, const float *d_out, Py_ssize_t rows,
                           float *d_x, const Workspace *workspace) noexcept nogil:
    # d_x += the gradient by way of the adapter.
    cdef Py_ssize_t rank = projection.adapter.rank, cols = projection.cols
    cdef float *to = d_x if workspace.dropout == 0.0 else workspace.dropped
    project_up_backward(projection, d_out, rows, workspace)
    kernels().matmul(rows, cols, rank, strided(workspace.low, rank, 1),
                     strided(projection.adapter.a, cols, 1), NULL, workspace.dropout == 0.0, to,
                     cols, workspace.packing)
    if workspace.dropout != 0.0:
        drop(projection, to, rows, workspace)
        kernels().add(d_x, to, rows * cols)


cdef void adapter_gradient(const Projection *projection, const float *d_out, const float *x,
                           Py_ssize_t rows, float *d_a, const Workspace *workspace) noexcept nogil:
    # d_a[rank, cols] += d_low^T x, and d_b[rows, rank], which is behind it, += d_out^T low.
    cdef const KernelTable *kernel = kernels()
    cdef Py_ssize_t rank = projection.adapter.rank, cols = projection.cols
    cdef const float *source = after_dropout(projection, x, rows, workspace)
    project_down(projection, source, rows, workspace)
    kernel.matmul(projection.rows, rank, rows, strided(d_out, 1, projection.rows),
                  strided(workspace.low, rank, 1), NULL, True, d_a + rank * cols, rank,
                  workspace.packing)
    project_up_backward(projection, d_out, rows, workspace)
    kernel.matmul(rank, cols, rows, strided(workspace.low, 1, rank), strided(source, cols, 1), NULL,
                  True, d_a, cols, workspace.packing)


# ---------------------------------------------------------------------------------------------
# Products

cdef void linear(const Projection *projection, const float *x, Py_ssize_t rows, float *out,
                 const Workspace *workspace) noexcept nogil:
    # out[rows, projection.rows] = x[rows, projection.cols] W^T + bias, and the adapter's share.
    cdef Py_ssize_t first, count, t
    cdef const float *bias = projection.bias
    cdef Matrix part
    if projection.packed.tiles or projection.int8.codes:
        for first from 0 <= first < projection.rows by UNPACKED_ROWS:
            count = min(projection.rows - first, UNPACKED_ROWS)
            unpack_rows(projection, first, count, workspace.codes, &part)
            kernels().linear(&part, bias + first if bias else NULL, x, rows, workspace.products,
                             workspace.packing)
            for t in range(rows):
                memcpy(out + t * projection.rows + first, workspace.products + t * count,
                       count * sizeof(float))
    else:
        kernels().linear(&projection.matrix, bias, x, rows, out, workspace.packing)
    if projection.adapter.rank:
        adapt(projection, after_dropout(projection, x, rows, workspace), rows, 0, projection.rows,
              out, workspace)


cdef void linear_backward(const Projection *projection, const float *d_out, Py_ssize_t rows,
                          bint accumulate, float *d_x, const Workspace *workspace) noexcept nogil:
    # d_x[rows, projection.cols] = d_out[rows, projection.rows] W, or += if accumulate is set, and
    # the adapter's share.
    cdef Py_ssize_t first, count, t
    cdef Matrix part
    if projection.packed.tiles or projection.int8.codes:
        for first from 0 <= first < projection.rows by UNPACKED_ROWS:
            count = min(projection.rows - first, UNPACKED_ROWS)
            unpack_rows(projection, first, count, workspace.codes, &part)
            for t in range(rows):
                memcpy(workspace.products + t * count, d_out + t * projection.rows + first,
                       count * sizeof(float))
            kernels().linear_backward(&part, workspace.products, rows, accumulate or first > 0,
                                      d_x, workspace.packing)
    else:
        kernels().linear_backward(&projection.matrix, d_out, rows, accumulate, d_x,
                                  workspace.packing)
    if projection.adapter.rank:
        adapter_backward(projection, d_out, rows, d_x, workspace)


cdef void weight_gradient(const Projection *projection, const float *d_out, const float *x,
                          Py_ssize_t rows, float *d_weight, float *d_bias,
                          const Workspace *workspace) noexcept nogil:
    # What learns: d_weight[out, in] += d_out^T x, or the same of the adapter, and d_bias += the
    # column sums of d_out; neither where it is NULL.
    if projection.adapter.rank:
        adapter_gradient(projection, d_out, x, rows, d_weight, workspace)
    elif d_weight:
        kernels().weight_gradient(&projection.matrix, d_out, x, rows, d_weight, workspace.packing)
    if d_bias:
        kernels().column_sums(d_out, rows, projection.rows, d_bias)
