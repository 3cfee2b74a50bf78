"""Checkpoints of nanoGPT, minGPT, makemore and llm.c, and pytorch_model.bin: the logits and the ids
of the model that was trained, or a refusal that says why.

The modules below are our own. Their tensors have the names, layouts and ties of those programs, and
each is saved as its program does it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import (
    END,
    Late,
    largest,
    random_weights,
    run_python,
    toy_tokenizer,
    write_checkpoint,
    write_safetensors,
)
from test_cli import call, check_failure

import tinygpt2
from tinygpt2 import FormatError, InputError

torch = Late("torch")
TEXT = (
    "the quick brown fox jumps over the lazy dög; où est le café? "
    "the dög sleeps — 東京 is far, and the fox is quick.\n"
) * 20
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48}
N_BPE = 320  # rows of the embedding; the tokenizer has fewer tokens


# ------------------------------------------------------------------------------------------------
# The models
# ------------------------------------------------------------------------------------------------


def tanh_gelu(x: Any) -> Any:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x: Any) -> Any:
    return torch.nn.functional.gelu(x)


def new_module(**parts: Any) -> Any:
    """A module with these parts; None registers an absent parameter."""
    module = torch.nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def new_norm(n: int, bias: bool) -> Any:
    norm = torch.nn.LayerNorm(n)
    if not bias:
        norm.register_parameter("bias", None)
    return norm


def attend(q: Any, k: Any, v: Any, n_head: int) -> Any:
    """Causal attention of [batch, time, width] in heads."""
    batch, time, width = q.shape
    q, k, v = [x.view(batch, time, n_head, -1).transpose(1, 2) for x in (q, k, v)]
    scores = q @ k.transpose(-2, -1) / math.sqrt(width // n_head)  # [batch, head, time, time]
    later = torch.ones(time, time, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(batch, time, width)


class Trained(NamedTuple):
    """A model, how it computes, and the lists of its characters."""

    module: Any
    forward: Callable[[Any], Any]
    args: dict[str, Any]
    stoi: dict[str, int]


def gpt(
    vocab_size: int,
    gelu: Any = exact_gelu,
    bias: bool = True,
    tied: bool = True,
    mask: bool = False,
) -> tuple[Any, Callable[[Any], Any]]:
    """The names of nanoGPT, and of minGPT and makemore, which store a mask and do not tie."""
    nn, n, n_head = torch.nn, SIZES["n_embd"], SIZES["n_head"]
    size = SIZES["block_size"]

    def block() -> Any:
        attention = new_module(
            c_attn=nn.Linear(n, 3 * n, bias=bias), c_proj=nn.Linear(n, n, bias=bias)
        )
        if mask:
            attention.register_buffer("bias", torch.ones(size, size).tril()[None, None])
        mlp = new_module(c_fc=nn.Linear(n, 4 * n, bias=bias), c_proj=nn.Linear(4 * n, n, bias=bias))
        norms = {name: new_norm(n, bias) for name in ("ln_1", "ln_2")}
        return new_module(ln_1=norms["ln_1"], attn=attention, ln_2=norms["ln_2"], mlp=mlp)

    transformer = new_module(
        wte=nn.Embedding(vocab_size, n),
        wpe=nn.Embedding(size, n),
        h=nn.ModuleList([block() for _ in range(SIZES["n_layer"])]),
        ln_f=new_norm(n, bias),
    )
    module = new_module(transformer=transformer, lm_head=nn.Linear(n, vocab_size, bias=False))
    if tied:
        transformer.wte.weight = module.lm_head.weight

    def forward(ids: Any) -> Any:
        x = transformer.wte(ids) + transformer.wpe(torch.arange(ids.shape[1]))
        for part in transformer.h:
            q, k, v = part.attn.c_attn(part.ln_1(x)).split(n, dim=2)
            mixed = attend(q, k, v, n_head)
            x = x + part.attn.c_proj(mixed)
            x = x + part.mlp.c_proj(gelu(part.mlp.c_fc(part.ln_2(x))))
        return module.lm_head(transformer.ln_f(x))

    return module, forward


def older_mingpt(vocab_size: int) -> tuple[Any, Callable[[Any], Any]]:
    """The names of minGPT until 2021: three matrices for attention, a mask, positions [1, T, C]."""
    nn, n, size = torch.nn, SIZES["n_embd"], SIZES["block_size"]

    def block() -> Any:
        linear = {name: nn.Linear(n, n) for name in ("key", "query", "value", "proj")}
        attention = new_module(**linear)
        attention.register_buffer("mask", torch.ones(size, size).tril()[None, None])
        mlp = nn.Sequential(nn.Linear(n, 4 * n), nn.GELU(), nn.Linear(4 * n, n), nn.Dropout(0.1))
        return new_module(ln1=nn.LayerNorm(n), ln2=nn.LayerNorm(n), attn=attention, mlp=mlp)

    module = new_module(
        tok_emb=nn.Embedding(vocab_size, n),
        pos_emb=nn.Parameter(0.1 * torch.randn(1, size, n)),
        blocks=nn.Sequential(*[block() for _ in range(SIZES["n_layer"])]),
        ln_f=nn.LayerNorm(n),
        head=nn.Linear(n, vocab_size, bias=False),
    )

    def forward(ids: Any) -> Any:
        x = module.tok_emb(ids) + module.pos_emb[:, : ids.shape[1]]
        for part in module.blocks:
            a, y = part.attn, part.ln1(x)
            x = x + a.proj(attend(a.query(y), a.key(y), a.value(y), SIZES["n_head"]))
            x = x + part.mlp(part.ln2(x))
        return module.head(module.ln_f(x))

    return module, forward


def train(module: Any, forward: Callable[[Any], Any], ids: list[int]) -> None:
    """Some steps, in which the loss must fall."""
    data, size = torch.tensor(ids), SIZES["block_size"]
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    module.train()
    losses = []
    for _ in range(150):
        starts = torch.randint(len(data) - size, (4,), generator=random).tolist()
        rows = torch.stack([data[start : start + size + 1] for start in starts])
        logits = forward(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    module.eval()
    assert losses[-1] < 0.7 * losses[0]


def bpe_ids(folder: Path) -> list[int]:
    tokenizers = pytest.importorskip("tokenizers", reason="encodes the text")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return tokenizers.ByteLevelBPETokenizer(*files).encode(TEXT).ids  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    vocab, merges = toy_tokenizer()
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), "utf-8")
    return folder


@pytest.fixture(scope="session")
def trained(bpe_folder: Path) -> Callable[[str], Trained]:
    """A trained model of a kind; each is trained once."""
    models: dict[str, Trained] = {}
    characters = sorted(set(TEXT))
    kinds: dict[str, Callable[[int], tuple[Any, Callable[[Any], Any]]]] = {
        "nanoGPT": gpt,
        "nanoGPT bpe": gpt,
        "nanoGPT without bias": lambda size: gpt(size, bias=False),
        "nanoGPT of January 2023": lambda size: gpt(size, tanh_gelu, mask=True),
        "minGPT": lambda size: gpt(size, tanh_gelu, tied=False, mask=True),
        "makemore": lambda size: gpt(size, tanh_gelu, tied=False, mask=True),
        "older minGPT": older_mingpt,
    }

    def build(kind: str) -> Trained:
        torch.manual_seed(7)
        torch.set_num_threads(1)  # of so little work, more threads make more
        first = 1 if kind == "makemore" else 0
        stoi = {character: first + i for i, character in enumerate(characters)}
        ids = bpe_ids(bpe_folder) if kind.endswith("bpe") else [stoi[c] for c in TEXT]
        size = N_BPE if kind.endswith("bpe") else first + len(characters)
        module, forward = kinds[kind](size)
        train(module, forward, ids)
        args = {**SIZES, "vocab_size": size, "bias": "without" not in kind, "dropout": 0.2}
        if kind.endswith("2023"):
            del args["bias"]
        return Trained(module, forward, args, stoi)

    def get(kind: str) -> Trained:
        if kind not in models:
            models[kind] = build(kind)
        return models[kind]

    return get


def nanogpt_checkpoint(model: Trained, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """What nanoGPT's train.py saves."""
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=1e-3)
    return {
        "model": model.module.state_dict() if state is None else state,
        "optimizer": optimizer.state_dict(),
        "model_args": model.args,
        "iter_num": 40,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "n_head": 4, "compile": True},
    }


