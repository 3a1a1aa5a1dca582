"""Short children's stories without end: the built-in corpus, made by a grammar and the same on every machine.

Each story has a hero, a friend, a beginning, a trouble, a turn and an end. A plot is written down as four paragraphs.
Between blank lines stand the ways to say one thing, a line each, of which a story takes one; ``rows`` are the things
that the plot can be about, of which a story takes one too, so that the kite which the wind took is found in the tree
and not under the bed, by a friend who can climb. What a story names it names again soon: so even a tiny model learns to
keep to what it began with.

    from litmoe.data.stories import generate_stories

    for story in itertools.islice(generate_stories(seed=1), 3):
        print(story, end="\\n\\n")
"""

# ruff: noqa: E501 - one row of a table, one way to say a thing, one line

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from hashlib import blake2b
from random import Random
from typing import NamedTuple

# The hero: name, kind, he or she, home. An animal's kind says who it is. A child may live in any house: if a house
# belonged to one of two boys, a small model would take the boy's name from the house instead of from the story.
HEROES = """
Mina  | girl     | she | in a house
Nora  | girl     | she | in a house
Tom   | boy      | he  | in a house
Ben   | boy      | he  | in a house
Pip   | mouse    | he  | in a hole under the kitchen stairs
Ruby  | rabbit   | she | in a warm burrow under the hill
Bruno | bear     | he  | in a cave behind the waterfall
Vera  | fox      | she | in a den among the ferns
Hazel | squirrel | she | in a hollow oak
Milo  | mole     | he  | in a tunnel beneath the vegetable garden
Kiki  | kitten   | she | in a basket by the fireplace
Rex   | puppy    | he  | in a wooden kennel beside the gate
"""

# What "in a house" stands for.
HOUSES = """
in a yellow house at the end of the lane
in a cottage beside the mill
on a farm at the foot of the hill
above the bakery in the village square
in a tall house near the sea
in a red brick house by the station
in a stone house next to the church
in a lighthouse on the cliff
"""

# The friend who knows what to do: name, kind, he or she. Each trouble has the friend that suits it, and nobody is a hero
# in one story and a friend in another.
FRIENDS = """
Otto   | owl      | he
Poppy  | pig      | she
Gus    | goat     | he
Tilly  | turtle   | she
Finn   | frog     | he
Bella  | badger   | she
Hugo   | hedgehog | he
Olive  | otter    | she
Barney | beaver   | he
Dora   | duck     | she
Dusty  | donkey   | he
Rosie  | raccoon  | she
"""

OPENINGS = """
Once upon a time there was a little {kind} named {hero}. {He} lived {home}.
Once upon a time there was {a kind} called {hero}, who lived {home}.
Once upon a time, {home}, there lived a little {kind} named {hero}.
Once upon a time a young {kind} named {hero} lived {home}.
Once upon a time a small {kind} named {hero} lived {home} with {his} mother.
There was once a cheerful {kind} named {hero}, who lived {home}.
Long ago a merry {kind} named {hero} lived {home}.
{Home} lived a kind young {kind} named {hero}.
"""


@dataclass(frozen=True)
class Plot:
    """One kind of story.

    ``rows`` is a table whose first line names the slots that the others fill, and the friend who comes into it. In the
    paragraphs ``{hero}`` and ``{pal}`` are the names of hero and friend, ``{kind}``, ``{he}``, ``{him}``, ``{his}``,
    ``{himself}`` and ``{home}`` go with the hero, ``{pal_kind}``, ``{pal_he}``, ... with the friend. ``{a thing}`` is
    the thing with "a" or "an" before it, ``{Thing}`` begins a sentence. A name always follows a space, so that it is one
    and the same token wherever it stands.
    """

    rows: str
    beginning: str
    trouble: str
    turn: str
    ending: str


LOST_AND_FOUND = Plot(
    rows="""
    thing          | friend | where                         | how
    red kite       | Rosie  | at the top of the pear tree   | The wind had carried it there.
    silver whistle | Hugo   | in the long grass by the gate | It had slipped through a hole in {his} pocket.
    wooden boat    | Dora   | under the little bridge       | The stream had carried it there.
    blue scarf     | Gus    | on a branch of the holly bush | The thorns had pulled it off.
    picture book   | Tilly  | on the bench in the park      | It had been left behind after lunch.
    brass bell     | Otto   | in the nest of a magpie       | Magpies love shiny things.
    rubber ball    | Finn   | at the bottom of the dry well | It had bounced much too high.
    rag doll       | Poppy  | among the clean washing       | It had been folded up with the sheets.
    """,
    beginning="""
    The best thing that {hero} owned was {a thing}.
    For {his} birthday {hero} had been given {a thing}.
    Everywhere {he} went, {hero} took {a thing} along.

    {He} played with the {thing} all morning and slept beside it at night.
    Nobody in the whole valley had such a fine {thing}.
    Even at breakfast {hero} would not put down the {thing}.
    """,
    trouble="""
    One day the {thing} was gone.
    But one morning {hero} woke up and could not find the {thing}.
    Then, on a windy afternoon, {hero} saw that the {thing} was missing.

    So {hero} looked under the bed and behind the door, but the {thing} was not there.
    {He} emptied every drawer and shook out every blanket. There was no {thing}.
    {He} searched the attic, the cellar and the yard. The {thing} was nowhere.

    "My {thing} is lost!" cried {hero}, and big tears ran down {his} cheeks.
    Poor {hero} sat on the doorstep and wept. "I want my {thing} back," {he} said.
    "Where can my {thing} be?" sobbed {hero}.
    """,
    turn="""
    Then {pal} the {pal_kind} heard {him} crying. "Two can look better than one," said {pal}.
    {His} friend {pal} the {pal_kind} came by. "Let us go back to every place where you played," said {pal}.
    "Do not cry," said {pal} the {pal_kind}. "I will help you look for the {thing}."

    Together {hero} and {pal} searched high and low. At last {pal} saw the {thing} {where}! {how}
    So {hero} and {pal} walked along the path, step by step. And there, {where}, was the {thing}! {how}
    They had almost given up when {hero} pointed. The {thing} was {where}! {how}
    """,
    ending="""
    First {hero} hugged the {thing}, and then {he} hugged {pal}.
    "You found my {thing}!" said {hero}. "Thank you, {pal}!"
    How {hero} danced for joy with the {thing}! "Thank you, {pal}," {he} said.

    After that, {hero} put the {thing} on a shelf every evening, and it was never lost again.
    From then on {hero} took good care of the {thing}, and {pal} was allowed to play with it too.
    That night {hero} tied a ribbon around the {thing} so that {he} would never lose it again.
    """,
)

