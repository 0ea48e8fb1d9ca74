"""The caller's grad mode, default dtype, default device and autocast change nothing of what is written, loaded or measured."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import compress
from compress.evals.evaluate import evaluate_text
from compress.hf import packed_modules
from compress.plan import plan
from compress.prompts.baked import bake
from compress.settings import TrainingConfig
from compress.training import train
from tests.conftest import TEXT, assert_same_files

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(5, 25)[None]


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


STATES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: torch.device("meta"),  # stands for set_default_device("cuda")
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
every_state = pytest.mark.parametrize("state", STATES)
strong_states = pytest.mark.parametrize("state", ["inference_mode", "bfloat16", "device", "autocast"])
PASSES = [
    {"kind": "mini_llm", "ratio": 0.2, "mode": "global"},
    {"kind": "lora_recovery", "steps": 2, "batch": 2, "validate_every": 2},
    {"kind": "prune", "score": "wanda", "sparsity": 0.6},
    {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4, "keep_zeros": True},
    {"kind": "tune_tables", "steps": 2, "batch": 2},
    {"kind": "soft_prompt", "tokens": 3, "steps": 2, "batch": 2, "validate_every": 2},
]


@pytest.fixture(scope="module")
def usual(make_model, text_file, tmp_path_factory):
    """A recipe with a pass of every sort, and what it writes in torch's usual state."""
    calibration = {"text": str(text_file), "samples": 4, "length": 24}
    recipe = {"model": str(make_model("llama")), "calibration": calibration, "passes": PASSES}
    return recipe, compress.run(recipe, tmp_path_factory.mktemp("usual") / "model")


@pytest.fixture(scope="module")
def usual_embedding(make_model, text_file, tmp_path_factory):
    calibration = {"text": str(text_file), "samples": 4, "length": 24}
    step = {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4, "embedding_bits": 6}
    recipe = {"model": str(make_model("gpt2")), "calibration": calibration, "passes": [step]}
    return compress.run(recipe, tmp_path_factory.mktemp("usual") / "embedding")


def usual_state():
    return torch.get_default_dtype(), str(torch.get_default_device()), torch.is_grad_enabled()


@pytest.mark.slow
@strong_states
def test_a_recipe_writes_the_same_bytes(usual, tmp_path, state):
    recipe, expected = usual
    with STATES[state]():
        before = usual_state()
        assert plan(recipe)["passes"]
        compress.run(recipe, tmp_path / "model")
        assert usual_state() == before
    assert_same_files(expected, tmp_path / "model")


@every_state
@pytest.mark.parametrize("exact", [True, False])
def test_a_model_is_loaded_and_computes_as_ever(compressed, exact, state):
    with torch.no_grad():
        expected = compress.load(compressed, exact=exact, dtype=torch.float32)(TOKENS).logits
    with STATES[state]():
        model = compress.load(compressed, exact=exact, dtype=torch.float32)
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected)
    if state == "autocast":
        return  # who casts around a forward pass means it
    layer = packed_modules(model)["model.layers.0.self_attn.q_proj"]
    for rows in (1, 40):
        x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            right = layer(x)
            with STATES[state]():
                layer.bits = layer.bits  # forgets what it keeps
                assert torch.equal(layer(x), right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_packed_embedding_computes_as_ever(usual_embedding, dtype):
    model = compress.load(usual_embedding, dtype=torch.float32)
    with torch.no_grad():
        expected = model(TOKENS).logits
        torch.set_default_dtype(dtype)
        try:
            found = compress.load(usual_embedding)(TOKENS).logits
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.slow
@strong_states
def test_measuring_baking_and_training_do_not_depend_on_it(usual, tmp_path, state):
    _, folder = usual
    text = tmp_path / "text.txt"
    text.write_text(TEXT[::-1])
    samples = [torch.arange(start, start + 12) for start in range(4)]
    config = TrainingConfig(kind="test", steps=2, batch=2, validate_every=1)

    def trained():
        model = compress.load(folder, dtype=torch.float32).requires_grad_(False)
        model.model.norm.weight.requires_grad_(True)
        return train(model, samples, config, seed=0).record()

    expected = evaluate_text(str(folder), str(text)), trained()
    bake(folder, tmp_path / "right")
    with STATES[state]():
        assert (evaluate_text(str(folder), str(text)), trained()) == expected
        bake(folder, tmp_path / "baked")
    assert_same_files(tmp_path / "right", tmp_path / "baked")


FACTORIES = {"zeros", "ones", "empty", "full", "eye", "rand", "randn", "linspace"}
NUMBERED = {"arange", "tensor", "randint", "randperm"}
WITHIN_A_FORWARD_PASS = (
    *sorted((ROOT / "kernels").glob("*.py")),
    *(ROOT / "quant" / name for name in ("embedding.py", "format.py", "fused.py", "shared.py")),
    *(ROOT / "compress" / name for name in ("experts.py", "kv.py", "logits.py", "prompted.py", "shapes.py")),
)


def unsaid(source):
    """Calls that make a tensor and leave its device, or the dtype of floating numbers, to the process's defaults."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch":
            continue
        given = {keyword.arg for keyword in node.keywords}
        if node.func.attr in FACTORIES and not {"dtype", "device"} <= given:
            yield ast.unparse(node)
        if node.func.attr in NUMBERED and "device" not in given:
            yield ast.unparse(node)


@pytest.mark.parametrize("path", WITHIN_A_FORWARD_PASS, ids=lambda path: path.name)
def test_what_runs_outside_our_own_calls_names_dtype_and_device(path):
    assert not list(unsaid(path.read_text()))


def test_the_rule_finds_what_it_looks_for():
    source = "torch.empty(3, dtype=torch.int8)\ntorch.arange(4)\ntorch.zeros(1, dtype=d, device=x)\ntorch.arange(2, device=x)"
    assert list(unsaid(source)) == ["torch.empty(3, dtype=torch.int8)", "torch.arange(4)"]
