"""Rows per second of `tunewright datagen` against a server that takes a fixed time for each reply.

    python bench/datagen_rate.py                       # 640 rows, 1 s a reply, 64 at once; sequential ones: 20 rows
    python bench/datagen_rate.py --latency 0.05        # the client's own work shows: CPU per reply

The server is a process of its own on loopback and never the limit. Compared are the product at `--concurrency` requests
in flight, its mode=sequential, and the loop of gpt-llm-trainer written out here with the plain `openai` client: one
request after the other, up to ten earlier replies in each, and no check of what comes back. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TASK = "Given a riddle, answer with a single word and explain it in one sentence."
PLAN = {"system": "You solve riddles.", "topics": ["animals", "food", "tools"], "personas": ["a child", "a cook"]}


def example(number: int) -> str:
    """Return a reply unlike all others, about 150 words long."""
    words = [hashlib.sha256(f"{number}/{place}".encode()).hexdigest()[:6] for place in range(150)]
    return json.dumps({"instruction": " ".join(words[:40]), "input": "", "output": " ".join(words[40:])})


async def serve(latency: float, port: Connection) -> None:
    """Answer every request after `latency` seconds."""
    count = 0

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                text = json.dumps(PLAN) if b"Plan them" in body else example(count)
                count += 1
                await asyncio.sleep(latency)
                message = {"role": "assistant", "content": text}
                answer = json.dumps(
                    {
                        "id": "chatcmpl-1",
                        "object": "chat.completion",
                        "created": 1,
                        "model": "m",
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                        "usage": {"prompt_tokens": 300, "completion_tokens": 350, "total_tokens": 650},
                    }
                ).encode()
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)
                writer.write(head + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", 0, backlog=512)
    port.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def start_server(latency: float, port: Connection) -> None:
    asyncio.run(serve(latency, port))


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def product(url: str, rows: int, mode: str, concurrency: int) -> dict[str, float]:
    """Run the product in this process."""
    from tunewright.datagen import make_dataset as module
    from tunewright.datagen.curation import Curation
    from tunewright.datagen.endpoint import find_endpoint
    from tunewright.datagen.settings import load_settings

    selecting = 0.0
    plain = Curation._reason

    def timed(self: Curation, row: Any, score: int | None) -> str | None:
        nonlocal selecting
        before = time.thread_time()
        found = plain(self, row, score)
        selecting += time.thread_time() - before
        return found

    Curation._reason = timed  # type: ignore[method-assign]
    out = tempfile.mkdtemp()
    values = {"task": TASK, "name": "bench", "examples": rows, "out": out, "base_url": url, "mode": mode}
    config = load_settings([f"{key}={value}" for key, value in {**values, "concurrency": concurrency}.items()])
    endpoint = find_endpoint(config)
    log = module._open_log(module.Files(Path(out), "bench"), config, endpoint, None, [])
    Path(out).mkdir(exist_ok=True)
    used, began = cpu(), time.perf_counter()
    job = module.Job(config, endpoint, log, None, [], lambda text: None)
    asyncio.run(job.run())
    seconds, used = time.perf_counter() - began, cpu() - used
    began = time.perf_counter()
    assert job.curation is not None
    assert job.curation.full
    module._finish(job, module.Files(Path(out), "bench"), lambda text: None)
    written = time.perf_counter() - began
    log.close()
    shutil.rmtree(out)
    Curation._reason = plain  # type: ignore[method-assign]
    return {
        "rows_per_s": rows / seconds,
        "seconds": seconds,
        "cpu_ms_per_reply": 1000 * (used - selecting) / (rows + 1),
        "select_ms_per_reply": 1000 * selecting / (rows + 1),
        "write_seconds": written,
    }


def bare(url: str, rows: int) -> dict[str, float]:
    """Run the loop of gpt-llm-trainer."""
    import openai

    client = openai.OpenAI(api_key="none", base_url=url)
    earlier: list[str] = []
    used, began = cpu(), time.perf_counter()
    for _ in range(rows):
        messages: list[Any] = [{"role": "system", "content": f"You generate examples. The task: {TASK}"}]
        for text in random.sample(earlier, min(len(earlier), 10)):
            messages.append({"role": "assistant", "content": text})
        reply = client.chat.completions.create(model="m", messages=messages, temperature=0.4, max_tokens=1354)
        earlier.append(str(reply.choices[0].message.content))
    seconds, used = time.perf_counter() - began, cpu() - used
    return {"rows_per_s": rows / seconds, "seconds": seconds, "cpu_ms_per_reply": 1000 * used / rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--sequential-rows", type=int, default=20)
    parser.add_argument("--latency", type=float, default=1.0, help="seconds the server takes for a reply")
    parser.add_argument("--concurrency", type=int, default=64)
    args = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = "none"
    port, far = multiprocessing.Pipe()
    server = multiprocessing.Process(target=start_server, args=(args.latency, far), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{port.recv()}/v1"
    product(url, 4, "parallel", 4)  # imports
    found = {
        "parallel": product(url, args.rows, "parallel", args.concurrency),
        "sequential": product(url, args.sequential_rows, "sequential", 1),
        "bare loop": bare(url, args.sequential_rows),
    }
    server.terminate()
    ideal = args.rows * args.latency / args.concurrency
    fast = found["parallel"]["rows_per_s"]
    for name, values in found.items():
        print(f"{name:>12}: " + ", ".join(f"{key} {value:.2f}" for key, value in values.items()))
    result: dict[str, Any] = {
        "settings": vars(args),
        "found": found,
        "times_sequential": fast / found["sequential"]["rows_per_s"],
        "times_bare_loop": fast / found["bare loop"]["rows_per_s"],
        "ideal_seconds": ideal,
        "over_ideal": found["parallel"]["seconds"] / ideal - 1,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }
    print(
        f"{result['times_sequential']:.1f} times mode=sequential, {result['times_bare_loop']:.1f} times the bare loop, "
        f"{result['over_ideal']:.0%} over the ideal {ideal:.1f} s"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
