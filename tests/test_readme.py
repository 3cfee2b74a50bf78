"""Every example in the README runs, as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import ROOT, write_checkpoint
from test_download import Hub, hub, needs_hub  # noqa: F401  (a fixture)

import tinygpt2

README = (ROOT / "README.md").read_text("utf-8")
MODEL = ROOT / "vendor" / "tales.tg2"
INSTALL = re.compile(r"pip install [^&]*(?: && |$)")  # .ci/run installs; here it is done already


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def shell_lines() -> list[str]:
    lines = [INSTALL.sub("", line) for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and line != "pytest"]  # that would be this very run


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone, with the checkpoint that the README speaks of."""
    if not MODEL.exists():
        pytest.skip("needs the default model, vendor/tales.tg2")
    folder = tmp_path_factory.mktemp("clone")
    for name in ("tinygpt2.py", "build.py", "kernels.c"):
        shutil.copy(ROOT / name, folder)
    (folder / "vendor").symlink_to(ROOT / "vendor")
    write_checkpoint(folder / "path" / "to" / "checkpoint")
    return folder


def run(command: list[str], folder: Path, environ: Mapping[str, str] = os.environ) -> str:
    """Run a command that must succeed; what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env={**environ, "PATH": path}, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode("utf-8")


def test_the_readme_has_examples() -> None:
    assert len(blocks("python")) >= 2
    assert len(shell_lines()) >= 10


PROGRAMS = [code for code in blocks("python") if "pytest.fixture" not in code]
USES_FIXTURE = """
def test_my_program(model):
    assert model.generate("Hello", max_new_tokens=5, seed=1) == "{expected}"
"""


@pytest.mark.parametrize("code", PROGRAMS)
@pytest.mark.slow
def test_python(code: str, clone: Path) -> None:
    if "regex=" in code:
        pytest.importorskip("regex", reason="expressions are matched by the package regex")
    assert run([sys.executable, "-W", "error", "-c", code], clone)


@pytest.mark.slow
def test_fixture(clone: Path) -> None:
    (code,) = (code for code in blocks("python") if "pytest.fixture" in code)
    assert len([line for line in code.splitlines() if line]) <= 5
    with tinygpt2.toy() as model:
        expected = model.generate("Hello", max_new_tokens=5, seed=1)
    test = clone / "test_my_program.py"
    test.write_text(code + USES_FIXTURE.format(expected=expected), "utf-8")
    assert "1 passed" in run([sys.executable, "-m", "pytest", test.name], clone)


@needs_hub
@pytest.mark.slow
def test_shell(clone: Path, hub: Hub) -> None:  # noqa: F811
    """In their order, for the later ones use what the earlier ones made. The hub is a local one."""
    hub.publish(clone / "path" / "to" / "checkpoint", name="gpt2")
    for line in shell_lines():
        out = run(["sh", "-c", line], clone, hub.environment())
        makes_file = re.search(r" (?:-o|>) (\S+)", line)
        assert (clone / makes_file[1]).exists() if makes_file else out.strip(), line
