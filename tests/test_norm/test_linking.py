"""Which convolution feeds which CBN: plain models, stock mmdet detectors, and what is refused."""

import copy
import gc
import signal
import threading
import time
import weakref

import pytest
import torch
from torch import nn

from cbn_mmdet import CBN, link, links, set_window, step
from cbn_mmdet.norm import linking


def train_once(model, *inputs):
    model.train()
    output = model(*inputs)
    step(model)
    return output


class TestPlainModels:
    def test_sequential(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4), nn.ReLU(), nn.Conv2d(4, 2, 1), CBN(2))
        assert link(model) == 2
        assert links(model) == {}
        train_once(model, torch.randn(2, 3, 8, 8))
        assert links(model) == {"1": "0", "4": "3"}

    def test_linking_twice_is_harmless(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4))
        assert link(model) == link(model) == 1
        assert len(model[0]._forward_hooks) == 1
        assert len(model._forward_pre_hooks) == 1
        train_once(model, torch.randn(2, 3, 8, 8))
        assert links(model) == {"1": "0"}

    def test_order_of_registration_does_not_matter(self):
        class Crossed(nn.Module):
            """Convolutions and norms in lists of their own, used in another order."""

            def __init__(self):
                super().__init__()
                self.norms = nn.ModuleList(CBN(4) for _ in range(3))
                self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

            def forward(self, x):
                for conv, norm in ((2, 0), (0, 1), (1, 2)):
                    x = self.norms[norm](self.convs[conv](x))
                return x

        model = Crossed()
        link(model)
        train_once(model, torch.randn(2, 4, 5, 5))
        assert links(model) == {"norms.0": "convs.2", "norms.1": "convs.0", "norms.2": "convs.1"}

    def test_a_linked_part_does_not_end_the_forward(self):
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), CBN(4))
        link(model[0])
        link(model)
        train_once(model, torch.randn(2, 3, 8, 8))
        assert links(model) == {"1": "0.0"}

    def test_a_copy_that_runs_within_the_forward(self):
        """A teacher, say: copies carry the hooks."""

        class Student(nn.Sequential):
            def forward(self, x):
                y = self[0](x)
                self.teacher[0](x)
                return self[1](y)

        model = Student(nn.Conv2d(3, 4, 3), CBN(4))
        link(model)
        model.__dict__["teacher"] = [copy.deepcopy(nn.Sequential(*model)).eval()]
        link(model.teacher[0])
        train_once(model, torch.randn(2, 3, 8, 8))
        assert links(model) == {"1": "0"}

    def test_one_convolution_feeds_several_norms(self):
        class Fork(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.left, self.right = nn.Conv2d(3, 4, 1), CBN(4), CBN(4)

            def forward(self, x):
                y = self.conv(x)
                return self.left(y) + self.right(y)

        model = Fork()
        link(model)
        for _ in range(3):
            train_once(model, torch.randn(2, 3, 5, 5))
        assert links(model) == {"left": "conv", "right": "conv"}
        assert model.left.window_bytes == model.right.window_bytes > 0

    def test_a_container_or_identity_between_is_seen_through(self):
        model = nn.Sequential(
            nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Identity(), nn.Dropout(0.0).eval()),
            CBN(4),
        )
        model[0][2].train = lambda mode=True: None  # stays in evaluation mode
        link(model)
        train_once(model, torch.randn(2, 3, 5, 5))
        assert links(model) == {"1": "0.0.0"}

    def test_links_are_known_in_evaluation_and_for_naive_cbn(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4), nn.ReLU(), CBN(4, compensate=False))
        link(model)
        model.eval()
        with torch.inference_mode():
            model(torch.randn(2, 3, 5, 5))
        assert links(model) == {"1": "0", "3": "2"}

    def test_links_of_a_window_of_one(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4, window_size=1))
        link(model)
        train_once(model, torch.randn(2, 3, 5, 5))
        assert links(model) == {"1": "0"}

    def test_a_link_is_of_the_last_run(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4, compensate=False))
        link(model)
        train_once(model, torch.randn(2, 3, 5, 5))
        model[1](torch.randn(2, 4, 5, 5))
        assert links(model) == {}

    def test_keyword_input(self):
        class Keyword(nn.Sequential):
            def forward(self, x):
                return self[1](self[0](input=x))

        model = Keyword(nn.Conv2d(3, 4, 1), CBN(4))
        link(model)
        train_once(model, torch.randn(2, 3, 5, 5))
        assert links(model) == {"1": "0"}


