"""The voice assistant's homes, one for each language: areas, devices, and free text. It is data,
written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Value = str | int | float


@dataclass(frozen=True, slots=True)
class Home:
    """What the sentences of one language may mention."""

    areas: tuple[str, ...]
    floors: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]]
    """Devices by their kind."""
    spoken: Mapping[str, tuple[str, ...]]
    """Examples of the free text that the grammar accepts; sentences with other free text are left
    out.
    """
    clumsy: re.Pattern[str]
    """A pattern for sentences that the templates allow but no person says: "the the kitchen"."""

    @property
    def words(self) -> list[str]:
        """Every name in the home."""
        named = [name for names in self.names.values() for name in names]
        free = [item for items in self.spoken.values() for item in items]
        return [*self.areas, *self.floors, *named, *free]


NUMBERS: dict[str, Sequence[Value]] = {
    "temperature": (*range(15, 27), 19.5, 20.5, 21.5, *range(60, 80, 2)),
    "color_temperature": range(2000, 6600, 100),
    "timer_hours": range(2, 13),
    "timer_minutes": range(2, 61),
    "timer_seconds": range(5, 61, 5),
}
PERCENTAGES = range(5, 101, 5)

_ENGLISH = Home(
    areas=(
        "kitchen", "living room", "bedroom", "master bedroom", "guest room", "kids room", "nursery",
        "bathroom", "guest bathroom", "shower room", "hallway", "entrance", "dining room", "office",
        "study", "library", "laundry room", "utility room", "pantry", "garage", "workshop", "attic",
        "cellar", "wine cellar", "conservatory", "sunroom", "porch", "patio", "terrace", "balcony",
        "garden", "backyard", "driveway", "greenhouse", "gym", "playroom", "home theater",
        "game room", "music room", "studio", "mudroom", "closet",
    ),
    floors=("ground floor", "first floor", "top floor", "basement", "upstairs"),
    names={
        "light": (
            "bedside lamp", "floor lamp", "desk lamp", "reading lamp", "chandelier", "fairy lights",
            "spotlights", "ceiling", "corner", "mirror", "stairs", "shelf", "night light",
            "lantern", "lava lamp", "counter", "cabinet", "sideboard",
        ),
        "switch": (
            "coffee maker", "kettle", "toaster", "dishwasher", "christmas tree", "water pump",
            "printer", "charger", "fountain", "heated blanket", "aquarium", "router",
        ),
        "fan": ("ceiling fan", "tower fan", "desk fan", "exhaust fan", "extractor"),
        "cover": (
            "garage door", "left blind", "right blind", "roller shutter", "awning", "skylight",
            "bay window curtain", "main gate",
        ),
        "lock": ("front door", "back door", "side door", "gate lock", "bike shed"),
        "climate": ("thermostat", "heat pump", "radiator", "air conditioner", "floor heating"),
        "media_player": (
            "tv", "soundbar", "radio", "record player", "smart speaker", "projector", "jukebox",
        ),
        "vacuum": ("robot vacuum", "vacuum cleaner", "roomba", "mop robot"),
        "todo": ("groceries", "chores", "packing", "weekend", "work"),
        "scene": ("movie night", "good morning", "dinner party", "bedtime"),
        "weather": ("airport", "beach", "lake", "cottage", "ski resort"),
    },
    spoken={
        "timer_name": (
            "pizza", "pasta", "eggs", "tea", "laundry", "bread", "nap", "homework", "workout",
            "rice",
        ),
        "shopping_list_item": (
            "milk", "eggs", "bread", "butter", "apples", "olive oil", "toilet paper", "dog food",
            "coffee beans", "dish soap", "batteries", "orange juice", "rice", "tomatoes", "cheese",
        ),
        "todo_list_item": (
            "call the dentist", "water the plants", "pay the rent", "buy a gift",
            "clean the windows", "book a hotel", "fix the bike", "walk the dog", "wash the car",
            "return the parcel",
        ),
    },
    clumsy=re.compile(
        r"""\b( (the|my|our|a|an)\ (the|my|our|an?)
        | (the|my|our|there)\ (any|some|all|each|every)
        | (lights?|lighting|lamps?)\ (lights?|lighting|lamps?) | floor\ floor
        | (close|shut|lower)\ up | (change|bring)\ (on|off|out|up|down) | turn\ (in|de)crease
        | \d+[ -](hour|minute|second)s\b.*\ timer | \d+[ -](hour|minute|second)\b(?!.*\ timer)
        | \d+-(hour|minute|second)s | an\ (?!8|11\b|18\b|hour) | a\ (8|11\b|18\b)
        )\b""",
        re.VERBOSE,
    ),
)  # fmt: skip


def _home(
    genders: dict[str, str], areas: str, floors: str, names: dict[str, str],
    spoken: dict[str, str], also: str = "", clumsy: str = "(?!)",
) -> Home:  # fmt: skip
    """Make a home from lists separated by commas.

    An article before a word shows the word's gender; `genders` has for each article all determiners
    of that gender. A sentence is clumsy if it has a determiner of another gender than the word's
    (the words of `also` occur in the sentences themselves), two determiners in a row, a word twice
    in a row, or what `clumsy` matches.
    """
    agreeing: dict[str, set[str]] = {}

    def bare(words: str) -> tuple[str, ...]:
        found = []
        for word in (" ".join(w.split()) for w in words.split(",") if w.strip()):
            article = next((a for a in genders if word.startswith(_before(a))), None)
            if article:
                word = word.removeprefix(_before(article))
                agreeing.setdefault(article, set()).add(re.escape(word))
            found.append(word)
        return tuple(found)

    home = (
        bare(areas),
        bare(floors),
        {kind: bare(text) for kind, text in names.items()},
        {name: bare(text) for name, text in spoken.items()},
    )
    bare(also)
    every = {d for text in genders.values() for d in text.split()}
    wrong = [
        rf"\b{_any(every - set(genders[article].split()))}({'|'.join(sorted(nouns))})e?s?\b"
        for article, nouns in agreeing.items()
    ]
    twice = [rf"\b{_any(every)}{_any(every)}", r"\b(\w+) \1\b"]
    numbered = [p.replace(r"\1", "(?P=word)").replace(r"(\w+)", r"(?P<word>\w+)") for p in twice]
    return Home(*home, re.compile("|".join([*wrong, *numbered, clumsy]), re.IGNORECASE))


def _before(determiner: str) -> str:
    """The determiner with the space or apostrophe that follows it."""
    return determiner if determiner.endswith("'") else f"{determiner} "


def _any(determiners: set[str]) -> str:
    return f"({'|'.join(_before(d) for d in sorted(determiners))})"


_GERMAN = _home(
    genders={
        "der": "der den dem des im am vom zum",
        "die": "die der zur",
        "das": "das dem des im am vom zum",
    },
    areas="""die Küche, das Wohnzimmer, das Schlafzimmer, das Gästezimmer, das Kinderzimmer,
        das Bad, das Gästebad, der Flur, der Eingang, das Esszimmer, das Büro, das Arbeitszimmer,
        die Bibliothek, die Waschküche, der Hauswirtschaftsraum, die Speisekammer, die Garage,
        die Werkstatt, der Dachboden, der Weinkeller, der Wintergarten, die Veranda, die Terrasse,
        der Balkon, der Garten, die Einfahrt, das Gewächshaus, der Fitnessraum, das Spielzimmer,
        das Heimkino, das Musikzimmer, das Atelier, die Abstellkammer""",
    floors="das Erdgeschoss, das Obergeschoss, das Dachgeschoss, das Untergeschoss, der Keller",
    names={
        "light": """die Nachttischlampe, die Stehlampe, die Schreibtischlampe, die Leselampe,
            der Kronleuchter, die Lichterkette, das Deckenlicht, der Spiegel, die Treppe, das Regal,
            das Nachtlicht, die Laterne, die Lavalampe, die Theke, der Schrank""",
        "switch": """die Kaffeemaschine, der Wasserkocher, der Toaster, der Geschirrspüler,
            der Weihnachtsbaum, die Wasserpumpe, der Drucker, das Ladegerät, der Springbrunnen,
            die Heizdecke, das Aquarium, der Router""",
        "fan": "der Deckenventilator, der Turmventilator, der Tischventilator, die Abzugshaube",
        "cover": """das Garagentor, die linke Jalousie, die rechte Jalousie, der Rollladen,
            die Markise, das Dachfenster, das Hoftor""",
        "lock": "die Haustür, die Hintertür, die Seitentür, das Torschloss, der Fahrradschuppen",
        "climate": "das Thermostat, die Wärmepumpe, der Heizkörper, die Fußbodenheizung",
        "media_player": """der Fernseher, die Soundbar, das Radio, der Plattenspieler,
            der Lautsprecher, der Beamer, die Musikbox""",
        "vacuum": "der Saugroboter, der Staubsauger, der Roomba, der Wischroboter",
        "todo": "Einkäufe, Hausarbeit, Reisegepäck, Wochenende, Arbeit",
        "scene": "Filmabend, Guten Morgen, Abendessen, Schlafenszeit",
        "weather": "Flughafen, Strand, Bodensee, Ferienhaus, Skigebiet",
    },
    spoken={
        "timer_name": "Pizza, Nudeln, Eier, Tee, Wäsche, Brot, Nickerchen, Hausaufgaben, Training",
        "shopping_list_item": """Milch, Eier, Brot, Butter, Äpfel, Olivenöl, Toilettenpapier,
            Hundefutter, Kaffeebohnen, Spülmittel, Batterien, Orangensaft, Reis, Tomaten, Käse""",
        "todo_list_item": """Zahnarzt anrufen, Pflanzen gießen, Miete zahlen, Geschenk kaufen,
            Fenster putzen, Hotel buchen, Fahrrad reparieren, Auto waschen, Paket zurückschicken""",
    },
    also="das Licht, die Lampe, die Beleuchtung, der Ventilator, der Lüfter, die Temperatur",
    clumsy=r"geschoss ?geschoss|keller ?geschoss|\b(ein|einen) (Lichter|Lampen)\b",
)  # fmt: skip

_SPANISH = _home(
    genders={"el": "el del al", "la": "la", "los": "los", "las": "las"},
    areas="""la cocina, el salón, el dormitorio, la habitación de invitados, el cuarto de los niños,
        el baño, el aseo, el pasillo, la entrada, el comedor, la oficina, el estudio,
        la biblioteca, el lavadero, la despensa, el garaje, el taller, el desván, la bodega,
        el invernadero, el porche, la terraza, el balcón, el jardín, el patio, el gimnasio,
        el cuarto de juegos, el cine, la sala de música, el vestidor, el trastero, la galería""",
    floors="""la planta baja, la primera planta, la segunda planta, el sótano, el ático""",
    names={
        "light": """la lámpara de noche, la lámpara de pie, el flexo, la lámpara de lectura,
            el candelabro, la guirnalda, el foco, el techo, la esquina, el espejo, la escalera,
            la estantería, el farol, la encimera, el armario""",
        "switch": """la cafetera, el hervidor, la tostadora, el lavavajillas, el árbol de navidad,
            la bomba de agua, la impresora, el cargador, la fuente, la manta eléctrica, el acuario,
            el rúter""",
        "fan": "el ventilador de techo, el ventilador de torre, el extractor, la campana",
        "cover": """la puerta del garaje, la persiana izquierda, la persiana derecha, el toldo,
            la claraboya, la cortina grande, el portón""",
        "lock": "la puerta principal, la puerta trasera, la puerta lateral, el candado",
        "climate": """el termostato, la bomba de calor, el radiador, el aire acondicionado,
            el suelo radiante""",
        "media_player": """la tele, la barra de sonido, la radio, el tocadiscos, el altavoz,
            el proyector, la gramola""",
        "vacuum": "el robot aspirador, la aspiradora, la roomba, el friegasuelos",
        "todo": "regalos, tareas, equipaje, fin de semana, trabajo",
        "scene": "noche de cine, buenos días, cena, hora de dormir",
        "weather": "aeropuerto, playa, lago, cabaña, estación de esquí",
    },
    spoken={
        "timer_name": "pizza, pasta, huevos, té, colada, pan, siesta, deberes, ejercicio, arroz",
        "shopping_list_item": """leche, huevos, pan, mantequilla, manzanas, aceite de oliva,
            papel higiénico, comida para perros, café en grano, lavavajillas líquido, pilas,
            zumo de naranja, arroz, tomates, queso""",
        "todo_list_item": """llamar al dentista, regar las plantas, pagar el alquiler,
            comprar un regalo, limpiar las ventanas, reservar un hotel, arreglar la bici,
            pasear al perro, lavar el coche, devolver el paquete""",
    },
    also="""la luz, las luces, la lámpara, las lámparas, el ventilador, los ventiladores,
        la temperatura, el volumen, el brillo, el temporizador, la lista""",
    clumsy=r"\b(de|a|un|una|mi|mis) (el|la|los|las)\b|\w\wdel\b"
    r"|\b(el|la|los|las)(cort|pers|told|est)|\b(piso|planta)\b.*\b(piso|planta)\b"
    r"|\buna? (horas|minutos|segundos)\b",
)  # fmt: skip

_FRENCH = _home(
    genders={"le": "le du au", "la": "la", "l'": "l'", "les": "les des aux"},
    areas="""la cuisine, le salon, la chambre, la chambre d'amis, la chambre des enfants,
        la salle de bain, la douche, le couloir, l'entrée, la salle à manger, le bureau,
        la bibliothèque, la buanderie, le cellier, le garage, l'atelier, le grenier, la véranda,
        le porche, la terrasse, le balcon, le jardin, l'allée, la serre, la salle de sport,
        la salle de jeux, le home cinéma, la salle de musique, le studio, le dressing, le vestibule,
        la cave à vin""",
    floors="le rez-de-chaussée, le premier étage, le deuxième étage, le sous-sol, les combles",
    names={
        "light": """la lampe de chevet, le lampadaire, la lampe de bureau, la liseuse, le lustre,
            la guirlande, le spot, le plafond, le miroir, l'escalier, l'étagère, la veilleuse,
            la lanterne, le comptoir, l'armoire""",
        "switch": """la cafetière, la bouilloire, le grille-pain, le lave-vaisselle,
            le sapin de noël, la pompe à eau, l'imprimante, le chargeur, la fontaine,
            la couverture chauffante, l'aquarium, le routeur""",
        "fan": "le ventilateur de plafond, le ventilateur tour, l'extracteur, la hotte",
        "cover": """la porte du garage, le store gauche, le store droit, le volet roulant,
            le velux, le grand rideau, le portail""",
        "lock": "la porte d'entrée, la porte arrière, la porte latérale, le cadenas",
        "climate": """le thermostat, la pompe à chaleur, le radiateur, le climatiseur,
            le plancher chauffant""",
        "media_player": """la télé, la barre de son, la radio, le tourne-disque, l'enceinte,
            le projecteur, le juke-box""",
        "vacuum": "le robot aspirateur, l'aspirateur, le roomba, le robot laveur",
        "todo": "vacances, ménage, bagages, week-end, travail",
        "scene": "soirée cinéma, bonjour, dîner, heure du coucher",
        "weather": "aéroport, plage, lac, chalet, station de ski",
    },
    spoken={
        "timer_name": "pizza, pâtes, œufs, thé, lessive, pain, sieste, devoirs, gym, riz",
        "shopping_list_item": """lait, œufs, pain, beurre, pommes, huile d'olive, papier toilette,
            croquettes, café en grains, liquide vaisselle, piles, jus d'orange, riz, tomates,
            fromage""",
        "todo_list_item": """appeler le dentiste, arroser les plantes, payer le loyer,
            acheter un cadeau, nettoyer les vitres, réserver un hôtel, réparer le vélo,
            promener le chien, laver la voiture, renvoyer le colis""",
    },
    also="""la lumière, les lumières, la lampe, les lampes, l'éclairage, le ventilateur,
        les ventilateurs, la température, le volume, la luminosité, le minuteur, la liste""",
    clumsy=r"\b(de|à) (le|les|du|au)\b|\b[ld]' |\bl'[bcdfgjklmnpqrstvz]",
)  # fmt: skip

HOMES: dict[str, Home] = {
    "en": _ENGLISH,
    "de": _GERMAN,
    "es": _SPANISH,
    "fr": _FRENCH,
}
