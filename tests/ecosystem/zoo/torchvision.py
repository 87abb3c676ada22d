"""torchvision's models for classification, segmentation and video, and the backbones of those for detection."""

from torchvision.models import get_model

IMAGE, VIDEO = (3, 64, 64), (3, 4, 32, 32)


def plain(name, **options):
    """Return what builds a model without weights."""
    return lambda: get_model(name, weights=None, **options)


def part(name, part, **options):
    """Return what builds a part of a model."""
    return lambda: get_model(name, weights=None, **options).get_submodule(part)


MODELS = {
    "densenet121": (plain("densenet121"), IMAGE),
    "efficientnet_b0": (plain("efficientnet_b0"), IMAGE),
    "efficientnet_v2_s": (plain("efficientnet_v2_s"), IMAGE),
    "googlenet": (plain("googlenet", init_weights=True), IMAGE),
    "inception_v3": (plain("inception_v3", init_weights=True, aux_logits=False), (3, 96, 96)),
    "maxvit_t": (plain("maxvit_t"), (3, 224, 224)),
    "mnasnet0_5": (plain("mnasnet0_5"), IMAGE),
    "mobilenet_v2": (plain("mobilenet_v2"), IMAGE),
    "mobilenet_v3_small": (plain("mobilenet_v3_small"), IMAGE),
    "regnet_x_400mf": (plain("regnet_x_400mf"), IMAGE),
    "regnet_y_400mf": (plain("regnet_y_400mf"), IMAGE),
    "resnet18": (plain("resnet18"), IMAGE),
    "resnext50_32x4d": (plain("resnext50_32x4d"), IMAGE),
    "shufflenet_v2_x0_5": (plain("shufflenet_v2_x0_5"), IMAGE),
    "vgg11_bn.features": (part("vgg11_bn", "features"), IMAGE),
    "deeplabv3_mobilenet_v3_large": (plain("deeplabv3_mobilenet_v3_large", weights_backbone=None), IMAGE),
    "fcn_resnet50": (plain("fcn_resnet50", weights_backbone=None), IMAGE),
    "lraspp_mobilenet_v3_large": (plain("lraspp_mobilenet_v3_large", weights_backbone=None), IMAGE),
    "fasterrcnn_resnet50_fpn.backbone": (part("fasterrcnn_resnet50_fpn", "backbone", weights_backbone=None), IMAGE),
    "ssdlite320.backbone": (part("ssdlite320_mobilenet_v3_large", "backbone", weights_backbone=None), IMAGE),
    "r3d_18": (plain("r3d_18"), VIDEO),
    "mc3_18": (plain("mc3_18"), VIDEO),
    "r2plus1d_18": (plain("r2plus1d_18"), VIDEO),
}
