"""β: how much each channel counts, for each sample.

The objective is, per sample i and channel k (Beta-KD Eq. 13 and 15)

    L = mean_i Σ_k ( β_ik · ℓ_ik − (d/2) · log β_ik ),

with the cross-entropy as the channel whose β is 1 unless `weight_ce` says otherwise. A learned β has its fixed point at
d / (2ℓ): the channel's share β·ℓ settles at d/2, whatever the energy's scale. β never depends on the student's own
loss, only on parameters and on the teacher's features, so gradients split exactly into

    ∂L/∂student from sg(β) · ℓ        and        ∂L/∂β from β · sg(ℓ) − (d/2) · log β,

which lets the vocabulary-wide part see constant weights, and keeps β's parameters in float32, outside every
mixed-precision cast.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from betakd_ray.spec import (
    LARGEST_LOG_BOUND,
    VISUAL_ENERGIES,
    Feature,
    InstanceWeighting,
    LearnedWeighting,
    ManualWeighting,
    TaskWeighting,
    Weighting,
    check_weighting,
)

UNIT_SOFTPLUS = math.log(math.e - 1)
"""softplus of this is 1."""
LEAST_SLOPE = 0.01
"""Smallest slope of the bound for gradients that move β back inside."""

CE = "ce"


class BetaWeighting(nn.Module):
    """Weights for the channels of an objective.

    `channels` names the energies, without the cross-entropy; `ce` says whether that is a channel too. For `instance`,
    `feature_sizes` gives the width of each feature the spec names; `teacher_vision` of a text-only sample is replaced
    by a learned vector. Where no channel has a β to learn (plain fine-tuning), no features are needed.

    Raises ValueError where the spec and the channels do not go together, a channel stands twice, or a feature has no
    size.
    """

    learned: Tensor
    learned_at: Tensor
    weights: Tensor
    scales: Tensor
    seen: Tensor
    observed: Tensor

    def __init__(
        self,
        spec: Weighting,
        channels: Sequence[str],
        *,
        ce: bool = True,
        feature_sizes: Mapping[Feature, int] | None = None,
    ) -> None:
        super().__init__()
        check_weighting(spec, channels, ce=ce)
        self.spec = spec
        self.channels: tuple[str, ...] = (CE, *channels) if ce else tuple(channels)
        if len(set(self.channels)) < len(self.channels) or CE in channels:
            raise ValueError(
                f"channels are {list(channels)}: name each energy once, and say whether there is {CE} by ce="
            )
        weighted = [isinstance(spec, LearnedWeighting) and (name != CE or spec.weight_ce) for name in self.channels]
        self.register_buffer("learned", torch.tensor(weighted), persistent=False)
        # Places, as a mask's would have to be counted by the host.
        self.register_buffer("learned_at", torch.tensor(weighted).nonzero().flatten(), persistent=False)
        count = sum(weighted)
        if isinstance(spec, TaskWeighting):
            self.u = nn.Parameter(torch.zeros(count))
        elif isinstance(spec, InstanceWeighting) and count:
            known = feature_sizes or {}
            if missing := [name for name in spec.features if name not in known]:
                raise ValueError(f"feature_sizes has no {missing}: give the width of each of weighting.features")
            sizes = {name: known[name] for name in spec.features}
            self.text_only = nn.Parameter(torch.zeros(sizes.get("teacher_vision", 0)))
            # Each feature for itself, or a wide one would drown the others. Entropies come in nats and stay: of two
            # numbers, normalisation leaves only which is larger.
            self.norms = nn.ModuleDict(
                {
                    name: nn.Identity() if name == "teacher_entropy" else nn.LayerNorm(size)
                    for name, size in sizes.items()
                }
            )
            self.net: nn.Sequential | None = _network(sum(sizes.values()), spec.hidden_size, count)
        elif isinstance(spec, InstanceWeighting):
            self.net = None
        elif isinstance(spec, ManualWeighting):
            given = {} if spec.weights == "auto" else spec.weights
            weights = torch.tensor([given.get(name, 1.0) for name in self.channels])
            self.register_buffer("weights", weights)
            self.register_buffer("scales", torch.zeros(len(self.channels)))
            self.register_buffer("seen", torch.zeros(len(self.channels)))
            self.register_buffer("observed", torch.tensor(0))

    def beta(
        self, features: Mapping[str, Float[Tensor, "batch _"]], has_image: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "batch channels"]:
        """β of every sample and channel, in float32; 1 where it is not learned, differentiable where it is."""
        batch = has_image.shape[0]
        fixed = (
            self.weights
            if isinstance(self.spec, ManualWeighting)
            else torch.ones_like(self.learned, dtype=torch.float32)
        )
        beta = fixed.expand(batch, -1)
        # Autocast would run the network in bfloat16.
        with torch.autocast(has_image.device.type, enabled=False):
            if isinstance(self.spec, TaskWeighting):
                return self._placed(beta, self._positive(self.u.expand(batch, -1)))
            if isinstance(self.spec, InstanceWeighting) and self.net is not None:
                return self._placed(beta, self._positive(self.net(self._features(features, has_image))))
            return beta

    def loss(
        self,
        beta: Float[Tensor, "batch channels"],
        energies: Float[Tensor, "batch channels"],
        present: Bool[Tensor, "batch channels"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Σ_k β_ik ℓ_ik − (d/2) log β_ik of each sample. A channel that is not `present` gives neither term."""
        if present is not None:
            energies = torch.where(present, energies, 0.0)  # or an absent NaN reaches β's gradient as 0 · NaN
        total = beta * energies
        if isinstance(self.spec, LearnedWeighting):
            total = total - (self.spec.d / 2) * torch.where(self.learned, beta.log(), 0.0)
        return (total if present is None else torch.where(present, total, 0.0)).sum(dim=1)

    def forward(
        self,
        energies: Mapping[str, Float[Tensor, " batch"]],
        features: Mapping[str, Float[Tensor, "batch _"]] | None = None,
        has_image: Bool[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The scalar of a batch, and its log, for a training loop of your own.

        `energies` maps each channel ("ce" among them) to its per-sample values; a sample without an
        image has no channel on image tokens, such as "fd".
        The result is differentiable with respect to the energies and to β's parameters. The log has each channel's
        means over the samples that have it. Raises ValueError for energies other than the channels, or without a
        feature that β needs.
        """
        if set(energies) != set(self.channels):
            raise ValueError(f"energies are {sorted(energies)}: give those of the channels, {sorted(self.channels)}")
        if missing := self.needed.difference(features or ()):
            raise ValueError(f"features has no {sorted(missing)}: β depends on {sorted(self.needed)}")
        matrix = torch.stack([energies[name] for name in self.channels], dim=1).float()
        if has_image is None:
            has_image = torch.ones(matrix.shape[0], dtype=torch.bool, device=matrix.device)
        beta = self.beta(features or {}, has_image)
        present = present_channels(self.channels, torch.ones_like(has_image), has_image)
        counts = present.sum(dim=0).clamp_min(1)
        log = {}
        for kind, values in (("energy", matrix), ("beta", beta)):
            means = torch.where(present, values.detach(), 0.0).sum(dim=0) / counts
            log |= {f"{kind}/{name}": mean for name, mean in zip(self.channels, means, strict=True)}
        return self.loss(beta, matrix, present).mean(), log

    def saturated(self, beta: Float[Tensor, "samples channels"]) -> Float[Tensor, " channels"]:
        """Share of samples whose β is at its bounds: |log β| above 95% of `log_bound`. There it hardly learns.

        Of the samples that have the channel: those without it have NaN.
        """
        if not isinstance(self.spec, LearnedWeighting):
            return beta.new_zeros(beta.shape[1])
        is_at_bound = beta.log().abs() > 0.95 * self.spec.log_bound
        return is_at_bound.sum(dim=0) / beta.isfinite().sum(dim=0).clamp_min(1)

    @torch.no_grad()
    def observe(self, energies: Float[Tensor, " channels"]) -> None:
        """Tell `manual: auto` the global batch's mean energies, once a step and alike on every rank.

        After `auto_steps` steps each energy's weight becomes the ratio of CE's mean to its own, and stays. A mean is
        over the steps in which there was something: a batch without an image says nothing of `fd`. An energy that was
        zero all along has no scale, and keeps weight 1; one that was next to zero gets the largest that any learned
        weight may have.
        """
        if not isinstance(self.spec, ManualWeighting) or self.spec.weights != "auto":
            return
        # All of it on the device: a question asked by the host would wait for the step to end.
        is_observing = self.observed < self.spec.auto_steps
        self.observed += is_observing
        self.scales += torch.where(is_observing, energies, 0.0)
        self.seen += is_observing & (energies > 0)
        is_last = is_observing & (self.observed == self.spec.auto_steps)
        means = self.scales / self.seen.clamp_min(1)
        ratios = torch.where(means > 0, means[self.channels.index(CE)] / means, 1.0)
        ratios = ratios.clamp(math.exp(-LARGEST_LOG_BOUND), math.exp(LARGEST_LOG_BOUND))
        self.weights.copy_(torch.where(is_last, ratios, self.weights))

    @property
    def needed(self) -> frozenset[Feature]:
        """The features that β depends on."""
        return frozenset(
            self.spec.features if isinstance(self.spec, InstanceWeighting) and self.net is not None else ()
        )

    def _features(
        self, features: Mapping[str, Float[Tensor, "batch _"]], has_image: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "batch width"]:
        assert isinstance(self.spec, InstanceWeighting)
        parts = [features[name].detach().float() for name in self.spec.features]
        if "teacher_vision" in self.spec.features:
            at = self.spec.features.index("teacher_vision")
            parts[at] = torch.where(has_image[:, None], parts[at], self.text_only)
        return torch.cat([self.norms[name](part) for name, part in zip(self.spec.features, parts, strict=True)], dim=1)

    def _positive(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """β = 1 at u = 0, and smoothly inside [e^-bound, e^bound]."""
        assert isinstance(self.spec, LearnedWeighting)
        log_beta = u if self.spec.positivity == "exp" else _log_softplus(u + UNIT_SOFTPLUS)
        return torch.exp(_Bounded.apply(log_beta, self.spec.log_bound))

    def _placed(
        self, beta: Float[Tensor, "batch channels"], values: Float[Tensor, "batch learned"]
    ) -> Float[Tensor, "batch channels"]:
        return beta.index_copy(1, self.learned_at, values)


def present_channels(
    channels: Sequence[str], valid: Bool[Tensor, " batch"], has_image: Bool[Tensor, " batch"]
) -> Bool[Tensor, "batch channels"]:
    """Which channels a sample has: none if it is not `valid`, none on image tokens without an image."""
    return torch.stack([valid & has_image if name in VISUAL_ENERGIES else valid for name in channels], dim=1)


class _Bounded(torch.autograd.Function):
    """bound · tanh(x / bound), with a way back.

    Ten bounds away the slope of tanh is zero in float32, as a hard clamp's is at once, and a parameter that got so far
    would stay. So a gradient whose descent leads inside has a slope of at least LEAST_SLOPE. One that leads outside
    keeps tanh's own, or nothing would stop it. `x` has an entry a sample: of a sum over samples, the sign would depend
    on how the global batch is cut.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        tanh = torch.tanh(x / bound)
        ctx.save_for_backward(x, tanh)
        return bound * tanh

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, tanh = ctx.saved_tensors
        slope = 1 - tanh.square()
        leads_inside = grad * x > 0
        return grad * torch.where(leads_inside, slope.clamp_min(LEAST_SLOPE), slope), None


def _log_softplus(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(softplus(x)), which is x itself far below zero, where softplus would underflow to a gradient of 0/0."""
    return torch.where(x < -15, x, nn.functional.softplus(x.clamp_min(-15)).log())


def _network(width: int, hidden: int, outputs: int) -> nn.Sequential:
    """g_φ of Eq. 14, after its normalisation. The last layer starts at zero, so every β starts at 1."""
    last = nn.Linear(hidden, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), last)
