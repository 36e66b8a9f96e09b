"""Every reader: what it reads well, and the sentence with which it refuses."""

from __future__ import annotations

import csv
import gzip
import json
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from remanence.data import readers
from remanence.data.readers import cache_folder, read_idx, read_rows
from remanence.errors import Mistake
from remanence.stream import Task

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r"), max_size=12)
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pairs(rows: Dataset) -> list[tuple[str, str]]:
    return list(zip(rows["question"], rows["answer"]))


# Round trips


@QUICK
@given(rows=st.lists(st.tuples(TEXT, TEXT, st.lists(TEXT, max_size=2), st.none() | st.integers(-(2**40), 2**40)), min_size=1, max_size=8))
def test_jsonl_round_trip(rows):
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join(json.dumps({"question": q, "answer": a, "paraphrases": p, "number": n}) for q, a, p, n in rows)
        found = read_rows(write(Path(folder) / "a.jsonl", text), kind="qa").to_list()
    assert [(row["question"], row["answer"], row["paraphrases"], row["number"]) for row in found] == rows


@QUICK
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_csv_round_trip(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        with path.open("w", newline="", encoding="utf-8") as handle:
            csv.writer(handle, quoting=csv.QUOTE_ALL).writerows([("question", "answer"), *rows])
        assert pairs(read_rows(path, kind="qa")) == rows


@QUICK
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_parquet_round_trip(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        pq.write_table(pa.table({"question": [q for q, _ in rows], "answer": [a for _, a in rows]}), path)
        assert pairs(read_rows(path, kind="qa")) == rows


# JSONL and JSON


def test_jsonl_widens_its_columns_from_batch_to_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BATCH", 2)
    lines = [
        {"text": "a", "x": None, "o": {"k": 1}},
        {"text": "b"},
        {"text": "c", "x": 1, "late": "z"},
        {"text": "d", "x": 2, "o": {"l": "m", "k": 2}},
        {"text": "e", "x": 0.5},
    ]
    rows = read_rows(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines))), kind="text").to_list()
    assert [row["text"] for row in rows] == list("abcde")
    assert [row["x"] for row in rows] == [None, None, 1, 2, 0.5]
    assert [row["late"] for row in rows] == [None, None, "z", None, None]
    assert rows[0]["o"]["k"] == 1
    assert rows[3]["o"] == {"k": 2, "l": "m"}


def test_dates_and_numbers_in_text_stay_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "2020-01-01", "answer": "007"}\n')
    assert pairs(read_rows(path, kind="qa")) == [("2020-01-01", "007")]
    path = write(tmp_path / "a.csv", "question,answer\n2020-01-01,007\n")
    assert pairs(read_rows(path, kind="qa")) == [("2020-01-01", "007")]


