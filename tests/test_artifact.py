"""The artifact on disk: reproducible, complete or absent, and refused when it was touched."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from tcompile.compiler.artifact import build, read, read_manifest
from tcompile.compiler.artifact_writer import write
from tcompile.compiler.digest import CHUNK_BYTES, ChunkedSha256, chunked_sha256, sha256_of_json
from tcompile.compiler.errors import ToolchainError, UsageError, VerificationError
from tcompile.compiler.linker import find_linker
from tcompile.compiler.runtime import CompiledModel, load
from tcompile.compiler.weights import gathered, map_file, serialize

X = np.linspace(-1, 1, 20, dtype="float32").reshape(5, 4)


@pytest.fixture(scope="module")
def built():
    return build(tiny_models.linear())


@pytest.fixture
def saved(built, tmp_path):
    return write(built, tmp_path / "tiny.tcm")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rehash(folder: Path, change) -> None:
    """Edit the manifest and make its own hash fit again, as a careful forger would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256")
    change(manifest)
    path.write_text(json.dumps({**manifest, "sha256": sha256_of_json(manifest)}))


def test_weights_are_gathered_in_one_piece_of_memory():
    rng = np.random.default_rng(0)
    arrays = {
        "odd": rng.standard_normal((3, 7)).astype(np.float32),
        "strided": rng.integers(0, 99, (8, 6), np.int8)[::2, ::3],
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.float32),
        "large": rng.standard_normal(3 << 19).astype(np.float32),
    }
    wanted, given = {name: array.copy() for name, array in arrays.items()}, dict(arrays)
    found = gathered(given)
    assert list(found) == list(wanted) and not given
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name])
        assert array.dtype == wanted[name].dtype and array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % 64 == 0
    places = [array.ctypes.data for array in found.values()]
    assert max(places) - min(places) < sum(array.nbytes for array in found.values()) + 64 * len(found)
    assert gathered({}) == {} and gathered({"empty": np.zeros((0, 4))})["empty"].shape == (0, 4)


def test_roundtrip(saved):
    model = load(saved)
    np.testing.assert_allclose(model(X), tiny_models.linear_reference(X), rtol=1e-6)
    assert str(model.inputs[0]) == "x: float32[5, 4]" and str(model.outputs[0]) == "y: float32[5, 3]"
    assert model.manifest["provenance"]["source"] == "tiny.onnx"
    assert "# nothing" in model.source()


def test_equal_compilations_give_equal_bytes(tmp_path):
    first, second = (files(write(build(tiny_models.linear()), tmp_path / name)) for name in ("a.tcm", "b.tcm"))
    assert first == second
    assert b"seconds" not in first["report.json"]


def test_saving_a_loaded_artifact_gives_equal_bytes(saved, tmp_path):
    assert files(load(saved).save(tmp_path / "again.tcm")) == files(saved)


def test_weights_are_mapped_aligned_and_standard_safetensors(saved):
    loaded = read(saved)
    assert loaded.mapping is not None
    for array in loaded.weights.values():
        assert array.ctypes.data % 64 == 0 and not array.flags.owndata
    from safetensors.numpy import load_file

    reference = load_file(saved / "weights.safetensors")
    for name, array in loaded.weights.items():
        np.testing.assert_array_equal(array, reference[name])


def test_weights_of_every_kind_survive(tmp_path):
    import ml_dtypes

    dtypes = ["bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64", ml_dtypes.bfloat16]
    weights = {f"w{i}": np.arange(7).astype(dtype) for i, dtype in enumerate(dtypes)}
    weights |= {"scalar": np.array(3.0, "float32"), "empty": np.zeros((0, 5), "float32"), "strided": np.arange(12, dtype="float32").reshape(3, 4).T}
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"".join(bytes(piece) for piece in serialize(weights)))
    _, back = map_file(path)
    assert list(back) == list(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5])
def test_chunked_digest_is_the_same_in_pieces(size):
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    digest = ChunkedSha256()
    for start in range(0, size, 1_000_003):
        digest.update(data[start : start + 1_000_003])
    assert digest.hexdigest() == chunked_sha256(memoryview(data))


