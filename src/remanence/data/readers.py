"""Read rows from files: JSONL, JSON, Parquet, CSV, plain text, folders of texts or images, IDX, saved data sets, the Hugging Face hub.

JSONL, JSON, CSV, Parquet and text stream through batches into one Arrow file in the cache (`$XDG_CACHE_HOME/remanence/data`), named by
a digest of the content, and are memory-mapped from there: a file larger than RAM is fine, and a second read costs the digest only
(about 1 s/GB).
Every refusal names the file and, where there is one, the line or the byte.
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import csv
import difflib
import gzip
import hashlib
import itertools
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from remanence.data.digits import image_rows
from remanence.errors import Mistake, nearest
from remanence.storage import whole_file
from remanence.stream import COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    Batch = tuple[int, pa.Table]  # number of the first line, rows

FORMAT = 1  # raise it when the same file shall give other rows: the cache starts anew
BATCH = 10_000  # rows
TEXTS = (".txt", ".md")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
BOM = b"\xef\xbb\xbf"
MIXED = "let a column hold one type in every line"
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_rows(path: str | Path, *, kind: str, columns: dict[str, str] | None = None, place: str | None = None) -> Dataset:
    """Read `path` as rows of `kind`.

    | path | rows |
    |---|---|
    | `.jsonl`, `.json` | one per line; a `.json` file may also be one list of objects |
    | `.parquet`, `.csv` | one per row; CSV cells are text, but `label` is a whole number and `features` a JSON list |
    | `.txt`, `.md` | one `text` per paragraph (blank lines part them) |
    | folder of texts | paragraphs of all files in the order of their names, with a column `file` |
    | folder of folders of images | `image`, `label`: one class per folder, in the order of their names |
    | IDX images, or a folder with one IDX pair | `features` float32 (H, W) in [0, 1], `label`; plain or `.gz` |
    | folder of `Dataset.save_to_disk` | as saved |
    | `hub:name`, `hub:name:split`, `hub:name:config:split` | as on the hub; the split is `train` unless named |

    Args:
        path: file, folder, or hub name.
        kind: text | qa | chat | classes | images; its columns must be there, whole and of the right type.
        columns: our name -> the file's name (`{"question": "prompt"}`); a column that already bears our name gives way.
        place: what to call it in an error, besides the path.

    Raises:
        Mistake: anything that is wrong with the file, with its place and a remedy.
    """
    if kind not in COLUMNS:
        raise Mistake(place or path, f"unknown kind '{kind}'", nearest(kind, COLUMNS))
    where = f"{place}: {path}" if place else str(path)
    rows = _from_hub(str(path), where) if str(path).startswith("hub:") else _from_disk(Path(path), where)
    rows = _rename(where, rows, columns or {})
    if Path(path).suffix.lower() == ".csv" and Path(path).expanduser().is_file():
        rows = _cells(where, rows, kind)
    return check_columns(where, rows, kind)


def check_columns(where: str, rows: Dataset, kind: str) -> Dataset:
    """Return `rows` if the columns of `kind` are present, whole and of the right type.

    Raises:
        Mistake: the set is empty; a column is missing, has holes or holds something else.
    """
    if len(rows) == 0:
        raise Mistake(where, "there are no rows", "check the path")
    present = ", ".join(rows.column_names)
    for name in COLUMNS[kind]:
        if name not in rows.column_names:
            raise Mistake(
                where,
                f"kind '{kind}' needs the column '{name}', present are {present}",
                f"say which one it is with columns: {{{name}: ...}}",
            )
        column = rows.data.column(name)
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise Mistake(where, f"row {row + 1} has no '{name}'", "fill it in or remove the row")
        _check_type(where, name, column.type, rows.features[name])
    if kind == "classes":
        _check_widths(where, rows.data.column("features"))
    return rows


def _check_type(where: str, name: str, found: pa.DataType, feature: object) -> None:
    import pyarrow as pa

    def is_list(kind: pa.DataType) -> bool:
        return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)

    def is_features(kind: pa.DataType) -> bool:
        kind = getattr(kind, "storage_type", kind)
        if not is_list(kind):
            return False
        while is_list(kind):
            kind = kind.value_type
        return pa.types.is_floating(kind) or pa.types.is_integer(kind)

    def is_messages(kind: pa.DataType) -> bool:
        return is_list(kind) and pa.types.is_struct(kind.value_type) and {"role", "content"} <= {field.name for field in kind.value_type}

    def is_text(kind: pa.DataType) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    tests: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
        "text": (is_text, "text"),
        "question": (is_text, "text"),
        "answer": (is_text, "text"),
        "messages": (is_messages, "a list of objects with role and content"),
        "features": (is_features, "lists of numbers"),
        "label": (pa.types.is_integer, "whole numbers"),
        "image": (lambda kind: type(feature).__name__ == "Image", "images"),
    }
    fits, wanted = tests[name]
    if not fits(found):
        raise Mistake(where, f"column '{name}' holds {found}, not {wanted}", "mend the column or name another one with columns")


def _check_widths(where: str, column: pa.ChunkedArray) -> None:
    """Refuse features of differing lengths (outermost axis)."""
    import pyarrow.compute as pc

    if hasattr(column.type, "storage_type"):
        return  # an array type fixes the shape
    lengths = pc.list_value_length(column).to_numpy()
    if pc.list_flatten(column).null_count:
        raise Mistake(where, "features have holes (null)", "fill them in or remove those rows")
    other = np.flatnonzero(lengths != lengths[0])
    if len(other):
        raise Mistake(
            where, f"row {other[0] + 1} has {lengths[other[0]]} features, row 1 has {lengths[0]}", "give every row the same number"
        )


def _rename(where: str, rows: Dataset, columns: dict[str, str]) -> Dataset:
    missing = next((theirs for theirs in columns.values() if theirs not in rows.column_names), None)
    if missing is not None:
        present = ", ".join(rows.column_names)
        raise Mistake(where, f"there is no column '{missing}', present are {present}", nearest(missing, rows.column_names))
    if len(set(columns.values())) < len(columns):
        raise Mistake(where, "columns names one column twice", "give every column one name")
    moved = {theirs: ours for ours, theirs in columns.items() if ours != theirs}
    replaced = [ours for ours in moved.values() if ours in rows.column_names and ours not in moved]
    rows = rows.remove_columns(replaced)
    return rows.rename_columns({name: moved.get(name, name) for name in rows.column_names}) if moved else rows


def _from_disk(path: Path, where: str) -> Dataset:
    path = path.expanduser()
    if not path.exists():
        raise Mistake(where, "does not exist", _nearest_file(path))
    if path.is_dir():
        return _from_folder(path, where)
    if path.stat().st_size == 0:
        raise Mistake(where, "the file is empty", "check that it was written completely")
    suffix = path.suffix.lower()
    if suffix in TEXTS:
        return _cached([path], where, "text", lambda: _text_batches([path], where, named=False))
    if suffix in TABLES:
        return _cached([path], where, suffix[1:], lambda: TABLES[suffix](path, where))
    if "idx" in path.name.lower():
        return _from_idx(path, where)
    raise Mistake(where, f"'{path.suffix or path.name}' is no known format", f"use {', '.join((*TABLES, *TEXTS))}, IDX, or a folder")


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    names = sorted(item.name for item in path.parent.iterdir() if not item.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"its folder holds {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "its folder is empty"


def _from_folder(path: Path, where: str) -> Dataset:
    from datasets import load_from_disk

    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(item.name for item in path.iterdir() if item.is_dir()))
        raise Mistake(where, "is a saved set of several splits", f"name one of its folders: {splits}")
    if (path / "state.json").exists():
        try:
            return load_from_disk(str(path))
        except Exception as error:  # whatever the library meets in a damaged folder
            raise Mistake(where, f"is a saved set that cannot be loaded ({_first_line(error)})", "save it again") from error
    files = sorted(item for item in path.iterdir() if item.is_file() and item.stat().st_size)
    pictures = [file for file in files if "idx3" in file.name]
    if pictures:
        if len(pictures) > 1:
            raise Mistake(where, "holds several IDX image files", f"name one: {', '.join(file.name for file in pictures)}")
        return _from_idx(pictures[0], where)
    texts = [file for file in files if file.suffix.lower() in TEXTS]
    if texts:
        return _cached(texts, where, "texts", lambda: _text_batches(texts, where, named=True))
    classes = {
        folder.name: [str(file) for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGES]
        for folder in sorted(path.iterdir())
        if folder.is_dir()
    }
    classes = {name: images for name, images in classes.items() if images}
    if classes:
        return _from_images(classes, where)
    tables = [file.name for file in files if file.suffix.lower() in TABLES]
    if tables:
        raise Mistake(where, "is a folder of tables", f"name one: {', '.join(tables[:8])}")
    raise Mistake(where, "holds no text files, no folders of images, no IDX files and no saved set", "point to another folder")


def _from_hub(name: str, where: str) -> Dataset:
    from datasets import load_dataset

    source, *rest = name.removeprefix("hub:").split(":")
    if not source or len(rest) > 2:
        raise Mistake(where, "is no hub name", "write hub:name, hub:name:split or hub:name:config:split")
    split, config = (rest[-1] if rest else "train"), (rest[0] if len(rest) == 2 else None)
    try:
        return load_dataset(source, config, split=split)
    except Exception as error:  # the hub client raises a dozen kinds: no network, no such name, no such split
        raise Mistake(
            where, f"cannot be loaded ({_first_line(error)})", "check the name, the config, the split and the connection"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# Streaming: batches of (number of the first line, table), written to one Arrow file and mapped from there.


def cache_folder() -> Path:
    """Return the folder of the files read before: `$XDG_CACHE_HOME/remanence/data`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remanence" / "data"


