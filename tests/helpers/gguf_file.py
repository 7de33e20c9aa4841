"""GGUF files read once more, and what llama.cpp computes of them, in float64 NumPy.

Neither the package nor gguf is used: the container is read byte by byte, blocks by their layout in
``ggml-common.h``, and logits follow llama.cpp's graphs of the architectures.
"""

import struct

import numpy as np

# struct's letters for the types of values.
_LETTERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}


class _Bytes:
    def __init__(self, content):
        self.content, self.place = content, 0

    def numbers(self, letter, count=1):
        found = struct.unpack_from(f"<{count}{letter}", self.content, self.place)
        self.place += struct.calcsize(f"<{count}{letter}")
        return found

    def text(self):
        (size,) = self.numbers("Q")
        self.place += size
        return self.content[self.place - size : self.place].decode()

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind != 9:
            return self.numbers(_LETTERS[kind])[0]
        (kind,), (count,) = self.numbers("I"), self.numbers("Q")
        return [self.value(kind) for _ in range(count)]


def read(path):
    """Keys, and of each tensor the type's number and the weights in float64, rows first."""
    file = _Bytes(path.read_bytes())
    magic, version, tensor_count, key_count = *file.numbers("I", 2), *file.numbers("Q", 2)
    assert (magic, version) == (int.from_bytes(b"GGUF", "little"), 3)
    keys = {}
    for _ in range(key_count):
        name = file.text()
        keys[name] = file.value(*file.numbers("I"))
    places = {}
    for _ in range(tensor_count):
        name, (axes,) = file.text(), file.numbers("I")
        shape = file.numbers("Q", axes)[::-1]
        places[name] = shape, *file.numbers("I"), *file.numbers("Q")
    start = -(-file.place // 32) * 32
    tensors = {}
    for name, (shape, kind, offset) in places.items():
        weights = _BLOCKS[kind](file.content[start + offset :], int(np.prod(shape)))
        tensors[name] = kind, weights.reshape(shape)
    return keys, tensors


# --- Types ----------------------------------------------------------------------------------------


def _blocks(content, count, block, size):
    return np.frombuffer(content, np.uint8, count // block * size).reshape(-1, size)


def _scale(blocks, place):
    return np.ascontiguousarray(blocks[:, place : place + 2]).view("<f2").astype(np.float64)


def _tq1_0(content, count):
    blocks = _blocks(content, count, 256, 54)
    digits = np.zeros((len(blocks), 256))
    for start, size, first, number in ((0, 32, 0, 5), (32, 16, 160, 5), (48, 4, 240, 4)):
        for n in range(number):
            v = blocks[:, start : start + size].astype(int) * 3**n % 256
            digits[:, first + n * size : first + (n + 1) * size] = v * 3 >> 8
    return (digits - 1) * _scale(blocks, 52)


def _tq2_0(content, count):
    blocks = _blocks(content, count, 256, 66)
    codes = np.zeros((len(blocks), 256))
    for half in range(2):
        for pair in range(4):
            first = 128 * half + 32 * pair
            codes[:, first : first + 32] = blocks[:, 32 * half : 32 * half + 32] >> 2 * pair & 3
    return (codes - 1) * _scale(blocks, 64)


def _q2_0(content, count):
    blocks = _blocks(content, count, 64, 18)
    codes = np.zeros((len(blocks), 64))
    for j in range(64):
        codes[:, j] = blocks[:, 2 + j // 4] >> 2 * (j % 4) & 3
    return (codes - 1) * _scale(blocks, 0)


def _q8_0(content, count):
    blocks = _blocks(content, count, 32, 34)
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8) * _scale(blocks, 0)


_BLOCKS = {
    0: lambda content, count: np.frombuffer(content, "<f4", count).astype(np.float64),
    1: lambda content, count: np.frombuffer(content, "<f2", count).astype(np.float64),
    8: _q8_0,
    34: _tq1_0,
    35: _tq2_0,
    42: _q2_0,
}


# --- What llama.cpp computes ----------------------------------------------------------------------


def _rotation(keys, time):
    """Angles float64[T, R / 2], and the factor of cosines and sines."""
    size = keys["rope.dimension_count"]
    pairs = np.arange(size // 2)
    base, factor = keys["rope.freq_base"], keys.get("rope.scaling.factor", 1.0)
    frequencies = base ** (-2.0 * pairs / size)
    if factor == 1.0:
        return np.arange(time)[:, None] * frequencies, 1.0
    assert keys["rope.scaling.type"] == "yarn"

    def pair_that_turns(times):
        length = keys["rope.scaling.original_context_length"]
        return size * np.log(length / (2 * np.pi * times)) / (2 * np.log(base))

    low = max(0.0, np.floor(pair_that_turns(32.0)))
    high = min(size - 1.0, np.ceil(pair_that_turns(1.0)))
    kept = 1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0)
    frequencies = frequencies / factor * (1.0 - kept) + frequencies * kept
    return np.arange(time)[:, None] * frequencies, 1.0 + 0.1 * np.log(factor)


def _rotated(x, keys, architecture):
    """Queries or keys float64[T, H, D], rotated: adjacent pairs in llama, else halves."""
    size = keys["rope.dimension_count"]
    angles, factor = _rotation(keys, len(x))
    cosines, sines = (factor * part(angles)[:, None] for part in (np.cos, np.sin))
    if architecture == "llama":
        first, second = np.s_[..., 0:size:2], np.s_[..., 1:size:2]
    else:
        first, second = np.s_[..., : size // 2], np.s_[..., size // 2 : size]
    result = x.copy()
    result[first] = x[first] * cosines - x[second] * sines
    result[second] = x[first] * sines + x[second] * cosines
    return result


def logits(keys, tensors, tokens):
    """What llama.cpp has for the tokens [T]: logits float64[T, V]."""
    architecture = keys["general.architecture"]
    keys = {name.removeprefix(f"{architecture}."): value for name, value in keys.items()}
    weights = {name: value for name, (_, value) in tensors.items()}
    heads, kv_heads = keys["attention.head_count"], keys["attention.head_count_kv"]
    size = keys.get("attention.key_length", keys["embedding_length"] // heads)
    used = {"token_embd.weight"}

    def take(name):
        used.add(name)
        return weights[name]

    def linear(x, name):
        product = x @ take(f"{name}.weight").T
        return product + take(f"{name}.bias") if f"{name}.bias" in weights else product

    def norm(x, name):
        if architecture == "nemotron":
            x = x - x.mean(axis=-1, keepdims=True)
            epsilon = keys["attention.layer_norm_epsilon"]
        else:
            epsilon = keys["attention.layer_norm_rms_epsilon"]
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * take(f"{name}.weight")
        return x + take(f"{name}.bias") if architecture == "nemotron" else x

    x = weights["token_embd.weight"][tokens]
    for i in range(keys["block_count"]):
        y = norm(x, f"blk.{i}.attn_norm")
        q, k, v = (
            linear(y, f"blk.{i}.attn_{name}").reshape(len(x), -1, size) for name in ("q", "k", "v")
        )
        assert (q.shape[1], k.shape[1], v.shape[1]) == (heads, kv_heads, kv_heads)
        if architecture == "qwen3":
            q, k = norm(q, f"blk.{i}.attn_q_norm"), norm(k, f"blk.{i}.attn_k_norm")
        q, k = _rotated(q, keys, architecture), _rotated(k, keys, architecture)
        k, v = (np.repeat(one, heads // kv_heads, axis=1) for one in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
        scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        y = np.einsum("hqk,khd->qhd", scores, v).reshape(len(x), -1)
        if architecture == "bitnet":
            y = norm(y, f"blk.{i}.attn_sub_norm")
        x = x + linear(y, f"blk.{i}.attn_output")
        y = norm(x, f"blk.{i}.ffn_norm")
        if architecture == "nemotron":
            y = np.maximum(linear(y, f"blk.{i}.ffn_up"), 0.0) ** 2
        else:
            gate = linear(y, f"blk.{i}.ffn_gate")
            y = gate / (1.0 + np.exp(-gate)) * linear(y, f"blk.{i}.ffn_up")
        if architecture == "bitnet":
            y = norm(y, f"blk.{i}.ffn_sub_norm")
        x = x + linear(y, f"blk.{i}.ffn_down")
    x = norm(x, "output_norm")
    if architecture == "bitnet" or (architecture != "nemotron" and "output.weight" not in weights):
        result = x @ weights["token_embd.weight"].T
    else:
        result = x @ take("output.weight").T
    # A tensor that no graph uses is a wrong file, as it is for llama.cpp.
    assert used == weights.keys()
    return result
