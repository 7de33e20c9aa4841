/* The thread pool under ThreadSanitizer, or on Windows: `make test-tsan` and tests/test_windows.py
 * compile and run this. Jobs of several
 * sizes and parallel regions run from several threads at once, while others fork. It prints the
 * number of each and returns 0, or prints failures; the sanitizer reports data races. */
#include <stdio.h>
#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "threads.h"

enum { CALLERS = 4, ROUNDS = 400, LONGEST = 97, SECONDS = 60 };

/* Forks while other threads work; in gcc's sanitizer such a child cannot create threads. */
#ifdef __clang__
enum { FORKS = 20 };
#else
enum { FORKS = 0 };
#endif

static int failures, jobs, teams, children;

static void check(int right, const char *what)
{
    if (!right) {
        fprintf(stderr, "wrong: %s\n", what);
        __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
    }
}

/* A job: every task writes its own result, and into its thread's scratch. */
struct job {
    long seed, results[LONGEST];
};

static void work(void *context, long index)
{
    struct job *job = context;
    long *scratch = thread_scratch((size_t)(64 + index % 7 * 512));
    if (scratch != NULL) {
        scratch[0] = job->seed + index;
        job->results[index] = scratch[0];
    }
}

static void run_job(long seed)
{
    struct job job = {.seed = seed};
    const long tasks = 1 + seed % LONGEST;
    pool_run(work, &job, tasks, 1 + (int)(seed % 5));
    for (long i = 0; i < tasks; i++)
        check(job.results[i] == seed + i, "a task of a job");
    __atomic_add_fetch(&jobs, 1, __ATOMIC_RELAXED);
}

/* A parallel region: in each round every thread writes, all wait at the barrier, and every thread
 * reads what the next one wrote. */
struct exchange {
    thread_team team;
    long rounds, wrong, written[2][POOL_MAX_THREADS];
};

static void gather(void *context, long index)
{
    struct exchange *all = context;
    for (long round = 0; round < all->rounds; round++) {
        long *written = all->written[round % 2];
        written[index] = round + index;
        team_barrier(&all->team);
        const long next = (index + 1) % all->team.size;
        if (written[next] != round + next)
            __atomic_add_fetch(&all->wrong, 1, __ATOMIC_RELAXED);
    }
}

static void run_region(long seed)
{
    struct exchange all = {.rounds = 1 + seed % 9};
    team_parallel_region(gather, &all, &all.team, 1 + (int)(seed % 4));
    check(all.team.size >= 1 && all.team.size <= 1 + (int)(seed % 4), "the size of a team");
    check(all.wrong == 0, "a value written before the barrier");
    __atomic_add_fetch(&teams, 1, __ATOMIC_RELAXED);
}

static void call_often(long caller)
{
    for (long i = 0; i < ROUNDS; i++)
        if ((i + caller) % 3)
            run_job(i * CALLERS + caller);
        else
            run_region(i * CALLERS + caller);
}

#ifdef _WIN32

typedef HANDLE caller_thread;

static DWORD WINAPI call(void *argument)
{
    call_often((long)(intptr_t)argument);
    return 0;
}

static int start(caller_thread *thread, long caller)
{
    *thread = CreateThread(NULL, 0, call, (void *)(intptr_t)caller, 0, NULL);
    return *thread != NULL;
}

static int join(caller_thread thread) { return WaitForSingleObject(thread, INFINITE) == 0; }
static void end_after(int seconds) { (void)seconds; }
static void fork_and_work(void) {}

#else

typedef pthread_t caller_thread;

static void *call(void *argument)
{
    call_often((long)(intptr_t)argument);
    return NULL;
}

static int start(caller_thread *thread, long caller)
{
    return pthread_create(thread, NULL, call, (void *)(intptr_t)caller) == 0;
}

static int join(caller_thread thread) { return pthread_join(thread, NULL) == 0; }
static void end_after(int seconds) { alarm((unsigned int)seconds); }

static void fork_and_work(void)
{
    int status = 1;
    const pid_t child = fork();
    if (child == 0) {
        alarm(SECONDS);
        failures = 0;
        for (long i = 0; i < 20; i++) {
            run_job(i);
            run_region(i);
        }
        _exit(failures != 0);
    }
    check(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a child");
    children++;
}

#endif

int main(void)
{
    caller_thread callers[CALLERS];

    end_after(10 * SECONDS);
    pool_prepare();
    fork_and_work();
    for (long i = 0; i < 50; i++) {
        run_job(i);
        run_region(i);
    }
    fork_and_work();
    for (long i = 0; i < CALLERS; i++)
        check(start(&callers[i], i), "a thread");
    for (int i = 0; i < FORKS; i++)
        fork_and_work();
    for (int i = 0; i < CALLERS; i++)
        check(join(callers[i]), "the end of a thread");
    fork_and_work();
    printf("%d jobs, %d teams and %d children: %d wrong\n", jobs, teams, children, failures);
    return failures != 0;
}
