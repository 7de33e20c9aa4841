"""The inner loops of compiled kernels, and what llvm-mca reports of them."""

import shutil
import subprocess

import pytest

from benchmarks import mca

# A loop in a loop, the rest of a row, a call, a loop that ends with an unconditional jump, and a
# function of Cython's.
LISTING = """
0000000000001000 <__pyx_f_10legacy1bit_13_kernels_avx2_product.constprop.1.isra.0>:
    1000:	xor    %eax,%eax
    1010:	vmovups (%rdi),%ymm1
    1018:	nopw   0x0(%rax,%rax,1)
    1020:	vbroadcastss (%rsi,%rax,4),%ymm2        # 2000 <table>
    1026:	vfmadd231ps %ymm1,%ymm2,%ymm0
    102c:	vfmadd231ps %ymm1,%ymm2,%ymm3
    1030:	cmp    %rax,%rcx
    1033:	je     1040 <__pyx_f_10legacy1bit_13_kernels_avx2_product.constprop.1.isra.0+0x40>
    1035:	add    $0x8,%rax
    1039:	jmp    1020 <__pyx_f_10legacy1bit_13_kernels_avx2_product.constprop.1.isra.0+0x20>
    1040:	vaddps %ymm0,%ymm3,%ymm0
    1044:	dec    %rdx
    1047:	jne    1010 <__pyx_f_10legacy1bit_13_kernels_avx2_product.constprop.1.isra.0+0x10>
    1050:	vmulss %xmm0,%xmm1,%xmm1
    1054:	vaddps %ymm0,%ymm1,%ymm0
    1058:	dec    %rdx
    105b:	jne    1050 <__pyx_f_10legacy1bit_13_kernels_avx2_product.constprop.1.isra.0+0x50>
    1060:	vmulps %ymm0,%ymm3,%ymm0
    1064:	call   3000 <expf@plt>
    1069:	jne    1060 <__pyx_f_10legacy1bit_13_kernels_avx2_product.constprop.1.isra.0+0x60>
    1070:	ret

0000000000001080 <score_queries>:
    1080:	{vex} vpdpbusd (%rdi),%ymm1,%ymm2
    1088:	dec    %rdx
    108b:	jne    1080 <score_queries>
    1090:	ret

00000000000010a0 <__Pyx_PyObject_GetAttrStr>:
    10a0:	vpaddd %ymm0,%ymm1,%ymm0
    10a4:	jne    10a0 <__Pyx_PyObject_GetAttrStr>
"""
INNER = ("vbroadcastss (%rsi,%rax,4),%ymm2", "vfmadd231ps %ymm1,%ymm2,%ymm0",
         "vfmadd231ps %ymm1,%ymm2,%ymm3", "cmp    %rax,%rcx", "add    $0x8,%rax")  # fmt: skip


ARM_LISTING = """
0000000000002000 <__pyx_f_10legacy1bit_13_kernels_neon_packed_product>:
    2000:	ldr	q4, [x1, #16]
    2004:	adrp	x4, 19000 <__FRAME_END__+0x13ec0>
    2008:	and	v0.16b, v4.16b, v7.16b
    200c:	movi	v5.4s, #0x3f, lsl #24
    2010:	smlal2	v16.8h, v0.16b, v20.16b
    2014:	fmadd	s0, s1, s2, s0
    2018:	cbz	x3, 2020 <__pyx_f_10legacy1bit_13_kernels_neon_packed_product+0x20>
    201c:	add	x1, x1, #0x10
    2020:	b.ne	2000 <__pyx_f_10legacy1bit_13_kernels_neon_packed_product>  // b.any
    2024:	fadd	v0.4s, v0.4s, v1.4s
    2028:	bl	1500 <expf@plt>
    202c:	tbnz	w2, #0, 2024 <__pyx_f_10legacy1bit_13_kernels_neon_packed_product+0x24>
    2030:	ret
"""


def loop(kernel="k", vectors=1, multiplied=0, tier="avx2", body=("vpaddd %ymm0,%ymm1,%ymm0",)):
    return mca.Loop(kernel, tier, body, vectors, multiplied)


# --- Loops ----------------------------------------------------------------------------------------


def test_inner_loops_are_those_without_loops_and_calls():
    loops = mca.inner_loops(LISTING, "avx2")
    assert loops == [
        mca.Loop("product.1", "avx2", INNER, 2, 2),
        mca.Loop(
            "product.1",
            "avx2",
            ("vmulss %xmm0,%xmm1,%xmm1", "vaddps %ymm0,%ymm1,%ymm0", "dec    %rdx"),
            1,
            0,
        ),
        mca.Loop(
            "score_queries", "avx2", ("{vex} vpdpbusd (%rdi),%ymm1,%ymm2", "dec    %rdx"), 1, 1
        ),
    ]


