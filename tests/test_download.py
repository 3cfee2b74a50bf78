"""`download` against web servers on this machine that answer as the Hugging Face hub does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import (
    END,
    read_safetensors,
    run_python,
    toy_tokenizer,
    write_checkpoint,
    write_safetensors,
)

import tinygpt2

pytestmark = pytest.mark.slow

NAME = "owner/name"
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"


# ------------------------------------------------------------------------------------------------
# The hub
# ------------------------------------------------------------------------------------------------


@dataclass
class Page:
    """What a server answers under one path, and what goes wrong before that."""

    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)  # one that is "" is not sent
    failures: list[int] = field(default_factory=list)  # the status of the next answers
    breaks: list[tuple[int, str]] = field(default_factory=list)  # the next ones end so early, and:


@dataclass
class Request:
    method: str
    path: str
    headers: Mapping[str, str]


class Site(ThreadingHTTPServer):
    """A web server on a free port, in threads; it keeps the requests that it got."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.pages: dict[str, Page] = {}
        self.requests: list[Request] = []
        self.knows_ranges = True
        self.knows_head = True
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, args=[0.01])
        self.thread.start()

    def stop(self) -> None:
        self.closing.set()
        self.shutdown()
        self.thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nothing to report."""


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def answer(self) -> None:
        self.server.requests.append(Request(self.command, self.path, dict(self.headers)))
        page = self.server.pages.get(self.path, Page(b"Entry not found", 404))
        if self.command == "HEAD" and not self.server.knows_head:
            page = Page(status=403)
        if page.failures:
            page = Page(b"no", page.failures.pop(0))
        first = self.first_byte() if page.status == 200 else 0
        self.send_response(206 if first else page.status)
        headers = {"Content-Length": str(len(page.content) - first), **page.headers}
        for name in filter(headers.get, headers):
            self.send_header(name, headers[name])
        self.end_headers()
        if self.command == "GET":
            self.send_body(page, first)

    def first_byte(self) -> int:
        asked = self.headers.get("Range", "bytes=0-")
        return int(asked[len("bytes=") : -1]) if self.server.knows_ranges else 0

    def send_body(self, page: Page, first: int) -> None:
        if not page.breaks:
            self.wfile.write(page.content[first:])
            return
        count, way = page.breaks.pop(0)
        self.wfile.write(page.content[first : first + count])
        if way == "silence":
            self.server.closing.wait(30)
        if way == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())


@dataclass
class Hub:
    """The hub itself has the small files, and sends everybody elsewhere for the weights."""

    front: Site
    storage: Site

    def publish(self, folder: Path, name: str = NAME, revision: str = "main") -> None:
        for path in folder.iterdir():
            place = f"/{name}/resolve/{quote(revision, safe='')}/{quote(path.name)}"
            content = path.read_bytes()
            if path.suffix == ".safetensors":
                self.front.pages[place] = self.store(content)
            else:
                tag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.front.pages[place] = Page(content, headers={"ETag": f'"{tag}"'})

    def store(self, content: bytes) -> Page:
        tag = hashlib.sha256(content).hexdigest()
        self.storage.pages["/" + tag] = Page(content, headers={"ETag": '"of the storage"'})
        headers = {
            "Location": f"{self.storage.url}/{tag}",
            "X-Linked-Etag": f'"{tag}"',
            "X-Linked-Size": str(len(content)),
        }
        return Page(b"Found. Redirecting to the storage", 302, headers)

    def page(self, file: str, name: str = NAME) -> Page:
        return self.front.pages[f"/{name}/resolve/main/{file}"]

    @property
    def weights(self) -> Page:
        (page,) = self.storage.pages.values()
        return page

    @property
    def ranges(self) -> list[str | None]:
        """What the storage was asked for."""
        return [request.headers.get("Range") for request in self.storage.requests]


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vendor/convert.py, loaded once, so that a test can change its constants."""
    module = tinygpt2.load_companion("convert")
    monkeypatch.setattr(tinygpt2, "load_companion", lambda name: module)
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    monkeypatch.setattr(module, "PAUSE", 0.01)
    return module


