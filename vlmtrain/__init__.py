"""vlmtrain: train vision-language models stage by stage and ablate the connector with one override."""

__version__ = "0.1.0"

from .interop.registration import register as _register

_register()
