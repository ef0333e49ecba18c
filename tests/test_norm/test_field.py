"""What people met who trained with batch norms: each case with the value that is right."""

import copy
import math
import warnings

import pytest
import torch
from test_hooks.test_cbn_hook import evaluation, log_of, runner
from test_norm.test_any_layer import CASES, Seen, images, model_of, move
from test_norm.test_linking import held
from torch import fx, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from cbn_mmdet import (
    CBN,
    SyncCBN,
    diagnose,
    link,
    precise_statistics,
    set_window,
    step,
    to_batchnorm,
    window_state,
)
from cbn_mmdet.norm.reference import Reference


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
        model(images(torch.float32)).square().mean().backward()
        step(model)
        move(model)
    model.zero_grad()
    return model


@pytest.mark.parametrize("window", ["moving", "sliding"])
def test_a_gate_that_grows(window):
    """A masked convolution: its gate is 1 when the layer is linked, and then grows by a fifth."""
    torch.manual_seed(0)
    case = CASES["gated"]
    layer = case.build()
    model = model_of(layer, window=window)
    slow, stale = (Reference(Seen(case, layer), window, 3, model[1].eps) for _ in "ab")
    for number in range(6):
        x = images()
        y = model(x)
        slow.conv.sync()
        stale.conv.weight.data.copy_(layer.weight.detach().flatten(1)[:, :, None, None])  # no gate
        expected = slow.forward(x, model[1].weight, model[1].bias)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        if number == 5:
            ungated = stale.statistics(layer(x))
            wrong = stale.normalize(layer(x), ungated, model[1].weight, model[1].bias)
            assert (wrong - y).norm() > 0.1 * y.norm()
        slow.step(x), stale.step(x)
        step(model)
        with torch.no_grad():
            layer.gate *= 1.2


class Levels(nn.Module):
    """A head that is shared by levels of different scale, or one norm for each."""

    def __init__(self, scales, is_separate=False):
        super().__init__()
        self.scales, self.conv = scales, nn.Conv2d(4, 4, 1)
        norms = [CBN(4, window_size=4) for _ in scales]
        self.norms = nn.ModuleList(norms if is_separate else norms[:1] * len(scales))

    def forward(self, x):
        levels = zip(self.scales, self.norms, strict=True)
        return sum(norm(self.conv(x * scale + scale)) for scale, norm in levels)