def _cached(paths: list[Path], where: str, reader: str, batches: Callable[[], Iterator[Batch]]) -> Dataset:
    from datasets import Dataset

    total = hashlib.blake2b(digest_size=16)
    try:
        for path in paths:
            total.update(path.name.encode() if len(paths) > 1 else b"")
            with path.open("rb") as handle:
                total.update(hashlib.file_digest(handle, "blake2b").digest())
    except OSError as error:
        raise Mistake(where, f"cannot be read ({error.strerror or error})", "check its permissions") from error
    kept = cache_folder() / f"{reader}-{FORMAT}-{total.hexdigest()}.arrow"
    if not kept.exists():
        with whole_file(kept) as temporary:
            _write(temporary, batches(), where)
    try:
        return Dataset.from_file(str(kept))
    except (ValueError, KeyError, NotImplementedError) as error:
        raise Mistake(
            where, f"has a column of a type that rows cannot hold ({_first_line(error)})", "remove or convert that column"
        ) from error


def _write(target: Path, batches: Iterator[Batch], where: str) -> None:
    """Write the batches as one Arrow stream; where a later batch widens the schema, earlier ones are written again with it."""
    import pyarrow as pa

    schema: pa.Schema | None = None
    parts: list[Path] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=".parts.")))
        writer = None
        for line, table in batches:
            wider = table.schema if schema is None else _unify(schema, table.schema, where, line)
            if writer is None or schema is None or not wider.equals(schema):
                if writer is not None:
                    writer.close()
                schema = wider
                parts.append(folder / str(len(parts)))
                writer = pa.ipc.new_stream(str(parts[-1]), schema)
            writer.write_table(_fit(table, schema))
        if writer is None or schema is None:
            raise Mistake(where, "there are no rows", "check that the file was written completely")
        writer.close()
        if len(parts) == 1:
            os.replace(parts[0], target)
            return
        with pa.ipc.new_stream(str(target), schema) as whole:
            for part in parts:
                with pa.memory_map(str(part)) as mapped, pa.ipc.open_stream(mapped) as stream:
                    for batch in stream:
                        whole.write_table(_fit(pa.Table.from_batches([batch]), schema))


