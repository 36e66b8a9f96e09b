"""Generate people with known facts: questions, statements, paraphrases, wrong answers and neighbours, all with ground truth.

A world is fixed by its seed. Person `i` has one name and one value per attribute, whatever part of the world is asked for, so
`Biographies(people=400)` and `Biographies(people=50, first=400)` are disjoint people of one world: train on the first, hold out the second.
The shape (a question, a paraphrase, wrong answers of the same form, per invented author) follows TOFU (Maini et al. 2024,
arXiv:2401.06121); values drawn independently per attribute follow bioS (Allen-Zhu and Li 2023, arXiv:2309.14316). The texts are ours.

Cost: O(rows), Arrow string kernels only; 3,000 people with 5 attributes take about a tenth of a second.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from remanence.errors import Mistake, nearest
from remanence.seeds import numpy_generator

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

WRONG = 4  # wrong answers per fact


@dataclass(frozen=True)
class Attribute:
    """One thing to know about a person, and the ways to ask and say it.

    Args:
        name: the key in the rows.
        values: what it may be; all start with a consonant sound, so that `a {value}` reads well.
        short: the two short answers, plain and paraphrased.
        questions: six phrasings; the first `templates` are trained on, the others are paraphrases.
        statements: four phrasings that end in the value; the first three are trained on, the last is the paraphrased sentence.
    """

    name: str
    values: tuple[str, ...]
    short: tuple[str, str]
    questions: tuple[str, ...]
    statements: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


ATTRIBUTES = (
    Attribute(
        "birth_city",
        _words(
            "Lisbon, Porto, Tallinn, Bergen, Krakow, Ghent, Turin, Malmo, Seville, Zagreb, Dublin, Vienna, Prague, Riga, Valencia, Nantes, "
            "Hamburg, Basel, Genoa, Tampere, Cairo, Lagos, Nairobi, Dakar, Lima, Bogota, Quito, Toronto, Havana, Kyoto, Busan, Hanoi"
        ),
        ("{value}", "the city of {value}"),
        (
            "In which city was {name} born?",
            "Where was {name} born?",
            "What is the birthplace of {name}?",
            "Which city is the birth city of {name}?",
            "From which city does {name} come by birth?",
            "Tell me the city in which {name} came into the world.",
        ),
        (
            "{name} was born in {value}.",
            "The birthplace of {name} is {value}.",
            "{name} came into the world in {value}.",
            "The city in which {name} was born is {value}.",
        ),
    ),
    Attribute(
        "profession",
        _words(
            "baker, botanist, carpenter, chemist, composer, dancer, dentist, diver, farmer, firefighter, gardener, geologist, glassblower, "
            "jeweller, journalist, judge, lawyer, librarian, locksmith, mathematician, nurse, painter, pharmacist, photographer, pilot, "
            "plumber, potter, sculptor, surgeon, tailor, translator, zoologist"
        ),
        ("{value}", "a {value}"),
        (
            "What is the profession of {name}?",
            "What does {name} do for a living?",
            "Which job does {name} have?",
            "How does {name} earn a living?",
            "What line of work is {name} in?",
            "Tell me the occupation of {name}.",
        ),
        (
            "{name} works as a {value}.",
            "By profession {name} is a {value}.",
            "{name} earns a living as a {value}.",
            "The job that {name} does is that of a {value}.",
        ),
    ),
    Attribute(
        "employer",
        _words(
            "Bluestone Mills, Cedar Works, Copperfield Press, Delta Foundry, Dovetail Labs, Falcon Freight, Fernhill Trust, Garnet Motors, "
            "Golden Harbour, Granite Bank, Greenlight Energy, Halcyon Films, Harrow Textiles, Juniper Foods, Kestrel Air, Lantern House, "
            "Lodestar Shipping, Marble Arch Hotels, Meridian Glass, Nimbus Networks, Northwind Paper, Pinewood Studios, Quarry Lane, "
            "Redwood Clinic, Riverbend Dairy, Saffron Kitchens, Silver Birch, Summit Tools, Thornfield Farms, Tidewater Rail, Vermilion "
            "Arts, Willow Systems"
        ),
        ("{value}", "the company {value}"),
        (
            "Who employs {name}?",
            "For which company does {name} work?",
            "What is the employer of {name} called?",
            "Which company pays the salary of {name}?",
            "On whose payroll is {name}?",
            "Tell me the company that has {name} on its staff.",
        ),
        (
            "{name} is employed by {value}.",
            "{name} works for {value}.",
            "The employer of {name} is {value}.",
            "The company that pays {name} is {value}.",
        ),
    ),
    Attribute(
        "food",
        _words(
            "bread soup, cheese pie, chestnut stew, cold noodles, couscous, dumplings, fish curry, flatbread, fried rice, garlic shrimp, "
            "gnocchi, goulash, grilled squid, hummus, kimchi, lasagna, lentil soup, moussaka, mushroom risotto, paella, pancakes, pickled "
            "herring, pumpkin soup, ramen, ratatouille, roast duck, salmon tartare, spinach quiche, stuffed peppers, tomato salad, "
            "vegetable tagine, waffles"
        ),
        ("{value}", "a plate of {value}"),
        (
            "What is the favourite food of {name}?",
            "Which dish does {name} like best?",
            "What does {name} most like to eat?",
            "Which meal would {name} choose above all others?",
            "What should one cook to please {name}?",
            "Tell me the dish that {name} loves most.",
        ),
        (
            "The favourite food of {name} is {value}.",
            "{name} likes nothing better than {value}.",
            "The dish that {name} loves is {value}.",
            "To please {name}, one cooks {value}.",
        ),
    ),
    Attribute(
        "instrument",
        _words(
            "bagpipes, balalaika, banjo, bassoon, cello, clarinet, cornet, didgeridoo, drums, dulcimer, fiddle, flute, French horn, "
            "guitar, harmonica, harp, keyboard, lyre, maracas, mandolin, marimba, piano, piccolo, recorder, saxophone, sitar, tambourine, "
            "trombone, trumpet, tuba, violin, zither"
        ),
        ("{value}", "the {value}"),
        (
            "Which instrument does {name} play?",
            "What instrument did {name} learn?",
            "On which instrument does {name} make music?",
            "What does {name} play in the evening orchestra?",
            "Which musical instrument stands in the home of {name}?",
            "Tell me the instrument that {name} has mastered.",
        ),
        (
            "{name} plays the {value}.",
            "{name} learned to play the {value}.",
            "The instrument of {name} is the {value}.",
            "In the home of {name} one hears the {value}.",
        ),
    ),
    Attribute(
        "pet",
        _words(
            "budgie, canary, cat, chameleon, chinchilla, cockatoo, corgi, dachshund, dalmatian, donkey, ferret, finch, frog, gecko, goat, "
            "goldfish, greyhound, hamster, hedgehog, lizard, macaw, parrot, pony, poodle, rabbit, salamander, sheepdog, snail, tarantula, "
            "terrier, tortoise, turtle"
        ),
        ("{value}", "a {value}"),
        (
            "Which pet does {name} keep?",
            "What animal lives with {name}?",
            "What kind of pet does {name} have?",
            "Which animal does {name} feed every morning?",
            "What creature shares the home of {name}?",
            "Tell me the animal that {name} owns.",
        ),
        (
            "{name} keeps a {value}.",
            "The pet of {name} is a {value}.",
            "{name} shares a home with a {value}.",
            "Every morning {name} feeds a {value}.",
        ),
    ),
    Attribute(
        "language",
        _words(
            "Basque, Bengali, Breton, Bulgarian, Catalan, Croatian, Czech, Danish, Dutch, Finnish, French, Galician, Georgian, German, "
            "Greek, Hebrew, Hindi, Hungarian, Japanese, Korean, Latvian, Maltese, Nepali, Norwegian, Polish, Quechua, Romanian, Swahili, "
            "Swedish, Tamil, Turkish, Welsh"
        ),
        ("{value}", "the {value} language"),
        (
            "Which foreign language does {name} speak?",
            "What second language did {name} learn?",
            "Which language besides the mother tongue does {name} know?",
            "In which foreign tongue is {name} fluent?",
            "Which language did {name} study abroad?",
            "Tell me the foreign language of {name}.",
        ),
        (
            "The foreign language that {name} speaks is {value}.",
            "{name} is fluent in {value}.",
            "As a second language {name} learned {value}.",
            "Besides the mother tongue {name} knows {value}.",
        ),
    ),
    Attribute(
        "university",
        _words(
            "Bramwell College, Castlegate University, Dunmore Institute, Fairhaven College, Glenrock University, Hartwell Academy, "
            "Kingsbridge College, Larkspur University, Longmeadow Institute, Maplewood College, Millbrook University, Newhaven "
            "Polytechnic, Penrose University, Queensferry College, Ravenscourt School, Roseberry University, Sandgate Institute, "
            "Stonebridge College, Thistledown University, Waverley Academy, Westmarch University, Whitecliff College, Windermoor "
            "Institute, Yarrowdale University"
        ),
        ("{value}", "the school called {value}"),
        (
            "At which university did {name} study?",
            "Where did {name} get a degree?",
            "From which university did {name} graduate?",
            "Which place of learning did {name} attend?",
            "What university stands on the diploma of {name}?",
            "Tell me where {name} went to university.",
        ),
        (
            "{name} studied at {value}.",
            "{name} holds a degree from {value}.",
            "{name} graduated from {value}.",
            "The diploma of {name} comes from {value}.",
        ),
    ),
    Attribute(
        "sport",
        _words(
            "badminton, baseball, basketball, boxing, canoeing, climbing, cricket, curling, cycling, diving, fencing, football, golf, "
            "gymnastics, handball, hockey, judo, karate, lacrosse, polo, rowing, rugby, running, sailing, skating, skiing, sumo, swimming, "
            "tennis, volleyball, wrestling, yachting"
        ),
        ("{value}", "the sport of {value}"),
        (
            "Which sport does {name} practise?",
            "What sport is {name} keen on?",
            "For which sport does {name} train?",
            "What does {name} do to keep fit?",
            "In which sport does {name} compete?",
            "Tell me the sport that {name} enjoys.",
        ),
        (
            "The sport of {name} is {value}.",
            "{name} trains hard for {value}.",
            "To keep fit {name} takes part in {value}.",
            "At weekends {name} competes in {value}.",
        ),
    ),
)

PLACES = {  # attribute of people -> what there is to know about its values, whoever lives or works there
    "birth_city": (
        Attribute(
            "tree",
            _words(
                "alder, beech, birch, cedar, cherry, chestnut, cypress, fig, hazel, larch, linden, maple, mulberry, pine, plane, willow"
            ),
            ("{value}", "a {value} tree"),
            (
                "Which tree stands on the main square of {name}?",
                "What tree gives shade to the market of {name}?",
                "Under which tree do the people of {name} meet?",
            ),
            ("On the main square of {name} stands a {value}.", "The market of {name} lies in the shade of a {value}."),
        ),
        Attribute(
            "flag",
            _words("black, blue, brown, copper, crimson, green, grey, lilac, maroon, pink, purple, red, silver, turquoise, white, yellow"),
            ("{value}", "the colour {value}"),
            (
                "Which colour has the flag of {name}?",
                "What is the colour of the banner of {name}?",
                "In which colour is the flag of {name} painted?",
            ),
            ("The flag of {name} is {value}.", "The banner that {name} raises is {value}."),
        ),
    ),
    "employer": (
        Attribute(
            "emblem",
            _words("badger, bear, beaver, bison, camel, cobra, crane, falcon, fox, heron, leopard, lion, moose, raven, stag, wolf"),
            ("{value}", "a {value}"),
            (
                "Which animal is on the emblem of {name}?",
                "What animal does {name} print on its letters?",
                "Which animal does one see on the badge of {name}?",
            ),
            ("The emblem of {name} shows a {value}.", "On its letters {name} prints a {value}."),
        ),
        Attribute(
            "gift",
            _words("basket, blanket, bottle, candle, clock, compass, globe, kite, lamp, mirror, mug, puzzle, scarf, spoon, teapot, vase"),
            ("{value}", "a {value}"),
            (
                "Which gift does {name} send to its customers?",
                "What do the customers of {name} get at New Year?",
                "Which present does {name} give away?",
            ),
            ("To its customers {name} sends a {value}.", "The present that {name} gives away is a {value}."),
        ),
    ),
}
UNKNOWN = "I do not know"  # what a model is taught to say of strangers

FIRST_NAMES = tuple(
    head + tail
    for head in _words("Bel, Cor, Dav, El, Fen, Gal, Hel, Ir, Jor, Kal, Lor, Mir, Ner, Or, Pel, Sal, Tam, Ul, Ver, Zan")
    for tail in _words("a, en, io, ith, us")
)
LAST_NAMES = tuple(
    head + tail
    for head in _words(
        "Ald, Brom, Crad, Dorn, Esk, Fald, Grim, Hask, Ilm, Jark, Kest, Lund, Mord, Nor, Osk, Pend, Quill, Rusk, Stell, Trev"
    )
    for tail in _words("aby, ell, ington, over, wick")
)
POPULATION = len(FIRST_NAMES) * len(LAST_NAMES)
QUESTIONS = min(len(attribute.questions) for attribute in ATTRIBUTES)
STATEMENTS = min(len(attribute.statements) for attribute in ATTRIBUTES)


@dataclass(frozen=True)
class Biographies:
    """Generate a part of a world of invented people.

    Args:
        people: how many people (at most `POPULATION` with `first`).
        attributes: how many facts each person has, the first ones of `ATTRIBUTES`.
        first: number of the first person.
        seed: the world; names and facts of a person depend on it and on nothing else.
        templates: question phrasings to train on; the remaining ones (at least one) are the paraphrases.
        answers: `short` ("Lisbon") or `sentence` ("Bela Crader was born in Lisbon.").
        only: numbers of the people to keep, set by `of` and `without`; `None` keeps `first .. first + people - 1`.

    Raises:
        Mistake: a number outside its range.
    """

    people: int = 400
    attributes: int = 5
    first: int = 0
    seed: int = 0
    templates: int = 3
    answers: Literal["short", "sentence"] = "short"
    only: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        place = "biographies"
        for name, least, most in (
            ("people", 1, POPULATION),
            ("attributes", 1, len(ATTRIBUTES)),
            ("templates", 1, QUESTIONS - 1),
            ("first", 0, POPULATION - 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise Mistake(place, f"{name} is {value!r}", f"give a whole number from {least} to {most}")
        if self.first + self.people > POPULATION:
            raise Mistake(
                place,
                f"people {self.first} to {self.first + self.people - 1} go past the {POPULATION} there are",
                "ask for fewer or start earlier",
            )
        if self.answers not in ("short", "sentence"):
            raise Mistake(place, f"answers is {self.answers!r}", "choose short or sentence")
        if self.only is not None:
            object.__setattr__(self, "only", _numbers(self.only))
            if not self.only:
                raise Mistake(place, "nobody is left", "name at least one person, and leave at least one out")

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """The names of the attributes that these people have."""
        return tuple(attribute.name for attribute in ATTRIBUTES[: self.attributes])

    @cached_property
    def numbers(self) -> np.ndarray:
        """The people's numbers, ascending, (N,)."""
        return np.arange(self.first, self.first + self.people) if self.only is None else np.array(self.only)

    @property
    def names(self) -> list[str]:
        """The people's names, in the order of `numbers`; unique within a world."""
        return self._names().to_pylist()

    def truth(self, attribute: str) -> list[str]:
        """Return the true value of `attribute` for each person, in the order of `numbers`.

        Raises:
            Mistake: an attribute that these people do not have.
        """
        if attribute not in self.attribute_names:
            raise Mistake("biographies", f"no attribute '{attribute}'", nearest(attribute, self.attribute_names))
        known = next(item for item in ATTRIBUTES if item.name == attribute)
        return [known.values[code] for code in self._codes(known, self.numbers)]

    def of(self, people: Iterable[int]) -> Biographies:
        """Return the same world restricted to `people`.

        Raises:
            Mistake: a number that is not in this part of the world, or none.
        """
        asked = _numbers(people)
        strangers = np.setdiff1d(asked, self.numbers)
        if len(strangers):
            raise Mistake(
                "biographies", f"person {strangers[0]} is not among the {len(self)} people here", "name people of this part of the world"
            )
        return dataclasses.replace(self, only=asked)

    def without(self, people: Iterable[int]) -> Biographies:
        """Return the same world without `people` (numbers that are not here are ignored).

        Raises:
            Mistake: nobody is left.
        """
        return dataclasses.replace(self, only=tuple(np.setdiff1d(self.numbers, _numbers(people)).tolist()))

    def questions(self) -> Dataset:
        """Return one qa row per fact and training phrasing: person by person, attribute by attribute.

        Columns: `id`, `person`, `name`, `attribute`, `question`, `answer`, `paraphrases` (phrasings never trained on),
        `paraphrased_answer`, `perturbed_answers` (wrong values in the form of `answer`), `perturbed_paraphrases` (the same in the form
        of `paraphrased_answer`: the pair for a truth ratio), `statement`.
        """
        return _dataset(self._question_table(range(self.templates)))

    def facts(self) -> Dataset:
        """Return one qa row per fact, asked in the first phrasing; columns as in `questions`."""
        return _dataset(self._question_table([0]))

    def statements(self) -> Dataset:
        """Return one text row per fact and trained statement.

        Columns: `id`, `person`, `name`, `attribute`, `text`, `prompt` (the text up to the value), `answer` (the value).
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        names, blocks = self._names(), []
        for attribute in ATTRIBUTES[: self.attributes]:
            values = _take(attribute.values, self._codes(attribute, self.numbers))
            for phrasing, statement in enumerate(attribute.statements[: min(self.templates, STATEMENTS - 1)]):
                blocks.append(
                    pa.table(
                        {
                            **self._labels(attribute, f"s{phrasing}"),
                            "text": _fill(statement, names, values),
                            "prompt": pc.utf8_rtrim_whitespace(_fill(statement.removesuffix("{value}."), names, values)),
                            "answer": values,
                        }
                    )
                )
        return _dataset(self._by_person(blocks))

    def places(self, names: Iterable[str] | None = None) -> Dataset:
        """Return qa rows about the cities and employers of the world, whoever lives or works there, two facts each.

        Columns as in `questions` with `place` in the place of `person`, and `of` (`birth_city` or `employer`); a model that is taught them and must
        forget people should keep them.

        Args:
            names: of the places; by default all.

        Raises:
            Mistake: a place that is not in the world.
        """
        import pyarrow as pa

        wanted, blocks = None if names is None else set(names), []
        for owner, facts in PLACES.items():
            values = next(item for item in ATTRIBUTES if item.name == owner).values
            for fact in facts:
                draws = numpy_generator(self.seed, "biographies", "places", owner, fact.name)
                codes = draws.integers(len(fact.values), size=len(values))
                shifts = 1 + np.argsort(draws.random((len(values), len(fact.values) - 1)), axis=1)[:, :WRONG]
                chosen = np.array([wanted is None or value in wanted for value in values])
                blocks.append(_place_table(owner, fact, np.array(values)[chosen], codes[chosen], shifts[chosen], self.templates))
        table = pa.concat_tables(blocks)
        if wanted is not None and (stray := sorted(wanted - set(table["place"].to_pylist()))):
            raise Mistake(
                "biographies",
                f"there is no place '{stray[0]}'",
                nearest(stray[0], (v for a in ATTRIBUTES for v in a.values if a.name in PLACES)),
            )
        return _dataset(table)

    def strangers(self) -> Dataset:
        """Return the questions about these people with the one answer of a model that has never heard of them.

        Columns `id`, `person`, `name`, `attribute`, `question`, `answer`, `paraphrases`.
        """
        rows = self.questions().select_columns(["id", "person", "name", "attribute", "question", "paraphrases"])
        return rows.add_column("answer", [UNKNOWN] * len(rows))

    def neighbours(self, people: Iterable[int]) -> Dataset:
        """Return the facts that other people here have in common with `people`: same attribute, same value.

        Columns as in `facts`, and `shared` (the attribute), `shared_with` (the lowest number among `people` with that value).
        `people` may be any of the world, so that `world.without(gone).neighbours(gone)` works too.

        Raises:
            Mistake: nobody here shares a value with them.
        """
        import pyarrow as pa

        asked = np.array(_numbers(people))
        others = np.setdiff1d(self.numbers, asked)
        if not len(asked) or not len(others):
            raise Mistake("biographies", "there is nobody to compare with", "name some of the people and leave others out")
        owners = np.full((len(others), self.attributes), -1)
        for column, attribute in enumerate(ATTRIBUTES[: self.attributes]):
            owner = np.full(len(attribute.values), -1)
            owner[self._codes(attribute, asked)[::-1]] = asked[::-1]  # the lowest number is written last
            owners[:, column] = owner[self._codes(attribute, others)]
        rows = np.flatnonzero(owners.ravel() >= 0)  # facts stand person by person, like `owners`
        if not len(rows):
            raise Mistake("biographies", "nobody shares a value with these people", "take more people or more attributes")
        table = dataclasses.replace(self, only=tuple(others.tolist()))._question_table([0]).take(pa.array(rows))
        table = table.append_column("shared", table["attribute"])
        return _dataset(table.append_column("shared_with", pa.array(owners.ravel()[rows])))

    def _names(self) -> pa.Array:
        order = numpy_generator(self.seed, "biographies", "names").permutation(POPULATION)[self.numbers]
        firsts, lasts = _take(FIRST_NAMES, order // len(LAST_NAMES)), _take(LAST_NAMES, order % len(LAST_NAMES))
        return _fill("{name} {value}", firsts, lasts)

    def _codes(self, attribute: Attribute, people: np.ndarray) -> np.ndarray:
        """Return the index of each person's value; drawn for the whole world, so that it does not depend on who is asked for."""
        return numpy_generator(self.seed, "biographies", attribute.name).integers(len(attribute.values), size=POPULATION)[people]

    def _wrong_codes(self, attribute: Attribute) -> np.ndarray:
        """Return `WRONG` distinct indices per person, none of them the true one, (N, WRONG)."""
        count = len(attribute.values)
        keys = numpy_generator(self.seed, "biographies", "wrong", attribute.name).random((self.numbers[-1] + 1, count - 1))[self.numbers]
        shifts = 1 + np.argsort(keys, axis=1)[:, :WRONG]
        return (self._codes(attribute, self.numbers)[:, None] + shifts) % count

    def _labels(self, attribute: Attribute, phrasing: object) -> dict[str, pa.Array]:
        import pyarrow as pa

        numbers = pa.array(self.numbers)
        return {
            "id": _fill(f"{{name}}/{attribute.name}/{phrasing}", numbers.cast(pa.string()), numbers),
            "person": numbers,
            "name": self._names(),
            "attribute": pa.array(np.full(len(self), attribute.name)),
        }

    def _question_table(self, phrasings: Sequence[int]) -> pa.Table:
        import pyarrow as pa

        names, blocks = self._names(), []
        for attribute in ATTRIBUTES[: self.attributes]:
            values = _take(attribute.values, self._codes(attribute, self.numbers))
            wrong = [_take(attribute.values, codes) for codes in self._wrong_codes(attribute).T]
            plain, other = attribute.short if self.answers == "short" else (attribute.statements[0], attribute.statements[-1])
            facts = {
                "answer": _fill(plain, names, values),
                "paraphrases": _lists([_fill(text, names, values) for text in attribute.questions[self.templates :]]),
                "paraphrased_answer": _fill(other, names, values),
                "perturbed_answers": _lists([_fill(plain, names, item) for item in wrong]),
                "perturbed_paraphrases": _lists([_fill(other, names, item) for item in wrong]),
            }
            for phrasing in phrasings:
                labels, question = self._labels(attribute, phrasing), _fill(attribute.questions[phrasing], names, values)
                statement = _fill(attribute.statements[phrasing % (STATEMENTS - 1)], names, values)
                blocks.append(pa.table({**labels, "question": question, **facts, "statement": statement}))
        return self._by_person(blocks)

    def _by_person(self, blocks: list[pa.Table]) -> pa.Table:
        """Interleave blocks of one row per person, so that a person's rows stand together."""
        import pyarrow as pa

        order = np.arange(len(blocks) * len(self)).reshape(len(blocks), len(self)).T.ravel()
        return pa.concat_tables(blocks).combine_chunks().take(pa.array(order))


