"""Other people's tools, which look for batch norms, and models that have none of this package."""

import copy
import warnings

import pytest
import torch
from layers import backward, descend, held
from mmengine.optim import build_optim_wrapper
from torch import fx, nn

from cbn_mmdet import (
    BRN,
    CBN,
    MABN,
    SyncCBN,
    link,
    precise_statistics,
    set_window,
    step,
    to_batchnorm,
)


def images():
    """Random images; no two batches have the same scale and shift."""
    return torch.randn(2, 4, 9, 7) * (0.5 + torch.rand(1)) + torch.randn(1)


def blocks(norm=CBN, **kwargs):
    """Two convolutions with a norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(4, 6, 3), norm(6, **kwargs), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3), norm(6, **kwargs)),
    )


def trained(**kwargs):
    """A linked model after some iterations."""
    model = blocks(window_size=4, **kwargs)
    link(model)
    for _ in range(6):
        backward(model, images())
        step(model)
        descend(model, 0.1)
    model.zero_grad()
    return model


class TestToolsThatLookForBatchNorm:
    """By ``isinstance``, as other people's code does."""

    @pytest.mark.parametrize("kind", [CBN, SyncCBN])
    def test_is_one(self, kind):
        assert isinstance(kind(4), nn.BatchNorm2d)

    @staticmethod
    def update_bn_stats(model, batches):
        """fvcore's precise BN: with a momentum of 1 the running statistics are the batch's."""
        layers = [m for m in model.modules() if m.training and isinstance(m, nn.BatchNorm2d)]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.momentum = 1.0
        sums = [[torch.zeros_like(b) for b in (m.running_mean, m.running_var)] for m in layers]
        with torch.no_grad():
            for x in batches:
                model(x)
                for layer, of in zip(layers, sums, strict=True):
                    of[0] += layer.running_mean / len(batches)
                    of[1] += layer.running_var / len(batches)
        for layer, of, momentum in zip(layers, sums, momenta, strict=True):
            layer.running_mean, layer.running_var = of
            layer.momentum = momentum

    def test_precise_statistics_are_told_that_nothing_moves(self):
        """Of a linked model, which trained: a forward without a step is no iteration."""
        model = trained()
        before = copy.deepcopy(model.state_dict())
        with pytest.warns(UserWarning, match="running statistics .*precise_statistics to gather"):
            self.update_bn_stats(model, [images() for _ in range(12)])
        assert held(model) == {"1": [6], "4": [6]}
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name])

    def test_precise_statistics_of_what_to_batchnorm_makes(self):
        """fvcore's agree with this package's, gathered on the unconverted model."""
        model, batches = trained(), [images() for _ in range(12)]
        other = to_batchnorm(copy.deepcopy(model)).train()
        self.update_bn_stats(other, batches)
        precise_statistics(model, batches)
        # Variances, and layers behind another norm, differ as much as batches do.
        torch.testing.assert_close(model[1].running_mean, other[1].running_mean)

    @staticmethod
    def configure_model(model):
        """As TENT does: only scales and shifts train, with the test batch's statistics."""
        model.train()
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(True)
                module.track_running_stats = False
                module.running_mean = module.running_var = None
        return model

    def test_adaptation_at_test_time(self):
        """Windows are empty once weights are loaded, and no step fills them: CBN adapts as BN."""
        model, bn = trained(), blocks(nn.BatchNorm2d)
        for each in (bn, model):
            each.load_state_dict(model.state_dict())
        optimizers = []
        for each in (model, bn):
            self.configure_model(each)
            trains = [p for p in each.parameters() if p.requires_grad]
            assert len(trains) == 4
            optimizers.append(torch.optim.SGD(trains, lr=0.1))
        for _ in range(3):
            x, outputs = images(), []
            for each, optimizer in zip((model, bn), optimizers, strict=True):
                y = each(x)
                outputs.append(y)
                probabilities = y.softmax(1)
                (-probabilities * y.log_softmax(1)).sum(1).mean().backward()  # the entropy
                optimizer.step()
                optimizer.zero_grad()
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window_size", ["auto", 1])
def test_statistics_that_were_removed_alone(window_size):
    """Some methods leave ``track_running_stats`` as it was; training goes on without them."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), CBN(4, window_size=window_size))
    link(model)
    model[1].running_mean = model[1].running_var = None
    for number in range(3):
        x = images()
        expected = nn.functional.batch_norm(model[0](x), None, None, training=True)
        is_same = torch.allclose(model(x), expected, atol=1e-5)
        assert is_same == (number == 0 or window_size == 1)
        step(model)
    assert model[1].running_mean is None


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_count_that_was_removed(momentum, size):
    """As in BN: the average goes on without it, and one over all batches stands still."""
    model, counting = blocks(momentum=momentum), blocks(momentum=0.1 if momentum else 0.0)
    model[1].num_batches_tracked = model[4].num_batches_tracked = None
    for each in (model, counting):
        link(each)
        set_window(each, size)
    for _ in range(2):
        x = images()
        for each in (model, counting):
            each(x)
            step(each)
    for name in ("running_mean", "running_var"):
        assert torch.equal(*(getattr(each[4], name) for each in (model, counting)))
    assert (model[1].running_mean == 0).all() == (momentum is None)
    assert model[1].num_batches_tracked is None


@pytest.mark.parametrize("norm", [BRN, MABN])
def test_adaptation_of_a_norm_that_needs_its_statistics_is_refused(norm):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), norm(4))
    model[1].running_mean = model[1].running_var = None
    with pytest.raises(RuntimeError, match="needs its running statistics in training.*type='BN'"):
        model(images())


class TestWeightDecay:
    """detectron2 and yolov5 group parameters by whether a module is a batch norm."""

    def test_of_mmengine(self):
        """``norm_decay_mult`` of its optimiser's constructor."""
        model = blocks()
        wrapper = build_optim_wrapper(
            model,
            dict(
                optimizer=dict(type="SGD", lr=0.1, weight_decay=1e-4),
                paramwise_cfg=dict(norm_decay_mult=0.0),
            ),
        )
        decays = {
            p: group["weight_decay"] for group in wrapper.param_groups for p in group["params"]
        }
        for module in model.modules():
            is_norm = isinstance(module, nn.BatchNorm2d)
            for parameter in module.parameters(recurse=False):
                assert decays[parameter] == (0 if is_norm else 1e-4)


