"""The claims about norms that examples/claims.py measures, one a file."""

from experiments import (
    batch_size,
    cnn_layer_norm,
    convergence,
    cost,
    covariate_shift,
    mixed_features,
    recurrent,
    regularization,
    rms_norm,
    saturation,
    smoothness,
    train_eval,
)

MODULES = (  # in the order of the report
    convergence,
    covariate_shift,
    smoothness,
    saturation,
    regularization,
    batch_size,
    train_eval,
    recurrent,
    cnn_layer_norm,
    mixed_features,
    cost,
    rms_norm,
)
CLAIMS = {module.CLAIM.name: module.CLAIM for module in MODULES}
