// The labels that the server has not acknowledged. They outlive the tab, all tabs of the browser
// share them, and they are sent again until each is acknowledged or refused.

import { api, browserStore } from "./common.js";

const PAUSE = 1500;
const REFUSED = [400, 404];

export function newId(word) {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return `${word}-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

export class Outbox {
  // `changed(error, answer)` is called after each try.
  constructor(changed) {
    this.changed = changed;
    this.kept = browserStore("labels");
    this.waiting = [];
    this.refused = [];
    this.sending = false;
    this.pause = 0;
    this.last = 0;
  }

  async open() {
    await this.read();
    addEventListener("online", () => this.send(true));
    setInterval(() => this.send(), PAUSE);
  }

  async read() {
    const all = (await this.kept.all()).sort((a, b) => a.at - b.at);
    this.waiting = all.filter((entry) => !entry.refused);
    this.refused = all.filter((entry) => entry.refused);
  }

  // Ends once the browser keeps the label; sending goes on by itself.
  async put(event) {
    this.last = Math.max(this.last + 0.001, Date.now());
    await this.kept.put({ id: event.id, at: this.last, event });
    await this.read();
    this.changed();
    this.send(true);
  }

  async send(now = false) {
    if (this.sending || (!now && Date.now() < this.pause)) return;
    this.sending = true;
    try {
      // One tab sends at a time, so that an undo never comes before its label.
      if (navigator.locks) await navigator.locks.request("labels", () => this.sendAll());
      else await this.sendAll();
    } finally {
      this.sending = false;
    }
  }

  async sendAll() {
    const before = this.waiting.length;
    await this.read();
    if (this.waiting.length !== before) this.changed(); // another tab has sent some
    while (this.waiting.length) {
      const entry = this.waiting[0];
      let answer = null;
      try {
        answer = await api("/api/labels/events", { body: entry.event });
        await this.kept.remove(entry.id);
      } catch (error) {
        if (!REFUSED.includes(error.status)) {
          this.pause = Date.now() + PAUSE;
          this.changed(error);
          return;
        }
        // It would be refused again. It is kept, and those behind it are sent.
        await this.kept.put({ ...entry, refused: error.message });
      }
      await this.read();
      this.changed(null, answer);
    }
  }
}
