"""Load a model from a folder, the hub, a factory or the desk, and save it so that it loads again bit for bit.

| spec | what it is |
|------|------------|
| `path/to/folder` | weights in Hugging Face form, a PEFT adapter, or a plain module that `save_model` wrote |
| `owner/name` | the same on the hub (or in its cache) |
| `config:path` | fresh weights for a configuration (its folder or its JSON file), drawn from the seed |
| `desk:name` | one of the small desk models |
| `module:function` | a factory that returns an `nn.Module`, or it and its processor; a parameter called `seed` gets the seed |
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.models.forward import fresh_weights, is_language_model, unwrapped, vocabulary
from remanence.storage import digest_tensors, whole_folder, write_text

WEIGHTS, FACTORY, NOTES, BASE = "model.safetensors", "factory.json", "remanence.json", "base"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass
class Loaded:
    """A model ready to use, its tokenizer or image processor (`None` where there is none), where it came from, and what loading changed."""

    model: nn.Module
    processor: Any
    spec: str
    notes: tuple[str, ...] = ()


def load_model(
    spec: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Loaded:
    """Load what `spec` names (see the table of this module) in evaluation mode; the global generator is left as it was.

    Args:
        spec: folder, hub id, `config:path`, `desk:name` or `module:function`.
        dtype: of the weights, as torch or by name; `None` keeps the saved one.
        trust_remote_code: run Python that comes with the weights.
        device: where to put the model; `None` leaves it on the CPU.
        seed: for weights that are drawn rather than read.

    Raises:
        Mistake: nothing is there, or it is not a model of a known kind, or its weights, configuration and tokenizer do not fit together.
    """
    place, wanted = str(spec), _dtype(dtype)
    with fresh_weights(seed), _quiet():
        if place.startswith("desk:"):
            loaded = _from_desk(place, seed)
        elif place.startswith("config:"):
            loaded = _from_config(place, wanted, trust_remote_code)
        elif Path(place).is_dir():
            loaded = _from_folder(Path(place), wanted, trust_remote_code)
        elif _FACTORY.fullmatch(place):
            loaded = _from_factory(place, seed)
        elif _looks_like_path(place):
            raise _no_folder(Path(place))
        else:
            loaded = _pretrained(place, wanted, trust_remote_code)
    loaded.spec = place
    if wanted is not None:
        for _, tensor in _distinct(loaded.model):  # not .to(dtype), which would round the rotary frequencies too
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(wanted)
    _aligned(loaded.model)
    loaded.model.to(device=device)
    loaded.model.eval()
    return loaded


def save_model(
    model: nn.Module,
    processor: Any,
    folder: str | Path,
    notes: dict[str, Any] | None = None,
    *,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write model and processor to `folder`, whole or not at all, so that `load_model(folder)` gives the same bits.

    A Hugging Face model is written as its own `save_pretrained` does it, as safetensors. A PEFT model becomes an adapter folder with the
    model that it stands on in `base/`, for its weights may have been trained too. A plain module becomes `model.safetensors` and
    `factory.json`; one that no factory made loads only through `load_weights`. `notes` go to `remanence.json`. `state_dict` is what
    `training.checkpoint.model_state` gathered from a sharded model, whose own tensors are only this process's part.

    Raises:
        Mistake: the folder cannot be written.
    """
    folder = Path(folder).absolute()
    with whole_folder(folder) as temporary, _quiet():
        _write(_uncompiled(model), temporary, folder, state_dict)
        if processor is not None:
            processor.save_pretrained(str(temporary))
        write_text(temporary / NOTES, json.dumps({**(notes or {}), "processor": processor is not None}, indent=2, sort_keys=True) + "\n")


