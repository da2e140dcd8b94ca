"""`/v1/messages`, Anthropic's API: its request as a chat, and the chat's answer as a message."""
