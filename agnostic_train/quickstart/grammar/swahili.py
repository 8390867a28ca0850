"""Swahili: noun classes and all that agrees with them, verb prefixes, sound changes."""

from agnostic_train.quickstart.grammar import meaning as means
from agnostic_train.quickstart.lexicon import Word

# Verbs agree with the noun class of their subject, or with the person of a pronoun.
Agreement = int | means.Person

# fmt: off
SUBJECT: dict[Agreement, str] = {
    "1sg": "ni", "2sg": "u", "1pl": "tu", "3pl": "wa",
    1: "a", 2: "wa", 3: "u", 4: "i", 5: "li", 6: "ya", 7: "ki", 8: "vi", 9: "i", 10: "zi", 11: "u",
}
# Other negative prefixes put "ha" before the subject prefix.
NEGATIVE_SUBJECT: dict[Agreement, str] = {"1sg": "si", "2sg": "hu", 1: "ha"}
TENSE = {"present": "na", "habitual": "na", "past": "li", "future": "ta", "perfect": "me"}

THIS = {
    1: "huyu", 2: "hawa", 3: "huu", 4: "hii", 5: "hili", 6: "haya",
    7: "hiki", 8: "hivi", 9: "hii", 10: "hizi", 11: "huu",
}
# The beginnings of "my" and "of".
LINK = {1: "w", 2: "w", 3: "w", 4: "y", 5: "l", 6: "y", 7: "ch", 8: "vy", 9: "y", 10: "z", 11: "w"}
# Prefixes of adjectives and numerals, before a consonant and before a vowel. Classes 9 and 10 change the
# consonant itself, as in NASAL.
CONCORD = {
    1: ("m", "mw"), 2: ("wa", "w"), 3: ("m", "mw"), 4: ("mi", "my"), 5: ("", "j"), 6: ("ma", "m"),
    7: ("ki", "ch"), 8: ("vi", "vy"), 9: ("", "ny"), 10: ("", "ny"), 11: ("m", "mw"),
}
# fmt: on
NASAL = {"b": "mb", "d": "nd", "g": "ng", "l": "nd", "r": "nd", "w": "mb", "z": "nz"}
# Irregular forms: "-pya" is too short to go without a prefix, and "-ema" takes "n" instead of "ny".
IRREGULAR_ADJECTIVES = {
    ("-pya", 5): "jipya",
    ("-pya", 9): "mpya",
    ("-pya", 10): "mpya",
    ("-ema", 9): "njema",
    ("-ema", 10): "njema",
}
IRREGULAR_IMPERATIVES = {"leta": "lete"}


def render(meaning: means.Meaning) -> str:
    """The meaning as a Swahili sentence."""
    match meaning:
        case means.Activity(subject, verb, object, time, form):
            tense, is_negated = means.tense_of(time), form == "negation"
            marker = object_marker(object, verb.sw[0])
            does = conjugate(verb.sw, agreement(subject), tense, is_negated, marker)
            if tense == "perfect":
                return sentence(noun_phrase(subject), time.sw[is_negated], does, noun_phrase(object))
            return sentence(noun_phrase(subject), does, noun_phrase(object), time.sw[0])
        case means.Scene(subject, action, place, time, form):
            does = act(action, agreement(subject), means.tense_of(time), form == "negation")
            return sentence(noun_phrase(subject), does, at(place), time.sw[0], form=form)
        case means.Journey(subject, place, time, form):
            goes = go(agreement(subject), means.tense_of(time), form == "negation")
            return sentence(time.sw[0], noun_phrase(subject), goes, at(place), form=form)
        case means.Reason(subject, place, state, time):
            goes_not = go(agreement(subject), means.tense_of(time), is_negated=True)
            is_so = be(state, agreement(subject), means.tense_of(time))
            return sentence(time.sw[0], noun_phrase(subject), goes_not, at(place), "kwa sababu", is_so)
        case means.Location(thing, relation, landmark, form):
            is_at = is_located(thing, form == "negation")
            return sentence(noun_phrase(thing), is_at, relation.sw[0], noun_phrase(landmark), form=form)
        case means.Search(thing):
            return open_question(noun_phrase(thing), is_located(thing), "wapi")
        case means.Inquiry(subject, verb, time):
            does = conjugate(verb.sw, agreement(subject), means.tense_of(time))
            return open_question(noun_phrase(subject), does, "nini", time.sw[0])
        case means.Ownership(subject, possession, form):
            has = subject_prefix(agreement(subject), form == "negation") + "na"
            return sentence(noun_phrase(subject), has, noun_phrase(possession), form=form)
        case means.Description(thing, adjective, form):
            is_or_not = "si" if form == "negation" else "ni"
            return sentence(noun_phrase(thing), is_or_not, concord(adjective, noun_class(thing)), form=form)
        case means.Occupation(subject, occupation, is_wish, form):
            if is_wish:
                wants = want(subject, form == "negation")
                return sentence(noun_phrase(subject), wants, "kuwa", noun_phrase(occupation), form=form)
            is_or_not = "si" if form == "negation" else "ni"
            return sentence(emphatic(subject), is_or_not, noun_phrase(occupation), form=form)
        case means.Wish(subject, verb, object, form):
            wants = want(subject, form == "negation")
            return sentence(noun_phrase(subject), wants, infinitive(verb), noun_phrase(object), form=form)
        case means.Contrast(subject, liking, other_subject, other_liking, is_opposed):
            conjunction = "lakini" if is_opposed else "na"
            return sentence(f"{like(subject, liking)},", conjunction, like(other_subject, other_liking))
        case means.Request(verb, object, form):
            return sentence("tafadhali", imperative(verb, object, form == "negation"), noun_phrase(object))
        case means.OpeningHours(place, verb, hour, weekday, form):
            noun, _, noun_class_number = place.sw
            opens = conjugate(verb.sw, int(noun_class_number), "present")
            return sentence(f"kila {weekday.sw[0]}", noun, opens, hour.sw[0], form=form)
        case means.Weather(weather, place, time, form):
            conditions = weather_clause(weather, means.tense_of(time), form == "negation")
            return sentence(time.sw[0], conditions, at(place), form=form)


