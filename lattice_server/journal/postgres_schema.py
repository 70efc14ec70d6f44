"""Owns the tables in PostgreSQL and how older ones become them. Rule: a migration that was released never changes.

Names are compared byte by byte, as in SQLite, independently of the collation of the database.
"""

from lattice_server.engine.recording.journal_port import JournalVersionError
from lattice_server.journal.database import Database
from lattice_server.journal.failpoints import failpoint

FIRST = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BIGINT NOT NULL);
INSERT INTO meta (key, value) VALUES ('version', 0), ('epoch', 0), ('last_run', 0), ('last_workflow', 0);

CREATE TABLE runs (
    number BIGINT PRIMARY KEY,
    tenant TEXT COLLATE "C" NOT NULL,
    run_id TEXT COLLATE "C" NOT NULL,
    accepted_s DOUBLE PRECISION NOT NULL,
    ended_s DOUBLE PRECISION,
    unread SMALLINT NOT NULL DEFAULT 1,
    sequence BIGINT NOT NULL DEFAULT 0,
    kept_bytes BIGINT NOT NULL,
    fingerprint TEXT NOT NULL,
    request_id TEXT NOT NULL,
    summary BYTEA,
    settings BYTEA NOT NULL
);
CREATE INDEX runs_by_id ON runs (tenant, run_id, number);
CREATE INDEX runs_live ON runs (number) WHERE ended_s IS NULL;
CREATE INDEX runs_ended ON runs (tenant, number) WHERE ended_s IS NOT NULL;
CREATE INDEX runs_in_order_of_deletion ON runs (tenant, unread, number) WHERE ended_s IS NOT NULL;
CREATE INDEX runs_by_age ON runs (ended_s) WHERE ended_s IS NOT NULL;

CREATE TABLE definitions (
    run BIGINT NOT NULL,
    part BIGINT NOT NULL,
    size BIGINT NOT NULL,
    cell BYTEA NOT NULL,
    PRIMARY KEY (run, part)
);

CREATE TABLE events (
    run BIGINT NOT NULL,
    sequence BIGINT NOT NULL,
    size BIGINT NOT NULL,
    body BYTEA NOT NULL,
    replay BYTEA NOT NULL,
    PRIMARY KEY (run, sequence)
);

CREATE TABLE workflows (
    number BIGINT PRIMARY KEY,
    tenant TEXT NOT NULL,
    workflow_id TEXT NOT NULL,
    revision BIGINT NOT NULL,
    stored_s DOUBLE PRECISION NOT NULL,
    fingerprint TEXT NOT NULL,
    definition BYTEA NOT NULL
);

CREATE TABLE code (digest TEXT COLLATE "C" PRIMARY KEY, cell BYTEA NOT NULL);

CREATE TABLE uses ("user" TEXT COLLATE "C" NOT NULL, name TEXT COLLATE "C" NOT NULL, PRIMARY KEY ("user", name));
CREATE INDEX uses_by_name ON uses (name);

CREATE TABLE doomed (run BIGINT PRIMARY KEY);
"""

MIGRATIONS = (FIRST,)


def migrate(database: Database) -> None:
    """Bring the tables in the current schema up to date. Raises JournalVersionError."""
    version = 0
    if database.execute("SELECT 1 FROM information_schema.tables WHERE table_schema = current_schema() LIMIT 1"):
        if not database.execute("SELECT to_regclass('meta')")[0][0]:
            raise JournalVersionError("the schema has tables and no journal of Lattice")
        ((version,),) = database.execute("SELECT value FROM meta WHERE key = 'version'")
    if version > len(MIGRATIONS):
        text = f"the journal has version {version}, and this server knows {len(MIGRATIONS)}: a newer server wrote it"
        raise JournalVersionError(text)
    for number, migration in enumerate(MIGRATIONS[version:], version + 1):
        failpoint("open.before_migrate")
        with database.transaction():
            for statement in filter(str.strip, migration.split(";\n")):
                database.execute(statement)
            database.execute("UPDATE meta SET value = ? WHERE key = 'version'", (number,))
            failpoint("open.before_migrated")
