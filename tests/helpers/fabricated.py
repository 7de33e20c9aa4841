"""Models in the forms in which others publish them, written without the package.

A seed decides on everything: the kind of file, the family, sizes, types of tensors and units of
scales. Bytes come from the descriptions of the formats, an element after the other.
"""

import json
import struct

import numpy as np

# Types of matrices of codes: number, weights of a block, bytes of a block.
BLOCKS = {
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "Q2_0": (42, 64, 18),
    "Q2_0 of 128": (42, 128, 34),
    "PQ2_0": (142, 128, 34),
    "PTQ1_0": (143, 128, 28),
}
FLOATS = {"F32": 0, "F16": 1, "BF16": 30}
# Those that are made of random bytes: number, weights, bytes.
ROUGH = {"Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "Q6_K": (14, 256, 210)}

NAMES = {
    "attention.wq": ("attn_q.weight", "self_attn.q_proj.weight"),
    "attention.wk": ("attn_k.weight", "self_attn.k_proj.weight"),
    "attention.wv": ("attn_v.weight", "self_attn.v_proj.weight"),
    "attention.wo": ("attn_output.weight", "self_attn.o_proj.weight"),
    "attention.bq": ("attn_q.bias", "self_attn.q_proj.bias"),
    "attention.bk": ("attn_k.bias", "self_attn.k_proj.bias"),
    "attention.bv": ("attn_v.bias", "self_attn.v_proj.bias"),
    "attention.bo": ("attn_output.bias", "self_attn.o_proj.bias"),
    "attention.q_gamma": ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    "attention.k_gamma": ("attn_k_norm.weight", "self_attn.k_norm.weight"),
    "attention.gamma": ("attn_sub_norm.weight", "self_attn.attn_sub_norm.weight"),
    "ffn.wg": ("ffn_gate.weight", "mlp.gate_proj.weight"),
    "ffn.wi": ("ffn_up.weight", "mlp.up_proj.weight"),
    "ffn.wo": ("ffn_down.weight", "mlp.down_proj.weight"),
    "ffn.bg": ("ffn_gate.bias", "mlp.gate_proj.bias"),
    "ffn.bi": ("ffn_up.bias", "mlp.up_proj.bias"),
    "ffn.bo": ("ffn_down.bias", "mlp.down_proj.bias"),
    "ffn.gamma": ("ffn_sub_norm.weight", "mlp.ffn_sub_norm.weight"),
    "norm1.gamma": ("attn_norm.weight", "input_layernorm.weight"),
    "norm1.beta": ("attn_norm.bias", "input_layernorm.bias"),
    "norm2.gamma": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "norm2.beta": ("ffn_norm.bias", "post_attention_layernorm.bias"),
}
EDGES = {
    "embedding.weight": ("token_embd.weight", "model.embed_tokens.weight"),
    "final_norm.gamma": ("output_norm.weight", "model.norm.weight"),
    "final_norm.beta": ("output_norm.bias", "model.norm.bias"),
    "output.weight": ("output.weight", "lm_head.weight"),
}


def theirs(name, program):
    """The name of a parameter in llama.cpp (0) or transformers (1)."""
    if name in EDGES:
        return EDGES[name][program]
    _, block, rest = name.split(".", 2)
    return f"{('blk', 'model.layers')[program]}.{block}.{NAMES[rest][program]}"


# --- Ternary matrices -----------------------------------------------------------------------------


def ternary(rng, rows, cols, unit):
    """Codes int8[R, C] and scales, numbers of float16 wherever they stand: float32[R, C]."""
    codes = rng.integers(-1, 2, (rows, cols))
    shape = {"tensor": (1, 1), "row": (rows, 1)}.get(unit) or (rows, -(-cols // int(unit)))
    scales = rng.uniform(0.3, 3.0, shape).astype(np.float16).astype(np.float32) / 16
    width = cols if unit in ("tensor", "row") else int(unit)
    wide = np.repeat(np.broadcast_to(scales, (rows, shape[1])), width, axis=1)[:, :cols]
    return codes.astype(np.int8), wide


def places(kind):
    """Where each weight of a block is: for two bits (byte, shift), for trits (byte, power)."""
    found = []
    _, size, _ = BLOCKS[kind]
    for o in range(size):
        if kind == "TQ2_0":
            half, layer, m = o // 128, o % 128 // 32, o % 32
            found.append((32 * half + m, 2 * layer))
        elif kind == "TQ1_0" and o < 160:
            found.append((o % 32, o // 32))
        elif kind == "TQ1_0" and o < 240:
            found.append((32 + (o - 160) % 16, (o - 160) // 16))
        elif kind == "TQ1_0":
            found.append((48 + (o - 240) % 4, (o - 240) // 4))
        elif kind == "PTQ1_0" and o < 80:
            found.append((o % 16, o // 16))
        elif kind == "PTQ1_0" and o < 120:
            found.append((16 + (o - 80) % 8, (o - 80) // 8))
        elif kind == "PTQ1_0":
            found.append((24 + (o - 120) % 2, (o - 120) // 2))
        else:
            found.append((2 + o // 4, 2 * (o % 4)))
    return found


def blocks_of(kind, codes, wide):
    """The bytes of a matrix in blocks."""
    _, size, length = BLOCKS[kind]
    digits = (codes.reshape(-1, size) + 1).astype(np.int64)
    values = np.zeros((len(digits), length), np.int64)
    for o, (byte, place) in enumerate(places(kind)):
        factor = 3 ** (4 - place) if "TQ1" in kind else 1 << place
        values[:, byte] += digits[:, o] * factor
    if "TQ1" in kind:
        values = -(-values * 256 // 243)
    raw = values.astype(np.uint8)
    at = {"TQ1_0": 52, "TQ2_0": 64, "PTQ1_0": 26}.get(kind, 0)
    raw[:, at : at + 2] = wide.reshape(-1, size)[:, :1].astype("<f2").view(np.uint8)
    return raw.tobytes()


def runs_of(codes, scale):
    """The bytes of a matrix of the type I2_S."""
    runs = (codes.reshape(-1, 4, 32) + 1).astype(np.uint8)
    raw = runs[:, 0] << 6 | runs[:, 1] << 4 | runs[:, 2] << 2 | runs[:, 3]
    return raw.tobytes() + np.float32(scale).tobytes() + bytes(28)


def bfloat16(values):
    """Bits of numbers that bfloat16 holds."""
    return (np.ascontiguousarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()


def float_bytes(kind, values):
    """The bytes of numbers of a type."""
    if kind == "BF16":
        return bfloat16(values)
    return np.asarray(values).astype("<f2" if kind == "F16" else "<f4").tobytes()


# --- Rough floats ---------------------------------------------------------------------------------


def rough(rng, kind, rows, cols):
    """Random blocks of a type, and what they say: bytes and float64[R, C]."""
    _, size, length = ROUGH[kind]
    raw = rng.integers(0, 256, (rows * cols // size, length), dtype=np.uint8)
    at = {"Q6_K": 208}.get(kind, 0)
    small = 2e-4 if kind == "Q6_K" else 2e-3
    for start in (at, 2) if kind == "Q4_K" else (at,):
        scales = rng.uniform(-1.0, 1.0, (len(raw), 1)) * small
        raw[:, start : start + 2] = scales.astype("<f2").view(np.uint8)
    values = np.array([rough_block(kind, block) for block in raw])
    return raw.tobytes(), values.reshape(rows, cols)


def half(raw):
    return float(raw.view("<f2")[0])


def rough_block(kind, raw):
    """The numbers of one block."""
    if kind == "Q4_0":
        codes = [*(raw[2:] & 15), *(raw[2:] >> 4)]
        return [half(raw[:2]) * (int(code) - 8) for code in codes]
    if kind == "Q8_0":
        return [half(raw[:2]) * int(code) for code in raw[2:].view(np.int8)]
    values = []
    if kind == "Q4_K":
        six = [int(byte) for byte in raw[4:16]]
        for j in range(8):
            if j < 4:
                scale, least = six[j] % 64, six[j + 4] % 64
            else:
                scale = six[j + 4] % 16 + 16 * (six[j - 4] // 64)
                least = six[j + 4] // 16 + 16 * (six[j] // 64)
            own = raw[16 + 32 * (j // 2) :][:32]
            for byte in own:
                code = int(byte) >> 4 if j % 2 else int(byte) & 15
                values.append(half(raw[:2]) * scale * code - half(raw[2:4]) * least)
        return values
    for o in range(256):
        part, rest = divmod(o, 128)
        quarter, m = divmod(rest, 32)
        low = int(raw[64 * part + 32 * (quarter % 2) + m])
        low = low >> 4 if quarter > 1 else low & 15
        high = int(raw[128 + 32 * part + m]) >> 2 * quarter & 3
        scale = int(raw[192 + o // 16 : 193 + o // 16].view(np.int8)[0])
        values.append(half(raw[208:]) * scale * (low + 16 * high - 32))
    return values


# --- Files ----------------------------------------------------------------------------------------


def gguf_value(value):
    """The type and the bytes of a key's value."""
    if isinstance(value, str):
        return 8, struct.pack("<Q", len(value.encode())) + value.encode()
    if isinstance(value, list):
        kinds, parts = zip(*map(gguf_value, value), strict=True)
        return 9, struct.pack("<IQ", kinds[0], len(value)) + b"".join(parts)
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    return (6, struct.pack("<f", value)) if isinstance(value, float) else (
        4, struct.pack("<I", value))  # fmt: skip


def write_gguf(path, keys, tensors, alignment):
    """Write a GGUF file; tensors are (name, shape, number of the type, bytes)."""
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for name, value in keys.items():
        kind, content = gguf_value(value)
        raw += gguf_value(name)[1] + struct.pack("<I", kind) + content
    offset, data = 0, b""
    for name, shape, number, content in tensors:
        raw += gguf_value(name)[1] + struct.pack("<I", len(shape))
        raw += struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<IQ", number, offset)
        data += content.ljust(-(-len(content) // alignment) * alignment, b"\0")
        offset = len(data)
    path.write_bytes(raw.ljust(-(-len(raw) // alignment) * alignment, b"\0") + data)


def write_safetensors(path, tensors):
    """Write a safetensors file; tensors are (name, shape, dtype, bytes)."""
    header, data = {}, b""
    for name, shape, dtype, content in tensors:
        ends = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": ends}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# --- Models ---------------------------------------------------------------------------------------

# Heads and their widths, by what their product is a multiple of.
HEADS = {
    1: ((3, 10), (5, 6), (6, 14), (4, 18), (1, 22)),
    64: ((32, 6), (16, 12), (4, 16), (8, 40)),
    128: ((64, 6), (32, 12), (16, 24), (2, 64)),
    256: ((32, 8), (64, 12), (8, 32), (2, 128)),
}


def fabricate(seed, folder):
    """Write a model.

    Returns
    -------
    path : Path
    config : dict
        As the oracle takes it.
    weights : dict of str to float64 array
        The dense weights.
    about : dict
        ``unit``, the unit of the scales, and ``kind``, the type of the matrices.
    """
    rng = np.random.default_rng([24, seed])
    pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    is_gguf = seed % 2 == 0
    family = ("llama", "qwen3", "bitnet", "llama", "nemotron", "bitnet", "qwen3")[seed // 2 % 7]
    kind = (
        pick(*BLOCKS, "I2_S", *FLOATS)
        if is_gguf
        else pick("packed", "packed", "online", "F16", "F32", "BF16")
    )
    if kind in ("packed", "online") and family == "nemotron":
        kind = "F32"
    block = BLOCKS[kind][1] if kind in BLOCKS else 64 if kind == "I2_S" else 1
    unit = pick(*("tensor", "row", "256", "128", "64")[: {256: 3, 128: 4}.get(block, 5)])
    if kind in ("I2_S", "packed", "online"):
        unit = "tensor"
    heads, head_dim = pick(*HEADS[block])
    kv = pick(*(n for n in range(1, heads + 1) if heads % n == 0 and n * head_dim % 4 == 0)
              ) if (heads * head_dim) % 4 == 0 else heads  # fmt: skip
    # Rows of packed matrices are stored by fours.
    quads = 4 if kind == "packed" else 1
    if heads * head_dim % quads:
        heads, kv = heads * 2, heads * 2
    dim = block * int(pick(1, 2)) if block > 1 else int(pick(20, 36, 44, 300))
    ffn = block * int(pick(1, 2, 3)) if block > 1 else int(pick(28, 52, 136))
    config = {
        **{"vocab_size": int(rng.integers(20, 60)), "model_dim": dim, "num_blocks": pick(1, 2, 3)},
        **{"num_heads": heads, "head_dim": head_dim, "positions": "rope"},
        **{"rope_base": pick(10000.0, 500000.0), "final_norm": True, "scheme": "ternary"},
        **{"norm_epsilon": pick(1e-5, 1e-6), "activation": "silu", "norm": "rms", "gated": True},
        **{"sub_norm": family == "bitnet", "qk_norm": family == "qwen3", "attention_window": 0},
        **{"tied_embeddings": pick(True, False), "rope_pairs": "halves"},
    }
    if family == "bitnet":
        config["activation"] = pick("relu2", "silu")
    if family == "nemotron":
        config |= {"activation": "relu2", "norm": "layer", "gated": False}
        if head_dim % 4 == 0:
            config["rope_fraction"] = 0.5
    if family != "bitnet" and pick(True, False):
        config |= {"rope_factor": pick(2.0, 4.0), "rope_original_length": pick(64, 512)}
    biased = family in ("nemotron", "llama") and pick(True, False)
    config["int8_activations"] = family == "bitnet" or kind in ("I2_S", "packed", "online")
    shapes = shapes_of(config, kv, ffn, biased)
    # Embedding and output matrix have the matrices' type, or one of floats.
    coded = kind not in ("I2_S", "packed", "online") and dim % block == 0 and pick(True, False)
    config["ternary_embedding"] = coded

    stored, weights = [], {}
    linear = pick("bitlinear", "autobitlinear")
    for name, shape in shapes.items():
        outer = name in ("embedding.weight", "output.weight")
        if len(shape) == 2 and (coded or not outer):
            made = matrix(rng, kind, shape, unit, linear)
        elif len(shape) == 2:
            fits = [one for one, (_, size, _) in ROUGH.items() if is_gguf and dim % size == 0]
            made = floats(rng, pick(*FLOATS, *fits), shape)
        else:
            made = vector(rng, name, shape, family, is_gguf)
        weights[name], parts = made
        stored += [(name + suffix, *rest) for suffix, *rest in parts]
    order = rng.permutation(len(stored))
    stored = [stored[i] for i in order]
    about = {"unit": unit, "kind": kind, "family": family}
    if is_gguf:
        architecture = family
        if family == "bitnet":
            named = {"silu": ("bitnet",), "relu2": ("bitnet-b1.58", "bitnet-25")}
            architecture = pick(*named[config["activation"]])
        path = folder / "model.gguf"
        write_gguf_model(path, architecture, config, kv, ffn, stored, pick(8, 32, 64))
        return path, config, weights, about
    settings = hugging_face_settings(family, config, kv, ffn, biased)
    if kind in ("packed", "online"):
        settings["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": linear,
            "quantization_mode": "online" if kind == "online" else "offline",
        }
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = [
        (hugging_face_name(name), shape, dtype, content_of(dtype, content))
        for name, shape, dtype, content in stored
    ]
    if pick(True, False):
        write_safetensors(folder / "model.safetensors", tensors)
        return folder, config, weights, about
    parts = {"a.safetensors": tensors[::2], "b.safetensors": tensors[1::2]}
    for name, part in parts.items():
        write_safetensors(folder / name, part)
    places = {tensor[0]: name for name, part in parts.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder, config, weights, about


def shapes_of(config, kv, ffn, biased):
    """The shapes of all parameters."""
    dim, vocab = config["model_dim"], config["vocab_size"]
    wide, narrow = config["num_heads"] * config["head_dim"], kv * config["head_dim"]
    layer = config["norm"] == "layer"
    shapes = {"embedding.weight": (vocab, dim)}
    for i in range(config["num_blocks"]):
        block = {
            "attention.wq": (wide, dim),
            "attention.wk": (narrow, dim),
            "attention.wv": (narrow, dim),
            "attention.wo": (dim, wide),
            "ffn.wi": (ffn, dim),
            "ffn.wo": (dim, ffn),
            "norm1.gamma": (dim,),
            "norm2.gamma": (dim,),
        }
        if config["gated"]:
            block["ffn.wg"] = (ffn, dim)
        if layer:
            block |= {"norm1.beta": (dim,), "norm2.beta": (dim,)}
        if config["qk_norm"]:
            block |= dict.fromkeys(
                ("attention.q_gamma", "attention.k_gamma"), (config["head_dim"],)
            )
        if config["sub_norm"]:
            block |= {"attention.gamma": (wide,), "ffn.gamma": (ffn,)}
        if biased:
            block |= {"attention.bq": (wide,), "attention.bk": (narrow,), "attention.bv": (narrow,)}
            block |= {"attention.bo": (dim,), "ffn.bi": (ffn,), "ffn.bo": (dim,)}
            if config["gated"]:
                block["ffn.bg"] = (ffn,)
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes["final_norm.gamma"] = (dim,)
    if layer:
        shapes["final_norm.beta"] = (dim,)
    if not config["tied_embeddings"]:
        shapes["output.weight"] = (vocab, dim)
    return shapes


def matrix(rng, kind, shape, unit, linear):
    """Dense weights, and tensors as (suffix, shape, type, what makes its bytes)."""
    rows, cols = shape
    codes, wide = ternary(rng, rows, cols, unit)
    if unit not in ("tensor", "row"):
        # The unit must show: some row has two scales, and no group is all zeros.
        codes[:, :: min(int(unit), 32)] = 1
    dense = codes * wide.astype(np.float64)
    if kind in BLOCKS or kind == "I2_S":
        return dense, [("", shape, kind, (codes, wide))]
    if kind == "packed":
        quarters = (codes + 1).astype(np.uint8).reshape(4, rows // 4, cols)
        raw = sum(quarters[i] << np.uint8(2 * i) for i in range(4)).astype(np.uint8)
        # A number of bfloat16.
        scale = 2.0 ** rng.integers(-4, 2) * rng.integers(128, 256) / 128
        dense = codes * (1.0 / scale if linear == "bitlinear" else scale)
        packed = ("", (rows // 4, cols), "U8", raw.tobytes())
        return dense, [packed, ("_scale", (1,), "BF16", bfloat16(np.float32(scale)))]
    if kind == "online":
        masters = rng.normal(0.0, 0.05, shape).astype(np.float32)
        masters = (masters.view(np.uint32) & 0xFFFF0000).view(np.float32)
        mean = np.abs(masters.astype(np.float64)).mean()
        ratio = masters / mean
        masters = np.where(np.abs(np.abs(ratio) - 0.5) < 1e-3, np.float32(0.0), masters)
        mean = np.abs(masters.astype(np.float64)).mean()
        return np.clip(np.rint(masters / mean), -1, 1) * mean, [("", shape, "BF16", masters)]
    if kind == "BF16":
        dense = codes * (wide.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    return dense, [("", shape, kind, dense)]


def floats(rng, kind, shape):
    """The same of an ordinary matrix."""
    if kind in ROUGH:
        raw, values = rough(rng, kind, *shape)
        return values, [("", shape, kind, raw)]
    values = rng.normal(0.0, 0.5, shape).astype(np.float32)
    if kind == "F16":
        values = values.astype(np.float16).astype(np.float32)
    if kind == "BF16":
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return values.astype(np.float64), [("", shape, kind, values)]


def vector(rng, name, shape, family, is_gguf):
    """The same of a vector."""
    middle = 1.0 if name.endswith("gamma") else 0.0
    values = rng.normal(middle, 0.2, shape).astype(np.float32)
    # Nemotron's norms multiply by 1 + weight, and its GGUF files have that sum.
    shift = 1.0 if family == "nemotron" and name.endswith("gamma") and not is_gguf else 0.0
    return values.astype(np.float64) + shift, [("", shape, "F32", values)]


def hugging_face_name(name):
    suffix = "_scale" if name.endswith("_scale") else ""
    return theirs(name.removesuffix("_scale"), 1) + suffix


def content_of(kind, content, rows=None):
    """The bytes of a tensor, its rows in another order."""
    if isinstance(content, bytes):
        return content
    if isinstance(content, tuple):
        codes, wide = content if rows is None else (content[0][rows], content[1][rows])
        return runs_of(codes, wide[0, 0]) if kind == "I2_S" else blocks_of(kind, codes, wide)
    return float_bytes(kind, content if rows is None else content[rows])


def write_gguf_model(path, architecture, config, kv, ffn, stored, alignment):
    """Write tensors and keys as llama.cpp's converter does."""
    rms = config["norm"] == "rms"
    keys = {
        "context_length": 64,
        "embedding_length": config["model_dim"],
        "block_count": config["num_blocks"],
        "feed_forward_length": ffn,
        "attention.head_count": config["num_heads"],
        "attention.head_count_kv": kv,
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        f"attention.layer_norm_{'rms_' if rms else ''}epsilon": config["norm_epsilon"],
        "rope.freq_base": config["rope_base"],
        "rope.dimension_count": round(config["head_dim"] * config.get("rope_fraction", 1.0)),
    }
    if "rope_factor" in config:
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": config["rope_factor"],
            "rope.scaling.original_context_length": config["rope_original_length"],
        }
    keys = {
        "general.architecture": architecture,
        "general.alignment": alignment,
        **{f"{architecture}.{name}": value for name, value in keys.items()},
        "tokenizer.ggml.tokens": [f"t{token}" for token in range(config["vocab_size"])],
    }
    numbers = {name: number for name, (number, *_) in {**BLOCKS, **ROUGH}.items()}
    numbers |= {**FLOATS, "I2_S": 36}
    tensors = []
    for name, shape, kind, content in stored:
        rows, heads = None, {"q": config["num_heads"], "k": kv}.get(name[-1])
        if architecture == "llama" and ".attention." in name and heads and name[-2] in "wb":
            # Row 2 i of a head was row i, and row 2 i + 1 was row D / 2 + i.
            order = np.arange(heads * config["head_dim"]).reshape(heads, 2, -1)
            rows = order.swapaxes(1, 2).ravel()
        raw = content_of(kind, content, rows)
        tensors.append((theirs(name, 0), shape, numbers[kind], raw))
    write_gguf(path, keys, tensors, alignment)


def hugging_face_settings(family, config, kv, ffn, biased):
    """The settings of transformers."""
    settings = {
        "model_type": family,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["model_dim"],
        "intermediate_size": ffn,
        "num_hidden_layers": config["num_blocks"],
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": kv,
        "head_dim": config["head_dim"],
        "hidden_act": config["activation"],
        "max_position_embeddings": 64,
        "norm_eps" if config["norm"] == "layer" else "rms_norm_eps": config["norm_epsilon"],
        "tie_word_embeddings": config["tied_embeddings"],
        "attention_bias": biased,
        "mlp_bias": biased,
    }
    if family == "nemotron":
        settings["partial_rotary_factor"] = config.get("rope_fraction", 1.0)
    rope = {"rope_type": "default"}
    if "rope_factor" in config:
        rope = {"rope_type": "yarn", "factor": config["rope_factor"],
                "original_max_position_embeddings": config["rope_original_length"]}  # fmt: skip
    if len(rope) > 1:
        # The form of transformers 5.
        settings["rope_parameters"] = rope | {"rope_theta": config["rope_base"]}
    else:
        settings["rope_theta"] = config["rope_base"]
    return settings
