"""The programs that `peers.py` compares, each behind the same few methods.

All run GPT-2 124M from one checkpoint in float32: weights, activations, keys and values. Each is
set up as a user would who wants it fast. This file is also what runs in their processes: `write`
makes the file that a program loads, `serve` answers requests, `once` computes one token.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import graphs  # noqa: E402
from graphs import HEAD, HEADS, LAYERS, POSITIONS, VOCAB, WIDTH, Array  # noqa: E402

Step = Callable[[list[int]], Array]


def prompt(n: int) -> list[int]:
    return [7 * i % VOCAB for i in range(n)]


def load_fallback() -> Any:
    """fallback.py has plain NumPy and transformers; the pytest behind it would slow their start."""
    sys.modules.setdefault("conftest", types.ModuleType("conftest"))
    return importlib.import_module("fallback")


def mapped_weights(folder: Path) -> dict[str, Array]:
    tinygpt2 = importlib.import_module("tinygpt2")
    tinygpt2.import_numpy()
    file = tinygpt2.TensorFile(folder / "model.safetensors")
    return {name: file.array(name) for name in file.tensors}


class Peer:
    """A program that runs the model: `start` begins a text and returns what appends tokens."""

    file, package = "model.safetensors", ""

    def __init__(self, folder: Path, threads: int) -> None:
        raise NotImplementedError

    @staticmethod
    def write(folder: Path, place: Path) -> None:
        """Make `file` in `place` from the checkpoint in `folder`."""

    def version(self) -> str:
        return importlib.metadata.version(self.package)

    def start(self) -> Step:
        raise NotImplementedError

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        step = self.start()
        for _ in range(count):
            token = int(step(ids).argmax())
            yield token
            ids = [token]

    def logits(self, ids: list[int]) -> list[float]:
        """After the last token, the last four appended one by one."""
        step = self.start()
        step(ids[:-4])
        return [list(map(float, step([token]))) for token in ids[-4:]][-1]


class TinyGPT2(Peer):
    file = "gpt2.tg2"

    def __init__(self, folder: Path, threads: int) -> None:
        self.model = importlib.import_module("tinygpt2").load(folder / self.file, threads=threads)
        self.session: Any = None

    @staticmethod
    def write(folder: Path, place: Path) -> None:
        importlib.import_module("tinygpt2").convert(folder, place / TinyGPT2.file)

    def version(self) -> str:
        return f"{importlib.import_module('tinygpt2').__version__}, {self.model.backend.name}"

    def start(self) -> Step:
        session = self.model.session()

        def step(ids: list[int]) -> Array:
            session.feed(ids)
            return session.logits

        return step

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        self.session = self.model.session()  # kept, so that its memory is seen
        self.session.feed(ids)
        yield from self.session.stream_ids(max_new_tokens=count, temperature=0)


class PlainNumPy(Peer):
    """Maps a folder of .npy files, whose numbers are aligned; in a checkpoint they need not be."""

    file, package = "numpy", "numpy"

    def __init__(self, folder: Path, threads: int) -> None:
        np = importlib.import_module("numpy")
        files = (folder / self.file).iterdir()
        self.weights = {file.stem: np.asarray(np.load(file, mmap_mode="r")) for file in files}

    @staticmethod
    def write(folder: Path, place: Path) -> None:
        np = importlib.import_module("numpy")
        (place / PlainNumPy.file).mkdir()
        for name, array in mapped_weights(folder).items():
            np.save(place / PlainNumPy.file / name, array)

    def start(self) -> Step:
        model = load_fallback().PlainNumpy(self.weights, HEADS)
        return lambda ids: model.feed(ids)[0]


class Transformers(Peer):
    package = "transformers"

    def __init__(self, folder: Path, threads: int) -> None:
        importlib.import_module("torch").set_num_threads(threads)
        importlib.import_module("transformers")
        self.model = load_fallback().transformers_model(folder)

    def version(self) -> str:
        return f"{super().version()}, torch {importlib.metadata.version('torch')}"

    def start(self) -> Step:
        step: Any = load_fallback().transformers_step(self.model)
        return lambda ids: step(ids)[0, -1].numpy()


class LlamaCpp(Peer):
    file, package, flash = "gpt2.gguf", "llama-cpp-python", False

    def __init__(self, folder: Path, threads: int) -> None:
        self.api = importlib.import_module("llama_cpp")
        self.model = self.api.Llama(
            str(folder / self.file),
            n_ctx=POSITIONS,
            n_threads=threads,
            n_threads_batch=threads,
            type_k=self.api.GGML_TYPE_F32,
            type_v=self.api.GGML_TYPE_F32,
            flash_attn=self.flash,
            verbose=False,
        )

    @staticmethod
    def write(folder: Path, place: Path) -> None:
        gguf = importlib.import_module("gguf")
        writer = gguf.GGUFWriter(place / LlamaCpp.file, "gpt2")
        writer.add_context_length(POSITIONS)
        writer.add_embedding_length(WIDTH)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(4 * WIDTH)
        writer.add_head_count(HEADS)
        writer.add_layer_norm_eps(1e-5)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(VOCAB)
        for name, array in mapped_weights(folder).items():
            is_matrix = ".c_" in name and name.endswith(".weight")
            writer.add_tensor(gguf_name(name), array.T.copy() if is_matrix else array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def start(self) -> Step:
        np = importlib.import_module("numpy")
        self.model.reset()

        def step(ids: list[int]) -> Array:
            self.model.eval(ids)
            logits = self.api.llama_get_logits_ith(self.model.ctx, -1)
            return np.ctypeslib.as_array(logits, (VOCAB,))

        return step


class LlamaCppFlash(LlamaCpp):
    flash = True


def gguf_name(name: str) -> str:
    for ours, theirs in {
        "h.": "blk.",
        "wte": "token_embd",
        "wpe": "position_embd",
        "ln_f": "output_norm",
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }.items():
        name = name.replace(ours, theirs)
    return name


class CTranslate2(Peer):
    file, package = "ctranslate2", "ctranslate2"

    def __init__(self, folder: Path, threads: int) -> None:
        api = importlib.import_module("ctranslate2")
        options = {"intra_threads": threads, "compute_type": "float32"}
        self.model = api.Generator(str(folder / self.file), "cpu", **options)

    @staticmethod
    def write(folder: Path, place: Path) -> None:
        """Its converter wants a tokenizer and the architecture's name: a copy gets both."""
        converters = importlib.import_module("ctranslate2.converters")
        config = json.loads((folder / "config.json").read_text())
        vocab = {f"t{i}": i for i in range(VOCAB - 1)} | {"<|endoftext|>": VOCAB - 1}
        files = {
            "config.json": {**config, "architectures": ["GPT2LMHeadModel"]},
            "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"},
            "vocab.json": vocab,
        }
        with tempfile.TemporaryDirectory() as copy:
            for name, content in files.items():
                (Path(copy) / name).write_text(json.dumps(content))
            (Path(copy) / "merges.txt").write_text("#version: 0.2\n")
            (Path(copy) / "model.safetensors").symlink_to(folder.resolve() / "model.safetensors")
            converters.TransformersConverter(copy).convert(str(place / CTranslate2.file))

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        words = [f"t{token}" for token in ids]
        options = {"max_length": count, "min_length": count, "sampling_topk": 1}
        for result in self.model.generate_tokens(words, **options):
            yield result.token_id

    def logits(self, ids: list[int]) -> list[float]:
        """It keeps no text between calls, so only the whole one can be asked for."""
        np = importlib.import_module("numpy")
        return [float(x) for x in np.array(self.model.forward_batch([ids]))[0, -1]]


