"""What batch renormalisation and moving average batch normalisation do alike: as nn.Module, in half
precision, where they are copied, and what they refuse."""

import copy
import io
import pickle
from typing import NamedTuple

import pytest
import torch
from layers import assert_all_equal
from torch import nn
from torch.utils.checkpoint import checkpoint

from cbn_mmdet import BRN, MABN, CenConv2d


class Rival(NamedTuple):
    """A norm, and how it is set up here.

    Attributes:
        kind: The layer.
        conv: The convolution that feeds it.
        options: With every part in force from the third step at the latest.
        ramp: With parts that come into force one after another.
        own: The names of its settings.
    """

    kind: type
    conv: type
    options: dict
    ramp: dict
    own: set

    def trained(self, steps=5, **kwargs):
        """A layer with random parameters, after some steps on moving batches."""
        torch.manual_seed(0)
        norm = self.kind(4, **{**self.options, **kwargs})
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        for _ in range(steps):
            norm(batch().requires_grad_()).square().sum().backward()
        norm.zero_grad()
        return norm

    @property
    def title(self):
        """How messages begin."""
        return rf"^{self.kind.__name__} layer of 4 channels: "


RIVALS = [
    Rival(
        BRN,
        nn.Conv2d,
        dict(warmup=0, r_end=0, d_end=0),
        dict(warmup=2, r_end=8, d_end=6),
        {"r_max", "d_max", "warmup", "r_end", "d_end"},
    ),
    Rival(
        MABN,
        CenConv2d,
        dict(buffer_size=3, warmup=0, r_warmup=0),
        dict(buffer_size=3, warmup=2, r_warmup=6),
        {"buffer_size", "warmup", "r_warmup", "r_max"},
    ),
]
pytestmark = pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.kind.__name__)


def batch():
    return torch.randn(2, 4, 5, 6) * torch.rand(1) * 3 + torch.randn(1)


