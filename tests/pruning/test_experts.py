"""Whole experts go: the router chooses among those that stay as if the others could not be chosen."""

import json
from collections import Counter

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

import compress
from compress.calibration import draw_samples
from compress.errors import CompressError
from compress.hf import packed_modules
from compress.loading import load_tokenizer
from compress.plan import plan
from compress.settings import Calibration
from compress.weights import Checkpoint
from tests import zoo

EIGHT = {  # a router of each form: softmax before and after the choice, a bias, groups, a module of its own beside the experts
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8},
    "gpt_oss": {"num_local_experts": 8},
    "deepseek_v3": {"n_routed_experts": 8},
    "granitemoe": {"num_local_experts": 8},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32},
}
ROUTERS = {"gemma4_text": "router.proj", "granitemoe": "block_sparse_moe.router", "gpt_oss": "mlp.router"}
PLAIN = """
import sys, json, torch
from transformers import AutoModelForCausalLM
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    found = model(torch.arange(5, 29)[None]).logits[0, -1].tolist()
assert "compress" not in sys.modules
print(json.dumps(found))
"""


class Masked(TorchFunctionMode):
    """Give the logits of some experts minus infinity: router's weight -> experts."""

    def __init__(self, gone):
        super().__init__()
        self.gone = {weight.data_ptr(): list(places) for weight, places in gone}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is functional.linear and args[1].data_ptr() in self.gone:
            found[..., self.gone[args[1].data_ptr()]] = float("-inf")
        return found


@pytest.fixture
def job(text_file, tmp_path):
    """Make a recipe that removes experts of a tiny model of a type, with 8 of them; two where nothing else is said."""

    def make(kind, *more, **settings):
        if not (tmp_path / kind).exists():
            zoo.save(kind, tmp_path / kind, **EIGHT[kind])
        step = {"kind": "mini_llm", "unit": "experts", "ratio": 0.25, "ratio_of": "layers", **settings}
        calibration = {"text": str(text_file), "samples": 4, "length": 32}
        return {"model": str(tmp_path / kind), "calibration": calibration, "passes": [step, *more]}

    return make


def removed(out):
    units = json.loads((out / "compression.json").read_text())["passes"][0]["units"]
    return {
        int(name.removeprefix("block-")): unit["removed"]["experts"]
        for name, unit in units.items()
        if "removed" in unit
    }


def router(model, kind, index):
    return model.get_submodule(f"model.layers.{index}.{ROUTERS.get(kind, 'mlp.gate')}").weight


