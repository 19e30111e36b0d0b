"""The built-in corpus: plays from a small probabilistic grammar, whose entropy per character is known exactly.

A rule is a table of alternatives with integer weights. An alternative is text with slots: `<adj>` stands for another
rule, `<speaker:3>` for one of three people who could be meant. Sampling and the entropy both read these tables and
nothing else, so they cannot disagree.

Different choices never give the same text: the alternatives of a rule differ in their first word or mark, so a reader
who knows the grammar recovers every choice from left to right. Therefore -ln p(text) is the sum over the choices.

Every line of verse has five iambic feet. The number that ends a rule's name is the feet it fills: `<clause4>` is "the
bitter king must weep alone". In the rules of a scene it is the number of people on stage.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from random import Random

import numpy as np

Tables = dict[str, dict[str, int]]

# --- words --------------------------------------------------------------------------------------------------------

# All are stressed on the second of three syllables, so that "Orlando, speak" is two feet.
WOMEN = ["Miranda", "Bianca", "Belinda", "Lucinda", "Diana", "Aurora", "Camilla", "Melissa", "Rosina", "Jacinta"]
MEN = ["Orlando", "Lysander", "Lorenzo", "Orsino", "Alonzo", "Leander", "Fernando", "Gonzalo", "Marcello", "Evander"]
CAST = [*WOMEN, *MEN]

NOUNS = """
    king heart sword crown hand friend eye son lord star soul tongue night knave maid storm vow fool sun ghost ship
    tear wind grave moon tower song wound queen foe dream hill thorn flame duke oath door wall bird deed crime wood
    lamb tree throne bell wave stone slave snake cloud knight thought word ring cup field stream lamp town spear tomb
    shield guest bride groom mask law crow hawk worm gem chain road bed monk seed cave shore gate hope smile
"""

ADJECTIVES = """
    gentle noble bloody golden faithful cruel bitter silent ancient mighty tender silver weary wicked lonely humble
    secret stubborn holy royal hollow fearful foolish merry faithless mortal jealous broken painted sacred loyal idle
    naked frozen burning weeping stolen sleeping dying trembling rotten sullen heavy mournful scornful shameful
    graceful guilty happy hungry lusty pretty ugly empty barren bashful careless cunning crafty dreadful peevish
    crimson savage simple sudden wretched lovely deadly cursed wanton
"""

# Verbs of one foot (for-GET) and of one syllable, both with an object; then verbs without one.
FOOT_VERBS = """
    forget betray adore behold destroy obey forgive command deny deceive pursue deserve defend offend consume condemn
    confound corrupt console control conceal reveal reject respect reward recall regard renew repair restore resist
    return beguile bewail believe subdue support survive surround suspect torment await admire abhor allow disdain
    devour desire enjoy escape forsake implore inflame inspire protect
"""
SHORT_VERBS = """
    love hate see serve fear kill know hear guard scorn mourn seek call keep save break bear find trust mock bring
    lead hide mark rule shun slay steal strike try wear wed win
"""
BARE_VERBS = """
    weep sleep die live sigh laugh sing fall rise dance fade grow kneel pray rave rest roar shine speak stand starve
    swoon wait wake yield bleed blush bow
"""

MATTERS = """
    love death night grief hope shame truth peace war time hate life joy wine gold blood fire pride faith wrath youth
    age rage fate fame spite sin grace sleep sport jest doubt dust