def assert_same(norm, before):
    """It holds what a state dict has."""
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class TestIsBatchNorm:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_evaluation_bit_for_bit(self, dtype, rival):
        norm, bn = rival.trained().eval().to(dtype), nn.BatchNorm2d(4).eval().to(dtype)
        before = copy.deepcopy(norm.state_dict())
        bn.load_state_dict({name: before[name] for name in bn.state_dict()})
        x = batch().to(dtype)
        assert torch.equal(norm(x), bn(x))
        assert norm(x[:0]).shape == (0, 4, 5, 6)
        assert_same(norm, before)

    @pytest.mark.parametrize("checkpointed", [True, False])
    def test_an_empty_batch_changes_nothing(self, checkpointed, rival):
        """It has nothing to correct or learn, so checkpointing may repeat the forward."""
        norm = rival.trained()
        before = copy.deepcopy(norm.state_dict())
        x = torch.randn(0, 4, 5, 6, requires_grad=True)
        y = checkpoint(norm, x, use_reentrant=False) if checkpointed else norm(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape
        # Distributed training waits for a gradient of every parameter.
        assert all(torch.equal(p.grad, torch.zeros(4)) for p in norm.parameters())
        assert_same(norm, before)

    @pytest.mark.parametrize("requires_grad", [True, False])
    def test_built_from_a_config(self, requires_grad, rival):
        from mmcv.cnn import build_norm_layer

        options = dict(momentum=0.01, warmup=9, r_max=2)
        cfg = dict(type=rival.kind.__name__, requires_grad=requires_grad, **options)
        name, norm = build_norm_layer(cfg, 4, postfix=1)
        assert name == "bn1" and type(norm) is rival.kind
        assert str(norm) == str(rival.kind(4, **options))
        assert {key: getattr(norm, key) for key in options} == options
        assert all(p.requires_grad is requires_grad for p in norm.parameters())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("missing", ["weight", "bias"])
    def test_a_parameter_that_was_removed(self, missing, dtype, rival):
        norm = rival.trained().to(dtype)
        getattr(norm, missing).data.fill_(missing == "weight")
        without = copy.deepcopy(norm)
        setattr(without, missing, None)
        x = batch().to(dtype)
        torch.testing.assert_close(without(x), norm(x))

    def test_frozen_parameters(self, rival):
        norm = rival.trained().requires_grad_(False)
        x = batch().requires_grad_()
        norm(x).square().sum().backward()
        assert x.grad.any() and norm.weight.grad is None

    def test_a_forward_leaves_nothing_but_buffers(self, rival):
        assert vars(rival.trained(steps=40)).keys() == vars(nn.BatchNorm2d(4)).keys() | rival.own


class TestRepeatedForwards:
    """A repetition would be normalised by other averages than the first forward."""

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("is_open", [True, False])
    def test_checkpointing_is_refused(self, is_open, reentrant, rival):
        """In the warm-up as well, before its time is lost; the first forward counts once."""
        torch.manual_seed(0)
        norm = rival.kind(4, **(rival.options if is_open else {}))
        model = nn.Sequential(rival.conv(3, 4, 3), norm, nn.ReLU())
        plain = copy.deepcopy(model)
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        loss = checkpoint(model, x, use_reentrant=reentrant).sum()
        refusal = rival.title + r"activation checkpointing repeats .*\(with_cp=False\)"
        with pytest.raises(RuntimeError, match=refusal):
            loss.backward()
        plain(x)
        assert_all_equal(model.buffers(), plain.buffers())

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_of_evaluation_they_are_as_they_were(self, reentrant, rival):
        """As those of the norms of a detector's frozen backbone."""
        model = nn.Sequential(rival.conv(3, 4, 3), rival.trained().eval())
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        (expected,) = torch.autograd.grad(model(x).square().sum(), x)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        assert torch.equal(x.grad, expected)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_graphs_have_the_evaluation_alone(self, rival):
        norm, x = rival.trained(), batch()
        with pytest.raises(RuntimeError, match=rival.title + r".*model.eval\(\)"):
            torch.jit.trace(norm, x)
        with pytest.raises(RuntimeError, match=rival.title + "torch.jit.script.*to_batchnorm"):
            torch.jit.script(norm)
        assert torch.equal(torch.jit.trace(norm.eval(), x)(x), norm(x))


class TestPrecision:
    def test_bfloat16_autocast(self, rival):
        torch.manual_seed(0)
        model = nn.Sequential(rival.conv(3, 4, 3, bias=False), rival.kind(4, **rival.options))
        half = copy.deepcopy(model)
        for _ in range(5):
            x = torch.randn(2, 3, 12, 12) + torch.randn(1)
            y = model(x)
            with torch.autocast("cpu", torch.bfloat16):
                y_half = half(x)
            assert y_half.dtype == torch.bfloat16
            torch.testing.assert_close(y_half.float(), y, rtol=0.05, atol=0.08)
            for norm in (model, half):
                norm.zero_grad()
            target = torch.randn_like(y)
            (y * target).sum().backward()
            (y_half * target).sum().backward()
            for ours, theirs in zip(half.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(
                    ours.grad, theirs.grad, rtol=0.1, atol=0.03 * theirs.grad.abs().max().item()
                )
        floats = [each for each in half.buffers() if each.is_floating_point()]
        assert {each.dtype for each in floats} == {torch.float32}

    @pytest.mark.parametrize("training", [True, False])
    def test_channels_last_stays(self, training, rival):
        norm = rival.trained().train(training)
        twin = copy.deepcopy(norm)
        x = batch().requires_grad_()
        y = norm(x.to(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, twin(x))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_copy_goes_on_alike(steps, rival):
    """And so does a resumed run: in the warm-up, with a window that is half full, and full."""
    norm = rival.trained(steps, **rival.ramp)
    buffer = io.BytesIO()
    torch.save(norm, buffer)
    buffer.seek(0)
    resumed = rival.kind(4, **rival.ramp)
    resumed.load_state_dict(norm.state_dict())
    copies = copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))
    others = [*copies, torch.load(buffer, weights_only=False), resumed]
    for _ in range(5):
        x, results = batch(), []
        for each in (norm, *others):
            x_ = x.clone().requires_grad_()
            y = each(x_)
            y.square().sum().backward()
            results.append([y, x_.grad])
        for result in results:
            assert_all_equal(result, results[0])
    for other in others:
        assert_same(other, norm.state_dict())
        assert str(other) == str(norm)


class TestErrors:
    @pytest.mark.parametrize(
        "kwargs, message",
        [
            (dict(num_features=0), "num_features must be a whole number of at least 1, got 0"),
            (dict(eps=0), "eps must be a number above 0, got 0"),
            (dict(momentum=2), "momentum must be None or from 0 to 1, got 2"),
            (dict(affine=1), "affine must be True or False, got 1"),
            (dict(track_running_stats=False), r"track_running_stats must be True \(type='BN'"),
            (dict(r_max=float("inf")), "r_max must be a finite number of at least 1, got inf"),
            (dict(warmup=-1), "warmup must be a whole number of at least 0, got -1"),
        ],
    )
    def test_arguments(self, kwargs, message, rival):
        """Tests the wording; test_fuzz.py tests which values are refused."""
        with pytest.raises(ValueError, match=f"^{rival.kind.__name__}: {message}"):
            rival.kind(**{"num_features": 4, **kwargs})

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("shape", [(4, 5), (4, 5, 5), (2, 4, 5, 5, 5)])
    def test_dimensions(self, shape, training, rival):
        with pytest.raises(ValueError, match=rival.title + r".*\(N, C, H, W\), got \d dimensions"):
            rival.kind(4).train(training)(torch.randn(shape))

    @pytest.mark.parametrize("training", [True, False])
    def test_channels(self, training, rival):
        with pytest.raises(ValueError, match=rival.title + "has num_features=4.* 5 channels"):
            rival.kind(4).train(training)(torch.randn(2, 5, 4, 4))