def load_weights(model: nn.Module, folder: str | Path) -> nn.Module:
    """Read the weights of a saved plain module into `model`, in place, and return it.

    Raises:
        Mistake: there are none, they are damaged, or their names or shapes are not the model's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS
    try:
        saved = load_file(path)
    except FileNotFoundError as error:
        raise Mistake(path, "does not exist", "name a folder that save_model wrote") from error
    except SafetensorError as error:
        raise _damaged(folder, error) from error
    own = dict(_distinct(model))
    misfits = [(name, own[name].shape, saved[name].shape) for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape]
    _refuse_misfits(str(folder), own.keys() - saved.keys(), misfits, saved.keys() - own.keys())
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
    return model


def weights_hash(model: nn.Module) -> str:
    """Return a SHA-256 over all parameters and buffers that are saved, tied ones once, under `torch.compile` the same. O(P)."""
    return digest_tensors(_distinct(_uncompiled(model)))


def parameter_count(model: nn.Module, *, trainable: bool = False) -> int:
    """Return P, the number of parameters (tied ones once), or of those that training moves."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad or not trainable)


# ---- where models come from ----


def _from_desk(spec: str, seed: int) -> Loaded:
    from remanence.models import desk_vision

    name = spec.removeprefix("desk:")
    if name in desk_vision.NAMES:
        return Loaded(desk_vision.build(name, seed), None, spec)
    try:
        desk: Any = importlib.import_module("remanence.models.desk")
    except ModuleNotFoundError as error:
        raise Mistake(spec, "no such desk model", nearest(name, desk_vision.NAMES)) from error
    return _as_loaded(spec, desk.build(name, seed))


def _from_config(spec: str, dtype: torch.dtype | None, trust: bool) -> Loaded:
    path = Path(spec.removeprefix("config:"))
    if not path.exists():
        raise _no_folder(path)
    config = _config(path, trust)
    auto = _auto_classes(str(path), config)[0]
    folder = path if path.is_dir() else path.parent
    model = auto.from_config(config, dtype=dtype or torch.float32, trust_remote_code=trust)
    if not _has_processor(folder):
        return Loaded(model, getattr(model, "processor", None), spec)  # that of a pre-trained part, where there is one
    processor, notes = _processor(folder, model, config, trust)
    return Loaded(model, processor, spec, notes)


def _from_folder(folder: Path, dtype: torch.dtype | None, trust: bool) -> Loaded:
    if (folder / "adapter_config.json").is_file():
        return _from_adapter(folder, dtype, trust)
    if (folder / FACTORY).is_file():
        return _from_saved_factory(folder)
    if not (folder / "config.json").is_file():
        raise Mistake(folder, "holds no config.json", "name the folder that save_model or save_pretrained wrote")
    names = [file.name for file in folder.iterdir()]
    if not any(name.endswith(".safetensors") for name in names):
        pickled = next((name for name in sorted(names) if name.endswith(_PICKLED)), None)
        if pickled is not None:
            raise Mistake(
                folder,
                f"its weights are pickled ({pickled}), which can run code when read",
                "save them as safetensors where you trust them",
            )
        raise Mistake(folder, "holds no weights (*.safetensors)", f"copy them there, or use 'config:{folder}' for fresh ones")
    return _pretrained(folder, dtype, trust)


