ctypedef void (*task_function)(void *context, long index) noexcept nogil

cdef void parallel_for(task_function task, void *context, long tasks, int threads) noexcept nogil
cdef float *scratch(Py_ssize_t floats) noexcept nogil
