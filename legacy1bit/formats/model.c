/* A language model in one file: how it works comes first, its weights are at the end.
 *
$description
 *
 * To compile and to run it:
 *
 *     cc -std=c99 -O2 -o model model.c -lm
 *     ./model "Once upon a time" 250 0.8 1
 *
 * The arguments are the prompt, how many tokens to write (250), the temperature (0.8; at 0 every
 * token is the likeliest one) and the seed of the random numbers (0). The prompt and its
 * continuation go to standard output, everything else to standard error.
 *
 * Where the compiler may use the SSE instructions of a Pentium III, the products with codes do;
 * -DUSE_SSE=0 leaves them out. Every operation that is rounded has its order and its place, so that
 * the text is the same everywhere. For such a CPU:
 *
 *     gcc -m32 -march=pentium3 -mfpmath=sse -std=c99 -O2 -o model model.c -lm
 *
 * Not with -ffast-math, and with gcc always with -std=c99: roundings must keep their place. */

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef USE_SSE
#ifdef __SSE__
#define USE_SSE 1
#else
#define USE_SSE 0
#endif
#endif

#if USE_SSE
#include <xmmintrin.h>
#endif

#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

enum {
    VOCAB = $vocab_size, /* tokens: the bytes from 0 on */
    DIM = $model_dim, /* the width of the residual stream */
    BLOCKS = $num_blocks, /* transformer blocks */
    HEADS = $num_heads, /* attention heads in each */
$if heads
    KV_HEADS = $num_kv_heads, /* heads of keys and values, which as many others share */
$end
    FFN = $ffn_dim, /* the width of the feed-forward layers */
    CONTEXT = $sequence_length, /* the longest sequence, in tokens */
$if spans
$else
    SPAN = $span, /* how many tokens back one sees, itself included; 0: all */
$end
    ROPE = $rope, /* whether attention knows positions */
$if relu relu2
    SQUARED = $squared, /* whether ReLU is squared */
$end
    LOWEST = $lowest, /* the first of the values that codes stand for, */
    STEP = $step, /* and how far apart they are */
    ONE_SCALE = $one_scale, /* whether a matrix has one scale; else each row has its own, or */
    GROUP = $group, /* so many neighbours in a row, where it has more of them */

$if heads
    HEAD_DIM = $head_dim, /* the width of a head, */
    QUERY_DIM = HEADS * HEAD_DIM, /* of all queries, */
    KV_DIM = KV_HEADS * HEAD_DIM, /* and of all keys, or values */
$else
    HEAD_DIM = DIM / HEADS,
$end
    BASE = $base, /* how many values there are */
    PACKED = $packed, /* codes in a word at the end of this file: the digits of a number, */
    CODES = 16, /* and in memory, two bits each */
    WORDS = $words, /* of codes in memory */
    PLACES = 16, /* in which sums are added up */
    MOST_SUM = 16900000, /* 127 times that is what 32 bits hold */
    MOST_LEVELS = 32767,
    QUERY_LEVELS = MOST_SUM / HEAD_DIM < MOST_LEVELS ? MOST_SUM / HEAD_DIM : MOST_LEVELS,
    LINE_BREAK = 10
};

#define ROPE_BASE $rope_base
#define EPSILON $epsilon /* keeps $norms from dividing by zero */

/* ------------------------------------------------------------------------------------------
 * The weights
 *
 * A matrix of codes has a few whole numbers times scales. Other matrices are bfloat16: the upper
 * halves of floats. What a model lacks is NULL. */

struct matrix {
    const uint32_t *packed;     /* [rows * cols / PACKED, rounded up], or */
    const uint16_t *upper;      /* [rows][cols] */
    const float *scales;        /* of the codes */
    const float *bias;          /* [rows] */
    int rows, cols;
    long first;                 /* where its words are in memory: [rows][cols / CODES, rounded up] */
};

struct norm {
    const float *gamma, *beta;
};

struct block {
    struct norm norm1, heads_norm, norm2, hidden_norm;
    struct matrix wq, wk, wv, wo, wi, wo_ffn;
$if gated
    struct matrix wg;           /* the gate of the feed-forward layer */
$end
$if qk_norm
    const float *q_gamma, *k_gamma;     /* [HEAD_DIM] */
$end
$if spans
    int span;                   /* how many tokens back one sees, itself included; 0: all */
$end
};

