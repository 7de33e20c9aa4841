/* A small thread pool: pool_run calls task(context, i) for every i in [0, tasks) on up to
 * `threads` threads, including the caller, and returns when all are done.
 *
 * Idle threads spin for some microseconds and then sleep: waking one costs as much as a small
 * product, but a spinning one keeps its core from other programs. Schedulers may wake a sleeper on
 * the waker's core where cores share no cache; it would wait there until the waker is done. So on
 * Linux it is kept off that core until it runs.
 *
 * Task i always runs on thread i % threads, so a task that owns its outputs gives the same bits
 * every time. One job runs at a time: while the pool is busy, with a job of another Python thread
 * or of the caller itself, further tasks run sequentially in their caller. A forked child starts
 * without workers and creates its own when it needs them.
 *
 * team_parallel_region runs one task on several threads concurrently, which synchronize with
 * team_barrier.
 *
 * thread_scratch gives every thread its own buffer, which lives as long as the thread.
 * thread_local_override is per thread; workers inherit the caller's value for each job.
 */
#ifndef LEGACY1BIT_THREADS_H
#define LEGACY1BIT_THREADS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "system_threads.h"
#include "team.h"

enum {
    POOL_MAX_THREADS = 256,
    POOL_SPINS = 1000          /* of about 50 ns each, before a thread sleeps */
};

typedef void (*pool_task)(void *context, long index);

static __thread const void *thread_local_override;

static struct {
#ifndef _WIN32
    pthread_t id;
#endif
    int asleep;                /* waiting, or just created: it may wake on any core */
#ifdef __linux__
    int affinity_narrowed;     /* and has to be restored */
    cpu_set_t affinity;
#endif
} pool_workers[POOL_MAX_THREADS];

static struct {
    system_lock lock;          /* guards everything below */
    system_condition wake, done;
    unsigned long job;         /* counter, by which workers notice a new job */
    int busy;                  /* a job is running */
    int workers;               /* threads created so far, not counting callers */
    int remaining;             /* workers that have not finished the current job */
    pool_task task;
    void *context;
    const void *override;
    long tasks;
    int threads;
} pool = {SYSTEM_LOCK_INITIALIZER, SYSTEM_CONDITION_INITIALIZER, SYSTEM_CONDITION_INITIALIZER,
          0, 0, 0, 0, NULL, NULL, NULL, 0, 0};

static inline void pool_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

/* Takes the lock; spins before it sleeps. */
static void pool_lock(void)
{
    for (int i = 0; i < POOL_SPINS; i++) {
        if (system_try_lock(&pool.lock))
            return;
        pool_pause();
    }
    system_acquire(&pool.lock);
}

static void pool_run_slice(pool_task task, void *context, long tasks, int thread, int threads)
{
    for (long i = thread; i < tasks; i += threads)
        task(context, i);
}

#ifdef __linux__

/* Keeps the sleeping ones among the first threads - 1 workers off the caller's core for their next
 * wake-up. Called with the lock held. */
static void pool_avoid_callers_core(int threads)
{
    const int here = sched_getcpu();

    for (int i = 1; i < threads; i++) {
        cpu_set_t others;
        if (here < 0 || here >= CPU_SETSIZE || !pool_workers[i].asleep)
            continue;
        if (pthread_getaffinity_np(pool_workers[i].id, sizeof others, &others))
            continue;
        pool_workers[i].affinity = others;
        CPU_CLR(here, &others);
        if (CPU_COUNT(&others) > 0)
            pool_workers[i].affinity_narrowed =
                !pthread_setaffinity_np(pool_workers[i].id, sizeof others, &others);
    }
}

static void pool_restore_affinity(int thread)
{
    if (pool_workers[thread].affinity_narrowed) {
        pthread_setaffinity_np(pthread_self(), sizeof(cpu_set_t), &pool_workers[thread].affinity);
        pool_workers[thread].affinity_narrowed = 0;
    }
}

#else

static void pool_avoid_callers_core(int threads) { (void)threads; }
static void pool_restore_affinity(int thread) { (void)thread; }

#endif

#ifdef _WIN32
static system_result SYSTEM_CALL pool_worker(void *argument)
#else
static void *pool_worker(void *argument)
#endif
{
    const int thread = (int)(intptr_t)argument;
    unsigned long seen = 0;

    for (;;) {
        for (int i = 0; i < POOL_SPINS && __atomic_load_n(&pool.job, __ATOMIC_RELAXED) == seen; i++)
            pool_pause();
        pool_lock();
        while (pool.job == seen || thread >= pool.threads) {
            seen = pool.job;
            pool_workers[thread].asleep = 1;
            system_wait(&pool.wake, &pool.lock);
        }
        seen = pool.job;
        pool_workers[thread].asleep = 0;
        pool_restore_affinity(thread);
        const pool_task task = pool.task;
        void *const context = pool.context;
        const long tasks = pool.tasks;
        const int threads = pool.threads;
        thread_local_override = pool.override;
        system_release(&pool.lock);
        pool_run_slice(task, context, tasks, thread, threads);
        pool_lock();
        if (__atomic_sub_fetch(&pool.remaining, 1, __ATOMIC_RELAXED) == 0)
            system_signal(&pool.done);
        system_release(&pool.lock);
    }
    return 0;
}

