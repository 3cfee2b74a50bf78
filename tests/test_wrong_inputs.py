"""Wrong inputs: each gets one line that names the cause and what to do.

`pytest -s tests/test_wrong_inputs.py` prints the table.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_checkpoint

import tinygpt2

LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707\nsize 548105171\n"
)
HTML = b'\n<!DOCTYPE html>\n<html class="">\n<head>\n<meta charset="utf-8"/>' + b" " * 5000


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 100)
    return buffer.getvalue()


def arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, wte=np.zeros(3))
    return buffer.getvalue()


def one_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def tape() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return buffer.getvalue()


SAVE_AGAIN = "save it as safetensors"
FILES = {  # names: content, what is found, what to do
    "model.tg2": (LFS, "a Git LFS pointer", "run `git lfs pull`"),
    "page.tg2": (HTML, "a web page", "fetch the file itself"),
    "xml.tg2": (b"<?xml version='1.0'?><Error>", "a web page", "fetch the file itself"),
    "model.tg2.gz": (gzip.compress(b"x" * 99), "a compressed file", "unpack it"),
    "model.tar": (tape(), "a tar archive", "unpack it"),
    "arrays.npz": (arrays(), "an archive of NumPy", SAVE_AGAIN),
    "array.npy": (one_array(), "an array of NumPy", SAVE_AGAIN),
    "model.gguf": (b"GGUF\3\0\0\0" + bytes(99), "a file of llama.cpp", SAVE_AGAIN),
    "tf_model.h5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file", SAVE_AGAIN),
    "model.onnx": (b"\x08\x08\x12\x07pytorch\x1a\x032.1", "a model of ONNX", SAVE_AGAIN),
    "saved_model.pb": (b"\x08\x01\x12" + bytes(99), "a part of a TensorFlow", SAVE_AGAIN),
    "checkpoint": (
        b'model_checkpoint_path: "model.ckpt"\n',
        "a part of a TensorFlow",
        SAVE_AGAIN,
    ),
    "flax_model.msgpack": (b"\x81\xabtransformer\x84", "weights of Flax", SAVE_AGAIN),
}
PICKLED = {
    "model.pt": (zipped("archive/data.pkl"), "a zip archive, as PyTorch writes it"),
    "legacy.bin": (pickle.dumps({"a": 1}, 2), "a pickle, as PyTorch writes it"),
    "new.pkl": (pickle.dumps({"a": 1}, 5), "a pickle, as PyTorch writes it"),
}
JSONS = {
    "config.json": b'{"abc": {"n_layer": 12}}',
    "model.safetensors.index.json": b'{"weight_map": {}}',
}

Make = Callable[[Path], Path]
Wrong = tuple[Make, str, str]  # makes the input in a folder; what the line says


def content(name: str, data: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def checkpoint(folder: Path) -> Path:
    return write_checkpoint(folder / "m")


def with_file(name: str, data: bytes) -> Make:
    """A checkpoint with another content in one of its files."""

    def make(folder: Path) -> Path:
        (checkpoint(folder) / name).write_bytes(data)
        return folder / "m"

    return make


def only(*names: str) -> Make:
    """A folder with these files, or folders, and no other."""

    def make(folder: Path) -> Path:
        (folder / "m").mkdir()
        for name in names:
            place = folder / "m" / name
            if "." in name or name == "checkpoint":
                place.write_bytes(b"anything")
            else:
                place.mkdir()
        return folder / "m"

    return make


def without(name: str, *others: str) -> Make:
    """A checkpoint without a file, and with others."""

    def make(folder: Path) -> Path:
        (checkpoint(folder) / name).unlink()
        for other in others:
            (folder / "m" / other).write_bytes(b"anything")
        return folder / "m"

    return make


def cut_off(folder: Path) -> Path:
    tinygpt2.convert(checkpoint(folder), folder / "m.tg2")
    data = (folder / "m.tg2").read_bytes()
    return content("cut.tg2", data[:-1000])(folder)


def dangling(folder: Path) -> Path:
    (folder / "link.tg2").symlink_to("blobs/none")
    return folder / "link.tg2"


def dangling_weights(folder: Path) -> Path:
    """As `cp -r` copies a folder of the hub's cache."""
    (checkpoint(folder) / "model.safetensors").unlink()
    (folder / "m" / "model.safetensors").symlink_to("../../blobs/none")
    return folder / "m"


