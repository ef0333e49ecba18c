# Licensed under the Apache License, Version 2.0.
"""Normalisation with the window's statistics, and its gradients.

Cross-Iteration Batch Normalization, https://arxiv.org/abs/2002.05712, equation 10. With the mean
``mu_bar`` and variance ``sigma2`` of the union of past and current batch, ``r = (sigma2 +
eps)^-1/2`` and ``x_hat = (y - mu_bar) r``,

    z = gamma x_hat + beta

The current batch, of ``M`` positions per channel, is the share ``s`` of the union. With ``g``, the
gradient of the loss in ``z`` times ``gamma``, what reaches ``y`` is

    dL/dy = r [g - s (E[g] + x_hat E[g x_hat]) - (1 - s) (e_b + x_hat e_g)]

    current, window    e_b = e_g = 0
    full               e_b, e_g = E_b, E_g
    own                e_b, e_g = E[g], E[g x_hat]
    mixed              s (E[g], E[g x_hat]) + (1 - s) (E_b, E_g)

The first is the derivative with the past as a constant. The common part of the gradient that batch
normalisation takes off is then left in but for the share ``s``: ``full`` takes the rest off as the
averages ``E_b`` and ``E_g`` of both sums over past iterations, ``own`` as the batch's own. The
averages are right in the mean, and leave in what one batch pulls beside it, which goes on to
earlier layers, whose doing no window sees at once; to take off the batch's own leaves little to
learn from where maps have few positions. ``mixed`` takes the averages that the batch has entered.

The past's statistics ``mu_p`` and ``V`` depend on today's weight and bias as well. The paper
(``current``) takes them as constants. Otherwise, with ``U = dL/d mu_bar = -r M E[g]``, ``S = dL/d
sigma2 = -1/2 r^2 M E[g x_hat]`` and ``d = mu - mu_p``,

    dL/d mu_p = (1 - s) (U - 2 s S d)           dL/d V = (1 - s) S

which the window passes on to the weight; the bias moves ``mu_p`` as it is. Without this share the
weight's gradient is not orthogonal to the weight, whose norm then drifts upwards: at one image per
batch training fails. Weight and bias are to have this gradient whatever goes on to the input, so
they are given back what these take off ``dL/dy``: with ``E[x_hat phi] = r (h / 2 + (mu - mu_bar)
m)``, which is ``r (h' / 2 + (mu - mu_bar) M)`` with a moving window's ``h'``,

    dL/dw += (1 - s) r M (e_b m + e_g E[x_hat phi])
    dL/db += (1 - s) r M (e_b + e_g r (mu - mu_bar))

If the current batch is spread over processes, which may differ in their estimate of the past, each
position receives the sum of what reaches it from all of them: with the mean ``mu`` of the current
batch, of ``M`` positions in all, ``s (E[g] + x_hat E[g x_hat])`` becomes ``-(sum(s U) + 2 sum(s S
(mu - mu_bar)) + 2 (y - mu) sum(s S)) / (r M)``, with the part of ``own`` added to ``s``
(and given back in full where all processes have the same share). There ``m`` and ``h`` are of a
process's own positions, of the mean ``mu_o``, and ``E[x_hat phi]`` has ``(mu_o - mu) m`` besides.
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

AVERAGES = ("full", "mixed")  # the gradients that keep them
GIVES_BACK = (*AVERAGES, "own")


class Coefficients(NamedTuple):
    """What a record's backward pass makes of its sums.

    Of ``sum(g)`` and ``sum(g x_hat)``, less ``gamma``, it makes rows, ``on_mean sum(g) + on_var
    sum(g x_hat) + constant``:

        0, 1    what is added to ``r g``, alone and times ``y``; on a GPU over the scale
        2, 3    of ``M``, that is of ``mu_p``, and of ``H``, that is of ``V``
        4, 5    where weight and bias are given something back, of ``m - M`` and ``h'``; in a
                sliding window of ``m`` and ``h``
        6, 7    where averages are kept, the sums themselves: those that autograd hands on as
                gradients it would copy if they were held

    Attributes:
        r: ``(C,)``.
        scale: ``r gamma``, ``(C, 1, 1)``; without the last dimensions if the batch is spread.
        on_mean: ``(4, C, 1)``, ``(6, C, 1)`` or ``(8, C, 1)``.
        on_var: Likewise.
        constant: Likewise, or None for 0.
        of_own: If the batch is spread, what is made of the process's own sums for ``dL/d mu_p``
            and ``dL/d V``: that of ``sum(g)`` for the first, those of ``sum(g x_hat)`` for both,
            ``(3, C, 1)``; the rows above have what is given back alone.
    """

    r: Tensor
    scale: Tensor
    on_mean: Tensor
    on_var: Tensor
    constant: Tensor | None
    of_own: Tensor | None


def coefficients(vectors: Vectors) -> list[Coefficients]:
    """The coefficients of each record; all have the same gradient, and are spread alike."""
    records, mean, r = vectors.records, vectors.union[0], (vectors.union[1] + vectors.eps).rsqrt_()
    backward, is_spread = records[0].backward, records[0].is_spread
    shares = [record.share for record in records]
    counts = [record.moments.own_count for record in records]
    own_parts = [_of_batch(backward, s) for s in shares]
    taken, past, own_part, average_part, own_count = vectors.spread(
        [
            -_taken_off(backward, s) / (1 if is_spread else m)
            for s, m in zip(shares, counts, strict=True)
        ],
        [s - 1 for s in shares],
        [-part for part in own_parts],
        [(1 - s) * (1 - part) for s, part in zip(shares, own_parts, strict=True)],
        counts,
    )
    nothing = torch.zeros_like(r)
    each = scale = r if vectors.gammas is None else r * vectors.gammas
    if is_spread:
        # Sums of all processes have the scales of each already.
        each = torch.ones_like(r)
        count = torch.cat([record.moments.count.expand_as(record.mean) for record in records])
        taken, own_part = taken / count, own_part * own_count / count
    off = each * taken
    rest = each * past  # of dL/d mu_bar, to the past
    on_var = rest * r  # twice that of dL/d sigma2
    masks = [record.past and record.past.mask for record in records]
    of_var = on_var / 2
    if any(mask is not None for mask in masks):
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
    is_moving = isinstance(records[0].window, MovingWindow)
    if backward in GIVES_BACK:
        distance = vectors.from_union
        if is_spread:  # of the process's own mean from the union's, and from the whole batch's
            own_mean = torch.cat([record.moments.own_mean for record in records])
            distance, from_batch = own_mean - mean, own_mean - vectors.batch[0]
        on_means += [nothing, nothing]
        on_vars += [nothing, nothing]
    if backward in ("own", "mixed"):
        back, of_m = on_var * own_part, rest * own_part
        on_vars[5] = back / 2
        if is_moving:  # m is M and m - M
            on_means[2] = on_means[2] + of_m
            on_vars[2] = torch.addcmul(on_vars[2], back, distance)
            on_means[4], on_vars[4] = of_m, back * from_batch if is_spread else nothing
        else:
            on_means[4], on_vars[4] = of_m, back * distance
    if backward in AVERAGES:
        one = torch.ones_like(r)
        on_means += [one, nothing]
        on_vars += [nothing, one]
        averages = [record.averages for record in records]
        if any(each is not None for each in averages):
            e_b, e_g = vectors.cat(averages, 0.0) * (r * (average_part * _scale(records[0], r)))
            e_g = e_g * r
            back, of_m = e_g * own_count, e_b * own_count
            of_all = torch.addcmul(of_m, back, distance)
            if is_moving and is_spread:
                of_m = torch.addcmul(of_m, back, from_batch)
            constant = torch.stack(
                (
                    *(e_g * mean - e_b, e_g.neg(), of_all if is_moving else nothing, nothing),
                    *(of_m if is_moving else of_all, back / 2, nothing, nothing),
                )
            )
    scale, stacks = kernels.not_zero(scale), [torch.stack(on_means), torch.stack(on_vars), constant]
    if kernels.is_gpu(r):  # where affine_sum wants them so
        for each in stacks:
            if each is not None:
                each[:2].div_(scale)
    parts = [
        [None] * len(records) if each is None else vectors.split_columns(each)
        for each in (*stacks, of_own)
    ]
    scale = scale if is_spread else scale.view(-1, 1, 1)
    parts = [vectors.split(r), torch.split_with_sizes(scale, vectors.sizes), *parts]
    return [Coefficients(*each) for each in zip(*parts, strict=True)]


class Normalize(Function):
    """Normalises with the window's statistics.

    ``apply`` takes

    - ``y``, the output of the convolution, ``(N, C, H, W)``;
    - ``gamma``, the scale, ``(C,)``, or None for 1;
    - ``beta``, the shift, ``(C,)``, or None for 0;
    - ``conv_weight``, the convolution's weight if it is to receive the gradient through the past,
      which is a function of it, else None;
    - ``conv_bias``, the convolution's bias, likewise;
    - ``record``, what the forward found, and which gradient is asked for; the backward pass adds
      its sums to it;
    - ``eps``, which is added to the variance;

    and returns the normalised tensor, in the dtype and memory format of ``y``.
    """

    @staticmethod
    def forward(ctx, y, gamma, beta, conv_weight, conv_bias, record, eps):
        """The normalised tensor."""
        ctx.record, ctx.eps = record, eps
        ctx.conv_shape = None if conv_weight is None else conv_weight.shape
        ctx.save_for_backward(y)
        return kernels.standardize(y, gamma, beta, record.mean, record.var, eps)

    @staticmethod
    def backward(ctx, grad):
        """The gradients in what ``apply`` takes."""
        # Turning off gradients that are off takes as long as a kernel.
        return (once_differentiable(_backward) if torch.is_grad_enabled() else _backward)(ctx, grad)


def _backward(ctx, grad):
    record, eps, (y,) = ctx.record, ctx.eps, ctx.saved_tensors
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
        sums = kernels.channel_sums(grad, y, record.mean, record.var, eps, of.r)
        grad_gamma, grad_beta = sums
        rows = (_rows_of_all if record.is_spread else _rows)(record, of, grad_beta, grad_gamma)
        grad_y = grad_weight = grad_bias = None
        if needs_y:
            grad_y = kernels.affine_sum(grad, y, of.scale.view(-1, 1, 1), rows[:2])
        if needs_bias:
            is_whole = rows.shape[0] == 4 or isinstance(record.window, MovingWindow)
            grad_bias = (rows[2] if is_whole else rows[2] + rows[4]).view(-1)
        if needs_weight:
            # No view: autograd adds the convolution's own gradient to it in place.
            grad_weight = torch.empty(ctx.conv_shape, dtype=rows.dtype, device=rows.device)
            by_row = grad_weight.view(record.mean.shape[0], -1)
            record.past.gradient(rows[2:], record, by_row)
    return (
        grad_y,
        grad_gamma if needs_gamma else None,
        grad_beta if needs_beta else None,
        grad_weight,
        grad_bias,
        None,
        None,
    )


def _rows(record: Record, of: Coefficients, on_mean: Tensor, on_var: Tensor) -> Tensor:
    """The rows that :class:`Coefficients` describes, ``(K, C, 1)``, from sums of ``(C,)``."""
    first = record.original or record
    on_mean, on_var = on_mean.unsqueeze(1), on_var.unsqueeze(1)
    if of.constant is None or first.is_constant_used:
        rows = of.on_mean * on_mean
    else:
        rows = torch.addcmul(of.constant, of.on_mean, on_mean)
        # Once for a forward, whose gradient may come in several backward passes.
        first.is_constant_used = True
    rows.addcmul_(of.on_var, on_var)
    if record.backward not in AVERAGES:
        return rows
    first.add_sums(rows[6:, :, 0])
    return rows[:6]


def _rows_of_all(record: Record, of: Coefficients, on_mean: Tensor, on_var: Tensor) -> Tensor:
    """The same where the batch is spread: what y is to receive comes from all processes."""
    own_mean, own_var = of.scale * on_mean, of.scale * on_var
    # -U - 2 S (mu - mu_bar) and -2 S of all, back to x_hat's centre and scale. Each has its own
    # share of the batch, which the rows have once more.
    distance, slope = record.moments.mean - record.mean, own_var * of.r
    share = _taken_off(record.backward, record.share)
    sums = joint_sum(torch.addcmul(own_mean, slope, distance) * share, slope * share)
    all_mean, slope = (each / share for each in sums)
    all_mean = torch.addcmul(all_mean, slope, distance, value=-1)
    rows = _rows(record, of, all_mean, slope / of.r)
    on_mean, *on_var = of.of_own.unbind()
    rows[2].addcmul_(on_mean, own_mean.unsqueeze(1))
    rows[2:4].addcmul_(torch.stack(on_var), own_var.unsqueeze(1))
    return rows


def _of_batch(backward: str, share: float) -> float:
    """The part of the batch's own sums in ``(e_b, e_g)``."""
    return {"own": 1.0, "mixed": share}.get(backward, 0.0)


