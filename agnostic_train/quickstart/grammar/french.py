"""French: elision, contraction, partitives, "ne ... pas", agreement of adjectives and participles."""

import re

from agnostic_train.quickstart.grammar import meaning as means
from agnostic_train.quickstart.lexicon import FEMININE_OCCUPATIONS, IT, Word

BE = {"1sg": "suis", "2sg": "es", "3sg": "est", "1pl": "sommes", "3pl": "sont"}
WAS = {"1sg": "étais", "2sg": "étais", "3sg": "était", "1pl": "étions", "3pl": "étaient"}
HAVE = {"1sg": "ai", "2sg": "as", "3sg": "a", "1pl": "avons", "3pl": "ont"}
HAD = {"1sg": "avais", "2sg": "avais", "3sg": "avait", "1pl": "avions", "3pl": "avaient"}
GO = {"1sg": "vais", "2sg": "vas", "3sg": "va", "1pl": "allons", "3pl": "vont"}
FUTURE_ENDING = {"1sg": "ai", "2sg": "as", "3sg": "a", "1pl": "ons", "3pl": "ont"}
WANT = {"1sg": "veux", "2sg": "veux", "3sg": "veut", "1pl": "voulons", "3pl": "veulent"}
LIKE = ("aimer",)

VOWELS = "aeiouyàâéèêëîïôöùûœ"
# A vowel or a silent h elides a preceding vowel; the h of "haricot" counts as a consonant.
ELIDING = rf"(?=[{VOWELS}h])(?!haricots?\b)"
# French sets a narrow no-break space before a question mark.
QUESTION_MARK = "\u202f?"
PLEASE = "s'il te plaît"


def render(meaning: means.Meaning) -> str:
    """The meaning as a French sentence."""
    match meaning:
        case means.Activity(subject, verb, object, time, form):
            finite, rest = predicate(verb.fr, means.tense_of(time), subject.person)
            object_phrase = noun_phrase(object, is_negated=form == "negation")
            if means.tense_of(time) == "perfect":
                already, yet = time.fr
                adverb = yet if form == "negation" else already
                return sentence(noun_phrase(subject), negate(finite, form), adverb, rest, object_phrase)
            return sentence(noun_phrase(subject), negate(finite, form), rest, object_phrase, time.fr[0])
        case means.Scene(subject, action, place, time, form):
            finite, rest = predicate(action.fr, means.tense_of(time), subject.person)
            does = f"{noun_phrase(subject)} {negate(finite, form)}"
            return sentence(does, rest, at(place), time.fr[0], form=form)
        case means.Journey(subject, place, time, form):
            goes = f"{noun_phrase(subject)} {going(subject, means.tense_of(time), form)} {at(place)}"
            if form == "question":
                return sentence(goes, time.fr[0], form=form)
            return sentence(f"{time.fr[0]},", goes)
        case means.Reason(subject, place, state, time):
            goes_not = f"{noun_phrase(subject)} {going(subject, means.tense_of(time), 'negation')} {at(place)}"
            is_so = be(state, subject, means.tense_of(time))
            return sentence(f"{time.fr[0]},", goes_not, "parce que", pronoun(subject), is_so)
        case means.Location(thing, relation, landmark, form):
            is_at = negate(BE[thing.person], form)
            return sentence(noun_phrase(thing), is_at, relation.fr[0], noun_phrase(landmark), form=form)
        case means.Search(thing):
            return open_question("où", BE[thing.person], noun_phrase(thing))
        case means.Inquiry(subject, verb, time):
            finite, rest = predicate(verb.fr, means.tense_of(time), subject.person)
            return open_question("qu'est-ce que", noun_phrase(subject), finite, rest, time.fr[0])
        case means.Ownership(subject, possession, form):
            has = negate(HAVE[subject.person], form)
            possessed = noun_phrase(possession, is_negated=form == "negation")
            return sentence(noun_phrase(subject), has, possessed, form=form)
        case means.Description(thing, adjective, form):
            is_so = negate(BE[thing.person], form)
            described = agreeing(adjective.fr[1:3], gender(thing) == "f", thing.plural)
            return sentence(noun_phrase(thing), is_so, described, form=form)
        case means.Occupation(subject, occupation, is_wish, form):
            verb_forms, rest = (WANT, "devenir") if is_wish else (BE, "")
            occupation_phrase = occupation_of(subject, occupation)
            return sentence(
                noun_phrase(subject), negate(verb_forms[subject.person], form), rest, occupation_phrase, form=form
            )
        case means.Wish(subject, verb, object, form):
            wants = negate(WANT[subject.person], form)
            object_phrase = noun_phrase(object, is_negated=form == "negation")
            return sentence(noun_phrase(subject), wants, verb.fr[0], object_phrase, form=form)
        case means.Contrast(subject, liking, other_subject, other_liking, is_opposed):
            likes = f"{noun_phrase(subject)} {present(LIKE, subject.person)} {in_general(liking)}"
            other_likes = f"{present(LIKE, other_subject.person)} {in_general(other_liking)}"
            conjunction = ", mais" if is_opposed else " et"
            return sentence(f"{likes}{conjunction}", noun_phrase(other_subject), other_likes)
        case means.Request(verb, object, form):
            object_phrase = noun_phrase(object, is_negated=form == "negation")
            return sentence(negate(present(verb.fr, "1sg"), form), f"{object_phrase}, {PLEASE}")
        case means.OpeningHours(place, verb, hour, weekday, form):
            opens = f"{noun_phrase(means.Phrase(place, 'the'))} {verb.fr[0]} à {hour.fr[0]}"
            on_days = f"le {weekday.fr[0]}"
            if form == "question":
                return sentence(opens, on_days, form=form)
            return sentence(f"{on_days},", opens)
        case means.Weather(weather, place, time, form):
            conditions = f"{IT.fr[0]} {weather_predicate(weather, means.tense_of(time), form)} {at(place)}"
            if form == "question":
                return sentence(conditions, time.fr[0], form=form)
            return sentence(f"{time.fr[0]},", conditions)


