"""build.py: what it compiles, and what it says when it cannot.

The compilers are real. Where only their handling is tested they compile a small project, a copy of
build.py beside a tinygpt2.py and a kernels.c of a few lines, since it is faster.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ENVIRONMENT, ROOT, VARIABLES, Result, build, is_there, needs, needs_cc, run

import tinygpt2

pytestmark = pytest.mark.slow

LIBRARY = "tinygpt2_kernels.dylib" if sys.platform == "darwin" else "tinygpt2_kernels.so"
ZIG = f"{shlex.quote(sys.executable)} -m ziglang cc"
EM_AARCH64 = 183
SMALL_MODULE = """\
__version__ = "4.5.6"


def answer(question: int) -> int:
    return question + 40
"""
SMALL_KERNELS = """\
#include <stddef.h>
#define EXPORT __attribute__((visibility("default")))
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#ifdef TG_ISA
int JOIN(sum_, TG_ISA)(void) { return 0; }
#else
EXPORT const char *tg_isa_name(const char *wanted);
EXPORT const char *tg_version(void);
const char *tg_isa_name(const char *wanted) { return wanted == NULL ? "fastest" : NULL; }
const char *tg_version(void) { return TG_VERSION; }
#endif
"""
SMALL_COMMAND = """\
#include "../kernels.c"
#include <stdio.h>
int main(void) { return printf("alone %s\\n", tg_version()) < 0; }
"""


def run_build(
    folder: Path, *arguments: object, python: Path | str = sys.executable, **environ: str
) -> Result:
    return run([python, folder / "build.py", *arguments], environ)


# In its first seconds on a machine, zig compiles parts of its own.
COMPILERS = [needs("gcc"), needs("clang")]
COMPILERS += [pytest.param("ziglang", marks=[*needs("ziglang").marks, pytest.mark.slow])]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]), "utf-8")
    path.chmod(0o755)
    return path


def library(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for function in (loaded.tg_isa_name, loaded.tg_version):
        function.restype = ctypes.c_char_p
    loaded.tg_isa_name.argtypes = [ctypes.c_char_p]
    return loaded


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "small project"
    (folder / "vendor").mkdir(parents=True)
    shutil.copy(ROOT / "build.py", folder)
    (folder / "tinygpt2.py").write_text(SMALL_MODULE, "utf-8")
    (folder / "kernels.c").write_text(SMALL_KERNELS, "utf-8")
    (folder / "vendor" / "tinygpt2.c").write_text(SMALL_COMMAND, "utf-8")
    return folder


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without packages, and so without ziglang and mypyc."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


# The library


class Kernels(NamedTuple):
    instruction_sets: set[str]
    objects: list[Path]
    library: Path
    warnings: str


@pytest.fixture(scope="module", params=COMPILERS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The project's own kernels, as build.py compiles and links them, and the objects too."""
    folder = tmp_path_factory.mktemp("kernels")
    warnings = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(warnings):
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("CC", ZIG if request.param == "ziglang" else request.param)
        compiler = build.find_compiler()
        objects = build.compile_objects(compiler, folder)
        build.link(compiler, objects, folder / LIBRARY, ["-shared"])
    return Kernels(set(compiler.instruction_sets), objects, folder / LIBRARY, warnings.getvalue())


def test_the_kernels(kernels: Kernels) -> None:
    assert kernels.warnings == ""
    loaded = library(kernels.library)
    assert loaded.tg_version().decode() == tinygpt2.__version__
    assert loaded.tg_isa_name(b"portable") == b"portable"
    assert loaded.tg_isa_name(b"abacus") is None
    assert {path.stem for path in kernels.objects} == kernels.instruction_sets | {"common"}
    for isa in kernels.instruction_sets:  # NULL: this processor has no such instructions
        assert loaded.tg_isa_name(isa.encode()) in (isa.encode(), None)


