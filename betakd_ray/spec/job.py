"""A job: its sections, and the checks that need more than one of them."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from betakd_ray.spec.base import NAME_PATTERN, Count, Location, Place, Short, Spec, as_tuple
from betakd_ray.spec.cluster import ClusterSpec
from betakd_ray.spec.data import DataSpec
from betakd_ray.spec.energies import ProbabilitiesEnergy, VisualEnergy
from betakd_ray.spec.models import ModelSpec, StudentSpec, TeacherSpec, TopKSignal
from betakd_ray.spec.objective import InstanceWeighting, ObjectiveSpec
from betakd_ray.spec.training import OptimizerSpec, TrainingSpec


class OutputSpec(Place):
    """Folder for everything that a run writes, which goes to `path`/`name`."""

    path: Location = "runs"
    if_running: Literal["end", "wait"] = Field(
        default="end", description="what to do if another driver works on this run: end with an error, or wait for it"
    )


class TrackingSpec(Spec):
    """Places for the metrics, in addition to the run's own metrics.jsonl."""

    progress: bool = Field(
        default=True,
        description="a bar with ETA on the driver's terminal; a line every training.log_every steps without one",
    )
    trackers: Annotated[
        tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...], BeforeValidator(as_tuple), Short()
    ] = Field(default=(), description="their servers and keys come from the environment (docs/tracking.md)")
    project: str = Field(default="betakd", min_length=1, description="W&B's and trackio's project, MLflow's experiment")
    group: str | None = Field(default=None, description="runs that belong together")
    name: str | None = Field(default=None, description="name of the run there; default: the job's")
    unreachable: Literal["error", "offline"] = Field(
        default="error",
        description="what a job does at its start if a tracker's server does not answer: end with an error, or let the "
        "tracker write to the run's folder. Later a tracker's failure is a warning",
    )


Name = Annotated[str, Field(pattern=NAME_PATTERN, description="letters, digits, . _ -")]


class HeldOutSpec(Spec):
    """Evaluation of the student while it trains, on samples that it does not train on."""

    data: Annotated[tuple[Location, ...], BeforeValidator(as_tuple), Field(min_length=1)] = Field(
        description="shards, as in data.train; the other fields of the data section apply to them too"
    )
    every: Count = Field(default=500, description="steps between two evaluations; the last step is evaluated too")
    samples: Count = Field(
        default=512, description="use only this number of first samples; they are kept in the workers' memory"
    )


class JobSpec(Spec):
    """One distillation job, or plain supervised fine-tuning if there is no `teacher`."""

    name: Name
    data: DataSpec
    student: StudentSpec
    teacher: TeacherSpec | None = None
    objective: ObjectiveSpec = ObjectiveSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    training: TrainingSpec = TrainingSpec()
    evaluation: HeldOutSpec | None = Field(
        default=None, description="loss, energies and agreement on held-out samples, in the metrics under eval/"
    )
    cluster: ClusterSpec = ClusterSpec()
    # A factory: the default path is made absolute when a spec is made, and not at the import of this module.
    output: OutputSpec = Field(default_factory=OutputSpec)
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="after")
    def _teacher_has_work(self) -> "JobSpec":
        if self.teacher is None and self.objective.energies:
            raise ValueError(
                f"objective.energies is {list(self.objective.channels)}, but there is no teacher: add a teacher, or "
                "remove the energies"
            )
        weighting = self.objective.weighting
        if self.teacher is None and isinstance(weighting, InstanceWeighting) and weighting.weight_ce:
            raise ValueError(
                "objective.weighting: instance predicts β from a teacher's features, but there is no teacher: use task"
            )
        if self.teacher is not None and isinstance(self.teacher.signal, TopKSignal):
            self._check_top_k()
        if self.objective.reads_attention:
            self._check_attention()
        if self.teacher is not None and self.training.workers.is_elastic:
            self._check_elastic()
        if self.teacher is not None and not self.objective.energies:
            raise ValueError(
                "teacher is given, but objective.energies is empty: add an energy, e.g. energies: [cosine_probs]"
            )
        return self

    def _check_elastic(self) -> None:
        # Ray Train counts how many workers fit by resources. It ignores labels, and does not know that the teachers
        # need some of the same resources.
        if not self.cluster.student.resources:
            raise ValueError(
                "cluster.student.resources: with training.workers of {min, max}, name a resource that only the "
                "students' nodes have, e.g. {student_slot: 1}. Otherwise Ray counts the teachers' nodes as room for "
                "students"
            )

    def _check_attention(self) -> None:
        if self.training.gradient_checkpointing:
            raise ValueError(
                "training.gradient_checkpointing: align_attention and align_topk read the first layer's attention, "
                "which gradient checkpointing does not keep: turn it off, or remove these energies"
            )
        named = {"teacher": self.teacher, "student.init": self.student.init}
        for field, model in named.items():
            if isinstance(model, ModelSpec) and model.attn_implementation not in (None, "eager"):
                raise ValueError(
                    f"{field}.attn_implementation: {model.attn_implementation} returns no attention weights, but "
                    "align_attention and align_topk read them: leave this field out"
                )

    def _check_top_k(self) -> None:
        for energy in self.objective.energies:
            if isinstance(energy, VisualEnergy):
                continue
            if not isinstance(energy, ProbabilitiesEnergy):
                raise ValueError(
                    f"teacher.signal: {energy.name} needs all logits, but top_k has only some: use signal: hidden"
                )
            if energy.teacher_temperature != 1 or energy.student_temperature != 1:
                raise ValueError(
                    f"teacher.signal: top_k has probabilities at temperature 1, but {energy.name} has another "
                    "temperature: use signal: hidden"
                )