@pytest.fixture
def hub(tmp_path: Path, converter: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, in an environment that names no other hub and no cache."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    hub = Hub(Site(), Site())
    hub.storage.knows_head = False
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", hub.front.url)
    monkeypatch.setenv("no_proxy", "*")
    yield hub
    hub.front.stop()
    hub.storage.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def other_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shape; every file is another one."""
    folder = tmp_path_factory.mktemp("other")
    write_checkpoint(folder, {"layer_norm_epsilon": 0.01}, seed=1, tokenizer=False)
    vocab, merges = toy_tokenizer(["a b", "c d"])
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (folder / "merges.txt").write_text("\n".join(merges), "utf-8")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model.tg2"


def converted(folder: Path) -> bytes:
    out = folder.parent / f"{folder.name}.tg2"
    tinygpt2.convert(folder, out)
    return out.read_bytes()


def left_behind(out: Path) -> dict[str, int]:
    """The names and sizes of what lies beside the file that was asked for."""
    return {path.name: path.stat().st_size for path in out.parent.rglob("*") if path.is_file()}


def fails(out: Path, pattern: str, name: str = NAME) -> None:
    """A download fails, with a message, and leaves no model."""
    with pytest.raises(tinygpt2.DownloadError, match=pattern):
        tinygpt2.download(name, out)
    assert not out.exists()


# ------------------------------------------------------------------------------------------------
# Whole checkpoints
# ------------------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), "utf-8")


def change_nothing(folder: Path) -> None:
    """As `write_checkpoint` makes it: vocab.json, merges.txt, weights in one file."""


def drop_tokenizer(folder: Path) -> None:
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def add_tokenizer_json(folder: Path) -> None:
    vocab, merges = toy_tokenizer()
    names = {**{END: vocab[END]}, "<extra>": len(vocab)}
    tokenizer = {
        "added_tokens": [{"content": name, "id": token} for name, token in names.items()],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    write_json(folder / "tokenizer.json", tokenizer)


def only_tokenizer_json(folder: Path) -> None:
    drop_tokenizer(folder)
    add_tokenizer_json(folder)


def add_tokenizer_config(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"add_prefix_space": True})


def add_added_tokens(folder: Path) -> None:
    write_json(folder / "added_tokens.json", {"<extra>": 265})


def cut_into_shards(folder: Path) -> None:
    _, tensors = read_safetensors(folder / WEIGHTS)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {name: shards[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in shards:
        write_safetensors(
            folder / shard, {name: tensors[name] for name in tensors if places[name] == shard}
        )
    write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    (folder / WEIGHTS).unlink()


def give_a_shard_an_odd_name(folder: Path) -> None:
    """One that cannot stand in a URL as it is."""
    odd = "50% of it? #1.safetensors"
    (folder / WEIGHTS).rename(folder / odd)
    write_json(folder / INDEX, {"weight_map": {"wte.weight": odd}})


@pytest.mark.parametrize(
    "change",
    [
        change_nothing,
        drop_tokenizer,
        only_tokenizer_json,
        add_tokenizer_json,
        add_tokenizer_config,
        add_added_tokens,
        cut_into_shards,
        give_a_shard_an_odd_name,
    ],
)
def test_download_equals_conversion(
    hub: Hub, source: Path, tmp_path: Path, out: Path, change: Any
) -> None:
    folder = shutil.copytree(source, tmp_path / "checkpoint")
    change(folder)
    hub.publish(folder)
    seen: list[tuple[str, int, int]] = []
    tinygpt2.download(NAME, out, progress=lambda *step: seen.append(step))
    assert out.read_bytes() == converted(folder)
    assert set(left_behind(out)) == {out.name}
    labels = {label for label, _, _ in seen}
    assert labels > {"writing", "config.json"}
    weights = {path.stat().st_size for path in folder.glob("*.safetensors")}
    assert weights <= {total for _, done, total in seen if done == total}
    assert all(0 < done <= total for _, done, total in seen)


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("name", ["name", "owner/name", "127.0.0.1", "A.b-c_1/2"])
def test_names_and_endpoints(
    hub: Hub, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str, slash: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.front.url + slash)
    hub.publish(source, name)
    tinygpt2.download(name, out)
    assert out.read_bytes() == converted(source)


@pytest.mark.parametrize("revision", ["v1.0", "0a1b2c3d", "refs/pr/1"])
def test_revisions(hub: Hub, source: Path, out: Path, revision: str) -> None:
    """One with slashes is one part of the path, as the hub's own library writes it."""
    hub.publish(source, revision=revision)
    tinygpt2.download(NAME, out, revision)
    assert out.read_bytes() == converted(source)


@pytest.mark.parametrize("header", ["Content-Length", "ETag"])
def test_server_that_tells_less(hub: Hub, source: Path, out: Path, header: str) -> None:
    hub.publish(source)
    for file in ("config.json", "vocab.json"):
        hub.page(file).headers[header] = ""
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)


