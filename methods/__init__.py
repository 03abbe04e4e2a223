"""What FARSS is compared with: the table METHODS, the starts of the other methods, each a short
function beside its formula, the covariances that two of them need, and the choices of the
authors' own code (official)."""

from . import official
from .covariance import OuterSum, covariances
from .starts import corda, damped, kasa, kasa_penalty, lora, lora_null, milora, pissa, split
from .table import METHODS, Given, Method

__all__ = ["METHODS", "Given", "Method", "OuterSum", "corda", "covariances", "damped", "kasa",
           "kasa_penalty", "lora", "lora_null", "milora", "official", "pissa", "split"]
