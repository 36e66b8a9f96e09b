"""A row may carry a second answer: ragged columns beside its own, padded as tokens and labels are."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from remanence.training.batches import IGNORED, Batches


def test_a_ragged_column_is_padded_by_its_name() -> None:
    first = Batches(Dataset.from_dict({"input_ids": [[5, 6], [7]], "labels": [[5, 6], [7]]}), 2, shuffle=False, pad=9)
    other = Batches(Dataset.from_dict({"input_ids": [[1], [2, 3, 4]], "labels": [[IGNORED], [IGNORED, 3, 4]]}), 2, shuffle=False, pad=9)
    both = first.with_column("won_input_ids", other.columns["input_ids"]).with_column("won_labels", other.columns["labels"])  # type: ignore[arg-type]
    batch = both.take(np.array([1, 0]))
    assert batch["input_ids"].tolist() == [[7, 9], [5, 6]]
    assert batch["won_input_ids"].tolist() == [[2, 3, 4], [1, 9, 9]]
    assert batch["won_labels"].tolist() == [[IGNORED, 3, 4], [IGNORED, IGNORED, IGNORED]]
    assert batch.own_tokens() == 1  # a second answer does not change what a mean divides by
    with pytest.raises(ValueError, match="does not fit"):
        both.with_column("won_labels", other.columns["labels"])  # type: ignore[arg-type]
