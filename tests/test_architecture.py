"""Who may import whom, and which siblings an op needs: reads the source with `ast`, imports none of it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folder -> the package that its modules import as.
FOLDERS = {
    "dlgpu": "dlgpu",
    "kernels": "dlgpu.kernels",
    "bench": "dlgpu.bench",
    "tests": "tests",
    "examples": "examples",
}

# Module (or the package around it) -> layer; the longest match wins.
LAYERS = {
    "dlgpu": "package",
    "dlgpu._version": "version",
    "dlgpu.functional": "api",
    "dlgpu.nn": "api",
    "dlgpu.optim": "api",
    "dlgpu.diagnostics": "api",
    "dlgpu._convert": "api",
    "dlgpu.ops": "ops",
    "dlgpu._arrays": "dispatch",
    "dlgpu._dispatch": "dispatch",
    "dlgpu._checks": "dispatch",
    "dlgpu.fallback": "fallback",
    "dlgpu.kernels": "kernels",
    "dlgpu.kernels.activations": "activations",
    # The other table with NumPy twins.
    "dlgpu.kernels.losses": "activations",
    "dlgpu.bench": "bench",
    "tests": "tests",
    "examples": "examples",
}

# Layer -> the layers it may import besides itself and the version.
MAY_IMPORT = {
    "version": set(),
    "activations": {"kernels"},
    "kernels": {"activations"},
    "fallback": {"activations"},
    "dispatch": {"fallback", "kernels", "activations"},
    "ops": {"dispatch", "fallback", "kernels", "activations"},
    # No kernels here; the table alone, for the names of the activations.
    "api": {"ops", "dispatch", "activations"},
    "package": {"api", "ops", "dispatch", "fallback", "kernels", "activations"},
    "examples": {"package", "api"},
    # The benchmark and the tests look at each layer by itself.
    "bench": {"package", "api", "ops", "dispatch", "fallback", "kernels", "activations"},
    "tests": {"package", "api", "ops", "dispatch", "fallback", "kernels", "activations", "bench", "examples"},
}

KERNEL_PACKAGES = {"torch", "numpy"} | sys.stdlib_module_names
TRITON_SHIM = "dlgpu.kernels._triton"
# Modules beside the ops that are no ops themselves; so is every module whose name starts with "_".
NO_STEM = {"configs", "tuning"}


def modules(root: Path) -> dict[str, Path]:
    """Module name -> file, with kernels/ and bench/ under the names that they import as."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if parts[0] in ("kernels", "bench") and folder == "dlgpu":
                continue  # the symlinks
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def layer(module: str) -> str | None:
    """The layer of a module of ours; None for one that LAYERS does not place, "" for another package's."""
    top = module.partition(".")[0]
    if top not in FOLDERS:
        return ""
    name = module
    while name not in LAYERS:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    # `dlgpu` itself is a layer, but not a home for whatever appears beside it.
    return None if name == "dlgpu" != module else LAYERS[name]


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import of a file, in functions and under TYPE_CHECKING too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in known else base


def import_violations(root: Path) -> list[str]:
    known = modules(root)
    # Test modules import their helpers by bare name.
    helpers = {path.stem for name, path in known.items() if layer(name) == "tests"}
    found = []
    for name, path in known.items():
        where = path.relative_to(root).as_posix()
        own = layer(name)
        if own is None:
            found.append(f"{where}: {name} has no place in LAYERS (tests/test_architecture.py)")
            continue
        for line, target in dict.fromkeys(imports(name, path, known)):
            theirs = "tests" if own == "tests" and target in helpers else layer(target)
            if wrong := objection(name, own, target, theirs):
                found.append(f"{where}:{line}: {wrong}")
    return found


def objection(name: str, own: str, target: str, theirs: str | None) -> str | None:
    """Why module `name` of layer `own` may not import `target` of layer `theirs`."""
    top = target.partition(".")[0]
    if top in ("kernels", "bench"):
        return f"import {top} as dlgpu.{top}, never by its folder's name"
    if theirs is None:
        return f"{target} is no module of this project, or has no place in LAYERS"
    if theirs:
        allowed = MAY_IMPORT[own] | {own, "version"}
        return None if theirs in allowed else f"{own} may not import {theirs} ({target})"
    if top == "triton" and name != TRITON_SHIM and own not in ("bench", "tests", "examples"):
        return "take triton from kernels/_triton.py, which works without it"
    if own in ("kernels", "activations") and top not in KERNEL_PACKAGES | {"triton"}:
        return f"kernels import torch, triton, numpy and themselves, not {top}"
    return None


