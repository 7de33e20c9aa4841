"""``export`` and ``import`` as their user meets them: files, what is printed, what is refused."""

import ast
import errno
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from helpers.compilers import why_not
from helpers.models import assert_same_model, make_config, random_model
from helpers.paths import GOLDEN
from helpers.published import golden, with_golden_models
from legacy1bit import main as program
from legacy1bit.commands.chat import Conversation
from legacy1bit.commands.options import given
from legacy1bit.data.tokenizer_files import load_tokenizer
from legacy1bit.formats.c_source import export_c
from legacy1bit.formats.c_v1 import export_c_v1, import_c_v1
from legacy1bit.formats.gguf import export_gguf, import_gguf
from legacy1bit.formats.hugging_face import export_hugging_face
from legacy1bit.formats.provenance import Provenance
from legacy1bit.formats.published import read_template, read_tokenizer
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import ARCHITECTURES, ModelConfig, SamplingConfig
from legacy1bit.model import load_model, save_model

PROVENANCE = Provenance("a text", "0123abcd", 7, 1.25, "CC0-1.0")
# Settings that blocks of 256 weights need.
WIDE = {"model_dim": 256, "num_heads": 4, "num_blocks": 1, "ffn_multiplier": 1}

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="gguf is not installed"
)
FORMATS = (pytest.param("gguf", marks=needs_gguf), "c", "safetensors", "c-v1")
# Those that are one file, and those that come back.
FILES = (FORMATS[0], "c", "c-v1")
TWO_WAYS = (FORMATS[0], "safetensors", "c-v1")
formats = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # These files need not outlive a power cut.
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def saved(name="c", folder="model", **changes):
    """A model that a format has room for, in a folder."""
    if name == "c-v1":
        model = random_model(ModelConfig.c_original(64, 64, 1, **changes))
    else:
        model = random_model(
            make_config(**{"output_bias": False, "vocab_size": 256, "num_blocks": 1, **changes})
        )
    model.provenance = PROVENANCE
    save_model(model, folder)
    return load_model(folder)


def export(name, out, *more, model="model"):
    return ("export", "--model", model, "--format", name, "--out", out, *more)


def content_of(path):
    """All files of a folder and what they hold, below it, too."""
    return {
        str(file.relative_to(path)): file.read_bytes() if file.is_file() else None
        for file in Path(path).rglob("*")
    }


@pytest.fixture
def refused(fail):
    """Run a command that is refused, and see that it leaves all as it was; return the line."""

    def run(*arguments):
        before = content_of(".")
        message = fail(*arguments)
        assert content_of(".") == before
        return message

    return run


# --- What is written ------------------------------------------------------------------------------

WRITERS = {
    "gguf": export_gguf,
    "c": export_c,
    "safetensors": export_hugging_face,
    "c-v1": export_c_v1,
}


@formats
def test_export_writes_what_the_function_writes(say, name):
    model = saved(name)
    Path("ours").mkdir()
    Path("theirs").mkdir()
    WRITERS[name](model, "ours/it")
    say(*export(name, "theirs/it"))
    assert content_of("theirs") == content_of("ours")
    assert content_of("theirs")
    assert_same_model(load_model("model"), model)


NEXT = {
    "gguf": "run it with llama.cpp: llama-completion -m it.gguf -p TEXT",
    "c": "compile it: cc -std=c99 -O2 -o it it.c -lm",
    "safetensors": "load it: transformers.AutoModelForCausalLM.from_pretrained('it.safetensors')",
    "c-v1": "it is a file of the C program Legacy-1bit LLM",
}


@formats
def test_export_says_what_it_wrote_and_what_to_do_next(say, name):
    saved(name)
    out = Path(f"it.{name}")
    output, errors = say(*export(name, out))
    files = [out] if out.is_file() else list(out.iterdir())
    size = sum(file.stat().st_size for file in files)
    assert output.decode() == f"{out}: {size:,} bytes; {NEXT[name]}\n"
    assert size > 1000
    assert errors == b""


