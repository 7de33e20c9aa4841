/* Detects the widest instruction set that CPU and operating system support, as a ladder from the
 * narrowest tier to the widest: a CPU has all that are below its own, but for CPU_AVXVNNI, which
 * those with AVX-512 may lack. On x86 a vector unit counts only when the operating system saves its
 * registers (XGETBV), and the matrix unit when it grants it to the process, regardless of cpuid. */
#ifndef LEGACY1BIT_CPU_H
#define LEGACY1BIT_CPU_H

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum cpu_tier {
    CPU_SCALAR, CPU_SSE, CPU_SSE2, CPU_SSSE3, CPU_SSE41, CPU_AVX2, CPU_AVXVNNI,
    CPU_AVX512, CPU_AVX512VNNI, CPU_AVX512BF16, CPU_AMX
};

#define CPU_TIERS "scalar sse sse2 ssse3 sse41 avx2 avxvnni avx512 avx512vnni avx512bf16 amx"

static inline unsigned long long cpu_saved_state(void)
{
    unsigned int low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((unsigned long long)high << 32) | low;
}

/* Whether a CPU with AVX2 has a dot product of int8 vectors of 256 bits without AVX-512. */
static inline int cpu_has_avx_vnni(void)
{
    const unsigned int vnni = 1u << 4;                               /* leaf 7.1, eax */
    unsigned int eax, ebx, ecx, edx;

    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & vnni);
}

/* Whether there is a matrix unit for bfloat16 and int8, as edx of leaf 7 says; the system saves its
 * tiles, as XCR0 says; and it grants them to this process, in all threads from now on. Emulated
 * tiles, as in checked builds, need none of that. */
static inline int cpu_has_amx(unsigned int features, unsigned long long state)
{
#if defined(EMULATED_TILES)
    (void)features, (void)state;
    return 1;
#elif defined(__x86_64__) && defined(SYS_arch_prctl)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    const unsigned int amx = 1u << 22 | 1u << 24 | 1u << 25;         /* BF16 TILE INT8 */
    const unsigned long long tiles = 0x60000;

    return (features & amx) == amx && (state & tiles) == tiles
           && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    (void)features, (void)state;
    return 0;
#endif
}

static inline int cpu_widest_tier(void)
{
    const unsigned int sse = 1u << 25, sse2 = 1u << 26;              /* leaf 1, edx */
    const unsigned int ssse3 = 1u << 9, sse41 = 1u << 19;            /* leaf 1, ecx */
    const unsigned int fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28;      /* leaf 1, ecx */
    const unsigned int avx2 = 1u << 5;                               /* leaf 7, ebx */
    const unsigned int avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;      /* F DQ BW VL */
    const unsigned int vnni = 1u << 11;                              /* leaf 7, ecx */
    const unsigned int bf16 = 1u << 5;                               /* leaf 7.1, eax */
    const unsigned long long ymm = 0x06, zmm = 0xe6;                 /* bits of XCR0 */
    unsigned int eax, ebx, ecx, edx, features;
    unsigned long long state;

    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(edx & sse))
        return CPU_SCALAR;
    if (!(edx & sse2))
        return CPU_SSE;
    if (!(ecx & ssse3))
        return CPU_SSE2;
    if (!(ecx & sse41))
        return CPU_SSSE3;
    features = ecx;
    if (!(features & osxsave) || !(features & avx) || !(features & fma))
        return CPU_SSE41;
    state = cpu_saved_state();
    if ((state & ymm) != ymm)
        return CPU_SSE41;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & avx2))
        return CPU_SSE41;
    if ((ebx & avx512) != avx512 || (state & zmm) != zmm)
        return cpu_has_avx_vnni() ? CPU_AVXVNNI : CPU_AVX2;
    if (!(ecx & vnni))
        return CPU_AVX512;
    features = edx;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & bf16))
        return CPU_AVX512VNNI;
    return cpu_has_amx(features, state) ? CPU_AMX : CPU_AVX512BF16;
}

/* The bytes of a core's data cache of a level, 1 or 2; 0 if the CPU does not say. Intel lists its
 * caches in leaf 4, AMD since Zen the same way in leaf 0x8000001D, and before in two leaves of their
 * own. */
