"""The table of peers: what is rounded here, its bytes, and one row per candidate."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from compress.evals.bench.__main__ import app
from compress.evals.bench.peers import in_blocks, rounded
from compress.inspect import inspect


def test_an_even_grid_per_row_or_group():
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0, 10.0, 10.4, 12.0, 13.0]])
    found, size = rounded(weight, 2, 4)
    assert torch.equal(found, torch.tensor([[0.0, 1.0, 2.0, 3.0, 10.0, 10.0, 12.0, 13.0]]))
    assert size == 8 * 2 / 8 + 2 * 4
    found, size = rounded(weight, 1, None)
    assert torch.equal(found, torch.tensor([[0.0, 0.0, 0.0, 0.0, 13.0, 13.0, 13.0, 13.0]]))
    assert size == 1 + 4


@torch.no_grad()
def test_only_linears_inside_the_blocks_change(tiny_llama):
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model, size = in_blocks(dense, lambda weight: (torch.zeros_like(weight), 0.0))
    whole = sum(parameter.numel() for parameter in dense.parameters())
    inside = sum(m.weight.numel() for n, m in dense.named_modules() if ".layers." in n and hasattr(m, "in_features"))
    assert size == 2 * (whole - inside)
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert not model.model.layers[0].mlp.up_proj.weight.any()
    assert dense.model.layers[0].mlp.up_proj.weight.any()


@pytest.mark.slow
def test_a_row_for_every_candidate(tiny_llama, compressed, text_file, tmp_path):
    options = [
        "--overlap",
        "--ours",
        str(compressed),
        "--bits",
        "4,6",
        "--groups",
        "0,32",
        "--length",
        "16",
        "--windows",
        "2",
    ]
    sizes = inspect(compressed)["bytes_at_bits"]
    between = (sizes["4"] + sizes["5"]) / 2e6
    options += ["--memory", f"{sizes['4'] / 1e6:.6f},{between:.6f}"]
    target = tmp_path / "peers.json"
    result = CliRunner().invoke(app, ["peers", str(tiny_llama), str(text_file), *options, "--json", str(target)])
    assert result.exit_code == 0, result.output
    rows = json.loads(target.read_text())["rows"]
    names = {row["name"] for row in rows}
    assert {"dense", f"{compressed.name}, 4 bits", "round to nearest per row, 6 bits"} < names
    mixed = {row["name"]: row["bytes"] for row in rows if "at most" in row["name"]}
    assert mixed[f"{compressed.name}, at most {sizes['4'] / 1e6:g} MB"] <= sizes["4"]
    assert sizes["4"] < mixed[f"{compressed.name}, at most {between:g} MB"] <= between * 1e6
    assert [row["bytes"] for row in rows] == sorted(row["bytes"] for row in rows)
    assert all(row["perplexity"] > 1 for row in rows)
    divergence = {row["name"]: row["kl"] for row in rows}
    assert divergence["dense"] == 0
    assert divergence[f"{compressed.name}, 4 bits"] > divergence[f"{compressed.name}, 6 bits"] > 0