def _unify(schema: pa.Schema, other: pa.Schema, where: str, line: int) -> pa.Schema:
    import pyarrow as pa

    try:
        return pa.unify_schemas([schema, other], promote_options="permissive")
    except pa.ArrowException as error:
        for name in other.names:
            if name in schema.names:
                try:
                    pa.unify_schemas([pa.schema([schema.field(name)]), pa.schema([other.field(name)])], promote_options="permissive")
                except pa.ArrowException:
                    held, holds = schema.field(name).type, other.field(name).type
                    raise Mistake(f"{where}:{line}", f"from here on '{name}' holds {holds}, above it holds {held}", MIXED) from error
        raise


def _fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return `table` with the columns and types of `schema`; what it lacks is null."""
    import pyarrow as pa

    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
            continue
        column = table[field.name]
        if not column.type.equals(field.type):
            try:
                column = column.cast(field.type)
            except pa.ArrowException:  # objects whose keys stand in another order
                column = pa.array(column.to_pylist(), type=field.type)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def _batched(rows: Iterable[Any]) -> Iterator[list[Any]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, BATCH)):
        yield batch


def _json_batches(path: Path, where: str) -> Iterator[Batch]:
    for batch in _batched(_json_rows(path, where)):
        yield batch[0][0], _json_table(batch, where)


def _json_rows(path: Path, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, object) of a JSONL file, or (number, object) of a JSON list, which is read whole."""
    with path.open("rb") as handle:
        if path.suffix.lower() == ".json" and handle.read(1024).removeprefix(BOM).lstrip().startswith(b"["):
            handle.seek(0)
            for number, row in enumerate(_parse(handle.read(), where, 1, 0), start=1):
                if not isinstance(row, dict):
                    raise Mistake(where, f"item {number} is {type(row).__name__}, not an object", "write one object per row")
                yield number, row
            return
        handle.seek(0)
        offset = 0
        for line, raw in enumerate(handle, start=1):
            if raw.strip() and raw != BOM:
                row = _parse(raw.rstrip(), where, line, offset)
                if not isinstance(row, dict):
                    raise Mistake(f"{where}:{line}", f"is {type(row).__name__}, not an object", "write one JSON object per line")
                yield line, row
            offset += len(raw)


