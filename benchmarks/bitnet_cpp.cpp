// Times the I2_S kernels of bitnet.cpp: its ggml-bitnet-mad.cpp is compiled into this file.
//
//     bitnet_cpp SIZE ROWS SECONDS
//
// prints the multiply-adds of a second, in thousands of millions, of a SIZE x SIZE ternary matrix
// times ROWS rows of int8 activations. What it includes of ggml.h is declared here.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <chrono>
#include <vector>

#define GGML_API extern
enum ggml_type { GGML_TYPE_I2_S };
[[maybe_unused]] static size_t ggml_row_size(ggml_type, int64_t count) { return (size_t)count; }

#include "ggml-bitnet-mad.cpp"

static void multiply(
    int size, int rows, float *out, const uint8_t *matrix, const int8_t *activations)
{
    for (int j = 0; j < size; j++) {
        const uint8_t *row = matrix + (size_t)j * size / 4;
        float *sums = out + (size_t)j * rows;
        // Since 2025 one call takes many rows of activations.
#ifdef PARALLEL_SIZE
        ggml_vec_dot_i2_i8_s(size, sums, 1, row, size, activations, size, rows);
#else
        for (int i = 0; i < rows; i++)
            ggml_vec_dot_i2_i8_s(size, sums + i, 1, row, 0, activations + (size_t)i * size, 0, 1);
#endif
    }
}

int main(int count, char **words)
{
    if (count != 4) return 2;
    const int size = atoi(words[1]), rows = atoi(words[2]);
    const double least = atof(words[3]);
    std::vector<float> weights((size_t)size * size), out((size_t)size * rows);
    std::vector<int8_t> activations((size_t)size * rows);
    std::vector<uint8_t> matrix((size_t)size * size / 4 + 64);
    uint32_t state = 1;
    const auto random = [&state] { return (state = state * 1664525u + 1013904223u) >> 16; };
    for (auto &one : weights) one = (float)(int)(random() % 3) - 1.0f;
    for (auto &one : activations) one = (int8_t)((int)(random() % 255) - 127);
    quantize_i2_s(weights.data(), matrix.data(), size, size, nullptr);
    multiply(size, rows, out.data(), matrix.data(), activations.data());
    // Its codes are 0, 1 and 2: each sum has that of the activations in it.
    for (int j = 0; j < size; j += size / 8)
        for (int i = 0; i < rows; i++) {
            long exact = 0;
            for (int k = 0; k < size; k++)
                exact += ((long)weights[(size_t)j * size + k] + 1)
                         * activations[(size_t)i * size + k];
            if (out[(size_t)j * rows + i] != (float)exact) {
                fputs("wrong sums: this source has another layout, or the CPU no AVX2\n", stderr);
                return 1;
            }
        }
    typedef std::chrono::steady_clock clock;
    const auto begin = clock::now();
    double passed = 0.0;
    long calls = 0;
    while (passed < least || calls == 0) {
        multiply(size, rows, out.data(), matrix.data(), activations.data());
        calls++;
        passed = std::chrono::duration<double>(clock::now() - begin).count();
    }
    printf("%.6g\n", 1e-9 * size * size * rows * calls / passed);
    return 0;
}
