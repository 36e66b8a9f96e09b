"""Retrieval in ConvoMem: any object that takes conversations and finds passages, from outside or one of these.

`Passages` goes by words (tf-idf, BM25) or by any encoder, a message being a passage; `Lossy` keeps a share of the messages, as an extractor of facts does
that misses some; a mem0 server is in `convomem_mem0`. `Retrieved` puts what was found into the shared prompt; `Hybrid` hands the whole history over while
it is small.

Cost: O(messages) to add, one sparse or dense matrix product per question; indices are built at the first question after a change.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from remanence.data.convomem import Conversation, Utterance
from remanence.data.convomem_models import Model
from remanence.measure.convomem_policies import Context, History, Memory, full_context, shown
from remanence.seeds import derive


@dataclass(frozen=True)
class Passage:
    """Something found: its text as it goes into the prompt, the id of its conversation ('' where that is not known), and when it was said, if known."""

    text: str
    conversation: str = ""
    score: float = 0.0
    place: float | None = None


class Searcher(Protocol):
    """What `Retrieved` needs; a memory of the user's own fits as it is."""

    def add(self, conversations: Sequence[Conversation]) -> None:
        """Take conversations in order."""
        ...

    def search(self, question: str, k: int) -> Sequence[Passage]:
        """Return at most k passages, best first."""
        ...

    def clear(self) -> None:
        """Forget everything."""
        ...


@dataclass
class Retrieved:
    """The k best passages, in the order in which they were said where the searcher keeps it.

    Args:
        searcher: an object with add, search and clear.
        name: for the tables; two settings must not share one.
        k: how many passages.
        whole: hand over the whole conversations of what was found.
    """

    searcher: Searcher
    name: str
    k: int = 20
    whole: bool = False
    kept: dict[str, Conversation] = field(default_factory=dict, init=False)

    def add(self, conversations: Sequence[Conversation]) -> None:
        """Give conversations to the searcher."""
        self.searcher.add(conversations)
        if self.whole:
            self.kept |= {one.id: one for one in conversations}

    def clear(self) -> None:
        """Forget everything."""
        self.searcher.clear()
        self.kept.clear()

    def context(self, question: str, helper: Model) -> Context:
        """Return what the searcher finds."""
        begun = time.perf_counter()
        found = list(self.searcher.search(question, self.k))[: self.k]
        took = time.perf_counter() - begun
        if all(one.place is not None for one in found):
            found = sorted(found, key=lambda one: one.place or 0.0)
        used = tuple(dict.fromkeys(one.conversation for one in found if one.conversation))
        text = shown([self.kept[name] for name in used if name in self.kept]) if self.whole else "\n".join(one.text for one in found)
        return Context(text, used, seconds=took)


@dataclass
class Hybrid:
    """Full context while the history has at most `until` conversations, another memory beyond.

    Args:
        large: the memory for long histories.
        until: conversations.
    """

    large: Memory
    until: int = 30
    name: str = "hybrid"
    small: History = field(default_factory=lambda: History(full_context, "full context"), init=False)

    def add(self, conversations: Sequence[Conversation]) -> None:
        """Give conversations to both."""
        self.small.add(conversations)
        self.large.add(conversations)

    def clear(self) -> None:
        """Forget everything."""
        self.small.clear()
        self.large.clear()

    def context(self, question: str, helper: Model) -> Context:
        """Return the context of the one that the length calls for."""
        chosen: Memory = self.small if len(self.small.conversations) <= self.until else self.large
        return chosen.context(question, helper)


Scorer = Callable[[str], np.ndarray]  # a question -> one score per passage, 0 where there is nothing in common


