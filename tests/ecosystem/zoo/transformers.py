"""transformers' models with BatchNorm, from tiny configurations."""

import transformers as hf

IMAGE = {"pixel_values": (3, 64, 64)}
SERIES = {"context_length": 32, "num_input_channels": 2}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}


def resnet(**options):
    """Return a configuration of a ResNet."""
    return hf.ResNetConfig(layer_type="basic", **STAGES, **options)


def upernet():
    """Return a UPerNet on a ResNet."""
    backbone = resnet(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = hf.UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_in_channels=16)
    return hf.UperNetForSemanticSegmentation(config)


def wav2vec2_conformer():
    """Return a Wav2Vec2-Conformer whose features are fixed: else it sets requires_grad of its input."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = hf.Wav2Vec2ConformerConfig(**sizes, conv_dim=[8] * 7, layerdrop=0.0, mask_time_prob=0.0)
    model = hf.Wav2Vec2ConformerModel(config)
    model.freeze_feature_encoder()
    return model


def of(config):
    """Return what builds the model of a configuration."""
    return lambda: hf.AutoModel.from_config(config)


MODELS = {
    "ResNet": (of(resnet()), IMAGE),
    "RegNet": (of(hf.RegNetConfig(groups_width=8, **STAGES)), IMAGE),
    "MobileNetV1": (of(hf.MobileNetV1Config(depth_multiplier=0.25)), IMAGE),
    "MobileNetV2": (of(hf.MobileNetV2Config(depth_multiplier=0.35)), IMAGE),
    "MobileViT": (of(hf.MobileViTConfig(hidden_sizes=[16] * 3, neck_hidden_sizes=[8, 8, *[16] * 4, 32])), IMAGE),
    "MobileViTV2": (of(hf.MobileViTV2Config(width_multiplier=0.5)), IMAGE),
    "EfficientNet": (of(hf.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320)), IMAGE),
    "Levit": (of(hf.LevitConfig(image_size=64)), IMAGE),
    "Cvt": (of(hf.CvtConfig(embed_dim=[12, 24, 48], depth=[1, 2, 3])), IMAGE),
    "SwiftFormer": (
        of(hf.SwiftFormerConfig(depths=[1, 1, 1, 1], embed_dims=[16, 16, 32, 32])),
        {"pixel_values": (3, 224, 224)},
    ),
    "HGNetV2": (of(hf.HGNetV2Config(**STAGES)), IMAGE),
    "TextNet": (of(hf.TextNetConfig()), IMAGE),
    "PatchTST": (of(hf.PatchTSTConfig(**SERIES)), {"past_values": (32, 2)}),
    "PatchTSMixer": (of(hf.PatchTSMixerConfig(**SERIES, norm_mlp="BatchNorm")), {"past_values": (32, 2)}),
    "Segformer": (
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=8)
        ),
        IMAGE,
    ),
    "UPerNet": (upernet, IMAGE),
    "Wav2Vec2Conformer": (wav2vec2_conformer, {"input_values": (4000,)}),
}