def sentence(*parts: str, form: means.Form = "statement") -> str:
    """Joins the parts that are not empty to one sentence; "est-ce que" turns a statement into a question."""
    if form == "question":
        return open_question("est-ce que", *parts)
    return finish(parts) + "."


def open_question(*parts: str) -> str:
    """Joins the parts to a question that begins with its question word."""
    return finish(parts) + QUESTION_MARK


def finish(parts: tuple[str, ...]) -> str:
    """Joins the parts, with elision ("l'eau") and contraction of the remaining articles ("du pain")."""
    text = " ".join(part for part in parts if part)
    text = re.sub(rf"\b([ldnj]e|la|que) {ELIDING}", lambda match: match[1][:-1] + "'", text)
    for preposition, article, contracted in (("de", "le", "du"), ("de", "les", "des"), ("à", "le", "au")):
        text = re.sub(rf"\b{preposition} {article}\b", contracted, text)
    return text[0].upper() + text[1:]


def negate(finite: str, form: means.Form) -> str:
    return f"ne {finite} pas" if form == "negation" else finite


def predicate(verb: tuple[str, ...], tense: str, person: means.Person) -> tuple[str, str]:
    """The finite verb, which negation surrounds, and the participle or infinitive that follows it."""
    if verb[0] == "chercher" and tense == "future":
        # "Va chercher" would mean "fetches", not "is going to look for".
        return verb[0] + FUTURE_ENDING[person], ""
    if tense == "future":
        return GO[person], verb[0]
    if tense in ("past", "perfect"):
        return HAVE[person], verb[3] if len(verb) > 1 else verb[0][:-2] + "é"
    return present(verb, person), ""


def present(verb: tuple[str, ...], person: means.Person) -> str:
    """The present, from the forms listed for a verb; one with only an infinitive is conjugated like "aimer"."""
    first = verb[1] if len(verb) > 1 else verb[0][:-1]
    stem = verb[2] if len(verb) > 1 else verb[0][:-2]
    takes_e = first.endswith("e")
    if person == "1pl":
        return stem + "ons"
    if person == "3pl":
        return first + "nt" if takes_e else (verb[4] if len(verb) > 4 else stem) + "ent"
    if person == "2sg":
        return first + "s" if takes_e else first
    if person == "3sg" and not takes_e:
        return first[:-1] + ("" if first[-2] in "dt" else "t")
    return first


def going(subject: means.Phrase, tense: str, form: means.Form) -> str:
    """The verb phrase of going somewhere; the past takes "être", and its participle agrees."""
    if tense == "past":
        gone = agreeing(("allé", "allée"), gender(subject) == "f", subject.person.endswith("pl"))
        return f"{negate(BE[subject.person], form)} {gone}"
    return negate("ir" + FUTURE_ENDING[subject.person] if tense == "future" else GO[subject.person], form)


def be(state: Word, subject: means.Phrase, tense: str) -> str:
    """The predicate of a state: "est fatiguée", "avait faim"."""
    verb, *words = state.fr
    if verb == "avoir":
        return f"{(HAD if tense == 'past' else HAVE)[subject.person]} {words[0]}"
    state_word = agreeing(tuple(words), gender(subject) == "f", subject.person.endswith("pl"))
    return f"{(WAS if tense == 'past' else BE)[subject.person]} {state_word}"


