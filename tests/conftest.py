"""The environment of every test: quiet, offline, one thread, one seed.

It is set while this file is imported, before torch, transformers and Ray. Ray's workers inherit it. A variable that
is already set keeps its value: `RAY_LOG_TO_DRIVER=1 make test` shows what the workers print.
"""

import os
import random
import secrets
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

SEED = 0
SCRIPTS = sysconfig.get_path("scripts")
ENVIRONMENT = {
    # One thread per process: sums are then computed in one order, and Ray's workers do not compete for the cores.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DS_ACCELERATOR": "cpu",
    "DEEPSPEED_LOG_LEVEL": "ERROR",
    # Where `make setup` compiled DeepSpeed's collective: a test never waits for a compiler, or for its stale lock.
    "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix, "torch_extensions")),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # ray.train.report() waits for the controller's next look at its workers: 2 s otherwise.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # As in production, but with a token of this session's own; none is written to the home folder.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
# ninja, which torch calls by name, also for a pytest started without activating the venv.
os.environ["PATH"] = os.pathsep.join([SCRIPTS, os.environ["PATH"]])

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    """Yield a list, whose objects are closed after the test."""
    made: list[Any] = []
    yield made
    for each in made:
        each.close()
