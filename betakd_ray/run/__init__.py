"""The files of a run: names, checkpoints, metrics, audit."""
