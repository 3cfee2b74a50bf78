"""The weight file: what is written, what is read back, and that no bad file gets through."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from conftest import (
    ROOT,
    TOY,
    read_safetensors,
    run_python,
    slow,
    write_checkpoint,
    write_safetensors,
)

import tinygpt2

T = TypeVar("T")

# Every size is odd or small, so that everything that can be padded is padded.
SMALL = {
    "vocab_size": 270,
    "n_positions": 9,
    "n_embd": 6,
    "n_layer": 1,
    "n_head": 2,
    "n_inner": 19,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .tg2 file of the smallest model with a tokenizer and an untied head."""
    folder = tmp_path_factory.mktemp("small")
    tinygpt2.convert(write_checkpoint(folder / "checkpoint", SMALL), folder / "small.tg2")
    return folder / "small.tg2"


@pytest.fixture(scope="module")
def tied_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .tg2 file with few tensors: it has no tokenizer, and a tied head."""
    folder = tmp_path_factory.mktemp("tied")
    config = {**SMALL, "tie_word_embeddings": True}
    tinygpt2.convert(write_checkpoint(folder / "m", config, tokenizer=False), folder / "tied.tg2")
    return folder / "tied.tg2"


def pack(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of a header (bytes are taken as they are) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def unpack(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a good file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def pack_aligned(header: dict[str, Any], data: bytes, shift: int = 0) -> bytes:
    """The same with the data at `shift` bytes behind a multiple of 64, and a right checksum."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return seal(pack(text + b" " * ((shift - 8 - len(text)) % 64), data))


CRC_FIELD = re.compile(rb'"header_crc32":"[0-9a-f]{8}"')


def seal(content: bytes) -> bytes:
    """The file with the right checksum of its header, if there is a place for one."""
    start = 8 + int.from_bytes(content[:8], "little")
    head = CRC_FIELD.sub(b'"header_crc32":"00000000"', content[:start], count=1)
    field = b'"header_crc32":"%08x"' % zlib.crc32(head)
    return CRC_FIELD.sub(field, head, count=1) + content[start:]


def refusal(path: Path | str, field: str, open_file: Callable[[Any], object]) -> str:
    """The message of the FormatError that opening raises, which must name the file and `field`."""
    with pytest.raises(tinygpt2.FormatError) as caught:
        open_file(path)
    error, message = caught.value, str(caught.value)
    assert (error.path, error.field) == (str(path), field), message
    assert f": {field}: expected " in message
    assert "\0" not in message
    assert ", found " in message
    assert message.isprintable() or "\0" in str(path)
    assert len(message) < len(str(path)) + 400, "a message is a line, whatever the file holds"
    return message


# What is written


def layout_lengths(config: dict[str, Any]) -> dict[str, int]:
    """How many outputs, elements or columns of a tensor are not padding, by the end of its name."""
    return {
        "c_attn.weight": 3 * config["n_embd"],
        "c_attn.bias": 3 * config["n_embd"],
        "c_fc.weight": config["n_inner"],
        "c_fc.bias": config["n_inner"],
        "wte.weight": config["vocab_size"],
        "lm_head.weight": config["vocab_size"],
        "vocab.bytes": config["n_token_bytes"],
        "vocab.offsets": config["vocab_size"] + 1,
        "vocab.byte_ids": 256,
        "merges.pairs": config["n_merges"],
        "merges.ranks": config["n_merges"],
        "merges.results": config["n_merges"],
        "": config["n_embd"],
    }


def test_padding_is_zeros(small_path: Path) -> None:
    metadata, tensors = read_safetensors(small_path)
    lengths = layout_lengths(json.loads(metadata["config"]))
    for name, array in tensors.items():
        length = next(length for end, length in lengths.items() if name.endswith(end))
        columns = array.swapaxes(0, 1).reshape(array.shape[1], -1) if array.ndim == 3 else array
        assert not columns[..., length:].any(), name
        assert columns.shape[-1] - length < 64, name
        assert columns[..., :length].any(), name


@pytest.mark.parametrize("file", ["small_path", "toy_path"])
def test_every_tensor_starts_on_a_cache_line(file: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(file)
    header, data = unpack(path)
    start = path.stat().st_size - len(data)
    starts = [
        start + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"
    ]
    assert len(starts) > 20
    assert all(start % 64 == 0 for start in starts)
    assert path.read_bytes()[8:start].rstrip(b" ").endswith(b"}")


def test_checksum_is_the_crc32_of_the_data(small_path: Path) -> None:
    header, data = unpack(small_path)
    with contextlib.closing(tinygpt2.TensorFile(small_path)) as file:
        assert file.checksum() == f"{zlib.crc32(data):08x}" == header["__metadata__"]["crc32"]


@pytest.mark.parametrize("file", ["small_path", "toy_path", "tied_path"])
def test_version_2_is_written(file: str, request: pytest.FixtureRequest) -> None:
    """The header's checksum is worked out by hand: its own digits count as zeros."""
    path: Path = request.getfixturevalue(file)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:start])["__metadata__"]
    assert sorted(metadata) == ["config", "crc32", "format", "format_version", "header_crc32"]
    assert (metadata["format"], metadata["format_version"]) == ("tinygpt2", "2")
    place = content.index(b'"header_crc32":"') + len(b'"header_crc32":"')
    assert content[:start].count(b'"header_crc32":"') == 1
    zeroed = content[:place] + b"00000000" + content[place + 8 : start]
    assert content[place : place + 9] == b'%08x"' % zlib.crc32(zeroed)
    config = json.loads(metadata["config"])
    assert config["eos_token_ids"] == [264]
    assert "eos_token_id" not in config


# A flip of each bit, and characters that make other JSON of a header.
REPLACEMENTS = b'0129-.+eE"{}[]:,_ afltnu\\\n\0\xff'


def flips(content: bytes, place: int) -> list[int]:
    """All other values of a byte that the test puts there."""
    values = {content[place] ^ 1 << bit for bit in range(8)} | set(REPLACEMENTS)
    return sorted(values - {content[place]})


def survivors(
    path: Path, places: Iterable[int], choose: Callable[[list[int]], list[int]]
) -> list[tuple[int, int, int]]:
    """Changes of one byte of a header after which the file still loads."""
    content, survived = path.read_bytes(), []
    with path.open("r+b", buffering=0) as file:
        for place in places:
            for value in choose(flips(content, place)):
                file.seek(place)
                file.write(bytes([value]))
                with contextlib.suppress(tinygpt2.FormatError):
                    tinygpt2.load(path, backend="numpy").close()
                    survived.append((place, content[place], value))
            file.seek(place)
            file.write(content[place : place + 1])
    return survived


@pytest.mark.parametrize(
    "step", [293, pytest.param(1, marks=pytest.mark.slow)], ids=["some values", "all values"]
)
def test_no_change_of_a_byte_of_the_header_passes(
    tied_path: Path, tmp_path: Path, step: int
) -> None:
    """Every byte of a fresh file's header, which includes its length and its padding."""
    path = tmp_path / "copy.tg2"
    shutil.copy(tied_path, path)
    start = path.stat().st_size - len(unpack(path)[1])
    assert survivors(path, range(start), lambda values: values[start % step :: step]) == []
    tinygpt2.load(path).close()


