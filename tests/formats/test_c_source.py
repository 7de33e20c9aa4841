"""Models as C source: compiled by every compiler there is, run, and held against the decoder.

Greedy text is compared byte for byte: what the blocks of both compute has the same bits. Sums of
floats in the output layer may have another order, and models of float matrices consist of such; so
these are such whose text no instruction set of the decoder doubts.
"""

import functools
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.compilers import BUILDS, EMULATORS, why_not
from helpers.models import MODELS, in_every_tier, make_config, random_model
from legacy1bit.data.corpus import text_corpus
from legacy1bit.formats.c_source import export_c
from legacy1bit.formats.provenance import Provenance
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import ARCHITECTURES, ModelConfig, SamplingConfig, TrainingConfig
from legacy1bit.inference import Decoder
from legacy1bit.logger import MetricsLogger
from legacy1bit.model import create_legacy_llm
from legacy1bit.packed import PackedModel
from legacy1bit.training.trainer import Trainer

FLAGS = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]


def builds(*quick):
    """Tests of every build; but for these they are slow ones."""
    return pytest.mark.parametrize(
        "build",
        [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in BUILDS],
    )


def random_settings(rng):
    """Settings of a small model with any options of the architecture, those that fit together."""
    rope, scale = rng.choice(["rope", "none"]), rng.choice(["tensor", "row", "64", "128", "one"])
    kv_heads = rng.randint(1, 3)
    return {
        "vocab_size": rng.randint(40, 90),
        "model_dim": rng.randint(20, 90),
        "num_blocks": rng.randint(1, 3),
        "num_heads": kv_heads * rng.randint(1, 3),
        "num_kv_heads": kv_heads,
        "head_dim": 2 * rng.randint(1, 12) if rope == "rope" else rng.randint(1, 24),
        "ffn_dim": rng.randint(10, 150),
        "scheme": rng.choice(["ternary", "ternary", "binary", "2bit", "float"]),
        "scale": scale,
        "scale_shards": rng.randint(1, 3) if scale == "tensor" else 1,
        "ternary_embedding": rng.random() < 0.7,
        "tied_embeddings": rng.random() < 0.5,
        "int8_activations": rng.random() < 0.5,
        "norm": rng.choice(["layer", "rms"]),
        "norm_bias": rng.random() < 0.5,
        "norm_epsilon": rng.choice([1e-5, 1e-6, 0.03]),
        "sub_norm": rng.random() < 0.5,
        "qk_norm": rng.random() < 0.5,
        "biases": rng.choice(["all", "qkv", "none"]),
        "gated": rng.random() < 0.5,
        "activation": rng.choice(["relu", "relu2", "silu", "gelu"]),
        "positions": rope,
        "rope_pairs": rng.choice(["halves", "adjacent"]),
        "final_norm": rng.random() < 0.8,
        "window_pattern": rng.choice([None, "3", "0,5", "4,0,1"]),
        "output_bias": rng.random() < 0.5,
    }


OPTIONS = {
    **MODELS,
    **ARCHITECTURES,
    "grouped": {**ARCHITECTURES["llama"], "num_heads": 6, "num_kv_heads": 2, "head_dim": 8,
                "window_pattern": "3,0", "rope_pairs": "adjacent"},
    "gelu": {"activation": "gelu", "norm_bias": False, "biases": "qkv", "scale_shards": 2,
             "ternary_embedding": True, "tied_embeddings": True},
    "silu, 64": {"activation": "silu", "qk_norm": True, "scale": "64", "ffn_dim": 150,
                 "norm_epsilon": 0.03},
    "gated relu": {"activation": "relu", "gated": True, "num_kv_heads": 1, "ffn_dim": 7},
}  # fmt: skip
RANDOM = {f"random {i}": random_settings(random.Random(i)) for i in range(20)}
OPTIONS |= RANDOM
# Others have the settings of these together.
APART = {"float", "ternary embedding", "scale one", "plain", "span 1", "span 3", "one block",
         "no output bias", "wide", "sub norm", "int8", "nemotron", "llama"}  # fmt: skip
options = pytest.mark.parametrize(
    "options",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in {*RANDOM, *APART} else name
        for name in OPTIONS
    ],
)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks what only Linux has")

CONTEXT = 24
NOT_FINITE = b"the model's logits are not finite: its weights are damaged"


# --- Programs -------------------------------------------------------------------------------------


