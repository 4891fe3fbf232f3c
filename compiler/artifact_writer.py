"""Writing an artifact: complete or not at all.

Everything goes into a hidden sibling directory that is renamed into place at the end, so a full disk, a crash or Ctrl-C leaves what was there before.
(After a power cut the file system may have lost parts of it; the hashes find that at load.)
"""

from __future__ import annotations

import errno
import json
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .artifact import LIBRARY, MANIFEST, REPORT, SOURCE, SUFFIX, WEIGHTS, Artifact
from .digest import ChunkedSha256, sha256, sha256_of_json
from .errors import UsageError
from .weights import serialize


def writable_path(path: str | Path) -> Path:
    """`path` when an artifact may be written there: it ends in .tcm, its folder exists, and nothing but an older artifact would be replaced (UsageError)."""
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UsageError(f"output '{path}' must end in {SUFFIX}, for example {path.with_suffix(SUFFIX) if path.name else 'model' + SUFFIX}")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist; create it first")
    if path.is_symlink() or (path.exists() and not (path / MANIFEST).is_file()):
        raise UsageError(f"{path} exists and is not an artifact; it is left alone: remove it or choose another --output")
    return path


def write(artifact: Artifact, path: str | Path) -> Path:
    """Write `artifact` to the directory `path`, replacing an older artifact there. Raises UsageError where that is impossible (rights, full disk)."""
    path = writable_path(path)
    try:
        temporary = _sibling(path, "tmp")
        try:
            _write_files(artifact, temporary)
            _put_in_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "choose another --output"
        raise UsageError(f"cannot write {path}: {error.strerror or error}; {advice} and run again") from error
    return path


def _write_files(artifact: Artifact, folder: Path) -> None:
    files: dict[str, dict[str, Any]] = {}
    small = {LIBRARY: artifact.library, REPORT: _json(_without_measurements(artifact.report))}
    small |= {f"{SOURCE}/{name}": text.encode() for name, text in artifact.sources.items()}
    (folder / SOURCE).mkdir()
    for name, content in small.items():
        (folder / name).write_bytes(content)
        files[name] = {"size": len(content), "sha256": sha256(content)}
    files[WEIGHTS] = _write_weights(folder / WEIGHTS, serialize(artifact.weights))
    manifest = {**artifact.manifest, "files": dict(sorted(files.items()))}
    (folder / MANIFEST).write_bytes(_json({**manifest, "sha256": sha256_of_json(manifest)}))


def _write_weights(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digest, size = ChunkedSha256(), 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    return {"size": size, "sha256": digest.hexdigest()}


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    retired = _sibling(path, "old")
    path.rename(retired / path.name)
    try:
        temporary.rename(path)
    except BaseException:
        (retired / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


#: keys of a report whose values differ from run to run
MEASUREMENTS = frozenset({"seconds", "measured_us", "limit_us"})


def _without_measurements(value: Any) -> Any:
    """The report without what differs from run to run."""
    if isinstance(value, dict):
        return {key: _without_measurements(item) for key, item in value.items() if key not in MEASUREMENTS}
    if isinstance(value, (list, tuple)):
        return [_without_measurements(item) for item in value]
    return value


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _sibling(path: Path, purpose: str) -> Path:
    """A new hidden directory beside `path`, on the same file system, so that renaming is atomic."""
    folder = path.parent / f".{path.name}.{secrets.token_hex(4)}.{purpose}"
    folder.mkdir()
    return folder
