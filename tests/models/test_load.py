import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from remanence.errors import Mistake
from remanence.models.adapters import add_lora, merge_lora, without_adapter
from remanence.models.forward import logits_of
from remanence.models.load import load_model, load_weights, parameter_count, save_model, weights_hash
from remanence.models.roles import weights_by_role
from toy import FAMILIES, toy_batch, toy_classifier, toy_config, toy_lm, toy_tokenizer


@pytest.fixture
def saved(tmp_path):
    """A saved Llama that a test may spoil."""
    save_model(toy_lm("llama"), toy_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def disturbed(model, spread=0.1):
    """Move every weight, as training does."""
    fill = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=fill), alpha=spread)
    return model


# ---- saved and loaded again, bit for bit ----


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in FAMILIES]
    + [(family, dtype) for family in ("llama", "gpt2", "gemma2") for dtype in (torch.bfloat16, torch.float64)],
)
def test_language_models_come_back_bit_identical(family, dtype, tmp_path):
    model = disturbed(toy_lm(family, dtype=dtype))
    save_model(model, toy_tokenizer(), tmp_path / "m", {"life": 3})
    random = torch.get_rng_state()
    loaded = load_model(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), random)
    assert weights_hash(loaded.model) == weights_hash(model)
    assert torch.equal(logits_of(loaded.model, toy_batch()), logits_of(model, toy_batch()))
    assert loaded.processor("abc").input_ids == toy_tokenizer()("abc").input_ids
    assert loaded.notes == ()
    assert loaded.spec == str(tmp_path / "m")
    assert not loaded.model.training
    assert json.loads((tmp_path / "m" / "remanence.json").read_text())["life"] == 3


def test_loaded_weights_lie_in_aligned_memory(saved):
    # askew double weights, as a mapped file gives them, move a logit by a last bit now and then
    assert all(weight.data_ptr() % 64 == 0 for weight in load_model(saved).model.parameters())


def test_the_auto_classes_of_transformers_read_what_was_saved(saved):
    assert weights_hash(AutoModelForCausalLM.from_pretrained(saved)) == weights_hash(toy_lm("llama"))
    assert AutoTokenizer.from_pretrained(saved)("abc").input_ids == toy_tokenizer()("abc").input_ids


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma"])
def test_adapters_come_back_bit_identical_with_a_base_that_moved_too(family, tmp_path):
    plain = disturbed(toy_lm(family))
    adapted = disturbed(add_lora(plain, rank=2))  # base and adapter, far from anything on the hub
    save_model(adapted, toy_tokenizer(), tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    batch = toy_batch()
    assert weights_hash(loaded.model) == weights_hash(adapted)
    assert torch.equal(logits_of(loaded.model, batch), logits_of(adapted, batch))
    assert [w.requires_grad for w in loaded.model.parameters()] == [w.requires_grad for w in adapted.parameters()]
    assert loaded.processor("abc").input_ids == toy_tokenizer()("abc").input_ids
    with without_adapter(loaded.model), without_adapter(adapted):
        assert torch.equal(logits_of(loaded.model, batch), logits_of(adapted, batch))
    shutil.move(tmp_path / "m", tmp_path / "elsewhere")  # the base travels along
    assert weights_hash(load_model(tmp_path / "elsewhere").model) == weights_hash(adapted)
    torch.testing.assert_close(logits_of(merge_lora(loaded.model), batch), logits_of(adapted, batch))


def test_saving_an_adapter_does_not_change_it(tmp_path):
    adapted = add_lora(toy_lm("llama"), rank=2)
    before, named = weights_hash(adapted), adapted.peft_config["default"].base_model_name_or_path
    save_model(adapted, None, tmp_path / "m")
    assert weights_hash(adapted) == before
    assert adapted.peft_config["default"].base_model_name_or_path == named


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_keep_their_precision(dtype, tmp_path):
    adapted = add_lora(toy_lm("qwen2", dtype=dtype), rank=2)
    save_model(adapted, toy_tokenizer(), tmp_path / "m")
    assert weights_hash(load_model(tmp_path / "m").model) == weights_hash(adapted)
    for weight in adapted.parameters():
        weight.data = weight.data.to(dtype)
    save_model(adapted, toy_tokenizer(), tmp_path / "m")
    assert weights_hash(load_model(tmp_path / "m").model) == weights_hash(adapted)


@pytest.mark.parametrize("name", ["mlp-digits", "cnn-digits", "vit-digits", "mlp-mnist", "cnn-mnist"])
def test_desk_classifiers_come_back_bit_identical(name, tmp_path):
    model = load_model(f"desk:{name}", seed=4).model
    x = {"pixel_values": torch.rand(6, model.config.image_size, model.config.image_size)}
    logits_of(model.train(), x)  # moves the running statistics
    save_model(model, None, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert weights_hash(loaded.model) == weights_hash(model)
    assert torch.equal(logits_of(loaded.model, x), logits_of(model.eval(), x))
    assert loaded.processor is None
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path / "m")) is type(model)
    adapted = disturbed(add_lora(loaded.model, rank=2))
    save_model(adapted, None, tmp_path / "adapted")
    assert torch.equal(logits_of(load_model(tmp_path / "adapted").model, x), logits_of(adapted, x))


