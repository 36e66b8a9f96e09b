"""The tables of a store, in the SQL that SQLite and PostgreSQL share.

| table         | one row per |
|---------------|-------------|
| about         | fact about the store: id, format, embedder, dim, precision, scrub |
| spaces        | tenant; `sealed` names its key, `version` grows with every change of its chunks |
| conversations | conversation of a space |
| messages      | turn; the only place where its text is kept, with its checksum |
| chunks        | piece `text[begins:ends]` of a message, with its vector; `words` counts those in the index |
| gists, history | summary that stands, summary that was put |
| facts, sources | statement, message that it was drawn from |
| audit         | action, chained by hashes |
| doomed        | key that is to be destroyed |

In a sealed space `text`, `meta` and the like are NULL, `sealed` holds them encrypted, and what must be looked up (a conversation's name, a person, a client's
key) is a keyed hash. Open to whoever reads the file remain: names of spaces, roles, times, turn numbers, sizes.
"""

FORMAT = 1

TABLES = """
CREATE TABLE about(name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE spaces(id {id}, name TEXT NOT NULL UNIQUE, sealed TEXT, version BIGINT NOT NULL);
CREATE TABLE conversations(id {id}, space BIGINT NOT NULL, name TEXT NOT NULL, sealed {blob}, UNIQUE(space, name));
CREATE TABLE messages(
  id {id}, space BIGINT NOT NULL, conversation BIGINT NOT NULL, turn BIGINT NOT NULL, role TEXT NOT NULL, text TEXT, person TEXT, meta TEXT, sealed {blob},
  at DOUBLE PRECISION NOT NULL, edited DOUBLE PRECISION, key TEXT, crc BIGINT, UNIQUE(conversation, turn), UNIQUE(space, key));
CREATE INDEX messages_of_person ON messages(space, person);
CREATE INDEX messages_of_time ON messages(space, at);
CREATE TABLE chunks(
  id {id}, message BIGINT NOT NULL, space BIGINT NOT NULL, conversation BIGINT NOT NULL, begins BIGINT NOT NULL, ends BIGINT NOT NULL,
  words BIGINT NOT NULL, last_retrieved BIGINT, vector {blob} NOT NULL);
CREATE INDEX chunks_of_message ON chunks(message);
CREATE INDEX chunks_of_space ON chunks(space, id, words);
CREATE INDEX chunks_of_conversation ON chunks(conversation, id);
CREATE TABLE gists(
  conversation BIGINT NOT NULL, kind TEXT NOT NULL, segment BIGINT NOT NULL, first BIGINT NOT NULL, last BIGINT NOT NULL, text TEXT, sealed {blob},
  rewrites BIGINT NOT NULL, PRIMARY KEY(conversation, kind, segment));
CREATE TABLE history(
  id {id}, conversation BIGINT NOT NULL, turn BIGINT NOT NULL, kind TEXT NOT NULL, segment BIGINT NOT NULL, first BIGINT NOT NULL, last BIGINT NOT NULL,
  text TEXT, sealed {blob}, rewrites BIGINT NOT NULL);
CREATE INDEX history_of_conversation ON history(conversation, id);
CREATE TABLE facts(
  id {id}, space BIGINT NOT NULL, conversation BIGINT, text TEXT, sealed {blob}, pinned BIGINT NOT NULL, at DOUBLE PRECISION NOT NULL);
CREATE INDEX facts_of_space ON facts(space, conversation);
CREATE TABLE sources(fact BIGINT NOT NULL, message BIGINT NOT NULL, PRIMARY KEY(fact, message));
CREATE INDEX sources_of_message ON sources(message);
CREATE TABLE audit(
  id BIGINT PRIMARY KEY, at DOUBLE PRECISION NOT NULL, action TEXT NOT NULL, detail TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TABLE doomed(key TEXT PRIMARY KEY)
"""


def tables(*, identity: str, blob: str) -> list[str]:
    """Return the statements that make the tables, in one dialect."""
    return [statement.strip() for statement in TABLES.format(id=identity, blob=blob).split(";")]
