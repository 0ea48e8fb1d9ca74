"""The pass: what it trains and on what, what it leaves behind, and that a kill changes nothing."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import compress
from compress.errors import CompressError
from compress.hf import packed_modules
from compress.inspect import inspect
from compress.passes import Whole
from compress.plan import plan
from compress.prompts.baked import bake
from compress.prompts.settings import SoftPromptConfig
from compress.prompts.soft_prompt import SoftPrompt
from compress.prompts.stored import embedding, new_prompt
from compress.recipe import parse_pass
from compress.sidecars import PEFT_WEIGHTS
from tests.conftest import CONFIGS, assert_same_files

TOKENS = torch.arange(3, 20)[None]


@pytest.mark.slow
def test_one_recipe_from_pruning_to_a_prompt(prompt_recipe, tmp_path, run_code, verify):
    """One folder; a fresh process loads it at any width with its prompt, with our help or with peft alone."""
    output = compress.run(prompt_recipe, tmp_path / "small")
    files = json.loads((output / "compression.json").read_text())["files"]
    assert {"soft_prompt/adapter_config.json", "soft_prompt/adapter_model.safetensors"} < files.keys()
    assert any("1 soft prompt can be read" in line for line in verify(output))
    assert inspect(output)["prompts"] == {"all widths": {"tokens": 5, "numbers": 240}}
    code = (
        "import sys, torch, compress; from peft import PeftModel; tokens = torch.arange(3, 20)[None]\n"
        "for bits in (3, 4):\n"
        "    ours = compress.load(sys.argv[1], bits=bits, prompt=True)(tokens).logits\n"
        "    theirs = PeftModel.from_pretrained(compress.load(sys.argv[1], bits=bits), sys.argv[1] + '/soft_prompt')\n"
        "    assert torch.equal(ours, theirs(tokens).logits)\n"
        "    print(float(ours[0, -1].float().logsumexp(0)))\n"
    )
    found = [float(line) for line in run_code(code, output).splitlines()]
    for bits, value in zip((3, 4), found, strict=True):
        here = compress.load(output, bits=bits, prompt=True)(TOKENS).logits[0, -1]
        assert value == pytest.approx(float(here.logsumexp(0)), abs=1e-4)
    adapter = output / "soft_prompt" / "adapter_model.safetensors"
    damaged = bytearray(adapter.read_bytes())
    damaged[-1] ^= 1
    adapter.write_bytes(damaged)
    with pytest.raises(CompressError, match=r"soft_prompt.adapter_model.safetensors: its content has changed"):
        verify(output)


@pytest.fixture
def whole(compressed):
    samples = [torch.arange(first, first + 17) % 7 for first in (0, 1, 2)]  # so alike that one teaches another
    model = compress.load(compressed, dtype=torch.float32).requires_grad_(False)
    return Whole(model, lambda: compress.load(compressed, bits=6), samples, compressed.parent / "scratch")


@pytest.fixture
def context():
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(context_length=64, seed=0, generator=lambda *_: generator, tokenizer=None)


def run_pass(whole, context, **settings):
    config = SoftPromptConfig(**{"tokens": 4, "steps": 3, "batch": 2, "warmup": 0, "validate_every": 3, **settings})
    return SoftPrompt(config).run_model("prompt", whole, context, lambda *_: None)


def test_steps_are_those_of_a_plain_loop(whole, context):
    """Embeddings put together by hand, next-token loss over the text's tokens after its first, AdamW, clipping."""
    compress.set_bits(whole.model, 4)
    found, record = run_pass(whole, context, widths=(4,), relative=False, learning_rate=0.01, clip=0.1)
    table = whole.model.get_input_embeddings()
    prompt = nn.Parameter(table(whole.samples[1][:4]).clone())
    optimizer = torch.optim.AdamW([prompt], weight_decay=0.0)
    for rate in (0.01, 0.01 * 2 / 3, 0.01 / 3):
        total, tokens = 0.0, 0
        for sample in whole.samples[1:]:  # the first is held out
            states = torch.cat([prompt, table(sample)])[None]
            logits = whole.model(inputs_embeds=states).logits[0, 4:-1]
            total += nn.functional.cross_entropy(logits, sample[1:], reduction="sum")
            tokens += len(sample) - 1
        (prompt.grad,) = torch.autograd.grad(total / tokens, [prompt])
        prompt.grad *= min(1.0, 0.1 / float(prompt.grad.norm()))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert record["best"]["step"] == 3
    torch.testing.assert_close(found["prompt_embeddings"], prompt.detach(), atol=1e-5, rtol=1e-4)


def test_the_model_stays_packed_and_as_it_was(whole, context):
    """No dense copy of a weight outlives its product, and the width in use comes back."""
    for module in packed_modules(whole.model).values():
        module.keep_dense = False
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    compress.set_bits(whole.model, 5)
    run_pass(whole, context, widths=(3, 4))
    assert compress.get_bits(whole.model) == 5
    assert all(module._dense is None for module in packed_modules(whole.model).values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.model.state_dict().items())


