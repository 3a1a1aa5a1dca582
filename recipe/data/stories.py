"""Short children's stories without end: the built-in corpus, made by a grammar and the same on every machine.

Each story has a hero, a friend, a beginning, a trouble, a turn and an end. A plot is written down as four paragraphs.
Between blank lines stand the ways to say one thing, a line each, of which a story takes one; ``rows`` are the things
that the plot can be about, of which a story takes one too, so that the kite which the wind took is found in the tree
and not under the bed. Whatever a story names, it names again soon: a small model can then learn to keep to it.

    from recipe.data.stories import generate_stories

    for story in itertools.islice(generate_stories(seed=1), 3):
        print(story, end="\\n\\n")
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from hashlib import blake2b
from random import Random

# Everyone who can be the hero or the friend: name, kind, he or she, home. The name says the rest, for ever.
CAST = """
Mina    | girl     | she | in a yellow house at the end of the lane
Tom     | boy      | he  | in a cottage beside the mill
Nora    | girl     | she | on a farm at the foot of the hill
Ben     | boy      | he  | above the bakery in the village square
Clara   | girl     | she | in a tall house near the sea
Leo     | boy      | he  | in a red brick house by the station
Ivy     | girl     | she | in a stone house next to the church
Sam     | boy      | he  | in a lighthouse on the cliff
Pip     | mouse    | he  | in a hole under the kitchen stairs
Dora    | mouse    | she | in a cracked teapot at the back of a shelf
Ruby    | rabbit   | she | in a warm burrow under the hill
Jack    | rabbit   | he  | in a burrow at the edge of the meadow
Bruno   | bear     | he  | in a cave behind the waterfall
Greta   | bear     | she | in a cave high on the mountain
Felix   | fox      | he  | in a den among the ferns
Vera    | fox      | she | in a den below the pine trees
Hazel   | squirrel | she | in a hollow oak
Nico    | squirrel | he  | in a nest of leaves in a chestnut tree
Milo    | mole     | he  | in a tunnel beneath the vegetable garden
Poppy   | pig      | she | in a neat sty beside the orchard
Gus     | goat     | he  | in a shed on the green hillside
Tilly   | turtle   | she | among the reeds beside the pond
Finn    | frog     | he  | under a broad leaf near the lake
Bella   | badger   | she | in a deep den under the roots of an elm
Hugo    | hedgehog | he  | beneath a heap of dry leaves
Kiki    | kitten   | she | in a basket by the fireplace
Rex     | puppy    | he  | in a wooden kennel beside the gate
Olive   | otter    | she | on the bank of the winding river
Lulu    | lamb     | she | in a field of clover
Barney  | beaver   | he  | in a lodge in the middle of the stream
Dusty   | donkey   | he  | in a stable with a blue door
Rosie   | raccoon  | she | in a hollow log near the camp
"""

OPENINGS = """
Once upon a time there was a little {kind} named {hero}. {He} lived {home}.
Once upon a time there was {a kind} called {hero}, who lived {home}.
Once upon a time, {home}, there lived a little {kind} named {hero}.
Once upon a time a young {kind} lived {home}. {His} name was {hero}.
Once upon a time a small {kind} named {hero} lived {home} with {his} mother.
There was once a cheerful {kind} whose name was {hero}. {He} lived {home}.
{hero} was a little {kind} who lived {home}.
{Home} lived a kind young {kind}. Everyone called {him} {hero}.
"""


@dataclass(frozen=True)
class Plot:
    """One kind of story.

    ``rows`` is a table whose first line names the slots that the others fill. In the paragraphs ``{hero}`` and
    ``{pal}`` are names; ``{kind}``, ``{he}``, ``{him}``, ``{his}`` and ``{home}`` go with the hero, ``{pal_kind}``,
    ``{pal_he}``, ... with the friend; ``{a thing}`` puts "a" or "an" before ``{thing}``, ``{Thing}`` makes it begin a
    sentence.
    """

    rows: str
    beginning: str
    trouble: str
    turn: str
    ending: str


LOST_AND_FOUND = Plot(
    rows="""
    thing          | where                                | how
    red kite       | at the top of the pear tree          | The wind had carried it there.
    silver whistle | in the long grass by the gate        | It had slipped through a hole in {his} pocket.
    wooden boat    | under the little bridge              | The stream had carried it there.
    blue scarf     | on a branch of the holly bush        | The thorns had pulled it off.
    glass marble   | inside an old boot                   | It had rolled down the steps.
    picture book   | on the bench beside the fountain     | {hero} had read there after lunch.
    brass bell     | in the nest of a magpie              | Magpies love shiny things.
    rubber ball    | at the bottom of the dry well        | It had bounced much too high.
    rag doll       | in the basket of clean washing       | It had been folded up with the sheets.
    tin soldier    | between two cushions of the sofa     | It had fallen out of {his} hand.
    """,
    beginning="""
    {hero} had {a thing}, and {he} took it everywhere.
    The best thing that {hero} owned was {a thing}.
    For {his} birthday {hero} had been given {a thing}.

    {He} played with the {thing} all morning and slept beside it at night.
    Nobody in the whole valley had such a fine {thing}.
    {hero} would not even eat breakfast without the {thing}.
    """,
    trouble="""
    One day the {thing} was gone.
    But one morning {hero} woke up and could not find the {thing}.
    Then, on a windy afternoon, {hero} saw that the {thing} was missing.

    {hero} looked under the bed and behind the door, but the {thing} was not there.
    {He} emptied every drawer and shook out every blanket. There was no {thing}.
    {He} searched the attic, the cellar and the yard, but {he} did not find the {thing}.

    "My {thing} is lost!" cried {hero}, and big tears ran down {his} cheeks.
    {hero} sat on the doorstep and wept. "I want my {thing} back," {he} said.
    "Where can my {thing} be?" {hero} sobbed.
    """,
    turn="""
    A clever {pal_kind} named {pal} heard {him} crying. "Two can look better than one," said {pal}.
    {His} friend {pal}, {a pal_kind}, came by. "Let us go back to every place where you played," said {pal}.
    "Do not cry," said {pal}, {a pal_kind} who lived nearby. "I will help you look for the {thing}."

    {hero} and {pal} searched high and low. At last {pal} saw the {thing} {where}! {how}
    So they walked along the path together, step by step. And there, {where}, was the {thing}! {how}
    They had almost given up when {hero} pointed. The {thing} was {where}! {how}
    """,
    ending="""
    {hero} hugged the {thing}, and then {he} hugged {pal}.
    "You found my {thing}!" said {hero}. "Thank you, {pal}!"
    {hero} danced for joy with the {thing} in {his} arms. "Thank you, {pal}," {he} said.

    After that, {hero} put the {thing} on a shelf every evening, and it was never lost again.
    From then on {hero} took good care of the {thing}, and {pal} was allowed to play with it too.
    That night {hero} tied a ribbon around the {thing} so that {he} would never lose it again.
    """,
)

A_GREAT_FEAR = Plot(
    rows="""
    fear          | scene                                            | trick                     | after
    the dark      | The lamp went out, and the whole room turned black | sing a song             | the dark was soft and quiet
    thunder       | A storm came, and the sky went crash and boom    | count to ten              | thunder was only noise
    the tall slide | Everybody was sliding in the park, but {he} stood below and shook | hold a friend's hand | the tall slide was fun
    the big dog   | The big dog ran out of the yard and barked at {him} | stand still and speak gently | the big dog only wanted to play
    bees          | A bee sat down on {his} sleeve and buzzed         | breathe slowly            | bees only looked for flowers
    the cellar    | Mother needed onions, and somebody had to go down to the cellar | carry a candle | the cellar was just a room full of jars
    the old bridge | The only way to the fair went over the old bridge | look straight ahead      | the old bridge was strong and safe
    the dentist   | {His} tooth hurt, and {he} had to see the dentist | think of something nice   | the dentist was kind and quick
    """,
    beginning="""
    {hero} was not afraid of spiders, and {he} was not afraid of ghosts. But {he} was afraid of {fear}.
    There was only one thing that frightened {hero}, and that was {fear}.
    {hero} was brave most of the time, but {fear} made {him} tremble.

    {He} never told anybody about it.
    "I wish I were not so scared of {fear}," {he} often thought.
    When {he} thought of {fear}, {he} hid under {his} quilt.
    """,
    trouble="""
    One evening it happened. {scene}.
    Then came a terrible day. {scene}.
    One Sunday {hero} could not hide any longer. {scene}.

    {His} knees knocked together, and {he} could not move.
    "Help!" whispered {hero}. {His} heart was beating like a drum.
    {hero} shut {his} eyes tight and began to cry.
    """,
    turn="""
    {His} friend {pal}, {a pal_kind}, was there. "I was once afraid of {fear} as well," said {pal}. "You must {trick}."
    A wise {pal_kind} named {pal} took {him} by the arm. "I know what helps against {fear}," said {pal}. "Just {trick}."
    "Are you afraid of {fear}?" asked {pal}, the {pal_kind} from next door. "My grandmother told me to {trick}."

    {hero} swallowed hard and did as {pal} had said. Slowly the fear grew smaller and smaller.
    So {hero} tried to {trick}. At first it was hard, but soon {he} felt calm.
    {hero} tried it, and {pal} stayed close to {him}. After a while {he} opened {his} eyes and smiled.
    """,
    ending="""
    Now {hero} knew that {after}.
    "Look, {pal}!" called {hero}. {He} had found out that {after}.
    It turned out that {after}.

    {hero} was never afraid of {fear} again.
    "I did it!" shouted {hero}. From that day {fear} did not frighten {him} anymore.
    Since then, whenever somebody is afraid of {fear}, {hero} tells them to {trick}.
    """,
)

A_QUARREL = Plot(
    rows="""
    thing          | where            | broke                                  | mend                      | share
    swing          | in the park      | the rope snapped                       | tied a strong knot        | one pushed while the other one flew
    sled           | on the hill      | the front board cracked                | nailed on a new board     | they rode down together, one behind the other
    wagon          | in the barn      | a wheel came off                       | hammered the wheel back on | one pulled while the other one rode
    paintbox       | at school        | all the colors spilled on the floor    | wiped up every drop       | they painted one big picture together
    jump rope      | in the street    | the handle flew off                    | glued the handle on again | they jumped in turns and counted aloud
    tent           | on the lawn      | the cloth tore down the middle         | sewed up the tear         | there was room for both of them inside
    rocking horse  | in the attic     | one ear fell off                       | carved a new ear          | first one rode and then the other
    drum           | in a box         | a stick broke in two                   | cut a new stick           | one drummed while the other one danced
    """,
    beginning="""
    One day {hero} and {his} friend {pal}, {a pal_kind}, found {a thing} {where}.
    {hero} had a friend named {pal}, {a pal_kind}. One morning the two of them discovered {a thing} {where}.
    {His} best friend was {a pal_kind} named {pal}. Together they came upon {a thing} {where}.

    It was the most beautiful {thing} that they had ever seen.
    Both of them wanted to use the {thing} first.
    What a splendid {thing} it was!
    """,
    trouble="""
    "The {thing} is mine!" shouted {hero}. "No, I saw it first!" shouted {pal}.
    "I want the {thing}!" said {hero}. "You always get everything!" answered {pal}.
    "Give the {thing} to me!" said {pal}. "Never!" said {hero}.

    They pulled and pushed until {broke}.
    {hero} tugged on one side and {pal} on the other. Then, oh no, {broke}!
    Neither of them let go, and suddenly {broke}.

    Now nobody could use the {thing}. {hero} and {pal} stared at it in silence.
    {hero} turned pale, and {pal} began to cry. The {thing} was spoiled.
    "Look what we have done to the {thing}," whispered {pal}.
    """,
    turn="""
    "I am sorry, {pal}," said {hero} at last. "I am sorry too," said {pal}.
    After a long while {hero} said, "A {thing} is not worth a quarrel." {pal} nodded.
    "You matter more to me than any {thing}," said {hero}, and {pal} dried {pal_his} tears.

    So the two friends worked side by side and {mend}.
    Then they fetched some tools and {mend}.
    Together they {mend}. It took all afternoon.
    """,
    ending="""
    Soon the {thing} was as good as new, and {share}.
    When the {thing} was whole again, {share}.
    After that they shared the {thing}: {share}.

    {hero} and {pal} laughed, and they never fought over the {thing} again.
    "It is much nicer with two," said {hero}, and {pal} agreed.
    And {hero} and {pal} stayed friends for the rest of their lives.
    """,
)

THE_MISSING_INGREDIENT = Plot(
    rows="""
    dish            | lacking | without                       | guest
    apple pie       | butter  | The crust fell into crumbs    | grandmother
    chocolate cake  | cocoa   | It was as pale as the moon    | father
    potato pie      | salt    | It tasted like wet paper      | uncle
    cream cake      | milk    | The flour flew up in a cloud  | little sister
    honey bread     | yeast   | The dough would not rise      | teacher
    berry tart      | sugar   | It was so sour that {he} made a face | cousin
    round pizza     | cheese  | It looked bare and sad        | aunt
    gingerbread man | ginger  | It smelled of nothing at all  | grandfather
    """,
    beginning="""
    It was a special day, because {his} {guest} was coming to visit. "I will make {a dish}," said {hero}.
    {hero} wanted to surprise {his} {guest} with {a dish}.
    {His} {guest} had a birthday, and {hero} decided to make {a dish} for the party.

    {He} put on an apron and took out the biggest bowl.
    {He} washed {his} hands and lit the oven.
    {hero} hummed a tune and began to stir.
    """,
    trouble="""
    But when {he} opened the cupboard, there was no {lacking}.
    Then {hero} stopped. {He} needed {lacking}, and the {lacking} was all gone!
    But {hero} had forgotten the {lacking}.

    {He} tried to make the {dish} without {lacking}. {without}.
    "Perhaps it works without {lacking}," {he} thought. {without}.

    "Now my {guest} will have nothing to eat!" said {hero}, and {he} threw down the spoon.
    The shop was closed, and the {guest} would arrive at noon. {hero} was very unhappy.
    {hero} looked at the clock. There was hardly any time left, and {he} almost cried.
    """,
    turn="""
    Just then {pal}, {a pal_kind}, knocked at the window. "Do you need {lacking}?" asked {pal}. "I have plenty."
    {He} ran to the house of {pal}, {a pal_kind}. "Could you lend me some {lacking}?" asked {hero}. "Gladly," said {pal}.
    {His} neighbor {pal}, {a pal_kind}, came in. "I can give you {lacking}," said {pal}, "if I may help you."

    {pal} brought the {lacking}, and together they mixed and tasted. Soon a wonderful smell filled the house.
    They added the {lacking}, stirred nine times, and waited. This time everything went well.
    With the {lacking} it was easy. {pal} stirred while {hero} set the table.
    """,
    ending="""
    The {guest} took one bite of the {dish} and smiled. "This is delicious!"
    "I have never eaten such a good {dish}," said the {guest}.
    When the {guest} came, the {dish} stood warm on the table, and everybody clapped.

    {hero} cut the {dish} into pieces and gave the biggest piece to {pal}.
    "I could not have done it without {pal}," said {hero} proudly.
    They all ate together, and {hero} sent {pal} home with a full plate.
    """,
)

STUCK = Plot(
    rows="""
    trap                | how                              | tool          | useit
    muddy ditch         | The bank was slippery            | long rope     | threw one end of the rope down and pulled
    blackberry bush     | The thorns held on like hooks    | pair of shears | cut the thorns one by one
    hollow log          | It was narrower than it looked   | bar of soap   | rubbed soap all around until everything was slippery
    garden fence        | The gap was far too small        | saw           | sawed one board away
    deep snowdrift      | The snow gave way                | shovel        | dug a path through the snow
    tall apple tree     | The lowest branch had broken off | ladder        | leaned the ladder against the trunk
    empty barrel        | The lid fell shut                | crowbar       | lifted the lid with a crack
    fishing net         | It was lying hidden in the grass | sharp knife   | cut the net open, knot by knot
    """,
    beginning="""
    {hero} liked to explore, and {he} never looked where {he} was going.
    Every Saturday {hero} went out to look for adventures.
    "Watch your step," {his} mother always told {him}, but {hero} seldom listened.

    On the way to market {he} was chasing a yellow butterfly.
    One fine morning {he} skipped along with {his} nose in the air.
    One day {he} followed a trail of strange footprints.
    """,
    trouble="""
    All at once {hero} was stuck in {a trap}. {how}.
    Bump! {hero} had landed in {a trap}, and {he} was stuck. {how}.
    Then {he} came to {a trap}. {how}, and suddenly {hero} was trapped.

    {He} wriggled and kicked, but {he} could not get free.
    {He} pushed with all {his} strength. It was no use.
    The more {he} struggled, the worse it became.

    "Help! I am stuck in {a trap}!" called {hero}.
    "Is anybody there?" shouted {hero}. Only the echo answered.
    The sun was already sinking, and {hero} grew hungry and cold.
    """,
    turn="""
    {pal}, {a pal_kind}, heard the noise and came running. "Hold still," said {pal}. "I will get {a tool}."
    Luckily {a pal_kind} named {pal} was passing by. "Wait here," said {pal}. "What we need is {a tool}."
    Far away {his} friend {pal}, {a pal_kind}, pricked up {pal_his} ears. {pal} grabbed {a tool} and hurried over.

    {pal} {useit}. With a loud pop, {hero} was free!
    Quickly {pal} {useit}. Out came {hero}, dirty but safe.
    Then {pal} {useit}, and little by little {hero} got out.
    """,
    ending="""
    "Thank you, {pal}," panted {hero}. "You and your {tool} saved me."
    {hero} brushed the dirt off {his} knees and thanked {pal} again and again.
    "How can I ever repay you, {pal}?" asked {hero}. "Just look where you walk," said {pal} with a grin.

    From that day on, {hero} always looked where {he} was going.
    And {hero} walked home slowly, looking at every stone on the way.
    {hero} promised to be more careful, and {he} kept {his} word.
    """,
)

A_LOST_BABY = Plot(
    rows="""
    baby      | cry     | mother           | place             | food
    duckling  | peeped  | the mother duck  | at the mill pond  | bread crumbs
    calf      | mooed   | the brown cow    | in the lower field | fresh hay
    chick     | cheeped | the speckled hen | in the farmyard   | a few seeds
    gosling   | hissed softly | the gray goose | on the village green | soft grass
    foal      | neighed | the white horse  | by the river      | a sweet carrot
    owlet     | hooted  | the great owl    | in the church tower | a piece of cheese
    fawn      | bleated | the gentle deer  | in the birch wood | green leaves
    cub       | whimpered | the old lioness | behind the circus tent | a bowl of milk
    """,
    beginning="""
    One spring day {hero} went out to pick flowers.
    {hero} was on {his} way to the post office with a letter.
    Early one morning {hero} heard a tiny sound in the bushes.

    Under a hedge sat a baby {baby}, all alone.
    There, in the middle of the road, stood a baby {baby}.
    Then {he} noticed a baby {baby} behind a stone. It was shivering.
    """,
    trouble="""
    The {baby} {cry} and {cry}. It had lost its mother.
    "Where is your mother?" asked {hero}. The poor {baby} only {cry}.
    "Why are you so sad, little {baby}?" asked {hero}. The {baby} {cry} and looked around for its mother.

    {hero} asked the postman and the miller, but nobody had seen her.
    They walked up the street and down the street. The mother was nowhere.
    Dark clouds were gathering, and the {baby} was getting weak with hunger.
    """,
    turn="""
    Then they met {pal}, {a pal_kind}. {pal} gave the {baby} {food}. "I think I saw {mother} {place}," said {pal}.
    {hero} ran to {pal}, {a pal_kind} who knew everyone. "First it needs {food}," said {pal}. "Then we will go and look {place}."
    {pal}, {a pal_kind}, brought {food} for the {baby}. "Somebody was calling {place}," said {pal}. "Come with me."

    {hero} carried the {baby} carefully, and {pal} went ahead. And {place} stood {mother}!
    All three of them set off. They found {mother} {place}, calling and calling.
    They hurried, and soon they saw {mother} waiting {place}.
    """,
    ending="""
    The {baby} {cry} for joy and ran to its mother.
    {Mother} kissed the {baby} from head to tail.
    How happy {mother} was to have the {baby} back!

    "Thank you, {hero} and {pal}," said {mother}. "You have good hearts."
    {hero} and {pal} waved until the {baby} was out of sight.
    Every Friday after that, {hero} and {pal} came to visit the {baby}.
    """,
)

LEARNING = Plot(
    rows="""
    skill          | fail                              | tip                                | done
    ride a bicycle | {He} wobbled and fell into a bush | look ahead and keep pedaling       | rode all the way to the church without falling
    whistle        | Only air came out                 | wet your lips and blow softly      | whistled so well that the birds joined in
    skate          | {He} slipped and sat down hard    | bend your knees and lean forward   | glided over the ice like a swan
    juggle         | The apples dropped on {his} toes  | start with two and throw them low  | kept three apples in the air at once
    tie a bow      | The laces turned into a knot      | make two rabbit ears and cross them | tied the neatest bow in the class
    play the flute | It squeaked like a rusty hinge    | hold it gently and take your time  | played a waltz, and everybody danced
    do a handstand | {He} tipped over like a tree      | stretch your legs and look at the ground | stood upside down for a whole minute
    write {his} name | The letters fell off the line   | go slowly, one letter at a time    | wrote it in the sand in huge letters
    """,
    beginning="""
    More than anything else {hero} wanted to {skill}.
    All the others could {skill}, but {hero} could not.
    {hero} dreamed every night that {he} could {skill}.

    "It looks so easy," {he} said to {himself}.
    So one Monday {he} decided to learn it.
    "Today I will {skill}," {he} announced at breakfast.
    """,
    trouble="""
    But it went wrong. {fail}.
    {hero} tried. {fail}.
    It was harder than {he} had thought. {fail}.

    {He} tried a second time and a third time, and it only got worse.
    The crows on the roof laughed at {him}.
    {He} tried until evening, and still it did not work.

    "I will never be able to {skill}," said {hero}, and {he} hung {his} head.
    "I give up!" cried {hero}. "I am too stupid to {skill}."
    Angry and tired, {hero} kicked a stone. "Who wants to {skill} anyway?"
    """,
    turn="""
    {pal}, {a pal_kind}, had been watching. "I failed a hundred times before I could {skill}," said {pal}.
    Then a patient {pal_kind} named {pal} sat down next to {him}. "Nobody can {skill} on the first day," said {pal}.
    "Let me show you," said {pal}, {a pal_kind} who could {skill} very well.

    "You have to {tip}." {hero} practiced every day, and {pal} cheered {him} on.
    "The secret is to {tip}," {pal} added. {hero} listened and tried once more.
    {pal} told {him} to {tip}. That helped a lot, and {hero} did not give up.
    """,
    ending="""
    A week later {hero} {done}.
    And one sunny day {hero} {done}!
    At last it worked. {hero} {done}.

    "I can {skill}!" {hero} shouted. {pal} was very proud of {him}.
    "You see?" said {pal}. {hero} laughed, for now {he} could {skill} as well as anyone.
    Now {hero} teaches the little ones to {skill}, and {he} is as patient as {pal} was.
    """,
)

TELLING_THE_TRUTH = Plot(
    rows="""
    thing        | owner       | doing                       | hid                      | fix
    blue vase    | mother      | playing ball indoors        | under the carpet         | glued the blue vase together
    window       | the baker   | throwing stones             | behind a wall            | swept up the glass and paid for a new window
    gold watch   | father      | playing pirates             | in a flowerpot           | took the gold watch to be repaired
    green umbrella | grandmother | pretending to fly         | at the back of the closet | sewed a patch on the green umbrella
    teacup       | aunt Martha | washing up too fast         | in the dustbin           | painted flowers on a new teacup
    violin       | the teacher | dancing on the table        | below the stage          | put a new string on the violin
    garden gnome | the mayor   | running across the flower bed | in the compost         | stuck the head back on the garden gnome
    jar of honey | uncle Fred  | climbing on the pantry shelf | behind the flour sack    | picked berries to fill a new jar of honey
    """,
    beginning="""
    On a rainy day {hero} was {doing}, although it was forbidden.
    {hero} was {doing} with {his} friend {pal}, {a pal_kind}.
    One afternoon {hero} was bored, so {he} began {doing}.

    "Be careful!" somebody called, but {hero} did not listen.
    Crash! There was a dreadful noise.
    It was great fun, until there was a crash.
    """,
    trouble="""
    The {thing} that belonged to {owner} was broken.
    {hero} had broken the {thing} of {owner}.
    In front of {him} lay the {thing}, and it was broken. It belonged to {owner}.

    {He} was so frightened that {he} hid the pieces {hid}.
    Quickly {he} put the broken {thing} {hid} and ran away.
    "If I hide it {hid}, no one will know," {he} thought.

    "Who broke my {thing}?" asked {owner} that evening. "It was the cat," said {hero}, and {he} turned red.
    When {owner} asked about the {thing}, {hero} looked at the floor. "I don't know," {he} lied.
    All night {hero} lay awake. {He} could not stop thinking about the {thing}.
    """,
    turn="""
    {pal} found {him} sitting alone. "A lie is a heavy thing to carry," said {pal}. "Tell the truth, {hero}."
    In the morning {he} told {pal} everything. "Go to {owner}," said {pal}. "I will come with you."
    {pal} saw that something was wrong. "You will feel better when you have said it," {pal} told {him}.

    So {hero} went to {owner}. "I broke your {thing}, and then I told a lie," {he} said. "I am sorry."
    With a trembling voice {hero} said to {owner}, "It was me. I broke the {thing}."
    {hero} took the pieces from their hiding place and carried them to {owner}. "Please forgive me," {he} said.
    """,
    ending="""
    "Thank you for telling me the truth," said {owner}. "I am not angry."
    For a moment it was very quiet. Then {owner} smiled and forgave {him}.
    "A {thing} can be mended," said {owner}, "but the truth is worth more than gold."

    {hero} {fix}, and {he} felt as light as a feather.
    Then {hero} {fix}. {He} never told a lie again.
    The next day {hero} {fix}, and {pal} helped {him}.
    """,
)

A_SICK_FRIEND = Plot(
    rows="""
    gift            | illness        | hunt                                  | works
    lemon tea       | a sore throat  | {He} had to climb the hill where the lemons grew | The tea ran down the throat like sunshine
    chicken soup    | a fever        | {He} had to carry the hot pot through the rain | After three spoons the fever went down
    wild mint       | a tummy ache   | {He} had to wade through the cold brook | The mint chased the pain away
    warm blanket    | a bad cold     | {He} had to knit until midnight        | Under the blanket the sneezing stopped
    funny story     | spots all over | {He} had to ask the oldest owl in the forest | They laughed so much that the spots faded
    clover honey    | a cough        | {He} had to beg the bees politely      | The honey made the cough go away
    bunch of roses  | a broken leg   | {He} had to pick them between the thorns | The roses made the room bright and the pain small
    music box       | a headache     | {He} had to wind it up for an hour     | The soft music carried the headache off
    """,
    beginning="""
    {hero} had a dear friend, {a pal_kind} named {pal}. They met under the willow every day.
    Every morning {hero} played hide and seek with {pal}, {a pal_kind}.
    {hero} and {pal}, {a pal_kind}, were always together.

    They wanted to go to the fair on Saturday.
    They had planned a picnic by the lake.
    "Tomorrow we will build a castle," they had said.
    """,
    trouble="""
    But {pal} did not come. {pal} was in bed with {illness}.
    Then the news came that {pal} had {illness}.
    One morning {hero} waited and waited. {pal} was ill, and it was {illness}.

    "I feel awful," groaned {pal}. {hero} was worried.
    {pal} could not eat and could not sleep. {hero} stood by the bed and did not know what to do.
    "It is so boring to be ill," sighed {pal}, and a tear rolled onto the pillow.
    """,
    turn="""
    "I know what you need," said {hero}. "I will bring you {a gift}."
    {hero} thought hard. "{A gift} would help," {he} said.
    "When I was ill," said {hero}, "my mother gave me {a gift}. I will get you the same."

    It was not easy. {hunt}.
    {hunt}, but {hero} did not mind.
    {hunt}. {He} thought of {pal} and did not stop.

    At last {he} came back with the {gift}. {works}.
    {hero} gave the {gift} to {pal} and sat down beside {pal_him}. {works}.
    "This is for you," said {hero}, and {he} held out the {gift}. {works}.
    """,
    ending="""
    After two days {pal} jumped out of bed.
    Before the week was over, {pal} was well again.
    "I feel much better," said {pal} with rosy cheeks.

    "The best medicine is a friend like {hero}," said {pal}.
    {pal} and {hero} ran outside together, and the sun was shining.
    {pal} never forgot what {hero} had done, and they stayed friends forever.
    """,
)

AFTER_THE_STORM = Plot(
    rows="""
    damage                     | need      | source                     | result
    blew the roof off the house | straw    | the farmer                 | a thick roof of golden straw
    knocked down the chimney   | bricks    | the mason                  | a chimney of red bricks
    broke the front door       | planks    | the carpenter              | a sturdy door with a brass handle
    smashed every window       | glass     | the glazier                | windows so clear that you could count the stars
    tore a hole in the wall    | clay      | the potter                 | a wall of smooth clay
    washed away the stairs     | stones    | the men from the quarry    | stairs of flat gray stones
    bent the garden gate       | iron      | the blacksmith             | a gate with a curly iron pattern
    soaked all the beds        | wool      | the shepherd               | soft new beds full of wool
    """,
    beginning="""
    {hero} loved {his} home, because it was small and cozy.
    It was autumn, and {hero} was making a fire in the stove.
    That summer {hero} had painted the whole house with {his} own hands.

    But the sky turned dark, and the trees began to groan.
    One night the wind began to howl around the corners.
    The swallows were flying low, and that means bad weather.
    """,
    trouble="""
    A wild storm came and {damage}.
    The storm roared like a lion and {damage}.
    At midnight a mighty storm {damage}.

    {hero} crept under the table and waited for morning. {He} was wet and cold.
    In the morning {hero} stood in a puddle and shivered. "What shall I do now?" {he} asked.
    "My lovely home!" cried {hero}. "I cannot repair it all alone."
    """,
    turn="""
    {His} neighbor {pal}, {a pal_kind}, came with a toolbox. "You may stay with me," said {pal}, "and tomorrow we will build."
    "You are not alone," said {pal}, {a pal_kind} who lived close by. "Many hands make light work."
    Then {pal}, {a pal_kind}, climbed over the fence. "I will call all our friends," said {pal}.

    They needed {need}, so they went to see {source}. They got a whole cart full of {need}.
    "We need {need}," said {hero}. {pal} asked {source}, and soon there was enough {need} for everyone.
    {pal} brought {need} from {source}, and {hero} mixed and measured and hammered.
    """,
    ending="""
    After three days {hero} had {result}.
    They sang while they worked, and soon there was {result}.
    When everything was finished, {hero} looked at it. It was {result}.

    "It is even better than before," said {hero}, and {he} invited {pal} to supper.
    {hero} thanked {pal} and baked a cake for all the helpers.
    The next storm came in winter, but {hero} and {pal} sat inside, warm and dry.
    """,
)

THE_GARDEN = Plot(
    rows="""
    plant        | enemy                      | cure                            | harvest
    pumpkin      | The snails ate its leaves  | put a ring of sand around it    | It grew as big as a coach
    sunflower    | It got no light at all     | cut back the hedge              | It grew higher than the roof
    bean plant   | It had nothing to climb on | gave it a tall pole             | It was covered with long green beans
    rosebush     | Tiny green lice sat on it  | asked the ladybugs for help     | It had one hundred pink roses
    cherry tree  | The frost bit its buds     | wrapped it in an old coat       | Its cherries were as sweet as candy
    strawberry plant | The weeds choked it    | pulled out all the weeds        | It was full of bright red berries
    cabbage      | A caterpillar moved in     | carried the caterpillar to the nettles | It was so heavy that two had to carry it
    melon        | The ground was too dry     | watered it morning and evening  | It was round and juicy
    """,
    beginning="""
    In spring {hero} put a seed into the earth. {He} wanted to grow {a plant}.
    {hero} had a small garden, and in the garden {he} planted {a plant}.
    A traveler gave {hero} a seed. "It will become {a plant}," said the traveler.

    Every day {he} sat beside it and told it stories.
    {He} could hardly wait for the summer.
    "Grow, little {plant}, grow," {he} sang.
    """,
    trouble="""
    But the {plant} did not thrive. {enemy}.
    After a month the {plant} looked sad. {enemy}.
    Then something bad happened to the {plant}. {enemy}.

    "My {plant} is dying!" said {hero}.
    {hero} did not know what to do for the {plant}, and {he} was close to tears.
    The neighbors shook their heads. "That {plant} is finished, {hero}," they said.
    """,
    turn="""
    Only {pal}, {a pal_kind}, did not give up. "I know a remedy," said {pal}.
    {hero} asked {pal}, {a pal_kind} with a green thumb. "We can still save the {plant}," said {pal}.
    "A {plant} needs patience and a friend," said {pal}, {a pal_kind} from the next garden.

    So they {cure}, and they waited.
    That very evening they {cure}.
    {hero} and {pal} {cure}. Then it rained for a night, and the sun came out.

    Little by little the {plant} grew strong.
    The next morning the {plant} had a fresh new leaf.
    From then on the {plant} grew a little every day.
    """,
    ending="""
    By the end of summer it was ready. {harvest}!
    {harvest}, and people came from far away to see it.
    And what a {plant} it was! {harvest}.

    {hero} and {pal} danced around it until dark.
    "Half of it is yours," said {hero} to {pal}. They saved one seed for the next year.
    {hero} and {pal} gave some to every house in the village.
    """,
)

THE_RACE = Plot(
    rows="""
    contest        | accident                          | help                                   | prize
    boat race      | the boat of {pal} began to sink   | pulled {pal} out of the water          | golden anchor
    sack race      | {pal} tripped and twisted an ankle | lifted {pal} up and held {pal_him} tight | basket of plums
    ski race       | {pal} lost a ski                  | shared one pair of skis with {pal}     | woolen hat
    cart race      | the cart of {pal} lost a wheel    | let {pal} climb into {his} own cart    | silver cup
    balloon race   | the balloon of {pal} got a hole   | threw a line across to {pal}           | spyglass
    obstacle race  | {pal} was caught under a net      | crawled back and freed {pal}           | box of fudge
    forest run     | {pal} was lost in the fog         | turned around and called until {pal} answered | velvet ribbon
    egg race       | the egg of {pal} fell and broke   | gave {pal} the spare egg               | chocolate hen
    """,
    beginning="""
    Every year there was {a contest} in the valley. {hero} wanted to win it.
    A poster hung on the wall: on Sunday there would be {a contest}. {hero} wrote down {his} name at once.
    {hero} had trained for months, for soon the great {contest} would begin.

    "I am faster than anybody," {he} boasted. "The {prize} will be mine."
    The winner would get {a prize}, and {hero} could think of nothing else.
    {He} already knew where to put {a prize} like that.
    """,
    trouble="""
    The {contest} began, and {hero} took the lead. Behind {him} came {pal}, {a pal_kind}.
    "Ready, steady, go!" {hero} was in front, and {a pal_kind} named {pal} was second.
    The flag fell, and they were off. Soon only {pal}, {a pal_kind}, was still close to {hero}.

    Then, just before the finish, {accident}.
    In the last bend {accident}.
    All of a sudden {accident}.

    "Help me!" cried {pal}. {hero} looked at the finish line, and then {he} looked back.
    {hero} heard a scream. {He} could win now, or {he} could help {pal}.
    The others rushed past and did not stop. What should {hero} do?
    """,
    turn="""
    {He} thought of the {prize} for one second. Then {he} {help}.
    "A friend is more important," said {hero}. {He} {help}.
    {hero} did not think twice. {He} {help}.

    {hero} and {pal} came in last, arm in arm.
    Together {hero} and {pal} crossed the line long after all the rest.
    Everyone else had finished when {hero} and {pal} arrived.
    """,
    ending="""
    But the crowd cheered louder than ever. The judge gave {hero} {a prize} for having a kind heart.
    "The winner is quick, but {hero} is good," said the judge, and {he} got {a prize} as well.
    The winner stepped up to {hero}. "You deserve the {prize} more than I do," he said.

    {hero} and {pal} shared the {prize}, and they were happier than any winner.
    "Next year we will race as a team," said {hero}, and {pal} thought so too.
    {hero} had lost the {contest}, but {he} had won a friend.
    """,
)

TOO_MUCH = Plot(
    rows="""
    sweets         | place                       | sign                                | share
    cherries       | in the orchard              | {His} face was red with juice       | made a cherry cake for everyone
    pancakes       | on the kitchen table        | {His} belly was as round as a barrel | baked a fresh pile of pancakes for the family
    blueberries    | behind the railway          | {His} tongue was completely blue    | filled a bucket of blueberries for the neighbors
    candies        | in the jar above the stove  | {His} teeth stuck together          | gave away the rest of the candies
    peaches        | at the market               | {His} shirt was dripping            | brought a crate of peaches to the school
    cookies        | in the round tin            | There were crumbs in {his} ears     | hid a few cookies under every pillow
    nuts           | in the hollow tree          | The shells lay all around {him}     | cracked the last nuts for the birds
    dumplings      | in the great pot            | {He} had sauce on {his} nose        | cooked dumplings for the whole street
    """,
    beginning="""
    {hero} loved {sweets} more than any other food.
    Nobody could eat as many {sweets} as {hero}.
    Morning, noon and night {hero} thought only of {sweets}.

    One day {he} found a great many {sweets} {place}.
    One warm day there were lots of {sweets} {place}.
    And one day {he} discovered the finest {sweets} {place}.

    "May I have some?" asked {pal}, {a pal_kind}. "No, they are all mine," said {hero}.
    {His} friend {pal}, {a pal_kind}, was hungry too, but {hero} did not share.
    "Leave some {sweets} for me," begged {pal}, {a pal_kind}. {hero} shook {his} head.
    """,
    trouble="""
    {He} ate and ate until the {sweets} were nearly gone. {sign}.
    {hero} swallowed ten, twenty, thirty {sweets}. {sign}.
    {hero} stuffed {himself} with {sweets} and did not stop. {sign}.

    Then {his} stomach began to ache terribly.
    Suddenly {he} felt dizzy, and {his} belly hurt.
    But oh, what a pain {he} had in {his} belly!

    "Ouch, ouch!" moaned {hero}, rolling on the ground.
    "I never want to see {sweets} again," groaned {hero}.
    {hero} lay down and could not get up.
    """,
    turn="""
    {pal} came back and saw {him}. {pal} was not angry, but brought a hot water bottle.
    Although {hero} had been so mean, {pal} made a cup of peppermint tea and stayed with {him}.
    "Poor {hero}," said {pal}, and {pal_he} sat with {him} until evening.

    "Why are you so good to me?" asked {hero}. "I gave you nothing." "Because we are friends," said {pal}.
    {hero} was ashamed. "I should have shared the {sweets} with you," {he} said.
    "I was greedy," said {hero}. "I am sorry, {pal}."
    """,
    ending="""
    The next day {hero} was well again, and {he} {share}.
    As soon as {he} could stand, {hero} {share}.
    When the pain was gone, {hero} {share}.

    The first and the best of the {sweets} went to {pal}.
    {hero} and {pal} ate only a few each, and they tasted better than ever.
    "Shared {sweets} taste twice as good," said {hero}, and {pal} winked.
    """,
)

A_PRESENT = Plot(
    rows="""
    material       | source                   | present         | use
    old wool       | from a torn sweater      | pair of mittens | wore them the whole winter
    driftwood      | from the beach           | picture frame   | hung it above the bed
    acorn caps     | from under the oak       | necklace        | put it on at once
    empty tins     | from the rubbish heap    | wind chime      | hung it in the window
    paper scraps   | from the printer         | lantern         | lit it every evening
    colored buttons | from grandmother's box  | bracelet        | never took it off
    soft clay      | from the riverbank       | mug             | drank cocoa from it every day
    goose feathers | from the farmyard        | pillow          | slept on it that very night
    shells         | from the shore           | jewelry box     | kept every treasure in it
    """,
    beginning="""
    {His} friend {pal}, {a pal_kind}, had a birthday soon. {hero} wanted to give {pal_him} a wonderful present.
    Tomorrow was the birthday of {his} friend {pal}, {a pal_kind}, and {hero} had no present yet.
    "You are invited to my party," said {pal}, {a pal_kind}. {hero} wondered what to give {pal_him}.

    In the shop window stood a music box that shone like gold.
    {He} went from shop to shop and looked at everything.
    {He} counted the coins in {his} piggy bank.
    """,
    trouble="""
    But {hero} had only two pennies, and everything cost more.
    "That costs a hundred coins," said the shopkeeper. {hero} did not have even one.
    There was a hole in {his} purse, and all {his} money was gone.

    "I cannot go to the party with empty hands," said {hero} sadly.
    {hero} sneaked away so that nobody would see {his} tears.
    "{pal} will think that I do not care," sighed {hero}.
    """,
    turn="""
    Then {he} noticed some {material} {source}. "I will make something!" {he} said.
    On the way home {hero} found {material} {source}, and {he} had an idea.
    "A present does not need to be bought," said {his} mother. So {hero} gathered {material} {source}.

    {He} worked the whole night. Out of the {material} {he} made {a present}.
    With glue, thread and a lot of patience {he} turned the {material} into {a present}.
    {He} cut and folded and polished, and in the morning the {material} had become {a present}.
    """,
    ending="""
    At the party {pal} opened the parcel. "{A present}! And you made it yourself?"
    {hero} held out the {present} shyly. "I made it for you, {pal}."
    Among all the costly gifts lay the {present}, and {pal} picked it up first.

    {pal} {use} and said that it was the best present of all. {hero} beamed.
    "Nobody else in the world has one like this," said {pal}, and {pal_he} hugged {hero}.
    {pal} {use}, and {hero} was the happiest guest at the party.
    """,
)

THE_NEWCOMER = Plot(
    rows="""
    game           | spot                | shy                             | talent
    hopscotch      | on the pavement     | hid behind a lamppost           | hop on one leg longer than anybody
    football       | on the meadow       | sat on a stump far away         | stop every single ball
    tag            | around the haystack | peeped through the hedge        | run as fast as the wind
    marbles        | behind the school   | stood in the shade of a wall    | hit a marble from ten steps away
    theater        | in the old barn     | stayed behind the curtain       | roar like a real lion
    pirates        | on the raft         | watched from the reeds          | draw a perfect treasure map
    chess          | in the library      | pretended to read a newspaper   | think five moves ahead
    leapfrog       | beside the canal    | crouched under a bench          | leap higher than a fence
    """,
    beginning="""
    A new {pal_kind} had moved to the village. {pal_His} name was {pal}.
    One day a cart full of furniture arrived, and on top of it sat {pal}, {a pal_kind}.
    {hero} had a new neighbor. It was {a pal_kind} named {pal}.

    Every day {hero} and the others played {game} {spot}.
    {hero} and the others were busy with a game of {game} {spot}.
    After school everyone met {spot} to play {game}.
    """,
    trouble="""
    But {pal} was too shy to join them and {shy}.
    Nobody asked {pal} to play, so {pal} {shy}.
    {pal} did not dare to say a word. {pal_He} only {shy}.

    "That one is too proud to play with us," said the others.
    "They do not want me here," thought {pal}, and {pal_he} was very lonely.
    In the evening {pal} cried into the pillow, for {pal_he} had no friends.
    """,
    turn="""
    {hero} saw it. {He} remembered {his} own first day, when {he} had been all alone.
    "I would be sad as well," thought {hero}.
    That night {hero} could not sleep, because {he} had to think of {pal}.

    The next day {he} walked straight up to {pal}. "We need one more for {game}," said {hero}. "Will you come?"
    {hero} brought two apples and gave one to {pal}. "Do you like {game}?" {he} asked.
    So {hero} went over, stretched out {his} hand and said, "Come and play {game} with us, {pal}!"
    """,
    ending="""
    {pal} blushed and nodded. And what a surprise: {pal} could {talent}!
    Slowly {pal} followed {him}. Soon everybody saw that {pal} could {talent}.
    {pal_His} eyes lit up. It turned out that nobody played {game} better, for {pal} could {talent}.

    "You are on my team!" called the others. {hero} smiled at {pal}, and {pal} smiled back.
    From then on {hero} and {pal} walked home together every day.
    {pal} was never lonely again, because {hero} had asked.
    """,
)

A_NOISE_AT_NIGHT = Plot(
    rows="""
    noise                | guess           | cause                                        | solve
    tap, tap, tap        | a ghost         | a loose shutter that was knocking in the wind | fastened the shutter with a hook
    scratch, scratch     | a wolf          | a stray cat that wanted to come in           | made a bed for the cat
    drip, drip, drip     | a water witch   | a leaky tap in the bathroom                  | put a bucket under the tap
    squeak, squeak       | a giant bat     | the weathercock on the roof                  | oiled the weathercock
    rumble, rumble       | a troll         | a cart of potatoes that had rolled down the hill | stopped the cart with a stone
    hoo, hoo, hoo        | a vampire       | a baby owl that was learning to sing         | clapped for the baby owl
    clank, clank         | a knight without a head | a bucket that was swinging in the well | took the bucket off its chain
    crunch, crunch       | an ogre         | a deer that was eating the windfall apples   | left some more apples for the deer
    """,
    beginning="""
    One night {hero} could not fall asleep.
    The moon was full, and {hero} was lying in bed.
    At bedtime {hero} blew out the candle and pulled up the covers.

    Suddenly {he} heard a noise. "{Noise}," it went.
    It was perfectly still. Then something went "{noise}" outside.
    Then it began: "{noise}."
    """,
    trouble="""
    {hero} sat up. "That must be {guess}!" {he} thought.
    "It is {guess}," whispered {hero}, "and it is coming to get me!"
    {His} hair stood on end. Was it {guess}?

    "{Noise}," it went again, and this time it was louder.
    {He} put {his} head under the pillow, but {he} could still hear it: "{noise}."
    {His} teeth chattered, and outside it went "{noise}" once more.
    """,
    turn="""
    {hero} ran to {his} friend {pal}, {a pal_kind}. "There is {guess} outside!" {he} cried.
    Luckily {pal}, {a pal_kind}, was staying for the night. {hero} shook {pal_him} awake. "Do you hear {guess}?"
    {hero} threw a pebble at the window of {pal}, {a pal_kind}. "Come quickly," {he} hissed. "It is {guess}!"

    "I do not believe that it is {guess}," said {pal}, and {pal_he} lit a lantern. "Let us have a look."
    {pal} yawned. "We will soon see," said {pal}. Hand in hand they tiptoed out.
    {pal} took a broom, and {hero} took a pan. Together they crept into the night.

    And what was it? It was only {cause}!
    They lifted the lantern and saw {cause}. That was all!
    There was no monster at all. There was {cause}.
    """,
    ending="""
    {hero} and {pal} laughed until their sides ached. Then they {solve}.
    "So that is what {guess} looks like!" giggled {pal}. They {solve} and had some warm milk.
    {hero} blushed, but {pal} did not tease {him}. They {solve} and shut the door.

    {hero} went back to bed and slept like a stone.
    And now, when {hero} hears a noise at night, {he} takes a lantern and goes to look.
    "Good night, {pal}," said {hero}, and {he} was asleep before {pal} could answer.
    """,
)

A_WISH_FOR_THE_SKY = Plot(
    rows="""
    wish            | plan                                  | fail                              | instead
    touch the moon  | pile up all the chairs                | The tower of chairs tumbled down  | the moon was floating in the pond, and {he} could touch it with one finger
    catch a star    | jump from the highest rock            | {He} landed in a haystack         | a firefly sat on {his} hand and glowed like a star
    slide down a rainbow | run to the end of the rainbow    | The rainbow moved away with every step | the sun shone through the waterfall and made a rainbow all around {him}
    ride on a cloud | climb the misty mountain              | The cloud was only cold and wet   | the sheep in the meadow looked like clouds, and one let {him} ride
    keep the sunset | put the sunset into a jar             | The jar stayed empty              | {he} painted the sunset, and now it hung on the wall
    talk to the wind | shout into the wind from the roof    | The wind blew {his} words away    | {he} built a small harp, and the wind sang in its strings
    fly like a bird | flap two cardboard wings              | {He} crashed into a bush          | the swing flew so high that {he} could see over the treetops
    hold a snowflake | catch one in a warm glove            | It melted before {he} could look  | on a cold dark cloth it stayed, and {he} saw all six points
    """,
    beginning="""
    {hero} had one great wish: {he} wanted to {wish}.
    "One day I will {wish}," {hero} told everyone who would listen.
    Ever since {he} was tiny, {hero} had wanted to {wish}.

    The others smiled, but {hero} meant it.
    {He} drew pictures of it and talked about it at every meal.
    {His} mother said that it was impossible.
    """,
    trouble="""
    So {he} made a plan: {he} would {plan}.
    One evening {he} set out to {plan}.
    "I only have to {plan}," {he} thought.

    But it did not work. {fail}.
    Alas! {fail}.
    {He} tried it three times. {fail}.

    "Nobody can {wish}," the crickets seemed to chirp. {hero} trudged home with {his} head down.
    "Now I will never {wish}," said {hero}, and {his} lip trembled.
    {hero} had bruises and a heavy heart.
    """,
    turn="""
    At the crossroads {he} met {pal}, {a pal_kind}. "Some wishes come true in another way," said {pal}. "Come with me."
    {pal}, {a pal_kind}, sat down beside {him}. "I have an idea," said {pal}. "You only need to look differently."
    "Why so gloomy?" asked {pal}, {a pal_kind}. {hero} told {pal_him} everything, and {pal} began to smile.

    {pal} showed {him} the way. And really, {instead}!
    {hero} followed {pal} with a spark of hope. And then {instead}.
    With the help of {pal} it came true after all: {instead}.
    """,
    ending="""
    "I never thought of that!" cried {hero}.
    {hero} was quiet with happiness.
    "Thank you, {pal}," whispered {hero}.

    So {hero} was able to {wish}, in {his} own way.
    "You see, you can {wish}," said {pal}, and {hero} laughed out loud.
    That night {hero} dreamed about it once more, and {pal} was in the dream too.
    """,
)

HELPING_THE_OLD = Plot(
    rows="""
    elder           | task                              | tired                                | reward          | later
    old woodcutter  | carry the logs into the shed      | There were more logs than {he} could count | carved flute | played on the flute until {his} mother heard {him}
    old widow       | fetch water from the spring       | The buckets were as heavy as lead    | ball of red yarn | followed the red yarn back to the house
    blind musician  | cross the crowded bridge          | Everybody pushed and shoved          | little horn     | blew the horn until help came
    old sailor      | untangle the nets                 | Every knot had another knot inside   | brass compass   | followed the needle of the compass
    old shepherd    | bring the flock down the mountain | One sheep always ran the wrong way   | copper bell     | rang the copper bell until a dog found them
    old clockmaker  | sweep the dusty workshop          | The dust made {him} sneeze           | pocket lamp     | switched on the lamp and saw the path
    old fisherman   | pull the boat ashore              | The rope burned in {his} hands       | clay whistle    | whistled on the clay whistle until help came
    old gardener    | rake the leaves in the park       | The wind scattered them again and again | bag of white pebbles | found the white pebbles that {he} had dropped on the way
    """,
    beginning="""
    On the way to town {hero} met {a elder}.
    One cold morning {a elder} was sitting at the roadside.
    {hero} saw {a elder} who looked very tired.

    "Will you help me to {task}?" asked the {elder}.
    "I have to {task}," said the {elder}, "and my back hurts."
    The {elder} had to {task}, and nobody was helping.
    """,
    trouble="""
    {hero} wanted to play, but {he} said yes. It was hard work. {tired}.
    {hero} began at once. {tired}, but {he} went on until it was done.
    "Of course," said {hero}. {tired}, and still {he} did not complain.

    "Take this {reward}," said the {elder}. "It will be useful one day."
    The {elder} gave {him} {a reward} and said goodbye.
    As a thank you {hero} received {a reward}.

    That winter {hero} and {pal}, {a pal_kind}, got lost in the forest. It was getting dark.
    A few days later {hero} was walking with {pal}, {a pal_kind}, when a thick fog came down. They lost the way.
    Soon after that {hero} and {his} friend {pal}, {a pal_kind}, went too far into the hills, and night fell.
    """,
    turn="""
    "We will never get home," wept {pal}. Then {hero} remembered the {reward}.
    {pal} began to shake with fear, but {hero} put {his} hand into {his} bag. There was the {reward}!
    "I am frightened, {hero}," said {pal}. "Wait," said {hero}, "I have the {reward}."

    {He} took out the {reward} and {later}.
    {hero} {later}, and {pal} held on to {him}.
    Without losing another minute {he} {later}.
    """,
    ending="""
    Before long {hero} and {pal} were safe at home beside the fire.
    At last they saw a light, and {pal} shouted with joy. They were saved.
    And so {hero} and {pal} came home in time for supper.

    The next day {hero} went to thank the {elder} for the {reward}.
    "A good deed comes back to you," said {his} mother, and {hero} thought of the {elder}.
    {hero} kept the {reward} forever, and {he} never passed the {elder} without stopping to help.
    """,
)

THE_FORBIDDEN_PLACE = Plot(
    rows="""
    place            | danger                              | stuck                              | rescue
    frozen lake      | The ice began to crack              | {He} stood on a small piece of ice | lay down flat and pushed a long branch across
    abandoned mine   | Stones fell down behind {him}       | The way out was blocked            | rolled the stones away, one after another
    swamp            | The ground was soft and deep        | {He} sank in up to {his} waist     | laid down planks and pulled {him} out
    ruined tower     | The rotten stairs broke             | {He} hung from a beam              | held out a blanket, and {he} jumped
    steep cliff      | The path crumbled away              | {He} could go neither up nor down  | let down a rope with a loop in it
    wild river       | The current swept {him} along       | {He} clung to a rock in the middle | paddled over in a washtub
    bull's pasture   | The bull lowered its horns          | {He} sat on a pole and did not dare to climb down | waved a red cloth and led the bull away
    dark tunnel      | {His} torch went out                | {He} walked in circles and found no exit | rang a bell at the entrance to show the way
    """,
    beginning="""
    "You may go anywhere," said {his} mother, "but not to the {place}."
    There was a sign that said: keep away from the {place}!
    {hero} had been told a thousand times not to go to the {place}.

    That made {hero} very curious. "Why not?" {he} wondered.
    But {hero} wanted to know what was there.
    {hero} nodded, but secretly {he} thought of nothing else.
    """,
    trouble="""
    One quiet afternoon {he} slipped out and went to the {place}.
    While {his} mother was sleeping, {hero} crept away to the {place}.
    One day, when no one was looking, {he} ran to the {place} all by {himself}.

    At first it was exciting. Then it happened. {danger}.
    {He} had not been there long when there was trouble. {danger}.
    {He} took ten steps, and then ten more. {danger}!

    {stuck}. "Mother!" {he} screamed, but she was far away.
    {stuck}, and nobody knew where {he} was.
    {stuck}. Now {he} understood why it was forbidden.
    """,
    turn="""
    {pal}, {a pal_kind}, had seen {him} go. {pal} ran to the {place} as fast as {pal_he} could.
    By good luck {pal}, {a pal_kind}, was gathering mushrooms not far from the {place}. "I am coming, {hero}!" called {pal}.
    A brave {pal_kind} named {pal} heard the scream. "Do not move, {hero}!" shouted {pal}.

    {pal} {rescue}.
    Without a moment's delay {pal} {rescue}.
    {pal} knew what to do. {pal_He} {rescue}.
    """,
    ending="""
    "You saved my life, {pal}," stammered {hero}.
    {hero} fell into the arms of {pal} and sobbed.
    {pal} brought {hero} home, wrapped in a thick coat.

    {His} mother was so glad that she forgot to scold. {hero} never went to the {place} again.
    {hero} told {his} mother everything. "I will listen to you from now on," {he} promised.
    And when others want to go to the {place}, {hero} tells them this story.
    """,
)

IN_THE_SNOW = Plot(
    rows="""
    figure        | lack                         | idea
    snowman       | It had no nose               | a carrot from the stew
    snow horse    | It had no tail               | a broom from the closet
    snow queen    | It had no crown             | a ring of icicles
    snow dragon   | It could not breathe fire    | a red scarf from the wardrobe
    snow castle   | It had no flag               | a striped sock on a stick
    snow rabbit   | It had no ears               | two wooden spoons
    snow ship     | It had no sail               | a tablecloth on a rake
    snow owl      | It could not see             | two black buttons
    """,
    beginning="""
    It had snowed all night. In the morning {hero} ran outside to build {a figure}.
    The first snow of the year had fallen. "Today I will build {a figure}!" said {hero}.
    {hero} put on thick boots and a cap. {He} wanted to build {a figure} in the yard.

    {He} rolled the snow and patted it until {his} fingers tingled.
    {He} worked without a break, and the {figure} became taller and taller.
    By lunchtime the {figure} was nearly finished.
    """,
    trouble="""
    But something was wrong with the {figure}. {lack}.
    Then {hero} stepped back and frowned. {lack}.
    "Oh dear," said {hero}. {lack}!

    {He} tried a twig and a pebble, but they fell off again.
    {He} looked all over the yard, but everything was buried under the snow.
    "Without that it is no real {figure}," said the sparrows, and they were right.

    {hero} was so disappointed that {he} wanted to knock the {figure} down.
    {hero} plopped into the snow and pouted.
    "All that work for nothing," grumbled {hero}.
    """,
    turn="""
    Then {pal}, {a pal_kind}, came along on a sledge. "What a lovely {figure}!" said {pal}. "I know what it needs."
    {pal}, {a pal_kind}, leaned over the fence. "Why don't you take {idea}?" asked {pal}.
    "May I help?" asked {a pal_kind} named {pal}. "At home I have just the right thing for your {figure}."

    {pal} ran home and came back with {idea}. It was perfect.
    Soon they had {idea}, and {hero} put it carefully in the right place.
    They used {idea}. Now the {figure} had what it was missing.
    """,
    ending="""
    How fine the {figure} looked now! Everybody who passed by admired it.
    The {figure} sparkled in the sun, and {hero} jumped up and down.
    "It is alive!" joked {pal}, and {hero} bowed to the {figure}.

    In spring the {figure} melted, but {hero} and {pal} were still friends.
    {hero} and {pal} drank hot cocoa and watched the {figure} through the window.
    "Next winter we will build another one, {pal}," said {hero}. And so they did.
    """,
)

LOST_IN_THE_WOODS = Plot(
    rows="""
    errand                      | distraction                   | sign                        | advice
    take eggs to the miller     | a golden beetle               | the turning sails of the mill | Climb up and look for the mill
    gather firewood             | a path of blue stones         | smoke above the chimney     | Smoke shows where people live
    bring a letter to the priest | a dancing hare               | the ringing of the church bell | Be quiet and listen for the bell
    pick mushrooms              | one more mushroom and one more | the tracks of {his} own boots | Follow your own tracks back
    look for the runaway sheep  | a cloud of butterflies        | the murmur of the stream    | Every stream leads to the valley
    buy candles in town         | a woodpecker with a red cap   | the light of the lighthouse | Wait until the light goes around
    carry lunch to the workers  | a patch of wild strawberries  | the sound of hammers        | Hold your breath and listen for hammers
    fetch medicine for mother   | a silver feather              | the evening star            | The evening star stands over the village
    """,
    beginning="""
    One day {hero} had to {errand}.
    "Please {errand}," said {his} mother, "and do not leave the path."
    It was {his} job to {errand}, and {hero} set out early.

    {He} went into the forest, whistling merrily.
    The way led through a thick forest.
    In the forest it was cool and green.
    """,
    trouble="""
    But then {he} saw {distraction}, and {he} left the path.
    There {he} caught sight of {distraction}. {hero} ran after it without thinking.
    {Distraction} led {him} deeper and deeper between the trees.

    When {he} turned around, all the trees looked the same. {hero} was lost.
    Suddenly the path was gone. {hero} did not know where {he} was.
    {hero} had lost {his} way, and the shadows were growing long.

    "Hello?" {he} called. Nobody answered but a raven.
    {He} sat down on a mossy stone and felt very small.
    "Left or right?" {he} asked, and {his} voice shook.
    """,
    turn="""
    Behind a tree stood {pal}, {a pal_kind}. "{advice}," said {pal}.
    "You look lost," said a friendly {pal_kind}. It was {pal}. "{advice}, {hero}."
    A branch cracked, and out came {pal}, {a pal_kind}. "I was once lost too," said {pal}. "{advice}."

    {hero} held {his} breath. And yes, there was {sign}!
    They waited together, and {pal} kept {him} company. Then they noticed {sign}.
    {hero} did what {pal} had told {him}. Soon {he} noticed {sign}.
    """,
    ending="""
    {hero} and {pal} walked toward it, and before dark they were out of the forest.
    After that it was easy to find the way, and {pal} came along to the edge of the trees.
    It led {him} safely home, and {pal} came with {him}.

    {His} mother was waiting at the door. "I will never leave the path again," said {hero}.
    {hero} could still {errand}, and {he} did not look left or right this time.
    {hero} invited {pal} for soup, and everyone was glad that {he} was back.
    """,
)

THE_MAGIC_THING = Plot(
    rows="""
    thing          | power                        | wish            | chaos                                     | undo
    magic lamp     | granted every wish           | a mountain of toys | The toys filled the house up to the roof | blew out the flame
    magic pencil   | made every drawing real      | a live elephant | The elephant trampled the flowers flat     | rubbed out the drawing
    magic pot      | cooked all by itself         | sweet porridge  | The porridge flowed down the street        | said the words, "Stop, little pot"
    magic hat      | made everything bigger       | an enormous cat | The enormous cat sat on the town hall      | put the hat on backward
    magic flute    | made everyone dance          | a merry dance   | Nobody in the village could stop dancing   | played the tune from end to start
    magic ring     | turned things into gold      | a golden supper | Even the bread was hard and yellow         | threw the ring into the sea
    magic key      | opened every lock            | a look into the zoo | Monkeys were jumping from roof to roof | turned the key twice to the left
    magic mirror   | brought reflections to life  | a twin          | The twin ate the dinner and played tricks  | hung a cloth over the mirror
    """,
    beginning="""
    One day {hero} found {a thing} in a dusty trunk.
    At the flea market {hero} bought {a thing} for a penny.
    A stranger with a long beard gave {hero} {a thing}.

    The {thing} {power}.
    {He} soon noticed that the {thing} {power}.
    A note was tied to it. It said that the {thing} {power}.
    """,
    trouble="""
    "Then I would like {wish}!" said {hero} at once.
    {hero} did not think for long. {He} asked for {wish}.
    "{Wish}, please," said {hero}, and {he} closed {his} eyes.

    There was a flash and a puff of smoke. {chaos}.
    For a minute it was wonderful. But then it was too much. {chaos}.
    It worked only too well. {chaos}!

    "Stop!" yelled {hero}, but the {thing} would not listen.
    "What have I done?" cried {hero}. {He} wished that {he} had never seen the {thing}.
    All the people were running and shouting, and {hero} was frightened of the {thing}.
    """,
    turn="""
    {He} ran to {pal}, {a pal_kind} who had read many books. "Every magic can be undone," said {pal}.
    Only {pal}, {a pal_kind}, kept calm. "Think, {hero}," said {pal}. "There must be a way to stop the {thing}."
    "Give me the {thing}," said {pal}, a sensible {pal_kind}. "My aunt was a wizard."

    {pal} whispered something. Then {hero} {undo}.
    They tried this and that. At last {hero} {undo}.
    "Now!" said {pal}, and {hero} {undo}.
    """,
    ending="""
    In the blink of an eye everything was as before.
    Bang! The spell was broken, and it was quiet again.
    Slowly everything went back to normal.

    "I have all that I need," said {hero}, and {he} sat down to play with {pal}.
    {hero} wished for nothing more that day, except that {pal} would stay for tea.
    {hero} and {pal} never spoke of the {thing} again, but sometimes they smiled.
    """,
)

ON_THE_STAGE = Plot(
    rows="""
    role       | play                     | slip                              | costume
    king       | The Sleeping Princess    | forgot every word                 | a paper crown
    dragon     | The Knight and the Dragon | could not find the way onto the stage | a long green tail
    moon       | The Night Sky            | stepped on the curtain and pulled it down | a round silver mask
    cook       | The Hungry Giant         | dropped the pan with a loud bang  | a tall white hat
    tree       | The Secret of the Wood   | sneezed three times               | leaves from head to foot
    pirate     | The Treasure of Blackbeard | lost a boot on the ladder       | an eye patch
    fairy      | The Frog Prince          | got caught on a nail              | a pair of glittering wings
    detective  | The Case of the Stolen Ham | tipped the ink over the letter  | a gray mustache
    """,
    beginning="""
    The school was putting on a play called "{play}", and {hero} was to be the {role}.
    {hero} had a part in a play. It was called "{play}", and {he} was the {role}.
    In December everyone worked on a play called "{play}". {hero} got the part of the {role}.

    {He} practiced {his} lines in the bathtub and on the stairs.
    {His} costume was {costume}, and {he} wore it even at dinner.
    {His} mother sewed until late at night. The costume was {costume}.
    """,
    trouble="""
    At last the big evening came. The hall was full, and {hero} felt sick with nerves.
    The curtain rose. Two hundred eyes looked at {hero}.
    When the music stopped, the {role} had to come on. {hero} took a deep breath.

    And then {he} {slip}.
    Of all things, {he} {slip}.
    {hero} opened {his} mouth, and at that moment {he} {slip}.

    Somebody in the first row giggled. {hero} wanted to sink into the floor.
    It was dead silent. "I have ruined the play," thought {hero}.
    {His} face was burning. {hero} almost ran away.
    """,
    turn="""
    But beside {him} stood {pal}, {a pal_kind}. "Dear {role}," said {pal} loudly, "was that one of your famous jokes?"
    Then {pal}, {a pal_kind}, came out from behind the scenery. "Look, the {role} wants to make us laugh!" called {pal}.
    "Go on, you are doing well," whispered {pal}, {a pal_kind} who was standing behind the scenery. "You are the best {role} of all."

    The people laughed, and {hero} laughed too. All at once {he} knew what to say.
    {hero} looked at {pal}, and the fear was gone. {He} played on as if nothing had happened.
    That gave {hero} courage. {He} bowed deeply and began to speak.
    """,
    ending="""
    At the end everyone stood up and clapped for the {role}.
    "Bravo!" shouted the audience. They liked the {role} most of all.
    Flowers flew onto the stage, and the {role} had to bow five times.

    {hero} took {pal} by the hand, and they bowed together.
    "You saved me, {pal}," said {hero}. "That is what friends are for," said {pal}.
    {hero} gave half of {his} flowers to {pal}, and they ate cake until midnight.
    """,
)

BUILDING = Plot(
    rows="""
    thing     | first       | fail                                   | second           | works
    raft      | cardboard   | It turned soft and went down like a stone | empty barrels | The raft floated all the way to the island
    bridge    | straw       | It bent and broke after the first step | thick planks     | The bridge held even when an ox walked over it
    tree house | blankets   | It sagged and dropped into the thistles | pine boards     | The tree house stood firm in every wind
    cart      | pumpkins    | The pumpkin wheels burst at the first bump | round stones  | The cart rolled smoothly over the hill
    windmill  | newspaper   | The first gust tore it to shreds       | strong sailcloth | The windmill turned and turned and ground the corn
    scarecrow | branches    | The crows just sat down on it          | bright tin plates | The scarecrow flashed in the sun and scared every crow
    dam       | sand        | The water laughed and ran right through | heavy rocks     | The dam held, and there was a pool for swimming
    kite      | heavy oilcloth | It did not rise even a yard         | thin silk        | The kite climbed until it was a dot in the sky
    """,
    beginning="""
    {hero} wanted to build {a thing}.
    "What I need is {a thing}," said {hero}, and {he} fetched a hammer.
    One morning {hero} drew a plan. It was a plan for {a thing}.

    "You may help, if you want," {he} said to {pal}, {a pal_kind}. {pal} looked at the plan.
    {His} friend {pal}, {a pal_kind}, offered to help, but {hero} said, "I can do it alone."
    {pal}, {a pal_kind}, warned {him}. "Use something that lasts," said {pal}, but {hero} was in a hurry.
    """,
    trouble="""
    {hero} took {first} for the {thing}, because that was quick and easy.
    {He} built the {thing} out of {first} in less than an hour.
    The {thing} was made of {first}, and {hero} was very pleased with it.

    But oh! {fail}.
    Then {he} tried it out. {fail}.
    It did not last. {fail}.

    "My {thing} is ruined," said {hero}, and {he} kicked the {first}.
    There stood {hero} in front of the wreck. "I am no good at building," {he} muttered.
    {hero} was so cross that {he} did not speak for an hour.
    """,
    turn="""
    {pal} did not laugh. "Every builder begins like that," said {pal}. "Let us use {second} this time."
    "We learn from what breaks," said {pal}, and {pal_he} brought {second}.
    Then {hero} went to {pal}. "You were right," {he} said. "Will you help me?" {pal} already had {second} ready.

    They measured twice and sawed once, and they built the {thing} again.
    It took them five days. {hero} held the {second} while {pal} worked with the hammer.
    With {second} it was slow, but {hero} and {pal} did not hurry.
    """,
    ending="""
    And this time it worked! {works}.
    Then came the great test. {works}!
    {works}, and {hero} threw {his} cap into the air.

    "We built the best {thing} in the world, {pal}," said {hero}.
    On the {thing} they wrote two names: {hero} and {pal}.
    {hero} was proud of the {thing}, but {he} was even prouder of having a friend like {pal}.
    """,
)

THE_HUNGRY_BIRD = Plot(
    rows="""
    bird       | trouble                     | care                                    | song
    robin      | had a broken wing           | tied the wing to a matchstick           | sang under {his} window every dawn
    sparrow    | was half frozen             | warmed it in a woolen sock              | brought all its cousins to say thank you
    blackbird  | had not eaten for days      | gave it raisins and oats                | whistled the first song of spring
    starling   | had flown against a window  | laid it in a box with hay               | learned to say, "Good morning"
    wren       | had lost its nest           | hung up a little house with a round door | raised five chicks in the little house
    goldfinch  | had escaped from a cage     | hid it from the bird catcher            | left a golden feather on the windowsill
    thrush     | was caught in a net         | cut the net with scissors               | taught {him} a tune with three notes
    swallow    | had missed the flight south | let it sleep beside the stove           | came back in May and circled over the house
    """,
    beginning="""
    It was a bitter winter, and the windows were covered with frost.
    One gray November day {hero} was scraping the ice from the doorstep.
    Snow was falling, and {hero} was glad to have a warm room.

    Then {he} found a {bird} on the ground.
    Something fluttered. It was a {bird}.
    There was a faint knock at the glass, and outside sat a {bird}.
    """,
    trouble="""
    The poor {bird} {trouble}.
    {hero} saw that the {bird} {trouble}.
    "Oh, you poor {bird}!" said {hero}. It {trouble}.

    Its eyes were closed, and {hero} could hardly feel its heart.
    "It will not live until morning," said the cat with a smirk.
    {hero} did not know much about birds, and {he} was afraid to hurt it.
    """,
    turn="""
    {hero} carried the {bird} to {pal}, {a pal_kind} who knew about birds. {pal} {care}.
    "Wrap it up and keep it quiet," said {pal}, {a pal_kind} from across the road. Then {pal} {care}.
    {pal}, {a pal_kind}, was called for help. {pal} looked at the {bird} and {care}.

    For three weeks {hero} and {pal} took turns to feed the {bird}.
    {hero} sat beside the {bird} every night, and {pal} brought fresh water.
    Day after day {hero} and {pal} looked after the {bird}, and slowly it grew stronger.
    """,
    ending="""
    When the snow melted, they opened the window, and the {bird} flew away.
    In March the {bird} was well, and it rose into the blue sky.
    At last the {bird} could fly again. It circled over them once and was gone.

    But it did not forget them. The {bird} {song}.
    {hero} was a little sad. But then the {bird} {song}, and {hero} and {pal} were glad.
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
    AFTER_THE_STORM,
    THE_GARDEN,
    THE_RACE,
    TOO_MUCH,
    A_PRESENT,
    THE_NEWCOMER,
    A_NOISE_AT_NIGHT,
    A_WISH_FOR_THE_SKY,
    HELPING_THE_OLD,
    THE_FORBIDDEN_PLACE,
    IN_THE_SNOW,
    LOST_IN_THE_WOODS,
    THE_MAGIC_THING,
    ON_THE_STAGE,
    BUILDING,
    THE_HUNGRY_BIRD,
)


