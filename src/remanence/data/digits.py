"""Give scikit-learn's 1,797 handwritten digits as rows of kind `classes`: real images on any machine, no download."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from remanence.errors import Mistake, nearest
from remanence.seeds import derive

if TYPE_CHECKING:
    from datasets import Dataset

PARTS = ("train", "test")


def digits(part: str = "train", classes: Iterable[int] | None = None) -> Dataset:
    """Return the digits of one part: `features` float32 (8, 8) in [0, 1], `label` int.

    The split is 80/20, stratified and always the same; labels keep their numbers when `classes` picks some.

    Raises:
        Mistake: an unknown part, or a class that is no digit.
    """
    if part not in PARTS:
        raise Mistake("digits", f"no part '{part}'", nearest(part, PARTS))
    images, labels, rows = _part(part)
    rows = rows[in_classes("digits", labels[rows], classes)]
    return image_rows(images[rows].reshape(-1, 8, 8) / 16, labels[rows])


@functools.cache
def _part(part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all images, all labels, and the numbers of the rows of one part; a recipe asks for them once per source."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    seed = derive("digits", "split") % 2**32
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    return images, labels, np.sort(parts[PARTS.index(part)])


def in_classes(place: str, labels: np.ndarray, classes: Iterable[int] | None) -> np.ndarray:
    """Return a mask of the labels (N,) that are among `classes`; all of them when it is `None`.

    Raises:
        Mistake: a class that no label has, or no class at all.
    """
    if classes is None:
        return np.ones(len(labels), dtype=bool)
    wanted, present = sorted(set(classes)), np.unique(labels).tolist()
    missing = [label for label in wanted if label not in present]
    if missing or not wanted:
        problem = f"class {missing[0]} does not occur" if missing else "classes is empty"
        raise Mistake(place, problem, f"choose among {', '.join(map(str, present))}")
    return np.isin(labels, wanted)


def image_rows(images: np.ndarray, labels: np.ndarray) -> Dataset:
    """Return rows of kind `classes` from grey images (N, H, W) in [0, 1] and labels (N,)."""
    import pyarrow as pa
    from datasets import Array2D, Dataset, Features, Value

    count, height, width = images.shape
    features = Features({"features": Array2D(shape=(height, width), dtype="float32"), "label": Value("int64")})
    kind = features.arrow_schema.field("features").type
    pixels = pa.array(np.ascontiguousarray(images, dtype=np.float32).ravel())  # nested by offsets: no Python lists
    lines = pa.ListArray.from_arrays(pa.array(np.arange(count * height + 1, dtype=np.int32) * width), pixels)
    grids = pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * height), lines)
    columns = [pa.ExtensionArray.from_storage(kind, grids), pa.array(labels.astype(np.int64))]
    return Dataset(pa.Table.from_arrays(columns, schema=features.arrow_schema))
