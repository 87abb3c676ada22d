"""The claims about norms that examples/claims.py measures, one a file."""

from experiments import cnn_layer_norm, convergence, cost, covariate_shift, smoothness

MODULES = (convergence, covariate_shift, smoothness, cnn_layer_norm, cost)
CLAIMS = {module.CLAIM.name: module.CLAIM for module in MODULES}
