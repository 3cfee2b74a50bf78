"""Conversion: each kind of GPT-2 checkpoint becomes the right .tg2 file, others are refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    END,
    random_weights,
    read_safetensors,
    run_python,
    toy_tokenizer,
    write_checkpoint,
    write_safetensors,
)

import tinygpt2

# Sizes that fill no panel, so that an element in a wrong place has somewhere to go.
CONFIG = {
    "vocab_size": 270,
    "n_positions": 9,
    "n_embd": 6,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 19,
    "tie_word_embeddings": False,
}
Weights = dict[str, np.ndarray]


def stored_weights(path: Path) -> Weights:
    """The weights in a .tg2 file as a checkpoint has them: panels undone, padding cut off."""
    metadata, tensors = read_safetensors(path)
    config = json.loads(metadata["config"])
    lengths = {"c_attn": 3 * config["n_embd"], "c_fc": config["n_inner"]}
    lengths |= {"wte": config["vocab_size"], "lm_head": config["vocab_size"]}
    weights = {}
    for name, array in tensors.items():
        if name.startswith(("vocab.", "merges.")):
            continue
        length = lengths.get(name.split(".")[-2], config["n_embd"])
        if array.ndim == 3:
            matrix = np.empty((array.shape[1], 16 * array.shape[0]), np.float32)
            for i, panel in enumerate(array):
                matrix[:, 16 * i : 16 * (i + 1)] = panel
            weights[name] = matrix[:, :length] if name.startswith("h.") else matrix[:, :length].T
        else:
            weights[name] = array[..., :length]
    return weights


def assert_same_bits(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Random weights, with numbers among them that a detour through arithmetic would change."""
    weights = random_weights(CONFIG)
    weights["wte.weight"][7] = [0.0, -0.0, np.inf, -np.inf, np.nan, 6e-8]
    return weights


def convert(folder: Path) -> Path:
    out = folder.parent / "out.tg2"
    tinygpt2.convert(folder, out)
    return out


# What is stored


def test_float32(tmp_path: Path, weights: Weights) -> None:
    out = convert(write_checkpoint(tmp_path / "f32", CONFIG, weights))
    assert_same_bits(stored_weights(out), weights)


def test_float16(tmp_path: Path, weights: Weights) -> None:
    halves = {name: array.astype(np.float16) for name, array in weights.items()}
    out = convert(write_checkpoint(tmp_path / "f16", CONFIG, halves))
    expected = {name: array.astype(np.float32) for name, array in halves.items()}
    assert_same_bits(stored_weights(out), expected)


def test_bfloat16(tmp_path: Path, weights: Weights) -> None:
    """The upper half of a float32's bits."""
    bits = {name: array.view(np.uint32) >> 16 for name, array in weights.items()}
    uppers = {name: array.astype(np.uint16) for name, array in bits.items()}
    out = convert(write_checkpoint(tmp_path / "bf16", CONFIG, uppers))
    expected = {name: (array << 16).view(np.float32) for name, array in bits.items()}
    assert_same_bits(stored_weights(out), expected)


def test_types_may_be_mixed(tmp_path: Path, weights: Weights) -> None:
    mixed = {**weights, "ln_f.bias": np.arange(6, dtype=np.float16)}
    out = convert(write_checkpoint(tmp_path / "mixed", CONFIG, mixed))
    assert_same_bits(stored_weights(out), {**weights, "ln_f.bias": np.arange(6, dtype=np.float32)})


def test_tied_head_is_stored_once(tmp_path: Path, weights: Weights) -> None:
    """Some checkpoints of tied models hold the head's matrix too, with the same numbers."""
    tied = {**CONFIG, "tie_word_embeddings": True}
    expected = {name: array for name, array in weights.items() if name != "lm_head.weight"}
    both = {**weights, "lm_head.weight": weights["wte.weight"]}
    out = convert(write_checkpoint(tmp_path / "tied", tied, both))
    assert_same_bits(stored_weights(out), expected)


@pytest.mark.parametrize(
    "name", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "ln_1", "h.", "ln_", ""]
)
def test_missing_biases_are_zeros(tmp_path: Path, weights: Weights, name: str) -> None:
    def is_gone(tensor: str) -> bool:
        return name in tensor and tensor.endswith(".bias")

    some = {tensor: array for tensor, array in weights.items() if not is_gone(tensor)}
    assert len(some) < len(weights)
    out = convert(write_checkpoint(tmp_path / "some", CONFIG, some))
    expected = {t: np.zeros_like(array) if is_gone(t) else array for t, array in weights.items()}
    assert_same_bits(stored_weights(out), expected)


# The same checkpoint in other forms must become the same file, byte for byte.