def test_renamed_repository(hub: Hub, source: Path, out: Path) -> None:
    """The hub answers for the old name with a redirect to a path of its own."""
    hub.publish(source, "openai-community/gpt2")
    for path in [*hub.front.pages]:
        old = path.replace("openai-community/", "")
        hub.front.pages[old] = Page(b"moved", 307, {"Location": path})
    tinygpt2.download("gpt2", out)
    assert out.read_bytes() == converted(source)


# ------------------------------------------------------------------------------------------------
# Broken connections
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["end", "reset", "silence"])
def test_broken_connection_is_taken_up_again(
    hub: Hub, source: Path, out: Path, converter: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(converter, "TIMEOUT", 0.5)
    hub.publish(source)
    half = len(hub.weights.content) // 2
    hub.weights.breaks = [(half, way)]
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)
    first, second = hub.ranges
    assert first is None
    assert second == f"bytes={half}-" or way != "end"  # else the last block may be lost


@pytest.mark.parametrize("way", ["end", "reset", "silence"])
def test_message_says_how_much_arrived(
    hub: Hub, source: Path, out: Path, converter: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(converter, "TIMEOUT", 0.5)
    hub.publish(source)
    hub.weights.breaks = [(1000, way)] * 2
    fails(out, rf"{WEIGHTS}.*\b\d+ of {len(hub.weights.content)} bytes.*run the same again")


def test_next_call_goes_on(hub: Hub, source: Path, out: Path) -> None:
    hub.publish(source)
    hub.weights.breaks = [(1000, "end"), (500, "end")]
    fails(out, f"1500 of {len(hub.weights.content)} bytes after 2 attempts")
    assert 1500 in left_behind(out).values()
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)
    assert hub.ranges == [None, "bytes=1000-", "bytes=1500-"]
    assert set(left_behind(out)) == {out.name}


def test_server_without_ranges(hub: Hub, source: Path, out: Path) -> None:
    hub.publish(source)
    hub.storage.knows_ranges = False
    hub.weights.breaks = [(1000, "end")]
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)
    assert hub.ranges == [None, "bytes=1000-"]