@pytest.mark.parametrize("name", [*FILES[:2], "safetensors"])
@pytest.mark.parametrize("out", ["my models/a b.c", "it's.c", "$HOME.c"])
def test_export_says_what_can_be_typed(say, name, out):
    """The path of what was written is one word of the shell, or of Python."""
    saved(name)
    Path("my models").mkdir()
    told = say(*export(name, out)).out.decode().split(" bytes; ")[1]
    if name == "safetensors":
        assert ast.literal_eval(told[told.index("(") :]) == out
    else:
        assert out in shlex.split(told.split(": ", 1)[1])


@pytest.mark.parametrize("out", ["model.c", "a/b.c", "model", "model.txt"])
def test_export_says_how_to_compile_it(say, out):
    """As it is told, the command makes a program, and leaves the source alone."""
    if why_not("gcc"):
        pytest.skip(why_not("gcc"))
    saved("c", "run")
    Path("a").mkdir()
    told = say(*export("c", out, model="run")).out.decode().split("compile it: ")[1]
    source = Path(out).read_bytes()
    words = shlex.split(told)
    subprocess.run(["gcc", *words[1:]], check=True, timeout=60)
    assert Path(out).read_bytes() == source
    program = Path(words[words.index("-o") + 1])
    done = subprocess.run([program.resolve(), "ab", "5"], capture_output=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith(b"ab")


@formats
def test_export_takes_the_latest_run_where_no_model_is_named(say, name):
    saved(name, "runs/a")
    Path("runs/a/training.json").write_text("{}")
    say("export", "--format", name, "--out", "latest")
    say(*export(name, "named", model="runs/a"))
    files = {path: data for path, data in content_of(".").items() if not path.startswith("runs")}
    latest = {path: data for path, data in files.items() if path.startswith("latest")}
    assert latest
    assert {path.replace("latest", "named", 1): data for path, data in latest.items()} == {
        path: data for path, data in files.items() if path.startswith("named")
    }


@formats
def test_export_replaces_an_earlier_one(say, name):
    saved(name)
    say(*export(name, "it", "--license", "another"))
    say(*export(name, "it"))
    again = content_of(".")
    say(*export(name, "new"))
    for path, data in content_of(".").items():
        if path.startswith("new"):
            assert again[path.replace("new", "it", 1)] == data


@formats
def test_export_takes_any_name(say, name):
    model, out = saved(name), "\u6a21" * 84
    say(*export(name, out))
    assert Path(out).exists()
    if name == "c-v1":
        assert import_c_v1(out).provenance == model.provenance
        say(*export(name, "\u578b" * 84))
        assert len(list(Path().glob("*.json"))) == 2


@pytest.mark.parametrize("name", FILES)
def test_export_keeps_the_permissions_of_an_earlier_one(say, name):
    saved(name)
    former = os.umask(0o022)
    try:
        say(*export(name, "it"))
        assert Path("it").stat().st_mode & 0o777 == 0o644
        Path("it").chmod(0o600)
        say(*export(name, "it"))
        assert Path("it").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(former)


@needs_gguf
@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "q2_0", "f16", "f32", None])
def test_export_takes_a_type_for_gguf(say, kind):
    model = saved(**WIDE)
    say(*export("gguf", "it.gguf", *([] if kind is None else ["--type", kind])))
    export_gguf(model, "expected.gguf", kind or "tq2_0")
    assert Path("it.gguf").read_bytes() == Path("expected.gguf").read_bytes()


@needs_gguf
@pytest.mark.parametrize(
    ("changes", "kind"),
    [({}, "f32"), ({}, "f16"), ({}, "q8_0"), ({"ternary_embedding": True}, "q2_0")],
    ids=str,
)
def test_export_takes_a_type_of_embeddings_for_gguf(say, changes, kind):
    model = saved(**WIDE, **changes)
    say(*export("gguf", "it.gguf", "--embedding-type", kind))
    export_gguf(model, "expected.gguf", embedding_kind=kind)
    assert Path("it.gguf").read_bytes() == Path("expected.gguf").read_bytes()
    # What was rounded stays as it is.
    say("import", "--model", "it.gguf", "--out", "back")
    say(*export("gguf", "again.gguf", "--embedding-type", "f32", model="back"))
    assert_same_model(import_gguf("again.gguf"), import_gguf("it.gguf"))


# --- Where a model comes from ---------------------------------------------------------------------


