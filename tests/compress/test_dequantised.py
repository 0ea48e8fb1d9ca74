"""Checkpoints in 8 and 4 bits are read as what transformers dequantises them to."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.dequantised import dense_files, float8_matrix
from compress.errors import CompressError
from compress.loading import read_config
from compress.source import check_source, open_source
from compress.weights import Checkpoint

TOKENS = torch.arange(5, 13)


def rewritten(dense, folder, changed, settings):
    """Copy a model's folder with other tensors and a ``quantization_config``."""
    shutil.copytree(dense, folder)
    stored = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        stored |= changed(name, tensor)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": settings}))
    return folder


def in_blocks(name, weight, size=32):
    """Quantise a matrix of the blocks to float8 with a scale per block of 32 x 32."""
    if weight.ndim != 2 or "layers" not in name or "router" in name or "mlp.gate." in name:
        return {name: weight.bfloat16()}
    rows, columns = weight.shape
    parts = weight.float().view(rows // size, size, columns // size, size)
    scale = parts.abs().amax((1, 3)) / 448
    values = (parts / scale[:, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
    return {name: values, f"{name}_scale_inv": scale}


FLOAT8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], "fmt": "e4m3"}


@pytest.fixture(scope="module")
def float8(make_model, tmp_path_factory):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 2}
    return rewritten(make_model("qwen3", **sizes), tmp_path_factory.mktemp("float8") / "model", in_blocks, FLOAT8)


@pytest.fixture(scope="module")
def float4(make_model, tmp_path_factory):
    """A gpt-oss whose experts are MXFP4, as it is published."""

    def packed(name, tensor):
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor.bfloat16()}
        experts, columns, rows = tensor.shape
        generator = torch.Generator().manual_seed(len(name))
        values = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 123, values.shape[:-1], generator=generator, dtype=torch.uint8)
        return {f"{name}_blocks": values, f"{name}_scales": scales}

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("float4") / "model"
    return rewritten(make_model("gpt_oss", **sizes), folder, packed, {"quant_method": "mxfp4"})


@pytest.mark.parametrize("kind", ["float8", "float4"])
def test_every_tensor_is_the_one_that_transformers_makes(kind, request):
    folder = request.getfixturevalue(kind)
    source = open_source(str(folder))
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    files = dense_files(Checkpoint(folder), read_config(folder))
    for name in files.info():
        found = files.read([name])[name]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, wanted[name]), name
        assert files.info()[name].shape == tuple(found.shape)
    check_source(source, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float8", "float4"])
def test_it_is_compressed_like_a_dense_model(kind, request, tmp_path):
    folder = compress.run(
        {"model": str(request.getfixturevalue(kind)), "passes": [{"kind": "rtn", "bits": 8}]}, tmp_path / "out"
    )
    wanted = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(kind), dtype=torch.float32)
    found = compress.load(folder, dtype=torch.float32)
    logits = wanted(TOKENS[None]).logits
    assert (found(TOKENS[None]).logits - logits).abs().max() < 0.05 * logits.abs().max()


def test_the_last_blocks_may_be_smaller():
    """As the 576 rows of DeepSeek's compressed keys and values are, in blocks of 128."""
    values, scales = torch.ones(5, 6).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = float8_matrix("w", values, scales, (4, 4))
    assert torch.equal(found[:, 0], torch.tensor([1.0, 1, 1, 1, 3]))
    assert torch.equal(found[0], torch.tensor([1.0, 1, 1, 1, 2, 2]))
    assert torch.equal(float8_matrix("w", values, torch.tensor(2.0), (128, 128)), torch.full((5, 6), 2.0))
    exponents = torch.tensor([[128]], dtype=torch.uint8)
    assert torch.equal(float8_matrix("w", values, exponents, (128, 128)), torch.full((5, 6), 2.0))


def test_a_model_with_uneven_blocks_is_read_rightly_and_not_compared(make_model, tmp_path, caplog):
    """Transformers takes its blocks of 64 and 32 rows for two of 48 (``findings/fp8_last_block.sh``)."""
    name = "model.layers.0.mlp.up_proj.weight"

    def changed(own, weight):
        if own != name:
            return {own: weight.bfloat16()}
        parts = (weight.float() * torch.logspace(0, -2, 96)[:, None]).split(64)
        scales = torch.stack([part.abs().amax() / 448 for part in parts])[:, None]
        values = torch.cat([part / scale for part, scale in zip(parts, scales, strict=True)]).to(torch.float8_e4m3fn)
        return {own: values, f"{own}_scale_inv": scales}

    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 2}
    settings = {**FLOAT8, "weight_block_size": [64, 64]}
    folder = rewritten(make_model("qwen3", **sizes), tmp_path / "model", changed, settings)
    source = open_source(str(folder))
    stored = load_file(folder / "model.safetensors")
    wanted = stored[name].float() * stored[f"{name}_scale_inv"].repeat_interleave(64, 0)[:96]
    assert source.uneven == name
    assert torch.equal(source.state.source.read([name])[name], wanted.bfloat16())
    compress.run({"model": str(folder), "passes": [{"kind": "rtn", "bits": 8}]}, tmp_path / "out")
    assert f"not compared with transformers, which reads another {name}" in caplog.text


def test_what_does_not_fit_is_refused(float8, tmp_path):
    with pytest.raises(CompressError, match=r"w: .*\[5, 6\] with scales of \[3, 1\] is no form that is read here"):
        float8_matrix("w", torch.ones(5, 6).to(torch.float8_e4m3fn), torch.ones(3, 1), (4, 4))
    folder = tmp_path / "model"
    shutil.copytree(float8, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CompressError, match=f"{name} is in 8 bits and has no {name}_scale_inv; fetch the model again"):
        open_source(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match=r"is already quantised \(gptq\)"):
        open_source(str(folder))
