"""`download` against a web server on this machine that answers as the Hugging Face hub does.

The server is our own; what asks it is the package huggingface_hub, which reads its settings when
it is imported. So each download runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, read_safetensors, write_checkpoint, write_safetensors

import tinygpt2

needs_hub = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="needs huggingface_hub"
)
pytestmark = [pytest.mark.slow, needs_hub]

NAME = "owner/name"
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# ------------------------------------------------------------------------------------------------
# The hub
# ------------------------------------------------------------------------------------------------


@dataclass
class Refusal:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"


class Hub(ThreadingHTTPServer):
    """A hub on a free port: models by name, each a folder with one commit."""

    daemon_threads = True

    def __init__(self, home: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.home = home
        self.models: dict[tuple[str, str], Path] = {}  # by name and revision
        self.moved: dict[str, str] = {}
        self.refusals: dict[str, Refusal] = {}  # by the start of a path
        self.requests: list[tuple[str, str, Any]] = []  # method, path, headers
        self.thread = threading.Thread(target=self.serve_forever, args=[0.01])
        self.thread.start()

    def publish(self, folder: Path, name: str = NAME, revision: str = "main") -> None:
        for known in (revision, COMMIT):
            self.models[name, known] = folder

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()

    def fetched(self) -> set[str]:
        """The names of the files that were sent."""
        gets = [path for method, path, _ in self.requests if method == "GET"]
        return {path.rpartition("/")[2] for path in gets if "/resolve/" in path}

    def environment(self, **more: str) -> dict[str, str]:
        """That of a process which knows this hub alone, and an empty cache."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "NO_PROXY": "*",
            "PYTHONPATH": str(Path(tinygpt2.__file__).parent),
            **more,
        }


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, unquote(path), self.headers))
        for start, refusal in self.server.refusals.items():
            if unquote(path).startswith(start):
                self.send(refusal.status, refusal.body, refusal.headers)
                return
        for old, new in self.server.moved.items():
            if path.startswith((f"/{old}/", f"/api/models/{old}/")):
                self.send(307, b"", {"Location": self.path.replace(old, new, 1)})
                return
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.describe(parts[2:])
        elif "resolve" in parts:
            self.send_file(parts)
        else:
            self.send(404, b"{}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def describe(self, parts: list[str]) -> None:
        """/api/models/NAME/revision/REVISION, or .../tree/REVISION"""
        verb = "revision" if "revision" in parts else "tree"
        place = parts.index(verb)
        folder = self.folder("/".join(parts[:place]), unquote(parts[place + 1]))
        if folder is None:
            return
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if verb == "revision":
            siblings = [{"rfilename": path.name} for path in files]
            answer: object = {"id": NAME, "sha": COMMIT, "siblings": siblings}
        else:
            answer = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                for path in files
            ]
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def folder(self, name: str, revision: str) -> Path | None:
        """That of a model; else the answer that says what is not there."""
        if (name, revision) in self.server.models:
            return self.server.models[name, revision]
        if any(name == known for known, _ in self.server.models):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        return None

    def send_file(self, parts: list[str]) -> None:
        """/NAME/resolve/REVISION/FILE"""
        place = parts.index("resolve")
        folder = self.folder("/".join(parts[:place]), unquote(parts[place + 1]))
        if folder is None:
            return
        path = folder / unquote(parts[place + 2])
        if not path.is_file():
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content = path.read_bytes()
        tag = hashlib.sha256(content).hexdigest()
        self.send(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path / "home")
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source"))


def converted(folder: Path) -> bytes:
    out = folder.parent / f"{folder.name}.tg2"
    tinygpt2.convert(folder, out)
    return out.read_bytes()