def missing_siblings(root: Path) -> list[str]:
    """A kernel, an op or a fallback whose counterpart file does not exist."""
    homes = ["kernels/{}.py", "dlgpu/ops/{}.py", "dlgpu/fallback/{}.py"]
    stems = {
        path.stem: path.relative_to(root)
        for home in reversed(homes)
        for path in (root / home).parent.glob("*.py")
        if not path.stem.startswith("_") and path.stem not in NO_STEM
    }
    return [
        f"{path} needs {home.format(stem)}"
        for stem, path in sorted(stems.items())
        for home in [*homes, "tests/test_{}.py"]
        if not (root / home.format(stem)).is_file()
    ]


def _assigned(path: Path, name: str) -> ast.expr | None:
    """The value of a module's variable."""
    for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value  # type: ignore[attr-defined]
    return None


def _texts(node: ast.AST | None) -> set[str]:
    return (
        {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        if node
        else set()
    )


def described_ops(root: Path) -> set[str]:
    """What bench/cases describes: the names given to `Op(name=...)` and to a stem's own `_op("...")`."""
    found = set()
    for path in (root / "bench" / "cases").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("Op", "_op")
            ):
                names = [keyword.value for keyword in node.keywords if keyword.arg == "name"] or node.args[:1]
                found |= {n.value for n in names if isinstance(n, ast.Constant)}
    return found


def undescribed(root: Path) -> list[str]:
    """Public functions and optimizers that the benchmark knows nothing of. One op stands for all activations."""
    described = described_ops(root)
    table = _assigned(root / "kernels" / "activations.py", "ACTIVATIONS")
    activations = (
        _texts(ast.Tuple(table.keys)) if isinstance(table, ast.Dict) and "activation" in described else set()
    )
    public = {
        f"dlgpu/functional.py: {name}": name
        for name in _texts(_assigned(root / "dlgpu" / "functional.py", "__all__")) - activations
    }
    public |= {
        f"dlgpu/optim.py: {name}": name.lower()
        for name in _texts(_assigned(root / "dlgpu" / "optim.py", "__all__"))
    }
    return [
        f"{where} has no Op in bench/cases" for where, name in sorted(public.items()) if name not in described
    ]


def test_the_benchmark_knows_every_op() -> None:
    found = undescribed(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_an_op_that_the_benchmark_does_not_know_is_named(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "dlgpu/functional.py": '__all__ = ["linear", "relu", "gelu", "mish"]\n',
            "dlgpu/optim.py": '__all__ = ["Adam", "Lion"]\n',
            "kernels/activations.py": 'ACTIVATIONS: dict[str, int] = {"relu": 1, "gelu": 2}\n',
            "bench/cases/linear.py": 'OPS = [Op(name="linear", shapes={})]\n',
            "bench/cases/activations.py": 'OPS = [Op(name="activation")]\n',
            "bench/cases/optimizers.py": 'OPS = [_op("adam", "Adam")]\n',
        },
    )
    assert undescribed(tmp_path) == [
        "dlgpu/functional.py: mish has no Op in bench/cases",
        "dlgpu/optim.py: Lion has no Op in bench/cases",
    ]
    (tmp_path / "bench/cases/activations.py").write_text("OPS = []\n")
    assert len(undescribed(tmp_path)) == 4