def licence_in(name, out):
    """What a file says of its licence."""
    if name == "gguf":
        import gguf

        field = gguf.GGUFReader(out).get_field("general.license")
        return "" if field is None else field.contents()
    if name == "c":
        return re.search(r"^ \* licence: (.*)$", Path(out).read_text("ascii"), re.M).group(1)
    if name == "c-v1":
        return json.loads(Path(f"{out}.json").read_bytes())["provenance"]["license"]
    with safe_open(f"{out}/model.safetensors", "np") as file:
        inside = json.loads(file.metadata()["provenance"])
    beside = json.loads(Path(f"{out}/config.json").read_bytes())["legacy1bit"]["provenance"]
    assert inside == beside
    return inside["license"]


@formats
def test_export_keeps_the_licence(say, name):
    saved(name)
    before = content_of("model")
    say(*export(name, "own"))
    assert licence_in(name, "own") == "CC0-1.0"
    say(*export(name, "given", "--license", "MIT, but for \u00c4pfel"))
    expected = "MIT, but for \u00c4pfel"
    if name == "c":
        expected = expected.encode("unicode_escape").decode()
    assert licence_in(name, "given") == expected
    say(*export(name, "none", "--license", ""))
    assert licence_in(name, "none") == ("not stated" if name == "c" else "")
    # It is the file's, not the model's.
    assert content_of("model") == before


@formats
@pytest.mark.parametrize("licence", ["two\nlines", "*/ #error /*", "??/", "%s $x ${y}", "\udcff"])
def test_export_takes_any_licence(say, name, licence):
    """What is no text in UTF-8 is what a terminal may give."""
    saved(name)
    say(*export(name, "it", "--license", licence))
    found = licence_in(name, "it")
    if name == "gguf":
        assert found == licence.replace("\udcff", "?")
    elif name != "c":
        assert found == licence
    else:
        comment = Path("it").read_text("ascii").split("*/")[0]
        assert found in comment
        assert "??/" not in comment


@pytest.mark.parametrize("name", TWO_WAYS)
def test_provenance_comes_back(say, name):
    model = saved(name)
    say(*export(name, "it", "--license", "MIT"))
    say("import", "--model", "it", "--out", "back")
    assert load_model("back").provenance == Provenance("a text", "0123abcd", 7, 1.25, "MIT")
    assert model.provenance == PROVENANCE
    report = say("info", "--model", "back").out.decode().splitlines()
    told = dict(line.split(None, 1) for line in report if len(line.split(None, 1)) == 2)
    for key, value in (("data", "a text"), ("data_sha256", "0123abcd"), ("steps", "7"),
                       ("validation_loss", "1.25"), ("license", "MIT")):  # fmt: skip
        assert told[key] == value


def test_a_file_of_c_without_provenance_beside_it_is_read(say):
    saved("c-v1")
    say(*export("c-v1", "it"))
    Path("it.json").unlink()
    say("import", "--model", "it", "--out", "back")
    assert load_model("back").provenance == Provenance()


# --- There and back -------------------------------------------------------------------------------


@needs_gguf
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, None),
        ({"scheme": "float"}, "f32"),
        ({"scheme": "2bit"}, "f32"),
        ({"scheme": "binary", "scale": "row", "ternary_embedding": True}, "f16"),
        ({"vocab_size": 300}, None),
        ({"vocab_size": 10, "int8_activations": True, "rope_base": 1234.5}, "f16"),
        (WIDE, "tq2_0"),
        ({**WIDE, "scale": "row"}, "tq1_0"),
        ({**WIDE, "scale": "64"}, "q2_0"),
        ({**ARCHITECTURES["llama"], "num_kv_heads": 1, "scale": "row"}, None),
        ({**ARCHITECTURES["qwen3"], "head_dim": 6, "tied_embeddings": True}, "f16"),
        ({**ARCHITECTURES["bitnet"], "activation": "silu"}, None),
    ],
    ids=str,
)
def test_gguf_files_come_back_to_the_bit(say, changes, kind):
    model = saved(**changes)
    say(*export("gguf", "it.gguf", *([] if kind is None else ["--type", kind])))
    output, errors = say("import", "--model", "it.gguf", "--out", "back")
    back = load_model("back")
    assert_same_model(back, model)
    assert back.provenance == PROVENANCE
    assert content_of("back")["model.safetensors"] == content_of("model")["model.safetensors"]
    count, size = model.num_parameters, model.stored_bytes()
    assert output.decode() == f"back: {count:,} parameters, {size:,} bytes of weights\n"
    assert errors == b""


