// The chat page: one conversation at a time, with one model or with two side by side.

import {
  browserStore, CopyButton, html, render, Shell, useEffect, useLayoutEffect, useRef, useState,
} from "./common.js";
import { answer, asText, bodyOf } from "./chat_request.js";
import {
  addNode, branches, changeNode, changePane, mayShow, newConversation, newestBelow, newId, newPane,
  opened, pathTo, titleOf,
} from "./chat_tree.js";
import { chat as words } from "./chat_en.js";
import { Message } from "./chat_message.js";
import { TaskPanel } from "./chat_task.js";
import { Judge } from "./judge.js";

const store = browserStore("chats");
const asked = new URLSearchParams(location.search);

function Chat({ served }) {
  const models = served.models || [];
  const begin = () => {
    const model = models.find((one) => one.name === asked.get("model")) || models[0];
    return newConversation(asked.get("system") ?? (model?.system || ""), [newPane(model?.name)]);
  };
  const [conversation, setNow] = useState(begin);
  const [chats, setChats] = useState([]);
  const [draft, setDraft] = useState("");
  const [running, setRunning] = useState({});
  const [said, say] = useState("");
  const now = useRef(conversation);
  const writing = useRef(null);
  // Streams change the conversation while others are on their way, so they read the newest one.
  const set = (next) => {
    now.current = next;
    setNow(next);
  };
  const refresh = async () => {
    const all = await store.all().catch(() => []);
    setChats(all.sort((a, b) => b.changed - a.changed));
  };
  useEffect(() => void refresh(), []);
  const keep = () => store.put(now.current).then(refresh, () => {});
  const busy = Object.keys(running).length > 0;
  // A model of a task may know single messages only.
  const given = (path) =>
    served.task?.single ? path.filter((one) => one.role === "user").slice(-1) : path;

  // The pane of a message that the other pane does not share.
  const ownerOf = (at) => (now.current.panes.length > 1 ? now.current.panes[at].id : undefined);

  async function run(at, parent) {
    const pane = now.current.panes[at];
    const body = bodyOf(pane.model, now.current.system, given(pathTo(now.current.nodes, parent)), pane.settings);
    const [next, id] = addNode(now.current, parent, {
      role: "assistant", content: "", model: pane.model, pane: ownerOf(at), state: "waits",
    });
    set(changePane(next, at, { leaf: id }));
    const abort = new AbortController();
    setRunning((all) => ({ ...all, [id]: abort }));
    const put = (change) => set(changeNode(now.current, id, change));
    try {
      const end = await answer(body, abort.signal, (part) =>
        put({ content: part.content, reasoning: part.reasoning, state: "writes" }),
      );
      const count = end.count ?? end.tokens.length;
      const speed = (count / Math.max(end.seconds || 0, 1e-3)).toFixed(1);
      put({ ...pick(end), stats: [count, speed, end.version], state: end.finish === "length" ? "length" : "" });
      say(words.done);
    } catch (error) {
      const stopped = error.name === "AbortError";
      put({ state: stopped ? "stopped" : "error", error: stopped ? "" : error.message });
    }
    setRunning(({ [id]: _, ...others }) => others);
    keep();
  }

  function ask(at, parent, content, role) {
    const [next, id] = addNode(now.current, parent, { role, content, pane: ownerOf(at) });
    set(changePane(next, at, { leaf: id }));
    return run(at, id);
  }

  function send(content, role = "user") {
    if (!content.trim() || busy) return;
    const { panes, shared } = now.current;
    if (panes.length > 1 && shared) {
      const [next, id] = addNode(now.current, panes[0].leaf, { role, content });
      set(next);
      panes.forEach((_, at) => run(at, id));
    } else panes.forEach((pane, at) => ask(at, pane.leaf, content, role));
  }

  function sendDraft() {
    send(draft);
    if (!busy) setDraft("");
  }

  // What was pressed goes away when an answer begins or ends; the focus goes to where one writes.
  const toWriting = () => writing.current.focus();
  const stop = () => {
    Object.values(running).forEach((abort) => abort.abort());
    toWriting();
  };
  const change = (fields) => {
    set({ ...now.current, ...fields, changed: Date.now() });
    if (Object.keys(now.current.nodes).length) keep();
  };
  const compare = () => {
    const { panes } = now.current;
    if (panes.length > 1) return change({ panes: panes.slice(0, 1) });
    const other = models.find((one) => one.name !== panes[0].model) || models[0];
    change({ panes: [...panes, { ...panes[0], id: newId(), model: other.name }] });
  };
  // Chance decides which model is A, so that a person who hides the names does not know it.
  const hide = (blind) => {
    const { panes } = now.current;
    change({ blind, panes: blind && Math.random() < 0.5 ? panes.toReversed() : panes });
  };

  if (!models.length) {
    return html`<${Shell} title=${words.title} page="chat" served=${served}><p>${words.noModel}</p><//>`;
  }
  return html`<${Shell} title=${words.title} page="chat" served=${served}>
    <h1 class="hidden">${words.title}</h1>
    <div class="chat">
      <${Side} conversation=${conversation} chats=${chats} change=${change} compare=${compare} hide=${hide} busy=${busy}
        onNew=${() => set(begin())} onOpen=${(one) => set(opened(one))}
        onRemove=${(id) => store.remove(id).then(refresh)} />
      <div class=${`panes count-${conversation.panes.length}`}>
        ${conversation.panes.map(
          (pane, at) => html`<${Pane} key=${at} at=${at} pane=${pane} conversation=${conversation} models=${models}
            running=${running} onPane=${(fields) => set(changePane(now.current, at, fields))}
            onAgain=${(node) => { toWriting(); run(at, node.parent); }}
            onEdit=${(node, text) => { toWriting(); ask(at, node.parent, text, node.role); }} given=${given} />`,
        )}
      </div>
      ${conversation.panes.length > 1 && served.labels && !busy &&
      html`<${Judge} pair=${pairOf(conversation, given)} of=${Object.keys(conversation.nodes).length} onChosen=${(winner) => {
        if (conversation.shared && winner !== null) {
          const { leaf } = now.current.panes[winner];
          set({ ...now.current, panes: now.current.panes.map((pane) => ({ ...pane, leaf })) });
        }
      }} />`}
      ${served.task && html`<${TaskPanel} task=${served.task} busy=${busy} send=${send}
        messages=${pathTo(conversation.nodes, conversation.panes[0].leaf).map(({ role, content }) => ({ role, content }))} />`}
      <form class="compose" onSubmit=${(event) => { event.preventDefault(); sendDraft(); }}>
        <label class="hidden" for="draft">${words.message}</label>
        <textarea id="draft" ref=${writing} rows="3" value=${draft} placeholder=${words.hint} onInput=${(e) => setDraft(e.target.value)}
          onKeyDown=${(event) => {
            if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); sendDraft(); }
          }}></textarea>
        ${busy
          ? html`<button type="button" class="primary" onClick=${stop}>${words.stop}</button>`
          : html`<button class="primary" disabled=${!draft.trim()}>${words.send}</button>`}
      </form>
      <p class="hidden" aria-live="polite">${said}</p>
    </div>
  <//>`;
}