def download(hub: Hub, out: Path, *arguments: str, **environ: str) -> tuple[int, str, str]:
    """The command, in a process of its own: exit code, standard output, standard error."""
    command = [sys.executable, str(ROOT / "tinygpt2.py"), "download", *arguments, "-o", str(out)]
    done = subprocess.run(
        command, env=hub.environment(**environ), capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def fails(hub: Hub, out: Path, *arguments: str, **environ: str) -> str:
    """A download fails with one line, which is returned, and writes nothing."""
    code, printed, line = download(hub, out, *(arguments or (NAME,)), **environ)
    assert (code, printed) == (1, ""), line
    assert line.startswith("tinygpt2: error: "), line
    assert line.count("\n") == 1, line
    assert not out.exists()
    return line


# ------------------------------------------------------------------------------------------------
# Whole checkpoints
# ------------------------------------------------------------------------------------------------


def cut_into_shards(folder: Path) -> None:
    _, tensors = read_safetensors(folder / WEIGHTS)
    shards = ["model-00001-of-00002.safetensors", "model [*] 00002-of-00002.safetensors"]
    places = {name: shards[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in shards:
        write_safetensors(
            folder / shard, {name: tensors[name] for name in tensors if places[name] == shard}
        )
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), "utf-8")
    (folder / WEIGHTS).unlink()


def only_needed_files(folder: Path) -> None:
    """The others are not asked for."""
    for name in ("README.md", "tf_model.h5", "pytorch_model.bin", "onnx.onnx", "training_args.bin"):
        (folder / name).write_bytes(b"not needed")


@pytest.mark.parametrize("change", [cut_into_shards, only_needed_files])
def test_download_equals_conversion(hub: Hub, source: Path, tmp_path: Path, change: Any) -> None:
    folder = shutil.copytree(source, tmp_path / "checkpoint")
    wanted = {path.name for path in folder.iterdir()}
    change(folder)
    if change is cut_into_shards:
        wanted = {path.name for path in folder.iterdir()}
    hub.publish(folder)
    out = tmp_path / "out.tg2"
    assert download(hub, out, NAME) == (0, "", "")
    assert out.read_bytes() == converted(folder)
    assert hub.fetched() == wanted


def test_revision(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.publish(source, revision="refs/pr/1")
    out = tmp_path / "out.tg2"
    assert download(hub, out, NAME, "--revision", "refs/pr/1") == (0, "", "")
    assert out.read_bytes() == converted(source)


LIBRARY = """if True:
    import sys, tinygpt2
    import huggingface_hub.utils as utils
    before = utils.are_progress_bars_disabled(), utils.logging.get_verbosity()
    sys.stderr.isatty = lambda: True  # so that the package would draw its bars
    told = []
    tinygpt2.download("owner/name", sys.argv[1], progress=lambda *step: told.append(step))
    assert (utils.are_progress_bars_disabled(), utils.logging.get_verbosity()) == before
    assert told and told[-1][1] == told[-1][2], told
"""


def test_a_call_prints_nothing(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.publish(source)
    out = tmp_path / "out.tg2"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIBRARY, str(out)],
        env=hub.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert out.read_bytes() == converted(source)


@pytest.mark.soak
def test_bars_at_a_terminal(hub: Hub, source: Path, tmp_path: Path) -> None:
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
    hub.publish(source)
    command = [sys.executable, str(ROOT / "tinygpt2.py"), "download", NAME]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "out.tg2")], env=hub.environment(), stderr=theirs
    )
    os.close(theirs)
    shown = b""
    with open(ours, "rb", 0) as terminal:
        while True:
            try:
                piece = terminal.read(1000)
            except OSError:  # the other side is closed
                break
            shown += piece
            if not piece:
                break
    assert process.wait() == 0, shown
    assert WEIGHTS.encode() in shown
    assert b"writing [####" in shown


# ------------------------------------------------------------------------------------------------
# The cache
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "no server"])
def test_what_was_fetched_is_used_again(
    hub: Hub, source: Path, tmp_path: Path, offline: str
) -> None:
    hub.publish(source)
    assert download(hub, tmp_path / "first.tg2", NAME)[0] == 0
    hub.requests.clear()
    environ = {"HF_HUB_OFFLINE": "1"}
    if offline == "no server":
        environ = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert download(hub, tmp_path / "second.tg2", NAME, **environ) == (0, "", "")
    assert (tmp_path / "second.tg2").read_bytes() == converted(source)
    assert hub.requests == []


