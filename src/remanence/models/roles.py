"""Say what each weight of a transformer is for, and where one attention head lives in it, whatever the family calls it.

Known families: Llama, Qwen 2 and 3, Mistral, Gemma 1 and 2, GPT-2, GPT-NeoX, Phi and Phi-3, and what shares their names. Fused matrices:

| family | matrix | order of its outputs |
|--------|--------|----------------------|
| GPT-2 | `c_attn`, stored (in, out) | all queries, all keys, all values |
| Phi-3 | `qkv_proj` | all queries, then the (fewer) keys, then the values |
| GPT-NeoX | `query_key_value` | head by head: its query, its key, its value |
| Phi-3 | `gate_up_proj` | all gates, all ups |
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.models.forward import is_language_model, unwrapped

ATTENTION = ("query", "key", "value", "qkv", "output")
MLP = ("gate", "up", "gate_up", "down")
NORMS = ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm", "final_norm", "query_norm", "key_norm", "norm")
ROLES = (*ATTENTION, *MLP, *NORMS, "embedding", "position", "head", "other")

_BY_NAME = {  # end of the module's name -> role
    r"self_attn\.q_proj": "query",
    r"self_attn\.k_proj": "key",
    r"self_attn\.v_proj": "value",
    r"self_attn\.o_proj|self_attn\.dense|attention\.dense|attn\.c_proj": "output",
    r"self_attn\.qkv_proj|attn\.c_attn|attention\.query_key_value": "qkv",
    r"mlp\.gate_proj": "gate",
    r"mlp\.gate_up_proj": "gate_up",
    r"mlp\.up_proj|mlp\.fc1|mlp\.c_fc|mlp\.dense_h_to_4h": "up",
    r"mlp\.down_proj|mlp\.fc2|mlp\.c_proj|mlp\.dense_4h_to_h": "down",
    r"self_attn\.(q_norm|q_layernorm)": "query_norm",
    r"self_attn\.(k_norm|k_layernorm)": "key_norm",
    r"input_layernorm|ln_1": "attention_norm",
    r"post_attention_layernorm|pre_feedforward_layernorm|ln_2": "mlp_norm",
    r"post_feedforward_layernorm": "mlp_post_norm",
    r"model\.norm|final_layernorm|final_layer_norm|ln_f": "final_norm",
    r"embed_tokens|wte|embed_in": "embedding",
    r"wpe": "position",
    r"lm_head|embed_out": "head",
    r"(memory_norm|attended_norm|middle_norm)": "norm",
    r"layers\.\d+\.memory(\..+)?|persistent|reconstructor": "other",  # a memory that learns while it reads, its prefix, what reweaves
}
_RULES = [(re.compile(rf"(?:^|\.)(?:{pattern})$"), role) for pattern, role in _BY_NAME.items()]
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_WRAPPERS = re.compile(
    r"_orig_mod\.|^module\.|^base_model\.model\.|\.base_layer(?=\.)|\.original_module(?=\.)|\.modules_to_save\.\w+(?=\.)"
)
_LORA = re.compile(r"\.lora_(A|B)\.\w+(?=\.weight$)")


@dataclass(frozen=True)
class Weight:
    """One named parameter and what it is for.

    Args:
        name: as in `model.named_parameters()`.
        role: one of `ROLES`; a bias has the role of its matrix.
        layer: number of the block, `None` outside of blocks.
        heads: number of heads it is divided into (key heads for `key`, `value`; query heads for `query`, `qkv`, `output`), or `None`.
        axis: dimension of the outputs: 0, but 1 for a GPT-2 matrix, which is stored (in, out).
        kind: weight | bias.
        tied: an embedding that is the output head too.
        lora: "A" or "B" for a matrix of a low-rank adapter of that weight, else "".
    """

    name: str
    role: str
    layer: int | None = None
    heads: int | None = None
    axis: int = 0
    kind: str = "weight"
    tied: bool = False
    lora: str = ""

    @property
    def module(self) -> str:
        """The name of the module that holds it."""
        return self.name.rpartition(".")[0]


def weights_by_role(model: nn.Module, *, strict: bool | None = None) -> list[Weight]:
    """Return every parameter with its role, in the model's order, a tied head once (as the embedding).

    Args:
        model: plain or wrapped by PEFT or `torch.compile`.
        strict: refuse a parameter without a known role instead of calling it `other`; `None` refuses for language models only.

    Raises:
        Mistake: naming the modules without a known role.
    """
    strict = is_language_model(model) if strict is None else strict
    modules = dict(model.named_modules())
    tied, sandwich = _tied_head(model), any(name.endswith("pre_feedforward_layernorm") for name in modules)
    last = [name for name, module in modules.items() if isinstance(module, nn.Linear)][-1:]
    heads, key_heads = _head_counts(model)
    found, unknown = [], []
    for name, parameter in model.named_parameters():
        holder, plain = name.rpartition(".")[0], _plain(name)
        role = _role(plain.rpartition(".")[0], sandwich)
        if role is None:
            role = "head" if [holder] == last else "norm" if _is_norm(modules[holder]) else "other"
            unknown.append(re.sub(r"\.\d+\.", ".*.", plain.rpartition(".")[0] or plain))
        lora = match.group(1) if (match := _LORA.search(name)) else ""
        layer = int(match.group(1)) if (match := LAYER.search(plain)) else None
        counted = {"key": key_heads, "value": key_heads, "query": heads, "qkv": heads, "output": heads}.get(role)
        kind = "bias" if name.endswith("bias") else "weight"
        axis = 1 if kind == "weight" and not lora and _is_transposed(modules[holder]) else 0
        found.append(Weight(name, role, layer, counted, axis, kind, parameter is tied and role == "embedding", lora))
    if strict and unknown:
        listed = ", ".join(sorted(set(unknown))[:8])
        remedy = "use a model of a known family (Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX, Phi), or name its modules yourself"
        raise Mistake(type(unwrapped(model)).__name__, f"no role is known for {listed}", remedy)
    return found


def pick(
    model: nn.Module,
    roles: str | Collection[str],
    *,
    layers: Sequence[int] | None = None,
    kind: str | None = None,
    strict: bool | None = None,
) -> list[Weight]:
    """Return the weights that play one of the roles, in some layers (all by default), of one kind (both by default).

    Raises:
        Mistake: an unknown role, or a layer that the model lacks.
    """
    wanted = {roles} if isinstance(roles, str) else set(roles)
    stranger = next((role for role in sorted(wanted) if role not in ROLES), None)
    if stranger is not None:
        raise Mistake("roles", f"unknown role '{stranger}'", nearest(stranger, ROLES))
    weights = weights_by_role(model, strict=strict)
    depth = 1 + max((weight.layer for weight in weights if weight.layer is not None), default=-1)
    beyond = next((layer for layer in layers or () if not 0 <= layer < depth), None)
    if beyond is not None:
        raise Mistake("layers", f"there is no layer {beyond}", f"the model has layers 0 to {depth - 1}")
    return [
        weight
        for weight in weights
        if weight.role in wanted and (layers is None or weight.layer in layers) and (kind is None or weight.kind == kind)
    ]


def blocks(model: nn.Module) -> list[str]:
    """Return the names of the model's blocks, in their order; their outputs are the hidden states.

    Raises:
        Mistake: the model has none that are known.
    """
    found: dict[int, str] = {}
    for name, _ in model.named_parameters():
        match = LAYER.search(name)
        if match:
            found.setdefault(int(match[1]), name[: match.end() - 1])
    if not found:
        raise Mistake(type(unwrapped(model)).__name__, "no blocks are known", "use a transformer, or name a module yourself")
    return [found[number] for number in sorted(found)]


def head_slice(model: nn.Module, weight: Weight, head: int, part: str | None = None) -> tuple[slice, ...]:
    """Return the index of one attention head in a parameter: `parameter[head_slice(...)]`, a view.

    Args:
        model: that `weight` comes from.
        weight: of role query, key, value, qkv or output. The head's part is outputs in the first four, inputs in the last.
        head: number of the head among the part's own: with grouped queries there are fewer key and value heads (see `key_head`).
        part: query, key or value in a fused matrix; may stay away elsewhere.

    Raises:
        Mistake: the weight has no such part or head.
    """
    parameter = _parameter(model, weight)
    part = part or weight.role
    allowed = ("query", "key", "value") if weight.role == "qkv" else (weight.role,)
    if weight.role not in ATTENTION or part not in allowed:
        raise Mistake(weight.name, f"a weight of role '{weight.role}' has no part '{part}' by heads", f"parts are {', '.join(allowed)}")
    sideways = weight.role == "output"
    if (sideways and (weight.kind == "bias" or weight.lora == "B")) or (not sideways and weight.lora == "A"):
        raise Mistake(weight.name, "is not divided among heads", "take the matrix that is")
    heads, key_heads = _head_counts(model)
    assert heads is not None
    assert key_heads is not None
    own = key_heads if part in ("key", "value") else heads
    if not 0 <= head < own:
        raise Mistake(weight.name, f"there is no {part} head {head}", f"it has heads 0 to {own - 1}")
    axis = 1 - weight.axis if sideways else weight.axis
    size = parameter.shape[axis] // (heads + 2 * key_heads if weight.role == "qkv" else own)  # width of one head
    start = size * head
    if weight.role == "qkv":
        block = allowed.index(part)
        start = size * (3 * head + block) if _is_interleaved(weight) else size * (head + (0, heads, heads + key_heads)[block])
    return tuple(slice(start, start + size) if dimension == axis else slice(None) for dimension in range(parameter.ndim))


def key_head(model: nn.Module, head: int) -> int:
    """Return the key (and value) head that a query head attends with: itself without grouped queries."""
    heads, key_heads = _head_counts(model)
    if heads is None or key_heads is None or not 0 <= head < heads:
        raise Mistake(type(unwrapped(model)).__name__, f"there is no query head {head}", f"it has {heads or 0} heads")
    return head // (heads // key_heads)


def part_rows(model: nn.Module, weight: Weight, part: str) -> Tensor:
    """Return the outputs (along `weight.axis`) that one part has in a fused matrix: query, key, value of `qkv`; gate, up of `gate_up`.

    A weight that is that part as a whole gives all its outputs. Shape (rows of the part,), int64.

    Raises:
        Mistake: the weight has no such part.
    """
    outputs = _parameter(model, weight).shape[weight.axis]
    rows = torch.arange(outputs)
    if weight.role == part:
        return rows
    if weight.role == "gate_up" and part in ("gate", "up"):
        return rows.chunk(2)[part == "up"]
    own = _head_counts(model)[part != "query"] or 0
    return torch.cat([rows[head_slice(model, weight, head, part)[weight.axis]] for head in range(own)])


def _parameter(model: nn.Module, weight: Weight) -> nn.Parameter:
    return model.get_parameter(weight.name)


def _plain(name: str) -> str:
    """Return a parameter's name without what PEFT, `torch.compile` and data parallel add to it."""
    return _WRAPPERS.sub("", _WRAPPERS.sub("", _LORA.sub("", name)))


def _role(module: str, sandwich: bool) -> str | None:
    if sandwich and module.endswith("post_attention_layernorm"):
        return "attention_post_norm"  # Gemma 2 norms what attention gives, where others norm what the MLP takes
    return next((role for pattern, role in _RULES if pattern.search(module)), None)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_interleaved(weight: Weight) -> bool:
    return "query_key_value" in weight.name


def _tied_head(model: nn.Module) -> Any:
    core = unwrapped(model)
    head = core.get_output_embeddings() if is_language_model(core) else None  # type: ignore[operator]
    return None if head is None else head.weight


def _head_counts(model: nn.Module) -> tuple[int | None, int | None]:
    """Return the numbers of query heads and of key heads, `None` for a model without them."""
    core = unwrapped(model)
    if not is_language_model(core):
        return None, None
    config = core.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = getattr(config, "num_attention_heads", None)
    return heads, getattr(config, "num_key_value_heads", None) or heads