def prefixed(weights: Weights) -> Weights:
    """As GPT2LMHeadModel names them."""
    heads = ("lm_head.weight",)
    return {n if n in heads else f"transformer.{n}": array for n, array in weights.items()}


def write_prefixed(folder: Path, weights: Weights) -> None:
    write_checkpoint(folder, CONFIG, prefixed(weights))


def write_half_prefixed(folder: Path, weights: Weights) -> None:
    half = {n: array for n, array in weights.items() if n.startswith("h.1.")}
    rest = {n: array for n, array in weights.items() if n not in half}
    write_checkpoint(folder, CONFIG, {**prefixed(half), **rest})


def write_reversed(folder: Path, weights: Weights) -> None:
    write_checkpoint(folder, CONFIG, dict(reversed(weights.items())))


def write_with_masks(folder: Path, weights: Weights) -> None:
    """Old checkpoints hold the causal mask of every layer."""
    mask = np.tril(np.ones((1, 1, 9, 9), bool))
    masks: Weights = {f"h.{i}.attn.bias": mask for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": np.array([-1e4], np.float32) for i in range(2)}
    write_checkpoint(folder, CONFIG, {**masks, **weights})


def write_shards(folder: Path, weights: Weights, n_shards: int = 3) -> None:
    """Shards with an index as transformers writes them, each with every third tensor."""
    write_checkpoint(folder, CONFIG, {})
    (folder / "model.safetensors").unlink()
    named = list(prefixed(weights).items())
    places = {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        write_safetensors(folder / shard, dict(named[i::n_shards]))
        places.update(dict.fromkeys(dict(named[i::n_shards]), shard))
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def write_with_crlf(folder: Path, weights: Weights) -> None:
    write_checkpoint(folder, CONFIG, weights)
    merges = folder / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))


def tokenizer_json(pairs: bool = False) -> dict[str, Any]:
    """The tests' tokenizer as fast tokenizers store it, merges as pairs since tokenizers 0.20."""
    vocab, merges = toy_tokenizer()
    added = {"id": vocab[END], "content": END, "special": True, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": {"type": "ByteLevel", "trim_offsets": False},
        "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [line.split(" ") for line in merges] if pairs else merges,
        },
    }


def write_tokenizer_json(folder: Path, content: object) -> None:
    """In the place of vocab.json and merges.txt."""
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")


def write_fast_tokenizer(folder: Path, weights: Weights) -> None:
    write_checkpoint(folder, CONFIG, weights)
    write_tokenizer_json(folder, tokenizer_json())


def write_newer_fast_tokenizer(folder: Path, weights: Weights) -> None:
    write_checkpoint(folder, CONFIG, weights)
    content = tokenizer_json(pairs=True)
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]}
    write_tokenizer_json(folder, content)


@pytest.mark.parametrize(
    "write",
    [
        write_prefixed,
        write_half_prefixed,
        write_reversed,
        write_with_masks,
        write_shards,
        write_with_crlf,
        write_fast_tokenizer,
        write_newer_fast_tokenizer,
    ],
)
def test_other_forms(
    tmp_path: Path, weights: Weights, write: Callable[[Path, Weights], None]
) -> None:
    plain = convert(write_checkpoint(tmp_path / "plain", CONFIG, weights)).read_bytes()
    write(tmp_path / "form", weights)
    assert convert(tmp_path / "form").read_bytes() == plain


def test_file_beside_its_config(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "plain", CONFIG, weights)
    plain = convert(folder).read_bytes()
    (folder / "model.safetensors").rename(folder / "epoch-3.safetensors")
    tinygpt2.convert(folder / "epoch-3.safetensors", tmp_path / "by-path.tg2")
    monkeypatch.chdir(folder)
    tinygpt2.convert("epoch-3.safetensors", "by-name.tg2")
    assert (tmp_path / "by-path.tg2").read_bytes() == plain
    assert (folder / "by-name.tg2").read_bytes() == plain


def test_conversion_is_reproducible(tmp_path: Path, weights: Weights) -> None:
    folder = write_checkpoint(tmp_path / "plain", CONFIG, weights)
    assert convert(folder).read_bytes() == convert(folder).read_bytes()


def test_progress_is_told(tmp_path: Path, weights: Weights) -> None:
    folder, told = write_checkpoint(tmp_path / "plain", CONFIG, weights), []
    out = tmp_path / "out.tg2"
    tinygpt2.convert(folder, out, lambda label, done, total: told.append((label, done, total)))
    assert {label for label, _, _ in told} == {"writing"}
    assert {total for _, _, total in told} == {out.stat().st_size}
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert told[-1][1] == out.stat().st_size


# The configuration