def check_logits(path: Path, model: Trained) -> None:
    """Against the trained module, for random ids of every length up to the context's."""
    random = np.random.default_rng(3)
    with tinygpt2.load(path, backend="numpy") as ours:
        assert ours.config.n_positions == SIZES["block_size"]
        for length in (1, 2, 9, SIZES["block_size"]):
            ids = random.integers(0, model.args["vocab_size"], length).tolist()
            with torch.no_grad():
                expected = model.forward(torch.tensor([ids]))[0].numpy()
            assert largest(ours.logits(ids) - expected) <= 1e-5 * largest(expected)


def write_characters(path: Path, model: Trained) -> Path:
    path.write_text(json.dumps({"stoi": model.stoi}), "utf-8")
    return path


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    with caplog.at_level(logging.WARNING, "tinygpt2"):
        yield lambda: "\n".join(r.getMessage() for r in caplog.records if r.name == "tinygpt2")


# ------------------------------------------------------------------------------------------------
# One command
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        ("nanoGPT", "gelu"),
        ("nanoGPT without bias", "gelu"),
        ("nanoGPT of January 2023", "gelu_new"),
        ("minGPT", "gelu_new"),
        ("makemore", "gelu_new"),
        ("older minGPT", "gelu"),
    ],
)
def test_one_command(
    tmp_path: Path, trained: Callable[[str], Trained], kind: str, activation: str
) -> None:
    model = trained(kind)
    tells = kind.startswith("nano")
    saved = nanogpt_checkpoint(model) if tells else model.module.state_dict()
    torch.save(saved, tmp_path / "model.pt")
    characters = write_characters(tmp_path / "characters.json", model)
    out, heads = tmp_path / "mine.tg2", [] if tells else ["--heads", "4"]
    source = str(tmp_path / "model.pt")
    result = call("convert", source, "-o", str(out), "--tokenizer", str(characters), *heads)
    assert (result.code, result.out) == (0, "")
    assert f"note: {source}: it does not tell the activation; {activation} is taken" in result.err
    check_logits(out, model)
    with tinygpt2.load(out) as ours:
        ids = [model.stoi[character] for character in TEXT[:150]]
        assert ours.encode(TEXT[:150]) == ids
        assert ours.decode(ids) == TEXT[:150]
        config = ours.config
        assert (config.activation_function, config.n_head) == (activation, 4)
        assert config.tie_word_embeddings == tells
        ends = (0, (0,)) if kind == "makemore" else (None, ())
        assert (config.bos_token_id, config.eos_token_ids) == ends


