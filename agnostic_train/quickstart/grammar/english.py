"""English: verb forms and the auxiliaries of questions and negation, "a" and "an", plurals, possessives."""

import re
from collections.abc import Callable

from agnostic_train.quickstart.grammar import meaning as means
from agnostic_train.quickstart.lexicon import IT, Word

BE = {"1sg": "am", "2sg": "are", "3sg": "is", "1pl": "are", "3pl": "are"}
WAS = {"1sg": "was", "2sg": "were", "3sg": "was", "1pl": "were", "3pl": "were"}
GO = ("go", "went")


def render(meaning: means.Meaning) -> str:
    """The meaning as an English sentence."""
    match meaning:
        case means.Activity(subject, verb, object, time, form):
            return sentence(activity(subject, verb, noun_phrase(object), time, form))
        case means.Scene(subject, action, place, time, form):
            return sentence(clause(subject, action.en, at(place), means.tense_of(time), form), time.name, form=form)
        case means.Journey(subject, place, time, form):
            goes = clause(subject, GO, f"to the {place.name}", means.tense_of(time), form)
            return sentence(goes, time.name, form=form) if form == "question" else sentence(time.name, goes)
        case means.Reason(subject, place, state, time):
            goes_not = clause(subject, GO, f"to the {place.name}", means.tense_of(time), "negation")
            be = (WAS if means.tense_of(time) == "past" else BE)[subject.person]
            return sentence(time.name, goes_not, "because", pronoun(subject), be, state.name)
        case means.Location(thing, relation, landmark, form):
            where = f"{relation.name} {noun_phrase(landmark)}"
            return sentence(be_clause(thing, where, "present", form), form=form)
        case means.Search(thing):
            return sentence("where", BE[thing.person], noun_phrase(thing), form="question")
        case means.Inquiry(subject, verb, time):
            does = clause(subject, verb.en, time.name, means.tense_of(time), "question")
            return sentence("what", does, form="question")
        case means.Ownership(subject, possession, form):
            return sentence(clause(subject, ("have",), noun_phrase(possession), "habitual", form), form=form)
        case means.Description(thing, adjective, form):
            return sentence(be_clause(thing, adjective.name, "present", form), form=form)
        case means.Occupation(subject, occupation, is_wish, form):
            if is_wish:
                return sentence(want_clause(subject, f"become {noun_phrase(occupation)}", form), form=form)
            return sentence(be_clause(subject, noun_phrase(occupation), "present", form), form=form)
        case means.Wish(subject, verb, object, form):
            return sentence(want_clause(subject, f"{verb.name} {noun_phrase(object)}", form), form=form)
        case means.Contrast(subject, liking, other_subject, other_liking, is_opposed):
            likes = clause(subject, ("like",), noun_phrase(liking), "habitual", "statement")
            other_likes = clause(other_subject, ("like",), noun_phrase(other_liking), "habitual", "statement")
            return sentence(f"{likes}, {'but' if is_opposed else 'and'} {other_likes}")
        case means.Request(verb, object, form):
            return sentence("please", "do not" if form == "negation" else "", verb.name, noun_phrase(object))
        case means.OpeningHours(place, verb, hour, weekday, form):
            opens = clause(means.Phrase(place, "the"), verb.en, f"at {hour.name}", "habitual", form)
            on_days = f"on {weekday.name}"
            return sentence(opens, on_days, form=form) if form == "question" else sentence(on_days, opens)
        case means.Weather(weather, place, time, form):
            it, where = means.Phrase(IT), f"{at(place)} {time.name}"
            if "verb" in weather.kinds:
                return sentence(clause(it, weather.en, where, means.tense_of(time), form), form=form)
            return sentence(be_clause(it, f"{weather.name} {where}", means.tense_of(time), form), form=form)


def sentence(*parts: str, form: means.Form = "statement") -> str:
    """Joins the parts that are not empty to one sentence."""
    text = " ".join(part for part in parts if part)
    return text[0].upper() + text[1:] + ("?" if form == "question" else ".")


def activity(subject: means.Phrase, verb: Word, object: str, time: Word, form: means.Form) -> str:
    """A transitive clause with its time; "already" and "yet" call for the perfect."""
    if means.tense_of(time) != "perfect":
        return f"{clause(subject, verb.en, object, means.tense_of(time), form)} {time.name}"
    already, yet = time.en
    who, have = noun_phrase(subject), "has" if subject.person == "3sg" else "have"
    participle = principal_parts(verb.en)[2]
    if form == "negation":
        return f"{who} {have} not {participle} {object} {yet}"
    return f"{who} {have} {already} {participle} {object}"


