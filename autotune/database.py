"""The tuning database: one SQLite file of append-only records, every measurement kept with what it was measured on."""

from __future__ import annotations

import json
import sqlite3
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compiler.errors import UsageError

FORMAT = 1
#: written into the file's header: "this is a tuning database"
APPLICATION = 0x74636D74
_COLUMNS = "workload, template, schedule, target, hardware, threads, versions, seed, status, samples_us, default_us"
_TABLE = """create table records (id integer primary key autoincrement, at text default current_timestamp,
    workload text not null, template text not null, schedule text not null, target text not null, hardware text not null, threads integer not null,
    versions text not null, seed integer not null, status text not null, samples_us text not null, default_us text not null)"""


@dataclass(frozen=True)
class Record:
    """One schedule measured for one workload.

    schedule: as the template prints it. target: the manifest's name. hardware: the machine it was measured on. status: "measured" (verified, timed in a generation),
    "winner" (confirmed to be faster than the default), "slower" (tried against the default alone, not faster), "wrong" (another result than the default's) or
    "failed" (did not build or run). samples_us: all measurements; default_us: those of the default schedule, taken in turns with them.
    """

    workload: str
    template: str
    schedule: str
    target: str
    hardware: str
    threads: int
    versions: Mapping[str, str]
    seed: int
    status: str
    samples_us: tuple[float, ...] = ()
    default_us: tuple[float, ...] = ()

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)


class Database:
    """Records in the order they were added; nothing is ever changed or removed. Any number of processes may read and append."""

    def __init__(self, path: str | Path, *, create: bool = True):
        """Raises UsageError when the file is missing (and not to be created), unreadable or no tuning database."""
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise UsageError(f"{path}: no such tuning database; `tcompile tune` makes one")
        if not self.path.parent.is_dir():
            raise UsageError(f"{path}: its folder does not exist")
        try:
            self._connection = sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
            self._prepare()
        except sqlite3.Error as error:
            raise UsageError(f"{path} is not a tuning database: {error}") from error

    def _prepare(self) -> None:
        application, version = (self._connection.execute(f"pragma {name}").fetchone()[0] for name in ("application_id", "user_version"))
        tables = self._connection.execute("select count(*) from sqlite_master").fetchone()[0]
        if not tables:
            with self._transaction():
                self._connection.execute(_TABLE)
                self._connection.execute("create index by_workload on records (workload, hardware, threads)")
                self._connection.execute(f"pragma application_id = {APPLICATION}")
                self._connection.execute(f"pragma user_version = {FORMAT}")
        elif application != APPLICATION:
            raise UsageError(f"{self.path} is an SQLite file, but not a tuning database")
        elif version != FORMAT:
            raise UsageError(f"{self.path} has format {version}, this tcompile reads {FORMAT}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("begin immediate")
        try:
            yield
        except BaseException:
            self._connection.execute("rollback")
            raise
        self._connection.execute("commit")

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk when this returns."""
        values: list[Any] = [record.workload, record.template, record.schedule, record.target, record.hardware, record.threads]
        values += [json.dumps(dict(record.versions), sort_keys=True), record.seed, record.status]
        values += [json.dumps(record.samples_us), json.dumps(record.default_us)]
        self._connection.execute(f"insert into records ({_COLUMNS}) values ({', '.join('?' * len(values))})", values)

    def records(self, workload: str | None = None, *, hardware: str | None = None, threads: int | None = None) -> list[Record]:
        """The records of a workload, a machine, a number of threads (None: of all), oldest first."""
        conditions = [(name, value) for name, value in (("workload", workload), ("hardware", hardware), ("threads", threads)) if value is not None]
        where = " where " + " and ".join(f"{name} = ?" for name, _ in conditions) if conditions else ""
        rows = self._connection.execute(f"select {_COLUMNS} from records{where} order by id", [value for _, value in conditions])
        return [_record(row) for row in rows]

    def best(self, workload: str, *, hardware: str, threads: int) -> Record | None:
        """The record whose schedule beat the default by most; None when none did. Only winners count, and of each schedule the latest trial against the default."""
        tried = [record for record in self.records(workload, hardware=hardware, threads=threads) if record.status in ("winner", "slower")]
        latest = {(record.template, record.schedule): record for record in tried}
        able = [record for record in latest.values() if record.status == "winner" and record.default_us]
        return min(able, key=lambda record: record.median_us / statistics.median(record.default_us), default=None)

    def close(self) -> None:
        self._connection.close()


def _record(row: tuple[Any, ...]) -> Record:
    *texts, versions, seed, status, samples, default = row
    return Record(*texts, json.loads(versions), seed, status, tuple(json.loads(samples)), tuple(json.loads(default)))
