"""German: gender, case and endings, the verb in second place, separable verbs, "kein" and "nicht"."""

import re

from agnostic_train.quickstart.grammar import meaning as means
from agnostic_train.quickstart.lexicon import FEMININE_OCCUPATIONS, IT, Word

# By case and gender; "pl" is the plural of all genders.
ARTICLE = {
    "nominative": {"der": "der", "die": "die", "das": "das", "pl": "die"},
    "accusative": {"der": "den", "die": "die", "das": "das", "pl": "die"},
    "dative": {"der": "dem", "die": "der", "das": "dem", "pl": "den"},
    "genitive": {"der": "des", "die": "der", "das": "des", "pl": "der"},
}
# The endings of "dieser"; "ein", "kein" and "mein" share them, except for three forms without an ending.
ENDING = {
    "nominative": {"der": "er", "die": "e", "das": "es", "pl": "e"},
    "accusative": {"der": "en", "die": "e", "das": "es", "pl": "e"},
    "dative": {"der": "em", "die": "er", "das": "em", "pl": "en"},
    "genitive": {"der": "es", "die": "er", "das": "es", "pl": "er"},
}
WITHOUT_ENDING = {("nominative", "der"), ("nominative", "das"), ("accusative", "das")}

BE = {"1sg": "bin", "2sg": "bist", "3sg": "ist", "1pl": "sind", "3pl": "sind"}
WAS = {"1sg": "war", "2sg": "warst", "3sg": "war", "1pl": "waren", "3pl": "waren"}
HAVE = {"1sg": "habe", "2sg": "hast", "3sg": "hat", "1pl": "haben", "3pl": "haben"}
HAD = {"1sg": "hatte", "2sg": "hattest", "3sg": "hatte", "1pl": "hatten", "3pl": "hatten"}
WILL = {"1sg": "werde", "2sg": "wirst", "3sg": "wird", "1pl": "werden", "3pl": "werden"}
WANT = {"1sg": "will", "2sg": "willst", "3sg": "will", "1pl": "wollen", "3pl": "wollen"}
LIKE = {"1sg": "mag", "2sg": "magst", "3sg": "mag", "1pl": "mögen", "3pl": "mögen"}
GO = ("gehen", "geht", "gegangen")


def render(meaning: means.Meaning) -> str:
    """The meaning as a German sentence."""
    match meaning:
        case means.Activity(subject, verb, object, time, form):
            finite, final = predicate(verb.de, means.tense_of(time), subject.person)
            when = time.de[-1] if form == "negation" else time.de[0]
            return sentence(noun_phrase(subject), finite, middle_field(verb, object, form, when), final)
        case means.Scene(subject, action, place, time, form):
            finite, final = predicate(action.de, means.tense_of(time), subject.person, auxiliary=action.de[3])
            does = opening(noun_phrase(subject), finite, form)
            return sentence(does, time.de[0], negation(form), at(place), final, form=form)
        case means.Journey(subject, place, time, form):
            finite, final = predicate(GO, means.tense_of(time), subject.person, auxiliary="sein")
            if form == "question":
                return sentence(finite, noun_phrase(subject), time.de[0], to(place), final, form=form)
            return sentence(time.de[0], finite, noun_phrase(subject), negation(form), to(place), final)
        case means.Reason(subject, place, state, time):
            finite, final = predicate(GO, means.tense_of(time), subject.person, auxiliary="sein")
            goes_not = sentence(time.de[0], finite, noun_phrase(subject), "nicht", to(place), final)
            is_so = be(state, subject.person, means.tense_of(time))
            return f"{goes_not[:-1]}, weil {pronoun(subject)} {is_so}."
        case means.Location(thing, relation, landmark, form):
            where = f"{relation.de[0]} {noun_phrase(landmark, 'dative')}"
            is_there = opening(noun_phrase(thing), BE[thing.person], form)
            return sentence(is_there, negation(form), where, form=form)
        case means.Search(thing):
            return sentence("wo", BE[thing.person], noun_phrase(thing), form="question")
        case means.Inquiry(subject, verb, time):
            finite, final = predicate(verb.de, means.tense_of(time), subject.person)
            return sentence("was", finite, noun_phrase(subject), time.de[0], final, form="question")
        case means.Ownership(subject, possession, form):
            possessed = noun_phrase(possession, "accusative", is_negated=form == "negation")
            return sentence(opening(noun_phrase(subject), HAVE[subject.person], form), possessed, form=form)
        case means.Description(thing, adjective, form):
            is_so = opening(noun_phrase(thing), BE[thing.person], form)
            return sentence(is_so, negation(form), adjective.de[0], form=form)
        case means.Occupation(subject, occupation, is_wish, form):
            verb_forms, final = (WANT, "werden") if is_wish else (BE, "")
            occupation_phrase = occupation_of(subject, occupation, is_negated=form == "negation")
            is_or_wants = opening(noun_phrase(subject), verb_forms[subject.person], form)
            return sentence(is_or_wants, occupation_phrase, final, form=form)
        case means.Wish(subject, verb, object, form):
            object_phrase = noun_phrase(object, "accusative", is_negated=form == "negation")
            wants = opening(noun_phrase(subject), WANT[subject.person], form)
            return sentence(wants, object_phrase, infinitive(verb.de), form=form)
        case means.Contrast(subject, liking, other_subject, other_liking, is_opposed):
            likes = f"{noun_phrase(subject)} {LIKE[subject.person]} {noun_phrase(liking, 'accusative')}"
            other_likes = f"{LIKE[other_subject.person]} {noun_phrase(other_liking, 'accusative')}"
            conjunction = ", aber" if is_opposed else " und"
            return sentence(f"{likes}{conjunction}", noun_phrase(other_subject), other_likes)
        case means.Request(verb, object, form):
            object_phrase = middle_field(verb, object, form)
            return sentence("bitte", imperative(verb.de), object_phrase, separable_prefix(verb.de))
        case means.OpeningHours(place, verb, hour, weekday, form):
            where, at_hour = noun_phrase(means.Phrase(place, "the")), f"um {hour.de[0]}"
            if form == "question":
                return sentence(verb.de[0], where, weekday.de[0], at_hour, form=form)
            return sentence(weekday.de[0], verb.de[0], where, at_hour)
        case means.Weather(weather, place, time, form):
            finite, final = weather_predicate(weather, means.tense_of(time))
            rest = (at(place), negation(form), final)
            if form == "question":
                return sentence(finite, IT.de[0], time.de[0], *rest, form=form)
            return sentence(time.de[0], finite, IT.de[0], *rest)


