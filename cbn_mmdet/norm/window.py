# Licensed under the Apache License, Version 2.0.
"""A layer's window: the statistics of past iterations, moved to today's weight.

Paper: Cross-Iteration Batch Normalization, https://arxiv.org/abs/2002.05712, equations 5 to 9, here
in centred form. A window computes the mean ``mu_p`` and variance ``V`` of past iterations at
today's weight ``w``. The current batch, with mean ``mu`` and variance ``v``, is the share ``s`` of
the union of past and batch. The union's mean and variance are

    d = mu - mu_p       mean = mu_p + s d       var = s v + (1 - s) V + s (1 - s) d^2

There are two windows. :class:`SlidingWindow` is the paper's: it keeps the last ``k - 1`` iterations
and moves each to today's weight by its own derivative; ``s = 1 / k``. :class:`MovingWindow` keeps
the past as *one* function of the weight,

    mu_p = A + M . w                        V = max(R + H . w, 0)

At its end, an iteration gives this function the union's value and derivative at its own weight:

    M <- s m + (1 - s) M                    A <- mean - M . w
    H <- s h' + (1 - s) H                   R <- var - H . w

where ``h' = h + 2 (1 - s) d (m - M)``, because ``d`` depends on the weight, too. This averages
exponentially, over about ``2 / s - 1`` iterations. An iteration computes only the products of the
old ``M`` and ``H`` with the weight, for all layers at once, as the past depends on weights alone.
The products of the new ``M`` and ``H`` follow by linearity.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .moments import full_precision
from .record import Record, Vectors, pairs

# For a window that sets its own size: the largest size, with which it starts, and the rate at which
# surprises change it, over some fifty iterations. Wider windows follow a deep network too late.
LARGEST = 8
RATE = 0.02

ENDLESS = 1 << 30  # the size of a window without a limit

WINDOW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MovingPast(NamedTuple):
    """Past statistics from a moving window, at today's weight and bias.

    Attributes:
        mean: ``mu_p``, ``(C,)``.
        var: ``V``, ``(C,)``.
        share: ``s``.
        positive: Whether ``V`` was not cut to zero, bool ``(C,)``. This and all that follow are
            None if the past is not a function of the weight.
        at: ``M . w`` and ``H . w``, each ``(C,)``.
        m: ``M``, ``(groups, P)``.
        h: ``H``, ``(C, P)``.
    """

    mean: Tensor
    var: Tensor
    share: float
    positive: Tensor | None = None
    at: tuple[Tensor, Tensor] | None = None
    m: Tensor | None = None
    h: Tensor | None = None

    def gradient(self, of_mean: Tensor, of_var: Tensor, out: Tensor) -> None:
        """Computes the weight gradient through the past.

        Args:
            of_mean: The gradient in ``mu_p``, ``(C,)``.
            of_var: The gradient in ``V``, ``(C,)``; zero where ``V`` was cut.
            out: Tensor to write the weight gradient to, ``(C, P)``.
        """
        of_var = of_var.unsqueeze(1)
        if self.h.dtype == out.dtype:
            torch.mul(self.h, of_var, out=out)
        else:
            for rows, part in kernels.in_dtype(self.h, out.dtype):
                torch.mul(part, of_var[rows], out=out[rows])
        kernels.add_outer_(out, of_mean, self.m.to(out.dtype))


class SlidingPast(NamedTuple):
    """Past statistics from a sliding window of ``T`` iterations, at today's weight and bias.

    Attributes:
        mean: ``mu_p``, the mean of the compensated means ``mu_hat``, ``(C,)``.
        var: ``V``, the mean of the compensated variances plus the variance of the means, ``(C,)``.
        share: ``s``, that is ``1 / (T + 1)``.
        moved: How far the compensation moved each mean, ``(C, T)``. This and all that follow are
            None if the past is not a function of the weight.
        positive: ``c``, whether ``v_hat`` was not cut by the maximum, bool ``(C, T)``.
        offset: ``mu_hat - c delta - mu_p``, ``(C, T)``.
        m: ``m`` of each iteration, ``(groups, T, P)``.
        h: ``h`` of each iteration, ``(C, T, P)``.
    """

    mean: Tensor
    var: Tensor
    share: float
    moved: Tensor | None = None
    positive: Tensor | None = None
    offset: Tensor | None = None
    m: Tensor | None = None
    h: Tensor | None = None

    def gradient(self, of_mean: Tensor, of_var: Tensor, out: Tensor) -> None:
        """As :meth:`MovingPast.gradient`, but zeroes ``of_var`` itself, for each iteration."""
        (groups, count, patch), dtype = self.m.shape, out.dtype
        of_mean, of_var = (each.unsqueeze(1) / count for each in (of_mean, of_var))
        of_each = torch.addcmul(of_mean, of_var, self.offset, value=2)  # C, T
        by_group = out.view(groups, -1, patch)
        torch.bmm(of_each.view(groups, -1, count), self.m.to(dtype), out=by_group)
        of_var = of_var * self.positive
        for rows, part in kernels.in_dtype(self.h, dtype):
            out[rows, None].baddbmm_(of_var[rows, None], part)


Past = MovingPast | SlidingPast


class Window:
    """The base class of both windows.

    Args:
        size: The largest window size in force, including the current iteration.
        sets_itself: Whether the window finds the share of the current batch from its surprises.
        dtype: Dtype of ``H``, or of each ``h``; everything else is float32.

    Attributes:
        conv: Weak reference to the module whose output the statistics describe.
        why_not: Why this module is not compensated although others are, or None.
        rows_of: Weak reference to the module whose channels autograd has shown to be rows.
        seen: Number of iterations that were added.
        is_without_bias: Whether the means are without the convolution's bias; None if unknown.
        lag: Running average of the cosine between consecutive surprises, from -1 to 1.
        surprise: ``d / sqrt(V + v + eps)`` of the last iteration, ``(C,)``, or None.
        sums: ``E_b`` and ``E_g``, the averages of the backward pass's sums, ``(2, C)``, or None.
    """

    def __init__(self, size: int, sets_itself: bool, dtype: torch.dtype) -> None:
        self.size, self.sets_itself, self.dtype = size, sets_itself, dtype
        self.conv: weakref.ref[nn.Module] | None = None
        self.why_not: str | None = None
        self.rows_of: weakref.ref[nn.Module] | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets the past and frees its memory."""
        self.seen = 0
        self.lag = 0.0
        self.is_without_bias: bool | None = None
        self.surprise: Tensor | None = None
        self.sums: Tensor | None = None
        self.m: Tensor | None = None
        self.h: Tensor | None = None
        self.cached: tuple | None = None  # the past, and for which weight and bias

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the window holds, by name."""
        return {
            name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }

    @property
    def kind(self) -> str:
        """Type and size in words; a saved state loads only into a window of the same kind."""
        own = "of its own size up to" if self.sets_itself else "of"
        return f"{type(self).__name__} {own} {self.size}"

    @property
    def device(self) -> torch.device | None:
        """The device of the window's tensors; None while it is empty."""
        return next((tensor.device for tensor in self.tensors.values()), None)

    @property
    def nbytes(self) -> int:
        """Memory that the window holds, in bytes."""
        return sum(each.numel() * each.element_size() for each in self.tensors.values())

    def move(self, device: torch.device) -> None:
        """Moves all tensors to ``device``; their dtype does not change."""
        if self.device in (None, device):
            return
        if device.type == "meta":  # values do not survive there, so none could come back
            return self.clear()
        self.cached = None
        for name, tensor in self.tensors.items():
            setattr(self, name, tensor.to(device))

    def state(self) -> dict:
        """Everything but the reference to the convolution, as plain values and tensors."""
        held = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        plain = {name: getattr(self, name) for name in self._plain}
        return dict(kind=self.kind, size=self.size, **plain, **held)

    @torch.inference_mode(False)
    def load(self, state: dict, device: torch.device) -> None:
        """Restores what :meth:`state` returned."""
        self.clear()
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device, copy=True))
            elif name in self._plain:
                setattr(self, name, value)

    def fits(self, weight: Tensor | None) -> bool:
        """Whether the past, if there is any, is a function of a weight like this one."""
        if self.seen == 0:
            return True
        if weight is None or self.h is None:
            return weight is None and self.h is None
        size = len(self.h) * self.h.shape[-1]  # C P, however many iterations there are
        return size == weight.numel() and self.h.device == weight.device

    def cache(self, past: Past, weight: Tensor | None, bias: Tensor | None) -> None:
        """Keeps a past that was computed for today's weight and bias."""
        ref = None if weight is None else weakref.ref(weight)
        self.cached = past, ref, kernels.version_of(weight), kernels.version_of(bias)

    def past(self, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Past | None:
        """The past at today's weight; None if the window is empty or does not fit the weight.

        Args:
            weight: The convolution's weight, or None if the past is to be no function of it.
            bias: The convolution's bias, or None.
            dtype: Dtype to compute in.
        """
        if self.seen == 0:
            return None
        if self.cached is not None:
            past, ref, *versions = self.cached
            is_it = (ref and ref()) is weight and past.mean.dtype == dtype
            if is_it and versions == [kernels.version_of(weight), kernels.version_of(bias)]:
                return past
        if not self.fits(weight):  # the end of the iteration clears it
            return None
        (past,) = pasts([(self, weight, bias)], dtype)
        return past

    _plain = ("seen", "lag", "is_without_bias")

    def adapt(self, correlation: float) -> None:
        """Adapts ``lag`` and the window's own share to the correlation of the last two surprises.

        With the best possible past, consecutive surprises are independent. If the window is too
        wide for the network's speed they point the same way, if it is too narrow opposite ways
        (Mehra 1970, "On the identification of variances and adaptive Kalman filtering").
        """
        if not math.isfinite(correlation):
            return
        self.lag += RATE * (correlation - self.lag)
        if self.sets_itself:
            changed = self.log_share + RATE * correlation
            self.log_share = min(max(changed, -math.log(LARGEST)), 0.0)


class MovingWindow(Window):
    """The past as one first-order function of the weight.

    Attributes:
        values: ``A`` (without the convolution's bias) and ``R``, ``(2, C)``.
        m: ``M``, ``(groups, P)``, or None if the past is not a function of the weight.
        h: ``H``, ``(C, P)``, likewise.
        recorded: Mean of the union at the last iteration's weight, without the bias, ``(C,)``.
        log_share: Logarithm of the share that the surprises have set.
    """

    _plain = (*Window._plain, "log_share")

    def clear(self) -> None:
        """Forgets the past and frees its memory."""
        super().clear()
        self.values: Tensor | None = None
        self.recorded: Tensor | None = None
        self.log_share = -math.log(LARGEST)

    @property
    def share(self) -> float:
        """``s``: the next iteration's share of the union; the past starts as a plain mean."""
        own = math.exp(self.log_share) if self.sets_itself else 0.0
        return max(own, 1 / self.size, 1 / (self.seen + 1))


class SlidingWindow(Window):
    """The paper's window: a ring of the last ``size - 1`` iterations.

    Attributes:
        vectors: Mean without the convolution's bias, then that mean less ``m . w`` and the variance
            less ``h . w``, at the iteration's own weight, ``(size - 1, 3, C)``.
        m: ``m``, ``(groups, size - 1, P)``, or None if nothing is compensated.
        h: ``h``, ``(C, size - 1, P)``, likewise.
    """

    def clear(self) -> None:
        """Forgets the past and frees its memory."""
        super().clear()
        self.vectors: Tensor | None = None

    @property
    def held(self) -> int:
        """``T``: the number of past iterations in the window."""
        return min(self.seen, self.size - 1)

    @property
    def share(self) -> float:
        """``s``: the next iteration's share of the union."""
        return 1 / (self.held + 1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def push(self, record: Record) -> None:
        """Adds an iteration, which replaces the oldest one if the window is full."""
        if record.past is None:
            self.clear()
        mean, var, of = *record.moments[:2], record.derivative
        if record.bias is not None:
            mean = mean - record.bias
        if of is None:
            vectors = torch.stack((mean, mean, var))
        else:
            vectors = torch.stack((mean, mean - of.mean_at, var - 2 * of.half_var_at))
        slot = self.seen % (self.size - 1)
        if self.vectors is None:
            new = dict(dtype=torch.float32, device=mean.device)
            self.vectors = torch.zeros(self.size - 1, *vectors.shape, **new)
            if of is not None:
                (groups, patch), channels = of.mean.shape, len(of.var)
                self.m = torch.zeros(groups, self.size - 1, patch, **new)
                self.h = torch.zeros(
                    channels, self.size - 1, patch, dtype=self.dtype, device=mean.device
                )
        self.vectors[slot] = vectors
        self.is_without_bias = record.bias is not None
        if of is not None:
            self.m[:, slot] = of.mean
            self.h[:, slot] = of.var
            if self.dtype != torch.float32:
                self.vectors[slot, 2] += _left_out(record.weight, of.var, self.h[:, slot])
        self.seen += 1
        self.cached = None

    def past_at(
        self, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> SlidingPast:
        """The past at today's weight and bias."""
        count = self.held
        recorded, mean_rest, var_rest = self.vectors[:count].to(dtype).permute(1, 2, 0)  # C, T
        means, variances, positive, delta, m, h = mean_rest, var_rest, None, None, None, None
        if self.h is not None:
            m, h = self.m[:, :count], self.h[:, :count]
            (groups, _, patch), channels = m.shape, len(h)
            w = weight.detach().reshape(channels, 1, patch).to(dtype)
            of_mean = kernels.products_of_rows(w.view(groups, -1, patch), m.to(dtype))
            means = mean_rest + of_mean.view(channels, count)
            of_var = [
                kernels.products_of_rows(w[rows], part)[:, 0]
                for rows, part in kernels.in_dtype(h, dtype)
            ]
            delta = means - recorded
            variances = (var_rest + torch.cat(of_var)).addcmul_(delta, delta, value=-1)
            positive = variances > 0
            variances.clamp_min_(0)
        mean = means.mean(1)
        distances = means - mean[:, None]
        var = torch.addcmul(variances, distances, distances).mean(1)
        offset = None if positive is None else torch.addcmul(distances, positive, delta, value=-1)
        if bias is not None:
            mean = mean + bias.detach().to(dtype)
        return SlidingPast(mean, var, self.share, delta, positive, offset, m, h)


@torch.no_grad()
def pasts(
    together: Sequence[tuple[Window, Tensor | None, Tensor | None]], dtype: torch.dtype
) -> list[Past]:
    """The pasts of several windows, none of which is empty, at today's weights.

    Args:
        together: Windows on one device, each with its weight (None if the past is not a function of
            one) and the convolution's bias (or None).
        dtype: Dtype to compute in.
    """
    moving = [each for each in together if isinstance(each[0], MovingWindow)]
    with full_precision(together[0][0].device.type):
        found = iter(_moving_pasts(moving, dtype) if moving else ())
        return [
            next(found) if isinstance(window, MovingWindow) else window.past_at(weight, bias, dtype)
            for window, weight, bias in together
        ]


def _moving_pasts(
    together: list[tuple[MovingWindow, Tensor | None, Tensor | None]], dtype: torch.dtype
) -> list[MovingPast]:
    """The same for moving windows, in few launches: all their channels are one dimension here."""
    products = iter(
        kernels.weight_products(
            [window.m for window, weight, _ in together if weight is not None],
            [window.h for window, weight, _ in together if weight is not None],
            [weight for _, weight, _ in together if weight is not None],
            dtype,
        )
    )
    values = [window.values for window, *_ in together]
    sizes = [each.shape[1] for each in values]
    at = [
        (torch.zeros(size, dtype=dtype, device=each.device),) * 2
        if weight is None
        else next(products)
        for (_, weight, _), size, each in zip(together, sizes, values, strict=True)
    ]  # M . w and H . w
    value = torch.cat(values, 1).to(dtype) + pairs(at)
    positive = value[1] > 0
    value[1].clamp_min_(0)
    means, variances, positives = (
        torch.split_with_sizes(each, sizes) for each in (*value.unbind(), positive)
    )
    found = []
    for place, (window, weight, bias) in enumerate(together):
        mean = means[place]
        if bias is not None:
            mean = mean + bias.detach().to(dtype)
        past = mean, variances[place], window.share
        if weight is not None:
            past = *past, positives[place], at[place], window.m, window.h
        found.append(MovingPast(*past))
    return found


# The end of an iteration.


def _left_out(weight: Tensor, h: Tensor, rounded: Tensor) -> Tensor | float:
    """``(h - rounded) . w`` of each channel at the present weight, which rounding would lose.

    Once the caller adds it back, rounding affects only how the variance changes with the weight.
    """
    if weight.untyped_storage().nbytes() == 0:  # FSDP gathers it only for the forward
        return 0.0
    return ((h - rounded.to(h.dtype)) * weight.reshape(h.shape).to(h.dtype)).sum(1)


def surprises(vectors: Vectors) -> tuple[Tensor, Tensor]:
    """How far batches were from what their windows predicted.

    Returns:
        ``z = d / sqrt(V + v + eps)`` of all channels, ``(N,)``; and sums over the channels of each
        window, ``(4 L,)``: of ``z_t^2``, of ``z_t z_{t-1}`` twice and of ``z_{t-1}^2``, where
        ``z_{t-1}`` is the last iteration's.
    """
    d = vectors.batch[0] - vectors.past[0]
    now = d * (vectors.past[1] + vectors.batch[1] + vectors.eps).rsqrt_()
    last = [each.past and each.window.surprise for each in vectors.records]
    both = torch.cat([now, *vectors.parts(last, 0.0)]).view(2, -1)
    products = both[:, None] * both
    return now, kernels.segment_sums(products.view(-1), 4 * vectors.sizes)


def growth(vectors: Vectors) -> tuple[Tensor, Tensor]:
    """New values of moving windows, which :func:`grow` keeps or drops.

    Returns:
        ``A`` and ``R`` of all channels, ``(2, N)``; means of the unions without the bias, ``(N,)``.
    """
    records, union = vectors.records, vectors.union
    # m . w and h . w of the batch, M . w and H . w of the past.
    ofs = [record.derivative for record in records]
    batch_at = vectors.cat_pairs([of and (of.mean_at, of.half_var_at) for of in ofs], 0.0)
    batch_at[1].mul_(2)
    past_at = vectors.cat_pairs([each.past and each.past.at for each in records], batch_at)
    biases = [record.bias for record in records]
    if any(bias is not None for bias in biases):
        union = torch.stack((union[0] - vectors.cat(biases, 0.0), union[1]))
    at = past_at.lerp(batch_at, vectors.share)  # with h; what h' has beyond it is subtracted below
    values = union - at
    values[1].addcmul_(at[0] - past_at[0], vectors.from_union, value=-2)
    return values, union[0]


@torch.inference_mode(False)
@torch.no_grad()
def add_distances(vectors: Vectors) -> None:
    """Turns each batch's ``h`` in place into ``h'``, which is what enters a moving window."""
    found = []
    for place, record in enumerate(vectors.records):
        of, past = record.derivative, record.past
        if of is None or record.coefficients is not None:  # a backward pass has come by
            continue
        if of.var.is_inference():  # cannot be changed in place outside inference mode
            record.derivative = of = of._replace(mean=of.mean.clone(), var=of.var.clone())
        if past is not None and past.m is not None:
            found.append((place, of, past.m.to(of.mean.dtype)))
    if found:
        distances = vectors.split(vectors.from_union)
        changes = torch._foreach_sub([of.mean for _, of, _ in found], [m for *_, m in found])
        kernels.add_outers_(
            [of.var for _, of, _ in found], [distances[place] for place, *_ in found], changes, 2.0
        )


@torch.inference_mode(False)
@torch.no_grad()
def grow(vectors: Vectors, new: Sequence[Tensor], keep: Sequence[bool]) -> None:
    """Puts what :func:`growth` found into the moving windows whose record is to be kept."""
    add_distances(vectors)
    stored = [vectors.split(each.float()) for each in new]
    grown, mixed = [], []  # mixed: batch, past and the share of the past
    for record, is_kept, values, recorded in zip(vectors.records, keep, *stored, strict=True):
        window, of = record.window, record.derivative
        window.cached = None
        if not is_kept:
            continue
        if record.past is None:
            window.clear()
        window.values, window.recorded = values, recorded
        window.is_without_bias = record.bias is not None
        window.seen += 1
        if of is None:
            continue
        grown.append((record, of.mean, of.var))
        if record.past is not None:
            rest = 1 - record.share
            mixed += (of.mean, window.m, rest), (of.var, window.h, rest)
    if mixed:
        batch, past, rests = zip(*mixed, strict=True)
        past = [each.to(of.dtype) for each, of in zip(past, batch, strict=True)]
        kernels.lerp_each_(batch, past, rests)
    for record, m, h in grown:
        window = record.window
        window.m, window.h = m.float(), h.to(window.dtype)
        if window.dtype != torch.float32:
            window.values[1] += _left_out(record.weight, h, window.h)