def tg2(folder: Path) -> Path:
    tinygpt2.convert(checkpoint(folder), folder / "m.tg2")
    return folder / "m.tg2"


def tg2_as_weights(folder: Path) -> Path:
    shutil.copy(tg2(folder), folder / "m" / "model.safetensors")
    return folder / "m"


def shard(folder: Path) -> Path:
    (checkpoint(folder) / "model.safetensors").rename(
        folder / "m" / "model-00001-of-00002.safetensors"
    )
    return folder / "m" / "model-00001-of-00002.safetensors"


def lacking_shard(folder: Path) -> Path:
    places = {"wte.weight": shard(folder).name, "x": "model-00002-of-00002.safetensors"}
    index = json.dumps({"weight_map": places})
    (folder / "m" / "model.safetensors.index.json").write_text(index, "utf-8")
    return folder / "m"


def at(path: str) -> Make:
    """A path as it is typed, in the folder where the program runs."""
    return lambda folder: Path(path)


MISSING: dict[str, Wrong] = {
    "no such path": (at("none/m.tg2"), "No such file or directory", "check the path)"),
    "gpt2": (at("gpt2"), "No such file or directory", "`python tinygpt2.py download gpt2`"),
    "owner/name": (
        at("openai-community/gpt2-medium"),
        "No such file or directory",
        "`python tinygpt2.py download openai-community/gpt2-medium`",
    ),
    "an empty file": (content("m.tg2", b""), "an empty file", "convert or download it"),
    "a dangling link": (dangling, "a link to a file that is not there", "copy the file"),
}
BOTH: dict[str, Wrong] = {
    **MISSING,
    **{name: (content(name, data), found, advice) for name, (data, found, advice) in FILES.items()},
}
CONVERT = "`python tinygpt2.py convert` makes a .tg2 file"
LOAD: dict[str, Wrong] = {
    "a checkpoint's folder": (checkpoint, "a directory", CONVERT),
    "a checkpoint's weights": (
        lambda folder: checkpoint(folder) / "model.safetensors",
        "expected 'tinygpt2', found 'pt', as in a checkpoint",
        CONVERT,
    ),
    "a .tg2 file cut off": (cut_off, "bytes, as the header says", "the file is damaged"),
    "llm.c": (content("m.bin", b"\xc6\xd74\x01\3\0\0\0"), "a checkpoint of llm.c", CONVERT),
    **{name: (content(name, data), found, CONVERT) for name, (data, found) in PICKLED.items()},
    **{name: (content(name, data), "a file of JSON", CONVERT) for name, data in JSONS.items()},
}
FOLDERS: dict[str, Wrong] = {
    "an empty folder": (
        only(),
        "expected model.safetensors, found no such file",
        "name the folder",
    ),
    "no config.json": (without("config.json"), "expected config.json", "copy it from where"),
    "no weights": (without("model.safetensors"), "expected model.safetensors", "name the folder"),
    "OpenAI's folder": (
        only("hparams.json", "model.ckpt.index", "checkpoint"),
        "m/hparams.json: checkpoint: expected model.safetensors, found a TensorFlow checkpoint",
        "download gpt2",
    ),
    "TensorFlow": (only("model-100.ckpt.index"), "a TensorFlow checkpoint", SAVE_AGAIN),
    "Keras": (without("model.safetensors", "tf_model.h5"), "weights of TensorFlow", SAVE_AGAIN),
    "Flax": (without("model.safetensors", "flax_model.msgpack"), "weights of Flax", SAVE_AGAIN),
    "GGUF": (
        only("m.q8_0.gguf"),
        "m/m.q8_0.gguf: checkpoint: expected model.safetensors, found a model of ll",
        SAVE_AGAIN,
    ),
    "ONNX": (without("model.safetensors", "model.onnx"), "a model of ONNX", SAVE_AGAIN),
    "an adapter": (
        only("adapter_config.json", "adapter_model.safetensors"),
        "a PEFT adapter",
        "merge_and_unload()",
    ),
    "an adapter's weights": (only("adapter_model.bin"), "a PEFT adapter", "merge_and_unload()"),
    "the hub's cache": (
        only("blobs", "refs", "snapshots"),
        "m/snapshots: ",
        "name a folder inside",
    ),
    "a trainer's output": (
        only("checkpoint-500", "checkpoint-1000"),
        "m/checkpoint-1000: checkpoint: expected model.safetensors, found a check",
        "name this one",
    ),
    "a folder with a .tg2 file": (
        only("m.tg2"),
        "m/m.tg2: checkpoint: expected model.safetensors, found a .tg2 file",
        "--model",
    ),
    "nanoGPT's output": (
        only("ckpt.pt"),
        "m/ckpt.pt: checkpoint: expected model.safetensors, found a file",
        "name this",
    ),
}
SOURCES: dict[str, Wrong] = {
    **FOLDERS,
    "a .tg2 file": (tg2, "a .tg2 file, which needs no conversion", "--model"),
    "a .tg2 file as weights": (tg2_as_weights, "a .tg2 file, which needs no", "--model"),
    "one shard": (shard, "shard 1 of 2", "name the folder or the index"),
    "a shard that is not there": (lacking_shard, "No such file or directory", "check the path"),
    "config.json": (
        content("config.json", JSONS["config.json"]),
        "a file of JSON",
        "name the folder that contains it",
    ),
    "an index of nothing": (
        content("model.safetensors.index.json", JSONS["model.safetensors.index.json"]),
        "weight_map: expected an object of file names, found {}",
        "",
    ),
    "dangling weights": (dangling_weights, "a link to a file that is not there", "copy the file"),
    **{
        f"{name} is a pointer": (with_file(name, LFS), f"{name}: file: expected ", "git lfs pull")
        for name in ("model.safetensors", "config.json", "vocab.json", "merges.txt")
    },
    **{
        f"{name} is a web page": (with_file(name, HTML), f"{name}: file: expected ", "fetch the")
        for name in ("model.safetensors", "config.json", "vocab.json", "tokenizer.json")
    },
}


