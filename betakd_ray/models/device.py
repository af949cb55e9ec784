"""Discovery of the devices that this process computes on."""

import torch


def find_device() -> torch.device:
    """Return the first GPU that Ray gave this process, or the CPU if there is none."""
    return find_devices()[0]


def find_devices() -> list[torch.device]:
    """Return the GPUs that Ray gave this process, the current one first, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    first, count = torch.cuda.current_device(), torch.cuda.device_count()
    return [torch.device("cuda", (first + number) % count) for number in range(count)]