A_GREAT_FEAR = Plot(
    rows="""
    fear           | friend | scene                                                   | trick                   | after
    the dark       | Otto   | The lamp went out, and the whole room turned black      | sing a song             | the dark was soft and quiet
    thunder        | Finn   | A storm came, and the sky went crash and boom           | count to ten            | thunder was only noise
    the tall slide | Poppy  | Everybody went down the slide, but {he} stood and shook | hold a friend's hand    | the tall slide was fun
    the big dog    | Dusty  | The big dog ran out of the yard and barked at {him}     | stand still and whisper | the big dog only wanted to play
    bees           | Bella  | A bee sat down on {his} sleeve and buzzed               | breathe slowly          | bees only looked for flowers
    the cellar     | Hugo   | Mother needed onions, and they were down in the cellar  | carry a candle          | the cellar was just a room full of jars
    the old bridge | Gus    | The only way to the fair went over the old bridge       | look straight ahead     | the old bridge was strong and safe
    the dentist    | Barney | {His} tooth hurt, and {he} had to see the dentist       | think of something nice | the dentist was kind and quick
    """,
    beginning="""
    Spiders and ghosts did not worry {hero}. But {he} was afraid of {fear}.
    There was only one thing that frightened {hero}, and that was {fear}.
    Most of the time {hero} was brave, but {fear} made {him} tremble.

    {He} never told anybody about it.
    "I wish I were not so afraid of {fear}," {he} often thought.
    When {he} thought of {fear}, {he} hid under {his} quilt.
    """,
    trouble="""
    One evening it happened. {scene}.
    Then came a terrible day. {scene}.
    One Sunday {hero} could not hide any longer. {scene}.

    {His} knees knocked together, and {he} could not move.
    "Help!" whispered {hero}. {His} heart was beating like a drum.
    Poor {hero} shut {his} eyes tight and began to cry.
    """,
    turn="""
    {His} friend {pal} the {pal_kind} was there. "I was once afraid of {fear} as well," said {pal}. "You must {trick}."
    Then {pal} the {pal_kind} came close. "I know what helps against {fear}," said {pal}. "Just {trick}."
    "Are you afraid of {fear}?" asked {pal} the {pal_kind}. "My grandmother told me to {trick}."

    So {hero} swallowed hard and did as {pal} had said. Slowly the fear grew smaller and smaller.
    So {hero} tried to {trick}. At first it was hard, but soon {he} felt calm.
    And {hero} tried it, while {pal} stayed close to {him}. After a while {he} opened {his} eyes and smiled.
    """,
    ending="""
    Now {hero} knew that {after}.
    "Look, {pal}!" called {hero}. {He} had found out that {after}.
    It turned out that {after}.

    Never again was {hero} afraid of {fear}.
    "I did it!" shouted {hero}. From that day {fear} did not frighten {him} anymore.
    Since then, whenever somebody is afraid of {fear}, {hero} tells them to {trick}.
    """,
)

A_QUARREL = Plot(
    rows="""
    thing         | friend | where         | broke                               | mend                       | share
    swing         | Poppy  | in the park   | the rope snapped                    | tied a strong knot         | one pushed while the other one flew
    sled          | Olive  | on the hill   | the front board cracked             | nailed on a new board      | they rode down one behind the other
    wagon         | Dusty  | in the barn   | a wheel came off                    | hammered the wheel back on | one pulled while the other one rode
    paintbox      | Dora   | at school     | all the colors spilled on the floor | wiped up every drop        | they painted one big picture together
    jump rope     | Finn   | in the street | the handle flew off                 | glued the handle on again  | they jumped in turns and counted aloud
    tent          | Hugo   | on the lawn   | the cloth tore down the middle      | sewed up the tear          | there was room for both of them inside
    rocking horse | Bella  | in the attic  | one ear fell off                    | carved a new ear           | first one rode and then the other
    drum          | Rosie  | in a box      | a stick broke in two                | cut a new stick            | one drummed while the other one danced
    """,
    beginning="""
    In the holidays {hero} and {pal} the {pal_kind} found {a thing} {where}.
    Last summer {hero} and {pal} the {pal_kind} discovered {a thing} {where}.
    Nearly every day {hero} played with {pal} the {pal_kind}. Together they came upon {a thing} {where}.

    It was the most beautiful {thing} that they had ever seen.
    Both {hero} and {pal} wanted to use the {thing} first.
    What a splendid {thing} it was!
    """,
    trouble="""
    "The {thing} is mine!" shouted {hero}. "No, I saw it first!" shouted {pal}.
    "I want the {thing}!" said {hero}. "You always get everything!" answered {pal}.
    "Give the {thing} to me!" said {pal}. "Never!" said {hero}.

    They pulled and pushed until {broke}.
    On one side {hero} tugged, and on the other side {pal}. Then, oh no, {broke}!
    Neither of them let go, and suddenly {broke}.

    Now nobody could use the {thing}. Silently {hero} and {pal} stared at it.
    Then {hero} turned pale, and {pal} began to cry. The {thing} was spoiled.
    "Look what we have done to the {thing}," whispered {pal}.
    """,
    turn="""
    "I am sorry, {pal}," said {hero} at last. "I am sorry too," said {pal}.
    After a long while {hero} said, "A {thing} is not worth a quarrel." And {pal} nodded.
    "You matter more to me than any {thing}," said {hero}, and {pal} dried {pal_his} tears.

    So {hero} and {pal} worked side by side and {mend}.
    Then {hero} and {pal} fetched some tools and {mend}.
    Together {hero} and {pal} {mend}. It took all afternoon.
    """,
    ending="""
    Soon the {thing} was as good as new, and {share}.
    When the {thing} was whole again, {share}.
    After that they shared the {thing}: {share}.

    How {hero} and {pal} laughed! They never fought over the {thing} again.
    "It is much nicer with two," said {hero}, and {pal} agreed.
    And {hero} and {pal} stayed friends for the rest of their lives.
    """,
)

