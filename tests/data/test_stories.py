"""The built-in corpus: the same everywhere, no story twice, correct English, and each end fits its beginning."""

import gzip
import hashlib
import re
import string
from itertools import islice

import pytest

from litmoe.data import stories
from litmoe.data.stories import PLOTS, generate_stories, stories_until

HEROES = {line.split("|")[0].strip(): line.split("|")[2].strip() for line in stories.HEROES.strip().splitlines()}
FRIENDS = {line.split("|")[0].strip(): line.split("|")[2].strip() for line in stories.FRIENDS.strip().splitlines()}


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """5 MB of stories."""
    return list(stories_until(5_000_000))


@pytest.fixture(scope="module")
def some(corpus: list[str]) -> list[str]:
    """3,000 stories: every row of every plot about thirty times."""
    return corpus[:3000]


def names_in(text: str, names: dict[str, str]) -> set[str]:
    return {word for word in re.findall(r"[A-Z][a-z]+", text) if word in names}


def test_same_stories_everywhere() -> None:
    """Fails when the stories change: then tell so in the log, for every number measured on them changes too."""
    text = "\n\n".join(islice(generate_stories(seed=0), 1000))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "dbff2cec21e9e2b3112be8175001ffbffe87113683079cfbae2fa0f24f395bc7"
    )


def test_the_seed_decides() -> None:
    first, again, other = ([*islice(generate_stories(seed), 20)] for seed in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)


def test_no_two_alike(corpus: list[str]) -> None:
    """So training and validation text, two parts of one corpus, share no story either."""
    assert len(set(corpus)) == len(corpus)
    assert len({story.casefold() for story in corpus}) == len(corpus)


def test_a_story_told_twice_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows that tell the same, thirty openings: thirty stories, and drawn blindly some would come twice."""
    monkeypatch.setattr(stories, "HEROES", "Mina | girl | she | in a tree")
    monkeypatch.setattr(stories, "FRIENDS", "Otto | owl | he")
    monkeypatch.setattr(stories, "OPENINGS", "\n".join(f"{{hero}} sat in chair {number}." for number in range(30)))
    plot = stories.Plot(
        "bird | friend\nwren | Otto\nrobin | Otto", "It rained.", "It poured.", "{pal} came.", "It stopped."
    )
    monkeypatch.setattr(stories, "PLOTS", (plot,))
    stories._compile.cache_clear()
    try:
        assert len(set(islice(generate_stories(), 30))) == 30
    finally:
        monkeypatch.undo()
        stories._compile.cache_clear()


def test_until(corpus: list[str]) -> None:
    size = sum(len(story.encode()) for story in corpus)
    assert 5_000_000 <= size < 5_000_000 + 2000
    assert corpus[:10] == list(islice(generate_stories(seed=0), 10))
    assert list(stories_until(0)) == []


def test_many_words(corpus: list[str]) -> None:
    words = {word.lower() for story in corpus[:1500] for word in re.findall(r"[A-Za-z]+", story)}
    assert len(words) >= 1100  # the bound of a rich enough vocabulary is 1,000


def test_not_too_regular(corpus: list[str]) -> None:
    """TinyStories' own ratio is 3.28 (``gzip -9`` on 0.9 MB of its first version); ours may be twice that at most."""
    megabyte = "\n".join(corpus).encode()[:1_000_000]
    assert len(megabyte) / len(gzip.compress(megabyte, 9)) < 2 * 3.28


def test_length(corpus: list[str]) -> None:
    lengths = [len(story.split()) for story in corpus]
    assert min(lengths) >= 60
    assert max(lengths) <= 200
    assert {story.count("\n") for story in corpus} == {3}  # beginning, trouble, turn, ending


def test_plain_text(some: list[str]) -> None:
    allowed = set(string.ascii_letters + " \n.,!?;:'\"-")
    for story in some:
        assert set(story) <= allowed, story
        assert story == story.strip()
        for paragraph in story.split("\n"):
            assert paragraph == " ".join(paragraph.split()), story
            assert paragraph.count('"') % 2 == 0, story
            assert paragraph.endswith((".", "!", "?", '."', '!"', '?"')), story


