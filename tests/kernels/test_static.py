"""What the machine code of the kernels may cost: compiled for GPUs that need not be there, in a process without the interpreter."""

import json

import pytest
from static import Case, compiled_descent, compiled_experts, compiled_sums, counted, inner_loop, judge, machine_code

from compress.kernels import gpu
from compress.kernels.variants import Config, Variant

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00 */
        /*0010*/                   LDG.E R2, desc[UR6][R2.64] ;                  /* 0x00 */
        /*0020*/              @!P0 PRMT R3, R2, 0x5140, R4 ;                     /* 0x00 */
        /*0030*/               @P0 BRA 0x10 ;                                    /* 0x00 */
        /*0040*/                   EXIT ;                                        /* 0x00 */
        /*0050*/                   BRA 0x50 ;                                    /* 0x00 */
"""


def test_the_inner_loop_ends_with_a_backward_branch():
    assert inner_loop(SASS) == ["LDG.E R2, desc[UR6][R2.64]", "@!P0 PRMT R3, R2, 0x5140, R4", "@P0 BRA 0x10"]


@pytest.mark.slow
@pytest.mark.skipif(gpu.missing() is not None, reason=f"{gpu.missing()}")
def test_every_kind_of_kernel_compiles_and_keeps_its_budget(tmp_path, run_script):
    """Registers, spills and integer instructions per weight, for sm_80, sm_90 and sm_100; AMD's gfx942 for the plain ones."""
    run_script("static.py", "--json", tmp_path / "found.json", TRITON_CACHE_DIR=str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    assert {case["target"] for case in found} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {case["bits"] for case in found if case["operation"] == "gemv"} == {*range(2, 9)}
    assert {case["operation"] for case in found} == {"gemv", "dot", "tile", "look_up"}
    slim = {
        (case["bits"], case["head"], case["entries"]): case["integer"]
        for case in found
        if case.get("budget")
        and (case["operation"], case["kind"], case["rows"], case["groups"]) == ("gemv", "fp16", 1, False)
    }
    limits = {(2, 1, 16): 2.0, (2, 2, 16): 2.0, (3, 1, 16): 2.2, (4, 1, 16): 4.0, (4, 4, 16): 3.2}
    limits |= {(4, 1, 8): 2.6, (4, 4, 8): 2.3, (4, 1, 32): 2.1, (4, 4, 32): 1.6}
    assert all(slim[key] <= limit for key, limit in limits.items())


@pytest.mark.slow
@pytest.mark.skipif(gpu.missing() is not None, reason=f"{gpu.missing()}")
def test_shared_memory_that_nobody_asks_for_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = judge(Case(Variant("dot", 7, 4, "fp16"), Config(4, 8, 1, 64, 64, 2), "sm_80"))
    assert found["faults"] == ["49152 + 32768 bytes of shared memory, and Triton asks for neither"]


@pytest.mark.slow
@pytest.mark.skipif(gpu.missing() is not None, reason=f"{gpu.missing()}")
def test_every_launch_is_bound_and_compiled_as_on_a_gpu(tmp_path, run_script):
    assert run_script("bound.py", TRITON_CACHE_DIR=str(tmp_path)).endswith(" launches: ok\n")


@pytest.mark.slow
@pytest.mark.skipif(gpu.missing() is not None, reason=f"{gpu.missing()}")
@pytest.mark.parametrize(
    ("fewest", "parent", "kept", "sizes", "most", "target"),
    [(3, 6, 0, False, 400, "sm_90"), (4, 6, 3, False, 280, "sm_90"), (8, 8, 7, False, 140, "sm_90")]
    + [(3, 6, 0, True, 440, target) for target in ("sm_80", "sm_90", "sm_100")],
)
def test_the_column_loop_stays_in_registers_and_within_its_instructions(
    fewest, parent, kept, sizes, most, target, tmp_path, monkeypatch
):
    """Instructions for one weight, by a whole warp; without a barrier or shared memory 28 programs fit a multiprocessor, with sizes 25."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    found, loop = machine_code(compiled_descent(fewest, parent, kept, target, sizes))
    names = counted(loop)
    assert found["REG"] <= (80 if sizes else 72)
    assert found["STACK"] + found["LOCAL"] + found["SHARED"] == 0
    assert not names.keys() & {"BAR", "LDS", "STS", "LDL", "STL"}
    assert len(loop) <= most


@pytest.mark.slow
@pytest.mark.skipif(gpu.missing() is not None, reason=f"{gpu.missing()}")
@pytest.mark.parametrize("entries", [64, 256])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_sums_by_code_take_few_instructions(entries, target, tmp_path, monkeypatch):
    """For a value and an entry of the codebook; 16 of the former and all of the latter are one iteration of all warps."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    found, loop = machine_code(compiled_sums(entries, target))
    assert found["REG"] <= 80
    assert found["STACK"] + found["LOCAL"] == 0
    assert len(loop) / 32 <= 5


@pytest.mark.slow
@pytest.mark.skipif(gpu.missing() is not None, reason=f"{gpu.missing()}")
def test_the_column_loop_compiles_for_other_makers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compiled_descent(3, 6, 0, "gfx942").asm["hsaco"]
    assert compiled_sums(64, "gfx942").asm["hsaco"]


@pytest.mark.slow
@pytest.mark.skipif(gpu.missing() is not None, reason=f"{gpu.missing()}")
@pytest.mark.parametrize(
    ("bits", "head", "kind", "groups", "target"),
    [
        (3, 1, "fp16", True, "sm_80"),
        (4, 4, "bf16", False, "sm_90"),
        (8, 4, "bf16", True, "sm_90"),
        (8, 4, "bf16", True, "gfx942"),
    ],
)
def test_the_product_with_experts_compiles(bits, head, kind, groups, target, tmp_path, monkeypatch):
    """On matrix instructions, with nothing put aside in memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = compiled_experts(bits, head, kind, target, groups)
    if target == "gfx942":
        assert "mfma" in made.asm["amdgcn"]
        return
    found, loop = machine_code(made)
    assert found["STACK"] + found["LOCAL"] == 0 and found["REG"] <= 255
    assert counted(loop)["HMMA"] + counted(loop)["HGMMA"] > 0