class TestModelsWithoutCBN:
    """accelerate#791: a tool converted the layers, and this package's calls passed in silence."""

    @pytest.mark.parametrize(
        "call", [link, step, lambda model: set_window(model, 2)], ids=["link", "step", "set_window"]
    )
    def test_is_told_why(self, call):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(trained())
        assert not any(isinstance(module, CBN) for module in model.modules())
        with pytest.warns(UserWarning, match="no CBN layer.*convert_sync_batchnorm.*sync=True"):
            assert not call(model)
        with pytest.warns(UserWarning, match=r"no CBN layer.*norm_cfg=dict\(type='CBN'\)"):
            call(blocks(nn.BatchNorm2d))

    def test_is_not_told_to_convert_what_cannot_be(self):
        class Activated(nn.BatchNorm2d):
            """As timm's: normalises and activates."""

        with pytest.warns(
            UserWarning, match=r"Build it with CBN as its norm: it has Activated, and"
        ):
            link(blocks(Activated))

    def test_is_not_told_of_a_model_with_one(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trained()


def test_a_part_without_cbn_is_not_told_to_convert():
    """Stepping a part ends the whole model's iteration, but only if the part has a CBN layer."""
    model = trained()
    with pytest.warns(UserWarning, match=r"cbn_mmdet.step: the model has no CBN layer"):
        assert step(model[0]) is None


class TestFx:
    @pytest.mark.parametrize("linked", [False, True])
    def test_evaluation_is_traced(self, linked):
        model = (trained() if linked else blocks()).eval()
        traced = fx.symbolic_trace(model)
        x = images()
        assert torch.equal(traced(x), model(x))
        assert any("batch_norm" in str(node.target) for node in traced.graph.nodes)

    @pytest.mark.parametrize("linked", [False, True])
    def test_training_is_refused_by_name(self, linked):
        name = "layer '1'" if linked else "layer of 6 channels"
        with pytest.raises(RuntimeError, match=f"{name}.*to_batchnorm.*torch.fx.*leaf module"):
            fx.symbolic_trace(trained() if linked else blocks())

    def test_feature_extraction(self):
        """torchvision also traces training: it needs CBN as a leaf module, or converted."""
        from torchvision.models.feature_extraction import create_feature_extractor

        model = trained()
        with pytest.raises(RuntimeError, match="have it as a leaf module"):
            create_feature_extractor(model, ["2"])
        x = images()
        extract = create_feature_extractor(model, ["2"], tracer_kwargs=dict(leaf_modules=[CBN]))
        torch.testing.assert_close(extract.eval()(x)["2"], model.eval()[:3](x))
        extract = create_feature_extractor(to_batchnorm(model), ["2"])
        torch.testing.assert_close(extract.eval()(x)["2"], model.eval()[:3](x))
