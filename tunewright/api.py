"""The Python API: what the commands do, as functions that take and return objects. Imported by nobody but `tunewright`.

    import tunewright

    run = tunewright.train("model=qwen2_5_0_5b", {"train": {"epochs": 1}}, dataset=rows)
    run.metrics()["loss"], run.chat("Where is my parcel?"), run.evaluate()

Errors are those that the commands print: `tunewright.ConfigError` and its like, see `tunewright.errors`.
"""

from __future__ import annotations

import gc
import hashlib
import html
import json
import os
import re
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from omegaconf import DictConfig, OmegaConf

from tunewright.config.compose import compose_config
from tunewright.config.schema import GROUPS, Launcher
from tunewright.errors import ERRORS, ConfigError, DataError, MemoryShortage, Preempted, TunewrightError
from tunewright.files import written_aside
from tunewright.metrics import read_metrics
from tunewright.plan.auto import Choose, plain_choice
from tunewright.redaction import redact
from tunewright.run_folder import RunDir
from tunewright.stop_signals import STOP_SIGNALS, StopAsked, heard_by

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

    from tunewright.launch.data.report import Report
    from tunewright.launch.train import Job
    from tunewright.trainer.prepared import Prepared
    from tunewright.trainer.stopping import Stopping

    Rows: TypeAlias = Dataset | Sequence[Any] | str | os.PathLike[str]

Overrides = str | Mapping[str, Any]
Say = Callable[[str], None]


def train(
    *overrides: Overrides,
    dataset: Rows | None = None,
    eval_dataset: Rows | None = None,
    callbacks: Sequence[TrainerCallback | str] = (),
    loss: Callable[..., Any] | str | None = None,
    metrics: Mapping[str, Callable[[str, str], float]] | None = None,
    config_dir: str | os.PathLike[str] | None = None,
    say: Say = print,
) -> Run:
    """Train, and return the run.

    With `strategy=single`, which is chosen on one device and where objects of this process are given, training happens
    in this process: a notebook sees its lines, its plots and its exceptions. With any other strategy the ranks are
    started as `tunewright train` does.

        run = tunewright.train("method=lora", {"train.epochs": 1, "name": "first"}, dataset=rows, eval_dataset=held_out)

    Args:
        overrides: settings as on the command line ("strategy=zero2", "train.epochs=1"), and mappings of them, nested or
            with dots ({"train": {"epochs": 1}}, {"train.epochs": 1}). Later ones win.
        dataset: what to train on in place of `data.names`: names (entries of the registry, files, `hub:ORG/NAME`), or
            the rows themselves: a `datasets.Dataset`, or a list of rows in any of the formats of docs/data.md, such as
            {"messages": [...]}; or of the messages alone.
        eval_dataset: what to hold out, likewise.
        callbacks: called while training; names are those of plug-ins.
        loss: in place of the cross-entropy, see `tunewright.trainer.loss.Loss`; a name is a plug-in's.
        metrics: figures of the answers to the held-out rows, by name: `metric(answer, expected) -> float`. With them
            the run is evaluated once it is trained.
        config_dir: a folder with configuration groups of your own.
        say: takes the lines that tell how far it is.

    Raises:
        ConfigError, DataError, StorageError, NumericError, PeerError, MemoryShortage: as `tunewright train`.
        Preempted: SIGTERM or another signal that asks to stop; `resume=auto` goes on from the checkpoint that it left.
        KeyboardInterrupt: Ctrl-C.
    """
    from tunewright.launch.choosing import choose, planned
    from tunewright.launch.supervise import INTERRUPTED
    from tunewright.launch.train import check_data as check_prepared
    from tunewright.launch.train import halved, plan_job, run_job
    from tunewright.plan.devices import find_devices

    _check_objects(callbacks, loss)
    names = [item for item in callbacks if isinstance(item, str)]
    own = [item for item in callbacks if not isinstance(item, str)]
    objective = None if isinstance(loss, str) else loss
    settings = override_list([*overrides, *([{"train.callbacks": names}] if names else [])])
    if isinstance(loss, str):
        settings += override_list([{"train.loss": loss}])
    devices = find_devices()
    chosen = partial(choose, devices=devices, here=bool(own or objective), say=say)
    config = _compose(settings, dataset, eval_dataset, config_dir, chosen)
    if metrics and not (config.data.eval_names or config.data.eval_split or config.data.eval_size):
        raise ConfigError("`metrics` judge answers to held-out rows: give `eval_dataset` too, or set `data.eval_size`.")
    if not devices.gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for another, and say so
    job = plan_job(config, devices)
    alone = config.strategy.launcher is Launcher.single
    if not alone:
        _refuse_objects(config, {"callbacks": own, "loss": objective})
    check_prepared(config)
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(redact(text))
        say(told[-1])

    def ready(config: DictConfig) -> Prepared:
        from tunewright.launch.prepare import prepare_and_report
        from tunewright.trainer.model.load import quiet_libraries

        quiet_libraries()
        return prepare_and_report(config, tell)

    def start(job: Job, prepared: Prepared) -> int:
        from tunewright.trainer.console import Printer
        from tunewright.trainer.shortage import told_shortage
        from tunewright.trainer.training import train as train_here

        run, output = job.claimed.run, Printer() if say is print else Printer(say)
        try:
            with _told_to_manifest(run), told_shortage(job.config), _stoppable() as stopping:
                train_here(
                    job.config,
                    run,
                    prepared,
                    None,
                    output,
                    job.origin.folder if job.origin else None,
                    callbacks=own,
                    loss=objective,
                    stopping=stopping,
                )
        except MemoryShortage as error:
            if halved(job) is None:
                raise MemoryShortage(f"{error}\n{planned(job.config, devices, prepared)}") from error
            tell(str(error))
            _let_go(error)
            return error.exit_code
        return 0

    code = run_job(job, tell, ready, start if alone else None)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        # After a shortage of memory, what was planned is said last.
        raise _kind(code)("\n".join(told[-2:] if code == MemoryShortage.exit_code else told[-1:]))
    run = Run(job.claimed.run.path)
    if metrics:
        run.evaluate(metrics=metrics, say=say)
    return run