def test_what_was_exported_is_exported_again(say):
    model = saved()
    say(*export("gguf", "it.gguf"))
    output, errors = say(*export("safetensors", "again", model="it.gguf"))
    assert output.startswith(b"again: ")
    assert errors == b""
    say("import", "--model", "again", "--out", "back")
    assert_same_model(load_model("back"), model)
    assert load_tokenizer("back").encode("a\xe9").tolist() == [*"a\xe9".encode()]


def chat_of(path, messages):
    """The tokens of a conversation, what ends it, and the template."""
    with Generator.load(path) as generator:
        template = read_template(path, generator.tokenizer)
        conversation = Conversation(generator, template, SamplingConfig(), 8)
        conversation.messages = messages
        try:
            return conversation._tokens(), {*generator.tokenizer.stop_tokens}
        finally:
            template.close()


@with_golden_models
def test_published_models_are_exported_with_tokenizer_and_template(say):
    pytest.importorskip("gguf", reason="gguf is not installed")
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    for path, about in golden():
        say(*export("safetensors", "folder", model=path))
        ways = [Path("folder")]
        # llama.cpp has no BitNets with squared ReLU.
        if about["config"]["act"] == "silu":
            say(*export("gguf", "it.gguf", model=path))
            ways.append(Path("it.gguf"))
        # Folders of our own have scales in float16.
        fits = "int8" not in about["references"][0]["arithmetic"]
        for number, way in enumerate([*ways] if fits else []):
            say("import", "--model", way, "--out", f"back-{path.name}-{number}")
            ways.append(Path(f"back-{path.name}-{number}"))
        rows = about["logits_shape"][-1]
        tokenizer = read_tokenizer(path, rows)
        for way in ways:
            other = read_tokenizer(way, rows)
            for case in about["tokenizer"]["strings"]:
                if "ids_without_nfc" not in case:
                    ids = tokenizer.encode_special(case["text"]).tolist()
                    assert other.encode_special(case["text"]).tolist() == ids, way
            assert (other.bos_token, other.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
            for case in (about.get("chat") or {}).get("renderings", ()):
                if case["add_generation_prompt"]:
                    expected = chat_of(path, case["messages"])
                    assert chat_of(way, case["messages"]) == expected
                    assert expected[0] == case["ids"]


@with_golden_models
def test_exported_folders_have_their_tokenizer_in_transformers(say):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for path, about in golden():
        say(*export("safetensors", "folder", model=path))
        theirs = transformers.AutoTokenizer.from_pretrained("folder")
        for case in about["tokenizer"]["strings"]:
            if path.is_dir() or "ids_without_nfc" not in case:
                assert theirs(case["text"])["input_ids"] == case["ids_with_added_special"], path
        assert theirs.eos_token_id == about["tokenizer"]["eos"][1]
        for case in (about.get("chat") or {}).get("renderings", ()):
            ids = theirs.apply_chat_template(
                case["messages"], add_generation_prompt=case["add_generation_prompt"],
                return_dict=False,
            )  # fmt: skip
            assert ids == case["ids"], path


@with_golden_models
def test_exported_files_have_their_tokenizer_in_llama_cpp(say):
    pytest.importorskip("gguf", reason="gguf is not installed")
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    for path, about in golden():
        if about["config"]["act"] != "silu":
            continue
        say(*export("gguf", "it.gguf", model=path))
        theirs = llama_cpp.Llama("it.gguf", vocab_only=True, verbose=False)
        for case in about["tokenizer"]["strings"]:
            expected = case.get("ids_without_nfc", case["ids"])
            text = case["text"].encode()
            assert theirs.tokenize(text, add_bos=False, special=True) == expected, path
        assert theirs.token_eos() == about["tokenizer"]["eos"][1]
        template = read_tokenizer(path, about["logits_shape"][-1]).template
        assert theirs.metadata.get("tokenizer.chat_template") == template


@with_golden_models
def test_c_programs_have_no_tokens_of_others(refused):
    path = next(path for path, about in golden() if about["name"] == "llama-tq2_0")
    assert "the model's tokens are bpe" in refused(*export("c", "it.c", model=path))


@pytest.mark.parametrize("name", ["nemotron", "llama", "qwen3", "bitnet"])
def test_folders_for_transformers_come_back_to_the_bit(say, name):
    model = saved(**ARCHITECTURES[name])
    say(*export("safetensors", "it"))
    output, errors = say("import", "--model", "it", "--out", "back")
    assert_same_model(load_model("back"), model)
    assert output.startswith(b"back: ")
    assert errors == b""
    for file in ("model.safetensors", "config.json"):
        assert content_of("back")[file] == content_of("model")[file]


def test_files_of_c_come_back_to_the_bit(say):
    model = saved("c-v1")
    say(*export("c-v1", "it.bin"))
    output, errors = say("import", "--model", "it.bin", "--out", "back")
    assert_same_model(load_model("back"), model)
    assert_same_model(import_c_v1("it.bin"), model)
    assert output.startswith(b"back: ")
    assert errors == b""
    say(*export("c-v1", "again.bin", model="back"))
    assert Path("again.bin").read_bytes() == Path("it.bin").read_bytes()


@pytest.mark.parametrize("name", ["c_v1_d32_l1", "c_v1_d64_l2"])
def test_files_that_c_wrote_come_back_to_the_byte(say, name):
    path = GOLDEN / f"{name}.bin"
    if not path.exists():
        pytest.skip(f"no golden file {path}: it was written by the C original")
    say("import", "--model", path, "--out", "back")
    assert_same_model(load_model("back"), load_model(path))
    say(*export("c-v1", "again.bin", model="back"))
    assert Path("again.bin").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", TWO_WAYS)
def test_generate_writes_with_what_was_imported(say, name):
    saved(name)
    say(*export(name, "it"))
    say("import", "--model", "it", "--out", "back")
    for options in (("--prompt", "0123", "--max-tokens", 40, "--seed", 0),
                    ("--seed", 3, "--count", 3),
                    ("--prompt", "0" * 40, "--temperature", 0)):  # fmt: skip
        found = say("generate", "--model", "back", *options).out
        assert found == say("generate", "--model", "model", *options).out
        assert len(found) > 40


@needs_gguf
def test_import_writes_the_tokenizer_of_models_of_bytes(say, fail):
    for size in (256, 64, 300):
        saved(folder=f"model{size}", vocab_size=size)
        say(*export("gguf", f"it{size}", model=f"model{size}"))
        say("import", "--model", f"it{size}", "--out", f"back{size}")
    assert load_tokenizer("back256").vocab_size == 256
    assert load_tokenizer("back64").vocab_size == 64
    assert not Path("back300/tokenizer.json").exists()
    assert "tokens stand for is not known" in fail("generate", "--model", "back300")


@pytest.mark.parametrize("name", TWO_WAYS)
def test_import_takes_empty_and_missing_folders(say, name):
    saved(name)
    say(*export(name, "it"))
    Path("empty").mkdir()
    for out in ("empty", "a/b/c", "new/"):
        say("import", "--model", "it", "--out", out)
        assert sorted(path.name for path in Path(out).iterdir()) == [
            "config.json", "model.safetensors", "tokenizer.json"
        ]  # fmt: skip


# --- What export refuses --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [FORMATS[0], "safetensors"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": "relu"}, "no plain ReLU: train with --activation relu2"),
        ({"positions": "none"}, "train with --positions rope"),
        ({"attention_window": 3}, "train with --attention-window 0"),
        ({"sub_norm": True}, "train with --no-sub-norm"),
        ({"final_norm": False}, "train with --final-norm"),
        ({"output_bias": True}, "train with --no-output-bias"),
    ],
    ids=str,
)
def test_export_refuses_models_that_are_no_nemotrons(refused, name, changes, reason):
    saved(**changes)
    assert reason in refused(*export(name, "it"))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("c", {"vocab_size": 257}, "257 tokens, expected at most 256"),
        ("c-v1", {}, "the C original has no such models"),
        ("c-v1", {"scale": "one", "ternary_embedding": True}, "the C original has no such models"),
    ],
    ids=str,
)
def test_export_refuses_models_that_programs_in_c_do_not_know(refused, name, changes, reason):
    saved(**changes)
    assert reason in refused(*export(name, "it"))


