"""The real engine, without Ray: one global batch is one step, however it falls on ranks and micro-batches."""

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import AutoModelForImageTextToText

from betakd_ray.batch.packing import stack
from betakd_ray.batch.sample import Rendering, Sample
from betakd_ray.data.render import Renderer
from betakd_ray.energies import energy
from betakd_ray.models.load import load_processor
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.lease import Permit
from betakd_ray.spec import ModelSpec, StorageSpec, TemperatureSchedule, parse_spec
from betakd_ray.teacher.parts import Needs, Signal
from betakd_ray.teacher.scorer import TeacherScorer
from betakd_ray.train import checkpoint
from betakd_ray.train.export import export_student
from betakd_ray.train.learner import Learner
from betakd_ray.train.micro_batches import Collator
from tests.checkpoints import save
from tests.learning import Part, collator_of, on_this_machine, sample_of, spawned
from tests.tiny import VOCAB, raw_sample, save_tiny

pytestmark = pytest.mark.timeout(900)  # one fixture runs every engine
BATCH, STEPS = 12, 3
FD = {
    "sample": {"kind": "fd", "layer": {"teacher": 2, "student": 1}},
    "token": "fd",  # at the projectors: by the way, in the cases of the other reduction
}
VISUAL = [
    "relation",
    "align_attention",
    {"kind": "align_topk", "tokens": 2},
]
# One of four samples has an image: some micro-batches have none, on some ranks.
IMAGES = [True, False, False, False] * 3


@dataclass(frozen=True)
class Case:
    """Split of one global batch, and settings of the engine that trains on it."""

    micro: int
    zero: int = 2
    precision: str = "fp32"
    weighting: str = "instance"
    reduction: str = "sample"


REFERENCE = Case(micro=12, zero=0)
ALONE = [REFERENCE, Case(micro=4), Case(micro=2), Case(micro=2, zero=0), Case(micro=4, zero=3)]
TOKENS = [Case(micro=12, reduction="token", weighting="task"), Case(micro=2, reduction="token", weighting="task")]
BF16 = [Case(micro=4, precision="bf16"), Case(micro=2, precision="bf16", zero=3)]
PAIR = [Case(micro=3, zero=0), Case(micro=1, zero=1), Case(micro=2), Case(micro=1), Case(micro=1, zero=3), TOKENS[1]]
QUARTET = [Case(micro=3), Case(micro=1, zero=0)]
RESIZED = {
    1: {Case(micro=4, zero=zero): Case(micro=1, zero=zero) for zero in (1, 2, 3)} | {Case(micro=4, zero=0): PAIR[0]},
    2: {Case(micro=1): Case(micro=2), Case(micro=1, zero=3): Case(micro=4, zero=3)},
    3: {Case(micro=2, zero=zero): Case(micro=1, zero=zero) for zero in (2, 3)} | {Case(micro=4, zero=0): PAIR[0]},
    4: {},
}
"""Ranks → a case that goes on, and that of another number of ranks whose checkpoint it goes on from."""
RANKS_BEFORE = {1: 2, 2: 1, 3: 2}


@dataclass(frozen=True)
class Step:
    """Inputs and results of a step, gathered from all ranks."""

    loss: float
    energies: torch.Tensor
    gradients: dict[str, torch.Tensor]
    norm: float
    """Norm of the student's gradient before clipping."""
    moving: dict[str, float]
    """ctkd's temperature and taid's t after the step."""


def _spec(folder: Path, case: Case, ranks: int) -> Any:
    return parse_spec(
        {
            "name": "learner",
            "data": {"train": "unused.tar"},
            "teacher": {"path": str(folder / "teacher")},
            "student": {"init": {"kind": "checkpoint", "path": str(folder / "student")}},
            "objective": {
                "energies": ["fkl", "cosine_probs", "ctkd", "taid", FD[case.reduction], *VISUAL],
                "weighting": case.weighting,
                "reduction": case.reduction,
            },
            "optimizer": {"lr": 1e-2, "beta_lr": 1e-2, "warmup_fraction": 0.0},
            "training": {
                "global_batch_size": BATCH,
                "micro_batch_size": case.micro,
                "workers": ranks,
                "zero_stage": case.zero,
                "precision": case.precision,
            },
        }
    )


def _name(ranks: int, case: Case) -> str:
    return f"{ranks}-{case.micro}-{case.zero}-{case.reduction}-{case.precision}"


