"""Forecast of what a job will need, without a cluster: `betakd plan`.

It gives steps, GPUs, memory, and bytes on the network and in storage. Its inputs are the data's manifests, a few
samples and the models' configurations. No weights are read; those of a quantised teacher are counted as if they were
not quantised. If the data do not exist yet, their size is assumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from betakd_ray.data.mixture import find_passes
from betakd_ray.data.plan import Plan
from betakd_ray.forecast.memory import GRADIENT_BYTES, StudentMemory, TeacherModel, student_memory, teacher_model
from betakd_ray.forecast.samples import (
    AssumedData,
    SampleSize,
    count_of,
    first_samples,
    largest_batch,
    size,
    stacked,
    teacher_group,
)
from betakd_ray.job import BetaKDJob
from betakd_ray.on_ray.cluster import check_feasible, connected
from betakd_ray.run.claim import was_here
from betakd_ray.spec import GPUPoolSpec, JobSpec, PoolSpec
from betakd_ray.teacher.parts import PARTS, Needs, value_bytes

Line = tuple[str, str, str]
"""Line of the forecast's table: section, quantity, value."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of a job. Sizes are in bytes."""

    spec: JobSpec
    plan: Plan
    samples: "dict[str, SampleSize]"
    """Mean sample for "student" and, if its samples have other sizes, for "teacher"."""
    read: int | None
    """Number of samples that were read for the mean; None if the data are assumed."""
    student: StudentMemory
    """Memory of each rank, with the smallest number of ranks."""
    teacher: TeacherModel | None
    needs: Needs
    tflops: float | None = None
    """Assumed sustained speed of one GPU, in 10¹² floating-point operations per second."""

    @property
    def gpus(self) -> float | None:
        """Return the smallest number of GPUs with which the job runs; None if the cluster decides it."""
        pools = self.spec.cluster
        asked = [(pools.student.gpus, self.spec.training.workers.min)]
        asked += [(pools.teacher.gpus, pools.teacher.min)] if self.teacher else []
        if any(gpus == "auto" for gpus, _ in asked):
            return None
        return sum(float(gpus) * processes for gpus, processes in asked)

    @property
    def total_steps(self) -> int:
        return self.spec.training.steps(self.plan.samples)

    @property
    def tail(self) -> int:
        """Return the number of samples that are left over after the last step."""
        return self.plan.samples - self.total_steps * self.spec.training.global_batch_size

    @property
    def sample(self) -> "SampleSize":
        """Return the mean sample for the student."""
        return self.samples["student"]

    @property
    def teacher_sample(self) -> "SampleSize":
        return self.samples.get("teacher", self.sample)

    @property
    def signal(self) -> float:
        """Return the bytes of the teacher's answer for a mean sample."""
        return signal_bytes(self.needs, self.teacher, self.teacher_sample) if self.teacher else 0.0

    @property
    def cache(self) -> float:
        """Return the bytes of the full cache. A sample that an epoch reads twice is stored once."""
        return self.signal * sum(shard.samples for shard in self.plan.distinct)

    @property
    def ledger(self) -> tuple[int, int]:
        """Return the ledger's largest size in bytes, and the bytes that each shard in progress adds.

        The ledger has the shards' sizes, and one bit per epoch and shard that says whether it is done. A shard in
        progress adds one bit per sample. Bits are written in base64: 6 per byte.
        """
        largest = int(self.plan.sizes.max())
        sizes = len(self.plan.empty_ledger().to_json())
        return sizes + self.plan.epochs * len(self.plan.shards) // 6, largest // 6

    @property
    def held(self) -> float:
        """Return the bytes of the samples that a student rank keeps with the teachers: a whole step, and the window."""
        teacher, training = self.spec.teacher, self.spec.training
        if teacher is None:
            return 0.0
        samples = (
            training.share(training.workers.min) + teacher.window * teacher.batch_tokens / self.teacher_sample.tokens
        )
        return samples * (self.teacher_sample.bytes + self.signal)

    @property
    def exchanged(self) -> float:
        """Return the bytes that each rank sends to the others in a step, with the smallest number of ranks.

        Collectives are counted as rings. Gradients are reduced once per micro-batch (ZeRO 2 and 3) or once per step.
        Weights are gathered once after the step, or (ZeRO 3) twice per micro-batch.
        """
        training, memory = self.spec.training, self.student
        ranks, stage = training.workers.min, training.zero_stage
        times = training.accumulation(ranks, self.sample.tokens)
        reduced = memory.trained * (times if stage >= 2 else 1)
        gathered = memory.parameters * 2 * times if stage == 3 else memory.trained
        weight_bytes = 2 if training.precision == "bf16" else 4
        return (reduced * GRADIENT_BYTES + gathered * weight_bytes) * (ranks - 1) / ranks

    def rows(self) -> Iterator[Line]:
        """Yield all rows of the forecast's table."""
        yield from self._data_rows()
        yield from self._model_rows()
        yield from self._memory_rows()
        yield from self._byte_rows()
        if self.tflops:
            yield from self._speed_rows(self.tflops)

    def _data_rows(self) -> Iterator[Line]:
        training, source = self.spec.training, "found" if self.read else "assumed"
        passes = (
            f", in {len(self.plan.shards):,} passes an epoch" if len(self.plan.shards) > len(self.plan.distinct) else ""
        )
        yield "data", f"shards, {source}", f"{len(self.plan.distinct):,}{passes}"
        yield "data", f"samples, {source}", f"{self.plan.samples // self.plan.epochs:,} × {self.plan.epochs} epochs"
        yield "data", "steps", f"{self.total_steps:,} of {training.global_batch_size:,} samples"
        yield "data", "tail, not trained on", f"{self.tail:,} samples"
        source = f"mean of {self.read} samples" if self.read else "assumed"
        for name, sample in self.samples.items():
            yield "data", f"{name}'s tokens, {source}", str(sample)

    def _model_rows(self) -> Iterator[Line]:
        pools, workers = self.spec.cluster, self.spec.training.workers
        if self.teacher:
            yield "pools", "teacher", _pool(pools.teacher, pools.teacher.min, pools.teacher.max or pools.teacher.min)
        yield "pools", "student", _pool(pools.student, workers.min, workers.max)
        yield "pools", "readers", f"tasks of {_needs(pools.readers)}"
        if (gpus := self.gpus) is not None:
            yield "pools", "GPUs at the least", f"{gpus:g}"
        if self.teacher:
            yield "models", "teacher", f"{count_of(self.teacher.parameters)} parameters"
        trained = f"{count_of(self.student.parameters)} parameters, {count_of(self.student.trained)} of them trained"
        yield "models", "student", trained

    def _memory_rows(self) -> Iterator[Line]:
        if self.teacher:
            packed = f", as if {self.teacher.quantization} did not pack them" if self.teacher.quantization else ""
            yield "memory of a teacher", f"weights{packed}", size(self.teacher.weights)
            if self.teacher.largest_share < self.teacher.weights:
                yield "memory of a teacher", "weights on its fullest GPU", size(self.teacher.largest_share)
            yield "memory of a teacher", "one group of samples", size(self.teacher.working)
            yield "memory of a teacher", "peak", size(self.teacher.peak)
        where = f"memory of a student rank (of {self.spec.training.workers.min})"
        memory = self.student
        yield where, "weights", size(memory.weights)
        yield where, "optimizer state", size(memory.optimizer)
        yield where, "copy of the teacher's head", size(memory.teacher_head)
        yield where, "DeepSpeed's buffers", size(memory.gathered + memory.buckets)
        yield where, "gradients", size(memory.gradients)
        yield where, "activations", size(memory.activations)
        yield where, "objective and backward", size(max(memory.objective, memory.backward))
        yield where, "while the optimizer steps", size(memory.step)
        yield where, "peak", size(memory.peak)

    def _byte_rows(self) -> Iterator[Line]:
        training = self.spec.training
        yield "bytes", "samples to the students, a step", size(self.sample.bytes * training.global_batch_size)
        if self.teacher and self.spec.teacher:
            yield "bytes", "teacher's answers, a sample", size(self.signal)
            yield "bytes", "teacher's answers, a step", size(self.signal * training.global_batch_size)
            kept = size(self.cache) if self.spec.teacher.cache else f"no cache; it would be {size(self.cache)}"
            yield "bytes", "teacher's cache", kept
            yield "bytes", "in the object store for a student rank", size(self.held)
        if training.workers.min > 1:
            yield "bytes", "gradients and weights from each rank, a step", size(self.exchanged)
        at_most, each = self.ledger
        yield "bytes", "a checkpoint", size(self.student.checkpoint)
        yield (
            "bytes",
            f"checkpoints kept ({training.keep}, and the one being written)",
            size(self.student.checkpoint * (training.keep + 1)),
        )
        yield "bytes", "ledger in it", f"up to {size(at_most)}, and {size(each)} for each shard being read"

    def _speed_rows(self, tflops: float) -> Iterator[Line]:
        where, workers = f"speed, at an assumed {tflops:g} TFLOP/s a GPU", self.spec.training.workers
        speed = self.student_speed(tflops)
        total = speed * workers.max
        yield where, "a student rank", f"{speed:.3g} samples/s"
        yield where, f"{workers.max} student ranks", f"{total:,.0f} samples/s"
        seconds = self.spec.training.global_batch_size / total
        yield where, "a step", f"{seconds:,.3g} s"
        yield where, "between two checkpoints", f"{seconds * self.spec.training.checkpoint_every / 60:,.3g} minutes"
        yield where, "time", f"{self.total_steps * seconds / 86_400:,.1f} days"
        yield where, "samples to the students", f"{size(self.sample.bytes * total)}/s"
        if workers.min > 1:
            yield where, "gradients and weights from each rank", f"{size(self.exchanged / seconds)}/s"
        if self.teacher:
            each = self.teacher_speed(tflops)
            yield where, "a teacher", f"{each:.3g} samples/s"
            yield where, "teachers that keep up", f"{total / each:,.1f}, {speed / each:.3g} for each student rank"
            yield where, "samples to the teachers", f"{size(self.teacher_sample.bytes * total)}/s"
            yield where, "teachers' answers", f"{size(self.signal * total)}/s"
            yield where, "teachers' answers to each rank", f"{size(self.signal * speed)}/s"

    def student_speed(self, tflops: float) -> float:
        """Return samples per second on one rank.

        A step takes 6 FLOPs per parameter and token, or 8 if gradient checkpointing computes the activations twice.
        """
        operations = 8 if self.spec.training.gradient_checkpointing else 6
        return tflops * 1e12 / (operations * self.student.parameters * self.sample.tokens)

    def teacher_speed(self, tflops: float) -> float:
        """Return samples per second of one teacher.

        A forward takes 2 FLOPs per parameter and token. Only one GPU of a teacher works at a time.
        """
        assert self.teacher
        return tflops * 1e12 / (2 * self.teacher.parameters * self.teacher_sample.tokens)


