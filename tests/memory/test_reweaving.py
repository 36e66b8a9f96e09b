"""Memory reweaving: exact in its two limits, blind to what comes later, the same however it is read, and kept to its budget."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from remanence.errors import Mistake
from remanence.memory.reweaving import reweave, train_reweaver
from remanence.memory.rewoven import Rewoven
from remanence.memory.salience import add_moments, best, hashed, merge_groups, standard
from toy import toy_lm, toy_tokenizer

W, C, T = 12, 4, 45
FAMILIES = ["llama", "gpt2", "qwen2", "qwen3", "mistral", "gpt_neox", "phi", "phi3", "gemma"]
STORY = "Once upon a time there was a little girl named Lily. She loved to play outside in the sun with her red ball and her dog Max. "


def tokens(rows: int = 2, length: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def windowed(model: Any, ids: torch.Tensor, window: int = W, chunk: int = C) -> torch.Tensor:
    """Logits of the plain model, each token seeing its chunk so far and `window` tokens in front of the chunk."""
    t = torch.arange(ids.shape[1])
    seen = (t[None] <= t[:, None]) & (t[None] >= (t[:, None] // chunk * chunk - window))
    bias = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=bias.expand(len(ids), 1, -1, -1), position_ids=t[None]).logits


def dense(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@torch.no_grad()
def logits(woven: Rewoven, ids: torch.Tensor, pieces: int | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
    memory, found = woven.new_memory(), []
    for first in range(0, ids.shape[1], pieces or ids.shape[1]):
        part = slice(first, first + (pieces or ids.shape[1]))
        found.append(woven(ids[:, part], None if mask is None else mask[:, part], cache=memory).logits)
    return torch.cat(found, 1)


def stories() -> tuple[Any, torch.Tensor]:
    folder = Path(os.environ.get("REMANENCE_DATA", "")) / "stories260k"
    if not (folder / "config.json").is_file():
        pytest.skip("REMANENCE_DATA names no folder with stories260k")
    ids = AutoTokenizer.from_pretrained(folder)(STORY * 3, return_tensors="pt").input_ids[:, :180]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), ids


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_held_is_the_windowed_model(family: str) -> None:
    model, ids = toy_lm(family), tokens()
    wanted = windowed(model, ids)
    assert (dense(model, ids) - wanted).abs().max() > 1e-2  # the window does cut
    torch.testing.assert_close(logits(reweave(model, W, 0, chunk=C), ids), wanted, atol=1e-5, rtol=0)
    deaf = reweave(model, W, 16, chunk=C)
    with torch.no_grad():
        deaf.reconstructor.gamma.zero_()
    torch.testing.assert_close(logits(deaf, ids), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("train", [False, True], ids=["as keys", "through the layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_held_is_dense_attention(family: str, train: bool) -> None:
    model, ids = toy_lm(family), tokens()
    woven = reweave(
        model, W, T, chunk=C, reconstruct="lowrank" if train else "identity", train=train
    )  # zero adapters: hidden states as they are
    assert woven.as_keys is not train
    torch.testing.assert_close(logits(woven, ids), dense(model, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("reconstruct", ["identity", "lowrank"])
def test_both_limits_hold_on_a_real_model(reconstruct: str) -> None:
    model, ids = stories()
    torch.testing.assert_close(logits(reweave(model, 32, 0, chunk=8), ids), windowed(model, ids, 32, 8), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(reweave(model, 32, 180, chunk=8, reconstruct=reconstruct), ids), dense(model, ids), atol=1e-4, rtol=0)


def test_after_use_the_model_is_as_it_was() -> None:
    model, ids = toy_lm("llama"), tokens()
    before, how = dense(model, ids), model.config._attn_implementation
    logits(reweave(model, W, 8, chunk=C), ids)
    assert model.config._attn_implementation == how
    assert torch.equal(dense(model, ids), before)


@pytest.mark.parametrize("reconstruct", ["identity", "lowrank"])
def test_zero_adapters_are_the_training_free_mode(reconstruct: str) -> None:
    model, ids = toy_lm("llama"), tokens()
    free = logits(reweave(model, W, 8, chunk=C), ids)
    torch.testing.assert_close(logits(reweave(model, W, 8, chunk=C, reconstruct=reconstruct, train=True), ids), free, atol=1e-5, rtol=0)


@pytest.mark.parametrize("score", ["surprisal", "mix", "attention"])
def test_a_later_token_changes_nothing_before_it(score: str) -> None:
    woven, ids, s = reweave(toy_lm("llama"), W, 8, chunk=C, score=score), tokens(), 33
    other = ids.clone()
    other[:, s] = (other[:, s] - 1) % 62 + 2
    first, second = logits(woven, ids), logits(woven, other)
    assert torch.equal(first[:, :s], second[:, :s])
    assert not torch.equal(first[:, s:], second[:, s:])
    chosen = []
    for text in (ids, other):
        memory = woven.new_memory()
        with torch.no_grad():
            woven(text[:, :s], cache=memory)
        chosen.append(memory.inspect())
    assert chosen[0] == chosen[1]
    assert chosen[0]


@pytest.mark.parametrize("score", ["surprisal", "attention", "random", "uniform", "recency", "mix", {"surprisal": 1.0, "recency": 0.5}])
def test_budget_holds_and_streaming_is_sorting(score: Any) -> None:
    model, ids, budget, sinks = toy_lm("llama"), tokens(rows=2, length=90), 10, 4
    small, whole = reweave(model, W, budget, chunk=C, score=score, sinks=sinks), reweave(model, W, 90, chunk=C, score=score, sinks=sinks)
    if score in ("surprisal", "attention", "mix") or isinstance(score, dict):  # the same logits for both, so that their scores agree
        for woven in (small, whole):
            with torch.no_grad():
                woven.reconstructor.gamma.zero_()
    memories = {}
    for woven in (small, whole):
        memory = memories[woven] = woven.new_memory()
        for first in range(0, 90, 7):
            with torch.no_grad():
                woven(ids[:, first : first + 7], cache=memory)
            assert memory.stats()["held"] <= woven.settings.budget
    for row in range(2):
        every = memories[whole].inspect(row)
        ranked = sorted(every, key=lambda entry: (entry["position"] < sinks, entry["score"], entry["position"]), reverse=True)[:budget]
        assert [entry["position"] for entry in memories[small].inspect(row)] == sorted(entry["position"] for entry in ranked)


def test_all_layers_hold_the_same_tokens() -> None:
    model, ids = toy_lm("llama", layers=3), tokens(rows=1)
    woven = reweave(model, W, 8, chunk=C, reconstruct="lowrank")
    memory = woven.new_memory()
    with torch.no_grad():
        woven(ids, cache=memory)
        states = reweave(model, W, T, chunk=C).base(ids, output_hidden_states=True).hidden_states
    place = memory.tensors["held.position"][0].long()
    assert all(memory.tensors[f"held.h.{layer}"].shape[1] == len(place) for layer in range(3))
    assert torch.equal(memory.tensors["held.id"][0], ids[0, place])
    torch.testing.assert_close(memory.tensors["held.h.0"][0], states[0][0, place])  # the lowest layer's input is the embedding


@pytest.mark.parametrize(
    "settings", [{}, {"reconstruct": "lowrank"}, {"score": "mix"}, {"positions": "rebased"}, {"reconstruct": "mean"}], ids=str
)
@pytest.mark.parametrize("pieces", [1, 3, 17])
def test_reading_in_pieces_is_reading_at_once(settings: dict[str, Any], pieces: int) -> None:
    woven, ids = reweave(toy_lm("llama", dtype=torch.float64), W, 8, chunk=C, **settings), tokens()
    torch.testing.assert_close(logits(woven, ids, pieces), logits(woven, ids), atol=1e-10, rtol=0)


def test_chunk_of_one_updates_at_every_token() -> None:
    model, ids = toy_lm("llama", dtype=torch.float64), tokens()
    woven = reweave(model, W, 8, chunk=1)
    torch.testing.assert_close(logits(woven, ids, 1), logits(woven, ids), atol=1e-10, rtol=0)
    torch.testing.assert_close(logits(reweave(model, W, 0, chunk=1), ids), windowed(model, ids, W, 1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("settings", [{"score": "mix"}, {"reconstruct": "mean"}, {"positions": "rebased"}], ids=str)
def test_masked_tokens_change_nothing_and_rows_share_nothing(settings: dict[str, Any]) -> None:
    woven, ids = reweave(toy_lm("llama", dtype=torch.float64), W, 8, chunk=C, **settings), tokens(rows=3, length=40)
    real = torch.rand(3, 60, generator=torch.Generator().manual_seed(1)).argsort(1).argsort(1) < 40  # 40 of 60 columns hold a token
    real[2] = torch.arange(60) >= 20  # padding on the left, as generate has it
    padded = torch.full((3, 60), 5)
    padded[real] = ids.flatten()
    together = logits(woven, padded, 13, mask=real.long())
    for row in range(3):
        torch.testing.assert_close(together[row][real[row]], logits(woven, ids[row : row + 1])[0], atol=1e-10, rtol=0)


def test_only_the_listed_parameters_are_trained_and_the_base_keeps_its_bits() -> None:
    model = toy_lm("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    woven = reweave(model, W, 8, chunk=C, reconstruct="lowrank", train=True)
    trained = {name: weight.clone() for name, weight in woven.reconstructor.named_parameters()}
    train_reweaver(
        woven, ["the code is 1234. " * 5, "she sells sea shells by the sea shore. " * 2], 3, processor=toy_tokenizer(), progress=False
    )
    assert set(trained) == {"gamma", "tau", "gain", "up", "down"}
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(weight.requires_grad for weight in model.parameters())
    moved = {name for name, weight in woven.reconstructor.named_parameters() if not torch.equal(weight, trained[name])}
    assert moved == set(trained)


def test_a_trained_reconstructor_is_saved_and_taken_over(tmp_path: Path) -> None:
    model, ids = toy_lm("llama"), tokens()
    woven = reweave(model, W, 8, chunk=C, reconstruct="lowrank", train=True)
    with torch.no_grad():
        woven.reconstructor.up.normal_(generator=torch.Generator().manual_seed(0))
    woven.save_reconstructor(tmp_path / "reweaver.safetensors")
    fresh = reweave(model, W, 8, chunk=C, reconstruct="lowrank", seed=5)
    assert not torch.equal(logits(fresh, ids), logits(woven, ids))
    fresh.load_reconstructor(tmp_path / "reweaver.safetensors")
    assert torch.equal(logits(fresh, ids), logits(woven, ids))
    with pytest.raises(Mistake, match="reconstruct=lowrank"):
        reweave(model, W, 8, chunk=C).load_reconstructor(tmp_path / "reweaver.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_loss_and_the_codes_error(precision: str) -> None:
    model, ids = toy_lm("llama"), tokens(rows=2, length=32)
    from remanence.training.batches import Batches
    from remanence.training.trainer import Settings

    woven = reweave(model, W, 8, chunk=C, reconstruct="autoenc", train=True)
    batches = Batches({"input_ids": ids, "labels": ids}, 2)

    def measured() -> tuple[float, float]:
        with torch.no_grad():
            found = woven(ids, labels=ids)
        return float(found.loss), float(woven.code_error)

    first = measured()
    train_reweaver(woven, batches, 12, settings=Settings(steps=12, batch_size=2, lr=1e-2, precision=precision), progress=False)
    second = measured()
    assert second[0] < first[0]
    assert second[1] < first[1] < 1.0


@pytest.mark.parametrize("reconstruct", ["identity", "lowrank", "mean", "autoenc"])
@pytest.mark.parametrize("score", ["surprisal", "attention", "random", "uniform", "recency", "mix"])
def test_every_score_and_reconstruction_runs(score: str, reconstruct: str) -> None:
    woven = reweave(toy_lm("llama", layers=4), W, 8, chunk=C, score=score, reconstruct=reconstruct, layers="third")
    assert logits(woven, tokens(rows=1, length=25)).isfinite().all()


@pytest.mark.parametrize("reconstruct", ["identity", "lowrank", "autoenc", "mean"])
def test_a_model_in_bf16_reads(reconstruct: str) -> None:
    woven = reweave(toy_lm("llama", dtype=torch.bfloat16), W, 8, chunk=C, reconstruct=reconstruct, score="mix")
    found = logits(woven, tokens())
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


def test_the_models_own_ways_of_generating_are_kept() -> None:
    model = toy_lm("llama")
    model.generation_config.eos_token_id, model.generation_config.max_new_tokens = 7, 3
    woven = reweave(model, W, 8, chunk=C)
    assert woven.generation_config.eos_token_id == 7
    assert woven.generate(tokens(rows=1, length=5), do_sample=False).shape[1] <= 8


@pytest.mark.parametrize("settings", [{}, {"reconstruct": "autoenc", "score": "mix"}, {"positions": "rebased"}], ids=str)
def test_saved_memory_goes_on_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    woven, ids = reweave(toy_lm("llama"), W, 8, chunk=C, **settings), tokens()
    woven.read(ids[:, :30])
    woven.memory.save(tmp_path / "memory.safetensors")
    onwards = woven.read(ids[:, 30:], logits_to_keep=0).logits
    woven.memory.clear()
    assert woven.memory.inspect() == []
    woven.memory.load(tmp_path / "memory.safetensors")
    assert torch.equal(woven.read(ids[:, 30:], logits_to_keep=0).logits, onwards)
    with pytest.raises(Mistake, match="window"):
        reweave(toy_lm("llama"), 16, 8, chunk=C, **settings).memory.load(tmp_path / "memory.safetensors")


def test_clear_starts_anew_and_drop_removes_those_entries_alone() -> None:
    model, ids = toy_lm("llama"), tokens()
    woven = reweave(model, W, 8, chunk=C)
    first = woven.read(ids, logits_to_keep=0).logits
    held = woven.memory.inspect(0)
    common = [entry["position"] for entry in held[1:3]]
    woven.memory.drop(common, row=0)
    assert woven.memory.inspect(0) == [held[0], *held[3:]]
    assert len(woven.memory.inspect(1)) == 8
    with pytest.raises(Mistake, match="is not held"):
        woven.memory.drop([999])
    woven.memory.drop([entry["position"] for entry in woven.memory.inspect(0)], row=0)
    woven.memory.drop([entry["position"] for entry in woven.memory.inspect(1)], row=1)
    assert woven.memory.stats()["held"] == 0
    woven.memory.clear()
    assert torch.equal(woven.read(ids, logits_to_keep=0).logits, first)


def test_dropping_everything_leaves_the_window() -> None:
    model, ids = toy_lm("llama", layers=1), tokens(rows=1)  # with one layer the window's keys know nothing of the memory
    woven = reweave(model, W, 8, chunk=C)
    woven.read(ids[:, :40])
    woven.memory.drop([entry["position"] for entry in woven.memory.inspect()])
    torch.testing.assert_close(woven.read(ids[:, 40:44], logits_to_keep=0).logits, windowed(model, ids)[:, 40:44], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generate_is_reading_on_token_by_token(family: str) -> None:
    model, ids = toy_lm(family), tokens(rows=2, length=20)
    woven = reweave(model, W, 8, chunk=C)
    woven.read(ids[:, :7])
    rest = ids[:, 7:]
    made = woven.generate(rest, attention_mask=torch.ones_like(rest), max_new_tokens=15, do_sample=False, eos_token_id=None)
    made = torch.cat([ids[:, :7], made], 1)
    assert made.shape == (2, 35)
    again = logits(woven, made)
    assert torch.equal(again[:, 19:-1].argmax(-1), made[:, 20:])
    assert woven.memory.get_seq_length() == 34
    more = woven.generate(made[:, -1:], max_new_tokens=3, do_sample=False, eos_token_id=None)  # goes on from the memory
    assert torch.equal(logits(woven, torch.cat([made, more[:, 1:]], 1))[:, 34:-1].argmax(-1), more[:, 1:])
    with pytest.raises(Mistake, match="holds 2 sequences"):
        woven.generate(ids[:1], max_new_tokens=1)


def test_fewer_logits_are_the_last_of_all() -> None:
    woven, ids = reweave(toy_lm("llama"), W, 8, chunk=C), tokens()
    with torch.no_grad():
        whole = woven(ids).logits
        for keep in (1, 3, 20):
            assert torch.equal(woven(ids, logits_to_keep=keep).logits, whole[:, -keep:])
        assert torch.equal(woven(ids, logits_to_keep=torch.tensor([-7, -2])).logits, whole[:, [-7, -2]])


def test_beams_carry_their_own_memories() -> None:
    woven, ids = reweave(toy_lm("llama"), W, 8, chunk=C), tokens(rows=1, length=20)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    found = woven.generate(ids, cache=woven.new_memory(), return_dict_in_generate=True, output_scores=True, **options)
    text = found.sequences
    logp = logits(woven, text).log_softmax(-1)[0, 19:-1].gather(1, text[0, 20:, None]).sum()
    torch.testing.assert_close(found.sequences_scores[0] * 8, logp, atol=1e-4, rtol=1e-4)


def test_rebased_positions_read_beyond_the_models_range() -> None:
    model, ids = toy_lm("llama"), tokens(rows=1, length=300)
    with pytest.raises(Mistake, match="rebased"):
        logits(reweave(model, W, 8, chunk=C), ids)
    woven = reweave(model, W, 8, chunk=C, positions="rebased")
    assert logits(woven, ids).isfinite().all()
    torch.testing.assert_close(logits(woven, ids[:, :16]), dense(model, ids[:, :16]), atol=1e-4, rtol=0)  # nothing has left yet


def test_rebased_positions_lie_right_in_front_of_the_window() -> None:
    model, ids = toy_lm("llama", layers=1, dtype=torch.float64), tokens(rows=1, length=40)
    woven = reweave(model, W, 6, chunk=C, positions="rebased", score="recency", sinks=0)
    torch.testing.assert_close(logits(woven, ids), windowed(model, ids, W + 6, C), atol=1e-10, rtol=0)  # the newest, where they were


@torch.no_grad()
def test_overhead_is_measured() -> None:
    """Milliseconds per token stand in the claim and in `benchmarks reweaving`; bytes are exact, so they are held here against the window and dense attention."""
    model = toy_lm("llama", layers=4)
    token = 4 * 2 * 16 * 4  # bytes of a token's keys and values: 4 layers, 2 heads of 8
    for length in (60, 120):
        ids = tokens(rows=1, length=length)
        found = {}
        for name, budget in (("window", 0), ("woven", 16)):
            woven = reweave(model, W, budget, chunk=C)
            woven.read(ids)
            found[name] = woven.memory.stats()
            assert found[name]["window"] == W
        assert found["window"]["held bytes"] == 0
        assert found["woven"]["held bytes"] == 16 * (token + 8 * 3)  # place, id, score
        assert found["woven"]["window bytes"] == found["window"]["window bytes"] == W * (token + 8 * 4)  # place, id, score's two features
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, cache=cache, use_cache=True)
        assert sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers) == length * token


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 3, "chunk": 4}, "the chunk 4"),
        ({"budget": 2}, "below the 4 sinks"),
        ({"layers": [7]}, "cannot be"),
        ({"score": "novelty"}, "unknown rule"),
        ({"reconstruct": "pca"}, "unknown value"),
        ({"positions": "alibi"}, "unknown value"),
        ({"reconstruct": "mean", "window": 10, "chunk": 5}, "does not divide"),
        ({"positions": "rebased", "budget": 500}, "exceeds the 128 positions"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(Mistake, match=words):
        reweave(toy_lm("llama"), **{"window": W, "budget": 8, "chunk": C, **settings})


def test_models_that_cannot_be_reached_into_are_refused() -> None:
    from transformers import AutoModelForMaskedLM, BertConfig

    encoder = AutoModelForMaskedLM.from_config(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=64)
    )
    with pytest.raises(Mistake, match="no causal language model"):
        reweave(encoder, W, 8)
    with pytest.raises(Mistake, match="soft capping"):
        reweave(toy_lm("gemma2"), W, 8)
    with pytest.raises(Mistake, match="cannot be rebased"):
        reweave(toy_lm("gpt2"), W, 8, positions="rebased")
    quantised = toy_lm("llama")
    for block in quantised.model.layers:
        block.self_attn.k_proj.weight = torch.nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(Mistake, match="quantised"):
        reweave(quantised, W, 8, reconstruct="lowrank", train=True)
    with pytest.raises(Mistake, match="train=False"):
        train_reweaver(reweave(toy_lm("llama"), W, 8), ["text"], 1)


def test_surprisal_is_minus_log_p_across_chunks_and_calls() -> None:
    model, ids = toy_lm("llama"), tokens(rows=2)
    woven = reweave(model, W, T, chunk=C, sinks=0)
    memory = woven.new_memory()
    with torch.no_grad():
        for first in range(0, T, 5):
            woven(ids[:, first : first + 5], cache=memory)
    logp = dense(model, ids).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    wanted = torch.cat([torch.full((2, 1), math.log(64)), -logp], 1)[:, : T // C * C - W]
    torch.testing.assert_close(memory.tensors["held.score"].float(), wanted, atol=1e-4, rtol=0)


def test_best_takes_sinks_then_scores_then_the_newest() -> None:
    score, position = torch.tensor([[0.0, 5.0, 2.0, 2.0, 9.0, 1.0]]), torch.tensor([[0.0, 3.0, 4.0, 6.0, -1.0, 8.0]])
    assert best(score, position, 3, 1).tolist() == [[0, 1, 3]]
    assert best(score, position, 6, 1).tolist() == [[0, 1, 2, 3, 5, 4]]


def test_neighbours_are_averaged_and_sinks_stay_whole() -> None:
    gone = {
        "position": torch.tensor([[0.0, 1, 2, 3, -1]]),
        "score": torch.tensor([[4.0, 1, 3, 5, 99]]),
        "id": torch.tensor([[7, 8, 9, 6, 5]]),
    }
    merged = merge_groups(gone | {"h.0": torch.arange(5.0).view(1, 5, 1)}, 2, 2)
    assert merged["position"].tolist() == [[0, 1, 2.5]]
    assert merged["score"].tolist() == [[4, 1, 4]]
    assert merged["id"].tolist() == [[7, 8, 9]]
    assert merged["h.0"].flatten().tolist() == [0, 1, 2.5]


def test_running_moments_are_those_of_everything_at_once() -> None:
    values = torch.randn(2, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    moments = torch.zeros(2, 3, 3, dtype=torch.float64)
    for first in range(0, 20, 6):
        moments = add_moments(moments, values[..., first : first + 6], valid[:, first : first + 6])
    for row in range(2):
        kept = values[row][:, valid[row]]
        wanted = (kept - kept.mean(1, keepdim=True)) / kept.std(1, correction=0, keepdim=True)
        torch.testing.assert_close(standard(values, moments)[row][:, valid[row]], wanted)


def test_hashes_are_uniform_and_depend_on_the_seed() -> None:
    draws = hashed(torch.arange(20000), 0)
    assert abs(float(draws.mean()) - 0.5) < 0.01
    assert abs(float(draws.std()) - 12**-0.5) < 0.01
    assert not torch.equal(draws, hashed(torch.arange(20000), 1))
    assert abs(float(torch.corrcoef(torch.stack([draws[1:], draws[:-1]]))[0, 1])) < 0.02
