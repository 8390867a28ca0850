"""The phrasebook corpus: its splits, and example sentences that speakers of the languages can check."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import get_args

import pytest

from agnostic_train.quickstart import lexicon, tiny_model
from agnostic_train.quickstart.grammar import meaning as means
from agnostic_train.quickstart.grammar.meaning import Phrase
from agnostic_train.quickstart.grammar.swahili import concord
from agnostic_train.quickstart.lexicon import Word
from agnostic_train.quickstart.phrasebook import (
    LANGUAGES,
    PATTERNS,
    RENDERERS,
    draw_entries,
    phrasebook,
    write_phrasebook,
)

SIZES = {"train": 6000, "valid": 400, "test": 400}
TABLES = {
    name: table for name, table in vars(lexicon).items() if isinstance(table, tuple) and isinstance(table[0], Word)
}


@pytest.fixture(scope="module")
def entries():
    return draw_entries(0, SIZES)


@pytest.fixture(scope="module")
def sentences(entries):
    """All sentences of all splits, by language."""
    return {
        language: [entry.sentences[language] for drawn in entries.values() for entry in drawn] for language in LANGUAGES
    }


def test_same_seed_draws_the_same_phrasebook_and_another_seed_a_different_one():
    drawn = phrasebook(seed=3, num_train=123, num_valid=42, num_test=6)
    assert drawn == phrasebook(seed=3, num_train=123, num_valid=42, num_test=6)
    other = phrasebook(seed=4, num_train=123, num_valid=42, num_test=6)
    assert all(drawn["train"][language] != other["train"][language] for language in LANGUAGES)


def test_draw_does_not_depend_on_the_hash_seed_of_the_process():
    program = (
        "from agnostic_train.quickstart.phrasebook import phrasebook;"
        "print(ascii(phrasebook(seed=3, num_train=123, num_valid=42, num_test=6)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "6" if os.environ.get("PYTHONHASHSEED") != "6" else "42"},
        check=True,
        capture_output=True,
        text=True,
    )
    # The last line only: libraries may print a banner to standard output first.
    printed = process.stdout.splitlines()[-1]
    assert printed == ascii(phrasebook(seed=3, num_train=123, num_valid=42, num_test=6))


def test_sizes_and_languages_are_as_requested():
    drawn = phrasebook(seed=0, num_train=123, num_valid=42, num_test=6)
    assert LANGUAGES == ("en", "zh", "sw", "de", "fr")
    for split, num_wanted in {"train": 123, "valid": 42, "test": 6}.items():
        assert tuple(drawn[split]) == LANGUAGES
        assert {len(lines) for lines in drawn[split].values()} == {num_wanted}


def test_no_sentence_occurs_twice_in_any_split(entries, sentences):
    assert {split: len(drawn) for split, drawn in entries.items()} == SIZES
    for lines in sentences.values():
        assert len(set(lines)) == len(lines) == sum(SIZES.values())


def test_splits_share_no_meaning(entries):
    fillings = [{(entry.pattern, entry.filling) for entry in drawn} for drawn in entries.values()]
    assert len(set.union(*fillings)) == sum(map(len, fillings))


def test_every_split_has_every_pattern(entries):
    for drawn in entries.values():
        assert {entry.pattern for entry in drawn} == {pattern.name for pattern in PATTERNS}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_covers_the_lexicon(seed):
    drawn = draw_entries(seed, SIZES)["train"]
    covered = {name for entry in drawn for name in entry.filling}
    # Times and numbers vary within a filling, so they are looked for in the sentences.
    varying = lexicon.TIMES + lexicon.WEEKDAYS + lexicon.NUMBERS
    words = {word for table in TABLES.values() for word in table}
    assert {word.name for word in words.difference(varying)} <= covered
    text = " ".join(entry.sentences["en"] for entry in drawn)
    for word in varying:
        assert re.search(rf"\b{word.name}\b", text, re.IGNORECASE), word.name


def test_lexicon_rows_are_complete_and_have_unique_names():
    for table in TABLES.values():
        assert len({word.name for word in table}) == len(table)
        assert all(word.zh and word.sw and word.de and word.fr for word in table)


def test_error_for_too_few_meanings_names_the_split(monkeypatch):
    few = [pattern for pattern in PATTERNS if pattern.name == "weather"]
    monkeypatch.setattr("agnostic_train.quickstart.phrasebook.PATTERNS", few)
    with pytest.raises(ValueError, match=r"valid: 1234 meanings wanted, but its share has only \d+"):
        phrasebook(seed=0, num_train=42, num_valid=1234, num_test=6)


def test_concurrent_first_users_create_the_corpus_only_once(tmp_path, monkeypatch):
    monkeypatch.setenv("AGNOSTIC_TRAIN_CACHE", str(tmp_path))
    folders_written = []

    def slowly(folder, seed):
        sleep(0.2)
        (folder / "en.train.txt").write_text("a")
        folders_written.append(folder)

    monkeypatch.setattr(tiny_model, "write_phrasebook", slowly)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: tiny_model.quickstart_corpus(), range(4)))
    assert len(folders_written) == 1 and len(set(folders)) == 1 and (folders[0] / "en.train.txt").read_text() == "a"


def test_files_hold_one_sentence_per_line(tmp_path):
    write_phrasebook(tmp_path / "corpus", seed=0)
    drawn = phrasebook(seed=0)
    for split in SIZES:
        for language in LANGUAGES:
            text = (tmp_path / "corpus" / f"{language}.{split}.txt").read_bytes().decode("utf-8")
            assert text == "\n".join(drawn[split][language]) + "\n"


def test_sentences_are_clean(sentences):
    endings = {"en": "[.?]", "zh": "[。？]", "sw": "[.?]", "de": "[.?]", "fr": r"(\.|\u202f\?)"}
    for language, lines in sentences.items():
        for line in lines:
            assert re.fullmatch(rf".*\w{endings[language]}", line), line
            assert line[0] == line[0].upper(), line
            assert not re.search(r"\s\s|\s[.,。，]|[ ?]\?|[_{}|+\-/*]{2}|[_{}|+/*]|None", line), line


def test_chinese_has_neither_spaces_nor_ascii(sentences):
    assert not any(re.search(r"[\s!-~]", line) for line in sentences["zh"])


def test_other_languages_have_no_chinese_and_elide_and_contract(sentences):
    for language in ("en", "sw", "de", "fr"):
        assert not any(re.search(r"[\u3000-\u9fff]", line) for line in sentences[language])
    assert not any(re.search(r"\b(in|an) (dem|das)\b", line) for line in sentences["de"])
    for line in sentences["fr"]:
        assert not re.search(r"\b(de les?|à les?)\b|\b([ldnj]e|la|que) [aeiouéêœ]", line, re.IGNORECASE), line


def find(name: str, *tables: tuple[Word, ...]) -> Word:
    return next(word for table in tables for word in table if word.name == name)


def noun(name: str) -> Word:
    return find(name, lexicon.RELATIVES, lexicon.PEOPLE, lexicon.ANIMALS, lexicon.THINGS, lexicon.FOODS)


def verb(name: str) -> Word:
    return find(name, lexicon.VERBS)


def action(name: str) -> Word:
    return find(name, lexicon.ACTIONS)


def adjective(name: str) -> Word:
    return find(name, lexicon.ADJECTIVES)


def place(name: str) -> Word:
    return find(name, lexicon.PLACES)


def time(name: str) -> Word:
    return find(name, lexicon.TIMES)


def state(name: str) -> Word:
    return find(name, lexicon.STATES)


def relation(name: str) -> Word:
    return find(name, lexicon.RELATIONS)


def number(name: str) -> Word:
    return find(name, lexicon.NUMBERS)


ME, YOU, WE, THEY = (Phrase(pronoun) for pronoun in lexicon.PRONOUNS)


def my(name: str, **choices) -> Phrase:
    return Phrase(noun(name), owner=ME, **choices)


def the(name: str, **choices) -> Phrase:
    return Phrase(noun(name), "the", **choices)


def this(name: str, **choices) -> Phrase:
    return Phrase(noun(name), "this", **choices)


def a(name: str, adjective_name: str | None = None) -> Phrase:
    return Phrase(noun(name), "a", adjective=adjective(adjective_name) if adjective_name else None)


def count(number_name: str, name: str, adjective_name: str | None = None) -> Phrase:
    described = adjective(adjective_name) if adjective_name else None
    return Phrase(noun(name), plural=number_name != "one", number=number(number_name), adjective=described)


# Written by hand: each meaning in English, Chinese, Swahili, German and French. {q} stands for a narrow no-break
# space and a question mark.
GOLDEN = [
    (
        means.Activity(my("sister"), verb("buy"), a("hat"), time("yesterday"), "statement"),
        "My sister bought a hat yesterday.",
        "我姐姐昨天买了一顶帽子。",
        "Dada yangu alinunua kofia jana.",
        "Meine Schwester hat gestern einen Hut gekauft.",
        "Ma sœur a acheté un chapeau hier.",
    ),
    (
        means.Activity(WE, verb("drink"), Phrase(noun("water")), time("already"), "negation"),
        "We have not drunk water yet.",
        "我们还没喝水。",
        "Bado hatujanywa maji.",
        "Wir haben noch kein Wasser getrunken.",
        "Nous n'avons pas encore bu d'eau.",
    ),
    (
        means.Activity(THEY, verb("eat"), Phrase(noun("beans")), time("already"), "statement"),
        "They have already eaten beans.",
        "他们已经吃了豆子。",
        "Tayari wamekula maharagwe.",
        "Sie haben schon Bohnen gegessen.",
        "Ils ont déjà mangé des haricots.",
    ),
    (
        means.Activity(ME, verb("eat"), Phrase(noun("beans")), time("tomorrow"), "negation"),
        "I will not eat beans tomorrow.",
        "我明天不会吃豆子。",
        "Sitakula maharagwe kesho.",
        "Ich werde morgen keine Bohnen essen.",
        "Je ne vais pas manger de haricots demain.",
    ),
    (
        means.Activity(the("child"), verb("help"), the("doctor"), time("now"), "negation"),
        "The child is not helping the doctor now.",
        "那个孩子现在没在帮助医生。",
        "Mtoto hamsaidii daktari sasa.",
        "Das Kind hilft dem Arzt jetzt nicht.",
        "L'enfant n'aide pas le médecin maintenant.",
    ),
    (
        means.Activity(the("man"), verb("invite"), my("neighbour"), time("tomorrow"), "statement"),
        "The man will invite my neighbour tomorrow.",
        "那个男人明天会邀请我邻居。",
        "Mwanamume atamwalika jirani yangu kesho.",
        "Der Mann wird meinen Nachbarn morgen einladen.",
        "L'homme va inviter mon voisin demain.",
    ),
    (
        means.Activity(YOU, verb("wait for"), the("lawyer"), time("yesterday"), "negation"),
        "You did not wait for the lawyer yesterday.",
        "你昨天没等律师。",
        "Hukumsubiri mwanasheria jana.",
        "Du hast gestern nicht auf den Anwalt gewartet.",
        "Tu n'as pas attendu l'avocat hier.",
    ),
    (
        means.Activity(
            the("farmer", plural=True), verb("sell"), this("cow", plural=True), time("last week"), "statement"
        ),
        "The farmers sold these cows last week.",
        "农民们上周卖了这些牛。",
        "Wakulima waliwauza ng'ombe hawa wiki iliyopita.",
        "Die Bauern haben diese Kühe letzte Woche verkauft.",
        "Les agriculteurs ont vendu ces vaches la semaine dernière.",
    ),
    (
        means.Activity(the("writer"), verb("look for"), this("key"), time("tomorrow"), "statement"),
        "The writer will look for this key tomorrow.",
        "作家明天会找这把钥匙。",
        "Mwandishi atatafuta ufunguo huu kesho.",
        "Der Schriftsteller wird diesen Schlüssel morgen suchen.",
        "L'écrivain cherchera cette clé demain.",
    ),
    (
        means.Scene(the("cow"), action("sleep"), place("garden"), time("now"), "statement"),
        "The cow is sleeping in the garden now.",
        "现在牛正在花园里睡觉。",
        "Ng'ombe amelala bustanini sasa.",
        "Die Kuh schläft jetzt im Garten.",
        "La vache dort dans le jardin maintenant.",
    ),
    (
        means.Scene(the("girl", plural=True), action("swim"), place("lake"), time("yesterday"), "question"),
        "Did the girls swim in the lake yesterday?",
        "昨天女孩们在湖里游泳了吗？",
        "Je, wasichana waliogelea ziwani jana?",
        "Sind die Mädchen gestern im See geschwommen?",
        "Est-ce que les filles ont nagé dans le lac hier{q}",
    ),
    (
        means.Journey(my("mother"), place("hospital"), time("yesterday"), "statement"),
        "Yesterday my mother went to the hospital.",
        "昨天我妈妈去了医院。",
        "Jana mama yangu alikwenda hospitalini.",
        "Gestern ist meine Mutter ins Krankenhaus gegangen.",
        "Hier, ma mère est allée à l'hôpital.",
    ),
    (
        means.Journey(THEY, place("market"), time("tomorrow"), "question"),
        "Will they go to the market tomorrow?",
        "明天他们会去市场吗？",
        "Je, kesho watakwenda sokoni?",
        "Werden sie morgen auf den Markt gehen?",
        "Est-ce qu'ils iront au marché demain{q}",
    ),
    (
        means.Reason(the("woman", plural=True), place("bank"), state("tired"), time("yesterday")),
        "Yesterday the women did not go to the bank because they were tired.",
        "昨天女人们没去银行，因为她们很累。",
        "Jana wanawake hawakuenda benki kwa sababu walikuwa wamechoka.",
        "Gestern sind die Frauen nicht in die Bank gegangen, weil sie müde waren.",
        "Hier, les femmes ne sont pas allées à la banque parce qu'elles étaient fatiguées.",
    ),
    (
        means.Reason(ME, place("school"), state("hungry"), time("today")),
        "Today I am not going to the school because I am hungry.",
        "今天我不去学校，因为我很饿。",
        "Leo siendi shuleni kwa sababu nina njaa.",
        "Heute gehe ich nicht in die Schule, weil ich Hunger habe.",
        "Aujourd'hui, je ne vais pas à l'école parce que j'ai faim.",
    ),
    (
        means.Location(the("spoon", plural=True), relation("next to"), the("bed"), "negation"),
        "The spoons are not next to the bed.",
        "勺子不在床旁边。",
        "Vijiko haviko kando ya kitanda.",
        "Die Löffel sind nicht neben dem Bett.",
        "Les cuillères ne sont pas à côté du lit.",
    ),
    (
        means.Location(Phrase(noun("dog"), owner=WE), relation("behind"), the("tree"), "question"),
        "Is our dog behind the tree?",
        "我们的狗在树后面吗？",
        "Je, mbwa wetu yuko nyuma ya mti?",
        "Ist unser Hund hinter dem Baum?",
        "Est-ce que notre chien est derrière l'arbre{q}",
    ),
    (
        means.Search(Phrase(noun("shirt"), owner=the("boy"))),
        "Where is the boy's shirt?",
        "那个男孩的衬衫在哪里？",
        "Shati la mvulana liko wapi?",
        "Wo ist das Hemd des Jungen?",
        "Où est la chemise du garçon{q}",
    ),
    (
        means.Search(Phrase(noun("key"), plural=True, owner=my("friend"))),
        "Where are my friend's keys?",
        "我朋友的钥匙在哪里？",
        "Funguo za rafiki yangu ziko wapi?",
        "Wo sind die Schlüssel meines Freundes?",
        "Où sont les clés de mon ami{q}",
    ),
    (
        means.Inquiry(YOU, verb("read"), time("now")),
        "What are you reading now?",
        "你现在正在读什么？",
        "Unasoma nini sasa?",
        "Was liest du jetzt?",
        "Qu'est-ce que tu lis maintenant{q}",
    ),
    (
        means.Ownership(my("aunt"), count("two", "sister"), "statement"),
        "My aunt has two sisters.",
        "我姑姑有两个姐姐。",
        "Shangazi yangu ana dada wawili.",
        "Meine Tante hat zwei Schwestern.",
        "Ma tante a deux sœurs.",
    ),
    (
        means.Ownership(ME, count("one", "umbrella"), "statement"),
        "I have one umbrella.",
        "我有一把雨伞。",
        "Nina mwavuli mmoja.",
        "Ich habe einen Schirm.",
        "J'ai un parapluie.",
    ),
    (
        means.Ownership(THEY, a("horse"), "negation"),
        "They do not have a horse.",
        "他们没有马。",
        "Hawana farasi.",
        "Sie haben kein Pferd.",
        "Ils n'ont pas de cheval.",
    ),
    (
        means.Description(this("hippo", plural=True), adjective("big"), "statement"),
        "These hippos are big.",
        "这些河马很大。",
        "Viboko hawa ni wakubwa.",
        "Diese Nilpferde sind groß.",
        "Ces hippopotames sont grands.",
    ),
    (
        means.Description(this("news"), adjective("good"), "question"),
        "Is this news good?",
        "这个消息好吗？",
        "Je, habari hii ni njema?",
        "Ist diese Nachricht gut?",
        "Est-ce que cette nouvelle est bonne{q}",
    ),
    (
        means.Description(my("box"), adjective("light"), "negation"),
        "My box is not light.",
        "我的箱子不轻。",
        "Sanduku langu si jepesi.",
        "Meine Kiste ist nicht leicht.",
        "Ma caisse n'est pas légère.",
    ),
    (
        means.Occupation(my("aunt"), a("doctor"), False, "statement"),
        "My aunt is a doctor.",
        "我姑姑是医生。",
        "Shangazi yangu ni daktari.",
        "Meine Tante ist Ärztin.",
        "Ma tante est médecin.",
    ),
    (
        means.Occupation(WE, Phrase(noun("engineer"), plural=True), True, "negation"),
        "We do not want to become engineers.",
        "我们不想当工程师。",
        "Hatutaki kuwa wahandisi.",
        "Wir wollen keine Ingenieure werden.",
        "Nous ne voulons pas devenir ingénieurs.",
    ),
    (
        means.Wish(ME, verb("buy"), a("cupboard", "beautiful"), "statement"),
        "I want to buy a beautiful cupboard.",
        "我想买一个漂亮的柜子。",
        "Ninataka kununua kabati zuri.",
        "Ich will einen schönen Schrank kaufen.",
        "Je veux acheter une belle armoire.",
    ),
    (
        means.Wish(the("child", plural=True), verb("buy"), count("three", "cup", "red"), "statement"),
        "The children want to buy three red cups.",
        "孩子们想买三个红色的杯子。",
        "Watoto wanataka kununua vikombe vyekundu vitatu.",
        "Die Kinder wollen drei rote Tassen kaufen.",
        "Les enfants veulent acheter trois tasses rouges.",
    ),
    (
        means.Wish(my("uncle"), verb("buy"), a("donkey", "beautiful"), "negation"),
        "My uncle does not want to buy a beautiful donkey.",
        "我舅舅不想买漂亮的驴。",
        "Mjomba wangu hataki kununua punda mzuri.",
        "Mein Onkel will keinen schönen Esel kaufen.",
        "Mon oncle ne veut pas acheter de bel âne.",
    ),
    (
        means.Wish(my("daughter"), verb("sell"), a("shirt", "old"), "question"),
        "Does my daughter want to sell an old shirt?",
        "我女儿想卖一件旧衬衫吗？",
        "Je, binti yangu anataka kuuza shati kuukuu?",
        "Will meine Tochter ein altes Hemd verkaufen?",
        "Est-ce que ma fille veut vendre une vieille chemise{q}",
    ),
    (
        means.Contrast(my("father"), Phrase(noun("coffee")), ME, Phrase(noun("mango"), plural=True), True),
        "My father likes coffee, but I like mangoes.",
        "我爸爸喜欢咖啡，但是我喜欢芒果。",
        "Baba yangu anapenda kahawa, lakini mimi ninapenda maembe.",
        "Mein Vater mag Kaffee, aber ich mag Mangos.",
        "Mon père aime le café, mais j'aime les mangues.",
    ),
    (
        means.Request(verb("open"), this("window"), "negation"),
        "Please do not open this window.",
        "请不要打开这扇窗户。",
        "Tafadhali usifungue dirisha hili.",
        "Bitte mach dieses Fenster nicht auf.",
        "N'ouvre pas cette fenêtre, s'il te plaît.",
    ),
    (
        means.Request(verb("thank"), my("mother"), "statement"),
        "Please thank my mother.",
        "请感谢我妈妈。",
        "Tafadhali mshukuru mama yangu.",
        "Bitte danke meiner Mutter.",
        "Remercie ma mère, s'il te plaît.",
    ),
    (
        means.Request(verb("bring"), count("two", "chair"), "statement"),
        "Please bring two chairs.",
        "请拿来两把椅子。",
        "Tafadhali lete viti viwili.",
        "Bitte bring zwei Stühle.",
        "Apporte deux chaises, s'il te plaît.",
    ),
    (
        means.OpeningHours(
            place("factory"),
            find("open", lexicon.OPENING_HOURS),
            find("seven in the morning", lexicon.HOURS),
            find("Mondays", lexicon.WEEKDAYS),
            "statement",
        ),
        "On Mondays the factory opens at seven in the morning.",
        "工厂星期一早上七点开门。",
        "Kila Jumatatu kiwanda kinafunguliwa saa moja asubuhi.",
        "Montags öffnet die Fabrik um sieben Uhr morgens.",
        "Le lundi, l'usine ouvre à sept heures du matin.",
    ),
    (
        means.Weather(find("rain", lexicon.WEATHERS), place("village"), time("yesterday"), "negation"),
        "It did not rain in the village yesterday.",
        "昨天村子里没下雨。",
        "Jana mvua haikunyesha kijijini.",
        "Gestern hat es im Dorf nicht geregnet.",
        "Hier, il n'a pas plu au village.",
    ),
    (
        means.Weather(find("windy", lexicon.WEATHERS), place("beach"), time("tomorrow"), "statement"),
        "It will be windy on the beach tomorrow.",
        "明天海滩上会刮风。",
        "Kesho upepo utavuma ufukweni.",
        "Morgen wird es am Strand windig.",
        "Demain, il va y avoir du vent à la plage.",
    ),
    (
        means.Weather(find("foggy", lexicon.WEATHERS), place("island"), time("today"), "negation"),
        "It is not foggy on the island today.",
        "今天岛上没有雾。",
        "Leo hakuna ukungu kisiwani.",
        "Heute ist es auf der Insel nicht neblig.",
        "Aujourd'hui, il n'y a pas de brouillard sur l'île.",
    ),
]


def test_every_kind_of_meaning_has_a_handwritten_example():
    assert {type(example[0]) for example in GOLDEN} == set(get_args(means.Meaning))


@pytest.mark.parametrize(("meaning", "en", "zh", "sw", "de", "fr"), GOLDEN)
def test_renderers_reproduce_the_handwritten_sentences(meaning, en, zh, sw, de, fr):
    rendered = {language: render(meaning) for language, render in RENDERERS.items()}
    assert rendered == {"en": en, "zh": zh, "sw": sw, "de": de, "fr": fr.replace("{q}", "\u202f?")}


@pytest.mark.parametrize(
    ("word", "concords"),
    [
        ("big", {1: "mkubwa", 2: "wakubwa", 4: "mikubwa", 5: "kubwa", 6: "makubwa", 9: "kubwa"}),
        ("beautiful", {1: "mzuri", 3: "mzuri", 5: "zuri", 7: "kizuri", 8: "vizuri", 9: "nzuri", 11: "mzuri"}),
        ("good", {1: "mwema", 2: "wema", 5: "jema", 7: "chema", 8: "vyema", 9: "njema", 10: "njema"}),
        ("new", {1: "mpya", 2: "wapya", 5: "jipya", 6: "mapya", 7: "kipya", 9: "mpya", 10: "mpya"}),
        ("white", {1: "mweupe", 2: "weupe", 4: "myeupe", 5: "jeupe", 6: "meupe", 8: "vyeupe", 9: "nyeupe"}),
        ("tall", {1: "mrefu", 2: "warefu", 9: "ndefu"}),
        ("small", {5: "dogo", 9: "ndogo", 11: "mdogo"}),
        ("bad", {9: "mbaya"}),
        ("expensive", {1: "ghali", 8: "ghali"}),
    ],
)
def test_swahili_adjectives_agree(word, concords):
    assert {number: concord(adjective(word), number) for number in concords} == concords
