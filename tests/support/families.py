"""Small networks of every family that must work, and how to test a few of them in every run."""

import pytest

SMALL = {"channels": (8, 16, 24, 32), "num_classes": 7}
FAMILIES = {
    # the ResNet family: plain, deep stem, wide, squeeze-and-excitation, anti-aliased, bottlenecks
    "resnet18": SMALL,
    "resnet10t": SMALL,
    "resnet26d": SMALL,
    "wide_resnet50_2": SMALL,
    "seresnet18": SMALL,
    "resnetblur18": SMALL,
    "seresnetaa50d": SMALL,
    "resnext50_32x4d": {"num_classes": 7, "channels": (32, 32, 32, 32)},
    "resnet14_cifar": {"channels": (8, 16, 32)},
    # the EfficientNet builder's family
    "mobilenetv2_035": {"num_classes": 7},
    "mobilenetv3_small_050": {"num_classes": 7},
    "mobilenetv4_conv_small_035": {"num_classes": 7},
    "efficientnet_b0": {"num_classes": 7},
    "tf_efficientnet_lite0": {"num_classes": 7},
    "efficientnet_es": {"num_classes": 7},
    "mnasnet_small": {"num_classes": 7},
    "mixnet_s": {"num_classes": 7},
    "fbnetc_100": {"num_classes": 7},
    "lcnet_050": {"num_classes": 7},
}
_IN_EVERY_RUN = ("resnet18", "resnext50_32x4d", "mobilenetv3_small_050", "mixnet_s")

# The other families are tested with `-m slow`.
FAMILIES_OF_A_RUN = [name if name in _IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
