"""Supervised fine-tuning (no teacher): `python jobs/sft.py --spec SPEC`, alone or under `ray job submit`."""

from betakd_ray.cli import job, run_job

if __name__ == "__main__":
    job(run_job)
