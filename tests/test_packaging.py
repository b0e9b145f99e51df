"""What the wheel and the source distribution hold, what `import dlgpu` needs, and where tools are pinned."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import dlgpu

ROOT = Path(__file__).resolve().parents[1]
WHEEL_FOLDERS = {"dlgpu": "dlgpu", "kernels": "dlgpu/kernels", "bench": "dlgpu/bench"}
IGNORED = (".*", "build", "dist", "*.egg-info", "__pycache__", "bench-results")


def run(*arguments: str, cwd: Path, timeout: float = 300, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        arguments, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """A distribution made by the build backend in this environment: no isolation, so no network."""
    call = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}(sys.argv[1]))"
    return out / run(sys.executable, "-c", call, str(out), cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree to build in: setuptools leaves files behind and picks up those of earlier builds."""
    copy = tmp_path_factory.mktemp("clone") / "source"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*IGNORED))
    return copy


@pytest.fixture(scope="module")
def sdist(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", clone, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module", params=["tree", "sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the tree, and the one built from the source distribution."""
    if request.param == "tree":
        source = request.getfixturevalue("clone")
    else:
        archive = request.getfixturevalue("sdist")
        source = tmp_path_factory.mktemp("unpacked")
        with tarfile.open(archive) as tar:
            tar.extractall(source, filter="data")
        (source,) = source.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def package_files() -> list[str]:
    """Each file of the library, by its place in the wheel."""
    return sorted(
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in WHEEL_FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        # Raw samples, bench/results: for README, not for users.
        and path.relative_to(ROOT / folder).parts[0] != "results"
        and not (folder == "dlgpu" and path.relative_to(ROOT / folder).parts[0] in ("kernels", "bench"))
    )


def test_the_wheel_holds_each_file_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    library = sorted(name for name in names if ".dist-info/" not in name)
    assert library == package_files()
    assert {"dlgpu/py.typed", "dlgpu/kernels/activations.py", "dlgpu/bench/__init__.py"} <= set(library)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"dlgpu"}


def test_the_wheel_carries_version_and_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"dlgpu-{dlgpu.__version__}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {dlgpu.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "dlgpu-bench = dlgpu.bench.__main__:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_the_sdist_holds_each_file_once(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        members = tar.getmembers()
    names = [member.name.partition("/")[2] for member in members if member.isfile()]
    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert len(names) == len(set(names))
    for folder in WHEEL_FOLDERS:
        ours = [name for name in names if name.startswith(f"{folder}/")]
        assert sorted(f"{WHEEL_FOLDERS[folder]}{name.removeprefix(folder)}" for name in ours) == [
            file for file in package_files() if owner(file) == folder
        ]
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"} <= set(names)
    assert not [name for name in names if name.startswith("tests/")]


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """The Python of an environment that holds the wheel, installed by pip, and this one's packages as its dependencies: there
    is no network in tests."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    call = ("-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet", str(wheel))
    run(sys.executable, *call, cwd=tmp_path)
    site = Path(
        run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    # Not `site.addsitedir`: of the packages' own .pth files, one may lead to the checkout.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


SMOKE = """
    import sys, torch, dlgpu, dlgpu.bench, dlgpu.kernels
    print(dlgpu.__file__, dlgpu.bench.__file__, dlgpu.kernels.__file__, sep="\\n")
    torch.manual_seed(0)
    x, t = torch.randn(64, 8), torch.arange(64) % 3
    for backend in ("fallback", "auto"):
        with dlgpu.use_backend(backend):
            layers = dlgpu.nn.Linear(8, 16, activation="relu"), dlgpu.nn.BatchNorm1d(16), dlgpu.nn.Linear(16, 3)
            model = torch.nn.Sequential(*layers)
            optimizer, losses = dlgpu.optim.Adam(model.parameters(), lr=0.05), []
            for step in range(30):
                optimizer.zero_grad()
                losses.append(dlgpu.functional.cross_entropy(model(x), t))
                losses[-1].backward()
                optimizer.step()
            assert losses[-1] < 0.7 * losses[0], losses
    print(dlgpu.explain("linear", torch.empty(64, 64, device="meta"), torch.empty(64, 64, device="meta")).backend)
"""


def test_the_installed_wheel_trains(installed: Path, tmp_path: Path) -> None:
    """From outside the checkout, with nothing of it on the path."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET", "DLGPU_BACKEND")
    }
    output = run(str(installed), "-P", "-c", textwrap.dedent(SMOKE), cwd=tmp_path, env=clean).splitlines()
    assert output[3:] == ["triton"]
    assert all(Path(file).is_relative_to(tmp_path) for file in output[:3]), output
    script = installed.with_name("dlgpu-bench")
    assert "Usage" in run(str(script), "--help", cwd=tmp_path, env=clean)


def test_metadata_names_no_python_that_is_not_tested() -> None:
    """The environment's Python is what `make` and CI run; another minor version in the metadata would be a claim."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert set(named) <= {f"{sys.version_info[0]}.{sys.version_info[1]}"}
    assert project["requires-python"] == ">=3.11"


def owner(file: str) -> str:
    """The folder of the repository that a file of the wheel comes from."""
    return next((name for name in ("kernels", "bench") if file.startswith(f"dlgpu/{name}/")), "dlgpu")


NO_TRITON = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("triton", "cupy"):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Block())
    import dlgpu, dlgpu.functional, dlgpu.nn, dlgpu.optim
    import dlgpu.kernels.activations, dlgpu.kernels.linear
    assert not {"triton", "cupy"} & set(sys.modules)
"""

NO_CUDA = """
    import torch

    def refuse(*args, **kwargs):
        raise AssertionError("import dlgpu made a CUDA call")

    # is_available() too: without NVML it initializes the driver, and a forked worker then cannot.
    for name in ("is_available", "device_count", "current_device", "set_device", "synchronize", "init",
                 "get_device_capability", "get_device_name", "get_device_properties", "_lazy_init"):
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, refuse)
    import dlgpu, dlgpu.functional, dlgpu.nn, dlgpu.optim
    assert not torch.cuda.is_initialized()
"""


@pytest.mark.parametrize("code", [NO_TRITON, NO_CUDA], ids=["without triton and cupy", "without a CUDA call"])
def test_import(code: str, tmp_path: Path) -> None:
    strict = "import warnings; warnings.filterwarnings('error', module='dlgpu')\n"
    run(sys.executable, "-c", strict + textwrap.dedent(code), cwd=tmp_path)


def test_version_needs_no_import() -> None:
    text = (ROOT / "dlgpu" / "_version.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE) == [dlgpu.__version__]
    assert "import" not in text.partition("__version__")[2]


def test_tools_are_pinned_once() -> None:
    """The hook and CI run `make check`, which installs ruff and mypy by the pins of the `dev` extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    dev = project["project"]["optional-dependencies"]["dev"]
    for tool in ("ruff", "mypy"):
        assert [entry for entry in dev if re.fullmatch(rf"{tool}==[\d.]+", entry)]
    for file in ("constraints.txt", ".pre-commit-config.yaml", ".ci/run", "Makefile"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not re.search(r"\b(ruff|mypy)[\w-]*\s*(==|@|\n\s*rev:)", text), f"{file} pins a tool again"
    hook = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"entry: (.+)", hook) == ["make check"]
    assert "repo: local" in hook
    assert "pass_filenames: false" in hook
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert ci[-2:] == ["make check", "make test"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
