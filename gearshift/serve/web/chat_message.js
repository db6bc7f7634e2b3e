// One message of a conversation, with what can be done to it.

import { CopyButton, html, TextBlock, useLayoutEffect, useRef, useState } from "./common.js";
import { chat as words } from "./chat_en.js";
import { Tokens } from "./chat_tokens.js";

export function Message({ node, name, branchCount, branchAt, onBranch, onEdit, onAgain, busy }) {
  const [editing, setEditing] = useState(false);
  const [tokens, setTokens] = useState(false);
  const edit = useRef(null);
  const own = node.role !== "assistant";
  const writer = own ? words.writers[node.role] : name;
  return html`<article class=${`message ${node.role}`} aria-label=${writer}>
    <header>
      <strong>${writer}</strong>
      ${node.state && html`<span class="quiet">${words[node.state] || words.ended[node.state]}</span>`}
    </header>
    ${node.reasoning &&
    html`<details>
      <summary>${words.reasoning}</summary>
      <${TextBlock} text=${node.reasoning} />
    </details>`}
    ${editing
      ? html`<${Editor} text=${node.content} onCancel=${() => { setEditing(false); edit.current.focus(); }} onSave=${(text) => {
          setEditing(false);
          onEdit(text);
        }} />`
      : tokens
        ? html`<${Tokens} tokens=${node.tokens} />`
        : html`<${TextBlock} text=${node.content} />`}
    ${node.error && html`<p role="alert">${node.error}</p>`}
    <footer>
      ${node.stats && html`<span class="quiet">${words.stats(...node.stats)}</span>`}
      ${branchCount > 1 &&
      html`<span class="branches">
        <button type="button" aria-label=${words.earlier} disabled=${branchAt === 0} onClick=${() => onBranch(-1)}>‹</button>
        ${words.branch(branchAt + 1, branchCount)}
        <button type="button" aria-label=${words.later} disabled=${branchAt === branchCount - 1} onClick=${() => onBranch(1)}>›</button>
      </span>`}
      ${!busy && own && html`<button type="button" ref=${edit} onClick=${() => setEditing(true)}>${words.edit}</button>`}
      ${!busy && !own && html`<button type="button" title=${words.againHelp} onClick=${onAgain}>${words.again}</button>`}
      ${!busy && node.tokens?.length > 0 &&
      html`<button type="button" aria-pressed=${tokens} onClick=${() => setTokens(!tokens)}>
        ${tokens ? words.hideTokens : words.tokens}
      </button>`}
      ${!busy && !own && html`<${CopyButton} text=${() => node.content} />`}
    </footer>
  </article>`;
}

function Editor({ text, onSave, onCancel }) {
  const [value, setValue] = useState(text);
  const place = useRef(null);
  useLayoutEffect(() => place.current.focus(), []);  // before the next key comes
  return html`<form
    onSubmit=${(event) => {
      event.preventDefault();
      if (value.trim()) onSave(value);
    }}
  >
    <textarea rows="4" ref=${place} onKeyDown=${(e) => e.key === "Escape" && onCancel()} aria-label=${words.edit} value=${value} onInput=${(e) => setValue(e.target.value)}></textarea>
    <button class="primary">${words.save}</button>
    <button type="button" onClick=${onCancel}>${words.cancel}</button>
  </form>`;
}