class Programs:
    """Compiles sources, each for each build once."""

    def __init__(self, folder):
        self.folder = folder
        self.made = {}

    def __call__(self, source, build="gcc", *more):
        """Return the command that runs a source's program."""
        if why_not(build):
            pytest.skip(why_not(build))
        key = source, build, more
        if key not in self.made:
            program = self.folder / f"model{len(self.made)}.exe"
            subprocess.run(
                [*BUILDS[build], *FLAGS, *more, "-x", "c", "-", "-o", program, "-lm"],
                input=source.encode("ascii"),
                check=True,
            )
            self.made[key] = [*EMULATORS.get(build, []), program]
        return self.made[key]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return Programs(tmp_path_factory.mktemp("programs"))


def run(command, *arguments):
    done = subprocess.run(
        [*command, *(a if isinstance(a, bytes) else str(a) for a in arguments)],
        # The program leaves its memory to the end of the process. Wine tells of itself.
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "WINEDEBUG": "-all"},
        capture_output=True,
        timeout=120,
    )
    # Lines for people end as they do in that system.
    done.stderr = done.stderr.replace(b"\r\n", b"\n")
    return done


def written(command, *arguments):
    """What a program writes that has nothing to complain of."""
    done = run(command, *arguments)
    assert re.fullmatch(rb"memory: \d+ bytes\n", done.stderr)
    assert done.returncode == 0
    return done.stdout


def assert_refused(done, status, *says):
    """One line that says so, and nothing else but how much memory there is."""
    assert done.returncode == status
    lines = [line for line in done.stderr.splitlines() if not line.startswith(b"memory: ")]
    assert len(lines) == 1
    for part in says:
        assert part in lines[0]


# --- Models ---------------------------------------------------------------------------------------


def source_of(model, folder):
    export_c(model, folder / "model.c")
    return (folder / "model.c").read_text("ascii")


def tokens_of(model, prompt):
    return [10, *prompt] if model.config.vocab_size > 10 else list(prompt)


def greedy(model, prompt, count):
    """The prompt and what the decoder writes behind it."""
    tokens = tokens_of(model, prompt)
    return prompt + bytes(Generator(model).tokens(tokens, count, SamplingConfig(0.0)))


def logits_of(model, prompt):
    return Decoder(PackedModel(model)).prefill(tokens_of(model, prompt))


def wild_model(config, seed):
    """A random model whose matrices are large, so that each token changes its mind."""
    model, rng = random_model(config, seed), np.random.default_rng(seed)
    if config.scheme != "sign":
        for weights in model.latent.values():
            if weights.ndim == 2:
                weights[...] = rng.standard_normal(weights.shape, np.float32)
    if config.tied_embeddings:
        # The output repeats the last token, unless the blocks add more to it.
        model.latent["embedding.weight"][...] *= 0.3
    else:
        model.latent["output.weight"][...] *= 4.0
    model.quantize()
    return model


@functools.cache
def talkative(options, prompt):
    """A model of an option set that writes more than one thing, and what: the same in each tier."""
    config = make_config(**{"vocab_size": 61, "sequence_length": CONTEXT, **OPTIONS[options]})
    for seed in range(300):
        model = wild_model(config, seed)
        text = greedy(model, prompt, 200)
        if len(set(text[len(prompt) + 100 :])) < 4:
            continue
        exact = logits_of(model, prompt)
        if all(other == text for other in in_every_tier(greedy, model, prompt, 200)) and all(
            close(logits, exact) for logits in in_every_tier(logits_of, model, prompt)
        ):
            return model, text
    raise AssertionError(f"no model of {options} is sure of what it writes")


def close(logits, exact):
    return np.abs(logits - exact).max() <= 1e-5 * np.abs(exact).max()


def prompt_for(options):
    return bytes([3, 1, 4, 1, 5]) if OPTIONS[options].get("vocab_size", 61) > 5 else b"\1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that has learned a few sentences by heart."""
    folder = tmp_path_factory.mktemp("run")
    text = b"The cat sat on the mat. The dog ran to the cat. A hen saw the dog run.\n" * 40
    config = ModelConfig(model_dim=32, num_blocks=2, num_heads=2, sequence_length=48)
    training = TrainingConfig(steps=150, warmup_steps=10, precision="float32")
    trainer = Trainer(
        folder, config, training, text_corpus(text, "text", 48, 256), {"name": "text"}
    )
    trainer.train(MetricsLogger(folder))
    return trainer.model


