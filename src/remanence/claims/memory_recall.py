"""How far back can each memory recall? Hidden pairs against length: every memory of the product beside window attention and full attention.

Rows hide key-value pairs (16 keys, 16 values) in filler (one blank token) in their first half and ask for them in the second, at least 16 tokens later. Two
blocks of width 32; the first attends to a window of 8. The second attends to the window too, and has a memory beside it (MAG); in `full attention` both blocks
see all. Every arm is given the same number of parameters, by the width of its feed-forward layers. Trained on rows of 64 tokens with 4 pairs, 600 steps, batch
32, AdamW 5e-3 with a warm-up over 30 % and a cosine; nothing is tuned per arm. First weights are those of the Titans claim (0.1 wide, embeddings 1). Tested on
128 fresh rows per length: `4 at T` is the accuracy over four pairs, `needle at T` over a single one. Chance is 0.0625. The memories' chunk is 16, the cache's
segment 32 (over a linear attention). Titans as lmm, mac and mal, of which nothing is claimed, are left out for want of time.
The order of the memories is reported, not claimed: at this size it is a fact about 600 steps.
"""

from __future__ import annotations

from typing import Any

from remanence.claims.claim import Claim, Results, Verdict

STEPS, RATE, ROWS, FILLER = 600, 5e-3, 128, 1
LENGTHS = (64, 128, 256, 512, 1024)
DEEP = {"chunk": 16, "expansion": 2}
MEMORIES: dict[str, tuple[str, str, dict[str, Any]]] = {  # arm -> model, variant, settings of the memory
    "titans mag": ("Titans", "mag", DEEP),
    "moneta": ("Miras", "mag", {"preset": "moneta", "mode": "boundary", "chunk": 16}),
    "yaad": ("Miras", "mag", {"preset": "yaad", "chunk": 16}),
    "memora": ("Miras", "mag", {"preset": "memora", "mode": "boundary", "chunk": 16}),
    "linear": ("MemoryCaching", "mag", {"base": "linear", "segment": 1 << 20}),
    "linear, cached": ("MemoryCaching", "mag", {"base": "linear", "segment": 32, "rule": "grm"}),
}
CLAIMED = ("titans mag", "moneta", "yaad", "memora", "linear, cached")
FULL = "full attention"


def build(arm: str, vocabulary: int, width: int) -> Any:
    """Return the model of an arm with feed-forward layers of a width."""
    from remanence.memory import lm

    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    shape |= {
        "n_persistent": 4,
        "window": LENGTHS[-1] if arm == FULL else 8,
        "segment": 32,
        "initializer_range": 0.1,
        "embedding_range": 1.0,
    }
    if arm in ("window", FULL):
        return lm.TitansForCausalLM(lm.TitansConfig(**shape, variant="swa"))
    kind, variant, memory = MEMORIES[arm]
    config = getattr(lm, f"{kind}Config")(**shape, variant=variant, layers_with_memory=[1], memory=memory)
    return getattr(lm, f"{kind}ForCausalLM")(config)


