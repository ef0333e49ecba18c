"""To batch normalisation and back."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import cbn_mmdet
from cbn_mmdet import (
    BRN,
    CBN,
    SyncCBN,
    from_batchnorm,
    link,
    links,
    set_window,
    step,
    to_batchnorm,
    window_state,
)


def images(count=2, size=12, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def mixed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        CBN(6, eps=1e-3, momentum=0.3),
        nn.ReLU(),
        nn.Sequential(
            nn.Conv2d(6, 6, 3, groups=2),
            SyncCBN(6, affine=False, window="sliding", window_size=3),
        ),
        nn.Conv2d(6, 4, 1),
        BRN(4, warmup=0, r_end=2, d_end=2),
    )


def with_batchnorm():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, eps=1e-3, momentum=0.3),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        (model(images(seed=seed)) - 1).square().mean().backward()
        optimizer.step()
        step(model)


def trained(model=None):
    model = mixed() if model is None else model
    link(model)
    train(model, sgd(model), range(4))
    return model


def kinds(model):
    return {type(module) for module in model.modules() if isinstance(module, _BatchNorm)}


def hooks(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def flags(model):
    """The number of entries that torch keeps beside the hooks themselves."""
    return sum(
        len(module._forward_hooks_with_kwargs) + len(module._forward_hooks_always_called)
        for module in model.modules()
    )


def window_tensors(model):
    return [
        value
        for states in window_state(model).values()
        for state in states
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)


class TestToBatchnorm:
    def test_evaluates_the_same(self):
        model = trained().eval()
        expected = model(images(seed=9))
        assert to_batchnorm(model) is model
        assert kinds(model) == {nn.BatchNorm2d}
        assert torch.equal(model(images(seed=9)), expected)

    def test_takes_over_the_tensors_themselves(self):
        model = trained()
        before = model.state_dict(keep_vars=True)
        model[3][1].eval()
        model[1].weight.requires_grad_(False)
        to_batchnorm(model)
        after = model.state_dict(keep_vars=True)
        assert list(before) == list(after)
        assert all(after[name] is tensor for name, tensor in before.items())
        assert model[1].training and not model[3][1].training
        assert not model[1].weight.requires_grad and model[1].bias.requires_grad
        assert (model[1].eps, model[1].momentum) == (1e-3, 0.3)
        assert not model[3][1].affine and model[3][1].weight is None

    def test_keeps_dtype(self):
        layer = to_batchnorm(CBN(3, dtype=torch.float64))
        assert layer.weight.dtype == layer.running_mean.dtype == torch.float64

    @pytest.mark.parametrize("kind", [CBN, SyncCBN, BRN])
    def test_a_layer_by_itself(self, kind):
        layer = kind(3)
        new = to_batchnorm(layer)
        assert type(new) is nn.BatchNorm2d and new.weight is layer.weight

    def test_without_running_statistics(self):
        layer = CBN(3, track_running_stats=False).eval()
        expected = layer(images())
        assert torch.equal(to_batchnorm(layer)(images()), expected)

    def test_refuses_a_parametrized_layer_and_changes_nothing(self):
        model = trained().eval()
        parametrize.register_parametrization(model[3][1], "running_var", nn.Softplus())
        expected = model(images())
        with pytest.raises(
            ValueError, match=r"'3\.1' \(CBN\) is parametrized.*remove_parametrizations"
        ):
            to_batchnorm(model)
        assert CBN in kinds(model) and torch.equal(model(images()), expected)
        parametrize.remove_parametrizations(model[3][1], "running_var")
        assert torch.equal(to_batchnorm(model)(images()), expected)

    def test_turns_a_subclass_without_a_forward_of_its_own(self):
        class Slow(CBN):
            def __init__(self, *args):
                super().__init__(*args, momentum=0.02)

        assert type(to_batchnorm(Slow(3))) is nn.BatchNorm2d

    def test_leaves_a_subclass(self):
        class Activated(CBN):
            def forward(self, input):
                return super().forward(input).relu()

        model = nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4), CBN(4)).eval()
        expected = model(images())
        with pytest.warns(UserWarning, match=r"'1' \(Activated\) stays as it is"):
            to_batchnorm(model)
        assert kinds(model) == {Activated, nn.BatchNorm2d}
        assert torch.equal(model(images()), expected)

    def test_shared_layers_stay_shared(self):
        norm = CBN(3)
        model = to_batchnorm(nn.ModuleList([norm, nn.Sequential(norm)]))
        assert model[0] is model[1][0] and type(model[0]) is nn.BatchNorm2d

    @pytest.mark.parametrize("links_before", [1, 2])
    def test_takes_the_link_away_and_nothing_else(self, links_before):
        model = trained()
        calls = []
        own = (
            lambda *_: calls.append("before"),
            lambda *_: calls.append("module"),
            lambda *_: calls.append("after"),
        )
        model[0].register_forward_pre_hook(own[0])
        model[0].register_forward_hook(own[1], with_kwargs=True)
        model[1].register_forward_hook(own[2], always_call=True)
        for _ in range(1, links_before):
            link(model)
        assert len(hooks(model)) > 3 and flags(model) > 2
        to_batchnorm(model)
        assert set(hooks(model)) == set(own) and flags(model) == 2
        model(images())
        assert calls == ["before", "module", "after"]

    @COPIES
    def test_takes_what_is_left_of_a_link_off_a_copy(self, copied):
        model = copied(trained())
        assert hooks(model)
        assert not hooks(to_batchnorm(model)) and not flags(model)

    def test_a_part_of_a_linked_model(self):
        """The rest goes on as in a model with a batch norm in that place."""
        model, reference = mixed(), mixed()
        for each in (model, reference):
            trained(each)
        to_batchnorm(model[3])
        assert kinds(model[3]) == {nn.BatchNorm2d} and type(model[1]) is CBN
        set_window(reference[3], 1)
        for each in (model, reference):
            train(each, sgd(each), range(4, 7))
        for name, tensor in reference.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert links(model) == {"1": "0"}

    def test_an_optimizer_goes_on_with_batch_norm(self):
        """As if the model had been batch norm all along, with the same weights and momenta."""
        model = mixed()
        link(model)
        optimizer = sgd(model)
        train(model, optimizer, range(4))
        reference = mixed()
        reference[1] = nn.BatchNorm2d(6, eps=1e-3, momentum=0.3)
        reference[3][1] = nn.BatchNorm2d(6, affine=False)
        reference[5] = nn.BatchNorm2d(4)
        reference.load_state_dict(model.state_dict())
        its_optimizer = sgd(reference)
        its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        to_batchnorm(model)
        train(model, optimizer, range(4, 7))
        train(reference, its_optimizer, range(4, 7))
        for name, tensor in reference.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name

    def test_can_be_linked_again(self):
        """What is left of an earlier link must not be in the way of a later one."""
        model = from_batchnorm(to_batchnorm(trained()))
        trained(model)
        assert links(model) == {"1": "0", "3.1": "3.0", "5": "4"}

    def test_a_saved_model_loads_without_this_package(self, tmp_path):
        model = trained().eval()
        expected = model(images(seed=9)).detach()
        torch.save(to_batchnorm(model), tmp_path / "model.pt")
        torch.save((images(seed=9), expected), tmp_path / "expected.pt")
        code = (
            "import sys; sys.modules['cbn_mmdet'] = None\n"
            "import torch; torch.set_num_threads(1)\n"
            "model = torch.load('model.pt', weights_only=False)\n"
            "images, expected = torch.load('expected.pt')\n"
            "assert torch.equal(model(images), expected)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def test_a_detector(self, root):
        from mmdet.registry import MODELS
        from mmengine.config import Config
        from mmengine.registry import init_default_scope

        init_default_scope("mmdet")
        folder = root / "studies/digits/configs"
        cfg = Config.fromfile(folder / "faster-rcnn_r18_fpn_cbn-all_1xb2_digits.py")
        model = MODELS.build(cfg.model).eval()
        x = torch.randn(1, 3, 64, 64)
        expected = model.extract_feat(x)
        to_batchnorm(model)
        assert kinds(model) == {nn.BatchNorm2d}
        assert all(map(torch.equal, model.extract_feat(x), expected))


class TestFromBatchnorm:
    def test_there_and_back(self):
        model = with_batchnorm()
        before = model.state_dict(keep_vars=True)
        expected = model.eval()(images())
        assert from_batchnorm(model, window_size=4) is model
        assert kinds(model) == {CBN}
        after = model.state_dict(keep_vars=True)
        assert list(before) == list(after)
        assert all(after[name] is tensor for name, tensor in before.items())
        assert torch.equal(model(images()), expected)
        assert torch.equal(to_batchnorm(model)(images()), expected)

    def test_trains_as_batch_norm_with_a_window_of_one(self):
        model, reference = with_batchnorm(), with_batchnorm()
        from_batchnorm(model)
        link(model)
        set_window(model, 1)
        for each in (model, reference):
            train(each, sgd(each), range(3))
        for name, tensor in reference.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name

    @pytest.mark.parametrize(
        "options",
        [
            {},
            dict(window_size=4, backward="window"),
            dict(window="sliding", window_size=4, backward="current"),
        ],
        ids=["defaults", "moving", "sliding"],
    )
    def test_trains_as_a_model_built_with_cbn(self, options):
        built = with_batchnorm()
        built[1] = CBN(6, eps=1e-3, momentum=0.3, **options)
        built[4] = CBN(4, **options)
        model = from_batchnorm(with_batchnorm(), **options)
        for each in (model, built):
            trained(each)
        for name, tensor in built.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name

    def test_a_linked_model_is_linked_anew(self):
        model = with_batchnorm()
        link(model)
        from_batchnorm(model)
        with pytest.raises(RuntimeError, match="never linked"):
            model(images())
        trained(model)
        assert links(model) == {"1": "0", "4": "3"}

    def test_options_of_the_window(self):
        options = dict(
            window="sliding",
            window_size=4,
            compensate=False,
            backward="window",
            window_dtype="bfloat16",
        )
        layer = from_batchnorm(nn.BatchNorm2d(2), **options)
        assert {name: getattr(layer, name) for name in options} == options
        layer = from_batchnorm(nn.BatchNorm2d(2), window="moving", window_size="auto")
        assert repr(layer) == repr(CBN(2)) == repr(from_batchnorm(nn.BatchNorm2d(2)))

    def test_options(self):
        model = nn.ModuleList([nn.BatchNorm2d(2, eps=1e-2, momentum=None), nn.SyncBatchNorm(2)])
        first, second = from_batchnorm(copy.deepcopy(model), derivative_stride=2)
        assert (first.eps, first.momentum, first.derivative_stride) == (1e-2, None, 2)
        assert not first.sync and second.sync
        first, second = from_batchnorm(model, eps=1e-4, momentum=0.02, sync=False)
        assert (first.eps, first.momentum, first.sync, second.sync) == (1e-4, 0.02, False, False)

    @pytest.mark.parametrize("name", ["affine", "track_running_stats", "num_features", "device"])
    def test_refuses_what_layers_have_already(self, name):
        with pytest.raises(TypeError, match=f"each layer keeps its own {name}"):
            from_batchnorm(with_batchnorm(), **{name: 1})

    def test_refuses_what_is_no_option_and_changes_nothing(self):
        model = with_batchnorm()
        with pytest.raises(TypeError, match="windows"):
            from_batchnorm(model, windows=4)
        with pytest.raises(ValueError, match="window_size must be"):
            from_batchnorm(model, window_size=0)
        with pytest.raises(ValueError, match="window must be 'moving'"):
            from_batchnorm(model, window=4)
        with pytest.raises(ValueError, match="window_size='auto' is for window='moving'"):
            from_batchnorm(model, window="sliding")
        assert kinds(model) == {nn.BatchNorm2d}

    def test_refuses_to_widen_the_group_of_a_sync_batch_norm(self):
        group = object()  # any object: only that there is a group matters here
        model = nn.Sequential(nn.SyncBatchNorm(2, process_group=group))
        with pytest.raises(ValueError, match=r"'0' \(SyncBatchNorm\) synchronises a process group"):
            from_batchnorm(model)
        assert from_batchnorm(model, sync=True)[0].sync

    @pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
    def test_keeps_what_others_put_on_a_layer(self, kind):
        layer = kind(3)
        layer.lr_mult = 0.1
        layer.title = "taken"
        layer.forward = layer.forward  # as wrappers of a module's forward leave it
        new = from_batchnorm(layer)
        assert new.lr_mult == 0.1 and vars(new).keys() == {*vars(CBN(3)), "lr_mult"}

    def test_frozen_layers_stay_frozen(self):
        model = with_batchnorm()
        model[1].requires_grad_(False)
        model[4].eval()
        from_batchnorm(model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained(model)
        after = model.state_dict()
        assert torch.equal(after["1.weight"], before["1.weight"])
        assert not torch.equal(after["1.running_mean"], before["1.running_mean"])  # as BN does
        assert torch.equal(after["4.running_mean"], before["4.running_mean"])

    def test_names_what_it_leaves(self):
        class WithActivation(nn.BatchNorm2d):
            def forward(self, x):
                return super().forward(x).relu()

        model = nn.ModuleDict(
            dict(a=nn.BatchNorm1d(2), b=nn.BatchNorm3d(2), c=WithActivation(2), d=CBN(2))
        )
        model["e"] = nn.BatchNorm2d(2)
        with pytest.warns(UserWarning, match=r"3 layers stay .*, 'a' \(BatchNorm1d\) first"):
            from_batchnorm(model)
        assert type(model["c"]) is WithActivation and type(model["e"]) is CBN

    def test_says_that_there_was_nothing_to_do(self):
        with pytest.warns(UserWarning, match="nothing changed"):
            from_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1)))

    def test_torchvision(self):
        torch.manual_seed(0)
        model = from_batchnorm(torchvision.models.resnet18(num_classes=3), window_size=3)
        assert link(model) == 20
        optimizer = sgd(model)
        for seed in range(3):
            optimizer.zero_grad()
            loss = model(images(size=32, seed=seed)).square().mean()
            loss.backward()
            optimizer.step()
            step(model)
        assert loss.isfinite()
        assert links(model)["layer2.0.downsample.1"] == "layer2.0.downsample.0"
        assert all(layer.window_bytes for layer in model.modules() if isinstance(layer, CBN))

    def test_batch_norm_before_the_convolution(self):
        def densenet():
            torch.manual_seed(0)
            return torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3)

        model = from_batchnorm(densenet())
        link(model)
        name = "features.denseblock1.denselayer1.norm1"
        with pytest.raises(RuntimeError, match=rf"'{name}' .*compensate=False"):
            model(images(size=32))
        model = from_batchnorm(densenet(), compensate=False)
        link(model)
        model(images(size=32)).sum().backward()
        step(model)

    def test_a_backbone_of_mmdet(self):
        from mmdet.registry import MODELS

        torch.manual_seed(0)
        cfg = dict(type="mmdet.ResNet", depth=18, base_channels=8, norm_eval=False)
        model = MODELS.build(cfg | dict(norm_cfg=dict(type="BN"), frozen_stages=-1))
        model.train()
        from_batchnorm(model)
        assert link(model) == 20
        for seed in range(2):
            sum(out.mean() for out in model(images(size=64, seed=seed))).backward()
            step(model)
        assert links(model)["bn1"] == "conv1" and len(links(model)) == 20


class TestCopies:
    """What nn.Module offers on a linked model."""

    @COPIES
    def test_hooks_do_nothing_until_it_is_linked(self, copied):
        model = trained()
        before, found = window_tensors(model), links(model)
        other = copied(model)
        assert links(other) == {} and set(map(str, window_state(other).values())) == {"[]"}
        assert torch.equal(other.eval()(images()), model.eval()(images()))
        model.train()
        with pytest.raises(RuntimeError, match="never linked"):
            other.train()(images())
        reference = mixed()  # never linked
        reference.load_state_dict(model.state_dict())
        for each in (other, reference):
            set_window(each, 1)
        for seed in range(3):
            assert torch.equal(other(images(seed=seed)), reference(images(seed=seed)))
        assert step(other) is None
        assert links(other) == {} and links(model) == found
        assert before
        torch.testing.assert_close(window_tensors(model), before, rtol=0, atol=0)

    @COPIES
    def test_goes_on_as_a_model_that_was_built_and_linked(self, copied):
        model = trained()
        built = mixed()
        built.load_state_dict(model.state_dict())
        other = copied(model)
        for each in (other, built):
            trained(each)
        for name, tensor in built.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
        assert links(other) == links(model) == links(built)
        assert len(hooks(other)) == len(hooks(model)) and flags(other) == flags(model)

    @COPIES
    def test_in_the_midst_of_an_iteration(self, copied):
        """The original ends it as if there were no copy: training the copy leaves it alone."""
        model, reference = trained(), trained()
        for each in (model, reference):
            each(images(seed=5)).square().mean().backward()
        trained(copied(model))
        for each in (model, reference):
            step(each)
            train(each, sgd(each), range(6, 8))
        for name, tensor in reference.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name

    def test_an_averaged_model(self):
        """torch copies it from the model that trains; the copy only evaluates."""
        model = trained()
        averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        averaged.update_parameters(model)
        train(model, sgd(model), range(4, 6))
        averaged.update_parameters(model)
        y = averaged.eval()(images())
        assert torch.equal(to_batchnorm(averaged)(images()), y)
        assert not torch.equal(model.eval()(images()), y)


def test_both_are_public():
    assert {"from_batchnorm", "to_batchnorm"} <= set(cbn_mmdet.__all__)
