"""RaSA's entry in PEFT's list of methods."""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType, register_peft_method

NAME = "rasa"
PREFIX = "rasa_"


def peft_type() -> Any:
    """Return PeftType.RASA, adding it to PEFT's list of types on first use.

    register_peft_method() takes only names of that enumeration, and PEFT has no function to add
    one. A member that PEFT itself may have one day is used as it is.
    """
    name = NAME.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        setattr(PeftType, name, member)  # before the map: Enum refuses to assign a member
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    return PeftType[name]


def register(config_cls: type, model_cls: type) -> None:
    """Make get_peft_model and PeftModel.from_pretrained know RaSA."""
    peft_type()
    register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
