"""Exported models in llama.cpp: its tokens, its logits, what it writes, its perplexity.

Its settings are its own defaults. Then it stays close to exact arithmetic where the codes are exact
in f16 and only its cache rounds, to float16; other types make it round activations to 8 bits, as
our decoder does in its own way. A model is often torn between two characters: which bell, whose
name. There rounding decides what is written, theirs or ours.
"""

import functools

import numpy as np
import pytest

from helpers import gguf_file
from helpers.models import make_config, random_model
from helpers.texts import TEXTS
from legacy1bit import math_ops
from legacy1bit.data.stories import corpus, generate_stories
from legacy1bit.data.tokenizer import character_tokenizer, train_bpe
from legacy1bit.data_utils import tokenize_text
from legacy1bit.formats.adapters import (
    LoraPair,
    LoraWeights,
    adaptable,
    merged_model,
    write_gguf,
)
from legacy1bit.formats.gguf import export_gguf, import_gguf
from legacy1bit.forward import forward_llm
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import ARCHITECTURES
from legacy1bit.inference import Decoder
from legacy1bit.main import main
from legacy1bit.model import load_model
from legacy1bit.packed import PackedModel

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama_cpp is not installed: make test-gguf builds it"
)
pytestmark = pytest.mark.slow

# Trained here: the options, and the types to export to, of the matrices and perhaps of embeddings.
SIZES = ["--model-dim", "256", "--blocks", "2", "--steps", "400"]
GROUPED = [*SIZES, "--num-kv-heads", "2", "--ffn-dim", "512", "--architecture"]
YARN = ["--rope-factor", "4", "--rope-original-length", "64"]
EVERY = ("tq2_0", "tq1_0", "q2_0", "f16")
RUNS = {
    "narrow": (["--ffn-multiplier", "4", "--model-dim", "96", "--blocks", "3"], ("f16", "f32")),
    "wide": (["--ffn-multiplier", "4", *SIZES], EVERY),
    "llama": ([*GROUPED, "llama"], (*EVERY, "tq2_0 q8_0", "q2_0 f16")),
    "qwen3": ([*GROUPED, "qwen3", "--head-dim", "128", *YARN], EVERY),
    "groups": (
        [*GROUPED, "qwen3", "--scale", "128", "--ternary-embedding", "--tied-embeddings"],
        ("q2_0", "f16"),
    ),
    "ternary embedding": (
        [*GROUPED, "llama", "--ternary-embedding", "--scale", "row"],
        ("tq2_0", "tq1_0 f16"),
    ),
    "bitnet": ([*GROUPED, "bitnet", "--activation", "silu"], (*EVERY, "tq1_0 q8_0")),
}
CASES = [(name, kinds) for name, (_, many) in RUNS.items() for kinds in many]

# No training run has seen these.
HELD_OUT = corpus(generate_stories(100, seed=987_654)).encode()[:10_000]
BOS = 10
# From so many places of the text a prompt begins, so long, and so much is written.
PROMPTS = [HELD_OUT[1000 * i : 1000 * i + 40] for i in range(10)]
WRITTEN = 32
# Of two tokens whose logits are closer than that, neither is 1.23 times as likely as the other.
TIE = 0.2


@functools.cache
def trained(folder, name):
    out = folder / name
    assert main(["train", "--heads", "4", *RUNS[name][0], "--out", str(out)]) == 0
    return load_model(out)


def started(path, length, **more):
    """A model in llama.cpp, of that context; threads would wait for each other in vain."""
    return llama_cpp.Llama(
        str(path),
        n_ctx=length,
        n_batch=length,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
        **more,
    )


class Pair:
    """A model here and in llama.cpp."""

    def __init__(self, model, path, kinds):
        self.name = path.stem
        self.kind, *embedding = kinds.split()
        export_gguf(model, path, self.kind, None, *embedding)
        # Of a rounded embedding, the file's.
        self.model, self.length = import_gguf(path), model.config.sequence_length
        self.content = gguf_file.read(path)
        self.decoder = Decoder(PackedModel(self.model))
        self.twin = started(path, self.length)

    def ours(self, tokens):
        """Logits behind each token, float32[T, V]."""
        self.decoder.clear()
        return np.stack([self.decoder.prefill([token]) for token in tokens])

    def exact(self, tokens):
        """The same in float64 throughout."""
        return gguf_file.logits(*self.content, [int(token) for token in tokens])

    def theirs(self, tokens):
        self.twin.reset()
        self.twin.eval([int(token) for token in tokens])
        return np.array(self.twin.scores[: len(tokens)])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llama_cpp")


def amx_is_shut():
    """Whether llama.cpp multiplies on a matrix unit that the CPU has and programs may not use."""
    built = "AMX_INT8 = 1" in llama_cpp.llama_print_system_info().decode()
    return built and "amx" not in math_ops.simd_levels()


