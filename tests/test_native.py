"""kernels.c from a C program, kernels_test.c: the same bits by every compiler, clean by sanitizers.

What the program tests is written at its head. Here it is compiled in several ways, and has to print
the same two hashes every time.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, Result, build, is_there, needs, run, sanitizing_compiler

# Of all logits of the models in kernels_test.c. The README promises these bits, so this may change
# with those models, or when kernels.c is meant to compute something else from now on. Nothing else
# is a reason: no machine, no compiler, no number of threads.
LOGITS = "db946f5deb391f1e"

# Of what follows from the logits: choices and log-probabilities. If this changes, users get other
# texts for their seeds, and CHANGELOG.md must say why.
CHOICES = "e9fa9d02eb5d54cf"


@pytest.fixture(autouse=True)
def no_flags_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)


class Compile(NamedTuple):
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]

    def __call__(self, command: str, *flags: str) -> Path:
        """The program, as build.py would make it; its source includes what kernels.c has in common
        for all instruction sets. The compiler must not warn."""
        self.monkeypatch.setenv("CC", command)
        compiler = build.find_compiler()
        objects = build.compile_objects(compiler, self.folder, flags)
        objects = [path for path in objects if path.stem != "common"]
        program = self.folder / "kernels_test"
        source = ROOT / "tests" / "kernels_test.c"
        build.link(compiler, [*objects, source], program, flags)
        assert self.capfd.readouterr() == ("", "")
        return program


@pytest.fixture
def compile_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Compile:
    return Compile(tmp_path, monkeypatch, capfd)


def check(result: Result) -> None:
    assert result.code == 0, result.err
    assert result == Result(0, f"logits {LOGITS}\nchoices {CHOICES}\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [needs("gcc"), needs("clang")])
def test_everything(compile_test: Compile, compiler: str) -> None:
    check(run([compile_test(compiler)], {}))


@pytest.mark.soak
@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize("compiler", [needs("gcc"), needs("clang")])
def test_other_optimisation(compile_test: Compile, compiler: str, level: str) -> None:
    check(run([compile_test(compiler, level), "hash"], {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "level", "arguments"),
    [
        ("-fsanitize=address,undefined", "-O0", ["brief"]),  # -O1 compiles for a minute
        ("-fsanitize=thread", "-O1", ["nofork", "brief"]),
    ],
    ids=["address,undefined", "thread"],
)
def test_sanitizers(
    compile_test: Compile, tmp_path: Path, flag: str, level: str, arguments: list[str]
) -> None:
    compiler = sanitizing_compiler(flag, tmp_path)
    program = compile_test(compiler, flag, level, "-fno-sanitize-recover=all", "-g1")
    result = run([program, *arguments], {})
    if "unexpected memory mapping" in result.err:  # where addresses are random in too many bits
        result = run(["setarch", "-R", program, *arguments], {})
    check(result)


@pytest.mark.soak
@pytest.mark.skipif(not is_there("aarch64-linux-gnu-gcc"), reason="needs aarch64-linux-gnu-gcc")
@pytest.mark.skipif(not is_there("qemu-aarch64"), reason="needs qemu-aarch64")
def test_neon(compile_test: Compile) -> None:
    """64-bit Arm, emulated, gives the bits of x86."""
    program = compile_test("aarch64-linux-gnu-gcc")
    command = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", program]
    check(run([*command, "nofork", "brief"], {}))
