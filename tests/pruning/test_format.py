"""Version 3 of the format: sizes as FORMAT.md gives them, and records that make no sense."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import compress
from compress.errors import CompressError
from compress.inspect import inspect
from compress.weights import Checkpoint

DOCUMENT = (Path(compress.__file__).parent / "quant" / "FORMAT.md").read_text(encoding="utf-8")
LINEARS = {  # of a block: (key of outputs, key of inputs), by the table of FORMAT.md; None is the hidden size
    "llama": {
        "self_attn.q_proj": ("heads", None), "self_attn.k_proj": ("shared", None), "self_attn.v_proj": ("shared", None),
        "self_attn.o_proj": (None, "heads"), "mlp.gate_proj": ("channels", None), "mlp.up_proj": ("channels", None),
        "mlp.down_proj": (None, "channels"),
    },
    "gpt2": {
        "attn.c_attn": ("three", None), "attn.c_proj": (None, "heads"), "mlp.c_fc": ("channels", None),
        "mlp.c_proj": (None, "channels"),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def shaped(make_model, text_file, tmp_path_factory):
    made = {}

    def make(kind, *more):
        key = (kind, len(more))
        if key in made:
            return made[key]
        recipe = {
            "model": str(make_model(kind)),
            "calibration": {"text": str(text_file), "samples": 4, "length": 32},
            "passes": [{"kind": "mini_llm", "ratio": 0.2, "mode": "local", "protect": [1, 0]}, *more],
        }
        made[key] = compress.run(recipe, tmp_path_factory.mktemp("shaped") / "model")
        return made[key]

    return make


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tensors_have_the_documented_sizes(shaped, kind):
    folder = shaped(kind)
    config, info = config_of(folder), Checkpoint(folder).info()
    record = config["quantization_config"]
    assert (record["format_version"], record["bits"], record["modules"]) == (3, None, {})
    assert len(record["pruned"]) == 2
    hidden, dimension = 48, 12
    for block, fields in record["pruned"].items():
        sizes = {
            None: hidden, "heads": fields["heads"] * dimension, "shared": fields["key_value_heads"] * dimension,
            "three": 3 * fields["heads"] * dimension, "channels": fields["channels"],
        }  # fmt: skip
        for linear, (outputs, inputs) in LINEARS[kind].items():
            wanted = (sizes[outputs], sizes[inputs])
            assert info[f"{block}.{linear}.weight"].shape == (wanted if kind == "llama" else wanted[::-1])
            if f"{block}.{linear}.bias" in info:
                assert info[f"{block}.{linear}.bias"].shape == wanted[:1]


@pytest.mark.slow
def test_packed_matrices_record_the_sizes_they_have(shaped, verify):
    folder = shaped("llama", {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4})
    record = config_of(folder)["quantization_config"]
    assert record["format_version"] == 3
    for block, fields in record["pruned"].items():
        assert record["modules"][f"{block}.mlp.down_proj"]["in_features"] == fields["channels"]
    assert inspect(folder)["blocks"] == record["pruned"]
    assert "computes the recorded logits at 3, 4" in verify(folder)[-1]


def test_the_record_is_documented():
    section = DOCUMENT.split("### Pruned record")[1].split("###")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == ["heads", "key_value_heads", "channels"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 8}, "format_version 8 is none of 1 to 7"),
        ({"format_version": 1}, "pruned needs format_version 3 or more"),
        ({"pruned": {"model.layers.1": {"heads": 2}}}, "pruned is malformed"),
        ({"pruned": {"model.layers.1": {"heads": 3, "key_value_heads": 2, "channels": 9}}}, "is out of range"),
        ({"pruned": {"model.layers.1": {"heads": 2, "key_value_heads": 1, "channels": 0}}}, "is out of range"),
        ({"pruned": {"model.layers.1": {"heads": 8, "key_value_heads": 2, "channels": 9}}}, "is larger than the model"),
        (
            {"pruned": {"model.layers.9": {"heads": 2, "key_value_heads": 1, "channels": 9}}},
            "a pruned block 'model.layers.9'",
        ),
    ],
)
def test_records_that_make_no_sense_are_refused(shaped, tmp_path, change, message):
    copy = tmp_path / "copy"
    shutil.copytree(shaped("llama"), copy)
    config = config_of(copy)
    config["quantization_config"] |= change
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_pruned_model_has_no_widths(shaped):
    with pytest.raises(CompressError, match="none of its matrices is packed"):
        compress.load(shaped("llama"), bits=4)
