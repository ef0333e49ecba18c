"""Mixed and half precision: what is computed in float32 even so, and the loss scale."""

import copy
import math

import pytest
import torch
from conftest import computes_in_float16
from layers import (
    HALF,
    KINDS,
    assert_all_equal,
    assert_close_in_norm,
    assert_same,
    backward,
    held,
    iterate,
    linked,
    needs_scaler,
    state_of,
    step_alike,
    tensors,
)
from torch import nn

import cbn_mmdet
from cbn_mmdet import CBN, link, load_window_state, step, window_state


class TestMixedPrecision:
    @KINDS
    @pytest.mark.parametrize("dtype", HALF)
    def test_the_window_is_that_of_float32(self, dtype, kind):
        """Convolution and activations in half precision, statistics and window in float32."""
        torch.manual_seed(0)
        full = linked(kind)  # a bias has no gradient but rounding
        half = copy.deepcopy(full)
        link(half)
        for _ in range(5):
            x = torch.randn(2, 3, 12, 12) * 3 + 1
            expected = backward(full, x)
            got = backward(half, x, half=dtype)
            assert got[0].dtype == dtype
            assert_close_in_norm(got, expected, 0.02)
            step_alike(full, half)
        ours, theirs = state_of(half), state_of(full)
        assert {"m", "h", "sums"} < tensors(ours).keys() == tensors(theirs).keys()
        for name, value in tensors(ours).items():
            assert value.dtype == torch.float32
            difference = (value - theirs[name]).norm() / theirs[name].norm()
            # Gradients come in half precision, and surprises are small differences.
            limit = 5 if name in ("sums", "surprise") else 1
            assert difference < limit * (1e-3 if dtype == torch.float16 else 1e-2), name
        torch.testing.assert_close(half[1].running_var, full[1].running_var, rtol=1e-2, atol=0)

    @pytest.mark.parametrize("dtype", HALF)
    def test_many_positions_and_large_activations(self, dtype):
        """1e5 positions and activations of 1e3: sums leave fp16's range, statistics must not."""
        torch.manual_seed(0)
        full = linked(size=3)
        half = copy.deepcopy(full)
        link(half)
        for _ in range(3):
            x = torch.randn(2, 3, 224, 224) * 300 + 1000
            expected = backward(full, x)
            got = backward(half, x, half=dtype)
            assert_close_in_norm(got, expected, 0.02 if dtype == torch.float16 else 0.05)
            step_alike(full, half)
        torch.testing.assert_close(half[1].running_var, full[1].running_var, rtol=0.05, atol=0)

    @pytest.mark.parametrize("backward", ["mixed", "window"])
    @pytest.mark.parametrize("mean", [0, 100])
    def test_gradient_has_no_residue(self, mean, backward):
        """dL/dy sums to 0 over a channel; rounding its terms would leave a common part."""
        y = (torch.randn(2, 4, 50, 50) + mean).bfloat16().requires_grad_()
        target = torch.randn(2, 4, 50, 50).bfloat16()
        residues = []
        model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False).bfloat16(), CBN(4, backward=backward))
        nn.init.dirac_(model[0].weight)
        link(model)
        for norm in (model, nn.BatchNorm2d(4)):
            y.grad = None
            norm(y).backward(target)
            residues.append(y.grad.double().sum((0, 2, 3)).abs() / y.grad.double().abs().sum())
        assert residues[0].max() < 3 * residues[1].max() + 1e-5

    @KINDS
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("before", [0, 2])
    def test_the_window_is_float32_whatever_the_layers_dtype(self, before, dtype, kind):
        """Set from the start, or changed after some iterations."""
        model = linked(kind, bias=True)
        iterate(model, before)
        model.to(dtype)
        for _ in range(3):
            model(torch.randn(2, 3, 8, 8, dtype=dtype)).sum().backward()
            step(model)
        assert {each.dtype for each in tensors(state_of(model)).values()} == {torch.float32}

    def test_channels_last_stays(self):
        model = linked().to(memory_format=torch.channels_last)
        iterate(model, 2)
        x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        assert model(x).is_contiguous(memory_format=torch.channels_last)


