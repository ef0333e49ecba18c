# Licensed under the Apache License, Version 2.0.
"""The fast ways to compute what the formulas ask for.

Each stands beside the plain formula that it equals, named in its docstring, and is chosen in one
place by device and size. All of them compute in float32 at least.
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

# On the CPU, from how many numbers on two reductions beat one kernel for the moments, and how far
# the squared mean may exceed the variance before the first lose too many digits.
_LARGE = 1 << 16
_FAR = 64

# Up to this many positions, one product over whole maps beats two over rows and columns: 6 against
# 28 us for 128 channels of 8x8, as much for 32x32, 635 against 275 us for 100x100 (one thread).
_SMALL_MAP = 1024

# Up to this many weights, layers alike are faster together, copies included.
_SMALL_WEIGHT = 1 << 14
_TINY = 1e-20  # a scale that rounding takes for zero
_BLOCK = 1 << 17  # numbers that a cache holds


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of a ``dtype`` tensor are computed: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_gpu(tensor: Tensor) -> bool:
    """Whether to go a GPU's ways: few launches, and no product of matrices that may use TF32."""
    return tensor.is_cuda


def version_of(tensor: Tensor | None) -> int:
    """How often a tensor was changed in place, as far as autograd counts it; -1 for None."""
    if tensor is None:
        return -1
    return 0 if tensor.is_inference() else tensor._version


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """``E[y]`` and ``E[(y - E[y])^2]`` of each channel, ``(C,)``, in float32 at least."""
    dtype = statistics_dtype(y.dtype)
    if y.dtype == dtype:
        if not is_gpu(y) and y.numel() >= _LARGE and y.is_contiguous():
            return _moments_in_two_reductions(y)
        return torch.batch_norm_update_stats(y, None, None, 0.0)
    # Without float32 running statistics the kernel would return its results in half precision.
    unused = y.new_empty(2, y.shape[1], dtype=dtype)
    return torch.batch_norm_update_stats(y, unused[0], unused[1], 0.0)


