"""What pip installs, used from outside the checkout: a wheel, a pure wheel, an editable install.

Each is installed into an environment of its own that has no other package. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, Result, build, needs_cc, run, write_checkpoint
from test_build import LIBRARY, SMALL_KERNELS, library

import tinygpt2


def is_installed(package: str) -> bool:
    """Asks without an import: after `import pip`, setuptools cannot be imported any more."""
    return any(importlib.metadata.distributions(name=package))


pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the paths are those of POSIX"),
    pytest.mark.skipif(not is_installed("hatchling"), reason="builds with hatchling"),
    pytest.mark.skipif(not is_installed("pip"), reason="builds and installs with pip"),
]

VERSION = tinygpt2.__version__
SOURCES = ["pyproject.toml", "README.md", "LICENSE", ".gitignore", "build.py", "kernels.c"]
SOURCES += ["tinygpt2.py", "vendor"]
PURE = {
    "tinygpt2/__init__.py",
    "tinygpt2/__main__.py",
    "tinygpt2/py.typed",
    "tinygpt2/vendor/MODEL_CARD.md",
    "tinygpt2/vendor/convert.py",
    "tinygpt2/vendor/tales.tg2",
}


def copy_project(folder: Path) -> Path:
    """What the project's distributions are made of, without what was built in the checkout."""
    folder.mkdir()
    for name in SOURCES:
        copy: Callable[..., Any] = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


def pip(*arguments: object, environ: Mapping[str, str] | None = None) -> Result:
    offline = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = run([sys.executable, "-m", "pip", *arguments], {**offline, **(environ or {})})
    assert result.code == 0, result.err
    return result


def make_wheel(project: Path, out: Path, **environ: str) -> tuple[Path, str]:
    """The wheel that pip makes, and what it prints meanwhile."""
    flags = ["-v", "--no-deps", "--no-build-isolation", "--wheel-dir", out]
    result = pip("wheel", *flags, project, environ=environ)
    (wheel,) = out.iterdir()
    return wheel, result.out + result.err


def read_wheel(wheel: Path) -> dict[str, bytes]:
    """The files of the package, and the file WHEEL as "WHEEL"."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    description = files[f"tinygpt2-{VERSION}.dist-info/WHEEL"]
    files = {name: data for name, data in files.items() if ".dist-info/" not in name}
    return {**files, "WHEEL": description}


# What the distributions hold


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a small model and small kernels: what is copied and compiled is the same."""
    folder = copy_project(tmp_path / "project")
    (folder / "vendor" / "tales.tg2").write_bytes(b"a model")
    (folder / "kernels.c").write_text(SMALL_KERNELS, "utf-8")
    return folder


