"""The C++ compiler and ninja, with which DeepSpeed and torch.compile build kernels while a run starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tunewright.errors import first_line
from tunewright.findings import Finding, fix, note, ok

GROUP = "compiler"
# What kernels of the host include: Python's own header comes with python3-dev, and OpenMP with the compiler.
SOURCE = "#include <Python.h>\n#include <omp.h>\n#include <vector>\nint main() { return omp_get_max_threads() == 0; }\n"
SECONDS = 30


def look(needed_by: str | None) -> list[Finding]:
    """Compile a few lines as torch's extensions are compiled.

    Args:
        needed_by: the setting that cannot do without, or None: then a missing compiler is good to know.
    """
    name = os.environ.get("CXX", "c++")  # as torch.utils.cpp_extension chooses it (torch 2.15)
    path = shutil.which(name)
    if path is None:
        return [_missing(needed_by, f"There is no C++ compiler ({name}) on the path.", "apt install g++, or set CXX.")]
    said = _try(path)
    if said:
        advice = "Install the header files of this Python (apt install python3-dev)."
        if "Python.h" not in said:
            advice = "Install a whole g++ (apt install g++), or set CXX to another one."
        return [_missing(needed_by, f"{path} cannot compile an extension: {said}.", advice)]
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").is_file():
        return [_missing(needed_by, "ninja, with which kernels are built, is not on the path.", "pip install ninja")]
    return [ok(GROUP, f"{path} compiles extensions, ninja is there")]


def _missing(needed_by: str | None, found: str, do: str) -> Finding:
    if needed_by:
        return fix(GROUP, f"{found} {needed_by} needs it.", do)
    return note(GROUP, f"{found} Offload to the CPU and train.compile need it.", do)


def _try(compiler: str) -> str | None:
    """Return what the compiler says against the lines, or None."""
    include = sysconfig.get_path("include")
    with tempfile.TemporaryDirectory(prefix="tunewright-") as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(SOURCE, encoding="utf-8")
        command = [compiler, "-std=c++17", "-fopenmp", "-fsyntax-only", f"-I{include}", str(source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            return first_line(error)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    return lines[0].partition("error:")[2].strip() if lines else f"exit code {done.returncode}"
