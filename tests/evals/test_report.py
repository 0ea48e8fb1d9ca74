"""The report: one page that needs nothing from outside, with the figures that were measured."""

import json
import math
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from compress.errors import CompressError
from compress.evals import gather
from compress.evals.controls import controls, measure_variants, stages
from compress.evals.evaluate import Protocol
from compress.evals.gather import Wanted, collect, measure_missing, read_matrices
from compress.evals.page import html
from compress.evals.report import report
from compress.evals.sections import quality_table, report_page, showcase
from compress.evals.store import Key, Results, identity, results_of
from compress.evals.tables import markdown, task_table
from compress.evals.tasks import Tasks
from compress.inspect import inspect
from compress.weights import Checkpoint

TEXT = "the fox sleeps and the lazy dog jumps over the quick brown fox. " * 5


def bench_result(folder):
    figure = {"median": 100.0, "low": 95.0, "high": 110.0}
    speeds = [f"{what}_{unit}" for what in ("decode", "prefill") for unit in ("tokens_per_second", "versus_dense")]
    names = [*speeds, "time_to_first_token_seconds", "load_seconds", "resident_bytes"]
    widths = {width: {**dict.fromkeys(names, figure), "disk_bytes": 1000} for width in ("dense", "6", "3")}
    load = {"prompt": 8, "tokens": 4, "rounds": 3, "loads": 1}
    return {
        "model": str(folder),
        "backend": "c: <some> kernels",
        "device": "a processor",
        "dtype": "float32",
        "exact": True,
        "threads": 1,
        "load": load,
        "dense": "there",
        "widths": widths,
        "versions": {},
    }


@pytest.fixture(scope="module")
def measured(compressed, tmp_path_factory, task_folder):
    """A checkpoint with everything measured: text, tasks, agreement, controls, a benchmark, samples, a matrix."""
    pytest.importorskip("lm_eval")
    folder = shutil.copytree(compressed, tmp_path_factory.mktemp("measured") / "model")
    text = folder.parent / "held_out.txt"
    text.write_text(TEXT)
    wanted = Wanted(str(text), tasks=Tasks(("animals",), task_folder), load=None, prompts=("the fox & <the> dog",))
    store = results_of(folder)
    assert measure_missing(folder, wanted, store, lambda *_: None) == []
    measure_variants(folder, str(text), Protocol(), [3], store)
    store.add(Key("bench", "bench", identity(folder), "all", settings={"load": {}}), {}, result=bench_result(folder))
    matrix = {
        "title": "Transfer",
        "rows": ["3", "6"],
        "columns": ["3", "4", "6"],
        "values": [[1.5, 2.5, None], [3, 4, 5]],
    }
    (folder / "report" / "transfer.json").write_text(json.dumps([matrix, {"something": "else"}]))
    return folder


