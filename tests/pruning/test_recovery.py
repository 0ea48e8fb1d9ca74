"""Recovery: adapters merged or beside the model, whole models, instructions, resuming."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import compress
from compress.errors import CompressError
from compress.evals.evaluate import evaluate_text
from compress.evals.speed import Load, bench
from compress.evals.store import results_of
from compress.hf import cache_name
from compress.plan import plan
from compress.prompts.baked import bake
from compress.prompts.stored import embedding
from compress.pruning.instructions import answer_loss, read_instructions
from compress.pruning.lora import masked_model, merge_masked
from compress.pruning.settings import LoraRecoveryConfig
from compress.settings import Calibration
from compress.structure import Linear
from compress.training import Batch, next_token_loss

TOKENS = torch.tensor([[5, 17, 40, 3, 99, 250, 12, 8]])
PRUNE = {"kind": "mini_llm", "ratio": 0.3}
FAST = {"kind": "lora_recovery", "steps": 12, "batch": 4, "learning_rate": 0.01, "warmup": 2, "validate_every": 6}


@pytest.fixture
def longer(recipe):
    recipe["calibration"] |= {"samples": 16}
    return recipe


def unit(folder, index=-1):
    [record] = json.loads((folder / "compression.json").read_text())["passes"][index]["units"].values()
    return record


def held_out(record, row):
    return record["history"][row]["held_out"]["loss"]


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_training_lowers_the_held_out_loss(longer, tmp_path, full):
    longer["passes"] = [{**PRUNE, "mode": "global"}, {**FAST, "full": full}]
    folder = compress.run(longer, tmp_path / "model")
    record = unit(folder)
    assert held_out(record, -1) < held_out(record, 0)
    assert record["best"]["step"] == 12
    assert not (folder / "adapter").exists()
    assert torch.isfinite(logits(compress.load(folder))).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_beside_the_model_does_what_the_merged_one_does(longer, make_model, tmp_path, kind):
    longer["model"] = str(make_model(kind))
    prune = {**PRUNE, "ratio": 0.1}
    work = tmp_path / "work"
    merged = compress.run({**longer, "passes": [prune, FAST]}, tmp_path / "merged", workspace=work)
    beside = compress.run({**longer, "passes": [prune, {**FAST, "merge": False}]}, tmp_path / "beside", workspace=work)
    plain = compress.run({**longer, "passes": [prune]}, tmp_path / "plain", workspace=work)
    model = compress.load(beside)
    assert torch.allclose(logits(model), logits(compress.load(merged)), atol=1e-3)
    bare = logits(compress.load(plain))
    assert torch.equal(logits(compress.load(beside, adapter=False)), bare)
    with model.disable_adapter():
        assert torch.allclose(logits(model), bare, atol=1e-5)
    assert "adapter/adapter_config.json" in json.loads((beside / "compression.json").read_text())["files"]
    text = tmp_path / "other.txt"
    text.write_text("the dog jumps over the fox. " * 30)

    def loss(folder, **adapter):
        [score] = evaluate_text(str(folder), str(text), **adapter)["bits"].values()
        return score["loss"]

    assert loss(beside) == pytest.approx(loss(merged), abs=1e-3)
    assert loss(beside, adapter=False) == pytest.approx(loss(plain), abs=1e-6)
    assert abs(loss(beside, adapter=False) - loss(beside)) > 0.01


@pytest.mark.slow
def test_adapters_train_on_bit_planes_and_serve_every_width(longer, tmp_path):
    quantise = {"kind": "any_precision", "seed_bits": 2, "parent_bits": 4}
    longer["passes"] = [PRUNE, quantise, {**FAST, "merge": False, "dropout": 0.1}]
    folder = compress.run(longer, tmp_path / "model")
    record = unit(folder)
    assert held_out(record, -1) < held_out(record, 0)
    model, bare = compress.load(folder), compress.load(folder, adapter=False)
    name = "model.layers.0.mlp.down_proj"
    for bits in (4, 2, {"re:.*q_proj": 3, name: 4}):
        compress.set_bits(model, bits)
        compress.set_bits(bare, bits)
        assert compress.get_bits(model) == compress.get_bits(bare)
        assert not torch.allclose(logits(model), logits(bare), atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(bare))
    assert logits(compress.load(folder, bits="2.5")).isfinite().all()
    model.generate(input_ids=TOKENS, max_new_tokens=3, pad_token_id=0)


@pytest.fixture
def beside(make_packed, tmp_path):
    """A checkpoint of 3 and 4 bits with an adapter beside it."""
    passes = [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}, {**FAST, "merge": False}]
    return shutil.copytree(make_packed(passes, samples=16), tmp_path / "model")


@pytest.mark.slow
def test_commands_use_the_adapter_unless_told_not_to(beside, command, tmp_path, caplog, verify):
    text = tmp_path / "other.txt"
    text.write_text("the dog jumps over the fox. " * 30)

    def measured(*options):
        code, printed, _ = command("eval", beside, "--text", text, "--bits", "3", "--json", "-", *options)
        assert code == 0
        return json.loads(printed)

    own, without = measured(), measured("--no-adapter")
    assert own["bits"]["3"]["loss"] < without["bits"]["3"]["loss"]
    assert "adapter" in own and "adapter" not in without
    assert measured() == measured("--adapter") == own
    assert "loaded with its adapter/; adapter=False (--no-adapter) leaves it off" in caplog.text
    rows = results_of(beside).rows("text")
    assert [row["prompt"] for row in rows] == [None, "without adapter"]
    progress = command("report", beside, "--no-run", "-o", tmp_path / "page")
    assert progress[0] == 0
    assert "3 bits, without adapter" in (tmp_path / "page" / "report.md").read_text()
    assert command("generate", beside, "the quick", "--no-adapter", "--max-new-tokens", "2")[0] == 0
    assert "adapter of rank 8, " in command("inspect", beside)[1]
    assert any("its adapter can be read" in line for line in verify(beside))


@pytest.mark.slow
def test_bench_times_the_model_with_and_without_its_adapter(beside, quick_loads):
    assert cache_name(compress.load(beside)) == cache_name(compress.load(beside, adapter=False))
    load = Load(prompt=4, tokens=1, rounds=1, loads=1)
    store = results_of(beside)
    for adapter in (None, False):
        found = bench(str(beside), [3], load=load, store=store, adapter=adapter)
        assert set(found["widths"]) == {"dense", "3"}
    assert [row["prompt"] for row in store.rows("bench")] == [None, "without adapter"]


@pytest.mark.slow
def test_a_prompt_stands_before_the_adapted_model(beside, prompted, tmp_path):
    model, adapted = compress.load(beside, prompt=prompted), compress.load(beside, bits=3)
    assert model.active_adapter == "4bit"
    compress.set_bits(model, 3)
    assert model.active_adapter == "3bit"
    states = torch.cat([embedding(model)[None], model.get_input_embeddings()(TOKENS)], 1)
    expected = adapted(inputs_embeds=states).logits
    torch.testing.assert_close(logits(model), expected)
    bake(beside, tmp_path / "baked", bits=3, prompt=prompted)
    assert compress.load(tmp_path / "baked", adapter=True).peft_config["default"].r == 8


@pytest.mark.parametrize(
    ("damage", "adapter", "message"),
    [
        (lambda folder: None, "nothing", "has no adapter/adapter_config.json, so there is no adapter to load"),
        (shutil.rmtree, True, "has no adapter/adapter_config.json, so there is no adapter to load"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), None, "is not an adapter that can be read"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'), None, "is a IA3 adapter"),
    ],
)
def test_what_is_no_adapter_is_refused(beside, damage, adapter, message):
    damage(beside / "adapter")
    with pytest.raises(CompressError, match=message):
        compress.load(beside, adapter=adapter)


def test_an_adapter_of_another_model_is_used_only_when_named(beside, tiny_llama, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(tiny_llama, folder)
    shutil.copytree(beside / "adapter", folder / "adapter")
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('".."', '"somebody/else"'))
    bare = logits(compress.load(tiny_llama))
    assert torch.equal(logits(compress.load(folder)), bare)
    assert not torch.allclose(logits(compress.load(tiny_llama, adapter=folder)), bare, atol=1e-2)
    assert not torch.allclose(logits(compress.load(tiny_llama, adapter=beside)), bare, atol=1e-2)


@pytest.mark.slow
def test_a_stopped_training_continues_to_the_same_bytes(longer, tmp_path, monkeypatch):
    longer["passes"] = [PRUNE, FAST]
    whole = compress.run(longer, tmp_path / "whole")

    def stop(what, done, total):
        if "held-out" in what and done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress.run(longer, tmp_path / "again", progress=stop)
    again = compress.run(longer, tmp_path / "again")
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_only_answers_are_learned(tiny_llama, longer, tmp_path):
    rows = [
        {"instruction": "say fox", "input": "", "output": "the fox"},
        {"instruction": "x", "input": "y", "output": "z"},
    ]
    path = tmp_path / "alpaca.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    text = Calibration(text=str(path), column="output", samples=16, length=60)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(CompressError, match="answers begin within 60 tokens"):
        read_instructions(text, tokenizer)
    found = read_instructions(text.model_copy(update={"length": 400}), tokenizer)
    sample = found[0]
    assert tokenizer.decode(sample.tokens[sample.prompt :], skip_special_tokens=True) == "the fox"
    assert "### Instruction:\nsay fox" in tokenizer.decode(sample.tokens[: sample.prompt])
    assert "### Input:\ny" in tokenizer.decode(found[1].tokens)
    model = compress.load(tiny_llama)
    batch = Batch(sample.tokens[None], torch.ones(1, len(sample.tokens) - 1, dtype=torch.bool), [0])
    losses = -model(sample.tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, sample.tokens[1:, None])[:, 0]
    expected = losses[sample.prompt - 1 :].mean() * len(losses)
    assert torch.allclose(answer_loss(found)(model, batch), expected, rtol=1e-4)


def test_the_preset_is_llm_pruners():
    config = LoraRecoveryConfig(preset="llm_pruner", rank=4)
    assert (config.rank, config.alpha, config.dropout, config.epochs, config.batch) == (4, 16.0, 0.05, 2, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "adapters cannot be added to packed weights"),
        ({"full": True}, "full trains weights, but a pass before has quantised them"),
        ({"full": True, "merge": False}, "nothing is left to keep beside them"),
        ({"instructions": True}, "instructions needs text"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(longer, tmp_path, settings, message):
    longer["passes"] = [{"kind": "rtn", "bits": 4}, {**FAST, **settings}]
    with pytest.raises(CompressError, match=message):
        compress.run(longer, tmp_path / "model")
    assert not list(tmp_path.glob("*.work/*/*.safetensors"))


def weights_of(folder):
    """The matrices inside the blocks, as they are stored."""
    tensors = load_file(folder / "model.safetensors")
    return {name: t for name, t in tensors.items() if t.ndim == 2 and (".layers." in name or ".h." in name)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "recovery"),
    [("llama", {}), ("llama", {"dropout": 0.1}), ("llama", {"merge": False}), ("gpt2", {}), ("gpt2", {"full": True})],
)
def test_what_pruning_has_set_to_zero_stays_zero(longer, make_model, tmp_path, kind, recovery):
    longer["model"], work = str(make_model(kind)), tmp_path / "work"
    prune = {"kind": "prune", **({"sparsity": 0.5} if kind == "llama" else {"pattern": "2:4"})}
    before = compress.run({**longer, "passes": [prune]}, tmp_path / "pruned", workspace=work)
    after = compress.run({**longer, "passes": [prune, FAST | recovery]}, tmp_path / "recovered", workspace=work)
    pruned, recovered = weights_of(before), weights_of(after)
    assert recovered.keys() == pruned.keys()
    for name, weight in pruned.items():
        assert torch.equal(weight == 0, recovered[name] == 0), name
    assert recovery.get("merge") is False or any(not torch.equal(pruned[name], recovered[name]) for name in pruned)
    record = unit(after)
    assert record["best"]["step"] > 0
    assert held_out(record, -1) < held_out(record, 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_masked_adapter_is_merged_as_it_was_trained(make_model, kind):
    model = compress.load(make_model(kind))
    names = ["model.layers.1.mlp.up_proj"] if kind == "llama" else ["transformer.h.1.attn.c_attn"]
    weight = Linear("", model.get_submodule(names[0])).weight
    weight[::2, ::3] = 0
    bare = logits(model)
    masked = masked_model(model, names, 4, 16.0, 0.0, seed=0)
    assert torch.equal(logits(masked), bare)
    module = masked.get_submodule(names[0])
    torch.nn.init.normal_(module.up)
    trained = logits(masked)
    assert not torch.allclose(trained, bare, atol=1e-2)
    merged = merge_masked(masked)
    assert merged.get_submodule(names[0]) is module.base
    assert torch.allclose(logits(merged), trained, atol=1e-4)
    assert not weight[::2, ::3].any()
    assert weight[1::2].all()


@pytest.mark.slow
def test_a_second_run_keeps_the_zeros_of_the_first(longer, tmp_path):
    first = compress.run({**longer, "passes": [{"kind": "prune", "pattern": "2:4"}]}, tmp_path / "first")
    second = compress.run({**longer, "model": str(first), "passes": [FAST]}, tmp_path / "second")
    for name, weight in weights_of(first).items():
        assert torch.equal(weight == 0, weights_of(second)[name] == 0)
    longer |= {"model": str(first), "passes": [{**PRUNE, "mode": "global"}]}
    with pytest.raises(CompressError, match="out of the n:m pattern of zeros that the run that wrote"):
        plan(longer)
    longer["passes"] = [{"kind": "mini_llm", "ratio": 0.3, "remove": "blocks"}]
    plan(longer)


@pytest.mark.slow
@pytest.mark.parametrize("step", [{"kind": "any_precision"}, {"kind": "kmeans"}, {"kind": "rtn"}], ids=str)
def test_a_quantiser_that_would_lose_zeros_is_refused_after_a_pattern_and_told_of_after_others(longer, step, caplog):
    keeping = [] if step["kind"] == "rtn" else [{**step, "keep_zeros": True}]
    pattern, half = {"kind": "prune", "pattern": "2:4"}, {"kind": "prune", "sparsity": 0.5}
    with pytest.raises(CompressError, match=r"passes.1 .* would give zeros of the n:m pattern .* keep_zeros: true"):
        plan({**longer, "passes": [pattern, step]})
    plan({**longer, "passes": [pattern, *keeping]})
    plan({**longer, "passes": [half, *keeping]})
    assert not caplog.messages
    plan({**longer, "passes": [half, step]})
    told = f"passes.1 ({step['kind']}): weights that passes.0 (prune) has set to zero get other values; keep_zeros: true keeps them."
    assert caplog.messages == [told]


def kept_bytes(model, loss, samples):
    """Bytes that the gradient of a batch keeps, each storage counted once; parameters are there anyway."""
    kept, own = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, Batch(samples, torch.ones(len(samples), samples.shape[1] - 1, dtype=torch.bool), range(4)))
    return sum(storage.nbytes() for storage in kept.values())


def test_the_plan_counts_what_a_gradient_keeps(longer, tiny_llama):
    """More samples at a time keep more, whatever else there is: weights with their updates, masks, the optimiser."""
    longer["calibration"] |= {"length": 48}
    model = compress.load(tiny_llama)
    linears = [name for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)]
    masked = masked_model(model, [f"model.layers.{name}" for name in linears], 2, 4.0, 0.0, seed=0)
    planned, kept = [], []
    for batch in (1, 4):
        longer["passes"] = [{"kind": "prune", "sparsity": 0.5}, {**FAST, "micro_batch": batch}]
        planned.append(plan(longer)["passes"][1]["memory_bytes"])
        kept.append(kept_bytes(masked, next_token_loss, torch.randint(300, (batch, 48))))
    assert kept[1] - kept[0] <= planned[1] - planned[0] <= 1.3 * (kept[1] - kept[0])
