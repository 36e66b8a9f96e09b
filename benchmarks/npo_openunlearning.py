"""NPO as `remanence` does it against OpenUnlearning's own `NPO.compute_loss`, on the same model, rows, order and optimizer: time of the steps, and memory.

The environment variable OPEN_UNLEARNING names a checkout of https://github.com/locuslab/open-unlearning (MIT); nothing of it is installed. Its loss runs in the
shortest loop around it, with fused AdamW and clipping as ours has, on batches that are ready; ours is the whole `NPO.forget`: encoding, the pass over the forget
rows that takes down the reference's NLLs, and the steps. Both must end with the same weights.

Two differences make the time: the peer runs its copy of the model on every forget batch of every epoch, and it computes the logits of prompts too. Memory is the
largest resident size above that of the loaded model, each side in a process of its own, with a model that is large beside the program.
"""

from __future__ import annotations

import copy
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from benchmarks.loop import desk_llama
from benchmarks.timing import Figure, PeerMissing, figure, paired
from remanence.forget.npo import NPO
from remanence.models.adapters import add_lora
from remanence.stream import Request
from remanence.training.batches import Batch
from remanence.training.trainer import Settings, Trainer

VARIABLE = "OPEN_UNLEARNING"
RATE, BETA, BATCH = 1e-4, 0.1, 8
ANSWER, QUESTION = 40, 24  # words, about those of TOFU


def peer_loss() -> Any:
    """Return OpenUnlearning's `NPO` class, without what its package imports beside it (hydra and the like).

    Raises:
        PeerMissing: there is no checkout.
    """
    place = os.environ.get(VARIABLE)
    root = Path(place or ".").expanduser() / "src" / "trainer"
    if not place or not (root / "unlearn" / "npo.py").is_file():
        raise PeerMissing(
            f"npo_openunlearning: {VARIABLE} is {place or 'not set'}; set it to a checkout of https://github.com/locuslab/open-unlearning"
        )
    package = types.ModuleType("trainer")
    package.__path__ = [str(root)]
    sys.modules["trainer"] = package
    return importlib.import_module("trainer.unlearn.npo").NPO


def words(vocab: int) -> Any:
    """Return a tokenizer of `vocab` words, w0, w1 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "<eos>", "<unk>", "Q:", "A:", *(f"w{number}" for number in range(vocab - 5))]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def questions(count: int, vocab: int, seed: int) -> Dataset:
    """Return rows of random words, answers of unequal length."""
    drawn = torch.Generator().manual_seed(seed)
    lengths = torch.randint(ANSWER // 2, ANSWER * 3 // 2, (count,), generator=drawn).tolist()
    ids = torch.randint(vocab - 5, (count, QUESTION + max(lengths)), generator=drawn).tolist()
    return Dataset.from_dict(
        {
            "question": [" ".join(f"w{number}" for number in row[:QUESTION]) for row in ids],
            "answer": [" ".join(f"w{number}" for number in row[QUESTION : QUESTION + size]) for row, size in zip(ids, lengths)],
        }
    )


class Work:
    """The same NPO both ways.

    Args:
        layers: of the Llama.
        width: of it.
        vocab: of it.
        rows: to forget.
        steps: optimizer steps.
        lora: train an adapter of rank 8 on frozen weights.
    """

    def __init__(self, layers: int, width: int, vocab: int, rows: int, steps: int, lora: bool):
        model: Any = desk_llama(layers, width, vocab)
        self.model = add_lora(model, rank=8) if lora else model
        self.request = Request("gone", questions(rows, vocab, 1), questions(4 * rows, vocab, 2))
        self.trainer = lambda: Trainer(Settings(steps=steps, batch_size=BATCH, lr=RATE), processor=tokenizer, progress=False)
        tokenizer = words(vocab)
        trainer = self.trainer()
        parts = ((self.request.forget, "forget"), (self.request.retain, "retain"))
        forget, retain = (trainer.batches(rows, "qa", stream=stream) for rows, stream in parts)  # type: ignore[arg-type]
        pairs = trainer.pairs(forget, retain)
        self.batches = [{name: masked(part) for name, part in pairs[number].items()} for number in range(steps)]
        self.ends: dict[str, nn.Module] = {}

    def ours(self) -> None:
        """Forget with `NPO`."""
        self.ends["ours"] = NPO(beta=BETA).forget(self.copied(), self.request, self.trainer())

    def peer(self, loss: Any) -> None:
        """Forget with OpenUnlearning's loss."""
        model = self.copied().train()
        side = types.SimpleNamespace(ref_model=copy.deepcopy(model).eval(), beta=BETA, gamma=1.0, alpha=1.0)
        side.compute_retain_loss = lambda model, retain_inputs: model(**retain_inputs).loss  # what its `NLL` is
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        descent = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
        for batch in self.batches:
            descent.zero_grad()
            loss.compute_loss(side, model, batch).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            descent.step()
        self.ends["peer"] = model

    def copied(self) -> nn.Module:
        """Return the model that both start from."""
        return copy.deepcopy(self.model)

    def gap(self) -> float:
        """Return the largest difference of a weight between the two ends."""
        both = zip(self.ends["ours"].parameters(), self.ends["peer"].parameters(), strict=True)
        return max((a - b).abs().max().item() for a, b in both)