THE_MISSING_INGREDIENT = Plot(
    rows="""
    dish            | friend | lacking | without                              | guest
    apple pie       | Poppy  | butter  | The crust fell into crumbs           | grandmother
    chocolate cake  | Rosie  | cocoa   | It was as pale as the moon           | father
    potato pie      | Dora   | salt    | It tasted like wet paper             | uncle
    cream cake      | Dusty  | milk    | The flour flew up in a cloud         | sister
    honey bread     | Barney | yeast   | The dough would not rise             | teacher
    berry tart      | Hugo   | sugar   | It was so sour that {he} made a face | cousin
    round pizza     | Gus    | cheese  | It looked bare and sad               | aunt
    gingerbread man | Tilly  | ginger  | It smelled of nothing at all         | grandfather
    """,
    beginning="""
    It was a special day, because {his} {guest} was coming to visit. "I will make {a dish}," said {hero}.
    Secretly {hero} planned to surprise {his} {guest} with {a dish}.
    {His} {guest} had a birthday, and {hero} decided to make {a dish}.

    {He} put on an apron and took out the biggest bowl.
    {He} washed {his} hands and lit the oven.
    Happily {hero} hummed a tune and began to stir.
    """,
    trouble="""
    But when {hero} opened the cupboard, there was no {lacking}.
    Then {hero} stopped. {He} needed {lacking}, and the {lacking} was all gone!
    But {hero} had forgotten to buy {lacking}.

    {He} tried to make the {dish} without {lacking}. {without}.
    "Perhaps it works without {lacking}," {he} thought. {without}.

    "Now my {guest} will have nothing to eat!" said {hero}, and {he} threw down the spoon.
    The shop was closed, and {his} {guest} would arrive at noon. Poor {hero} was very unhappy.
    There was hardly any time left before {his} {guest} came, and {hero} almost cried.
    """,
    turn="""
    Just then {pal} the {pal_kind} knocked at the window. "Do you need {lacking}?" asked {pal}. "I have plenty."
    {He} ran to {pal} the {pal_kind}. "Could you lend me some {lacking}?" asked {hero}. "Gladly," said {pal}.
    {His} neighbor {pal} the {pal_kind} came in. "I can give you {lacking}," said {pal}, "if I may help you."

    So {pal} brought the {lacking}, and {hero} mixed and tasted. Soon a wonderful smell filled the house.
    They added the {lacking}, stirred nine times, and waited. This time the {dish} turned out well.
    With the {lacking} it was easy. Quickly {pal} stirred while {hero} set the table.
    """,
    ending="""
    {His} {guest} took one bite of the {dish} and smiled. "This is delicious!"
    "I have never eaten such a good {dish}," said {his} {guest}.
    When {his} {guest} came, the {dish} stood warm on the table, and everybody clapped.

    Then {hero} cut the {dish} into pieces and gave the biggest piece to {pal}.
    "I could not have done it without {pal}," said {hero} proudly.
    They all ate together, and {hero} sent {pal} home with a full plate.
    """,
)

