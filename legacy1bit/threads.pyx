"""The one thread pool of the package, and how many cores it may use."""

import os

from legacy1bit.threads cimport task_function

cdef extern from "threads.h" nogil:
    void pool_prepare()
    void pool_run(task_function task, void *context, long tasks, int threads)
    void *thread_scratch(size_t bytes)

pool_prepare()


cdef void parallel_for(task_function task, void *context, long tasks, int threads) noexcept nogil:
    # task(context, 0) ... task(context, tasks - 1); task i always on thread i % threads.
    pool_run(task, context, tasks, threads)


cdef float *scratch(Py_ssize_t floats) noexcept nogil:
    # A buffer of the calling thread's own, aligned for any vector; NULL when memory is short.
    return <float *>thread_scratch(floats * sizeof(float))


def available_cores() -> int:
    """Return the number of cores this process may use: its CPU affinity where that is known."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