"""

WORDS = {
    "adj": ADJECTIVES,
    "betray": FOOT_VERBS,
    "love": SHORT_VERBS,
    "weep": BARE_VERBS,
    "bare": MATTERS,
    "noun": NOUNS,
    "det": "the my thy our his your her no their yon some",
    "this": "this that each one",
    "these": "these those all few",
    "he": "he she",
    "they": "I we they you",
    "aux.sing": "doth will must shall may can would should did could might",
    "aux.plur": "must will shall do may would can should did could might",
    "aux.thou": "wilt dost must shalt canst mayst wouldst shouldst didst couldst",
    "in": "in with by for through from like",
    "within": "within beneath upon beyond before without against above among behind",
    "again": "again alone tonight today indeed unseen unasked",
    "where": "where when while as till",
    "and": "and but for since though yet",
    "now": "now still once soon thus oft",
    "shall": "shall must will may can would should did",
    "wilt": "wilt dost canst shalt wouldst didst",
    "why": "why how when where",
    "pray": "O now then pray",
    "hark": "come hear speak stay mark peace look hark wait kneel",
    "so": "thus so",
    "mood": "aside kneeling weeping laughing reading drawing rising whispering",
    "weeps": "weeps kneels laughs sighs sleeps trembles dances sings",
    "spot": "hall garden chamber street forest cellar terrace grotto meadow bridge",
    "near": "near behind before below beyond",
    "site": "castle palace abbey harbour mountain river tavern cathedral prison",
    "hour": "night dawn noon dusk midnight sunrise",
}

RHYMES = [
    "night light sight knight",
    "heart dart art part",
    "day way ray clay",
    "grave slave wave knave",
    "breath death",
    "king ring spring wing",
    "tears fears years spears",
    "love dove glove",
    "sea tree knee",
    "bride pride tide side",
    "stone throne bone",
    "face place grace",
    "pain rain chain",
    "hall wall fall",
    "tomb doom womb gloom",
    "sword lord",
]

QUESTIONED = "be love fight live die speak weep hope trust yield"  # to be or not to be


def zipf(choices: Iterable[str]) -> dict[str, int]:
    """Weights that fall with the rank (Zipf-Mandelbrot): integers, so that they are the same on every machine."""
    return {choice: round(1000 / math.sqrt(rank + 4)) for rank, choice in enumerate(choices)}


def he_verb(verb: str) -> str:
    return f"{verb[:-1]}ies" if verb in ("deny", "try") else f"{verb}s"


def thou_verb(verb: str) -> str:
    return "seest" if verb == "see" else f"{verb.removesuffix('e')}'st"


def word_tables() -> Tables:
    words = {name: text.split() for name, text in WORDS.items()}
    nouns, foot_verbs, short_verbs = words.pop("noun"), words["betray"], words["love"]
    words |= {"noun.sing": nouns, "noun.plur": [f"{noun}s" for noun in nouns]}
    words |= {"betray.sing": [he_verb(verb) for verb in foot_verbs], "betray.plur": foot_verbs}
    words |= {"love.sing": [he_verb(verb) for verb in short_verbs], "love.plur": short_verbs}
    words |= {"love.thou": [thou_verb(verb) for verb in short_verbs]}
    return {name: zipf(choices) for name, choices in words.items()}


# --- verse --------------------------------------------------------------------------------------------------------

EITHER, SINGULAR, PLURAL = {"sing": 3, "plur": 2}, {"sing": 5}, {"plur": 5}  # weights of the grammatical number
ADJECTIVE = 2  # and of an adjective before the noun


def noun_phrases() -> Tables:
    """Objects of 1 to 4 feet ("the king", "the gentle king in love") and what may trail behind a noun or a verb."""
    tables: Tables = {}
    for feet in range(1, 5):
        tables[f"obj{feet}"] = {f"<det> <any{feet}>": 8, f"<this> <one{feet}>": 1, f"<these> <many{feet}>": 1}
        for name, numbers in (("any", EITHER), ("one", SINGULAR), ("many", PLURAL)):
            trail = f" <trail{feet - 1}>" if feet > 1 else ""
            bare = {f"<noun.{number}>{trail}": weight for number, weight in numbers.items()}
            tables[f"{name}{feet}"] = bare | ({f"<adj> <{name}{feet - 1}>": ADJECTIVE} if feet > 1 else {})
    tables["trail1"] = {"<in> <bare>": 5, "<again>": 2}
    tables["matter1"] = {"<bare>": 1}
    for feet in (2, 3):
        tables[f"matter{feet}"] = {f"<adj> <matter{feet - 1}>": 1}
        tables[f"trail{feet}"] = {
            f"<within> <obj{feet - 1}>": 5,
            f"<in> <matter{feet}>": 3,
            f"to <love> <obj{feet - 1}>": 3,
            f"<where> <noun.plur> <does.plur{feet - 1}>": 2,
        }
    return tables


def verb_phrases() -> Tables:
    """What a subject does, agreeing with it: "forgets the king", "forget the king", "forget'st the king"."""
    tables: Tables = {}
    for form in ("sing", "plur"):
        tables[f"does.{form}1"] = {f"<aux.{form}> <weep>": 1}
        for feet in range(2, 5):
            tables[f"does.{form}{feet}"] = {f"<betray.{form}> <obj{feet - 1}>": 5, f"<aux.{form}> <can{feet}>": 3}
    for form in ("sing", "plur", "thou"):  # after a pronoun, which is unstressed: "I love", "I must forget"
        for feet in range(2, 6):
            short = {f"<love.{form}> <obj{feet - 1}>": 3}
            long = {f"<aux.{form}> <betray> <obj{feet - 2}>": 2} if feet > 2 else {}
            tables[f"after.{form}{feet}"] = short | long
    for feet in range(2, 5):
        tables[f"can{feet}"] = {f"<love> <obj{feet - 1}>": 3, f"<weep> <trail{feet - 1}>": 1}
    return tables


def clauses() -> Tables:
    """Subject and verb together, 2 to 5 feet, and the same with the auxiliary before the subject."""
    tables: Tables = {}
    for feet in range(2, 6):
        tables[f"clause{feet}"] = {
            f"<det> <both{feet}>": 10,
            f"<this> <sing{feet}>": 1,
            f"<these> <plur{feet}>": 1,
            f"<he> <after.sing{feet}>": 1,
            f"<they> <after.plur{feet}>": 3,
            f"thou <after.thou{feet}>": 1,
        }
        for name, numbers in (("both", EITHER), ("sing", SINGULAR), ("plur", PLURAL)):
            bare = {f"<noun.{number}> <rest.{number}{feet - 1}>": weight for number, weight in numbers.items()}
            tables[f"{name}{feet}"] = bare | ({f"<adj> <{name}{feet - 1}>": ADJECTIVE} if feet > 2 else {})
    for form in ("sing", "plur"):
        tables[f"rest.{form}1"] = {f"<does.{form}1>": 1}
        for feet in range(2, 5):
            whole = {f"<does.{form}{feet}>": 8, f"of <bare> <does.{form}{feet - 1}>": 2}
            clause = {f"that <love.{form}> <obj1> <does.{form}{feet - 2}>": 1} if feet > 2 else {}
            tables[f"rest.{form}{feet}"] = whole | clause
    tables["inverted3"] = {"<det> <noun.sing> <betray> <obj1>": 1}
    tables["inverted4"] = {"<det> <turned4>": 1}
    tables["turned4"] = {"<noun.sing> <betray> <obj2>": 2, "<adj> <noun.sing> <betray> <obj1>": 1}
    return tables


def sentences() -> Tables:
    """Whole lines of five feet, one or two to a sentence, and couplets that rhyme."""
    ask = "<det> <noun.sing> <betray> <det> <adj> <rhyme>"
    answer = "<and> <now> <det> <noun.sing> <betray.sing> <det> <adj>"
    tables: Tables = {
        "sentence": {
            "<clause5><end>": 26,
            "<shall> <they> <betray> <obj3>?\n": 2,
            "<wilt> thou <betray> <obj3>?\n": 1,
            "what <sing5>?\n": 1,
            "whose <both5>?\n": 1,
            "who <love.sing> <obj4>?\n": 1,
            "<why> <aux.sing> <inverted4>?\n": 2,
            "<pray> let <inverted4>.\n": 2,
            "if <now> <clause4>,\nthen <aux.sing> <inverted4>.\n": 2,
            "to <question>": 1,
        },
        "end": {".\n": 10, "!\n": 2, ",\n<and> <now> <clause4>.\n": 6, ":\n<clause5>.\n": 2},
        "question": zipf(f"{verb} or not to {verb}, <clause2>.\n" for verb in QUESTIONED.split()),
        "couplet": {f"<so> <aux.sing> {ask}": 1},
    }
    rhymes = {word: group.split() for group in RHYMES for word in group.split()}
    tables["rhyme"] = zipf(f"{word},\n{answer} <rhyme.{word}>.\n" for word in rhymes)
    for word, group in rhymes.items():
        tables[f"rhyme.{word}"] = zipf(other for other in group if other != word)
    return tables


# --- scenes -------------------------------------------------------------------------------------------------------

FEWEST, MOST = 2, 5  # people on stage


def scene_tables() -> Tables:
    """Who comes, speaks, is spoken to and leaves. Only who is on stage speaks, and who is spoken to by name answers."""
    rest = len(CAST)
    tables: Tables = {
        "scene": {f"SCENE. A <spot> <near> the <site>, at <hour>.\n\n[Enter <enter:{rest}><second>": 1},
        "second": {f" and <enter:{rest - 1}>]\n\n<begin2>": 2, f", <enter:{rest - 1}><third>": 3},
        "third": {
            f" and <enter:{rest - 2}>]\n\n<begin3>": 3,
            f", <enter:{rest - 2}> and <enter:{rest - 3}>]\n\n<begin4>": 2,
        },
        "plain": {"<sentence><more>": 1},
        "more": {"\n": 2, "<sentence><last>": 3},
        "last": {"\n": 4, "<sentence>\n": 3, "<couplet>\n": 1},
        "hail": {"<hark>: <clause3>.\n": 2, "<aux.sing> <inverted3>?\n": 1},
    }
    for here in range(FEWEST, MOST + 1):
        others = here - 1
        tables |= {
            f"turn{here}": {f"<speaker:{others}>:\n<speech{here}>": 1},
            f"answer{here}": {f"<speaker:1>:\n<speech{here}>": 1},
            f"speech{here}": {
                f"<plain><next{here}>": 7,
                f"<other:{others}>, <hail><more><answer{here}>": 2,
                f"[<manner{here}>": 1,
            },
            f"manner{here}": {f"<mood>]\n<plain><next{here}>": 1, f"to <other:{others}>]\n<plain><answer{here}>": 1},
            f"next{here}": {f"<turn{here}>": 3, f"[<event{here}>": 1},
            f"event{here}": event(here),
        }
        if here < MOST:  # nobody here has just spoken
            tables[f"begin{here}"] = {f"<speaker:{here}>:\n<speech{here}>": 1}
    return tables


def event(here: int) -> dict[str, int]:
    table = {"Exeunt]\n\n": 2, f"<pronoun:1> <weeps>]\n\n<turn{here}>": 2}
    if here < MOST:
        table[f"Enter <enter:{len(CAST) - here}>]\n\n<turn{here + 1}>"] = 2
    if here > FEWEST:
        table[f"Exit <leaver:1>]\n\n<begin{here - 1}>"] = 2
    return table


# --- the grammar as the program reads it --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Person:
    """A slot for a name: one of `among` people who could be meant, all equally likely."""

    role: str
    among: int

    def written(self, name: str) -> str:
        if self.role == "pronoun":
            return "She" if name in WOMEN else "He"
        return name.upper() if self.role == "speaker" else name


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for another rule."""

    rule: str


