"""Where a conversion writes: never over what it reads, through links, without leftovers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_checkpoint

import tinygpt2

READ = ("config.json", "model.safetensors", "vocab.json", "merges.txt")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Over what is read


def plain(path: Path) -> Path:
    return path


def roundabout(path: Path) -> Path:
    return path.parent / ".." / path.parent.name / "." / path.name


def soft_link(path: Path) -> Path:
    link = path.parent.parent / "link.tg2"
    link.symlink_to(path)
    return link


def hard_link(path: Path) -> Path:
    link = path.parent.parent / "hard.tg2"
    os.link(path, link)
    return link


def linked_folder(path: Path) -> Path:
    (path.parent.parent / "other").symlink_to(path.parent)
    return path.parent.parent / "other" / path.name


SPELLINGS = [plain, roundabout, soft_link, hard_link, linked_folder]


@pytest.mark.table
@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("spell", SPELLINGS)
def test_a_file_that_is_read(source: Path, name: str, spell: Callable[[Path], Path]) -> None:
    before = contents(source)
    out = spell(source / name)
    with pytest.raises(tinygpt2.InputError, match=f"out: expected.*{name}"):
        tinygpt2.convert(source, out)
    with pytest.raises(tinygpt2.InputError, match=f"out: expected.*{name}"):
        tinygpt2.convert(source / "model.safetensors", out)
    assert contents(source) == before


@pytest.mark.parametrize("named", ["folder", "file"])
def test_the_tokenizer_that_is_read(source: Path, tmp_path: Path, named: str) -> None:
    tokenizer = write_checkpoint(tmp_path / "t")
    (tokenizer / "tokenizer.json").write_text('{"stoi": {"a": 0}}', "utf-8")
    before = contents(tokenizer)
    chosen = tokenizer if named == "folder" else tokenizer / "tokenizer.json"
    with pytest.raises(tinygpt2.InputError, match=r"out: expected.*tokenizer\.json"):
        tinygpt2.convert(source, tokenizer / "tokenizer.json", tokenizer=chosen)
    assert contents(tokenizer) == before


def test_a_file_that_is_read_through_a_link(source: Path, tmp_path: Path) -> None:
    """As in the hub's cache."""
    weights = source / "model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    before = (tmp_path / "blob").read_bytes()
    with pytest.raises(tinygpt2.InputError, match=r"model\.safetensors"):
        tinygpt2.convert(source, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == before


def test_another_file_of_the_folder(source: Path) -> None:
    (source / "model.tg2").write_bytes(b"old")
    tinygpt2.convert(source, source / "model.tg2")
    tinygpt2.load(source / "model.tg2").close()


# Links


def test_a_link_stays(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "real.tg2").write_bytes(b"old")
    (tmp_path / "middle.tg2").symlink_to("disk/real.tg2")
    (tmp_path / "link.tg2").symlink_to("middle.tg2")
    tinygpt2.convert(source, tmp_path / "link.tg2")
    assert os.readlink(tmp_path / "link.tg2") == "middle.tg2"
    assert os.readlink(tmp_path / "middle.tg2") == "disk/real.tg2"
    tinygpt2.load(disk / "real.tg2").close()
    assert [path.name for path in disk.iterdir()] == ["real.tg2"]


def test_a_dangling_link_gets_its_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.tg2").symlink_to("disk/real.tg2")
    tinygpt2.convert(source, tmp_path / "link.tg2")
    assert (tmp_path / "link.tg2").is_symlink()
    tinygpt2.load(tmp_path / "disk" / "real.tg2").close()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("link.tg2", "a link that leads back to itself"),
        ("other.tg2", "a link that leads back to itself"),
        ("none/real.tg2", "No such file or directory"),
        ("m", "Is a directory"),
        ("m/config.json/real.tg2", "Not a directory"),
    ],
)
def test_a_link_that_leads_nowhere(source: Path, tmp_path: Path, target: str, reason: str) -> None:
    (tmp_path / "link.tg2").symlink_to(target)
    (tmp_path / "other.tg2").symlink_to("link.tg2")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(tinygpt2.TinyGPT2Error, match=f"cannot write: {reason}"):
        tinygpt2.convert(source, tmp_path / "link.tg2")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs permissions as in Unix")
