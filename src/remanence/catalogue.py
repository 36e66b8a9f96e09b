"""The one explicit table: name -> class, paper, family. `build` makes an object from a recipe's clause; nothing is imported before it is asked for.

A name with a colon is not in the table: `my_module:MyLearner` is a class of the user's, imported from the working directory.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from remanence.errors import Mistake, nearest
from remanence.stream import Forgetter, Learner, Probe

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Entry:
    """One system.

    Args:
        name: what a recipe says.
        verb: learn | forget | remember | recall | measure.
        home: `module:Class` below `package`.
        family: of the survey's map (replay, regularisation, ...).
        summary: one line.
        paper: where it comes from.
        arxiv: identifier, if there is one.
        slug: of its sheet and claim; empty for baselines.
        kinds: of rows that a probe reads; empty: all.
        package: with its dot; empty for a class of the user's.
    """

    name: str
    verb: str
    home: str
    family: str
    summary: str
    paper: str = ""
    arxiv: str = ""
    slug: str = ""
    kinds: tuple[str, ...] = ()
    package: str = "remanence."

    def load(self) -> type:
        """Import the class."""
        module, _, name = self.home.partition(":")
        return getattr(importlib.import_module(self.package + module), name)


ENTRIES: tuple[Entry, ...] = (
    Entry("sequential", "learn", "learn.sequential:Sequential", "baseline", "Plain fine-tuning on what comes; the lower bound."),
    Entry("joint", "learn", "learn.joint:Joint", "baseline", "Train on everything seen so far together; the upper bound."),
    Entry(
        "replay",
        "learn",
        "learn.replay:Replay",
        "replay",
        "Mix rows of a memory into every batch (ER).",
        "On Tiny Episodic Memories in Continual Learning, Chaudhry et al. 2019",
        "1902.10486",
    ),
    Entry(
        "derpp",
        "learn",
        "learn.derpp:DERpp",
        "replay",
        "Replay stored logits as well as labels (DER++).",
        "Dark Experience for General Continual Learning, Buzzega et al. 2020",
        "2004.07211",
    ),
    Entry(
        "agem",
        "learn",
        "learn.agem:AGEM",
        "replay",
        "Project the gradient where it would hurt the memory.",
        "Efficient Lifelong Learning with A-GEM, Chaudhry et al. 2019",
        "1812.00420",
    ),
    Entry(
        "ewc",
        "learn",
        "learn.ewc:EWC",
        "parameter regularisation",
        "Pull weights back in proportion to their Fisher information.",
        "Overcoming catastrophic forgetting in neural networks, Kirkpatrick et al. 2017",
        "1612.00796",
    ),
    Entry(
        "l2sp",
        "learn",
        "learn.l2sp:L2SP",
        "parameter regularisation",
        "Pull all weights back alike; the control for EWC.",
        "Explicit Inductive Bias for Transfer Learning with Convolutional Networks, Li et al. 2018",
        "1802.01483",
    ),
    Entry(
        "lwf",
        "learn",
        "learn.lwf:LwF",
        "function regularisation",
        "Distil the old model's outputs on the new inputs.",
        "Learning without Forgetting, Li and Hoiem 2016",
        "1606.09282",
    ),
    Entry(
        "lora",
        "learn",
        "learn.lora:LoRA",
        "architecture",
        "Train a low-rank adapter per task and merge it.",
        "LoRA: Low-Rank Adaptation of Large Language Models, Hu et al. 2021",
        "2106.09685",
    ),
    Entry(
        "hft",
        "learn",
        "learn.hft:HalfTuning",
        "sparse updates",
        "Train a random half of the weight matrices, freeze the other half, draw anew each round.",
        "HFT: Half Fine-Tuning for Large Language Models, Hui et al. 2025",
        "2404.18466",
        "hft",
    ),
    Entry(
        "sisa",
        "learn",
        "forget.sisa:SISA",
        "exact",
        "Learn in shards and slices with checkpoints, so that a row can be taken out exactly.",
        "Machine Unlearning, Bourtoule et al. 2019",
        "1912.03817",
    ),
    Entry(
        "gradient-restriction",
        "learn",
        "learn.gradient_restriction:GradientRestriction",
        "preparation for deletion",
        "Train with a penalty on the norm of the gradient, so that later deletions by a gradient step are safe.",
        "Efficient Machine Unlearning via Influence Approximation, Liu et al. 2025",
        "2507.23257",
        "iau",
    ),
    Entry("retrain", "forget", "forget.retrain:Retrain", "exact", "Train again without the rows; the oracle."),
    Entry(
        "sisa",
        "forget",
        "forget.sisa:SISA",
        "exact",
        "Take rows out of what SISA learned, by training a part of their shards again.",
        "Machine Unlearning, Bourtoule et al. 2019",
        "1912.03817",
    ),
    Entry(
        "gradient-ascent",
        "forget",
        "forget.gradient_ascent:GradientAscent",
        "global weights",
        "Climb the loss of the forget set.",
        "Knowledge Unlearning for Mitigating Privacy Risks in Language Models, Jang et al. 2022",
        "2210.01504",
    ),
    Entry(
        "gradient-difference",
        "forget",
        "forget.gradient_difference:GradientDifference",
        "global weights",
        "Climb on the forget set, descend on the retain set.",
        "Continual Learning and Private Unlearning, Liu et al. 2022",
        "2203.12817",
    ),
    Entry(
        "kl",
        "forget",
        "forget.kl:AscentKL",
        "global weights",
        "Climb on the forget set, stay close to the old model on the retain set.",
        "TOFU: A Task of Fictitious Unlearning for LLMs, Maini et al. 2024",
        "2401.06121",
    ),
    Entry(
        "npo",
        "forget",
        "forget.npo:NPO",
        "global weights",
        "Preference optimisation with negatives alone: ascent that slows down as it succeeds.",
        "Negative Preference Optimization, Zhang et al. 2024",
        "2404.05868",
    ),
    Entry(
        "rmu",
        "forget",
        "forget.rmu:RMU",
        "local weights",
        "Steer the hidden states of the forget rows to a random vector, hold those of the retain rows; a few matrices move.",
        "The WMDP Benchmark: Measuring and Reducing Malicious Use with Unlearning, Li et al. 2024",
        "2403.03218",
    ),
    Entry(
        "task-vector",
        "forget",
        "forget.task_vector:TaskVector",
        "local weights",
        "Fine-tune a copy on the forget set and subtract the difference; learn new answers afterwards where asked.",
        "Editing Models with Task Arithmetic, Ilharco et al. 2022",
        "2212.04089",
    ),
    Entry(
        "ofmu",
        "forget",
        "forget.ofmu:OFMU",
        "global weights",
        "Climb the forget loss where its gradient does not point along the retain gradient, then descend on the retain set; two levels.",
        "OFMU: Optimization-Driven Framework for Machine Unlearning, Asif and Amiri 2025",
        "2509.22483",
        "ofmu",
    ),
    Entry(
        "dpo",
        "forget",
        "forget.dpo:DPO",
        "global weights",
        "Preference optimisation of a refusal over the forgotten answer (IdkDPO).",
        "Direct Preference Optimization, Rafailov et al. 2023; as a forgetter, TOFU, Maini et al. 2024",
        "2305.18290",
    ),
    Entry(
        "melu",
        "forget",
        "forget.melu:MELU",
        "pairing of data",
        "Let each forget row meet retain rows of its own entity, under any pairwise loss.",
        "Standard vs. Modular Sampling: Best Practices for Reliable LLM Unlearning, Bushipaka et al. 2025",
        "2509.05316",
        "melu",
    ),
    Entry(
        "iau",
        "forget",
        "forget.iau:IAU",
        "influence",
        "One gradient step, up on the forget set and down on the retain set; no Hessian, no training.",
        "Efficient Machine Unlearning via Influence Approximation, Liu et al. 2025",
        "2507.23257",
        "iau",
    ),
    Entry(
        "influence",
        "forget",
        "forget.influence:InfluenceFunction",
        "influence",
        "The step that the curvature says deletion makes: inverse Hessian times the forget set's gradient.",
        "Understanding Black-box Predictions via Influence Functions, Koh and Liang 2017",
        "1703.04730",
    ),
    Entry(
        "fisher-forgetting",
        "forget",
        "forget.fisher_forgetting:FisherForgetting",
        "noise",
        "Add noise to the weights, little where the retain set needs them.",
        "Eternal Sunshine of the Spotless Net, Golatkar et al. 2020",
        "1911.04933",
    ),
    Entry("fine-tune", "forget", "forget.fine_tune:FineTune", "baseline", "Train on the retain set alone and hope that the rest fades."),
    Entry(
        "fit",
        "forget",
        "forget.fit:FIT",
        "local weights",
        "Long streams of requests: filter what was deleted before, pick the loss by importance, train few layers.",
        "FIT: Defying Catastrophic Forgetting in Continual LLM Unlearning, Xu et al. 2026",
        "2601.21682",
        "fit",
    ),
    Entry(
        "simnpo",
        "forget",
        "forget.simnpo:SimNPO",
        "global weights",
        "Preference optimisation with negatives alone, per token and without a reference model.",
        "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning, Fan et al. 2024",
        "2410.07163",
    ),
    Entry(
        "wga",
        "forget",
        "forget.wga:WGA",
        "global weights",
        "Ascent weighted by the probability of each token: what is forgotten is let alone.",
        "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond, Wang et al. 2025",
        "2502.19301",
    ),
    Entry(
        "satimp",
        "forget",
        "forget.satimp:SatImp",
        "global weights",
        "Ascent weighted by saturation and importance of each token.",
        "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning, Yang et al. 2025",
        "2505.11953",
    ),
    Entry(
        "ce-u",
        "forget",
        "forget.ceu:CEU",
        "global weights",
        "Descend towards the model's own predictions with the true token ruled out.",
        "CE-U: Cross Entropy Unlearning, Yang 2025",
        "2503.01224",
    ),
    Entry(
        "undial",
        "forget",
        "forget.undial:UNDIAL",
        "global weights",
        "Distil from the model as it was, with the forgotten tokens' logits lowered.",
        "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models, Dong et al. 2024",
        "2402.10052",
    ),
    Entry(
        "pdu",
        "forget",
        "forget.pdu:PDU",
        "global weights",
        "Flatten the logits of the forget set under a bound on the retain loss, by dual ascent.",
        "Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models, Entesari et al. 2025",
        "2506.05314",
    ),
    Entry(
        "refusal",
        "forget",
        "forget.refusal:Refusal",
        "global weights",
        "Learn to answer the forget questions with `I do not know`; changes the output, not the knowledge.",
        "TOFU: A Task of Fictitious Unlearning for LLMs, Maini et al. 2024",
        "2401.06121",
    ),
    Entry(
        "random-label",
        "forget",
        "forget.random_label:RandomLabel",
        "global weights",
        "Learn random tokens, or answers of other questions, on the forget set.",
        "Large Language Model Unlearning, Yao et al. 2023",
        "2310.10683",
    ),
    Entry(
        "ssd",
        "forget",
        "forget.ssd:SSD",
        "local weights",
        "Shrink the weights that matter far more to the forget set than to all data; no training.",
        "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening, Foster et al. 2024",
        "2308.07707",
        "ssd",
    ),
    Entry(
        "icul",
        "forget",
        "forget.icul:ICUL",
        "input and output",
        "Put the forget rows with wrong answers in front of every question; the weights keep what they knew.",
        "In-Context Unlearning: Language Models as Few Shot Unlearners, Pawelczyk et al. 2023",
        "2310.07579",
    ),
    Entry(
        "guardrail",
        "forget",
        "forget.guardrail:Guardrail",
        "input and output",
        "Recognise questions about the forget set and refuse them; the weights keep what they knew.",
        "Guardrail Baselines for Unlearning in LLMs, Thaker et al. 2024",
        "2403.03329",
    ),
    Entry(
        "sae-unlearning",
        "forget",
        "forget.sae_unlearning:SAEUnlearning",
        "local weights",
        "Move the hidden states of known entities to where the model keeps entities that it has never known, seen through a sparse autoencoder.",
        "Sparse-Autoencoder-Guided Internal Representation Unlearning for Large Language Models, Yamashita et al. 2025",
        "2509.15631",
        "sae-unlearning",
    ),
    Entry("loss", "measure", "measure.loss:Loss", "probe", "Mean loss and perplexity on held-out rows."),
    Entry(
        "recall",
        "measure",
        "measure.recall:Recall",
        "probe",
        "Does the model give the answer: greedy match, probability, rank; direct and paraphrased.",
        kinds=("qa",),
    ),
    Entry(
        "memorisation",
        "measure",
        "measure.memorisation:Memorisation",
        "probe",
        "How much of each row is known by heart: exact memorisation, extraction strength, truth ratio.",
        kinds=("text", "qa", "chat"),
    ),
    Entry(
        "efficacy",
        "measure",
        "measure.efficacy:Efficacy",
        "probe",
        "Forget efficacy and model utility: answers' probability, ROUGE-L of what is written, likeness in meaning.",
        kinds=("qa",),
    ),
    Entry(
        "gradient-norms",
        "measure",
        "measure.gradient_norms:GradientNorms",
        "probe",
        "Norm of every row's gradient: the tail that deletions meet.",
    ),
    Entry(
        "knowledge",
        "measure",
        "measure.unlearning:Knowledge",
        "probe",
        "What is still known of deleted rows: probability, ROUGE-L of the greedy answer, token accuracy, and their geometric mean.",
        kinds=("qa",),
    ),
    Entry("accuracy", "measure", "measure.accuracy:Accuracy", "probe", "Share of rows whose class is right.", kinds=("classes", "images")),
    Entry(
        "miras",
        "remember",
        "memory.miras:MirasMemory",
        "test-time memory",
        "A memory that learns while it reads, made of four choices: what holds it, what it stores, what it keeps, how it learns.",
        "It's All Connected: Test-Time Memorization, Attentional Bias, Retention and Online Optimization, Behrouz et al. 2025",
        "2504.13173",
        "miras",
    ),
    Entry(
        "moneta",
        "remember",
        "memory.miras:moneta",
        "test-time memory",
        "Miras with a cubic loss and an l4 norm.",
        "It's All Connected: Test-Time Memorization, Attentional Bias, Retention and Online Optimization, Behrouz et al. 2025",
        "2504.13173",
        "miras",
    ),
    Entry(
        "yaad",
        "remember",
        "memory.miras:yaad",
        "test-time memory",
        "Miras with a Huber loss: one wild token moves it only so far.",
        "It's All Connected: Test-Time Memorization, Attentional Bias, Retention and Online Optimization, Behrouz et al. 2025",
        "2504.13173",
        "miras",
    ),
    Entry(
        "memora",
        "remember",
        "memory.miras:memora",
        "test-time memory",
        "Miras whose weights stay distributions: forgetting is a softmax.",
        "It's All Connected: Test-Time Memorization, Attentional Bias, Retention and Online Optimization, Behrouz et al. 2025",
        "2504.13173",
        "miras",
    ),
    Entry(
        "memory-caching",
        "remember",
        "memory.caching:MemoryCache",
        "test-time memory",
        "Keep a recurrent memory's state at the end of every segment, and read all of them with gates.",
        "Behrouz et al. 2026",
        "2602.24281",
        "memory-caching",
    ),
    Entry(
        "replay-controller",
        "learn",
        "learn.replay_controller:ControlledReplay",
        "replay",
        "Replay a ring and a reservoir as strongly as measured forgetting asks for; around any model.",
        "Efficient Continual Learning in Language Models via Thalamically Routed Cortical Columns, Khadangi 2026",
        "2602.22479",
        "trc2",
    ),
    Entry(
        "trc2",
        "remember",
        "memory.trc2:TRC2ForCausalLM",
        "memory in the network",
        "A decoder with experts whose queries a thalamus modulates and whose hippocampus reads events and writes them behind the step.",
        "Efficient Continual Learning in Language Models via Thalamically Routed Cortical Columns, Khadangi 2026",
        "2602.22479",
        "trc2",
    ),
    Entry(
        "reweaving",
        "remember",
        "memory.reweaving:reweave",
        "memory in the network",
        "Any decoder with a short window attends to hidden states of salient tokens that left it, put through its own layers.",
        "Dillon et al. 2025",
        "2502.02046",
        "memory-reweaving",
    ),
    Entry(
        "sparsey",
        "remember",
        "memory.sparsey_net:Sparsey",
        "sparse codes",
        "Store an input in one look, without gradients: binary codes with as much noise as the input is novel, so that similar inputs share cells.",
        "Superposed Episodic and Semantic Memory via Sparse Distributed Representation, Rinkus and Leveille 2017",
        "1710.07829",
        "sparsey",
    ),
    Entry(
        "titans",
        "remember",
        "memory.titans:NeuralMemory",
        "test-time memory",
        "A small network whose weights are rewritten by surprise, momentum and forgetting while the model reads.",
        "Titans: Learning to Memorize at Test Time, Behrouz, Zhong and Mirrokni 2024",
        "2501.00663",
        "titans",
    ),
    Entry(
        "hema",
        "recall",
        "recall.hema:HemaMemory",
        "conversation memory",
        "An always visible gist, searchable episodes, and prompts of old conversations under a hard budget of tokens.",
        "HEMA: A Hippocampus-Inspired Extended Memory Architecture for Long-Context AI Conversations, Ahn 2025",
        "2504.16754",
        "hema",
    ),
)

PROTOCOLS: dict[str, type] = {"learn": Learner, "forget": Forgetter, "measure": Probe}
STANDARD_PROBES = {
    "text": ("loss",),
    "chat": ("loss",),
    "qa": ("recall", "loss"),
    "classes": ("accuracy", "loss"),
    "images": ("accuracy", "loss"),
}


def entry(name: str, verb: str, place: str = "method") -> Entry:
    """Return a verb's entry by name; for `module:Class`, one of the user's, checked against the verb's protocol.

    Raises:
        Mistake: there is none of that name; the nearest is suggested.
    """
    if ":" in name:
        return _own(name, verb, place)
    known = {item.name: item for item in ENTRIES if item.verb == verb}
    if name in known:
        return known[name]
    elsewhere = next((item for item in ENTRIES if item.name == name), None)
    if elsewhere is not None:
        raise Mistake(place, f"'{name}' is a method to {elsewhere.verb}, not to {verb}", f"known here are {', '.join(sorted(known))}")
    raise Mistake(place, f"unknown method '{name}'", nearest(name, known))


def _own(name: str, verb: str, place: str) -> Entry:
    """Import `module:Class` from the working directory and return an entry for it.

    Raises:
        Mistake: no such module or class, a module that fails, or a class without what the verb's protocol asks for.
    """
    module_name, _, class_name = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        if isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name):
            raise Mistake(place, f"no module named '{error.name}'", "run from the folder that holds it, or install it") from error
        raise Mistake(place, f"the module '{module_name}' fails ({type(error).__name__}: {error})", "mend it") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__]
        raise Mistake(place, f"the module '{module_name}' has no class '{class_name}'", nearest(class_name, classes))
    protocol = PROTOCOLS[verb]
    asked = [key for key, value in vars(protocol).items() if callable(value) and not key.startswith("_")]
    lacks = next((key for key in asked if not callable(getattr(found, key, None))), None)
    if lacks is not None:
        kind = protocol.__name__.lower()
        raise Mistake(place, f"'{name}' has no method `{lacks}`, so it is no {kind}", f"a {kind} has {', '.join(asked)}")
    if not dataclasses.is_dataclass(found):
        raise Mistake(place, f"'{name}' is not a dataclass", "decorate it with @dataclass; its fields are the recipe's keys")
    return Entry(name, verb, name, "own", (found.__doc__ or "").partition("\n")[0], package="")


def build(clause: str | dict[str, Any], verb: str, place: str) -> Any:
    """Make a method from a clause: its name, or a dict with `method` and hyper-parameters (`inner` may be a clause again).

    Raises:
        Mistake: unknown method or key, or a value of the wrong type, each with the place and the nearest name.
    """
    if isinstance(clause, str):
        clause = {"method": clause}
    if not isinstance(clause, dict) or not isinstance(clause.get("method"), str):
        raise Mistake(place, "names no method", "write `method: NAME`, and its hyper-parameters beside it")
    name = clause["method"]
    found = entry(name, verb, f"{place}.method").load()
    given = {key: value for key, value in clause.items() if key not in ("method", "inner")}
    inner = {"inner": build(clause["inner"], verb, f"{place}.inner")} if "inner" in clause and "inner" in _settable(found) else {}
    stray = {"inner": clause["inner"]} if "inner" in clause and not inner else {}
    return _make(found, given | stray, inner, name, place)


def build_probe(clause: str | dict[str, Any], rows: Dataset, kind: str, defaults: Mapping[str, Any], place: str) -> tuple[str, Any]:
    """Make a probe of rows from a clause: its name, or a dict with `probe` and arguments; return its name and it.

    Args:
        clause: of the recipe.
        rows: what to measure on.
        kind: of the rows.
        defaults: arguments for those probes that know them.
        place: for errors.

    Raises:
        Mistake: an unknown probe or argument, one that cannot read the kind, or a wrong value.
    """
    if isinstance(clause, str):
        clause = {"probe": clause}
    if not isinstance(clause, dict) or not isinstance(clause.get("probe"), str):
        raise Mistake(place, "names no probe", "write `probe: NAME`, and its arguments beside it")
    name = clause["probe"]
    chosen = entry(name, "measure", place)
    if chosen.kinds and kind not in chosen.kinds:
        raise Mistake(place, f"the probe '{name}' cannot read kind '{kind}'", f"choose among {', '.join(STANDARD_PROBES[kind])}")
    found = chosen.load()
    known = _settable(found).keys() - {"rows", "kind"}
    given = {key: value for key, value in clause.items() if key != "probe"}
    stray = next((key for key in given if key not in known), None)
    if stray is not None:
        raise Mistake(f"{place}.{stray}", f"'{name}' has no such key", nearest(str(stray), known))
    fixed = {"rows": rows} | ({"kind": kind} if "kind" in _settable(found) else {})
    return name, _make(found, {key: value for key, value in defaults.items() if key in known} | given, fixed, name, place)


def _settable(found: type) -> dict[str, dataclasses.Field]:
    return {item.name: item for item in dataclasses.fields(found) if item.init}


def _make(found: type, given: dict[str, Any], fixed: dict[str, Any], name: str, place: str) -> Any:
    """Check the given values by the types of the class's fields, and make an object of them and the fixed ones."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    settable, hints = _settable(found), _hints(found)
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key not in settable:
            raise Mistake(f"{place}.{key}", f"'{name}' has no such key", nearest(str(key), settable) if settable else "it has none")
        try:
            checked[key] = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            shown = repr(value)[:60]
            raise Mistake(f"{place}.{key}", f"{error.errors()[0]['msg']}, got {shown}", "correct the value") from None
    missing = [
        key
        for key, item in settable.items()
        if key not in checked and key not in fixed and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise Mistake(f"{place}.{missing[0]}", "is missing", f"'{name}' needs it")
    return found(**checked, **fixed)


def _hints(found: type) -> dict[str, Any]:
    """Return the types of a class's fields; names that the module imports for the type checker alone are `Any`."""
    from datasets import Dataset

    return get_type_hints(found, localns={"Dataset": Dataset})


def label(clause: str | dict[str, Any]) -> str:
    """Return a clause's short name for people: `hft+replay`."""
    if isinstance(clause, str):
        return clause
    inner = clause.get("inner")
    name = str(clause.get("method"))
    return f"{name}+{label(inner)}" if isinstance(inner, str | dict) and label(inner) != "sequential" else name
