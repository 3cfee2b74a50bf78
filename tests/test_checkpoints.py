"""Checkpoint folders as trainers leave them, against transformers: the same logits and the same
greedy text, or a refusal that names the entry or the tensor."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Late, largest, random_weights, write_checkpoint, write_safetensors

import tinygpt2

torch, transformers = Late("torch"), Late("transformers")
safetensors_torch = Late("safetensors.torch")

Weights = dict[str, np.ndarray]
Change = Callable[[Weights], object]
IDS = [5, 3, 11, 7, 2]
CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write(folder: Path, entries: dict[str, Any], change: Change | None = None) -> Path:
    """A folder whose config.json has these entries besides; `...` stands for no entry."""
    weights = prefixed(random_weights(CONFIG, seed=5))
    weights = {n: 3 * w if w.ndim == 2 else w for n, w in weights.items()}  # far from uniform
    if change:
        weights = change(weights) or weights  # type: ignore[assignment]
    write_checkpoint(folder, CONFIG, weights, tokenizer=False)
    config = {"model_type": "gpt2", **CONFIG, **entries}
    given = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(given), "utf-8")
    return folder


def prefixed(weights: Weights) -> Weights:
    """As GPT2LMHeadModel names them."""
    return {n if n == HEAD else f"transformer.{n}": array for n, array in weights.items()}


def reference(folder: Path) -> Any:
    """The model that transformers makes of a folder, computing in float32."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def reference_logits(model: Any, ids: list[int] = IDS) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0])


def converted(folder: Path) -> tinygpt2.Model:
    out = folder.parent / "out.tg2"
    tinygpt2.convert(folder, out)
    return tinygpt2.load(out)


def tensors_of(path: Path) -> dict[str, Any]:
    """The tensors in a file that may be written again: none of them is mapped."""
    return {name: w.clone() for name, w in safetensors_torch.load_file(path).items()}


def assert_same_logits(folder: Path, other: Any = None) -> tinygpt2.Config:
    """As transformers has them for this folder, or as another of its models has them."""
    expected = reference_logits(other or reference(folder))
    with converted(folder) as model:
        found = model.logits(IDS)
        assert largest(found - expected) < 1e-4 * largest(expected)
        return model.config