@pytest.mark.slow
@pytest.mark.parametrize("kind", EIGHT)
@torch.no_grad()
def test_what_is_left_is_the_model_that_cannot_choose_the_others(job, kind, tmp_path):
    """A stock model with the removed experts' router logits at minus infinity is the reference."""
    out = compress.run(job(kind), tmp_path / "out")
    gone = removed(out)
    assert gone and all(len(places) == 2 for places in gone.values())
    if kind == "deepseek_v3":
        assert all({place // 4 for place in places} == {0, 1} for places in gone.values()), "of each group one"
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config[list(EIGHT[kind])[-1 if kind != "gemma4_text" else 1]] == 6
    dense, small = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tmp_path / kind, out))
    with Masked([(router(dense, kind, index), places) for index, places in gone.items()]):
        wanted = dense(zoo.TOKENS[None]).logits
    assert not torch.allclose(wanted, dense(zoo.TOKENS[None]).logits, atol=1e-3)
    torch.testing.assert_close(small(zoo.TOKENS[None]).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_the_experts_go_whose_absence_changes_the_output_least(job, kind, tmp_path):
    """Each removal, and the error that is told, is that of leaving every other expert out of a stock model in turn."""
    recipe = job(kind)
    out = compress.run(recipe, tmp_path / "out")
    samples = draw_samples(Calibration(**recipe["calibration"]), load_tokenizer(recipe["model"]), None).tokens
    model = AutoModelForCausalLM.from_pretrained(recipe["model"]).eval()
    index, gone = next(iter(removed(out).items()))  # blocks before it have no experts
    outputs = []
    experts = model.get_submodule(f"model.layers.{index}.mlp.experts")
    experts.register_forward_hook(lambda _m, _i, output: outputs.append(output.double()))

    def made(places):
        outputs.clear()
        with Masked([(router(model, kind, index), places)]):
            for sample in samples:
                model(sample[None])
        return torch.cat(outputs)

    whole, found = made([]), []
    while len(found) < 2:
        one_group = [place for place in range(8) if kind != "deepseek_v3" or place // 4 not in {g // 4 for g in found}]
        errors = {
            place: float((made([*found, place]) - whole).square().sum()) for place in one_group if place not in found
        }
        if kind == "deepseek_v3":  # of every group one, by the errors of one round
            first = {place: float((made([place]) - whole).square().sum()) for place in range(8)}
            found = sorted((min(range(s, s + 4), key=first.__getitem__) for s in (0, 4)), key=first.__getitem__)
        else:
            found.append(min(errors, key=errors.__getitem__))
    assert gone == found
    told = json.loads((out / "compression.json").read_text())["passes"][0]["units"][f"block-{index}"]["output_error"]
    wanted = float((made(found) - whole).square().sum() / whole.square().sum())
    assert told["experts"] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["output", "frequency"])
@torch.no_grad()
def test_experts_that_are_never_chosen_go_first_and_leave_the_logits_as_they_were(job, score, tmp_path):
    recipe = job("mixtral", score=score)
    model = AutoModelForCausalLM.from_pretrained(recipe["model"]).eval()
    for block in model.model.layers:  # logits of two experts are 0; of the others, in pairs, one is above by much
        weight = block.mlp.gate.weight
        weight[[2, 5]] = 0
        weight[[0, 3, 6]] += torch.tensor([9.0, -9.0] * 32)
        weight[[1, 4, 7]] -= torch.tensor([9.0, -9.0] * 32)
    model.save_pretrained(recipe["model"])
    chosen = Counter()
    model = AutoModelForCausalLM.from_pretrained(recipe["model"]).eval()
    for block in model.model.layers:
        block.mlp.experts.register_forward_pre_hook(
            lambda _m, args, kwargs: chosen.update(
                (args[1] if len(args) > 1 else kwargs["top_k_index"]).flatten().tolist()
            ),
            with_kwargs=True,
        )
    before = model(zoo.TOKENS[None]).logits
    assert not {2, 5} & chosen.keys()
    out = compress.run(recipe, tmp_path / "out")
    assert all(sorted(places) == [2, 5] for places in removed(out).values())
    small = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(small(zoo.TOKENS[None]).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_plain_transformers_loads_what_is_left_and_a_quantiser_takes_it(job, plain_python, verify, tmp_path):
    quantise = {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}
    recipe = job("qwen2_moe")
    plain = compress.run(recipe, tmp_path / "plain")
    with torch.no_grad():
        here = compress.load(plain, dtype=torch.float32)(zoo.TOKENS[None]).logits[0, -1]
    elsewhere = torch.tensor(json.loads(plain_python(PLAIN, plain).splitlines()[-1]))
    torch.testing.assert_close(elsewhere, here, rtol=1e-4, atol=1e-4)
    both = {**recipe, "passes": [*recipe["passes"], {"kind": "prune", "sparsity": 0.2}, quantise]}
    foreseen = plan({**recipe, "passes": [*recipe["passes"], quantise]})
    packed = compress.run({**recipe, "passes": [*recipe["passes"], quantise]}, tmp_path / "packed")
    sizes = json.loads((packed / "compression.json").read_text())["sizes"]
    assert foreseen["bytes_at_bits"] == sizes["tensors_at_bits"]
    assert foreseen["parameters_after"] == sum(torch.Size(i.shape).numel() for i in Checkpoint(plain).info().values())
    assert verify(packed)
    assert len([name for name in packed_modules(compress.load(packed, bits=3)) if ".experts." in name]) == 2 * 6 * 2
    assert compress.run(both, tmp_path / "both").exists()


@pytest.mark.slow
def test_a_multiple_of_experts_stays(job):
    recipe = job("mixtral", multiple=4, ratio=0.4)
    assert plan(recipe)["parameters_after"] < plan(job("mixtral", ratio=0.4))["parameters_after"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        (
            "mixtral",
            {"ratio": 0.9},
            r"2 experts are chosen for a token, so no fewer can stay, and 1 would; lower ratio",
        ),
        ("mixtral", {"ratio": 0.01}, r"ratio 0.01 of \d+ parameters is 0.08 of 8 experts of every layer"),
        ("mixtral", {"multiple": 8}, "8 experts stay if their number is to be a multiple of 8"),
        ("mixtral", {"mode": "local"}, "mode uniform"),
        ("mixtral", {"remove": "blocks"}, "no whole blocks"),
        ("mixtral", {"score": "fms"}, "unit experts goes with the scores output, frequency, magnitude, random"),
        ("mixtral", {"unit": "groups", "score": "frequency"}, "frequency with no other unit"),
        (
            "deepseek_v3",
            {"ratio": 0.75},
            r"no experts can be removed",
        ),  # a group would have one, and groups go by their best two
    ],
)
def test_what_cannot_be_is_refused_before_any_work(job, kind, settings, match):
    with pytest.raises(CompressError, match=match):
        plan(job(kind, **settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("llama", {}, "it has none among which a router chooses"),
        ("llama4_text", {}, "its router does not say of every token which experts it goes to"),
        ("mistral4", {"n_routed_experts": 8}, "it chooses among groups of experts, and has no bias"),
    ],
)
def test_models_whose_router_cannot_be_cut_are_refused_before_any_work(job, text_file, kind, changes, match, tmp_path):
    recipe = job("mixtral")
    with pytest.raises(CompressError, match=match):
        plan({**recipe, "model": str(zoo.save(kind, tmp_path / kind, **changes))})
