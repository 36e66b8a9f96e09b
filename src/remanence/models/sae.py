"""Sparse autoencoders over hidden states: read from the usual files, trained on the desk, or the identity.

    pre = W_enc^T (s h - b_dec) + b_enc;   z = activation(pre);   h ~ (W_dec^T z + b_dec) / s

| files | names | activation | b_dec before the encoder | s |
|---|---|---|---|---|
| Gemma Scope (`params.npz`, safetensors) | W_enc (D, N), b_enc, W_dec (N, D), b_dec, threshold | JumpReLU: pre where pre > threshold | no | 1 |
| SAELens (`cfg.json` beside the weights) | the same | its `architecture`: standard, topk, jumprelu | `apply_b_dec_to_input` | 1 |
| EleutherAI sparsify (`cfg.json`) | encoder.weight (N, D), encoder.bias, W_dec, b_dec | TopK of the ReLU | yes | 1 |
| Llama Scope (`hyperparams.json`) | encoder.weight, encoder.bias, decoder.weight (D, N), decoder.bias | JumpReLU | no | sqrt(D) / mean norm |
| trained here (`train_sae`, `save_sae`) | W_enc, b_enc, W_dec, b_dec | TopK of the ReLU (Gao et al. 2024, arXiv 2406.04093) | yes | 1 |

Without a configuration beside it a file with `threshold` is taken for Gemma Scope's, one without for a plain ReLU with `b_dec` subtracted. What cannot be
read faithfully is refused, and `explained_variance` says whether the file belongs to the block: a block too early or too late is seen there.
Cost: encoding is one product (rows, D) x (D, N).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.storage import whole_folder, write_text

if TYPE_CHECKING:
    from remanence.training.batches import Batch
    from remanence.training.trainer import Step, Trainer

ACTIVATIONS = ("relu", "topk", "jumprelu", "identity")
WEIGHTS, CONFIGURATION = "sae.safetensors", "cfg.json"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}


class SparseAutoencoder(nn.Module):
    """Encode hidden states (..., D) as codes (..., N), and decode them.

    Args:
        W_enc: encoder, (D, N).
        b_enc: its bias, (N,).
        W_dec: decoder, one direction of the residual stream per latent, (N, D).
        b_dec: its bias, (D,).
        activation: relu | topk | jumprelu | identity.
        k: latents that may fire at a time, of topk.
        threshold: below which a latent is silent, (N,), of jumprelu.
        centred: subtract `b_dec` before encoding.
        scale: of the hidden states on their way in.
        place: for errors.

    Raises:
        Mistake: an unknown activation, shapes that do not fit together, values that are not finite.
    """

    def __init__(
        self,
        W_enc: Float[Tensor, "D N"],
        b_enc: Float[Tensor, "N"],
        W_dec: Float[Tensor, "N D"],
        b_dec: Float[Tensor, "D"],
        *,
        activation: str = "relu",
        k: int | None = None,
        threshold: Float[Tensor, "N"] | None = None,
        centred: bool = False,
        scale: float = 1.0,
        place: object = "sae",
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise Mistake(place, f"unknown activation '{activation}'", nearest(activation, ACTIVATIONS))
        width, latents = len(b_dec), len(b_enc)
        wanted = {"W_enc": (W_enc, (width, latents)), "W_dec": (W_dec, (latents, width)), "threshold": (threshold, (latents,))}
        for name, (value, shape) in wanted.items():
            if value is not None and tuple(value.shape) != shape:
                problem = f"{name} has the shape {tuple(value.shape)}, but the biases say {latents} latents and width {width}: {shape}"
                raise Mistake(place, problem, "name a whole file of one autoencoder")
        if activation == "topk" and (k is None or not 1 <= k <= latents):
            raise Mistake(place, f"k is {k}, but there are {latents} latents", "say in cfg.json how many may fire (k)")
        if activation == "jumprelu" and threshold is None:
            raise Mistake(place, "has no threshold for its JumpReLU", "name a whole file of one autoencoder")
        if not all(bool(value.isfinite().all()) for value in (W_enc, b_enc, W_dec, b_dec)):
            raise Mistake(place, "holds values that are not finite", "fetch it again")
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (nn.Parameter(value.clone()) for value in (W_enc, b_enc, W_dec, b_dec))
        self.activation, self.k, self.centred, self.scale, self.place = activation, k, centred, scale, str(place)
        self.register_buffer("threshold", None if threshold is None else threshold.clone())

    @property
    def width(self) -> int:
        """D, the width of the hidden states."""
        return len(self.b_dec)

    @property
    def latents(self) -> int:
        """N, the number of latents."""
        return len(self.b_enc)

    def check(self, width: int) -> None:
        """Refuse hidden states of another width.

        Raises:
            Mistake: naming both widths.
        """
        if width != self.width:
            raise Mistake(self.place, f"reads hidden states of width {self.width}, the model's are {width} wide", "take one of this model")

    def before(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B N"]:
        """Return the pre-activations, in the autoencoder's precision."""
        with torch.autocast(hidden.device.type, enabled=False):  # what codes are compared with was computed in full precision
            wide = hidden.to(self.b_dec.dtype) * self.scale
            return (wide - self.b_dec if self.centred else wide) @ self.W_enc + self.b_enc

    def encode(self, hidden: Float[Tensor, "*B D"], code: str = "own") -> Float[Tensor, "*B N"]:
        """Return the codes.

        Args:
            hidden: states of the autoencoder's block.
            code: own (the autoencoder's activation) or relu (the plain ReLU of the pre-activations: every latent above 0 has a gradient; the
                identity stays what it is).
        """
        pre = self.before(hidden)
        if self.activation == "identity":
            return pre
        if code == "relu" or self.activation == "relu":
            return pre.relu()
        if self.activation == "jumprelu":
            return pre.relu() * (pre > self.get_buffer("threshold"))
        top = pre.relu().topk(self.k or 1, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    def decode(self, codes: Float[Tensor, "*B N"]) -> Float[Tensor, "*B D"]:
        """Return the hidden states that the codes stand for."""
        return (codes @ self.W_dec + self.b_dec) / self.scale

    def forward(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Return the reconstruction."""
        return self.decode(self.encode(hidden))


def identity_sae(width: int, dtype: torch.dtype = torch.float32) -> SparseAutoencoder:
    """Return the autoencoder whose codes are the hidden states themselves: with it, steering codes is steering the raw residual."""
    eye, zero = torch.eye(width, dtype=dtype), torch.zeros(width, dtype=dtype)
    return SparseAutoencoder(eye, zero, eye, zero, activation="identity").requires_grad_(False)


def explained_variance(sae: SparseAutoencoder, hidden: Float[Tensor, "N D"]) -> float:
    """Return 1 - sum ||h - h_hat||^2 / sum ||h - mean h||^2; 1 is a perfect reconstruction, 0 no better than the mean."""
    with torch.no_grad():
        wide = hidden.to(sae.b_dec.dtype)
        lost = (wide - sae(wide)).square().sum(dtype=torch.float64)
        return 1 - (lost / (wide - wide.mean(0)).square().sum(dtype=torch.float64)).item()


def fitting(sae: SparseAutoencoder, hidden: Float[Tensor, "N D"], where: str, least: float, usual: float = 0.0) -> SparseAutoencoder:
    """Return the autoencoder on the device and in the precision of hidden states that it is to explain.

    Args:
        sae: any.
        hidden: states.
        where: they come from, for errors.
        least: variance that must be explained.
        usual: variance below which there is a warning.

    Raises:
        Mistake: another width, or too little is explained.
    """
    sae.check(hidden.shape[1])
    found = explained_variance(sae.to(hidden), hidden)
    if found < least:
        problem = f"explains {found:.2f} of the variance behind {where}, {least:g} is needed"
        raise Mistake(sae.place, problem, "check which block it was made for (counted from 0), or train it longer")
    if found < usual:
        warnings.warn(
            f"the autoencoder explains only {found:.2f} of the variance behind {where}; train it longer, or raise k", stacklevel=4
        )
    return sae


def train_sae(
    groups: Mapping[str, Float[Tensor, "N D"]],
    trainer: Trainer,
    *,
    factor: int = 8,
    k: int = 16,
    steps: int = 1200,
    batch_size: int = 256,
    rate: float = 1e-3,
) -> SparseAutoencoder:
    """Train a TopK autoencoder through the trainer (a stage of its event) and return it frozen.

    Rows are drawn equally from the groups. Decoder rows have length 1 and start at random, the encoder starts as their transpose, b_dec at the mean;
    the loss is ||h - h_hat||^2 / var, var the mean squared distance from the mean.

    Args:
        groups: hidden states by name.
        trainer: of the event.
        factor: latents per dimension.
        k: latents that may fire at a time.
        steps: optimizer steps.
        batch_size: rows per step, over all groups.
        rate: of Adam.
    """
    from remanence.seeds import derive
    from remanence.training.batches import Batches, Zip

    hidden = torch.cat(list(groups.values()))
    centre, latents = hidden.mean(0), factor * hidden.shape[1]
    variance = (hidden - centre).square().sum(1).mean()
    drawn = torch.randn(latents, hidden.shape[1], generator=trainer.generator("sae", "decoder")).to(hidden)
    decoder = drawn / drawn.norm(dim=1, keepdim=True)
    sae = SparseAutoencoder(decoder.T, hidden.new_zeros(latents), decoder, centre, activation="topk", k=min(k, latents), centred=True)
    share = -(-batch_size // len(groups))
    streams = {name: Batches({"hidden": rows}, share, seed=derive(trainer.seed, "sae", name)) for name, rows in groups.items()}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        lost = [(part["hidden"] - model(part["hidden"])).square().sum() / part.rows for part in batch.values()]
        return torch.stack(lost).mean() / variance.to(lost[0])

    def unit(model: nn.Module, step: Step) -> None:
        with torch.no_grad():
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))

    adam: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = lambda weights: torch.optim.Adam(weights, lr=rate)  # noqa: E731
    trainer.fit(sae, Zip(**streams), loss, steps=steps, optimizer=adam, schedule=lambda step: 1.0, after_step=unit)
    return sae.requires_grad_(False).eval()


def save_sae(sae: SparseAutoencoder, folder: str | Path) -> None:
    """Write weights and `cfg.json`, whole or not at all; `load_sae` reads them, and so does whatever reads SAELens's folders.

    Raises:
        Mistake: the folder cannot be written, or there is no name for this autoencoder in those files.
    """
    from safetensors.torch import save_file

    architecture = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}.get(sae.activation)
    if architecture is None or sae.scale != 1:
        raise Mistake(folder, "cannot hold an identity or a scaled autoencoder", "save another one")
    notes: dict[str, Any] = {"architecture": architecture, "d_in": sae.width, "d_sae": sae.latents, "apply_b_dec_to_input": sae.centred}
    notes |= {"k": sae.k} if sae.k is not None else {}
    with whole_folder(folder) as place:
        save_file({name: value.detach().cpu().contiguous() for name, value in sae.state_dict().items()}, place / WEIGHTS)
        write_text(place / CONFIGURATION, json.dumps(notes, indent=2) + "\n")


def load_sae(path: str | Path) -> SparseAutoencoder:
    """Read an autoencoder, frozen, in at least fp32.

    Args:
        path: of a .safetensors or .npz file, or of a folder that holds one, environment variables allowed; `cfg.json` or `hyperparams.json` beside it says what the weights do not.

    Raises:
        Mistake: nothing is there, it is damaged or not one autoencoder of a known form, or it does what is not supported here.
    """
    file = _file(Path(os.path.expandvars(path)).expanduser())
    found = _tensors(file)
    named = {_NAMES.get(name, name): value for name, value in found.items()}
    strange = next((name for name in ("b_gate", "r_mag", "W_skip", "W_gate", "log_threshold") if name in named), None)
    if strange is not None:
        raise Mistake(file, f"holds '{strange}', so it is no plain autoencoder", "take one with ReLU, TopK or JumpReLU")
    missing = next((name for name in ("W_enc", "b_enc", "W_dec", "b_dec") if name not in named), None)
    if missing is not None:
        raise Mistake(file, f"has no {missing}, it has {', '.join(sorted(named)[:8])}", "name the weights of one autoencoder")
    for theirs in ("encoder.weight", "decoder.weight"):  # linear layers are stored (out, in)
        if theirs in found:
            named[_NAMES[theirs]] = found[theirs].T
    wide = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in named.items()}
    return _configured(file, wide, linear="encoder.weight" in found)


def _configured(file: Path, named: dict[str, Tensor], linear: bool) -> SparseAutoencoder:
    """Return the autoencoder that the weights and the configuration beside them describe."""
    said = _configuration(file.parent)
    threshold: Tensor | None = named.get("threshold")
    four: dict[str, Any] = {name: named[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if "jump_relu_threshold" in said:  # Llama Scope
        norms = four["W_dec"].norm(dim=1) if said.get("sparsity_include_decoder_norm", True) else torch.ones_like(four["b_enc"])
        norm = (said.get("dataset_average_activation_norm") or {}).get("in")
        scale = len(four["b_dec"]) ** 0.5 / norm if norm else 1.0
        options: dict[str, Any] = {"activation": "jumprelu", "threshold": said["jump_relu_threshold"] / norms, "scale": scale}
        return SparseAutoencoder(**four, **options, place=file).requires_grad_(False).eval()
    scaling = said.get("normalize_activations")
    if scaling not in (None, False, "none"):
        raise Mistake(
            file, f"wants activations scaled ('{scaling}'), which its file does not hold", "fold the scaling into the weights first"
        )
    if said.get("rescale_acts_by_decoder_norm"):  # the same function with unit decoder rows
        norms = four["W_dec"].norm(dim=1)
        four |= {"W_enc": four["W_enc"] * norms, "b_enc": four["b_enc"] * norms, "W_dec": four["W_dec"] / norms[:, None]}
    kwargs = said.get("activation_fn_kwargs") or {}
    k = said.get("k", kwargs.get("k"))
    kind = str(said.get("architecture") or said.get("activation") or "standard")
    if linear or kind == "standard":
        kind = str(said.get("activation") or said.get("activation_fn") or said.get("activation_fn_str") or ("topk" if k else "relu"))
    kind = "jumprelu" if threshold is not None else kind
    if kind not in ("relu", "topk", "jumprelu"):
        raise Mistake(file, f"is of the kind '{kind}'", "take one with ReLU, TopK or JumpReLU")
    centred = bool(said.get("apply_b_dec_to_input", threshold is None))
    made = SparseAutoencoder(**four, activation=kind, k=k if kind == "topk" else None, threshold=threshold, centred=centred, place=file)
    for key, have in (("d_in", made.width), ("d_sae", made.latents)):
        if said.get(key, have) != have:
            raise Mistake(file, f"has {key} = {have}, but its configuration says {said[key]}", "keep weights and configuration together")
    return made.requires_grad_(False).eval()


def _file(path: Path) -> Path:
    """Return the file of weights that a path names."""
    if path.is_dir():
        found = sorted([*path.glob("*.safetensors"), *path.glob("*.npz")])
        if len(found) != 1:
            raise Mistake(path, f"holds {len(found)} files of weights", "name one of them")
        return found[0]
    if not path.is_file():
        raise Mistake(path, "does not exist", "name a .safetensors or .npz file, or a folder that holds one")
    return path


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        return load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise Mistake(file, f"cannot be read ({error})", "name a .safetensors or .npz file") from error


def _configuration(folder: Path) -> dict[str, Any]:
    scope = "hyperparams.json"  # Llama Scope keeps its weights one folder below it
    place = next((each for each in (folder / CONFIGURATION, folder / scope, folder.parent / scope) if each.is_file()), None)
    if place is None:
        return {}
    try:
        said = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Mistake(place, f"is no JSON ({error})", "fetch it again") from error
    if not isinstance(said, dict):
        raise Mistake(place, "holds no mapping", "fetch it again")
    return said
