"""The interface for other programs: types, names, errors that travel, objects, interrupts."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import gc
import importlib.util
import inspect
import logging
import multiprocessing
import operator
import os
import pickle
import re
import shutil
import subprocess
import sys
import typing
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import pytest
from conftest import ROOT, TALES_CHECKSUM, in_threads, run_python, slow, untimed

import tinygpt2
from tinygpt2 import Model, Options, Session

TIMEOUT = 60  # seconds
METHODS = ("generate", "stream", "complete", "generate_ids", "stream_ids")
is_source = pytest.mark.skipif(
    not tinygpt2.__file__.endswith(".py"), reason="compiled classes lack hints, weak references"
)


@pytest.fixture(params=["c", "numpy"])
def model(request: pytest.FixtureRequest, toy_path: Path) -> Iterator[Model]:
    if request.param == "c" and tinygpt2.library_path() is None:
        pytest.skip("needs the C kernels: `python build.py`")
    with tinygpt2.load(toy_path, backend=request.param) as model:
        yield model


# Types


@is_source
@pytest.mark.parametrize("name", METHODS)
def test_the_hints_of_the_options(name: str) -> None:
    number = Union[SupportsFloat, SupportsIndex]
    hints = typing.get_type_hints(getattr(Model, name))
    assert {option: hints[option] for option in (*Options._fields, "unknown")} == {
        "max_new_tokens": Optional[SupportsIndex],
        "temperature": Optional[number],
        "top_k": Optional[SupportsIndex],
        "top_p": Optional[number],
        "min_p": Optional[number],
        "repetition_penalty": Optional[number],
        "seed": Optional[SupportsIndex],
        "stop": Union[str, Sequence[str], None],
        "logit_bias": Optional[dict[int, float]],
        "stop_token_ids": Optional[Iterable[SupportsIndex]],
        "bad_words": Optional[Iterable[tinygpt2.Prompt]],
        "allowed": Optional[tinygpt2.Allowed],
        "regex": Optional[str],
        "max_time": Optional[number],
        "overflow": Optional[Literal["stop", "error", "shift"]],
        "keep": Optional[SupportsIndex],
        "num_beams": Optional[SupportsIndex],
        "unknown": NoReturn,
    }


@is_source
def test_the_hints_of_load() -> None:
    hints = typing.get_type_hints(tinygpt2.load)
    assert hints["backend"] == Optional[Literal["c", "numpy"]]
    assert hints["threads"] == Optional[SupportsIndex]
    assert hints["return"] is Model


@is_source
def test_everything_has_hints_that_can_be_read() -> None:
    things = [getattr(tinygpt2, name) for name in tinygpt2.__all__]
    functions = [thing for thing in things if inspect.isfunction(thing)]
    for thing in filter(inspect.isclass, things):
        functions += [f for _, f in inspect.getmembers(thing, inspect.isfunction)]
    functions += [thing for thing in vars(tinygpt2).values() if inspect.isfunction(thing)]
    own = [function for function in functions if function.__module__ == tinygpt2.__name__]
    assert len(own) > 200
    for function in own:
        typing.get_type_hints(function)


@is_source
@pytest.mark.parametrize("name", METHODS)
def test_the_options_are_keywords_in_the_order_of_options(name: str) -> None:
    parameters = list(inspect.signature(getattr(Model, name)).parameters.values())
    assert [p.name for p in parameters[:2]] == ["self", "prompt"]
    keywords = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    extra = ["logprobs"] if name in ("stream", "complete") else []
    assert keywords == [*Options._fields, "special", *extra]


def test_models_and_sessions_generate_alike(model: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 4}
    results: list[object] = []
    for source in (model, model.session()):
        for name in METHODS:
            if isinstance(source, Session):
                source.rewind(len(source))
            found = getattr(source, name)("The", **options)
            found = untimed(found) if name == "complete" else found
            results.append(list(found) if name in ("stream", "stream_ids") else found)
    assert results[:5] == results[5:]
    text, pieces, result, ids, stream_ids = results[:5]
    assert isinstance(pieces, list)
    assert isinstance(result, tinygpt2.Result)
    assert text == "".join(pieces) == result.text
    assert ids == stream_ids == result.ids
    assert result.seed == 4


def test_the_logprobs_of_a_result_are_those_of_its_tokens(model: Model) -> None:
    result = model.complete("The", max_new_tokens=10, seed=2)
    prompt = model.encode("The")
    rows = model.logits([*prompt, *result.ids])[len(prompt) - 1 : -1].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    expected = rows[range(len(rows)), result.ids].tolist()
    # Sums of 300 exponentials in float32; the logits are about 10.
    assert result.logprobs == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_stream_knows_its_seed_and_its_end(model: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "logit_bias": {264: -1e9}}
    stream = model.stream("The", **options)
    assert stream.finish_reason is None
    pieces = list(stream)
    assert stream.result().finish_reason == "length"
    assert len(stream.ids) == 3
    assert "".join(pieces) == model.generate("The", seed=stream.seed, **options)
    assert stream.result().text == "".join(pieces)


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_that_is_too_long_raises_at_the_call(model: Model, name: str) -> None:
    with pytest.raises(tinygpt2.ContextError, match="at most 64 tokens"):
        getattr(model, name)([1] * 65)


# Sessions as objects


def test_a_copy_is_a_second_future(model: Model) -> None:
    session = model.session()
    session.feed("The thing")
    other = copy.copy(session)
    assert len(other) == len(session) == len(session.tokens)
    session.rewind(2)
    session.feed([5, 6, 7])
    assert other.tokens == model.encode("The thing")
    for each in (session, other):
        fresh = model.generate(each.tokens, max_new_tokens=20, seed=3)
        assert each.generate(max_new_tokens=20, seed=3) == fresh


def test_a_deep_copy_is_one_too(model: Model) -> None:
    session = model.session()
    session.feed([5, 6, 7])
    other = copy.deepcopy({"session": session})["session"]
    session.rewind(1)
    assert other.tokens == [5, 6, 7]
    assert other.model is model


def test_repr_says_what_it_is(model: Model) -> None:
    session = model.session()
    session.feed([1, 2])
    assert repr(session).startswith("<tinygpt2.Session: 2 of 64 tokens, ")
    assert repr(model).startswith("<tinygpt2.Model ")
    assert model.backend.describe() in repr(model)
    session.close()
    assert "closed" in repr(session)


def test_old_logits_are_an_error(model: Model) -> None:
    with model.workspace() as workspace:
        span = tinygpt2.Span(model.backend.new_cache(), [1, 2], 0, 2)
        logits = model.backend.forward(workspace, [span])
        assert logits.top(1, 3)[0][0] == logits.array()[1].argmax()
        model.backend.forward(workspace, [tinygpt2.Span(model.backend.new_cache(), [3], 0, 1)])
        uses: list[Callable[[], object]] = [
            lambda: logits.top(0, 1),
            lambda: logits.logprob(0, 1),
            lambda: logits.array(),
            lambda: logits.keep(0),
        ]
        for use in uses:
            with pytest.raises(tinygpt2.StateError, match="later pass"):
                use()


def test_texts_in_one_pass_are_the_texts_alone(model: Model) -> None:
    texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    with model.workspace() as workspace:
        spans = [tinygpt2.Span(model.backend.new_cache(), ids, 0, len(ids)) for ids in texts]
        together = model.backend.forward(workspace, spans).array()
    alone = np.concatenate([model.logits(ids) for ids in texts])
    if model.backend.name == "c":
        assert (together.view(np.int32) == alone.view(np.int32)).all()
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4)


# Models that travel


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_model_travels(model: Model, protocol: int) -> None:
    with pickle.loads(pickle.dumps(model, protocol)) as again:
        assert again is not model
        assert again.fingerprint == model.fingerprint
        assert again.backend.describe() == model.backend.describe()
        assert (again.logits([1, 2, 3]) == model.logits([1, 2, 3])).all()


@pytest.mark.parametrize("backend", ["c", "numpy", None])
@pytest.mark.parametrize("threads", [1, 3, None])
def test_a_model_travels_with_its_options(
    toy_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: Optional[Literal["c", "numpy"]],
    threads: Optional[int],
) -> None:
    """As they were given: without them, the other process decides for itself."""
    if backend == "c" and tinygpt2.library_path() is None:
        pytest.skip("needs the C kernels: `python build.py`")
    monkeypatch.setenv("TINYGPT2_THREADS", "5")
    with tinygpt2.load(toy_path, backend=backend, threads=threads) as model:
        data, name = pickle.dumps(model), model.backend.name
    monkeypatch.setenv("TINYGPT2_THREADS", "6")
    with pickle.loads(data) as again:
        assert again.backend.name == name
        if name == "c":
            assert f"{threads or 6} threads" in again.backend.describe()


def test_a_model_travels_by_its_absolute_path(
    toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy_path.parent)
    with tinygpt2.load(toy_path.name) as model:
        monkeypatch.chdir(tmp_path)  # before it is pickled
        data = pickle.dumps(model)
    with pickle.loads(data) as again:
        assert again.path == str(toy_path)


def changed_weights(path: Path, out: Path) -> None:
    """The same model but for one bit, and right checksums."""
    with contextlib.closing(tinygpt2.TensorFile(path)) as file:
        content = bytearray(bytes(file.map)[file.data_start :])
        content[0] ^= 1
        entries = {name: (tensor.dtype, tensor.shape) for name, tensor in file.tensors.items()}
        metadata = {k: v for k, v in file.metadata.items() if k not in ("crc32", "header_crc32")}
        tinygpt2.write_tensors(str(out), entries, [bytes(content)], metadata, lambda _: None)


def test_a_model_does_not_travel_to_another_file(toy_path: Path, tmp_path: Path) -> None:
    """Neither to one with other weights, nor to one of another kind, nor to none."""
    path = tmp_path / "model.tg2"
    shutil.copy(toy_path, path)
    with tinygpt2.load(path) as model:
        data, fingerprint = pickle.dumps(model), model.fingerprint
    os.utime(path, (0, 0))
    pickle.loads(data).close()  # the time does not count
    path.unlink()
    with pytest.raises(tinygpt2.MissingFileError, match=r"model\.tg2"):
        pickle.loads(data)
    changed_weights(toy_path, path)
    with pytest.raises(tinygpt2.FormatError, match="fingerprint") as caught:
        pickle.loads(data)
    error = caught.value
    assert (error.path, error.field) == (str(path), "fingerprint")
    assert fingerprint in error.expected
    assert fingerprint not in error.found
    path.write_bytes(b"not a model")
    with pytest.raises(tinygpt2.FormatError, match=r"model\.tg2"):
        pickle.loads(data)


def fingerprint_of(path: Path) -> str:
    with tinygpt2.load(path) as model:
        pickle.loads(pickle.dumps(model)).close()
        return model.fingerprint


def test_fingerprints_tell_files_apart(toy_path: Path, tmp_path: Path) -> None:
    """By their content, and not by their names."""
    shutil.copy(toy_path, tmp_path / "same.tg2")
    changed_weights(toy_path, tmp_path / "other.tg2")
    found = fingerprint_of(toy_path)
    assert re.fullmatch("[0-9a-f]{17,}", found)
    assert fingerprint_of(tmp_path / "same.tg2") == found
    assert fingerprint_of(tmp_path / "other.tg2") != found


def test_fingerprints_of_files_of_version_1(tales_path: Path, tmp_path: Path) -> None:
    """Their header has no checksum. Without one of the data either, the data is read."""
    content = tales_path.read_bytes()
    field = b'"crc32":"' + TALES_CHECKSUM.encode()
    assert content.count(field) == 1
    unnamed = content.replace(field, field.replace(b"crc32", b"other"))
    variants = [content, content.replace(field, field[:-1] + b"0"), unnamed, unnamed[:-1] + b"?"]
    found = set()
    for variant in variants:
        (tmp_path / "model.tg2").write_bytes(variant)
        found.add(fingerprint_of(tmp_path / "model.tg2"))
    assert len(found) == len(variants)


def test_a_copy_of_a_model_is_the_model(model: Model) -> None:
    """It never changes, and there is nothing to gain from a second one."""
    assert copy.copy(model) is model
    assert copy.deepcopy([model])[0] is model
    model.close()
    for use in (copy.copy, copy.deepcopy, pickle.dumps, lambda closed: closed.fingerprint):
        with pytest.raises(tinygpt2.StateError, match="model: it is closed"):
            use(model)


def test_what_cannot_travel_says_what_to_do(model: Model) -> None:
    stream = model.stream([1])
    with model.workspace() as workspace:
        pass
    stays: dict[str, Any] = {
        "its `tokens`": stream.session,
        "its `ids`": stream,
        "its model": model.tokenizer,
    }
    if model.backend.name == "c":
        stays["the model"] = workspace
    for advice, value in stays.items():
        with pytest.raises(tinygpt2.StateError, match=f"cannot be pickled.*pickle {advice}"):
            pickle.dumps(value)
    assert stream.result().ids  # and nothing has become of it


@pytest.mark.slow
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_models_and_errors_in_other_processes(model: Model, method: str) -> None:
    """A pool of concurrent.futures and one of multiprocessing; neither may hang."""
    work = operator.methodcaller("generate_ids", [1, 2], max_new_tokens=5, seed=1)
    context: Any = multiprocessing.get_context(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
            assert executor.submit(work, model).result(TIMEOUT) == work(model)
            error = executor.submit(tinygpt2.load, "none.tg2").exception(TIMEOUT)
            assert isinstance(error, tinygpt2.MissingFileError)
        with context.Pool(1) as pool:
            assert pool.apply_async(work, (model,)).get(TIMEOUT) == work(model)
            too_long = operator.methodcaller("generate_ids", [1] * 65)
            with pytest.raises(tinygpt2.ContextError, match="at most 64 tokens"):
                pool.apply_async(too_long, (model,)).get(TIMEOUT)


# Errors


def kinds_of(kind: type[Exception]) -> set[type[Exception]]:
    return {kind}.union(*map(kinds_of, kind.__subclasses__()))


def example_of(kind: type[Exception]) -> Exception:
    values = ["a/b", "field", "this", "that", "do it"]
    return kind(*values) if issubclass(kind, tinygpt2.FormatError) else kind("text")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_travel(protocol: int) -> None:
    """All kinds, with what others have attached to them."""
    tinygpt2.load_companion("convert")  # if it has kinds of its own
    kinds = kinds_of(tinygpt2.TinyGPT2Error)
    assert kinds >= {getattr(tinygpt2, name) for name in tinygpt2.__all__ if "Error" in name}
    for error in map(example_of, kinds):
        vars(error)["__notes__"] = ["a note"]  # as `add_note` does from Python 3.11 on
        copies = [copy.copy(error), copy.deepcopy(error)]
        for again in (pickle.loads(pickle.dumps(error, protocol)), *copies):
            assert type(again) is type(error)
            assert (str(again), vars(again)) == (str(error), vars(error))
            assert again.args == error.args
            if isinstance(error, OSError) and isinstance(again, OSError):
                assert (again.errno, again.filename) == (error.errno, error.filename)


def test_a_missing_file_is_pythons_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        tinygpt2.load(tmp_path / "none.tg2")
    assert isinstance(caught.value, tinygpt2.FormatError)
    assert (caught.value.errno, caught.value.filename) == (2, str(tmp_path / "none.tg2"))


@pytest.mark.parametrize("value", [5, None, b"x.tg2", ["x.tg2"], "a\0b", "\udcff\ud800"], ids=ascii)
def test_strange_paths_get_our_errors(tmp_path: Path, value: Any) -> None:
    uses: list[Callable[[], object]] = [lambda: tinygpt2.convert(tmp_path, value)]
    if value is not None:
        uses.append(lambda: tinygpt2.load(value))
    for use in uses:
        with pytest.raises(tinygpt2.TinyGPT2Error):
            use()


def test_values_that_cannot_show_themselves(model: Model) -> None:
    """Python refuses to print integers of thousands of digits."""
    with pytest.raises(tinygpt2.InputError, match="option top_k"):
        model.generate("a", top_k=-(10**5000))
    with pytest.raises(tinygpt2.InputError, match="prompt: expected text or token ids"):
        model.generate(typing.cast(Any, np.array(5)))


# What the module does by itself


def test_numpy_in_place_of_the_kernels_is_told(
    toy_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not tinygpt2.__file__.endswith(".py"):
        pytest.skip("the functions of a compiled module cannot be replaced")
    monkeypatch.setattr(tinygpt2, "library_path", lambda: None)
    with caplog.at_level(logging.INFO, "tinygpt2"), tinygpt2.load(toy_path) as model:
        assert model.backend.name == "numpy"
    assert "build.py" in caplog.text


def test_functions_work_before_a_model_is_loaded() -> None:
    code = "import tinygpt2; print(tinygpt2.softmax(tinygpt2.np.zeros((1, 4))).tolist())"
    assert run_python(code).stdout == "[[0.25, 0.25, 0.25, 0.25]]\n"


def test_importing_brings_nothing_along() -> None:
    code = (
        "import sys; before = set(sys.modules); import tinygpt2; new = set(sys.modules) - before\n"
        "print(sorted(new & {'numpy', 'ctypes', 'logging', 'argparse', 'difflib', 'regex'}))"
    )
    assert run_python(code).stdout == "[]\n"


def test_loading_leaves_the_environment_alone(toy_path: Path) -> None:
    code = (
        "import os, sys, tinygpt2; before = dict(os.environ)\n"
        "tinygpt2.load(sys.argv[1], backend='numpy', threads=1); print(dict(os.environ) == before)"
    )
    assert run_python(code, toy_path).stdout == "True\n"


# Two users at once


def test_two_threads_on_one_stream(model: Model) -> None:
    """Each gets pieces or a StateError; neither waits for ever, and nothing else is raised."""
    for seed in range(20):
        session = model.session()
        stream = session.stream([1], max_new_tokens=6, seed=seed)
        others: list[BaseException] = []

        def take(stream: tinygpt2.Answer = stream, others: list[BaseException] = others) -> None:
            try:
                for _ in stream:
                    pass
            except tinygpt2.StateError:
                pass
            except BaseException as error:
                others.append(error)

        in_threads([take, take])
        assert not others


def test_score_while_the_model_is_closed(toy_path: Path) -> None:
    """The result is whole, or the error says that the model is closed."""
    with tinygpt2.load(toy_path) as model:
        score = model.score([1, 2, 3] * 50, progress=lambda *_: None)
    assert score.n_bytes == 150
    for _ in range(30):
        model = tinygpt2.load(toy_path)
        outcomes: list[object] = []

        def work(model: Model = model, outcomes: list[object] = outcomes) -> None:
            try:
                while True:
                    outcomes.append(model.score([1, 2, 3] * 10).n_bytes)
            except tinygpt2.StateError:
                outcomes.append(30)
            except BaseException as error:
                outcomes.append(error)

        in_threads([work, model.close])
        assert set(outcomes) == {30}


SIGNALS = """
import random, signal, sys, time
import tinygpt2
def handler(*_): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, handler)
r, unusable, interrupted, end = random.Random(1), 0, 0, time.monotonic() + 1.5
with tinygpt2.load(sys.argv[1], threads=1) as model:
    while time.monotonic() < end:
        session = model.session()
        try:
            signal.setitimer(signal.ITIMER_REAL, r.uniform(1e-5, 1e-3))
            session.feed([1, 2, 3])
            session.generate(max_new_tokens=12, seed=1)
            session.rewind(1)
            session.feed([4])
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            session.rewind(0)
        except tinygpt2.StateError:
            unusable += 1
