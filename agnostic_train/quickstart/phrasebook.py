"""The embedded default corpus: a phrasebook in five languages, written for this project.

A small parallel corpus must be available wherever the trainer runs, without network, licence or download, and
its sentences must be real language: real words with real agreement, so that a model trained on them learns
something that differs between languages. Each pattern of `grammar.meaning` is filled with words that make
sense together, and rendered by every language's grammar.

The splits share words and patterns but no filling of a pattern: what "my sister buys a hat" is filled with
occurs in one split only, in any tense, number or negation, so a model cannot do well on held-out sentences by
memory alone. (Another pattern, such as a wish, may have the same words in another split.)
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

from agnostic_train.quickstart.grammar import chinese, english, french, german, swahili
from agnostic_train.quickstart.grammar import meaning as means
from agnostic_train.quickstart.lexicon import (
    ACTIONS,
    ADJECTIVES,
    ANIMALS,
    FOODS,
    HOURS,
    NUMBERS,
    OPENING_HOURS,
    PEOPLE,
    PLACES,
    PRONOUNS,
    RELATIONS,
    RELATIVES,
    STATES,
    THINGS,
    TIMES,
    VERBS,
    WEATHERS,
    WEEKDAYS,
    Word,
)

RENDERERS: dict[str, Callable[[means.Meaning], str]] = {
    "en": english.render,
    "zh": chinese.render,
    "sw": swahili.render,
    "de": german.render,
    "fr": french.render,
}
LANGUAGES: tuple[str, ...] = tuple(RENDERERS)

SUBJECTS = PRONOUNS + RELATIVES + PEOPLE
NOUNS = RELATIVES + PEOPLE + ANIMALS + THINGS + FOODS
FEW = NUMBERS[1:5]
FORMS: tuple[means.Form, ...] = ("statement", "negation", "question")

Filling = tuple[Word, ...]


class Pattern(NamedTuple):
    """A sentence pattern: its fillings, and the meanings of each filling in every tense, number and form."""

    name: str
    fillings: Callable[[], Iterable[Filling]]
    variants: Callable[..., Iterable[means.Meaning]]


class Entry(NamedTuple):
    """A meaning of the corpus: its pattern and filling, and its sentence in each language."""

    pattern: str
    filling: tuple[str, ...]
    sentences: dict[str, str]


def phrasebook(
    seed: int = 0, num_train: int = 6000, num_valid: int = 400, num_test: int = 400
) -> dict[str, dict[str, list[str]]]:
    """Sentences by split and language; within a split, line i has the same meaning in every language."""
    entries = draw_entries(seed, {"train": num_train, "valid": num_valid, "test": num_test})
    return {
        split: {language: [entry.sentences[language] for entry in drawn] for language in LANGUAGES}
        for split, drawn in entries.items()
    }


def write_phrasebook(directory: Path, seed: int = 0) -> None:
    """Writes the phrasebook as `{language}.{split}.txt`, one sentence per line."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, languages in phrasebook(seed).items():
        for language, sentences in languages.items():
            text = "".join(f"{sentence}\n" for sentence in sentences)
            (directory / f"{language}.{split}.txt").write_text(text, encoding="utf-8", newline="\n")


def draw_entries(seed: int, num_entries: dict[str, int]) -> dict[str, list[Entry]]:
    """Draws `num_entries` of each split, no two with the same sentence in any language.

    Every pattern contributes equally until it runs out, so that patterns with few meanings, such as the weather,
    are not lost among those with many, such as shopping.
    """
    rng = random.Random(seed)
    shares = divide_fillings(rng, num_entries)
    drawn_sentences: dict[str, set[str]] = {language: set() for language in LANGUAGES}
    drawn = {}
    for split, num_wanted in num_entries.items():
        entries: list[Entry] = []
        sources = deque(entries_of(pattern, fillings, rng) for pattern, fillings in shares[split])
        while sources and len(entries) < num_wanted:
            entry = next(sources[0], None)
            if entry is None:
                sources.popleft()
                continue
            sources.rotate(-1)
            if not any(entry.sentences[language] in drawn_sentences[language] for language in LANGUAGES):
                entries.append(entry)
                for language in LANGUAGES:
                    drawn_sentences[language].add(entry.sentences[language])
        if len(entries) < num_wanted:
            raise ValueError(f"{split}: {num_wanted} meanings wanted, but its share has only {len(entries)}")
        rng.shuffle(entries)
        drawn[split] = entries
    return drawn


