"""Mean widths beside whole ones in one evaluation."""

from compress.evals.evaluate import evaluate_text


def test_a_mean_width_is_measured_beside_whole_ones(compressed, tmp_path):
    """4.0 is as many bytes as 4, spread by measured errors: a choice of its own, under a name of its own."""
    text = tmp_path / "text.txt"
    text.write_text("the fox sleeps and the lazy dog jumps over the quick brown fox. " * 5)
    found = evaluate_text(str(compressed), str(text), [3, 4, 4.0, 3.5])["bits"]
    assert list(found) == ["4", "4.0", "3.5", "3"]
    assert found["3.5"]["loss"] not in (found["3"]["loss"], found["4"]["loss"])