@pytest.mark.skipif(not is_there("nm"), reason="needs nm")
def test_only_the_interface_is_exported(kernels: Kernels) -> None:
    lines = run(["nm", "-D", "--defined-only", kernels.library], {}).out.splitlines()
    exported = {line.split()[-1].lstrip("_") for line in lines}
    assert {name for name in exported if not name.startswith("tg_")} <= {"init", "fini"}
    assert {"tg_isa_name", "tg_version"} <= exported


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 machine code")
@pytest.mark.skipif(not is_there("objdump"), reason="needs objdump")
def test_portable_code_is_for_every_x86(kernels: Kernels) -> None:
    assert {"avx512", "avx2", "portable"} <= kernels.instruction_sets
    for path in kernels.objects:
        code = run(["objdump", "-d", path], {}).out
        assert ("%ymm" in code or "%zmm" in code) == path.name.startswith("avx"), path.name
        assert "%zmm" not in code or path.name == "avx512.o", path.name


@pytest.mark.skipif(not is_there("aarch64-linux-gnu-gcc"), reason="needs aarch64-linux-gnu-gcc")
def test_the_kernels_for_another_architecture(tmp_path: Path) -> None:
    result = run_build(ROOT, "--output", tmp_path, CC="aarch64-linux-gnu-gcc")
    assert (result.code, result.err) == (0, "")
    assert "contains  neon, portable\n" in result.out
    header = (tmp_path / "tinygpt2_kernels.so").read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == EM_AARCH64
    if platform.machine() == "x86_64":
        assert "chosen    nothing: this machine cannot load it" in result.out


@needs_cc
def test_it_says_what_it_built(small: Path) -> None:
    result = run_build(small)
    first, second, third, last = result.out.splitlines()
    size = (small / LIBRARY).stat().st_size
    assert first.startswith(f"built     {small / LIBRARY}, {size:,} bytes, ")
    assert second.startswith("compiler  ")
    assert third == f"contains  {', '.join(build.find_compiler().instruction_sets)}"
    assert last == "chosen    fastest on this machine"
    assert library(small / LIBRARY).tg_version() == b"4.5.6"


# The compiler


@pytest.mark.parametrize(
    ("there", "chosen"), [("cc gcc clang", "cc"), ("clang gcc", "gcc"), ("clang", "clang")]
)
def test_the_first_compiler_on_the_path(
    small: Path, tmp_path: Path, there: str, chosen: str
) -> None:
    if not is_there("cc"):
        pytest.skip("needs a C compiler called cc")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in there.split():
        write_script(folder / name, f'PATH="{ENVIRONMENT["PATH"]}" exec cc "$@"')
    result = run_build(small, PATH=str(folder))
    assert f"compiler  {folder / chosen}: " in result.out


@pytest.mark.skipif(not is_there("ziglang"), reason="needs the package ziglang")
def test_the_package_ziglang_where_no_compiler_is_on_the_path(small: Path, tmp_path: Path) -> None:
    result = run_build(small, PATH=str(tmp_path))
    assert (result.code, result.err) == (0, "")
    assert " -m ziglang cc: " in result.out
    assert "fastest on this machine" in result.out


@needs_cc
def test_flags_of_the_user_and_the_order_of_all(small: Path, tmp_path: Path) -> None:
    """$CC may have arguments; $CFLAGS comes after our flags, and the contract after all."""
    log = tmp_path / "log"
    script = write_script(tmp_path / "my cc", f"echo \"$@\" >>'{log}'", 'exec cc "$@"')
    given = {"CC": f"'{script}' -DONE", "CFLAGS": "-O1 '-DTWO=a b'", "LDFLAGS": "-DTHREE"}
    assert run_build(small, "--sanitize", "undefined", **given).code == 0
    lines = [line for line in log.read_text("utf-8").splitlines() if " -o " in line]
    assert len(lines) == len(build.find_compiler().instruction_sets) + 2
    for line in lines:
        parts = ["-DONE", "-std=c11", "-fsanitize=undefined", "-O1 -DTWO=a b", "-ffp-contract=off"]
        places = [line.index(part) for part in parts]
        assert places == sorted(places)
        assert line.index("-fno-fast-math") > line.index("-DTWO")
    assert ["-DTHREE" in line for line in lines] == ["-shared" in line for line in lines]
    assert sum("TG_ISA" in line for line in lines) == len(lines) - 2


ARITHMETIC = """\
#include <float.h>
float fused(float a, float b, float c) { return a * b + c; }
float reordered(float a, float b) { return a + b - a; }
float halved(float a) { return a / 2; }
"""


