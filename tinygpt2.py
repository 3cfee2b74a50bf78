"""tinygpt2: GPT-2 inference in one file that you copy into your project.

    import tinygpt2

    model = tinygpt2.load()                       # the default model, or the path of a .tg2 file
    print(model.generate("Once upon a time", max_new_tokens=50, temperature=0.8, seed=1))

or ``python tinygpt2.py --prompt "Once upon a time"``; ``--help`` lists the rest.

The file reads from top to bottom as the story of one prompt:

    1. errors        one family of exceptions, each says what, where, expected, found, what to do
    2. the file      safetensors: a header in JSON, then the numbers; mapped, never copied
    3. the model     its configuration, and the tensors that a .tg2 file must hold
    4. tokens        text to token ids and back: byte-level byte-pair encoding
    5. forward       token ids to logits: the transformer itself, in NumPy or in kernels.c
    6. choice        logits to the next token: temperature, top_k, top_p, min_p, a seed
    7. text          sessions and models: the loop that feeds each choice back
    8. conversion    checkpoints of the transformers library to .tg2, and how to fetch them
    9. command line

Importing this module does nothing. Where `python build.py` has made the kernels, a model runs in C
and NumPy is imported only for the arrays that some methods return.

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019);
Vaswani et al., "Attention Is All You Need" (2017); the names are those of GPT-2's checkpoints.

SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import array
import bisect
import codecs
import contextlib
import heapq
import importlib
import json
import math
import mmap
import operator
import os
import re
import stat
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Literal,
    NamedTuple,
    Union,
)

if TYPE_CHECKING:
    import argparse

    import numpy as np

    Array = Any  # a NumPy array; its type cannot say the shape, which stands in the comments
    Path = Union[str, "os.PathLike[str]"]
    Prompt = Union[str, Sequence[int]]
    Progress = Callable[[str, int, int], None]

__version__ = "0.1.0"
__all__ = [
    "Config",
    "ContextError",
    "DownloadError",
    "FormatError",
    "InputError",
    "Model",
    "NumericError",
    "Options",
    "Score",
    "Session",
    "StateError",
    "TinyGPT2Error",
    "convert",
    "download",
    "load",
]


# ------------------------------------------------------------------------------------------------
# 1. Errors
# ------------------------------------------------------------------------------------------------


class TinyGPT2Error(Exception):
    """The base of every error that this module raises on purpose."""


class FormatError(TinyGPT2Error):
    """A file is not what it should be. `path` and `field` say which and where."""

    def __init__(self, path: str, field: str, expected: str, found: str, advice: str = "") -> None:
        advice = advice or "the file is damaged or not of this kind; convert or download it again"
        place = path if path.isprintable() else ascii(path)
        super().__init__(f"{place}: {field}: expected {expected}, found {found} ({advice})")
        self.path = path
        self.field = field


class InputError(TinyGPT2Error, ValueError):
    """An argument, an option or a text that the model cannot take."""


class ContextError(InputError):
    """More tokens than the model has positions."""


class StateError(TinyGPT2Error):
    """A session or model that is closed, or that two callers use at the same time."""


class NumericError(TinyGPT2Error):
    """The model computed NaN or infinity: its weights are damaged or were never trained."""


class DownloadError(TinyGPT2Error):
    """A file could not be fetched from the hub."""


def brief(value: object) -> str:
    """`value` for an error message: strange bytes escaped, and never longer than a line."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:60] + f"... ({len(text)} characters)"


# ------------------------------------------------------------------------------------------------
# 2. The file
# ------------------------------------------------------------------------------------------------

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library

DTYPE_SIZES = {  # bytes for each element
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"], 1),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 2),
    **dict.fromkeys(["U32", "I32", "F32"], 4),
    **dict.fromkeys(["U64", "I64", "F64"], 8),
}


class Tensor(NamedTuple):
    """Where one tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # byte offsets in the whole file
    stop: int


class TensorFile:
    """A safetensors file: checked, mapped read-only, and looked at without copying.

    The format (https://github.com/huggingface/safetensors):

        8 bytes      N, the length of the header, an unsigned little-endian integer
        N bytes      the header, a JSON object in UTF-8, padded at its end with spaces:
                     {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...,
                      "__metadata__": {"any": "text"}}
        the rest     the numbers, little-endian, row-major; offsets count from here, and the
                     tensors cover it without a gap or an overlap

    Nothing in the file is trusted: every failure is a `FormatError`, before any memory is taken
    for what the header claims.
    """

    def __init__(self, path: Path) -> None:
        self.path = os.fsdecode(path)
        self.map = map_file(self.path)
        try:
            self.tensors, self.metadata, self.data_start = parse_header(self.path, self.map)
        except FormatError:
            self.close()
            raise

    def view(self, name: str, code: Literal["B", "I", "Q"]) -> memoryview:
        """The tensor's numbers as a flat view; `code` is a format of the `struct` module."""
        tensor = self.tensors[name]
        return memoryview(self.map)[tensor.start : tensor.stop].cast(code)

    def array(self, name: str) -> Array:
        """The tensor as a read-only NumPy array over the mapped file (BF16 as its 16 bits)."""
        tensor = self.tensors[name]
        code = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}[tensor.dtype]
        count = math.prod(tensor.shape)
        if not count:  # frombuffer refuses an offset at the very end of the file
            return np.empty(tensor.shape, code)
        return np.frombuffer(self.map, code, count, tensor.start).reshape(tensor.shape)

    def checksum(self) -> str:
        """The CRC-32 of all bytes after the header, as eight hexadecimal digits."""
        crc = 0
        for start in range(self.data_start, len(self.map), 1 << 22):
            crc = zlib.crc32(self.map[start : start + (1 << 22)], crc)
        return f"{crc:08x}"

    def close(self) -> None:
        """Release the map; views that are still held keep it until they are gone."""
        with contextlib.suppress(BufferError):
            self.map.close()


def map_file(path: str) -> mmap.mmap:
    """Map a regular, non-empty file read-only."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a directory cannot be mapped
            raise FormatError(
                path, "file", "a regular file", kind_of(status.st_mode), "name a file"
            )
        if status.st_size == 0:
            raise FormatError(path, "file", "some content", "an empty file")
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or an emptied file
        reason = getattr(error, "strerror", None) or str(error)
        advice = "check the path and its permissions"
        raise FormatError(path, "file", "a readable file", reason, advice) from None


def kind_of(mode: int) -> str:
    return "a directory" if stat.S_ISDIR(mode) else "a device, pipe or socket"


def parse_header(
    path: str, data: bytes | mmap.mmap
) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Check a safetensors header; return its tensors, its metadata and where the data starts."""
    start = 8 + header_length(path, data)
    header = parse_json_object(path, "header", bytes(data[8:start]))
    metadata = header.pop("__metadata__", {})
    if not is_text_map(metadata):
        raise FormatError(path, "__metadata__", "an object of strings", brief(metadata))
    tensors = {name: parse_tensor(path, name, entry, start) for name, entry in header.items()}
    check_coverage(path, tensors, start, len(data))
    return tensors, metadata, start


def header_length(path: str, data: bytes | mmap.mmap) -> int:
    if len(data) < 8:
        raise FormatError(path, "header length", "8 bytes", f"a file of {len(data)} bytes")
    length: int = struct.unpack("<Q", data[:8])[0]
    if length > MAX_HEADER:
        raise FormatError(path, "header length", f"at most {MAX_HEADER}", str(length))
    if length > len(data) - 8:
        raise FormatError(
            path, "header length", f"at most {len(data) - 8} (the file's end)", str(length)
        )
    return length


def parse_json_object(path: str, field: str, text: bytes) -> dict[str, Any]:
    """Parse UTF-8 JSON strictly: an object, no name twice, no NaN, no bottomless nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a name that appears twice")
        return values

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant}, which is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise FormatError(path, field, "JSON in UTF-8", brief(str(error))) from None
    if not isinstance(value, dict):
        raise FormatError(path, field, "a JSON object", brief(value))
    return value


def is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_offset(value: object) -> bool:
    return is_count(value) and value < 1 << 63  # type: ignore[operator]


def parse_tensor(path: str, name: str, entry: object, data_start: int) -> Tensor:
    """Check one entry of the header by itself: dtype, shape, and that both fit its range."""
    field = f"tensor {brief(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(path, field, "dtype, shape and data_offsets", brief(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_SIZES:
        raise FormatError(path, f"{field} dtype", "one of " + ", ".join(DTYPE_SIZES), brief(dtype))
    if not isinstance(shape, list) or not all(map(is_count, shape)):
        raise FormatError(path, f"{field} shape", "a list of counts", brief(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_offset, offsets)):
        raise FormatError(path, f"{field} data_offsets", "two byte offsets", brief(offsets))
    start, stop = offsets
    if byte_size(dtype, shape) != stop - start:
        found = f"data_offsets {brief(offsets)} for {dtype} {brief(shape)}"
        raise FormatError(path, f"{field} data_offsets", "a range that fits the shape", found)
    return Tensor(dtype, tuple(shape), data_start + start, data_start + stop)


def byte_size(dtype: str, shape: Sequence[int]) -> int:
    """The size of a tensor in bytes; -1 if it is beyond every file (the format counts 64 bits)."""
    size = 0 if 0 in shape else DTYPE_SIZES[dtype]
    for count in shape:
        if size >= 1 << 63:
            return -1
        size *= count
    return size


def check_coverage(path: str, tensors: dict[str, Tensor], start: int, stop: int) -> None:
    """The tensors must cover the data section from its start to its end, each byte once."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != start:
            field = f"tensor {brief(name)} data_offsets"
            kind = "a gap" if tensor.start > start else "an overlap"
            raise FormatError(path, field, f"a start at byte {start}", f"{kind}: {tensor.start}")
        start = tensor.stop
    if start != stop:
        raise FormatError(path, "file size", f"{start} bytes, as the header says", f"{stop} bytes")


# ------------------------------------------------------------------------------------------------
# 3. The model
# ------------------------------------------------------------------------------------------------

FORMAT, FORMAT_VERSION = "tinygpt2", "1"
PANEL = 16  # outputs side by side in a panel: one AVX-512 register, two of AVX2, four of NEON
ALIGNMENT = 64  # bytes; a cache line, and one AVX-512 register
ACTIVATIONS = ("gelu_new", "gelu", "relu")
PRE_TOKENIZER = "gpt2"  # the name of the one way of cutting text that section 4 implements


class Config(NamedTuple):
    """What transformers calls the configuration of a GPT-2, with its names, and its vocabulary."""

    vocab_size: int
    n_positions: int  # the context: how many tokens the model can look at
    n_embd: int  # the width of the residual stream
    n_layer: int
    n_head: int
    n_inner: int  # the width of the hidden layer of each MLP, usually 4 * n_embd
    activation_function: str
    layer_norm_epsilon: float
    scale_attn_weights: bool  # divide attention scores by sqrt(head size)
    scale_attn_by_inverse_layer_idx: bool  # divide them by the layer's number, from 1
    tie_word_embeddings: bool  # the logits use the token embedding's own matrix
    bos_token_id: int | None
    eos_token_id: int | None  # end-of-text
    n_merges: int | None  # None: there is no tokenizer inside
    n_token_bytes: int
    special_tokens: dict[str, int]
    add_prefix_space: bool
    pre_tokenizer: str


# Sizes far beyond every GPT-2, and small enough that no product of them is absurd.
SIZE_LIMITS = {
    "vocab_size": 1 << 24,
    "n_positions": 1 << 24,
    "n_embd": 1 << 17,
    "n_layer": 1 << 12,
    "n_head": 1 << 12,
    "n_inner": 1 << 20,
}
SWITCHES = (
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
    "add_prefix_space",
)