class TestOneNormOnSeveralLevels:
    """mmdetection#6515: five windows, but one set of running statistics for evaluation."""

    def run(self, folder, levels, epochs=2):
        loop = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
        hook = dict(type="CBNHook", burn_in=0)
        run, _ = runner(folder, hook, levels, loop=loop, **evaluation())
        run.train()
        told = [line for line in log_of(folder).splitlines() if "called several times" in line]
        return run.model, told

    def test_is_told_once_before_the_first_evaluation(self, tmp_path):
        model, (line,) = self.run(tmp_path, Levels([0.5, 1, 4]))
        apart = diagnose(model)["body.1.norms.0"].apart
        assert apart > 0.3
        assert "WARNING - CBNHook: 'body.1.norms.0' is called several times in a forward" in line
        assert " standard deviations apart. " in line and "give each call its own layer" in line
        log = log_of(tmp_path)
        assert log.index(line) < log.index("Epoch(val)")

    def test_waits_for_a_window(self, tmp_path):
        """In a burn-in there is nothing to look into."""
        loop = dict(by_epoch=True, max_epochs=2, val_interval=1)
        run, _ = runner(
            tmp_path, dict(type="CBNHook", burn_in=1), Levels([0.5, 4]), loop=loop, **evaluation()
        )
        run.train()
        before, after = log_of(tmp_path).split("called several times")
        assert "Epoch(val) [1]" in before and "Epoch(val) [2]" not in before

    @pytest.mark.parametrize("levels", [Levels([1, 1.05]), Levels([0.5, 1, 4], is_separate=True)])
    def test_is_not_told(self, tmp_path, levels):
        model, told = self.run(tmp_path, levels)
        assert told == [] and all(each.apart < 0.3 for each in diagnose(model).values())


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
            self.update_bn_stats(model, [images(torch.float32) for _ in range(12)])
        assert held(model) == {"1": [6], "4": [6]}
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name])

    def test_precise_statistics_of_a_model_that_is_not_linked_are_refused(self):
        with pytest.raises(RuntimeError, match="CBN layer of 6 channels.*was never linked"):
            self.update_bn_stats(blocks(), [images(torch.float32)])

    def test_precise_statistics_of_what_to_batchnorm_makes(self):
        """Or this package's own, of the model as it is."""
        model, batches = trained(), [images(torch.float32) for _ in range(12)]
        other = to_batchnorm(copy.deepcopy(model)).train()
        self.update_bn_stats(other, batches)
        precise_statistics(model, batches)
        # Behind another norm, and in variances, they differ by what batches differ.
        torch.testing.assert_close(model[1].running_mean, other[1].running_mean)

    def test_groups_without_weight_decay(self):
        model = blocks()
        without_decay = {
            f"{name}.{key}"
            for name, module in model.named_modules()
            if isinstance(module, nn.BatchNorm2d)
            for key, _ in module.named_parameters(recurse=False)
        }
        assert without_decay == {"1.weight", "1.bias", "4.weight", "4.bias"}

    def test_freezing(self):
        """Evaluation mode and no gradients: batch normalisation that is frozen."""
        model, bn = trained(), blocks(nn.BatchNorm2d)
        bn.load_state_dict(model.state_dict())
        for each in (model, bn):
            for module in each.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval().requires_grad_(False)
        for _ in range(3):
            x = images(torch.float32)
            outputs = [each(x) for each in (model, bn)]
            assert torch.equal(*outputs)
            for each, y in zip((model, bn), outputs, strict=True):
                each.zero_grad()
                y.square().sum().backward()
            assert torch.equal(model[0].weight.grad, bn[0].weight.grad)
            step(model)
        assert all(model[place].weight.grad is None for place in (1, 4))
        assert all(map(torch.equal, model.buffers(), bn.buffers()))

    @staticmethod
    def configure_model(model):
        """TENT's: scales and shifts alone train, with the statistics of the test batch."""
        model.train()
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(True)
                module.track_running_stats = False
                module.running_mean = module.running_var = None
        return model

    def test_adaptation_at_test_time(self):
        """Convolutions stand still, so the past of those that trained is none: as BN does."""
        model, bn = trained(), blocks(nn.BatchNorm2d)
        bn.load_state_dict(model.state_dict())
        optimizers = []
        for each in (model, bn):
            self.configure_model(each)
            trains = [p for p in each.parameters() if p.requires_grad]
            assert len(trains) == 4
            optimizers.append(torch.optim.SGD(trains, lr=0.1))
        for _ in range(3):
            x, outputs = images(torch.float32), []
            for each, optimizer in zip((model, bn), optimizers, strict=True):
                y = each(x)
                outputs.append(y)
                probabilities = y.softmax(1)
                (-probabilities * y.log_softmax(1)).sum(1).mean().backward()  # the entropy
                optimizer.step()
                optimizer.zero_grad()
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)

    def test_adaptation_of_a_model_that_is_not_linked_is_refused(self):
        with pytest.raises(RuntimeError, match="CBN layer of 6 channels.*was never linked"):
            self.configure_model(blocks())(images(torch.float32))


class TestModelsWithoutCBN:
    """accelerate#791: somebody converted them, and every call of this package passed in silence."""

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

    def test_is_not_told_of_a_model_with_one(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trained()


def test_a_part_without_cbn_is_not_told_to_convert():
    """The step of a part of a linked model ends the iteration of the whole if it has a layer."""
    model = trained()
    with pytest.warns(UserWarning, match=r"cbn_mmdet.step: the model has no CBN layer"):
        assert step(model[0]) is None


class TestFx:
    @pytest.mark.parametrize("linked", [False, True])
    def test_evaluation_is_traced(self, linked):
        model = (trained() if linked else blocks()).eval()
        traced = fx.symbolic_trace(model)
        x = images(torch.float32)
        assert torch.equal(traced(x), model(x))
        assert any("batch_norm" in str(node.target) for node in traced.graph.nodes)

    @pytest.mark.parametrize("linked", [False, True])
    def test_training_is_refused_by_name(self, linked):
        name = "layer '1'" if linked else "layer of 6 channels"
        with pytest.raises(RuntimeError, match=f"{name}.*to_batchnorm.*torch.fx.*leaf module"):
            fx.symbolic_trace(trained() if linked else blocks())

    def test_feature_extraction(self):
        """torchvision's traces the training as well: with the layer as a leaf, or without it."""
        from torchvision.models.feature_extraction import create_feature_extractor

        model = trained()
        with pytest.raises(RuntimeError, match="have it as a leaf module"):
            create_feature_extractor(model, ["2"])
        x = images(torch.float32)
        extract = create_feature_extractor(model, ["2"], tracer_kwargs=dict(leaf_modules=[CBN]))
        torch.testing.assert_close(extract.eval()(x)["2"], model.eval()[:3](x))
        extract = create_feature_extractor(to_batchnorm(model), ["2"])
        torch.testing.assert_close(extract.eval()(x)["2"], model.eval()[:3](x))


@pytest.mark.parametrize("beside", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, None])
def test_batch_norms_that_no_norm_cfg_reaches(tmp_path, beside):
    """As CornerNet and CenterNet build them: the hook counts and names those that train."""
    norm = CBN(4, window_size=3)
    if beside is not None:
        other = beside(*((2, 4) if beside is nn.GroupNorm else (4,)))
        if beside is nn.SyncBatchNorm:  # on one process it is
            other = nn.BatchNorm2d(4)
        norm = nn.Sequential(norm, nn.Conv2d(4, 4, 1), other, nn.BatchNorm2d(4).eval())
        norm[3].train = lambda mode=True: norm[3]  # frozen
    run, _ = runner(tmp_path, dict(type="CBNHook", burn_in=0), norm, epochs=1)
    run.train()
    told = [line for line in log_of(tmp_path).splitlines() if "that are no CBN train" in line]
    if beside in (nn.GroupNorm, None):
        assert told == []
    else:
        (line,) = told
        assert "1 batch norms that are no CBN train beside 1 CBN layers, 'body.1.2' (Batch" in line
        assert "from_batchnorm turns them into CBN" in line