def test_json_may_be_a_list_and_files_may_start_with_a_byte_order_mark(tmp_path):
    content = '[{"text": "a"},\n {"text": "b"}]'
    assert read_rows(write(tmp_path / "a.json", content), kind="text")["text"][:] == ["a", "b"]
    assert read_rows(write(tmp_path / "b.json", b"\xef\xbb\xbf" + content.encode()), kind="text")["text"][:] == ["a", "b"]
    assert read_rows(write(tmp_path / "c.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n'), kind="text")["text"][:] == [
        "a",
        "b",
    ]
    assert read_rows(write(tmp_path / "d.csv", b"\xef\xbb\xbftext\r\na\r\n"), kind="text")["text"][:] == ["a"]


def test_chat_rows(tmp_path):
    line = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})
    rows = read_rows(write(tmp_path / "a.jsonl", line), kind="chat")
    assert rows[0]["messages"][1]["content"] == "ho"


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ('{"text": "a"}\n{"text": "b"\n', 2, "not JSON"),
        ('{"text": "a"}\n\n[1]\n', 3, "list, not an object"),
        ('{"text": "a"}\n{"text": "b"}\n{"text": 3}\n{"text": "d"}\n', 3, "does not fit the lines above"),
        ('{"text": "a", "n": 1}\n{"text": "b", "n": 99999999999999999999999}\n', 2, "does not fit"),
        ('{"text": "a"}\n{"text": "\\ud800"}\n', 2, "does not fit"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', 2, "byte 24 is not UTF-8"),
        ('{"text": "a"}\n' + "[" * 200_000 + "\n", 2, "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, line, words):
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(Mistake, match=words) as error:
        read_rows(path, kind="text")
    assert error.value.place == f"{path}:{line}"
    assert not list(cache_folder().glob("*.arrow"))


def test_types_that_change_between_batches_are_refused_at_the_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BATCH", 2)
    path = write(tmp_path / "a.jsonl", '{"text": "a", "n": 1}\n{"text": "b", "n": 2}\n{"text": "c", "n": "x"}\n')
    with pytest.raises(Mistake, match="'n' holds string, above it holds int64") as error:
        read_rows(path, kind="text")
    assert error.value.place == f"{path}:3"


# The cache


def test_a_second_read_comes_from_the_cache_and_a_changed_file_does_not(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    stamp = path.stat()
    read_rows(path, kind="text")
    with monkeypatch.context() as patch:
        patch.setitem(readers.TABLES, ".jsonl", lambda *_: pytest.fail("was parsed again"))
        assert read_rows(path, kind="text")["text"][:] == ["a"]
    write(path, '{"text": "b"}\n')
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time
    assert read_rows(path, kind="text")["text"][:] == ["b"]


def test_rows_are_mapped_from_the_cache_not_held(tmp_path):
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(25_000)))
    rows = read_rows(path, kind="text")
    assert [Path(item["filename"]).parent for item in rows.cache_files] == [cache_folder()]
    assert len(rows) == 25_000
    assert rows[24_999]["text"] == "line 24999"


# CSV and Parquet


def test_csv_classes_get_numbers(tmp_path):
    path = write(tmp_path / "a.csv", 'features,label\n"[0.5, 1]", 3\n"[2, 4]",+1\n')
    rows = read_rows(path, kind="classes")
    assert rows.to_list() == [{"features": [0.5, 1.0], "label": 3}, {"features": [2.0, 4.0], "label": 1}]
    Task("t", rows, kind="classes")


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ("question,answer\na,b\nc,d,e\n", "qa", "Row #3"),
        ("a,a\n1,2\n", "text", "two columns are called 'a'"),
        ("text\n", "text", "there are no rows"),
        ('features,label\n"[1]",2\n"[1]",dog\n', "classes", "label of row 2 is 'dog'"),
        ('features,label\n"[1]",2\n"[1",3\n', "classes", "row 2.*not JSON"),
        (b"text\nok\n\xe9t\xe9\n", "text", "byte 8 is not UTF-8"),
        ("question,answer\na\n", "qa", "Row #2"),
    ],
)
def test_bad_csv_is_refused(tmp_path, content, kind, words):
    with pytest.raises(Mistake, match=words):
        read_rows(write(tmp_path / "a.csv", content), kind=kind)


def test_parquet_keeps_features_and_decodes_dictionaries(tmp_path):
    features = {"features": [[1.0, 2.0], [3.0, 4.0]], "label": [1, 0]}
    rows = Dataset.from_dict(features).cast_column("label", ClassLabel(names=["cat", "dog"]))
    rows.to_parquet(str(tmp_path / "a.parquet"))
    found = read_rows(tmp_path / "a.parquet", kind="classes")
    assert found.features["label"].names == ["cat", "dog"]
    assert found.to_list() == rows.to_list()
    pq.write_table(pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()}), tmp_path / "b.parquet")
    assert read_rows(tmp_path / "b.parquet", kind="text")["text"][:] == ["x", "y", "x"]