@KINDS
class TestWindowInBfloat16:
    def pair(self, kind):
        models = [linked(kind, window_dtype=dtype) for dtype in ("float32", "bfloat16")]
        models[1].load_state_dict(models[0].state_dict())
        return models

    def test_halves_the_memory_and_hardly_changes_the_output(self, kind):
        models, naive = self.pair(kind), linked(kind, compensate=False)
        naive.load_state_dict(models[0].state_dict())
        for _ in range(6):
            x = torch.randn(2, 3, 8, 8) + 1
            change = 0.05 * torch.randn_like(models[0][0].weight)
            outputs = [model(x) for model in (*models, naive)]
            for model, y in zip((*models, naive), outputs, strict=True):
                y.square().mean().backward()
                step(model)
                model[0].weight.data += change
        full, half, without = outputs
        assert 0 < (half - full).norm() < 0.01 * (without - full).norm()
        window, halved = map(state_of, models)
        assert halved["h"].dtype == torch.bfloat16 and halved["m"].dtype == torch.float32
        saved = models[0][1].window_bytes - models[1][1].window_bytes
        assert saved == 2 * window["h"].numel()

    def test_is_exact_for_a_weight_that_rests(self, kind):
        """The rounding of h is multiplied by the distance that the weight has moved: here, zero."""
        models = self.pair(kind)
        for _ in range(4):
            x = torch.randn(2, 3, 8, 8) * 3 + 1
            outputs = [model(x) for model in models]
            for model in models:
                step(model)
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("channels", [4, 600])
    def test_gradient(self, channels, kind, monkeypatch):
        """Of layers that are converted in one part or in several."""
        monkeypatch.setattr(cbn_mmdet.norm.kernels, "_BLOCK", 1 << 12)
        grads = []
        for dtype in ("float32", "bfloat16"):
            torch.manual_seed(0)
            norm = CBN(channels, window=kind, window_size=8, window_dtype=dtype)
            model = nn.Sequential(nn.Conv2d(3, channels, 3), norm)
            link(model)
            for _ in range(4):
                model.zero_grad()
                y = model(torch.randn(2, 3, 8, 8) + 1)
                (y * torch.randn_like(y)).sum().backward()
                step(model)
                model[0].weight.data += 0.05 * torch.randn_like(model[0].weight)
            grads.append(model[0].weight.grad)
        error = (grads[1] - grads[0]).norm() / grads[0].norm()
        assert 0 < error < 0.01

    def test_a_saved_window_of_the_other_dtype_is_refused(self, kind):
        model = linked(kind, window_dtype="bfloat16")
        iterate(model, 3)
        with pytest.raises(ValueError, match="another setting of compensate or window_dtype"):
            load_window_state(linked(kind), window_state(model))
        other = linked(kind, window_dtype="bfloat16")
        load_window_state(other, window_state(model))
        assert torch.equal(state_of(other)["h"], state_of(model)["h"])


