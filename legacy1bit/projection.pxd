"""Linear maps, for code that runs without the GIL."""

from legacy1bit.kernels cimport Int8Rows, Matrix, PackedMatrix

cdef struct Adapter:
    # Low-rank adaptation (LoRA: Hu et al., arXiv 2106.09685, section 4.1): y += scale B A x.
    Py_ssize_t rank         # 0: none
    const float *a          # [rank, cols]
    const float *b          # [rows, rank]
    float scale
    unsigned int stream     # of the random numbers of dropout, another one for each map

cdef struct Projection:
    # One linear map y = W x + bias, and its adapter. W is in one of these, the others are NULL:
    # matrix.dense and matrix.codes, packed.tiles, int8.codes.
    Py_ssize_t rows
    Py_ssize_t cols
    Matrix matrix           # floats, or int8 codes times scales
    PackedMatrix packed
    Int8Rows int8
    const float *bias       # [rows]; NULL without a bias
    Adapter adapter

cdef struct Demand:
    # What the maps of a pass need beside the kernels' workspace.
    Py_ssize_t unpacked     # the most columns of packed ones
    Py_ssize_t adapted      # the most columns of those with an adapter
    Py_ssize_t rank         # the highest
    Py_ssize_t row          # floats of a row of something else

cdef struct Workspace:
    # The scratch of one thread.
    float *packing          # for the kernels
    signed char *codes      # [UNPACKED_ROWS, cols], unpacked
    float *products         # [rows, UNPACKED_ROWS]
    float *low              # [rows, rank], A x
    float *dropped          # [rows, cols], x after dropout
    float *row
    float dropout           # the probability that an element is left out
    unsigned long long seed     # of dropout
    Py_ssize_t first_row    # of this thread in the batch

cdef void add_demand(Demand *demand, const Projection *projection) noexcept nogil
cdef bint reserve(Workspace *workspace, const Demand *demand, Py_ssize_t rows) noexcept nogil
cdef int reserve_or_raise(Workspace *workspace, const Demand *demand,
                          Py_ssize_t rows) except -1
cdef int reserve_one(Workspace *workspace, const Projection *projection,
                     Py_ssize_t rows) except -1
cdef void unpack_codes(const PackedMatrix *matrix, Py_ssize_t row,
                       signed char *codes) noexcept nogil
cdef void unpack_rows(const Projection *projection, Py_ssize_t first, Py_ssize_t count,
                      signed char *codes, Matrix *part) noexcept nogil
cdef void read_row(const Projection *projection, Py_ssize_t row, float *out,
                   signed char *codes) noexcept nogil
cdef void adapt(const Projection *projection, const float *x, Py_ssize_t rows, Py_ssize_t low,
                Py_ssize_t count, float *out, const Workspace *workspace) noexcept nogil
cdef void linear(const Projection *projection, const float *x, Py_ssize_t rows, float *out,
                 const Workspace *workspace) noexcept nogil
cdef void linear_backward(const Projection *projection, const float *d_out, Py_ssize_t rows,
                          bint accumulate, float *d_x, const Workspace *workspace) noexcept nogil
cdef void weight_gradient(const Projection *projection, const float *d_out, const float *x,
                          Py_ssize_t rows, float *d_weight, float *d_bias,
                          const Workspace *workspace) noexcept nogil