def weather_predicate(weather: Word, tense: str, form: means.Form) -> str:
    """The predicate of weather: a verb for rain and snow, "faire" for warmth ("il fait chaud"), "y avoir" for wind."""
    if "verb" in weather.kinds:
        infinitive, now, participle = weather.fr
        finite, rest = {
            "present": (now, ""),
            "past": (HAVE["3sg"], participle),
            "future": (GO["3sg"], infinitive),
        }[tense]
        return f"{negate(finite, form)} {rest}".strip()
    verb, complement = weather.fr
    if form == "negation":
        complement = complement.replace("du ", "de ")
    infinitive, now, then = {
        "faire": ("faire", "fait", "faisait"),
        "avoir": ("y avoir", "y a", "y avait"),
    }[verb]
    if tense == "future":
        return f"{negate(GO['3sg'], form)} {infinitive} {complement}"
    return f"{negate(then if tense == 'past' else now, form)} {complement}"


def occupation_of(subject: means.Phrase, occupation: means.Phrase) -> str:
    """The occupation, without an article, in the subject's gender and the phrase's number."""
    if occupation.plural:
        return plural(occupation.noun.fr[1])
    return FEMININE_OCCUPATIONS[occupation.noun.name][1] if means.is_female(subject) else occupation.noun.fr[1]


def noun_phrase(phrase: means.Phrase, is_negated: bool = False) -> str:
    """The phrase with its determiner; negation replaces the determiner of an indefinite phrase by "de"."""
    if phrase.is_pronoun:
        return phrase.noun.fr[0]
    noun = described_noun(phrase)
    if is_negated and not phrase.is_definite:
        return f"de {noun}"
    if phrase.owner and not phrase.owner.is_pronoun:
        return f"{definite_article(phrase)} {noun} de {noun_phrase(phrase.owner)}"
    return f"{determiner(phrase, noun)} {noun}"


def determiner(phrase: means.Phrase, noun: str) -> str:
    """The determiner, which precedes adjective and noun."""
    is_feminine = gender(phrase) == "f"
    elides = re.match(ELIDING, noun) is not None
    if phrase.owner:
        _, masculine, feminine, plural_form = phrase.owner.noun.fr
        return plural_form if phrase.plural else feminine if is_feminine and not elides else masculine
    if phrase.determiner == "this":
        return "ces" if phrase.plural else "cette" if is_feminine else "cet" if elides else "ce"
    if phrase.determiner == "the":
        return definite_article(phrase)
    if phrase.number and phrase.number.name != "one":
        return phrase.number.fr[0]
    if phrase.is_mass:
        return f"de {definite_article(phrase)}"
    return "une" if is_feminine else "un"


def definite_article(phrase: means.Phrase) -> str:
    if phrase.plural:
        return "les"
    return {"m": "le", "f": "la", "pl": "les"}[gender(phrase)]


def in_general(phrase: means.Phrase) -> str:
    """What someone likes, with the definite article."""
    return f"{definite_article(phrase)} {described_noun(phrase)}"


def described_noun(phrase: means.Phrase) -> str:
    """The noun with its adjective, before or after it."""
    noun = phrase.noun.fr[1]
    if phrase.plural:
        noun = phrase.noun.fr[2] if len(phrase.noun.fr) > 2 else plural(noun)
    if not phrase.adjective:
        return noun
    position, *forms = phrase.adjective.fr
    adjective = agreeing(tuple(forms[:2]), gender(phrase) == "f", phrase.plural)
    if position == "after":
        return f"{noun} {adjective}"
    if len(forms) > 2 and adjective == forms[0] and not phrase.plural and re.match(ELIDING, noun):
        adjective = forms[2]
    return f"{adjective} {noun}"


def agreeing(forms: tuple[str, ...], is_feminine: bool, is_plural: bool) -> str:
    """The masculine or feminine form of an adjective or participle, in singular or plural."""
    form = forms[1] if is_feminine else forms[0]
    return plural(form) if is_plural else form


def plural(word: str) -> str:
    if word.endswith(("s", "x", "z")):
        return word
    if word.endswith("eau"):
        return word + "x"
    return re.sub("al$", "aux", word) if word.endswith("al") else word + "s"


def gender(phrase: means.Phrase) -> str:
    """The gender of the noun; a pronoun counts as masculine."""
    return "m" if phrase.is_pronoun else phrase.noun.fr[0]


def pronoun(phrase: means.Phrase) -> str:
    """The pronoun that refers back to the phrase, in the gender of its noun."""
    if phrase.is_pronoun:
        return phrase.noun.fr[0]
    return {"m": "il", "f": "elle"}[gender(phrase)] + ("s" if phrase.plural else "")


def at(place: Word) -> str:
    """The place where something is or where someone goes; French says both in the same way."""
    _, noun, preposition = place.fr
    return f"{preposition} {noun if preposition == 'en' else noun_phrase(means.Phrase(place, 'the'))}"