def test_damaged_parquet_is_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (whole[: len(whole) // 2], b"no parquet at all"):
        with pytest.raises(Mistake, match="no readable Parquet file"):
            read_rows(write(tmp_path / "b.parquet", content), kind="text")


# Text


def test_paragraphs_are_parted_by_blank_lines(tmp_path):
    path = write(tmp_path / "a.txt", "\n\none\r\n  two\r\n \t\r\nthree\n\n\n\nfour")
    assert read_rows(path, kind="text")["text"][:] == ["one\n  two", "three", "four"]


def test_a_folder_of_texts_is_read_in_the_order_of_names(tmp_path):
    write(tmp_path / "t" / "b.txt", "second\n")
    write(tmp_path / "t" / "a.md", "first\n\nthen\n")
    write(tmp_path / "t" / "empty.txt", "")
    assert read_rows(tmp_path / "t", kind="text").to_list() == [
        {"file": "a.md", "text": "first"},
        {"file": "a.md", "text": "then"},
        {"file": "b.txt", "text": "second"},
    ]


def test_bad_text_is_refused(tmp_path):
    with pytest.raises(Mistake, match=f"byte {(1 << 20) + 2} is not UTF-8"):  # a character cut by the end of a chunk, then a stray byte
        read_rows(write(tmp_path / "a.txt", b"x" * ((1 << 20) - 1) + "é".encode() + b"y\xff"), kind="text")
    with pytest.raises(Mistake, match="byte 3 is not UTF-8"):
        read_rows(write(tmp_path / "b.txt", "abcé".encode()[:-1]), kind="text")
    with pytest.raises(Mistake, match="no rows"):
        read_rows(write(tmp_path / "c.txt", "\n \n"), kind="text")
    with pytest.raises(Mistake, match="the file is empty"):
        read_rows(write(tmp_path / "d.txt", ""), kind="text")


# Images


def picture(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (3, 2), grey).save(path)


def test_an_image_folder_gives_one_class_per_folder(tmp_path):
    picture(tmp_path / "i" / "dog" / "1.png", 10)
    picture(tmp_path / "i" / "cat" / "2.png", 20)
    picture(tmp_path / "i" / "cat" / "1.png", 30)
    (tmp_path / "i" / "nothing").mkdir()
    rows = read_rows(tmp_path / "i", kind="images")
    assert rows.features["label"].names == ["cat", "dog"]
    assert rows["label"][:] == [0, 0, 1]
    assert [row["image"].getpixel((0, 0)) for row in rows] == [30, 20, 10]
    Task("pictures", rows, kind="images")


def test_a_broken_image_is_named(tmp_path):
    picture(tmp_path / "i" / "cat" / "1.png", 30)
    broken = write(tmp_path / "i" / "cat" / "2.png", "no picture")
    with pytest.raises(Mistake, match="no readable image") as error:
        read_rows(tmp_path / "i", kind="images")
    assert error.value.place == str(broken)


# IDX


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("pack", [lambda raw: raw, gzip.compress], ids=["plain", "gzip"])
def test_idx_equals_what_was_written(tmp_path, pack):
    images, labels = np.arange(24).reshape(4, 3, 2) * 10, np.array([1, 0, 3, 1])
    end = ".gz" if pack is gzip.compress else ""
    path = write(tmp_path / f"t10k-images-idx3-ubyte{end}", pack(idx(images)))
    write(tmp_path / f"t10k-labels-idx1-ubyte{end}", pack(idx(labels)))
    for place in (path, tmp_path):
        rows = read_rows(place, kind="classes").with_format("numpy")
        assert rows["features"][:].dtype == np.float32
        np.testing.assert_array_equal(rows["features"][:], images.astype(np.float32) / np.float32(255))
        assert rows["label"][:].tolist() == labels.tolist()


def test_idx_equals_a_plain_reading_of_real_mnist():
    folder = Path(os.environ.get("REMANENCE_DATA", "../shared/data")) / "mnist10k"
    if not folder.is_dir():
        pytest.skip(f"no real MNIST at {folder}: set REMANENCE_DATA")
    rows = read_rows(folder, kind="classes").with_format("numpy")
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    marks = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    _, count, height, width = struct.unpack(">4I", raw[:16])
    assert len(rows) == count == 10_000
    assert rows["label"][:].tolist() == list(marks[8:])
    for number in (0, 1, 4_999, 9_999):
        start = 16 + number * height * width
        by_hand = [[raw[start + row * width + column] / 255 for column in range(width)] for row in range(height)]
        np.testing.assert_allclose(rows[number]["features"], by_hand, rtol=1e-6)


def test_bad_idx_is_refused(tmp_path):
    images, labels = idx(np.zeros((3, 2, 2))), idx(np.zeros(2))
    path = write(tmp_path / "x-images-idx3-ubyte", images)
    with pytest.raises(Mistake, match="labels of x-images-idx3-ubyte are missing; put x-labels-idx1-ubyte beside it"):
        read_rows(path, kind="classes")
    beside = write(tmp_path / "x-labels-idx1-ubyte", labels)
    with pytest.raises(Mistake, match="3 images, x-labels-idx1-ubyte has 2 labels"):
        read_rows(path, kind="classes")
    with pytest.raises(Mistake, match="1 axes, images have 3"):
        read_rows(beside, kind="classes")
    for content, words in (
        (images[:-1], "holds 11 bytes of data, its header promises 12"),
        (b"abcdef", "no IDX file"),
        (b"\0\0\x08\x03\0", "no IDX"),
    ):
        with pytest.raises(Mistake, match=words):
            read_idx(write(tmp_path / "bad-idx3", content))
    with pytest.raises(Mistake, match="cannot be read"):
        read_idx(write(tmp_path / "bad-idx3.gz", gzip.compress(images)[:-9]))


# Saved sets and folders


def test_a_saved_set_is_loaded_and_one_of_several_splits_must_be_named(tmp_path):
    rows = Dataset.from_dict({"text": ["a", "b"]})
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "two"))
    assert read_rows(tmp_path / "one", kind="text").to_list() == rows.to_list()
    assert read_rows(tmp_path / "two" / "test", kind="text").to_list() == rows.to_list()
    with pytest.raises(Mistake, match="several splits; name one of its folders: test, train"):
        read_rows(tmp_path / "two", kind="text")


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(Mistake, match="holds no text files"):
        read_rows(tmp_path, kind="text")
    write(tmp_path / "a.jsonl", "{}")
    with pytest.raises(Mistake, match=r"folder of tables; name one: a\.jsonl"):
        read_rows(tmp_path, kind="text")


