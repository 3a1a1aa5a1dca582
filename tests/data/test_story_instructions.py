"""Requests for stories: each names what its story holds, and no pair of hero and scene is asked for in both splits."""

import re
import string
from itertools import islice

import pytest

from litmoe.data import stories
from litmoe.data.corpora import Stories
from litmoe.data.story_instructions import (
    ANY_STORY,
    REQUESTS,
    WHAT,
    WHO,
    StoryInstruction,
    story_instructions,
)

NAMES = [line.split("|")[0].strip() for line in (stories.HEROES + stories.FRIENDS).splitlines() if line]


@pytest.fixture(scope="module")
def made() -> list[StoryInstruction]:
    return list(story_instructions(6000, 0.1))


def test_the_same_each_time(made: list[StoryInstruction]) -> None:
    assert list(story_instructions(50, 0.1)) == made[:50]


def test_names_are_those_asked_for_and_stand_in_the_story(made: list[StoryInstruction]) -> None:
    for one in made:
        assert one.names == [name for name in NAMES if re.search(rf"\b{name}\b", one.request)], one
        assert all(f" {name}" in one.story for name in one.names), one


def test_the_story_is_what_is_asked_for() -> None:
    """Whatever slot a request names, its words stand in the story, in each of the ways to tell it."""
    lines = [line for way in (WHO, ANY_STORY) for line in way.strip().splitlines()]
    for telling in islice(stories.tell(seed=2), 4000):
        for line in [*lines, *WHAT[telling.scene.plot].strip().splitlines()]:
            for slot in re.findall(r"{[^}]+}", line):
                if slot not in ("{he}", "{him}", "{his}", "{himself}", "{some}"):
                    words = telling.fill(slot).removeprefix("a ").removeprefix("an ")
                    assert words.lower() in telling.story.lower(), (slot, words, telling.story)


def test_each_plot_can_be_asked_for() -> None:
    assert set(WHAT) == set(stories.PLOTS)
    assert all(len(ways.strip().splitlines()) >= 5 for ways in WHAT.values())


def test_held_out_pairs_are_not_trained_on(made: list[StoryInstruction]) -> None:
    told = {telling.story: telling for telling in islice(stories.tell(seed=1), 7000)}
    pairs: dict[str, set[tuple[str, str]]] = {"train": set(), "val": set()}
    for one in made:
        telling = told[one.story]
        pairs[one.split].add((telling.hero["hero"], telling.scene.name))
    assert not pairs["train"] & pairs["val"]
    assert 70 <= len(pairs["val"]) <= 160  # of 12 heroes in 96 scenes
    assert {hero for hero, _ in pairs["val"]} <= {hero for hero, _ in pairs["train"]}
    requests = {split: {one.request for one in made if one.split == split} for split in pairs}
    assert not requests["train"] & requests["val"]


def test_no_story_of_the_corpus_and_none_twice(made: list[StoryInstruction]) -> None:
    told = {one.story for one in made}
    assert len(told) == len(made) == 6000
    assert not told & set(Stories("").documents())


def test_correct_english(made: list[StoryInstruction]) -> None:
    for one in made:
        assert set(one.request) <= set(string.ascii_letters + " .,?-'"), one.request
        assert one.request[0].isupper() and one.request[-1] in ".?", one.request
        assert one.request.endswith("?") == one.request.startswith(("Can ", "Could ")), one.request
        assert not re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]|  | [.,?]", one.request), one.request
        assert not re.search(r"\b(?:a|an|the) (?:a|an|the|some|his|her)\b", one.request), one.request
        assert not re.search(r"\b(\w+) \1\b", one.request), one.request


def test_many_ways_to_ask(made: list[StoryInstruction]) -> None:
    openings = {line.split("{")[0] for line in REQUESTS.strip().splitlines()}
    asked = {opening for opening in openings if any(one.request.startswith(opening) for one in made)}
    assert asked == openings
    held_out = [one for one in made if one.split == "val"]
    assert all(one.names for one in held_out)  # never "Tell me a story about a girl."
