"""Chinese: measure words, aspect instead of tense, and the order of time, place and verb."""

from agnostic_train.quickstart.grammar import meaning as means
from agnostic_train.quickstart.lexicon import Word


def render(meaning: means.Meaning) -> str:
    """The meaning as a Chinese sentence."""
    match meaning:
        case means.Activity(subject, verb, object, time, form):
            when = time.zh[-1] if form == "negation" else time.zh[0]
            does = predicate(verb, means.tense_of(time), form)
            object_phrase = noun_phrase(object, is_negated=form == "negation")
            return sentence(noun_phrase(subject), when, does, object_phrase)
        case means.Scene(subject, action, place, time, form):
            before = {
                "present": {"statement": "正", "negation": "没", "question": "正"},
                "habitual": {"statement": "都", "question": "都"},
                "past": {"statement": "", "negation": "没", "question": ""},
                "future": {"statement": "会", "negation": "不会", "question": "会"},
            }[means.tense_of(time)][form]
            after = "了" if means.tense_of(time) == "past" and form == "question" else ""
            here = f"在{at(place)}{action.zh[0]}"
            return sentence(time.zh[0], noun_phrase(subject), before, here, after, form=form)
        case means.Journey(subject, place, time, form):
            return sentence(time.zh[0], noun_phrase(subject), going(place, means.tense_of(time), form), form=form)
        case means.Reason(subject, place, state, time):
            goes_not = going(place, means.tense_of(time), "negation")
            is_so = f"{pronoun(subject)}{state.zh[0]}"
            return sentence(time.zh[0], noun_phrase(subject), goes_not, "，因为", is_so)
        case means.Location(thing, relation, landmark, form):
            where = f"{noun_phrase(landmark)}{relation.zh[0]}"
            return sentence(noun_phrase(thing), "不" if form == "negation" else "", "在", where, form=form)
        case means.Search(thing):
            return sentence(noun_phrase(thing), "在哪里", form="question", particle="")
        case means.Inquiry(subject, verb, time):
            does = predicate(verb, means.tense_of(time), "statement")
            return sentence(noun_phrase(subject), time.zh[0], does, "什么", form="question", particle="")
        case means.Ownership(subject, possession, form):
            has = "没有" if form == "negation" else "有"
            possessed = noun_phrase(possession, is_negated=form != "statement")
            return sentence(noun_phrase(subject), has, possessed, form=form)
        case means.Description(thing, adjective, form):
            return sentence(noun_phrase(thing), adjective_predicate(adjective, form), form=form)
        case means.Occupation(subject, occupation, is_wish, form):
            is_or_wants = ("不" if form == "negation" else "") + ("想当" if is_wish else "是")
            return sentence(noun_phrase(subject), is_or_wants, occupation.noun.zh[0], form=form)
        case means.Wish(subject, verb, object, form):
            wants = ("不想" if form == "negation" else "想") + verb.zh[0]
            object_phrase = noun_phrase(object, is_negated=form == "negation")
            return sentence(noun_phrase(subject), wants, object_phrase, form=form)
        case means.Contrast(subject, liking, other_subject, other_liking, is_opposed):
            likes = f"{noun_phrase(subject)}喜欢{noun_phrase(liking)}"
            other_likes = f"{noun_phrase(other_subject)}喜欢{noun_phrase(other_liking)}"
            return sentence(likes, "，", "但是" if is_opposed else "", other_likes)
        case means.Request(verb, object, form):
            return sentence("请", "不要" if form == "negation" else "", verb.zh[-1], noun_phrase(object))
        case means.OpeningHours(place, verb, hour, weekday, form):
            return sentence(place.zh[0], weekday.zh[0], hour.zh[0], verb.zh[0], form=form)
        case means.Weather(weather, place, time, form):
            is_so = weather_predicate(weather, means.tense_of(time), form)
            return sentence(time.zh[0], at(place), is_so, form=form)


def sentence(*parts: str, form: means.Form = "statement", particle: str = "吗") -> str:
    """One sentence; a question without a question word ends in a particle."""
    return "".join(parts) + (f"{particle}？" if form == "question" else "。")


