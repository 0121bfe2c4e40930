"""Everything of the GPU kit that can be tried without a GPU: python bench/gpu/rehearse.py

Builds an environment like that of a machine with a GPU (image.txt, in .venv-gpu-image), gathers the wheels that such a
machine lacks (carried.txt) into .gpu-kit/wheels, checks the calls that only a GPU reaches against the
installed versions (signatures.py), and runs the kit with small shapes on the CPU. Then, on the machine with the GPU:
the repository with .gpu-kit/wheels in it, and `make gpu-check`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
IMAGE, KIT = REPOSITORY / ".venv-gpu-image", REPOSITORY / ".gpu-kit"
PYTHON = "3.12"
LARGEST = 60 * 2**20  # bytes that may travel
LIMIT = 1500  # seconds, for the kit's small shapes on two cores


def interpreter() -> str:
    """Return $GPU_PYTHON, else a Python of the version that such a machine has, else this one with a word about it."""
    found = os.environ.get("GPU_PYTHON") or shutil.which(f"python{PYTHON}")
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
        return found
    print(
        f"There is no Python {PYTHON} here (GPU_PYTHON= names one): rehearsing with {sys.version.split()[0]}; "
        "compiled wheels are for that."
    )
    return sys.executable


def build(python: str) -> Path:
    """Return the interpreter of the environment, made where it is not there yet or what it is made of has changed."""
    stamp, wanted = IMAGE / "image.txt", f"# {python}\n{(HERE / 'image.txt').read_text()}"
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(IMAGE, ignore_errors=True)
        print(f"Building {IMAGE.name}: torch 2.11 and what comes with it, some 5 GB", flush=True)
        run([python, "-m", "venv", str(IMAGE)])
        run([str(IMAGE / "bin/pip"), "install", "-qq", "--disable-pip-version-check", "-r", str(HERE / "image.txt")])
        stamp.write_text(wanted)
    return IMAGE / "bin/python"


def gather(python: Path) -> int:
    """Put the wheels into .gpu-kit/wheels, print their sizes, and return their sum in bytes.

    Built by the environment's own pip, so that compiled ones are for its version of Python.
    """
    wheels = KIT / "wheels"
    stamp, wanted = KIT / "carried.txt", (IMAGE / "image.txt").read_text() + (HERE / "carried.txt").read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(KIT, ignore_errors=True)
        wheels.mkdir(parents=True)
        pip = [str(python), "-m", "pip", "wheel", "-qq", "--disable-pip-version-check", "--no-deps"]
        run([*pip, "-w", str(wheels), "-r", str(HERE / "carried.txt")], DS_BUILD_OPS="0")
        stamp.write_text(wanted)
    sizes = {path.name: path.stat().st_size for path in sorted(wheels.glob("*.whl"))}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 2**20:8.2f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:8.2f} MiB  in {len(sizes)} wheels, of {LARGEST / 2**20:.0f} that may travel")
    return sum(sizes.values())


def run(command: list[str], **env: str) -> None:
    """Run a command, and end with its exit code where it fails."""
    code = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **env}).returncode
    if code:
        sys.exit(f"Failed with exit code {code}: {' '.join(command)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-parts", action="store_true", help="without running the kit's parts on the CPU")
    args = parser.parse_args()
    python = build(interpreter())
    if gather(python) > LARGEST:
        print("That is too much: leave something out of carried.txt, by name.")
        return 1
    sys.path.insert(0, str(HERE))
    from check import environment, install

    site = next(KIT.glob("site-*"), None)
    if site is not None and site.stat().st_mtime < (KIT / "carried.txt").stat().st_mtime:
        shutil.rmtree(site)
    version = subprocess.check_output(
        [str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True
    )
    site = KIT / f"site-{version.strip()}"
    if not site.exists():
        install(site, str(python))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make a busy machine several times slower
    run([str(python), str(HERE / "signatures.py")], **environment(site))
    if not args.no_parts:
        out = KIT / "rehearsal"
        # As on the machine with the GPU: nothing but the repository and its Python.
        run([str(python), str(HERE / "check.py"), "--tiny", "--limit", str(LIMIT), "--out", str(out)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
