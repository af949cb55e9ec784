"""What is unusual about the size of a job: nothing that is wrong, but often not what was meant."""

from collections.abc import Iterator

from betakd_ray.spec.job import JobSpec

FEW_STEPS = 100
"""Number of steps below which a learned weighting and the schedules hardly do anything."""
LARGE_TAIL = 0.05
"""Share of the samples that are left over, above which it is said."""
LARGE_BATCH = 0.1
"""Share of an epoch in one step, above which it is said."""


def advice(spec: JobSpec, samples: int) -> list[str]:
    """Return what is unusual about a job that reads `samples` samples over all its epochs, one text each."""
    return [*_of_steps(spec, samples), *_of_batches(spec, samples)]


def _of_steps(spec: JobSpec, samples: int) -> Iterator[str]:
    training = spec.training
    steps, size = training.steps(samples), training.global_batch_size
    if steps < FEW_STEPS:
        yield (
            f"the job has only {steps} steps, in which a learned weighting and the learning rate's schedule hardly do "
            "anything. Raise training.epochs, lower training.global_batch_size, or add data"
        )
    left = samples - steps * size
    if left < size and left > LARGE_TAIL * samples:
        yield (
            f"{left} of {samples} samples ({left / samples:.0%}) are left over at the end, because they do not fill a "
            f"training.global_batch_size of {size}. Choose one that divides {samples}, or more epochs"
        )
    if training.checkpoint_every >= steps > FEW_STEPS:
        yield (
            f"training.checkpoint_every is {training.checkpoint_every}, and the job has {steps} steps: its only "
            "checkpoint is that at the end, so a job that is killed begins again"
        )


def _of_batches(spec: JobSpec, samples: int) -> Iterator[str]:
    training = spec.training
    size, epoch = training.global_batch_size, samples / training.epochs
    if size > LARGE_BATCH * epoch:
        yield (
            f"a step of training.global_batch_size {size} takes {size / epoch:.0%} of an epoch of {epoch:.0f} samples. "
            "A smaller one makes more steps"
        )
    share = training.share(training.workers.max)
    if training.micro_batch_size and training.micro_batch_size > share:
        yield (
            f"training.micro_batch_size is {training.micro_batch_size}, but a step has only {share} samples for each "
            f"of {training.workers.max} workers: it is never filled"
        )
