"""From a task description to a dataset and its registry entry, through the `openai` client. Never imports torch.

settings   what can be set, and the endpoint with its key
cells      the independent requests that a task and a seed mean
provider   one request: retries, cool-down, what the server accepts
replies    the log of every reply, and which replies are rows
outputs    the files made from the log
generate   ties these together
"""
