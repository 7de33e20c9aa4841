/* What the thread pool needs of the operating system: POSIX threads, or those of Windows. */
#ifndef LEGACY1BIT_SYSTEM_THREADS_H
#define LEGACY1BIT_SYSTEM_THREADS_H

#include <stdlib.h>

#ifdef _WIN32

#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#include <malloc.h>

typedef SRWLOCK system_lock;
typedef CONDITION_VARIABLE system_condition;
typedef DWORD system_key;           /* of a value that each thread has for itself */

#define SYSTEM_LOCK_INITIALIZER SRWLOCK_INIT
#define SYSTEM_CONDITION_INITIALIZER CONDITION_VARIABLE_INIT

static inline int system_try_lock(system_lock *lock) { return TryAcquireSRWLockExclusive(lock); }
static inline void system_acquire(system_lock *lock) { AcquireSRWLockExclusive(lock); }
static inline void system_release(system_lock *lock) { ReleaseSRWLockExclusive(lock); }
static inline void system_signal(system_condition *condition) { WakeConditionVariable(condition); }
static inline void system_broadcast(system_condition *condition) { WakeAllConditionVariable(condition); }

static inline void system_wait(system_condition *condition, system_lock *lock)
{
    SleepConditionVariableSRW(condition, lock, INFINITE, 0);
}

static inline void system_yield(void) { SwitchToThread(); }

static inline void *system_aligned(size_t alignment, size_t bytes)
{
    return _aligned_malloc(bytes, alignment);
}

static inline void system_free(void *block) { _aligned_free(block); }

/* Frees the value of a thread that ends. */
static VOID NTAPI system_end_of_thread(PVOID value)
{
    if (value)
        _aligned_free(value);
}

static inline void system_make_key(system_key *key) { *key = FlsAlloc(system_end_of_thread); }
static inline void *system_get(system_key key) { return FlsGetValue(key); }
static inline void system_set(system_key key, void *value) { FlsSetValue(key, value); }

typedef DWORD system_result;
#define SYSTEM_CALL WINAPI

/* Whether a thread was started, which nobody waits for. */
static inline int system_start(system_result (SYSTEM_CALL *call)(void *), void *argument)
{
    const HANDLE thread = CreateThread(NULL, 0, call, argument, 0, NULL);
    if (thread)
        CloseHandle(thread);
    return thread != NULL;
}

#else

#include <pthread.h>
#include <sched.h>
#include <signal.h>

typedef pthread_mutex_t system_lock;
typedef pthread_cond_t system_condition;
typedef pthread_key_t system_key;

#define SYSTEM_LOCK_INITIALIZER PTHREAD_MUTEX_INITIALIZER
#define SYSTEM_CONDITION_INITIALIZER PTHREAD_COND_INITIALIZER

static inline int system_try_lock(system_lock *lock) { return pthread_mutex_trylock(lock) == 0; }
static inline void system_acquire(system_lock *lock) { pthread_mutex_lock(lock); }
static inline void system_release(system_lock *lock) { pthread_mutex_unlock(lock); }
static inline void system_signal(system_condition *condition) { pthread_cond_signal(condition); }
static inline void system_broadcast(system_condition *condition) { pthread_cond_broadcast(condition); }

static inline void system_wait(system_condition *condition, system_lock *lock)
{
    pthread_cond_wait(condition, lock);
}

static inline void system_yield(void) { sched_yield(); }

static inline void *system_aligned(size_t alignment, size_t bytes)
{
    void *block;
    return posix_memalign(&block, alignment, bytes) ? NULL : block;
}

static inline void system_free(void *block) { free(block); }
static inline void system_make_key(system_key *key) { pthread_key_create(key, free); }
static inline void *system_get(system_key key) { return pthread_getspecific(key); }
static inline void system_set(system_key key, void *value) { pthread_setspecific(key, value); }

#endif
#endif
