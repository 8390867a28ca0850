"""The words of the phrasebook: one row per concept, one column per language.

A cell holds the forms from which the language's grammar derives all others, separated by spaces; an
underscore stands for a space inside one form. A comment above each table lists the forms. The first English
form names the concept.

The second column says what a word combines with. A noun lists the kinds it belongs to; a verb, an adjective
or a preposition lists the kinds of noun it goes with, so that people eat bread and not schools. A concept for
which one of the languages has no plain, unambiguous word is left out rather than glossed.
"""

from dataclasses import dataclass


# Each concept exists once, so identity is equality; that keeps words cheap to hash.
@dataclass(frozen=True, eq=False)
class Word:
    """One concept: its forms in each language, and the kinds it belongs to or goes with."""

    en: tuple[str, ...]
    kinds: tuple[str, ...]
    zh: tuple[str, ...]
    sw: tuple[str, ...]
    de: tuple[str, ...]
    fr: tuple[str, ...]

    @property
    def name(self) -> str:
        """The concept in English, unique among the words of one table."""
        return self.en[0]

    def goes_with(self, other: "Word") -> bool:
        """Whether the two share a kind, as do a verb and a noun it takes, or an adjective and a noun it describes."""
        return any(kind in other.kinds for kind in self.kinds)


def read_table(common_kinds: str, table: str) -> tuple[Word, ...]:
    """The words of a table, in its order; each also gets the `common_kinds`."""
    words = []
    for row in table.strip().splitlines():
        cells = [cell.split() for cell in row.split("|")]
        en, kinds, *others = (tuple(form.replace("_", " ") for form in cell) for cell in cells)
        words.append(Word(en, (*common_kinds.split(), *kinds), *others))
    return tuple(words)


# The tables are laid out by hand.
# fmt: off

# English, Swahili  subject, possessive (in Swahili its stem)
# Chinese           subject
# German            subject, possessive
# French            subject, then the possessive: masculine, feminine, plural
PRONOUNS = read_table("person pronoun", """
I my       | | 我   | mimi angu | ich mein  | je mon ma mes
you your   | | 你   | wewe ako  | du dein   | tu ton ta tes
we our     | | 我们 | sisi etu  | wir unser | nous notre notre nos
they their | | 他们 | wao ao    | sie ihr   | ils leur leur leurs
""")

# The subject of "it rains", for languages that need one.
IT = Word(("it",), ("pronoun",), (), (), ("es",), ("il",))

# Nouns that can be counted:
#   English  singular; plural where irregular
#   Chinese  noun, measure word
#   Swahili  singular, plural, noun classes ("kin": they agree as 1/2 but are possessed as 9/10, "dada yangu")
#   German   article, singular, plural; the other cases of the singular, for weak nouns
#   French   gender, singular; plural where irregular
# Only those "counted" among the relatives are used in the plural. "he" and "she" mark the people for whom
# every language can use a pronoun without guessing.
RELATIVES = read_table("person relative", """
mother | she | 妈妈 个 | mama mama kin | die Mutter Mütter | f mère
father | he | 爸爸 个 | baba baba kin | der Vater Väter | m père
sister | she counted | 姐姐 个 | dada dada kin | die Schwester Schwestern | f sœur
brother | he counted | 哥哥 个 | kaka kaka kin | der Bruder Brüder | m frère
grandmother | she | 奶奶 个 | bibi bibi kin | die Großmutter Großmütter | f grand-mère grands-mères
grandfather | he | 爷爷 个 | babu babu kin | der Großvater Großväter | m grand-père grands-pères
aunt | she counted | 姑姑 个 | shangazi shangazi kin | die Tante Tanten | f tante
uncle | he counted | 舅舅 个 | mjomba wajomba 1/2 | der Onkel Onkel | m oncle
daughter | she counted | 女儿 个 | binti mabinti kin | die Tochter Töchter | f fille
friend | counted | 朋友 个 | rafiki marafiki kin | der Freund Freunde | m ami
neighbour | counted | 邻居 个 | jirani majirani kin | der Nachbar Nachbarn Nachbarn | m voisin
""")