def test_export_names_the_options_of_a_model_that_the_c_original_knows(refused):
    saved()
    message = refused(*export("c-v1", "it"))
    options = re.search(r"train with (.*) \(in Python", message)[1].split()
    parsed = program.parser_of("train").parse_args(["train", *options])
    assert ModelConfig(**given(parsed, ModelConfig)).is_c_original


def test_export_refuses_a_model_of_c_with_other_sizes_than_its_file_has(refused):
    save_model(random_model(ModelConfig.c_original(9, 8)), "model")
    assert "vocab_size is 9 and model_dim 8" in refused(*export("c-v1", "it"))


@needs_gguf
@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({}, "tq2_0", "expected a multiple of 256"),
        ({"scheme": "float"}, "f16", "scheme float: --type f32"),
        ({"scheme": "2bit"}, "tq1_0", "2bit has four"),
    ],
    ids=str,
)
def test_export_refuses_types_that_do_not_hold_the_model(refused, changes, kind, reason):
    saved(**changes)
    assert reason in refused(*export("gguf", "it", "--type", kind))


@pytest.mark.parametrize("name", ["c", "safetensors", "c-v1"])
def test_export_takes_types_for_gguf_alone(refused, name):
    saved(name)
    for option in ("--type", "--embedding-type"):
        assert f"{option} is for --format gguf, not {name}" in refused(
            *export(name, "it", option, "f16")
        )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--format", "onnx", "--out", "it"), "invalid choice: 'onnx'"),
        (("--format", "GGUF", "--out", "it"), "invalid choice: 'GGUF'"),
        (("--format", "gguf", "--type", "q4_0", "--out", "it"), "invalid choice: 'q4_0'"),
        (("--format", "gguf", "--embedding-type", "q4_0", "--out", "it"), "choice: 'q4_0'"),
        (("--format", "gguf"), "--out"),
        (("--out", "it"), "--format"),
        (("--format", "c", "--out", "it", "more"), "more"),
        (("--format", "c", "--out", "it", "--license"), "--license"),
    ],
    ids=str,
)
def test_export_refuses_arguments_that_mean_nothing(refused, arguments, reason):
    saved()
    assert reason in refused("export", "--model", "model", *arguments)


