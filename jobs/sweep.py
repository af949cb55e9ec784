"""Run a grid of jobs and print its table: `python jobs/sweep.py --spec SPEC`, alone or under `ray job submit`."""

from betakd_ray.cli import job, run_sweep

if __name__ == "__main__":
    job(run_sweep)