@pytest.fixture(scope="session", params=CASES, ids=", ".join)
def pair(request, folder):
    name, kinds = request.param
    # Its bitnet multiplies by the embedding, which it does not lay out anew.
    if kinds.endswith("q8_0") and name != "bitnet" and amx_is_shut():
        pytest.skip("llama.cpp was built for AMX, and ends: the operating system does not allow it")
    pair = Pair(trained(folder, name), folder / f"{name}-{kinds}.gguf", kinds)
    yield pair
    pair.twin.close()


def test_the_default_type_is_the_smallest_that_fits(folder):
    for name, kind in (("narrow", "f16"), ("wide", "tq2_0")):
        model = trained(folder, name)
        for chosen, path in ((None, folder / "chosen.gguf"), (kind, folder / "named.gguf")):
            export_gguf(model, path, chosen)
        assert (folder / "chosen.gguf").read_bytes() == (folder / "named.gguf").read_bytes()


# Every byte that is part of some UTF-8 text; what is no UTF-8, llama.cpp replaces.
EVERY_BYTE = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x400), 0xE000, 0xFFFD,
                               0x10000, 0x40000, 0x80000, 0xC0000, 0x10FFFF]))  # fmt: skip


@pytest.mark.parametrize("text", [*TEXTS.values(), EVERY_BYTE], ids=[*TEXTS, "every byte"])
def test_llama_cpp_has_our_tokens(pair, text):
    expected = tokenize_text(text).tolist()
    raw = text.encode()
    for special in (False, True):
        assert pair.twin.tokenize(raw, add_bos=False, special=special) == expected
        assert pair.twin.tokenize(raw, add_bos=True, special=special) == [BOS, *expected]


def test_every_token_is_its_byte(pair):
    assert pair.twin.n_vocab() == 256
    assert len(set(EVERY_BYTE.encode())) == 256 - len((*range(0xC0, 0xC2), *range(0xF5, 0x100)))
    for token in range(256):
        assert pair.twin.detokenize([token]) == bytes([token])


def test_logits_are_ours(pair):
    tokens = tokenize_text(HELD_OUT[:64])
    ours, theirs, exact = pair.ours(tokens), pair.theirs(tokens), pair.exact(tokens)
    distances, sizes = (np.linalg.norm(x, axis=1) for x in (ours - theirs, ours))
    overall, rounding = (
        np.linalg.norm(theirs - x) / np.linalg.norm(x) for x in (ours, exact.astype(np.float32))
    )
    print(f"{pair.name}: logits {overall:.2%} from ours, {rounding:.2%} from exact ones")
    assert (distances / sizes).mean() < 0.02
    assert overall < 0.02


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def test_probabilities_are_the_exact_ones(pair):
    tokens = tokenize_text(HELD_OUT[:64])
    ours, theirs = (np.exp(log_softmax(logits(tokens))) for logits in (pair.exact, pair.theirs))
    # Half the sum is the most by which the probability of anything can differ.
    distance = 0.5 * np.abs(ours - theirs).sum(axis=1).mean()
    assert distance < (1e-3 if pair.kind in ("f16", "f32") else 1e-2)


def continuation(prompt, logits):
    """What is written greedily behind a prompt, and the logits that each token was taken from."""
    tokens, seen = [BOS, *prompt], []
    for _ in range(WRITTEN):
        seen.append(logits(tokens)[-1])
        tokens.append(int(seen[-1].argmax()))
    return tokens[1 + len(prompt) :], seen


def test_what_is_written_differs_only_where_the_model_is_torn(pair):
    same = 0
    for prompt in PROMPTS:
        expected, logits = continuation(prompt, pair.exact)
        written, _ = continuation(prompt, pair.theirs)
        same += written == expected
        if written != expected:
            place = next(i for i, token in enumerate(written) if token != expected[i])
            gap = logits[place][expected[place]] - logits[place][written[place]]
            assert gap < TIE, f"{prompt}: token {place}"
    if pair.kind in ("f16", "f32"):
        assert same >= 9


def perplexity(logits, text, length):
    tokens = tokenize_text(text)
    losses = []
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length + 1]
        found = log_softmax(logits(window[:-1]))
        losses.append(-found[np.arange(len(window) - 1), window[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


def test_perplexity_is_ours(pair):
    ours = perplexity(pair.ours, HELD_OUT, pair.length)
    theirs = perplexity(pair.theirs, HELD_OUT, pair.length)
    print(f"{pair.name}: perplexity {theirs / ours - 1.0:+.3%}")
    # Chance would have 256.
    assert ours < 3.0
    assert abs(theirs / ours - 1.0) < 0.005


# --- Tokens other than bytes ----------------------------------------------------------------------

# Every character of some of Unicode's planes, and of the others a few.
CHARACTERS = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000)])) + EVERY_BYTE
LEARNED = [corpus(generate_stories(2000, seed=5)).encode(), CHARACTERS[:5000].encode()]
TOKENIZERS = {
    "bpe": lambda: train_bpe(LEARNED, 1500),
    "chars": lambda: character_tokenizer(LEARNED),
    "no merges": lambda: character_tokenizer([]),
}


