"""The sections `optimizer` and `training`: learning rates, batches, precision, checkpoints."""

from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator

from betakd_ray.errors import shortened
from betakd_ray.spec.base import (
    Count,
    CountOrZero,
    Decay,
    Fraction,
    FreeForm,
    LearningRate,
    Positive,
    Seconds,
    Seed,
    Spec,
)


class OptimizerSpec(Spec):
    """AdamW with separate learning rates for the projector, for β, and for everything else."""

    lr: LearningRate = 4e-5
    projector_lr: LearningRate | None = Field(default=None, description="default: lr; the recipe's stage 1 has 1e-3")
    beta_lr: LearningRate = Field(
        default=1e-3, description="for β's parameters and ctkd's θ, in float32, without weight decay"
    )
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.03
    max_grad_norm: Positive = 1.0


class WorkersSpec(Spec):
    """Number of student processes, or {min, max} for as many as the cluster has room for.

    With {min, max}, the job resumes automatically with another number.
    """

    min: Count = 1
    max: Count

    @property
    def is_elastic(self) -> bool:
        return self.min < self.max

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(core), {"type": "integer", "minimum": 1}]}

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int | str) else value

    @model_validator(mode="after")
    def _ordered(self) -> "WorkersSpec":
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}; raise max or lower min")
        return self


DEFAULT_MICRO_BATCH = 8
"""Default limit of a micro-batch, in samples."""


class TrainingSpec(Spec):
    """Settings of steps, batches, precision and checkpoints."""

    # Limited, because the ledger and the audit have a number for each epoch and shard.
    epochs: int = Field(default=1, ge=1, le=100_000)
    max_steps: Count | None = Field(default=None, description="stop early; default: all epochs")
    global_batch_size: Count = Field(default=128, description="samples per step, of all workers together")
    micro_batch_size: Count | None = Field(
        default=None,
        description="samples that a worker trains on at a time; default: 8, or no limit with micro_batch_tokens",
    )
    micro_batch_tokens: Count | None = Field(
        default=None,
        description="largest number of tokens that a worker trains on at a time, padding and image tokens included; "
        "samples of similar length are grouped up to it",
    )
    workers: WorkersSpec = WorkersSpec(max=1)
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    deepspeed: FreeForm = Field(default_factory=dict, description="merged last into the DeepSpeed config")
    seed: Seed = 0
    checkpoint_every: Count = Field(default=500, description="steps")
    keep: Count = Field(default=2, description="checkpoints kept")
    log_every: Count = Field(default=10, description="steps")
    max_skipped_steps: Count = Field(
        default=5, description="number of non-finite steps in a row after which the job stops"
    )
    max_failures: CountOrZero = Field(
        default=3,
        description="largest number of restarts in a row without a new checkpoint in between: restarts of the student "
        "workers, and restarts of the job after one of its control processes died",
    )
    collective_timeout_s: Seconds = Field(default=600.0, description="a rank that is silent for longer counts as dead")

    def steps(self, samples: int) -> int:
        """Return the optimizer steps of a job that reads `samples` samples over all its epochs."""
        steps = samples // self.global_batch_size
        return min(steps, self.max_steps or steps)

    @property
    def micro_batch_samples(self) -> int | None:
        """Return the limit of a micro-batch in samples; None if only tokens limit it."""
        return self.micro_batch_size or (None if self.micro_batch_tokens else DEFAULT_MICRO_BATCH)

    def share(self, workers: int) -> int:
        """Return the largest number of samples of a step that one of `workers` workers gets."""
        return -(-self.global_batch_size // workers)

    def samples_at_a_time(self, workers: int, tokens: float) -> int:
        """Return the largest number of samples in a micro-batch if each sample has `tokens` tokens."""
        by_tokens = max(1, int(self.micro_batch_tokens / tokens)) if self.micro_batch_tokens else self.share(workers)
        return min(by_tokens, self.micro_batch_samples or by_tokens, self.share(workers))

    def accumulation(self, workers: int, tokens: float) -> int:
        """Return the number of micro-batches per step and worker if each sample has `tokens` tokens."""
        return -(-self.share(workers) // self.samples_at_a_time(workers, tokens))

    @model_validator(mode="after")
    def _owns(self) -> "TrainingSpec":
        taken = {
            "train_batch_size": "global_batch_size",
            "train_micro_batch_size_per_gpu": "micro_batch_size and micro_batch_tokens",
            "gradient_accumulation_steps": "micro_batch_size, micro_batch_tokens and workers",
            "gradient_clipping": "optimizer.max_grad_norm",
            "bf16": "precision",
            "fp16": "precision",
            "data_types": "this package (gradients are summed in float32)",
            "communication_data_type": "this package (gradients are summed in float32)",
            "optimizer": "the optimizer section",
            "scheduler": "the optimizer section",
        }
        for key in self.deepspeed:
            if key in taken:
                raise ValueError(f"deepspeed.{key}: is set by {taken[key]}; leave it out")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"deepspeed.zero_optimization: is {shortened(zero)}, not a mapping")
        if "stage" in zero:
            raise ValueError("deepspeed.zero_optimization.stage: is set by zero_stage; leave it out")
        return self

    @model_validator(mode="after")
    def _has_work_for_all(self) -> "TrainingSpec":
        if self.global_batch_size < self.workers.max:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is less than one sample for each of up to "
                f"{self.workers.max} workers: raise it, or lower workers"
            )
        return self

    @model_validator(mode="after")
    def _keeps_float32_copies(self) -> "TrainingSpec":
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage is 0 and precision is bf16: with both, DeepSpeed sums gradients in bfloat16. Set "
                "zero_stage to 1 (with one worker it takes no more memory), or set precision to fp32"
            )
        return self
