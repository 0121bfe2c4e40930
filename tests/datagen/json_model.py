"""A tiny chat model that replies in JSON, trained here from scratch in about a minute, for a real server in tests.

What it says means nothing, but it is sampled: hundreds of distinct replies, a few of them malformed in the ways in
which real models fail. Which kind of reply a request gets depends on one phrase in it: see `KINDS`. Built once and
kept under a key of this file and the libraries.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from tunewright.trainer.model.tiny import SPECIAL_TOKENS

VOCAB_SIZE = 2048
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
STEPS = 400
BATCH = 16
LEARNING_RATE = 4e-3
MATRIX_LEARNING_RATE = 0.02
WARMUP_STEPS = 20
MIN_P = 0.01
FLAWS_SHARE = 0.05
CHINESE_SHARE = 0.15
SEED = 0


def _words(text: str) -> list[str]:
    return text.split()


NOUNS = _words(
    "lamp river kettle ladder garden violin compass engine blanket harbour candle mirror basket tunnel meadow anchor "
    "feather hammer island jacket kitchen lantern market needle orchard pencil quarry ribbon saddle temple umbrella "
    "valley window yacht bakery canvas desert elevator ferry glacier hotel insect jungle kiosk library museum notebook "
    "ocean palace queue rocket stadium theatre uniform village wagon zebra budget contract invoice printer password "
    "calendar recipe schedule ticket voyage weather algorithm battery circuit database function keyboard network robot "
    "server tablet vaccine muscle planet comet enzyme fossil mineral pollen volcano"
)
ADJECTIVES = _words(
    "quiet broken ancient bright hollow gentle frozen crooked rapid narrow golden dusty cheap fragile heavy modern "
    "sour round silent wooden purple late honest remote sharp tiny urgent vague warm yellow brave calm dense early "
    "fancy grim huge idle lucky mild neat odd plain rare slow"
)
VERBS = _words(
    "repair paint measure describe sell borrow carry design explain find guard hide improve join keep lift move name "
    "order plan question remove sort translate use visit wash compare count draw clean rent trade weigh"
)
PEOPLE = _words(
    "nurse pilot teacher baker sailor lawyer farmer student painter clerk tailor chemist singer driver gardener judge "
    "miner poet waiter plumber"
)
PLACES = _words(
    "Oslo Lima Cairo Kyoto Lagos Delhi Quito Perth Turin Accra Sofia Dublin Hanoi Porto Tunis Malta Havana Bergen"
)
CHINESE_NOUNS = _words(
    "灯 河流 水壶 花园 小提琴 火车 市场 铅笔 寺庙 雨伞 山谷 窗户 沙漠 图书馆 海洋 火箭 合同 日历 食谱 天气"
)
CHINESE_VERBS = _words("修理 描述 测量 翻译 比较 解释 设计 清洗 寻找 改进 移动 命名")
CHINESE_ADJECTIVES = _words("安静的 古老的 明亮的 破旧的 金色的 木制的 温暖的 罕见的 便宜的 巨大的")

# `{n}` and so on are drawn for each place anew.
QUESTIONS = (
    "{V} the {a} {n} and the {n} of {l}.",
    "How does a {p} {v} {d} {n}s with a {a} {n}?",
    "Which {a} {n} would the {p} {v} near the {n}?",
    "Why is the {n} in {l} {a} and never {a}?",
    "My {n} is {a}: should a {p} {v} it by the {n}?",
    "List {d} reasons to {v} a {n} without a {n}.",
    "{V}, {v} and {v} one {a} {n}.",
    "A {p} asks for a {a} {n}; {v} the {n} for {d} days.",
    "Can you {v} {d} {a} {n}s before the {n} gets {a}?",
    "What do a {n}, a {n} and a {a} {n} share?",
    "Tell the {p} from {l} to {v} the {n}.",
    "{d} {n}s, {d} {n}s: which is more {a} in {l}?",
)
STATEMENTS = (
    "The {p} of {l} has a {a} {n}.",
    "{V} the {n} first, then {v} {d} {n}s.",
    "A {a} {n} and a {a} {n}.",
    "No {n} is {a} enough for a {p}.",
    "It takes {d} {n}s to {v} the {n}.",
    "In {l} they {v} every {n} with a {n}.",
    "Because the {n} is {a}, {v} the {n} instead.",
    "{l}.",
    "{d}.",
)
CHINESE_QUESTIONS = ("请{v}{a}{n}和{n}。", "怎样{v}{d}个{a}{n}?", "为什么{n}比{n}更重要?", "用{n}来{v}{a}{n}。")
CHINESE_STATEMENTS = ("{a}{n}需要{v}。", "先{v}{n},再{v}{n}。", "{d}个{n}。", "因为{n}是{a},所以{v}它。")


def _fill(template: str, draw: random.Random) -> str:
    words = {"{n}": NOUNS, "{a}": ADJECTIVES, "{v}": VERBS, "{p}": PEOPLE, "{l}": PLACES}
    if not template.isascii():
        words = {"{n}": CHINESE_NOUNS, "{a}": CHINESE_ADJECTIVES, "{v}": CHINESE_VERBS}
    for slot, choices in words.items():
        while slot in template:
            template = template.replace(slot, draw.choice(choices), 1)
    while "{V}" in template:
        template = template.replace("{V}", draw.choice(VERBS).capitalize(), 1)
    while "{d}" in template:
        template = template.replace("{d}", str(draw.randint(2, 999)), 1)
    return template


def _question(draw: random.Random, chinese: bool) -> str:
    return _fill(draw.choice(CHINESE_QUESTIONS if chinese else QUESTIONS), draw)


def _statement(draw: random.Random, chinese: bool) -> str:
    return _fill(draw.choice(CHINESE_STATEMENTS if chinese else STATEMENTS), draw)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _chinese(draw: random.Random) -> bool:
    return draw.random() < CHINESE_SHARE


def _system_message(draw: random.Random) -> str:
    text = _fill("You are a {a} {p} from {l}. You are given a {n} and {v} it. Answer with a {a} {n}.", draw)
    return "你是一位助手。" + _statement(draw, True) if _chinese(draw) else text


def _plan(draw: random.Random) -> str:
    topics = [_fill("{a} {n}s", draw) for _ in range(draw.randint(8, 12))]
    personas = [_fill("a {a} {p} from {l}", draw) for _ in range(draw.randint(4, 6))]
    return _json({"system": _system_message(draw), "topics": topics, "personas": personas})


def _single(draw: random.Random) -> str:
    chinese = _chinese(draw)
    given = _statement(draw, chinese) if draw.random() < 0.5 else ""
    answer = _statement(draw, chinese)
    if draw.random() < 0.1:
        answer += "\n" + _statement(draw, chinese)
    return _json({"instruction": _question(draw, chinese), "input": given, "output": answer})


def _conversation(draw: random.Random) -> str:
    chinese = _chinese(draw)
    turns = [
        {"user": _question(draw, chinese), "assistant": _statement(draw, chinese)} for _ in range(draw.randint(2, 3))
    ]
    return _json({"turns": turns})


def _score(draw: random.Random) -> str:
    return _json({"score": draw.randint(1, 5), "reason": _fill("The {n} is {a}, but the {n} is {a}.", draw)})


def _plain(draw: random.Random) -> str:
    return _statement(draw, _chinese(draw))


def _is_text(text: str) -> bool:
    return bool(text.strip()) and not text.lstrip().startswith("{")


def _has(shape: dict[str, type]) -> Callable[[str], bool]:
    """Return whether a reply is a JSON object of exactly these fields and nothing else."""

    def check(text: str) -> bool:
        try:
            found = json.loads(text)
        except ValueError:
            return False
        return isinstance(found, dict) and {key: type(value) for key, value in found.items()} == shape

    return check


@dataclass(frozen=True)
class Kind:
    """A kind of reply, the phrase in a request that asks for it, and how often training shows it."""

    name: str
    marker: str
    write: Callable[[random.Random], str]
    valid: Callable[[str], bool]
    weight: float


# To add a kind: a line here. A request must hold one marker only: a token of its own, and all that the model sees.
KINDS = (
    Kind("system", "Write the system message", _system_message, _is_text, 0.08),
    Kind("plan", "Reply with the plan", _plan, _has({"system": str, "topics": list, "personas": list}), 0.22),
    Kind(
        "single", "Reply with one JSON object", _single, _has({"instruction": str, "input": str, "output": str}), 0.34
    ),
    Kind("turns", "Reply with one conversation", _conversation, _has({"turns": list}), 0.2),
    Kind("score", "Reply with a score", _score, _has({"score": int, "reason": str}), 0.1),
    Kind("plain", "", _plain, _is_text, 0.08),  # anything else that is asked
)


def _flawed(text: str, draw: random.Random) -> str:
    """What real models do instead of what was asked; the first two can still be read."""
    return draw.choice(
        (
            f"```json\n{text}\n```",
            f"Here is the example:\n{text}",
            text.rstrip("}]"),
            text.replace('", "', '" "'),
            text.replace('{"', "{", 1),
            "I'm sorry, but I can't help with that.",
            '{"answer": ' + _json(_statement(draw, False)) + "}",
        )
    )


def model_folder(cache_dir: Path) -> Path:
    """Return where the model is, or will be once built."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for package in ("torch", "transformers", "tokenizers"):
        digest.update(f"{package}={version(package)}".encode())
    return cache_dir / "models" / f"json-replies-{digest.hexdigest()[:16]}"


