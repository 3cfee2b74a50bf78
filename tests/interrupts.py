"""Interrupts a session at bytecodes of tinygpt2.py and looks whether it goes on rightly.

Run by test_interface.py: `python interrupts.py MODEL.tg2 [EVERY]` raises KeyboardInterrupt at every
EVERY-th bytecode (default 7) of what `scenario` runs, once with the exception held, once without.
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tinygpt2


class Interrupter:
    """Raises KeyboardInterrupt at bytecode number `at`."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename != tinygpt2.__file__ or code.co_name == "__del__":
            return None  # Python itself drops what is raised inside __del__
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def scenario(session: tinygpt2.Session) -> None:
    session.feed([1, 2, 3])
    for _ in session.stream_ids(max_new_tokens=2, seed=1):
        pass
    session.rewind(1)
    _ = session.logits
    session.generate([7], max_new_tokens=2, seed=2, stop="zz")
    session.fork().close()


def check(model: tinygpt2.Model, session: tinygpt2.Session) -> str:
    """What is wrong with the session, or nothing."""
    try:
        tokens = session.tokens
        if tokens and abs(session.logits - model.logits(tokens)[-1]).max() > 1e-4:
            return "other logits"
        session.rewind(len(tokens))
        if session.generate([5], max_new_tokens=3, seed=1) != model.generate(
            [5], max_new_tokens=3, seed=1
        ):
            return "other text"
    except tinygpt2.TinyGPT2Error as error:
        return repr(error)
    return ""


def main() -> int:
    every = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    bad: list[str] = []
    at = 1
    with tinygpt2.load(sys.argv[1], threads=1) as model:
        while True:
            session, interrupter, held = model.session(), Interrupter(at), []
            sys.settrace(interrupter)
            try:
                scenario(session)
            except KeyboardInterrupt as error:
                if at % 2:
                    held.append(error)
            finally:
                sys.settrace(None)
            wrong = check(model, session)
            if wrong:
                bad.append(f"{at}: {wrong}")
            del held
            if interrupter.left > 0:
                break
            at += every
    print("\n".join(bad[:20]))
    print(f"bytecodes: {at}, bad: {len(bad)}")
    return 1 if bad or at < 1000 else 0


if __name__ == "__main__":
    sys.exit(main())