PEOPLE = read_table("person someone", """
child children | young | 孩子 个 | mtoto watoto 1/2 | das Kind Kinder | m enfant
girl | young she | 女孩 个 | msichana wasichana 1/2 | das Mädchen Mädchen | f fille
boy | young he | 男孩 个 | mvulana wavulana 1/2 | der Junge Jungen Jungen | m garçon
woman women | she | 女人 个 | mwanamke wanawake 1/2 | die Frau Frauen | f femme
man men | he | 男人 个 | mwanamume wanaume 1/2 | der Mann Männer | m homme
guest | | 客人 位 | mgeni wageni 1/2 | der Gast Gäste | m invité
student | young | 学生 个 | mwanafunzi wanafunzi 1/2 | der Schüler Schüler | m élève
fisherman fishermen | | 渔民 个 | mvuvi wavuvi 1/2 | der Fischer Fischer | m pêcheur
teacher | occupation | 老师 位 | mwalimu walimu 1/2 | der Lehrer Lehrer | m professeur
doctor | occupation | 医生 位 | daktari madaktari 1/2 | der Arzt Ärzte | m médecin
nurse | occupation | 护士 位 | muuguzi wauguzi 1/2 | der Pfleger Pfleger | m infirmier
farmer | occupation | 农民 个 | mkulima wakulima 1/2 | der Bauer Bauern Bauern | m agriculteur
driver | occupation | 司机 个 | dereva madereva 1/2 | der Fahrer Fahrer | m conducteur
merchant | occupation | 商人 个 | mfanyabiashara wafanyabiashara 1/2 | der Händler Händler | m commerçant
cook | occupation | 厨师 个 | mpishi wapishi 1/2 | der Koch Köche | m cuisinier
engineer | occupation | 工程师 个 | mhandisi wahandisi 1/2 | der Ingenieur Ingenieure | m ingénieur
writer | occupation | 作家 位 | mwandishi waandishi 1/2 | der Schriftsteller Schriftsteller | m écrivain
lawyer | occupation | 律师 位 | mwanasheria wanasheria 1/2 | der Anwalt Anwälte | m avocat
""")

# The occupation of a woman, in German and in French.
FEMININE_OCCUPATIONS = {
    "teacher": ("Lehrerin", "professeure"),
    "doctor": ("Ärztin", "médecin"),
    "nurse": ("Pflegerin", "infirmière"),
    "farmer": ("Bäuerin", "agricultrice"),
    "driver": ("Fahrerin", "conductrice"),
    "merchant": ("Händlerin", "commerçante"),
    "cook": ("Köchin", "cuisinière"),
    "engineer": ("Ingenieurin", "ingénieure"),
    "writer": ("Schriftstellerin", "écrivaine"),
    "lawyer": ("Anwältin", "avocate"),
}

# In Swahili, animals agree as people do, whatever their noun looks like, also in possessives: "mbwa wangu",
# "viboko hawa".
ANIMALS = read_table("animal", """
dog | sold tame pet | 狗 只 | mbwa mbwa 1/2 | der Hund Hunde | m chien
cat | sold tame pet | 猫 只 | paka paka 1/2 | die Katze Katzen | m chat
rabbit | sold tame pet | 兔子 只 | sungura sungura 1/2 | das Kaninchen Kaninchen | m lapin
goat | sold tame | 山羊 只 | mbuzi mbuzi 1/2 | die Ziege Ziegen | f chèvre
sheep sheep | sold tame | 绵羊 只 | kondoo kondoo 1/2 | das Schaf Schafe | m mouton
cow | sold tame | 牛 头 | ng'ombe ng'ombe 1/2 | die Kuh Kühe | f vache
pig | sold tame | 猪 头 | nguruwe nguruwe 1/2 | das Schwein Schweine | m cochon
chicken | sold tame | 鸡 只 | kuku kuku 1/2 | das Huhn Hühner | f poule
horse | sold tame | 马 匹 | farasi farasi 1/2 | das Pferd Pferde | m cheval
donkey | sold tame | 驴 头 | punda punda 1/2 | der Esel Esel | m âne
hippo | wild | 河马 头 | kiboko viboko 1/2 | das Nilpferd Nilpferde | m hippopotame
lion | wild | 狮子 头 | simba simba 1/2 | der Löwe Löwen Löwen | m lion
zebra | wild | 斑马 匹 | pundamilia pundamilia 1/2 | das Zebra Zebras | m zèbre
giraffe | wild | 长颈鹿 只 | twiga twiga 1/2 | die Giraffe Giraffen | f girafe
monkey | wild | 猴子 只 | tumbili tumbili 1/2 | der Affe Affen Affen | m singe
""")

