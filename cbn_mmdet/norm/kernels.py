# Licensed under the Apache License, Version 2.0.
"""Fast implementations of the formulas.

Each function's docstring has the plain formula that it computes. The fast path for a device and a
size is chosen in one place. All of them compute in float32 at least.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .moments import Source

# On the CPU, two reductions beat the kernel for the moments from _LARGE numbers on. They lose too
# many digits where the squared mean exceeds the variance by more than the factor _FAR.
_LARGE = 1 << 16
_FAR = 64

# Up to this many positions, one product over whole maps beats two over rows and columns: 6 against
# 28 us for 128 channels of 8x8, equal for 32x32, 635 against 275 us for 100x100 (one thread).
_SMALL_MAP = 1024

# As an fp16 output gradient, y - mu is divided by its standard deviation and by the number of
# positions, so that the sum over 1e5 positions cannot overflow. This factor keeps the quotient out
# of fp16's subnormal range.
HALF_SCALE = 16.0

# Up to this many weights, similar layers are faster in one product, copies included.
_SMALL_WEIGHT = 1 << 14
_TINY = 1e-20  # any smaller scale counts as zero; below any variance of fp16 numbers but zero
_BLOCK = 1 << 17  # numbers that fit in a cache


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of a ``dtype`` tensor are computed: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_gpu(tensor: Tensor) -> bool:
    """Whether to take a GPU's path: few launches, and no matrix product that may use TF32."""
    return tensor.is_cuda


def version_of(tensor: Tensor | None) -> int:
    """Autograd's count of in-place changes to a tensor; 0 if it has none, -1 for None."""
    if tensor is None:
        return -1
    return 0 if tensor.is_inference() else tensor._version


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """``E[y]`` and ``E[(y - E[y])^2]`` of each channel, ``(C,)``, in float32 at least."""
    dtype = statistics_dtype(y.dtype)
    if y.dtype == torch.float16:
        y = _without_gaps(y)
    if y.dtype == dtype and not is_gpu(y) and y.numel() >= _LARGE and y.is_contiguous():
        return _moments_in_two_reductions(y)
    if y.dtype == dtype or y.is_cuda:  # CUDA's kernel returns float32 of half precision
        return torch.batch_norm_update_stats(y, None, None, 0.0)
    # Without float32 running statistics, a CPU's kernel returns half precision.
    unused = y.new_empty(2, y.shape[1], dtype=dtype)
    return torch.batch_norm_update_stats(y, unused[0], unused[1], 0.0)


def _without_gaps(y: Tensor) -> Tensor:
    """Copies fp16 maps that lie apart, because a GPU's kernels would round their mean to fp16."""
    if not is_gpu(y) or y.is_contiguous():
        return y
    return y if y.is_contiguous(memory_format=torch.channels_last) else y.clone()