def _renderings(folder: Path, spec: Any) -> tuple[Renderer, list[Rendering]]:
    renderer = Renderer(load_processor(ModelSpec(path=str(folder / "student"))), spec.data)
    answers = [f"It is {'a long ' * (number % 3)}{number}." for number in range(BATCH)]
    samples = (
        raw_sample(number, answer, has_image=has_image)
        for number, (answer, has_image) in enumerate(zip(answers, IMAGES, strict=True))
    )
    return renderer, [renderer.render(sample) for sample in samples]


@dataclass(frozen=True)
class Taught:
    """A learner and the one global batch with its signals."""

    learner: Learner
    collator: Collator
    samples: list[tuple[Sample, Signal]]

    @classmethod
    def of(cls, folder: Path, spec: Any) -> "Taught":
        renderer, renderings = _renderings(folder, spec)
        needs = Needs.of(spec.teacher, spec.objective, VOCAB)
        teacher = TeacherScorer(spec.teacher, needs)
        learner = Learner(spec, teacher.facts(), 10, teacher.head())
        answer = teacher.score(stack(renderings, renderer.pad_token_id, renderer.image_token_id))
        signals = [signal for signal in answer.signals() if signal is not None]
        samples = [sample_of(number, rendering) for number, rendering in enumerate(renderings)]
        collator = collator_of(spec, renderer, needs, teacher.facts())
        return cls(learner, collator, list(zip(samples, signals, strict=True)))

    def part(self) -> Part:
        """Return this rank's part of the global batch. It is a collective call."""
        return Part.of(self.learner, self.collator, self.samples)


def _recorded(learner: Learner) -> dict[str, torch.Tensor]:
    """Record the full gradients that the optimizers use, just before each step."""
    from deepspeed.utils import safe_get_full_grad

    gradients: dict[str, torch.Tensor] = {}
    engine_step = learner.engine.step

    def step() -> None:
        for name, parameter in learner.distiller.named_parameters():
            if parameter.requires_grad:
                gradient = safe_get_full_grad(parameter)
                gradients[name] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
        engine_step()

    learner.engine.step = step
    assert learner.beta_optimizer
    beta_step = learner.beta_optimizer.step

    def step_beta(applied: bool) -> None:
        outside = (*learner.weighting.named_parameters(), *learner.curriculum.named_parameters())
        for name, parameter in outside:
            if parameter.grad is not None:
                gradients[f"beta.{name}"] = parameter.grad.clone()
                dist.all_reduce(gradients[f"beta.{name}"])
        beta_step(applied)

    learner.beta_optimizer.step = step_beta
    return gradients


def _learn(folder: Path, case: Case, resumed: Path | None = None) -> list[Step]:
    """Run STEPS steps with a checkpoint before the last one, or resume from that checkpoint and run the last step."""
    spec = _spec(folder, case, dist.get_world_size())
    taught = Taught.of(folder, spec)
    learner, part = taught.learner, taught.part()
    gradients = _recorded(learner)
    if resumed:
        store = CheckpointStore(str(resumed), StorageSpec())
        manifest = store.latest()
        assert manifest
        with checkpoint.on_disk(store, manifest, "resumed", learner.host_group) as found:
            learner.load(found)
    steps = []
    for number in range(STEPS - 1 if resumed else 0, STEPS):
        if number == STEPS - 1 and not resumed:
            store = CheckpointStore(str(folder / _name(dist.get_world_size(), case)), StorageSpec())
            save(store, number, "first", keep=1, write=learner.save, group=learner.host_group)
        totals = part.step(learner, number + 1, (number + 1) / STEPS, statistics=True)
        assert totals.applied
        norm = float(learner.engine.get_global_grad_norm() or 0.0)
        moving = {name: value.item() for name, value in learner.curriculum.values().items()}
        steps.append(Step(totals.loss.item(), totals.energies.clone(), dict(gradients), norm, moving))
    if not resumed:
        permit = Permit(str(folder / _name(dist.get_world_size(), case)), StorageSpec())
        export_student(learner.engine, spec, permit, {}, learner.host_group)
    _skips_alike(learner, part)
    return steps


def _skips_alike(learner: Learner, part: Part) -> None:
    """Check that a gradient that is not finite on one rank changes nothing on any rank."""
    before = _held(learner)
    if learner.rank == 0:
        first, *rest = part.batches
        bad = first.signal | {"hidden": np.full_like(first.signal["hidden"], np.nan)}
        part = Part([dataclasses.replace(first, signal=bad), *rest], part.counts)
    totals = part.step(learner, STEPS + 1, 1.0)
    assert not totals.applied
    torch.testing.assert_close(_held(learner), before, rtol=0, atol=0)


