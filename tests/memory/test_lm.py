"""Language models with a memory: nothing leaks from the future, reading in pieces is reading at once, and asking changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from remanence.errors import Mistake
from remanence.memory import architectures
from remanence.memory.blocks import VARIANTS
from remanence.memory.lm import TitansConfig, TitansForCausalLM
from remanence.memory.lm_state import LMCache, LMState
from remanence.models.forward import fresh_weights
from remanence.models.load import load_model, save_model, weights_hash
from remanence.models.roles import weights_by_role
from remanence.training.batches import Batches
from remanence.training.trainer import Settings, Trainer
from toy import toy_tokenizer

VOCABULARY, TOKENS = 31, 27
KINDS = ("toy", "titans")
SETTINGS: dict[str, dict[str, Any]] = {"toy": {"chunk": 4}, "titans": {"chunk": 4, "heads": 2, "expansion": 2}}
WITH_MEMORY = tuple(variant for variant in VARIANTS if variant != "swa")


@pytest.fixture(autouse=True)
def _toy_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(architectures.MEMORIES, "toy", "toy_memory:ToyMemory")


def made(variant: str, kind: str = "titans", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> TitansForCausalLM:
    """Return a toy model in evaluation mode, with weights large enough for every path to matter."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"window": 5, "segment": 8, "n_persistent": 3, "initializer_range": 0.3, "memory": SETTINGS[kind]}
    config = TitansConfig(**(shape | settings | {"variant": variant} | changes))
    with pytest.MonkeyPatch.context() as patch, fresh_weights(seed):
        patch.setattr(TitansConfig, "memory_kind", kind)
        return TitansForCausalLM(config).to(dtype).eval()