THINGS = read_table("", """
book | sold goods item reading writing | 书 本 | kitabu vitabu 7/8 | das Buch Bücher | m livre
newspaper | sold item reading | 报纸 份 | gazeti magazeti 5/6 | die Zeitung Zeitungen | m journal
letter | item reading writing | 信 封 | barua barua 9/10 | der Brief Briefe | f lettre
photo photos | item | 照片 张 | picha picha 9/10 | das Foto Fotos | f photo
pen | sold goods item colour | 笔 支 | kalamu kalamu 9/10 | der Stift Stifte | m stylo
key | item | 钥匙 把 | ufunguo funguo 11/10 | der Schlüssel Schlüssel | f clé
phone | sold goods item machine | 手机 部 | simu simu 9/10 | das Handy Handys | m téléphone
cup | sold goods item dish colour | 杯子 个 | kikombe vikombe 7/8 | die Tasse Tassen | f tasse
plate | sold goods item dish | 盘子 个 | sahani sahani 9/10 | der Teller Teller | f assiette
spoon | sold goods item dish | 勺子 把 | kijiko vijiko 7/8 | der Löffel Löffel | f cuillère
knife knives | sold goods item dish | 刀 把 | kisu visu 7/8 | das Messer Messer | m couteau
hat | sold goods item colour | 帽子 顶 | kofia kofia 9/10 | der Hut Hüte | m chapeau
shirt | sold goods item colour | 衬衫 件 | shati mashati 5/6 | das Hemd Hemden | f chemise
umbrella | sold goods item machine colour | 雨伞 把 | mwavuli miavuli 3/4 | der Schirm Schirme | m parapluie
ball | sold goods item colour | 球 个 | mpira mipira 3/4 | der Ball Bälle | m ballon
lamp | sold goods item machine | 灯 盏 | taa taa 9/10 | die Lampe Lampen | f lampe
bag | sold goods storage colour | 包 个 | mkoba mikoba 3/4 | die Tasche Taschen | m sac
basket | sold goods storage portable | 篮子 个 | kikapu vikapu 7/8 | der Korb Körbe | m panier
box | sold goods storage portable opening | 箱子 个 | sanduku masanduku 5/6 | die Kiste Kisten | f caisse
cupboard | sold goods storage indoors opening | 柜子 个 | kabati makabati 5/6 | der Schrank Schränke | f armoire
chair | sold goods surface portable machine | 椅子 把 | kiti viti 7/8 | der Stuhl Stühle | f chaise
table | sold goods surface indoors portable machine | 桌子 张 | meza meza 9/10 | der Tisch Tische | f table
bed | sold goods surface indoors machine | 床 张 | kitanda vitanda 7/8 | das Bett Betten | m lit
door | indoors machine opening colour | 门 扇 | mlango milango 3/4 | die Tür Türen | f porte
window | beside machine opening | 窗户 扇 | dirisha madirisha 5/6 | das Fenster Fenster | f fenêtre
bicycle | sold goods vehicle machine colour | 自行车 辆 | baiskeli baiskeli 9/10 | das Fahrrad Fahrräder | m vélo
car | sold goods vehicle machine outdoors colour | 汽车 辆 | gari magari 5/6 | das Auto Autos | f voiture
boat | sold goods machine colour | 船 条 | mashua mashua 9/10 | das Boot Boote | m bateau
house | sold goods outdoors colour | 房子 座 | nyumba nyumba 9/10 | das Haus Häuser | f maison
tree | outdoors shade | 树 棵 | mti miti 3/4 | der Baum Bäume | m arbre
egg | sold cooked piece | 鸡蛋 个 | yai mayai 5/6 | das Ei Eier | m œuf
mango mangoes | sold sweet piece liked | 芒果 个 | embe maembe 5/6 | die Mango Mangos | f mangue
orange | sold sweet piece liked | 橙子 个 | chungwa machungwa 5/6 | die Orange Orangen | f orange
banana | sold sweet piece liked | 香蕉 根 | ndizi ndizi 9/10 | die Banane Bananen | f banane
news | news | 消息 个 | habari habari 9/10 | die Nachricht Nachrichten | f nouvelle
""")

