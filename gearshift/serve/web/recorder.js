// Runs in the browser's audio thread: passes the samples of the first channel on.
registerProcessor(
  "recorder",
  class extends AudioWorkletProcessor {
    process([input]) {
      if (input[0]) this.port.postMessage(input[0].slice());
      return true;
    }
  },
);
