"""Adds a `NEURON` member to `PeftType`, a closed enum, because PEFT registers a tuner only under such a member."""

from peft import PeftType

NEURON = "NEURON"

if NEURON not in PeftType.__members__:
    member = str.__new__(PeftType, NEURON)
    member._name_ = member._value_ = NEURON
    member.__objclass__ = PeftType
    PeftType._member_names_.append(NEURON)
    PeftType._member_map_[NEURON] = member
    PeftType._value2member_map_[NEURON] = member
    # `EnumType.__setattr__` refuses to assign member names.
    type.__setattr__(PeftType, NEURON, member)