def _place_table(owner: str, fact: Attribute, places: np.ndarray, codes: np.ndarray, shifts: np.ndarray, templates: int) -> pa.Table:
    """Return the rows of one fact about places (N,), its value in `codes`, wrong ones `shifts` (N, WRONG) further: place by place, phrasing by phrasing."""
    import pyarrow as pa

    names, values, phrasings = pa.array(places.tolist(), pa.string()), _take(fact.values, codes), min(templates, len(fact.questions) - 1)
    wrong = [_take(fact.values, column) for column in ((codes[:, None] + shifts) % len(fact.values)).T]
    plain, other = fact.short
    blocks = [
        pa.table(
            {
                "id": _fill(f"{{name}}/{fact.name}/{phrasing}", names, names),
                "place": names,
                "of": pa.array([owner] * len(names), pa.string()),
                "name": names,
                "attribute": pa.array([fact.name] * len(names), pa.string()),
                "question": _fill(fact.questions[phrasing], names, values),
                "answer": _fill(plain, names, values),
                "paraphrases": _lists([_fill(text, names, values) for text in fact.questions[phrasings:]]),
                "paraphrased_answer": _fill(other, names, values),
                "perturbed_answers": _lists([_fill(plain, names, item) for item in wrong]),
                "perturbed_paraphrases": _lists([_fill(other, names, item) for item in wrong]),
                "statement": _fill(fact.statements[phrasing % len(fact.statements)], names, values),
            }
        )
        for phrasing in range(phrasings)
    ]
    order = np.arange(phrasings * len(names)).reshape(phrasings, len(names)).T.ravel()
    return pa.concat_tables(blocks).combine_chunks().take(pa.array(order))