def test_file_that_arrived_whole_is_not_fetched_again(
    hub: Hub, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the last byte and before the check, by a full disk or a user."""
    hub.publish(source)

    def stop(label: str, done: int, total: int) -> None:
        if label == WEIGHTS and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tinygpt2.download(NAME, out, progress=stop)
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)
    assert hub.ranges == [None]


@pytest.mark.parametrize("again", ["changed", "other name"])
def test_what_another_download_left_is_not_used(
    hub: Hub, source: Path, other_source: Path, out: Path, again: str
) -> None:
    """Files of two models must never be mixed, though they would fit together."""
    hub.publish(source)
    hub.weights.breaks = [(1000, "end")] * 2
    fails(out, "2000 of")
    name = NAME if again == "changed" else "other/name"
    hub.publish(other_source, name)
    tinygpt2.download(name, out)
    assert out.read_bytes() == converted(other_source)
    assert hub.ranges == [None, "bytes=1000-", None]


def test_unreachable_endpoint(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    fails(out, f"127.0.0.1:{port}.*refused")


@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "http://[", "foo://x", "http://a b"])
def test_endpoint_that_is_none(
    hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    fails(out, "config.json")


# ------------------------------------------------------------------------------------------------
# Refusals
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "pattern"),
    [
        (401, "check the name.*HF_TOKEN"),
        (403, "HF_TOKEN"),
        (404, "check the name"),
        (410, "410"),
        (416, "416"),
    ],
)
def test_refusal_is_final(hub: Hub, source: Path, out: Path, status: int, pattern: str) -> None:
    """The hub answers 401 for a repository that does not exist, too."""
    hub.publish(source)
    hub.page("config.json").failures = [status]
    fails(out, f"{NAME}/resolve/main/config.json.*{pattern}")
    assert len(hub.front.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_overloaded_server_is_asked_again(hub: Hub, source: Path, out: Path, status: int) -> None:
    hub.publish(source)
    hub.page("vocab.json").failures = [status]
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)


@pytest.mark.parametrize("status", [429, 500])
def test_overloaded_server_is_left_in_the_end(
    hub: Hub, source: Path, out: Path, status: int
) -> None:
    hub.publish(source)
    hub.weights.failures = [status] * 2
    fails(out, f"{WEIGHTS}.*{status}.*2 attempts")
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)


@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_missing_file(hub: Hub, source: Path, out: Path, missing: str) -> None:
    """Without weights in one file the index of shards is looked for."""
    hub.publish(source)
    del hub.front.pages[f"/{NAME}/resolve/main/{missing}"]
    fails(out, INDEX if missing == WEIGHTS else missing)


def test_missing_shard(hub: Hub, source: Path, tmp_path: Path, out: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "checkpoint")
    cut_into_shards(folder)
    hub.publish(folder)
    del hub.front.pages[f"/{NAME}/resolve/main/model-00002-of-00002.safetensors"]
    fails(out, "model-00002-of-00002.safetensors: there is no such file")


@pytest.mark.parametrize("shard", ["../config.json", "/etc/passwd", "a/b", "..", ""])
def test_shard_elsewhere(hub: Hub, source: Path, tmp_path: Path, out: Path, shard: str) -> None:
    folder = shutil.copytree(source, tmp_path / "checkpoint")
    (folder / WEIGHTS).unlink()
    write_json(folder / INDEX, {"weight_map": {"wte.weight": shard}})
    hub.publish(folder)
    with pytest.raises(tinygpt2.FormatError, match="weight_map"):
        tinygpt2.download(NAME, out)
    assert not out.exists()
    assert all(request.path.rpartition("/")[2] != "passwd" for request in hub.front.requests)


@pytest.mark.parametrize("file", ["vocab.json", WEIGHTS])
def test_wrong_hash(hub: Hub, source: Path, out: Path, file: str) -> None:
    hub.publish(source)
    page = hub.weights if file == WEIGHTS else hub.page(file)
    page.content, good = page.content[:-1] + b"?", page.content
    fails(out, f"{file}.*hash.*[0-9a-f]{{40}}")
    assert not any(name.startswith(file) for name in left_behind(out))
    page.content = good
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)


def test_more_bytes_than_announced(hub: Hub, source: Path, out: Path) -> None:
    hub.publish(source)
    announced = len(hub.weights.content)
    hub.weights.content += b"and more"
    fails(out, f"{WEIGHTS}.*more than the announced {announced} bytes")
    hub.weights.content = hub.weights.content[:announced]
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)


def test_another_architecture(hub: Hub, tmp_path: Path, out: Path) -> None:
    """It is refused by name, before its weights are fetched."""
    hub.publish(write_checkpoint(tmp_path / "llama", {"model_type": "llama"}))
    with pytest.raises(tinygpt2.FormatError, match=r"model_type.*'llama'"):
        tinygpt2.download(NAME, out)
    assert not out.exists()
    assert hub.storage.requests == []


FULL_DISK = """
import resource, sys, tinygpt2
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(tinygpt2.main(sys.argv[1:]))
"""


def test_full_disk(hub: Hub, source: Path, out: Path) -> None:
    """The weights do not fit; with room again, the same command goes on."""
    pytest.importorskip("resource", reason="limits the size of files")
    hub.publish(source)
    done = run_python(FULL_DISK, "download", NAME, "-o", out)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"tinygpt2: error: {NAME}: File too large")
    assert done.stderr.count("\n") == 1
    assert not out.exists()
    assert 50_000 in left_behind(out).values()
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)
    assert hub.ranges == [None, "bytes=50000-"]


# ------------------------------------------------------------------------------------------------
# Names, secrets, the cache
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "x/..", "a/b/c", "/a", "a/", "a//b", "~", "http://a/b", "a/b?c"),
        *("a b", "a\n", "a#b", "a%2fb", "a\\b", "C:a", "a\0", "\u00fc/x", "a/\u0663", "./a", "a/."),
    ],
)
def test_hostile_name(hub: Hub, out: Path, name: str) -> None:
    with pytest.raises(tinygpt2.InputError, match="model name"):
        tinygpt2.download(name, out)
    assert hub.front.requests == []


@pytest.mark.parametrize("revision", ["", "..", "../main", "a b", "a?b", "/etc", "a//b", "\u00fc"])
def test_hostile_revision(hub: Hub, out: Path, revision: str) -> None:
    with pytest.raises(tinygpt2.InputError, match="revision"):
        tinygpt2.download(NAME, out, revision)
    assert hub.front.requests == []


@pytest.mark.parametrize("value", [None, 5, b"gpt2", ["gpt2"]])
def test_arguments_of_another_type(hub: Hub, out: Path, value: Any) -> None:
    with pytest.raises(tinygpt2.InputError, match="model name"):
        tinygpt2.download(value, out)
    with pytest.raises(tinygpt2.InputError, match="revision"):
        tinygpt2.download(NAME, out, value)
    assert hub.front.requests == []


@pytest.mark.parametrize("place", [None, 5, 1.5, ["a"], "nul\0.tg2", "\ud800.tg2"], ids=ascii)
def test_place_that_is_no_path(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any
) -> None:
    hub.publish(source)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(tinygpt2.InputError, match="out: expected a path"):
        tinygpt2.download(NAME, place)
    assert sorted(tmp_path.iterdir()) == before
    assert hub.front.requests == []


def test_token_goes_to_the_hub_alone(
    hub: Hub, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    hub.publish(source)
    hub.front.pages["/hop"] = hub.page(WEIGHTS)
    here = Page(b"", 307, {"Location": hub.front.url + "/hop"})
    hub.front.pages[f"/{NAME}/resolve/main/{WEIGHTS}"] = here
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)
    tokens = [request.headers.get("Authorization") for request in hub.front.requests]
    assert set(tokens) == {"Bearer hf_secret"}
    assert len(hub.storage.requests) == 1
    assert "Authorization" not in hub.storage.requests[0].headers


def test_no_token(hub: Hub, source: Path, out: Path) -> None:
    hub.publish(source)
    tinygpt2.download(NAME, out)
    requests = hub.front.requests + hub.storage.requests
    assert [request for request in requests if "Authorization" in request.headers] == []


@pytest.mark.parametrize("token", ["hf_sec\nret", "hf_sécret\u20ac"])
def test_malformed_token_is_not_shown(
    hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(tinygpt2.DownloadError, match="HF_TOKEN") as caught:
        tinygpt2.download(NAME, out)
    assert "hf_s" not in str(caught.value)


@pytest.mark.parametrize("value", ["1", "true", "YES", "On"])
def test_offline(
    hub: Hub, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    hub.publish(source)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    fails(out, f"{NAME}: HF_HUB_OFFLINE is set")
    assert hub.front.requests == []
    assert left_behind(out) == {}


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_not_offline(
    hub: Hub, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    hub.publish(source)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    tinygpt2.download(NAME, out)
    assert out.exists()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path, source: Path, name: str = NAME) -> Path:
    """A model as the hub's own library keeps it: links to blobs, under the name of a commit."""
    repository = cache / ("models--" + name.replace("/", "--"))
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for folder in (repository / "refs", snapshot, blobs):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT, "utf-8")
    for path in source.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


