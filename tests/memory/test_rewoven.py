"""A rewoven decoder as a model among models: saved, loaded, built from a configuration, trained by a learner, asked and watched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from remanence.errors import Mistake
from remanence.learn.sequential import Sequential
from remanence.memory.asking import opening
from remanence.memory.reweaving import reweave
from remanence.memory.rewoven import Rewoven
from remanence.memory.rewoven_config import RewovenConfig, config_of
from remanence.memory.state import MemoryState
from remanence.models.adapters import add_lora
from remanence.models.load import load_model, save_model, weights_hash
from remanence.models.roles import weights_by_role
from remanence.recipe import probes_for
from remanence.stream import Moment, Task
from remanence.training.trainer import Settings, Trainer
from toy import toy_lm, toy_tokenizer

W, M = 12, 8


def tokens(rows: int = 1, length: int = 45, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def trained(family: str = "llama", **settings: Any) -> Rewoven:
    """Return a model whose reconstructor is no longer at its start."""
    model = reweave(toy_lm(family), W, M, train=True, **{"reconstruct": "lowrank", **settings})
    with torch.no_grad():
        for parameter in model.reconstructor.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma", "gpt_neox"])
def test_a_saved_model_loads_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = trained(family)
    save_model(model, toy_tokenizer(), tmp_path / "saved")
    for loaded in (load_model(tmp_path / "saved").model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert isinstance(loaded, Rewoven)
        assert weights_hash(loaded) == weights_hash(model)
        assert loaded.signature == model.signature
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
        moving = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert moving == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(name.startswith("reconstructor.") for name in moving)


def test_a_configuration_names_where_the_decoder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer = toy_lm("llama"), toy_tokenizer()
    save_model(base, tokenizer, tmp_path / "base")
    monkeypatch.setenv("TOY", str(tmp_path))
    tree = {"model_type": "rewoven", "base": "${TOY}/base", "window": W, "budget": M, "score": {"surprisal": 1.0, "recency": 0.5}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    loaded = load_model(f"config:{tmp_path / 'config.json'}")
    assert weights_hash(loaded.model.base) == weights_hash(base)  # type: ignore[arg-type]
    assert loaded.processor("the dog")["input_ids"] == tokenizer("the dog")["input_ids"]
    by_hand = reweave(base, W, M, score={"surprisal": 1.0, "recency": 0.5})
    assert torch.equal(loaded.model(tokens()).logits, by_hand(tokens()).logits)
    save_model(loaded.model, loaded.processor, tmp_path / "saved")  # whole: the base's folder is needed no more
    (tmp_path / "base" / "model.safetensors").unlink()
    assert torch.equal(load_model(tmp_path / "saved").model(tokens()).logits, by_hand(tokens()).logits)


def test_fresh_weights_for_a_configuration_follow_the_seed(tmp_path: Path) -> None:
    config = RewovenConfig(base=toy_lm("gpt2").config.to_dict(), window=W, budget=M)
    config.save_pretrained(tmp_path)
    one, same, other = (load_model(f"config:{tmp_path}", seed=seed).model for seed in (1, 1, 2))
    assert weights_hash(one) == weights_hash(same) != weights_hash(other)


def test_a_learner_trains_the_reconstructor_alone(tmp_path: Path) -> None:
    base = toy_lm("llama")
    before = weights_hash(base)
    model, tokenizer = reweave(base, W, M, reconstruct="autoenc", train=True), toy_tokenizer()
    start = {name: parameter.clone() for name, parameter in model.reconstructor.named_parameters()}
    rows = Dataset.from_dict({"text": ["the quick brown fox jumps over the lazy dog " * 4] * 4})
    trainer = Trainer(Settings(steps=3, batch_size=2, lr=0.01, length=60), processor=tokenizer, progress=False)
    Sequential().learn(model, Task("fox", rows), trainer)
    assert weights_hash(base) == before
    moved = {name for name, parameter in model.reconstructor.named_parameters() if not torch.equal(parameter, start[name])}
    assert moved == set(start)
    assert model.own_loss() is not None
    assert {weight.role for weight in weights_by_role(model) if weight.name.startswith("reconstructor.")} == {"other"}


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"reconstruct": "mean", "group": 2, "chunk": 4}, {"positions": "rebased"}, {"score": "mix"}])
def test_remember_in_pieces_is_remember_at_once_and_asking_leaves_the_state(settings: dict[str, Any]) -> None:
    model, ids = reweave(toy_lm("llama"), W, M, **settings), tokens()
    whole = model.remember(ids)
    first = model.remember(ids[:, :17], piece=5)
    kept = {name: tensor.clone() for name, tensor in first.tensors.items()}
    both = model.remember(ids[:, 17:], state=first)
    assert whole.seen == both.seen == 45
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(tensor, both.tensors[name], rtol=1e-4, atol=1e-4)
    model.ask(tokens(length=5, seed=3), first, max_new_tokens=4, do_sample=False)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in first.tensors.items())
    assert model.memory.empty  # what `read` and `generate` go on from is another thing


@torch.no_grad()
def test_ask_is_generate_behind_the_same_text() -> None:
    model, ids, prompt = reweave(toy_lm("qwen2"), W, M), tokens(), tokens(length=6, seed=4)
    answer = model.ask(prompt, model.remember(ids), max_new_tokens=8, do_sample=False)
    model.read(ids)
    assert torch.equal(answer, model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)[:, 6:])
    beams = model.ask(prompt, model.remember(ids), max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams.shape == (1, 4)


def test_the_first_words_stand_behind_the_begin_of_text_token() -> None:
    tokenizer, model = toy_tokenizer(), reweave(toy_lm("llama"), W, M)
    assert opening(tokenizer) == []
    plain = tokenizer("the dog")["input_ids"]
    assert torch.equal(model.remember("the dog", tokenizer).tensors["window.id"], torch.tensor([plain]))
    end = tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", end)])
    tokenizer.bos_token = "<eos>"
    assert opening(tokenizer) == [end]
    state = model.remember("the dog", tokenizer)
    assert torch.equal(state.tensors["window.id"], torch.tensor([[end, *plain]]))
    assert model.remember(" on", tokenizer, state).seen == state.seen + len(tokenizer(" on", add_special_tokens=False)["input_ids"])
    assert model.watch("the dog", None, tokenizer)[-1]["surprisal"].shape == (1, 1, 1 + len(plain))


@torch.no_grad()
def test_generation_without_reading_keeps_nothing() -> None:
    model, prompts = reweave(toy_lm("llama"), W, M), tokens(rows=3, length=30, seed=5)
    many = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=5, do_sample=False)
    assert model.memory.empty
    for row in range(3):
        alone = model.generate(prompts[row : row + 1], attention_mask=torch.ones(1, 30), max_new_tokens=5, do_sample=False)
        assert torch.equal(alone[0], many[row])


def test_probes_that_write_answers_take_a_rewoven_model() -> None:
    rows = Dataset.from_dict({"question": ["what is it", "is it a fox that jumps over the dog"], "answer": ["a fox", "yes"]})
    moment = Moment(processor=toy_tokenizer(), seed=0)
    for name, probe in probes_for(rows, "qa", None).items():
        plain, woven = probe.measure(toy_lm("llama"), moment), probe.measure(reweave(toy_lm("llama"), 40, M), moment)
        assert woven.values == pytest.approx(plain.values, abs=1e-4), name  # nothing leaves a window of 40


@torch.no_grad()
def test_watch_says_what_each_token_cost_and_which_are_held() -> None:
    model, ids = reweave(toy_lm("llama"), W, M), tokens()
    seen = model.watch(ids)[-1]
    cost = -model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(seen["surprisal"][0, 0, 1:].float(), cost[0], rtol=1e-4, atol=1e-4)
    model.read(ids)
    held = torch.zeros(45)
    held[[int(entry["position"]) for entry in model.memory.inspect()]] = 1
    assert torch.equal(seen["held"][0, 0].float(), held)
    assert int(held.sum()) == M
    newest = 45 - (45 // (W // 4) * (W // 4) - W)
    assert torch.equal(seen["window"][0, 0], torch.cat([torch.zeros(45 - newest), torch.ones(newest)]).double())
    later = model.watch(ids[:, 20:], model.remember(ids[:, :20]))[-1]
    torch.testing.assert_close(later["surprisal"], seen["surprisal"][..., 20:], rtol=1e-4, atol=1e-4)
    assert torch.equal(later["held"], seen["held"][..., 20:])


def test_a_state_says_how_the_model_was_woven() -> None:
    for settings in ({"score": "random", "seed": 3}, {"score": {"attention": 2.0}, "chunk": 4}, {"layers": [0], "sinks": 2}):
        model = reweave(toy_lm("llama"), W, M, **settings)  # type: ignore[arg-type]
        state = model.remember(tokens())
        assert reweave(toy_lm("llama"), **config_of(state.config)).signature == model.signature


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = reweave(toy_lm("llama"), W, M)
    with pytest.raises(Mistake, match="budget=8, this memory has budget=4"):
        reweave(toy_lm("llama"), W, 4).remember(tokens(), state=model.remember(tokens()))
    with pytest.raises(Mistake, match="does not say its budget"):
        config_of({name: value for name, value in model.signature.items() if name != "budget"})
    adapted = add_lora(toy_lm("llama"), 2, 2, None, seed=0)
    with pytest.raises(Mistake, match="carries an adapter"):
        reweave(adapted, W, M).save_pretrained(tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()
    for base, words in (
        ({"hidden_size": 32}, "no configuration"),
        ({"model_type": "none-such"}, "unknown architecture"),
        (None, "no configuration"),
    ):
        with pytest.raises(Mistake, match=words):
            Rewoven(RewovenConfig(base=base))
    with pytest.raises(Mistake, match="whole number from 1"):
        reweave(toy_lm("llama"), 0, 0)
    with pytest.raises(Mistake, match="nothing to read"):
        model.remember([])
    with pytest.raises(Mistake, match="is empty"):
        model.new_memory().state()
    assert isinstance(model.remember(tokens()), MemoryState)


@torch.no_grad()
def test_adapters_change_states_by_the_same_share_whatever_their_size() -> None:
    reconstructor = trained().reconstructor
    held = {layer: torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(layer)) for layer in (0, 1)}
    for size in (0.1, 1.0, 300.0):
        scaled = {layer: size * states for layer, states in held.items()}
        for (layer, once), (_, again) in zip(reconstructor(held), reconstructor(scaled), strict=True):
            assert (once - held[layer]).abs().max() > 0.1
            torch.testing.assert_close(again / size, once, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"chunk": "a"}, "chunk"),
        ({"score": 5}, "score"),
        ({"score": {"surprisal": "x"}}, "score"),
        ({"layers": 3}, "layers"),
        ({"seed": "x"}, "seed"),
        ({"seed": -1}, "seed"),
        ({"trained": "yes"}, "trained"),
        ({"base": {"model_type": "llama", "hidden_size": "x"}}, "base"),
    ],
)
def test_a_configuration_with_values_of_the_wrong_kind_is_refused(changes: dict[str, Any], place: str, tmp_path: Path) -> None:
    tree = {"model_type": "rewoven", "base": toy_lm("llama").config.to_dict(), "window": W, "budget": M}
    (tmp_path / "config.json").write_text(json.dumps(tree | changes))
    with pytest.raises(Mistake, match=f"^{place}: is "):
        load_model(f"config:{tmp_path}")
