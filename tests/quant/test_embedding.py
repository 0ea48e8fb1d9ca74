"""Embedding and head: packed once, tied stays tied, at bits of their own."""

import copy
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.config import StoredConfig, read_settings
from compress.errors import CompressError
from compress.hf import packed_modules
from compress.inspect import inspect
from compress.kernels import cpu
from compress.kernels.bitplane import dense_weight
from compress.kernels.packing import pack_planes
from compress.plan import plan
from compress.quant.embedding import BitPlaneEmbedding, BitPlaneHead
from compress.quant.format import pack_smaller
from compress.quant.records import EmbeddingShape, PackedShape, bits_range, model_bytes, packed_bytes, shape_of
from compress.quant.settings import KMeansConfig
from compress.quant.vocabulary import fit_vocabulary

DOCUMENT = (Path(compress.__file__).parent / "quant" / "FORMAT.md").read_text(encoding="utf-8")
EMBEDDING = json.loads(re.findall(r"^```json\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)[2])[-1]
TOKENS = torch.arange(3, 15)[None]
TABLE = {"3": 5, "4": 6, "5": 7, "6": 8}


def matrix(rows=300, columns=40):
    """Rows and columns of different sizes, as an embedding has them, and a Hessian with a few large directions."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * (1 + torch.arange(columns) / 10)
    weight *= torch.rand(rows, 1, generator=generator) + 0.2
    hidden = torch.randn(200, columns, generator=generator) + 3 * torch.randn(columns, generator=generator)
    return weight, hidden.t() @ hidden / len(hidden)


def module(bits=(4, 5, 6, 7, 8), grouped=False, columns=40, **options):
    weight, hessian = matrix(columns=columns)
    found = fit_vocabulary(weight, hessian, True, bits, grouped=grouped)
    shape, tensors, _ = pack_smaller(replace(found, read_at={str(own): own for own in bits}))
    embedding = BitPlaneEmbedding(shape, **options)
    embedding.load_state_dict(tensors)
    return embedding, found


# Codes


def test_errors_fall_with_bits_and_cost_less_than_those_of_the_nearest_codes():
    weight, hessian = matrix()
    plain, shaped = (fit_vocabulary(weight, given, True, range(4, 9)) for given in (None, hessian))
    last = float("inf")
    for bits in range(4, 9):
        lost, nearest = (
            float((((error := found.rows(bits, slice(None)) - weight) @ hessian) * error).sum())
            for found in (shaped, plain)
        )
        assert lost < 0.9 * nearest
        assert lost < 0.6 * last
        last = lost


def test_sizes_for_groups_of_columns_cost_less_at_every_number_of_bits():
    weight, hessian = matrix(columns=192)
    plain, grouped = (fit_vocabulary(weight, hessian, True, range(4, 9), grouped=each) for each in (False, True))
    for bits in range(4, 9):
        lost, control = (
            float((((error := found.rows(bits, slice(None)) - weight) @ hessian) * error).sum())
            for found in (grouped, plain)
        )
        assert lost < 0.9 * control


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("weight", [torch.zeros(5, 8), torch.ones(1, 1), torch.eye(7)[:, :3]])
def test_matrices_without_much_to_tell(weight, grouped):
    found = fit_vocabulary(weight, None, True, [2, 4], grouped=grouped)
    torch.testing.assert_close(found.rows(4, slice(None)), weight, atol=0.2, rtol=0)


# The module


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bits", [4, 5, 8])
def test_looked_up_rows_and_the_product_are_those_of_the_dense_matrix(bits, grouped):
    columns = 140 if grouped else 40
    embedding, found = module(grouped=grouped, columns=columns)
    embedding.bits = bits
    dense, tokens = embedding.dense(), torch.tensor([[0, 299, 7], [7, 7, 1]])
    torch.testing.assert_close(dense, found.rows(bits, slice(None)), rtol=1e-6, atol=1e-6)
    assert torch.equal(embedding(tokens), dense[tokens])
    assert embedding.codebook().shape == (1, 2**bits), "one table serves all rows"
    if not grouped:
        written_out = found.shared.decoded(bits).gather(1, (found.codes >> (8 - bits)).long()) * found.shared.columns
        assert torch.equal(written_out, dense), "a codebook per row, which the GPU's layout has, rounds nothing"
    for count in (1, 3, 40):  # below and above what the C kernels multiply at once
        x = torch.randn(2, count, columns, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(embedding.product(x, bits), x @ dense.t(), rtol=1e-4, atol=1e-4)
        embedding.keep_dense = True
        torch.testing.assert_close(embedding.product(x, bits), x @ dense.t(), rtol=1e-4, atol=1e-4)
        embedding.keep_dense = None


def test_a_tied_head_has_no_tensors_and_follows_its_embedding():
    embedding, _ = module()
    model = torch.nn.ModuleDict({"embedding": embedding, "head": BitPlaneHead(embedding)})
    assert not [name for name in model.state_dict() if name.startswith("head")]
    x = torch.randn(3, 40, requires_grad=True)
    model["head"](x).sum().backward()
    torch.testing.assert_close(x.grad, embedding.dense().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin["embedding"].bits = 4
        assert twin["head"].embedding is twin["embedding"]
        assert not torch.equal(twin["head"](x), model["head"](x))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(half["embedding"].dense(), embedding.dense()), "its tables are not cast"


@pytest.mark.skipif(not cpu.built(), reason="no C library")
@pytest.mark.parametrize("shared", [False, True])
def test_the_c_library_gathers_rows(shared):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 32, (50, 70), dtype=torch.uint8, generator=generator)
    table = torch.randn(1 if shared else 50, 32, generator=generator)
    places = torch.tensor([49, 0, 0, 17])
    expected = table.expand(50, -1).gather(1, codes.long())
    planes = list(pack_planes(codes, 5))
    for isa in range(cpu.library().isa + 1):
        assert torch.equal(cpu.look_up(planes, table, 70, isa=isa, places=places), expected[places])
    assert torch.equal(dense_weight(planes, table, 70, torch.float32), expected)
    assert cpu.look_up(planes, table, 70, places=places[:0]).shape == (0, 70)
    for wrong in (-1, 50):
        with pytest.raises(ValueError, match="not all among 50 rows"):
            cpu.look_up(planes, table, 70, places=torch.tensor([wrong]))


# The document


def decoded(vector, bits):
    """The weight at a number of bits, by the chapter on version 4 alone, for one coefficient per row."""
    tensors, rows, last = vector["tensors"], vector["record"]["out_features"], max(vector["record"]["seed_bits"], 5)
    weight = []
    for n in range(rows):
        weight.append([])
        for k in range(vector["record"]["in_features"]):
            code = vector["codes"][n][k] >> (vector["record"]["parent_bits"] - bits)
            if bits <= last:
                entry = tensors[f"basis_{bits}"][0][code]
            else:
                cell, low = divmod(code, 2 ** (bits - last))
                entry = tensors[f"basis_{last}"][0][cell]
                entry += tensors[f"width_{last + 1}"][0][cell] * tensors[f"place_{bits}"][low]
            weight[n].append(entry * tensors["rows"][n][0] * tensors["columns"][k])
    return weight


def words(value):
    """Hexadecimal words as the int32 values that are stored; other numbers as they are."""
    if isinstance(value, list):
        return [words(item) for item in value]
    return int(value, 16) - (int(value, 16) >> 31 << 32) if isinstance(value, str) else value


def test_the_vector_of_an_embedding():
    vector = EMBEDDING
    shape = shape_of(vector["record"])
    tensors = {
        name: torch.tensor(words(vector["tensors"][name]), dtype=getattr(torch, kind)).view(size)
        for name, (size, kind) in shape.specification().items()
    }
    assert tensors.keys() == vector["tensors"].keys()
    packed = BitPlaneEmbedding(shape)
    packed.load_state_dict(tensors)
    for bits in shape.all_bits:
        packed.bits = bits
        assert packed.dense().tolist() == decoded(vector, bits) == vector["decoded"][str(bits)]
    planes = pack_planes(torch.tensor(vector["codes"], dtype=torch.uint8), shape.parent_bits)
    assert torch.equal(torch.stack(packed.planes()), planes)


# Bits of its own


def test_the_models_bits_decide_its_own():
    shape = EmbeddingShape(10, 8, 5, 8, rank=1, read_at=TABLE)
    assert [shape.at(bits) for bits in range(2, 8)] == [5, 5, 6, 7, 8, 8]
    assert [shape.step(bits) for bits in range(5, 9)] == [3, 4, 5, 6]
    linear = PackedShape(10, 8, 3, 6)
    assert bits_range([linear, shape]) == range(3, 7)
    assert bits_range([shape]) == range(3, 7)
    assert model_bytes([shape], 3) < model_bytes([shape], 4)


@pytest.mark.parametrize(
    "read_at", [{}, {"3": 5, "5": 6}, {"3": 6, "4": 5}, {"three": 5}, {"3": 9}, {"3": "5"}, {"3": True}, [5], 5]
)
def test_tables_that_make_no_sense_are_refused(read_at):
    record = vars(EmbeddingShape(10, 8, 5, 8, rank=1, read_at=TABLE)) | {"read_at": read_at}
    with pytest.raises(CompressError, match="out of range"):
        StoredConfig(4, modules={"embedding": record}).shapes()


def test_embedding_bits_of_a_recipe():
    def table(given, bits=range(2, 9)):
        return list(KMeansConfig(embedding_bits=given).embedding_table(bits).values())

    assert table(6) == [6] * 7
    assert table({3: 4, 5: 8}) == [4, 4, 4, 8, 8, 8, 8]
    assert table(0) == []
    assert table("auto") == [4, 5, 6, 7, 8, 8, 8]
    for wrong in (9, 1, {3: 6, 4: 5}, {}, {4: 0}):
        with pytest.raises(ValueError, match="embedding_bits"):
            KMeansConfig(embedding_bits=wrong)


# A whole model


@pytest.fixture(scope="module")
def packed(make_model, text_file, tmp_path_factory):
    """A checkpoint with what comes by default."""
    recipe = {
        "model": str(make_model("llama", tie_word_embeddings=True)),
        "calibration": {"text": str(text_file), "samples": 4, "length": 32},
        "passes": [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 6, "embedding_bits": "auto"}],
    }
    return recipe, compress.run(recipe, tmp_path_factory.mktemp("packed") / "model")


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.slow
def test_tied_stays_tied(packed, verify):
    recipe, folder = packed
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert config["quantization_config"]["format_version"] == 4
    model = compress.load(folder)
    assert isinstance(model.get_output_embeddings(), BitPlaneHead)
    assert "lm_head" not in packed_modules(model)
    model.tie_weights()
    for bits in range(3, 7):
        compress.set_bits(model, bits)
        assert compress.get_bits(model) == bits
        assert packed_modules(model)["model.embed_tokens"].bits == TABLE[str(bits)]
        assert torch.equal(logits(model), logits(compress.load(folder, bits=bits)))
    dense = logits(AutoModelForCausalLM.from_pretrained(recipe["model"], dtype=torch.float32))
    compress.set_bits(model, 6)
    assert (logits(model) - dense).abs().max() < 0.25 * dense.abs().max()
    assert verify(folder)


def test_sizes_are_foreseen_and_told(packed):
    recipe, folder = packed
    sizes = json.loads((folder / "compression.json").read_text())["sizes"]
    assert plan(recipe)["bytes_at_bits"] == sizes["tensors_at_bits"] == inspect(folder)["bytes_at_bits"]
    assert "model.embed_tokens" not in inspect(folder)["not_quantised"]
    shape = read_settings(folder).shapes()["model.embed_tokens"]
    index = json.loads((folder / "model.safetensors.index.3bit.json").read_text())["weight_map"]
    held = [name for name in index if name.startswith("model.embed_tokens.")]
    assert len(held) == 4 and shape.at(3) == shape.seed_bits, "planes of 5 bits, columns, rows and a basis"
    assert {index[name] for name in held} == {index["model.norm.weight"]}


def test_saved_again_at_fewer_bits(packed, tmp_path):
    model = compress.load(packed[1], bits=4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert compress.get_bits(again) == 4
    compress.set_bits(again, 3)
    assert torch.equal(logits(again), logits(compress.load(packed[1], bits=3)))
    with pytest.raises(CompressError, match="not available"):
        compress.set_bits(again, 5)


def test_calls_that_would_change_its_rows_or_its_form(packed):
    model = compress.load(packed[1])
    before = logits(model)
    with pytest.raises(CompressError, match="embedding_bits 0"):
        model.resize_token_embeddings(model.config.vocab_size + 3)
    plain = model.dequantize()
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-4)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    plain.resize_token_embeddings(model.config.vocab_size + 3)


def test_a_budget_chooses_its_bits_too(packed):
    model = compress.load(packed[1], bits="3.5")
    assert packed_modules(model)["model.embed_tokens"].bits in range(5, 9)
    sizes = json.loads((packed[1] / "compression.json").read_text())["sizes"]["tensors_at_bits"]
    shapes = read_settings(packed[1]).shapes()
    chosen = compress.get_bits(compress.load(packed[1], memory=sizes["4"]))
    mixed = chosen if isinstance(chosen, dict) else {name: shape.at(chosen) for name, shape in shapes.items()}
    rest = sizes["4"] - model_bytes(shapes.values(), 4)
    assert rest + sum(packed_bytes(shapes[name], bits) for name, bits in mixed.items()) <= sizes["4"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3_text", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_models_with_and_without_a_tie(make_model, text_file, tmp_path, kind, tied):
    recipe = {
        "model": str(make_model(kind, tie_word_embeddings=tied)),
        "passes": [{"kind": "rtn", "bits": 8, "embedding_bits": "auto"}],
    }
    folder = compress.run(recipe, tmp_path / "model")
    model = compress.load(folder, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(recipe["model"], dtype=torch.float32)
    assert model.config.tie_word_embeddings is tied
    assert isinstance(model.get_output_embeddings(), BitPlaneHead) is tied
    assert (logits(model) - logits(dense)).abs().max() < 0.05 * logits(dense).abs().max()
