"""The configuration of DeepSpeed."""

from typing import Any

from betakd_ray.spec import JobSpec


def deepspeed_config(spec: JobSpec, workers: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration; `training.deepspeed` is merged last, for what the spec does not name.

    Gradients are summed over micro-batches and reduced over ranks in float32, in every precision and ZeRO stage. In
    bfloat16 a sum stops growing when a term is below 1/256 of it. (In deepspeed 0.19.8, bf16 at stage 1 is
    BF16_Optimizer; stages 2 and 3 sum their part of each micro-batch in a float32 partition.)

    The batch sizes are nominal, because the number of micro-batches may change with every step. One step of a rank is

        for number, batch in enumerate(micro_batches, start=1):
            engine.set_gradient_accumulation_boundary(number == len(micro_batches))   # before the forward
            loss = engine(batch)
            engine.backward(loss, scale_wrt_gas=False)
        engine.step()                                                                 # once

    DeepSpeed then averages over ranks, and divides by nothing else. So a loss that is a share of the global mean must
    be multiplied by the number of ranks. Every rank must run the same number of micro-batches, and each micro-batch
    must give every trained parameter a gradient (it may be zero). Otherwise the collectives do not match: stages 2 and
    3 reduce with each micro-batch, stage 1 with the last one. And stage 3 adds to the sum of the previous step if a
    parameter has no gradient in a step's first micro-batch.
    """
    training = spec.training
    config = {
        # DeepSpeed checks that the product is right. With one nominal accumulation step it divides no gradient.
        "train_batch_size": workers,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if is_plain(spec) else spec.optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        # Immediate: each gradient is added to the float32 sum at once. Otherwise a second gradient in bfloat16 would
        # stay in memory beside the sum (stage 1).
        "bf16": {"enabled": training.precision == "bf16", "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # DeepSpeed's throughput timer would wait for the device twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": _zero(training.zero_stage, workers),
    }
    return _merge(config, training.deepspeed)


def _zero(stage: int, workers: int) -> dict[str, Any]:
    options: dict[str, Any] = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    if stage in (1, 2):
        # With one worker there is nothing to overlap, and it would only cost a second bucket and a wait after each
        # backward. (Stage 3 has it on.)
        options["overlap_comm"] = workers > 1
    if stage == 2:
        # reduce_scatter would divide a bucket by the number of ranks while it is still bfloat16. It saves no traffic:
        # DeepSpeed reduces to all ranks in both cases (use_multi_rank_bucket_allreduce).
        options["reduce_scatter"] = False
    return options


def _merge(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: _merge(base[key], value)
        for key, value in other.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **other, **nested}


def is_plain(spec: JobSpec) -> bool:
    """Return whether DeepSpeed uses our optimizer without a wrapper (stage 0, where the spec refuses bf16)."""
    return spec.training.zero_stage == 0
