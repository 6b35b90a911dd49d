"""The wordings of the needle prompts: how facts are stated and asked, and what they are about.

They are chosen apart from the project's evaluation, which hides "The special magic number for KEY
is: VALUE.": FAMILIES is the whole list of what calibration uses. Answers are digits, words or both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import random
    from collections.abc import Callable


class Family(NamedTuple):
    """One wording: how a fact is stated and asked, and what its subject and value look like."""

    name: str
    statement: str
    question: str  # ends where the value begins
    subject: Callable[[random.Random], str]
    value: Callable[[random.Random], str]


CITIES = (
    "Lisbon Oslo Quito Nairobi Hanoi Tallinn Bergen Cusco Dakar Perth Riga Seville Tampere "
    "Valencia Windhoek Zagreb Almaty Bologna Cardiff Durban Esbjerg Fukuoka Ghent Haifa Izmir "
    "Jaipur Krakow"
).split()
NAMES = (
    "Amelia Bruno Celeste Dmitri Elena Farid Greta Hassan Ingrid Jorge Keiko Lionel Marta "
    "Nadia Omar Petra Quentin Rosa Stefan Tamara Ulrich Vera Walter Yusuf Zelda"
).split()
NOUNS = (
    "anchor basket candle drum engine feather garden hammer island jacket kettle ladder "
    "mirror needle orchard pencil quilt ribbon saddle teapot umbrella violin window anvil "
    "bridge copper dolphin ember falcon glacier harbor lantern meadow nickel otter pepper "
    "river silver thunder walnut"
).split()
COLOURS = (
    "amber black blue brown crimson green grey orange pink purple red violet white yellow"
).split()


def _digits(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.choice((3, 4, 5, 6)), 10**7))[: rng.randint(4, 7)]


def _phone(rng: random.Random) -> str:
    return f"{rng.randrange(200, 999)}-{rng.randrange(1000, 9999)}"


def _city(rng: random.Random) -> str:
    return rng.choice(CITIES)


def _name(rng: random.Random) -> str:
    return rng.choice(NAMES)


def _noun(rng: random.Random) -> str:
    return rng.choice(NOUNS)


def _colour(rng: random.Random) -> str:
    return rng.choice(COLOURS)


def _two_nouns(rng: random.Random) -> str:
    return "-".join(rng.sample(NOUNS, 2))


def _label(rng: random.Random) -> str:
    return f"{rng.choice('ABCDEFGHKLMNPRSTVX')}{rng.randrange(10, 99)}"


def _identifier(rng: random.Random) -> str:
    return "_".join(rng.sample(NOUNS, 2))


FAMILIES = (
    Family("city number", "{subject} was given the magic number {value} at the fair.",
           "Q: What is the magic number of {subject}?\nA: It is", _city, _digits),
    Family("pass key", "The pass key to the {subject} gate is {value}. Remember it.",
           "The pass key to the {subject} gate is", _noun, _digits),
    Family("telephone", "You can reach {subject} on {value} in the evening.",
           "The telephone number of {subject} is", _name, _phone),
    Family("vault", "Vault {subject} opens only with the password {value} and closes by itself.",
           "The password of vault {subject} is", _label, _two_nouns),
    Family("code word", "For operation {subject} the code word is {value}, and no other.",
           "The code word for operation {subject} is", _noun, _noun),
    Family("variable", "let {subject} = {value};", "print({subject}) shows", _identifier, _digits),
    Family("home", "{subject} has lived in {value} for many years.",
           "Q: In which town does {subject} live?\nA: {subject} lives in", _name, _city),
    Family("parcel", "Parcel {subject} is waiting on shelf {value} for its owner.",
           "Parcel {subject} is on shelf", _label, _digits),
    Family("boat", "The boat of {subject} is called the {value} and is nearly new.",
           "The name of the boat of {subject} is the", _name, _two_nouns),
)  # fmt: skip


class Fact(NamedTuple):
    """One hidden fact: what its family says about which subject."""

    family: Family
    subject: str
    value: str

    @property
    def statement(self) -> tuple[str, str]:
        """What stands before and after the value; the space in front goes with the value."""
        before, after = self.family.statement.split(" {value}")
        return before.format(subject=self.subject), after

    @property
    def question(self) -> str:
        return self.family.question.format(subject=self.subject)


def make_fact(rng: random.Random, family: Family, taken: set[str]) -> Fact:
    """A fact of `family` whose subject and value are not in `taken`, to which they are added."""
    while True:
        subject, value = family.subject(rng), family.value(rng)
        if subject != value and not {subject, value} & taken:
            taken |= {subject, value}
            return Fact(family, subject, value)


def noise_sentence(rng: random.Random) -> str:
    """A short sentence that says nothing worth asking."""
    one, two = rng.sample(NOUNS, 2)
    verb = rng.choice(("stands beside", "is older than", "looks like", "lies under"))
    return f"The {rng.choice(COLOURS)} {one} {verb} the {two}."