print(interrupted > 100, unusable)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setitimer")
@pytest.mark.slow
def test_real_interrupts_leave_sessions_usable(toy_path: Path) -> None:
    """An interrupt can be lost inside `__del__`; Python then says so on standard error."""
    assert run_python(SIGNALS, toy_path).stdout == "True 0\n"


@is_source
@pytest.mark.parametrize("every", [*slow(7), pytest.param(1, marks=pytest.mark.soak)])
def test_an_interrupt_at_any_bytecode(toy_path: Path, every: int) -> None:
    """Traced in a process of its own; with the exception held, and the session used after it."""
    script = Path(__file__).with_name("interrupts.py")
    command = [sys.executable, str(script), str(toy_path), str(every)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(", bad: 0\n")


def test_a_stream_that_was_interrupted_says_so(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last token's text may be lost: it must not go on as if nothing had happened."""
    if not tinygpt2.__file__.endswith(".py"):
        pytest.skip("the methods of a compiled module cannot be replaced")
    session = model.session()
    stream = session.stream("The", max_new_tokens=9, logit_bias={264: -1e9})
    next(stream)

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tinygpt2.TextOutput, "push", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    with pytest.raises(tinygpt2.StateError, match="interrupt ended it"):
        next(stream)
    tokens = session.tokens
    fresh = model.generate(tokens, max_new_tokens=5, seed=1)
    assert session.generate(max_new_tokens=5, seed=1) == fresh


# What is left when an object is dropped


@is_source
@pytest.mark.parametrize("what", ["session", "stream", "model"])
def test_objects_are_freed_without_the_garbage_collector(toy_path: Path, what: str) -> None:
    """A session has 75 MB of keys and values with GPT-2: it must go when its last name goes."""
    gc.collect()
    gc.disable()
    try:
        model = tinygpt2.load(toy_path)
        session = model.session()
        session.feed([1, 2])
        stream = model.stream([3], max_new_tokens=4, seed=1)
        next(stream)
        watched = weakref.ref({"session": session, "stream": stream.session, "model": model}[what])
        del model, session, stream
        assert watched() is None
    finally:
        gc.enable()


def test_the_file_runs_without_being_registered_as_a_module(toy_path: Path) -> None:
    """Programs that load plug-ins execute a file so."""
    spec = importlib.util.spec_from_file_location("nobody_knows_it", ROOT / "tinygpt2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.load(toy_path) as model:
        assert len(model.generate_ids([1], max_new_tokens=2, temperature=0)) <= 2
    with pytest.raises(module.TinyGPT2Error, match=r"sys\.modules"):
        module.convert("a", "b")


def test_a_module_that_is_imported_twice_has_its_own_errors() -> None:
    script = """
import sys, tinygpt2
def refused(module):
    try:
        module.convert("/none", "/none.tg2")
    except module.TinyGPT2Error:
        return "ours"
refused(tinygpt2)
del sys.modules["tinygpt2"]
import tinygpt2
print(refused(tinygpt2))
"""
    assert run_python(script).stdout == "ours\n"
