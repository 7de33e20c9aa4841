"""The benchmarks: that they run, that they count right, and what their reports say of numbers."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import legacy1bit
from benchmarks import (
    __main__,
    bitnet_cpp,
    compare,
    instructions,
    kernels,
    llama_cpp,
    models,
    peaks,
    peers,
    report,
    serving,
    torch_twin,
)
from benchmarks.measure import (
    Benchmark,
    machine_load,
    measure,
    package_environment,
    rate,
)
from benchmarks.report import Result
from legacy1bit import math_ops
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.inference import Decoder
from legacy1bit.model import create_legacy_llm
from legacy1bit.packed import PackedModel
from legacy1bit.system.hardware import cpu_name

LEVELS = math_ops.simd_levels()
TINY = ModelConfig(model_dim=32, num_blocks=1, sequence_length=16)


def all_tiny(threads=1):
    """Every benchmark, as small as it gets."""
    return [
        *peaks.peaks(threads, 64, 1 << 12, 1 << 10),
        *kernels.float_products(threads),
        *kernels.packed_products(64, 4),
        *kernels.others(64, TINY, 2),
        *models.training(threads, TINY, 2, TINY, 2),
        *models.decoding(threads, TINY, "tiny", decoded=4, prompt=8, from_memory=True),
    ]


# --- Measuring ------------------------------------------------------------------------------------


@pytest.fixture
def ticks(monkeypatch):
    """A clock that goes on by a second whenever it is looked at."""
    moments = iter(range(1000))
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: float(next(moments)))


@pytest.mark.usefixtures("ticks")
def test_rate_is_work_over_time():
    calls = []
    assert rate(6.0, lambda: calls.append(1), least=2.5) == 6.0
    assert len(calls) == 3


@pytest.mark.usefixtures("ticks")
def test_rate_counts_what_the_call_returns():
    numbers = iter([1, 2, 6])
    assert rate(0.5, lambda: next(numbers), counted=True, least=2.5) == 0.5 * 9 / 3


def test_columns_take_turns_and_the_first_warms_up():
    order = []

    def call(name):
        return lambda: order.append((name, math_ops.simd_level()))

    both = [
        Benchmark("a", "x", 1.0, call("a"), others={"numpy": call("other")}),
        Benchmark("b", "x", 1.0, call("b")),
    ]
    before = math_ops.simd_level()
    rates = measure(both, LEVELS, 2, least=0.0, pause=0.0)
    assert math_ops.simd_level() == before
    turn = [(name, level) for name in "ab" for level in LEVELS]
    several = len(LEVELS) > 1
    assert order == 3 * (turn + ([("other", LEVELS[-1])] if several else []))
    assert list(rates["a"]) == LEVELS + (["numpy"] if several else [])
    assert {len(values) for columns in rates.values() for values in columns.values()} == {2}


def test_one_instruction_set_has_no_company():
    one = Benchmark("a", "x", 1.0, lambda: None, precisions=("int8",), others={"numpy": print})
    assert list(measure([one], ["scalar"], 1, least=0.0, pause=0.0)["a"]) == ["scalar"]


def test_every_benchmark_runs_in_every_instruction_set():
    benchmarks = all_tiny()
    assert len({one.name for one in benchmarks}) == len(benchmarks)
    rates = measure(benchmarks, LEVELS, 1, least=0.0, pause=0.0)
    assert all(value > 0 for columns in rates.values() for [value] in columns.values())
    assert all(set(LEVELS) <= set(columns) for columns in rates.values())
    results = report.results_of(benchmarks, rates)
    # Whatever is a share of a peak finds it.
    for name, result in results.items():
        told = report.shares(result, results, LEVELS[-1])
        assert bool(told) == (result.share_of is not None), name


def test_peaks_of_several_threads_do_the_work_of_all():
    work = {one.name: one.call() for one in peaks.peaks(2, 64, 1 << 14, 1 << 13)}
    for kind, more in ((peaks.FUSED, 2), (peaks.PACKED, 2), (peaks.MEMORY, 1), (peaks.CACHE, 1)):
        assert work[peaks.peak_name(kind, 2)] == more * work[peaks.peak_name(kind, 1)]
    assert work[peaks.peak_name(peaks.MEMORY, 1)] == 4 << 14
    assert work[peaks.peak_name(peaks.CACHE, 1)] == 8 * (4 << 13)


# --- How much work a call is ----------------------------------------------------------------------


def test_work_of_the_products():
    found = {one.name: one for one in kernels.float_products(1)}
    assert found["matmul 768x512x128"].work == pytest.approx(2e-9 * 768 * 512 * 128)
    for one in found.values():
        ours = one.call().copy()
        np.testing.assert_allclose(one.others["numpy"](), ours, rtol=1e-3, atol=1e-3)
    packed = {one.name: one for one in kernels.packed_products(64, 4)}
    assert packed["2bit 64x64 x 1"].work == pytest.approx(1e-9 * 64 * 64)
    assert packed["trits 64x64 x 4"].work == pytest.approx(4e-9 * 64 * 64)
    assert packed["trits 64x64 x 4"].call().shape == (4, 64)


def test_work_of_training_is_its_tokens():
    usual, c_shape = models.training(1, TINY, 3, TINY, 2)
    assert (usual.work, c_shape.work) == (3 * 16, 2 * 16)
    assert c_shape.known == {"C original": 55.0}
    assert models.C_SHAPE.model_dim == ModelConfig.c_original().model_dim
    assert models.C_SHAPE.num_blocks == ModelConfig.c_original().num_blocks
    assert models.C_SHAPE.sequence_length == ModelConfig.c_original().sequence_length


def test_decoding_writes_as_many_tokens_as_it_says():
    packed = models.packed_model(TINY, "2bit")
    decoder = Decoder(packed)
    for _ in range(2):
        models.decode_call(decoder, 5)()
        # The last one is not taken in.
        assert decoder.length == 1 + 5 - 1
        models.prompt_call(decoder, 7)()
        assert decoder.length == 7


def test_bytes_of_a_token_are_those_that_are_read():
    packed = models.packed_model(TINY, "2bit")
    read = models.token_bytes(packed)
    assert read == packed.nbytes - 256 * 32 * 4
    [decoding, prompt] = models.decoding(1, TINY, "x", ("2bit",), 4, 8, from_memory=True)
    assert decoding.share_of == peaks.peak_name(peaks.MEMORY, 1)
    assert decoding.per_unit == pytest.approx(1e-9 * read)
    assert prompt.share_of is None


def test_memory_of_children():
    options = ("--stories", "20", "--model-dim", "8", "--sequence-length", "8", "--threads", "1")
    found = dict(models.memory(TINY, options))
    assert len(found) == 2
    for peak in found.values():
        assert 15 * 2**20 < peak < 400 * 2**20


def test_memory_tells_what_failed(capfd):
    with pytest.raises(subprocess.CalledProcessError):
        models.peak_memory(["-c", "raise SystemExit('no such thing')"])
    assert "no such thing" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("load", "told"), [(0.1, ""), (1.5, "other programs are running (load 1.5)")]
)
def test_a_busy_machine_is_told_of(load, told, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.measure.os.getloadavg", lambda: (load, 0.0, 0.0))
    assert machine_load() == load
    assert capsys.readouterr().err.startswith(told)


def test_children_import_this_package():
    done = subprocess.run(
        [sys.executable, "-c", "import legacy1bit; print(legacy1bit.__file__)"],
        env=package_environment(),
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert Path(done.stdout.strip()) == Path(legacy1bit.__file__)


# --- Instructions ---------------------------------------------------------------------------------


def test_instructions_are_divided_by_tokens(monkeypatch):
    def run(command, **settings):
        if command[0] != "valgrind":
            return
        [out] = [part.partition("=")[2] for part in command if "callgrind-out-file" in part]
        total = 0 if settings["env"]["LEGACY1BIT_SIMD"] == "avx512" else 3200
        Path(out).write_text(f"events: Ir\nsummary: {total}\ntotals: {total}\n")

    monkeypatch.setattr(instructions.subprocess, "run", run)
    monkeypatch.setattr(instructions.shutil, "which", lambda _: "valgrind")
    counts, missing = instructions.count_all(["scalar", "avx512"], 2)
    assert counts == {"scalar": [200.0, 200.0]}
    assert missing == {"avx512": instructions.NOT_COUNTED}


def test_instructions_need_valgrind(monkeypatch):
    monkeypatch.setattr(instructions.shutil, "which", lambda _: None)
    assert instructions.count_all(["scalar"]) == ({}, {"scalar": instructions.NO_VALGRIND})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_instructions_repeat_to_the_last_digit():
    counts, missing = instructions.count_all(["scalar", "avx512"], 2)
    assert len(set(counts["scalar"])) == 1
    # 4 blocks of 12 * 128 * 128 weights, and the output: less than an instruction for each would
    # mean that only a part is counted.
    assert counts["scalar"][0] > 4 * 12 * 128**2 + 256 * 128
    assert missing == {"avx512": instructions.NOT_COUNTED}


def test_what_is_counted_runs():
    subprocess.run(
        [sys.executable, "-c", instructions._CHILD, "2"], env=package_environment(), check=True
    )


# --- Reports --------------------------------------------------------------------------------------

PEAK = Result("GFLOP/s", {"scalar": [10.0, 10.0], "avx2": [100.0, 100.0]})
PRODUCT = Result(
    "GFLOP/s",
    {"scalar": [4.0, 5.0, 9.0], "avx2": [80.0], "bf16": [300.0], "numpy": [50.0]},
    known={"elsewhere": 2.5},
    missing={"avx512": "not there"},
    share_of="peak",
)


@pytest.fixture
def made():
    return report.content({"peak": PEAK, "product": PRODUCT}, ["scalar", "avx2"], [2], 3, 0.25)


def test_report_has_all_that_was_measured(made):
    assert json.loads(json.dumps(made)) == made
    assert made["version"] == legacy1bit.__version__
    assert made["cpu"] == cpu_name() != ""
    assert made["load"] == 0.25
    assert (made["tiers"], made["threads"], made["rounds"]) == (["scalar", "avx2"], [2], 3)
    product = made["results"]["product"]
    assert product["rates"] == PRODUCT.rates
    assert product["medians"] == {"scalar": 5.0, "avx2": 80.0, "bf16": 300.0, "numpy": 50.0}
    assert product["shares"] == {"scalar": 0.5, "avx2": 0.8, "numpy": 0.5}
    assert product["better"] == "higher"


def test_table_has_a_line_for_everything(made):
    lines = report.table(made)
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert ["product", "scalar", "5.000", "4.500 to 7.000", "GFLOP/s", "1.00", "50%"] in cells
    assert ["product", "avx2", "80.00", "80.00 to 80.00", "GFLOP/s", "16.00", "80%"] in cells
    assert ["product", "bf16", "300.0", "300.0 to 300.0", "GFLOP/s", "60.00", ""] in cells
    assert ["product", "elsewhere", "2.500", "as known", "GFLOP/s", "0.5000", ""] in cells
    assert ["product", "avx512", "not there", "", "", "", ""] in cells


def test_report_is_written_beside_its_table(made, tmp_path, capsys):
    file = tmp_path / "new" / "bench.json"
    report.publish(made, ["a line"], file)
    assert json.loads(file.read_text()) == made
    assert file.with_suffix(".md").read_text() == capsys.readouterr().out
    assert "a line\n" in file.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (12.345, "12.35"), (123.45, "123.5"), (12345.6, "12,346")],
)
def test_numbers_have_four_digits(value, text):
    assert report.number(value) == text


def test_command_line_measures_and_reports(monkeypatch, tmp_path, capsys):
    chosen = [Benchmark("a", "things/s", 1.0, lambda: None)]
    told = {}

    def benchmarks(parts, threads, large):
        told.update(parts=list(parts), threads=threads, large=large)
        return chosen

    monkeypatch.setattr(__main__, "benchmarks", benchmarks)
    monkeypatch.setattr(__main__.models, "memory", lambda: iter([("memory: x", 3 << 20)]))
    monkeypatch.setattr(
        __main__.instructions, "count_all", lambda levels, times: ({"scalar": [5e6] * times}, {})
    )
    file = tmp_path / "out.json"
    arguments = ["--sse", "0", "--rounds", "2", "--instructions", "--large", "--json", str(file)]
    assert __main__.main(arguments) == 0
    assert told == {"parts": list(__main__.PARTS), "threads": 1, "large": True}
    results = json.loads(file.read_text())["results"]
    assert set(results) == {"a", "memory: x", instructions.NAME}
    assert len(results["a"]["rates"]["scalar"]) == 2
    assert results["memory: x"]["medians"] == {"scalar": 3.0}
    assert results[instructions.NAME]["rates"] == {"scalar": [5e6, 5e6]}
    assert "5,000,000" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--threads", "0"], ["--only", "x"]])
def test_command_line_refuses_nonsense(wrong, capsys):
    for program in (__main__, peers):
        with pytest.raises(SystemExit, match="2"):
            program.main(wrong)
    assert "error" in capsys.readouterr().err


# --- Two commits ----------------------------------------------------------------------------------


def as_new(rates):
    return {
        "format": 2,
        "results": {name: {"unit": "x", "rates": columns} for name, columns in rates.items()},
    }


@pytest.mark.parametrize("first", [dict, as_new], ids=["old", "new"])
@pytest.mark.parametrize("second", [dict, as_new], ids=["old", "new"])
def test_ratios_of_reports_of_either_format(first, second):
    a = [
        first({"x": {"scalar": [rate], "sse2": [1.0]}, "gone": {"scalar": [1.0]}})
        for rate in (1, 2, 4)
    ]
    b = [second({"x": {"scalar": [rate]}, "new": {"scalar": [1.0]}}) for rate in (3, 4, 10)]
    assert compare.ratios(a, b) == [compare.Ratio("x", "scalar", 2.0, 4.0, 2.0, 3.0)]
    assert compare.ratios(a, b)[0].ratio == 2.0
    assert compare.only_in_one(a, b) == (["gone"], ["new"])
    [line] = compare.table(compare.ratios(a, b))[2:]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("x", "scalar", "2.000", "4.000", "2.000", "2.000 to 3.000")
    ]


@pytest.mark.parametrize("wrong", [{"x": 1}, {"x": {"scalar": 1.0}}])
def test_what_is_no_report_is_refused(wrong):
    with pytest.raises(ValueError, match="no report of a benchmark"):
        compare.rates_of(wrong)


def test_commits_take_turns(monkeypatch, tmp_path, capsys):
    order = []

    def run(place, options):
        order.append(place.name)
        assert options == ["--sse", "0", "--threads", "1", "--only", "kernels"]
        return {"x": {"scalar": [1.0 if place.name == "old" else 1.5]}}

    monkeypatch.setattr(compare, "check_out", lambda commit, folder: folder / commit)
    monkeypatch.setattr(compare, "run_once", run)
    file = tmp_path / "compare.json"
    arguments = ["old", "new", "--turns", "2", "--sse", "0", "--json", str(file)]
    assert compare.main([*arguments, "--only", "kernels"]) == 0
    assert order == ["old", "new", "old", "new"]
    told = json.loads(file.read_text())
    assert [one["ratio"] for one in told["ratios"]] == [1.5]
    assert len(told["reports"]["A"]) == len(told["reports"]["B"]) == 2
    assert "1.500 to 1.500" in capsys.readouterr().out


def test_a_commit_that_is_none_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        compare.main(["no-such-commit", "main"])
    assert "no-such-commit" in capsys.readouterr().err


# --- Peers ----------------------------------------------------------------------------------------


def test_peers_take_turns():
    calls = []

    def call(who):
        return lambda: [float(calls.append(who) or len(calls))]

    turns = [("row", "torch", call("torch")), ("row", "float32", call("ours"))]
    results = peers.take_turns(turns, 2, pause=0.0)
    assert calls == ["torch", "ours"] * 3
    assert results["row"].rates == {"torch": [3.0, 5.0], "float32": [4.0, 6.0]}


def test_peers_table_has_ratios_and_cpus():
    training = {"torch": [10.0, 20.0, 30.0], "torch.compile": [22.0], "float32": [30.0]}
    results = {
        "training": Result("tokens/s", training),
        "decoding": Result("tokens/s", {"noavx": [100.0], "sse2": [250.0]}),
        "product": Result("GMAC/s", {"bitnet.cpp": [50.0], "avx2": [100.0]}),
    }
    tiers = {"torch": "AVX2", "torch.compile": "AVX2", "float32": "avx2", "bitnet.cpp": "native"}
    lines = peers.table(results, "EPYC", tiers)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    spread, t, g = "10.00 to 30.00", "tokens/s", "GMAC/s"
    assert cells[2:] == [
        ["training", "PyTorch", "EPYC, AVX2", "20.00", spread, t, ""],
        ["training", "PyTorch, torch.compile", "EPYC, AVX2", "22.00", "22.00 to 22.00", t, "1.10"],
        ["training", "ours, float32", "EPYC, avx2", "30.00", "30.00 to 30.00", t, "1.50"],
        ["decoding", "llama.cpp, noavx", "EPYC, noavx", "100.0", "100.0 to 100.0", t, ""],
        ["decoding", "ours, sse2", "EPYC, sse2", "250.0", "250.0 to 250.0", t, "2.50"],
        ["product", "bitnet.cpp, I2_S", "EPYC, native", "50.00", "50.00 to 50.00", g, ""],
        ["product", "ours, avx2", "EPYC, avx2", "100.0", "100.0 to 100.0", g, "2.00"],
    ]


def test_torch_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ValueError, match="needs PyTorch, which is not installed: pip install torch"
    ):
        torch_twin.load_torch()


def test_twin_has_as_many_parameters_as_the_model():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    ours = create_legacy_llm(TINY, 0).num_parameters
    twin = torch_twin.create_twin(torch, TINY)
    assert sum(one.numel() for one in twin.parameters()) == ours
    assert twin(torch.zeros((2, 16), dtype=torch.int64)).shape == (2, 16, 256)


def test_training_turns_run():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    results = peers.take_turns(peers.training_turns(1, TINY, 2, least=0.0), 1, pause=0.0)
    [(name, result)] = results.items()
    assert name == "training, 1 thread"
    assert list(result.rates)[:2] == ["torch", "float32"]
    assert all(value > 0 for [value] in result.rates.values())


def test_torch_compile_that_fails_is_one_line(monkeypatch, capsys):
    def twin_step(config, batch, threads, compiled=False):
        def step():
            if compiled:
                raise RuntimeError("no compiler\nand a long trace")

        return step

    monkeypatch.setattr(torch_twin, "twin_step", twin_step)
    columns = [column for _, column, _ in peers.training_turns(1, TINY, 2, least=0.0)]
    assert columns[:2] == ["torch", "float32"]
    expected = "torch.compile failed, and is left out: no compiler\n"
    assert capsys.readouterr().err == expected


def test_torch_compile_has_its_own_row(monkeypatch):
    steps = []

    def twin_step(config, batch, threads, compiled=False):
        return lambda: steps.append(compiled)

    monkeypatch.setattr(torch_twin, "twin_step", twin_step)
    turns = peers.training_turns(1, TINY, 2, least=0.0)
    assert [column for _, column, _ in turns][:3] == ["torch", "torch.compile", "float32"]
    assert steps == [True]
    turns[1][2]()
    turns[0][2]()
    assert steps[1] is True
    assert steps[-1] is False


def test_decoding_turns_run(monkeypatch, tmp_path):
    asked = []

    def run_bench(program, model, threads, repeats, prompt, decoded):
        asked.append((program.name, model.name, threads, repeats, prompt, decoded))
        return {"prompt": [7.0]} if prompt else {"decoding": [9.0]}

    monkeypatch.setattr(llama_cpp, "run_bench", run_bench)
    programs = {name: tmp_path / name for name in llama_cpp.BUILDS}
    before = math_ops.simd_level()
    models = {"tiny": (tmp_path / "x.gguf", Decoder(peers.packed_model(TINY, "2bit"), 1))}
    turns = peers.decoding_turns(programs, models, 8, 4, least=0.0)
    results = peers.take_turns(turns, 1, pause=0.0)
    math_ops.set_simd_level(before)
    assert results["prompt tiny, 1 thread, native"].rates["native"] == [7.0]
    assert results["decoding tiny, 1 thread, noavx"].rates["noavx"] == [9.0]
    assert LEVELS[-1] in results["decoding tiny, 1 thread, native"].rates
    narrow = [one for one in peers.BESIDE["noavx"] if one in LEVELS]
    assert list(results["prompt tiny, 1 thread, noavx"].rates) == ["noavx", *narrow]
    assert asked[:2] == [
        ("native", "x.gguf", 1, 1, 8, 0),
        ("native", "x.gguf", 1, 1, 0, 4),
    ]


def test_random_models_of_published_shapes_are_read(tmp_path):
    pytest.importorskip("gguf", reason="needs gguf")
    small = {"num_blocks": 1, "vocab_size": 64, "ffn_dim": 512}
    for config, kind, head in (peers.PUBLISHED | peers.OF_BITNET).values():
        file = peers.find_published(tmp_path, replace(config, **small), kind, head)
        packed = PackedModel.load(file)
        assert packed.config.num_kv_heads == config.num_kv_heads
        assert packed.config.scale == config.scale
        assert np.isfinite(Decoder(packed).prefill([1, 2, 3])).all()
        file.unlink()


def test_llama_bench_is_read():
    told = [
        {"n_prompt": 128, "n_gen": 0, "samples_ts": [100.5, 101.5]},
        {"n_prompt": 0, "n_gen": 64, "samples_ts": [10, 11.0]},
    ]
    expected = {"prompt": [100.5, 101.5], "decoding": [10.0, 11.0]}
    assert llama_cpp.read_rates(json.dumps(told)) == expected


def test_llama_bench_that_fails_is_one_line(tmp_path):
    failing = tmp_path / "llama-bench"
    failing.write_text("#!/bin/sh\necho one >&2\necho no model >&2\nexit 3\n")
    failing.chmod(0o755)
    with pytest.raises(ValueError, match="llama-bench failed with status 3: no model"):
        llama_cpp.run_bench(failing, tmp_path / "x", 1, 1)
    with pytest.raises(ValueError, match="missing"):
        llama_cpp.run_bench(tmp_path / "missing", tmp_path / "x", 1, 1)


def test_a_build_that_is_there_is_taken(tmp_path):
    program = tmp_path / "native" / "bin" / "llama-bench"
    program.parent.mkdir(parents=True)
    program.touch()
    assert llama_cpp.build(tmp_path / "source", tmp_path, "native") == program


# Kernels like bitnet.cpp's: a row of codes times one row of activations, or more, four at a time.
BITNET = """
#include "ggml-bitnet.h"
#include "ggml-quants.h"
#define PARALLEL_SIZE 4
size_t quantize_i2_s(const float *src, void *dst, int64_t rows, int64_t size, const float *)
{
    uint8_t *codes = (uint8_t *)dst;
    for (int64_t i = 0; i < rows * size; i++)
        codes[i / 4] = (uint8_t)((i % 4 ? codes[i / 4] : 0) | ((int)src[i] + 1) << i % 4 * 2);
    return ggml_row_size(GGML_TYPE_I2_S, size);
}
void ggml_vec_dot_i2_i8_s(int n, float *s, size_t bs, const void *vx, size_t, const void *vy,
                          size_t by, int nrc)
{
    const uint8_t *codes = (const uint8_t *)vx;
    for (int row = 0; row < nrc; row++) {
        const int8_t *y = (const int8_t *)vy + row * by;
        long sum = 0;
        for (int i = 0; i < n; i++) sum += (codes[i / 4] >> i % 4 * 2 & MASK) * y[i];
        s[row * bs] = (float)sum;
    }
}
"""


@pytest.fixture
def bitnet_source(tmp_path):
    """A function that writes a source tree like bitnet.cpp's."""
    if shutil.which("c++") is None:
        pytest.skip("c++ is not installed")

    def write(mask):
        for folder in ("src", "include"):
            (tmp_path / "bitnet" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "bitnet" / "include" / "ggml-bitnet.h").write_text('#include "ggml.h"\n')
        text = BITNET.replace("MASK", mask)
        (tmp_path / "bitnet" / bitnet_cpp.KERNELS).write_text(text)
        return tmp_path / "bitnet"

    return write


