"""What a voice assistant answers to a command: the command as a sentence, in the request's
language.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gearshift.tasks.voice.grammar import grammar

# {what}: the device or the place; {value}: what it is set to; {all}: both, with commas.
_SENTENCES: dict[str, dict[str, str]] = {
    "en": {
        "HassTurnOn": "Turning on {what}",
        "HassTurnOff": "Turning off {what}",
        "HassLightSet": "Setting {what} to {value}",
        "HassSetPosition": "Moving {what} to {value}",
        "HassGetState": "Let me check {what}: {value}",
        "HassClimateGetTemperature": "Reading the temperature of {what}",
        "HassClimateSetTemperature": "Setting {what} to {value}",
        "HassFanSetSpeed": "Setting the speed of {what} to {value}",
        "HassSetVolume": "Setting the volume of {what} to {value}",
        "HassSetVolumeRelative": "Changing the volume of {what}: {value}",
        "HassMediaPause": "Pausing {what}",
        "HassMediaUnpause": "Resuming {what}",
        "HassMediaNext": "Skipping to the next on {what}",
        "HassStartTimer": "Starting a timer: {all}",
        "HassCancelTimer": "Cancelling the timer: {all}",
        "HassPauseTimer": "Pausing the timer: {all}",
        "HassTimerStatus": "Checking the timer: {all}",
        "HassVacuumStart": "Starting {what}",
        "HassVacuumReturnToBase": "Sending {what} back to its base",
        "HassShoppingListAddItem": "Added to the shopping list: {all}",
        "HassListAddItem": "Added to the list: {all}",
        "HassGetWeather": "Looking up the weather: {all}",
        "HassGetCurrentTime": "Telling the time",
        "": "Sorry, I did not understand that",
    },
    "de": {
        "HassTurnOn": "Wird eingeschaltet: {all}",
        "HassTurnOff": "Wird ausgeschaltet: {all}",
        "HassLightSet": "Wird eingestellt: {all}",
        "HassSetPosition": "Wird bewegt: {all}",
        "HassGetState": "Ich sehe nach: {all}",
        "HassClimateGetTemperature": "Ich messe die Temperatur: {all}",
        "HassClimateSetTemperature": "Temperatur wird eingestellt: {all}",
        "HassFanSetSpeed": "Geschwindigkeit wird eingestellt: {all}",
        "HassSetVolume": "Lautstärke wird eingestellt: {all}",
        "HassSetVolumeRelative": "Lautstärke wird geändert: {all}",
        "HassMediaPause": "Pause: {all}",
        "HassMediaUnpause": "Es geht weiter: {all}",
        "HassMediaNext": "Nächster Titel: {all}",
        "HassStartTimer": "Timer läuft: {all}",
        "HassCancelTimer": "Timer abgebrochen: {all}",
        "HassPauseTimer": "Timer angehalten: {all}",
        "HassTimerStatus": "Ich prüfe den Timer: {all}",
        "HassVacuumStart": "Saugen beginnt: {all}",
        "HassVacuumReturnToBase": "Zurück zur Ladestation: {all}",
        "HassShoppingListAddItem": "Steht auf der Einkaufsliste: {all}",
        "HassListAddItem": "Steht auf der Liste: {all}",
        "HassGetWeather": "Ich sehe nach dem Wetter: {all}",
        "HassGetCurrentTime": "Ich sage die Uhrzeit an",
        "": "Das habe ich leider nicht verstanden",
    },
    "es": {
        "HassTurnOn": "Encendiendo: {all}",
        "HassTurnOff": "Apagando: {all}",
        "HassLightSet": "Ajustando: {all}",
        "HassSetPosition": "Moviendo: {all}",
        "HassGetState": "Voy a mirar: {all}",
        "HassClimateGetTemperature": "Midiendo la temperatura: {all}",
        "HassClimateSetTemperature": "Ajustando la temperatura: {all}",
        "HassFanSetSpeed": "Ajustando la velocidad: {all}",
        "HassSetVolume": "Ajustando el volumen: {all}",
        "HassSetVolumeRelative": "Cambiando el volumen: {all}",
        "HassMediaPause": "En pausa: {all}",
        "HassMediaUnpause": "Reanudando: {all}",
        "HassMediaNext": "Pasando al siguiente: {all}",
        "HassStartTimer": "Temporizador en marcha: {all}",
        "HassCancelTimer": "Temporizador cancelado: {all}",
        "HassPauseTimer": "Temporizador en pausa: {all}",
        "HassTimerStatus": "Mirando el temporizador: {all}",
        "HassVacuumStart": "Empezando a aspirar: {all}",
        "HassVacuumReturnToBase": "De vuelta a la base: {all}",
        "HassShoppingListAddItem": "Añadido a la lista de la compra: {all}",
        "HassListAddItem": "Añadido a la lista: {all}",
        "HassGetWeather": "Mirando el tiempo: {all}",
        "HassGetCurrentTime": "Ahora digo la hora",
        "": "Lo siento, no lo he entendido",
    },
    "fr": {
        "HassTurnOn": "J'allume : {all}",
        "HassTurnOff": "J'éteins : {all}",
        "HassLightSet": "Je règle : {all}",
        "HassSetPosition": "Je déplace : {all}",
        "HassGetState": "Je vérifie : {all}",
        "HassClimateGetTemperature": "Je mesure la température : {all}",
        "HassClimateSetTemperature": "Je règle la température : {all}",
        "HassFanSetSpeed": "Je règle la vitesse : {all}",
        "HassSetVolume": "Je règle le volume : {all}",
        "HassSetVolumeRelative": "Je change le volume : {all}",
        "HassMediaPause": "En pause : {all}",
        "HassMediaUnpause": "Je reprends : {all}",
        "HassMediaNext": "Je passe au suivant : {all}",
        "HassStartTimer": "Minuteur lancé : {all}",
        "HassCancelTimer": "Minuteur annulé : {all}",
        "HassPauseTimer": "Minuteur en pause : {all}",
        "HassTimerStatus": "Je regarde le minuteur : {all}",
        "HassVacuumStart": "Je lance l'aspirateur : {all}",
        "HassVacuumReturnToBase": "Retour à la base : {all}",
        "HassShoppingListAddItem": "Ajouté à la liste de courses : {all}",
        "HassListAddItem": "Ajouté à la liste : {all}",
        "HassGetWeather": "Je regarde la météo : {all}",
        "HassGetCurrentTime": "Je donne l'heure",
        "": "Désolé, je n'ai pas compris",
    },
}


def _words(text: str) -> dict[str, str]:
    """The language's words for what commands keep in English, and for units."""
    keys = (
        "light fan switch lock cover climate hours minutes seconds and percent degrees up down home"
    )
    return dict(zip(keys.split(), text.split(), strict=True))