STUCK = Plot(
    rows="""
    trap            | friend | how                              | tool             | useit
    muddy ditch     | Dusty  | The bank was slippery            | long rope        | threw one end of the rope down and pulled
    blackberry bush | Gus    | The thorns held on like hooks    | pair of shears   | cut the thorns one by one
    hollow log      | Rosie  | It was narrower than it looked   | bar of soap      | rubbed soap on the wood until it was slippery
    garden fence    | Barney | The gap was far too small        | saw              | sawed one board away
    haystack        | Poppy  | The hay came tumbling down       | pitchfork        | lifted the hay away, bit by bit
    drain pipe      | Olive  | It became smaller and smaller    | bucket of grease | poured the grease into the pipe
    empty barrel    | Bella  | The lid fell shut                | crowbar          | lifted the lid with a crack
    fishing net     | Dora   | It was lying hidden in the grass | sharp knife      | cut the net open, knot by knot
    """,
    beginning="""
    {He} liked to explore, but {hero} never looked where {he} was going.
    Every Saturday {hero} went out to look for adventures.
    "Watch your step," {his} mother always told {him}, but {hero} seldom listened.

    On the way to market {hero} was chasing a yellow butterfly.
    One fine morning {hero} skipped along with {his} nose in the air.
    One day {hero} followed a trail of strange footprints.
    """,
    trouble="""
    All at once {hero} was stuck in {a trap}. {how}.
    Bump! Now {hero} was stuck in {a trap}. {how}.
    Then {he} came to {a trap}. {how}, and suddenly {hero} was stuck.

    {He} wriggled and kicked, but {he} could not get out of the {trap}.
    {He} pushed with all {his} strength, but the {trap} held {him} tight.
    The more {he} struggled, the worse it became.

    "Help! I am stuck in {a trap}!" called {hero}.
    "Is anybody there?" shouted {hero}. Only the echo answered.
    The sun was already sinking, and {hero} grew hungry and cold.
    """,
    turn="""
    Then {pal} the {pal_kind} heard the noise and came running. "Hold still," said {pal}. "I will get {a tool}."
    Luckily {pal} the {pal_kind} was passing by. "Wait here," said {pal}. "What we need is {a tool}."
    Far away {pal} the {pal_kind} heard it. Quickly {pal} grabbed {a tool} and hurried over.

    So {pal} {useit}. With a loud pop, {hero} was free!
    Quickly {pal} {useit}. Out of the {trap} came {hero}, dirty but safe.
    Then {pal} {useit}, and little by little {hero} got out of the {trap}.
    """,
    ending="""
    "Thank you, {pal}," panted {hero}. "You and your {tool} saved me."
    And {hero} brushed off the dirt and thanked {pal} again and again.
    "How can I ever repay you, {pal}?" asked {hero}. "Just look where you walk," said {pal} with a grin.

    From that day on, {hero} always looked where {he} was going.
    And {hero} walked home slowly, looking at every stone on the way.
    Then {hero} promised to be more careful, and {he} kept {his} word.
    """,
)

A_LOST_BABY = Plot(
    rows="""
    baby     | friend | cry       | mother           | place                  | food
    duckling | Finn   | peeped    | the mother duck  | at the mill pond       | bread crumbs
    calf     | Dusty  | mooed     | the brown cow    | in the lower field     | fresh hay
    chick    | Poppy  | cheeped   | the speckled hen | in the farmyard        | a few seeds
    gosling  | Dora   | honked    | the gray goose   | on the village green   | soft grass
    foal     | Olive  | neighed   | the white horse  | by the river           | a sweet carrot
    owlet    | Otto   | hooted    | the great owl    | in the church tower    | a piece of cheese
    fawn     | Hugo   | bleated   | the gentle deer  | in the birch wood      | green leaves
    cub      | Rosie  | whimpered | the old lioness  | behind the circus tent | a bowl of milk
    """,
    beginning="""
    One spring day {hero} went out to pick flowers.
    With a letter in {his} bag {hero} was on the way to the post office.
    Early one morning {hero} heard a tiny sound in the bushes.

    Under a hedge sat a baby {baby}, all alone.
    There, in the middle of the road, stood a baby {baby}.
    Then {he} noticed a baby {baby} behind a stone. It was shivering.
    """,
    trouble="""
    The {baby} {cry} and {cry}. It had lost its mother.
    "Where is your mother?" asked {hero}. The poor {baby} only {cry}.
    "Why are you so sad, little {baby}?" asked {hero}. The {baby} {cry} and looked around for its mother.

    They asked the postman and the miller, but nobody had seen the mother of the {baby}.
    So {hero} and the {baby} walked up the street and down the street. The mother was nowhere.
    Dark clouds were gathering, and the {baby} was getting weak with hunger.
    """,
    turn="""
    Then they met {pal} the {pal_kind}, who gave the {baby} {food}. "I think I saw {mother} {place}," said {pal}.
    They ran to {pal} the {pal_kind}. "First it needs {food}," said {pal}. "Then we will go and look {place}."
    Then {pal} the {pal_kind} brought {food} for the {baby}. "Somebody was calling {place}," said {pal}.

    Carefully {hero} carried the {baby}, and {pal} went ahead. And {place} stood {mother}!
    So {hero}, {pal} and the {baby} set off. They found {mother} {place}, calling and calling.
    They hurried, and soon {hero} and {pal} saw {mother} waiting {place}.
    """,
    ending="""
    The {baby} {cry} for joy and ran to its mother.
    {Mother} kissed the {baby} from head to tail.
    How happy {mother} was to have the {baby} back!

    "Thank you, {hero} and {pal}," said {mother}. "You have good hearts."
    And {hero} and {pal} waved until the {baby} was out of sight.
    Every Friday after that, {hero} and {pal} came to visit the {baby}.
    """,
)