def test_bitnet_turns_run(bitnet_source, tmp_path):
    program = bitnet_cpp.build(bitnet_source("3"), tmp_path / "peers")
    before = math_ops.simd_level()
    turns = peers.bitnet_turns(program, 128, 4, least=0.0)
    results = peers.take_turns(turns, 1, pause=0.0, unit="GMAC/s")
    math_ops.set_simd_level(before)
    assert list(results) == ["2bit 128x128 x 1", "2bit 128x128 x 4"]
    for result in results.values():
        assert result.unit == "GMAC/s"
        ours = [level for level in LEVELS if level in ("avx2", LEVELS[-1])]
        assert list(result.rates) == ["bitnet.cpp", *ours]
        assert all(value > 0 for [value] in result.rates.values())


def test_bitnet_kernels_that_are_wrong_are_one_line(bitnet_source, tmp_path):
    program = bitnet_cpp.build(bitnet_source("1"), tmp_path / "peers")
    with pytest.raises(ValueError, match=r"bitnet\.cpp failed with status 1: wrong sums"):
        bitnet_cpp.run_kernels(program, 128, 1, 0.0)
    with pytest.raises(ValueError, match=r"the build of bitnet\.cpp's kernels failed with "):
        bitnet_cpp.build(bitnet_source("("), tmp_path / "peers")


