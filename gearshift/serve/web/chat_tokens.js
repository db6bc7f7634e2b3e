// An answer token by token: how likely each was, and what else was likely there.

import { html, useState } from "./common.js";
import { chat as words } from "./chat_en.js";

const MOST = 4096;

// Five steps from certain to unlikely; each has a line below it too, so that colour is not alone.
const step = (logprob) => Math.min(4, Math.floor(-logprob / 0.8));

const percent = (logprob) => `${(100 * Math.exp(logprob)).toPrecision(3)} %`;

const seen = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "→");

export function Tokens({ tokens }) {
  const [chosen, choose] = useState(-1);
  const token = tokens[chosen];
  return html`<div class="tokens">
    <p class="quiet">${words.scale}</p>
    <div class="token-text" dir="auto">
      ${tokens.slice(0, MOST).map(
        (one, i) =>
          html`<button
            type="button"
            key=${i}
            class=${`token step-${step(one.logprob)}`}
            aria-pressed=${i === chosen}
            onMouseEnter=${() => choose(i)}
            onFocus=${() => choose(i)}
            >${seen(one.token)}</button
          >${one.token.includes("\n") && html`<br />`}`,
      )}
    </div>
    <div class="token-figures" aria-live="polite">
      ${token &&
      html`<dl>
          <dt>${words.logprob}</dt>
          <dd>${token.logprob.toFixed(3)}</dd>
          <dt>${words.probability}</dt>
          <dd>${percent(token.logprob)}</dd>
        </dl>
        <table>
          <caption>
            ${words.most}
          </caption>
          <thead>
            <tr><th scope="col">${words.token}</th><th scope="col" class="number">${words.probability}</th></tr>
          </thead>
          <tbody>${(token.top_logprobs || []).map(
            (other) =>
              html`<tr>
                <td><code>${seen(other.token)}</code></td>
                <td class="number">${percent(other.logprob)}</td>
              </tr>`,
          )}</tbody>
        </table>`}
    </div>
  </div>`;
}
