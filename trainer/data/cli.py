"""`tunewright data`: look at data before training on it. What a subcommand needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import ConfigError, DataError, StorageError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

    from trainer.data.cache import CachedDataset, TokenCache

CHECK_HELP = """\
Make the tokens of some datasets and report on them: dropped rows and why, lengths, copies, overlap with held-out rows.
It needs no GPU and no weights, and what it makes is what training uses.

  tunewright data check                                        the shipped data
  tunewright data check huanhuan model=qwen2_5_7b data.cutoff_len=512
  tunewright data check my/rows.jsonl data.eval_size=0.1 --html report.html

Exit code 3 when more rows than data.max_dropped cannot be used.
"""

SHOW_HELP = """\
Print a row as the model sees it, token by token, and which tokens are learnt.

  tunewright data show huanhuan --row 17 model=qwen2_5_7b data.cutoff_len=512
  tunewright data show my/rows.jsonl --dump tokens.jsonl
"""

ADD_HELP = """\
Propose a registry entry for a file or a folder, and add it to dataset_info.json; what is there stays as it is.

  tunewright data add data/riddles.jsonl
  tunewright data add ~/downloads/riddles.jsonl --copy --name riddles
"""

TRAINED, MASKED, RESET = ("\x1b[32m", "\x1b[92m"), ("\x1b[2m", "\x1b[90m"), "\x1b[0m"  # two shades: tokens alternate
LONGEST_CHARACTER = 4  # tokens: of bytes, in UTF-8
PLAIN = r"\w.+-"  # characters of names, as a class of a regular expression
MESSAGE_SHOWN = 200  # characters of a message in a preview
COPIED_AT_ONCE = 1000  # examples in memory while dumping


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the group of subcommands."""
    group = commands.add_parser("data", help="check, show and register datasets")
    group.set_defaults(run=lambda args: _print_help(group))
    kinds = group.add_subparsers(metavar="COMMAND")

    check = _command(kinds, "check", "report on datasets before training", CHECK_HELP)
    check.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="NAME|key=value",
        help="datasets as in data.names (entries, paths, hub:ORG/NAME), and Hydra overrides as in `tunewright train`",
    )
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page as well")
    _add_config_dir(check)
    check.set_defaults(run=run_check)

    show = _command(kinds, "show", "print a row as the model sees it", SHOW_HELP)
    show.add_argument("name", metavar="NAME", help="a dataset as in data.names")
    show.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="Hydra overrides")
    show.add_argument("--row", type=int, metavar="N", help="which row, counted from 0 (the default)")
    show.add_argument("--ids", action="store_true", help="a line for each token: index, id, label, text")
    show.add_argument("--dump", type=Path, metavar="FILE", help="write all examples as JSONL: row, input_ids, labels")
    _add_config_dir(show)
    show.set_defaults(run=run_show)

    add = _command(kinds, "add", "add a file to a registry", ADD_HELP)
    add.add_argument("file", type=Path, metavar="FILE", help="a data file or folder")
    add.add_argument("--name", help="name of the entry; default: the file's name without its suffix")
    add.add_argument("--dir", type=Path, default=Path("data"), help="folder of dataset_info.json [data]")
    add.add_argument("--copy", action="store_true", help="copy the file into that folder first")
    add.add_argument("--dry-run", action="store_true", help="show the entry and write nothing")
    add.set_defaults(run=run_add)