class Balanced(HTMLParser):
    """Counts what is opened and not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
def test_the_page_is_whole_and_needs_nothing_from_outside(measured):
    text = html(report_page(collect(measured, results_of(measured))))
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert all(address.startswith("#") for address in parser.addresses)  # within the page
    assert "<script" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 5  # Pareto, speed, two of errors, transfer
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "nan" not in picture
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert ", ".join(headings) == (
        "Quality at every number of bits, Tasks, How alike it is to the dense model, Speed and memory, Where the error is, Transfer, "
        "Continuations, How it was made"
    )
    assert "the fox &amp; &lt;the&gt; dog" in text
    assert "c: &lt;some&gt; kernels" in text
    assert text == html(report_page(collect(measured, results_of(measured))))


def test_the_tables_have_the_figures_that_were_measured(measured):
    store = results_of(measured)
    facts = collect(measured, store)
    table = quality_table(facts, facts.texts[0])
    assert [row[0] for row in table.rows] == ["dense", "6 bits", "5 bits", "4 bits", "3 bits"]
    rows = {row["width"]: row["metrics"] for row in store.rows("text")}
    at = inspect(measured)["bytes_at_bits"]
    last = dict(zip(table.heads, table.rows[-1], strict=True))
    assert last["loss, nats"] == f"{rows['3']['loss']:.4f}"
    assert last["vs dense"] == f"{100 * (rows['3']['loss'] / rows['dense']['loss'] - 1):+.2f} %"
    assert last["read"] == f"{at['3'] / 1e6:.2f} MB"
    control = next(row for row in store.rows("variant") if row["label"] == "round to nearest")
    assert last["control loss: round to nearest"] == f"{control['widths']['3']['loss']:.4f}"
    found = task_table(facts.tasks)
    assert found.rows[0][0] == "dense"
    changed = found.heads.index("answers changed")
    ours, dense = (facts.tasks[width, None]["animals"]["answers"] for width in ("3", "dense"))
    share = sum(a != b for a, b in zip(ours, dense, strict=True)) / len(dense)
    assert found.rows[-1][changed] == f"{100 * share:.1f} %"
    assert showcase(facts) == "4"
    assert markdown(found).count("\n") == len(found.rows) + 1


@pytest.mark.slow
def test_html_markdown_and_picture_are_written_and_nothing_is_measured_again(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(gather, "measure_missing", None)
    written, notes = report(measured, None, tmp_path / "out")
    assert [path.name for path in written] == ["index.html", "report.md", "pareto.png"]
    assert notes == []
    assert written[2].read_bytes().startswith(b"\x89PNG")
    text = written[1].read_text()
    assert "![Added loss against size, one point per number of bits](pareto.png)" in text
    assert "kind: any_precision" in text


def test_without_matplotlib_everything_but_the_picture_is_there(measured, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    written, notes = report(measured, None, tmp_path / "out")
    assert [path.name for path in written] == ["index.html", "report.md"]
    assert notes == ["There are no figures: drawing needs matplotlib: pip install 'compress-llm[plots]'."]
    page = written[0].read_text()
    assert notes[0].replace("'", "&#39;") in page
    assert "<svg" not in page
    assert "<h2>Where the error is</h2>" in page  # as tables
    assert "pareto.png" not in written[1].read_text()


def test_a_checkpoint_without_measurements_still_has_a_page(compressed, tmp_path):
    text = html(report_page(collect(compressed, Results(None), ["No text was measured: give --text FILE."])))
    assert "No text was measured" in text
    assert "Quality at every number of bits" not in text
    assert "Where the error is" in text


def test_a_folder_that_is_no_checkpoint_is_refused_before_any_work(tiny_llama, tmp_path):
    with pytest.raises(CompressError, match=r"has no compression\.json"):
        report(tiny_llama, Wanted())


def test_stages_and_controls_of_a_recipe():
    prune = {"kind": "prune", "score": "wanda", "allocation": "mrp", "sparsity": 0.5}
    pack = {"kind": "any_precision", "seed_bits": 3, "include": ["lm_head"], "ignore": []}
    assert [(v.label, v.passes) for v in stages([prune, pack])] == [("after prune", [prune])]
    found = list(controls([prune, pack], [3, 4]))
    assert [variant.label for variant in found] == [
        "uniform allocation",
        "random allocation",
        *["round to nearest"] * 2,
        *["k-means"] * 2,
    ]
    assert found[0].passes == [{**prune, "allocation": "uniform"}, pack]
    assert found[2].passes == [prune, {"kind": "rtn", "bits": 3, "include": ["lm_head"]}]


def test_rows_of_a_transfer_become_a_matrix_per_text(tmp_path):
    rows = [
        {"prompt": p, "model": m, "text": t, "perplexity": value, "loss": 0}
        for value, (p, m, t) in enumerate([("none", "3", "a"), ("none", "4", "a"), ("3", "3", "a"), ("none", "3", "b")])
    ]
    (tmp_path / "transfer.json").write_text(json.dumps(rows))
    first, second = read_matrices(tmp_path)
    assert (first.matrix.rows, first.matrix.columns) == (["none", "3"], ["3", "4"])
    assert first.matrix.values == [[0, 1], [2, None]]
    assert second.matrix.values == [[3]]


def test_a_matrix_whose_shape_is_wrong_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"title": "T", "rows": ["a"], "columns": ["b"], "values": [[1, 2]]}))
    with pytest.raises(CompressError, match="T: values are not 1 rows of 1"):
        read_matrices(tmp_path)


@pytest.mark.slow
def test_a_soft_prompt_is_measured_with_and_without_and_on_the_dense_model(compressed, soft_prompt, tmp_path):
    """All on the same windows, which leave room for the prompt; virtual tokens are never scored."""
    folder = shutil.copytree(compressed, tmp_path / "model")
    shutil.copytree(soft_prompt, folder / "soft_prompt")
    (tmp_path / "held_out.txt").write_text(TEXT)
    store = results_of(folder)
    wanted = Wanted(str(tmp_path / "held_out.txt"), load=None, bits=[3, 4], prompts=("the",))
    measure_missing(folder, wanted, store, lambda *_: None)
    facts = collect(folder, store)
    assert len(facts.texts) == 1
    rows = facts.texts[0]["rows"]
    assert set(rows) == {
        *((w, p) for w in "34" for p in (None, "soft prompt")),
        ("dense", None),
        ("dense", "prompt of model"),
    }
    assert len({metrics["tokens"] for metrics in rows.values()}) == 1
    assert facts.texts[0]["settings"]["protocol"]["length"] == 64 - 5
    names = [row[0] for row in quality_table(facts, facts.texts[0]).rows]
    assert names == [
        "dense",
        "dense + prompt of model",
        "4 bits",
        "4 bits + soft prompt",
        "3 bits",
        "3 bits + soft prompt",
    ]


@pytest.mark.slow
def test_smaller_shapes_are_shown_block_by_block(tiny_llama, text_file, tmp_path):
    import compress

    recipe = {
        "model": str(tiny_llama),
        "calibration": {"text": str(text_file), "samples": 4, "length": 32},
        "passes": [{"kind": "mini_llm", "ratio": 0.3, "ratio_of": "blocks", "mode": "local", "score": "magnitude"}],
    }
    folder = compress.run(recipe, tmp_path / "model")
    before, after = (Checkpoint(place).info() for place in (tiny_llama, folder))
    facts = collect(folder, Results(None))
    shares = {f"{name}.weight": share for name, share in facts.kept.items()}
    assert shares == {name: math.prod(after[name].shape) / math.prod(before[name].shape) for name in shares}
    assert facts.kept["model.embed_tokens"] == 1 > facts.kept["model.layers.1.mlp.up_proj"]
    assert "<h2>Sizes per block</h2>" in html(report_page(facts))


@pytest.mark.slow
def test_its_quality_is_in_the_model_card_too(measured, tmp_path):
    """Where the report is the checkpoint's own."""
    folder = shutil.copytree(measured, tmp_path / "model")
    before = (folder / "README.md").read_text()
    report(folder, None, tmp_path / "elsewhere")
    assert (folder / "README.md").read_text() == before
    report(folder, None)
    card = (folder / "README.md").read_text()
    table = card.split("## Measured")[1].split("## Recipe")[0]
    assert "| loss, nats |" in table
    assert table.count("\n| ") >= 4  # the dense model, and every number of bits
    assert card.replace(f"## Measured{table}", "") == before
