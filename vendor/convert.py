"""Converts GPT-2 checkpoints to .tg2 files, and downloads checkpoints from the Hugging Face hub.

This file is a companion of tinygpt2.py. It is not imported by its name: `tinygpt2.convert`,
`tinygpt2.download` and the commands `convert` and `download` load it on first use, through
`tinygpt2.load_companion("convert")`. That function finds this file in the folder vendor/ beside
tinygpt2.py, or in the installed package, and executes it. Before that, it sets the global name
`tinygpt2` to the running module, which may be called `__main__`. So this file raises the same
error classes as the rest of the program.

    1. checkpoint    its files, and what its configurations say
    2. weights       its tensors by GPT-2's names, checked, and converted in slabs
    3. trainers      files of nanoGPT, minGPT, makemore and llm.c, and of PyTorch in general
    4. tokenizer     vocab.json with merges.txt, or tokenizer.json
    5. hub           downloads, through the package huggingface_hub

It needs NumPy.

SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import importlib
import importlib.util
import math
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, SupportsIndex, Union

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    import tinygpt2

    Array = npt.NDArray[Any]
    Path = Union[str, os.PathLike[str]]
    Progress = Callable[[str, int, int], None]  # label, bytes done, bytes in all


def convert(
    source: Path,
    out: Path,
    progress: Progress | None = None,
    tokenizer: Path | None = None,
    heads: SupportsIndex | None = None,
    activation: str | None = None,
) -> None:
    """Convert a GPT-2 checkpoint to a .tg2 file.

    `source` is a folder as transformers writes it (config.json, model.safetensors, or shards with
    an index, vocab.json with merges.txt or tokenizer.json), or the file of the weights in it, or a
    file that nanoGPT, minGPT, makemore or llm.c wrote. PyTorch must be installed for files of
    torch.save. `tokenizer` names another tokenizer than the one that is there: a folder, a
    tokenizer.json, or a character list in JSON. `heads` and `activation` are for checkpoints that
    do not tell them. Memory use stays small, because tensors are converted in slabs. `out` is
    replaced only when the new file is complete. Raises `FormatError`, which names what is missing,
    misshapen or not supported.
    """
    path = tinygpt2.path_text(source, "source")
    folder, files = find_checkpoint(path)
    target = tinygpt2.path_text(out, "out")
    chosen = None if tokenizer is None else tinygpt2.path_text(tokenizer, "tokenizer")
    refuse_overwriting(target, [*files, *files_read(folder), *files_read(chosen)])
    with contextlib.ExitStack() as stack:
        saved = read_files(stack, files)
        # A file that says what it is comes before the config.json of another model beside it.
        is_trainers = bool(saved.told) or not has_config(path, files)
        told = None if is_trainers else checkpoint_config(folder)
        if not told and not chosen:
            refuse_character_pickle(os.path.join(folder, "meta.pkl"))
        vocabulary = find_vocabulary(folder, chosen)
        parts = gpt2_parts(saved.path, saved.tensors)
        config = told or trained_config(saved, parts, heads, activation)
        settle("heads", heads, config.n_head)
        settle("activation", activation, config.activation_function)
        if vocabulary:
            vocabulary = fit_vocabulary(vocabulary, config.vocab_size)
            config = with_vocabulary(config, vocabulary)
            config = config if told else with_ends(config, vocabulary)
        write_model(target, saved.path, config, parts, vocabulary, progress)


def write_model(
    path: str,
    source: str,
    config: tinygpt2.Config,
    parts: dict[str, Weights],
    vocabulary: Vocabulary | None,
    progress: Progress | None,
) -> None:
    """Write a .tg2 file from the tensors of a checkpoint, by GPT-2's names."""
    config, parts = arrange(source, config, parts)
    write_tg2(path, config, tg2_data(config, parts, vocabulary), progress)


def write_tg2(
    path: str, config: tinygpt2.Config, data: Iterator[bytes], progress: Progress | None
) -> None:
    """Write a .tg2 file of format version 2. `data` yields the tensors in the layout's order."""
    entries, metadata = tinygpt2.layout(config), tinygpt2.tg2_metadata(config)
    tinygpt2.write_tensors(path, entries, data, metadata, check_written, progress)


def check_written(file: tinygpt2.TensorFile) -> None:
    """What `info --verify` checks, beside the checksum, which the writer compares itself."""
    tinygpt2.verify_vocabulary(file, tinygpt2.read_config(file))


# ------------------------------------------------------------------------------------------------
# 1. Checkpoint
# ------------------------------------------------------------------------------------------------

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS = "model.safetensors"
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHT_FILES = (WEIGHTS, "model.safetensors.index.json", *PICKLED_FILES)  # the first is taken
SMALL_FILES = (  # the other files of a folder that conversion looks at
    CONFIG,
    GENERATION_CONFIG,
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    *(name for name in WEIGHT_FILES if name.endswith(".index.json")),
)

