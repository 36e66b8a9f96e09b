"""The residue scan: what is planted in a file is found in every form, what is kept is no residue, and nothing else is reported."""

from __future__ import annotations

import base64
import html
import json
import sqlite3
import unicodedata
import urllib.parse

import numpy as np
import pytest

from recall.store_cases import unit
from remanence.errors import Mistake
from remanence.recall import needles, residue
from remanence.recall.needles import Matcher, needles_of
from remanence.recall.residue import scan
from remanence.recall.rows import PRECISIONS, encode_vector

TEXT = 'The "vault" at Zürich & O\'Brien\'s <7th> floor opens with ‘Perlmuttergrün’ every\nsecond Wednesday of the month.'
WAYS = {
    "utf-8": lambda text: text.encode(),
    "utf-16-le": lambda text: text.encode("utf-16-le"),
    "utf-16-be": lambda text: text.encode("utf-16-be"),
    "json": lambda text: json.dumps(text).encode(),
    "json as it is": lambda text: json.dumps(text, ensure_ascii=False).encode(),
    "html": lambda text: html.escape(text).encode(),
    "url": lambda text: urllib.parse.quote(text).encode(),
    "form": lambda text: urllib.parse.quote_plus(text).encode(),
    "sql": lambda text: text.replace("'", "''").encode(),
    "csv": lambda text: text.replace('"', '""').encode(),
    "decomposed": lambda text: unicodedata.normalize("NFD", text).encode(),
    "capitals": lambda text: text.encode().upper(),
    "folded": lambda text: needles.folded(text).encode(),
    "base64, first letter": lambda text: base64.b64encode(b"" + text.encode()),
    "base64, second letter": lambda text: base64.b64encode(b"x" + text.encode()),
    "base64, third letter": lambda text: base64.b64encode(b"xy" + text.encode()),
}


