"""Text rows as closed-form methods read them: rows of a target beside their goals, and second moments."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cache, cached_property, lru_cache, partial
from itertools import compress
from math import ceil

import torch
from torch import Tensor

from ..base.config import stable_hash
from ..base.last_result import LastResult
from ..concepts.captions import anchor_prompts
from ..concepts.concept import Concept, display_name
from ..models.network import Network
from ..models.sampling import generator_for
from ..models.text_conditioning import Conditioning
from .step_context import StepContext, TextSums, made_anew
from .text_maps import TextMap, principal_directions, whitener

TEXT, POOLED = "text", "pooled"
INPUTS = (TEXT, POOLED)
"""What layers read of a prompt: its text rows, or its pooled vector."""
ENDS = "ends"
"""Key of the EOS rows of sentences beside their sums of squares."""

_COMPONENTS = 64
"""Largest number of rows that are kept of a concept's differences, as their principal components."""
_MAIN_ROWS = 2
"""Rows of `Pairs.main`."""
_BATCH = 64
_MOST_WORDS = 2000
"""Words of the vocabulary that random words are mixed of."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Rows of target prompts beside the rows that they should become, in fp64 on the CPU.

    Args:
        differences: (m, d) principal components of targets - goals, in which every caption weighs the same;
            m is at most 64.
        targets: (r, d) rows of the target's own tokens, EOS and padding, for a few captions; one row stands
            for all padding, times the square root of their number.
        goals: (r, d) rows that `targets` should become.
    """

    differences: Tensor
    targets: Tensor
    goals: Tensor

    @cached_property
    def main(self) -> tuple[Tensor, Tensor]:
        """Combinations (k, d) of `targets` and those of `goals` in which they differ most, in units of the
        norm of all differences."""
        differences = self.targets - self.goals
        mix = torch.linalg.svd(differences, full_matrices=False)[0][:, :_MAIN_ROWS].T
        mix = mix / differences.norm().clamp_min(1e-12)
        return mix @ self.targets, mix @ self.goals


class Whitening:
    """The Cholesky factor L of a damped second moment, with the directions of concepts in its coordinates."""

    def __init__(self, moment: Tensor, damping: float):
        self.moment, self.damping, self.factor = moment, damping, whitener(moment, damping)
        self._directions: dict[tuple[Pairs, int], Tensor] = {}

    def directions(self, pair: Pairs, count: int) -> Tensor:
        """The `principal_directions` (d, m) of a concept's differences."""
        if (pair, count) not in self._directions:
            self._directions[pair, count] = principal_directions(pair.differences, self.factor, count)
        return self._directions[pair, count]


class Responses:
    """Responses of matrices to the rows of concepts, on R (m, d): ||R x|| is the norm of their outputs for x.

    Args:
        outputs: rows (r, d) of the matrices.
    """

    def __init__(self, outputs: Tensor):
        self.factor = torch.linalg.qr(outputs, mode="r").R
        self._whole: dict[Pairs, Tensor] = {}

    def under(self, solution: TextMap, pairs: Iterable[Pairs]) -> Iterator[tuple[Tensor, Tensor]]:
        """(response to what a map leaves of the difference, to the whole difference) of each concept."""
        up = (self.factor @ solution.up).T
        for pair in pairs:
            if pair not in self._whole:
                self._whole[pair] = (pair.targets - pair.goals) @ self.factor.T
            whole = self._whole[pair]
            yield whole + (pair.targets @ solution.down.T) @ up, whole


def encoded(network: Network, prompts: Sequence[str]) -> Conditioning:
    """Encoded prompts, their text rows as text readers get them."""
    return _as_read(network, network.encode(prompts))


def _as_read(network: Network, conditioning: Conditioning) -> Conditioning:
    return replace(conditioning, text=network.rows_read(conditioning.text))


def rows_of(conditioning: Conditioning, shared: int, source: str = TEXT) -> Tensor:
    """All rows (n, d) that count, in fp64 on the CPU: text rows after the shared ones, or pooled vectors."""
    if source == POOLED:
        return conditioning.pooled.cpu().double()
    text = conditioning.text.cpu().double()[:, shared:]
    if conditioning.mask is None:
        return text.flatten(0, 1)
    return text[conditioning.mask.cpu()[:, shared:].bool()]