# Paths, columns and types


def test_a_missing_file_gets_a_hint(tmp_path):
    write(tmp_path / "questions.jsonl", "{}")
    with pytest.raises(Mistake, match=r"recipe.yaml:3: .*does not exist; did you mean 'questions.jsonl'"):
        read_rows(tmp_path / "question.jsonl", kind="qa", place="recipe.yaml:3")
    with pytest.raises(Mistake, match="does not exist either"):
        read_rows(tmp_path / "no" / "a.jsonl", kind="qa")
    with pytest.raises(Mistake, match=r"'.xlsx' is no known format"):
        read_rows(write(tmp_path / "a.xlsx", "x"), kind="qa")
    with pytest.raises(Mistake, match="no hub name"):
        read_rows("hub:a:b:c:d", kind="qa")


def test_columns_are_mapped_and_give_way(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "q", "answer": "old", "completion": "a", "more": 1}\n')
    rows = read_rows(path, kind="qa", columns={"question": "prompt", "answer": "completion"})
    assert rows.to_list() == [{"question": "q", "answer": "a", "more": 1}]
    swapped = read_rows(path, kind="qa", columns={"question": "answer", "answer": "prompt"})
    assert pairs(swapped) == [("old", "q")]
    with pytest.raises(Mistake, match=r"needs the column 'question', present are prompt, answer, completion, more; .*columns: \{question"):
        read_rows(path, kind="qa")
    with pytest.raises(Mistake, match=r"no column 'promt', present are .*did you mean 'prompt'"):
        read_rows(path, kind="qa", columns={"question": "promt"})
    with pytest.raises(Mistake, match="names one column twice"):
        read_rows(path, kind="qa", columns={"question": "prompt", "answer": "prompt"})


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"question": "q", "answer": 3}, "qa", "'answer' holds int64, not text"),
        ({"features": [1, 2], "label": "dog"}, "classes", "'label' holds string, not whole numbers"),
        ({"features": 1.5, "label": 1}, "classes", "'features' holds double, not lists of numbers"),
        ({"messages": ["hi"]}, "chat", "'messages' holds .*, not a list of objects"),
        ({"image": "x.png", "label": 1}, "images", "'image' holds string, not images"),
        ({"text": "a"}, "txt", "unknown kind 'txt'; did you mean 'text'"),
    ],
)
def test_columns_of_the_wrong_type_are_refused(tmp_path, row, kind, words):
    with pytest.raises(Mistake, match=words):
        read_rows(write(tmp_path / "a.jsonl", json.dumps(row)), kind=kind)


def test_holes_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "q", "answer": "a"}\n{"question": "r"}\n')
    with pytest.raises(Mistake, match="row 2 has no 'answer'"):
        read_rows(path, kind="qa")
    path = write(tmp_path / "b.jsonl", '{"features": [1, 2], "label": 0}\n{"features": [1], "label": 0}\n')
    with pytest.raises(Mistake, match="row 2 has 1 features, row 1 has 2"):
        read_rows(path, kind="classes")
    path = write(tmp_path / "c.jsonl", '{"features": [1, null], "label": 0}\n')
    with pytest.raises(Mistake, match="holes"):
        read_rows(path, kind="classes")