LEARNING = Plot(
    rows="""
    skill            | friend | fail                              | tip                               | done
    ride a bicycle   | Poppy  | {He} wobbled and fell into a bush | look ahead and keep pedaling      | rode all the way to the church without falling
    whistle          | Otto   | Only air came out                 | wet your lips and blow softly     | whistled so well that the birds joined in
    skate            | Olive  | {He} slipped and sat down hard    | bend your knees and lean forward  | glided over the ice like a swan
    juggle           | Rosie  | The apples dropped on {his} toes  | start with two and throw them low | kept three apples in the air at once
    tie a bow        | Tilly  | The laces turned into a knot      | make two loops and cross them     | tied the neatest bow in the class
    play the flute   | Hugo   | It squeaked like a rusty hinge    | hold it gently and take your time | played a waltz, and everybody danced
    do a handstand   | Finn   | {He} tipped over like a tree      | stretch your legs and look down   | stood upside down for a whole minute
    write {his} name | Bella  | The letters fell off the line     | go slowly, one letter at a time   | wrote it in the sand in huge letters
    """,
    beginning="""
    More than anything else {hero} wanted to {skill}.
    All the others could {skill}, but {hero} could not.
    Night after night {hero} dreamed that {he} could {skill}.

    "It looks so easy," {he} said to {himself}.
    So one Monday {hero} decided to learn it.
    "Today I will learn it," {hero} announced at breakfast.
    """,
    trouble="""
    But it went wrong. {fail}.
    So {hero} tried to {skill}. {fail}.
    It was harder than {hero} had thought. {fail}.

    {He} tried a second time and a third time, and it only got worse.
    The crows on the roof laughed at {him}.
    {He} tried until evening, and still it did not work.

    "I will never learn it," said {hero}, and {he} hung {his} head.
    "I give up!" cried {hero}. "I am too stupid to learn it."
    Angry and tired, {hero} kicked a stone and wanted to go home.
    """,
    turn="""
    But {pal} the {pal_kind} had been watching. "I failed a hundred times before I could do it," said {pal}.
    Then {pal} the {pal_kind} sat down next to {him}. "Nobody can do it on the first day," said {pal}.
    "Let me show you," said {pal} the {pal_kind}, who could {skill} very well.

    "You have to {tip}." So {hero} practiced every day, and {pal} cheered {him} on.
    "The secret is to {tip}," added {pal}. And {hero} listened and tried once more.
    And {pal} told {him} to {tip}. That helped a lot, and {hero} did not give up.
    """,
    ending="""
    A week later {hero} {done}.
    And one sunny day {hero} {done}!
    At last it worked. Yes, {hero} {done}.

    How proud {pal} was of {hero}! Now {he} could {skill}.
    "You see?" said {pal}. And {hero} laughed, for now {he} could {skill} as well as anyone.
    Now {hero} teaches the little ones to {skill}, and {he} is as patient as {pal} was.
    """,
)

TELLING_THE_TRUTH = Plot(
    rows="""
    thing          | friend | owner             | doing                       | hid                       | fix
    blue vase      | Tilly  | {his} mother      | playing ball indoors        | under the carpet          | glued the blue vase together
    shop window    | Bella  | the baker         | throwing stones             | behind a wall             | swept up the glass of the shop window
    gold watch     | Otto   | {his} father      | playing pirates             | in a flowerpot            | took the gold watch to be repaired
    green umbrella | Dora   | {his} grandmother | pretending to fly           | at the back of the closet | sewed a patch on the green umbrella
    teacup         | Hugo   | {his} aunt        | washing up too fast         | in the dustbin            | painted flowers on a new teacup
    violin         | Gus    | the teacher       | dancing on the table        | below the stage           | put a new string on the violin
    stone gnome    | Poppy  | the mayor         | running through the flowers | in the compost            | stuck the head back on the stone gnome
    honey jar      | Barney | {his} uncle       | climbing up the shelves     | behind the flour sack     | picked berries to fill a new honey jar
    """,
    beginning="""
    On a rainy day {hero} had nothing to do and began {doing}.
    Although it was forbidden, {hero} was {doing}.
    Bored and alone, {hero} was {doing}.

    "Be careful!" somebody called, but {hero} did not listen.
    Crash! There was a dreadful noise.
    It was great fun, until there was a crash.
    """,
    trouble="""
    The {thing} that belonged to {owner} was broken.
    Now {hero} had broken the {thing} of {owner}.
    In front of {him} lay the {thing} of {owner}, and it was broken.

    {He} was so frightened that {he} hid the {thing} {hid}.
    Quickly {hero} put the broken {thing} {hid} and ran away.
    "If I hide the {thing} {hid}, no one will know," {he} thought.

    "Who broke my {thing}?" asked {owner}. "It was the cat," said {hero}, and {he} turned red.
    When {owner} asked about the {thing}, {hero} looked at the floor. "I do not know," {he} lied.
    All night {hero} lay awake and could not stop thinking about the {thing}.
    """,
    turn="""
    Then {pal} the {pal_kind} found {him} sitting alone. "A lie is a heavy thing to carry," said {pal}.
    In the morning {he} told {pal} the {pal_kind} everything. "Go and tell the truth," said {pal}. "I will come with you."
    But {pal} the {pal_kind} saw that something was wrong. "You will feel better when you have said it," said {pal}.

    So {hero} went to {owner}. "I broke your {thing}, and then I told a lie," {he} said. "I am sorry."
    With a trembling voice {hero} said to {owner}, "It was me. I broke the {thing}."
    So {hero} carried the broken {thing} to {owner}. "Please forgive me," {he} said.
    """,
    ending="""
    "Thank you for telling me the truth," said {owner}. "I am not angry."
    For a moment it was very quiet. Then {owner} smiled and forgave {him}.
    "A {thing} can be mended," said {owner}, "but the truth is worth more than gold."

    Then {hero} {fix}, and {he} felt as light as a feather.
    Then {hero} {fix}. {He} never told a lie again.
    The next day {hero} {fix}, and {pal} helped {him}.
    """,
)

