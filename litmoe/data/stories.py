"""Generate the built-in corpus: short children's stories, identical on every machine, and requests for such stories.

``stories.yaml`` holds the heroes, friends and plots. A story is one random choice per table:

    from litmoe.data.stories import generate_stories

    for story in itertools.islice(generate_stories(seed=1), 3):
        print(story, end="\\n\\n")
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

import yaml

from litmoe.data.documents import split_of

T = TypeVar("T")

# Size of the built-in corpus.
SAMPLE_BYTES = 20 << 20
PARAGRAPHS = ("beginning", "trouble", "turn", "ending")
# Share of the requests that mention where the hero lives.
HOME_SHARE = 0.15
# Share of the training requests that do not say what happens in the story.
ANY_STORY_SHARE = 0.1
# A table says "he" or "she" for each hero and friend. "he", "him", ... are also the names of the slots.
PRONOUNS = {
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
}


class Scene(NamedTuple):
    """One row of a plot, with every slot filled in except those of the hero."""

    name: str
    """``<number of the plot>.<number of the row>``"""
    slots: dict[str, str]
    """Texts of the row's and the friend's slots"""
    beats: list[list[str]]
    """The groups of the plot in order, each with its alternative sentences"""
    requests: list[str]
    """Alternative descriptions of what the hero does"""


class Story(NamedTuple):
    """A story and its ingredients."""

    text: str
    scene: Scene
    hero: dict[str, str]
    """Texts of the hero's slots: ``hero``, ``kind``, ``home``, ..."""

    def fill(self, template: str) -> str:
        """Replace the slots of ``template`` with the texts of this story."""
        return template.format_map(_PartialSlots(self.scene.slots)).format_map(self.hero)


class StoryRequest(NamedTuple):
    """A request for a story, and the story."""

    split: str
    request: str
    story: str
    names: list[str]
    """The names that the request mentions"""


def generate_stories(seed: int = 0) -> Iterator[str]:
    """Yield different stories without end: ASCII, 60 to 200 words, four paragraphs separated by a newline.

    The same seed gives the same stories on every platform and Python version.
    """
    return (story.text for story in generate(seed))


def generate(seed: int = 0) -> Iterator[Story]:
    """Yield the stories of ``generate_stories`` with their ingredients."""
    heroes, plots = _compile_tables()
    # Only random() is used, because Python guarantees its sequence for a seed on every version.
    random = Random(seed).random
    generated: set[bytes] = set()
    while True:
        # The hero first, then the home: a child with eight possible homes is as frequent as the others.
        homes = _choose(heroes, random)
        hero = _choose(homes, random)
        scene = _choose(_choose(plots, random), random)
        template = "".join([_choose(sentences, random) for sentences in scene.beats])
        text = template.format_map(hero)
        # A digest per story instead of the story: 28,000 stories take 2 MB instead of 20 MB.
        digest = blake2b(text.encode(), digest_size=12).digest()
        if digest not in generated:
            generated.add(digest)
            yield Story(text, scene, hero)


def stories_until(total_bytes: int, seed: int = 0) -> Iterator[str]:
    """Yield the first stories of ``generate_stories(seed)`` until they hold at least ``total_bytes`` bytes."""
    for story in generate_stories(seed):
        if total_bytes <= 0:
            return
        yield story
        total_bytes -= len(story)


def story_requests(number: int, val_fraction: float, seed: int = 1) -> Iterator[StoryRequest]:
    """Yield requests for stories that are not in the built-in corpus, each with its story.

    A pair of hero and scene, such as Pip and his fear of the dark, is requested in one split only.

    Args:
        number: requests of both splits together.
        val_fraction: share of the pairs in the validation split, chosen by hash.
        seed: must not be 0, the seed of the corpus.
    """
    corpus = set(stories_until(SAMPLE_BYTES))
    # A seed outside the usual range, so that requests are independent of the choices within the stories.
    random = Random(seed + (1 << 32)).random
    # A model may have been pretrained on the corpus and would know the answer by heart.
    new_stories = (story for story in generate(seed) if story.text not in corpus)
    for story in islice(new_stories, number):
        split = split_of(f"{story.hero['hero']} {story.scene.name}", val_fraction)
        request = _request_for(story, random, is_training=split == "train")
        names = [story.hero["hero"], story.scene.slots["pal"]]
        yield StoryRequest(split, request, story.text, [name for name in names if f" {name}" in request])