@pytest.fixture(scope="module")
def trained_source(trained, tmp_path_factory):
    return source_of(trained, tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """The source of a model of a few tokens, and how likely it finds each at the beginning."""
    model = random_model(make_config(vocab_size=12))
    model.latent["output.weight"][...] *= 3.0
    model.quantize()
    logits = logits_of(model, b"\1\2").astype(np.float64)
    chances = np.exp((logits - logits.max()) / 1.5)
    return source_of(model, tmp_path_factory.mktemp("source")), chances / chances.sum()


# --- The text -------------------------------------------------------------------------------------


@options
@builds("clang")
def test_greedy_text_is_the_decoders(options, build, compiled, tmp_path):
    prompt = prompt_for(options)
    model, text = talkative(options, prompt)
    command = compiled(source_of(model, tmp_path), build)
    assert written(command, prompt, 200, 0) == text


@builds("gcc -m32", "Pentium III", "ARMv6", "aarch64", "Windows", "Windows, 32 bits")
def test_greedy_text_of_a_trained_model_is_the_decoders(build, trained, trained_source, compiled):
    command = compiled(trained_source, build)
    for prompt in (b"The hen", b"", b"A", b"dog dog dog", b"mat. The", b"T", b"\x80\xff", b"zzz"):
        if "Windows" in build and not prompt.isascii():
            continue  # There, arguments are text.
        text = greedy(trained, prompt, 100)
        assert len(text) == len(prompt) + 100
        assert written(command, prompt, 100, 0) == text


@builds("clang", "Pentium III")
@pytest.mark.parametrize("norm", [{}, {"norm_bias": False}, {"norm": "rms"}], ids=str)
def test_norms_of_extreme_numbers_are_the_decoders(norm, build, compiled, tmp_path):
    """Squares that overflow, and numbers that are all but equal: see ``normalise``."""
    model = wild_model(make_config(vocab_size=61, sequence_length=CONTEXT, **norm), 1)
    embedding = model.latent["embedding.weight"]
    embedding[::2] *= 1e25
    embedding[1::2] = 12345.0
    command = compiled(source_of(model, tmp_path), build)
    for prompt in (bytes(range(2, 18, 2)), bytes(range(1, 16, 2)), bytes(range(1, 16))):
        assert written(command, prompt, 100, 0) == greedy(model, prompt, 100)


def test_greedy_text_of_a_trained_model_is_that_of_every_instruction_set(trained):
    for prompt in (b"The hen", b"", b"zzz"):
        assert len(set(in_every_tier(greedy, trained, prompt, 200))) == 1


def with_logits(source):
    """The source of a program that writes its logits before each token."""
    draw = "        token = draw("
    assert source.count(draw) == 1
    return source.replace(draw, f"fwrite(s->logits, sizeof(float), VOCAB, stdout);\n{draw}")


def dumped(command, model, prompt, count=1):
    """The logits of each token, float32[N, V], and the text."""
    vocab = model.config.vocab_size
    out = written(command, prompt, count, 0)
    rows = np.frombuffer(out[len(prompt) :], np.uint8).reshape(count, 4 * vocab + 1)
    logits = np.ascontiguousarray(rows[:, :-1]).view(np.float32)
    return logits, prompt + rows[:, -1].tobytes()


@pytest.mark.slow
@options
def test_logits_are_the_decoders_and_the_same_bits_without_sse(options, compiled, tmp_path):
    prompt = prompt_for(options)
    model, expected = talkative(options, prompt)
    source = with_logits(source_of(model, tmp_path))
    logits, text = dumped(compiled(source, "gcc"), model, prompt, 200)
    assert text == expected
    if model.config.scheme != "float" and model.config.ternary_embedding:
        # All sums are whole numbers or have one order.
        for size in range(len(prompt), CONTEXT):
            np.testing.assert_array_equal(logits[size - len(prompt)], logits_of(model, text[:size]))
    else:
        assert close(logits[0], logits_of(model, prompt))
    plain, _ = dumped(compiled(source, "gcc, plain C"), model, prompt, 200)
    np.testing.assert_array_equal(plain, logits)


@pytest.mark.parametrize(
    ("build", "without"),
    [
        ("gcc", "gcc, plain C"),
        ("clang", "clang, plain C"),
        ("Pentium III, x87", "Pentium III, plain C"),
    ],
)
def test_logits_have_the_same_bits_with_and_without_sse(
    build, without, trained, trained_source, compiled
):
    source = with_logits(trained_source)
    logits, text = dumped(compiled(source, build), trained, b"The dog", 20)
    assert text == greedy(trained, b"The dog", 20)
    plain, _ = dumped(compiled(source, without), trained, b"The dog", 20)
    np.testing.assert_array_equal(plain, logits)


def test_sums_that_a_float_does_not_hold_are_taken_in_parts(trained, trained_source, compiled):
    words = "(1 << 24) / (4 * 127 * 3)"
    assert trained_source.count(words) == 1
    command = compiled(trained_source.replace(words, "3"))
    assert written(command, "A dog", 100, 0) == greedy(trained, b"A dog", 100)


@pytest.mark.parametrize("size", [0, 1, 46, 47, 48, 49, 150])
def test_prompts_of_any_length(size, trained, trained_source, compiled):
    prompt = (b"The dog ran to the cat. " * 10)[:size]
    done = run(compiled(trained_source), prompt, 60, 0)
    assert done.stdout == greedy(trained, prompt, 60)
    remarks = done.stderr.splitlines()[1:]
    if size + 1 > trained.config.sequence_length:
        assert remarks == [
            b"the prompt is longer than the model's context: only the last 48 of its "
            b"%d tokens count" % (size + 1)
        ]
    else:
        assert remarks == []


@pytest.mark.parametrize("context", [1, 2, 3])
def test_contexts_of_a_few_tokens(context, compiled, tmp_path):
    model = wild_model(make_config(vocab_size=61, sequence_length=context), 1)
    command = compiled(source_of(model, tmp_path))
    for prompt in (b"", b"\1", b"\1\2\3\4"):
        assert run(command, prompt, 50, 0).stdout == greedy(model, prompt, 50)


def test_every_byte_of_a_prompt_comes_back(trained, trained_source, compiled):
    prompt = bytes(range(1, 256))
    assert written(compiled(trained_source), prompt[:40], 0) == prompt[:40]
    assert run(compiled(trained_source), prompt, 0).stdout == prompt


def test_the_defaults(trained_source, compiled):
    command = compiled(trained_source)
    text = written(command, "The")
    assert len(text) == 253
    assert text == written(command, "The", 250, 0.8, 0)


# --- Sampling -------------------------------------------------------------------------------------


def uniform(seed):
    """The first number of SplitMix64, once more."""
    mask = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return ((z ^ z >> 31) >> 11) / 2**53


def test_tokens_are_drawn_as_often_as_they_are_likely(sampled, compiled):
    source, chances = sampled
    command = compiled(source)
    seeds = [*range(400), 2**64 - 1]
    drawn = np.array([written(command, b"\1\2", 1, 1.5, seed)[2] for seed in seeds])
    places = np.searchsorted(np.cumsum(chances), [uniform(seed) for seed in seeds], side="right")
    np.testing.assert_array_equal(drawn, places)
    expected = chances * len(seeds)
    off = (np.bincount(drawn, minlength=chances.size) - expected) ** 2 / expected
    # Chi-square of that many tokens: five standard deviations above its mean.
    assert np.sum(off) < chances.size - 1 + 5 * np.sqrt(2 * (chances.size - 1))


def test_a_seed_fixes_the_text(trained_source, compiled):
    command = compiled(trained_source)
    texts = [written(command, "The", 100, 1, seed) for seed in (0, 1, 2, 1)]
    assert len(set(texts)) == 3
    assert texts[1] == texts[3]


@builds("gcc", "gcc, sanitizers", "gcc -m32", "clang", "Pentium III", "ARMv6", "aarch64")
def test_a_seed_fixes_the_text_in_every_build(build, trained_source, compiled):
    expected = written(compiled(trained_source), "The", 100, 1.2, 7)
    assert written(compiled(trained_source, build), "The", 100, 1.2, 7) == expected


@pytest.mark.parametrize("temperature", ["1e-300", "1e-3", ".001"])
def test_near_temperature_0_the_text_is_greedy(temperature, trained, trained_source, compiled):
    expected = greedy(trained, b"The", 50)
    assert written(compiled(trained_source), "The", 50, temperature) == expected


def test_at_a_high_temperature_all_tokens_are_drawn(sampled, compiled):
    assert len(set(written(compiled(sampled[0]), b"\1", 1000, "1e308")[1:])) == 12


# --- What cannot be done --------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("a", 1, 1, 1, 1)])
def test_other_arguments_are_told_the_usage(arguments, trained_source, compiled):
    done = run(compiled(trained_source), *arguments)
    assert_refused(done, 2, b"usage: ", b'"prompt" [tokens] [temperature] [seed]')
    assert done.stdout == b""


WRONG = {
    "tokens": ["-1", "+1", "", "x", "1x", "1.5", " 1", "1 ", "2147483648", "9" * 40],
    "temperature": ["-1", "-0.5", "", "x", "1x", "nan", "inf", "1e999", " 1", "1 ", "."],
    "seed": ["-1", "", "x", "1x", "0x10", "1.0", "18446744073709551616", "9" * 40],
}


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, numbers in WRONG.items() for number in numbers]
)
def test_a_wrong_number_is_refused(name, number, trained_source, compiled):
    arguments = {"tokens": "1", "temperature": "1", "seed": "1", name: number}
    done = run(compiled(trained_source), "a", *arguments.values())
    assert_refused(done, 2, name.encode() + b": expected a")
    assert done.stdout == b""