Symbol = str | Person | Slot


@dataclass(frozen=True, slots=True)
class Rule:
    bodies: list[tuple[Symbol, ...]]
    bounds: list[int]  # running sums of the weights
    nats: list[float]  # of choosing each body


def symbol(part: str) -> Symbol:
    if not part.startswith("<"):
        return part
    name, _, among = part[1:-1].partition(":")
    return Person(name, int(among)) if among else Slot(name)


@cache
def grammar() -> dict[str, Rule]:
    """All rules, their templates cut into symbols."""
    rules = {}
    for tables in (word_tables(), noun_phrases(), verb_phrases(), clauses(), sentences(), scene_tables()):
        for name, table in tables.items():
            bodies = [tuple(symbol(part) for part in re.split(r"(<[^>]*>)", body) if part) for body in table]
            total = sum(table.values())
            nats = [math.log(total / weight) for weight in table.values()]
            rules[name] = Rule(bodies, list(accumulate(table.values())), nats)
    return rules


# --- sampling -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stage:
    """Who is on stage, who spoke last and who was spoken to."""

    present: list[str] = field(default_factory=list)
    speaker: str = ""
    addressed: str = ""

    def candidates(self, role: str) -> list[str]:
        if role == "enter":
            return [name for name in CAST if name not in self.present]
        if role in ("leaver", "pronoun"):
            return [self.speaker]
        if role == "speaker" and self.addressed:
            return [self.addressed]
        return [name for name in self.present if name != self.speaker]

    def act(self, role: str, name: str) -> None:
        if role == "enter":
            self.present.append(name)
        elif role == "leaver":
            self.present.remove(name)
            self.speaker = ""
        elif role == "speaker":
            self.speaker, self.addressed = name, ""
        elif role == "other":
            self.addressed = name


