# Licensed under the Apache License, Version 2.0.
"""Normalisation with the window's statistics, and its gradients.

Paper: Cross-Iteration Batch Normalization, https://arxiv.org/abs/2002.05712, equation 10. The union
of past and current batch has the mean ``mu_bar`` and the variance ``sigma2``. With ``r = (sigma2 +
eps)^-1/2`` and ``x_hat = (y - mu_bar) r``, the layer's output is

    z = gamma x_hat + beta

The current batch, of ``M`` positions per channel, is the share ``s`` of the union. If ``g`` is the
gradient of the loss in ``z`` times ``gamma``, the gradient in ``y`` is

    dL/dy = r [g - s (E[g] + x_hat E[g x_hat]) - (1 - s) (e_b + x_hat e_g)]

    current, window    e_b = e_g = 0
    mixed              e_b, e_g = s (E[g], E[g x_hat]) + (1 - s) (E_b, E_g)

The first row is the derivative with the past as a constant. Batch normalisation subtracts a common
part, ``E[g] + x_hat E[g x_hat]``; this row subtracts only the share ``s`` of it. ``mixed``
subtracts the rest as averages of both sums, which include the batch; ``E_b`` and ``E_g`` are those
over past iterations. Without the batch, its deviation from them would go on to earlier layers,
whose changes no window sees at once. The batch's sums alone would leave little to learn from if
maps have few positions.

The past's statistics ``mu_p`` and ``V`` also depend on today's weight and bias. The paper
(``current``) takes them as constants. Otherwise, with ``U = dL/d mu_bar = -r M E[g]``, ``S = dL/d
sigma2 = -1/2 r^2 M E[g x_hat]`` and ``d = mu - mu_p``,

    dL/d mu_p = (1 - s) (U - 2 s S d)           dL/d V = (1 - s) S

The window passes these on to the weight; the bias receives ``dL/d mu_p`` as it is. Without this
part, the weight gradient is not orthogonal to the weight, whose norm then drifts upwards: at one
image per batch, training fails. Weight and bias need this gradient whatever the input receives. So
they are given back what ``e_b`` and ``e_g`` subtract from ``dL/dy``. With ``E[x_hat phi] = r (h / 2
+ (mu - mu_bar) m)``, which is ``r (h' / 2 + (mu - mu_bar) M)`` with a moving window's ``h'``,

    dL/dw += (1 - s) r M (e_b m + e_g E[x_hat phi])
    dL/db += (1 - s) r M (e_b + e_g r (mu - mu_bar))

A batch may be spread over processes, which may differ in their estimate of the past. Each position
then receives the sum of the gradients from all processes. With ``mu`` and ``M`` of the whole batch,
``s (E[g] + x_hat E[g x_hat])`` becomes ``-(sum(s U) + 2 sum(s S (mu - mu_bar)) + 2 (y - mu) sum(s
S)) / (r M)``, where ``s`` includes the part of the batch's own sums in ``e_b`` and ``e_g`` (given
back in full if all processes have the same share). Here ``m`` and ``h`` are of a process's own
positions, with the mean ``mu_o``, and ``E[x_hat phi]`` has the further term ``(mu_o - mu) m``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import kernels
from .moments import full_precision
from .record import Record, Vectors
from .sync import joint_sum
from .window import MovingWindow


class Coefficients(NamedTuple):
    """The coefficients by which a record's backward pass turns its two sums into gradients.

    From ``sum(g)`` and ``sum(g x_hat)``, both without ``gamma``, the pass computes rows ``on_mean
    sum(g) + on_var sum(g x_hat) + constant``:

        0, 1    added to ``r g``, the second times ``y``; on a GPU divided by the scale
        2, 3    the gradients in ``mu_p`` and in ``V``

    and, where averages are kept (``mixed``),

        4, 5    what weight and bias are given back: factors of ``m`` and ``h`` (with a moving
                window ``h'``, and row 2 includes a factor of ``M``)
        6, 7    the sums, times ``gamma`` unless the batch is spread

    Attributes:
        r: ``(C,)``.
        scale: ``r gamma``, ``(C,)``.
        on_mean: ``(4, C)`` or ``(8, C)``.
        on_var: Likewise.
        constant: Likewise, or None for 0.
        of_own: If the batch is spread, coefficients of the process's own sums, ``(3, C)``: of
            ``sum(g)`` for ``dL/d mu_p``, then of ``sum(g x_hat)`` for ``dL/d mu_p`` and ``dL/d V``.
            Rows 2 and 3 above then contain only what is given back.
    """

    r: Tensor
    scale: Tensor
    on_mean: Tensor
    on_var: Tensor
    constant: Tensor | None
    of_own: Tensor | None


def coefficients(vectors: Vectors) -> list[Coefficients]:
    """The coefficients of records that all have the same gradient and are spread alike."""
    records, mean, r = vectors.records, vectors.union[0], (vectors.union[1] + vectors.eps).rsqrt_()
    is_mixed, is_spread = records[0].backward == "mixed", records[0].is_spread
    shares = [record.share for record in records]
    counts = [record.moments.own_count for record in records]
    taken, own_part, past, average_part, own_count = vectors.spread(
        [
            -_taken_off(is_mixed, s) / (1 if is_spread else m)
            for s, m in zip(shares, counts, strict=True)
        ],
        [-s for s in shares],
        [s - 1 for s in shares],
        [(1 - s) ** 2 for s in shares],
        counts,
    )
    nothing = torch.zeros_like(r)
    gammas = [record.gamma for record in records]
    gamma = None if all(each is None for each in gammas) else vectors.cat(gammas, 1.0)
    each = scale = r if gamma is None else r * gamma
    if is_spread:
        # Sums over all processes include the scale of each already.
        each = torch.ones_like(r)
        count = torch.cat([record.moments.count.expand_as(record.mean) for record in records])
        taken, own_part = taken / count, own_part * own_count / count
    off = each * taken
    rest = each * past  # the part of dL/d mu_bar for the past
    on_var = rest * r  # twice the part of dL/d sigma2
    is_moving = isinstance(records[0].window, MovingWindow)
    masks = [record.past and record.past.positive for record in records]
    of_var = on_var / 2
    if is_moving and any(mask is not None for mask in masks):
        of_var = of_var * vectors.cat(masks, 1.0)
    slope = off * r
    on_means = [off, nothing, rest, nothing]
    on_vars = [
        *(torch.addcmul(nothing, slope, mean, value=-1), slope),
        *(on_var * (vectors.past[0] - mean), of_var),
    ]
    of_own, constant = None, None
    if is_spread:
        of_own = torch.stack((rest, *on_vars[2:]))
        on_means[2] = on_vars[2] = on_vars[3] = nothing
    if is_mixed:
        from_batch = nothing
        if is_spread:
            own_means = [record.moments.own_mean for record in records]
            from_batch = torch.cat(own_means) - vectors.batch[0]
        # mu - mu_bar goes with m beside h, but with M beside h'.
        place = 2 if is_moving else 4
        back, of_m = on_var * own_part, rest * own_part
        one = torch.ones_like(r) if gamma is None or is_spread else gamma
        on_means += [of_m, nothing, one, nothing]
        on_vars += [back * from_batch, back / 2, nothing, one]
        on_vars[place] = torch.addcmul(on_vars[place], back, vectors.from_union)
        averages = [record.averages for record in records]
        if any(each is not None for each in averages):
            e_b, e_g = vectors.cat(averages, 0.0) * (r * (average_part * _scale(records[0], r)))
            e_g = e_g * r
            back = e_g * own_count
            of_m = torch.addcmul(e_b * own_count, back, from_batch)
            rows = [e_g * mean - e_b, e_g.neg(), nothing, nothing, of_m, back / 2, nothing, nothing]
            rows[place] = torch.addcmul(rows[place], back, vectors.from_union)
            constant = torch.stack(rows)
    scale, stacks = kernels.not_zero(scale), [torch.stack(on_means), torch.stack(on_vars), constant]
    if kernels.is_gpu(r):  # affine_sum expects rows divided by the scale
        for each in stacks:
            if each is not None:
                each[:2].div_(scale)
    parts = [
        [None] * len(records) if each is None else vectors.split(each)
        for each in (r, scale, *stacks, of_own)
    ]
    return [Coefficients(*each) for each in zip(*parts, strict=True)]


class Normalize(Function):
    """Normalises with the window's statistics.

    ``apply`` takes

    - ``y``, the output of the convolution, ``(N, C, H, W)``;
    - ``gamma``, the scale, ``(C,)``, or None for 1;
    - ``beta``, the shift, ``(C,)``, or None for 0;
    - ``conv_weight``, the convolution's weight, if it is to receive the gradient through the past,
      which is a function of it; else None;
    - ``conv_bias``, the convolution's bias, likewise;
    - ``record``, with the statistics that the forward found and the choice of gradient; the
      backward pass adds its sums to it.

    It returns the normalised tensor, in the dtype and memory format of ``y``.
    """

    @staticmethod
    def forward(ctx, y, gamma, beta, conv_weight, conv_bias, record):
        """Returns the normalised tensor."""
        ctx.record = record
        ctx.conv_shape = None if conv_weight is None else conv_weight.shape
        ctx.save_for_backward(y)
        return kernels.standardize(y, gamma, beta, record.mean, record.var, record.layer.eps)

    @staticmethod
    def backward(ctx, grad):
        """Returns the gradients in the arguments of ``apply``."""
        # once_differentiable takes as long as a kernel, and only matters if gradients are on.
        return (once_differentiable(_backward) if torch.is_grad_enabled() else _backward)(ctx, grad)


def _backward(ctx, grad):
    record, (y,) = ctx.record, ctx.saved_tensors
    if record.has_ended:
        raise record.layer.refusal(
            "the backward pass comes after the end of its iteration, which has changed the past. "
            "Call cbn_mmdet.step(model) after the backward pass."
        )
    needs_y, needs_gamma, needs_beta, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    with full_precision(y.device.type):
        if record.coefficients is None:
            record.finish(record)
        of = record.coefficients
        sums = kernels.channel_sums(grad, y, record.mean, record.var, record.layer.eps, of.r)
        grad_gamma, grad_beta = sums
        rows = (_rows_of_all if record.is_spread else _rows)(record, of, grad_beta, grad_gamma)
        grad_y = grad_weight = grad_bias = None
        offset, slope, of_mean, of_var, *others = rows.unbind()
        gives_back = record.backward == "mixed"
        if gives_back:
            of_m, of_h, *sums = others
            (record.original or record).add_sums(sums)
        if needs_y:
            grad_y = kernels.affine_sum(grad, y, of.scale, offset, slope)
        if needs_bias:
            grad_bias = of_mean + of_m if gives_back else of_mean
        if needs_weight:
            # Not a view, because autograd adds the convolution's own gradient to it in place.
            grad_weight = torch.empty(ctx.conv_shape, dtype=rows.dtype, device=rows.device)
            by_row = grad_weight.view(len(offset), -1)
            record.past.gradient(of_mean, of_var, by_row)
            if gives_back:
                by_row.addcmul_(record.derivative.var, of_h.unsqueeze(1))
                kernels.add_outer_(by_row, of_m, record.derivative.mean)
    return (
        grad_y,
        grad_gamma if needs_gamma else None,
        grad_beta if needs_beta else None,
        grad_weight,
        grad_bias,
        None,
    )


def _rows(record: Record, of: Coefficients, on_mean: Tensor, on_var: Tensor) -> Tensor:
    """Computes the rows of :class:`Coefficients`, ``(K, C)``, from sums of ``(C,)``."""
    first = record.original or record
    if of.constant is None or first.is_constant_used:
        rows = of.on_mean * on_mean
    else:
        rows = torch.addcmul(of.constant, of.on_mean, on_mean)
        # Only once per forward, even if its gradient comes in several backward passes.
        first.is_constant_used = True
    return rows.addcmul_(of.on_var, on_var)


def _rows_of_all(record: Record, of: Coefficients, on_mean: Tensor, on_var: Tensor) -> Tensor:
    """The same for a spread batch, in which ``y`` receives gradients from all processes."""
    own_mean, own_var = of.scale * on_mean, of.scale * on_var
    # Sums -U - 2 S (mu - mu_bar) and -2 S over processes, then returns to x_hat's centre and scale.
    # Each process weighs its terms by its own share; the rows do so again, hence the division.
    distance, slope = record.moments.mean - record.mean, own_var * of.r
    share = _taken_off(record.backward == "mixed", record.share)
    sums = joint_sum(torch.addcmul(own_mean, slope, distance) * share, slope * share)
    all_mean, slope = (each / share for each in sums)
    all_mean = torch.addcmul(all_mean, slope, distance, value=-1)
    rows = _rows(record, of, all_mean, slope / of.r)
    on_mean, *on_var = of.of_own.unbind()
    rows[2].addcmul_(on_mean, own_mean)
    rows[2:4].addcmul_(torch.stack(on_var), own_var)
    return rows


def _taken_off(is_mixed: bool, share: float) -> float:
    """The part of the batch's own sums that is subtracted in ``dL/dy``, in all."""
    return share + (1 - share) * share if is_mixed else share


@torch.no_grad()
def new_averages(vectors: Vectors) -> Tensor:
    """The new ``E_b`` and ``E_g``, averages of the backward pass's sums, ``(2, N)``.

    They are meaningless for records that no backward pass has reached.
    """
    records = vectors.records
    now = vectors.cat_pairs([record.sums for record in records], vectors.union)
    # Sums over all processes include r.
    if records[0].is_spread:
        count = torch.cat([record.moments.count.expand_as(record.mean) for record in records])
        now = now * ((vectors.union[1] + vectors.eps).sqrt_() / count)
    else:
        (count,) = vectors.spread([record.moments.count for record in records])
        now = now / count
    scale = _scale(records[0], now)
    if isinstance(scale, Tensor) or scale != 1:
        now = now / scale
    past = vectors.cat([record.past and record.window.sums for record in records], now)
    return past.lerp(now, vectors.share)


def _scale(record: Record, like: Tensor) -> float | Tensor:
    """The factor of the loss; a loss scaler's is a tensor, perhaps on another device."""
    scale = record.scale
    return scale.to(like.device, non_blocking=True) if isinstance(scale, Tensor) else scale
