"""Forecast of what a job will need, without a cluster: `betakd plan`."""