def test_imports() -> None:
    found = import_violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_siblings() -> None:
    found = missing_siblings(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_tests_are_no_package() -> None:
    # pytest would put the root on sys.path, where `import kernels` finds our folder.
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_symlinks() -> None:
    for name in ("kernels", "bench"):
        link = ROOT / "dlgpu" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


CLEAN = {
    "dlgpu/__init__.py": "from . import functional\nfrom ._version import __version__\n",
    "dlgpu/_version.py": '__version__ = "0"\n',
    "dlgpu/_dispatch.py": "from .kernels import linear\nfrom .fallback import linear as twin\n",
    "dlgpu/functional.py": "from .ops.linear import linear\n",
    "dlgpu/ops/__init__.py": "",
    "dlgpu/ops/linear.py": "import torch\nfrom .. import _dispatch\nfrom ..kernels import activations\n",
    "dlgpu/fallback/__init__.py": "",
    "dlgpu/fallback/_arrays.py": "import numpy\n",
    "dlgpu/fallback/linear.py": "from ..kernels.activations import relu\nfrom . import _arrays\n",
    "dlgpu/ops/activations.py": "",
    "dlgpu/fallback/activations.py": "",
    "kernels/__init__.py": "",
    "kernels/_triton.py": "import triton\n",
    "kernels/activations.py": "import math\nfrom ._triton import tl\n",
    "kernels/configs.py": "",
    "kernels/linear.py": "import numpy\nimport torch\nfrom . import configs\n",
    "bench/__init__.py": "",
    "bench/meter.py": "import rich\nimport triton\nfrom dlgpu.kernels import linear\nimport dlgpu\n",
    "examples/digits.py": "import sklearn\nfrom dlgpu import functional\n",
    "tests/tolerance.py": "",
    "tests/test_linear.py": "import tolerance\nimport pytest\nfrom dlgpu.bench import meter\n",
    "tests/test_activations.py": "",
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_clean_tree_passes(tmp_path: Path) -> None:
    plant(tmp_path, CLEAN)
    assert import_violations(tmp_path) == []
    assert missing_siblings(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("kernels/linear.py", "import triton.language as tl", "take triton from kernels/_triton.py"),
        ("kernels/linear.py", "import scipy", "not scipy"),
        ("kernels/linear.py", "from dlgpu.ops import linear", "kernels may not import ops"),
        ("kernels/linear.py", "from .. import _dispatch", "kernels may not import dispatch"),
        (
            "kernels/linear.py",
            "def f():\n    from ..fallback import linear",
            "kernels may not import fallback",
        ),
        ("kernels/activations.py", "import rich", "not rich"),
        ("dlgpu/fallback/linear.py", "from dlgpu.kernels import linear", "fallback may not import kernels"),
        ("dlgpu/fallback/linear.py", "from ..ops.linear import linear", "fallback may not import ops"),
        ("dlgpu/_dispatch.py", "from .ops import linear", "dispatch may not import ops"),
        ("dlgpu/ops/linear.py", "from .. import functional", "ops may not import api"),
        ("dlgpu/ops/linear.py", "import dlgpu", "ops may not import package"),
        ("dlgpu/ops/linear.py", "from triton import jit", "take triton from kernels/_triton.py"),
        ("dlgpu/functional.py", "import dlgpu.kernels.linear", "api may not import kernels"),
        ("dlgpu/functional.py", "from dlgpu.bench import meter", "api may not import bench"),
        ("dlgpu/__init__.py", "from . import bench", "package may not import bench"),
        ("dlgpu/newcomer.py", "", "dlgpu.newcomer has no place in LAYERS"),
        ("examples/digits.py", "from dlgpu.ops.linear import linear", "examples may not import ops"),
        ("bench/meter.py", "import tests.tolerance", "bench may not import tests"),
        ("tests/test_linear.py", "from kernels import linear", "import kernels as dlgpu.kernels"),
    ],
)
def test_a_planted_import_is_caught(tmp_path: Path, file: str, source: str, message: str) -> None:
    plant(tmp_path, CLEAN)
    plant(tmp_path, {file: source + "\n"})
    (found,) = import_violations(tmp_path)
    assert found.startswith(file)
    assert message in found


@pytest.mark.parametrize(
    "file", ["kernels/linear.py", "dlgpu/ops/linear.py", "dlgpu/fallback/linear.py", "tests/test_linear.py"]
)
def test_a_missing_sibling_is_named(tmp_path: Path, file: str) -> None:
    plant(tmp_path, CLEAN)
    (tmp_path / file).unlink()
    (found,) = missing_siblings(tmp_path)
    assert found.endswith(f"needs {file}")
