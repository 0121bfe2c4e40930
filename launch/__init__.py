"""The `tunewright` command: compose and validate configuration, start ranks, compare runs. Never imports torch."""

__version__ = "0.1.0"