def _command(
    kinds: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, text: str
) -> argparse.ArgumentParser:
    return kinds.add_parser(name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def _add_config_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config-dir", type=Path, help="a folder with configuration groups of your own")


def _print_help(group: argparse.ArgumentParser) -> int:
    group.print_help()
    return 0


# ---- check and show: the configuration and its tokens ---------------------------------------------------------------


def run_check(args: argparse.Namespace) -> int:
    """Run `tunewright data check` and return its exit code.

    Raises:
        ConfigError: a setting cannot work.
        DataError: the data cannot be read, or training would refuse it: then the report is printed before.
    """
    from launch.hardware import find_devices
    from launch.legality import check
    from trainer.data.report import make_report, report_json, report_text

    names = [item for item in args.overrides if _is_name(item)]
    config = compose(names, [item for item in args.overrides if not _is_name(item)], args.config_dir)
    plan = check(config, find_devices())
    _settle(config)
    tokens = make_tokens(config)
    report = make_report(tokens.cache, config, plan, tokens.tokenizer)
    print(json.dumps(report_json(report), ensure_ascii=False, indent=2) if args.json else report_text(report))
    if args.html:
        from trainer.data.page import write_page

        write_page(report, args.html)
        print(f"\nThe same as a page: {args.html}", file=sys.stderr if args.json else sys.stdout)
    sys.stdout.flush()  # what follows goes to standard error
    if tokens.refusal:
        raise tokens.refusal
    return 0


def _is_name(item: str) -> bool:
    """A path may hold "=", which otherwise makes an override."""
    return "=" not in item or Path(item).expanduser().exists()


def compose(names: Sequence[str], overrides: Sequence[str], extra_dir: Path | None) -> DictConfig:
    """Compose a configuration whose data are these names, or without names what the overrides say.

    Raises:
        ConfigError: see `launch.compose.compose_config`; or the overrides name datasets as well.
    """
    from launch.compose import compose_config

    if not names:
        return compose_config(overrides, extra_dir)
    keys = [item.lstrip("+~").partition("=")[0] for item in overrides]
    if "data.names" in keys:
        raise ConfigError(f"`data.names` and {', '.join(names)} both say which data: keep one of them.")
    group = [] if "data" in keys else ["data=registry"]
    config = compose_config([*group, *overrides, "data.names=[set_below]"], extra_dir)
    # Not as an override: a path may hold what is syntax there.
    config.data.names = list(names)
    return config


@dataclass(frozen=True)
class Tokens:
    """The tokens of a configuration, and why training would refuse them."""

    cache: TokenCache
    tokenizer: PreTrainedTokenizerBase
    refusal: DataError | None


def make_tokens(config: DictConfig) -> Tokens:
    """Make the tokens of a configuration, with progress on standard error.

    Raises:
        DataError: the data cannot be read; data that can be read and not be trained on is returned with the refusal.
    """
    from trainer.data.cache import find_unchecked
    from trainer.models import find_model, load_tokenizer
    from trainer.prepare import find_prepared, prepare

    try:
        with redirect_stdout(sys.stderr):  # libraries say things there, and the report may be read by a program
            prepared = find_prepared(config) or prepare(config, _progress)
    except DataError as error:
        model_path = find_model(config.model, config.data.cache_dir)
        refused = find_unchecked(config, model_path) if model_path else None
        if model_path is None or refused is None:
            raise
        return Tokens(refused, load_tokenizer(model_path, config.model), error)
    return Tokens(prepared.cache, load_tokenizer(prepared.model_path, config.model), None)


def _settle(config: DictConfig) -> None:
    """Tell libraries, before they are imported, what `trainer.prepare` tells them."""
    for library in ("DATASETS", "TRANSFORMERS"):  # our own lines tell how far it is
        os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["DS_ACCELERATOR"] = "cpu"  # nothing here needs a GPU, and DeepSpeed need not look for one


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- show -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """The text of a token, or of several that are one character together, of which this is number `part`."""

    text: str
    part: int = 1
    parts: int = 1


def run_show(args: argparse.Namespace) -> int:
    """Run `tunewright data show` and return its exit code.

    Raises:
        DataError: no such dataset or row.
        StorageError: the dump cannot be written.
    """
    config = compose([args.name], args.overrides, args.config_dir)
    _settle(config)
    tokens = make_tokens(config)
    cached = tokens.cache.train[0]
    if args.dump:
        print(f"Wrote {dump(cached, args.dump):,} examples of {cached.name} to {args.dump}.")
    if args.row is not None or not args.dump:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print("\n".join(row_lines(cached, tokens.tokenizer, args.row or 0, ids=args.ids, colour=colour)))
    return 0


def row_lines(
    cached: CachedDataset, tokenizer: PreTrainedTokenizerBase, row: int, *, ids: bool, colour: bool
) -> list[str]:
    """Return lines that show a row: what became of it, then its tokens, or why it was dropped.

    Raises:
        DataError: there is no such row.
    """
    import numpy as np

    from trainer.data.render import IGNORED
    from trainer.data.tokens import excerpt

    read = cached.outcome.read
    if not 0 <= row < read:
        raise DataError(f"{cached.name} has no row {row}: rows go from 0 to {read - 1}.")
    line = cached.table().slice(row, 1).to_pylist()[0]
    if line["reason"] >= 0:
        source = next(islice(cached.rows, row, None))
        return [f"{cached.name} row {row}: dropped, {cached.outcome.reasons[line['reason']]}", f"  {excerpt(source)}"]
    lines = []
    examples = np.flatnonzero(cached.part.rows == row)
    for number, index in enumerate(examples.tolist(), 1):
        example = cached.examples()[index]
        input_ids, labels = example["input_ids"], example["labels"]
        trained = sum(label != IGNORED for label in labels)
        which = f", example {number} of {len(examples)}" if len(examples) > 1 else ""
        cut = "truncated" if line["truncated"] else "not truncated"
        lines.append(f"{cached.name} row {row}{which}: {len(input_ids)} tokens, {trained} trained, {cut}")
        made = pieces(tokenizer, input_ids)
        if ids:
            lines += _id_lines(input_ids, labels, made)
        else:
            lines += [_legend(colour), *_token_text(made, [label != IGNORED for label in labels], colour).split("\n")]
    return lines


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Piece]:
    """Return the text of each token, special tokens included.

    Tokens of bytes may hold a part of a character: the text of all its parts stands at the first of them. Each text is
    what decoding gains by the token, because some tokenizers drop the space in front of the first one.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    made: list[Piece] = []
    before = first = 0
    for end in range(1, len(ids) + 1):
        through, known = decode(ids[before:end]), decode(ids[before:first])
        text = through[len(known) :] if through.startswith(known) else decode(ids[first:end])
        goes_on = end < len(ids) and ids[end] not in special and end - first < LONGEST_CHARACTER
        if text.endswith("\N{REPLACEMENT CHARACTER}") and goes_on:
            continue
        parts = end - first
        made += [Piece(text if part == 1 else "", part, parts) for part in range(1, parts + 1)]
        before, first = first, end
    return made


def _legend(colour: bool) -> str:
    if not colour:
        return "  [[ ]] around what is trained, | between tokens, || inside a character that several tokens make"
    return f"  {TRAINED[0]}trained{RESET}, {MASKED[0]}masked{RESET}; the shade changes from token to token"


def _token_text(made: Sequence[Piece], trained: Sequence[bool], colour: bool) -> str:
    texts = [_shown(piece.text) for piece in made]
    if colour:
        shades = [(TRAINED if learnt else MASKED)[index % 2] for index, learnt in enumerate(trained)]
        return "".join(f"{shade}{text}{RESET}" for shade, text in zip(shades, texts, strict=True))
    shown = "[[" if trained[0] else ""
    for text, now, then in zip(texts, trained, [*trained[1:], False], strict=True):
        mark = {(False, True): "[[", (True, False): "]]"}.get((now, then), "|")
        # A mark after the end of a line stands on that line, except one that begins what is trained.
        shown += f"{text[:-1]}{mark}\n" if text.endswith("\n") and mark != "[[" else text + mark
    return shown.removesuffix("\n").removesuffix("|")


def _shown(text: str) -> str:
    """Line ends stay line ends, with a mark; all else that a terminal would obey becomes an escape."""
    from trainer.data.report import visible

    return "↵\n".join(visible(line) for line in text.split("\n"))


def _id_lines(ids: Sequence[int], labels: Sequence[int], made: Sequence[Piece]) -> list[str]:
    lines = [f"{'index':>6}  {'id':>7}  {'label':>7}  text"]
    text = ""
    for index, (number, label, piece) in enumerate(zip(ids, labels, made, strict=True)):
        text = piece.text if piece.part == 1 else text
        part = f"  part {piece.part} of {piece.parts}" if piece.parts > 1 else ""
        lines.append(f"{index:>6}  {number:>7}  {label:>7}  {text!r}{part}")
    return lines


def dump(cached: CachedDataset, file: Path) -> int:
    """Write all examples of a dataset as JSONL and return how many there are; an older file stays until it is done.

    Raises:
        StorageError: the file cannot be written.
    """
    staging = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with staging.open("w", encoding="utf-8") as out:
            for part in cached.examples().iter(COPIED_AT_ONCE):
                for row, ids, labels in zip(part["row"], part["input_ids"], part["labels"], strict=True):
                    out.write(json.dumps({"row": row, "input_ids": ids, "labels": labels}) + "\n")
        os.replace(staging, file)
    except OSError as error:
        raise StorageError(f"Cannot write {file}: {error.strerror}.") from error
    finally:
        staging.unlink(missing_ok=True)
    return cached.outcome.examples


# ---- add ------------------------------------------------------------------------------------------------------------


def run_add(args: argparse.Namespace) -> int:
    """Run `tunewright data add` and return its exit code.

    Raises:
        DataError: the file is not there, cannot be understood or lies outside the registry's folder, or the name is
            taken.
    """
    from trainer.data.registry import REGISTRY_NAME

    file, folder = args.file.expanduser(), args.dir.expanduser()
    if not file.exists():
        near = did_you_mean(file.name, os.listdir(file.parent)) if file.parent.is_dir() else ""
        raise DataError(f"There is no file or folder {file}.{near}")
    inside = file.resolve().is_relative_to(folder.resolve())
    if not inside and not args.copy:
        raise DataError(
            f"{file} is not in {folder}, and a registry names the files of its own folder. Add --copy to copy it "
            f"there, or train on it without a registry: tunewright train data=registry "
            f"{shlex.quote(f'data.names=[{_hydra_value(str(file))}]')}"
        )
    name = args.name or re.sub(rf"[^{PLAIN}]+", "_", file.resolve().name if file.is_dir() else file.resolve().stem)
    if not re.fullmatch(rf"[{PLAIN}]+", name):
        raise DataError(f"'{name}' would have to be quoted wherever it is used: write letters, digits, _, - and dots.")
    location = file.resolve().relative_to(folder.resolve()).as_posix() if inside else file.resolve().name
    meaning, preview = propose(file)
    entry = {"file_name": location, **meaning}
    registry = folder / REGISTRY_NAME
    print(json.dumps({name: entry}, ensure_ascii=False, indent=2))
    print("\n".join(["", *preview, ""]))
    if not registry_takes(registry, name, entry):
        print(f"{registry} has this entry already; nothing to do.")
        return 0
    if args.dry_run:
        print(f"Nothing was written to {registry} (--dry-run).")
        return 0
    if not inside:
        copy_in(file, folder)
    add_entry(registry, name, entry)
    print(f"Added '{name}' to {registry}.")
    where = "" if folder == Path("data") else f" {shlex.quote(f'data.dir={folder}')}"
    print(f"Look at it: tunewright data check {name}{where}")
    return 0


def _hydra_value(path: str) -> str:
    """Return a path as an element of a list in a Hydra override, in quotes where it holds what is syntax there."""
    if re.fullmatch(rf"[{PLAIN}/]+", path):
        return path
    escaped = path.replace("'", "\\'")
    return f"'{escaped}'"


def propose(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Return a registry entry without its source, and lines that show its first usable row as a conversation.

    Raises:
        DataError: the file is broken, its columns do not tell what they mean, or no row can be used.
    """
    from launch.compose import compose_config
    from trainer.data.detect import detect
    from trainer.data.formats import Unusable, to_conversation
    from trainer.data.sources import PEEK, open_datasets

    # The absolute path cannot be the name of an entry.
    rows = open_datasets([str(file.resolve())], compose_config().data, offline=True)[0]
    first = list(islice(rows, PEEK))
    meaning = detect(first)
    assert meaning is not None  # `open_datasets` has understood the columns by the same means
    reasons = []
    for number, row in enumerate(first):
        try:
            return meaning, _preview(number, to_conversation(row, rows.entry))
        except Unusable as reason:
            reasons.append(str(reason))
    common = max(set(reasons), key=reasons.count)
    raise DataError(f"None of the first {len(first)} rows of {file} can be used. The most frequent reason: {common}.")


