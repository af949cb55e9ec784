"""The job: check everything that can be checked, place each part on Ray, and run it.

JobSpec ──► BetaKDJob.fit()
               ├── stream of the plan            Ray Data
               ├── TeacherPool                   actors that survive restarts of the students
               └── student workers               Ray Train, DeepSpeed
"""

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from betakd_ray import errors
from betakd_ray.data.mixture import find_passes
from betakd_ray.data.plan import Pass, Plan
from betakd_ray.data.reader import Reader
from betakd_ray.data.render import Renderer
from betakd_ray.errors import ClusterError, DataError, Interrupted, OutputError, TrainingError
from betakd_ray.models.compatibility import check_feature_layer, check_features, check_vocabularies
from betakd_ray.models.load import load_config, load_processor, require_images
from betakd_ray.models.options import check_options
from betakd_ray.models.student import check_adapters, student_config, student_processor
from betakd_ray.on_ray.backend import Deaths, FoundTorchConfig, causes
from betakd_ray.on_ray.cluster import check_feasible, connected, gpus_each
from betakd_ray.on_ray.monitor import Monitor, give_up, report
from betakd_ray.on_ray.source import SplitOnce, rows
from betakd_ray.progress import progress_line
from betakd_ray.run.checkpoint import CheckpointStore, output_errors
from betakd_ray.run.folder import MODEL, QUARANTINE, RESULT, SPEC
from betakd_ray.run.metrics import to_jsonl
from betakd_ray.run.plan import tail_of, write_plan, write_tail
from betakd_ray.sigterm import on_sigterm
from betakd_ray.spec import VISUAL_ENERGIES, JobSpec, ManualWeighting, TeacherSpec, load_spec
from betakd_ray.storage import join, open_store, replace_file
from betakd_ray.teacher.cache import SignalCache
from betakd_ray.teacher.parts import Needs, TeacherFacts
from betakd_ray.teacher.pool import Teachers, on_driver_node
from betakd_ray.teacher.remote import unwrapped
from betakd_ray.train.config import STOPPED, WorkerConfig
from betakd_ray.train.worker import train_worker

FREE_TO_CHANGE = {
    "training": (
        "workers",
        "micro_batch_size",
        "micro_batch_tokens",
        "checkpoint_every",
        "keep",
        "log_every",
        "max_failures",
        "max_skipped_steps",
        "collective_timeout_s",
    ),
    "teacher": ("cache", "window", "timeout_s", "batch_tokens"),
}
"""Fields that may differ between two runs of one job."""
UPLOADED = "/working_dir_files/"
"""Part of the path of the folder in which a submitted job runs."""
STARTS = 4
"""Number of times that Ray Train tries to place the students. Together they take `cluster.start_timeout_s`."""
_LOG = logging.getLogger(__name__)
WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DEEPSPEED_LOG_LEVEL": "error",
}
ON_CPU = {
    "DS_ACCELERATOR": "cpu",
    # glibc keeps the memory of a step's tensors for the next step. By default it returns the pages to the system, and
    # every step has page faults for all of them.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
}


@dataclass(frozen=True)
class JobResult:
    """Result of a finished job."""

    name: str
    path: str
    """Folder of the run, with metrics.jsonl, quarantine.jsonl, checkpoints/ and model/."""
    model: str
    """Folder that transformers' `from_pretrained` loads."""
    metrics: dict[str, Any]
    """Metrics of the last step that was logged."""
    steps: int
    planned: int
    """Number of samples over all epochs."""
    consumed: int
    """Number of samples that took part in a step."""
    quarantined: int
    tail: int
    """Number of samples left over: fewer than one global batch, or beyond `training.max_steps`."""
    skipped_steps: int
    """Number of steps that were skipped because a gradient was not finite."""


