"""The benchmark of mixtures of experts: its controls, and the bits that it deals."""

import json

import pytest
import torch

import compress
from compress.evals.bench import mixture
from compress.evals.bench.peers import rounded


@pytest.mark.parametrize("group", [None, 8])
def test_gptq_without_a_hessian_is_rounding_to_nearest(group):
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    found, size = mixture.gptq({}, "any", weight, 3, group)
    expected, bytes_of_all = rounded(weight, 3, group)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert size == bytes_of_all


def test_gptq_loses_less_of_the_outputs_than_rounding():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator) @ torch.randn(8, 24, generator=generator)
    weight = torch.randn(16, 24, generator=generator)
    swept = mixture.gptq({"one": x.t() @ x}, "one", weight, 3, None)[0]
    nearest = rounded(weight, 3, None)[0]
    assert (x @ (swept - weight).t()).norm() < 0.8 * (x @ (nearest - weight).t()).norm()


def test_experts_that_are_split_compute_the_same(make_model):
    folder = make_model("gpt_oss", num_hidden_layers=1)
    tokens = torch.arange(5, 29)[None]
    stock, split = compress.load(folder), mixture.split(compress.load(folder))
    torch.testing.assert_close(split(tokens).logits, stock(tokens).logits, rtol=1e-4, atol=1e-4)


def test_bits_are_dealt_within_a_layers_experts():
    bits = {f"layers.{layer}.experts.{place}.up": 3 + layer + place % 2 for layer in range(2) for place in range(6)}
    found = mixture.dealt({**bits, "layers.0.q_proj": 7}, 1)
    assert found["layers.0.q_proj"] == 7
    for layer in range(2):
        mine = [value for name, value in found.items() if name.startswith(f"layers.{layer}.experts")]
        assert sorted(mine) == [3 + layer] * 3 + [4 + layer] * 3
    assert found != {**bits, "layers.0.q_proj": 7}


@pytest.mark.slow
def test_candidates_are_measured_at_equal_bytes(make_model, make_packed, text_file, tmp_path):
    ours = make_packed([{"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}], "qwen3_moe", samples=3)
    mixture.main(
        str(make_model("qwen3_moe")), ours, text=str(text_file), calibration=str(text_file), samples=2, length=32, bits="4,3",
        means="3.5", groups="0,16", target=tmp_path / "figures.json",
    )  # fmt: skip
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert len(rows) == 1 + 2 * 5 + 5
    sizes = {(row["name"], row["bits"]): row["bytes"] for row in rows}
    whole = [compress.inspect.inspect(ours)["bytes_at_bits"][str(bits)] for bits in (3, 4)]
    assert [sizes["any-precision", bits] for bits in (3, 4)] == whole
    own = [size for (name, bits), size in sizes.items() if bits == 3.5]
    assert all(whole[0] < size <= sum(whole) / 2 for size in own)
    assert len({size for (name, bits), size in sizes.items() if bits == 3.5 and "expert" in name}) == 1
