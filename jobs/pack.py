"""Pack a LLaVA-style data set into shards: `python jobs/pack.py --spec SPEC`, alone or under `ray job submit`."""

from betakd_ray.cli import job, run_pack

if __name__ == "__main__":
    job(run_pack)