def _request_for(story: Story, random: Callable[[], float], is_training: bool) -> str:
    tables = _tables()
    # The random number is drawn for both splits: otherwise val_fraction would change the training requests.
    is_any_story = random() < ANY_STORY_SHARE
    if is_any_story and is_training:
        return story.fill(_choose(_lines(tables["any_story"]), random))
    who = _choose(_lines(tables["who"]), random)
    what = _choose(story.scene.requests, random)
    if random() < HOME_SHARE:
        what = f"lives {{home}} and {what}"
    request = _choose(_lines(tables["requests"]), random)
    return story.fill(request.replace("{who}", who).replace("{what}", what))


def _choose(choices: Sequence[T], random: Callable[[], float]) -> T:
    return choices[int(random() * len(choices))]


# --- tables ---


@cache
def _tables() -> dict[str, Any]:
    """Read ``stories.yaml``."""
    path = Path(__file__).with_name("stories.yaml")
    tables: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tables


@cache
def _compile_tables() -> tuple[list[list[dict[str, str]]], list[list[Scene]]]:
    """Return the slots of each hero in each home, and the scenes of each plot.

    Everything that does not depend on a random choice is filled in here once, which makes 20 MB of stories take 0.5 s.
    """
    tables = _tables()
    heroes = [_hero_slots(row, _lines(tables["houses"])) for row in _rows(tables["heroes"])]
    friends = {row["pal"]: _friend_slots(row) for row in _rows(tables["friends"])}
    plots = []
    for plot_number, plot in enumerate(tables["plots"].values()):
        scenes = []
        for row_number, row in enumerate(_rows(plot["rows"])):
            slots = friends[row["friend"]] | _with_variants(row)
            beats = _beats(plot, tables["openings"], slots)
            # The name is hashed for the split of a request, so the order of plots and rows must not change.
            scenes.append(Scene(f"{plot_number}.{row_number}", slots, beats, _lines(plot["requests"])))
        plots.append(scenes)
    return heroes, plots


def _hero_slots(row: dict[str, str], houses: list[str]) -> list[dict[str, str]]:
    """Return the slots of a hero in each possible home."""
    homes = houses if row["home"] == "in a house" else [row["home"]]
    slots = {"kind": row["kind"], **PRONOUNS[row["he"]]}
    # A name needs no variants: it has a capital and no article.
    return [{"hero": row["hero"]} | _with_variants({**slots, "home": home}) for home in homes]


def _friend_slots(row: dict[str, str]) -> dict[str, str]:
    pronouns = {f"pal_{slot}": word for slot, word in PRONOUNS[row["he"]].items()}
    return {"pal": row["pal"], "pal_kind": row["kind"], **pronouns}


def _beats(plot: dict[str, str], openings: str, slots: dict[str, str]) -> list[list[str]]:
    """Return the groups of a plot, filled in; each sentence ends with the space or newline that follows it."""
    # The slots of the hero stay open until a hero is chosen.
    known = _PartialSlots(slots)
    beats = []
    for paragraph in PARAGRAPHS:
        groups = plot[paragraph].split("\n\n")
        if paragraph == "beginning":
            groups = [openings, *groups]
        # The end is part of the sentence, so that a story is a single join.
        ends = [" "] * (len(groups) - 1) + ["" if paragraph == "ending" else "\n"]
        for group, end in zip(groups, ends, strict=True):
            beats.append([sentence.format_map(known) + end for sentence in _lines(group)])
    return beats


class _PartialSlots(dict[str, str]):
    """Fills in the known slots with ``str.format_map`` and keeps the others."""

    def __missing__(self, slot: str) -> str:
        return "{" + slot + "}"


def _lines(text: str) -> list[str]:
    return text.strip().splitlines()


def _rows(table: str) -> list[dict[str, str]]:
    """Return the rows of a table by the column names in its first line."""
    names, *rows = [[cell.strip() for cell in line.split("|")] for line in _lines(table)]
    return [dict(zip(names, cells, strict=True)) for cells in rows]


def _with_variants(slots: dict[str, str]) -> dict[str, str]:
    """Add the variants of each slot with an article and with a capital: thing, Thing, a thing, A thing."""
    result: dict[str, str] = {}
    for slot, text in slots.items():
        article = "an" if text[0] in "aeiou" else "a"
        # A text that begins with a slot, such as "{He} fell", has its capital already.
        capitalized = text if text.startswith("{") else text[0].upper() + text[1:]
        result[slot] = text
        result[f"a {slot}"] = f"{article} {text}"
        result[slot[0].upper() + slot[1:]] = capitalized
        result[f"A {slot}"] = f"{article.capitalize()} {text}"
    return result
