"""Which store stands behind a place: a folder is SQLite, `postgresql://...` a schema of a server (`?schema=NAME` chooses another than `remanence`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from remanence.errors import Mistake
from remanence.recall.protocols import Embedder, Retriever, Store

SERVER = ("postgresql://", "postgres://")


def open_store(place: str | Path, embedder: str | Embedder | None, write: bool) -> tuple[Store, Embedder]:
    """Open a store, or make one, and load what makes its vectors.

    Args:
        place: folder, or address of a PostgreSQL server.
        embedder: a name, or itself; `None`: the store's own, `sentence` for a new one.
        write: or only read.

    Raises:
        Mistake: another embedder than the store's, a second writer, a damaged or newer store, a server that cannot be reached.
    """
    from remanence.recall.embedders import load_embedder

    if embedder is None and (str(place).startswith(SERVER) or _made(Path(place))):
        store = _opened(place, {}, write)
        if store is not None:
            try:
                return store, load_embedder(store.embedder)
            except BaseException:
                store.close()
                raise
    made = load_embedder(embedder or "sentence") if embedder is None or isinstance(embedder, str) else embedder
    store = _opened(place, {"embedder": made.name, "dim": made.dim}, write)
    if store is None:
        raise Mistake(place, "is no store", "name the folder of one")
    return store, made


def own_retriever(store: Store, embedder: Embedder, retrieval: str) -> Retriever | None:
    """Return the retriever that a store brings along for a way of retrieval, if it has one: a server searches its vectors itself."""
    from remanence.recall.sqlite_store import SqliteStore

    if retrieval != "dense" or isinstance(store, SqliteStore):
        return None
    from remanence.recall.postgres_store import PostgresDense, PostgresStore

    return PostgresDense(store, embedder) if isinstance(store, PostgresStore) else None


def _made(folder: Path) -> bool:
    from remanence.recall.sqlite_store import FILE

    return (folder / FILE).is_file()


def _opened(place: str | Path, given: dict[str, Any], write: bool) -> Store | None:
    """Return the store, or `None` where there is none yet and its embedder was not given."""
    if not str(place).startswith(SERVER):
        from remanence.recall.sqlite_store import SqliteStore

        return SqliteStore(place, write=write, **given)
    import importlib.util

    if importlib.util.find_spec("psycopg") is None:
        raise Mistake("store", "a server's database needs a package that is not installed (psycopg)", "pip install 'remanence[postgres]'")
    from remanence.recall.postgres_store import PostgresStore, is_made

    parts = urlsplit(str(place))
    asked = parse_qsl(parts.query, keep_blank_values=True)
    schema = dict(asked).get("schema", "remanence")
    address = urlunsplit(parts._replace(query=urlencode([pair for pair in asked if pair[0] != "schema"])))
    if not given and not is_made(address, schema):
        return None
    return PostgresStore(address, schema=schema, write=write, **given)
