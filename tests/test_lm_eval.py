"""The example adapter for lm-evaluation-harness: the real harness on local tasks, once through
tinygpt2 and once through transformers, with the default model. Its numbers must be the same."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import END, read_safetensors, run, toy_tokenizer, write_checkpoint

import tinygpt2

pytestmark = pytest.mark.soak
ADAPTER = Path(__file__).parent / "examples" / "lm_eval_adapter.py"


# The default model as transformers reads it. (The trained checkpoints in the test data have no
# tokenizer.)


def weights_of(config: tinygpt2.Config, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights with the hub's names and orientations: without panels and padding."""
    c = config
    outputs = {"c_attn": 3 * c.n_embd, "c_fc": c.n_inner, "wte": c.vocab_size}
    weights = {}
    for name, array in tensors.items():
        if name.startswith(("vocab.", "merges.")):
            continue
        n = next((size for part, size in outputs.items() if part in name), c.n_embd)
        if array.ndim == 3:  # [n_panels, n_inputs, 16]
            array = array.transpose(1, 0, 2).reshape(array.shape[1], -1)
        weights[name] = array[..., :n]
    weights["wte.weight"] = weights["wte.weight"].T
    return weights


def tokenizer_of(model: tinygpt2.Model, tensors: dict[str, np.ndarray]) -> tuple[Any, list[str]]:
    """What vocab.json and merges.txt hold."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = sorted({*range(256)} - {*visible})
    letters = dict(zip([*visible, *hidden], toy_tokenizer()[0]))
    words = [
        "".join(letters[byte] for byte in model.need_tokenizer().token_bytes(token))
        for token in range(model.config.vocab_size)
    ]
    words[model.config.eos_token_ids[0]] = END
    ranks = tensors["merges.ranks"][: model.config.n_merges]
    pairs = [divmod(int(tensors["merges.pairs"][i]), 1 << 32) for i in np.argsort(ranks)]
    return {word: i for i, word in enumerate(words)}, [f"{words[a]} {words[b]}" for a, b in pairs]


def write_folder(folder: Path) -> None:
    """The default model as a folder of transformers."""
    with tinygpt2.load() as model:
        _, tensors = read_safetensors(Path(model.path))
        names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        end = model.config.eos_token_ids[0]
        config = {name: getattr(model.config, name) for name in names}
        config |= {"bos_token_id": end, "eos_token_id": end}
        weights = weights_of(model.config, tensors)
        write_checkpoint(folder, config, weights, tokenizer=False)
        vocab, merges = tokenizer_of(model, tensors)
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


# The tasks. A story stands for many contexts: cut at different places, some end in spaces.

STORY = (
    "Once upon a time there was a king who had three daughters, and the youngest was so beautiful "
    "that the sun himself wondered whenever he shone upon her face. Near the castle lay a dark "
    'forest, and in the forest, under an old lime tree, was a well. "Dear child," said the old '
    "woman, \u201ctake this golden ball, and do not let it fall.\u201d\n\nBut it fell.\n\n"
)
LONG = STORY * 9  # longer than the context of 512 tokens
CONTEXTS = [
    "",
    "Once upon a",
    "Once upon a ",
    "The king said to the queen,   ",
    STORY,
    STORY.rstrip(),
    END + "There was once a poor man",
    "The end." + END + "There was once a poor man",
    "na\u00efve \u6f22\u5b57 \U0001f600",
    LONG,
    LONG + "Then the old woman said: ",
]
ENDINGS = [" time", "time, there was a king", " and", " who had three sons", "\n\n", "\u00e9\u6f22"]
ENDINGS += [END + " The king"]
OPENINGS = [
    "Once upon a time",
    "Once upon a time ",
    "The wolf said to the fox: ",
    END + "There was once",
    STORY,
    LONG,
]


def task(name: str, output_type: str, context: str, target: str, **entries: Any) -> dict[str, Any]:
    return {
        "task": name,
        "output_type": output_type,
        "dataset_path": "json",
        "test_split": "test",
        "doc_to_text": context,
        "doc_to_target": target,
        "target_delimiter": "",
        "metadata": {"version": 1},
        **entries,
    }


def metrics(*names: str) -> list[dict[str, str]]:
    return [{"metric": name} for name in names]


def generation(name: str, **options: Any) -> dict[str, Any]:
    entries = {"generation_kwargs": options, "metric_list": metrics("exact_match")}
    return task(name, "generate_until", "{{context}}", "{{target}}", **entries)


TASKS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "choices": (
        task(
            "choices",
            "multiple_choice",
            "{{context}}",
            "{{answer}}",
            doc_to_choice="{{choices}}",
            metric_list=metrics("acc", "acc_norm", "acc_mutual_info", "brier_score"),
        ),
        [
            {"context": text, "choices": ENDINGS, "answer": 0 if text.startswith("Once") else 2}
            for text in CONTEXTS
        ],
    ),
    "words": (
        task(
            "words",
            "loglikelihood",
            "{{context}}",
            "{{target}}",
            metric_list=metrics("perplexity", "acc"),
        ),
        [
            {
                "context": " ".join(words[:i]) + gap,
                "target": rest + " ".join(words[i : i + 1 + i % 7]),
            }
            for words in [LONG.split(" ")]
            for i in range(1, 60)
            for gap, rest in [("", " "), (" ", "")]
        ],
    ),
    "texts": (
        task(
            "texts",
            "loglikelihood_rolling",
            "",
            "{{text}}",
            metric_list=metrics("word_perplexity", "byte_perplexity", "bits_per_byte"),
        ),
        [{"text": text} for text in (STORY, LONG, LONG * 2 + "The end", "a", END, CONTEXTS[8])],
    ),
    "next": (
        generation("next", until=["."], max_gen_toks=1),
        [
            {"context": "Once upon a", "target": " time"},
            {"context": "There was once a ", "target": " time"},
        ],
    ),
    "sentences": (
        generation("sentences", until=["."], max_gen_toks=40, do_sample=False),
        [{"context": text, "target": ""} for text in OPENINGS],
    ),
    "stops": (
        generation("stops", until=["e k", "there", " he was a", "\n\n"], temperature=0.0),
        [{"context": text, "target": ""} for text in OPENINGS[:3]],
    ),
    "paragraphs": (
        generation("paragraphs", max_gen_toks=300),
        [{"context": text, "target": ""} for text in (OPENINGS[0], LONG)],
    ),
}


def write_tasks(folder: Path) -> None:
    """JSON is YAML, too."""
    for name, (values, docs) in TASKS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, docs)), "utf-8")
        values = {**values, "dataset_kwargs": {"data_files": {"test": str(path)}}}
        (folder / f"{name}.yaml").write_text(json.dumps(values), "utf-8")


# The harness


class Run(NamedTuple):
    """What one run of the harness has written."""

    results: dict[str, dict[str, Any]]  # metrics by task
    samples: dict[str, list[dict[str, Any]]]  # requests and responses by task


def evaluate(command: Sequence[object], folder: Path, out: Path) -> Run:
    """Run the harness on the tasks, offline."""
    tasks = ["--tasks", ",".join(TASKS), "--include_path", folder]
    output = ["--output_path", out, "--log_samples"]
    environ = {
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": os.path.dirname(tinygpt2.__file__),
    }
    done = run([sys.executable, *command, *tasks, *output], environ, folder)
    assert done.code == 0, done.err
    (results,) = out.glob("*/results_*.json")
    samples = {name: read_lines(next(out.glob(f"*/samples_{name}_*.jsonl"))) for name in TASKS}
    return Run(json.loads(results.read_text("utf-8"))["results"], samples)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").rstrip("\n").split("\n")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers, and beside it what it is converted to."""
    for name in ("lm_eval", "accelerate", "transformers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("needs the package lm-eval[hf]")
    folder = tmp_path_factory.mktemp("lm_eval") / "model"
    write_folder(folder)
    tinygpt2.convert(folder, folder.with_suffix(".tg2"))
    return folder


@pytest.fixture(scope="module")
def runs(checkpoint: Path) -> tuple[Run, Run]:
    """Through tinygpt2 and through transformers."""
    folder = checkpoint.parent
    write_tasks(folder)
    converted = f"pretrained={checkpoint.with_suffix('.tg2')}"
    ours = [ADAPTER, "--model", "tinygpt2", "--model_args", converted, "--batch_size", 4]
    loaded = f"pretrained={checkpoint},dtype=float32"
    theirs = ["-m", "lm_eval", "--model", "hf", "--model_args", loaded, "--device", "cpu"]
    return evaluate(ours, folder, folder / "ours"), evaluate(theirs, folder, folder / "theirs")


def responses(run: Run, name: str) -> list[tuple[Any, Any]]:
    """Every request of a task with its response, in the order of the documents."""
    samples = sorted(run.samples[name], key=lambda sample: int(sample["doc_id"]))
    return [
        (arguments, response[0])
        for sample in samples
        for arguments, response in zip(sample["arguments"].values(), sample["resps"])
    ]


def test_metrics(runs: tuple[Run, Run]) -> None:
    """Those of transformers; those of counts exactly. Sums of float32 numbers, in another order,
    differ by some 1e-7 for each token, and perplexities are exponentials of such sums."""
    ours, theirs = (run.results for run in runs)
    assert set(ours) == set(theirs) == set(TASKS)
    for name, metrics in theirs.items():
        assert ours[name].keys() == metrics.keys()
        for metric, expected in metrics.items():
            close = pytest.approx(expected, rel=1e-5) if type(expected) is float else expected
            assert ours[name][metric] == close, (name, metric)
    assert 0 < ours["words"]["acc,none"] < 1
    assert 0 < ours["choices"]["acc,none"] < 1
    assert 0 < ours["next"]["exact_match,none"] < 1
    assert 1 < ours["texts"]["bits_per_byte,none"] < 2


@pytest.mark.parametrize("name", ["choices", "words"])
def test_loglikelihood(runs: tuple[Run, Run], name: str) -> None:
    ours, theirs = (responses(run, name) for run in runs)
    assert [request for request, _ in ours] == [request for request, _ in theirs]
    assert {greedy for _, (_, greedy) in theirs} == {"True", "False"}
    for (request, (found, greedy)), (_, (expected, is_greedy)) in zip(ours, theirs):
        assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-4), request
        assert greedy == is_greedy, request


