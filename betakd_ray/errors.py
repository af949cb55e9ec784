"""What can go wrong, as a tree.

    BetaKDError
    ├── Interrupted                  asked to stop: a checkpoint is committed, run it again to go on; exit code 75
    ├── UserError                    the user can mend it: exit code 2, caught before training starts
    │   ├── SpecError                a field of the job spec
    │   ├── DataError                shards, manifests, samples
    │   │   ├── DataUnreachable      their store does not answer, for longer than requests are repeated
    │   │   └── TooManyBadSamples    more of the data is bad than `data.max_bad_fraction` allows
    │   ├── ModelError               a checkpoint, a config, what a model can do
    │   │   └── VocabularyMismatch   teacher and student do not share a tokenizer
    │   ├── ClusterError             the cluster can never give what the job asks
    │   └── OutputError              the output holds another job, or cannot be written
    │       └── OutputUnreachable    its store does not answer, for longer than requests are repeated
    └── TrainingError                the run itself failed; the last committed checkpoint is still good
        ├── NonFiniteLoss            too many skipped steps in a row
        ├── SampleRepeated           a sample counts as trained on a second time in its epoch
        └── TeacherError             the teacher pool cannot answer

Every message names the field or file, says what was seen, and what to do about it. None repeats a credential.
"""

import os
import re

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
"""Variables of the environment whose values are blanked."""
# user:password@ with a slash in the password, too, but not host:9000/…@; over HTTP a user alone may be a token.
_USER = re.compile(r"(https?://)[^/\s@]+@|(://)[^/\s:@]*:(?!\d+/)[^\s@]+@")
_SIGNED = re.compile(
    r"([?&](?:[\w.-]*(?:signature|credential|token|secret|password)[\w.-]*|[\w.-]*key(?:id)?|sig)=)[^&\s'\"]+",
    re.IGNORECASE,
)


def without_url_secrets(text: str) -> str:
    """Text whose URLs have neither user and password nor a signature."""
    return _SIGNED.sub(r"\1***", _USER.sub(r"\1\2***@", text))


def without_secrets(text: str) -> str:
    """The same, and without what the environment holds as a credential."""
    for value in (os.environ.get(name, "") for name in SECRET_VARIABLES):
        if len(value) > 4:  # a shorter one hides nothing, and would be blanked out of common words
            text = text.replace(value, "***")
    return without_url_secrets(text)


def kind(error: BaseException) -> str:
    """The name that an error travels by: of its nearest class in this module."""
    return next(each.__name__ for each in type(error).__mro__ if each.__module__ == __name__)


class BetaKDError(Exception):
    """The root of every error this package raises on purpose. Its message has credentials blanked."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


class Interrupted(BetaKDError):
    """The job was asked to stop, saved, and waits to be run again."""


class UserError(BetaKDError):
    """Something the user gave is wrong; nothing was trained and nothing was lost."""


class SpecError(UserError):
    """A field of a spec is missing, misspelt, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A shard, a manifest or a sample is missing or damaged."""


class DataUnreachable(DataError):
    """The store, not the file, failed; it may answer again."""


class TooManyBadSamples(DataError):
    """The quarantined part of the data exceeds `data.max_bad_fraction`."""


class ModelError(UserError):
    """A model cannot be loaded or cannot do what the job asks of it."""


class VocabularyMismatch(ModelError):
    """Energies on logits need one vocabulary; teacher and student have two."""


class ClusterError(UserError):
    """The cluster, fully scaled, could not hold the job."""


class OutputError(UserError):
    """The output location is unusable or belongs to another job."""


class OutputUnreachable(OutputError):
    """The store of the output does not answer, or refuses what it took before; it may again."""


class TrainingError(BetaKDError):
    """The run stopped; the last committed checkpoint is untouched."""


class NonFiniteLoss(TrainingError):
    """`training.max_skipped_steps` steps in a row had a non-finite loss or gradient."""


class SampleRepeated(TrainingError):
    """A sample that the ledger has was trained on again: the promise of exactly once is broken."""


class TeacherError(TrainingError):
    """The teacher pool could not score a batch."""