def generate_stories(seed: int = 0) -> Iterator[str]:
    """Tells stories for ever, no two alike: 60 to 200 words each, paragraphs divided by a newline, plain ASCII.

    The same seed gives the same stories on every platform and Python version: of ``random.Random`` only ``random()``
    is used, whose sequence Python promises to keep.
    """
    heroes, friends, plots = _compile()
    random = Random(seed).random
    told: set[bytes] = set()
    while True:
        hero = int(random() * len(heroes))
        friend = int(random() * (len(heroes) - 1))
        rows = plots[int(random() * len(plots))]
        beats = rows[int(random() * len(rows))]
        template = "".join([ways[int(random() * len(ways))] for ways in beats])
        slots = heroes[hero] | friends[friend + (friend >= hero)]  # the friend is somebody else
        story = template.format_map(slots)
        digest = blake2b(story.encode(), digest_size=12).digest()
        if digest not in told:
            told.add(digest)
            yield story


def stories_until(total_bytes: int, seed: int = 0) -> Iterator[str]:
    """The first stories of ``generate_stories(seed)`` that together hold ``total_bytes`` bytes or just more."""
    for story in generate_stories(seed):
        if total_bytes <= 0:
            return
        yield story
        total_bytes -= len(story)


# What follows turns the tables above into lists that are quick to choose from.


