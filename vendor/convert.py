"""Converts GPT-2 checkpoints to .tg2 files, and downloads checkpoints from the Hugging Face hub.

This file is a companion of tinygpt2.py. It is not imported by its name: `tinygpt2.convert`,
`tinygpt2.download` and the commands `convert` and `download` load it on first use, through
`tinygpt2.load_companion("convert")`. That function finds this file in the folder vendor/ beside
tinygpt2.py, or in the installed package, and executes it. Before that, it sets the global name
`tinygpt2` to the running module, which may be called `__main__`. So this file raises the same
error classes as the rest of the program.

    1. checkpoint    its files, and what its configurations say
    2. weights       its tensors by GPT-2's names, checked, and converted in slabs
    3. tokenizer     vocab.json with merges.txt, or tokenizer.json
    4. hub           downloads that can be resumed

It needs NumPy.

SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Union

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    import tinygpt2

    Array = npt.NDArray[Any]
    Path = Union[str, os.PathLike[str]]
    Progress = Callable[[str, int, int], None]  # label, bytes done, bytes in all


def convert(source: Path, out: Path, progress: Progress | None = None) -> None:
    """Convert a GPT-2 checkpoint to a .tg2 file.

    `source` is a folder as transformers writes it (config.json, model.safetensors or shards with
    an index, vocab.json with merges.txt or tokenizer.json), or a .safetensors file beside its
    config.json. Memory use stays small, because tensors are converted in slabs. `out` is replaced
    only when the new file is complete. Raises `FormatError`, which names what is missing,
    misshapen or not supported.
    """
    folder, files = find_checkpoint(tinygpt2.path_text(source, "source"))
    target = tinygpt2.path_text(out, "out")
    vocabulary = read_vocabulary(folder)
    config = checkpoint_config(folder, vocabulary)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(contextlib.closing(tinygpt2.TensorFile(f))) for f in files]
        write_model(target, files[0], config, read_tensors(opened), vocabulary, progress)


def write_model(
    path: str,
    source: str,
    config: tinygpt2.Config,
    tensors: dict[str, Weights],
    vocabulary: Vocabulary | None,
    progress: Progress | None,
) -> None:
    """Write a .tg2 file from the tensors of a checkpoint, by the names that they have there."""
    config, parts = arrange(source, config, gpt2_parts(source, tensors))
    write_tg2(path, config, tg2_data(config, parts, vocabulary), progress)


def write_tg2(
    path: str, config: tinygpt2.Config, data: Iterator[bytes], progress: Progress | None
) -> None:
    """Write a .tg2 file of format version 2. `data` yields the tensors in the layout's order."""
    entries, metadata = tinygpt2.layout(config), tinygpt2.tg2_metadata(config)
    tinygpt2.write_tensors(path, entries, data, metadata, tinygpt2.read_config, progress)


