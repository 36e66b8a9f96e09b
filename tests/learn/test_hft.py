"""Half fine-tuning: the mask by count, frozen bits, rounds, refusals, and other training loops."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer as HFTrainer
from transformers import TrainingArguments

from remanence.errors import Mistake
from remanence.learn.hft import HalfTuning, HalfTuningCallback, half_reset, load_mask, save_mask
from remanence.learn.replay import Replay
from remanence.learn.sequential import Sequential
from remanence.models.adapters import add_lora
from remanence.models.roles import weights_by_role
from remanence.seeds import generator
from remanence.stream import Request, Task
from remanence.training.half_units import balanced, divided, drawn, place, shares
from remanence.training.trainer import Settings, Trainer
from toy import FAMILIES, toy_classifier, toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
ROWS = Dataset.from_dict({"question": [f"who is {c}" for c in "abcdefgh"], "answer": [f"{n * 13}" for n in range(8)]})
TASK = Task("people", ROWS, kind="qa")


def model(family: str = "llama", layers: int = 3, **changes: Any) -> nn.Module:
    return toy_lm(family, vocab=len(TOKENIZER), width=16, layers=layers, **changes)


def trainer(owner: Any = None, seed: int = 0, record: Any = None, **changes: Any) -> Trainer:
    settings = Settings(**({"steps": 3, "batch_size": 4, "lr": 0.01, "weight_decay": 0.1, "clip": 0.5} | changes))
    return Trainer(settings, processor=TOKENIZER, seed=seed, owner=owner, record=record, progress=False)


def weights(of: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in of.named_parameters()}


def counts(of: nn.Module, trained: Any) -> dict[tuple[int, str], tuple[int, int]]:
    """Return (trained, all) matrices or norms by (layer, category)."""
    every, chosen = Counter(), Counter()
    for weight in weights_by_role(of):
        if weight.layer is not None and weight.kind == "weight":
            key = (weight.layer, place(weight)[0])
            every[key] += 1
            chosen[key] += weight.name in trained
    return {key: (chosen[key], every[key]) for key in every}


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(4))
def test_each_block_trains_two_of_four_one_of_two_and_one_or_two_of_three(layers: int, seed: int) -> None:
    start = model(layers=layers)
    found = counts(start, HalfTuning().draw(start, seed).trained)
    assert all(found[layer, "attention"] == (2, 4) and found[layer, "norm"] == (1, 2) for layer in range(layers))
    mlp = [found[layer, "mlp"][0] for layer in range(layers)]
    assert set(mlp) <= {1, 2}
    assert mlp.count(2) in (layers // 2, -(-layers // 2))


@pytest.mark.parametrize("layers", [2, 3])
def test_the_trained_share_of_block_weights_is_half_within_one_mlp_matrix(layers: int) -> None:
    start = toy_lm("mistral", vocab=len(TOKENIZER), width=32, layers=layers)
    start.config.num_key_value_heads = start.config.num_attention_heads
    start = type(start)(start.config)  # keys as many as queries, so that matrices of attention are equal
    trained, matrix = HalfTuning().draw(start, 1).trained, start.model.layers[0].mlp.up_proj.weight.numel()
    inside = {name: value.numel() for name, value in start.named_parameters() if ".layers." in name}
    assert abs(sum(size for name, size in inside.items() if name in trained) - sum(inside.values()) / 2) <= matrix


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_every_family_trains_half_of_its_matrices(family: str, level: str) -> None:
    start = model(family, layers=4)
    tuning = HalfTuning(level=level)
    trained = set(tuning.draw(start, 3).trained)
    units, outside = divided(start, True, None)
    assert outside <= trained
    matrices = [unit for unit in units if unit.category != "norm"]
    assert all(len({name in trained for name in unit.names}) == 1 for unit in units)  # biases go with their matrix
    half = sum(unit.names[0] in trained for unit in matrices)
    assert abs(half - len(matrices) / 2) <= 1


def test_a_fused_qkv_and_its_output_are_a_pair() -> None:
    for family in ("gpt2", "phi3", "gpt_neox"):
        start = model(family, layers=2)
        found = counts(start, HalfTuning().draw(start, 0).trained)
        assert all(found[layer, "attention"] == (1, 2) and found[layer, "mlp"] == (1, 2) for layer in range(2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_tensors_are_bit_identical_and_have_no_optimizer_state(precision: str) -> None:
    """Under weight decay, clipping and autocast, with momentum from an earlier step."""
    start = model()
    before, states, notes = weights(start), [], []

    def keep(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        states.append(torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5))
        return states[-1]

    class Inner(Sequential):
        def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
            return trainer.fit(model, trainer.batches(task.train, task.kind), optimizer=keep)

    tuning = HalfTuning(inner=Inner())
    after = tuning.learn(start, TASK, trainer(tuning, record=lambda table, rows: notes.extend(rows), precision=precision))
    trained = set(tuning.rounds[0]["trained"])
    for name, value in after.named_parameters():
        assert torch.equal(value, before[name]) == (name not in trained), name
    named = dict(after.named_parameters())
    assert {id(parameter) for parameter in states[0].state} == {id(named[name]) for name in trained}
    note = next(row["content"] for row in notes if row.get("name") == "mask")
    assert note["seed"] == tuning.rounds[0]["seed"]
    assert 0.3 < note["share of block weights"] < 0.7 < 1.0
    assert note["share of all weights"] > note["share of block weights"]


def test_rounds_differ_by_seed_and_repeat_by_seed() -> None:
    start = model()
    masks = [set(HalfTuning().draw(start, seed).trained) for seed in (0, 1, 0)]
    assert masks[0] == masks[2] != masks[1]
    tuning = HalfTuning()
    for event in range(2):
        tuning.learn(start, TASK, trainer(tuning, seed=event, steps=1))
    assert tuning.rounds[0]["trained"] != tuning.rounds[1]["trained"]
    assert [entry["round"] for entry in tuning.rounds] == [0, 1]


def test_ratio_one_is_full_fine_tuning_step_for_step() -> None:
    methods = (Sequential(), HalfTuning(ratio=1.0), HalfTuning(ratio=1.0, level="layer"), HalfTuning(ratio=1.0, level="model"))
    ends = [weights(method.learn(model(), TASK, trainer(method))) for method in methods]
    for end in ends[1:]:
        assert all(torch.equal(value, ends[0][name]) for name, value in end.items())


def test_a_step_is_the_full_step_with_masked_gradients_clipped_by_the_trained_half() -> None:
    start = model(dtype=torch.float64)
    by_hand, tuning = copy.deepcopy(start), HalfTuning()
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "clip": 0.01, "weight_decay": 0.0, "steps": 1}
    after = tuning.learn(start, TASK, trainer(tuning, **settings))
    loop = trainer(**settings)
    from remanence.training.losses import nll

    gradient = loop.gradient(by_hand, nll, loop.batches(ROWS, "qa")[0])
    half = {name: grad for name, grad in gradient.items() if name in tuning.rounds[0]["trained"]}
    norm = sum(grad.square().sum() for grad in half.values()).sqrt()
    assert norm > 0.01
    for name, value in by_hand.named_parameters():
        wanted = value - 0.1 * half[name] * 0.01 / (norm + 1e-6) if name in half else value
        torch.testing.assert_close(dict(after.named_parameters())[name], wanted, rtol=1e-12, atol=1e-14)


def test_half_reset_of_all_and_of_nothing() -> None:
    base, tuned = model(), model(seed=7)
    whole = half_reset(copy.deepcopy(tuned), base, ratio=1.0)
    nothing = half_reset(copy.deepcopy(tuned), base, ratio=0.0, train_embeddings=False)
    half = half_reset(copy.deepcopy(tuned), weights(base), ratio=0.5, seed=2)
    trained = HalfTuning().draw(tuned, 2).trained
    for name, value in tuned.named_parameters():
        old = dict(base.named_parameters())[name]
        assert torch.equal(dict(whole.named_parameters())[name], value)
        assert torch.equal(dict(nothing.named_parameters())[name], old)
        assert torch.equal(dict(half.named_parameters())[name], value if name in trained else old)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.6])
def test_the_three_levels_train_equally_many_on_average(ratio: float) -> None:
    """The mean over 600 masks against ratio n, within four standard errors of the widest level (whole blocks)."""
    units = divided(model(layers=3), True, None)[0]
    for level in ("category", "layer", "model"):
        sizes = torch.tensor([len(drawn(units, ratio, level, generator(level, seed))) for seed in range(600)], dtype=torch.float64)
        assert abs(sizes.mean() - ratio * len(units)) < 4 * max(sizes.std().item(), 0.1) / 600**0.5 + 1e-9


def test_block_counts_keep_the_ratio_within_one_matrix_per_category() -> None:
    for ratio in (0.1, 0.25, 0.4, 0.5, 0.7, 0.9):
        for layers in (1, 2, 5, 8):
            chosen = balanced([3] * layers, ratio, generator(ratio, layers))
            assert abs(sum(chosen) - ratio * 3 * layers) < 1
            assert set(chosen) <= {int(ratio * 3), int(ratio * 3) + 1}


def test_masks_are_saved_and_replayed(tmp_path: Path) -> None:
    start, tuning = model(), HalfTuning()
    with tuning.round(start, 5) as mask:
        save_mask(tmp_path / "mask.json", mask)
        assert {name for name, parameter in start.named_parameters() if parameter.requires_grad} == set(mask.trained)
    assert all(parameter.requires_grad for parameter in start.parameters())
    assert set(json.loads((tmp_path / "mask.json").read_text())) == {"round", "seed", "level", "ratio", "trained"}
    again = load_mask(tmp_path / "mask.json", start)
    assert again == mask
    with HalfTuning().round(start, 9, mask=again):
        assert {name for name, parameter in start.named_parameters() if parameter.requires_grad} == set(mask.trained)
    with pytest.raises(Mistake, match="which the model lacks"):
        load_mask(tmp_path / "mask.json", model(layers=1))
    (tmp_path / "mask.json").write_text("[]")
    with pytest.raises(Mistake, match="is no mask"):
        load_mask(tmp_path / "mask.json", start)


def test_its_state_holds_the_rounds_and_the_inner_state() -> None:
    tuning, again = HalfTuning(inner=Replay(capacity=4)), HalfTuning(inner=Replay(capacity=4))
    tuning.learn(model(), TASK, trainer(tuning))
    again.load_state_dict(tuning.state_dict())
    assert again.rounds == tuning.rounds
    assert torch.equal(again.inner.kept.rows()["input_ids"], tuning.inner.kept.rows()["input_ids"])


def test_the_inner_memory_lets_go_of_forgotten_rows() -> None:
    tuning = HalfTuning(inner=Replay(capacity=8))
    tuning.learn(model(), TASK, trainer(tuning, steps=2))
    request = Request("gone", ROWS.select([1, 5]))
    assert tuning.erase(request, trainer()) == 2
    assert tuning.erase(request, trainer()) == 0
    assert HalfTuning().erase(request, trainer()) == 0


def test_optimizer_moments_fall_by_half_in_the_blocks() -> None:
    start, sizes = model(layers=4), {}
    for ratio in (0.5, 1.0):
        trained = HalfTuning(ratio=ratio).draw(start, 0).trained
        optimizer = torch.optim.AdamW([p for name, p in start.named_parameters() if name in trained and ".layers." in name])
        start(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
        optimizer.step()
        sizes[ratio] = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert 0.4 < sizes[0.5] / sizes[1.0] < 0.6


def test_the_hugging_face_trainer_leaves_the_frozen_half_alone(tmp_path: Path) -> None:
    start, tuning = model(), HalfTuning()
    before = weights(start)
    ids = torch.randint(3, 40, (8, 6), generator=generator("rows"))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=4, learning_rate=0.01, weight_decay=0.5, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callback = HalfTuningCallback(tuning, seed=4)
    HFTrainer(start, arguments, train_dataset=rows, callbacks=[callback]).train()
    mask = load_mask(tmp_path / "checkpoint-2" / "mask.json", start)
    assert mask.trained == HalfTuning().draw(start, 4).trained
    for name, value in start.named_parameters():
        assert torch.equal(value, before[name]) == (name not in mask.trained), name
        assert value.requires_grad
    late = HFTrainer(model(), arguments, train_dataset=rows)
    late.add_callback(HalfTuningCallback(HalfTuning()))
    with pytest.raises(Mistake, match="before the mask"):
        late.train()
    early = model()
    with pytest.raises(Mistake, match="optimizer holds the frozen"):
        HFTrainer(
            early, arguments, train_dataset=rows, optimizers=(torch.optim.SGD(early.parameters(), lr=1.0), None),
            callbacks=[HalfTuningCallback(HalfTuning())],
        )  # fmt: skip


def test_sft_then_dpo_in_trl_are_two_rounds_that_leave_their_frozen_halves_alone(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="the extra `test` brings trl")
    start, tuning = model(), HalfTuning()
    plain: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "weight_decay": 0.5, "report_to": [], "use_cpu": True,
        "bf16": False, "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip
    told = Dataset.from_dict({"prompt": [f"who is {c}" for c in "abcd"], "completion": [f" {n * 13}" for n in range(4)]})
    compared = told.rename_column("completion", "chosen").add_column("rejected", [" no"] * 4)
    moved = []
    for name, rows, seed in (("SFT", told, 4), ("DPO", compared, 5)):
        before, drawn_mask = weights(start), HalfTuning().draw(start, seed)
        arguments = getattr(trl, f"{name}Config")(output_dir=str(tmp_path / name), **plain)
        callback = HalfTuningCallback(tuning, seed=seed)
        reference = {"ref_model": copy.deepcopy(start)} if name == "DPO" else {}  # the model behind SFT
        fit = getattr(trl, f"{name}Trainer")
        fit(start, args=arguments, train_dataset=rows, processing_class=TOKENIZER, callbacks=[callback], **reference).train()
        still = {key for key, value in start.named_parameters() if torch.equal(value, before[key])}
        assert still >= set(before) - set(drawn_mask.trained)
        assert any(key not in still for key in drawn_mask.trained)
        assert all(value.requires_grad for value in start.parameters())
        moved.append(set(before) - still)
    assert moved[0] != moved[1]
    assert [item["seed"] for item in tuning.rounds] == [4, 5]


def test_an_exponential_average_of_the_weights_leaves_the_frozen_half_bit_identical() -> None:
    start, tuning = model(), HalfTuning()
    before = weights(start)
    with tuning.round(start, 7) as mask:
        average = torch.optim.swa_utils.AveragedModel(start, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        descent = torch.optim.AdamW([value for value in start.parameters() if value.requires_grad], lr=0.01, weight_decay=0.5)
        for step in range(3):
            start(torch.randint(3, 40, (2, 6), generator=generator("rows", step))).logits.square().mean().backward()
            descent.step()
            descent.zero_grad()
            average.update_parameters(start)
    averaged = dict(average.module.named_parameters())
    assert all(torch.equal(averaged[name], value) for name, value in before.items() if name not in mask.trained)
    assert all(not torch.equal(averaged[name], before[name]) for name in mask.trained if averaged[name].dim() > 1 and "embed" not in name)


def test_a_saved_model_is_an_ordinary_one(tmp_path: Path) -> None:
    tuning = HalfTuning()
    after = tuning.learn(model(), TASK, trainer(tuning))
    after.save_pretrained(tmp_path)
    again = type(after).from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in after.state_dict().items())


def test_the_shares_are_counted_by_matrix_block_and_model() -> None:
    start = model(layers=2)
    named = {name: value.numel() for name, value in start.named_parameters()}
    trained = [name for name in named if "q_proj" in name or "o_proj" in name]
    found = shares(start, trained)
    inside = sum(size for name, size in named.items() if ".layers." in name)
    assert found["share of matrices"] == pytest.approx(4 / 14)
    assert found["share of block weights"] == pytest.approx(sum(named[name] for name in trained) / inside)
    assert found["share of all weights"] == pytest.approx(sum(named[name] for name in trained) / sum(named.values()))


def test_it_refuses_what_it_cannot_halve() -> None:
    with pytest.raises(Mistake, match=r"hft\.ratio.*embeddings are frozen"):
        HalfTuning(ratio=0.0, train_embeddings=False)
    with pytest.raises(Mistake, match=r"hft\.ratio"):
        HalfTuning(ratio=1.5)
    with pytest.raises(Mistake, match="did you mean 'layer'"):
        HalfTuning(level="layers")
    with pytest.raises(Mistake, match="no role is known for"):
        HalfTuning().draw(toy_classifier(), 0)
    with pytest.raises(Mistake, match="adapter"):
        HalfTuning().draw(add_lora(model(), rank=1), 0)
    with pytest.raises(Mistake, match="one matrix for both"):
        HalfTuning(train_embeddings=True, train_head=False).draw(model("gpt2"), 0)
    tuning, start = HalfTuning(), model()
    with pytest.raises(Mistake, match="optimizer holds the frozen"):
        tuning.begin_round(start, 0, optimizer=torch.optim.SGD(start.parameters(), lr=1.0))
    tuning.begin_round(start, 0)
    with pytest.raises(Mistake, match="under way"):
        tuning.begin_round(start, 1)
    tuning.end_round()


def test_embeddings_and_head_are_switched_apart() -> None:
    start = model()
    outside = {
        (embeddings, head): set(divided(start, embeddings, head)[1]) for embeddings, head in ((True, None), (False, True), (True, False))
    }
    assert outside[True, None] == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert outside[False, True] == {"lm_head.weight", "model.norm.weight"}
    assert outside[True, False] == {"model.embed_tokens.weight"}