def sentence(*parts: str, form: means.Form = "statement") -> str:
    """Joins the parts that are not empty to one sentence, contracting prepositions and articles."""
    text = " ".join(part for part in parts if part)
    text = re.sub(r"\b(in|an) dem\b", lambda match: match[1][0] + "m", text)
    text = re.sub(r"\b(in|an) das\b", r"\1s", text)
    return text[0].upper() + text[1:] + ("?" if form == "question" else ".")


def opening(subject: str, finite: str, form: means.Form) -> str:
    """Subject and finite verb: the verb comes second in a statement, and first in a question."""
    return f"{finite} {subject}" if form == "question" else f"{subject} {finite}"


def negation(form: means.Form) -> str:
    return "nicht" if form == "negation" else ""


def predicate(verb: tuple[str, ...], tense: str, person: means.Person, auxiliary: str = "haben") -> tuple[str, str]:
    """The finite verb and the end of the clause: a prefix, a participle or an infinitive."""
    if tense == "future":
        return WILL[person], infinitive(verb)
    if tense in ("past", "perfect"):
        return (BE if auxiliary == "sein" else HAVE)[person], verb[2]
    return present(verb, person), separable_prefix(verb)


def present(verb: tuple[str, ...], person: means.Person) -> str:
    """The present of a verb, derived from its infinitive and its third person."""
    stem_and_n = verb[0].split("+")[-1]
    third = verb[1]
    if person == "3sg":
        return third
    if person == "1sg":
        return stem_and_n[:-1] + ("" if stem_and_n.endswith("en") else "e")
    if person == "2sg":
        return third[:-1] + ("t" if third[-2] in "sß" else "st")
    return stem_and_n


def imperative(verb: tuple[str, ...]) -> str:
    return verb[3] if len(verb) > 3 else verb[0].split("+")[-1].removesuffix("en")


def infinitive(verb: tuple[str, ...]) -> str:
    return verb[0].replace("+", "")


def separable_prefix(verb: tuple[str, ...]) -> str:
    return verb[0].split("+")[0] if "+" in verb[0] else ""