@pytest.mark.slow
def test_bpe_with_a_padded_vocabulary(
    tmp_path: Path, trained: Callable[[str], Trained], bpe_folder: Path
) -> None:
    model = trained("nanoGPT bpe")
    torch.save(nanogpt_checkpoint(model), tmp_path / "ckpt.pt")
    out = tmp_path / "m.tg2"
    tinygpt2.convert(tmp_path / "ckpt.pt", out, tokenizer=bpe_folder)
    check_logits(out, model)
    end = toy_tokenizer()[0][END]
    with tinygpt2.load(out) as ours:
        assert ours.encode(TEXT) == bpe_ids(bpe_folder)
        assert (ours.config.bos_token_id, ours.config.eos_token_ids) == (end, (end,))
        assert ours.decode([N_BPE - 1]) == ""
        assert ours.config.vocab_size == N_BPE


@pytest.mark.slow
def test_tokens_without_a_tokenizer(
    tmp_path: Path, trained: Callable[[str], Trained], notes: Callable[[], str]
) -> None:
    model = trained("nanoGPT bpe")
    torch.save(nanogpt_checkpoint(model), tmp_path / "ckpt.pt")
    tinygpt2.convert(tmp_path / "ckpt.pt", tmp_path / "m.tg2")
    check_logits(tmp_path / "m.tg2", model)
    assert "no tokenizer" in notes()


# ------------------------------------------------------------------------------------------------
# How a file holds its tensors
# ------------------------------------------------------------------------------------------------


def compiled(model: Trained) -> dict[str, Any]:
    """The names of a compiled module; nothing is compiled before its first pass."""
    state = torch.compile(model.module).state_dict()
    assert all(name.startswith("_orig_mod.") for name in state)
    return state  # type: ignore[no-any-return]


def prefixed(prefix: str) -> Callable[[Trained], dict[str, Any]]:
    return lambda model: {prefix + n: t for n, t in model.module.state_dict().items()}


def strided(model: Trained) -> dict[str, Any]:
    """Matrices whose rows are not beside each other."""
    state = {name: tensor.detach() for name, tensor in model.module.state_dict().items()}
    return {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in state.items()}


STATES: dict[str, Callable[[Trained], dict[str, Any]]] = {
    "compiled": compiled,
    "distributed": prefixed("module."),
    "distributed and compiled": prefixed("module._orig_mod."),
    "in a module": prefixed("model."),
    "strided": strided,
    "double": lambda model: {n: t.double() for n, t in model.module.state_dict().items()},
    "parameters": lambda model: {
        n: torch.nn.Parameter(t) for n, t in model.module.state_dict().items()
    },
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile
@pytest.mark.parametrize("kind", ["nanoGPT", "older minGPT"])
@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_states(tmp_path: Path, trained: Callable[[str], Trained], kind: str, change: Any) -> None:
    model = trained(kind)
    torch.save(change(model), tmp_path / "ckpt.pt")
    tinygpt2.convert(tmp_path / "ckpt.pt", tmp_path / "m.tg2", heads=4)
    check_logits(tmp_path / "m.tg2", model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path: Path, trained: Callable[[str], Trained], dtype: str) -> None:
    """Rounded here and there: the files are the same, bit for bit."""
    state = trained("minGPT").module.state_dict()
    halves = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    torch.save(halves, tmp_path / "half.pt")
    torch.save({name: tensor.float() for name, tensor in halves.items()}, tmp_path / "full.pt")
    for name in ("half", "full"):
        tinygpt2.convert(tmp_path / f"{name}.pt", tmp_path / f"{name}.tg2", heads=4)
    assert (tmp_path / "half.tg2").read_bytes() == (tmp_path / "full.tg2").read_bytes()


NESTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": torch.tensor(1.0)},
    "model in module": lambda state: {"module": {"model": state}},
}


@pytest.mark.slow
@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_nests(tmp_path: Path, trained: Callable[[str], Trained], nest: Any) -> None:
    model = trained("nanoGPT")
    torch.save(nest(model.module.state_dict()), tmp_path / "ckpt.pt")
    tinygpt2.convert(tmp_path / "ckpt.pt", tmp_path / "m.tg2", heads=4)
    check_logits(tmp_path / "m.tg2", model)


