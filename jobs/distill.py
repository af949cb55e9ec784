"""Distil a student from a teacher: `python jobs/distill.py --spec SPEC`, alone or under `ray job submit`."""

from betakd_ray.cli import job, run_job

if __name__ == "__main__":
    job(run_job)