def sentence(*parts: str, form: means.Form = "statement") -> str:
    """Joins the parts that are not empty to one sentence; "Je" opens a yes-no question."""
    text = " ".join(part for part in parts if part)
    return f"Je, {text}?" if form == "question" else text[0].upper() + text[1:] + "."


def open_question(*parts: str) -> str:
    """Joins the parts to a question that has a question word."""
    return sentence(*parts)[:-1] + "?"


def agreement(phrase: means.Phrase) -> Agreement:
    """What a verb agrees with: a pronoun's person, or a noun's class."""
    return phrase.person if phrase.is_pronoun else noun_class(phrase)


def noun_class(phrase: means.Phrase, kin: str = "1/2") -> int:
    """The noun class for the phrase's number; `kin` is the class pair of relatives, by default that of people."""
    classes = phrase.noun.sw[2].replace("kin", kin)
    return int(classes.split("/")[phrase.plural])


def subject_prefix(subject: Agreement, is_negated: bool = False) -> str:
    if is_negated:
        return NEGATIVE_SUBJECT.get(subject, "ha" + SUBJECT[subject])
    return SUBJECT[subject]


def conjugate(verb: tuple[str, ...], subject: Agreement, tense: str, is_negated: bool = False, marker: str = "") -> str:
    """A finite verb, with the marker of its object if it has one."""
    stem, *rest = verb[0].split(" ")
    marked = marker + stem
    # A stem of one syllable cannot bear the stress: where nothing else can, it keeps the "ku" of its
    # infinitive.
    stressable = verb[1] if len(verb) > 1 and not marker else marked
    prefix = subject_prefix(subject, is_negated)
    if not is_negated:
        return " ".join([prefix + TENSE[tense] + stressable, *rest])
    negated = {
        "present": with_final(marked, "i"),
        "past": "ku" + marked,
        "future": "ta" + stressable,
        "perfect": "ja" + marked,
    }
    return " ".join([prefix + negated[tense], *rest])


def with_final(stem: str, vowel: str) -> str:
    """The stem with another final vowel; stems that do not end in "a" keep theirs."""
    return stem[:-1] + vowel if stem.endswith("a") else stem


def infinitive(verb: Word) -> str:
    return verb.sw[1] if len(verb.sw) > 1 else "ku" + verb.sw[0]


def imperative(verb: Word, object: means.Phrase, is_negated: bool) -> str:
    """A request to one person; it is a subjunctive if it has an object marker or is negated."""
    stem = verb.sw[0]
    marker = object_marker(object, stem)
    if is_negated:
        return "usi" + marker + with_final(stem, "e")
    if marker:
        return marker + with_final(stem, "e")
    return IRREGULAR_IMPERATIVES.get(stem, verb.sw[-1])


