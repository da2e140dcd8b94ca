// The `openai` package of Node: node openai_client.mjs URL KEY; prints what it saw as one JSON.
import OpenAI from "openai";
import { CHAT, SCHEMA, TOOL } from "./asked.mjs";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 5, timeout: 60_000 });
const seen = {};

const asked = { model: "tiny", messages: CHAT, max_tokens: 8, temperature: 0, seed: 1 };
const whole = await client.chat.completions.create(asked);
seen.chat = { text: whole.choices[0].message.content, tokens: whole.usage.completion_tokens };

const stream = await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true },
});
let text = "";
let tokens = null;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta.content ?? "";
  tokens = chunk.usage?.completion_tokens ?? tokens;
}
seen.stream = { text, tokens };

const helper = client.chat.completions.stream(asked);
seen.helper = { text: (await helper.finalChatCompletion()).choices[0].message.content };

const called = await client.chat.completions.create({
  model: "tiny",
  messages: CHAT,
  max_tokens: 200,
  tools: [TOOL],
  tool_choice: "required",
});
const call = called.choices[0].message.tool_calls[0];
seen.tools = {
  name: call.function.name,
  arguments: JSON.parse(call.function.arguments),
  finish_reason: called.choices[0].finish_reason,
};

const runner = client.chat.completions.stream({
  model: "tiny",
  messages: CHAT,
  max_tokens: 200,
  tools: [TOOL],
  tool_choice: "required",
});
const streamed = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0];
seen.streamed_tools = {
  name: streamed.function.name,
  arguments: JSON.parse(streamed.function.arguments),
};

const shaped = await client.chat.completions.parse({
  model: "tiny",
  messages: CHAT,
  max_tokens: 200,
  response_format: {
    type: "json_schema",
    json_schema: { name: "answer", strict: true, schema: SCHEMA },
  },
});
seen.json_schema = JSON.parse(shaped.choices[0].message.content);

const embedded = await client.embeddings.create({ model: "tiny", input: ["one", "two"] });
const floats = await client.embeddings.create({
  model: "tiny",
  input: ["one", "two"],
  encoding_format: "float",
});
seen.embeddings = {
  sizes: embedded.data.map((row) => row.embedding.length),
  apart: Math.max(
    ...embedded.data[0].embedding.map((x, i) => Math.abs(x - floats.data[0].embedding[i])),
  ),
};

seen.models = [];
for await (const model of client.models.list()) seen.models.push(model.id);

const retried = await client.chat.completions.create(
  { model: "cold-retried", messages: CHAT },
  { headers: { "X-SLLM-Wait": "0" } },
);
seen.retries = { finish_reason: retried.choices[0].finish_reason };

let cold = "";
const woken = await client.chat.completions.create({
  model: "cold-streamed",
  messages: CHAT,
  stream: true,
});
for await (const chunk of woken) cold += chunk.choices[0]?.delta.content ?? "";
seen.cold_start = { text: cold };

try {
  await client.chat.completions.create({ model: "nobody", messages: CHAT });
} catch (error) {
  seen.unknown_model = { kind: error.constructor.name, code: error.code, status: error.status };
}

const response = await client.responses.create({
  model: "tiny",
  input: "What is 2+2?",
  max_output_tokens: 16,
});
seen.responses = { text: response.output_text, status: response.status };

console.log(JSON.stringify(seen));
