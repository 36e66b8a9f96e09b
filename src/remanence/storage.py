"""Files that are whole or absent: atomic writes, and nested states as safetensors (nothing is ever unpickled)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from remanence.errors import Mistake

_STRUCTURE = "remanence.tree"


class Streamed(NamedTuple):
    """A tensor in a nested state that is never whole in memory: `pieces` yields its values in their order."""

    dtype: Any
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Any]]


def _sync(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it into place, on failure leave nothing.

    Raises:
        Mistake: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        _refuse(path, error)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _refuse(path: Path, error: Exception) -> None:
    """Raise the Mistake behind an error of the disk."""
    from safetensors import SafetensorError

    if isinstance(error, OSError | SafetensorError):  # the writer of safetensors wraps the system's errors in its own
        reason = getattr(error, "strerror", None) or error
        raise Mistake(path, f"cannot be written ({reason})", "free the disk or name another output") from error


def sweep(folder: str | Path, *, below: bool = False) -> None:
    """Remove what killed writers left in a folder that no one else writes to (or anywhere below it); put back a folder that was being replaced."""
    find = Path(folder).rglob if below else Path(folder).glob
    for old in list(find(".*.old")):
        place = old.with_name(old.name[1:].rsplit(".", 2)[0])
        if (old / "old").exists() and not place.exists():  # killed between the two renames
            os.replace(old / "old", place)
        shutil.rmtree(old, ignore_errors=True)
    for part in list(find(".*.part")):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success sync it and put it in place of `path`, on failure leave the old one.

    Raises:
        Mistake: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        temporary.chmod(0o755)
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder) / name)
            _sync(Path(folder))
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.replace(path, old / "old")  # two renames: a kill between them leaves both copies, `sweep` puts the old one back
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(old / "old", path)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        _refuse(path, error)
        raise
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _flatten(node: Any, place: str, tensors: dict[str, Any]) -> Any:
    import torch

    if isinstance(node, torch.Tensor):
        tensors[place] = node.detach().cpu().contiguous().clone()  # safetensors refuses shared storage
        return {"tensor": place}
    if isinstance(node, Streamed):
        tensors[place] = node
        return {"tensor": place}
    if isinstance(node, dict):
        return {"dict": [[key, _flatten(value, f"{place}/{number}", tensors)] for number, (key, value) in enumerate(node.items())]}
    if isinstance(node, list | tuple):
        kind = "list" if isinstance(node, list) else "tuple"
        return {kind: [_flatten(value, f"{place}/{number}", tensors) for number, value in enumerate(node)]}
    if node is None or isinstance(node, bool | int | float | str):
        return {"plain": node}
    raise TypeError(f"a state may hold tensors, dicts, lists and plain values, got {type(node).__name__} at {place}")


def _rebuild(node: dict[str, Any], tensors: dict[str, Any]) -> Any:
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _rebuild(item, tensors) for key, item in value}
    if kind in ("list", "tuple"):
        items = [_rebuild(item, tensors) for item in value]
        return items if kind == "list" else tuple(items)
    return value


def save_tree(path: str | Path, tree: Any) -> None:
    """Write a nested state (tensors, dicts, lists, numbers, strings) as one safetensors file, atomically.

    Dictionary keys may be strings or integers. The structure travels as JSON in the file's metadata. A tensor may be `Streamed`.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    metadata = {_STRUCTURE: json.dumps(_flatten(tree, "", tensors))}
    with whole_file(path) as temporary:
        if any(isinstance(tensor, Streamed) for tensor in tensors.values()):
            _save_streamed(tensors, temporary, metadata)
        else:
            save_file(tensors, temporary, metadata=metadata)


def _save_streamed(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file piece by piece: the length of the header, the header as JSON, the values one tensor after the other."""
    import torch

    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    word = {
        getattr(torch, kind): kind.upper().replace("BFLOAT", "BF").replace("FLOAT", "F").replace("UINT", "U").replace("INT", "I")
        for kind in kinds
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    order, end = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)), 0  # the widest first, so that all are aligned
    for name in order:
        begin, end = end, end + math.prod(tensors[name].shape) * tensors[name].dtype.itemsize
        header[name] = {"dtype": word[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with path.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for name in order:
            pieces = tensors[name].pieces() if isinstance(tensors[name], Streamed) else [tensors[name]]
            for piece in pieces:
                file.write(raw(piece))
        if file.tell() != 8 + len(words) + end:
            raise ValueError(f"a streamed tensor of {path.name} had other values than its shape says")


def raw(tensor: Any) -> Any:
    """Return the bytes of a tensor on the CPU, a numpy array, without a copy where they lie in order."""
    import torch

    flat = tensor.reshape(-1)
    if flat.stride(0) != 1:  # a single value keeps whatever stride it had
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy()


def load_tree(path: str | Path) -> Any:
    """Read what `save_tree` wrote, tensors on the CPU.

    Raises:
        Mistake: the file is missing, damaged, or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if _STRUCTURE not in metadata:
                raise Mistake(path, "is not a saved state of this product", "point to a folder that a run wrote")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _rebuild(json.loads(metadata[_STRUCTURE]), tensors)
    except FileNotFoundError as error:
        raise Mistake(path, "does not exist", "start the run without --resume") from error
    except OSError as error:
        raise Mistake(path, f"cannot be read ({error.strerror or error})", "check its permissions") from error
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Mistake(path, f"is damaged ({error})", "remove it and resume from the checkpoint before it") from error


def digest_tensors(named: Any) -> str:
    """Return a SHA-256 over names, dtypes, shapes and bytes of an iterable of (name, tensor), in sorted order."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a sharded parameter: every process calls
        plain = whole.detach().cpu().contiguous()
        total.update(f"{name}|{plain.dtype}|{tuple(plain.shape)}|".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return total.hexdigest()
