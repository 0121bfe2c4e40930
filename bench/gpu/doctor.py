"""Does `tunewright doctor` know this machine? python bench/gpu/doctor.py OUT.json [--tiny]

It has to end with as many things to fix as it says, to know every GPU that torch sees, and to have tried each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="accepted as by other parts")
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    ranks = [] if gpus == 1 else ["--ranks", str(gpus or 2)]
    command = [sys.executable, "-m", "tunewright.launch.cli", "doctor", "--json", *ranks]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    try:
        told = json.loads(done.stdout)
    except ValueError:
        print(done.stdout, done.stderr)
        return 1
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    assert done.returncode == told["to_fix"], done
    for group in ("GPUs", "device"):
        names = [one["found"].partition(":")[0] for one in told["findings"] if one["group"] == group]
        named = {number for text in names if text.startswith("GPU ") for number in re.findall(r"\d+", text)}
        assert named == {str(number) for number in range(gpus)}, f"{group}: {named}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