def converted_config(folder: Path) -> tinygpt2.Config:
    with tinygpt2.load(convert(folder)) as model:
        return model.config


GPT2_CONFIG: dict[str, Any] = {  # of GPT-2 124M, whose config.json may be empty
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": 3072,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_ids": (),  # transformers takes end tokens only from what the files say
    "n_merges": None,
    "n_token_bytes": 0,
    "added_tokens": (),
    "tokens_before": (),
    "tokens_after": (),
    "add_prefix_space": False,
    "pre_tokenizer": "gpt2",
    "generation": {},
}


def test_defaults_are_those_of_gpt2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    config = tinygpt2.load_companion("convert").checkpoint_config(str(tmp_path))
    assert config == tinygpt2.Config(**GPT2_CONFIG)


@pytest.mark.slow
def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    theirs = transformers.GPT2Config().to_dict()
    defaults = tinygpt2.load_companion("convert").GPT2_DEFAULTS
    assert {name: theirs[name] for name in defaults} == defaults


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("vocab_size", {}, 50257),
        ("n_positions", {}, 1024),
        ("n_embd", {"n_inner": 2}, 768),
        ("n_layer", {}, 12),
        ("n_head", {"n_embd": 12}, 12),
        ("n_inner", {}, 16),
        ("activation_function", {}, "gelu_new"),
        ("layer_norm_epsilon", {}, 1e-5),
        ("scale_attn_weights", {}, True),
        ("scale_attn_by_inverse_layer_idx", {}, False),
        ("tie_word_embeddings", {}, True),
    ],
)
def test_a_value_that_is_left_out(
    tmp_path: Path, name: str, sizes: dict[str, int], expected: object
) -> None:
    """The weights have the default's shapes, and only config.json lacks the value."""
    given = {"vocab_size": 11, "n_positions": 3, "n_embd": 4, "n_layer": 1, "n_head": 2, **sizes}
    given.pop(name, None)
    weights = random_weights({**given, name: expected})
    folder = write_checkpoint(tmp_path / "m", given, weights, tokenizer=False)
    (folder / "config.json").write_text(json.dumps(given), "utf-8")
    config = converted_config(folder)
    assert getattr(config, name) == expected
    assert {other: getattr(config, other) for other in given} == given


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("activation_function", "relu", "relu"),
        ("activation_function", "gelu", "gelu"),
        ("activation_function", "gelu_python", "gelu"),
        ("activation_function", "gelu_pytorch_tanh", "gelu_new"),
        ("activation_function", "gelu_fast", "gelu_new"),
        ("layer_norm_epsilon", 0, 0.0),
        ("layer_norm_epsilon", 1e-12, 1e-12),
        ("scale_attn_weights", False, False),
        ("scale_attn_by_inverse_layer_idx", True, True),
        ("bos_token_id", None, None),
        ("bos_token_id", 3, 3),
        ("bos_token_id", 269, 269),
        ("bos_token_id", 270, None),
        ("bos_token_id", -1, None),
    ],
)
def test_configuration_is_kept(
    tmp_path: Path, weights: Weights, name: str, value: object, expected: object
) -> None:
    config = converted_config(write_checkpoint(tmp_path / "m", {**CONFIG, name: value}, weights))
    assert getattr(config, name) == expected
    assert type(getattr(config, name)) is type(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ()),
        (-1, ()),
        ([264, -1], (264,)),
        (0, (0,)),
        (269, (269,)),
        (270, ()),
        ([], ()),
        ([264], (264,)),
        ([264, 3], (264, 3)),
        ([50256, 264, 270, 3, 264, 3], (264, 3)),
        ([50256], ()),
    ],
    ids=str,
)
def test_end_tokens(
    tmp_path: Path, weights: Weights, value: object, expected: tuple[int, ...]
) -> None:
    """One or several; ids beyond the vocabulary are left out, and each is kept once."""
    folder = write_checkpoint(tmp_path / "m", {**CONFIG, "eos_token_id": value}, weights)
    assert converted_config(folder).eos_token_ids == expected
    metadata, _ = read_safetensors(tmp_path / "out.tg2")
    config = json.loads(metadata["config"])
    assert config["eos_token_ids"] == list(expected)
    assert "eos_token_id" not in config


# The tokenizer


def test_without_a_tokenizer(tmp_path: Path, weights: Weights) -> None:
    out = convert(write_checkpoint(tmp_path / "ids", CONFIG, weights, tokenizer=False))
    assert_same_bits(stored_weights(out), weights)
    with tinygpt2.load(out) as model:
        assert model.tokenizer is None
        with pytest.raises(tinygpt2.InputError, match="no tokenizer inside"):
            model.encode("the")