A_SICK_FRIEND = Plot(
    rows="""
    illness        | friend | gift           | some | hunt                                             | works
    a sore throat  | Finn   | lemon tea      | some | {He} had to climb the hill where the lemons grew | The tea ran down the throat like sunshine
    a fever        | Poppy  | chicken soup   | some | {He} had to carry the hot pot through the rain   | After three spoons the fever went down
    a tummy ache   | Gus    | wild mint      | some | {He} had to wade through the cold brook          | The mint chased the pain away
    a bad cold     | Tilly  | warm blanket   | a    | {He} had to knit until midnight                  | Under the blanket the sneezing stopped
    spots all over | Rosie  | sock puppet    | a    | {He} had to sew it from an old sock              | The puppet was so funny that the spots faded
    a cough        | Otto   | clover honey   | some | {He} had to beg the bees politely                | The honey made the cough go away
    a broken leg   | Dusty  | bunch of roses | a    | {He} had to pick them between the thorns         | The roses made the pain seem small
    a headache     | Barney | music box      | a    | {He} had to wind it up for an hour               | The soft music carried the headache off
    """,
    beginning="""
    {His} best friend was {pal} the {pal_kind}. Every day {hero} and {pal} met under the willow.
    Together with {pal} the {pal_kind}, {hero} played hide and seek every morning.
    Wherever {hero} went, {pal} the {pal_kind} went too.

    They wanted to go to the fair on Saturday.
    They had planned a picnic by the lake.
    "Tomorrow we will build a castle," they had said.
    """,
    trouble="""
    But {pal} did not come. Poor {pal} was in bed with {illness}.
    Then {hero} heard that {pal} had {illness}.
    One morning {hero} waited and waited. But {pal} was ill and had {illness}.

    "I feel awful," groaned {pal}. And {hero} was worried.
    Poor {pal} could not eat and could not sleep, and {hero} did not know what to do.
    "It is so boring to be ill," sighed {pal}, and a tear rolled onto the pillow.
    """,
    turn="""
    "I know what you need, {pal}," said {hero}. "I will bring you {some} {gift}."
    Then {hero} had an idea. {He} would bring {pal} {some} {gift}.
    "When I was ill, {pal}," said {hero}, "my mother gave me {some} {gift}. I will get you the same."

    It was not easy. {hunt}.
    {hunt}, but {hero} did not mind.
    {hunt}. But {he} thought of {pal} and did not stop.

    At last {hero} came back with the {gift}. {works}.
    So {hero} gave the {gift} to {pal} and sat down beside {pal_him}. {works}.
    "This is for you," said {hero}, and {he} held out the {gift}. {works}.
    """,
    ending="""
    After two days {pal} jumped out of bed.
    Before the week was over, {pal} was well again.
    "I feel much better," said {pal} with rosy cheeks.

    "The best medicine is a friend like {hero}," said {pal}.
    Then {hero} and {pal} ran outside together, and the sun was shining.
    And {pal} never forgot what {hero} had done, and they stayed friends forever.
    """,
)

THE_GARDEN = Plot(
    rows="""
    plant            | friend | enemy                      | cure                                   | harvest
    pumpkin          | Hugo   | The snails ate its leaves  | put a ring of sand around it           | It grew as big as a coach
    sunflower        | Gus    | It got no light at all     | cut back the hedge                     | It grew higher than the roof
    bean plant       | Barney | It had nothing to climb on | gave it a tall pole                    | It was covered with long green beans
    rosebush         | Tilly  | Tiny green lice sat on it  | asked the ladybugs for help            | It had one hundred pink roses
    cherry tree      | Otto   | The frost bit its buds     | wrapped it in an old coat              | Its cherries were as sweet as candy
    strawberry plant | Poppy  | The weeds choked it        | pulled out all the weeds               | It was full of bright red berries
    cabbage          | Dora   | A caterpillar moved in     | carried the caterpillar to the nettles | It was so heavy that two had to carry it
    melon            | Olive  | The ground was too dry     | watered it morning and evening         | It was round and juicy
    """,
    beginning="""
    In spring {hero} put a seed into the earth. {He} wanted to grow {a plant}.
    Behind the house {hero} planted {a plant}.
    A traveler gave {hero} a seed. "It will become {a plant}," said the traveler.

    Every day {hero} sat beside it and told it stories.
    {He} could hardly wait for the summer.
    "Grow, little {plant}, grow," sang {hero}.
    """,
    trouble="""
    But the {plant} did not grow. {enemy}.
    After a month the {plant} looked sad. {enemy}.
    Then something bad happened to the {plant}. {enemy}.

    "My {plant} is dying!" said {hero}.
    {He} did not know what to do for the {plant}, and {hero} was close to tears.
    The neighbors shook their heads. "That {plant} is finished, {hero}," they said.
    """,
    turn="""
    But {pal} the {pal_kind} did not give up. "We can still save the {plant}," said {pal}.
    Then {hero} asked {pal} the {pal_kind}. "I know what the {plant} needs," said {pal}.
    "A {plant} needs patience and a friend," said {pal} the {pal_kind} from the next garden.

    So {hero} and {pal} {cure}, and they waited.
    That very evening {hero} and {pal} {cure}.
    Together {hero} and {pal} {cure}. Then it rained for a night, and the sun came out.

    Little by little the {plant} grew strong.
    The next morning the {plant} had a fresh new leaf.
    From then on the {plant} grew a little every day.
    """,
    ending="""
    By the end of summer it was ready. {harvest}!
    {harvest}, and people came from far away to see the {plant}.
    And what a {plant} it was! {harvest}.

    So happy were {hero} and {pal} that they danced around it until dark.
    "Half of it is yours," said {hero} to {pal}. They saved one seed for the next year.
    And {hero} and {pal} gave some to every house in the village.
    """,
)

