"""`surefoot run` at the terminal: one answer (`ask`), a file of prompts (`batch`), a conversation (`chat`)."""
