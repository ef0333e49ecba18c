"""A CUDA device for machines without one: what would be launched, and what would wait for it.

Under torch's ``FakeTensorMode`` a tensor has a shape, a dtype and a device but no values: its
operations take the code paths of that device, but compute nothing.
"""

import sys
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

import cbn_mmdet
from cbn_mmdet.norm import iteration, linking
from cbn_mmdet.norm.kernels import statistics_dtype

PACKAGE = str(Path(cbn_mmdet.__file__).parent)

# Besides views: operations that allocate, query, or make a new handle of the same memory.
NO_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach", "lift_fresh", "alias", "device", "is_pinned", "_unsafe_view", "_reshape_alias"),
}


class Counted:
    """What ran on the device.

    Attributes:
        launches: Number of calls, by operation and line of the package.
        waits: Operations and lines that waited for the device: they read a value from it, or copied
            unpinned memory from or to it.
        largest: Element count of the largest result, by operation and line.
        bytes: Of all arguments and results, as if no cache held any.
        flops: Operations of convolutions and matrix products.
    """

    def __init__(self):
        self.launches, self.waits, self.largest = Counter(), [], defaultdict(int)
        self.bytes = self.flops = 0

    @property
    def total(self):
        return self.launches.total()

    def __str__(self):
        rows = [(f"{count:4d}", *where) for where, count in self.launches.most_common()]
        rows += [("wait", *where) for where in self.waits]
        return "\n".join(f"{count}  {name:28s}  {line}" for count, name, line in rows)


class Watch(TorchDispatchMode):
    """Counts what runs on the device, and answers what torch cannot for tensors without values.

    Args:
        answer: The value that every read from the device returns.
    """

    def __init__(self, answer):
        super().__init__()
        self.answer, self.counted = answer, Counted()

    def take(self):
        """Returns what was counted since the last call, and starts anew."""
        counted, self.counted = self.counted, Counted()
        return counted

    def tolist(self, tensor):
        """Counts one copy; torch would read a tensor without values number by number."""
        if tensor.is_cuda:
            self.counted.launches["tolist", line()] += 1
            self.counted.waits.append(("tolist", line()))
        values = self.answer
        for size in reversed(tensor.shape):
            values = [values] * size
        return values

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            if args[0].is_cuda:
                self.counted.waits.append((name, line()))
            kind = float if args[0].is_floating_point() else int
            return bool(self.answer) if args[0].dtype == torch.bool else kind(self.answer)
        if name == "_pin_memory":
            return torch.empty_like(args[0])
        if name == "batch_norm_update_stats":  # has no fake kernel
            dtype = statistics_dtype(args[0].dtype)
            result = [args[0].new_empty(args[0].shape[1], dtype=dtype) for _ in range(2)]
        elif name in ("batch_norm_elemt", "batch_norm_backward_elemt"):  # nor have these
            result = torch.empty_like(args[name == "batch_norm_backward_elemt"])
        else:
            result = function(*args, **kwargs)
        if not function.is_view and name not in NO_LAUNCH:
            self.count(name, args, kwargs, result)
            flops = flop_registry.get(function.overloadpacket)
            if flops is not None:
                self.counted.flops += flops(*args, **kwargs, out_val=result)
        return result

    def count(self, name, args, kwargs, result):
        made = [each for each in tree_flatten(result)[0] if isinstance(each, torch.Tensor)]
        tensors = [
            each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)
        ]
        devices = {each.device.type for each in (*tensors, *made)}
        # cuDNN clones its reserve, as a graph walked by hand could be walked again.
        is_reserve = name == "clone" and made[0].dtype == torch.uint8
        if "cuda" not in devices or is_reserve:
            return
        where = name, line()
        self.counted.launches[where] += launches_of(name, args)
        is_new = name.startswith("new_") or name.endswith("_like")  # from an argument's shape alone
        self.counted.bytes += sum(each.nbytes for each in (*(() if is_new else tensors), *made))
        largest = self.counted.largest
        largest[where] = max(largest[where], *(each.numel() for each in made), 0)
        is_copy = name in ("_to_copy", "copy_") and "cpu" in devices
        if is_copy and not (kwargs.get("non_blocking") or True in args[2:]):
            self.counted.waits.append(where)


def launches_of(name, args):
    """A foreach operation is one launch if its tensors are alike; else torch loops over them.

    Batch norm's statistics are one, besides the update of running ones, and in bfloat16 a copy of a
    strided view.
    """
    if name == "batch_norm_update_stats":
        y, running_mean = args[:2]
        is_copied = y.dtype == torch.bfloat16 and not y.is_contiguous()
        return 1 + is_copied + (running_mean is not None)
    lists = [each for each in args if isinstance(each, list | tuple) and len(each) > 0]
    lists = [each for each in lists if isinstance(each[0], torch.Tensor)]
    if not name.startswith("_foreach_") or not lists:
        return 1
    is_fast = all(
        len({(each.shape, each.stride(), each.device) for each in together}) == 1
        and (name == "_foreach_copy_" or {each.dtype for each in together} == {lists[0][0].dtype})
        for together in zip(*lists, strict=True)
    )
    return 1 if is_fast else len(lists[0])


def line():
    """The innermost line of the package that is running."""
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    path = Path(frame.f_code.co_filename).relative_to(PACKAGE)
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"


def type_of(value):
    """The type of a value; for a fake parameter, that of a real one."""
    return torch.nn.Parameter if isinstance(value, torch.nn.Parameter) else type(value)


def clear_caches():
    """Drops matrices that are kept for the next iteration: they have values, or have none."""
    for name, module in list(sys.modules.items()):
        if name.startswith("cbn_mmdet.norm."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@contextmanager
def fake_cuda(answer=0.0):
    """A watched CUDA device whose tensors have no values; every value read is the answer.

    (``step`` first asks whether anything was infinite or NaN: 0 says that nothing was.)
    """
    watch = Watch(answer)
    with ExitStack() as stack:
        clear_caches()
        stack.callback(clear_caches)

        def replace(where, name, by):
            stack.enter_context(mock.patch.object(where, name, by))

        replace(FakeTensor, "tolist", lambda tensor: watch.tolist(tensor))
        # Under FakeTensorMode a parameter's type is not nn.Parameter.
        replace(linking, "is_plain", lambda conv: isinstance(conv, torch.nn.Conv2d))
        stack.enter_context(mock.patch.object(iteration, "type", type_of, create=True))
        replace(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        replace(torch.cuda, "is_bf16_supported", lambda: True)
        stack.enter_context(FakeTensorMode())
        stack.enter_context(watch)
        yield watch


@torch.no_grad()
def backward(output):
    """Walks the graph as autograd does; autograd itself asks for a real device."""
    waiting, leaves = {output.grad_fn: {0: torch.empty_like(output)}}, {}
    while waiting:
        node = max(waiting, key=lambda each: each._sequence_nr())
        given = waiting.pop(node)
        given = [given.get(place) for place in range(len(node._input_metadata))]
        found = node.apply(*given) if hasattr(node, "apply") else node(*given)
        found = found if isinstance(found, tuple) else (found,)
        for (after, place), grad in zip(node.next_functions, found, strict=False):
            if after is not None and grad is not None:
                is_leaf = after.name().endswith("AccumulateGrad")
                slots = (leaves if is_leaf else waiting).setdefault(after, {})
                slots[place] = grad if place not in slots else slots[place] + grad
