"""The claims about norms that examples/claims.py measures, one a file."""

from experiments import cnn_layer_norm, convergence, cost

CLAIMS = {module.CLAIM.name: module.CLAIM for module in (convergence, cnn_layer_norm, cost)}