def refusal(folder: Path) -> tinygpt2.FormatError:
    with pytest.raises(tinygpt2.FormatError) as caught:
        tinygpt2.convert(folder, folder.parent / "out.tg2")
    assert not (folder.parent / "out.tg2").exists()
    return caught.value


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What the log "tinygpt2" has been told, in one text."""
    caplog.set_level(logging.INFO, "tinygpt2")
    return lambda: "\n".join(r.getMessage() for r in caplog.records if r.name == "tinygpt2")


# config.json

ENTRIES: list[dict[str, Any]] = [
    {"num_hidden_layers": 2, "n_layer": 12},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 2, "n_layer": ...},
    {"num_attention_heads": 2},
    {"num_attention_heads": 8, "n_head": ...},
    {"hidden_size": 16, "n_embd": ..., "max_position_embeddings": 32, "n_positions": ...},
    {"hidden_size": 16, "n_embd": 768},
    {"n_ctx": 7},
    {"model_type": ...},
    {"architectures": ["GPT2ForSequenceClassification"], "num_labels": 3},
    {"dtype": "float16", "torch_dtype": "bfloat16"},
    {"reorder_and_upcast_attn": True},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    {"layer_norm_epsilon": 0.25},
    {"n_inner": None},
    {"n_inner": 64},
    {"resid_pdrop": 1, "attn_pdrop": 0.5, "use_cache": False, "pad_token_id": -1},
    {"quantization_config": None, "add_cross_attention": False, "pruned_heads": {}},
    {"sliding_window": None, "is_causal": True, "layer_types": ["full_attention"] * 2},
    {"bos_token_id": -1, "eos_token_id": [-1, 99999]},
    {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
]


@pytest.mark.slow
@pytest.mark.parametrize("entries", ENTRIES, ids=str)
def test_config_entries(tmp_path: Path, entries: dict[str, Any]) -> None:
    assert_same_logits(write(tmp_path / "m", entries))


BAD_ENTRIES: list[dict[str, Any]] = [
    {"num_hidden_layers": 3},
    {"num_hidden_layers": None},
    {"num_hidden_layers": "2"},
    {"num_hidden_layers": 2.0},
    {"n_layer": 3},
    {"n_layer": True},
    {"hidden_size": 32},
    {"hidden_size": None},
    {"n_embd": "16"},
    {"num_attention_heads": 3},
    {"num_attention_heads": 4.0},
    {"max_position_embeddings": 16},
    {"max_position_embeddings": None},
    {"n_positions": ..., "n_ctx": 32},
    {"vocab_size": 48},
    {"vocab_size": 32},
    {"n_inner": 63},
    {"n_inner": 64.0},
    {"scale_attn_weights": 1},
    {"scale_attn_by_inverse_layer_idx": None},
    {"tie_word_embeddings": "true"},
    {"tie_word_embeddings": False},
    {"layer_norm_epsilon": "1e-5"},
    {"quantization_config": {}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    {"per_layer_config": {"0": {"n_inner": 3}}},
    {"transformers_weights": "other.safetensors"},
    {"bos_token_id": [1]},
    {"bos_token_id": 1.0},
    {"eos_token_id": [1.0]},
    {"eos_token_id": "5"},
    {"eos_token_id": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("entries", BAD_ENTRIES, ids=str)
def test_config_entries_that_are_refused(tmp_path: Path, entries: dict[str, Any]) -> None:
    """transformers raises, or would go on with tensors that it draws at random."""
    folder = write(tmp_path / "m", entries)
    try:
        _, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
        missing = info["missing_keys"]
    except Exception as error:  # of several libraries
        missing = {str(error)}
    if entries != {"num_attention_heads": 4.0}:  # which fails only when the model is used
        assert missing
    message = str(refusal(folder))
    others = tinygpt2.load_companion("convert").OTHER_NAMES
    assert any(n in message or others.get(n, n) in message for n in entries), message


def test_entries_that_make_another_model(tmp_path: Path) -> None:
    others: dict[str, object] = {
        "add_cross_attention": True,
        "is_encoder_decoder": True,
        "is_causal": False,
        "sliding_window": 4,
        "attention_chunk_size": 4,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    for name, value in others.items():
        assert refusal(write(tmp_path / "m", {name: value})).field == name


@pytest.mark.slow
def test_activations(tmp_path: Path) -> None:
    """One of ours where the functions are equal in float32, else refused by name."""
    functions = transformers.activations.ACT2FN
    assert len(functions) > 20
    for name in functions:
        check_activation(tmp_path, functions, name)


def check_activation(tmp_path: Path, functions: Any, name: str) -> None:
    x = torch.linspace(-12, 12, 20_001)
    ours = [
        ours
        for ours in tinygpt2.ACTIVATIONS
        if float((functions[name](x) - functions[ours](x)).detach().abs().max()) < 1e-6
    ]
    folder = write(tmp_path / name / "m", {"activation_function": name})
    if ours:
        assert assert_same_logits(folder).activation_function == ours[0]
    else:
        error = refusal(folder)
        assert (error.field, error.found) == ("config activation_function", repr(name))


# The head and the embedding

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def own_head(weights: Weights) -> None:
    weights[HEAD] = weights[EMBEDDING][::-1].copy()


def nearly_the_same_head(weights: Weights) -> None:
    weights[HEAD] = weights[EMBEDDING].copy()
    weights[HEAD][-1, -1] += 5


def same_head(weights: Weights) -> None:
    weights[HEAD] = weights[EMBEDDING].copy()


def only_the_head(weights: Weights) -> None:
    weights[HEAD] = weights.pop(EMBEDDING)


def head_inside(weights: Weights) -> None:
    weights[f"transformer.{HEAD}"] = weights[EMBEDDING][::-1].copy()


def head_of_halves(weights: Weights) -> None:
    """The same numbers in two types."""
    weights[EMBEDDING] = weights[EMBEDDING].astype(np.float16).astype(np.float32)
    weights[HEAD] = weights[EMBEDDING].astype(np.float16)


@pytest.mark.slow
@pytest.mark.parametrize("flag", [..., True, False], ids=["absent", "true", "false"])
@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (own_head, False),
        (nearly_the_same_head, False),
        (same_head, True),
        (head_inside, False),
        (head_of_halves, True),
    ],
)
def test_both_matrices(tmp_path: Path, flag: Any, change: Change, tied: bool) -> None:
    """The numbers tell whether they are one, and not what config.json says."""
    config = assert_same_logits(write(tmp_path / "m", {"tie_word_embeddings": flag}, change))
    assert config.tie_word_embeddings is tied


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda weights: None, only_the_head])
@pytest.mark.parametrize("flag", [..., True], ids=["absent", "true"])
def test_one_matrix_of_two_tied_ones(tmp_path: Path, flag: Any, change: Change) -> None:
    config = assert_same_logits(write(tmp_path / "m", {"tie_word_embeddings": flag}, change))
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "name"), [(lambda weights: None, HEAD), (only_the_head, "wte.weight")]
)
def test_one_matrix_of_two_that_are_not_tied(tmp_path: Path, change: Change, name: str) -> None:
    """transformers draws the other one at random."""
    folder = write(tmp_path / "m", {"tie_word_embeddings": False}, change)
    assert refusal(folder).field == f"tensor {name}"


# Names


def rename(function: Callable[[str], str]) -> Change:
    return lambda weights: {function(name): array for name, array in weights.items()}


def split_prefix(name: str) -> str:
    """The wrapper that torch.compile puts around one block alone."""
    return name.replace("h.1.", "h.1._orig_mod.")


RENAMED: dict[str, Callable[[str], str]] = {
    "GPT2Model": lambda name: name.removeprefix("transformer."),
    **{
        prefix: lambda name, prefix=prefix: prefix + name  # type: ignore[misc]
        for prefix in [
            *("transformer.", "_orig_mod.", "module.", "model.", "module._orig_mod."),
            *("_orig_mod.module.model.", "_fsdp_wrapped_module.", "gpt.network.", "base_model."),
        ]
    },
    "compiled GPT2Model": lambda name: "_orig_mod." + name.removeprefix("transformer."),
    "wrapped GPT2Model": lambda name: "model." + name.removeprefix("transformer."),
    "one compiled block": split_prefix,
    "checkpointed blocks": lambda name: name.replace(".attn.", "._checkpoint_wrapped_module.attn."),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", RENAMED.values(), ids=RENAMED.keys())
def test_names_under_wrappers(tmp_path: Path, function: Callable[[str], str]) -> None:
    """The same model as without them. (transformers would draw its weights at random.)"""

    def change(weights: Weights) -> object:
        own_head(weights)
        return rename(function)(weights)

    plain = reference(write(tmp_path / "plain", {}, own_head))
    assert_same_logits(write(tmp_path / "m", {}, change), plain)


@pytest.mark.slow
def test_tensors_beside_the_model(tmp_path: Path) -> None:
    """Causal masks of old files, a value head, a classifier, a counter, another GPT-2 inside."""

    def change(weights: Weights) -> object:
        own_head(weights)
        teacher = {f"teacher.{name}": 2 * array for name, array in weights.items()}
        for i in range(2):
            weights[f"transformer.h.{i}.attn.bias"] = np.ones((1, 1, 32, 32), bool)
            weights[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
        weights["v_head.summary.weight"] = weights["score.weight"] = np.ones((1, 16), np.float32)
        weights["steps"] = np.array([3], np.uint64)
        return {**teacher, **weights}

    assert_same_logits(write(tmp_path / "m", {}, change))


def test_two_models_in_one_file(tmp_path: Path) -> None:
    def change(weights: Weights) -> object:
        return {prefix + n: w for n, w in weights.items() for prefix in ("student.", "teacher.")}

    error = refusal(write(tmp_path / "m", {}, change))
    assert error.found == "several, in ['student.', 'teacher.']"


def test_names_that_take_long(tmp_path: Path) -> None:
    """A name of a megabyte is not searched for the places where a name of GPT-2 may begin."""

    def change(weights: Weights) -> None:
        weights["transformer." * 100_000 + "x"] = np.ones(1, np.float32)

    tinygpt2.convert(write(tmp_path / "m", {}, change), tmp_path / "out.tg2")


def test_names_that_a_terminal_cannot_show(tmp_path: Path) -> None:
    error = refusal(write(tmp_path / "m", {"n_positions": 9}, rename(lambda name: "\x1b." + name)))
    assert error.field == "tensor '\\x1b.transformer.wpe.weight'"


def test_one_name_under_two_prefixes(tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights["wte.weight"] = 2 * weights[EMBEDDING]

    error = refusal(write(tmp_path / "m", {}, change))
    assert error.field == "tensor 'wte.weight'"
    assert EMBEDDING in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(("stored", "wrapper"), [(HEAD, ""), (EMBEDDING, "_orig_mod.")])
def test_name_of_a_shared_tensor(tmp_path: Path, flag: bool, stored: str, wrapper: str) -> None:
    """safetensors' own `save_model` stores it once; its metadata maps the other name to that."""
    folder = write(tmp_path / "m", {"tie_word_embeddings": flag})
    model = reference(write(tmp_path / "tied", {}))
    path = folder / "model.safetensors"
    safetensors_torch.save_model(model, str(path))
    weights = tensors_of(path)
    shared = {HEAD, EMBEDDING}
    numbers = {n: w.numpy() for n, w in weights.items() if n not in shared}
    numbers[stored] = model.lm_head.weight.detach().numpy()
    other = (shared - {stored}).pop()
    metadata = {wrapper + other: wrapper + stored}
    write_safetensors(path, {wrapper + n: w for n, w in numbers.items()}, metadata)
    assert assert_same_logits(folder, model).tie_word_embeddings
    with safetensors_torch.safe_open(path, "pt") as file:
        assert file.metadata() == metadata


