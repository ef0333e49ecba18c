"""Statistics of a population: against a recomputation, and what they leave alone."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from cbn_mmdet import BRN, CBN, MABN, link, precise_statistics, step, window_state

NORMS = {"BN": nn.BatchNorm2d, "CBN": CBN, "BRN": BRN}


def network(norm, double=True):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), norm(3), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False), norm(4), nn.ReLU()
    )
    link(model)
    return model.double() if double else model


def images(count=12, size=8):
    """Images that differ in tone and contrast."""
    torch.manual_seed(1)
    scale, shift = torch.rand(2, count, 2, 1, 1, dtype=torch.float64) * 3
    return scale * torch.randn(count, 2, size, size, dtype=torch.float64) + shift


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("batch", [1, 5, 12])
def test_the_first_layer_has_the_populations_moments(norm, batch):
    """Over all positions of all images, whatever the batches."""
    model, data = network(norm), images()
    assert precise_statistics(model, data.split(batch)) == ["1", "4"]
    y = model[0](data)
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, y.var((0, 2, 3), unbiased=False))


def test_mabn_has_second_moments():
    """It takes no mean off, in inference either."""
    model, data = network(MABN), images()
    assert precise_statistics(model, data.split(5)) == ["1", "4"]
    assert not model[1].running_mean.any()
    torch.testing.assert_close(model[1].running_var, model[0](data).square().mean((0, 2, 3)))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_in_one_batch_all_layers_have_those_of_inference(norm):
    model, data = network(norm), images()
    precise_statistics(model, [data])
    model.eval()
    y = model[:4](data)
    torch.testing.assert_close(model[4].running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(model[4].running_var, y.var((0, 2, 3), unbiased=False))


def test_deep_layers_come_close_to_those_of_inference():
    """With images one by one, closer than by averages of each batch's own, as in training."""
    data = images(400)
    errors = {}
    for rule in ("precise", "own"):
        model = network(nn.BatchNorm2d)
        if rule == "precise":
            precise_statistics(model, data.split(1))
        else:
            for layer in (model[1], model[4]):
                layer.momentum = None
                layer.reset_running_stats()
            for batch in data.split(1):
                model(batch)
        model.eval()
        y = model[:4](data)
        errors[rule] = (model[4].running_var / y.var((0, 2, 3), unbiased=False) - 1).abs().mean()
    assert errors["precise"] < 0.05
    assert errors["precise"] < 0.5 * errors["own"]


@pytest.mark.parametrize("window", ["moving", "sliding"])
def test_the_model_is_left_as_found(window):
    model, data = network(lambda channels: CBN(channels, window=window, window_size=3)), images()
    for batch in data.split(4):  # a training that has begun
        model(batch).sum().backward()
        step(model)
    frozen = copy.deepcopy(model[1].eval())
    before = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    windows = window_state(model)
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    assert precise_statistics(model, data.split(1)) == ["4"]
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"4.running_mean", "4.running_var"}
    assert torch.equal(frozen.running_mean, model[1].running_mean)
    for one, other in zip(gradients, model.parameters(), strict=True):
        assert torch.equal(one, other.grad)
    for name, (state,) in window_state(model).items():
        assert state["seen"] == 3 and state.keys() == windows[name][0].keys()
        for found, expected in zip(state.values(), windows[name][0].values(), strict=True):
            assert found.equal(expected) if torch.is_tensor(found) else found == expected


def test_what_others_count_is_left_as_found():
    """Losses for long-tailed classes count in buffers that they change or replace."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("changed", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(()))

        def forward(self, x):
            self.changed += len(x)
            self.replaced = self.replaced + len(x)
            return x

    model = nn.Sequential(Counts(), *network(nn.BatchNorm2d))
    before = list(model[0].buffers())
    assert precise_statistics(model, images().split(4)) == ["2", "5"]
    for found, expected in zip(model[0].buffers(), before, strict=True):
        assert found is expected and found == 0


def test_an_error_puts_everything_back():
    model, data = network(nn.BatchNorm2d), images()

    def batches():
        yield data[:4]
        raise KeyboardInterrupt

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        precise_statistics(model, batches())
    for name, value in model.state_dict().items():
        assert value.equal(before[name]), name
    assert model[1].training and not model[1]._forward_pre_hooks


def test_what_is_not_reached_or_empty_keeps_its_statistics():
    model = network(nn.BatchNorm2d)
    model.append(nn.BatchNorm2d(4))  # never run
    empty = torch.zeros(0, 2, 8, 8, dtype=torch.float64)
    assert precise_statistics(model, [empty], lambda x: model[:6](x)) == []
    assert precise_statistics(model, [images(), empty], lambda x: model[:6](x)) == ["1", "4"]
    assert model[6].running_mean.eq(0).all() and model[6].running_var.eq(1).all()


def test_a_layer_that_is_handed_its_input_by_name():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double()
    names = precise_statistics(model, [images()], lambda x: model[1](input=model[0](x)))
    assert names == ["1"]
    expected = model[0](images()).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, expected)


def test_nan_is_left_out_and_told_of():
    model, data = network(nn.BatchNorm2d), images()
    spoilt = torch.full_like(data[:1], float("nan"))
    with pytest.warns(UserWarning, match=r"'1' is the first of 2 layers that met NaN"):
        precise_statistics(model, [data[:6], spoilt, data[6:]])
    y = model[0](data)
    torch.testing.assert_close(model[1].running_var, y.var((0, 2, 3), unbiased=False))


def test_other_dimensions_and_half_precision():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16()
    data = torch.randn(64, 3).bfloat16()
    assert precise_statistics(model, data.split(8)) == ["1"]
    y = model[0](data).float()
    assert model[1].running_var.dtype == torch.bfloat16
    torch.testing.assert_close(
        model[1].running_var.float(), y.var(0, unbiased=False), rtol=0.02, atol=0
    )


def test_a_model_that_does_not_train_is_refused():
    for model in (network(nn.BatchNorm2d).eval(), nn.Conv2d(1, 1, 1)):
        with pytest.raises(
            ValueError, match=r"no batch normalisation .* Call model.train\(\) first"
        ):
            precise_statistics(model, [])


def worker(rank, folder):
    """Process 0 has 5 of the images, process 1 the other 7, process 2 none."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    model, share = network(nn.BatchNorm2d), slice(*[(0, 5), (5, 12), (12, 12)][rank])
    assert precise_statistics(model, images()[share].split(2)) == ["1", "4"]
    torch.save(model.state_dict(), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.slow
def test_over_processes(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=3)
    states = [torch.load(tmp_path / f"{rank}.pth") for rank in range(3)]
    for name in states[0]:
        assert all(torch.equal(states[0][name], state[name]) for state in states[1:]), name
    model, data = network(nn.BatchNorm2d), images()
    y = model[0](data)
    torch.testing.assert_close(states[0]["1.running_mean"], y.mean((0, 2, 3)))
    torch.testing.assert_close(states[0]["1.running_var"], y.var((0, 2, 3), unbiased=False))