@pytest.mark.slow
def test_a_file_as_before_pytorch_1_6(tmp_path: Path, trained: Callable[[str], Trained]) -> None:
    model = trained("older minGPT")
    path = tmp_path / "model.pt"
    torch.save(model.module.state_dict(), path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:2] == b"\x80\x02"
    tinygpt2.convert(path, tmp_path / "m.tg2", heads=4)
    check_logits(tmp_path / "m.tg2", model)


PEAK = """
import re, sys, tinygpt2
tinygpt2.convert(sys.argv[1], sys.argv[2], heads=4)
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_optimizer_is_not_read(tmp_path: Path, trained: Callable[[str], Trained]) -> None:
    peaks = []
    for size in (1, 40_000_000):
        path = tmp_path / f"{size}.pt"
        saved = nanogpt_checkpoint(trained("nanoGPT"))
        torch.save({**saved, "optimizer": {"state": {0: torch.zeros(size)}}}, path)
        done = run_python(PEAK, path, tmp_path / "m.tg2")
        peaks.append(int(done.stdout))
        path.unlink()
    assert peaks[1] - peaks[0] < 40_000  # kB, where the file has 160,000 more


# ------------------------------------------------------------------------------------------------
# What the file does not tell
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_number_of_heads_is_asked_for(
    tmp_path: Path, trained: Callable[[str], Trained]
) -> None:
    model = trained("minGPT")
    path, out = tmp_path / "model.pt", tmp_path / "m.tg2"
    torch.save(model.module.state_dict(), path)
    result = call("convert", str(path), "-o", str(out))
    check_failure(result, 1, "one of 1, 2, 4, 8, 16, 32", "--heads N")
    with pytest.raises(InputError, match=r"heads: expected a divisor of n_embd 32.*found 5"):
        tinygpt2.convert(path, out, heads=5)
    with pytest.raises(InputError, match="heads"):
        tinygpt2.convert(path, out, heads="4")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="activation: expected one of"):
        tinygpt2.convert(path, out, heads=4, activation="silu")
    assert not out.exists()


@pytest.mark.slow
def test_options_that_contradict_the_file(
    tmp_path: Path, trained: Callable[[str], Trained]
) -> None:
    path, out = tmp_path / "ckpt.pt", tmp_path / "m.tg2"
    torch.save(nanogpt_checkpoint(trained("nanoGPT")), path)
    with pytest.raises(InputError, match="heads: expected 4, as the checkpoint says, found 8"):
        tinygpt2.convert(path, out, heads=8)
    tinygpt2.convert(path, out, heads=4)


def test_options_that_contradict_config_json(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    for options in ({"heads": 2}, {"activation": "gelu"}):
        with pytest.raises(InputError, match="as the checkpoint says"):
            tinygpt2.convert(folder, tmp_path / "m.tg2", **options)
    tinygpt2.convert(folder, tmp_path / "m.tg2", heads=4, activation="gelu_new")


@pytest.mark.slow
def test_another_activation(
    tmp_path: Path, trained: Callable[[str], Trained], notes: Callable[[], str]
) -> None:
    """nanoGPT before June 2023, with PyTorch 2: nothing in the file tells it."""
    twin, forward = gpt(len(set(TEXT)), tanh_gelu)
    twin.load_state_dict(trained("nanoGPT").module.state_dict())
    model = trained("nanoGPT")._replace(module=twin, forward=forward)
    torch.save(nanogpt_checkpoint(model), tmp_path / "ckpt.pt")
    tinygpt2.convert(tmp_path / "ckpt.pt", tmp_path / "m.tg2", activation="gelu_new")
    check_logits(tmp_path / "m.tg2", model)
    assert "activation" not in notes()
    with pytest.raises(AssertionError):  # the two functions are not the same
        check_logits(tmp_path / "m.tg2", trained("nanoGPT"))


@pytest.mark.slow
def test_a_config_of_mingpt_beside_the_file(
    tmp_path: Path, trained: Callable[[str], Trained]
) -> None:
    """Not that of transformers."""
    model = trained("minGPT")
    torch.save(model.module.state_dict(), tmp_path / "model.pt")
    config = {"system": {"seed": 3407}, "model": {"model_type": "gpt-mini", "n_layer": None}}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    tinygpt2.convert(tmp_path / "model.pt", tmp_path / "m.tg2", heads=4)
    check_logits(tmp_path / "m.tg2", model)


@pytest.mark.slow
def test_a_pickle_of_characters(tmp_path: Path, trained: Callable[[str], Trained]) -> None:
    """The message's code writes it as JSON."""
    model = trained("nanoGPT")
    torch.save(nanogpt_checkpoint(model), tmp_path / "ckpt.pt")
    meta = {"stoi": model.stoi, "itos": {}, "vocab_size": len(model.stoi)}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(FormatError) as caught:
        tinygpt2.convert(tmp_path / "ckpt.pt", tmp_path / "m.tg2")
    assert caught.value.path == str(tmp_path / "meta.pkl")
    run_code_of(str(caught.value), tmp_path)
    tinygpt2.convert(tmp_path / "ckpt.pt", tmp_path / "m.tg2", tokenizer=tmp_path / "meta.json")
    with tinygpt2.load(tmp_path / "m.tg2") as ours:
        assert ours.encode("dög") == [model.stoi[c] for c in "dög"]


