"""Makes the tokenizer folder: byte-level BPE in CLIP's format; every word of MiniCanvas is one token.

    python -m cul_core.minicanvas.training.tokenizer_build

Merges are learnt by BPE (the most frequent pair first) until every word is one token. Ids: 256 byte symbols,
the same symbols at the end of a word, one id per merge, start, end. Other text encodes into more tokens.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from ..family import FAMILY_OF
from ..large import LARGE
from ..world import SMALL, World

START, END = "<|startoftext|>", "<|endoftext|>"


def _byte_symbols() -> list[str]:
    """GPT-2's printable symbols of the 256 byte values, in the order of ids."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [value for value in range(256) if value not in printable]
    return [chr(value) for value in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """BPE merges after which each of `words` (lower-case ASCII) is a single token."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(pair for pieces in split for pair in zip(pieces, pieces[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces in split:
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def write_tokenizer(world: World, folder: Path) -> int:
    """Write the tokenizer of a world's words; returns the number of tokens."""
    words = re.findall(r"[a-z]+", " ".join(world.texts()).lower())
    merges = learn_merges(words)
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), START, END]
    folder.mkdir(exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}

    def write(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8", newline="\n")

    write("vocab.json", json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    write("merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    write("special_tokens_map.json", json.dumps(special, indent=1))
    write(
        "tokenizer_config.json",
        json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special},
            indent=1,
        ),
    )
    return len(tokens)


def main() -> None:
    for world in (SMALL, LARGE):
        write_tokenizer(world, FAMILY_OF[world.name].tokenizer_folder)


if __name__ == "__main__":
    main()