@pytest.mark.parametrize("name", ["lib.so", "weights.safetensors", "report.json", "source/main.tir", "manifest.json"])
def test_any_flipped_bit_is_found(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(VerificationError, match=name.replace(".", r"\.")):
        load(saved)


@pytest.mark.parametrize("name", ["lib.so", "weights.safetensors", "report.json", "source/main.tir", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "link"])
def test_any_damaged_file_is_found(saved, tmp_path, name, damage):
    path = saved / name
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "empty":
        os.truncate(path, 0)
    else:
        shutil.move(path, tmp_path / "moved")
        if damage == "link":
            path.symlink_to(tmp_path / "moved")
    with pytest.raises(VerificationError):
        load(saved)


def test_quick_check_leaves_the_weights_payload_alone(saved):
    path = saved / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    load(saved, check="quick")
    os.truncate(path, len(content) - 1)
    with pytest.raises(VerificationError):
        load(saved, check="quick")
    with pytest.raises(UsageError, match="check must be"):
        load(saved, check="none")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "source/../../x", ".hidden", "a/b", "source\\x", ""])
def test_manifest_cannot_name_files_outside(saved, name):
    rehash(saved, lambda manifest: manifest["files"].update({name: {"size": 1, "sha256": "0"}}))
    with pytest.raises(VerificationError, match="not allowed"):
        load(saved)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"sha256": 1}', b"[" * 100000, b'{"format": 1, "files": [], "sha256": ""}']
)
def test_nonsense_manifest(saved, content):
    (saved / "manifest.json").write_bytes(content)
    with pytest.raises(VerificationError, match=r"manifest\.json"):
        read_manifest(saved)


def test_future_format(saved):
    rehash(saved, lambda manifest: manifest.update(format=99))
    with pytest.raises(UsageError, match="format 99"):
        load(saved)


HEADERS = {
    "beyond the end": {"w": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}},
    "overlap": {"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "b": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]}},
    "hole": {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "b": {"dtype": "U8", "shape": [4], "data_offsets": [8, 12]}},
    "wrong size": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},
    "negative": {"a": {"dtype": "U8", "shape": [-8], "data_offsets": [0, -8]}},
    "huge": {"a": {"dtype": "U8", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 1 << 124]}},
    "float dim": {"a": {"dtype": "U8", "shape": [8.0], "data_offsets": [0, 8]}},
    "unknown dtype": {"a": {"dtype": "F8", "shape": [8], "data_offsets": [0, 8]}},
    "no offsets": {"a": {"dtype": "U8", "shape": [8]}},
    "not an object": {"a": 5},
    "a list": [],
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_hostile_weight_header(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(VerificationError):
        map_file(path)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, b"\xff" * 100, (5).to_bytes(8, "little") + b"[[[[["])
