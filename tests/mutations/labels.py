"""Labels of people: what is lost, swapped or counted without a word."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "a label is acknowledged before it is on the disk",
        "serve/labelling/store.py",
        "                    os.fsync(self._handle)\n            except",
        "            except",
        "tests/serve/labelling/test_store.py::test_nothing_is_acknowledged_before_it_is_on_the_disk",
    ),
    Mutation(
        "a label that could not be written counts",
        "serve/labelling/store.py",
        "                os.ftruncate(self._handle, self._size)\n                raise\n",
        "                raise\n",
        "tests/serve/labelling/test_store.py",
    ),
    Mutation(
        "a label that comes twice is stored twice",
        "serve/labelling/store.py",
        'if event["id"] in self.labels.events:',
        "if False:",
        "tests/serve/labelling/test_store.py::test_an_id_that_comes_twice_is_stored_once",
    ),
    Mutation(
        "left and right are taken for the first and the second answer",
        "data/labels.py",
        'return int(event["shown"][choice])',
        'return ("left", "right").index(choice)',
        "tests/data/test_labels.py",
    ),
    Mutation(
        "a label tells the sides otherwise than they were shown",
        "serve/labelling/events.py",
        "if type(seed) is not int or value != shown(item, who, seed):",
        "if type(seed) is not int:",
        "tests/serve/labelling/test_routes.py::test_swapped_sides_are_refused",
    ),
    Mutation(
        "an undone label is exported",
        "data/labels.py",
        'self._given[label["item"]][label["who"]].remove(label)',
        "pass",
        "tests/data/test_labels.py::test_an_undone_label_gives_no_row",
    ),
    Mutation(
        "a tie is a win",
        "data/labels.py",
        "if len(item.answers) != 2 or (tied and not ties):",
        "if len(item.answers) != 2:",
        "tests/data/test_labels.py",
    ),
    Mutation(
        "one of two people who disagree is right",
        "data/labels.py",
        "first[0][1] == first[1][1]",
        "False",
        "tests/data/test_labels.py",
    ),
    Mutation(
        "known items are learned from",
        "data/labels.py",
        "if item.gold is not None:\n            continue",
        "if False:\n            continue",
        "tests/data/test_labels.py::test_known_items_give_no_rows",
    ),
    Mutation(
        "people see which model wrote an answer",
        "serve/labelling/routes.py",
        '"tools": item.options.get("tools")}',
        '"tools": item.sources}',
        "tests/serve/labelling/test_routes.py::test_answers_are_sampled_ahead_and_come_blind",
    ),
    Mutation(
        "an item of a person who left is asked of nobody",
        "serve/labelling/deal.py",
        "holders = {w for w, h in self._held.get(item.id, {}).items() if h.until > now}",
        "holders = set(self._held.get(item.id, {}))",
        "tests/serve/labelling/test_deal.py::test_no_item_is_lost_when_a_person_goes",
    ),
    Mutation(
        "alpha takes far ranks for near ones",
        "serve/labelling/agreement.py",
        "ranks = np.cumsum(totals, 1) - totals / 2",
        "ranks = np.cumsum(totals, 1)",
        "tests/serve/labelling/test_agreement.py",
    ),
    Mutation(
        "the chat page compares answers to different conversations",
        "serve/web/chat.js",
        "if (JSON.stringify(prompt) !== JSON.stringify(other) || ",
        "if (",
        "tests/serve/test_chat_page.py::test_answers_to_different_conversations_are_not_compared",
    ),
    Mutation(
        "the run page compares answers to different conversations",
        "serve/web/run_group.js",
        "const good = alike(...prompts) && ",
        "const good = ",
        "tests/serve/runs/test_page.py -k side_by_side",
    ),
)