def test_the_largest_numbers_are_taken(trained_source, compiled):
    command = compiled(trained_source)
    assert len(written(command, "a", "007", "1e308", 2**64 - 1)) == 8
    with subprocess.Popen([*command, "a", "2147483647"], stdout=-1, stderr=-1) as process:
        assert len(process.stdout.read(20)) == 20
        process.kill()


def test_a_byte_that_is_no_token_is_refused(sampled, compiled):
    done = run(compiled(sampled[0]), b"\1\2\x0c\3", 10)
    assert_refused(done, 2, b"byte 12 at offset 2 is outside the vocabulary of 12 tokens")
    assert done.stdout == b""


def test_an_empty_prompt_needs_a_line_break_among_the_tokens(compiled, tmp_path):
    for vocab, status in ((10, 2), (11, 0)):
        model = random_model(make_config(vocab_size=vocab))
        done = run(compiled(source_of(model, tmp_path)), "", 20)
        assert done.returncode == status
        assert len(done.stdout) == (0 if status else 20)
    model = random_model(make_config(vocab_size=10))
    assert_refused(run(compiled(source_of(model, tmp_path)), ""), 2, b"prompt: it is empty")


@pytest.mark.parametrize("build", ["clang", "gcc, sanitizers", "Pentium III"])
@pytest.mark.parametrize("part", ["final_norm.gamma", "blocks.0.ffn.bi"])
def test_damaged_weights_are_told(build, part, compiled, tmp_path):
    model = random_model(make_config())
    model.latent[part][...] = 3e38
    with pytest.raises(ValueError, match=NOT_FINITE.decode()):
        next(Generator(model).tokens([10, 1], 1))
    command = compiled(source_of(model, tmp_path), build)
    for temperature in (0, 1):
        done = run(command, b"\1", 3, temperature)
        assert_refused(done, 1, NOT_FINITE)
        assert done.stdout == b"\1"


