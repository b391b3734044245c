#!/usr/bin/env python3
"""Make the synthetic corpora and training files of this folder.

Every passage is about one made-up thing: a city, an alloy, a person or an event, in turn. It is a pure function of
the seed and its index, so a smaller corpus is a prefix of a larger one and any size can be streamed:

    corpus_NAME.txt    one passage per line; the passage's id is the file's name and its line, as corpus_NAME.txt:1
    rag_train.jsonl    {"id", "question", "answers", "positive_ids"}: questions about the largest corpus
    cpt_train.jsonl    {"id", "text"}: long articles about things that are in none of the corpora

What a question asks for is stated in one passage only: the thing's name occurs nowhere else.
Same seed, same bytes, on every Python from 3.11 on. Standard library only.

Example: python data/make_corpus.py --out_dir data
"""

import argparse
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Facts = dict[str, str]

PER_REGION = 8  # neighbouring passages that share a region: near misses for a retriever, material for one article
SPANISH_PERCENT, CHINESE_PERCENT = 10, 5  # of the passages hold one sentence in that language

# =============================================================================
# 1. Chance. Everything random comes from randrange, which gives the same numbers on every Python version.
# =============================================================================


def make_rng(seed: int, stream: int, index: int) -> random.Random:
    """The generator of item `index` in stream 0, 1, ...; no two items share one while index < 2**40."""
    return random.Random((seed << 44) + (stream << 40) + index)


PASSAGES, QUESTIONS, ARTICLES, ORDERS = range(4)  # the streams


def pick(items: Sequence[T], rng: random.Random) -> T:
    """One of the items."""
    return items[rng.randrange(len(items))]


def shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    """All items, in another order."""
    rest = list(items)
    return [rest.pop(rng.randrange(len(rest))) for _ in items]


@dataclass(frozen=True)
class Order:
    """The permutation j -> (step * j + start) % size of range(size)."""

    size: int
    step: int
    start: int

    def __call__(self, j: int) -> int:
        return (self.step * j + self.start) % self.size


def make_order(size: int, rng: random.Random) -> Order:
    """A seeded permutation of range(size) that needs no list, so that a corpus of any size fits in memory."""
    step = 1 + rng.randrange(size)
    while math.gcd(step, size) != 1:
        step += 1
    return Order(size, step, rng.randrange(size))


# =============================================================================
# 2. Names. An index in, a name out, no name twice.
#    A name is FIRST + (more middles) + MIDDLE + ending. First and middles are consonants and one vowel, an ending is
#    one closed syllable, and no ending serves two kinds of name; so a name can be read back in one way only.
# =============================================================================

FIRSTS = (
    "Ba", "Be", "Bo", "Bra", "Bre", "Ce", "Cla", "Co", "Da", "De", "Do", "Dra", "Dre", "Fe", "Flo", "Ga", "Gle",
    "Go", "Gra", "Ha", "He", "Ja", "Jo", "Ka", "Ke", "Kla", "Ko", "La", "Le", "Lo", "Ma", "Me", "Mo", "Na", "Ne",
    "No", "Pla", "Plo", "Ra", "Re", "Ro", "Sa", "Se", "So", "Sta", "Ste", "Ta", "Te", "To", "Tra", "Va", "Ve", "Vo",
    "Za", "Ze",
)  # fmt: skip
MIDDLES = (
    "bi", "da", "di", "du", "ga", "gu", "ki", "la", "li", "lo", "lu", "ma", "mi", "mu", "na", "ni", "nu", "ra",
    "ri", "ro", "ru", "sa", "si", "ta", "ti", "tu", "va", "vi", "vu",
)  # fmt: skip
ENDINGS = {
    "city": ("ton", "ford", "wick", "stead", "holm", "burg", "mont", "port", "gard", "beck"),
    "river": ("ren", "mer", "lin", "wen", "dal", "sar", "ther", "vel", "min", "gor"),
    "alloy": ("rex", "dur", "loy", "mag", "var", "stel", "kon", "tex", "dium", "trit"),
    "surname": ("sen", "well", "ward", "kov", "ler", "quist", "mann", "vist", "lund", "berg"),
    "university": ("hurst", "ham", "worth", "den", "stock", "dorf", "fell", "sund", "bach", "strand"),
    "event": ("mark", "tell", "bran", "dor", "rick", "fin", "gan", "lor", "thal", "vand"),
    "place": ("crest", "marsh", "glen", "cross", "point", "reach", "cliff", "moor", "heath", "wood"),
    "region": ("land", "shir", "reth", "mond", "vern", "gast", "tir", "wald", "thorn", "zel"),
}


