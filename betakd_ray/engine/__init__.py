"""The parts that reach into DeepSpeed and torch.distributed."""
