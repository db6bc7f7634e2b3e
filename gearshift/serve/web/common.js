// What all pages share: the libraries, calls to the server, the frame around a page, text as elements.
//
// Text reaches the page by text nodes alone. No file here may use innerHTML; the server's content
// security policy refuses it.

import { Component, Fragment, h, render as draw } from "./vendor/preact.js";
import {
  useCallback,
  useEffect,
  useLayoutEffect,
  useMemo,
  useReducer,
  useRef,
  useState,
} from "./vendor/hooks.js";
import htm from "./vendor/htm.js";
import { common as words } from "./en.js";

export const html = htm.bind(h);
export { Component, Fragment, h };
export { useCallback, useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState };

export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// A call to the server; gives its JSON, or throws an ApiError. `options.body` may be any value that
// JSON can hold; `options.raw` gives the answer itself, for a stream.
export async function api(path, { method, body, signal, raw, headers } = {}) {
  let answer;
  try {
    answer = await fetch(path, {
      method: method || (body === undefined ? "GET" : "POST"),
      headers: { "Content-Type": "application/json", "X-Gearshift": "1", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "same-origin",
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "offline", words.offline);
  }
  if (!answer.ok) {
    const { error = {} } = await answer.json().catch(() => ({}));
    throw new ApiError(answer.status, error.code || "", error.message || answer.statusText);
  }
  if (raw) return answer;
  const text = await answer.text();
  return text ? JSON.parse(text) : null;
}

// The events of a stream that `fetch` gave: an async iterator over {event, data, id}.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      left += value || "";
      const parts = left.split("\n\n");
      left = done ? "" : parts.pop();
      for (const part of parts) {
        const event = { event: "message", data: [], id: "" };
        for (const line of part.split("\n")) {
          const [, name, value] = line.match(/^([^:]*): ?(.*)$/s) || [];
          if (name === "data") event.data.push(value);
          else if (name) event[name] = value;
        }
        if (event.data.length) yield { ...event, data: event.data.join("\n") };
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Events of the server for as long as a page shows them; the browser connects again by itself.
// `onEvent(data, id)` gets each one's JSON. Returns a function that ends it.
export function sse(path, onEvent, onError = () => {}) {
  const source = new EventSource(path);
  source.onmessage = (event) => onEvent(JSON.parse(event.data), event.lastEventId);
  source.onerror = onError;
  return () => source.close();
}

// A key that came in the address (`#key=...`), or that a person types, is given to the server once,
// and the browser then has a cookie. The address loses it at once.
async function giveKey(key) {
  await api("/api/key", { body: { key } });
}

async function takeKeyOfAddress() {
  const found = location.hash.match(/^#key=(.*)$/);
  if (!found) return;
  history.replaceState(null, "", location.pathname + location.search);
  await giveKey(decodeURIComponent(found[1])).catch(() => {});
}

function AskKey({ onDone }) {
  const [wrong, setWrong] = useState("");
  const enter = async (event) => {
    event.preventDefault();
    try {
      await giveKey(new FormData(event.target).get("key"));
      onDone();
    } catch (error) {
      setWrong(error.status === 401 ? words.wrongKey : error.message);
    }
  };
  return html`<main class="ask-key" id="content">
    <h1>${words.name}</h1>
    <form onSubmit=${enter}>
      <label>${words.askKey} <input name="key" type="password" autofocus required /></label>
      <button class="primary">${words.enter}</button>
      <p role="alert">${wrong}</p>
    </form>
  </main>`;
}

// Draw a page: `Page` gets what `/api/served` says. A server with a key asks for it first.
export async function render(Page) {
  const root = document.getElementById("page");
  await takeKeyOfAddress();
  let served;
  try {
    served = await api("/api/served");
  } catch (error) {
    if (error.status === 401) return draw(html`<${AskKey} onDone=${() => render(Page)} />`, root);
    if (error.status === 503) setTimeout(() => render(Page), 2000);
    served = { error: error.message };
  }
  if (served.error) return draw(html`<main id="content"><p role="alert">${served.error}</p></main>`, root);
  draw(html`<${Page} served=${served} />`, root);
}

const THEMES = ["system", "light", "dark"];

// [theme, a function that chooses one]: `system`, `light` or `dark`.
export function useTheme() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme || "system");
  const choose = (next) => {
    if (next === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("theme", next);
    } catch {
      // A browser that keeps nothing.
    }
    setTheme(next);
  };
  return [theme, choose];
}

// The frame of a page. `page` is "chat", "labels" or "runs"; `served.pages` has the addresses of
// those that this server has.
export function Shell({ title, page, served, actions, children }) {
  const [theme, choose] = useTheme();
  useEffect(() => {
    document.title = title ? `${title} · ${words.name}` : words.name;
  }, [title]);
  const links = Object.entries(served.pages || {});
  return html`<a class="skip" href="#content">${words.skip}</a>
    <header class="top">
      <strong class="brand">${words.name}</strong>
      <nav aria-label=${words.name}>
        ${links.map(
          ([name, address]) =>
            html`<a key=${name} href=${address} aria-current=${name === page ? "page" : null}
              >${words[name]}</a
            >`,
        )}
      </nav>
      <div class="actions">
        ${actions}
        <label class="theme">
          <span class="quiet">${words.theme}</span>
          <select value=${theme} onChange=${(event) => choose(event.target.value)}>
            ${THEMES.map((name) => html`<option value=${name}>${words.themes[name]}</option>`)}
          </select>
        </label>
      </div>
    </header>
    <main id="content" tabindex="-1">${children}</main>`;
}

// A text of a model: code blocks, lists and bold as elements; everything else as it is written.
export function TextBlock({ text }) {
  const blocks = [];
  const parts = text.split(/^```([^\n`]*)\n([\s\S]*?)(?:^```[ \t]*$|(?![\s\S]))/m);
  for (let i = 0; i < parts.length; i += 3) {
    if (parts[i].trim()) blocks.push(...paragraphs(parts[i]));
    if (i + 2 < parts.length) blocks.push(html`<pre><code>${parts[i + 2]}</code></pre>`);
  }
  return html`<div class="text" dir="auto">${blocks}</div>`;
}

function paragraphs(text) {
  return text
    .split(/\n{2,}/)
    .filter((block) => block.trim())
    .map((block) => {
      const lines = block.replace(/^\n+|\n+$/g, "").split("\n");
      const bullets = lines.map((line) => line.match(/^\s*[-*•] +(.*)$/)?.[1]);
      const numbers = lines.map((line) => line.match(/^\s*\d+[.)] +(.*)$/)?.[1]);
      if (bullets.every(Boolean)) return html`<ul>${bullets.map(item)}</ul>`;
      if (numbers.every(Boolean))
        return html`<ol start=${parseInt(lines[0].trim(), 10)}>${numbers.map(item)}</ol>`;
      return html`<p dir="auto">${inline(lines.join("\n"))}</p>`;
    });
}

const item = (line) => html`<li dir="auto">${inline(line)}</li>`;

function inline(line) {
  return line.split(/(\*\*[^*\n]+\*\*|`[^`\n]+`)/).map((part) => {
    if (/^\*\*.+\*\*$/s.test(part)) return html`<strong>${part.slice(2, -2)}</strong>`;
    if (/^`.+`$/s.test(part)) return html`<code>${part.slice(1, -1)}</code>`;
    return part;
  });
}

// A button that copies what `text()` gives.
export function CopyButton({ text, label = words.copy }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text());
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return html`<button type="button" onClick=${copy} aria-live="polite">
    ${copied ? words.copied : label}
  </button>`;
}

// A store of this browser (IndexedDB) of records by id: {all, put, remove}.
export function browserStore(name) {
  const opened = new Promise((resolve, reject) => {
    const request = indexedDB.open(`gearshift-${name}`, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("records", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  const run = async (mode, work) => {
    const database = await opened;
    return new Promise((resolve, reject) => {
      const transaction = database.transaction("records", mode);
      const request = work(transaction.objectStore("records"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  };
  return {
    all: () => run("readonly", (store) => store.getAll()),
    put: (record) => run("readwrite", (store) => store.put(record)),
    remove: (id) => run("readwrite", (store) => store.delete(id)),
  };
}