def _check_objects(callbacks: Any, loss: Any) -> None:
    """Find out before anything is loaded what would fail at the first step.

    Raises:
        ConfigError: a callback or the loss is none.
    """
    if not isinstance(callbacks, (list, tuple)):
        raise ConfigError(f"`callbacks` is {callbacks!r}: write a list.")
    for one in callbacks:
        if not isinstance(one, str) and not hasattr(one, "on_train_begin"):
            raise ConfigError(f"`callbacks` holds {one!r}: write transformers.TrainerCallback objects, or names.")
    if loss is not None and not isinstance(loss, str) and not callable(loss):
        raise ConfigError(f"`loss` is {loss!r}: write a function of logits and labels, or a plug-in's name.")


def _refuse_objects(config: DictConfig, objects: Mapping[str, Any]) -> None:
    """Objects of this process do not get into others.

    Raises:
        ConfigError: there are some.
    """
    for name, value in objects.items():
        if value:
            setting = "train.loss=NAME" if name == "loss" else "train.callbacks=[NAME]"
            raise ConfigError(
                f"`{name}` holds objects of this process, and `strategy={config.strategy.name}` trains in others. They "
                f"import what they need: add it under a name in a module with a function register(plugins), and write "
                f"imports=[my_module] {setting} (docs/extending.md). With strategy=single objects can stay."
            )


def _kind(code: int) -> type[TunewrightError]:
    """Return the error that an exit code stands for."""
    return next((kind for kind in ERRORS.values() if kind.exit_code == code), TunewrightError)


def _let_go(error: BaseException) -> None:
    """Free what the frames of an error hold: the model that there was no memory for."""
    at: BaseException | None = error
    while at is not None:
        traceback.clear_frames(at.__traceback__)
        at = at.__cause__ or at.__context__
    gc.collect()