const pick = ({ content, reasoning, tokens }) => ({ content, reasoning, tokens });

function Pane({ at, pane, conversation, models, running, onPane, onAgain, onEdit, given }) {
  const { nodes, panes, blind } = conversation;
  const path = pathTo(nodes, pane.leaf);
  const side = panes.length > 1 ? words.sides[at] : "";
  const name = panes.length > 1 && blind ? side : pane.model;
  // The request of the last answer: with the answer itself the model would continue it.
  const until = path.at(-1)?.role === "assistant" ? path.slice(0, -1) : path;
  const body = () => bodyOf(pane.model, conversation.system, given(until), pane.settings);
  const end = useRef(null), all = useRef(null), moved = useRef(null);
  const may = mayShow(conversation, pane);
  // The arrow that was pressed went away with its message: the focus goes to the one that is there now.
  useLayoutEffect(() => {
    if (!moved.current) return;
    const { place, by } = moved.current;
    const [earlier, later] = all.current.querySelectorAll(".message")[place].querySelectorAll(".branches button");
    const [same, other] = by < 0 ? [earlier, later] : [later, earlier];
    (same.disabled ? other : same).focus();
    moved.current = null;
  }, [pane.leaf]);
  useEffect(() => end.current?.scrollIntoView({ block: "nearest" }), [path.at(-1)?.content]);
  return html`<section class="pane" ref=${all} aria-label=${side || pane.model}>
    <header class="pane-head">
      ${side && html`<strong>${side}</strong>`}
      ${!(panes.length > 1 && blind) &&
      html`<label>${words.model}
        <select value=${pane.model} onChange=${(e) => onPane({ model: e.target.value })}>
          ${models.map((one) => html`<option value=${one.name}>${one.name}</option>`)}
        </select></label>`}
      <${Settings} settings=${pane.settings} onChange=${(settings) => onPane({ settings })} />
      <details class="menu"><summary>${words.copy.json.split(" ")[0]}</summary>
        ${Object.keys(asText).map((kind) => html`<${CopyButton} label=${words.copy[kind]} text=${() => asText[kind](body())} />`)}
      </details>
    </header>
    ${!path.length && html`<p class="quiet">${words.empty}</p>`}
    ${path.map((node, i) => {
      const beside = branches(nodes, node.id, may);
      const place = beside.findIndex((one) => one.id === node.id);
      return html`<${Message} key=${node.id} node=${node} name=${name} busy=${node.id in running}
        branchCount=${beside.length} branchAt=${place}
        onBranch=${(by) => {
          moved.current = { place: i, by };
          onPane({ leaf: newestBelow(nodes, beside[place + by].id, may) });
        }}
        onAgain=${() => onAgain(node)} onEdit=${(text) => onEdit(node, text)} />`;
    })}
    <div ref=${end}></div>
  </section>`;
}

