"""Instructions that the built-in corpus can answer: a story asked for by its hero and what happens, and the story.

    "Write a story about a mouse named Pip who is afraid of the dark."

Only heroes and things that the corpus tells of are asked for, each in a dozen ways, so that a model of a few million
parameters learns in minutes to do as it is told.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from litmoe.data import corpora, stories
from litmoe.data.documents import split_of
from litmoe.data.stories import Telling

REQUESTS = """
Write a story about {who} who {what}.
Write a short story about {who} who {what}.
Tell me a story about {who} who {what}.
Please write a story about {who} who {what}.
Please tell me a story about {who} who {what}.
Can you tell me a story about {who} who {what}?
Could you write a story about {who} who {what}?
I would like to hear a story about {who} who {what}.
Make up a story about {who} who {what}.
Write a story in which {who} {what}.
Please write a story in which {who} {what}.
Tell me what happens when {who} {what}.
"""

WHO = """
{a kind} named {hero}
{a kind} called {hero}
a little {kind} named {hero}
a young {kind} called {hero}
"""

# By plot, what the hero does; the slots are those of the plot's own paragraphs.
WHAT = {
    stories.LOST_AND_FOUND: """
loses {his} {thing}
cannot find {his} {thing}
has lost {a thing}
finds {his} lost {thing} {where}
looks for {his} {thing} together with {pal} the {pal_kind}
loses {his} {thing} and is helped by {his} friend {pal} the {pal_kind}
""",
    stories.A_GREAT_FEAR: """
is afraid of {fear}
is afraid of {fear} and learns to be brave
is brave, but not when it comes to {fear}
is afraid of {fear} and gets help from {pal} the {pal_kind}
learns from {his} friend {pal} the {pal_kind} not to be afraid of {fear}
""",
    stories.A_QUARREL: """
quarrels with a friend about {a thing}
finds {a thing} {where} and does not want to share it
learns to share {a thing}
quarrels with {pal} the {pal_kind} about {a thing}
finds {a thing} together with {his} friend {pal} the {pal_kind}
""",
    stories.THE_MISSING_INGREDIENT: """
wants to make {a dish} but has no {lacking}
makes {a dish} for {his} {guest}
has no {lacking} for {a dish}
wants to surprise {his} {guest} with {a dish}
makes {a dish} with the help of {his} friend {pal} the {pal_kind}
needs {lacking} for {a dish} and gets help from {pal} the {pal_kind}
""",
    stories.STUCK: """
gets stuck in {a trap}
is stuck in {a trap} and cannot get out
never looks where {he} is going and gets stuck in {a trap}
is saved from {a trap} with {a tool}
gets stuck in {a trap} and is saved by {his} friend {pal} the {pal_kind}
is pulled out of {a trap} by {pal} the {pal_kind}
""",
    stories.A_LOST_BABY: """
finds a baby {baby} that has lost its mother
helps a lost baby {baby}
brings a baby {baby} back to {mother}
looks for the mother of a baby {baby}
helps a baby {baby} together with {his} friend {pal} the {pal_kind}
finds a baby {baby} and asks {pal} the {pal_kind} for help
""",
    stories.LEARNING: """
wants to {skill}
learns to {skill}
cannot {skill} yet
tries to {skill} and does not give up
learns from {pal} the {pal_kind} how to {skill}
wants to {skill} and is helped by {his} friend {pal} the {pal_kind}
""",
    stories.TELLING_THE_TRUTH: """
breaks the {thing} of {owner}
breaks {a thing} and tells a lie
hides a broken {thing} {hid}
tells the truth about a broken {thing}
breaks {a thing} and talks about it with {his} friend {pal} the {pal_kind}
is told by {pal} the {pal_kind} to be honest about a broken {thing}
""",
    stories.A_SICK_FRIEND: """
brings {some} {gift} to a sick friend
helps a friend who has {illness}
brings {some} {gift} to {his} friend {pal} the {pal_kind}
visits {pal} the {pal_kind}, who has {illness}
helps {pal} the {pal_kind} to get well again
""",
    stories.THE_GARDEN: """
plants {a plant}
wants to grow {a plant}
tries to save {a plant} that does not grow
grows {a plant} together with {his} friend {pal} the {pal_kind}
saves {a plant} with the help of {pal} the {pal_kind}
""",
    stories.TOO_MUCH: """
eats too many {sweets}
loves {sweets} above all other food
finds a lot of {sweets} {place}
eats all the {sweets} alone and gets a tummy ache
does not share {his} {sweets} with {pal} the {pal_kind}
eats too many {sweets} and is helped by {his} friend {pal} the {pal_kind}
""",
    stories.THE_HUNGRY_BIRD: """
finds {a bird} in winter
saves {a bird}
takes care of {a bird} that {trouble}
saves {a bird} together with {his} friend {pal} the {pal_kind}
finds {a bird} and gets help from {pal} the {pal_kind}
""",
}

# Asked without saying what happens; in training alone, for they would ask for held-out stories too.
ANY_STORY = """
Write a story about {hero}.
Tell me a story about {hero}.
Tell me a story about {a kind}.
Please write a story about {a kind} named {hero}.
Write a story about {a kind} named {hero} and {pal} the {pal_kind}.
Can you tell me a story about {hero} and {his} friend {pal}?
"""

LIVES, ANY = 0.15, 0.1  # shares of the requests that tell where the hero lives, and of those for any story


class StoryInstruction(NamedTuple):
    """A request and its answer."""

    split: str
    request: str
    story: str
    names: list[str]
    """Those that the request asks for"""


def story_instructions(number: int, val_fraction: float, seed: int = 1) -> Iterator[StoryInstruction]:
    """Asks for stories that are not in the built-in corpus.

    What is held out is the hero in a situation: a pair (Pip, afraid of the dark) is asked for in one split alone.

    Args:
        number: of both splits together.
        val_fraction: share of the pairs that are held out, by hash.
        seed: not 0, which is the corpus's.
    """
    corpus = set(corpora.Stories("").documents())
    random = Random(seed + (1 << 32)).random  # another sequence than the stories' own
    for telling in stories.tell(seed):
        if number <= 0:
            return
        if telling.story in corpus:
            continue
        split = split_of(f"{telling.hero['hero']} {telling.scene.name}", val_fraction)
        request = _request(telling, random, may_be_any=split == "train")
        names = [telling.hero["hero"], telling.scene.slots["pal"]]
        yield StoryInstruction(split, request, telling.story, [name for name in names if f" {name}" in request])
        number -= 1


def _request(telling: Telling, random: Callable[[], float], may_be_any: bool) -> str:
    def one_of(lines: str) -> str:
        ways = lines.strip().splitlines()
        return ways[int(random() * len(ways))]

    if random() < ANY and may_be_any:
        return telling.fill(one_of(ANY_STORY))
    who, what = one_of(WHO), one_of(WHAT[telling.scene.plot])
    what = f"lives {{home}} and {what}" if random() < LIVES else what
    return telling.fill(one_of(REQUESTS).replace("{who}", who).replace("{what}", what))