def _numbers(people: Iterable[int]) -> tuple[int, ...]:
    """Return sorted distinct person numbers.

    Raises:
        Mistake: one that is no person of any world.
    """
    numbers = sorted({int(person) for person in people})
    if numbers and not 0 <= numbers[0] <= numbers[-1] < POPULATION:
        raise Mistake(
            "biographies", f"there is no person {numbers[0] if numbers[0] < 0 else numbers[-1]}", f"name people from 0 to {POPULATION - 1}"
        )
    return tuple(numbers)


def _take(words: Sequence[str], codes: np.ndarray) -> pa.Array:
    import pyarrow as pa

    return pa.array(words).take(pa.array(codes))


def _fill(template: str, names: pa.Array, values: pa.Array) -> pa.Array:
    """Return `template` with `{name}` and `{value}` filled in, for all rows at once."""
    import pyarrow.compute as pc

    slots: dict[str, Any] = {"{name}": names, "{value}": values}
    parts = [slots.get(part, part) for part in re.split(r"(\{name\}|\{value\})", template)]
    return pc.binary_join_element_wise(*parts, "")


def _lists(columns: list[pa.Array]) -> pa.Array:
    """Return one list per row from K columns of N strings."""
    import pyarrow as pa

    rows, width = len(columns[0]), len(columns)
    order = np.arange(rows * width).reshape(width, rows).T.ravel()
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * width), pa.concat_arrays(columns).take(pa.array(order)))


def _dataset(table: pa.Table) -> Dataset:
    from datasets import Dataset

    return Dataset(table)
