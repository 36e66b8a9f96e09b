"""What the retrievers find among 10,000 chunks of text: P@5 and R@50, 100 questions, as HEMA reports them (on data of its own, which is not published).

Two hundred people with ten facts each; a fact is told in five wordings over the conversation, which are the relevant chunks, and asked for in a sixth. People
share first and family names, so every question has hundreds of near misses. Seconds are of a search with its embedding.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import Figure, clocked, figure
from remanence.recall.embedders import embed, load_embedder
from remanence.recall.items import NewChunk, NewMessage, Selection
from remanence.recall.retrieval import Dense, Hybrid, Lexical
from remanence.recall.sqlite_store import SqliteStore
from remanence.recall.vector_spaces import VectorSpaces
from remanence.seeds import numpy_generator

FIRST = [
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Katya",
    "Liam",
    "Mona",
    "Nils",
    "Olga",
    "Pavel",
    "Rosa",
    "Samir",
    "Tilda",
    "Umar",
]
FAMILY = ["Adler", "Brandt", "Costa", "Dumont", "Eriksen", "Fischer", "Greco", "Horvat", "Ivanov", "Jansen"]
# each line: values | five ways to tell it | the question
FACTS = (
    "Lisbon,Oslo,Vienna,Tunis,Quito|{p} moved to {v} two years ago|since the move, {p} calls {v} home|{p} rents a flat in {v}|if you write to {p}, the address is in {v}|{v} suits {p}, who has settled there|In which city does {p} live?",
    "nurse,architect,baker,pilot,judge|{p} works as a {v}|being a {v} keeps {p} busy|{p} trained for years to become a {v}|they hired {p} as a {v}|{p} earns a living as a {v}|What is the job of {p}?",
    "peanuts,cats,pollen,shellfish,penicillin|{p} is allergic to {v}|{v} make {p} ill|keep {v} away from {p}|the doctor warned {p} about {v}|{p} ended up in hospital because of {v}|Which allergy should I keep in mind for {p}?",
    "cello,trumpet,harp,accordion,drums|{p} plays the {v}|{p} practises the {v} every evening|for years {p} took {v} lessons|{p} joined the orchestra with a {v}|the {v} is what {p} loves most in music|Which instrument does {p} play?",
    "spaniel,parrot,tortoise,hamster,pony|{p} has a {v} called Momo|the {v} of {p} escaped again|{p} takes the {v} to the vet|a {v} lives with {p}|{p} bought food for the {v}|What pet does {p} keep?",
    "chess,fencing,climbing,sailing,pottery|{p} spends weekends on {v}|{p} never misses a {v} evening|{v} is how {p} relaxes|{p} won a small prize in {v}|friends got {p} into {v}|What is the hobby of {p}?",
    "lentil soup,sushi,pancakes,couscous,ravioli|{p} could eat {v} every day|for the birthday {p} wants {v}|{p} cooks {v} for guests|nothing beats {v}, says {p}|{p} ordered {v} again|What food does {p} like best?",
    "Portuguese,Arabic,Finnish,Korean,Swahili|{p} is learning {v}|{p} takes an evening class in {v}|{p} can already read the news in {v}|{v} grammar drives {p} mad|{p} practises {v} with a neighbour|Which language is {p} studying?",
    "May,June,August,October,December|{p} was born in {v}|the birthday of {p} is in {v}|{p} turns a year older in {v}|every {v} {p} throws a party for the birthday|we congratulate {p} in {v}|In what month is the birthday of {p}?",
    "bicycle,tram,motorbike,ferry,skateboard|{p} goes to the office by {v}|the {v} brings {p} to work|{p} missed the meeting since the {v} broke down|rain or shine, {p} commutes by {v}|{p} never drives, the {v} is enough|How does {p} get to work?",
)


def dialogue(people: int, asked: int) -> tuple[list[str], list[tuple[str, set[int]]]]:
    """Return chunks in random order, and questions with the numbers of their relevant chunks."""
    own = numpy_generator(0, "quality")
    names = [f"{FIRST[n % len(FIRST)]} {FAMILY[n // len(FIRST) % len(FAMILY)]}" for n in range(people)]
    texts, questions, owner = [], [], []
    for name in names:
        for values, *tellings, question in (line.split("|") for line in FACTS):
            value = own.choice(values.split(","))
            texts += [telling.format(p=name, v=value) for telling in tellings]
            owner += [len(questions)] * len(tellings)
            questions.append(question.format(p=name))
    order = own.permutation(len(texts))
    belongs = np.array(owner)[order]
    chosen = own.choice(len(questions), asked, replace=False)
    return [texts[n] for n in order], [(questions[n], set(np.flatnonzero(belongs == n).tolist())) for n in chosen]


def quality(embedder: str, people: int, asked: int) -> list[Figure]:
    """Return a figure per retriever: seconds of a search over those by words alone, P@5 and R@50."""
    encoder = load_embedder(embedder)
    texts, questions = dialogue(people, asked)
    vectors = np.concatenate([embed(encoder, texts[first : first + 500]) for first in range(0, len(texts), 500)])
    with tempfile.TemporaryDirectory() as folder, SqliteStore(Path(folder) / "store", embedder=encoder.name, dim=encoder.dim) as store:
        with store.transaction():
            stored = [
                store.append("default", "talk", NewMessage("user", t), [NewChunk(0, len(t), v)])[1][0] for t, v in zip(texts, vectors)
            ]
        number = {id: n for n, id in enumerate(stored)}
        shared = VectorSpaces(store)
        ways = {
            "words (BM25)": Lexical(store),
            "vectors": Dense(store, encoder, shared),
            "both, rank fusion": Hybrid(store, encoder, vectors=shared),
            "both, weighted": Hybrid(store, encoder, how="weighted", vectors=shared),
        }
        figures, base = [], None
        for name, way in ways.items():
            way.search(questions[0][0], 50, Selection())
            seconds, precision, recall = [], [], []
            for question, relevant in questions:
                found: list[int] = []
                seconds.append(
                    clocked(lambda q=question, w=way, f=found: f.extend(number[hit.chunk.id] for hit in w.search(q, 50, Selection())))
                )
                precision.append(len(set(found[:5]) & relevant) / 5)
                recall.append(len(set(found[:50]) & relevant) / len(relevant))
            base = base or seconds
            more = {"P@5": statistics.mean(precision), "R@50": statistics.mean(recall)}
            figures.append(
                figure(f"{len(texts):,} chunks asked in other words, {embedder}: {name} / words", seconds, base, "overhead", None, more)
            )
    return figures
