"""From text to token samples: every kind of source, even windows, and what is refused."""

import gzip
import itertools
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compress.calibration import draw_samples, read_documents
from compress.errors import CompressError
from compress.settings import Calibration
from compress.texts import CALIBRATION, HELDOUT, training_files

BOS = 0


def byte_tokenizer(bos):
    """One token per byte, BOS (if any) is 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([""], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"bos_token": "<s>"} if bos else {}))


WITH_BOS, WITHOUT_BOS = byte_tokenizer(bos=True), byte_tokenizer(bos=False)


def written(path, content):
    """A file of text or bytes, gzipped if its name says so."""
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def json_lines(*texts, key="text"):
    return "".join(json.dumps({key: text}) + "\n" for text in texts)


def draw(path, tokenizer=WITHOUT_BOS, context_length=None, **settings):
    return draw_samples(Calibration(text=str(path), **settings), tokenizer, context_length)


def texts(samples):
    """Every sample as text again, BOS included if it is there."""
    return [WITH_BOS.decode(sample.tolist()) for sample in samples.tokens]


# Documents


def test_plain_text_is_one_document(tmp_path):
    assert read_documents(written(tmp_path / "a.txt", "one\n\ntwö\n")) == ["one\n\ntwö\n"]


def test_a_separator_divides_plain_text(tmp_path):
    path = written(tmp_path / "a.txt", "one\n<eot>\ntwo\n<eot>\n")
    assert read_documents(path, separator="<eot>") == ["one", "two", ""]


def test_json_lines_hold_a_document_each(tmp_path):
    path = written(tmp_path / "a.jsonl", json_lines("one", "zwölf\n") + "\n" + json_lines("three"))
    assert read_documents(path) == ["one", "zwölf\n", "three"]


def test_json_lines_may_use_another_key(tmp_path):
    path = written(tmp_path / "a.jsonl", json_lines("one", key="content"))
    assert read_documents(path, column="content") == ["one"]


@pytest.mark.parametrize(("name", "content"), [("a.txt", "one"), ("a.jsonl", json_lines("one"))])
def test_gzipped_files_read_like_plain_ones(tmp_path, name, content):
    assert read_documents(written(tmp_path / f"{name}.gz", content)) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.txt", None, r"cannot be read \(.*No such file"),
        ("binary.txt", bytes(range(256)), r"cannot be read \(.*utf-8"),
        ("plain.txt.jsonl", "not json\n", "not JSON lines with the key 'text'"),
        ("other.jsonl", json_lines("one", key="content"), "not JSON lines with the key 'text'"),
        ("list.jsonl", '["one"]\n', "not JSON lines with the key 'text'"),
        ("binary.jsonl", b"\xff\xfe\n", r"cannot be read \(.*utf-8"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path, name, content, complaint):
    path = tmp_path / name
    if content is not None:
        written(path, content)
    with pytest.raises(CompressError, match=f"text file .*{name}: {complaint}"):
        draw(path, samples=1, length=4)


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(b"text" * 50)[:-12]], ids=["plain", "truncated"])
def test_a_damaged_gzip_file_is_named(tmp_path, content):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(content)
    with pytest.raises(CompressError, match=r"text file .*a\.txt\.gz: cannot be read"):
        draw(path, samples=1, length=4)


# Samples of documents


@pytest.mark.parametrize("kind", ["separator", "jsonl"])
def test_documents_are_cut_and_the_first_ones_taken(tmp_path, kind):
    documents = ["first one", "second", "third", "fourth"]
    if kind == "jsonl":
        samples = draw(written(tmp_path / "a.jsonl", json_lines(*documents)), samples=3, length=5)
    else:
        path = written(tmp_path / "a.txt", "##".join(documents))
        samples = draw(path, samples=3, length=5, separator="##")
    assert texts(samples) == ["first", "secon", "third"]


def test_bos_goes_in_front_and_counts_as_a_token(tmp_path):
    path = written(tmp_path / "a.jsonl", json_lines("first one", "two"))
    assert texts(draw(path, WITH_BOS, samples=2, length=5)) == ["<s>firs", "<s>two"]


def test_documents_with_fewer_characters_are_passed_over(tmp_path):
    path = written(tmp_path / "a.jsonl", json_lines("1234", "12345", "äöüß", "123456"))
    assert texts(draw(path, samples=2, length=9, min_characters=5)) == ["12345", "123456"]


def test_documents_without_a_token_to_predict_are_passed_over(tmp_path):
    path = written(tmp_path / "a.jsonl", json_lines("", "a", "bc"))
    assert texts(draw(path, samples=1, length=9)) == ["bc"]
    assert texts(draw(path, WITH_BOS, samples=2, length=9)) == ["<s>a", "<s>bc"]


# Windows of one long text

LONG = "".join(f"{number:04d}" for number in range(100))  # any eight characters occur in one place only


def test_windows_are_spread_evenly_over_the_text(tmp_path):
    samples = draw(written(tmp_path / "a.txt", LONG), samples=4, length=10)
    assert texts(samples) == [LONG[start : start + 10] for start in (0, 100, 200, 300)]


def test_every_window_has_bos_in_front(tmp_path):
    samples = draw(written(tmp_path / "a.txt", LONG), WITH_BOS, samples=4, length=11)
    assert texts(samples) == ["<s>" + LONG[start : start + 10] for start in (0, 100, 200, 300)]


@pytest.mark.parametrize("samples", [1, 3, 7, 29, 40])
@pytest.mark.parametrize("length", [8, 10])
def test_windows_do_not_overlap_and_leave_even_gaps(tmp_path, samples, length):
    drawn = draw(written(tmp_path / "a.txt", LONG), samples=samples, length=length)
    starts = [LONG.index(text) for text in texts(drawn)]
    steps = [after - before for before, after in itertools.pairwise(starts)]
    assert len(starts) == samples
    assert all(step >= length for step in steps)
    assert not steps or max(steps) - min(steps) <= length


# What is recorded


def test_the_key_depends_on_the_tokens_only(tmp_path):
    plain = draw(written(tmp_path / "a.txt", "one##two"), samples=2, length=5, separator="##")
    lines = draw(written(tmp_path / "b.jsonl.gz", json_lines("one", "two")), samples=2, length=9)
    other = draw(written(tmp_path / "c.jsonl", json_lines("one", "twö")), samples=2, length=9)
    moved = draw(written(tmp_path / "d.jsonl", json_lines("onet", "wo")), samples=2, length=9)
    assert plain.key == lines.key
    assert len({plain.key, other.key, moved.key}) == 3


def test_the_source_is_recorded_without_its_folder(tmp_path):
    source = draw(written(tmp_path / "a.txt", LONG), samples=2, length=10).source
    assert source["text"] == "a.txt"
    assert (source["samples"], source["tokens"]) == (2, 20)
    assert len(source["sha256"]) == 64


# Refusals


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_too_little_text_is_refused_with_the_number_there_is(tmp_path, name):
    content = "x" * 12 if name == "a.txt" else json_lines("abcd", "efgh", "ijkl")
    message = "calibration.samples: 5 asked for, but the text gives 3 of 4 tokens; lower samples or length"
    with pytest.raises(CompressError, match=message):
        draw(written(tmp_path / name, content), samples=5, length=4)


def test_a_length_beyond_the_models_context_is_refused(tmp_path):
    path = written(tmp_path / "a.txt", LONG)
    with pytest.raises(CompressError, match=r"calibration\.length: 65 tokens, but .* context holds 64; lower it"):
        draw(path, context_length=64, samples=1, length=65)
    assert len(draw(path, context_length=64, samples=1, length=64).tokens) == 1


# The built-in text


def test_the_builtin_text_gives_full_samples():
    samples = draw_samples(Calibration(builtin="stdlib", samples=5, length=32), WITH_BOS, 64)
    assert [len(sample) for sample in samples.tokens] == [32] * 5
    assert all(sample[0] == BOS for sample in samples.tokens)
    assert set(samples.source["sha256"]) == set(CALIBRATION)


@pytest.mark.slow
def test_training_calibration_and_heldout_modules_are_disjoint():
    trained = {path.stem.removeprefix("test_") for path in training_files()}
    assert set(CALIBRATION).isdisjoint(HELDOUT)
    assert trained.isdisjoint({*CALIBRATION, *HELDOUT})


@pytest.mark.slow
def test_a_dataset_folder_gives_its_documents(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"body": f"document {number} about the dog and the fox"} for number in range(6)]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "train.jsonl")
    settings = Calibration(dataset=str(tmp_path), column="body", samples=4, length=64)
    samples = draw_samples(settings, WITH_BOS, 64)
    assert len(samples.tokens) == 4
    assert WITH_BOS.decode(samples.tokens[3], skip_special_tokens=True).startswith("document 3")
    with pytest.raises(CompressError, match="has no column 'text'"):
        draw_samples(Calibration(dataset=str(tmp_path), samples=4, length=64), WITH_BOS, 64)
    with pytest.raises(CompressError, match="cannot be loaded"):
        draw_samples(Calibration(dataset=str(tmp_path / "nowhere"), samples=4, length=64), WITH_BOS, 64)