@needs_cc
@pytest.mark.slow
def test_a_wheel_with_the_kernels(project: Path, tmp_path: Path) -> None:
    (project / LIBRARY).write_bytes(b"a library that was built before")
    wheel, _ = make_wheel(project, tmp_path / "wheels")
    tag = f"py3-none-{build.platform_tag(build.find_compiler())}"
    assert wheel.name == f"tinygpt2-{VERSION}-{tag}.whl"
    files = read_wheel(wheel)
    description = files.pop("WHEEL").decode()
    assert f"Tag: {tag}\n" in description
    assert "Root-Is-Purelib: false\n" in description
    assert files.keys() == PURE | {f"tinygpt2/{LIBRARY}"}
    kernels = tmp_path / LIBRARY
    kernels.write_bytes(files[f"tinygpt2/{LIBRARY}"])
    assert library(kernels).tg_version().decode() == VERSION
    assert (project / LIBRARY).read_bytes() == b"a library that was built before"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"CC": "no-such-compiler"}, "cannot run no-such-compiler"),
        ({"TINYGPT2_PURE": "1"}, "TINYGPT2_PURE=1"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_pure_wheel(project: Path, tmp_path: Path, environ: dict[str, str], words: str) -> None:
    wheel, said = make_wheel(project, tmp_path / "wheels", **environ)
    assert wheel.name == f"tinygpt2-{VERSION}-py3-none-any.whl"
    files = read_wheel(wheel)
    assert b"Root-Is-Purelib: true\n" in files.pop("WHEEL")
    assert files.keys() == PURE
    for source, name in build.PACKAGE.items():
        assert files[f"tinygpt2/{name}"] == (project / source).read_bytes()
    assert "without the C kernels" in said
    assert words in said


def test_no_wheel_without_a_companion(project: Path) -> None:
    (project / "vendor" / "convert.py").unlink()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    environ = {**ENVIRONMENT, "TINYGPT2_PURE": "1"}
    result = subprocess.run(command, env=environ, cwd=project, capture_output=True, text=True)
    assert result.returncode == 1
    assert "convert.py" in result.stderr


@pytest.mark.slow
@needs_cc
def test_a_source_distribution_makes_the_same_wheel(project: Path, tmp_path: Path) -> None:
    for name in (LIBRARY, "tinygpt2"):
        (project / name).write_bytes(b"built before")
    command: list[object] = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d"]
    result = run([*command, tmp_path / "sdist"], {}, project)
    assert result.code == 0, result.err
    (path,) = (tmp_path / "sdist").iterdir()
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(SOURCES) - {"vendor"} <= names
    assert not {LIBRARY, "tinygpt2"} & names
    again, _ = make_wheel(path, tmp_path / "again")
    wheel, _ = make_wheel(project, tmp_path / "wheels")
    assert again.name == wheel.name
    assert read_wheel(again) == read_wheel(wheel)


# Installed


class Environment:
    """A virtual environment without packages, and an empty folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command: list[object] = [sys.executable, "-m", "venv", "--without-pip", folder / "venv"]
        assert run(command, {}).code == 0
        self.bin = folder / "venv" / "bin"
        self.python = self.bin / "python"
        self.outside = folder / "outside"
        self.outside.mkdir()

    def run(self, *command: object, numpy: bool = False) -> Result:
        """Run a command in the empty folder, with NumPy if asked to."""
        path = str(numpy_alone(self.folder)) if numpy else ""
        environ = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "", "PYTHONWARNINGS": "error"}
        return run(list(command), environ, self.outside)

    def output(self, *command: object, numpy: bool = False) -> str:
        """What a command prints that succeeds and says nothing on standard error."""
        result = self.run(*command, numpy=numpy)
        assert (result.code, result.err) == (0, "")
        return result.out

    def files(self) -> set[Path]:
        return {path for path in (self.folder / "venv").rglob("*") if path.is_file()}


def numpy_alone(folder: Path) -> Path:
    """A folder to import NumPy from, and nothing else that this Python has."""
    place = folder / "numpy"
    if not place.exists():
        place.mkdir()
        for path in Path(np.__file__).parent.parent.glob("numpy*"):
            (place / path.name).symlink_to(path)
    return place


class Installed(NamedTuple):
    kind: str
    environment: Environment
    source: Path
    before: set[Path]  # the environment's files before the installation

    @property
    def numpy(self) -> bool:
        """Whether it needs NumPy to generate text. With the kernels it must not."""
        return self.kind.startswith("pure")


def install(kind: str, folder: Path) -> Installed:
    """Install a copy of the project. `kind` is one of KINDS, or "pure editable"."""
    source = copy_project(folder / "project")
    environment = Environment(folder)
    before = environment.files()
    flags = ["--python", environment.python, "install", "--no-deps"]
    environ = {"TINYGPT2_PURE": "1"} if kind.startswith("pure") else {"CFLAGS": "-O0"}
    if kind.endswith("editable"):
        # pip runs the build backend in the environment. It finds this Python's hatchling there.
        environ["PYTHONPATH"] = str(Path(pytest.__file__).parent.parent)
        flags += ["--no-build-isolation", "--editable"]
        pip(*flags, source, environ=environ)
    else:
        wheel, _ = make_wheel(source, folder / "wheels", **environ)
        pip(*flags, wheel)
    return Installed(kind, environment, source, before)


KINDS = [
    pytest.param("wheel", marks=needs_cc),
    pytest.param("editable", marks=needs_cc),
    "pure wheel",
]


@pytest.fixture(scope="module", params=KINDS)
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    return install(request.param, tmp_path_factory.mktemp("installed"))


@pytest.mark.slow
def test_import_from_outside(installed: Installed) -> None:
    environment = installed.environment
    code = "import tinygpt2; print(tinygpt2.__version__, tinygpt2.__file__)"
    version, file = environment.output(environment.python, "-c", code).split()
    assert version == VERSION
    if installed.kind == "editable":
        assert Path(file).resolve() == (installed.source / "tinygpt2.py").resolve()
    else:
        (expected,) = (environment.folder / "venv").rglob("site-packages/tinygpt2/__init__.py")
        assert Path(file).resolve() == expected.resolve()


@pytest.mark.slow
def test_three_ways_to_the_default_model(installed: Installed) -> None:
    environment, numpy = installed.environment, installed.numpy
    code = """
import tinygpt2
with tinygpt2.load() as model:
    print(model.generate("The king", max_new_tokens=8, temperature=0))
"""
    expected = environment.output(environment.python, "-c", code, numpy=numpy)
    with tinygpt2.load() as model:
        assert expected == model.generate("The king", max_new_tokens=8, temperature=0) + "\n"
    flags = ["--prompt", "The king", "--max-tokens", "8", "--temperature", "0"]
    command = [environment.bin / "tinygpt2", *flags]
    assert environment.output(*command, numpy=numpy) == expected
    module = [environment.python, "-m", "tinygpt2", *flags]
    assert environment.output(*module, numpy=numpy) == expected


@pytest.mark.slow
def test_exit_codes_reach_the_shell(installed: Installed) -> None:
    environment = installed.environment
    for command in ([environment.bin / "tinygpt2"], [environment.python, "-m", "tinygpt2"]):
        assert environment.output(*command, "--version") == f"tinygpt2 {VERSION}\n"
        result = environment.run(*command, "--top-k=x")
        assert result.code == 2
        assert result.err.startswith("usage: tinygpt2 ")
        missing = environment.run(*command, "info", "no-such-file.tg2")
        assert missing.code == 1
        assert missing.err.startswith("tinygpt2: error: no-such-file.tg2")


@pytest.mark.slow
def test_the_kernels_are_beside_the_module(installed: Installed) -> None:
    environment = installed.environment
    code = """
import tinygpt2
with tinygpt2.load() as model:
    print(model.backend.name, tinygpt2.__file__)
"""
    numpy = installed.numpy
    name, file = environment.output(environment.python, "-c", code, numpy=numpy).split()
    assert name == ("numpy" if numpy else "c")
    assert (Path(file).parent / LIBRARY).exists() == (name == "c")


@pytest.mark.slow
def test_the_converter_is_found(installed: Installed, toy_path: Path) -> None:
    environment = installed.environment
    write_checkpoint(environment.outside / "checkpoint")
    convert = ["convert", "checkpoint", "-o", "converted.tg2"]
    assert environment.output(environment.bin / "tinygpt2", *convert, numpy=True) == ""
    converted = environment.outside / "converted.tg2"
    assert converted.read_bytes() == toy_path.read_bytes()
    code = "import tinygpt2; tinygpt2.convert('checkpoint', 'again.tg2')"
    assert environment.output(environment.python, "-c", code, numpy=True) == ""
    assert (environment.outside / "again.tg2").read_bytes() == toy_path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pure wheel", "pure editable"])
def test_uninstalling_leaves_nothing(kind: str, tmp_path: Path) -> None:
    environment, source, before = install(kind, tmp_path)[1:]
    sources = {path for path in source.rglob("*") if "__pycache__" not in path.parts}
    write_checkpoint(environment.outside / "checkpoint")
    convert = ["convert", "checkpoint", "-o", "converted.tg2"]
    environment.output(environment.python, "-m", "tinygpt2", *convert, numpy=True)
    assert environment.files() > before
    pip("--python", environment.python, "uninstall", "--yes", "tinygpt2")
    assert environment.files() == before
    assert not list((tmp_path / "venv").rglob("*tinygpt2*"))
    assert sources == {path for path in source.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_an_editable_install_follows_the_source(tmp_path: Path) -> None:
    environment, source, before = install("pure editable", tmp_path)[1:]
    added = {path.name for path in environment.files() - before}
    assert {name for name in added if name.endswith((".py", ".tg2", ".so", ".dylib"))} == set()
    code = "import tinygpt2; print(getattr(tinygpt2, 'ADDED', 'nothing'))"
    assert environment.output(environment.python, "-c", code) == "nothing\n"
    for value in ("first", "second one"):
        text = (ROOT / "tinygpt2.py").read_text("utf-8")
        (source / "tinygpt2.py").write_text(f"{text}\nADDED = {value!r}\n", "utf-8")
        assert environment.output(environment.python, "-c", code) == f"{value}\n"


# Types, as a program that uses the package sees them

RIGHT = """\
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import numpy as np

import tinygpt2

tinygpt2.load("a.tg2", backend=None, threads=None)
tinygpt2.load(Path("a.tg2"), backend="c", threads=np.int64(2))
model: tinygpt2.Model = tinygpt2.load(None, backend="numpy", threads=2)

text: str = model.generate(
    "prompt",
    max_new_tokens=np.int64(5),
    temperature=np.float32(0.5),
    top_k=np.int32(3),
    top_p=np.float64(0.9),
    min_p=np.float16(0),
    repetition_penalty=np.float32(1.1),
    logit_bias={5: -math.inf},
    stop=["one", "two"],
    seed=np.uint64(3),
)
text = model.generate(
    [1, 2],
    max_new_tokens=None,
    temperature=None,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=None,
    logit_bias=None,
    stop=None,
    seed=None,
)
text = model.generate("prompt", max_new_tokens=5, temperature=0, top_k=3, top_p=1, stop="end")
pieces: Iterator[str] = model.stream("prompt", temperature=0.5, seed=1)
ids: list[int] = model.generate_ids(np.array([1, 2]), max_new_tokens=5, top_k=np.int64(3))
more: Iterator[int] = model.stream_ids(model.encode("prompt"), min_p=0.1)
result: tinygpt2.Result = model.complete("prompt", max_new_tokens=5, seed=1)
text = result.text or ""
seed: int = result.seed
ids, reason, logprobs = result.ids, result.finish_reason, result.logprobs
best: float = max(logprobs or [])
total: float = model.score("prompt").total
columns: int = model.logits(ids).shape[1]

with model.session() as session:
    session.feed("prompt")
    session.rewind(2)
    session.rewind(np.int64(2))
    text = session.generate(max_new_tokens=np.int64(5), temperature=None, stop="end")
    answer = session.stream(top_p=np.float32(0.9))
    for piece in answer:
        text += piece
    ended: Optional[str] = answer.finish_reason
    ids = session.generate_ids(repetition_penalty=1.1)
    more = session.stream_ids(logit_bias={1: 2.5})
    result = session.complete("more", seed=1)
    fork: tinygpt2.Session = copy.copy(session)
    fork = session.fork()
    length: int = len(fork)
"""
WRONG = """\
import tinygpt2

tinygpt2.load(threads="four")  # wrong
tinygpt2.load(backend="cuda")  # wrong
model = tinygpt2.load()
model.generate("x", temprature=1)  # wrong
model.stream("x", stop=1)  # wrong
model.complete("x").txt  # wrong
number: int = model.generate("x")  # wrong
session = model.session()
session.rewind("x")  # wrong
session.generate(max_tokens=5)  # wrong
session.complete(seed="1")  # wrong
"""


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("mypy"), reason="checks types with mypy")
def test_types_from_outside(tmp_path: Path) -> None:
    """mypy sees the installed package as a user's does: it reads the annotations and py.typed."""
    environment = install("pure wheel", tmp_path).environment
    for name, program in {"right.py": RIGHT, "wrong.py": WRONG}.items():
        (environment.outside / name).write_text(program, "utf-8")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache"]
    mypy += ["--python-executable", environment.python, "right.py", "wrong.py"]
    result = run(mypy, {"PYTHONPATH": str(numpy_alone(tmp_path))}, environment.outside)
    found = re.findall(r"^(\w+\.py:\d+): error:", result.out, re.MULTILINE)
    lines = enumerate(WRONG.splitlines(), 1)
    assert found == [f"wrong.py:{i}" for i, line in lines if "# wrong" in line], result
