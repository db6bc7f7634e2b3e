// The panel of the served task beside a conversation. The task's own file draws it; the state comes
// from the task's own Python code, anew after each answer.

import { api, Component, html, useEffect, useState } from "./common.js";
import { chat as words } from "./chat_en.js";

// A fault in a task's file leaves the rest of the page as it is.
class Guarded extends Component {
  componentDidCatch(error) {
    this.setState({ fault: error.message });
  }
  render({ children }, { fault }) {
    return fault ? html`<p role="alert">${fault}</p>` : children;
  }
}

// `messages` is the conversation, `send(text, role)` continues it.
export function TaskPanel({ task, messages, busy, send }) {
  const [panel, setPanel] = useState(null);
  const [state, setState] = useState(null);
  const [fault, setFault] = useState("");
  useEffect(() => {
    import("/web/task/panel.js").then(
      (module) => setPanel({ draw: module.Panel }),
      (error) => setFault(error.message),
    );
  }, []);
  const asked = busy ? null : JSON.stringify({ messages });
  useEffect(() => {
    if (!asked) return undefined;
    let newest = true;
    api("/api/task/state", { body: JSON.parse(asked) }).then(
      (next) => newest && (setFault(""), setState(next)),
      (error) => newest && setFault(error.message),
    );
    return () => {
      newest = false;
    };
  }, [asked]);
  return html`<section class="task" aria-label=${words.task}>
    ${fault && html`<p role="alert">${fault}</p>`}
    ${panel && state &&
    html`<${Guarded}><${panel.draw} state=${state} task=${task} busy=${busy} send=${send} /><//>`}
  </section>`;
}
