"""The artifact: a directory `NAME.tcm/` holding everything a compiled model needs.

    manifest.json          format version, inputs, outputs, dims, target, recipe, versions, size and SHA-256 of every other file
    lib.so                 machine code and the VM executable
    weights.safetensors    packed weights, mapped at load
    report.json            what the compiler did
    source/                the emitted code as text

The hashes find damage and careless edits, not an attacker: who can write the directory can also write a matching manifest. An artifact is code;
load only what you trust. Nothing in it depends on the clock, the machine's paths or the process, so equal compilations give equal bytes.
"""

from __future__ import annotations

import json
import mmap
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from .digest import chunked_sha256, sha256, sha256_of_json
from .errors import ToolchainError, UsageError, VerificationError
from .lowered import Lowered
from .program import DimRange, Provenance, TensorSpec
from .weights import map_file

FORMAT = 1
SUFFIX = ".tcm"
MANIFEST, LIBRARY, WEIGHTS, REPORT, SOURCE = "manifest.json", "lib.so", "weights.safetensors", "report.json", "source"
#: the only spellings of a file name that a manifest may hold: nothing in it can leave the directory
_FILE_NAME = re.compile(r"(?:source/)?[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Artifact:
    """A compiled model in memory, whether just built or read back.

    manifest: the content of manifest.json without `files` and its own hash. library: the shared library. weights: name -> array, 64-byte aligned.
    mapping: keeps the weight file mapped while the artifact lives (None when just built).
    """

    manifest: Mapping[str, Any]
    library: bytes
    weights: Mapping[str, np.ndarray]
    report: Mapping[str, Any]
    sources: Mapping[str, str]
    mapping: mmap.mmap | None = field(default=None, repr=False, compare=False)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return _specs(self.manifest["inputs"])

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return _specs(self.manifest["outputs"])

    @property
    def dims(self) -> dict[str, DimRange]:
        return {name: DimRange(*bounds) for name, bounds in self.manifest["dims"].items()}


def build(lowered: Lowered) -> Artifact:
    """Link `lowered` and describe it. Raises ToolchainError without a linker."""
    from .linker import link
    from .weights import gathered

    manifest = {
        "format": FORMAT,
        "inputs": [_spec(spec) for spec in lowered.inputs],
        "outputs": [_spec(spec) for spec in lowered.outputs],
        "dims": {name: [bounds.min, bounds.opt, bounds.max] for name, bounds in lowered.dims.items()},
        "target": lowered.target.to_dict() | {"text": lowered.target.text},
        "recipe": lowered.recipe,
        "provenance": _provenance(lowered.provenance),
        "versions": versions(),
    }
    weights = gathered(lowered.weights)
    sources = {_source_name(name): text for name, text in lowered.sources.items()}
    library = link(lowered.executable) if lowered.executable is not None else lowered.library
    return Artifact(json.loads(json.dumps(manifest, sort_keys=True)), library, weights, lowered.report, sources)


def versions() -> dict[str, str]:
    """Versions of the packages that decide what the artifact contains."""
    from importlib.metadata import version

    return {"tcompile": __version__, "apache-tvm": version("apache-tvm"), "apache-tvm-ffi": version("apache-tvm-ffi")}


def read_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest of the artifact at `path`: nothing is loaded or run. Raises UsageError (no artifact there) or VerificationError (damaged)."""
    if not path.is_dir():
        raise UsageError(f"{path} is not an artifact directory; `tcompile MODEL -o NAME{SUFFIX}` makes one")
    try:
        manifest = json.loads(_read(path / MANIFEST))
        recorded = manifest.pop("sha256")
        version, files = manifest["format"], manifest["files"]
        names = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VerificationError(f"{path / MANIFEST}: not a manifest ({type(error).__name__}: {error}); compile the model again") from error
    if version != FORMAT:
        raise UsageError(f"{path} has artifact format {version}; this tcompile {__version__} reads format {FORMAT}: compile the model again")
    if recorded != sha256_of_json(manifest):
        raise VerificationError(f"{path / MANIFEST} was changed after it was written (hash differs); compile the model again")
    for name in names:
        if not _FILE_NAME.fullmatch(name):
            raise VerificationError(f"{path / MANIFEST}: file name {name!r} is not allowed; compile the model again")
    if missing := {LIBRARY, WEIGHTS, REPORT} - names.keys():
        raise VerificationError(f"{path / MANIFEST}: no entry for {', '.join(sorted(missing))}; compile the model again")
    return manifest


def read(path: str | Path, *, check: str = "full") -> Artifact:
    """Read the artifact at `path` without running any of it.

    check: "full" hashes every file; "quick" hashes all but the weights, of which size and header are still checked (weights too big to be read at
    every start). Raises UsageError when no artifact is there, VerificationError when a file is missing, damaged or changed.
    """
    if check not in ("full", "quick"):
        raise UsageError(f"check must be 'full' or 'quick', not {check!r}")
    path = Path(path)
    manifest = read_manifest(path)
    files = manifest.pop("files")
    contents: dict[str, bytes] = {}
    for name, entry in files.items():
        if name == WEIGHTS:
            continue
        contents[name] = _read(path / name)
        if len(contents[name]) != entry["size"] or sha256(contents[name]) != entry["sha256"]:
            raise _changed(path / name)
    if _regular_size(path / WEIGHTS) != files[WEIGHTS]["size"]:
        raise _changed(path / WEIGHTS)
    mapping, weights = map_file(path / WEIGHTS)
    if check == "full" and chunked_sha256(memoryview(mapping)) != files[WEIGHTS]["sha256"]:
        raise _changed(path / WEIGHTS)
    sources = {name.removeprefix(SOURCE + "/"): text.decode() for name, text in contents.items() if name.startswith(SOURCE + "/")}
    return Artifact(manifest, contents[LIBRARY], weights, json.loads(contents[REPORT]), sources, mapping)


def require_host(artifact: Artifact) -> None:
    """Raise ToolchainError unless this machine can run the artifact's code; to be called before any of it is loaded."""
    from ..targets.cpu.host import host_features

    target = artifact.manifest["target"]
    if target["kind"] != "cpu":
        raise ToolchainError(f"the artifact is for {target['text']}, which this runtime cannot run; compile with --target cpu")
    if missing := set(target["features"]) - host_features():
        raise ToolchainError(
            f"the artifact for {target['text']} needs {', '.join(sorted(missing))}, which this CPU lacks; compile with --target cpu on this machine"
        )


def _read(path: Path) -> bytes:
    _regular_size(path)
    return path.read_bytes()


def _regular_size(path: Path) -> int:
    """Size of a regular file; a link or device in its place is refused."""
    try:
        status = path.lstat()
    except OSError as error:
        raise VerificationError(f"{path}: {error.strerror}; the artifact is incomplete, compile the model again") from error
    if not stat.S_ISREG(status.st_mode):
        raise VerificationError(f"{path} is not a regular file; compile the model again")
    return status.st_size


def _changed(path: Path) -> VerificationError:
    return VerificationError(f"{path} was changed or damaged after it was written (hash differs); compile the model again")


def _spec(spec: TensorSpec) -> dict[str, Any]:
    entry = {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}
    return entry if spec.carrier is None else {**entry, "carrier": spec.carrier}


def _specs(entries: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(entry["name"], tuple(entry["shape"]), entry["dtype"], entry.get("carrier")) for entry in entries)


def _provenance(provenance: Provenance) -> dict[str, str]:
    """Without the folder of the source: the same model compiled elsewhere gives the same artifact."""
    return {"source": Path(provenance.source).name, "format": provenance.format, "version": provenance.version, "producer": provenance.producer}


def _source_name(name: str) -> str:
    clean = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-")
    return clean or "unnamed"
