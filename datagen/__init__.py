"""From a task description to a dataset and its registry entry, through the `openai` client. Never imports torch.

settings      what can be set; endpoint: the server and its key
plan          the system message, and the topics, people, difficulties and forms that examples are spread over
documents     documents and seed examples as pieces to build on; chunking: where they are cut
grid          the independent requests that plan, pieces and a seed mean; prompts: their wording
provider      one request: retries, what the server accepts; limiter: how many at once; budget: what they may cost
replies       what a reply says; reply_log: the log of all of them
curation      which replies become rows; filtering: by similarity (rouge), language, length; split: which are held out
outputs       the files made from it, with preview, card and push
make_dataset  ties these together; job: the asking; batch_api: through OpenAI's Batch API
"""