class TestNothingIsKept:
    def test_inputs_are_free_after_the_forward(self):
        """A held output does not hold the convolution's input."""
        inputs = []

        class Remember(nn.Module):
            def forward(self, x):
                x = x * 2
                inputs.append(weakref.ref(x))
                return x

        model = nn.Sequential(Remember(), nn.Conv2d(3, 4, 1), CBN(4), nn.Conv2d(4, 4, 1))
        link(model)
        output = model(torch.randn(2, 3, 5, 5))
        output.sum().backward()
        step(model)
        gc.collect()
        assert inputs[0]() is None
        assert not output.__dict__  # nothing rides along when it is copied or saved
        del output
        assert not linking._here.signatures

    def test_a_failed_forward_leaves_no_open_scope(self):
        class Fails(nn.Module):
            def forward(self, x):
                raise KeyError("stop")

        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4), Fails())
        link(model)
        with pytest.raises(KeyError):
            model(torch.randn(2, 3, 5, 5))
        assert linking.current_forward() is None
        assert all(held.input is None for held in linking._here.signatures.values())

    def test_an_interrupt_is_not_lost_with_a_tensor(self):
        """Python drops what is raised while an object dies: Ctrl-C would do nothing."""
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4))
        link(model)
        held = [model[0](torch.randn(2, 3, 5, 5))]
        held += [object() for _ in range(1_000_000)]  # which die before it, without any Python code

        def interrupt(*_):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 1e-3)
                held.clear()
                time.sleep(1)
        finally:
            signal.signal(signal.SIGALRM, before)
            held.clear()  # should the alarm have come before
        assert not linking._here.signatures

    def test_an_interrupted_forward_ends_with_the_iteration(self):
        """Ctrl-C in a notebook: no hook runs, and the next iterations must still count right."""

        class Interrupt(nn.Module):
            armed = True

            def forward(self, x):
                if self.armed:
                    raise KeyboardInterrupt
                return x

        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4), Interrupt())
        link(model)
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(2, 3, 5, 5))
        step(model)
        model[2].armed = False
        for _ in range(3):
            model(torch.randn(2, 3, 5, 5))
        step(model)
        assert len(model[1]._windows) == 1
        assert model[1].num_batches_tracked == 2

    def test_a_module_that_calls_itself_stays_in_its_forward(self):
        class Again(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(4, 4, 1), CBN(4)

            def forward(self, x, again=True):
                if again:
                    x = self(x, again=False)
                return self.norm(self.conv(x))

        model = Again()
        link(model)
        for _ in range(3):
            train_once(model, torch.randn(2, 4, 5, 5))
        assert [len(window) for window in model.norm._windows] == [3, 3]

    def test_models_in_threads_do_not_meet(self):
        def train(errors):
            try:
                model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4), nn.Conv2d(4, 4, 1), CBN(4))
                link(model)
                for _ in range(30):
                    train_once(model, torch.randn(2, 3, 16, 16))
            except Exception as error:
                errors.append(error)

        errors = []
        threads = [threading.Thread(target=train, args=(errors,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors

    def test_a_model_can_be_freed(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4))
        link(model)
        train_once(model, torch.randn(2, 3, 5, 5))
        ref = weakref.ref(model[0])
        del model
        gc.collect()
        assert ref() is None


class TestRefusals:
    """Each names the layer and what it received, in the first forward, burn-in or not."""

    def refuse(self, *modules, message, size=(2, 3, 8, 8)):
        model = nn.Sequential(*modules)
        link(model)
        for in_force in (8, 1):
            set_window(model, in_force)
            with pytest.raises(RuntimeError, match=message) as error:
                model(torch.randn(size))
            assert "compensate=False" in str(error.value)
        for module in modules:
            if isinstance(module, CBN):
                module.compensate = False
        model(torch.randn(size))
        step(model)

    def test_after_an_activation(self):
        self.refuse(
            nn.Conv2d(3, 4, 1), nn.ReLU(), CBN(4), message=r"layer '2' \(CBN\).*'1' \(ReLU\)"
        )

    def test_after_an_activation_in_place(self):
        self.refuse(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), CBN(4), message=r"'2'.*'1' \(ReLU\)")

    def test_on_the_input(self):
        self.refuse(CBN(3), message=r"'0'.*shape \(2, 3, 8, 8\) that no module")

    def test_after_a_function(self):
        class Sum(nn.Conv2d):
            def forward(self, x):
                return super().forward(x) + 1

        class Blocks(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 1)

            def forward(self, x):
                return nn.functional.relu_(self.conv(x))

        self.refuse(Blocks(), CBN(4), message=r"'1'.*'0' \(Blocks\), which is no nn.Conv2d")
        self.refuse(Sum(3, 4, 1), CBN(4), message=r"'1'.*'0' \(Sum\).*not the plain convolution")

    def test_after_a_transposed_convolution(self):
        self.refuse(nn.ConvTranspose2d(3, 4, 2), CBN(4), message=r"'0' \(ConvTranspose2d\)")

    def test_after_a_parametrized_convolution(self):
        conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
        self.refuse(conv, CBN(4), message=r"'0' \(ParametrizedConv2d\).*parametrized")

    @pytest.mark.parametrize("kind", ["ConvWS", "ConvAWS"])
    def test_after_a_standardised_convolution(self, kind):
        from mmcv.cnn import ConvAWS2d, ConvWS2d

        conv = {"ConvWS": ConvWS2d, "ConvAWS": ConvAWS2d}[kind](3, 4, 3)
        self.refuse(conv, CBN(4), message=rf"'0' \({kind}2d\).*not the plain convolution")

    @pytest.mark.parametrize("kind", ["DCN", "DCNv2"])
    def test_after_a_deformable_convolution(self, kind):
        import mmcv.ops  # noqa: F401  registers the deformable ones
        from mmcv.cnn import build_conv_layer

        conv = build_conv_layer(dict(type=kind, deform_groups=1), 3, 4, 3)
        self.refuse(conv, CBN(4), message=r"'0' \((Modulated)?DeformConv2dPack\), which is no")

    def test_another_convolution_in_the_same_place(self):
        class Either(nn.Module):
            def __init__(self):
                super().__init__()
                self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
                self.norm, self.side = CBN(4), "left"

            def forward(self, x):
                return self.norm(getattr(self, self.side)(x))

        model = Either()
        link(model)
        train_once(model, torch.randn(2, 3, 5, 5))
        model.side = "right"
        with pytest.raises(RuntimeError, match="'norm'.*'left'.*'right'.*its own CBN"):
            model(torch.randn(2, 3, 5, 5))

    def test_a_link_that_ends_before_the_norm_runs(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4))
        link(model[0])
        link(model[1])
        with pytest.raises(RuntimeError, match="link the model that contains both"):
            model(torch.randn(2, 3, 5, 5))

    def test_mmcvs_own_convolution_is_a_plain_one(self):
        from mmcv.cnn import Conv2d

        model = nn.Sequential(Conv2d(3, 4, 3), CBN(4))
        link(model)
        train_once(model, torch.randn(2, 3, 8, 8))
        assert links(model) == {"1": "0"}