def _preview(number: int, source: Any) -> list[str]:
    from trainer.data.formats import Plain

    if isinstance(source, Plain):
        parts = [("prompt", source.prompt), ("completion", source.completion)] if source.prompt else []
        return [f"Row {number}, text without a chat template:", *_said(parts or [("text", source.completion)])]
    turns = [(message["role"], message["content"]) for message in source.messages]
    for index, message in enumerate(source.messages):
        if message.get("tool_calls"):
            turns[index] = (message["role"], message["content"] + json.dumps(message["tool_calls"], ensure_ascii=False))
    tools = [f"  with {len(source.tools)} tools"] if source.tools else []
    return [f"Row {number} as a conversation:", *tools, *_said(turns)]


def _said(turns: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(role) for role, _ in turns)
    lines = []
    for role, text in turns:
        clipped = text if len(text) <= MESSAGE_SHOWN else text[:MESSAGE_SHOWN] + " ..."
        begin, *rest = _shown(clipped).split("\n")
        lines += [f"  {role:<{width}}  {begin}", *(f"  {'':<{width}}  {line}" for line in rest)]
    return lines


def registry_takes(registry: Path, name: str, entry: dict[str, Any]) -> bool:
    """Tell whether an entry is new to a registry.

    Raises:
        DataError: the registry is broken, or the name stands for another entry.
    """
    known = _read_whole(registry)
    if name not in known:
        return True
    if known[name] == entry:
        return False
    raise DataError(
        f"{registry} has another entry '{name}': {json.dumps(known[name], ensure_ascii=False)}. Choose another name "
        f"with --name."
    )


