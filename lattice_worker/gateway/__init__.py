"""The gateway of a node: the process by which tasks reach models, in the API of OpenAI."""
