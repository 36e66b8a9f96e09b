"""Titans: a memory reaches where attention cannot. Key-value recall beyond every window, with and without a memory that learns while it reads.

Four pairs (16 keys, 16 values) lie in filler (one blank token) in the first half of 64 tokens and are asked for in the second, at least
16 tokens later. Two blocks of width 32 with a window of 8 see 14 tokens back; in the other arms the second block is MAG (memory of
two layers and one head, chunks of 16, hidden width 2 D). 600 steps on fresh rows, batch 32,
AdamW 5e-3 with a warm-up over 30 % and a cosine. Accuracy over 256 fresh rows at 64, 128 and 256 tokens, and with 8 pairs; chance is
0.0625. The ablations are reported, not claimed. `speedup`: wall time of reading 2,048 tokens (two memories of width 32, chunk 32) one
token at a time over that of the chunk form, with the largest difference of their outputs.
"""

from __future__ import annotations

import time
from typing import Any

from remanence.claims.claim import Claim, Results, Verdict

STEPS, RATE, ROWS, FILLER = 600, 5e-3, 256, 1
MEMORY = {"chunk": 16, "expansion": 2}
TESTS = {"64": {}, "128": {"tokens": 128}, "256": {"tokens": 256}, "8 pairs": {"pairs": 8}}
LENGTHS = ("64", "128", "256")
ABLATIONS: dict[str, dict[str, Any]] = {
    "memory": {},
    "no momentum": {"momentum": False},
    "no decay": {"decay": False},
    "linear memory": {"depth": 1},
}


