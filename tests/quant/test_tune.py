"""Tables trained by distillation: what changes, what does not, and by how much it helps."""

import filecmp
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.passes import Whole
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import GroupedShape, PackedShape, SharedShape
from compress.quant.settings import TuneTablesConfig
from compress.quant.shared import spread
from compress.quant.student import Student, _decoded_in_torch, _gathered_in_torch, decoded, gathered
from compress.quant.tune import _Lesson, _trained
from compress.ranks import Ranks


@pytest.fixture
def tuned_recipe(recipe):
    recipe["passes"][0] |= {"parent_bits": 4, "objective": "weight"}  # which leaves more to gain
    recipe["passes"].append({"kind": "tune_tables", "steps": 30, "batch": 4})
    return recipe


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


@torch.no_grad()
def divergence(model, dense, sample):
    """The mean over predicted tokens of KL(dense || model), in nats, on a sample int64 [T]."""
    wanted, found = (each(sample[None]).logits[0, :-1].double().log_softmax(-1) for each in (dense, model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.slow
def test_only_tables_change_and_the_model_comes_nearer(tuned_recipe, tmp_path):
    tuned = compress.run(tuned_recipe, tmp_path / "tuned")
    plain = compress.run({**tuned_recipe, "passes": tuned_recipe["passes"][:1]}, tmp_path / "plain")
    before, after = tensors(plain), tensors(tuned)
    assert before.keys() == after.keys()
    assert all(tensor.dtype == after[name].dtype for name, tensor in before.items())
    units = json.loads((tuned / "compression.json").read_text())["passes"][1]["units"]
    assert units["width-3"]["kept"]
    for name, tensor in before.items():
        trained = ".codebook_" in name and units[f"width-{name[-1]}"]["kept"]
        assert torch.equal(tensor, after[name]) != trained, name
    dense = AutoModelForCausalLM.from_pretrained(tuned_recipe["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tuned_recipe["model"])
    sample = torch.tensor(tokenizer("the lazy dog sleeps on the quick fox")["input_ids"])
    apart = [divergence(compress.load(f, bits=3, dtype=torch.float32), dense, sample) for f in (plain, tuned)]
    assert apart[1] < apart[0]


@pytest.mark.slow
def test_killed_between_widths_it_goes_on_with_the_same_bytes(tuned_recipe, tmp_path):
    """Each width is a unit of its own: what one was stopped before another is not done again, and nothing differs."""
    whole = compress.run(tuned_recipe, tmp_path / "whole")

    def stop(what, done, total):
        if "width-4" in what and done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress.run(tuned_recipe, tmp_path / "again", progress=stop)
    seen = []
    again = compress.run(tuned_recipe, tmp_path / "again", progress=lambda what, done, total: seen.append(what))
    assert not any("width-3" in what or "block" in what for what in seen)
    names = [path.name for path in whole.iterdir()]
    assert filecmp.cmpfiles(whole, again, names, shallow=False)[0] == names


@pytest.mark.slow
def test_pruned_weights_stay_zero(tuned_recipe, make_model, tmp_path):
    pruned = [{"kind": "prune", "score": "magnitude", "sparsity": 0.5, "allocation": "uniform"}]
    tuned_recipe["passes"][0] |= {"keep_zeros": True}
    tuned_recipe["passes"] = pruned + tuned_recipe["passes"]
    model = compress.load(compress.run(tuned_recipe, tmp_path / "out"), bits=3, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(
        compress.run({**tuned_recipe, "passes": pruned}, tmp_path / "pruned"), dtype=torch.float32
    )
    for name, module in compress.hf.packed_modules(model).items():
        gone = dense.get_submodule(name).weight == 0
        assert int(gone.sum()) == pytest.approx(gone.numel() / 2, abs=gone.shape[0])  # half of every row
        assert (module.dense()[gone] == 0).all()


@pytest.mark.parametrize(
    ("passes", "complaint"),
    [
        ([{"kind": "tune_tables"}], "works on packed matrices; put a quantising pass before it"),
        ([{"kind": "rtn", "bits": 4}, {"kind": "tune_tables", "widths": [3]}], "3 bits are not among the 4 to 4"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_any_work(recipe, tmp_path, passes, complaint):
    with pytest.raises(compress.CompressError, match=complaint):
        compress.run({**recipe, "passes": passes}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("parent", [2, 3])
def test_sizes_of_groups_are_trained_where_no_other_number_of_bits_reads_them(tuned_recipe, tmp_path, parent):
    """On the text itself, which a random model knows nothing of, so that there is much to learn."""
    shared = {"kind": "any_precision", "seed_bits": 2, "parent_bits": parent, "codebooks": "shared"}
    tune = {"kind": "tune_tables", "target": "text", "steps": 20, "batch": 4, "learning_rate": 0.01}
    plain = compress.run({**tuned_recipe, "passes": [shared]}, tmp_path / "plain")
    tuned = compress.run({**tuned_recipe, "passes": [shared, tune]}, tmp_path / "tuned")
    units = json.loads((tuned / "compression.json").read_text())["passes"][1]["units"]
    assert {unit: found["kept"] for unit, found in units.items()} == {f"width-{b}": True for b in range(2, parent + 1)}
    before, after = tensors(plain), tensors(tuned)
    changed = {name.rpartition(".")[2] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed - {"rows"} == {"basis_2", "groups" if parent == 2 else "basis_3"}


def test_a_students_gradients_are_those_of_the_plain_product():
    """Of activations and codebooks, by autograd through the weight itself."""
    torch.manual_seed(0)
    layer = random_layer(PackedShape(12, 40, 2, 6, "float32"))
    for bits in (2, 5):
        layer.bits = bits
        student = Student(layer, [f"codebook_{bits}"])
        codes = (student.codes >> (6 - bits)).long()
        for own, plain in gradients(student, student.tensors()[f"codebook_{bits}"].gather(1, codes)):
            torch.testing.assert_close(own, plain)


def test_a_students_gradients_are_those_of_the_plain_product_where_groups_have_sizes():
    torch.manual_seed(0)
    layer = random_layer(GroupedShape(12, 100, 2, 6, "float32", rank=1, group=64))
    for bits in (2, 6):
        layer.bits = bits
        student = Student(layer, ["groups", f"basis_{bits}"])
        found, codes = student.tensors(), (student.codes >> (6 - bits)).long()
        sizes = spread(found["rows"] * found["groups"] / 255, 100)
        for own, plain in gradients(student, found[f"basis_{bits}"][0][codes] * sizes * found["columns"]):
            torch.testing.assert_close(own, plain)


def test_other_devices_loops_do_what_the_compiled_ones_do():
    torch.manual_seed(0)
    table, sizes, columns = torch.randn(8), torch.rand(12, 2), torch.rand(100)
    parts = table, sizes, columns, torch.randint(64, (12, 100), dtype=torch.uint8), 3
    torch.testing.assert_close(decoded(*parts), _decoded_in_torch(*parts))
    by_weight = torch.randn(12, 100)
    torch.testing.assert_close(gathered(by_weight, *parts), _gathered_in_torch(by_weight, *parts))


def random_layer(shape):
    layer = BitPlaneLinear(shape, bias=False)
    for buffer in layer.buffers():
        kind = buffer.dtype
        buffer.copy_(torch.randn(buffer.shape) if kind.is_floating_point else torch.randint(1, 99, buffer.shape))
    return layer


def gradients(student, weight):
    """Those of a student beside those of a plain product by its ``weight``, which autograd follows; in bfloat16 they are float32 too."""
    torch.testing.assert_close(weight, student.packed.dense())
    x, signs = torch.randn(2, 3, weight.shape[1], requires_grad=True), torch.randn(2, 3, 12)
    wanted = [x, *student.offsets.values()]
    plain = torch.autograd.grad((x @ weight.t() * signs).sum(), wanted)
    own = torch.autograd.grad((student(x) * signs).sum(), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = torch.autograd.grad((student(x) * signs).sum(), wanted)
    assert [gradient.dtype for gradient in narrow] == [torch.float32] * len(narrow)
    return zip(own, plain, strict=True)


@pytest.mark.slow
def test_the_control_is_trained_on_the_text_itself(tuned_recipe, tmp_path):
    tuned_recipe["passes"][1] |= {"target": "text", "widths": [3], "steps": 4}
    tuned = compress.run(tuned_recipe, tmp_path / "tuned")
    units = json.loads((tuned / "compression.json").read_text())["passes"][1]["units"]
    assert "divergence" not in units["width-3"]
    assert units["width-3"]["loss"]["before"] > units["width-3"]["loss"]["after"]


@pytest.mark.slow
def test_a_text_of_its_own(tuned_recipe, tmp_path):
    """Codes need none here, so the recipe has no other."""
    text = tuned_recipe.pop("calibration") | {"samples": 16}
    tuned_recipe["passes"][0] |= {"sensitivity": "none"}
    tuned_recipe["passes"][1] |= {"widths": [3], "text": text}
    tuned = compress.run(tuned_recipe, tmp_path / "tuned")
    manifest = json.loads((tuned / "compression.json").read_text())
    assert manifest["passes"][1]["units"]["width-3"]["kept"]
    assert manifest["passes"][1]["text"]["samples"] == 16
    assert manifest["calibration"] is None


def test_what_is_trained_is_read_at_no_other_number_of_bits():
    assert _trained(PackedShape(12, 600, 2, 7), 4) == ["codebook_4"]
    assert _trained(GroupedShape(12, 600, 2, 7, rank=1, group=64), 4) == ["basis_4"]
    assert _trained(GroupedShape(12, 600, 4, 4, rank=1, group=64), 4) == ["basis_4", "groups"]
    assert _trained(SharedShape(12, 600, 2, 7, rank=6), 4) == []  # an older form, which no pass writes


def test_processes_parts_of_a_step_sum_up_to_the_whole(tiny_llama):
    """Of three pieces of unlike length, for two processes, and for four, of which one has none."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    samples = [torch.randint(300, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 4, 7)]
    whole = Whole(model, lambda: model, samples, Path("nowhere"))
    pieces, config = [0, 1, 2], TuneTablesConfig(target="text", length=16)
    wanted = _Lesson(whole, config, Ranks()).own_loss(4, pieces)
    assert torch.equal(wanted, _Lesson(whole, config, Ranks()).loss(4, pieces))
    for size in (2, 4):
        parts = [_Lesson(whole, config, Ranks(rank, size)).own_loss(4, pieces) for rank in range(size)]
        assert all(part.requires_grad for part in parts)
        assert sum(float(part > 0) for part in parts) == min(size, 3)
        torch.testing.assert_close(sum(parts), wanted)