def test_a_folder_without_permission(source: Path, tmp_path: Path) -> None:
    """Root may write everywhere, so another user tries."""
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    source.chmod(0o755)
    tmp_path.chmod(0o755)
    code = """if True:
        import os, sys, tinygpt2
        tinygpt2.load_companion("convert")
        os.chdir(sys.argv[1])
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            tinygpt2.convert("m", "closed/out.tg2")
        except tinygpt2.TinyGPT2Error as error:
            print(error)
    """
    place = str(Path(tinygpt2.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=place, capture_output=True, text=True
    )
    expected = "closed/out.tg2: cannot write: Permission denied ("
    assert done.stdout.startswith(expected), done.stderr


# Leftovers


def leftover(out: Path, number: int = 99999999) -> Path:
    path = out.parent / f"{out.name}.{number}-0a1b2c.tmp"
    path.write_bytes(b"left behind")
    return path


def test_leftovers_are_removed(source: Path, tmp_path: Path) -> None:
    """Of this target, whether or not a process has the number in the name."""
    out = tmp_path / "a+b.tg2"
    leftover(out)
    leftover(out, os.getpid())
    kept = [leftover(tmp_path / "b.tg2"), leftover(tmp_path / "aab.tg2")]
    for name in ("x.tmp", "1-0a1b2.tmp", "1-0A1B2C.tmp", "-0a1b2c.tmp", "1-0a1b2c.tmp2", "tmp"):
        kept.append(tmp_path / f"{out.name}.{name}")
        kept[-1].write_bytes(b"another's")
    folder = tmp_path / f"{out.name}.5-0a1b2c.tmp"
    folder.mkdir()
    link = tmp_path / f"{out.name}.6-0a1b2c.tmp"
    link.symlink_to(kept[0].name)
    tinygpt2.convert(source, out)
    assert sorted(tmp_path.iterdir()) == sorted([source, out, folder, link, *kept])


def test_a_locked_file_stays(source: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out.tg2"
    path = leftover(out)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        tinygpt2.convert(source, out)
        assert path.exists()
    tinygpt2.convert(source, out)
    assert not path.exists()


def test_a_file_that_is_removed_before_it_is_locked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may come between the creation of a file and its lock."""
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock
    removed: list[Path] = []

    def late(file: object, how: int) -> None:
        if how == fcntl.LOCK_EX and not removed:
            removed.extend(tmp_path.glob("*.tmp"))
            removed[0].unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    tinygpt2.convert(source, tmp_path / "out.tg2")
    assert len(removed) == 1
    tinygpt2.load(tmp_path / "out.tg2").close()


def test_conversions_to_one_target_at_a_time(source: Path, tmp_path: Path) -> None:
    """One begins and ends while another is in the middle of its file."""
    out = tmp_path / "out.tg2"
    steps: list[int] = []

    def meanwhile(*_: object) -> None:
        steps.append(len(list(tmp_path.glob("*.tmp"))))
        if len(steps) == 3:
            tinygpt2.convert(source, out)
            assert len(list(tmp_path.glob("*.tmp"))) == 1

    tinygpt2.convert(source, out, meanwhile)
    assert set(steps) == {1}


def test_writing_while_another_checks_what_it_wrote(tmp_path: Path) -> None:
    path = str(tmp_path / "out")
    entries: dict[str, tinygpt2.Entry] = {"a": ("U8", (4,))}

    def check(_: object) -> None:
        tinygpt2.write_tensors(path, entries, [b"5678"], {}, lambda _: None)
        assert len(list(tmp_path.glob("*.tmp"))) == 1

    tinygpt2.write_tensors(path, entries, [b"1234"], {}, check)
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_bytes()[-4:] == b"1234"


# Signals. The commands run with real signals in processes of their own.

PAUSE = """if True:
    import sys, time, tinygpt2
    companion = tinygpt2.load_companion("convert")
    convert = companion.convert
    def pause(*_):
        print("writing", flush=True)
        for _ in range(600):  # a signal that comes just before a sleep is seen after it
            time.sleep(0.1)
    companion.convert = lambda source, out, progress, *more: convert(source, out, pause, *more)
    sys.exit(tinygpt2.main(sys.argv[1:]))
"""


def stopped(source: Path, out: Path, number: int, *before: str) -> subprocess.Popen[str]:
    """A conversion that got a signal in the middle of its file."""
    command = [sys.executable, "-c", PAUSE, "convert", str(source), "-o", str(out)]
    process = subprocess.Popen(
        [*before, *command],
        cwd=Path(tinygpt2.__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert len(list(out.parent.glob("*.tmp"))) == 1
    process.send_signal(number)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_signals_clean_up(source: Path, tmp_path: Path, name: str, code: int) -> None:
    out = tmp_path / "out.tg2"
    out.write_bytes(b"old")
    process = stopped(source, out, getattr(signal, name))
    printed = process.communicate(timeout=60)
    assert (process.returncode, *printed) == (code, "", "")
    assert sorted(tmp_path.iterdir()) == [source, out]
    assert out.read_bytes() == b"old"


@pytest.mark.slow
def test_what_a_kill_leaves_is_removed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tg2"
    process = stopped(source, out, signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    tinygpt2.convert(source, out)
    assert sorted(tmp_path.iterdir()) == [source, out]


@pytest.mark.slow
def test_a_living_conversion_keeps_its_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tg2"
    process = stopped(source, out, 0)
    tinygpt2.convert(source, out)
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    process.terminate()
    process.communicate(timeout=60)
    assert sorted(tmp_path.iterdir()) == [source, out]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nohup") is None, reason="needs nohup")
def test_an_ignored_signal_stays_ignored(source: Path, tmp_path: Path) -> None:
    process = stopped(source, tmp_path / "out.tg2", signal.SIGHUP, "nohup")
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_the_command_gives_handlers_back(source: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert tinygpt2.main(["convert", str(source), "-o", str(tmp_path / "out.tg2")]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
