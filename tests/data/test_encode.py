"""What the model reads: only answers are supervised, text loses nothing, images are processed when they are taken."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from remanence.data.encode import IGNORED, encode_rows, feature_columns
from remanence.errors import Mistake
from remanence.training.batches import Batches
from toy import toy_tokenizer

TOKENIZER = toy_tokenizer(128)
WORDS = st.text("abc XYZ.?", min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_exactly_the_answer_and_the_end_are_supervised(pairs: list[tuple[str, str]]) -> None:
    rows = Dataset.from_dict({"question": [q for q, _ in pairs], "answer": [a for _, a in pairs]})
    for (question, answer), row in zip(pairs, encode_rows(rows, "qa", TOKENIZER, length=128), strict=True):
        taught = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        assert taught[-1] == TOKENIZER.eos_token_id
        assert TOKENIZER.decode(taught[:-1]).replace(" ", "") == answer.replace(" ", "")
        whole = TOKENIZER.decode(row["input_ids"][:-1])
        assert whole.replace(" ", "") == f"Q: {question}\nA: {answer}".replace(" ", "")


def test_text_is_cut_into_blocks_without_loss() -> None:
    texts = ["one two three four", "five", "six seven"]
    rows = encode_rows(Dataset.from_dict({"text": texts}), "text", TOKENIZER, length=7)
    line = [token for row in rows for token in row["input_ids"]]
    wanted = [token for text in texts for token in [*TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]]
    assert line == wanted[: len(line)]
    assert len(wanted) - len(line) <= 1  # a last single token has no target
    assert {len(row["input_ids"]) for row in rows.select(range(len(rows) - 1))} == {7}


@pytest.mark.parametrize(
    ("row", "problem"),
    [({"question": "a", "answer": " "}, "row 1: the answer is empty"), ({"question": "b" * 90, "answer": "c"}, "row 1: has")],
)
def test_bad_rows_are_named_by_number(row: dict, problem: str) -> None:
    rows = Dataset.from_list([{"question": "fine", "answer": "fine"}, row])
    with pytest.raises(Mistake, match=problem):
        encode_rows(rows, "qa", TOKENIZER, length=64)


def test_only_the_assistants_turns_are_supervised() -> None:
    tokenizer = toy_tokenizer(128)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "ok"}]
    (row,) = encode_rows(Dataset.from_dict({"messages": [messages]}), "chat", tokenizer)
    taught = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(taught).replace(" ", "") == "a:yes;"


def test_images_are_decoded_when_they_are_taken_and_keep_their_labels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    rows = Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels], "label": [3, 1, 4, 1, 5]})
    batches = Batches(encode_rows(rows, "images", None), 2, seed=1)
    batch, numbers = batches[1], batches.numbers(1)
    assert batch["labels"].tolist() == [[3, 1, 4, 1, 5][number] for number in numbers]
    np.testing.assert_allclose(batch["pixel_values"].numpy(), pixels[numbers].transpose(0, 3, 1, 2) / np.float32(255), rtol=1e-6)


def test_features_become_pixel_values() -> None:
    rows = Dataset.from_dict({"features": np.arange(12.0).reshape(3, 2, 2).tolist(), "label": [0, 1, 2]})
    (batch,) = Batches(encode_rows(rows, "classes", None), 3)
    assert batch["pixel_values"].tolist() == np.arange(12.0).reshape(3, 2, 2).tolist()
    assert batch["labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("chosen", [None, [4, 0, 2], [1]])
@pytest.mark.parametrize("typed", [True, False])
def test_features_straight_from_arrow_equal_the_encoded_ones(chosen: list[int] | None, typed: bool) -> None:
    import datasets

    made = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    form = datasets.Features({"features": datasets.Array2D((3, 2), "float32"), "label": datasets.Value("int64")}) if typed else None
    rows = datasets.concatenate_datasets(
        [
            Dataset.from_dict({"features": made[part].tolist(), "label": list(range(5))[part]}, features=form)
            for part in (slice(2), slice(2, 5))
        ]
    )
    rows = rows if chosen is None else rows.select(chosen)
    (wanted,) = Batches(encode_rows(rows, "classes", None), 9)
    found = feature_columns(rows)
    assert found is not None
    assert found["pixel_values"].tolist() == wanted["pixel_values"].tolist()
    assert found["labels"].tolist() == wanted["labels"].tolist()


def test_features_of_several_shapes_are_left_to_the_slow_way() -> None:
    assert feature_columns(Dataset.from_dict({"features": [[1.0], [1.0, 2.0]], "label": [0, 1]})) is None
