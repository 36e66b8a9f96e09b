"""Every recipe of paper scale builds with the real architecture class at toy width and takes two steps, so that it cannot rot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from remanence.memory import architectures
from remanence.memory.reweaving import reweave
from remanence.models.forward import fresh_weights
from remanence.models.load import save_model
from remanence.recipe import ForgetEvent, Recipe
from toy import toy_lm, toy_tokenizer

ROOT = Path(__file__).parent.parent
RECIPES = sorted(ROOT.glob("recipes/paper/*.yaml"))


# A toy knows nobody, so the rows say who is known; no autoencoder fits it.
TOY_METHODS = {
    "sae-unlearning": {
        "labels": "given",
        "fewest": 3,
        "least_auc": 0,
        "stop": None,
        "sae": "identity",
        "layer": 0,
        "samples": 0,
        "enough": 1,
    }
}


def toy_clause(clause: object) -> object:
    """Fit a method's clause to a toy model."""
    return clause | TOY_METHODS.get(str(clause.get("method")), {}) if isinstance(clause, dict) else clause


def toy_folder(model: str, folder: Path) -> Path:
    """Save a toy of the architecture that a hub id, or the paper's configuration, names."""
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if "resnet" in model:
            config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
            save_model(ResNetForImageClassification(config), ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=1.0), folder)
            return folder
        tokenizer = toy_tokenizer(128)
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        toy = toy_lm("llama", vocab=128)
        if model.startswith("config:"):
            toy = toy_memory_lm(ROOT / ("recipes/paper/trc2" if "TRC2" in model else model.removeprefix("config:")))
        save_model(toy, tokenizer, folder)
    return folder


def toy_memory_lm(folder: Path) -> PreTrainedModel:
    """Build a language model with a memory as its configuration says, at toy width."""
    architectures.register()
    tree = json.loads((folder / "config.json").read_text())
    if tree["model_type"] == "rewoven":  # a decoder of the base's class, a window that the toy rows outgrow
        return reweave(
            toy_lm("qwen2", vocab=128),
            16,
            8,
            score=tree["score"],
            reconstruct=tree["reconstruct"],
            train=tree["trained"],
            rank=tree["rank"],
        )
    tree |= {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    if "heads" in tree.get("memory", ()):
        tree["memory"]["heads"] = 4
    with fresh_weights(0):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree))


def toy_rows(kind: str, folder: Path, number: str) -> str:
    """Write four rows of a kind and return their path."""
    path = folder / f"{kind}-{number}.jsonl"
    if kind == "images":
        made = np.random.default_rng(len(number))
        for label in ("a", "b"):
            (folder / f"images-{number}" / label).mkdir(parents=True)
            for image in range(3):
                pixels = made.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"images-{number}" / label / f"{image}.png")
        return str(folder / f"images-{number}")
    rows = {
        "qa": [
            {
                "name": f"{number}{n}",
                "question": f"what is {number}{n}?",
                "answer": f"it is {n * 11}",
                "idk": "who?",
                "title": "it",
                "type": ("entity", "domain")[n % 2],
            }
            for n in range(4)
        ],
        "text": [{"text": f"line {number} of {n} and more of it"} for n in range(4)],
        "chat": [{"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}]} for n in range(4)],
    }[kind]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_paper_recipe_builds_and_takes_two_steps(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = Recipe.load(path)
    tree = yaml.safe_load(path.read_text())
    tree["model"] = str(toy_folder(recipe.model, tmp_path / "model"))
    for clause in tree.get("measure", {}).get("probes", {}).get("qa", []):
        if isinstance(clause, dict) and "new_tokens" in clause:
            clause |= {"new_tokens": 2, "similarity": False}
    small = {"steps": 2, "batch_size": 2, "accumulate": 1, "length": 128, "checkpoint_every": 0}
    events = []
    for number, (event, parsed) in enumerate(zip(tree["events"], recipe.events, strict=True)):
        if number > 2:
            break
        for part in ("data", "test", "retain", "neighbours", "holdout"):
            if part in event:
                event[part] = toy_rows(parsed.kind, tmp_path, f"{number}-{part}")
        event["training"] = event.get("training", {}) | small
        events.append(event)
    tree["events"] = events
    for number, chosen in enumerate(tree.get("measure", {}).get("sets", {}).values()):
        chosen["data"] = toy_rows(chosen.get("kind", "qa"), tmp_path, f"set-{number}")
    tree["training"].pop("template", None)  # the toy tokenizer spells: a chat format would fill its 128 places
    for place in (tree, *tree.get("lives", {}).values()):
        place |= {verb: toy_clause(place[verb]) for verb in ("learn", "forget") if verb in place}
    toy = Recipe.of(tree, place=str(path), folder=tmp_path)
    for name in toy.life_names:
        life = toy.life(name, progress=False)
        before = {key: value.clone() for key, value in life.model.state_dict().items()}
        life.run()
        assert life.ledger is not None
        done = life.ledger.rows("events")
        assert [row["name"] for row in done] == [event.get("learn") or event.get("forget") for event in events]
        learned = [row for row in done if row["verb"] == "learn"]
        assert all(row["steps"] == 2 for row in learned)
        after = life.model.state_dict()  # under other names where a method puts something around the model
        assert before.keys() != after.keys() or any(not torch.equal(before[key], value) for key, value in after.items())
        assert life.ledger.rows("scores")


def test_paper_recipes_say_hardware_and_command() -> None:
    for path in RECIPES:
        head = path.read_text().split("\nname:")[0]
        assert "Hardware:" in head
        assert "remanence run recipes/paper/" in head
        assert any(isinstance(event, ForgetEvent) or event.learn for event in Recipe.load(path).events)
