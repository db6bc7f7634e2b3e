// Which of two answers to the same conversation is better: a label, as the labelling page makes them.

import { api, html, useState } from "./common.js";
import { newId } from "./chat_tree.js";
import { judge as words } from "./en.js";

// `pair` has `prompt`, `answers` and `sources`; it is null where nothing can be compared. A label
// that is saved holds until `of` changes.
export function Judge({ pair, of, onChosen = () => {} }) {
  const [saved, setSaved] = useState({ of: null, text: "" });
  const [who, setWho] = useState(localStorage.getItem("who") || "");
  if (!saved.text && !pair) return null;
  const choose = async (choice, winner) => {
    localStorage.setItem("who", who);
    try {
      await api("/api/labels/exchange", { body: { id: newId(), who, ...pair, choice } });
      setSaved({ of, text: words.labelled });
      onChosen(winner);
    } catch (error) {
      setSaved({ of: null, text: error.message });
    }
  };
  const button = (label, choice, winner) =>
    html`<button type="button" disabled=${!who.trim()} onClick=${() => choose(choice, winner)}>${label}</button>`;
  return html`<div class="judge row" role="group">
    ${saved.of !== of && pair &&
    html`<label>${words.who} <input value=${who} onInput=${(e) => setWho(e.target.value)} /></label>
      ${button(words.better("A"), "left", 0)} ${button(words.tie, "tie", null)}
      ${button(words.better("B"), "right", 1)}`}
    <span role="status">${saved.of === of || saved.of === null ? saved.text : ""}</span>
  </div>`;
}