# Configs of mmdet's own, and the parts whose norm they leave to a default of BN.
STOCK = {
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": ["neck"],
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py": [],
    "mask_rcnn/mask-rcnn_x101-32x4d_fpn_1x_coco.py": [],
    "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py": [],
    "gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py": [],
    "hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py": ["backbone", "neck"],
    "regnet/faster-rcnn_regnetx-400MF_fpn_ms-3x_coco.py": [],
    "res2net/faster-rcnn_res2net-101_fpn_2x_coco.py": [],
    "pafpn/faster-rcnn_r50_pafpn_1x_coco.py": ["neck"],
    "nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py": [],
    "retinanet/retinanet_r50_fpn_1x_coco.py": ["bbox_head"],
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py": [],
    "atss/atss_r50_fpn_1x_coco.py": [],
    "yolo/yolov3_d53_8xb8-320-273e_coco.py": ["backbone", "neck", "bbox_head"],
    "yolox/yolox_tiny_8xb8-300e_coco.py": ["backbone", "neck", "bbox_head"],
    "rtmdet/rtmdet_tiny_8xb32-300e_coco.py": [],
    "efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py": [],
}
NORM = dict(type="CBN", window_size=3)


def with_cbn(node):
    """The config with every norm a trainable CBN, from no pretrained weights."""
    if isinstance(node, (list, tuple)):
        return [with_cbn(value) for value in node]
    if not isinstance(node, dict):
        return node
    node = {key: with_cbn(value) for key, value in node.items()}
    for key, value in node.items():
        if key.endswith("norm_cfg") and isinstance(value, dict) and "type" in value:
            node[key] = NORM
    if "frozen_stages" in node:
        node["frozen_stages"] = 0 if node["type"] == "EfficientNet" else -1
    if (node.get("init_cfg") or {}).get("type") == "Pretrained":
        node["init_cfg"] = None
    return node


