"""The description of a job: one frozen tree of pydantic models.

It is read from YAML and stored as JSON. Every default is the paper's (Beta-KD §4.1 and its released recipe). An unknown
field is an error. This package imports neither torch nor ray, so a spec is checked in milliseconds, before the job uses
a cluster. A spec must not hold secrets: storage credentials come from the environment.
"""

from betakd_ray.spec.base import StorageSpec
from betakd_ray.spec.cluster import (
    ClusterSpec,
    GPUPoolSpec,
    PoolSpec,
    TeacherPoolSpec,
)
from betakd_ray.spec.data import DataSpec
from betakd_ray.spec.energies import (
    VISUAL_ENERGIES,
    AlignTopK,
    AnyEnergy,
    CosineProbs,
    CurriculumTemperature,
    Energy,
    FeatureDistance,
    ForwardKL,
    InterpolationSchedule,
    LogitsEnergy,
    PluginEnergy,
    TemperatureSchedule,
    TemporallyAdaptiveInterpolation,
    VisualEnergy,
)
from betakd_ray.spec.job import HeldOutSpec, JobSpec, OutputSpec
from betakd_ray.spec.loading import (
    load_spec,
    parse_spec,
    read_tree,
    set_field,
)
from betakd_ray.spec.models import (
    CacheSpec,
    CheckpointInit,
    CheckSpec,
    ConfigInit,
    LoraSpec,
    ModelSpec,
    Part,
    PartsInit,
    StudentSpec,
    TeacherSpec,
    TopKSignal,
)
from betakd_ray.spec.objective import (
    LARGEST_LOG_BOUND,
    Feature,
    InstanceWeighting,
    LearnedWeighting,
    ManualWeighting,
    ObjectiveSpec,
    TaskWeighting,
    Weighting,
    check_weighting,
)
from betakd_ray.spec.tasks import (
    BenchmarksSpec,
    EvaluationSpec,
    PackSpec,
    QuestionsSpec,
    SweepSpec,
)
from betakd_ray.spec.training import OptimizerSpec

__all__ = [
    "LARGEST_LOG_BOUND",
    "VISUAL_ENERGIES",
    "AlignTopK",
    "AnyEnergy",
    "BenchmarksSpec",
    "CacheSpec",
    "CheckSpec",
    "CheckpointInit",
    "ClusterSpec",
    "ConfigInit",
    "CosineProbs",
    "CurriculumTemperature",
    "DataSpec",
    "Energy",
    "EvaluationSpec",
    "Feature",
    "FeatureDistance",
    "ForwardKL",
    "GPUPoolSpec",
    "HeldOutSpec",
    "InstanceWeighting",
    "InterpolationSchedule",
    "JobSpec",
    "LearnedWeighting",
    "LogitsEnergy",
    "LoraSpec",
    "ManualWeighting",
    "ModelSpec",
    "ObjectiveSpec",
    "OptimizerSpec",
    "OutputSpec",
    "PackSpec",
    "Part",
    "PartsInit",
    "PluginEnergy",
    "PoolSpec",
    "QuestionsSpec",
    "StorageSpec",
    "StudentSpec",
    "SweepSpec",
    "TaskWeighting",
    "TeacherPoolSpec",
    "TeacherSpec",
    "TemperatureSchedule",
    "TemporallyAdaptiveInterpolation",
    "TopKSignal",
    "VisualEnergy",
    "Weighting",
    "check_weighting",
    "load_spec",
    "parse_spec",
    "read_tree",
    "set_field",
]
