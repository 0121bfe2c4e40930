"""A stand-in for a large model's server: it speaks OpenAI's chat completions, and writes examples from a few phrases.

with StandIn() as server:
    tunewright.datagen(task="...", provider="openai_compatible", base_url=server.url, model="stand-in", ...)
"""

from __future__ import annotations

import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TEAMS = {
    "billing": ["invoice is wrong", "invoice came twice", "invoice is too high", "invoice lists what I never bought"],
    "delivery": ["parcel is late", "parcel arrived open", "parcel went to a neighbour", "parcel is lost"],
    "technical": ["app crashes", "app shows a white screen", "app forgets my password", "app has no sound"],
}
OPENINGS = ["Hello,", "Hi there,", "Good morning.", "Please help:", "Once more:", "Urgent!", "Dear team,"]
THINGS = ["for my headphones", "with the red lamp", "on the second order", "since Monday", "after the holidays"]
THINGS += ["for a birthday gift", "in our office", "for the third time", "with the new tablet", "on the blue bicycle"]
CLOSINGS = ["What now?", "Can you look?", "I am waiting.", "Thanks a lot.", "Who can tell me more?", "Any news?"]
CLOSINGS += ["It is unpleasant.", "Call me, please.", "This cannot be right.", "I would like to keep it."]
PLAN = {
    "system": "You name the team that a customer's message is for.",
    "topics": list(TEAMS),
    "personas": ["a new customer", "a loyal customer"],
}


def example(number: int, team: str) -> dict[str, str]:
    """Return one training example; the same number gives the same one."""
    pick = random.Random(number).choice
    return {
        "instruction": f"{pick(OPENINGS)} the {pick(TEAMS[team])} {pick(THINGS)}, {number}. {pick(CLOSINGS)}",
        "input": "",
        "output": team,
    }


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["messages"][-1]["content"]
        found = re.search(r"example number (\d+).*Topic: (\w+)", prompt, flags=re.DOTALL)
        said = example(int(found[1]), found[2]) if found else PLAN
        message = {"role": "assistant", "content": json.dumps(said)}
        reply: dict[str, Any] = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": asked["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 200, "completion_tokens": 20, "total_tokens": 220},
        }
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


class StandIn:
    def __enter__(self) -> StandIn:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
