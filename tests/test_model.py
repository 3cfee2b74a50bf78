"""The forward pass: against transformers, against published results, and against its own rules."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import math
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import (
    SHAPES,
    TOY,
    UNTIED,
    Shape,
    in_threads,
    largest,
    random_weights,
    run_python,
    slow,
    write_checkpoint,
)

import tinygpt2

Weights = dict[str, np.ndarray]


NO_KERNELS = pytest.mark.skipif(tinygpt2.library_path() is None, reason="needs the C kernels")
BACKENDS = ["numpy", pytest.param("c", marks=NO_KERNELS)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def load(path: Path | str, backend: str) -> tinygpt2.Model:
    return tinygpt2.load(path, backend="c" if backend == "c" else "numpy")


def model_of(
    folder: Path, config: dict[str, Any], weights: Weights, backend: str
) -> tinygpt2.Model:
    """A model of these weights, without a tokenizer."""
    source = write_checkpoint(folder / "m", config, weights, tokenizer=False)
    tinygpt2.convert(source, folder / "m.tg2")
    return load(folder / "m.tg2", backend)


def numpy_backend(model: tinygpt2.Model) -> tinygpt2.NumpyBackend:
    """The one whose stages can be looked at."""
    assert isinstance(model.backend, tinygpt2.NumpyBackend)
    return model.backend


# Ten shapes

N_PROMPT, N_NEW = 5, 200
# Two float32 computations of these models differ by 1e-6 to 1e-5 of the largest logit, the most at
# width 2, whose layer norm divides small differences. ROUNDING leaves room for other processors.
ROUNDING = 5e-5
# How far, of the largest logit, the second best token stays behind the best one in the texts below:
# ten times as far, so that rounding decides nowhere.
MARGIN = 5e-4


def wide_weights(shape: Shape) -> Weights:
    """Wide weights make texts that vary. Attention on scores that are not scaled down would become
    a hard choice by them, in which every rounding counts."""
    config = shape.config()
    weights = random_weights(config, shape.seed)
    for name, array in weights.items():
        is_hard = "c_attn" in name and not config.get("scale_attn_weights", True)
        array *= 3 if array.ndim == 2 and not is_hard else 1
    return weights


def prompt_of(shape: Shape) -> list[int]:
    random = np.random.default_rng(shape.seed)
    prompt: list[int] = random.integers(shape.vocab_size, size=N_PROMPT).tolist()
    return prompt


class Example:
    """One of the ten models and a text that it generates greedily."""

    def __init__(self, folder: Path, shape: Shape, backend: str) -> None:
        self.shape = shape
        self.config = shape.config()
        self.weights = wide_weights(shape)
        self.model = model_of(folder, self.config, self.weights, backend)
        self.prompt = prompt_of(shape)
        self.answer = self.model.generate_ids(self.prompt, max_new_tokens=N_NEW, temperature=0)
        self.ids = self.prompt + self.answer
        self.logits = self.model.logits(self.ids)


@pytest.fixture(scope="module", params=BACKENDS)
def backend_of_example(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


FAST = (2, 4)  # of the ten, those in the fast lane: two activations, untied and tied


def shape_parameters() -> Iterator[Any]:
    for number, shape in enumerate(SHAPES):
        marks = [] if number in FAST else [pytest.mark.slow]
        yield pytest.param(shape, marks=marks, id="-".join(map(str, shape[:6])))


@pytest.fixture(scope="module", params=shape_parameters())
def example(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    backend_of_example: str,
) -> Iterator[Example]:
    example = Example(tmp_path_factory.mktemp("example"), request.param, backend_of_example)
    with example.model:
        yield example


def test_greedy_texts_are_fit_for_comparison(example: Example) -> None:
    """The tests of greedy texts below mean something: they vary, and no choice is a close one."""
    best = np.sort(example.logits[N_PROMPT - 1 : -1], axis=-1)
    assert (best[:, -1] - best[:, -2]).min() > MARGIN * largest(example.logits)
    assert len(example.answer) == N_NEW
    assert len(set(example.answer)) >= min(10, example.config["vocab_size"] // 2)


def best_tokens(logits: np.ndarray) -> list[int]:
    """The greedy choices after the prompt and after each new token but the last."""
    best: list[int] = logits[N_PROMPT - 1 : -1].argmax(axis=-1).tolist()
    return best


def float64_logits(config: dict[str, Any], weights: Weights, ids: list[int]) -> np.ndarray:
    """The model once more, as plainly as possible, in float64 and without a cache."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    width = config["n_embd"] // config["n_head"]
    erf = np.vectorize(math.erf)
    bend: Callable[[np.ndarray], np.ndarray] = {
        "relu": lambda x: np.where(x > 0, x, 0),
        "gelu": lambda x: x * (1 + erf(x / 2**0.5)) / 2,
        "gelu_new": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    }[config.get("activation_function", "gelu_new")]

    def norm(x: np.ndarray, name: str) -> Any:
        variance = x.var(axis=1, keepdims=True) + config.get("layer_norm_epsilon", 1e-5)
        x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(variance)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def affine(x: np.ndarray, name: str) -> Any:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    for i in range(config["n_layer"]):
        scale = 1 / width**0.5 if config.get("scale_attn_weights", True) else 1.0
        scale /= i + 1 if config.get("scale_attn_by_inverse_layer_idx") else 1
        q, k, v = np.split(affine(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=1)
        heads = []
        for first in range(0, config["n_embd"], width):
            head = slice(first, first + width)
            e = np.tril(np.exp(scale * q[:, head] @ k[:, head].T))
            heads.append(e / e.sum(axis=1, keepdims=True) @ v[:, head])
        x = x + affine(np.concatenate(heads, axis=1), f"h.{i}.attn.c_proj")
        x = x + affine(bend(affine(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    head_matrix = w["wte.weight" if config.get("tie_word_embeddings", True) else "lm_head.weight"]
    logits: np.ndarray = norm(x, "ln_f") @ head_matrix.T
    return logits


def test_logits_in_float64(example: Example) -> None:
    """Within ROUNDING, and with the same choices."""
    expected = float64_logits(example.config, example.weights, example.ids)
    assert example.logits.dtype == np.float32
    assert largest(example.logits - expected) <= ROUNDING * largest(expected)
    assert best_tokens(expected) == example.answer


@pytest.mark.parametrize("chunk", [*slow(1, 2), 7, 64, *slow(1000)])
def test_chunks(example: Example, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text in pieces: other products, so rounding differs, and nothing else."""
    limit = example.model.backend.chunk
    monkeypatch.setattr(example.model.backend, "chunk", min(chunk, limit))
    logits = example.model.logits(example.ids)
    assert largest(logits - example.logits) <= ROUNDING * largest(example.logits)
    assert best_tokens(logits) == example.answer
    rest = example.model.generate_ids(example.ids[:150], max_new_tokens=5, temperature=0)
    assert rest == example.ids[150:155]


def test_uncached(example: Example) -> None:
    """Every text anew, from its first token."""
    for n in range(N_PROMPT, len(example.ids), 9):
        assert example.model.logits(example.ids[:n])[-1].argmax() == example.ids[n]


class Theirs(NamedTuple):
    """What the transformers library computes of one of the ten models."""

    ids: list[int]  # the prompt and the greedy answer
    logits: np.ndarray  # after each of them


def transformers_model(config: dict[str, Any], weights: Weights) -> Any:
    """These weights in the transformers library."""
    torch = pytest.importorskip("torch", reason="needs torch and transformers, to compare with")
    transformers = pytest.importorskip(
        "transformers", reason="needs torch and transformers, to compare with"
    )
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**config, attn_implementation="eager")
    ).eval()
    state = {
        name if name == "lm_head.weight" else f"transformer.{name}": torch.from_numpy(array)
        for name, array in weights.items()
    }
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    model.load_state_dict(state)
    return model


def their_greedy_text(model: Any, prompt: list[int], n_new: int) -> Theirs:
    torch = pytest.importorskip("torch")
    tensor = torch.tensor([prompt])
    mask = torch.ones_like(tensor)
    with torch.no_grad():
        ids = model.generate(tensor, attention_mask=mask, max_new_tokens=n_new, do_sample=False)
        logits = model(ids).logits[0].numpy()
    assert logits.dtype == np.float32
    return Theirs(ids[0].tolist(), logits)


@functools.lru_cache(maxsize=len(SHAPES))  # both backends are compared with it
def theirs(number: int) -> Theirs:
    torch = pytest.importorskip("torch", reason="needs torch and transformers, to compare with")
    torch.set_num_threads(1)  # of so little work, more threads make more
    shape = SHAPES[number]
    model = transformers_model(shape.config(), wide_weights(shape))
    return their_greedy_text(model, prompt_of(shape), N_NEW)


@pytest.mark.slow
def test_logits_of_transformers(example: Example) -> None:
    """1e-4 of the largest logit is what the project promises; see ROUNDING for what it reaches."""
    ids, expected = theirs(SHAPES.index(example.shape))
    assert largest(example.model.logits(ids) - expected) <= 1e-4 * largest(expected)


@pytest.mark.slow
def test_greedy_text_of_transformers(example: Example) -> None:
    assert example.ids == theirs(SHAPES.index(example.shape)).ids


# GPT-2 124M's sizes


FULL_SIZE = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}


class FullSize(NamedTuple):
    """A model of these sizes, and what transformers computes of it."""

    path: Path
    n_prompt: int
    theirs: Theirs


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FullSize]:
    """Random weights, of widths with which the greedy text is not one token again and again."""
    pytest.importorskip("torch", reason="needs torch and transformers, to compare with")
    pytest.importorskip("transformers", reason="needs torch and transformers, to compare with")
    folder = tmp_path_factory.mktemp("full_size")
    config = {**FULL_SIZE, "bos_token_id": None, "eos_token_id": None}
    weights = random_weights(config, seed=4)
    for name, array in weights.items():
        is_norm = array.ndim == 1 and name.endswith("weight")
        array *= 1 if is_norm else 0.3 if name.startswith("h.") and array.ndim == 2 else 0.1
    source = write_checkpoint(folder / "m", config, weights, tokenizer=False)
    tinygpt2.convert(source, folder / "m.tg2")
    (source / "model.safetensors").unlink()
    prompt = np.random.default_rng(0).integers(FULL_SIZE["vocab_size"], size=24).tolist()
    yield FullSize(
        folder / "m.tg2",
        len(prompt),
        their_greedy_text(transformers_model(config, weights), prompt, 8),
    )
    (folder / "m.tg2").unlink()


@pytest.mark.slow
def test_the_sizes_of_gpt2_124m(full_size: FullSize, backend: str) -> None:
    """The numbers of every tensor at its place: they are 124,439,808."""
    ids, expected = full_size.theirs
    prompt, answer = ids[: full_size.n_prompt], ids[full_size.n_prompt :]
    best = np.sort(expected[full_size.n_prompt - 1 : -1], axis=-1)
    assert (best[:, -1] - best[:, -2]).min() > 2e-4 * largest(expected)  # no close choice
    assert len(set(answer)) > 4
    with load(full_size.path, backend) as model:
        n_tensor_bytes = sum(tensor.stop - tensor.start for tensor in model.file.tensors.values())
        assert n_tensor_bytes == 4 * (124_439_808 + 15 * 768)  # wte is padded to whole panels
        assert largest(model.logits(ids) - expected) <= 1e-4 * largest(expected)
        found = model.generate_ids(prompt, max_new_tokens=len(answer), temperature=0)
        assert found == answer


# Trained models


@pytest.fixture
def trained(data: Path, tmp_path: Path, backend: str) -> Callable[[str], tinygpt2.Model]:
    """Converts and loads one of the trained checkpoints."""

    def load_trained(name: str) -> tinygpt2.Model:
        tinygpt2.convert(data / "checkpoints" / name, tmp_path / f"{name}.tg2")
        return load(tmp_path / f"{name}.tg2", backend)

    return load_trained


def adder_ids(a: int, b: int) -> list[int]:
    """The digits of two numbers and of their sum, which comes last digit first."""
    return [int(digit) for digit in f"{a:02}{b:02}" + f"{a + b:03}"[::-1]]


def best_after_each(model: tinygpt2.Model, texts: Sequence[list[int]]) -> Iterator[list[int]]:
    """The best token after each token of the texts, of which a pass computes several. (With more,
    NumPy would give its small products to two threads, which is slower.)"""
    backend, n_texts = model.backend, 7
    caches, workspace = [backend.new_cache() for _ in range(n_texts)], backend.new_workspace()
    for first in range(0, len(texts), n_texts):
        part = texts[first : first + n_texts]
        spans = [tinygpt2.Span(c, ids, 0, len(ids)) for c, ids in zip(caches, part)]
        best = backend.forward(workspace, spans).array().argmax(axis=1)
        yield from best.reshape(len(part), -1).tolist()


def check_adder(model: tinygpt2.Model, step: int) -> None:
    """If each digit is the best one after the right digits before it, then the greedy answer is
    right: one span for each sum shows it."""
    texts = [adder_ids(*divmod(number, 100)) for number in range(0, 10_000, step)]
    for ids, best in zip(texts, best_after_each(model, [ids[:6] for ids in texts])):
        assert best[3:] == ids[4:], ids


@pytest.mark.slow
def test_adder_knows_all_sums(trained: Callable[[str], tinygpt2.Model]) -> None:
    """10,000 of 10,000."""
    with trained("mingpt-adder") as model:
        check_adder(model, 1)


def test_adder_knows_sums(trained: Callable[[str], tinygpt2.Model]) -> None:
    with trained("mingpt-adder") as model:
        check_adder(model, 37)


def test_adder_generates_sums(trained: Callable[[str], tinygpt2.Model]) -> None:
    with trained("mingpt-adder") as model:
        for number in range(0, 10_000, 397):
            ids = adder_ids(*divmod(number, 100))
            assert model.generate_ids(ids[:4], max_new_tokens=3, temperature=0) == ids[4:], ids


def check_sorter(model: tinygpt2.Model, step: int) -> None:
    """See the adder."""
    texts = [[*each, *sorted(each)] for each in itertools.product(range(3), repeat=6)][::step]
    for ids, best in zip(texts, best_after_each(model, [ids[:11] for ids in texts])):
        assert best[5:] == ids[6:], ids


@pytest.mark.slow
def test_sorter_sorts_everything(trained: Callable[[str], tinygpt2.Model]) -> None:
    """729 of 729 texts of six letters."""
    with trained("llm-viz-sort") as model:
        check_sorter(model, 1)


def test_sorter_sorts(trained: Callable[[str], tinygpt2.Model]) -> None:
    with trained("llm-viz-sort") as model:
        check_sorter(model, 13)
        ids = model.generate_ids([2, 1, 0, 2, 0, 1], max_new_tokens=6, temperature=0)
        assert ids == [0, 0, 1, 1, 2, 2]


def stages(model: tinygpt2.Model, ids: list[int]) -> dict[str, np.ndarray]:
    """Every stage of a forward pass by the name that llm-viz gives it; those of block 0 singly."""
    t, backend = tinygpt2, numpy_backend(model)
    block, workspace = backend.blocks[0], backend.new_workspace()
    span = t.Span(backend.new_cache(), ids, 0, len(ids))
    s: dict[str, Any] = {"x": backend.embed(span)}
    s["ln1"] = backend.norm(s["x"], block, "ln_1")
    s["qkv"] = t.linear(s["ln1"], block["attn.c_attn.weight"], block["attn.c_attn.bias"])
    for name, part in zip("qkv", np.split(s["qkv"], 3, axis=1)):
        s[name] = t.split_heads(part, model.config.n_head)
    s["att"] = t.attention_scores(s["q"], s["k"], backend.attention_scale(0))
    s["attSm"] = t.softmax(s["att"])
    s["y"] = t.merge_heads(s["attSm"] @ s["v"])
    s["yProj"] = t.linear(s["y"], block["attn.c_proj.weight"], block["attn.c_proj.bias"])
    s["attnResid"] = s["x"] + s["yProj"]
    s["ln2"] = backend.norm(s["attnResid"], block, "ln_2")
    s["fc"] = t.linear(s["ln2"], block["mlp.c_fc.weight"], block["mlp.c_fc.bias"])
    s["gelu"] = backend.activation(s["fc"])
    s["mlp"] = t.linear(s["gelu"], block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
    s["mlpResid"] = s["attnResid"] + s["mlp"]
    x = s["x"]
    for i, block in enumerate(backend.blocks):
        x = x + backend.attention(i, block, backend.norm(x, block, "ln_1"), [span])
        s[f"block{i}"] = x = x + backend.mlp(block, backend.norm(x, block, "ln_2"))
    s["ln_f"] = backend.norm(x, backend.ln_f, "ln_f")
    s["lm_head"] = backend.forward(workspace, [span]).array()
    s["probs"] = t.softmax(s["lm_head"])
    return s


def published_array(published: dict[str, Any], name: str) -> np.ndarray:
    entry = published[name]
    assert entry["dtype"] == "torch.float32"
    return np.frombuffer(base64.b64decode(entry["data"]), "<f4").reshape(entry["shape"])


@pytest.mark.parametrize("backend", ["numpy"])
def test_every_stage_of_llm_viz(trained: Callable[[str], tinygpt2.Model], data: Path) -> None:
    """1e-5: what float32 leaves of numbers below 20; the exact-erf GELU would miss by 4.5e-3."""
    path = data / "checkpoints" / "llm-viz-sort" / "gpt-nano-sort-t0-partials.json"
    published = json.loads(path.read_text("utf-8"))
    with trained("llm-viz-sort") as model:
        batch = published_array(published, "idx").astype(int).tolist()
        found = [stages(model, ids) for ids in batch]
        wpe = numpy_backend(model).wpe
        np.testing.assert_array_equal(published_array(published, "pos_emb")[0], wpe)
    assert found[0].keys() == published.keys() - {"config", "idx", "tok_emb", "pos_emb"}
    for name in found[0]:
        expected = published_array(published, name)
        ours = np.stack([stage[name] for stage in found])
        masked = np.isneginf(expected)
        np.testing.assert_array_equal(np.isneginf(ours), masked, err_msg=name)
        assert masked.any() == (name == "att")
        np.testing.assert_allclose(ours[~masked], expected[~masked], 0, 1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ([0, 0, 0, 52], [204, 204, 204, 204, 204, 204]),
        ([0, 0, 195, 731], [731, 114, 114, 114, 114, 114]),
    ],
)
def test_greedy_texts_of_ort_genai(
    trained: Callable[[str], tinygpt2.Model], prompt: list[int], answer: list[int]
) -> None:
    with trained("ort-genai-tiny-random") as model:
        assert model.generate_ids(prompt, max_new_tokens=6, temperature=0) == answer


# GPT-2 124M, where there is one


@pytest.fixture
def gpt2(backend: str) -> Iterator[tinygpt2.Model]:
    path = os.environ.get("TINYGPT2_GPT2")
    if not path:
        pytest.skip("needs a converted GPT-2 124M, whose path TINYGPT2_GPT2 names")
    with load(path, backend) as model:
        yield model


@pytest.fixture
def published(data: Path) -> dict[str, Any]:
    text = (data / "published" / "gpt2-124m.json").read_text("utf-8")
    values: dict[str, Any] = json.loads(text)
    return values


def test_greedy_texts_of_gpt2(gpt2: tinygpt2.Model, published: dict[str, Any]) -> None:
    for entry in published["greedy"]:
        prompt = gpt2.tokens_of(entry.get("prompt_ids") or entry["prompt"], False, True)
        expected = gpt2.tokens_of(entry.get("ids") or entry["text"], False, True)
        found = gpt2.generate_ids(prompt, max_new_tokens=len(expected), temperature=0)
        assert found == expected, entry


def test_logits_of_gpt2(gpt2: tinygpt2.Model, published: dict[str, Any]) -> None:
    """1e-4 of the largest logit, as everywhere in float32."""
    for entry in published["logits"]:
        logits = gpt2.logits(entry["ids"])
        tolerance = 1e-4 * largest(logits)
        np.testing.assert_allclose(logits[0, :8], entry["position_0_first_8"], 0, tolerance)
        assert logits.mean() == pytest.approx(entry["mean_of_all"], abs=tolerance)


def test_loss_of_gpt2(gpt2: tinygpt2.Model, published: dict[str, Any], data: Path) -> None:
    """The loss of four rows of 64 tokens, to the five digits that runtimes agree on."""
    text = (data / "corpus" / "tinyshakespeare.txt").read_text("utf-8")[:4000]
    ids = [i for part in text.split("\n\n") for i in [50256, *gpt2.encode(part + "\n\n")]]
    losses = []
    for row in range(4):
        logits = gpt2.logits(ids[64 * row : 64 * (row + 1)]).astype(np.float64)
        chosen = logits[np.arange(64), ids[64 * row + 1 : 64 * (row + 1) + 1]]
        losses.append((np.log(np.exp(logits - logits.max()).sum(1)) + logits.max() - chosen).mean())
    assert np.mean(losses) == pytest.approx(published["loss"][0]["loss"], rel=1e-5)


# Rules that hold for every GPT-2


def test_later_tokens_change_nothing_before(example: Example) -> None:
    """Exactly: each row of a product and each masked sum is computed from the same numbers, in
    the same order, whatever stands in the rows after it."""
    size = example.config["vocab_size"]
    changed = example.ids[:100] + [(i + 1) % size for i in example.ids[100:]]
    logits = example.model.logits(changed)
    np.testing.assert_array_equal(logits[:100], example.logits[:100])
    assert (logits[100:] != example.logits[100:]).any(axis=1).all()


@pytest.mark.parametrize("backend_of_example", ["numpy"], indirect=True, scope="module")
def test_mlp_takes_each_token_by_itself(example: Example) -> None:
    """The order of rows decides only which part of a product does them: 1e-6 for rounding."""
    backend = numpy_backend(example.model)
    x = np.random.default_rng(0).standard_normal((60, example.config["n_embd"]), np.float32)
    order = np.random.default_rng(1).permutation(60)
    for block in backend.blocks:
        y = backend.mlp(block, x)
        np.testing.assert_allclose(backend.mlp(block, x[order]), y[order], 0, 1e-6 * largest(y))
        np.testing.assert_allclose(backend.mlp(block, x[:1]), y[:1], 0, 1e-6 * largest(y))


def rows_alone(model: tinygpt2.Model, text: list[int], wanted: int) -> np.ndarray:
    return model.logits(text)[len(text) - wanted :]


def test_rows_of_a_pass_over_several_texts(example: Example) -> None:
    """Spans of different lengths and starts: the wanted rows of each, in order, and no others.

    In C they are the same bits as alone; in NumPy only rounding differs.
    """
    backend, ids = example.model.backend, example.ids
    texts = [(ids[:20], 0, 3), (ids[5:12], 6, 1), (ids[40:60], 13, 7), (ids[:9], 2, 0)]
    workspace = backend.new_workspace()
    caches = [backend.new_cache() for _ in texts]
    for cache, (text, start, _) in zip(caches, texts):
        if start:
            before = backend.forward(workspace, [tinygpt2.Span(cache, text[:start], 0, 0)])
            assert before.array().shape == (0, example.shape.vocab_size)
    spans = [tinygpt2.Span(c, text[s:], s, wanted) for c, (text, s, wanted) in zip(caches, texts)]
    logits = backend.forward(workspace, spans)
    found = logits.array()
    expected = np.concatenate([rows_alone(example.model, text, n) for text, _, n in texts])
    assert found.shape == (3 + 1 + 7, example.shape.vocab_size)
    if backend.name == "c":
        np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))
    assert largest(found - expected) <= ROUNDING * largest(expected)
    logprobs = expected.astype(np.float64)
    logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
    for row in (0, 3, 10):
        kept = backend.kept(workspace, logits.keep(row))
        assert kept.array().tolist() == found[row : row + 1].tolist()
        ((token, logprob),) = logits.top(row, 1)
        assert token == found[row].argmax()
        assert logprob == logits.logprob(row, token) == kept.logprob(0, token)
        assert logprob == pytest.approx(logprobs[row, token], abs=1e-4 * largest(expected))


def test_logits_are_refused_after_the_next_pass(example: Example) -> None:
    """Old numbers are never read as new ones."""
    backend, sampler = example.model.backend, tinygpt2.Sampler(tinygpt2.Options(), [])
    workspace, cache = backend.new_workspace(), backend.new_cache()
    old = backend.forward(workspace, [tinygpt2.Span(cache, [1, 2], 0, 2)])
    kept = old.keep(1)
    backend.forward(workspace, [tinygpt2.Span(cache, [2], 2, 1)])
    uses: list[Callable[[], object]] = [
        lambda: old.choose(0, sampler, 2),
        lambda: old.logprob(0, 1),
        lambda: old.top(0, 1),
        old.array,
        lambda: old.keep(0),
    ]
    for use in uses:
        with pytest.raises(tinygpt2.StateError, match="a later pass has replaced them"):
            use()
    assert backend.kept(workspace, kept).array().shape == (1, example.shape.vocab_size)


def test_a_prompt_longer_than_a_pass(tmp_path: Path, backend: str) -> None:
    """The passes before the last one compute no logits."""
    config = {**TOY, "n_positions": 600}
    ids = np.random.default_rng(0).integers(TOY["vocab_size"], size=590).tolist()
    with model_of(tmp_path, config, random_weights(config), backend) as model:
        assert model.backend.chunk < len(ids)
        best = model.logits(ids)[-1].argmax()
        assert model.generate_ids(ids, max_new_tokens=1, temperature=0) == [best]


# Threads of NumPy's matrix library

NUMPY_THREADS = """
import importlib.abc, json, os, sys
path, threads, environ, can_limit = json.loads(sys.argv[1])
names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
for name in (*names, "OMP_NUM_THREADS", "TINYGPT2_THREADS"):
    os.environ.pop(name, None)
os.environ.update(environ)
before = dict(os.environ)
if not can_limit:
    sys.modules["threadpoolctl"] = None
import tinygpt2
seen = []

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "numpy":
            seen.append([os.environ.get(name) for name in names])

sys.meta_path.insert(0, Watch())
with tinygpt2.load(path, backend="numpy", threads=threads) as model:
    model.logits([1] * 60)
    described = model.backend.describe()
is_linux = os.path.isdir("/proc/self/task")
tasks = len(os.listdir("/proc/self/task")) if is_linux else None
with tinygpt2.load(path, backend="numpy", threads=7) as model:
    again = model.backend.describe()
print(json.dumps([*seen, described, again, tasks, os.environ == before]))
"""


class Told(NamedTuple):
    """What NumPy's import sees when this was said."""

    threads: int | None
    environ: dict[str, str]
    seen: str | None  # the number of threads in the three variables; None if they were left alone
    is_wide: bool = True


TOLD = [
    Told(1, {"OPENBLAS_NUM_THREADS": "2"}, "1"),
    Told(3, {"TINYGPT2_THREADS": "2"}, "3"),
    Told(None, {"TINYGPT2_THREADS": "2", "MKL_NUM_THREADS": "5"}, "2"),
    Told(None, {}, str(tinygpt2.available_processors())),
    Told(None, {"OPENBLAS_NUM_THREADS": "2"}, None),
    Told(None, {"OMP_NUM_THREADS": "2"}, None),
    Told(3, {}, "1", is_wide=False),
]


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that gets several threads."""
    folder = tmp_path_factory.mktemp("wide")
    config = {**TOY, "n_embd": tinygpt2.WIDE, "n_layer": 1, "n_head": 8, "n_inner": 16}
    model_of(folder, config, random_weights(config), "numpy").close()
    return folder / "m.tg2"


@pytest.mark.slow
@pytest.mark.parametrize("told", TOLD, ids=str)
def test_threads_of_numpy(toy_path: Path, wide_path: Path, told: Told) -> None:
    """They are asked for while NumPy is imported, and never afterwards; the environment stays."""
    path = str(wide_path if told.is_wide else toy_path)
    done = run_python(NUMPY_THREADS, json.dumps([path, *told[:2], False]))
    assert done.returncode == 0, done.stderr
    seen, described, again, tasks, is_unchanged = json.loads(done.stdout)
    assert is_unchanged
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    assert seen == [told.seen or told.environ.get(name) for name in names]
    own = "threads as NumPy was loaded with" if told.seen is None else f"{told.seen} threads"
    assert described == again == f"numpy ({own})"
    assert told.seen != "1" or tasks in (1, None)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, None])
def test_threadpoolctl_leaves_no_trace_in_the_environment(
    wide_path: Path, threadpoolctl: Any, threads: int | None
) -> None:
    """Its import sets a variable for other libraries. A number that was told is kept, too."""
    done = run_python(NUMPY_THREADS, json.dumps([str(wide_path), threads, {}, True]))
    assert done.returncode == 0, done.stderr
    *_, tasks, is_unchanged = json.loads(done.stdout)
    assert is_unchanged
    assert threads != 1 or tasks in (1, None)


def test_a_wrong_number_of_threads_in_the_environment(
    toy_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error in both backends, also when NumPy has been imported before."""
    monkeypatch.setenv("TINYGPT2_THREADS", "nonsense")
    with pytest.raises(tinygpt2.InputError, match=r"TINYGPT2_THREADS: expected .* 'nonsense'"):
        load(toy_path, backend)


def set_threads(libraries: Sequence[Any], numbers: Sequence[int]) -> None:
    """In a thread that ends: OpenBLAS listens to one thread as long as that one lives."""

    def work() -> None:
        for library, number in zip(libraries, numbers):
            library.set_num_threads(number)

    in_threads([work])


@pytest.fixture
def threadpoolctl() -> Iterator[Any]:
    """The package, and four threads for NumPy's matrix library."""
    module = pytest.importorskip("threadpoolctl", reason="limits threads with threadpoolctl")
    blas = module.ThreadpoolController().select(user_api="blas").lib_controllers
    if not blas:
        pytest.skip("threadpoolctl does not know the matrix library of this NumPy")
    before = [library.num_threads for library in blas]
    set_threads(blas, [4] * len(blas))
    yield module
    set_threads(blas, before)


def blas_threads(threadpoolctl: Any) -> int:
    libraries = threadpoolctl.ThreadpoolController().select(user_api="blas").info()
    return max(int(entry["num_threads"]) for entry in libraries)


def test_a_pass_limits_threads_and_gives_them_back(threadpoolctl: Any) -> None:
    blas = tinygpt2.BlasThreads(threadpoolctl, None)
    for most in (1, 3, 9):  # never more than there were
        with blas.limited(most):
            assert blas_threads(threadpoolctl) == min(4, most)
        assert blas_threads(threadpoolctl) == 4
    with pytest.raises(KeyError), blas.limited(2):
        raise KeyError
    assert blas_threads(threadpoolctl) == 4


def test_passes_of_several_threads_take_turns(threadpoolctl: Any) -> None:
    """Otherwise one would give back the limit of another, which would stay for ever."""
    blas = tinygpt2.BlasThreads(threadpoolctl, None)
    seen: list[tuple[int, int, int]] = []

    def run(most: int) -> None:
        for _ in range(20):
            with blas.limited(most):
                first = blas_threads(threadpoolctl)
                time.sleep(0.001)
                seen.append((most, first, blas_threads(threadpoolctl)))

    in_threads([functools.partial(run, most) for most in (1, 2, 3)])
    assert set(seen) == {(most, most, most) for most in (1, 2, 3)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_during_a_pass_of_another_thread(threadpoolctl: Any) -> None:
    """It computes, and does not wait for a thread that it does not have."""
    blas = tinygpt2.BlasThreads(threadpoolctl, None)
    has_begun, may_end = threading.Event(), threading.Event()

    def run() -> None:
        with blas.limited(1):
            has_begun.set()
            may_end.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    has_begun.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        with blas.limited(1):
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    may_end.set()
    thread.join(60)


@pytest.mark.parametrize(
    ("rows", "threads"), [(tinygpt2.MANY_ROWS - 1, 1), (tinygpt2.MANY_ROWS, 3)]
)
def test_small_passes_take_one_thread(
    toy_path: Path, wide_path: Path, threadpoolctl: Any, rows: int, threads: int
) -> None:
    for path, expected in ((wide_path, threads), (toy_path, 1)):
        seen: list[int] = []
        with tinygpt2.load(path, backend="numpy", threads=3) as model:
            backend: Any = model.backend
            backend.blas = tinygpt2.BlasThreads(threadpoolctl, None)
            activation = backend.activation

            def watch(x: Any, activation: Any = activation, seen: list[int] = seen) -> Any:
                seen.append(blas_threads(threadpoolctl))
                return activation(x)

            backend.activation = watch
            model.logits([1] * rows)
            assert backend.describe() == f"numpy (at most {3 if path == wide_path else 1} threads)"
        assert seen == [expected] * len(seen)
        assert seen
        assert blas_threads(threadpoolctl) == 4


def test_tied_head_is_the_embedding(tmp_path: Path, backend: str) -> None:
    """An untied head with the embedding's numbers gives the same bits, another one does not."""
    weights = random_weights(TOY)
    ids = list(range(0, 300, 7))
    with model_of(tmp_path, TOY, weights, backend) as model:
        tied = model.logits(ids)
    for head, same in ((weights["wte.weight"], True), (weights["wte.weight"] + 1, False)):
        untied = {**weights, "lm_head.weight": head}
        with model_of(tmp_path, {**TOY, **UNTIED}, untied, backend) as model:
            assert np.array_equal(model.logits(ids), tied) is same


def test_loss_of_a_new_model_is_the_log_of_its_vocabulary(tmp_path: Path, backend: str) -> None:
    """Before training all tokens are about equally likely. 0.05: logits have a deviation of 0.1."""
    weights = random_weights(TOY)
    for name, array in weights.items():
        if name.endswith("bias"):
            array[:] = 0
        elif ".ln_" in name or name.startswith("ln_"):
            array[:] = 1
        else:
            array *= 0.1  # to GPT-2's deviation of 0.02
    ids = np.random.default_rng(0).integers(TOY["vocab_size"], size=500).tolist()
    with model_of(tmp_path, {**TOY, "eos_token_id": 0}, weights, backend) as model:
        score = model.score(ids)
    assert len(score.logprobs) == 500
    assert -score.total / 500 == pytest.approx(math.log(TOY["vocab_size"]), abs=0.05)
    assert score.perplexity == pytest.approx(TOY["vocab_size"], rel=0.05)


# The parts against float64


def panels_of(matrix: np.ndarray) -> np.ndarray:
    """A matrix [k, n] in panels [ceil(n/16), k, 16], one number at a time."""
    k, n = matrix.shape
    panels = np.zeros((-(-n // 16), k, 16), np.float32)
    for i, j in itertools.product(range(k), range(n)):
        panels[j // 16, i, j % 16] = matrix[i, j]
    return panels


@pytest.mark.table
@pytest.mark.parametrize("rows", [1, 2, 16, 47, 48, 49, 130])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 16), (33, 17), (20, 129), (7, 300)])
def test_linear(rows: int, k: int, n: int) -> None:
    """1e-6 for each of the k products that are summed."""
    random = np.random.default_rng(0)
    x, w = random.standard_normal((rows, k), np.float32), random.standard_normal((k, n), np.float32)
    bias = random.standard_normal(n, np.float32)
    found = tinygpt2.linear(x, panels_of(w), bias)
    assert (found.shape, found.dtype) == ((rows, n), np.float32)
    expected = x.astype(np.float64) @ w.astype(np.float64) + bias
    np.testing.assert_allclose(found, expected, 0, 1e-6 * (k + 1))


def exact_gelu(x: float) -> float:
    return x * math.erfc(-x / math.sqrt(2)) / 2


def exact_gelu_new(x: float) -> float:
    return x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (tinygpt2.gelu, exact_gelu),
        (tinygpt2.gelu_new, exact_gelu_new),
        (tinygpt2.relu, lambda x: max(x, 0.0)),
    ],
    ids=["gelu", "gelu_new", "relu"],
)
def test_activations(
    function: Callable[[np.ndarray], np.ndarray], expected: Callable[[float], float]
) -> None:
    """1e-6, and 1e-6 of large numbers. GELU and its tanh form differ by up to 4.7e-4."""
    x = np.concatenate([np.linspace(-12, 12, 6001), [-100, 100, -1e4, 1e4]]).astype(np.float32)
    before = x.copy()
    found = function(x)
    np.testing.assert_array_equal(x, before)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [expected(v) for v in x.tolist()], 1e-6, 1e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_layer_norm(offset: float, scale: float) -> None:
    """1e-5 of results of about 3, of numbers near 0; the mean costs digits where it is large."""
    random = np.random.default_rng(0)
    x = (offset * scale + scale * random.standard_normal((5, 33))).astype(np.float32)
    weight, bias = random.standard_normal((2, 33), np.float32)
    found = tinygpt2.layer_norm(x, weight, bias, 1e-5)
    y = x.astype(np.float64)
    y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, y * weight + bias, 0, 1e-5 * (1 + offset))


def test_softmax() -> None:
    """1e-6: probabilities, so relative to 1. Large scores and masked ones are no exception."""
    random = np.random.default_rng(0)
    x = (10 * random.standard_normal((4, 50))).astype(np.float32)
    x[1] += 3e4
    x[2, 1:] = -np.inf
    x[3] -= 3e4
    found = tinygpt2.softmax(x)
    y = x.astype(np.float64)
    e = np.exp(y - y.max(axis=1, keepdims=True))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, e / e.sum(1, keepdims=True), 0, 1e-6)
    np.testing.assert_array_equal(found[2], [1.0] + [0.0] * 49)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (3, 3), (3, 8), (8, 8)])
def test_attention_scores(queries: int, keys: int) -> None:
    """1e-6 for each of the five products; a query sees its own position and those before it."""
    random = np.random.default_rng(0)
    q = random.standard_normal((2, queries, 5), np.float32)
    k = random.standard_normal((2, keys, 5), np.float32)
    found = tinygpt2.attention_scores(q, k, 0.25)
    assert (found.shape, found.dtype) == ((2, queries, keys), np.float32)
    for head, i, j in np.ndindex(found.shape):
        if j > keys - queries + i:
            assert found[head, i, j] == -np.inf
        else:
            expected = 0.25 * math.fsum(
                a * b for a, b in zip(q[head, i].tolist(), k[head, j].tolist())
            )
            assert found[head, i, j] == pytest.approx(expected, abs=5e-6)


def test_heads() -> None:
    x = np.arange(24).reshape(4, 6)
    heads = tinygpt2.split_heads(x, 3)
    np.testing.assert_array_equal(heads[1], x[:, 2:4])
    np.testing.assert_array_equal(tinygpt2.merge_heads(heads), x)


# The default model


@pytest.fixture
def tales(tales_path: Path) -> Iterator[tinygpt2.Model]:
    if not tales_path.exists():
        pytest.skip("the default model, vendor/tales.tg2, is not there")
    with tinygpt2.load() as model:
        yield model


def test_default_model_tells_a_tale(tales: tinygpt2.Model) -> None:
    text = tales.generate("Once upon a time", max_new_tokens=60, seed=1)
    again, other = (tales.generate("Once upon a time", max_new_tokens=20, seed=s) for s in (1, 2))
    assert text.startswith(again)
    assert not text.startswith(other)
    assert "\ufffd" not in text
    assert sum(letter.isascii() for letter in text) > 0.95 * len(text) > 100
    words = text.split()
    assert sum(word.strip(".,;:!?'\"-").isalpha() for word in words) > 0.8 * len(words)
    assert 3 < np.mean([len(word) for word in words]) < 7


@pytest.mark.slow
def test_default_model_has_read_tales(tales: tinygpt2.Model, data: Path) -> None:
    """A held-out book, unwrapped and with the quotes that the model knows.

    This passage measures 1.52 bits per byte; letters by their frequency alone take about 4.2.
    """
    text = (data / "corpus" / "peter-pan.txt").read_text("utf-8")
    quotes = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2014: "--"}
    passage = re.sub(r"(?<!\n)\n(?!\n)", " ", text[20_000:40_000].translate(quotes))
    assert tales.score(passage).bits_per_byte < 1.55
