// Anthropic's package of Node: node anthropic_client.mjs URL KEY; prints what it saw as one JSON.
import Anthropic from "@anthropic-ai/sdk";
import { CHAT, SCHEMA } from "./asked.mjs";

const [url, key] = process.argv.slice(2);
const client = new Anthropic({ baseURL: url, apiKey: key, maxRetries: 5, timeout: 60_000 });
const seen = {};

const asked = { model: "tiny", messages: CHAT, max_tokens: 8, temperature: 0 };
const whole = await client.messages.create(asked);
seen.chat = { text: whole.content[0].text, stop_reason: whole.stop_reason };

const final = await client.messages.stream(asked).finalMessage();
seen.stream = { text: final.content[0].text, stop_reason: final.stop_reason };

const called = await client.messages.create({
  ...asked,
  max_tokens: 200,
  tools: [{ name: "tell", description: "Tell the answer.", input_schema: SCHEMA }],
  tool_choice: { type: "any" },
});
const use = called.content.find((block) => block.type === "tool_use");
seen.tools = { name: use.name, arguments: use.input, stop_reason: called.stop_reason };

const counted = await client.messages.countTokens({ model: "tiny", messages: CHAT });
seen.count_tokens = counted.input_tokens;

try {
  await client.messages.create({ ...asked, model: "nobody" });
} catch (error) {
  seen.unknown_model = { kind: error.constructor.name, status: error.status };
}

console.log(JSON.stringify(seen));
