"""`/v1/responses`: its request as a chat, and the chat's answer as a response with typed events."""
