"""Items from templates and from any language model, and the three rules that they are held to."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from remanence.data import convomem_words as words
from remanence.data.convomem import CATEGORIES, NO_INFORMATION, Conversation, EvidenceItem, Utterance
from remanence.data.convomem_check import Leaks, check_item
from remanence.data.convomem_generate import RULES, Verifier, answerer, generate
from remanence.data.convomem_models import Reply
from remanence.data.convomem_solver import UNKNOWN, read, right, solve
from remanence.data.convomem_templates import template_fillers, template_items
from remanence.errors import Mistake


def item(k: int, category: str = "user_facts") -> EvidenceItem:
    evidence = tuple(Utterance("User", f"fact {n}") for n in range(k))
    talks = tuple(Conversation((one,), f"c{n}") for n, one in enumerate(evidence))
    return EvidenceItem("Q?", NO_INFORMATION if category == "abstention" else "gold", evidence, talks, category, "p", None, "i")


def scripted(knows: Callable[[list[str]], bool]) -> tuple[list[list[str]], Callable]:
    """Return what an answerer was shown, and the answerer: right where `knows` says so of the facts in front of it."""
    shown: list[list[str]] = []

    def answer(question: str, messages) -> str:
        shown.append([one.text for one in messages])
        return "gold" if knows(shown[-1]) else "no idea"

    return shown, answer


def verifier(*answerers: Callable) -> Verifier:
    return Verifier(answerers, lambda item, reply: reply == "gold")


def test_with_evidence_each_model_must_be_right_twice_in_a_row() -> None:
    shown, sure = scripted(lambda facts: bool(facts))
    assert verifier(sure, sure).check(item(1)) is None
    assert shown[:4] == [["fact 0"]] * 4
    replies = iter([True, False])
    _, shaky = scripted(lambda facts: bool(facts) and next(replies))
    assert verifier(sure, shaky).check(item(1)) == RULES[0]


def test_without_evidence_every_model_must_fail() -> None:
    _, honest = scripted(lambda facts: bool(facts))
    _, guesses = scripted(lambda facts: True)
    assert verifier(honest, guesses).check(item(1)) == RULES[1]


def test_without_any_one_of_several_messages_every_model_must_fail() -> None:
    shown, needs_all = scripted(lambda facts: len(facts) == 3)
    assert verifier(needs_all).check(item(3)) is None
    assert shown[-3:] == [["fact 1", "fact 2"], ["fact 0", "fact 2"], ["fact 0", "fact 1"]]
    _, needs_two = scripted(lambda facts: len(facts) >= 2)
    assert verifier(needs_two).check(item(3)) == RULES[2]


def test_for_changing_facts_only_the_last_message_is_taken_away() -> None:
    shown, last = scripted(lambda facts: "fact 2" in facts)
    assert verifier(last).check(item(3, "changing_facts")) is None
    assert shown[-1] == ["fact 0", "fact 1"]
    _, first = scripted(lambda facts: "fact 0" in facts)
    assert verifier(first).check(item(3, "changing_facts")) == RULES[2]


def test_abstention_is_held_to_the_first_rule_alone() -> None:
    shown, always = scripted(lambda facts: True)
    assert verifier(always).check(item(2, "abstention")) is None
    assert len(shown) == 2


def test_a_judge_without_a_verdict_lets_nothing_pass() -> None:
    _, sure = scripted(lambda facts: bool(facts))
    assert Verifier([sure], lambda item, reply: None).check(item(1)) == RULES[0]


def test_any_model_can_verify() -> None:
    prompts: list[str] = []

    def model(prompt: str) -> Reply:
        prompts.append(prompt)
        return Reply("gold" if "fact 0" in prompt else "I do not know")

    assert verifier(answerer(model)).check(item(1)) is None
    assert "User: fact 0" in prompts[0]
    assert "(nothing)" in prompts[-1]


ITEMS = template_items(each=2, persons=6, seed=3)
FILLERS = template_fillers(persons=6, each=20, seed=3)


def test_templates_give_every_category_and_k_and_keep_all_three_rules() -> None:
    cells = {(one.category, one.k) for one in ITEMS}
    assert cells == {(category, k) for category in CATEGORIES for k in range(1, 7)} - {("changing_facts", 1)}
    solver = Verifier([lambda question, said: solve(question, said).reply], lambda item, reply: right(item.category, item.answer, reply))
    for one in ITEMS:
        assert solver.check(one) is None, one.id
        assert check_item(one) == [], one.id
        assert all(len(talk.messages) == 12 for talk in one.conversations)
    assert {message.speaker for one in ITEMS if one.category == "assistant_facts" for message in one.evidence} == {"Assistant"}


def test_a_persons_fillers_neither_answer_nor_change_a_question() -> None:
    for one in ITEMS:
        others = [message for talk in FILLERS if talk.person == one.person for message in talk.messages]
        inside = [message for talk in one.conversations for message in talk.messages]
        alone = solve(one.question, others).reply
        assert alone == UNKNOWN, one.id
        assert right(one.category, one.answer, solve(one.question, others + inside).reply), one.id
        assert right(one.category, one.answer, solve(one.question, inside + others).reply), one.id
        Leaks([one]).refuse([talk for talk in FILLERS if talk.person == one.person])


def test_templates_are_the_same_for_a_seed_and_others_for_another() -> None:
    assert template_items(("preferences",), (2,), each=2, seed=3) == template_items(("preferences",), (2,), each=2, seed=3)
    assert template_fillers(persons=1, each=2, seed=3) != template_fillers(persons=1, each=2, seed=4)


def test_the_solver_reads_every_sentence_of_the_templates_and_no_small_talk() -> None:
    assert all(read(text) is None for text in (*words.CHAT_USER, *words.CHAT_ASSISTANT, "Hugo", "", "The sky is blue."))
    for subject in ("our book club", "the evenings when the people next door read together"):
        for slot, (values, texts) in words.SLOTS.items():
            for text in texts:
                found = read(text.format(s=subject, v=values[0]))
                assert found is not None
                assert (found.kind, found.slot, found.value) == ("fact", slot, values[0])
        for kind, texts in (("said", words.SAID), ("change", words.CHANGED)):
            for text in texts:
                found = read(text.format(s=subject, slot="gift", v="a silver whistle"))
                assert found is not None
                assert (found.kind, found.slot, found.value) == (kind, "gift", "a silver whistle")


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: template_items(("facts",)), "no category 'facts'"),
        (lambda: template_items(ks=(7,)), "1 to 6"),
        (lambda: template_items(each=0), "too few"),
        (lambda: template_items(("user_facts",), (1,), each=61, persons=1), "no subject left"),
        (lambda: generate(("facts",), (1,), 1, lambda prompt: Reply(""), verifier()), "no category"),
        (lambda: generate(("user_facts",), (), 1, lambda prompt: Reply(""), verifier()), "at least one"),
        (lambda: generate(("user_facts",), (1,), 1, lambda prompt: Reply("no list"), verifier(), tries=3), "in 3 tries"),
    ],
)
def test_what_cannot_be_generated_is_one_sentence(call: Callable[[], object], word: str) -> None:
    with pytest.raises(Mistake, match=word):
        call()


class Writer:
    """A scripted language model: it fails in every way once before it writes what was asked for."""

    def __init__(self) -> None:
        self.cores, self.talks = 0, 0

    def __call__(self, prompt: str) -> Reply:
        return Reply(self.write(prompt))

    def write(self, prompt: str) -> str:
        if prompt.startswith("Invent"):
            return 'Here you are:\n```json\n["a nurse in Porto", "a pilot"]\n```'
        if "situations in which" in prompt:
            return json.dumps([f"situation {n}" for n in range(50)])
        if "Write a test" in prompt:
            self.cores += 1
            if self.cores == 1:
                return "I would rather not."
            number = self.cores if self.cores != 2 else 99  # the second does not keep the rules
            said = [
                {"speaker": "User", "text": f"Secret {number} of mine, part {n}, told at some length to be found again."} for n in range(2)
            ]
            return json.dumps({"question": f"What is secret {number}?", "answer": "gold", "message_evidences": said})
        self.talks += 1
        evidence = prompt.partition("word for word, of User: ")[2].partition("\n")[0]
        if self.talks == 1:
            return "[]"
        rows = [{"speaker": ("User", "Assistant")[n % 2], "text": f"small talk {self.talks} {n}"} for n in range(10)]
        if self.talks == 2:
            rows[0]["speaker"] = "Narrator"
        elif evidence and self.talks != 3:  # the third forgets the evidence
            rows[4]["text"] = f"{evidence} Just so you know."
        return json.dumps({"messages": rows})


def test_a_language_model_writes_items_in_six_stages_and_what_fails_is_written_again() -> None:
    def knows(question: str, messages) -> str:
        return "gold" if len(messages) == 2 and "Secret 99" not in messages[0].text else "no idea"

    writer = Writer()
    made = generate(("user_facts",), (2,), 2, writer, verifier(knows), each=2, fillers=3, messages=10)
    assert len(made.items) == 4
    assert len(made.fillers) == 6
    for one in made.items:
        assert check_item(one) == []
        assert one.k == 2
        assert one.person in ("person0", "person1")
    assert {one.person for one in made.fillers} == {"person0", "person1"}
    assert made.failures["core is not in the form asked for"] == 1
    assert made.failures[RULES[0]] == 1
    assert made.failures["conversation has other speakers or another length"] == 2
    assert made.failures["not found"] == 1


def test_what_never_passes_is_left_out_and_counted() -> None:
    made = generate(("user_facts",), (2,), ["a nurse"], Writer(), verifier(lambda question, messages: "no idea"), messages=10, tries=4)
    assert made.items == []
    assert made.failures[RULES[0]] == 3