def test_inner_loops_of_scalar_code_count_numbers():
    listing = LISTING.replace("vmulss %xmm0,%xmm1,%xmm1", "mulss  %xmm0,%xmm1")
    [scalar] = mca.inner_loops(listing, "scalar")
    assert (scalar.vectors, scalar.multiplied) == (1, 1)


def test_inner_loops_of_arm_keep_numbers_and_leave_out_jumps():
    body = ("ldr\tq4, [x1, #16]", "adrp\tx4, #0", "and\tv0.16b, v4.16b, v7.16b",
            "movi\tv5.4s, #0x3f, lsl #24", "smlal2\tv16.8h, v0.16b, v20.16b",
            "fmadd\ts0, s1, s2, s0", "add\tx1, x1, #0x10")  # fmt: skip
    assert mca.inner_loops(ARM_LISTING, "neon") == [mca.Loop("packed_product", "neon", body, 2, 1)]


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("__pyx_f_10legacy1bit_13_kernels_avx2_relu2", "relu2"),
        ("__pyx_f_10legacy1bit_19_kernels_avx512vnni_sum_of_squares", "sum_of_squares"),
        ("__pyx_fuse_0__pyx_f_10legacy1bit_12_kernels_sse_rows_times_vector.constprop.0",
         "rows_times_vector[0].0"),
        ("mix_values", "mix_values"),
        ("amx_pack_tile.constprop.1", "amx_pack_tile.1"),
    ],
)  # fmt: skip
def test_kernel_name(symbol, name):
    assert mca.kernel_name(symbol) == name


def test_hottest_is_one_loop_of_a_kernel():
    loops = [loop("b", 2), loop("b", 9), loop("a", 8, 1), loop("a", 3, 4)]
    assert mca.hottest(loops) == [loop("a", 3, 4), loop("b", 9)]


def test_hottest_keeps_forms_of_a_product_once():
    loops = [loop(vectors=60, multiplied=16), loop(vectors=113, multiplied=40)]
    rest = [loop(vectors=113, multiplied=40, body=("the same",)), loop(vectors=50, multiplied=13)]
    rest.append(loop(vectors=50, multiplied=16, body=("mov %rax,%rdx",) * 200))
    assert mca.hottest(loops + rest) == [loops[1], loops[0]]


# --- The table ------------------------------------------------------------------------------------


def test_table_names_loops_far_from_their_bounds():
    found = [
        mca.Figure(loop("dot", 4), "znver3", 8.0, 2.0, "Zn3FP1"),
        mca.Figure(loop("dot", 4, tier="avxvnni"), "znver3", 8.0, 2.0, "Zn3FP1"),
        mca.Figure(loop("relu", 4), "haswell", 2.0, 2.0, "dispatch"),
        mca.Figure(loop("tiles", 4, body=("tdpbf16ps x",)), "sapphirerapids", 9.0, 1.0, "p5"),
    ]
    lines = mca.table(found)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:6]]
    assert cells[0] == ["dot", "avx2", "znver3", "4", "0", "8.00", "2.00", "Zn3FP1", "4.00"]
    assert lines[-1] == "- dot, avx2 avxvnni: znver3 4.00 x (8.00 of 2.00 cycles)"
    assert mca.table(found[2:3])[-1] == "No loop takes more than 1.3 x its bound."


def test_notes_name_what_llvm_does_not_know():
    tiles = mca.Figure(loop(body=("tdpbf16ps x",)), "sapphirerapids", 9.0, 1.0, "p5")
    sandy, matrix = mca.notes([tiles], ["core2"])
    assert sandy.startswith("core2: ")
    assert matrix.startswith("amx: ")
    assert mca.notes([mca.Figure(loop(), "znver3", 1.0, 1.0, "p5")], []) == []


def test_pairs():
    assert mca.pairs(["avx512vnni"], None) == [
        ("avx512vnni", "icelake-server"),
        ("avx512vnni", "znver4"),
    ]
    assert mca.pairs(None, ["silvermont"]) == [
        ("sse2", "silvermont"),
        ("ssse3", "silvermont"),
        ("sse41", "silvermont"),
    ]
    assert mca.pairs(["avx2"], ["znver4"]) == [("avx2", "znver4")]
    assert {cpu for _, cpu in mca.pairs(None, None)} >= {
        *("znver1", "znver2", "znver3", "znver4", "haswell", "skylake", "icelake-server"),
        *("alderlake", "sapphirerapids", "core2", "nehalem", "silvermont", "btver2"),
        *("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-v1", "apple-m1"),
    }


