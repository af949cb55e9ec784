"""The job: check everything that can be checked, place each part on Ray, and run it.

JobSpec ──► BetaKDJob.fit()
               ├── stream of the plan            Ray Data
               ├── TeacherPool                   actors that survive restarts of the students
               └── student workers               Ray Train, DeepSpeed
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import ray
import ray.train
from fsspec.implementations.local import LocalFileSystem
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from betakd_ray.check.finding import Finding
from betakd_ray.data.held_out import HeldOutData
from betakd_ray.data.mixture import find_passes
from betakd_ray.data.plan import Pass, Plan
from betakd_ray.data.reader import Reader
from betakd_ray.data.render import Renderer
from betakd_ray.engine.check import check_deepspeed
from betakd_ray.errors import ClusterError, DataError, Interrupted, TrainingError
from betakd_ray.leftovers import remove_unfinished
from betakd_ray.models.compatibility import check_feature_layer, check_features, check_vocabularies
from betakd_ray.models.identity import model_digest, student_digest
from betakd_ray.models.load import load_config, load_processor, require_images
from betakd_ray.models.options import check_options
from betakd_ray.models.student import check_adapters, student_config, student_processor
from betakd_ray.objective import check_plugins
from betakd_ray.on_ray.cluster import check_feasible, connected, gpus_each, on_driver_node
from betakd_ray.on_ray.monitor import Monitor, give_up, report
from betakd_ray.output import output_errors
from betakd_ray.progress import Update, progress_line
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.claim import claim, origins_of, require_same_origins
from betakd_ray.run.extension import extend, is_extended
from betakd_ray.run.files import stored
from betakd_ray.run.folder import CHECKPOINTS
from betakd_ray.run.lease import Permit, held_lease
from betakd_ray.run.plan import write_plan
from betakd_ray.run.records import RESULT_FILE
from betakd_ray.run.result import JobResult, conclude
from betakd_ray.sigterm import StopRequest, on_sigterm
from betakd_ray.spec import CheckSpec, JobSpec, ManualWeighting, TeacherSpec, VisualEnergy, load_spec
from betakd_ray.spec.advice import advice
from betakd_ray.storage import join, open_store
from betakd_ray.teacher.cache import SignalCache
from betakd_ray.teacher.parts import Needs, TeacherFacts
from betakd_ray.teacher.remote import unwrapped
from betakd_ray.teacher.scorer import engine_of
from betakd_ray.teacher.sharing import Teachers
from betakd_ray.trackers.check import check_trackers
from betakd_ray.train.config import STOPPED, WorkerConfig
from betakd_ray.train.students import train_students
from betakd_ray.train.teacher_checks import TeacherCheck, ask_student, ask_teacher, settings_of

AGAIN = "Run it again to go on."
_LOG = logging.getLogger(__name__)


class BetaKDJob:
    """One distillation job (or, without a teacher, supervised fine-tuning).

    A `fit()` with the same name and output resumes from the last committed checkpoint. It returns at once if the job is
    done.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.run = join(spec.output.path, spec.name)
        self.origins: dict[str, str] = {}
        """What the job is made from (`run.claim`); known after `check()`."""
        self._held_out: HeldOutData | None = None
        self._permit = Permit(self.run, spec.output.storage)
        self._stop = StopRequest(f"{spec.name}: was asked to stop, and lost nothing. Run it again to go on.")
        self._update: Update = lambda **_: None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> "BetaKDJob":
        """Return the job of a spec file. Raises SpecError."""
        return cls(load_spec(path, overrides))

    def fit(self, teachers: Teachers | None = None) -> JobResult:
        """Run the job to the end. If `teachers` are given, they are used and stay alive after the job.

        Raises a UserError if the job cannot work; this happens before it uses the cluster's GPUs. Raises a
        TrainingError if it failed later; the next `fit()` then resumes from the last committed checkpoint.
        """
        shown = self.spec.tracking.progress
        with progress_line(self.spec.name, None, "checking the data and the models", is_shown=shown) as self._update:
            views = self.check()
            # Only after check(), which refuses a folder that belongs to another job. A finished job needs no cluster.
            if (finished := self._finished()) is not None:
                return finished
            try:
                with on_sigterm(self.stop), self._lease() as self._permit:
                    if is_extended(self.run, self.spec):
                        extend(self.run, self.spec, views[0], self._permit)
                    # Once more: the driver that this one has waited for may have finished the job.
                    if (finished := self._finished()) is not None:
                        return finished
                    self._update(numbers=f"connecting to {self.spec.cluster.address or 'Ray'}")
                    with connected(self.spec):
                        return self._outliving_processes(views, teachers)
            except ClusterError:
                self._stop.check()  # it may be only why Ray did not start
                raise
            finally:
                self._stop.withdraw()

    def _lease(self) -> AbstractContextManager[Permit]:
        output = self.spec.output
        return held_lease(self.run, output.storage, self._stop, waits=output.if_running == "wait")

    def stop(self) -> None:
        """Ask a running `fit()` to save and end; it then raises Interrupted.

        Call it from another thread, or from a signal handler.
        """
        self._stop.make()

    def check(self) -> tuple[Plan, dict[str, Renderer]]:
        """Check all that can be checked without a cluster (data, models, output); return plan and renderers.

        Raises UserError.
        """
        check_trackers(self.spec)
        renderers = self.renderers()
        plan = self.plan(find_passes(self.spec.data))
        self._held_out = HeldOutData.of(self.spec, plan, renderers)
        self.origins = origins_of(plan, self._digests(renderers))
        # Before spec.json is written: if the user has removed it, a checkpoint still says which job this is.
        store = CheckpointStore(self.run, self.spec.output.storage)
        require_same_origins(store, self.run, self.spec, self.origins, plan)
        # Claimed after the checks, so that a spec which fails one of them leaves no folder.
        claim(self.run, self.spec)
        self._remove_unfinished()
        self._warn(plan)
        write_plan(self.run, self.spec.output.storage, plan)
        return plan, renderers

    def check_models(self) -> list[Finding]:
        """Check the models of the job on its cluster, and write nothing: a teacher as `fit()` does, and the student.

        `teacher.check: off` counts as the default here. Raises UserError and TeacherError if they cannot be asked.
        """
        shown = self.spec.tracking.progress
        with progress_line(self.spec.name, None, "checking the data and the models", is_shown=shown) as self._update:
            self.renderers()
            plan = self.plan(find_passes(self.spec.data))
            with on_sigterm(self.stop), connected(self.spec):
                return self._findings(plan)

    def _findings(self, plan: Plan) -> list[Finding]:
        spec, findings = self.spec, list[Finding]()
        if spec.teacher is not None:
            self._update(numbers="loading the teacher")
            with Teachers() as teachers, ExitStack() as actors:
                pool, *_ = self._start_teachers(teachers, actors, one=True)
                assert pool is not None
                self._update(numbers="checking the teacher's signal")
                settings = settings_of(spec) or CheckSpec()
                findings += ask_teacher(spec, settings, plan, pool, self._stop).findings
        # After the teacher has ended, because both may need the same GPU.
        self._update(numbers="checking the student's weights")
        return [*findings, *ask_student(spec, self._stop)]

    # --------------------------------------------------------------------------------------------- checks

    def renderers(self) -> dict[str, Renderer]:
        """Return the "student" renderer, and the "teacher" one if its output differs.

        Checks all that needs the models' configurations, or objects of the user's own. Raises ModelError or SpecError.
        """
        spec = self.spec
        check_deepspeed(spec)
        check_plugins(spec.objective)
        processor = student_processor(spec.student)
        check_adapters(spec.student)
        student = Renderer(processor, spec.data)
        if spec.teacher is None:
            return {"student": student}
        config = load_config(spec.teacher)
        check_options(spec.teacher, config)
        engine_of(spec.teacher)
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

    def _digests(self, renderers: dict[str, Renderer]) -> dict[str, str]:
        """Return the digests of the models, and of what each of them sees of a sample."""
        digests = {f"rendering of the {view}": renderer.fingerprint for view, renderer in renderers.items()}
        digests["student.init"] = student_digest(self.spec.student)
        if self.spec.teacher:
            digests["teacher"] = model_digest(self.spec.teacher)
        return digests

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

    def _remove_unfinished(self) -> None:
        filesystem, root = open_store(self.run, self.spec.output.storage)
        if isinstance(filesystem, LocalFileSystem):
            remove_unfinished(Path(root))

    def _warn(self, plan: Plan) -> None:
        for text in advice(self.spec, plan.samples):
            _LOG.warning("%s: %s", self.spec.name, text)
        weighting, steps = self.spec.objective.weighting, self.spec.training.steps(plan.samples)
        if isinstance(weighting, ManualWeighting) and weighting.weights == "auto" and steps <= weighting.auto_steps:
            _LOG.warning(
                "%s: objective.weighting.auto_steps = %d, and the job has %d steps: its weights stay 1",
                self.spec.name, weighting.auto_steps, steps,
            )  # fmt: skip

    def _finished(self) -> JobResult | None:
        found = stored(self.run, self.spec.output.storage, RESULT_FILE, partial(output_errors, self.run))
        return JobResult(**asdict(found)) if found and not is_extended(self.run, self.spec) else None

    # ------------------------------------------------------------------------------------------------ run

    def _outliving_processes(self, views: tuple[Plan, dict[str, Renderer]], teachers: Teachers | None) -> JobResult:
        """Run the job, and restart it from its last checkpoint if one of its control processes dies.

        Dead teachers and students are replaced while the job runs. The control processes (the pool, the monitor, Ray
        Train's controller) cannot be replaced.
        """
        store = CheckpointStore(self.run, self.spec.output.storage)
        deaths = 0
        while True:
            self._stop.check()
            begun_at = store.latest()
            self._say_where_it_begins(begun_at.step if begun_at else 0)
            try:
                with ExitStack() as actors:
                    return self._run(*views, teachers or actors.enter_context(Teachers()), actors)
            except RayActorError as error:
                # Counted since the last checkpoint: a job that makes progress may be restarted any number of times.
                deaths = 1 + (deaths if store.latest() == begun_at else 0)
                if deaths > self.spec.training.max_failures:
                    raise TrainingError(
                        f"{self.spec.name}: control processes of the job died {deaths} times without a new checkpoint "
                        "in between (the limit is training.max_failures). Run the job again to go on from the last "
                        f"checkpoint. The last error: {error}"
                    ) from error
                _LOG.warning(
                    "%s: restarts from its last checkpoint, because one of its control processes died: %s",
                    self.spec.name, error,
                )  # fmt: skip

    def _run(self, plan: Plan, renderers: dict[str, Renderer], teachers: Teachers, actors: ExitStack) -> JobResult:
        """Run the job once. `actors` ends the actors after it.

        Their handles alone would not end them: a handle in a reference cycle keeps its actor, and so its node, alive.
        """
        spec = self.spec
        self._say_who_waits()
        monitor = self._start_monitor(plan, actors)
        if spec.teacher:
            self._update(numbers=f"loading the teacher (processes: {spec.cluster.teacher.min})")
        pool, facts, needs = self._start_teachers(teachers, actors)
        if pool and settings_of(spec):
            self._update(numbers="checking the teacher's signal")
        checks = TeacherCheck(spec, plan, self._permit, self.origins, teachers)
        canary = checks.run(pool, monitor, self._stop) if pool else None
        views = {"student": renderers["student"], "teacher": renderers.get("teacher", renderers["student"])}
        cache = None
        if spec.teacher and facts:
            cache = SignalCache.of(spec.teacher, facts, views["teacher"].fingerprint, needs)
        config = WorkerConfig(
            spec=spec,
            permit=self._permit,
            plan=plan,
            monitor=monitor,
            image_token_id=views["student"].image_token_id,
            teacher_image_token_id=views["teacher"].image_token_id,
            pad_token_id=views["student"].pad_token_id,
            total_steps=spec.training.steps(plan.samples),
            pool=pool,
            facts=facts,
            needs=needs,
            cache=cache,
            canary=canary,
            origins=self.origins,
            held_out=ray.put(self._held_out) if self._held_out else None,
        )
        reader = Reader(
            plan,
            spec.data,
            renderers,
            report=partial(report, monitor),
            give_up=partial(give_up, monitor),
            locate=cache.locate if cache else None,
            pairs_images=any(isinstance(energy, VisualEnergy) for energy in spec.objective.energies),
        )
        outcome = train_students(config, ray.put(reader), self._stop, self._update)
        if STOPPED in outcome:
            raise Interrupted(_stopped_at(self.run, spec.name, outcome[STOPPED], config.total_steps))
        self._update(numbers="writing the result")
        return conclude(spec, self.run, self._permit, outcome, plan)

    def _say_where_it_begins(self, step: int) -> None:
        if not step:
            self._stop.message = f"{self.spec.name}: was asked to stop, and lost nothing: no step was done. {AGAIN}"
            return
        self._update(completed=step, line=f"goes on from its checkpoint of step {step}")
        self._stop.message = (
            f"{self.spec.name}: was asked to stop, and lost nothing: its last checkpoint, of step {step}, is in "
            f"{join(self.run, CHECKPOINTS)}. {AGAIN}"
        )

    def _say_who_waits(self) -> None:
        for demand, room in check_feasible(self.spec, self._stop.pause):
            if room < demand.count:
                _LOG.warning(
                    "%s: cluster.%s waits for nodes, up to cluster.start_timeout_s = %g: it asks for %s",
                    self.spec.name, demand.pool, self.spec.cluster.start_timeout_s, demand,
                )  # fmt: skip

    def _start_monitor(self, plan: Plan, actors: ExitStack) -> ActorHandle:
        store = CheckpointStore(self.run, self.spec.output.storage)
        resumed = store.newest_with(lambda last: store.quarantined(last, plan))
        quarantined = resumed[1] if resumed else []
        monitors = ray.remote(Monitor).options(num_cpus=0, scheduling_strategy=on_driver_node())
        monitor = cast(ActorHandle, monitors.remote(plan.samples, quarantined, self.spec.training.max_failures))
        actors.callback(ray.kill, monitor)
        return monitor

    def _start_teachers(
        self, teachers: Teachers, actors: ExitStack, *, one: bool = False
    ) -> tuple[ActorHandle | None, TeacherFacts | None, Needs]:
        """Return the teachers' pool once it is ready, its facts, and the parts that it sends.

        With `one`, the pool has a single teacher.
        """
        spec = self.spec
        if spec.teacher is None:
            return None, None, Needs()
        size = spec.cluster.teacher.model_copy(update={"min": 1, "max": 1}) if one else spec.cluster.teacher
        share = teachers.share(spec.teacher, self.needs(spec.teacher), size, gpus_each(size.gpus), spec.name)
        pool, needs = actors.enter_context(share)
        loaded = pool.wait_until_ready.remote(spec.cluster.start_timeout_s)
        self._stop.wait_until(lambda timeout_s: bool(ray.wait([loaded], timeout=timeout_s)[0]))
        facts = cast(TeacherFacts, unwrapped(loaded))
        return pool, facts, needs

    def needs(self, teacher: TeacherSpec) -> Needs:
        """Return what the job needs from the teacher. Raises ModelError."""
        configs = (load_config(teacher), student_config(self.spec.student))
        # Number of ids for which both models have a logit. A model may have more logits than its tokenizer has ids.
        vocab = min(config.get_text_config().vocab_size for config in configs)
        return Needs.of(teacher, self.spec.objective, vocab)


def _stopped_at(run: str, name: str, step: int, total_steps: int) -> str:
    if not step:
        return f"{name}: was asked to stop before its first step, so there was nothing to save. {AGAIN}"
    return (
        f"{name}: was asked to stop, and has saved its state at step {step} of {total_steps}, in "
        f"{join(run, CHECKPOINTS)}. Run it again to go on from there."
    )