MISSING, FORM, WRONG = (
    "none in version 1",
    "the field once, without spaces",
    "a header with the CRC",
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r',"header_crc32":"[0-9a-f]{8}"', "", MISSING),
        (r'"header_crc32":', '"header_crc33":', MISSING),
        (r'"header_crc32":"[0-9a-f]{8}"', '"header_crc32":"00000000"', WRONG),
        (r'"header_crc32":"[0-9a-f]{8}"', '"header_crc32":""', FORM),
        (r'"header_crc32":"([0-9a-f]{7})[0-9a-f]"', r'"header_crc32":"\1"', FORM),
        (r'"header_crc32":"([0-9a-f]{8})"', r'"header_crc32":"\g<1>0"', FORM),
        (r'"header_crc32":"', '"header_crc32": "', FORM),
        (r'"header_crc32":"', '"header_crc32" :"', FORM),
        (r'"header_crc32":"', r'"header\\u005fcrc32":"', FORM),
        (r'"header_crc32":"([0-9a-f]{7})[0-9a-f]"', r'"header_crc32":"\1\\u0030"', FORM),
    ],
)
def test_header_checksum_missing_or_wrong(
    small_path: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "bad.tg2"
    header, data = unpack(small_path)
    text = json.dumps(header, separators=(",", ":"))
    changed = re.sub(old, new, text)
    assert changed != text
    path.write_bytes(pack(changed.encode().ljust(-(-len(changed) // 64) * 64 + 56), data))
    assert message in refusal(path, "__metadata__ header_crc32", tinygpt2.load)


def test_header_checksum_in_capitals(small_path: Path, tmp_path: Path) -> None:
    """A header is changed until its right checksum has a letter, which is then a capital."""
    path = tmp_path / "bad.tg2"
    header, data = unpack(small_path)
    for extra in range(100):
        header["__metadata__"]["note"] = str(extra)
        path.write_bytes(pack_aligned(header, data))
        tinygpt2.load(path).close()
        field = CRC_FIELD.findall(path.read_bytes())[0]
        capitals = field[:16] + field[16:].upper()
        if capitals != field:
            break
    path.write_bytes(path.read_bytes().replace(field, capitals))
    refusal(path, "__metadata__ header_crc32", tinygpt2.load)


def test_header_checksum_twice(small_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.tg2"
    content = small_path.read_bytes()
    field = CRC_FIELD.findall(content)[0]
    for again in (field, b'"header_crc32":"00000000"'):
        start = 8 + int.from_bytes(content[:8], "little")
        head = content[8:start].rstrip().replace(field, field + b"," + again)
        path.write_bytes(seal(pack(head.ljust(-(-len(head) // 64) * 64 + 56), content[start:])))
        assert "twice" in refusal(path, "header", tinygpt2.load)


def as_version_1(header: dict[str, Any]) -> None:
    """The header as version 1 had it: one end token or null, special tokens by their texts, and no
    checksum of its own."""
    metadata = header["__metadata__"]
    config = json.loads(metadata["config"])
    config["special_tokens"] = {token["text"]: token["id"] for token in config.pop("added_tokens")}
    del config["tokens_before"], config["tokens_after"], config["generation"]
    ends = config.pop("eos_token_ids")
    config["eos_token_id"] = ends[0] if ends else None
    metadata.update(format_version="1", config=json.dumps(config))
    del metadata["header_crc32"]


def test_version_1_is_read(small_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.tg2"
    write_changed(small_path, path, as_version_1)
    with tinygpt2.load(path) as old, tinygpt2.load(small_path) as new:
        assert old.config == new.config
        np.testing.assert_array_equal(old.logits([1, 2]), new.logits([1, 2]))


def test_version_1_without_an_end_token(small_path: Path, tmp_path: Path) -> None:
    path, old = tmp_path / "new.tg2", tmp_path / "old.tg2"
    write_config(small_path, path, "eos_token_ids", [])
    write_changed(path, old, as_version_1)
    with tinygpt2.load(old) as model:
        assert model.config.eos_token_ids == ()


BAD_IDS: list[object] = [270, -1, True, "1", 1.0]
NO_OBJECTS: list[object] = [None, [], "x"]
BAD_VERSION_1: list[tuple[str, object, str]] = [
    *(("eos_token_id", value, "eos_token_ids") for value in [*BAD_IDS, [1], {}]),
    *(("special_tokens", value, "special_tokens") for value in NO_OBJECTS),
    *(("special_tokens", {"x": i}, "added_tokens") for i in [*BAD_IDS, None]),
    ("special_tokens", {"": 1}, "added_tokens"),
    ("special_tokens", {"x": 1, "y": 1}, "added_tokens"),
]


@pytest.mark.table
@pytest.mark.parametrize(("name", "value", "field"), BAD_VERSION_1, ids=repr)
def test_version_1_with_bad_values(
    small_path: Path, tmp_path: Path, name: str, value: object, field: str
) -> None:
    path = tmp_path / "bad.tg2"

    def change(header: dict[str, Any]) -> None:
        as_version_1(header)
        config = json.loads(header["__metadata__"]["config"])
        header["__metadata__"]["config"] = json.dumps({**config, name: value})

    write_changed(small_path, path, change)
    refusal(path, f"config {field}", tinygpt2.load)


def test_default_model_is_of_version_1() -> None:
    """Until it is replaced, it is the file that shows that version 1 is read."""
    path = ROOT / "vendor" / "tales.tg2"
    header, _ = unpack(path)
    assert header["__metadata__"]["format_version"] == "1"
    old = json.loads(header["__metadata__"]["config"])
    with tinygpt2.load(path) as model:
        assert model.config.eos_token_ids == (old["eos_token_id"],)
        assert np.isfinite(model.logits([1, 2])).all()
    assert tinygpt2.main(["info", "--model", str(path), "--verify"]) == 0


def test_verify_finds_a_flipped_bit(
    small_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.tg2"
    content = bytearray(small_path.read_bytes())
    start = len(content) - len(unpack(small_path)[1])
    copy.write_bytes(content)
    assert tinygpt2.main(["info", "--model", str(copy), "--verify"]) == 0
    capsys.readouterr()
    # Bits of weights, and of padding that nothing reads.
    for at in (start, start + 1001, len(content) // 2, len(content) - 1):
        content[at] ^= 0x10
        copy.write_bytes(content)
        assert tinygpt2.main(["info", "--model", str(copy), "--verify"]) == 1, at
        out, err = capsys.readouterr()
        assert not out
        assert f"{copy}: data: expected the CRC-32 " in err
        content[at] ^= 0x10


def test_safetensors_reads_what_we_write(small_path: Path) -> None:
    library = pytest.importorskip("safetensors", reason="needs safetensors, to compare with")
    theirs = pytest.importorskip("safetensors.numpy").load_file(small_path)
    with contextlib.closing(tinygpt2.TensorFile(small_path)) as file:
        views: dict[str, tuple[Any, Any]] = {"U32": ("I", np.uint32), "U64": ("Q", np.uint64)}
        assert theirs.keys() == file.tensors.keys()
        for name, tensor in file.tensors.items():
            if tensor.dtype in views:
                code, dtype = views[tensor.dtype]
                ours = np.array(file.view(name, code), dtype).reshape(tensor.shape)
            else:
                ours = file.array(name)
            assert (theirs[name].dtype, theirs[name].shape) == (ours.dtype, ours.shape)
            np.testing.assert_array_equal(theirs[name], ours)
        with library.safe_open(small_path, "numpy") as opened:
            assert opened.metadata() == file.metadata


SAFETENSORS_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}


@pytest.mark.parametrize("shape", [(2, 3), (), (0,), (3, 0, 2)], ids=str)
def test_we_read_what_safetensors_writes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    library = pytest.importorskip("safetensors", reason="needs safetensors, to compare with")
    assert SAFETENSORS_NAMES.keys() == tinygpt2.DTYPE_SIZES.keys()
    count = math.prod(shape)
    random = np.random.default_rng(0)
    contents = {n: random.bytes(count * size) for n, size in tinygpt2.DTYPE_SIZES.items()}
    buffers = {n: ctypes.create_string_buffer(c, len(c)) for n, c in contents.items()}
    entries = {
        name: library.TensorSpec(
            dtype=SAFETENSORS_NAMES[name],
            shape=list(shape),
            data_ptr=ctypes.addressof(buffer),
            data_len=len(contents[name]),
        )
        for name, buffer in buffers.items()
    }
    metadata = {"format": "pt", "é": "\n\u2028\U0001f600"}
    library.serialize_file(entries, tmp_path / "all.safetensors", metadata)
    with contextlib.closing(tinygpt2.TensorFile(tmp_path / "all.safetensors")) as file:
        assert file.metadata == metadata
        assert file.tensors.keys() == contents.keys()
        for name, tensor in file.tensors.items():
            assert (tensor.dtype, tensor.shape) == (name, shape)
            assert file.map[tensor.start : tensor.stop] == contents[name]
        for name, code in {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}.items():
            ours = file.array(name)
            assert (ours.dtype, ours.shape) == (np.dtype(code), shape)
            assert ours.tobytes() == contents[name]


@pytest.mark.parametrize(
    ("header", "data", "names"),
    [
        ({}, b"", []),
        ({"__metadata__": {}}, b"", []),
        (
            {
                "second": {"dtype": "U8", "shape": [2], "data_offsets": [4, 6]},
                "first": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
                "none": {"dtype": "F32", "shape": [2, 0], "data_offsets": [4, 4]},
            },
            b"123456",
            ["second", "first", "none"],
        ),
    ],
    ids=["empty", "metadata alone", "names in another order than the data"],
)
def test_unusual_but_good(
    tmp_path: Path, header: dict[str, Any], data: bytes, names: list[str]
) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(pack(header, data))
    with contextlib.closing(tinygpt2.TensorFile(path)) as file:
        assert list(file.tensors) == names


# What is not a file


def no_file(folder: Path) -> Path:
    return folder / "none.tg2"


def directory(folder: Path) -> Path:
    return folder


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo.tg2")
    return folder / "fifo.tg2"


def empty_file(folder: Path) -> Path:
    (folder / "empty.tg2").touch()
    return folder / "empty.tg2"


def nul_in_path(folder: Path) -> Path:
    return folder / "a\0b.tg2"


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Turn a call that blocks into an error, so that a test that fails does not hang."""

    def ring(*_: object) -> None:
        raise RuntimeError(f"blocked for {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (no_file, "No such file or directory"),
        (directory, "a directory"),
        (fifo, "a device, pipe or socket"),
        (empty_file, "an empty file"),
        (nul_in_path, "embedded null byte"),
    ],
)
def test_not_a_file(tmp_path: Path, make: Callable[[Path], Path], found: str) -> None:
    path = make(tmp_path)
    with time_limit(10):
        assert found in refusal(path, "file", tinygpt2.load)


def test_file_without_permission(small_path: Path, tmp_path: Path) -> None:
    """Root may read everything, so another user tries; from inside, as the way there is root's."""
    shutil.copy(small_path, tmp_path / "secret.tg2")
    (tmp_path / "secret.tg2").chmod(0)
    tmp_path.chmod(0o755)
    code = """if True:
        import os, sys, tinygpt2
        os.chdir(sys.argv[1])
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            tinygpt2.load("secret.tg2")
        except tinygpt2.FormatError as error:
            print(error.path, error.field, error, sep="|")
    """
    done = run_python(code, tmp_path)
    assert done.stdout.startswith(
        "secret.tg2|file|secret.tg2: file: expected a readable file, found Permission denied"
    ), done.stderr


# What is not safetensors


def entry(**changes: Any) -> dict[str, Any]:
    """A good entry of four bytes at the start of the data, with changes."""
    return {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **changes}


HUGE = 10**4299  # json reads 4300 digits at most, since Python 3.11
LENGTH, A = "header length", "tensor 'a'"
BAD_OFFSETS: list[object] = [
    *(None, 4, "04", {}, [], [4], [0, 4, 4], [-4, 0], [0.0, 4.0], [False, 4], ["0", "4"]),
    *([4, 0], [0, 3], [0, 5], [0, None], [1, 5], [2**64, 2**64 + 4], [HUGE, HUGE + 4]),
]
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "1 byte": (b"\0", LENGTH),
    "7 bytes": (b"\x02\0\0\0\0\0\0", LENGTH),
    "length beyond the end": (b"\x03\0\0\0\0\0\0\0{}", LENGTH),
    "length of all ones": (b"\xff" * 8 + b"{}", LENGTH),
    "header of 0 bytes": (b"\0\0\0\0\0\0\0\0", "header"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "header"),
    "half a character": (pack(b'{"\xc3"}'), "header"),
    "UTF-16": (pack("{}".encode("utf-16")), "header"),
    "byte order mark": (pack(b"\xef\xbb\xbf{}"), "header"),
    "half an object": (pack(b'{"a":'), "header"),
    "two objects": (pack(b"{}{}"), "header"),
    "bytes after the object": (pack(b"{}\0"), "header"),
    "spaces": (pack(b"        "), "header"),
    "list": (pack(b"[]"), "header"),
    "null": (pack(b"null"), "header"),
    "number": (pack(b"17"), "header"),
    "text": (pack(b'"{}"'), "header"),
    "the same tensor twice": (pack(b'{"a":{},"a":{}}'), "header"),
    "the same key twice": (pack(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "header"),
    "NaN": (pack(b'{"a":NaN}'), "header"),
    "Infinity": (pack(b'{"a":Infinity}'), "header"),
    "-Infinity": (pack(b'{"a":-Infinity}'), "header"),
    "deep lists": (pack(b"[" * 200_000 + b"]" * 200_000), "header"),
    "deep objects": (pack(b'{"a":' * 200_000 + b"{" + b"}" * 200_001), "header"),
    "metadata is null": (pack({"__metadata__": None}), "__metadata__"),
    "metadata is a list": (pack({"__metadata__": []}), "__metadata__"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata of objects": (pack({"__metadata__": {"a": {}}}), "__metadata__"),
    "entry is null": (pack({"a": None}), A),
    "entry is a list": (pack({"a": [4]}), A),
    "entry is empty": (pack({"a": {}}), A),
    "entry without shape": (pack({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234"), A),
    "entry with more": (pack({"a": entry(stride=1)}, b"1234"), A),
    "strange name": (pack({"\n\x1b[2J\u202e" * 99: {}}), "tensor '" + r"\n\x1b[2J\u202e" * 99),
    **{
        f"dtype {value!r}": (pack({"a": entry(dtype=value)}, b"1234"), f"{A} dtype")
        for value in ("u8", "F128", "", None, 8, ["U8"], {"U8": 1})
    },
    **{
        f"shape {value!r}": (pack({"a": entry(shape=value)}, b"1234"), f"{A} shape")
        for value in (None, 4, "4", {"0": 4}, [-4], [-2, -2], [True], [4.0], ["4"], [None], [[4]])
    },
    **{
        f"shape {name}": (pack({"a": entry(shape=value)}, b"1234"), f"{A} data_offsets")
        for name, value in {
            "too small": [3],
            "too large": [5],
            "product too large": [2, 3],
            "of no elements": [4, 0],
            "2**64 + 4, which wraps to 4": [2**64 + 4],
            "2**32 * 2**32, which wraps to 0": [2**32, 2**32],
            "2**62 * 4 + 4": [4, 2**62 + 1],
            "of 4300 digits": [HUGE],
            "of many huge counts": [HUGE] * 99,
        }.items()
    },
    "wraps to 0 in 64 bits": (
        pack({"a": entry(dtype="F32", shape=[2**62], data_offsets=[0, 0])}),
        f"{A} data_offsets",
    ),
    **{
        f"offsets {str(value)[:20]}": (
            pack({"a": entry(data_offsets=value)}, b"1234"),
            f"{A} data_offsets",
        )
        for value in BAD_OFFSETS
    },
    "huge offsets of nothing": (
        pack({"a": entry(shape=[0], data_offsets=[10 * HUGE - 1, 10 * HUGE - 1])}),
        f"{A} data_offsets",
    ),
    "overlap": (
        pack({"a": entry(), "b": entry(data_offsets=[3, 7])}, b"1234567"),
        "tensor 'b' data_offsets",
    ),
    "the same bytes twice": (
        pack({"a": entry(), "b": entry()}, b"1234"),
        "tensor 'b' data_offsets",
    ),
    "gap": (
        pack({"a": entry(), "b": entry(data_offsets=[5, 9])}, b"123456789"),
        "tensor 'b' data_offsets",
    ),
    "gap at the start": (
        pack({"a": entry(data_offsets=[1, 5])}, b"12345"),
        f"{A} data_offsets",
    ),
    "data cut off": (pack({"a": entry()}, b"123"), "file size"),
    "no data": (pack({"a": entry()}), "file size"),
    "bytes after the data": (pack({"a": entry()}, b"12345"), "file size"),
    "bytes of no tensor": (pack({}, b"1"), "file size"),
    "2**60 bytes": (pack({"a": entry(shape=[2**60], data_offsets=[0, 2**60])}), "file size"),
}


@pytest.mark.table
@pytest.mark.parametrize(("content", "field"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_safetensors(tmp_path: Path, content: bytes, field: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    if len(field) > 100:  # a name of the file's own making, of which the message shows the start
        with pytest.raises(tinygpt2.FormatError) as caught:
            tinygpt2.TensorFile(path)
        assert caught.value.field.startswith(field[:60])
        field = caught.value.field
    refusal(path, field, tinygpt2.TensorFile)


@pytest.mark.skipif(
    not hasattr(sys, "get_int_max_str_digits"), reason="this Python reads whole numbers of any size"
)
@pytest.mark.parametrize("digits", [20, 4300, 4301, 100_000])
def test_huge_size_in_header(tmp_path: Path, digits: int) -> None:
    """A tensor of 99... bytes: too large for the file, or for Python's JSON."""
    path = tmp_path / "huge.safetensors"
    size = b"9" * digits
    text = b'{"a":{"dtype":"U8","shape":[%b],"data_offsets":[0,%b]}}' % (size, size)
    path.write_bytes(pack(text))
    with pytest.raises(tinygpt2.FormatError) as caught:
        tinygpt2.TensorFile(path)
    assert caught.value.field in ("header", "file size", "tensor 'a' data_offsets")
    refusal(path, caught.value.field, tinygpt2.TensorFile)


def test_header_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(8 + 100_000_001)  # a hole, which takes no space
    message = refusal(path, "header length", tinygpt2.TensorFile)
    assert "expected at most 100000000, found 100000001" in message


def about_the_recursion_limit(step: int) -> range:
    """The callers of the test take a part of what is allowed, a hundred levels or so."""
    return range(sys.getrecursionlimit() - 200, sys.getrecursionlimit() + 20, step)


@pytest.mark.parametrize("step", [4, *slow(1)])
@pytest.mark.parametrize("brackets", [(b"[", b"]"), (b'{"":', b"}")], ids=["lists", "objects"])
def test_nesting_about_the_recursion_limit(
    tmp_path: Path, brackets: tuple[bytes, bytes], step: int
) -> None:
    """Where parsing just succeeds, the message about what was parsed must succeed too."""
    path = tmp_path / "deep.safetensors"
    first, last = brackets
    for depth in about_the_recursion_limit(step):
        path.write_bytes(pack(b'{"a":' + first * depth + b"1" + last * depth + b"}"))
        with pytest.raises(tinygpt2.FormatError) as caught:
            tinygpt2.TensorFile(path)
        assert caught.value.field in ("header", A)


# What is not a .tg2 file


@pytest.mark.parametrize("step", [5, *slow(1)])
def test_truncated_anywhere(small_path: Path, tmp_path: Path, step: int) -> None:
    path = tmp_path / "short.tg2"
    shutil.copy(small_path, path)
    size = path.stat().st_size
    start = size - len(unpack(path)[1])
    lengths = {*range(size - 1, start, -487), *range(start + 64, 0, -step), *range(16)}
    lengths |= {start - 1, start, start + 1}
    for length in sorted(lengths, reverse=True):
        os.truncate(path, length)
        field = "file size" if length >= start else "header length" if length else "file"
        with pytest.raises(tinygpt2.FormatError) as caught:
            tinygpt2.load(path)
        assert (caught.value.path, caught.value.field) == (str(path), field), length


def test_plain_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"wte.weight": np.zeros((2, 2), np.float32)})
    assert "convert" in refusal(path, "__metadata__ format", tinygpt2.load)


NONE = object()  # takes a name away
BAD_METADATA: list[tuple[str, object, str]] = [
    ("format", NONE, "__metadata__ format"),
    ("format", "gguf", "__metadata__ format"),
    ("format", "", "__metadata__ format"),
    ("format_version", NONE, "__metadata__ format_version"),
    ("format_version", "0", "__metadata__ format_version"),
    ("format_version", "3", "__metadata__ format_version"),
    ("format_version", "2.0", "__metadata__ format_version"),
    ("format_version", "1", "__metadata__ header_crc32"),
    ("config", NONE, "__metadata__ config"),
    ("config", "", "__metadata__ config"),
    ("config", "[]", "__metadata__ config"),
    ("config", "{", "__metadata__ config"),
    ("config", '{"n_embd":NaN}', "__metadata__ config"),
    ("config", '{"n_embd":1,"n_embd":1}', "__metadata__ config"),
    ("config", "\ud800", "__metadata__ config"),
    ("config", "[" * 100_000, "__metadata__ config"),
    ("config", "{}", "config"),
]


def write_changed(source: Path, path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A copy of a good file whose header `change` has changed."""
    header, data = unpack(source)
    change(header)
    path.write_bytes(pack_aligned(header, data))


def set_or_delete(values: dict[str, Any], name: str, value: object) -> None:
    if value is NONE:
        del values[name]
    else:
        values[name] = value


def write_config(source: Path, path: Path, name: str, value: object) -> None:
    """A copy of a good file with another value in its configuration."""

    def change(header: dict[str, Any]) -> None:
        config = json.loads(header["__metadata__"]["config"])
        set_or_delete(config, name, value)
        header["__metadata__"]["config"] = json.dumps(config)

    write_changed(source, path, change)


def test_options_that_a_model_brings(small_path: Path, tmp_path: Path) -> None:
    """A model's own defaults come before the module's, and an argument before both."""
    own: dict[str, Any] = {"temperature": 2, "top_k": 5, "max_new_tokens": 3, "max_length": 4}
    write_config(small_path, tmp_path / "own.tg2", "generation", own)
    with tinygpt2.load(small_path) as plain, tinygpt2.load(tmp_path / "own.tg2") as model:
        assert model.config.generation == own
        explicit = {name: own[name] for name in ("temperature", "top_k", "max_new_tokens")}
        for seed in range(20):
            assert model.generate_ids([1], seed=seed, top_k=None) == plain.generate_ids(
                [1], seed=seed, **explicit
            )
        greedy = plain.generate_ids([1], temperature=0, max_new_tokens=2)
        assert model.generate_ids([1], temperature=0, max_new_tokens=2) == greedy


def test_max_length_that_a_model_brings(small_path: Path, tmp_path: Path) -> None:
    """It counts the prompt, and an argument max_new_tokens comes before it."""
    write_config(small_path, tmp_path / "own.tg2", "eos_token_ids", [])
    write_config(tmp_path / "own.tg2", tmp_path / "own.tg2", "generation", {"max_length": 4})
    with tinygpt2.load(tmp_path / "own.tg2") as model, model.session() as session:
        assert len(model.generate_ids([1])) == 3
        assert len(model.generate_ids([1, 2, 3])) == 1
        assert len(model.generate_ids([1, 2, 3], max_new_tokens=5)) == 5
        with pytest.raises(tinygpt2.ContextError, match=r"is 4 tokens.*found 4 .*max_new"):
            model.generate_ids([1, 2, 3, 4])
        session.feed([1, 2])
        assert len(session.generate_ids([3])) == 1
        with pytest.raises(tinygpt2.ContextError, match="found 5"):
            session.generate_ids([3])
        assert session.tokens[:3] == [1, 2, 3]
        assert len(session) == 4  # the refused prompt was not taken


@pytest.mark.table
@pytest.mark.parametrize(("name", "value", "field"), BAD_METADATA)
def test_bad_metadata(
    small_path: Path, tmp_path: Path, name: str, value: object, field: str
) -> None:
    path = tmp_path / "bad.tg2"
    write_changed(small_path, path, lambda h: set_or_delete(h["__metadata__"], name, value))
    refusal(path, field, tinygpt2.load)


COUNTS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
SWITCHES = (
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
    "add_prefix_space",
)
BAD_END_TOKENS: list[object] = [[-1], [270], [2**32], [1.0], [True], ["1"], [[1]], [{}]]
ADDED_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
ADDED: dict[str, object] = {"text": "x", "id": 3, **dict.fromkeys(ADDED_FLAGS, False)}
BAD_VALUES: dict[str, list[object]] = {
    **{name: [None, 0, -1, 1.0, True, "8", [8], 2**31, 2**64, 10**400] for name in COUNTS},
    "activation_function": [None, "swish", "GELU", "", 1, ["gelu"], {}],
    "layer_norm_epsilon": [None, -1e-9, 1.0, 1, 1e300, "1e-5", True, [1e-5]],
    **{name: [None, 0, 1, "true", []] for name in SWITCHES},
    "bos_token_id": [-1, 270, 2**32, 1.0, True, "1", [1]],
    "eos_token_ids": [None, 1, "1", {}, *BAD_END_TOKENS],
    "added_tokens": [
        *(None, "x", {}, {"x": 1}, [1], [{}], [{"text": "x", "id": 1}]),
        *([{**ADDED, "id": id_}] for id_ in (270, -1, True, "1", 1.0, None)),
        *([{**ADDED, "text": text}] for text in ("", "x" * 257, 5, None, ["x"])),
        *([{**ADDED, name: flag}] for name in ADDED_FLAGS for flag in (None, 0, "true")),
        [{**ADDED, "other": True}],
        [ADDED, {**ADDED, "text": "y"}],
        [ADDED, {**ADDED, "id": 4}],
    ],
    "tokens_before": [None, 1, "1", {}, [3] * 1000, *BAD_END_TOKENS],
    "tokens_after": [None, 1, "1", {}, [3] * 1000, *BAD_END_TOKENS],
    "n_merges": [-1, 1.0, True, "8", 2**31, 10**400],
    "n_token_bytes": [None, -1, 1.0, False, "8", 2**31],
    "pre_tokenizer": [None, "gpt4", 2, ["gpt2"]],
    "generation": [None, [], "x", {"seed": 1}, {"top_k": -1}, {"top_p": 0}, {"temperature": "1"}],
}
BAD_CONFIG: list[tuple[str, object, str]] = [
    *((name, NONE, "config") for name in tinygpt2.Config._fields),
    ("n_ctx", 9, "config"),
    ("eos_token_id", 264, "config"),
    ("eos_token_ids", [3, 4, 3], "config eos_token_ids"),
    ("", 9, "config"),
    *((name, value, f"config {name}") for name, values in BAD_VALUES.items() for value in values),
    ("n_head", 4, "config n_head"),
    ("n_head", 12, "config n_head"),
    # Good by themselves, and not the values of this file's tensors.
    ("vocab_size", 271, "tensor vocab.offsets"),
    ("vocab_size", 272, "tensor vocab.offsets"),
    ("vocab_size", 273, "tensor wte.weight"),
    ("n_positions", 10, "tensor wpe.weight"),
    ("n_embd", 8, "tensor wte.weight"),
    ("n_layer", 2, "tensor h.1.ln_1.weight"),
    ("n_layer", 4096, "tensors"),
    ("n_inner", 20, "tensor h.0.mlp.c_proj.weight"),
    ("n_inner", 33, "tensor h.0.mlp.c_fc.weight"),
    ("tie_word_embeddings", True, "tensors"),
    ("n_merges", None, "tensors"),
    ("n_merges", 9, "tensor merges.pairs"),
    ("n_merges", 0, "tensor merges.pairs"),
    ("n_token_bytes", 1, "tensor vocab.bytes"),
    ("n_token_bytes", 10**6, "tensor vocab.bytes"),
    ("n_token_bytes", 290, "tensor vocab.offsets"),
]


@pytest.mark.table
@pytest.mark.parametrize(("name", "value", "field"), BAD_CONFIG)
def test_bad_config(small_path: Path, tmp_path: Path, name: str, value: object, field: str) -> None:
    path = tmp_path / "bad.tg2"
    write_config(small_path, path, name, value)
    refusal(path, field, tinygpt2.load)


# The largest sizes that are allowed, and with which the file's tensors do not agree.
LIMITS = {
    "vocab_size": (2**24, "tensor wte.weight"),
    "n_positions": (2**24, "tensor wpe.weight"),
    "n_embd": (2**17, "tensor wte.weight"),
    "n_layer": (2**12, "tensors"),
    "n_inner": (2**20, "tensor h.0.mlp.c_fc.weight"),
}


@pytest.mark.parametrize(("name", "limit", "field"), [(n, *pair) for n, pair in LIMITS.items()])
def test_limits_of_sizes(
    small_path: Path, tmp_path: Path, name: str, limit: int, field: str
) -> None:
    path = tmp_path / "bad.tg2"
    write_config(small_path, path, name, limit)
    refusal(path, field, tinygpt2.load)
    write_config(small_path, path, name, limit + 1)
    assert f"from 1 to {limit}" in refusal(path, f"config {name}", tinygpt2.load)


def test_limit_of_heads(tmp_path: Path) -> None:
    path = tmp_path / "heads.tg2"
    config = {**SMALL, "n_embd": 4096, "n_head": 4096, "n_inner": 1, "n_positions": 1}
    config |= {"vocab_size": 1, "tie_word_embeddings": True}
    sizes = {"n_embd": 4097, "n_head": 4097}
    source = write_checkpoint(tmp_path / "m", {**config, **sizes}, {}, tokenizer=False)
    with pytest.raises(tinygpt2.FormatError, match="from 1 to 4096") as caught:
        tinygpt2.convert(source, path)
    assert caught.value.field == "config n_head"
    source = write_checkpoint(tmp_path / "m", config, {}, tokenizer=False)
    with pytest.raises(tinygpt2.FormatError) as caught:
        tinygpt2.convert(source, path)
    assert caught.value.field == "tensor wte.weight"


@pytest.mark.parametrize("text", ["NaN", "1e999", "-1e999"])
def test_epsilon_that_is_no_number(small_path: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.tg2"

    def change(header: dict[str, Any]) -> None:
        config = header["__metadata__"]["config"]
        header["__metadata__"]["config"] = config.replace("1e-05", text)
        assert text in header["__metadata__"]["config"]

    write_changed(small_path, path, change)
    field = "__metadata__ config" if text == "NaN" else "config layer_norm_epsilon"
    refusal(path, field, tinygpt2.load)


@pytest.mark.parametrize("step", [4, *slow(1)])
def test_config_nested_about_the_recursion_limit(
    small_path: Path, tmp_path: Path, step: int
) -> None:
    path = tmp_path / "deep.tg2"
    header, data = unpack(small_path)
    config = header["__metadata__"]["config"]
    for depth in about_the_recursion_limit(step):
        nested = '"n_embd": ' + "[" * depth + "]" * depth
        header["__metadata__"]["config"] = config.replace('"n_embd": 6', nested)
        path.write_bytes(pack_aligned(header, data))
        with pytest.raises(tinygpt2.FormatError) as caught:
            tinygpt2.load(path)
        assert caught.value.field in ("config n_embd", "__metadata__ config")


def without_a_tensor(header: dict[str, Any], data: bytes) -> bytes:
    first, last = header.pop("ln_f.bias")["data_offsets"]
    return move(header, data, first, last, b"")


def with_another_tensor(header: dict[str, Any], data: bytes) -> bytes:
    header["extra"] = {"dtype": "U8", "shape": [64], "data_offsets": [len(data), len(data) + 64]}
    return data + bytes(64)


def with_another_layer(header: dict[str, Any], data: bytes) -> bytes:
    header["h.1.ln_1.bias"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}
    return data


def renamed(header: dict[str, Any], data: bytes) -> bytes:
    header["h.0.attn.c_attn.bias "] = header.pop("h.0.attn.c_attn.bias")
    return data


def another_shape(header: dict[str, Any], data: bytes) -> bytes:
    header["h.0.mlp.c_proj.weight"]["shape"] = [19, 1, 16]
    return data


def another_dtype(header: dict[str, Any], data: bytes) -> bytes:
    header["h.0.ln_2.weight"]["dtype"] = "I32"
    return data


def narrow_offsets(header: dict[str, Any], data: bytes) -> bytes:
    header["vocab.offsets"].update(dtype="U8", shape=[4 * header["vocab.offsets"]["shape"][0]])
    return data


def move(header: dict[str, Any], data: bytes, first: int, last: int, new: bytes) -> bytes:
    """Replace a range of the data and move what lies behind it."""
    for name, value in header.items():
        if name != "__metadata__" and value["data_offsets"][0] >= last:
            value["data_offsets"] = [at + len(new) - (last - first) for at in value["data_offsets"]]
    return data[:first] + new + data[last:]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (without_a_tensor, "tensor ln_f.bias"),
        (with_another_tensor, "tensors"),
        (with_another_layer, "tensors"),
        (renamed, "tensor h.0.attn.c_attn.bias"),
        (another_shape, "tensor h.0.mlp.c_proj.weight"),
        (another_dtype, "tensor h.0.ln_2.weight"),
        (narrow_offsets, "tensor vocab.offsets"),
    ],
)
def test_wrong_tensors(
    small_path: Path, tmp_path: Path, change: Callable[[dict[str, Any], bytes], bytes], field: str
) -> None:
    path = tmp_path / "bad.tg2"
    header, data = unpack(small_path)
    data = change(header, data)
    path.write_bytes(pack_aligned(header, data))
    refusal(path, field, tinygpt2.load)


@pytest.mark.parametrize("shift", [1, 4, 16, 32, 63])
def test_misaligned(small_path: Path, tmp_path: Path, shift: int) -> None:
    path = tmp_path / "bad.tg2"
    path.write_bytes(pack_aligned(*unpack(small_path), shift))
    assert "a start on 64 bytes" in refusal(path, "tensor wte.weight", tinygpt2.load)


def patch(source: Path, path: Path, tensor: str, index: int, *values: int) -> None:
    """A copy of a good file with other numbers in one tensor, and the checksum of the new data."""
    header, data = unpack(source)
    code, size = {"U32": ("<I", 4), "U64": ("<Q", 8)}[header[tensor]["dtype"]]
    changed = bytearray(data)
    for i, value in enumerate(values):
        struct.pack_into(
            code, changed, header[tensor]["data_offsets"][0] + (index + i) * size, value
        )
    header["__metadata__"]["crc32"] = f"{zlib.crc32(changed):08x}"
    path.write_bytes(pack_aligned(header, bytes(changed)))


N_MERGES, N_TOKENS = 8, 265  # of the tests' tokenizer, whose vocabulary SMALL rounds up to 270


@pytest.mark.table
@pytest.mark.parametrize(
    ("tensor", "index", "values", "expected"),
    [
        ("vocab.offsets", 0, [1], "offsets rising"),
        ("vocab.offsets", 7, [5], "offsets rising"),
        ("vocab.offsets", 7, [10**9], "offsets rising"),
        ("vocab.offsets", 270, [0], "offsets rising"),
        ("vocab.offsets", 270, [2**32 - 1], "offsets rising"),
        ("vocab.byte_ids", 0, [1], "the token of byte 0"),
        ("vocab.byte_ids", 65, [256], "the token of byte 65"),
        ("vocab.byte_ids", 255, [269], "the token of byte 255"),
        ("vocab.byte_ids", 255, [270], "the token of byte 255"),
        ("vocab.byte_ids", 255, [2**32 - 2], "the token of byte 255"),
        ("merges.pairs", 0, [2**64 - 1], "rising pairs"),
        ("merges.pairs", 0, [5 << 32 | 5] * 2, "rising pairs"),
        ("merges.pairs", N_MERGES - 1, [0], "rising pairs"),
        ("merges.pairs", N_MERGES - 1, [270 << 32], "tokens below 270"),
        ("merges.pairs", N_MERGES - 1, [269 << 32 | 270], "tokens below 270"),
        ("merges.pairs", N_MERGES - 1, [2**64 - 1], "tokens below 270"),
        ("merges.results", 3, [270], "tokens below 270"),
        ("merges.results", 0, [2**32 - 1], "tokens below 270"),
    ],
)
def test_vocabulary_that_contradicts_itself(
    small_path: Path, tmp_path: Path, tensor: str, index: int, values: list[int], expected: str
) -> None:
    path = tmp_path / "bad.tg2"
    patch(small_path, path, tensor, index, *values)
    assert f"expected {expected}" in refusal(path, f"tensor {tensor}", tinygpt2.load)


def test_verify_finds_a_merge_that_makes_another_token(
    small_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.tg2"
    patch(small_path, path, "merges.results", 2, 0)
    tinygpt2.load(path).close()
    assert tinygpt2.main(["info", "--model", str(path), "--verify"]) == 1
    assert f"{path}: tensor merges.results: expected merge 2 to make" in capsys.readouterr().err


def test_tokens_without_bytes_are_allowed(small_path: Path, tmp_path: Path) -> None:
    """A vocabulary may lack the token of a byte: only texts with that byte are refused."""
    path = tmp_path / "lacking.tg2"
    patch(small_path, path, "vocab.byte_ids", ord("x"), 2**32 - 1)
    with tinygpt2.load(path) as model:
        assert model.decode(range(N_TOKENS, 270)) == ""
        assert model.decode(model.encode("a yes")) == "a yes"
        with pytest.raises(tinygpt2.InputError, match="byte 0x78 is not in the model's vocabulary"):
            model.encode("axe")


# What a hostile file may cost

MANY_MERGES, MANY_TOKENS = {"n_merges": 2**31 - 1}, {"vocab_size": 2**24}
HOLES: list[tuple[dict[str, int], bool, str]] = [  # sizes, whether byte_ids are filled, the field
    (MANY_MERGES, True, "tensor merges.pairs"),
    (MANY_TOKENS, False, "tensor vocab.byte_ids"),
    ({"n_token_bytes": 2**31 - 1}, False, "tensor vocab.offsets"),
    ({**MANY_MERGES, **MANY_TOKENS}, True, "tensor merges.pairs"),
]
LOAD_WITH_LITTLE_MEMORY = """if True:
    import resource, sys, tinygpt2
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    limit = 1024 * int(status["VmData"].split()[0]) + 100_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        tinygpt2.load(sys.argv[1])
    except tinygpt2.FormatError as error:
        print(error.field)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits private memory alone")
@pytest.mark.parametrize(("sizes", "filled", "field"), HOLES)
@pytest.mark.slow
def test_file_of_holes_takes_no_memory(
    tmp_path: Path, sizes: dict[str, int], filled: bool, field: str
) -> None:
    """A file of some gigabytes that take 8 KB on disk is refused with 100 MB of memory."""
    values: dict[str, Any] = {"vocab_size": 1, "n_positions": 1, "n_embd": 1, "n_layer": 1}
    values |= {"n_head": 1, "n_inner": 1, "n_merges": 0, "n_token_bytes": 0, **sizes}
    values |= {"activation_function": "gelu", "layer_norm_epsilon": 0.0, "eos_token_ids": []}
    values |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": True}
    values |= {"tie_word_embeddings": True, "bos_token_id": None, "added_tokens": ()}
    values |= {"tokens_before": (), "tokens_after": (), "generation": {}}
    config = tinygpt2.Config(**values, add_prefix_space=False, pre_tokenizer="gpt2")
    path = tmp_path / "holes.tg2"
    size = write_holes(path, config)
    if filled:  # no byte has a token, so that the check of byte_ids is passed
        write_no_tokens(path)
    assert path.stat().st_size == size > 10**8
    assert path.stat().st_blocks * 512 <= 3 * 4096
    done = run_python(LOAD_WITH_LITTLE_MEMORY, path)
    assert done.stdout == field + "\n", done.stderr


def write_no_tokens(path: Path) -> None:
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))["vocab.byte_ids"]
        file.seek(8 + length + entry["data_offsets"][0])
        file.write(b"\xff" * 1024)


def write_holes(path: Path, config: tinygpt2.Config) -> int:
    """A .tg2 file of this shape whose data is a hole, with the right checksum of its header."""
    metadata = {"format": "tinygpt2", "format_version": "2", "config": json.dumps(config._asdict())}
    header: dict[str, Any] = {"__metadata__": {**metadata, "header_crc32": "00000000"}}
    offset = 0
    for name, (dtype, shape) in tinygpt2.layout(config).items():
        stop = offset + tinygpt2.DTYPE_SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    content = pack_aligned(header, b"")
    path.write_bytes(content)
    os.truncate(path, len(content) + offset)
    return len(content) + offset


SPECIAL_TOKENS = {
    "many": ([f"<{i:05}>" for i in range(100_000)], "<0123" * 4000),
    "of every length": (["a" * n + "b" for n in range(1, 256)], "a" * 8000),
    "long": (["a" * 250 + f"{i:05}" for i in range(10_000)], "a" * 8000),
    "beginnings of each other": (["ab" + "x" * n for n in range(254)], "ab" * 4000),
    "of every first letter": ([chr(0x4E00 + i) * 2 for i in range(20_000)], "\u4e00\u4e01" * 9000),
}


@pytest.mark.parametrize(("names", "text"), SPECIAL_TOKENS.values(), ids=SPECIAL_TOKENS.keys())
@pytest.mark.slow
def test_hostile_added_tokens(names: list[str], text: str) -> None:
    """They are found, and texts that nearly match them take no longer than two seconds."""
    added = tinygpt2.AddedTokens([tinygpt2.AddedToken(name, i) for i, name in enumerate(names)])
    last = len(names) - 1
    pieces = list(added.split(f"he{names[7]}he{names[-1]}", True))
    assert pieces == [("he", None), (names[7], 7), ("he", None), (names[-1], last)]
    before = time.process_time()
    found = list(added.split(text, True))
    assert time.process_time() - before < 2
    assert "".join(piece for piece, _ in found) == text


@pytest.mark.parametrize(
    ("length", "works"), [(1, True), (256, True), (257, False), (10**6, False)]
)
def test_length_of_added_tokens(small_path: Path, tmp_path: Path, length: int, works: bool) -> None:
    path = tmp_path / "special.tg2"
    write_config(small_path, path, "added_tokens", [{**ADDED, "text": "\u00e9" * length, "id": 5}])
    if works:
        with tinygpt2.load(path) as model:
            assert model.encode("\u00e9" * length) == [5]
    else:
        refusal(path, "config added_tokens", tinygpt2.load)


# The writer

ENTRIES = {"a": ("F32", (2, 2)), "b": ("U8", (5,))}


def write(
    path: Path, data: list[bytes], check: Callable[[Any], object] = lambda file: None
) -> None:
    tinygpt2.write_tensors(str(path), ENTRIES, data, {"x": "y"}, check)


def test_writer_gives_the_file_to_the_check(tmp_path: Path) -> None:
    """Before the file is in its place, and with all that was written."""
    path, seen = tmp_path / "out", []

    def check(file: tinygpt2.TensorFile) -> None:
        assert not path.exists()
        assert Path(file.path).parent == tmp_path
        seen.append((file.metadata["x"], bytes(file.map[file.data_start :]), file.checksum()))

    write(path, [b"0123456789", b"abcdef", b"ghijk"], check)
    content = b"0123456789abcdefghijk"
    assert seen == [("y", content, f"{zlib.crc32(content):08x}")]
    metadata, tensors = read_safetensors(path)
    assert metadata["crc32"] == seen[0][2]
    assert tensors["b"].tobytes() == b"ghijk"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [tinygpt2.InputError("no"), KeyboardInterrupt(), ValueError("no")]
)
def test_writer_when_the_check_fails(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def check(file: tinygpt2.TensorFile) -> None:
        raise error

    with pytest.raises(type(error)):
        write(path, [bytes(21)], check)
    assert [(p, p.read_bytes()) for p in tmp_path.iterdir()] == [(path, b"old")]


@pytest.mark.parametrize("size", [0, 20, 22], ids=["no data", "too little", "too much"])
def test_writer_reads_back_what_it_wrote(tmp_path: Path, size: int) -> None:
    """Data that does not fill the entries makes a bad file, which must not take the place."""
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(tinygpt2.FormatError) as caught:
        write(path, [bytes(size)])
    assert caught.value.field == "file size"
    assert [(p, p.read_bytes()) for p in tmp_path.iterdir()] == [(path, b"old")]


@pytest.mark.parametrize("value", [5, 1.5, ["a"], b"a"], ids=repr)
def test_arguments_that_are_no_paths(value: Any) -> None:
    """A compiled module checks the types of arguments itself, with a TypeError."""
    for open_file in (tinygpt2.load, tinygpt2.TensorFile):
        with pytest.raises((tinygpt2.InputError, TypeError)) as caught:
            open_file(value)
        assert is_compiled() or "path: expected a path, found" in str(caught.value)


def is_compiled() -> bool:
    return not str(tinygpt2.__file__).endswith(".py")


# At random


def open_or_refuse(open_file: Callable[[Path], T], path: Path) -> T | None:
    """What opening returns, or None after a FormatError that names the file."""
    try:
        return open_file(path)
    except tinygpt2.FormatError as error:
        refused = error
    assert refused.path == str(path)
    return None


def try_out(path: Path) -> bool:
    """Whether a file loads; one that does must then work."""
    model = open_or_refuse(tinygpt2.load, path)
    if model is None:
        return False
    with model:
        with contextlib.suppress(tinygpt2.NumericError):
            model.generate_ids([1, 2], max_new_tokens=3, temperature=1.0, seed=1)
        if model.tokenizer is not None:
            with contextlib.suppress(tinygpt2.InputError):  # a byte without a token
                model.encode(" the inning of thé\n\0")
            assert isinstance(model.decode(range(model.config.vocab_size)), str)
    return True


def damage(content: bytes, low: int, high: int, edits: list[tuple[str, float, bytes]]) -> bytes:
    """A file with edits between two places."""
    changed = bytearray(content)
    for kind, place, new in edits:
        at = low + int(place * (high - low))
        if kind == "insert":
            changed[at:at] = new
        elif kind == "delete":
            del changed[at : at + len(new)]
        elif kind == "truncate":
            del changed[at:]
        else:
            changed[at : at + len(new)] = new
    return bytes(changed)


@pytest.mark.slow
def test_random_damage(small_path: Path, tmp_path: Path) -> None:
    """A damaged file either works or is refused; whatever else it raises fails here."""
    pytest.importorskip("hypothesis", reason="needs hypothesis, to make up damaged files")
    from hypothesis import given, settings
    from hypothesis import strategies as st

    content, path = small_path.read_bytes(), tmp_path / "damaged.tg2"
    start = len(content) - len(unpack(small_path)[1])
    kinds = st.sampled_from(["replace", "replace", "replace", "insert", "delete", "truncate"])
    texts = st.sampled_from([b"\0", b"\xff" * 4, b"\x80\x7f", b"9", b"-1", b'"', b"}", b"[]"])
    news = st.one_of(st.binary(min_size=1, max_size=8), texts)
    edits = st.lists(st.tuples(kinds, st.floats(0, 1), news), min_size=1, max_size=3)
    regions = st.sampled_from([(0, start), (start, len(content))])
    outcomes = []

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(region=regions, edits=edits, sealed=st.booleans())
    def check(region: tuple[int, int], edits: list[tuple[str, float, bytes]], sealed: bool) -> None:
        damaged = damage(content, *region, edits)
        path.write_bytes(seal(damaged) if sealed else damaged)
        outcomes.append(try_out(path))

    check()
    assert 20 < sum(outcomes) < len(outcomes) - 20, "both outcomes must be tried"


def test_random_numbers_as_weights(small_path: Path, tmp_path: Path) -> None:
    """Any bits are numbers to the file, so it loads; what it computes is finite or NumericError."""
    path = tmp_path / "random.tg2"
    header, data = unpack(small_path)
    weights = header["vocab.bytes"]["data_offsets"][0]
    for seed in range(10):
        bits = np.random.default_rng(seed).bytes(weights)
        path.write_bytes(pack_aligned(header, bits + data[weights:]))
        assert try_out(path)
        with tinygpt2.load(path) as model, contextlib.suppress(tinygpt2.NumericError):
            assert np.isfinite(model.logits([1, 2, 3])).all()


def json_values(st: Any) -> Any:
    """A strategy of JSON values, of those above all that are nearly right."""
    likely = st.sampled_from([0, 1, 2, 6, 9, 16, 64, 270, 2**31, 2**64, -1, 1.5, True, None, ""])
    simple = st.one_of(likely, st.integers(), st.floats(allow_nan=False), st.text(max_size=5))
    keys = st.one_of(
        st.text(max_size=3), st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"])
    )
    return st.recursive(
        simple,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=4,
    )


@pytest.mark.slow
def test_random_headers(tmp_path: Path) -> None:
    """A good header with some values changed: refused, or its tensors cover the data exactly."""
    pytest.importorskip("hypothesis", reason="needs hypothesis, to make up headers")
    from hypothesis import given, settings
    from hypothesis import strategies as st

    path = tmp_path / "random.safetensors"
    keys = st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "other"])
    counts = st.lists(st.integers(0, 3), max_size=3)
    values = st.one_of(st.sampled_from(["U8", "F16"]), counts, json_values(st))
    changes = st.lists(st.tuples(st.integers(0, 2), keys, values), max_size=2)
    outcomes = []

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(sizes=st.lists(st.integers(0, 3), max_size=3), changes=changes)
    def check(sizes: list[int], changes: list[tuple[int, str, object]]) -> None:
        stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        header: dict[str, Any] = {
            f"t{i}": entry(shape=[size], data_offsets=[stop - size, stop])
            for i, (size, stop) in enumerate(zip(sizes, stops))
        }
        for i, key, value in changes:
            header.setdefault(f"t{i}", {})[key] = value
        path.write_bytes(pack(header, bytes(sum(sizes))))
        outcomes.append(opens_and_covers(path, sum(sizes)))

    check()
    assert 20 < sum(outcomes) < len(outcomes) - 20, "both outcomes must be tried"


def opens_and_covers(path: Path, size: int) -> bool:
    """Whether a file opens; the tensors of one that does must lie within its data and fill it."""
    file = open_or_refuse(tinygpt2.TensorFile, path)
    if file is None:
        return False
    with contextlib.closing(file):
        ranges = [(tensor.start, tensor.stop) for tensor in file.tensors.values()]
    assert sum(stop - start for start, stop in ranges) == size
    assert all(start <= stop <= path.stat().st_size for start, stop in ranges)
    return True


def test_random_config_values(small_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("hypothesis", reason="needs hypothesis, to make up configurations")
    from hypothesis import given, settings
    from hypothesis import strategies as st

    path = tmp_path / "random.tg2"
    changes = st.dictionaries(
        st.sampled_from(tinygpt2.Config._fields), json_values(st), min_size=1, max_size=2
    )
    header, data = unpack(small_path)
    config = json.loads(header["__metadata__"]["config"])

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(changes=changes)
    def check(changes: dict[str, Any]) -> None:
        header["__metadata__"]["config"] = json.dumps({**config, **changes})
        path.write_bytes(pack_aligned(header, data))
        try_out(path)

    check()


def test_file_can_be_replaced_while_it_is_open(small_path: Path, tmp_path: Path) -> None:
    """A mapped file that another takes the place of (as `convert` does it) stays readable."""
    path = tmp_path / "model.tg2"
    shutil.copy(small_path, path)
    with tinygpt2.load(path) as model:
        before = model.logits([1, 2])
        tinygpt2.convert(write_checkpoint(tmp_path / "other", TOY, seed=9), path)
        np.testing.assert_array_equal(model.logits([1, 2]), before)
    with tinygpt2.load(path) as model:
        assert model.config.n_embd == TOY["n_embd"]
