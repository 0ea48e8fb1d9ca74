"""Tables of whole recipes: rows for every width, checkpoints made once, and a picture."""

import json

import compress
from compress.evals import joint, plots, quality

TEXT = "the fox sleeps and the lazy dog jumps over the quick brown fox. " * 5


def test_any_precision_beside_its_controls(recipe, tmp_path, monkeypatch):
    (tmp_path / "valid.txt").write_text(TEXT)
    arguments = (recipe["model"], recipe["calibration"], str(tmp_path / "valid.txt"), tmp_path / "out")
    rows = quality.compare(*arguments, seeds=(7,), control_widths=(7,))
    nested = [(name, bits) for name in ("any-precision, seed 7", "weight objective, seed 7") for bits in ("8", "7")]
    assert [(row["method"], row["bits"]) for row in rows] == [
        ("dense", "dense"),
        *nested,
        ("kmeans", "7"),
        ("rtn", "7"),
    ]
    assert rows[0]["model_bytes"] > 0
    figure = plots.pareto(quality.lines_of(rows), dense=rows[0]["model_bytes"] / 1e6)
    plots.save(figure, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.startswith("<?xml")
    monkeypatch.setattr(compress.pipeline, "run", None)  # nothing is made again
    assert quality.compare(*arguments, seeds=(7,), control_widths=(7,)) == rows


def test_pruned_and_packed_models_beside_each_other(recipe, tmp_path, monkeypatch):
    (tmp_path / "valid.txt").write_text(TEXT)
    step = {"kind": "joint", "bits": 4, "sparsity": 0.5, "allocation": "uniform"}
    monkeypatch.setattr(joint, "recipes", lambda: {"joint, uniform, 50%": [step]})
    rows = joint.compare(
        recipe["model"], recipe["calibration"], str(tmp_path / "valid.txt"), tmp_path, joint.Protocol()
    )
    assert [(row["label"], row["bits"]) for row in rows] == [("dense", "dense"), ("joint, uniform, 50%", "4")]
    assert rows[1]["sparsity"] >= 0.5
    assert (tmp_path / "joint-uniform-50" / "config.json").exists()
    assert json.loads((tmp_path / "joint.json").read_text()) == rows