def add_entry(registry: Path, name: str, entry: dict[str, Any]) -> None:
    """Add an entry to a registry, which is made when there is none; others may do the same at the same time.

    Raises:
        DataError: see `registry_takes`.
        StorageError: the registry cannot be written.
    """
    from filelock import FileLock

    from launch.rundir import write_json

    try:
        registry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(registry.with_name(f".{registry.name}.lock")):
            if registry_takes(registry, name, entry):
                # A link to a registry elsewhere stays a link.
                write_json(registry.resolve(), {**_read_whole(registry), name: entry})
    except OSError as error:
        raise StorageError(f"Cannot write {registry}: {error.strerror}.") from error


def _read_whole(registry: Path) -> dict[str, Any]:
    """Read a registry to write it again: a name that stands there twice would be lost."""
    from trainer.data.registry import read_registry

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"{registry} has {', '.join(twice)} twice; remove one of them first.")
        return dict(pairs)

    if not registry.is_file():
        return {}
    read_registry(registry)  # what is broken is told with its place
    return dict(json.loads(registry.read_text(encoding="utf-8-sig"), object_pairs_hook=once))


def copy_in(file: Path, folder: Path) -> None:
    """Copy a file or a folder into a registry's folder, unless the same is there.

    Raises:
        DataError: something else has its name there.
        StorageError: it cannot be written.
    """
    target = folder / file.resolve().name
    staging = folder / f".{target.name}.{os.getpid()}.part"
    if target.exists():
        if _content(target) == _content(file):
            return
        raise DataError(f"{target} is there already and is not the same as {file}. Rename one of them.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            shutil.copytree(file, staging)
        else:
            shutil.copyfile(file, staging)
        staging.rename(target)
    except OSError as error:  # copytree's gathers several, and has no strerror
        raise StorageError(f"Cannot copy {file} to {target}: {error.strerror or error}.") from error
    finally:
        staging.unlink(missing_ok=True) if staging.is_file() else shutil.rmtree(staging, ignore_errors=True)


def _content(path: Path) -> list[tuple[str, bytes]]:
    import hashlib

    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    return [(item.relative_to(path).as_posix(), hashlib.sha256(item.read_bytes()).digest()) for item in files]