@pytest.mark.parametrize("kind", [*CONFIGS])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_prompt_begins_as_real_tokens(make_model, kind, method):
    """Untrained, it says what those tokens would have said: for a prefix they are the keys and values."""
    model = compress.load(make_model(kind), dtype=torch.float32)
    step = SoftPrompt(SoftPromptConfig(tokens=6, method=method))
    start = torch.arange(50, 56)
    whole = Whole(model, lambda: model, [start, start], None)
    prompted = new_prompt(model, method, step._begin(whole, None))
    logits = prompted(TOKENS, use_cache=False).logits[:, -17:]
    torch.testing.assert_close(logits, model(torch.cat([start[None], TOKENS], 1)).logits[:, 6:], atol=1e-4, rtol=1e-4)


def test_other_beginnings(whole, context, tiny_llama):
    from transformers import AutoTokenizer

    table = whole.model.get_input_embeddings().weight
    begin = lambda **settings: SoftPrompt(SoftPromptConfig(tokens=4, **settings))._begin(whole, context)  # noqa: E731
    assert torch.equal(begin(start="vocabulary"), table[:4])
    assert len({*map(float, begin(start="words")[:, 0])}) == 4
    context.tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    (dog,) = context.tokenizer(" dog", add_special_tokens=False)["input_ids"]
    assert torch.equal(begin(start_text=" dog"), table[dog].expand(4, -1))
    paper = parse_pass({"kind": "soft_prompt", "preset": "paper", "steps": 7}, 0)
    assert {**SoftPromptConfig.PRESETS["paper"], "steps": 7}.items() <= paper.model_dump().items()


def test_a_prompt_learned_at_several_widths(whole, context):
    _, record = run_pass(whole, context, widths=(3, 5), steps=4, validate_every=2)
    assert record["widths"] == [3, 5]
    assert [list(row["held_out"]) for row in record["history"]] == [["3", "5"]] * 3
    assert list(record["without"]) == ["3", "5"]


def test_it_trains_in_bfloat16(whole, context):
    """What is trained stays float32, through packed layers too."""
    found, record = run_pass(whole, context, widths=(3,), precision="bfloat16")
    assert found["prompt_embeddings"].dtype == torch.float32
    assert record["best"]["held_out"]["3"] < record["history"][0]["held_out"]["3"]


@pytest.mark.slow
def test_it_can_learn_from_the_dense_model(whole, context):
    """The held-out loss is then a divergence from it, without a prompt and with one."""
    from compress.distillation import likeliest, listed_divergence

    _, record = run_pass(whole, context, widths=(3,), distill=300, steps=1)
    compress.set_bits(whole.model, 3)
    first = whole.samples[0][None]
    with torch.no_grad():
        expected = listed_divergence(whole.model, first, *likeliest(whole.dense, first, 1 << 20)).mean()
    assert record["without"]["3"] == pytest.approx(float(expected), rel=1e-4)
    table = whole.model.get_input_embeddings()
    (sample,) = whole.samples[:1]
    with torch.no_grad():
        states = torch.cat([table(whole.samples[1][:4]), table(sample)])[None]  # it begins as a sample's first tokens
        found = whole.model(inputs_embeds=states).logits[0, 4:-1].log_softmax(-1)
        wanted = whole.dense(sample[None]).logits[0, :-1].log_softmax(-1)
    apart = (wanted.exp() * (wanted - found)).sum(-1).mean()
    assert record["history"][0]["held_out"]["3"] == pytest.approx(float(apart), rel=1e-3)
    shutil.rmtree(whole.scratch)


def test_samples_make_room_for_the_prompt(whole, context):
    context.context_length, lengths = 14, set()

    def look(_module, _args, given):
        lengths.update(value.shape[1] for key, value in given.items() if key.startswith("input") and value is not None)

    whole.model.register_forward_pre_hook(look, with_kwargs=True)
    run_pass(whole, context, widths=(3,))
    assert lengths == {10, 14}  # without the prompt and behind its 4 tokens


@pytest.mark.parametrize(
    ("passes", "complaint"),
    [
        ([{"kind": "soft_prompt", "tokens": 63}], "63 virtual tokens leave no room for text in a context of 64"),
        ([{"kind": "soft_prompt", "tokens": 4, "widths": [4]}], "4 bits are not among .* no pass before has quantised"),
        ([{"kind": "soft_prompt", "tokens": 4, "per_width": True}], "per_width needs a quantised model"),
        ([{"kind": "soft_prompt", "tokens": 4, "start_text": ""}], "start_text has no tokens"),
        ([{"kind": "soft_prompt", "start": "words", "start_text": "a"}], "start_text goes with start: text"),
        ([{"kind": "soft_prompt", "tokens": 4}, {"kind": "rtn"}], r"passes.1 \(rtn\) .* put soft_prompt last"),
        ([{"kind": "rtn", "bits": 4}, {"kind": "soft_prompt", "tokens": 4, "widths": [3]}], r"3 bits .* \(4 to 4\)"),
    ],
)
def test_mistakes_are_refused_before_any_work(recipe, tmp_path, passes, complaint):
    with pytest.raises(CompressError, match=complaint):
        compress.run(recipe | {"passes": passes}, tmp_path / "model")
    assert not (tmp_path / "model.work").exists() or not any((tmp_path / "model.work").glob("*/*"))


