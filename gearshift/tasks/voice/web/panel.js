// The voice assistant's panel: the home, what the last command did to it, a microphone and a voice.

import { html, useRef } from "/web/common.js";
import { RecordButton, SpeakButton } from "/web/speech.js";

const words = {
  title: "The home",
  rest: "All rooms and devices",
  changed: "this command",
};

export function Panel({ state, task, busy, send }) {
  const bySpeech = useRef(false);
  const ask = (text) => {
    bySpeech.current = true;
    send(text);
  };
  const [now, rest] = [true, false].map((changed) =>
    state.rooms
      .map((room) => ({ ...room, devices: room.devices.filter((one) => one.changed === changed) }))
      .filter((room) => room.devices.length),
  );
  return html`<h2>${words.title}</h2>
    <div class="row">
      <${RecordButton} onText=${ask} disabled=${busy} missing=${task.missing.hear} />
      <${SpeakButton} text=${state.did} language=${state.language} turn=${state} next=${bySpeech}
        missing=${task.missing.speak} />
    </div>
    <p role="status" lang=${state.did ? state.language : null}>${state.fault || state.did}</p>
    ${now.length > 0 && html`<${Rooms} rooms=${now} caption=${words.changed} />`}
    <details>
      <summary>${words.rest}</summary>
      <${Rooms} rooms=${rest} caption=${words.rest} />
    </details>`;
}

function Rooms({ rooms, caption }) {
  return html`<table>
    <caption class="hidden">${caption}</caption>
    ${rooms.map(
      (room) => html`<tbody key=${room.name}>
        ${room.devices.map(
          (device, i) => html`<tr key=${device.name}>
            ${i === 0 && html`<th scope="rowgroup" rowspan=${room.devices.length}>${room.name}</th>`}
            <td>${device.changed ? html`<strong>${device.name}</strong>` : device.name}</td>
            <td>${device.state}</td>
          </tr>`,
        )}
      </tbody>`,
    )}
  </table>`;
}