@pytest.mark.slow
def test_file_of_save_model(tmp_path: Path) -> None:
    """Whatever name it keeps."""
    folder = write(tmp_path / "m", {"tie_word_embeddings": False})
    model = reference(write(tmp_path / "tied", {}))
    safetensors_torch.save_model(model, str(folder / "model.safetensors"))
    assert assert_same_logits(folder, model).tie_word_embeddings


@pytest.mark.slow
def test_layers_that_share_their_tensors(tmp_path: Path) -> None:
    """As ALBERT does: one layer, used twice."""

    def change(weights: Weights) -> None:
        for name in [name for name in weights if ".h.0." in name]:
            weights[name.replace(".h.0.", ".h.1.")] = weights[name]

    plain = reference(write(tmp_path / "plain", {}, change))
    folder = write(tmp_path / "m", {}, change)
    first = [name for name in plain.state_dict() if ".h.0." in name]
    second = [name.replace(".h.0.", ".h.1.") for name in first]
    tensors = {n: w.numpy() for n, w in plain.state_dict().items() if n not in (HEAD, *second)}
    write_safetensors(folder / "model.safetensors", tensors, dict(zip(second, first)))
    assert_same_logits(folder, plain)


# What is absent, and what is too much


def without(*ends: str) -> Change:
    return lambda weights: {n: w for n, w in weights.items() if not n.endswith(ends)}


