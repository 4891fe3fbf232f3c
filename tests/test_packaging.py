"""The package as it is shipped: its list of packages, who imports whom, and a wheel that works in another folder."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

ROOT = Path(__file__).resolve().parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: folders of the repository that are no part of the package
OUTSIDE = {"tests", "benchmarks", "docs", "build", "dist"}


def source_files() -> list[Path]:
    tops = [ROOT / "__init__.py", *(path for path in ROOT.iterdir() if path.is_dir() and path.name not in OUTSIDE and not path.name.startswith("."))]
    return [file for top in tops for file in ([top] if top.is_file() else sorted(top.rglob("*.py")))]


def test_package_list_equals_the_tree():
    tree = {"tcompile", *(".".join(("tcompile", *file.parent.relative_to(ROOT).parts)) for file in source_files() if file.name == "__init__.py")}
    assert sorted(CONFIG["tool"]["setuptools"]["packages"]) == sorted(tree)


def test_every_python_file_is_in_a_package():
    loose = [file for file in source_files() if not (file.parent / "__init__.py").exists()]
    assert loose == []


def layer(module: str) -> str:
    """The layer of DESIGN's import rule that a dotted module (relative to the package) belongs to."""
    for prefix, name in LAYERS.items():
        if module == prefix or module.startswith(prefix + "."):
            return name
    return "base" if module.startswith("compiler") else module.partition(".")[0]


LAYERS = {
    "compiler.cli": "cli",
    "compiler.api": "api",
    "compiler.dynamo": "api",
    "compiler.inspection": "api",
    "compiler.artifact": "artifact",
    "compiler.artifact_writer": "artifact",
    "compiler.runtime": "artifact",
    "compiler.cuda_runtime": "artifact",
    "compiler.page": "api",
    "compiler.pipeline": "pipeline",
    "compiler.recipe": "pipeline",
    "compiler.steps": "pipeline",
    "compiler.tuning": "tuning",
    "compiler.importers": "importers",
    "autotune.corpus": "corpus",
    "autotune.corpus_workloads": "corpus",
    "targets.base": "target manifest",
    "targets.registry": "target registry",
    "targets.common": "definitions",
    "targets.cpu": "cpu",
    "targets.cuda": "cuda",
    "targets.fpga": "fpga",
}
BACKENDS = {"cpu", "cuda", "fpga"}
#: layer -> layers it may import (besides itself); `base` is program, errors, tvm and the other plain modules of compiler/
ALLOWED = {
    "base": {"target manifest"},
    "target manifest": {"base", "target registry"},  # Target.parse asks the registry, late
    "target registry": {"base", "target manifest", *BACKENDS},
    "definitions": {"base"},
    "cpu": {"base", "target manifest", "definitions", "passes", "autotune"},
    "cuda": {"base", "target manifest", "definitions", "passes", "autotune"},
    "fpga": {"base", "target manifest", "definitions", "passes", "autotune"},
    "importers": {"base"},
    "passes": {"base", "target manifest"},
    "autotune": {"base"},
    # the command that makes the cost model's corpus is a program of its own: it hands autotune the networks, the CPU's spaces and its builder
    "corpus": {"base", "api", "pipeline", "models", "autotune", "definitions", "cpu", "target manifest"},
    "pipeline": {"base", "importers", "passes", "autotune", "target manifest", "target registry", *BACKENDS},
    "tuning": {"base", "artifact", "pipeline", "autotune", "target manifest", "cpu"},
    "artifact": {"base", "target manifest", "target registry", "cpu"},  # cpu: which features this host has
    "api": {"base", "tuning", "artifact", "pipeline", "importers", "target manifest"},
    "cli": {"base", "tuning", "api", "artifact", "pipeline", "importers", "target manifest", "target registry"},
    "models": {"base", "api", "models"},
}


def imports_of(file: Path) -> set[str]:
    """Modules of tcompile that `file` imports, dotted and relative to the package; imports under TYPE_CHECKING do not count."""
    package = file.relative_to(ROOT).parent.parts
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                inner = ROOT.joinpath(*target, alias.name)
                found.add(".".join((*target, alias.name) if inner.is_dir() or inner.with_suffix(".py").exists() else target))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return {name for name in found if name}


def test_who_may_import_whom():
    wrong = []
    for file in source_files():
        if file.parent == ROOT:
            continue
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        mine = layer(module)
        for target in imports_of(file):
            theirs = layer(target)
            if theirs != mine and theirs not in ALLOWED.get(mine, set()):
                wrong.append(f"{module} ({mine}) imports {target} ({theirs})")
    assert wrong == []


def test_only_one_module_imports_tvm():
    """TVM's versions are worked around in compiler/tvm.py, tvm_runtime.py, tvm_control.py and tvm_torch.py; nobody goes past them."""
    wrong = []
    for file in source_files():
        if file.name in ("tvm.py", "tvm_control.py", "tvm_runtime.py", "tvm_torch.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            wrong += [f"{file.relative_to(ROOT)}: {name}" for name in names if name.partition(".")[0] in ("tvm", "tvm_ffi")]
    assert wrong == []


def test_importing_the_package_is_cheap():
    code = "import sys, tcompile; assert not {'tvm', 'tvm_ffi', 'numpy', 'torch', 'onnx'} & set(sys.modules); tcompile.UnsupportedModel"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_wheel_installs_and_compiles_elsewhere(tmp_path):
    source = tmp_path / "any-name"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.tcm"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], check=True)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "-q", "--no-deps", *map(str, tmp_path.glob("*.whl"))], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True
    ).stdout.strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # the dependencies of this environment, not tcompile itself

    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [weight],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "tiny.onnx")
    code = "import tcompile, numpy; m = tcompile.compile('tiny.onnx'); print(tcompile.__file__, m(numpy.ones((2, 4), 'float32')).sum())"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout and done.stdout.endswith(" 132.0\n")