def sums_of_squares(
    network: Network,
    prompts: Sequence[str],
    on_batch: Callable[[int, int], None] = lambda done, count: None,
    *,
    ends: list[Tensor] | None = None,
    encode: Callable[[Sequence[str]], Conditioning] | None = None,
) -> dict[str, Tensor]:
    """Sum of x x^T (d, d) over all rows x of the prompts, in fp64 on the CPU, by what is read of them.

    Args:
        network: whose text encoders are used.
        prompts: the prompts.
        on_batch: called before each batch with (prompts encoded, their number); it may raise to stop.
        ends: the EOS rows (b, d) of each batch are added to it.
        encode: encodes a batch of prompts; the network if None.
    """
    totals: dict[str, Tensor] = {}
    for start in range(0, len(prompts), _BATCH):
        on_batch(start, len(prompts))
        part = prompts[start : start + _BATCH]
        read = (encode or partial(encoded, network))(part)
        for source in INPUTS if read.pooled is not None else (TEXT,):
            rows = rows_of(read, network.shared_rows, source)
            totals[source] = totals.get(source, 0.0) + rows.T @ rows
        if ends is not None:
            text = read.text.cpu().double()
            last = [min(network.content(prompt).stop, text.shape[1] - 1) for prompt in part]
            ends.append(text[range(len(part)), last])
    return totals


def kept_concepts(retain: Iterable[Concept], targets: Iterable[Concept]) -> list[Concept]:
    """The distinct concepts to retain that have no target's name, in an order of their own."""
    names = {concept.name.lower() for concept in targets}
    return sorted({concept for concept in retain if concept.name.lower() not in names}, key=repr)


def name_at(name: Sequence[int], tokens: Sequence[int]) -> range:
    """Positions of a name's tokens in a prompt's; empty if it does not contain them."""
    for start in range(len(tokens) - len(name) + 1 if name else 0):
        if list(tokens[start : start + len(name)]) == list(name):
            return range(start, start + len(name))
    return range(0)


def aligned(target: Sequence[int], goal: Sequence[int], name: Sequence[int]) -> tuple[dict[int, int], list]:
    """(position in `target` -> position in `goal` of the same word, positions of the target's own words).

    Args:
        target: token ids of a prompt with the target.
        goal: token ids of the prompt that it should become.
        name: token ids of the target's name.
    """
    blocks = SequenceMatcher(None, list(goal), list(target), autojunk=False).get_matching_blocks()
    same = {block.b + i: block.a + i for block in blocks for i in range(block.size)}
    own = [i for i in name_at(name, target) if i not in same]
    return same, own or [i for i in range(len(target)) if i not in same]


