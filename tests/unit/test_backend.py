"""What Ray Train's controller gets from the driver."""

import os
import pickle
import subprocess
import sys

from ray.actor import ActorHandle
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

from betakd_ray.on_ray.backend import START_TIMEOUT, ReportFailures


class Handle(ActorHandle):
    """A handle that can be pickled and leads nowhere."""

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass

    def __reduce__(self) -> tuple[type[dict], tuple[()]]:
        return dict, ()


def test_the_limit_of_a_start_is_set_in_the_process_that_keeps_it_and_in_no_other() -> None:
    assert START_TIMEOUT == WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
    callback = pickle.dumps(ReportFailures(Handle(), 12.5))
    assert START_TIMEOUT not in os.environ
    code = f"import os, pickle; pickle.loads({callback!r}); print(os.environ[{START_TIMEOUT!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "12.5"
