"""The errors of this package, as a tree.

    BetaKDError
    ├── Interrupted                  asked to stop: a checkpoint is committed; run the job again to go on; exit code 75
    ├── WorkersReplaced              workers that count as dead, and are not, would write to the run
    ├── UserError                    the user can fix it: exit code 2, found before training starts
    │   ├── SpecError                a field of the job spec
    │   ├── DataError                shards, manifests, samples
    │   │   ├── DataUnreachable      the store of the data does not answer, even after all retries
    │   │   └── TooManyBadSamples    more of the data is bad than `data.max_bad_fraction` allows
    │   ├── ModelError               a checkpoint, a config, or an ability that a model lacks
    │   │   ├── VocabularyMismatch   teacher and student do not share a tokenizer
    │   │   ├── WeightsIncomplete    a checkpoint lacks weights, or has them in other shapes
    │   │   └── ModelUnfit           a model's own answers show that its signal is wrong
    │   ├── ClusterError             the cluster can never provide what the job asks for
    │   ├── TrackerError             a tracker lacks its package, or its server does not answer
    │   └── OutputError              the output holds another job, or cannot be written
    │       ├── RunTaken             another driver has taken the run over
    │       ├── CheckpointDamaged    a file of a checkpoint is not as it was written
    │       └── OutputUnreachable    the store of the output does not answer, even after all retries
    └── TrainingError                the run itself failed; the last committed checkpoint is still good
        ├── NonFiniteLoss            too many skipped steps in a row
        ├── SampleRepeated           a sample was trained on a second time in its epoch
        └── TeacherError             the teacher pool cannot answer

Every message names the field or file, says what was seen and what to do. No message contains a credential.
"""

import difflib
import os
import re
from collections.abc import Iterable

SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
)
"""Environment variables whose values are replaced by *** in messages."""
# Matches user:password@, even with a slash in the password, but not host:9000/…@. In HTTP URLs it also matches a user
# without a password, which may be a token.
_USER = re.compile(r"(https?://)[^/\s@]+@|(://)[^/\s:@]*:(?!\d+/)[^\s@]+@")
_SIGNED = re.compile(
    r"([?&](?:[\w.-]*(?:signature|credential|token|secret|password)[\w.-]*|[\w.-]*key(?:id)?|sig)=)[^&\s'\"]+",
    re.IGNORECASE,
)


def without_url_secrets(text: str) -> str:
    """Return `text` with user, password and signature removed from its URLs."""
    return _SIGNED.sub(r"\1***", _USER.sub(r"\1\2***@", text))


def without_secrets(text: str) -> str:
    """Return `text` without the secrets of URLs and without the values of `SECRET_VARIABLES`."""
    for value in (os.environ.get(name, "") for name in SECRET_VARIABLES):
        if len(value) > 4:  # a shorter value is no secret, and replacing it would damage common words
            text = text.replace(value, "***")
    return without_url_secrets(text)


def shortened(value: object) -> str:
    """Return a value as an error message shows it: without credentials, and at most 80 characters."""
    text = without_secrets(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question that names the known word most like `word`; empty if none is like it."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def kind(error: BaseException) -> str:
    """Return the name under which an error is reported: the name of its nearest base class in this module."""
    return next(each.__name__ for each in type(error).__mro__ if each.__module__ == __name__)


class BetaKDError(Exception):
    """Base class of every error that this package raises on purpose. Credentials in its message are replaced by ***."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


class Interrupted(BetaKDError):
    """The job was asked to stop and has saved a checkpoint; run it again to go on."""


class WorkersReplaced(BetaKDError):
    """These workers were taken for dead, and others have been started. They end, and write nothing more."""


class UserError(BetaKDError):
    """An input of the user is wrong. Nothing was trained and nothing was lost."""


class SpecError(UserError):
    """A field of a spec is missing, misspelt, of the wrong type, or contradicts another field."""


class DataError(UserError):
    """A shard, a manifest or a sample is missing or damaged."""


class DataUnreachable(DataError):
    """The store failed, not the file. A later attempt may succeed."""


class TooManyBadSamples(DataError):
    """The quarantined fraction of the data exceeds `data.max_bad_fraction`."""


class ModelError(UserError):
    """A model cannot be loaded or cannot do what the job asks of it."""


class VocabularyMismatch(ModelError):
    """Energies on logits need one common vocabulary, but teacher and student have different ones."""


class WeightsIncomplete(ModelError):
    """A checkpoint does not have all weights of the model, so some of them would be random."""


class ModelUnfit(ModelError):
    """The checks before the first step (`betakd_ray.check`) failed for a teacher or a student."""


class ClusterError(UserError):
    """The cluster cannot hold the job, even when fully scaled up, or it does not answer."""


class TrackerError(UserError):
    """A tracker of the spec cannot be used. Found before a job begins; later a tracker's failure is a warning."""


class OutputError(UserError):
    """The output location is unusable or belongs to another job."""


class RunTaken(OutputError):
    """Another driver works on the run, which has taken it over from this one."""


class CheckpointDamaged(OutputError):
    """A checkpoint is not as it was written. The job goes on from the one before it."""


class OutputUnreachable(OutputError):
    """The store of the output does not answer, or refuses what it accepted before. A later attempt may succeed."""


class TrainingError(BetaKDError):
    """The run stopped. The last committed checkpoint is still valid."""


class NonFiniteLoss(TrainingError):
    """`training.max_skipped_steps` steps in a row had a non-finite loss or gradient."""


class SampleRepeated(TrainingError):
    """A sample that the ledger has as done was trained on again: the exactly-once guarantee is broken."""


class TeacherError(TrainingError):
    """The teacher pool could not score a batch."""
