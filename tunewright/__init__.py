"""tunewright: from a task description to a fine-tuned, verified, served language model.

What every room speaks, without torch: errors, the run folder, the registry of datasets; `config` (what can be set) and
`plan` (what can run, and how it is split). The rooms beside it: `datagen`, `trainer`, `launch`, `deliver`.
"""

__version__ = "0.1.0"
