// Speech for the panels of tasks: a button that records and gives the words, one that speaks a text.
// The server listens and speaks; a recording is 16 kHz, one channel, 16 bits.

import { api, html, useEffect, useRef, useState } from "./common.js";
import { speech as words } from "./chat_en.js";

const RATE = 16000;
const MOST_SECONDS = 30;

// A WAV file of samples from -1 to 1. Each new sample is the mean of those that it stands for.
export function wavOf(samples, rate) {
  const step = rate / RATE;
  const count = Math.floor(samples.length / step);
  const view = new DataView(new ArrayBuffer(44 + 2 * count));
  const text = (at, word) => [...word].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * count, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * count, true);
  for (let i = 0; i < count; i += 1) {
    const from = Math.floor(i * step);
    const to = Math.max(from + 1, Math.floor((i + 1) * step));
    let sum = 0;
    for (let j = from; j < to; j += 1) sum += samples[j];
    const level = Math.max(-1, Math.min(1, sum / (to - from)));
    view.setInt16(44 + 2 * i, Math.round(level * 32767), true);
  }
  return new Uint8Array(view.buffer);
}

export const toBase64 = (bytes) => {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
};

const fromBase64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// Record from the microphone; gives a function that ends the recording and returns its WAV file.
async function record() {
  if (!navigator.mediaDevices) throw new Error(words.insecure);
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const context = new AudioContext();
  const stop = async () => {
    stream.getTracks().forEach((track) => track.stop());
    await context.close();
  };
  const blocks = [];
  try {
    await context.audioWorklet.addModule("/web/recorder.js");
    const node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
    node.port.onmessage = ({ data }) => blocks.push(data);
    context.createMediaStreamSource(stream).connect(node);
  } catch (error) {
    await stop();
    throw error;
  }
  return async () => {
    const rate = context.sampleRate;
    await stop();
    const samples = new Float32Array(Math.min(blocks.length * 128, rate * MOST_SECONDS));
    for (let i = 0; i < samples.length; i += 1) samples[i] = blocks[i >> 7][i & 127];
    return wavOf(samples, rate);
  };
}

// Records between two presses; `onText` gets the words. `missing` says what is not installed.
export function RecordButton({ onText, disabled, missing }) {
  const [state, setState] = useState("");
  const [fault, setFault] = useState("");
  const end = useRef(null);
  const timer = useRef(0);
  useEffect(() => () => void end.current?.(), []);
  const finish = async () => {
    const stop = end.current;
    end.current = null;
    clearTimeout(timer.current);
    if (!stop) return;
    setState("hears");
    try {
      const { text } = await api("/api/task/hear", { body: { wav: toBase64(await stop()) } });
      if (text) onText(text);
      else setFault(words.nothing);
    } catch (error) {
      setFault(error.message);
    }
    setState("");
  };
  const begin = async () => {
    setFault("");
    setState("begins");
    try {
      end.current = await record();
      timer.current = setTimeout(finish, MOST_SECONDS * 1000);
      setState("records");
    } catch (error) {
      setFault(error.name === "NotAllowedError" ? words.refused : error.message);
      setState("");
    }
  };
  if (missing) return html`<p class="quiet">${missing}</p>`;
  const busy = state === "hears" || state === "begins";
  return html`<button type="button" aria-pressed=${state === "records"}
      disabled=${busy || (disabled && !state)} onClick=${state === "records" ? finish : begin}>
      ${words.states[state]}
    </button>
    <span role="alert">${fault}</span>`;
}

// Speaks a text. When `turn` changes and the ref `next` is set, it does so at once, and clears `next`.
export function SpeakButton({ text, language, turn, next, missing }) {
  const [fault, setFault] = useState("");
  const speak = async () => {
    setFault("");
    try {
      const { wav } = await api("/api/task/speak", { body: { text, language } });
      const address = URL.createObjectURL(new Blob([fromBase64(wav)], { type: "audio/wav" }));
      const sound = new Audio(address);
      sound.onended = sound.onerror = () => URL.revokeObjectURL(address);
      await sound.play();
    } catch (error) {
      setFault(error.message);
    }
  };
  useEffect(() => {
    if (!next?.current) return;
    next.current = false;
    if (text && !missing) speak();
  }, [turn]);
  if (missing) return html`<p class="quiet">${missing}</p>`;
  return html`<button type="button" disabled=${!text} onClick=${speak}>${words.speak}</button>
    <span role="alert">${fault}</span>`;
}
