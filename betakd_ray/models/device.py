"""The devices this process computes on: found, never assumed."""

import torch


def find_device() -> torch.device:
    """The first GPU that Ray gave this process, else the CPU."""
    return find_devices()[0]


def find_devices() -> list[torch.device]:
    """The GPUs that Ray gave this process, the current one first, else the CPU."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    first, count = torch.cuda.current_device(), torch.cuda.device_count()
    return [torch.device("cuda", (first + number) % count) for number in range(count)]