NORMS = ("ln_1.bias", "ln_2.bias", "ln_f.bias")
KINDS = ["attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"]
LEFT_OUT = [
    (".bias",),
    NORMS,
    *((kind,) for kind in KINDS),
    (KINDS[0], KINDS[1]),
    tuple(KINDS),
    ("ln_1.bias",),
]


@pytest.mark.slow
@pytest.mark.parametrize("ends", LEFT_OUT, ids=str)
def test_biases_that_trainers_leave_out(tmp_path: Path, ends: tuple[str, ...]) -> None:
    assert_same_logits(write(tmp_path / "m", {}, without(*ends)))


@pytest.mark.parametrize(
    "name",
    [
        *(f"h.{i}.{kind}" for i in range(2) for kind in [*KINDS, "ln_1.bias", "ln_2.bias"]),
        *("ln_f.bias", "ln_f.weight", "h.0.ln_1.weight", "h.1.mlp.c_fc.weight", "wpe.weight"),
        "wte.weight",
    ],
)
def test_one_tensor_is_absent(tmp_path: Path, name: str) -> None:
    """transformers would set it to zero, or draw it at random."""
    error = refusal(write(tmp_path / "m", {}, without(f".{name}")))
    assert error.field == f"tensor {name}"
    assert error.found == "no such tensor"


def test_a_layer_is_absent(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"n_layer": 4})
    assert "it has 2 layers, and the configuration says n_layer 4" in str(refusal(folder))


def test_nothing_of_a_gpt2(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {}, lambda weights: {"conv.weight": np.ones(3, np.float32)})
    assert "no tensor has a name of GPT-2" in str(refusal(folder))


@pytest.mark.slow
def test_layers_beyond_n_layer(tmp_path: Path, notes: Callable[[], str]) -> None:
    """config.json decides, as in transformers."""
    assert assert_same_logits(write(tmp_path / "m", {"n_layer": 1})).n_layer == 1
    assert "it has 2 layers, and the configuration says n_layer 1" in notes()


def test_names_of_other_layer_norms(tmp_path: Path) -> None:
    """transformers renames gamma and beta of BERT's layer norms only; it would lose GPT-2's."""

    def function(name: str) -> str:
        return name.replace("ln_1.weight", "ln_1.gamma").replace("ln_1.bias", "ln_1.beta")

    error = refusal(write(tmp_path / "m", {}, rename(function)))
    assert error.field.startswith("tensor 'transformer.h.0.ln_1.")


# Types and layouts


