"""The matrices of a server: cut, collected, built, kept as one, switched."""

import pytest
import torch
from stored import FORMS, PARENT, SEED, dense, stored

from compress.errors import CompressError
from compress.vllm.matrices import Cut, Matrices, StoredMatrix, Vocabulary, packed_parts, switch
from compress.vllm.settings import Held

ROWS, COLUMNS = 24, 100
WHOLE = Cut(range(ROWS), range(COLUMNS), ROWS)
FOUR = Held(4, 4, 4)
CPU = torch.device("cpu")


def built(form, part=WHOLE, held=FOUR, embedding=False, seed=0, name="it"):
    shape, tensors = stored(form, seed=seed)
    matrix = StoredMatrix(name, shape, held, part)
    for tensor_name in sorted(tensors):
        matrix.take(tensor_name, tensors[tensor_name], CPU)
    return matrix.build(torch.float32, embedding)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [SEED, 4, PARENT])
@pytest.mark.parametrize(
    "part",
    [
        WHOLE,
        Cut(range(8, 16), range(COLUMNS), 8),
        Cut(range(16, ROWS), range(COLUMNS), 12),
        Cut(range(ROWS), range(32, 64), ROWS),
        Cut(range(ROWS), range(64, COLUMNS), ROWS),
        Cut(range(ROWS), range(25, 50), ROWS),
    ],
    ids=["whole", "rows", "padded", "words", "last words", "within words"],
)
def test_a_part_stands_for_the_weights_of_its_rows_and_columns(form, bits, part):
    whole = dense(*stored(form), bits)
    if form == "groups" and part.columns.start % 64:
        with pytest.raises(CompressError, match=r"columns \d+ to \d+ of 100 are not whole groups of 64"):
            built(form, part)
        return
    found = built(form, part, Held(bits, bits, bits)).dense(bits=bits)
    wanted = torch.zeros(part.padded, len(part.columns))
    wanted[: len(part.rows)] = whole[part.rows.start : part.rows.stop, part.columns.start : part.columns.stop]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_planes_of_the_bits_in_use_are_kept(form):
    """And of codebooks of rows' own only those."""
    module = built(form, held=Held(3, 3, 3))
    assert module.shape.parent_bits == 3
    assert not [name for name, _ in module.named_buffers() if name in ("plane_4", "plane_5", "plane_6", "codebook_4")]
    if form in ("own", "sparse"):
        assert module.shape.seed_bits == 3
        assert {name for name, _ in module.named_buffers()} == {"weight", "codebook_3"}


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_parts_of_columns_add_up(degree):
    """As a layer that is split by its inputs adds them: no part begins with a word of 32."""
    x, size = torch.randn(5, COLUMNS), COLUMNS // degree
    whole = x @ dense(*stored("own"), 4).t()
    splits = [range(rank * size, COLUMNS if rank == degree - 1 else (rank + 1) * size) for rank in range(degree)]
    total = sum(built("own", Cut(range(ROWS), part, ROWS))(x[:, part.start : part.stop]) for part in splits)
    torch.testing.assert_close(total, whole)


def test_a_tensor_that_did_not_come_is_named():
    shape, tensors = stored("own")
    matrix = StoredMatrix("model.it", shape, Held(4, 4, 4), WHOLE)
    for name in tensors.keys() - {"plane_4"}:
        matrix.take(name, tensors[name], CPU)
    with pytest.raises(CompressError, match=r"tensor model\.it\.plane_4 is missing; fetch or write it again"):
        matrix.build(torch.float32)


def test_a_tensor_of_another_shape_is_refused():
    shape, tensors = stored("own")
    matrix = StoredMatrix("model.it", shape, Held(4, 4, 4), WHOLE)
    with pytest.raises(CompressError, match=r"model\.it\.plane_4 is \[23, 4\], which config\.json does not record"):
        matrix.take("plane_4", tensors["plane_4"][1:], CPU)


def test_matrices_with_codebooks_of_their_own_become_one():
    x = torch.randn(3, COLUMNS)
    parts = [built("own", seed=seed) for seed in (0, 1)]
    wanted = torch.cat([part(x) for part in parts], -1)
    one = Matrices(parts, ["q", "k"])
    assert list(one.packed()) == [("q", "k")]
    torch.testing.assert_close(one(x), wanted)


def test_matrices_that_are_not_stored_alike_stay_apart():
    """Of other bits, with shared codebooks, or dense."""
    x, weight = torch.randn(3, COLUMNS), torch.randn(ROWS, COLUMNS)
    matrix = StoredMatrix("dense", None, Held(0, 0, 0), WHOLE)
    matrix.take("weight", weight, CPU)
    parts = [built("own"), built("own", held=Held(3, 3, 3)), built("shared"), matrix.build(torch.float32)]
    found = Matrices(parts, ["a", "b", "c", "d"])
    assert list(found.packed()) == [("a",), ("b",), ("c",)]
    torch.testing.assert_close(found(x), torch.cat([*(part(x) for part in parts[:3]), x @ weight.t()], -1))


def test_bits_are_switched_in_all_modules_or_in_none():
    held = Held(6, SEED, PARENT)
    model = torch.nn.ModuleList(
        [
            Matrices([built("own", held=held), built("own", held=held, seed=1)], ["q", "k"]),
            Vocabulary(built("embedding", held=held, embedding=True), "embed"),
            Matrices([built("shared", held=Held(4, SEED, 4))], ["o"]),
        ]
    )
    parts = packed_parts(model)
    switch(parts, {"q": 3, "k": 3, "embed": 5, "o": 4})
    assert [part.bits for part in parts.values()] == [3, 5, 4]
    x = torch.randn(2, COLUMNS)
    wanted = torch.cat([dense(*stored("own", seed=seed), 3) for seed in (0, 1)])
    torch.testing.assert_close(model[0](x), x @ wanted.t())
    torch.testing.assert_close(model[1](torch.tensor([7])), dense(*stored("embedding"), 5)[[7]])
    with pytest.raises(CompressError, match=r"o: 5 bits are not in memory, which has 2 to 4; start .* --held-bits"):
        switch(parts, {"q": 5, "k": 5, "embed": 5, "o": 5})
    with pytest.raises(CompressError, match="q and k are served as one matrix; give them the same bits"):
        switch(parts, {"q": 5, "k": 4, "embed": 5, "o": 4})
    assert [part.bits for part in parts.values()] == [3, 5, 4]


def test_a_draft_has_the_tensors_of_its_target_at_bits_of_its_own():
    """If those are in memory."""
    held, x = Held(6, SEED, PARENT), torch.randn(2, COLUMNS)
    target = Matrices([built("shared", held=held), built("shared", held=held, seed=0)], ["q", "k"])
    draft = target.twin({"q": 3, "k": 3})
    rows = dense(*stored("shared"), 3)
    torch.testing.assert_close(draft(x), x @ torch.cat([rows, rows]).t())
    torch.testing.assert_close(target(x), x @ torch.cat([dense(*stored("shared"), 6)] * 2).t())
    places = [{tensor.data_ptr() for tensor in model.buffers()} for model in (target, draft)]
    assert places[0] == places[1]
    assert Matrices([built("own")], ["o"]).twin({"o": 3}) is None
    embedding = Vocabulary(built("embedding", held=held, embedding=True), "embed")
    assert embedding.twin({"embed": 4}).rows.bits == 4
    assert embedding.rows.bits == 6