def divide_fillings(rng: random.Random, num_entries: dict[str, int]) -> dict[str, list[tuple[Pattern, list[Filling]]]]:
    """Divides every pattern's fillings among the splits, in proportion to their sizes.

    A filling that introduces a new word goes to training: a word that occurs only in evaluation would measure
    the luck of the draw.
    """
    shares: dict[str, list[tuple[Pattern, list[Filling]]]] = {split: [] for split in num_entries}
    introduced: set[Word] = set()
    for pattern in PATTERNS:
        shuffled = list(pattern.fillings())
        rng.shuffle(shuffled)
        introducing: list[Filling] = []
        others: list[Filling] = []
        for filling in shuffled:
            (others if introduced.issuperset(filling) else introducing).append(filling)
            introduced.update(filling)
        for split, num_wanted in num_entries.items():
            if split == "train":
                continue
            num_fillings = round(len(shuffled) * num_wanted / sum(num_entries.values()))
            num_fillings = max(num_fillings, min(num_wanted, 1))
            shares[split].append((pattern, others[:num_fillings]))
            del others[:num_fillings]
        shares["train"].append((pattern, introducing + others))
    return shares


def entries_of(pattern: Pattern, fillings: list[Filling], rng: random.Random) -> Iterator[Entry]:
    """One entry of every filling, then a second of each, and so on: many fillings before many variants."""
    waiting: deque[tuple[Filling, list[means.Meaning]]] = deque()
    for filling in fillings:
        variants = list(pattern.variants(*filling))
        rng.shuffle(variants)
        waiting.append((filling, variants))
        yield entry_of(pattern, filling, variants.pop())
    while waiting:
        filling, variants = waiting.popleft()
        if variants:
            yield entry_of(pattern, filling, variants.pop())
            waiting.append((filling, variants))


def entry_of(pattern: Pattern, filling: Filling, meaning: means.Meaning) -> Entry:
    sentences = {language: render(meaning) for language, render in RENDERERS.items()}
    return Entry(pattern.name, tuple(word.name for word in filling), sentences)


# Building blocks of the patterns.


def of_kind(words: tuple[Word, ...], *kinds: str) -> list[Word]:
    """The words of at least one of the kinds."""
    return [word for word in words if any(kind in word.kinds for kind in kinds)]


def owned(noun: Word, plural: bool = False) -> list[means.Phrase]:
    """The noun with every possessive: my, your, our and their ..."""
    return [means.Phrase(noun, owner=means.Phrase(pronoun), plural=plural) for pronoun in PRONOUNS]


def person(word: Word) -> list[means.Phrase]:
    """The phrases for one person: I, my sister, the teacher."""
    if "pronoun" in word.kinds:
        return [means.Phrase(word)]
    return owned(word) if "relative" in word.kinds else [means.Phrase(word, "the")]


def people(word: Word) -> list[means.Phrase]:
    """The phrases for one person or animal, or several; relatives stay singular."""
    is_unrelated = "someone" in word.kinds or "animal" in word.kinds
    return person(word) + ([means.Phrase(word, "the", plural=True)] if is_unrelated else [])


def counted(noun: Word, numbers: Iterable[Word], adjective: Word | None = None) -> list[means.Phrase]:
    """The noun with every number: one book, two books ..."""
    return [means.Phrase(noun, plural=n.name != "one", number=n, adjective=adjective) for n in numbers]


def objects(verb: Word, noun: Word) -> list[means.Phrase]:
    """The objects that a verb may take: a book, this book, my book, two books; bread; the teacher."""
    if "person" in noun.kinds:
        return person(noun)
    if "mass" in noun.kinds:
        return [means.Phrase(noun)]
    known = [means.Phrase(noun, "this"), means.Phrase(noun, "this", plural=True)]
    if "goods" in noun.kinds or "tame" in noun.kinds:
        known += owned(noun)
    # People rarely look for three phones or open five doors.
    is_single = "process" in verb.kinds or "opening" in verb.kinds
    return [means.Phrase(noun, "a"), *known, *(() if is_single else counted(noun, FEW))]


def forms(subject: means.Phrase) -> tuple[means.Form, ...]:
    """Statement, negation and, unless the speaker is the subject, question."""
    about_oneself = subject.person in ("1sg", "1pl")
    return FORMS[:2] if about_oneself else FORMS


# The variants of each pattern: all that can be said with one filling.


