"""Evaluate models on a packed question set: `python jobs/evaluate.py --spec SPEC`, alone or under `ray job submit`."""

from betakd_ray.cli import job, run_evaluation

if __name__ == "__main__":
    job(run_evaluation)
