from legacy1bit.kernels cimport KernelTable

# The table of the instruction set in use.
cdef const KernelTable *kernels() noexcept nogil

# The same, or the one whose packed products are the fastest: their bits are the same.
cdef const KernelTable *packed_kernels() noexcept nogil

# The calling thread's room for the products' packing; MemoryError where there is none.
cdef float *pack_buffer() except NULL
