"""A model of each module of timm that has models with BatchNorm: the smallest one."""

import timm

SMALLEST = {  # by module: the model, and the size of its images
    "byoanet": ("halonet_h1", 256),
    "byobnet": ("test_byobnet", 64),
    "convmixer": ("convmixer_768_32", 64),
    "cpubone": ("cpubone_nano", 64),
    "cspnet": ("cs3darknet_focus_s", 64),
    "cspnext": ("cspnext_tiny", 64),
    "densenet": ("densenet121", 64),
    "dla": ("dla46x_c", 64),
    "dpn": ("dpn48b", 64),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 64),
    "efficientnet": ("test_efficientnet", 64),
    "efficientvim": ("efficientvim_m1", 64),
    "efficientvit_mit": ("efficientvit_b0", 64),
    "efficientvit_msra": ("efficientvit_m0", 64),
    "fasternet": ("fasternet_t0", 64),
    "fastvit": ("fastvit_t8", 64),
    "ghostnet": ("ghostnet_050", 64),
    "hardcorenas": ("hardcorenas_b", 64),
    "hgnet": ("hgnetv2_b0", 64),
    "hrnet": ("hrnet_w18_small", 64),
    "iformer": ("iformer_t", 64),
    "inception_next": ("inception_next_atto", 64),
    "inception_resnet_v2": ("inception_resnet_v2", 96),
    "inception_v3": ("inception_v3", 96),
    "inception_v4": ("inception_v4", 96),
    "lcnetv2": ("lcnetv2_small", 64),
    "levit": ("levit_128s", 64),
    "lowformer": ("lowformer_b0", 64),
    "maxxvit": ("test_coatnet", 64),
    "mobilenetv3": ("mobilenetv3_small_050", 64),
    "mobilevit": ("mobilevit_xxs", 64),
    "nasnet": ("nasnetalarge", 64),
    "nextvit": ("nextvit_small", 64),
    "pnasnet": ("pnasnet5large", 64),
    "regnet": ("regnetx_002", 64),
    "repghost": ("repghostnet_050", 64),
    "repvit": ("repvit_m1", 64),
    "res2net": ("res2next50", 64),
    "resnest": ("resnest14d", 64),
    "resnet": ("test_resnet", 64),
    "resnetv2": ("resnetv2_18", 64),
    "rexnet": ("rexnet_100", 64),
    "selecsls": ("selecsls42", 64),
    "senet": ("legacy_seresnet18", 64),
    "shvit": ("shvit_s1", 64),
    "sknet": ("skresnet18", 64),
    "starnet": ("starnet_s050", 64),
    "swiftformer": ("swiftformer_xs", 64),
    "tiny_vit": ("tiny_vit_5m_224", 64),
    "tresnet": ("tresnet_m", 64),
    "vgg": ("vgg11_bn", 64),
    "visformer": ("visformer_tiny", 64),
    "vision_transformer_hybrid": ("vit_small_resnet50d_s16_224", 64),
    "volo": ("volo_d1_224", 64),
    "vovnet": ("ese_vovnet19b_slim_dw", 64),
    "xception": ("legacy_xception", 64),
    "xception_aligned": ("xception41p", 64),
    "xcit": ("xcit_nano_12_p8_224", 64),
}
BUILT_FOR_A_SIZE = ["efficientformer_v2", "levit", "maxxvit", "visformer", "vision_transformer_hybrid", "volo"]
WITHOUT_BATCH_NORM = """
    beit cait coat convit convnext crossvit csatv2 davit deepseek_vit deit edgenext eva focalnet gcvit gemma4_vit
    hiera hieradet_sam2 mambaout metaformer mlp_mixer mobilenetv5 mvitv2 naflexvit nest nfnet pit pvt_v2 qwen3_vit
    rdnet sequencer swin_transformer swin_transformer_v2 swin_transformer_v2_cr tnt twins vision_transformer
    vision_transformer_relpos vision_transformer_sam vitamin
"""


def build(module):
    """Return the model of a module."""
    name, size = SMALLEST[module]
    model = timm.create_model(name, **({"img_size": size} if module in BUILT_FOR_A_SIZE else {}))
    return model.features if module == "vgg" else model  # without its large fully connected layers


MODELS = {
    f"{module}: {name}": (lambda module=module: build(module), (3, size, size))
    for module, (name, size) in SMALLEST.items()
}