# Food and drink that is not counted: one form; German with its article, French with its gender or "pl".
FOODS = read_table("mass", """
rice | food cooked liked | 米饭 | wali | der Reis | m riz
bread | sold food liked | 面包 | mkate | das Brot | m pain
meat | sold food cooked liked | 肉 | nyama | das Fleisch | f viande
fish | sold food cooked liked | 鱼 | samaki | der Fisch | m poisson
beans | sold food cooked liked | 豆子 | maharagwe | die Bohnen | pl haricots
vegetables | sold food cooked liked | 蔬菜 | mboga | das Gemüse | pl légumes
soup | cooked liked | 汤 | supu | die Suppe | f soupe
honey | sold food liked | 蜂蜜 | asali | der Honig | m miel
water | sold drink | 水 | maji | das Wasser | f eau
milk | sold drink liked | 牛奶 | maziwa | die Milch | m lait
tea | sold drink liked | 茶 | chai | der Tee | m thé
coffee | sold drink liked | 咖啡 | kahawa | der Kaffee | m café
juice | sold drink liked | 果汁 | juisi | der Saft | m jus_de_fruits
""")

# English  noun, preposition of location
# Chinese  the place to go to, the place to be at
# Swahili  noun, locative, noun class
# German   article, noun, preposition for both going (accusative) and being (dative)
# French   gender, noun, preposition
PLACES = read_table("place", """
market at | errand work opening | 市场 市场 | soko sokoni 5 | der Markt auf | m marché à
school at | errand work opening study singing | 学校 学校 | shule shuleni 9 | die Schule in | f école à
bank at | errand work opening | 银行 银行 | benki benki 9 | die Bank in | f banque à
library at | errand work opening study | 图书馆 图书馆 | maktaba maktabani 9 | die Bibliothek in | f bibliothèque à
restaurant at | errand work opening | 餐馆 餐馆 | mgahawa mgahawani 3 | das Restaurant in | m restaurant à
office at | errand work opening | 办公室 办公室 | ofisi ofisini 9 | das Büro in | m bureau à
factory at | errand work opening | 工厂 工厂 | kiwanda kiwandani 7 | die Fabrik in | f usine à
shop at | errand work opening | 商店 商店 | duka dukani 5 | der Laden in | m magasin à
hospital at | errand work | 医院 医院 | hospitali hospitalini 9 | das Krankenhaus in | m hôpital à
hotel at | errand work singing | 酒店 酒店 | hoteli hotelini 9 | das Hotel in | m hôtel à
church at | errand singing | 教堂 教堂 | kanisa kanisani 5 | die Kirche in | f église à
farm on | errand work outdoors yard region | 农场 农场上 | shamba shambani 5 | der Bauernhof auf | f ferme à
village in | errand outdoors yard region | 村子 村子里 | kijiji kijijini 7 | das Dorf in | m village à
city in | errand work region | 城里 城里 | mji mjini 3 | die Stadt in | f ville en
forest in | errand outdoors region | 森林 森林里 | msitu msituni 3 | der Wald in | f forêt dans
beach on | errand outdoors region | 海滩 海滩上 | ufukwe ufukweni 11 | der Strand an | f plage à
garden in | outdoors yard singing | 花园 花园里 | bustani bustanini 9 | der Garten in | m jardin dans
kitchen in | work singing | 厨房 厨房里 | jiko jikoni 5 | die Küche in | f cuisine dans
river in | water | 河边 河里 | mto mtoni 3 | der Fluss in | f rivière dans
lake in | water | 湖边 湖里 | ziwa ziwani 5 | der See in | m lac dans
sea in | water | 海边 海里 | bahari baharini 9 | das Meer in | f mer dans
island on | region | 岛上 岛上 | kisiwa kisiwani 7 | die Insel auf | f île sur
coast on | region | 海边 海边 | pwani pwani 9 | die Küste an | f côte sur
valley in | region | 山谷 山谷里 | bonde bondeni 5 | das Tal in | f vallée dans
""")

