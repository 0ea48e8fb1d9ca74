"""FORMAT.md is true: its vectors, its decoding rule and its field lists, against the library and a real checkpoint."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import compress
from compress.hf import packed_modules
from compress.quant.format import Codes, expand, pack, pack_smaller
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import shape_of
from compress.quant.shared import read_shared

DOCUMENT = (Path(compress.__file__).parent / "quant" / "FORMAT.md").read_text(encoding="utf-8")
VECTORS, SPARSE_VECTORS, SHARED_VECTORS, GROUPED_VECTORS = map(
    json.loads, re.findall(r"^```json\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
)
SPARSE_FIELDS = {"survivors", "gap_bits", "mask_bits"}


def decode(tensors, record, bits):
    """The weight at a width as nested lists, from nested lists of numbers; written from FORMAT.md alone."""
    seed, rows, columns = record["seed_bits"], record["out_features"], record["in_features"]
    planes = list(tensors["weight"]) + [tensors[f"plane_{width}"] for width in range(seed + 1, bits + 1)]
    table = tensors[f"codebook_{bits}"]
    weight = []
    for n in range(rows):
        weight.append([])
        for k in range(columns):
            code = 0
            for plane in planes:
                code = 2 * code + (plane[n][k // 32] >> (k % 32) & 1)
            weight[n].append(table[n][code])
    return weight


def decode_shared(tensors, record, bits):
    """The weight at a width of a matrix whose rows share their codebooks, by the sections on versions 4 and 6 alone."""
    last, rank, grouped = max(record["seed_bits"], 5), record["rank"], "group" in record
    last = record["parent_bits"] if grouped else last
    kind = {"float16": np.float16, "float32": np.float32}[record["codebook_dtype"]]
    table = []
    for n in range(record["out_features"]):
        size = 1.0 if grouped else tensors["rows"][n][0]
        c = [size] + [size * tensors["shapes"][n][i] / 128 for i in range(rank - 1)]
        cells = [
            sum(c[i] * tensors[f"basis_{min(bits, last)}"][i][q] for i in range(rank))
            for q in range(2 ** min(bits, last))
        ]
        if bits > last:
            width = [sum(c[i] * tensors[f"width_{last + 1}"][i][h] for i in range(rank)) for h in range(2**last)]
            cells = [cells[h] + width[h] * place for h in range(2**last) for place in tensors[f"place_{bits}"]]
        table.append([float(np.float32(entry) if grouped else kind(np.float32(entry))) for entry in cells])
    found = decode(tensors | {f"codebook_{bits}": table}, record, bits)
    for n, weights in enumerate(found if grouped else []):
        for k, weight in enumerate(weights):
            share = np.float32(tensors["groups"][n][k // 64]) / np.float32(255)
            weights[k] = np.float32(weight) * share * np.float32(tensors["rows"][n][0])
    return [[float(np.float32(w * column)) for w, column in zip(row, tensors["columns"], strict=True)] for row in found]


def bits_of(words, count):
    """The first bits of a row of words."""
    return [words[i // 32] >> (i % 32) & 1 for i in range(count)]


def decode_sparse(tensors, record, bits):
    """The weight at a width of a matrix that is stored sparse, by the section on version 2 alone."""
    rows, columns, survivors, r = (record[key] for key in ("out_features", "in_features", "survivors", "gap_bits"))
    row = {"seed_bits": record["seed_bits"], "out_features": 1, "in_features": survivors}
    identity = {f"codebook_{bits}": [list(range(2**bits))]}  # decodes to the codes themselves
    [codes] = decode(tensors | identity, row, bits)
    low = [bits_of(plane, survivors) for plane in tensors.get("mask_low", [])]
    place, high, full = -1, 0, [0] * (rows * columns)
    for bit in bits_of(tensors["mask"], record["mask_bits"]):
        if not bit:
            high += 1
            continue
        number = survivors - len(codes)
        gap = (high << r) + sum(plane[number] << (r - 1 - i) for i, plane in enumerate(low))
        place += gap + 1
        full[place], high = codes.pop(0), 0
    assert not codes
    table = tensors[f"codebook_{bits}"]
    return [[table[n][code] for code in full[n * columns : (n + 1) * columns]] for n in range(rows)]


def numbers(value):
    """Hexadecimal words as the int32 values that are stored; other numbers as they are."""
    if isinstance(value, list):
        return [numbers(item) for item in value]
    if isinstance(value, str):
        word = int(value, 16)
        return word - (word >> 31 << 32)
    return value


def stored(vector):
    return {name: numbers(value) for name, value in vector["tensors"].items()}


def widths(record):
    return range(record["seed_bits"], record["parent_bits"] + 1)


def fields(heading):
    """First column of the table under a heading."""
    section = re.split(r"^#+ ", DOCUMENT.split(f"# {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def read_at(folder, bits):
    """Every tensor that the index of a width lists (None: the index of all), from the files it names."""
    suffix = f"{bits}bit.json" if bits else "json"
    places = json.loads((folder / f"model.safetensors.index.{suffix}").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(places.values())}
    return {name: files[file][name] for name, file in places.items()}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_pack_gives_the_tensors_of_the_vectors(vector):
    tables = {bits: torch.tensor(vector["tensors"][f"codebook_{bits}"]) for bits in widths(vector["record"])}
    shape, tensors = pack(torch.tensor(vector["codes"], dtype=torch.uint8), tables)
    assert vars(shape) == vector["record"]
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == stored(vector)
    expected = shape.specification()
    assert {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()
    } == expected


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_vectors_decode_by_the_document(vector):
    tensors = stored(vector)
    assert vector["decoded"].keys() == {str(bits) for bits in widths(vector["record"])}
    for bits in widths(vector["record"]):
        assert decode(tensors, vector["record"], bits) == vector["decoded"][str(bits)]


def test_the_vectors_cover_what_goes_wrong():
    """A second word in use, a negative word, unsorted tables, padding, both table types."""
    assert {vector["record"]["codebook_dtype"] for vector in VECTORS} == {"float16", "float32"}
    assert all(vector["record"]["in_features"] % 32 for vector in VECTORS)
    second = stored(VECTORS[1])
    assert any(row[1] for plane in second["weight"] for row in plane)
    assert any(row[0] < 0 for plane in second["weight"] for row in plane)
    assert any(row != sorted(row) for row in second["codebook_2"])


@pytest.mark.parametrize("vector", SPARSE_VECTORS, ids=lambda vector: vector["name"])
def test_the_sparse_vectors_are_what_is_written_read_and_decoded(vector):
    record, tensors = vector["record"], stored(vector)
    tables = {bits: torch.tensor(tensors[f"codebook_{bits}"]) for bits in widths(record)}
    shape, written, _ = pack_smaller(Codes(torch.tensor(vector["codes"], dtype=torch.uint8), tables))
    assert vars(shape) == record
    assert {name: tensor.tolist() for name, tensor in written.items()} == tensors
    assert {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in written.items()
    } == shape.specification()
    for bits in widths(record):
        assert decode_sparse(tensors, record, bits) == vector["decoded"][str(bits)]
        narrow = replace(shape, parent_bits=bits)
        module = BitPlaneLinear(narrow.dense, bias=False)
        module.hold(narrow.dense, expand("vector", narrow, {name: written[name] for name in narrow.specification()}))
        assert module.dense().tolist() == vector["decoded"][str(bits)]


@pytest.mark.parametrize("vector", SHARED_VECTORS + GROUPED_VECTORS, ids=lambda vector: vector["name"])
def test_the_shared_vectors_are_what_is_written_read_and_decoded(vector):
    record, tensors = vector["record"], stored(vector)
    shape = shape_of(record)
    kinds = {name: getattr(torch, kind) for name, (_, kind) in shape.specification().items()}
    given = {name: torch.tensor(value, dtype=kinds[name]) for name, value in tensors.items()}
    shared = read_shared(given)
    tables = {bits: shared.codebook(bits) for bits in widths(record)}
    read_at = record.get("read_at")
    codes = Codes(torch.tensor(vector["codes"], dtype=torch.uint8), tables, shared=shared, read_at=read_at)
    found, written, _ = pack_smaller(codes.as_stored())
    assert found == shape
    assert {name: tensor.tolist() for name, tensor in written.items()} == tensors
    for bits in widths(record):
        assert decode_shared(tensors, record, bits) == vector["decoded"][str(bits)]
        assert codes.dense(bits).tolist() == vector["decoded"][str(bits)]
        narrow = replace(shape, parent_bits=bits)
        module = BitPlaneLinear(narrow, bias=False)
        module.hold(narrow, {name: written[name] for name in narrow.specification()})
        wanted = torch.tensor(vector["decoded"][str(bits)])
        assert torch.equal(module.dense(), wanted)
        product, apart = module(torch.eye(record["in_features"])).t(), 2.0**-22 if "group" in record else 0
        assert ((product - wanted).abs() <= apart * wanted.abs()).all()


def test_the_sparse_vectors_cover_what_goes_wrong():
    """Both kinds of mask and of tables, a second word in the mask, a row without survivors, padding."""
    assert {vector["record"]["gap_bits"] > 0 for vector in SPARSE_VECTORS} == {True, False}
    assert {vector["record"]["codebook_dtype"] for vector in SPARSE_VECTORS} == {"float16", "float32"}
    assert any(len(vector["tensors"]["mask"]) > 1 for vector in SPARSE_VECTORS)
    assert any(not any(row) for vector in SPARSE_VECTORS for row in vector["codes"])
    assert all(vector["record"]["survivors"] % 32 and vector["record"]["mask_bits"] % 32 for vector in SPARSE_VECTORS)


@pytest.fixture(scope="module")
def sparse(make_model, tmp_path_factory):
    """A checkpoint of a model whose smallest weights were set to zero."""
    folder = shutil.copytree(make_model("llama"), tmp_path_factory.mktemp("pruned") / "model")
    tensors = load_file(folder / "model.safetensors")
    for array in tensors.values():
        array[abs(array) < np.quantile(abs(array), 0.75 if array.ndim == 2 else 0)] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"seed_bits": 3, "parent_bits": 5, "objective": "weight", "sensitivity": "none", "keep_zeros": True}
    recipe = {"model": str(folder), "passes": [{"kind": "any_precision", **settings}]}
    return compress.run(recipe, tmp_path_factory.mktemp("sparse") / "model")


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_the_decoder_reads_a_real_sparse_checkpoint(sparse, bits):
    """From the files of one width alone; and its bytes are as documented."""
    modules = packed_modules(compress.load(sparse, bits=bits))
    arrays, records = read_at(sparse, bits), config_of(sparse)["modules"]
    for name, record in records.items():
        tensors = {key.rpartition(".")[2]: value for key, value in arrays.items() if key.startswith(f"{name}.")}
        survivors, unary = -(-record["survivors"] // 32), -(-record["mask_bits"] // 32)
        entry = {"float16": 2, "float32": 4}[record["codebook_dtype"]]
        tables = entry * record["out_features"] * (2 ** (bits + 1) - 2 ** record["seed_bits"])
        found = sum(array.nbytes for array in tensors.values())
        assert found == 4 * unary + 4 * (record["gap_bits"] + bits) * survivors + tables
        weight = decode_sparse({key: value.tolist() for key, value in tensors.items()}, record, bits)
        assert torch.equal(torch.tensor(weight), modules[name].dense())


def test_sparse_field_lists_are_the_real_ones(sparse):
    config = config_of(sparse)
    assert set(fields("Sparse record")) == SPARSE_FIELDS
    for record in config["modules"].values():
        assert record.keys() == {*fields("Module record"), *SPARSE_FIELDS}
    manifest = json.loads((sparse / "compression.json").read_text())
    assert set(fields("compression.json")) == manifest.keys()
    assert config["format_version"] == manifest["format_version"] == 2


@pytest.fixture(scope="module")
def in_common(tiny_llama, text_file, tmp_path_factory):
    """A checkpoint whose rows share their codebooks."""
    recipe = {
        "model": str(tiny_llama),
        "calibration": {"text": str(text_file), "samples": 4, "length": 32},
        "passes": [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 6, "codebooks": "shared"}],
    }
    return compress.run(recipe, tmp_path_factory.mktemp("in_common") / "model")


@pytest.fixture(scope="module")
def by_row(tiny_llama, text_file, tmp_path_factory):
    """A checkpoint whose rows have codebooks of their own."""
    settings = {"seed_bits": 3, "parent_bits": 6, "codebooks": "row"}
    recipe = {
        "model": str(tiny_llama),
        "calibration": {"text": str(text_file), "samples": 4, "length": 32},
        "passes": [{"kind": "any_precision", **settings}],
    }
    return compress.run(recipe, tmp_path_factory.mktemp("by_row") / "model")


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_the_decoder_reads_a_real_shared_checkpoint(in_common, bits):
    """From the files of one width alone; and its bytes are as documented."""
    modules, arrays = packed_modules(compress.load(in_common, bits=bits)), read_at(in_common, bits)
    for name, record in config_of(in_common)["modules"].items():
        tensors = {key.rpartition(".")[2]: value for key, value in arrays.items() if key.startswith(f"{name}.")}
        n, k, s, r = (record[key] for key in ("out_features", "in_features", "seed_bits", "rank"))
        t, c = {"float16": 2, "float32": 4}[record["codebook_dtype"]], record["parent_bits"]
        more = n * -(-k // 64)
        size = n * (4 * -(-k // 32) * bits + t + r - 1) + t * (k + r * (2 ** (min(bits, c) + 1) - 2**s)) + more
        assert sum(array.nbytes for array in tensors.values()) == size
        weight = decode_shared({key: value.tolist() for key, value in tensors.items()}, record, bits)
        assert torch.equal(torch.tensor(weight), modules[name].dense())


def test_a_saved_shared_model_is_read_by_the_same_rules(in_common, tmp_path):
    model = compress.load(in_common, bits=6)
    model.save_pretrained(tmp_path / "again")
    config, arrays = config_of(tmp_path / "again"), load_file(tmp_path / "again" / "model.safetensors")
    assert config["format_version"] == 6
    name = "model.layers.2.mlp.down_proj"
    tensors = {key.rpartition(".")[2]: value.tolist() for key, value in arrays.items() if key.startswith(f"{name}.")}
    assert tensors.keys() == shape_of(config["modules"][name]).specification().keys()
    for bits in (3, 6):
        compress.set_bits(model, bits)
        weight = decode_shared(tensors, config["modules"][name], bits)
        assert torch.equal(torch.tensor(weight), model.get_submodule(name).dense())


def test_shared_field_lists_are_the_real_ones(in_common):
    config = config_of(in_common)
    assert fields("Shared record") == ["rank"]
    assert fields("Grouped record") == ["group"]
    for record in config["modules"].values():
        assert record.keys() == {*fields("Module record"), "rank", "group"}
    assert config["format_version"] == 6


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_the_decoder_reads_a_real_checkpoint(by_row, bits):
    """From the files of one width alone, every matrix as the library has it."""
    modules = packed_modules(compress.load(by_row, bits=bits))
    arrays = read_at(by_row, bits)
    records = config_of(by_row)["modules"]
    assert records.keys() == modules.keys()
    assert len(records) == 21
    for name, record in records.items():
        tensors = {key.rpartition(".")[2]: value for key, value in arrays.items() if key.startswith(f"{name}.")}
        weight = decode({key: value.tolist() for key, value in tensors.items()}, record, bits)
        assert torch.equal(torch.tensor(weight), modules[name].dense())


def test_the_bytes_of_a_width_are_as_documented(by_row):
    """The formula for one matrix, which leaves no room for a tensor of a higher width; and the manifest's sum."""
    records = config_of(by_row)["modules"]
    sizes = json.loads((by_row / "compression.json").read_text())["sizes"]
    for bits in (3, 4, 5, 6):
        arrays = read_at(by_row, bits)
        assert sum(array.nbytes for array in arrays.values()) == sizes["tensors_at_bits"][str(bits)]
        for name, record in records.items():
            rows, words = record["out_features"], -(-record["in_features"] // 32)
            entry = {"float16": 2, "float32": 4}[record["codebook_dtype"]]
            found = sum(array.nbytes for key, array in arrays.items() if key.startswith(f"{name}."))
            assert found == rows * (4 * words * bits + entry * (2 ** (bits + 1) - 2 ** record["seed_bits"]))


def test_files_are_divided_by_width_step(by_row):
    for file in by_row.glob("model-*.safetensors"):
        step = int(re.fullmatch(r"model-(\d)bit-\d{5}-of-\d{5}\.safetensors", file.name)[1])
        later = {match for name in load_file(file) for match in re.findall(r"\.(?:plane|codebook)_(\d)$", name)}
        assert later == {str(step)}


def test_padding_is_zero(by_row):
    arrays = read_at(by_row, None)
    for name, record in config_of(by_row)["modules"].items():
        used = record["in_features"] % 32
        for key in ["weight", *(f"plane_{bits}" for bits in widths(record)[1:])]:
            last = arrays[f"{name}.{key}"][..., -1].astype("int64") & 0xFFFFFFFF
            assert not used or (last >> used == 0).all()


def test_field_lists_are_the_real_ones(by_row):
    config = config_of(by_row)
    assert set(fields("quantization_config")) == config.keys()
    for record in config["modules"].values():
        assert set(fields("Module record")) == record.keys()
    manifest = json.loads((by_row / "compression.json").read_text())
    assert set(fields("compression.json")) == manifest.keys()
    assert config["format_version"] == manifest["format_version"] == 1


def test_a_saved_model_is_read_by_the_same_rules(by_row, tmp_path):
    model = compress.load(by_row, bits=4)
    model.save_pretrained(tmp_path / "again")
    arrays = load_file(tmp_path / "again" / "model.safetensors")
    records = config_of(tmp_path / "again")["modules"]
    assert {record["parent_bits"] for record in records.values()} == {4}
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        tensors = {key.rpartition(".")[2]: value for key, value in arrays.items() if key.startswith(f"{name}.")}
        assert tensors.keys() == {"weight", "plane_4", "codebook_3", "codebook_4"}
        weight = decode({key: value.tolist() for key, value in tensors.items()}, records[name], 4)
        assert torch.equal(torch.tensor(weight), model.get_submodule(name).dense())