def tokens(seed: int = 0, rows: int = 2, length: int = TOKENS) -> torch.Tensor:
    """Return random tokens (rows, length)."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def in_pieces(model: TitansForCausalLM, ids: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, LMState]:
    """Return the logits of a text that is read in pieces, and the state behind it."""
    cache = LMCache()
    logits = [model(part, cache=cache).logits for part in ids.split(sizes, 1)]
    assert cache.state is not None
    return torch.cat(logits, 1), cache.state


def flat(state: LMState) -> list[torch.Tensor]:
    """Return all tensors of a state."""
    found: list[torch.Tensor] = []
    for block in state.blocks:
        found += [*block.tensors.values(), *(tensor for part in (block.memory, block.opened) if part for tensor in part.tensors.values())]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_changing_a_token_leaves_all_logits_before_it_bit_identical(variant: str, kind: str) -> None:
    model, ids, places = made(variant, kind), tokens(rows=1).repeat(TOKENS, 1), torch.arange(TOKENS)
    changed = ids.clone()
    changed[places, places] = (changed[places, places] + 1) % VOCABULARY  # row s differs at token s
    same = (model(ids).logits == model(changed).logits).all(-1)  # (rows, T)
    assert same[places[:, None] > places].all()
    assert not same[places, places].any()


@pytest.mark.parametrize("variant", WITH_MEMORY)
@torch.no_grad()
def test_a_token_is_remembered_beyond_every_window_with_a_memory_and_forgotten_without(variant: str) -> None:
    ids = tokens(length=40)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
    model, control = made(variant, segment=8), made("swa")
    assert not torch.equal(model(ids).logits[:, -1], model(changed).logits[:, -1])
    assert torch.equal(control(ids).logits[:, -1], control(changed).logits[:, -1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_token_by_token_and_any_pieces_are_one_call(variant: str, kind: str) -> None:
    model, ids = made(variant, kind), tokens()
    whole, state = in_pieces(model, ids, [TOKENS])
    for sizes in ([1] * TOKENS, [1, 7, 3, 9, 7]):
        logits, after = in_pieces(model, ids, sizes)
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-10)
        for one, other in zip(flat(after), flat(state), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(ids).logits, whole, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padding_on_the_right_changes_nothing(variant: str) -> None:
    model, ids = made(variant), tokens()
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    rubbish = torch.where(mask.bool(), ids, (ids + 5) % VOCABULARY)
    logits, alone = model(rubbish, attention_mask=mask).logits, model(ids[1:, :20]).logits
    torch.testing.assert_close(logits[1, :20], alone[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[0], model(ids[:1]).logits[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(model(rubbish).logits[1, :20], alone[0], rtol=0, atol=1e-12)  # no mask at all


@pytest.mark.parametrize("variant", WITH_MEMORY)
@torch.no_grad()
def test_masked_tokens_are_not_written(variant: str) -> None:
    model, ids = made(variant), tokens()
    mask = torch.ones_like(ids)
    mask[:, 18:23] = 0
    states = []
    for text in (ids, torch.where(mask.bool(), ids, (ids + 5) % VOCABULARY)):
        cache = LMCache()
        model(text, attention_mask=mask, cache=cache)
        follow = model(tokens(1), cache=cache).logits
        states.append(follow)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rows_of_a_batch_share_nothing(variant: str) -> None:
    model, ids = made(variant), tokens()
    changed = ids.clone()
    changed[1] = tokens(9)[1]
    assert torch.equal(model(ids).logits[0], model(changed).logits[0])
    torch.testing.assert_close(model(ids[:1]).logits[0], model(ids).logits[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefix_is_seen_from_every_place_and_reading_leaves_all_weights_as_they_are(variant: str) -> None:
    model, ids = made(variant, n_persistent=2, num_hidden_layers=1, window=3), tokens()
    before = weights_hash(model)
    state = model.remember(ids)
    assert weights_hash(model) == before
    assert any(not torch.equal(one, other) for one, other in zip(flat(state), flat(model.model.begin(2)), strict=True))
    for place in (0, 10, TOKENS - 1):
        (gradient,) = torch.autograd.grad(model(ids).logits[:, place].square().sum(), model.model.persistent.weight)
        assert (gradient.norm(dim=1) > 1e-8).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_has_a_constant_size_and_round_trips_bit_for_bit(variant: str, tmp_path: Path) -> None:
    model = made(variant, dtype=torch.float32)
    states = [model.remember(tokens(length=length)) for length in (1, 26, 60)]
    assert len({state.bytes for state in states}) == 1
    states[1].save(tmp_path / "state.safetensors")
    again = LMState.load(tmp_path / "state.safetensors")
    assert all(torch.equal(one, other) for one, other in zip(flat(again), flat(states[1]), strict=True))
    following = tokens(3)
    logits = [model(following, cache=LMCache(state)).logits for state in (states[1], again)]
    assert torch.equal(*logits)


def test_embeddings_may_be_drawn_wider_than_other_weights() -> None:
    model = made("mag", initializer_range=0.1, embedding_range=1.0, vocab_size=400)
    assert float(model.model.embed_tokens.weight.detach().std()) == pytest.approx(1, abs=0.05)
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(0.1, abs=0.005)


def test_memory_sits_only_where_it_is_asked_for() -> None:
    model = made("mag", num_hidden_layers=3, layers_with_memory=[1])
    assert [hasattr(layer, "memory") for layer in model.model.layers] == [False, True, False]
    assert set(model.watch(tokens())) == {1}


@pytest.mark.parametrize("variant", WITH_MEMORY)
def test_watch_tells_surprise_write_and_forget_of_every_token(variant: str) -> None:
    model = made(variant)
    seen = model.watch(tokens(), model.remember(tokens(1)))
    assert set(seen) == {0, 1}
    for parts in seen.values():
        assert {"surprise", "write", "forget"} <= set(parts)
        assert all(part.shape == (2, 2, TOKENS) for part in parts.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_asking_leaves_the_state_as_it_is_and_continues_what_was_remembered(variant: str) -> None:
    model, ids = made(variant, dtype=torch.float32), tokens(rows=1)
    state = model.remember(ids[:, :20], piece=6)
    kept = [tensor.clone() for tensor in flat(state)]
    answer = model.ask(ids[:, 20:], state, max_new_tokens=6)
    assert all(torch.equal(one, other) for one, other in zip(flat(state), kept, strict=True))
    assert torch.equal(answer, model.generate(ids, max_new_tokens=6)[:, TOKENS:])
    assert torch.equal(
        model.ask(ids[:, 20:], state, max_new_tokens=6, num_beams=3), model.generate(ids, max_new_tokens=6, num_beams=3)[:, TOKENS:]
    )


@pytest.mark.parametrize("variant", ["mag", "mac"])
@torch.no_grad()
def test_generate_is_the_loop_of_whole_passes_and_batches_do_not_mix(variant: str) -> None:
    model, ids = made(variant), tokens()
    out = model.generate(ids, max_new_tokens=6)
    for length in range(TOKENS, TOKENS + 6):
        assert torch.equal(out[:, length], model(out[:, :length]).logits[:, -1].argmax(-1))
    assert torch.equal(out[1:], model.generate(ids[1:], max_new_tokens=6))
    torch.manual_seed(0)
    sampled = model.generate(ids, max_new_tokens=6, do_sample=True, num_return_sequences=2)
    assert sampled.shape == (4, TOKENS + 6)
    beams = model.generate(ids, max_new_tokens=6, num_beams=3)
    assert torch.equal(beams[1:], model.generate(ids[1:], max_new_tokens=6, num_beams=3))
    assert score(model, beams) >= score(model, out) - 1e-9


def score(model: TitansForCausalLM, ids: torch.Tensor) -> float:
    """Return the log probability of what follows the prompt."""
    chances = model(ids).logits[:, TOKENS - 1 : -1].log_softmax(-1)
    return float(chances.gather(2, ids[:, TOKENS:, None]).sum())


def test_words_go_in_and_words_come_out() -> None:
    tokenizer = toy_tokenizer()
    model = made("mag", dtype=torch.float32, vocab_size=len(tokenizer))
    state = model.remember("my key is under the stone", tokenizer)
    assert isinstance(model.ask("where is my key?", state, tokenizer, max_new_tokens=5), str)
    assert len(model.ask("where?", state, tokenizer, max_new_tokens=5, do_sample=True, num_return_sequences=2)) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_loads_bit_for_bit(variant: str, tmp_path: Path) -> None:
    model = made(variant, dtype=torch.float32)
    save_model(model, None, tmp_path / "model")
    loaded = load_model(tmp_path / "model").model
    assert isinstance(loaded, TitansForCausalLM)
    assert weights_hash(loaded) == weights_hash(model)
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_fresh_weights_of_a_configuration_depend_on_the_seed_and_a_memory_draws_its_own(tmp_path: Path) -> None:
    model = made("mag", dtype=torch.float32, initializer_range=1e-3)
    model.config.save_pretrained(tmp_path)
    ones = [load_model(f"config:{tmp_path}", seed=seed).model for seed in (0, 0, 1)]
    assert weights_hash(ones[0]) == weights_hash(ones[1]) != weights_hash(ones[2])
    drawn = dict(ones[0].model.layers[0].memory.named_parameters())  # type: ignore[union-attr, index]
    assert max(float(weight.detach().std()) for weight in drawn.values() if weight.ndim > 1) > 0.01
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "titans"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_trainer_fit_trains_every_parameter(variant: str, recompute: bool) -> None:
    model, ids = made(variant, dtype=torch.float32), tokens(rows=4)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    settings = Settings(steps=2, batch_size=4, lr=1e-2, gradient_checkpointing=recompute)
    Trainer(settings, progress=False).fit(model, Batches({"input_ids": ids, "labels": ids}, 4), steps=2)
    still = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert not still


def test_recomputed_gradients_are_the_same() -> None:
    model, ids = made("mac"), tokens()
    model.train()
    found = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=1e-12)


def test_hugging_face_trainer_trains_and_evaluates(tmp_path: Path) -> None:
    from transformers import Trainer as HubTrainer
    from transformers import TrainingArguments

    model, ids = made("mag", dtype=torch.float32), tokens(rows=8)
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = HubTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3


def test_loss_is_that_of_the_next_token() -> None:
    model, ids = made("lmm"), tokens()
    labels = ids.clone()
    labels[:, :5] = -100
    out = model(ids, labels=labels)
    by_hand = torch.nn.functional.cross_entropy(out.logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten())
    torch.testing.assert_close(out.loss.double(), by_hand, rtol=0, atol=1e-6)


def test_every_weight_has_a_role() -> None:
    for variant in VARIANTS:
        roles = {weight.name: weight.role for weight in weights_by_role(made(variant), strict=True)}
        assert all(role == "other" for name, role in roles.items() if ".memory." in name or "persistent" in name)
        assert roles["model.layers.0.mlp.gate_proj.weight"] == "gate"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": "magg"}, "did you mean 'mag'"),
        ({"variant": 5}, "wrong kind"),
        ({"num_hidden_layers": "two"}, "wrong kind"),
        ({"layers_with_memory": ["a"]}, "wrong kind"),
        ({"variant": "mac", "segment": 6}, "not a multiple of the memory's chunk 4"),
        ({"variant": "mac", "n_persistent": 0}, "asks a memory that has read the prefix"),
        ({"hidden_size": 18, "num_attention_heads": 4}, "not divisible into 4 heads"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "does not divide"),
        ({"layers_with_memory": [2]}, "there is no layer 2"),
        ({"window": 0}, "must be 1 or more"),
        ({"n_persistent": -1}, "must be 0 or more"),
        ({"memory": {"chunks": 4}}, "did you mean 'chunk'"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Mistake, match=words):
        made(**({"variant": "mag"} | changes))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, ids = made("mag"), tokens()
    state = model.remember(ids)
    with pytest.raises(Mistake, match="holds 2 texts, the input 1"):
        model.ask(ids[:1], state)
    with pytest.raises(Mistake, match="window=5, this model has window=6"):
        made("mag", window=6).remember(ids, state=state)
    with pytest.raises(Mistake, match="expected \\(2, 27\\)"):
        model(ids, attention_mask=torch.ones(2, 20))
    with pytest.raises(Mistake, match="needs a tokenizer"):
        model.remember("text")
    with pytest.raises(Mistake, match="nothing to read"):
        model.remember(ids[:, :0])
    with pytest.raises(Mistake, match="either tokens or embeddings"):
        model()
    with pytest.raises(Mistake, match="cannot take back"):
        LMCache(state).crop(3)
    with pytest.raises(Mistake, match="unknown memory 'titan'"):
        architectures.build_memory("titan", 8)
    broken = made("mag")
    torch.nn.init.constant_(broken.model.embed_tokens.weight, float("nan"))
    with pytest.raises(Mistake, match="not finite"):
        broken(ids)
