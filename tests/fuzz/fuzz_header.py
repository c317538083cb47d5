"""Coverage-guided fuzzing of the header reader with Atheris: inputs that reach new branches are kept and
changed further.

By hand, for ten minutes, with the inputs found kept in a folder:

    python tests/fuzz/fuzz_header.py -max_total_time=600 corpus/

Arguments are libFuzzer's. Anything but a `ModelError` ends the run with the input that caused it, in a file
named `crash-...`.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["cul_core.files.safetensors_format"]):
    from cul_core.files.safetensors_format import read_header

from cul_core.base.errors import ModelError

PATH = Path(tempfile.mkdtemp()) / "fuzzed.safetensors"
SEEDS = [
    b'\x00\x04\x00{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    b'\x00\x0c\x00{"__metadata__":{"k":"v"},"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"U8","shape":[4],'
    b'"data_offsets":[8,12]}}',
    b"\x00\x00\x00{}",
    b"\x01\x02\x00\x00\x00\x00\x00\x00\x00{}",
    b"\x00\x00\x00[1]",
    b'\x00\x00\x00{"a":NaN}',
    b"",
]
WORDS = [
    "__metadata__",
    "dtype",
    "shape",
    "data_offsets",
    "F32",
    "BF16",
    "F4",
    "F8_E4M3",
    "U8",
    "null",
    "true",
    "NaN",
    "Infinity",
    "1e400",
    "-1",
    "18446744073709551615",
    "\\\\ud800",
    "\\\\u0000",
    "[[[[[[[[",
    '{\\"a\\":',
    "}}",
    "[0,4]",
]


def file_of(data: bytes) -> bytes:
    """A safetensors file from fuzzed bytes: after an odd one the rest as it is, else a header of the right
    length and so many zeros."""
    if data[:1] and data[0] & 1:
        return data[1:]
    zeros, text = int.from_bytes(data[1:3], "little"), data[3:]
    return len(text).to_bytes(8, "little") + text + bytes(zeros)


def read(data: bytes) -> None:
    PATH.write_bytes(file_of(data))
    try:
        header, metadata, start = read_header(PATH)
    except ModelError:
        return
    size = PATH.stat().st_size
    assert 8 < start <= size and all(type(text) is str for pair in metadata.items() for text in pair)
    ends = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert [begin for begin, _ in ends] + [size - start] == [0] + [end for _, end in ends]


def main(arguments: list[str]) -> None:
    folder = Path(tempfile.mkdtemp())
    for number, seed in enumerate(SEEDS):
        (folder / f"seed-{number}").write_bytes(seed)
    words = folder.with_name(f"{folder.name}.dict")
    words.write_text("".join(f'"{word}"\n' for word in WORDS), encoding="utf-8")
    corpus = [argument for argument in arguments if not argument.startswith("-")]
    options = [argument for argument in arguments if argument.startswith("-")]
    atheris.Setup([sys.argv[0], f"-dict={words}", "-max_len=4096", *options, *corpus, str(folder)], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