def spell(number: int, ending: str) -> str:
    """The name whose first and middle syllables stand for `number`, counted in mixed radix.

    Example: 0 -> "Babi", 1 -> "Bebi" for an empty ending; past all pairs of a first and a middle another middle joins.
    """
    number, first = divmod(number, len(FIRSTS))
    number, middle = divmod(number, len(MIDDLES))
    middles = [MIDDLES[middle]]
    while number:  # only past the first tier, where two syllables have run out
        number, middle = divmod(number, len(MIDDLES))
        middles.append(MIDDLES[middle])
    return FIRSTS[first] + "".join(reversed(middles)) + ending


@dataclass(frozen=True)
class World:
    """A seed, and the orders in which it hands out names and melting points."""

    seed: int
    names: dict[str, Order]
    melting: Order

    def name(self, kind: str, index: int) -> str:
        """The index-th name of a kind of ENDINGS; different indices give different names."""
        order, endings = self.names[kind], ENDINGS[kind]
        tier, j = divmod(index, order.size)
        number, ending = divmod(order(j), len(endings))
        return spell(tier * (order.size // len(endings)) + number, endings[ending])


def make_world(seed: int) -> World:
    """The world of a seed, which must not be negative."""
    if seed < 0:
        raise ValueError(f"need seed >= 0, got {seed}")
    sizes = {kind: len(FIRSTS) * len(MIDDLES) * len(endings) for kind, endings in ENDINGS.items()}
    names = {kind: make_order(size, make_rng(seed, ORDERS, i)) for i, (kind, size) in enumerate(sizes.items())}
    return World(seed, names, make_order(25_000, make_rng(seed, ORDERS, len(names))))


# =============================================================================
# 3. Facts. What is true of the item-th city, alloy, person or event, as strings ready to be written.
# =============================================================================

PRODUCTS = (
    "glass lamps", "woollen coats", "painted tiles", "church bells", "wooden toys", "leather gloves", "rowing boats",
    "silk scarves", "pocket watches", "copper kettles", "wicker chairs", "paper kites", "steel knives", "clay jugs",
    "almond cakes", "smoked cheeses", "printed maps", "linen sheets", "straw hats", "string instruments",
)  # fmt: skip
METALS = (
    "nickel", "chromium", "cobalt", "copper", "tin", "zinc", "titanium", "iron", "aluminium", "manganese", "silver",
    "molybdenum", "vanadium", "niobium",
)  # fmt: skip
USES = (
    "turbine blades", "surgical needles", "ship propellers", "organ pipes", "clock springs", "satellite frames",
    "cutting tools", "bridge cables", "pump valves", "bicycle frames", "cooking pans", "drill heads", "guitar strings",
    "watch cases", "railway points", "heat shields", "door locks", "camera bodies",
)  # fmt: skip
GIVEN_NAMES = (
    ("Alma", "she"), ("Anton", "he"), ("Beatriz", "she"), ("Bruno", "he"), ("Clara", "she"), ("Darius", "he"),
    ("Edith", "she"), ("Emil", "he"), ("Farida", "she"), ("Felix", "he"), ("Greta", "she"), ("Hugo", "he"),
    ("Ines", "she"), ("Ivan", "he"), ("Judith", "she"), ("Jonas", "he"), ("Karin", "she"), ("Kofi", "he"),
    ("Leila", "she"), ("Leon", "he"), ("Marta", "she"), ("Miguel", "he"), ("Nadia", "she"), ("Oskar", "he"),
    ("Paula", "she"), ("Rafael", "he"), ("Rosa", "she"), ("Samuel", "he"), ("Thea", "she"), ("Viktor", "he"),
)  # fmt: skip
JOBS = (
    "scholar", "naturalist", "writer", "teacher", "librarian", "engineer", "geographer", "physician", "astronomer",
    "historian", "printer", "surveyor",
)  # fmt: skip
WORKS = (
    "a catalogue of mountain birds", "a map of the northern lakes", "a theory of tides", "a dictionary of river names",
    "a study of wild bees", "a history of paper", "an atlas of clouds", "a method of grinding lenses",
    "a survey of old bridges", "a collection of folk songs", "a treatise on harmony", "an encyclopedia of mosses",
    "a grammar of sign language", "a table of star positions", "a handbook of ship repair", "a guide to edible roots",
)  # fmt: skip
EVENT_TYPES = (  # English, Spanish with its article, Chinese
    ("Regatta", "la Regata", "赛艇会"),
    ("Lantern Festival", "el Festival de Faroles", "灯笼节"),
    ("Chess Congress", "el Congreso de Ajedrez", "国际象棋大会"),
    ("Harvest Fair", "la Feria de la Cosecha", "丰收集市"),
    ("Book Fair", "la Feria del Libro", "书展"),
    ("Kite Festival", "el Festival de Cometas", "风筝节"),
    ("Song Contest", "el Certamen de Canto", "歌唱比赛"),
    ("Flower Show", "la Exposición de Flores", "花展"),
    ("Science Congress", "el Congreso de Ciencias", "科学大会"),
    ("Horse Show", "la Exhibición Ecuestre", "马术表演"),
    ("Glass Exhibition", "la Exposición de Vidrio", "玻璃展览会"),
    ("Bell Concert", "el Concierto de Campanas", "钟声音乐会"),
)


def city_facts(world: World, item: int, rng: random.Random) -> Facts:
    """A city and its river, both named nowhere else."""
    return {
        "city": world.name("city", item),
        "river": world.name("river", item),
        "founded": str(900 + rng.randrange(1000)),
        "product": pick(PRODUCTS, rng),
        "residents": f"{4_000 + 100 * rng.randrange(9_000):,}",
        "bridges": pick(("two", "three", "four", "five", "six", "seven"), rng),
        "side": pick(("northern", "southern", "eastern", "western"), rng),
        "count": str(20 + rng.randrange(300)),
        "height": str(25 + rng.randrange(60)),
    }


def alloy_facts(world: World, item: int, rng: random.Random) -> Facts:
    """An alloy named nowhere else; its melting point is no other alloy's among the first 25,000."""
    tenths = 4000 + world.melting(item % world.melting.size)  # 400.0 to 2899.9 °C
    first, second, third = shuffled(METALS, rng)[:3]
    share = 50 + rng.randrange(30)
    rest = 5 + rng.randrange(15)
    return {
        "alloy": world.name("alloy", item),
        "melting": f"{tenths // 10}.{tenths % 10}",
        "melting_es": f"{tenths // 10},{tenths % 10}",  # Spanish writes a decimal comma
        "metal": first,
        "metal2": second,
        "recipe": f"{share}% {first}, {100 - share - rest}% {second} and {rest}% {third}",
        "use": pick(USES, rng),
        "density": f"{3 + rng.randrange(9)}.{rng.randrange(10)}",
        "tint": pick(("pale blue", "warm yellow", "dark grey", "faint green", "silvery", "reddish"), rng),
        "ingot": str(2 + rng.randrange(70)),
        "year": str(1850 + rng.randrange(165)),
    }


def person_facts(world: World, item: int, rng: random.Random) -> Facts:
    """A person and a university, both named nowhere else."""
    given, pronoun = pick(GIVEN_NAMES, rng)
    surname, job, born = world.name("surname", item), pick(JOBS, rng), 1750 + rng.randrange(230)
    return {
        "person": f"{given} {surname}",
        "surname": surname,
        "university": world.name("university", item),
        "born": str(born),
        "graduated": str(born + 21 + rng.randrange(8)),
        "job": job,
        "a_job": f"{'an' if job[0] in 'aeiou' else 'a'} {job}",
        "work": pick(WORKS, rng),
        "he": pronoun,
        "He": pronoun.capitalize(),
        "him": "her" if pronoun == "she" else "him",
        "His": "Her" if pronoun == "she" else "His",
        "years": pick(("three", "four", "six", "eight", "nine", "eleven"), rng),
        "count": str(30 + rng.randrange(900)),
        "distance": pick(("two", "five", "six", "ten", "twelve"), rng),
    }


def event_facts(world: World, item: int, rng: random.Random) -> Facts:
    """An event and its place, both named nowhere else."""
    name, (english, spanish, chinese) = world.name("event", item), pick(EVENT_TYPES, rng)
    return {
        "event": f"{name} {english}",
        "event_es": f"{spanish} {name}",
        "Event_es": f"{spanish[0].upper()}{spanish[1:]} {name}",
        "event_zh": f"{name} {chinese}",
        "place": world.name("place", item),
        "year": str(1780 + rng.randrange(240)),
        "people": f"{300 + 10 * rng.randrange(6_000):,}",
        "weather": pick(("cold", "warm", "windy", "dry", "wet", "foggy"), rng),
        "days": pick(("two", "three", "four", "five", "nine"), rng),
        "count": str(12 + rng.randrange(80)),
    }


# =============================================================================
# 4. Templates. For each kind: what a passage always says, what it may add, and what can be asked.
# =============================================================================


@dataclass(frozen=True)
class Statement:
    """One fact in several wordings: openers name the thing and the region, follow-ups lean on an earlier sentence."""

    openers: tuple[str, ...]
    follow_ups: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """One question in several wordings, and the wordings of its answer; each of those stands in the passage."""

    wordings: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of passage."""

    facts: Callable[[World, int, random.Random], Facts]
    core: tuple[Statement, ...]  # all of them are in every passage, for a question may ask for any
    extras: tuple[tuple[str, ...], ...]  # two or three of them are, each in one of its wordings
    spanish: tuple[str, ...]
    chinese: tuple[str, ...]
    questions: tuple[Question, ...]
    links: tuple[tuple[str, ...], tuple[str, ...]]  # how an article comes to its first and to its second of the kind


CITY = Kind(
    facts=city_facts,
    core=(
        Statement(
            openers=(
                "{city} lies on the river {river}, in a part of {region} where two old trade roads meet.",
                "On the banks of the {river} stands {city}, a city in {region} with a long market street.",
                "The river {river} flows through the middle of {city}, one of the cities of the region of {region}.",
            ),
            follow_ups=(
                "The city stands on the river {river}, which floods the lower streets in some springs.",
                "Its river is the {river}, and barges still unload below the old customs house.",
                "Through the centre runs the river {river}, crossed by {bridges} stone bridges.",
            ),
        ),
        Statement(
            openers=(
                "{city}, founded in {founded} by settlers from the coast, is today a busy city in {region}.",
                "In {founded}, a small group of traders founded {city}, now a city of some weight in {region}.",
            ),
            follow_ups=(
                "The city was founded in {founded}, and a bronze plate on the town hall still gives that year.",
                "According to its archive it was founded in {founded}, on the site of a ferry house.",
                "Founded in {founded}, it has kept large parts of its first wall.",
            ),
        ),
        Statement(
            openers=(
                "Few places in {region} are as closely linked with {product} as the city of {city}.",
                "{city} is a city in {region} that made its name with {product}.",
            ),
            follow_ups=(
                "Its workshops are known for {product}, which are sold far beyond the valley.",
                "Much of its income comes from {product}, made by some {count} family firms.",
                "Visitors usually come for the {product} that are sold along the quay.",
            ),
        ),
    ),
    extras=(
        (
            "About {residents} people live there, and many of them go to work by tram.",
            "The last census counted {residents} residents, slightly more than ten years before.",
        ),
        (
            "Summers are mild, while fog from the {side} hills covers the streets in late autumn.",
            "A wind from the {side} plain keeps the air dry for most of the year.",
        ),
        (
            "A museum beside the {side} gate keeps {count} old maps of the surrounding country.",
            "The library near the {side} gate lends out musical scores as well as books.",
        ),
        (
            "The clock tower, {height} metres high, can be seen from every village nearby.",
            "A lighthouse of {height} metres, far from any sea, was built there as a joke and never taken down.",
        ),
    ),
    spanish=(
        "La ciudad de {city} se encuentra a orillas del río {river}.",
        "El río que atraviesa {city} se llama {river}.",
    ),
    chinese=("{city} 市坐落在 {river} 河畔。", "流经 {city} 市的河流是 {river} 河。"),
    questions=(
        Question(
            wordings=(
                "On which river does {city} lie?",
                "Which river flows through the city of {city}?",
                "What is the name of the river at {city}?",
                "{city} was built on the banks of which river?",
            ),
            answers=("{river}",),
        ),
        Question(
            wordings=("Which city lies on the river {river}?", "What city does the river {river} flow through?"),
            answers=("{city}",),
        ),
        Question(
            wordings=(
                "When was {city} founded?",
                "In which year was the city of {city} founded?",
                "What year is given for the founding of {city}?",
            ),
            answers=("{founded}",),
        ),
        Question(
            wordings=("What goods is the city of {city} known for?", "Which products made {city} well known?"),
            answers=("{product}",),
        ),
    ),
    links=(
        (
            "Travellers who come to {region} usually begin with a city.",
            "It is best to start with a city, since most roads of {region} end there.",
            "The first stop in {region} is a city.",
        ),
        (
            "From there the road leads on to a second city.",
            "Nobody should leave without having seen another city.",
            "A day's journey further on there is one more city.",
        ),
    ),
)

ALLOY = Kind(
    facts=alloy_facts,
    core=(
        Statement(
            openers=(
                "{alloy} is an alloy with a melting point of {melting} °C, first cast in a foundry in {region}.",
                "The alloy {alloy} melts at {melting} °C, a figure confirmed by two laboratories in {region}.",
                "At {melting} °C the alloy {alloy}, a product of the foundries of {region}, begins to melt.",
            ),
            follow_ups=(
                "Its melting point is {melting} °C, measured on samples that had been cooled slowly.",
                "In the furnace it melts at {melting} °C and turns solid again within a few degrees of that value.",
                "Careful tests put its melting point at {melting} °C.",
            ),
        ),
        Statement(
            openers=(
                "{alloy}, an alloy from {region}, is made of {recipe}.",
                "Engineers in {region} obtained the alloy {alloy} by melting together {recipe}.",
            ),
            follow_ups=(
                "The alloy contains {recipe}, along with traces of carbon.",
                "By weight it is made up of {recipe}.",
                "Its recipe has never been a secret: {recipe}.",
            ),
        ),
        Statement(
            openers=(
                "{alloy} is an alloy that is mainly used for {use}, and most of it is produced in {region}.",
                "Makers of {use} in {region} have relied on the alloy {alloy} for many years.",
            ),
            follow_ups=(
                "It is mainly used for {use}, where it has replaced ordinary steel.",
                "Today most of the alloy goes into {use}, and only a little into coins.",
                "Its main use is in {use}, because it keeps its shape under load.",
            ),
        ),
    ),
    extras=(
        (
            "A cubic centimetre of it weighs {density} grams, so it is easily told from lead.",
            "Its density is {density} grams per cubic centimetre, which surprised the first buyers.",
        ),
        (
            "When polished it takes on a {tint} tint that fades slowly in sea air.",
            "A fresh cut looks {tint}, but the surface turns dull within a week.",
        ),
        (
            "The first ingot, which weighed {ingot} kilograms, was poured in {year} and is now in a museum.",
            "Since {year} it has been sold in bars of {ingot} kilograms.",
        ),
        (
            "Its price depends mostly on the supply of {metal2}, so small foundries buy it a year ahead.",
            "Without the {metal2} it would be too brittle to be drawn into wire.",
        ),
    ),
    spanish=(
        "La aleación {alloy} se funde a {melting_es} °C.",
        "El punto de fusión de la aleación {alloy} es de {melting_es} °C.",
    ),
    chinese=("{alloy} 合金的熔点是 {melting} 摄氏度。", "这种名为 {alloy} 的合金在 {melting} 摄氏度时熔化。"),
    questions=(
        Question(
            wordings=(
                "What is the melting point of {alloy}?",
                "At what temperature does the alloy {alloy} melt?",
                "How hot must {alloy} become before it melts?",
            ),
            answers=("{melting} °C", "{melting}"),
        ),
        Question(
            wordings=(
                "Which metal makes up the largest part of {alloy}?",
                "What is the main component of the alloy {alloy}?",
            ),
            answers=("{metal}",),
        ),
        Question(
            wordings=("What is the alloy {alloy} mainly used for?", "What is the main use of {alloy}?"),
            answers=("{use}",),
        ),
    ),
    links=(
        (
            "The wealth of {region} comes largely from its foundries.",
            "Metal is the pride of {region}, as one example shows.",
            "In the smoke of the furnaces another side of {region} can be seen.",
        ),
        (
            "The foundries have a second metal to offer.",
            "A rival foundry answered with a metal of its own.",
            "Later another alloy came out of the same furnaces.",
        ),
    ),
)

PERSON = Kind(
    facts=person_facts,
    core=(
        Statement(
            openers=(
                "{person} graduated from the University of {university} in {graduated} and later settled in {region}.",
                "The {job} {person} studied at the University of {university}, far from the family home in {region}.",
                "At the University of {university}, {person} took a first degree before becoming {a_job} in {region}.",
            ),
            follow_ups=(
                "{He} studied at the University of {university} and shared a room there with two musicians.",
                "After school {he} went to the University of {university}, where {he} graduated in {graduated}.",
                "A scholarship brought {him} to the University of {university}, the only one {he} ever attended.",
            ),
        ),
        Statement(
            openers=(
                "{person} was born in {born} in a village in {region} and became {a_job}.",
                "Born in {born} in {region}, {person} was the youngest child of a miller.",
            ),
            follow_ups=(
                "{surname} was born in {born}, in the winter in which the old mill burned down.",
                "The parish register gives {born} as the year in which {he} was born.",
                "{He} was born in {born} and grew up in a house full of books.",
            ),
        ),
        Statement(
            openers=(
                "{person}, {a_job} from {region}, is remembered for {work}.",
                "In {region} the {job} {person} is still well known for {work}.",
            ),
            follow_ups=(
                "{He} became known for {work}, which took {years} years to complete.",
                "{His} best known achievement is {work}.",
                "Colleagues admired {him} above all for {work}.",
            ),
        ),
    ),
    extras=(
        (
            "{surname} never owned a carriage and walked {distance} kilometres every day.",
            "Friends describe {him} as quiet, patient and hopeless with money.",
        ),
        (
            "In old age {he} kept a garden with {count} kinds of roses.",
            "{His} letters, {count} in number, are kept in a library near the coast.",
        ),
        (
            "A street and a small school were later named after {him}.",
            "A prize that bears the name {surname} is given to young people every second year.",
        ),
        (
            "For {years} years {he} also played the cello in a local orchestra.",
            "{He} spent {years} years abroad and came home with trunks full of notes.",
        ),
    ),
    spanish=(
        "{person} se graduó en la Universidad de {university}.",
        "{person} estudió en la Universidad de {university} y nació en {born}.",
    ),
    chinese=("{person} 毕业于 {university} 大学。", "{person} 曾在 {university} 大学读书。"),
    questions=(
        Question(
            wordings=(
                "Which university did {person} attend?",
                "Where did {person} study?",
                "At which university did {person} take a degree?",
                "From which university did {person} graduate?",
            ),
            answers=("University of {university}", "{university}"),
        ),
        Question(
            wordings=(
                "Who studied at the University of {university}?",
                "Who took a degree at the University of {university}?",
            ),
            answers=("{person}",),
        ),
        Question(
            wordings=("When was {person} born?", "In which year was {person} born?"),
            answers=("{born}",),
        ),
        Question(
            wordings=("What is {person} remembered for?", "For what work is {person} best known?"),
            answers=("{work}",),
        ),
    ),
    links=(
        (
            "A region is also the people who lived in it.",
            "No account of {region} is complete without one particular life.",
            "The schools of {region} still tell their pupils about one person.",
        ),
        (
            "Another life deserves a few lines here.",
            "There is a second name that every child in {region} knows.",
            "One more portrait hangs in the same hall.",
        ),
    ),
)

EVENT = Kind(
    facts=event_facts,
    core=(
        Statement(
            openers=(
                "The {event} was held in {year} and is still the subject of many stories in {region}.",
                "In {year}, guests from all over {region} came together for the {event}.",
            ),
            follow_ups=(
                "It was held in {year}, a full year later than planned.",
                "The year was {year}, and the weather was unusually {weather}.",
                "It took place in {year}, in the week after the first hay was brought in.",
            ),
        ),
        Statement(
            openers=(
                "{place}, a small town in {region}, was the site of the {event}.",
                "The {event} was held on the meadows outside {place}, a town in {region}.",
            ),
            follow_ups=(
                "It was held in {place}, a town that had a single inn at that time.",
                "The organisers had chosen the town of {place} because of the wide meadow behind its church.",
                "People in {place}, where it took place, still point out the spot where the tents stood.",
            ),
        ),
        Statement(
            openers=(
                "Some {people} people attended the {event}, more than anyone in {region} had expected.",
                "With {people} people attending, the {event} filled every inn in this part of {region}.",
            ),
            follow_ups=(
                "According to the official count, {people} people attended.",
                "About {people} people came, many of them on foot.",
                "The ticket office counted {people} people over {days} days.",
            ),
        ),
    ),
    extras=(
        (
            "A brass band of {count} players opened the first morning.",
            "The opening speech lasted so long that {count} lamps had to be lit before it ended.",
        ),
        (
            "First prize was a silver cup, which the winner gave to the fire brigade.",
            "Nobody won first prize, because the judges could not agree.",
        ),
        (
            "It lasted {days} days and ended with a supper in the open air.",
            "After {days} days the last visitors went home by cart and by boat.",
        ),
        (
            "The {weather} weather forced the organisers to move the final part indoors.",
            "Posters announcing it, {count} of which survive, show a heron with an umbrella.",
        ),
    ),
    spanish=(
        "{Event_es} se celebró en {year}.",
        "En {year} se celebró {event_es}, con la asistencia de numerosos visitantes.",
    ),
    chinese=("{event_zh}于 {year} 年举行。", "{event_zh}于 {year} 年在 {place} 举行。"),
    questions=(
        Question(
            wordings=(
                "In which year was the {event} held?",
                "When did the {event} take place?",
                "What was the year of the {event}?",
            ),
            answers=("{year}",),
        ),
        Question(
            wordings=("Where was the {event} held?", "In which town did the {event} take place?"),
            answers=("{place}",),
        ),
        Question(
            wordings=("How many people attended the {event}?", "What was the number of people at the {event}?"),
            answers=("{people}",),
        ),
        Question(
            wordings=("Which event was held in {place}?", "What event took place in the town of {place}?"),
            answers=("{event}",),
        ),
    ),
    links=(
        (
            "The people of {region} are fond of celebrations.",
            "Once in its history {region} drew visitors from everywhere.",
            "Older people in {region} like to talk about one great day.",
        ),
        (
            "Another gathering has been remembered just as well.",
            "It was not the only occasion of its kind.",
            "A second event is worth telling here.",
        ),
    ),
)

KINDS = (CITY, ALLOY, PERSON, EVENT)
MIN_QUESTIONS = min(len(kind.questions) for kind in KINDS)

# =============================================================================
# 5. Passages, questions, articles. Pure functions of the world and an index.
# =============================================================================


@dataclass(frozen=True)
class Passage:
    """A passage, with the facts from which it was written."""

    kind: Kind
    facts: Facts
    text: str


def foreign_sentence(kind: Kind, rng: random.Random) -> list[str]:
    """The main fact again in Spanish or Chinese, for a few passages; else an empty list."""
    percent = rng.randrange(100)
    if percent < SPANISH_PERCENT:
        return [pick(kind.spanish, rng)]
    if percent < SPANISH_PERCENT + CHINESE_PERCENT:
        return [pick(kind.chinese, rng)]
    return []


def choose_sentences(kind: Kind, rng: random.Random) -> list[str]:
    """Templates for a passage of 5 or 6 sentences: the core facts in any order, with others among them."""
    first, *others = shuffled(kind.core, rng)
    additions = foreign_sentence(kind, rng) + [pick(extra, rng) for extra in shuffled(kind.extras, rng)]
    followers = [pick(statement.follow_ups, rng) for statement in others] + additions[: 2 + rng.randrange(2)]
    return [pick(first.openers, rng), *shuffled(followers, rng)]


def make_passage(world: World, index: int) -> Passage:
    """The passage with a 0-based index."""
    kind = KINDS[index % len(KINDS)]
    rng = make_rng(world.seed, PASSAGES, index)
    facts = kind.facts(world, index // len(KINDS), rng)
    facts["region"] = world.name("region", index // PER_REGION)
    return Passage(kind, facts, " ".join(choose_sentences(kind, rng)).format(**facts))


def make_question(world: World, index: int, turn: int) -> dict[str, Any]:
    """The question asked of a passage in turn 0, 1, ...; different turns below MIN_QUESTIONS ask different things."""
    passage, rng = make_passage(world, index), make_rng(world.seed, QUESTIONS, index)
    offset = rng.randrange(len(passage.kind.questions))
    question = passage.kind.questions[(offset + turn) % len(passage.kind.questions)]
    return {
        "question": pick(question.wordings, rng).format(**passage.facts),
        "answers": [answer.format(**passage.facts) for answer in question.answers],
    }


OPENINGS = (
    "{region} lies between the hills and the sea, and it is smaller than most maps suggest.",
    "Not many guidebooks mention {region}, although there is more to tell about it than fits on a page.",
    "This is a short account of the region of {region}, put together from archives, catalogues and conversations.",
    "Whoever writes about {region} has to choose, for its towns and workshops could fill several volumes.",
)
CLOSINGS = (
    "That is how {region} presents itself to those who stay for more than a day.",
    "Much has been left out here, but these are the things about {region} that people ask for most often.",
    "Taken together, these places, people and metals make {region} what it is.",
    "With this the account of {region} comes to its end.",
)


def make_article(world: World, region: int) -> str:
    """A long text, about 400 to 700 words, on five to seven neighbours in one region, one paragraph each."""
    rng = make_rng(world.seed, ARTICLES, region)
    name = world.name("region", region)
    paragraphs = [pick(OPENINGS, rng).format(region=name)]
    for i in range(PER_REGION - 3 + rng.randrange(3)):
        passage = make_passage(world, region * PER_REGION + i)
        link = pick(passage.kind.links[i // len(KINDS)], rng)
        paragraphs.append(f"{link.format(region=name)} {passage.text}")
    return "\n\n".join([*paragraphs, pick(CLOSINGS, rng).format(region=name)])


# =============================================================================
# 6. Files. Sizes in, lines out, one at a time.
# =============================================================================


class UserError(Exception):
    """Something that whoever typed the command can mend."""


def share_questions(total: int, sizes: Sequence[int]) -> list[tuple[range, int]]:
    """How many questions to ask about the passages that each corpus adds to the next smaller one.

    sizes: ascending. Returns (indices, questions) pairs; the shares are even where the passages allow it. Raises
    UserError if there are too few passages for `total` questions.

    Example: 6 questions, sizes 1 and 4 -> [(range(0, 1), 3), (range(1, 4), 3)]
    """
    most = MIN_QUESTIONS * sizes[-1]
    if total > most:
        raise UserError(f"--qa {total} is too many: {sizes[-1]} passages answer at most {most} questions")
    shares, below = [], 0
    for i, size in enumerate(sizes):
        indices = range(below, size)
        later = MIN_QUESTIONS * (sizes[-1] - size)  # what the larger corpora could take at most
        even = (total + len(sizes) - i - 1) // (len(sizes) - i)
        share = min(max(even, total - later), MIN_QUESTIONS * len(indices))
        shares.append((indices, share))
        total, below = total - share, size
    return shares


def corpus_lines(world: World, size: int) -> Iterator[str]:
    """The passages 0 to size - 1."""
    return (make_passage(world, index).text for index in range(size))


def question_lines(world: World, total: int, sizes: Sequence[int], corpus: str) -> Iterator[str]:
    """JSON lines of questions: about the smallest corpus first, then about what each larger one adds.

    corpus: name of the largest one's file, which is part of a passage's id.
    """
    number = 0
    for indices, share in share_questions(total, sizes):
        order = make_order(max(len(indices), 1), make_rng(world.seed, ORDERS, 1000 + indices.start))
        for i in range(share):
            turn, j = divmod(i, len(indices))
            number, index = number + 1, indices[order(j)]
            question = {"id": f"qa-{number}"} | make_question(world, index, turn)
            yield to_json(question | {"positive_ids": [f"{corpus}:{index + 1}"]})


def article_lines(world: World, total: int, first_index: int) -> Iterator[str]:
    """JSON lines of articles about the regions that begin at passage `first_index` or later."""
    first_region = -(-first_index // PER_REGION)  # rounded up
    for i in range(total):
        yield to_json({"id": f"cpt-{i + 1}", "text": make_article(world, first_region + i)})


def to_json(record: dict[str, Any]) -> str:
    """One line of JSON with readable Spanish and Chinese."""
    return json.dumps(record, ensure_ascii=False)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines as UTF-8. The file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    count = 0
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            for line in lines:
                file.write(line + "\n")
                count += 1
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # only there if something went wrong
    print(f"{path.name}: {count} lines, {path.stat().st_size} bytes")


def make_files(out_dir: Path, *, seed: int, sizes: dict[str, int], qa: int, cpt: int) -> None:
    """Write every file. Raises UserError if `qa` is more than the largest corpus can answer."""
    world = make_world(seed)
    ascending, largest = sorted(sizes.values()), max(sizes, key=sizes.__getitem__)
    share_questions(qa, ascending)  # fail before the first file is written
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        write_lines(out_dir / f"corpus_{name}.txt", corpus_lines(world, size))
    write_lines(out_dir / "rag_train.jsonl", question_lines(world, qa, ascending, f"corpus_{largest}.txt"))
    write_lines(out_dir / "cpt_train.jsonl", article_lines(world, cpt, ascending[-1]))


def parse_sizes(text: str) -> dict[str, int]:
    """Corpus names and their passages. Example: "small=5,large=9" -> {"small": 5, "large": 9}"""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"([a-z0-9_]+)=([1-9][0-9]*)", part.strip())
        if not match or match[1] in sizes:
            raise argparse.ArgumentTypeError(f"want NAME=PASSAGES,... with distinct names in a-z, 0-9, _; got {text!r}")
        sizes[match[1]] = int(match[2])
    return sizes


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"want a whole number >= 0, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description="Make the synthetic corpora and training files.")
    here = Path(__file__).resolve().parent
    parser.add_argument("--out_dir", type=Path, default=here, help="where the files go (default: beside this script)")
    parser.add_argument("--seed", type=natural, default=1337, help="another seed, another world (default: %(default)s)")
    parser.add_argument(
        "--sizes",
        type=parse_sizes,
        default="small=500,medium=2000,large=3000",
        help="names of the corpora and their passages (default: %(default)s)",
    )
    parser.add_argument("--qa", type=natural, default=1200, help="questions (default: %(default)s)")
    parser.add_argument("--cpt", type=natural, default=400, help="long articles (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        make_files(args.out_dir, seed=args.seed, sizes=args.sizes, qa=args.qa, cpt=args.cpt)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
