// The labelling page: what a person sees, and the keys.

import { Shell, h, render, useEffect, useState } from "./common.js";
import { Desk } from "./label_desk.js";
import { label as words } from "./label_en.js";
import { Owner } from "./label_owner.js";

let redraw = () => {};
const desk = new Desk(() => redraw());
const view = { guidelines: true, keys: false, hidden: false, owner: location.hash === "#owner" };

function toggle(name) {
  view[name] = !view[name];
  redraw();
}

function begin() {
  view.guidelines = false;
  desk.begin();
  redraw();
}

const PAIR = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 3: "tie", 4: "bad" };
const THUMB = { 1: "up", ArrowLeft: "up", 2: "down", ArrowRight: "down" };
const TEXTS = ["TEXTAREA", "INPUT", "SELECT"];

function onKey(event) {
  if (view.owner || !desk.begun) return;
  const { target, key } = event;
  const inText = TEXTS.includes(target.tagName);
  const control = event.ctrlKey || event.metaKey;
  let does = null;
  if (key === "Escape") does = () => escape(target);
  else if (key === "Enter" && desk.item && (control || target.id === "note")) does = submitText;
  else if (!inText && !control && !event.altKey && !pressesButton(event)) does = actionOf(key);
  if (!does) return;
  event.preventDefault();
  does();
}

const pressesButton = ({ target, key }) =>
  ["BUTTON", "SUMMARY", "A"].includes(target.tagName) && [" ", "Enter"].includes(key);

function escape(target) {
  view.keys = false;
  target.blur();
  if (target.id === "edit") desk.closeEdit();
  redraw();
}

function submitText() {
  document.activeElement.blur();
  desk.submitDraft();
}

function actionOf(key) {
  const shown = { g: "guidelines", t: "hidden", "?": "keys" }[key];
  if (shown) return () => toggle(shown);
  if (key === "u") return () => desk.undo();
  if (!desk.item) return null;
  if (key === "s") return () => desk.submit("skip", null);
  if (key === "e") return () => openEdit();
  if (key === "/") return () => document.getElementById("note").focus();
  if (key === "Enter") return () => desk.submitDraft();
  if (desk.kind === "rating")
    return /^[1-5]$/.test(key) ? () => desk.rate(desk.criterion(), Number(key)) : null;
  const choice = (desk.kind === "pair" ? PAIR : THUMB)[key];
  return choice ? () => desk.choose(choice) : null;
}

function openEdit(side) {
  desk.edit(side);
  requestAnimationFrame(() => document.getElementById("edit")?.focus());
}

function Page({ served }) {
  const [, set] = useState(0);
  const [fault, setFault] = useState("");
  redraw = () => set((times) => times + 1);
  useEffect(() => {
    if (sessionStorage.begun) view.guidelines = false;
    addEventListener("keydown", onKey);
    desk.open().catch((error) => setFault(error.message));
    return () => removeEventListener("keydown", onKey);
  }, []);
  let inside = desk.begun ? work() : entry();
  if (fault) inside = h("p", { role: "alert" }, fault);
  else if (!desk.setup) inside = h("p", { role: "status" }, words.loading);
  else if (view.owner) inside = h(Owner, { close: () => showOwner(false) });
  return h(Shell, { title: desk.setup?.title || words.title, page: "labels", served }, inside);
}

function showOwner(on) {
  view.owner = on;
  history.replaceState(null, "", location.pathname + location.search + (on ? "#owner" : ""));
  redraw();
}

function entry() {
  const submitted = (event) => {
    event.preventDefault();
    desk.who = new FormData(event.target).get("who").trim();
    if (desk.who) begin();
  };
  return [
    h("h1", {}, desk.setup?.title),
    guidelines(),
    h("form", { onSubmit: submitted, class: "row" },
      h("label", {}, words.name,
        h("input", { name: "who", value: desk.who, maxlength: 60, required: true })),
      h("button", { class: "primary", id: "begin" }, words.begin)),
    keyList(),
    h("p", {}, h("button", { id: "owner", onClick: () => showOwner(true) }, words.owner)),
  ];
}

function work() {
  return [
    top(),
    guidelines(),
    view.keys && keyList(),
    h("p", { role: "alert", class: "refused" }, refused()),
    desk.item
      ? h("div", { key: desk.item.item }, itemView())
      : h("p", { role: "status", id: "state", "aria-busy": desk.busy }, words.states[desk.status]),
  ];
}

function refused() {
  const { refused: all } = desk.outbox;
  return all.length ? words.refused(all.length, all.at(-1).refused) : "";
}

function top() {
  const { progress: p, outbox } = desk;
  const unsent = outbox.waiting.length;
  const done = p && words.progress(p.labelled + unsent, Math.max(0, p.left - unsent));
  return h("div", { class: "row" },
    h("h1", {}, desk.setup.title),
    h("span", { id: "person" }, desk.who),
    h("span", { id: "progress" }, done),
    p?.seconds ? h("span", { class: "quiet" }, words.pace(p.seconds, p.left)) : null,
    h("span", { role: "status", id: "unsent" }, unsent ? words.unsent(unsent) : ""),
    h("span", { class: "grow" }),
    press("undo", words.undo, ["u"], () => desk.undo()),
    press("guide", words.guidelines, ["g"], () => toggle("guidelines"), view.guidelines),
    press("keys", words.keys, ["?"], () => toggle("keys"), view.keys),
    press("leave", words.leave, [], () => desk.leave()));
}

