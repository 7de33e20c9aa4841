"""The thread pool of the package, and the number of cores that it may use."""

import os

from legacy1bit.system.cgroups import core_quotas

from legacy1bit.threads cimport task_function, thread_team

cdef extern from "threads.h" nogil:
    void pool_prepare()
    void pool_run(task_function task, void *context, long tasks, int threads)
    void team_parallel_region(task_function task, void *context, thread_team *team, int threads)
    void team_barrier(thread_team *team)
    void *thread_scratch(size_t bytes)
    const void *thread_local_override

pool_prepare()


cdef void parallel_for(task_function task, void *context, long tasks, int threads) noexcept nogil:
    # Runs task(context, 0) ... task(context, tasks - 1); task i always on thread i % threads.
    pool_run(task, context, tasks, threads)


cdef void parallel_region(task_function task, void *context, thread_team *team,
                          int threads) noexcept nogil:
    # Runs task(context, 0) ... task(context, team.size - 1) concurrently.
    team_parallel_region(task, context, team, threads)


cdef void barrier(thread_team *team) noexcept nogil:
    # Returns when every thread of the team has called it.
    team_barrier(team)


cdef float *scratch(Py_ssize_t floats) noexcept nogil:
    # The calling thread's own buffer, aligned for any vector; NULL if out of memory.
    return <float *>thread_scratch(floats * sizeof(float))


cdef const void *thread_override() noexcept nogil:
    # The override of the calling thread, which its workers inherit; NULL if there is none.
    return thread_local_override


cdef void set_thread_override(const void *override) noexcept nogil:
    global thread_local_override
    thread_local_override = override


def available_cores() -> int:
    """Return the number of cores this process may use: at least 1.

    That is its CPU affinity where it is known, limited by the quota of its control group, rounded
    up (Linux, versions 1 and 2).
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min([cores] + core_quotas()))


def default_threads() -> int:
    """Return the default number of threads: LEGACY1BIT_THREADS, or all cores.

    Never more than ``available_cores()``. Raises ``ValueError`` if the variable is not a number
    from 1 on.
    """
    wanted = os.environ.get("LEGACY1BIT_THREADS", "")
    if not wanted:
        return available_cores()
    if not (wanted.isascii() and wanted.isdecimal() and 0 < len(wanted) < 10 and int(wanted)):
        raise ValueError(f"LEGACY1BIT_THREADS is {wanted!r}, expected a whole number from 1 on")
    return min(int(wanted), available_cores())