def activities(subject: Word, verb: Word, noun: Word) -> Iterator[means.Activity]:
    kinds = ["near"]
    if "meal" not in verb.kinds:
        kinds.append("far")
    if "instant" not in verb.kinds:
        kinds.append("moment")
    if "process" not in verb.kinds:
        kinds.append("perfect")
    if "mass" in noun.kinds:
        kinds.append("habitual")
    for who, what, time in product(people(subject), objects(verb, noun), of_kind(TIMES, *kinds)):
        if not (what.number and "moment" in time.kinds):
            yield means.Activity(who, verb, what, time, "statement")
        # In a negation, the object is not counted and the time is not habitual.
        if not (what.number or "habitual" in time.kinds):
            yield means.Activity(who, verb, what, time, "negation")


def scenes(subject: Word, action: Word, place: Word) -> Iterator[means.Scene]:
    for who, time in product(people(subject), of_kind(TIMES, "moment", "habitual", "near")):
        for form in forms(who):
            if not (form == "negation" and "habitual" in time.kinds):
                yield means.Scene(who, action, place, time, form)


def journeys(subject: Word, place: Word) -> Iterator[means.Journey]:
    for who, time in product(people(subject), of_kind(TIMES, "day", "habitual", "near", "far")):
        for form in forms(who):
            if not (form == "negation" and "habitual" in time.kinds):
                yield means.Journey(who, place, time, form)


def reasons(subject: Word, place: Word, state: Word) -> Iterator[means.Reason]:
    for who, time in product(people(subject), of_kind(TIMES, "day", "near")):
        if means.tense_of(time) != "future":
            yield means.Reason(who, place, state, time)


def locations(thing: Word, relation: Word, landmark: Word) -> Iterator[means.Location]:
    for plural in (False, True):
        for what in [means.Phrase(thing, "the", plural), *owned(thing, plural)]:
            for form in forms(what):
                yield means.Location(what, relation, means.Phrase(landmark, "the"), form)


def are_at_hand(thing: Word, landmark: Word) -> bool:
    """Whether the thing can be expected there: cars outdoors, keys indoors, and animals anywhere."""
    return "pet" in thing.kinds or ("vehicle" in thing.kinds) == ("outdoors" in landmark.kinds)


def searches(thing: Word, owner: Word) -> Iterator[means.Search]:
    for who, plural in product(person(owner), (False, True)):
        yield means.Search(means.Phrase(thing, plural=plural, owner=who))


def inquiries(subject: Word, verb: Word) -> Iterator[means.Inquiry]:
    kinds = ("near",) if "instant" in verb.kinds else ("near", "moment")
    for who, time in product(people(subject), of_kind(TIMES, *kinds)):
        yield means.Inquiry(who, verb, time)


def ownerships(subject: Word, noun: Word) -> Iterator[means.Ownership]:
    for who in people(subject):
        for possession in counted(noun, NUMBERS):
            yield means.Ownership(who, possession, "statement")
        for form in forms(who)[1:]:
            yield means.Ownership(who, means.Phrase(noun, "a"), form)


def descriptions(noun: Word, adjective: Word) -> Iterator[means.Description]:
    things = []
    if "relative" not in noun.kinds:
        things.append(means.Phrase(noun, "this"))
    if "relative" not in noun.kinds and "news" not in noun.kinds:
        things.append(means.Phrase(noun, "this", plural=True))
    if any(kind in noun.kinds for kind in ("relative", "goods", "tame")):
        things += owned(noun)
    for thing, form in product(things, FORMS):
        yield means.Description(thing, adjective, form)


def occupations(subject: Word, occupation: Word) -> Iterator[means.Occupation]:
    for who, is_wish in product(people(subject), (False, True)):
        what = means.Phrase(occupation, plural=True) if who.person.endswith("pl") else means.Phrase(occupation, "a")
        for form in forms(who):
            yield means.Occupation(who, what, is_wish, form)


def wishes(subject: Word, verb: Word, noun: Word, adjective: Word | None = None) -> Iterator[means.Wish]:
    for who in people(subject):
        what = means.Phrase(noun) if "mass" in noun.kinds else means.Phrase(noun, "a", adjective=adjective)
        for form in forms(who):
            yield means.Wish(who, verb, what, form)
        if "mass" not in noun.kinds:
            for several in counted(noun, FEW, adjective):
                yield means.Wish(who, verb, several, "statement")


def wish_fillings() -> Iterator[Filling]:
    """A person, what they want to do, and the thing, with an adjective if one fits a wish for it."""
    for subject, verb, noun in product(SUBJECTS, of_kind(VERBS, "wish"), ANIMALS + THINGS + FOODS):
        if verb.goes_with(noun):
            adjectives: list[Word | None] = [word for word in of_kind(ADJECTIVES, "wish") if word.goes_with(noun)]
            for described in adjectives or [None]:
                yield (subject, verb, noun, described) if described else (subject, verb, noun)