extern const struct block blocks[BLOCKS];
extern const struct matrix embedding, output;
extern const struct norm final_norm;

/* ------------------------------------------------------------------------------------------
 * All the memory there is: its size is known beforehand. */

#if USE_SSE
typedef float whole;            /* holds whole numbers, exactly up to 2^24 */
#else
typedef signed char whole;
#endif

struct state {
    /* Two arrays that SSE reads in fours: they come first, to be aligned as the struct is. */
    whole levels[256][4];       /* the four values that a byte of codes stands for */
    whole rounded[($wide + CODES - 1) / CODES * CODES];   /* the input of products, as int8 holds */
    uint32_t words[WORDS];      /* the codes of all matrices, the first in a word's lowest bits */
    float step;                 /* what the input's whole numbers count */
    float input[$wide];           /* the same before it was rounded */
    float stream[DIM];          /* the residual stream of the token that is read */
    float q[$query_dim], k[$kv_dim], v[$kv_dim], heads[$query_dim], hidden[FFN], logits[VOCAB];
$if gated
    float gate[FFN];
$end
    float cosines[HEAD_DIM], sines[HEAD_DIM];           /* of the token's position */
    float attention[CONTEXT];   /* what each key is worth to the query */
    double chances[VOCAB];      /* of tokens to be drawn */
    signed char codes[$wide];
    /* The cache: keys and values of the tokens so far, with a step for each head's. */
    float key_steps[BLOCKS][CONTEXT][$kv_heads], value_steps[BLOCKS][CONTEXT][$kv_heads];
    signed char keys[BLOCKS][CONTEXT][$kv_dim], values[BLOCKS][CONTEXT][$kv_dim];
    unsigned char text[CONTEXT + 1];                    /* the tokens of the context */
};

/* Codes as they are in the file become those in memory. */
static void unpack(struct state *s, const struct matrix *matrix)
{
    const uint32_t *packed = matrix->packed;
    uint32_t *words = s->words + matrix->first, digits = 0;
    int row, col, left = 0;
    if (packed == NULL)
        return;
    for (row = 0; row < matrix->rows; row++, words += (matrix->cols + CODES - 1) / CODES)
        for (col = 0; col < matrix->cols; col++, left--, digits /= BASE) {
            if (left == 0) {
                digits = *packed++;
                left = PACKED;
            }
            words[col / CODES] |= digits % BASE << 2 * (col % CODES);
        }
}

static struct state *create_state(void)
{
    const size_t size = sizeof(struct state) + 15;
    unsigned char *room = malloc(size);
    struct state *s;
    int byte, i;
    fprintf(stderr, "memory: %lu bytes\n", (unsigned long)size);
    if (room == NULL)
        return NULL;
    s = (struct state *)(void *)(room + (16 - (uintptr_t)room % 16) % 16);
    for (byte = 0; byte < 256; byte++)
        for (i = 0; i < 4; i++)
            s->levels[byte][i] = (whole)(LOWEST + STEP * ((byte >> 2 * i) & 3));
    memset(s->words, 0, sizeof s->words);
    unpack(s, &embedding);
    unpack(s, &output);
    for (i = 0; i < BLOCKS; i++) {
        const struct block *b = &blocks[i];
        unpack(s, &b->wq);
        unpack(s, &b->wk);
        unpack(s, &b->wv);
        unpack(s, &b->wo);
$if gated
        unpack(s, &b->wg);
$end
        unpack(s, &b->wi);
        unpack(s, &b->wo_ffn);
    }
    return s;
}

/* ------------------------------------------------------------------------------------------
 * Sums and products */

/* What a float holds of a result. The registers of an x87 keep more digits than that, until a
 * number is stored. */
static float stored(float x)
{
#if FLT_EVAL_METHOD == 0
    return x;
#else
    volatile float memory = x;
    return memory;
#endif
}

/* Sums of floats depend on their order. This one suits vectors of any length: number i is added to
 * place i % PLACES, and then the upper half of the places to the lower, until one is left. */
static float sum_of_places(float *places)
{
    int half, i;
    for (half = PLACES / 2; half > 0; half /= 2)
        for (i = 0; i < half; i++)
            places[i] = stored(places[i] + places[i + half]);
    return places[0];
}