def test_special_tokens_of_slow_tokenizers(tmp_path: Path, weights: Weights) -> None:
    folder = write_checkpoint(tmp_path / "m", CONFIG, weights)
    decoder = {"265": {"content": "<|user|>", "special": True}}
    options = {"add_prefix_space": True, "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(options), "utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 266}), "utf-8")
    with tinygpt2.load(convert(folder)) as model:
        vocab = toy_tokenizer()[0]
        # added_tokens.json does not count beside added_tokens_decoder, as in transformers 5.
        assert {token.text: token.id for token in model.config.added_tokens} == {
            **{END: vocab[END], "<|user|>": 265}
        }
        assert model.encode("the<|user|>", special=True) == [vocab["Ġthe"], 265]
        assert model.decode([265, vocab["he"]]) == "<|user|>he"


def test_tokens_and_merges_are_right(tmp_path: Path, weights: Weights) -> None:
    """Tokens worked out by hand: `th e` goes before `Ġ the`, and `Ã ©` joins the bytes of é."""
    vocab = toy_tokenizer()[0]
    expected = ["the", "Ġthe", "in", "in", "Ġ", "Ã©", "!"]
    with tinygpt2.load(convert(write_checkpoint(tmp_path / "m", CONFIG, weights))) as model:
        ids = model.encode("the theinin é!")
        assert ids == [vocab[word] for word in expected]
        assert [model.decode([i]) for i in ids] == ["the", " the", "in", "in", " ", "é", "!"]
        assert model.encode(END, special=True) == [vocab[END]]
        assert len(model.encode(END)) > 1
        assert model.decode(model.encode(END)) == END


# What is refused: a good checkpoint folder is spoilt, and the error must name the file and field.

Spoil = Callable[[Path], object]


def config_with(**values: object) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, **values}), "utf-8")

    return spoil


