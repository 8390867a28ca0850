"""The meanings of sentences, independent of language: one type per sentence pattern.

A meaning holds words and the choices that every language can express (number, time, negation), and nothing that
only some languages have, such as gender or measure words; each language's module derives those from the words.
"""

from typing import Literal, NamedTuple

from agnostic_train.quickstart.lexicon import Word

Form = Literal["statement", "negation", "question"]
Person = Literal["1sg", "2sg", "3sg", "1pl", "3pl"]
PERSONS: dict[str, Person] = {"I": "1sg", "you": "2sg", "it": "3sg", "we": "1pl", "they": "3pl"}


class Phrase(NamedTuple):
    """A noun with its determiner, number and adjective, or a pronoun. An `owner` takes the determiner's place."""

    noun: Word
    determiner: Literal["none", "a", "the", "this"] = "none"
    plural: bool = False
    number: Word | None = None
    adjective: Word | None = None
    owner: "Phrase | None" = None

    @property
    def is_pronoun(self) -> bool:
        return "pronoun" in self.noun.kinds

    @property
    def is_mass(self) -> bool:
        return "mass" in self.noun.kinds

    @property
    def is_definite(self) -> bool:
        """Whether the phrase refers to known things, which changes how a language orders and negates an object."""
        return self.determiner in ("the", "this") or self.owner is not None

    @property
    def person(self) -> Person:
        """The person and number that a verb agrees with."""
        if self.is_pronoun:
            return PERSONS[self.noun.name]
        return "3pl" if self.plural else "3sg"


class Activity(NamedTuple):
    """My sister bought a hat yesterday."""

    subject: Phrase
    verb: Word
    object: Phrase
    time: Word
    form: Form


class Scene(NamedTuple):
    """The children are playing in the garden now."""

    subject: Phrase
    action: Word
    place: Word
    time: Word
    form: Form


class Journey(NamedTuple):
    """Yesterday my father went to the market."""

    subject: Phrase
    place: Word
    time: Word
    form: Form


class Reason(NamedTuple):
    """Today my sister is not going to the market because she is tired."""

    subject: Phrase
    place: Word
    state: Word
    time: Word


class Location(NamedTuple):
    """The key is on the table."""

    thing: Phrase
    relation: Word
    landmark: Phrase
    form: Form


class Search(NamedTuple):
    """Where is the teacher's book?"""

    thing: Phrase


class Inquiry(NamedTuple):
    """What did your sister buy yesterday?"""

    subject: Phrase
    verb: Word
    time: Word


class Ownership(NamedTuple):
    """My brother has three goats."""

    subject: Phrase
    possession: Phrase
    form: Form


class Description(NamedTuple):
    """This house is big."""

    thing: Phrase
    adjective: Word
    form: Form


class Occupation(NamedTuple):
    """My aunt is a doctor; or, if it is a wish, wants to become one."""

    subject: Phrase
    occupation: Phrase
    is_wish: bool
    form: Form


class Wish(NamedTuple):
    """I want to buy a red hat."""

    subject: Phrase
    verb: Word
    object: Phrase
    form: Form


class Contrast(NamedTuple):
    """My father likes coffee, but my mother likes tea."""

    subject: Phrase
    liking: Phrase
    other_subject: Phrase
    other_liking: Phrase
    is_opposed: bool


class Request(NamedTuple):
    """Please wash these cups."""

    verb: Word
    object: Phrase
    form: Form


class OpeningHours(NamedTuple):
    """On Mondays the bank opens at nine o'clock in the morning."""

    place: Word
    verb: Word
    hour: Word
    weekday: Word
    form: Form


class Weather(NamedTuple):
    """It rained in the village yesterday."""

    weather: Word
    place: Word
    time: Word
    form: Form


Meaning = (
    Activity
    | Scene
    | Journey
    | Reason
    | Location
    | Search
    | Inquiry
    | Ownership
    | Description
    | Occupation
    | Wish
    | Contrast
    | Request
    | OpeningHours
    | Weather
)


def tense_of(time: Word) -> str:
    """The tense that a time calls for: present, habitual, past, future or perfect."""
    return time.kinds[0]


def is_female(phrase: Phrase) -> bool:
    """Whether the phrase refers to a woman or a girl, for pronouns and for words that differ by sex."""
    return "she" in phrase.noun.kinds