static float sum(const float *x, int count)
{
    float places[PLACES] = {0.0f};
    int i;
    for (i = 0; i < count; i++)
        places[i % PLACES] = stored(places[i % PLACES] + x[i]);
    return sum_of_places(places);
}

static float sum_of_squares(const float *x, float centre, int count)
{
    float places[PLACES] = {0.0f};
    int i;
    for (i = 0; i < count; i++) {
        const float d = stored(x[i] - centre);
        places[i % PLACES] = stored(places[i % PLACES] + stored(d * d));
    }
    return sum_of_places(places);
}

static float from_upper(uint16_t upper)
{
    const uint32_t bits = (uint32_t)upper << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The step of which numbers are rounded to whole multiples, up to `levels`: the largest of them over
 * that. It is NaN where one of them is not finite. Where all are rounded to 0, its inverse is 0. */
static float find_step(const float *x, int count, float levels, float *inverse)
{
    float top = 0.0f, step;
    int i, finite = 1;
    for (i = 0; i < count; i++) {
        top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
        finite = finite && isfinite(x[i]);
    }
    step = finite ? stored(top / levels) : NAN;
    *inverse = step > 0.0f ? stored(levels / top) : 0.0f;
    if (!isfinite(*inverse))
        *inverse = 0.0f;        /* the numbers are too small to tell from zeros */
    return step;
}

static float round_to_int8(const float *x, int count, signed char *codes)
{
    float inverse;
    const float step = find_step(x, count, 127.0f, &inverse);
    int i;
    for (i = 0; i < count; i++)
        codes[i] = inverse > 0.0f ? (signed char)lrintf(stored(inverse * x[i])) : 0;
    return step;
}

$if layer
/* Layer norm (Ba, Kiros & Hinton, arXiv 1607.06450). */
static void normalise(const struct norm *norm, const float *x, int count, float *out)
{
    const float mean = stored(sum(x, count) / (float)count);
    const float variance = stored(sum_of_squares(x, mean, count) / (float)count);
    const float deviation = stored(sqrtf(stored(variance + EPSILON)));
    int i;
    if (fabsf(mean) <= stored(1e3f * deviation) && deviation < INFINITY) {
        const float spread = stored((float)(1.0 / deviation));
        for (i = 0; i < count; i++) {
            const float normed = stored(stored(x[i] - mean) * spread);
$if norm_bias
            out[i] = stored(stored(normed * norm->gamma[i]) + norm->beta[i]);
$else
            out[i] = stored(normed * norm->gamma[i]);
$end
        }
    } else {
        /* The squares overflow, or the mean's rounding is not small beside the spread. */
        double centre = 0.0, total = 0.0, spread;
        for (i = 0; i < count; i++)
            centre += x[i];
        centre /= count;
        for (i = 0; i < count; i++)
            total += (x[i] - centre) * (x[i] - centre);
        spread = 1.0 / sqrt(total / count + EPSILON);
        for (i = 0; i < count; i++) {
            const float normed = stored((float)((x[i] - centre) * spread));
$if norm_bias
            out[i] = stored(stored(normed * norm->gamma[i]) + norm->beta[i]);
$else
            out[i] = stored(normed * norm->gamma[i]);
$end
        }
    }
}

$end
$if rms qk_norm
/* RMS norm (Zhang & Sennrich, arXiv 1910.07467); out may be x. */
static void normalise_rms(const float *gamma, const float *x, int count, float *out)
{
    const float square = stored(sum_of_squares(x, 0.0f, count) / (float)count);
    const float root = stored(sqrtf(stored(square + EPSILON)));
    int i;
    if (root < INFINITY) {
        const float factor = stored((float)(1.0 / root));
        for (i = 0; i < count; i++)
            out[i] = stored(stored(x[i] * factor) * gamma[i]);
    } else {
        /* The squares overflow. */
        double total = 0.0, factor;
        for (i = 0; i < count; i++)
            total += (double)x[i] * x[i];
        factor = 1.0 / sqrt(total / count + EPSILON);
        for (i = 0; i < count; i++)
            out[i] = stored(stored((float)(x[i] * factor)) * gamma[i]);
    }
}

$end
/* Make ready what a matrix is to be multiplied by: normalised, where there is a norm, and
 * rounded, where the matrix consists of codes. */
static void prepare(struct state *s, const struct norm *norm, const float *x,
                    const struct matrix *reader)
{
    const int count = reader->cols, padded = (count + CODES - 1) / CODES * CODES;
    int i;
    if (norm->gamma != NULL)
$if rms
        normalise_rms(norm->gamma, x, count, s->input);
$else
        normalise(norm, x, count, s->input);
$end
    else
        memcpy(s->input, x, (size_t)count * sizeof *x);
    if (reader->packed != NULL) {
        s->step = round_to_int8(s->input, count, s->codes);
        for (i = 0; i < count; i++)
            s->rounded[i] = (whole)s->codes[i];
        for (i = count; i < padded; i++)
            s->rounded[i] = 0;
    }
}

/* The sum of products of some words of codes with the rounded input from x on, exactly. */
#if USE_SSE
static int sum_of_products(const struct state *s, const uint32_t *words, const whole *x, int count)
{
    /* A sum of floats is exact below 2^24; so many words cannot reach that. */
    enum { EXACT_WORDS = (1 << 24) / (4 * 127 * 3) };
    float lanes[4];
    int total = 0;
    while (count > 0) {
        const uint32_t *end = words + (count < EXACT_WORDS ? count : EXACT_WORDS);
        __m128 even = _mm_setzero_ps(), odd = _mm_setzero_ps();
        for (; words < end; words++, x += CODES) {
            const float *a = s->levels[*words & 255], *b = s->levels[(*words >> 8) & 255];
            const float *c = s->levels[(*words >> 16) & 255], *d = s->levels[*words >> 24];
            even = _mm_add_ps(even, _mm_mul_ps(_mm_load_ps(a), _mm_load_ps(x)));
            odd = _mm_add_ps(odd, _mm_mul_ps(_mm_load_ps(b), _mm_load_ps(x + 4)));
            even = _mm_add_ps(even, _mm_mul_ps(_mm_load_ps(c), _mm_load_ps(x + 8)));
            odd = _mm_add_ps(odd, _mm_mul_ps(_mm_load_ps(d), _mm_load_ps(x + 12)));
        }
        _mm_storeu_ps(lanes, _mm_add_ps(even, odd));
        total += (int)lanes[0] + (int)lanes[1] + (int)lanes[2] + (int)lanes[3];
        count -= EXACT_WORDS;
    }
    return total;
}
#else
static int sum_of_products(const struct state *s, const uint32_t *words, const whole *x, int count)
{
    int total = 0, i, shift;
    for (i = 0; i < count; i++)
        for (shift = 0; shift < 32; shift += 8, x += 4) {
            const whole *levels = s->levels[(words[i] >> shift) & 255];
            total += levels[0] * x[0] + levels[1] * x[1] + levels[2] * x[2] + levels[3] * x[3];
        }
    return total;
}
#endif

/* out = matrix input + bias; or out += that. */
static void multiply(const struct state *s, const struct matrix *matrix, int accumulate, float *out)
{
    const int words = (matrix->cols + CODES - 1) / CODES;
    const uint32_t *codes = s->words + matrix->first;
    const uint16_t *upper = matrix->upper;
    const float *scale = matrix->scales;
    int row, i;
    for (row = 0; row < matrix->rows; row++) {
        const float bias = matrix->bias != NULL ? matrix->bias[row] : 0.0f;
        float sum = accumulate ? out[row] : 0.0f;
        if (matrix->packed != NULL) {
            for (i = 0; i < words; i += GROUP / CODES) {
                const int count = words - i < GROUP / CODES ? words - i : GROUP / CODES;
                const int total = sum_of_products(s, codes, s->rounded + i * CODES, count);
                sum = stored(sum + stored(stored((float)total) * stored(*scale * s->step)));
                if (i == 0)
                    sum = stored(sum + bias);
                codes += count;
                if (!ONE_SCALE)
                    scale++;
            }
            out[row] = sum;
        } else {
            double product = 0.0;
            for (i = 0; i < matrix->cols; i++)
                product += (double)from_upper(*upper++) * s->input[i];
            out[row] = (float)(sum + product + bias);
        }
    }
}

/* The row of the embedding that stands for a token becomes the stream. */
static void embed(struct state *s, int token)
{
    int i;
    if (embedding.packed != NULL) {
        const long row = (long)token * ((DIM + CODES - 1) / CODES);
        const uint32_t *codes = s->words + embedding.first + row;
        const float *scales = embedding.scales;
        if (!ONE_SCALE)
            scales += (size_t)token * ((DIM + GROUP - 1) / GROUP);
        for (i = 0; i < DIM; i++) {
            const uint32_t code = (codes[i / CODES] >> 2 * (i % CODES)) & 3;
            s->stream[i] = scales[i / GROUP] * (float)(LOWEST + STEP * (int)code);
        }
    } else {
        for (i = 0; i < DIM; i++)
            s->stream[i] = from_upper(embedding.upper[(size_t)token * DIM + i]);
    }
}

/* ------------------------------------------------------------------------------------------
 * Attention (Vaswani et al., arXiv 1706.03762, equation 1) */

/* Rotary positions (Su et al., arXiv 2104.09864): the pair ($low, $high) of each head is
 * turned by an angle that grows with the position, the slower the larger i is. */
static void find_angles(struct state *s, int position)
{
    int i;
    for (i = 0; i < HEAD_DIM / 2; i++) {
        const double angle = position * pow(ROPE_BASE, -2.0 * i / HEAD_DIM);
        s->cosines[i] = (float)cos(angle);
        s->sines[i] = (float)sin(angle);
    }
}

$if heads
static void rotate(const struct state *s, float *x, int heads)
{
    int head, i;
    for (head = 0; head < heads; head++, x += HEAD_DIM)
$else
static void rotate(const struct state *s, float *x)
{
    int head, i;
    for (head = 0; head < HEADS; head++, x += HEAD_DIM)
$end
        for (i = 0; i < HEAD_DIM / 2; i++) {
            const float a = x[$low], b = x[$high], c = s->cosines[i], d = s->sines[i];
            x[$low] = stored(stored(a * c) - stored(b * d));
            x[$high] = stored(stored(a * d) + stored(b * c));
        }
}

/* exp(x) for x of at most 0, always rounded alike: 2^n exp(r), where n is a whole number, r lies
 * between -ln(2) / 2 and ln(2) / 2, and the series of exp(r) ends where a float does. */
static float exponential(float x)
{
    static const float series[] = {
        (float)(1.0 / 5040), (float)(1.0 / 720), (float)(1.0 / 120), (float)(1.0 / 24),
        (float)(1.0 / 6), 0.5f, 1.0f, 1.0f
    };
    float n, r, power = series[0];
    int i;
    if (isnan(x))
        return x;
    if (x < -104.0f)
        x = -104.0f;
    /* Adding 1.5 * 2^23 pushes the fraction out. */
    n = stored(stored(stored(x * 1.44269504f) + 12582912.0f) - 12582912.0f);
    /* ln(2) in two parts, of which n times the first is exact. */
    r = stored(stored(n * -0.693359375f) + x);
    r = stored(stored(n * 2.12194440e-4f) + r);
    for (i = 1; i < 8; i++)
        power = stored(stored(power * r) + series[i]);
    return ldexpf(power, (int)n);
}

/* One head: the mean of the values it remembers, weighted by how well their keys fit its query.
 * Query and weights are rounded to so many levels that their products with the cache add up to whole
 * numbers of 32 bits. */
static void attend(struct state *s, int layer, int head, int position)
{
$if spans
    const int span = blocks[layer].span;
    const int first = span > 0 && position >= span ? position - span + 1 : 0;
$else
    const int first = SPAN > 0 && position >= SPAN ? position - SPAN + 1 : 0;
$end
    const int count = position - first + 1;
$if heads
    const int kv_head = head / (HEADS / KV_HEADS), at = kv_head * HEAD_DIM;
$end
    const float *q = s->q + head * HEAD_DIM, factor = stored((float)(1.0 / sqrtf(HEAD_DIM)));
    float *weights = s->attention, top = -INFINITY, largest = 0.0f, inverse, total, mass, share;
    const float step = stored(factor * find_step(q, HEAD_DIM, QUERY_LEVELS, &inverse));
    int query[HEAD_DIM], sums[HEAD_DIM] = {0};
    int t, i;
    for (i = 0; i < HEAD_DIM; i++)
        query[i] = inverse > 0.0f ? (int)lrintf(stored(inverse * q[i])) : 0;
    for (t = 0; t < count; t++) {
        const signed char *key = s->keys[layer][first + t] + $at;
        int product = 0;
        for (i = 0; i < HEAD_DIM; i++)
            product += query[i] * key[i];
        weights[t] = stored(stored((float)product) * s->key_steps[layer][first + t][$kv_head]);
        top = weights[t] > top ? weights[t] : top;
    }
    /* Softmax; taking the largest off changes no proportion, and keeps exp from overflowing. */
    for (t = 0; t < count; t++)
        weights[t] = exponential(stored(step * stored(weights[t] - top)));
    total = sum(weights, count);
    for (t = 0; t < count; t++) {
        weights[t] = stored(weights[t] * s->value_steps[layer][first + t][$kv_head]);
        largest = weights[t] > largest ? weights[t] : largest;
    }
    mass = sum(weights, count);
    inverse = stored(MOST_LEVELS / largest);
    share = stored(MOST_SUM / 2 / mass);
    inverse = share < inverse ? share : inverse;
    if (mass < INFINITY && inverse < INFINITY) {
        share = stored((float)(1.0 / stored(inverse * total)));
        for (t = 0; t < count; t++) {
            const signed char *value = s->values[layer][first + t] + $at;
            const int weight = (int)lrintf(stored(inverse * weights[t]));
            for (i = 0; i < HEAD_DIM; i++)
                sums[i] += weight * value[i];
        }
    } else {
        share = mass - mass;    /* 0 where the values are zeros; they may not be finite, either */
    }
    for (i = 0; i < HEAD_DIM; i++)
        s->heads[head * HEAD_DIM + i] = stored((float)sums[i] * share);
}

$if gated silu gelu
/* ------------------------------------------------------------------------------------------
 * The activation of the feed-forward layers */

$if silu gelu
/* y / (1 + exp(-x)): the exponential is that of -|x|, which cannot overflow. */
static float sigmoid_times(float x, float y)
{
    const float e = exponential(-fabsf(x)), weight = x > 0.0f ? 1.0f : e;
    return stored(stored(y * weight) / stored(1.0f + e));
}

$end
$if silu
/* SiLU (Hendrycks & Gimpel, arXiv 1606.08415). */
static float activate(float x)
{
    return sigmoid_times(x, x);
}
$end
$if gelu
/* GELU (Hendrycks & Gimpel, arXiv 1606.08415), with tanh(u / 2) = 2 / (1 + exp(-u)) - 1; where x is
 * beyond 10, the quotient is 0 or 1. */
static float activate(float x)
{
    const float inside = x < -10.0f ? -10.0f : x > 10.0f ? 10.0f : x;
    const float cube = stored(stored(inside * inside) * stored(inside * (float)0.044715));
    return sigmoid_times(stored((float)1.5957691216057308 * stored(inside + cube)), x);
}
$end
$if relu relu2
static float activate(float x)
{
    return x > 0.0f ? (SQUARED ? stored(x * x) : x) : 0.0f;
}
$end

$end
/* ------------------------------------------------------------------------------------------
 * The model */

/* One block: stream += attention(norm1(stream)); stream += feed-forward(norm2(stream)). */
static void transform(struct state *s, int layer, int position)
{
    const struct block *b = &blocks[layer];
    int i;

    prepare(s, &b->norm1, s->stream, &b->wq);
    multiply(s, &b->wq, 0, s->q);
    multiply(s, &b->wk, 0, s->k);
    multiply(s, &b->wv, 0, s->v);
$if qk_norm
    for (i = 0; i < HEADS; i++)
        normalise_rms(b->q_gamma, s->q + i * HEAD_DIM, HEAD_DIM, s->q + i * HEAD_DIM);
    for (i = 0; i < $kv_heads; i++)
        normalise_rms(b->k_gamma, s->k + i * HEAD_DIM, HEAD_DIM, s->k + i * HEAD_DIM);
$end
    if (ROPE) {
$if heads
        rotate(s, s->q, HEADS);
        rotate(s, s->k, KV_HEADS);
$else
        rotate(s, s->q);
        rotate(s, s->k);
$end
    }
    for (i = 0; i < $kv_heads; i++) {
        const int at = i * HEAD_DIM;
        s->key_steps[layer][position][i] =
            round_to_int8(s->k + at, HEAD_DIM, s->keys[layer][position] + at);
        s->value_steps[layer][position][i] =
            round_to_int8(s->v + at, HEAD_DIM, s->values[layer][position] + at);
$if heads
    }
    for (i = 0; i < HEADS; i++)
        attend(s, layer, i, position);
$else
        attend(s, layer, i, position);
    }
$end
    prepare(s, &b->heads_norm, s->heads, &b->wo);
    multiply(s, &b->wo, 1, s->stream);

    prepare(s, &b->norm2, s->stream, &b->wi);
$if gated
    multiply(s, &b->wg, 0, s->gate);
$end
    multiply(s, &b->wi, 0, s->hidden);
$if gated
    for (i = 0; i < FFN; i++)
        s->hidden[i] = stored(activate(s->gate[i]) * s->hidden[i]);
$else
$if silu gelu
    for (i = 0; i < FFN; i++)
        s->hidden[i] = activate(s->hidden[i]);
$else
    for (i = 0; i < FFN; i++) {
        const float x = s->hidden[i];
        s->hidden[i] = x > 0.0f ? (SQUARED ? stored(x * x) : x) : 0.0f;
    }
$end
$end
    prepare(s, &b->hidden_norm, s->hidden, &b->wo_ffn);
    multiply(s, &b->wo_ffn, 1, s->stream);
}

/* Read the token at a position; the logits of the next one, where they are wanted. */
static void read_token(struct state *s, int position, int wanted)
{
    int layer;
    embed(s, s->text[position]);
    if (ROPE)
        find_angles(s, position);
    for (layer = 0; layer < BLOCKS; layer++)
        transform(s, layer, position);
    if (wanted) {
        prepare(s, &final_norm, s->stream, &output);
        multiply(s, &output, 0, s->logits);
    }
}

/* ------------------------------------------------------------------------------------------
 * Drawing tokens */

/* A number in [0, 1): SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) steps through all numbers of
 * 64 bits and scrambles each; the 53 highest bits are as many as a double holds. */
static double uniform(uint64_t *random)
{
    uint64_t z = *random += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    z ^= z >> 31;
    return (double)(z >> 11) / 9007199254740992.0;
}

/* Chances in proportion to exp(score / temperature), in place of the scores; returns their sum.
 * Taking the largest score off changes no proportion, and keeps exp from overflowing. */
static double weigh(double *scores, int count, double temperature)
{
    double top = scores[0], total = 0.0;
    int i;
    for (i = 1; i < count; i++)
        top = scores[i] > top ? scores[i] : top;
    for (i = 0; i < count; i++) {
        scores[i] = exp((scores[i] - top) / temperature);
        total += scores[i];
    }
    return total;
}

/* The next token, or -1 where the logits are not finite. */
static int draw(struct state *s, double temperature, uint64_t *random)
{
    int i, best = 0;
    double left;
    for (i = 0; i < VOCAB; i++) {
        if (!(s->logits[i] < INFINITY))     /* as NaN is not, either */
            return -1;
        if (s->logits[i] > s->logits[best])
            best = i;
        s->chances[i] = s->logits[i];
    }
    if (!(s->logits[best] > -INFINITY))
        return -1;
    if (!(temperature > 0.0))
        return best;
    left = weigh(s->chances, VOCAB, temperature) * uniform(random);
    for (i = 0; i < VOCAB; i++) {
        left -= s->chances[i];
        if (left < 0.0)
            return i;
    }
    return best;
}

/* ------------------------------------------------------------------------------------------
 * The program */

/* A whole number up to a limit. Returns whether the text is one. */
static int parse_whole(const char *text, uint64_t limit, uint64_t *number)
{
    *number = 0;
    if (*text == '\0')
        return 0;
    for (; *text != '\0'; text++) {
        const unsigned digit = (unsigned)*text - '0';
        if (digit > 9 || *number > (limit - digit) / 10)
            return 0;
        *number = *number * 10 + digit;
    }
    return 1;
}

/* A finite number that is not negative. Returns whether the text is one. */
static int parse_number(const char *text, double *number)
{
    char *end;
    if ((*text < '0' || *text > '9') && *text != '.')
        return 0;
    *number = strtod(text, &end);
    return end != text && *end == '\0' && isfinite(*number);
}

/* Put the prompt into the context, behind the line break that texts begin with; of one that does
 * not fit, the end. Returns how many tokens there are. */
static int begin(struct state *s, const char *prompt)
{
    const size_t extra = VOCAB > LINE_BREAK ? 1 : 0, size = strlen(prompt), all = size + extra;
    if (all > CONTEXT) {
        fprintf(stderr, "the prompt is longer than the model's context: only the last %d of its "
                "%lu tokens count\n", (int)CONTEXT, (unsigned long)all);
        memcpy(s->text, prompt + (size - CONTEXT), CONTEXT);
        return CONTEXT;
    }
    s->text[0] = LINE_BREAK;
    memcpy(s->text + extra, prompt, size);
    return (int)all;
}

/* Write so many tokens. A text that grows past the context goes on from its newer half. Returns
 * the program's status. */
static int write_text(struct state *s, int size, uint64_t tokens, double temperature,
                      uint64_t random)
{
    int read = 0;
    for (; tokens > 0; tokens--) {
        int token;
        if (size > CONTEXT) {
            const int kept = CONTEXT > 1 ? CONTEXT / 2 : 1;
            memmove(s->text, s->text + (size - kept), (size_t)kept);
            size = kept;
            read = 0;
        }
        for (; read < size; read++)
            read_token(s, read, read == size - 1);
        token = draw(s, temperature, &random);
        if (token < 0) {
            fprintf(stderr, "the model's logits are not finite: its weights are damaged\n");
            return 1;
        }
        if (putchar(token) == EOF || fflush(stdout) != 0) {
            fprintf(stderr, "cannot write the text: %s\n", strerror(errno));
            return 1;
        }
        s->text[size++] = (unsigned char)token;
    }
    return 0;
}

int main(int argc, char **argv)
{
    uint64_t tokens = 250, seed = 0;
    double temperature = 0.8;
    const char *prompt, *c;
    struct state *s;
#ifdef _WIN32
    /* Line breaks are tokens, too: none becomes two bytes. */
    _setmode(_fileno(stdout), _O_BINARY);
#endif
    if (argc < 2 || argc > 5) {
        fprintf(stderr, "usage: %s \"prompt\" [tokens] [temperature] [seed]\n",
                argc > 0 ? argv[0] : "model");
        return 2;
    }
    prompt = argv[1];
    for (c = prompt; *c != '\0'; c++) {
        const int byte = (unsigned char)*c;
        if (byte >= VOCAB) {
            fprintf(stderr, "prompt: byte %d at offset %lu is outside the vocabulary of %d "
                    "tokens\n", byte, (unsigned long)(c - prompt), (int)VOCAB);
            return 2;
        }
    }
    if (VOCAB <= LINE_BREAK && *prompt == '\0') {
        fprintf(stderr, "prompt: it is empty, expected at least one token\n");
        return 2;
    }
    if (argc > 2 && !parse_whole(argv[2], INT32_MAX, &tokens)) {
        fprintf(stderr, "tokens: expected a whole number, 0 to 2147483647\n");
        return 2;
    }
    if (argc > 3 && !parse_number(argv[3], &temperature)) {
        fprintf(stderr, "temperature: expected a number, 0 or more\n");
        return 2;
    }
    if (argc > 4 && !parse_whole(argv[4], UINT64_MAX, &seed)) {
        fprintf(stderr, "seed: expected a whole number, 0 to 18446744073709551615\n");
        return 2;
    }
    s = create_state();
    if (s == NULL) {
        fprintf(stderr, "there is not so much memory\n");
        return 1;
    }
    if (fwrite(prompt, 1, strlen(prompt), stdout) != strlen(prompt) || fflush(stdout) != 0) {
        fprintf(stderr, "cannot write the text: %s\n", strerror(errno));
        return 1;
    }
    return write_text(s, begin(s, prompt), tokens, temperature, seed);
}

/* ------------------------------------------------------------------------------------------
 * The weights themselves */

