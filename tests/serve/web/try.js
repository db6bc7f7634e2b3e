import { html, render, Shell, TextBlock } from "/web/common.js";

function Page({ served }) {
  return html`<${Shell} title="Try" page="chat" served=${served}>
    <h1>Try</h1>
    <${TextBlock} text=${served.text} />
  <//>`;
}

render(Page);
