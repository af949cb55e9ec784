"""The processes that answer questions: as many as have room, each with one model, and others in place of dead ones."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from betakd_ray.errors import TrainingError
from betakd_ray.evaluation.benchmark import Question
from betakd_ray.evaluation.pieces import Reply
from betakd_ray.sigterm import POLL_S

IN_HAND = 2
"""Number of chunks that a worker has: one for which it generates, and one whose pictures it prepares."""
MAX_DEATHS = 3
"""Number of workers that may die in a row without an answer."""


@dataclass(frozen=True)
class Chunk:
    """Questions that one worker answers together."""

    label: str
    """Label of the model that is asked."""
    keys: Sequence[str]
    """What each question is known by."""
    questions: Sequence[Question]


@dataclass(eq=False)
class Member:
    """A worker and what it is doing."""

    label: str
    actor: Any
    is_ready: bool = False
    in_hand: int = 0


class Crew:
    """Workers of several models on one cluster, which answer all chunks."""

    def __init__(self, start: Callable[[str], Any], places: int, chunks: Mapping[str, Sequence[Chunk]]) -> None:
        """Take the chunks by label. `start(label)` starts a worker; at most `places` are there at a time."""
        self._start, self._places = start, places
        self._waiting = {label: deque(each) for label, each in chunks.items()}
        self._members: list[Member] = []
        self._pending: dict[Any, tuple[Member, Chunk | None]] = {}
        self._deaths = 0

    def run(self, on_reply: Callable[[Chunk, list[Reply]], None], check: Callable[[], None]) -> None:
        """Give out all chunks, and call `on_reply` with each one that is answered; `check` is called between.

        Raises what a worker raised, and TrainingError if workers die again and again. The workers are ended.
        """
        try:
            while any(self._waiting.values()) or any(chunk for _, chunk in self._pending.values()):
                check()
                self._release()
                self._hire()
                self._give_out()
                for done in ray.wait(list(self._pending), timeout=POLL_S)[0]:
                    self._take(done, on_reply)
        finally:
            for member in self._members:
                ray.kill(member.actor)

    def _hire(self) -> None:
        """Start workers while there is a place, first for models that have none, then where most is to do."""
        while len(self._members) < self._places:
            # A worker for fewer chunks than the others will take meanwhile would load its model for nothing.
            short = [label for label, chunks in self._waiting.items() if len(chunks) > IN_HAND * self._count(label)]
            if not short:
                return
            label = max(short, key=lambda label: (not self._count(label), len(self._waiting[label])))
            member = Member(label, self._start(label))
            self._members.append(member)
            self._pending[member.actor.load.remote()] = (member, None)

    def _count(self, label: str) -> int:
        return sum(member.label == label for member in self._members)

    def _give_out(self) -> None:
        for member in self._members:
            chunks = self._waiting[member.label]
            while member.is_ready and chunks and member.in_hand < IN_HAND:
                chunk = chunks.popleft()
                member.in_hand += 1
                self._pending[member.actor.answer.remote(chunk.questions)] = (member, chunk)

    def _release(self) -> None:
        """End the workers that have nothing more to do, so that the next model has their place."""
        for member in [each for each in self._members if not each.in_hand and not self._waiting[each.label]]:
            self._drop(member)
            ray.kill(member.actor)

    def _drop(self, member: Member) -> None:
        """Forget a worker; the chunks that it had wait again."""
        self._members.remove(member)
        for reference, (owner, chunk) in list(self._pending.items()):
            if owner is member:
                del self._pending[reference]
                if chunk:
                    self._waiting[member.label].appendleft(chunk)

    def _take(self, done: Any, on_reply: Callable[[Chunk, list[Reply]], None]) -> None:
        if done not in self._pending:  # its worker died a moment ago
            return
        member, chunk = self._pending[done]
        try:
            replies = ray.get(done)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            self._drop(member)
            self._deaths += 1
            if self._deaths > MAX_DEATHS:
                raise TrainingError(
                    f"models.{member.label}: {self._deaths} processes died one after the other ({error}). Answers "
                    "that came before are kept: lower batch_tokens or batch_size if the memory was too small, and run "
                    "it again."
                ) from error
            return
        del self._pending[done]
        if chunk is None:
            member.is_ready = True
            return
        member.in_hand -= 1
        self._deaths = 0
        on_reply(chunk, replies)
