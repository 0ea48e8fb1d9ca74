"""Records of units: the figures of the pass and the notes of the pipeline, one file on disk and apart in memory."""

import pytest

import compress
from compress.quant.baselines import RoundToNearest
from compress.runner import figures_of


def test_figures_are_told_from_the_notes_of_the_pipeline():
    record = {"errors": {"q": {}}, "packed": {"q": {"seed_bits": 3}}, "skipped": {"k": "ignored"}, "zeal": 1}
    assert figures_of(record) == {"errors": {"q": {}}, "zeal": 1}


def test_a_figure_under_a_name_of_the_pipeline_is_refused(tiny_llama, tmp_path, monkeypatch):
    class Careless(RoundToNearest):
        def run_block(self, block, context):
            return {**super().run_block(block, context), "storage": "much"}

    monkeypatch.setattr("compress.pipeline.pass_class", lambda kind: Careless)
    with pytest.raises(compress.CompressError, match="pass rtn: its record has 'storage'"):
        compress.run({"model": str(tiny_llama), "passes": [{"kind": "rtn"}]}, tmp_path / "out")
