"""The same results as the plain code, sooner: what wide models run by default.

measure and initialise have the signatures of farss.py's, svd that of farss.svd, OuterSum that of
methods.OuterSum; tests/test_plain.py holds each pair equal.
"""

from .decompositions import svd
from .memory import block_sums, summed_first
from .start import initialise, measure
from .sums import OuterSum

# What a start with fast/ does not call: function of farss.py, equation.
REPLACES = {"kfac_hooks, factors_by_block": "2", "quadratic_form": "6", "fisher_importance": "8",
            "svd": "13", "lam_gam": "14"}

__all__ = ["REPLACES", "OuterSum", "block_sums", "initialise", "measure", "summed_first", "svd"]
