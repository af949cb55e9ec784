"""What the driver shows of the training: phases, steps, checkpoints, warnings."""

import logging

from betakd_ray.on_ray.monitor import Report
from betakd_ray.progress import Update
from betakd_ray.run.pace import Pace, bar_text, progress_text

_LOG = logging.getLogger(__name__)


class TrainingView:
    """View of one training, which is told the monitor's reports."""

    def __init__(self, total_steps: int, update: Update) -> None:
        self._total_steps, self._update = total_steps, update
        self._pace = Pace()
        self._has_begun = self._is_stopping = False
        update(total=total_steps, numbers="starting the student workers")

    def show(self, report: Report) -> None:
        """Show what is new in a report."""
        for warning in report.warnings:
            _LOG.warning(warning)
        self._show_phase(report)
        for record in report.records:
            self._pace.note(record)
            text = progress_text(record, self._total_steps, self._pace)
            numbers = {} if self._is_stopping else {"numbers": bar_text(record)}
            self._update(completed=record["step"], line=text, **numbers)
        if report.committed is not None:
            self._update(line=f"checkpoint at step {report.committed}")

    def stopping(self) -> None:
        """Say, once, that the workers were asked to save and end."""
        if not self._is_stopping:
            self._update(numbers="was asked to stop: it saves. Ctrl-C once more ends it at once")
        self._is_stopping = True

    def _show_phase(self, report: Report) -> None:
        if report.has_begun == self._has_begun or self._is_stopping:
            return
        self._has_begun = report.has_begun
        if not report.has_begun:
            self._update(numbers="the student workers have ended, and start again from the last checkpoint")
        elif not report.records:
            self._update(numbers="the student workers load the model, and wait for the first samples")
