"""Summarisers: never longer than asked for, nothing invented by the extractive one, models and endpoints by name."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import Mistake
from remanence.recall.gist import Compact
from remanence.recall.summarizers import Endpoint, Extractive, load_summarizer
from remanence.recall.tokenizers import load_tokenizer

PLAIN = load_tokenizer("plain")


@settings(max_examples=100, deadline=None)
@given(earlier=st.text(max_size=300), new=st.text(max_size=600), tokens=st.integers(1, 80))
def test_the_gist_never_has_more_tokens_than_asked_for_and_is_one_line(earlier, new, tokens):
    told = Compact(Extractive(PLAIN), PLAIN, tokens).shorten(earlier, new)
    assert PLAIN.count(told) <= tokens
    assert "\n" not in told


def test_extractive_keeps_facts_and_lets_chit_chat_go():
    text = "Well, how are you all today? I think it is so. Ana Moreira moved to Lisbon in 2019. Yes, that is how it goes with these things."
    assert Extractive(PLAIN)("", text, 12) == "Ana Moreira moved to Lisbon in 2019."


def test_extractive_invents_nothing_and_keeps_the_order():
    earlier, new = "Ana lives in Lisbon. Bo plays the cello.", "Chris met Dora in Vienna on 3 May. Eva has 2 dogs!"
    told = Extractive(PLAIN)(earlier, new, 40)
    assert re.split(r"(?<=[.!])\s", told) == [
        "Ana lives in Lisbon.",
        "Bo plays the cello.",
        "Chris met Dora in Vienna on 3 May.",
        "Eva has 2 dogs!",
    ]


def test_extractive_says_a_repeated_sentence_once():
    assert Extractive(PLAIN)("Ana lives in Lisbon.", "Ana lives in Lisbon.", 40) == "Ana lives in Lisbon."


def test_a_sentence_that_is_too_long_is_cut():
    told = Extractive(PLAIN)("", "Lisbon " * 200, 10)
    assert told.split() == ["Lisbon"] * 10


def test_weights_of_the_users_take_the_place_of_the_plain_ones():
    summariser = Extractive(PLAIN, lambda word: {"apple": 9.0}.get(word, 0.0))
    assert summariser("", "Ana moved to Lisbon in 2019. One apple fell.", 6) == "One apple fell."


def test_an_endpoint_is_asked_with_what_was_and_what_is_new():
    asked = {}

    class Client:
        def complete(self, messages, **options):
            asked.update(options, content=messages[0]["content"])
            return "Ana lives in Porto."

    assert (
        Endpoint("openai:m@http://localhost/v1", "m", Client())("Ana lives in Lisbon.", "Ana moved to Porto.", 60) == "Ana lives in Porto."
    )
    assert asked["model"] == "m"
    assert "Ana lives in Lisbon." in asked["content"]
    assert "Ana moved to Porto." in asked["content"]


@pytest.mark.parametrize("kind", ["causal", "sequence"])
def test_a_model_of_transformers_shortens(tmp_path, kind):
    """Tiny, untrained: what it says is nothing, but it is asked, answers, and is cut."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
    model = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    ).save_pretrained(tmp_path)
    if kind == "causal":
        config = LlamaConfig(
            vocab_size=63, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path)
    else:
        config = T5Config(vocab_size=63, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0, pad_token_id=0)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    summariser = load_summarizer(str(tmp_path), PLAIN)
    assert summariser.window <= 2048
    told = Compact(summariser, PLAIN, 12).shorten("w1 w2 w3", "w4 " * 500)
    assert PLAIN.count(told) <= 12
    assert Compact(summariser, PLAIN, 12).shorten("w1 w2 w3", "w4 " * 500) == told


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(Mistake, match="summarizer"):
        load_summarizer(str(tmp_path), PLAIN)
    with pytest.raises(Mistake, match="openai"):
        load_summarizer("openai:nothing", PLAIN)