function Settings({ settings, onChange }) {
  return html`<details class="menu">
    <summary>${words.settings}</summary>
    <p class="quiet">${words.defaults}</p>
    ${Object.entries(words.fields).map(([name, label]) => {
      const input = { value: settings[name] || "", onInput: (e) => onChange({ ...settings, [name]: e.target.value }) };
      return html`<label>${label}
        ${name === "stop"
          ? html`<textarea rows="2" ...${input}></textarea>`
          : html`<input type="number" step="any" ...${input} />`}</label>`;
    })}
  </details>`;
}

function Side({ conversation, chats, change, compare, hide, busy, onNew, onOpen, onRemove }) {
  const two = conversation.panes.length > 1;
  const text = () => JSON.stringify(conversation, null, 2);
  const link = `data:application/json;charset=utf-8,${encodeURIComponent(text())}`;
  return html`<div class="side">
    <div class="row">
      <button type="button" disabled=${busy} onClick=${onNew}>${words.news}</button>
      <button type="button" disabled=${busy} aria-pressed=${two} onClick=${compare}>
        ${two ? words.single : words.compare}
      </button>
      ${two &&
      html`<label><input type="checkbox" checked=${conversation.blind} disabled=${busy} onChange=${(e) => hide(e.target.checked)} /> ${words.blind}</label>
        <label><input type="checkbox" checked=${conversation.shared} onChange=${(e) => change({ shared: e.target.checked })} /> ${words.shared}</label>`}
      <a href=${link} download=${`chat-${conversation.id}.json`}>${words.export}</a>
    </div>
    <details><summary>${words.system}</summary>
      <textarea rows="3" aria-label=${words.system} value=${conversation.system} onInput=${(e) => change({ system: e.target.value })}></textarea>
    </details>
    ${chats.length > 0 &&
    html`<details><summary>${words.chats} (${chats.length})</summary>
      <ul class="chats">
        ${chats.map(
          (one) => html`<li key=${one.id}>
            <button type="button" class="link" disabled=${busy} onClick=${() => onOpen(one)}>${titleOf(one)}</button>
            <button type="button" aria-label=${`${words.remove}: ${titleOf(one)}`} onClick=${() => onRemove(one.id)}>×</button>
          </li>`,
        )}
      </ul></details>`}
  </div>`;
}

// The last answers of two panes as a pair. Answers to different conversations cannot be compared, nor
// can equal ones.
function pairOf({ panes, nodes, system }, given) {
  const leaves = panes.map((pane) => nodes[pane.leaf]);
  if (!leaves.every((leaf) => leaf?.role === "assistant" && leaf.content.trim())) return null;
  const [prompt, other] = leaves.map((leaf) => promptOf(nodes, system, leaf, given));
  if (JSON.stringify(prompt) !== JSON.stringify(other) || leaves[0].content === leaves[1].content) return null;
  const sources = leaves.map((leaf, at) => ({
    model: leaf.model, version: leaf.stats?.[2] || null, sampling: panes[at].settings,
  }));
  return { prompt, answers: leaves.map((leaf) => leaf.content), sources };
}

// What the model was given before this answer.
function promptOf(nodes, system, leaf, given) {
  const path = given(pathTo(nodes, leaf.parent)).map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...path] : path;
}

render(Chat);