@pytest.mark.slow
def test_float64(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {})
    tensors = tensors_of(folder / "model.safetensors")
    exact = {name: array.double() * (1 + 2**-40) for name, array in tensors.items()}
    safetensors_torch.save_file(exact, folder / "model.safetensors", {"format": "pt"})
    assert_same_logits(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int64", "bool", "float8_e4m3fn", "float8_e5m2"]
)
def test_types_that_are_refused(tmp_path: Path, dtype: str) -> None:
    folder = write(tmp_path / "m", {})
    tensors = tensors_of(folder / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    safetensors_torch.save_file(tensors, folder / "model.safetensors")
    error = refusal(folder)
    assert error.field == f"tensor {name}"
    assert error.expected == "F32, F16, BF16 or F64"


def to_linear(weights: Weights) -> None:
    """nn.Linear's layout, as nanoGPT trains it."""
    for name, array in weights.items():
        if ".h." in name and array.ndim == 2:
            weights[name] = np.ascontiguousarray(array.T)


@pytest.mark.slow
@pytest.mark.parametrize("n_inner", [None, 16, 24])
@pytest.mark.parametrize("square", [False, True])
def test_layout_of_linear_layers(tmp_path: Path, n_inner: int | None, square: bool) -> None:
    """c_proj is square, and so is c_fc with as many hidden units: c_attn tells for them."""
    config = {**CONFIG, "n_inner": n_inner}
    weights = {n: 2 * w if w.ndim == 2 else w for n, w in random_weights(config).items()}
    if square:
        weights = {n: w for n, w in weights.items() if not n.endswith(".bias")}
    plain = write_checkpoint(tmp_path / "plain", config, prefixed(weights), tokenizer=False)
    linear = prefixed(weights)
    to_linear(linear)
    folder = write_checkpoint(tmp_path / "m", config, linear, tokenizer=False)
    assert_same_logits(folder, reference(plain))


@pytest.mark.parametrize("kind", ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"])
def test_layouts_are_not_mixed(tmp_path: Path, kind: str) -> None:
    name = f"transformer.h.1.{kind}.weight"

    def change(weights: Weights) -> None:
        weights[name] = np.ascontiguousarray(weights[name].T)

    assert refusal(write(tmp_path / "m", {}, change)).field == f"tensor {name}"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wte.weight", "n_embd 16, vocab_size 40"),
        ("wpe.weight", "n_embd 16, n_positions 32"),
        ("h.0.mlp.c_fc.bias", "n_embd 16, n_inner 64"),
        ("h.1.ln_2.weight", "n_embd 16"),
    ],
)
def test_sizes_that_disagree(tmp_path: Path, name: str, says: str) -> None:
    """The error has the shape, and what the configuration says about it."""

    def change(weights: Weights) -> None:
        weights[f"transformer.{name}"] = np.ones((5, 7), np.float32)

    message = str(refusal(write(tmp_path / "m", {}, change)))
    assert "found [5, 7]" in message
    assert f"the configuration says {says};" in message


# Files