static system_key scratch_key;

#ifdef _WIN32

static void pool_prepare(void) { system_make_key(&scratch_key); }

/* Whether worker `next` was started. */
static int pool_start(int next) { return system_start(pool_worker, (void *)(intptr_t)next); }

#else

static void pool_after_fork(void)
{
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.busy = pool.workers = pool.remaining = 0;
    pool.threads = 0;
    memset(pool_workers, 0, sizeof pool_workers);   /* the parent's affinities do not apply */
}

static void pool_prepare(void)
{
    pthread_atfork(NULL, NULL, pool_after_fork);
    system_make_key(&scratch_key);
}

/* Whether worker `next` was started. Workers block all signals. */
static int pool_start(int next)
{
    sigset_t all, before;
    int started;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    started = !pthread_create(&pool_workers[next].id, NULL, pool_worker, (void *)(intptr_t)next);
    if (started)
        pthread_detach(pool_workers[next].id);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return started;
}

#endif

/* At least `bytes` uninitialized bytes, aligned to a cache line; NULL if out of memory. The first
 * cache line of the block stores its size. */
static void *thread_scratch(size_t bytes)
{
    char *block = system_get(scratch_key);
    size_t size = 0;

    if (block)
        memcpy(&size, block, sizeof size);
    if (size < bytes) {
        system_free(block);
        block = system_aligned(64, bytes + 64);
        if (block)
            memcpy(block, &bytes, sizeof bytes);
        system_set(scratch_key, block);
    }
    return block ? block + 64 : NULL;
}

/* Creates workers until there are `wanted`, or as many as the system allows. Called with the lock
 * held. */
static void pool_grow(int wanted)
{
    while (pool.workers < wanted && pool_start(pool.workers + 1)) {
        pool.workers++;
        pool_workers[pool.workers].asleep = 1;
    }
}

/* Returns the number of threads that the caller gets: up to `threads`, including itself. If it is
 * more than 1, the caller owns the pool until pool_dispatch has returned; 1 acquires nothing. */
static int pool_acquire(int threads)
{
    if (threads > POOL_MAX_THREADS)
        threads = POOL_MAX_THREADS;
    if (threads > 1) {
        system_acquire(&pool.lock);
        if (!pool.busy) {
            pool_grow(threads - 1);
            threads = pool.workers + 1 < threads ? pool.workers + 1 : threads;
        } else {
            threads = 1;
        }
        if (threads > 1)
            pool.busy = 1;
        system_release(&pool.lock);
    }
    return threads;
}

/* Distributes the tasks over the acquired threads, waits for them and releases the pool. */
static void pool_dispatch(pool_task task, void *context, long tasks, int threads)
{
    system_acquire(&pool.lock);
    pool.task = task;
    pool.context = context;
    pool.override = thread_local_override;
    pool.tasks = tasks;
    pool.threads = threads;
    pool.remaining = threads - 1;
    pool_avoid_callers_core(threads);
    __atomic_add_fetch(&pool.job, 1, __ATOMIC_RELAXED);
    system_broadcast(&pool.wake);
    system_release(&pool.lock);
    pool_run_slice(task, context, tasks, 0, threads);
    for (int i = 0; i < POOL_SPINS && __atomic_load_n(&pool.remaining, __ATOMIC_RELAXED); i++)
        pool_pause();
    pool_lock();
    while (pool.remaining)
        system_wait(&pool.done, &pool.lock);
    pool.busy = 0;
    pool.threads = 0;
    system_release(&pool.lock);
}

static void pool_run(pool_task task, void *context, long tasks, int threads)
{
    threads = pool_acquire(threads < tasks ? threads : (int)tasks);
    if (threads > 1)
        pool_dispatch(task, context, tasks, threads);
    else
        pool_run_slice(task, context, tasks, 0, 1);
}

/* Calls task(context, i) concurrently for every i in [0, team->size); the size is the number of
 * threads that the caller gets, up to `threads`. */
static void team_parallel_region(pool_task task, void *context, thread_team *team, int threads)
{
    team->size = pool_acquire(threads);
    team->arrived = 0;
    team->generation = 0;
    if (team->size > 1)
        pool_dispatch(task, context, team->size, team->size);
    else
        task(context, 0);
}

/* Returns when every thread of the team has called it; earlier writes are visible to all. */
static inline void team_barrier(thread_team *team)
{
    unsigned int generation;
    if (team->size == 1)
        return;
    generation = __atomic_load_n(&team->generation, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == team->size) {
        __atomic_store_n(&team->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&team->generation, generation + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&team->generation, __ATOMIC_ACQUIRE) == generation; spins++)
        if (spins < POOL_SPINS)
            pool_pause();
        else
            system_yield();    /* the missing thread may be waiting for this core */
}

#endif