def _moments_in_two_reductions(y: Tensor) -> tuple[Tensor, Tensor]:
    """The same as ``E[y]`` and ``E[(y - mu) y]``, for large maps on the CPU.

    There the kernel of the moments sums the squares one by one, while that of batch norm's
    backward pass uses the processor's vectors: for 2 images of 256 channels of 100x100, 4.2 ms
    against 0.8 (two threads). Where the mean is far from 0 it would lose digits, and is not used.
    """
    mean = y.mean((0, 2, 3))
    one = torch.ones_like(mean)
    var = channel_sums(y, y, mean, one, 0.0, one)[0] / (y.numel() // y.shape[1])
    if (mean.square() > _FAR * var).any():
        return torch.batch_norm_update_stats(y, None, None, 0.0)
    return mean, var


def channel_sums(
    grad: Tensor, y: Tensor, mean: Tensor, var: Tensor, eps: float, r: Tensor
) -> tuple[Tensor, Tensor]:
    """``sum(grad x_hat)`` and ``sum(grad)``, each ``(C,)``, in one pass: batch norm's own.

    ``x_hat`` is ``(y - mean) r``, where ``r`` is ``1 / sqrt(var + eps)``. ``grad`` and ``y`` may be
    in half precision, statistics and sums are not.
    """
    if y.numel() == 0:  # the kernel divides by the number of positions
        return torch.zeros_like(mean), torch.zeros_like(mean)
    # The kernel of the CPU reads mean and var as the running statistics, that of a GPU mean and r
    # as those of a forward; the latter also wants a scale, for the dtype of its results alone.
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


def affine_sum(grad: Tensor, y: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """``scale grad + offset + slope y`` of each channel, in the dtype of ``y``.

    In float32: rounding terms that nearly cancel would leave a residue. On a GPU it is one pass, of
    SyncBN's backward, ``scale (grad - (a + b y) / count)``.

    Args:
        grad: Incoming gradient, like ``y``, ``(N, C, H, W)``.
        y: Input of the layer.
        scale: ``(C, 1, 1)``; on a GPU :func:`not_zero` of it.
        rows: The offset and the slope, ``(2, C, 1)``; on a GPU over the scale.
    """
    offset, slope = (row.view(-1, 1, 1) for row in rows)
    if y.is_cuda and y.numel() > 0:
        like = rows.dtype, y.device
        none, one = (constant(y.shape[1], value, *like) for value in (0.0, 1.0))
        count = constant(1, -1, torch.int32, y.device)  # by which it divides both
        last = torch.channels_last
        is_last = y.is_contiguous(memory_format=last)
        grad = grad.contiguous(memory_format=last if is_last else torch.contiguous_format)
        statistics = (each.view(-1) for each in (scale, offset, slope))
        return torch.batch_norm_backward_elemt(grad, y, none, one, *statistics, count)
    total = torch.addcmul(offset, y, slope)
    total = (total + grad) * scale if is_gpu(y) else total.addcmul_(grad, scale)
    return total if total.dtype == y.dtype else total.to(y.dtype)


def not_zero(scale: Tensor) -> Tensor:
    """The same for :func:`affine_sum`; where a scale is 0, 1e-20 of the incoming gradient goes on.

    On a CPU 0 stays.
    """
    return torch.where(scale.abs() < _TINY, _TINY, scale) if is_gpu(scale) else scale


# A convolution's patches.


def weight_gradient(source: Source, gradient: Tensor, stride: int) -> Tensor:
    """``sum_p gradient_p phi_p`` over one of every ``stride``-th row and column, ``(C_out, P)``.

    It is the weight's gradient of the same convolution with its stride multiplied.
    """
    x, weight = source.input, source.weight
    steps = source.stride if stride == 1 else [step * stride for step in source.stride]
    if stride > 1 and weight[0, 0].numel() == 1 and not any(source.padding):
        # What the convolution would pick out slowly: 1.3 against 0.5 ms for 256 to 64 channels.
        x, steps = x[:, :, :: steps[0], :: steps[1]].contiguous(), [1, 1]
    return torch.ops.aten.convolution_backward.default(
        gradient,
        x,
        weight if weight.dtype == x.dtype else x.new_empty(weight.shape),  # its shape is read
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
    """``E[phi]``, ``(groups, P)``.

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


# The same few feature maps come back in every iteration.
@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _map_taps(geometry: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which position of a map meets which tap, ``(H W, kh kw)``, over the number of outputs."""
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
    """``scale`` where input index ``i`` meets kernel tap ``j`` at an output, ``(size, kernel)``.

    It does so at most once, and not at all where the tap's output position does not exist.
    """
    # Made on the device, as a copy to it would wait.
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
        dtype: To compute in.

    Returns:
        Two tensors of shape ``(C,)`` for each layer.
    """
    alike = defaultdict(list)  # of equal patches, and as many channels in a group
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

    By elements, which on the CPU is a fourth of a batched product's time. On a GPU that may use
    TF32 for products of matrices (but not of a matrix and a vector), these would round each weight
    by as much as it moves in an iteration, and the difference between two products would be lost:
    there, the reduction of batch norm's backward pass does it in one launch, without a copy of the
    weight's size.
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
    """``sum_p a_cp b_cp``."""
    rows, like = len(a), (a.dtype, a.device)
    nothing, one = (constant(rows, value, *like) for value in (0.0, 1.0))
    maps = (each[None, :, :, None] for each in (a, b))  # 1, C, P, 1
    return channel_sums(*maps, nothing, one, 0.0, one)[0]


def products_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """``sum_p a_bqp b_btp``, ``(B, Q, T)``; on a GPU by elements, as TF32 would lose them."""
    if is_gpu(a):
        return (a[:, :, None] * b[:, None]).sum(3)
    return torch.bmm(a, b.transpose(1, 2))


def in_dtype(h: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Goes through ``h``, ``(C, ...)``, in another dtype; on the CPU in parts for a cache."""
    step, count = h.shape[0], h.numel()
    if count > _BLOCK and not is_gpu(h):
        step = max(1, step * _BLOCK // count)
    for start in range(0, h.shape[0], step):
        rows = slice(start, start + step)
        part = h if step == h.shape[0] else h[rows]
        yield rows, part if part.dtype == dtype else part.to(dtype)


def add_outer_(
    grad: Tensor, lefts: Tensor, rights: Tensor | Sequence[Tensor], scale: float = 1.0
) -> None:
    """``grad_cp += scale sum_k left_kc right_kgp``.

    Args:
        grad: ``(C, P)``.
        lefts: ``(K, C, 1)``.
        rights: ``K`` tensors of ``(groups, P)``; or, of one group, all as the rows of ``(K, P)``.
        scale: A number.
    """
    if isinstance(rights, Tensor):
        grad.addmm_(lefts.squeeze(2).t(), rights, alpha=scale)
        return
    for left, right in zip(lefts, rights, strict=True):
        groups, patch = right.shape
        if groups == 1:
            grad.addmm_(left, right, alpha=scale)
            continue
        by_group = grad.view(groups, -1, patch)
        by_group.baddbmm_(left.view(groups, -1, 1), right[:, None], alpha=scale)


def lerp_each_(starts: list[Tensor], ends: list[Tensor], weights: list[float]) -> None:
    """``start += weight (end - start)`` of each pair: a launch for all of them."""
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
    """The sums over consecutive ``values``, ``(N,)``, as many as ``sizes`` say."""
    return torch.segment_reduce(values, "sum", lengths=_lengths(sizes, values.device), unsafe=True)


def spread(
    rows: Sequence[Sequence[float]], sizes: tuple[int, ...], like: Tensor
) -> list[Tensor | float]:
    """Of each row each value as often as its size says, ``(N,)``, beside ``like``.

    It is one number where all values of a row agree; the others go to the device together.
    """
    found: list[Tensor | float] = [row[0] for row in rows]
    differ = [place for place, row in enumerate(rows) if row.count(row[0]) < len(row)]
    if differ:
        values = torch.tensor([rows[place] for place in differ], dtype=like.dtype)
        values = _moved(values, like.device)[:, _owners(sizes, like.device)]
        for place, row in zip(differ, values, strict=True):
            found[place] = row
    return found


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """Copies numbers to a device, which does not wait for them."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def constant(size: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of equal numbers, not to be changed."""
    return torch.full((size,), value, dtype=dtype, device=device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _lengths(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return _moved(torch.tensor(sizes), device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _owners(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.repeat_interleave(_lengths(sizes, device), output_size=sum(sizes))