@dataclass(frozen=True, slots=True)
class Piece:
    """A scene. `nats` is -ln of its probability; scenes are independent of each other."""

    text: str
    nats: float


def pieces(size: int = 1_000_000, seed: int = 1) -> Iterator[Piece]:
    """Scenes until at least `size` characters have come. The same text for a seed everywhere: all draws are made
    of `Random.random()`, whose values Python guarantees."""
    random = Random(seed)
    while size > 0:
        piece = scene(random)
        size -= len(piece.text)
        yield piece


def scene(random: Random) -> Piece:
    rules, stage = grammar(), Stage()
    todo: list[Symbol] = [Slot("scene")]
    written: list[str] = []
    nats = 0.0
    while todo:
        match todo.pop():
            case str(text):
                written.append(text)
            case Slot(name):
                rule = rules[name]
                chosen = bisect_right(rule.bounds, int(random.random() * rule.bounds[-1]))
                nats += rule.nats[chosen]
                todo.extend(reversed(rule.bodies[chosen]))
            case Person(role, among) as person:
                names = stage.candidates(role)
                assert len(names) == among, (role, names)
                name = names[int(random.random() * among)]
                nats += math.log(among)
                stage.act(role, name)
                written.append(person.written(name))
    return Piece(capitalised("".join(written)), nats)