def refusal(command: list[str], path: Path, folder: Path) -> str:
    """The one line that a command prints; it writes nothing."""
    before = sorted(folder.rglob("*"))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = tinygpt2.main([*command, str(path)])
    line = err.getvalue()
    print(f"{command[0]} {path.name}:", line.replace(f"{folder}/", ""), end="")
    assert (code, out.getvalue()) == (1, "")
    assert line.startswith("tinygpt2: error: ")
    assert line.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    return line


@pytest.mark.table
@pytest.mark.parametrize(
    ("make", "found", "advice"), [*BOTH.values(), *LOAD.values()], ids=[*BOTH, *LOAD]
)
def test_as_a_model(
    make: Make, found: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(["--prompt", "a", "--model"], make(tmp_path), tmp_path)
    assert found in line
    assert advice in line.partition(" (")[2]


@pytest.mark.table
@pytest.mark.parametrize(
    ("make", "found", "advice"), [*BOTH.values(), *SOURCES.values()], ids=[*BOTH, *SOURCES]
)
def test_as_a_checkpoint(
    make: Make, found: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(["convert", "-o", "out.tg2"], make(tmp_path), tmp_path)
    assert found in line
    assert advice in line.partition(" (")[2]


@pytest.mark.parametrize("begin", [b"{", b"\x80\x02", b"\x80\x04", b"\x1f\x8b", b"BZh"])
def test_a_header_whose_length_looks_like_another_kind(tmp_path: Path, begin: bytes) -> None:
    """A safetensors file begins with a number, whose bytes may be anything."""
    length = int.from_bytes(begin, "little")
    header = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        struct.pack("<Q", length) + json.dumps(header).encode().ljust(length) + b"1234"
    )
    with contextlib.closing(tinygpt2.TensorFile(path)) as file:
        assert list(file.tensors) == ["a"]
    companion = tinygpt2.load_companion("convert")
    assert companion.find_checkpoint(str(path)) == (str(tmp_path), [str(path)])
