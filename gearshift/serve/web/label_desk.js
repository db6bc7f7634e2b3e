// What a person does on the labelling page: items ahead, choices, undo. No elements are made here.

import { api } from "./common.js";
import { Outbox, newId } from "./label_outbox.js";

const AHEAD = 3;
const SIDES = ["left", "right"];

const fresh = () => ({ choice: null, note: "", tags: new Set(), edits: {}, ratings: {} });
export const wordsOf = (answer) => (typeof answer === "string" ? answer : answer?.content || "");

export class Desk {
  constructor(changed) {
    this.changed = changed;
    this.outbox = new Outbox((error, answer) => this.sent(error, answer));
    this.tab = sessionStorage.tab ??= newId("tab");
    this.who = new URLSearchParams(location.search).get("who") || localStorage.who || "";
    this.answered = new Set();
    this.reset();
    this.setup = null;
    this.begun = false;
    this.fetching = false;
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.spent += performance.now() - this.since;
      this.since = performance.now();
    });
  }

  reset() {
    Object.assign(this, { queue: [], history: [], progress: null, status: "more" });
    this.show();
  }

  get item() {
    return this.queue[0];
  }

  // Whether it is not known yet if there is another item.
  get busy() {
    return String(this.fetching || this.outbox.waiting.length > 0);
  }

  get kind() {
    if (this.item.answers.length === 2) return "pair";
    return this.setup.criteria.length ? "rating" : "thumb";
  }

  async open() {
    this.setup = await api("/api/labels/setup");
    await this.outbox.open();
    for (const { event } of this.outbox.waiting) if (event.item) this.answered.add(event.item);
    if (this.who && sessionStorage.begun) this.begin();
    setInterval(() => this.item || this.more(), 1500);
    this.changed();
  }

  begin() {
    localStorage.who = this.who;
    sessionStorage.begun = "1";
    this.begun = true;
    this.outbox.send();
    this.more();
  }

  async leave() {
    await api("/api/labels/leave", { body: { who: this.who } }).catch(() => {});
    this.begun = false;
    delete sessionStorage.begun;
    this.answered.clear();
    this.reset();
    this.changed();
  }

  // Ask for items ahead, so that the next one is here when a label is given.
  async more() {
    if (!this.begun || this.fetching) return;
    this.fetching = true;
    this.changed();
    try {
      const count = Math.min(50, AHEAD + this.outbox.waiting.length);
      const body = { who: this.who, tab: this.tab, count };
      const found = await api("/api/labels/next", { body });
      const known = new Set([...this.answered, ...this.queue.map((item) => item.item)]);
      this.queue.push(...found.items.filter((item) => !known.has(item.item)));
      this.status = found.state;
      this.progress = await this.own();
    } catch (error) {
      if (error.status === 401) location.reload();
      this.status = "offline";
    }
    this.fetching = false;
    if (this.item !== this.drafted) this.show();
    this.changed();
  }

  own() {
    return api(`/api/labels/progress?who=${encodeURIComponent(this.who)}`);
  }

  show() {
    this.draft = fresh();
    this.drafted = this.item;
    this.spent = 0;
    this.since = performance.now();
  }

  sent(error, answer) {
    if (error) this.status = "offline";
    const again = answer?.item;
    if (again && !this.answered.has(again.item) && !this.queue.some((i) => i.item === again.item)) {
      this.queue.unshift(again);
      this.show();
    }
    this.changed();
    if (!error && !this.outbox.waiting.length) this.more();
  }

  // The edit as the server takes it; null where the text is as it was.
  edited() {
    const [side] = Object.keys(this.draft.edits);
    const text = this.draft.edits[side];
    if (!side || !text.trim()) return null;
    if (text === wordsOf(this.item.answers[SIDES.indexOf(side)])) return null;
    return { answer: this.item.shown[side], text };
  }

  // Gives the item in front this label, and shows the next one at once.
  async submit(kind, choice) {
    const { item } = this;
    const { note, tags } = this.draft;
    const edit = kind === "skip" ? null : this.edited();
    if (kind === "edit" && !edit) return;
    const reason = note.trim() || tags.size ? { text: note, tags: [...tags] } : null;
    const seconds = (this.spent + performance.now() - this.since) / 1000;
    const id = newId("label");
    const event = { id, who: this.who, tab: this.tab, item: item.item, kind, choice, reason, edit };
    this.answered.add(item.item);
    this.queue.shift();
    this.history.push({ id, item });
    this.show();
    await this.outbox.put({ ...event, seconds, shown: item.shown });
    if (this.queue.length < AHEAD) this.more();
  }

  // Takes the last label back. What was labelled before this page was opened, the server knows.
  async undo() {
    const last = this.history.pop();
    const undo = { id: newId("undo"), kind: "undo", who: this.who, tab: this.tab };
    if (last) {
      this.answered.delete(last.item.item);
      this.queue.unshift(last.item);
      this.show();
      return this.outbox.put({ ...undo, undoes: last.id });
    }
    const found = await this.own().catch(() => null);
    if (!found?.last || this.outbox.waiting.length) return undefined;
    this.answered.clear();
    return this.outbox.put({ ...undo, undoes: found.last });
  }

  // Chooses, and submits at once unless the person writes more.
  choose(choice) {
    const { note, tags, edits } = this.draft;
    this.draft.choice = choice;
    if (note.trim() || tags.size || Object.keys(edits).length) this.changed();
    else this.submit(this.kind, choice);
  }

  submitDraft() {
    if (!this.item) return;
    const { choice, ratings, edits } = this.draft;
    if (this.kind === "rating") {
      const all = this.setup.criteria.every((name) => ratings[name]);
      if (all) this.submit("rating", { ...ratings });
    } else if (choice) this.submit(this.kind, choice);
    else if (Object.keys(edits).length) this.submit("edit", null);
  }

  rate(name, value) {
    this.draft.ratings[name] = value;
    this.changed();
  }

  // The criterion that a number rates: the first one without a rating, else the last.
  criterion() {
    const { criteria } = this.setup;
    return criteria.find((name) => !this.draft.ratings[name]) ?? criteria.at(-1);
  }

  // Opens an answer to be edited; a label has one edited answer. Without `side`: the chosen one, or
  // the other one than is open.
  edit(side) {
    const [open] = Object.keys(this.draft.edits);
    const other = { left: "right", right: "left" }[open];
    const wanted = side ?? other ?? (this.draft.choice === "right" ? "right" : "left");
    const to = this.item.answers.length === 1 ? "left" : wanted;
    const words = wordsOf(this.item.answers[SIDES.indexOf(to)]);
    this.draft.edits = { [to]: this.draft.edits[to] ?? words };
    this.changed();
  }

  closeEdit() {
    this.draft.edits = {};
    this.changed();
  }

  toggleTag(tag) {
    if (!this.draft.tags.delete(tag)) this.draft.tags.add(tag);
    this.changed();
  }
}