class OnnxRuntime(Peer):
    file, package = "gpt2.onnx", "onnxruntime"

    def __init__(self, folder: Path, threads: int) -> None:
        self.api = importlib.import_module("onnxruntime")
        options = self.api.SessionOptions()
        options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        self.model = self.api.InferenceSession(str(folder / self.file), options, providers)

    @staticmethod
    def write(folder: Path, place: Path) -> None:
        graphs.write(graphs.OnnxGraph(mapped_weights(folder)), place / OnnxRuntime.file)

    def start(self) -> Step:
        np = importlib.import_module("numpy")
        value = self.api.OrtValue.ortvalue_from_numpy
        binding = self.model.io_binding()
        for i in range(LAYERS):
            for kind in "kv":  # read and written in place
                cache = value(np.zeros((1, HEADS, POSITIONS, HEAD), np.float32))
                binding.bind_ortvalue_input(f"past_{kind}{i}", cache)
                binding.bind_ortvalue_output(f"{kind}{i}", cache)
        logits = value(np.zeros((1, VOCAB), np.float32))
        binding.bind_ortvalue_output("logits", logits)
        length = 0

        def step(ids: list[int]) -> Array:
            nonlocal length
            start, length = length, length + len(ids)
            binding.bind_cpu_input("ids", np.array(ids))
            binding.bind_cpu_input("positions", np.arange(start, length))
            binding.bind_cpu_input("last", np.array([length - 1], np.int32))
            binding.bind_cpu_input("total", np.array(length, np.int32))
            self.model.run_with_iobinding(binding)
            return logits.numpy()[0]

        return step


