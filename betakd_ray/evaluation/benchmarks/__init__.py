"""Public benchmarks, one file each: questions to prompts, answers to scores. Add one by adding a file."""