@needs_scaler
@KINDS
class TestLossScale:
    """``'mixed'`` averages gradients, which carry the scaler's scale."""

    def run(self, model, scaler=None, half=None, count=6, skipped=(), value=math.inf, told=True):
        """Trains; returns the gradients and the window's averages of each iteration.

        The loss of an iteration that is ``skipped`` is infinite, or NaN.
        """
        torch.manual_seed(1)
        dtype = model[0].weight.dtype
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        seen, before = [], sum(held(model).get("1", []))
        for number in range(count):
            x = torch.randn(2, 3, 12, 12).to(dtype).requires_grad_()
            weights = torch.randn(2, 4, 12, 12).to(dtype)
            optimizer.zero_grad()
            with torch.autocast("cpu", half, enabled=half is not None):
                loss = (model(x).to(dtype) * weights).sum()
            if number in skipped:
                loss = loss * value
            if isinstance(scaler, torch.amp.GradScaler):
                scale = scaler.get_scale()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
            else:
                scale = scaler or 1
                (loss * scale).backward()
                for parameter in model.parameters():
                    parameter.grad /= scale
            gradients = [x.grad / scale, *(p.grad.clone() for p in model.parameters())]
            if isinstance(scaler, torch.amp.GradScaler):
                scaler.step(optimizer)
                scaler.update()
            elif number not in skipped:
                optimizer.step()
            step(model, *([] if scaler is None or not told else [scaler]))
            assert state_of(model)["seen"] == before + number + 1
            seen.append([*gradients, state_of(model).get("sums")])
        return seen

    def build(self, kind, dtype=torch.float64):
        torch.manual_seed(0)
        return linked(kind).to(dtype)

    def assert_close(self, found, expected, tolerance=1e-5):
        for ours, theirs in zip(found, expected, strict=True):
            assert_close_in_norm(ours, theirs, tolerance)

    @pytest.mark.parametrize(
        "scaler",
        [lambda: 1000, lambda: 0.5, lambda: torch.amp.GradScaler("cpu", init_scale=3.0e4)],
        ids=["1000", "0.5", "GradScaler"],
    )
    def test_averages_are_those_of_an_unscaled_run(self, scaler, kind):
        """They differ if the layer is not told the scale."""
        plain, scaled, untold = (self.build(kind) for _ in range(3))
        expected = self.run(plain)
        self.assert_close(self.run(scaled, scaler()), expected)
        wrong = self.run(untold, 1000, told=False)
        assert (wrong[-1][-1] - expected[-1][-1]).norm() > expected[-1][-1].norm()

    def test_a_training_that_goes_on_without_a_scale(self, kind):
        """Exact from the second step on: a forward assumes the last scale that it was told."""
        plain, model = (self.build(kind) for _ in "ab")
        expected, found = self.run(plain), self.run(model, 1024, count=3)
        twin = self.build(kind)
        self.run(twin, count=3)
        for each, scale in ((model, 1024), (twin, 1)):
            x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(2)).double()
            each.zero_grad()
            (each(x).square().sum() * scale).backward()
            step(each)
        self.assert_close(self.run(model), self.run(twin))
        self.assert_close(found, expected[:3])

    @pytest.mark.parametrize("dtype", HALF)
    def test_in_half_precision(self, dtype, kind):
        plain, scaled = (self.build(kind, torch.float32) for _ in "ab")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
        self.assert_close(self.run(scaled, scaler, dtype), self.run(plain), 0.03)

    @pytest.mark.parametrize("interval", [1, 2])
    def test_a_scale_that_changes(self, interval, kind):
        """The scale doubles; where it does so at once, a ``step`` beforehand passes the scaler."""
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=interval)
        model = self.build(kind)
        if interval == 1:
            assert step(model, scaler) is None
        self.assert_close(self.run(model, scaler), self.run(self.build(kind)))
        assert scaler.get_scale() == 2.0 ** (8 + 6 // interval)

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    @pytest.mark.parametrize("skipped", [0, 3])
    def test_a_skipped_step(self, skipped, value, kind):
        """Its gradients leave the averages alone, whatever the new scale; its forward counts."""
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        how = dict(skipped=[skipped], value=value)
        found = self.run(self.build(kind), scaler, **how)
        expected = self.run(self.build(kind), **how)
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            if number == skipped:
                assert not ours[1].isfinite().all()
                before = found[number - 1][-1] if number else None
                assert (ours[-1] is None) == (before is None)
                assert before is None or torch.equal(ours[-1], before)
            else:
                assert_close_in_norm(ours, theirs, 1e-5)
        assert scaler.get_scale() == 2.0**7

    @pytest.mark.parametrize("dtype, scale", [(torch.float16, 2.0**40), (torch.bfloat16, 2.0**127)])
    def test_a_skipped_step_leaves_a_valid_window(self, dtype, scale, kind):
        """The weights stay, and what the forward learnt is as good as any."""
        if dtype == torch.float16 and not computes_in_float16():
            pytest.skip("this torch does not compute in float16 on the CPU")
        torch.manual_seed(0)
        model = linked(kind, bias=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=1e-12)
        weight, images = model[0].weight.clone(), torch.randn(3, 2, 3, 12, 12) * 5
        for index, x in enumerate(images[:2]):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = model(x).float().square().sum()
            scaler.scale(loss).backward()
            skipped = not model[0].weight.grad.isfinite().all()
            assert skipped == (index == 0)
            if skipped:
                scaler.step(optimizer)
                scaler.update()
                assert torch.equal(model[0].weight, weight)
            step(model, scaler)
            assert ("sums" in state_of(model)) == (not skipped)
        assert state_of(model)["seen"] == 2
        # The weights never moved: the window is the union of the three batches.
        with torch.autocast("cpu", dtype):
            output, y = model(images[2]), model[0](images.flatten(0, 1)).float()
        expected = nn.BatchNorm2d(4)(y)[-2:]
        torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.02)

    def test_a_resumed_run(self, kind):
        """Told its scaler before the first forward it goes on as if nothing had happened."""

        def go_on(model):
            torch.manual_seed(1)
            y = model(torch.randn(2, 3, 12, 12))
            model.zero_grad()
            scaler.scale((y * torch.randn(y.shape)).sum()).backward()
            step(model, scaler)

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        model = self.build(kind, torch.float32)
        self.run(model, scaler)
        resumed = copy.deepcopy(model)
        link(resumed)
        load_window_state(resumed, window_state(model))
        step(resumed, scaler)
        go_on(model), go_on(resumed)
        assert_all_equal(*([p.grad for p in each.parameters()] for each in (model, resumed)))
        assert_same(model, resumed)


@pytest.mark.parametrize("kind", ["moving", "sliding"])
def test_an_infinite_gradient_of_one_layer_leaves_the_others(kind):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (
                nn.Sequential(nn.Conv2d(2, 4, 3), CBN(4, window=kind, window_size=4)) for _ in "ab"
            )

        def forward(self, x):
            return self.left(x), self.right(x)

    def sums():
        return [state["sums"] for (state,) in window_state(model).values()]

    model = Heads()
    link(model)
    for number in range(3):
        before = sums() if number else None
        left, right = model(torch.randn(2, 2, 6, 5))
        (left.square().sum() * (math.inf if number == 2 else 1) + right.square().sum()).backward()
        step(model)
    assert torch.equal(sums()[0], before[0])
    assert not torch.equal(sums()[1], before[1]) and sums()[1].isfinite().all()