def test_weights_are_not_fetched_again(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.publish(source)
    assert download(hub, tmp_path / "first.tg2", NAME)[0] == 0
    hub.requests.clear()
    assert download(hub, tmp_path / "second.tg2", NAME)[0] == 0
    assert hub.fetched() == set()


def fill_cache(home: Path, source: Path, name: str) -> Path:
    """A model as the package keeps it: links to blobs, under the name of a commit."""
    repository = home / "hub" / ("models--" + name.replace("/", "--"))
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for folder in (repository / "refs", snapshot, blobs):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT, "utf-8")
    for path in source.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


@pytest.mark.soak
@pytest.mark.parametrize("offline", ["1", ""])
@pytest.mark.parametrize("cached", ["gpt2", "openai-community/gpt2"])
@pytest.mark.parametrize("asked", ["gpt2", "openai-community/gpt2"])
def test_old_and_new_name(
    hub: Hub, source: Path, tmp_path: Path, cached: str, asked: str, offline: str
) -> None:
    hub.publish(source, "openai-community/gpt2")
    hub.moved["gpt2"] = "openai-community/gpt2"
    fill_cache(hub.home, source, cached)
    out = tmp_path / "out.tg2"
    assert download(hub, out, asked, HF_HUB_OFFLINE=offline) == (0, "", "")
    assert out.read_bytes() == converted(source)
    assert hub.fetched() == set()


@pytest.mark.soak
@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_old_and_new_name_on_the_hub(hub: Hub, source: Path, tmp_path: Path, name: str) -> None:
    hub.publish(source, "openai-community/gpt2")
    hub.moved["gpt2"] = "openai-community/gpt2"
    assert download(hub, tmp_path / "out.tg2", name) == (0, "", "")