@dataclass
class Passages:
    """Messages in order, scored by `index`: `tf_idf`, `bm25`, or `dense(encode)`. The index is built at the first question after a change."""

    index: Callable[[Sequence[str]], Scorer]
    texts: list[str] = field(default_factory=list, init=False)
    owners: list[str] = field(default_factory=list, init=False)
    scorer: Scorer | None = field(default=None, init=False)

    def add(self, conversations: Sequence[Conversation]) -> None:
        """Take every message as a passage."""
        for one in conversations:
            self.texts += [f"{message.speaker}: {message.text}" for message in one.messages]
            self.owners += [one.id] * len(one.messages)
        self.scorer = None

    def search(self, question: str, k: int) -> list[Passage]:
        """Return the k best passages that have anything in common with the question; ties go to the younger."""
        if not self.texts:
            return []
        if self.scorer is None:
            self.scorer = self.index(self.texts)
        scores = self.scorer(question)
        order = np.lexsort((-np.arange(len(scores)), -scores))[:k]
        return [Passage(self.texts[n], self.owners[n], float(scores[n]), float(n)) for n in order if scores[n] > 0]

    def clear(self) -> None:
        """Forget everything."""
        self.texts.clear()
        self.owners.clear()
        self.scorer = None


def tf_idf(texts: Sequence[str]) -> Scorer:
    """Score by the cosine of tf-idf vectors (sublinear counts, English stop words left out)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    coder = TfidfVectorizer(sublinear_tf=True, analyzer=_terms)
    try:
        matrix = coder.fit_transform(texts)
    except ValueError:  # nothing but stop words
        return lambda question: np.zeros(len(texts))
    return lambda question: (matrix @ coder.transform([question]).T).toarray()[:, 0]


def bm25(texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> Scorer:
    """Score by Okapi BM25 over words (Robertson and Zaragoza 2009)."""
    from scipy.sparse import csr_matrix

    words: dict[str, int] = {}
    tokens = [[words.setdefault(word, len(words)) for word in _words(text)] for text in texts]
    length = np.array([len(one) for one in tokens], dtype=np.float64)
    rows, columns = np.repeat(np.arange(len(tokens)), length.astype(int)), np.fromiter((w for one in tokens for w in one), dtype=int)
    counts = csr_matrix((np.ones(len(columns)), (rows, columns)), shape=(len(tokens), len(words)))
    counts.sum_duplicates()
    seen = np.bincount(counts.indices, minlength=len(words))
    idf = np.log1p((len(tokens) - seen + 0.5) / (seen + 0.5))
    places = np.repeat(np.arange(len(tokens)), np.diff(counts.indptr))
    norm = k1 * (1 - b + b * length[places] / max(length.mean(), 1e-9))
    counts.data = counts.data * (k1 + 1) / (counts.data + norm) * idf[counts.indices]
    matrix = counts.tocsc()

    def score(question: str) -> np.ndarray:
        known = [words[word] for word in dict.fromkeys(_words(question)) if word in words]
        return np.asarray(matrix[:, known].sum(axis=1)).ravel() if known else np.zeros(len(tokens))

    return score


def dense(encode: Callable[[list[str]], Any]) -> Callable[[Sequence[str]], Scorer]:
    """Score by the cosine of an encoder's unit vectors (texts -> (N, D)), moved to 0..2; vectors of texts seen before are kept."""
    known: dict[str, np.ndarray] = {}

    def vectors(texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, np.asarray(encode(new), dtype=np.float32)))
        return np.stack([known[text] for text in texts])

    def index(texts: Sequence[str]) -> Scorer:
        matrix = vectors(texts)
        return lambda question: 1 + matrix @ vectors([question])[0]

    return index


@dataclass
class Lossy:
    """Another searcher over a share of the messages: each is kept or lost by chance, the same for the same seed."""

    searcher: Searcher
    keep: float = 0.7
    seed: int = 0

    def add(self, conversations: Sequence[Conversation]) -> None:
        """Pass on what is kept."""
        self.searcher.add(
            [Conversation(tuple(filter(self._kept, one.messages)), one.id, one.evidence, one.person) for one in conversations]
        )

    def search(self, question: str, k: int) -> Sequence[Passage]:
        """Return what the searcher finds."""
        return self.searcher.search(question, k)

    def clear(self) -> None:
        """Forget everything."""
        self.searcher.clear()

    def _kept(self, message: Utterance) -> bool:
        return derive(self.seed, "kept", message.speaker, message.text) / 2**63 < self.keep


@lru_cache(maxsize=1 << 16)
def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


@lru_cache(maxsize=1 << 16)
def _terms(text: str) -> tuple[str, ...]:
    """Return the words of two letters or more that are no English stop words, as scikit-learn's own analyser does; kept per text."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return tuple(word for word in _words(text) if len(word) > 1 and word not in ENGLISH_STOP_WORDS)