class BetaKDJob:
    """One distillation job (or, without a teacher, supervised fine-tuning).

    A `fit()` with the same name and output resumes from the last committed checkpoint. It returns at once if the job is
    done.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.run = join(spec.output.path, spec.name)
        self._monitor: ActorHandle | None = None
        self._is_stopping = False

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> "BetaKDJob":
        """Return the job of a spec file. Raises SpecError."""
        return cls(load_spec(path, overrides))

    def fit(self, teachers: Teachers | None = None) -> JobResult:
        """Run the job to the end. If `teachers` are given, they are used and stay alive after the job.

        Raises a UserError if the job cannot work; this happens before it uses the cluster's GPUs. Raises a
        TrainingError if it failed later; the next `fit()` then resumes from the last committed checkpoint.
        """
        views = self.check()
        if (finished := self._finished()) is not None:
            return finished
        try:
            with on_sigterm(self._interrupt), connected(self.spec):
                return self._outliving_processes(views, teachers)
        finally:
            self._monitor, self._is_stopping = None, False

    def stop(self) -> None:
        """Ask a running `fit()` to save and end; it then raises Interrupted.

        Call it from another thread, or from a signal handler.
        """
        self._is_stopping = True
        if self._monitor is not None:
            self._monitor.stop.remote()

    def _interrupt(self) -> None:
        """Raise Interrupted: the `stop()` of a job that does not train yet, or no longer, and has nothing to save."""
        raise Interrupted(f"{self.spec.name}: was asked to stop, and lost nothing. Run it again to go on.")

    def check(self) -> tuple[Plan, dict[str, Renderer]]:
        """Check all that can be checked without a cluster (data, models, output); return plan and renderers.

        Raises UserError.
        """
        renderers = self.renderers()
        plan = self.plan(find_passes(self.spec.data))
        self._claim_output()
        self._warn(plan)
        write_plan(self.run, self.spec.output.storage, plan)
        return plan, renderers

    # --------------------------------------------------------------------------------------------- checks

    def renderers(self) -> dict[str, Renderer]:
        """Return the "student" renderer, and the "teacher" one if its output differs. Raises ModelError."""
        spec = self.spec
        processor = student_processor(spec.student)
        check_adapters(spec.student)
        student = Renderer(processor, spec.data)
        if spec.teacher is None:
            return {"student": student}
        config = load_config(spec.teacher)
        check_options(spec.teacher, config)
        teacher_processor = load_processor(spec.teacher)
        require_images(spec.teacher.path, config, teacher_processor)
        check_vocabularies(teacher_processor, processor)
        teacher = Renderer(teacher_processor, spec.data)
        check_features(spec.objective, teacher.image_tokens, student.image_tokens)
        check_feature_layer(spec.objective, config, student_config(spec.student))
        return (
            {"student": student}
            if teacher.fingerprint == student.fingerprint
            else {"student": student, "teacher": teacher}
        )

    def plan(self, passes: Sequence[Pass]) -> Plan:
        """Return the order in which the data are read. Raises DataError if they are less than one step."""
        spec = self.spec
        plan = Plan.of(passes, spec.training.epochs, spec.training.seed, spec.data.shuffle)
        if plan.samples < spec.training.global_batch_size:
            raise DataError(
                f"data.train: {len(plan.distinct)} shards hold {plan.samples} samples over {plan.epochs} epochs, fewer "
                f"than one training.global_batch_size of {spec.training.global_batch_size}. Lower it, or add data or "
                "epochs."
            )
        return plan

    def _warn(self, plan: Plan) -> None:
        weighting, steps = self.spec.objective.weighting, self.spec.training.steps(plan.samples)
        if isinstance(weighting, ManualWeighting) and weighting.weights == "auto" and steps <= weighting.auto_steps:
            _LOG.warning(
                "%s: objective.weighting.auto_steps = %d, and the job has %d steps: its weights stay 1",
                self.spec.name, weighting.auto_steps, steps,
            )  # fmt: skip

    def was_here(self) -> bool:
        """Return whether this same job was started before.

        Raises OutputError if the folder has another job, or if Ray will remove the folder.
        """
        if UPLOADED in self.run:
            raise OutputError(
                f"output.path: {self.run} is in the folder that `ray job submit --working-dir` uploaded, which Ray "
                "removes after the job. Give a URL, or an absolute path that outlasts the cluster."
            )
        filesystem, root = open_store(self.run, self.spec.output.storage)
        path = join(root, SPEC)
        with output_errors(self.run):
            if not filesystem.exists(path):
                return False
            content = filesystem.cat_file(path)
        try:
            there = JobSpec.model_validate_json(content)
        except ValueError as error:
            raise OutputError(f"output.path: {path} is not a spec of this version; choose another name") from error
        _require_same_job(self.run, there, self.spec)
        return True

    def _claim_output(self) -> None:
        """Write spec.json, unless this same job was started before. Raises OutputError."""
        if self.was_here():
            return
        filesystem, root = open_store(self.run, self.spec.output.storage)
        with output_errors(self.run):
            filesystem.makedirs(root, exist_ok=True)
            replace_file(filesystem, join(root, SPEC), self.spec.model_dump_json(indent=2).encode())

    def _finished(self) -> JobResult | None:
        filesystem, root = open_store(self.run, self.spec.output.storage)
        path = join(root, RESULT)
        with output_errors(self.run):
            return JobResult(**json.loads(filesystem.cat_file(path))) if filesystem.exists(path) else None

    # ------------------------------------------------------------------------------------------------ run

    def _outliving_processes(self, views: tuple[Plan, dict[str, Renderer]], teachers: Teachers | None) -> JobResult:
        """Run the job, and restart it from its last checkpoint if one of its control processes dies.

        Dead teachers and students are replaced while the job runs. The control processes (the pool, the monitor, Ray
        Train's controller) cannot be replaced.
        """
        store = CheckpointStore(self.run, self.spec.output.storage)
        deaths = 0
        while True:
            begun_at = store.latest()
            try:
                with ExitStack() as actors:
                    return self._run(*views, teachers or actors.enter_context(Teachers()), actors)
            except RayActorError as error:
                # Counted since the last checkpoint: a job that makes progress may be restarted any number of times.
                deaths = 1 + (deaths if store.latest() == begun_at else 0)
                if deaths > self.spec.training.max_failures:
                    raise TrainingError(
                        f"{self.spec.name}: processes that watch over the job died {deaths} times with no new "
                        "checkpoint in between (the limit is training.max_failures). Run it again to go on from the "
                        f"last one. The last time: {error}"
                    ) from error
                _LOG.warning(
                    "%s: begins again from its last checkpoint, as a process that watches over it died: %s",
                    self.spec.name, error,
                )  # fmt: skip

    def _run(self, plan: Plan, renderers: dict[str, Renderer], teachers: Teachers, actors: ExitStack) -> JobResult:
        """Run the job once. `actors` ends the actors after it.

        Their handles alone would not end them: a handle in a reference cycle keeps its actor, and so its node, alive.
        """
        spec = self.spec
        gpus = {name: gpus_each(getattr(spec.cluster, name).gpus) for name in ("teacher", "student")}
        for demand, room in check_feasible(spec):
            if room < demand.count:
                _LOG.warning(
                    "%s: cluster.%s waits for nodes, up to cluster.start_timeout_s = %g: it asks for %s",
                    spec.name, demand.pool, spec.cluster.start_timeout_s, demand,
                )  # fmt: skip
        store = CheckpointStore(self.run, spec.output.storage)
        resumed = store.latest()
        quarantined = store.quarantined(resumed) if resumed else []
        monitors = ray.remote(Monitor).options(num_cpus=0, scheduling_strategy=on_driver_node())
        monitor = cast(ActorHandle, monitors.remote(plan.samples, quarantined, spec.training.max_failures))
        actors.callback(ray.kill, monitor)
        self._monitor = monitor
        if self._is_stopping:
            self.stop()  # the request came before there was a monitor to send it to
        pool = facts = cache = None
        needs = Needs()
        if spec.teacher:
            needs = self.needs(spec.teacher)
            lent = teachers.lent(spec.teacher, needs, spec.cluster.teacher, gpus["teacher"], spec.name)
            pool, needs = actors.enter_context(lent)
            facts = cast(TeacherFacts, unwrapped(pool.wait_until_ready.remote(spec.cluster.start_timeout_s)))
            view = renderers.get("teacher", renderers["student"])
            cache = SignalCache.of(spec.teacher, facts, view.fingerprint, needs)
        config = WorkerConfig(
            spec=spec,
            run=self.run,
            plan=plan,
            monitor=monitor,
            image_token_id=renderers["student"].image_token_id,
            teacher_image_token_id=renderers.get("teacher", renderers["student"]).image_token_id,
            pad_token_id=renderers["student"].pad_token_id,
            total_steps=spec.training.steps(plan.samples),
            pool=pool,
            facts=facts,
            needs=needs,
            cache=cache,
        )
        reader = Reader(
            plan,
            spec.data,
            renderers,
            report=partial(report, monitor),
            give_up=partial(give_up, monitor),
            locate=cache.locate if cache else None,
            pairs_images=not VISUAL_ENERGIES.isdisjoint(spec.objective.channels),
        )
        with _progress(monitor, config.total_steps, spec), on_sigterm(self.stop):
            outcome = self._train(config, ray.put(reader), gpus["student"])
        if STOPPED in outcome:
            raise Interrupted(
                f"{spec.name}: was asked to stop, and has saved its state at step {outcome[STOPPED]} of "
                f"{config.total_steps}. Run it again to go on from there."
            )
        return self._conclude(outcome, plan)

    def needs(self, teacher: TeacherSpec) -> Needs:
        """Return what the job needs from the teacher. Raises ModelError."""
        configs = (load_config(teacher), student_config(self.spec.student))
        # Number of ids for which both models have a logit. A model may have more logits than its tokenizer has ids.
        vocab = min(config.get_text_config().vocab_size for config in configs)
        return Needs.of(teacher, self.spec.objective, vocab)

    def _train(self, config: WorkerConfig, reader: "ray.ObjectRef", gpus: float) -> dict[str, Any]:
        spec = self.spec
        student, workers = spec.cluster.student, spec.training.workers
        resources = {"CPU": student.cpus, **student.resources} | ({"GPU": gpus} if gpus else {})
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"worker": config},
            datasets={"train": partial(rows, reader, spec, self.run, config.plan, config.monitor)},
            dataset_config=SplitOnce(),
            torch_config=FoundTorchConfig(timeout_s=int(spec.training.collective_timeout_s)),
            scaling_config=ScalingConfig(
                num_workers=(workers.min, workers.max) if workers.is_elastic else workers.min,
                use_gpu=gpus > 0,
                resources_per_worker=resources,
                label_selector=student.labels or None,
                accelerator_type=student.accelerator_type,
            ),
            run_config=RunConfig(
                # Ray Train's own folder holds only its state. Checkpoints and metrics are in the run's folder.
                name=f"{spec.name}-{os.urandom(4).hex()}",
                storage_path=_scratch(),
                # Unlimited, because Ray does not reset its count on progress. The monitor counts failures instead.
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=STARTS - 1),
                callbacks=[Deaths(config.monitor)],
                worker_runtime_env={"env_vars": WORKER_ENVIRONMENT | _accelerator(gpus)},
            ),
        )
        # Ray Train reads this limit only from the environment, and passes it on to its controller.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(spec.cluster.start_timeout_s / STARTS)
        try:
            outcome = trainer.fit().return_value or {}
        except TrainingFailedError as error:
            _raise_cause(config, is_failed=True)
            raise _explained(error, spec) from error
        _raise_cause(config)
        return outcome

    def _conclude(self, outcome: dict[str, Any], plan: Plan) -> JobResult:
        store = CheckpointStore(self.run, self.spec.output.storage)
        last = store.latest()
        assert last is not None  # the workers saved it before they returned
        quarantined = store.quarantined(last)
        tail = tail_of(plan, store.ledger(last), quarantined, self.spec.training.global_batch_size)
        write_tail(self.run, self.spec.output.storage, tail)
        result = JobResult(
            name=self.spec.name,
            path=self.run,
            model=join(self.run, MODEL),
            metrics=outcome["metrics"],
            steps=outcome["steps"],
            planned=plan.samples,
            consumed=outcome["consumed"],
            quarantined=len(quarantined),
            tail=plan.samples - outcome["consumed"] - len(quarantined),
            skipped_steps=outcome["skipped_steps"],
        )
        filesystem, root = open_store(self.run, self.spec.output.storage)
        with output_errors(self.run):
            replace_file(filesystem, join(root, QUARANTINE), to_jsonl(map(asdict, quarantined)).encode())
            replace_file(filesystem, join(root, RESULT), json.dumps(asdict(result), indent=2).encode())
        return result


# ----------------------------------------------------------------------------------------------- what Ray runs


def _accelerator(gpus: float) -> dict[str, str]:
    return {} if gpus else ON_CPU


def _scratch() -> str:
    folder = Path(os.environ.get("BETAKD_CACHE", Path.home() / ".cache" / "betakd")) / "ray-train"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


# ------------------------------------------------------------------------------------------ what went wrong


def _raise_cause(config: WorkerConfig, *, is_failed: bool = False) -> None:
    """Raise the error that ended the training, if the monitor has one.

    Raises RayActorError if the teacher pool died, because no restart of the students can repair that.
    """
    failure = ray.get(config.monitor.failure.remote())
    if (failure or is_failed) and config.pool is not None:
        ray.get(config.pool.is_lent.remote())  # raises if it died
    if failure:
        kind, message = failure
        raise getattr(errors, kind, TrainingError)(message)


def _explained(error: TrainingFailedError, spec: JobSpec) -> errors.BetaKDError:
    cause = getattr(error, "controller_failure", None)
    if not isinstance(cause, WorkerGroupStartupTimeoutError):
        workers = getattr(error, "worker_failures", None)
        return TrainingError(f"{spec.name}: the student workers failed: {causes(workers) if workers else error}")
    return ClusterError(
        f"cluster.student: {cause.num_workers} students found no place within cluster.start_timeout_s = "
        f"{spec.cluster.start_timeout_s:g}; free are {ray.available_resources()}. Wait for the other jobs, add nodes "
        "or lower training.workers, and run it again to go on from the last checkpoint."
    )


def _require_same_job(run: str, there: JobSpec, asked: JobSpec) -> None:
    """Raise OutputError if the run's folder has another job.

    Fields that change the stream or the model must be equal. The other fields may differ between runs.
    """
    free = {"cluster", "tracking", "output"}
    before, now = (each.model_dump(mode="json", exclude=free) for each in (there, asked))
    for tree in (before, now):
        for section, fields in FREE_TO_CHANGE.items():
            for field in fields if tree[section] else ():
                tree[section].pop(field)
    differing = [section for section in now if before[section] != now[section]]
    if differing:
        raise OutputError(
            f"output.path: {run} holds another job of this name (its {', '.join(differing)} differ). Choose another "
            "`name`, another output.path, or remove the folder."
        )


# ------------------------------------------------------------------------------------------------ progress


@contextmanager
def _progress(monitor: ActorHandle, total_steps: int, spec: JobSpec) -> Iterator[None]:
    """Show a progress line on the driver's terminal, with the monitor's newest metrics."""
    stop = threading.Event()
    with progress_line(spec.name, total_steps, "starting", is_shown=spec.tracking.progress) as update:

        def show() -> None:
            latest = cast(dict[str, Any], ray.get(monitor.latest.remote()))
            if latest:
                numbers = f"loss {latest['loss']:.4f} · {latest['samples_per_second']:.0f} samples/s"
                update(completed=latest["step"], numbers=numbers)

        def follow() -> None:
            while not stop.wait(1.0):
                show()

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
            show()  # the last step may have ended since the last update
        finally:
            stop.set()
            follower.join(timeout=5)
