"""`make distill`: pack easy-VQA, train a student with and without the teacher, evaluate all three, print one table."""

from pathlib import Path

from betakd_ray.cli import explained, print_scores
from betakd_ray.data.pack import easy_vqa_samples, pack
from betakd_ray.evaluation.run import Evaluation
from betakd_ray.job import BetaKDJob, cluster
from betakd_ray.spec import EvaluationSpec, JobSpec, load_spec, parse_spec

HERE = Path(__file__).parent
SHARDS = Path("runs/easy-vqa/shards")
QUESTIONS = 6000
WRONG_ANSWERS = 0.5
TEST_QUESTIONS = 3000


def main() -> None:
    """From nothing to the table; what an earlier run finished is not done again."""
    if not (SHARDS / "manifest.jsonl").exists():
        pack(easy_vqa_samples("train", limit=QUESTIONS, wrong_answers=WRONG_ANSWERS), str(SHARDS), total=QUESTIONS)
        pack(easy_vqa_samples("test", limit=TEST_QUESTIONS), str(SHARDS), prefix="test", total=TEST_QUESTIONS)
    distilled = load_spec(HERE / "distill.yaml")
    with cluster(distilled):
        results = {"CE only": BetaKDJob(without_teacher(distilled)).fit(), "distilled": BetaKDJob(distilled).fit()}
        models = {"teacher": str(HERE / "teacher")} | {label: result.model for label, result in results.items()}
        scores = Evaluation(evaluation(models)).run()
    print_scores(scores)
    print("Everything lies under runs/easy-vqa: shards, each run's metrics and checkpoints, and the models:")
    for label, folder in models.items():
        print(f"  {label:10} {folder}")


def without_teacher(spec: JobSpec) -> JobSpec:
    """The same student, data and steps, from the answers alone."""
    tree = spec.model_dump(exclude={"teacher"}) | {"name": "easy-vqa-ce", "objective": {"weighting": "equal"}}
    return parse_spec(tree)


def evaluation(models: dict[str, str]) -> EvaluationSpec:
    """The package's own test questions, whose answers are right."""
    return parse_spec(
        {
            "name": "evaluation",
            "models": {label: {"path": path} for label, path in models.items()},
            "data": {"train": str(SHARDS / "test-*.tar"), "system_prompt": ""},
            "agreement_with": "teacher",
            "max_new_tokens": 3,
            "batch_size": 250,
            "output": "runs/easy-vqa",
        },
        EvaluationSpec,
    )


if __name__ == "__main__":
    with explained():
        main()