def _moments_in_two_reductions(y: Tensor) -> tuple[Tensor, Tensor]:
    """The same as ``E[y]`` and ``E[(y - mu) y]``, for large maps on the CPU.

    There, the kernel for the moments sums squares one by one, while batch norm's backward kernel
    uses vector instructions: for 2 images of 256 channels of 100x100, 4.2 ms against 0.8 (two
    threads). If a mean is far from 0, the latter would lose digits, and the former is used.
    """
    mean = y.mean((0, 2, 3))
    one = torch.ones_like(mean)
    var = channel_sums(y, y, mean, one, 0.0, one)[0] / (y.numel() // y.shape[1])
    if (mean.square() > _FAR * var).any():
        return torch.batch_norm_update_stats(y, None, None, 0.0)
    return mean, var


def centred(y: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """``2 (y - mean) / M`` as an output gradient, in the dtype of ``y``.

    In fp16, it is multiplied by ``HALF_SCALE r``, which :func:`rescaled` takes out of a sum of it,
    and mean and variance are computed anew.

    Returns:
        The gradient; in fp16 ``r``, ``(C,)``, else None; and the variance of ``y``.
    """
    scale, like = 2 * y.shape[1] / y.numel(), (mean.dtype, y.device)  # 2 / M
    if y.dtype == torch.float16:
        of, none = (constant(len(mean), value, *like) for value in (HALF_SCALE * scale, 0.0))
        # A variance of zero leaves a constant channel at 0.
        y = _without_gaps(y)
        of_y, _, r = torch.native_batch_norm(y, of, none, None, None, True, 0.0, _TINY)
        if not is_gpu(y):  # a CPU rounds y r and mean r separately, and r is 1e10 there
            of_y.masked_fill_((r * r * _TINY > 0.5).view(-1, 1, 1), 0)
        return of_y, r, r.pow(-2)
    if is_gpu(y):  # one kernel
        none, one, of = (constant(len(mean), value, *like) for value in (0.0, 1.0, scale))
        return torch.batch_norm_elemt(y, of, none, mean, one, 0.0), None, var
    of_y = torch.add((mean * -scale).view(-1, 1, 1), y, alpha=scale)
    return (of_y if of_y.dtype == y.dtype else of_y.to(y.dtype)), None, var


def rescaled(gradient: Tensor, r: Tensor) -> Tensor:
    """``gradient / (HALF_SCALE r)``, ``(C, P)``, in the dtype of ``r``, in one launch."""
    nothing = constant(len(r), 0.0, r.dtype, r.device)
    return torch.addcdiv(nothing[:, None], gradient, r[:, None], value=1 / HALF_SCALE)


def channel_sums(
    grad: Tensor, y: Tensor, mean: Tensor, var: Tensor, eps: float, r: Tensor
) -> tuple[Tensor, Tensor]:
    """``sum(grad x_hat)`` and ``sum(grad)``, each ``(C,)``, in one pass of batch norm's kernel.

    ``x_hat`` is ``(y - mean) r``, where ``r`` is ``1 / sqrt(var + eps)``. ``grad`` and ``y`` may be
    in half precision; statistics and sums are not.
    """
    if y.numel() == 0:  # the kernel divides by the number of positions
        return torch.zeros_like(mean), torch.zeros_like(mean)
    # The CPU's kernel reads mean and var as running statistics, a GPU's reads mean and r as saved
    # by a forward. The latter also needs a scale, but only for the dtype of its results.
    return torch.ops.aten.native_batch_norm_backward.default(
        grad, y, r, mean, var, mean, r, False, eps, [False, True, True]
    )[1:]


def standardize(
    y: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """``gamma (y - mean) / sqrt(var + eps) + beta`` of each channel, in the dtype of ``y``.

    One pass of batch norm's own kernel, which computes in float32 at least.
    """
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(y, gamma, beta, mean, var, False, 0.0, eps, cudnn)


def affine_sum(grad: Tensor, y: Tensor, scale: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
    """``scale grad + offset + slope y`` of each channel, in the dtype of ``y``.

    In float32, as rounding terms that nearly cancel would leave a residue. On a GPU, one pass of
    SyncBN's backward kernel computes it as ``scale (grad - (a + b y) / count)``.

    Args:
        grad: Incoming gradient, like ``y``, ``(N, C, H, W)``.
        y: Input of the layer.
        scale: ``(C,)``; on a GPU, as :func:`not_zero` returns it.
        offset: ``(C,)``; on a GPU, divided by the scale.
        slope: Likewise.
    """
    if y.is_cuda and y.numel() > 0:
        like = slope.dtype, y.device
        none, one = (constant(y.shape[1], value, *like) for value in (0.0, 1.0))
        count = constant(1, -1, torch.int32, y.device)  # the kernel divides a and b by it
        last = torch.channels_last
        is_last = y.is_contiguous(memory_format=last)
        grad = grad.contiguous(memory_format=last if is_last else torch.contiguous_format)
        statistics = none, one, scale, offset, slope, count
        return torch.batch_norm_backward_elemt(grad, y, *statistics)
    offset, slope, scale = (each.view(-1, 1, 1) for each in (offset, slope, scale))
    total = torch.addcmul(offset, y, slope)
    total = (total + grad) * scale if is_gpu(y) else total.addcmul_(grad, scale)
    return total if total.dtype == y.dtype else total.to(y.dtype)


def not_zero(scale: Tensor) -> Tensor:
    """Replaces scales of 0 by 1e-20, because rows for :func:`affine_sum` are divided by them.

    1e-20 of the incoming gradient then goes on. On a CPU, 0 stays.
    """
    return torch.where(scale.abs() < _TINY, _TINY, scale) if is_gpu(scale) else scale


# A convolution's patches.


def weight_gradient(source: Source, gradient: Tensor, stride: int) -> Tensor:
    """``sum_p gradient_p phi_p`` over every ``stride``-th row and column, ``(C_out, P)``.

    This is the weight gradient of the same convolution with its stride multiplied.
    """
    x, weight = source.input, source.weight
    steps = source.stride if stride == 1 else [step * stride for step in source.stride]
    if stride > 1 and weight[0, 0].numel() == 1 and not any(source.padding):
        # A strided convolution is slower than slicing: 1.3 against 0.5 ms for 256 to 64 channels.
        x, steps = x[:, :, :: steps[0], :: steps[1]].contiguous(), [1, 1]
    return torch.ops.aten.convolution_backward.default(
        gradient,
        x,
        weight if weight.dtype == x.dtype else x.new_empty(weight.shape),  # only its shape is read
        None,
        steps,
        source.padding,
        source.dilation,
        False,
        [0, 0],
        source.groups,
        [False, True, False],
    )[1].flatten(1)


def mean_patch(source: Source, y: Tensor) -> Tensor:
    """``E[phi]``, the mean patch, ``(groups, P)``.

    The sum over output positions is separable: along each axis, a 0/1 matrix says which input rows
    (columns) meet which tap of the kernel. One pass over the input serves all taps.
    """
    x, padding, strides, groups = source.input, source.padding, source.stride, source.groups
    dtype = statistics_dtype(x.dtype)
    (images, channels, *size), outputs, kernel = x.shape, y.shape[2:], source.weight.shape[2:]
    if kernel.numel() == 1 and not any(padding):
        seen = x[:, :, :: strides[0], :: strides[1]]
        return seen.mean((0, 2, 3), dtype=dtype).view(groups, -1)
    geometry = tuple(size), outputs, kernel, tuple(strides), tuple(padding), tuple(source.dilation)
    if size[0] * size[1] <= _SMALL_MAP:
        one = x if images == 1 else x.mean(0, dtype=dtype)
        one = one.reshape(channels, -1)
        one = one if one.dtype == dtype else one.to(dtype)
        return torch.mm(one, _map_taps(geometry, dtype, x.device)).view(groups, -1)
    axes = tuple(zip(*geometry, strict=True))
    # A power of two is exact in half precision, and keeps a sum over rows within its range.
    shrink = 2.0 ** -outputs[0].bit_length()
    rows = _taps(*axes[0], x.dtype, x.device, shrink).t()
    columns = _taps(*axes[1], dtype, x.device, 1 / (outputs.numel() * shrink))
    if x.is_contiguous(memory_format=torch.channels_last):
        by_row = rows.expand(images, -1, -1) @ x.permute(0, 2, 3, 1).flatten(2)  # N, kh, W C
        by_row = by_row.view(images, len(rows), size[1], channels).permute(0, 3, 1, 2)
    else:
        by_row = rows.expand(images * channels, -1, -1) @ x.flatten(0, 1)  # N C, kh, W
        by_row = by_row.view(images, channels, len(rows), size[1])
    of_all = by_row[0].to(dtype) if images == 1 else by_row.mean(0, dtype=dtype)
    return (of_all @ columns).view(groups, -1)  # C_in, kh, kw


# Cached, because the same few sizes of feature maps come back in every iteration.
@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _map_taps(geometry: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Matrix ``(H W, kh kw)`` of which map position meets which tap, over the output count."""
    axes = zip(*geometry, strict=True)
    return torch.kron(*(_taps(*axis, dtype, device, 1 / axis[1]) for axis in axes))


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _taps(
    size: int,
    outputs: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    dtype: torch.dtype,
    device: torch.device,
    scale: float,
) -> Tensor:
    """Matrix ``(size, kernel)``: ``scale`` where input index ``i`` meets kernel tap ``j``, else 0.

    They meet at one output position at most, and at none if that position does not exist.
    """
    # Created on the device, because a copy to it would wait.
    index = torch.arange(size, device=device)[:, None] + padding
    start = index - torch.arange(kernel, device=device) * dilation
    meets = (start >= 0) & (start % stride == 0) & (start < outputs * stride)
    return meets.to(dtype) * scale


# Products with weights, of many layers at once.


def weight_products(
    ms: Sequence[Tensor], hs: Sequence[Tensor], weights: Sequence[Tensor], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """``m . w`` and ``h . w`` of each channel, for each of several layers.

    Args:
        ms: Each ``(groups, P)``.
        hs: Each ``(C, P)``.
        weights: Each ``(C, C_in / groups, kh, kw)``, on the device of the others.
        dtype: Dtype to compute in.

    Returns:
        Two tensors of shape ``(C,)`` for each layer.
    """
    alike = defaultdict(list)  # equal patches, and equal channels in a group
    for place, (m, h) in enumerate(zip(ms, hs, strict=True)):
        (groups, patch), channels = m.shape, h.shape[0]
        is_small = channels * patch <= _SMALL_WEIGHT
        alike[(patch, channels // groups) if is_small else place].append(place)
    found: list[tuple[Tensor, Tensor]] = [None] * len(hs)  # type: ignore[list-item]
    for places in alike.values():
        if len(places) == 1:
            (place,) = places
            found[place] = _products(ms[place], hs[place], weights[place], dtype)
            continue
        m = torch.cat([ms[place] for place in places])
        h = torch.cat([hs[place] for place in places])
        w = torch.cat([weights[place].reshape(hs[place].shape) for place in places])
        sizes = [hs[place].shape[0] for place in places]
        of_mean, of_var = (
            torch.split_with_sizes(each, sizes) for each in _products(m, h, w, dtype)
        )
        for place, *pair in zip(places, of_mean, of_var, strict=True):
            found[place] = tuple(pair)
    return found


def _products(m: Tensor, h: Tensor, w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``sum_p w_cp m_gp`` and ``sum_p w_cp h_cp``.

    The CPU computes them by elements, in a fourth of a batched product's time. A GPU may use TF32
    for products of matrices (but not of a matrix and a vector), which would round each weight by as
    much as it moves in an iteration, so that the difference between two products would be lost.
    There, the reduction in batch norm's backward kernel computes them in one launch, without a copy
    of the weight's size.
    """
    (groups, patch), channels = m.shape, h.shape[0]
    m, w = m.to(dtype), w.reshape(channels, patch).to(dtype)
    if groups == 1:
        of_mean = torch.mv(w, m[0])
    elif is_gpu(h):
        by_channel = m[:, None].expand(groups, channels // groups, patch).reshape(channels, patch)
        of_mean = _products_of_rows(w, by_channel)
    else:
        of_mean = (w.view(groups, -1, patch) * m[:, None]).sum(2).view(channels)
    if is_gpu(h):
        return of_mean, _products_of_rows(w, h.to(dtype))
    of_var = [(part * w[rows]).sum(1) for rows, part in in_dtype(h, dtype)]
    return of_mean, of_var[0] if len(of_var) == 1 else torch.cat(of_var)


def _products_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """``sum_p a_cp b_cp``, by the reduction in batch norm's backward kernel."""
    rows, like = len(a), (a.dtype, a.device)
    nothing, one = (constant(rows, value, *like) for value in (0.0, 1.0))
    maps = (each[None, :, :, None] for each in (a, b))  # 1, C, P, 1
    return channel_sums(*maps, nothing, one, 0.0, one)[0]


def products_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """``sum_p a_bqp b_btp``, ``(B, Q, T)``; on a GPU by elements, as TF32 is too coarse."""
    if is_gpu(a):
        return (a[:, :, None] * b[:, None]).sum(3)
    return torch.bmm(a, b.transpose(1, 2))


def in_dtype(h: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of ``h``, ``(C, ...)``, in ``dtype``; on the CPU, in parts for a cache."""
    step, count = h.shape[0], h.numel()
    if count > _BLOCK and not is_gpu(h):
        step = max(1, step * _BLOCK // count)
    for start in range(0, h.shape[0], step):
        rows = slice(start, start + step)
        part = h if step == h.shape[0] else h[rows]
        yield rows, part if part.dtype == dtype else part.to(dtype)


def add_outer_(grad: Tensor, left: Tensor, right: Tensor) -> None:
    """``grad_cp += left_c right_gp``, of ``(C, P)``, ``(C,)`` and ``(groups, P)``.

    By elements: what is added of the past's mean patch and of the batch's nearly cancels, so that
    TF32 or bfloat16 in a product of matrices would lose the difference.
    """
    grad, left, right = _by_group(grad, left, right)
    grad.addcmul_(left, right)


def add_outers_(
    grads: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor], scale: float
) -> None:
    """``grad_cp += scale left_c right_gp`` for each of several layers, in one call."""
    each = map(_by_group, grads, lefts, rights)
    torch._foreach_addcmul_(*map(list, zip(*each, strict=True)), value=scale)


def _by_group(grad: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of :func:`add_outer_` in shapes whose elements multiply."""
    groups, patch = right.shape
    if groups == 1:
        return grad, left.unsqueeze(1), right
    return grad.view(groups, -1, patch), left.view(groups, -1, 1), right.unsqueeze(1)


def lerp_each_(starts: Sequence[Tensor], ends: Sequence[Tensor], weights: Sequence[float]) -> None:
    """``start += weight (end - start)`` of each pair, in one launch for all pairs."""
    if not starts:
        return
    if len(set(weights)) == 1:
        torch._foreach_lerp_(starts, ends, weights[0])
    elif "ScalarList" in torch.ops.aten._foreach_lerp_.overloads():  # from torch 2.7
        torch._foreach_lerp_(starts, ends, weights)
    else:
        for start, end, weight in zip(starts, ends, weights, strict=True):
            start.lerp_(end, weight)


def segment_sums(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Sums over consecutive segments of ``values``, ``(N,)``, whose lengths are ``sizes``."""
    return torch.segment_reduce(values, "sum", lengths=_lengths(sizes, values.device), unsafe=True)


def spread(
    rows: Sequence[Sequence[float]], sizes: tuple[int, ...], like: Tensor
) -> list[Tensor | float]:
    """Repeats each value of a row as often as its size says: ``(N,)``, on the device of ``like``.

    A row whose values all agree becomes one number; the other rows go to the device together.
    """
    found: list[Tensor | float] = [row[0] for row in rows]
    differ = [place for place, row in enumerate(rows) if row.count(row[0]) < len(row)]
    if differ:
        values = torch.tensor([rows[place] for place in differ], dtype=like.dtype, device="cpu")
        values = _moved(values, like.device)[:, _owners(sizes, like.device)]
        for place, row in zip(differ, values, strict=True):
            found[place] = row
    return found


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """Copies numbers to a device without waiting."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def constant(size: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of equal numbers; it is cached, so never change it."""
    return torch.full((size,), value, dtype=dtype, device=device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _lengths(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return _moved(torch.tensor(sizes, device="cpu"), device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _owners(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.repeat_interleave(_lengths(sizes, device), output_size=sum(sizes))