class TestForwardsWithoutAStep:
    """To gather statistics, as domain adaptation does by hand."""

    def test_is_told_once(self):
        model = blocks()
        link(model)
        told = []
        for number in range(25):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(images(torch.float32))
            told += [(number, str(each.message)) for each in caught]
        ((number, message),) = told
        assert (
            number == 9 and "10 forwards in training mode, and cbn_mmdet.step(model) was" in message
        )
        assert not model[1].running_mean.any()

    def test_a_search_on_a_line_is_none(self):
        """Of a model that trains: many forwards of a step of LBFGS."""
        model = trained()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(25):
                model(images(torch.float32))


class TestFoundInReview:
    def test_a_batch_with_nan_is_dropped_behind_any_layer(self):
        """Of a module that autograd has to tell of, too."""
        model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), CBN(4, window_size=4))
        link(model)
        for number in range(5):
            x = torch.randn(1, 3, 8, 8)
            if number in (1, 2):
                x[0, 0, 0, 0] = math.nan
            model(x).sum().backward()
            if number in (1, 2):
                with pytest.warns(UserWarning, match="NaN or infinite"):
                    step(model)
            else:
                step(model)
        assert window_state(model)["1"][0]["seen"] == 3

    def test_where_possible_repeats_what_a_checkpoint_ran(self):
        """The first forward has no graph to ask, so the repetition must not ask one either."""

        class Doubled(nn.Conv2d):
            def forward(self, x):
                return super().forward(x) * 2.0

        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                norm = CBN(4, compensate="where_possible", window_size=4)
                self.body = nn.Sequential(Doubled(3, 4, 3), norm)

            def forward(self, x):
                return checkpoint(self.body, x, use_reentrant=True)

        model, outputs = Checkpointed(), []
        link(model)
        model.body[1].register_forward_hook(lambda _, __, out: outputs.append(out.detach()))
        with pytest.warns(UserWarning, match="is not compensated") as warned:
            for _ in range(4):
                outputs.clear()
                model(torch.randn(1, 3, 8, 8, requires_grad=True)).square().sum().backward()
                step(model)
                assert torch.equal(*outputs)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter += 0.05
        assert len(warned) == 1

    def test_a_scale_that_a_hook_sets_is_the_gradients(self):
        def triple(norm, args):
            nn.init.constant_(norm.weight, 3.0)

        gradients = []
        for is_hooked in (True, False):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4))
            link(model)
            if is_hooked:
                model[1].register_forward_pre_hook(triple)
            else:
                nn.init.constant_(model[1].weight, 3.0)
            x = torch.randn(2, 3, 5, 5, requires_grad=True)
            model(x).pow(3).sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients) and gradients[0].any()

    def test_torchs_update_bn_is_not_warned_of(self, recwarn):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4))
        link(model)
        update_bn([torch.randn(2, 3, 5, 5) for _ in range(12)], model)
        assert model[1].num_batches_tracked == 12
        assert not [each for each in recwarn if "forwards in training mode" in str(each.message)]
