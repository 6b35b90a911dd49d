"""English words for keys and word lists; RULER takes its own from the wonderwords package."""

from __future__ import annotations

import functools

ADJECTIVES = (
    "able ancient angry awake bitter bland blind bold brave bright brisk broad calm careful cheap "
    "chilly civil clean clever cold common cosy crisp cruel curious damp daring dark decent deep "
    "dense dim distant double dry dull dusty eager early easy elastic empty equal exact faint fair "
    "famous fancy fatal fierce final firm flat fluffy fond formal frail frank fresh frozen full "
    "funny gentle giant glad gloomy golden grand grave greedy grim handy happy harsh hasty heavy "
    "hollow honest huge humble hungry icy idle jolly keen kind large lazy lean level light little "
    "lively lonely long loose loud loyal lucky mad major mellow merry mighty mild minor modern "
    "modest muddy narrow neat nervous new nice noble noisy normal odd old open oval pale past "
    "patient plain polite poor proud pure quaint quick quiet rapid rare raw ready real rich rigid "
    "ripe rough round royal rude rusty sad safe salty scarce secret severe shallow sharp shiny "
    "short shy silent silky simple slim slow smart smooth sober soft solid sore sour square stale "
    "steady steep stiff strange strict strong sturdy subtle sunny sweet swift tall tame tasty "
    "tender tense thick thin tidy tight tiny tired tough tricky upper urban useful vague vast "
    "vivid warm wary weak weary wet wild wise witty young zesty"
).split()
NOUNS = (
    "acorn actor airport almond apron arrow artist atlas attic badge bakery balloon banjo barrel "
    "beacon beetle bell bench berry bicycle blanket blossom boat bottle bowl bracelet branch brick "
    "broom bucket button cabin cactus camera canal canoe canvas carpet castle cedar cellar chair "
    "chalk cherry chimney circus clock cloud coat cobra coffee collar comet compass copper coral "
    "cottage cotton cradle crane crayon cricket crown curtain cushion dagger daisy desert diary "
    "doctor donkey dragon drawer dress eagle easel elbow emerald envelope fabric factory falcon "
    "farmer fiddle finger flag flute forest fork fossil fountain fox garlic gate ghost ginger "
    "giraffe glove goat goose grape guitar gutter hamlet harp hat hawk hedge helmet heron hill "
    "honey hook horse hotel ink iris iron ivory jar jewel judge jungle kayak kennel kitchen kite "
    "knight label lake lamp lemon letter library lizard lobster locket lotus magnet mango maple "
    "marble market mask medal melon mill mitten monkey moon moth mountain museum napkin nest nurse "
    "oak ocean olive onion orchid oven owl oyster paddle painter palace panda parrot peach pearl "
    "pebble pepper piano pigeon pillow pilot pirate planet plum pocket poet pond potato prince "
    "pumpkin puzzle rabbit radio raft railway rainbow raven rocket rose sailor salmon sandal "
    "satchel scarf school shadow sheep shell shovel sink sock spider spoon squirrel stable stamp "
    "statue stone stove student sugar summer table tailor teacher temple thimble ticket tiger "
    "tomato tower tractor train tulip tunnel turtle valley vase velvet village violet wagon wallet "
    "whale wheel willow window winter wizard wool yacht zebra"
).split()


@functools.cache
def compounds() -> list[str]:
    """Over 50,000 distinct ones such as "calm-otter", in a fixed order."""
    return [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
