"""From a task description to a dataset and its registry entry, through the `openai` client. Never imports torch.

settings   what can be set, and the endpoint with its key
plan       the system message and the grid of topics, people, difficulties and forms
sources    documents and seed examples as pieces to build on
cells      the independent requests that plan, sources and a seed mean
provider   one request: retries, what the server accepts; limiter: how many at once; budget: what they may cost
replies    the log of every reply, and what a reply says
select     which rows are kept, by rouge's similarity; split: which of them are held out
harvest    what a log holds, in the order of the cells
outputs    the files made from it, with preview, card and push
generate   ties these together; batch: through OpenAI's Batch API; display: how far it is
"""