def contrasts(subject: Word, other_subject: Word, liking: Word, other_liking: Word) -> Iterator[means.Contrast]:
    what, other_what = (means.Phrase(noun, plural="mass" not in noun.kinds) for noun in (liking, other_liking))
    for who, other_who, is_opposed in product(people(subject), people(other_subject), (False, True)):
        # If both are relatives, they are relatives of the same person.
        if not (who.owner and other_who.owner) or who.owner == other_who.owner:
            yield means.Contrast(who, what, other_who, other_what, is_opposed)


def requests(verb: Word, noun: Word) -> Iterator[means.Request]:
    for what in objects(verb, noun):
        yield means.Request(verb, what, "statement")
        if what.is_definite or what.is_mass:
            yield means.Request(verb, what, "negation")


def opening_hours(place: Word, verb: Word, hour: Word) -> Iterator[means.OpeningHours]:
    asked_or_not: tuple[means.Form, ...] = ("statement", "question")
    for weekday, form in product(WEEKDAYS, asked_or_not):
        yield means.OpeningHours(place, verb, hour, weekday, form)


def weather_reports(weather: Word, place: Word) -> Iterator[means.Weather]:
    for time, form in product(of_kind(TIMES, "day", "near", "far"), FORMS):
        yield means.Weather(weather, place, time, form)


# Those who act, those asked about, what people own, what can lie about, what people like, the family, and the
# verbs of questions with "what".
DOERS = SUBJECTS + ANIMALS
OTHERS = [word for word in SUBJECTS if word.name not in ("I", "we")]
OWNABLES = of_kind(NOUNS, "goods", "tame", "counted")
MOVABLES = of_kind(ANIMALS + THINGS, "item", "vehicle", "pet")
LIKABLES = of_kind(THINGS + FOODS, "liked")
FAMILY = PRONOUNS + RELATIVES
ASKED_VERBS = [verb for verb in VERBS if any(map(verb.goes_with, [*of_kind(THINGS, "item"), *FOODS]))]

PATTERNS = (
    Pattern(
        "activity",
        lambda: ((s, v, o) for s, v, o in product(SUBJECTS, VERBS, NOUNS) if v.goes_with(o) and s is not o),
        activities,
    ),
    Pattern(
        "scene",
        lambda: (f for f in product(DOERS, ACTIONS, PLACES) if f[1].goes_with(f[0]) and f[1].goes_with(f[2])),
        scenes,
    ),
    Pattern("journey", lambda: product(SUBJECTS, of_kind(PLACES, "errand")), journeys),
    Pattern(
        "reason",
        lambda: product(of_kind(SUBJECTS, "pronoun", "she", "he"), of_kind(PLACES, "errand"), STATES),
        reasons,
    ),
    Pattern(
        "location",
        lambda: (
            (t, r, m)
            for t, r, m in product(MOVABLES, RELATIONS, THINGS)
            if r.goes_with(m) and t is not m and are_at_hand(t, m)
        ),
        locations,
    ),
    Pattern("search", lambda: product(MOVABLES, SUBJECTS), searches),
    Pattern("inquiry", lambda: product(OTHERS, ASKED_VERBS), inquiries),
    Pattern(
        "ownership",
        lambda: ((s, o) for s, o in product(SUBJECTS, OWNABLES) if s is not o),
        ownerships,
    ),
    Pattern(
        "description",
        lambda: ((n, a) for n, a in product(NOUNS, ADJECTIVES) if a.goes_with(n)),
        descriptions,
    ),
    Pattern("occupation", lambda: product(FAMILY, of_kind(PEOPLE, "occupation")), occupations),
    Pattern("wish", wish_fillings, wishes),
    Pattern(
        "contrast",
        lambda: (who + what for who, what in product(permutations(FAMILY, 2), permutations(LIKABLES, 2))),
        contrasts,
    ),
    Pattern(
        "request",
        lambda: ((v, n) for v, n in product(VERBS, NOUNS) if v.goes_with(n) and "wild" not in n.kinds),
        requests,
    ),
    Pattern(
        "opening hours",
        lambda: (
            (p, v, h) for p, v, h in product(of_kind(PLACES, "opening"), OPENING_HOURS, HOURS) if v.name in h.kinds
        ),
        opening_hours,
    ),
    Pattern("weather", lambda: product(WEATHERS, of_kind(PLACES, "region")), weather_reports),
)