def run_code_of(message: str, folder: Path) -> None:
    match = re.search(r'python -c "([^"]+)"', message)
    assert match, message
    subprocess.run([sys.executable, "-c", match[1]], cwd=folder, check=True, timeout=120)


@pytest.mark.soak
def test_without_pytorch(
    tmp_path: Path, trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message's code writes safetensors, which are converted without PyTorch."""
    model = trained("nanoGPT")
    path, out = tmp_path / "ckpt.pt", tmp_path / "m.tg2"
    torch.save(nanogpt_checkpoint(model), path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(FormatError, match=r"PyTorch 2\.6 or later") as caught:
            tinygpt2.convert(path, out)
    run_code_of(str(caught.value), tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        tinygpt2.convert(tmp_path / "model.safetensors", out, heads=4)
    check_logits(out, model)


def test_safetensors_without_config(tmp_path: Path) -> None:
    """Of transformers' layout. The heads are asked for, and the activation is its default."""
    folder = write_checkpoint(tmp_path / "m")
    expected = tmp_path / "expected.tg2"
    tinygpt2.convert(folder, expected)
    (folder / "config.json").unlink()
    path, out = folder / "model.safetensors", tmp_path / "m.tg2"
    with pytest.raises(FormatError, match=r"--heads N, or heads=N, or put its config\.json beside"):
        tinygpt2.convert(path, out)
    tinygpt2.convert(path, out, heads=4)
    with tinygpt2.load(expected) as one, tinygpt2.load(out) as other:
        assert one.config == other.config._replace(eos_token_ids=one.config.eos_token_ids)
        assert (one.logits([1, 2, 3]) == other.logits([1, 2, 3])).all()


# ------------------------------------------------------------------------------------------------
# Refused
# ------------------------------------------------------------------------------------------------

State = dict[str, Any]


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: t for name, t in state.items() if not name.endswith(names)}


def with_tensors(**more: Any) -> Callable[[State], State]:
    return lambda state: {**state, **{n.replace("__", "."): t() for n, t in more.items()}}


BAD_STATES: dict[str, tuple[str, Callable[[State], State], str]] = {
    "no head": ("minGPT", without("lm_head.weight"), "tensor lm_head.weight: expected a matrix"),
    "no positions": ("minGPT", without("wpe.weight"), "tensor wpe.weight"),
    "no layers": (
        "minGPT",
        lambda state: {n: t for n, t in state.items() if ".h." not in n},
        "tensor h.0.attn.c_attn.weight: expected a matrix, found no such tensor",
    ),
    "a bias is missing": (
        "minGPT",
        without("h.1.attn.c_attn.bias"),
        "tensor h.1.attn.c_attn.bias: expected a tensor",
    ),
    "norms without bias": ("minGPT", without("ln_1.bias", "ln_2.bias", "ln_f.bias"), "layer norms"),
    "an own tensor": ("minGPT", with_tensors(transformer__extra=lambda: torch.ones(2)), "extra"),
    "a gain": (
        "minGPT",
        with_tensors(transformer__h__0__ln_1__gain=lambda: torch.ones(32)),
        "ln_1.gain",
    ),
    "a mask of a window": (
        "minGPT",
        with_tensors(
            transformer__h__0__attn__bias=lambda: torch.ones(48, 48).tril().triu(-8)[None, None]
        ),
        "expected a causal mask",
    ),
    "a mask of another shape": (
        "minGPT",
        with_tensors(transformer__h__0__attn__bias=lambda: torch.tensor(1.0)),
        "expected a causal mask",
    ),
    "no keys": ("older minGPT", without("attn.key.weight"), "tensor h.0.attn.c_attn.weight"),
    "no bias of keys": ("older minGPT", without("attn.key.bias"), "attn.query.bias|value.bias"),
    "no bias of one key": ("older minGPT", without("1.attn.key.bias"), "attn.(query|value).bias"),
    "integers": (
        "minGPT",
        with_tensors(lm_head__weight=lambda: torch.ones(53, 32, dtype=torch.int8)),
        "expected F32, F16, BF16 or F64",
    ),
    "sparse": (
        "minGPT",
        with_tensors(lm_head__weight=lambda: torch.ones(53, 32).to_sparse()),
        "lm_head.weight",
    ),
    "one number many times": (
        "minGPT",
        with_tensors(lm_head__weight=lambda: torch.ones(1).expand(10**6, 10**6)),
        "at most 4 bytes",
    ),
    "on no device": (
        "minGPT",
        with_tensors(lm_head__weight=lambda: torch.ones(53, 32, device="meta")),
        "lm_head.weight",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "change", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_states_that_are_refused(
    tmp_path: Path,
    trained: Callable[[str], Trained],
    kind: str,
    change: Callable[[State], State],
    message: str,
) -> None:
    path = tmp_path / "model.pt"
    torch.save(change(trained(kind).module.state_dict()), path)
    with pytest.raises(FormatError, match=message) as caught:
        tinygpt2.convert(path, tmp_path / "m.tg2", heads=4)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


BAD_ARGS: dict[str, tuple[dict[str, Any], str]] = {
    "n_head that is no divisor": ({"n_head": 5}, "n_head"),
    "n_head of text": ({"n_head": "4"}, "n_head"),
    "another n_embd": ({"n_embd": 64}, "n_embd: expected 32, as in the tensors, found 64"),
    "fewer layers": ({"n_layer": 1}, "n_layer: expected 2, as in the tensors"),
    "another block_size": ({"block_size": 1024}, "n_positions: expected 48"),
    "a tensor": ({"vocab_size": "tensor"}, "vocab_size"),
    "relu": ({"use_relu": True}, "model_args 'use_relu'"),
    "another norm": ({"norm": "rms"}, "model_args 'norm'"),
    "bias and none there": ({"bias": True}, "model_args bias=True: .* found none"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("args", "message"), BAD_ARGS.values(), ids=BAD_ARGS)
def test_model_args_that_are_refused(
    tmp_path: Path, trained: Callable[[str], Trained], args: dict[str, Any], message: str
) -> None:
    model = trained("nanoGPT without bias")
    args = {name: torch.ones(3) if value == "tensor" else value for name, value in args.items()}
    model = model._replace(args={**model.args, **args})
    torch.save(nanogpt_checkpoint(model), tmp_path / "ckpt.pt")
    with pytest.raises(FormatError, match=message):
        tinygpt2.convert(tmp_path / "ckpt.pt", tmp_path / "m.tg2")


def looped() -> Any:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


CONTENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a list": (lambda: [torch.ones(2)], "a dictionary of tensors"),
    "a tensor": (lambda: torch.ones(2), "a dictionary of tensors"),
    "no tensors": (lambda: {"epoch": 3}, "tensors by their names"),
    "compressed": (dict, "compressed"),
    "a loop": (looped, "tensors by their names"),
    "numbers as names": (lambda: {0: torch.ones(2)}, "tensors by their names"),
    "another model": (lambda: {"fc.weight": torch.ones(2, 2)}, "'fc.weight'.*an unknown one"),
    "a whole module": (
        lambda: torch.nn.Linear(2, 2),
        "an object of torch.nn.modules.linear.Linear.*weights_only=False",
    ),
    "arguments": (
        lambda: {"model": {}, "args": argparse.Namespace(n_head=4)},
        "an object of argparse.Namespace",
    ),
    "model_args of another kind": (
        lambda: {"model": {"wte.weight": torch.ones(2, 2)}, "model_args": [1]},
        "model_args: expected a dictionary",
    ),
}


def compress(path: Path) -> None:
    """A small file could claim much; torch.save stores all as it is."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)


@pytest.mark.slow
@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS)
def test_contents_that_are_refused(
    tmp_path: Path, content: Callable[[], Any], message: str
) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(content(), path)
    if message == "compressed":
        compress(path)
    result = call("convert", str(path), "-o", str(tmp_path / "m.tg2"))
    check_failure(result, 1)
    assert re.search(message, result.err), result.err


@pytest.mark.soak
def test_the_code_of_a_message_reads_what_we_refuse(
    tmp_path: Path, trained: Callable[[str], Trained]
) -> None:
    """A checkpoint with an object of a class in it, as many trainers save."""
    model = trained("nanoGPT")
    saved = {**nanogpt_checkpoint(model), "config": argparse.Namespace(n_head=4)}
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(FormatError, match=r"argparse\.Namespace") as caught:
        tinygpt2.convert(tmp_path / "ckpt.pt", tmp_path / "m.tg2")
    run_code_of(str(caught.value), tmp_path)
    tinygpt2.convert(tmp_path / "model.safetensors", tmp_path / "m.tg2", heads=4)
    check_logits(tmp_path / "m.tg2", model)


@pytest.mark.slow
def test_damaged_files(tmp_path: Path, trained: Callable[[str], Trained]) -> None:
    """Cut off, or with bytes that changed: an error of ours, or a model that was not touched."""
    path, out = tmp_path / "ckpt.pt", tmp_path / "m.tg2"
    messages = []
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(trained("minGPT").module.state_dict(), path, **options)
        content = path.read_bytes()
        random = np.random.default_rng(5)
        for i in range(60):
            damaged = bytearray(content)
            place = int(random.integers(4, min(len(content), 6000 if i % 2 else len(content))))
            if i % 3:
                damaged[place] ^= int(random.integers(1, 256))
            else:
                del damaged[place:]
            path.write_bytes(damaged)
            try:
                tinygpt2.convert(path, out, heads=4)
            except FormatError as error:
                messages.append(str(error))
            else:
                out.unlink()
    assert len(messages) > 40
    assert not any("\n" in message for message in messages)


# ------------------------------------------------------------------------------------------------
# pytorch_model.bin
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_folder_with_pickled_weights(tmp_path: Path, shards: int, tied: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with it")
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path / "m"
    config.save_pretrained(folder)
    state = list(model.state_dict().items())
    names = ["pytorch_model.bin"]
    if shards > 1:
        names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
        places = {name: names[i % shards] for i, (name, _) in enumerate(state)}
        index = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "pytorch_model.bin.index.json").write_text(index, "utf-8")
    for i, name in enumerate(names):
        torch.save(dict(state[i::shards]), folder / name)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, use_safetensors=False).eval()
    tinygpt2.convert(folder, tmp_path / "m.tg2")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    with tinygpt2.load(tmp_path / "m.tg2") as ours:
        assert largest(ours.logits(ids) - expected) <= 1e-5 * largest(expected)
        assert ours.config.tie_word_embeddings == tied
    if shards == 1:
        tinygpt2.convert(folder / "pytorch_model.bin", tmp_path / "n.tg2")
        assert (tmp_path / "n.tg2").read_bytes() == (tmp_path / "m.tg2").read_bytes()


# ------------------------------------------------------------------------------------------------
# llm.c
# ------------------------------------------------------------------------------------------------

LLMC_CONFIG = {"vocab_size": 50, "n_positions": 24, "n_embd": 16, "n_layer": 3, "n_head": 2}
LLMC_ORDER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def write_llmc(path: Path, weights: dict[str, np.ndarray], version: int = 3) -> Path:
    """As llm.c documents it: 256 integers, then the tensors, each kind for all layers."""
    config, padded = LLMC_CONFIG, 64
    sizes = (config[n] for n in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd"))
    header = np.zeros(256, "<i4")
    header[:8] = [20240326, version, *sizes, padded]
    embedding = np.zeros((padded, config["n_embd"]), np.float32)
    embedding[: config["vocab_size"]] = weights["wte.weight"]
    arrays = [embedding, weights["wpe.weight"]]
    for kind in LLMC_ORDER:
        for part in ("weight", "bias"):
            layers = [weights[f"h.{i}.{kind}.{part}"] for i in range(config["n_layer"])]
            arrays += [array.T for array in layers]  # [outputs, inputs]
    arrays += [weights["ln_f.weight"], weights["ln_f.bias"]]
    numbers = np.concatenate([array.flatten() for array in arrays]).astype("<f4")
    data = numbers if version == 3 else (numbers.view("<u4") >> 16).astype("<u2")
    path.write_bytes(header.tobytes() + data.tobytes())
    return path


def truncated(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Numbers that bfloat16 has."""
    return {n: (w.view("<u4") >> 16 << 16).view("<f4") for n, w in weights.items()}


@pytest.mark.parametrize("version", [3, 5])
def test_llmc(tmp_path: Path, version: int) -> None:
    """The same model as from a folder of transformers, which is compared with transformers."""
    weights = random_weights(LLMC_CONFIG, seed=4)
    weights = weights if version == 3 else truncated(weights)
    source = write_llmc(tmp_path / "gpt2_124M.bin", weights, version)
    folder = write_checkpoint(tmp_path / "m", LLMC_CONFIG, weights, tokenizer=False)
    result = call("convert", str(source), "-o", str(tmp_path / "a.tg2"))
    assert result.code == 0
    assert "activation" not in result.err
    tinygpt2.convert(folder, tmp_path / "b.tg2")
    with tinygpt2.load(tmp_path / "a.tg2") as one, tinygpt2.load(tmp_path / "b.tg2") as other:
        names = ("bos_token_id", "eos_token_ids")
        kept = {name: getattr(one.config, name) for name in names}
        assert one.config == other.config._replace(**kept)
        ids = [7, 1, 49, 3]
        assert (one.logits(ids) == other.logits(ids)).all()


def test_llmc_with_a_tokenizer(tmp_path: Path, bpe_folder: Path) -> None:
    """Its token of end-of-text ends texts; of this one the embedding has no row."""
    source = write_llmc(tmp_path / "m.bin", random_weights(LLMC_CONFIG))
    with pytest.raises(FormatError, match="tokens below 50"):
        tinygpt2.convert(source, tmp_path / "m.tg2", tokenizer=bpe_folder)
    with pytest.raises(InputError, match="activation: expected gelu_new, as the checkpoint says"):
        tinygpt2.convert(source, tmp_path / "m.tg2", activation="gelu")


HEADERS: dict[str, tuple[int, int, str]] = {  # place in the header, value, message
    "version 1": (1, 1, "version: expected 3"),
    "version 2": (1, 2, "newer llm.c"),
    "no layers": (4, 0, "n_layer"),
    "a negative size": (6, -16, "n_embd"),
    "a large size": (3, 1 << 30, "vocab_size"),
    "other sizes": (4, 4, "size: expected"),
    "heads that do not fit": (5, 3, "config n_head"),
    "a smaller padded vocabulary": (7, 40, "size: expected"),
}


@pytest.mark.parametrize(("place", "value", "message"), HEADERS.values(), ids=HEADERS)
def test_headers_of_llmc(tmp_path: Path, place: int, value: int, message: str) -> None:
    path = write_llmc(tmp_path / "m.bin", random_weights(LLMC_CONFIG))
    content = bytearray(path.read_bytes())
    content[4 * place : 4 * place + 4] = value.to_bytes(4, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        tinygpt2.convert(path, tmp_path / "m.tg2")


@pytest.mark.parametrize("size", [4, 100, 1024, 1025, 9000, -1])
def test_llmc_that_is_cut_off(tmp_path: Path, size: int) -> None:
    path = write_llmc(tmp_path / "m.bin", random_weights(LLMC_CONFIG))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FormatError, match="size: expected"):
        tinygpt2.convert(path, tmp_path / "m.tg2")


def test_llmc_with_fewer_padded_rows_than_tokens(tmp_path: Path) -> None:
    """The size of the file fits to the padded rows alone."""
    path = write_llmc(tmp_path / "m.bin", random_weights(LLMC_CONFIG))
    content = bytearray(path.read_bytes())
    content[12:16] = (70).to_bytes(4, "little")  # vocab_size
    path.write_bytes(content)
    with pytest.raises(FormatError, match="vocab_size"):
        tinygpt2.convert(path, tmp_path / "m.tg2")


# ------------------------------------------------------------------------------------------------
# The same tensors as safetensors: fast, without PyTorch
# ------------------------------------------------------------------------------------------------


def test_linear_layout_and_older_names(tmp_path: Path) -> None:
    """One model by the names of GPT-2, of nanoGPT and of older minGPT: the same numbers."""
    config = {**LLMC_CONFIG, "tie_word_embeddings": False}
    weights = random_weights(config, seed=6)
    folder = write_checkpoint(tmp_path / "m", config, weights, tokenizer=False)
    tinygpt2.convert(folder, tmp_path / "0.tg2")
    linear = {n: w.T if n.startswith("h.") else w for n, w in weights.items()}
    older: dict[str, np.ndarray] = {}
    for name, array in linear.items():
        array = np.ascontiguousarray(array)
        new = re.sub(r"^h\.", "blocks.", name).replace("ln_1", "ln1").replace("ln_2", "ln2")
        new = new.replace("mlp.c_fc", "mlp.0").replace("mlp.c_proj", "mlp.2")
        new = new.replace("attn.c_proj", "attn.proj").replace("wte.", "tok_emb.")
        new = new.replace("lm_head", "head")
        if name == "wpe.weight":
            older["pos_emb"] = array[None]
        elif "c_attn" in name:
            for part, rows in zip(("query", "key", "value"), np.split(array, 3)):
                older[new.replace("c_attn", part)] = rows
        else:
            older[new] = array
    for i, tensors in enumerate((linear, older), 1):
        write_safetensors(tmp_path / "w.safetensors", tensors)
        options = {"heads": 2, "activation": "gelu_new"}
        tinygpt2.convert(tmp_path / "w.safetensors", tmp_path / f"{i}.tg2", **options)  # type: ignore[arg-type]
    with tinygpt2.load(tmp_path / "0.tg2") as model:
        expected = model.logits([1, 2, 3])
    for i in (1, 2):
        with tinygpt2.load(tmp_path / f"{i}.tg2") as model:
            assert (model.logits([1, 2, 3]) == expected).all()


@pytest.mark.slow
def test_what_the_file_says_comes_before_a_config_beside_it(
    tmp_path: Path, trained: Callable[[str], Trained]
) -> None:
    """The config.json of another model, with other heads and another activation."""
    model = trained("nanoGPT without bias")
    torch.save(nanogpt_checkpoint(model), tmp_path / "ckpt.pt")
    tinygpt2.convert(tmp_path / "ckpt.pt", tmp_path / "alone.tg2")
    config = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 8}
    (tmp_path / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    tinygpt2.convert(tmp_path / "ckpt.pt", tmp_path / "beside.tg2")
    assert (tmp_path / "beside.tg2").read_bytes() == (tmp_path / "alone.tg2").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["attn.c_attn.bias", "c_proj.bias", "ln_f.bias", ".bias"])
def test_biases_are_those_that_model_args_tell(
    tmp_path: Path, trained: Callable[[str], Trained], left_out: str
) -> None:
    """nanoGPT writes all of them or none."""
    model = trained("nanoGPT")
    state = {
        k: v for k, v in nanogpt_checkpoint(model)["model"].items() if not k.endswith(left_out)
    }
    torch.save(nanogpt_checkpoint(model, state), tmp_path / "ckpt.pt")
    with pytest.raises(FormatError, match="model_args bias=True: expected the biases of all"):
        tinygpt2.convert(tmp_path / "ckpt.pt", tmp_path / "m.tg2")
    told = model._replace(args={**model.args, "bias": False})
    torch.save(nanogpt_checkpoint(told), tmp_path / "ckpt.pt")
    with pytest.raises(FormatError, match="model_args bias=False: expected no biases"):
        tinygpt2.convert(tmp_path / "ckpt.pt", tmp_path / "m.tg2")
