from legacy1bit.kernels cimport KernelTable

# The table of the instruction set in use.
cdef const KernelTable *kernels() noexcept nogil

# The same, or the one whose packed products are the fastest: their bits are the same.
cdef const KernelTable *packed_kernels() noexcept nogil

# The calling thread's buffer for packing in products; MemoryError if out of memory.
cdef float *pack_buffer() except NULL
