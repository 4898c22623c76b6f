"""RaSA as a method of Hugging Face PEFT: importing this package registers it.

>>> import rasa_ext.peft
>>> model = peft.get_peft_model(model, rasa_ext.peft.RaSAConfig(target_modules=["q_proj"]))

Everything of PEFT works from there: PeftModel.from_pretrained, save_pretrained, several adapters,
merging, transformers' Trainer. A process that loads a RaSA adapter must import this package first;
PEFT alone knows no RASA and raises KeyError.
"""

from __future__ import annotations

try:
    import peft  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "rasa_ext.peft needs PEFT 0.18 or newer: pip install 'rasa_ext[peft]'", name=error.name
    ) from error

from rasa_ext.peft.config import RaSAConfig
from rasa_ext.peft.model import RaSAModel
from rasa_ext.peft.registry import register

register(RaSAConfig, RaSAModel)

__all__ = ["RaSAConfig", "RaSAModel"]