@contextmanager
def _told_to_manifest(run: RunDir) -> Iterator[None]:
    """Write down that a training in this process failed or was stopped; the exception goes on its way."""
    try:
        yield
    except BaseException as error:
        run.update_manifest(status="stopped" if isinstance(error, (KeyboardInterrupt, Preempted)) else "failed")
        raise


@contextmanager
def _stoppable() -> Iterator[Stopping]:
    """Hear a scheduler's signals while this process trains: a first one stops with a checkpoint, a second one at once.

    Ctrl-C raises KeyboardInterrupt as ever, and what this process hears already stays with it.
    """
    from tunewright.trainer.stopping import Stopping

    stopping = Stopping()

    def hear(number: int, frame: Any) -> None:
        stopping.requests.hear(number)
        if stopping.requests.again:
            raise StopAsked(number)

    with heard_by(hear, [number for number in STOP_SIGNALS if number != signal.SIGINT], unless_taken=True):
        yield stopping


# ---- a run ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run's folder: what it was made from, how it went, and what it became."""

    path: Path
    _models: Any = field(default=None, repr=False, compare=False)  # loaded by the first question, kept for the next

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run was made from and what came of it: status, hardware, versions, final losses."""
        return RunDir(self.path).read_manifest()

    @property
    def config(self) -> DictConfig:
        """The settings, as they were written down; nothing of them is imported or resolved."""
        config = OmegaConf.load(RunDir(self.path).config)
        assert isinstance(config, DictConfig)
        return config

    @property
    def final(self) -> Path:
        """The folder of the adapter or model that was trained, with its tokenizer."""
        return RunDir(self.path).final

    def metrics(self) -> dict[str, list[Any]]:
        """Return what was logged as columns of the same length, None where a line has no such figure.

        `pandas.DataFrame(run.metrics())` is a table, `step` its first column.
        """
        file = RunDir(self.path).metrics
        lines = read_metrics(file) if file.is_file() else []
        names = dict.fromkeys(key for line in lines for key in line if key != "step_losses")
        return {name: [line.get(name) for line in lines] for name in names}

    def chat(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        base: bool = False,
        trust: bool = False,
    ) -> str:
        """Return the tuned model's answer, or the base model's. The model stays in memory as long as this object.

        Args:
            prompt: a question, or the messages of a conversation so far.
            trust: open a run that somebody else made, and run code it brings.

        Raises:
            ConfigError, DataError, StorageError: as `tunewright chat`.
        """
        opening = [{"role": "system", "content": system}] if system else []
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not (isinstance(asked, Sequence) and all(isinstance(turn, Mapping) and "role" in turn for turn in asked)):
            raise ConfigError(f"A prompt is a text or a list of {{'role', 'content'}}, not {prompt!r}.")
        answerer, run = self._answerer(trusted=trust)
        text = answerer.renderer.prompt([*opening, *asked])
        if base:
            return str(answerer.answer([text], max_new_tokens)[0])
        with answerer.tuned(run):
            return str(answerer.answer([text], max_new_tokens)[0])

    def _answerer(self, *, trusted: bool) -> Any:
        if self._models is None:
            from tunewright.deliver.generate import Answerer, open_run
            from tunewright.trainer.inputs import check_base
            from tunewright.trainer.prepared import prepare

            run, config = open_run(self.path, trusted=trusted, checkpoints=True)
            model_path = prepare(config, lambda line: None).model_path
            check_base(run, model_path)
            self._models = Answerer(config, model_path), run
        return self._models

    def evaluate(
        self,
        examples: int | None = None,
        *,
        metrics: Mapping[str, Callable[[str, str], float]] | None = None,
        trust: bool = False,
        say: Say = print,
    ) -> dict[str, Any]:
        """Answer the held-out rows with base and tuned model, and return what evaluation.json holds.

        Args:
            examples: the first so many rows alone.
            metrics: `metric(answer, expected) -> float` by name, beside exact match and the plug-ins' figures.

        Raises:
            ConfigError, DataError: as `tunewright evaluate`.
        """
        from tunewright.deliver.evaluate import evaluate_runs

        return evaluate_runs([self.path], examples, say, trusted=trust, metrics=metrics)[0]

    def merge(
        self,
        *,
        dtype: str | None = None,
        out: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        trust: bool = False,
        say: Say = print,
    ) -> Path:
        """Put the adapter into the base model's weights, check the result, and return its folder.

        Raises:
            ConfigError, StorageError: as `tunewright merge`.
        """
        from tunewright.deliver.merge import merge_run

        folder = Path(out) if out is not None else None
        return merge_run(self.path, dtype=dtype, out=folder, overwrite=overwrite, trusted=trust, say=say)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): " + ", ".join(f"{key} {value}" for key, value in self._summary().items())

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>"
            for key, value in {"run": str(self.path), **self._summary()}.items()
        )
        return f"<table>{cells}</table>"

    def _summary(self) -> dict[str, str]:
        manifest = self.manifest
        shown = {key: manifest.get(key) for key in ("status", "model", "method", "strategy", "steps")}
        shown |= {key.replace("_", " "): manifest.get("final", {}).get(key) for key in ("train_loss", "eval_loss")}
        return {
            key: f"{value:.4g}" if isinstance(value, float) else str(value)
            for key, value in shown.items()
            if value is not None
        }


def open_run(path: str | os.PathLike[str]) -> Run:
    """Return the run in a folder, whatever became of it; to look at it imports and runs nothing of it.

    Raises:
        ConfigError: there is no run.
    """
    run = RunDir(Path(path))
    if not run.manifest.is_file():
        raise ConfigError(f"{path} is not a run folder: it has no {run.manifest.name}.")
    return Run(run.path)


@dataclass(frozen=True)
class Comparison:
    """A comparison that was written: page, text and curves lie in `folder`."""

    folder: Path
    text: str = field(repr=False)

    @property
    def page(self) -> Path:
        return self.folder / "comparison.html"

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.text)}</pre>"


def compare(
    runs: Run | str | os.PathLike[str] | Iterable[Run | str | os.PathLike[str]],
    out: str | os.PathLike[str] = "runs/comparison",
) -> Comparison:
    """Compare runs by their losses, figures, settings and answers, as `tunewright compare` does.

    Raises:
        ConfigError: there is no run in a folder.
        StorageError: the comparison cannot be written to `out`.
    """
    from tunewright.deliver.compare import compare as write_comparison

    told: list[str] = []
    if isinstance(runs, (Run, str, os.PathLike)):
        runs = [runs]
    paths = [run.path if isinstance(run, Run) else Path(run) for run in runs]
    folder = write_comparison(paths, Path(out), echo=told.append)
    return Comparison(folder, told[0])


def check_data(
    *overrides: Overrides,
    dataset: Rows | None = None,
    eval_dataset: Rows | None = None,
    config_dir: str | os.PathLike[str] | None = None,
    say: Say = print,
) -> Report:
    """Tokenise data as training would, and return the report on it that `tunewright data check` prints.

    Args: as of `train`.

    Raises:
        ConfigError, DataError: as `tunewright data check`; for data that training would refuse once it was told.
    """
    from tunewright.launch.data.check import report_of
    from tunewright.launch.data.report_text import report_text
    from tunewright.trainer.model.load import quiet_libraries

    quiet_libraries()
    config = _compose(override_list(overrides), dataset, eval_dataset, config_dir)
    with _environment():
        report, refusal = report_of(config)
    say(redact(report_text(report)))
    if refusal:
        raise refusal
    return report


@contextmanager
def _environment() -> Iterator[None]:
    """Undo what is told to libraries by variables: a command ends after it, this process does not."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


