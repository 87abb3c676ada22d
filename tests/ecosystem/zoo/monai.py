"""MONAI's networks for images with three spatial axes."""

from monai.networks import nets

IMAGE = (1, 32, 32, 32)
THREE = {"spatial_dims": 3, "in_channels": 1}
TO_TWO = {**THREE, "out_channels": 2}
LAYERS = (  # of a HighResNet
    {"name": "conv_0", "n_features": 4, "kernel_size": 3},
    {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
    {"name": "conv_1", "n_features": 4, "kernel_size": 1},
    {"name": "conv_2", "kernel_size": 1},
)
UNET = {"channels": (4, 8, 16), "strides": (2, 2)}
DYN_UNET = {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 16]}

MODELS = {
    "AttentionUnet": (lambda: nets.AttentionUnet(**TO_TWO, **UNET), IMAGE),
    "BasicUNet": (lambda: nets.BasicUNet(**THREE, features=(4, 4, 8, 8, 8, 4), norm="batch"), IMAGE),
    "DenseNet": (lambda: nets.DenseNet(**TO_TWO, init_features=4, growth_rate=4, block_config=(1, 1, 1)), IMAGE),
    "DynUNet": (lambda: nets.DynUNet(**TO_TWO, **DYN_UNET, norm_name="batch"), IMAGE),
    "EfficientNetBN": (lambda: nets.EfficientNetBN("efficientnet-b0", pretrained=False, **THREE), IMAGE),
    "FlexibleUNet": (
        lambda: nets.FlexibleUNet(1, 2, "resnet10", spatial_dims=3, decoder_channels=(8, 8, 8, 8, 4)),
        IMAGE,
    ),
    "HighResNet": (lambda: nets.HighResNet(**TO_TWO, layer_params=LAYERS), IMAGE),
    "RegUNet": (lambda: nets.RegUNet(**THREE, num_channel_initial=4, depth=2), IMAGE),
    "ResNet": (lambda: nets.ResNet("basic", [1] * 4, [4, 8, 8, 8], n_input_channels=1), IMAGE),
    "SEResNet50": (lambda: nets.SEResNet50(**THREE, layers=(1, 1, 1, 1)), IMAGE),
    "SegResNet": (lambda: nets.SegResNet(init_filters=4, norm="batch", blocks_down=(1, 1), blocks_up=(1,)), IMAGE),
    "SegResNetDS": (lambda: nets.SegResNetDS(init_filters=4, norm="batch", blocks_down=(1, 1)), IMAGE),
    "UNet": (lambda: nets.UNet(**TO_TWO, **UNET, num_res_units=2, norm="batch"), IMAGE),
    "VNet": (lambda: nets.VNet(), IMAGE),
}