def masked(rows: Batch) -> dict[str, Any]:
    """Return a batch as the peer's collator makes it."""
    return {"input_ids": rows["input_ids"], "labels": rows["labels"], "attention_mask": (rows["input_ids"] != 0).long()}


def peak(side: str, *, lora: bool, tiny: bool) -> float:
    """Return the largest resident size of one side above that of the loaded model, in MB, from a process of its own."""
    order = json.dumps({"side": side, "lora": lora, "tiny": tiny})
    returned = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back at once, so that the size is what is alive
    found = subprocess.run([sys.executable, "-m", "benchmarks.npo_openunlearning", order], capture_output=True, text=True, env=returned)
    if found.returncode:
        raise RuntimeError(found.stderr)
    return float(found.stdout.split()[-1])


def measured(side: str, lora: bool, tiny: bool) -> float:
    """Return what `peak` asks for, in this process."""
    torch.set_num_threads(1)
    loss = peer_loss()
    for small in (True, False):  # the first time brings the libraries into memory
        work = Work(*((1, 32, 64) if small or tiny else (6, 512, 16384)), BATCH, 2, lora)
        if not small:
            work.copied = lambda model=work.model: model  # type: ignore[method-assign, misc]
        gc.collect()
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        work.ours() if side == "ours" else work.peer(loss)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def run(*, tiny: bool = False) -> list[Figure]:
    """Compare with all weights in training, and under LoRA."""
    loss = peer_loss()
    size, rows, epochs, rounds = ((1, 32, 64), 16, 1, 2) if tiny else ((4, 128, 8192), 32, 5, 7)
    figures = []
    for name, lora in (("all weights", False), ("LoRA rank 8", True)):
        work = Work(*size, rows, epochs * rows // BATCH, lora)
        seconds = paired(work.ours, lambda work=work: work.peer(loss), rounds)  # type: ignore[misc]
        if not work.gap() < 10 * RATE:
            raise RuntimeError(f"{name}: the two ended {work.gap():.2g} apart, so they did not do the same work")
        memory = {side: peak(side, lora=lora, tiny=tiny) for side in ("ours", "peer")}
        more = {"peak_mb": memory["ours"], "peer_peak_mb": memory["peer"], "largest_gap_of_weights": work.gap()}
        about = f"Llama {size[0]} x {size[1]}, vocabulary {size[2]}, {epochs} epochs of {rows} rows"
        figures.append(figure(f"NPO / OpenUnlearning's loss, {name}, {about}", *seconds, "overhead", 1.0, more))
    return figures


if __name__ == "__main__":
    print(measured(**json.loads(sys.argv[1])))