def _pretrained(source: Path | str, dtype: torch.dtype | None, trust: bool) -> Loaded:
    """Read configuration, weights and processor of a folder or a hub id."""
    from safetensors import SafetensorError

    config = _config(source, trust)
    auto = _auto_classes(str(source), config)[0]
    try:
        # Sizes that do not match come back in `found` this way, instead of as an exception without a name.
        model, found = auto.from_pretrained(
            str(source),
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=trust,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except SafetensorError as error:
        raise _damaged(source, error) from error
    except OSError as error:
        raise Mistake(source, f"its weights cannot be read ({_first_line(error)})", "fetch or save it again, as safetensors") from error
    _refuse_misfits(str(source), found["missing_keys"], found["mismatched_keys"])
    unused = sorted(found["unexpected_keys"])
    notes = (f"{len(unused)} saved tensors have no place in the model, the first is {unused[0]}",) if unused else ()
    if isinstance(source, Path) and _saved_without_processor(source):
        return Loaded(model, None, str(source), notes)
    processor, more = _processor(source, model, config, trust)
    return Loaded(model, processor, str(source), notes + more)


def _from_adapter(folder: Path, dtype: torch.dtype | None, trust: bool) -> Loaded:
    """Load the base (its copy in `base/`, else what the adapter names) and the adapter on it, frozen as PEFT does."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (folder / "adapter_model.safetensors").is_file():
        raise Mistake(folder, "holds no adapter_model.safetensors", "save the adapter again, as safetensors")
    named = _json(folder / "adapter_config.json").get("base_model_name_or_path")
    origin = folder / BASE if (folder / BASE).is_dir() else named
    if not origin:
        raise Mistake(folder, "the adapter does not say which model it stands on", "set base_model_name_or_path in its adapter_config.json")
    base = load_model(str(origin), dtype=dtype, trust_remote_code=trust)
    try:
        model = PeftModel.from_pretrained(base.model, str(folder), is_trainable=True)
        _as_saved(model, folder / "adapter_model.safetensors")
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise Mistake(
            folder, f"the adapter does not fit its base '{origin}' ({_first_line(error)})", "name the base it was trained on"
        ) from error
    if not _has_processor(folder):
        return Loaded(model, base.processor, str(folder), base.notes)
    processor, notes = _processor(folder, model, unwrapped(model).config, trust)
    return Loaded(model, processor, str(folder), notes)


def _as_saved(model: nn.Module, path: Path) -> None:
    """Give an adapter the precision that it has in its file (PEFT reads half precision into float32)."""
    from safetensors import safe_open

    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with safe_open(str(path), framework="pt") as file:
        saved = {kinds.get(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    if len(saved) == 1 and None not in saved:
        for name, weight in model.named_parameters():
            if _without_adapter(name) is None:
                weight.data = weight.data.to(saved.copy().pop())


def _from_factory(spec: str, seed: int) -> Loaded:
    """Import the function (the working folder counts) and call it."""
    module_name, function_name = spec.split(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name, None)
        if not callable(function):
            raise Mistake(spec, f"the module has no function '{function_name}'", nearest(function_name, _functions(module)))
        made = function(seed=seed) if "seed" in inspect.signature(function).parameters else function()
    except ModuleNotFoundError as error:
        raise Mistake(spec, f"no module named '{error.name}'", "run from the folder that holds it, or install it") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    loaded = _as_loaded(spec, made)
    loaded.model.remanence_factory = spec  # type: ignore[assignment]
    return loaded


def _from_saved_factory(folder: Path) -> Loaded:
    spec = _json(folder / FACTORY).get("factory")
    if not isinstance(spec, str) or not _FACTORY.fullmatch(spec):
        raise Mistake(
            folder, "the module was not made by a factory", "build it yourself and read its weights with load_weights(model, folder)"
        )
    loaded = _from_factory(spec, 0)
    load_weights(loaded.model, folder)
    return loaded


def _as_loaded(spec: str, made: Any) -> Loaded:
    if isinstance(made, Loaded):
        return made
    model, processor = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise Mistake(spec, f"returned a {type(model).__name__}", "return an nn.Module, or it and its processor")
    return Loaded(model, processor, spec)


# ---- reading the parts ----


def _aligned(model: nn.Module) -> None:
    """Give weights that lie askew in a mapped file memory of their own.

    Kernels may add up in another order on askew memory, so that a resumed run would part from one that was never stopped.
    """
    for _, tensor in _distinct(model):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(path, f"is not a JSON file ({_first_line(error)})", "copy it again from where the model came from") from error
    if not isinstance(content, dict):
        raise Mistake(path, "is not a JSON object", "copy it again from where the model came from")
    return content


def _config(source: Path | str, trust: bool) -> Any:
    """Read a configuration from a folder, a JSON file or the hub."""
    from transformers import AutoConfig

    from remanence.models import desk_vision, ensemble, guarded

    for ours in (desk_vision, ensemble, guarded, importlib.import_module("remanence.memory.architectures")):
        ours.register()
    if isinstance(source, Path):
        _json(source / "config.json" if source.is_dir() else source)
    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=trust)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise Mistake(source, "the model brings its own Python code", "read that code, then set trust_remote_code: true") from error
        remedy = "update transformers, or use a model whose model_type it knows"
        raise Mistake(source, f"unknown architecture ({_first_line(error)})", remedy) from error
    except OSError as error:
        if isinstance(source, Path):
            raise Mistake(source, f"its configuration cannot be read ({_first_line(error)})", "copy it again") from error
        siblings = [entry.name for entry in Path.cwd().iterdir() if entry.is_dir()]
        close = nearest(source, siblings) if siblings else ""
        hint = f"; {close}" if close.startswith("did you mean") else ""
        remedy = f"check the name and the network, or name a local folder{hint}"
        raise Mistake(source, "is neither a folder here, nor in the hub's cache, nor within reach on the hub", remedy) from error


def _auto_classes(place: str, config: Any) -> tuple[Any, Any]:
    """Choose the Auto classes of the model and its processor by the configuration.

    Raises:
        Mistake: the architecture is neither a causal language model nor an image classifier.
    """
    from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    named = (config.architectures or [""])[0]
    custom = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING or "AutoModelForImageClassification" in custom:
        return AutoModelForImageClassification, AutoImageProcessor
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in custom:
        return AutoModelForCausalLM, AutoTokenizer
    what = named or f"model_type '{config.model_type}'"
    raise Mistake(place, f"{what} is neither a causal language model nor an image classifier", "choose a model of one of these kinds")


def _has_processor(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "preprocessor_config.json")
    return any((folder / name).is_file() for name in names)


def _saved_without_processor(folder: Path) -> bool:
    return (folder / NOTES).is_file() and _json(folder / NOTES).get("processor") is False


def _processor(source: Path | str, model: nn.Module, config: Any, trust: bool) -> tuple[Any, tuple[str, ...]]:
    """Read the tokenizer, with a padding token that exists, or the image processor where there is one.

    Raises:
        Mistake: a language model has no tokenizer, or one that does not fit.
    """
    auto = _auto_classes(str(source), config)[1]
    try:
        processor = auto.from_pretrained(str(source), trust_remote_code=trust)
    except (OSError, ValueError, TypeError, ImportError) as error:
        if not is_language_model(model):
            return None, ()
        raise Mistake(
            source, f"its tokenizer is absent or unreadable ({_first_line(error)})", "copy tokenizer.json beside the weights"
        ) from error
    if not is_language_model(model):
        return processor, ()
    if len(processor) > vocabulary(model):
        problem = f"its tokenizer knows {len(processor)} tokens, the model {vocabulary(model)}"
        raise Mistake(source, problem, "copy the tokenizer that belongs to the weights")
    if processor.pad_token is not None:
        return processor, ()
    if processor.eos_token is None:
        raise Mistake(source, "its tokenizer has neither a padding nor an end token", "set pad_token in its tokenizer_config.json")
    processor.pad_token = processor.eos_token
    return processor, (f"the tokenizer has no padding token, its end token {processor.eos_token!r} pads",)


def _refuse_misfits(place: str, missing: Iterable[str], misfits: Iterable[Any], unexpected: Iterable[str] = ()) -> None:
    """Raise a Mistake if weights and model differ; `misfits` holds (name, shape, other shape)."""
    missing, misfits, unexpected = sorted(missing), sorted(misfits, key=lambda triple: triple[0]), sorted(unexpected)
    remedy = "use the configuration that was saved with the weights"
    if missing:
        raise Mistake(place, f"{len(missing)} weights of the model are missing from the file, the first is {missing[0]}", remedy)
    if misfits:
        name, one, other = misfits[0]
        shapes = f"{tuple(one)} against {tuple(other)}"
        raise Mistake(place, f"{len(misfits)} weights have another shape than the model's, the first is {name}, {shapes}", remedy)
    if unexpected:
        raise Mistake(place, f"{len(unexpected)} saved weights have no place in the model, the first is {unexpected[0]}", remedy)


# ---- writing ----


def _write(model: nn.Module, folder: Path, final: Path, state: dict[str, Tensor] | None = None) -> None:
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import PreTrainedModel

    from remanence.training.processes import is_sharded

    if isinstance(model, PeftModel):
        base = model.get_base_model()
        _write_base(base, folder / BASE)
        adapters = model.peft_config.values()
        kept = [config.base_model_name_or_path for config in adapters]
        for config in adapters:
            config.base_model_name_or_path = str(final / BASE)
        try:
            model.save_pretrained(str(folder), save_embedding_layers=False)
        finally:
            for config, name in zip(adapters, kept):
                config.base_model_name_or_path = name
    elif isinstance(model, PreTrainedModel):
        model.save_pretrained(str(folder), state_dict=dict(state) if state and is_sharded(model) else None)  # it empties what it is given
    else:
        save_file(
            _own_memory(state.items() if state and is_sharded(model) else _distinct(model)), folder / WEIGHTS, metadata={"format": "pt"}
        )
        write_text(folder / FACTORY, json.dumps({"factory": getattr(model, "remanence_factory", None)}) + "\n")


def _write_base(base: nn.Module, folder: Path) -> None:
    """Write the model below an adapter under the names it has without one."""
    from safetensors.torch import save_file
    from transformers import PreTrainedModel

    folder.mkdir()
    state = {name: tensor for name, tensor in ((_without_adapter(name), tensor) for name, tensor in _distinct(base)) if name is not None}
    if isinstance(base, PreTrainedModel):
        config = copy.deepcopy(base.config)
        config.architectures, config.dtype = [type(base).__name__], base.dtype
        config.save_pretrained(str(folder))
        if base.can_generate():
            base.generation_config.save_pretrained(str(folder))
    else:
        write_text(folder / FACTORY, json.dumps({"factory": getattr(base, "remanence_factory", None)}) + "\n")
    save_file(_own_memory(state.items()), folder / WEIGHTS, metadata={"format": "pt"})
    write_text(folder / NOTES, json.dumps({"processor": False}) + "\n")


def _without_adapter(name: str) -> str | None:
    """Return the name that a tensor of an adapted module has in the plain one, `None` for a tensor of the adapter."""
    if ".modules_to_save." in name or re.search(r"(^|\.)(lora|ia3|hada|lokr|oft|boft|vera|ln_tuning)_", name):
        return None
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _own_memory(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named}  # safetensors refuses shared storage


def _distinct(model: nn.Module) -> list[tuple[str, Tensor]]:
    """List the saved parameters and buffers by name, tied ones once (under the first name)."""
    seen: set[int] = set()
    pairs = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # keep_vars hands out the parameters themselves, so tied ones are one object
            seen.add(id(tensor))
            pairs.append((name, tensor))
    return pairs


def _uncompiled(model: nn.Module) -> nn.Module:
    """Take off `torch.compile` and data-parallel wrappers, but not the adapter."""
    from torch._dynamo.eval_frame import OptimizedModule
    from torch.nn.parallel import DistributedDataParallel

    while isinstance(model, OptimizedModule | DistributedDataParallel):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


# ---- words ----


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    known |= {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if dtype not in known:
        raise Mistake("dtype", f"unknown '{dtype}'", nearest(dtype, known))
    return known[dtype]


def _looks_like_path(spec: str) -> bool:
    path = Path(spec)
    return not _HUB.fullmatch(spec) or (len(path.parts) == 2 and path.parent.is_dir()) or path.is_file()


def _no_folder(path: Path) -> Mistake:
    if path.is_file():
        return Mistake(path, "is a file", f"name its folder {path.absolute().parent}")
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    if not path.parent.is_dir():
        return Mistake(path, f"does not exist, nor does {path.parent}", "check the path")
    return Mistake(path, "does not exist", nearest(path.name, siblings) if siblings else f"{path.parent} holds no folders")


def _damaged(source: object, error: Exception) -> Mistake:
    return Mistake(source, f"its weights are damaged ({_first_line(error)})", "copy or fetch them again")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _functions(module: Any) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and load reports of transformers: what they would report is raised or noted here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
