from legacy1bit.kernels cimport KernelTable

cdef const KernelTable *kernels() noexcept nogil
