"""Typed values and exceptions <-> JSON; nothing is ever pickled, or imported because a payload names it.

``values`` is about one value, ``arguments`` about the arguments of a call and the annotations that say what they are,
``failures`` about exceptions.
"""

from orchestrator.codec.arguments import (
    Annotations,
    UndoneStep,
    accepts_none,
    annotations_of,
    decode_arguments,
    decode_undone_step,
    encode_arguments,
    plain_arguments,
)
from orchestrator.codec.failures import describe_error
from orchestrator.codec.results import result_decoder
from orchestrator.codec.values import decode, decode_leniently, dump, encode, load

__all__ = [
    "Annotations",
    "UndoneStep",
    "accepts_none",
    "annotations_of",
    "decode",
    "decode_arguments",
    "decode_leniently",
    "decode_undone_step",
    "describe_error",
    "dump",
    "encode",
    "encode_arguments",
    "load",
    "plain_arguments",
    "result_decoder",
]
