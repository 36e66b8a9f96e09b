"""What two processes do with a model that is sharded over both: started by `test_sharded.py`, which also calls it as one process for comparison."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.models.load import save_model, weights_hash
from remanence.seeds import generator
from remanence.storage import save_tree
from remanence.training.batches import IGNORED, Batch, Batches
from remanence.training.checkpoint import Checkpoints, model_state
from remanence.training.fisher import diagonal_fisher
from remanence.training.losses import nll
from remanence.training.masks import moved
from remanence.training.processes import gathered, laid_like, rank, sum_over_processes, whole, world_size
from remanence.training.trainer import Settings, Trainer
from toy import toy_lm, toy_tokenizer

ROWS = Dataset.from_dict(
    {
        "question": [f"who is {letter * length}" for length, letter in enumerate("abcdefghijkl", 1)],
        "answer": [str(7**n)[: 1 + n] for n in range(12)],  # from 1 to 10 tokens: the means' denominators differ between processes
    }
)
STEPS, KILLED_AT = 5, 3
TRAINED = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]  # of a layer's shards and of the root's


class Killed(Exception):
    pass


def fresh() -> nn.Module:
    """Return the toy model; with several processes each layer and the rest are sharded over them."""
    model = toy_lm("llama", vocab=len(toy_tokenizer()))
    if world_size() > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def trainer(**more: Any) -> Trainer:
    """Return a trainer with 8 rows per step, however many processes share them."""
    settings = Settings(steps=STEPS, batch_size=8 // world_size(), lr=0.01, clip=0.5, weight_decay=0.1)
    return Trainer(settings, processor=toy_tokenizer(), seed=4, **more)


def fit(model: nn.Module, *, loss: Any = nll, parameters: Any = None, **more: Any) -> nn.Module:
    chosen = trainer(**more)
    return chosen.fit(model, chosen.batches(ROWS, "qa"), loss, parameters=parameters)


def pulled(model: nn.Module, anchor: dict[str, Tensor]) -> Any:
    """Return a loss with a penalty on the distance of every weight from an anchor."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        parts = [whole((weight - laid_like(anchor[name], weight)).square().sum()) for name, weight in model.named_parameters()]
        return nll(model, batch) + 0.1 * torch.stack(parts).sum()

    return loss


def fishers(model: nn.Module) -> dict[str, Any]:
    """Return the Fisher diagonals of batches of uneven size and number, which the processes share out; the dear exact one of a single token."""
    batches = [*Batches(trainer().encode(ROWS, "qa"), 5, shuffle=False)]
    token = Batches(trainer().encode(ROWS.select([0]), "qa"), 1)[0]
    token["labels"][:, :-1] = IGNORED
    found = {}
    for definition in ("empirical", "sampled", "exact", "batched", "label_free"):
        names = TRAINED if definition == "exact" else None
        fisher = diagonal_fisher(
            model,
            itertools.islice([token] if definition == "exact" else batches, rank(), None, world_size()),
            definition=definition,
            parameters=names,
            generator=generator(3, "labels"),
            reduce_sum=sum_over_processes if world_size() > 1 else None,
        )
        found[definition] = {"values": gathered(dict(fisher)), "trace": fisher.trace, "count": fisher.count}
    return found


def work(place: Path) -> dict[str, Any]:
    """Train, kill, resume, measure and save; return what can be compared."""
    found: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    model = fresh()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    found["start"] = weights_hash(model)
    probe = trainer().batches(ROWS, "qa", size=12, shuffle=False)[0]
    with torch.no_grad():  # a look before training leaves the root's parameters whole
        model(input_ids=probe["input_ids"])
    found["gradient"] = gathered(
        trainer().gradient(model, nll, trainer().batches(ROWS, "qa", size=12 // world_size(), shuffle=False)[rank()])
    )
    model = fit(model, record=lambda table, new: rows.extend(new))
    found["steps"] = [[row["metric"], row["value"]] for row in rows]
    found["end"], found["weights"], found["moved"] = weights_hash(model), model_state(model), moved(before, model)
    with torch.no_grad():
        found["logits"] = model(input_ids=probe["input_ids"]).logits
    found["fishers"] = fishers(model)
    found["hash after the Fishers"] = weights_hash(model)
    if rank() == 0:
        save_model(model, toy_tokenizer(), place / "model", state_dict=found["weights"])

    def kill(_: nn.Module, step: int) -> None:
        if step == KILLED_AT:
            raise Killed

    try:
        fit(fresh(), checkpoints=Checkpoints(place / "points", 2), watch=kill)
    except Killed:
        found["points"] = [path.name for path in sorted((place / "points").iterdir())]
    resumed = fit(fresh(), checkpoints=Checkpoints(place / "points", 2))
    found["resumed"] = weights_hash(resumed)

    some = fit(fresh(), parameters=TRAINED)
    found["some"], found["flags"] = model_state(some), [parameter.requires_grad for parameter in some.parameters()]
    start = gathered({name: value.detach().clone() for name, value in fresh().named_parameters()})
    found["pulled"] = model_state(fit(fresh(), loss=pulled(some, start)))
    return found


def one_process_sees_nan() -> str:
    """Train a small replicated model on rows of which only the second process's are not numbers; return the sentence."""
    points = torch.ones(8, 3)
    points[1::2] = torch.nan
    model = nn.Sequential(nn.Linear(3, 2))
    batches = Batches({"pixel_values": points, "labels": torch.zeros(8, dtype=torch.int64)}, 1, shuffle=False)
    try:
        Trainer(Settings(steps=3), name="tuesday").fit(model, batches)
    except Mistake as mistake:
        return str(mistake)
    return "no mistake"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    result = work(folder)
    save_tree(folder / f"rank-{rank()}.safetensors", result)
    (folder / f"rank-{rank()}.json").write_text(json.dumps(one_process_sees_nan()))
