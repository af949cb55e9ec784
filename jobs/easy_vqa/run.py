"""`make distill`: pack easy-VQA, train a student with and without the teacher, evaluate all three, print one table."""

from pathlib import Path

from betakd_ray.cli import exit_codes, print_result
from betakd_ray.evaluation.run import Evaluation
from betakd_ray.job import BetaKDJob
from betakd_ray.on_ray.cluster import connected
from betakd_ray.spec import JobSpec, load_spec, parse_spec
from jobs.easy_vqa.data import evaluation, pack_once

HERE = Path(__file__).parent


def main() -> None:
    """Do all steps up to the table. Steps that an earlier run finished are skipped."""
    pack_once("noisy", "test")
    distilled = load_spec(HERE / "distill.yaml")
    with connected(distilled):
        alone = without_teacher(distilled, "easy-vqa-ce")
        results = {"CE only": BetaKDJob(alone).fit(), "distilled": BetaKDJob(distilled).fit()}
        models = {"teacher": str(HERE / "teacher")} | {label: result.model for label, result in results.items()}
        scored = Evaluation(evaluation(models, output="runs/easy-vqa")).result()
    print_result(scored)
    print("Everything lies under runs/easy-vqa: shards, each run's metrics and checkpoints, and the models:")
    for label, folder in models.items():
        print(f"  {label:10} {folder}")


def without_teacher(spec: JobSpec, name: str) -> JobSpec:
    """Return the same job without a teacher: same student, data and steps, trained on the answers alone."""
    tree = spec.model_dump(exclude={"teacher"}) | {"name": name, "objective": {"weighting": "equal"}}
    return parse_spec(tree)


if __name__ == "__main__":
    with exit_codes():
        main()
