"""Sessions that are saved, loaded and given a new text: as a fresh run, to the bit in C."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from conftest import TOY, read_safetensors, write_checkpoint

import tinygpt2
from tinygpt2 import FormatError, InputError, Model, Session, StateError

BACKENDS = ["numpy"] if tinygpt2.library_path() is None else ["c", "numpy"]
ROOM = TOY["n_positions"]


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, toy_path: Path) -> Iterator[Model]:
    with tinygpt2.load(toy_path, backend=request.param) as model:
        yield model


def fed(model: Model, ids: list[int]) -> Session:
    session = model.session()
    session.feed(ids)
    return session


def assert_same(found: Session, expected: Session) -> None:
    """The same text, and the same logits: to the bit in C, to rounding in NumPy."""
    assert found.tokens == expected.tokens
    if expected.model.backend.name == "c":
        assert found.logits.tobytes() == expected.logits.tobytes()
    else:
        np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=1e-4)


# Saved and loaded


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, ROOM])
def test_a_loaded_session_is_the_saved_one(model: Model, tmp_path: Path, n: int) -> None:
    ids = [(7 * i) % 260 for i in range(n)]
    session = fed(model, ids)
    session.save(tmp_path / "a.session")
    with model.load_session(tmp_path / "a.session") as loaded:
        assert_same(loaded, session)
        loaded.rewind(1)
        loaded.feed([5])
        session.rewind(1)
        session.feed([5])
        assert_same(loaded, session)


def test_an_answer_goes_on_after_loading(model: Model, tmp_path: Path) -> None:
    session = fed(model, [1, 2, 3])
    session.generate_ids(max_new_tokens=4, seed=5)
    session.save(tmp_path / "a.session")
    loaded = model.load_session(tmp_path / "a.session")
    assert (loaded.finish_reason, loaded.seed) == (session.finish_reason, session.seed)
    fork = loaded.fork()
    expected = session.generate_ids(max_new_tokens=5, seed=5)
    assert loaded.generate_ids(max_new_tokens=5, seed=5) == expected
    assert fork.generate_ids(max_new_tokens=5, seed=5) == expected


def test_an_empty_session_is_saved(model: Model, tmp_path: Path) -> None:
    model.session().save(tmp_path / "a.session")
    loaded = model.load_session(tmp_path / "a.session")
    assert (loaded.tokens, loaded.finish_reason, loaded.seed) == ([], None, None)
    loaded.feed([3])
    assert_same(loaded, fed(model, [3]))


def test_both_backends_read_each_other(toy_path: Path, tmp_path: Path) -> None:
    if BACKENDS == ["numpy"]:
        pytest.skip("needs the C kernels")
    ids = list(range(20))
    with tinygpt2.load(toy_path) as c, tinygpt2.load(toy_path, backend="numpy") as slow:
        for writer, reader in ((c, slow), (slow, c)):
            fed(writer, ids).save(tmp_path / "a.session")
            loaded = reader.load_session(tmp_path / "a.session")
            loaded.feed([9])
            np.testing.assert_allclose(
                loaded.logits, fed(reader, [*ids, 9]).logits, rtol=0, atol=1e-4
            )


def test_the_file_is_a_safetensors_file(model: Model, tmp_path: Path) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy", reason="reads the file, too")
    fed(model, [4, 5, 6]).save(tmp_path / "a.session")
    found = numpy_files.load_file(tmp_path / "a.session")
    assert found["tokens"].tolist() == [4, 5, 6]
    assert sorted(found) == ["keys", "logits", "tokens", "values"]


def test_the_bytes_depend_on_the_text_alone(model: Model, tmp_path: Path) -> None:
    """What a session held before it was rewound is not in its file."""
    if model.backend.name == "numpy":
        pytest.skip("NumPy's last bits depend on how a text was cut into passes")
    session = fed(model, [1, 2, *range(20, 30)])
    session.rewind(10)
    session.feed([3])
    session.save(tmp_path / "a.session")
    other = fed(model, [1, 2])
    other.feed([3])
    other.save(tmp_path / "b.session")
    assert (tmp_path / "a.session").read_bytes() == (tmp_path / "b.session").read_bytes()


def test_the_map_is_used_until_the_cache_is_needed(model: Model, tmp_path: Path) -> None:
    fed(model, [1, 2, 3]).save(tmp_path / "a.session")
    loaded = model.load_session(tmp_path / "a.session")
    assert loaded.logits.shape == (model.config.vocab_size,)
    assert loaded._cache is not None
    assert loaded._cache.length == 0
    loaded.feed([4])
    assert loaded._cache.length == 4


# Files that are refused


def refusal(model: Model, path: Path, use: Callable[[Session], object]) -> str:
    with pytest.raises(FormatError) as caught:
        use(model.load_session(path))
    assert caught.value.path == str(path)
    return str(caught.value)


def test_every_changed_byte_is_found(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    fed(model, [1, 2, 3]).save(path)
    good = path.read_bytes()
    n_header = 8 + struct.unpack("<Q", good[:8])[0]
    chance = random.Random(1)
    places = {*range(0, n_header, 7), *(chance.randrange(n_header, len(good)) for _ in range(60))}
    for place in sorted({*places, len(good) - 1}):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        assert refusal(model, path, lambda session: session.feed([5]))


def test_a_cut_file(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    fed(model, [1, 2, 3]).save(path)
    good = path.read_bytes()
    for size in (0, 7, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        refusal(model, path, lambda session: session)


def test_a_session_of_another_model(model: Model, tmp_path: Path) -> None:
    config = {**TOY, "layer_norm_epsilon": 2e-5}
    tinygpt2.convert(write_checkpoint(tmp_path / "other", config), tmp_path / "other.tg2")
    with tinygpt2.load(tmp_path / "other.tg2") as other:
        fed(other, [1, 2]).save(tmp_path / "a.session")
    message = refusal(model, tmp_path / "a.session", lambda session: session)
    assert "__metadata__ model" in message
    assert "the same model" in message


def test_files_of_other_kinds(model: Model, toy_path: Path, tmp_path: Path) -> None:
    assert "tinygpt2-session" in refusal(model, toy_path, lambda session: session)
    with pytest.raises(tinygpt2.MissingFileError):
        model.load_session(tmp_path / "none")
    fed(model, [1]).save(tmp_path / "a.session")
    with pytest.raises(FormatError, match=r"__metadata__ format: expected 'tinygpt2'"):
        tinygpt2.load(tmp_path / "a.session")


BAD_STATES: dict[str, list[object]] = {
    "cached": [-1, 4, 1.0, "3", None, True, 1 << 70],
    "n_tokens": [-1, 2, ROOM + 2, 1 << 62, None],
    "has_logits": [False, 0, "x", None],
    "dropped": [-1, 1.5, None],
    "finish_reason": [1, [], {}],
    "seed": ["1", 1.5, []],
    "sums": [None, 7, "", "\ud800"],
    "crc32": [None, 7, "", "\ud800"],
    "more": [1],
}
HOSTILE = [(name, value) for name, values in BAD_STATES.items() for value in values]


@pytest.mark.parametrize(("name", "value"), HOSTILE, ids=ascii)
def test_hostile_metadata(model: Model, tmp_path: Path, name: str, value: object) -> None:
    """With a checksum of the header that is right."""
    path = tmp_path / "a.session"
    fed(model, [1, 2, 3]).save(path)
    with tinygpt2.TensorFile(path).map as content:
        data = bytes(content)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    state = json.loads(header["__metadata__"]["session"])
    header["__metadata__"]["session"] = json.dumps({**state, name: value})
    metadata = {k: v for k, v in header.pop("__metadata__").items() if k != tinygpt2.HEADER_CRC}
    entries = {k: (v["dtype"], tuple(v["shape"])) for k, v in header.items()}
    path.write_bytes(tinygpt2.make_header(entries, metadata) + data[start:])
    refusal(model, path, lambda session: session.feed([1]))


def test_keys_of_more_tokens_than_there_is_room_for(model: Model, tmp_path: Path) -> None:
    """A text can have one token more than there are positions; its last one has no keys."""
    path = tmp_path / "a.session"
    session = model.session()
    no_end = dict.fromkeys(model.config.eos_token_ids, -np.inf)
    session.generate_ids([1], max_new_tokens=ROOM, logit_bias=no_end, seed=1)
    assert len(session) == ROOM + 1
    session.save(path)
    assert model.load_session(path).tokens == session.tokens
    metadata, tensors = read_safetensors(path)
    state = {**json.loads(metadata["session"]), "cached": ROOM + 1}
    metadata["session"] = json.dumps(state)
    del metadata[tinygpt2.HEADER_CRC]
    entries = {
        **tinygpt2.snapshot_layout(model.config, ROOM + 1),
        "tokens": ("I32", (ROOM + 1,)),
    }
    data = [b"\0" * tinygpt2.byte_size(*entries[name]) for name in ("keys", "values")]
    content = tinygpt2.make_header(entries, metadata) + b"".join(data)
    path.write_bytes(content + tensors["tokens"].tobytes())
    assert f"cached <= {ROOM}" in refusal(model, path, lambda session: session.feed([1]))


def test_hostile_tokens(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    session = fed(model, [1, 2, 3])
    session._tokens[1] = model.config.vocab_size
    session.save(path)
    assert "tensor tokens" in refusal(model, path, lambda session: session)


def test_what_save_refuses(model: Model, tmp_path: Path) -> None:
    session = fed(model, [1])
    with pytest.raises(InputError, match="path: expected a path"):
        session.save(3)  # type: ignore[arg-type]
    with pytest.raises(tinygpt2.TinyGPT2Error, match="cannot write"):
        session.save(tmp_path / "none" / "a.session")
    session.close()
    with pytest.raises(StateError):
        session.save(tmp_path / "a.session")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n", [0, 1, 16, 20, ROOM])
def test_the_sums_are_those_of_both_backends(toy_path: Path, n: int) -> None:
    """Each 16th word's sum, and that of all running sums: of each head's keys, then its values."""
    if BACKENDS == ["numpy"]:
        pytest.skip("needs the C kernels")
    with tinygpt2.load(toy_path) as c, tinygpt2.load(toy_path, backend="numpy") as slow:
        first, second = (model.backend.new_cache() for model in (c, slow))
        c.backend.forward(c.backend.new_workspace(), [tinygpt2.Span(first, [7] * ROOM, 0, 1)])
        first.length = n
        keys, values, sums = first.dump()
        assert second.restore(keys, values, n) == sums
        assert second.dump() == (keys, values, sums)
        assert first.restore(keys, values, n) == sums
    expected = []
    shapes = tinygpt2.snapshot_layout(c.config, n)
    heads = (np.frombuffer(keys, np.uint32), np.frombuffer(values, np.uint32))
    arrays = [x.reshape(*shapes[k][1][:2], -1, 16) for x, k in zip(heads, ("keys", "values"))]
    for head in np.ndindex(*shapes["keys"][1][:2]):
        for words in (array[head].astype(np.uint64) for array in arrays):
            expected += [words.sum(axis=0), words.cumsum(axis=0).sum(axis=0)]
    assert np.concatenate(expected).astype(np.uint64).tobytes() == sums


# A new text


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        ([], [1, 2], 0),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 2, 3, 4], 2),
        ([1, 2], [2, 1], 0),
        ([1, 2], [], 0),
        (list(range(ROOM)), list(range(ROOM)), ROOM),
    ],
)
def test_replace_keeps_the_common_beginning(
    model: Model, old: list[int], new: list[int], kept: int
) -> None:
    session = fed(model, old)
    assert session.replace(new) == kept
    assert session.tokens == new
    if new:
        assert_same(session, fed(model, new))


def test_replace_computes_only_what_is_new(model: Model) -> None:
    session = fed(model, [1, 2, 3, 4])
    cache: Any = session._cache
    cut: list[int] = []
    truncate = cache.truncate

    class Watched:
        """The cache, which notes how much of it is kept."""

        def __getattr__(self, name: str) -> Any:
            return getattr(cache, name)

        def truncate(self, length: int) -> None:
            cut.append(length)
            truncate(length)

    session._cache = Watched()
    assert session.replace([1, 2, 9]) == 2
    assert cut == [2]


def test_replace_that_is_refused_changes_nothing(model: Model) -> None:
    session = fed(model, [1, 2])
    with pytest.raises(tinygpt2.ContextError):
        session.replace([1] * (ROOM + 1))
    with pytest.raises(InputError):
        session.replace([1, -1])
    assert session.tokens == [1, 2]
    assert_same(session, fed(model, [1, 2]))


def test_replace_after_a_full_context(model: Model) -> None:
    session = fed(model, list(range(ROOM)))
    session.generate_ids(max_new_tokens=3, seed=1)
    assert session.replace(list(range(ROOM))) == ROOM
    assert_same(session, fed(model, list(range(ROOM))))


def test_an_open_stream_notices_a_new_text(model: Model) -> None:
    session = fed(model, [1, 2])
    stream = session.stream_ids(max_new_tokens=9, seed=1)
    next(stream)
    session.replace([1, 2])
    with pytest.raises(StateError, match="changed while a stream was open"):
        next(stream)


# Everything at once


@pytest.mark.parametrize("seed", range(12))
def test_random_lives_end_as_fresh_runs(model: Model, tmp_path: Path, seed: int) -> None:
    """Feeds, rewinds, forks, saves, loads, new texts and answers, in any order."""
    chance = random.Random(seed)
    session = model.session()
    for step in range(14):
        what = chance.choice(["feed", "rewind", "fork", "save", "replace", "generate"])
        ids = [chance.randrange(260) for _ in range(chance.randrange(5))]
        if what == "feed" and len(session) + len(ids) <= ROOM:
            session.feed(ids)
        elif what == "rewind":
            session.rewind(chance.randrange(len(session) + 1))
        elif what == "fork":
            session = session.fork()
        elif what == "save":
            session.save(tmp_path / f"{step}.session")
            session = model.load_session(tmp_path / f"{step}.session")
        elif what == "replace":
            session.replace([*session.tokens[: chance.randrange(len(session) + 1)], *ids][:ROOM])
        elif what == "generate" and 0 < len(session) < ROOM:
            fresh = fed(model, session.tokens)
            count = chance.randrange(4)
            expected = fresh.generate_ids(max_new_tokens=count, seed=seed)
            assert session.generate_ids(max_new_tokens=count, seed=seed) == expected
    if 0 < len(session) <= ROOM:
        assert_same(session, fed(model, session.tokens))
