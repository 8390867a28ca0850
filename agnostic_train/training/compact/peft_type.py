"""PEFT's list of tuners is a closed enum: this adds the member that our tuner registers under."""

from peft import PeftType

NEURON = "NEURON"

if NEURON not in PeftType.__members__:
    member = str.__new__(PeftType, NEURON)
    member._name_ = member._value_ = NEURON
    member.__objclass__ = PeftType
    PeftType._member_names_.append(NEURON)
    PeftType._member_map_[NEURON] = member
    PeftType._value2member_map_[NEURON] = member
    # EnumType's own __setattr__ refuses names of members.
    type.__setattr__(PeftType, NEURON, member)