TOO_MUCH = Plot(
    rows="""
    sweets      | friend | place                   | sign                                 | share
    cherries    | Hugo   | in the orchard          | {His} face was red with juice        | made a cherry cake for everyone
    pancakes    | Poppy  | on the kitchen table    | {His} belly was as round as a barrel | baked a fresh pile of pancakes for the family
    blueberries | Bella  | behind the railway      | {His} tongue was completely blue     | filled a bucket of blueberries for the neighbors
    candies     | Tilly  | in the jar on the stove | {His} teeth stuck together           | gave away the rest of the candies
    peaches     | Dusty  | at the market           | {His} chin was dripping              | brought a crate of peaches to the school
    cookies     | Rosie  | in the round tin        | There were crumbs in {his} ears      | hid a few cookies under every pillow
    nuts        | Otto   | in the hollow tree      | The shells lay all around {him}      | cracked the last nuts for the birds
    dumplings   | Finn   | in the great pot        | There was sauce on {his} nose        | cooked dumplings for the whole street
    """,
    beginning="""
    Above all other food {hero} loved {sweets}.
    Nobody could eat as many {sweets} as {hero}.
    Morning, noon and night {hero} thought only of {sweets}.

    One day {he} found a great many {sweets} {place}.
    One warm day there were lots of {sweets} {place}.
    And one day {he} discovered the finest {sweets} {place}.

    "May I have some?" asked {pal} the {pal_kind}. "No, they are all mine," said {hero}.
    {His} friend {pal} the {pal_kind} was hungry too, but {hero} did not share.
    "Leave some {sweets} for me," begged {pal} the {pal_kind}. But {hero} shook {his} head.
    """,
    trouble="""
    So {hero} ate and ate until the {sweets} were nearly gone. {sign}.
    Then {hero} swallowed ten, twenty, thirty {sweets}. {sign}.
    Greedily {hero} ate all the {sweets} alone. {sign}.

    Then {his} stomach began to ache terribly.
    Suddenly {he} felt dizzy, and {his} belly hurt.
    But oh, what a pain {he} had in {his} belly!

    "Ouch, ouch!" moaned {hero}, rolling on the ground.
    "I never want to see {sweets} again," groaned {hero}.
    Poor {hero} lay down and could not get up.
    """,
    turn="""
    Then {pal} came back and saw {him}. But {pal} was not angry and brought a hot water bottle.
    Although {hero} had been so mean, {pal} made a cup of peppermint tea for {him}.
    "Poor {hero}," said {pal}, and {pal_he} stayed until evening.

    "Why are you so good to me?" asked {hero}. "Because we are friends," said {pal}.
    Now {hero} was ashamed. "I should have shared the {sweets} with you," {he} said.
    "I was greedy," said {hero}. "I am sorry, {pal}."
    """,
    ending="""
    The next day {hero} was well again, and {he} {share}.
    As soon as {he} could stand, {hero} {share}.
    When the pain was gone, {hero} {share}.

    The first and the best of the {sweets} went to {pal}.
    This time {hero} and {pal} ate only a few each, and the {sweets} tasted better than ever.
    "Shared {sweets} taste twice as good," said {hero}, and {pal} winked.
    """,
)

THE_HUNGRY_BIRD = Plot(
    rows="""
    bird      | friend | trouble                     | care                          | song
    robin     | Tilly  | had a broken wing           | tied the wing to a matchstick | sang under {his} window every dawn
    sparrow   | Dora   | was half frozen             | warmed it in a woolen sock    | brought all its cousins to say thank you
    blackbird | Poppy  | had not eaten for days      | gave it raisins and oats      | whistled the first song of spring
    starling  | Bella  | had flown against a window  | laid it in a box with hay     | learned to say good morning
    wren      | Barney | had lost its nest           | hung up a tiny house for it   | raised five chicks in the tiny house
    goldfinch | Hugo   | had escaped from a cage     | hid it from the bird catcher  | left a golden feather on the windowsill
    thrush    | Rosie  | was caught in a net         | cut the net with scissors     | taught {him} a tune with three notes
    swallow   | Otto   | had missed the flight south | let it sleep beside the stove | came back in May and circled over the house
    """,
    beginning="""
    It was a bitter winter, and {hero} sat at the window and looked at the frost.
    One gray November day {hero} was scraping the ice from the doorstep.
    Snow was falling, and {hero} was glad to have a warm room.

    Then {he} found a {bird} on the ground.
    Something fluttered. It was a {bird}.
    There was a faint knock at the door, and outside sat a {bird}.
    """,
    trouble="""
    The poor {bird} {trouble}.
    Then {hero} saw that the {bird} {trouble}.
    "Oh, you poor {bird}!" said {hero}. It {trouble}.

    Its eyes were closed, and {hero} could hardly feel its heart.
    "The {bird} will not live until morning," said the cat with a smirk.
    {He} did not know much about birds, and {hero} was afraid to hurt the {bird}.
    """,
    turn="""
    Quickly {hero} carried the {bird} to {pal} the {pal_kind}. Together they {care}.
    "I will help you," said {pal} the {pal_kind}. Then {pal} {care}.
    Then {pal} the {pal_kind} came to help. Carefully {pal} {care}.

    For three weeks {hero} and {pal} took turns to feed the {bird}.
    Every night {hero} sat beside the {bird}, and {pal} brought fresh water.
    Day after day {hero} and {pal} looked after the {bird}, and slowly it grew stronger.
    """,
    ending="""
    When the snow melted, they opened the window, and the {bird} flew away.
    In March the {bird} was well, and it rose into the blue sky.
    At last the {bird} could fly again. It circled over them once and was gone.

    But it did not forget {hero}. The {bird} {song}.
    For a while {hero} and {pal} were sad. But then the {bird} {song}.
    "Goodbye, {bird}!" called {hero} and {pal}. Later the {bird} {song}.
    """,
)