def _held(learner: Learner) -> dict[str, torch.Tensor]:
    """Return copies of this rank's state that can change, without the unused memory at the end of ZeRO-3's parts."""
    found = {
        f"{module}.{name}": value.clone()
        for module in ("weighting", "curriculum")
        for name, value in getattr(learner, module).state_dict().items()
    }
    for name, parameter in learner.distiller.named_parameters():
        part = getattr(parameter, "ds_tensor", None)
        if part is None:
            found[name] = parameter.detach().clone()
        else:
            found[name] = part[: max(0, parameter.ds_numel - learner.rank * part.numel())].clone()
    return found


def _rank(rank: int, ranks: int, folder: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{ranks}-{len(cases)}", rank=rank, world_size=ranks
    )
    steps: dict[Any, list[Step]] = {case: _learn(folder, case) for case in cases}
    for case, before in RESIZED[ranks].items():
        there = folder / _name(RANKS_BEFORE[ranks], before)
        if there.exists():
            steps["resumed", case] = _learn(folder, case, there)
    if rank == 0:
        torch.save(steps, folder / f"steps-{ranks}-{len(cases)}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, Case], list[Step]]:
    """Return (ranks, case) → the steps of the case."""
    folder = tmp_path_factory.mktemp("learner")
    found: dict[Any, Any] = {"folder": folder}
    save_tiny(folder / "teacher", hidden=32, seed=1)
    save_tiny(folder / "student", hidden=16, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        for ranks, cases in ((2, PAIR), (1, [*ALONE, *TOKENS, *BF16]), (2, []), (3, []), (4, QUARTET)):
            on_this_machine(patch, ranks)
            mp.spawn(_rank, (ranks, folder, cases), nprocs=ranks)
            for case, result in torch.load(folder / f"steps-{ranks}-{len(cases)}.pt", weights_only=False).items():
                found[ranks, case] = result
    return found


def _assert_same(steps: list[Step], reference: list[Step]) -> None:
    for step, expected in zip(steps, reference, strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=1e-5)
        torch.testing.assert_close(step.energies, expected.energies, rtol=1e-4, atol=1e-6)
        assert step.norm == pytest.approx(expected.norm, rel=1e-3)
        assert step.moving == pytest.approx(expected.moving, rel=1e-5)
        assert step.gradients.keys() == expected.gradients.keys()
        for name, gradient in step.gradients.items():
            scale = expected.gradients[name].abs().max().item()
            torch.testing.assert_close(
                gradient.float(),
                expected.gradients[name],
                rtol=1e-3,
                atol=2e-4 * scale + 1e-8,
                msg=lambda said, name=name: f"{name}: {said}",
            )


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        *((1, case) for case in ALONE[1:]),
        *((2, case) for case in PAIR if case.reduction == "sample"),
        *((4, case) for case in QUARTET),
    ],
    ids=str,
)
def test_a_global_batch_gives_one_loss_and_one_gradient_on_any_ranks_micro_batches_and_zero_stage(steps, ranks, case):
    _assert_same(steps[ranks, case], steps[1, REFERENCE])


@pytest.mark.parametrize(("ranks", "case"), [(1, TOKENS[1]), (2, TOKENS[1])], ids=str)
def test_so_does_the_mean_over_tokens(steps, ranks, case):
    _assert_same(steps[ranks, case], steps[1, TOKENS[0]])