@on_linux
@pytest.mark.parametrize("prompt", ["", "abc"])
def test_text_that_cannot_be_written_ends_the_program(prompt, trained_source, compiled):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*compiled(trained_source), prompt], stdout=full, stderr=subprocess.PIPE
        )
    assert_refused(done, 1, b"cannot write the text: No space left on device")


@on_linux
def test_memory_that_is_not_there_is_told(compiled, tmp_path):
    model = create_legacy_llm(make_config(sequence_length=1 << 17, model_dim=96), 1)
    command = compiled(source_of(model, tmp_path))
    limit = 32 << 20
    done = subprocess.run(
        [*command, "\1"],
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert_refused(done, 1, b"there is not so much memory")
    assert done.stdout == b""


# --- Size -----------------------------------------------------------------------------------------

SIZES = {
    "5 blocks of 128": {"model_dim": 128, "num_blocks": 5},
    "8 blocks of 104": {"model_dim": 104, "num_blocks": 8},
    "4 blocks of 144": {"model_dim": 144, "num_blocks": 4, "ternary_embedding": True},
}
SIZES = {name: {"num_heads": 4, "ffn_multiplier": 4, **sizes} for name, sizes in SIZES.items()}


@on_linux
@pytest.mark.parametrize(
    "build",
    [
        "gcc -m32",
        pytest.param("gcc", marks=pytest.mark.slow),
        pytest.param("gcc, plain C", marks=pytest.mark.slow),
        pytest.param("clang", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_model_of_a_million_parameters_is_small(sizes, build, compiled, tmp_path):
    model = create_legacy_llm(ModelConfig(**SIZES[sizes]), 1, trainable=False)
    assert model.num_parameters > 1_000_000
    command = compiled(source_of(model, tmp_path), build, "-s")
    assert Path(command[-1]).stat().st_size < 400_000
    with subprocess.Popen([*command, "a", "2147483647"], stdout=-1, stderr=-1) as process:
        # Text comes as it is written; when there is some, all memory has been touched.
        assert len(process.stdout.read(300)) == 300
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.kill()
    assert int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) < 4096


# --- The file -------------------------------------------------------------------------------------


def test_the_file_tells_what_the_model_is(trained, tmp_path):
    source = source_of(trained, tmp_path)
    head = source[: source.index("*/")]
    for line in trained.provenance.lines():
        assert f" * {line}\n" in head
    for name, value in trained.config.to_dict().items():
        assert f"{name}={value}" in head
    assert source == source_of(trained, tmp_path)


HOSTILE = [
    "*/ int main",
    "/* a",
    "//*//**/*/",
    "a\nb\r\n#error",
    "??/",
    "????/??/\n",
    "é\ud800\0",
    "\\",
]


def assert_in_the_comment(model, text, folder):
    """Check that what provenance says changes the first comment only, and return the source."""
    model.provenance = Provenance()
    plain = source_of(model, folder)
    model.provenance = Provenance(data=text, data_sha256=text, license=text)
    source = source_of(model, folder)
    end = source.index("*/")
    assert source[end:] == plain[plain.index("*/") :]
    assert "/*" not in source[2:end]
    assert "??" not in source[:end]
    assert source.count("\n") == plain.count("\n")
    return source


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_provenance_says_stays_in_the_comment(text, tmp_path):
    assert_in_the_comment(random_model(make_config()), text, tmp_path)


@pytest.mark.parametrize("build", ["gcc", "clang"])
def test_what_provenance_says_does_not_disturb_a_compiler(build, compiled, tmp_path):
    model = random_model(make_config())
    source = assert_in_the_comment(model, "".join(HOSTILE), tmp_path)
    assert len(written(compiled(source, build), b"\1", 3)) == 4


def test_weights_keep_every_bit(compiled, tmp_path):
    model = random_model(make_config())
    bias = np.array([1e-45, -1e-45, 1.17549435e-38, 0.1, -0.0, 3.4e38, 1 / 3, np.pi, 1e10, 7, -8])
    model.latent["output.bias"][...] = bias
    # Nothing but the bias comes out.
    model.latent["output.weight"][...] = 0.0
    logits, _ = dumped(compiled(with_logits(source_of(model, tmp_path))), model, b"\1")
    np.testing.assert_array_equal(logits[0], bias.astype(np.float32))


def test_more_tokens_than_bytes_are_refused(tmp_path):
    model = create_legacy_llm(make_config(vocab_size=257), 1)
    with pytest.raises(ValueError, match="the model has 257 tokens, expected at most 256"):
        export_c(model, tmp_path / "model.c")
    assert not list(tmp_path.iterdir())


REFUSED = {
    "YaRN: train with --rope-factor 1 --rope-original-length 0": {
        "rope_factor": 4.0, "rope_original_length": 16},
    "rotary positions of a part of a head: train with --rope-fraction 1": {"rope_fraction": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_positions_that_a_program_does_not_have_are_refused(message, tmp_path):
    model = create_legacy_llm(make_config(head_dim=8, **REFUSED[message]), 1)
    with pytest.raises(ValueError, match=f"^models as C source have no {message}$"):
        export_c(model, tmp_path / "model.c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["embedding.weight", "output.bias", "blocks.1.norm2.gamma"])
def test_weights_that_are_not_finite_are_refused(part, tmp_path):
    model = create_legacy_llm(make_config(), 1)
    model.latent[part].flat[-1] = np.nan
    with pytest.raises(ValueError, match=f"{part} holds a number that is not finite"):
        export_c(model, tmp_path / "model.c")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        export_c(create_legacy_llm(make_config(), 1), tmp_path / "missing" / "model.c")