def _parse(raw: bytes, where: str, line: int, offset: int) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig" if offset == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise Mistake(f"{where}:{line}", f"byte {offset + error.start} is not UTF-8", "save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise Mistake(
            f"{where}:{line + error.lineno - 1}", f"is not JSON ({error.msg} at column {error.colno})", "mend or remove the line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{where}:{line}", f"is not JSON that can be read ({_first_line(error)})", "mend or remove the line") from error


def _json_table(rows: list[tuple[int, dict[str, Any]]], where: str) -> pa.Table:
    import pyarrow as pa

    names = dict.fromkeys(itertools.chain.from_iterable(row for _, row in rows))
    columns = {}
    for name in names:
        values = [row.get(name) for _, row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, ValueError, OverflowError, TypeError) as error:
            # the shortest prefix that fails ends in the culprit; failing is monotone, so bisect
            fails = bisect.bisect_left(range(1, len(values)), True, key=lambda count: not _is_column(values[:count]))
            raise Mistake(f"{where}:{rows[fails][0]}", f"'{name}' does not fit the lines above ({_first_line(error)})", MIXED) from error
    return pa.table(columns) if columns else pa.table({"": pa.nulls(len(rows))})


def _is_column(values: list[Any]) -> bool:
    import pyarrow as pa

    try:
        pa.array(values)
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        return False
    return True


def _check_utf8(path: Path, where: str) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with path.open("rb") as handle:
        for chunk in itertools.chain(iter(lambda: handle.read(1 << 20), b""), [b""]):
            held = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise Mistake(where, f"byte {offset - held + error.start} is not UTF-8", "save the file as UTF-8") from error
            offset += len(chunk)


def _text_batches(paths: list[Path], where: str, *, named: bool) -> Iterator[Batch]:
    import pyarrow as pa

    for path in paths:
        _check_utf8(path, str(path) if named else where)
        with path.open(encoding="utf-8-sig") as handle:
            groups = itertools.groupby(handle, key=lambda line: not line.isspace())
            paragraphs = ("".join(lines).rstrip() for written, lines in groups if written)
            for batch in _batched(paragraphs):
                names = {"file": pa.array(np.full(len(batch), path.name))} if named else {}
                yield 1, pa.table({**names, "text": pa.array(batch, pa.string())})


def _csv_batches(path: Path, where: str) -> Iterator[Batch]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    _check_utf8(path, where)
    with path.open(encoding="utf-8-sig", newline="") as handle:
        try:
            names = next(csv.reader(handle), [])
        except csv.Error as error:
            raise Mistake(where, f"has no readable header ({error})", "mend the first line") from error
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Mistake(where, f"two columns are called '{twice}'", "give every column its own name")
    try:
        stream = arrow_csv.open_csv(
            path,
            read_options=arrow_csv.ReadOptions(block_size=1 << 24, use_threads=False),  # one thread: errors know their row
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )
        for batch in stream:
            if len(batch):
                yield 1, pa.Table.from_batches([batch])
    except pa.ArrowException as error:
        raise Mistake(
            where, f"is not a regular CSV file ({_first_line(error)})", "give every row the same cells and quote those with commas"
        ) from error