@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-funsafe-math-optimizations"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_flags_of_the_user_change_the_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, flag: str
) -> None:
    source = tmp_path / "arithmetic.c"
    source.write_text(ARITHMETIC, "utf-8")
    monkeypatch.setenv("CC", ZIG if compiler == "ziglang" else compiler)
    monkeypatch.setenv("CFLAGS", f"{flag} -ffp-contract=fast -march=native")
    monkeypatch.setenv("LDFLAGS", flag)
    chosen = build.find_compiler()
    target = tmp_path / "arithmetic.so"
    build.link(chosen, [source], target, ["-shared", "-fvisibility=default"])
    code = """
import ctypes, sys
def function(name, *arguments):
    f = getattr(ctypes.CDLL(sys.argv[1]), name)
    f.restype, f.argtypes = ctypes.c_float, [ctypes.c_float] * len(arguments)
    return f(*arguments)
print(function("fused", 1 + 2**-12, 1 + 2**-12, -1 - 2**-11), function("reordered", 1e8, 1))
print(function("halved", 2.0**-140) == 2.0**-141)
"""
    assert run([sys.executable, "-c", code, target], {}).out == "0.0 0.0\nTrue\n"


# What cannot be built


def failing(
    small: Path, *arguments: object, python: Path | str = sys.executable, **environ: str
) -> str:
    """The message of a build that fails; what was there before must not be touched."""
    (small / LIBRARY).write_bytes(b"the old one")
    before = names(small)
    result = run_build(small, *arguments, python=python, **environ)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("build.py: error: ")
    assert names(small) == before
    assert (small / LIBRARY).read_bytes() == b"the old one"
    return result.err


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"CC": "false"}, "false -dumpmachine\nfailed with exit code 1\n"),
        ({"CC": "true"}, "true is no C compiler like gcc or clang"),
        ({"CC": "no-such-compiler -O2"}, "cannot run no-such-compiler: No such file or directory"),
        ({"CFLAGS": "-no-such-flag"}, "-no-such-flag"),
        ({"CFLAGS": "-include no-such-file.h"}, "no-such-file.h"),
        ({"LDFLAGS": "-lno-such-library"}, "-lno-such-library"),
    ],
    ids=str,
)
@needs_cc
def test_a_failed_compile(small: Path, environ: dict[str, str], words: str) -> None:
    message = failing(small, **environ)
    assert words in message
    assert "CC=clang" in message
    assert "tinygpt2.py computes in NumPy" in message


@pytest.mark.parametrize("name", ["CC", "CFLAGS", "LDFLAGS"])
@needs_cc
def test_a_variable_with_an_open_quotation(small: Path, name: str) -> None:
    assert failing(small, **{name: "-O2 'x"}).endswith(f"${name} is -O2 'x: No closing quotation\n")


def test_the_compilers_message_is_shown(small: Path, tmp_path: Path) -> None:
    script = write_script(
        tmp_path / "broken", 'case "$1" in -dumpmachine|--version) echo x86_64-linux-gnu; exit;;',
        "esac", "echo kernels.c:7: error: the disk is full of eels >&2", "exit 3",
    )  # fmt: skip
    message = failing(small, CC=str(script))
    assert "kernels.c:7: error: the disk is full of eels\nfailed with exit code 3\n" in message


@needs_cc
def test_an_error_in_the_source(small: Path) -> None:
    (small / "kernels.c").write_text("int f(void) { return oops; }\n", "utf-8")
    assert "oops" in failing(small)


@pytest.mark.parametrize("name", ["kernels.c", "tinygpt2.py"])
@needs_cc
def test_a_source_is_missing(small: Path, name: str) -> None:
    (small / name).unlink()
    assert name in failing(small)


@needs_cc
def test_no_version(small: Path) -> None:
    (small / "tinygpt2.py").write_text("version = 3\n", "utf-8")
    assert 'tinygpt2.py has no line __version__ = "..."' in failing(small)


def test_no_compiler(small: Path, tmp_path: Path, bare_python: Path) -> None:
    message = failing(small, python=bare_python, PATH=str(tmp_path))
    assert "no C compiler found" in message
    for word in ("apt install", "dnf install", "apk add", "xcode-select", "pip install ziglang"):
        assert word in message
    assert "tinygpt2.py computes in NumPy" in message


