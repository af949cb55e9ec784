"""The section `cluster`: what each process of a job needs of its node."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from betakd_ray.spec.base import LARGEST_COUNT, NAME_PATTERN, Count, CountOrZero, Seconds, Spec, Url


class PoolSpec(Spec):
    """Resources that one process of a pool needs on its node."""

    gpus: Annotated[float, Field(ge=0, le=1024)] | Literal["auto"] = Field(
        default="auto", description="GPUs per process; auto: 1 if the cluster has any GPU, otherwise 0"
    )
    cpus: float = Field(default=1.0, ge=0, le=100_000)
    labels: dict[str, str] = Field(default_factory=dict, description="node labels, e.g. betakd.io/pool: student")
    resources: dict[str, Annotated[float, Field(ge=0, le=LARGEST_COUNT)]] = Field(
        default_factory=dict, description="custom resources, e.g. student_slot: 1"
    )


AcceleratorType = Annotated[str, Field(pattern=NAME_PATTERN)]


class GPUPoolSpec(PoolSpec):
    """Resources that one process with a model (teacher or student) needs on its node."""

    # Not checked against Ray's list: a node reports the name of any GPU that it finds, and an operator may give a name
    # of its own, such as "A100-40G".
    accelerator_type: AcceleratorType | None = Field(
        default=None, description="model of the GPU as Ray calls it (ray.util.accelerators), e.g. H100, L40S, A100-80G"
    )
    spares: bool = Field(
        default=True,
        description="keep a process in reserve on the node for each process at work, which has imported all packages: "
        "a restart then takes some seconds less. A reserve takes about 0.4 GB of memory and no GPU",
    )

    @model_validator(mode="after")
    def _has_gpus(self) -> "GPUPoolSpec":
        if self.accelerator_type and self.gpus == 0:
            raise ValueError(
                f"accelerator_type is {self.accelerator_type}, but gpus is 0: ask for a GPU, or leave the type out"
            )
        return self


class TeacherPoolSpec(GPUPoolSpec):
    """The teacher's actors, which keep running when the students restart."""

    min: Count = 1
    max: Count | None = Field(default=None, description="default: min")
    max_restarts: CountOrZero = Field(
        default=3,
        description="how many teachers may die in a row, without an answer from any of them; it is multiplied by `max`",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "TeacherPoolSpec":
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}; raise max or lower min")
        return self


class ClusterSpec(Spec):
    """The cluster, and the resources of each kind of process."""

    address: Url | None = Field(
        default=None, description="a running cluster; default: the one in RAY_ADDRESS, otherwise a new local one"
    )
    teacher: TeacherPoolSpec = TeacherPoolSpec()
    student: GPUPoolSpec = GPUPoolSpec()
    readers: PoolSpec = Field(default=PoolSpec(gpus=0, cpus=1.0), description="tasks that read and decode shards")
    start_timeout_s: Seconds = Field(default=600.0, description="longest wait for nodes and for models to load")