def check_config(path: str, values: dict[str, Any]) -> Config:
    """Check a configuration value by value and against itself."""

    def require(name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise FormatError(path, f"config {name}", expected, brief(values.get(name)))

    missing = [name for name in Config._fields if name not in values]
    surplus = [name for name in values if name not in Config._fields]
    if missing or surplus:
        found = f"missing {brief(missing)}, unknown {brief(surplus)}"
        raise FormatError(path, "config", "exactly the known names", found)
    for name, limit in SIZE_LIMITS.items():
        value = values[name]
        require(name, is_count(value) and 1 <= value <= limit, f"a whole number from 1 to {limit}")
    require("n_head", values["n_embd"] % values["n_head"] == 0, "a divisor of n_embd")
    require(
        "activation_function", values["activation_function"] in ACTIVATIONS, f"one of {ACTIVATIONS}"
    )
    epsilon = values["layer_norm_epsilon"]
    require(
        "layer_norm_epsilon", isinstance(epsilon, float) and 0 <= epsilon < 1, "0 <= epsilon < 1"
    )
    for name in SWITCHES:
        require(name, isinstance(values[name], bool), "true or false")
    size = values["vocab_size"]
    for name in ("bos_token_id", "eos_token_id"):
        require(name, values[name] is None or is_token(values[name], size), f"a token below {size}")
    special = values["special_tokens"]
    known = isinstance(special, dict) and all(is_token(token, size) for token in special.values())
    require("special_tokens", known and "" not in special, f"texts with tokens below {size}")
    for name in ("n_merges", "n_token_bytes"):
        absent = name == "n_merges" and values[name] is None
        require(name, absent or (is_count(values[name]) and values[name] < 1 << 31), "a count")
    require("pre_tokenizer", values["pre_tokenizer"] == PRE_TOKENIZER, repr(PRE_TOKENIZER))
    return Config(**values)


def as_index(value: Any) -> int | None:
    """A whole number, NumPy's included, as an int; None for everything else."""
    try:
        return None if type(value).__name__.startswith("bool") else operator.index(value)
    except TypeError:
        return None


def is_token(value: object, vocab_size: int) -> bool:
    return is_count(value) and value < vocab_size  # type: ignore[operator]


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def layout(config: Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a .tg2 file, in the file's order: its name, dtype and shape.

    A matrix that maps k inputs to n outputs is stored in panels, float32 [ceil(n/16), k, 16]:
    sixteen outputs side by side for the first input, then for the next. It is the order in which
    a kernel reads it. Everything is padded with zeros to whole cache lines, so that every tensor
    starts on a 64-byte boundary; the vocabulary's tensors are explained at `Tokenizer`.
    """

    def panels(inputs: int, outputs: int) -> tuple[str, tuple[int, ...]]:
        return "F32", (-(-outputs // PANEL), inputs, PANEL)

    def vector(outputs: int) -> tuple[str, tuple[int, ...]]:
        return "F32", (round_up(outputs, PANEL),)

    n_embd, n_inner = config.n_embd, config.n_inner
    tensors = {
        "wte.weight": panels(n_embd, config.vocab_size),
        "wpe.weight": ("F32", (config.n_positions, round_up(n_embd, PANEL))),
    }
    for i in range(config.n_layer):
        tensors[f"h.{i}.ln_1.weight"] = vector(n_embd)
        tensors[f"h.{i}.ln_1.bias"] = vector(n_embd)
        tensors[f"h.{i}.attn.c_attn.weight"] = panels(n_embd, 3 * n_embd)
        tensors[f"h.{i}.attn.c_attn.bias"] = vector(3 * n_embd)
        tensors[f"h.{i}.attn.c_proj.weight"] = panels(n_embd, n_embd)
        tensors[f"h.{i}.attn.c_proj.bias"] = vector(n_embd)
        tensors[f"h.{i}.ln_2.weight"] = vector(n_embd)
        tensors[f"h.{i}.ln_2.bias"] = vector(n_embd)
        tensors[f"h.{i}.mlp.c_fc.weight"] = panels(n_embd, n_inner)
        tensors[f"h.{i}.mlp.c_fc.bias"] = vector(n_inner)
        tensors[f"h.{i}.mlp.c_proj.weight"] = panels(n_inner, n_embd)
        tensors[f"h.{i}.mlp.c_proj.bias"] = vector(n_embd)
    tensors["ln_f.weight"] = vector(n_embd)
    tensors["ln_f.bias"] = vector(n_embd)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = panels(n_embd, config.vocab_size)
    if config.n_merges is not None:
        tensors["vocab.bytes"] = ("U8", (round_up(config.n_token_bytes, 64),))
        tensors["vocab.offsets"] = ("U32", (round_up(config.vocab_size + 1, 16),))
        tensors["vocab.byte_ids"] = ("U32", (256,))
        tensors["merges.pairs"] = ("U64", (round_up(config.n_merges, 8),))
        tensors["merges.ranks"] = ("U32", (round_up(config.n_merges, 16),))
        tensors["merges.results"] = ("U32", (round_up(config.n_merges, 16),))
    return tensors


def vector_length(config: Config, name: str) -> int:
    """The length of a bias or layer norm vector without its padding."""
    if name.endswith("c_attn.bias"):
        return 3 * config.n_embd
    return config.n_inner if name.endswith("c_fc.bias") else config.n_embd


def read_config(file: TensorFile) -> Config:
    """The configuration of a .tg2 file, checked against the tensors that the file holds."""
    name, version = file.metadata.get("format"), file.metadata.get("format_version")
    if name != FORMAT:
        advice = "`python tinygpt2.py convert` makes a .tg2 file from a checkpoint"
        raise FormatError(file.path, "__metadata__ format", repr(FORMAT), brief(name), advice)
    if version != FORMAT_VERSION:
        advice = "convert the checkpoint again, or use the tinygpt2 that wrote the file"
        raise FormatError(
            file.path, "__metadata__ format_version", FORMAT_VERSION, brief(version), advice
        )
    text = file.metadata.get("config", "").encode("utf-8", "surrogatepass")
    config = check_config(file.path, parse_json_object(file.path, "__metadata__ config", text))
    # Each layer has tensors of its own: a count beyond them would only cost memory to refuse.
    if config.n_layer > len(file.tensors):
        found = f"{len(file.tensors)} tensors"
        raise FormatError(file.path, "tensors", f"those of {config.n_layer} layers", found)
    check_tensors(file, layout(config))
    return config


def check_tensors(file: TensorFile, expected: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    for name, (dtype, shape) in expected.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            raise FormatError(
                file.path, f"tensor {name}", f"{dtype} {list(shape)}", "no such tensor"
            )
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            found = f"{tensor.dtype} {brief(list(tensor.shape))}"
            raise FormatError(file.path, f"tensor {name}", f"{dtype} {list(shape)}", found)
        if tensor.start % ALIGNMENT:
            found = f"byte {tensor.start}"
            raise FormatError(file.path, f"tensor {name}", f"a start on {ALIGNMENT} bytes", found)
    surplus = [name for name in file.tensors if name not in expected]
    if surplus:
        raise FormatError(file.path, "tensors", "only those of a GPT-2", brief(surplus[0]))


# ------------------------------------------------------------------------------------------------
# 4. Tokens
# ------------------------------------------------------------------------------------------------

# GPT-2 first cuts text into words, which the merges below never cross: a contraction, or letters,
# or digits, or other signs, each with one space before it if there is one, or white space.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The standard library's `re` has no \p{L} and \p{N}. Its \w and \d come near, so the same pattern
# is matched on a shadow of the text, of the same length, in which the exceptions are replaced.
SHADOW_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d]+| ?\d+| ?[^\w\s]+|\s+(?!\S)|\s+"

# Letters that Unicode got after version 13, the one that Python 3.9 knows, up to version 18.
YOUNG_LETTERS = """
558 58b-58c 870-887 889-88f 8b5 8c8-8c9 c5c-c5d cdc-cdd 170d 171f 1b4c 1c89-1c8a 208f 209d-209f 2c2f
2c5f 9ffd-9fff a7c0-a7c1 a7cb-a7dd a7e2 a7f1-a7f4 ab6c-ab6d 10570-1057a 1057c-1058a 1058c-10592
10594-10595 10597-105a1 105a3-105b1 105b3-105b9 105bb-105bc 105c0-105f3 10780-10785 10787-107b0
107b2-107bf 10940-10959 10d4a-10d65 10d6f-10d85 10ec2-10ec7 10ed9-10eee 10f70-10f81 11071-11072
11075 1123f-11240 11380-11389 1138b 1138e 11390-113b5 113b7 113d1 113d3 11740-11746 11ab0-11abf
11b0a 11bc0-11be0 11db0-11ddb 11df1 11f02 11f04-11f10 11f12-11f33 12f90-12ff0 1342f 13441-13446
13460-143fa 16100-1611d 16a70-16abe 16d40-16d6c 16ea0-16eb8 16ebb-16ed3 16ff2-16ff3 187f8-187ff
18cd6-18cda 18cff 18d09-18d20 18d80-18df2 18e00-19191 191a0-191d2 1aff0-1aff3 1aff5-1affb
1affd-1affe 1b11f-1b128 1b132 1b155 1b168 1d6a6 1df00-1df81 1df90-1df96 1dfcd-1dfff 1e030-1e06d
1e290-1e2ad 1e4d0-1e4eb 1e5d0-1e5ed 1e5f0 1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 1e6e7-1e6ed
1e6f0-1e6f4 1e6fe-1e6ff 1e7e0-1e7e6 1e7e8-1e7eb 1e7ed-1e7ee 1e7f0-1e7fe 2a6de-2a6df 2b735-2b73f
2b81e 2cea2-2cead 2ebf0-2ee5d 31350-33479 3d000-3fc3f
"""

# Numbers that `re` does not count among \d: fractions, superscripts, Roman numerals, young digits.
ODD_NUMBERS = """
b2-b3 b9 bc-be 9f4-9f9 b72-b77 bf0-bf2 c78-c7e d58-d5e d70-d78 f2a-f33 1369-137c 16ee-16f0 17f0-17f9
19da 2070 2074-2079 2080-2089 2150-2182 2185-2189 2460-249b 24ea-24ff 2776-2793 2cfd 3007 3021-3029
3038-303a 3192-3195 3220-3229 3248-324f 3251-325f 3280-3289 32b1-32bf a6e6-a6ef a830-a835
10107-10133 10140-10178 1018a-1018b 102e1-102fb 10320-10323 10341 1034a 103d1-103d5 10858-1085f
10879-1087f 108a7-108af 108fb-108ff 10916-1091b 109bc-109bd 109c0-109cf 109d2-109ff 10a40-10a48
10a7d-10a7e 10a9d-10a9f 10aeb-10aef 10b58-10b5f 10b78-10b7f 10ba9-10baf 10cfa-10cff 10d40-10d49
10e60-10e7e 10f1d-10f26 10f51-10f54 10fc5-10fcb 11052-11065 111e1-111f4 116d0-116e3 1173a-1173b
118ea-118f2 11bf0-11bf9 11c5a-11c6c 11de0-11de9 11f50-11f59 11fc0-11fd4 12400-1246f 12475-1247f
12550-12686 16130-16139 16ac0-16ac9 16b5b-16b61 16d70-16d79 16e80-16e96 16ff4-16ff6 1ccf0-1ccf9
1d2c0-1d2d3 1d2e0-1d2f3 1d360-1d378 1e4f0-1e4f9 1e5f1-1e5fa 1e8c7-1e8cf 1ec71-1ecab 1ecad-1ecaf
1ecb1-1ecb4 1ed01-1ed2d 1ed2f-1ed3d 1f100-1f10c
"""
NOT_WHITE_SPACE = range(0x1C, 0x20)  # white space to Python, but not to Unicode


def code_points(ranges: str) -> Iterator[int]:
    for item in ranges.split():
        first, _, last = item.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


def word_cutter() -> Callable[[str], Iterable[str]]:
    """The function that cuts text into words: by `regex` where it is installed, or by `re`."""
    try:
        regex = importlib.import_module("regex")
    except ImportError:
        return ShadowCutter().cut
    cut: Callable[[str], Iterable[str]] = regex.compile(GPT2_WORDS).findall
    return cut


class ShadowCutter:
    """Cuts text as GPT2_WORDS does, with the standard library alone."""

    def __init__(self) -> None:
        self.pattern = re.compile(SHADOW_WORDS)
        self.ascii_shadow = dict.fromkeys([*NOT_WHITE_SPACE, ord("_")], "!")
        self.full_shadow: dict[int, str] = {}  # filled when a text needs it

    def cut(self, text: str) -> Iterator[str]:
        shadow = text.translate(self.shadow_of(text))
        for match in self.pattern.finditer(shadow):
            yield text[match.start() : match.end()]

    def shadow_of(self, text: str) -> dict[int, str]:
        if text.isascii():
            return self.ascii_shadow
        if not self.full_shadow:
            shadow = dict(self.ascii_shadow)
            shadow.update(dict.fromkeys(code_points(YOUNG_LETTERS), "a"))
            shadow.update(dict.fromkeys(code_points(ODD_NUMBERS), "0"))
            self.full_shadow = shadow  # at once: another thread may be reading
        return self.full_shadow


def mend_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone ones by U+FFFD, as tiktoken does: UTF-8 has neither."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


NO_TOKEN = 0xFFFFFFFF
MAX_CACHE, MAX_CACHED_WORD = 1 << 16, 32  # entries; characters


def remember(cache: dict[Any, Any], key: object, value: object) -> None:
    """Keep what was worked out, within bounds: text repeats its words and pairs."""
    if len(cache) >= MAX_CACHE:
        cache.clear()
    cache[key] = value


class Tokenizer:
    """Byte-level byte-pair encoding, read straight from the mapped file.

    Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016), on
    bytes as in GPT-2's encoder.py. Token t stands for vocab.bytes[vocab.offsets[t]:
    vocab.offsets[t + 1]], and vocab.byte_ids[b] is the token of the single byte b (NO_TOKEN if
    there is none). Merge m joins the tokens left and right into merges.results[m];
    merges.pairs[m] is left << 32 | right, sorted, so that it is found by bisection and no table
    is built when a file is opened. A merge of lower merges.ranks[m] goes first.
    """

    def __init__(self, file: TensorFile, config: Config) -> None:
        self.n_tokens = config.vocab_size
        self.special = config.special_tokens
        self.add_prefix_space = config.add_prefix_space
        self.bytes = file.view("vocab.bytes", "B")
        self.offsets = file.view("vocab.offsets", "I")
        self.byte_ids = file.view("vocab.byte_ids", "I")
        self.pairs = file.view("merges.pairs", "Q")
        self.ranks = file.view("merges.ranks", "I")
        self.results = file.view("merges.results", "I")
        self.n_merges = config.n_merges or 0
        self.check(file.path, config.n_token_bytes)
        self.cut: Callable[[str], Iterable[str]] | None = None  # made by the first text
        self.cache: dict[str, list[int]] = {}  # the tokens of short words
        self.found: dict[int, int] = {}  # the merges of pairs

    def check(self, path: str, n_token_bytes: int) -> None:
        """Everything that encoding and decoding rely on. Whole lists at a time: it must be fast."""
        offsets = self.offsets[: self.n_tokens + 1].tolist()
        if offsets[0] != 0 or offsets[-1] != n_token_bytes or offsets != sorted(offsets):
            expected = f"offsets rising from 0 to {n_token_bytes}"
            raise FormatError(path, "tensor vocab.offsets", expected, "others")
        for byte, token in enumerate(self.byte_ids):
            if token != NO_TOKEN and (
                token >= self.n_tokens or self.token_bytes(token) != bytes([byte])
            ):
                raise FormatError(
                    path, "tensor vocab.byte_ids", f"the token of byte {byte}", str(token)
                )
        count = self.n_merges
        pairs = self.pairs[:count].tolist()
        if pairs != sorted(set(pairs)):
            raise FormatError(path, "tensor merges.pairs", "rising pairs", "others")
        lefts = self.pairs[:count].cast("B").cast("I")[1::2].tolist()
        rights = self.pairs[:count].cast("B").cast("I")[0::2].tolist()
        results = self.results[:count].tolist()
        for name, ids in (("pairs", lefts), ("pairs", rights), ("results", results)):
            if ids and max(ids) >= self.n_tokens:
                expected = f"tokens below {self.n_tokens}"
                raise FormatError(path, f"tensor merges.{name}", expected, str(max(ids)))

    def verify(self, path: str) -> None:
        """The slow check, for `info --verify`: each merge joins its two tokens' bytes."""
        for merge, pair in enumerate(self.pairs[: self.n_merges]):
            left, right = self.token_bytes(pair >> 32), self.token_bytes(pair & 0xFFFFFFFF)
            result = self.token_bytes(self.results[merge])
            if result != left + right:
                expected = f"merge {merge} to make {brief(left + right)}"
                raise FormatError(path, "tensor merges.results", expected, brief(result))

    def token_bytes(self, token: int) -> bytes:
        return bytes(self.bytes[self.offsets[token] : self.offsets[token + 1]])

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens; what is not UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Tokens of text; special tokens are recognised in it only if `special` is set."""
        text = mend_surrogates(text)
        if not special or not self.special:
            return self.encode_ordinary(text)
        names = sorted(self.special, key=len, reverse=True)
        tokens: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
            token = self.special.get(part)
            tokens += self.encode_ordinary(part) if token is None else [token]
        return tokens

    def encode_ordinary(self, text: str) -> list[int]:
        if self.add_prefix_space and text and not text.startswith(" "):
            text = " " + text
        if self.cut is None:
            self.cut = word_cutter()
        tokens: list[int] = []
        for word in self.cut(text):
            known = self.cache.get(word)
            if known is None:
                known = self.merge(word.encode("utf-8"))
                if len(word) <= MAX_CACHED_WORD:
                    remember(self.cache, word, known)
            tokens += known
        return tokens

    def merge(self, word: bytes) -> list[int]:
        """Join neighbours, the lowest rank first and the leftmost among equals, until none is left.

        The word is a linked list and the possible merges wait in a heap, so that a word of n
        bytes takes n log n steps, not n squared.
        """
        tokens = [self.byte_token(byte) for byte in word]
        size = len(tokens)
        after = list(range(1, size + 1))  # the index of the next token; size at the end
        before = list(range(-1, size - 1))
        merges = [self.find_merge(*pair) for pair in zip(tokens, tokens[1:])] + [-1]
        heap = [self.ranks[m] * size + i for i, m in enumerate(merges) if m >= 0]
        heapq.heapify(heap)
        while heap:
            rank, i = divmod(heapq.heappop(heap), size)
            m = merges[i]
            if m < 0 or self.ranks[m] != rank:
                continue  # one of the two has been merged otherwise since
            gone = after[i]
            tokens[i], tokens[gone], merges[gone] = self.results[m], -1, -1
            after[i] = after[gone]
            if after[i] < size:
                before[after[i]] = i
            for left in (before[i], i):  # the pairs that the new token is part of
                if left >= 0:
                    right = after[left]
                    m = self.find_merge(tokens[left], tokens[right]) if right < size else -1
                    merges[left] = m
                    if m >= 0:
                        heapq.heappush(heap, self.ranks[m] * size + left)
        return [token for token in tokens if token >= 0]

    def byte_token(self, byte: int) -> int:
        token: int = self.byte_ids[byte]
        if token == NO_TOKEN:
            raise InputError(f"text: byte {byte:#04x} is not in the model's vocabulary")
        return token

    def find_merge(self, left: int, right: int) -> int:
        """The index of the merge of two tokens, or -1."""
        pair = left << 32 | right
        merge = self.found.get(pair)
        if merge is None:
            merge = bisect.bisect_left(self.pairs, pair, 0, self.n_merges)
            if merge == self.n_merges or self.pairs[merge] != pair:
                merge = -1
            remember(self.found, pair, merge)
        return merge


# ------------------------------------------------------------------------------------------------
# 5. Forward
# ------------------------------------------------------------------------------------------------


NOT_FINITE = "NaN or infinite logits"
MAX_THREADS = 256
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def import_numpy(threads: int | None = None) -> None:
    """Import NumPy on first use, so that importing this module costs nothing.

    NumPy's matrix library reads the number of threads once, from the environment, when it loads.
    """
    global np
    if threads is not None and "numpy" not in sys.modules:
        os.environ.update(dict.fromkeys(BLAS_THREADS, str(threads)))
    try:
        import numpy as np
    except ImportError as error:
        advice = "`pip install numpy` installs it"
        raise TinyGPT2Error(f"NumPy is needed to compute: {error} ({advice})") from None


MANY_ROWS = 48  # measured: from here on copying panels together is faster


def linear(x: Array, panels: Array, bias: Array) -> Array:
    """x @ W + b, for a W in panels. [T, k], [n/16, k, 16], [n] -> [T, n]"""
    return project(x, panels, len(bias)) + bias


def project(x: Array, panels: Array, n: int) -> Array:
    """x @ W for a W in panels. [T, k], [n/16, k, 16] -> [T, n]"""
    if len(x) < MANY_ROWS:
        y = np.matmul(x, panels)  # one product for each panel: [n/16, T, 16]
        return y.transpose(1, 0, 2).reshape(len(x), -1)[:, :n]
    # Products this narrow waste a processor's caches when there is much to do. A few panels laid
    # side by side, [k, 128], are cheap to copy and make one good product.
    out = np.empty((len(x), PANEL * len(panels)), np.float32)
    for first in range(0, len(panels), 8):
        group = panels[first : first + 8].transpose(1, 0, 2).reshape(x.shape[1], -1)
        np.matmul(x, group, out=out[:, PANEL * first : PANEL * first + group.shape[1]])
    return out[:, :n]


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """Ba et al., "Layer Normalization" (2016): each row to mean 0 and variance 1. [T, n_embd]"""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)  # [T, 1]
    return centred / np.sqrt(variance + epsilon) * weight + bias


def softmax(x: Array) -> Array:
    """Rows of scores to rows of probabilities. Less the maximum, exp cannot overflow."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu_new(x: Array) -> Array:
    """Hendrycks & Gimpel, "Gaussian Error Linear Units" (2016), in the tanh form of GPT-2."""
    inner = x * np.float32(math.sqrt(2 / math.pi)) * (1 + np.float32(0.044715) * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def gelu(x: Array) -> Array:
    """The exact form, x * P(Z <= x). erf: Abramowitz & Stegun 7.1.26, its error below 1.5e-7."""
    z = np.abs(x) * np.float32(math.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = np.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(coefficient)) * t
    half_erfc = np.float32(0.5) * series * np.exp(-z * z)  # P(Z > |x|)
    return x * np.where(x > 0, 1 - half_erfc, half_erfc)


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def split_heads(x: Array, n_head: int) -> Array:
    """[T, n_embd] -> [n_head, T, head_size]"""
    return x.reshape(len(x), n_head, -1).transpose(1, 0, 2)


def merge_heads(x: Array) -> Array:
    """[n_head, T, head_size] -> [T, n_embd]"""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def attention_scores(q: Array, k: Array, scale: float) -> Array:
    """How much each token looks at each one up to itself; the future is masked by -inf.

    q [n_head, T, head_size] are the queries of the last T of the S tokens whose keys are in
    k [n_head, S, head_size] -> [n_head, T, S]
    """
    scores = q @ k.transpose(0, 2, 1) * np.float32(scale)  # [n_head, T, S]
    queries, keys = scores.shape[1:]
    if queries > 1:
        future = np.arange(keys) > np.arange(keys - queries, keys)[:, None]  # [T, S]
        scores[:, future] = -np.inf
    return scores


class NumpyBackend:
    """The forward pass in NumPy. What is public here is all that a backend has to have.

    It holds the weights, which never change; all that changes is in the cache, which belongs to
    one session. So one backend serves any number of sessions in any number of threads.
    """

    name = "numpy"
    chunk = 256  # tokens in one pass at most, which bounds the scratch memory

    def __init__(self, file: TensorFile, config: Config, threads: int | None) -> None:
        import_numpy(threads)
        self.config = config
        self.activation = {"gelu_new": gelu_new, "gelu": gelu, "relu": relu}[
            config.activation_function
        ]
        n_embd = config.n_embd
        self.wte = file.array("wte.weight")  # [vocab_size/16, n_embd, 16]
        self.wpe = file.array("wpe.weight")[:, :n_embd]  # [n_positions, n_embd]
        self.head = self.wte if config.tie_word_embeddings else file.array("lm_head.weight")
        self.ln_f = {
            f"ln_f.{part}": file.array(f"ln_f.{part}")[:n_embd] for part in ("weight", "bias")
        }
        self.blocks: list[dict[str, Array]] = [{} for _ in range(config.n_layer)]
        for name in file.tensors:
            if name.startswith("h."):
                _, layer, part = name.split(".", 2)
                array = file.array(name)  # in panels, or a vector
                whole = array.ndim == 3
                block = self.blocks[int(layer)]
                block[part] = array if whole else array[: vector_length(config, name)]

    def new_cache(self) -> Array:
        """Room for the keys and values of every position; the system lends memory as it fills."""
        c = self.config
        shape = (c.n_layer, 2, c.n_head, c.n_positions, c.n_embd // c.n_head)
        try:
            return np.empty(shape, np.float32)
        except (MemoryError, ValueError):
            size = 4 * math.prod(shape) / 1e6
            raise TinyGPT2Error(
                f"no memory for a cache of {size:.0f} MB: use a smaller model"
            ) from None

    def forward(self, cache: Array, tokens: Sequence[int], start: int, n_logits: int) -> Array:
        """The logits after the last `n_logits` of `tokens`, float32 [n_logits, vocab_size].

        `tokens` stand at the positions from `start`; `cache` holds the keys and values of those
        before, and takes up theirs. Raises `NumericError` if the logits are not all finite.
        """
        with np.errstate(all="ignore"):  # damaged weights are an error below, not a warning
            x = self.embed(np.asarray(tokens, np.int64), start)  # [T, n_embd]
            for i, block in enumerate(self.blocks):
                x = x + self.attention(i, block, self.norm(x, block, "ln_1"), cache[i], start)
                x = x + self.mlp(block, self.norm(x, block, "ln_2"))
            x = self.norm(x[len(x) - n_logits :], self.ln_f, "ln_f")  # [n_logits, n_embd]
            logits = project(x, self.head, self.config.vocab_size)
        if not np.isfinite(logits).all():
            raise NumericError(NOT_FINITE)
        return logits

    def embed(self, tokens: Array, start: int) -> Array:
        """What each token is, plus where it stands. A token is one column of one panel."""
        wte = self.wte[tokens // PANEL, :, tokens % PANEL]  # [T, n_embd]
        return wte + self.wpe[start : start + len(tokens)]

    def norm(self, x: Array, block: dict[str, Array], name: str) -> Array:
        epsilon = self.config.layer_norm_epsilon
        return layer_norm(x, block[f"{name}.weight"], block[f"{name}.bias"], epsilon)

    def attention(
        self, layer: int, block: dict[str, Array], x: Array, kv: Array, start: int
    ) -> Array:
        """Each token gathers from the tokens before it. kv [2, n_head, n_positions, head_size]"""
        stop = start + len(x)
        qkv = linear(x, block["attn.c_attn.weight"], block["attn.c_attn.bias"])  # [T, 3 * n_embd]
        q, k, v = (split_heads(part, self.config.n_head) for part in np.split(qkv, 3, axis=1))
        kv[0, :, start:stop] = k
        kv[1, :, start:stop] = v
        scores = attention_scores(q, kv[0, :, :stop], self.attention_scale(layer))
        y = merge_heads(softmax(scores) @ kv[1, :, :stop])  # [T, n_embd]
        return linear(y, block["attn.c_proj.weight"], block["attn.c_proj.bias"])

    def attention_scale(self, layer: int) -> float:
        scale = 1.0
        if self.config.scale_attn_weights:
            scale /= math.sqrt(self.config.n_embd // self.config.n_head)
        if self.config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        return scale

    def mlp(self, block: dict[str, Array], x: Array) -> Array:
        """Each token by itself: to n_inner, a bend, and back. [T, n_embd] -> [T, n_embd]"""
        hidden = linear(x, block["mlp.c_fc.weight"], block["mlp.c_fc.bias"])  # [T, n_inner]
        return linear(self.activation(hidden), block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])

    def logprobs(
        self, cache: Array, tokens: Sequence[int], start: int, targets: Sequence[int]
    ) -> list[float]:
        """The log-probability of each target after the token in its place."""
        logits = self.forward(cache, tokens, start, len(tokens))
        top = logits.max(axis=-1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(axis=-1, dtype=np.float64))
        chosen = logits[np.arange(len(targets)), np.asarray(targets)] - top[:, 0]
        result: list[float] = (chosen - log_sum).tolist()
        return result

    def choose(
        self, cache: Array, logits: Array, seen: set[int], options: Options, uniform: float
    ) -> int:
        """The token after these logits, which are those that the cache ends with."""
        return choose(adjust(logits, seen, options), options, uniform)


LIBRARY = {"win32": "tinygpt2_kernels.dll", "darwin": "tinygpt2_kernels.dylib"}.get(
    sys.platform, "tinygpt2_kernels.so"
)
DONE, MORE, BUSY, _, NOT_ALL_FINITE = range(5)  # what the functions of kernels.c return
LOGIT_ROWS = 48  # how many rows of logits a session in C holds at most


def library_path() -> str | None:
    """Where the kernels are: beside this file, where build.py and the wheel put them."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), LIBRARY)
    return path if os.path.exists(path) else None


def load_library(path: str) -> Any:
    """The library that build.py makes of kernels.c, with all that is used of it declared."""
    import ctypes as c

    pointer, number = c.c_void_p, c.c_int
    declared = (
        ("tg_isa_name", c.c_char_p, [c.c_char_p]),
        ("tg_model_new", pointer, [c.c_char_p, pointer, pointer, c.c_char_p, number]),
        ("tg_model_free", None, [pointer]),
        ("tg_chunk", number, [pointer]),
        ("tg_session_new", pointer, [pointer, number]),
        ("tg_session_free", None, [pointer]),
        ("tg_forward", number, [pointer, pointer, number, number]),
        ("tg_logits", number, [pointer, number, number, c.POINTER(pointer)]),
        ("tg_log_probability", c.c_double, [pointer, number, c.c_int32]),
        ("tg_choose", c.c_int32, [pointer, c.c_char_p]),
    )
    try:
        check_whole(path)
        library = c.CDLL(path)
        library.tg_version.restype = c.c_char_p
        found = (library.tg_version() or b"none").decode("utf-8", "replace")
        if found != __version__:
            raise TinyGPT2Error(f"{path}: expected version {__version__}, found {found}; {REBUILD}")
        for name, result, arguments in declared:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise TinyGPT2Error(f"{path}: it cannot be loaded: {error}; {REBUILD}") from None
    return library


def check_whole(path: str) -> None:
    """Raise `OSError` if a library of Linux is cut off, which the system would find by crashing.

    Its table of sections is the last thing in it (ELF-64, little-endian).
    """
    if not os.path.isfile(path):
        raise OSError("it is not a regular file")
    with open(path, "rb") as file:
        head = file.read(64)
    if head[:4] == b"\x7fELF":
        table, size, count = struct.unpack_from("<40xQ10xHH", head.ljust(64, b"\0"))
        if len(head) < 64 or os.path.getsize(path) < table + size * count:
            raise OSError("its end is missing")


REBUILD = "run `python build.py` again, delete the file, or use the backend 'numpy'"


class Handle:
    """What C has made, until Python forgets it; `owner` is what must live as long."""

    def __init__(self, pointer: Any, free: Callable[[Any], None], owner: object = None) -> None:
        self.pointer, self.free, self.owner = pointer, free, owner
        self.given: object = None  # what C reads during a call: a compiler may drop locals early

    def __del__(self) -> None:
        self.free(self.pointer)


def address_of(data: mmap.mmap) -> tuple[int, Handle]:
    """Where a read-only map lies in memory, and what keeps it there."""
    import ctypes as c

    view = c.create_string_buffer(256)  # a Py_buffer, which begins with the address
    c.pythonapi.PyObject_GetBuffer(c.py_object(data), view, 0)
    address = c.c_void_p.from_buffer(view).value or 0
    return address, Handle(view, c.pythonapi.PyBuffer_Release, data)


class CBackend:
    """The forward pass in kernels.c: the same public methods, the same bits on every machine."""

    name = "c"

    def __init__(self, file: TensorFile, config: Config, threads: int | None, path: str) -> None:
        self.library = load_library(path)
        self.config = config
        self.threads = threads or default_threads()
        if self.library.tg_isa_name(None) is None:
            wanted = os.environ.get("TINYGPT2_ISA")
            raise InputError(f"TINYGPT2_ISA: expected {self.isas()}, found {brief(wanted)}")
        self.isa: str = self.library.tg_isa_name(None).decode()
        offsets = [
            file.tensors[name].start
            for name, (dtype, _) in layout(config).items()
            if dtype == "F32"
        ]
        sizes = struct.pack(
            "@10if",
            *(config.vocab_size, config.n_positions, config.n_embd, config.n_layer),
            *(config.n_head, config.n_inner, ACTIVATIONS.index(config.activation_function)),
            *(config.scale_attn_weights, config.scale_attn_by_inverse_layer_idx),
            *(config.tie_word_embeddings, config.layer_norm_epsilon),
        )
        address, weights = address_of(file.map)
        places = struct.pack(f"@{len(offsets)}q", *offsets)
        model = self.library.tg_model_new(sizes, address, places, None, self.threads)
        if not model:
            raise TinyGPT2Error("no memory for the table of the model's tensors")
        self.model = Handle(model, self.library.tg_model_free, weights)
        self.chunk: int = self.library.tg_chunk(model)
        # For a look at signals soon enough: no more work than a step of a layer has.
        widest = max(config.n_inner, 3 * config.n_embd)
        self.n_rows = max(1, min(LOGIT_ROWS, self.chunk * widest // config.vocab_size))

    def isas(self) -> str:
        """The names of the instruction sets that can be used here."""
        names = ("avx512", "avx2", "neon", "portable")
        return " or ".join(n for n in names if self.library.tg_isa_name(n.encode()))

    def new_cache(self) -> Handle:
        """A session of kernels.c: keys, values and scratch memory."""
        session = self.library.tg_session_new(self.model.pointer, self.chunk)
        if not session:
            raise TinyGPT2Error("no memory for the keys and values of a session: close others")
        return Handle(session, self.library.tg_session_free, self.model)

    def run(self, cache: Handle, tokens: Sequence[int], start: int) -> None:
        """Compute tokens up to the last layer, a fiftieth of a second at a time: between two calls
        Python looks at signals, so that Ctrl-C ends a long prompt."""
        import ctypes

        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        status = self.library.tg_forward(cache.pointer, ids, len(tokens), start)
        check_signals = ctypes.pythonapi.PyErr_CheckSignals  # which compiled Python does not call
        while status == MORE:
            check_signals()
            status = self.library.tg_forward(cache.pointer, None, 0, 0)
        check_signals()
        check_status(status)

    def rows(self, cache: Handle, first: int, count: int) -> Any:
        """The logits after some of those tokens, rows of floats that last until the next call."""
        import ctypes

        place = ctypes.c_void_p()
        check_status(self.library.tg_logits(cache.pointer, first, count, place))
        row = ctypes.c_float * round_up(self.config.vocab_size, PANEL)
        rows = (row * count).from_address(place.value or 0)
        rows.cache = cache  # type: ignore[attr-defined]  # its memory, as long as they are looked at
        return rows

    def forward(self, cache: Handle, tokens: Sequence[int], start: int, n_logits: int) -> Any:
        """As in NumPy; a single row of logits is not an array but memory of the cache."""
        self.run(cache, tokens, start)
        first, size = len(tokens) - n_logits, self.config.vocab_size
        if n_logits == 1:
            return [memoryview(self.rows(cache, first, 1)[0])[:size]]
        logits = np.empty((n_logits, size), np.float32)
        for i in range(0, n_logits, self.n_rows):
            count = min(self.n_rows, n_logits - i)
            logits[i : i + count] = np.asarray(self.rows(cache, first + i, count))[:, :size]
        return logits

    def logprobs(
        self, cache: Handle, tokens: Sequence[int], start: int, targets: Sequence[int]
    ) -> list[float]:
        """The log-probability of each target after the token in its place."""
        self.run(cache, tokens, start)
        result: list[float] = []
        for i in range(0, len(targets), self.n_rows):
            some = targets[i : i + self.n_rows]
            self.rows(cache, i, len(some))
            result += [
                self.library.tg_log_probability(cache.pointer, row, target)
                for row, target in enumerate(some)
            ]
        return result

    def choose(
        self, cache: Handle, logits: Any, seen: set[int], options: Options, uniform: float
    ) -> int:
        """What `adjust` and `choose` of section 6 do, on the logits in the cache."""
        biases = options.logit_bias or {}
        tokens, values = array.array("i", biases), array.array("d", biases.values())
        known = array.array("i", seen if options.repetition_penalty != 1 else ())
        cache.given = (tokens, values, known)
        packed = struct.pack(
            "@5d3P3i",
            *(options.temperature, options.top_p, options.min_p, options.repetition_penalty),
            uniform,
            *(part.buffer_info()[0] for part in (values, tokens, known)),
            *(min(options.top_k, len(logits)), len(tokens), len(known)),
        )
        token: int = self.library.tg_choose(cache.pointer, packed)
        if token == -BUSY:
            check_status(BUSY)
        if token < 0:
            raise InputError(EVERY_TOKEN)
        return token


Backend = Union[NumpyBackend, CBackend]
BACKENDS = ("c", "numpy")


def new_backend(
    file: TensorFile, config: Config, wanted: str | None, threads: int | None
) -> Backend:
    """The backend that is wanted, or the fastest one there is."""
    path = None if wanted == "numpy" else library_path()
    if path is not None:
        backend = CBackend(file, config, threads, path)
        if wanted or os.environ.get("TINYGPT2_ISA") or backend.isa != "portable":
            return backend
        with contextlib.suppress(TinyGPT2Error):  # raised if there is no NumPy
            return NumpyBackend(file, config, threads)  # many times faster than portable C
        return backend
    if wanted == "c":
        advice = "`python build.py` makes it, with any C compiler"
        raise TinyGPT2Error(f"backend c: no {LIBRARY} beside {__file__} ({advice})")
    return NumpyBackend(file, config, threads)


def check_status(status: int) -> None:
    if status == BUSY:
        raise StateError("session: in use by another thread; give each thread its own")
    if status == NOT_ALL_FINITE:
        raise NumericError(NOT_FINITE)
    if status != DONE:
        raise TinyGPT2Error(f"kernels: refused with status {status}; {REBUILD}")


def default_threads() -> int:
    """$TINYGPT2_THREADS, or else the processors that this process may use."""
    wanted = os.environ.get("TINYGPT2_THREADS")
    if not wanted:
        return min(available_processors(), MAX_THREADS)
    number = wanted.isascii() and wanted.isdecimal() and len(wanted) < 10
    if not number or not 1 <= int(wanted) <= MAX_THREADS:
        expected = f"a whole number from 1 to {MAX_THREADS}"
        raise InputError(f"TINYGPT2_THREADS: expected {expected}, found {brief(wanted)}")
    return int(wanted)


def available_processors() -> int:
    """Those of this process's affinity, or as many as its container's quota (cgroup) pays for."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for quota, period in cgroup_quotas("/proc/self/cgroup", "/sys/fs/cgroup"):
        count = min(count, max(1, math.ceil(quota / period)))
    return count


def cgroup_quotas(groups: str, root: str) -> Iterator[tuple[int, int]]:
    """The (quota, period) pairs in microseconds of every control group that we are in."""
    for line in read_text(groups).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):  # a quota of each group above counts too
            folder = os.path.join(root, "cpu" if controllers else "", *parts[:depth])
            if controllers:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                values = [read_text(os.path.join(folder, name)).strip() for name in names]
            else:
                values = read_text(os.path.join(folder, "cpu.max")).split()
            if len(values) == 2 and all(value.isdecimal() and int(value) for value in values):
                yield int(values[0]), int(values[1])


def read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


# ------------------------------------------------------------------------------------------------
# 6. Choice
# ------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """How to choose tokens and when to stop. `generate` and `stream` take these as keywords.

    The filters act in the order of the transformers library: logit_bias, repetition_penalty,
    temperature, top_k, top_p, min_p; one token always remains.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8  # 0 is greedy: always the most probable token
    top_k: int = 40  # keep the k most probable tokens (Fan et al. 2018); 0 keeps all
    top_p: float = 1.0  # keep the fewest that hold this much probability (Holtzman et al. 2019)
    min_p: float = 0.0  # keep those with this fraction of the best one's probability
    repetition_penalty: float = 1.0  # divides the logits of tokens seen (Keskar et al. 2019)
    seed: int | None = None  # the same seed, the same text; None takes a fresh one
    stop: str | Sequence[str] = ()  # texts that end the answer and are not part of it
    logit_bias: dict[int, float] | None = None  # added to the logits of these tokens


def check_options(options: dict[str, Any], vocab_size: int) -> Options:
    """The options with every value checked."""
    unknown = [name for name in options if name not in Options._fields]
    if unknown:
        known = ", ".join(Options._fields)
        raise InputError(f"option {unknown[0]}: there is no such option; known are {known}")
    o: dict[str, Any] = {**Options()._asdict(), **options}
    if isinstance(o["stop"], str):
        o["stop"] = (o["stop"],)
    requirements = {
        "max_new_tokens": (is_count(o["max_new_tokens"]), "a whole number from 0"),
        "temperature": (is_between(o["temperature"], 0, 1e6), "a number from 0 to 1e6"),
        "top_k": (is_count(o["top_k"]), "a whole number from 0 (0: all tokens)"),
        "top_p": (is_between(o["top_p"], 0, 1) and o["top_p"] > 0, "above 0, at most 1"),
        "min_p": (is_between(o["min_p"], 0, 1), "a number from 0 to 1"),
        "repetition_penalty": (
            is_between(o["repetition_penalty"], 1e-6, 1e6),
            "a number from 1e-6 to 1e6",
        ),
        "seed": (o["seed"] is None or type(o["seed"]) is int, "a whole number or None"),
        "stop": (are_texts(o["stop"]), "a text or a list of texts, none empty"),
        "logit_bias": (are_biases(o["logit_bias"], vocab_size), "a dict: token to number, or -inf"),
    }
    for name, (condition, expected) in requirements.items():
        if not condition:
            raise InputError(f"option {name}: expected {expected}, found {brief(options[name])}")
    return Options(**o)


def is_between(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def are_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(t, str) and t for t in value)


def are_biases(value: object, vocab_size: int) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(is_token(token, vocab_size) for token in value)
        and all(is_between(bias, -math.inf, 1e30) for bias in value.values())
    )


class SplitMix64:
    """The random numbers: 64 bits of state, the same on every machine.

    Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators" (2014).
    """

    def __init__(self, seed: int) -> None:
        self.state = seed & 0xFFFFFFFFFFFFFFFF

    def uniform(self) -> float:
        """A number from 0 to 1, 1 excluded, in steps of 2**-53."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53


EVERY_TOKEN = "option logit_bias: it rules out every token"


def adjust(logits: Array, seen: set[int], options: Options) -> Array:
    """The logits with the bias and the repetition penalty. float32 -> float64 [vocab_size]"""
    scores = logits.astype(np.float64)
    for token, bias in (options.logit_bias or {}).items():
        scores[token] += bias
    if options.repetition_penalty != 1 and seen:
        tokens = np.fromiter(seen, np.int64)
        s, penalty = scores[tokens], options.repetition_penalty
        scores[tokens] = np.where(s < 0, s * penalty, s / penalty)
    if scores.max() == -np.inf:
        raise InputError(EVERY_TOKEN)
    return scores


def candidates(scores: Array, options: Options) -> tuple[Array, Array]:
    """The tokens that the filters keep and their probabilities, the most probable first."""
    tokens = np.arange(len(scores))
    if 0 < options.top_k < len(scores):
        tokens = np.flatnonzero(scores >= np.partition(scores, -options.top_k)[-options.top_k])
    tokens = tokens[np.argsort(-scores[tokens], kind="stable")]
    s = scores[tokens]
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the best token alone
        p = softmax((s - s[0]) / options.temperature)
    if options.top_p < 1:
        # A token stays if it and all less probable ones together hold more than is to be cut.
        kept = max(1, int((np.cumsum(p[::-1])[::-1] > 1 - options.top_p).sum()))
        tokens, p = tokens[:kept], p[:kept]
    kept = int((p >= options.min_p * p[0]).sum())
    return tokens[:kept], p[:kept] / p[:kept].sum()


def choose(scores: Array, options: Options, uniform: float) -> int:
    """The next token: the best one, or one drawn with the probabilities that are left."""
    if options.temperature == 0:
        return int(scores.argmax())
    tokens, p = candidates(scores, options)
    cumulative = np.cumsum(p)
    drawn = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return int(tokens[min(int(drawn), len(tokens) - 1)])


# ------------------------------------------------------------------------------------------------
# 7. Text
# ------------------------------------------------------------------------------------------------


class StopFilter:
    """Lets text through up to the first stop text, and holds back only what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Add a piece; return the text that can no longer be part of a stop text."""
        text = self.held + piece
        # The stop text that is complete first counts, the longest of several that end together:
        # so the answer does not depend on how the text was cut into pieces.
        found = [
            (text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text
        ]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        keep = max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with, short of all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class Score(NamedTuple):
    """How well a model predicts a text. Natural logarithms."""

    ids: list[int]
    logprobs: list[float | None]  # one for each token; None for one that nothing precedes
    n_bytes: int | None  # of the text in UTF-8; None for a model without a tokenizer

    @property
    def total(self) -> float:
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def perplexity(self) -> float:
        scored = sum(value is not None for value in self.logprobs)
        try:
            return math.exp(-self.total / scored) if scored else math.nan
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        return -self.total / math.log(2) / self.n_bytes if self.n_bytes else math.nan


Event = tuple[Union[int, None], str]  # a new token, and the text that it releases


def pieces_of(events: Iterator[Event]) -> Iterator[str]:
    for _, piece in events:
        if piece:
            yield piece


def ids_of(events: Iterator[Event]) -> Iterator[int]:
    for token, _ in events:
        if token is not None:
            yield token


CLOSED = "session: it or its model is closed; open a new one"


class Session:
    """Tokens, and the keys and values computed for them: one text that grows.

    A session belongs to one caller at a time; several sessions of one model are independent.
    `finish_reason` says why the last answer ended: "length" (max_new_tokens), "end" (the model
    chose end-of-text), "stop" (a stop text) or "context" (every position is used); `seed` with
    which seed it was drawn.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.finish_reason: str | None = None
        self.seed: int | None = None
        self._tokens: list[int] = []
        self._n_cached = 0  # of them, how many the cache holds
        self._logits: Array = None  # after the last token, once they are computed
        self._cache: Any = model.backend.new_cache()
        self._lock = threading.Lock()
        self._change = 0  # counts feeds and rewinds, so that an open stream notices them
        self._closed = False

    @property
    def tokens(self) -> list[int]:
        """All token ids so far, as a new list."""
        return list(self._tokens)

    @property
    def logits(self) -> Array:
        """The logits that follow the last token, float32 [vocab_size], as a new array."""
        import_numpy()
        with self._alone():
            return np.array(self._last_logits())

    def feed(self, prompt: Prompt) -> None:
        """Append text or token ids and compute them."""
        tokens = self.model.tokens_of(prompt)
        with self._alone():
            self._append(tokens)
            if tokens:
                self._last_logits()

    def rewind(self, n: Any) -> None:
        """Forget the last `n` tokens."""
        with self._alone():
            length = len(self._tokens)
            if not is_count(n) or n > length:
                raise InputError(f"rewind: expected 0 to {length} tokens, found {brief(n)}")
            self._truncate(length - n)

    def generate(self, **options: Any) -> str:
        """The answer to what was fed so far. `options`: see `Options`."""
        return "".join(self.stream(**options))

    def stream(self, **options: Any) -> Iterator[str]:
        """The answer piece by piece; no piece ends inside a character or inside a stop text."""
        return pieces_of(self.events(True, options))

    def stream_ids(self, **options: Any) -> Iterator[int]:
        """The answer as token ids, those of a stop text included; works without a tokenizer."""
        return ids_of(self.events(bool(options.get("stop")), options))

    def events(self, text: bool, options: dict[str, Any]) -> Iterator[Event]:
        """Each new token with the text that it releases; the text's rest comes without a token."""
        checked = check_options(options, self.model.config.vocab_size)
        tokenizer = self.model.need_tokenizer() if text else None
        return self._events(tokenizer, checked)

    def close(self) -> None:
        """Free the cache. Every other call fails from here on; closing again is allowed."""
        self._closed = True
        self._cache = self._logits = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse a second caller at the same time: half-computed states are nobody's intention."""
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "session: in use by another thread; give each thread a session of its own"
            )
        try:
            if self._closed or self.model.closed:
                raise StateError(CLOSED)
            yield
        finally:
            self._lock.release()

    def _append(self, tokens: Sequence[int]) -> None:
        total, room = len(self._tokens) + len(tokens), self.model.config.n_positions
        if tokens and total > room:
            there = f"{len(tokens)} after {len(self._tokens)}" if self._tokens else str(total)
            text = f"expected at most {room} tokens, the positions of the model, found {there}"
            raise ContextError(f"context: {text}; shorten the text or rewind the session")
        if tokens:
            self._change += 1
            self._logits = None
            self._tokens += tokens

    def _truncate(self, n: int) -> None:
        if n < len(self._tokens):
            self._change += 1
            self._logits = None
            self._n_cached = min(self._n_cached, n)
            del self._tokens[n:]

    def _is_full(self) -> bool:
        """Whether the last token is the one that the last position predicted."""
        return len(self._tokens) > self.model.config.n_positions

    def _last_logits(self) -> Array:
        """Compute the tokens that the cache lacks, chunk by chunk; the logits after the last."""
        logits = self._logits
        if logits is None:
            if not self._tokens:
                raise StateError("session: it is empty; feed it a text first")
            if self._is_full():
                raise ContextError("context: nothing can follow the last position; rewind first")
            # At least the last one: its logits may be forgotten where its keys are not.
            self._n_cached = min(self._n_cached, len(self._tokens) - 1)
            while self._n_cached < len(self._tokens):
                logits = self._advance(1)
            self._logits = logits = logits[0]
        return logits

    def _open_cache(self) -> Any:
        cache = self._cache
        if cache is None:  # closed by another thread just now
            raise StateError(CLOSED)
        return cache

    def _advance(self, n_logits: int, targets: Sequence[int] | None = None) -> Array:
        """Compute the next chunk; the logits after its last tokens, or the targets' logprobs."""
        backend, cache = self.model.backend, self._open_cache()
        start = self._n_cached
        tokens = self._tokens[start : start + backend.chunk]
        stop = start + len(tokens)
        try:
            if targets is None:
                result = backend.forward(cache, tokens, start, min(n_logits, len(tokens)))
            else:
                result = backend.logprobs(cache, tokens, start, targets[start:stop])
        except NumericError as error:
            raise NumericError(
                f"{self.model.path}: {error} by position {stop - 1}: "
                "the weights are damaged (`info --verify` checks a file) or out of float32's range"
            ) from None
        self._n_cached = stop
        return result

    def _events(self, tokenizer: Tokenizer | None, options: Options) -> Iterator[Event]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        stops = StopFilter(options.stop)
        if tokenizer:  # the bytes of a character that the text so far ends inside of
            decoder.decode(b"".join(map(tokenizer.token_bytes, self._tokens[-4:])))
        ended = True  # nothing of this answer is in the decoder yet
        for token in self._choices(options):
            ended = False
            piece = stops.push(decoder.decode(tokenizer.token_bytes(token))) if tokenizer else ""
            if stops.stopped:
                self.finish_reason = "stop"
            yield token, piece
            if stops.stopped:
                return
        piece = "" if ended else stops.push(decoder.decode(b"", final=True))
        if stops.stopped:
            self.finish_reason = "stop"
        yield None, piece + stops.held

    def _choices(self, options: Options) -> Iterator[int]:
        """Choose a token, append it, and so on: the loop that makes a language model talk."""
        seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "little")
        random = SplitMix64(seed)
        with self._alone():
            self.seed, self.finish_reason = seed, None
            self._begin()
            self._change += 1  # a stream that is open elsewhere ends here
            seen, change = set(self._tokens), self._change
        for _ in range(options.max_new_tokens):
            with self._alone():
                if self._change != change:
                    raise StateError("session: it was changed while a stream was open")
                if self._is_full():
                    self.finish_reason = "context"
                    return
                logits = self._last_logits()
                cache = self._open_cache()
                uniform = random.uniform()
                token = self.model.backend.choose(cache, logits, seen, options, uniform)
                if token == self.model.config.eos_token_id:
                    self.finish_reason = "end"
                    return
                self._logits = None
                self._tokens.append(token)
                seen.add(token)
            yield token
        self.finish_reason = "length"

    def _begin(self) -> None:
        """An empty text starts from end-of-text, which is how documents began in training."""
        if not self._tokens:
            start = self.model.start_token
            if start is None:
                raise InputError(
                    "prompt: it is empty, and the model has no end-of-text to start from"
                )
            self._append([start])