class OpenVINO(Peer):
    file, package = "gpt2.xml", "openvino"

    def __init__(self, folder: Path, threads: int) -> None:
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "CACHE_DIR": folder / "openvino",  # of what it compiled
        }
        core = importlib.import_module("openvino").Core()
        self.model = core.compile_model(folder / self.file, "CPU", options).create_infer_request()

    @staticmethod
    def write(folder: Path, place: Path) -> None:
        graphs.write(graphs.OpenVINOGraph(mapped_weights(folder)), place / OpenVINO.file)

    def start(self) -> Step:
        np = importlib.import_module("numpy")
        self.model.reset_state()
        length = 0

        def step(ids: list[int]) -> Array:
            nonlocal length
            start, length = length, length + len(ids)
            positions = np.arange(start, length)[None]
            inputs = {"ids": np.array([ids]), "positions": positions, "beams": np.zeros(1, "i4")}
            return self.model.infer(inputs, share_inputs=True, share_outputs=True)[0].reshape(-1)

        return step


PEERS: dict[str, type[Peer]] = {
    "tinygpt2": TinyGPT2,
    "llama.cpp": LlamaCpp,
    "llama.cpp, flash": LlamaCppFlash,
    "OpenVINO": OpenVINO,
    "ONNX Runtime": OnnxRuntime,
    "CTranslate2": CTranslate2,
    "transformers": Transformers,
    "plain NumPy": PlainNumPy,
}


def private_memory() -> float:
    """MB that no file backs, in memory or swapped out. Linux only: elsewhere NaN."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return float("nan")
    fields = [line.split() for line in lines]
    return sum(int(f[1]) for f in fields if f[0] in ("Anonymous:", "Swap:")) * 1024 / 1e6


def measure(peer: Peer, ids: list[int], count: int) -> dict[str, float]:
    """Seconds until the first token is known, and of `count` more; memory with the text there."""
    list(peer.generate(ids[:16], 2))  # wakes threads, warms caches
    started = time.perf_counter()
    tokens = peer.generate(ids, count + 1)
    next(tokens)
    first = time.perf_counter()
    n = sum(1 for _ in tokens)
    seconds = time.perf_counter() - first
    if n != count:
        raise RuntimeError(f"expected {count} more tokens, found {n}")
    return {"prompt": first - started, "decode": seconds, "private": private_memory()}


def serve(name: str, folder: Path, threads: int) -> None:
    """Answer each line of standard input by one; what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = PEERS[name](folder, threads)
    print(json.dumps(peer.version()), file=replies, flush=True)
    for line in sys.stdin:
        method, ids, count = json.loads(line)
        reply = measure(peer, ids, count) if method == "measure" else peer.logits(ids)
        print(json.dumps(reply), file=replies, flush=True)


def write(name: str, folder: Path) -> None:
    """Make what the program loads, if it is not there; whole or not at all."""
    if not (folder / PEERS[name].file).exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            PEERS[name].write(folder, Path(place))
            for made in Path(place).iterdir():
                made.replace(folder / made.name)


def main() -> None:
    role, name, folder, threads = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    if role == "write":
        write(name, folder)
    elif role == "serve":
        serve(name, folder, threads)
    else:
        print(next(PEERS[name](folder, threads).generate(prompt(16), 1)))


if __name__ == "__main__":
    main()