def write_shards(folder: Path, parts: Iterable[list[str]], places: dict[str, str]) -> None:
    """Shards with these tensors, and an index that says something of its own."""
    tensors = tensors_of(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, part in enumerate(parts, 1):
        shard = {name: tensors[name] for name in part}
        safetensors_torch.save_file(shard, folder / shard_name(number), {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def shard_name(number: int) -> str:
    return f"model-{number:05}-of-00002.safetensors"


def halves(folder: Path) -> tuple[list[str], list[str]]:
    names = list(tensors_of(folder / "model.safetensors"))
    return names[:12], names[12:]


@pytest.mark.slow
def test_index_that_names_too_little_and_too_much(tmp_path: Path) -> None:
    """Of the index, the names of the files count."""
    folder = write(tmp_path / "m", {}, own_head)
    parts = halves(folder)
    places = {"unknown": shard_name(1), parts[0][0]: shard_name(2)}
    write_shards(folder, parts, places)
    assert_same_logits(folder)


@pytest.mark.slow
def test_weights_beside_an_index(tmp_path: Path) -> None:
    """model.safetensors comes first, and a folder of that name does not count."""
    folder = write(tmp_path / "m", {})
    content = (folder / "model.safetensors").read_bytes()
    parts = halves(folder)
    write_shards(folder, parts, {"a": shard_name(1), "b": shard_name(2)})
    plain = reference(folder)
    (folder / "model.safetensors").mkdir()
    assert_same_logits(folder, plain)
    (folder / "model.safetensors").rmdir()
    for number in (1, 2):  # never read
        (folder / shard_name(number)).rename(tmp_path / shard_name(number))
        (folder / shard_name(number)).write_bytes(b"nothing")
    (folder / "model.safetensors").write_bytes(content)
    assert_same_logits(folder, plain)


@pytest.mark.slow
def test_index_and_shards_that_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {})
    parts = halves(folder)
    write_shards(folder, parts, {"a": shard_name(1), "b": shard_name(2)})
    expected = reference_logits(reference(folder))
    tinygpt2.convert(folder / "model.safetensors.index.json", tmp_path / "out.tg2")
    with tinygpt2.load(tmp_path / "out.tg2") as model:
        assert largest(model.logits(IDS) - expected) < 1e-4 * largest(expected)
    with pytest.raises(tinygpt2.FormatError, match=r"shard 2 of 2 \(name the folder or the index"):
        tinygpt2.convert(folder / shard_name(2), tmp_path / "out.tg2")


@pytest.mark.slow
def test_index_without_one_of_the_shards(tmp_path: Path) -> None:
    """transformers would draw the other half at random."""
    folder = write(tmp_path / "m", {})
    write_shards(folder, halves(folder), {"a": shard_name(1)})
    assert refusal(folder).found == "no such tensor"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters(tmp_path: Path, name: str) -> None:
    """With peft, transformers would load the adapter too: that is another model."""
    folder = write(tmp_path / "m", {})
    (folder / name).write_text("{}", "utf-8")
    if name != "adapter_config.json":  # alone, transformers does not look at it
        with pytest.raises(tinygpt2.FormatError, match="merge_and_unload"):
            tinygpt2.convert(folder / name, tmp_path / "out.tg2")
        (folder / "model.safetensors").unlink()
    error = refusal(folder)
    assert error.path == str(folder / name)
    assert error.found == "a PEFT adapter"


# Generation

START = [5]


def greedy(model: Any, ids: list[int], **options: Any) -> list[int]:
    """What transformers generates, without the token that ends it."""
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    out = model.generate(torch.tensor([ids]), do_sample=False, **options)[0].tolist()
    answer: list[int] = out[len(ids) :]
    return answer[:-1] if answer and answer[-1] in ends else answer


def write_generation(folder: Path, settings: object) -> Path:
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def third_token(folder: Path) -> int:
    """The third token of the greedy text that no token ends, as an end to find."""
    return greedy(reference(write(folder / "free", {"eos_token_id": None})), START, max_length=9)[2]


SETTINGS: list[tuple[dict[str, Any], Any]] = [  # of config.json and of generation_config.json
    ({"eos_token_id": "END"}, None),
    ({"eos_token_id": [0, "END"]}, None),
    ({"eos_token_id": ...}, None),
    ({"eos_token_id": None}, None),
    ({"eos_token_id": "END"}, {}),
    ({"eos_token_id": "END"}, {"_from_model_config": True}),
    ({"eos_token_id": "END"}, {"eos_token_id": None}),
    ({"eos_token_id": "END"}, {"eos_token_id": 0}),
    ({"eos_token_id": "END"}, {"bos_token_id": 1, "transformers_version": "4.30.0"}),
    ({}, {"eos_token_id": "END"}),
    ({}, {"eos_token_id": ["END", -5, 99999, 0]}),
    ({"eos_token_id": 50256, "bos_token_id": 50256}, {"eos_token_id": ["END"]}),
    ({"eos_token_id": None}, {"eos_token_id": "END"}),
    ({"repetition_penalty": 1.7}, None),
    ({"repetition_penalty": 1.7}, {}),
    ({}, {"repetition_penalty": 1.3, "eos_token_id": "END"}),
    ({"max_length": 6, "top_k": 3, "temperature": 0.3}, None),
    ({"max_length": 6}, {}),
    ({}, {"max_length": 7}),
    ({}, {"max_new_tokens": 3}),
    ({}, {"max_new_tokens": 3, "max_length": 9, "do_sample": False, "temperature": 0.4}),
    ({}, {"do_sample": True, "top_p": 0.9, "min_p": 0.1, "top_k": 4, "custom": [1, 2]}),
    ({}, {"temperature": None, "top_k": None, "repetition_penalty": None, "do_sample": None}),
    ({}, {"top_p": 1.5, "top_k": 0, "num_beams": 1, "no_repeat_ngram_size": 0}),
]


def put(entries: Any, end: int) -> Any:
    """These entries with an end token in the place of "END"."""
    return json.loads(json.dumps(entries).replace('"END"', str(end)))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "settings"), SETTINGS, ids=str)
