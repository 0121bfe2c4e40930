"""tunewright: from a task description to a fine-tuned, verified, served language model.

What every room speaks, without torch: errors, the run folder, the registry of datasets; `config` (what can be set) and
`plan` (what can run, and how it is split). The rooms beside it: `datagen`, `trainer`, `launch`, `deliver`.
"""

import os
import sys

if os.environ.get("PYTHONSAFEPATH") and (_here := os.getcwd()) != os.path.dirname(os.path.dirname(__file__)):
    # Python 3.10 does not know the variable, and accelerate adds the working directory to PYTHONPATH for DeepSpeed.
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _here]

__version__ = "0.1.0"