class Model:
    """A mapped .tg2 file, its tokenizer and its backend. Shared by any number of sessions."""

    def __init__(self, path: Path, backend: Any, threads: Any) -> None:
        if backend is not None and backend not in BACKENDS:
            raise InputError(f"backend: expected None or one of {BACKENDS}, found {brief(backend)}")
        if threads is not None and not (is_count(threads) and 1 <= threads <= MAX_THREADS):
            expected = f"None or a number from 1 to {MAX_THREADS}"
            raise InputError(f"threads: expected {expected}, found {brief(threads)}")
        if not isinstance(path, (str, os.PathLike)):
            raise InputError(f"path: expected the path of a .tg2 file, found {brief(path)}")
        if sys.byteorder != "little":
            raise TinyGPT2Error("a .tg2 file is little-endian, and this machine is not")
        self.file = TensorFile(path)
        try:
            self.path = self.file.path
            self.config = read_config(self.file)
            has_tokenizer = self.config.n_merges is not None
            self.tokenizer = Tokenizer(self.file, self.config) if has_tokenizer else None
            self._backend: Backend | None = new_backend(self.file, self.config, backend, threads)
        except TinyGPT2Error:
            self.file.close()
            raise
        self.closed = False

    @property
    def start_token(self) -> int | None:
        """The token that precedes a text: end-of-text, or what the model has in its place."""
        config = self.config
        return config.bos_token_id if config.eos_token_id is None else config.eos_token_id

    @property
    def backend(self) -> Backend:
        """What computes."""
        backend = self._backend
        if backend is None:
            raise StateError("model: it is closed; load it again")
        return backend

    def need_tokenizer(self) -> Tokenizer:
        tokenizer = self.tokenizer  # before `closed` is looked at: another thread may be closing
        if self.closed:
            raise StateError("model: it is closed; load it again")
        if tokenizer is None:
            raise InputError(
                f"{self.path}: no tokenizer inside; use token ids (generate_ids, --ids)"
            )
        return tokenizer

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; the names of special tokens count as such only if `special`."""
        if not isinstance(text, str):
            raise InputError(f"text: expected a string, found {brief(text)}")
        return self.need_tokenizer().encode(text, special)

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.need_tokenizer().decode(self.check_ids(ids))

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """Text or ids as ids."""
        return self.encode(prompt) if isinstance(prompt, str) else self.check_ids(prompt)

    def check_ids(self, ids: Iterable[Any]) -> list[int]:
        """Ids as a list of int (NumPy's integers are welcome), each in the vocabulary."""
        if isinstance(ids, (bytes, bytearray, memoryview)) or not hasattr(ids, "__iter__"):
            raise InputError(f"prompt: expected text or token ids, found {brief(ids)}")
        tokens = []
        size = self.config.vocab_size
        for position, value in enumerate(ids):
            token = as_index(value)
            if token is None or not is_token(token, size):
                found = f"{brief(value)} at position {position}"
                raise InputError(
                    f"token ids: expected whole numbers from 0 to {size - 1}, found {found}"
                )
            tokens.append(token)
        return tokens

    def session(self) -> Session:
        """A new, empty session."""
        return Session(self)

    def generate(self, prompt: Prompt, **options: Any) -> str:
        """The text that follows `prompt` (text or ids), without it. `options`: see `Options`."""
        return "".join(self.stream(prompt, **options))

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """The same in pieces, as soon as each is certain."""
        return self._once(prompt, lambda session: session.stream(**options))

    def generate_ids(self, prompt: Prompt, **options: Any) -> list[int]:
        """The token ids that follow `prompt`; the way to run a model without a tokenizer."""
        return list(self._once(prompt, lambda session: session.stream_ids(**options)))

    def _once(self, prompt: Prompt, answer: Callable[[Session], Iterator[Any]]) -> Iterator[Any]:
        """A session used once. Wrong arguments are an error now, not at the first item."""
        session = self.session()
        tokens = self.tokens_of(prompt)
        pieces = answer(session)

        def run() -> Iterator[Any]:
            with session:
                session.feed(tokens)
                yield from pieces

        return run()

    def logits(self, prompt: Prompt) -> Array:
        """The logits after every token, float32 [len(ids), vocab_size]."""
        import_numpy()
        tokens = self.tokens_of(prompt)
        logits = np.empty((len(tokens), self.config.vocab_size), np.float32)
        with self.session() as session, session._alone():
            session._append(tokens)
            while session._n_cached < len(tokens):
                start = session._n_cached
                rows = session._advance(len(tokens))
                logits[start : session._n_cached] = rows
        return logits

    def score(self, prompt: Prompt, progress: Progress | None = None) -> Score:
        """The log-probability of every token of a text of any length.

        The text follows end-of-text, as documents do in training; without such a token its first
        token has no score. A text longer than the context is read in windows that overlap by half,
        and every token is scored once, with at least half a context before it. Memory does not
        grow with the text.
        """
        ids = self.tokens_of(prompt)
        start = self.start_token
        tokens = ids if start is None else [start, *ids]
        logprobs: list[float | None] = [None] * min(1, len(ids)) if start is None else []
        room = self.config.n_positions
        scored = 1  # how many of `tokens` are done
        while scored < len(tokens):
            begin = 0 if scored == 1 else max(0, scored - max(1, room // 2))
            end = min(len(tokens), begin + room + 1)
            logprobs += self._window_logprobs(tokens[begin:end])[scored - begin - 1 :]
            scored = end
            if progress:
                progress("scoring", scored, len(tokens))
        return Score(ids, logprobs, self._byte_count(prompt, ids))

    def _window_logprobs(self, tokens: list[int]) -> list[float]:
        """The log-probability of each token but the first, given those before it."""
        logprobs: list[float] = []
        with self.session() as session, session._alone():
            session._append(tokens[:-1])
            while len(logprobs) < len(tokens) - 1:
                logprobs += session._advance(0, tokens[1:])
        return logprobs

    def _byte_count(self, prompt: Prompt, ids: list[int]) -> int | None:
        if isinstance(prompt, str):
            return len(mend_surrogates(prompt).encode("utf-8"))
        return sum(len(self.tokenizer.token_bytes(i)) for i in ids) if self.tokenizer else None

    def close(self) -> None:
        """Release the file. Sessions of this model fail from here on; closing again is allowed."""
        if not self.closed:
            self.closed = True
            self.tokenizer = self._backend = None  # who computes now holds what it needs
            self.file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(path: Path | None = None, *, backend: Any = None, threads: Any = None) -> Model:
    """Open a .tg2 file, or the default model if none is named.

    Takes milliseconds: the file is mapped, not read. Raises `FormatError` if it is not a good one.
    `backend` (str) is what computes: "c" (the kernels that build.py makes), "numpy", or None for
    the fastest there is. `threads` (int) is how many processors it may use, $TINYGPT2_THREADS or
    all if None; NumPy takes it only if this call is what imports NumPy.
    """
    return Model(default_model() if path is None else path, backend, threads)


def default_model() -> str:
    """The path of the model that comes with tinygpt2, in a clone or installed."""
    here = os.path.dirname(os.path.abspath(__file__))
    places = [os.path.join(here, folder, "tales.tg2") for folder in ("vendor", "tinygpt2_data")]
    for place in places:
        if os.path.exists(place):
            return place
    advice = "name a .tg2 file, or put the project's vendor/tales.tg2 there"
    raise FormatError(places[0], "default model", "a file", "none", advice)


# ------------------------------------------------------------------------------------------------
# 8. Conversion
# ------------------------------------------------------------------------------------------------

# What transformers' GPT2Config assumes where config.json is silent.
GPT2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
SAME_ACTIVATION = {
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
}
END_OF_TEXT = "<|endoftext|>"
SLAB = 1 << 22  # bytes converted at a time, about


Merges = dict[tuple[int, int], tuple[int, int]]  # (left, right) -> (rank, result)


class Vocabulary(NamedTuple):
    """A tokenizer as read from its files, before it is laid out for bisection."""

    tokens: dict[int, bytes]
    merges: Merges
    special: dict[str, int]
    add_prefix_space: bool


def convert(source: Path, out: Path, progress: Progress | None = None) -> None:
    """Convert a GPT-2 checkpoint to a .tg2 file.

    `source` is a folder as transformers writes it (config.json, model.safetensors or shards with
    an index, vocab.json with merges.txt or tokenizer.json), or a .safetensors file beside its
    config.json. Tensors pass through one slab at a time, and `out` appears whole or not at all.
    Raises `FormatError` naming what is missing, misshapen or not supported.
    """
    import_numpy()
    folder, files = find_checkpoint(os.fsdecode(source))
    vocabulary = read_vocabulary(folder)
    config = checkpoint_config(os.path.join(folder, "config.json"), vocabulary)
    with contextlib.ExitStack() as stack:
        tensors = Checkpoint(
            [stack.enter_context(contextlib.closing(TensorFile(f))) for f in files]
        )
        tensors.refuse_unknown(config)
        write_tg2(os.fsdecode(out), config, checkpoint_data(config, tensors, vocabulary), progress)


def find_checkpoint(source: str) -> tuple[str, list[str]]:
    """The folder of a checkpoint and its .safetensors files."""
    if os.path.isfile(source):
        return os.path.dirname(source) or ".", [source]
    single = os.path.join(source, "model.safetensors")
    index = single + ".index.json"
    if os.path.exists(single):
        return source, [single]
    if os.path.exists(index):
        shards = read_json(index).get("weight_map")
        if not is_text_map(shards) or not shards:
            raise FormatError(index, "weight_map", "an object of file names", brief(shards))
        for shard in shards.values():
            if os.path.basename(shard) != shard or shard in ("", ".", ".."):
                raise FormatError(index, "weight_map", "names of files beside it", brief(shard))
        return source, [os.path.join(source, name) for name in sorted(set(shards.values()))]
    advice = "name the folder that holds it"
    if os.path.exists(os.path.join(source, "pytorch_model.bin")):
        advice = (
            "pickled weights run code when they are read; save them with safe_serialization=True"
        )
    raise FormatError(single, "checkpoint", "model.safetensors or its index", "neither", advice)


def read_json(path: str) -> dict[str, Any]:
    file = map_file(path)
    with contextlib.closing(file):
        if len(file) > MAX_HEADER:
            raise FormatError(path, "size", f"at most {MAX_HEADER} bytes", str(len(file)))
        return parse_json_object(path, "content", file[:])


def checkpoint_config(path: str, vocabulary: Vocabulary | None) -> Config:
    """Read config.json, filled up with GPT-2's defaults; refuse what is not a GPT-2."""
    given = read_json(path)
    if given.get("model_type", "gpt2") != "gpt2":
        advice = "only GPT-2-shaped models are supported"
        raise FormatError(path, "model_type", "'gpt2'", brief(given["model_type"]), advice)
    if given.get("add_cross_attention"):
        raise FormatError(
            path, "add_cross_attention", "false", "true", "encoders are not supported"
        )
    values = {name: given.get(name, default) for name, default in GPT2_DEFAULTS.items()}
    if values["n_inner"] is None and is_count(values["n_embd"]):
        values["n_inner"] = 4 * values["n_embd"]
    activation = values["activation_function"]
    values["activation_function"] = SAME_ACTIVATION.get(str(activation), activation)
    if is_count(values["layer_norm_epsilon"]) and values["layer_norm_epsilon"] == 0:
        values["layer_norm_epsilon"] = 0.0
    for name in ("bos_token_id", "eos_token_id"):  # often GPT-2's own, left over in smaller models
        if (
            is_count(values[name])
            and is_count(values["vocab_size"])
            and values[name] >= values["vocab_size"]
        ):
            values[name] = None
    values.update(vocabulary_config(vocabulary))
    size, last = values["vocab_size"], max(vocabulary.tokens, default=0) if vocabulary else 0
    if vocabulary and is_count(size) and 0 < size <= last:
        advice = "the tokenizer and config.json do not belong together"
        raise FormatError(
            path, "vocab_size", f"at least {last + 1}, as the tokenizer has", str(size), advice
        )
    return check_config(path, values)


def vocabulary_config(vocabulary: Vocabulary | None) -> dict[str, Any]:
    return {
        "n_merges": len(vocabulary.merges) if vocabulary else None,
        "n_token_bytes": sum(map(len, vocabulary.tokens.values())) if vocabulary else 0,
        "special_tokens": vocabulary.special if vocabulary else {},
        "add_prefix_space": vocabulary.add_prefix_space if vocabulary else False,
        "pre_tokenizer": PRE_TOKENIZER,
    }


class Checkpoint:
    """The tensors of a checkpoint, from one file or several, by their names without prefix."""

    def __init__(self, files: list[TensorFile]) -> None:
        self.path = files[0].path
        self.tensors: dict[str, tuple[TensorFile, str]] = {}
        for file in files:
            for name in file.tensors:
                short = name[len("transformer.") :] if name.startswith("transformer.") else name
                if short in self.tensors:
                    raise FormatError(
                        file.path, f"tensor {brief(name)}", "each once", "a second one"
                    )
                self.tensors[short] = (file, name)

    def refuse_unknown(self, config: Config) -> None:
        """A block with parts that GPT-2 does not have would run, and be wrong."""
        known = layout(config)
        for short, (file, name) in self.tensors.items():
            is_mask = short.endswith((".attn.bias", ".attn.masked_bias"))
            is_part = short.startswith(("h.", "wte.", "wpe.", "ln_f.", "lm_head."))
            is_tied = short == "lm_head.weight"  # the same numbers once more
            if is_part and short not in known and not (is_mask or is_tied):
                expected = f"the {config.n_layer} blocks of a GPT-2"
                advice = "adapters and other architectures are not supported; merge or remove them"
                raise FormatError(
                    file.path, f"tensor {brief(name)}", expected, "an unknown part", advice
                )

    def matrix(self, name: str, shape: tuple[int, ...]) -> tuple[str, Array] | None:
        """A tensor's dtype and numbers; None for a bias that is not there, which means zeros."""
        if name not in self.tensors:
            if name.endswith(".bias"):
                return None
            raise FormatError(
                self.path, f"tensor {name}", f"a tensor {list(shape)}", "no such tensor"
            )
        file, full = self.tensors[name]
        tensor = file.tensors[full]
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise FormatError(file.path, f"tensor {full}", "F32, F16 or BF16", tensor.dtype)
        if tensor.shape != shape:
            found = brief(list(tensor.shape))
            advice = "the weights and config.json do not belong together"
            raise FormatError(file.path, f"tensor {full}", f"shape {list(shape)}", found, advice)
        return tensor.dtype, file.array(full)


def checkpoint_data(
    config: Config, tensors: Checkpoint, vocabulary: Vocabulary | None
) -> Iterator[bytes]:
    """The data section of the .tg2 file, in the order of `layout`, slab by slab."""
    for name, (dtype, shape) in layout(config).items():
        if dtype != "F32":
            break  # the vocabulary, which comes last
        if len(shape) == 3:
            yield from panel_slabs(*stored_matrix(config, tensors, name, shape))
        else:
            rows = (shape[0],) if name == "wpe.weight" else ()
            columns = vector_length(config, name)
            yield from padded_rows(tensors.matrix(name, (*rows, columns)), shape)
    if vocabulary:
        yield from vocabulary_tables(config, vocabulary).values()


def stored_matrix(
    config: Config, tensors: Checkpoint, name: str, shape: tuple[int, ...]
) -> tuple[str, Array]:
    """A matrix as [inputs, outputs]. Blocks store it so; the embedding and the head transposed."""
    inputs = shape[1]
    if not name.startswith("h."):
        dtype, array = tensors.matrix(name, (config.vocab_size, inputs)) or ("F32", np.empty(0))
        return dtype, array.T
    outputs = vector_length(config, name.replace(".weight", ".bias"))
    return tensors.matrix(name, (inputs, outputs)) or ("F32", np.empty(0))


def to_float32(dtype: str, array: Array) -> Array:
    if dtype == "BF16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def panel_slabs(dtype: str, matrix: Array) -> Iterator[bytes]:
    """A matrix [k, n] as panels [ceil(n/16), k, 16], some panels at a time."""
    k, n = matrix.shape
    step = PANEL * max(1, SLAB // (4 * k * PANEL))
    for start in range(0, n, step):
        part = to_float32(dtype, matrix[:, start : start + step])
        slab = np.zeros((k, round_up(part.shape[1], PANEL)), np.float32)
        slab[:, : part.shape[1]] = part
        yield slab.reshape(k, -1, PANEL).transpose(1, 0, 2).tobytes()  # [panels, k, 16]


def padded_rows(source: tuple[str, Array] | None, shape: tuple[int, ...]) -> Iterator[bytes]:
    """A vector, or a matrix row by row in slabs, with zeros after the end of each row."""
    width = shape[-1]
    if source is None:
        yield bytes(4 * math.prod(shape))
        return
    rows = source[1].reshape(-1, source[1].shape[-1])  # [rows, columns]
    step = max(1, SLAB // (4 * width))
    for start in range(0, len(rows), step):
        part = to_float32(source[0], rows[start : start + step])
        slab = np.zeros((len(part), width), np.float32)
        slab[:, : part.shape[1]] = part
        yield slab.tobytes()


def write_tg2(path: str, config: Config, data: Iterable[bytes], progress: Progress | None) -> None:
    """Write the file beside its place, sync it, check it and move it there: all or nothing."""
    if "\0" in path:
        raise TinyGPT2Error(f"{path!a}: cannot write: a path with a null byte")
    if os.path.isdir(path):
        raise TinyGPT2Error(f"{path}: cannot write: Is a directory")
    if os.path.exists(path) and not os.path.isfile(path):
        raise TinyGPT2Error(f"{path}: cannot write: it is there and not a regular file")
    temporary = f"{path}.{os.getpid()}-{os.urandom(3).hex()}.tmp"
    try:
        with open(temporary, "xb") as file:
            header = tg2_header(config, 0)
            total = len(header) + sum(byte_size(*entry) for entry in layout(config).values())
            file.write(header)
            crc = 0
            for slab in data:
                file.write(slab)
                crc = zlib.crc32(slab, crc)
                if progress:
                    progress("converting", file.tell(), total)
            file.seek(0)
            file.write(tg2_header(config, crc))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.closing(TensorFile(temporary)) as written:
            read_config(written)
        os.replace(temporary, path)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "nothing was changed; free some space or choose another place"
        raise TinyGPT2Error(f"{path}: cannot write: {reason} ({advice})") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def tg2_header(config: Config, crc: int) -> bytes:
    """The header, padded so that the data starts on a cache line. Its length depends on config."""
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": json.dumps(config._asdict()),
            "crc32": f"{crc:08x}",
        }
    }
    offset = 0
    for name, (dtype, shape) in layout(config).items():
        stop = offset + byte_size(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(round_up(8 + len(text), ALIGNMENT) - 8)
    return struct.pack("<Q", len(text)) + text


def vocabulary_tables(config: Config, vocabulary: Vocabulary) -> dict[str, bytes]:
    """The tensors that `Tokenizer` reads, in the order of the layout, padded to their places."""
    words = [vocabulary.tokens.get(token, b"") for token in range(config.vocab_size)]
    offsets = [0]
    for word in words:
        offsets.append(offsets[-1] + len(word))
    byte_ids = {word: token for token, word in reversed(list(enumerate(words))) if len(word) == 1}
    merges = sorted(vocabulary.merges.items())
    tables = {
        "vocab.bytes": b"".join(words),
        "vocab.offsets": struct.pack(f"<{len(offsets)}I", *offsets),
        "vocab.byte_ids": struct.pack(
            "<256I", *(byte_ids.get(bytes([byte]), NO_TOKEN) for byte in range(256))
        ),
        "merges.pairs": b"".join(struct.pack("<Q", a << 32 | b) for (a, b), _ in merges),
        "merges.ranks": b"".join(struct.pack("<I", rank) for _, (rank, _) in merges),
        "merges.results": b"".join(struct.pack("<I", result) for _, (_, result) in merges),
    }
    places = layout(config)
    return {name: table.ljust(byte_size(*places[name]), b"\0") for name, table in tables.items()}


def read_vocabulary(folder: str) -> Vocabulary | None:
    """The byte-level BPE in a checkpoint's folder, or None if it has no tokenizer at all."""
    tokenizer, vocab, merges = (
        os.path.join(folder, name) for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    if os.path.exists(tokenizer):
        return read_tokenizer_json(tokenizer)
    if os.path.exists(vocab) and os.path.exists(merges):
        return read_vocabulary_files(folder, vocab, merges)
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            expected = "a byte-level BPE (vocab.json with merges.txt, or tokenizer.json)"
            advice = "complete it, or take the file away to convert a model that runs on ids"
            raise FormatError(path, "tokenizer", expected, f"only {name}", advice)
    return None


def read_vocabulary_files(folder: str, vocab: str, merges: str) -> Vocabulary:
    """The files of GPT-2 itself and of transformers' slow tokenizers."""
    ids = checked_ids(vocab, read_json(vocab))
    ranks = number_merges(merges, ids, merge_lines(merges))
    path = os.path.join(folder, "tokenizer_config.json")
    options = optional_json(path)
    kind = options.get("tokenizer_class", "GPT2Tokenizer")
    if kind not in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        raise FormatError(path, "tokenizer_class", "GPT2Tokenizer", brief(kind))
    prefix = options.get("add_prefix_space") is True
    return build_vocabulary(vocab, ids, ranks, added_tokens(folder), prefix)


def optional_json(path: str) -> dict[str, Any]:
    return read_json(path) if os.path.exists(path) else {}


def checked_ids(path: str, values: dict[str, Any]) -> dict[str, int]:
    """Texts with token ids, every id checked."""
    for text, token in values.items():
        if not is_token(token, SIZE_LIMITS["vocab_size"]):
            raise FormatError(path, f"token {brief(text)}", "an id", brief(token))
    return values


def text_of(entry: dict[str, Any]) -> str:
    """The text of an added token."""
    if not isinstance(entry["content"], str):
        raise TypeError
    return str(entry["content"])


def added_tokens(folder: str) -> dict[str, int]:
    """Tokens beside the vocabulary, from the two files that have been used for them."""
    older = os.path.join(folder, "added_tokens.json")
    path = os.path.join(folder, "tokenizer_config.json")
    decoder = optional_json(path).get("added_tokens_decoder", {})
    with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):
        newer = {text_of(entry): int(key) for key, entry in decoder.items()}
        return {**checked_ids(older, optional_json(older)), **checked_ids(path, newer)}
    raise FormatError(path, "added_tokens_decoder", "ids with contents", brief(decoder))


def merge_lines(path: str) -> list[str]:
    with contextlib.closing(map_file(path)) as file:
        try:
            lines = file[:].decode("utf-8").replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError as error:
            raise FormatError(path, "content", "UTF-8", str(error)) from None
    return [line for line in lines if line and not line.startswith("#version")]


def read_tokenizer_json(path: str) -> Vocabulary:
    """The one file of transformers' fast tokenizers; refuse all but GPT-2's kind."""
    data = read_json(path)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        found = brief(model.get("type") if isinstance(model, dict) else model)
        raise FormatError(path, "model type", "BPE", found, "only byte-level BPE is supported")
    cutter = data.get("pre_tokenizer") or {}
    steps = cutter.get("pretokenizers") if isinstance(cutter, dict) else None
    if isinstance(steps, list) and len(steps) == 1:
        cutter = steps[0]
    if (
        not isinstance(cutter, dict)
        or cutter.get("type") != "ByteLevel"
        or not cutter.get("use_regex", True)
    ):
        raise FormatError(path, "pre_tokenizer", "ByteLevel with GPT-2's pattern", brief(cutter))
    for name, value in [("normalizer", data.get("normalizer")), *model.items()]:
        if name not in ("type", "vocab", "merges", "unk_token", "fuse_unk") and value:
            raise FormatError(
                path, name, "none", brief(value), "GPT-2's tokenizer has no such step"
            )
    try:
        added = {text_of(entry): entry["id"] for entry in data.get("added_tokens") or ()}
        lines = [line if isinstance(line, str) else " ".join(line) for line in model["merges"]]
    except (TypeError, KeyError):
        found = "entries of another form"
        raise FormatError(path, "content", "added_tokens and merges", found) from None
    if not isinstance(model.get("vocab"), dict):
        raise FormatError(path, "vocab", "an object of ids", brief(model.get("vocab")))
    ids, prefix = checked_ids(path, model["vocab"]), cutter.get("add_prefix_space") is True
    ranks = number_merges(path, ids, lines)
    return build_vocabulary(path, ids, ranks, checked_ids(path, added), prefix)


def number_merges(path: str, ids: dict[str, int], lines: list[str]) -> Merges:
    """Lines of two tokens, the most important first, as ids."""
    merges: Merges = {}
    for rank, line in enumerate(lines):
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= ids.keys():
            expected = "two tokens that make a third"
            advice = "the merges and the vocabulary do not belong together"
            raise FormatError(path, f"merge {rank}", expected, brief(line), advice)
        merges[ids[left], ids[right]] = (rank, ids[left + right])
    return merges


def build_vocabulary(
    path: str, ids: dict[str, int], merges: Merges, special: dict[str, int], prefix: bool
) -> Vocabulary:
    """Turn the letters of the vocabulary's file into the bytes that they stand for."""
    if END_OF_TEXT in ids:
        special = {END_OF_TEXT: ids[END_OF_TEXT], **special}
    merged = {token for pair, (_, result) in merges.items() for token in (*pair, result)}
    alphabet = byte_alphabet()
    tokens = {token: text.encode("utf-8", "replace") for text, token in special.items()}
    for text, token in ids.items():
        if text in special:
            continue
        if token in tokens:
            raise FormatError(path, f"token {brief(text)}", "an id of its own", str(token))
        if set(text) <= alphabet.keys():
            tokens[token] = bytes(alphabet[letter] for letter in text)
        elif token in merged:
            raise FormatError(path, f"token {brief(text)}", "letters of byte-level BPE", "others")
        else:
            tokens[token] = text.encode("utf-8", "replace")
    return Vocabulary(tokens, merges, special, prefix)


def byte_alphabet() -> dict[str, int]:
    """The letters by which GPT-2's files write bytes: a visible Latin-1 character stands for
    itself, and the other bytes, in order, for the characters from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    letters.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return letters


# The hub's files. Each request first asks (HEAD) for a file's size and hash, then fetches what is
# missing of it; a download that broke off goes on where it ended.

HUB = "https://huggingface.co"
ATTEMPTS, PAUSE, TIMEOUT = 5, 0.4, 30  # tries; seconds before the second; seconds of silence
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
)
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


class RemoteFile(NamedTuple):
    url: str
    size: int | None
    tag: str  # sha256 of the content, or its git hash, or whatever else the server calls it


def download(
    name: str, out: Path, revision: str = "main", progress: Progress | None = None
) -> None:
    """Fetch a checkpoint from the Hugging Face hub and convert it to a .tg2 file.

    Files in the hub's own cache are used from there. HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE,
    HF_HOME and HF_HUB_CACHE are honoured. A broken download is kept beside `out` and resumed by
    the next call. Raises `DownloadError`, or `FormatError` if what came is not a GPT-2.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) or ".." in name:
        raise InputError(f"model name: expected 'gpt2' or 'owner/name', found {brief(name)}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision, re.ASCII) or ".." in revision:
        raise InputError(f"revision: expected a branch, tag or commit, found {brief(revision)}")
    if not re.fullmatch("[!-~]*", os.environ.get("HF_TOKEN", "").strip()):
        raise DownloadError("HF_TOKEN: expected letters, digits and signs, found others")
    cached = cached_snapshot(name, revision)
    if cached:
        convert(cached, out, progress)
        return
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        advice = "unset it, or fill the cache first"
        raise DownloadError(
            f"{name}: HF_HUB_OFFLINE is set and it is not in the hub cache ({advice})"
        )
    label = f"{name}@{revision}".replace("/", "--")
    folder = f"{os.fsdecode(out)}.{label}.download"
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    base = f"{endpoint}/{name}/resolve/{revision.replace('/', '%2F')}/"
    try:
        os.makedirs(folder, exist_ok=True)
        fetched = fetch_checkpoint(base, folder, progress)
    except OSError as error:
        advice = f"what arrived is kept in {folder}; mend this and run the same again"
        raise DownloadError(f"{name}: {error.strerror or error} ({advice})") from None
    convert(folder, out, progress)
    with contextlib.suppress(OSError):
        for file in fetched:
            os.unlink(os.path.join(folder, file))
        os.rmdir(folder)


def cached_snapshot(name: str, revision: str) -> str | None:
    """The folder of a model in the hub's cache, if the model is there and whole."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    for owner in (name, "openai-community/" + name):  # where the hub moved the first models
        repository = os.path.join(cache, "models--" + owner.replace("/", "--"))
        commit = revision
        reference = os.path.join(repository, "refs", revision)
        with contextlib.suppress(OSError, ValueError), open(reference, encoding="utf-8") as file:
            commit = file.read().strip()
        folder = os.path.join(repository, "snapshots", commit)
        if is_complete(folder):
            return folder
    return None


def is_complete(folder: str) -> bool:
    """Whether a folder holds all files that a conversion needs; a half-fetched one does not."""

    def has(name: str) -> bool:
        return os.path.exists(os.path.join(folder, name))

    has_tokenizer = has("tokenizer.json") or (has("vocab.json") and has("merges.txt"))
    if not has("config.json") or not has_tokenizer:
        return False
    with contextlib.suppress(FormatError):
        return all(map(os.path.exists, find_checkpoint(folder)[1]))
    return False


def fetch_checkpoint(base: str, folder: str, progress: Progress | None) -> list[str]:
    """Fetch what `convert` needs: the tokenizer, and the weights in one file or in shards."""
    import urllib.parse

    fetched: list[str] = []

    def fetch(name: str, optional: bool = False) -> bool:
        url = base + urllib.parse.quote(name)
        found = fetch_file(url, os.path.join(folder, name), optional, progress)
        if found:
            fetched.append(name)
        return found

    fetch("config.json")
    checkpoint_config(os.path.join(folder, "config.json"), None)  # before the weights are fetched
    for name in TOKENIZER_FILES:
        fetch(name, optional=True)
    if not fetch(WEIGHTS, optional=True):
        fetch(WEIGHTS_INDEX)
        for shard in find_checkpoint(folder)[1]:
            fetch(os.path.basename(shard))
    return fetched


def fetch_file(url: str, path: str, optional: bool, progress: Progress | None) -> bool:
    """Fetch one file and check its size and hash; False if it is optional and not there."""
    size: int | None = None
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE * (2**attempt - 1))
        try:
            remote = ask(url)
            size = remote.size
            if os.path.exists(path) and matches(remote, path):  # from an interrupted call
                return True
            part = f"{path}.{re.sub('[^0-9A-Za-z]', '', remote.tag)[:64]}.part"
            transfer(remote, part, progress)
            if not matches(remote, part):
                os.unlink(part)
                advice = "what came was deleted; try again"
                raise DownloadError(
                    f"{url}: expected the hash {remote.tag}, found another ({advice})"
                )
            os.replace(part, path)
            return True
        except ConnectionError as error:
            failure = error
        except FileNotFoundError:
            if optional:
                with contextlib.suppress(OSError):
                    os.unlink(path)  # of another revision
                return False
            advice = "check the name; a private model needs HF_TOKEN"
            raise DownloadError(f"{url}: there is no such file ({advice})") from None
    kept = f"{kept_bytes(path)} of {size or 'unknown'} bytes are here"
    advice = "run the same again to go on from there"
    raise DownloadError(f"{url}: {failure} after {ATTEMPTS} attempts; {kept} ({advice})")


def kept_bytes(path: str) -> int:
    """How much of a file an unfinished download has left."""
    folder, name = os.path.split(path)
    parts = [e for e in os.listdir(folder) if e.startswith(name + ".") and e.endswith(".part")]
    return max((os.path.getsize(os.path.join(folder, part)) for part in parts), default=0)


@contextlib.contextmanager
def request(url: str, method: str, offset: int = 0) -> Iterator[Any]:
    """Open a URL, from a byte offset on.

    The token goes to the host that it is for and to no other. Errors that a second try may mend
    are ConnectionError, a missing file is FileNotFoundError, all others are DownloadError.
    """
    import http.client
    import socket  # its `timeout` is TimeoutError only from Python 3.10 on
    import urllib.error
    import urllib.parse
    import urllib.request

    base = urllib.request.HTTPRedirectHandler

    def answer_or_follow(handler: Any, old: Any, body: Any, code: int, *rest: Any) -> Any:
        """The hub says all about a large file in its redirect; the storage may refuse a HEAD."""
        if method == "HEAD" and rest[1].get("X-Linked-Etag"):
            return body
        return base.http_error_302(handler, old, body, code, *rest)

    def follow(handler: Any, old: Any, body: Any, code: int, *rest: Any) -> Any:
        """Go on with the same method, and with the token only where it belongs."""
        new = base.redirect_request(handler, old, body, code, *rest)
        if new is not None:
            new.method = method
            if urllib.parse.urlsplit(rest[2])[:2] != urllib.parse.urlsplit(url)[:2]:
                new.remove_header("Authorization")
        return new

    names = [f"http_error_{code}" for code in (301, 302, 303, 307)]
    steps = {**dict.fromkeys(names, answer_or_follow), "redirect_request": follow}
    redirects = type("Redirects", (base,), steps)
    headers = {"User-Agent": f"tinygpt2/{__version__}", "Accept-Encoding": "identity"}
    token = os.environ.get("HF_TOKEN", "").strip()
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        opener = urllib.request.build_opener(redirects)
        query = urllib.request.Request(url, headers=headers, method=method)
        with opener.open(query, timeout=TIMEOUT) as response:
            yield response
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            raise FileNotFoundError(url) from None
        if error.code in (408, 429) or error.code >= 500:
            raise ConnectionError(f"the server answered {error.code} {error.reason}") from None
        found = f"{url}: the server answered {error.code} {error.reason}"
        advice = "check the name; a private or gated model needs HF_TOKEN"
        raise DownloadError(f"{found} ({advice})") from None
    except (urllib.error.URLError, http.client.HTTPException, socket.timeout) as error:
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(f"no answer or a broken one: {reason}") from None
    except ValueError as error:  # an HF_ENDPOINT that is no URL
        raise DownloadError(f"{url}: {error} (check HF_ENDPOINT)") from None


def ask(url: str) -> RemoteFile:
    """A file's size and hash."""
    with request(url, "HEAD") as response:
        headers = response.headers
        size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
        tag = headers.get("X-Linked-Etag") or headers.get("ETag") or "unknown"
    tag = tag[2:] if tag.startswith("W/") else tag
    return RemoteFile(url, int(size) if size.isdecimal() else None, tag.strip('"'))


def transfer(remote: RemoteFile, part: str, progress: Progress | None) -> None:
    """Fetch into `part` what it does not hold yet."""
    resumable = remote.size is not None and os.path.exists(part)
    done = os.path.getsize(part) if resumable else 0
    if done and done == remote.size:
        return
    with request(remote.url, "GET", done) as response:
        resumed = done and response.status == 206
        with open(part, "ab" if resumed else "wb") as file:
            done = done if resumed else 0
            for block in iter(lambda: response.read1(1 << 20), b""):
                done += len(block)
                if done > (remote.size or MAX_HEADER):
                    raise DownloadError(
                        f"{remote.url}: more than the announced {remote.size} bytes came"
                    )
                file.write(block)
                if progress and remote.size:
                    progress(os.path.basename(remote.url), done, remote.size)
    if remote.size is not None and done < remote.size:
        raise ConnectionError(f"the connection ended at {done} of {remote.size} bytes")


def matches(remote: RemoteFile, path: str) -> bool:
    """Whether a file has the server's size and hash: sha256 for large files, git's for small."""
    import hashlib

    size = os.path.getsize(path)
    if remote.size is not None and size != remote.size:
        return False
    if len(remote.tag) == 64:
        digest = hashlib.sha256()
    elif len(remote.tag) == 40:
        digest = hashlib.sha1(b"blob %d\0" % size)
    else:
        return True
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest() == remote.tag


# ------------------------------------------------------------------------------------------------
# 9. Command line
# ------------------------------------------------------------------------------------------------


EXAMPLES = """examples:
  python tinygpt2.py --prompt "Once upon a time"
  python tinygpt2.py --prompt - --max-tokens 50 --seed 1 < prompt.txt
  python tinygpt2.py download gpt2 -o gpt2.tg2
  python tinygpt2.py --model gpt2.tg2 --prompt "Alan Turing" --temperature 0

Without a prompt, at a terminal, it asks for one: Ctrl-C stops an answer, an empty line continues
it, Ctrl-D leaves. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code; errors are one line on standard error."""
    if sys.stderr is None:  # closed: `print` would take standard output in its place
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        if sys.stdout is None:
            raise OSError("standard output is closed")
        code = run_arguments(arguments)
        sys.stdout.flush()
        return code
    except TinyGPT2Error as error:
        text = re.sub(r"^option (\w+)", lambda m: flag_of(m[1]), str(error))
        print(f"tinygpt2: error: {text}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads the answer has had enough of it
        drop_output()
        return 0
    except (OSError, MemoryError) as error:
        drop_output()
        print(f"tinygpt2: error: {str(error) or 'out of memory'}", file=sys.stderr)
        return 1


def flag_of(option: str) -> str:
    return "--max-tokens" if option == "max_new_tokens" else "--" + option.replace("_", "-")


def drop_output() -> None:
    """What cannot be written must not be tried again when Python ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_arguments(arguments: Sequence[str] | None) -> int:
    try:
        options = build_parser().parse_args(arguments)
        options.run(options)
        return 0
    except SystemExit as leave:  # argparse's: 0 after --help, 2 after wrong usage
        return leave.code if isinstance(leave.code, int) else 2


def build_parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="tinygpt2",
        description="GPT-2 in one file: prints the text that follows a prompt.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tinygpt2 {__version__}")
    add_model_options(parser)
    add_prompt_options(parser)
    default = Options()
    number = {
        "--max-tokens": (int, "max_new_tokens", "tokens to generate at most"),
        "--temperature": (float, "temperature", "0 always takes the most probable token"),
        "--top-k": (int, "top_k", "choose among the k most probable tokens; 0: all"),
        "--top-p": (float, "top_p", "choose among the fewest that hold this much probability"),
        "--min-p": (float, "min_p", "leave out tokens below this fraction of the best one"),
        "--repetition-penalty": (float, "repetition_penalty", "above 1 avoids what was said"),
        "--seed": (int, "seed", "the same seed gives the same text"),
    }
    for flag, (kind, name, text) in number.items():
        value = getattr(default, name)
        shown = "a fresh one" if value is None else value
        help_text = f"{text} (default: {shown})"
        parser.add_argument(flag, type=kind, dest=name, default=value, metavar="N", help=help_text)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text"
    )
    parser.add_argument(
        "--stats", action="store_true", help="print speed and memory to standard error"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_generate)
    add_commands(parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="FILE", help="a .tg2 file (default: the one that comes along)"
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, help="what computes (default: the fastest there)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="processors to use (default: all)")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--prompt", metavar="TEXT", help="the text to continue; - reads standard input"
    )
    group.add_argument(
        "--ids", metavar="IDS", help='the same as token ids: "15496 995"; prints ids'
    )


def add_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", prog="tinygpt2")

    import argparse

    def add(
        name: str, run: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text, argument_default=argparse.SUPPRESS
        )
        command.set_defaults(run=run)
        return command

    command = add("convert", run_convert, "make a .tg2 file from a checkpoint of transformers")
    command.add_argument("source", help="its folder, or a .safetensors file beside its config.json")
    command.add_argument(
        "-o", "--out", required=True, metavar="FILE", help="the .tg2 file to write"
    )
    command = add(
        "download", run_download, "fetch a checkpoint from the Hugging Face hub and convert it"
    )
    command.add_argument("name", help="its name there, as gpt2 or owner/name")
    command.add_argument(
        "-o",
        "--out",
        default=None,
        metavar="FILE",
        help="the .tg2 file to write (default: NAME.tg2)",
    )
    command.add_argument(
        "--revision", default="main", help="a branch, tag or commit (default: main)"
    )
    command = add("score", run_score, "say how well the model predicts a text")
    add_model_options(command)
    add_prompt_options(command)
    command.add_argument(
        "--json", action="store_true", help="print one JSON object, with every token"
    )
    command = add("info", run_info, "show what a .tg2 file holds")
    command.add_argument("file", nargs="?", default=None, help="the same as --model")
    command.add_argument(
        "--model", metavar="FILE", help="a .tg2 file (default: the one that comes along)"
    )
    command.add_argument(
        "--verify", action="store_true", default=False, help="check its checksum and vocabulary too"
    )
    command.add_argument(
        "--system", action="store_true", default=False, help="show and check what computes here"
    )
    command = add("bench", run_bench, "measure the speed of a model")
    add_model_options(command)
    command.add_argument(
        "--max-tokens", type=int, default=32, metavar="N", help="to decode (default: 32)"
    )
    command.add_argument(
        "--runs", type=int, default=5, metavar="N", help="take the median (default: 5)"
    )


def load_model(options: argparse.Namespace) -> Model:
    return load(options.model, backend=options.backend, threads=options.threads)


def read_prompt(options: argparse.Namespace) -> Prompt | None:
    """The prompt that the options name, as text or ids; None if they name none."""
    text: str | None = options.prompt if options.ids is None else options.ids
    if text == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed")
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
        text = re.sub(r"\r?\n\Z", "", text)  # the one that ends a file or an echo
    if text is None or options.ids is None:
        return text and argument_text(text)
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"--ids: expected whole numbers, found {brief(text)}") from None


def argument_text(text: str) -> str:
    """An argument as UTF-8, whatever the locale took its bytes for."""
    with contextlib.suppress(UnicodeEncodeError):
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return mend_surrogates(text)


def run_generate(options: argparse.Namespace) -> None:
    options.stop = [argument_text(text) for text in options.stop]
    prompt = read_prompt(options)
    if prompt is None and not (sys.stdin and sys.stdin.isatty()):
        raise InputError("no prompt: pass --prompt TEXT, or --prompt - to read standard input")
    choices = {name: getattr(options, name) for name in Options._fields if hasattr(options, name)}
    with load_model(options) as model:
        check_options(choices, model.config.vocab_size)
        if prompt is None:
            interact(model, choices)
        else:
            with model.session() as session:
                answer(session, prompt, choices, options)


def answer(
    session: Session, prompt: Prompt, choices: dict[str, Any], options: argparse.Namespace
) -> None:
    """Print the answer as it comes, or as JSON at its end; then the figures."""
    as_text = options.ids is None
    ids: list[int] = []
    pieces: list[str] = []
    events = session.events(as_text or bool(options.stop), choices)
    times = [time.perf_counter()]
    session.feed(prompt)
    n_prompt = len(session.tokens)
    for token, piece in events:
        if token is not None:
            times.append(time.perf_counter())
            ids.append(token)
        pieces.append(piece)
        if not options.json:
            print(piece if as_text else "" if token is None else f"{token} ", end="", flush=True)
    figures = speed(n_prompt, times)
    if options.json:
        result = {"text": "".join(pieces) if as_text else None, "ids": ids}
        outcome = {"finish_reason": session.finish_reason, "seed": session.seed}
        print(json.dumps({**result, **outcome, "figures": figures}))
    else:
        print()
    if session.finish_reason == "context":
        room = session.model.config.n_positions
        print(f"tinygpt2: stopped: all {room} positions of the context are used", file=sys.stderr)
    if options.stats:
        print("\n".join(f"{name}: {value}" for name, value in figures.items()), file=sys.stderr)


def speed(n_prompt: int, times: list[float]) -> dict[str, Any]:
    """Figures of an answer, from when it started and when each of its tokens was there."""
    decoding = times[-1] - times[1] if len(times) > 2 else 0.0
    return {
        "prompt_tokens": n_prompt,
        "new_tokens": len(times) - 1,
        "seconds_to_first_token": round(times[1] - times[0], 4) if len(times) > 1 else None,
        "tokens_per_second": round((len(times) - 2) / decoding, 1) if decoding else None,
        "peak_memory_mb": peak_memory(),
    }


def peak_memory() -> float | None:
    """The most memory that this process has held, mapped weights included, in MB."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def interact(model: Model, choices: dict[str, Any]) -> None:
    """Ask for prompts at the terminal until Ctrl-D. An empty line continues the last answer."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` line editing and a history)
    print(f"tinygpt2 {__version__}: Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    session = model.session()
    while True:
        try:
            prompt = input("> ")
            if prompt:
                fresh = model.session()
                fresh.feed(prompt)
                session.close()
                session = fresh
            for piece in session.stream(**choices):
                print(piece, end="", flush=True)
            print()
            if session.finish_reason == "context":
                print("tinygpt2: stopped: the context is full", file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except InputError as error:
            print(f"tinygpt2: error: {error}", file=sys.stderr)
        except EOFError:
            print()
            return


def progress_bar() -> Progress | None:
    """A function that draws a bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        return None
    last = [0.0]

    def draw(label: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - last[0] > 0.1 or done >= total:
            last[0] = now
            bar = "#" * (30 * done // max(total, 1))
            end = "\n" if done >= total else ""
            print(
                f"\r{label} [{bar:30}] {100 * done // max(total, 1):3}%",
                end=end,
                file=sys.stderr,
                flush=True,
            )

    return draw


def run_convert(options: argparse.Namespace) -> None:
    convert(options.source, options.out, progress_bar())


def run_download(options: argparse.Namespace) -> None:
    out = options.out or options.name.rpartition("/")[2] + ".tg2"
    download(options.name, out, options.revision, progress_bar())


def run_score(options: argparse.Namespace) -> None:
    prompt = read_prompt(options)
    if prompt is None:
        raise InputError("no text: pass --prompt TEXT, or --prompt - to read standard input")
    with load_model(options) as model:
        score = model.score(prompt, progress_bar())
    values = {
        "tokens": len(score.ids),
        "logprob": score.total,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
    figures = {name: value if math.isfinite(value) else None for name, value in values.items()}
    if options.json:
        print(json.dumps({**figures, "ids": score.ids, "logprobs": score.logprobs}))
    else:
        print("\n".join(f"{name}: {value}" for name, value in figures.items()))


def run_info(options: argparse.Namespace) -> None:
    """Print a file's configuration and tensors, and check its content if asked to."""
    if options.system:
        print_table(system_facts())
        return
    path = options.file or options.model or default_model()
    with contextlib.closing(TensorFile(path)) as file:
        config = read_config(file)
        if options.verify:
            verify(file, config)
        print_table(
            [("file", file.path), ("size", f"{len(file.map):,} bytes"), *file_facts(file, config)]
        )
        print()
        rows = [("tensor", "dtype", "shape", "bytes")]
        for name, tensor in file.tensors.items():
            shape = " x ".join(map(str, tensor.shape))
            rows.append((name, tensor.dtype, shape, f"{tensor.stop - tensor.start:,}"))
        print_table(rows)


def system_facts() -> list[tuple[str, str]]:
    """What computes on this machine, where it was looked for, and whether it computes right."""
    import platform

    facts = [
        ("tinygpt2", f"{__version__}, {os.path.abspath(__file__)}"),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("processors", str(available_processors())),
        ("numpy", numpy_version()),
    ]
    path = library_path()
    if path is None:
        looked = os.path.join(os.path.dirname(os.path.abspath(__file__)), LIBRARY)
        return [*facts, ("kernels", f"none: `python build.py` makes {looked}")]
    with load(backend="c") as model:
        backend: Any = model.backend
        facts += [
            ("kernels", path),
            ("sha256", sha256(path)),
            ("instruction set", f"{backend.isa} (TINYGPT2_ISA: {backend.isas()})"),
            ("threads", f"{backend.threads} (TINYGPT2_THREADS)"),
            ("c against numpy", compare_backends(model)),
        ]
    return facts


def sha256(path: str) -> str:
    import hashlib

    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def numpy_version() -> str:
    try:
        import_numpy()
    except TinyGPT2Error:
        return "none"
    return str(np.__version__)


def compare_backends(model: Model) -> str:
    """The largest difference between the logits of C and NumPy. 1e-4 is what float32 allows."""
    if numpy_version() == "none":
        return "not checked, as NumPy is not installed"
    ids = list(range(min(64, model.config.n_positions, model.config.vocab_size)))
    with load(model.path, backend="numpy") as reference:
        expected, found = reference.logits(ids), model.logits(ids)
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= 1e-4:
        raise TinyGPT2Error(f"kernels: off by {difference:.0e} of the largest logit; {REBUILD}")
    return f"right: logits within {difference:.0e} of the largest one"


def file_facts(file: TensorFile, config: Config) -> list[tuple[str, str]]:
    weights = [t for t in file.tensors.values() if t.dtype == "F32"]
    facts = [
        ("format", f"{file.metadata['format']} {file.metadata['format_version']}"),
        ("crc32", file.metadata.get("crc32", "none")),
        ("weights", f"{sum(math.prod(t.shape) for t in weights):,} float32, padding included"),
    ]
    return facts + [(name, str(value)) for name, value in config._asdict().items()]


def verify(file: TensorFile, config: Config) -> None:
    """Raise `FormatError` unless the data has its checksum and the merges make their tokens."""
    expected, found = file.metadata.get("crc32", "none"), file.checksum()
    if found != expected:
        raise FormatError(file.path, "data", f"the CRC-32 {brief(expected)}", found)
    if config.n_merges is not None:
        Tokenizer(file, config).verify(file.path)
    print("verified: the checksum and the vocabulary are right", file=sys.stderr)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def run_bench(options: argparse.Namespace) -> None:
    """Measure prompts and decoding; the median of the runs, in tokens per second."""
    for name in ("max_tokens", "runs"):
        if getattr(options, name) < 1:
            raise InputError(f"{flag_of(name)}: expected a number from 1")
    with load_model(options) as model:
        room = model.config.n_positions
        n_new = max(1, min(options.max_tokens, room // 2))
        prompt = [i % model.config.vocab_size for i in range(min(512, room - n_new))]
        prompts, decodes = [], []
        for _ in range(max(1, options.runs)):
            with model.session() as session:
                started = time.perf_counter()
                session.feed(prompt)
                fed = time.perf_counter()
                for token in range(n_new):
                    session.feed([token % model.config.vocab_size])
                prompts.append(len(prompt) / (fed - started))
                decodes.append(n_new / (time.perf_counter() - fed))
        name = model.backend.name
    print(f"prompt of {len(prompt)} tokens: {median(prompts):.1f} tokens/s ({name})")
    print(f"decoding after it: {median(decodes):.1f} tokens/s ({name})")


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    sys.exit(main())