def test_greedy_text(tmp_path: Path, config: dict[str, Any], settings: Any) -> None:
    """It ends at the same token, and what the files say about generation is honoured."""
    end = third_token(tmp_path)
    given = {n: v if v is ... else put(v, end) for n, v in config.items()}
    folder = write_generation(write(tmp_path / "m", given), put(settings, end))
    model = reference(folder)
    own = model.generation_config
    length: dict[str, Any] = {} if own.max_length or own.max_new_tokens else {"max_new_tokens": 12}
    with converted(folder) as ours:
        assert ours.generate_ids(START, temperature=0, **length) == greedy(model, START, **length)


def generation(folder: Path) -> tuple[Any, ...]:
    with converted(folder) as model:
        return model.config.bos_token_id, model.config.eos_token_ids, model.config.generation


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 9}, {"temperature": 0, "top_k": 9}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 0.7, "top_p": 0.5}, {"temperature": 0.7, "top_p": 0.5}),
        ({"top_k": None, "top_p": None, "max_length": None}, {}),
        ({"top_p": 0}, {"top_p": 1e-9}),
        ({"top_p": 7.5}, {"top_p": 1}),
        ({"max_length": 20, "max_new_tokens": 5}, {"max_length": 20, "max_new_tokens": 5}),
        ({"min_p": 0.0, "repetition_penalty": 2}, {"min_p": 0, "repetition_penalty": 2}),
    ],
)
def test_options_that_are_kept(
    tmp_path: Path, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Only what stands in the file; in config.json the same, where there is no such file."""
    folder = write_generation(write(tmp_path / "m", {}), settings)
    assert generation(folder) == (0, (), expected)
    assert generation(write(tmp_path / "old", settings)) == (0, (0,), expected)


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        (3, None, 3),
        (..., None, None),
        (3, {}, 3),
        (3, {"bos_token_id": 4}, 4),
        (3, {"bos_token_id": None}, None),
        (None, {"bos_token_id": 4}, 4),
        (3, {"bos_token_id": 50256}, None),
        (-3, {}, None),
    ],
)
def test_beginning_of_text(tmp_path: Path, config: Any, settings: Any, expected: int) -> None:
    folder = write_generation(write(tmp_path / "m", {"bos_token_id": config}), settings)
    assert generation(folder)[0] == expected


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ([], "content"),
        (None, "content"),
        ({"eos_token_id": "5"}, "eos_token_id"),
        ({"eos_token_id": 5.0}, "eos_token_id"),
        ({"eos_token_id": [[5]]}, "eos_token_id"),
        ({"bos_token_id": [5]}, "bos_token_id"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_length": 0}, "max_length"),
        ({"max_new_tokens": "a"}, "config generation"),
        ({"top_k": -1}, "config generation"),
        ({"top_k": 2.0}, "config generation"),
        ({"top_p": -0.5}, "config generation"),
        ({"temperature": -1.0}, "config generation"),
        ({"temperature": "0.7"}, "config generation"),
        ({"repetition_penalty": 0.0}, "config generation"),
        ({"min_p": 1.5}, "config generation"),
        ({"do_sample": "yes"}, "do_sample"),
    ],
    ids=str,
)
def test_settings_that_are_refused(tmp_path: Path, settings: Any, field: str) -> None:
    folder = write(tmp_path / "m", {})
    path = folder / "generation_config.json"
    path.write_text(json.dumps(settings), "utf-8")
    error = refusal(folder)
    assert (error.path, error.field) == (str(path), field)


def test_settings_without_a_counterpart_are_noted(tmp_path: Path, notes: Callable[[], str]) -> None:
    settings = {
        "num_beams": 4,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": [3],
        "eos_token_id": 0,
    }
    neutral = {"typical_p": 1.0, "min_length": 0, "bad_words_ids": None, "num_return_sequences": 1}
    folder = write_generation(write(tmp_path / "m", {}), {**settings, **neutral})
    generation(folder)
    assert "no_repeat_ngram_size, num_beams, suppress_tokens: not taken over" in notes()
    assert str(folder / "generation_config.json") in notes()


@pytest.mark.parametrize(
    ("config", "settings", "noted"),
    [
        (0, {}, True),
        (0, {"eos_token_id": 99999}, True),
        (50256, None, True),
        (0, None, False),
        (None, None, False),
        (None, {"eos_token_id": 0}, False),
    ],
)
def test_ends_that_do_not_count_are_noted(
    tmp_path: Path, notes: Callable[[], str], config: Any, settings: Any, noted: bool
) -> None:
    generation(write_generation(write(tmp_path / "m", {"eos_token_id": config}), settings))
    assert ("no token ends a text" in notes()) is noted


# Folders that transformers writes

CHOICES: dict[str, list[Any]] = {  # of each option, the default first
    "tie_word_embeddings": [True, False],
    "more_tokens": [0, 7, 24],
    "activation_function": ["gelu_new", "gelu", "relu", "gelu_fast", "gelu_pytorch_tanh"],
    "scale_attn_weights": [True, False],
    "scale_attn_by_inverse_layer_idx": [False, True],
    "n_inner": [None, 24, 77],
    "layer_norm_epsilon": [1e-5, 1e-12, 0.02],
    "n_head": [4, 1, 8],
    "n_layer": [2, 1, 3],
    "dtype": ["float32", "float16", "bfloat16", "float64"],
    "max_shard_size": ["50GB", "20KB"],
    "no_bias": [(), (".bias",), NORMS, (KINDS[0],)],
    "base_only": [False, True],
    "ends": [None, "last", "several"],
    "repetition_penalty": [None, 1.3],
    "max_length": [None, 15],
}


def draw(seed: int) -> dict[str, Any]:
    """At least three options that differ from the defaults, most of them not."""
    chance = random.Random(seed)
    others = set(chance.sample(sorted(CHOICES), chance.randint(3, 8)))
    chosen = {n: chance.choice(v[1:]) if n in others else v[0] for n, v in CHOICES.items()}
    if chosen["base_only"]:  # the file of GPT2Model has no head
        chosen["tie_word_embeddings"] = True
    return chosen


def build(folder: Path, chosen: dict[str, Any], seed: int) -> None:
    """A random model of transformers, with wide weights, written by transformers."""
    torch.manual_seed(seed)
    names = transformers.GPT2Config().to_dict().keys() - {"dtype", "max_length"}
    entries = {n: v for n, v in chosen.items() if n in names}
    sizes = {"vocab_size": 60, "n_positions": 48, "n_embd": 32, "initializer_range": 0.35}
    config = transformers.GPT2Config(**{**sizes, **entries, "bos_token_id": 1, "eos_token_id": 2})
    model = transformers.GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not name.endswith(chosen["no_bias"]):
            torch.nn.init.normal_(parameter, std=0.3)
    model.resize_token_embeddings(60 + chosen["more_tokens"], mean_resizing=False)
    settings = model.generation_config
    settings.repetition_penalty = chosen["repetition_penalty"]
    settings.max_length = chosen["max_length"]
    ends = {None: 2, "last": 59 + chosen["more_tokens"], "several": [7, 2, 31, 3]}
    settings.eos_token_id = ends[chosen["ends"]]
    model = model.to(getattr(torch, chosen["dtype"]))
    saved = model.transformer if chosen["base_only"] else model
    saved.save_pretrained(folder, max_shard_size=chosen["max_shard_size"])
    settings.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # zeros, as transformers sets them again
        tensors = tensors_of(path)
        kept = {n: w for n, w in tensors.items() if not n.endswith(chosen["no_bias"])}
        safetensors_torch.save_file(kept, path, {"format": "pt"})


def clear_gaps(model: Any, ids: list[int]) -> bool:
    """Whether the best token is far ahead at every place."""
    logits = np.sort(reference_logits(model, ids))
    return bool((logits[:, -1] - logits[:, -2]).min() > 1e-3 * largest(logits))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_folders_that_transformers_writes(tmp_path: Path, number: int) -> None:
    chosen = draw(number)
    differ = [n for n, v in CHOICES.items() if chosen[n] != v[0]]
    assert len(differ) >= 2 + (not chosen["base_only"])
    prompts = [[1], [4, 50, 9], [8, 8, 30, 12, 41]]
    for seed in range(100 * number, 100 * number + 100):
        folder = tmp_path / str(seed)
        build(folder, chosen, seed)
        model = reference(folder)
        limit: dict[str, Any] = {} if chosen["max_length"] else {"max_new_tokens": 20}
        answers = [greedy(model, prompt, **limit) for prompt in prompts]
        if all(clear_gaps(model, p + a) for p, a in zip(prompts, answers)):
            break
    shards = len(list(folder.glob("*.safetensors")))
    assert (shards > 1) is (chosen["max_shard_size"] != "50GB")
    with converted(folder) as ours:
        assert ours.config.tie_word_embeddings is chosen["tie_word_embeddings"]
        for prompt, answer in zip(prompts, answers):
            text = prompt + answer
            expected = reference_logits(model, text)
            assert largest(ours.logits(text) - expected) < 1e-4 * largest(expected)
            assert ours.generate_ids(prompt, temperature=0, **limit) == answer
    assert max(map(len, answers)) > 3
    assert math.isfinite(largest(expected))
