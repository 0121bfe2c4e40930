"""Signs of life: each rank says every few seconds where it is, and judges those that it hears.

A rank that is frozen says nothing itself, and those that wait for it in a collective know neither who it is nor where
it was. This tells both, before the collective's own timeout ends in a message about sockets.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from tunewright.beats import PATIENCE_OF_RANKS, SOCKET, Beat, Listener, interval_of, patience_of
from tunewright.errors import PeerError, first_line
from tunewright.ranks import SPARE_ERRORS, launched, rank, world_size

if TYPE_CHECKING:
    from torch.distributed import Store

# What a rank is doing, by the innermost of its functions that is listed here.
PHASES = {
    "find_prepared": "opening the data",
    "join": "joining the others",
    "load_model": "loading the model",
    "_load_from_checkpoint": "loading a checkpoint",
    "compute_loss": "forward",
    "backward": "backward",
    "clip_grad_norm_": "clipping gradients",
    "step": "optimiser",
    "on_step_end": "the end of a step",
    "evaluate": "evaluation",
    "_save_checkpoint": "saving a checkpoint",
    "save_result": "saving the result",
    "train": "training",
}
TELLING_SECONDS = 1.0
COLLECTIVES = str(Path("torch", "distributed", "distributed_c10d.py"))


class Pulse:
    """This rank's signs of life, from a thread of its own, and what is known of the other ranks'.

    Args:
        timeout_minutes: `train.timeout_minutes`: who is silent nearly as long has failed.
        end: ends this process because of an error. It is called in the thread: the main thread may wait for ever.
    """

    def __init__(self, timeout_minutes: float, end: Callable[[Exception], None]) -> None:
        self.interval = interval_of(timeout_minutes)
        self.step = 0
        self._timeout_minutes, self._end = timeout_minutes, end
        self._main = threading.get_ident()
        self._others: Listener | None = None
        self._verdict = ""
        self._stop, self._hurry = threading.Event(), threading.Event()
        self._exchange_thread: threading.Thread | None = None
        # SIGUSR2 writes the stacks of all threads into the rank's log; the launcher sends it when a rank is silent.
        faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})  # the launcher has it wait until then
        self._launcher: socket.socket | None = None
        if SPARE_ERRORS in os.environ:
            self._launcher = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._launcher.setblocking(False)
            with suppress(OSError):  # a launcher that could not listen
                self._launcher.connect(os.path.join(os.environ[SPARE_ERRORS], SOCKET))
        threading.Thread(target=self._or_end, args=(self._beat,), name="pulse", daemon=True).start()

    def attach(self) -> None:
        """Exchange beats with the other ranks from now on, when all have joined."""
        if world_size() == 1:
            return
        # The first rank hears all others, and they hear it: what each of them has to read does not grow with them.
        whom = range(1, world_size()) if rank() == 0 else range(1)
        self._others = Listener(self.interval, patience_of(self._timeout_minutes, PATIENCE_OF_RANKS), whom)
        work = partial(self._exchange, whom)
        self._exchange_thread = threading.Thread(target=self._or_end, args=(work,), name="pulse-peers", daemon=True)
        self._exchange_thread.start()

    def stop(self) -> None:
        """Say that this rank has come to its end: from now on it is missed by nobody."""
        self._stop.set()
        self._hurry.set()
        self._tell_launcher()
        if self._exchange_thread:
            self._exchange_thread.join(timeout=3 * self.interval)

    def fail(self, error: BaseException) -> None:
        """Tell the others, where no launcher of ours does, why this rank ends; they would wait for it in vain."""
        if self._exchange_thread and not launched() and not self._verdict:
            me = f"Rank {rank()} on {socket.gethostname()}"
            self._verdict = f"{me} failed with {type(error).__name__}: {error}\nIts log is there."
            self._hurry.set()
            time.sleep(TELLING_SECONDS)

    def explain(self, error: PeerError) -> str:
        """Return why another rank was lost: what it told, how it fell silent, or else the error and where all were."""
        if self._exchange_thread and not launched():
            self._hurry.set()
            time.sleep(TELLING_SECONDS)
        reasons = [*filter(None, [self._verdict]), *self._reasons()]
        return reasons[0] if reasons else f"{error}{self._known()}"

    def _reasons(self) -> list[str]:
        return [beat.verdict for beat in list(self._others.beats.values()) if beat.verdict] if self._others else []

    def _known(self) -> str:
        told = self._others.told() if self._others else ""
        return f"\nWhere ranks were when they were last heard:\n{told}" if told else ""

    def _or_end(self, work: Callable[[], None]) -> None:
        """Do a thread's work; without it this rank would pass for a frozen one, so an error in it ends the rank."""
        try:
            work()
        except Exception as error:
            self._end(error)

    def _mine(self) -> dict[str, Any]:
        doing, collective = where(sys._current_frames().get(self._main))
        return asdict(Beat.mine(self.step, doing, collective, self._verdict, ended=self._stop.is_set()))

    def _tell_launcher(self) -> None:
        if self._launcher:
            # It is gone, which ends this process as well, or asleep, with its letter box full.
            with suppress(OSError):
                self._launcher.send(json.dumps(self._mine()).encode())

    def _beat(self) -> None:
        while not self._stop.is_set():
            self._tell_launcher()
            self._judge()
            self._stop.wait(self.interval)

    def _exchange(self, whom: range) -> None:
        """Tell the others where this rank is, and hear them; where the network is cut, this thread waits for ever."""
        assert self._others
        try:
            store = _own_connection(self._timeout_minutes)
        except RuntimeError as error:
            raise PeerError(f"Where ranks have met, nobody answers any more: {first_line(error)}.") from error
        while True:
            ended = self._stop.is_set()
            # A lost connection need not be reported here: the others are not heard any more, and so are silent.
            with suppress(RuntimeError):
                store.set(f"beat/{rank()}", json.dumps(self._mine()))
                for other in whom:
                    if store.check([f"beat/{other}"]):
                        self._others.take(Beat(**json.loads(store.get(f"beat/{other}"))))
            if ended:
                return
            self._hurry.wait(self.interval)
            self._hurry.clear()

    def _judge(self) -> None:
        if self._others is None:
            return
        reasons = self._reasons()
        if reasons and not self._verdict:
            self._pass_on(reasons[0])
        silent = self._others.silent()
        if silent is None:
            return
        last = self._others.beats.get(silent)
        said = last.silent() if last else f"rank {silent} has not been heard since it joined"
        cause = "it is frozen, or its machine or network is gone (`train.timeout_minutes`)"
        self._verdict = f"{said[0].upper()}{said[1:]}: {cause}.{self._known()}"
        if last:
            _end_sibling(last)
        self._pass_on(self._verdict)

    def _pass_on(self, reason: str) -> None:
        """End because of another rank; but what made that one fail may be about to be raised in this one as well.

        Meanwhile the others hear it from the first.
        """
        self._verdict = reason
        if not self._stop.wait(2 * self.interval):
            self._end(PeerError(reason))


def _end_sibling(last: Beat) -> None:
    """Kill a frozen rank of this machine: asked to end it would not hear, and torchrun waits half a minute for it."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(last.pid)
        # Its number may be another machine's, or another process's by now.
        if last.host == socket.gethostname() and process.ppid() == os.getppid() and process.create_time() < last.time:
            process.kill()


def _own_connection(timeout_minutes: float) -> Store:
    """Return a connection to where ranks meet that nothing else waits on."""
    from torch.distributed import PrefixStore, TCPStore

    timeout = timedelta(minutes=timeout_minutes)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, world_size(), False, timeout, wait_for_workers=False)
    return PrefixStore(f"pulse/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def where(frame: FrameType | None) -> tuple[str, str]:
    """Return what a thread is doing and in which collective it is, from its innermost frame outwards."""
    doing, collective = "", ""
    while frame is not None and not doing:
        name = frame.f_code.co_name
        if frame.f_code.co_filename.endswith(COLLECTIVES) and not name.startswith("_"):
            collective = collective or name
        doing = PHASES.get(name, "")
        frame = frame.f_back
    return doing, collective
