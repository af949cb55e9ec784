"""The command line: parse, call, print. One module for the commands on each kind of thing."""

from betakd_ray.cli import ask, push
from betakd_ray.cli.app import Overrides, app, exit_codes, job, main
from betakd_ray.cli.console import print_result, print_table
from betakd_ray.cli.data import run_pack
from betakd_ray.cli.distill import run_job
from betakd_ray.cli.evaluate import run_evaluation
from betakd_ray.cli.init import init, schema
from betakd_ray.cli.jobs import run_sweep
from betakd_ray.cli.models import convert
from betakd_ray.cli.runs import audit
from betakd_ray.cli.score import run_score

__all__ = [
    "Overrides",
    "app",
    "ask",
    "audit",
    "convert",
    "exit_codes",
    "init",
    "job",
    "main",
    "print_result",
    "print_table",
    "push",
    "run_evaluation",
    "run_job",
    "run_pack",
    "run_score",
    "run_sweep",
    "schema",
]