def middle_field(verb: Word, object: means.Phrase, form: means.Form, when: str = "") -> str:
    """Object, time, "nicht": a definite object precedes the time; an indefinite one follows it, negated by "kein"."""
    government = verb.de[4] if len(verb.de) > 4 else "accusative"
    if government == "auf":
        parts: tuple[str, ...] = (when, negation(form), f"auf {noun_phrase(object, 'accusative')}")
    elif object.is_definite:
        parts = (noun_phrase(object, government), when, negation(form))
    else:
        parts = (when, noun_phrase(object, government, is_negated=form == "negation"))
    return " ".join(part for part in parts if part)


def be(state: Word, person: means.Person, tense: str) -> str:
    """The state of a person in the word order of a subordinate clause: "müde ist", "Hunger hatte"."""
    verb, word = state.de
    forms = {"sein": (BE, WAS), "haben": (HAVE, HAD)}[verb]
    return f"{word} {forms[tense == 'past'][person]}"


def weather_predicate(weather: Word, tense: str) -> tuple[str, str]:
    """The finite verb and the end of the clause, for weather expressed by a verb or by an adjective."""
    if "verb" in weather.kinds:
        return predicate(weather.de, tense, "3sg")
    return {"present": "ist", "past": "war", "future": "wird"}[tense], weather.de[0]


def occupation_of(subject: means.Phrase, occupation: means.Phrase, is_negated: bool) -> str:
    """The occupation, without an article, but with "kein" under negation: "Ärztin", "keine Ärztin"."""
    if occupation.plural:
        noun, kein = occupation.noun.de[2], "keine "
    elif means.is_female(subject):
        noun, kein = FEMININE_OCCUPATIONS[occupation.noun.name][0], "keine "
    else:
        noun, kein = occupation.noun.de[1], "kein "
    return (kein if is_negated else "") + noun


def noun_phrase(phrase: means.Phrase, case: str = "nominative", is_negated: bool = False) -> str:
    """The phrase in a case; negation turns the article of an indefinite phrase into "kein"."""
    if phrase.is_pronoun:
        return phrase.noun.de[0]
    gender = "pl" if phrase.plural else phrase.noun.de[0]
    noun = inflected_noun(phrase, case)
    if phrase.owner and not phrase.owner.is_pronoun:
        return f"{ARTICLE[case][gender]} {noun} {noun_phrase(phrase.owner, 'genitive')}"
    words = [determiner(phrase, case, gender, is_negated and not phrase.is_definite), noun]
    if phrase.adjective:
        # In the accusative, adjectives take these endings after "ein" and "kein" as well as after numbers.
        stem = phrase.adjective.de[0].replace("teuer", "teur")
        words.insert(1, stem + ENDING[case][gender])
    return " ".join(word for word in words if word)


def determiner(phrase: means.Phrase, case: str, gender: str, is_negated: bool) -> str:
    """The determiner, which precedes adjective and noun; empty if there is none."""
    if phrase.determiner == "the":
        return ARTICLE[case][gender]
    if phrase.determiner == "this":
        return "dies" + ENDING[case][gender]
    if phrase.number and phrase.number.name != "one":
        return phrase.number.de[0]
    if is_negated:
        stem = "kein"
    elif phrase.owner:
        stem = phrase.owner.noun.de[1]
    elif phrase.determiner == "a" or phrase.number:
        stem = "ein"
    else:
        return ""
    return stem if (case, gender) in WITHOUT_ENDING else stem + ENDING[case][gender]


def inflected_noun(phrase: means.Phrase, case: str) -> str:
    """The noun in a case; in the singular, only weak nouns and the genitive differ from the nominative."""
    gender, singular, *others = phrase.noun.de
    if phrase.plural:
        return others[0]
    if gender == "die" or case == "nominative":
        return singular
    if len(others) > 1:
        return others[1]
    if case != "genitive":
        return singular
    has_one_syllable = len(re.findall(r"[aeiouäöü]+", singular.lower())) == 1
    return singular + ("es" if has_one_syllable else "s")


def pronoun(phrase: means.Phrase) -> str:
    """The pronoun that refers back to the phrase, in the gender of its noun."""
    if phrase.is_pronoun:
        return phrase.noun.de[0]
    return "sie" if phrase.plural else {"der": "er", "die": "sie", "das": "es"}[phrase.noun.de[0]]


def at(place: Word) -> str:
    """The place where something is, in the dative."""
    return f"{place.de[2]} {noun_phrase(means.Phrase(place, 'the'), 'dative')}"


def to(place: Word) -> str:
    """The place where someone goes, in the accusative."""
    return f"{place.de[2]} {noun_phrase(means.Phrase(place, 'the'), 'accusative')}"