_WORDS = {
    "en": _words(
        "light fan switch lock cover heating hours minutes seconds and percent degrees up down home"
    ),
    "de": _words(
        "Licht Ventilator Schalter Schloss Rollladen Heizung"
        " Stunden Minuten Sekunden und Prozent Grad lauter leiser Zuhause"
    ),
    "es": _words(
        "luz ventilador interruptor cerradura persiana clima"
        " horas minutos segundos y % grados más menos casa"
    ),
    "fr": _words(
        "lumière ventilateur interrupteur serrure volet chauffage"
        " heures minutes secondes et % degrés plus moins maison"
    ),
}
_UNITS = ("hours", "minutes", "seconds")
_PERCENT = ("brightness", "position", "percentage", "volume_level", "volume_step")
_PLACE = ("name", "area", "floor", "domain", "device_class")


def spoken_answer(text: str, language: str = "en") -> str:
    """A sentence that repeats the command, or an apology if the text is not a command."""
    sentences, words = _SENTENCES[language], _WORDS[language]
    try:
        command = json.loads(text)
        sentence = sentences[command.pop("intent")]
        slots = {k: v for k, v in command.items() if type(v) in (str, int, float)}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return f"{sentences['']}."
    what, value = _what(slots, language), _value(slots, language)
    if language == "en" and "{what}" in sentence:
        what = f"the {what or words['home']}"
    parts = {"what": what, "value": value, "all": ", ".join(p for p in (what, value) if p)}
    text = sentence.format(**parts).strip().removesuffix(":").removesuffix(" to").strip()
    return f"{text}."


def _what(slots: Mapping[str, Any], language: str) -> str:
    """The device, by its name or else its kind, and where it is."""
    thing = slots.get("name") or _word(slots.get("device_class", ""), language, "cover_classes")
    if not thing and "domain" in slots:
        kind = str(slots["domain"])
        thing = _WORDS[language].get(kind, kind)
    place = slots.get("area") or slots.get("floor")
    if language == "en" and place and thing and "name" not in slots:
        return f"{place} {thing}"
    joint = " in the " if language == "en" else ", "
    return joint.join(str(part) for part in (thing, place) if part)


def _value(slots: Mapping[str, Any], language: str) -> str:
    """The values of the command's other slots."""
    words = _WORDS[language]
    times, said = [], []
    for unit in _UNITS:
        times += [
            f"{v} {words[unit]}" for k, v in slots.items() if k.removeprefix("start_") == unit
        ]
    for name, value in slots.items():
        if name in _PLACE or name.removeprefix("start_") in _UNITS:
            continue
        if isinstance(value, str):
            lists = ("color", "on_off_states", "cover_states", "lock_states")
            said.append(words[value] if value in ("up", "down") else _word(value, language, *lists))
        elif name == "temperature":
            said.append(f"{value} {words['degrees'] if value < 1000 else 'kelvin'}")
        else:
            said.append(f"{value} {words['percent']}" if name in _PERCENT else str(value))
    return ", ".join([*said, *([f" {words['and']} ".join(times)] if times else [])])


def _word(value: str | float, language: str, *lists: str) -> str:
    """The language's word for a value that commands keep in English."""
    if language == "en":
        return str(value)
    return next((w for name in lists if (w := grammar(language).word(name, value))), str(value))
