"""One rank of a run whose folder and data are prepared, as `tunewright train` starts it.

accelerate launch ... -m tunewright.trainer --run runs/NAME [--checkpoint runs/NAME/checkpoints/checkpoint-8]
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from tunewright.config.compose import load_config
from tunewright.errors import StorageError
from tunewright.ranks import die_with_parent, launched
from tunewright.run_folder import RunDir
from tunewright.trainer.console import write_error
from tunewright.trainer.prepared import Prepared, find_prepared
from tunewright.trainer.stopping import Stopping
from tunewright.trainer.train_rank import train_rank


def main(argv: list[str]) -> int:
    """Run this rank to the end of its process."""
    if argv[:1] != ["--run"]:
        print(__doc__)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    die_with_parent()
    run, checkpoint = RunDir(Path(argv[1])), Path(argv[3]) if argv[2:3] == ["--checkpoint"] else None
    stopping = Stopping(partial(write_error, run.logs))
    stopping.listen()
    config = load_config(run.config, trusted=launched())
    # The launcher has fetched everything; a hub that changes meanwhile must not give the ranks other rows.
    config.offline = config.offline or not config.data.streaming
    train_rank(config, run, checkpoint, lambda: _prepared(config), stopping)


def _prepared(config: DictConfig) -> Prepared:
    found = find_prepared(config)
    if found is None:
        raise StorageError(
            f"Model or tokens are not in {config.data.cache_dir} any more. `tunewright train` makes them."
        )
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