def stock_model(name):
    from mmdet.registry import MODELS
    from mmengine.config import Config, ConfigDict
    from mmengine.registry import init_default_scope

    import cbn_mmdet  # noqa: F401  registers CBN

    cfg = with_cbn(Config.fromstring(f"_base_ = 'mmdet::{name}'", ".py").model.to_dict())
    for part in STOCK[name]:
        cfg[part]["norm_cfg"] = NORM
    init_default_scope("mmdet")
    cfg["data_preprocessor"].pop("batch_augments", None)  # they resize to the full training size
    model = MODELS.build(ConfigDict(cfg))
    for module in model.modules():
        if hasattr(module, "norm_eval"):  # the default of some backbones
            module.norm_eval = False
    model.init_weights()
    return model


def loss_of(model, size=96):
    """One training forward of a detector on a random image with two objects."""
    from mmdet.testing import demo_mm_inputs

    data = demo_mm_inputs(
        2, [[3, size, size]] * 2, num_items=[2, 2], num_classes=10, with_mask=model.with_mask
    )
    return model(**model.data_preprocessor(data, True), mode="loss")


def total(losses):
    return sum(
        term.mean()
        for name, value in losses.items()
        if "loss" in name
        for term in (value if isinstance(value, list) else [value])
    )


class Handed:
    """What each CBN is handed and what each convolution returns, in one forward, as values."""

    def __init__(self, model):
        self.inputs, self.outputs, self.handles = {}, {}, []
        for name, module in model.named_modules():
            if isinstance(module, CBN):
                self.handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, name=name: self.inputs.update({name: args[0].clone()})
                    )
                )
            elif isinstance(module, nn.Conv2d):
                self.handles.append(
                    module.register_forward_hook(
                        lambda _, args, out, name=name: self.outputs.setdefault(name, []).append(
                            out.clone()
                        )
                    )
                )


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_stock_detectors(name):
    """Every CBN of an unmodified detector is fed by the convolution whose output it is handed."""
    torch.manual_seed(0)
    model = stock_model(name).train()
    layers = [name for name, module in model.named_modules() if isinstance(module, CBN)]
    assert link(model) == len(layers) > 0
    handed = Handed(model)
    loss_of(model)
    found = links(model)
    assert set(found) == set(handed.inputs), "each layer that ran is linked"
    assert len(found) > 0.7 * len(layers)
    for norm, conv in found.items():
        values = handed.inputs[norm]
        assert any(
            torch.equal(values, out) for out in handed.outputs[conv] if out.shape == values.shape
        )
    for handle in handed.handles:
        handle.remove()
    # The window fills, and the gradient through it reaches every convolution.
    step(model)
    losses = total(loss_of(model))
    assert losses.isfinite()
    losses.backward()
    assert all(module.window_bytes > 0 for n, module in model.named_modules() if n in found)
    convs = {n: module for n, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for conv in set(found.values()):
        assert convs[conv].weight.grad is not None
