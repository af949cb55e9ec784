"""A checked sample that is asked again while the job runs. A teacher that answers it differently stops the job."""

from collections.abc import Callable
from random import Random

from betakd_ray.check.canary import Canary, drift
from betakd_ray.errors import OutputError, TeacherError
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.teacher.canary import KnownAnswer, Replica, answer_canary
from betakd_ray.teacher.parts import Signal
from betakd_ray.teacher.ports import Pending, Roster, Unanswered


class CanaryWatch:
    """Asker of the canary, every `every` steps, of a random teacher. The driver polls it beside the training.

    A question costs a teacher one sample, and no step waits for its answer.
    """

    def __init__(
        self, known: KnownAnswer, every: int, ask_roster: Callable[[], Pending], store: CheckpointStore
    ) -> None:
        """Begin without a question. `ask_roster` asks the pool for its members (`Roster`)."""
        self._known, self._every, self._ask_roster, self._store = known, every, ask_roster, store
        self._random = Random()
        self._asked: int | None = None
        self._right = 0
        """Newest step at which a question with the right answer was asked."""
        self._pending: Pending | None = None

    def poll(self, step: int) -> None:
        """Go on with an open question, or ask the next one if it is due at `step`. Returns at once.

        Raises TeacherError, which names the last good checkpoint, if the answer is another than before the first step.
        """
        if self._pending is None:
            # Compared by rounds, because only some steps are seen here.
            if self._asked is None or step // self._every != self._asked // self._every:
                self._asked, self._pending = step, self._ask_roster()
            return
        try:
            answer = self._pending.result(0.0)
        except TimeoutError:
            return
        except Unanswered:  # it died: its students report it, and the next round asks another
            self._pending = None
            return
        self._pending = self._question(answer) if isinstance(answer, Roster) else self._judged(*answer)

    def _question(self, roster: Roster) -> Pending | None:
        if not roster.members:
            return None
        teacher = self._random.choice(list(roster.members.values()))
        return teacher.apply(answer_canary, self._known.inputs)

    def _judged(self, signal: Signal | None, replica: Replica) -> None:
        assert self._asked is not None
        if self._known.difference(signal) is None:
            self._right = self._asked
            return
        found = drift(Canary(self._known.inputs, self._known.signal), signal, self._known.dtype)
        raise TeacherError(
            f"at step {self._asked} the teacher on {replica} answered a checked sample differently than before: "
            f"{found}. {self._checkpoints()}"
        )

    def _checkpoints(self) -> str:
        """Return the checkpoint from before the last right answer, and those that may have learned from wrong ones."""
        try:
            stored = self._store.committed()
        except OutputError as error:
            return f"The last right answer was at step {self._right}. Which checkpoints there are is not known: {error}"
        good = [each.name for each in stored if each.step <= self._right]
        later = [each.name for each in stored if each.step > self._right]
        last = f"The last right answer was at step {self._right}. Last good checkpoint: {good[-1] if good else 'none'}."
        if not later:
            return last
        return f"{last} To go on from it, remove the later ones, which may have learned from wrong answers: {later}."
