"""Builds the compiled parts of tinygpt2. It needs a C compiler and nothing else.

    python build.py                  the C kernels: tinygpt2_kernels.so beside tinygpt2.py
    python build.py --standalone     the command ./tinygpt2, which needs no Python
    python build.py --mypyc          tinygpt2.py itself, compiled (needs mypy and setuptools)
    python build.py --clean          removes everything that was built

The compiler is $CC, else the first of cc, gcc and clang that is installed, else the one in the
package `ziglang`. $CFLAGS and $LDFLAGS are added. The compiler decides the target: with
CC=aarch64-linux-gnu-gcc the kernels are those for 64-bit Arm.

kernels.c is compiled once for its common part and once per instruction set (TG_ISA), and all is
linked into one library that chooses when it is loaded. In the command, vendor/tinygpt2.c, which
includes kernels.c, takes the place of the common part. Whatever $CFLAGS says, no compiler may
reorder or fuse arithmetic: every instruction set must give the same bits.

`pip install .` also uses this file: hatchling loads it and calls WheelHook, last in the file. The
wheel holds the package tinygpt2/ with the kernels inside, one wheel for all versions of Python.
Without a compiler, or with TINYGPT2_PURE=1 in the environment, the wheel is pure Python. An
editable install copies nothing: it uses this folder, and the kernels are built in it.

SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent
LIBRARY = "tinygpt2_kernels"
FLAGS = ["-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
CONTRACT = ["-fno-fast-math", "-fno-unsafe-math-optimizations", "-fno-math-errno"]
CONTRACT += ["-ffp-contract=off"]
INSTRUCTION_SETS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "avx512": ["-mavx512f", "-mavx2", "-mfma"],
        "avx2": ["-mavx2", "-mfma"],
        "portable": [],
    },
    "aarch64": {"neon": [], "portable": []},
}
SUFFIXES = {"darwin": ".dylib", "windows": ".dll"}
BUILT = [f"{LIBRARY}{suffix}" for suffix in (".so", *SUFFIXES.values())]
BUILT += ["tinygpt2", "tinygpt2.exe", "tinygpt2.*.so", "tinygpt2.*.pyd"]
NO_COMPILER = """\
no C compiler found: looked for $CC, cc, gcc, clang and the Python package ziglang.
Install one of them and run this again:
    Debian, Ubuntu   apt install gcc libc6-dev
    Fedora           dnf install gcc
    Alpine           apk add gcc musl-dev
    macOS            xcode-select --install
    anywhere         pip install ziglang