def test_punctuation_and_capitals(some: list[str]) -> None:
    for story in some:
        assert not re.search(r"[.,!?][.,!]| [.,!?]|,[A-Za-z]|[.!?][A-Za-z]", story), story
        assert not re.search(r"""(?:^|\n|[.!?] )"?[a-z]""", story), story  # a sentence begins with a capital
        for before, said in re.findall(r'(, |)"([^"]*)"', story):
            assert said[-1] in ".,!?", story
            assert said[0].isupper() or before, story  # "Yes," said Tom, "if you help me."


def test_articles(some: list[str]) -> None:
    for story in some:
        assert not re.search(r"\b[Aa] [aeiouAEIOU]", story), story
        assert not re.search(r"\b[Aa]n (?!hour)[^aeiouAEIOU]", story), story
        assert not re.search(r"\b(?:a|an|the|A|An|The) (?:a|an|the|some|his|her)\b", story), story
        assert not re.search(r"\b(\w+) \1\b", story), story  # a word twice


def test_same_people_from_beginning_to_end(some: list[str]) -> None:
    for story in some:
        beginning, _, turn, ending = story.split("\n")
        heroes, friends = names_in(story, HEROES), names_in(story, FRIENDS)
        assert len(heroes) == 1 and len(friends) == 1, story
        assert names_in(beginning, HEROES) == heroes, story
        assert names_in(turn + ending, HEROES) == heroes, story
        assert names_in(turn + ending, FRIENDS) == friends, story
        if HEROES[min(heroes)] == FRIENDS[min(friends)] == "she":
            assert not re.search(r"\b(?:he|him|himself)\b", story, re.IGNORECASE), story
        if HEROES[min(heroes)] == FRIENDS[min(friends)] == "he":
            assert not re.search(r"\b(?:she|herself|her)\b", story, re.IGNORECASE), story


def test_heroes_and_friends_are_different_people() -> None:
    assert not set(HEROES) & set(FRIENDS)


@pytest.mark.parametrize(
    "plot", PLOTS, ids=[name for name, value in vars(stories).items() if isinstance(value, stories.Plot)]
)
def test_what_the_plot_is_about_runs_through_it(plot: stories.Plot) -> None:
    """In whatever way it is told, the first slot of the row is named in the trouble (or before) and resolved after it,
    and hero and friend take part in the turn or the end."""
    columns = [column.strip() for column in plot.rows.strip().splitlines()[0].split("|")]

    def always(paragraphs: str, slots: set[str]) -> bool:
        """Some group of ways has one of these slots in each way."""
        groups = [group.strip().splitlines() for group in paragraphs.split("\n\n")]
        used = [[set(re.findall(r"{(?:[Aa] )?(\w+)}", way.lower())) for way in group] for group in groups]
        return any(all(way & slots for way in group) for group in used)

    assert always(plot.beginning + "\n\n" + plot.trouble, {columns[0]})
    assert always(plot.turn + "\n\n" + plot.ending, {columns[0], columns[-1]})
    assert always(plot.beginning + "\n\n" + plot.trouble, {"hero"})
    assert always(plot.turn + "\n\n" + plot.ending, {"hero"})
    assert always(plot.turn, {"pal"})


def test_the_lost_thing_is_the_one_that_is_found(some: list[str]) -> None:
    rows = [[cell.strip() for cell in line.split("|")] for line in stories.LOST_AND_FOUND.rows.strip().splitlines()[1:]]
    seen = set()
    for story in some:
        for thing, _, where, _ in rows:
            if where in story and "had been given" in story:
                beginning, *_, ending = story.split("\n")
                assert thing in beginning and thing in ending, story
                assert not any(other in story for other, *_ in rows if other != thing), story
                seen.add(thing)
    assert seen == {thing for thing, *_ in rows}


def test_names_stay_one_token(some: list[str]) -> None:
    """A byte-level tokenizer knows " Mina" and "Mina" as different tokens: a name always follows a space."""
    for story in some:
        assert not re.search(rf"(?:^|[^ ])(?:{'|'.join([*HEROES, *FRIENDS])})\b", story), story