# ------------------------------------------------------------------------------------------------
# 1. Checkpoint
# ------------------------------------------------------------------------------------------------

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"

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
    "is_encoder_decoder": "encoders are not supported",
    "per_layer_config": "layers of different sizes are not supported",
    "quantization_config": "save the model with float weights: load it, `dequantize()`, save it",
    "transformers_weights": f"rename that file to {WEIGHTS}, and remove this entry",
}
SETTINGS_NOT_HONOURED: dict[str, Any] = {  # of generation, each with the value of no effect
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "constraints": None,
    "dola_layers": None,
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


def find_checkpoint(source: str) -> tuple[str, list[str]]:
    """The folder of a checkpoint and the paths of its .safetensors files."""
    if os.path.isfile(source):
        return find_by_file(os.path.dirname(source) or ".", source)
    refuse_adapter(os.path.join(source, "adapter_config.json"))
    single = os.path.join(source, WEIGHTS)
    index = os.path.join(source, WEIGHTS_INDEX)
    if os.path.isfile(single):
        return source, [single]
    if os.path.exists(index):
        return source, shard_paths(source, index)
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        refuse_adapter(os.path.join(source, name))
    advice = "name the folder that contains it"
    if os.path.exists(os.path.join(source, "pytorch_model.bin")):
        advice = (
            "pytorch_model.bin is a pickle, and reading a pickle can run any code; "
            "save the model again with safe_serialization=True"
        )
    raise tinygpt2.FormatError(
        single, "checkpoint", "model.safetensors or its index", "neither", advice
    )


def find_by_file(folder: str, source: str) -> tuple[str, list[str]]:
    """The files of a checkpoint that is named by its file: the weights, or the index of shards."""
    name = os.path.basename(source)
    if name.endswith(".safetensors.index.json"):
        return folder, shard_paths(folder, source)
    if name.startswith("adapter_model."):
        refuse_adapter(source)
    shard = re.search(r"-([0-9]{5})-of-([0-9]{5})\.safetensors$", name)
    if shard and shard[2] != "00001":
        found, advice = f"shard {int(shard[1])} of {int(shard[2])}", "name the folder or the index"
        raise tinygpt2.FormatError(source, "checkpoint", "all weights of a model", found, advice)
    return folder, [source]


def refuse_adapter(path: str) -> None:
    """An adapter (PEFT) changes the model that it lies beside, or is a part of one."""
    if os.path.exists(path):
        advice = "merge it first: `model.merge_and_unload().save_pretrained(folder)`"
        raise tinygpt2.FormatError(path, "checkpoint", "a whole model", "a PEFT adapter", advice)


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
    with contextlib.closing(tinygpt2.map_file(path)) as file:
        size, limit = len(file), tinygpt2.MAX_HEADER
        if size > limit:
            raise tinygpt2.FormatError(path, "size", f"at most {limit} bytes", str(size))
        return tinygpt2.parse_json_object(path, "content", file[:])


def checkpoint_config(folder: str, vocabulary: Vocabulary | None) -> tinygpt2.Config:
    """The configuration that transformers reads from a folder; other architectures are refused."""
    path = os.path.join(folder, "config.json")
    content = read_json(path)
    refuse_other_architectures(path, content)
    values = model_values(path, content)
    values.update(generation_values(folder, content, values["vocab_size"]))
    values.update(vocabulary_config(vocabulary))
    refuse_small_vocabulary(path, values["vocab_size"], vocabulary)
    return tinygpt2.check_config(path, values)


def refuse_other_architectures(path: str, content: dict[str, Any]) -> None:
    """Refuse models that have GPT-2's tensors and compute something else with them."""
    kind = content.get("model_type", "gpt2")
    if kind != "gpt2":
        advice = "only models with GPT-2's architecture are supported"
        raise tinygpt2.FormatError(path, "model_type", "'gpt2'", tinygpt2.quote(kind), advice)
    for name, advice in UNSUPPORTED.items():
        value = content.get(name)
        if value is not None and value is not False:
            raise tinygpt2.FormatError(path, name, "none", tinygpt2.quote(value), advice)


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
        tinygpt2.note(f"{path}: {names}: generation here does not have these settings")


def vocabulary_config(vocabulary: Vocabulary | None) -> dict[str, Any]:
    """The part of the configuration that describes the tokenizer."""
    return {
        "n_merges": len(vocabulary.merges) if vocabulary else None,
        "n_token_bytes": sum(map(len, vocabulary.tokens.values())) if vocabulary else 0,
        "special_tokens": vocabulary.special if vocabulary else {},
        "add_prefix_space": vocabulary.add_prefix_space if vocabulary else False,
        "pre_tokenizer": tinygpt2.PRE_TOKENIZER,
    }


def is_beyond(token: object, vocab_size: object) -> bool:
    """Whether both are counts, and the token is not in a vocabulary of that size."""
    both = tinygpt2.is_count(token) and tinygpt2.is_count(vocab_size)
    return both and token >= vocab_size  # type: ignore[operator]


def refuse_small_vocabulary(path: str, vocab_size: object, vocabulary: Vocabulary | None) -> None:
    """Refuse a tokenizer with a token that the model has no embedding for."""
    last = max(vocabulary.tokens, default=0) if vocabulary else 0
    if vocabulary and vocab_size != 0 and is_beyond(last, vocab_size):
        expected = f"at least {last + 1}, because the tokenizer has a token {last}"
        advice = "the tokenizer and config.json do not belong together"
        raise tinygpt2.FormatError(path, "vocab_size", expected, str(vocab_size), advice)


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

    def transposed(self) -> Weights:
        return self._replace(shape=self.shape[::-1], read=lambda: self.read().T)


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
# 3. Tokenizer
# ------------------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
)

