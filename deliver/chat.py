"""`tunewright chat RUN`: the same question to the base and to the tuned model, answers side by side."""

from __future__ import annotations

import sys
from pathlib import Path

from tunewright.deliver.generate import Answerer, open_run
from tunewright.trainer.data.messages import Message
from tunewright.trainer.inputs import check_base
from tunewright.trainer.prepared import fetch

HELP = "Empty line or Ctrl-D ends, /reset forgets the conversation."


def chat(
    path: Path, prompts: list[str] | None, system: str | None, max_new_tokens: int, *, trusted: bool = False
) -> int:
    """Answer the given prompts and stop, or ask for questions on the terminal."""
    run, config = open_run(path, trusted=trusted, checkpoints=True)
    model_path = fetch(config, print, weights=True)
    check_base(run, model_path)
    base, tuned = Answerer(config, model_path), Answerer(config, model_path)
    with tuned.tuned(run):
        if prompts:
            for prompt in prompts:
                print(f"\n> {prompt}")
                _ask([base, tuned], [_opening(system), _opening(system)], prompt, max_new_tokens)
            return 0
        print(HELP)
        histories = [_opening(system), _opening(system)]
        while prompt := _question():
            if prompt == "/reset":
                histories = [_opening(system), _opening(system)]
            else:
                _ask([base, tuned], histories, prompt, max_new_tokens)
    return 0


def _opening(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _question() -> str:
    try:
        return input("\n> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _ask(models: list[Answerer], histories: list[list[Message]], prompt: str, max_new_tokens: int) -> None:
    """Ask each model in the light of its own conversation so far, and keep what it says."""
    for name, model, history in zip(("base ", "tuned"), models, histories, strict=True):
        history.append({"role": "user", "content": prompt})
        answer = model.answer([model.renderer.prompt(history)], max_new_tokens)[0]
        history.append({"role": "assistant", "content": answer})
        print(f"{name} | {answer}", flush=True)