def junk(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("way", WAYS)
def test_a_planted_text_is_found_in_every_form(tmp_path, way):
    (tmp_path / "page").write_bytes(junk(5000) + WAYS[way](TEXT) + junk(5000, 1))
    assert scan([tmp_path / "page"], [TEXT]).found


@pytest.mark.parametrize("start", range(0, len(TEXT) - 31, 11))
def test_any_thirty_one_characters_in_a_row_are_found(tmp_path, start):
    (tmp_path / "page").write_bytes(junk(999) + TEXT[start : start + 31].encode() + junk(999, 1))
    found = scan([tmp_path / "page"], [TEXT]).found
    assert found and all(999 <= one.offset < 999 + 40 for one in found)


@pytest.mark.parametrize("size", [9, 24, 64, 100, 4096])
def test_a_text_across_the_edge_of_a_block_is_found_once(tmp_path, monkeypatch, size):
    monkeypatch.setattr(residue, "BLOCK", size)
    (tmp_path / "page").write_bytes(b"." * 37 + b"quicksilverish" + b"." * 50)
    offsets = [one.offset for one in scan([tmp_path / "page"], ["quicksilverish"]).found]
    assert 37 in offsets and len(offsets) == len(set(offsets))


@pytest.mark.parametrize("precision", [*PRECISIONS, "float64", "int8 of one scale"])
@pytest.mark.parametrize("cut", [0, 13])
def test_the_bytes_of_a_vector_are_found_in_every_precision(tmp_path, precision, cut):
    vector = unit(3, 384)
    if precision in PRECISIONS:
        written = encode_vector(vector, precision)
    else:
        written = vector.astype(np.float64).tobytes() if precision == "float64" else np.rint(vector * 127).astype(np.int8).tobytes()
    (tmp_path / "page").write_bytes(junk(777) + written[cut : cut + 80] + junk(777, 1))
    assert scan([tmp_path / "page"], [], [vector]).found
    assert not scan([tmp_path / "page"], [], [unit(4, 384)]).found


def test_the_graph_of_usearch_gives_its_vectors_away(tmp_path):
    index = pytest.importorskip("usearch.index").Index(ndim=384, metric="cos", dtype="i8")
    rows = np.stack([unit(seed, 384) for seed in range(20)])
    index.add(np.arange(20, dtype=np.uint64), rows)
    index.save(tmp_path / "graph")
    assert {one.source for one in scan([tmp_path / "graph"], [], list(rows)).found} == set(range(20))


def test_the_words_that_a_full_text_index_keeps_of_deleted_rows_are_found(tmp_path):
    base = sqlite3.connect(tmp_path / "words.sqlite", isolation_level=None)
    base.execute("PRAGMA secure_delete=ON")
    base.execute("CREATE VIRTUAL TABLE words USING fts5(text, content='', tokenize=\"unicode61 remove_diacritics 2\")")
    texts = ["my passphrase is Zanzibarínto", "hers is zanzibarella and passport", "nothing of note"]
    for row, text in enumerate(texts, 1):
        base.execute("INSERT INTO words(rowid, text) VALUES(?, ?)", (row, text))
    base.execute("INSERT INTO words(words, rowid, text) VALUES('delete', 1, ?)", (texts[0],))
    kept = {"kept": lambda: [*texts[1:], *(row[0] for row in base.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"))]}
    found = scan([tmp_path / "words.sqlite"], texts[:1], **kept).found
    assert {one.kind for one in found} == {"word"}
    base.execute("INSERT INTO words(words) VALUES('delete-all')")
    for row, text in enumerate(texts[1:], 2):
        base.execute("INSERT INTO words(rowid, text) VALUES(?, ?)", (row, text))
    base.execute("VACUUM")
    assert scan([tmp_path / "words.sqlite"], texts[:1], **kept).clean


def test_the_ending_of_a_word_that_shares_its_beginning_with_another_is_found(tmp_path):
    (tmp_path / "page").write_bytes(junk(99) + b"\x05barmecidal" + junk(99, 1))
    assert [one.kind for one in scan([tmp_path / "page"], ["the zanzibarmecidal key"]).found]


def test_what_is_also_kept_is_no_residue_and_the_rest_of_the_text_is(tmp_path):
    shared, own = "We had agreed on the usual terms", ", and on paying Quillfeather."
    (tmp_path / "page").write_bytes(shared.encode() + own.encode())
    assert scan([tmp_path / "page"], [shared + own]).found
    (tmp_path / "page").write_bytes(shared.encode())
    seen = scan([tmp_path / "page"], [shared + own], kept=lambda: ["Hello. " + shared.upper() + ", as ever"])
    assert seen.clean and seen.left_out > 0
    vector = unit(1, 384)
    (tmp_path / "page").write_bytes(encode_vector(vector, "float16"))
    assert scan([tmp_path / "page"], [], [vector], kept_vectors=lambda: [np.stack([unit(2, 384), vector])]).clean


def test_what_is_found_is_told_without_saying_it(tmp_path):
    (tmp_path / "page").write_bytes(TEXT.encode())
    told = repr(scan([tmp_path / "page"], [TEXT]))
    assert not any(word in told.casefold() for word in ("vault", "perlmutter", "zürich", "wednesday"))


def test_chance_finds_nothing_in_noise(tmp_path):
    (tmp_path / "noise").write_bytes(junk(1 << 21))
    words = [f"word{number:04d} of the erased text, number {number}" for number in range(300)]
    assert scan([tmp_path / "noise"], words, [unit(seed, 384) for seed in range(5)]).clean


def test_short_texts_are_counted_and_padding_is_not_looked_for(tmp_path):
    (tmp_path / "page").write_bytes(b"ok" + b"\0" * 100 + b"aaaaaaaaaaaaaaaaaaaaaaaaaaa")
    seen = scan([tmp_path / "page"], ["ok", "a" * 27], [np.zeros(64, np.float32)])
    assert seen.clean and seen.short == 1


def test_the_matcher_finds_what_a_search_one_by_one_finds():
    draw = np.random.default_rng(0)
    data = bytes(draw.integers(97, 100, 4000, dtype=np.uint8))
    wanted = {data[at : at + size] for at, size in zip(draw.integers(0, 3900, 60).tolist(), draw.integers(8, 40, 60).tolist())} | {b"zzzzzzzzzz"}
    one_by_one = {(at, needle) for needle in wanted for at in range(len(data)) if data.startswith(needle, at)}
    assert set(Matcher(wanted).find(data)) == one_by_one
    for size in range(12):
        assert set(Matcher(wanted).find(data[:size])) == {(at, needle) for at, needle in one_by_one if at + len(needle) <= size}


def test_a_file_that_went_meanwhile_holds_nothing_and_one_that_cannot_be_read_is_no_proof(tmp_path):
    assert scan([tmp_path / "gone"], [TEXT]).files == 0
    (tmp_path / "folder").mkdir()
    with pytest.raises(Mistake, match="cannot be read"):
        scan([tmp_path / "folder"], [TEXT])


def test_odd_texts_can_be_looked_for(tmp_path):
    (tmp_path / "page").write_bytes(junk(100))
    odd = ["", " " * 50, "\ud800half", "İ" * 20, "\x00\x01\x02" * 9, "👩‍👩‍👧" * 8, "a" * 100_000]
    assert scan([tmp_path / "page"], odd).clean
    assert needles_of([]) == {}