# Verbs with an object. Kinds are those of the object, and of the verb itself: an "instant" act is never under
# way, a "process" is never said to be done already, a "meal" does not go with "last month", and a "wish" is
# something that people want to do.
#   English  base, past and participle where irregular
#   Chinese  under way, done where different
#   Swahili  stem, and the infinitive of stems too short to stand without it
#   German   infinitive ("+" after a separable prefix), third person, participle; the imperative where it is
#            not the stem; the case or preposition of the object where it is not the accusative
#   French   infinitive; and of irregular verbs the first person, the stem of "nous", participle, and the stem
#            of "ils" where it is another
VERBS = read_table("", """
buy bought | wish sold | 买 | nunua | kaufen kauft gekauft | acheter achète achet acheté
sell sold | wish sold | 卖 | uza | verkaufen verkauft verkauft | vendre vends vend vendu
eat ate eaten | wish meal food piece | 吃 | la kula | essen isst gegessen iss | manger mange mange mangé
drink drank drunk | wish meal drink | 喝 | nywa kunywa | trinken trinkt getrunken | boire bois buv bu boiv
cook | wish cooked | 煮 | pika | kochen kocht gekocht | préparer
read read | reading | 读 | soma | lesen liest gelesen lies | lire lis lis lu
write wrote written | writing | 写 | andika | schreiben schreibt geschrieben | écrire écris écriv écrit
see saw seen | wish instant wild | 看 看到 | ona | sehen sieht gesehen sieh | voir vois voy vu voi
wash | dish | 洗 | osha | spülen spült gespült | laver
repair | machine | 修理 | tengeneza | reparieren repariert repariert repariere | réparer
look_for | process item goods tame person | 找 | tafuta | suchen sucht gesucht | chercher
carry carried | process portable | 搬 | beba | tragen trägt getragen | porter
bring brought | instant item portable piece | 拿来 | leta | bringen bringt gebracht | apporter
open | instant opening | 打开 | fungua | auf+machen macht aufgemacht | ouvrir ouvre ouvr ouvert
close | instant opening | 关上 | funga | zu+machen macht zugemacht | fermer
feed fed | tame | 喂 | lisha | füttern füttert gefüttert füttere | nourrir nourris nourriss nourri
help | person | 帮助 | saidia | helfen hilft geholfen hilf dative | aider
wait_for | process person | 等 | subiri | warten wartet gewartet warte auf | attendre attends attend attendu
invite | instant person | 邀请 | alika | ein+laden lädt eingeladen | inviter
thank | instant person | 感谢 | shukuru | danken dankt gedankt danke dative | remercier
greet | instant person | 问候 | salimu | grüßen grüßt gegrüßt | saluer
call | instant person | 叫 | ita | rufen ruft gerufen | appeler appelle appel appelé
""")

# Verbs without an object. Kinds are those of the subject and of the place. Swahili "me" marks a state, which
# the perfect describes ("amelala"); the last German form is the auxiliary of the perfect.
ACTIONS = read_table("", """
work | person work | 工作 | fanya_kazi | arbeiten arbeitet gearbeitet haben | travailler
study studied | young pronoun study | 学习 | soma | lernen lernt gelernt haben | étudier
sing sang sung | person singing | 唱歌 | imba | singen singt gesungen haben | chanter
play | young outdoors | 玩 | cheza | spielen spielt gespielt haben | jouer
sleep slept | tame yard | 睡觉 | lala me | schlafen schläft geschlafen haben | dormir dors dorm dormi
swim swam swum | person water | 游泳 | ogelea | schwimmen schwimmt geschwommen sein | nager nage nage nagé
run ran run | person outdoors | 跑步 | kimbia | laufen läuft gelaufen sein | courir cours cour couru
""")

