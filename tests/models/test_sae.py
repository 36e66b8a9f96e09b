"""Sparse autoencoders: codes by hand, every file format, refusals, and training through the trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from remanence.errors import Mistake
from remanence.models.sae import SparseAutoencoder, explained_variance, identity_sae, load_sae, save_sae, train_sae
from remanence.training.checkpoint import Checkpoints
from remanence.training.trainer import Settings, Trainer

D, N = 3, 5


def weights(seed: int = 0) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}


def states(rows: int = 7) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(9))


def written(folder: Path, tensors: dict[str, Tensor], said: dict[str, Any] | None = None, name: str = "sae.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    if said is not None:
        (folder / "cfg.json").write_text(json.dumps(said))
    return folder


def test_topk_code_by_hand() -> None:
    eye = torch.eye(4)
    sae = SparseAutoencoder(eye, torch.zeros(4), eye, torch.tensor([1.0, 0, 0, 0]), activation="topk", k=2, centred=True)
    hidden = torch.tensor([[4.0, 2.0, -5.0, 1.0]])  # minus b_dec: 3, 2, -5, 1
    assert sae.encode(hidden).tolist() == [[3.0, 2.0, 0.0, 0.0]]
    assert sae.encode(hidden, "relu").tolist() == [[3.0, 2.0, 0.0, 1.0]]
    assert sae(hidden).tolist() == [[4.0, 2.0, 0.0, 0.0]]


def test_relu_code_has_a_gradient_where_topk_has_none() -> None:
    sae = SparseAutoencoder(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), activation="topk", k=1)
    slopes = {}
    for code in ("own", "relu"):
        hidden = torch.tensor([3.0, 2.0, -1.0], requires_grad=True)
        sae.encode(hidden, code).sum().backward()
        slopes[code] = hidden.grad.tolist()
    assert slopes == {"own": [1.0, 0.0, 0.0], "relu": [1.0, 1.0, 0.0]}


def test_jumprelu_is_silent_up_to_its_threshold() -> None:
    eye, zero = torch.eye(3), torch.zeros(3)
    sae = SparseAutoencoder(eye, zero, eye, zero, activation="jumprelu", threshold=torch.tensor([0.5, 0.5, 0.5]))
    assert sae.encode(torch.tensor([0.4, 0.5, 0.6])).tolist() == [0.0, 0.0, pytest.approx(0.6)]
    assert sae.encode(torch.tensor([0.4, 0.5, 0.6]), "relu").tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_codes_of_the_identity_are_the_states() -> None:
    sae = identity_sae(D)
    assert torch.equal(sae.encode(states()), states())
    assert torch.equal(sae.encode(states(), "relu"), states())
    assert explained_variance(sae, states()) == 1.0


def test_explained_variance_by_hand() -> None:
    zero = torch.zeros(1)
    sae = SparseAutoencoder(torch.ones(1, 1), zero, torch.full((1, 1), 0.5), zero)  # h_hat = h / 2 for h > 0
    # states 1, 3: lost 0.25 + 2.25 = 2.5; around the mean 2: 1 + 1 = 2
    assert explained_variance(sae, torch.tensor([[1.0], [3.0]])) == pytest.approx(1 - 2.5 / 2)


def test_reads_gemma_scope(tmp_path: Path) -> None:
    named = weights() | {"threshold": torch.rand(N)}
    np.savez(tmp_path / "params.npz", **{key: value.numpy() for key, value in named.items()})
    written(tmp_path / "other", named)
    pre = states() @ named["W_enc"] + named["b_enc"]
    codes = pre * (pre > named["threshold"])
    for path in (tmp_path / "params.npz", tmp_path / "other", tmp_path / "other/sae.safetensors"):
        sae = load_sae(path)
        torch.testing.assert_close(sae.encode(states()), codes)
        torch.testing.assert_close(sae(states()), codes @ named["W_dec"] + named["b_dec"])
        assert not any(weight.requires_grad for weight in sae.parameters())


@pytest.mark.parametrize(
    "said",
    [
        {"architecture": "topk", "k": 2, "apply_b_dec_to_input": True},
        {"architecture": "topk", "activation_fn_kwargs": {"k": 2}, "d_in": D, "d_sae": N},
        {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "normalize_activations": "none"},
    ],
)
def test_reads_saelens_topk(said: dict[str, Any], tmp_path: Path) -> None:
    named = weights()
    sae = load_sae(written(tmp_path, named, said))
    pre = ((states() - named["b_dec"]) @ named["W_enc"] + named["b_enc"]).relu()
    kept = pre * (pre >= pre.topk(2).values[:, -1:])
    torch.testing.assert_close(sae.encode(states()), kept)


def test_reads_saelens_standard_and_folds_decoder_norms(tmp_path: Path) -> None:
    named = weights()
    plain = load_sae(written(tmp_path / "a", named, {"architecture": "standard", "apply_b_dec_to_input": False}))
    torch.testing.assert_close(plain.encode(states()), (states() @ named["W_enc"] + named["b_enc"]).relu())
    said = {"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True}
    folded = load_sae(written(tmp_path / "b", named, said))
    norms = named["W_dec"].norm(dim=1)
    pre = (((states() - named["b_dec"]) @ named["W_enc"] + named["b_enc"]) * norms).relu()
    kept = pre * (pre >= pre.topk(2).values[:, -1:])
    torch.testing.assert_close(folded(states()), kept / norms @ named["W_dec"] + named["b_dec"])


def test_reads_sparsify(tmp_path: Path) -> None:
    named = weights()
    theirs = {"encoder.weight": named["W_enc"].T, "encoder.bias": named["b_enc"], "W_dec": named["W_dec"], "b_dec": named["b_dec"]}
    sae = load_sae(written(tmp_path, theirs, {"activation": "topk", "k": 2, "expansion_factor": 32, "d_in": D}))
    pre = ((states() - named["b_dec"]) @ named["W_enc"] + named["b_enc"]).relu()
    torch.testing.assert_close(sae.encode(states()), pre * (pre >= pre.topk(2).values[:, -1:]))


def test_reads_llama_scope(tmp_path: Path) -> None:
    named = weights()
    theirs = {"encoder.weight": named["W_enc"].T, "encoder.bias": named["b_enc"], "decoder.weight": named["W_dec"].T}
    written(tmp_path / "checkpoints", theirs | {"decoder.bias": named["b_dec"]}, name="final.safetensors")
    said = {"jump_relu_threshold": 0.5, "dataset_average_activation_norm": {"in": 2.0, "out": 2.0}, "act_fn": "jumprelu"}
    (tmp_path / "hyperparams.json").write_text(json.dumps(said))
    sae, scale = load_sae(tmp_path / "checkpoints"), math.sqrt(D) / 2
    pre = (scale * states() @ named["W_enc"] + named["b_enc"]).relu()
    codes = pre * (pre * named["W_dec"].norm(dim=1) > 0.5)
    torch.testing.assert_close(sae.encode(states()), codes)
    torch.testing.assert_close(sae(states()), (codes @ named["W_dec"] + named["b_dec"]) / scale)


@pytest.mark.parametrize("options", [{"activation": "topk", "k": 2, "centred": True}, {"activation": "relu"}, {"activation": "jumprelu"}])
def test_a_saved_autoencoder_reads_back_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    more = {"threshold": torch.rand(N)} if options["activation"] == "jumprelu" else {}
    sae = SparseAutoencoder(**weights(), **options, **more)
    save_sae(sae, tmp_path / "sae")
    assert torch.equal(load_sae(tmp_path / "sae").encode(states()), sae.encode(states()))


def test_half_precision_weights_are_read_in_fp32(tmp_path: Path) -> None:
    sae = load_sae(written(tmp_path, {name: value.bfloat16() for name, value in weights().items()}))
    assert sae.W_enc.dtype == torch.float32


def test_another_width_than_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="reads hidden states of width 3, the model's are 96 wide"):
        load_sae(written(tmp_path, weights())).check(96)


REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None, str]] = {
    "gated": ({**weights(), "b_gate": torch.zeros(N)}, None, "no plain autoencoder"),
    "transcoder": ({**weights(), "W_skip": torch.zeros(D, D)}, None, "no plain autoencoder"),
    "lacking": ({name: value for name, value in weights().items() if name != "W_dec"}, None, "has no W_dec"),
    "mismatch": ({**weights(), "W_dec": torch.zeros(N + 1, D)}, None, r"W_dec has the shape \(6, 3\)"),
    "transposed": ({**weights(), "W_enc": torch.zeros(N, D)}, None, r"W_enc has the shape \(5, 3\)"),
    "thresholds": ({**weights(), "threshold": torch.zeros(N - 1)}, None, "threshold has the shape"),
    "nan": ({**weights(), "b_enc": torch.full((N,), math.nan)}, None, "not finite"),
    "no k": (weights(), {"architecture": "topk"}, "k is None"),
    "large k": (weights(), {"architecture": "topk", "k": 9}, "k is 9"),
    "scaled": (weights(), {"architecture": "standard", "normalize_activations": "layer_norm"}, "wants activations scaled"),
    "groupmax": (weights(), {"architecture": "groupmax", "k": 2}, "of the kind 'groupmax'"),
    "width": (weights(), {"architecture": "standard", "d_in": 4}, "d_in = 3, but its configuration says 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_plain_autoencoder_is_refused(name: str, tmp_path: Path) -> None:
    tensors, said, words = REFUSED[name]
    with pytest.raises(Mistake, match=words):
        load_sae(written(tmp_path, tensors, said))


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="does not exist"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(Mistake, match="holds 0 files of weights"):
        load_sae(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(Mistake, match="cannot be read"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    save_file(weights(), tmp_path / "a.safetensors")
    with pytest.raises(Mistake, match="is no JSON"):
        load_sae(tmp_path)


def sparse_groups(rows: int = 400) -> dict[str, Tensor]:
    """States that are sums of two of sixteen directions."""
    chance = torch.Generator().manual_seed(1)
    directions = torch.randn(16, 8, generator=chance)
    made = {}
    for name in ("known", "unknown"):
        picked = torch.rand(rows, 16, generator=chance).topk(2).indices
        codes = torch.zeros(rows, 16).scatter(1, picked, torch.rand(rows, 2, generator=chance) + 0.5)
        made[name] = codes @ directions
    return made


def test_training_explains_the_variance_and_keeps_decoder_rows_at_length_one() -> None:
    noise = torch.get_rng_state()
    trainer = Trainer(Settings(steps=1), seed=3, progress=False)
    groups = sparse_groups()
    sae = train_sae(groups, trainer, factor=8, k=4, steps=400, batch_size=64, rate=3e-3)
    assert explained_variance(sae, torch.cat(list(groups.values()))) > 0.9
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert int((sae.encode(groups["known"]) > 0).sum(1).max()) <= 4
    assert not any(weight.requires_grad for weight in sae.parameters())
    assert torch.equal(torch.get_rng_state(), noise)


class Killed(Exception):
    """Stands for a kill."""


def test_training_is_a_stage_that_resumes(tmp_path: Path) -> None:
    def go(folder: Path | None, dies: int | None) -> SparseAutoencoder:
        def watch(model: torch.nn.Module, step: int) -> None:
            if step == dies:
                raise Killed

        points = Checkpoints(folder, every=4) if folder else None
        settings = Settings(gradient_checkpointing=True)  # of the language model; an autoencoder has none
        trainer = Trainer(settings, seed=3, progress=False, checkpoints=points, watch=watch)
        return train_sae(sparse_groups(40), trainer, factor=2, k=4, steps=12, batch_size=16)

    whole = go(None, None).state_dict()
    with pytest.raises(Killed):
        go(tmp_path, 6)
    assert all(torch.equal(value, whole[name]) for name, value in go(tmp_path, None).state_dict().items())