# ---- settings and rows ----------------------------------------------------------------------------------------------


def override_list(given: Iterable[Overrides]) -> list[str]:
    """Return overrides as the command line has them.

    Raises:
        ConfigError: something is neither text nor a mapping.
    """
    found: list[str] = []
    for item in given:
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, Mapping):
            for key, value in item.items():
                nested = key in GROUPS and isinstance(value, Mapping)
                keys = {f"{key}.{inner}": one for inner, one in value.items()} if nested else {key: value}
                found += [f"{name}={_value(one)}" for name, one in keys.items()]
        else:
            raise ConfigError(f"{item!r} is no setting: write 'key=value', or a mapping such as {{'train.epochs': 1}}.")
    return found


def _value(value: Any) -> str:
    """Return a value in Hydra's grammar, which gives back the same one."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_value, value)) + "]"
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    text = str(getattr(value, "value", value))
    if re.fullmatch(r"[A-Za-z_][\w./:-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    quoted = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")  # a backslash counts before a quote alone
    return f"'{quoted}'"


def _compose(
    settings: list[str],
    dataset: Rows | None,
    eval_dataset: Rows | None,
    config_dir: str | os.PathLike[str] | None,
    choose: Choose = plain_choice,
) -> DictConfig:
    """Compose the configuration whose data are these, see `train`.

    Raises:
        ConfigError, DataError: see `compose_config` and `_names`; or two things say what the data are.
    """
    extra = Path(config_dir) if config_dir is not None else None
    given = {"data.names": dataset, "data.eval_names": eval_dataset}
    for key, value in given.items():
        if value is not None and any(item.partition("=")[0] == key for item in settings):
            raise ConfigError(
                f"`{key}` and `{'dataset' if key == 'data.names' else 'eval_dataset'}` both say which data."
            )
    if dataset is not None and not any(item.startswith("data=") for item in settings):
        settings = ["data=registry", *settings]
    if dataset is None and eval_dataset is None:
        return compose_config(settings, extra, choose)
    config = compose_config([*settings, *(["data.names=[set_below]"] if dataset is not None else [])], extra)
    cache = Path(config.data.cache_dir).expanduser()
    names = {key: _names(value, cache) for key, value in given.items() if value is not None}
    return compose_config([*settings, *(f"{key}={_value(value)}" for key, value in names.items())], extra, choose)


def _names(given: Rows, cache: Path) -> list[str]:
    """Return what `data.names` calls a dataset: rows are written into the cache first, once, under their digest.

    Raises:
        DataError: these are no rows, or hold what JSON cannot say.
    """
    if isinstance(given, (str, os.PathLike)):
        return [os.fspath(given)]
    if isinstance(given, Sequence) and given and all(isinstance(name, (str, os.PathLike)) for name in given):
        return [os.fspath(name) for name in given]
    if type(given).__name__ == "DataFrame":
        raise DataError("A data frame is no list of rows: write dataset=frame.to_dict('records').")
    if isinstance(given, Mapping):  # a DatasetDict too
        raise DataError(f"A dataset is given as a mapping of {', '.join(map(str, given))}: choose one of its splits.")
    if not hasattr(given, "__len__") or not len(given):
        raise DataError("The dataset has no rows." if hasattr(given, "__len__") else f"{given!r} is no list of rows.")
    digest = hashlib.sha256()
    for line in _lines(given):
        digest.update(line)
    file = cache / "rows" / f"rows-{digest.hexdigest()[:12]}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(file) as staging, staging.open("wb") as written:
            written.writelines(_lines(given))
    return [str(file)]


def _lines(rows: Iterable[Any]) -> Iterator[bytes]:
    for number, row in enumerate(rows):
        if isinstance(row, list):
            row = {"messages": row}
        if not isinstance(row, Mapping):
            raise DataError(f"Row {number} is {type(row).__name__}: write a mapping such as {{'messages': [...]}}.")
        try:
            yield f"{json.dumps(dict(row), ensure_ascii=False)}\n".encode("utf-8", errors="replace")
        except TypeError as error:
            raise DataError(f"Row {number} cannot be written as JSON: {error}.") from error
