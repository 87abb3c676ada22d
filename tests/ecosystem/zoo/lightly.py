"""lightly's ResNet and its heads for self-supervised learning."""

from lightly.models import ResNetGenerator
from lightly.models.modules import heads

FEATURES = (16,)

MODELS = {
    "ResNetGenerator": (lambda: ResNetGenerator("resnet-9", num_splits=0), (3, 32, 32)),
    "BarlowTwinsProjectionHead": (lambda: heads.BarlowTwinsProjectionHead(16, 32, 8), FEATURES),
    "BYOLProjectionHead": (lambda: heads.BYOLProjectionHead(16, 32, 8), FEATURES),
    "MoCoProjectionHead": (lambda: heads.MoCoProjectionHead(16, 32, 8, batch_norm=True), FEATURES),
    "SimCLRProjectionHead": (lambda: heads.SimCLRProjectionHead(16, 32, 8, batch_norm=True), FEATURES),
    "SimSiamProjectionHead": (lambda: heads.SimSiamProjectionHead(16, 32, 8), FEATURES),
    "SwaVProjectionHead": (lambda: heads.SwaVProjectionHead(16, 32, 8), FEATURES),
    "VICRegProjectionHead": (lambda: heads.VICRegProjectionHead(16, 32, 8), FEATURES),
}