def equal(arm: str, vocabulary: int, budget: int) -> Any:
    """Return the model of an arm whose feed-forward layers are as wide as the budget of parameters allows."""
    from remanence.models.load import parameter_count

    one, two = (parameter_count(build(arm, vocabulary, width)) for width in (1, 2))
    return build(arm, vocabulary, max(1, 1 + (budget - one) // (two - one)))


def run(arm: str, seed: int) -> dict[str, float]:
    """Train one arm; return its accuracies by length."""
    import torch

    from remanence.data.recall_tasks import Recall, recall_accuracy
    from remanence.models.forward import fresh_weights
    from remanence.models.load import parameter_count
    from remanence.seeds import derive
    from remanence.training.trainer import Settings, Trainer

    task = Recall(filler=FILLER, seed=derive(seed, "train"))
    with fresh_weights(derive(seed, "weights")):
        budget = max(parameter_count(build(name, task.vocabulary, 64)) for name in MEMORIES)
        model = equal(arm, task.vocabulary, budget)
    training = Settings(steps=STEPS, lr=RATE, schedule="cosine", warmup=0.3, weight_decay=0.01)
    Trainer(training, seed=seed, name=arm, progress=False).fit(model, task, steps=STEPS)
    model.eval()
    found = {"parameters": float(parameter_count(model))}
    with torch.no_grad():
        for name, pairs in (("4", 4), ("needle", 1)):
            for length in LENGTHS:
                rows = Recall(filler=FILLER, tokens=length, pairs=pairs, size=ROWS, seed=derive(seed, "test", name, length))[0]
                found[f"{name} at {length}"] = recall_accuracy(model(rows["input_ids"]).logits, rows["labels"])
    return found


def judge(results: Results) -> Verdict:
    """Hold the gain over the window, at 256 tokens, against the threshold for each memory."""
    gains = {arm: results[arm, "4 at 256"] - results["window", "4 at 256"] for arm in CLAIMED}
    order = sorted(results.arms, key=lambda arm: -results.mean(arm, "4 at 256"))
    reasons = (
        "accuracy at 256 tokens minus that of the window alone, least of the seeds: "
        + ", ".join(f"{arm} {gain.min():.2f}" for arm, gain in gains.items())
        + " (claimed above 0.3 each)",
        "in order at 256 tokens: " + ", ".join(f"{arm} {results.mean(arm, '4 at 256'):.2f}" for arm in order),
        "at 1,024 tokens, sixteen times the trained length: " + ", ".join(f"{arm} {results.mean(arm, '4 at 1024'):.2f}" for arm in order),
        "one needle at 1,024 tokens: " + ", ".join(f"{arm} {results.mean(arm, 'needle at 1024'):.2f}" for arm in order),
    )
    reached = [bool((gain > 0.3).all()) for gain in gains.values()]
    return Verdict("holds" if all(reached) else "mixed" if any(reached) else "does not hold", reasons)


CLAIM = Claim(
    slug="memory-recall",
    title="Recall against length, every memory beside attention (Titans, Miras and Memory Caching; experiment ours)",
    sentence="With equal parameters, a second block with a memory (Titans MAG, Moneta, Yaad, Memora, cached linear attention) answers at least 0.3 (of accuracy) more often "
    "than window attention alone at 256 tokens, four times the trained length, on every seed. The order among the memories is reported, not claimed.",
    arms=("window", FULL, *MEMORIES),
    run=run,
    judge=judge,
    paper=("RULER S-NIAH at 16K, number: Titans MAC 97.4, LMM 80.2; S-NIAH average: Moneta 93.5, Yaad 92.9.",),
    notes=(
        "Settings were chosen on seed 10, which is not among those judged, before any judged seed was run; about twenty forms were tried there. With first weights 0.02 wide and "
        "the gates' earlier first values (steps near 0.5, keeping 0.98, Yaad's threshold at 1, no SiLU) Yaad and Moneta stayed at chance and Titans mag reached 0.38, 0.10 and 0.05 at "
        "64, 256 and 1,024 tokens. With slower gates alone (steps near 0.12, keeping 0.999) Titans mag reached 0.59 and 0.18, Memora 0.32 and 0.15, Yaad 0.12 and 0.09 at 64 and 256; "
        "with weights 0.1 wide and embeddings 1 as well, Titans mag reached 1.00 at every length; with SiLU in Miras as well, Moneta 0.95, 0.93 and 0.93, Memora 0.11, and Yaad 0.28 "
        "throughout with its threshold beginning at 4 (0.16 without SiLU) and 0.53, 0.47 and 0.59 with 20 (and the layer norm at 0.2); it begins at 4 sqrt(D) = 22.6 since. That last form was not tried again.",
        "Why the earlier gates failed: a pair told amid filler moved a fresh Yaad's answer by 0.15 % of the way to its value after 40 more tokens, Moneta's by 0.6 %, Memora's by "
        "1.1 %; with the present ones it is 3.6 %, 4.3 % and 3.1 %. Fourteen equal filler tokens of a chunk take fourteen steps from one point, and Yaad's errors, all "
        "above its threshold, wrote signs that never came to rest.",
    ),
    show=("parameters", *(f"4 at {length}" for length in LENGTHS), *(f"needle at {length}" for length in LENGTHS)),
    minutes=15,
    long=True,
)
