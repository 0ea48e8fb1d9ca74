"""The experts of a mixture are matrices for passes, and stacks in files and in transformers."""

import dataclasses
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.errors import CompressError
from compress.experts import Experts
from compress.hf import packed_modules
from compress.source import check_source, open_source
from compress.streaming import StreamedModel
from compress.weights import Renamed
from tests import zoo

MIXTURES = ("qwen3_moe", "gpt_oss", "nemotron_h", "llama4_text")
TOKENS = torch.arange(5, 29)


def recipe_for(folder, text_file, *passes):
    calibration = {"text": str(text_file), "samples": 3, "length": 32}
    return {"model": str(folder), "calibration": calibration, "passes": [*passes]}


@pytest.fixture(scope="session")
def mixture(make_model, text_file, tmp_path_factory):
    """A mixture's dense folder, and its checkpoint of 3 and 4 bits, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = make_model(kind)
            step = {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}
            made[kind] = (
                folder,
                compress.run(recipe_for(folder, text_file, step), tmp_path_factory.mktemp(kind) / "out"),
            )
        return made[kind]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_loaded_mixture_computes_with_the_decoded_weights(mixture, kind):
    """The packed experts, put back into a stock model's stacks, give what the packed model gives."""
    folder, out = mixture(kind)
    packed, stock = compress.load(out, bits=3), AutoModelForCausalLM.from_pretrained(folder)
    mixtures = [path for path, module in packed.named_modules() if isinstance(module, Experts)]
    assert mixtures
    stock.requires_grad_(False)
    for name, module in packed_modules(packed).items():
        path, _, matrix = name.rpartition(".")
        path, _, place = path.rpartition(".")
        if path in mixtures:
            transposed = packed.get_submodule(path).transposed
            stack = getattr(stock.get_submodule(path), matrix)
            stack[int(place)] = module.dense().t() if transposed else module.dense()
        else:
            stock.get_submodule(name).weight.copy_(module.dense())
    with torch.no_grad():
        torch.testing.assert_close(packed(TOKENS[None]).logits, stock(TOKENS[None]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_experts_are_stored_as_stacks(mixture):
    _, out = mixture("qwen3_moe")
    record = json.loads((out / "config.json").read_text())["quantization_config"]
    shape = record["modules"]["model.layers.1.mlp.experts.down_proj"]
    assert (record["format_version"], shape["experts"]) == (5, 4)
    stored = compress.config.Checkpoint(out).info()
    assert stored["model.layers.1.mlp.experts.down_proj.weight"].shape == (3, 4, 48, 1)
    assert stored["model.layers.1.mlp.experts.down_proj.plane_4"].shape == (4, 48, 1)
    manifest = json.loads((out / "compression.json").read_text())
    assert not [name for name in manifest["not_quantised"] if "expert" in name]
    errors = manifest["passes"][0]["units"]["block-1"]["errors"]
    assert len([name for name in errors if re.search(r"experts\.\d\.", name)]) == 8


def test_experts_may_have_bits_of_their_own(mixture):
    _, out = mixture("qwen3_moe")
    name = "model.layers.0.mlp.experts.{}.gate_up_proj"
    model = compress.load(out, bits={r"re:model\.layers\..*": 3, name.format(2): 4})
    bits = compress.get_bits(model)
    assert [bits[name.format(place)] for place in range(4)] == [3, 3, 4, 3]
    held = packed_modules(model)
    assert held[name.format(1)].shape.parent_bits == 3, "what it does not need is not held"
    mean = compress.get_bits(compress.load(out, bits="3.5"))
    assert {3, 4} == {value for matrix, value in mean.items() if ".experts." in matrix}


@pytest.mark.slow
def test_a_loaded_mixture_is_saved_and_loaded_again(mixture, tmp_path):
    _, out = mixture("gpt_oss")  # with biases
    model = compress.load(out)
    model.save_pretrained(tmp_path / "again")
    again = compress.load(tmp_path / "again")
    assert torch.equal(again(TOKENS[None]).logits, model(TOKENS[None]).logits)
    model.load_state_dict(again.state_dict())
    assert torch.equal(again(TOKENS[None]).logits, model(TOKENS[None]).logits)


@pytest.mark.slow
def test_experts_may_have_sizes_for_groups_of_columns(make_model, text_file, verify, tmp_path):
    step = {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4, "codebooks": "shared"}
    step["ignore"] = ["re:.*self_attn.*", "re:.*layers[.]0[.].*"]  # which take most of the time
    model = make_model("gpt_oss", num_hidden_layers=2)
    out = compress.run(recipe_for(model, text_file, step), tmp_path / "out")
    record = json.loads((out / "config.json").read_text())["quantization_config"]
    assert record["format_version"] == 7
    shape = record["modules"]["model.layers.1.mlp.experts.down_proj"]
    assert (shape["experts"], shape["rank"], shape["group"]) == (4, 1, 64)
    stored = compress.config.Checkpoint(out).info()
    assert stored["model.layers.1.mlp.experts.down_proj.groups"].shape == (4, 48, 1)
    assert verify(out)
    for bits in (3, 4):
        model, dense = compress.load(out, bits=bits), compress.load(out, bits=bits).dequantize()
        torch.testing.assert_close(model(TOKENS[None]).logits, dense(TOKENS[None]).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(compress.load(tmp_path / "again")(TOKENS[None]).logits, model(TOKENS[None]).logits)


@pytest.mark.slow
def test_experts_that_no_token_came_to_have_the_statistics_of_all(make_model, text_file, tmp_path):
    step = {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}
    recipe = recipe_for(make_model("qwen3_moe", num_experts=24, num_local_experts=24), text_file, step)
    recipe["calibration"] |= {"samples": 1, "length": 4}  # eight places for the tokens of each layer's 24 experts
    units = json.loads((compress.run(recipe, tmp_path / "out") / "compression.json").read_text())["passes"][0]["units"]
    for unit in ("block-0", "block-1", "block-2"):
        few = {name: tokens for name, tokens in units[unit]["few_tokens"].items() if name.endswith("gate_up_proj")}
        assert len(few) == 24
        assert sum(few.values()) == 8
        unseen = [name for name, tokens in few.items() if not tokens]
        assert all("output" in error for name in unseen for error in units[unit]["errors"][name].values())


def test_all_experts_of_a_layer_are_quantised_or_none(make_model, text_file, tmp_path):
    step = {"kind": "rtn", "bits": 4, "ignore": [r"re:.*layers\.0\.mlp\.experts\.1\..*"]}
    with pytest.raises(CompressError, match="ignore all experts of a layer or none"):
        compress.run(recipe_for(make_model("qwen3_moe"), text_file, step), tmp_path / "out")
    assert not (tmp_path / "out.work").exists()


@pytest.mark.slow
def test_pruned_experts_stay_dense_stacks_that_transformers_reads(make_model, text_file, tmp_path):
    steps = [{"kind": "prune", "score": score, "sparsity": 0.5} for score in ("wanda", "sparsegpt")]
    for step in steps:
        out = compress.run(recipe_for(make_model("gpt_oss"), text_file, step), tmp_path / step["score"])
        stacks = [p for n, p in AutoModelForCausalLM.from_pretrained(out).named_parameters() if n.endswith("_proj")]
        assert len(stacks) == 6
        zeros = torch.cat([(stack == 0).flatten() for stack in stacks])
        assert zeros.float().mean().item() == pytest.approx(0.5, abs=0.01)


@torch.no_grad()
def put_back(stock, kind, name, weight):
    """Write an expert's matrix into transformers' own parameter, whose layout is told here once more."""
    path, place, matrix = name.rsplit(".", 2)
    experts = stock.get_submodule(path)
    if kind == "dbrx":  # the rows of all experts below one another; w2 is used from its other side
        stack = getattr(experts.mlp, matrix)
        rows = stack.view(experts.num_experts, -1, stack.shape[1])
        rows[int(place)] = weight.t() if matrix == "w2" else weight
    else:
        getattr(experts, matrix)[int(place)] = weight


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dbrx", "jetmoe", "longcat_flash"])
@torch.no_grad()
def test_experts_of_other_layouts_are_packed_and_compute_the_same(kind, text_file, tmp_path):
    """Rows of all experts in one matrix; lists of how many tokens each is given; experts that a router has beyond those with weights."""
    folder = zoo.save(kind, tmp_path / "model")
    source = open_source(str(folder))
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    streamed = StreamedModel(source.state, torch.device("cpu")).run_all(TOKENS)
    torch.testing.assert_close(streamed, stock(TOKENS[None]).logits[0], rtol=1e-4, atol=1e-4)
    step = {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}
    out = compress.run(recipe_for(folder, text_file, step), tmp_path / "out")
    packed = compress.load(out, bits=3)
    names = [
        name for name in packed_modules(packed) if re.search(r"[.][0-9]+[.]\w+$", name) and "experts" in name + kind
    ]
    assert len(names) >= 8
    for name, module in packed_modules(packed).items():
        try:
            stock.get_submodule(name).weight.copy_(module.dense())
        except AttributeError:
            put_back(stock, kind, name, module.dense())
    wanted = stock(TOKENS[None]).logits
    torch.testing.assert_close(packed(TOKENS[None]).logits, wanted, rtol=1e-4, atol=1e-4)
    dense = packed.dequantize()
    assert type(dense) is type(stock)
    torch.testing.assert_close(dense(TOKENS[None]).logits, wanted, rtol=1e-4, atol=1e-4)
    pruned = compress.run(recipe_for(folder, text_file, {"kind": "prune", "score": "magnitude"}), tmp_path / "pruned")
    whole = AutoModelForCausalLM.from_pretrained(pruned).eval()  # dense stacks, as plain transformers reads them
    matrix = next(
        p
        for n, p in whole.named_parameters()
        if n.endswith(("experts.mlp.w2", "experts.down_proj", "output_linear.weight"))
    )
    assert 0.3 < (matrix == 0).float().mean() < 0.7


@pytest.mark.slow
def test_a_faulty_comparison_from_disk_is_made_again_in_memory(tmp_path):
    """A router that reads another module's weight gets other memory from accelerate where blocks are left on the disk."""
    source = open_source(str(zoo.save("longcat_flash", tmp_path / "model")))
    check_source(source, TOKENS)
    broken = dataclasses.replace(source.state, source=Renamed(source.state.source, swapped(source)))
    with pytest.raises(CompressError, match="computes other logits"):
        check_source(dataclasses.replace(source, state=broken), TOKENS)


def swapped(source):
    """Exchange two matrices of one shape."""
    names = {name: name for name in source.state.source.info()}
    first, second = (f"model.layers.{index}.mlps.0.up_proj.weight" for index in (0, 1))
    return {**names, first: second, second: first}