@pytest.mark.soak
@pytest.mark.parametrize("cached", [False, True])
def test_tokenizer_of_another_model(hub: Hub, source: Path, tmp_path: Path, cached: bool) -> None:
    """`convert --tokenizer NAME` fetches a tokenizer, and no weights."""
    hub.publish(source)
    if cached:
        fill_cache(hub.home, source, NAME)
    bare = write_checkpoint(tmp_path / "bare", tokenizer=False)
    out = tmp_path / "out.tg2"
    command = [sys.executable, str(ROOT / "tinygpt2.py"), "convert", str(bare), "-o", str(out)]
    environ = hub.environment(HF_HUB_OFFLINE="1" if cached else "")
    done = subprocess.run(
        [*command, "--tokenizer", NAME], env=environ, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert out.read_bytes() == converted(source)
    assert WEIGHTS not in hub.fetched()


@pytest.mark.soak
@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_incomplete_cache(hub: Hub, source: Path, tmp_path: Path, missing: str) -> None:
    """Without the hub, the cause is named; with it, only what is missing is fetched."""
    (fill_cache(hub.home, source, NAME) / missing).resolve().unlink()
    out = tmp_path / "out.tg2"
    assert "HF_HUB_OFFLINE" in fails(hub, out, HF_HUB_OFFLINE="1")
    hub.publish(source)
    assert download(hub, out, NAME) == (0, "", "")
    assert hub.fetched() == {missing}


# ------------------------------------------------------------------------------------------------
# Weights of PyTorch
# ------------------------------------------------------------------------------------------------


def pickled_model(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    return folder


@pytest.mark.soak
def test_pickled_weights(hub: Hub, source: Path, tmp_path: Path) -> None:
    """The same file as from safetensors."""
    torch = pytest.importorskip("torch", reason="writes and reads pytorch_model.bin")
    folder = pickled_model(source, tmp_path / "m")
    _, weights = read_safetensors(source / WEIGHTS)
    tensors = {name: torch.tensor(array) for name, array in weights.items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    hub.publish(folder)
    out = tmp_path / "out.tg2"
    assert download(hub, out, NAME) == (0, "", "")
    assert out.read_bytes() == converted(source)


@pytest.mark.soak
def test_pickled_weights_without_torch(hub: Hub, source: Path, tmp_path: Path) -> None:
    """They are not fetched for nothing."""
    hub.publish(pickled_model(source, tmp_path / "m"))
    code = """if True:
        import importlib.util, sys, tinygpt2
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *more: find(name.replace("torch", "absent"), *more)
        sys.exit(tinygpt2.main(sys.argv[1:]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, "download", NAME, "-o", str(tmp_path / "out.tg2")],
        env=hub.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert f"{NAME}: only PyTorch can read its pytorch_model.bin" in done.stderr
    assert "pip install torch" in done.stderr
    assert "pytorch_model.bin" not in hub.fetched()


# ------------------------------------------------------------------------------------------------
# Refusals
# ------------------------------------------------------------------------------------------------


def test_there_is_no_such_model(hub: Hub, tmp_path: Path) -> None:
    line = fails(hub, tmp_path / "out.tg2", "owner/absent")
    assert "owner/absent: there is no such model, or it is private (check the name" in line
    assert "HF_TOKEN" in line


@pytest.mark.soak
def test_there_is_no_such_revision(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.publish(source)
    line = fails(hub, tmp_path / "out.tg2", NAME, "--revision", "v9")
    assert f"{NAME}: there is no revision v9 (check --revision)" in line


@pytest.mark.soak
def test_gated(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.publish(source)
    hub.refusals[f"/{NAME}/resolve/"] = Refusal(403, {"X-Error-Code": "GatedRepo"})
    assert f"{NAME}: its owner gives access on request (ask for" in fails(hub, tmp_path / "o.tg2")


@pytest.mark.soak
@pytest.mark.parametrize(
    ("status", "headers", "found"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "HF_TOKEN"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, "has disabled"),
        (403, {}, "403"),
        (410, {}, "410"),
        (500, {}, "500"),
        (200, {}, "the answer is not the hub's"),
    ],
)
def test_refusals_of_the_server(
    hub: Hub, source: Path, tmp_path: Path, status: int, headers: dict[str, str], found: str
) -> None:
    hub.publish(source)
    hub.refusals["/api/"] = Refusal(status, headers, b"<html>no")
    assert found in fails(hub, tmp_path / "out.tg2")


@pytest.mark.soak
@pytest.mark.parametrize(
    ("endpoint", "found"),
    [
        ("http://127.0.0.1:9", "no connection to the hub: Connection refused (check the network"),
        ("http://nowhere.invalid", "no connection to the hub: "),
        ("nonsense", "HF_ENDPOINT"),
        ("http://[", "HF_ENDPOINT"),
        ("foo://x", "HF_ENDPOINT"),
    ],
)
def test_endpoints(hub: Hub, tmp_path: Path, endpoint: str, found: str) -> None:
    assert found in fails(hub, tmp_path / "out.tg2", HF_ENDPOINT=endpoint)


def test_offline_and_not_cached(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.publish(source)
    line = fails(hub, tmp_path / "out.tg2", HF_HUB_OFFLINE="1")
    assert f"{NAME}: HF_HUB_OFFLINE is set, and not all files are in the hub's cache" in line
    assert hub.requests == []


@pytest.mark.soak
@pytest.mark.parametrize("token", ["hf_sec\nret", "hf_s\u00e9cret\u20ac"])
def test_token_that_cannot_be_sent_is_not_shown(hub: Hub, tmp_path: Path, token: str) -> None:
    line = fails(hub, tmp_path / "out.tg2", HF_TOKEN=token)
    assert "hf_s" not in line
    assert "HF_TOKEN" in line


def test_token_is_sent(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.publish(source)
    assert download(hub, tmp_path / "out.tg2", NAME, HF_TOKEN="hf_secret") == (0, "", "")
    assert "Bearer hf_secret" in [headers["Authorization"] for _, _, headers in hub.requests]


@pytest.mark.soak
@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_missing_file(hub: Hub, source: Path, tmp_path: Path, missing: str) -> None:
    folder = shutil.copytree(source, tmp_path / "checkpoint")
    (folder / missing).unlink()
    hub.publish(folder)
    line = fails(hub, tmp_path / "out.tg2")
    assert line.startswith(f"tinygpt2: error: {NAME}: it ")
    assert missing in line


@pytest.mark.soak
def test_missing_shard(hub: Hub, source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "checkpoint")
    cut_into_shards(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    hub.publish(folder)
    assert "model-00001-of-00002.safetensors" in fails(hub, tmp_path / "out.tg2")


@pytest.mark.soak
@pytest.mark.parametrize("shard", ["../config.json", "/etc/passwd", "a/b", "..", ""])
def test_shard_elsewhere(hub: Hub, source: Path, tmp_path: Path, shard: str) -> None:
    folder = shutil.copytree(source, tmp_path / "checkpoint")
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": shard}}), "utf-8")
    hub.publish(folder)
    assert "weight_map" in fails(hub, tmp_path / "out.tg2")
    assert all("passwd" not in path for _, path, _ in hub.requests)


@pytest.mark.soak
def test_another_architecture(hub: Hub, tmp_path: Path) -> None:
    """It is refused by name, before its weights are fetched."""
    hub.publish(write_checkpoint(tmp_path / "llama", {"model_type": "llama"}))
    assert "model_type: expected 'gpt2', found 'llama'" in fails(hub, tmp_path / "out.tg2")
    assert WEIGHTS not in hub.fetched()


FULL_DISK = """if True:
    import resource, sys, tinygpt2
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    sys.exit(tinygpt2.main(sys.argv[1:]))
"""


@pytest.mark.soak
def test_full_disk(hub: Hub, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="limits the size of files")
    hub.publish(source)
    command = [sys.executable, "-c", FULL_DISK, "download", NAME, "-o", str(tmp_path / "out.tg2")]
    done = subprocess.run(
        command, env=hub.environment(), capture_output=True, text=True, timeout=120
    )
    expected = f"tinygpt2: error: {NAME}: no space for the hub's cache: File too large (free some"
    assert done.stderr.startswith(expected), done.stderr
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_without_the_package(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('No module named x')", "utf-8")
    place = f"{tmp_path}{os.pathsep}{hub.environment()['PYTHONPATH']}"
    line = fails(hub, tmp_path / "out.tg2", PYTHONPATH=place)
    assert "need the package huggingface_hub" in line
    assert "`pip install huggingface_hub`" in line


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "x/..", "a/b/c", "/a", "a/", "a//b", "~", "http://a/b", "a/b?c"),
        *("a b", "a\n", "a#b", "a%2fb", "a\\b", "C:a", "a\0", "\u00fc/x", "a/\u0663", "./a", "a/."),
    ],
)
def test_hostile_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(tinygpt2.InputError, match="model name"):
        tinygpt2.download(name, tmp_path / "out.tg2")


@pytest.mark.parametrize("revision", ["", "..", "../main", "a b", "a?b", "/etc", "a//b", "\u00fc"])
def test_hostile_revision(tmp_path: Path, revision: str) -> None:
    with pytest.raises(tinygpt2.InputError, match="revision"):
        tinygpt2.download(NAME, tmp_path / "out.tg2", revision)


@pytest.mark.parametrize("value", [None, 5, b"gpt2", ["gpt2"]])
def test_arguments_of_another_type(tmp_path: Path, value: Any) -> None:
    with pytest.raises(tinygpt2.InputError, match="model name"):
        tinygpt2.download(value, tmp_path / "out.tg2")
    with pytest.raises(tinygpt2.InputError, match="revision"):
        tinygpt2.download(NAME, tmp_path / "out.tg2", value)
    with pytest.raises(tinygpt2.InputError, match="out: expected a path"):
        tinygpt2.download(NAME, value)


def test_default_place(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.publish(source)
    command = [sys.executable, str(ROOT / "tinygpt2.py"), "download", NAME]
    done = subprocess.run(command, cwd=tmp_path, env=hub.environment(), timeout=120)
    assert done.returncode == 0
    assert (tmp_path / "name.tg2").read_bytes() == converted(source)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "code"), [("a--b/c", 1), ("../x", 2), ("a/b/c", 2)])
def test_wrong_names_on_the_command_line(hub: Hub, tmp_path: Path, name: str, code: int) -> None:
    done = download(hub, tmp_path / "out.tg2", name)
    assert (done[0], done[1]) == (code, "")
    assert done[2].startswith("tinygpt2: error: ")
    assert done[2].count("\n") == 1
