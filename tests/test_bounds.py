"""Kernels touch no memory but their arrays': these end, or begin, at a page that nobody may touch.

A kernel that does is stopped by the system, so all of it runs in a process of its own.
"""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, mmap, sys
from unittest import mock
import numpy as np
from legacy1bit import math_ops as ops
from legacy1bit.backward import (
    BackwardPass, backward_layer_norm_batch, backward_output_layer_batch,
)
from legacy1bit.forward import forward_output_layer_batch
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.inference import Decoder
from legacy1bit.model import TernaryMatrix, create_legacy_llm, create_legacy_llm_gradients
from legacy1bit.packed import PackedMatrix, PackedModel

PAGE = mmap.PAGESIZE
protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
random = np.random.default_rng(0)
kept = []


def guarded(values, at_end):
    # A copy between two pages that may not be touched, at the end of its memory or the beginning.
    values = np.ascontiguousarray(values)
    if values.size == 0:
        return values
    room = -(-values.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert protect(begin, PAGE, 0) == 0 and protect(begin + PAGE + room, PAGE, 0) == 0
    offset = PAGE + (room - values.nbytes if at_end else 0)
    copy = np.frombuffer(memory, values.dtype, values.size, offset).reshape(values.shape)
    copy[...] = values
    kept.append(memory)
    return copy


def vectors(n, at_end):
    def new():
        return guarded(random.standard_normal(n).astype(np.float32), at_end)

    x, y = new(), new()
    ops.add_vector_inplace(x, y)
    ops.add_scalar_mul_vector_inplace(x, 0.5, y)
    ops.multiply_vector_inplace(x, y)
    ops.scalar_mul_vector_inplace(x, 2.0)
    ops.vector_sub_scalar_inplace(x, 1.0)
    ops.vector_div_scalar_inplace(x, 3.0)
    ops.vector_sum(x)
    ops.dot_product(x, y)
    ops.relu(new())
    ops.relu2(new())
    ops.silu(new())
    ops.gelu(new())
    ops.exp_inplace(new())
    ops.softmax(new())
    ops.quantize_activations(new())
    ops.layer_norm(x, y, new())
    # A mean so large is worked out in float64.
    ops.layer_norm(guarded(np.linspace(1e6, 1e6 + 1, n, dtype=np.float32), at_end), y, new())
    spreads = guarded(np.ones(1, np.float32), at_end)
    backward_layer_norm_batch(new(), x, y, spreads, spreads, new(), new())


def matrices(rows, cols, at_end):
    codes = guarded(random.integers(-1, 2, (rows, cols)).astype(np.int8), at_end)
    x, y = (guarded(random.standard_normal(n).astype(np.float32), at_end) for n in (cols, rows))
    ops.ternary_matrix_vector_mul(codes, x, y)
    ops.matrix_transpose_vector_mul(codes, y, x)
    for form in ("2bit", "trits"):
        batch = guarded(random.standard_normal((9, cols)).astype(np.float32), at_end)
        PackedMatrix(codes, form=form).multiply(batch, y)
    # Scales in groups of columns, and rows enough to pack the matrix.
    scales = guarded(random.random((rows, -(-cols // 16))).astype(np.float32), at_end)
    matrix = TernaryMatrix(codes, scales, 16)
    ops.ternary_matrix_vector_mul(matrix, x, y)
    ops.matrix_transpose_vector_mul(matrix, y, x)
    batch, wide = (guarded(random.standard_normal((17, n)).astype(np.float32), at_end)
                   for n in (cols, rows))
    for matrix in (matrix, TernaryMatrix(codes)):
        forward_output_layer_batch(matrix, y, batch)
        backward_output_layer_batch(matrix, wide, batch, {
            "weight": guarded(np.zeros((rows, cols), np.float32), at_end),
            "bias": guarded(np.zeros(rows, np.float32), at_end),
        })
    for turn_a in (False, True):
        for turn_b in (False, True):
            a, b, c = (guarded(random.standard_normal(shape).astype(np.float32), at_end)
                       for shape in ((cols, rows) if turn_a else (rows, cols),
                                     (17, cols) if turn_b else (cols, 17), (rows, 17)))
            ops.matmul(a, b, c, transpose_a=turn_a, transpose_b=turn_b)


def guarding(at_end):
    # NumPy's new arrays between such pages: models, passes and decoders are made of them.
    def guarded_room(make):
        return lambda *args, **kwargs: guarded(make(*args, **kwargs), at_end)

    return mock.patch.multiple(np, empty=guarded_room(np.empty), zeros=guarded_room(np.zeros))


def models(scheme, at_end):
    # A context that ends with a tile of keys, and is longer than what is attended to in order.
    config = ModelConfig(vocab_size=19, model_dim=12, num_heads=2, num_blocks=1, ffn_multiplier=3,
                         sequence_length=272, scheme=scheme)
    tokens = random.integers(0, 19, (2, 272), np.int32)
    with guarding(at_end):
        model, gradients = create_legacy_llm(config, 1), create_legacy_llm_gradients(config)
        BackwardPass(model, 2, 30).run(tokens[:, :30], tokens[:, :30], gradients)
        for step in (1, 4, 272):
            decoder = Decoder(PackedModel(model))
            for start in range(0, 272, step):
                decoder.prefill(tokens[0, start : start + step])


def everything():
    for at_end in (False, True):
        for scheme in ("float", "ternary"):
            models(scheme, at_end)
        for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65):
            vectors(n, at_end)
        for rows, cols in ((1, 1), (3, 5), (4, 16), (5, 17), (33, 7), (16, 33), (17, 64)):
            matrices(rows, cols, at_end)
        kept.clear()


ops.set_simd_level(sys.argv[1])
for precision in ops.product_precisions():
    with ops.product_precision(precision):
        everything()
print("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="memory is protected in another way")
def test_kernels_stay_within_their_arrays(tier):
    ran = subprocess.run([sys.executable, "-c", SCRIPT, tier], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr[-2000:]
