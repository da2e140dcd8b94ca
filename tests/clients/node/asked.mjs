// What every client of Node asks for.
export const CHAT = [{ role: "user", content: "What is 2+2?" }];

// Few words to choose from, so that random weights end soon, too.
export const SCHEMA = {
  type: "object",
  properties: { answer: { type: "string", enum: ["yes", "no"] } },
  required: ["answer"],
  additionalProperties: false,
};

export const TOOL = {
  type: "function",
  function: { name: "tell", description: "Tell the answer.", parameters: SCHEMA },
};