def clause(subject: means.Phrase, verb: tuple[str, ...], complement: str, tense: str, form: means.Form) -> str:
    """A clause with the auxiliary that its tense and form need: "does not buy", "will buy", "did she buy"."""
    base, past, _ = principal_parts(verb)
    auxiliary, main = {
        "present": (BE[subject.person], progressive(base)),
        "habitual": ("does" if subject.person == "3sg" else "do", base),
        "past": ("did", base),
        "future": ("will", base),
    }[tense]
    who = noun_phrase(subject)
    if form == "question":
        return f"{auxiliary} {who} {main} {complement}"
    if form == "negation":
        return f"{who} {auxiliary} not {main} {complement}"
    if tense == "past":
        return f"{who} {past} {complement}"
    if tense == "habitual":
        return f"{who} {third_person(base) if auxiliary == 'does' else base} {complement}"
    return f"{who} {auxiliary} {main} {complement}"


def be_clause(subject: means.Phrase, complement: str, tense: str, form: means.Form) -> str:
    """A clause with "be": what something is like, or where it is."""
    who, be = noun_phrase(subject), (WAS if tense == "past" else BE)[subject.person]
    if tense == "future":
        be, complement = "will", f"be {complement}"
    if form == "question":
        return f"{be} {who} {complement}"
    return f"{who} {be} {'not ' if form == 'negation' else ''}{complement}"


def want_clause(subject: means.Phrase, wish: str, form: means.Form) -> str:
    """A clause with "want": what someone wants to do."""
    return clause(subject, ("want",), f"to {wish}", "habitual", form)


def principal_parts(verb: tuple[str, ...]) -> tuple[str, str, str]:
    """Base, past and participle; a verb lists its irregular ones: "eat ate eaten", "buy bought"."""
    base = verb[0]
    past = verb[1] if len(verb) > 1 else inflect(base, regular_past)
    participle = verb[2] if len(verb) > 2 else past
    return base, past, participle


def inflect(verb: str, ending: Callable[[str], str]) -> str:
    """The verb with an ending, which in "look for" belongs to the first word."""
    head, *particle = verb.split(" ")
    return " ".join([ending(head), *particle])


def regular_past(verb: str) -> str:
    return verb + ("d" if verb.endswith("e") else "ed")


def third_person(verb: str) -> str:
    if verb == "have":
        return "has"
    return inflect(verb, with_s)


def progressive(verb: str) -> str:
    """The -ing form: "write" loses its e, and "run" doubles its consonant."""

    def with_ing(head: str) -> str:
        if re.fullmatch(r"[^aeiou]+[aeiou][mn]", head):
            head += head[-1]
        return re.sub(r"(?<=[^e])e$", "", head) + "ing"

    return inflect(verb, with_ing)


def with_s(word: str) -> str:
    """The ending that plurals and the third person share: "books", "boxes", "carries"."""
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    return re.sub(r"(?<=[^aeiou])y$", "ie", word) + "s"


def noun_phrase(phrase: means.Phrase) -> str:
    """The phrase with its determiner: "an old hat", "these cups", "my sister's key"."""
    if phrase.is_pronoun:
        return phrase.noun.name
    noun = phrase.noun.name
    if phrase.plural:
        noun = phrase.noun.en[1] if len(phrase.noun.en) > 1 else with_s(noun)
    described = f"{phrase.adjective.name} {noun}" if phrase.adjective else noun
    return f"{determiner(phrase, described)} {described}".strip()


def determiner(phrase: means.Phrase, described: str) -> str:
    """The word before adjective and noun, or the possessor; empty if there is none."""
    if phrase.owner:
        return phrase.owner.noun.en[1] if phrase.owner.is_pronoun else f"{noun_phrase(phrase.owner)}'s"
    if phrase.number:
        return phrase.number.name
    if phrase.determiner == "this":
        return "these" if phrase.plural else "this"
    if phrase.determiner == "a":
        return "an" if described[0] in "aeiou" else "a"
    return "" if phrase.determiner == "none" else "the"


def pronoun(phrase: means.Phrase) -> str:
    """The pronoun that refers back to the phrase."""
    if phrase.is_pronoun:
        return phrase.noun.name
    if phrase.plural:
        return "they"
    return "she" if means.is_female(phrase) else "he"


def at(place: Word) -> str:
    """The place where something happens: "at the market", "in the village"."""
    noun, preposition = place.en
    return f"{preposition} the {noun}"