# Places open and close: only the third person is needed (English and Swahili derive it from the base and the
# stem).
OPENING_HOURS = read_table("", """
open | opening | 开门 | funguliwa | öffnet | ouvre
close | opening | 关门 | fungwa | schließt | ferme
""")

# Chinese  before a noun, as a predicate
# Swahili  stem (with a hyphen where it takes a prefix)
# French   "before" or "after" the noun, masculine, feminine, and the masculine before a vowel
# A "wish" is a property that people want in a thing.
ADJECTIVES = read_table("", """
big | wish goods animal opening shade | 大 大 | -kubwa | groß | before grand grande
small | wish goods animal opening shade | 小 小 | -dogo | klein | before petit petite
new | wish goods | 新 新 | -pya | neu | after neuf neuve
old | wish goods | 旧 旧 | -kuukuu | alt | before vieux vieille
beautiful | wish goods animal | 漂亮的 漂亮 | -zuri | schön | before beau belle bel
clean | dish surface colour | 干净的 干净 | safi | sauber | after propre propre
dirty | dish surface colour | 脏 脏 | -chafu | schmutzig | after sale sale
heavy | portable storage | 很重的 重 | -zito | schwer | after lourd lourde
light | portable storage | 很轻的 轻 | -epesi | leicht | after léger légère
expensive | wish goods tame | 很贵的 贵 | ghali | teuer | after cher chère
red | wish colour | 红色的 红色的 | -ekundu | rot | after rouge rouge
black | wish colour tame | 黑色的 黑色的 | -eusi | schwarz | after noir noire
white | wish colour tame | 白色的 白色的 | -eupe | weiß | after blanc blanche
fat | wish tame | 很肥的 肥 | -nene | dick | before gros grosse
sweet | wish sweet | 很甜的 甜 | -tamu | süß | after sucré sucrée
important | news reading | 重要的 重要 | muhimu | wichtig | after important importante
bad | news | 坏 坏 | -baya | schlecht | before mauvais mauvaise
good | news person | 好 好 | -ema | gut | before bon bonne
tall | person | 高 高 | -refu | groß | before grand grande
clever | person | 聪明的 聪明 | -erevu | klug | after intelligent intelligente
generous | person | 慷慨的 慷慨 | -karimu | großzügig | after généreux généreuse
famous | someone | 出名的 出名 | maarufu | berühmt | after célèbre célèbre
""")

# Reasons to stay away. Swahili: a state ("me"), an activity ("na") or something one is "with"; German and
# French: the verb, then its complement (French adjectives also in the feminine).
STATES = read_table("", """
tired | | 很累 | me choka | sein müde | être fatigué fatiguée
ill | | 病了 | na umwa | sein krank | être malade malade
busy | | 很忙 | with shughuli_nyingi | sein beschäftigt | être occupé occupée
sad | | 很难过 | with huzuni | sein traurig | être triste triste
hungry | | 很饿 | with njaa | haben Hunger | avoir faim
sleepy | | 很困 | with usingizi | sein schläfrig | avoir sommeil
afraid | | 很害怕 | na ogopa | haben Angst | avoir peur
""")

# A verb, or a property of the air. English: the verb, or an adjective after "be". Swahili: subject, its class
# and the verb's stem, or only the noun of "there is".
WEATHERS = read_table("", """
rain | verb | 下雨 | mvua 9 nyesha | regnen regnet geregnet | pleuvoir pleut plu
snow | verb | 下雪 | theluji 9 anguka | schneien schneit geschneit | neiger neige neigé
windy | air | 刮风 | upepo 11 vuma | windig | avoir du_vent
foggy | air | 有雾 | ukungu | neblig | avoir du_brouillard
hot | air | 热 | joto | heiß | faire chaud
cold | air | 冷 | baridi | kalt | faire froid
""")

# Kinds are those of the landmark. French prepositions keep their "de", which contracts with the article.
RELATIONS = read_table("", """
on | surface | 上 | juu_ya | auf | sur
in | storage | 里 | ndani_ya | in | dans
under | surface shade | 下面 | chini_ya | unter | sous
next_to | indoors outdoors beside | 旁边 | kando_ya | neben | à_côté_de
behind | indoors outdoors | 后面 | nyuma_ya | hinter | derrière
in_front_of | indoors outdoors | 前面 | mbele_ya | vor | devant
""")