@needs_cc
def test_a_folder_that_cannot_be_written(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "file" in failing(small, "--output", tmp_path / "file" / "folder")


@needs_cc
def test_a_new_library_leaves_the_old_one_to_who_uses_it(small: Path) -> None:
    run_build(small)
    old = library(small / LIBRARY)
    with open(small / LIBRARY, "rb") as file:
        before = file.read()
        (small / "tinygpt2.py").write_text(SMALL_MODULE.replace("4.5.6", "7.8.9"), "utf-8")
        run_build(small)
        file.seek(0)
        assert file.read() == before
    assert old.tg_version() == b"4.5.6"
    assert b"7.8.9" in (small / LIBRARY).read_bytes()
    assert stat.S_IMODE((small / LIBRARY).stat().st_mode) & 0o555 == 0o555


# The command, the compiled module, cleaning up


@needs_cc
def test_standalone(small: Path, tmp_path: Path) -> None:
    result = run_build(small, "--standalone", "--output", tmp_path / "new" / "folder")
    assert (result.code, result.err) == (0, "")
    assert names(tmp_path / "new" / "folder") == {"tinygpt2"}
    command = tmp_path / "new" / "folder" / "tinygpt2"
    assert f"run it    {command} --model MODEL.tg2" in result.out
    assert run([command], {}) == (0, "alone 4.5.6\n", "")


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mypyc", "setuptools"))),
    reason="needs mypyc and setuptools",
)
def test_mypyc(small: Path) -> None:
    before = names(small)
    result = run_build(small, "--mypyc")
    assert (result.code, result.err) == (0, "")
    module = f"tinygpt2{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert names(small) - before == {module}
    assert "after an edit" in result.out
    code = "import tinygpt2; print(tinygpt2.__file__, tinygpt2.answer(2))"
    assert run([sys.executable, "-c", code], {}, small).out == f"{small / module} 42\n"


def test_mypyc_is_not_installed(small: Path, bare_python: Path) -> None:
    message = failing(small, "--mypyc", python=bare_python)
    assert message == ("build.py: error: mypyc is not installed: pip install mypy setuptools\n")


def test_clean(small: Path, tmp_path: Path) -> None:
    sources = names(small)
    built = [LIBRARY, "tinygpt2", "tinygpt2.cpython-39-x86_64-linux-gnu.so", "tinygpt2.cp39.pyd"]
    for name in built:
        (small / name).write_bytes(b"")
    assert run_build(small, "--clean", "--output", tmp_path).out.startswith("removed   nothing")
    result = run_build(small, "--clean")
    assert result.code == 0
    assert all(str(small / name) in result.out for name in built)
    assert names(small) == sources
    assert run_build(small, "--clean") == (0, "removed   nothing: nothing was built\n", "")


@pytest.mark.parametrize("flags", [["--clean", "--mypyc"], ["--standalone", "--mypyc"], ["all"]])
def test_wrong_usage(small: Path, flags: list[str]) -> None:
    result = run_build(small, *flags)
    assert (result.code, result.out) == (2, "")
    assert "usage: build.py" in result.err


# The wheel's name. tests/test_install.py tests the wheel.


@pytest.mark.parametrize(
    ("target", "macos", "tag"),
    [
        ("x86_64-linux-gnu", "", "linux_x86_64"),
        ("x86_64-alpine-linux-musl", "", "linux_x86_64"),
        ("aarch64-linux-gnu", "", "linux_aarch64"),
        ("arm64-apple-darwin22.1.0", "", "macosx_11_0_arm64"),
        ("arm64-apple-darwin22.1.0", "12.3", "macosx_12_0_arm64"),
        ("x86_64-apple-darwin22.1.0", "10.15", "macosx_10_15_x86_64"),
        ("aarch64-unknown-macos", "13", "macosx_13_0_arm64"),
    ],
)
def test_platform_tag(monkeypatch: pytest.MonkeyPatch, target: str, macos: str, tag: str) -> None:
    monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", macos)
    assert build.platform_tag(build.Compiler(["cc"], target, "")) == tag