def _parquet_batches(path: Path, where: str) -> Iterator[Batch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                table = pa.Table.from_batches([batch], schema=batch.schema.with_metadata(file.schema_arrow.metadata))
                plain = [field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field for field in table.schema]
                yield 1, table.cast(pa.schema(plain, metadata=table.schema.metadata))
    except (pa.ArrowException, OSError) as error:
        raise Mistake(where, f"is no readable Parquet file ({_first_line(error)})", "write it again") from error


TABLES: dict[str, Callable[[Path, str], Iterator[Batch]]] = {
    ".jsonl": _json_batches,
    ".json": _json_batches,
    ".csv": _csv_batches,
    ".parquet": _parquet_batches,
}


def _cells(where: str, rows: Dataset, kind: str) -> Dataset:
    """Return CSV rows with `label` as whole numbers and `features` as lists of numbers, where the kind needs them."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset

    table = rows.data.table
    if "label" in COLUMNS[kind] and "label" in table.column_names:
        wrong = pc.invert(pc.match_substring_regex(table["label"], r"^\s*[+-]?\d{1,18}\s*$")).to_numpy()
        if wrong.any():
            row = int(wrong.argmax())
            raise Mistake(where, f"the label of row {row + 1} is '{table['label'][row]}', not a whole number", "number the classes from 0")
        labels = pc.ascii_trim_whitespace(table["label"])
        table = table.set_column(
            table.column_names.index("label"), "label", pc.replace_substring_regex(labels, r"^\+", "").cast(pa.int64())
        )
    if "features" in COLUMNS[kind] and "features" in table.column_names:
        values = [
            (row, _parse(text.encode(), f"{where}, features of row {row}", 1, 0))
            for row, text in enumerate(table["features"].to_pylist(), 1)
        ]
        features = _json_table([(row, {"features": value}) for row, value in values], where)
        table = table.set_column(table.column_names.index("features"), "features", features["features"])
    return Dataset(table)


# Images.


def _from_images(classes: dict[str, list[str]], where: str) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as pillow

    paths = list(itertools.chain.from_iterable(classes.values()))
    for path in paths:
        try:
            pillow.open(path).close()  # reads the header only
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            raise Mistake(path, f"is no readable image ({_first_line(error)})", "replace or remove it") from error
    labels = np.repeat(np.arange(len(classes)), [len(images) for images in classes.values()])
    features = Features({"image": Image(), "label": ClassLabel(names=list(classes))})
    return Dataset.from_dict({"image": paths, "label": labels}, features=features)


def _from_idx(path: Path, where: str) -> Dataset:
    names = dict.fromkeys([path.name.replace("images", "labels").replace("idx3", "idx1")])
    names |= dict.fromkeys([name.removesuffix(".gz") for name in names] + [name.removesuffix(".gz") + ".gz" for name in names])
    beside = next((path.with_name(name) for name in names if name != path.name and path.with_name(name).exists()), None)
    images = read_idx(path)
    if images.ndim != 3:
        raise Mistake(where, f"{path.name} has {images.ndim} axes, images have 3", "name the file of the images")
    if beside is None:
        raise Mistake(where, f"the labels of {path.name} are missing", f"put {next(iter(names))} beside it")
    labels = read_idx(beside)
    if labels.ndim != 1 or len(labels) != len(images):
        raise Mistake(
            where, f"{path.name} has {len(images)} images, {beside.name} has {len(labels)} labels", "take the two files from the same place"
        )
    scale = np.iinfo(images.dtype).max if np.issubdtype(images.dtype, np.integer) else 1
    return image_rows(images / np.float32(scale), labels)


def read_idx(path: str | Path) -> np.ndarray:
    """Return the array that an IDX file holds (LeCun's format of MNIST), plain or gzip, in the shape and type that its header tells.

    Raises:
        Mistake: it is no IDX file, is cut off or damaged.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            raw = handle.read()
    except (OSError, EOFError, zlib.error) as error:
        raise Mistake(path, f"cannot be read ({_first_line(error)})", "download it again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in IDX_TYPES or len(raw) < 4 + 4 * raw[3]:
        raise Mistake(path, "is no IDX file", "check what was downloaded")
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    dtype = np.dtype(IDX_TYPES[raw[2]])
    start = 4 + 4 * raw[3]
    wanted = math.prod(shape) * dtype.itemsize
    if len(raw) - start != wanted:
        raise Mistake(path, f"holds {len(raw) - start} bytes of data, its header promises {wanted}", "download it again")
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