function guidelines() {
  if (!view.guidelines || !desk.setup?.guidelines) return null;
  return h("section", { class: "panel" },
    h("h2", {}, words.guidelines), h("div", { class: "words" }, desk.setup.guidelines));
}

function keyList() {
  const rows = words.help.map(([key, does]) =>
    h("tr", {}, h("td", {}, h("kbd", {}, key)), h("td", {}, does)));
  return h("details", { open: view.keys }, h("summary", {}, words.keys),
    h("table", {}, h("tbody", {}, rows)), h("p", {}, words.helpNote));
}

// A button that shows its keys. `pressed`: whether it is on; left out, it has no such state.
function press(id, text, keys, onClick, pressed) {
  const state = pressed === undefined ? {} : { "aria-pressed": String(Boolean(pressed)) };
  return h("button", { id, type: "button", onClick, ...state },
    text, keys.map((key) => [" ", h("kbd", {}, key)]));
}

function itemView() {
  const { item } = desk;
  const single = item.answers.length === 1;
  return [
    h("section", { class: "panel", id: "asked", "data-item": item.item, "aria-label": words.prompt },
      item.prompt.map((m) => [h("h2", {}, words.roles[m.role] || m.role), said(m)]),
      item.tools && h("details", {}, h("summary", {}, words.tools),
        h("pre", {}, JSON.stringify(item.tools, null, 1)))),
    h("div", { class: single ? "answers single" : "answers" }, item.answers.map(answerView)),
    h("div", { class: "row", id: "choices" }, choices(),
      press("skip", words.skip, ["s"], () => desk.submit("skip", null)),
      press("submit", words.submit, ["Enter"], () => desk.submitDraft()),
      press("hidden", words.hidden, ["t"], () => toggle("hidden"), view.hidden)),
    editor(),
    reasons(),
  ];
}

function answerView(answer, i) {
  const single = desk.item.answers.length === 1;
  const side = ["left", "right"][i];
  const chosen = !single && desk.draft.choice === side;
  const name = single ? words.single : words.answer[i];
  return h("section", { class: chosen ? "panel chosen" : "panel", id: `answer-${side}` },
    h("h2", {}, name, chosen ? ` (${words.chosen})` : ""), said(answer),
    press(`edit-${side}`, single ? words.edit : words.editOf[i], i ? [] : ["e"],
      () => openEdit(side)));
}

function said(value) {
  const text = typeof value === "string" ? value : value.content || "";
  const calls = typeof value === "object" && value.tool_calls;
  return [
    h("div", { class: "words long", dir: "auto", tabindex: 0, role: "group", "aria-label": words.text },
      view.hidden ? visible(text) : text),
    calls && h("pre", {}, JSON.stringify(calls, null, 1)),
  ];
}

// The text with a sign for each character that is not seen, or that turns a text around.
function visible(text) {
  const code = (c) => `[U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`;
  return text
    .replace(/[\p{Cf}\p{Cs}\p{Zl}\p{Zp}]|(?![\t\n])\p{Cc}/gu, code)
    .replace(/ /g, "\u00b7").replace(/\t/g, "\u2192\t").replace(/\n/g, "\u00b6\n");
}

function choices() {
  const one = (name, keys) =>
    press(name, words[name], keys, () => desk.choose(name), desk.draft.choice === name);
  if (desk.kind === "rating") return desk.setup.criteria.map(rating);
  if (desk.kind === "thumb") return [one("up", ["1", "\u2190"]), one("down", ["2", "\u2192"])];
  return [one("left", ["1", "\u2190"]), one("right", ["2", "\u2192"]), one("tie", ["3"]),
    one("bad", ["4"])];
}

function rating(name, i) {
  const given = desk.draft.ratings[name];
  const now = name === desk.criterion() ? ` (${words.now})` : "";
  return h("fieldset", { class: "row" }, h("legend", {}, name + now),
    [1, 2, 3, 4, 5].map((value) =>
      press(`rate-${i}-${value}`, String(value), [], () => desk.rate(name, value), given === value)));
}

function editor() {
  const [side] = Object.keys(desk.draft.edits);
  if (!side) return null;
  const single = desk.item.answers.length === 1;
  const name = single ? words.editedSingle : words.edited[side === "left" ? 0 : 1];
  const onInput = (event) => (desk.draft.edits[side] = event.target.value);
  const value = desk.draft.edits[side];
  return h("section", { class: "panel", key: side }, h("h2", {}, name),
    h("textarea", { id: "edit", "aria-label": name, dir: "auto", value, onInput }));
}

function reasons() {
  const onInput = (event) => (desk.draft.note = event.target.value);
  const note = { id: "note", value: desk.draft.note, maxlength: 4000, onInput };
  return h("div", { class: "row" },
    h("label", {}, words.note, " ", h("kbd", {}, "/"), " ", h("input", note)),
    desk.setup.tags.map((tag, i) =>
      press(`tag-${i}`, tag, [], () => desk.toggleTag(tag), desk.draft.tags.has(tag))));
}

render(Page);