def test_plain_modules_come_back_bit_identical(tmp_path):
    loaded = load_model("desk_factories:with_processor", seed=2)
    model = disturbed(loaded.model)
    model.train()(torch.rand(5, 6))
    assert loaded.processor == "processor"
    save_model(model, None, tmp_path / "m")
    again = load_model(tmp_path / "m").model
    assert weights_hash(again) == weights_hash(model)
    assert again.last.weight is again.first.weight
    assert torch.equal(again(torch.ones(2, 6)), model.eval()(torch.ones(2, 6)))
    save_model(again, None, tmp_path / "m")  # a second generation remembers its factory
    assert weights_hash(load_model(tmp_path / "m").model) == weights_hash(model)


def test_a_module_without_a_factory_is_saved_and_read_into_a_new_one(tmp_path):
    model = toy_classifier(1)
    save_model(model, None, tmp_path / "m")
    with pytest.raises(Mistake, match="was not made by a factory; build it yourself"):
        load_model(tmp_path / "m")
    assert weights_hash(load_weights(toy_classifier(2), tmp_path / "m")) == weights_hash(model)
    with pytest.raises(Mistake, match=r"2 weights have another shape .*1\.bias, \(9,\) against \(16,\)"):
        load_weights(nn.Sequential(nn.Flatten(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(16, 4)), tmp_path / "m")


def test_a_compiled_model_is_saved_as_itself(tmp_path):
    model = toy_lm("llama")
    compiled = torch.compile(model)
    assert weights_hash(compiled) == weights_hash(model)
    save_model(compiled, toy_tokenizer(), tmp_path / "m")
    assert weights_hash(load_model(tmp_path / "m").model) == weights_hash(model)


def test_saving_over_a_folder_replaces_it_whole(saved):
    save_model(load_model("desk:mlp-digits").model, None, saved)
    assert not (saved / "tokenizer.json").exists()
    assert load_model(saved).processor is None


def test_a_failed_save_leaves_the_old_folder(saved, monkeypatch):
    before = weights_hash(load_model(saved).model)

    class Broken:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(Mistake, match="No space left on device"):
        save_model(disturbed(toy_lm("llama")), Broken(), saved)
    assert weights_hash(load_model(saved).model) == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]