def _taken_off(backward: str, share: float) -> float:
    """The part of them in all that is taken off what goes on to ``y``."""
    return share + (1 - share) * _of_batch(backward, share)


@torch.no_grad()
def new_averages(vectors: Vectors) -> Tensor:
    """What the averages of the backward pass's sums become, ``E_b`` and ``E_g``, ``(2, N)``.

    Of records that no backward pass has reached they mean nothing.
    """
    records = vectors.records
    now = vectors.cat([record.sums for record in records], vectors.union)
    # g is the incoming gradient times gamma; sums of all processes have it already, and r.
    if records[0].is_spread:
        count = torch.cat([record.moments.count.expand_as(record.mean) for record in records])
        now = now * ((vectors.union[1] + vectors.eps).sqrt_() / count)
    else:
        (count,) = vectors.spread([record.moments.count for record in records])
        now = now / count if vectors.gammas is None else now * (vectors.gammas / count)
    scale = _scale(records[0], now)
    if isinstance(scale, Tensor) or scale != 1:
        now = now / scale
    past = vectors.cat([record.past and record.window.sums for record in records], now)
    return past.lerp(now, vectors.share)


def _scale(record: Record, like: Tensor) -> float | Tensor:
    """What the loss is multiplied by; a loss scaler's is a tensor on a device of its own."""
    scale = record.scale
    return scale.to(like.device, non_blocking=True) if isinstance(scale, Tensor) else scale