def build_json_model(cache_dir: Path) -> Path:
    """Build the model unless it is there, and return its folder. Safe to call from several processes."""
    folder = model_folder(cache_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            staging = folder.with_name(f"{folder.name}.{os.getpid()}.part")
            shutil.rmtree(staging, ignore_errors=True)
            _build(staging)
            staging.rename(folder)
    return folder


def _build(folder: Path) -> None:
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    draw = random.Random(SEED)
    tokenizer = _train_tokenizer(draw)
    ends = {
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), bos_token_id=None, **SHAPE, **ends))
        _train(model, _batches(tokenizer, draw))
    # Without do_sample, `transformers serve` ignores the temperature of a request; top_k=50 is the library's default.
    # min_p drops what is hardly ever right, which a model as small as this one says all the same.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, min_p=MIN_P, **ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_tokenizer(draw: random.Random) -> Any:
    from tokenizers import AddedToken, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    backend = Qwen2Tokenizer().backend_tokenizer
    replies = [kind.write(draw) for kind in KINDS for _ in range(400)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*replies, "system\nuser\nassistant\n" * 100], trainer)
    trained = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=SHAPE["max_position_embeddings"],
    )
    tokenizer.add_tokens([AddedToken(kind.marker, normalized=False, special=False) for kind in KINDS if kind.marker])
    # Looking through a long request is more than so small a model learns in a minute: it sees the phrase alone.
    phrase = "".join(
        f"{{% if {json.dumps(kind.marker)} in messages[-1]['content'] %}}{kind.marker}{{% endif %}}"
        for kind in KINDS
        if kind.marker
    )
    head = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer.chat_template = f"<|im_start|>user\n{phrase}<|im_end|>\n{head}"
    return tokenizer


