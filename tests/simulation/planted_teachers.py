"""Bugs of the teachers' pool and client that are planted to show that the simulation finds them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import pytest

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.sample import Rendering
from betakd_ray.teacher import client
from betakd_ray.teacher.answers import Answer, GroupAnswer
from betakd_ray.teacher.client import TeacherClient
from betakd_ray.teacher.pool import Starting, TeacherPool
from betakd_ray.teacher.ports import Unanswered


def halves_swapped(patch: pytest.MonkeyPatch) -> None:
    """Join the answers to the halves of a group in the wrong order."""
    joined = Answer.joined
    patch.setattr(Answer, "joined", lambda parts: joined(list(parts)[::-1]))


def whole_group_refused(patch: pytest.MonkeyPatch) -> None:
    """Put a whole group into quarantine in which one sample kills teachers."""

    def examine(group: Sequence[Rendering], *_: Any) -> Answer:
        return Answer([None] * len(group), dict.fromkeys(range(len(group)), "the teacher died"))

    patch.setattr(client, "examine", examine)


def hanging_drain_awaited(patch: pytest.MonkeyPatch) -> None:
    """Wait for a teacher that is to finish its groups, though it hangs at one."""
    sent_off = TeacherPool._sent_off

    def endless(self: TeacherPool, number: int) -> Starting:
        return replace(sent_off(self, number), until=inf)

    patch.setattr(TeacherPool, "_sent_off", endless)


def search_keeps_its_teacher(patch: pytest.MonkeyPatch) -> None:
    """Keep the exclusive teacher of a search while the search waits for any teacher."""

    def score(self: TeacherClient, inputs: ModelInputs, holder: str) -> GroupAnswer:
        ticket = self._send(inputs)
        try:
            return self._receive(ticket)
        except Unanswered as failure:
            if not failure.is_deadly:
                raise
            self._report(ticket, str(failure))
        finally:
            self._settle(ticket)
        return self._score_alone(inputs, holder)

    patch.setattr(TeacherClient, "_score", score)


def silent_head_awaited(patch: pytest.MonkeyPatch) -> None:
    """Wait without a timeout for the lm_head of a teacher."""
    head = TeacherClient.head

    def patient(self: TeacherClient) -> Any:
        timeout_s, self._timeout_s = self._timeout_s, inf
        try:
            return head(self)
        finally:
            self._timeout_s = timeout_s

    patch.setattr(TeacherClient, "head", patient)


PLANTED_TEACHERS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    plant.__name__: plant
    for plant in (
        halves_swapped,
        whole_group_refused,
        hanging_drain_awaited,
        search_keeps_its_teacher,
        silent_head_awaited,
    )
}
"""Bug → how it is planted."""
