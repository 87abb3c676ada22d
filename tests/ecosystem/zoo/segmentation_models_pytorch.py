"""The decoders of segmentation-models-pytorch, and encoders of all kinds."""

import segmentation_models_pytorch as smp

DECODERS = ["Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3Plus", "PAN", "Linknet", "MAnet", "UPerNet"]
ENCODERS = [
    "densenet121",
    "dpn68",
    "efficientnet-b0",
    "inceptionresnetv2",
    "inceptionv4",
    "mit_b0",
    "mobilenet_v2",
    "mobileone_s0",
    "se_resnet50",
    "timm-skresnet18",
    "tu-gernet_s",
    "tu-regnetx_002",
    "tu-tf_efficientnetv2_b0",
    "vgg11_bn",
    "xception",
]


def build(decoder, encoder):
    """Return what builds a model."""
    return lambda: getattr(smp, decoder)(encoder, encoder_weights=None)


MODELS = {
    f"{decoder}({encoder})": (build(decoder, encoder), (3, size, size))
    for decoder, encoder, size in [
        *((decoder, "resnet18", 128 if decoder == "PAN" else 64) for decoder in DECODERS),
        *(("Unet", encoder, 64) for encoder in ENCODERS),
    ]
}