def text(name: str, content: str | bytes) -> Spoil:
    """Another content of one of the files."""
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def without(*names: str) -> Spoil:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def weights_with(change: Callable[[Weights], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        weights = read_safetensors(folder / "model.safetensors")[1]
        change(weights)
        write_safetensors(folder / "model.safetensors", weights)

    return spoil


def tensor(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Another tensor in the place of one."""
    return weights_with(lambda weights: weights.update({name: make(weights[name])}))


def more(name: str, shape: tuple[int, ...] = (6,)) -> Spoil:
    return weights_with(lambda weights: weights.update({name: np.zeros(shape, np.float32)}))


def lacking(name: str) -> Spoil:
    return weights_with(lambda weights: weights.pop(name))


def cut_off(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def shard_map(places: object) -> Spoil:
    """An index in the place of the weights."""

    def spoil(folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", folder / "shard.safetensors")
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {} if places is None else {"weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")

    return spoil


def fast(**changes: object) -> Spoil:
    """A tokenizer.json with other parts, all of which count for this class of tokenizers."""
    options = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})

    def spoil(folder: Path) -> None:
        write_tokenizer_json(folder, {**tokenizer_json(), **changes})
        (folder / "tokenizer_config.json").write_text(options, "utf-8")

    return spoil


def fast_model(**changes: object) -> Spoil:
    return fast(model={**tokenizer_json()["model"], **changes})


def vocabulary(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        vocab: dict[str, Any] = toy_tokenizer()[0]
        change(vocab)
        (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")

    return spoil


def word(name: str, value: object) -> Spoil:
    return vocabulary(lambda vocab: vocab.update({name: value}))


def decoder(value: object) -> Spoil:
    return text("tokenizer_config.json", json.dumps({"added_tokens_decoder": value}))


CUTTER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated"}
WORDPIECE = {"type": "WordPiece", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
INDEX = "model.safetensors.index.json"
BAD_TOKENS: list[object] = [1.0, True, "264", {}, [264, None], [True], [[264]]]
REFUSALS: dict[str, tuple[Spoil, str, str]] = {
    "config is not JSON": (text("config.json", "{"), "config.json", "content"),
    "config is a list": (text("config.json", "[]"), "config.json", "content"),
    "config with NaN": (text("config.json", '{"a":NaN}'), "config.json", "content"),
    "config is not UTF-8": (text("config.json", b'{"\xff":1}'), "config.json", "content"),
    "llama": (config_with(model_type="llama"), "config.json", "model_type"),
    "model type null": (config_with(model_type=None), "config.json", "model_type"),
    "cross attention": (
        config_with(add_cross_attention=True),
        "config.json",
        "add_cross_attention",
    ),
    **{
        f"{name} {str(value)[:70]}": (config_with(**{name: value}), "config.json", f"config {name}")
        for name, value in [
            ("activation_function", "silu"),
            ("activation_function", "quick_gelu"),
            ("activation_function", None),
            ("activation_function", ["gelu"]),
            ("n_head", 4),
            ("n_head", 0),
            ("n_embd", None),
            ("n_embd", "6"),
            ("n_embd", -6),
            ("n_layer", 2.0),
            ("n_layer", 10**6),
            ("n_inner", 0),
            ("vocab_size", True),
            ("layer_norm_epsilon", "1e-5"),
            ("layer_norm_epsilon", None),
            ("layer_norm_epsilon", 1),
            ("layer_norm_epsilon", False),
            ("layer_norm_epsilon", 10**400),
            ("scale_attn_weights", 1),
            ("tie_word_embeddings", None),
            ("n_embd", 131_073),
            ("n_positions", 2**24 + 1),
        ]
    },
    **{
        f"eos_token_id {value}": (config_with(eos_token_id=value), "config.json", "eos_token_id")
        for value in BAD_TOKENS
    },
    **{
        f"bos_token_id {value}": (config_with(bos_token_id=value), "config.json", "bos_token_id")
        for value in [*BAD_TOKENS, [264]]
    },
    "weights cut off": (cut_off, "model.safetensors", "file size"),
    "weights empty": (text("model.safetensors", ""), "model.safetensors", "file"),
    **{
        f"{name} lacking": (lacking(name), "model.safetensors", f"tensor {name}")
        for name in random_weights(CONFIG)
        if not name.endswith(".bias")
    },
    **{
        f"{name} of another shape": (tensor(name, make), "model.safetensors", f"tensor {name}")
        for name, make in [
            ("h.0.attn.c_attn.weight", lambda w: w.T),
            ("h.0.attn.c_attn.bias", lambda b: b[:6]),
            ("h.1.mlp.c_fc.bias", lambda b: b[None]),
            ("wte.weight", lambda w: w[:-1]),
            ("wpe.weight", lambda w: w.T),
            ("lm_head.weight", lambda w: w.reshape(-1)),
            ("ln_f.weight", lambda w: w[:0]),
        ]
    },
    **{
        f"{name} as {dtype}": (
            tensor(name, lambda w, dtype=dtype: np.zeros(w.shape, dtype)),  # type: ignore[misc]
            "model.safetensors",
            f"tensor {name}",
        )
        for name, dtype in [
            ("h.1.mlp.c_fc.weight", "i1"),
            ("wte.weight", "u1"),
            ("ln_f.bias", "u4"),
        ]
    },
    **{
        name: (more(name), "model.safetensors", f"tensor '{name}'")
        for name in [
            *("h.0.adapter.weight", "h.0.attn.c_attn.lora_A.weight", "h.1.crossattention.q.weight"),
            *("transformer.h.0.ln_3.bias", "transformer.ln_f.bias", "h.00.ln_1.bias"),
            "lm_head.bias",
        ]
    },
    "index without a map": (shard_map(None), INDEX, "weight_map"),
    "empty map": (shard_map({}), INDEX, "weight_map"),
    "map is a list": (shard_map(["a"]), INDEX, "weight_map"),
    "map of numbers": (shard_map({"wte.weight": 1}), INDEX, "weight_map"),
    "shard above": (shard_map({"wte.weight": "../outside.safetensors"}), INDEX, "weight_map"),
    "shard below": (shard_map({"wte.weight": "a/shard.safetensors"}), INDEX, "weight_map"),
    "shard at the root": (shard_map({"wte.weight": "/etc/passwd"}), INDEX, "weight_map"),
    "shard is a folder": (
        shard_map({"wte.weight": ".."}),
        "model.safetensors.index.json",
        "weight_map",
    ),
    "shard missing": (shard_map({"wte.weight": "b.safetensors"}), "b.safetensors", "file"),
    "shard with NUL": (shard_map({"wte.weight": "b\0"}), "b\0", "file"),
    "WordPiece": (fast(model=WORDPIECE), "tokenizer.json", "model type"),
    "Unigram": (fast(model={"type": "Unigram", "vocab": []}), "tokenizer.json", "model type"),
    "BPE in name only": (fast_model(type="WordPiece"), "tokenizer.json", "model type"),
    "no tokenizer model": (fast(model=None), "tokenizer.json", "model type"),
    **{
        f"pre-tokenizer {str(value)[:70]}": (
            fast(pre_tokenizer=value),
            "tokenizer.json",
            "pre_tokenizer",
        )
        for value in [
            *(None, "ByteLevel", {"type": "Whitespace"}, {"type": "Metaspace"}, SPLIT, CUTTER),
            {"type": "Sequence", "pretokenizers": [SPLIT, CUTTER]},
            *(
                {"type": "Sequence", "pretokenizers": value}
                for value in ([], [3], 3, "a", {"a": 1})
            ),
        ]
    },
    "normalizer": (fast(normalizer={"type": "NFC"}), "tokenizer.json", "normalizer"),
    **{
        name: (fast_model(**{name: value}), "tokenizer.json", name)
        for name, value in {
            "byte_fallback": True,
            "ignore_merges": True,
            "dropout": 0.1,
            "continuing_subword_prefix": "##",
            "end_of_word_suffix": "</w>",
        }.items()
    },
    **{
        f"merges {str(value)[:70]}": (fast_model(merges=value), "tokenizer.json", field)
        for value, field in [
            (None, "merges"),
            ([5], "merges"),
            ([None], "merges"),
            ([["t", 5]], "merges"),
            (["t h", "t"], "merge 1"),
            ([["t", "h", "e"]], "merge 0"),
            (["t q"], "merge 0"),
        ]
    },
    **{
        f"added {str(value)[:70]}": (fast(added_tokens=value), "tokenizer.json", field)
        for value, field in [
            (5, "added_tokens"),
            (["x"], "added_tokens"),
            ([{"id": 3}], "added_tokens"),
            ([{"content": ["x"], "id": 3}], "added_tokens"),
            ([{"content": 5, "id": 3}], "added_tokens"),
            ([{"content": None, "id": 3}], "added_tokens"),
            ([{"content": "x", "id": 3, "lstrip": 1}], "added_tokens"),
            ([{"content": "x", "id": -3}], "added_tokens id"),
            ([{"content": "x", "id": "3"}], "added_tokens id"),
        ]
    },
    **{
        f"fast vocabulary {value}": (fast_model(vocab=value, merges=[]), "tokenizer.json", "vocab")
        for value in (None, [], ["a"], "a")
    },
    "unknown left": (text("merges.txt", "#version: 0.2\nt h\nq~ h\n"), "merges.txt", "merge 1"),
    "unknown result": (text("merges.txt", "q q\n"), "merges.txt", "merge 0"),
    "merge of one": (text("merges.txt", "#version: 0.2\nth\n"), "merges.txt", "merge 0"),
    "merges not UTF-8": (text("merges.txt", b"t h\n\xff e\n"), "merges.txt", "content"),
    "vocabulary is a list": (text("vocab.json", "[]"), "vocab.json", "content"),
    **{
        f"id {str(value)[:70]}": (word("x", value), "vocab.json", "token 'x'")
        for value in (-1, None, "5", 1.5, True, [5], 2**64)
    },
    "the same id twice": (word("new", 3), "vocab.json", "token 'new'"),
    "letter of no byte": (word("th\u3042", 270), "vocab.json", "vocabulary"),
    "tokens beyond the vocabulary": (word("new", 270), "vocab.json", "vocabulary"),
    "END beyond the vocabulary": (word(END, 270), "vocab.json", "vocabulary"),
    "vocabulary too small": (config_with(vocab_size=200), "vocab.json", "vocabulary"),
    "decoder is a list": (decoder([1]), "tokenizer_config.json", "added_tokens_decoder"),
    "decoder without content": (
        decoder({"1": {}}),
        "tokenizer_config.json",
        "added_tokens_decoder",
    ),
    "decoder of names": (
        decoder({"a": {"content": "x"}}),
        "tokenizer_config.json",
        "added_tokens_decoder",
    ),
    "decoder of numbers": (
        decoder({"265": {"content": 5}}),
        "tokenizer_config.json",
        "added_tokens_decoder",
    ),
    "vocabulary alone": (without("merges.txt"), "vocab.json", "tokenizer"),
    "merges alone": (without("vocab.json"), "merges.txt", "tokenizer"),
}


@pytest.mark.table
@pytest.mark.parametrize(("spoil", "name", "field"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refused(tmp_path: Path, weights: Weights, spoil: Spoil, name: str, field: str) -> None:
    folder = write_checkpoint(tmp_path / "m", CONFIG, weights)
    spoil(folder)
    (tmp_path / "old.tg2").write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    for out in ("old.tg2", "new.tg2"):
        with pytest.raises(tinygpt2.FormatError) as caught:
            tinygpt2.convert(folder, tmp_path / out)
        error, message = caught.value, str(caught.value)
        assert (error.path, error.field) == (f"{folder}/{name}", field), message
        assert f": {field}: expected " in message
        assert "\x00" not in message
        assert ", found " in message
        assert len(message) < len(error.path) + 400
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old.tg2").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "vocab.txt"])
def test_other_tokenizers_are_not_overlooked(tmp_path: Path, weights: Weights, name: str) -> None:
    """A model whose tokenizer cannot be read must not pass for one without a tokenizer."""
    folder = write_checkpoint(tmp_path / "m", CONFIG, weights, tokenizer=False)
    (folder / name).write_bytes(b"anything")
    with pytest.raises(tinygpt2.FormatError) as caught:
        convert(folder)
    assert (caught.value.path, caught.value.field) == (str(folder / name), "tokenizer")


# All or nothing


def make_folder(out: Path) -> Path:
    out.mkdir()
    return out


def make_fifo(out: Path) -> Path:
    os.mkfifo(out)
    return out


def make_nothing(out: Path) -> Path:
    return out


@pytest.mark.parametrize(
    ("out", "make", "reason"),
    [
        ("none/out.tg2", make_nothing, "No such file or directory"),
        ("folder", make_folder, "Is a directory"),
        ("fifo", make_fifo, "not a regular file"),
        ("nul\0.tg2", make_nothing, "null byte"),
        ("\ud800.tg2", make_nothing, "surrogate"),
        ("n" * 300, make_nothing, "File name too long"),
    ],
    ids=["no folder", "a folder", "a pipe", "NUL", "surrogate", "long name"],
)
def test_place_that_cannot_be_written(
    tmp_path: Path, weights: Weights, out: str, make: Callable[[Path], Path], reason: str
) -> None:
    folder = write_checkpoint(tmp_path / "m", CONFIG, weights)
    place = make(tmp_path / out)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(tinygpt2.TinyGPT2Error, match=reason) as caught:
        tinygpt2.convert(folder, place)
    assert ": cannot write: " in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", [None, 5, 1.5, b"a", ["a"], {}], ids=repr)
def test_arguments_that_are_no_paths(tmp_path: Path, weights: Weights, value: Any) -> None:
    folder = write_checkpoint(tmp_path / "m", CONFIG, weights)
    convert = tinygpt2.load_companion("convert").convert  # a compiled tinygpt2 checks types itself
    with pytest.raises(tinygpt2.InputError, match="source: expected a path, found"):
        convert(value, tmp_path / "out.tg2")
    with pytest.raises(tinygpt2.InputError, match="out: expected a path, found"):
        convert(folder, value)
    assert sorted(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("source", ["nul\0", "\ud800", "n" * 300], ids=ascii)
def test_sources_that_cannot_exist(tmp_path: Path, source: str) -> None:
    with pytest.raises(tinygpt2.FormatError) as caught:
        tinygpt2.convert(tmp_path / source, tmp_path / "out.tg2")
    assert caught.value.field == "file"
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


CONVERT = """if True:
    import os, signal, sys, tinygpt2
    from pathlib import Path

    def convert(progress=None):
        tinygpt2.convert(sys.argv[1], sys.argv[2], progress)
"""


def beside_an_old_file(tmp_path: Path, weights: Weights) -> tuple[Path, Path]:
    """A checkpoint, and a file that was there before."""
    folder = write_checkpoint(tmp_path / "m", CONFIG, weights)
    out = tmp_path / "out" / "model.tg2"
    out.parent.mkdir()
    out.write_bytes(b"old")
    return folder, out


@pytest.mark.parametrize("slab", [1, 20])
@pytest.mark.slow
def test_killed(tmp_path: Path, weights: Weights, slab: int) -> None:
    code = f"""
    told = []
    def kill(*_):
        told.append(1)
        if len(told) == {slab}:
            os.kill(os.getpid(), signal.SIGKILL)
    convert(kill)
    """
    folder, out = beside_an_old_file(tmp_path, weights)
    done = run_python(CONVERT + code, folder, out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert out.read_bytes() == b"old"
    tinygpt2.convert(folder, out)  # what was left behind is not in the way
    assert_same_bits(stored_weights(out), weights)


@pytest.mark.parametrize("room", [0, 100, 20_000])
def test_full_disk(tmp_path: Path, weights: Weights, room: int) -> None:
    """A limit on the size of files makes the system refuse to write, as a full disk does."""
    resource: Any = pytest.importorskip(
        "resource", reason="limits the size of files, which Windows cannot"
    )
    folder, out = beside_an_old_file(tmp_path, weights)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(tinygpt2.TinyGPT2Error) as caught:
            tinygpt2.convert(folder, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    expected = f"{out}: cannot write: File too large (nothing was changed; "
    assert type(caught.value) is tinygpt2.TinyGPT2Error
    assert str(caught.value).startswith(expected)
    assert [(path.name, path.read_bytes()) for path in out.parent.iterdir()] == [
        ("model.tg2", b"old")
    ]


def test_what_was_written_is_checked(tmp_path: Path) -> None:
    """Even if a configuration that contradicts itself came so far, no file of it would be there."""
    companion = tinygpt2.load_companion("convert")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "n_head": 3}), "utf-8")
    config = companion.checkpoint_config(str(tmp_path))._replace(n_head=4)
    sizes = [tinygpt2.byte_size(*entry) for entry in tinygpt2.layout(config).values()]
    with pytest.raises(tinygpt2.FormatError) as caught:
        companion.write_tg2(str(tmp_path / "out.tg2"), config, iter([bytes(sum(sizes))]), None)
    assert caught.value.field == "config n_head"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted(tmp_path: Path, weights: Weights) -> None:
    folder = write_checkpoint(tmp_path / "m", CONFIG, weights)
    before = sorted(tmp_path.iterdir())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tinygpt2.convert(folder, tmp_path / "out.tg2", interrupt)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits private memory alone")
@pytest.mark.slow
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """Tensors pass through in slabs: 36 MB of private memory suffice for a tensor of 51 MB.

    RLIMIT_DATA counts what a process allocates and leaves out files that it maps read-only, so
    the system itself refuses memory beyond the limit, whatever else the machine does. The
    checkpoint (64 MB) is a hole in a file, which takes no space: all its numbers are 0.
    """
    config = {"model_type": "gpt2", "n_embd": 128, "n_head": 1, "n_layer": 1, "n_positions": 1024}
    config |= {"vocab_size": 100_000, "n_inner": 12_000, "eos_token_id": None, "bos_token_id": None}
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (100_000, 128), "wpe.weight": (1024, 128)}
    shapes |= {"h.0.mlp.c_fc.weight": (128, 12_000), "h.0.mlp.c_proj.weight": (12_000, 128)}
    shapes |= {"h.0.attn.c_attn.weight": (128, 384), "h.0.attn.c_proj.weight": (128, 128)}
    shapes |= {f"{name}.weight": (128,) for name in ("h.0.ln_1", "h.0.ln_2", "ln_f")}
    shapes |= {"ln_f.bias": (128,)}
    write_hole(folder / "model.safetensors", shapes)
    code = """
    import resource
    import numpy
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    limit = 1024 * int(status["VmData"].split()[0]) + 36_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    convert()
    """
    done = run_python(CONVERT + code, folder, tmp_path / "out.tg2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.tg2").stat().st_size > 60_000_000
    (tmp_path / "out.tg2").unlink()


def write_hole(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of float32 zeros that takes no space."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        stop = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + offset)


# Checkpoints that others have written


@pytest.mark.slow
def test_lm_buddy(data: Path, tmp_path: Path) -> None:
    source = data / "checkpoints" / "lm-buddy-fake-gpt2"
    tinygpt2.convert(source, tmp_path / "fake.tg2")
    theirs = read_safetensors(source / "model.safetensors")[1]
    expected = {name.removeprefix("transformer."): array for name, array in theirs.items()}
    assert_same_bits(stored_weights(tmp_path / "fake.tg2"), expected)
    with tinygpt2.load(tmp_path / "fake.tg2") as model:
        assert model.encode("Hello world") == [15496, 995]
        assert model.encode(END, special=True) == [50256] == [*model.config.eos_token_ids]
        assert np.isfinite(model.logits([15496, 995])).all()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied, one file", "untied, shards"])
def test_save_pretrained(data: Path, tmp_path: Path, tied: bool) -> None:
    torch = pytest.importorskip("torch", reason="needs it, to save a model with transformers")
    transformers = pytest.importorskip(
        "transformers", reason="needs it, to save a model with transformers"
    )
    torch.manual_seed(0)
    sizes = {"n_embd": 4, "n_layer": 2, "n_head": 2, "n_positions": 16, "n_inner": 7}
    config = transformers.GPT2Config(**sizes, tie_word_embeddings=tied)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "m", max_shard_size="1GB" if tied else "500KB")
    assert (tmp_path / "m" / INDEX).exists() is not tied
    files = {
        n: str(data / "gpt2-vocab" / f"{n}.{e}") for n, e in [("vocab", "json"), ("merges", "txt")]
    }
    tokenizer = transformers.GPT2TokenizerFast(**files)
    tokenizer.save_pretrained(tmp_path / "m")
    state = {name: array.numpy() for name, array in model.state_dict().items()}
    expected = {name.removeprefix("transformer."): array for name, array in state.items()}
    if tied:
        del expected["lm_head.weight"]
    out = convert(tmp_path / "m")
    assert_same_bits(stored_weights(out), expected)
    with tinygpt2.load(out) as ours:
        assert ours.config.eos_token_ids == (50256,)
        for text in (
            "Hello world",
            " It's 3.14 \u2013 naïve\n\n  done ",
            "日本語 \U0001f642\u200d\u2194\ufe0f",
        ):
            assert ours.encode(text) == tokenizer(text)["input_ids"]
