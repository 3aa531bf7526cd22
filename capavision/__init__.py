"""Parameter-efficient fine-tuning for vision models: CapaBoost and its kin in any timm model.

>>> import capavision as cv, timm
>>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
>>> report = cv.inject(model, cv.LoRA(rank=4, branches=2), targets="qkv", parts="qv")
>>> # … train cv.parameters(model) …
>>> # cv.save(model, "task.safetensors"); model = cv.load("task.safetensors"); cv.fold(model)
"""

from capavision.base import Base
from capavision.delta import AttentionDelta, Delta, Factors, Method, OutputDelta, Site, WeightDelta
from capavision.ending import fold, remove
from capavision.inject import Report, inject, parameter_groups, parameters
from capavision.interop import from_peft, to_peft
from capavision.methods.adapter import Adapter
from capavision.methods.bitfit import BitFit
from capavision.methods.circulant import Circulant
from capavision.methods.full import Full
from capavision.methods.kronecker import Kronecker
from capavision.methods.ldr import LDR
from capavision.methods.linear_probe import LinearProbe
from capavision.methods.lora import LoRA
from capavision.methods.prefix import Prefix
from capavision.methods.toeplitz import Toeplitz
from capavision.publish import model_card, push_to_hub
from capavision.state import describe, load, save
from capavision.tying import Tying, tie
from capavision.version import __version__ as __version__

__all__ = [
    "LDR",
    "Adapter",
    "AttentionDelta",
    "Base",
    "BitFit",
    "Circulant",
    "Delta",
    "Factors",
    "Full",
    "Kronecker",
    "LinearProbe",
    "LoRA",
    "Method",
    "OutputDelta",
    "Prefix",
    "Report",
    "Site",
    "Toeplitz",
    "Tying",
    "WeightDelta",
    "describe",
    "fold",
    "from_peft",
    "inject",
    "load",
    "model_card",
    "parameter_groups",
    "parameters",
    "push_to_hub",
    "remove",
    "save",
    "tie",
    "to_peft",
]

# Last, for a file dropped in there may import every name above.
from capavision import methods as methods