def test_figures_read_what_llvm_mca_reports():
    body = ("vpaddd %ymm0,%ymm1,%ymm0",)

    def pressure(index, resource, usage):
        return {"InstructionIndex": index, "ResourceIndex": resource, "ResourceUsage": usage}

    def region(uops):
        rows = [pressure(0, 0, 9.0), pressure(1, 0, 0.5), pressure(1, 2, 1.0), pressure(1, 1, 1.0)]
        return {
            "SummaryView": {
                "Iterations": 100, "TotalCycles": 203, "TotaluOps": uops, "DispatchWidth": 4,
                "BlockRThroughput": 1.0,
            },
            "ResourcePressureView": {"ResourcePressureInfo": rows},
        }  # fmt: skip

    told = {
        "TargetInfo": {"Resources": ["FP0", "FP1.\x00", "FP1.\x01"]},
        "CodeRegions": [region(100), region(500)],
    }
    loops = [loop(body=body), loop(body=body)]
    first, second = mca.figures(told, loops, "znver3")
    assert (first.cycles, first.bound, first.binds, first.ratio) == (2.03, 1.0, "FP1", 2.03)
    assert second.binds == "dispatch"


# --- Programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["llvm-mca", "objdump"])
def test_program_that_is_missing_is_one_line(monkeypatch, capsys, missing, tmp_path):
    (tmp_path / "_kernels_avx2.x.so").touch()

    def run(command, **_):
        raise FileNotFoundError(command[0])

    if missing == "llvm-mca":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(mca, "find_llvm_mca", lambda: "llvm-mca-19")
        monkeypatch.setattr(mca, "known_cpus", lambda program, triple: {"znver3"})
        monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as ended:
        mca.main(["--tiers", "avx2", "--folder", str(tmp_path)])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{missing} is not installed: see the package" in line


def test_newest_llvm_mca_is_taken(monkeypatch):
    there = {"llvm-mca", "llvm-mca-14", "llvm-mca-19"}
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in there else None)
    assert mca.find_llvm_mca() == "/bin/llvm-mca-19"


def test_kernels_that_are_missing_are_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(mca, "find_llvm_mca", lambda: "llvm-mca-19")
    monkeypatch.setattr(mca, "known_cpus", lambda program, triple: {"znver3"})
    with pytest.raises(SystemExit):
        mca.main(["--tiers", "avx2", "--folder", str(tmp_path)])
    assert "no compiled kernels of avx2; make mca compiles them" in capsys.readouterr().err


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """A folder whose compiled kernels are the listing."""
    try:
        mca.find_llvm_mca()
    except ValueError as error:
        pytest.skip(str(error))
    (tmp_path / "_kernels_avx2.x.so").touch()
    monkeypatch.setattr(mca, "disassemble", lambda module, objdump: LISTING)
    return tmp_path


def test_llvm_mca_repeats_to_the_digit(kernels, capsys):
    printed = []
    for _ in range(2):
        words = ["--tiers", "avx2", "--cpus", "haswell", "znver2", "--kernels", "pro*"]
        assert mca.main([*words, "--folder", str(kernels)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed[0].splitlines()]
    assert [row[:5] for row in rows[2:4]] == [
        ["product.1", "avx2", "haswell", "2", "2"],
        ["product.1", "avx2", "znver2", "2", "2"],
    ]
    # Each sum waits for the one before: five cycles on both.
    assert all(float(row[5]) == pytest.approx(5.0, abs=0.1) for row in rows[2:4])
    assert "- product.1, avx2: " in printed[0]


def test_llvm_mca_takes_loops_of_arm(kernels, capsys, monkeypatch):
    (kernels / "_kernels_neon.x.so").touch()
    monkeypatch.setattr(mca, "disassemble", lambda module, objdump: ARM_LISTING)
    assert mca.main(["--tiers", "neon", "--folder", str(kernels)]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    cpus = [row[2].strip() for row in rows if len(row) == 9]
    assert cpus == ["cortex-a53", "cortex-a72", "apple-m1"]


def test_llvm_mca_that_refuses_is_one_line(kernels, capsys, monkeypatch):
    monkeypatch.setattr(mca, "disassemble", lambda module, objdump: LISTING.replace("%ymm", "%zmm"))
    with pytest.raises(SystemExit):
        mca.main(["--tiers", "avx2", "--cpus", "haswell", "--folder", str(kernels)])
    [line] = capsys.readouterr().err.splitlines()
    assert "error: llvm-mca" in line


def test_cpus_that_llvm_mca_does_not_know_are_left_out(kernels, capsys):
    words = ["--tiers", "avx2", "--folder", str(kernels), "--kernels", "product*", "--cpus"]
    assert mca.main([*words, "haswell", "znver99"]) == 0
    result = capsys.readouterr()
    assert "does not know znver99, which is left out" in result.err
    assert "haswell" in result.out
    with pytest.raises(SystemExit):
        mca.main([*words, "znver99"])
    assert "no kernel, tier and CPU fit together" in capsys.readouterr().err