def test_whole_models_run_beside_bitnet_cpp(bitnet_source, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf", reason="needs gguf")
    source = bitnet_source("3")
    config, *kinds = peers.OF_BITNET["BitNet 2B-4T, I2_S, F16 head"]
    small = replace(config, num_blocks=1, vocab_size=64, ffn_dim=512)
    monkeypatch.setattr(peers, "OF_BITNET", {"small": (small, *kinds)})
    monkeypatch.setattr(peers, "_LONG_PROMPT", 4)
    monkeypatch.setattr(peers, "_FEW_TOKENS", 2)
    monkeypatch.setattr(peers, "take_turns", functools.partial(peers.take_turns, pause=0.0))
    monkeypatch.setattr(peers, "bitnet_turns", lambda program: [])
    words = ["--only", "bitnet", "--published", "--bitnet-cpp", str(source), "--threads", "1",
             "--rounds", "1", "--folder", str(tmp_path / "peers"),
             "--json", str(tmp_path / "x.json")]  # fmt: skip
    with pytest.raises(SystemExit):
        peers.main(words)
    program = source / "build" / "bin" / "llama-bench"
    assert f"{program} is missing: build bitnet.cpp there" in capsys.readouterr().err

    program.parent.mkdir(parents=True)
    # Writes down what it is asked for: -p is its fourth word, -n its sixth.
    program.write_text(
        '#!/bin/sh\necho "$@" >> "$0.log"\n'
        'echo "[{\\"n_prompt\\": $4, \\"n_gen\\": $6, \\"samples_ts\\": [1$4$6.5]}]"\n'
    )
    program.chmod(0o755)
    assert peers.main(words) == 0
    told = json.loads((tmp_path / "x.json").read_text())["results"]
    assert told["prompt small, 1 thread, bitnet.cpp"]["rates"]["bitnet.cpp"] == [140.5]
    assert told["decoding small, 1 thread, bitnet.cpp"]["rates"]["bitnet.cpp"] == [102.5]
    assert [*told["prompt small, 1 thread, bitnet.cpp"]["rates"]][1:] == ["avx2"] * (
        "avx2" in LEVELS
    )
    asked = Path(f"{program}.log").read_text().splitlines()
    file = tmp_path / "peers" / "2560-I2_S-F16.gguf"
    assert asked[-1] == f"-m {file} -p 0 -n 2 -t 1 -r 1 -o json"


def test_bitnet_path_that_is_wrong_is_one_line(tmp_path, capsys):
    words = ["--only", "bitnet", "--json", str(tmp_path / "x.json")]
    for more, message in (
        ([], "expected the source of bitnet.cpp: --bitnet-cpp DIR"),
        (["--bitnet-cpp", str(tmp_path)], f"{tmp_path}: not the source of bitnet.cpp"),
    ):
        with pytest.raises(SystemExit) as ended:
            peers.main([*words, *more])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", llama_cpp.TYPES)
def test_gguf_models_have_our_shape(kind, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    config = ModelConfig(model_dim=256, num_blocks=1, num_heads=4, ffn_multiplier=4)
    file = tmp_path / "model.gguf"
    llama_cpp.write_model(config, kind, file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    reader = gguf.GGUFReader(file)
    tensors = {one.name: one for one in reader.tensors}
    matrices = [one for one in tensors.values() if one.tensor_type.name == kind.upper()]
    assert len(matrices) == 6
    assert sum(int(one.n_elements) for one in matrices) == 12 * 256 * 256
    # Rows run along the second axis there.
    assert list(tensors["blk.0.ffn_up.weight"].shape) == [256, 1024]
    assert list(tensors["output.weight"].shape) == [256, 256]
    values = gguf.quants.dequantize(matrices[0].data, matrices[0].tensor_type)
    assert len(np.unique(values)) == 3


def test_gguf_models_are_of_whole_groups(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    with pytest.raises(ValueError, match="model_dim is 32, expected a multiple of 256 for tq2_0"):
        llama_cpp.write_model(TINY, "tq2_0", tmp_path / "x")


@pytest.mark.parametrize("name", ["report.md", "folder.json", "file/report.json"])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(name, tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, OSError)):
        report.prepare(tmp_path / name)
    report.prepare(tmp_path / "new" / "report.json")
    assert (tmp_path / "new").is_dir()


# --- Serving --------------------------------------------------------------------------------------


def test_serving_counts_what_its_clients_get(capsys):
    config = ModelConfig(model_dim=32, num_blocks=1, sequence_length=256)
    arguments = ["--clients", "1", "3", "--seconds", "0.2", "--threads", "1"]
    assert serving.main(arguments, config) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["clients", "1", "3"]
    for _, tokens, middle, _, late, _ in rows[1:]:
        assert int(tokens) > 100
        assert 0 < float(middle) <= float(late)


class Answer(http.server.BaseHTTPRequestHandler):
    """Four events for each request, or a refusal."""

    status = 200

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (len(asked["prompt"]), asked["stream"]) == (serving.PROMPT, True)
        self.send_response(self.status)
        self.end_headers()
        for _ in range(4):
            time.sleep(0.005)
            self.wfile.write(b'data: {"choices": [{"text": "a"}]}\n\n')

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("status", [200, 429])
def test_serving_asks_a_server(capsys, status):
    handler = type("Handler", (Answer,), {"status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        arguments = ["--port", str(server.server_port), "--clients", "2", "--seconds", "0.5"]
        try:
            if status != 200:
                with pytest.raises(ValueError, match="429"):
                    serving.main(arguments)
                return
            assert serving.main(arguments) == 0
        finally:
            server.shutdown()
    # Two clients, and at least 5 ms for each token.
    assert 0 < int(capsys.readouterr().out.splitlines()[1].split()[1]) < 400