class TextRows:
    """Encoded text of one network that closed-form methods share; what it encodes is kept.

    Everything is a function of names and prompts alone, so a set of requests gives the same rows in any
    order. The object holds statistics of about 1 MB for each concept, and a few (d, d) matrices. With them,
    one more request costs its own rows, and the solve.

    Args:
        network: the model, whose text encoders and tokenizer are used.
        origin: content hash of the network's weights, for what is kept between runs.
    """

    def __init__(self, network: Network, origin: str = ""):
        self.network, self.origin = network, origin
        self._check: Callable[[], None] = lambda: None
        self._say: Callable[[str], None] = lambda text: None
        self._kept: TextSums = made_anew
        self._pairs: dict[tuple, Pairs] = {}
        self._squares: dict[str, LastResult] = {}
        self._whitenings: dict[str, Whitening] = {}
        self._responses: dict[str, Responses] = {}
        self._described: dict[tuple, frozenset[str]] = {}
        self._vocabulary = network.words() or ["thing"]
        self._made_up = cache(self._made_up)
        self._tokens = lru_cache(maxsize=4096)(network.tokens)  # captions come again with each request
        self._content = lru_cache(maxsize=4096)(network.content)

    def watched_by(self, context: StepContext) -> None:
        """Use the context's ways to stop, to tell about progress, and to keep sums between runs."""
        self._check, self._say, self._kept = context.check, context.say, context.text_sums

    def _on_batch(self, done: int, count: int) -> None:
        self._check()
        self._say(f"reading sentence {done} of {count}")

    # --- what is kept

    def moment(
        self,
        source: str,
        targets: Sequence[Concept],
        retain: Sequence[Concept],
        captions: Sequence[str],
        made_up: int,
        described: Collection[str] = (),
        random_words: float = 0.0,
    ) -> Tensor:
        """Mean second moment (d, d) of four groups of kept text, each of trace 1, in fp64 on the CPU.

        The groups are made-up names in sentences, which stand for all that nobody lists; the concepts to
        retain in sentences; captions of anchor images; and the empty prompt. Where a target is no style, a
        share `random_words` of the moment is that of sentences with random words: names of objects are single
        words, and those of the vocabulary that made-up names hold are few of them.

        Args:
            source: `text` or `pooled`.
            targets: no made-up name holds a word of theirs.
            retain: concepts to retain.
            captions: anchor prompts of the requests.
            made_up: number of made-up names of each kind; 0 leaves them out.
            described: sentences with made-up names that are left out too.
            random_words: share of the sentences with random words.
        """
        declared = self.sentences(kept_concepts(retain, targets))
        groups = {"declared": declared, "captions": sorted(set(captions)), "empty": [""]}
        sums = [self._sum_of_squares(name, prompts, source) for name, prompts in groups.items() if prompts]
        if made_up:
            sums += [self._of_made_up(source, targets, made_up, described)]
        mean = sum(total / total.trace() for total in sums) / len(sums)
        if not random_words or not made_up or all(map(_is_style, targets)):
            return mean
        words = self._of_random_words(source, made_up)
        return (1 - random_words) * mean + random_words * words / words.trace()

    def _sum_of_squares(self, group: str, prompts: Sequence[str], source: str) -> Tensor:
        """`sums_of_squares` of the prompts of a group; the last ones of each group are kept."""
        last = self._squares.setdefault(group, LastResult())
        sums = last.of(tuple(prompts), lambda: sums_of_squares(self.network, prompts, self._on_batch))
        return sums[source]

    def whitening(self, source: str, moment: Tensor, damping: float) -> Whitening:
        """The whitening of a `moment`; the last one is kept while neither of them changes."""
        last = self._whitenings.get(source)
        if last is None or last.damping != damping or not torch.equal(last.moment, moment):
            last = self._whitenings[source] = Whitening(moment, damping)
        return last

    def responses(self, source: str, outputs: Callable[[], Tensor]) -> Responses:
        """Responses of the pretrained matrices that read `source`, made once of their `outputs` (r, d)."""
        if source not in self._responses:
            self._responses[source] = Responses(outputs())
        return self._responses[source]

    def mean_squares(self, source: str, prompts: Sequence[str]) -> Tensor:
        """Mean over prompts of the sum of x x^T (d, d) over the rows x of each, in fp64 on the CPU."""
        return self._sum_of_squares("mean", prompts, source) / len(prompts)

    def _of_made_up(
        self, source: str, targets: Sequence[Concept], count: int, described: Collection[str] = ()
    ) -> Tensor:
        taken, total = {word for concept in targets for word in _words(concept.name)}, 0.0
        for is_style in sorted({_is_style(concept) for concept in targets}):
            prompts, sums = self._made_up(is_style, count)
            dropped = [prompt for prompt, words in prompts.items() if words & taken or prompt in described]
            total = total + sums[source]
            if dropped:
                total = total - self._sum_of_squares(f"dropped {is_style}", dropped, source)
        return total

    def _of_random_words(self, source: str, count: int) -> Tensor:
        """Sum of squares of the sentences with made-up names of objects, whose words are random ones here.

        A random word's embedding has the mean and covariance of the vocabulary's.
        """
        network, (prompts, _) = self.network, self._made_up(False, count)

        def made() -> dict[str, Tensor]:
            tables, generator = self._embeddings(), generator_for(0, "random words")

            @torch.no_grad()
            def encode(part: Sequence[str]) -> Conditioning:
                rows = [of.clone() for of in network.token_rows(part)]
                for i, prompt in enumerate(part):
                    own = {self._tokens(word) for word in prompts[prompt]}
                    at = [j for j, token in enumerate(self._tokens(prompt)) if (token,) in own]
                    drawn = torch.randn(len(at), len(tables[0]), generator=generator) / len(tables[0]) ** 0.5
                    places = [self._content(prompt).start + j for j in at]
                    for of, table in zip(rows, tables, strict=True):
                        mean = table.mean(0)
                        of[i, places] = (mean + drawn.to(table) @ (table - mean)).to(of)
                return _as_read(network, network.encode_rows(part, rows))

            return sums_of_squares(network, list(prompts), self._on_batch, encode=encode)

        key = stable_hash(["random words", self.origin, network.device.type, list(prompts)])
        return self._kept(key, made, self._check)[source]

    def _embeddings(self) -> list[Tensor]:
        """Embeddings (n, e) of at most 2000 words of the vocabulary, one tensor for each text encoder."""
        words = self._vocabulary[:: ceil(len(self._vocabulary) / _MOST_WORDS)]
        parts = [words[start : start + _BATCH] for start in range(0, len(words), _BATCH)]
        found = [
            [of[range(len(part)), [self._content(word).start for word in part]] for of in rows]
            for part, rows in ((part, self.network.token_rows(part)) for part in parts)
        ]
        return [torch.cat(of).float() for of in zip(*found, strict=True)]

    def _made_up(self, is_style: bool, count: int) -> tuple[dict[str, set[str]], dict[str, Tensor]]:
        """(sentence -> words of the made-up names in it, `sums_of_squares` of the sentences).

        A made-up style stands in a caption of an image without style, any other made-up name in the place of
        an anchor, two of three also in a made-up style.
        """
        rng, prompts = random.Random(f"made-up names {is_style}"), {}
        plain = anchor_prompts(self.network.family, [Concept("thing", "style")]) if is_style else ()
        for number in range(count):
            name = self._made_up_name(rng)
            if is_style:
                caption = rng.choice(plain)
            else:
                caption = rng.choice(anchor_prompts(self.network.family, [Concept("thing", "object", name)]))
            style = name if is_style else self._made_up_name(rng) if number % 3 else ""
            prompt = rng.choice(Concept(style).target_prompts(caption)) if style else caption
            prompts[prompt] = set(f"{name} {style}".split())
        sentences = list(prompts)
        key = stable_hash(["sums of squares, ends", self.origin, self.network.device.type, sentences])

        def made() -> dict[str, Tensor]:
            ends: list[Tensor] = []
            sums = sums_of_squares(self.network, sentences, self._on_batch, ends=ends)
            return sums | {ENDS: torch.cat(ends)}

        return prompts, self._kept(key, made, self._check)

    def described(
        self,
        concept: Concept,
        captions: Sequence[str],
        count: int,
        made_up: int,
        damping: float,
        share: float,
    ) -> frozenset[str]:
        """The sentences with made-up names whose text goes a large share of a concept's way from its anchor.

        Such a sentence may describe the concept. Its way is that of its EOS row along the one text direction
        that tells the concept from its anchor best, in the metric of the sentences and captions.

        Args:
            concept: the target.
            captions: anchor prompts of its request.
            count: captions in which it stands beside its anchor.
            made_up: number of made-up names of each kind.
            damping: see `text_maps.damped`.
            share: of the concept's own way.
        """
        key = (concept, tuple(captions), count, made_up, damping, share)
        if key not in self._described:
            self._described[key] = self._found(*key)
        return self._described[key]

    def _found(
        self,
        concept: Concept,
        captions: Sequence[str],
        count: int,
        made_up: int,
        damping: float,
        share: float,
    ) -> frozenset[str]:
        sentences, sums = self._made_up(_is_style(concept), made_up)
        plain = self._sum_of_squares("plain", sorted(set(captions)), TEXT)
        moment = sums[TEXT] / sums[TEXT].trace() + plain / plain.trace()
        whitening = self.whitening(ENDS, moment, damping)
        direction = whitening.directions(self.pairs(TEXT, concept, captions, count), 1)
        reading = torch.linalg.solve_triangular(whitening.factor.T, direction, upper=True)[:, 0]
        own, anchor = (
            torch.stack([rows[-1] for rows in self.words(TEXT, prompts)]).mean(0)
            for prompts in self.prompts(concept, captions, count)
        )
        way = (sums[ENDS] - anchor) @ reading
        return frozenset(compress(sentences, (way / ((own - anchor) @ reading) >= share).tolist()))

    def _made_up_name(self, rng: random.Random) -> str:
        return " ".join(rng.choices(self._vocabulary, k=rng.randint(1, 3)))

    def sentences(self, kept: Sequence[Concept]) -> list[str]:
        """Sentences with concepts to retain, each with its own prompt."""
        return [prompt for concept in kept for prompt in self._sentences(concept, len(kept))]

    def _sentences(self, concept: Concept, among: int) -> list[str]:
        """Sentences with a concept to retain: eight, or fewer if there are many concepts."""
        rng, count = random.Random(f"sentences {concept!r}"), max(1, min(8, 1200 // among))
        if concept.kind == "style":
            plain = anchor_prompts(self.network.family, [Concept("thing", "style")])
            prompts = [rng.choice(concept.target_prompts(rng.choice(plain))) for _ in range(count)]
        elif concept.kind == "memorized":
            prompts = [concept.name]
        else:
            filled = anchor_prompts(self.network.family, [Concept("thing", "object", concept.name)])
            prompts = rng.sample(filled, min(count, len(filled)))
        return [concept.prompt, *prompts]

    # --- what is forgotten

    def pairs(self, source: str, concept: Concept, captions: Sequence[str], count: int) -> Pairs:
        """Rows of a concept's target prompts beside their goals, from `count` of the captions.

        Same words pair with same words. The name's own tokens pair with the mean of the anchor's tokens, or
        of the padding where there is no anchor word. EOS pairs with EOS, padding with padding.
        """
        key = (source, concept, tuple(captions), count)
        if key not in self._pairs:
            self._check()
            self._say(f"reading {concept.name!r}")
            self._pairs[key] = self._paired(source, concept, captions, count)
        return self._pairs[key]

    def prompts(self, concept: Concept, captions: Sequence[str], count: int) -> tuple[list[str], list[str]]:
        """(target prompts, the prompts that they should become), from `count` of the captions."""
        chosen = self._chosen(concept, captions, count)
        versions = [concept.target_prompts(caption) for caption in chosen]
        return [choices[i % len(choices)] for i, choices in enumerate(versions)], chosen

    def words(self, source: str, prompts: Sequence[str]) -> list[Tensor]:
        """Rows (n, d) of each prompt's own tokens and EOS, or its pooled vector (1, d), in fp64 on the
        CPU."""
        found = []
        for start in range(0, len(prompts), _BATCH):
            self._check()
            part = prompts[start : start + _BATCH]
            read = encoded(self.network, part)
            if source == POOLED:
                found += rows_of(read, 0, POOLED)[:, None]
                continue
            spans = [self.network.content(prompt) for prompt in part]
            text = read.text.cpu().double()
            found += [rows[at.start : at.stop + 1] for rows, at in zip(text, spans, strict=True)]
        return found

    def _paired(self, source: str, concept: Concept, captions: Sequence[str], count: int) -> Pairs:
        network = self.network
        prompts, chosen = self.prompts(concept, captions, count)
        read = encoded(network, [*prompts, *chosen])
        both = read[: len(prompts)], read[len(prompts) :]
        if source == POOLED:
            targets, goals = (rows_of(side, 0, POOLED) for side in both)
            return Pairs(_components(targets - goals), targets, goals)
        rows = [
            self._caption_rows(concept, target, goal, *(side[i] for side in both))
            for i, (target, goal) in enumerate(zip(prompts, chosen, strict=True))
        ]
        differences = torch.cat([_of_unit_norm(target - goal) for target, goal, _ in rows])
        shown = rows[: max(1, len(rows) // 3)]
        weights = torch.tensor([weight for _, _, own in shown for weight in own.values()]).double()[:, None]
        targets = weights * torch.cat([target[[*own]] for target, _, own in shown])
        goals = weights * torch.cat([goal[[*own]] for _, goal, own in shown])
        return Pairs(_components(differences), targets, goals)

    def _chosen(self, concept: Concept, captions: Sequence[str], count: int) -> list[str]:
        """`count` of the captions that can name the concept; two of three in a made-up style, unless it is
        one.

        The rows of an object in a styled sentence may differ from those in a plain one in other directions.
        """
        usable = [caption for caption in captions if concept.target_prompts(caption)]
        if _is_style(concept):
            count = min(count, len(usable))
            return [usable[i * len(usable) // count] for i in range(count)]
        rng, chosen = random.Random(f"contexts {concept!r}"), []
        for i in range(count if usable else 0):
            caption = usable[i * len(usable) // count]
            style = Concept(self._made_up_name(rng))
            chosen.append(rng.choice(style.target_prompts(caption)) if i % 3 else caption)
        return list(dict.fromkeys(caption for caption in chosen if concept.target_prompts(caption)))

    def _caption_rows(
        self, concept: Concept, target: str, goal: str, ours: Conditioning, theirs: Conditioning
    ) -> tuple[Tensor, Tensor, dict[int, float]]:
        """(rows of a target prompt, their goals, weights of those by which residues are measured)."""
        text, goal_text = ours.text[0].cpu().double(), theirs.text[0].cpu().double()
        at, goal_at = self._content(target), self._content(goal)
        ids, goal_ids = self._tokens(target), self._tokens(goal)
        same, own = aligned(ids, goal_ids, self._tokens(concept.name))
        anchor = name_at(self._tokens(display_name(concept.anchor)), goal_ids)
        padding = self._padding(goal_text, goal_at, theirs.mask)
        of_name = goal_text[[goal_at.start + i for i in anchor]].mean(0) if anchor else padding.mean(0)
        pairs = [(at.start + i, goal_text[goal_at.start + j]) for i, j in same.items()]
        pairs += [(at.start + i, of_name) for i in own]
        few = dict.fromkeys(range(len(same), len(pairs)), 1.0)
        if at.stop < len(text) and goal_at.stop < len(text):
            few[len(pairs)] = 1.0
            pairs.append((at.stop, goal_text[goal_at.stop]))
        after = max(at.stop, goal_at.stop) + 1
        if ours.mask is None and after < len(text):
            few[len(pairs)] = (len(text) - after) ** 0.5
            pairs += [(i, goal_text[i]) for i in range(after, len(text))]
        positions, goals = zip(*pairs, strict=True)
        return text[list(positions)], torch.stack(goals), few

    def _padding(self, rows: Tensor, at: slice, mask: Tensor | None) -> Tensor:
        """Rows after the prompt's own tokens that count; its EOS row, or its last, if there are none."""
        rows = rows if mask is None else rows[mask[0].cpu().bool()]
        return rows[min(at.stop + 1, len(rows) - 1) :]


def _components(rows: Tensor) -> Tensor:
    """Principal components C (m, d) of rows (n, d), largest first: C^T C is rows^T rows / n, up to the
    rest."""
    values, vectors = torch.linalg.eigh(rows.T @ rows / max(len(rows), 1))
    kept = min(_COMPONENTS, len(values))
    return (vectors[:, -kept:] * values[-kept:].clamp_min(0).sqrt()).T.flip(0).contiguous()


def _of_unit_norm(rows: Tensor) -> Tensor:
    """Rows (n, d) over their Frobenius norm, so that every caption weighs the same."""
    return rows / rows.norm().clamp_min(1e-12)


def _is_style(concept: Concept) -> bool:
    """Whether target prompts keep the whole caption, instead of a word of it."""
    return concept.kind in ("style", "memorized")


def _words(name: str) -> Iterable[str]:
    return (word for word in "".join(c if c.isalnum() else " " for c in name.lower()).split())
