ctypedef void (*task_function)(void *context, long index) noexcept nogil

cdef extern from "team.h" nogil:
    ctypedef struct thread_team:
        int size

cdef void parallel_for(task_function task, void *context, long tasks, int threads) noexcept nogil
cdef void parallel_region(task_function task, void *context, thread_team *team,
                          int threads) noexcept nogil
cdef void barrier(thread_team *team) noexcept nogil
cdef float *scratch(Py_ssize_t floats) noexcept nogil
cdef const void *thread_override() noexcept nogil
cdef void set_thread_override(const void *override) noexcept nogil
