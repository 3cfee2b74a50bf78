"""tinygpt2 as a model of EleutherAI's lm-evaluation-harness.

    pip install lm-eval
    python lm_eval_adapter.py --model tinygpt2 --model_args pretrained=gpt2.tg2 --tasks arc_easy

Copy this file beside tinygpt2.py. It is the harness's own command line (`--help`) with one more
model. `pretrained` is a .tg2 file; further arguments are those of `tinygpt2.load`, such as
`threads=4`. `--batch_size 8` generates eight texts at a time. In Python, pass
`TinyGPT2LM("gpt2.tg2")` to `lm_eval.simple_evaluate`.

Requests mean what they mean to the harness's `hf` model, so the numbers are those that transformers
gives: nothing stands before a context, an empty one is begin-of-text or else end-of-text
(`prefix_token_id=` names another token), special tokens in a text count as such, and what is too
long loses its beginning. A ValueError names what has no such meaning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import tinygpt2

CHUNK = 128  # requests between two steps of the progress bar
SEED = 1234  # of the first text that is sampled; the next ones follow
TokenRequest = tuple[Any, list[int], list[int]]  # the two texts, their tokens


def end_of(tokens: list[int], size: int) -> list[int]:
    """The last `size` tokens of a context."""
    if len(tokens) > size:
        text = "a context of %d tokens loses all but the last %d"
        logging.getLogger(__name__).warning(text, len(tokens), size)
    return tokens[-size:]


@register_model("tinygpt2")
class TinyGPT2LM(TemplateLM):  # type: ignore[misc]
    """`TemplateLM` cuts texts into contexts and continuations, as it does for `hf`."""

    max_gen_toks = 256  # the default of `hf`
    eot_token_id = prefix_token_id = 0  # of each model its own

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        prefix_token_id: int | None = None,
        **options: Any,
    ) -> None:
        """`batch_size` is how many texts are generated at a time; results do not depend on it.
        The harness passes `max_batch_size` and `device`; the processor computes."""
        super().__init__()
        self.model = tinygpt2.load(pretrained, **options)
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        config = self.model.config
        if not config.eos_token_ids:
            raise ValueError(f"{self.model.path}: expected an end-of-text token, found none")
        self.max_length = config.n_positions
        self.eot_token_id = config.eos_token_ids[0]
        begin = config.bos_token_id if prefix_token_id is None else prefix_token_id
        self.prefix_token_id = self.eot_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: object
    ) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.model.decode([self.prefix_token_id]))
        return self.model.encode(string, special=True, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[list[TokenRequest]] = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            windows.append([(None, *make_disjoint_window(pair)) for pair in pairs])
        scores = iter(self._loglikelihood_tokens([*chain(*windows)], disable_tqdm))
        totals = []
        for request, parts in zip(requests, windows):
            totals.append(sum(next(scores)[0] for _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **unused: object
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            for start in range(0, len(requests), CHUNK):
                chunk = requests[start : start + CHUNK]
                contexts = [self.context_of(request) for request in chunk]
                texts = [continuation for _, _, continuation in chunk]
                scores = self.model.score_batch(texts, contexts=contexts, top=1)
                for (pair, _, _), score in zip(chunk, scores):
                    answers.append((score.total, not any(score.ranks or ())))
                    if pair is not None:
                        self.cache_hook.add_partial("loglikelihood", pair, answers[-1])
                bar.update(len(chunk))
        return answers

    def context_of(self, request: TokenRequest) -> list[int]:
        """The end of the context, as far as there is room for it."""
        pair, context, continuation = request
        room = self.max_length + 1 - len(continuation)
        if not context or not continuation or room < 1:
            expected = f"tokens of context, and 1 to {self.max_length} of continuation"
            found = f"{len(context)} and {len(continuation)} in {pair}"
            raise ValueError(f"loglikelihood: expected {expected}, found {found}")
        return end_of(context, room)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = []
        groups = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: -len(args[0]),
            group_fn=lambda args: {"options": str(args[1])},
            group_by="gen_kwargs",
        )
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for chunk in groups.get_batched(n=CHUNK):
                contexts, (options, *_) = zip(*chunk)
                answers = self.continue_texts(contexts, options, SEED + len(texts))
                for context, text in zip(contexts, answers):
                    texts.append(text)
                    self.cache_hook.add_partial("generate_until", (context, options), text)
                bar.update(len(chunk))
        ordered: list[str] = groups.get_original(texts)
        return ordered

    def continue_texts(
        self, contexts: Sequence[str], options: dict[str, Any], seed: int
    ) -> Iterator[str]:
        """The continuations of texts that have the same options."""
        values = {"temperature": 0.0, **normalize_gen_kwargs(options, self.max_gen_toks)}
        del values["do_sample"]  # the temperature is 0 if it is False
        values.setdefault("top_k", self.model.config.generation.get("top_k", 50))  # as `hf` has it
        end, hidden = self.eot_token_id, set(self.model.config.special_tokens.values())
        shown = set(self.model.config.eos_token_ids) - hidden
        if shown:
            found = f"the end tokens {sorted(shown)} are not special"
            raise ValueError(f"generate_until: {found}; `hf` shows them, and tinygpt2 does not")
        until = handle_stop_sequences(values.pop("until"), self.model.decode([end]) or None)
        n_new = values.pop("max_gen_toks")
        room = self.max_length - n_new
        if room < 1:
            raise ValueError(f"max_gen_toks: expected less than {self.max_length}, found {n_new}")
        results = self.model.generate_batch(
            [end_of(self.tok_encode(context), room) for context in contexts],
            max_new_tokens=n_new,
            stop=until,
            stop_token_ids=[end],
            seed=range(seed, seed + len(contexts)),
            batch_size=self.batch_size,
            **values,
        )
        for result in results:
            text = self.model.decode(token for token in result.ids if token not in hidden)
            yield postprocess_generated_text(text, until, None)


if __name__ == "__main__":
    cli_evaluate()
