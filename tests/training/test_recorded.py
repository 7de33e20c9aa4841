"""Runs, settings and exports of an earlier version: still read, and still the same to the bit.

``recorded/runs.tar.xz`` holds runs of three kinds, models and settings that the first 0.1.0 wrote,
in the SSE2 kernels, one thread and float32: there no sum depends on the machine. Losses do, in
their last digits (NumPy's exp is not the same on every CPU), and have a tolerance.
"""

import hashlib
import json
import tarfile

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers.paths import TESTS
from legacy1bit import math_ops

ARCHIVE = TESTS / "recorded/runs.tar.xz"

# Of the weights and the optimizer's moments after 40 steps, the first 20 of them recorded.
RESUMED = {
    "plain": "5ff41c3b50ca3d21dfca36f879ed4c44f88c3362654541f0681169ca131d42ad",
    "options": "f02b9b67561a24f889f28a500ce0aa8b57ddc01547644c1de000e1e91e44b8d5",
    "apart": "c9f0c1bdb5c63b7fb97d99412357ed01d56bea95d11ba5945968efb7c3850551",
}
LOSSES = {
    "plain": [5.519418858928959, 5.432503928911207, 5.252410498562249, 4.976004651737914],
    "options": [5.698003805582003, 5.63931315298796, 5.49356737116343, 5.279416015010157],
    "apart": [5.537189979899146, 5.487741565156279, 5.3848048754590305, 5.223695994161938],
}

# Model, --format, --type and, by file, the SHA-256 of what is written ("": the one file).
EXPORTS = [
    ("finished", "c", None, {
        "": "5891e71690c6dc8b2ef54a7338868baaa459bc0b735bd658598b1cb5e1dd4513"}),
    ("finished", "gguf", "f16", {
        "": "75037c7e3e81092556fc8f85145c4d7e34a629b27c52725ce87da049e6d695c1"}),
    ("finished", "gguf", "f32", {
        "": "75842d3e4c29c8fab8857643dad1bf25eb06cc11f9b548458cdd74ace5335522"}),
    ("wide", "gguf", "tq2_0", {
        "": "931305c338bc1c1e4aafb326562f70dc9f88bc96dddfce4109f4494584d98fdb"}),
    ("wide", "gguf", "tq1_0", {
        "": "34afbc696421866acfeddcef53157521d13e72b74ce7b8b025ffe43d240398b6"}),
    ("c_original", "c-v1", None, {
        "": "fa75d91d1f27197e903ae09a70bc1c773ee726905d405d27c72db5fa2b53e974"}),
    ("finished", "safetensors", None, {
        "config.json": "674c0b0b7c6e7c59951b666fd7bfd048e836458dd34d200a5bcc77bb515c1db0",
        "model.safetensors": "fc31f855320feeb4ed1193a9bf6ef275f8adc3a241ca2fd6e085a6efceba77bb",
        "tokenizer.json": "88b2cc358edb7665ba162ca03662b906af11bac7563acab072899021408d55ab"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of what was recorded, unpacked."""
    folder = tmp_path_factory.mktemp("recorded")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def _sse2():
    if "sse2" not in math_ops.simd_levels():
        pytest.skip("recorded in the SSE2 kernels, which this CPU does not have")
    former = math_ops.simd_level()
    math_ops.set_simd_level("sse2")
    yield
    math_ops.set_simd_level(former)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("_sse2")
@pytest.mark.parametrize("name", RESUMED)
def test_train_resumes_a_recorded_run_to_the_same_bits(recorded, name, say):
    run = recorded / name
    if name == "options":
        pytest.importorskip("tokenizers")
    say("train", "--resume", run, "--data", recorded / "text.txt", "--steps", 40)
    state = load_file(run / "checkpoint.safetensors")
    found = b"".join(state[key].tobytes() for key in ("weights", "first", "second"))
    assert hashlib.sha256(found).hexdigest() == RESUMED[name]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    np.testing.assert_allclose(losses, LOSSES[name], rtol=1e-6)


@pytest.mark.parametrize(("model", "form", "kind", "hashes"), EXPORTS)
def test_export_of_a_recorded_model_has_the_same_bytes(
    recorded, tmp_path, model, form, kind, hashes, say
):
    if form == "gguf":
        pytest.importorskip("gguf")
    out = tmp_path / "out"
    options = [] if kind is None else ["--type", kind]
    say("export", "--model", recorded / model, "--format", form, *options, "--out", out)
    assert {name: sha256(out / name if name else out) for name in hashes} == hashes


def test_generate_from_a_recorded_model_writes_the_same_text(recorded, say):
    model = recorded / "finished"
    text, _ = say("generate", "--model", model, "--prompt", "The", "--seed", 3, "--max-tokens", 60)
    digest = hashlib.sha256(text).hexdigest()
    assert digest == "be7d5454c39f18c6ce1af93f9218597143fadd4a7d12205ee6ff755341f30779"


def test_read_config_takes_the_names_of_earlier_versions(recorded, tmp_path, say):
    earlier = tmp_path / "settings.toml"
    earlier.write_text(SETTINGS)
    printed, _ = say("train", "--config", earlier, "--print-config")
    again = tmp_path / "again.toml"
    again.write_bytes(printed)
    assert say("train", "--config", again, "--print-config")[0] == printed
    # Every setting that 0.1.0 printed.
    say("train", "--config", recorded / "default.toml", "--print-config")


SETTINGS = """\
[model]
attention_span = 16
sub_norm = true

[training]
matrix_ratio = 1.5
weight_decay_until = 0.5

[data]
tokenizer = "bpe"
vocabulary = 300
order = "passes"
apart = true
validation_share = 0.2
"""
