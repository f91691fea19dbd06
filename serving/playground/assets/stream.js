// The events of a streamed chat completion, and errors in OpenAI's shape.

/** Each event of a response of server-sent events, parsed. Throws where the connection ends before "[DONE]". */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", data = [], ended = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done && ended) return;
      if (done) throw new Error("The connection ended before the answer did.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((line) => line.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line !== "" || !data.length) continue;
        const text = data.join("\n");
        data = [];
        ended ||= text === "[DONE]"; // read on: a response that is not read to its end counts as given up
        if (!ended) yield JSON.parse(text);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading wants no more
  }
}

/** What went wrong with a response that is not 2xx. */
export async function problem(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The endpoint answered ${response.status} ${response.statusText}`.trim();
  }
}