def object_marker(object: means.Phrase, stem: str) -> str:
    """The marker that a verb takes for an animate, definite object; other objects are not marked."""
    is_alive = "person" in object.noun.kinds or "animal" in object.noun.kinds
    if not is_alive or not object.is_definite:
        return ""
    if object.plural:
        return "wa"
    return {"a": "mw", "e": "mw", "i": "mw", "o": "mw", "u": "mu"}.get(stem[0], "m")


def go(subject: Agreement, tense: str, is_negated: bool) -> str:
    return conjugate(("enda", "kwenda"), subject, tense, is_negated)


def want(subject: means.Phrase, is_negated: bool) -> str:
    return conjugate(("taka",), agreement(subject), "present", is_negated)


def like(subject: means.Phrase, liking: means.Phrase) -> str:
    likes = conjugate(("penda",), agreement(subject), "present")
    return f"{emphatic(subject)} {likes} {noun_phrase(liking)}"


def act(action: Word, subject: Agreement, tense: str, is_negated: bool) -> str:
    """The verb of an action; a present state is in the perfect: someone asleep "has fallen asleep"."""
    is_state = len(action.sw) > 1
    if is_state and tense == "present" and not is_negated:
        tense = "perfect"
    return conjugate(action.sw[:1], subject, tense, is_negated)


def be(state: Word, subject: Agreement, tense: str) -> str:
    """The state of a person: "has become tired", "fears", "is with hunger"."""
    kind, word = state.sw
    was = f"{SUBJECT[subject]}likuwa"
    if kind == "with":
        return f"{was} na {word}" if tense == "past" else f"{SUBJECT[subject]}na {word}"
    is_so = SUBJECT[subject] + kind + word
    return f"{was} {is_so}" if tense == "past" else is_so


def is_located(thing: means.Phrase, is_negated: bool = False) -> str:
    """The verb of being somewhere: "kiko", "hakiko"; for one animate being, "yuko"."""
    number = noun_class(thing)
    return ("ha" if is_negated else "") + ("yu" if number == 1 else SUBJECT[number]) + "ko"


def weather_clause(weather: Word, tense: str, is_negated: bool) -> str:
    """A clause about the weather: rain falls and wind blows; of heat, cold and fog, "there is" some."""
    if len(weather.sw) > 1:
        noun, number, stem = weather.sw
        return f"{noun} {conjugate((stem,), int(number), tense, is_negated)}"
    if is_negated:
        there_is = {"present": "hakuna", "past": "hakukuwa na", "future": "hakutakuwa na"}[tense]
    else:
        there_is = {"present": "kuna", "past": "kulikuwa na", "future": "kutakuwa na"}[tense]
    return f"{there_is} {weather.sw[0]}"


def noun_phrase(phrase: means.Phrase) -> str:
    """The noun, then possessive, adjective, number and demonstrative. Pronouns are left out."""
    if phrase.is_pronoun:
        return ""
    words = [phrase.noun.sw[phrase.plural]]
    if phrase.owner:
        words.append(possessive(phrase))
    if phrase.adjective:
        words.append(concord(phrase.adjective, noun_class(phrase)))
    if phrase.number:
        words.append(concord(phrase.number, noun_class(phrase)))
    if phrase.determiner == "this":
        words.append(THIS[noun_class(phrase)])
    return " ".join(words)


def emphatic(phrase: means.Phrase) -> str:
    """The phrase where a pronoun must not be left out: without a verb, or for contrast."""
    return phrase.noun.sw[0] if phrase.is_pronoun else noun_phrase(phrase)


def possessive(phrase: means.Phrase) -> str:
    """The possessive: "changu", or "cha mwalimu"."""
    assert phrase.owner is not None
    link = LINK[noun_class(phrase, kin="9/10")]
    if phrase.owner.is_pronoun:
        return link + phrase.owner.noun.sw[1]
    return f"{link}a {noun_phrase(phrase.owner)}"


def concord(word: Word, number: int) -> str:
    """The form of an adjective or numeral that agrees with a noun class."""
    stem = word.sw[0]
    if not stem.startswith("-"):
        return stem
    if (stem, number) in IRREGULAR_ADJECTIVES:
        return IRREGULAR_ADJECTIVES[stem, number]
    stem = stem[1:]
    before_consonant, before_vowel = CONCORD[number]
    if stem[0] in "aeiou":
        return before_vowel + stem
    if number in (9, 10):
        return NASAL.get(stem[0], stem[0]) + stem[1:]
    return before_consonant + stem


def at(place: Word) -> str:
    """The locative, for being there and for going there."""
    return place.sw[1]
