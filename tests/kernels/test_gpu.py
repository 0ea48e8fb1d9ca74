"""The operator of the GPU kernels where there is none: its reference, its registration, and the interpreter in place of a GPU."""

import json
import sys
from importlib.metadata import version

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import compress
from compress import cli
from compress.kernels import configs, gpu
from compress.kernels.bitplane import tiled_linear
from compress.kernels.configs import Problem, candidates, choose_config, heuristic
from compress.kernels.layout import random_tiled
from compress.kernels.variants import Config


def activations(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_gpu_plain_torch_computes_the_operator(dtype):
    tiled = random_tiled(37, 45, 5, 3)
    x, bias = activations(2, 3, 45, dtype=dtype), activations(37, dtype=dtype)
    y = tiled_linear(x, tiled, 4, bias)
    exact = x.double() @ tiled.dense(4, torch.float64).T + bias.double()
    assert y.dtype == dtype
    assert torch.allclose(y.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_torch_accepts_the_operator(trained):
    tiled = random_tiled(5, 33, 3)
    x = activations(2, 33).requires_grad_(trained)
    tensors, facts = tiled.tensors(3), (tiled.rows, tiled.columns, 3, tiled.head)
    results = torch.library.opcheck(torch.ops.compress.packed_linear.default, (x, tensors, None, None, *facts))
    assert set(results.values()) == {"SUCCESS"}
    results = torch.library.opcheck(torch.ops.compress.packed_weight.default, (tensors, None, *facts, torch.float32))
    assert set(results.values()) == {"SUCCESS"}


def test_fake_tensors_give_the_shape_without_computing():
    tiled = random_tiled(40, 64, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = tiled_linear(torch.empty(2, 3, 64, dtype=torch.bfloat16), tiled, 3)
    assert y.shape == (2, 3, 40)
    assert y.dtype == torch.bfloat16


# Which kernel, and how


def test_the_number_of_rows_chooses_the_kernel():
    counts = {1: "gemv", 4: "gemv", 5: "dot", 64: "dot", 65: "tile", 512: "tile", 513: "look_up"}
    assert {count: Problem(4096, 4096, 3, count, "fp16").operation for count in counts} == counts


def test_by_rule_matrix_instructions_serve_two_rows():
    chosen = [heuristic(Problem(4096, 4096, 3, count, "fp16"), 132, 227 << 10).matrix for count in (1, 2, 4)]
    assert chosen == [False, True, True]


@pytest.mark.parametrize("count", [1, 2, 16, 64, 300])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 4096), (28672, 8192), (40, 33), (4096, 11008)])
def test_rules_fill_a_gpu_and_stay_within_it(rows, columns, bits, count):
    for capability, room in ((80, 163), (89, 99), (90, 227), (100, 227), (120, 99)):
        problem = Problem(rows, columns, bits, count, "fp16", capability=capability)
        rule, shared = heuristic(problem, 132, room << 10), room << 10
        assert configs.launches(rule, problem, shared) or count == 1
        for config in (rule, *candidates(problem)):
            assert config.split == 1 or config.split * config.step <= problem.span
            assert config.bn // 32 * 2**bits * 128 <= 48 << 10 or bits <= 4  # tables in static shared memory


def test_tables_beside_a_pipeline_are_not_more_shared_memory_than_is_asked_for():
    """Triton asks the driver for more than 48 KiB by the pipeline alone; tables would bring the sum of these above."""
    problem = Problem(4096, 4096, 7, 64, "fp16", capability=80)
    assert not configs.launches(Config(4, 8, 1, 64, 64, 2), problem)  # 48 + 32 KiB
    assert configs.launches(Config(4, 8, 1, 64, 32, 3), problem)  # 79 + 16 KiB: asked for
    assert configs.launches(Config(4, 8, 1, 64, 32, 1), problem)  # 4 + 16 KiB
    assert not configs.launches(Config(4, 8, 1, 64, 32, 3), problem, 90 << 10)


def test_a_small_matrix_is_split_between_programs():
    assert heuristic(Problem(1024, 4096, 3, 16, "fp16"), 132, 227 << 10).split > 1
    assert heuristic(Problem(28672, 4096, 3, 1, "fp16"), 132, 227 << 10).split == 1