def signal_bytes(needs: Needs, teacher: TeacherModel, sample: SampleSize) -> float:
    """Return the bytes of a teacher's answer to a mean sample."""
    facts = teacher.facts(needs)
    places = {"row": sample.answer_tokens, "token": sample.image_tokens, "pair": sample.pairs, "sample": 1.0}
    return sum(places[PARTS[name].axis] * value_bytes(name, needs, facts) for name in needs.parts)


def forecast(job: BetaKDJob, assumed: AssumedData | None = None, tflops: float | None = None) -> Forecast:
    """Return the forecast of a job. Writes nothing, and needs no cluster.

    Raises the same UserErrors as `fit()`: data that cannot be read (unless they are assumed), unsuitable models, or an
    output folder of another job.
    """
    spec = job.spec
    renderers = job.renderers()
    plan = job.plan(assumed.passes() if assumed else find_passes(spec.data))
    # It makes the same check as `claim`, and writes nothing.
    was_here(job.run, job.spec)
    views = {
        name: [assumed.rendering(renderer)] if assumed else first_samples(plan.shards[0], spec, renderer)
        for name, renderer in renderers.items()
    }
    batches = {name: largest_batch(views[name], spec, renderer) for name, renderer in renderers.items()}
    processors = {name: renderer.processor for name, renderer in renderers.items()}
    needs, teacher, view = Needs(), None, "teacher" if "teacher" in renderers else "student"
    if spec.teacher:
        needs = job.needs(spec.teacher)
        asked = spec.cluster.teacher.gpus
        gpus = 1 if asked == "auto" else max(1, int(asked))
        group = teacher_group(views[view], spec.teacher, renderers[view])
        teacher = teacher_model(spec.teacher, needs, group, processors[view], gpus)
    ranks = spec.training.workers.min
    student = student_memory(spec, teacher, needs, batches["student"], processors["student"], ranks)
    samples = {name: SampleSize.of(stacked(views[name], renderer)) for name, renderer in renderers.items()}
    read = None if assumed else len(views["student"])
    return Forecast(spec, plan, samples, read, student, teacher, needs, tflops)


