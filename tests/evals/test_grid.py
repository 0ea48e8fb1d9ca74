"""Grids: recipes as data, run through the ordinary pipeline, measured once, laid out as tables."""

import sys

import pytest
import yaml

import compress
from compress.errors import CompressError
from compress.evals.evaluate import evaluate_text
from compress.evals.grids import figures, script
from compress.evals.grids import grid as module
from compress.evals.grids.__main__ import main
from compress.evals.grids.figures import held_out_loss
from compress.evals.grids.grid import GRIDS, GridRun, Row, cells_of, fill, parse_grid, pivot, read_grid, tables_of
from compress.recipe import load_recipe
from compress.settings import Calibration

TEXT = "the fox sleeps and the lazy dog jumps over the quick brown fox. " * 5
PRUNE = {"kind": "prune", "score": "magnitude", "sparsity": "{zeros}", "allocation": "{allocation}"}


@pytest.fixture
def data(recipe, tmp_path):
    """A grid on the tiny model: one allocation chooses its spread, one has two seeds, one packs."""
    (tmp_path / "valid.txt").write_text(TEXT)
    return {
        "model": recipe["model"],
        "text": str(tmp_path / "valid.txt"),
        "calibration": recipe["calibration"],
        "held_out": 2,
        "axes": {"zeros": {"30 %": 0.3, "60 %": 0.6}},
        "rows": {
            "uniform": {"passes": [{**PRUNE, "allocation": "uniform"}]},
            "random": {"seeds": [0, 1], "passes": [{**PRUNE, "allocation": "random"}]},
            "{allocation}, chosen": {
                "axes": {"allocation": ["atp"]},
                "choose": {"axis": "spread", "among": [0.1, 0.2], "at": {"zeros": "60 %"}, "scale": "zeros"},
                "passes": [{**PRUNE, "spread": "{spread}"}],
            },
            "packed": {"passes": [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}]},
        },
        "across": ["zeros", "bits"],
    }


@pytest.mark.slow
def test_every_cell_is_measured_once_and_as_the_recipe_says(data, tmp_path, monkeypatch):
    grid = parse_grid(data)
    lines = GridRun(grid, tmp_path / "out").lines()
    assert [(line["row"], line.get("zeros"), line["seed"], line["bits"]) for line in lines] == [
        ("dense", None, 0, "dense"),
        ("uniform", "30 %", 0, "dense"),
        ("uniform", "60 %", 0, "dense"),
        *(("random", zeros, seed, "dense") for zeros in ("30 %", "60 %") for seed in (0, 1)),
        ("atp, chosen", "30 %", 0, "dense"),
        ("atp, chosen", "60 %", 0, "dense"),
        ("packed", None, 0, "4"),
        ("packed", None, 0, "3"),
    ]
    step = {**PRUNE, "sparsity": 0.6, "allocation": "uniform"}
    model = {"model": data["model"], "calibration": data["calibration"]}
    made = compress.run({**model, "passes": [step]}, tmp_path / "alone")
    assert lines[2]["loss"] == evaluate_text(str(made), data["text"])["bits"]["dense"]["loss"]
    assert lines[2]["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert not list((tmp_path / "out" / "models").glob("*/config.json"))  # checkpoints go, results stay
    monkeypatch.setattr(module, "make", None)
    assert GridRun(grid, tmp_path / "out").lines() == lines


@pytest.mark.slow
def test_a_setting_is_chosen_on_text_that_nobody_has_seen(data, tmp_path, monkeypatch):
    """Trials run at one point for all cells, and the text to measure on takes no part."""
    grid, trials = parse_grid(data), []

    def loss(folder, calibration, count):
        trials.append(compress.manifest.read_manifest(folder)["recipe"]["passes"][0])
        return -trials[-1]["spread"]

    monkeypatch.setattr(module, "held_out_loss", loss)
    lines = GridRun(grid, tmp_path / "out").lines(["row=atp, chosen"])[1:]
    assert [(trial["spread"], trial["sparsity"]) for trial in trials] == [(0.1, 0.6), (0.2, 0.6)]
    assert [line["spread"] for line in lines] == [0.1, 0.2]  # in proportion to the share of zeros


def test_held_out_samples_are_not_those_of_the_recipe(compressed, text_file, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "score", lambda model, text: seen.append(text) or type("S", (), {"loss": 1.5}))
    calibration = Calibration(text=str(text_file), samples=4, length=32)
    assert held_out_loss(compressed, calibration, 2) == 1.5
    tokenizer = compress.loading.load_tokenizer(compressed)
    drawn = compress.calibration.draw_samples(calibration, tokenizer, None).tokens
    assert len(seen[0].windows) == 2
    assert not {tuple(w.tokens) for w in seen[0].windows} & {tuple(tokens.tolist()) for tokens in drawn}


def test_results_of_other_settings_are_refused(data, tmp_path):
    data["rows"] = {"dense again": {"passes": []}}
    GridRun(parse_grid(data), tmp_path / "out").lines()
    other = {**data, "calibration": {**data["calibration"], "samples": 5}}
    with pytest.raises(CompressError, match="has results with another calibration; choose another folder"):
        GridRun(parse_grid(other), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": {}}, r"row is not a known key. Did you mean 'rows'"),
        ({"rows": {"a": {"passes": [], "chose": 1}}}, r"rows.a.chose is not a known key. Did you mean 'choose'"),
        ({"protocol": {"strides": 3}}, "protocol has no key 'strides'"),
        ({"rows": {}}, "rows"),
    ],
)
def test_mistakes_are_one_sentence(data, change, message):
    with pytest.raises(CompressError, match=message):
        parse_grid({**data, **change})


