"""Widths by budget: the knapsack against trying everything, and models loaded by it."""

import itertools
import json
import random
import shutil

import pytest
import torch
from transformers import LlamaConfig

import compress
from compress.budget import choose_bits, groups, parse_bytes
from compress.hf import packed_modules
from compress.quant.records import packed_bytes
from compress.structure import architecture


def by_trying_everything(options, budget):
    best = float("inf")
    for picks in itertools.product(*options):
        size = sum(group[bits][0] for group, bits in zip(options, picks, strict=True))
        if size <= budget:
            best = min(best, sum(group[bits][1] for group, bits in zip(options, picks, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_knapsack_is_exact(seed):
    draw = random.Random(seed)
    options = [{bits: (draw.randrange(1, 60) * bits, draw.random() / 4**bits) for bits in (2, 3, 4)} for _ in range(6)]
    smallest, largest = (sum(pick(size for size, _ in group.values()) for group in options) for pick in (min, max))
    for budget in (smallest, (smallest + largest) // 2, largest):
        picks = choose_bits(options, budget)
        assert sum(group[bits][0] for group, bits in zip(options, picks, strict=True)) <= budget
        error = sum(group[bits][1] for group, bits in zip(options, picks, strict=True))
        assert error == pytest.approx(by_trying_everything(options, budget))


def test_large_budgets_are_kept_and_nearly_used_up():
    draw = random.Random(0)
    options = [{b: (b * draw.randrange(10**6, 10**8), draw.random() / 4**b) for b in range(3, 9)} for _ in range(200)]
    budget = sum((group[4][0] + group[5][0]) // 2 for group in options)
    used = sum(group[bits][0] for group, bits in zip(options, choose_bits(options, budget), strict=True))
    assert 0.98 * budget < used <= budget


def test_fused_matrices_are_one_choice():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 16, "num_attention_heads": 2}
    llama = architecture(LlamaConfig(num_hidden_layers=1, **sizes))
    names = [f"model.layers.0.{name}" for name in (*llama.attention, *llama.mlp)] + ["lm_head"]
    assert [len(group) for group in groups(names, llama)] == [3, 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("text", "expected"), [("2GB", 2e9), ("1.5 MiB", 1.5 * 2**20), ("700", 700), (4096, 4096), ("3kb", 3000)]
)
def test_amounts_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["much", "2TB", "-1GB", "GB"])
def test_amounts_that_are_none(text):
    with pytest.raises(compress.CompressError, match="give bytes, or a number and a unit"):
        parse_bytes(text)


def widths(model):
    return {name: module.bits for name, module in packed_modules(model).items()}


def test_a_mean_width_mixes_widths_within_its_bytes(compressed):
    model = compress.load(compressed, bits="3.5", dtype=torch.float32)
    found = widths(model)
    assert len(set(found.values())) > 1
    for layer in range(3):
        attention = [found[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "qkv"]
        assert len(set(attention)) == 1
    shapes = compress.hf.CompressConfig(**_settings(compressed)).shapes()
    used = sum(packed_bytes(shapes[name], bits) for name, bits in found.items())
    low, high = (sum(packed_bytes(shape, bits) for shape in shapes.values()) for bits in (3, 4))
    assert low < used <= (low + high) / 2


def _settings(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_at_the_bytes_of_a_whole_width_the_error_is_no_larger(compressed):
    passes = json.loads((compressed / "compression.json").read_text())["passes"]
    errors = {k: v for unit in passes[0]["units"].values() for k, v in unit["errors"].items()}
    found = widths(compress.load(compressed, bits=4.0))
    mixed = sum(errors[name][str(bits)]["divergence"] for name, bits in found.items())
    assert mixed <= sum(error["4"]["divergence"] for error in errors.values()) * (1 + 1e-9)


@pytest.mark.parametrize(("worse", "mixed"), [(1000, True), (20, False)])
def test_a_mix_is_taken_only_where_it_is_much_better(compressed, tmp_path, worse, mixed):
    """Without divergences, at the bytes of 4 bits for all: one matrix counts so many times as much, and would have more bits than others."""
    folder = shutil.copytree(compressed, tmp_path / "model")
    manifest = json.loads((folder / "compression.json").read_text())
    for unit in manifest["passes"][0]["units"].values():
        for name, by_bits in unit["errors"].items():
            for bits, error in by_bits.items():
                error.pop("divergence")
                error["weighted"] = (worse if name == "model.layers.1.mlp.down_proj" else 1) * 2.0 ** -int(bits)
    (folder / "compression.json").write_text(json.dumps(manifest))
    found = widths(compress.load(folder, bits=4.0))
    assert (len(set(found.values())) > 1) == mixed


def test_memory_counts_every_tensor(compressed):
    whole = sum(t.numel() * t.element_size() for t in compress.load(compressed, bits=4).state_dict().values())
    model = compress.load(compressed, memory=whole)
    held = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    assert 0.9 * whole < held <= whole
    with pytest.raises(compress.CompressError, match=r"memory 1kB: .* at their smallest, 3 bits"):
        compress.load(compressed, memory="1kB")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bits": "2.5"}, "2.5 bits are not available; this model can be read at 3 to 6 bits"),
        ({"bits": "four"}, "give a number, a mean"),
        ({"bits": 4, "memory": "1GB"}, "give one of them"),
    ],
)
def test_bad_budgets_are_named(compressed, options, complaint):
    with pytest.raises(compress.CompressError, match=complaint):
        compress.load(compressed, **options)


def test_without_measured_errors_nothing_is_guessed(compressed, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(compressed, folder)
    manifest = json.loads((folder / "compression.json").read_text())
    (folder / "compression.json").write_text(json.dumps({**manifest, "passes": []}))
    with pytest.raises(compress.CompressError, match=r"no measured errors of model\.layers\.0"):
        compress.load(folder, bits=3.5)
