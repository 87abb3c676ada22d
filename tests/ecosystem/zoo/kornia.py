"""kornia's networks for local features and edges."""

from kornia import feature
from kornia.models.dexined import DexiNed

PATCH = (1, 32, 32)

MODELS = {
    "DexiNed": (lambda: DexiNed(pretrained=False), (3, 64, 64)),
    "HardNet": (lambda: feature.HardNet(pretrained=False), PATCH),
    "HardNet8": (lambda: feature.HardNet8(pretrained=False), PATCH),
    "HyNet": (lambda: feature.HyNet(pretrained=False), PATCH),
    "KeyNet": (lambda: feature.KeyNet(pretrained=False), PATCH),
    "OriNet": (lambda: feature.OriNet(pretrained=False), PATCH),
    "SOSNet": (lambda: feature.SOSNet(pretrained=False), PATCH),
}
