"""What the model sees is compared and counted: equal tokens, cut captions, steps that change nothing."""

from dataclasses import replace

import pytest

from cul_core.base.errors import ConceptError
from cul_core.concepts.concept import Concept
from cul_core.output.report import brief_text, step_text
from cul_core.training.callbacks import Callbacks
from cul_core.training.seen_tokens import SeenTokens, check_anchors, without_targets
from cul_core.training.step import run_step


class ClipTokens:
    """The part of a network that reads prompts, with CLIP's own tokenizer."""

    def __init__(self, folder):
        from cul_core.models.family import FAMILIES
        from cul_core.models.load_diffusers import load_tokenizer

        self._tokenizer = load_tokenizer(FAMILIES["sd1"], folder)

    def tokens(self, prompt):
        return tuple(self._tokenizer(prompt, max_length=77, truncation=True).input_ids[1:-1])


@pytest.fixture(scope="module")
def seen(clip_tokenizer):
    return SeenTokens(ClipTokens(clip_tokenizer))


PHOTOS = "one {}", "a photo of a {}", "a {} in the city"


@pytest.mark.parametrize(
    ("target", "anchor"),
    [
        ("T-shirt", "t - shirt"),
        ("K/DA", "k / da"),
        ("Spider-Man", "spider - man"),
        ("C++", "c ++"),
        ("rock'n'roll", "rock 'n' roll"),
        ("AT&T", "at & t"),
    ],
)
def test_a_target_that_has_the_tokens_of_its_anchor_is_refused(target, anchor, seen):
    concept = Concept(target, "object", anchor)
    with pytest.raises(ConceptError, match="reads the same tokens in .* so that nothing would change"):
        check_anchors(seen, [concept], [text.format(anchor) for text in PHOTOS])


@pytest.mark.parametrize(("target", "anchor"), [("T-shirt", "shirt"), ("dog", "dogs and cats"), ("C++", "C")])
def test_a_target_of_other_tokens_is_none_of_these(target, anchor, seen):
    assert (
        check_anchors(seen, [Concept(target, "object", anchor)], [text.format(anchor) for text in PHOTOS])
        == []
    )


LONG = ", ".join(["ornate baroque palace hall with gold leaf"] * 12)


def test_a_caption_that_differs_only_behind_its_cut_is_refused(seen):
    concept = Concept(f"{LONG}, with a lion", "memorized", f"{LONG}, with a tiger")
    with pytest.raises(ConceptError, match="differ only behind the last token.*shorten them"):
        check_anchors(seen, [concept], [concept.anchor])


def test_a_caption_that_is_cut_is_said(seen):
    (said,) = check_anchors(seen, [Concept(f"a lion, {LONG}", "memorized", "a hall")], ["a hall"])
    assert said.startswith("1 of 2 captions are longer than the text encoder reads") and "a lion" in said
    (said,) = check_anchors(seen, [Concept("dog", "object", "cat")], [f"a cat, {LONG}", "a cat"])
    assert said.startswith("2 of 4 captions are longer")


@pytest.mark.parametrize(("words", "is_cut"), [(74, False), (75, False), (76, True), (200, True)])
def test_a_prompt_is_cut_where_it_has_more_tokens_than_the_encoder(words, is_cut, seen):
    assert seen.is_cut(" ".join(["cat"] * words)) == is_cut


def test_captions_of_which_some_train_nothing_are_counted(seen):
    prompts = [f"{LONG} and a cat", "one cat"]
    said = check_anchors(seen, [Concept("dog", "object", "cat")], prompts)
    assert said[0].startswith("1 of 2 captions train nothing, because the model reads the same tokens")


def test_a_kept_name_with_the_tokens_of_a_target_is_not_kept(seen):
    kept = without_targets(
        seen, [Concept("t - shirt"), Concept("hat")], [Concept("T-shirt", "object", "shirt")]
    )
    assert [concept.target for concept in kept] == ["hat"]


def test_a_step_says_before_its_anchors_what_it_cannot_train(random_model, make_request):
    said, drawn = [], []
    request = replace(make_request(iterations=0), anchor_prompts=("a house " * 60,), anchor_count=1)
    callbacks = Callbacks(on_anchors=lambda *done: drawn.append(done), on_message=said.append)
    run_step(random_model, request, callbacks=callbacks)
    assert any("captions are longer than the text encoder reads" in text for text in said)
    drawn.clear()
    same = replace(
        request,
        concepts=(Concept("navy-stripes", "object", "navy - stripes"),),
        anchor_prompts=("one navy - stripes",),
    )
    with pytest.raises(ConceptError, match="reads the same tokens"):
        run_step(random_model, same, callbacks=callbacks)
    assert not drawn


@pytest.mark.parametrize("settings", [{"iterations": 0}, {"learning_rate": 0.0, "iterations": 1}])
def test_a_step_that_changes_nothing_forgot_nothing(settings, random_model, make_request):
    edited, report = run_step(random_model, make_request(**settings))
    assert not edited.edits and not report.record.has_changed and edited.forgotten == ()
    assert brief_text(report).startswith("Nothing changed for Candy_Stripes")
    assert step_text(report).startswith("Nothing changed for Candy_Stripes (nothing changed)")


def test_the_command_line_says_that_nothing_changed(random_checkpoint, tmp_path, capsys):
    from cul_core.cli import main

    command = ["unlearn", "Lava", "--model", str(random_checkpoint), "--preset", "esd", "--iterations", "0"]
    assert main([*command, "--out", str(tmp_path / "a.safetensors")]) == 0
    assert capsys.readouterr().out.startswith("nothing changed for Lava in ")