def test_all_rows_choose_among_equally_many(data):
    data["rows"]["more"] = {"passes": [], "choose": {"axis": "spread", "among": [1, 2, 3]}}
    with pytest.raises(CompressError, match="different numbers of values"):
        parse_grid(data)


def test_templates():
    values = {"step": {"kind": "rtn", "bits": "{b}"}, "b": 4, "two": [1, 2], "none": None, "share": 0.25}
    assert fill("{step}", values) == {"kind": "rtn", "bits": 4}
    assert fill({"use": "{step}", "bits": 3}, values) == {"kind": "rtn", "bits": 3}
    assert fill(["{two}", 3, "{none}", "{step.bits}"], values) == [1, 2, 3, 4]
    assert fill("{share:.0%} of {b}", values) == "25% of 4"
    with pytest.raises(CompressError, match=r"'{bit}' cannot be filled in"):
        fill("{bit}", values)


def test_only_some_cells(data):
    grid = parse_grid(data)
    kept = cells_of(grid, ["zeros=30 %", "row=uniform", "row=packed"])
    assert [cell.place for cell in kept] == [{"row": "uniform", "zeros": "30 %"}, {"row": "packed"}]
    with pytest.raises(CompressError, match=r"no cell has this label. Did you mean 'uniform'"):
        cells_of(grid, ["row=unifrm"])


def test_a_table_has_the_mean_and_the_range_of_repeated_seeds():
    figures = [("a", 1, 2.0), ("a", 1, 4.0), ("b", 2, 5.0), ("c", 2, None)]
    lines = [{"row": row, "zeros": zeros, "loss": loss} for row, zeros, loss in figures]
    assert pivot(lines, ["row"], ["zeros"], ["loss"]).splitlines() == [
        "| loss | 1 | 2 |",
        "|---|---:|---:|",
        "| a | 3.0000 (2.0000 to 4.0000) | – |",
        "| b | – | 5.0000 |",
    ]
    grid = parse_grid({"calibration": {"builtin": "stdlib"}, "rows": {"a": {"passes": []}}, "columns": ["loss"]})
    assert tables_of(grid, [{"row": "dense", "loss": 1.0}, *lines]).startswith("dense model: loss 1.0000\n")


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_our_grids_is_valid(path):
    grid = parse_grid(read_grid(path.stem))
    cells = cells_of(grid)
    assert len({(*cell.place.values(), cell.seed) for cell in cells}) == len(cells)
    for cell in cells:
        choose = cell.row.choose
        for value in choose.among if choose else [None]:
            recipe = cell.recipe(grid, **({choose.axis: value} if choose else {}))
            assert not recipe["passes"] or load_recipe(recipe).seed == cell.seed
    assert set(Row.model_fields) >= {"passes", "axes", "seeds", "choose", "bits", "prompt"}


@pytest.mark.slow
def test_the_command(data, tmp_path, monkeypatch, capsys):
    del data["rows"]["packed"], data["rows"]["random"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**data, "model": "nowhere"}))
    arguments = [tmp_path / "mine.yaml", tmp_path / "out", "--model", data["model"], "--set", "axes.zeros=[0.5]"]
    monkeypatch.setattr(sys, "argv", ["grid", *map(str, arguments), "--only", "row=uniform", "--json", "-"])
    with pytest.raises(SystemExit, match="0"):
        script.run(main)
    assert '"row": "uniform"' in capsys.readouterr().out
    assert "| uniform |" in (tmp_path / "out" / "tables.md").read_text()
    monkeypatch.setattr(sys, "argv", ["grid", "prunning", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"error: there is no grid 'prunning'.*Did you mean 'pruning'"):
        script.run(main)
