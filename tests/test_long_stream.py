"""The long stream is read with a state of constant size, and its loss is that of one reading."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from remanence.memory.lm import TitansConfig, TitansForCausalLM
from remanence.models.forward import fresh_weights
from remanence.models.load import save_model
from toy import toy_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.long_stream import read

TEXT = "the quick brown fox jumps over the lazy dog\n"


def test_a_stream_is_read_with_a_state_of_constant_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.long_stream.PIECE", 8)
    tokenizer = toy_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "window": 8, "n_persistent": 0}
    with fresh_weights(0):
        model = TitansForCausalLM(TitansConfig(vocab_size=len(tokenizer), memory={"chunk": 8, "heads": 2}, **shape)).eval()
    save_model(model, tokenizer, tmp_path / "model")
    rows = read(str(tmp_path / "model"), TEXT, 128, say=False)
    assert [row["tokens"] for row in rows] == [8 * (part + 1) for part in range(16)]
    assert len({row["state"] for row in rows}) == 1
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])[
        torch.arange(128) % len(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    ]
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    for part, row in enumerate(rows):  # a token's loss is counted where its predecessor stands in the same piece
        assert row["loss"] == pytest.approx(float(losses[8 * part : 8 * part + 7].mean()), abs=1e-4)
