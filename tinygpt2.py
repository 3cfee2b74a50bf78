"""tinygpt2: GPT-2 inference in one file that you copy into your project.

    import tinygpt2

    model = tinygpt2.load()                       # the default model, or the path of a .tg2 file
    print(model.generate("Once upon a time", max_new_tokens=50, temperature=0.8, seed=1))

or ``python tinygpt2.py --prompt "Once upon a time"``; ``--help`` lists the rest.

The file reads from top to bottom as the story of one prompt:

    1. errors        one family of exceptions; each says what, where, expected, found, what to do
    2. the file      safetensors: a header in JSON, then the numbers; mapped, never copied
    3. the model     its configuration, and the tensors that a .tg2 file must hold
    4. tokens        text to token ids and back: byte-level byte-pair encoding; streamed text
    5. forward       token ids to logits: the transformer itself, in NumPy
    6. choice        logits to the next token: filters, and a draw that depends on seed and place
    7. text          sessions and models: the loop that feeds each choice back

The story ends there. What follows makes it fast and usable from a terminal:

    8. kernels       the same forward pass and choice in C (kernels.c), through ctypes
    9. processors    how many threads to use
    10. toy          a model of some kilobytes for the tests of other programs
    11. command line

Importing this module does nothing. Where `python build.py` has built the kernels, a model runs in
C, and NumPy is imported only for the arrays that some methods return. Conversion of checkpoints
lives in vendor/convert.py, the default model in vendor/tales.tg2.

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019);
Vaswani et al., "Attention Is All You Need" (2017). Names are those of GPT-2's checkpoints.

SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import errno
import heapq
import importlib
import itertools
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
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Callable,
    Literal,
    NamedTuple,
    NoReturn,
    Optional,
    Protocol,
    SupportsFloat,
    SupportsIndex,
    TextIO,
    Union,
)

if TYPE_CHECKING:
    import argparse
    from types import ModuleType

    import numpy
    import numpy.typing

    FloatArray = numpy.typing.NDArray[numpy.float32]
    Parser = argparse.ArgumentParser
    Arguments = argparse.Namespace

# For hints that are read at run time, when NumPy may be absent.
NOT_IMPORTED = ("FloatArray", "ModuleType", "Parser", "Arguments")
with contextlib.suppress(KeyError):  # a program may execute this file without registering it
    vars(sys.modules[__name__]).update(dict.fromkeys(NOT_IMPORTED, Any))

Array = Any  # a NumPy array inside this module; its shape stands in the comments
Path = Union[str, "os.PathLike[str]"]
Prompt = Union[str, Iterable[SupportsIndex]]  # text, or token ids
Allowed = Union[Iterable[SupportsIndex], Callable[[list[int]], Iterable[SupportsIndex]]]
Number = Union[SupportsFloat, SupportsIndex]  # Python's numbers and NumPy's
Progress = Callable[[str, int, int], None]  # called with a label, how much is done, how much in all

__version__ = "0.2.0"
__all__ = [
    "Answer",
    "Config",
    "ConstraintError",
    "ContextError",
    "DownloadError",
    "FormatError",
    "InputError",
    "MissingFileError",
    "Model",
    "NumericError",
    "Options",
    "Ranked",
    "Result",
    "Score",
    "Session",
    "StateError",
    "Timings",
    "TinyGPT2Error",
    "convert",
    "download",
    "load",
    "toy",
]


# ------------------------------------------------------------------------------------------------
# 1. Errors
# ------------------------------------------------------------------------------------------------


class TinyGPT2Error(Exception, metaclass=type):  # noqa: UP050 (for MissingFileError)
    """The base of every error that this module raises on purpose."""


class FormatError(TinyGPT2Error):
    """A file is not what it should be. `path` and `field` say which file and which part of it."""

    def __init__(self, path: str, field: str, expected: str, found: str, advice: str = "") -> None:
        super().__init__(path, field, expected, found, advice)  # the arguments that pickle passes
        self.path = path
        self.field = field
        self.expected = expected
        self.found = found
        self.advice = advice or "the file is damaged or of another kind; convert or download it"

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.path, self.field, self.expected, self.found, self.advice)
        return type(self), arguments, vars(self)  # with notes, and what others have attached

    def __str__(self) -> str:
        place = f"{show_path(self.path)}: {self.field}"
        return f"{place}: expected {self.expected}, found {self.found} ({self.advice})"


class MissingFileError(FormatError, FileNotFoundError):
    """A file is not there. It is also Python's own FileNotFoundError, with its attributes.

    (mypyc's native classes cannot have such a second base.)
    """

    def __init__(self, path: str, field: str, expected: str, found: str, advice: str = "") -> None:
        super().__init__(path, field, expected, found, advice)
        self.args = (path, field, expected, found, advice)
        self.errno, self.strerror, self.filename = errno.ENOENT, found, path
        self.filename2 = None


class InputError(TinyGPT2Error, ValueError):
    """An argument, an option or a text that the model cannot take."""


class ContextError(InputError):
    """More tokens than the model has positions."""


class StateError(TinyGPT2Error):
    """A session or model that is closed, or that two callers use at the same time."""


class ConstraintError(InputError):
    """The constraints of an answer leave no token. `text` and `ids` are the answer so far."""

    def __init__(self, message: str, text: str = "", ids: Sequence[int] = ()) -> None:
        super().__init__(message, text, ids)
        self.message = message
        self.text = text
        self.ids = list(ids)

    def __str__(self) -> str:
        return self.message


class NumericError(TinyGPT2Error):
    """The model computed NaN or infinity: its weights are damaged or were never trained."""


class DownloadError(TinyGPT2Error):
    """A file could not be fetched from the hub."""


def quote(value: object) -> str:
    """`value` as an error message shows it: in ASCII, and at most a line."""
    try:
        text = " ".join(ascii(value).split("\n"))
    except Exception:  # an integer of thousands of digits, or an object that cannot show itself
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:60] + f"... ({len(text)} characters)"


def show_path(path: str) -> str:
    """A path as an error message shows it: escaped where a terminal could not print it."""
    return path if path.isprintable() else ascii(path)


def path_text(path: object, what: str) -> str:
    """A path as a string; `what` names the argument in the error."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"{what}: expected a path, found {quote(path)}")
    return os.fsdecode(path)


def note(text: str, level: str = "WARNING") -> None:
    """Tell those who read the log "tinygpt2" something that is not an error. Nothing is printed."""
    import logging

    logger = logging.getLogger("tinygpt2")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # or else Python prints warnings by itself
    logger.log(logging.getLevelName(level), "%s", text)


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


ARRAY_CODES = {  # NumPy's names of the types that are read as arrays
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # its 16 bits
    "U8": "u1",
    "BOOL": "?",
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

    Files that `write_tensors` wrote have two checksums in their metadata: "crc32" of the data, and
    "header_crc32" of the header, which is checked here.

    Nothing in the file is trusted: every failure is a `FormatError`, raised before any memory is
    allocated for what the header claims.
    """

    def __init__(self, path: Path, content: Optional[mmap.mmap] = None) -> None:
        """Open the file `path`, or use `content` under this name."""
        self.path = path_text(path, "path")
        self.map = content or map_file(self.path)
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
        code = ARRAY_CODES[tensor.dtype]
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


CONVERT = "`python tinygpt2.py convert` makes a .tg2 file from a checkpoint"
SAVE_AGAIN = "load it with what wrote it, save it as safetensors with its config.json, convert that"
PICKLES = (
    (rb"PK\x03\x04", "a zip archive, as PyTorch writes it", CONVERT),
    (rb"\x80[\x02-\x05]", "a pickle, as PyTorch writes it", CONVERT),
)
LLMC = ((rb"\xc6\xd74\x01", "a checkpoint of llm.c", CONVERT),)
OTHER_KINDS = (  # how files of other kinds begin, what they are, and what to do
    (rb"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull` in its folder"),
    (
        rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)",
        "a web page, saved in its place",
        "fetch the file itself; `python tinygpt2.py download` does it",
    ),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf", "a compressed file", "unpack it"),
    (rb".{257}ustar", "a tar archive", "unpack it"),
    (rb"PK\x03\x04.{26}\S{1,99}\.npy", "an archive of NumPy", SAVE_AGAIN),
    *PICKLES,
    *LLMC,
    (rb"GGUF|tjgg|lmgg|fmgg", "a file of llama.cpp", SAVE_AGAIN),
    (rb"\x89HDF\r\n", "an HDF5 file, as Keras writes it", SAVE_AGAIN),
    (rb"\x93NUMPY", "an array of NumPy", SAVE_AGAIN),
    (rb"[\x81-\x8f]\xab?(transformer|.params)", "weights of Flax", SAVE_AGAIN),
    (rb"\x08[\x03-\x1f][\x12\x1a\x22\x3a]", "a model of ONNX", SAVE_AGAIN),
    (rb"\x08\x01\x12|model_checkpoint_path:", "a part of a TensorFlow model", SAVE_AGAIN),
)


def map_file(path: str, expected: str = "a .tg2 or .safetensors file") -> mmap.mmap:
    """Map a regular, non-empty file read-only, unless its first bytes show that it is another."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a directory cannot be mapped
            found, advice = kind_of(status.st_mode), f"name a file; {CONVERT}"
            raise FormatError(path, "file", "a regular file", found, advice)
        if status.st_size == 0:
            raise FormatError(path, "file", "some content", "an empty file")
        with open(path, "rb") as file:
            refuse_other_kinds(path, expected, file.read(512))
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise missing_file(path, str(error.strerror)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or an emptied file
        reason = getattr(error, "strerror", None) or str(error)
        advice = "check the path and its permissions"
        raise FormatError(path, "file", "a readable file", reason, advice) from None


def refuse_other_kinds(path: str, expected: str, head: bytes) -> None:
    """`head` is how the file begins."""
    kind = other_kind(head)
    if kind is not None:
        _, found, advice = kind
        raise FormatError(path, "file", expected, found, advice)


def other_kind(head: bytes) -> Optional[tuple[bytes, str, str]]:
    """The entry of OTHER_KINDS for a file that begins so, or None."""
    if head[4:9] == b"\0\0\0\0{":  # safetensors, whatever the length of its header looks like
        return None
    for kind in OTHER_KINDS:
        if re.match(kind[0], head, re.DOTALL | re.IGNORECASE):
            return kind
    return None


def missing_file(path: str, found: str) -> MissingFileError:
    """A path that leads nowhere. The name of a model on the hub is no path."""
    advice = "check the path"
    if os.path.islink(path):
        found, advice = "a link to a file that is not there", "copy the file, not the link"
    elif is_hub_name(path):
        advice = f"check the path; `python tinygpt2.py download {path}` fetches a model of the hub"
    return MissingFileError(path, "file", "a readable file", found, advice)


def is_hub_name(path: str) -> bool:
    """Whether this could be "gpt2" or "owner/name", and hardly the path of a file."""
    if os.path.isdir(os.path.dirname(path)) or re.search(r"\.[a-z]\w+$", path):
        return False
    return re.fullmatch(r"([\w-]+/)?[\w-][\w.-]*", path, re.ASCII) is not None


def kind_of(mode: int) -> str:
    return "a directory" if stat.S_ISDIR(mode) else "a device, pipe or socket"


Data = Union[bytes, mmap.mmap]


def parse_header(path: str, data: Data) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Check a safetensors header; return its tensors, its metadata and where the data starts."""
    start = 8 + header_length(path, data)
    header = parse_json_object(path, "header", bytes(data[8:start]))
    metadata = header.pop("__metadata__", {})
    if not is_text_map(metadata):
        raise FormatError(path, "__metadata__", "an object of strings", quote(metadata))
    if HEADER_CRC in metadata:
        check_header_crc(path, bytes(data[:start]), metadata[HEADER_CRC])
    tensors = {name: parse_tensor(path, name, entry, start) for name, entry in header.items()}
    check_coverage(path, tensors, start, len(data))
    return tensors, metadata, start


def header_length(path: str, data: Data) -> int:
    if len(data) < 8:
        raise FormatError(path, "header length", "8 bytes", f"a file of {len(data)} bytes")
    length: int = struct.unpack("<Q", data[:8])[0]
    if length > MAX_HEADER and data[:1] == b"{":
        raise FormatError(path, "header length", "8 bytes", "a file of JSON", CONVERT)
    if length > MAX_HEADER:
        raise FormatError(path, "header length", f"at most {MAX_HEADER}", str(length))
    if length > len(data) - 8:
        limit = f"at most {len(data) - 8} (the file's end)"
        raise FormatError(path, "header length", limit, str(length))
    return length


def parse_json_object(path: str, field: str, text: bytes) -> dict[str, Any]:
    """Parse UTF-8 JSON strictly: an object, no name twice, no NaN, no unlimited nesting."""

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
        raise FormatError(path, field, "JSON in UTF-8", quote(str(error))) from None
    if not isinstance(value, dict):
        raise FormatError(path, field, "a JSON object", quote(value))
    return value


def is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_offset(value: object) -> bool:
    return is_count(value) and value < 1 << 63  # type: ignore[operator]


def parse_tensor(path: str, name: str, entry: object, data_start: int) -> Tensor:
    """Check one entry of the header by itself: dtype, shape, and that both fit its range."""
    field = f"tensor {quote(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(path, field, "dtype, shape and data_offsets", quote(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_SIZES:
        raise FormatError(path, f"{field} dtype", "one of " + ", ".join(DTYPE_SIZES), quote(dtype))
    if not isinstance(shape, list) or not all(map(is_count, shape)):
        raise FormatError(path, f"{field} shape", "a list of counts", quote(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_offset, offsets)):
        raise FormatError(path, f"{field} data_offsets", "two byte offsets", quote(offsets))
    start, stop = offsets
    if start > stop or byte_size(dtype, shape) != stop - start:
        found = f"data_offsets {quote(offsets)} for {dtype} {quote(shape)}"
        raise FormatError(path, f"{field} data_offsets", "a range that fits the shape", found)
    return Tensor(dtype, tuple(shape), data_start + start, data_start + stop)


def byte_size(dtype: str, shape: Sequence[int]) -> int:
    """The size of a tensor in bytes; -1 if it is larger than any file (the format has 64 bits)."""
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
            field = f"tensor {quote(name)} data_offsets"
            kind = "a gap" if tensor.start > start else "an overlap"
            raise FormatError(path, field, f"a start at byte {start}", f"{kind}: {tensor.start}")
        start = tensor.stop
    if start != stop:
        raise FormatError(path, "file size", f"{start} bytes, as the header says", f"{stop} bytes")


HEADER_CRC = "header_crc32"
NO_CRC = "00000000"  # what stands in place of a header's checksum while it is computed


def check_header_crc(path: str, head: bytes, expected: str) -> None:
    """`head` is the file up to its data: the length, then the header."""
    field = f"__metadata__ {HEADER_CRC}"
    place = f'"{HEADER_CRC}":"'.encode()
    digits = head.find(place) + len(place)
    value = head[digits : digits + len(NO_CRC)]
    if head.count(place) != 1 or value != expected.encode("ascii", "replace"):
        raise FormatError(path, field, "the field once, without spaces", "another form")
    found = header_crc(head[:digits] + NO_CRC.encode() + head[digits + len(NO_CRC) :])
    if found != expected:
        raise FormatError(path, field, quote(expected), f"a header with the CRC-32 {found}")


def header_crc(head: bytes) -> str:
    return f"{zlib.crc32(head):08x}"


# Writing: one function for every file that this project writes.

Entry = tuple[str, tuple[int, ...]]  # dtype and shape
ALIGNMENT = 64  # bytes; a cache line, and one AVX-512 register


def write_tensors(
    path: str,
    entries: dict[str, Entry],
    data: Iterable[Union[bytes, memoryview]],
    metadata: dict[str, str],
    check: Callable[[TensorFile], object],
    progress: Optional[Progress] = None,
) -> None:
    """Write a safetensors file with both checksums; it appears whole or not at all.

    `data` is the data section in the order of `entries`, in pieces of any size. The file is
    written beside its target, synced, read back, given to `check`, and then renamed. A crash
    leaves the old file or the new one. A target that is a link stays one.
    """
    if "\0" in path:
        raise cannot_write(path, "a path with a null byte")
    if os.path.isdir(path):
        raise cannot_write(path, "Is a directory")
    if os.path.exists(path) and not os.path.isfile(path):
        raise cannot_write(path, "it exists and is not a regular file")
    try:
        target = os.path.realpath(path)
        if os.path.islink(target):
            raise OSError("a link that leads back to itself")
        with temporary_file(target) as (file, temporary):
            write_content(file, entries, data, metadata, progress)
            with contextlib.closing(TensorFile(temporary)) as written:
                if written.checksum() != written.metadata["crc32"]:
                    raise OSError("the disk gives back other data than was written")
                check(written)
            if os.name == "nt":  # where an open file cannot be renamed
                file.close()
            os.replace(temporary, target)
    except (OSError, UnicodeError) as error:
        if isinstance(error, TinyGPT2Error):
            raise
        raise cannot_write(path, getattr(error, "strerror", None) or str(error)) from None


def cannot_write(path: str, reason: str) -> TinyGPT2Error:
    advice = "nothing was changed; free some space or choose another place"
    return TinyGPT2Error(f"{show_path(path)}: cannot write: {reason} ({advice})")


# A process that is killed leaves its temporary file. The next one that writes to the same target
# removes it. A file that is still written is locked; the system drops a lock when its process ends.


@contextlib.contextmanager
def temporary_file(target: str) -> Iterator[tuple[BinaryIO, str]]:
    """A new, locked file beside the target, and its path. It is removed if it is still there."""
    remove_leftovers(target)
    while True:
        path = f"{target}.{os.getpid()}-{os.urandom(3).hex()}.tmp"
        try:
            with open(path, "xb") as file:
                lock(file, wait=True)
                if os.path.exists(path):  # else another process locked and removed it first
                    yield file, path
                    return
        finally:
            with contextlib.suppress(OSError, UnicodeError):
                os.unlink(path)


def remove_leftovers(target: str) -> None:
    """Remove the temporary files of this target that no process is writing."""
    folder, name = os.path.split(target)
    pattern = re.compile(re.escape(name) + r"\.\d+-[0-9a-f]{6}\.tmp")
    with contextlib.suppress(OSError):
        for found in filter(pattern.fullmatch, os.listdir(folder)):
            remove_unlocked(os.path.join(folder, found))


def remove_unlocked(path: str) -> None:
    """Remove a regular file, unless a process has it locked (on Windows: open)."""
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return
        if os.name == "nt":
            os.unlink(path)
            return
        with open(path, "r+b") as file:
            if lock(file, wait=False):
                os.unlink(path)


def lock(file: BinaryIO, wait: bool) -> Optional[bool]:
    """Lock a file until it is closed. False if another has it locked, None if nothing can be."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        return None
    return True


def write_content(
    file: BinaryIO,
    entries: dict[str, Entry],
    data: Iterable[Union[bytes, memoryview]],
    metadata: dict[str, str],
    progress: Optional[Progress],
) -> None:
    """The header with an empty checksum, the data, then the header again with the right one."""
    header = make_header(entries, {**metadata, "crc32": NO_CRC})
    total = len(header) + sum(byte_size(*entry) for entry in entries.values())
    file.write(header)
    crc = 0
    for piece in data:
        file.write(piece)
        crc = zlib.crc32(piece, crc)
        if progress:
            progress("writing", file.tell(), total)
    file.seek(0)
    file.write(make_header(entries, {**metadata, "crc32": f"{crc:08x}"}))
    file.flush()
    os.fsync(file.fileno())


def make_header(entries: dict[str, Entry], metadata: dict[str, str]) -> bytes:
    """The header with its length before it, padded so that the data starts on a cache line."""
    header: dict[str, Any] = {"__metadata__": {**metadata, HEADER_CRC: NO_CRC}}
    start = 0
    for name, (dtype, shape) in entries.items():
        stop = start + byte_size(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(round_up(8 + len(text), ALIGNMENT) - 8)
    head = struct.pack("<Q", len(text)) + text
    empty = f'"{HEADER_CRC}":"{NO_CRC}"'
    return head.replace(empty.encode(), empty.replace(NO_CRC, header_crc(head)).encode(), 1)


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# ------------------------------------------------------------------------------------------------
# 3. The model
# ------------------------------------------------------------------------------------------------

FORMAT = "tinygpt2"
FORMAT_VERSION = "2"  # the version that is written; version 1 is read as well
PANEL = 16  # outputs side by side in a panel: one AVX-512 register, two of AVX2, four of NEON
ACTIVATIONS = ("gelu_new", "gelu", "relu")  # in the order of kernels.c
PRE_TOKENIZERS = ("gpt2", "characters")  # the ways of cutting text that section 4 implements


class AddedToken(NamedTuple):
    """A token that is found in a text before the text is cut into words.

    The names and meanings are those of the `tokenizers` library.
    """

    text: str
    id: int
    special: bool = True  # found only if the caller asks for special tokens
    lstrip: bool = False  # takes the white space before it along
    rstrip: bool = False  # and that behind it
    single_word: bool = False  # not found inside a word
    normalized: bool = False  # found in a second pass, in what the first one left


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
    bos_token_id: Optional[int]
    eos_token_ids: tuple[int, ...]  # the tokens that end an answer; the first is end-of-text
    n_merges: Optional[int]  # None: there is no tokenizer inside
    n_token_bytes: int
    added_tokens: tuple[AddedToken, ...]
    tokens_before: tuple[int, ...]  # put before every text, as the tokenizer does
    tokens_after: tuple[int, ...]  # and behind it
    add_prefix_space: bool
    pre_tokenizer: str
    generation: dict[str, Any]  # the model's own defaults of options, by the names of `Options`

    @property
    def special_tokens(self) -> dict[str, int]:
        """The added tokens that are special: their texts with their ids."""
        return {token.text: token.id for token in self.added_tokens if token.special}


# Sizes far beyond every GPT-2, and small enough that no product of them overflows.
SIZE_LIMITS = {
    "vocab_size": 1 << 24,
    "n_positions": 1 << 24,
    "n_embd": 1 << 17,
    "n_layer": 1 << 12,
    "n_head": 1 << 12,
    "n_inner": 1 << 20,
}
FLAGS = (
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
    "add_prefix_space",
)
TOKEN_LISTS = ("eos_token_ids", "tokens_before", "tokens_after")
MAX_SPECIAL = 256  # characters of an added token's text, so that looking for them stays cheap


def check_config(path: str, values: dict[str, Any]) -> Config:
    """Check a configuration value by value and against itself."""

    def require(name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise FormatError(path, f"config {name}", expected, quote(values.get(name)))

    missing = [name for name in Config._fields if name not in values]
    surplus = [name for name in values if name not in Config._fields]
    if missing or surplus:
        found = f"missing {quote(missing)}, unknown {quote(surplus)}"
        raise FormatError(path, "config", "exactly the known names", found)
    for name, limit in SIZE_LIMITS.items():
        value = values[name]
        require(name, is_count(value) and 1 <= value <= limit, f"a whole number from 1 to {limit}")
    require("n_head", values["n_embd"] % values["n_head"] == 0, "a divisor of n_embd")
    activation = values["activation_function"]
    require("activation_function", activation in ACTIVATIONS, f"one of {ACTIVATIONS}")
    epsilon = values["layer_norm_epsilon"]
    is_small = isinstance(epsilon, float) and 0 <= epsilon < 1
    require("layer_norm_epsilon", is_small, "0 <= epsilon < 1")
    for name in FLAGS:
        require(name, isinstance(values[name], bool), "true or false")
    size = values["vocab_size"]
    bos, ends = values["bos_token_id"], values["eos_token_ids"]
    require("bos_token_id", bos is None or is_token(bos, size), f"a token below {size}")
    are_unique = are_tokens(ends, size) and len(set(ends)) == len(ends)
    require("eos_token_ids", are_unique, f"a list of tokens below {size}, none twice")
    for name in ("tokens_before", "tokens_after"):
        ids = values[name]
        require(name, are_tokens(ids, size), f"a list of tokens below {size}")
        require(name, len(ids) <= values["n_positions"], "at most n_positions tokens")
    added = added_tokens_of(path, values["added_tokens"], size)
    for name in ("n_merges", "n_token_bytes"):
        absent = name == "n_merges" and values[name] is None
        require(name, absent or (is_count(values[name]) and values[name] < 1 << 31), "a count")
    require("pre_tokenizer", values["pre_tokenizer"] in PRE_TOKENIZERS, f"one of {PRE_TOKENIZERS}")
    require("generation", isinstance(values["generation"], dict), "an object of options")
    for name, value in values["generation"].items():
        check_stored_option(path, name, value)
    lists = {name: tuple(values[name]) for name in TOKEN_LISTS}
    return Config(**{**values, **lists, "added_tokens": added})


STORED_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "max_length",  # of the prompt and the answer together; max_new_tokens comes first
)


def check_stored_option(path: str, name: str, value: object) -> None:
    """Check one of a model's own defaults."""
    if name not in STORED_OPTIONS:
        expected = "one of " + ", ".join(STORED_OPTIONS)
        raise FormatError(path, "config generation", expected, quote(name))
    try:
        check_option("max_new_tokens" if name == "max_length" else name, value, 0)
    except InputError as error:
        expected = "values that the options take"
        raise FormatError(path, "config generation", expected, str(error)) from None


def are_tokens(value: object, vocab_size: int) -> bool:
    return isinstance(value, (list, tuple)) and all(is_token(token, vocab_size) for token in value)


def added_tokens_of(path: str, value: object, vocab_size: int) -> tuple[AddedToken, ...]:
    """The added tokens of a configuration, checked one by one and against each other."""
    field, names = "config added_tokens", set(AddedToken._fields)
    if not isinstance(value, (list, tuple)):
        raise FormatError(path, field, "a list", quote(value))
    for entry in value:
        if not isinstance(entry, dict) or set(entry) != names or not is_added(entry, vocab_size):
            expected = (
                f"texts of 1 to {MAX_SPECIAL} characters with tokens below {vocab_size} and flags"
            )
            raise FormatError(path, field, expected, quote(entry))
    tokens = tuple(AddedToken(**entry) for entry in value)
    for name, values in (("text", {t.text for t in tokens}), ("id", {t.id for t in tokens})):
        if len(values) != len(tokens):
            raise FormatError(path, field, f"each {name} once", "one of them twice")
    return tokens


def is_added(entry: dict[str, Any], vocab_size: int) -> bool:
    """Whether the values of an added token have the right types and sizes."""
    text = entry["text"]
    is_short = isinstance(text, str) and 1 <= len(text) <= MAX_SPECIAL
    flags = [value for name, value in entry.items() if name not in ("text", "id")]
    is_flagged = all(isinstance(flag, bool) for flag in flags)
    return is_short and is_flagged and is_token(entry["id"], vocab_size)


def as_index(value: Any) -> Optional[int]:
    """A whole number, NumPy's included, as an int; None for everything else."""
    try:
        return None if type(value).__name__.startswith("bool") else operator.index(value)
    except TypeError:
        return None


def is_token(value: object, vocab_size: int) -> bool:
    return is_count(value) and value < vocab_size  # type: ignore[operator]


def layout(config: Config) -> dict[str, Entry]:
    """Every tensor of a .tg2 file, in the file's order: its name, dtype and shape.

    A matrix that maps k inputs to n outputs is stored in panels, float32 [ceil(n/16), k, 16]:
    sixteen outputs side by side for the first input, then for the next. It is the order in which
    a kernel reads it. Everything is padded with zeros to whole cache lines, so that every tensor
    starts on a 64-byte boundary; the vocabulary's tensors are explained at `Tokenizer`.
    """

    def panels(inputs: int, outputs: int) -> Entry:
        return "F32", (-(-outputs // PANEL), inputs, PANEL)

    def vector(outputs: int) -> Entry:
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


def tg2_metadata(config: Config) -> dict[str, str]:
    """The metadata of a .tg2 file, to which `write_tensors` adds the checksums."""
    text = json.dumps(config_values(config))
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "config": text}


def config_values(config: Config) -> dict[str, Any]:
    """The configuration as JSON has it, with added tokens as objects; see `check_config`."""
    return {**config._asdict(), "added_tokens": [token._asdict() for token in config.added_tokens]}


def read_config(file: TensorFile) -> Config:
    """The configuration of a .tg2 file, checked against the tensors that the file holds."""
    version = check_version(file)
    text = file.metadata.get("config", "").encode("utf-8", "surrogatepass")
    values = parse_json_object(file.path, "__metadata__ config", text)
    if version == "1":
        values = from_version_1(file.path, values)
    config = check_config(file.path, values)
    # Each layer has tensors of its own. So refuse a larger count before a layout is made for it.
    if config.n_layer > len(file.tensors):
        found = f"{len(file.tensors)} tensors"
        raise FormatError(file.path, "tensors", f"those of {config.n_layer} layers", found)
    check_tensors(file, layout(config))
    return config


def from_version_1(path: str, values: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had one end token, or null, and texts of special tokens with their ids, and no
    defaults of options."""
    old = {"eos_token_id", "special_tokens"}
    new = {"eos_token_ids", "added_tokens", "tokens_before", "tokens_after", "generation"}
    if not old <= values.keys() or new & values.keys():
        raise FormatError(path, "config", "exactly the names of version 1", "others")
    end, special = values["eos_token_id"], values["special_tokens"]
    if not isinstance(special, dict):
        raise FormatError(path, "config special_tokens", "an object of token ids", quote(special))
    rest = {name: value for name, value in values.items() if name not in old}
    return {
        **rest,
        "eos_token_ids": [] if end is None else [end],
        "added_tokens": [AddedToken(text, token)._asdict() for text, token in special.items()],
        "tokens_before": [],
        "tokens_after": [],
        "generation": {},
    }


def check_version(file: TensorFile) -> str:
    name, version = file.metadata.get("format"), file.metadata.get("format_version")
    if name != FORMAT:
        found = f"{quote(name)}, as in a checkpoint"
        raise FormatError(file.path, "__metadata__ format", repr(FORMAT), found, CONVERT)
    if version not in ("1", FORMAT_VERSION):
        advice = "convert the checkpoint again, or use the tinygpt2 that wrote the file"
        field, expected = "__metadata__ format_version", f"'1' or {FORMAT_VERSION!r}"
        raise FormatError(file.path, field, expected, quote(version), advice)
    if (version == "1") == (HEADER_CRC in file.metadata):
        expected = "none in version 1, and one from version 2 on"
        found = quote(file.metadata.get(HEADER_CRC))
        raise FormatError(file.path, f"__metadata__ {HEADER_CRC}", expected, found)
    return version


def check_tensors(file: TensorFile, expected: dict[str, Entry]) -> None:
    for name, (dtype, shape) in expected.items():
        tensor, field = file.tensors.get(name), f"tensor {name}"
        if tensor is None:
            raise FormatError(file.path, field, f"{dtype} {list(shape)}", "no such tensor")
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            found = f"{tensor.dtype} {quote(list(tensor.shape))}"
            raise FormatError(file.path, field, f"{dtype} {list(shape)}", found)
        if tensor.start % ALIGNMENT:
            found = f"byte {tensor.start}"
            raise FormatError(file.path, field, f"a start on {ALIGNMENT} bytes", found)
    surplus = [name for name in file.tensors if name not in expected]
    if surplus:
        raise FormatError(file.path, "tensors", "only the known ones", quote(surplus[0]))


# ------------------------------------------------------------------------------------------------
# 4. Tokens, and text as it comes
# ------------------------------------------------------------------------------------------------

# GPT-2 first cuts text into words; the merges below never cross the end of a word. A word is a
# contraction, or letters, digits or other signs, with one space before them if there is one, or
# white space.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The standard library's `re` has no \p{L} and \p{N}. Its \w and \d come near, so the same pattern
# is matched on a shadow of the text, of the same length, in which the exceptions are replaced.
SHADOW_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d]+| ?\d+| ?[^\w\s]+|\s+(?!\S)|\s+"

# Letters that Unicode added after version 13, the one of Python 3.9, up to version 18.
NEW_LETTERS = """
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

# Numbers that `re` does not count among \d: fractions, superscripts, Roman numerals, newer digits.
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

# Beside letters, these are part of a word to `single_word`: joiners, letters in circles and
# squares, and the marks and digits that Unicode added after version 13.
WORD_PARTS = """
200c-200d 24b6-24e9 1f130-1f149 1f150-1f169 1f170-1f189
897-89f 8ca-8d2 c3c cf3 ece 1715 180f 1ac1-1ace 1dfa 10d40-10d49 10d69-10d6d 10efc-10eff
10f82-10f85 11070 11073-11074 110c2 11241 113b8-113c0 113c2 113c5 113c7-113ca 113cc-113d0 113d2
113e1-113e2 116d0-116e3 11bf0-11bf9 11f00-11f01 11f03 11f34-11f3a 11f3e-11f42 11f50-11f5a 13440
13447-13455 1611e-16139 16ac0-16ac9 16d70-16d79 1ccf0-1ccf9 1cf00-1cf2d 1cf30-1cf46 1e08f 1e2ae
1e4ec-1e4f9 1e5ee-1e5ef 1e5f1-1e5fa
"""
WHITE_SPACE = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*")


def spans(ranges: str) -> Iterator[range]:
    for item in ranges.split():
        first, _, last = item.partition("-")
        yield range(int(first, 16), int(last or first, 16) + 1)


def code_points(ranges: str) -> Iterator[int]:
    for span in spans(ranges):
        yield from span


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
            shadow.update(dict.fromkeys(code_points(NEW_LETTERS), "a"))
            shadow.update(dict.fromkeys(code_points(ODD_NUMBERS), "0"))
            self.full_shadow = shadow  # in one assignment: another thread may be reading
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
    """Cache a result, within bounds: text repeats its words and pairs."""
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
        self.tokens_before = config.tokens_before
        self.tokens_after = config.tokens_after
        self.add_prefix_space = config.add_prefix_space
        self.has_words = config.pre_tokenizer == "gpt2"  # or else characters
        self.bytes = file.view("vocab.bytes", "B")
        self.offsets = file.view("vocab.offsets", "I")
        self.byte_ids = file.view("vocab.byte_ids", "I")
        self.pairs = file.view("merges.pairs", "Q")
        self.ranks = file.view("merges.ranks", "I")
        self.results = file.view("merges.results", "I")
        self.n_merges = config.n_merges or 0
        self.check(file.path, config.n_token_bytes)
        self.added = AddedTokens(config.added_tokens)
        self.characters: dict[bytes, int] = {}  # if there are no words: made by the first text
        self.cut: Optional[Callable[[str], Iterable[str]]] = None  # made by the first text
        self.cache: dict[str, list[int]] = {}  # the tokens of short words
        self.found: dict[int, int] = {}  # the merges of pairs

    def __reduce__(self) -> NoReturn:
        raise stays_here("tokenizer", "pickle its model")

    def check(self, path: str, n_token_bytes: int) -> None:
        """Check everything that encoding and decoding rely on."""
        offsets = self.offsets[: self.n_tokens + 1]
        rises = offsets[0] == 0 and offsets[-1] == n_token_bytes and is_rising(offsets, True)
        if not rises:
            expected = f"offsets rising from 0 to {n_token_bytes}"
            raise FormatError(path, "tensor vocab.offsets", expected, "others")
        for byte, token in enumerate(self.byte_ids):
            in_range = token == NO_TOKEN or token < self.n_tokens
            if not in_range or (token != NO_TOKEN and self.token_bytes(token) != bytes([byte])):
                expected = f"the token of byte {byte}"
                raise FormatError(path, "tensor vocab.byte_ids", expected, str(token))
        if not is_rising(self.pairs[: self.n_merges], False):
            raise FormatError(path, "tensor merges.pairs", "rising pairs", "others")
        halves = self.pairs[: self.n_merges].cast("B").cast("I")  # right, left, right, left, ...
        self.check_ids(path, "pairs", halves)
        self.check_ids(path, "results", self.results[: self.n_merges])

    def check_ids(self, path: str, name: str, ids: memoryview) -> None:
        largest = max((max(part) for part in slices(ids)), default=-1)
        if largest >= self.n_tokens:
            expected = f"tokens below {self.n_tokens}"
            raise FormatError(path, f"tensor merges.{name}", expected, str(largest))

    def verify(self, path: str) -> None:
        """The slow check, for `info --verify`: each merge joins its two tokens' bytes."""
        for merge, pair in enumerate(self.pairs[: self.n_merges]):
            left, right = self.token_bytes(pair >> 32), self.token_bytes(pair & 0xFFFFFFFF)
            result = self.token_bytes(self.results[merge])
            if result != left + right:
                expected = f"merge {merge} to make {quote(left + right)}"
                raise FormatError(path, "tensor merges.results", expected, quote(result))

    def token_bytes(self, token: int) -> bytes:
        return bytes(self.bytes[self.offsets[token] : self.offsets[token + 1]])

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; what is not UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def encode(
        self, text: str, special: bool = False, add_special_tokens: bool = True
    ) -> list[int]:
        """The tokens of a text; special tokens are recognised in it only if `special` is set."""
        text = mend_surrogates(text)
        tokens = list(self.tokens_before) if add_special_tokens else []
        for ordinary, token in self.added.split(text, special):
            if token is not None:
                tokens.append(token)
            elif self.has_words:
                tokens += self.encode_words(ordinary)
            else:
                tokens += self.encode_characters(ordinary)
        if add_special_tokens:
            tokens += self.tokens_after
        return tokens

    def encode_words(self, text: str) -> list[int]:
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

    def encode_characters(self, text: str) -> list[int]:
        if not self.characters:
            ids = reversed(range(self.n_tokens))  # so that the lowest of several is kept
            table = {self.token_bytes(token): token for token in ids}
            self.characters = table  # in one assignment: another thread may be reading
        return [self.character(character) for character in text]

    def character(self, character: str) -> int:
        token = self.characters.get(character.encode("utf-8"))
        if token is None:
            name = f"{quote(character)} (U+{ord(character):04X})"
            raise InputError(f"text: the character {name} is not in the model's vocabulary")
        return token

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
                continue  # another merge has taken one of the two since
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


def slices(numbers: memoryview, size: int = 1 << 14) -> Iterator[list[int]]:
    """The numbers as lists, some at a time: a file can claim more of them than memory holds."""
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size].tolist()


def is_rising(numbers: memoryview, repeats: bool) -> bool:
    """Whether the numbers rise; if `repeats`, they may also stay the same."""
    last = -1
    for part in slices(numbers):
        ordered = sorted(part) if repeats else sorted(set(part))
        if part != ordered or part[0] < last or (part[0] == last and not repeats):
            return False
        last = part[-1]
    return True


class AddedTokens:
    """Finds added tokens in a text, exactly as the `tokenizers` library does."""

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self.all_special = all(token.special for token in tokens)
        first = [token for token in tokens if not token.normalized]
        second = [token for token in tokens if token.normalized]
        self.passes = [AddedTokenPass(part) for part in (first, second) if part]

    def split(self, text: str, special: bool) -> Iterable[tuple[str, Optional[int]]]:
        """The text in pieces: each is ordinary text with None, or a token's text with its id."""
        pieces: Iterable[tuple[str, Optional[int]]] = [(text, None)]
        if special or not self.all_special:
            for one_pass in self.passes:
                pieces = one_pass.split_each(pieces, special)
        return pieces


class AddedTokenPass:
    """The added tokens that are looked for together: leftmost first, then the longest."""

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self.tokens = sorted(tokens)  # by text
        self.texts = [token.text for token in self.tokens]
        self.shorter = longest_prefixes(self.texts)
        starts = {text[0] for text in self.texts}
        self.start = re.compile("[" + re.escape("".join(starts)) + "]")

    def split_each(
        self, pieces: Iterable[tuple[str, Optional[int]]], special: bool
    ) -> Iterator[tuple[str, Optional[int]]]:
        """Split the pieces that are ordinary text."""
        for text, token in pieces:
            if token is None:
                yield from self.split(text, special)
            else:
                yield text, token

    def split(self, text: str, special: bool) -> Iterator[tuple[str, Optional[int]]]:
        done = 0  # where the piece that comes next begins
        for start, token in self.matches(text):
            stop = start + len(token.text)
            if token.special and not special:
                continue
            if token.single_word and not is_single_word(text, start, stop):
                continue
            if token.lstrip:
                start = max(done, start_of_space(text, start, done))
            if token.rstrip:
                stop = end_of_space(text, stop)
            if done < start:
                yield text[done:start], None
            if start < stop:
                yield text[start:stop], token.id
            done = stop
        if done < len(text):
            yield text[done:], None

    def matches(self, text: str) -> Iterator[tuple[int, AddedToken]]:
        """Where tokens stand, without overlap. One that is not wanted hides others all the same."""
        place = 0
        while (candidate := self.start.search(text, place)) is not None:
            place = candidate.start()
            index = self.longest(text, place)
            if index < 0:
                place += 1
            else:
                yield place, self.tokens[index]
                place += len(self.texts[index])

    def longest(self, text: str, place: int) -> int:
        """The index of the longest token that stands at `place`, or -1.

        The last text that is not behind this one in the alphabet begins with every token that
        stands here.
        """
        index = bisect.bisect_right(self.texts, text[place : place + MAX_SPECIAL]) - 1
        while index >= 0 and not text.startswith(self.texts[index], place):
            index = self.shorter[index]
        return index


def longest_prefixes(texts: Sequence[str]) -> list[int]:
    """For each of the sorted texts, the index of the longest other one it begins with, or -1."""
    prefixes: list[int] = []
    open_ones: list[int] = []  # each begins with the one before
    for index, text in enumerate(texts):
        while open_ones and not text.startswith(texts[open_ones[-1]]):
            open_ones.pop()
        prefixes.append(open_ones[-1] if open_ones else -1)
        open_ones.append(index)
    return prefixes


def start_of_space(text: str, stop: int, low: int) -> int:
    """Where the white space before `stop` begins, but not before `low`."""
    while stop > low and WHITE_SPACE.fullmatch(text, stop - 1, stop):
        stop -= 1
    return stop


def end_of_space(text: str, start: int) -> int:
    found = WHITE_SPACE.match(text, start)
    return found.end() if found else start


def is_single_word(text: str, start: int, stop: int) -> bool:
    """Whether no word goes on before `start` or behind `stop`."""
    return not (is_word_part(text[start - 1 : start]) or is_word_part(text[stop : stop + 1]))


def is_word_part(character: str) -> bool:
    """Whether a character is a part of words (`\\w` in Unicode's sense, which is not Python's)."""
    if character == "" or character.isascii():
        return character.isalnum() or character == "_"
    category = importlib.import_module("unicodedata").category(character)
    if category[0] in "LM" or category in ("Nd", "Nl", "Pc"):
        return True
    return any(ord(character) in span for span in spans(WORD_PARTS + NEW_LETTERS))


class TextOutput:
    """Turns the bytes of new tokens into text that can be shown.

    A character that is not complete yet is held back, and so is text that may still turn out to
    be part of a stop text. `before` is the end of what the answer follows: if it ends inside a
    character, the first bytes of the answer complete that character.
    """

    def __init__(self, stops: Sequence[str] = (), before: bytes = b"") -> None:
        self.stops = stops
        self.held = ""  # text that may be the beginning of a stop text
        self.stopped = False  # whether a stop text was found
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.decoder.decode(before)
        self.is_empty = True  # whether the decoder holds no byte of the answer itself

    def push(self, data: bytes) -> str:
        """Add the bytes of a token; return the text that can now be shown."""
        self.is_empty = self.is_empty and not data
        return self.release(self.decoder.decode(data))

    def finish(self) -> str:
        """Return the rest at the end of the answer; an incomplete character becomes U+FFFD."""
        last = "" if self.is_empty else self.decoder.decode(b"", final=True)
        return self.release(last) + self.held

    def release(self, piece: str) -> str:
        """Add text; return what can no longer be part of a stop text."""
        text = self.held + piece
        # The stop text that is complete first counts, and the longest of several that end
        # together, so that the answer does not depend on how it was cut into pieces.
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
    """The length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


# ------------------------------------------------------------------------------------------------
# 5. Forward
# ------------------------------------------------------------------------------------------------

# What happens to a prompt of three tokens, in a model of width n_embd with n_head heads:
#
#   1. Each token becomes a row of n_embd numbers: what the token is (wte) plus where it stands
#      (wpe). The three rows, [3, n_embd], are the residual stream: every layer reads them and adds
#      to them.
#   2. Attention. Each row makes three vectors: a query (what it looks for), a key (by which it is
#      found) and a value (what it passes on). A row's query is compared with the keys of all rows
#      up to its own. Softmax turns these scores into weights that add up to 1, and the weighted
#      sum of the values is added to the row. Several heads do this side by side, each on its own
#      part of the vectors, so that a row can look for several things at once.
#   3. An MLP (two linear layers with an activation between them) adds to each row by itself.
#   4. Steps 2 and 3 are repeated n_layer times. Then each row is compared with every token's
#      embedding. These scores, the logits, say which token may follow: [3, vocab_size].
#
# A row never looks at later rows. So the keys and values of earlier tokens never change, and a
# cache keeps them: to go on, only the row of the new token has to be computed.
#
# Two backends do this: NumpyBackend, which follows and is meant to be read, and CBackend in section
# 8. Only C promises the same bits everywhere. The next four classes say what both must offer.


class Cache(Protocol):
    """The keys and values of one text."""

    length: int  # how many of the text's tokens they are computed for

    def fork(self) -> Cache:
        """A copy that goes its own way."""

    def truncate(self, length: int) -> None:
        """Forget what is behind the first `length` tokens."""

    def dump(self) -> tuple[memoryview, memoryview, bytes]:
        """Keys and values in the form of `snapshot_layout`, as bytes, and their sums.

        The sums tell whether a snapshot was changed. `tg_cache_dump` in kernels.c explains them.
        """

    def restore(self, keys: memoryview, values: memoryview, length: int) -> bytes:
        """Take over what `dump` returned for `length` tokens; return its sums."""


def snapshot_layout(config: Config, length: int) -> dict[str, Entry]:
    """The keys and values of `length` tokens, in panels as kernels.c keeps them.

    Positions are side by side in a panel of keys, and the numbers of a head in one of values.
    Zeros stand where there is no position or no number.
    """
    head_size = config.n_embd // config.n_head
    heads = (config.n_layer, config.n_head)
    keys = (*heads, -(-length // PANEL), head_size, PANEL)
    values = (*heads, -(-head_size // PANEL), length, PANEL)
    return {"keys": ("F32", keys), "values": ("F32", values)}


class Span(NamedTuple):
    """The part of one text that a pass computes: `tokens`, which stand at positions from `start`.

    The cache must hold the positions before `start`. The pass adds those of `tokens`; whoever
    asked for the pass sets the cache's length, once the pass has succeeded.
    """

    cache: Any
    tokens: Sequence[int]
    start: int
    wanted: int  # the logits after the last `wanted` tokens are computed


class Logits(Protocol):
    """Rows of scores for the next token: the wanted rows of all spans of a pass, in order.

    They lie in the workspace of the pass. After the next pass in it every method raises
    `StateError`, so that old numbers are never read as new ones; `keep` copies a row out. Every
    method raises `NumericError` for a row that is not finite.
    """

    def choose(self, row: int, sampler: Sampler, position: int) -> int:
        """The next token of a text that has `position` tokens so far, or NO_CHOICE."""

    def order(self, row: int, sampler: Sampler, position: int, n: int) -> list[int]:
        """The first n tokens in the order of the choice, of which `choose` gives the first.

        Those that the filters keep come first, as the draw ranks them; then the rest by score.
        """

    def logprob(self, row: int, token: int) -> float:
        """The natural logarithm of a token's probability."""

    def rank(self, row: int, token: int) -> int:
        """How many tokens are more probable; of equals the lower token counts as more probable."""

    def top(self, row: int, n: int) -> list[tuple[int, float]]:
        """The n most probable tokens with their log-probabilities, the best first."""

    def array(self) -> FloatArray:
        """All rows as a new array, float32 [rows, vocab_size]."""

    def keep(self, row: int) -> Any:
        """A copy of one row; the backend's `kept` makes it `Logits` again."""


GoesOn = Callable[[], bool]


def always() -> bool:
    return True


class CancelError(Exception):
    """Ends a pass that nobody waits for any more. It never leaves this module."""


class Backend(Protocol):
    """What computes a model. It never changes, so any number of threads can share it."""

    name: str
    chunk: int  # the most tokens in one pass, of all texts together

    def new_cache(self) -> Cache:
        """An empty cache."""

    def new_workspace(self) -> Any:
        """The scratch memory of a pass, for one thread at a time."""

    def forward(self, workspace: Any, spans: Sequence[Span], goes_on: GoesOn = always) -> Logits:
        """One pass over the spans of one or more texts, which share each reading of the weights.

        `goes_on` is asked several times. If it says no, the pass ends with `CancelError`.
        """

    def kept(self, workspace: Any, row: Any) -> Logits:
        """The single row that `Logits.keep` returned, as logits."""

    def row_of(self, data: memoryview) -> Any:
        """A row as `Logits.keep` returns it, from its bytes."""

    def describe(self) -> str:
        """The backend in a few words."""


NOT_FINITE = "NaN or infinite logits"
STALE = "logits: a later pass has replaced them; use them before it, or copy them"


class LazyNumPy:
    """Stands for NumPy until it is first used: importing this module must cost nothing."""

    def __getattr__(self, name: str) -> Any:
        import_numpy()
        return getattr(np, name)


np: Any = LazyNumPy()

# Measured with OpenBLAS on two processors. Where both are free, a product of 48 or more rows of 512
# numbers is 1.8 times as fast on two threads, one of 256 numbers 1.5 times, one of 64 numbers not
# at all; fewer rows gain nothing. Where other programs use them too, the threads wait for each
# other: a prompt of 64 tokens took 7 to 39 times as long on two threads, at any width from 64 to
# 768. So only large work gets several.
WIDE = 512
MANY_ROWS = 48  # measured: from here on copying panels together is faster


def linear(x: Array, panels: Array, bias: Array) -> Array:
    """x @ W + b, for a W in panels. [T, k], [n/16, k, 16], [n] -> [T, n]"""
    return project(x, panels, len(bias)) + bias


def project(x: Array, panels: Array, n: int) -> Array:
    """x @ W for a W in panels. [T, k], [n/16, k, 16] -> [T, n]"""
    if len(x) < MANY_ROWS:
        y = np.matmul(x, panels)  # one product for each panel: [n/16, T, 16]
        return y.transpose(1, 0, 2).reshape(len(x), PANEL * len(panels))[:, :n]
    # Products this narrow use a processor's caches badly when there are many rows. A few panels
    # side by side, [k, 128], are cheap to copy and make one good product.
    out = np.empty((len(x), PANEL * len(panels)), np.float32)
    for first in range(0, len(panels), 8):
        group = panels[first : first + 8].transpose(1, 0, 2).reshape(x.shape[1], -1)
        np.matmul(x, group, out=out[:, PANEL * first : PANEL * first + group.shape[1]])
    return out[:, :n]


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """Ba et al., "Layer Normalization" (2016): each row to mean 0 and variance 1. [T, n_embd]"""
    centred = x - row_means(x)
    variance = row_means(np.square(centred))  # [T, 1]
    return centred / np.sqrt(variance + epsilon) * weight + bias


def row_means(x: Array) -> Array:
    """x.mean(axis=-1, keepdims=True), which takes three times as long for a short row."""
    return np.add.reduce(x, axis=-1, keepdims=True) / np.float32(x.shape[-1])


def softmax(x: Array) -> Array:
    """Rows of scores to rows of probabilities. Without the maximum, exp could overflow."""
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
    """How much each token looks at each one up to itself; later ones are masked by -inf.

    q [n_head, T, head_size] are the queries of the last T of the S tokens whose keys are in
    k [n_head, S, head_size] -> [n_head, T, S]
    """
    scores = q @ k.transpose(0, 2, 1) * np.float32(scale)  # [n_head, T, S]
    queries, keys = scores.shape[1:]
    if queries > 1:
        future = np.arange(keys) > np.arange(keys - queries, keys)[:, None]  # [T, S]
        scores[:, future] = -np.inf
    return scores


class NumpyCache:
    """Keys and values in one array, kv [n_layer, 2, n_head, n_positions, head_size]."""

    def __init__(self, kv: Array, length: int = 0) -> None:
        self.kv = kv
        self.length = length

    def fork(self) -> NumpyCache:
        try:
            kv = np.empty_like(self.kv)
        except MemoryError:
            raise TinyGPT2Error("no memory for the copy of a cache: close other sessions") from None
        kv[:, :, :, : self.length] = self.kv[:, :, :, : self.length]
        return NumpyCache(kv, self.length)

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def dump(self) -> tuple[memoryview, memoryview, bytes]:
        keys, values = np.moveaxis(self.kv[:, :, :, : self.length], 1, 0)
        keys = pad_to_panels(keys, 2)  # [n_layer, n_head, up(T), head_size]
        values = pad_to_panels(values, 3)  # [n_layer, n_head, T, up(head_size)]
        keys = to_panels(keys.swapaxes(2, 3))  # [n_layer, n_head, up(T) / 16, head_size, 16]
        values = to_panels(values)  # [n_layer, n_head, up(head_size) / 16, T, 16]
        sums = snapshot_sums(keys, values)
        return memoryview(keys.tobytes()), memoryview(values.tobytes()), sums

    def restore(self, keys: memoryview, values: memoryview, length: int) -> bytes:
        n_layer, _, n_head, _, d = self.kv.shape
        width = round_up(d, PANEL)
        k = np.frombuffer(keys, np.float32).reshape(n_layer, n_head, -(-length // PANEL), d, PANEL)
        v = np.frombuffer(values, np.float32).reshape(
            n_layer, n_head, width // PANEL, length, PANEL
        )
        sums = snapshot_sums(k, v)
        k = k.swapaxes(3, 4).reshape(n_layer, n_head, round_up(length, PANEL), d)
        v = v.swapaxes(2, 3).reshape(n_layer, n_head, length, width)
        self.kv[:, 0, :, :length] = k[:, :, :length]
        self.kv[:, 1, :, :length] = v[..., :d]
        self.length = length
        return sums


def pad_to_panels(x: Array, axis: int) -> Array:
    """Zeros behind the numbers of one axis, up to a whole number of panels."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % PANEL)
    return np.pad(x, widths)


def to_panels(x: Array) -> Array:
    """[n_layer, n_head, inputs, outputs] -> [n_layer, n_head, outputs / 16, inputs, 16]"""
    n_layer, n_head, inputs, outputs = x.shape
    return x.reshape(n_layer, n_head, inputs, outputs // PANEL, PANEL).swapaxes(2, 3)


def snapshot_sums(keys: Array, values: Array) -> bytes:
    """The sums of a snapshot, head by head. Both [n_layer, n_head, panels, inputs, 16]"""
    heads = (head for layer in zip(keys, values) for head in zip(*layer))
    return b"".join(word_sums(x.reshape(-1, PANEL)).tobytes() for head in heads for x in head)


def word_sums(x: Array) -> Array:
    """Each lane's sum, and the sum of all its running sums. float32 [n, 16] -> uint64 [2, 16]"""
    words = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    remaining = np.arange(len(words), 0, -1, dtype=np.uint64)[:, None]  # [n, 1]
    return np.stack([words.sum(axis=0), (words * remaining).sum(axis=0)])


class NumpyWorkspace:
    """NumPy allocates its scratch memory itself; this only counts the passes."""

    def __init__(self) -> None:
        self.n_passes = 0


class NumpyLogits:
    """`Logits` in an array, float32 [rows, vocab_size]."""

    def __init__(self, workspace: NumpyWorkspace, rows: Array) -> None:
        self.workspace = workspace
        self.number = workspace.n_passes
        self.rows = rows

    def checked(self, row: Union[int, slice]) -> Array:
        if self.number != self.workspace.n_passes:
            raise StateError(STALE)
        if not np.isfinite(self.rows[row]).all():
            raise NumericError(NOT_FINITE)
        return self.rows[row]

    def choose(self, row: int, sampler: Sampler, position: int) -> int:
        return choose_token(self.checked(row), sampler, position)

    def order(self, row: int, sampler: Sampler, position: int, n: int) -> list[int]:
        return order_tokens(self.checked(row), sampler, position)[:n]

    def logprobs(self, row: int) -> Array:
        """float64 [vocab_size]"""
        logits = self.checked(row).astype(np.float64)
        logits -= logits.max()
        return logits - np.log(np.exp(logits).sum())

    def logprob(self, row: int, token: int) -> float:
        return float(self.logprobs(row)[token])

    def rank(self, row: int, token: int) -> int:
        logits = self.checked(row)
        better = np.count_nonzero(logits > logits[token])
        return int(better + np.count_nonzero(logits[:token] == logits[token]))

    def top(self, row: int, n: int) -> list[tuple[int, float]]:
        logprobs = self.logprobs(row)
        best = np.argsort(-self.rows[row], kind="stable")[:n]
        return [(int(token), float(logprobs[token])) for token in best]

    def array(self) -> FloatArray:
        rows: FloatArray = np.array(self.checked(slice(None)))
        return rows

    def keep(self, row: int) -> Array:
        return np.array(self.checked(row))


class NumpyBackend:
    """The forward pass in NumPy."""

    name = "numpy"
    chunk = 256  # bounds the scratch memory

    def __init__(self, file: TensorFile, config: Config, threads: Optional[int]) -> None:
        self.threads = (threads or default_threads()) if config.n_embd >= WIDE else 1
        self.blas = import_numpy(threads, self.threads)
        self.config = config
        activations = {"gelu_new": gelu_new, "gelu": gelu, "relu": relu}
        self.activation = activations[config.activation_function]
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
                is_matrix = array.ndim == 3
                block = self.blocks[int(layer)]
                block[part] = array if is_matrix else array[: vector_length(config, name)]

    def describe(self) -> str:
        return f"numpy ({self.blas.describe(self.threads)})"

    def new_cache(self) -> NumpyCache:
        """Room for every position; the system provides the memory as it fills."""
        c = self.config
        shape = (c.n_layer, 2, c.n_head, c.n_positions, c.n_embd // c.n_head)
        try:
            return NumpyCache(np.empty(shape, np.float32))
        except (MemoryError, ValueError):
            size = f"{4 * math.prod(shape) / 1e6:.0f} MB"
            raise TinyGPT2Error(f"no memory for a cache of {size}: use a smaller model") from None

    def new_workspace(self) -> NumpyWorkspace:
        return NumpyWorkspace()

    def kept(self, workspace: NumpyWorkspace, row: Array) -> NumpyLogits:
        return NumpyLogits(workspace, row[None])

    def row_of(self, data: memoryview) -> Array:
        return np.frombuffer(data, np.float32).copy()

    def forward(
        self, workspace: NumpyWorkspace, spans: Sequence[Span], goes_on: GoesOn = always
    ) -> NumpyLogits:
        """GPT-2. The rows of all spans, R in all, go through the linear layers together."""
        workspace.n_passes += 1
        is_small = sum(len(span.tokens) for span in spans) < MANY_ROWS
        with self.blas.limited(1 if is_small else self.threads), np.errstate(all="ignore"):
            # Damaged weights are an error later, not a warning.
            x = np.concatenate([self.embed(span) for span in spans])  # [R, n_embd]
            for i, block in enumerate(self.blocks):
                if not goes_on():
                    raise CancelError
                x = x + self.attention(i, block, self.norm(x, block, "ln_1"), spans)
                x = x + self.mlp(block, self.norm(x, block, "ln_2"))
            x = self.norm(wanted_rows(x, spans), self.ln_f, "ln_f")  # [wanted, n_embd]
            logits = project(x, self.head, self.config.vocab_size)  # [wanted, vocab_size]
        return NumpyLogits(workspace, logits)

    def embed(self, span: Span) -> Array:
        """What each token is, plus where it stands. A token is one column of one panel."""
        tokens = np.asarray(span.tokens, np.int64)  # [T]
        wte = self.wte[tokens // PANEL, :, tokens % PANEL]  # [T, n_embd]
        return wte + self.wpe[span.start : span.start + len(tokens)]

    def norm(self, x: Array, block: dict[str, Array], name: str) -> Array:
        epsilon = self.config.layer_norm_epsilon
        return layer_norm(x, block[f"{name}.weight"], block[f"{name}.bias"], epsilon)

    def attention(
        self, layer: int, block: dict[str, Array], x: Array, spans: Sequence[Span]
    ) -> Array:
        """Each token gathers from the tokens before it in its own text."""
        qkv = linear(x, block["attn.c_attn.weight"], block["attn.c_attn.bias"])  # [R, 3 * n_embd]
        y = np.empty_like(x)  # [R, n_embd]
        first = 0
        for span in spans:
            rows = slice(first, first + len(span.tokens))
            y[rows] = self.attend(layer, qkv[rows], span)
            first = rows.stop
        return linear(y, block["attn.c_proj.weight"], block["attn.c_proj.bias"])

    def attend(self, layer: int, qkv: Array, span: Span) -> Array:
        """The attention of one text. qkv [T, 3 * n_embd] -> [T, n_embd]"""
        n = self.config.n_embd
        parts = (qkv[:, :n], qkv[:, n : 2 * n], qkv[:, 2 * n :])  # np.split takes far longer
        q, k, v = (split_heads(part, self.config.n_head) for part in parts)
        kv = span.cache.kv[layer]  # [2, n_head, n_positions, head_size]
        stop = span.start + len(span.tokens)
        kv[0, :, span.start : stop] = k
        kv[1, :, span.start : stop] = v
        scores = attention_scores(q, kv[0, :, :stop], self.attention_scale(layer))
        return merge_heads(softmax(scores) @ kv[1, :, :stop])

    def attention_scale(self, layer: int) -> float:
        scale = 1.0
        if self.config.scale_attn_weights:
            scale /= math.sqrt(self.config.n_embd // self.config.n_head)
        if self.config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        return scale

    def mlp(self, block: dict[str, Array], x: Array) -> Array:
        """Each token by itself: to n_inner, the activation, and back. [T, n_embd] both ways"""
        hidden = linear(x, block["mlp.c_fc.weight"], block["mlp.c_fc.bias"])  # [T, n_inner]
        return linear(self.activation(hidden), block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])


def wanted_rows(x: Array, spans: Sequence[Span]) -> Array:
    """The last `wanted` rows of each span. [R, n_embd] -> [wanted, n_embd]"""
    wanted: list[int] = []
    stop = 0
    for span in spans:
        stop += len(span.tokens)
        wanted += range(stop - span.wanted, stop)
    return x[wanted]


# ------------------------------------------------------------------------------------------------
# 6. Choice
# ------------------------------------------------------------------------------------------------


TokenRule = Union[frozenset[int], Callable[[list[int]], Iterable[SupportsIndex]]]


class Options(NamedTuple):
    """How to choose tokens and when to stop, with the defaults.

    A model can have defaults of its own (`Config.generation`), which come before these.

    The filters act in the order of the transformers library: logit_bias, repetition_penalty,
    temperature, top_k, top_p, min_p; one token always remains.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8  # 0 is greedy: always the most probable token
    top_k: int = 40  # keep the k most probable tokens (Fan et al. 2018); 0 keeps all
    top_p: float = 1.0  # keep the fewest that hold this much probability (Holtzman et al. 2019)
    min_p: float = 0.0  # keep those with this fraction of the best one's probability
    repetition_penalty: float = 1.0  # divides the logits of tokens seen (Keskar et al. 2019)
    seed: Optional[int] = None  # the same seed, the same text; None takes a new one
    stop: Sequence[str] = ()  # texts that end the answer and are not part of it
    logit_bias: Optional[dict[int, float]] = None  # added to the logits of these tokens
    stop_token_ids: Sequence[int] = ()  # tokens that end the answer, beside the model's own
    bad_words: Sequence[tuple[int, ...]] = ()  # sequences of tokens that must not be completed
    allowed: Optional[TokenRule] = None  # the tokens that may be chosen, or a function of the ids
    regex: Optional[str] = None  # an expression that the whole answer must match
    max_time: float = math.inf  # seconds, after which no token is begun
    overflow: str = "stop"  # when the context is full: "stop", "error" or "shift"
    keep: int = 0  # how many tokens of the beginning a shift keeps
    num_beams: int = 1  # above 1: beam search, which needs temperature 0


def check_options(values: dict[str, Any], config: Config) -> Options:
    """Check options by name; None stands for the default. NumPy's numbers become Python's."""
    for name in values:
        if name not in Options._fields:
            raise InputError(f"option {name}: there is no such option{near_name(name)}")
    given = {name: value for name, value in config.generation.items() if name != "max_length"}
    given.update((name, value) for name, value in values.items() if value is not None)
    size = config.vocab_size
    return Options(**{name: check_option(name, given[name], size) for name in given})


def within_max_length(
    options: Options, values: dict[str, Any], config: Config, n_prompt: int
) -> Options:
    """Limit the answer to the model's own max_length, unless there is a max_new_tokens."""
    limit = config.generation.get("max_length")
    is_given = values.get("max_new_tokens") is not None or "max_new_tokens" in config.generation
    if limit is None or is_given:
        return options
    if n_prompt >= limit:
        found = f"the model's own limit is {limit} tokens, prompt included; found {n_prompt}"
        raise ContextError(f"max_length: {found} in the prompt; pass max_new_tokens")
    return options._replace(max_new_tokens=limit - n_prompt)


def check_option(name: str, value: Any, vocab_size: int) -> Any:
    """The value of one option, checked."""
    checks: dict[str, tuple[Callable[[Any], Any], str]] = {
        "max_new_tokens": (as_count, "a whole number from 0"),
        "temperature": (lambda v: as_number(v, 0, 1e6), "a number from 0 to 1e6"),
        "top_k": (as_count, "a whole number from 0 (0: all tokens)"),
        "top_p": (lambda v: as_number(v, 0, 1) or None, "above 0, at most 1"),
        "min_p": (lambda v: as_number(v, 0, 1), "a number from 0 to 1"),
        "repetition_penalty": (lambda v: as_number(v, 1e-6, 1e6), "a number from 1e-6 to 1e6"),
        "seed": (as_index, "a whole number or None"),
        "stop": (as_texts, "a text or a list of texts, none empty"),
        "logit_bias": (
            lambda v: as_biases(v, vocab_size),
            "a dict: token to a number up to 1e30, or -inf",
        ),
        "stop_token_ids": (lambda v: as_tokens(v, vocab_size), f"tokens below {vocab_size}"),
        "bad_words": (lambda v: as_words(v, vocab_size), "texts, or lists of tokens, none empty"),
        "allowed": (lambda v: as_rule(v, vocab_size), "tokens, or a function that returns tokens"),
        "regex": (lambda v: v if isinstance(v, str) else None, "a regular expression as a string"),
        "max_time": (lambda v: as_number(v, 0, math.inf), "a number of seconds from 0"),
        "overflow": (lambda v: v if v in OVERFLOWS else None, f"one of {OVERFLOWS}"),
        "keep": (as_count, "a whole number from 0"),
        "num_beams": (as_beam_count, f"a whole number from 1 to {MAX_BEAMS}"),
    }
    convert_value, expected = checks[name]
    checked = convert_value(value)
    if checked is None:
        raise InputError(f"option {name}: expected {expected}, found {quote(value)}")
    return checked


OVERFLOWS = ("stop", "error", "shift")
SAME_OPTION = {"max_tokens": "max_new_tokens", "max_length": "max_new_tokens"}


def near_name(name: str) -> str:
    """A hint at the option that an unknown name may mean, or the list of all."""
    import difflib

    near = difflib.get_close_matches(name, Options._fields, 1)
    guess = SAME_OPTION.get(name) or (near[0] if near else None)
    return f"; did you mean {guess}?" if guess else "; known are " + ", ".join(Options._fields)


def as_count(value: Any) -> Optional[int]:
    number = as_index(value)
    return number if number is not None and number >= 0 else None


MAX_BEAMS = 256  # each has a cache of its own


def as_beam_count(value: Any) -> Optional[int]:
    count = as_count(value)
    return count if count is not None and 1 <= count <= MAX_BEAMS else None


def as_number(value: Any, low: float, high: float) -> Optional[float]:
    """A real number in a range, NumPy's included, as a float; None for everything else."""
    import numbers

    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if low <= number <= high else None


def as_texts(value: Any) -> Optional[tuple[str, ...]]:
    texts = (value,) if isinstance(value, str) else value
    is_list = isinstance(texts, (list, tuple))
    return tuple(texts) if is_list and all(isinstance(t, str) and t for t in texts) else None


def as_tokens(value: Any, vocab_size: int) -> Optional[list[int]]:
    """Token ids from anything that holds them; None if it holds something else."""
    try:
        tokens = [as_index(item) for item in value]
    except TypeError:
        return None
    known = [token for token in tokens if token is not None and is_token(token, vocab_size)]
    return known if len(known) == len(tokens) and not isinstance(value, (str, bytes)) else None


def as_words(value: Any, vocab_size: int) -> Optional[tuple[tuple[int, ...], ...]]:
    """Sequences of tokens; the model has made such of texts before."""
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        return None
    words = [as_tokens(word, vocab_size) for word in value]
    return None if not all(words) else tuple(tuple(word or ()) for word in words)


def as_rule(value: Any, vocab_size: int) -> Optional[TokenRule]:
    if callable(value):
        rule: TokenRule = value
        return rule
    tokens = as_tokens(value, vocab_size)
    return None if tokens is None else frozenset(tokens)


def as_biases(value: Any, vocab_size: int) -> Optional[dict[int, float]]:
    if not isinstance(value, dict):
        return None
    biases: dict[int, float] = {}
    for key, bias in value.items():
        token, number = as_index(key), as_number(bias, -math.inf, 1e30)
        if token is None or not is_token(token, vocab_size) or number is None:
            return None
        biases[token] = number
    return biases


class Sampler:
    """How one answer chooses its tokens: the options, the seed, and the tokens seen so far.

    It has no random state: what is drawn depends on the seed, the position and the token alone.
    """

    def __init__(self, options: Options, seen: Iterable[int]) -> None:
        self.options = options
        fresh = int.from_bytes(os.urandom(4), "little")
        self.seed = fresh if options.seed is None else options.seed
        self.seen = set(seen)
        self.allowed: Optional[bytes] = None  # [vocab_size]: 0 rules a token out; None: all may
        self.prepared: Any = None  # what a backend has made of the options

    def copy(self) -> Sampler:
        sampler = Sampler(self.options._replace(seed=self.seed), self.seen)
        sampler.allowed = self.allowed
        return sampler


# Chance. The noise belongs to the place and not to a stream of random numbers: u(seed, position,
# token) is a hash of the three. So generating 5 and then 5 more tokens is generating 10, a text
# in a batch is the text alone, and logits that differ a little choose the same token nearly always.
#
# The hash is made of the mixing steps of SplitMix64 (Steele, Lea & Flood, "Fast Splittable
# Pseudorandom Number Generators", 2014): seed and position make a key, key and token a number.

MASK = 0xFFFFFFFFFFFFFFFF
GAMMA = 0x9E3779B97F4A7C15


def mix(z: Any) -> Any:
    """64 bits to 64 bits, each of which depends on all. An int, or an array of uint64."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def noise_key(seed: int, position: int) -> int:
    key: int = mix((mix((seed + GAMMA) & MASK) + (position + 1) * GAMMA) & MASK)
    return key


def gumbel_noise(seed: int, position: int, tokens: Array) -> Array:
    """-log(-log(u)) for a u in (0, 1) of each token. int64 [n] -> float64 [n]"""
    steps = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(GAMMA)
    hashes = mix(steps + np.uint64(noise_key(seed, position)))
    u = ((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(-np.log(u))


NO_CHOICE = -1  # in place of a token: every one is ruled out


def choose_token(logits: Array, sampler: Sampler, position: int) -> int:
    """The best token at temperature 0, else one drawn from those that the filters keep.

    The draw is the Gumbel-max trick: the largest of score / temperature + Gumbel noise is a draw
    in proportion to exp(score / temperature). The lower token wins a tie. float32 [vocab_size]
    """
    scores = adjust(logits, sampler)
    if scores.max() == -np.inf:
        return NO_CHOICE
    if sampler.options.temperature == 0:
        return int(scores.argmax())
    tokens, keys = draw_keys(scores, sampler, position)
    return int(tokens[keys.argmax()])


def draw_keys(scores: Array, sampler: Sampler, position: int) -> tuple[Array, Array]:
    """The tokens that the filters keep, and what the draw compares. -> int64 [n], float64 [n]"""
    options = sampler.options
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the best token alone
        scores = (scores - scores.max()) / options.temperature
    tokens = filter_tokens(scores, options)
    return tokens, scores[tokens] + gumbel_noise(sampler.seed, position, tokens)


def order_tokens(logits: Array, sampler: Sampler, position: int) -> list[int]:
    """All tokens that may be chosen, in the order of the choice; see `Logits.order`."""
    scores = adjust(logits, sampler)
    order = np.argsort(-scores, kind="stable")  # by score, of equals the lower token first
    order = order[scores[order] > -np.inf]
    if sampler.options.temperature == 0 or not len(order):
        return list(map(int, order))
    tokens, keys = draw_keys(scores, sampler, position)
    kept = tokens[np.argsort(-keys, kind="stable")]
    return list(map(int, [*kept, *order[~np.isin(order, kept)]]))


def adjust(logits: Array, sampler: Sampler) -> Array:
    """The logits with the bias and the repetition penalty. float32 -> float64 [vocab_size]"""
    options = sampler.options
    scores = logits.astype(np.float64)
    for token, bias in (options.logit_bias or {}).items():
        scores[token] += bias
    if options.repetition_penalty != 1 and sampler.seen:
        tokens = np.fromiter(sampler.seen, np.int64)
        s, penalty = scores[tokens], options.repetition_penalty
        with np.errstate(over="ignore"):  # a bias can be huge
            scores[tokens] = np.where(s < 0, s * penalty, s / penalty)
    if sampler.allowed is not None:
        scores[np.frombuffer(sampler.allowed, np.uint8) == 0] = -np.inf
    return scores


def filter_tokens(scores: Array, options: Options) -> Array:
    """The tokens that top_k, top_p and min_p keep, in rising order. float64 -> int64"""
    tokens = np.flatnonzero(scores > -np.inf)
    if 0 < options.top_k < len(tokens):
        least = np.partition(scores[tokens], -options.top_k)[-options.top_k]
        tokens = tokens[scores[tokens] >= least]
    if options.top_p == 1 and options.min_p == 0:
        return tokens
    tokens = tokens[np.argsort(-scores[tokens], kind="stable")]  # the most probable first
    p = softmax(scores[tokens])
    if options.top_p < 1:
        # Keep a token if it and all less probable tokens together have more than 1 - top_p.
        kept = max(1, int((np.cumsum(p[::-1])[::-1] > 1 - options.top_p).sum()))
        tokens, p = tokens[:kept], p[:kept]
    return np.sort(tokens[p >= options.min_p * p[0]])


# Constraints. Sets of tokens and bad words rule tokens out before the filters. An expression judges
# the tokens one by one, in the order of the choice, by the text that they would make.


def token_mask(size: int, tokens: Iterable[int]) -> bytearray:
    """[size]: 1 for these tokens, 0 for all others."""
    mask = bytearray(size)
    for token in tokens:
        mask[token] = 1
    return mask


def static_mask(options: Options, size: int) -> Optional[bytes]:
    """The tokens of `allowed`, if it is a set."""
    rule = options.allowed
    return None if rule is None or callable(rule) else bytes(token_mask(size, rule))


def allowed_mask(options: Options, static: Optional[bytes], session: Session) -> Optional[bytes]:
    """Which tokens may come next by `allowed` and `bad_words`; None if all may."""
    if not options.bad_words and not callable(options.allowed):
        return static
    text, size = session._tokens, session.model.config.vocab_size
    mask = bytearray(b"\1" * size if static is None else static)
    if callable(options.allowed):
        mask = token_mask(size, checked_tokens(options.allowed(list(text)), size))
    for word in options.bad_words:
        n = len(word) - 1
        if n <= len(text) and tuple(text[len(text) - n :]) == word[:-1]:
            mask[word[-1]] = 0
    return bytes(mask)


def checked_tokens(values: Any, size: int) -> list[int]:
    """Token ids that a caller's function returned."""
    tokens = as_tokens(values, size)
    if tokens is None:
        found = quote(values)
        raise InputError(f"option allowed: expected tokens below {size}, found {found}")
    return tokens


REGEX_TIMEOUT = 1.0  # seconds for one token

# The parts of a pattern that matter here; escapes, sets and comments hide what looks like one.
PATTERN_PARTS = re.compile(
    r"""\\(?P<escape>.)
    | \[\^?\]?(?:\\.|[^\]\\])*\]
    | \(\?\#[^)]*\)
    | (?P<group>\((?:\*|\?(?!P?<[A-Za-z_]|P=|\||(?:[aifLmsuw-]|V[01])*[:)])).{0,2})
    | (?P<fuzzy>\{(?=[^}]*[eids])[eids0-9<=+,\ ]+(?::[^}]*)?\})
    | (?P<possessive>(?:[*+?]|\{[0-9,]*\})\+)""",
    re.VERBOSE | re.DOTALL,
)
# Partial matching says "maybe" for ever after some of these, although no text can follow.
UNSUPPORTED = {
    "escape": "a word boundary, \\G, \\K or \\X",
    "group": "look-around, an atomic group, a condition, recursion, a verb, a flag b, e, p, r or x",
    "fuzzy": "a fuzzy match",
    "possessive": "a possessive quantifier",
}


class Expression:
    """A regular expression that a whole answer must match, tested token by token.

    The package `regex` tells whether a text can still become a match. Nothing is computed over
    the vocabulary.
    """

    def __init__(self, pattern: str) -> None:
        refuse_unsupported(pattern)
        try:
            regex = importlib.import_module("regex")
        except ImportError:
            advice = "`pip install regex` installs it"
            raise TinyGPT2Error(f"option regex: needs the package regex ({advice})") from None
        try:
            self.pattern = regex.compile(pattern)
        except (regex.error, RecursionError) as error:
            raise InputError(f"option regex: {error}, in {quote(pattern)}") from None
        self.kinds = character_kinds(regex, pattern)
        self.candidates: dict[bytes, str] = {}  # by the first bytes of a character
        self.text = ""  # the answer so far
        self.unfinished = b""  # the first bytes of a character

    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return not self.unfinished and self.match(self.text, False)

    def match(self, text: str, partial: bool) -> bool:
        """Whether a text matches, or with `partial`, whether it can become a match."""
        try:
            found = self.pattern.fullmatch(text, partial=partial, timeout=REGEX_TIMEOUT)
        except TimeoutError:
            found = f"one test took over {REGEX_TIMEOUT} s"
            text = f"option regex: {found}; a simpler expression is needed"
            raise ConstraintError(text) from None
        return found is not None

    def accepts(self, data: bytes) -> bool:
        """Whether the answer may go on with these bytes."""
        added, rest = split_utf8(self.unfinished + data)
        if added is None or not data:
            return False
        if not rest:
            return self.match(self.text + added, True)
        text = self.text + added
        if rest not in self.candidates:
            self.candidates[rest] = representatives(self.kinds, characters_from(rest))
        # What stood in the answer before can be asked for again, by a reference to a group.
        known = "".join(c for c in set(self.text) if c.encode().startswith(rest))
        return any(self.match(text + last, True) for last in self.candidates[rest] + known)

    def push(self, data: bytes) -> None:
        added, self.unfinished = split_utf8(self.unfinished + data)
        self.text += added or ""


def refuse_unsupported(pattern: str) -> None:
    """Refuse what cannot be tested token by token, by its name."""
    for part in PATTERN_PARTS.finditer(pattern):
        kind = part.lastgroup
        if kind is None or (kind == "escape" and part["escape"] not in "bBmMGKX"):
            continue
        found = f"{UNSUPPORTED[kind]}, {quote(part[0])}"
        raise InputError(f"option regex: {found}, cannot be tested token by token; leave it out")


def split_utf8(data: bytes) -> tuple[Optional[str], bytes]:
    """The characters in data, and the bytes of one that is unfinished; None for invalid UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return None, b""
    return text, decoder.getstate()[0]


def characters_from(start: bytes) -> str:
    """All characters whose UTF-8 begins with these bytes, of which at least one is missing."""
    length = 2 if start[0] < 0xE0 else 3 if start[0] < 0xF0 else 4
    prefix = start[0] & 0xFF >> length + 1
    for byte in start[1:]:
        prefix = prefix << 6 | byte & 0x3F
    shift = 6 * (length - len(start))
    lowest = {2: 0x80, 3: 0x800, 4: 0x10000}[length]
    codes = range(max(prefix << shift, lowest), min((prefix + 1) << shift, 0x110000))
    # Much faster than `chr` for each code. Surrogates are no characters, and so ignored.
    return struct.pack(f"<{len(codes)}I", *codes).decode("utf-32-le", "ignore")


# What matches a single character in a pattern: an escape, a set, a dot, a literal beyond ASCII.
ONE_CHARACTER = re.compile(
    r"\\(?:[pPN]\{[^}]*\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|0[0-7]?|.)"
    r"|\[\^?\]?(?:\\.|[^\]\\])*\]|\.|[^\x00-\x7f]",
    re.DOTALL,
)


def character_kinds(regex: Any, pattern: str) -> Optional[list[Any]]:
    """Patterns of every kind of character in a pattern; None if they cannot be told apart."""
    kinds: list[Any] = [regex.compile("(?i)[ks]")]  # these letters match others beyond ASCII
    for kind in set(ONE_CHARACTER.findall(pattern)):
        for flags in ("(?s)", "(?i)"):
            try:
                kinds.append(regex.compile(flags + kind))
            except regex.error:
                if not re.fullmatch(r"\\[0-9AZgk]", kind):  # positions, and references to groups
                    return None
    return None if "(?V1" in pattern or "[[" in pattern else kinds


def representatives(kinds: Optional[list[Any]], characters: str) -> str:
    """One of the characters of each kind: if none of these fits at a place, then none does."""
    if kinds is None:
        return characters
    found = (kind.search(characters) for kind in kinds)
    return "".join({match[0] for match in found if match and match[0]})


# ------------------------------------------------------------------------------------------------
# 7. Text
# ------------------------------------------------------------------------------------------------


class Timings(NamedTuple):
    """What an answer took. In a batch, other texts share the time."""

    prompt_tokens: int
    new_tokens: int
    seconds_to_first_token: Optional[float]
    seconds: float


class Result(NamedTuple):
    """A finished answer."""

    text: Optional[str]  # None for a model without a tokenizer
    ids: list[int]  # its tokens, those of a stop text included
    finish_reason: str  # see `Session`
    seed: int  # with which it can be repeated
    logprobs: Optional[list[float]]  # of each token, before temperature and filters; None: unknown
    top_logprobs: Optional[list[list[tuple[int, float]]]]  # at each token the n best, as asked for
    timings: Timings


class Score(NamedTuple):
    """How well a model predicts a text. Natural logarithms."""

    ids: list[int]
    logprobs: list[Optional[float]]  # one for each token; None for a first token without context
    n_bytes: Optional[int]  # of the text in UTF-8; None for a model without a tokenizer
    ranks: Optional[list[Optional[int]]] = None  # how many tokens were more probable, if asked for
    top_logprobs: Optional[list[list[tuple[int, float]]]] = None  # the best tokens at each place

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


class Ranked(NamedTuple):
    """An ending of a prompt, and how probable it is. Natural logarithms."""

    ending: str
    number: int  # its place among the endings that were passed
    total: float
    ids: list[int]
    logprobs: list[float]


class TokenScore(NamedTuple):
    """What the logits before a token say of it."""

    logprob: float
    rank: Optional[int]
    best: Sequence[tuple[int, float]]


class Window(NamedTuple):
    """Tokens of which those from index `first` on are scored, given all before them."""

    tokens: list[int]
    first: int
    session: Optional[Session] = None  # has the tokens before, computed; it is used up


SESSION_CLOSED = "session: it or its model is closed; open a new one"
MODEL_CLOSED = "model: it is closed; load it again"
CHANGED = "session: it was changed while a stream was open"


class GenerateMethods:
    """The methods that `Model` and `Session` share: every way to get an answer.

    A model answers each prompt in a session of its own. A session appends the prompt to its text,
    and then the answer. In a prompt of text, special tokens count as such only if `special` is set.
    `Options` explains the other options; None stands for an option's default. Wrong arguments are
    an `InputError` when the method is called, also where an iterator is returned. (A logit_bias
    that forbids every token is only noticed when a token is chosen.)
    """

    def start(
        self,
        prompt: Prompt,
        special: bool,
        options: Sequence[Any],
        unknown: dict[str, NoReturn],
        as_text: bool = False,
        logprobs: Optional[SupportsIndex] = None,
    ) -> Answer:
        """Check the arguments and begin an answer. `options` are in the order of `Options`."""
        values = {**dict(zip(Options._fields, options)), **unknown}
        return self.begin(prompt, special, values, as_text, logprobs)

    def begin(
        self,
        prompt: Prompt,
        special: bool,
        values: dict[str, Any],
        as_text: bool,
        logprobs: Optional[SupportsIndex],
    ) -> Answer:
        """An answer to `prompt`. `as_text`: its text is needed. `logprobs`: how many alternatives
        to record with the log-probability of each token; None records nothing."""
        session, own = self.answering()
        tokens = session.model.tokens_of(prompt, special, not len(session))
        return session._begin(tokens, values, as_text, logprobs, own)

    def answering(self) -> tuple[Session, bool]:
        """The session that answers, and whether it was made for this answer alone."""
        raise NotImplementedError

    def generate(
        self,
        prompt: Prompt = (),
        *,
        max_new_tokens: Optional[SupportsIndex] = None,
        temperature: Optional[Number] = None,
        top_k: Optional[SupportsIndex] = None,
        top_p: Optional[Number] = None,
        min_p: Optional[Number] = None,
        repetition_penalty: Optional[Number] = None,
        seed: Optional[SupportsIndex] = None,
        stop: Union[str, Sequence[str], None] = None,
        logit_bias: Optional[dict[int, float]] = None,
        stop_token_ids: Optional[Iterable[SupportsIndex]] = None,
        bad_words: Optional[Iterable[Prompt]] = None,
        allowed: Optional[Allowed] = None,
        regex: Optional[str] = None,
        max_time: Optional[Number] = None,
        overflow: Optional[Literal["stop", "error", "shift"]] = None,
        keep: Optional[SupportsIndex] = None,
        num_beams: Optional[SupportsIndex] = None,
        special: bool = False,
        **unknown: NoReturn,
    ) -> str:
        """The text that follows `prompt` (text or token ids), without it."""
        options = (max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
        rules = (stop, logit_bias, stop_token_ids, bad_words, allowed, regex)
        choices = (*options, *rules, max_time, overflow, keep, num_beams)
        return "".join(self.start(prompt, special, choices, unknown, as_text=True))

    def stream(
        self,
        prompt: Prompt = (),
        *,
        max_new_tokens: Optional[SupportsIndex] = None,
        temperature: Optional[Number] = None,
        top_k: Optional[SupportsIndex] = None,
        top_p: Optional[Number] = None,
        min_p: Optional[Number] = None,
        repetition_penalty: Optional[Number] = None,
        seed: Optional[SupportsIndex] = None,
        stop: Union[str, Sequence[str], None] = None,
        logit_bias: Optional[dict[int, float]] = None,
        stop_token_ids: Optional[Iterable[SupportsIndex]] = None,
        bad_words: Optional[Iterable[Prompt]] = None,
        allowed: Optional[Allowed] = None,
        regex: Optional[str] = None,
        max_time: Optional[Number] = None,
        overflow: Optional[Literal["stop", "error", "shift"]] = None,
        keep: Optional[SupportsIndex] = None,
        num_beams: Optional[SupportsIndex] = None,
        special: bool = False,
        logprobs: Optional[SupportsIndex] = None,
        **unknown: NoReturn,
    ) -> Answer:
        """The same piece by piece. No piece ends inside a character or inside a stop text."""
        options = (max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
        rules = (stop, logit_bias, stop_token_ids, bad_words, allowed, regex)
        choices = (*options, *rules, max_time, overflow, keep, num_beams)
        return self.start(prompt, special, choices, unknown, True, logprobs)

    def astream(
        self,
        prompt: Prompt = (),
        *,
        max_new_tokens: Optional[SupportsIndex] = None,
        temperature: Optional[Number] = None,
        top_k: Optional[SupportsIndex] = None,
        top_p: Optional[Number] = None,
        min_p: Optional[Number] = None,
        repetition_penalty: Optional[Number] = None,
        seed: Optional[SupportsIndex] = None,
        stop: Union[str, Sequence[str], None] = None,
        logit_bias: Optional[dict[int, float]] = None,
        stop_token_ids: Optional[Iterable[SupportsIndex]] = None,
        bad_words: Optional[Iterable[Prompt]] = None,
        allowed: Optional[Allowed] = None,
        regex: Optional[str] = None,
        max_time: Optional[Number] = None,
        overflow: Optional[Literal["stop", "error", "shift"]] = None,
        keep: Optional[SupportsIndex] = None,
        num_beams: Optional[SupportsIndex] = None,
        special: bool = False,
        logprobs: Optional[SupportsIndex] = None,
        **unknown: NoReturn,
    ) -> AsyncAnswer:
        """The same for `async for`. The computing is done in a thread of the loop's executor."""
        options = (max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
        rules = (stop, logit_bias, stop_token_ids, bad_words, allowed, regex)
        choices = (*options, *rules, max_time, overflow, keep, num_beams)
        answer = self.start(prompt, special, choices, unknown, True, logprobs)
        return AsyncAnswer(answer)

    def complete(
        self,
        prompt: Prompt = (),
        *,
        max_new_tokens: Optional[SupportsIndex] = None,
        temperature: Optional[Number] = None,
        top_k: Optional[SupportsIndex] = None,
        top_p: Optional[Number] = None,
        min_p: Optional[Number] = None,
        repetition_penalty: Optional[Number] = None,
        seed: Optional[SupportsIndex] = None,
        stop: Union[str, Sequence[str], None] = None,
        logit_bias: Optional[dict[int, float]] = None,
        stop_token_ids: Optional[Iterable[SupportsIndex]] = None,
        bad_words: Optional[Iterable[Prompt]] = None,
        allowed: Optional[Allowed] = None,
        regex: Optional[str] = None,
        max_time: Optional[Number] = None,
        overflow: Optional[Literal["stop", "error", "shift"]] = None,
        keep: Optional[SupportsIndex] = None,
        num_beams: Optional[SupportsIndex] = None,
        special: bool = False,
        logprobs: Optional[SupportsIndex] = 0,
        **unknown: NoReturn,
    ) -> Result:
        """The answer with what is known of it. Without a tokenizer its text is None."""
        options = (max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
        rules = (stop, logit_bias, stop_token_ids, bad_words, allowed, regex)
        choices = (*options, *rules, max_time, overflow, keep, num_beams)
        return self.start(prompt, special, choices, unknown, False, logprobs).result()

    def generate_ids(
        self,
        prompt: Prompt = (),
        *,
        max_new_tokens: Optional[SupportsIndex] = None,
        temperature: Optional[Number] = None,
        top_k: Optional[SupportsIndex] = None,
        top_p: Optional[Number] = None,
        min_p: Optional[Number] = None,
        repetition_penalty: Optional[Number] = None,
        seed: Optional[SupportsIndex] = None,
        stop: Union[str, Sequence[str], None] = None,
        logit_bias: Optional[dict[int, float]] = None,
        stop_token_ids: Optional[Iterable[SupportsIndex]] = None,
        bad_words: Optional[Iterable[Prompt]] = None,
        allowed: Optional[Allowed] = None,
        regex: Optional[str] = None,
        max_time: Optional[Number] = None,
        overflow: Optional[Literal["stop", "error", "shift"]] = None,
        keep: Optional[SupportsIndex] = None,
        num_beams: Optional[SupportsIndex] = None,
        special: bool = False,
        **unknown: NoReturn,
    ) -> list[int]:
        """The token ids that follow `prompt`, those of a stop text included."""
        options = (max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
        rules = (stop, logit_bias, stop_token_ids, bad_words, allowed, regex)
        choices = (*options, *rules, max_time, overflow, keep, num_beams)
        return list(self.start(prompt, special, choices, unknown).each_id())

    def stream_ids(
        self,
        prompt: Prompt = (),
        *,
        max_new_tokens: Optional[SupportsIndex] = None,
        temperature: Optional[Number] = None,
        top_k: Optional[SupportsIndex] = None,
        top_p: Optional[Number] = None,
        min_p: Optional[Number] = None,
        repetition_penalty: Optional[Number] = None,
        seed: Optional[SupportsIndex] = None,
        stop: Union[str, Sequence[str], None] = None,
        logit_bias: Optional[dict[int, float]] = None,
        stop_token_ids: Optional[Iterable[SupportsIndex]] = None,
        bad_words: Optional[Iterable[Prompt]] = None,
        allowed: Optional[Allowed] = None,
        regex: Optional[str] = None,
        max_time: Optional[Number] = None,
        overflow: Optional[Literal["stop", "error", "shift"]] = None,
        keep: Optional[SupportsIndex] = None,
        num_beams: Optional[SupportsIndex] = None,
        special: bool = False,
        **unknown: NoReturn,
    ) -> Iterator[int]:
        """The same ids one by one."""
        options = (max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
        rules = (stop, logit_bias, stop_token_ids, bad_words, allowed, regex)
        choices = (*options, *rules, max_time, overflow, keep, num_beams)
        return self.start(prompt, special, choices, unknown).each_id()


Event = tuple[Optional[int], str]  # a new token, if there is one, and the text that it releases


class Answer:
    """An answer while it is made: an iterator over the pieces of its text.

    `ids` and `seed` can be read at any time; `finish_reason` is None until the answer has ended.
    Any thread may `cancel` it.
    """

    def __init__(
        self,
        session: Session,
        sampler: Sampler,
        own_session: bool,
        n_alternatives: Optional[int],
    ):
        options, config = sampler.options, session.model.config
        self.session = session
        self.sampler = sampler
        self.seed = sampler.seed
        self.ids: list[int] = []
        self.finish_reason: Optional[str] = None
        self.logprobs: Optional[list[float]] = None if n_alternatives is None else []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self._n_alternatives = n_alternatives or 0
        self._own_session = own_session
        self._is_cancelled = False
        self._error: Optional[TinyGPT2Error] = None
        self._times = [time.monotonic()]  # when it was begun, and when its tokens were there
        self.beams: list[Beam] = []  # of a beam search: those that finished, the best first
        self._ends = dict.fromkeys(options.stop_token_ids, "stop")
        self._ends.update(dict.fromkeys(config.eos_token_ids, "end"))
        self._allowed = static_mask(options, config.vocab_size)
        self._expression = None if options.regex is None else Expression(options.regex)
        self._n_before = session.position
        self._n_prompt = len(session)
        self._change = session._change
        self._tokenizer = session.model.tokenizer
        self._output = TextOutput(sampler.options.stop, session._last_bytes())
        self._pieces: list[str] = []
        self._events: list[Event] = []
        self._is_broken = False  # whether an interrupt or an error ended its last step halfway

    def __iter__(self) -> Answer:
        return self

    def __reduce__(self) -> NoReturn:
        raise stays_here("stream", "pickle its `ids`, or the pieces of its text")

    def __next__(self) -> str:
        while True:
            event = self.step()
            if event is None:
                raise StopIteration
            if event[1]:
                return event[1]

    def each_id(self) -> Iterator[int]:
        """The token ids, each as soon as it is chosen."""
        while True:
            event = self.step()
            if event is None:
                return
            if event[0] is not None:
                yield event[0]

    def step(self) -> Optional[Event]:
        """Compute one more token. At the end comes the rest of the text without one, then None."""
        if self._has_ended() and not self._events:
            return None
        with Turn(self.session):
            if not self._events:
                self._compute_event()
            event = self._events.pop(0)
        if self._own_session and self._has_ended() and not self._events:
            self.session.close()
        return event

    def _compute_event(self) -> None:
        """Take as many steps of the loop as it needs for one more event."""
        if self._has_ended():
            raise StateError("stream: another thread has taken its end")
        self._check_unchanged()
        self._is_broken = True
        while not self._events:
            advance(self.session.model, [self])
            self._raise_error()
        self._is_broken = False

    def _raise_error(self) -> None:
        """Raise the error that ended this answer, if there is one."""
        error = self._error
        if error is not None:
            raise error

    def cancel(self) -> None:
        """End the answer with the finish reason "cancelled", soon after this call.

        A step that another thread is computing ends within some 20 ms, also inside a long prompt.
        """
        self._is_cancelled = True

    def goes_on(self) -> bool:
        """Whether somebody still wants the answer."""
        return not self._is_cancelled

    def result(self) -> Result:
        """Compute the answer to its end and return it whole."""
        self._raise_error()
        while self.step():
            pass
        text = "".join(self._pieces) if self._tokenizer else None
        reason = self.finish_reason or ""
        alternatives = self.top_logprobs if self._n_alternatives else None
        figures = self.timings()
        return Result(text, self.ids, reason, self.seed, self.logprobs, alternatives, figures)

    def results(self, n: int) -> list[Result]:
        """The n best beams of a search, fewer if fewer have finished."""
        best = self.result()
        decode = self._tokenizer.decode if self._tokenizer else None
        others = [
            best._replace(
                text=decode(beam.ids) if decode else None,
                ids=beam.ids,
                logprobs=None if best.logprobs is None else beam.logprobs,
                finish_reason=beam.finish_reason,
                timings=best.timings._replace(new_tokens=len(beam.ids)),
            )
            for beam in self.beams[1:n]
        ]
        return [best, *others] if self.beams else [best] * n

    def timings(self) -> Timings:
        begun, now = self._times[0], self._times[-1]
        first = self._times[1] - begun if self.ids else None
        return Timings(self._n_prompt, len(self.ids), first, now - begun)

    def _has_ended(self) -> bool:
        return self.finish_reason is not None

    def is_done(self) -> bool:
        """Whether it has ended, or an error has ended it."""
        return self._has_ended() or self._error is not None

    def _check_unchanged(self) -> None:
        """Raise if the session is not as this answer left it, or if its last step did not end."""
        if self._is_broken:
            raise StateError("stream: an error or an interrupt ended it; start a new one")
        expected = self._n_before + len(self.ids)
        if self.session._change != self._change or self.session.position != expected:
            raise StateError(CHANGED)

    def end_if_over(self) -> bool:
        """End the answer if no token may follow; whether it has ended."""
        options = self.sampler.options
        if self._is_cancelled:
            self._end("cancelled")
        elif options.num_beams > 1:
            self._take_beams()
        elif len(self.ids) >= options.max_new_tokens:
            self._end("length")
        elif self._is_late():
            self._end("time")
        elif self.session._is_full():
            self._overflow(options)
        return self.is_done()

    def _is_late(self) -> bool:
        return time.monotonic() - self._times[0] >= self.sampler.options.max_time

    def _take_beams(self) -> None:
        """The best beam of a search is the answer."""
        with contextlib.suppress(CancelError):
            self.beams = beam_search(self)
        if not self.beams:  # no token was asked for, or the search was cancelled
            self._end("cancelled" if self._is_cancelled else "length")
            return
        best = self.beams[0]
        for token, logprob in zip(best.ids, best.logprobs):
            if self.logprobs is not None:
                self.logprobs.append(logprob)
            self._append(token)
        if not self._has_ended():
            self._end(best.finish_reason)

    def _append(self, token: int) -> None:
        """Take over a token that was chosen."""
        self.session._push(token)
        self.sampler.seen.add(token)
        self.ids.append(token)
        self._times.append(time.monotonic())
        self._events.append((token, self._show(token)))

    def _overflow(self, options: Options) -> None:
        """The context is full: end, or make room."""
        if options.overflow == "shift":
            self.session._shift(options.keep)
            self.sampler.seen = set(self.session._tokens)  # as an answer that began here has them
        elif options.overflow == "error":
            positions = self.session.model.config.n_positions
            found = f"all {positions} positions are used"
            self._error = ContextError(f"context: {found}; shorten the text, or let it shift")
        else:
            self._end("context")

    def take(self, logits: Logits, row: int) -> None:
        """Choose the token after these logits; append it, or end the answer."""
        session = self.session
        try:
            with naming_position(session.model, len(session) - 1):
                token = self._choose(logits, row)
        except TinyGPT2Error as error:
            self._error = self._with_answer(error)
            return
        if token == NO_CHOICE or token in self._ends:
            session._logits = logits.keep(row)
            self._end(self._ends.get(token, "end"))
            return
        if self.logprobs is not None:
            self.logprobs.append(logits.logprob(row, token))
        if self._n_alternatives:
            self.top_logprobs.append(logits.top(row, self._n_alternatives))
        self._append(token)

    def _choose(self, logits: Logits, row: int) -> int:
        """The next token, or NO_CHOICE if the answer is complete and nothing can follow."""
        sampler, session = self.sampler, self.session
        sampler.allowed = allowed_mask(sampler.options, self._allowed, session)
        expression = self._expression
        if expression is None:
            token = logits.choose(row, sampler, session.position)
        else:
            token = self._first_that_fits(expression, logits, row)
        if token == NO_CHOICE and not (expression and expression.is_complete()):
            raise self._no_way_on()
        return token

    def _text(self) -> str:
        """The text of the tokens so far, what is held back included."""
        return self._tokenizer.decode(self.ids) if self._tokenizer else ""

    def _with_answer(self, error: TinyGPT2Error) -> TinyGPT2Error:
        """The error, which has the answer so far if it is one of constraints."""
        if isinstance(error, ConstraintError):
            return ConstraintError(error.message, self._text(), self.ids)
        return error

    def _no_way_on(self) -> ConstraintError:
        """The error of an answer that is not complete, and that no token can follow."""
        text = self._text()
        names = ("regex", "allowed", "bad_words", "logit_bias")
        options, plain = self.sampler.options, Options()
        given = [name for name in names if getattr(options, name) != getattr(plain, name)]
        found = f"no token can follow {quote(text)}" if self.ids else "no token can begin it"
        advice = "a model can be led into a corner; loosen them, or take another seed"
        return ConstraintError(f"options {', '.join(given)}: {found} ({advice})")

    def _first_that_fits(self, expression: Expression, logits: Logits, row: int) -> int:
        """Of the tokens in the order of the choice, the first after which a match is possible."""
        session, done = self.session, 0
        for n in (16, 1024, session.model.config.vocab_size):
            order = logits.order(row, self.sampler, session.position, n)
            for token in order[done:]:
                if self._is_cancelled or self._is_late():  # to try them all can take seconds
                    raise CancelError
                if self._fits(expression, token):
                    return token
            done = len(order)
        return NO_CHOICE

    def _fits(self, expression: Expression, token: int) -> bool:
        if token in self._ends:
            return expression.is_complete()
        return expression.accepts(self.session.model.need_tokenizer().token_bytes(token))

    def _show(self, token: int) -> str:
        """The text that a new token releases. A stop text ends the answer."""
        if self._tokenizer is None:
            return ""
        data = self._tokenizer.token_bytes(token)
        if self._expression is not None:
            self._expression.push(data)
        piece = self._output.push(data)
        if self._output.stopped:
            self._set_reason("stop")
        self._pieces.append(piece)
        return piece

    def _end(self, reason: str) -> None:
        """End the answer; what was held back of its text is certain now."""
        piece = self._output.finish()
        self._pieces.append(piece)
        self._events.append((None, piece))
        self._set_reason("stop" if self._output.stopped else reason)

    def _set_reason(self, reason: str) -> None:
        self.finish_reason = self.session.finish_reason = reason


def advance(model: Model, answers: Sequence[Answer]) -> None:
    """One step of the loop that makes a language model talk.

    One pass computes what the caches of all texts lack, as far as it has room; then every text
    whose last token it has reached gets its next token. A long prompt takes several steps. The
    caller has the turn of every session.
    """
    active = [answer for answer in answers if not answer.end_if_over()]
    if not active:
        return
    sessions = [answer.session for answer in active]

    def goes_on() -> bool:
        return any(answer.goes_on() for answer in active)

    with model.workspace() as workspace, contextlib.suppress(CancelError):
        rows = compute(model.backend, workspace, sessions, goes_on)
        for answer, row in zip(active, rows):
            if row is not None and answer.goes_on():
                answer.take(*row)


class Beam(NamedTuple):
    """One of the texts that a beam search follows. `score`: of all logprobs, or their mean when it
    has finished."""

    score: float
    ids: list[int]
    logprobs: list[float]
    session: Any  # of a running one: its text without the last of `ids`; None when it has finished
    finish_reason: str = ""


NOT_WITH_BEAMS = (
    *("top_k", "top_p", "min_p", "repetition_penalty", "stop", "logit_bias", "bad_words"),
    *("allowed", "regex", "max_time", "overflow", "keep"),
)


def beam_options(values: dict[str, Any], options: Options) -> Options:
    """Refuse what a beam search does not do. It is not random, so its temperature is 0."""
    if values.get("temperature"):
        raise InputError("option num_beams: beams are not drawn; leave temperature out")
    for name in NOT_WITH_BEAMS:
        is_own = name == "repetition_penalty"  # a model's own filters change no beam, but this does
        value, plain = getattr(options, name), getattr(Options(), name)
        if (is_own or values.get(name) is not None) and value != plain:
            advice = f"leave one of the two out, or pass {name}={plain!r}"
            raise InputError(f"option num_beams: beams have no {name}; {advice}")
    return options._replace(temperature=0.0)


def beam_search(answer: Answer) -> list[Beam]:
    """The best continuations by the mean log-probability of their tokens, the best first.

    As transformers does it, with a length penalty of 1 and without early stopping: the search ends
    when `num_beams` texts have finished and the best running one is behind all of them.
    """
    session, options = answer.session, answer.sampler.options
    n_beams = options.num_beams
    room = session.model.config.n_positions + 1 - len(session)
    limit = min(options.max_new_tokens, room)
    cut = "length" if limit == options.max_new_tokens else "context"
    running = [Beam(0.0, [], [], session._fork())] if limit > 0 else []
    finished: list[Beam] = []
    while running:
        n_new = len(running[0].ids) + 1
        best = best_continuations(answer, running, max(2, 1 + len(answer._ends)) * n_beams)
        over = [answer._ends.get(beam.ids[-1], cut * (n_new == limit)) for beam in best]
        for beam, reason in list(zip(best, over))[:n_beams]:
            if reason:
                n_kept = n_new if reason == cut else n_new - 1  # end tokens are left out
                ids, logprobs = beam.ids[:n_kept], beam.logprobs[:n_kept]
                finished.append(Beam(beam.score / n_new, ids, logprobs, None, reason))
        finished = sorted(finished, key=lambda beam: -beam.score)[:n_beams]
        running = next_beams([beam for beam, reason in zip(best, over) if not reason][:n_beams])
        is_full = len(finished) == n_beams
        if running and is_full and running[0].score / n_new <= finished[-1].score:
            break
    return finished


def best_continuations(answer: Answer, beams: Sequence[Beam], n: int) -> list[Beam]:
    """The n best of all beams with one more token. Their sessions are still those of the beams."""
    model = answer.session.model
    n_best = min(n, model.config.vocab_size)
    candidates: list[Beam] = []
    waiting = list(beams)
    with model.workspace() as workspace:
        while waiting:
            sessions = [beam.session for beam in waiting]
            rows = compute(model.backend, workspace, sessions, answer.goes_on)
            for beam, row in zip(waiting, rows):
                for token, logprob in row[0].top(row[1], n_best) if row is not None else ():
                    ids, logprobs = [*beam.ids, token], [*beam.logprobs, logprob]
                    candidates.append(Beam(beam.score + logprob, ids, logprobs, beam.session))
            waiting = [beam for beam, row in zip(waiting, rows) if row is None]
    return sorted(candidates, key=lambda beam: -beam.score)[:n]


def next_beams(beams: Sequence[Beam]) -> list[Beam]:
    """Beams with sessions of their own, to which their last tokens are appended. The last one that
    comes from a session takes it over."""
    sessions: list[Session] = []
    for number, beam in enumerate(beams):
        parent = beam.session
        is_last = all(other.session is not parent for other in beams[number + 1 :])
        sessions.append(parent if is_last else parent._fork())
    for session, beam in zip(sessions, beams):
        session._push(beam.ids[-1])
    return [beam._replace(session=session) for session, beam in zip(sessions, beams)]


def run_all(answers: Iterator[tuple[int, Answer]], batch_size: int) -> Iterator[tuple[int, Answer]]:
    """Compute numbered answers of one model, `batch_size` at a time; the next begins when one ends.

    Yields them in the order in which they end. Every text is what it is alone, to the bit in C.
    """
    active: list[tuple[int, Answer]] = []
    while True:
        active += itertools.islice(answers, batch_size - len(active))
        if not active:
            return
        advance(active[0][1].session.model, [answer for _, answer in active])
        yield from [entry for entry in active if entry[1].is_done()]
        active = [entry for entry in active if not entry[1].is_done()]


def positive(name: str, value: object) -> int:
    count = as_count(value)
    if not count:
        raise InputError(f"{name}: expected a whole number from 1, found {quote(value)}")
    return count


def prompt_list(name: str, prompts: Any) -> list[Any]:
    """Several texts. A single one would be taken for its letters."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise InputError(f"{name}: expected a list of texts, found {quote(prompts)}")
    return list(prompts)


@contextlib.contextmanager
def naming_prompt(number: int) -> Iterator[None]:
    """Say in an error to which prompt of a batch it belongs."""
    try:
        yield
    except InputError as error:
        text = f"prompts[{number}]: {error}"
        if isinstance(error, ConstraintError):
            raise ConstraintError(text, error.text, error.ids) from None
        raise type(error)(text) from None


def batch_seeds(seed: Any, n: int) -> list[Any]:
    """A seed for each of n prompts."""
    if seed is None or as_index(seed) is not None:
        return [seed] * n
    seeds = list(seed) if isinstance(seed, Iterable) and not isinstance(seed, str) else []
    if len(seeds) != n:
        found = quote(seed)
        raise InputError(f"seed: expected one, or a list of {n} for {n} prompts, found {found}")
    return seeds


def derived_seeds(seed: Any, n: int) -> list[Any]:
    """The seeds of n answers to one prompt. What is not a number is left to `check_options`."""
    first = as_index(seed)
    if first is None:
        return [seed] * n
    return [first, *(noise_key(first, -number) for number in range(1, n))]


class AsyncAnswer:
    """The pieces of an answer for `async for`, each computed in a thread of the loop's executor.

    A task that is cancelled while it waits for a piece cancels the answer, too. When it has ended,
    no thread uses the session any more.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def __aiter__(self) -> AsyncAnswer:
        return self

    async def __anext__(self) -> str:
        import asyncio

        unclaimed = [None]  # what a thread takes before it begins: removing it is one step
        step = asyncio.get_running_loop().run_in_executor(None, self.next_piece, unclaimed)
        try:
            piece = await asyncio.shield(step)
        except asyncio.CancelledError:
            self.answer.cancel()
            if is_claimed(unclaimed):
                step.cancel()  # all threads were busy with other things
            while not step.done():  # soon; a task can be cancelled several times
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([step])
            if not step.cancelled():
                step.exception()  # or else the loop complains that nobody has seen it
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    def next_piece(self, unclaimed: list[None]) -> Optional[str]:
        """None at the end, as StopIteration cannot pass through a future."""
        return next(self.answer, None) if is_claimed(unclaimed) else None

    async def aclose(self) -> None:
        """End the answer. A thread that computes a piece of it ends soon after this call."""
        self.answer.cancel()
        with contextlib.suppress(TinyGPT2Error):  # raised if it was ended by one
            while self.answer.step():
                pass


def is_claimed(unclaimed: list[None]) -> bool:
    """Whether this caller is the first to take what is in the list."""
    try:
        unclaimed.pop()
    except IndexError:
        return False
    return True


@contextlib.contextmanager
def naming_position(model: Model, position: int) -> Iterator[None]:
    """Say in a `NumericError` which file it is and how far the text was computed."""
    try:
        yield
    except NumericError as error:
        causes = "its weights are damaged (`info --verify` checks a file) or out of float32's range"
        place = f"{show_path(model.path)}: {error} by position {position}"
        raise NumericError(f"{place}: {causes}") from None


Row = tuple[Any, int]  # logits, and the row of them that belongs to a text


def compute(
    backend: Backend, workspace: Any, sessions: Sequence[Session], goes_on: GoesOn = always
) -> list[Optional[Row]]:
    """One pass over the texts. For each: the logits after its last token, or None if the pass had
    no room to reach it."""
    spans: list[Optional[Span]] = []
    capacity = backend.chunk
    for session in sessions:
        span = session._next_span(capacity)
        spans.append(span)
        capacity -= len(span.tokens) if span else 0
    present = [span for span in spans if span is not None]
    logits = backend.forward(workspace, present, goes_on) if present else None
    rows: list[Optional[Row]] = []
    n_wanted = 0
    for session, span in zip(sessions, spans):
        if span is None:
            kept = session._logits
            rows.append(None if kept is None else (backend.kept(workspace, kept), 0))
            continue
        span.cache.length = span.start + len(span.tokens)
        rows.append((logits, n_wanted) if span.wanted else None)
        n_wanted += span.wanted
    return rows


class Turn:
    """One caller's turn with a session: `with Turn(session): ...`. A second caller is refused.

    A lock would do, were it not for Ctrl-C: an interrupt that arrives between the locking and the
    `with` block would leave the session locked for ever. So a turn is a list entry that is valid
    while this object exists. An interrupted call releases the object, and so the turn. The first
    valid entry has the turn: appending to a list is one step for all threads.
    """

    def __init__(self, session: Session) -> None:
        self.claims = session._claims
        self.session = session
        self.life = {object()}  # a set, as it allows weak references also when compiled

    def __enter__(self) -> None:
        frame = sys._getframe()
        self.claims.append(
            (weakref.ref(self.life), threading.get_ident(), id(frame.f_back or frame))
        )
        del frame  # it holds itself, and so this turn and its session until a garbage collection
        if first_living(self.claims) is not self.life:
            self.__exit__()
            raise StateError("session: in use by another thread; give each thread its own")
        if self.session.closed or self.session.model.closed:
            self.__exit__()
            raise StateError(SESSION_CLOSED)

    def __exit__(self, *_: object) -> None:
        for claim in list(self.claims):
            if claim[0]() is self.life:
                self.claims.remove(claim)


Claim = tuple[Any, int, int]  # a weak reference to a turn's life, its thread, its frame


def first_living(claims: list[Claim]) -> Any:
    """The life of the first turn that counts; entries before it that do not are removed."""
    for claim in list(claims):
        life = claim[0]()
        if life is not None and not is_abandoned(claim):
            return life
        with contextlib.suppress(ValueError):  # another thread has removed it
            claims.remove(claim)
    return None


def is_abandoned(claim: Claim) -> bool:
    """Whether this thread made the entry in a call that has ended: its frame is not on the stack.

    An exception that somebody still holds keeps the frames of an interrupted call, and so the
    life of its turn.
    """
    _, thread, frame_id = claim
    if thread != threading.get_ident():
        return False
    frame: Any = sys._getframe()
    while frame is not None:
        if id(frame) == frame_id:
            return False
        frame = frame.f_back
    return True


class Session(GenerateMethods):
    """A text that grows, with the keys and values computed for it.

    A session belongs to one caller at a time; several sessions of one model are independent.
    `copy.copy` and `fork` give a second future of the same text. `seed` is the one that the last
    answer was drawn with, and `finish_reason` says why it ended: "length" (max_new_tokens), "end"
    (the model chose end-of-text), "stop" (a stop text or token), "context" (every position is
    used), "time" (max_time) or "cancelled".
    """

    def __init__(self, model: Model, cache: Optional[Cache] = None) -> None:
        self.model = model
        self.finish_reason: Optional[str] = None
        self.seed: Optional[int] = None
        self.closed = False
        self._tokens: list[int] = []
        self._cache: Optional[Cache] = cache or model.backend.new_cache()
        self._dropped = 0  # tokens that a shift has taken from the beginning of the text
        self._snapshot: Optional[Snapshot] = None  # what the cache takes over when it is needed
        self._logits: Any = None  # a kept row: the logits after the last token, once known
        self._claims: list[Claim] = []  # see `Turn`
        self._change = 0  # counts changes, so that an open stream notices those of others

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self._tokens)

    def __bool__(self) -> bool:
        return True  # also when it is empty

    def __repr__(self) -> str:
        state = (
            "closed" if self.closed else f"{len(self)} of {self.model.config.n_positions} tokens"
        )
        return f"<tinygpt2.Session: {state}, {show_path(self.model.path)}>"

    def __copy__(self) -> Session:
        return self.fork()

    def __deepcopy__(self, memo: object) -> Session:
        return self.fork()

    def __reduce__(self) -> NoReturn:
        raise stays_here("session", "pickle its `tokens` and its model, and feed a new session")

    @property
    def position(self) -> int:
        """How many tokens the text has had; `len` is how many of them are still there."""
        return len(self._tokens) + self._dropped

    @property
    def tokens(self) -> list[int]:
        """All token ids so far, as a new list."""
        return list(self._tokens)

    @property
    def logits(self) -> FloatArray:
        """The logits that follow the last token, float32 [vocab_size], as a new array."""
        with Turn(self), self.model.workspace() as workspace:
            kept = self._compute_all(workspace)
            rows = self.model.backend.kept(workspace, kept).array()
            row: FloatArray = rows[0]
            return row

    def feed(self, prompt: Prompt, special: bool = False) -> None:
        """Append text or token ids and compute them.

        The first text gets the tokens that the tokenizer puts before and behind it. Special tokens
        are recognised in a text only if `special` is set.
        """
        tokens = self.model.tokens_of(prompt, special, not self._tokens)
        with Turn(self):
            self._append(tokens)
            if tokens:
                with self.model.workspace() as workspace:
                    self._compute_all(workspace)

    def rewind(self, n: SupportsIndex) -> None:
        """Forget the last `n` tokens."""
        with Turn(self):
            length, count = len(self._tokens), as_count(n)
            if count is None or count > length:
                raise InputError(f"rewind: expected 0 to {length} tokens, found {quote(n)}")
            if count:
                self._change += 1
                self._logits = None
                self._open_cache().truncate(length - count)
                del self._tokens[length - count :]

    def replace(self, prompt: Prompt, special: bool = False) -> int:
        """Let the text be `prompt`, and compute it; return how many tokens were kept.

        The longest beginning that it shares with the present text is kept. So a chat or an editor
        that passes its whole text each time pays only for what is new.
        """
        tokens = self.model.tokens_of(prompt, special, True)
        with Turn(self):
            kept = shared_length(self._tokens, tokens)
            self._check_length(0, len(tokens))
            if kept < max(len(self._tokens), len(tokens)):
                self._change += 1
                self._logits = None
                self._open_cache().truncate(kept)
                self._tokens[kept:] = tokens[kept:]
            self._dropped = 0
            if tokens:
                with self.model.workspace() as workspace:
                    self._compute_all(workspace)
        return kept

    def save(self, path: Path) -> None:
        """Write the text and all that was computed for it to a safetensors file.

        `Model.load_session` opens it, with the same model. The file appears whole or not at all.
        """
        target = path_text(path, "path")
        with Turn(self):
            save_session(self, target)

    def fork(self) -> Session:
        """A new session with the same text, at the cost of copying the used part of the cache."""
        with Turn(self):
            return self._fork()

    def _fork(self) -> Session:
        """The same for a caller who has the turn."""
        snapshot = self._snapshot
        fork = Session(self.model, None if snapshot else self._open_cache().fork())
        fork._snapshot = snapshot
        fork._tokens, fork._dropped = list(self._tokens), self._dropped
        fork._logits = self._logits
        fork.finish_reason, fork.seed = self.finish_reason, self.seed
        return fork

    def close(self) -> None:
        """Free the cache. What computes fails from here on; closing again is allowed."""
        self.closed = True
        self._cache = self._logits = self._snapshot = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def answering(self) -> tuple[Session, bool]:
        return self, False

    def _begin(
        self,
        tokens: list[int],
        values: dict[str, Any],
        as_text: bool,
        logprobs: Optional[SupportsIndex],
        own: bool,
    ) -> Answer:
        config = self.model.config
        words = self.model.words_of(values.get("bad_words"))
        options = check_options({**values, "bad_words": words}, config)
        n_alternatives = None if logprobs is None else as_count(logprobs)
        if logprobs is not None and n_alternatives is None:
            expected = "None or a whole number from 0"
            raise InputError(f"logprobs: expected {expected}, found {quote(logprobs)}")
        if options.overflow == "shift" and options.keep >= config.n_positions:
            expected = f"below {config.n_positions}, the positions of the model"
            raise InputError(f"option keep: expected {expected}, found {options.keep}")
        if options.num_beams > 1:
            options = beam_options(values, options)
            if n_alternatives:
                raise InputError("logprobs: beams record no alternatives; pass 0 or None")
        if as_text or options.stop or options.regex is not None:
            self.model.need_tokenizer()
        with Turn(self):
            if not tokens and not self._tokens:
                tokens = self.model.need_start_tokens()
            options = within_max_length(options, values, config, len(self) + len(tokens))
            return self._begun(tokens, options, own, n_alternatives)

    def _begun(
        self, tokens: list[int], options: Options, own: bool, n_alternatives: Optional[int]
    ) -> Answer:
        """Append a prompt, and begin the answer to it."""
        self._append(tokens)
        sampler = Sampler(options, self._tokens)
        self._change += 1  # a stream that is open elsewhere ends here
        self.seed, self.finish_reason = sampler.seed, None
        return Answer(self, sampler, own, n_alternatives)

    def _last_bytes(self) -> bytes:
        """The end of the text, long enough for an incomplete character."""
        tokenizer = self.model.tokenizer
        return b"".join(map(tokenizer.token_bytes, self._tokens[-4:])) if tokenizer else b""

    def _check_length(self, n_before: int, n_new: int) -> None:
        positions = self.model.config.n_positions
        if n_new and n_before + n_new > positions:
            found = f"{n_new} after {n_before}" if n_before else str(n_new)
            text = f"expected at most {positions} tokens, the positions of the model, found {found}"
            raise ContextError(f"context: {text}; shorten the text or rewind the session")

    def _append(self, tokens: Sequence[int]) -> None:
        self._check_length(len(self._tokens), len(tokens))
        if tokens:
            self._change += 1
            self._logits = None
            self._tokens += tokens

    def _push(self, token: int) -> None:
        """Append a token of an answer, which may be one more than there are positions."""
        self._logits = None
        self._tokens.append(token)

    def _is_full(self) -> bool:
        """Whether no token can follow. The last position predicts one more token, so this is one
        more than there are positions."""
        return len(self._tokens) > self.model.config.n_positions

    def _shift(self, keep: int) -> None:
        """Make room: forget the older half of what follows the first `keep` tokens."""
        n_dropped = (len(self._tokens) - keep + 1) // 2
        self._logits = None
        self._open_cache().truncate(keep)
        del self._tokens[keep : keep + n_dropped]
        self._dropped += n_dropped

    def _open_cache(self) -> Cache:
        cache = self._cache
        if cache is None:  # closed by another thread just now
            raise StateError(SESSION_CLOSED)
        snapshot = self._snapshot
        if snapshot is not None:
            snapshot.fill(cache)
            self._snapshot = None
        return cache

    def _next_span(self, capacity: int) -> Optional[Span]:
        """What the cache lacks, at most `capacity` tokens; None if there is no capacity, or if
        nothing is lacking because the logits are known."""
        if self._logits is not None or capacity < 1:
            return None
        cache = self._open_cache()
        # Always compute the last token: its keys may be cached although its logits are not.
        start = min(cache.length, len(self._tokens) - 1)
        tokens = self._tokens[start : start + capacity]
        return Span(cache, tokens, start, int(start + len(tokens) == len(self._tokens)))

    def _compute_all(self, workspace: Any) -> Any:
        """Compute the whole text; keep the logits after its last token, and return them."""
        if not self._tokens:
            raise StateError("session: it is empty; feed it a text first")
        if self._is_full():
            raise ContextError("context: nothing can follow the last position; rewind first")
        kept = self._logits
        while kept is None:
            (row,) = compute(self.model.backend, workspace, [self])
            if row is not None:
                with naming_position(self.model, len(self) - 1):
                    kept = row[0].keep(row[1])
        self._logits = kept
        return kept

    def _span_of(self, window: Window) -> Span:
        """What a window needs: the tokens that the cache lacks, and the logits that score."""
        cache = self._open_cache()
        start = min(cache.length, window.first - 1)
        wanted = len(window.tokens) - window.first
        return Span(cache, self._tokens[start:], start, wanted)

    def _each_pass(self, workspace: Any) -> Iterator[tuple[int, Logits]]:
        """Compute the whole text and hand out the logits after every token, pass by pass."""
        cache, backend = self._open_cache(), self.model.backend
        for start in range(0, len(self._tokens), backend.chunk):
            tokens = self._tokens[start : start + backend.chunk]
            yield start, backend.forward(workspace, [Span(cache, tokens, start, len(tokens))])
            cache.length = start + len(tokens)


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many elements two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# A saved session is a safetensors file with the tensors `keys` and `values` (`snapshot_layout`),
# `logits` after the last token if they were known, and `tokens`. It belongs to one model, whose
# fingerprint is in the metadata.

SESSION_FORMAT, SESSION_VERSION = "tinygpt2-session", "1"
SAVED_WITH = "`session.save` writes it, and the same model's `load_session` opens it"


class SavedState(NamedTuple):
    """What the metadata of a saved session says."""

    cached: int  # tokens whose keys and values are there
    n_tokens: int
    has_logits: bool
    dropped: int  # tokens that shifts have taken from the beginning
    finish_reason: Optional[str]
    seed: Optional[int]
    sums: str  # the SHA-256 of those of keys and values
    crc32: str  # of logits and tokens


STATE_KINDS: dict[str, tuple[type, ...]] = {  # as the hints above say
    **dict.fromkeys(["cached", "n_tokens", "dropped"], (int,)),
    **dict.fromkeys(["sums", "crc32"], (str,)),
    "has_logits": (bool,),
    "finish_reason": (str, type(None)),
    "seed": (int, type(None)),
}


def session_layout(config: Config, state: SavedState) -> dict[str, Entry]:
    entries = snapshot_layout(config, state.cached)
    if state.has_logits:
        entries["logits"] = ("F32", (round_up(config.vocab_size, PANEL),))
    entries["tokens"] = ("I32", (state.n_tokens,))
    return entries


def save_session(session: Session, path: str) -> None:
    config, tokens, row = session.model.config, session._tokens, session._logits
    cache = session._open_cache()
    keys, values, sums = cache.dump()
    logits = b"" if row is None else bytes(memoryview(row).cast("B"))
    logits = logits.ljust(round_up(len(logits), ALIGNMENT), b"\0")
    words = struct.pack(f"<{len(tokens)}i", *tokens)
    outcome = session._dropped, session.finish_reason, session.seed
    sums_and_crc = digest(sums), f"{zlib.crc32(logits + words):08x}"
    state = SavedState(cache.length, len(tokens), row is not None, *outcome, *sums_and_crc)
    metadata = {
        "format": SESSION_FORMAT,
        "format_version": SESSION_VERSION,
        "model": session.model.fingerprint,
        "session": json.dumps(state._asdict()),
    }
    pieces = keys, values, memoryview(logits), memoryview(words)
    data = (piece[i : i + (1 << 22)] for piece in pieces for i in range(0, len(piece), 1 << 22))
    write_tensors(path, session_layout(config, state), data, metadata, lambda file: None)


def digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


class Snapshot:
    """A saved session's file, mapped and checked. Its keys and values, which are large, are
    checked when a cache takes them over."""

    def __init__(self, model: Model, path: Path) -> None:
        self.file = TensorFile(path)
        try:
            self.check_kind(model)
            self.state = self.read_state(model.config)
            self.tokens, self.row = self.read_text(model)
        except TinyGPT2Error:
            self.file.close()
            raise

    def refuse(self, field: str, expected: str, found: object) -> NoReturn:
        raise FormatError(self.file.path, field, expected, quote(found), SAVED_WITH)

    def check_kind(self, model: Model) -> None:
        metadata = self.file.metadata
        for name, expected in {
            "format": SESSION_FORMAT,
            "format_version": SESSION_VERSION,
            "model": model.fingerprint,
        }.items():
            if metadata.get(name) != expected:
                self.refuse(f"__metadata__ {name}", repr(expected), metadata.get(name))
        if HEADER_CRC not in metadata:
            self.refuse(f"__metadata__ {HEADER_CRC}", "a checksum", None)

    def read_state(self, config: Config) -> SavedState:
        text = self.file.metadata.get("session", "").encode("utf-8", "surrogatepass")
        field = "__metadata__ session"
        values = parse_json_object(self.file.path, field, text)
        if set(values) != set(SavedState._fields):
            self.refuse(field, "the names of a session", sorted(values))
        for name, kinds in STATE_KINDS.items():
            if not isinstance(values[name], kinds):
                self.refuse(f"{field} {name}", " or ".join(k.__name__ for k in kinds), values[name])
        state = SavedState(**values)
        counts = all(map(is_count, (state.cached, state.n_tokens, state.dropped)))
        most = config.n_positions  # one more token than that may be there, but not its keys
        if (
            not counts
            or not state.cached <= min(state.n_tokens, most) <= state.n_tokens <= most + 1
        ):
            expected = f"cached <= n_tokens <= {most + 1}, cached <= {most}, and a count dropped"
            self.refuse(field, expected, (state.cached, state.n_tokens, state.dropped))
        check_tensors(self.file, session_layout(config, state))
        return state

    def read_text(self, model: Model) -> tuple[list[int], Any]:
        """The tokens, and the logits after the last one."""
        state, file, size = self.state, self.file, model.config.vocab_size
        logits = file.view("logits", "B") if state.has_logits else memoryview(b"")
        words = file.view("tokens", "B")
        crc = f"{zlib.crc32(words, zlib.crc32(logits)):08x}"
        if crc != state.crc32:
            self.refuse("tensors logits and tokens", f"the CRC-32 {quote(state.crc32)}", crc)
        tokens = list(struct.unpack(f"<{state.n_tokens}i", words))
        if not all(is_token(token, size) for token in tokens):
            self.refuse("tensor tokens", f"tokens below {size}", "others")
        return tokens, model.backend.row_of(logits[: 4 * size]) if state.has_logits else None

    def fill(self, cache: Cache) -> None:
        """Copy keys and values into a cache, and check the copy."""
        keys, values = self.file.view("keys", "B"), self.file.view("values", "B")
        sums = digest(cache.restore(keys, values, self.state.cached))
        if sums != self.state.sums:
            cache.truncate(0)
            self.refuse("tensors keys and values", f"the sums {quote(self.state.sums)}", sums)


class Model(GenerateMethods):
    """A mapped .tg2 file, its tokenizer and its backend. Shared by any number of sessions."""

    def __init__(
        self,
        path: Union[Path, TensorFile],
        backend: Optional[Literal["c", "numpy"]] = None,
        threads: Optional[SupportsIndex] = None,
    ) -> None:
        n_threads = check_threads(threads)
        if backend is not None and backend not in BACKENDS:
            raise InputError(f"backend: expected None or one of {BACKENDS}, found {quote(backend)}")
        if sys.byteorder != "little":
            raise TinyGPT2Error("a .tg2 file is little-endian, and this machine is not")
        self.file = path if isinstance(path, TensorFile) else TensorFile(path)
        try:
            self.path = self.file.path
            self._given = (os.path.abspath(self.path), backend, n_threads)  # what pickle keeps
            self.config = read_config(self.file)
            has_tokenizer = self.config.n_merges is not None
            self.tokenizer = Tokenizer(self.file, self.config) if has_tokenizer else None
            self._backend: Optional[Backend] = new_backend(
                self.file, self.config, backend, n_threads
            )
        except TinyGPT2Error:
            self.file.close()
            raise
        self.closed = False
        self._toy_seed: Optional[int] = None  # of a model that has no file
        self._workspaces: list[Any] = []  # those that no pass uses now

    def __repr__(self) -> str:
        backend, c = self._backend, self.config
        computes = "closed" if backend is None else backend.describe()
        sizes = f"{c.n_layer} layers of {c.n_embd}, {c.vocab_size} tokens"
        return f"<tinygpt2.Model {show_path(self.path)}: {sizes}, {computes}>"

    @property
    def fingerprint(self) -> str:
        """The checksums of the file's header and data, and its size, in hexadecimal digits.

        It tells one model from another, whatever their files are called. The checksum of the data
        is the one that the header claims; `info --verify` compares it with the data.
        """
        _ = self.backend  # an error if the model is closed
        file = self.file
        header = file.metadata.get(HEADER_CRC) or header_crc(file.map[: file.data_start])
        data = file.metadata.get("crc32") or file.checksum()
        return f"{header}{data}{len(file.map):x}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle stores where the file is and what it is, not what it holds."""
        path, backend, threads = self._given
        fingerprint = self.fingerprint
        if self._toy_seed is not None:
            return toy_again, (self._toy_seed, backend, threads)
        return open_again, (path, backend, threads, fingerprint)

    def __copy__(self) -> Model:
        """The same model, as it never changes; also for `copy.deepcopy`."""
        _ = self.backend
        return self

    def __deepcopy__(self, memo: object) -> Model:
        return self.__copy__()

    @property
    def start_tokens(self) -> list[int]:
        """What precedes a text: the tokens that the tokenizer puts there, or else begin-of-text,
        or else end-of-text, or nothing."""
        config = self.config
        if config.tokens_before:
            return list(config.tokens_before)
        if config.bos_token_id is not None:
            return [config.bos_token_id]
        return list(config.eos_token_ids[:1])

    def need_start_tokens(self) -> list[int]:
        start = self.start_tokens
        if not start:
            raise InputError("prompt: it is empty, and the model has no end-of-text to start from")
        return start

    @property
    def backend(self) -> Backend:
        """What computes."""
        backend = self._backend
        if backend is None:
            raise StateError(MODEL_CLOSED)
        return backend

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Any]:
        """Lend the scratch memory of a pass. Several threads at a time get several."""
        try:
            workspace = self._workspaces.pop()
        except IndexError:
            workspace = self.backend.new_workspace()
        try:
            yield workspace
        finally:
            if not self.closed:
                self._workspaces.append(workspace)

    def need_tokenizer(self) -> Tokenizer:
        tokenizer = self.tokenizer  # before `closed` is looked at: another thread may be closing
        if self.closed:
            raise StateError(MODEL_CLOSED)
        if tokenizer is None:
            path = show_path(self.path)
            raise InputError(f"{path}: no tokenizer inside; use token ids (generate_ids, --ids)")
        return tokenizer

    def encode(
        self, text: str, special: bool = False, add_special_tokens: bool = True
    ) -> list[int]:
        """The token ids of a text.

        Added tokens are found in it; special ones only if `special` is set. `add_special_tokens`
        puts those before and behind the text that the model's tokenizer puts there; most have none.
        """
        if not isinstance(text, str):
            raise InputError(f"text: expected a string, found {quote(text)}")
        return self.need_tokenizer().encode(text, special, add_special_tokens)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.need_tokenizer().decode(self.check_ids(ids))

    def tokens_of(self, prompt: Prompt, special: bool, add_special_tokens: bool) -> list[int]:
        """Text or ids as ids. The other arguments are for text; see `encode`."""
        if isinstance(prompt, str):
            return self.encode(prompt, special, add_special_tokens)
        return self.check_ids(prompt)

    def check_ids(self, ids: Iterable[SupportsIndex]) -> list[int]:
        """Ids as a list of int (NumPy's integers are welcome), each in the vocabulary."""
        is_bytes = isinstance(ids, (bytes, bytearray, memoryview))
        try:
            items = None if is_bytes else iter(ids)
        except TypeError:  # also an array without dimensions
            items = None
        if items is None:
            raise InputError(f"prompt: expected text or token ids, found {quote(ids)}")
        return [self.check_id(value, position) for position, value in enumerate(items)]

    def check_id(self, value: object, position: int) -> int:
        token, size = as_index(value), self.config.vocab_size
        if token is None or not is_token(token, size):
            expected, found = f"whole numbers from 0 to {size - 1}", quote(value)
            raise InputError(
                f"token ids: expected {expected}, found {found} at position {position}"
            )
        return token

    def words_of(self, words: Any) -> Any:
        """Bad words as sequences of tokens: a text as it stands, and after a space."""
        if isinstance(words, (bytes, dict)) or not isinstance(words, Iterable):
            return words  # None, or what `check_options` refuses
        sequences: list[Any] = []
        for word in (words,) if isinstance(words, str) else words:
            if isinstance(word, str):
                forms = (word, " " + word) if word else ("",)  # an empty one is refused below
                sequences += [self.encode(form, False, False) for form in forms]
            else:
                sequences.append(word)
        return sequences

    def session(self) -> Session:
        """A new, empty session."""
        return Session(self)

    def load_session(self, path: Path) -> Session:
        """The session that `Session.save` wrote. Its file is mapped, and copied when needed."""
        snapshot = Snapshot(self, path)
        session = Session(self)
        session._snapshot = snapshot
        session._tokens, session._logits = snapshot.tokens, snapshot.row
        session._dropped = snapshot.state.dropped
        session.finish_reason, session.seed = snapshot.state.finish_reason, snapshot.state.seed
        return session

    def answering(self) -> tuple[Session, bool]:
        return self.session(), True

    def generate_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        max_new_tokens: Optional[SupportsIndex] = None,
        temperature: Optional[Number] = None,
        top_k: Optional[SupportsIndex] = None,
        top_p: Optional[Number] = None,
        min_p: Optional[Number] = None,
        repetition_penalty: Optional[Number] = None,
        seed: Union[SupportsIndex, Sequence[SupportsIndex], None] = None,
        stop: Union[str, Sequence[str], None] = None,
        logit_bias: Optional[dict[int, float]] = None,
        stop_token_ids: Optional[Iterable[SupportsIndex]] = None,
        bad_words: Optional[Iterable[Prompt]] = None,
        allowed: Optional[Allowed] = None,
        regex: Optional[str] = None,
        max_time: Optional[Number] = None,
        overflow: Optional[Literal["stop", "error", "shift"]] = None,
        keep: Optional[SupportsIndex] = None,
        num_beams: Optional[SupportsIndex] = None,
        special: bool = False,
        logprobs: Optional[SupportsIndex] = 0,
        batch_size: SupportsIndex = 8,
        num_return_sequences: SupportsIndex = 1,
        **unknown: NoReturn,
    ) -> list[Result]:
        """The answers to several prompts, in their order; each is what it is alone.

        At most `batch_size` texts are computed at a time, which share each reading of the weights.
        `seed` may be a list with one seed for each prompt. `num_return_sequences` answers to each
        prompt stand side by side; the first has the seed itself, the others seeds derived from it.
        """
        options = (max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, None)
        rules = (stop, logit_bias, stop_token_ids, bad_words, allowed, regex)
        choices = (*options, *rules, max_time, overflow, keep, num_beams)
        values = {**dict(zip(Options._fields, choices)), **unknown}
        size = positive("batch_size", batch_size)
        n = positive("num_return_sequences", num_return_sequences)
        texts = prompt_list("prompts", prompts)
        seeds = batch_seeds(seed, len(texts))
        several = as_count(num_beams) or 1
        if several > 1 and n > several:
            raise InputError(f"num_return_sequences: expected at most num_beams, found {n}")
        each = n if several == 1 else 1  # answers to a prompt
        answers = self._begun_batch(texts, special, values, seeds, each, logprobs)
        done: dict[int, list[Result]] = {}
        for number, answer in run_all(enumerate(answers), size):
            with naming_prompt(number // each):
                done[number] = answer.results(n) if several > 1 else [answer.result()]
        return [result for number in range(len(done)) for result in done[number]]

    def _begun_batch(
        self,
        texts: list[Prompt],
        special: bool,
        values: dict[str, Any],
        seeds: list[Any],
        each: int,
        logprobs: Optional[SupportsIndex],
    ) -> Iterator[Answer]:
        """`each` answers to each text."""
        for number, (text, first) in enumerate(zip(texts, seeds)):
            for derived in derived_seeds(first, each):
                with naming_prompt(number):
                    answer = self.begin(text, special, {**values, "seed": derived}, False, logprobs)
                yield answer

    def logits(self, prompt: Prompt, special: bool = False) -> FloatArray:
        """The logits after every token of a prompt, float32 [number of tokens, vocab_size]."""
        tokens = self.tokens_of(prompt, special, True)
        with self.session() as session, self.workspace() as workspace:
            session._append(tokens)
            logits: FloatArray = np.empty((len(tokens), self.config.vocab_size), np.float32)
            for start, rows in session._each_pass(workspace):
                with naming_position(self, min(start + self.backend.chunk, len(tokens)) - 1):
                    part = rows.array()
                logits[start : start + len(part)] = part
        return logits

    def score(
        self,
        prompt: Prompt,
        progress: Optional[Progress] = None,
        special: bool = False,
        *,
        top: Optional[SupportsIndex] = None,
    ) -> Score:
        """The log-probability of every token of a text of any length.

        The text follows the model's `start_tokens`, as documents do in training; without them its
        first token has no score. A text longer than the context is read in windows that overlap by
        half, and every token is scored once, with at least half a context before it. Beside the ids
        and their scores, memory does not grow with the text. With `top`, ranks and the `top` best
        tokens at each place are recorded, too.
        """
        return next(self._scores([prompt], None, special, top, progress))

    def score_batch(
        self,
        prompts: Iterable[Prompt],
        special: bool = False,
        *,
        contexts: Optional[Iterable[Prompt]] = None,
        top: Optional[SupportsIndex] = None,
    ) -> list[Score]:
        """The scores of several texts. Short ones share the readings of the weights.

        `contexts` has one for each text (text or token ids), which the text follows instead of the
        model's `start_tokens`. A context is not scored.
        """
        texts = prompt_list("prompts", prompts)
        return list(self._scores(texts, contexts, special, top, None))

    def rank(self, prompt: str, endings: Iterable[str], special: bool = False) -> list[Ranked]:
        """How probable each ending is after a prompt, the most probable first.

        A space between the two belongs to the ending, wherever it stands. The prompt is computed
        once.
        """
        texts = prompt_list("endings", endings)
        if not all(isinstance(text, str) for text in (prompt, *texts)):
            raise InputError(
                f"rank: expected a text and texts that may follow, found {quote(texts)}"
            )
        start = self.start_tokens
        begin = prompt.rstrip()
        gap = prompt[len(begin) :]
        context = [*start, *self.tokens_of(begin, special, False)]
        wholes = [[*start, *self.tokens_of(begin + gap + e, special, False)] for e in texts]
        # An ending can change the prompt's last tokens. All are scored from the first that differs.
        n = min([len(context), *(max(1, shared_length(context, whole)) for whole in wholes)])
        with self.session() as session:
            session.feed(context[:n])
            scored = [whole for whole in wholes if n < len(whole)]
            windows = (Window(whole, n, session.fork()) for whole in scored)
            scores = iter(list(self._window_scores(windows, None)))
        ranked: list[Ranked] = []
        for number, (text, whole) in enumerate(zip(texts, wholes)):
            values = [score.logprob for score in next(scores)] if n < len(whole) else []
            ranked.append(Ranked(text, number, math.fsum(values), whole[n:], values))
        return sorted(ranked, key=lambda item: -item.total)

    def _scores(
        self,
        prompts: Iterable[Prompt],
        contexts: Optional[Iterable[Prompt]],
        special: bool,
        top: Optional[SupportsIndex],
        progress: Optional[Progress],
    ) -> Iterator[Score]:
        """The score of each text."""
        n_top = None if top is None else positive("top", top)
        tokenizer = self.tokenizer  # another thread may close the model at any time
        texts = [(prompt, self.tokens_of(prompt, special, False)) for prompt in prompts]
        starts = self._starts(contexts, len(texts), special)
        windows = [self._windows(start, ids) for start, (_, ids) in zip(starts, texts)]
        scores = self._window_scores(itertools.chain(*windows), n_top)
        for (prompt, ids), start, parts in zip(texts, starts, windows):
            found: list[Optional[TokenScore]] = [] if start else [None] * min(1, len(ids))
            for _ in parts:
                found += next(scores)
                if progress:
                    progress("scoring", len(found), len(ids))
            n_bytes = None if tokenizer is None else byte_count(tokenizer, prompt, ids)
            logprobs = [score and score.logprob for score in found]
            if n_top is None:
                yield Score(ids, logprobs, n_bytes)
                continue
            ranks = [score and score.rank for score in found]
            best = [list(score.best) if score else [] for score in found]
            yield Score(ids, logprobs, n_bytes, ranks, best)

    def _starts(
        self, contexts: Optional[Iterable[Prompt]], n: int, special: bool
    ) -> list[list[int]]:
        """The tokens that each of n texts follows."""
        if contexts is None:
            return [self.start_tokens] * n
        starts = [self.tokens_of(context, special, False) for context in contexts]
        if len(starts) != n or isinstance(contexts, str):
            expected = f"a list with one for each text, {n} in all"
            raise InputError(f"contexts: expected {expected}, found {quote(contexts)}")
        return starts

    def _windows(self, start: list[int], ids: list[int]) -> list[Window]:
        """The windows in which a text is read."""
        tokens, positions = [*start, *ids], self.config.n_positions
        fits = len(tokens) <= positions + 1
        windows: list[Window] = []
        scored = len(start) or 1  # how many of `tokens` are done
        while scored < len(tokens):
            begin = 0 if fits else max(0, scored - max(1, positions // 2))
            end = min(len(tokens), begin + positions + 1)
            windows.append(Window(tokens[begin:end], scored - begin))
            scored = end
        return windows

    def _window_scores(
        self, windows: Iterable[Window], n_top: Optional[int]
    ) -> Iterator[list[TokenScore]]:
        """The scores of the tokens of each window. Short windows share their passes."""
        group: list[Window] = []
        n_rows = 0
        for window in windows:
            if group and (n_rows + len(window.tokens) > self.backend.chunk or len(group) == 16):
                yield from self._group_scores(group, n_top)
                group, n_rows = [], 0
            group.append(window)
            n_rows += len(window.tokens)
        if group:
            yield from self._group_scores(group, n_top)

    def _group_scores(
        self, group: Sequence[Window], n_top: Optional[int]
    ) -> Iterator[list[TokenScore]]:
        with contextlib.ExitStack() as stack:
            sessions = [w.session or self.session() for w in group]
            for session, window in zip(sessions, group):
                stack.enter_context(session)
                session._append(window.tokens[len(session) : -1])
            workspace = stack.enter_context(self.workspace())
            if len(group[0].tokens) > self.backend.chunk:  # then it is alone
                yield self._passes_scores(sessions[0], group[0], n_top, workspace)
                return
            spans = [session._span_of(window) for session, window in zip(sessions, group)]
            logits = self.backend.forward(workspace, spans)
            row = 0
            for window in group:
                tokens = window.tokens[window.first :]
                with naming_position(self, len(window.tokens) - 2):
                    yield [token_score(logits, row + i, t, n_top) for i, t in enumerate(tokens)]
                row += len(tokens)

    def _passes_scores(
        self, session: Session, window: Window, n_top: Optional[int], workspace: Any
    ) -> list[TokenScore]:
        """The scores of a window that may take several passes."""
        tokens, first, scores = window.tokens, window.first, []
        for start, logits in session._each_pass(workspace):
            stop = min(start + self.backend.chunk, len(tokens) - 1)
            for i in range(max(start, first - 1), stop):
                with naming_position(self, i):
                    scores.append(token_score(logits, i - start, tokens[i + 1], n_top))
        return scores

    def close(self) -> None:
        """Release the file. Sessions of this model fail from here on; closing again is allowed."""
        if not self.closed:
            self.closed = True
            self.tokenizer = self._backend = None  # a running call holds what it needs
            self._workspaces.clear()
            self.file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def token_score(logits: Logits, row: int, token: int, n_top: Optional[int]) -> TokenScore:
    logprob = logits.logprob(row, token)
    if n_top is None:
        return TokenScore(logprob, None, ())
    return TokenScore(logprob, logits.rank(row, token), logits.top(row, n_top))


def byte_count(tokenizer: Tokenizer, prompt: Prompt, ids: list[int]) -> int:
    """The length of a prompt in UTF-8."""
    if isinstance(prompt, str):
        return len(mend_surrogates(prompt).encode("utf-8"))
    return sum(len(tokenizer.token_bytes(token)) for token in ids)


def load(
    path: Optional[Path] = None,
    *,
    backend: Optional[Literal["c", "numpy"]] = None,
    threads: Optional[SupportsIndex] = None,
) -> Model:
    """Open a .tg2 file, or the default model if none is named.

    Takes milliseconds: the file is mapped, not read. Raises `FormatError` if it is not a good one.
    `backend` is what computes: "c" (the kernels that build.py makes), "numpy", or None for the
    fastest there is. `threads` is how many threads it may use; None takes $TINYGPT2_THREADS, or
    one for each processor. NumPy follows it if threadpoolctl is installed, or else if this call is
    what imports NumPy; the model's `repr` tells.
    """
    return Model(default_model() if path is None else path, backend, threads)


def open_again(
    path: str, backend: Optional[Literal["c", "numpy"]], threads: Optional[int], fingerprint: str
) -> Model:
    """Open a model that was pickled, in this process or in another one."""
    model = load(path, backend=backend, threads=threads)
    found = model.fingerprint
    if found == fingerprint:
        return model
    model.close()
    advice = "put that file back, or pickle a model of the new one"
    expected = f"{quote(fingerprint)}, the file whose model was pickled"
    raise FormatError(path, "fingerprint", expected, f"{found!r}, another file", advice)


def stays_here(what: str, advice: str) -> StateError:
    """The error of an object that pickle cannot take to another process."""
    return StateError(f"{what}: it cannot be pickled, as it uses memory of this process; {advice}")


# Companions: parts that a program does not need while it runs live in files of their own, in the
# folder vendor/ beside this file, in a clone and in an installed package alike.


def companion_path(name: str, purpose: str, otherwise: str = "") -> str:
    """The path of a file in vendor/, or an error that says where to get it."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vendor", name)
    if not os.path.exists(path):
        advice = f"{otherwise}copy the project's vendor/{name} there, or install the whole project"
        raise MissingFileError(path, purpose, "a file", "none", advice)
    return path


def default_model() -> str:
    """The path of the model that comes with tinygpt2."""
    return companion_path("tales.tg2", "default model", "name a .tg2 file, ")


COMPANIONS: dict[str, ModuleType] = {}  # those that have been run


def load_companion(name: str) -> ModuleType:
    """Run a file of vendor/ as a module. It gets this module, whatever its name, as `tinygpt2`."""
    from importlib import util

    if name not in COMPANIONS:
        path = companion_path(f"{name}.py", "companion")
        spec = util.spec_from_file_location(f"{__name__}.vendor.{name}", path)
        if spec is None or spec.loader is None:
            raise TinyGPT2Error(f"vendor/{name}.py: Python finds no loader for it")
        if __name__ not in sys.modules:
            raise TinyGPT2Error(f"vendor/{name}.py: needs this module in sys.modules; import it")
        module = util.module_from_spec(spec)
        module.tinygpt2 = sys.modules[__name__]  # type: ignore[attr-defined]
        import_numpy()  # which companions import, too: a clear error where it is missing
        spec.loader.exec_module(module)
        COMPANIONS[name] = module
    return COMPANIONS[name]


def convert(
    source: Path,
    out: Path,
    progress: Optional[Progress] = None,
    tokenizer: Optional[Path] = None,
    heads: Optional[SupportsIndex] = None,
    activation: Optional[str] = None,
) -> None:
    """Convert a GPT-2 checkpoint to a .tg2 file; see vendor/convert.py, which does it."""
    load_companion("convert").convert(source, out, progress, tokenizer, heads, activation)


def download(
    name: str, out: Path, revision: str = "main", progress: Optional[Progress] = None
) -> None:
    """Fetch a checkpoint from the Hugging Face hub and convert it; see vendor/convert.py."""
    load_companion("convert").download(name, out, revision, progress)


# ------------------------------------------------------------------------------------------------
# 8. Kernels
# ------------------------------------------------------------------------------------------------

# The same forward pass and choice in kernels.c, with the same bits on every machine. The head of
# that file explains the functions and structures that are declared here.

LIBRARY = {"win32": "tinygpt2_kernels.dll", "darwin": "tinygpt2_kernels.dylib"}.get(
    sys.platform, "tinygpt2_kernels.so"
)
DONE, MORE, BUSY, _, NOT_ALL_FINITE = range(5)  # what the functions of kernels.c return
REBUILD = "run `python build.py` again, delete the file, or use the backend 'numpy'"


def library_path() -> Optional[str]:
    """Where the kernels are: beside this file, where build.py and the wheel put them."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), LIBRARY)
    return path if os.path.exists(path) else None


def check_whole(path: str) -> None:
    """Raise `OSError` if a library of Linux is cut off; loading it would crash the process.

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


class Kernels:
    """The library that build.py makes of kernels.c: its structures and functions.

    ctypes is imported here, when a library is loaded, and not with this module.
    """

    def __init__(self, path: str) -> None:
        self.c: Any = importlib.import_module("ctypes")
        c = self.c
        i32, pointer = c.c_int32, c.c_void_p
        self.Config = structure(
            "tg_config",
            *[(name, i32) for name in ("vocab_size", "n_positions", "n_embd", "n_layer")],
            *[(name, i32) for name in ("n_head", "n_inner", "activation", "scale_attn_weights")],
            *[(name, i32) for name in ("scale_attn_by_inverse_layer_idx", "tied")],
            ("layer_norm_epsilon", c.c_float),
        )
        self.Span = structure(
            "tg_span",
            ("cache", pointer),
            ("tokens", c.POINTER(i32)),
            *[(name, i32) for name in ("n", "start", "wanted")],
        )
        self.Options = structure(
            "tg_options",
            *[(name, c.c_double) for name in ("temperature", "top_p", "min_p")],
            ("repetition_penalty", c.c_double),
            ("seed", c.c_uint64),
            ("position", c.c_int64),
            ("bias", c.POINTER(c.c_double)),
            ("bias_tokens", c.POINTER(i32)),
            ("seen", c.POINTER(i32)),
            ("allowed", c.c_char_p),
            *[(name, i32) for name in ("top_k", "n_bias", "n_seen")],
        )
        self.library = self.load(path)

    def load(self, path: str) -> Any:
        c, where = self.c, show_path(path)
        try:
            check_whole(path)
            library = c.CDLL(path)
            library.tg_version.restype = c.c_char_p
            found = (library.tg_version() or b"none").decode("utf-8", "replace")
            if found != __version__:
                found = f"expected version {__version__}, found {found}"
                raise TinyGPT2Error(f"{where}: {found}; {REBUILD}")
            self.declare(library)
        except (OSError, AttributeError) as error:
            raise TinyGPT2Error(f"{where}: it cannot be loaded: {error}; {REBUILD}") from None
        return library

    def declare(self, library: Any) -> None:
        """Declare every function that is used; without it ctypes cuts pointers to 32 bits."""
        c = self.c
        pointer, number, i32 = c.c_void_p, c.c_int, c.c_int32
        options, spans = c.POINTER(self.Options), c.POINTER(self.Span)
        config, offsets = c.POINTER(self.Config), c.POINTER(c.c_int64)
        functions: dict[str, tuple[Any, list[Any]]] = {
            "tg_isa_name": (c.c_char_p, [c.c_char_p]),
            "tg_model_new": (pointer, [config, pointer, offsets, c.c_char_p, number]),
            "tg_model_free": (None, [pointer]),
            "tg_chunk": (number, [pointer]),
            "tg_cache_new": (pointer, [pointer]),
            "tg_cache_free": (None, [pointer]),
            "tg_cache_copy": (None, [pointer, pointer, number]),
            "tg_cache_dump": (None, [pointer, number, pointer, pointer, c.c_char_p]),
            "tg_cache_restore": (None, [pointer, number, pointer, pointer, c.c_char_p]),
            "tg_pass_new": (pointer, [pointer]),
            "tg_pass_free": (None, [pointer]),
            "tg_forward": (number, [pointer, spans, number]),
            "tg_logits": (number, [pointer, number, c.POINTER(pointer)]),
            "tg_check": (number, [pointer, pointer]),
            "tg_choose": (number, [pointer, pointer, options, c.POINTER(i32)]),
            "tg_order": (
                number,
                [pointer, pointer, options, number, c.POINTER(i32), c.POINTER(i32)],
            ),
            "tg_log_probability": (number, [pointer, pointer, i32, c.POINTER(c.c_double)]),
            "tg_rank": (number, [pointer, pointer, i32, c.POINTER(i32)]),
            "tg_top": (
                number,
                [pointer, pointer, number, c.POINTER(i32), c.POINTER(c.c_double)],
            ),
        }
        for name, (result, arguments) in functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments

    def address_of(self, data: Union[mmap.mmap, memoryview]) -> tuple[int, Handle]:
        """Where read-only data lie in memory, and what keeps them there."""
        c = self.c
        sizes = [(name, c.c_ssize_t) for name in ("len", "itemsize")]
        flags = [(name, c.c_int) for name in ("readonly", "ndim")]
        rest = [(name, c.c_void_p) for name in ("format", "shape", "strides", "more", "internal")]
        start = [("buf", c.c_void_p), ("obj", c.c_void_p)]
        view = structure("Py_buffer", *start, *sizes, *flags, *rest)()
        c.pythonapi.PyObject_GetBuffer(c.py_object(data), c.byref(view), 0)
        return view.buf or 0, Handle(c.byref(view), c.pythonapi.PyBuffer_Release, data)


STRUCTURES: dict[str, Any] = {}  # ctypes never forgets a structure, so each is made once


def structure(name: str, *fields: tuple[str, Any]) -> Any:
    """A ctypes structure (made by a call, since a module that imports ctypes late has no base)."""
    import ctypes

    if name not in STRUCTURES:
        STRUCTURES[name] = type(name, (ctypes.Structure,), {"_fields_": list(fields)})
    return STRUCTURES[name]


class Handle:
    """Owns a pointer from C and frees it when collected; keeps `owner` alive until then."""

    def __init__(self, pointer: Any, free: Callable[[Any], None], owner: object) -> None:
        self.owner = owner
        self.free = free
        self.pointer = pointer  # last: from here on `__del__` has something to free

    def __del__(self) -> None:
        pointer = getattr(self, "pointer", None)  # an interrupt can end `__init__` at any point
        if pointer is not None:
            self.free(pointer)

    def __reduce__(self) -> NoReturn:
        raise stays_here("kernels", "pickle the model")


def check_status(status: int) -> None:
    if status == BUSY:
        raise StateError("model: two threads use one pass; give each thread its own session")
    if status == NOT_ALL_FINITE:
        raise NumericError(NOT_FINITE)
    if status != DONE:
        raise TinyGPT2Error(f"kernels: refused with status {status}; {REBUILD}")


class CCache:
    """Keys and values in the panels of kernels.c."""

    def __init__(self, backend: CBackend, length: int = 0) -> None:
        pointer = backend.library.tg_cache_new(backend.model.pointer)
        if not pointer:
            raise TinyGPT2Error("no memory for the keys and values of a text: close others")
        self.handle = Handle(pointer, backend.library.tg_cache_free, backend.model)
        self.backend = backend
        self.length = length

    def fork(self) -> CCache:
        fork = CCache(self.backend, self.length)
        copy = self.backend.library.tg_cache_copy
        copy(fork.handle.pointer, self.handle.pointer, self.length)
        return fork

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def dump(self) -> tuple[memoryview, memoryview, bytes]:
        c, shapes = self.backend.kernels.c, snapshot_layout(self.backend.config, self.length)
        keys, values = ((c.c_char * byte_size(*shapes[name]))() for name in ("keys", "values"))
        sums, dump = self.new_sums(), self.backend.library.tg_cache_dump
        dump(self.handle.pointer, self.length, keys, values, sums)
        return memoryview(keys).cast("B"), memoryview(values).cast("B"), bytes(sums)

    def restore(self, keys: memoryview, values: memoryview, length: int) -> bytes:
        address_of, sums = self.backend.kernels.address_of, self.new_sums()
        places = [address_of(data)[0] for data in (keys, values)]  # the caller holds both
        self.backend.library.tg_cache_restore(self.handle.pointer, length, *places, sums)
        self.length = length
        return bytes(sums)

    def new_sums(self) -> Any:
        """Room for the sums of a snapshot: uint64 [n_layer, n_head, 2, 2, 16]"""
        config = self.backend.config
        return (self.backend.kernels.c.c_char * (8 * config.n_layer * config.n_head * 4 * PANEL))()


class CWorkspace:
    """The scratch memory of a pass, and how many passes it has served."""

    def __init__(self, backend: CBackend) -> None:
        pointer = backend.library.tg_pass_new(backend.model.pointer)
        if not pointer:
            raise TinyGPT2Error("no memory for a forward pass: close other models")
        self.handle = Handle(pointer, backend.library.tg_pass_free, backend.model)
        self.n_passes = 0


class CLogits:
    """`Logits` in the memory of a pass, or one row that was copied from there."""

    def __init__(self, backend: CBackend, workspace: CWorkspace, n_rows: int, kept: Any) -> None:
        self.backend = backend
        self.workspace = workspace
        self.number = workspace.n_passes
        self.n_rows = n_rows
        self.kept = kept

    def pointer(self, row: int) -> Any:
        """Where a row lies, until another one is asked for."""
        if self.number != self.workspace.n_passes:
            raise StateError(STALE)
        c = self.backend.kernels.c
        if self.kept is not None:
            return c.addressof(self.kept)
        place = c.c_void_p()
        check_status(self.backend.library.tg_logits(self.workspace.handle.pointer, row, place))
        return place.value

    def choose(self, row: int, sampler: Sampler, position: int) -> int:
        kernels = self.backend.kernels
        options = kernels.c.byref(c_options(kernels, sampler, position))
        token = kernels.c.c_int32()
        scratch = self.workspace.handle.pointer
        check_status(kernels.library.tg_choose(scratch, self.pointer(row), options, token))
        return int(token.value)

    def order(self, row: int, sampler: Sampler, position: int, n: int) -> list[int]:
        kernels = self.backend.kernels
        options = kernels.c.byref(c_options(kernels, sampler, position))
        n = min(n, self.backend.config.vocab_size)
        tokens, count = (kernels.c.c_int32 * n)(), kernels.c.c_int32()
        scratch = self.workspace.handle.pointer
        pointer = self.pointer(row)
        check_status(kernels.library.tg_order(scratch, pointer, options, n, tokens, count))
        return list(tokens[: count.value])

    def logprob(self, row: int, token: int) -> float:
        kernels = self.backend.kernels
        result = kernels.c.c_double()
        scratch = self.workspace.handle.pointer
        logits = self.pointer(row)
        check_status(kernels.library.tg_log_probability(scratch, logits, token, result))
        return float(result.value)

    def rank(self, row: int, token: int) -> int:
        kernels = self.backend.kernels
        result = kernels.c.c_int32()
        scratch, pointer = self.workspace.handle.pointer, self.pointer(row)
        check_status(kernels.library.tg_rank(scratch, pointer, token, result))
        return int(result.value)

    def top(self, row: int, n: int) -> list[tuple[int, float]]:
        kernels = self.backend.kernels
        n = min(n, self.backend.config.vocab_size)
        tokens, logprobs = (kernels.c.c_int32 * n)(), (kernels.c.c_double * n)()
        scratch = self.workspace.handle.pointer
        check_status(kernels.library.tg_top(scratch, self.pointer(row), n, tokens, logprobs))
        return list(zip(tokens, logprobs))

    def array(self) -> FloatArray:
        size = self.backend.config.vocab_size
        rows: FloatArray = np.empty((self.n_rows, size), np.float32)
        for row in range(self.n_rows):
            rows[row] = np.frombuffer(self.keep(row), np.float32)
        return rows

    def keep(self, row: int) -> Any:
        c = self.backend.kernels.c
        pointer = self.pointer(row)
        check_status(self.backend.library.tg_check(self.workspace.handle.pointer, pointer))
        kept = (c.c_float * self.backend.config.vocab_size)()
        c.memmove(kept, pointer, c.sizeof(kept))
        return kept


def c_options(kernels: Kernels, sampler: Sampler, position: int) -> Any:
    """What kernels.c must know for a choice. Most of it stays the same for a whole answer."""
    c, options = kernels.c, sampler.options
    if sampler.prepared is None:
        biases = options.logit_bias or {}
        sampler.prepared = kernels.Options(
            temperature=options.temperature,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            seed=sampler.seed & MASK,
            bias=(c.c_double * len(biases))(*biases.values()),
            bias_tokens=(c.c_int32 * len(biases))(*biases),
            top_k=min(options.top_k, 1 << 30),
            n_bias=len(biases),
        )
    prepared = sampler.prepared
    if options.repetition_penalty != 1:
        prepared.seen = (c.c_int32 * len(sampler.seen))(*sampler.seen)
        prepared.n_seen = len(sampler.seen)
    prepared.allowed = sampler.allowed
    prepared.position = position
    return prepared


class CBackend:
    """The forward pass in kernels.c."""

    name = "c"

    def __init__(self, file: TensorFile, config: Config, threads: Optional[int], path: str) -> None:
        self.kernels = Kernels(path)
        self.library = self.kernels.library
        self.config = config
        self.threads = threads or default_threads()
        isa = self.library.tg_isa_name(None)
        if isa is None:
            wanted = os.environ.get("TINYGPT2_ISA")
            raise InputError(f"TINYGPT2_ISA: expected {self.isas()}, found {quote(wanted)}")
        self.isa: str = isa.decode()
        self.model = self.new_model(file)
        self.chunk: int = self.library.tg_chunk(self.model.pointer)

    def new_model(self, file: TensorFile) -> Handle:
        kernels, config = self.kernels, self.config
        same = set(Config._fields) & {name for name, _ in kernels.Config._fields_}
        sizes = kernels.Config(
            **{name: getattr(config, name) for name in same},
            activation=ACTIVATIONS.index(config.activation_function),
            tied=config.tie_word_embeddings,
        )
        weights = [name for name, (dtype, _) in layout(config).items() if dtype == "F32"]
        offsets = [file.tensors[name].start for name in weights]
        places = (kernels.c.c_int64 * len(offsets))(*offsets)
        address, view = kernels.address_of(file.map)
        model = self.library.tg_model_new(sizes, address, places, None, self.threads)
        if not model:
            raise TinyGPT2Error("no memory for the table of the model's tensors")
        return Handle(model, self.library.tg_model_free, view)

    def describe(self) -> str:
        return f"c ({self.isa}, {self.threads} threads)"

    def isas(self) -> str:
        """The names of the instruction sets that can be used here."""
        names = ("avx512", "avx2", "neon", "portable")
        return " or ".join(n for n in names if self.library.tg_isa_name(n.encode()))

    def new_cache(self) -> CCache:
        return CCache(self)

    def new_workspace(self) -> CWorkspace:
        return CWorkspace(self)

    def kept(self, workspace: CWorkspace, row: Any) -> CLogits:
        return CLogits(self, workspace, 1, row)

    def row_of(self, data: memoryview) -> Any:
        return (self.kernels.c.c_float * self.config.vocab_size).from_buffer_copy(data)

    def forward(
        self, workspace: CWorkspace, spans: Sequence[Span], goes_on: GoesOn = always
    ) -> CLogits:
        """C returns after 20 ms or so and is called again, so that Ctrl-C ends a long prompt."""
        workspace.n_passes += 1
        c_spans = (self.kernels.Span * len(spans))(*map(self.c_span, spans))
        pointer = workspace.handle.pointer
        check_signals = self.kernels.c.pythonapi.PyErr_CheckSignals  # compiled Python does not
        status = self.library.tg_forward(pointer, c_spans, len(spans))
        while status == MORE:
            check_signals()
            if not goes_on():
                raise CancelError
            status = self.library.tg_forward(pointer, None, 0)
        check_signals()
        check_status(status)
        return CLogits(self, workspace, sum(span.wanted for span in spans), None)

    def c_span(self, span: Span) -> Any:
        n = len(span.tokens)
        tokens = (self.kernels.c.c_int32 * n)(*span.tokens)
        return self.kernels.Span(span.cache.handle.pointer, tokens, n, span.start, span.wanted)


BACKENDS = ("c", "numpy")


def new_backend(
    file: TensorFile, config: Config, wanted: Optional[str], threads: Optional[int]
) -> Backend:
    """The backend that is wanted, or the fastest one there is."""
    path = None if wanted == "numpy" else library_path()
    if path is not None:
        backend = CBackend(file, config, threads, path)
        if wanted or os.environ.get("TINYGPT2_ISA") or backend.isa != "portable":
            return backend
        with contextlib.suppress(TinyGPT2Error):  # raised if there is no NumPy
            return numpy_instead(file, config, threads, "this processor has neither AVX2 nor NEON")
        return backend
    if wanted == "c":
        advice = "`python build.py` makes it, with any C compiler"
        raise TinyGPT2Error(f"backend c: no {LIBRARY} beside {show_path(__file__)} ({advice})")
    if wanted == "numpy":
        return NumpyBackend(file, config, threads)
    reason = f"there is no {LIBRARY} beside {__file__}; `python build.py` makes it"
    return numpy_instead(file, config, threads, reason)


def numpy_instead(
    file: TensorFile, config: Config, threads: Optional[int], reason: str
) -> NumpyBackend:
    """The slower backend, with a word about it in the log for those who look there."""
    backend = NumpyBackend(file, config, threads)
    note(f"NumPy computes, and not the kernels: {reason}", "INFO")
    return backend


# ------------------------------------------------------------------------------------------------
# 9. Processors and threads
# ------------------------------------------------------------------------------------------------

MAX_THREADS = 256


def check_threads(threads: object) -> Optional[int]:
    if threads is None:
        return None
    count = as_index(threads)
    if count is None or not 1 <= count <= MAX_THREADS:
        expected = f"None or a number from 1 to {MAX_THREADS}"
        raise InputError(f"threads: expected {expected}, found {quote(threads)}")
    return count


def default_threads() -> int:
    """$TINYGPT2_THREADS, or else the processors that this process may use."""
    wanted = os.environ.get("TINYGPT2_THREADS")
    if not wanted:
        return min(available_processors(), MAX_THREADS)
    is_number = wanted.isascii() and wanted.isdecimal() and len(wanted) < 10
    if not is_number or not 1 <= int(wanted) <= MAX_THREADS:
        expected = f"a whole number from 1 to {MAX_THREADS}"
        raise InputError(f"TINYGPT2_THREADS: expected {expected}, found {quote(wanted)}")
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
    """The (quota, period) pairs in microseconds of every control group that this process is in."""
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


# NumPy leaves matrix products to a library, a BLAS. It reads one of these when it is loaded.
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
IMPORTING = threading.Lock()


def import_numpy(threads: Optional[int] = None, useful: int = MAX_THREADS) -> BlasThreads:
    """Import NumPy, and limit its threads to `threads` (by default `default_threads`) or `useful`.

    The environment does it for as long as NumPy is imported; it is restored afterwards. So the
    first import decides, and NumPy keeps its number if others have imported it before. Where the
    package threadpoolctl is installed, `BlasThreads` limits them during each pass, and the import
    only if this module was told a number. A user's own variables for BLAS count if it was not.
    """
    global np, blas
    count = threads or default_threads()
    with IMPORTING:
        if blas is None:
            threadpoolctl = find_threadpoolctl()
            is_told = threads is not None or bool(os.environ.get("TINYGPT2_THREADS"))
            is_open = "numpy" not in sys.modules and (is_told or not is_blas_set())
            if threadpoolctl is None:
                fixed = min(count, useful) if is_open else None
            else:
                fixed = count if is_open and is_told else None
            np = numpy_with_threads(fixed)
            blas = BlasThreads(threadpoolctl, fixed)
            if is_told and fixed is None and blas.control is None:
                note("NumPy keeps the threads it was loaded with; threadpoolctl could limit them")
        return blas


def is_blas_set() -> bool:
    """Whether the user has said how many threads BLAS should take."""
    return any(os.environ.get(name) for name in (*BLAS_THREADS, "OMP_NUM_THREADS"))


def numpy_with_threads(threads: Optional[int]) -> Any:
    """NumPy, imported while the environment names this number of threads."""
    values = {} if threads is None else dict.fromkeys(BLAS_THREADS, str(threads))
    try:
        with environment(values):
            return importlib.import_module("numpy")
    except ImportError as error:
        advice = "`pip install numpy` installs it"
        raise TinyGPT2Error(f"NumPy is needed for this: {error} ({advice})") from None


def find_threadpoolctl() -> Any:
    """The package, if it is installed and can do what is needed."""
    if sys.platform == "darwin":  # it cannot change the threads of Apple's BLAS
        return None
    try:
        with environment({"KMP_DUPLICATE_LIB_OK": "True"}):  # which its import would leave set
            module = importlib.import_module("threadpoolctl")
    except ImportError:
        return None
    return module if hasattr(module, "ThreadpoolController") else None  # from version 3 on


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment, and put back what was there before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class BlasThreads:
    """The threads of NumPy's BLAS. Their number is one for the whole process.

    So passes change it one at a time, and it is as before after each. `fixed` is the number that
    was set for NumPy's import, or None.
    """

    def __init__(self, threadpoolctl: Any, fixed: Optional[int]) -> None:
        self.fixed = fixed
        self.control: Any = None  # of the BLAS that are loaded
        if threadpoolctl is not None:
            control = threadpoolctl.ThreadpoolController().select(user_api="blas")
            self.control = control if control.lib_controllers else None
        self.new_lock()
        if hasattr(os, "register_at_fork"):  # another thread may hold it at the fork
            os.register_at_fork(after_in_child=self.new_lock)

    def new_lock(self) -> None:
        self.lock = threading.RLock()

    def describe(self, threads: int) -> str:
        if self.control is not None:
            return f"at most {threads} threads"
        return "threads as NumPy was loaded with" if self.fixed is None else f"{self.fixed} threads"

    @contextlib.contextmanager
    def limited(self, threads: int) -> Iterator[None]:
        """Let BLAS take so many threads, or fewer if it takes fewer already."""
        if self.control is None:
            yield
            return
        with self.lock:
            numbers = [library.num_threads for library in self.control.lib_controllers]
            with self.control.limit(limits=min(threads, *numbers)):
                yield


blas: Optional[BlasThreads] = None  # once NumPy is imported


# ------------------------------------------------------------------------------------------------
# 10. Toy
# ------------------------------------------------------------------------------------------------

# A toy is a table of bigrams in the form of a GPT-2. Its tokens fall into classes: each letter is
# one, and so are space, end-of-text, and all other bytes together. The embedding of a token has a 1
# at the feature of its class, the final layer norm makes that one large and the others 0, and so
# the head holds the logits of the next token for each class. They are a random order of the
# classes, LEVEL apart. So the best token is best by far, and both backends choose the same, though
# NumPy's last bits differ between machines. Attention and MLP are random, and too small to matter.

LETTERS = b"aeioubcdfghjklmnprstvwyz"
N_VOWELS = 5
SPACE, END, OTHER = range(len(LETTERS), len(LETTERS) + 3)  # classes
N_BYTES, TOY_WIDTH, TOY_POSITIONS = 256, 32, 128
LEVEL, NEVER = 0.3, -20.0  # logits
SMALL = 1e-3


def toy(
    seed: SupportsIndex = 0,
    *,
    backend: Optional[Literal["c", "numpy"]] = None,
    threads: Optional[SupportsIndex] = None,
) -> Model:
    """A language model of some kilobytes, made in memory within milliseconds, for tests.

    Its vocabulary is the 256 bytes and end-of-text, so that every text can be encoded. Its texts
    are syllables without sense. They are the same on every machine and in both backends. Another
    `seed` gives another model.
    """
    number = as_index(seed)
    if number is None:
        raise InputError(f"seed: expected a whole number, found {quote(seed)}")
    model = Model(TensorFile(f"toy({number})", toy_file(number)), backend, threads)
    model._toy_seed = number
    return model


def toy_again(seed: int, backend: Optional[Literal["c", "numpy"]], threads: Optional[int]) -> Model:
    """A toy that was pickled."""
    return toy(seed, backend=backend, threads=threads)


def toy_config() -> Config:
    return Config(
        vocab_size=N_BYTES + 1,
        n_positions=TOY_POSITIONS,
        n_embd=TOY_WIDTH,
        n_layer=1,
        n_head=2,
        n_inner=16,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=False,
        bos_token_id=N_BYTES,
        eos_token_ids=(N_BYTES,),
        n_merges=0,
        n_token_bytes=N_BYTES,
        added_tokens=(),
        tokens_before=(),
        tokens_after=(),
        add_prefix_space=False,
        pre_tokenizer="gpt2",
        generation={},
    )


def toy_file(seed: int) -> mmap.mmap:
    """The .tg2 file of a toy, in memory."""
    import random

    config = toy_config()
    entries = layout(config)
    chance = random.Random(seed).random  # Python promises that it gives the same in all versions
    data = b"".join(toy_tensor(name, entry, chance) for name, entry in entries.items())
    metadata = {**tg2_metadata(config), "crc32": f"{zlib.crc32(data):08x}"}
    content = make_header(entries, metadata) + data
    memory = mmap.mmap(-1, len(content))
    memory[:] = content
    return memory


def toy_tensor(name: str, entry: Entry, chance: Callable[[], float]) -> bytes:
    dtype, shape = entry
    size = math.prod(shape)
    if name.startswith(("vocab.", "merges.")):
        return toy_vocabulary(name).ljust(byte_size(dtype, shape), b"\0")
    if name == "wte.weight":
        numbers = toy_panels([[float(i == c) for i in range(TOY_WIDTH)] for c in toy_classes()])
    elif name == "lm_head.weight":
        numbers = toy_panels(toy_head(chance))
    elif name == "ln_f.bias":  # layer norm turns the zeros beside a one into -1 / sqrt(width - 1)
        numbers = [(TOY_WIDTH - 1) ** -0.5] * size
    elif len(shape) == 1:
        numbers = [float(name.endswith("weight"))] * size  # layer norms scale by 1; no biases
    else:
        numbers = [SMALL * (2 * chance() - 1) for _ in range(size)]
    return struct.pack(f"<{size}f", *numbers)


def toy_classes() -> list[int]:
    """The class of every token."""
    classes = [OTHER] * N_BYTES + [END]
    classes[ord(" ")] = SPACE
    for number, letter in enumerate(LETTERS):
        classes[letter] = number
    return classes


def toy_head(chance: Callable[[], float]) -> list[list[float]]:
    """For every token its logit after each class, in the units of the final layer norm."""
    scale = (TOY_WIDTH - 1) ** 0.5 + (TOY_WIDTH - 1) ** -0.5  # what stands at the class's feature
    tables = [next_logits(before, chance) for before in range(OTHER + 1)]
    rows = [[table[c] / scale for table in tables] for c in toy_classes()]
    return [row + [0.0] * (TOY_WIDTH - len(row)) for row in rows]


def next_logits(before: int, chance: Callable[[], float]) -> list[float]:
    """The logit of each class after the class `before`, in a random order that makes syllables.

    A consonant likes a vowel next, a vowel likes a consonant, all others like any letter. After a
    vowel, a space is the third best, and end-of-text the eighth.
    """
    is_vowel, is_consonant = before < N_VOWELS, N_VOWELS <= before < SPACE
    liked = range(N_VOWELS if is_vowel else 0, N_VOWELS if is_consonant else SPACE)
    order = sorted(range(SPACE), key=lambda letter: (letter in liked, chance()))
    table = [NEVER] * (OTHER + 1)
    for place, letter in enumerate(order):
        table[letter] = LEVEL * place
    if is_vowel:
        table[SPACE], table[END] = LEVEL * (SPACE - 2.5), LEVEL * (SPACE - 7.5)
    return table


def toy_panels(rows: list[list[float]]) -> list[float]:
    """A matrix [n, k] in panels [ceil(n/16), k, 16], flat."""
    rows = rows + [[0.0] * TOY_WIDTH] * (-len(rows) % PANEL)
    return [
        rows[first + lane][i]
        for first in range(0, len(rows), PANEL)
        for i in range(TOY_WIDTH)
        for lane in range(PANEL)
    ]


def toy_vocabulary(name: str) -> bytes:
    if name == "vocab.bytes":
        return bytes(range(256))
    if name == "vocab.offsets":  # end-of-text has no bytes
        return struct.pack("<258I", *range(257), 256)
    return struct.pack("<256I", *range(256)) if name == "vocab.byte_ids" else b""


# ------------------------------------------------------------------------------------------------
# 11. Command line
# ------------------------------------------------------------------------------------------------


EPILOG = """examples:
  python tinygpt2.py --prompt "Once upon a time"
  python tinygpt2.py --prompt - --max-tokens 50 --seed 1 < prompt.txt
  python tinygpt2.py download gpt2 -o gpt2.tg2
  python tinygpt2.py --model gpt2.tg2 --prompt "Alan Turing" --temperature 0

Without a prompt, at a terminal, it asks for one: Ctrl-C stops an answer, an empty line continues
it, Ctrl-D leaves. `python tinygpt2.py COMMAND --help` explains a command.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C, 143 and 129 by SIGTERM and
SIGHUP.
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command line. Returns the exit code; errors are one line on standard error."""
    if sys.stderr is None:  # closed: `print` would take standard output in its place
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        if sys.stdout is None:
            raise OSError("standard output is closed")
        with ending_by_signals():
            code = run_arguments(arguments)
            sys.stdout.flush()
            return code
    except TinyGPT2Error as error:
        print_error(error)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the answer has closed the pipe
        drop_output()
        return 0
    except (OSError, MemoryError) as failure:  # another name: mypyc gives each name one type
        drop_output()
        print_error(str(failure) or "out of memory")
        return 1


@contextlib.contextmanager
def ending_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the program, so that it leaves nothing behind.

    A signal that is ignored, as SIGHUP under nohup, stays so.
    """
    signal: Any = importlib.import_module("signal")

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def print_error(error: object) -> None:
    """One line on standard error, in which options are called as the command line calls them."""
    text = re.sub(r"^option (\w+)", lambda match: flag_of(match[1]), str(error))
    print(f"tinygpt2: error: {text}", file=sys.stderr)


def flag_of(option: str) -> str:
    """The command line's name of an option."""
    names = {"max_new_tokens": "--max-tokens", "bad_words": "--bad-word"}
    return names.get(option) or "--" + option.replace("_", "-")


def drop_output() -> None:
    """Discard what cannot be written. Otherwise Python tries again, and fails, when it exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_arguments(arguments: Optional[Sequence[str]]) -> int:
    try:
        options = build_parser().parse_args(arguments)
        options.run(options)
        return 0
    except SystemExit as leave:  # argparse's: 0 after --help, 2 after wrong usage
        return leave.code if isinstance(leave.code, int) else 2


def build_parser() -> Parser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="tinygpt2",
        description="GPT-2 in one file: prints the text that follows a prompt.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tinygpt2 {__version__}")
    add_model_options(parser)
    add_prompt_options(parser)
    add_choice_options(parser)
    add_output_options(parser)
    add_batch_options(parser)
    parser.set_defaults(run=run_generate, errors="strict")
    add_commands(parser)
    return parser


def add_model_options(parser: Parser) -> None:
    add_model_file(parser)
    parser.add_argument(
        "--backend", choices=BACKENDS, help="what computes (default: the fastest that is there)"
    )
    text = "threads to use (default: $TINYGPT2_THREADS, or one for each processor)"
    parser.add_argument("--threads", type=int, metavar="N", help=text)


def add_model_file(parser: Parser) -> None:
    text = "a .tg2 file (default: the model that comes with tinygpt2)"
    parser.add_argument("--model", metavar="FILE", help=text)


def add_prompt_options(parser: Parser) -> None:
    group = parser.add_mutually_exclusive_group()
    text = "the prompt; - reads it from standard input"
    group.add_argument("--prompt", metavar="TEXT", help=text)
    text = 'the prompt as token ids: "15496 995"; - reads them from standard input'
    group.add_argument("--ids", metavar="IDS", help=text)
    text = "bytes that are no text: an error (strict, the default), or read as U+FFFD (replace)"
    parser.add_argument("--errors", choices=("strict", "replace"), help=text)
    text = "recognise special tokens such as <|endoftext|> in the text of prompts"
    parser.add_argument("--special", action="store_true", help=text)


CHOICE_OPTIONS = {  # by their names in `Options`
    "max_new_tokens": (int, "tokens to generate at most"),
    "temperature": (float, "0 always takes the most probable token"),
    "top_k": (int, "choose among the k most probable tokens; 0: all"),
    "top_p": (float, "choose among the fewest tokens that hold this much probability"),
    "min_p": (float, "leave out tokens below this fraction of the best one's probability"),
    "repetition_penalty": (float, "above 1, tokens that are in the text become less likely"),
    "seed": (int, "the same seed gives the same text"),
    "max_time": (float, "seconds after which no further token is begun"),
    "keep": (int, "with --overflow shift: tokens of the beginning that are kept"),
    "num_beams": (int, "above 1: beam search"),
}


def add_choice_options(parser: Parser) -> None:
    for name, (kind, text) in CHOICE_OPTIONS.items():
        default = getattr(Options(), name)
        shown = f"the model's own, or {default}" if name in STORED_OPTIONS else str(default)
        shown = "a fresh one" if default is None else shown
        parser.add_argument(
            flag_of(name),
            type=kind,
            dest=name,
            metavar="N",
            help=f"{text} (default: {shown})",
        )
    text = "end the answer before this text; can be given several times"
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help=text)
    text = "a text whose tokens must not appear; can be given several times"
    parser.add_argument("--bad-word", action="append", dest="bad_words", metavar="TEXT", help=text)
    text = "a regular expression that the whole answer must match"
    parser.add_argument("--regex", metavar="PATTERN", help=text)
    text = "when the context is full: stop (the default), error, or shift, which forgets the oldest"
    parser.add_argument("--overflow", choices=OVERFLOWS, help=text)


def add_output_options(parser: Parser) -> None:
    for flag, text in {
        "--text": "with --ids: print the answer as text, not as ids",
        "--json": "print one JSON object: text, ids, finish_reason, seed, figures",
        "--stats": "print speed and memory to standard error",
    }.items():
        parser.add_argument(flag, action="store_true", help=text)


def add_batch_options(parser: Parser) -> None:
    text = 'answer every line of a file, such as {"prompt": "text"} or {"ids": [1, 2]}; see README'
    parser.add_argument("--batch", metavar="FILE", help=text)
    text = "where the answers of --batch go, a line for each; finished lines are kept"
    parser.add_argument("--out", metavar="FILE", help=text)
    text = "texts that --batch computes at a time (default: 8)"
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help=text)
    text = "with --batch, a line that is wrong: named and skipped (the default), or the end"
    parser.add_argument("--bad-lines", choices=("skip", "stop"), default="skip", help=text)


def add_commands(parser: Parser) -> None:
    import argparse

    commands = parser.add_subparsers(title="commands", metavar="COMMAND", prog="tinygpt2")
    for name, (add_options, run, text) in {
        "convert": (
            add_convert_options,
            run_convert,
            "make a .tg2 file from a checkpoint of transformers",
        ),
        "download": (
            add_download_options,
            run_download,
            "fetch a checkpoint from the Hugging Face hub and convert it",
        ),
        "score": (add_score_options, run_score, "measure how well a model predicts a text"),
        "info": (add_info_options, run_info, "show what a .tg2 file holds"),
        "bench": (add_bench_options, run_bench, "measure the speed of a model"),
    }.items():
        # An option that is not given keeps the value that it was given before the command.
        command = commands.add_parser(
            name, help=text, description=text, argument_default=argparse.SUPPRESS
        )
        add_options(command)
        command.set_defaults(run=run)


def add_convert_options(parser: Parser) -> None:
    text = "the checkpoint: a folder, a .safetensors file, or one of nanoGPT, minGPT or llm.c"
    parser.add_argument("source", help=text)
    text = "the .tg2 file to write"
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help=text)
    text = "the tokenizer: a folder, a tokenizer.json, a list of characters in JSON, or gpt2"
    parser.add_argument("--tokenizer", default=None, metavar="PATH", help=text)
    text = "the number of attention heads, for a checkpoint that does not tell it"
    parser.add_argument("--heads", type=int, default=None, metavar="N", help=text)
    text = "the activation, for a checkpoint that does not tell it"
    parser.add_argument("--activation", choices=ACTIVATIONS, default=None, help=text)


def add_download_options(parser: Parser) -> None:
    parser.add_argument("name", help="its name on the hub: gpt2, or owner/name")
    text = "the .tg2 file to write (default: the name, without the owner, and .tg2)"
    parser.add_argument("-o", "--out", default=None, metavar="FILE", help=text)
    text = "a branch, tag or commit (default: main)"
    parser.add_argument("--revision", default="main", help=text)


def add_score_options(parser: Parser) -> None:
    add_model_options(parser)
    add_prompt_options(parser)
    text = "print one JSON object, with the log-probability of every token"
    parser.add_argument("--json", action="store_true", help=text)


def add_info_options(parser: Parser) -> None:
    parser.add_argument("file", nargs="?", default=None, help="the same as --model")
    add_model_file(parser)
    text = "also check the checksum of the data and the vocabulary"
    parser.add_argument("--verify", action="store_true", default=False, help=text)
    text = "show what computes on this machine, and check it with the model"
    parser.add_argument("--system", action="store_true", default=False, help=text)


def add_bench_options(parser: Parser) -> None:
    add_model_options(parser)
    text = "tokens to decode in a run (default: 32)"
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help=text)
    text = "how many runs to take the median of (default: 5)"
    parser.add_argument("--runs", type=int, default=5, metavar="N", help=text)


def load_model(options: Arguments) -> Model:
    return load(options.model, backend=options.backend, threads=options.threads)


def read_prompt(options: Arguments) -> Optional[Union[str, list[int]]]:
    """The prompt that the options name, as text or ids; None if they name none."""
    if options.ids is not None:  # wrong bytes are not numbers either
        return parse_ids(read_argument(options.ids, "--ids", "replace"))
    if options.prompt is not None:
        return read_argument(options.prompt, "--prompt", options.errors)
    return None


def read_argument(argument: str, name: str, errors: str) -> str:
    return read_input(errors) if argument == "-" else argument_text(argument, name, errors)


def parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"--ids: expected whole numbers, found {quote(text)}") from None


def read_input(errors: str) -> str:
    """Standard input as text, without the line end that ends a file or an echo."""
    if sys.stdin is None:
        raise InputError("standard input is closed")
    data = sys.stdin.buffer.read()
    start, encoding = byte_order_mark(data, "standard input", errors)
    text = decode(data, start, encoding, "standard input", errors)
    return re.sub(r"\r?\n\Z", "", text)


BYTE_ORDER_MARKS = {  # the longer ones first, as that of UTF-32 begins like that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def byte_order_mark(data: bytes, name: str, errors: str) -> tuple[int, str]:
    """The length of the mark with which a file begins, and the encoding that it tells."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return len(mark), encoding
    if errors == "strict":
        refuse_unmarked(data, name)
    return 0, "utf-8"


def refuse_unmarked(data: bytes, name: str) -> None:
    """Raise an error for UTF-16 without a mark: Latin letters look like UTF-8 with null bytes."""
    if len(data) >= 4 and b"\0\0" in (data[0:4:2], data[1:4:2]):
        found = "a null byte beside each letter, as in UTF-16 without a byte order mark"
        advice = "convert it to UTF-8, or let `--errors replace` read the null bytes too"
        raise InputError(f"{name}: expected UTF-8, found {found}; {advice}")


def argument_text(text: str, name: str, errors: str) -> str:
    """An argument or a typed line, which is UTF-8 whatever encoding the locale has."""
    try:
        data = text.encode("utf-8", "surrogateescape")  # bytes that Python could not decode
    except UnicodeEncodeError:  # half a surrogate pair, which Windows allows
        data = text.encode("utf-8", "surrogatepass")
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    return decode(data, start, "utf-8", name, errors)


def decode(data: bytes, start: int, encoding: str, name: str, errors: str) -> str:
    """Bytes from `start` on as text."""
    try:
        return data[start:].decode(encoding, errors)
    except UnicodeDecodeError as error:
        offset = start + error.start
        found = f"the byte 0x{data[offset]:02x} at offset {offset}"
        advice = "convert it to UTF-8, or let `--errors replace` read U+FFFD in its place"
        raise InputError(f"{name}: expected {encoding.upper()}, found {found}; {advice}") from None


def run_generate(options: Arguments) -> None:
    options.stop = [argument_text(text, "--stop", options.errors) for text in options.stop]
    prompt = read_prompt(options)
    is_batch = check_batch_usage(options, prompt is not None)
    if not is_batch and prompt is None and not (sys.stdin and sys.stdin.isatty()):
        raise InputError("no prompt: pass --prompt TEXT, or --prompt - to read standard input")
    choices = {name: getattr(options, name) for name in Options._fields if hasattr(options, name)}
    with load_model(options) as model:
        if prompt is not None:
            print_answer(model, prompt, choices, options)
            return
        model.begin([0], False, choices, False, None).session.close()  # are the options right?
        if is_batch:
            run_batch(model, choices, options)
        else:
            interact(model, choices, options.special, options.errors)


def check_batch_usage(options: Arguments, has_prompt: bool) -> bool:
    """Whether this is a batch. Refuse options that do not go together."""
    if (options.batch is None) != (options.out is None):
        raise InputError("--batch FILE needs --out FILE, and --out needs --batch")
    if options.batch is None:
        return False
    positive("--batch-size", options.batch_size)
    if has_prompt:
        raise InputError("--batch: its prompts are in the file; leave --prompt and --ids out")
    if options.text or options.json or options.stats:
        raise InputError("--batch: its answers are JSON; leave --text, --json and --stats out")
    return True


# A batch reads a file of JSON lines and writes another one. Each line of the input is an object
# with "prompt" (text) or "ids", and any options by their names in `Options`. Each line of the
# output has "line", the number of its input line, and then text, ids, finish_reason and seed, or
# "error" for a line that is wrong or whose answer failed. The lines are in the order of the input,
# so the last one tells where a run that was stopped has to go on.

MAX_LINE = 1 << 26  # bytes; a file with longer lines is of another kind
ANOTHER_OUT = "it is not the output of this batch, and is left as it is; name another --out"


def run_batch(model: Model, choices: dict[str, Any], options: Arguments) -> None:
    """Answer the lines of one file in another. A run that was stopped goes on where it was."""
    source, path = options.batch, options.out
    with opened_input(source, options.errors) as text:
        run = BatchRun(model, choices, options, text)
        with opened_output(path, source) as out:
            done, last, size = finished_lines(out, path, run.total)
            run.check_input(done, last)
            if size < os.fstat(out.fileno()).st_size:
                out.truncate(size)  # a line that a kill has cut off
            if done:
                found = f"the answers up to line {done} are of an earlier run"
                print(f"tinygpt2: {show_path(path)}: {found}", file=sys.stderr)
            run.run(done, out)


class BatchRun:
    """Computes what is missing of a batch."""

    def __init__(
        self, model: Model, choices: dict[str, Any], options: Arguments, text: TextIO
    ) -> None:
        self.model = model
        self.choices = choices
        self.options = options
        self.text = text
        self.start = text.tell()
        self.total = sum(1 for _ in numbered_lines(text))
        self.progress = progress_bar()
        self.waiting: list[int] = []  # the numbers of lines that are not written yet, in order
        self.ready: dict[int, str] = {}  # lines of the output that wait for others before them
        self.sums: dict[int, str] = {}  # checksums of the waiting lines and all before them
        self.n_bad = 0
        self.error: Optional[TinyGPT2Error] = None  # ends the run when what was begun is done

    def numbered(self) -> Iterator[tuple[int, bytes, str]]:
        """The lines of the input, each with a checksum of the options and all lines so far."""
        start = [self.model.fingerprint, self.options.special, sorted(self.choices.items())]
        crc = zlib.crc32(json.dumps(start).encode())
        self.text.seek(self.start)
        for number, line in numbered_lines(self.text):
            crc = zlib.crc32(line.rstrip() + b"\n", crc)
            yield number, line, f"{crc:08x}"

    def check_input(self, done: int, last: object) -> None:
        """Refuse answers to other lines, or with other options, than those of this run."""
        for number, _, crc in self.numbered():
            if number == done and crc != last:
                expected = f"answers to these {done} lines with these options, checksum {crc}"
                path = self.options.out
                raise FormatError(path, f"line {done}", expected, quote(last), ANOTHER_OUT)
            if number >= done:
                return

    def run(self, done: int, out: BinaryIO) -> None:
        """Answer the lines behind the first `done`."""
        for number, answer in run_all(self.answers(done, out), self.options.batch_size):
            self.finish(number, answer)
            self.write(out)
        self.write(out)
        if self.progress and self.total:
            self.progress("answers", self.total, self.total)
        error = self.error
        if error is not None:
            raise error
        if self.n_bad:
            print(f"tinygpt2: {self.n_bad} lines were wrong and skipped", file=sys.stderr)

    def answers(self, done: int, out: BinaryIO) -> Iterator[tuple[int, Answer]]:
        """The answers that are to be computed, with the numbers of their lines."""
        for number, line, crc in self.numbered():
            if self.error is not None:
                return
            if number <= done or not line.strip():
                continue
            self.waiting.append(number)
            self.sums[number] = crc
            try:
                answer = self.answer_to(line)
            except InputError as error:
                self.refuse(number, error)
                self.write(out)
            else:
                yield number, answer

    def answer_to(self, line: bytes) -> Answer:
        try:
            values = parse_json_object("", "line", line)
        except FormatError as error:
            raise InputError(f"expected {error.expected}, found {error.found}") from None
        names = [name for name in ("prompt", "ids") if name in values]
        if len(names) != 1:
            raise InputError('expected either "prompt" or "ids"')
        prompt = values.pop(names[0])
        if not isinstance(prompt, str if names[0] == "prompt" else list):
            raise InputError('expected a text as "prompt", or a list of tokens as "ids"')
        for name in values:
            if name not in Options._fields:
                raise InputError(f"unknown name {quote(name)}{near_name(name)}")
        biases = values.get("logit_bias")
        if isinstance(biases, dict):  # the names of JSON are texts
            values["logit_bias"] = {as_id(token): bias for token, bias in biases.items()}
        choices = {**self.choices, **values}
        return self.model.begin(prompt, self.options.special, choices, False, None)

    def finish(self, number: int, answer: Answer) -> None:
        try:
            result = answer.result()
        except (InputError, NumericError) as error:
            self.refuse(number, error)
            return
        values = {"line": number, "text": result.text, "ids": result.ids}
        outcome = {"finish_reason": result.finish_reason, "seed": result.seed}
        self.put(number, {**values, **outcome})

    def refuse(self, number: int, error: TinyGPT2Error) -> None:
        """Name a line that is wrong, or end the run."""
        text = f"{show_path(self.options.batch)}: line {number}: {error}"
        if self.progress:
            print(f"\r{'':60}", end="\r", file=sys.stderr)  # in place of the bar
        if self.options.bad_lines == "stop":
            self.error = self.error or TinyGPT2Error(text)
            return
        print_error(text)
        self.n_bad += 1
        self.put(number, {"line": number, "error": str(error)})

    def put(self, number: int, values: dict[str, Any]) -> None:
        self.ready[number] = json.dumps({**values, "input": self.sums.pop(number)})

    def write(self, out: BinaryIO) -> None:
        """Write the lines of the output before which none is missing."""
        while self.waiting and self.waiting[0] in self.ready:
            first = self.waiting.pop(0)
            out.write(self.ready.pop(first).encode() + b"\n")
            if self.progress and first < self.total:
                self.progress("answers", first, self.total)
        out.flush()


def as_id(token: str) -> Union[int, str]:
    """A token id that JSON has as text; other texts are left to `check_options`."""
    return int(token) if re.fullmatch("[0-9]{1,9}", token) else token


def check_regular(flag: str, path: str) -> None:
    """Refuse pipes and the like: a batch reads its files again when it goes on."""
    try:
        mode = os.stat(path).st_mode if path != "-" else None
    except (OSError, ValueError) as error:
        if flag == "--out" and isinstance(error, FileNotFoundError):
            return
        raise unreadable(path, error) from None
    if mode is None or not stat.S_ISREG(mode):
        found = "-" if mode is None else kind_of(mode)
        advice = "a run that was stopped goes on by what the files hold"
        raise InputError(f"{flag}: expected a regular file, found {found} ({advice})")


def unreadable(path: str, error: Exception) -> FormatError:
    reason = getattr(error, "strerror", None) or str(error)
    return FormatError(
        path, "file", "a readable file", reason, "check the path and its permissions"
    )


def opened_input(path: str, errors: str) -> TextIO:
    """A file whose byte order mark, if it has one, tells its encoding.

    Bytes that are no text stay as they are, to be refused with their line, unless `errors` is
    "replace".
    """
    check_regular("--batch", path)
    try:
        with open(path, "rb") as file:
            start, encoding = byte_order_mark(file.read(4), show_path(path), errors)
        handling = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
        handling = "replace" if errors == "replace" else handling
        text = open(path, encoding=encoding, errors=handling, newline="\n")  # noqa: SIM115
    except OSError as error:
        raise unreadable(path, error) from None
    text.seek(start)
    return text


def numbered_lines(text: TextIO) -> Iterator[tuple[int, bytes]]:
    """The lines of a file in UTF-8, numbered from 1."""
    for number in itertools.count(1):
        try:
            line = text.readline(MAX_LINE)
        except (OSError, UnicodeError) as error:
            raise unreadable(text.name, error) from None
        if not line:
            return
        if len(line) == MAX_LINE and not line.endswith("\n"):
            expected, advice = f"at most {MAX_LINE} characters", "is it a file of JSON lines?"
            raise FormatError(text.name, f"line {number}", expected, "more", advice)
        yield number, line.encode("utf-8", text.errors or "strict")


def opened_output(path: str, source: str) -> BinaryIO:
    """The file of the answers: written at its end, and by this process alone."""
    check_regular("--out", path)
    if os.path.exists(path) and os.path.samefile(path, source):
        raise InputError("--out: it is the file of --batch; name another one")
    try:
        out = open(path, "a+b")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise cannot_write(path, getattr(error, "strerror", None) or str(error)) from None
    if lock(out, wait=False) is False:
        out.close()
        raise TinyGPT2Error(f"{show_path(path)}: another process writes it; wait for it")
    return out


def finished_lines(out: BinaryIO, path: str, total: int) -> tuple[int, object, int]:
    """The number of the last of `total` input lines whose answer is there, its checksum, and where
    the answers end. A file that is something else is refused."""
    out.seek(0)
    done, last, size = 0, None, 0
    line = out.readline(MAX_LINE)
    while line.endswith(b"\n"):
        number, last = line_number(line)
        if number is None or not done < number <= total:
            expected = f"rising line numbers, at most {total}, the lines of the input"
            raise FormatError(path, "content", expected, quote(line), ANOTHER_OUT)
        done, size = number, size + len(line)
        line = out.readline(MAX_LINE)
    is_ours = done or b'{"line": '.startswith(line[:9])
    if not is_ours or len(line) == MAX_LINE:
        expected = f"lines of answers, none over {MAX_LINE} bytes"
        raise FormatError(path, "content", expected, quote(line), ANOTHER_OUT)
    return done, last, size


def line_number(line: bytes) -> tuple[Optional[int], object]:
    """What a line of the output answers, and its checksum; None for a line of another kind."""
    try:
        values = parse_json_object("", "line", line)
    except FormatError:
        return None, None
    number = values.get("line")
    return number if is_count(number) else None, values.get("input")


def print_answer(model: Model, prompt: Prompt, choices: dict[str, Any], options: Arguments) -> None:
    """Print the answer as it comes, or as JSON at its end; then notes on standard error."""
    as_text = options.ids is None or options.text
    answer = model.begin(prompt, options.special, choices, as_text, None)
    n_prompt = len(answer.session)
    times = [time.perf_counter()]
    pieces: list[str] = []
    while (event := answer.step()) is not None:
        token, piece = event
        if token is not None:
            times.append(time.perf_counter())
        pieces.append(piece if as_text else "" if token is None else f"{token} ")
        if not options.json:
            print(pieces[-1], end="", flush=True)
    figures = speed(n_prompt, times)
    print(as_json(answer, "".join(pieces) if as_text else None, figures) if options.json else "")
    if answer.finish_reason == "context":
        print_full_context(model)
    if options.stats:
        figures["backend"] = model.backend.describe()
        print("\n".join(f"{name}: {value}" for name, value in figures.items()), file=sys.stderr)


def as_json(answer: Answer, text: Optional[str], figures: dict[str, Any]) -> str:
    values = {"text": text, "ids": answer.ids}
    outcome = {"finish_reason": answer.finish_reason, "seed": answer.seed}
    return json.dumps({**values, **outcome, "figures": figures})


def print_full_context(model: Model) -> None:
    used = f"all {model.config.n_positions} positions of the context are used"
    print(f"tinygpt2: stopped: {used}", file=sys.stderr)


def speed(n_prompt: int, times: list[float]) -> dict[str, Any]:
    """Figures of an answer. `times`: when it was begun, and when each of its tokens was there."""
    n_new = len(times) - 1
    first = times[1] - times[0] if n_new else None
    rest = times[-1] - times[1] if n_new > 1 else 0.0  # what the tokens after the first one took
    return {
        "prompt_tokens": n_prompt,
        "new_tokens": n_new,
        "seconds_to_first_token": None if first is None else round(first, 4),
        "tokens_per_second": round((n_new - 1) / rest, 1) if rest else None,
        "peak_memory_mb": peak_memory(),
    }


def peak_memory() -> Optional[float]:
    """The most memory that this process has held, mapped weights included, in MB."""
    # Linux says it here. Its getrusage also counts the program that started this one.
    peak = re.search(r"^VmHWM:\s*(\d+) kB", read_text("/proc/self/status"), re.MULTILINE)
    if peak:
        return round(int(peak[1]) * 1024 / 1e6, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def interact(model: Model, choices: dict[str, Any], special: bool, errors: str) -> None:
    """Ask for prompts at the terminal until Ctrl-D. An empty line continues the last answer."""
    prepare_terminal()
    print(f"tinygpt2 {__version__}: Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    session = model.session()
    while True:
        try:
            prompt = argument_text(input("> "), "prompt", errors)
            if prompt:
                session.close()
                session = model.session()
            for piece in session.begin(prompt, special, choices, True, None):
                print(piece, end="", flush=True)
            print()
            if session.finish_reason == "context":
                print_full_context(model)
        except KeyboardInterrupt:
            print()
        except InputError as error:
            print_error(error)
        except EOFError:
            print()
            return


def prepare_terminal() -> None:
    """Let `input` read UTF-8 in every locale, and hand over other bytes as arguments have them."""
    if hasattr(sys.stdin, "reconfigure"):
        encoding = None if sys.platform == "win32" else "utf-8"  # Windows knows its console's
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` line editing and a history)


def progress_bar() -> Optional[Progress]:
    """A function that draws a bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        return None
    last = [0.0]

    def draw(label: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - last[0] > 0.1 or done >= total:
            last[0] = now
            bar, percent = "#" * (30 * done // max(total, 1)), 100 * done // max(total, 1)
            end = "\n" if done >= total else ""
            sys.stderr.write(f"\r{label} [{bar:30}] {percent:3}%{end}")
            sys.stderr.flush()

    return draw


@contextlib.contextmanager
def printed_notes() -> Iterator[None]:
    """Print notes on standard error after a success: a user of the command has no log."""
    import io
    import logging

    logger, notes = logging.getLogger("tinygpt2"), io.StringIO()
    handler = logging.StreamHandler(notes)
    handler.setFormatter(logging.Formatter("tinygpt2: note: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    print(notes.getvalue(), end="", file=sys.stderr)


def run_convert(options: Arguments) -> None:
    with printed_notes():
        convert(
            options.source,
            options.out,
            progress_bar(),
            options.tokenizer,
            options.heads,
            options.activation,
        )


def run_download(options: Arguments) -> None:
    out = options.out or options.name.rpartition("/")[2] + ".tg2"
    bar = progress_bar()
    fetch = load_companion("convert").download
    with printed_notes():
        fetch(options.name, out, options.revision, bar, bars=bar is not None)


def run_score(options: Arguments) -> None:
    prompt = read_prompt(options)
    if prompt is None:
        raise InputError("no text: pass --prompt TEXT, or --prompt - to read standard input")
    with load_model(options) as model:
        score = model.score(prompt, progress_bar(), options.special)
    values: dict[str, Any] = {
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


def run_info(options: Arguments) -> None:
    """Print a file's configuration and tensors, or what computes here; check it if asked to."""
    path = options.file or options.model
    if options.system:
        print_table(system_facts(path))
        return
    with contextlib.closing(TensorFile(path or default_model())) as file:
        config = read_config(file)
        if options.verify:
            verify(file, config)
        print_table(file_facts(file, config))
        print()
        print_table(tensor_facts(file))


def system_facts(model_path: Optional[str]) -> list[tuple[str, str]]:
    """What computes on this machine, where it was looked for, and whether it computes right."""
    import platform

    facts = [
        ("tinygpt2", f"{__version__}, {os.path.abspath(__file__)}"),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("processors", str(available_processors())),
        ("threads", f"{default_threads()} (TINYGPT2_THREADS)"),
        ("numpy", numpy_facts()),
    ]
    library = library_path()
    if library is None:
        wanted = os.path.join(os.path.dirname(os.path.abspath(__file__)), LIBRARY)
        return [*facts, ("kernels", f"none: `python build.py` makes {wanted}")]
    facts += [("kernels", library), ("sha256", sha256(library))]
    try:
        model = load(model_path, backend="c")
    except MissingFileError:
        if model_path is not None:
            raise
        return [*facts, ("c against numpy", "not checked: no default model; name a .tg2 file")]
    with model:
        backend: Any = model.backend
        return [
            *facts,
            ("instruction set", f"{backend.isa} (TINYGPT2_ISA: {backend.isas()})"),
            ("c against numpy", compare_backends(model)),
        ]


def sha256(path: str) -> str:
    import hashlib

    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def numpy_facts() -> str:
    """The version of NumPy, and how many threads it takes; "none" if it is not installed."""
    try:
        threads = import_numpy().describe(default_threads())
    except TinyGPT2Error:
        return "none"
    return f"{np.__version__}, {threads}"


def compare_backends(model: Model) -> str:
    """Raise an error if the model's logits differ from NumPy's by more than float32 explains."""
    if numpy_facts() == "none":
        return "not checked: NumPy is not installed"
    ids = list(range(min(64, model.config.n_positions, model.config.vocab_size)))
    with load(model.path, backend="numpy") as reference:
        expected, found = reference.logits(ids), model.logits(ids)
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= 1e-4:  # also if it is NaN
        raise TinyGPT2Error(f"kernels: off by {difference:.0e} of the largest logit; {REBUILD}")
    return f"right: logits within {difference:.0e} of the largest one"


def file_facts(file: TensorFile, config: Config) -> list[tuple[str, str]]:
    weights = [t for t in file.tensors.values() if t.dtype == "F32"]
    facts = [
        ("file", file.path),
        ("size", f"{len(file.map):,} bytes"),
        ("format", f"{file.metadata['format']} {file.metadata['format_version']}"),
        ("crc32", file.metadata.get("crc32", "none")),
        ("weights", f"{sum(math.prod(t.shape) for t in weights):,} float32, padding included"),
    ]
    return facts + [(name, str(value)) for name, value in config_values(config).items()]


def tensor_facts(file: TensorFile) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("tensor", "dtype", "shape", "bytes")]
    for name, tensor in file.tensors.items():
        shape = " x ".join(map(str, tensor.shape))
        rows.append((name, tensor.dtype, shape, f"{tensor.stop - tensor.start:,}"))
    return rows


def verify(file: TensorFile, config: Config) -> None:
    """Raise `FormatError` unless the data has its checksum and the merges make their tokens."""
    expected, found = file.metadata.get("crc32", "none"), file.checksum()
    if found != expected:
        raise FormatError(file.path, "data", f"the CRC-32 {quote(expected)}", found)
    verify_vocabulary(file, config)
    print("verified: the checksum and the vocabulary are right", file=sys.stderr)


def verify_vocabulary(file: TensorFile, config: Config) -> None:
    if config.n_merges is not None:
        Tokenizer(file, config).verify(file.path)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def run_bench(options: Arguments) -> None:
    """Measure prompts and decoding; the median of the runs, in tokens per second."""
    for name in ("max_tokens", "runs"):
        count = getattr(options, name)
        if count < 1:
            raise InputError(f"{flag_of(name)}: expected a number from 1, found {count}")
    with load_model(options) as model:
        positions, size = model.config.n_positions, model.config.vocab_size
        n_new = max(1, min(options.max_tokens, positions // 2))
        n_prompt = min(512, positions - n_new)
        runs = [bench_run(model, n_prompt, n_new, size) for _ in range(options.runs)]
        prompts, decodes = zip(*runs)
        name = model.backend.name
    print(f"prompt of {n_prompt} tokens: {median(prompts):.1f} tokens/s ({name})")
    print(f"decoding after it: {median(decodes):.1f} tokens/s ({name})")


def bench_run(model: Model, n_prompt: int, n_new: int, vocab_size: int) -> tuple[float, float]:
    """The speed of a prompt, and of tokens that follow it one by one."""
    with model.session() as session:
        started = time.perf_counter()
        session.feed([i % vocab_size for i in range(n_prompt)])
        fed = time.perf_counter()
        for i in range(n_new):
            session.feed([i % vocab_size])
        return n_prompt / (fed - started), n_new / (time.perf_counter() - fed)


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    sys.exit(main())