PLOTS = (
    LOST_AND_FOUND,
    A_GREAT_FEAR,
    A_QUARREL,
    THE_MISSING_INGREDIENT,
    STUCK,
    A_LOST_BABY,
    LEARNING,
    TELLING_THE_TRUTH,
    A_SICK_FRIEND,
    THE_GARDEN,
    TOO_MUCH,
    THE_HUNGRY_BIRD,
)


class Scene(NamedTuple):
    """A row of a plot, all but the hero filled in."""

    name: str
    """Which of all: the plot's number and the row's"""
    plot: Plot
    slots: dict[str, str]
    """Of the row and of the friend"""
    beats: list[list[str]]
    """One after the other, each as the ways to say it"""


class Telling(NamedTuple):
    """A story, and what it was made of."""

    story: str
    scene: Scene
    hero: dict[str, str]
    """The hero's slots: ``hero``, ``kind``, ``home``, ..."""

    def fill(self, text: str) -> str:
        """Fills in the slots of a text as a plot's paragraphs have them."""
        return text.format_map(_Row(self.scene.slots)).format_map(self.hero)


def generate_stories(seed: int = 0) -> Iterator[str]:
    """Tells stories for ever, no two alike: 60 to 200 words each, four paragraphs divided by a newline, plain ASCII.

    The same seed gives the same stories on every platform and Python version: of ``random.Random`` only ``random()``
    is used, whose sequence Python promises to keep.
    """
    return (telling.story for telling in tell(seed))


def tell(seed: int = 0) -> Iterator[Telling]:
    """The same, with what each story was made of."""
    heroes, plots = _compile()
    random = Random(seed).random
    told: set[bytes] = set()
    while True:
        homes = heroes[int(random() * len(heroes))]
        hero = homes[int(random() * len(homes))]
        scenes = plots[int(random() * len(plots))]
        scene = scenes[int(random() * len(scenes))]
        template = "".join([ways[int(random() * len(ways))] for ways in scene.beats])
        story = template.format_map(hero)
        digest = blake2b(story.encode(), digest_size=12).digest()
        if digest not in told:
            told.add(digest)
            yield Telling(story, scene, hero)


def stories_until(total_bytes: int, seed: int = 0) -> Iterator[str]:
    """The first stories of ``generate_stories(seed)``, until together they hold ``total_bytes`` bytes or a little more.

    Stories for training and for validation come from one call, cut in two: then no two of them are alike.
    """
    for story in generate_stories(seed):
        if total_bytes <= 0:
            return
        yield story
        total_bytes -= len(story)


# What follows turns the tables above into lists that are quick to choose from.


@cache
def _compile() -> tuple[list[list[dict[str, str]]], list[list[Scene]]]:
    """The slots of each hero in each home, and the scenes of each plot."""
    houses = HOUSES.strip().splitlines()
    heroes = [
        [
            {"hero": name} | _slots({"kind": kind, **_pronouns(he), "home": place})
            for place in (houses if home == "in a house" else [home])
        ]
        for name, kind, he, home in _cells(HEROES)
    ]
    friends = {
        name: {"pal": name, "pal_kind": kind, **{f"pal_{slot}": word for slot, word in _pronouns(he).items()}}
        for name, kind, he in _cells(FRIENDS)
    }
    plots = []
    for number, plot in enumerate(PLOTS):
        columns, *cells = _cells(plot.rows)
        rows = [dict(zip(columns, row, strict=True)) for row in cells]
        slots = [friends[row["friend"]] | _slots(row) for row in rows]
        plots.append([Scene(f"{number}.{i}", plot, row, _beats(plot, row)) for i, row in enumerate(slots)])
    return heroes, plots


def _beats(plot: Plot, row: dict[str, str]) -> list[list[str]]:
    """Every beat of the plot in turn, as the ways to say it; what follows each one, space or newline, is part of it."""
    filled = _Row(row)
    beats = []
    for paragraph in [field.name for field in fields(plot) if field.name != "rows"]:
        text = OPENINGS + "\n" + getattr(plot, paragraph) if paragraph == "beginning" else getattr(plot, paragraph)
        groups = [[way.strip() for way in group.strip().splitlines()] for group in text.split("\n\n") if group.strip()]
        last = "" if paragraph == "ending" else "\n"
        for place, ways in enumerate(groups, start=1):
            after = last if place == len(groups) else " "
            beats.append([way.format_map(filled) + after for way in ways])
    return beats


class _Row(dict[str, str]):
    """Fills in what a row knows and leaves the hero's slots for later."""

    def __missing__(self, slot: str) -> str:
        return "{" + slot + "}"


def _cells(table: str) -> Iterable[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def _slots(row: dict[str, str]) -> dict[str, str]:
    """Adds to every slot its form with an article and both with a capital: thing, Thing, a thing, A thing."""
    slots: dict[str, str] = {}
    for slot, text in row.items():
        article = "an" if text[0] in "aeiou" else "a"
        slots |= {slot: text, f"a {slot}": f"{article} {text}"}
        capital = text if text.startswith("{") else text[0].upper() + text[1:]
        slots |= {slot[0].upper() + slot[1:]: capital, f"A {slot}": f"{article.capitalize()} {text}"}
    return slots


def _pronouns(he: str) -> dict[str, str]:
    him, his = {"he": ("him", "his"), "she": ("her", "her")}[he]
    return {"he": he, "him": him, "his": his, "himself": f"{him}self"}
