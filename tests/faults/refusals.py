"""What a refusal has to be like, and safetensors files with any header."""

import json
import struct
import time

import pytest

from cul_core.base.errors import CulError

LONGEST_SECONDS = 30
"""CPU time on a busy machine, with the first import of diffusers."""


def is_one_sentence(text):
    return text.isprintable() and text.endswith((".", '"')) and 20 < len(text) < 1000


def refused(call):
    """The error that `call` ends with: ours, one sentence, before it has computed for long."""
    begun = time.process_time()
    with pytest.raises(CulError) as caught:
        call()
    assert time.process_time() - begun < LONGEST_SECONDS
    assert is_one_sentence(str(caught.value)), str(caught.value)[:2000]
    return caught.value


def write_file(path, header, data=b"", length=None):
    """A file with a header, given as bytes or as what becomes JSON, its length (or another), and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape=(1,), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
