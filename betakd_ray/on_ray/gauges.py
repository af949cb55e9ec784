"""Metrics of a running job for Prometheus. Ray's metrics agent on each node exports them with the prefix `ray_`.

The dashboard cluster/grafana/betakd.json shows them.
"""

from collections.abc import Mapping

from ray.util.metrics import Gauge

DESCRIPTIONS = {
    "betakd_step": "optimizer steps done",
    "betakd_samples_per_second": "samples that the students consume",
    "betakd_tokens_per_second": "answer tokens that the students learn from",
    "betakd_data_wait_ratio": "share of their time that the students wait for data",
    "betakd_teacher_wait_ratio": "share of their time that the students wait for teachers",
    "betakd_teacher_busy_ratio": "teachers at work, on average",
    "betakd_queue_depth": "groups of samples with the teachers",
    "betakd_teachers_wanted": "teachers that the pool asks the cluster for",
    "betakd_teachers_alive": "teachers that are loaded",
    "betakd_teachers_restarted": "teachers that were replaced",
    "betakd_beta": "mean weight, by channel",
    "betakd_loss": "mean energy, by channel; channel `total` is the objective",
    "betakd_quarantined_samples": "samples that take no part in training",
    "betakd_skipped_steps": "steps whose gradient was not finite",
    "betakd_checkpoint_age_seconds": "time since the newest committed checkpoint",
    "betakd_checkpoint_duration_seconds": "time to write the newest checkpoint",
}
NAMES = frozenset(DESCRIPTIONS)
BY_CHANNEL = frozenset({"betakd_beta", "betakd_loss"})


class Gauges:
    """Prometheus gauges of this process, labelled with the job's name."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float | int]) -> None:
        """Set metrics to values; the name `betakd_beta/fkl` means the metric `betakd_beta` of the channel `fkl`."""
        for key, value in values.items():
            name, _, channel = key.partition("/")
            tags = {"job": self._job} | ({"channel": channel} if name in BY_CHANNEL else {})
            self._gauge(name).set(value, tags)

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            keys = ("job", "channel") if name in BY_CHANNEL else ("job",)
            self._gauges[name] = Gauge(name, DESCRIPTIONS[name], keys)
        return self._gauges[name]
