"""β, the weight of each channel of the objective for each sample.

The objective is, per sample i and channel k (Beta-KD Eq. 13 and 15)

    L = mean_i Σ_k ( β_ik · ℓ_ik − (d/2) · log β_ik ),

The cross-entropy is a channel too; its β is 1 unless `weight_ce` is true. A learned β has its fixed point at d / (2ℓ):
the channel's share β·ℓ converges to d/2, whatever the energy's scale. β never depends on the student's own loss, only
on parameters and on the teacher's features. Therefore gradients split exactly into

    ∂L/∂student from sg(β) · ℓ        and        ∂L/∂β from β · sg(ℓ) − (d/2) · log β,

The vocabulary-wide part thus needs only constant weights, and β's parameters stay in float32, outside every
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
"""Number whose softplus is 1."""
LEAST_SLOPE = 0.01
"""Smallest slope of the bound on log β for a gradient that moves β back inside."""

CE = "ce"


class BetaWeighting(nn.Module):
    """Weights for the channels of an objective.

    `channels` names the energies, without the cross-entropy; `ce` is true if the cross-entropy is a channel too. For
    `instance`, `feature_sizes` gives the width of each feature that the spec names. For a text-only sample, a learned
    vector replaces `teacher_vision`. If no channel has a β to learn (plain fine-tuning), no features are needed.

    Raises ValueError if the spec does not fit the channels, if a channel is named twice, or if a feature has no size.
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
            raise ValueError(f"channels are {list(channels)}: name each energy once, and {CE} only by the argument ce")
        weighted = [isinstance(spec, LearnedWeighting) and (name != CE or spec.weight_ce) for name in self.channels]
        self.register_buffer("learned", torch.tensor(weighted), persistent=False)
        # Indices of the learned channels: indexing with a mask would make the host wait for the device to count it.
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
            # Each feature is normalised separately, because a wide feature would dominate the others. Entropies stay in
            # nats: LayerNorm of two numbers keeps only which one is larger.
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
        """Return β of every sample and channel, in float32.

        A learned β is differentiable; any other is the weight that the spec gives, 1 by default.
        """
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
                # Expanded before the bound, because `_Bounded` needs one entry per sample.
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
        """Return Σ_k β_ik ℓ_ik − (d/2) log β_ik of each sample. A channel that is not `present` adds neither term."""
        if present is not None:
            energies = torch.where(present, energies, 0.0)  # otherwise an absent NaN reaches β's gradient as 0 · NaN
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
        """Return the scalar loss of a batch, and its log, for your own training loop.

        `energies` maps each channel (including "ce") to its value per sample. A sample without an image has no channel
        on image tokens, such as "fd". The loss is differentiable with respect to the energies and to β's parameters.
        The log has the mean energy and the mean β of each channel over the samples that have it. Raises ValueError if
        `energies` names other channels, or if a feature that β needs is missing.
        """
        if set(energies) != set(self.channels):
            raise ValueError(
                f"energies are {sorted(energies)}: give one for each of the channels {sorted(self.channels)}"
            )
        if missing := self.needed.difference(features or ()):
            raise ValueError(f"features has no {sorted(missing)}: add it, because β depends on {sorted(self.needed)}")
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
        """Return the share of samples, from 0 to 1, whose β is at its bounds: |log β| is above 95% of `log_bound`.

        There β learns very slowly. Only samples that have the channel count: the others have NaN in `beta`.
        """
        if not isinstance(self.spec, LearnedWeighting):
            return beta.new_zeros(beta.shape[1])
        is_at_bound = beta.log().abs() > 0.95 * self.spec.log_bound
        return is_at_bound.sum(dim=0) / beta.isfinite().sum(dim=0).clamp_min(1)

    @torch.no_grad()
    def observe(self, energies: Float[Tensor, " channels"]) -> None:
        """Add the global batch's mean energies to the scales of `manual: auto`. Does nothing for other weightings.

        Call it once per step with the same numbers on every rank. After `auto_steps` steps each energy's weight becomes
        the ratio of CE's mean to its own mean, and does not change again. A mean is over the steps in which the energy
        was positive: a batch without an image has no `fd`. An energy that was always zero has no scale and keeps weight
        1. An energy close to zero gets the largest weight that a learned weight may have.
        """
        if not isinstance(self.spec, ManualWeighting) or self.spec.weights != "auto":
            return
        # Everything stays on the device: an `if` on a tensor would make the host wait for the step to end.
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
        """Return the names of the features that β depends on."""
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
        """Return β for u: 1 at u = 0, and bounded smoothly to [e^-bound, e^bound]."""
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
    """Return whether each sample has each channel.

    A sample that is not `valid` has none. A sample without an image has no channel on image tokens.
    """
    return torch.stack([valid & has_image if name in VISUAL_ENERGIES else valid for name in channels], dim=1)


class _Bounded(torch.autograd.Function):
    """bound · tanh(x / bound), with a gradient that can always bring x back.

    At |x| = 10 · bound, the slope of tanh is zero in float32 (a hard clamp has slope zero everywhere outside). A
    parameter that got so far could never return. Therefore a gradient whose descent step moves x inside uses a slope of
    at least LEAST_SLOPE. A gradient whose descent step moves x outside keeps the slope of tanh, which stops x.
    `x` must have one entry per sample: the sign of a gradient summed over samples would depend on how the global batch
    is split.
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
        # A descent step changes x by −grad, so it moves x towards 0 where grad and x have the same sign.
        leads_inside = grad * x > 0
        return grad * torch.where(leads_inside, slope.clamp_min(LEAST_SLOPE), slope), None


def _log_softplus(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return log(softplus(x)).

    Far below zero this is x itself; there softplus would underflow and give a gradient of 0/0.
    """
    # clamp_min too: the branch that is not taken would give a gradient of 0 · NaN.
    return torch.where(x < -15, x, nn.functional.softplus(x.clamp_min(-15)).log())


def _network(width: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return the network g_φ of Eq. 14, without its input normalisation.

    The last layer starts at zero, so every β starts at 1.
    """
    last = nn.Linear(hidden, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), last)
