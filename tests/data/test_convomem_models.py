"""Models as the benchmark asks them: tokens, prices, times, and a Hugging Face model."""

from __future__ import annotations

from pathlib import Path

import pytest

from remanence.data.convomem_models import Priced, Reply, count_words, hf_model
from remanence.errors import Mistake


def test_a_plain_callable_is_counted_by_words_and_priced_per_million() -> None:
    found = Priced(lambda prompt: "It is Riga.", "m", price_in=2.0, price_out=10.0)("Where do I live?")
    assert (found.input_tokens, found.output_tokens) == (5, 4)
    assert found.cost == pytest.approx((5 * 2 + 4 * 10) / 1e6)
    assert found.seconds >= 0


def test_an_endpoints_own_token_counts_are_taken() -> None:
    found = Priced(lambda prompt: Reply("x", 1000, 7, 2000), "m", price_in=1.0)("a")
    assert (found.input_tokens, found.output_tokens, found.cached_tokens) == (1000, 7, 1000)


def test_a_declared_time_replaces_the_clock() -> None:
    assert Priced(lambda prompt: "x", "m", seconds=lambda tokens, written: 2.0 * tokens + written)("a b").seconds == 5.0


def test_words_and_marks_are_counted() -> None:
    assert count_words("Don't, please!") == 6
    assert count_words("") == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama with a word tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {
        word: number for number, word in enumerate(["<unk>", "<eos>", "user", "assistant", "what", "is", "it", "red", "blue", "?"])
    }
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=10, max_position_embeddings=16, **shape))
    path = tmp_path_factory.mktemp("model")
    fast.save_pretrained(path)
    model.save_pretrained(path)
    return path


def test_a_hugging_face_model_answers_greedily_through_its_chat_template(folder: Path) -> None:
    ask = hf_model(str(folder), new_tokens=4, device="cpu")
    found = ask("what is it ?")
    assert found.input_tokens == 6  # user ... assistant
    assert 1 <= found.output_tokens <= 4
    assert found == ask("what is it ?")


def test_a_prompt_longer_than_the_model_reads_is_refused_not_cut(folder: Path) -> None:
    with pytest.raises(Mistake, match="the model reads 16"):
        hf_model(str(folder), new_tokens=4, device="cpu")("red " * 20)
    with pytest.raises(Mistake, match="no causal language model"):
        hf_model(str(folder / "nowhere"))