# The defaults of transformers' GPT2Config, used where config.json has no value.
GPT2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,  # 4 * n_embd
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
}
OTHER_NAMES = {  # GPT2Config's attribute_map: these come before the names above
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
SAME_ACTIVATION = {  # other names in transformers for the same function
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
}
UNSUPPORTED = {  # entries of config.json that make another model of the same tensors
    "add_cross_attention": "encoders are not supported",
    "attention_chunk_size": "attention within chunks is not supported",
    "is_encoder_decoder": "encoders are not supported",
    "layer_types": "layers of different kinds are not supported",
    "per_layer_config": "layers of different sizes are not supported",
    "quantization_config": "save the model with float weights: load it, `dequantize()`, save it",
    "sliding_window": "attention within a window is not supported",
    "transformers_weights": f"rename that file to {WEIGHTS}, and remove this entry",
}
SETTINGS_NOT_HONOURED: dict[str, Any] = {  # of generation, each with the value of no effect
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "constraints": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1,
    "watermarking_config": None,
}


MERGE = "merge it first: `model.merge_and_unload().save_pretrained(folder)`"
FROM_OPENAI = (
    "OpenAI's models: `python tinygpt2.py download gpt2`, gpt2-medium, gpt2-large, gpt2-xl; "
    "others: `transformers-cli convert --model_type gpt2` of transformers 4, then convert that"
)
OTHER_FOLDERS = (  # files of other kinds of folders: what it is, and what to do
    ("hparams.json", "a TensorFlow checkpoint, as OpenAI's", FROM_OPENAI),
    ("*.ckpt.index", "a TensorFlow checkpoint", tinygpt2.SAVE_AGAIN),
    ("tf_model.h5", "weights of TensorFlow", tinygpt2.SAVE_AGAIN),
    ("saved_model.pb", "a model of TensorFlow", tinygpt2.SAVE_AGAIN),
    ("flax_model.msgpack", "weights of Flax", tinygpt2.SAVE_AGAIN),
    ("*.gguf", "a model of llama.cpp", tinygpt2.SAVE_AGAIN),
    ("*.onnx", "a model of ONNX", tinygpt2.SAVE_AGAIN),
    ("adapter_model.*", "a PEFT adapter", MERGE),
    ("snapshots", "the hub's cache", "name a folder inside this one"),
    ("checkpoint-*", "a checkpoint inside the folder", "name this one"),
    ("*.safetensors", "weights of another name", "name this file; put its config.json beside it"),
    ("*.pt", "a file of PyTorch", "name this file"),
    ("*.pth", "a file of PyTorch", "name this file"),
    ("*.ckpt", "a file of PyTorch", "name this file"),
    ("*.bin", "a file of PyTorch", "name this file"),
    ("*.tg2", "a .tg2 file, which needs no conversion", "name it with --model"),
)


def find_checkpoint(source: str) -> tuple[str, list[str]]:
    """The folder of a checkpoint, and the paths of its files with weights."""
    if os.path.isdir(source):
        return source, find_in_folder(source)
    folder = os.path.dirname(source) or "."
    if source.endswith((".safetensors.index.json", ".bin.index.json")):
        return folder, shard_paths(folder, source)
    refuse_other_files(source)
    return folder, [source]


def find_in_folder(folder: str) -> list[str]:
    """The paths of the files with weights."""
    refuse_adapter(os.path.join(folder, "adapter_config.json"))
    names = list_folder(folder)
    files = [name for name in names if not os.path.isdir(os.path.join(folder, name))]
    first = next((name for name in WEIGHT_FILES if name in files), None)
    if first is None or CONFIG not in names:
        raise other_folder(folder, WEIGHTS if first is None else CONFIG, names)
    path = os.path.join(folder, first)
    return shard_paths(folder, path) if first.endswith(".json") else [path]


def list_folder(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        found, advice = str(error.strerror), "check its permissions"
        raise tinygpt2.FormatError(
            folder, "checkpoint", "a readable folder", found, advice
        ) from None


def other_folder(folder: str, missing: str, names: list[str]) -> tinygpt2.FormatError:
    """What to say of a folder that lacks a file of a checkpoint."""
    kinds = OTHER_FOLDERS if missing == WEIGHTS or WEIGHTS not in names else ()
    for pattern, found, advice in kinds:
        for name in fnmatch.filter(sorted(names), pattern):
            path = os.path.join(folder, name)
            return tinygpt2.FormatError(path, "checkpoint", missing, found, advice)
    advice = "name the folder that contains it"
    if missing == CONFIG:
        advice = "copy it from where the weights come from; their sizes stand in it"
    return tinygpt2.FormatError(folder, "checkpoint", missing, "no such file", advice)


def refuse_other_files(path: str) -> None:
    """Refuse a file that is a part of a checkpoint, or something else."""
    name = os.path.basename(path)
    if name.startswith("adapter_model."):
        refuse_adapter(path)
    shard = re.search(r"-([0-9]{5})-of-([0-9]{5})\.(?:safetensors|bin)$", name)
    if shard and shard[2] != "00001":
        found, advice = f"shard {int(shard[1])} of {int(shard[2])}", "name the folder or the index"
        raise tinygpt2.FormatError(path, "checkpoint", "all weights of a model", found, advice)
    if is_kind(path, (*tinygpt2.PICKLES, *tinygpt2.LLMC)):
        return
    with contextlib.closing(tinygpt2.map_file(path)) as file:
        if file[:1] == b"{" and file[7:8] != b"\0":  # else the length of a header
            advice = "name the folder that contains it"
            raise tinygpt2.FormatError(path, "file", "weights", "a file of JSON", advice)
    open_weights(path).close()


def open_weights(path: str) -> tinygpt2.TensorFile:
    """A .safetensors file of a checkpoint."""
    file = tinygpt2.TensorFile(path)
    if file.metadata.get("format") == tinygpt2.FORMAT:
        file.close()
        found, advice = "a .tg2 file, which needs no conversion", "name it with --model"
        raise tinygpt2.FormatError(path, "file", "a checkpoint", found, advice)
    return file


def is_pickled(path: str) -> bool:
    """Whether torch.save wrote a file."""
    return is_kind(path, tinygpt2.PICKLES)


def is_kind(path: str, kinds: Sequence[tuple[bytes, str, str]]) -> bool:
    """Whether a file is of one of these kinds, by its first bytes."""
    if not os.path.isfile(path):
        return False
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return tinygpt2.other_kind(file.read(512)) in kinds
    return False


def files_read(path: str | None) -> list[str]:
    """The files that conversion may read, or tell how to read: one, or those in a folder."""
    if path is None:
        return []
    names = (*SMALL_FILES, *WEIGHT_FILES, "meta.pkl")
    return [path, *(os.path.join(path, name) for name in names)]


def refuse_overwriting(target: str, sources: list[str]) -> None:
    """Refuse to write over a file that is read, under whatever name."""
    for source in sources:
        if os.path.isfile(source) and is_same_file(source, target):
            place = tinygpt2.show_path(source)
            found = f"{tinygpt2.show_path(target)}, which is the checkpoint's {place}"
            raise tinygpt2.InputError(f"out: expected a file that is not read, found {found}")


def is_same_file(first: str, second: str) -> bool:
    with contextlib.suppress(OSError, ValueError):  # one of the two is not there
        return os.path.samefile(first, second)
    return False


def refuse_adapter(path: str) -> None:
    """An adapter (PEFT) changes the model that it lies beside, or is a part of one."""
    if os.path.exists(path):
        raise tinygpt2.FormatError(path, "checkpoint", "a whole model", "a PEFT adapter", MERGE)


def shard_paths(folder: str, index: str) -> list[str]:
    """The files that an index of shards names. A name must not lead to another folder."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not tinygpt2.is_text_map(shards) or not shards:
        found = tinygpt2.quote(shards)
        raise tinygpt2.FormatError(index, "weight_map", "an object of file names", found)
    for shard in shards.values():
        if os.path.basename(shard) != shard or shard in ("", ".", ".."):
            expected = "names of files in the same folder"
            raise tinygpt2.FormatError(index, "weight_map", expected, tinygpt2.quote(shard))
    return [os.path.join(folder, shard) for shard in sorted(set(shards.values()))]


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a file of limited size."""
    with contextlib.closing(tinygpt2.map_file(path, "JSON")) as file:
        size, limit = len(file), tinygpt2.MAX_HEADER
        if size > limit:
            raise tinygpt2.FormatError(path, "size", f"at most {limit} bytes", str(size))
        return tinygpt2.parse_json_object(path, "content", file[:])


def checkpoint_config(folder: str) -> tinygpt2.Config:
    """The configuration that transformers reads from a folder; other architectures are refused."""
    path = os.path.join(folder, "config.json")
    content = read_json(path)
    refuse_other_architectures(path, content)
    values = model_values(path, content)
    values.update(generation_values(folder, content, values["vocab_size"]))
    values.update(vocabulary_config(None))
    return tinygpt2.check_config(path, values)


def with_vocabulary(config: tinygpt2.Config, vocabulary: Vocabulary) -> tinygpt2.Config:
    values = {**config._asdict(), **vocabulary_config(vocabulary)}
    return tinygpt2.check_config(vocabulary.path, values)


def refuse_other_architectures(path: str, content: dict[str, Any]) -> None:
    """Refuse models that have GPT-2's tensors and compute something else with them."""
    kind = content.get("model_type", "gpt2")
    if kind != "gpt2":
        advice = "only models with GPT-2's architecture are supported"
        raise tinygpt2.FormatError(path, "model_type", "'gpt2'", tinygpt2.quote(kind), advice)
    for name, advice in UNSUPPORTED.items():
        value = content.get(name)
        if value is not None and value is not False and value != usual_layers(value):
            raise tinygpt2.FormatError(path, name, "none", tinygpt2.quote(value), advice)
    if not content.get("is_causal", True):
        found = tinygpt2.quote(content["is_causal"])
        advice = "a model whose tokens see later ones cannot generate text"
        raise tinygpt2.FormatError(path, "is_causal", "true", found, advice)


def usual_layers(value: object) -> list[str]:
    """The entry `layer_types` of a model whose layers are all of GPT-2's kind."""
    return ["full_attention"] * len(value) if isinstance(value, list) else []


def model_values(path: str, content: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the model, with GPT-2's defaults, in the words of a .tg2 file."""
    for other, name in OTHER_NAMES.items():
        if other in content:
            if not tinygpt2.is_count(content[other]):
                found = tinygpt2.quote(content[other])
                raise tinygpt2.FormatError(path, f"config {other}", "a whole number", found)
            content = {**content, name: content[other]}
    values = {name: content.get(name, default) for name, default in GPT2_DEFAULTS.items()}
    if values["n_inner"] is None and tinygpt2.is_count(values["n_embd"]):
        values["n_inner"] = 4 * values["n_embd"]
    activation = values["activation_function"]
    values["activation_function"] = SAME_ACTIVATION.get(str(activation), activation)
    epsilon = values["layer_norm_epsilon"]
    if tinygpt2.is_count(epsilon) and epsilon == 0:
        values["layer_norm_epsilon"] = 0.0
    return values


def generation_values(folder: str, content: dict[str, Any], vocab_size: object) -> dict[str, Any]:
    """How the model generates: generation_config.json decides alone, else config.json does.

    So end tokens that only config.json names do not count beside a generation_config.json. The
    token before a text is a property of the model: config.json names it where the other does not.
    """
    path, settings = os.path.join(folder, GENERATION_CONFIG), content
    if os.path.exists(path):
        settings = read_json(path)
    else:
        path = os.path.join(folder, "config.json")
    ends = token_ids(path, "eos_token_id", settings.get("eos_token_id"), vocab_size)
    default = content.get("bos_token_id", GPT2_DEFAULTS["bos_token_id"])
    bos = settings.get("bos_token_id", default)
    if isinstance(bos, list):
        raise tinygpt2.FormatError(path, "bos_token_id", "a token id or null", tinygpt2.quote(bos))
    named = [entries.get("eos_token_id") not in (None, []) for entries in (settings, content)]
    if any(named) and not ends:
        tinygpt2.note(f"{path}: it names no end token of the vocabulary, so no token ends a text")
    return {
        "eos_token_ids": ends,
        "bos_token_id": next(iter(token_ids(path, "bos_token_id", bos, vocab_size)), None),
        "generation": generation_options(path, settings),
    }


def token_ids(path: str, name: str, value: object, vocab_size: object) -> list[int]:
    """The tokens that a file names: one id, a list of ids, or null.

    Ids beyond the vocabulary are dropped: smaller models often keep GPT-2's own id by mistake, and
    some write -1 for none.
    """
    tokens: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        expected = "a token id, a list of token ids or null"
        raise tinygpt2.FormatError(path, name, expected, tinygpt2.quote(value))
    size: Any = vocab_size if tinygpt2.is_count(vocab_size) else 0
    return list(dict.fromkeys(token for token in tokens if 0 <= token < size))


def generation_options(path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The options of generation that stand in a file, for `tinygpt2.Options`."""
    refuse_invalid_settings(path, settings)
    given = {name: settings[name] for name in tinygpt2.STORED_OPTIONS if name in settings}
    options = {name: value for name, value in given.items() if value is not None}
    if settings.get("do_sample") is False:
        options["temperature"] = 0
    top_p = options.get("top_p")
    if isinstance(top_p, (int, float)) and (top_p == 0 or top_p > 1):
        options["top_p"] = 1e-9 if top_p == 0 else 1.0  # the best token alone, and all tokens
    for name, value in options.items():
        tinygpt2.check_stored_option(path, name, value)
    return options


def refuse_invalid_settings(path: str, settings: dict[str, Any]) -> None:
    """Refuse what `GenerationConfig` refuses; note the settings that have no counterpart here."""
    sampling = settings.get("do_sample")
    if not isinstance(sampling, (bool, type(None))):
        found = tinygpt2.quote(sampling)
        raise tinygpt2.FormatError(path, "do_sample", "true, false or null", found)
    for name in ("max_length", "max_new_tokens"):
        if tinygpt2.is_count(settings.get(name)) and settings[name] == 0:
            raise tinygpt2.FormatError(path, name, "a whole number from 1", "0")
    neutral = SETTINGS_NOT_HONOURED
    others = [name for name in neutral if settings.get(name) not in (None, neutral[name])]
    if others:
        names = ", ".join(others)
        tinygpt2.note(f"{path}: {names}: not taken over; pass the options if needed")


# ------------------------------------------------------------------------------------------------
# 2. Weights
# ------------------------------------------------------------------------------------------------

SLAB = 1 << 22  # bytes converted at a time, about


class Weights(NamedTuple):
    """A tensor of a checkpoint. Its numbers are read when they are needed."""

    path: str  # the file that holds it, and its name there
    name: str
    dtype: str  # a key of DTYPES; the array of BF16 holds 16-bit integers
    shape: tuple[int, ...]
    read: Callable[[], Array]

    def changed(self, shape: tuple[int, ...], change: Callable[[Array], Array]) -> Weights:
        return self._replace(shape=shape, read=lambda: change(self.read()))

    def transposed(self) -> Weights:
        return self.changed(self.shape[::-1], np.transpose)


DTYPES = ("F64", "F32", "F16", "BF16")
HEAD, EMBEDDING = "lm_head.weight", "wte.weight"

MAX_NAME = 300  # characters; GPT-2 has no name of this length, and long ones take time to match

# Segments of names that torch.compile and trainers put around modules, at any depth.
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# A name of GPT-2 (the second group) after the names of the modules around it (the first).
PART = re.compile(
    r"((?:[^.]+\.)*?)(?:transformer\.)*((?:h\.[0-9]{1,9}|wte|wpe|ln_f|lm_head)\..+)", re.DOTALL
)


def read_tensors(files: list[tinygpt2.TensorFile]) -> dict[str, Weights]:
    """The tensors in files of a checkpoint.

    A tensor that the model used under several names is stored once, by safetensors' `save_model`:
    the metadata maps each other name to the one that is stored.
    """
    tensors: dict[str, Weights] = {}
    for file in files:
        for name, (dtype, shape, _, _) in file.tensors.items():
            weights = Weights(file.path, name, dtype, shape, partial(file.array, name))
            add_once(tensors, name, weights)
    for file in files:
        for name, stored in file.metadata.items():
            if stored in tensors:
                tensors.setdefault(name, tensors[stored])
    return tensors


def add_once(tensors: dict[str, Weights], name: str, weights: Weights) -> None:
    if name in tensors:
        field, expected = f"tensor {tinygpt2.quote(weights.name)}", "one tensor of this name"
        found = f"another one, {tinygpt2.quote(tensors[name].name)}"
        raise tinygpt2.FormatError(weights.path, field, expected, found, "remove one of them")
    tensors[name] = weights


def gpt2_parts(source: str, tensors: dict[str, Weights]) -> dict[str, Weights]:
    """The tensors of the one GPT-2 among others, by its own names.

    It may be inside other modules, as in "module.model.transformer.wte.weight". GPT2LMHeadModel
    writes "transformer." before all but the head, and GPT2Model does not.
    """
    models: dict[str, dict[str, Weights]] = {}
    for name, weights in tensors.items():
        match = len(name) <= MAX_NAME and PART.fullmatch(WRAPPERS.sub("", name))
        if match and not match[2].endswith((".attn.bias", ".attn.masked_bias")):  # causal masks
            add_once(models.setdefault(match[1], {}), match[2], weights)
    outermost = "" if "" in models else next(iter(models), "")
    if len(models) > 1 and outermost:
        found = f"several, in {tinygpt2.quote(sorted(models))}"
        advice = "save the tensors of one model alone"
        raise tinygpt2.FormatError(source, "tensors", "those of one GPT-2", found, advice)
    return models.get(outermost, {})


def arrange(
    source: str, config: tinygpt2.Config, parts: dict[str, Weights]
) -> tuple[tinygpt2.Config, dict[str, Weights]]:
    """The tensors as the model needs them, all of them, and whether the head is the embedding.

    transformers looks at the numbers, too: `tie_word_embeddings` does not tie two matrices that
    differ. `source` is the checkpoint, for errors.
    """
    shapes = checkpoint_shapes(config)
    parts = with_absent(source, config, shapes, without_surplus(source, config, shapes, parts))
    parts = undo_linear_layout(shapes, parts)
    for name, shape in shapes.items():
        check_weights(config, name, parts[name], shape)
    tied = have_same_numbers(parts[EMBEDDING], parts[HEAD])
    return config._replace(tie_word_embeddings=tied), parts


def checkpoint_shapes(config: tinygpt2.Config) -> dict[str, tuple[int, ...]]:
    """The shape in a checkpoint of every tensor, the head's own matrix included."""
    shapes: dict[str, tuple[int, ...]] = {}
    untied = config._replace(tie_word_embeddings=False, n_merges=None)
    for name, (_, padded) in tinygpt2.layout(untied).items():
        outputs = tinygpt2.vector_length(config, name.replace(".weight", ".bias"))
        shapes[name] = (padded[1], outputs) if len(padded) == 3 else (outputs,)
    shapes[EMBEDDING] = shapes[HEAD] = (config.vocab_size, config.n_embd)
    shapes["wpe.weight"] = (config.n_positions, config.n_embd)
    return shapes


def without_surplus(
    source: str,
    config: tinygpt2.Config,
    shapes: dict[str, tuple[int, ...]],
    parts: dict[str, Weights],
) -> dict[str, Weights]:
    """Drop the layers from `n_layer` on, as transformers does; refuse parts that GPT-2 lacks.

    Without such parts the model would compute something else.
    """
    kept = {name: w for name, w in parts.items() if layer_of(name) < config.n_layer}
    for name, weights in kept.items():
        if name not in shapes:
            field = f"tensor {tinygpt2.quote(weights.name)}"
            advice = "adapters and other architectures are not supported; merge or remove them"
            expected = "only tensors of GPT-2"
            raise tinygpt2.FormatError(weights.path, field, expected, "an unknown one", advice)
    if len(kept) < len(parts):
        n_layer = 1 + max(map(layer_of, parts))
        found = f"it has {n_layer} layers, and the configuration says n_layer {config.n_layer}"
        tinygpt2.note(f"{source}: {found}: the layers after these are left out")
    return kept


def layer_of(name: str) -> int:
    """The number of the layer that a tensor belongs to, from 0; -1 if it belongs to none."""
    return int(name.split(".")[1]) if name.startswith("h.") else -1


def kind_of(name: str) -> str:
    """A tensor's name inside its layer."""
    return name.split(".", 2)[2] if name.startswith("h.") else name


def with_absent(
    source: str,
    config: tinygpt2.Config,
    shapes: dict[str, tuple[int, ...]],
    parts: dict[str, Weights],
) -> dict[str, Weights]:
    """Add what trainers leave out: one of two tied matrices, and all biases of a kind (zeros)."""
    matrices = [parts[name] for name in (EMBEDDING, HEAD) if name in parts]
    if config.tie_word_embeddings and len(matrices) == 1:
        parts = {**parts, **dict.fromkeys((EMBEDDING, HEAD), matrices[0])}
    kinds = set(map(kind_of, parts))
    if not {"ln_1.bias", "ln_2.bias"} & kinds:  # layer norms without bias include the last one
        kinds.discard("ln_f.bias")
    else:
        kinds.add("ln_f.bias")
    zeros: dict[str, Weights] = {}
    for name in [name for name in shapes if name not in parts]:
        if not name.endswith(".bias") or kind_of(name) in kinds:
            raise absent(source, config, name, parts)
        shape = shapes[name]
        zeros[name] = Weights(source, name, "F32", shape, partial(np.zeros, shape, np.float32))
    return {**parts, **zeros}


def absent(
    source: str, config: tinygpt2.Config, name: str, parts: dict[str, Weights]
) -> tinygpt2.FormatError:
    """The error for a tensor that no trainer leaves out."""
    n_layer = 1 + max(map(layer_of, parts), default=-1)
    advice = "the checkpoint is incomplete; save the model again"
    if not parts:
        advice = "no tensor has a name of GPT-2; is it another model?"
    elif layer_of(name) >= n_layer:
        advice = f"it has {n_layer} layers, and the configuration says n_layer {config.n_layer}"
    elif name == HEAD:
        advice = "the configuration says tie_word_embeddings false; if that is wrong, change it"
    shape = checkpoint_shapes(config)[name]
    expected = f"a tensor {list(shape)}"
    return tinygpt2.FormatError(source, f"tensor {name}", expected, "no such tensor", advice)


def undo_linear_layout(
    shapes: dict[str, tuple[int, ...]], parts: dict[str, Weights]
) -> dict[str, Weights]:
    """Transpose the matrices of the layers if they are nn.Linear's, [outputs, inputs].

    GPT-2's own layers have [inputs, outputs]. A model is made of one kind, so the shapes of all
    tell it, also for the square matrices. c_attn is never square.
    """
    matrices = [name for name in shapes if name.startswith("h.") and len(shapes[name]) == 2]
    if any(parts[name].shape != shapes[name][::-1] for name in matrices):
        return parts
    return {**parts, **{name: parts[name].transposed() for name in matrices}}


def check_weights(
    config: tinygpt2.Config, name: str, weights: Weights, shape: tuple[int, ...]
) -> None:
    """A tensor must have this shape and a type of real numbers."""
    field = f"tensor {tinygpt2.show_path(weights.name)}"
    if weights.dtype not in DTYPES:
        expected = "F32, F16, BF16 or F64"
        advice = "quantized weights are not supported; save the model with one of these types"
        raise tinygpt2.FormatError(weights.path, field, expected, weights.dtype, advice)
    if weights.shape != shape:
        sizes = {"wte": "vocab_size", "lm_head": "vocab_size", "wpe": "n_positions"}
        size = "n_inner" if ".mlp." in name else sizes.get(name.split(".")[0])
        names = ["n_embd", *([size] if size else [])]
        says = ", ".join(f"{key} {getattr(config, key)}" for key in names)
        advice = f"the configuration says {says}; it does not belong to these weights"
        expected, found = f"shape {list(shape)}", tinygpt2.quote(list(weights.shape))
        raise tinygpt2.FormatError(weights.path, field, expected, found, advice)


def have_same_numbers(one: Weights, other: Weights) -> bool:
    """Whether two matrices of the same shape are equal, bit for bit in float32."""
    if one is other:
        return True
    a, b = one.read(), other.read()
    step = max(1, SLAB // (4 * a.shape[1]))
    return all(
        to_float32(one.dtype, a[start : start + step]).tobytes()
        == to_float32(other.dtype, b[start : start + step]).tobytes()
        for start in range(0, len(a), step)
    )


def tg2_data(
    config: tinygpt2.Config, parts: dict[str, Weights], vocabulary: Vocabulary | None
) -> Iterator[bytes]:
    """The data section of the .tg2 file, in the layout's order, slab by slab."""
    for name, (_, shape) in tinygpt2.layout(config).items():
        if not name.startswith(("vocab.", "merges.")):
            yield from weight_slabs(name, parts[name], shape)
    if vocabulary:  # its tensors are the last ones in the layout
        yield from vocabulary_tables(config, vocabulary)


def weight_slabs(name: str, weights: Weights, shape: tuple[int, ...]) -> Iterator[bytes]:
    """One tensor of float32 numbers; `shape` is its shape in the .tg2 file, with padding."""
    array = weights.read()
    if len(shape) == 3:  # the embedding and the head are stored as [outputs, inputs]
        return panel_slabs(weights.dtype, array.T if name in (EMBEDDING, HEAD) else array)
    return row_slabs(weights.dtype, array.reshape(-1, array.shape[-1]), shape[-1])


def to_float32(dtype: str, array: Array) -> npt.NDArray[np.float32]:
    if dtype == "BF16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # beyond float32 is infinity, as in PyTorch
        return array.astype(np.float32)


def panel_slabs(dtype: str, matrix: Array) -> Iterator[bytes]:
    """A matrix [k, n] as panels [ceil(n/16), k, 16], some panels at a time."""
    panel = tinygpt2.PANEL
    k, n = matrix.shape
    step = panel * max(1, SLAB // (4 * k * panel))
    for start in range(0, n, step):
        part = to_float32(dtype, matrix[:, start : start + step])
        slab = np.zeros((k, tinygpt2.round_up(part.shape[1], panel)), np.float32)
        slab[:, : part.shape[1]] = part
        yield slab.reshape(k, -1, panel).transpose(1, 0, 2).tobytes()  # [panels, k, 16]


def row_slabs(dtype: str, matrix: Array, width: int) -> Iterator[bytes]:
    """A matrix row by row, each row padded with zeros to `width`, some rows at a time."""
    step = max(1, SLAB // (4 * width))
    for start in range(0, len(matrix), step):
        part = to_float32(dtype, matrix[start : start + step])
        slab = np.zeros((len(part), width), np.float32)
        slab[:, : part.shape[1]] = part
        yield slab.tobytes()


# ------------------------------------------------------------------------------------------------
# 3. Trainers
# ------------------------------------------------------------------------------------------------

# Files of trainers have no config.json. The sizes are those of the tensors; where the file tells
# them as well, both must agree. All makers have epsilon 1e-5 and scale attention as GPT-2 does.


class Saved(NamedTuple):
    """What the files of a checkpoint hold."""

    path: str
    tensors: dict[str, Weights]
    told: dict[str, Any]  # what they tell of the model, in the words of a configuration
    maker: str  # a key of ASSUMED, or "" if only the tensors can show it


ASSUMED = {  # the activation in the programs of each maker
    "nanoGPT": "gelu",  # nn.GELU() since June 2023
    "nanoGPT of January 2023": "gelu_new",  # model_args had no entry `bias` before
    "minGPT until 2021": "gelu",
    "minGPT and makemore": "gelu_new",
    "llm.c": "gelu_new",
    "transformers": "gelu_new",
}
MODEL_ARGS = {  # of nanoGPT: its words and ours
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "bias": "bias",
}
NESTS = ("model", "model_state_dict", "state_dict", "module", "net", "weights")
TORCH_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
}
LLMC_HEADER = 1024  # bytes
LLMC_VERSIONS = {3: ("F32", "<f4"), 5: ("BF16", "<u2")}

OLDER_NAMES = [  # of minGPT until 2021, and what these tensors are called now
    (r"(^|\.)tok_emb\.weight$", r"\1wte.weight"),
    (r"(^|\.)pos_emb$", r"\1wpe.weight"),
    (r"(^|\.)head\.weight$", r"\1lm_head.weight"),
    (r"(^|\.)blocks\.([0-9]+)\.", r"\1h.\2."),
    (r"\.ln([12])\.", r".ln_\1."),
    (r"\.attn\.proj\.", ".attn.c_proj."),
    (r"\.attn\.mask$", ".attn.bias"),
    (r"\.mlp\.0\.", ".mlp.c_fc."),
    (r"\.mlp\.2\.", ".mlp.c_proj."),
]


def has_config(source: str, files: list[str]) -> bool:
    """Whether transformers' config.json belongs to the weights. minGPT writes another one."""
    path = os.path.join(os.path.dirname(source), "config.json")
    if os.path.isdir(source):
        return True
    if not os.path.exists(path):
        return False
    return not is_pickled(files[0]) or "model_type" in read_json(path)


def read_files(stack: contextlib.ExitStack, files: list[str]) -> Saved:
    """The tensors in the files of a checkpoint, of whatever kind these are."""
    if is_kind(files[0], tinygpt2.LLMC):
        return read_llmc(files[0])
    if is_pickled(files[0]):
        return read_pickled(files)
    opened = [stack.enter_context(contextlib.closing(open_weights(f))) for f in files]
    return with_newer_names(Saved(files[0], read_tensors(opened), {}, ""))


def settle(option: str, given: object, told: object) -> None:
    """Refuse an option that contradicts the checkpoint."""
    if given is not None and given != told:
        expected = f"{told}, as the checkpoint says"
        raise tinygpt2.InputError(f"{option}: expected {expected}, found {tinygpt2.quote(given)}")


# Configuration


def trained_config(
    saved: Saved, parts: dict[str, Weights], heads: SupportsIndex | None, activation: str | None
) -> tinygpt2.Config:
    """The configuration of a model that has no config.json."""
    refuse_other_tensors(saved)
    sizes = measured_sizes(saved.path, parts)
    for name, size in sizes.items():
        value = saved.told.get(name)
        if value is not None and (not tinygpt2.is_count(value) or value != size):
            advice = "what the file tells of the model and its tensors do not belong together"
            expected, found = f"{size}, as in the tensors", tinygpt2.quote(value)
            raise tinygpt2.FormatError(saved.path, name, expected, found, advice)
    refuse_other_biases(saved, parts)
    is_linear = parts["h.0.attn.c_attn.weight"].shape[0] == 3 * sizes["n_embd"]
    values = {
        **sizes,
        "n_head": number_of_heads(saved, sizes["n_embd"], heads),
        "activation_function": chosen_activation(saved, parts, is_linear, activation),
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,  # if there is no head
        "bos_token_id": None,
        "eos_token_ids": (),
        "generation": {},
        **vocabulary_config(None),
    }
    return tinygpt2.check_config(saved.path, values)


def measured_sizes(path: str, parts: dict[str, Weights]) -> dict[str, int]:
    """The sizes that the shapes of the tensors show."""

    def shape(name: str) -> tuple[int, ...]:
        found = "no such tensor" if name not in parts else f"shape {list(parts[name].shape)}"
        if name not in parts or len(parts[name].shape) != 2:
            advice = "the checkpoint is incomplete" if parts else "no tensor has a name of GPT-2"
            advice += "; is it another model?"
            raise tinygpt2.FormatError(path, f"tensor {name}", "a matrix", found, advice)
        return parts[name].shape

    vocab_size, n_embd = shape(EMBEDDING)
    if shape("h.0.attn.c_attn.weight")[0] == 3 * n_embd:
        shape(HEAD)  # trainers store it always, and transformers, with the other layout, may not
    return {
        "vocab_size": vocab_size,
        "n_positions": shape("wpe.weight")[0],
        "n_embd": n_embd,
        "n_layer": 1 + max(map(layer_of, parts)),
        "n_inner": math.prod(shape("h.0.mlp.c_fc.weight")) // max(n_embd, 1),
    }


def refuse_other_tensors(saved: Saved) -> None:
    """Refuse tensors beside GPT-2's, and masks that hide other tokens than the later ones."""
    for name, weights in saved.tensors.items():
        field = f"tensor {tinygpt2.quote(weights.name)}"
        plain = WRAPPERS.sub("", name[: MAX_NAME + 1])
        if len(name) > MAX_NAME or not PART.fullmatch(plain):
            expected, advice = "only tensors of GPT-2", "other models are not supported"
            raise tinygpt2.FormatError(saved.path, field, expected, "an unknown one", advice)
        if plain.endswith(".attn.bias"):
            size = weights.shape[-1] if weights.shape else 0
            is_square = weights.shape == (1, 1, size, size)
            if not is_square or ((weights.read() != 0) != np.tri(size, dtype=bool)).any():
                found, advice = "another", "attention to other tokens is not supported"
                raise tinygpt2.FormatError(saved.path, field, "a causal mask", found, advice)


BIASES = {
    "ln_1.bias",
    "ln_2.bias",
    "ln_f.bias",
    "attn.c_attn.bias",
    "attn.c_proj.bias",
    "mlp.c_fc.bias",
    "mlp.c_proj.bias",
}


def refuse_other_biases(saved: Saved, parts: dict[str, Weights]) -> None:
    """Refuse what no model of these trainers lacks. A norm without bias is often another norm."""
    kinds = {kind_of(name) for name in parts} & BIASES
    norms = {"ln_1.bias", "ln_2.bias", "ln_f.bias"}
    told = saved.told.get("bias")
    if isinstance(told, bool) and kinds != (BIASES if told else set()):
        advice = "the tensors and model_args do not belong together"
        expected = "the biases of all layers" if told else "no biases"
        found = ", ".join(sorted(kinds)) or "none"
        raise tinygpt2.FormatError(saved.path, f"model_args bias={told}", expected, found, advice)
    has_others = bool(kinds - norms)
    if has_others and not norms <= kinds:
        advice = "other norms than LayerNorm are not supported"
        found = "none, beside other biases"
        raise tinygpt2.FormatError(saved.path, "layer norms", "biases of all", found, advice)


def number_of_heads(saved: Saved, n_embd: int, heads: SupportsIndex | None) -> int:
    numbers = range(1, min(n_embd, tinygpt2.SIZE_LIMITS["n_embd"]) + 1)
    divisors = [number for number in numbers if n_embd % number == 0]
    expected = f"a divisor of n_embd {n_embd}: one of {', '.join(map(str, divisors))}"
    number = saved.told.get("n_head")
    if number is None and heads is None:
        advice = "say it with --heads N, or heads=N, or put its config.json beside the file"
        found = "nothing that tells it"
        raise tinygpt2.FormatError(saved.path, "number of heads", expected, found, advice)
    if number is None:
        number = tinygpt2.as_index(heads)
        if number not in divisors:
            raise tinygpt2.InputError(f"heads: expected {expected}, found {tinygpt2.quote(heads)}")
    return number  # `check_config` looks at it


def chosen_activation(
    saved: Saved, parts: dict[str, Weights], is_linear: bool, activation: str | None
) -> str:
    """The activation: the file tells it, the caller says it, or it is its maker's."""
    if "activation_function" in saved.told:
        return str(saved.told["activation_function"])
    if activation is not None:
        if activation not in tinygpt2.ACTIVATIONS:
            expected, found = f"one of {tinygpt2.ACTIVATIONS}", tinygpt2.quote(activation)
            raise tinygpt2.InputError(f"activation: expected {expected}, found {found}")
        return activation
    maker = saved.maker or maker_of(saved.tensors, parts, is_linear)
    tinygpt2.note(
        f"{tinygpt2.show_path(saved.path)}: it does not tell the activation; {ASSUMED[maker]} is "
        f"taken, as in {maker} (--activation names another)"
    )
    return ASSUMED[maker]


def maker_of(tensors: dict[str, Weights], parts: dict[str, Weights], is_linear: bool) -> str:
    """Whose tensors these are: nanoGPT ties the head, and the others store causal masks."""
    if not is_linear:
        return "transformers"
    head, embedding = parts.get(HEAD), parts[EMBEDDING]
    has_masks = any(name.endswith(".attn.bias") for name in tensors)
    if has_masks or head is None or head.shape != embedding.shape:
        return "minGPT and makemore"
    is_tied = head.dtype in DTYPES and have_same_numbers(embedding, head)
    return "nanoGPT" if is_tied else "minGPT and makemore"


def refuse_character_pickle(path: str) -> None:
    """nanoGPT's list of characters: without it, the model would take ids only."""
    if os.path.exists(path):
        refuse_pickle(path)


def with_ends(config: tinygpt2.Config, vocabulary: Vocabulary) -> tinygpt2.Config:
    """The configuration with the token that begins and ends texts, if the vocabulary shows one.

    It is GPT-2's, or makemore's: that is token 0, and the characters are the tokens from 1 on.
    """
    ends = [token.id for token in vocabulary.added if token.text == END_OF_TEXT]
    is_makemore = vocabulary.tokens.keys() == set(range(1, config.vocab_size))
    if is_makemore and vocabulary.pre_tokenizer == "characters":
        ends = [0]
        tinygpt2.note("token 0 begins and ends texts, as in makemore: it is no character")
    return config._replace(bos_token_id=ends[0] if ends else None, eos_token_ids=tuple(ends[:1]))


# Names of older versions of minGPT


def with_newer_names(saved: Saved) -> Saved:
    """The tensors by GPT-2's names, if they have those of minGPT until 2021."""
    tensors: dict[str, Weights] = {}
    if not any(name.endswith("tok_emb.weight") for name in saved.tensors):
        return saved
    for name, weights in saved.tensors.items():
        renamed = WRAPPERS.sub("", name)
        for pattern, replacement in OLDER_NAMES:
            renamed = re.sub(pattern, replacement, renamed)
        if renamed.endswith("wpe.weight") and weights.shape[:1] == (1,):
            weights = weights.changed(weights.shape[1:], lambda array: array[0])
        add_once(tensors, renamed, weights)
    return saved._replace(tensors=with_joined_attention(tensors), maker="minGPT until 2021")


def with_joined_attention(tensors: dict[str, Weights]) -> dict[str, Weights]:
    """Queries, keys and values as one matrix, and as one bias, where all three are alike."""
    rest = dict(tensors)
    for name in tensors:
        names = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        three = [tensors[part] for part in names if part in tensors]
        is_alike = len({(weights.dtype, weights.shape) for weights in three}) == 1
        if ".attn.query." in name and len(three) == 3 and is_alike and three[0].shape:
            outputs, *inputs = three[0].shape
            read = partial(joined, three)
            for part in names:
                del rest[part]
            whole = three[0]._replace(shape=(3 * outputs, *inputs), read=read)
            add_once(rest, name.replace(".query.", ".c_attn."), whole)
    return rest


def joined(parts: list[Weights]) -> Array:
    return np.concatenate([weights.read() for weights in parts])


# Files of PyTorch


def read_pickled(files: list[str]) -> Saved:
    """The tensors in files of torch.save. Only PyTorch's loader of plain weights touches them."""
    torch = import_torch(files[0])
    tensors: dict[str, Weights] = {}
    told: dict[str, Any] = {}
    for path in files:
        content = load_pickled(torch, path)
        state = find_state(torch, path, content)
        for name, tensor in state.items():
            add_once(tensors, name, torch_weights(torch, path, name, tensor))
        if "model_args" in content:
            told = checked_model_args(path, content["model_args"])
    maker = "" if not told else "nanoGPT" if "bias" in told else "nanoGPT of January 2023"
    return with_newer_names(Saved(files[0], tensors, told, maker))


def import_torch(path: str) -> Any:
    found = "none"
    try:
        torch = importlib.import_module("torch")
        found = str(torch.__version__)
        if tuple(map(int, re.findall(r"\d+", found)[:2])) >= (2, 6):  # safe from here on
            return torch
    except (ImportError, OSError) as error:
        found = str(error)
    advice = f"install it, or {saving_code(path, weights_only=True)}"
    raise tinygpt2.FormatError(path, "checkpoint", "PyTorch 2.6 or later", found, advice)


def saving_code(path: str, weights_only: bool) -> str:
    """Three lines of Python that write a checkpoint of PyTorch as safetensors."""
    state = "{k: v.contiguous().clone() for k, v in c.items() if torch.is_tensor(v)}"
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"c = torch.load({os.path.basename(path)!r}, 'cpu', weights_only={weights_only}); "
        f"c = c.get('model', c); save_file({state}, 'model.safetensors')"
    )
    return f'in its folder, where PyTorch is: python -c "{code}", then convert model.safetensors'


def load_pickled(torch: Any, path: str) -> dict[Any, Any]:
    """The dictionary in a file of torch.save. With a zip archive, the numbers stay on the disk."""
    is_archive = is_kind(path, tinygpt2.PICKLES[:1])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if is_archive:
                refuse_compressed(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # of many classes, for what a damaged file says
        raise pickle_error(path, error) from None
    if isinstance(content, dict):
        return content
    found, advice = type(content).__name__, "save the model's state_dict()"
    raise tinygpt2.FormatError(path, "content", "a dictionary of tensors", found, advice)


def refuse_compressed(path: str) -> None:
    """torch.save stores all as it is. A compressed file could claim much more than it holds."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("its content is compressed")


def pickle_error(path: str, error: Exception) -> tinygpt2.FormatError:
    """One line for an error of torch.load."""
    match = re.search(r"GLOBAL (\S+)", str(error))
    if match:
        expected, found = "only tensors and plain values", f"an object of {match[1][:80]}"
        code = saving_code(path, weights_only=False)
        advice = f"loading that can run any code; if you trust the file, {code}"
        return tinygpt2.FormatError(path, "content", expected, found, advice)
    text = str(error).strip().splitlines() or [""]
    found = f"{type(error).__name__}: {text[0][:120]}"
    advice = "the file is damaged or of another kind; save the model's state_dict() again"
    return tinygpt2.FormatError(path, "content", "what torch.save writes", found, advice)


def find_state(torch: Any, path: str, content: dict[Any, Any]) -> dict[str, Any]:
    """The tensors of the model in what a trainer saved, which may be dictionaries in others."""
    state = content
    for _ in NESTS:
        nests = [state[name] for name in NESTS if isinstance(state.get(name), dict)]
        state = nests[0] if nests else state
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        expected = f"tensors by their names, or such in one of {', '.join(NESTS)}"
        found, advice = tinygpt2.quote([*state]), "save the model's state_dict()"
        raise tinygpt2.FormatError(path, "content", expected, found, advice)
    return tensors


def torch_weights(torch: Any, path: str, name: str, tensor: Any) -> Weights:
    """A tensor of PyTorch, whose numbers are not copied."""
    dtype = str(tensor.dtype)
    field = f"tensor {tinygpt2.quote(name)}"
    try:
        tensor = tensor.detach()
        size = tensor.untyped_storage().nbytes()
        array = (tensor.view(torch.int16) if dtype == "torch.bfloat16" else tensor).numpy()
    except Exception:  # sparse, quantized, and other kinds
        expected, advice = "F32, F16, BF16 or F64", "save the model with one of these types"
        raise tinygpt2.FormatError(path, field, expected, dtype, advice) from None
    if array.nbytes > size:
        found = f"{array.nbytes}, the same ones several times"
        raise tinygpt2.FormatError(path, field, f"at most {size} bytes", found)
    return Weights(path, name, TORCH_DTYPES.get(dtype, dtype), array.shape, lambda: array)


def checked_model_args(path: str, model_args: object) -> dict[str, Any]:
    """nanoGPT's model_args in our words. Entries of its variants name another model."""
    if not isinstance(model_args, dict):
        found = tinygpt2.quote(model_args)
        raise tinygpt2.FormatError(path, "model_args", "a dictionary", found)
    for name, value in model_args.items():
        is_off = value is None or value is False
        if name not in MODEL_ARGS and not is_off and "drop" not in str(name):
            field, found = f"model_args {tinygpt2.quote(name)}", tinygpt2.quote(value)
            advice = "nanoGPT has no such entry; if it changes nothing in the model, remove it"
            raise tinygpt2.FormatError(path, field, "none", found, advice)
    return {ours: model_args[name] for name, ours in MODEL_ARGS.items() if name in model_args}


# Files of llm.c


def read_llmc(path: str) -> Saved:
    """The tensors in a file of llm.c: a header of 256 integers, then the numbers, layer by layer.

    The rows that pad the embedding to a round number are left out.
    """
    data = np.memmap(path, np.uint8, "r")
    if len(data) < LLMC_HEADER:
        raise tinygpt2.FormatError(path, "size", f"at least {LLMC_HEADER} bytes", str(len(data)))
    version, *sizes, padded = data[4:32].view("<i4").tolist()
    if version not in LLMC_VERSIONS:
        expected, advice = "3 (float32) or 5 (bfloat16)", "write it again with a newer llm.c"
        raise tinygpt2.FormatError(path, "version", expected, str(version), advice)
    names = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
    for name, size in zip((*names, "vocab_size"), (*sizes, padded)):
        limit = tinygpt2.SIZE_LIMITS[name]
        if not 1 <= size <= limit:
            raise tinygpt2.FormatError(path, name, f"a number from 1 to {limit}", str(size))
    told = dict(zip(names, sizes))
    dtype, code = LLMC_VERSIONS[version]
    shapes = llmc_shapes(told, padded)
    length = LLMC_HEADER + np.dtype(code).itemsize * sum(map(math.prod, shapes.values()))
    if len(data) != length:
        raise tinygpt2.FormatError(path, "size", f"{length} bytes", str(len(data)))
    numbers = data[LLMC_HEADER:].view(code)
    tensors: dict[str, Weights] = {}
    for name, shape in shapes.items():
        part, numbers = np.split(numbers, [math.prod(shape)])
        rows = part.reshape(shape)[: told["vocab_size"] if name == EMBEDDING else None]
        tensors[name] = Weights(path, name, dtype, rows.shape, partial(np.asarray, rows))
    tensors[HEAD] = tensors[EMBEDDING]
    return Saved(path, tensors, {**told, "activation_function": ASSUMED["llm.c"]}, "llm.c")


def llmc_shapes(told: dict[str, int], padded: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a file of llm.c in its order, by GPT-2's names."""
    n = told["n_embd"]
    layer: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (n,),
        "ln_1.bias": (n,),
        "attn.c_attn.weight": (3 * n, n),
        "attn.c_attn.bias": (3 * n,),
        "attn.c_proj.weight": (n, n),
        "attn.c_proj.bias": (n,),
        "ln_2.weight": (n,),
        "ln_2.bias": (n,),
        "mlp.c_fc.weight": (4 * n, n),
        "mlp.c_fc.bias": (4 * n,),
        "mlp.c_proj.weight": (n, 4 * n),
        "mlp.c_proj.bias": (n,),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (padded, n)}
    shapes["wpe.weight"] = (told["n_positions"], n)
    for kind, shape in layer.items():
        shapes.update({f"h.{i}.{kind}": shape for i in range(told["n_layer"])})
    return {**shapes, "ln_f.weight": (n,), "ln_f.bias": (n,)}


# ------------------------------------------------------------------------------------------------
# 4. Tokenizer
# ------------------------------------------------------------------------------------------------

# The ids are those that transformers 5 gives. Its tokenizer of GPT-2 takes the vocabulary and the
# merges from the files, and builds everything else itself. Its general class, TokenizersBackend,
# takes everything from tokenizer.json. Both then add tokens that other files name, in order: the
# ids in those files do not count.

GPT2_CLASS, GENERAL_CLASS = "GPT2Tokenizer", "TokenizersBackend"
OTHER_CLASSES = {  # other names, without "Fast", that transformers takes for one of these
    "PreTrainedTokenizer": GENERAL_CLASS,
    "PythonBackend": GENERAL_CLASS,
    "BloomTokenizer": GENERAL_CLASS,
    "LlamaTokenizer": GENERAL_CLASS,  # if tokenizer.json is byte-level; others are refused
}
NAMED = (  # in the order in which transformers adds them
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
END_OF_TEXT = "<|endoftext|>"
GPT2_NAMED = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
BYTE_LEVEL = {"type": "ByteLevel"}

Merges = dict[tuple[int, int], tuple[int, int]]  # (left, right) -> (rank, result)


class Vocabulary(NamedTuple):
    """A tokenizer as it is in its files."""

    path: str  # for messages
    tokens: dict[int, bytes]
    base: set[int]  # those that are not added ones
    byte_ids: dict[int, int]  # the tokens of single bytes
    merges: Merges
    added: tuple[tinygpt2.AddedToken, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    add_prefix_space: bool = False
    pre_tokenizer: str = "gpt2"


def vocabulary_config(vocabulary: Vocabulary | None) -> dict[str, Any]:
    """The part of the configuration that describes the tokenizer."""
    if vocabulary is None:
        vocabulary = Vocabulary("", {}, set(), {}, {})
        n_merges = None
    else:
        n_merges = len(vocabulary.merges)
    return {
        "n_merges": n_merges,
        "n_token_bytes": sum(map(len, vocabulary.tokens.values())),
        "added_tokens": [token._asdict() for token in vocabulary.added],
        "tokens_before": vocabulary.before,
        "tokens_after": vocabulary.after,
        "add_prefix_space": vocabulary.add_prefix_space,
        "pre_tokenizer": vocabulary.pre_tokenizer,
    }


def vocabulary_tables(config: tinygpt2.Config, vocabulary: Vocabulary) -> Iterator[bytes]:
    """The tensors that `tinygpt2.Tokenizer` reads, in the layout's order, padded with zeros."""
    words = [vocabulary.tokens.get(token, b"") for token in range(config.vocab_size)]
    offsets = [0]
    for word in words:
        offsets.append(offsets[-1] + len(word))
    alphabet = [vocabulary.byte_ids.get(byte, tinygpt2.NO_TOKEN) for byte in range(256)]
    merges = sorted(vocabulary.merges.items())
    tables = {
        "vocab.bytes": b"".join(words),
        "vocab.offsets": struct.pack(f"<{len(offsets)}I", *offsets),
        "vocab.byte_ids": struct.pack("<256I", *alphabet),
        "merges.pairs": b"".join(struct.pack("<Q", a << 32 | b) for (a, b), _ in merges),
        "merges.ranks": b"".join(struct.pack("<I", rank) for _, (rank, _) in merges),
        "merges.results": b"".join(struct.pack("<I", result) for _, (_, result) in merges),
    }
    places = tinygpt2.layout(config)
    for name, table in tables.items():
        yield table.ljust(tinygpt2.byte_size(*places[name]), b"\0")


def fit_vocabulary(vocabulary: Vocabulary, vocab_size: int) -> Vocabulary:
    """The vocabulary without added tokens that the model has no embedding for."""
    path, lost = vocabulary.path, [t for t in vocabulary.tokens if t >= vocab_size]
    if not lost:
        return vocabulary
    advice = "the tokenizer and the weights do not belong together"
    limit = f"tokens below {vocab_size}, the rows of the embedding"
    for token in lost:
        if token in vocabulary.base:
            raise tinygpt2.FormatError(path, "vocabulary", limit, str(token), advice)
    for token in (*vocabulary.before, *vocabulary.after):
        if token >= vocab_size:
            field = "tokens around every text"
            raise tinygpt2.FormatError(path, field, limit, str(token), advice)
    texts = [tinygpt2.quote(token.text) for token in vocabulary.added if token.id >= vocab_size]
    names = ", ".join(texts[:5]) + (", ..." if len(lost) > 5 else "")
    tinygpt2.note(
        f"{tinygpt2.show_path(path)}: dropped {len(lost)} added tokens ({names}): "
        f"the model has embeddings for {vocab_size} tokens only"
    )
    kept = {token: text for token, text in vocabulary.tokens.items() if token < vocab_size}
    remaining = tuple(token for token in vocabulary.added if token.id < vocab_size)
    return vocabulary._replace(tokens=kept, added=remaining)


# Where a tokenizer comes from


def find_vocabulary(folder: str, tokenizer: str | None) -> Vocabulary | None:
    """The tokenizer that the caller names, or else that of the checkpoint's folder."""
    if tokenizer is not None:
        return chosen_vocabulary(tokenizer)
    vocabulary = read_vocabulary(folder)
    if vocabulary is None:
        tinygpt2.note(
            f"{tinygpt2.show_path(folder)}: no tokenizer there; the model will take token ids only "
            "(--tokenizer names a folder with one)"
        )
    return vocabulary


def chosen_vocabulary(path: str) -> Vocabulary:
    """The tokenizer in a folder or file, or that of a model on the hub."""
    if os.path.isfile(path):
        return read_vocabulary_file(path)
    folder = path if os.path.isdir(path) else fetch_tokenizer(path)
    vocabulary = read_vocabulary(folder)
    if vocabulary is None:
        expected = "tokenizer.json, or vocab.json with merges.txt"
        raise tinygpt2.FormatError(folder, "tokenizer", expected, "none", "name another folder")
    return vocabulary


def read_vocabulary_file(path: str) -> Vocabulary:
    """A tokenizer.json alone, or the character list of nanoGPT, minGPT or makemore in JSON."""
    refuse_pickle(path)
    data = read_json(path)
    if isinstance(data.get("model"), dict):
        return build_vocabulary(path, path, data, added_in(path, data), [])
    return character_vocabulary(path, data)


def refuse_pickle(path: str) -> None:
    if is_pickled(path):
        code = (
            "import json, pickle; from pathlib import Path; "
            "stoi = pickle.loads(Path('meta.pkl').read_bytes())['stoi']; "
            "Path('meta.json').write_text(json.dumps({'stoi': stoi}))"
        )
        advice = f'a pickle can run any code, so write it as JSON yourself: python -c "{code}"'
        raise tinygpt2.FormatError(path, "tokenizer", "JSON", "a pickle", advice)


def read_vocabulary(folder: str) -> Vocabulary | None:
    """The tokenizer that transformers reads from a folder, or None if there is none at all."""
    path, vocab, merges = (
        os.path.join(folder, name) for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    has_json = os.path.exists(path)
    if not has_json and not (os.path.exists(vocab) and os.path.exists(merges)):
        refuse_other_tokenizers(folder)
        return None
    options_path = os.path.join(folder, "tokenizer_config.json")
    options = optional_json(options_path)
    kind = tokenizer_class(folder, options_path, options, has_json)
    if has_json:
        data = read_json(path)
    else:
        path, data = vocab, gpt2_data(read_json(vocab), merge_lines(merges))
    added = added_in(path, data) if kind == GENERAL_CLASS else []
    named, more = tokens_to_add(folder, options_path, options, path, data, kind, added)
    if kind == GPT2_CLASS:
        model = byte_level_model(path, data)
        note_ignored(path, data, model)
        rebuilt = gpt2_data(model["vocab"], model["merges"], options.get("add_prefix_space"))
        rebuilt["post_processor"] = data.get("post_processor")
        if not has_json:
            rebuilt["post_processor"] = ends_template(options, named)
        data = rebuilt
    return build_vocabulary(path, path if has_json else merges, data, added, more)


def refuse_other_tokenizers(folder: str) -> None:
    """Refuse an incomplete or unknown tokenizer, rather than convert the model without it."""
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            expected = "a byte-level BPE (vocab.json with merges.txt, or tokenizer.json)"
            advice = "add the missing file, or remove this one to convert without a tokenizer"
            raise tinygpt2.FormatError(path, "tokenizer", expected, f"only {name}", advice)


def optional_json(path: str) -> dict[str, Any]:
    return read_json(path) if os.path.exists(path) else {}


def tokenizer_class(folder: str, path: str, options: dict[str, Any], has_json: bool) -> str:
    """The class of transformers that reads the folder's tokenizer."""
    config = os.path.join(folder, "config.json")
    name = options.get("tokenizer_class")
    if name is None:
        name = optional_json(config).get("tokenizer_class")
    if name is None:  # then it depends on the model
        name = GPT2_CLASS if os.path.exists(config) or not has_json else GENERAL_CLASS
    short = name[:-4] if isinstance(name, str) and name.endswith("Fast") else name
    kind = OTHER_CLASSES.get(str(short), short)
    if kind not in (GPT2_CLASS, GENERAL_CLASS) or (kind == GENERAL_CLASS and not has_json):
        expected = f"{GPT2_CLASS}, or {GENERAL_CLASS} with a tokenizer.json"
        found = tinygpt2.quote(name)
        advice = "other tokenizers are not supported; --tokenizer names a folder with another one"
        raise tinygpt2.FormatError(path, "tokenizer_class", expected, found, advice)
    for option in ("auto_map", "fast_tokenizer_files"):
        if options.get(option):
            found = tinygpt2.quote(options[option])
            advice = "save the tokenizer again with transformers 5"
            raise tinygpt2.FormatError(path, option, "none", found, advice)
    return kind


def gpt2_data(vocab: Any, merges: Any, add_prefix_space: object = False) -> dict[str, Any]:
    """The tokenizer.json of the tokenizer that transformers' GPT2Tokenizer builds."""
    cutter = {**BYTE_LEVEL, "add_prefix_space": bool(add_prefix_space)}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return {"model": model, "pre_tokenizer": cutter, "decoder": BYTE_LEVEL}


def note_ignored(path: str, data: dict[str, Any], model: dict[str, Any]) -> None:
    """Say that a tokenizer.json has something that GPT2Tokenizer does not look at."""
    try:
        byte_level_cutter(path, data)
        refuse_other_steps(path, data, model)
    except tinygpt2.FormatError as error:
        place = f"{tinygpt2.show_path(path)}: {error.field}: {error.found}"
        tinygpt2.note(f"{place}: ignored, as transformers' {GPT2_CLASS} ignores it")


def merge_lines(path: str) -> list[str]:
    """The merges in merges.txt, the most important first."""
    with contextlib.closing(tinygpt2.map_file(path, "text")) as file:
        try:
            lines = file[:].decode("utf-8").replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError as error:
            raise tinygpt2.FormatError(path, "content", "UTF-8", str(error)) from None
    return [line for line in lines if line and not line.startswith("#version")]


# Added tokens. While they are collected, they have no ids: NEW.

NEW = -1


def added_token(path: str, field: str, entry: object, **flags: bool) -> tinygpt2.AddedToken:
    """An added token as a JSON object of the `tokenizers` library."""
    names = ("special", "lstrip", "rstrip", "single_word", "normalized")
    values = {**entry, **flags} if isinstance(entry, dict) else {}
    found = {name: values[name] for name in names if name in values}
    text = values.get("content")
    if not isinstance(text, str) or not all(isinstance(flag, bool) for flag in found.values()):
        expected = "an added token with content and flags"
        raise tinygpt2.FormatError(path, field, expected, tinygpt2.quote(entry))
    return new_token(text, **found)


def new_token(text: str, special: bool = False, **flags: bool) -> tinygpt2.AddedToken:
    """An added token with the defaults of the `tokenizers` library."""
    flags = {"normalized": not special, **flags}
    return tinygpt2.AddedToken(text, NEW, special, **flags)


def added_in(path: str, data: dict[str, Any]) -> list[tinygpt2.AddedToken]:
    """The added tokens of a tokenizer.json. The ids there do not count."""
    entries = data.get("added_tokens") or []
    if not isinstance(entries, list):
        raise tinygpt2.FormatError(path, "added_tokens", "a list", tinygpt2.quote(entries))
    return [added_token(path, "added_tokens", entry) for entry in entries]


Named = dict[str, Union[str, "tinygpt2.AddedToken"]]


def tokens_to_add(
    folder: str,
    path: str,
    options: dict[str, Any],
    json_path: str,
    data: dict[str, Any],
    kind: str,
    there: list[tinygpt2.AddedToken],
) -> tuple[Named, list[tinygpt2.AddedToken]]:
    """What transformers adds to a tokenizer that has the added tokens `there`.

    Returns the tokens that have a role, and all that are added, in order. `options` is the content
    of `path`, tokenizer_config.json. If it lists added tokens, the older files do not count.
    """
    values = dict(options)
    move_extra(values)
    if "added_tokens_decoder" in values:
        listed = listed_tokens(path, values["added_tokens_decoder"])
    else:
        merge_special_map(os.path.join(folder, "special_tokens_map.json"), values)
        move_extra(values)
        listed = older_tokens(os.path.join(folder, "added_tokens.json"), values)
        if json_path.endswith("tokenizer.json"):
            listed.update(ids_of_added(json_path, data))
    named = named_tokens(path, values, kind, data, listed)
    extra = [as_token(path, "extra_special_tokens", value) for value in extra_of(path, values)]
    return named, new_ones(list(dict(sorted(listed.items())).values()), named, extra, there)


def move_extra(values: dict[str, Any]) -> None:
    """The older name of `extra_special_tokens`."""
    if "additional_special_tokens" in values and not values.get("extra_special_tokens"):
        values["extra_special_tokens"] = values.pop("additional_special_tokens")


def listed_tokens(path: str, decoder: object) -> dict[int, tinygpt2.AddedToken]:
    """The added tokens in tokenizer_config.json, by their ids there."""
    field = "added_tokens_decoder"
    try:
        entries = {int(key): entry for key, entry in dict_items(decoder)}
    except ValueError:
        entries = {}
    if not isinstance(decoder, dict) or len(entries) != len(decoder):
        expected = "an object of token ids"
        raise tinygpt2.FormatError(path, field, expected, tinygpt2.quote(decoder))
    return {key: added_token(path, field, entry) for key, entry in entries.items()}


def merge_special_map(path: str, values: dict[str, Any]) -> None:
    """Let special_tokens_map.json replace values of tokenizer_config.json."""
    for name, value in optional_json(path).items():
        if isinstance(value, dict) and name != "extra_special_tokens":
            values[name] = added_token(path, name, value, special=True)
        elif name == "extra_special_tokens" and isinstance(value, list):
            before = list(values.get(name) or [])
            values[name] = before + [item for item in value if item not in before]
        else:
            values[name] = value


def older_tokens(path: str, values: dict[str, Any]) -> dict[int, tinygpt2.AddedToken]:
    """The tokens in added_tokens.json, by their ids there."""
    roles = [values[name] for name in NAMED if values.get(name)]
    extra = values.get("extra_special_tokens")
    special = {text_of(value) for value in [*roles, *(extra if isinstance(extra, list) else [])]}
    ids = checked_ids(path, optional_json(path))
    return {token: new_token(text, text in special) for text, token in ids.items()}


def text_of(value: object) -> str:
    """The text of a token that is given as text or as an added token; else nothing."""
    if isinstance(value, tinygpt2.AddedToken):
        return value.text
    return value if isinstance(value, str) else ""


def ids_of_added(path: str, data: dict[str, Any]) -> dict[int, tinygpt2.AddedToken]:
    """The added tokens of a tokenizer.json by their ids, which only give an order."""
    ids = {}
    for entry, token in zip(data.get("added_tokens") or [], added_in(path, data)):
        number = entry.get("id")
        if not tinygpt2.is_count(number):
            raise tinygpt2.FormatError(path, "added_tokens id", "a count", tinygpt2.quote(number))
        ids[number] = token
    return ids


def as_token(path: str, field: str, value: object) -> str | tinygpt2.AddedToken:
    """A special token, given as text or as an object that says so."""
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return added_token(path, field, value)
    if isinstance(value, (str, tinygpt2.AddedToken)):
        return value
    raise tinygpt2.FormatError(path, field, "the text of a token", tinygpt2.quote(value))


def named_tokens(
    path: str,
    values: dict[str, Any],
    kind: str,
    data: dict[str, Any],
    listed: dict[int, tinygpt2.AddedToken],
) -> Named:
    """The tokens that have a role, such as bos_token, in the order of transformers."""
    defaults: dict[str, Any] = dict(GPT2_NAMED) if kind == GPT2_CLASS else {}
    padding = data.get("padding")
    if kind == GENERAL_CLASS and isinstance(padding, dict):
        defaults["pad_token"] = padding.get("pad_token")
    by_text = {token.text: token for token in listed.values()}
    extra = values.get("extra_special_tokens")
    others = {
        name: value
        for name, value in values.items()
        if name.endswith("_token") and name not in NAMED and is_named_token(value)
    }
    for more in (extra, values.get("model_specific_special_tokens")):
        others.update(more if isinstance(more, dict) else {})
    named: Named = {}
    for name in (*NAMED, *others):
        value = others[name] if name in others else values.get(name, defaults.get(name))
        if value is None:
            continue
        token = as_token(path, name, value)
        is_known = name in NAMED and name in values
        named[name] = by_text.get(text_of(token), token) if is_known else token
    return named


def is_named_token(value: object) -> bool:
    """Whether transformers takes the value of a name that ends with "_token" for a token."""
    is_object = isinstance(value, dict) and value.get("__type") == "AddedToken"
    return is_object or isinstance(value, (str, tinygpt2.AddedToken))


def extra_of(path: str, values: dict[str, Any]) -> list[Any]:
    extra = values.get("extra_special_tokens") or []
    if isinstance(extra, dict):  # these have names, see `named_tokens`
        return []
    if not isinstance(extra, list):
        expected = "a list or an object"
        raise tinygpt2.FormatError(path, "extra_special_tokens", expected, tinygpt2.quote(extra))
    return extra


def new_ones(
    listed: list[tinygpt2.AddedToken],
    named: Named,
    extra: list[str | tinygpt2.AddedToken],
    there: list[tinygpt2.AddedToken],
) -> list[tinygpt2.AddedToken]:
    """Listed tokens, then those with a role, then the others that are not there yet."""
    roles = set(map(text_of, named.values()))
    known = {token.text for token in (*there, *listed)}
    tokens: list[str | tinygpt2.AddedToken] = list(listed)
    for token in (*named.values(), *extra):
        if text_of(token) not in known and token not in tokens:
            tokens.append(token)
    return [
        new_token(token, special=True)
        if isinstance(token, str)
        else token._replace(special=token.special or token.text in roles)
        for token in tokens
    ]


def number_added(
    path: str,
    ids: dict[str, int],
    there: list[tinygpt2.AddedToken],
    more: list[tinygpt2.AddedToken],
) -> tuple[tinygpt2.AddedToken, ...]:
    """Added tokens with the ids that the `tokenizers` library gives them, one after the other.

    `there` are those of tokenizer.json, and `more` those that transformers adds in one call. Of
    two with one text in one call, the last one's flags count.
    """
    owners = {token: text for text, token in ids.items()}
    added: dict[str, tinygpt2.AddedToken] = {}
    calls: dict[str, bool] = {}  # whether `there` or `more` named a text last
    last = NEW
    for place, token in enumerate([*there, *more]):
        if not token.text:
            continue
        number = ids.get(token.text, max(len(ids), last + 1))
        field = f"added token {tinygpt2.quote(token.text)}"
        if token.text not in ids and max(ids.values(), default=0) >= len(ids):
            found = "a vocabulary whose ids leave a gap"
            advice = "it is not certain which id a new token had in training; number them anew"
            raise tinygpt2.FormatError(path, field, "ids from 0 on", found, advice)
        if token.text in added:
            number = added[token.text].id
            is_same_call = calls[token.text] == (place < len(there))
            if token.normalized != added[token.text].normalized and not is_same_call:
                expected = "the same flags wherever it is named"
                raise tinygpt2.FormatError(path, field, expected, "others")
            token = token._replace(special=token.special or added[token.text].special)
        elif owners.get(number, token.text) != token.text:
            found = f"{number}, which is {tinygpt2.quote(owners[number])} as well"
            raise tinygpt2.FormatError(path, field, "an id of its own", found)
        owners[number] = token.text
        last = max(last, number)
        added[token.text] = token._replace(id=number)
        calls[token.text] = place < len(there)
    return tuple(sorted(added.values(), key=lambda token: token.id))


# Before and behind every text


def ends_template(options: dict[str, Any], named: Named) -> dict[str, Any]:
    """The post-processor that GPT2Tokenizer makes of add_bos_token and add_eos_token."""
    bos, eos = text_of(named.get("bos_token")), text_of(named.get("eos_token"))
    # A string would be a token: names that end with "_token" name one.
    adds = {name: value for name, value in options.items() if not isinstance(value, str)}
    before = [piece_of(bos)] if adds.get("add_bos_token") and bos else []
    after = [piece_of(eos)] if adds.get("add_eos_token") and eos else []
    single = [*before, {"Sequence": {"id": "A"}}, *after]
    return {"type": "TemplateProcessing", "single": single, "special_tokens": {}}


def piece_of(text: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": text}}


Ends = tuple[tuple[int, ...], tuple[int, ...]]  # ids before and behind


def tokens_around(path: str, processor: object, ids: dict[str, int]) -> Ends:
    """The ids that a post-processor puts before and behind every single text."""
    if processor is None:
        return (), ()
    kind = processor.get("type") if isinstance(processor, dict) else processor
    try:
        if isinstance(processor, dict):
            if kind == "ByteLevel":
                return (), ()
            if kind in ("RobertaProcessing", "BertProcessing"):
                return (token_id(processor["cls"][1]),), (token_id(processor["sep"][1]),)
            if kind == "TemplateProcessing":
                return template_ends(processor["single"], processor["special_tokens"], ids)
            if kind == "Sequence":
                return sequence_ends(path, processor["processors"], ids)
    except (TypeError, KeyError, ValueError, IndexError, AttributeError, RecursionError):
        kind = processor
    expected = "a template with one text and tokens around it"
    raise tinygpt2.FormatError(path, "post_processor", expected, tinygpt2.quote(kind))


def sequence_ends(path: str, processors: list[Any], ids: dict[str, int]) -> Ends:
    """Of several processors only one may add tokens: what two do follows no simple rule."""
    ends = [tokens_around(path, processor, ids) for processor in processors]
    adding = [pair for pair in ends if any(pair)]
    if len(adding) > 1:
        raise ValueError
    return adding[0] if adding else ((), ())


def template_ends(single: list[Any], specials: dict[str, Any], ids: dict[str, int]) -> Ends:
    names = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else None for piece in single]
    text = names.index(None)
    if names.count(None) != 1 or single[text]["Sequence"]["id"] != "A":
        raise ValueError
    groups = [
        [] if name is None else specials[name]["ids"] if name in specials else [ids[name]]
        for name in names
    ]
    before = [token_id(token) for group in groups[:text] for token in group]
    after = [token_id(token) for group in groups[text:] for token in group]
    return tuple(before), tuple(after)


def token_id(value: object) -> int:
    if not tinygpt2.is_token(value, tinygpt2.SIZE_LIMITS["vocab_size"]):
        raise ValueError
    return int(value)  # type: ignore[call-overload, no-any-return]


# From the content of a tokenizer.json to a vocabulary


def build_vocabulary(
    path: str,
    merges_path: str,
    data: dict[str, Any],
    there: list[tinygpt2.AddedToken],
    more: list[tinygpt2.AddedToken],
) -> Vocabulary:
    """The vocabulary in bytes. Only GPT-2's kind is accepted."""
    model = byte_level_model(path, data)
    cutter = byte_level_cutter(path, data)
    refuse_other_steps(path, data, model)
    ids = checked_ids(path, model["vocab"])
    base = set(ids.values())
    merges = number_merges(merges_path, ids, merge_texts(path, model["merges"]))
    refuse_shared_ids(path, ids)
    numbered = number_added(path, ids, there, more)
    ids = {**ids, **{token.text: token.id for token in numbered}}
    before, after = tokens_around(path, data.get("post_processor"), ids)
    alphabet = byte_alphabet()
    refuse_other_letters(path, ids, merges, alphabet)
    tokens = {token: token_bytes(text, alphabet) for text, token in ids.items()}
    byte_ids = {
        byte: model["vocab"][letter]
        for letter, byte in alphabet.items()
        if letter in model["vocab"]
    }
    prefix = cutter.get("add_prefix_space") is True
    return Vocabulary(path, tokens, base, byte_ids, merges, numbered, before, after, prefix)


def byte_level_model(path: str, data: dict[str, Any]) -> dict[str, Any]:
    """The part `model` of a tokenizer.json, which must be a BPE with a vocabulary."""
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        found = tinygpt2.quote(model.get("type") if isinstance(model, dict) else model)
        advice = "only byte-level BPE is supported"
        raise tinygpt2.FormatError(path, "model type", "BPE", found, advice)
    if not isinstance(model.get("vocab"), dict):
        found = tinygpt2.quote(model.get("vocab"))
        raise tinygpt2.FormatError(path, "vocab", "an object of token ids", found)
    return model


def byte_level_cutter(path: str, data: dict[str, Any]) -> dict[str, Any]:
    """The part `pre_tokenizer` of a tokenizer.json, which must be GPT-2's."""
    cutter = data.get("pre_tokenizer")
    steps = cutter.get("pretokenizers") if isinstance(cutter, dict) else None
    if isinstance(steps, list) and len(steps) == 1:
        cutter = steps[0]
    is_byte_level = isinstance(cutter, dict) and cutter.get("type") == "ByteLevel"
    if not isinstance(cutter, dict) or not is_byte_level or not cutter.get("use_regex", True):
        found = tinygpt2.quote(cutter)
        expected = "ByteLevel with GPT-2's pattern"
        raise tinygpt2.FormatError(path, "pre_tokenizer", expected, found)
    return cutter


def refuse_other_steps(path: str, data: dict[str, Any], model: dict[str, Any]) -> None:
    """Refuse options that make the tokens of a text, or their text, differ from GPT-2's."""
    known = ("type", "vocab", "merges", "unk_token", "fuse_unk")
    for name, value in [("normalizer", data.get("normalizer")), *model.items()]:
        if name not in known and value:
            found, advice = tinygpt2.quote(value), "GPT-2's tokenizer has no such step"
            raise tinygpt2.FormatError(path, name, "none", found, advice)
    decoder = data.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise tinygpt2.FormatError(path, "decoder", "ByteLevel", tinygpt2.quote(decoder))


def checked_ids(path: str, values: dict[str, Any]) -> dict[str, int]:
    """Texts with their token ids, after a check of every id."""
    for text, token in values.items():
        if not tinygpt2.is_token(token, tinygpt2.SIZE_LIMITS["vocab_size"]):
            field = f"token {tinygpt2.quote(text)}"
            raise tinygpt2.FormatError(path, field, "a token id", tinygpt2.quote(token))
    return values


def refuse_shared_ids(path: str, ids: dict[str, int]) -> None:
    owners: dict[int, str] = {}
    for text, token in ids.items():
        if owners.setdefault(token, text) != text:
            field = f"token {tinygpt2.quote(text)}"
            raise tinygpt2.FormatError(path, field, "an id of its own", str(token))


def merge_texts(path: str, merges: object) -> list[str]:
    """Merges as lines of two tokens, which a tokenizer.json may also have as pairs."""
    try:
        return [line if isinstance(line, str) else " ".join(line) for line in merges]  # type: ignore[attr-defined]
    except TypeError:
        expected = "a list of pairs of tokens"
        raise tinygpt2.FormatError(path, "merges", expected, tinygpt2.quote(merges)) from None


def number_merges(path: str, ids: dict[str, int], lines: list[str]) -> Merges:
    """Merges as ids, from lines of two tokens with the most important line first."""
    merges: Merges = {}
    for rank, line in enumerate(lines):
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= ids.keys():
            expected = "two tokens that join to a third"
            advice = "the merges and the vocabulary do not belong together"
            found = tinygpt2.quote(line)
            raise tinygpt2.FormatError(path, f"merge {rank}", expected, found, advice)
        merges[ids[left], ids[right]] = (rank, ids[left + right])
    return merges


def refuse_other_letters(
    path: str, ids: dict[str, int], merges: Merges, alphabet: dict[str, int]
) -> None:
    """Refuse merges of texts that are not written in the letters for bytes."""
    merged = {token for pair, (_, result) in merges.items() for token in (*pair, result)}
    for text, token in ids.items():
        if token in merged and not set(text) <= alphabet.keys():
            field = f"token {tinygpt2.quote(text)}"
            raise tinygpt2.FormatError(path, field, "letters of byte-level BPE", "others")


def token_bytes(text: str, alphabet: dict[str, int]) -> bytes:
    """What a token decodes to: the bytes of its letters, or itself if one is not a letter."""
    if set(text) <= alphabet.keys():
        return bytes(alphabet[letter] for letter in text)
    return text.encode("utf-8", "replace")


def byte_alphabet() -> dict[str, int]:
    """The letters that stand for bytes in GPT-2's files.

    A visible Latin-1 character stands for its own byte. The other bytes, in order, are written as
    the characters from U+0100.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    letters.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return letters


def character_vocabulary(path: str, data: dict[str, Any]) -> Vocabulary:
    """A character list: {"stoi": {...}}, {"itos": ...}, or the characters with their ids."""
    ids = data.get("stoi", data)
    if "itos" in data:
        by_id = texts_by_id(path, data["itos"])
        ids = data.get("stoi", by_id)
        if ids != by_id:
            expected = "the same characters and ids as in stoi"
            raise tinygpt2.FormatError(path, "itos", expected, tinygpt2.quote(data["itos"]))
    if not isinstance(ids, dict) or not ids:
        expected = "an object of characters with their ids"
        raise tinygpt2.FormatError(path, "stoi", expected, tinygpt2.quote(ids))
    checked_ids(path, ids)
    refuse_shared_ids(path, ids)
    for text in ids:
        if len(text) != 1 or "\ud800" <= text <= "\udfff":
            field, advice = f"token {tinygpt2.quote(text)}", "name a folder for other tokenizers"
            raise tinygpt2.FormatError(path, field, "one character", f"{len(text)}", advice)
    tokens = {token: text.encode() for text, token in ids.items()}
    byte_ids = {word[0]: token for token, word in tokens.items() if len(word) == 1}
    return Vocabulary(path, tokens, set(tokens), byte_ids, {}, pre_tokenizer="characters")


def texts_by_id(path: str, itos: object) -> dict[str, int]:
    """`itos` the other way round; it is a list, or an object whose names are the ids."""
    pairs = enumerate(itos) if isinstance(itos, list) else dict_items(itos)
    try:
        ids = [(text, int(token)) for token, text in pairs]
    except ValueError:
        ids = []
    are_texts = all(isinstance(text, str) for text, _ in ids)
    if not ids or not are_texts or len(dict(ids)) != len(ids):
        expected = "a list of different characters, or an object of them"
        raise tinygpt2.FormatError(path, "itos", expected, tinygpt2.quote(itos))
    return dict(ids)


def dict_items(value: object) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


# ------------------------------------------------------------------------------------------------
# 5. Hub
# ------------------------------------------------------------------------------------------------

# The package huggingface_hub fetches. Its cache, tokens, proxies and certificates are its work.

HUB_ERRORS = (  # classes of the package, and of those below it: what each means, and what to do
    (
        "ImportError",
        "downloads need the package huggingface_hub: {cause}",
        "run `pip install huggingface_hub`",
    ),
    (
        "OfflineModeIsEnabled",
        "HF_HUB_OFFLINE is set, and not all files are in the hub's cache",
        "unset it, or fill the cache first",
    ),
    (
        "GatedRepoError",
        "its owner gives access on request",
        "ask for access on the model's page, then set HF_TOKEN or run `hf auth login`",
    ),
    ("DisabledRepoError", "the hub has disabled this model", "choose another one"),
    (
        "RepositoryNotFoundError",
        "there is no such model, or it is private",
        "check the name; a private model needs HF_TOKEN or `hf auth login`",
    ),
    ("RevisionNotFoundError", "there is no revision {revision}", "check --revision"),
    ("LocalProtocolError", "the access token cannot be sent", "check HF_TOKEN"),
    ("UnicodeEncodeError", "the access token cannot be sent", "check HF_TOKEN"),
    ("ProxyError", "no connection through the proxy: {cause}", "check HTTPS_PROXY"),
    ("UnsupportedProtocol", "the hub's address is not a URL: {cause}", "check HF_ENDPOINT"),
    ("TransportError", "no connection to the hub: {cause}", "check the network and HF_ENDPOINT"),
    ("ConnectionError", "no connection to the hub: {cause}", "check the network and HF_ENDPOINT"),
    ("FileMetadataError", "the answer is not the hub's: {cause}", "check HF_ENDPOINT"),
    ("JSONDecodeError", "the answer is not the hub's: {cause}", "check HF_ENDPOINT"),
    ("EntryNotFoundError", "it lacks a file: {cause}", "choose a model saved by transformers"),
    ("ValueError", "{cause}", "check the name and HF_ENDPOINT"),
)
HTTP_ADVICE = {  # by status
    401: "check HF_TOKEN, or run `hf auth login`",
    403: "the access token does not allow this: check HF_TOKEN",
    429: "too many requests: wait, or set HF_TOKEN",
}


def download(
    name: str,
    out: Path,
    revision: str = "main",
    progress: Progress | None = None,
    bars: bool = False,
) -> None:
    """Fetch a checkpoint from the Hugging Face hub and convert it to a .tg2 file.

    The files come from the hub's cache, or are fetched into it, by the package huggingface_hub,
    which has its usual settings (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HOME). `bars` shows
    its progress bars. Raises `DownloadError`, or `FormatError` if the files are not a GPT-2.
    """
    target = tinygpt2.path_text(out, "out")
    check_names(name, revision)
    with open_hub(name, revision, bars) as hub:
        folder = fetch(hub, cached_name(hub, name, revision, WEIGHT_FILES), revision)
    convert(folder, target, progress)


def fetch_tokenizer(name: str) -> str:
    """The folder with the tokenizer of a model on the hub."""
    if not tinygpt2.is_hub_name(name):
        expected, advice = "a folder or file", "check the path, or name a folder with a tokenizer"
        raise tinygpt2.MissingFileError(name, "tokenizer", expected, "nothing there", advice)
    with open_hub(name, "main", bars=False) as hub:
        known = cached_name(hub, name, "main", ("tokenizer.json", "vocab.json"))
        return fetch_small_files(hub, known, "main")


def check_names(name: object, revision: object) -> None:
    """Refuse names that could lead to another place in a URL or a file system."""
    word = r"\w[\w.-]*"
    if not is_name(name, rf"{word}(/{word})?"):
        found = tinygpt2.quote(name)
        raise tinygpt2.InputError(f"model name: expected 'gpt2' or 'owner/name', found {found}")
    if not is_name(revision, rf"{word}(/{word})*"):
        found = tinygpt2.quote(revision)
        raise tinygpt2.InputError(f"revision: expected a branch, tag or commit, found {found}")


def is_name(value: object, pattern: str) -> bool:
    if not isinstance(value, str) or ".." in value:
        return False
    return re.fullmatch(pattern, value, re.ASCII) is not None


@contextlib.contextmanager
def open_hub(name: str, revision: str, bars: bool) -> Iterator[Any]:
    """The package huggingface_hub; its errors become `DownloadError`."""
    try:
        hub = importlib.import_module("huggingface_hub")
        with quiet(importlib.import_module("huggingface_hub.utils"), bars):
            yield hub
    except tinygpt2.TinyGPT2Error:
        raise
    except Exception as error:
        raise download_error(name, revision, error) from None


@contextlib.contextmanager
def quiet(utils: Any, bars: bool) -> Iterator[None]:
    """The package logs and warns of nothing meanwhile, and shows its bars only if asked to."""
    level = utils.logging.get_verbosity()
    hides = not bars and not utils.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            utils.logging.set_verbosity_error()
            if hides:
                utils.disable_progress_bars()
            yield
        finally:
            utils.logging.set_verbosity(level)
            if hides:
                utils.enable_progress_bars()


def cached_name(hub: Any, name: str, revision: str, files: Sequence[str]) -> str:
    """The name under which the cache has a model: the hub moved its first ones to an owner."""
    owner = "openai-community/"
    bare = name[len(owner) :] if name.startswith(owner) else name
    for known in (name, bare, owner + bare) if "/" not in bare else (name,):
        for file in files:
            if isinstance(hub.try_to_load_from_cache(known, file, revision=revision), str):
                return known
    return name


def fetch(hub: Any, name: str, revision: str) -> str:
    """Fetch what `convert` reads; return the folder. Weights come last, one after the other."""
    folder = fetch_small_files(hub, name, revision)
    commit = os.path.basename(folder)
    config = hub.hf_hub_download(name, CONFIG, revision=commit)  # an error if it is not there
    refuse_other_architectures(config, read_json(config))
    for file in wanted_weights(name, folder, list_files(hub, name, commit, folder)):
        hub.hf_hub_download(name, file, revision=commit)
    return folder


def fetch_small_files(hub: Any, name: str, revision: str) -> str:
    """Fetch all that `convert` reads but the weights; return the folder, named by the commit."""
    return str(hub.snapshot_download(name, revision=revision, allow_patterns=[*SMALL_FILES]))


def list_files(hub: Any, name: str, commit: str, folder: str) -> list[str]:
    """The files of a model: those in the cache, or those on the hub if weights are not cached."""
    cached = os.listdir(folder)
    if WEIGHTS in cached or fnmatch.filter(cached, "model-*.safetensors"):
        return cached
    try:
        return list(hub.list_repo_files(name, revision=commit))
    except Exception:
        if not set(WEIGHT_FILES) & set(cached):
            raise
        return cached


def wanted_weights(name: str, folder: str, files: list[str]) -> list[str]:
    """The names of the files with weights; `folder` has the index already, if there is one."""
    first = next((file for file in WEIGHT_FILES if file in files), None)
    if first is None:
        advice = "choose a model saved by transformers"
        raise tinygpt2.DownloadError(f"{name}: it has no {WEIGHTS} ({advice})")
    if first in PICKLED_FILES and importlib.util.find_spec("torch") is None:
        advice = "run `pip install torch`, or choose a model with safetensors"
        raise tinygpt2.DownloadError(f"{name}: only PyTorch can read its {first} ({advice})")
    if not first.endswith(".json"):
        return [first]
    return [os.path.basename(path) for path in shard_paths(folder, os.path.join(folder, first))]


def download_error(name: str, revision: str, error: BaseException) -> tinygpt2.DownloadError:
    """One line for an error of huggingface_hub, which often is one of a chain."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    found, advice = explain(chain)
    cause = getattr(chain[-1], "strerror", None) or str(chain[-1]) or type(chain[-1]).__name__
    found = found.format(cause=cause.strip().partition("\n")[0], revision=revision)
    return tinygpt2.DownloadError(f"{name}: {found} ({advice})")


def explain(chain: list[BaseException]) -> tuple[str, str]:
    """The cause of a failure, and what to do."""
    for error in chain:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "no space for the hub's cache: {cause}", "free some, or set HF_HOME elsewhere"
        if isinstance(error, PermissionError):
            return "the hub's cache: {cause}", "set HF_HOME to a folder of your own"
    for name, found, advice in HUB_ERRORS:
        for error in chain:
            if name in (kind.__name__ for kind in type(error).__mro__):
                return found, advice
    for error in chain:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return "the hub answered: {cause}", HTTP_ADVICE.get(status, "try again later")
    return f"{type(chain[0]).__name__}: {{cause}}", "try again"
