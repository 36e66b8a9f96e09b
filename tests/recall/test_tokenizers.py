"""Counting tokens: what is cut fits, what is split covers, and a word that no tokenizer knows is not one token."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remanence.errors import Mistake
from remanence.recall.tokenizers import load_tokenizer

TEXTS = st.text(st.characters(codec="utf-8"), max_size=400)
NAMES = ["plain", "sentence"]


@pytest.fixture(scope="module")
def bytes_of(tmp_path_factory):
    """Return the folder of a byte-level BPE tokenizer, as most causal models have one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("bpe")
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 5, trainer)
    model.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize("name", [*NAMES, "bytes"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, tokens=st.integers(0, 40))
def test_a_cut_is_a_prefix_that_fits(bytes_of, name, text, tokens):
    tokenizer = load_tokenizer(bytes_of if name == "bytes" else name)
    cut = tokenizer.cut(text, tokens)
    assert text.startswith(cut)
    assert tokenizer.count(cut) <= tokens or tokenizer.count(text) <= tokens
    if tokenizer.count(text) <= tokens:
        assert cut == text


@pytest.mark.parametrize("name", [*NAMES, "bytes"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS.filter(bool), tokens=st.integers(3, 40))
@example(text="𐀀 ", tokens=3)
@example(text="a" + " " * 50 + "b", tokens=3)
def test_pieces_cover_the_text_in_order_without_overlap(bytes_of, name, text, tokens):
    """Three tokens at least: a sign outside of the alphabet takes a byte-level tokenizer up to four, and is never cut."""
    tokenizer = load_tokenizer(bytes_of if name == "bytes" else name)
    pieces = tokenizer.pieces(text, tokens)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == len(text)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(pieces))
    assert all(start < end for start, end in pieces)
    for start, end in pieces:
        assert tokenizer.count(text[start:end]) <= max(tokens, 4) or end - start == 1 or not text[start:end].strip()


def test_a_word_without_end_counts_a_token_per_four_characters():
    tokenizer = load_tokenizer("sentence")
    assert tokenizer.count("x" * 10_000) == 2500
    assert tokenizer.count("q" * 10_000 + " and more") == 2502
    assert len(tokenizer.cut("x" * 10_000, 100)) == 400
    pieces = tokenizer.pieces("x" * 10_000, 256)
    assert len(pieces) == 10
    assert max(end - start for start, end in pieces) == 1024


def test_word_pieces_are_counted_as_the_model_reads_them():
    assert load_tokenizer("sentence").count("Ana moved to Lisbon.") == 5
    assert load_tokenizer("plain").count("Ana moved to Lisbon.") == 5


def test_what_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(Mistake, match="tokenizer"):
        load_tokenizer(str(tmp_path / "nothing"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"no": "tokenizer"}))
    with pytest.raises(Mistake, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_threads_share_a_tokenizer():
    from concurrent.futures import ThreadPoolExecutor

    tokenizer = load_tokenizer("sentence")
    texts = [f"Turn {number} is about {'many ' * (number % 50)}things." for number in range(400)]
    alone = [tokenizer.count(text) for text in texts]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(tokenizer.count, texts)) == alone


def test_blanks_alone_are_no_chunk():
    from remanence.recall.embedders import load_embedder
    from remanence.recall.turns import chunked

    text = "one" + " \n" * 400 + "two"
    (chunks,) = chunked(load_embedder("hashing"), load_tokenizer("plain"), [text], 1)
    assert [text[chunk.start : chunk.end].strip() for chunk in chunks] == ["one", "two"]
