ctypedef void (*task_function)(void *context, long index) noexcept nogil

cdef extern from "team.h" nogil:
    ctypedef struct thread_team:
        int members

cdef void parallel_for(task_function task, void *context, long tasks, int threads) noexcept nogil
cdef void run_team(task_function task, void *context, thread_team *team,
                   int threads) noexcept nogil
cdef void meet(thread_team *team) noexcept nogil
cdef float *scratch(Py_ssize_t floats) noexcept nogil
cdef const void *chosen() noexcept nogil
cdef void choose(const void *choice) noexcept nogil