@pytest.fixture(scope="session", params=TOKENIZERS)
def subword(request, folder):
    """A model of such tokens that has learned nothing, and its twin."""
    tokenizer = TOKENIZERS[request.param]()
    model = random_model(
        make_config(vocab_size=tokenizer.vocab_size, output_bias=False, sequence_length=256)
    )
    path = folder / f"{request.param}.gguf"
    export_gguf(model, path, "f16", tokenizer)
    twin = started(path, 256)
    yield Generator(model, tokenizer), twin
    twin.close()


def test_llama_cpp_has_our_subwords(subword):
    generator, twin = subword
    for text in (*TEXTS.values(), HELD_OUT.decode(), CHARACTERS, " ".join(CHARACTERS)):
        expected = generator.encode(text).tolist()
        assert twin.tokenize(text.encode(), add_bos=True, special=False) == expected
        assert twin.tokenize(text.encode(), add_bos=False, special=False) == expected[1:]


def test_characters_stand_for_themselves_between_others(subword):
    generator, twin = subword
    for character in CHARACTERS[::7]:
        text = f"a{character}b {character}{character} 1{character} "
        expected = generator.tokenizer.encode(text).tolist()
        assert twin.tokenize(text.encode(), add_bos=False, special=False) == expected


def test_llama_cpp_knows_the_special_tokens(subword):
    generator, twin = subword
    tokenizer, vocabulary = generator.tokenizer, twin._model.vocab
    assert twin.n_vocab() == tokenizer.vocab_size
    assert twin.token_bos() == twin.token_eos() == tokenizer.eos_token
    assert llama_cpp.llama_vocab_pad(vocabulary) == tokenizer.vocab_size - 1
    ends = [token for token in range(tokenizer.vocab_size)
            if llama_cpp.llama_vocab_is_eog(vocabulary, token)]  # fmt: skip
    assert ends == [tokenizer.eos_token]


def test_every_subword_is_its_bytes(subword):
    generator, twin = subword
    for token in range(generator.tokenizer.vocab_size):
        # Room for one token is all that the binding has, and it is small.
        if generator.tokenizer.byte_lengths[token] <= 30:
            assert twin.detokenize([token]) == generator.tokenizer.decode([token])


def test_logits_behind_subwords_are_ours(subword):
    generator, twin = subword
    tokens = generator.encode(HELD_OUT[:200])
    assert 32 < tokens.size < 256
    twin.reset()
    twin.eval(tokens.tolist())
    theirs, ours = (
        np.array(twin.scores[: tokens.size]),
        Decoder(generator.model).prefill_logits(tokens),
    )
    assert np.linalg.norm(theirs - ours) / np.linalg.norm(ours) < 0.02


# --- Adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alphas", [(16.0,), (16.0, 4.0)], ids=["one alpha", "two alphas"])
@pytest.mark.parametrize("name", ["nemotron", "llama", "qwen3", "bitnet"])
def test_probabilities_with_an_adapter_are_those_of_the_merged_model(tmp_path, name, alphas):
    """Elements 2 i and 2 i + 1 of a head rotate together here, and in llama.cpp only in Llama."""
    settings = {**ARCHITECTURES[name], "output_bias": False, "rope_pairs": "adjacent"}
    if name == "bitnet":
        settings["activation"] = "silu"
    model = random_model(
        make_config(**{**settings, "model_dim": 64, "num_heads": 4, "vocab_size": 256})
    )
    rng, pairs = np.random.default_rng(1), {}
    for i, (matrix, (rows, cols)) in enumerate(adaptable(model.config).items()):
        a, b = (0.1 * rng.normal(size=shape).astype(np.float32) for shape in ((3, cols), (rows, 3)))
        pairs[matrix] = LoraPair(a, b, alphas[i % len(alphas)] / 3)
    adapter = LoraWeights(pairs)
    export_gguf(model, tmp_path / "model.gguf", "f32")
    write_gguf(adapter, model.config, tmp_path / "adapter.gguf")
    tokens = np.arange(1, 9, dtype=np.int32)
    for scale in (1.0, -0.5):
        more = {"lora_path": str(tmp_path / "adapter.gguf"), "lora_scale": scale}
        twin = started(tmp_path / "model.gguf", 64, **more)
        twin.eval(tokens.tolist())
        theirs = np.exp(log_softmax(np.array(twin.scores[: tokens.size])))
        twin.close()
        ours = forward_llm(merged_model(model, [(adapter, scale)]), tokens[None])[0]
        # Its cache rounds keys and values to float16.
        assert 0.5 * np.abs(ours - theirs).sum(axis=1).max() < 2e-3
        assert 0.5 * np.abs(forward_llm(model, tokens[None])[0] - theirs).sum(axis=1).max() > 0.02
