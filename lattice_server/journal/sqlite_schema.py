"""Owns the tables in SQLite and how older ones become them. Rule: a migration that was released never changes.

`user_version` counts the migrations that were made. A change of the tables is one more string at the end of
`MIGRATIONS`, and one more fixture file in the tests.
"""

from lattice_server.engine.recording.journal_port import JournalVersionError
from lattice_server.journal.database import Database
from lattice_server.journal.failpoints import failpoint

APPLICATION_ID = 0x4C415454  # LATT

FIRST = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO meta (key, value) VALUES ('epoch', 0), ('last_run', 0), ('last_workflow', 0);

-- Small columns first: SQLite reads a row from its beginning.
CREATE TABLE runs (
    number INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    run_id TEXT NOT NULL,
    accepted_s REAL NOT NULL,
    ended_s REAL,
    unread INTEGER NOT NULL DEFAULT 1,
    sequence INTEGER NOT NULL DEFAULT 0,
    kept_bytes INTEGER NOT NULL,
    fingerprint TEXT NOT NULL,
    request_id TEXT NOT NULL,
    summary BLOB,
    settings BLOB NOT NULL
) STRICT;
CREATE INDEX runs_by_id ON runs (tenant, run_id, number);
CREATE INDEX runs_live ON runs (number) WHERE ended_s IS NULL;
CREATE INDEX runs_ended ON runs (tenant, number) WHERE ended_s IS NOT NULL;
CREATE INDEX runs_in_order_of_deletion ON runs (tenant, unread, number) WHERE ended_s IS NOT NULL;
CREATE INDEX runs_by_age ON runs (ended_s) WHERE ended_s IS NOT NULL;

CREATE TABLE definitions (
    run INTEGER NOT NULL,
    part INTEGER NOT NULL,
    size INTEGER NOT NULL,
    cell BLOB NOT NULL,
    PRIMARY KEY (run, part)
) STRICT, WITHOUT ROWID;

CREATE TABLE events (
    run INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    size INTEGER NOT NULL,
    body BLOB NOT NULL,
    replay BLOB NOT NULL,
    PRIMARY KEY (run, sequence)
) STRICT, WITHOUT ROWID;

CREATE TABLE workflows (
    number INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    workflow_id TEXT NOT NULL,
    revision INTEGER NOT NULL,
    stored_s REAL NOT NULL,
    fingerprint TEXT NOT NULL,
    definition BLOB NOT NULL
) STRICT;

CREATE TABLE code (digest TEXT PRIMARY KEY, cell BLOB NOT NULL) STRICT, WITHOUT ROWID;

CREATE TABLE uses ("user" TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY ("user", name)) STRICT, WITHOUT ROWID;
CREATE INDEX uses_by_name ON uses (name);

-- Runs whose other rows are still to be deleted.
CREATE TABLE doomed (run INTEGER PRIMARY KEY) STRICT;
"""

MIGRATIONS = (FIRST,)


def migrate(database: Database) -> None:
    """Bring the tables up to date. Raises JournalVersionError."""
    ((version,),) = database.execute("PRAGMA user_version")
    ((application,),) = database.execute("PRAGMA application_id")
    if version > len(MIGRATIONS):
        text = f"the journal has version {version}, and this server knows {len(MIGRATIONS)}: a newer server wrote it"
        raise JournalVersionError(text)
    if application != APPLICATION_ID and database.execute("SELECT 1 FROM sqlite_schema LIMIT 1"):
        raise JournalVersionError("the file is no journal of Lattice")
    for number, migration in enumerate(MIGRATIONS[version:], version + 1):
        failpoint("open.before_migrate")
        with database.transaction():
            for statement in filter(str.strip, migration.split(";\n")):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {number}")
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            failpoint("open.before_migrated")