Merges = dict[tuple[int, int], tuple[int, int]]  # (left, right) -> (rank, result)


class Vocabulary(NamedTuple):
    """A tokenizer as it is in its files."""

    tokens: dict[int, bytes]
    merges: Merges
    special: dict[str, int]
    add_prefix_space: bool


def vocabulary_tables(config: tinygpt2.Config, vocabulary: Vocabulary) -> Iterator[bytes]:
    """The tensors that `tinygpt2.Tokenizer` reads, in the layout's order, padded with zeros."""
    words = [vocabulary.tokens.get(token, b"") for token in range(config.vocab_size)]
    offsets = [0]
    for word in words:
        offsets.append(offsets[-1] + len(word))
    # In descending order of ids, so that the lowest of several tokens of one byte is kept.
    byte_ids = {word: token for token, word in reversed(list(enumerate(words))) if len(word) == 1}
    alphabet = [byte_ids.get(bytes([byte]), tinygpt2.NO_TOKEN) for byte in range(256)]
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


def read_vocabulary(folder: str) -> Vocabulary | None:
    """The byte-level BPE in a checkpoint's folder, or None if there is no tokenizer at all."""
    tokenizer, vocab, merges = (
        os.path.join(folder, name) for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    if os.path.exists(tokenizer):
        return read_tokenizer_json(tokenizer)
    if os.path.exists(vocab) and os.path.exists(merges):
        return read_vocabulary_files(folder, vocab, merges)
    refuse_other_tokenizers(folder)
    return None


def refuse_other_tokenizers(folder: str) -> None:
    """Refuse an incomplete or unknown tokenizer, rather than convert the model without it."""
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            expected = "a byte-level BPE (vocab.json with merges.txt, or tokenizer.json)"
            advice = "add the missing file, or remove this one to convert without a tokenizer"
            raise tinygpt2.FormatError(path, "tokenizer", expected, f"only {name}", advice)


def read_vocabulary_files(folder: str, vocab: str, merges: str) -> Vocabulary:
    """The files of GPT-2's own release and of transformers' slow tokenizers."""
    ids = checked_ids(vocab, read_json(vocab))
    ranks = number_merges(merges, ids, merge_lines(merges))
    path = os.path.join(folder, "tokenizer_config.json")
    options = optional_json(path)
    kind = options.get("tokenizer_class", "GPT2Tokenizer")
    if kind not in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        found = tinygpt2.quote(kind)
        raise tinygpt2.FormatError(path, "tokenizer_class", "GPT2Tokenizer", found)
    prefix = options.get("add_prefix_space") is True
    return build_vocabulary(vocab, ids, ranks, added_tokens(folder), prefix)


def optional_json(path: str) -> dict[str, Any]:
    return read_json(path) if os.path.exists(path) else {}


def checked_ids(path: str, values: dict[str, Any]) -> dict[str, int]:
    """Texts with their token ids, after a check of every id."""
    for text, token in values.items():
        if not tinygpt2.is_token(token, tinygpt2.SIZE_LIMITS["vocab_size"]):
            field = f"token {tinygpt2.quote(text)}"
            raise tinygpt2.FormatError(path, field, "a token id", tinygpt2.quote(token))
    return values


def text_of(entry: dict[str, Any]) -> str:
    """The text of an added token."""
    if not isinstance(entry["content"], str):
        raise TypeError
    return str(entry["content"])


def added_tokens(folder: str) -> dict[str, int]:
    """Tokens that are not in vocab.json, from the older file for them and from the newer one."""
    older = os.path.join(folder, "added_tokens.json")
    path = os.path.join(folder, "tokenizer_config.json")
    decoder = optional_json(path).get("added_tokens_decoder", {})
    try:
        newer = {text_of(entry): int(key) for key, entry in decoder.items()}
    except (TypeError, ValueError, KeyError, AttributeError):
        found = tinygpt2.quote(decoder)
        raise tinygpt2.FormatError(
            path, "added_tokens_decoder", "token ids with contents", found
        ) from None
    return {**checked_ids(older, optional_json(older)), **checked_ids(path, newer)}


def merge_lines(path: str) -> list[str]:
    """The merges in merges.txt, the most important first."""
    with contextlib.closing(tinygpt2.map_file(path)) as file:
        try:
            lines = file[:].decode("utf-8").replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError as error:
            raise tinygpt2.FormatError(path, "content", "UTF-8", str(error)) from None
    return [line for line in lines if line and not line.startswith("#version")]


def read_tokenizer_json(path: str) -> Vocabulary:
    """The single file of transformers' fast tokenizers. Only GPT-2's kind is accepted."""
    data = read_json(path)
    model = byte_level_model(path, data)
    prefix = byte_level_cutter(path, data).get("add_prefix_space") is True
    refuse_other_steps(path, data.get("normalizer"), model)
    try:
        added = {text_of(entry): entry["id"] for entry in data.get("added_tokens") or ()}
        lines = [line if isinstance(line, str) else " ".join(line) for line in model["merges"]]
    except (TypeError, KeyError):
        found = "entries of another form"
        raise tinygpt2.FormatError(path, "content", "added_tokens and merges", found) from None
    ids = checked_ids(path, model["vocab"])
    ranks = number_merges(path, ids, lines)
    return build_vocabulary(path, ids, ranks, checked_ids(path, added), prefix)


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


def refuse_other_steps(path: str, normalizer: object, model: dict[str, Any]) -> None:
    """Refuse options that make the tokens of a text differ from GPT-2's."""
    known = ("type", "vocab", "merges", "unk_token", "fuse_unk")
    for name, value in [("normalizer", normalizer), *model.items()]:
        if name not in known and value:
            found, advice = tinygpt2.quote(value), "GPT-2's tokenizer has no such step"
            raise tinygpt2.FormatError(path, name, "none", found, advice)


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


def build_vocabulary(
    path: str, ids: dict[str, int], merges: Merges, special: dict[str, int], prefix: bool
) -> Vocabulary:
    """The vocabulary in bytes. Special tokens are plain text, the others byte-level letters."""
    if END_OF_TEXT in ids:
        special = {END_OF_TEXT: ids[END_OF_TEXT], **special}
    merged = {token for pair, (_, result) in merges.items() for token in (*pair, result)}
    alphabet = byte_alphabet()
    tokens = {token: text.encode("utf-8", "replace") for text, token in special.items()}
    for text, token in ids.items():
        if text in special:
            continue
        is_byte_level = set(text) <= alphabet.keys()
        if token in tokens:
            field = f"token {tinygpt2.quote(text)}"
            raise tinygpt2.FormatError(path, field, "an id of its own", str(token))
        if token in merged and not is_byte_level:
            field = f"token {tinygpt2.quote(text)}"
            raise tinygpt2.FormatError(path, field, "letters of byte-level BPE", "others")
        if is_byte_level:
            tokens[token] = bytes(alphabet[letter] for letter in text)
        else:
            tokens[token] = text.encode("utf-8", "replace")
    return Vocabulary(tokens, merges, special, prefix)


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


# ------------------------------------------------------------------------------------------------
# 4. Hub
# ------------------------------------------------------------------------------------------------

# For each file, a HEAD request asks for its size and hash. Then a GET request fetches the bytes
# that are not here yet, so that an interrupted download continues where it stopped.

HUB = "https://huggingface.co"
ATTEMPTS, PAUSE, TIMEOUT = 5, 0.4, 30  # tries; seconds before the second; seconds without data


class RemoteFile(NamedTuple):
    url: str
    size: int | None
    tag: str  # the SHA-256 of the content, its git hash, or another identifier of the server


def download(
    name: str, out: Path, revision: str = "main", progress: Progress | None = None
) -> None:
    """Download a checkpoint from the Hugging Face hub and convert it to a .tg2 file.

    Files in the hub's own cache are used from there. The environment variables HF_ENDPOINT,
    HF_TOKEN, HF_HUB_OFFLINE, HF_HOME and HF_HUB_CACHE have their usual meaning. The files of an
    interrupted download are kept beside `out`, and the next call resumes it. Raises
    `DownloadError`, or `FormatError` if the downloaded files are not a GPT-2.
    """
    target = tinygpt2.path_text(out, "out")
    check_names(name, revision)
    check_token()
    cached = cached_snapshot(name, revision)
    if cached:
        convert(cached, target, progress)
        return
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        found = "HF_HUB_OFFLINE is set, and the model is not in the hub's cache"
        raise tinygpt2.DownloadError(f"{name}: {found} (unset it, or fill the cache first)")
    label = f"{name}@{revision}".replace("/", "--")
    folder = f"{target}.{label}.download"
    fetched = fetch_into(folder, name, revision, progress)
    convert(folder, target, progress)
    with contextlib.suppress(OSError):
        for file in fetched:
            os.unlink(os.path.join(folder, file))
        os.rmdir(folder)


def check_names(name: object, revision: object) -> None:
    """Refuse names that could lead to another place in a URL or a file system."""
    word = r"\w[\w.-]*"
    if not is_name(name, rf"{word}(/{word})?"):
        found = tinygpt2.quote(name)
        raise tinygpt2.InputError(f"model name: expected 'gpt2' or 'owner/name', found {found}")
    if not is_name(revision, rf"{word}(/{word})*"):
        found = tinygpt2.quote(revision)
        raise tinygpt2.InputError(f"revision: expected a branch, tag or commit, found {found}")


def check_token() -> None:
    """Refuse an access token that cannot be sent, without showing it."""
    if not re.fullmatch("[!-~]*", os.environ.get("HF_TOKEN", "").strip()):
        raise tinygpt2.DownloadError("HF_TOKEN: expected visible ASCII characters, found others")


def is_name(value: object, pattern: str) -> bool:
    if not isinstance(value, str) or ".." in value:
        return False
    return re.fullmatch(pattern, value, re.ASCII) is not None


def fetch_into(folder: str, name: str, revision: str, progress: Progress | None) -> list[str]:
    """Fetch a checkpoint's files into a folder, which is made if needed; return their names."""
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    base = f"{endpoint}/{name}/resolve/{revision.replace('/', '%2F')}/"
    try:
        make_folder(folder)
        return fetch_checkpoint(base, folder, progress)
    except OSError as error:
        reason = error.strerror or error
        advice = f"the bytes that arrived are kept in {folder}; solve this and run it again"
        raise tinygpt2.DownloadError(f"{name}: {reason} ({advice})") from None


def make_folder(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except ValueError as error:  # a NUL, or a character that file names cannot have
        found = f"{tinygpt2.quote(folder)} ({error})"
        raise tinygpt2.InputError(f"out: expected a path, found {found}") from None


def cached_snapshot(name: str, revision: str) -> str | None:
    """The folder of a model in the hub's cache, if all its files are there."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    for owner in (name, "openai-community/" + name):  # the hub moved the first models there
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
    """Whether a folder contains all files that a conversion needs."""

    def has(name: str) -> bool:
        return os.path.exists(os.path.join(folder, name))

    has_tokenizer = has("tokenizer.json") or (has("vocab.json") and has("merges.txt"))
    if not has("config.json") or not has_tokenizer:
        return False
    with contextlib.suppress(tinygpt2.FormatError):
        return all(map(os.path.exists, find_checkpoint(folder)[1]))
    return False


def fetch_checkpoint(base: str, folder: str, progress: Progress | None) -> list[str]:
    """Fetch the files that `convert` needs: tokenizer, and weights in one file or in shards."""
    import urllib.parse

    fetched: list[str] = []

    def fetch(name: str, optional: bool = False) -> bool:
        url = base + urllib.parse.quote(name)
        found = fetch_file(url, os.path.join(folder, name), optional, progress)
        if found:
            fetched.append(name)
        return found

    fetch("config.json")
    for name in (GENERATION_CONFIG, "adapter_config.json"):
        fetch(name, optional=True)
    checkpoint_config(folder, None)  # refuses before it fetches the rest
    for name in TOKENIZER_FILES:
        fetch(name, optional=True)
    if not fetch(WEIGHTS, optional=True):
        fetch(WEIGHTS_INDEX)
        for shard in find_checkpoint(folder)[1]:
            fetch(os.path.basename(shard))
    return fetched


def fetch_file(url: str, path: str, optional: bool, progress: Progress | None) -> bool:
    """Fetch one file and check its size and hash; False if it is optional and does not exist."""
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
                found = "found another (the file was deleted; try again)"
                raise tinygpt2.DownloadError(f"{url}: expected the hash {remote.tag}, {found}")
            os.replace(part, path)
            return True
        except ConnectionError as error:
            failure = error
        except FileNotFoundError:
            if optional:
                with contextlib.suppress(OSError):
                    os.unlink(path)  # from another revision
                return False
            advice = "check the name; a private model needs HF_TOKEN"
            raise tinygpt2.DownloadError(f"{url}: there is no such file ({advice})") from None
    kept = f"{kept_bytes(path)} of {size or 'unknown'} bytes have arrived"
    advice = "run the same again to continue from there"
    raise tinygpt2.DownloadError(f"{url}: {failure} after {ATTEMPTS} attempts; {kept} ({advice})")


def kept_bytes(path: str) -> int:
    """The size of what an unfinished download of a file has left."""
    folder, name = os.path.split(path)
    parts = [e for e in os.listdir(folder) if e.startswith(name + ".") and e.endswith(".part")]
    return max((os.path.getsize(os.path.join(folder, part)) for part in parts), default=0)


@contextlib.contextmanager
def request(url: str, method: str, offset: int = 0) -> Iterator[Any]:
    """Open a URL, from a byte offset on.

    The token is sent to the hub's host only. Raises ConnectionError where another attempt may
    succeed, FileNotFoundError for a missing file, and DownloadError in all other cases.
    """
    import http.client
    import socket  # its `timeout` is TimeoutError only from Python 3.10 on
    import urllib.error
    import urllib.parse
    import urllib.request

    base = urllib.request.HTTPRedirectHandler

    def answer_or_follow(handler: Any, old: Any, body: Any, code: int, *rest: Any) -> Any:
        """Stop at the hub's redirect to its storage: its headers give the file's size and hash,
        and the storage may refuse HEAD requests."""
        if method == "HEAD" and rest[1].get("X-Linked-Etag"):
            return body
        return base.http_error_302(handler, old, body, code, *rest)

    def follow(handler: Any, old: Any, body: Any, code: int, *rest: Any) -> Any:
        """Keep the method, and remove the token where the redirect leads to another host."""
        new = base.redirect_request(handler, old, body, code, *rest)
        if new is not None:
            new.method = method
            if urllib.parse.urlsplit(rest[2])[:2] != urllib.parse.urlsplit(url)[:2]:
                new.remove_header("Authorization")
        return new

    names = [f"http_error_{code}" for code in (301, 302, 303, 307)]
    steps = {**dict.fromkeys(names, answer_or_follow), "redirect_request": follow}
    redirects = type("Redirects", (base,), steps)
    headers = {"User-Agent": f"tinygpt2/{tinygpt2.__version__}", "Accept-Encoding": "identity"}
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
        raise tinygpt2.DownloadError(f"{found} ({advice})") from None
    except (urllib.error.URLError, http.client.HTTPException, socket.timeout) as error:
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(f"no complete answer: {reason}") from None
    except ValueError as error:  # HF_ENDPOINT is not a URL
        raise tinygpt2.DownloadError(f"{url}: {error} (check HF_ENDPOINT)") from None


def ask(url: str) -> RemoteFile:
    """A file's size and hash."""
    with request(url, "HEAD") as response:
        headers = response.headers
        size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
        tag = headers.get("X-Linked-Etag") or headers.get("ETag") or "unknown"
    tag = tag[2:] if tag.startswith("W/") else tag
    return RemoteFile(url, int(size) if size.isdecimal() else None, tag.strip('"'))


def transfer(remote: RemoteFile, part: str, progress: Progress | None) -> None:
    """Fetch the bytes that `part` does not contain yet and append them."""
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
                if done > (remote.size or tinygpt2.MAX_HEADER):
                    found = f"more than the announced {remote.size} bytes arrived"
                    raise tinygpt2.DownloadError(f"{remote.url}: {found}")
                file.write(block)
                if progress and remote.size:
                    progress(os.path.basename(remote.url), done, remote.size)
    if remote.size is not None and done < remote.size:
        raise ConnectionError(f"the connection ended at {done} of {remote.size} bytes")


def matches(remote: RemoteFile, path: str) -> bool:
    """Whether a file has the server's size and hash: SHA-256 for large files, git's for small."""
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