def test_hostile_weight_file(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(VerificationError):
        map_file(path)


def test_another_isa_is_refused_before_code_is_loaded(tmp_path, monkeypatch):
    exotic = dataclasses.replace(tiny_models.HASWELL, name="exotic", features=frozenset({"avx2", "amx-superb"}))
    lowered = dataclasses.replace(tiny_models.linear(), target=exotic)
    path = CompiledModel(build(lowered)).save(tmp_path / "exotic.tcm")  # cross compilation itself works
    monkeypatch.setattr("tcompile.compiler.runtime.load_executable", lambda library: pytest.fail("code was loaded"))
    with pytest.raises(ToolchainError, match="amx-superb"):
        load(path)
    cuda = dataclasses.replace(exotic, kind="cuda", name="sm_90a", features=frozenset())
    with pytest.raises(ToolchainError, match="cuda:sm_90a"):
        CompiledModel(build(dataclasses.replace(lowered, target=cuda))).start()


def test_no_linker(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolchainError, match="apt-get install"):
        find_linker()


def test_a_bare_linker_is_enough(monkeypatch):
    monkeypatch.setattr("tcompile.compiler.linker.DRIVERS", ())
    model = CompiledModel(build(tiny_models.linear()))
    np.testing.assert_allclose(model(X), tiny_models.linear_reference(X), rtol=1e-6)


def test_replaces_an_artifact_and_nothing_else(built, tmp_path):
    path = write(built, tmp_path / "a.tcm")
    (path / "stale").write_text("left over")
    assert not (write(built, path) / "stale").exists()
    (tmp_path / "folder.tcm").mkdir()
    (tmp_path / "file.tcm").write_text("mine")
    (tmp_path / "link.tcm").symlink_to(path)
    for name in ("folder.tcm", "file.tcm", "link.tcm"):
        with pytest.raises(UsageError, match="not an artifact"):
            write(built, tmp_path / name)
    for name in ("a.out", "nowhere/a.tcm"):
        with pytest.raises(UsageError):
            write(built, tmp_path / name)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.tcm", "file.tcm", "folder.tcm", "link.tcm"]


def test_open_artifact_survives_its_replacement(built, saved):
    model = load(saved)
    write(build(tiny_models.linear(bias=5.0)), saved)
    np.testing.assert_allclose(model(X), tiny_models.linear_reference(X), rtol=1e-6)
    np.testing.assert_allclose(load(saved)(X), tiny_models.linear_reference(X, 5.0), rtol=1e-6)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_interrupted_writing_leaves_the_old_artifact(built, saved, monkeypatch, error):
    before = files(saved)

    def failing(path, pieces):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("tcompile.compiler.artifact_writer._write_weights", failing)
    with pytest.raises(UsageError if isinstance(error, OSError) else type(error)):
        write(build(tiny_models.linear(bias=5.0)), saved)
    assert files(saved) == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["tiny.tcm"]


def test_full_disk(tmp_path):
    """A file size limit stands in for the disk: the write really fails half-way, in a process of its own."""
    code = f"""
        import resource, sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        import numpy as np, dataclasses, tiny_models
        from tcompile.compiler.artifact import build
        from tcompile.compiler.artifact_writer import write
        from tcompile.compiler.errors import UsageError
        artifact = build(tiny_models.linear())
        artifact = dataclasses.replace(artifact, weights=dict(artifact.weights, big=np.ones(1 << 20, "float32")))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        try:
            write(artifact, {str(tmp_path / "a.tcm")!r})
        except UsageError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "free some space" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_linking(tmp_path, monkeypatch):
    """A linker that may write 4 kB only."""
    wrapper = tmp_path / "cc"
    wrapper.write_text(f"#!/bin/sh\ntrap '' XFSZ\nulimit -f 8\nexec {find_linker()[0]} \"$@\"\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UsageError, match="disk is full"):
        build(tiny_models.linear())


def test_the_whole_compiler_is_reproducible(tmp_path):
    """Equal bytes from other processes: with another hash seed, and after another model was compiled."""
    import onnx_models
    from onnx import helper, save

    weights = {"w": np.linspace(-1, 1, 216, dtype="float32").reshape(8, 3, 3, 3), "t": np.linspace(-1, 1, 40, dtype="float32").reshape(5, 8)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gather", ["t", "i"], ["g"]),
        helper.make_node("Mul", ["f", "g"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"]),
    ]
    save(onnx_models.small(nodes, {"x": [1, 3, 9, 9], "i": ([1], 7)}, ["y"], weights), tmp_path / "model.onnx")
    onnx_models.saved_mlp(tmp_path, layers=2)
    results = []
    for seed, first in (("0", None), ("1", "mlp.onnx")):
        name = f"out{seed}.tcm"
        before = f"tcompile.compile({first!r}).save('first.tcm'); " if first else ""
        code = f"import tcompile; {before}tcompile.compile('model.onnx', target='cpu:haswell').save({name!r})"
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
        results.append(files(tmp_path / name))
    one, other = results
    assert other.keys() == one.keys()
    assert [name for name in other if other[name] != one[name]] == []
