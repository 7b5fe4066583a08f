from __future__ import annotations

import pytest

from galley_plugins.embedding.templates import Template, clean


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man is playing", "A man is playing."),
        ("A man is playing.", "A man is playing."),
        ("Is a man playing?", "Is a man playing."),
        ('He said "yes".', "He said 'yes'."),
        ('He said "yes"', "He said 'yes'"),
        ("", ""),
    ],
)
def test_a_text_becomes_a_sentence_without_quotation_marks(text: str, expected: str) -> None:
    """By the rules of Token Prepending's published evaluation."""
    assert clean(text) == expected


def test_an_instruction_comes_first_where_the_template_does_not_place_it() -> None:
    assert Template.parse("say {text}").pieces == ("{instruction}", "say ", "{text}")
    assert Template.parse("say {instruction}{text}").pieces == ("say ", "{instruction}", "{text}")


def test_without_its_placeholder_a_prompt_is_that_of_prompt_eol() -> None:
    pieces = Template.named("prompt-eol").without_placeholder().pieces
    assert "".join(pieces) == '{instruction}This sentence : "{text}" means in one word:"'


def test_a_named_template_says_whether_texts_are_cleaned_unless_told() -> None:
    assert Template.named("prompt-eol").clean
    assert not Template.named("prompt-eol", clean=False).clean
    assert not Template.named("plain").clean
    assert not Template.named("about {text}").clean


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("no slot", r"found 'no slot', expected \{text\} in it"),
        ("{placeholder}{placeholder}{text}", r"found \{placeholder\} 2 times, expected it once"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Template.parse(template)