def predicate(verb: Word, tense: str, form: means.Form) -> str:
    """A transitive verb; its aspect expresses what other languages express by tense."""
    under_way, done = verb.zh[0], verb.zh[-1]
    if form == "negation":
        return {
            "present": f"没在{under_way}",
            "past": f"没{done}",
            "perfect": f"没{done}",
            "future": f"不会{done}",
        }[tense]
    return {
        "present": f"正在{under_way}",
        "habitual": f"都{under_way}",
        "past": f"{done}了",
        "perfect": f"{done}了",
        "future": f"会{done}",
    }[tense]


def going(place: Word, tense: str, form: means.Form) -> str:
    """The verb phrase of going somewhere; a question in the past asks whether it happened, so "了" comes at its end."""
    to_place = f"去{place.zh[0]}"
    if form == "negation":
        return {"past": "没", "future": "不会"}.get(tense, "不") + to_place
    if tense == "past":
        return f"{to_place}了" if form == "question" else f"去了{place.zh[0]}"
    return {"future": "会", "habitual": "都"}.get(tense, "") + to_place


def weather_predicate(weather: Word, tense: str, form: means.Form) -> str:
    """The predicate of weather: rain and wind are verbs, heat and cold adjectives; fog is or is not there."""
    word = weather.zh[0]
    future = {"negation": "不会"}.get(form, "会") if tense == "future" else ""
    if word in ("热", "冷"):
        degree = "" if form == "question" else "很"
        return f"不{word}" if form == "negation" and not future else f"{future}{degree}{word}"
    if future:
        return future + word
    if word.startswith("有"):
        return f"没{word}" if form == "negation" else word
    if form == "negation":
        return f"没{word}"
    return f"{word}了" if tense == "past" else word


def adjective_predicate(adjective: Word, form: means.Form) -> str:
    """The predicate of a description: plain adjectives take "很" in statements, colours take "是"."""
    word = adjective.zh[1]
    link = "是" if word.endswith("的") else ""
    if form == "negation":
        return f"不{link}{word}"
    return (link or ("很" if form == "statement" else "")) + word


def noun_phrase(phrase: means.Phrase, is_negated: bool = False) -> str:
    """The phrase with its measure word; negation leaves out "a", because nothing is counted."""
    noun = phrase.noun.zh[0]
    if phrase.is_pronoun or phrase.is_mass:
        return noun
    if phrase.adjective:
        noun = phrase.adjective.zh[0] + noun
    if phrase.owner:
        return possessive(phrase) + noun
    measure = phrase.noun.zh[1]
    if phrase.number:
        return f"{phrase.number.zh[0]}{measure}{noun}"
    if phrase.determiner == "this":
        return f"这些{noun}" if phrase.plural else f"这{measure}{noun}"
    if phrase.determiner == "a" and not is_negated:
        return f"一{measure}{noun}"
    if phrase.determiner == "the" and "someone" in phrase.noun.kinds:
        if phrase.plural:
            return f"{noun}们"
        # Occupations need no demonstrative: "医生", but "那个女人".
        return noun if "occupation" in phrase.noun.kinds else f"那{measure}{noun}"
    return noun


def possessive(phrase: means.Phrase) -> str:
    """The owner with "的", left out for my or your relatives, and inside a longer possessive ("我妈妈的")."""
    owner = phrase.owner
    assert owner is not None
    if owner.owner:
        return f"{noun_phrase(owner.owner)}{owner.noun.zh[0]}的"
    is_close = "relative" in phrase.noun.kinds and owner.person in ("1sg", "2sg")
    return noun_phrase(owner) + ("" if is_close else "的")


def pronoun(phrase: means.Phrase) -> str:
    """The pronoun that refers back to the phrase."""
    if phrase.is_pronoun:
        return phrase.noun.zh[0]
    return ("她" if means.is_female(phrase) else "他") + ("们" if phrase.plural else "")


def at(place: Word) -> str:
    """The place where something happens; "in" follows its noun."""
    return place.zh[1]
