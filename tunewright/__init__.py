"""tunewright: from a task description to a fine-tuned, verified, served language model.

What every room speaks, without torch: errors, the run folder, the registry of datasets; `config` (what can be set) and
`plan` (what can run, and how it is split). The rooms beside it: `datagen`, `trainer`, `launch`, `deliver`.

The Python API, see docs/python.md; torch is imported when something is trained or asked:

    run = tunewright.train("strategy=single", {"train.epochs": 1}, dataset=[{"messages": [...]}, ...])
    run.metrics(), run.evaluate(), run.chat("..."), run.merge()
    tunewright.open_run("runs/NAME"), tunewright.compare([...]), tunewright.check_data(...), tunewright.datagen(...)
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunewright.api import Run as Run
    from tunewright.api import check_data as check_data
    from tunewright.api import compare as compare
    from tunewright.api import open_run as open_run
    from tunewright.api import train as train

if os.environ.get("PYTHONSAFEPATH") and (_here := os.getcwd()) != os.path.dirname(os.path.dirname(__file__)):
    # Python 3.10 does not know the variable, and accelerate adds the working directory to PYTHONPATH for DeepSpeed.
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _here]

__version__ = "0.1.0"
_FROM = {
    **dict.fromkeys(("Run", "train", "open_run", "compare", "check_data"), "tunewright.api"),
    **dict.fromkeys(
        (
            "TunewrightError",
            "ConfigError",
            "DataError",
            "StorageError",
            "NumericError",
            "PeerError",
            "MemoryShortage",
            "Preempted",
        ),
        "tunewright.errors",
    ),
}
__all__ = [*_FROM, "datagen"]


def __getattr__(name: str) -> Any:
    if name == "datagen":  # a room that can be called
        return import_module("tunewright.datagen")
    if name not in _FROM:
        raise AttributeError(f"module 'tunewright' has no attribute {name!r}")
    return getattr(import_module(_FROM[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
