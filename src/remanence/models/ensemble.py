"""Several models that answer as one: the mean of their probabilities. Saved, loaded, measured and decoded like any other model.

The logits of an ensemble are log((1/K) sum_k softmax(z_k)), so that softmax gives the mean probability. Members that were trained on no row do not count.
Cost: K forward passes; decoding runs the whole sequence again for each token (no cache).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput, ImageClassifierOutput

from remanence.errors import Mistake
from remanence.models.forward import is_language_model

SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


class EnsembleConfig(PretrainedConfig):
    """`members` language models of the configuration `member`."""

    model_type = "remanence-ensemble"

    def __init__(self, member: dict[str, Any] | None = None, members: int = 1, **rest: Any):
        self.member, self.members = member or {}, members
        super().__init__(**{name: self.member[name] for name in (*SHARED, *TOKENS) if name in self.member} | rest)


class ImageEnsembleConfig(EnsembleConfig):
    """`members` image classifiers of the configuration `member`."""

    model_type = "remanence-image-ensemble"


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """Language models of one configuration.

    Args:
        config: says how many and of what kind.
        members: the models themselves; built from the configuration where they are not given.
    """

    config_class = EnsembleConfig
    main_input_name = "input_ids"
    rows: Tensor

    def __init__(self, config: EnsembleConfig, members: Sequence[nn.Module] = ()):
        super().__init__(config)
        self.members = nn.ModuleList(members or _built(config, AutoModelForCausalLM))
        self.register_buffer("rows", torch.ones(config.members, dtype=torch.int64))
        self.post_init()
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(
            all_submodels=True
        )  # those of a list's models are not found by themselves
        self.generation_config.use_cache = False

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the members as they are."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutput:
        """Return the logits of the mean probabilities, (B, T, V)."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        given = {name: value for name, value in inputs.items() if value is not None}
        return CausalLMOutput(logits=mean_of(kept_logits(member, given, logits_to_keep) for member in counted(self)))

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> dict[str, Any]:
        """Take the whole sequence at every token."""
        return whole_inputs(input_ids, attention_mask)


class EnsembleForImageClassification(PreTrainedModel):
    """Image classifiers of one configuration; arguments as in `EnsembleForCausalLM`."""

    config_class = ImageEnsembleConfig
    main_input_name = "pixel_values"
    rows: Tensor

    def __init__(self, config: ImageEnsembleConfig, members: Sequence[nn.Module] = ()):
        super().__init__(config)
        self.members = nn.ModuleList(members or _built(config, AutoModelForImageClassification))
        self.register_buffer("rows", torch.ones(config.members, dtype=torch.int64))
        self.post_init()
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(
            all_submodels=True
        )  # those of a list's models are not found by themselves

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the members as they are."""

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutput:
        """Return the logits of the mean probabilities, (B, K)."""
        return ImageClassifierOutput(logits=mean_of(member(pixel_values=pixel_values).logits for member in counted(self)))


class PlainEnsemble(nn.Module):
    """Plain modules that give a tensor of logits.

    Args:
        members: the models.
    """

    rows: Tensor

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("rows", torch.ones(len(members), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of the mean probabilities, (B, K)."""
        return mean_of(member(inputs) for member in counted(self))


Ensemble = EnsembleForCausalLM | EnsembleForImageClassification | PlainEnsemble


def ensemble_of(model: nn.Module, members: int) -> Ensemble:
    """Return an ensemble of copies of a model.

    Raises:
        Mistake: the model has an adapter.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        raise Mistake(type(model).__name__, "has an adapter, of which an ensemble cannot be made", "merge it first (merge_lora)")
    copies = [copy.deepcopy(model) for _ in range(members)]
    if not isinstance(model, PreTrainedModel):
        return PlainEnsemble(copies)
    settings: dict[str, Any] = {"member": model.config.to_dict(), "members": members, "dtype": model.dtype}
    if is_language_model(model):
        made = EnsembleForCausalLM(EnsembleConfig(**settings), copies)
        made.generation_config = copy.deepcopy(model.generation_config)
        made.generation_config.use_cache = False
        return made.eval()
    settings |= {"id2label": model.config.id2label, "label2id": model.config.label2id}
    return EnsembleForImageClassification(ImageEnsembleConfig(**settings), copies).eval()


def counted(ensemble: nn.Module) -> list[nn.Module]:
    """Return the members that were trained on some row; all where none was."""
    members, rows = list(ensemble.members), ensemble.rows.tolist()  # type: ignore[arg-type, operator, union-attr]
    return [member for member, count in zip(members, rows, strict=True) if count > 0] or members


def mean_of(logits: Iterable[Float[Tensor, "*B V"]]) -> Float[Tensor, "*B V"]:
    """Return log of the mean of softmax over models, at least in fp32: softmax of it is the mean probability."""
    total, count = None, 0
    for each in logits:
        logp = (each if each.dtype == torch.float64 else each.float()).log_softmax(-1)
        total, count = logp if total is None else torch.logaddexp(total, logp), count + 1
    assert total is not None
    return total - torch.log(torch.tensor(float(count), dtype=total.dtype, device=total.device))


def kept_logits(model: nn.Module, given: dict[str, Tensor], keep: int | Tensor) -> Float[Tensor, "B S V"]:
    """Return a model's logits at the positions to keep (all for 0, the last n for n, those of a tensor of places), by the model itself where it can."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**given, logits_to_keep=keep, use_cache=False).logits
    logits = model(**given, use_cache=False).logits
    return logits[:, -keep:] if isinstance(keep, int) and keep else logits if isinstance(keep, int) else logits[:, keep]


def whole_inputs(input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
    """Return the inputs of a model without a cache; positions count the tokens that are attended to, wherever the padding stands."""
    if attention_mask is None or bool((attention_mask == 1).all()):
        return {"input_ids": input_ids}
    places = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": places}


def _built(config: EnsembleConfig, auto: Any) -> list[nn.Module]:
    member = AutoConfig.for_model(**config.member)
    return [auto.from_config(member, dtype=config.dtype) for _ in range(config.members)]


def register() -> None:
    """Tell the Auto classes about ensembles, so that their folders load like any other; again is no harm."""
    AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig, exist_ok=True)
    AutoConfig.register(ImageEnsembleConfig.model_type, ImageEnsembleConfig, exist_ok=True)
    AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM, exist_ok=True)
    AutoModelForImageClassification.register(ImageEnsembleConfig, EnsembleForImageClassification, exist_ok=True)