@cache
def _compile() -> tuple[list[dict[str, str]], list[dict[str, str]], list[list[list[list[str]]]]]:
    """Slots of each hero, slots of each friend, and ``[plot][row][beat]`` -> the ways to say it, rows filled in."""
    heroes, friends = [], []
    for name, kind, he, home in _cells(CAST):
        him, his = ("him", "his") if he == "he" else ("her", "her")
        slots = _slots({"kind": kind, "he": he, "him": him, "his": his, "himself": f"{him}self", "home": home})
        heroes.append(slots | {"hero": name})
        friends.append({_of_pal(slot): text for slot, text in slots.items()} | {"pal": name})
    plots = []
    for plot in PLOTS:
        names, *rows = _cells(plot.rows)
        plots.append([_beats(plot, _slots(dict(zip(names, row, strict=True)))) for row in rows])
    return heroes, friends, plots


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
    """Fills in what a row knows and leaves the slots of hero and friend for later."""

    def __missing__(self, slot: str) -> str:
        return "{" + slot + "}"


def _cells(table: str) -> Iterable[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def _slots(row: dict[str, str]) -> dict[str, str]:
    """Adds to every slot its form with an article and both with a capital: thing, Thing, a thing, A thing."""
    slots = {}
    for slot, text in row.items():
        article = "an" if text[0] in "aeiou" else "a"
        slots |= {slot: text, f"a {slot}": f"{article} {text}"}
        capital = text if text.startswith("{") else text[0].upper() + text[1:]
        slots |= {slot[0].upper() + slot[1:]: capital, f"A {slot}": f"{article.capitalize()} {text}"}
    return slots


def _of_pal(slot: str) -> str:
    return slot.replace(" ", " pal_") if " " in slot else f"pal_{slot}"
