"""Small image classifiers for the desk: a perceptron, a convolutional net, a vision transformer; Hugging Face models like any other.

| name | images | parameters |
|------|--------|------------|
| `mlp-digits`, `cnn-digits`, `vit-digits` | 8 x 8, one channel (scikit-learn's digits) | 10 k, 24 k, 40 k |
| `mlp-mnist`, `cnn-mnist` | 28 x 28, one channel | 105 k, 24 k |
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from remanence.errors import Mistake, nearest
from remanence.models.forward import fresh_weights


class _DeskConfig(PretrainedConfig):
    """What the three have in common: the image and the classes."""

    def __init__(self, image_size: int = 8, channels: int = 1, classes: int = 10, **rest: Any):
        self.image_size, self.channels = image_size, channels
        if "id2label" not in rest:
            rest.setdefault("num_labels", classes)
        super().__init__(**rest)


class DeskMLPConfig(_DeskConfig):
    """Perceptron: `hidden` lists the widths of its hidden layers."""

    model_type = "remanence-mlp"

    def __init__(self, hidden: tuple[int, ...] | list[int] = (100, 32), **rest: Any):
        self.hidden = list(hidden)
        super().__init__(**rest)


class DeskCNNConfig(_DeskConfig):
    """Convolutional net: `widths` lists the channels of its stages."""

    model_type = "remanence-cnn"

    def __init__(self, widths: tuple[int, ...] | list[int] = (16, 32, 64), **rest: Any):
        self.widths = list(widths)
        super().__init__(**rest)


class DeskViTConfig(_DeskConfig):
    """Vision transformer: square patches of `patch` pixels, D `width`, L `depth`, H `heads`, MLP `expansion` times as wide."""

    model_type = "remanence-vit"

    def __init__(self, patch: int = 2, width: int = 48, depth: int = 2, heads: int = 4, expansion: int = 2, **rest: Any):
        self.patch, self.width, self.depth, self.heads, self.expansion = patch, width, depth, heads, expansion
        super().__init__(**rest)


class _DeskClassifier(PreTrainedModel):
    """The Hugging Face face of the three: `features` then `head`."""

    main_input_name = "pixel_values"
    head: nn.Linear
    base_model_prefix = ""
    _no_split_modules: list[str] = []  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Leave each module as torch initialised it."""

    def features(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B D"]:
        raise NotImplementedError

    def forward(self, pixel_values: Float[Tensor, "B *pixels"], labels: Int[Tensor, " B"] | None = None, **_: Any) -> ImageClassifierOutput:
        """Classify images given as (B, C, S, S), (B, S, S) or flat (B, C*S*S); with `labels` the loss is the mean cross entropy.

        Raises:
            Mistake: the number of values per image is not the model's.
        """
        logits = self.head(self.features(as_images(pixel_values, self.config.channels, self.config.image_size)))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def as_images(values: Float[Tensor, "B *pixels"], channels: int, size: int) -> Float[Tensor, "B C S S"]:
    """Bring images to (B, channels, size, size).

    Raises:
        Mistake: the number of values per image is another.
    """
    if values[0].numel() != channels * size * size:
        have = " x ".join(map(str, values.shape[1:]))
        raise Mistake(
            "pixel_values", f"an image is {have}, the model takes {channels} x {size} x {size}", "choose the desk model of this data set"
        )
    return values.reshape(len(values), channels, size, size)


class DeskMLP(_DeskClassifier):
    """Flatten, then linear layers with ReLU between them."""

    config_class = DeskMLPConfig

    def __init__(self, config: DeskMLPConfig):
        super().__init__(config)
        widths = [config.channels * config.image_size**2, *config.hidden]
        self.body = nn.Sequential(*(layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())))
        self.head = nn.Linear(widths[-1], len(config.id2label or {}))
        self.post_init()

    def features(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B D"]:
        return self.body(images.flatten(1))


class DeskCNN(_DeskClassifier):
    """3 x 3 convolutions with stride 2, each with batch norm and ReLU, then the mean over places."""

    config_class = DeskCNNConfig

    def __init__(self, config: DeskCNNConfig):
        super().__init__(config)
        widths = [config.channels, *config.widths]
        self.body = nn.Sequential(*(_stage(i, o) for i, o in itertools.pairwise(widths)))
        self.head = nn.Linear(widths[-1], len(config.id2label or {}))
        self.post_init()

    def features(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B D"]:
        return self.body(images).mean((2, 3))


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    # No bias in the convolution: batch norm would take it away again.
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class DeskViT(_DeskClassifier):
    """Patches, learned positions, pre-norm transformer blocks, the mean over patches."""

    config_class = DeskViTConfig

    def __init__(self, config: DeskViTConfig):
        super().__init__(config)
        if config.image_size % config.patch or config.width % config.heads:
            problem = f"patch {config.patch} must divide the image ({config.image_size}), heads {config.heads} the width ({config.width})"
            raise Mistake("vit", problem, "choose divisors")
        places = (config.image_size // config.patch) ** 2
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, places, config.width))
        self.blocks = nn.Sequential(*(DeskViTBlock(config.width, config.heads, config.expansion) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, len(config.id2label or {}))
        self.post_init()

    def features(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B D"]:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions  # (B, T, D)
        return self.norm(self.blocks(x)).mean(1)


class DeskViTBlock(nn.Module):
    """Attention over patches and an MLP, each behind a layer norm and around a residual."""

    def __init__(self, width: int, heads: int, expansion: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


_MODELS: dict[type[_DeskConfig], type[_DeskClassifier]] = {DeskMLPConfig: DeskMLP, DeskCNNConfig: DeskCNN, DeskViTConfig: DeskViT}
NAMES: dict[str, tuple[type[_DeskConfig], dict[str, Any]]] = {
    "mlp-digits": (DeskMLPConfig, {"image_size": 8}),
    "cnn-digits": (DeskCNNConfig, {"image_size": 8}),
    "vit-digits": (DeskViTConfig, {"image_size": 8}),
    "mlp-mnist": (DeskMLPConfig, {"image_size": 28, "hidden": (128, 32)}),
    "cnn-mnist": (DeskCNNConfig, {"image_size": 28}),
}


def build(name: str, seed: int = 0, *, classes: int = 10, **settings: Any) -> PreTrainedModel:
    """Build a desk classifier with weights drawn from `seed`; the global generator is left as it was.

    Args:
        name: see the table of this module, with or without `desk:` before it.
        seed: of the initial weights.
        classes: K.
        settings: fields of its configuration (`hidden`, `widths`, `width`, `image_size`, ...).

    Raises:
        Mistake: no such model or field.
    """
    short = name.removeprefix("desk:")
    if short not in NAMES:
        raise Mistake(f"desk:{short}", "no such desk model", nearest(short, NAMES))
    kind, defaults = NAMES[short]
    known = set(kind().to_diff_dict()) | {"image_size", "channels"} | set(kind.__init__.__annotations__) - {"rest", "return"}
    unknown = next((field for field in settings if field not in known), None)
    if unknown is not None:
        raise Mistake(f"desk:{short}", f"unknown field '{unknown}'", nearest(unknown, known))
    register()
    with fresh_weights(seed):
        return _MODELS[kind](kind(**{**defaults, "classes": classes, **settings})).eval()


def register() -> None:
    """Tell the Auto classes about the desk classifiers, so that their folders load like any other; again is no harm."""
    for config, model in _MODELS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForImageClassification.register(config, model, exist_ok=True)