Until then tinygpt2.py computes in NumPy."""
ADVICE = """\
Nothing was replaced. CC=... chooses another compiler (CC=clang, or `pip install ziglang` and
CC="python -m ziglang cc"); without the kernels tinygpt2.py computes in NumPy."""


class BuildError(Exception):
    """Says what went wrong and what to do."""


def run(command: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command. If it fails, raise a BuildError with all its output."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror}") from None
    if done.returncode:
        said = f"{shlex.join(command)}\n{done.stdout}{done.stderr}".rstrip()
        raise BuildError(f"{said}\nfailed with exit code {done.returncode}")
    return done


def run_compiler(command: Sequence[str]) -> str:
    """Run the compiler, pass its warnings on, and return what it prints."""
    try:
        done = run(command)
    except BuildError as error:
        raise BuildError(f"{error}\n{ADVICE}") from None
    sys.stderr.write(done.stderr)
    return done.stdout


def variable(name: str) -> list[str]:
    """The words of an environment variable."""
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError as error:
        raise BuildError(f"${name} is {os.environ[name]}: {error}") from None


# The compiler


class Compiler(NamedTuple):
    command: list[str]
    target: str  # such as x86_64-linux-gnu
    version: str

    @property
    def arch(self) -> str:
        arch = self.target.split("-")[0]
        return {"amd64": "x86_64", "arm64": "aarch64"}.get(arch, arch)

    @property
    def system(self) -> str:
        names = {"darwin": "darwin", "macos": "darwin", "windows": "windows", "mingw": "windows"}
        return next((names[name] for name in names if name in self.target), "other")

    @property
    def instruction_sets(self) -> dict[str, list[str]]:
        return INSTRUCTION_SETS.get(self.arch, {"portable": []})

    @property
    def flags(self) -> list[str]:
        flags = [*FLAGS, f'-DTG_VERSION="{read_version()}"']
        if any("zig" in Path(word).name for word in self.command):
            flags += ["-mcpu=baseline", "-g0"]  # its defaults: this CPU, and debug data
        if self.system == "darwin":
            flags += [f"-mmacosx-version-min={macos_version()}"]
        return flags


def find_compiler() -> Compiler:
    """The compiler to use, with the target and version that it reports."""
    command = variable("CC") or compiler_on_path() or compiler_in_package()
    target = run_compiler([*command, "-dumpmachine"]).strip()
    if not target:
        raise BuildError(f"{shlex.join(command)} is no C compiler like gcc or clang.\n{ADVICE}")
    version, *_ = run_compiler([*command, "--version"]).splitlines() or ["unknown version"]
    return Compiler(command, target, version)


def compiler_on_path() -> list[str]:
    return [path for path in map(shutil.which, ("cc", "gcc", "clang")) if path][:1]


def compiler_in_package() -> list[str]:
    """The one in the package ziglang. -E: `pip install .` hides packages through PYTHONPATH."""
    python = [sys.executable, "-E"]
    try:
        run([*python, "-c", "import ziglang"])
    except BuildError:
        raise BuildError(NO_COMPILER) from None
    return [*python, "-m", "ziglang", "cc"]


def macos_version() -> str:
    return os.environ.get("MACOSX_DEPLOYMENT_TARGET") or "11.0"


def read_version() -> str:
    text = (ROOT / "tinygpt2.py").read_text("utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if not found:
        raise BuildError(f'{ROOT / "tinygpt2.py"} has no line __version__ = "..."')
    return found[1]


# Compiling and linking


def call(compiler: Compiler, flags: Iterable[str], rest: Iterable[str]) -> None:
    """Run the compiler. Later flags override earlier ones, so CONTRACT comes last."""
    user = without_ofast("CFLAGS")
    run_compiler([*compiler.command, *compiler.flags, *flags, *user, *rest, *CONTRACT])


def without_ofast(name: str) -> list[str]:
    """The words of a variable, with -O3 for -Ofast.

    No later flag undoes -Ofast: a library that is linked with it turns on flush-to-zero in every
    process that loads it.
    """
    return ["-O3" if flag == "-Ofast" else flag for flag in variable(name)]


def compile_objects(
    compiler: Compiler, folder: Path, flags: Sequence[str] = (), common: str = "kernels.c"
) -> list[Path]:
    """Compile kernels.c into one object per instruction set and one for what they share.

    `flags` are added everywhere. `common` is the source of the shared part: kernels.c, or one that
    includes it.
    """
    parts = {
        isa: [f"-DTG_ISA={isa}", *isa_flags] for isa, isa_flags in compiler.instruction_sets.items()
    }
    parts["common"] = []

    def compile_part(name: str) -> Path:
        out = folder / f"{name}.o"
        source = str(ROOT / (common if name == "common" else "kernels.c"))
        call(compiler, [*flags, *parts[name]], ["-c", source, "-o", str(out)])
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_part, parts))


def link(
    compiler: Compiler, objects: Sequence[Path], target: Path, flags: Sequence[str] = ()
) -> None:
    files = [*map(str, objects), "-o", str(target), "-lm"]
    call(compiler, flags, [*files, *without_ofast("LDFLAGS")])


@contextlib.contextmanager
def temporary_folder(output: Path) -> Iterator[Path]:
    """A temporary folder inside `output`, so that a rename moves the result there in one step."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=output) as folder:
        yield Path(folder)


def move(result: Path, output: Path) -> Path:
    """Replace the old file. A process that has it open keeps the old one."""
    os.replace(result, output / result.name)
    return output / result.name


def build_kernels(
    compiler: Compiler, output: Path, flags: Sequence[str] = (), standalone: bool = False
) -> Path:
    """The library for tinygpt2.py to load, or the command."""
    suffix = ".exe" if compiler.system == "windows" else ""
    name = f"tinygpt2{suffix}" if standalone else LIBRARY + SUFFIXES.get(compiler.system, ".so")
    with temporary_folder(output) as folder:
        common = "vendor/tinygpt2.c" if standalone else "kernels.c"
        objects = compile_objects(compiler, folder, flags, common)
        link(compiler, objects, folder / name, [*flags, *([] if standalone else ["-shared"])])
        return move(folder / name, output)


def build_module(output: Path) -> Path:
    """tinygpt2.py as an extension module of this Python."""
    if not all(map(importlib.util.find_spec, ("mypyc", "setuptools"))):
        raise BuildError("mypyc is not installed: pip install mypy setuptools")
    name = f"tinygpt2{sysconfig.get_config_var('EXT_SUFFIX')}"
    with temporary_folder(output) as folder:
        shutil.copy(ROOT / "tinygpt2.py", folder)
        run([sys.executable, "-m", "mypyc", "tinygpt2.py"], cwd=folder)
        return move(folder / name, output)


def clean(output: Path) -> list[Path]:
    found = [path for pattern in BUILT for path in output.glob(pattern) if path.is_file()]
    for path in found:
        path.unlink()
    return found


# The command line


def chosen(library: Path) -> str:
    """Ask the new library which instruction set it uses on this machine."""
    try:
        tg_isa_name = ctypes.CDLL(str(library)).tg_isa_name
    except (OSError, AttributeError) as error:
        return f"nothing: this machine cannot load it ({error})"
    tg_isa_name.argtypes, tg_isa_name.restype = [ctypes.c_char_p], ctypes.c_char_p
    name = tg_isa_name(None)
    wanted = os.environ.get("TINYGPT2_ISA", "")
    none = f"nothing: TINYGPT2_ISA is {wanted!r}, which this machine or the library does not have"
    return f"{name.decode()} on this machine" if name else none


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="build.py", description="Compiles the C kernels of tinygpt2, or one of:"
    )
    what = parser.add_mutually_exclusive_group()
    for flag, text in {
        "--standalone": "the command ./tinygpt2, which needs no Python",
        "--mypyc": "tinygpt2.py itself, as an extension module of this Python",
        "--clean": "remove all that was built",
    }.items():
        what.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--output", type=Path, default=ROOT, metavar="FOLDER", help="default: here")
    parser.add_argument("--sanitize", metavar="LIST", help="address,undefined or thread; to debug")
    return parser.parse_args(arguments)


