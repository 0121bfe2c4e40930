"""What choosing and splitting rows costs: CPU seconds and peak memory against the number of rows.

    python bench/datagen_select.py                        # 2.5k, 5k, 10k and 20k rows
    python bench/datagen_select.py --rows 40000 --all     # beside comparing with every accepted row, one by one

Each size runs in a fresh process. Prompts have 8 to 60 words whose frequencies follow Zipf's law, every tenth one has
an input of 150 to 400 words, a third start with one of a few phrases, and a fifth are an earlier prompt with some words
changed. The tables come first, JSON last.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tunewright.datagen.filtering import Filter, Row, Rules, opening, prompt_tokens
from tunewright.datagen.rouge import Coder
from tunewright.datagen.split import split

SIZES = (2500, 5000, 10000, 20000)
VOCABULARY = 30000
PHRASES = ("write a short story about", "explain to a beginner how", "what is the difference between", "translate this")
SHARE, CLUSTERS = 0.1, 0.6


def synthetic_rows(count: int, seed: int = 1) -> list[Row]:
    """Return rows of which about four in five are new."""
    draw = random.Random(seed)
    words = [f"w{number}" for number in range(VOCABULARY)]
    weights = [1 / (number + 3) for number in range(VOCABULARY)]
    pool = draw.choices(words, weights, k=1_000_000)

    def text(least: int, most: int) -> list[str]:
        start, length = draw.randrange(len(pool) - most), draw.randint(least, most)
        return pool[start : start + length]

    rows: list[Row] = []
    for number in range(count):
        if rows and draw.random() < 0.2:
            earlier = draw.choice(rows)
            changed = [draw.choice(pool) if draw.random() < 0.15 else word for word in earlier["instruction"].split()]
            row = {**earlier, "instruction": " ".join(changed)}
        else:
            phrase = draw.choice(PHRASES).split() if draw.random() < 1 / 3 else []
            given = " ".join(text(150, 400)) if draw.random() < 0.1 else ""
            row = {"instruction": " ".join(phrase + text(8, 60)), "input": given}
        rows.append({**row, "output": f"This is answer number {number}, and it is in plain English."})
    return rows


def compared_with_all(rows: list[Row], similarity: float) -> int:
    """Return how many rows are kept when each is compared with every accepted one."""
    from rapidfuzz.distance import Indel
    from rapidfuzz.process import extractOne

    coder = Coder()
    kept: list[str] = []
    for row in rows:
        text = coder.encode(prompt_tokens(opening(row)))
        if extractOne(text, kept, scorer=Indel.normalized_similarity, score_cutoff=similarity) is None:
            kept.append(text)
    return len(kept)


def peak() -> float:
    """Return the most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return CPU seconds, since other work on the machine must not count, and the result."""
    start = time.process_time()
    result = work()
    return round(time.process_time() - start, 2), result


def measure(count: int, *, all_pairs: bool) -> dict[str, Any]:
    """Measure one size in this process."""
    import py3langid
    import rapidfuzz.process

    rows = synthetic_rows(count)
    before = peak()
    found: dict[str, Any] = {"rows": count, "rapidfuzz": rapidfuzz.__version__}
    for name, language in (("select", None), ("select_language", "en")):
        if language:
            py3langid.rank("loads the model")
        row_filter = Filter(Rules(similarity=0.7, language=language))
        found[name], verdicts = timed(lambda taker=row_filter: [taker.take(row) for row in rows])
        if not language:
            kept = [row for row, reason in zip(rows, verdicts, strict=True) if reason is None]
            found |= {"accepted": len(kept), "refused": dict(Counter(filter(None, verdicts)))}
        del row_filter
    found["split"], parts = timed(lambda: split(kept, SHARE, 1, CLUSTERS))
    found |= {"test": len(parts.test), "highest": round(parts.highest, 3)}
    found |= {"rows_mib": round(before), "peak_mib": round(peak())}
    if all_pairs:
        found["all_pairs"], accepted = timed(lambda: compared_with_all(rows, 0.7))
        found["same"] = accepted == len(kept)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES)
    parser.add_argument("--all", action="store_true", help="also compare with every accepted row")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.rows[0], all_pairs=args.all)))
        return
    results = []
    columns = ("rows", "accepted", "select", "select_language", "split", "test", "highest", "peak_mib", "all_pairs")
    print("".join(f"{name:>16}" for name in columns))
    for count in args.rows:
        command = [sys.executable, __file__, "--one", "--rows", str(count), *(["--all"] if args.all else [])]
        found = json.loads(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)
        print("".join(f"{found.get(name, '-'):>16}" for name in columns), flush=True)
        results.append(found)
    print(json.dumps({"python": platform.python_version(), "machine": platform.processor(), "sizes": results}))


if __name__ == "__main__":
    main()