@formats
def test_export_refuses_models_that_are_not_there(refused, name):
    assert "no run in runs/ yet" in refused("export", "--format", name, "--out", "it")
    assert "nowhere: No such file" in refused(*export(name, "it", model="nowhere"))
    Path("text").write_text("text")
    assert "text has 4 bytes" in refused(*export(name, "it", model="text"))
    Path("folder").mkdir()
    assert "it has no config.json" in refused(*export(name, "it", model="folder"))
    saved(name)
    with open("model/model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert "model.safetensors" in refused(*export(name, "it"))


@pytest.mark.parametrize("name", FILES)
def test_export_refuses_an_output_without_a_folder(refused, name):
    saved(name)
    assert "missing/it: No such file or directory" in refused(*export(name, "missing/it"))
    Path("file").write_text("old")
    assert "file/it: Not a directory" in refused(*export(name, "file/it"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("out", ["folder", "full", ".", "./"])
def test_export_refuses_a_folder_as_output(refused, name, out):
    saved(name)
    Path("folder").mkdir()
    Path("full").mkdir()
    Path("full/old").write_text("old")
    assert f"{Path(out)}: Is a directory" in refused(*export(name, out))


def test_export_refuses_a_folder_of_something_else(refused):
    saved("safetensors")
    Path("full").mkdir()
    Path("full/old").write_text("old")
    for out in ("full", "model", "."):
        assert f"{out} holds something else" in refused(*export("safetensors", out))
    assert "full/old: File exists" in refused(*export("safetensors", "full/old"))
    assert "full/old/it: Not a directory" in refused(*export("safetensors", "full/old/it"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
@formats
def test_export_refuses_a_folder_it_may_not_write(refused, name):
    saved(name)
    Path("closed").mkdir()
    Path("closed").chmod(0o500)
    try:
        assert "closed/it: Permission denied" in refused(*export(name, "closed/it"))
    finally:
        Path("closed").chmod(0o700)


def full_from(count):
    """A disk that is full when so many files have been written onto it."""
    written = []

    def fsync(handle):
        written.append(handle)
        if len(written) > count:
            raise OSError(errno.ENOSPC, "No space left on device")

    return fsync


@formats
def test_export_onto_a_full_disk_says_so(fail, monkeypatch, name):
    saved(name)
    Path("out").mkdir()
    monkeypatch.setattr(os, "fsync", full_from(0))
    assert re.match(r"out/it.*: No space left on device", fail(*export(name, "out/it")))
    assert not any(content_of("out").values())


@pytest.mark.parametrize("count", [0, 1])
@formats
def test_export_onto_a_full_disk_leaves_the_earlier_one(say, refused, monkeypatch, name, count):
    """What belongs together changes together."""
    if count and name in ("gguf", "c"):
        pytest.skip("there is just one file")
    saved(name)
    say(*export(name, "it"))
    model = load_model("model")
    model.parameters["blocks.0.norm1.beta"][...] += 1.0
    save_model(model, "model")
    monkeypatch.setattr(os, "fsync", full_from(count))
    assert "No space left" in refused(*export(name, "it", "--license", "another"))


def test_export_writes_no_file_of_c_without_its_provenance(refused):
    saved("c-v1")
    Path("it.json").mkdir()
    assert "it.json" in refused(*export("c-v1", "it"))


@pytest.mark.parametrize("part", ["model.safetensors", "config.json"])
@formats
def test_export_does_not_overwrite_its_model(refused, name, part):
    saved(name)
    Path("link").symlink_to(Path("model") / part)
    for out in (f"model/{part}", f"model/../model/{part}", "link"):
        reason = "a part of the model" if name != "safetensors" or out == "link" else part
        assert reason in refused(*export(name, out))


@pytest.mark.parametrize(
    "part", ["checkpoint.safetensors", "earlier.safetensors", "metrics.jsonl", "best/config.json"]
)
def test_export_does_not_overwrite_its_run(refused, part):
    saved("c")
    path = Path("model", part)
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    assert "a part of the model" in refused(*export("c", path))
    assert path.read_text() == "mine"


@needs_gguf
def test_export_does_not_overwrite_a_model_of_c(say, refused):
    saved("c-v1")
    say(*export("c-v1", "old.bin"))
    for name in FORMATS[1:]:
        assert "old.bin is a part of the model" in refused(
            *export(name, "old.bin", model="old.bin")
        )


def test_export_of_a_model_of_c_tells_where_it_comes_from(say):
    saved("c-v1")
    say(*export("c-v1", "old.bin"))
    say(*export("c-v1", "new.bin", model="old.bin"))
    assert Path("new.bin.json").read_bytes() == Path("old.bin.json").read_bytes()
    assert b"CC0-1.0" in say("info", "--model", "old.bin").out


def test_export_leaves_what_else_has_the_name_of_its_provenance(refused):
    saved("c-v1")
    Path("it.bin.json").write_text('{"mine": 1}')
    assert "it.bin.json is something else" in refused(*export("c-v1", "it.bin"))


@pytest.mark.parametrize("name", FILES)
def test_export_goes_where_a_link_points(say, name):
    saved(name)
    Path("target").write_text("old")
    Path("link").symlink_to("target")
    say(*export(name, "link"))
    say(*export(name, "plain"))
    assert Path("link").is_symlink()
    assert Path("target").read_bytes() == Path("plain").read_bytes()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", FILES)
def test_export_replaces_no_pipe(fail, name):
    saved(name)
    os.mkfifo("pipe")
    assert "pipe: Is not a regular file" in fail(*export(name, "pipe"))
    assert Path("pipe").is_fifo()


# --- What import refuses --------------------------------------------------------------------------


def test_import_refuses_what_is_no_model(refused):
    for data, reason in (
        (b"", "has 0 bytes, too few"),
        (b"text", "has 4 bytes, too few"),
        (b"text" * 99, "neither a model folder nor a file of the C original"),
        (b"GGUF", "cannot be read: it ends too early"),
        (b"GGUF" + b"text" * 99, "cannot be read: it has version"),
        (b"GGUF\3\0\0\0" + b"\xff" * 99, "cannot be read: it ends too early"),
        (b"GGUF\1\0\0\0" + bytes(99), "it has version 1, expected 2 or 3"),
        (b"GGUF\3\0\0\0" + bytes(99), "only files that legacy1bit wrote"),
    ):
        Path("garbage").write_bytes(data)
        message = refused("import", "--model", "garbage", "--out", "back")
        assert message.startswith("garbage ")
        assert reason in message


def test_import_refuses_what_is_not_there(refused):
    assert "nowhere: No such file" in refused("import", "--model", "nowhere", "--out", "back")
    saved()
    assert "only folders that legacy1bit wrote" in refused(
        "import", "--model", "model", "--out", "back"
    )
    assert "--out" in refused("import", "--model", "model")
    assert "--model" in refused("import", "--out", "back")


@pytest.mark.parametrize("name", TWO_WAYS)
def test_import_refuses_files_that_are_cut_off(say, fail, name):
    saved(name)
    say(*export(name, "it"))
    file = Path("it/model.safetensors" if name == "safetensors" else "it")
    data = file.read_bytes()
    # Behind its last weight, a file may have up to 31 bytes that say nothing.
    for size in (3, 4, 5, 19, 20, 100, len(data) // 2, len(data) - 32):
        file.write_bytes(data[:size])
        assert fail("import", "--model", "it", "--out", "back").startswith(f"{file} ")
        assert not Path("back").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"provenance": {"steps": -1}}', "[" * 99999], ids=len
)
def test_import_refuses_damaged_provenance(say, refused, text):
    saved("c-v1")
    say(*export("c-v1", "it"))
    Path("it.json").write_text(text)
    message = refused("import", "--model", "it", "--out", "back")
    assert message.startswith("it.json is damaged: ")


@pytest.mark.parametrize("name", TWO_WAYS)
def test_import_refuses_a_folder_that_is_not_empty(say, refused, name):
    saved(name)
    say(*export(name, "it"))
    Path("full").mkdir()
    Path("full/.old").write_text("old")
    for out in ("model", "full", "it", "."):
        message = refused("import", "--model", "it", "--out", out)
        assert message == f"{out} is not an empty folder: name another"
    inside = "it/config.json/back" if name == "safetensors" else "it/back"
    assert f"{inside}: Not a directory" in refused("import", "--model", "it", "--out", inside)


@pytest.mark.parametrize("name", TWO_WAYS)
def test_import_onto_a_full_disk_says_so(say, fail, monkeypatch, name):
    saved(name)
    say(*export(name, "it"))
    monkeypatch.setattr(os, "fsync", full_from(0))
    assert "No space left" in fail("import", "--model", "it", "--out", "back")
    assert not Path("back").exists() or content_of("back") == {}


@needs_gguf
def test_import_refuses_scales_that_a_folder_does_not_hold(refused):
    """A file may be of a program's own making, not of a saved model's."""
    model = random_model(make_config(output_bias=False))
    model.parameters["blocks.0.ffn.wi"].scales[...] = 1.0 / 3.0
    export_gguf(model, "it.gguf")
    assert_same_model(import_gguf("it.gguf"), model)
    message = refused("import", "--model", "it.gguf", "--out", "back")
    assert "blocks.0.ffn.wi has a scale that float16 does not hold" in message


# --- Without the gguf package ---------------------------------------------------------------------


@pytest.mark.parametrize("module", ["gguf", "gguf.quants"])
def test_export_says_that_gguf_is_missing(refused, monkeypatch, module):
    saved()
    monkeypatch.setitem(sys.modules, module, None)
    message = refused(*export("gguf", "it.gguf"))
    assert message.startswith("GGUF files need gguf, which is not installed: pip install gguf")


@pytest.mark.parametrize("name", ["c", "safetensors", "c-v1"])
def test_other_formats_do_without_gguf(say, monkeypatch, name):
    saved(name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    say(*export(name, "it"))


@needs_gguf
def test_import_needs_gguf_for_its_own_types_alone(say, refused, monkeypatch):
    model = saved(**WIDE)
    for kind in ("tq2_0", "q2_0", "f16"):
        say(*export("gguf", kind, "--type", kind))
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = refused("import", "--model", "tq2_0", "--out", "back")
    assert "which is not installed: pip install gguf" in message
    for kind in ("q2_0", "f16"):
        say("import", "--model", kind, "--out", f"{kind}-back")
        assert_same_model(load_model(f"{kind}-back"), model)
