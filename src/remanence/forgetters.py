"""Every known way to make a language model forget: what it changes, what it needs, what it promises, what it costs, and whether it is built here.

The families and the order are those of the survey "Digital Forgetting in Large Language Models", Blanco-Justicia et al. 2024, arXiv 2404.02062; losses that are
newer than it are those of OpenUnlearning (arXiv 2506.12618). A method is built where the catalogue has an entry of its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remanence.catalogue import ENTRIES

FAMILIES = {
    "A": "global weights",
    "B": "local weights",
    "C": "architecture",
    "D": "input and output",
}
GUARANTEES = {
    "exact": "what results is distributed as training without the rows",
    "approximate": "measured, not proven: audit every result",
    "none": "the knowledge is still there: in the weights, or behind a layer that can be taken off",
}
INPUTS = {
    "forget": "rows that must go",
    "retain": "rows that must stay",
    "reference": "the model as it was, beside the one in training",
    "history": "all training rows, in the order of training",
    "answers": "other answers to the forget questions: refusals, alternatives, random or new ones",
    "extra": "rows of another kind: normal data, hold-out, contrastive pairs, concept labels",
    "reward": "a score of outputs",
}
TARGETS = {
    "item": "a text or sample",
    "concept": "all that is known of a subject, or a bias",
    "class": "a class",
    "task": "a task or capability",
    "behaviour": "a way of behaving",
}
COSTS = ("very low", "low", "medium", "high", "very high")  # against training the model again, which is very high


@dataclass(frozen=True)
class Known:
    """One method.

    Args:
        name: for people.
        family: key of `FAMILIES`.
        needs: keys of `INPUTS`.
        guarantee: key of `GUARANTEES`.
        targets: keys of `TARGETS`.
        cost: one of `COSTS`.
        what: objective or procedure in one line.
        arxiv: identifier of the paper, if there is one.
        entry: name in the catalogue; empty where none is planned.
        how: keys of that entry that make it this method, where it is one of its options.
    """

    name: str
    family: str
    needs: tuple[str, ...]
    guarantee: str
    targets: tuple[str, ...]
    cost: str
    what: str
    arxiv: str = ""
    entry: str = ""
    how: str = ""


_F, _FR, _FRP = ("forget",), ("forget", "retain"), ("forget", "retain", "reference")
_ITEM, _FACTS, _BIAS = ("item",), ("item", "concept"), ("concept", "behaviour")

KNOWN: tuple[Known, ...] = (
    Known(
        "Retrain",
        "A",
        ("forget", "history"),
        "exact",
        ("item", "class"),
        "very high",
        "fit on D without D_f; the reference of every metric",
        "",
        "retrain",
    ),
    Known(
        "SISA",
        "A",
        ("forget", "history"),
        "exact",
        ("item", "class"),
        "high",
        "shards, slices, checkpoints; train a part again",
        "1912.03817",
        "sisa",
    ),
    Known(
        "Leave-one-out ensemble",
        "A",
        ("forget", "reference"),
        "approximate",
        _ITEM,
        "high",
        "KL(mean of teachers without the row || student) on D_f",
        "2309.16082",
    ),
    Known(
        "Gradient ascent", "A", _F, "approximate", _ITEM, "low", "-NLL(D_f); the lower bound: it collapses", "2210.01504", "gradient-ascent"
    ),
    Known("SeUL", "A", _F, "approximate", _ITEM, "low", "gradient ascent on sensitive spans only", "2402.05813", "seul"),
    Known("Gradient difference", "A", _FR, "approximate", _FACTS, "medium", "-NLL(D_f) + NLL(D_r)", "2203.12817", "gradient-difference"),
    Known("Ascent with KL", "A", _FRP, "approximate", _FACTS, "medium", "-NLL(D_f) + KL(p_0 || p) on D_r", "2401.06121", "kl"),
    Known(
        "Yao",
        "A",
        ("forget", "reference", "answers", "extra"),
        "approximate",
        _BIAS,
        "medium",
        "-NLL(D_f) + NLL(random answers) + KL(p_0 || p) on normal data",
        "2310.10683",
        "yao",
    ),
    Known(
        "Refusal tuning",
        "A",
        ("forget", "retain", "answers"),
        "approximate",
        _FACTS,
        "low",
        "NLL(q_f, refusal) + R; refusing is not forgetting",
        "2401.06121",
        "refusal",
    ),
    Known(
        "Random labels", "A", _FR, "approximate", _ITEM, "medium", "NLL towards tokens drawn uniformly + R", "2310.10683", "random-label"
    ),
    Known("NPO", "A", _FRP, "approximate", _FACTS, "medium", "-(2/b) log sigmoid(b (s - s_0)) + R", "2404.05868", "npo"),
    Known(
        "DPO towards a refusal",
        "A",
        ("forget", "retain", "reference", "answers"),
        "approximate",
        _FACTS,
        "medium",
        "preference of the refusal over the forget answer + R",
        "2305.18290",
        "dpo",
    ),
    Known(
        "AltPO",
        "A",
        ("forget", "retain", "reference", "answers"),
        "approximate",
        _FACTS,
        "medium",
        "DPO towards answers that the model itself makes up",
        "2409.13474",
        "altpo",
    ),
    Known(
        "SimNPO",
        "A",
        _FR,
        "approximate",
        _FACTS,
        "medium",
        "-(2/b) log sigmoid(b (s/|x| - delta)) + R; no reference",
        "2410.07163",
        "simnpo",
    ),
    Known("WGA", "A", _FR, "approximate", _FACTS, "medium", "ascent weighted by p_t^b", "2502.19301", "wga"),
    Known("SatImp", "A", _FR, "approximate", _FACTS, "medium", "ascent weighted by p^b1 (1 - p)^b2", "2505.11953", "satimp"),
    Known(
        "CE-U",
        "A",
        _F,
        "approximate",
        _FACTS,
        "low",
        "cross-entropy towards the model's own distribution without the true token",
        "2503.01224",
        "ce-u",
    ),
    Known(
        "UNDIAL",
        "A",
        ("forget", "reference"),
        "approximate",
        _FACTS,
        "medium",
        "cross-entropy towards softmax(z_0 - b onehot(y))",
        "2402.10052",
        "undial",
    ),
    Known("PDU", "A", _FR, "approximate", _FACTS, "medium", "flat logits on D_f; the retain weight by dual ascent", "2506.05314", "pdu"),
    Known(
        "KGA",
        "A",
        ("forget", "retain", "reference", "extra"),
        "approximate",
        _ITEM,
        "high",
        "the knowledge gap on D_f becomes that on unseen data",
        "2305.06535",
    ),
    Known(
        "Who's Harry Potter",
        "A",
        ("forget", "reference"),
        "approximate",
        ("concept",),
        "high",
        "fine-tune on z_0 - a relu(z_reinforced - z_0), names replaced",
        "2310.02238",
        "whp",
    ),
    Known(
        "Quark",
        "A",
        ("forget", "reference", "reward"),
        "approximate",
        ("behaviour",),
        "high",
        "condition on reward quantiles, sample with the best one",
        "2205.13636",
    ),
    Known(
        "OFMU",
        "A",
        _FR,
        "approximate",
        _FACTS,
        "high",
        "bi-level: forget inside, retain outside, gradients decorrelated",
        "2509.22483",
        "ofmu",
    ),
    Known("IAU", "A", _FR, "approximate", _ITEM, "low", "one gradient step that stands for the influence of the rows", "2507.23257", "iau"),
    Known(
        "MELU",
        "A",
        _FR,
        "approximate",
        _FACTS,
        "medium",
        "which retain rows meet which forget rows, entity by entity, around another method",
        "2509.05316",
        "melu",
    ),
    Known(
        "Influence function",
        "A",
        _FR,
        "approximate",
        _ITEM,
        "medium",
        "inverse Hessian times the gradient on D_f",
        "1703.04730",
        "influence",
    ),
    Known(
        "Fisher forgetting",
        "A",
        _FR,
        "approximate",
        ("item", "class"),
        "low",
        "noise, little where D_r needs the weight",
        "1911.04933",
        "fisher-forgetting",
    ),
    Known(
        "Fine-tuning on the rest",
        "A",
        ("retain",),
        "approximate",
        _ITEM,
        "low",
        "NLL(D_r) alone, in the hope that the rest fades",
        "",
        "fine-tune",
    ),
    Known(
        "RMU",
        "B",
        _FRP,
        "approximate",
        ("concept", "task"),
        "medium",
        "hidden states of D_f to a random vector, of D_r held",
        "2403.03218",
        "rmu",
    ),
    Known(
        "Task vector",
        "B",
        _F,
        "approximate",
        ("task", "behaviour"),
        "low",
        "theta_0 - a (theta_ft(D_f) - theta_0)",
        "2212.04089",
        "task-vector",
    ),
    Known(
        "F-Learning",
        "B",
        ("forget", "answers"),
        "approximate",
        _FACTS,
        "low",
        "subtract a task vector, then fine-tune on the new facts",
        "2311.08011",
        "task-vector",
        "then: new",
    ),
    Known(
        "PCGU",
        "B",
        ("extra",),
        "approximate",
        _BIAS,
        "low",
        "step only on the rows of weights whose gradients differ most on contrastive pairs",
    ),
    Known(
        "DEPN",
        "B",
        _F,
        "approximate",
        _ITEM,
        "medium",
        "zero the feed-forward neurons that integrated gradients name",
        "2310.20138",
        "depn",
    ),
    Known(
        "Selective pruning",
        "B",
        _FR,
        "approximate",
        ("task", "concept"),
        "very low",
        "drop neurons of the largest importance(forget) / importance(retain)",
        "2403.01267",
    ),
    Known(
        "SSD",
        "B",
        _FR,
        "approximate",
        ("item", "class", "concept"),
        "low",
        "shrink weights whose Fisher importance for D_f is out of proportion",
        "2308.07707",
        "ssd",
    ),
    Known(
        "FIT",
        "B",
        _FR,
        "approximate",
        _FACTS,
        "medium",
        "long streams of requests: filter, choose the loss, touch few layers",
        "2601.21682",
        "fit",
    ),
    Known(
        "SAE-guided",
        "B",
        ("forget", "retain", "extra"),
        "approximate",
        ("concept",),
        "medium",
        "activations of a known entity become those of an unknown one",
        "2509.15631",
        "sae-unlearning",
    ),
    Known(
        "EUL", "C", _FRP, "none", _FACTS, "medium", "a layer after each feed-forward learns to forget; the model below stays", "2310.20150"
    ),
    Known(
        "SISA-FC, SISA-A",
        "C",
        ("forget", "history"),
        "exact",
        ("item", "class"),
        "medium",
        "SISA on a head or on adapters alone; exact for what they learned",
        "2212.09573",
    ),
    Known(
        "LEACE",
        "C",
        ("extra",),
        "approximate",
        _BIAS,
        "very low",
        "erase the linear information about a concept in closed form",
        "2306.03819",
    ),
    Known(
        "Orthogonal bias subspace",
        "C",
        ("extra",),
        "approximate",
        _BIAS,
        "low",
        "project a bias subspace out of the representation",
        "2206.10744",
    ),
    Known(
        "ICUL", "D", _FR, "none", _ITEM, "very low", "turned forget rows and correct rows in front of every question", "2310.07579", "icul"
    ),
    Known(
        "Guardrail",
        "D",
        _FR,
        "none",
        _FACTS,
        "very low",
        "recognise a question about D_f and refuse it; or say so in a prompt",
        "2403.03329",
        "guardrail",
    ),
    Known(
        "Zero-shot self-debiasing",
        "D",
        (),
        "none",
        ("behaviour",),
        "very low",
        "ask the model to find and mend the bias in its answer",
        "2402.01981",
    ),
    Known(
        "SERAC",
        "D",
        ("forget", "answers", "extra"),
        "none",
        _FACTS,
        "medium",
        "a scope classifier sends edited questions to a second model",
        "2206.06520",
    ),
    Known(
        "MemPrompt", "D", ("answers",), "none", ("behaviour",), "very low", "a memory of users' feedback goes into the prompt", "2201.06009"
    ),
)


def methods(known: Sequence[Known] = KNOWN) -> list[dict[str, Any]]:
    """Return one row per known method: name, family, needs, guarantee, targets, cost, what, arxiv, status, method (in the catalogue), how.

    Forgetters of the catalogue that are not in the list follow it, with what their entry says.
    """
    built = {entry.name: entry for entry in ENTRIES if entry.verb == "forget"}
    rows = [
        {
            "name": each.name,
            "family": FAMILIES[each.family],
            "needs": list(each.needs),
            "guarantee": each.guarantee,
            "targets": list(each.targets),
            "cost": each.cost,
            "what": each.what,
            "arxiv": each.arxiv,
            "status": "built" if each.entry in built else "not built",
            "method": each.entry if each.entry in built else "",
            "how": each.how if each.entry in built else "",
        }
        for each in known
    ]
    listed = {each.entry for each in known}
    rows += [
        {
            "name": name,
            "family": entry.family,
            "needs": [],
            "guarantee": "approximate",
            "targets": [],
            "cost": "",
            "what": entry.summary,
            "arxiv": entry.arxiv,
            "status": "built",
            "method": name,
            "how": "",
        }
        for name, entry in built.items()
        if name not in listed
    ]
    return rows


def markdown() -> str:
    """Return the list as Markdown, family by family, behind what its words mean; for the documentation."""
    rows = methods()
    parts = [_words("Guarantee", GUARANTEES), _words("Needs", INPUTS), _words("Target", TARGETS)]
    for family in dict.fromkeys(row["family"] for row in rows):
        head = "| method | what it does | needs | guarantee | targets | cost | here |\n|---|---|---|---|---|---|---|"
        lines = [_line(row) for row in rows if row["family"] == family]
        parts.append("\n".join([f"### {family[0].upper()}{family[1:]}\n", head, *lines]))
    return "\n\n".join(parts)


def _words(title: str, words: dict[str, str]) -> str:
    return "\n".join([f"| {title.lower()} | meaning |\n|---|---|", *(f"| {word} | {meaning} |" for word, meaning in words.items())])


def _line(row: dict[str, Any]) -> str:
    name = f"[{row['name']}](https://arxiv.org/abs/{row['arxiv']})" if row["arxiv"] else row["name"]
    here = f"`{row['method']}`" + (f" with `{row['how']}`" if row["how"] else "") if row["method"] else "not built"
    cells = [name, row["what"], ", ".join(row["needs"]), row["guarantee"], ", ".join(row["targets"]), row["cost"], here]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