def run(arm: str, seed: int) -> dict[str, float]:
    """Train one arm; return its accuracies, and for the whole memory the speed of its two forms."""
    import torch

    from remanence.data.recall_tasks import Recall, recall_accuracy
    from remanence.memory.lm import TitansConfig, TitansForCausalLM
    from remanence.models.forward import fresh_weights
    from remanence.seeds import derive
    from remanence.training.trainer import Settings, Trainer

    task = Recall(filler=FILLER, seed=derive(seed, "train"))
    settings: dict[str, Any] = {
        "vocab_size": task.vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    settings |= {"window": 8, "n_persistent": 0, "initializer_range": 0.1, "embedding_range": 1.0}
    if arm == "window":
        config = TitansConfig(**settings, variant="swa")
    else:
        memory = {**MEMORY, **ABLATIONS[arm]}
        config = TitansConfig(**settings, variant="mag", layers_with_memory=[1], memory=memory)
    with fresh_weights(derive(seed, "weights")):
        model = TitansForCausalLM(config)
    training = Settings(steps=STEPS, lr=RATE, schedule="cosine", warmup=0.3, weight_decay=0.01)
    Trainer(training, seed=seed, name=arm, progress=False).fit(model, task, steps=STEPS)
    model.eval()
    found: dict[str, float] = {}
    with torch.no_grad():
        for name, changes in TESTS.items():
            rows = Recall(**{"filler": FILLER, "size": ROWS, "seed": derive(seed, "test", name), **changes})[0]
            found[name] = recall_accuracy(model(rows["input_ids"]).logits, rows["labels"])
    return found | (speed(seed) if arm == "memory" else {})


def speed(seed: int) -> dict[str, float]:
    """Return how many times faster the chunk form reads 2,048 tokens than the token-by-token reference, and the largest difference."""
    import torch

    from remanence.memory import dual
    from remanence.seeds import generator

    random = generator(seed, "speed")
    rows, tokens, width = 2, 2048, 32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    q, k, v = (torch.nn.functional.normalize(normal(rows, tokens, width), dim=-1) for _ in range(3))
    theta, eta, alpha = (torch.rand(rows, tokens, generator=random) * bound for bound in (0.1, 0.9, 0.05))
    read = dual.Tokens(k, v, theta, eta, alpha, torch.ones(rows, tokens, dtype=torch.bool))
    weights = tuple(normal(rows, *shape) / shape[0] ** 0.5 for shape in ((width, 2 * width), (2 * width, width)))
    rule, carry = dual.Rule(32), dual.start(weights, read, True)
    with torch.no_grad():
        dual.read_write(rule, carry, q, read, None)  # warm
        begun = time.perf_counter()
        fast = dual.read_write(rule, carry, q, read, None).y
        middle = time.perf_counter()
        slow = dual.read_write_reference(rule, carry.W, carry.S, q, read, None)[0]
        ended = time.perf_counter()
    return {"speedup": (ended - middle) / (middle - begun), "difference": float((fast - slow).abs().max())}


def judge(results: Results) -> Verdict:
    """Hold the sheet's thresholds against every seed."""
    gaps = {name: results["memory", name] - results["window", name] for name in LENGTHS}
    least = min(float(gap.min()) for gap in gaps.values())
    told = ", ".join(f"{name} tokens {gap.min():.2f} to {gap.max():.2f}" for name, gap in gaps.items())
    ablations = ", ".join(f"{arm} {results.mean(arm, '64'):.2f}" for arm in ABLATIONS)
    speedup = results.mean("memory", "speedup")
    reasons = (
        f"accuracy with memory minus window alone, over seeds: {told} (claimed above 0.6 at every length on every seed; falsified at 0.2)",
        f"with 8 pairs: {results.mean('memory', '8 pairs'):.2f} against {results.mean('window', '8 pairs'):.2f}",
        f"mean accuracy at 64 tokens, not claimed: {ablations}",
        f"reading 2,048 tokens in chunks is {speedup:.0f} times as fast as token by token (expected above 10), "
        f"outputs differ by at most {results['memory', 'difference'].max():.1e}",
    )
    if any(float(gap.mean()) <= 0.2 for gap in gaps.values()):
        return Verdict("does not hold", reasons)
    return Verdict("holds" if least > 0.6 else "mixed", reasons)


CLAIM = Claim(
    slug="titans",
    title="Titans: Learning to Memorize at Test Time (arXiv 2501.00663)",
    sentence="On recall beyond its window, a model whose second block is MAG answers at least 0.6 (of accuracy) more often than the same model with window "
    "attention alone, at 64 (trained), 128 and 256 tokens, on every seed. Falsified by a gain of 0.2 or less.",
    arms=("window", *ABLATIONS),
    run=run,
    judge=judge,
    paper=(
        "WikiText perplexity, 760M and 30B tokens: MAG 18.61, MAL 19.07, MAC 19.93, LMM 20.04; Transformer++ 25.21, Gated DeltaNet 21.18.",
        "RULER S-NIAH at 16K, passkey: MAC 98.4, LMM 96.2, TTT 88.4, DeltaNet 71.4, Mamba2 5.4.",
        "Ablation, long context: whole 92.68, no momentum 87.12, no decay 85.60, linear memory 85.34.",
    ),
    notes=(
        "Settings were chosen on seed 10, which is not among those judged. About ten forms were tried there (filler, first weights, prefix, bound of the steps, form of the "
        "memory). With the layer norm's scale beginning at 1 the residual form stood at 0.52 after 450 steps; the plain form with steps up to 0.2 and bounded gradients reached "
        "1.00, 0.50 and 0.28 at 64, 128 and 256 tokens; with the scale beginning at 0.1, since then the default, the residual form reached 0.99, 1.00 and 1.00. With 16 "
        "different filler tokens instead of a blank one it does not leave chance in 600 steps.",
        "A first record, with the gates' first biases at 0 (write) and -4 (forget), was mixed: one seed of three learned fully (0.30 to 0.95 above the window at 64 tokens, 0.21 "
        "to 0.94 at 256), and the arm without decay did better than the whole memory. The biases are -2 and -7 since, chosen on seed 10 in a model of the claim `memory-recall`.",
    ),
    show=(*TESTS, "speedup", "difference"),
    minutes=8,
    long=True,
)
