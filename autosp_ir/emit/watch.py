"""Watching the other ranks: which are alive, where each one is, and why one failed.

A thread tells where this rank is through the rendezvous store, over a connection of its own, and reads the same of the
ranks it works with. So nothing is added to what the device does, and it works for NCCL as for gloo. A rank that fails
leaves an obituary, which every other rank raises; one that falls silent, or stands still while others wait for it, is
named by those. A rank that is blocked in a collective when that is known cannot raise: its process is ended.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from autosp_ir._torch_compat import default_store
from autosp_ir.emit.peers import SILENCE, Line, Peer, brief, fault, is_communication, store_lost
from autosp_ir.emit.talk import Meeting, Talk
from autosp_ir.emit.whereabouts import whereabouts, work_clock
from autosp_ir.errors import RankFailureError

_BEAT, _GRACE, _LINGER, _FAREWELL = 0.5, 2.0, 2.0, 5.0
_FIRST_PAUSE, _LAST_PAUSE, _SOON = 2e-5, 0.02, 5e-3
_OBITUARY = "obituary"
_HINT = "see the log of the rank named, and start the job again from its last checkpoint"


class Watch:
    """This process's watch over the ranks it runs steps with, for one default process group.

    Args:
        patience: Seconds that a rank may do nothing at all while others wait for it.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.rank = dist.get_rank()
        self.verdict: str | None = None
        self._world = dist.group.WORLD
        store = default_store()
        self._limit = store.timeout.total_seconds()
        # Two connections: a read that waits on one must not keep the thread from being heard.
        self._calls, self._beats = (PrefixStore("autosp_ir", store.clone()) for _ in range(2))
        for connection in (self._calls, self._beats):
            connection.set_timeout(timedelta(seconds=1.0))
        self._number = uuid.uuid4().hex
        self._lines: dict[str, Line] = {}
        self._meetings: dict[str, Meeting] = {}
        self._peers: dict[int, Peer] = {}
        self._stale: list[str] = []
        self._beat = 0
        self._asks = False
        self._process = os.getpid()
        self._ended = threading.Event()
        # Held by whoever stops waiting, or ends this process because it still waits: never both at once.
        self._leaving = threading.Lock()
        self._raises = False
        self._main = threading.get_ident()
        self._hook = sys.excepthook
        sys.excepthook = self._uncaught
        atexit.register(self.stop)
        self._thread = threading.Thread(target=self._run, name="autosp_ir.watch", daemon=True)
        self._thread.start()

    def line(self, group: dist.ProcessGroup) -> Line:
        """The line of a process group; programs over the same group share it."""
        if group.group_name not in self._lines:
            ranks = tuple(dist.get_process_group_ranks(group))
            self._peers |= {r: Peer() for r in ranks if r != self.rank and r not in self._peers}
            self._lines[group.group_name] = Line(group.group_name, ranks)
            self._meetings[group.group_name] = Meeting(self._calls, group.group_name, ranks, self.rank, self._number)
        return self._lines[group.group_name]

    @property
    def current(self) -> bool:
        """Whether the process group that is watched still runs."""
        if self._ended.is_set() or os.getpid() != self._process:
            return False
        return dist.is_initialized() and dist.group.WORLD is self._world

    def stop(self) -> None:
        """Tell the others that this rank leaves, and end the thread."""
        if self._ended.is_set():
            return
        told = self.current
        self._ended.set()
        if sys.excepthook == self._uncaught:
            sys.excepthook = self._hook
        atexit.unregister(self.stop)
        # A thread that is inside of the store while the interpreter ends would abort the process. It makes up to five
        # calls in a row, each of which may take a second on a store that many ranks or a busy machine slow down.
        self._thread.join(_FAREWELL)
        if not told:
            return
        with contextlib.suppress(RuntimeError, OSError):
            self._publish()

    def exchange(self, line: Line, told: str, begins: bool = True) -> list[str]:
        """Tell the line's ranks something short, and learn what each of them tells.

        At the start of a step all should tell the same, and the device waits. So the ranks first count, under a digest
        of what they tell, how many came with it: the last of them learns in one call to the store that all did. Only
        if that does not happen soon are the texts exchanged.

        Args:
            line: The ranks.
            told: What this rank tells.
            begins: Whether a step begins with it.

        Returns:
            One text per rank, in the order of `line.ranks`.

        Raises:
            RankFailureError: A rank failed, fell silent or stalled before it came.
        """
        self.raise_verdict()
        self._main = threading.get_ident()
        line.talks += 1
        line.calls += begins
        line.move(f"at the {'start' if begins else 'checks'} of step {line.calls}", inside=True)
        try:
            answers = self._answers(line, told, begins)
        finally:
            self._leave([line], "in")
        if answers is None:
            raise self._declare(
                f"not all of ranks {list(line.ranks)} have come to step {line.calls} within {self._limit:.0f} s"
            )
        return answers

    def _answers(self, line: Line, told: str, begins: bool) -> list[str] | None:
        """What each rank of a line tells; None if not all come while the store's patience lasts."""
        talk: Talk | None = None
        begun, pause = time.monotonic(), _FIRST_PAUSE
        while (waited := time.monotonic() - begun) < self._limit:
            try:
                talk = talk or self._talk(line, told)
                if talk is not None and begins and talk.all_came():
                    return [told] * len(line.ranks)
                late = waited > _SOON or not begins
                if talk is not None and late and (texts := talk.texts()) is not None:
                    return texts
            except (RuntimeError, OSError):
                # The store is gone, which the thread finds out and explains.
                pause = _LAST_PAUSE
            self.raise_verdict()
            time.sleep(pause)
            pause = min(1.2 * pause, _LAST_PAUSE)
        return None

    def _talk(self, line: Line, told: str) -> Talk | None:
        """The next exchange of a line; None while its ranks have not met."""
        if not line.met:
            numbers = self._meetings[line.name].numbers()
            if numbers is None:
                return None
            line.met = hashlib.sha256(f"{line.name} {numbers}".encode()).hexdigest()[:32]
            for rank, number in numbers.items():
                if rank in self._peers:
                    self._peers[rank].number = number
        talk = Talk(self._calls, f"{line.met}/{line.talks}", line.ranks, self.rank, told)
        line.talked.append(talk.keys)
        if len(line.talked) > 2:
            # Everyone has come to the last exchange, so everyone has read the one before.
            self._stale += line.talked.popleft()
        return talk

    @contextlib.contextmanager
    def inside(self, lines: Sequence[Line], part: str) -> Iterator[None]:
        """Run a part of a step; what fails in it is told to all ranks.

        Args:
            lines: The ranks that it may wait for.
            part: "forward" or "backward".

        Raises:
            RankFailureError: Another rank is the cause.
            Exception: Whatever this rank raises itself.
        """
        for line in lines:
            line.move(f"in the {part} of step {line.calls}", inside=True)
        try:
            yield
        except Exception as error:
            with self._leaving:
                self._raises = True
            told = self._told(error, f"in the {part} of step {lines[0].calls}")
            if told is None:
                raise
            raise told from error
        finally:
            self._leave(lines, f"after the {part} of")

    def _leave(self, lines: Sequence[Line], place: str) -> None:
        """Wait for nobody any more."""
        with self._leaving:
            for line in lines:
                line.move(f"{place} step {line.calls}", inside=False)

    def raise_verdict(self) -> None:
        """Raise what ended the run, if anything did.

        Raises:
            RankFailureError: A rank has failed.
        """
        if self.verdict is not None:
            raise RankFailureError(self.verdict, hint=_HINT)

    def _told(self, error: BaseException, place: str) -> RankFailureError | None:
        """Who is the cause of an error: None for this rank, which the others are then told."""
        if isinstance(error, RankFailureError):
            return None
        if self.verdict is None and is_communication(error):
            self._await_verdict()
            if self.verdict is None:
                return self._declare(f"rank {self.rank} lost its connections {place}: {brief(error)}")
        if self.verdict is None:
            self._declare(f"rank {self.rank} failed {place}: {brief(error)}")
            return None
        return RankFailureError(self.verdict, hint=_HINT)

    def _await_verdict(self) -> None:
        deadline = time.monotonic() + SILENCE + 3 * _BEAT
        self._asks = True
        while self.verdict is None and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(_BEAT / 5)
        self._asks = False

    def _declare(self, verdict: str) -> RankFailureError:
        """Leave an obituary; the first one counts."""
        try:
            first = self._beats.compare_set(_OBITUARY, "", verdict).decode()
            self.verdict = first or verdict
            # The store may live in this process: the others get a moment to read.
            time.sleep(_LINGER if first == verdict else 0.0)
        except RuntimeError:
            self.verdict = verdict
        return RankFailureError(self.verdict, hint=_HINT)

    def _run(self) -> None:
        lost = 0
        while self.current:
            try:
                self._publish()
                self._read()
                lost = 0
            except (RuntimeError, OSError):
                lost += 1
                if lost >= 3 and self.current and self._waits():
                    self.verdict = self.verdict or store_lost()
            if self.verdict is None and self.current and self._waits():
                self._judge(time.monotonic())
            if self.verdict is not None:
                self._enforce()
                return
            self._ended.wait(_BEAT)

    def _publish(self) -> None:
        self._beat += 1
        lines = {line.name: [line.moves, line.place, line.inside] for line in list(self._lines.values())}
        told = {
            "beat": self._beat,
            "number": self._number,
            "lines": lines,
            "worked": work_clock(self._main),
            "where": whereabouts(self._main),
            "ended": self._ended.is_set(),
        }
        self._beats.set(f"beat/{self.rank}", json.dumps(told))
        while self._stale:
            self._beats.delete_key(self._stale.pop())

    def _read(self) -> None:
        if self._beats.check([_OBITUARY]):
            self.verdict = self._beats.get(_OBITUARY).decode()
            return
        heard = [r for r, peer in self._peers.items() if peer.said or self._beats.check([f"beat/{r}"])]
        if not heard:
            return
        now = time.monotonic()
        for rank, said in zip(heard, self._beats.multi_get([f"beat/{r}" for r in heard]), strict=True):
            self._peers[rank].hear(said.decode(), now)

    def _waits(self) -> bool:
        return self._asks or any(line.inside for line in list(self._lines.values()))

    def _judge(self, now: float) -> None:
        """Name a rank that this one waits for in vain."""
        for line in list(self._lines.values()):
            if not (line.inside or self._asks):
                continue
            for rank in line.ranks:
                peer = self._peers.get(rank)
                found = fault(peer, line, now, self.patience) if peer is not None else None
                if found is not None:
                    self._declare(f"rank {rank} {found}, and rank {self.rank} waits for it {line.place}")
                    return

    def _enforce(self) -> None:
        """Give this rank a moment to raise; end it if it stays blocked in a collective."""
        deadline = time.monotonic() + _GRACE
        while self._blocked() and time.monotonic() < deadline:
            time.sleep(_BEAT / 5)
        # Whoever raises now may be writing a traceback into a buffer in the place of sys.stderr, as torch's hook does:
        # to end the process then would lose that and what is written here.
        with self._leaving:
            if not self._blocked():
                return
            sys.stderr.write(
                f"autosp_ir: {RankFailureError(str(self.verdict), hint=_HINT)}\nautosp_ir: rank {self.rank} is blocked "
                f"at {whereabouts(self._main)} and ends\n"
            )
            sys.stderr.flush()
            os._exit(1)

    def _blocked(self) -> bool:
        """Whether this rank waits and so cannot raise what it knows."""
        return self._waits() and not self._raises and self.current

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """What ends this process ends the run: tell the others, and tell here who was the cause."""
        self._hook(kind, error, trace)
        if not self.current or isinstance(error, KeyboardInterrupt | RankFailureError):
            return
        told = self._told(error, f"outside its steps, {self._place()}")
        if told is not None:
            sys.stderr.write(f"autosp_ir: {told}\n")

    def _place(self) -> str:
        return ", ".join(line.place for line in self._lines.values())


_watches: list[Watch] = []


def watch(patience: float) -> Watch:
    """The watch of the running default process group; the most patient caller is heeded."""
    for one in list(_watches):
        if one.current:
            one.patience = max(one.patience, patience)
            return one
        one.stop()
        _watches.remove(one)
    _watches.append(Watch(patience))
    return _watches[-1]


__all__ = ["Watch", "watch"]
