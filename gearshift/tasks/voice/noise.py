"""Simulates a speech recogniser's text of a request: no capitals, numbers in words, some wrong
words. This file uses the sound of words, and not their meaning.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gearshift.errors import ConfigError
from gearshift.tasks.voice.homes import HOMES

FRACTIONS = ("1/4", "1/2", "3/4")


@dataclass(frozen=True, slots=True)
class Sounds:
    """How a language is spoken, and how a recogniser mistakes it."""

    fillers: tuple[str, ...]
    unstressed: frozenset[str]
    """Short words that a recogniser easily misses."""
    signs: dict[str, str]
    """The spoken form of each sign and fraction."""
    alike: dict[str, list[str]]
    """Words that a recogniser easily confuses."""


def _sounds(fillers: str, unstressed: str, signs: str, alike: str) -> Sounds:
    """Make an accent from lists separated by commas. `signs`: %, °, 1/4, 1/2, 3/4; `alike`: groups
    of words.
    """
    near: dict[str, list[str]] = {}
    for group in (g.split() for g in alike.split(",")):
        for word in group:
            near.setdefault(word, []).extend(w for w in group if w != word)
    said = [s.strip() for s in signs.split(",")]
    return Sounds(
        tuple(fillers.split(", ")),
        frozenset(unstressed.split()),
        dict(zip(("%", "°", *FRACTIONS), said, strict=True)),
        near,
    )


SOUNDS = {
    "en": _sounds(
        "uh, um, er, so, well",
        "the a an in of to my our for is are at by and with",
        "percent, degrees, a quarter, a half, three quarters",
        """kitchen chicken, light like lied, lights lice likes, lamp lamb land, set said sat,
        turn torn tern, off of, fan van fun, door dough, blind blond, close clothes, open often,
        volume value column, timer time tiger, hall whole, hallway highway, study steady,
        bath path, bathroom bedroom, bedroom bedrooms, pause paws, play pay, stop shop,
        minutes minute, seconds second, hours ours, hour our, four for, two to too, eight ate,
        one won, thirteen thirty, fourteen forty, fifteen fifty, sixteen sixty, seventeen seventy,
        eighteen eighty, nineteen ninety, 13 30, 14 40, 15 50, 16 60, 17 70, 18 80, 19 90,
        list least, garage carriage, patio radio, porch port, attic addict, cellar seller,
        gym jim, gate great, lock look, desk disk, tea tee, rice rise, milk mill, bread bred,
        weather whether, brightness brightens, down town, up app, on and, add at, pasta past her,
        temperature temperatures, switch which witch, all hall, every very, start star,
        cancel council, percent present, floor for flaw, color caller, heat eat, call cold""",
    ),
    "de": _sounds(
        "äh, ähm, also, hm",
        "der die das den dem des in im am an zu ein einen und von für bitte",
        "prozent, grad, ein viertel, ein halb, drei viertel",
        """küche kirche kuchen, licht nicht lischt, lampe rampe lampen, bad bart, flur flor uhr,
        garten karten, keller teller, büro bureau, stell still stelle, mach macht nach, mache sache,
        schalte schalter, aus haus, ein einen, auf auch, an am, zu so, timer team teil,
        minuten minute, stunden stunde, sekunden sekunde, zwei zwo drei, vier für, acht macht,
        fünfzehn fünfzig, dreizehn dreißig, vierzehn vierzig, sechzehn sechzig, siebzehn siebzig,
        15 50, 13 30, 14 40, 16 60, 17 70, 18 80, 19 90, liste leiste, tür tier, tor tür,
        lüfter luft, heizung zeitung, wetter vetter, musik lustig, lauter leider, leiser leise,
        setze setzen, öffne offen, schließe schieße, fenster finster, regal egal, tee zeh,
        brot rot, reis reise, eier heier, käse nase, balkon ballon, garage kollage, prozent präsent,
        grad grat rad, welche welcher, wie viele, ist isst, sind sinnt, halt alt, starte state""",
    ),
    "es": _sounds(
        "eh, este, pues, mm",
        "el la los las de del en a al un una y mi por con",
        "por ciento, grados, un cuarto, medio, tres cuartos",
        """cocina cortina vecina, luz cruz, luces luche, baño paño año, salón jabón balón,
        pon con pan, apaga paga, enciende entiende, abre habre abril, cierra sierra tierra,
        sube suba nube, baja vaja caja, lámpara lampara, techo hecho pecho, puerta puesta,
        persiana persona, garaje garage paraje, sótano sotana, ático átomo, hora ahora ora,
        horas obras, minutos minuto, segundos segundo, dos los, tres tras, seis seis, diez dieta,
        sesenta setenta, dieciséis diecisiete, cuarenta cuaresma, 60 70, 66 76, 16 17,
        volumen volcán, brillo grillo, color calor, tele tela, radio rato, té de, arroz atroz,
        leche lecho, queso beso peso, lista vista, planta manta, piso piso aviso, patio palio,
        comedor corredor, taller tal ver, temporizador temporizado, tiempo templo, para pera,
        hay ahí, está estaba esta, todas todos, cuál cual, qué que, foco poco, toldo todo""",
    ),
    "fr": _sounds(
        "euh, ben, alors, hein",
        "le la les de du des en à au un une et mon ma dans sur pour",
        "pour cent, degrés, un quart, demi, trois quarts",
        """cuisine cousine, lumière lumières première, lampe rampe lampes, salon ballon saloon,
        chambre chanvre, cave gave, serre cerf sert, douche bouche, garage barrage, porte portes,
        store stores sport, allume allumes volume, éteins étain éteint, ferme firme, ouvre œuvre,
        mets mais met, baisse baise base, monte montre, minuteur minuterie moniteur,
        minutes minute, heures heure, heure beurre, secondes seconde, deux de, six si, sept cet,
        dix dis, cent sang sans, treize seize, trois toi, quatre cadre, vingt vin,
        quinze quinte, soixante soixante-dix, 13 16, 60 70, 66 76, thé tes, riz rit, lait les,
        pain bain, œufs eux, liste piste, spot pot, hotte haute, lustre lustré, plafond plat fond,
        pause pose, son sont, télé délai, radio radieux, bureau bourreau, couloir couleur,
        terrasse tire, jardin gardien, temps tant, quel quelle, il île, est et, tout toute tous,
        fort port, volet valet, courses course, combien comment, air aire, règle aigle""",
    ),
}

# Each kind of error and its share. A word that is split, or joined with the next one, counts as two
# edits. So it happens half as often as it is drawn, and an event is one edit on average.
_EVENTS = {"confuse": 60, "drop": 15, "filler": 9, "split": 8, "merge": 8}

_SLURS = "pb td kg fv sz mn lr ei ou ae"
_OWN_SLURS = {"en": "ck wv iy", "de": "ck wv äe öe üi", "es": "bv cs yi", "fr": "ck éè êe iy"}
"""Letters that sound alike: in every language, and in this one."""


def hear(text: str, language: str, rate: float, rng: random.Random) -> str:
    """The text from a recogniser with this word error rate; at 0 it is the text itself. Capitals
    and punctuation are lost and, one time in two, numbers become words: the rate does not count
    these as errors. Errors are words confused with others, lost unstressed words, fillers, and
    words that are split or joined.
    """
    if not rate:
        return text
    words = spoken(text, language, digits=rng.random() < 0.5).split()
    heard: list[str] = []
    kinds, weights = list(_EVENTS), list(_EVENTS.values())
    while words:
        word = words.pop(0)
        kind = rng.choices(kinds, weights)[0] if rng.random() < rate else ""
        if kind == "merge" and not words:
            kind = "split"
        if (kind == "drop" and word not in SOUNDS[language].unstressed) or (
            kind == "split" and len(word) < 6
        ):
            kind = "confuse"
        if kind in ("split", "merge") and rng.random() < 0.5:
            kind = ""
        if kind == "merge":
            heard.append(word + words.pop(0))
        elif kind == "split":
            place = rng.randrange(3, len(word) - 2)
            heard += [word[:place], word[place:]]
        elif kind == "filler" or (kind == "confuse" and not _near(word, language)):
            heard += [rng.choice(SOUNDS[language].fillers), word]
        elif kind == "confuse":
            heard.append(_confused(word, language, rng))
        elif kind != "drop":
            heard.append(word)
    return " ".join(heard)


def spoken(text: str, language: str, digits: bool = False) -> str:
    """The spoken form of the text: small letters, only words; numbers are words, or `digits`."""
    sounds = SOUNDS[language]
    text = text.lower().replace("\u2019", "'")
    for sign in (*FRACTIONS, "%", "°"):
        text = text.replace(sign, f" {sounds.signs[sign]} ")
    if not digits:
        text = re.sub(r"\d+(\.\d+)?", lambda m: f" {in_words(float(m[0]), language)} ", text)
    text = re.sub(r"(?<=\d)\.(?=\d)", "·", text)  # a point within a number stays
    text = re.sub(r"[^\w'·]|(?<!\w)'", " ", text).replace("·", ".")
    return " ".join(text.split())


@lru_cache(1 << 12)
def in_words(number: float, language: str) -> str:
    """The number in words. Raises `ConfigError` without the package that writes them."""
    value = int(number) if number == int(number) else number
    said = str(_numbers(language).format_number(value).text)
    return said.replace("\u00ad", "").replace("-", " ").lower()


@lru_cache(len(SOUNDS))
def _numbers(language: str) -> Any:
    try:
        from unicode_rbnf import RbnfEngine
    except ImportError as error:
        raise ConfigError(
            "Noise needs unicode-rbnf, which writes out numbers; pip install 'gearshift[voice]'."
        ) from error
    return RbnfEngine.for_language(language)


def word_errors(said: str, heard: str, language: str) -> tuple[int, int]:
    """(wrong words, spoken words): the edits between the spoken forms of the two texts."""
    reference, words = spoken(said, language).split(), spoken(heard, language).split()
    return _distance(reference, words), len(reference)


def word_error_rate(pairs: Iterable[tuple[str, str]], language: str) -> float:
    """The word error rate of all (spoken, recognised) pairs together: edits / spoken words."""
    counts = [word_errors(said, heard, language) for said, heard in pairs]
    return sum(wrong for wrong, _ in counts) / max(1, sum(words for _, words in counts))


def _confused(word: str, language: str, rng: random.Random) -> str:
    """Another word, or a made-up one, that sounds much like this word."""
    known = SOUNDS[language].alike.get(word, [])
    if known and rng.random() < 0.7:
        return rng.choice(known)
    near = _near(word, language)
    return rng.choice(near[:3] if rng.random() < 0.3 else near)


@lru_cache(1 << 14)
def _near(word: str, language: str) -> tuple[str, ...]:
    """The nearest words of the home, then the word with one changed sound; none for a number."""
    if not word.isalpha():
        return tuple(SOUNDS[language].alike.get(word, ()))
    slurs = (_SLURS + " " + _OWN_SLURS[language]).split()
    limit = max(1, len(word) // 3)
    close = [(_distance(word, other), other) for other in _vocabulary(language) if other != word]
    nearest = [other for distance, other in sorted(close) if distance <= limit][:3]
    slurred = {
        word[:i] + new + word[i + 1 :]
        for pair in slurs
        for old, new in ((pair[0], pair[1]), (pair[1], pair[0]))
        for i, letter in enumerate(word)
        if letter == old
    }
    return (*nearest, *(sorted(slurred) or [word + "s"]))


@lru_cache(len(SOUNDS))
def _vocabulary(language: str) -> tuple[str, ...]:
    """The words of all names in the home, and the numbers."""
    words = {w for phrase in HOMES[language].words for w in spoken(phrase, language).split()}
    words |= {w for n in range(2, 100) for w in in_words(n, language).split()}
    return tuple(sorted(w for w in words if len(w) > 2))


def _distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein's distance: the fewest insertions, deletions, substitutions from `a` to `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]