def test_loglikelihood_rolling(runs: tuple[Run, Run]) -> None:
    ours, theirs = (responses(run, "texts") for run in runs)
    assert len(ours) == len(theirs) == len(TASKS["texts"][1])
    for (request, found), (_, expected) in zip(ours, theirs):
        assert float(found) == pytest.approx(float(expected), rel=1e-5), request


@pytest.mark.parametrize("name", ["next", "sentences", "stops", "paragraphs"])
def test_generate_until(runs: tuple[Run, Run], name: str) -> None:
    ours, theirs = (responses(run, name) for run in runs)
    assert len(ours) == len(TASKS[name][1])
    assert ours == theirs


# What the tasks do not reach


@pytest.fixture(scope="module")
def adapter(checkpoint: Path) -> Any:
    """The adapter in this process."""
    spec = importlib.util.spec_from_file_location("lm_eval_adapter", ADAPTER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TinyGPT2LM(str(checkpoint.with_suffix(".tg2")), batch_size="auto")


def requests(*arguments: tuple[Any, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.mark.filterwarnings("ignore")
def test_sampled_texts(adapter: Any) -> None:
    """Repeats of a request differ, and a run can be repeated."""
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20}
    texts = adapter.generate_until(requests(*[("Once upon a time", options)] * 4))
    assert len(set(texts)) == 4
    adapter.batch_size = 1
    assert adapter.generate_until(requests(*[("Once upon a time", options)] * 4)) == texts
    greedy = {"do_sample": False, "temperature": 1.0, "max_gen_toks": 20}
    assert len(set(adapter.generate_until(requests(*[("Once", greedy)] * 2)))) == 1


@pytest.mark.filterwarnings("ignore")
def test_what_is_refused(adapter: Any) -> None:
    """`hf` has assertions for most of these."""
    for context, text, found in [
        ("  ", "a", "0 and 2"),
        ("s", "", "1 and 0"),
        ("s", LONG, "1 and"),
    ]:
        with pytest.raises(ValueError, match=rf"loglikelihood: expected .* found {found}"):
            adapter.loglikelihood(requests((context, text)))
    with pytest.raises(ValueError, match="max_gen_toks: expected less than 512, found 512"):
        adapter.generate_until(requests(("a", {"max_gen_toks": 512})))
    with pytest.raises(tinygpt2.InputError, match="typical_p: there is no such option"):
        adapter.generate_until(requests(("a", {"typical_p": 0.5})))
