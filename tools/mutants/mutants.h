/* The switch of the mutation check: which seeded fault this process has, from the environment
 * variable LEGACY1BIT_MUTANT, asked for once more after a fork; and which functions it has entered,
 * marked in the file that LEGACY1BIT_REACHED names. */
#ifndef LEGACY1BIT_MUTANTS_H
#define LEGACY1BIT_MUTANTS_H

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int mutant_chosen = -1;          /* 0: none; -1: not asked yet */
static unsigned char *mutant_reached;

__attribute__((cold, noinline)) static void mutant_ask(void)
{
    const char *number = getenv("LEGACY1BIT_MUTANT"), *path = getenv("LEGACY1BIT_REACHED");
    if (path && !mutant_reached) {
        const int file = open(path, O_RDWR);
        struct stat about;
        if (file >= 0 && !fstat(file, &about))
            mutant_reached = mmap(NULL, (size_t)about.st_size, PROT_READ | PROT_WRITE, MAP_SHARED,
                                  file, 0);
        close(file);
    }
    mutant_chosen = number ? atoi(number) : 0;
}

static void mutant_forget(void) { mutant_chosen = -1; }

__attribute__((constructor)) static void mutant_prepare(void)
{
    pthread_atfork(NULL, NULL, mutant_forget);
}

/* Whether the fault is one of the `count` from `first` on, which are this function's. */
static inline __attribute__((always_inline)) int mutant_here(int first, int count, int function)
{
    if (__builtin_expect(mutant_chosen < 0, 0))
        mutant_ask();
    if (__builtin_expect(mutant_reached != NULL, 0))
        mutant_reached[function] = 1;
    return __builtin_expect((unsigned)(mutant_chosen - first) < (unsigned)count, 0);
}

#endif
