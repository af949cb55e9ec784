"""Supervised fine-tuning (a spec without a teacher): teachers and baselines by the same loop: `python jobs/sft.py --spec SPEC [--set section.field=value]`, alone or under `ray job submit`."""

from betakd_ray.cli import job, run_job

if __name__ == "__main__":
    job(run_job)