static inline long cpu_cache_bytes(int level)
{
    const unsigned int lists[] = {4, 0x8000001D};
    unsigned int eax, ebx, ecx, edx;

    for (int list = 0; list < 2; list++)
        for (unsigned int i = 0; i < 16 && __get_cpuid_count(lists[list], i, &eax, &ebx, &ecx, &edx)
                                 && (eax & 31); i++)
            if ((eax & 31) != 2 && (int)(eax >> 5 & 7) == level)
                return (long)((ebx >> 22) + 1) * ((ebx >> 12 & 1023) + 1) * ((ebx & 4095) + 1)
                       * (ecx + 1L);
    if (level == 1 && __get_cpuid(0x80000005, &eax, &ebx, &ecx, &edx))
        return (long)(ecx >> 24) << 10;
    if (level == 2 && __get_cpuid(0x80000006, &eax, &ebx, &ecx, &edx))
        return (long)(ecx >> 16) << 10;
    return 0;
}

/* Whether the CPU has all of x86-64-v2, which other packages are compiled for. */
static inline int cpu_has_x86_64_v2(void)
{
    const unsigned int sse3 = 1u << 0, ssse3 = 1u << 9, cx16 = 1u << 13;        /* leaf 1, ecx */
    const unsigned int sse41 = 1u << 19, sse42 = 1u << 20, popcnt = 1u << 23;   /* leaf 1, ecx */
    const unsigned int lahf = 1u << 0;                               /* leaf 0x80000001, ecx */
    const unsigned int all = sse3 | ssse3 | cx16 | sse41 | sse42 | popcnt;
    unsigned int eax, ebx, ecx, edx;

    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & all) != all)
        return 0;
    return __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) && (ecx & lahf);
}

#else

static inline int cpu_has_avx_vnni(void) { return 0; }
static inline int cpu_has_x86_64_v2(void) { return 1; }

#if defined(__aarch64__)

enum cpu_tier { CPU_SCALAR, CPU_NEON, CPU_NEONDOT, CPU_I8MM };

#define CPU_TIERS "scalar neon neondot i8mm"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#include <sys/types.h>

/* A number that the system knows by a name; 0 if it does not. */
static inline long long cpu_number(const char *name)
{
    long long number = 0;
    size_t bytes = sizeof number;
    return sysctlbyname(name, &number, &bytes, NULL, 0) == 0 ? number : 0;
}

static inline int cpu_widest_tier(void)
{
    if (!cpu_number("hw.optional.arm.FEAT_DotProd"))
        return CPU_NEON;
    return cpu_number("hw.optional.arm.FEAT_I8MM") ? CPU_I8MM : CPU_NEONDOT;
}

/* Those of the fast cores, of which perflevel0 is the first kind. */
static inline long cpu_cache_bytes(int level)
{
    const long long bytes = cpu_number(level == 1 ? "hw.perflevel0.l1dcachesize"
                                                  : "hw.perflevel0.l2cachesize");
    return (long)(bytes ? bytes : cpu_number(level == 1 ? "hw.l1dcachesize" : "hw.l2cachesize"));
}

#elif defined(__linux__)
#include <stdio.h>
#include <sys/auxv.h>

static inline int cpu_widest_tier(void)
{
    const unsigned long asimddp = 1ul << 20, i8mm = 1ul << 13;       /* AT_HWCAP, AT_HWCAP2 */

    if (!(getauxval(AT_HWCAP) & asimddp))
        return CPU_NEON;
    return getauxval(AT_HWCAP2) & i8mm ? CPU_I8MM : CPU_NEONDOT;
}

/* As the system lists the caches of the first core; those for instructions alone do not count. */
static inline long cpu_cache_bytes(int level)
{
    for (int i = 0; i < 16; i++) {
        const char *const names[] = {"level", "type", "size"};
        char text[3][32] = {{0}, {0}, {0}}, path[80];
        long kib = 0;
        for (int j = 0; j < 3; j++) {
            FILE *file;
            snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", i,
                     names[j]);
            file = fopen(path, "r");
            if (!file)
                return 0;
            if (!fgets(text[j], sizeof text[j], file))
                text[j][0] = 0;
            fclose(file);
        }
        if (text[0][0] == '0' + level && text[1][0] != 'I' && sscanf(text[2], "%ldK", &kib) == 1)
            return kib << 10;
    }
    return 0;
}

#else

static inline int cpu_widest_tier(void) { return CPU_NEON; }
static inline long cpu_cache_bytes(int level) { (void)level; return 0; }

#endif
#else

enum cpu_tier { CPU_SCALAR };

#define CPU_TIERS "scalar"

static inline int cpu_widest_tier(void) { return CPU_SCALAR; }
static inline long cpu_cache_bytes(int level) { (void)level; return 0; }

#endif
#endif
#endif
