// The Vercel AI SDK, by its OpenAI provider and the one for servers like OpenAI's:
// node ai_sdk.mjs URL KEY; prints what it saw as one JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { SCHEMA } from "./asked.mjs";

const [url, key] = process.argv.slice(2);
const prompt = "What is 2+2?";
const limits = { maxOutputTokens: 8, temperature: 0, seed: 1 };
const tools = {
  tell: tool({ description: "Tell the answer.", inputSchema: jsonSchema(SCHEMA) }),
};
const seen = {};

async function use(chat, embedder) {
  const found = {};
  const whole = await generateText({ model: chat("tiny"), prompt, ...limits });
  found.chat = { text: whole.text, tokens: whole.usage.outputTokens };

  const stream = streamText({ model: chat("tiny"), prompt, ...limits });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  found.stream = { text, finish_reason: await stream.finishReason };

  const asked = { model: chat("tiny"), prompt, tools, toolChoice: "required", maxOutputTokens: 200 };
  const called = await generateText(asked);
  found.tools = { name: called.toolCalls[0].toolName, arguments: called.toolCalls[0].input };
  const streamed = streamText(asked);
  await streamed.consumeStream();
  const [call] = await streamed.toolCalls;
  found.streamed_tools = { name: call.toolName, arguments: call.input };

  const shaped = await generateObject({
    model: chat("tiny"),
    prompt,
    schema: jsonSchema(SCHEMA),
    maxOutputTokens: 200,
  });
  found.json_schema = shaped.object;

  const { embeddings } = await embedMany({ model: embedder("tiny"), values: ["one", "two"] });
  found.embeddings = { sizes: embeddings.map((row) => row.length) };

  const retried = await generateText({
    model: chat("cold-retried"),
    prompt,
    maxRetries: 5,
    headers: { "X-SLLM-Wait": "0" },
  });
  found.retries = { finish_reason: retried.finishReason };

  const woken = streamText({ model: chat("cold-streamed"), prompt });
  let cold = "";
  for await (const piece of woken.textStream) cold += piece;
  found.cold_start = { text: cold };
  return found;
}

const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: key });
seen.openai = await use((name) => openai.chat(name), (name) => openai.embedding(name));

const compatible = createOpenAICompatible({
  name: "sllm",
  baseURL: `${url}/v1`,
  apiKey: key,
  supportsStructuredOutputs: true,
});
seen.compatible = await use(
  (name) => compatible.chatModel(name),
  (name) => compatible.textEmbeddingModel(name),
);

const response = await generateText({ model: openai.responses("tiny"), prompt, maxOutputTokens: 16 });
seen.responses = { text: response.text };

console.log(JSON.stringify(seen));
