"""A model from Python: every kind of file, the command line's text, saving, threads."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import legacy1bit
from helpers.arrays import assert_same_bits
from helpers.cases import together
from helpers.models import make_config, random_model
from helpers.paths import ROOT
from helpers.published import GOLDEN, golden, with_golden_models
from helpers.runs import TEXT
from legacy1bit.api.models import Model
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.formats.adapters import LoraPair, LoraWeights, write_peft
from legacy1bit.formats.c_v1 import export_c_v1, import_c_v1
from legacy1bit.formats.gguf import export_gguf
from legacy1bit.formats.hugging_face import export_hugging_face
from legacy1bit.formats.provenance import Provenance
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import ARCHITECTURES, ModelConfig, SamplingConfig
from legacy1bit.model import save_model

PROMPT = "Kim was a"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    sizes = {"model_dim": 8, "blocks": 1, "heads": 2, "sequence_length": 64, "batch_size": 2}
    folder = tmp_path_factory.mktemp("models") / "run"
    return legacy1bit.train(out=folder, steps=4, stories=20, threads=1, evaluate_every=1, **sizes)


@pytest.fixture(scope="module")
def model(run):
    return run.load()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model = random_model(
        make_config(model_dim=24, vocab_size=256, sequence_length=64, output_bias=False), seed=1
    )
    paths = {"folder": folder / "folder", "gguf": folder / "a.gguf", "safetensors": folder / "hf"}
    save_model(model, paths["folder"])
    ByteTokenizer().save(paths["folder"])
    export_gguf(model, paths["gguf"], tokenizer=ByteTokenizer())
    export_hugging_face(model, paths["safetensors"], ByteTokenizer())
    return paths


def assert_same_model(one, other):
    """Two models compute the same bits of every token, and of a text."""
    assert one.config == other.config
    tokens = np.arange(20, dtype=np.int32) * 7 % one.config.vocab_size
    logits = [each.generator.decoder().prefill_logits(tokens) for each in (one, other)]
    assert_same_bits(*logits)
    for each in (one, other):
        assert each.tokenizer.vocab_size == one.tokenizer.vocab_size
    # Small models of bytes do not know these letters.
    if one.tokenizer.kind != "unknown" and one.tokenizer.vocab_size > ord("z"):
        texts = [each.generate("It was", 30, seed=2) for each in (one, other)]
        assert texts[0] == texts[1]


# --- Text -----------------------------------------------------------------------------------------


def test_text_is_that_of_the_command_line(run, model, say):
    options = ["--model", run.folder, "--seed=5", "--max-tokens=60", "--json"]
    options += ["--temperature=0.9", "--top-k=20", "--stop=ab"]
    said = say("generate", "--prompt", PROMPT, *options).out
    text = model.generate(PROMPT, 60, seed=5, stop=["ab"], temperature=0.9, top_k=20)
    assert json.loads(said) == {
        "prompt": PROMPT, "text": text.text, "tokens": text.tokens, "seed": 5,
        "stopped": text.stopped,
    }  # fmt: skip
    with model.stream(PROMPT, 60, seed=5, stop=["ab"], temperature=0.9, top_k=20) as stream:
        assert "".join(stream) == text.text


def test_text_is_that_of_the_generator(run, model):
    generator = Generator.load(run.folder)
    prompts = [PROMPT, "", "It"]
    ours = model.batch(prompts, 20, seed=3, stop=["x"], temperature=0.5)
    assert ours == generator.batch(prompts, 20, SamplingConfig(temperature=0.5), 3, ["x"])
    assert_same_bits(model.embed(PROMPT), generator.embed(PROMPT))
    assert_same_bits(model.log_probabilities(PROMPT), generator.log_probabilities(PROMPT))
    assert model.embed(PROMPT).shape == (len(PROMPT), 8)


def test_two_calls_without_a_seed_differ(model):
    assert model.generate(PROMPT, 30).seed != model.generate(PROMPT, 30).seed


def test_a_conversation_is_that_of_the_command_line(run, model):
    said = run_chat(run.folder, b"Hi\nHow?\n")
    with model.chat("Say no.", template="plain", seed=3, max_tokens=9, temperature=0.8) as chat:
        first = chat.answer("Hi")
        pieces = list(chat.stream("How?"))
    assert f"{first}\n{''.join(pieces)}\n" == said
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[3]["content"] == "".join(pieces).strip()


def run_chat(folder, typed):
    done = subprocess.run(
        [sys.executable, "-m", "legacy1bit.main", "chat", "--model", folder, "--template=plain",
         "--seed=3", "--max-tokens=9", "--system=Say no.", "--temperature=0.8"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, input=typed, capture_output=True, check=True,
    )  # fmt: skip
    return done.stdout.decode()


def test_an_answer_that_is_left_is_taken_in(model):
    with model.chat(template="plain", seed=3, max_tokens=20, stop=["zz"]) as chat:
        answer = chat.stream("Hi")
        part = next(answer) + next(answer)
        answer.close()
        assert chat.messages[-1] == {"role": "assistant", "content": part.strip()}
        assert "zz" in chat.stop
        # A message that does not fit is no part of the conversation.
        with pytest.raises(ValueError, match="the message has"):
            chat.answer("x" * 100)
        assert len(chat.messages) == 2
        assert chat.answer("Ho").strip() == chat.messages[-1]["content"]


# --- Measures -------------------------------------------------------------------------------------


def test_measures_are_those_of_the_command_line(run, model, say, tmp_path):
    assert model.evaluate() == run.metrics
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT)
    said = say("evaluate", "--model", run.folder, "--data", text).out.decode()
    assert f"validation loss   {model.evaluate(text).loss:.4f} nats" in said
    assert model.evaluate([text], threads=1).tokens == model.evaluate(str(text)).tokens
    assert model.evaluate(run_data=None).loss == run.metrics.loss


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "gguf", "safetensors"])
def test_a_saved_model_is_the_same(kind, files, tmp_path):
    model = legacy1bit.load(files[kind])
    target = tmp_path / ("a.gguf" if kind == "gguf" else "saved")
    model.save(target)
    assert_same_model(legacy1bit.load(target), model)
    # Again, of the copy; and the first goes on to work without the original.
    legacy1bit.load(target).save(tmp_path / "again")
    assert_same_model(legacy1bit.load(tmp_path / "again"), model)
    assert model.generate("a", 5, seed=1).text == model.generate("a", 5, seed=1).text


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_every_form_is_the_same_model(kind, files, tmp_path):
    model = legacy1bit.load(files["folder"])
    model.save(tmp_path / "a", kind)
    saved = legacy1bit.load(tmp_path / "a")
    assert_same_model(saved, legacy1bit.load(files[kind]))
    texts = [one.generate("It was", 30, seed=1).text for one in (saved, model)]
    assert texts[0] == texts[1]


def test_the_provenance_beside_a_file_of_the_c_original_is_saved_with_it(tmp_path):
    known, unknown = (random_model(ModelConfig.c_original(64, 64, 1), seed) for seed in (1, 2))
    known.provenance = Provenance("a text", "0123abcd", 7, 1.25, "CC0-1.0")
    export_c_v1(known, tmp_path / "known.bin")
    export_c_v1(unknown, tmp_path / "unknown.bin")
    (tmp_path / "unknown.bin.json").unlink()
    target = tmp_path / "copy.bin"
    legacy1bit.load(tmp_path / "known.bin").save(target)
    assert import_c_v1(target).provenance == known.provenance
    # That of a replaced file does not stay.
    legacy1bit.load(tmp_path / "unknown.bin").save(target)
    assert target.read_bytes() == (tmp_path / "unknown.bin").read_bytes()
    assert import_c_v1(target).provenance == Provenance()
    (tmp_path / "copy.bin.json").write_text("{}")
    with pytest.raises(ValueError, match=r"copy\.bin\.json is something else, expected the prov"):
        legacy1bit.load(tmp_path / "known.bin").save(target)
    assert (tmp_path / "copy.bin.json").read_text() == "{}"


def test_the_best_model_of_a_run_is_saved(run, model, tmp_path):
    model.save(tmp_path / "best")
    assert_same_model(legacy1bit.load(tmp_path / "best"), model)
    assert {path.name for path in (tmp_path / "best").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json"),
    }
    run.load().save(str(tmp_path / "run.gguf"), "gguf")
    assert legacy1bit.load(tmp_path / "run.gguf").generate(PROMPT, 9, seed=1).text == (
        model.generate(PROMPT, 9, seed=1).text
    )


@with_golden_models
def test_published_models_are_saved_as_they_are(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    paths = [path for path, _ in golden()]
    some = [next(path for path in paths if path.is_file())]
    some += [next(path for path in paths if path.is_dir())]
    some += [GOLDEN.parent / "c_v1_d32_l1.bin"]
    for number, path in enumerate(some):
        with legacy1bit.load(path) as model:
            model.save(tmp_path / str(number))
            assert_same_model(legacy1bit.load(tmp_path / str(number)), model)


def test_a_model_that_has_changed_is_not_saved(files, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(files["folder"], folder)
    model = legacy1bit.load(folder)
    before = model.generate("a", 20, seed=1)
    save_model(random_model(model.config, seed=2), folder)
    for call in (lambda: model.save(tmp_path / "other"), lambda: model.evaluate(files["gguf"])):
        with pytest.raises(ValueError, match="has changed since it was loaded: load it again"):
            call()
    assert not (tmp_path / "other").exists()
    assert model.generate("a", 20, seed=1) == before


def test_a_model_whose_adapter_has_changed_is_not_measured(files, tmp_path):
    model = random_model(make_config(**(ARCHITECTURES["llama"] | {"output_bias": False})))
    save_model(model, tmp_path / "base")

    dim = model.config.model_dim

    def write(value):
        pair = LoraPair(np.full((1, dim), value, "f4"), np.ones((dim, 1), "f4"), 1.0)
        weights = LoraWeights({"blocks.0.attention.wq": pair})
        write_peft(weights, model.config, tmp_path / "adapter")

    write(1.0)
    loaded = legacy1bit.load(tmp_path / "base", adapters=[f"{tmp_path / 'adapter'}:0.5"])
    write(2.0)
    with pytest.raises(ValueError, match="has changed since it was loaded: load it again"):
        loaded.save(tmp_path / "other", "safetensors")


# --- Errors ---------------------------------------------------------------------------------------


@together(
    ("call", "kind", "message"),
    [
        (lambda model: model.generate("a", temprature=1), TypeError,
         "unknown argument temprature: the nearest is temperature"),
        (lambda model: model.stream("a", top_k=-1), ValueError, "top_k is -1, expected"),
        (lambda model: legacy1bit.load(model.path, adapters="a"), TypeError,
         "adapters is 'a', expected a list of paths"),
        (lambda model: model.batch("a"), TypeError, "prompts is one text, expected several"),
        (lambda model: model.generate("a", -1), ValueError, "max_tokens is -1, expected 0 or"),
        (lambda model: model.generate("a", seed=-1), ValueError, "seed is -1, expected 0 or"),
        (lambda model: model.generate("a", stop="x"), ValueError, "stop is 'x', expected strings"),
        (lambda model: model.chat(), ValueError, "has no chat template.*; template plain makes"),
        (lambda model: model.chat(template="nowhere"), FileNotFoundError, "nowhere"),
        (lambda model: model.embed(""), ValueError, "the text is empty"),
        (lambda model: model.evaluate(model="a"), TypeError, "unknown argument model"),
        (lambda model: model.evaluate("nowhere"), FileNotFoundError, "nowhere"),
        (lambda model: model.evaluate(threads=0), ValueError, "^threads is 0, expected 1 to"),
        (lambda model: model.evaluate("a", run_data="b"), ValueError,
         "^run_data and run_validation exclude data"),
        (lambda model: model.save("a", "onnx"), ValueError,
         "format is 'onnx', expected one of gguf, c, safetensors, c-v1"),
        (lambda model: model.save(model.path), ValueError, "is not an empty folder"),
        (lambda model: model.save(model.path / "config.json"), ValueError, "is not an empty"),
        (lambda model: legacy1bit.load("nowhere"), (OSError, ValueError), "nowhere"),
        (lambda model: legacy1bit.load(""), ValueError, "path is empty"),
        (lambda model: legacy1bit.load(model.path / "config.json"), legacy1bit.ModelFileError,
         "is neither a model folder nor"),
        (lambda model: legacy1bit.load(model.path, form="3bit"), ValueError, "3bit"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(model, call, kind, message):
    with pytest.raises(kind, match=message) as told:
        call(model)
    assert "--" not in str(told.value)
    assert "\n" not in str(told.value)


def test_a_closed_model_says_so(run):
    with run.load(threads=1, context=32) as model:
        assert isinstance(model, Model)
        assert model.generator.context == 32
        assert str(run.folder) in repr(model)
    with pytest.raises(ValueError, match="the generator is closed"):
        model.generate("a")


# --- Threads --------------------------------------------------------------------------------------


def test_threads_share_a_model(files):
    model = legacy1bit.load(files["gguf"], threads=2)
    alone = [model.generate("It was", 80, seed=seed).text for seed in range(4)]
    embedded = model.embed("It was")
    with ThreadPoolExecutor(8) as pool:
        texts = [pool.submit(model.generate, "It was", 80, seed=seed % 4) for seed in range(16)]
        batches = [pool.submit(model.batch, ["It was"] * 4, 80, seed=0) for _ in range(2)]
        states = [pool.submit(model.embed, "It was") for _ in range(4)]
    assert [text.result().text for text in texts] == alone * 4
    assert [[one.text for one in batch.result()] for batch in batches] == [
        [one.text for one in model.batch(["It was"] * 4, 80, seed=0)]
    ] * 2
    for state in states:
        assert_same_bits(state.result(), embedded)