def _example(tokenizer: Any, draw: random.Random) -> tuple[list[int], int]:
    """Return (tokens, length of the prompt) of a request and a reply."""
    kind = draw.choices(KINDS, [kind.weight for kind in KINDS])[0]
    messages = [{"role": "user", "content": kind.marker}]
    prompt = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))["input_ids"]
    text = kind.write(draw)
    if kind.name not in ("system", "plain", "plan") and draw.random() < FLAWS_SHARE:
        text = _flawed(text, draw)
    reply = tokenizer(f"{text}<|im_end|>")["input_ids"]
    return prompt + reply, len(prompt)


def _batches(tokenizer: Any, draw: random.Random) -> Iterator[dict[str, Any]]:
    import torch

    while True:
        # Sorted by length, so that little of a batch is padding.
        pool = sorted((_example(tokenizer, draw) for _ in range(8 * BATCH)), key=lambda example: len(example[0]))
        for number in draw.sample(range(8), 8):
            rows = pool[number * BATCH : (number + 1) * BATCH]
            width = max(len(tokens) for tokens, _ in rows)
            pad = [tokenizer.pad_token_id] * width
            yield {
                "input_ids": torch.tensor([(tokens + pad)[:width] for tokens, _ in rows]),
                "labels": torch.tensor([([-100] * n + t[n:] + [-100] * width)[:width] for t, n in rows]),
            }


def _train(model: Any, batches: Iterator[dict[str, Any]]) -> None:
    import torch

    layers = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    optimizers = [
        torch.optim.Muon(layers, lr=MATRIX_LEARNING_RATE, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _rate) for optimizer in optimizers]
    model.train()
    for _ in range(STEPS):
        loss = model(**next(batches), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
    model.eval()


def _rate(step: int) -> float:
    return min((step + 1) / WARMUP_STEPS, 1.0, (STEPS - step) / (0.4 * STEPS))