@pytest.mark.slow
def test_the_text_of_a_prompt_is_no_text_to_measure_on(recipe, tmp_path, text_file):
    """Its own, beside the recipe's; both are in the manifest by their digests."""
    from compress.evals.evaluate import evaluate_text

    own = tmp_path / "own.txt"
    own.write_text("a lazy fox and a quick dog sleep in the brown den. " * 60)
    text = {"text": str(own), "samples": 4, "length": 24}
    recipe["passes"] = [{"kind": "rtn"}, {"kind": "soft_prompt", "tokens": 4, "steps": 1, "text": text}]
    del recipe["calibration"]
    output = compress.run(recipe, tmp_path / "model")
    with pytest.raises(CompressError, match="calibrated or trained on"):
        evaluate_text(str(output), str(own))


@pytest.mark.slow
def test_the_plan_counts_the_packed_model_once(prompt_recipe):
    needed = plan(prompt_recipe)["passes"][2]["memory_bytes"]
    prompt_recipe["passes"][2]["distill"] = 8
    assert plan(prompt_recipe)["passes"][2]["memory_bytes"] > needed


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_bytes(prompt_recipe, tmp_path):
    prompt_recipe["passes"][2] |= {"per_width": True, "distill": 16}
    seen = []

    def stop(what, done, total):
        seen.append(what)
        if "3bit, held-out" in what and done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        compress.run(prompt_recipe, tmp_path / "stopped", progress=stop)
    seen.clear()
    compress.run(prompt_recipe, tmp_path / "stopped", progress=lambda what, done, total: seen.append((what[:31], done)))
    assert ("soft_prompt: 3bit, held-out los", 2) in seen
    assert ("soft_prompt: 3bit, held-out los", 1) not in seen
    assert not any("dense model says" in what for what, _ in seen)
    compress.run(prompt_recipe, tmp_path / "whole")
    assert_same_files(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(prompt_recipe, tmp_path, kill_and_finish):
    """The whole recipe, killed once in the middle of the training."""
    prompt_recipe["passes"][2] |= {"steps": 60, "validate_every": 5}
    compress.run(prompt_recipe, tmp_path / "whole")
    kill_and_finish(prompt_recipe, tmp_path / "killed", kills=1, unit="soft_prompt-*/scratch/*", pause=0)
    assert_same_files(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_make_one_checkpoint(prompt_recipe, tmp_path, run_ranks):
    """The main one compresses and writes; the training is shared, so sums come in another order."""
    prompt_recipe["passes"][2] |= {"distill": 16, "per_width": True}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(prompt_recipe))
    code = "from compress.cli import main\nmain()"
    process = run_ranks(2, code, "run", path, "-o", tmp_path / "two")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(str(tmp_path)) == 1
    compress.run(prompt_recipe, tmp_path / "one")
    one, two = (load_file(tmp_path / name / "soft_prompt" / "3bit" / PEFT_WEIGHTS) for name in ("one", "two"))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
    assert not (tmp_path / "two.work").exists()


@pytest.mark.slow
def test_prompts_train_on_a_dense_model(recipe, tmp_path):
    recipe["passes"] = [{"kind": "soft_prompt", "tokens": 4, "steps": 2, "batch": 2}]
    output = compress.run(recipe, tmp_path / "model")
    model = compress.load(output, prompt=True)
    assert isinstance(model, PeftModel)
    assert embedding(model).shape == (4, 48)


@pytest.mark.slow
def test_a_prompt_is_as_wide_as_the_embedding(recipe, make_model, tmp_path):
    """Of an OPT that projects its embedding, narrower than its blocks."""
    recipe["model"] = str(make_model("opt", word_embed_proj_dim=32))
    prompt = {"kind": "soft_prompt", "tokens": 4, "steps": 2, "batch": 2}
    for method, width in (("prompt", 32), ("prefix", 2 * 3 * 48)):
        recipe["passes"] = [{"kind": "rtn"}, {**prompt, "method": method}]
        folder = compress.run(recipe, tmp_path / method)
        model = compress.load(folder, prompt=True)
        assert embedding(model).shape == (4, width)
        assert model(torch.tensor([[5, 17, 40]])).logits.isfinite().all()
    bake(tmp_path / "prompt", tmp_path / "baked")
    ids = torch.tensor([[*range(300, 304), 5, 17, 40]])
    expected = compress.load(tmp_path / "prompt", prompt=True)(ids[:, 4:]).logits
    torch.testing.assert_close(compress.load(tmp_path / "baked")(ids).logits[..., :300], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_prefix_of_blocks_with_different_heads_is_refused_in_the_plan(recipe):
    prune = {"kind": "mini_llm", "ratio": 0.4, "mode": "global", "score": "magnitude", "compensate": False}
    recipe["passes"] = [prune, {"kind": "soft_prompt", "tokens": 4, "method": "prefix"}]
    with pytest.raises(CompressError, match="a prefix has keys for the heads that"):
        plan(recipe)
    recipe["passes"][1]["method"] = "prompt"
    plan(recipe)
