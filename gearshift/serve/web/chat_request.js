// One answer of a model: the request's body, its stream, and the same request in other languages.

import { api, events } from "./common.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

// The body of POST /v1/chat/completions. `settings` has texts by field; an empty one is left out.
export function bodyOf(model, system, messages, settings) {
  const body = { model, messages: messages.map(({ role, content }) => ({ role, content })) };
  if (system) body.messages.unshift({ role: "system", content: system });
  for (const name of NUMBERS) {
    const value = parseFloat(settings[name]);
    if (Number.isFinite(value)) body[name] = value;
  }
  const stops = (settings.stop || "").split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  return body;
}

// Stream an answer. `onPart` gets what came so far, {content, reasoning, tokens, version, first},
// after each piece. Returns the same with `finish`; the signal ends it, and with it the request.
export async function answer(body, signal, onPart) {
  const found = { content: "", reasoning: "", tokens: [], version: "", first: 0, finish: "" };
  const began = performance.now();
  const stream = await api("/v1/chat/completions", {
    body: {
      ...body,
      stream: true,
      stream_options: { include_usage: true },
      logprobs: true,
      top_logprobs: 5,
    },
    signal,
    raw: true,
  });
  for await (const { data } of events(stream)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    found.version = (chunk.system_fingerprint || found.version).split("-")[0];
    if (chunk.usage) found.count = chunk.usage.completion_tokens;
    for (const choice of chunk.choices || []) {
      found.content += choice.delta?.content || "";
      found.reasoning += choice.delta?.reasoning_content || "";
      found.tokens.push(...(choice.logprobs?.content || []));
      found.finish = choice.finish_reason || found.finish;
    }
    if (!found.first && found.tokens.length) found.first = performance.now() - began;
    found.seconds = (performance.now() - began) / 1000;
    onPart({ ...found });
  }
  return found;
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

// The request as a program of another language.
export const asText = {
  json: (body) => JSON.stringify(body, null, 2),
  curl: (body) =>
    `curl ${location.origin}/v1/chat/completions \\\n` +
    `  -H 'Content-Type: application/json' -H "Authorization: Bearer $GEARSHIFT_KEY" \\\n` +
    `  -d ${quoted(JSON.stringify(body))}`,
  python: (body) => {
    const { top_k, min_p, ...known } = body;
    const extra = JSON.stringify(Object.fromEntries(
      Object.entries({ top_k, min_p }).filter(([, value]) => value !== undefined),
    ));
    const given = Object.entries(known).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
    if (extra !== "{}") given.push(`    extra_body=${extra},`);
    return [
      "import os",
      "from openai import OpenAI",
      "",
      `client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ.get("GEARSHIFT_KEY", "none"))`,
      "answer = client.chat.completions.create(",
      ...given,
      ")",
      "print(answer.choices[0].message.content)",
    ].join("\n");
  },
};