@pytest.fixture
def stories():
    folder = Path(os.environ.get("REMANENCE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"the real model is not at {folder}; set REMANENCE_DATA")
    return folder


def test_a_real_model_loads_tells_a_story_and_comes_back(stories, tmp_path):
    loaded = load_model(stories)
    ids = loaded.processor("Once upon a time, there was a little", return_tensors="pt").input_ids
    story = loaded.processor.decode(loaded.model.generate(ids, max_new_tokens=12, do_sample=False)[0])
    assert "little girl named" in story
    assert {weight.role for weight in weights_by_role(loaded.model)} >= {"query", "key", "value", "output", "gate", "up", "down"}
    save_model(loaded.model, loaded.processor, tmp_path / "m")
    assert weights_hash(load_model(tmp_path / "m").model) == weights_hash(loaded.model)
    batch = loaded.processor(["one", "two words"], return_tensors="pt", padding=True)
    assert logits_of(loaded.model, batch).isfinite().all()


# ---- precision, seeds, counts ----


def test_dtype_casts_weights_but_not_rotary_frequencies(saved):
    model = load_model(saved, dtype="bf16").model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    fresh = load_model(f"config:{saved}", dtype=torch.bfloat16).model
    assert {weight.dtype for weight in fresh.parameters()} == {torch.bfloat16}
    assert fresh.model.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(Mistake, match="unknown 'bfloat'; did you mean"):
        load_model(saved, dtype="bfloat")


def test_fresh_weights_follow_the_seed(saved, tmp_path):
    random = torch.get_rng_state()
    one = load_model(f"config:{saved}", seed=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert one.processor.pad_token == "<pad>"
    assert weights_hash(load_model(f"config:{saved / 'config.json'}", seed=1).model) == weights_hash(one.model)
    assert weights_hash(load_model(f"config:{saved}", seed=2).model) != weights_hash(one.model)
    toy_config("phi3").save_pretrained(tmp_path / "bare")
    bare = load_model(f"config:{tmp_path / 'bare'}")
    assert bare.processor is None
    assert type(bare.model).__name__ == "Phi3ForCausalLM"


def test_factories_get_the_seed():
    weights = [load_model("desk_factories:seeded", seed=seed).model.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(weights[2], torch.randn(2, 3, generator=torch.Generator().manual_seed(2)))


def test_factories_in_the_working_folder_are_found(tmp_path, monkeypatch):
    (tmp_path / "here_only.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(2, 1)\n")
    monkeypatch.chdir(tmp_path)
    assert parameter_count(load_model("here_only:build").model) == 3


def test_tied_weights_count_once():
    model = toy_lm("gemma", layers=1)
    assert parameter_count(model) == sum(weight.numel() for weight in model.parameters())
    untied = toy_lm("gemma", layers=1)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert parameter_count(untied) == parameter_count(model) + 64 * 32
    assert weights_hash(untied) != weights_hash(model)
    model.requires_grad_(False).lm_head.requires_grad_(True)
    assert parameter_count(model, trainable=True) == 64 * 32


def test_one_flipped_bit_changes_the_hash():
    model = toy_lm("llama")
    before = weights_hash(model)
    with torch.no_grad():
        model.lm_head.weight.view(torch.int32)[3, 5] ^= 1
    assert weights_hash(model) != before


# ---- mistakes ----


def test_a_missing_folder_names_its_nearest_sibling(saved):
    with pytest.raises(Mistake, match=r"modle: does not exist; did you mean 'model'\?"):
        load_model(saved.parent / "modle")
    with pytest.raises(Mistake, match=r"does not exist, nor does"):
        load_model("/no/such/folder")
    with pytest.raises(Mistake, match="is a file; name its folder"):
        load_model(saved / "model.safetensors")
    with pytest.raises(Mistake, match="modle: does not exist"):
        load_model(f"config:{saved.parent / 'modle'}")


def test_a_relative_folder_is_not_sought_on_the_hub(saved, monkeypatch):
    monkeypatch.chdir(saved.parent.parent)
    relative = f"{saved.parent.name}/modle"
    with pytest.raises(Mistake, match="did you mean 'model'"):
        load_model(relative)


def test_a_folder_without_configuration_or_weights_is_refused(saved):
    (saved / "model.safetensors").rename(saved / "spare")
    with pytest.raises(Mistake, match="holds no weights"):
        load_model(saved)
    (saved / "spare").rename(saved / "pytorch_model.bin")
    with pytest.raises(Mistake, match=r"pickled \(pytorch_model.bin\).*save them as safetensors"):
        load_model(saved)
    (saved / "config.json").unlink()
    with pytest.raises(Mistake, match=r"holds no config\.json"):
        load_model(saved)


def test_nothing_is_unpickled(saved, tmp_path):
    """A pickle that would write a file when read is left alone, even beside an index that asks for it."""
    trap = tmp_path / "sprung"
    (saved / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin.index.json").write_text('{"weight_map": {"lm_head.weight": "pytorch_model.bin"}}')
    (saved / "other.safetensors").write_bytes(b"")
    with pytest.raises(Mistake):
        load_model(saved)
    assert not trap.exists()


def test_damaged_files_are_named(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(Mistake, match="its weights are damaged"):
        load_model(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(Mistake, match="is not a JSON file"):
        load_model(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(Mistake, match="is not a JSON object"):
        load_model(saved)


def test_unknown_and_unfit_architectures_are_refused(saved):
    config = saved / "config.json"
    rewrite(config, lambda content: content.update(model_type="lama"))
    with pytest.raises(Mistake, match="unknown architecture"):
        load_model(saved)
    rewrite(config, lambda content: content.pop("model_type"))
    with pytest.raises(Mistake, match="unknown architecture"):
        load_model(saved)
    AutoConfig.for_model("t5", vocab_size=64).save_pretrained(saved)
    with pytest.raises(Mistake, match="neither a causal language model nor an image classifier"):
        load_model(saved)


def test_code_that_comes_with_the_weights_does_not_run(saved, tmp_path):
    trap = tmp_path / "sprung"
    (saved / "mine.py").write_text(
        f"open({str(trap)!r}, 'w')\nfrom transformers import PretrainedConfig\nclass C(PretrainedConfig): pass\n"
    )
    rewrite(saved / "config.json", lambda content: content.update(model_type="mine", auto_map={"AutoConfig": "mine.C"}))
    with pytest.raises(Mistake, match=r"brings its own Python code.*trust_remote_code"):
        load_model(saved)
    assert not trap.exists()


def test_weights_that_do_not_fit_are_counted_and_the_first_is_named(saved):
    weights, config = saved / "model.safetensors", saved / "config.json"
    whole = load_file(weights)
    save_file({name: tensor for name, tensor in whole.items() if "layers.1.mlp" not in name}, weights, metadata={"format": "pt"})
    with pytest.raises(Mistake, match=r"3 weights of the model are missing .*model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(saved)
    save_file(whole, weights, metadata={"format": "pt"})
    rewrite(config, lambda content: content.update(intermediate_size=48))
    with pytest.raises(Mistake, match=r"6 weights have another shape .*layers\.0\.mlp\.down_proj.*\(32, 64\) against \(32, 48\)"):
        load_model(saved)
    rewrite(config, lambda content: content.update(intermediate_size=64, num_hidden_layers=1))
    assert "9 saved tensors have no place in the model" in load_model(saved).notes[0]


def test_tokenizers_that_are_absent_or_do_not_fit_are_refused(saved):
    toy_tokenizer(99).save_pretrained(saved)
    with pytest.raises(Mistake, match="tokenizer knows 99 tokens, the model 64"):
        load_model(saved)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    with pytest.raises(Mistake, match="tokenizer is absent"):
        load_model(saved)


def test_a_tokenizer_without_padding_pads_with_its_end_or_is_refused(saved):
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(saved)
    loaded = load_model(saved)
    assert loaded.processor.pad_token == "<eos>"
    assert "its end token '<eos>' pads" in loaded.notes[0]
    tokenizer.eos_token = None
    tokenizer.save_pretrained(saved)
    with pytest.raises(Mistake, match="neither a padding nor an end token; set pad_token"):
        load_model(saved)


def test_a_model_saved_without_tokenizer_loads_without(tmp_path):
    save_model(toy_lm("llama"), None, tmp_path / "m")
    assert load_model(tmp_path / "m").processor is None


def test_a_hub_name_while_offline_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "smollm").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake, match=r"neither a folder here, nor in the hub's cache, nor within reach.*check the name and the network"):
        load_model("nobody/nothing")
    with pytest.raises(Mistake, match="did you mean 'smollm'"):
        load_model("smolm")


def test_adapters_that_lack_their_base_are_refused(tmp_path):
    save_model(add_lora(toy_lm("llama"), rank=2), None, tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "base")
    with pytest.raises(Mistake, match=r"base: does not exist"):
        load_model(tmp_path / "m")
    rewrite(tmp_path / "m" / "adapter_config.json", lambda content: content.update(base_model_name_or_path=None))
    with pytest.raises(Mistake, match="does not say which model it stands on"):
        load_model(tmp_path / "m")
    save_model(toy_lm("llama", width=64), None, tmp_path / "m" / "base")
    with pytest.raises(Mistake, match="does not fit its base"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "adapter_model.safetensors").unlink()
    with pytest.raises(Mistake, match=r"holds no adapter_model\.safetensors"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("desk:mlp-digit", "did you mean 'mlp-digits'|desk"),
        ("no_such_module:build", "no module named 'no_such_module'"),
        ("desk_factories:seded", "has no function 'seded'; did you mean 'seeded'"),
        ("desk_factories:number", "returned a int"),
    ],
)
def test_mistaken_desk_names_and_factories_are_refused(spec, words):
    with pytest.raises(Mistake, match=words):
        load_model(spec)