# The first kind is the tense that the time calls for. A second form is for negation, in the languages that
# need one ("already", "not yet").
TIMES = read_table("", """
now | present moment | 现在 | sasa | jetzt | maintenant
today | present day | 今天 | leo | heute | aujourd'hui
every_day | habitual | 每天 | kila_siku | jeden_Tag | tous_les_jours
yesterday | past near | 昨天 | jana | gestern | hier
this_morning | past near | 今天早上 | leo_asubuhi | heute_Morgen | ce_matin
last_week | past far | 上周 | wiki_iliyopita | letzte_Woche | la_semaine_dernière
last_month | past far | 上个月 | mwezi_uliopita | letzten_Monat | le_mois_dernier
tomorrow | future near | 明天 | kesho | morgen | demain
this_evening | future near | 今天晚上 | leo_jioni | heute_Abend | ce_soir
next_week | future far | 下周 | wiki_ijayo | nächste_Woche | la_semaine_prochaine
next_month | future far | 下个月 | mwezi_ujao | nächsten_Monat | le_mois_prochain
already yet | perfect | 已经 还 | tayari bado | schon noch | déjà encore
""")

WEEKDAYS = read_table("", """
Mondays | | 星期一 | Jumatatu | montags | lundi
Tuesdays | | 星期二 | Jumanne | dienstags | mardi
Wednesdays | | 星期三 | Jumatano | mittwochs | mercredi
Thursdays | | 星期四 | Alhamisi | donnerstags | jeudi
Fridays | | 星期五 | Ijumaa | freitags | vendredi
Saturdays | | 星期六 | Jumamosi | samstags | samedi
Sundays | | 星期日 | Jumapili | sonntags | dimanche
""")

# Swahili counts the hours of the day from sunrise: seven in the morning is its first hour. The kind says
# whether places open or close then.
HOURS = read_table("", """
six_in_the_morning | open | 早上六点 | saa_kumi_na_mbili_asubuhi | sechs_Uhr_morgens | six_heures_du_matin
seven_in_the_morning | open | 早上七点 | saa_moja_asubuhi | sieben_Uhr_morgens | sept_heures_du_matin
eight_in_the_morning | open | 早上八点 | saa_mbili_asubuhi | acht_Uhr_morgens | huit_heures_du_matin
nine_in_the_morning | open | 早上九点 | saa_tatu_asubuhi | neun_Uhr_morgens | neuf_heures_du_matin
ten_in_the_morning | open | 上午十点 | saa_nne_asubuhi | zehn_Uhr_morgens | dix_heures_du_matin
noon | close | 中午十二点 | saa_sita_mchana | zwölf_Uhr_mittags | midi
four_in_the_afternoon | close | 下午四点 | saa_kumi_jioni | vier_Uhr_nachmittags | quatre_heures_de_l'après-midi
six_in_the_evening | close | 晚上六点 | saa_kumi_na_mbili_jioni | sechs_Uhr_abends | six_heures_du_soir
seven_in_the_evening | close | 晚上七点 | saa_moja_usiku | sieben_Uhr_abends | sept_heures_du_soir
eight_in_the_evening | close | 晚上八点 | saa_mbili_usiku | acht_Uhr_abends | huit_heures_du_soir
nine_in_the_evening | close | 晚上九点 | saa_tatu_usiku | neun_Uhr_abends | neuf_heures_du_soir
""")

# Chinese: the form before a measure word. Swahili: with a hyphen if the numeral agrees with its noun.
NUMBERS = read_table("", """
one | | 一 | -moja | ein | un
two | | 两 | -wili | zwei | deux
three | | 三 | -tatu | drei | trois
four | | 四 | -nne | vier | quatre
five | | 五 | -tano | fünf | cinq
six | | 六 | sita | sechs | six
seven | | 七 | saba | sieben | sept
eight | | 八 | -nane | acht | huit
nine | | 九 | tisa | neun | neuf
ten | | 十 | kumi | zehn | dix
""")
