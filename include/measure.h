/* Timers for the kernels. Built with MEASURE_PERFORMANCE=1, every kernel counts its calls and
 * nanoseconds; otherwise START_TIMER and STOP_TIMER expand to nothing.
 *
 * The C original's macros of the same names print a line at every call; here each timer adds to a
 * counter, so that timing a kernel of one microsecond does not include writing to stderr. */
#ifndef LEGACY1BIT_MEASURE_H
#define LEGACY1BIT_MEASURE_H

enum timer {
    TIMER_MATMUL,
    TIMER_MATRIX_VECTOR,
    TIMER_PACKED,
    TIMER_ATTENTION_FORWARD,
    TIMER_ATTENTION_BACKWARD,
    TIMER_LAYER_NORM_FORWARD,
    TIMER_LAYER_NORM_BACKWARD,
    TIMER_ROTARY,
    TIMER_ACTIVATION,
    TIMER_SOFTMAX,
    TIMER_CROSS_ENTROPY,
    TIMER_QUANTIZE,
    TIMER_OPTIMIZER,
    TIMER_VECTOR,
    TIMER_COUNT
};

#define TIMER_NAMES                                                                          \
    "matmul", "matrix_vector", "packed_product", "attention_forward", "attention_backward",  \
    "layer_norm_forward", "layer_norm_backward", "rotary", "activation", "softmax",          \
    "cross_entropy", "quantize", "optimizer", "vector"

typedef struct {
    unsigned long long calls, nanoseconds;
} timer_counter;

#ifdef MEASURE_PERFORMANCE

#include <time.h>

enum { MEASURING = 1 };

static timer_counter timer_counters[TIMER_COUNT];

static inline unsigned long long timer_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (unsigned long long)now.tv_sec * 1000000000ull + (unsigned long long)now.tv_nsec;
}

/* Kernels run in several threads at once, so the counters are atomic. */
#define START_TIMER(timer) const unsigned long long timer_start = timer_now()
#define STOP_TIMER(timer)                                                                    \
    (__atomic_fetch_add(&timer_counters[timer].nanoseconds, timer_now() - timer_start,       \
                        __ATOMIC_RELAXED),                                                   \
     __atomic_fetch_add(&timer_counters[timer].calls, 1, __ATOMIC_RELAXED))

static inline timer_counter timer_read(int timer) { return timer_counters[timer]; }

#else

enum { MEASURING = 0 };

#define START_TIMER(timer) ((void)0)
#define STOP_TIMER(timer) ((void)0)

static inline timer_counter timer_read(int timer)
{
    timer_counter none = {0, 0};
    (void)timer;
    return none;
}

#endif

static inline const char *timer_name(int timer)
{
    static const char *const names[TIMER_COUNT] = {TIMER_NAMES};
    return names[timer];
}

#endif