def capitalised(text: str) -> str:
    """Every line begins with a capital, which carries no choice."""
    return re.sub(r"^\[?[a-z]", lambda start: start[0].upper(), text, flags=re.MULTILINE)


# --- entropy ------------------------------------------------------------------------------------------------------


def entropy_rate() -> float:
    """Nats per character in the long run: a scene's expected nats over its expected characters, not sampled.

    For each rule, expected = own + sum over the slots of p * expected of the slot: linear equations, because turn
    follows turn without a limit. A name counts with the mean length over the cast. That is exact: no rule looks at who
    somebody is, so whoever a slot means is equally likely to be anyone.
    """
    rules = grammar()
    row = {name: i for i, name in enumerate(rules)}
    uses = np.zeros((len(rules), len(rules)))
    own = np.zeros((len(rules), 2))
    for name, rule in rules.items():
        for body, nats in zip(rule.bodies, rule.nats, strict=True):
            probability = math.exp(-nats)
            own[row[name], 1] += probability * nats
            for part in body:
                if isinstance(part, Slot):
                    uses[row[name], row[part.rule]] += probability
                else:
                    own[row[name]] += probability * np.array(chars_and_nats(part))
    chars, nats = np.linalg.solve(np.eye(len(rules)) - uses, own)[row["scene"]]
    return float(nats / chars)


def chars_and_nats(part: str | Person) -> tuple[float, float]:
    if isinstance(part, str):
        return len(part), 0.0
    return sum(len(part.written(name)) for name in CAST) / len(CAST), math.log(part.among)