@pytest.mark.parametrize(
    ("variable", "folder"),
    [
        ("HF_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
        ("HOME", ".cache/huggingface/hub"),
    ],
)
@pytest.mark.parametrize("offline", ["0", "1"])
def test_cache_is_used(
    hub: Hub,
    source: Path,
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    folder: str,
    offline: str,
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv(variable, str(tmp_path / "some"))
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    fill_cache(tmp_path / "some" / folder, source)
    out.parent.mkdir()
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)
    assert hub.front.requests == []
    assert set(left_behind(out)) == {out.name}


@pytest.mark.parametrize(
    ("cached", "asked", "revision"),
    [(NAME, NAME, COMMIT), ("openai-community/gpt2", "gpt2", "main")],
)
def test_cache_by_commit_and_by_old_name(
    hub: Hub, source: Path, tmp_path: Path, cached: str, asked: str, revision: str
) -> None:
    fill_cache(tmp_path / "home" / "hub", source, cached)
    tinygpt2.download(asked, tmp_path / "model.tg2", revision)
    assert (tmp_path / "model.tg2").read_bytes() == converted(source)
    assert hub.front.requests == []


@pytest.mark.parametrize("missing", ["config.json", "vocab.json", "merges.txt", WEIGHTS])
@pytest.mark.parametrize("link", ["dangling", "absent"])
def test_incomplete_cache_is_not_used(
    hub: Hub, source: Path, tmp_path: Path, out: Path, missing: str, link: str
) -> None:
    hub.publish(source)
    path = fill_cache(tmp_path / "home" / "hub", source) / missing
    (path if link == "absent" else path.resolve()).unlink()
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)
    assert len(hub.ranges) == 1