def _answers(steps, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (logits [rows, V], targets [rows]) of each sample of the global batch, computed by transformers alone."""
    folder = steps["folder"]
    renderer, renderings = _renderings(folder, _spec(folder, REFERENCE, 1))
    model = AutoModelForImageTextToText.from_pretrained(folder / name, dtype="float32").eval()
    found = []
    for rendering in renderings:
        images = {}
        if rendering.pixels is not None:
            mean, std = (
                torch.tensor(values).view(1, 3, 1, 1)
                for values in (renderer.image_processor.image_mean, renderer.image_processor.image_std)
            )
            images["pixel_values"] = (torch.from_numpy(rendering.pixels) / 255 - mean) / std
        ids = torch.from_numpy(rendering.input_ids.astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None], **images).logits[0]
        at = torch.from_numpy(np.flatnonzero(rendering.answer_mask))
        found.append((logits[at - 1], ids[at]))
    return found


def test_a_mean_is_over_samples_or_over_tokens(steps):
    answers = _answers(steps, "student")
    means = torch.tensor([nn.functional.cross_entropy(logits, targets) for logits, targets in answers])
    tokens = torch.tensor([float(len(targets)) for _, targets in answers])
    by_sample, by_token = means.mean().item(), (means * tokens).sum().item() / tokens.sum().item()
    assert abs(by_sample - by_token) > 1e-3
    assert steps[1, REFERENCE][0].energies[0].item() == pytest.approx(by_sample, rel=1e-4)
    assert steps[1, TOKENS[0]][0].energies[0].item() == pytest.approx(by_token, rel=1e-4)


def test_the_temperature_learns_against_the_student(steps):
    pairs = list(zip(_answers(steps, "teacher"), _answers(steps, "student"), strict=True))

    def distance(temperature: float) -> float:
        return sum(
            float(energy("ctkd", teacher.double(), student.double(), temperature=temperature).mean())
            for (teacher, _), (student, _) in pairs
        )

    before = TemperatureSchedule()
    start = before.start + before.range / (1 + math.exp(-before.theta))
    assert distance(steps[1, REFERENCE][-1].moving["ctkd"]) > distance(start)


def test_every_engine_exports_the_same_student(steps):
    def exported(ranks: int, case: Case) -> dict[str, torch.Tensor]:
        folder = steps["folder"] / _name(ranks, case) / "model"
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, dtype="auto")
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        return model.state_dict()

    reference = exported(1, REFERENCE)
    for ranks, case in ((2, PAIR[0]), (2, Case(micro=1)), (1, Case(micro=4, zero=3)), (2, Case(micro=1, zero=3))):
        for name, tensor in exported(ranks, case).items():
            torch.testing.assert_close(tensor, reference[name], rtol=1e-2, atol=2e-3, msg=f"{case} {name}")
    for case in BF16:
        assert {tensor.dtype for tensor in exported(1, case).values()} == {torch.bfloat16}


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_stays_near_float32(steps, case):
    for step, expected in zip(steps[1, case], steps[1, REFERENCE], strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=0.05)


@pytest.mark.parametrize(("ranks", "case"), [(ranks, case) for ranks in RESIZED for case in RESIZED[ranks]], ids=str)
def test_another_number_of_ranks_goes_on_where_the_checkpoint_was(steps, ranks, case):
    _assert_same(steps[ranks, ("resumed", case)], steps[1, REFERENCE][-1:])


def test_every_part_that_learns_has_a_gradient_and_the_loss_falls(steps):
    reference = steps[1, REFERENCE]
    names = set(reference[0].gradients)
    maps = ("maps.fd", "maps.align_attention", "maps.align_topk")
    for part in ("language_model", "lm_head", "multi_modal_projector", "beta.net", *maps):
        assert any(part in name for name in names), part
    assert not any("vision_tower" in name for name in names)
    assert reference[-1].loss < reference[0].loss


def test_what_moves_moves_with_the_job(steps):
    reference = steps[1, REFERENCE]
    temperatures, interpolations = ([step.moving[name] for step in reference] for name in ("ctkd", "taid"))
    assert interpolations == sorted(interpolations)
    assert interpolations[-1] == pytest.approx(1.0)
    assert len(set(temperatures)) == STEPS


def _left_alone(folder: Path) -> None:
    """Let the second rank agree to a step and never take it."""
    spec = _spec(folder, Case(micro=6), 2)
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"collective_timeout_s": 5.0})})
    taught = Taught.of(folder, spec)
    learner, part = taught.learner, taught.part()
    if learner.rank == 1:
        time.sleep(60)
        return
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out waiting 5000ms"):
        part.step(learner, 1, 0.1)
    (folder / "noticed").write_text(str(time.monotonic() - begin))
    os._exit(1)  # which ends the other, too


def test_a_rank_that_hangs_within_a_step_is_noticed_by_the_others(tmp_path):
    save_tiny(tmp_path / "teacher", hidden=32, seed=1)
    save_tiny(tmp_path / "student", hidden=16, seed=2)
    with pytest.raises(mp.ProcessExitedException):
        spawned(_left_alone, tmp_path, tmp_path, ranks=2)
    assert (tmp_path / "noticed").exists()
