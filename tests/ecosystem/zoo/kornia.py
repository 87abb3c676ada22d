"""kornia's networks for local features and edges."""

from kornia import feature
from kornia.models.dexined import DexiNed

PATCH = (1, 32, 32)

MODELS = {
    "DexiNed": (lambda: DexiNed(pretrained=False), (3, 64, 64)),
    "HardNet": (lambda: feature.HardNet(), PATCH),
    "HardNet8": (lambda: feature.HardNet8(), PATCH),
    "HyNet": (lambda: feature.HyNet(), PATCH),
    "KeyNet": (lambda: feature.KeyNet(), PATCH),
    "OriNet": (lambda: feature.OriNet(), PATCH),
    "SOSNet": (lambda: feature.SOSNet(), PATCH),
}