def test_cache_without_a_shard_is_not_used(
    hub: Hub, source: Path, tmp_path: Path, out: Path
) -> None:
    folder = shutil.copytree(source, tmp_path / "checkpoint")
    cut_into_shards(folder)
    hub.publish(folder)
    snapshot = fill_cache(tmp_path / "home" / "hub", folder)
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(folder)
    assert len(hub.ranges) == 2


@pytest.mark.parametrize("reference", [b"", b"\xff", b"..", b"\0", b"absent"])
def test_damaged_cache_is_not_used(
    hub: Hub, source: Path, tmp_path: Path, out: Path, reference: bytes
) -> None:
    hub.publish(source)
    snapshot = fill_cache(tmp_path / "home" / "hub", source)
    (snapshot.parent.parent / "refs" / "main").write_bytes(reference)
    tinygpt2.download(NAME, out)
    assert out.read_bytes() == converted(source)
    assert len(hub.ranges) == 1


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def test_command(
    hub: Hub,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hub.publish(source, revision="v2")
    monkeypatch.chdir(tmp_path)
    assert tinygpt2.main(["download", NAME, "--revision", "v2"]) == 0
    assert (tmp_path / "name.tg2").read_bytes() == converted(source)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "code"), [("absent/model", 1), ("../x", 2), ("a/b/c", 2)])
def test_command_fails(
    hub: Hub, out: Path, capfd: pytest.CaptureFixture[str], name: str, code: int
) -> None:
    assert tinygpt2.main(["download", name, "-o", str(out)]) == code
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("tinygpt2: error: ")
    assert printed.err.count("\n") == 1
    assert not out.exists()