def feasibility(spec: JobSpec) -> Iterator[Line]:
    """Yield for each pool whether the spec's cluster has room for it, or it must wait for nodes; ignore other jobs.

    The question may make an autoscaler start those nodes. Raises ClusterError for demands that can never be met.
    """
    with connected(spec):
        for demand, room in check_feasible(spec):
            waits = f"room for {room} now, waits for nodes up to {spec.cluster.start_timeout_s:g} s"
            state = "has room" if room == demand.count else waits
            yield f"cluster at {spec.cluster.address}", demand.pool, f"{demand}: {state}"


def _pool(pool: PoolSpec, least: int, most: int) -> str:
    count = f"{least}" if least == most else f"{least} to {most}"
    total = (
        ""
        if pool.gpus == "auto"
        else f": {least * pool.gpus:g}" + (f" to {most * pool.gpus:g}" if most > least else "")
    )
    return f"{count} × ({_needs(pool)})" + (f"{total} GPUs" if total else "")


def _needs(pool: PoolSpec) -> str:
    gpus = "1 GPU if the cluster has any" if pool.gpus == "auto" else f"{pool.gpus:g} GPUs"
    if isinstance(pool, GPUPoolSpec) and pool.accelerator_type:
        gpus += f" of type {pool.accelerator_type}"
    return ", ".join([gpus, f"{pool.cpus:g} CPUs", *(f"{amount:g} {name}" for name, amount in pool.resources.items())])