def test_about_a_dozen_configurations_are_worth_measuring():
    for count in (1, 4, 16, 300):
        assert 2 <= len(candidates(Problem(14336, 4096, 3, count, "fp16"))) <= 18
    assert len(candidates(Problem(14336, 4096, 3, 1024, "fp16"))) == 1


def test_a_damaged_tuning_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "own_folder", lambda: tmp_path)
    (tmp_path / "a-gpu.json").write_text('{"configs": {"x": {"wraps": 4}}}')
    with pytest.raises(ValueError, match=r"a-gpu.json: is not a tuning file"):
        choose_config(Problem(32, 32, 3, 1, "fp16"), "A GPU", 1, 1)


def test_measured_configurations_come_before_rules(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "own_folder", lambda: tmp_path)
    problem = Problem(32, 32, 3, 1, "fp16")
    (tmp_path / "b-gpu.json").write_text(json.dumps({"configs": {problem.key: {"warps": 2, "step": 1}}}))
    assert choose_config(problem, "B (GPU)", 1, 1) == Config(2, 1)


# The command line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tune"], "compress tune measures on a GPU, but t"),  # torch sees none, or triton is not installed
        (["bench-kernels"], "compress bench-kernels measures on a GPU, but t"),
        (["tune", "--shape", "4096"], "--shape: shape '4096' is not N x K, such as 14336x4096."),
        (["tune", "--bits", "1,9"], "--bits '1,9': the kernels that are tuned have 2 to 8 bits."),
        (["tune", "--rows", "many"], "--rows 'many': give numbers from 1"),
        (["tune", "--kind", "fp8"], "--kind 'fp8' is not fp16 or bf16."),
        (["tune", "x", "--shape", "8x8"], "give a checkpoint or --shape, not both."),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_checkpoints_own_layers_are_tuned_for(compressed):
    from compress.cli.tuning import _layers, _problems

    assert (100, 48) in _layers(str(compressed))
    problems = _problems(str(compressed), None, "3,4", "1,2,20,30", "bf16")
    assert {problem.count for problem in problems} == {1, 2, 30}  # 20 and 30 share a configuration
    assert {problem.bits for problem in problems} == {3, 4}


# In the interpreter: a process of its own, as Triton decides when it is imported

interpreter = pytest.mark.skipif(
    gpu.missing() is not None or version("triton").startswith("3.6"),
    reason=gpu.missing() or "the interpreter of Triton 3.6 does not work with NumPy 2.4",
)


@pytest.mark.slow
@interpreter
def test_plain_kernels_against_float64(interpret):
    assert interpret("interpreted.py").count(": ok") == 8


@pytest.mark.slow
@interpreter
def test_a_loaded_checkpoint_end_to_end(make_model, text_file, tmp_path, interpret):
    """With codebooks that rows share and sizes of groups; those of rows alone: tests/evals/test_gpu_script.py."""
    model = make_model("llama", hidden_size=64, head_dim=16, intermediate_size=96, num_hidden_layers=1)
    calibration = {"text": str(text_file), "samples": 2, "length": 16}
    passes = [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 6, "codebooks": "shared"}]
    recipe = {"model": str(model), "calibration": calibration, "passes": passes}
    folder = compress.run(recipe, tmp_path / "model")
    assert interpret("served.py", folder, tmp_path / "saved").count(": ok") == 7


@pytest.mark.slow
@interpreter
def test_experts_in_one_launch(make_model, text_file, tmp_path, interpret):
    """Of a model with biases, and of one whose columns have factors and sizes for groups."""
    calibration, folders = {"text": str(text_file), "samples": 2, "length": 16}, []
    for kind, codebooks in (("gpt_oss", "row"), ("qwen3_moe", "shared")):
        passes = [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 4, "codebooks": codebooks}]
        recipe = {"model": str(make_model(kind, num_hidden_layers=1)), "calibration": calibration, "passes": passes}
        folders.append(compress.run(recipe, tmp_path / kind))
    assert interpret("interpreted_experts.py", *folders).count(": ok") == 3


@pytest.mark.slow
@interpreter
def test_the_benchmark_and_the_tuner_run_end_to_end(tmp_path, interpret):
    assert interpret("measured.py", tmp_path).count(": ok") == 3


@pytest.mark.slow
@interpreter
def test_the_column_loop_of_the_codebook_search_chooses_what_the_one_for_cpus_does(interpret):
    assert interpret("descended.py").count(": ok") == 3
