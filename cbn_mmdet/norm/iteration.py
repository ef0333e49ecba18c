# Licensed under the Apache License, Version 2.0.
"""One iteration of a linked model, and the functions that a training loop calls.

One rule: before :func:`step`, a linked layer changes nothing but its note of what feeds it. A
training forward of the linked model begins an iteration: it sets aside what an earlier forward
left, for layers that it will not reach, and computes the pasts of all layers at today's weights in
one pass. (If the loop calls parts or methods of the model instead, the first layer that runs after
a ``step`` begins the iteration.) A layer asks once for what it needs from outside, by
:meth:`Iteration.call`. What it learns is one record, which ``step`` reads once.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import warnings
import weakref
from collections import defaultdict
from collections.abc import Generator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import kernels, linking
from .cbn import CBN
from .layer import check_count, is_number, is_recomputation
from .moments import Source, statistics_dtype
from .normalize import coefficients, new_averages
from .record import Record, Vectors
from .window import (
    MovingWindow,
    Past,
    Window,
    add_distances,
    grow,
    growth,
    pasts,
    surprises,
)

_MANY = 10  # forwards without a step that lead to a warning
_SELDOM = 64  # iterations between two checks of what a module does
_NARROW, _LONG = 1.5, 100  # to warn of: a mean window size, and iterations in a row below it


class Call(NamedTuple):
    """What a layer needs to know about one of its calls in a forward.

    Attributes:
        window: The window of this call.
        source: What computed the layer's input; None if nothing is compensated.
        past: The past at today's weight, or None if the window is empty.
        gamma: Copy of the layer's scale from the iteration's start; None if it cannot be used.
        repeats: Whether activation checkpointing repeats an earlier call, and records nothing.
    """

    window: Window
    source: Source | None
    past: Past | None
    gamma: Tensor | None
    repeats: bool


class Ended(NamedTuple):
    """What the end of an iteration tells.

    Attributes:
        clamped: What :func:`step` returns.
        dropped: The warning about records with NaN or infinite values, which are dropped, or None.
        narrow: The warning about windows that stay narrow, or None.
        has_layers: Whether the model has a CBN.
    """

    clamped: Tensor | None
    dropped: str | None
    narrow: str | None
    has_layers: bool = True


class Iteration:
    """The state of a linked model's current iteration.

    Args:
        model: The model whose forward is one iteration.

    Attributes:
        records: What the layers learnt in the model's last forward, in the order of their forwards.
        earlier: What layers learnt that only earlier forwards since the last step reached.
        scale: The factor by which a loss scaler multiplies the loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self.root = weakref.ref(model)
        self.layers: list[weakref.ref[CBN]] = []
        self.records: list[Record] = []
        self.scale: float | Tensor = 1.0
        self._scaler: object = None
        self.earlier: dict[CBN, list[Record]] = {}
        self._calls: dict[CBN, int] = {}
        self._earlier_calls: dict[CBN, int] = {}
        self._gammas: dict[CBN, tuple[Tensor, int]] = {}
        self._marked: list[weakref.ref[Tensor]] = []
        self._made: list[weakref.ref[Record]] = []  # made since the last step
        self._trains = False  # whether the model's forward is running, with a layer that trains
        self._depth = 0  # nesting depth of the model's forward, which may call itself
        self._handled: BaseException | None = None  # what was being handled when it began
        self._finished: list[Vectors] = []
        self._lock = threading.Lock()
        self._forwards = 0  # begun since the last step
        self._has_gone_back = False  # whether a backward pass followed the forward
        self._version: int | None = None
        self._has_stepped = False
        self._narrow_for = 0  # iterations in a row with narrow windows
        self._has_told = False  # whether the warning of narrow windows was given

    # A copied or unpickled model has no iteration.

    def __reduce__(self) -> tuple:
        return type(None), ()

    # Methods that the hooks of the linked model call.

    def enter(self, model: nn.Module, args: tuple) -> None:
        """Begins an iteration if a layer trains; called before a forward of the model."""
        if is_recomputation():
            return
        self._trains = any(layer.training for layer in self.living())
        if not self._trains:
            return
        if self._depth > 0 and not _is_within_itself(model):
            self._depth = 0  # a KeyboardInterrupt ended the last one, and torch called no hook
        self._depth += 1
        if self._depth == 1:
            self._handled = sys.exc_info()[1]
            self.begin()

    def leave(self, model: nn.Module, args: tuple, output: object) -> None:
        """Removes all marks; called after a forward of the model, even if the forward failed."""
        self._depth = max(self._depth - 1, 0)
        if self._depth > 0:
            return
        has_failed = output is None and sys.exc_info()[1] is not self._handled
        self._handled = None
        if self._trains and has_failed and not is_recomputation():
            self._clear()
        if self.earlier:
            for layer in self._calls:
                self.earlier.pop(layer, None)
        self._trains = False
        if self._marked:
            linking.unmark(self._marked)

    def mark(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """Marks the output of a module with a weight; called after the module's forward."""
        root = self.root()
        if not self._trains and (root is None or not root.training):
            return
        input = args[0] if args else next(iter(kwargs.values()), None)
        self._marked += linking.mark(module, input, output)

    # The stages of an iteration, in order.

    def begin(self) -> None:
        """Sets aside what an earlier forward left, and computes all pasts at today's weights."""
        layers = self.living()
        self._warn_if_not_stepped(layers)
        if self._calls:
            self._set_aside()
        self._clear()
        self._has_gone_back = False
        self._made = [ref for ref in self._made if ref() is not None]
        self._forwards += 1
        # If the model has trained, an optimiser may be repeating a closure that runs the forward.
        may_be_closure = self._has_stepped and torch.is_grad_enabled()
        is_gathering = self._forwards == (10 * _MANY if may_be_closure else _MANY)
        if is_gathering and not any(each.is_reset_by_torch() for each in layers):
            warnings.warn(
                f"CBN: {self._forwards} forwards in training mode, and cbn_mmdet.step(model) was "
                "not called after any: running statistics and windows stay as they are. Call it "
                "after each, or use cbn_mmdet.precise_statistics to gather statistics alone.",
                stacklevel=2,
            )
        if self._scaler is not None:
            self.scale = _scale_of(self._scaler, self._any_parameter())
        self._gammas = _copies_of_gammas(layers)
        alike = defaultdict(list)
        for layer in layers:
            if layer.window_in_force == 1:
                continue
            for window in layer._windows:
                window.cached = None
                if window.seen == 0:
                    continue
                conv = None if window.conv is None else window.conv()
                weight, bias, is_plain = None, None, linking.is_plain(conv)
                # A hook may still set weight.data or the bias, which could not be noticed later.
                is_open = bool(conv._forward_pre_hooks) if is_plain else window.h is not None
                if is_open:
                    continue  # the layer computes this past itself
                if window.h is not None:
                    weight = conv._parameters["weight"]
                    if not window.fits(weight):
                        continue
                if layer.compensate and is_plain:
                    bias = conv.bias
                if weight is None:
                    key = window.device, torch.float32
                else:
                    key = weight.device, statistics_dtype(weight.dtype)
                alike[key].append((window, weight, bias))
        for (_, dtype), together in alike.items():
            for each, past in zip(together, pasts(together, dtype), strict=True):
                each[0].cache(past, *each[1:])

    def _set_aside(self) -> None:
        """Keeps what the last forward left, for layers that the next one does not reach."""
        self._earlier_calls.update(self._calls)
        self.earlier.update({layer: [] for layer in self._calls})  # an empty batch has no record
        for record in self.records:
            record.kind += (self._forwards,)  # another forward may have another loss scale
            self.earlier[record.layer].append(record)

    def _clear(self) -> None:
        for each in (self.records, self._calls, self._gammas, self._finished):
            each.clear()

    def call(self, layer: CBN, y: Tensor) -> Call:
        """Counts a layer's call in training, and returns what the layer needs to know about it.

        Raises:
            RuntimeError: The layer's statistics cannot follow the weight that computed ``y``, or
                activation checkpointing repeats calls that cannot be told apart.
        """
        repeats = is_recomputation()
        number = self._calls.get(layer, 0)
        if repeats:
            self._check_repetition(layer, number or self._earlier_calls.get(layer, 0))
            number = 0
        else:
            if self._forwards == 0:
                self.begin()
            elif number > 0 and self._depth == 0:
                self._warn_if_not_stepped(self.living())
                if number == 10 * _MANY and layer is next(iter(self._calls)):
                    warnings.warn(
                        f"{layer.title} was called {number} times, not by the linked model's own "
                        "forward, and cbn_mmdet.step(model) was not called after any: each call "
                        "counts as a further one of the iteration, and takes a window of its own. "
                        "Call step after each iteration.",
                        stacklevel=2,
                    )
            self._calls[layer] = number + 1
        windows = layer._windows
        while len(windows) <= number:
            windows.append(layer.new_window())
        window = windows[number]
        source = self._source(layer, y, window)
        if layer.window_in_force == 1:
            return Call(window, None, None, None, repeats)
        # The weights may have moved in ways that leave no trace: through .data in a forward in
        # between, or by a fused optimiser after the backward pass of another part.
        is_moved = self._forwards > 1 if repeats else self._has_gone_back
        if is_moved:
            window.cached = None
        weight, bias = (None, None) if source is None else source[:2]
        past = window.past(weight, bias, statistics_dtype(y.dtype))
        if past is not None:
            is_like = window.is_without_bias in (None, bias is not None)
            if not is_like or past.mean.shape[0] != y.shape[1]:
                past = None  # the end of the iteration clears the window
        gamma, version = self._gammas.get(layer, (None, None))
        if is_moved or version != kernels.version_of(layer._parameters.get("weight")):
            gamma = None
        return Call(window, source, past, gamma, repeats)

    def _check_repetition(self, layer: CBN, calls: int) -> None:
        if calls > 1 and layer.window_size != 1:  # even in a burn-in: to fail before it, not after
            raise layer.refusal(
                f"was called {calls} times in one forward, and activation checkpointing repeats "
                "the calls in another order, so they cannot be told apart. Turn checkpointing off "
                "(with_cp=False) around this layer."
            )
        if calls == 0:
            raise layer.refusal(
                "activation checkpointing repeats a forward whose iteration has ended. Call "
                "cbn_mmdet.step(model) after the backward pass."
            )

    def _source(self, layer: CBN, y: Tensor, window: Window) -> Source | None:
        """Finds what computed ``y``; refuses if that is unknown, or another module than before."""
        source, why_not = None, ""
        if layer.compensate:
            # A module may change what it does, so it is checked again, but ever less often.
            seen = window.seen
            is_due = seen > 0 and (seen & (seen - 1) == 0 or seen % _SELDOM == 0)
            checked = None if is_due else window.rows_of
            follows = window.h is not None
            module, source, why_not = linking.source_of(y, self.name_of, checked, follows)
        else:
            found = linking.mark_of(y)
            module = None if found is None else found.module
        before = None if window.conv is None else window.conv()
        if layer.compensate and window.conv is not None and before is None:  # it was replaced
            window.clear()
            window.conv = None
        if before is not module:
            weight = None if source is None else source.weight
            if module is None and weight is not None and before is not None:
                # It may have been called as a function, or while the linked model evaluates.
                module = before if before._parameters.get("weight") is weight else None
            is_other = module is not before and (module is not None or weight is not None)
            if layer.compensate and before is not None and is_other and window.seen > 0:
                now = "one that no module of the linked model returned"
                raise layer.refusal(
                    f"was fed by {self.name_of(before)} so far, and now by "
                    f"{now if module is None else self.name_of(module)} in the same place of the "
                    "model's forward. Past statistics of one convolution say nothing of another: "
                    "give each its own CBN, or call cbn_mmdet.link(model) if it was replaced."
                )
            window.conv = None if module is None else weakref.ref(module)
        if not layer.compensate:
            return None
        if module is None and self.root() is None:
            raise layer.refusal(
                "was linked as a part of a model that is gone. Call cbn_mmdet.link on the model "
                "that trains, and keep it."
            )
        if source is not None and source.leaf:
            window.rows_of = None if module is None else weakref.ref(module)
        if source is None and layer.compensate is True:
            raise layer.refusal(
                f"{why_not}. CBN compensates the statistics of a convolution's output: place the "
                "layer directly after one, use another norm here, link the model that contains "
                "both, or let such layers average past statistics as they are with "
                "compensate='where_possible' (all layers: compensate=False, naive CBN)."
            )
        if source is None and all(each.why_not is None for each in layer._windows):
            warnings.warn(f"{layer.title} is not compensated: it {why_not}.", stacklevel=2)
        window.why_not = why_not or None
        return source

    @torch.no_grad()
    def finish(self, record: Record) -> None:
        """Computes what the backward passes need, for all records, once the forward is over."""
        self._has_gone_back = True
        is_listed = any(each is record for each in self.records)
        with self._lock:  # backward passes may run in several threads
            for records in _alike(self.records if is_listed else [record]):
                waiting = [each for each in records if each.coefficients is None]
                if waiting and records[0].moments is not None:
                    vectors = Vectors(waiting)
                    self._finished.append(vectors)
                    found = coefficients(vectors)
                    if isinstance(waiting[0].window, MovingWindow):
                        add_distances(vectors)  # last, as to repeat it after an error adds twice
                    for each, of in zip(waiting, found, strict=True):
                        each.coefficients = of

    def add(self, record: Record, repeats: bool) -> None:
        """Adds a forward's record; if a forward is repeated, the first one's record counts."""
        self._made.append(weakref.ref(record))
        if repeats:
            known = (*self.records, *self.earlier.get(record.layer, ()))
            first = next((each for each in known if each.layer is record.layer), None)
            # It may repeat an earlier forward of the model, whose record is gone.
            if self._forwards == 1 or first is None or _is_alike(record, first):
                record.original = first
        elif record.window is not None:
            self.records.append(record)

    def forget(self, layer: CBN) -> None:
        """Drops what a layer learnt in this iteration."""
        self.records[:] = [record for record in self.records if record.layer is not layer]
        self.earlier.pop(layer, None)

    @torch.no_grad()
    def step(self, loss_scale: object = None, updated: bool = True) -> Ended:
        """Ends the iteration as :func:`step` does; returns the result and the warnings."""
        self._depth = 0
        linking.unmark(self._marked)
        if self.earlier:
            missed = [of for layer, of in self.earlier.items() if layer not in self._calls]
            self.records[:0] = itertools.chain.from_iterable(missed)
            self.earlier.clear()
        if loss_scale is not None and (self._scaler is None or is_number(loss_scale)):
            # The first time a scale is given, this iteration's forward has assumed a scale of 1.
            scale = _scale_of(loss_scale, self._any_parameter())
            for record in self.records:
                record.scale = scale
        kept, dropped, clamped = [], [], []
        alike = _alike(self.records)
        endings = [self._end(records) for records in alike]
        told = _read([next(each) for each in endings])
        for records, ending, figures in zip(alike, endings, told, strict=True):
            keep, fraction = ending.send(figures)
            for record, is_kept in zip(records, keep, strict=True):
                (kept if is_kept else dropped).append(record)
            if fraction is not None:
                clamped.append(fraction)
        _update_running_stats(kept)
        texts = self._of_dropped(dropped), self._of_narrow(kept)
        self._scaler = loss_scale
        self._has_stepped = True
        self.scale = 1.0
        self._clear()
        self._earlier_calls.clear()
        self._forwards = 0
        for ref in self._made:
            record = ref()
            if record is not None:
                record.end()
        self._made.clear()
        for layer in self.living():
            if layer._was_reset:  # to set a module's attribute takes longer than to read it
                layer._was_reset = False
            if updated and layer.window == "step":
                layer._forget()
        return Ended(torch.tensor(sum(clamped) / len(clamped)) if clamped else None, *texts)

    def _of_dropped(self, dropped: list[Record]) -> str | None:
        """The warning about records that were dropped, or None."""
        if not dropped:
            return None
        first = next(record for record in self.records if record in dropped)
        count = len({record.layer for record in dropped})
        return (
            f"CBN layer '{self.path_of(first.layer)}' is the first of {count} that met NaN or "
            "infinite values in this iteration, which is left out of their windows and running "
            "statistics."
        )

    def _of_narrow(self, kept: list[Record]) -> str | None:
        """The warning, given once, about windows that set their size to hardly more than 1."""
        sizes = [
            1 / record.share
            for record in kept
            # Where set_window allows 2 at most, they are to be narrow.
            if record.past is not None and record.window.sets_itself and record.window.size > 2
        ]
        if not sizes:  # neither wide nor narrow: another network's turn, say
            return None
        size = sum(sizes) / len(sizes)
        self._narrow_for = self._narrow_for + 1 if size < _NARROW else 0
        if self._has_told or self._narrow_for < _LONG:
            return None
        self._has_told = True
        return (
            f"CBN: windows have averaged {size:.1f} batches, the current one included, for {_LONG} "
            "iterations: CBN does what batch normalisation does. They narrow where the last batch "
            "tells more of the next one than the average of several: images that come in an order "
            "(shuffle them, or set window_size=8), weights that move fast (a lower learning rate, "
            "clipped gradients), or batches that are large enough for BN, which is cheaper."
        )

    def _end(self, records: list[Record]) -> Generator:
        """Ends an iteration for records of one kind, before and after their figures are read.

        Yields:
            Figures to read from the device. Sent their values, it adds the records to their
            windows, and yields which it has added, and the fraction of past variances cut to zero.
        """
        first, figures, vectors, new, sums = records[0], [], None, None, None
        if first.window is None:
            running = [tensor for record in records for tensor in record.running]
            checked = [torch.cat(running).float()]
        else:
            vectors = next((each for each in self._finished if each.records == records), None)
            if vectors is None:
                vectors = Vectors(records)
            checked = [vectors.union]
            surprise, agreement = surprises(vectors)
            if first.is_spread and any(record.window.sets_itself for record in records):
                dist.all_reduce(agreement)
            figures.append(agreement)
        if isinstance(first.window, MovingWindow):
            new = growth(vectors)
            checked.append(new[0])
        for record in records:
            if record.derivative is not None:
                checked += record.derivative[:2]
        if any(record.sums is not None for record in records):
            sums = new_averages(vectors)
            checked.append(sums)
        positives = [record.past.positive for record in records if record.past is not None]
        positives = [each.flatten() for each in positives if each is not None]
        if positives:
            figures.append(torch.cat(positives).mean(dtype=checked[0].dtype))
        # Norms, as one NaN or infinite value makes its norm NaN or infinite.
        told = yield torch.hstack((*figures, *torch._foreach_norm(checked)))
        norms = told[-len(checked) :]
        del told[-len(checked) :]
        are_sums_finite = sums is None or math.isfinite(norms.pop())
        cut = 1 - told.pop() if positives else None
        keep = [True] * len(records)
        if not all(map(math.isfinite, norms)):
            values = [None] * len(records) if new is None else vectors.split(new[0])
            keep = [_is_finite(*each) for each in zip(records, values, strict=True)]
        if vectors is not None:
            of_each = zip(records, keep, vectors.split(surprise.float()), strict=True)
            for place, (record, is_kept, values) in enumerate(of_each):
                window, (now, product, _, last) = record.window, told[place :: len(records)]
                # If the batch is spread, every process adapts, so that their shares stay equal.
                if (is_kept or record.is_spread) and now * last > 0:
                    window.adapt(product / math.sqrt(now * last))
                if is_kept and new is None:
                    window.push(record)
                if is_kept:
                    window.surprise = None if record.past is None else values
        if new is not None:
            grow(vectors, new, keep)
        if sums is not None:
            averages = vectors.split(sums.float())
            for record, is_kept, average in zip(records, keep, averages, strict=True):
                # An overflow here drops the average alone: the loss scaler deals with it.
                is_kept = is_kept and (are_sums_finite or bool(average.isfinite().all()))
                if record.sums is not None and is_kept:
                    record.window.sums = average
        yield keep, cut

    # Names, for messages.

    def path_of(self, module: nn.Module) -> str:
        """A module's name in the linked model."""
        root = self.root()
        modules = () if root is None else root.named_modules(remove_duplicate=True)
        return next((name for name, each in modules if each is module and name), "")

    def name_of(self, module: nn.Module) -> str:
        """A module's name in the linked model, and its type."""
        name, kind = self.path_of(module), type(module).__name__
        return f"'{name}' ({kind})" if name else kind

    def living(self) -> list[CBN]:
        """The layers that still exist."""
        return [layer for ref in self.layers if (layer := ref()) is not None]

    def _any_parameter(self) -> Tensor:
        root = self.root()
        of_root = () if root is None else itertools.chain(root.parameters(), root.buffers())
        return next(iter(of_root), torch.empty(0))

    def _warn_if_not_stepped(self, layers: list[CBN]) -> None:
        """Warns if a loop trains but never ends an iteration: its windows would stay empty."""
        weights = (layer.weight for layer in layers if layer.weight is not None)
        weight = next((weight for weight in weights if weight.requires_grad), None)
        if weight is None:  # a critic that is frozen while another network trains
            return
        version = kernels.version_of(weight)
        if self.records and version != self._version:
            warnings.warn(
                "CBN: the weights changed since the last forward, but cbn_mmdet.step(model) was "
                "not called, so the windows stay as they were and running statistics are not "
                "updated. Call it after each iteration, or use CBNHook in mmengine.",
                stacklevel=2,
            )
        self._version = version


def _read(asked: list[Tensor]) -> list[list[float]]:
    """Reads the values of vectors, and waits for each device once."""
    on_device = defaultdict(list)
    for each in asked:
        on_device[each.device].append(each)
    read = {
        device: iter(torch.cat(each).tolist() if len(each) > 1 else each[0].tolist())
        for device, each in on_device.items()
    }
    return [list(itertools.islice(read[each.device], len(each))) for each in asked]


def _is_alike(record: Record, other: Record) -> bool:
    """Whether two records are of one batch, up to rounding: a kernel may round in another order."""
    moments = other.moments
    tolerance = 1e-3 * (moments.var + record.layer.eps).sqrt()
    return bool(((record.moments.mean - moments.mean).abs() <= tolerance).all())


def _is_within_itself(model: nn.Module) -> bool:
    """Whether the model's forward, about to run, was called by a forward of the same model."""
    frame, calls = sys._getframe(), 0
    while frame is not None:
        calls += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is model
        frame = frame.f_back
    return calls != 1  # in compiled code no call is found, which proves nothing


def _copies_of_gammas(layers: list[CBN]) -> dict[CBN, tuple[Tensor, int]]:
    """Copies the scales of all layers together; returns each copy with the scale's version.

    Copies are needed because an optimiser changes the scales before ``step``.
    """
    alike = defaultdict(list)
    for layer in layers:
        gamma = layer._parameters.get("weight")
        is_whole = type(gamma) is nn.Parameter and gamma.shape[0] == layer.num_features
        if is_whole and layer.training:  # FSDP gathers a scale only at times
            alike[gamma.device, gamma.dtype].append(layer)
    copies = {}
    for of in alike.values():
        gammas = [layer._parameters["weight"] for layer in of]
        parts = torch.split_with_sizes(torch.cat(gammas).detach(), [len(each) for each in gammas])
        versions = [kernels.version_of(each) for each in gammas]
        copies.update(zip(of, zip(parts, versions, strict=True), strict=True))
    return copies


def _alike(records: list[Record]) -> list[list[Record]]:
    """Groups records to be processed together: of one device, dtype, window and gradient."""
    alike = defaultdict(list)
    for record in records:
        alike[record.kind].append(record)
    return list(alike.values())


def _is_finite(record: Record, values: Tensor | None) -> bool:
    tensors = [*record.running, *(() if record.derivative is None else record.derivative[:2])]
    tensors += [] if values is None else [values]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _scale_of(loss_scale: object, like: Tensor) -> float | Tensor:
    """The factor by which a loss scaler multiplies a loss; a number is the factor itself."""
    if is_number(loss_scale):
        return float(loss_scale)
    return loss_scale.scale(torch.ones((), device=like.device))


def _update_running_stats(records: list[Record]) -> None:
    """Averages records into the running statistics of their layers."""
    by_call = defaultdict(list)  # no list has a layer twice
    calls: dict[CBN, int] = defaultdict(int)
    for record in records:
        layer = record.layer
        if layer.tracks:
            by_call[calls[layer]].append(record)
            calls[layer] += 1
    for together in by_call.values():
        counts = [record.layer._buffers["num_batches_tracked"] for record in together]
        counted = [count for count in counts if count is not None]
        if counted:
            torch._foreach_add_(counted, 1)
        alike: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for record, count in zip(together, counts, strict=True):
            weight = record.layer.momentum
            if record.window is None:  # in a burn-in, the record has averaged copies
                weight = 1.0
            elif weight is None:
                weight = 0.0 if count is None else 1.0 / float(count)  # as in BN
            running, new = alike.setdefault(weight, ([], []))
            buffers = record.layer._buffers
            for name, value in zip(("running_mean", "running_var"), record.running, strict=True):
                into = buffers[name]
                running.append(into)
                new.append(value if value.dtype == into.dtype else value.to(into.dtype))
        for weight, (running, new) in alike.items():
            if weight == 1.0:
                torch._foreach_copy_(running, new)
            else:
                torch._foreach_lerp_(running, new, weight)


# The functions that a training loop calls.


def link(model: nn.Module) -> int:
    """Lets every CBN of ``model`` find the convolution whose output it receives.

    From then on each training forward of ``model`` is an iteration, which :func:`step` ends. Call
    it on the model whose forward is one iteration (inside any wrapper), before training. Calling it
    again is harmless and includes new modules. If it is called on a model and on a part of it, the
    last call counts.

    Args:
        model: Any module, a single layer included.

    Returns:
        The number of CBN layers in the model.
    """
    layers = cbn_layers(model).values()
    if not layers:
        _warn_without_layers(model, "link")
        return 0
    iteration = _iteration_of(model) or Iteration(model)
    linking.unhook(model)
    for module in model.modules():
        if linking.marks(module):
            hook = linking.Hook(iteration, "mark")
            # Before all other hooks: an output that they replace is not the convolution's.
            module.register_forward_hook(hook, with_kwargs=True, prepend=True)
    model.register_forward_pre_hook(linking.Hook(iteration, "enter"), prepend=True)
    model.register_forward_hook(linking.Hook(iteration, "leave"), always_call=True)
    iteration.layers = [weakref.ref(layer) for layer in layers]
    modules = set(model.modules())
    for layer in layers:
        for window in layer._windows:
            if window.conv is not None and window.conv() not in modules:  # it was replaced
                window.clear()
                window.conv = None
                iteration.forget(layer)
        layer._iteration = iteration
    return len(layers)


def _iteration_of(model: nn.Module) -> Iteration | None:
    """The iteration of ``model``, or None if :func:`link` was not called on the model itself."""
    for _, _, hook in linking.hooks_of(model):
        if hook.method == "enter" and hook.iteration is not None:
            return hook.iteration
    return None


def links(model: nn.Module) -> dict[str, str]:
    """Names the convolution that fed each CBN in the layer's last forward in training.

    Args:
        model: A linked model. Its module names are the keys and values.

    Returns:
        The feeding module's name by the CBN's name, for each CBN that has run. (Naive CBN may be
        fed by any module with a weight.) Instead of a name, ``'(a function)'`` stands for a
        convolution that no module returned, ``'(not compensated)'`` for a layer left out by
        ``compensate='where_possible'``.
    """
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for name, layer in cbn_layers(model).items():
        for window in layer._windows[:1]:
            conv = None if window.conv is None else window.conv()
            if window.why_not is not None:
                found[name] = "(not compensated)"
            elif conv in names:
                found[name] = names[conv]
            elif window.conv is None and layer.compensate:
                found[name] = "(a function)"
    return found


def set_window(model: nn.Module, size: int | None) -> None:
    """Sets the largest window size in force, as a burn-in does.

    A change drops the past, so that a window that opens again starts empty.

    Args:
        model: A model with CBN layers.
        size: From 1, which is batch normalisation, to the layers' ``window_size``. A layer whose
            own size is smaller (with ``'auto'``, 8 at most) keeps it. None for each layer's own.

    Raises:
        ValueError: ``size`` is not a whole number, is below 1, or is above every layer's
            ``window_size`` and none of these is ``'auto'``.
    """
    layers = cbn_layers(model).values()
    if not layers:
        _warn_without_layers(model, "set_window")
    if size is not None:
        check_count("CBN", "size", size, "the window size to put in force, or None")
        largest = max((layer.own_window_size for layer in layers), default=size)
        if size > largest and not any(layer.window_size == "auto" for layer in layers):
            raise ValueError(
                f"set_window: size {size} is above the largest window_size of the model's CBN "
                f"layers, {largest}. Pass at most that, or build the layers with a larger "
                "window_size."
            )
    for layer in layers:
        layer.set_window(size)


def step(model: nn.Module, loss_scale: object = None, updated: bool = True) -> Tensor | None:
    """Ends an iteration: adds what its forward recorded to windows and running statistics.

    Call it once per iteration, after the backward pass. Until then a forward can be repeated
    without changing windows or running statistics: each layer's last one counts.

    If a batch has NaN or infinite values, its records are dropped, with a warning: windows and
    running statistics stay as they were. To check this, ``step`` waits for the device once.

    Args:
        model: A linked model. (For a part of one, the iteration of the whole ends.)
        loss_scale: The factor of the loss in its backward pass: a number that stays the same, or a
            ``torch.amp.GradScaler``. ``backward='mixed'`` needs it, as it averages gradients. Pass
            it in every iteration, or in none. (The backward pass runs before this ``step``, so it
            uses the number given last, or asks the scaler given last.)
        updated: Whether the optimiser has stepped after this iteration's backward pass. If
            gradients accumulate, pass False after each forward of a group but the last. Only
            ``window='step'`` uses it.

    Returns:
        The fraction of compensated past channel variances that the maximum cut to zero in this
        iteration, as a 0-dimensional tensor; None if nothing was compensated.

    Raises:
        ValueError: ``loss_scale`` is neither a number above 0 nor a scaler.
    """
    ended = end_iteration(model, loss_scale, updated)
    if not ended.has_layers:
        _warn_without_layers(model, "step")
    for warning in (ended.dropped, ended.narrow):
        if warning:
            warnings.warn(warning, stacklevel=2)
    return ended.clamped


def end_iteration(model: nn.Module, loss_scale: object = None, updated: bool = True) -> Ended:
    """Does what :func:`step` does, but returns its warnings."""
    is_scale = is_number(loss_scale) and loss_scale > 0
    if not (loss_scale is None or is_scale or hasattr(loss_scale, "scale")):
        raise ValueError(
            f"step: loss_scale must be a number above 0 or a torch.amp.GradScaler, got "
            f"{loss_scale!r}."
        )
    own = _iteration_of(model)
    layers = [] if own is None else own.living()
    if not layers:  # a wrapper or a part of the linked model, or one whose layers are gone
        layers = list(cbn_layers(model).values())
    # A part that was linked after the model has an iteration of its own.
    iterations = dict.fromkeys([own, *[layer._iteration for layer in layers]])
    results = [each.step(loss_scale, updated) for each in iterations if each is not None]
    clamped = [each.clamped for each in results if each.clamped is not None]
    told = ([each.dropped for each in results], [each.narrow for each in results])
    return Ended(
        torch.stack(clamped).mean() if clamped else None,
        *(" ".join(filter(None, texts)) or None for texts in told),
        has_layers=bool(layers),
    )


def _warn_without_layers(model: nn.Module, caller: str) -> None:
    """Warns that a function was called on a model without CBN layers, and why, if that shows."""
    why = "Build it with norm_cfg=dict(type='CBN'), or convert it by cbn_mmdet.from_batchnorm."
    kinds = {type(module) for module in model.modules() if isinstance(module, _BatchNorm)}
    if kinds and not kinds & {nn.BatchNorm2d, nn.SyncBatchNorm}:
        names = ", ".join(sorted(each.__name__ for each in kinds))
        why = (
            f"Build it with CBN as its norm: it has {names}, and cbn_mmdet.from_batchnorm "
            "turns nn.BatchNorm2d and nn.SyncBatchNorm alone."
        )
    if any(linking.hooks_of(module) for module in model.modules()):
        why = (
            "It had them when it was linked: torch's convert_sync_batchnorm, for one, turns them "
            "into nn.SyncBatchNorm; SyncCBN (sync=True) is the one that synchronises."
        )
    warnings.warn(
        f"cbn_mmdet.{caller}: the model has no CBN layer, so it does nothing. {why}", stacklevel=3
    )


def window_state(model: nn.Module) -> dict:
    """Returns what the windows hold, the one thing that ``model.state_dict()`` leaves out.

    Training that resumes with it continues as if it had not been interrupted; without it, the
    windows start empty. Each process of a distributed training has a state of its own.

    Args:
        model: A linked model, between two iterations.

    Returns:
        Plain values and copies of tensors, for ``torch.save``: for each layer's name a list, with
        one entry per call of the layer in a forward.
    """
    names = {module: name for name, module in model.named_modules()}
    return {
        name: [
            dict(window.state(), conv=names.get(window.conv and window.conv()))
            for window in layer._windows
        ]
        for name, layer in cbn_layers(model).items()
    }


def load_window_state(model: nn.Module, state: dict) -> None:
    """Fills the windows with what :func:`window_state` returned.

    Args:
        model: The same model, linked, with the weights that it had when the state was taken, and
            with the same window in force.
        state: What :func:`window_state` returned.

    Raises:
        ValueError: The model has other CBN layers or convolutions, or a layer has another window
            in force.
    """
    layers = cbn_layers(model)
    if layers.keys() != state.keys():
        odd = sorted(layers.keys() ^ state.keys())[0]
        raise ValueError(
            f"load_window_state: only one of the model and the state has a CBN layer '{odd}'. "
            "Windows can only be loaded into the model that they were saved from."
        )
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        for saved in state[name]:
            if saved["seen"] > 0:
                _check_fit(name, layer, saved, modules)
    for name, layer in layers.items():
        # A layer may have neither parameters nor buffers.
        own = itertools.chain(layer.parameters(), layer.buffers(), model.parameters())
        device = next(own, torch.empty(0)).device
        layer._windows[:] = [layer.new_window() for _ in state[name]]
        for window, saved in zip(layer._windows, state[name], strict=True):
            window.load(saved, device)
            conv = modules.get(saved["conv"])
            window.conv = None if conv is None else weakref.ref(conv)


def _check_fit(name: str, layer: CBN, saved: dict, modules: dict[str, nn.Module]) -> None:
    """Refuses a saved window that a layer cannot use, as far as its kind and shapes show."""
    new, h, conv = layer.new_window(), saved.get("h"), modules.get(saved["conv"])
    if saved["kind"] != new.kind:
        raise ValueError(
            f"load_window_state: CBN layer '{name}' has a {new.kind} in force, the state a "
            f"{saved['kind']}. Build the model with the same window and window_size, and call "
            "set_window first."
        )
    channels = (saved["values"] if "values" in saved else saved["vectors"]).shape[-1]
    fits = channels == layer.num_features
    if h is not None:
        fits &= bool(layer.compensate) and h.dtype == new.dtype
    if linking.is_plain(conv):  # other modules' weights show only in a forward
        if h is None:
            fits &= not (layer.compensate and conv.weight.requires_grad)
        else:
            fits = fits and h.shape[-1] == conv.weight[0].numel()
    if not fits:
        raise ValueError(
            f"load_window_state: the window of CBN layer '{name}' is of another number of "
            "channels, another convolution (or the same, frozen then and training now) or another "
            "setting of compensate or window_dtype. Build the model as the one that was saved."
        )


def cbn_layers(model: nn.Module) -> dict[str, CBN]:
    """The CBN layers of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CBN)}