def build_c(output: Path, standalone: bool, sanitize: str | None) -> None:
    """Build the library or the command, and print what came out."""
    started = time.monotonic()
    compiler = find_compiler()
    flags = f"-fsanitize={sanitize} -g1 -O1 -fno-omit-frame-pointer".split() if sanitize else []
    path = build_kernels(compiler, output, flags, standalone)
    print(f"built     {path}, {path.stat().st_size:,} bytes, {time.monotonic() - started:.1f} s")
    print(f"compiler  {shlex.join(compiler.command)}: {compiler.version}, for {compiler.target}")
    print(f"contains  {', '.join(compiler.instruction_sets)}")
    if standalone:
        print(f'run it    {shlex.quote(str(path))} --model MODEL.tg2 --ids "15496 995" --text')
    elif not sanitize:  # the sanitizers' runtime must be loaded before Python
        print(f"chosen    {chosen(path)}")


def build_mypyc(output: Path) -> None:
    path = build_module(output)
    print(f"built     {path}, {path.stat().st_size:,} bytes")
    print("note      Python imports this now and not the tinygpt2.py beside it: after an edit")
    print("          build again, or remove it with `python build.py --clean`")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    output = options.output.resolve()
    try:
        if options.clean:
            removed = ", ".join(map(str, clean(output)))
            print(f"removed   {removed or 'nothing: nothing was built'}")
        elif options.mypyc:
            build_mypyc(output)
        else:
            build_c(output, options.standalone, options.sanitize)
    except (BuildError, OSError) as error:
        print(f"build.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


# The wheel

# The places in the package are those in the checkout: tinygpt2.py looks for vendor/ and for the
# kernels beside itself.
PACKAGE = {
    "tinygpt2.py": "__init__.py",
    "vendor/MODEL_CARD.md": "vendor/MODEL_CARD.md",
    "vendor/convert.py": "vendor/convert.py",
    "vendor/tales.tg2": "vendor/tales.tg2",
}
MAIN = '''\
"""Runs the command line: `python -m tinygpt2`."""

import sys

from tinygpt2 import main

if __name__ == "__main__":
    sys.exit(main())
'''
GENERATED = {"__main__.py": MAIN, "py.typed": ""}  # py.typed: type checkers use the annotations


def package_files(folder: Path) -> dict[Path, str]:
    """Every file of the package but the kernels, with its path in the wheel.

    Those that no file of the project holds are written into `folder`.
    """
    for name, text in GENERATED.items():
        (folder / name).write_text(text, "utf-8")
    files = {ROOT / source: name for source, name in PACKAGE.items()}
    files |= {folder / name: name for name in GENERATED}
    return {source: f"tinygpt2/{name}" for source, name in files.items()}


def platform_tag(compiler: Compiler) -> str:
    """The platform that the compiler compiles for, as wheels name it."""
    if compiler.system == "darwin":
        major, minor = [*macos_version().split("."), "0"][:2]
        arch = "arm64" if compiler.arch == "aarch64" else compiler.arch
        return f"macosx_{major}_{minor if major == '10' else 0}_{arch}"
    if "linux" in compiler.target and compiler.arch in INSTRUCTION_SETS:
        return f"linux_{compiler.arch}"
    return re.sub(r"\W", "_", sysconfig.get_platform())


if "hatchling" in sys.modules:  # it is hatchling that loads this file
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class WheelHook(BuildHookInterface[Any]):
        """Makes the package of a wheel, or the kernels of an editable install."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            self.folder = tempfile.TemporaryDirectory()
            if version == "editable":
                self.build(ROOT)
            else:
                self.fill(build_data, Path(self.folder.name))

        def build(self, output: Path) -> tuple[Compiler, Path] | None:
            """The compiler and the kernels that it made; None if they cannot be built."""
            try:
                if os.environ.get("TINYGPT2_PURE") == "1":
                    raise BuildError("TINYGPT2_PURE=1 asks for that")
                compiler = find_compiler()
                return compiler, build_kernels(compiler, output)
            except (BuildError, OSError) as error:
                self.app.display_warning(f"installing without the C kernels: {error}")
                return None

        def fill(self, build_data: dict[str, Any], folder: Path) -> None:
            files = package_files(folder)
            built = self.build(folder)
            if built is not None:
                compiler, library = built
                files[library] = f"tinygpt2/{library.name}"
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{platform_tag(compiler)}"
            build_data["force_include"].update({str(path): name for path, name in files.items()})

        def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
            self.folder.cleanup()


if __name__ == "__main__":
    sys.exit(main())
