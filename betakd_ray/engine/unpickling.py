"""Load of checkpoints that runs no code from them.

Checkpoints are pickles, and DeepSpeed lets torch run the code in them (`weights_only=False`). Inside `tensors_only`
torch does not. Run as a program, this module is DeepSpeed's conversion of a checkpoint to its universal form, under the
same rule.
"""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch.serialization import safe_globals

from betakd_ray.errors import OutputError

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only(checkpoint: str) -> Iterator[None]:
    """Limit every `torch.load` of the block to tensors, plain values and three small classes of DeepSpeed's.

    This holds for any caller and any arguments. Raises OutputError with the checkpoint's name if a file needs anything
    else; none of its code has run by then.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    pickle_stages_by_value()  # also in the conversion, which writes what it read
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"  # overrides the argument weights_only=False of DeepSpeed's calls
    try:
        with safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        found = f"asks for {asked[1]}, which could run code" if asked else "is damaged"
        raise OutputError(
            f"{checkpoint}: is not loaded, because one of its files {found}. Find out who wrote it, and remove the "
            "checkpoint: the job then resumes from the previous one."
        ) from error
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


def pickle_stages_by_value() -> None:
    """Make DeepSpeed's ZeroStageEnum pickle itself by value.

    Before Python 3.11.4 an Enum is unpickled with `getattr`. That could run code, so `tensors_only` refuses it.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    ZeroStageEnum.__reduce_ex__ = lambda self, proto: (ZeroStageEnum, (self.value,))


if __name__ == "__main__":
    from deepspeed.checkpoint.ds_to_universal import main, parse_arguments

    arguments = parse_arguments()
    try:
        with tensors_only(arguments.input_folder):
            main(arguments)
    except OutputError as error:
        raise SystemExit(str(error)) from None
